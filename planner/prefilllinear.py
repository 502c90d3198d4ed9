"""Which linear iteration model fits a step model, how far is it off, and which one is never above it?

`linearise` fits planner.prefillcosts.LinearStep to look-ups over the ranges that are used, by non-negative least
squares of relative errors with every look-up assigned to the piece that is the larger there, and states the errors of
the result at other points than those it was fitted to. `minorant` gives a model that is below the step model for
*every* batch up to its limits: a step's time is a sum of functions of (tokens), (sampled rows), (chunk, tokens before)
and (decodes, mean context), and each is bounded by itself over all its rows, not over a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from hwmodels.step_model import Pieces, StepModel
from planner.errors import PlanError
from planner.prefillcosts import LinearStep, Piece, Span, ranges

Floats = NDArray[np.float64]
#: Rounds in which look-ups are assigned to pieces anew.
ROUNDS = 25
#: Lines of the convex hull that a minorant keeps: beyond these, the bound gains little and the program grows.
LINES = 4


@dataclass(frozen=True, slots=True)
class Ranges:
    """Where a linear model is to hold: prompt tokens of a step, those before the chunk, decodes and their context."""

    tokens: tuple[int, int] = (128, 4096)
    before: tuple[int, int] = (0, 8192)
    decodes: tuple[int, int] = (0, 64)
    context: tuple[int, int] = (512, 4096)

    def __post_init__(self) -> None:
        """Raise PlanError for a range that is empty or begins below its least value."""
        for name, least in (("tokens", 1), ("before", 0), ("decodes", 0), ("context", 1)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise PlanError(f"range of {name} {low} to {high}: expected {least} or more, in ascending order")


@dataclass(frozen=True, slots=True)
class Linearised:
    """A linear model and its relative errors |model - look-up| / look-up, at points it was not fitted to.

    max_error, median_error   over all those points; prompt_error: the median over those with prompts
    """

    step: LinearStep
    max_error: float
    median_error: float
    prompt_error: float
    points: int

    def __str__(self) -> str:
        return (
            f"linear step model of {len(self.step.pieces)} pieces: off by {self.median_error:.1%} in the median, "
            f"{self.max_error:.1%} at most, at {self.points} points"
        )


@dataclass(frozen=True, slots=True)
class TableClock:
    """Steps priced by a step model's tables; layer groups take their share of a whole traversal's time.

    groups   attention groups that take equal parts of every step; stages of a pipeline count with the slowest one,
             which sets its pace
    """

    model: StepModel
    layers: int
    groups: int = 1

    def step_s(self, decodes: int, context: int, spans: Sequence[Span]) -> float:
        """Seconds of a step; raises PlanError for one that is larger than the tables."""
        if len(ranges(spans, self.layers)) == 1:
            return self._whole_s(decodes, context, [(s.tokens, s.before) for s in spans if s.end - s.first])
        total = 0.0
        for first, end, _ in ranges(spans, self.layers):
            inside = [(s.tokens, s.before) for s in spans if s.first <= first and end <= s.end]
            total += (end - first) / self.layers * self._whole_s(decodes, context, inside)
        engine = self.model.engine
        part = sum(end - first for first, end, tokens in ranges(spans, self.layers) if tokens) / self.layers
        return total + (1.0 - part) * engine.prompt_overhead_s  # whole, however few layers see prompts

    def _whole_s(self, decodes: int, context: int, items: list[tuple[int, int]]) -> float:
        tokens = decodes + sum(n for n, _ in items)
        if tokens > self.model.max_tokens or decodes + len(items) > self.model.max_seqs:
            raise PlanError(
                f"step of {tokens} tokens and {decodes + len(items)} sequences: expected at most "
                f"{self.model.max_tokens} and {self.model.max_seqs}, which the step model has tables for"
            )
        if not tokens:
            return self.model.engine.step_overhead_s
        if self.groups > 1:
            part = [(max(n // self.groups, 1), before) for n, before in items]
            batch = (-(-decodes // self.groups), -(-context // self.groups), part)
            return self.model.lockstep_s([batch] * self.groups)
        if len(self.model.stages) > 1:
            return max(self.model.stages_s(decodes, context, items))
        return self.model.step_s(decodes, context, items)


Look = tuple[int, int, int, int]


def linearise(clock: TableClock, within: Ranges, pieces: int = 2) -> Linearised:
    """The linear model of a step model over the ranges, with its error.

    Raises PlanError where the ranges go beyond the tables or `pieces` is below 1.
    """
    fitted = looks(clock, within, 0.0)
    engine = clock.model.engine
    host = {"host_s": engine.step_overhead_s, "prompt_s": engine.prompt_overhead_s}
    step = fit(fitted, [_seconds(clock, x) for x in fitted], pieces, **host, layers=clock.layers)
    others = looks(clock, within, 0.5)
    error = np.array([abs(predicted(step, x) / _seconds(clock, x) - 1.0) for x in others])
    prompts = np.array([x[0] > 0 for x in others])
    return Linearised(step, float(error.max()), float(np.median(error)), float(np.median(error[prompts])), len(others))


def looks(clock: TableClock, within: Ranges, shift: float) -> list[Look]:
    """(prompt tokens, before, decodes, mean context) of the look-ups; `shift` in [0, 1) moves them between each
    other."""

    def spread(low: int, high: int, count: int) -> list[int]:
        at = (np.arange(count) + shift) / (count - 1 + shift)
        grid = np.geomspace(max(low, 1), high, 257) if high > 0 else np.zeros(257)
        return sorted({int(np.interp(a, np.linspace(0, 1, 257), grid)) for a in at} | ({0} if low == 0 else set()))

    most = within.tokens[1] + within.decodes[1]
    if most > clock.model.max_tokens or within.decodes[1] + 1 > clock.model.max_seqs:
        raise PlanError(
            f"ranges with steps of {most} tokens and {within.decodes[1] + 1} sequences: expected at most "
            f"{clock.model.max_tokens} and {clock.model.max_seqs}, which the step model has tables for"
        )
    decodes, contexts = spread(*within.decodes, 6), spread(*within.context, 3)
    found = [
        (n, b, d, c)
        for n, b, d, c in product(spread(*within.tokens, 9), spread(*within.before, 4), decodes, contexts)
        if d or c == contexts[0]
    ]
    return found + [(0, 0, d, c) for d, c in product(decodes, contexts) if d]


def _seconds(clock: TableClock, look: Look) -> float:
    n, before, decodes, mean = look
    return clock.step_s(decodes, decodes * mean, [Span(n, before, 0, clock.layers)] if n else [])


def predicted(step: LinearStep, look: Look) -> float:
    """What the linear model says of a look-up."""
    n, before, decodes, mean = look
    return step.step_s(decodes, decodes * mean, [Span(n, before, 0, step.layers)] if n else [])


def fit(
    points: Sequence[Look],
    seconds: Sequence[float],
    pieces: int = 2,
    *,
    host_s: float = 0.0,
    prompt_s: float = 0.0,
    layers: int = 1,
) -> LinearStep:
    """The linear model that comes closest to measured or looked-up steps, in relative error.

    points    (prompt tokens, before, decodes, mean context); seconds: of each
    host_s, prompt_s   what a step and a step with prompts take beside their layers, where that is known

    With several pieces, look-ups are first split by their tokens, once at every eighth of them, and the best end is
    kept. Raises PlanError for no points or pieces.
    """
    if pieces < 1 or not points:
        raise PlanError(f"{pieces} pieces for {len(points)} look-ups: expected at least one of each")
    n, before, decodes, mean = np.array(points, dtype=np.float64).T
    z = (n > 0).astype(np.float64)
    time = np.array(seconds)
    known = host_s + prompt_s * z
    shared = np.column_stack([n * (before + n / 2), decodes * mean])
    own = np.column_stack([np.ones_like(n), n, decodes, z])
    best: tuple[float, LinearStep] | None = None
    for start in range(1 if pieces == 1 else 8):
        edges = np.quantile(n, [(start + 1) / 9 + (1 - (start + 1) / 9) * i / pieces for i in range(pieces - 1)])
        piece = np.searchsorted(np.sort(edges), n, side="left")
        for _ in range(ROUNDS):
            columns = [np.where((piece == i)[:, None], own, 0.0) for i in range(pieces)]
            rows = np.column_stack([*columns, shared])
            scale = np.abs(rows / time[:, None]).max(axis=0)
            scale[scale == 0] = 1.0
            found = nnls(rows / time[:, None] / scale, (time - known) / time, maxiter=1000)[0] / scale
            values = own @ found[: 4 * pieces].reshape(pieces, 4).T
            step = _step(found, pieces, host_s, prompt_s, layers)
            error = np.sqrt(np.mean(((values.max(axis=1) + shared @ found[4 * pieces :] + known) / time - 1) ** 2))
            if step is not None and (best is None or error < best[0]):
                best = (float(error), step)
            again = values.argmax(axis=1)
            if (again == piece).all():
                break
            piece = again
    if best is None:
        raise PlanError(f"no linear step model with positive times for {len(points)} look-ups: expected times above 0")
    return best[1]


def _step(found: Floats, pieces: int, host: float, prompt: float, layers: int) -> LinearStep | None:
    """The model with these coefficients; None where it is none."""
    parts = tuple(Piece(*map(float, found[4 * i : 4 * i + 4])) for i in range(pieces) if found[4 * i : 4 * i + 4].any())
    if not parts or host + max(p.base_s for p in parts) + max(p.token_s for p in parts) <= 0:
        return None
    return LinearStep(parts, float(found[-2]), float(found[-1]), host, prompt, layers)


def minorant(model: StepModel, layers: int, max_tokens: int | None = None, max_context: int = 1 << 20) -> LinearStep:
    """A linear model that no step of up to `max_tokens` tokens takes less than; one stage and one attention group.

    layers        that spans are counted in
    max_context   longest sequence, in tokens, that the decodes and chunks attend to

    linear[t] is bounded by edges of the lower convex hull of all its values at 1 .. max_tokens; the first row of `head`
    is in every step, which samples at least one row; attention by the least value / (n (before + n/2)) over all chunks
    n and the ends of the affine pieces between them, where a ratio of affine functions has its extremes; decode
    attention by the least value / attended tokens likewise. Raises PlanError for pipelines and attention groups.
    """
    tables, engine = model.stages[0], model.engine
    if len(model.stages) > 1 or np.any(np.asarray(tables.shared)):
        raise PlanError(
            f"{len(model.stages)} stages: expected one stage and one attention group for a certified minorant"
        )
    most = min(max_tokens or model.max_tokens, model.max_tokens)
    linear = np.asarray(tables.linear)[: most + 1]
    head = float(np.asarray(tables.head)[1]) + engine.sequence_overhead_s
    pieces = tuple(Piece(base + head, slope, slope) for base, slope in _hull(linear))
    attention = _least_ratio(tables.prefill, most, max_context, lambda n, b: n * (b + n / 2), 0.0)
    rows = min(len(tables.decode.base[0]) - 1, model.max_seqs)
    context = _least_ratio(tables.decode, rows, max_context, lambda n, mean: n * mean, 1.0)
    return LinearStep(pieces, attention, context, engine.step_overhead_s, engine.prompt_overhead_s, layers)


def _hull(values: Floats) -> list[tuple[float, float]]:
    """(base, slope), neither below 0, of lines below values[1:], touching it: edges of its convex hull, few of them.

    Where the hull's edge begins below 0, the line through the origin with the least values[t] / t stands for it.
    """
    points: list[tuple[int, float]] = []
    for t in range(1, len(values)):
        v = float(values[t])
        while len(points) > 1:
            (t0, v0), (t1, v1) = points[-2:]
            if (v1 - v0) * (t - t0) < (v - v0) * (t1 - t0):
                break
            points.pop()
        points.append((t, v))
    at = np.arange(1, len(values))
    lines = [(float(values[1:].min()), 0.0), (0.0, float((values[1:] / at).min()))]
    for (t0, v0), (t1, v1) in pairwise(points):
        slope = (v1 - v0) / (t1 - t0)
        base = float((values[1:] - slope * at).min())  # the edge itself, without its rounding
        if slope >= 0 and base >= 0:
            lines.append((base, slope))
    least, edges = lines[:2], lines[2:]
    keep = least + [edges[i] for i in sorted({*np.linspace(0, len(edges) - 1, LINES - 2).astype(int)}) if edges]
    return [(base * (1 - 1e-12), slope * (1 - 1e-12)) for base, slope in keep]


def _least_ratio(pieces: Pieces, rows: int, reach: int, size: Callable[[Floats, float], Floats], first: float) -> float:
    """The least value / size(row, x) over rows 1 .. `rows` and x from `first` to `reach`."""
    row = np.arange(1, rows + 1, dtype=np.float64)
    ends = [first, *pieces.knots, float(reach)]
    least = np.inf
    for piece, (base, slope) in enumerate(zip(pieces.base, pieces.slope, strict=True)):
        for x in (min(max(end, first), float(reach)) for end in (ends[piece], ends[piece + 1])):
            value = np.asarray(base)[1 : rows + 1] + np.asarray(slope)[1 : rows + 1] * x
            least = min(least, float((value / size(row, x)).min()))
    return max(least, 0.0) * (1 - 1e-12)
