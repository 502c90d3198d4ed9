"""Which timings of expert blocks say what such a block takes in an engine at work?

Some of the wheel's do not, and they show it themselves:

untuned        quantised experts that take longer than 16-bit ones wherever reading weights takes the time. Of 110
               kernels on nine devices 106 take 0.3 to 0.9 times as long as 16-bit ones and four 2.2 to 3.1 times:
               vLLM 0.24's FlashInfer CUTLASS with fp8 experts on H100 and H200, which reaches 0.16 and 0.12 of the
               bandwidth where TensorRT-LLM's timing of the same CUTLASS kernels reaches 0.63 and 0.61 (the timing left
               out FlashInfer's tuning, which vLLM runs when it starts: vllm/model_executor/warmup/kernel_warmup.py),
               and vLLM 0.19's Marlin on H200 and B200
limited        DeepSeek-V3's block where the engine routes for itself (vLLM 0.24, SGLang 0.5.14, TensorRT-LLM's
               min_latency kernels): balanced scores are ties, and routing limited to 4 of 8 groups of experts breaks
               them by number, so that groups 4 to 7 get nothing and half of each token's choices fall on the first
               experts. A rank of ep 2, 4, 8 and 32 is timed with 2.0, 3.0, 5.0 and 17 times its share of the rows (so
               says this rule; the timings say 2.0, 3.1, 5.2 and 18 on every device), and power laws are distorted too
               (1.3, 1.6, 1.9 and 3.4 times theirs)
uncut          all routed rows on the rank that was timed, whatever its share of the experts: SGLang 0.5.10, and
               TensorRT-LLM's Triton kernel on RTX PRO 6000
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.hardware import Device
from hwmodels.mapping import WEIGHT_FORMATS

Mask = NDArray[np.bool_]

WIDE = ("bf16", "fp16")
CASE = ["hidden", "intermediate", "experts", "top_k", "gated"]
#: Seconds that reading the touched experts takes at peak bandwidth from which it decides; time over that of 16-bit
#: experts from which a kernel was not tuned.
READING_S, SLOWER = 5e-5, 1.5
#: Time of a rank over the time of one rank with all experts, under balanced routing: limited routing takes as long
#: with half of the experts at few tokens and at many; an uncut rank takes as long at many.
HALF, QUARTER, UNCUT = 0.9, 0.6, 0.8
#: Tokens from which arithmetic decides.
MANY = 4096


def doubtful(rows: pd.DataFrame, device: Device) -> dict[str, Mask]:
    """Rows of one device (schema of hwmodels.kernels.table, family moe) that tell nothing, by reason; none is in two.

    Where an engine's newest kernel of a format is untuned, all its rows of that format are: those left are of kernels
    that it no longer runs.
    """
    rows = rows.reset_index(drop=True)
    found = {"slower than 16-bit experts": _untuned(rows, device)}
    limited, uncut = _uneven(rows)
    found["called balanced but on half of the experts"] = limited
    found["called one rank but not cut"] = uncut
    seen = np.zeros(len(rows), dtype=bool)
    for reason, mask in found.items():
        found[reason] = mask & ~seen
        seen |= mask
    return {reason: mask for reason, mask in found.items() if mask.any()}


def sound(rows: pd.DataFrame, device: Device) -> pd.DataFrame:
    """The rows without the doubtful ones."""
    keep = np.ones(len(rows), dtype=bool)
    for mask in doubtful(rows, device).values():
        keep &= ~mask
    kept: pd.DataFrame = rows[keep].reset_index(drop=True)
    return kept


def _engines(rows: pd.DataFrame) -> pd.Series:
    return rows["software"].map({name: str(name).split()[0] for name in rows["software"].unique()})


def _untuned(rows: pd.DataFrame, device: Device) -> Mask:
    wide = rows["dtype"].isin(WIDE)
    gone = np.zeros(len(rows), dtype=bool)
    if not wide.any() or wide.all():
        return gone
    engine = _engines(rows)
    key = pd.MultiIndex.from_frame(rows[[*CASE, "tp", "ep", "distribution", "tokens"]].assign(engine=engine))
    best = rows["seconds"][wide].groupby(key[wide]).min()
    ratio = rows["seconds"].to_numpy(float) / best.reindex(key).to_numpy(float)
    ratio[~_reading(rows, device) | wide.to_numpy(bool)] = np.nan
    kernel = rows.groupby(["software", "kernel", "dtype"], sort=False).ngroup().to_numpy()
    for one, median in pd.Series(ratio).groupby(kernel).median().items():
        if median > SLOWER:
            gone |= kernel == one
    # Where the newest kernel of a format goes, older ones of the engine go too.
    for _, i in rows.groupby([engine, rows["dtype"]], sort=False).indices.items():
        names = rows["software"].iloc[i]
        newest = (names == max(names.unique(), key=_version)).to_numpy(bool)
        if gone[i][newest].all():
            gone[i] = True
    return gone


def _version(software: str) -> tuple[int, ...]:
    """Orders 'vllm 0.19.0' before 'vllm 0.24.0'."""
    return tuple(int(number) for number in re.findall(r"\d+", software.split()[-1]))


def _reading(rows: pd.DataFrame, device: Device) -> Mask:
    """Where reading the touched experts takes longer than computing, under balanced routing, and is no trifle."""
    c = {name: rows[name].to_numpy(float) for name in (*CASE, "tp", "ep", "tokens")}
    width = rows["dtype"].map({name: size for name, (size, _) in WEIGHT_FORMATS.items()}).to_numpy(float)
    matrix = (2 + c["gated"]) * c["hidden"] * np.ceil(c["intermediate"] / c["tp"])
    routed = c["tokens"] * c["top_k"] / c["ep"]
    read_s = np.minimum(routed, c["experts"] / c["ep"]) * matrix * width / device.memory_bytes_per_s
    peak = min(device.peak_flops_per_s.get(name, np.inf) for name in WIDE)
    found: Mask = (read_s > READING_S) & (read_s > 2 * routed * matrix / peak)
    return found


def _uneven(rows: pd.DataFrame) -> tuple[Mask, Mask]:
    """(routed by limited groups, not cut): of such a block and kernel all rows with ep > 1, limited also balanced."""
    limited, uncut = (np.zeros(len(rows), dtype=bool) for _ in range(2))
    balanced = rows["distribution"] == "balanced"
    ep = rows["ep"].to_numpy(int)
    for i in _cases(rows):
        part = rows.iloc[i]
        part = part[(balanced.iloc[i] & (part["tp"] == 1)).to_numpy(bool)]
        of_ep = {int(str(n)): one.set_index("tokens")["seconds"] for n, one in part.groupby("ep") if n in (1, 2, 4, 8)}
        if not {1, 2, 4} <= set(of_ep):
            continue
        enough = float(part["experts"].iloc[0] / part["top_k"].iloc[0])
        few = _of_all(of_ep, enough, 4 * enough)
        many = _of_all(of_ep, MANY, np.inf)
        if HALF <= few[2] <= 1 / HALF and many[2] >= HALF and many[4] >= QUARTER:
            limited[i] |= (ep[i] > 1) | balanced.to_numpy(bool)[i]
        elif min(many[4], many.get(8, many[4])) >= UNCUT:
            uncut[i] |= ep[i] > 1
    return limited, uncut


def _cases(rows: pd.DataFrame) -> Iterator[NDArray[np.int64]]:
    """Positions of the rows of one engine, format and block: of each kernel where several were timed side by side.

    Where an engine runs one kernel here and another there (vLLM on H100: Triton's or CUTLASS'), they are one.
    """
    own = rows.groupby(["software", "dtype", *CASE], sort=False).ngroup()
    key = ["tp", "ep", "distribution", "tokens"]
    doubled = rows.assign(own=own).duplicated(["own", *key]).groupby(own).transform("any")
    kernel = rows["kernel"].where(doubled, "")
    code = pd.Series(list(zip(own, kernel, strict=True)), dtype=object).factorize()[0]
    order = np.argsort(code, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(code[order])) + 1)


def _of_all(of_ep: dict[int, pd.Series], least: float, most: float) -> dict[int, float]:
    """Median time of one rank of an ep over that of a rank with all experts, at `least` to `most` tokens; NaN: none."""
    whole = of_ep[1]
    whole = whole[(whole.index >= least) & (whole.index <= most)]
    return {n: float((one.reindex(whole.index) / whole).median()) for n, one in of_ep.items()}
