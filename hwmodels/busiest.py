"""How many tokens does the busiest rank get when experts differ in popularity, in the mean over steps?

expected_max, busiest_rank     mean and spread of the busiest rank's tokens without drawing, as a table over tokens

Tokens of a step choose independently of each other, each top_k different experts with the probabilities of the
statistics: the design of greatest entropy with those probabilities (conditional Poisson sampling, Hájek 1964; Chen,
Dempster and Liu, Biometrika 81, 1994). Choices that hang together (tokens of one request, group-limited routing) spread
ranks further apart than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from hwmodels.routing import Array, RoutingError, RoutingStats

#: Nodes of the sum over tokens of the busiest rank; every integer where these are fewer.
NODES = 24
#: Probability left below the first node, and deviations above a rank's mean (and tokens more) where the last one is.
UNLIKELY, ABOVE, MORE = 1e-7, 5.5, 4.0
#: Variance from which the skewness of a binomial is a small correction.
MANY = 200.0
#: Token counts of a table: two for every doubling to 256, one from there to 2^17.
TOKENS = tuple(int(n) for n in np.unique(np.round(2.0 ** np.r_[0:8:0.5, 8:18])))
#: Probabilities of the quantiles that are kept of the busiest rank's tokens.
LEVELS = np.array([0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999])
#: Equally likely parts that a layer's steps are cut into where layers are put together.
STEPS = 1000
#: What a table has for each layer.
PER_LAYER = ("mean", "rows", "deviation", "quantiles", "active", "touched")


@dataclass(frozen=True, slots=True, eq=False)
class Largest:
    """The largest of several random numbers: mean, standard deviation [...] and quantiles [..., Q] at LEVELS."""

    mean: Array
    deviation: Array
    quantiles: Array


def expected_max(means: Array, variances: Array) -> Largest:
    """The largest of G whole numbers whose sum is nearly fixed, without drawing.

    means, variances   [..., G] of independent numbers that, given their sum, are the ones meant: for tokens of ranks
                       tokens * those of rank_moments

    The largest of numbers tied by their sum has almost the mean of the largest of the free ones: the sum S of the free
    is independent of the tied in the normal limit, and moves all of them in proportion to their variances; that part,
    of the number likeliest to be largest, is taken out of the deviation. Free numbers are binomial with these moments,
    by a normal approximation. Fewer than four tokens are no crowd: one token on few ranks is missed by up to 5 %.
    E max = sum over x of 1 - prod_g P(X_g <= x), every integer or, where these are many,
    midpoints of NODES equal parts.
    """
    shape, ranks = means.shape[:-1], means.shape[-1]
    means, variances = means.reshape(-1, ranks), variances.reshape(-1, ranks)
    deviation = np.sqrt(variances)
    low = np.floor(np.maximum(_lowest(means, deviation), 0))
    high = (means + ABOVE * deviation).max(axis=1) + MORE
    nodes = int(min(NODES, np.ceil((high - low).max())))
    step = np.maximum((high - low) / nodes, 1.0)
    at = low[:, None] - 0.5 + step[:, None] * (np.arange(nodes) + 0.5)
    below = np.prod(_binomial_cdf(at[:, None, :], means[:, :, None], variances[:, :, None]), axis=1)
    mean = low + step * (1 - below).sum(axis=1)
    # E max^2 = sum of (2x + 1) P(max > x); midpoints of parts longer than 1 add what a lattice adds to a variance.
    square = low**2 + step * ((2 * at + 1) * (1 - below)).sum(axis=1)
    free = np.maximum(square - mean**2 - (step**2 - 1) / 12, 0)
    likeliest = (means + deviation).argmax(axis=1)[:, None]
    pull = np.take_along_axis(variances, likeliest, axis=1)[:, 0]
    tied = np.maximum(free - pull**2 / np.maximum(variances.sum(axis=1), 1e-300), 0)
    shrink = np.sqrt(tied / np.maximum(free, 1e-300))
    quantiles = mean[:, None] + shrink[:, None] * (_quantiles(at, below) - mean[:, None])
    # The largest is never below the average, which the tied sum fixes.
    quantiles = np.maximum(quantiles, means.mean(axis=1)[:, None])
    return Largest(mean.reshape(shape), np.sqrt(tied).reshape(shape), quantiles.reshape(*shape, len(LEVELS)))


def _lowest(means: Array, deviation: Array) -> Array:
    """[R] where the largest of each row's normal numbers lies below with a probability of about UNLIKELY.

    If j of them have mean + a deviation above x, all are below x with a probability below Phi(a)^j.
    """
    ranks = means.shape[1]
    out = np.full(len(means), -np.inf)
    for j in {min(2**i, ranks) for i in range(ranks.bit_length() + 1)}:
        levels = means + ndtri(UNLIKELY ** (1 / j)) * deviation
        out = np.maximum(out, np.partition(levels, ranks - j, axis=1)[:, ranks - j])
    return out


def _quantiles(at: Array, below: Array) -> Array:
    """[R, Q] where `below` [R, nodes], read as a line between nodes, reaches LEVELS.

    A whole number x stands for x - 1/2 to x + 1/2, so that what is drawn between quantiles keeps the mean.
    """
    last = below.shape[1] - 1
    out = np.empty((len(at), len(LEVELS)))
    for column, level in enumerate(LEVELS):
        right = np.minimum((below < level).sum(axis=1), last)[:, None]
        left = np.maximum(right - 1, 0)
        x, y = np.take_along_axis(at, right, 1)[:, 0], np.take_along_axis(below, right, 1)[:, 0]
        x0, y0 = np.take_along_axis(at, left, 1)[:, 0], np.take_along_axis(below, left, 1)[:, 0]
        part = np.clip((level - y0) / np.maximum(y - y0, 1e-300), 0, 1)
        out[:, column] = x0 + part * (x - x0) + 0.5
    return out


def rank_moments(inclusion: Array, rank_shares: Array) -> tuple[Array, Array]:
    """(means, variances) [L, G] for one token of the free numbers that expected_max takes; both grow with tokens.

    inclusion     [L, E] as RoutingStats.inclusion
    rank_shares   [L, G, E] part of an expert's tokens each rank computes, or [G, E] for all layers alike

    Picks of one token have nearly the covariance diag(b) - b b' / sum(b) (Hájek 1964), b so that its diagonal is that
    of single picks, p (1 - p) (Deville and Tillé, JSPI 128, 2005): free numbers of variance b tied by their sum.
    A replica's part f of an expert's tokens adds p f (1 - f) to f^2 b.
    """
    free = free_variance(inclusion)
    shares = np.broadcast_to(rank_shares, (len(inclusion), *rank_shares.shape[-2:]))
    means = np.matmul(shares, inclusion[:, :, None])[:, :, 0]
    square = np.matmul(shares**2, (np.minimum(free, inclusion) - inclusion)[:, :, None])[:, :, 0]
    return means, np.maximum(means + square, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class BusiestRank:
    """A plan's busiest rank over token counts, layer by layer: [L, T] each, from `busiest_rank`.

    tokens      [T] tokens of a step, ascending
    mean        tokens of the average rank
    rows        expected tokens of the busiest rank
    deviation   standard deviation of the busiest rank's tokens from step to step
    quantiles   [L, T, Q] of the busiest rank's tokens, at LEVELS
    active      expected experts with at least one token on the average rank
    touched     expected experts with at least one token on the rank that has most of them
    shares      [L, G] of the choices that fall on each rank
    """

    tokens: Array
    mean: Array
    rows: Array
    deviation: Array
    quantiles: Array
    active: Array
    touched: Array
    shares: Array

    @property
    def average(self) -> BusiestRank:
        """The same with one row, the mean over layers."""
        rows = {name: getattr(self, name).mean(axis=0, keepdims=True) for name in PER_LAYER}
        return replace(self, **rows)

    def at(self, tokens: ArrayLike) -> tuple[Array, Array]:
        """(rows, touched) [L, ...] of the busiest rank at other token counts, between the table's and above them."""
        wanted = np.asarray(tokens, dtype=np.float64)
        flat = wanted.reshape(-1)
        shape = (len(self.rows), *wanted.shape)
        rows = self._lines(self.rows, flat)
        logs = np.log(np.maximum(flat, 1e-9))
        touched = np.stack([np.interp(logs, np.log(self.tokens), row) for row in self.touched])
        return rows.reshape(shape), touched.reshape(shape)

    def draw(self, rng: np.random.Generator, tokens: float) -> Array:
        """[L] tokens of the busiest rank in one step of `tokens` tokens, independent between layers."""
        levels = self._lines(self.quantiles, np.array([float(tokens)]))[:, 0]
        return np.array([np.interp(u, LEVELS, row) for u, row in zip(rng.random(len(levels)), levels, strict=True)])

    def over_mean(self, tokens: float, levels: Sequence[float]) -> Array:
        """Quantiles at `levels` of busiest / average rank's tokens in steps of `tokens` tokens, over steps and layers.

        Every layer of every step counts once; beyond the outermost LEVELS a layer's tokens are taken as those there.
        """
        each = self._lines(self.quantiles, np.array([float(tokens)]))[:, 0]
        each /= self.mean[:, :1] / self.tokens[0] * float(tokens)
        parts = (np.arange(STEPS) + 0.5) / STEPS
        found: Array = np.quantile(np.array([np.interp(parts, LEVELS, row) for row in each]), np.asarray(levels))
        return found

    def _lines(self, values: Array, tokens: Array) -> Array:
        """`values` [L, T, ...] at `tokens` [N], [L, N, ...]: values per token as lines of 1 / sqrt(tokens), the law of
        both a rank that is busiest by its load and one that is so by chance."""
        wanted = np.maximum(tokens, self.tokens[0])
        right = np.clip(np.searchsorted(self.tokens, wanted), 1, len(self.tokens) - 1)
        a, b = self.tokens[right - 1], self.tokens[right]
        part = (a**-0.5 - wanted**-0.5) / (a**-0.5 - b**-0.5)
        spread = (1, -1) + (1,) * (values.ndim - 2)
        left, rest = ((1 - part) / a).reshape(spread), (part / b).reshape(spread)
        each = left * values[:, right - 1] + rest * values[:, right]
        return np.asarray(np.maximum(tokens, 0.0).reshape(spread) * each)


