"""Statistics of latencies: quantiles as numpy interpolates them, of plain and of weighted values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.errors import MetricError
from simulator.result import Floats

Ints = NDArray[np.int64]


def quantile_of(statistic: str) -> float | None:
    """The fraction a percentile stands for, 1 for the maximum, None for the mean."""
    if statistic in ("mean", "max"):
        return None if statistic == "mean" else 1.0
    found = re.fullmatch(r"p(\d+(?:\.\d+)?)", statistic)
    if found is None or not 0 < float(found[1]) <= 100:
        raise MetricError(
            f"statistic is {statistic!r}, expected mean, max, or a percentile from p1 to p100 such as p99"
        )
    return float(found[1]) / 100


@dataclass(frozen=True, slots=True)
class Distribution:
    """Statistics of `count` values; NaN when there are none."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Floats, weights: Ints | None = None) -> Distribution:
        """Of the values that are not NaN, each counted `weights` times; percentiles as numpy.quantile's default.

        >>> Distribution.of(np.array([1.0, 3.0]), np.array([1, 1])).p50
        2.0
        """
        if weights is None:
            values = np.sort(values)  # NaN go last
            count = int(np.searchsorted(values, np.nan))
            ranks = None
        else:
            order = np.argsort(values)
            values, ranks = values[order], np.cumsum(weights[order])
            count = int(ranks[-1]) if len(ranks) else 0
        if not count:
            return cls(0, math.nan, math.nan, math.nan, math.nan, math.nan)

        def value_at(rank: int) -> float:
            return float(values[rank if ranks is None else np.searchsorted(ranks, rank, side="right")])

        mean = float(values[:count].mean()) if weights is None else float(values @ weights[order]) / count
        return cls(count, mean, *(interpolate(value_at, q, count) for q in (0.5, 0.9, 0.95, 0.99)))


def interpolate(value_at: Callable[[int], float], fraction: float, count: int) -> float:
    """The quantile between the two nearest ranks, rounded as numpy.quantile rounds it; an infinite neighbour wins."""
    position = fraction * (count - 1)
    rank = min(math.floor(position), count - 1)
    share = position - rank
    low = value_at(rank)
    if share == 0:
        return low
    high = value_at(rank + 1)
    if low == high or math.isinf(high):
        return high
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)


def achieved(values: Floats, statistic: str) -> float:
    """A statistic of values without NaN, infinity allowed; NaN when there are none."""
    if not len(values):
        return math.nan
    fraction = quantile_of(statistic)
    if fraction is None:
        return float(values.mean())
    rank = math.floor(fraction * (len(values) - 1))
    near = np.partition(values, (rank, min(rank + 1, len(values) - 1)))
    return interpolate(lambda index: float(near[index]), fraction, len(values))


def achieved_weighted(values: Floats, weights: Ints, statistic: str) -> float:
    fraction, count = quantile_of(statistic), int(weights.sum())
    if not count:
        return math.nan
    if fraction is None:
        return float(values @ weights) / count
    order = np.argsort(values)
    ranks = np.cumsum(weights[order])
    return interpolate(lambda rank: float(values[order[np.searchsorted(ranks, rank, side="right")]]), fraction, count)
