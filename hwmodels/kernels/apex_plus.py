"""APEX+'s profile CSVs: GEMM, causal attention and collectives.

Layout: microsoft/apex_plus profile/comp/<gpu>/gemm*.csv and mha*.csv, profile/comm/<gpu>/<collective>.csv; the columns
name the device. Times are whole microseconds, cut off (not rounded), of the GEMMs and collectives with launches from
the host in between. A GEMM multiplies m x k weights by k x n activations, so n counts tokens. Sizes of messages are
KiB of the whole buffer, cut off too; which collective it was is told by the file's name only.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from hwmodels.errors import MeasurementError
from hwmodels.kernels.reading import Tables, keep, read_csv, tidied

GEMM_COLUMNS = {"gpu", "dtype", "m", "k", "n", "time(us)"}
ATTENTION_COLUMNS = {"gpu", "dtype", "num_heads", "head_size", "batch_size", "seq_len", "time(us)"}
COLLECTIVE_COLUMNS = {"gpu", "num_nodes", "num_gpus_per_node", "dtype", "size(kb)", "time(us)"}

DEVICES = {
    "H100-SXM-80GB": "h100-sxm",
    "H100": "h100-sxm",
    "H200-SXM-141GB": "h200-sxm",
    "H200": "h200-sxm",
    "A100-SXM-80GB": "a100-80-sxm",
}
DTYPES = {"half": "fp16", "float": "fp32", "float8": "fp8"}
COLLECTIVES = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "alltoall": "all-to-all",
    "sendrecv": "point-to-point",
}
SOURCE = "microsoft/apex_plus profile"
SOFTWARE = "apex_plus d96aa5f"


def is_apex_plus(columns: set[str]) -> bool:
    """Whether a file with these columns is one of the three layouts."""
    return columns >= GEMM_COLUMNS or columns >= ATTENTION_COLUMNS or columns >= COLLECTIVE_COLUMNS


def read_apex_plus(path: Path) -> Tables:
    """Table 'gemm', 'attention_prefill' or 'collective' of one file; repeated rows count with their median.

    Rows at other clocks than the highest measured are left out. Raises MeasurementError where the columns are none of
    APEX+'s or the file's name does not tell what was run.
    """
    raw = read_csv(path)
    columns = set(raw.columns)
    left_out: Counter[str] = Counter()
    if not is_apex_plus(columns):
        raise MeasurementError(
            f"{path}: columns {sorted(columns)[:6]} ...; expected APEX+'s GEMM, attention or collective layout"
        )
    raw = keep(raw, raw["gpu"].isin(DEVICES), "of a device without a profile", left_out)
    raw = keep(raw, raw["dtype"].isin(DTYPES), "number format without a name here", left_out)
    for clock in ("graph_clk_freq", "gpu_freq"):
        if clock in raw and len(raw):
            highest = raw.groupby("gpu")[clock].transform("max")
            raw = keep(raw, raw[clock] == highest, "measured at a lowered clock", left_out)
    if columns >= COLLECTIVE_COLUMNS:
        family, frame = "collective", _collective(raw, path)
        # Fewer bytes than a KiB were cut off to 0.
        frame = keep(frame, frame["bytes"] > 0, "message below 1 KiB", left_out)
    elif columns >= ATTENTION_COLUMNS:
        if path.name.startswith("bi"):
            raise MeasurementError(f"{path}: attention without a causal mask; expected mha*.csv")
        family, frame = "attention_prefill", _attention(raw)
    else:
        family = "gemm"
        frame = pd.DataFrame({"m": raw["n"], "n": raw["m"], "k": raw["k"], "kernel": "torch.matmul"})
    frame = frame.assign(
        dtype=raw["dtype"].map(DTYPES),
        device=raw["gpu"].map(DEVICES),
        software=SOFTWARE,
        seconds=pd.to_numeric(raw["time(us)"], errors="coerce") * 1e-6,
        spread=np.nan,
        source=SOURCE,
    )
    return Tables({family: tidied(frame, family, path, left_out)}, left_out)


def _attention(raw: pd.DataFrame) -> pd.DataFrame:
    """Whole prompts, as many KV heads as query heads."""
    return pd.DataFrame(
        {
            "batch": raw["batch_size"],
            "new": raw["seq_len"],
            "before": 0,
            "heads": raw["num_heads"],
            "kv_heads": raw["num_heads"],
            "head_dim": raw["head_size"],
            "window": 0,
            "kv_dtype": raw["dtype"].map(DTYPES),
            "kernel": "xformers cutlass",
        }
    )


def _collective(raw: pd.DataFrame, path: Path) -> pd.DataFrame:
    kind = COLLECTIVES.get(path.stem)
    if kind is None:
        known = ", ".join(f"{name}.csv" for name in COLLECTIVES)
        raise MeasurementError(f"{path}: the file's name tells the collective; expected one of {known}")
    return pd.DataFrame(
        {
            "kind": kind,
            "gpus": raw["num_nodes"] * raw["num_gpus_per_node"],
            "nodes": raw["num_nodes"],
            "bytes": raw["size(kb)"] * 1024,
            "kernel": "nccl",
        },
        index=raw.index,
    )
