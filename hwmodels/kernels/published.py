"""Timings that projects print in their documentation: DeepEP and TensorRT-LLM expert exchange, DeepGEMM products.

What the tables leave out is filled with what their text says, and rows that state only a bandwidth of an unstated
number of bytes are left out.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from hwmodels.kernels.reading import Tables, keep, read_csv, require_columns, tidied

DEEPEP_COLUMNS = {"mode", "gpu", "ep", "tokens_per_rank", "hidden", "topk", "dispatch_dtype", "combine_dtype",
                  "dispatch_latency_us", "combine_latency_us", "lib_version"}  # fmt: skip
DEEPGEMM_COLUMNS = {"kind", "groups", "m", "n", "k", "tflops"}
A2A_COLUMNS = {"ep_size", "batch_per_rank", "dispatch_us", "dispatch_GBps", "combine_us"}

#: Width and experts per token are those of DeepSeek-V3, so its 256 routed experts (arXiv:2412.19437, section 4.2).
EXPERTS = 256
#: 18.9 us at 6.07 GB/s for one token are 8 copies of 7,168 numbers of 16 bit, in both directions.
A2A_HIDDEN, A2A_TOP_K = 7168, 8
NODE_GPUS = 8
DEVICES = {"H800": "h800-sxm"}


def is_published(columns: set[str]) -> bool:
    """Whether a file with these columns is one of the three."""
    return columns >= DEEPEP_COLUMNS or columns >= DEEPGEMM_COLUMNS or columns >= A2A_COLUMNS


def read_published(path: Path) -> Tables:
    """Tables 'expert_exchange', or 'gemm' and 'batched_gemm', of one file.

    Raises MeasurementError where the columns are none of the three layouts.
    """
    raw = read_csv(path)
    left_out: Counter[str] = Counter()
    if set(raw.columns) >= A2A_COLUMNS:
        return Tables({"expert_exchange": tidied(_a2a(raw), "expert_exchange", path, left_out)}, left_out)
    if set(raw.columns) >= DEEPGEMM_COLUMNS:
        return _deepgemm(raw, path, left_out)
    require_columns(raw, DEEPEP_COLUMNS, path, "DeepEP's, DeepGEMM's or TensorRT-LLM's published tables")
    frame = _deepep(raw, left_out)
    return Tables({"expert_exchange": tidied(frame, "expert_exchange", path, left_out)}, left_out)


def _deepep(raw: pd.DataFrame, left_out: Counter[str]) -> pd.DataFrame:
    raw = keep(raw, raw["gpu"].isin(DEVICES), "of a device that is not named", left_out)
    timed = raw["dispatch_latency_us"].notna() & raw["combine_latency_us"].notna()
    raw = keep(raw, timed, "a bandwidth without bytes or time", left_out)
    return _exchange(
        raw["tokens_per_rank"],
        raw["ep"],
        np.ceil(raw["ep"] / NODE_GPUS).astype(int),
        raw["hidden"],
        raw["topk"],
        {"dispatch": raw["dispatch_latency_us"], "combine": raw["combine_latency_us"]},
        {"dispatch": raw["dispatch_dtype"].str.lower(), "combine": raw["combine_dtype"].str.lower()},
        device=raw["gpu"].map(DEVICES),
        software="deepep " + raw["lib_version"].str.lower(),
        kernel="deepep " + raw["mode"] + ", all over RDMA",
        source="deepseek-ai/DeepEP README",
    )


def _a2a(raw: pd.DataFrame) -> pd.DataFrame:
    """One NVLink domain holds all ranks, so they count as one node."""
    return _exchange(
        raw["batch_per_rank"],
        raw["ep_size"],
        1,
        A2A_HIDDEN,
        A2A_TOP_K,
        {"dispatch": raw["dispatch_us"], "combine": raw["combine_us"]},
        {"dispatch": "bf16", "combine": "bf16"},
        device="gb200",
        software="tensorrt-llm (version not told)",
        kernel="all-to-all over NVLink",
        source="table published by TensorRT-LLM",
    )


def _exchange(
    tokens: pd.Series,
    gpus: pd.Series,
    nodes: pd.Series | int,
    hidden: pd.Series | int,
    top_k: pd.Series | int,
    microseconds: dict[str, pd.Series],
    dtypes: dict[str, pd.Series] | dict[str, str],
    **common: object,
) -> pd.DataFrame:
    frames = [
        pd.DataFrame(
            {"kind": kind, "gpus": gpus, "nodes": nodes, "tokens": tokens, "hidden": hidden, "experts": EXPERTS,
             "top_k": top_k, "dtype": dtypes[kind], "seconds": microseconds[kind] * 1e-6, "spread": np.nan, **common}
        )
        for kind in ("dispatch", "combine")
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def _deepgemm(raw: pd.DataFrame, path: Path, left_out: Counter[str]) -> Tables:
    """Times follow from the TFLOP/s; m is per group. Rate and time are rounded to three digits."""
    frame = raw[["groups", "m", "n", "k"]].assign(
        dtype="fp8_block",
        device="h800-sxm",
        software="deepgemm (version not told)",
        kernel="deepgemm " + raw["kind"],
        seconds=2.0 * raw["groups"] * raw["m"] * raw["n"] * raw["k"] / (raw["tflops"] * 1e12),
        spread=np.nan,
        source="deepseek-ai/DeepGEMM README",
    )
    dense = raw["kind"] == "dense"
    tables = {
        "gemm": tidied(frame[dense], "gemm", path, left_out),
        "batched_gemm": tidied(frame[~dense], "batched_gemm", path, left_out),
    }
    return Tables(tables, left_out)
