"""Which points of a grid of measured times are believed, and what stands in its holes?

Levels are logs of time over guide, over batch (first axis) and length; NaN where nothing was measured.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: A row is an outlier where it is this much slower or faster, against the guide, than each of three or more
#: neighbours, or slower than three larger launches, and no shape of equal work shows the same. Rare: 1 in 2,000 rows
#: of the wheel's vLLM tables of H200.
OUTLIER = 1.4
#: The noise of a measurement, about 1 %.
NOISE = 0.01


def outliers(level: Array) -> NDArray[np.bool_]:
    """Points off every one of their three or more measured neighbours, all to the same side."""
    padded = np.pad(level, 1, constant_values=np.nan)
    around = np.stack([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
    off = level - around
    count = np.isfinite(off).sum(axis=0)
    high = (np.where(np.isfinite(off), off, np.inf) > np.log(OUTLIER)).all(axis=0)
    low = (np.where(np.isfinite(off), off, -np.inf) < -np.log(OUTLIER)).all(axis=0)
    found: NDArray[np.bool_] = (count >= 3) & (high | low)
    return found


def hiccups(log_s: Array) -> NDArray[np.bool_]:
    """Points that took OUTLIER times as long as three or more points that are larger in both axes."""
    i, j = np.nonzero(np.isfinite(log_s))
    times = log_s[i, j]
    larger = (i[:, None] <= i) & (j[:, None] <= j)
    slower = larger & (times[:, None] > times + np.log(OUTLIER))
    found = np.zeros(log_s.shape, dtype=bool)
    found[i, j] = slower.sum(axis=1) >= 3
    return found


def filled(level: Array, likes: list[Array], batch: Array, size: Array) -> tuple[Array, Array]:
    """(levels without holes, 1 where they were measured, here or on a shape alike, or lie between such).

    A hole is closed from its neighbours along batch and along length, by the level itself and by its differences from
    each shape alike; each of these ways counts by how well it meets the measured points around. Beyond the measured
    batches the level of the largest one holds, as saturated kernels scale with batch; lengths that no batch was
    measured at take the level of the longest.
    """
    likes = [like for like in likes if np.isfinite(level - like).sum() >= 4]
    likeness = np.stack([np.zeros_like(level), *likes])
    gaps = level - likeness
    along_s, missed_s = _bridged(gaps, size)
    along_b, missed_b = (np.swapaxes(found, 1, 2) for found in _bridged(np.swapaxes(gaps, 1, 2), batch))
    ways = np.concatenate([along_s + likeness, along_b + likeness])
    errors = _local_error(np.concatenate([missed_s, missed_b]))
    usable = np.isfinite(ways) & np.isfinite(errors)
    share = np.where(usable, 1 / (np.where(usable, errors, 1.0) + NOISE**2) ** 2, 0.0)
    weight = share.sum(axis=0)
    closed = (share * np.where(usable, ways, 0.0)).sum(axis=0) / np.where(weight > 0, weight, np.nan)
    level = np.where(np.isfinite(level), level, closed)
    measured = np.isfinite(level)
    for like in likes:
        ahead = like + _carried(_carried((level - like).T).T)
        level = np.where(np.isfinite(level), level, ahead)
    measured |= np.isfinite(level)
    level = _carried(_carried(level.T).T)
    return _carried(_carried(level.T[:, ::-1])[:, ::-1].T[:, ::-1])[:, ::-1], measured.astype(float)


def _local_error(missed: Array) -> Array:
    """Mean squared error near each point of ways (first axis) to close holes, with the mean over the grid mixed in."""
    known = np.isfinite(missed)
    square = np.where(known, np.minimum(missed**2, 0.25), 0.0)
    near = np.stack([square, known.astype(float)])
    for axis in (2, 3):
        width = [(0, 0)] * 4
        width[axis] = (2, 2)
        padded, n = np.pad(near, width), near.shape[axis]
        near = sum(
            (w * np.take(padded, np.arange(i, i + n), axis=axis) for i, w in enumerate((1.0, 2.0, 3.0, 2.0, 1.0))),
            np.zeros_like(near),
        )
    count = known.sum(axis=(1, 2), keepdims=True)
    mean = square.sum(axis=(1, 2), keepdims=True) / np.maximum(count, 1)
    error: Array = np.where(count > 0, (near[0] + 9 * mean) / (near[1] + 9), np.nan)
    return error


def _bridged(level: Array, axis: Array) -> tuple[Array, Array]:
    """(`level` with gaps between two values closed linearly over `axis`, the last one; how far known values miss that).

    The miss of a value is its distance from the line between the known values on both its sides.
    """
    n, known = len(axis), np.isfinite(level)
    place = np.broadcast_to(np.arange(n), level.shape)
    end = np.full((*level.shape[:-1], 1), -1)
    low = np.maximum.accumulate(np.where(known, place, -1), axis=-1)
    low = np.concatenate([end, low[..., :-1]], axis=-1)
    high = np.minimum.accumulate(np.where(known, place, n)[..., ::-1], axis=-1)[..., ::-1]
    high = np.concatenate([high[..., 1:], end + n + 1], axis=-1)
    inside = (low >= 0) & (high < n)
    low, high = np.where(inside, low, 0), np.where(inside, high, 1)
    share = (axis - axis[low]) / (axis[high] - axis[low])
    left, right = np.take_along_axis(level, low, axis=-1), np.take_along_axis(level, high, axis=-1)
    line = np.where(inside, (1 - share) * left + share * right, np.nan)
    return np.where(known, level, line), np.where(known, level - line, np.nan)


def _carried(level: Array) -> Array:
    """Rows of `level` with every gap behind a value closed by that value."""
    last = np.maximum.accumulate(np.where(np.isfinite(level), np.arange(level.shape[1]), 0), axis=1)
    carried: Array = np.take_along_axis(level, last, axis=1)
    return carried
