"""What one measurement is: an operator family, a format and a shape, with the work it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from hwmodels.errors import MeasurementError
from hwmodels.kernels.table import TEXT, family_named
from hwmodels.mapping import DTYPE_BYTES

Value = int | str


@dataclass(frozen=True, slots=True)
class Point:
    """A shape to be measured in `dtype`; `shape` in the order of the family's shape columns."""

    family: str
    dtype: str
    shape: tuple[Value, ...]

    @classmethod
    def of(cls, family: str, dtype: str, **shape: Value) -> Self:
        """A point by named sizes; raises MeasurementError for names or values its table does not have.

        >>> Point.of("gemm", "bf16", m=1, n=4096, k=14336).shape
        (1, 4096, 14336)
        """
        columns = family_named(family).shape
        if set(shape) != set(columns):
            raise MeasurementError(f"{family} point with {', '.join(shape)}: expected {', '.join(columns)}")
        for column, value in shape.items():
            if isinstance(value, str) != (column in TEXT):
                raise MeasurementError(f"{family} point with {column} = {value!r}: expected another type")
        return cls(family, dtype, tuple(shape[column] for column in columns))

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers of the shape by column."""
        named = zip(family_named(self.family).shape, self.shape, strict=True)
        return {column: value for column, value in named if not isinstance(value, str)}

    @property
    def words(self) -> dict[str, str]:
        """The texts of the shape by column."""
        named = zip(family_named(self.family).shape, self.shape, strict=True)
        return {column: value for column, value in named if isinstance(value, str)}

    @property
    def columns(self) -> dict[str, Value]:
        """The shape and format, by the columns of the table."""
        return {**self.words, **self.sizes, "dtype": self.dtype}


@dataclass(frozen=True, slots=True)
class Work:
    """What one launch computes and moves, and the operands it needs in memory."""

    flops: float
    moved_bytes: float
    held_bytes: float


def work(point: Point) -> Work:
    """FLOPs, bytes read and written, and bytes held by one launch of the point."""
    s, size = point.sizes, DTYPE_BYTES[point.dtype]
    if point.family in ("gemm", "batched_gemm"):
        g, m, n, k = s.get("groups", 1), s["m"], s["n"], s["k"]
        nbytes = g * ((m * k + n * k) * size + m * n * max(size, 2.0))
        return Work(2.0 * g * m * n * k, nbytes, nbytes)
    if point.family == "moe":
        here, width = s["experts"] // s["ep"], -(-s["intermediate"] // s["tp"])
        rows = s["tokens"] * s["top_k"] / s["ep"]
        active = min(rows, here * (1 - (1 - s["top_k"] / s["experts"]) ** s["tokens"]))
        expert = (2 + s["gated"]) * s["hidden"] * width
        passed = rows * (4 * s["hidden"] + 4 * width) * size
        return Work(2.0 * rows * expert, active * expert * size + passed, here * expert * size + passed)
    if point.family == "attention_prefill":
        pairs = s["new"] * s["before"] + s["new"] * (s["new"] + 1) / 2
        if s["window"]:
            pairs = min(pairs, s["new"] * s["window"])
        cache = 2.0 * (s["new"] + s["before"]) * s["kv_heads"]
        nbytes = s["batch"] * s["head_dim"] * size * (cache + 2.0 * s["new"] * s["heads"])
        mask = s["new"] * (s["new"] + s["before"]) if s["before"] else 0
        return Work(4.0 * s["batch"] * s["heads"] * s["head_dim"] * pairs, nbytes, nbytes + mask)
    if point.family == "attention_decode":
        context = min(s["context"], s["window"] or s["context"])
        cache = 2.0 * s["batch"] * context * s["kv_heads"] * s["head_dim"] * size
        held = cache * s["context"] / context
        return Work(4.0 * s["batch"] * context * s["heads"] * s["head_dim"], cache, held)
    # Norms count what they read and write; copies within a device do both.
    moved = s["bytes"] * (2.0 if point.words.get("kind") == "d2d" else 1.0)
    return Work(0.0, moved, 2.0 * s["bytes"])
