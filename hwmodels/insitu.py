"""What do operators cost inside the steps of a running engine?

Kernels timed alone and hot leave out what a step does between and around them. Here the clock was read between the
operators of whole forward passes, and a step is priced by interpolating over these.
"""

from __future__ import annotations

from collections.abc import Mapping as Table
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from hwmodels import operators as ops
from hwmodels.engine import Engine
from hwmodels.errors import MeasurementError
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Array, Operator
from hwmodels.shape import ModelShape
from hwmodels.step_model import decode_operators, linear_operators, prefill_operators, stage_layers

#: Columns of measured operators, one row an operator of a pass.
#:
#: operator, signature   its name, and its shape where one name stands for several
#: x, y                  its size, see `size_of`
#: seconds               of one launch
ROW_COLUMNS = ("operator", "signature", "x", "y", "seconds")
#: Residuals beyond so many robust standard deviations count by their size and not its square (Huber 1964).
HUBER = 1.345


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured pass of one pipeline stage.

    sequences, context   decoding sequences, and what they attend to together, new tokens included
    items                (new tokens, tokens cached before) of every prompt chunk
    laps                 seconds by operator, all launches of the stage together
    """

    sequences: int
    context: int
    items: tuple[tuple[int, int], ...]
    laps: Table[str, float]


def size_of(op: Operator) -> tuple[str, Array, Array]:
    """(signature, x, y) of an operator: which shapes are comparable, and by what size they are interpolated.

    x   rows of a product, tokens of an expert block, queries of attention, bytes of everything else
    y   of decode attention the mean context, of prefill attention the tokens read from the cache; otherwise 0
    """
    if isinstance(op, ops.AttentionCore):
        window = "" if op.window_tokens is None else f", window {op.window_tokens}"
        signature = f"{op.heads}/{op.kv_heads} heads of {op.qk_dim}{window}"
        queries, read = np.asarray(op.queries, dtype=float), np.asarray(op.read, dtype=float)
        return signature, queries, read / np.maximum(queries, 1.0) if op.phase == "decode" else read
    if isinstance(op, ops.Experts):
        signature, x = f"{op.experts} experts of {op.hidden}x{op.intermediate}, top {op.top_k}", op.tokens
    elif isinstance(op, (ops.Gemm, ops.GroupedGemm)):
        signature, x = f"{op.n}x{op.k}", op.m
    elif isinstance(op, ops.Communication):
        signature, x = f"{op.kind} over {op.group}", op.bytes
    else:
        signature, x = "", op.bytes
    x = np.asarray(x, dtype=float)
    return signature, x, np.zeros_like(x)


def rows_of(
    model: ModelShape, mapping: Mapping, precision: Precision, stage: int, samples: Sequence[Sample]
) -> pd.DataFrame:
    """Measured operators of one pipeline stage, columns ROW_COLUMNS.

    Operators of a stage that share a name (windowed and full attention, layers of several kinds) share its lap in
    proportion to launches x bytes. The lap of prompt attention says what one chunk takes where there is one chunk
    only; of other samples it is left out.
    """
    layers = stage_layers(model, mapping)[stage]
    decoding = [sample for sample in samples if sample.sequences]
    single = [sample for sample in samples if len(sample.items) == 1]
    tokens = np.array([float(s.sequences + sum(new for new, _ in s.items)) for s in samples])
    found = linear_operators(model, layers, tokens, mapping, precision, first=stage == 0)
    if stage == mapping.pp - 1:
        sampled = np.array([float(s.sequences + len(s.items)) for s in samples])
        found += ops.language_model_head(model, sampled, mapping.tp)
    sequences = np.array([float(s.sequences) for s in decoding])
    context = np.array([float(s.context) for s in decoding])
    new = np.array([float(s.items[0][0]) for s in single])
    before = np.array([float(s.items[0][1]) for s in single])
    frames = [
        *_launches(found, samples),
        *_launches(decode_operators(layers, sequences, context, mapping, precision), decoding),
        *_launches(prefill_operators(layers, new, before, mapping, precision), single),
    ]
    return pd.concat(frames, ignore_index=True).dropna(ignore_index=True)


def transfer_rows(model: ModelShape, precision: Precision, tokens: ArrayLike, seconds: ArrayLike) -> pd.DataFrame:
    """Rows for passing the activations of `tokens` tokens on to the next stage, which took `seconds`."""
    size = np.asarray(tokens, dtype=float) * model.hidden * ops.wire_bytes(precision)
    op = ops.Communication("stage transfer", "point-to-point", "pp", size)
    return _rows(op, np.asarray(seconds, dtype=float))


def _launches(found: Sequence[Operator], samples: Sequence[Sample]) -> list[pd.DataFrame]:
    """Seconds of one launch of every operator in every sample, from laps by name; NaN where there was no lap."""
    frames = []
    for name in dict.fromkeys(op.name for op in found):
        alike = [op for op in found if op.name == name]
        lap = np.array([sample.laps.get(name, np.nan) for sample in samples], dtype=float)
        moved = sum((op.count * op.bytes for op in alike), np.zeros(len(samples)))
        frames += [_rows(op, lap * op.bytes / moved) for op in alike]
    return frames


def _rows(op: Operator, seconds: Array) -> pd.DataFrame:
    signature, x, y = size_of(op)
    return pd.DataFrame({"operator": op.name, "signature": signature, "x": x, "y": y, "seconds": seconds})


@dataclass(frozen=True, slots=True)
class Surface:
    """Seconds of one launch over its size: linear between measured sizes and beyond the largest, never falling.

    x, y      sizes, ascending; after the measured ones another of each, where there are two, for what lies beyond
    seconds   (len(x), len(y)); cells that were not measured are filled as `_filled` says
    reach     largest y that was measured, by measured x
    """

    x: Array
    y: Array
    seconds: Array
    reach: Array

    @classmethod
    def through(cls, rows: pd.DataFrame) -> Surface:
        """The surface through the medians of the rows of each size."""
        table = rows.pivot_table(index="x", columns="y", values="seconds", aggfunc="median")
        x, y = table.index.to_numpy(dtype=float), table.columns.to_numpy(dtype=float)
        measured = table.to_numpy(dtype=float)
        reach = np.array([y[~np.isnan(row)].max() for row in measured])
        # Rising rows stay so when columns are made to rise: isotonic regression keeps the order of what it is given.
        along_y = np.array([rising(row) for row in _filled(x, y, measured)])
        seconds = np.array([rising(column) for column in along_y.T]).T
        y, across = _continued(y, seconds.T)
        x, seconds = _continued(x, across.T)
        return cls(x, y, seconds, reach)

    def at(self, x: Array, y: Array) -> Array:
        """Seconds at every size; x and y broadcast. Sizes below the smallest measured take what that one takes."""
        row, down = _place(self.x, np.asarray(x))
        column, across = _place(self.y, np.asarray(y))
        below, right = np.minimum(row + 1, len(self.x) - 1), np.minimum(column + 1, len(self.y) - 1)
        upper = self.seconds[row, column] * (1 - across) + self.seconds[row, right] * across
        lower = self.seconds[below, column] * (1 - across) + self.seconds[below, right] * across
        found: Array = upper * (1 - down) + lower * down
        return found

    def covers(self, x: Array, y: Array) -> NDArray[np.bool_]:
        """Whether a size lies between measured ones; x and y broadcast."""
        last = len(self.reach) - 1
        row = np.minimum(np.searchsorted(self.x, x), last)
        covered: NDArray[np.bool_] = (x >= self.x[0]) & (x <= self.x[last]) & (y >= self.y[0]) & (y <= self.reach[row])
        return covered


def _continued(at: Array, table: Array) -> tuple[Array, Array]:
    """Knots and rows with one more of each, on the line through the last two rows; the same where there is one only.

    The step to it is made to rise along the row, so that rows beyond rise as the measured ones do.
    """
    if len(at) == 1:
        return at, table
    step = at[-1] - at[-2]
    growth = np.maximum.accumulate(table[-1] - table[-2])
    return np.append(at, at[-1] + step), np.vstack([table, table[-1] + growth])


def _place(knots: Array, at: Array) -> tuple[NDArray[np.intp], Array]:
    """(number of the knot before, share of the way to the next, above 1 beyond the last) of every value."""
    if len(knots) == 1:
        return np.zeros(at.shape, dtype=np.intp), np.zeros(at.shape)
    left = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, len(knots) - 2)
    return left, np.maximum((at - knots[left]) / (knots[left + 1] - knots[left]), 0.0)


def _filled(x: Array, y: Array, measured: Array) -> Array:
    """The table (x, y) without gaps.

    Between measured cells of a row it is linear. Beyond them it grows from column to column as in the rows where both
    were measured, in proportion to x: all queries of a launch read what y counts.
    """
    table = measured.copy()
    for row in table:
        known = np.flatnonzero(~np.isnan(row))
        inside = slice(known[0], known[-1] + 1)
        row[inside] = np.interp(y[inside], y[known], row[known])
    columns = range(len(y))
    for one, other in [*pairwise(columns), *pairwise(reversed(columns))]:
        both = ~np.isnan(table[:, one]) & ~np.isnan(table[:, other])
        missing = ~np.isnan(table[:, one]) & np.isnan(table[:, other])
        if missing.any():
            growth = np.zeros(1) if not both.any() else (table[both, other] - table[both, one]) / x[both]
            at = x[both] if both.any() else np.zeros(1)
            guess = table[missing, one] + np.interp(x[missing], at, growth) * x[missing]
            table[missing, other] = np.maximum(guess, 0.0)
    return table


def rising(values: Array) -> Array:
    """The values nearest to these, in squares, that never fall.

    Isotonic regression by its max-min formula (Robertson, Wright and Dykstra 1988, theorem 1.4.4).

    >>> rising(np.array([1.0, 4.0, 2.0, 5.0])).tolist()
    [1.0, 3.0, 3.0, 5.0]
    """
    if np.all(np.diff(values) >= 0):
        return values
    total, at = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    length = at[None, :] - at[:, None] + 1
    mean = np.where(length > 0, (total[None, 1:] - total[:-1, None]) / np.maximum(length, 1), np.inf)
    least = np.minimum.accumulate(mean[:, ::-1], axis=1)[:, ::-1]
    found: Array = np.where(length > 0, least, -np.inf).max(axis=0)
    return found


class InSituCost:
    """Prices the operators of one model, cut and precision by what they took inside steps.

    Where the step has an operator that was never measured, pricing it raises MeasurementError with its name.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        """Interpolate rows of ROW_COLUMNS; raises MeasurementError where there are none or columns are missing."""
        missing = [column for column in ROW_COLUMNS if column not in rows.columns]
        if missing or rows.empty:
            raise MeasurementError(
                f"measured operators: {len(rows)} rows, without {', '.join(missing) or 'any'}: expected columns "
                f"{', '.join(ROW_COLUMNS)}; measure passes again"
            )
        self._surfaces = {
            (str(name), str(signature)): Surface.through(group)
            for (name, signature), group in rows.groupby(["operator", "signature"])
        }

    def time_s(self, op: Operator) -> Array:
        """Seconds of all launches of the operator, one value per batch size it stands for."""
        surface, x, y = self._find(op)
        return np.where(x > 0, op.count * surface.at(x, y), 0.0)

    def sources(self, op: Operator) -> dict[str, float]:
        """The same seconds, summed, by whether the size lies between measured ones or beyond them."""
        surface, x, y = self._find(op)
        seconds, covered = np.broadcast_arrays(self.time_s(op), surface.covers(x, y))
        return {"measured": float(seconds[covered].sum()), "extended": float(seconds[~covered].sum())}

    def _find(self, op: Operator) -> tuple[Surface, Array, Array]:
        signature, x, y = size_of(op)
        surface = self._surfaces.get((op.name, signature))
        if surface is None:
            shape = f" ({signature})" if signature else ""
            raise MeasurementError(
                f"{op.name}{shape}: a step has this operator and no measured pass has; expected passes with decoding "
                "sequences and with a prompt chunk on every stage; measure for longer"
            )
        return surface, x, y


