"""How long does attention of any shape take, by surfaces over the tables of measured ones?

A guide, a roofline of a few terms whose weights are fitted to the table, gives the way between and beyond the measured
points; the table gives the level. Head counts that were not measured borrow the surfaces of the nearest ones at equal
work. What differs between prefill and decode, the guide above all, is in hwmodels.kernels.attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.hardware import Device
from hwmodels.kernels.attention_holes import OUTLIER, filled, hiccups, outliers
from hwmodels.kernels.attention_shapes import SHAPE, Shape, distance, neighbours
from hwmodels.kernels.attention_surface import (
    BATCH_END,
    REFINE,
    SIZE_END,
    Surface,
    between,
    finer,
    found_in,
    most_below,
    reaching,
    stretched,
)
from hwmodels.kernels.curve import fitted
from hwmodels.kernels.estimate import Estimate
from hwmodels.kernels.table import FAMILIES, beyond_peak

Array = NDArray[np.float64]

#: Shapes alike that help to close the holes of a surface.
ALIKE = 6
#: Rows of a group that its guide is fitted to.
GUIDE_ROWS = 1500


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
            weights.append(_weights(np.concatenate([terms[i] for i in part]), times))
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
        batches, sizes = reaching(batches, BATCH_END), reaching(sizes, SIZE_END)
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
        i, has_b = found_in(at_b, batches * (self._work(shape) / self._work(other)))
        j, has_s = found_in(at_s, sizes)
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
        return same[:ALIKE] + sorted(measured, key=lambda s: distance(shape.group, s.group))[: ALIKE // 2]

    def _borrowed(self, shape: Shape) -> tuple[Surface, Shape]:
        """Of a shape that was not measured: level of the nearest measured ones at equal work."""
        group = min(self.groups, key=lambda other: distance(shape.group, other))
        near = [s for s in self.shapes if s.group == group]
        sources = neighbours(shape, near)
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
        log_s = most_below(log_s)
        return self._refined(shape, weights, batches, sizes, log_s, measured), sources[0][0]

    def _refined(
        self, shape: Shape, weights: Array, batches: Array, sizes: Array, log_s: Array, measured: Array
    ) -> Surface:
        """The grid at REFINE times as many points, along the guide, rising wherever the nodes do and exact on them."""
        fine_b, fine_s = finer(np.log(batches)), finer(np.log(sizes))
        # What falls where it should rise is noise: it is taken off, and laid back on as a power law between nodes.
        rising = most_below(log_s)
        log_guide = np.log(self._guide(shape, weights, np.exp(fine_b)[:, None], np.exp(fine_s)[None, :]))
        level = stretched(rising - log_guide[::REFINE, ::REFINE], np.log(batches), np.log(sizes), fine_b, fine_s)
        guided = log_guide + level
        i, j = np.arange(len(fine_b)), np.arange(len(fine_s))
        above = rising[np.ix_(-(-i // REFINE), -(-j // REFINE))]
        below = rising[np.ix_(i // REFINE, j // REFINE)]
        guided = np.clip(guided, below, above)
        guided = most_below(guided)
        guided += stretched(log_s - rising, np.log(batches), np.log(sizes), fine_b, fine_s)
        guided[::REFINE, ::REFINE] = log_s
        known = stretched(measured, np.log(batches), np.log(sizes), fine_b, fine_s)
        return Surface(fine_b, fine_s, guided, np.where(known > 1 - 1e-9, 1.0, 0.0))


def _weights(terms: Array, seconds: Array) -> Array:
    """Weights >= 0 of the guide's terms with the least squared relative error, none of them quite zero."""
    step = max(1, len(seconds) // GUIDE_ROWS)
    return np.maximum(fitted(terms[::step], seconds[::step]), 0.02)
