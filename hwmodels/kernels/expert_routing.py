"""How many routed rows and touched experts does one rank of an expert-parallel group get?

Distributions are those of the measured tables, as their times show (H200, TensorRT-LLM, DeepSeek-V3 in fp8):

balanced       tokens take experts in turn: rows = tokens * top_k / ep on every rank, and as many experts touched as
               there are rows until all are (time grows in proportion up to tokens = experts / top_k, then stops)
power law      popularity of experts is drawn from a density x^-exponent on 1 .. 0.8 * tokens; the rank that is timed is
               the busiest: at ep = 1 a power law costs 1.06 times the balanced time from 2048 tokens on, at ep = 256
               3.4 (1.01) to 5.7 times (1.2), where any one rank or the average of ranks would stay near 1. Few tokens
               touch fewer experts than balanced: about half as many at tokens = experts / top_k
uniform        every token picks its experts independently, all equally popular; no table measures it
recorded       that of the measured ones which is nearest to recorded counts (see RECORDED)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from hwmodels.errors import MeasurementError
from hwmodels.operators import busiest_rank_experts, busiest_rank_rows, expected_active_experts

Array = NDArray[np.float64]

#: By a model's experts, the measured distribution whose busiest rank is nearest to that of recorded counts; of other
#: models, that of the nearest number of experts. Busiest rank over the mean on contiguous ranks (hwmodels.busiest, mean
#: over the layers and over the files of ../shared/reference/moe_routing; the laws at 16,384 tokens):
#:                                             ep 4    ep 8    ep 32   ep 64   mean |log error|, ep 2 to all experts
#: DeepSeek-V3, 256 experts, 5 recordings      1.57    1.89    2.68    3.27
#: power law 1.01                              1.25    1.54    2.70    4.05    0.25
#: power law 1.2 (AIConfigurator's default)    1.35    1.91    4.20    6.39    0.42
#: balanced                                    1       1       1       1       0.98
#: Mixtral-8x7B, 8 experts, 3 recordings       1.14    1.28
#: balanced                                    1       1                       0.17
#: power law 1.01                              3.15    5.64                    0.85
RECORDED = {8: "balanced", 256: "power_law_1.01"}
#: Most popular expert of a power law, as a share of the tokens: the largest value the draws are scaled to.
LARGEST = 0.8
#: Random placements of experts on ranks whose busiest ranks are averaged.
PLACEMENTS = 8
#: Rows per expert up to which the tables' power laws are balanced, and from which they are not: with fewer, rounding to
#: whole rows spreads them evenly (H200, vLLM: 128 experts from 2 tokens, 384 and 512 experts from 4 to 8).
LIGHT = (0.07, 0.15)
#: Steps per doubling of the token counts between which loads are interpolated, and the last doubling.
STEPS, DOUBLINGS = 2, 20


@dataclass(frozen=True, slots=True)
class Load:
    """Expected routed rows and touched experts of the rank that is timed, one value per token count."""

    rows: Array
    touched: Array


def exponent_of(distribution: str | float, experts: int | None = None) -> float:
    """-1 for 'balanced', 0 for 'uniform', else the power law's exponent; raises MeasurementError for other words.

    experts   of the model, where 'recorded' may be asked for

    >>> exponent_of("power_law_1.2"), exponent_of(1.01), exponent_of("balanced")
    (1.2, 1.01, -1.0)
    >>> exponent_of("recorded", 384), exponent_of("recorded", 16)
    (1.01, -1.0)
    """
    if distribution == "recorded" and experts is not None:
        distribution = RECORDED[min(RECORDED, key=lambda known: abs(np.log(known / experts)))]
    if distribution == "balanced":
        return -1.0
    if distribution == "uniform":
        return 0.0
    text = distribution.removeprefix("power_law_") if isinstance(distribution, str) else distribution
    try:
        exponent = float(text)
    except ValueError:
        exponent = np.nan
    if exponent != -1 and not 0 <= exponent < 10:
        raise MeasurementError(
            f"routing {distribution!r}: expected 'balanced', 'uniform' or the exponent of a power law from 0 to 10"
        )
    return exponent


def load(tokens: Array, experts: int, top_k: int, ep: int, routing: str | float) -> Load:
    """What `tokens` tokens of all ranks bring the timed rank; routing as exponent_of takes it, or what it gave."""
    exponent = exponent_of(routing, experts)
    here = experts / ep
    mean = tokens * top_k / ep
    if exponent < 0:
        return Load(mean, np.minimum(mean, here))
    if exponent == 0:
        rows = busiest_rank_rows(mean, ep)
        touched = expected_active_experts(here, rows, experts, top_k, tokens)
        return Load(rows, np.minimum(busiest_rank_experts(touched, here, ep), rows))
    grid, shares, touched = _power_law(experts, top_k, ep, exponent)
    at = np.log2(np.clip(tokens, 1, 2.0**DOUBLINGS))
    rows = mean * np.interp(at, grid, shares)
    return Load(rows, np.minimum(np.interp(at, grid, touched), np.minimum(here, rows)))


def _shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """0 .. count - 1 in an order without pattern, always the same: sorted by a hash (the finaliser of SplitMix64)."""
    bits = np.arange(1 + seed * count, 1 + (seed + 1) * count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.argsort(bits ^ (bits >> np.uint64(27))).astype(np.int64)


@lru_cache(maxsize=4096)
def _power_law(experts: int, top_k: int, ep: int, exponent: float) -> tuple[Array, Array, Array]:
    """(log2 of tokens, the busiest rank's rows over the mean, its touched experts)."""
    grid = np.arange(DOUBLINGS * STEPS + 1) / STEPS
    counts = _popularity(experts, top_k, exponent)
    picked = -np.expm1(-counts)
    if ep == 1:
        return grid, np.ones_like(grid), picked.sum(axis=1)
    here = -(-experts // ep)
    shares, touched = np.zeros_like(grid), np.zeros_like(grid)
    for placement in range(PLACEMENTS):
        place = _shuffled(here * ep, placement)
        place = np.where(place < experts, place, -1).reshape(ep, here)
        sums = np.where(place >= 0, counts[:, place], 0.0).sum(axis=2)
        busiest = sums.argmax(axis=1)
        shares += sums.max(axis=1) / PLACEMENTS
        members = place[busiest]
        mine = np.take_along_axis(picked, np.maximum(members, 0), axis=1)
        touched += np.where(members >= 0, mine, 0.0).sum(axis=1) / PLACEMENTS
    # Chance adds to popularity: rows are nearly Poisson, and the busiest of ep normal variables lies `high` deviations
    # up (Blom, Statistical Estimates and Transformed Beta-Variables, 1958).
    high = float(ndtri((ep - 0.375) / (ep + 0.25)))
    mean, some = counts.sum(axis=1) / ep, picked.sum(axis=1) / ep
    rows = mean + np.hypot(shares - mean, high * np.sqrt(mean))
    chance = high * np.sqrt(np.maximum(some * (1 - some / here), 0))
    touched = np.minimum(some + np.hypot(touched - some, chance), np.minimum(here, rows))
    skewed = np.clip(np.log2(mean * ep / experts / LIGHT[0]) / np.log2(LIGHT[1] / LIGHT[0]), 0, 1)
    touched = (1 - skewed) * np.minimum(mean, here) + skewed * touched
    return grid, 1 + skewed * (rows / mean - 1), touched


@lru_cache(maxsize=256)
def _popularity(experts: int, top_k: int, exponent: float) -> Array:
    """Expected rows of every expert (the middle of its quantile) at each token count of the grid."""
    tokens = 2.0 ** (np.arange(DOUBLINGS * STEPS + 1)[:, None] / STEPS)
    largest = np.maximum(LARGEST * tokens, 1.0)
    quantile = (np.arange(experts) + 0.5) / experts
    if abs(exponent - 1) < 1e-9:
        raw: Array = largest**quantile
    else:
        power = 1 - exponent
        raw = (1 + quantile * (largest**power - 1)) ** (1 / power)
    rows: Array = raw / raw.sum(axis=1, keepdims=True) * tokens * top_k
    return rows
