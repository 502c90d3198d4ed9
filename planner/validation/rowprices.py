"""What does the roofline ask for the kernels of a measured table?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.errors import MappingError, ProfileError
from hwmodels.hardware import Cluster, Device, load_cluster
from hwmodels.kernels.table import FAMILIES
from hwmodels.mapping import DTYPE_BYTES, WEIGHT_FORMATS, Mapping, Precision
from hwmodels.operators import (
    Array,
    AttentionCore,
    Elementwise,
    Experts,
    Gemm,
    Operator,
    attended_pairs,
    busiest_rank_experts,
    busiest_rank_rows,
    expected_active_experts,
)
from hwmodels.roofline import AnalyticCost, compiled

#: Widths of DeepSeek's latent attention: of queries and keys, of values, of the cached latent with its position
#: (arXiv:2412.19437, section 4.2).
QK_DIM, VALUE_DIM, LATENT_DIM, LATENT_VALUE_DIM = 192, 128, 576, 512

#: From the rows that share the columns grouped by, to one operator for all of them, and its main size.
_Build = Callable[[pd.DataFrame], Operator]


def sizes(rows: pd.DataFrame, family: str) -> NDArray[np.float64]:
    """The main size of every row: floating-point operations or, where there are none to speak of, bytes."""
    value: NDArray[np.float64]
    if family in GROUPED:
        value = np.full(len(rows), np.nan)
        for found, op in _operators(rows, family):
            flops = np.broadcast_to(op.flops, found.shape)
            value[found] = np.where(flops > 0, flops, op.bytes)
    else:
        value = rows["bytes"].to_numpy(float) if "bytes" in rows else _sent_bytes(rows)
    return value


def is_operator(rows: pd.DataFrame, family: str) -> NDArray[np.bool_]:
    """Which rows are what an operator of hwmodels.operators stands for: prompts are attended to one by one."""
    if family in {"attention_prefill", "mla_prefill"}:
        single: NDArray[np.bool_] = rows["batch"].to_numpy(int) == 1
        return single
    return np.full(len(rows), family in {*GROUPED, "collective", "expert_exchange"})


def analytic_s(rows: pd.DataFrame, family: str, hardware: str, device: Device) -> NDArray[np.float64]:
    """Seconds of every row by the analytic cost model with the efficiencies of `device`; NaN where it has no operator.

    hardware   name or path of the device or cluster, for the links of collectives
    """
    prices = np.full(len(rows), np.nan)
    if family in GROUPED:
        cost = AnalyticCost(_alone(device), Mapping())
        for found, op in _operators(rows, family):
            prices[found] = cost.time_s(op)
        return prices
    if family not in {"collective", "expert_exchange"}:
        return prices
    nbytes = rows["bytes"].to_numpy(float) if family == "collective" else _sent_bytes(rows)
    for found in _alike(rows, ["kind", "gpus", "nodes"]):
        gpus, nodes = (int(rows[column].iloc[found[0]]) for column in ("gpus", "nodes"))
        try:
            cluster = load_cluster(hardware, gpus)
            if cluster.nodes == nodes:
                kind = str(rows["kind"].iloc[found[0]]) if family == "collective" else "all-to-all"
                prices[found] = compiled(cluster, kind, tuple(range(gpus))).time_s(nbytes[found])
        except (MappingError, ProfileError):
            continue  # more devices than the cluster joins
    return prices


def _alone(device: Device) -> Cluster:
    return Cluster(device.name, device, 1, 1, None, None, 1.0)


def _sent_bytes(rows: pd.DataFrame) -> NDArray[np.float64]:
    """What each rank of an expert exchange sends: a copy of every token for every rank that holds a chosen expert."""
    copies = np.minimum(rows["top_k"].to_numpy(float), rows["gpus"].to_numpy(float))
    width = rows["hidden"].to_numpy(float) * rows["dtype"].map(DTYPE_BYTES).to_numpy(float)
    sent: NDArray[np.float64] = rows["tokens"].to_numpy(float) * copies * width
    return sent


def _operators(rows: pd.DataFrame, family: str) -> list[tuple[NDArray[np.intp], Operator]]:
    """(positions, operator that stands for these rows)."""
    columns, build = GROUPED[family]
    return [(found, build(rows.iloc[found])) for found in _alike(rows, list(columns))]


def _alike(rows: pd.DataFrame, columns: list[str]) -> list[NDArray[np.intp]]:
    """Positions of the rows that agree in the columns."""
    number = rows.groupby(columns, sort=False, dropna=False).ngroup().to_numpy()
    order = np.argsort(number, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(number[order])) + 1) if len(order) else []


def precision_of(dtype: str) -> Precision:
    """Formats of a matrix product of a table."""
    return Precision(dtype, WEIGHT_FORMATS[dtype][1] or "bf16")


def _one(rows: pd.DataFrame, column: str) -> int:
    return int(rows[column].iloc[0])


def _array(rows: pd.DataFrame, column: str) -> Array:
    return rows[column].to_numpy(float)


def _text(rows: pd.DataFrame, column: str) -> str:
    return str(rows[column].iloc[0])


def _gemm(rows: pd.DataFrame) -> Operator:
    groups = _one(rows, "groups") if "groups" in rows else 1
    return Gemm(
        "product", _array(rows, "m"), _one(rows, "n"), _one(rows, "k"), precision_of(_text(rows, "dtype")), 1, groups
    )


def _experts(rows: pd.DataFrame) -> Operator:
    """As an expert block of a model whose routing is uniform."""
    tokens, experts, top_k, ep = _array(rows, "tokens"), _one(rows, "experts"), _one(rows, "top_k"), _one(rows, "ep")
    here = experts / ep
    routed = busiest_rank_rows(tokens * top_k / ep, ep)
    touched = expected_active_experts(here, routed, experts, top_k, tokens)
    active = np.minimum(busiest_rank_experts(touched, here, ep), routed)
    return Experts(
        "experts", tokens, routed, active, _one(rows, "hidden"), _one(rows, "intermediate"), experts, top_k,
        _one(rows, "tp"), ep, bool(_one(rows, "gated")), precision_of(_text(rows, "dtype")),
    )  # fmt: skip


def _formats(rows: pd.DataFrame) -> Precision:
    dtype = _text(rows, "dtype")
    return Precision(dtype, dtype, _text(rows, "kv_dtype"))


def _prefill(rows: pd.DataFrame) -> Operator:
    latent = "head_dim" not in rows
    window = None if latent else _one(rows, "window") or None
    batch, new, before = (_array(rows, column) for column in ("batch", "new", "before"))
    heads = _one(rows, "heads")
    return AttentionCore(
        "attention",
        "prefill",
        batch * new,
        batch * attended_pairs(new, before, window),
        batch * (before if window is None else np.minimum(before, window)),
        heads,
        heads if latent else _one(rows, "kv_heads"),
        QK_DIM if latent else _one(rows, "head_dim"),
        VALUE_DIM if latent else _one(rows, "head_dim"),
        False,
        _formats(rows),
        1,
        window,
    )


def _decode(rows: pd.DataFrame) -> Operator:
    latent = "head_dim" not in rows
    window = None if latent else _one(rows, "window") or None
    batch, context = _array(rows, "batch"), _array(rows, "context")
    read = batch * (context if window is None else np.minimum(context, window))
    return AttentionCore(
        "attention",
        "decode",
        batch,
        read,
        read,
        _one(rows, "heads"),
        1 if latent else _one(rows, "kv_heads"),
        LATENT_DIM if latent else _one(rows, "head_dim"),
        LATENT_VALUE_DIM if latent else _one(rows, "head_dim"),
        latent,
        _formats(rows),
        1,
        window,
    )


def _elementwise(rows: pd.DataFrame) -> Operator:
    return Elementwise("elementwise", _array(rows, "bytes"))


def _quantize(rows: pd.DataFrame) -> Operator:
    """16 bit read; a cast also writes 8 bit."""
    width = 3.0 if _text(rows, "kind") == "cast" else 2.0
    return Elementwise("quantize", _array(rows, "m") * _array(rows, "k") * width)


_HEADS = ("heads", "kv_heads", "head_dim", "window", "dtype", "kv_dtype")
#: By family: columns one operator has one value of, and how it is made.
GROUPED: dict[str, tuple[tuple[str, ...], _Build]] = {
    "gemm": (("n", "k", "dtype"), _gemm),
    "batched_gemm": (("groups", "n", "k", "dtype"), _gemm),
    "moe": ((*FAMILIES["moe"].shape[1:8], "dtype"), _experts),
    "attention_prefill": (_HEADS, _prefill),
    "attention_decode": (_HEADS, _decode),
    "mla_prefill": (("heads", "dtype", "kv_dtype"), _prefill),
    "mla_decode": (("heads", "dtype", "kv_dtype"), _decode),
    "elementwise": (("dtype",), _elementwise),
    "quantize": (("kind",), _quantize),
}
