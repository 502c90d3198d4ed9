"""How long does attention take, by interpolation of a measured table?

Every (format, head width, window, heads, KV heads) is a surface over batch and length. A guide, a roofline of a few
terms whose weights are fitted to the table, gives the way between and beyond the measured points; the table gives the
level. Head counts that were not measured borrow the surfaces of the nearest ones at equal work. Chunks of prompts
behind cached tokens, which public tables lack, are priced as whole prompts of as many query-key pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from hwmodels.hardware import Device
from hwmodels.kernels.estimate import Estimate
from hwmodels.kernels.table import FAMILIES, TOLERANCE, beyond_peak
from hwmodels.mapping import DTYPE_BYTES
from hwmodels.operators import attended_pairs

Array = NDArray[np.float64]

#: Points a step of the table is divided into; between them time is a power of batch and length.
REFINE = 4
#: Rows of queries a compute unit takes at a time; kernels use 64 to 256.
TILE = 128
#: A row is an outlier where it is this much slower or faster, against the guide, than each of three or more
#: neighbours, or slower than three larger launches, and no shape of equal work shows the same. Rare: 1 in 2,000 rows
#: of the wheel's vLLM tables of H200.
OUTLIER = 1.4
#: Shapes alike that help to close the holes of a surface, and the noise of a measurement, about 1 %.
ALIKE, NOISE = 6, 0.01
#: Grids reach this far; beyond, the guide alone leads on.
BATCH_END, SIZE_END = 2.0**16, 2.0**22
#: Rows of a group that its guide is fitted to.
GUIDE_ROWS = 1500
#: Columns that name a surface.
SHAPE = ("dtype", "kv_dtype", "head_dim", "window", "heads", "kv_heads")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a surface belongs to, as the guide needs it; window 0: none."""

    dtype: str
    kv_dtype: str
    head_dim: int
    window: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, key: Any) -> Shape:
        """From the values of the columns SHAPE."""
        dtype, kv_dtype, *numbers = key
        head_dim, window, heads, kv_heads = (int(v) for v in numbers)
        return cls(str(dtype), str(kv_dtype), head_dim, window, heads, kv_heads)

    @property
    def group(self) -> tuple[str, str, int, int]:
        """All but the head counts."""
        return self.dtype, self.kv_dtype, self.head_dim, self.window


@dataclass(frozen=True, slots=True)
class Surface:
    """Log seconds over the logs of batch and length, on a grid fine enough to be linear in between."""

    batch: Array
    size: Array
    log_s: Array
    measured: Array

    def read(self, log_batch: Array, log_size: Array) -> tuple[Array, Array]:
        """(log seconds, measured), with arguments outside the grid moved to its edge."""
        x, i = _place(self.batch, log_batch)
        y, j = _place(self.size, log_size)
        log_s: Array = (1 - x) * ((1 - y) * self.log_s[i, j] + y * self.log_s[i, j + 1])
        log_s += x * ((1 - y) * self.log_s[i + 1, j] + y * self.log_s[i + 1, j + 1])
        low, high = i + (x > 1 - 1e-9), i + (x > 1e-9)
        left, right = j + (y > 1 - 1e-9), j + (y > 1e-9)
        known = self.measured[low, left] * self.measured[low, right]
        known = known * self.measured[high, left] * self.measured[high, right]
        return log_s, known


def _place(axis: Array, at: Array) -> tuple[Array, NDArray[np.intp]]:
    """Share of the way through the step of `axis` that holds `at`, and the step's index."""
    i = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, len(axis) - 2)
    share: Array = np.clip((at - axis[i]) / (axis[i + 1] - axis[i]), 0.0, 1.0)
    return share, i


