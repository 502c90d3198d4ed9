"""Kernel timings that AMD's aiter ships: the best kernel its tuner found for every GEMM and fused expert block.

Times are microseconds. The MoE times are those of the two matrix kernels, activation included; sorting the rows by
expert and scaling them are not in them. Routing is drawn at random when tuning, which loads experts about evenly.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from hwmodels.errors import MeasurementError
from hwmodels.kernels.reading import Tables, keep, read_csv, require_columns, tidied
from hwmodels.kernels.table import FAMILIES

GEMM_COLUMNS = {"gfx", "cu_num", "config", "batch", "m", "n", "k", "dtype", "q_dtype_w", "lib", "us"}
MOE_COLUMNS = {"gfx", "cu_num", "tokens", "model_dim", "inter_dim", "experts", "topk", "q_dtype_a", "q_dtype_w",
               "q_type", "use_g1u1", "us_total"}  # fmt: skip

#: Device profiles by architecture and compute units; the tables do not tell those of one line apart, whose dies are
#: the same (MI325X has faster memory, MI350X lower clocks). The first is meant where nobody says which.
CHIPS = {
    ("gfx942", 304): ("mi300x", "mi325x"),
    ("gfx942", 80): ("mi308x",),
    ("gfx950", 256): ("mi355x", "mi350x"),
}
#: Architecture of rows that name none, by compute units.
INFERRED = {304: "gfx942", 80: "gfx942", 256: "gfx950"}
#: Reported and recomputed TFLOP/s may differ by this share (a shared expert is counted or not) or by their rounding.
AGREEMENT, ROUNDING = 0.15, 0.006

SOURCE = "ROCm/aiter @e404860 tuned tables"
SOFTWARE = "aiter e404860"


def read_aiter(path: Path, device: str | None = None) -> Tables:
    """Tables 'gemm' and 'batched_gemm', or 'moe', of a tuned table; of several tuned rows of one shape, the fastest.

    device   rows of chips that may be this one, under its name; None: all, under the first name of CHIPS

    Raises MeasurementError where the columns are not aiter's.
    """
    raw = read_csv(path)
    left_out: Counter[str] = Counter()
    if set(raw.columns) >= MOE_COLUMNS:
        raw = _chips(raw, device, left_out)
        return Tables({"moe": _moe(raw, path, left_out)}, left_out)
    require_columns(raw, GEMM_COLUMNS, path, "aiter's tuned tables (GEMM or fused MoE)")
    raw = _chips(raw, device, left_out)
    if "suspect" in raw:
        raw = keep(raw, raw["suspect"].isna(), "marked suspect by the source", left_out)
    frame = pd.DataFrame({"dtype": _gemm_formats(raw), "groups": raw["batch"].fillna(1), "m": raw["m"], "n": raw["n"],
                          "k": raw["k"], "kernel": raw["lib"].fillna("not named")})  # fmt: skip
    frame = keep(_common(frame, raw, raw["us"]), frame["dtype"].notna(), "format of the weights not told", left_out)
    tables = {}
    for family, rows in (("gemm", frame[frame["groups"] == 1]), ("batched_gemm", frame[frame["groups"] != 1])):
        tables[family] = tidied(rows, family, path, left_out, best=(*FAMILIES[family].shape, "dtype", "device"))
    return Tables(tables, left_out)


def _chips(raw: pd.DataFrame, device: str | None, left_out: Counter[str]) -> pd.DataFrame:
    """Rows with a column `device`; those of other or unknown chips are left out."""
    if device is not None and not any(device in names for names in CHIPS.values()):
        known = ", ".join(name for names in CHIPS.values() for name in names)
        raise MeasurementError(f"device {device!r}: aiter's tables are of {known}; choose one of these")
    units = pd.to_numeric(raw["cu_num"], errors="coerce").fillna(0).astype(int)
    architecture = raw["gfx"].where(raw["gfx"].notna(), units.map(INFERRED))
    names = pd.Series(list(zip(architecture, units, strict=True)), index=raw.index).map(CHIPS)
    raw = keep(raw, names.notna(), "chip not told or unknown", left_out)
    names = names[names.notna()]
    if device is None:
        return raw.assign(device=names.str[0])
    wanted = names.map(lambda several: device in several).astype(bool)
    return keep(raw, wanted, f"not of {device}", left_out).assign(device=device)


def _gemm_formats(raw: pd.DataFrame) -> pd.Series:
    """Format of the weights: told by a column, or by the name of the tuned configuration.

    a8w8 is 8-bit floats or integers, told apart by the column only; blockscale has a scale per 128 x 128 weights, or
    per 32 for the 4-bit floats, whose products are 4-bit as those of 'fp4' are.
    """
    config, column = raw["config"].astype(str), raw["q_dtype_w"].astype(str)
    sixteen = raw["dtype"].astype(str).str.contains("bfloat16") | config.str.contains("bf16_tuned_batched")
    told = [
        (config.str.contains("a4w4"), "fp4"),
        (config.str.contains("a8w8_blockscale"), "fp8_block"),
        (column.str.contains("float8"), "fp8"),
        (column.str.contains("int8"), "int8"),
        (sixteen & raw["q_dtype_w"].isna(), "bf16"),
    ]
    formats = np.select([mask for mask, _ in told], [name for _, name in told], default="")
    return pd.Series(formats, index=raw.index).replace("", np.nan)


#: Weight format by what activations and weights are kept in and how they are scaled (None: however).
MOE_FORMATS = {
    ("bfloat16", "bfloat16", None): "bf16",
    ("float8", "float8", "per_1x128"): "fp8_block",
    ("float8", "float8", "per_128x128"): "fp8_block",
    ("float8", "float8", "per_Token"): "fp8",
    ("float8", "float8", "per_Tensor"): "fp8",
    ("int8", "int8", None): "int8",
    ("bfloat16", "int4", None): "int4",
    ("float8", "int4", None): "int4_fp8",
    ("bfloat16", "float4", "per_1x32"): "mxfp4",
    ("float8", "float4", "per_1x32"): "mxfp4_fp8",
    ("float4", "float4", "per_1x32"): "fp4",
}


def _moe(raw: pd.DataFrame, path: Path, left_out: Counter[str]) -> pd.DataFrame:
    """Expert blocks as one rank runs them: inter_dim and experts are its share already, so tp and ep are 1."""
    activations, weights = (
        raw[column].astype(str).str.extract(r"(bfloat16|float8|float4|int8|int4)", expand=False)
        for column in ("q_dtype_a", "q_dtype_w")
    )
    scaled = raw["q_type"].astype(str).str.replace("QuantType.", "", regex=False)
    formats = [
        MOE_FORMATS.get((a, w, q), MOE_FORMATS.get((a, w, None)))
        for a, w, q in zip(activations, weights, scaled, strict=True)
    ]
    frame = pd.DataFrame(
        {
            "dtype": pd.Series(formats, index=raw.index, dtype=object),
            "tokens": raw["tokens"],
            "hidden": raw["model_dim"],
            "intermediate": raw["inter_dim"],
            "experts": raw["experts"],
            "top_k": raw["topk"],
            "tp": 1,
            "ep": 1,
            "gated": raw["use_g1u1"],
            "distribution": "balanced",
            "kernel": "fused_moe",
        }
    )
    frame = _common(frame, raw, raw["us_total"])
    if "tflops" in raw:
        # Rows copied from another shape carry its TFLOP/s along.
        matrices = 2 + frame["gated"]
        flops = 2.0 * matrices * frame["tokens"] * frame["top_k"] * frame["hidden"] * frame["intermediate"]
        computed = flops / frame["seconds"].where(frame["seconds"] > 0) / 1e12
        agree = (computed - raw["tflops"]).abs() <= AGREEMENT * computed + ROUNDING
        frame = keep(
            frame, agree | raw["tflops"].isna(), "reported TFLOP/s do not follow from shape and time", left_out
        )
    frame = keep(frame, frame["dtype"].notna(), "format of the weights has no name here", left_out)
    frame = keep(frame, frame["top_k"] > 0, "experts per token not told", left_out)
    return tidied(frame, "moe", path, left_out, best=(*FAMILIES["moe"].shape, "dtype", "device"))


def _common(frame: pd.DataFrame, raw: pd.DataFrame, microseconds: pd.Series) -> pd.DataFrame:
    return frame.assign(
        device=raw["device"],
        software=SOFTWARE,
        seconds=pd.to_numeric(microseconds, errors="coerce") * 1e-6,
        spread=np.nan,
        source=SOURCE,
    )
