"""Which experts do the tokens of a step choose, if each chooses for itself?

Tokens of a step choose independently of each other, each top_k different experts with the probabilities of the
statistics: the design of greatest entropy with those probabilities (conditional Poisson sampling, Hájek 1964; Chen,
Dempster and Liu, Biometrika 81, 1994). Choices that hang together (tokens of one request, group-limited routing) spread
ranks further apart than this. hwmodels.busiest tells the busiest rank's tokens without drawing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.busiest import free_variance
from hwmodels.routing import Array

Counts = NDArray[np.int64]


def choice_odds(inclusion: Array) -> Array:
    """[L, E] odds of independent picks that, given top_k picks in all, pick every expert with `inclusion` [L, E].

    By Newton steps on the logarithms of odds with the covariance of rank_moments, until inclusions agree to 1e-10. Rows
    of `inclusion` sum to top_k.
    """
    wanted = np.clip(inclusion, 1e-12, 1 - 1e-9)
    top_k = int(np.rint(inclusion.sum(axis=1)[0]))
    if top_k == inclusion.shape[1]:
        return np.ones_like(wanted)
    odds = wanted / (1 - wanted)
    for _ in range(200):
        odds *= top_k / odds.sum(axis=1, keepdims=True)
        had = _inclusion(odds, top_k)
        if np.abs(had / wanted - 1).max() < 1e-10:
            break
        odds = odds * np.exp(np.clip((wanted - had) / np.maximum(free_variance(had), 1e-12), -1, 1))
    return np.asarray(odds)


@dataclass(frozen=True, slots=True, eq=False)
class Chooser:
    """How the tokens of one layer pick experts: what draw_counts needs, worked out once.

    chances   [E, top_k + 1] probability that a token with m picks left, all among this expert and those after it,
              picks this one
    """

    chances: Array

    @classmethod
    def of(cls, inclusion: Array) -> Chooser:
        """inclusion   [E] probability that a token picks each expert; sums to top_k."""
        odds = choice_odds(inclusion[None])
        top_k = int(np.rint(inclusion.sum()))
        to_come = _suffixes(odds, top_k)[0]
        chances = np.zeros((len(inclusion), top_k + 1))
        possible = to_come[:-1, 1:] > 0
        ratio = odds[0][:, None] * to_come[1:, :-1] / np.where(possible, to_come[:-1, 1:], 1)
        chances[:, 1:] = np.where(possible, np.clip(ratio, 0, 1), 0)
        return cls(chances)


def draw_counts(rng: np.random.Generator, chooser: Chooser, tokens: int | Counts, steps: int) -> Counts:
    """[steps, E] tokens that pick each expert in steps of `tokens` tokens (one number, or one for each step).

    Exact for the design of the module: experts are visited in order, and of the tokens with m picks left a binomial
    number picks this one, with the probability that conditional Poisson sampling gives (ratios of elementary symmetric
    polynomials of the odds of the experts still to come). Rows sum to tokens * top_k; the work does not grow with
    tokens.
    """
    experts, top_k = len(chooser.chances), chooser.chances.shape[1] - 1
    left = np.zeros((top_k + 1, steps), dtype=np.int64)
    left[top_k] = tokens
    counts = np.zeros((steps, experts), dtype=np.int64)
    for expert, chances in enumerate(chooser.chances):
        for m in range(1, top_k + 1):
            if chances[m] > 0:
                picked = rng.binomial(left[m], chances[m])
                left[m] -= picked
                left[m - 1] += picked
                counts[:, expert] += picked
    return counts


def split_counts(rng: np.random.Generator, counts: Counts, rank_shares: Array) -> Counts:
    """[steps, G] tokens of every rank; tokens of an expert with replicas go to one of them by chance.

    rank_shares   [G, E] part of an expert's tokens each rank computes (hwmodels.routing.rank_shares)
    """
    return split_and_touched(rng, counts, rank_shares)[0]


def split_and_touched(rng: np.random.Generator, counts: Counts, rank_shares: Array) -> tuple[Counts, Counts]:
    """(split_counts, experts with at least one token on every rank), [steps, G] each."""
    single = (rank_shares == 1).T.astype(np.int64)
    rows: Counts = counts @ single
    touched: Counts = (counts > 0).astype(np.int64) @ single
    for expert in np.flatnonzero(~single.any(axis=1)):
        holders = np.flatnonzero(rank_shares[:, expert])
        parts = rng.multinomial(counts[:, expert], rank_shares[holders, expert])
        rows[:, holders] += parts
        touched[:, holders] += parts > 0
    return rows, touched


def _suffixes(odds: Array, top_k: int) -> Array:
    """[L, E + 1, top_k + 1] elementary symmetric polynomials of the odds from each expert on."""
    layers, experts = odds.shape
    out = np.zeros((layers, experts + 1, top_k + 1))
    out[:, experts, 0] = 1
    for expert in range(experts - 1, -1, -1):
        out[:, expert] = out[:, expert + 1]
        out[:, expert, 1:] += odds[:, expert, None] * out[:, expert + 1, :-1]
    return out


def _inclusion(odds: Array, top_k: int) -> Array:
    """[L, E] probability of each expert to be among top_k picks with these odds."""
    after = _suffixes(odds, top_k)
    before = _suffixes(odds[:, ::-1], top_k)[:, ::-1]  # before[:, e]: polynomials of experts below e
    others = np.einsum("lej,lej->le", before[:, :-1, :top_k], after[:, 1:, top_k - 1 :: -1][:, :, :top_k])
    return np.asarray(odds * others / after[:, :1, top_k])
