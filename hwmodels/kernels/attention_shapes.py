"""Which measured shapes of attention are most like another one?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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


def distance(wanted: tuple[str, str, int, int], other: tuple[str, str, int, int]) -> float:
    """How far a group of surfaces is from the wanted one: arithmetic first, then window, cache format, head width."""
    far = 4.0 * (wanted[0] != other[0]) + 2.0 * (wanted[1] != other[1]) + abs(np.log2(wanted[2] / other[2]))
    window, measured = wanted[3], other[3]
    if window != measured:
        far += 8.0 if window == 0 else 1.5 if measured == 0 else 0.5 * abs(np.log2(window / measured))
    return float(far)


def neighbours(shape: Shape, near: list[Shape]) -> list[tuple[Shape, float]]:
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
