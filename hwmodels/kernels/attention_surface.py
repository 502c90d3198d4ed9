"""How does time run between the points of a grid of batches and lengths?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Points a step of the table is divided into; between them time is a power of batch and length.
REFINE = 4
#: Grids reach this far; beyond, the guide alone leads on.
BATCH_END, SIZE_END = 2.0**16, 2.0**22


@dataclass(frozen=True, slots=True)
class Surface:
    """Log seconds over the logs of batch and length, on a grid fine enough to be linear in between."""

    batch: Array
    size: Array
    log_s: Array
    measured: Array

    def read(self, log_batch: Array, log_size: Array) -> tuple[Array, Array]:
        """(log seconds, measured), with arguments outside the grid moved to its edge."""
        x, i = place(self.batch, log_batch)
        y, j = place(self.size, log_size)
        log_s: Array = (1 - x) * ((1 - y) * self.log_s[i, j] + y * self.log_s[i, j + 1])
        log_s += x * ((1 - y) * self.log_s[i + 1, j] + y * self.log_s[i + 1, j + 1])
        low, high = i + (x > 1 - 1e-9), i + (x > 1e-9)
        left, right = j + (y > 1 - 1e-9), j + (y > 1e-9)
        known = self.measured[low, left] * self.measured[low, right]
        known = known * self.measured[high, left] * self.measured[high, right]
        return log_s, known


def place(axis: Array, at: Array) -> tuple[Array, NDArray[np.intp]]:
    """Share of the way through the step of `axis` that holds `at`, and the step's index."""
    i = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, len(axis) - 2)
    share: Array = np.clip((at - axis[i]) / (axis[i + 1] - axis[i]), 0.0, 1.0)
    return share, i


def reaching(values: Array, end: float) -> Array:
    """`values` from 1 to `end`, doubling where there are none."""
    after = values[-1] * 2.0 ** np.arange(1, 64)
    after = np.append(after[after < end * 0.75], end) if values[-1] < end else after[:0]
    return np.concatenate([[1.0] if values[0] > 1 else [], values, after])


def found_in(axis: Array, at: Array) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where each of `at` stands in `axis`, and whether it does."""
    i = np.clip(np.searchsorted(axis, at * (1 - 1e-9)), 0, len(axis) - 1)
    return i, np.isclose(axis[i], at, rtol=1e-9, atol=0.0)


def finer(axis: Array) -> Array:
    """REFINE points a step."""
    n = len(axis)
    fine: Array = np.interp(np.arange((n - 1) * REFINE + 1) / REFINE, np.arange(n), axis)
    fine[::REFINE] = axis
    return fine


def stretched(values: Array, batch: Array, size: Array, fine_b: Array, fine_s: Array) -> Array:
    """Bilinear interpolation of `values` over (batch, size) at the finer grid."""
    x, i = place(batch, fine_b)
    y, j = place(size, fine_s)
    rows = (1 - x)[:, None] * values[i] + x[:, None] * values[i + 1]
    stretched: Array = (1 - y) * rows[:, j] + y * rows[:, j + 1]
    return stretched


def between(table: Array, closed: Array) -> Array:
    """`closed` where `table` is NaN, no faster than what is smaller and no slower than what is larger in both axes.

    Points of the table that break that order themselves bound nothing.
    """
    known = np.isfinite(table)
    falls = table > _least_above(np.where(known, table, np.inf))
    below = table < most_below(np.where(known, table, -np.inf))
    upper = _least_above(np.where(known & ~below, table, np.inf))
    lower = most_below(np.where(known & ~falls, table, -np.inf))
    bounded = np.maximum(np.minimum(closed, upper), lower)
    rising = np.minimum(most_below(np.where(known, np.where(falls, -np.inf, table), bounded)), upper)
    ordered: Array = np.where(known, table, np.maximum(rising, bounded))
    return ordered


def most_below(values: Array) -> Array:
    """Largest of the values that are no further along either axis."""
    return np.maximum.accumulate(np.maximum.accumulate(values, axis=0), axis=1)


def _least_above(values: Array) -> Array:
    """Smallest of the values that are no less far along both axes."""
    return np.minimum.accumulate(np.minimum.accumulate(values[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
