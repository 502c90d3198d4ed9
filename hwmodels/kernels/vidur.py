"""Vidur's profiling CSVs: layer operators (mlp.csv), attention (attention.csv) and collectives, in fp16.

Layout: microsoft/vidur data/profiling/compute/<device>/<model>/*.csv and network/<node>/*.csv. Times are milliseconds
in columns time_stats.<operator>.median, rounded to microseconds; every row is one rank of
num_tensor_parallel_workers. Collectives' `size` is bytes of each rank's buffer. The device is told by the folder only.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from hwmodels.errors import MeasurementError
from hwmodels.kernels.reading import Tables, keep, read_csv, tidied

MLP_COLUMNS = {"time_stats.mlp_up_proj.median", "n_head", "n_kv_head", "n_embd", "n_expanded_embd", "use_gated_mlp",
               "num_tokens", "num_tensor_parallel_workers"}  # fmt: skip
ATTENTION_COLUMNS = {"time_stats.attn_prefill.median", "time_stats.attn_decode.median", "n_embd", "n_q_head",
                     "n_kv_head", "num_tensor_parallel_workers", "batch_size", "prefill_chunk_size", "kv_cache_size",
                     "is_prefill", "attention_backend"}  # fmt: skip
COLLECTIVE_COLUMNS = {"num_workers", "size", "collective", "devices_per_node"}

#: Device profile of Vidur's folders; its A40 and its pairs of bridged A100 have none.
DEVICES = {"a100": "a100-80-sxm", "h100": "h100-sxm", "a100_dgx": "a100-80-sxm", "h100_dgx": "h100-sxm"}
COLLECTIVES = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "send_recv": "point-to-point",
}
ELEMENT_BYTES = 2
SOURCE = "microsoft/vidur data/profiling"
SOFTWARE = "sarathi (version not told)"


def is_vidur(columns: set[str]) -> bool:
    """Whether a file with these columns is one of the three layouts."""
    return columns >= MLP_COLUMNS or columns >= ATTENTION_COLUMNS or columns >= COLLECTIVE_COLUMNS


def told_device(path: Path) -> str | None:
    """The device profile the folders of `path` name; None where they name none."""
    return next((DEVICES[part] for part in reversed(path.parts) if part in DEVICES), None)


def read_vidur(path: Path, device: str | None = None) -> Tables:
    """Tables 'gemm' and 'elementwise', 'attention_prefill' and 'attention_decode', or 'collective' of one file.

    device   what was measured; None: as the folder says

    Repeated rows are repeated runs: their median. Raises MeasurementError where the columns are none of Vidur's, or
    neither folder nor `device` tells what was measured.
    """
    raw = read_csv(path)
    columns = set(raw.columns)
    if not is_vidur(columns):
        raise MeasurementError(f"{path}: columns {sorted(columns)[:6]} ...; expected Vidur's mlp, attention or "
                               "collective layout")  # fmt: skip
    device = device or told_device(path)
    if device is None:
        raise MeasurementError(
            f"{path}: neither columns nor folder tell the device; pass one, or keep the file under one of "
            f"{', '.join(DEVICES)}"
        )
    left_out: Counter[str] = Counter()
    found: list[tuple[str, pd.DataFrame]] = []
    if columns >= MLP_COLUMNS:
        found = [("gemm", _products(raw)), ("elementwise", _elementwise(raw))]
    elif columns >= ATTENTION_COLUMNS:
        found = [("attention_prefill", _prefill(raw)), ("attention_decode", _decode(raw))]
    else:
        known = keep(raw, raw["collective"].isin(COLLECTIVES), "collective that no engine uses", left_out)
        found = [("collective", _collective(known))]
    tables = {}
    for family, frame in found:
        frame = frame.assign(device=device, software=SOFTWARE, spread=np.nan, source=SOURCE)
        tables[family] = tidied(frame, family, path, left_out)
    return Tables(tables, left_out)


def _seconds(raw: pd.DataFrame, operator: str) -> pd.Series:
    column = f"time_stats.{operator}.median"
    if column not in raw:
        return pd.Series(np.nan, index=raw.index)
    seconds: pd.Series = pd.to_numeric(raw[column], errors="coerce") * 1e-3
    return seconds


def _widths(raw: pd.DataFrame) -> tuple[pd.Series, pd.Series, pd.Series]:
    """(query width, key or value width, feed-forward width) of one rank."""
    ranks = raw["num_tensor_parallel_workers"]
    head = raw["n_embd"] // raw["n_head"]
    return (
        raw["n_head"] // ranks * head,
        (raw["n_kv_head"] // ranks).clip(lower=1) * head,
        raw["n_expanded_embd"] // ranks,
    )


def _products(raw: pd.DataFrame) -> pd.DataFrame:
    query, key, feed = _widths(raw)
    gated = 1 + raw["use_gated_mlp"].astype(bool).astype(int)
    shapes = {
        "attn_pre_proj": (query + 2 * key, raw["n_embd"]),
        "attn_post_proj": (raw["n_embd"], query),
        "mlp_up_proj": (feed * gated, raw["n_embd"]),
        "mlp_down_proj": (raw["n_embd"], feed),
    }
    parts = [
        pd.DataFrame({"m": raw["num_tokens"], "n": n, "k": k, "seconds": _seconds(raw, operator)})
        for operator, (n, k) in shapes.items()
        if f"time_stats.{operator}.median" in raw
    ]
    return pd.concat(parts, ignore_index=True).assign(dtype="fp16", kernel="torch linear")


def _elementwise(raw: pd.DataFrame) -> pd.DataFrame:
    """Bytes each of the layer's small operators reads and writes."""
    query, key, feed = _widths(raw)
    gated = 1 + raw["use_gated_mlp"].astype(bool).astype(int)
    numbers = {
        "input_layernorm": 2 * raw["n_embd"],
        "post_attention_layernorm": 2 * raw["n_embd"],
        "add": 3 * raw["n_embd"],
        "attn_rope": 2 * (query + key),
        "mlp_act": feed * (gated + 1),
        "emb": 2 * raw["n_embd"],
    }
    parts = [
        pd.DataFrame(
            {"bytes": raw["num_tokens"] * width * ELEMENT_BYTES, "seconds": _seconds(raw, operator), "kernel": operator}
        )
        for operator, width in numbers.items()
        if f"time_stats.{operator}.median" in raw
    ]
    return pd.concat(parts, ignore_index=True).assign(dtype="fp16")


