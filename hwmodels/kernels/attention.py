"""How long does attention take, by interpolation of a measured table?

Every (format, head width, window, heads, KV heads) is a surface over batch and length, see attention_table; here is
what the work of prefill and of decode, plain and latent, is made of. Chunks of prompts behind cached tokens, which
public tables lack, are priced as whole prompts of as many query-key pairs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hwmodels.hardware import Device
from hwmodels.kernels.attention_holes import filled, hiccups, outliers
from hwmodels.kernels.attention_shapes import SHAPE, Shape
from hwmodels.kernels.attention_surface import between
from hwmodels.kernels.attention_table import AttentionTimes
from hwmodels.kernels.estimate import Estimate
from hwmodels.kernels.table import TOLERANCE
from hwmodels.mapping import DTYPE_BYTES
from hwmodels.operators import attended_pairs

__all__ = [
    "TIMES",
    "DecodeTimes",
    "LatentDecodeTimes",
    "LatentPrefillTimes",
    "PrefillTimes",
    "between",
    "filled",
    "hiccups",
    "outliers",
]

Array = NDArray[np.float64]

#: Rows of queries a compute unit takes at a time; kernels use 64 to 256.
TILE = 128


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


def _peak(device: Device, dtype: str) -> float:
    peaks = device.peak_flops_per_s
    return float(peaks.get(dtype, peaks.get("bf16", peaks.get("fp16", max(peaks.values())))))


def _floats(*values: ArrayLike) -> list[Array]:
    return [np.asarray(v, dtype=float) for v in np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in values))]