def busiest_rank(stats: RoutingStats, rank_shares: Array, tokens: tuple[int, ...] = TOKENS) -> BusiestRank:
    """The table of a plan: every layer at every token count, rank_shares as rank_moments takes them.

    Raises RoutingError for token counts that do not ascend from 1.
    """
    if len(tokens) < 2 or tokens[0] < 1 or any(b <= a for a, b in pairwise(tokens)):
        raise RoutingError(f"token counts {list(tokens)}: expected at least two, ascending, from 1")
    inclusion = stats.inclusion
    means, variances = rank_moments(inclusion, rank_shares)
    shares = np.broadcast_to(rank_shares, (len(inclusion), *rank_shares.shape[-2:]))
    picks = _slots(inclusion[:, None, :] * shares)
    missed = np.log1p(-np.minimum(picks, 1 - 1e-12))
    rows, deviation, active, touched = (np.empty((len(inclusion), len(tokens))) for _ in range(4))
    quantiles = np.empty((*rows.shape, len(LEVELS)))
    for column, n in enumerate(tokens):
        largest = expected_max(n * means, n * variances)
        rows[:, column], deviation[:, column] = largest.mean, largest.deviation
        quantiles[:, column] = largest.quantiles
        picked = -np.expm1(n * missed)
        active[:, column] = picked.sum(axis=2).mean(axis=1)
        touched[:, column] = most_touched(picked)
    at = np.asarray(tokens, dtype=np.float64)
    return BusiestRank(
        at, means.mean(axis=1, keepdims=True) * at, rows, deviation, quantiles, active, touched,
        means / means.sum(axis=1, keepdims=True),
    )  # fmt: skip