def _attention(raw: pd.DataFrame) -> pd.DataFrame:
    ranks = raw["num_tensor_parallel_workers"]
    return pd.DataFrame(
        {
            "dtype": "fp16",
            "kernel": raw["attention_backend"]
            .astype(str)
            .str.replace("AttentionBackend.", "", regex=False)
            .str.lower(),
            "batch": raw["batch_size"],
            "heads": raw["n_q_head"] // ranks,
            "kv_heads": (raw["n_kv_head"] // ranks).clip(lower=1),
            "head_dim": raw["n_embd"] // raw["n_q_head"],
            "window": 0,
            "kv_dtype": "fp16",
        },
        index=raw.index,
    )


def _is_prefill(raw: pd.DataFrame) -> pd.Series:
    return raw["is_prefill"].astype(str).str.lower() == "true"


def _prefill(raw: pd.DataFrame) -> pd.DataFrame:
    raw = raw[_is_prefill(raw)]
    return _attention(raw).assign(
        new=raw["prefill_chunk_size"], before=raw["kv_cache_size"], seconds=_seconds(raw, "attn_prefill")
    )


def _decode(raw: pd.DataFrame) -> pd.DataFrame:
    """kv_cache_size counts the tokens before the new one."""
    raw = raw[~_is_prefill(raw)]
    return _attention(raw).assign(context=raw["kv_cache_size"] + 1, seconds=_seconds(raw, "attn_decode"))


def _collective(raw: pd.DataFrame) -> pd.DataFrame:
    """Ranks are placed on as few nodes as devices_per_node allows."""
    gathered = raw["collective"].isin(["all_gather", "reduce_scatter"])
    names = sorted(set(raw["collective"]))
    seconds = pd.Series(np.nan, index=raw.index)
    for name in names:
        seconds = seconds.where(raw["collective"] != name, _seconds(raw, str(name)))
    return pd.DataFrame(
        {
            "dtype": "fp16",
            "kernel": "nccl",
            "kind": raw["collective"].map(COLLECTIVES),
            "gpus": raw["num_workers"],
            "nodes": np.ceil(raw["num_workers"] / raw["devices_per_node"]).astype(int),
            "bytes": raw["size"] * np.where(gathered, raw["num_workers"], 1),
            "seconds": seconds,
        }
    )
