"""How long do expert-parallel ranks take to exchange tokens, by interpolation of a measured table?

Every (kernel, phase, group, shape) is a curve over tokens per rank, guided by a latency and by what is moved. Kernels
come in two kinds, those for few tokens ('low-latency': a message per routed pair) and those for many ('normal': a
token goes to each rank once); an engine takes the faster of those that were measured at a size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hwmodels.errors import MeasurementError
from hwmodels.hardware import Device
from hwmodels.kernels.curve import fine_grid, fitted, through
from hwmodels.kernels.estimate import Estimate

Array = NDArray[np.float64]
Mode = Literal["best", "low-latency", "normal"]

SHAPE = ("gpus", "nodes", "hidden", "experts", "top_k")
#: Parts of a kernel's name that say it is for few tokens (DeepEP's low-latency kernels, and its second generation's).
LOW_LATENCY = ("_ll", "generation", "low_latency")
#: Grid in log2 of tokens, and its steps per doubling.
LAST, STEPS = 24, 4
#: Measured shapes an unmeasured one borrows from, and up to which log distance it counts as measured.
NEIGHBOURS, NEAR_SHAPE = 3, 0.75
#: Weight of each log ratio in the distance between shapes: gpus, nodes, hidden, experts, top_k. Within a node or beyond
#: it are different links.
DISTANCE = np.array([2.0, 3.0, 1.0, 0.25, 1.0])


@dataclass(frozen=True, slots=True, eq=False)
class ExchangeTimes:
    """A table of expert exchanges, ready to price any shape.

    groups     (kernel, kind) as text, one row per guide and group size; weights: of the guide's terms
    shapes     one row per curve, columns as SHAPE; group: its guide
    starts     curve i is tokens[starts[i]:starts[i + 1]], seconds likewise
    """

    device: Device
    groups: NDArray[np.str_]
    weights: Array
    shapes: NDArray[np.int64]
    group: NDArray[np.int64]
    starts: NDArray[np.int64]
    tokens: Array
    seconds: Array
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(cls, rows: pd.DataFrame, device: Device) -> Self:
        """From the rows of one device; kernels that differ in their number of SMs stay apart."""
        key = ["kernel", "kind", *SHAPE]
        rows = rows.groupby([*key, "tokens"])["seconds"].min().reset_index()  # sorted
        code = rows.groupby(key).ngroup().to_numpy()
        starts = np.flatnonzero(np.append(True, np.diff(code) > 0)) if len(rows) else np.zeros(0, np.int64)
        first = rows.iloc[starts]
        guide = first.groupby(["kernel", "kind", "gpus", "nodes"]).ngroup().to_numpy()
        ends = np.append(starts, len(rows))
        of_row = np.repeat(guide, np.diff(ends))
        weights = []
        for g in range(guide.max() + 1 if len(guide) else 0):
            part = rows[of_row == g]
            column = {c: part[c].to_numpy(float) for c in ("tokens", "gpus", "hidden", "top_k")}
            low = _low_latency(str(part["kernel"].iloc[0]))
            found = fitted(_terms(low, **column), part["seconds"].to_numpy(float))
            weights.append(np.maximum(found, (0.1, 0.0, 1e-3)))
        names = first.assign(g=guide).drop_duplicates("g").sort_values("g")[["kernel", "kind"]]
        return cls(
            device=device,
            groups=names.to_numpy(str),
            weights=np.array(weights).reshape(-1, 3),
            shapes=first[list(SHAPE)].to_numpy(np.int64),
            group=guide.astype(np.int64),
            starts=ends.astype(np.int64),
            tokens=rows["tokens"].to_numpy(float),
            seconds=rows["seconds"].to_numpy(float),
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that from_arrays needs."""
        names = ("groups", "weights", "shapes", "group", "starts", "tokens", "seconds")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], device: Device) -> Self:
        """The table that arrays() came from."""
        values: dict[str, Any] = {**arrays}
        return cls(device=device, **values)

    def time_s(
        self,
        kind: str,
        gpus: int,
        nodes: int,
        tokens: ArrayLike,
        hidden: int,
        experts: int,
        top_k: int,
        mode: Mode = "best",
    ) -> Estimate | None:
        """One exchange of `tokens` per rank over `gpus` in `nodes`; None where no kernel of that mode was measured.

        kind   'dispatch' or 'combine'

        Raises MeasurementError for another mode.
        """
        key = (kind, gpus, nodes, hidden, experts, top_k, mode)
        if key not in self._memo:
            self._memo[key] = self._priced(kind, np.array([gpus, nodes, hidden, experts, top_k]), mode)
        curves = self._memo[key]
        if not curves:
            return None
        at = np.log2(np.maximum(np.asarray(tokens, dtype=np.float64), 1.0))
        logs = np.stack([np.interp(at, grid, log_s) for grid, log_s, _ in curves])
        inside = np.stack([(at >= known[0] - 1e-9) & (at <= known[1] + 1e-9) for *_, known in curves])
        usable = inside | ~inside.any(axis=0)
        fastest = np.where(usable, logs, np.inf).argmin(axis=0)[None]
        seconds = np.exp(np.take_along_axis(logs, fastest, 0)[0]) * 2.0 ** np.maximum(at - LAST, 0)
        trust = np.array([known[2] for *_, known in curves])[fastest[0]]
        return Estimate(seconds, np.take_along_axis(inside, fastest, 0)[0] * trust)

    def _priced(self, kind: str, shape: NDArray[np.int64], mode: str) -> list[tuple[Array, Array, Array]]:
        """Per kernel: (log2 of tokens, log seconds, (first and last log2 of measured tokens, 1 where measured))."""
        if mode not in ("best", "low-latency", "normal"):
            raise MeasurementError(f"mode {mode!r}: expected 'best', 'low-latency' or 'normal'")
        if not len(self.groups):
            return []
        kernels, kinds = self.groups[self.group, 0], self.groups[self.group, 1]
        names = [
            name
            for name in np.unique(kernels[kinds == kind])
            if mode == "best" or _low_latency(str(name)) == (mode == "low-latency")
        ]
        by_kernel = {str(name): np.flatnonzero((kernels == name) & (kinds == kind)) for name in names}
        own = {name: i[(self.shapes[i] == shape).all(axis=1)] for name, i in by_kernel.items()}
        if any(len(i) for i in own.values()):
            return [(*self._curve(int(i[0])), self._ends(i[:1], 1.0)) for i in own.values() if len(i)]
        away = {name: _distance(self.shapes[i], shape) for name, i in by_kernel.items()}
        # Of the kernels, those measured closest: another group size says less than another width of the tokens.
        least = min((float(a.min()) for a in away.values()), default=0.0)
        return [
            self._borrowed(by_kernel[name], a, shape)
            for name, a in away.items()
            if float(a.min()) <= least + NEAR_SHAPE
        ]

    def _ends(self, curves: NDArray[np.int64], trust: float) -> Array:
        first, last = self.tokens[self.starts[curves]].min(), self.tokens[self.starts[curves + 1] - 1].max()
        return np.array([np.log2(first), np.log2(last), trust])

    def _borrowed(self, curves: NDArray[np.int64], away: Array, shape: NDArray[np.int64]) -> tuple[Array, Array, Array]:
        """The nearest curves, each scaled by its guide, weighted by nearness."""
        order = np.argsort(away, kind="stable")[:NEIGHBOURS]
        order = order[away[order] <= away[order[0]] + NEAR_SHAPE]
        share = 1 / (away[order] + 0.05) ** 2
        grid = np.arange(LAST * STEPS + 1) / STEPS
        log_s = np.zeros_like(grid)
        for i, part in zip(curves[order], share / share.sum(), strict=True):
            at, theirs = self._curve(int(i))
            ratio = self._log_guide(int(i), shape, grid) - self._log_guide(int(i), self.shapes[i], grid)
            log_s += part * (np.interp(grid, at, theirs) + ratio)
        alike = bool((self.shapes[curves[order[0]], :2] == shape[:2]).all()) and away[order[0]] <= NEAR_SHAPE
        return grid, np.maximum.accumulate(log_s), self._ends(curves[order], float(alike))

    def _curve(self, i: int) -> tuple[Array, Array]:
        """(log2 of tokens, log seconds) of one curve, fine enough to be linear in between."""
        if i not in self._memo:
            part = slice(self.starts[i], self.starts[i + 1])
            knots = np.log2(self.tokens[part])
            grid = fine_grid(knots, 0, LAST, STEPS)
            shape = self.shapes[i]
            log_s = through(grid, knots, np.log(self.seconds[part]), lambda x: self._log_guide(i, shape, x))
            self._memo[i] = grid, log_s
        found: tuple[Array, Array] = self._memo[i]
        return found

    def _log_guide(self, i: int, shape: NDArray[np.int64], grid: Array) -> Array:
        """The guide of curve i's kernel for another shape."""
        group = int(self.group[i])
        gpus, _, hidden, _, top_k = (float(v) for v in shape)
        terms = _terms(_low_latency(str(self.groups[group, 0])), 2.0**grid, gpus, hidden, top_k)
        guide: Array = np.log(terms @ self.weights[group])
        return guide


def _low_latency(kernel: str) -> bool:
    return any(part in kernel for part in LOW_LATENCY)


def _distance(shapes: NDArray[np.int64], shape: NDArray[np.int64]) -> Array:
    away: Array = np.sqrt(((np.log(shapes / shape) * DISTANCE) ** 2).sum(axis=1))
    return away


def _terms(low_latency: bool, tokens: Array, gpus: Any, hidden: Any, top_k: Any) -> Array:
    """A latency, handling each token, and numbers moved, one column each.

    Low-latency kernels send a token once per expert it goes to; normal ones once per rank, of which top_k independent
    picks hit gpus * (1 - (1 - 1 / gpus)^top_k), and read it once.
    """
    copies = top_k + 0.5 if low_latency else 1 + gpus * -np.expm1(top_k * np.log1p(-np.minimum(1 / gpus, 0.999)))
    return np.stack(np.broadcast_arrays(1e-6 + 0 * tokens, tokens * 1e-9, tokens * hidden * copies * 1e-12), axis=-1)