def fit_overheads(sequences: ArrayLike, prompts: ArrayLike, seconds: ArrayLike) -> tuple[float, float, float]:
    """(step_s, sequence_s, prompt_s) of seconds = step_s + sequence_s * sequences + prompt_s * [has prompts].

    sequences   that are sampled in each step
    prompts     whether the step has prompt tokens
    seconds     it took outside its operators

    None is negative. Huber's loss, by iteratively reweighted least squares: steps that were disturbed have no more
    say than any other step that lies above the line.
    """
    n, has, t = (np.asarray(values, dtype=float) for values in (sequences, prompts, seconds))
    if not len(t):
        raise MeasurementError("overheads of a step: 0 steps were measured, expected at least 1; measure for longer")
    features = np.column_stack([np.ones_like(n), n, has])
    scale = np.maximum(features.max(axis=0), 1e-300)
    weight = np.ones_like(t)
    found = np.zeros(3)
    for _ in range(100):
        root = np.sqrt(weight)
        before, found = found, nnls(features / scale * root[:, None], t * root)[0]
        residual = np.abs(t - features / scale @ found)
        spread = max(1.4826 * float(np.median(residual)), 1e-12)
        weight = np.minimum(1.0, HUBER * spread / np.maximum(residual, 1e-300))
        if np.allclose(found, before, rtol=1e-9, atol=1e-15):
            break
    step_s, sequence_s, prompt_s = (found / scale).tolist()
    return step_s, sequence_s, prompt_s


def engine_of(
    name: str, overheads: tuple[float, float, float], *, memory_fraction: float = 1.0, reserve_bytes: float = 0.0
) -> Engine:
    """The engine whose operators InSituCost prices: nothing is hidden, as all of it was timed where it runs.

    overheads   as fit_overheads returns them
    """
    step_s, sequence_s, prompt_s = overheads
    return Engine(
        name=name,
        source="measured on this machine",
        kernels={"default": "vllm"},
        step_overhead_s=step_s,
        sequence_overhead_s=sequence_s,
        prompt_overhead_s=prompt_s,
        unfused=1.0,
        request_overhead_s=0.0,
        memory_fraction=memory_fraction,
        reserve_bytes=reserve_bytes,
    )
