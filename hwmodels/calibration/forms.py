"""Which coefficients does an operator family have, between which limits, and what do they predict for its rows?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import pandas as pd

from hwmodels import kernelforms
from hwmodels.efficiency import CALIBRATED
from hwmodels.hardware import Device
from hwmodels.kernels.expert_routing import exponent_of, load
from hwmodels.mapping import DTYPE_BYTES, WEIGHT_FORMATS
from hwmodels.operators import Array, attended_pairs

#: Latent attention (DeepSeek-V2, arXiv:2405.04434): widths of queries and values of a head in prefill; in decode of
#: the latent with its rotary part, and without.
MLA_QK, MLA_VALUE, MLA_CACHED, MLA_LATENT = 192, 128, 576, 512

#: Seconds of every row, given the coefficients.
Predict = Callable[[Any], Array]


@dataclass(frozen=True, slots=True)
class Form:
    """The equation of one operator family, ready to be fitted.

    shape     columns that say which shape a row is of: half of the shapes are kept from the fit
    predict   of the rows of one format on a device: their seconds as a function of the coefficients
    read      bytes every launch has to read, at least, in rows of one format
    """

    family: str
    shape: tuple[str, ...]
    predict: Callable[[pd.DataFrame, str, Device], Predict]
    read: Callable[[pd.DataFrame, str], Array]

    @property
    def kind(self) -> type:
        """Of the coefficients."""
        return CALIBRATED[self.family]

    def formats(self, rows: pd.DataFrame) -> pd.Series:
        """The key of each row's coefficients: weights' format, or 'arithmetic/cache', windows apart."""
        dtype = rows["dtype"].replace({"fp16": "bf16"})
        if self.family in {"gemm", "moe"}:
            return dtype
        formats = dtype + "/" + rows["kv_dtype"].replace({"fp16": "bf16"})
        return formats if "window" not in rows else formats.where(rows["window"] == 0, formats + "/window")

    def limits(self, formats: str, device: Device) -> dict[str, tuple[float, float, float]]:
        """(start, least, most) by coefficient that such rows have anything to say of."""
        found = _limits(device)
        if self.family != "gemm" or DTYPE_BYTES[arithmetic_of(formats)] >= 2:
            del found["cast_mbu"]
        return {part.name: found[part.name] for part in fields(self.kind) if part.name in found}


def _limits(device: Device) -> dict[str, tuple[float, float, float]]:
    """Wide enough for every device that was met; fractions of peaks end at 1, starts begin with a bare launch."""
    launch = device.kernel_launch_s
    sixteen = peak_of("bf16", device)
    rate = sixteen / device.compute_units
    return {
        "start_s": (2 * launch, launch, 100 * launch),
        "mfu": (0.7, 0.01, 1.0),
        "mbu": (0.8, 0.05, 1.0),
        "feed_bytes_per_s": (rate / 32, rate / 2000, rate / 2),
        "wave_s": (0.2 * launch, 1e-4 * launch, 20 * launch),
        "split_s": (1.5 * launch, 0.02 * launch, 200 * launch),
        "cast_mbu": (0.7, 0.02, 5.0),
        "softmax_per_s": (sixteen / 200, sixteen / 20000, sixteen / 2),
        "masked_tokens": (64.0, 0.1, 2000.0),
        "block_s": (0.2 * launch, 1e-4 * launch, 20 * launch),
        "head_s": (launch, 1e-3 * launch, 20 * launch),
        "chain_s": (0.3 * launch, 1e-4 * launch, 20 * launch),
        "padding_rows": (32.0, 0.1, 500.0),
        "activation_mbu": (0.7, 0.01, 5.0),
        "route_s": (1e-3 * launch, 1e-6 * launch, launch),
    }


def peak_of(dtype: str, device: Device) -> float:
    """Peak FLOP/s of a format, of a 16-bit one (else of the fastest) where the device has none of it."""
    peaks = device.peak_flops_per_s
    for name in (dtype, "bf16", "fp16"):
        if name in peaks:
            return peaks[name]
    return max(peaks.values())


def arithmetic_of(weights: str) -> str:
    """The format products with such weights are computed in."""
    return WEIGHT_FORMATS[weights][1] or "bf16"


def _columns(rows: pd.DataFrame, *names: str) -> list[Array]:
    return [rows[name].to_numpy(float) for name in names]


def _gemm(rows: pd.DataFrame, dtype: str, device: Device) -> Predict:
    m, n, k = _columns(rows, "m", "n", "k")
    arithmetic = arithmetic_of(dtype)
    peak, width, weights = peak_of(arithmetic, device), DTYPE_BYTES[arithmetic], WEIGHT_FORMATS[dtype][0]
    return lambda c: kernelforms.gemm_time_s(c, m, n, k, 1.0, device, peak, width, weights, max(2.0, width))


def _gemm_read(rows: pd.DataFrame, dtype: str) -> Array:
    n, k = _columns(rows, "n", "k")
    return n * k * WEIGHT_FORMATS[dtype][0]


def _heads(rows: pd.DataFrame) -> tuple[Array, Array, Array, Array]:
    """(heads, KV heads, width of a head, window with 0 for none), also of latent attention in prefill."""
    heads = rows["heads"].to_numpy(float)
    if "head_dim" not in rows:
        return heads, heads, np.full(len(rows), MLA_QK), np.zeros(len(rows))
    kv_heads, width, window = _columns(rows, "kv_heads", "head_dim", "window")
    return heads, kv_heads, width, window


def _prefill(rows: pd.DataFrame, formats: str, device: Device) -> Predict:
    dtype, kv = formats.split("/")[:2]
    batch, new, before = _columns(rows, "batch", "new", "before")
    heads, kv_heads, qk, window = _heads(rows)
    value = qk if "head_dim" in rows else np.full(len(rows), MLA_VALUE)
    held = np.where(window > 0, np.minimum(before, window), before)
    pairs = attended_pairs(new, before, None)
    inside = np.flatnonzero(window)
    for size in np.unique(window[inside]):
        at = inside[window[inside] == size]
        pairs[at] = attended_pairs(new[at], before[at], int(size))
    peak = peak_of(dtype, device)
    return lambda c: kernelforms.prefill_time_s(
        c, batch, new, held, pairs, heads, kv_heads, qk, value, device, peak, DTYPE_BYTES[kv]
    )


def _decode(rows: pd.DataFrame, formats: str, device: Device) -> Predict:
    dtype, kv = formats.split("/")[:2]
    batch, context = _columns(rows, "batch", "context")
    peak, kv_bytes = peak_of(dtype, device), DTYPE_BYTES[kv]
    heads, kv_heads, qk, window = _heads(rows)
    if "head_dim" not in rows:
        return lambda c: kernelforms.decode_time_s(
            c, batch, context, heads, 1.0, MLA_CACHED, MLA_LATENT, MLA_CACHED, device, peak, kv_bytes
        )
    seen = np.where(window > 0, np.minimum(context, window), context)
    return lambda c: kernelforms.decode_time_s(c, batch, seen, heads, kv_heads, qk, qk, 2 * qk, device, peak, kv_bytes)


def _decode_read(rows: pd.DataFrame, formats: str) -> Array:
    batch, context = _columns(rows, "batch", "context")
    _, kv_heads, qk, window = _heads(rows)
    seen = np.where(window > 0, np.minimum(context, window), context)
    cached = 2 * kv_heads * qk if "head_dim" in rows else np.full(len(rows), float(MLA_CACHED))
    read: Array = batch * seen * cached * DTYPE_BYTES[formats.split("/")[1]]
    return read


def routed(rows: pd.DataFrame) -> tuple[Array, Array]:
    """Routed rows and touched experts of the rank that was timed."""
    here, touched = np.zeros(len(rows)), np.zeros(len(rows))
    tokens = rows["tokens"].to_numpy(float)
    for key, at in rows.groupby(["experts", "top_k", "ep", "distribution"], sort=False).indices.items():
        experts, top_k, ep, distribution = cast("tuple[int, int, int, str]", key)
        found = load(tokens[at], int(experts), int(top_k), int(ep), exponent_of(distribution))
        here[at], touched[at] = found.rows, found.touched
    return here, touched


def _moe(rows: pd.DataFrame, dtype: str, device: Device) -> Predict:
    here, touched = routed(rows)
    hidden, intermediate, experts, tp, ep, gated = _columns(
        rows, "hidden", "intermediate", "experts", "tp", "ep", "gated"
    )
    width, peak = np.ceil(intermediate / tp), peak_of(arithmetic_of(dtype), device)
    return lambda c: kernelforms.experts_time_s(
        c, here, touched, experts / ep, hidden, width, 2 + gated, device, peak, WEIGHT_FORMATS[dtype][0]
    )


def _nothing(rows: pd.DataFrame, formats: str) -> Array:
    """Where a kernel's inputs may be what the kernel before it left in the cache, also in a step."""
    return np.zeros(len(rows))


HEADS = ("heads", "kv_heads", "head_dim", "window")
FORMS: dict[str, Form] = {
    form.family: form
    for form in (
        Form("gemm", ("n", "k"), _gemm, _gemm_read),
        Form("attention_prefill", HEADS, _prefill, _nothing),
        Form("attention_decode", HEADS, _decode, _decode_read),
        Form("mla_prefill", ("heads",), _prefill, _nothing),
        Form("mla_decode", ("heads",), _decode, _decode_read),
        Form("moe", ("hidden", "intermediate", "experts", "top_k"), _moe, _nothing),
    )
}
