"""How long does a fused expert block take, by interpolation of a measured table?

Every measured (kernel, shape, parallel degrees, routing) is a curve over tokens. A guide, a roofline of a few terms
whose weights are fitted per kernel, gives the way between and beyond the measured points; the table gives the level.
Shapes that were not measured borrow the levels of the nearest ones at equal tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hwmodels.hardware import Device
from hwmodels.kernels.curve import fine_grid, through
from hwmodels.kernels.estimate import Estimate
from hwmodels.kernels.expert_routing import exponent_of, load
from hwmodels.kernels.moe_guide import SHAPE, Shape, fitted_weights, floor_s, least_s, terms

Array = NDArray[np.float64]

VARIANT = ("dtype", "kernel", "software", "gated")
#: Formats whose kernels stand in for each other where one was not measured.
NEAR = {"fp8": "fp8_block", "fp8_block": "fp8", "mxfp4": "int4", "int4": "mxfp4"}
#: Grid of a priced shape: steps per doubling of the tokens, and the last doubling.
STEPS, DOUBLINGS = 8, 22
#: Measured shapes an unmeasured one borrows from.
NEIGHBOURS = 4
#: Log distance up to which a borrowed shape counts as measured: half or double in one of its sizes.
NEAR_SHAPE = 0.75
#: Weight of each log ratio in the distance between shapes: hidden, width per rank, experts per rank, top_k, tp, ep.
DISTANCE = np.array([1.0, 0.5, 0.3, 1.0, 0.3, 0.5])
#: Squared distance between different expert blocks: a measured cut of the same block is always nearer.
OTHER_BLOCK = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class MoeTimes:
    """A table of expert blocks, ready to price any shape.

    variants      (dtype, kernel, software, gated) as text, one row per guide; weights: of the guide's terms
    shapes        one row per curve, columns as SHAPE; exponents: its routing; variant: its guide
    starts        curve i is tokens[starts[i]:starts[i + 1]], seconds likewise
    left_out      rows that claim more than the device's peaks if balanced routing reads every expert that it touches;
                  routing within groups of experts does not (DeepSeek-V3's block on H200, vLLM 0.24: 1.38 ms for 48
                  tokens, where reading 256 experts takes 2.3)
    """

    device: Device
    variants: NDArray[np.str_]
    weights: Array
    shapes: NDArray[np.int64]
    exponents: Array
    variant: NDArray[np.int64]
    starts: NDArray[np.int64]
    tokens: Array
    seconds: Array
    left_out: int
    _places: list[Array] = field(default_factory=list, repr=False)
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(cls, rows: pd.DataFrame, device: Device) -> Self:
        """From the rows of one device; several kernels of a shape are kept, the fastest at each size counts."""
        rows = rows.reset_index(drop=True)
        exponent = rows["distribution"].map({name: exponent_of(name) for name in rows["distribution"].unique()})
        rows = rows.assign(exponent=exponent.astype(float))
        possible = rows["seconds"].to_numpy(float) >= floor_s(rows, device)
        left_out = int(len(rows) - possible.sum())
        rows = rows[possible]
        code = rows.groupby([*SHAPE, "exponent", *VARIANT[:3]], sort=False).ngroup().to_numpy()
        order = np.lexsort((rows["tokens"].to_numpy(), code))
        rows, code = rows.iloc[order], code[order]
        starts = np.flatnonzero(np.append(True, np.diff(code) > 0)) if len(rows) else np.zeros(0, np.int64)
        first = rows.iloc[starts]
        kinds = first.groupby(list(VARIANT), sort=True).ngroup().to_numpy()
        names = first[list(VARIANT)].astype(str).drop_duplicates().sort_values(list(VARIANT)).to_numpy(str)
        sizes = np.diff(np.append(starts, len(rows)))
        return cls(
            device=device,
            variants=names.reshape(-1, len(VARIANT)),
            weights=fitted_weights(rows, np.repeat(kinds, sizes), names[:, 0] if len(names) else names, device),
            shapes=first[list(SHAPE)].to_numpy(np.int64),
            exponents=first["exponent"].to_numpy(float),
            variant=kinds.astype(np.int64),
            starts=np.append(starts, len(rows)).astype(np.int64),
            tokens=rows["tokens"].to_numpy(float),
            seconds=rows["seconds"].to_numpy(float),
            left_out=left_out,
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that from_arrays needs."""
        names = ("variants", "weights", "shapes", "exponents", "variant", "starts", "tokens", "seconds")
        return {**{name: getattr(self, name) for name in names}, "left_out": np.array([self.left_out])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], device: Device) -> Self:
        """The table that arrays() came from."""
        values: dict[str, Any] = {**arrays, "left_out": int(arrays["left_out"][0])}
        return cls(device=device, **values)

    def time_s(
        self,
        dtype: str,
        tokens: ArrayLike,
        hidden: int,
        intermediate: int,
        experts: int,
        top_k: int,
        tp: int,
        ep: int,
        gated: bool = True,
        distribution: str | float = "balanced",
    ) -> Estimate | None:
        """One launch on the rank that is timed; None where neither the format nor a near one was measured.

        tokens         of all ranks that share the experts, at least 1
        distribution   'balanced', 'uniform', 'recorded', or a power law by name or exponent (see expert_routing)
        """
        shape = Shape(hidden, intermediate, experts, top_k, tp, ep, int(gated))
        exponent = exponent_of(distribution, experts)
        key = (dtype, shape, exponent)
        if key not in self._memo:
            self._memo[key] = self._priced(dtype, shape, exponent)
        found = self._memo[key]
        if found is None:
            return None
        grid, log_s, known = found
        at = np.log2(np.maximum(np.asarray(tokens, dtype=np.float64), 1.0))
        seconds = np.exp(np.interp(at, grid, log_s))
        beyond = np.maximum(at - grid[-1], 0)
        if np.any(beyond > 0):
            seconds = seconds * 2.0**beyond
        return Estimate(seconds, ((at >= known[0] - 1e-9) & (at <= known[1] + 1e-9)) * known[2])

    def _priced(self, dtype: str, shape: Shape, exponent: float) -> tuple[Array, Array, Array] | None:
        """(log2 of tokens, log seconds, (first and last log2 of measured tokens, 1 where measured))."""
        kinds, trust = self._kinds(dtype, shape.gated)
        if not len(kinds):
            return None
        curves = np.flatnonzero(np.isin(self.variant, kinds))
        exponents = np.unique(self.exponents[curves])
        below, above = _bracket(exponents, exponent)
        parts = {e: self._of_routing(dtype, shape, curves[self.exponents[curves] == e], e) for e in (below, above)}
        grid = np.unique(np.concatenate([np.arange(DOUBLINGS * STEPS + 1) / STEPS, *(p[0] for p in parts.values())]))
        tokens = 2.0**grid
        mine = {e: np.interp(grid, at, log_s) for e, (at, log_s, *_) in parts.items()}
        if exponent in mine:
            log_s = mine[exponent]
        else:
            guide = {e: self._log_guide(parts[below][3], dtype, shape, e, tokens) for e in (*parts, exponent)}
            share = _share(guide[below], guide[above], guide[exponent], below, above, exponent)
            level = (1 - share) * (mine[below] - guide[below]) + share * (mine[above] - guide[above])
            log_s = np.maximum.accumulate(guide[exponent] + level)
            trust *= below != above
        floor = np.log(self._least_s(dtype, shape, exponent, tokens))
        ends = np.stack([known for *_, known, _ in parts.values()])
        known = np.array([ends[:, 0].max(), ends[:, 1].min(), trust * ends[:, 2].min()])
        return grid, np.maximum(log_s, floor), known

    def _kinds(self, dtype: str, gated: int) -> tuple[NDArray[np.int64], float]:
        """Variants that price the format, and 1 where they are of that very format and kind."""
        dtype = "bf16" if dtype == "fp16" and "fp16" not in self.variants[:, 0] else dtype
        for name, trust in ((dtype, 1.0), (NEAR.get(dtype, dtype), 0.0)):
            here = self.variants[:, 0] == name
            alike = here & (self.variants[:, 3].astype(int) == gated) if len(here) else here
            if alike.any():
                return np.flatnonzero(alike), trust
            if here.any():
                return np.flatnonzero(here), 0.0
        return np.zeros(0, np.int64), 0.0

    def _of_routing(
        self, dtype: str, shape: Shape, curves: NDArray[np.int64], exponent: float
    ) -> tuple[Array, Array, Array, int]:
        """(log2 of tokens, log seconds, known range, guide) of the shape from curves of one routing."""
        wanted = np.array([getattr(shape, name) for name in SHAPE])
        own = curves[(self.shapes[curves] == wanted).all(axis=1)]
        if len(own):
            read = [(*self._curve(int(i), dtype), self._ends(own[[j]])) for j, i in enumerate(own)]
            return *_fastest(read), np.append(self._ends(own), 1.0), int(self.variant[own[0]])
        if not self._places:
            self._places.append(np.array([Shape(*map(int, row)).place for row in self.shapes]))
        other = (self.shapes[curves, :4] != wanted[:4]).any(axis=1)
        near = (((self._places[0][curves] - shape.place) * DISTANCE) ** 2).sum(axis=1)
        away = np.sqrt(near + OTHER_BLOCK * other)
        order = np.argsort(away, kind="stable")
        # What runs the nearest shape is what the engine would run.
        first = order[away[order] <= away[order[0]] + 1e-9]
        read = []
        for kind in np.unique(self.variant[curves[first]]):
            chosen = order[self.variant[curves[order]] == kind]
            chosen = chosen[np.isin(chosen, order[:NEIGHBOURS])] if len(first) == 1 else chosen[:NEIGHBOURS]
            read.append(self._borrowed(int(kind), dtype, shape, curves[chosen], away[chosen], exponent))
        ends = np.append(self._ends(curves[first]), float(near[order[0]] <= NEAR_SHAPE**2))
        return *_fastest(read), ends, int(self.variant[curves[order[0]]])

    def _borrowed(
        self, kind: int, dtype: str, shape: Shape, curves: NDArray[np.int64], away: Array, exponent: float
    ) -> tuple[Array, Array, Array]:
        """(log2 of tokens, log seconds, ends) of the shape from the curves of one kernel, weighted by nearness."""
        share = 1 / (away + 0.05) ** 2
        grid = np.arange(DOUBLINGS * STEPS + 1) / STEPS
        log_s = self._log_guide(kind, dtype, shape, exponent, 2.0**grid)
        theirs = str(self.variants[kind, 0])
        for i, part in zip(curves, share / share.sum(), strict=True):
            guide = self._log_guide(kind, theirs, Shape(*map(int, self.shapes[i])), exponent, 2.0**grid)
            log_s = log_s + part * (np.interp(grid, *self._curve(int(i), theirs)) - guide)
        return grid, np.maximum.accumulate(log_s), self._ends(curves)

    def _ends(self, curves: NDArray[np.int64]) -> Array:
        """Log2 of the fewest and the most tokens of the curves."""
        first, last = self.tokens[self.starts[curves]].min(), self.tokens[self.starts[curves + 1] - 1].max()
        return np.log2([first, last])

    def _curve(self, i: int, dtype: str) -> tuple[Array, Array]:
        """(log2 of tokens, log seconds) of one curve, fine enough to be linear in between."""
        key = (i, dtype)
        if key in self._memo:
            found: tuple[Array, Array] = self._memo[key]
            return found
        part = slice(self.starts[i], self.starts[i + 1])
        knots, values = np.log2(self.tokens[part]), np.log(self.seconds[part])
        kind, shape = int(self.variant[i]), Shape(*map(int, self.shapes[i]))
        exponent = float(self.exponents[i])
        grid = fine_grid(knots, 0, DOUBLINGS, STEPS)
        log_s = through(grid, knots, values, lambda x: self._log_guide(kind, dtype, shape, exponent, 2.0**x))
        self._memo[key] = grid, log_s
        return grid, log_s

    def _log_guide(self, kind: int, dtype: str, shape: Shape, exponent: float, tokens: Array) -> Array:
        here = load(tokens, shape.experts, shape.top_k, shape.ep, exponent)
        columns = terms(
            dtype, self.device, tokens, here.rows, here.touched, shape.matrix,
            shape.hidden, np.ceil(shape.intermediate / shape.tp), shape.top_k, shape.experts / shape.ep, shape.gated,
        )  # fmt: skip
        guide: Array = np.log(columns @ self.weights[kind])
        return guide

    def _least_s(self, dtype: str, shape: Shape, exponent: float, tokens: Array) -> Array:
        return least_s(dtype, self.device, tokens, shape.experts, shape.top_k, shape.ep, shape.matrix, exponent < 0)