@dataclass(frozen=True, slots=True)
class AttentionTimes:
    """The parts the four families share. One per (device, engine).

    Rows of a shape lie together: those of shapes[i] are rows starts[i] to starts[i + 1].
    weights[i] belongs to the guide of groups[i]; chunks are the rows behind cached tokens:
    (index of the shape, batch, new, before, seconds).
    """

    device: Device
    shapes: tuple[Shape, ...]
    starts: NDArray[np.int64]
    batch: Array
    size: Array
    seconds: Array
    groups: tuple[tuple[str, str, int, int], ...]
    weights: Array
    chunks: Array
    _index: dict[Shape, int] = field(init=False, compare=False, repr=False)
    _levels: dict[Shape, tuple[Array, Array, Array]] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )
    _surfaces: dict[Shape, tuple[Surface, Shape] | None] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )

    SIZE: ClassVar[str]
    FAMILY: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {shape: i for i, shape in enumerate(self.shapes)})

    @classmethod
    def fit(cls, rows: pd.DataFrame, device: Device) -> Self:
        """Of the rows of one device and engine; rows beyond the device's peak are left out."""
        all_rows, rows = rows, cls.usable(rows, device)
        columns = list(SHAPE)
        index = rows.groupby(columns, sort=False).ngroup().to_numpy()
        starts = np.flatnonzero(np.diff(index, prepend=-1, append=-2))
        shapes = tuple(Shape.of(key) for key in rows[columns].iloc[starts[:-1]].itertuples(index=False))
        batch, size, seconds = (rows[c].to_numpy(float) for c in ("batch", cls.SIZE, "seconds"))
        groups = tuple(dict.fromkeys(shape.group for shape in shapes))
        terms = [
            cls._terms(shape, device, batch[i:j], size[i:j], np.zeros(1))
            for shape, i, j in zip(shapes, starts[:-1], starts[1:], strict=True)
        ]
        weights = []
        for group in groups:
            part = [i for i, shape in enumerate(shapes) if shape.group == group]
            times = np.concatenate([seconds[starts[i] : starts[i + 1]] for i in part])
            weights.append(_fitted(np.concatenate([terms[i] for i in part]), times))
        return cls(
            device,
            shapes,
            starts,
            batch,
            size,
            seconds,
            groups,
            np.array(weights),
            cls._chunk_rows(all_rows, shapes, device),
        )

    @classmethod
    def usable(cls, rows: pd.DataFrame, device: Device) -> pd.DataFrame:
        """The rows a fit rests on, one per point, with all columns of Shape, rows of a shape together.

        Left out are rows beyond the device's peak, rows behind cached tokens, and kernels an engine rarely runs:
        where two ran one point, the one with more rows of its formats, head width and window stays.
        """
        rows = cls._complete(rows[~cls._too_fast(rows, device)])
        if "before" in rows:
            rows = rows[rows["before"] == 0]
        columns = list(SHAPE)
        share = rows.groupby([*columns[:4], "kernel"])["seconds"].transform("size")
        rows = rows.assign(share=share).sort_values([*columns, "batch", cls.SIZE, "share"], kind="stable")
        rows = rows.drop_duplicates([*columns, "batch", cls.SIZE], keep="last")
        return rows.drop(columns="share").reset_index(drop=True)

    @classmethod
    def _too_fast(cls, rows: pd.DataFrame, device: Device) -> pd.Series:
        """Rows beyond the peak, by the family's own columns: those of `_complete` would change what is counted."""
        return beyond_peak(rows[list(FAMILIES[cls.FAMILY].columns)], cls.FAMILY, device)

    def predict(self, rows: pd.DataFrame) -> Array:
        """Seconds of usable rows."""
        seconds = np.full(len(rows), np.nan)
        for key, part in rows.reset_index(drop=True).groupby(list(SHAPE), sort=False):
            shape = Shape.of(key)
            priced = self._price(shape, part["batch"].to_numpy(float), part[self.SIZE].to_numpy(float))
            if priced is not None:
                seconds[part.index] = priced.seconds
        return seconds

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything needed to rebuild it."""
        text = [(s.dtype, s.kv_dtype) for s in self.shapes]
        numbers = [(s.head_dim, s.window, s.heads, s.kv_heads) for s in self.shapes]
        return {
            "formats": np.array(text, dtype=np.str_).reshape(-1, 2),
            "numbers": np.array(numbers, dtype=np.int64).reshape(-1, 4),
            "starts": self.starts,
            "batch": self.batch,
            "size": self.size,
            "seconds": self.seconds,
            "weights": self.weights,
            "chunks": self.chunks,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], device: Device) -> Self:
        """What `arrays` gave."""
        keys = zip(arrays["formats"], arrays["numbers"], strict=True)
        shapes = tuple(Shape.of([*formats, *numbers]) for formats, numbers in keys)
        groups = tuple(dict.fromkeys(shape.group for shape in shapes))
        starts, batch, size, seconds, weights, chunks = (
            arrays[name] for name in ("starts", "batch", "size", "seconds", "weights", "chunks")
        )
        return cls(device, shapes, starts, batch, size, seconds, groups, weights, chunks)

    # What differs between prefill and decode.

    @classmethod
    def _complete(cls, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows with all columns named in SHAPE."""
        return rows

    @classmethod
    def _chunk_rows(cls, rows: pd.DataFrame, shapes: tuple[Shape, ...], device: Device) -> Array:
        """Rows behind cached tokens of shapes that whole prompts were measured of."""
        return np.zeros((0, 5))

    @classmethod
    def _terms(cls, shape: Shape, device: Device, batch: Array, size: Array, before: Array) -> Array:
        """Terms of the guide in seconds, last axis; each is increasing in batch, size and before."""
        raise NotImplementedError

    @classmethod
    def _floor_s(cls, shape: Shape, device: Device, batch: Array, size: Array, before: Array) -> Array:
        """Least time the device's peaks allow."""
        raise NotImplementedError

    @classmethod
    def _work(cls, shape: Shape) -> int:
        """What makes the work of a batch, beside its sequences: shapes of equal batch times this take equally long."""
        raise NotImplementedError

    # Surfaces.

    def _guide(self, shape: Shape, weights: Array, batch: Array, size: Array, before: Array | float = 0.0) -> Array:
        """The guide in seconds."""
        guide: Array = self._terms(shape, self.device, batch, size, np.asarray(before, dtype=float)) @ weights
        return guide

    def _price(self, shape: Shape, batch: Array, size: Array) -> Estimate | None:
        """Times of a shape, or None where there is no table at all."""
        found = self._surface(shape)
        if found is None:
            return None
        surface, source = found
        weights = self.weights[self.groups.index(source.group)]
        at_batch, at_size = np.clip(batch, 1.0, BATCH_END), np.clip(size, 1.0, SIZE_END)
        log_s, measured = surface.read(np.log(at_batch), np.log(at_size))
        outside = (batch != at_batch) | (size != at_size)
        if outside.any():
            ahead = self._guide(shape, weights, batch, size) / self._guide(shape, weights, at_batch, at_size)
            log_s = np.where(outside, log_s + np.log(ahead), log_s)
            measured = np.where(outside, 0.0, measured)
        floor = self._floor_s(shape, self.device, batch, size, np.zeros(()))
        return Estimate(np.maximum(np.exp(log_s), floor), measured)

    def _surface(self, shape: Shape) -> tuple[Surface, Shape] | None:
        """The surface of a shape and a measured shape of the group it rests on."""
        if shape not in self._surfaces:
            self._surfaces[shape] = self._built(shape)
        return self._surfaces[shape]

    def _built(self, shape: Shape) -> tuple[Surface, Shape] | None:
        if not self.shapes:
            return None
        if shape in self._index:
            return self._own(shape), shape
        return self._borrowed(shape)

    def _own(self, shape: Shape) -> Surface:
        """Of a measured shape."""
        weights = self.weights[self.groups.index(shape.group)]
        batches, sizes, _ = self._raw(shape)
        batches, sizes = _reaching(batches, BATCH_END), _reaching(sizes, SIZE_END)
        table, likes = self._believed(shape, batches, sizes)
        level, measured = filled(table, likes, np.log(batches), np.log(sizes))
        log_guide = np.log(self._guide(shape, weights, batches[:, None], sizes[None, :]))
        log_s = between(table + log_guide, level + log_guide)
        return self._refined(shape, weights, batches, sizes, log_s, measured)

    def _raw(self, shape: Shape) -> tuple[Array, Array, Array]:
        """(batches, lengths, log of time over guide) of a measured shape; NaN where there is no row."""
        if shape not in self._levels:
            i = self._index[shape]
            span = slice(self.starts[i], self.starts[i + 1])
            batches, row = np.unique(self.batch[span], return_inverse=True)
            sizes, column = np.unique(self.size[span], return_inverse=True)
            weights = self.weights[self.groups.index(shape.group)]
            guide = self._guide(shape, weights, self.batch[span], self.size[span])
            level = np.full((len(batches), len(sizes)), np.nan)
            level[row, column] = np.log(self.seconds[span] / guide)
            self._levels[shape] = batches, sizes, level
        return self._levels[shape]

    def _seen_by(self, shape: Shape, other: Shape, batches: Array, sizes: Array) -> Array:
        """Levels of `other` where it does as much work as `shape` at (batches, sizes); NaN where not measured."""
        at_b, at_s, level = self._raw(other)
        i, has_b = _found(at_b, batches * (self._work(shape) / self._work(other)))
        j, has_s = _found(at_s, sizes)
        return np.where(has_b[:, None] & has_s, level[np.ix_(i, j)], np.nan)

    def _believed(self, shape: Shape, batches: Array, sizes: Array) -> tuple[Array, list[Array]]:
        """(levels of a measured shape without outliers, those of shapes alike).

        What a shape of equal work shows as well is the kernel's doing and no outlier.
        """
        level = self._seen_by(shape, shape, batches, sizes)
        alike = self._alike(shape)
        likes = [self._seen_by(shape, other, batches, sizes) for other in alike]
        weights = self.weights[self.groups.index(shape.group)]
        log_guide = np.log(self._guide(shape, weights, batches[:, None], sizes[None, :]))
        odd = outliers(level) | hiccups(level + log_guide)
        for other, like in zip(alike, likes, strict=True):
            if other.group == shape.group and other.heads * shape.kv_heads == shape.heads * other.kv_heads:
                odd &= ~(np.abs(level - like) < np.log(OUTLIER) / 2)
        level[odd] = np.nan
        return level, [np.where(outliers(like), np.nan, like) for like in likes]

    def _alike(self, shape: Shape) -> list[Shape]:
        """Measured shapes whose levels run like those of `shape`: other head counts, then other formats."""
        ratio = np.log(shape.heads / shape.kv_heads)

        def apart(other: Shape) -> tuple[float, float]:
            return (
                round(abs(float(np.log(other.heads / other.kv_heads)) - ratio), 9),
                abs(np.log(other.kv_heads / shape.kv_heads)),
            )

        same = sorted((s for s in self._index if s.group == shape.group and s != shape), key=apart)
        others = [Shape(*group, shape.heads, shape.kv_heads) for group in self.groups if group != shape.group]
        measured = [s for s in others if s in self._index]
        return same[:ALIKE] + sorted(measured, key=lambda s: _distance(shape.group, s.group))[: ALIKE // 2]

    def _borrowed(self, shape: Shape) -> tuple[Surface, Shape]:
        """Of a shape that was not measured: level of the nearest measured ones at equal work."""
        group = min(self.groups, key=lambda other: _distance(shape.group, other))
        near = [s for s in self.shapes if s.group == group]
        sources = _neighbours(shape, near)
        weights = self.weights[self.groups.index(group)]
        surfaces = [self._surface(s) for s, _ in sources]
        nodes = [found[0] for found in surfaces if found is not None]
        batches, sizes = np.exp(nodes[0].batch[::REFINE]), np.exp(nodes[0].size[::REFINE])
        grid_b, grid_s = np.broadcast_arrays(batches[:, None], sizes[None, :])
        log_s = np.log(self._guide(shape, weights, grid_b, grid_s))
        measured = np.full(log_s.shape, float(group == shape.group))
        for (source, share), surface in zip(sources, nodes, strict=True):
            equal_b = grid_b * self._work(shape) / self._work(source)
            at_b = np.clip(equal_b, 1.0, BATCH_END)
            at_s = np.minimum(grid_s, float(shape.window)) if shape.window and not source.window else grid_s
            read, known = surface.read(np.log(at_b), np.log(at_s))
            log_s = log_s + share * (read - np.log(self._guide(source, weights, at_b, at_s)))
            measured = measured * np.where(equal_b >= 0.5, known, 0.0)
        ratio = shape.heads / shape.kv_heads
        ratios = [s.heads / s.kv_heads for s, _ in sources]
        if not min(ratios) <= ratio * (1 + 1e-9) or not ratio <= max(ratios) * (1 + 1e-9):
            measured = np.zeros_like(measured)
        log_s = _most_below(log_s)
        return self._refined(shape, weights, batches, sizes, log_s, measured), sources[0][0]

    def _refined(
        self, shape: Shape, weights: Array, batches: Array, sizes: Array, log_s: Array, measured: Array
    ) -> Surface:
        """The grid at REFINE times as many points, along the guide, rising wherever the nodes do and exact on them."""
        fine_b, fine_s = _finer(np.log(batches)), _finer(np.log(sizes))
        # What falls where it should rise is noise: it is taken off, and laid back on as a power law between nodes.
        rising = _most_below(log_s)
        log_guide = np.log(self._guide(shape, weights, np.exp(fine_b)[:, None], np.exp(fine_s)[None, :]))
        level = _stretched(rising - log_guide[::REFINE, ::REFINE], np.log(batches), np.log(sizes), fine_b, fine_s)
        guided = log_guide + level
        i, j = np.arange(len(fine_b)), np.arange(len(fine_s))
        above = rising[np.ix_(-(-i // REFINE), -(-j // REFINE))]
        below = rising[np.ix_(i // REFINE, j // REFINE)]
        guided = np.clip(guided, below, above)
        guided = _most_below(guided)
        guided += _stretched(log_s - rising, np.log(batches), np.log(sizes), fine_b, fine_s)
        guided[::REFINE, ::REFINE] = log_s
        known = _stretched(measured, np.log(batches), np.log(sizes), fine_b, fine_s)
        return Surface(fine_b, fine_s, guided, np.where(known > 1 - 1e-9, 1.0, 0.0))


def _fitted(terms: Array, seconds: Array) -> Array:
    """Weights >= 0 of the guide's terms with the least squared relative error, none of them quite zero."""
    step = max(1, len(seconds) // GUIDE_ROWS)
    terms, seconds = terms[::step], seconds[::step]
    weights: Array = nnls(terms / seconds[:, None], np.ones(len(seconds)))[0]
    return np.maximum(weights, 0.02)


def _reaching(values: Array, end: float) -> Array:
    """`values` from 1 to `end`, doubling where there are none."""
    after = values[-1] * 2.0 ** np.arange(1, 64)
    after = np.append(after[after < end * 0.75], end) if values[-1] < end else after[:0]
    return np.concatenate([[1.0] if values[0] > 1 else [], values, after])


def _found(axis: Array, at: Array) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where each of `at` stands in `axis`, and whether it does."""
    i = np.clip(np.searchsorted(axis, at * (1 - 1e-9)), 0, len(axis) - 1)
    return i, np.isclose(axis[i], at, rtol=1e-9, atol=0.0)


def _finer(axis: Array) -> Array:
    """REFINE points a step."""
    n = len(axis)
    fine: Array = np.interp(np.arange((n - 1) * REFINE + 1) / REFINE, np.arange(n), axis)
    fine[::REFINE] = axis
    return fine


def _stretched(values: Array, batch: Array, size: Array, fine_b: Array, fine_s: Array) -> Array:
    """Bilinear interpolation of `values` over (batch, size) at the finer grid."""
    x, i = _place(batch, fine_b)
    y, j = _place(size, fine_s)
    rows = (1 - x)[:, None] * values[i] + x[:, None] * values[i + 1]
    stretched: Array = (1 - y) * rows[:, j] + y * rows[:, j + 1]
    return stretched


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


def between(table: Array, closed: Array) -> Array:
    """`closed` where `table` is NaN, no faster than what is smaller and no slower than what is larger in both axes.

    Points of the table that break that order themselves bound nothing.
    """
    known = np.isfinite(table)
    falls = table > _least_above(np.where(known, table, np.inf))
    below = table < _most_below(np.where(known, table, -np.inf))
    upper = _least_above(np.where(known & ~below, table, np.inf))
    lower = _most_below(np.where(known & ~falls, table, -np.inf))
    bounded = np.maximum(np.minimum(closed, upper), lower)
    rising = np.minimum(_most_below(np.where(known, np.where(falls, -np.inf, table), bounded)), upper)
    ordered: Array = np.where(known, table, np.maximum(rising, bounded))
    return ordered


def _most_below(values: Array) -> Array:
    """Largest of the values that are no further along either axis."""
    return np.maximum.accumulate(np.maximum.accumulate(values, axis=0), axis=1)


def _least_above(values: Array) -> Array:
    """Smallest of the values that are no less far along both axes."""
    return np.minimum.accumulate(np.minimum.accumulate(values[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]


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


def _distance(wanted: tuple[str, str, int, int], other: tuple[str, str, int, int]) -> float:
    """How far a group of surfaces is from the wanted one: arithmetic first, then window, cache format, head width."""
    far = 4.0 * (wanted[0] != other[0]) + 2.0 * (wanted[1] != other[1]) + abs(np.log2(wanted[2] / other[2]))
    window, measured = wanted[3], other[3]
    if window != measured:
        far += 8.0 if window == 0 else 1.5 if measured == 0 else 0.5 * abs(np.log2(window / measured))
    return float(far)


def _neighbours(shape: Shape, near: list[Shape]) -> list[tuple[Shape, float]]:
    """(measured shape, share): one or two nearest in heads per KV head, and among those in KV heads."""
    ratio = np.log(shape.heads / shape.kv_heads)
    ratios = np.array([np.log(s.heads / s.kv_heads) for s in near])
    apart = np.array([abs(np.log(s.kv_heads / shape.kv_heads)) for s in near])

    def best(value: float) -> Shape:
        candidates = np.flatnonzero(np.abs(ratios - value) < 1e-9)
        return near[int(candidates[np.argmin(apart[candidates])])]

    below, above = ratios[ratios <= ratio + 1e-9], ratios[ratios >= ratio - 1e-9]
    if not len(below) or not len(above):
        return [(best(float(above.min() if len(above) else below.max())), 1.0)]
    low, high = float(below.max()), float(above.min())
    if high - low < 1e-9:
        return [(best(low), 1.0)]
    share = (ratio - low) / (high - low)
    return [(best(low), 1 - share), (best(high), share)]


def _peak(device: Device, dtype: str) -> float:
    peaks = device.peak_flops_per_s
    return float(peaks.get(dtype, peaks.get("bf16", peaks.get("fp16", max(peaks.values())))))


def _floats(*values: ArrayLike) -> list[Array]:
    return [np.asarray(v, dtype=float) for v in np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in values))]


class PrefillTimes(AttentionTimes):
    """Attention of `batch` prompts or chunks of `new` tokens behind `before` cached ones."""

    SIZE, FAMILY = "new", "attention_prefill"
    WIDTHS: ClassVar[tuple[int, int] | None] = None

    def time_s(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        dtype: str,
        kv_dtype: str,
        batch: ArrayLike,
        new: ArrayLike,
        before: ArrayLike,
    ) -> Estimate | None:
        """Times of one launch; arrays broadcast. None without a table."""
        return self._chunks(Shape(dtype, kv_dtype, head_dim, window, heads, kv_heads), batch, new, before)

    def _chunks(self, shape: Shape, batch: ArrayLike, new: ArrayLike, before: ArrayLike) -> Estimate | None:
        """Prompts by the table, chunks by its prompts of as much work, corrected by the chunks it has."""
        b, n, c = _floats(batch, new, before)
        if not (c > 0).any():
            return self._price(shape, b, n)
        seconds, known = self._by_prompts(shape, b, n, c)
        if seconds is None:
            return None
        whole = self._price(shape, b, n)
        seconds = seconds if whole is None else np.maximum(seconds, whole.seconds)
        log_off, near = self._correction(shape, b, n, c)
        seconds = np.where(
            c > 0, np.maximum(seconds * np.exp(log_off), self._floor_s(shape, self.device, b, n, c)), seconds
        )
        return Estimate(seconds, np.where(c > 0, near, known))

    def _by_prompts(self, shape: Shape, b: Array, n: Array, c: Array) -> tuple[Array | None, Array]:
        """(seconds, measured) of chunks: whole prompts with their query-key pairs, times the guide's ratio of the two.

        The prompt shows what the kernel makes of this much work; the guide's ratio holds what differs, fewer and
        longer units of work and more cached bytes.
        """
        as_b, as_n = _as_prompts(b, n, c, shape.window)
        prompt, found = self._price(shape, as_b, as_n), self._surface(shape)
        if prompt is None or found is None:
            return None, np.zeros_like(b)
        weights = self.weights[self.groups.index(found[1].group)]
        ratio = self._guide(shape, weights, b, n, c) / self._guide(shape, weights, as_b, as_n)
        return np.where(c > 0, prompt.seconds * ratio, prompt.seconds), prompt.measured

    def _correction(self, shape: Shape, b: Array, n: Array, c: Array) -> tuple[Array, Array]:
        """(log of measured chunks over _by_prompts, 1 near them): Shepard's inverse distances, none before c = 0.

        Distances are in logs of batch, new and context over new. A point is near a chunk within a factor of two each.
        """
        rows = self.chunks[self.chunks[:, 0] == self._index.get(shape, -1)]
        if not len(rows):
            return np.zeros_like(b), np.zeros_like(b)
        _, at_b, at_n, at_c, measured = rows.T
        expected, _ = self._by_prompts(shape, at_b, at_n, at_c)
        off = np.log(measured / (measured if expected is None else expected))
        points = np.stack([np.log(b), np.log(n), np.log1p(c / n)], axis=-1)[..., None, :]
        anchors = np.stack([np.log(at_b), np.log(at_n), np.log1p(at_c / at_n)], axis=-1)
        far = np.sum((points - anchors) ** 2, axis=-1)
        whole = np.sum((points - anchors * [1.0, 1.0, 0.0]) ** 2, axis=-1)
        share, none = 1 / (far + 1e-12) ** 2, 1 / (whole + 1e-12) ** 2
        log_off: Array = (share * off).sum(axis=-1) / (share + none).sum(axis=-1)
        near = (np.abs(points - anchors).max(axis=-1) <= np.log(2) + 1e-9).any(axis=-1)
        return log_off, near.astype(float)

    @classmethod
    def _chunk_rows(cls, rows: pd.DataFrame, shapes: tuple[Shape, ...], device: Device) -> Array:
        rows = cls._complete(rows[(rows["before"] > 0) & ~cls._too_fast(rows, device)])
        number = {shape: float(i) for i, shape in enumerate(shapes)}
        keys = rows[list(SHAPE)].itertuples(index=False)
        index = [number.get(Shape.of(key), -1.0) for key in keys]
        columns = [rows[c].to_numpy(float) for c in ("batch", "new", "before", "seconds")]
        found = np.column_stack([np.array(index, dtype=float), *columns])
        return found[found[:, 0] >= 0]

    @classmethod
    def _widths(cls, shape: Shape) -> tuple[int, int]:
        return cls.WIDTHS or (shape.head_dim, shape.head_dim)

    @classmethod
    def _flops(cls, shape: Shape, batch: Array, new: Array, before: Array) -> Array:
        qk, value = cls._widths(shape)
        flops: Array = 2.0 * batch * shape.heads * attended_pairs(new, before, shape.window or None) * (qk + value)
        return flops

    @classmethod
    def _terms(cls, shape: Shape, device: Device, batch: Array, size: Array, before: Array) -> Array:
        # Kernels that leave a unit of TILE queries whole wait for the longest one where there are few; those that split
        # it do not. The fit tells them apart: in the wheel, FlashAttention 3 splits, TensorRT-LLM's kernels do not.
        peak = _peak(device, shape.dtype)
        qk, value = cls._widths(shape)
        span = before + size
        seen = np.minimum(span, shape.window + TILE) if shape.window else span
        flops = cls._flops(shape, batch, size, before)
        padding = 2.0 * batch * shape.heads * size * TILE * (qk + value)
        longest = 2.0 * TILE * seen * (qk + value)
        queries = batch * size * shape.heads * (qk + value) * 2.0
        held = size + (np.minimum(before, shape.window) if shape.window else before)
        cache = batch * held * shape.kv_heads * (qk + value) * DTYPE_BYTES[shape.kv_dtype]
        terms = [
            np.full(np.shape(flops), 1e-6),
            batch * shape.heads * 1e-6 / device.compute_units,
            flops / peak,
            padding / peak,
            np.hypot(flops, longest * device.compute_units) / peak,
            (queries + cache) / device.memory_bytes_per_s,
        ]
        return np.stack(np.broadcast_arrays(*terms), axis=-1)

    @classmethod
    def _floor_s(cls, shape: Shape, device: Device, batch: Array, size: Array, before: Array) -> Array:
        flops = cls._flops(shape, batch, size, before)
        floor: Array = flops / _peak(device, shape.dtype) / TOLERANCE
        return floor

    @classmethod
    def _work(cls, shape: Shape) -> int:
        return shape.heads


def _prompt_length(pairs: Array, window: int) -> Array:
    """New tokens of the prompt with so many query-key pairs, as attended_pairs counts them."""
    full = (np.sqrt(8 * pairs + 1) - 1) / 2
    if not window:
        return np.asarray(full)
    return np.asarray(np.where(full <= window, full, (pairs + window * (window - 1) / 2) / window))


def _as_prompts(batch: Array, new: Array, before: Array, window: int) -> tuple[Array, Array]:
    """(batch, new) of whole prompts with the query-key pairs of chunks behind cached tokens.

    They keep the query rows too, hence the mean length of a row, where that leaves one prompt or more; otherwise it
    is one prompt, of more rows.
    """
    pairs = attended_pairs(new, before, window or None)
    mean = pairs / new
    length = 2 * mean - 1
    if window:
        below = np.maximum(window - mean, 1e-9)
        length = np.where(length <= window, length, window * (window - 1) / 2 / below)
    whole = batch * new / np.maximum(length, new)
    prompts = np.maximum(whole, 1.0)
    prompts = np.where(before > 0, np.minimum(prompts, batch), batch)
    return prompts, np.where(before > 0, _prompt_length(batch * pairs / prompts, window), new)


class DecodeTimes(AttentionTimes):
    """Attention of `batch` single tokens over `context` cached ones each, the new one included."""

    SIZE, FAMILY = "context", "attention_decode"

    def time_s(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        dtype: str,
        kv_dtype: str,
        batch: ArrayLike,
        context: ArrayLike,
    ) -> Estimate | None:
        """Times of one launch; arrays broadcast. None without a table."""
        b, c = _floats(batch, context)
        return self._price(Shape(dtype, kv_dtype, head_dim, window, heads, kv_heads), b, c)

    @classmethod
    def _cache_bytes(cls, shape: Shape, batch: Array, size: Array) -> Array:
        seen = np.minimum(size, shape.window) if shape.window else size
        cached: Array = batch * seen * 2.0 * shape.kv_heads * shape.head_dim * DTYPE_BYTES[shape.kv_dtype]
        return cached

    @classmethod
    def _flops(cls, shape: Shape, batch: Array, size: Array) -> Array:
        seen = np.minimum(size, shape.window) if shape.window else size
        flops: Array = 4.0 * batch * shape.heads * seen * shape.head_dim
        return flops

    @classmethod
    def _terms(cls, shape: Shape, device: Device, batch: Array, size: Array, before: Array) -> Array:
        cache = cls._cache_bytes(shape, batch, size)
        seen = np.minimum(size, shape.window) if shape.window else size
        queries = batch * shape.heads * shape.head_dim * 4.0
        terms = [
            np.full(np.shape(cache), 1e-6),
            batch * shape.kv_heads * 1e-6 / device.compute_units,
            queries / device.memory_bytes_per_s,
            cache / device.memory_bytes_per_s,
            cls._flops(shape, batch, size) / _peak(device, shape.dtype),
            np.log2(1 + seen / TILE) * 1e-6,
        ]
        return np.stack(np.broadcast_arrays(*terms), axis=-1)

    @classmethod
    def _floor_s(cls, shape: Shape, device: Device, batch: Array, size: Array, before: Array) -> Array:
        nbytes = cls._cache_bytes(shape, batch, size)
        # As in table.beyond_peak: what fits into a cache may come out of it.
        floor: Array = np.where(nbytes > 256e6, nbytes / device.memory_bytes_per_s / TOLERANCE, 0.0)
        return floor

    @classmethod
    def _work(cls, shape: Shape) -> int:
        return shape.kv_heads


class LatentPrefillTimes(PrefillTimes):
    """Unabsorbed latent attention (MLA): every head has keys of 192 and values of 128 numbers."""

    FAMILY = "mla_prefill"
    WIDTHS = (192, 128)

    @classmethod
    def _complete(cls, rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(kv_heads=rows["heads"], head_dim=192, window=0)

    def time_s(  # type: ignore[override]
        self, heads: int, kv_dtype: str, batch: ArrayLike, new: ArrayLike, before: ArrayLike, dtype: str = "bf16"
    ) -> Estimate | None:
        """Times of one launch; arrays broadcast. None without a table."""
        return self._chunks(Shape(dtype, kv_dtype, 192, 0, heads, heads), batch, new, before)


class LatentDecodeTimes(DecodeTimes):
    """Absorbed latent attention (MLA): all heads read one cached row of 576 numbers a token."""

    FAMILY = "mla_decode"

    @classmethod
    def _complete(cls, rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(kv_heads=1, head_dim=576, window=0)

    def time_s(  # type: ignore[override]
        self, heads: int, kv_dtype: str, batch: ArrayLike, context: ArrayLike, dtype: str = "bf16"
    ) -> Estimate | None:
        """Times of one launch; arrays broadcast. None without a table."""
        b, c = _floats(batch, context)
        return self._price(Shape(dtype, kv_dtype, 576, 0, heads, 1), b, c)

    @classmethod
    def _cache_bytes(cls, shape: Shape, batch: Array, size: Array) -> Array:
        cached: Array = batch * size * 576.0 * DTYPE_BYTES[shape.kv_dtype]
        return cached

    @classmethod
    def _flops(cls, shape: Shape, batch: Array, size: Array) -> Array:
        flops: Array = 2.0 * batch * shape.heads * size * (576 + 512)
        return flops


TIMES: dict[str, type[Any]] = {
    cls.FAMILY: cls for cls in (PrefillTimes, DecodeTimes, LatentPrefillTimes, LatentDecodeTimes)
}
