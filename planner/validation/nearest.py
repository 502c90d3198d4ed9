"""Which measured kernels are nearest to an operator of a step?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hwmodels.kernels.table import FAMILIES, TEXT
from hwmodels.operators import (
    AttentionCore,
    Communication,
    ContextAttention,
    Elementwise,
    ExpertExchange,
    Experts,
    Gemm,
    GroupedGemm,
    Operator,
)
from hwmodels.roofline import attention_format, product_format

#: Numbers that may be zero; they are compared one up.
MAY_BE_ZERO = frozenset({"before", "window", "gated"})
#: The formats that stand in for each other.
SIXTEEN = frozenset({"bf16", "fp16"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """The row of a kernel table that would be the operator itself."""

    family: str
    dtype: str
    shape: Mapping[str, float | str]


@dataclass(frozen=True, slots=True)
class Near:
    """A measured kernel close to an operator.

    distance   octaves: sum over the shape's columns of |log2(measured / asked for)|; 0 is the very shape
    """

    shape: Mapping[str, float | str]
    dtype: str
    distance: float
    seconds: float
    software: str
    kernel: str


def wanted(op: Operator, ranks: Mapping[str, tuple[int, int]]) -> Wanted | None:
    """What the operator, of one batch, is called in a kernel table; None where no table has its kind.

    ranks   (devices, nodes) of the rank groups
    """
    if isinstance(op, Gemm):
        dtype = product_format(op.precision)
        shape: dict[str, float | str] = {"m": _number(op.m), "n": op.n, "k": op.k}
        if dtype is None:
            return None
        if op.groups > 1:
            return Wanted("batched_gemm", dtype, {"groups": op.groups, **shape})
        return Wanted("gemm", dtype, shape)
    if isinstance(op, Experts):
        dtype = product_format(op.precision)
        if dtype is None:
            return None
        shape = {
            "tokens": _number(op.tokens),
            "hidden": op.hidden,
            "intermediate": op.intermediate,
            "experts": op.experts,
            "top_k": op.top_k,
            "tp": op.tp,
            "ep": op.ep,
            "gated": int(op.gated),
        }
        return Wanted("moe", dtype, shape)
    if isinstance(op, AttentionCore):
        return _attention(op)
    if isinstance(op, Communication):
        gpus, nodes = ranks[op.group]
        return Wanted("collective", "", {"kind": op.kind, "gpus": gpus, "nodes": nodes, "bytes": _number(op.bytes)})
    if isinstance(op, ExpertExchange):
        gpus, nodes = ranks["ep"]
        block = {"hidden": op.hidden, "experts": op.experts, "top_k": op.top_k}
        return Wanted(
            "expert_exchange", "",
            {"kind": op.phase, "gpus": gpus, "nodes": nodes, "tokens": max(_number(op.tokens), 1.0), **block},
        )  # fmt: skip
    if isinstance(op, Elementwise):
        return Wanted("elementwise", "", {"bytes": _number(op.bytes) / op.kernels})
    assert isinstance(op, GroupedGemm | ContextAttention)  # and of its blocks no table knows the ranks
    return None


def _attention(op: AttentionCore) -> Wanted:
    """A mean sequence of the batch; latent attention is told by its widths."""
    queries, read = max(_number(op.queries), 1.0), _number(op.read)
    heads: dict[str, float | str] = {"heads": op.heads}
    plain = op.qk_dim == op.value_dim
    if plain:
        heads |= {"kv_heads": op.kv_heads, "head_dim": op.qk_dim, "window": op.window_tokens or 0}
    heads["kv_dtype"] = op.precision.kv
    dtype = attention_format(op.precision)
    if op.phase == "prefill":
        family = "attention_prefill" if plain else "mla_prefill"
        return Wanted(family, dtype, {"batch": 1, "new": queries, "before": read, **heads})
    family = "mla_decode" if op.shared else "attention_decode"
    return Wanted(family, dtype, {"batch": queries, "context": max(read / queries, 1.0), **heads})


def _number(values: np.ndarray) -> float:
    return float(np.sum(values))


def in_line(shape: Mapping[str, float | str]) -> str:
    """A shape in one line.

    >>> in_line({"m": 64.0, "kv_dtype": "fp8", "bytes": 1.5})
    'm 64, kv_dtype fp8, bytes 1.5'
    """
    return ", ".join(f"{name} {value if isinstance(value, str) else f'{value:.6g}'}" for name, value in shape.items())


class Index:
    """Finds the rows of kernel tables nearest to a shape."""

    def __init__(self, tables: Mapping[str, pd.DataFrame]) -> None:
        self.tables = tables
        self.logs = {
            family: {
                column: np.log2(table[column].to_numpy(float) + (column in MAY_BE_ZERO))
                for column in FAMILIES[family].shape
                if column not in TEXT
            }
            for family, table in tables.items()
        }

    def nearest(self, asked: Wanted, count: int) -> tuple[Near, ...]:
        """The `count` nearest shapes in the same format and of the same kind, each with its fastest kernel.

        Rows in another format of the KV cache count as one octave away.
        """
        table = self.tables.get(asked.family)
        if table is None or table.empty or count < 1:
            return ()
        distance = np.zeros(len(table))
        for column, logs in self.logs[asked.family].items():
            distance += np.abs(logs - np.log2(float(asked.shape[column]) + (column in MAY_BE_ZERO)))
        if asked.dtype:
            formats = SIXTEEN if asked.dtype in SIXTEEN else {asked.dtype}
            distance[~table["dtype"].isin(formats).to_numpy()] = np.inf
        if "kind" in asked.shape:
            distance[(table["kind"] != asked.shape["kind"]).to_numpy()] = np.inf
        if "kv_dtype" in asked.shape:
            kept = SIXTEEN if asked.shape["kv_dtype"] in SIXTEEN else {asked.shape["kv_dtype"]}
            distance += ~table["kv_dtype"].isin(kept).to_numpy()
        shape = list(FAMILIES[asked.family].shape)
        close = np.flatnonzero(distance <= _smallest(distance, 64 * count))
        order = close[np.lexsort((table["seconds"].to_numpy(float)[close], distance[close]))]
        found: dict[tuple[float | str, ...], Near] = {}
        for position in order:
            if len(found) == count or not np.isfinite(distance[position]):
                break
            row = table.iloc[int(position)]
            values = {column: str(row[column]) if column in TEXT else float(row[column]) for column in shape}
            if tuple(values.values()) not in found:
                found[tuple(values.values())] = Near(
                    values,
                    str(row["dtype"]),
                    float(distance[position]),
                    float(row["seconds"]),
                    str(row["software"]),
                    str(row["kernel"]),
                )
        return tuple(found.values())


def _smallest(values: np.ndarray, count: int) -> float:
    """The `count`-th smallest value, or the largest where there are fewer."""
    last = min(count, len(values)) - 1
    return float(np.partition(values, last)[last])