def _fastest(curves: list[tuple[Array, Array, Array]]) -> tuple[Array, Array]:
    """The lower envelope of curves (grid, log seconds, ends), each within its ends, all where none was measured."""
    grid = np.unique(np.concatenate([at for at, *_ in curves]))
    logs = np.stack([np.interp(grid, at, log_s) for at, log_s, _ in curves])
    inside = np.stack([(grid >= ends[0] - 1e-9) & (grid <= ends[1] + 1e-9) for *_, ends in curves])
    fastest: Array = np.where(inside | ~inside.any(axis=0), logs, np.inf).min(axis=0)
    return grid, fastest


def _bracket(exponents: Array, exponent: float) -> tuple[float, float]:
    """The measured routings next to the wanted one."""
    below, above = exponents[exponents <= exponent + 1e-12], exponents[exponents >= exponent - 1e-12]
    low = below[-1] if len(below) else above[0]
    return float(low), float(above[0] if len(above) else low)


def _share(low: Array, high: Array, wanted: Array, below: float, above: float, exponent: float) -> Array:
    """How much of the level comes from the upper routing: by exponent, or from balanced routing by the guide."""
    if below == above:
        return np.zeros_like(low)
    if below >= 0:
        return np.full_like(low, (exponent - below) / (above - below))
    apart = np.where(np.abs(high - low) > 1e-3, high - low, np.inf)
    share: Array = np.clip((wanted - low) / apart, 0, 1)
    return share
