"""How long does a collective inside a node take, by interpolation of a measured table?

Every (kind, GPUs, software) is a curve over bytes, guided by a latency and a bandwidth fitted to it. Engines bring an
all-reduce of their own, which is preferred; everything else is NCCL's.

Bytes are counted as hwmodels.collectives does, and so are NCCL's tables that hwmodels.kernels.aiconfigurator reads: at
512 MiB an all-gather moves 385 GB/s on eight H200 and 515 GB/s on two, an all-to-all 595 GB/s on two. Counted as the
gathered result and as all that a rank sends, links of 450 GB/s carry 337, 257 and 298; counted per rank they would have
to carry 2,695, 515 and 595.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hwmodels.hardware import Device
from hwmodels.kernels.curve import fine_grid, fitted, through
from hwmodels.kernels.estimate import Estimate

Array = NDArray[np.float64]

#: Message formats by preference: engines send 16-bit activations.
DTYPES = ("bf16", "fp16")
#: Grid in log2 of bytes, and its steps per doubling.
FIRST, LAST, STEPS = 0, 40, 4
#: A row is pathological where each GPU moves less than this share of what it moves among the fewest GPUs measured.
LEAST_SHARE = 1 / 5
#: Sizes from which that is held against rows; below, latency decides.
LEAST_BYTES = 16384
#: An engine's all-reduce this many times slower than NCCL's is not what the engine runs: it would take NCCL's.
NOT_CHOSEN = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class CollectiveTimes:
    """A table of collectives, ready to price any size.

    kinds, gpus   of every curve; curve i is bytes[starts[i]:starts[i + 1]], seconds likewise
    left_out      rows that were not believed (see LEAST_SHARE, NOT_CHOSEN)
    """

    device: Device
    kinds: NDArray[np.str_]
    gpus: NDArray[np.int64]
    starts: NDArray[np.int64]
    bytes: Array
    seconds: Array
    left_out: int
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(cls, rows: pd.DataFrame, device: Device) -> Self:
        """From the rows of one device inside one node, of an engine, of NCCL, or of both."""
        rows, slow = _preferred(rows)
        good = _believed(rows)
        kept = rows[good].sort_values(["kind", "gpus", "bytes"])
        code = kept.groupby(["kind", "gpus"]).ngroup().to_numpy()
        starts = np.flatnonzero(np.append(True, np.diff(code) > 0)) if len(kept) else np.zeros(0, np.int64)
        first = kept.iloc[starts]
        return cls(
            device=device,
            kinds=first["kind"].to_numpy(str),
            gpus=first["gpus"].to_numpy(np.int64),
            starts=np.append(starts, len(kept)).astype(np.int64),
            bytes=kept["bytes"].to_numpy(float),
            seconds=kept["seconds"].to_numpy(float),
            left_out=slow + int((~good).sum()),
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that from_arrays needs."""
        names = ("kinds", "gpus", "starts", "bytes", "seconds")
        return {**{name: getattr(self, name) for name in names}, "left_out": np.array([self.left_out])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], device: Device) -> Self:
        """The table that arrays() came from."""
        values: dict[str, Any] = {**arrays, "left_out": int(arrays["left_out"][0])}
        return cls(device=device, **values)

    def time_s(self, kind: str, gpus: int, nbytes: ArrayLike) -> Estimate | None:
        """One collective of `nbytes` (as hwmodels.collectives counts them) over `gpus` devices of a node.

        None where the kind was not measured. Groups that were not measured follow the nearest ones.
        """
        key = (kind, gpus)
        if key not in self._memo:
            self._memo[key] = self._priced(kind, gpus)
        if self._memo[key] is None:
            return None
        grid, log_s, known = self._memo[key]
        at = np.log2(np.maximum(np.asarray(nbytes, dtype=np.float64), 1.0))
        seconds = np.exp(np.interp(at, grid, log_s)) * 2.0 ** np.maximum(at - LAST, 0)
        return Estimate(seconds, ((at >= known[0] - 1e-9) & (at <= known[1] + 1e-9)) * known[2])

    def _priced(self, kind: str, gpus: int) -> tuple[Array, Array, tuple[float, float, float]] | None:
        """(log2 of bytes, log seconds, (first and last log2 of measured bytes, 1 where measured))."""
        curves = np.flatnonzero(self.kinds == kind)
        if not len(curves):
            return None
        measured = self.gpus[curves]
        if gpus in measured:
            i = int(curves[measured == gpus][0])
            grid, log_s = self._curve(i)
            knots = np.log2(self.bytes[self.starts[i] : self.starts[i + 1]])
            others = [int(j) for j in curves if self._last(int(j)) > self._last(i)]
            if others:
                nearest = min(others, key=lambda j: abs(np.log(self.gpus[j] / gpus)))
                beyond = self._scaled(nearest, kind, gpus, grid)
                log_s = np.where(grid > knots[-1], np.maximum.accumulate(np.maximum(beyond, log_s[0])), log_s)
                log_s = np.where(grid > knots[-1], np.maximum(log_s, np.interp(knots[-1], grid, log_s)), log_s)
            return grid, log_s, (float(knots[0]), float(knots[-1]), 1.0)
        grid = fine_grid(np.log2(np.unique(self.bytes)), FIRST, LAST, STEPS)
        below, above = curves[measured < gpus], curves[measured > gpus]
        if len(below) and len(above):
            low, high = int(below[np.argmax(self.gpus[below])]), int(above[np.argmin(self.gpus[above])])
            share = np.log(gpus / self.gpus[low]) / np.log(self.gpus[high] / self.gpus[low])
            log_s = (1 - share) * self._scaled(low, kind, gpus, grid) + share * self._scaled(high, kind, gpus, grid)
        else:
            nearest = int(curves[np.argmin(np.abs(np.log(measured / gpus)))])
            log_s = self._scaled(nearest, kind, gpus, grid)
        return grid, np.maximum.accumulate(log_s), (float(grid[0]), float(grid[-1]), 0.0)

    def _last(self, i: int) -> float:
        return float(self.bytes[self.starts[i + 1] - 1])

    def _curve(self, i: int) -> tuple[Array, Array]:
        """(log2 of bytes, log seconds) of one curve, fine enough to be linear in between."""
        if i not in self._memo:
            line = self._line(i)
            part = slice(self.starts[i], self.starts[i + 1])
            knots = np.log2(self.bytes[part])
            grid = fine_grid(knots, FIRST, LAST, STEPS)
            log_s = through(grid, knots, np.log(self.seconds[part]), lambda x: np.log(line[0] + line[1] * 2.0**x))
            self._memo[i] = grid, log_s
        found: tuple[Array, Array] = self._memo[i]
        return found

    def _line(self, i: int) -> Array:
        """(latency, seconds per byte) of one curve."""
        part = slice(self.starts[i], self.starts[i + 1])
        size, seconds = self.bytes[part], self.seconds[part]
        found = fitted(np.stack([np.full(len(size), 1e-6), size * 1e-12], axis=1), seconds)
        return np.maximum(found * (1e-6, 1e-12), (1e-7, 1e-15))

    def _scaled(self, i: int, kind: str, gpus: int, grid: Array) -> Array:
        """Log seconds for another number of GPUs: latency by the steps of a tree, bytes by what each has to send."""
        at, log_s = self._curve(i)
        line, theirs = self._line(i), int(self.gpus[i])
        steps = np.log2(gpus) / np.log2(theirs)
        sent = _sent(kind, gpus) / _sent(kind, theirs)
        size = line[1] * 2.0**grid
        scaled: Array = np.interp(grid, at, log_s) + np.log((line[0] * steps + size * sent) / (line[0] + size))
        return scaled