def most_touched(picked: Array) -> Array:
    """[L] expected experts with a token on the rank that has most, of `picked` [L, G, slots], the chance of each slot.

    Each rank's number is exact for independent slots (Poisson binomial, one slot after the other). Slots are taken as
    independent, which one token's are not: with a single token of Mixtral on 8 ranks the result is 10 % low.
    """
    layers, ranks, slots = picked.shape
    number = np.zeros((layers, ranks, slots + 1))
    number[..., 0] = 1
    for slot in range(slots):
        chance = picked[..., slot, None]
        moved = number[..., : slot + 1] * chance
        number[..., : slot + 1] -= moved
        number[..., 1 : slot + 2] += moved
    most: Array = (1 - np.prod(np.cumsum(number[..., :-1], axis=2), axis=1)).sum(axis=1)
    return most


def _slots(values: Array) -> Array:
    """[L, G, slots] the values above 0 of [L, G, E], zeros behind them; slots as many as the fullest rank has."""
    held = values > 0
    order = np.argsort(~held, axis=2, kind="stable")[..., : int(held.sum(axis=2).max())]
    return np.take_along_axis(values, order, axis=2)


def _binomial_cdf(at: Array, mean: Array, variance: Array) -> Array:
    """P(X <= at) of a binomial with this mean and variance, smooth in `at`.

    Normal approximation of Peizer and Pratt (JASA 63, 1968), wrong by less than 0.001 from a mean of 1 on; with a
    variance of MANY and more the two-term expansion of Cornish and Fisher, which costs a fifth.
    """
    if variance.min() >= MANY:
        deviation = np.sqrt(variance)
        z = np.clip((at + 0.5 - mean) / deviation, -9.0, 9.0)  # the expansion turns round far outside
        return np.asarray(ndtr(z - (2 * variance / mean - 1) / (6 * deviation) * (z * z - 1)))
    mean = np.maximum(mean, 1e-12)
    p = np.clip(1 - variance / mean, 1e-9, 1 - 1e-9)
    q, trials = 1 - p, mean / p
    below = at + 0.5
    over = trials - below
    inside = np.maximum(over, 1e-9)
    correction = 0.02 * (q / (below + 0.5) - p / (inside + 0.5) + (q - 0.5) / (trials + 1))
    distance = below + 1 / 6 - (trials + 1 / 3) * p + correction
    factor = 1 + q * _skew(below / mean) + p * _skew(inside / (trials * q))
    z = distance * np.sqrt(factor / ((trials + 1 / 6) * p * q))
    return np.where(over <= 0, 1.0, ndtr(z))


def _skew(u: Array) -> Array:
    """(1 - u^2 + 2 u ln u) / (1 - u)^2, by its series near 1."""
    d = 1 - u
    near = np.abs(d) < 0.02
    safe = np.where(near, 0.5, np.maximum(u, 1e-300))
    far = (1 - safe**2 + 2 * safe * np.log(safe)) / (1 - safe) ** 2
    out: Array = np.where(near, d / 3 + d**2 / 6 + d**3 / 10, far)
    return out


def free_variance(inclusion: Array) -> Array:
    """[L, E] b with b - b^2 / sum(b) = p (1 - p) for the inclusions p."""
    alone = inclusion * (1 - inclusion)
    free = alone.copy()
    for _ in range(100):
        new = alone + free**2 / np.maximum(free.sum(axis=1, keepdims=True), 1e-300)
        done = np.abs(new - free).max() < 1e-13
        free = new
        if done:
            break
    return np.asarray(free)
