"""What does routing look like that nobody recorded: whole models, or transitions where only loads are known?

synthesize          loads and transitions like those of real recordings
with_transitions    transitions for recordings that lack them
fit_skew, matched_skew   how skewed real recordings are, in the terms that synthesize takes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtri

from hwmodels.routing import Array, RoutingError, RoutingStats

Order = NDArray[np.int64]

#: Largest skew that matched_skew looks for.
LARGEST_SKEW = 8.0


@dataclass(frozen=True, slots=True, eq=False)
class SkewFit:
    """How the sorted loads of every mixture layer fall: [L] each.

    exponent, exponent_r2   share ~ rank^-exponent, by least squares of logarithms, and the part of variance explained
    sigma, sigma_r2         the same for a lognormal: deviation of the logarithm of the share, over normal quantiles
    """

    exponent: Array
    exponent_r2: Array
    sigma: Array
    sigma_r2: Array


def fit_skew(stats: RoutingStats) -> SkewFit:
    """Power law and lognormal fitted to the loads of each layer, largest first."""
    logs = np.log(-np.sort(-stats.shares, axis=1))
    rank = np.arange(1, stats.experts + 1)
    slope, r2 = _line(-np.log(rank), logs)
    sigma, sigma_r2 = _line(-ndtri((rank - 0.5) / stats.experts), logs)
    return SkewFit(slope, r2, sigma, sigma_r2)


def matched_skew(stats: RoutingStats, shape: Callable[[int, float], Array]) -> Array:
    """[L] skew with which `shape` has the coefficient of variation of each layer's loads, 0 to LARGEST_SKEW.

    This, not a straight line through logarithms, keeps the busiest rank: with experts of DeepSeek-V3's recordings
    shuffled over 32 ranks, its share is met within 2 % by the lognormal matched so (power law: 8 to 11 % high), while
    lines through logarithms are 6 to 10 % low (power law: 37 to 94 % high).
    """
    experts = stats.experts

    def excess(skew: float, wanted: float) -> float:
        return float(shape(experts, skew).std() * experts) - wanted

    out = np.empty(len(stats.layers))
    for layer, wanted in enumerate(stats.shares.std(axis=1) * experts):
        low, high = excess(0.0, wanted), excess(LARGEST_SKEW, wanted)
        out[layer] = 0.0 if low >= 0 else LARGEST_SKEW if high <= 0 else brentq(excess, 0, LARGEST_SKEW, args=(wanted,))
    return out


def power_law(experts: int, skew: float) -> Array:
    """Shares that fall as rank^-skew, largest first.

    >>> power_law(2, 1.0).round(3).tolist()
    [0.667, 0.333]
    """
    shares = np.arange(1, experts + 1) ** -float(skew)
    return np.asarray(shares / shares.sum())


def lognormal(experts: int, skew: float) -> Array:
    """Shares whose logarithms have the deviation `skew`: the middles of equally likely parts, largest first."""
    shares = np.exp(-skew * ndtri((np.arange(experts) + 0.5) / experts))
    return np.asarray(shares / shares.sum())


def synthesize(
    rng: np.random.Generator,
    layers: int,
    experts: int,
    top_k: int,
    skew: float,
    topics: int,
    concentration: float,
    *,
    shape: Callable[[int, float], Array] = lognormal,
    preference: float = 1.0,
) -> RoutingStats:
    """Statistics of a made-up model of `layers` mixture layers, 0 to layers - 1, transitions included.

    skew            of the loads of a layer, whose order is drawn: what `shape` (power_law or lognormal) takes. The
                    recordings of DeepSeek-V3 are matched by lognormals of 0.7 to 0.9, those of Mixtral by 0.15 to 0.2
                    (matched_skew, means over layers; tests/published/test_routing_files.py)
    topics          kinds of tokens, equally frequent, that prefer some experts in every layer; 1 for none
    preference      deviation of the logarithm of a topic's liking for an expert
    concentration   part of the choices, 0 to 1, whose next expert follows from the present one; the others follow from
                    the topic alone

    Loads and transitions agree: share(l) T(l) = share(l + 1) up to rounding. A share above what top_k allows is cut
    and spread over the others. Raises RoutingError for values out of range.
    """
    if layers < 1 or topics < 1 or not 1 <= top_k <= experts:
        raise RoutingError(f"layers {layers}, topics {topics}, top_k {top_k} of {experts}: expected at least one each")
    if not (np.isfinite(skew) and skew >= 0 and np.isfinite(preference) and preference >= 0):
        raise RoutingError(f"skew {skew:g}, preference {preference:g}: expected numbers from 0")
    _check_concentration(concentration)
    shares = np.stack([rng.permutation(_cut(shape(experts, skew), top_k)) for _ in range(layers)])
    liking = np.exp(preference * rng.standard_normal((layers, topics, experts)))
    by_topic = _fitted(liking, shares)
    transitions = np.empty((layers - 1, experts, experts))
    for layer in range(layers - 1):
        follows = by_topic[layer].T @ by_topic[layer + 1] * topics
        orders = rng.permutation(experts), rng.permutation(experts)
        joint = (1 - concentration) * follows + concentration * _coupled(shares[layer], shares[layer + 1], *orders)
        transitions[layer] = joint / joint.sum(axis=1, keepdims=True)
    source = f"synthetic: skew {skew:g}, {topics} topics, concentration {concentration:g}"
    return RoutingStats("synthetic", tuple(range(layers)), shares, top_k, source, transitions)


def with_transitions(stats: RoutingStats, concentration: float, rng: np.random.Generator | None = None) -> RoutingStats:
    """The same loads with assumed transitions: the part `concentration` of choices follows from the one before.

    These go from the most popular experts of a layer to the most popular of the next, in order, as far as loads allow;
    in an order drawn for each layer where there is an rng. All other choices ignore the layer before. Loads and
    transitions agree exactly. Raises RoutingError for a concentration outside 0 to 1.
    """
    _check_concentration(concentration)
    shares = stats.shares
    transitions = np.empty((len(shares) - 1, stats.experts, stats.experts))
    for layer, (here, there) in enumerate(pairwise(shares)):
        if rng is None:
            orders = np.argsort(-here, kind="stable"), np.argsort(-there, kind="stable")
        else:
            orders = rng.permutation(stats.experts), rng.permutation(stats.experts)
        joint = (1 - concentration) * np.outer(here, there) + concentration * _coupled(here, there, *orders)
        transitions[layer] = joint / joint.sum(axis=1, keepdims=True)
    source = f"{stats.source}, transitions assumed with concentration {concentration:g}"
    return replace(stats, transitions=transitions, source=source)


def _line(x: Array, rows: Array) -> tuple[Array, Array]:
    """(slope, r squared) of each row over x."""
    x = x - x.mean()
    y = rows - rows.mean(axis=1, keepdims=True)
    slope = y @ x / (x @ x)
    rest = ((y - slope[:, None] * x) ** 2).sum(axis=1)
    all_of_it = (y**2).sum(axis=1)
    return slope, 1 - rest / np.maximum(all_of_it, 1e-300)


def _cut(shares: Array, top_k: int) -> Array:
    """The shares with none above 1 / top_k, what is cut spread over the others in proportion."""
    most = 1.0 / top_k
    shares = shares.copy()
    for _ in range(len(shares)):
        over = shares > most
        if not over.any() or over.all():
            break
        full = shares >= most
        rest = 1 - most * full.sum()
        shares = np.where(full, most, shares * (rest / max(shares[~full].sum(), 1e-300)))
    return np.asarray(shares / shares.sum())


def _fitted(liking: Array, shares: Array) -> Array:
    """[L, K, E] joint shares of topics and experts: `liking` scaled until topics are equal and experts get `shares`.

    Iterative proportional fitting; the last scaling is that of experts, so their shares are exact, and topics agree to
    1e-12.
    """
    joint = liking * shares[:, None, :]
    for _ in range(10_000):
        joint = joint / (joint.sum(axis=2, keepdims=True) * liking.shape[1])
        joint = joint * (shares / joint.sum(axis=1))[:, None, :]
        if np.abs(joint.sum(axis=2) * liking.shape[1] - 1).max() < 1e-12:
            break
    return np.asarray(joint)


def _coupled(here: Array, there: Array, one: Order, two: Order) -> Array:
    """[E, E] joint shares with margins `here` and `there` that pair them in the orders given (north-west corner)."""
    joint = np.zeros((len(here), len(there)))
    edges = np.unique(np.concatenate([np.cumsum(here[one]), np.cumsum(there[two]), [0.0]]))
    edges = edges[edges <= 1 + 1e-12]
    middle = (edges[1:] + edges[:-1]) / 2
    a = np.minimum(np.searchsorted(np.cumsum(here[one]), middle), len(here) - 1)
    b = np.minimum(np.searchsorted(np.cumsum(there[two]), middle), len(there) - 1)
    np.add.at(joint, (one[a], two[b]), np.diff(edges))
    return joint


def _check_concentration(concentration: float) -> None:
    if not 0 <= concentration <= 1:
        raise RoutingError(f"concentration {concentration:g}: expected a part from 0 to 1")