def _sent(kind: Any, gpus: Any) -> Any:
    """Bytes each GPU has to send, over the bytes of the collective."""
    return (gpus - 1) / gpus * np.where(kind == "all-reduce", 2.0, 1.0)


def _preferred(rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """One row per (kind, gpus, bytes), and how many rows of an engine were left out for NCCL's.

    16 bit where there are such rows; for all-reduce the engine's own unless NOT_CHOSEN, for the rest NCCL's.
    """
    rows = rows[rows["nodes"] == 1].reset_index(drop=True)
    order = {name: i for i, name in enumerate(DTYPES)}
    rank = rows["dtype"].map(lambda name: order.get(name, len(DTYPES))).astype(int)
    wide = (rank < len(DTYPES)).groupby([rows["kind"], rows["gpus"]]).transform("any")
    nccl = rows["software"].str.startswith("nccl") | rows["kernel"].str.upper().str.startswith("NCCL")
    rows = rows.assign(rank=rank, nccl=nccl, reduces=rows["kind"] == "all-reduce")[(rank < len(DTYPES)) | ~wide]
    slow = np.zeros(len(rows), bool)
    for _, i in rows.groupby(["kind", "gpus"], sort=False).indices.items():
        part = rows.iloc[i]
        other = part[part["nccl"]].groupby("bytes")["seconds"].min()
        if len(other):
            size, known = part["bytes"].to_numpy(float), other.index.to_numpy(float)
            nccl_s = np.exp(np.interp(np.log(size), np.log(known), np.log(other.to_numpy(float))))
            nccl_s *= np.maximum(size / known[-1], 1)
            slow[i] = (part["seconds"].to_numpy(float) > NOT_CHOSEN * nccl_s) & ~part["nccl"].to_numpy(bool)
    rows = rows[~slow].assign(foreign=rows["nccl"] == rows["reduces"])
    chosen = rows.sort_values(["foreign", "rank", "seconds"]).drop_duplicates(["kind", "gpus", "bytes"])
    return chosen, int(slow.sum())


def _believed(rows: pd.DataFrame) -> NDArray[np.bool_]:
    """Which rows move at least LEAST_SHARE of what the fewest GPUs move, per GPU, at the same size."""
    moved = rows["bytes"] / rows["seconds"] * _sent(rows["kind"].to_numpy(), rows["gpus"].to_numpy(float))
    fewest = rows.groupby(["kind", "bytes"])["gpus"].transform("min") == rows["gpus"]
    best = moved.where(fewest).groupby([rows["kind"], rows["bytes"]]).transform("max")
    good: NDArray[np.bool_] = ((moved >= LEAST_SHARE * best) | (rows["bytes"] < LEAST_BYTES)).to_numpy(bool)
    return good
