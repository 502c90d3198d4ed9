"""What does a fused expert block cost at least, and what terms is its time made of?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.hardware import Device
from hwmodels.kernels.curve import fitted
from hwmodels.kernels.expert_routing import load
from hwmodels.kernels.table import TOLERANCE
from hwmodels.mapping import WEIGHT_FORMATS

Array = NDArray[np.float64]

SHAPE = ("hidden", "intermediate", "experts", "top_k", "tp", "ep", "gated")
#: Rows a guide is fitted to.
GUIDE_ROWS = 3000
#: Experts' weights from here on cannot stay in a cache between launches.
CACHED_BYTES = 256e6
#: Terms of the guide, and the least weight of those that no kernel does without: launches, half-filled tiles, tokens.
TERMS, LEAST = 11, {0: 1e-3, 4: 0.05, 6: 0.05}


@dataclass(frozen=True, slots=True)
class Shape:
    """An expert block and how it is cut; names as in hwmodels.kernels.table."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tp: int
    ep: int
    gated: int

    @property
    def matrix(self) -> float:
        """Weights of one expert on one rank."""
        return (2.0 + self.gated) * self.hidden * float(np.ceil(self.intermediate / self.tp))

    @property
    def place(self) -> Array:
        """Coordinates of the distance between shapes."""
        width, here = self.intermediate / self.tp, self.experts / self.ep
        return np.log([self.hidden, width, here, self.top_k, self.tp, self.ep])


def terms(
    dtype: str,
    device: Device,
    tokens: Array,
    rows: Array,
    touched: Array,
    matrix: Array | float,
    hidden: Array | float,
    width: Array | float,
    top_k: Array | float,
    here: Array | float,
    gated: Array | float,
) -> Array:
    """Seconds each resource needs at peak, one column per term of the guide.

    launches; weights of the touched experts; arithmetic; the larger of both; arithmetic of half-filled tiles;
    activations in and out of the products; all tokens read or written once; sorting the routed pairs; experts listed;
    experts started, by number and by depth
    """
    size, arithmetic = WEIGHT_FORMATS[dtype]
    peak, bandwidth = _peak(device, arithmetic), device.memory_bytes_per_s
    read = touched * matrix * size / bandwidth
    multiply = 2 * rows * matrix / peak
    columns = (
        1e-5 + 0 * rows,
        read,
        multiply,
        np.maximum(read, multiply),
        2 * 64 * touched * matrix / peak,
        rows * (2 * hidden + (gated + 2) * width) * 2 / bandwidth,
        tokens * hidden * 2 / bandwidth,
        tokens * top_k * 1e-9,
        here * 1e-8 + 0 * rows,
        touched * 1e-7,
        touched * hidden * 1e-10,
    )
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def fitted_weights(rows: pd.DataFrame, kinds: NDArray[Any], dtypes: NDArray[Any], device: Device) -> Array:
    """Weights of the terms, by non-negative least squares on the relative error, one row per variant."""
    weights = []
    for kind, dtype in enumerate(dtypes):
        mine = np.flatnonzero(kinds == kind)
        part = rows.iloc[mine[:: max(1, len(mine) // GUIDE_ROWS)]]
        column = {c: part[c].to_numpy(float) for c in ("tokens", "hidden", "experts", "top_k", "ep", "gated")}
        width = np.ceil(part["intermediate"].to_numpy(float) / part["tp"].to_numpy(float))
        n, touched = np.zeros(len(part)), np.zeros(len(part))
        routings = part[["experts", "top_k", "ep", "exponent"]].to_numpy(float)
        kinds_of, which = np.unique(routings, axis=0, return_inverse=True)
        for j, (experts, top_k, ep, exponent) in enumerate(kinds_of):
            i = np.flatnonzero(which.ravel() == j)
            found = load(column["tokens"][i], int(experts), int(top_k), int(ep), float(exponent))
            n[i], touched[i] = found.rows, found.touched
        matrix = (2 + column["gated"]) * column["hidden"] * width
        found_terms = terms(
            str(dtype), device, column["tokens"], n, touched, matrix, column["hidden"], width, column["top_k"],
            column["experts"] / column["ep"], column["gated"],
        )  # fmt: skip
        found_weights = fitted(found_terms, part["seconds"].to_numpy(float))
        # The guide grows with the tokens even where the table does not say how.
        for term, least in LEAST.items():
            found_weights[term] = max(found_weights[term], least)
        weights.append(found_weights)
    return np.array(weights).reshape(-1, TERMS)


def _peak(device: Device, arithmetic: str | None) -> float:
    peaks = device.peak_flops_per_s
    wide = peaks.get("bf16", peaks.get("fp16", max(peaks.values())))
    return peaks.get(arithmetic or "bf16", wide)


def least_s(
    dtype: str,
    device: Device,
    tokens: Array,
    experts: Array | float,
    top_k: Array | float,
    ep: Array | float,
    matrix: Array | float,
    balanced: NDArray[np.bool_] | bool,
) -> Array:
    """Seconds below which no kernel can be: arithmetic of the mean rank; with balanced routing its experts' weights."""
    size, arithmetic = WEIGHT_FORMATS[dtype]
    rows = tokens * top_k / ep
    nbytes = np.minimum(rows, experts / ep) * matrix * size
    read = np.where(np.logical_and(balanced, nbytes > CACHED_BYTES), nbytes / device.memory_bytes_per_s, 0.0)
    least: Array = np.maximum(2 * rows * matrix / _peak(device, arithmetic), read) / TOLERANCE
    return least


def floor_s(rows: pd.DataFrame, device: Device) -> Array:
    """least_s of every row of a table that has its routing as a number in the column `exponent`."""
    least = np.zeros(len(rows))
    for dtype, i in rows.groupby("dtype", sort=False).indices.items():
        c = {name: rows[name].to_numpy(float)[i] for name in (*SHAPE, "tokens", "exponent")}
        matrix = (2 + c["gated"]) * c["hidden"] * np.ceil(c["intermediate"] / c["tp"])
        least[i] = least_s(
            str(dtype), device, c["tokens"], c["experts"], c["top_k"], c["ep"], matrix, c["exponent"] < 0
        )
    return least
