"""How does a time go between, below and beyond the sizes it was measured at, given a guide?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]


def fine_grid(knots: Array, start: float, end: float, steps: int) -> Array:
    """The knots and `steps` points per unit from start to end, ascending; all in log2 of the size."""
    count = round((end - start) * steps)
    return np.unique(np.concatenate([knots, start + np.arange(count + 1) / steps]))


def through(grid: Array, knots: Array, log_s: Array, guide: Callable[[Array], Array]) -> Array:
    """Log seconds on the grid: exactly log_s at the knots, the guide times an interpolated level elsewhere.

    Between two knots the curve keeps within their times and does not turn round; below the first it never exceeds it,
    beyond the last it never falls.

    grid    ascending, holds every knot; guide takes grids like it
    """
    shape = guide(grid)
    level = np.interp(grid, knots, log_s - np.interp(knots, grid, shape))
    raw = shape + level
    at = np.searchsorted(grid, knots)
    out = raw.copy()
    out[: at[0]] = np.minimum.accumulate(np.minimum(raw[: at[0]], log_s[0])[::-1])[::-1]
    out[at[-1] :] = np.maximum.accumulate(np.maximum(raw[at[-1] :], log_s[-1]))
    for left, right, low, high in zip(at[:-1], at[1:], log_s[:-1], log_s[1:], strict=True):
        piece = np.clip(raw[left:right], min(low, high), max(low, high))
        out[left:right] = np.maximum.accumulate(piece) if high >= low else np.minimum.accumulate(piece)
    out[at] = log_s
    return out


def fitted(terms: Array, seconds: Array) -> Array:
    """Non-negative weights of the terms (columns) that make their sum the times, least squares of the relative error.

    >>> fitted(np.array([[1.0, 1.0], [1.0, 3.0]]), np.array([4.0, 8.0])).round(6).tolist()
    [2.0, 2.0]
    """
    weights: Array = nnls(terms / seconds[:, None], np.ones(len(seconds)))[0]
    return weights
