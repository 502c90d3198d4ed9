"""How long one step takes: operators priced once per plan into tables that then cost microseconds to read."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hwmodels import operators as ops
from hwmodels.contextattention import context_operators
from hwmodels.engine import Engine
from hwmodels.errors import MappingError
from hwmodels.layergroups import LayerGroups
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Array, Operator
from hwmodels.overlap import Overlap, overlapped_s
from hwmodels.shape import Layer, ModelShape

#: Share by which a piece of a table may miss what it skips, and the last row that decides where pieces end.
STRAIGHT, DECISIVE = 3e-3, 1024.0
#: Numbers looked up by position, one at a time.
Numbers = Sequence[float]
#: (new tokens, tokens already cached) of one prompt chunk.
Item = tuple[int, int]
#: (decoding sequences, their attended tokens in total, prompt chunks) of one step.
Batch = tuple[int, int, Sequence[Item]]


class CostModel(Protocol):
    """Prices operators, and says what the prices rest on."""

    def time_s(self, op: Operator) -> Array:
        """Seconds of all launches of the operator, one value per batch size it stands for."""
        ...

    def sources(self, op: Operator) -> dict[str, float]:
        """The same seconds, summed over the batch sizes, by source; see hwmodels.evidence."""
        ...


@dataclass(frozen=True, slots=True)
class Pieces:
    """A function of (row, x) that is affine in x between knots: base[piece][row] + slope[piece][row] * x.

    knots   upper end of every piece but the last, ascending
    """

    knots: tuple[float, ...]
    base: tuple[Numbers, ...]
    slope: tuple[Numbers, ...]

    def at(self, row: int, x: float) -> float:
        """The value at one point."""
        piece = bisect_left(self.knots, x) if self.knots else 0
        return self.base[piece][row] + self.slope[piece][row] * x


@dataclass(frozen=True, slots=True)
class Tables:
    """One quantity of one rank of one pipeline stage (seconds, FLOPs or bytes) as a function of the batch.

    linear    by the tokens of the step in this attention group
    shared    by the tokens of all attention groups, what happens in the experts they share; zero without attention_dp
    head      by sampled tokens; zero but on the last stage
    decode    row: decoding sequences, x: mean context of a sequence
    prefill   row: new tokens of a chunk, x: tokens cached before it
    """

    linear: Numbers
    shared: Numbers
    head: Numbers
    decode: Pieces
    prefill: Pieces

    def group(self, batch: Batch) -> tuple[float, int]:
        """What one attention group's batch adds by itself, and its tokens; the shared part is not included."""
        sequences, context, items = batch
        tokens = sequences
        value = 0.0
        for new, before in items:
            tokens += new
            value += self.prefill.at(new, before)
        if sequences:
            value += self.decode.at(sequences, context / sequences)
        return value + self.linear[tokens] + self.head[sequences + len(items)], tokens


def stage_layers(model: ModelShape, mapping: Mapping) -> list[tuple[Layer, ...]]:
    """The layers of every pipeline stage, by `mapping.stages` or split as evenly as they go (later stages fewer)."""
    total = len(model.layers)
    counts = mapping.stages
    if counts is None:
        counts = tuple(total // mapping.pp + (stage < total % mapping.pp) for stage in range(mapping.pp))
    if len(counts) != mapping.pp or sum(counts) != total or min(counts) < 1:
        raise MappingError(
            f"stages {list(counts)}: expected {mapping.pp} positive layer counts that add up to the {total} layers of "
            f"{model.name}; leave stages out for an even split"
        )
    ends = np.cumsum(counts)
    return [model.layers[end - count : end] for end, count in zip(ends, counts, strict=True)]


def linear_operators(
    model: ModelShape,
    layers: Sequence[Layer],
    tokens: Array,
    mapping: Mapping,
    precision: Precision,
    *,
    first: bool,
    even: bool = False,
) -> list[Operator]:
    """Operators whose size depends on the step's tokens alone, but for the experts shared by several groups.

    even   cp ranks have equal parts of the tokens; otherwise whole tokens, and the rank with most is meant
    """
    everyone = tokens
    if mapping.cp > 1:
        tokens = rank_tokens(tokens, mapping.cp, even)
    found: list[Operator] = ops.embedding(model, tokens, mapping.tp, precision) if first else []
    for layer, count in Counter(layers).items():
        found += ops.attention_linear(model, layer.attention, tokens, mapping, precision, count)
        ff = layer.feed_forward
        if not ff.experts:
            found += ops.dense_feed_forward(model, ff, tokens, mapping.tp, precision, count)
        elif mapping.attention_dp == 1:
            found += ops.expert_feed_forward(model, ff, tokens, everyone, mapping, precision, count)
    return found


def rank_tokens(tokens: Array, cp: int, even: bool = False) -> Array:
    """Tokens of one of cp ranks: equal parts of `tokens`, or the most that a rank has where they are whole.

    >>> float(rank_tokens(np.array(9.0), 4)), float(rank_tokens(np.array(9.0), 4, even=True))
    (3.0, 2.25)
    """
    part: Array = tokens / cp
    return part if even else np.ceil(part)


def shared_operators(
    model: ModelShape, layers: Sequence[Layer], total_tokens: Array, mapping: Mapping, precision: Precision
) -> list[Operator]:
    """Expert blocks that several attention groups run together on `total_tokens`, evenly spread over the groups."""
    found: list[Operator] = []
    if mapping.attention_dp > 1:
        for layer, count in Counter(layers).items():
            if layer.feed_forward.experts:
                found += ops.expert_feed_forward(
                    model,
                    layer.feed_forward,
                    total_tokens / mapping.token_groups,
                    total_tokens,
                    mapping,
                    precision,
                    count,
                )
    return found


def decode_operators(
    layers: Sequence[Layer], sequences: Array, context: Array, mapping: Mapping, precision: Precision
) -> list[Operator]:
    """Attention of a stage over the caches of decoding sequences."""
    found: list[Operator] = []
    for attention, count in Counter(layer.attention for layer in layers).items():
        if mapping.cp > 1:
            found += context_operators("decode", attention, sequences, context, mapping, precision, count)
            continue
        found += ops.decode_attention(attention, sequences, context, mapping.tp, precision, count)
    return found


def prefill_operators(
    layers: Sequence[Layer], new: Array, before: Array, mapping: Mapping, precision: Precision
) -> list[Operator]:
    """Attention of a stage inside a prompt chunk."""
    found: list[Operator] = []
    for attention, count in Counter(layer.attention for layer in layers).items():
        if mapping.cp > 1:
            found += context_operators("prefill", attention, new, before, mapping, precision, count)
            continue
        found += ops.prefill_attention(attention, new, before, mapping.tp, precision, count)
    return found


def token_grid(limit: int) -> Array:
    """Sizes to price: every one up to 256, then ever coarser ones, the limit included.

    Those up to 8192 come with their successor, with which the next row of output tiles begins.
    """
    ends = np.concatenate([np.arange(256, 1025, 16), np.arange(1024, 8193, 64)])
    points = np.unique(np.concatenate([np.arange(1, 257), ends, ends + 1, np.geomspace(8192, 2**24, 177).round()]))
    return np.append(points[points < limit], float(limit))


def packed(values: Array) -> Numbers:
    """The values as a plain array: as quick to index as a list, and made at the speed of a copy."""
    return array("d", values.tobytes())


def _dense(grid: Array, values: Array) -> Numbers:
    """Values at 0, 1, 2 ... from those on the grid, linear between, never falling as the size grows; 0 at 0."""
    rising = np.maximum.accumulate(values)
    dense = np.interp(np.arange(int(grid[-1]) + 1), grid, rising)
    dense[0] = 0.0
    return packed(dense)


def _pieces(rows: Array, candidates: Array, values: Array, dense: Callable[[Array], Numbers]) -> Pieces:
    """Affine pieces of values[row, x] over x = candidates, as few as are exact to STRAIGHT at the candidates between.

    The values are made to rise with the row and with x: a larger batch never takes less. Rows beyond DECISIVE have no
    say in where pieces end, so that tables of different sizes agree.
    """
    values = np.maximum.accumulate(np.maximum.accumulate(values, axis=0), axis=1)
    telling = values[rows <= DECISIVE]
    ends, start = [0], 0
    for end in range(1, len(candidates)):
        last = end == len(candidates) - 1
        if last or not _straight(candidates[start : end + 2], telling[:, start : end + 2]):
            ends.append(end)
            start = end
    candidates, values = candidates[ends], values[:, ends]
    slope = np.diff(values, axis=1) / np.diff(candidates)
    base = values[:, :-1] - slope * candidates[:-1]
    columns = range(slope.shape[1])
    return Pieces(
        tuple(candidates[1:-1].tolist()),
        tuple(dense(base[:, i]) for i in columns),
        tuple(dense(slope[:, i]) for i in columns),
    )


def _straight(x: Array, values: Array) -> bool:
    """Whether all columns lie on the line from the first to the last, but for STRAIGHT of them."""
    share = (x - x[0]) / (x[-1] - x[0])
    chord = values[:, :1] + share * (values[:, -1:] - values[:, :1])
    return bool(np.all(np.abs(chord - values) <= STRAIGHT * values))


def tabulate(
    model: ModelShape,
    layers: Sequence[Layer],
    mapping: Mapping,
    precision: Precision,
    measure: Callable[[Operator], Array],
    *,
    max_tokens: int,
    max_seqs: int,
    first: bool,
    last: bool,
    layers_s: Callable[[Sequence[Layer], Array], Array] | None = None,
    even: bool = False,
) -> Tables:
    """Sum of `measure` over a stage's operators, for every batch up to the limits.

    layers_s   instead of the sum, what layers take that depends on the tokens of each attention group alone
    even       see linear_operators
    """

    def total(found: list[Operator], shape: tuple[int, ...]) -> Array:
        result: Array = np.zeros(shape)
        for op in found:
            result = result + measure(op)
        return result

    tokens, sequences, chunks = token_grid(max_tokens), token_grid(max_seqs), token_grid(max_tokens)
    linear = total(linear_operators(model, layers, tokens, mapping, precision, first=first, even=even), tokens.shape)
    everyone = token_grid(max_tokens * mapping.attention_dp)
    shared = total(shared_operators(model, layers, everyone, mapping, precision), everyone.shape)
    if layers_s is not None and mapping.attention_dp == 1:
        embedding = linear_operators(model, (), tokens, mapping, precision, first=first)
        linear = total(embedding, tokens.shape) + layers_s(layers, tokens)
    elif layers_s is not None:
        each = everyone / mapping.attention_dp
        own = total(linear_operators(model, layers, each, mapping, precision, first=False), each.shape)
        shared = np.maximum(layers_s(layers, each) - own, 0.0)
    sampled = sequences if mapping.cp == 1 else rank_tokens(sequences, mapping.cp, even)
    head = total(ops.language_model_head(model, sampled, mapping.tp) if last else [], sequences.shape)

    windows = {layer.attention.window_tokens for layer in layers} - {None}
    reach = max(float(model.max_context_tokens), 2.0)
    knots = {1.0, *(2.0**e for e in range(5, 21))} | {float(w) for w in windows if w is not None}
    contexts = np.array(sorted({min(k, reach) for k in knots} | {reach}))
    n, c = sequences[:, None], contexts[None, :]
    decode = total(decode_operators(layers, n + 0 * c, n * c, mapping, precision), (n + c).shape)
    befores = contexts.copy()
    befores[0] = 0.0
    m, b = chunks[:, None], befores[None, :]
    prefill = total(prefill_operators(layers, m + 0 * b, b + 0 * m, mapping, precision), (m + b).shape)

    def over(grid: Array) -> Callable[[Array], Numbers]:
        points = np.arange(int(grid[-1]) + 1)
        return lambda column: packed(np.concatenate([[0.0], np.interp(points[1:], grid, column)]))

    return Tables(
        _dense(tokens, linear),
        _dense(everyone, shared),
        _dense(sequences, head),
        _pieces(sequences, contexts, decode, over(sequences)),
        _pieces(chunks, befores, prefill, over(chunks)),
    )


class StepModel:
    """Seconds of a step of one replica; every method is a look-up.

    stages        tables of each pipeline stage
    transfer      seconds to pass the activations of n tokens on to the next stage, by n
    layer_groups  makes what prompts add in some of the layers, when first asked for; None where none are to be passed
                  in groups
    """

    __slots__ = (
        "_groups",
        "_layer_groups",
        "_run_base",
        "_run_slope",
        "engine",
        "max_seqs",
        "max_tokens",
        "stages",
        "transfer",
    )

    def __init__(
        self,
        stages: Sequence[Tables],
        transfer: Numbers,
        engine: Engine,
        max_tokens: int,
        max_seqs: int,
        layer_groups: Callable[[], LayerGroups] | None = None,
    ) -> None:
        self._layer_groups = layer_groups
        self._groups: LayerGroups | None = None
        self.stages = tuple(stages)
        self.transfer = transfer
        self.engine = engine
        self.max_tokens = max_tokens
        self.max_seqs = max_seqs
        # A decode-only step of n sequences with K attended tokens in all takes base[n] + slope[n] * K, piece by piece.
        only, rows = stages[0], min(max_seqs, max_tokens) + 1
        n = np.arange(rows)
        shared = np.asarray(only.linear)[:rows] + np.asarray(only.head)[:rows]
        shared += engine.step_overhead_s + n * engine.sequence_overhead_s
        self._run_base = [packed(shared + np.asarray(base)[:rows]) for base in only.decode.base]
        self._run_slope = [packed(np.asarray(slope)[:rows] / np.maximum(n, 1)) for slope in only.decode.slope]

    def overhead_s(self, sequences: int, prompts: bool) -> float:
        """Host time of a step, with prompt tokens in it or without."""
        engine = self.engine
        once = engine.step_overhead_s + (engine.prompt_overhead_s if prompts else 0.0)
        return once + sequences * engine.sequence_overhead_s

    def step_s(self, sequences: int, context: int, items: Sequence[Item]) -> float:
        """Seconds of one step of a replica with one stage and one attention group."""
        tables = self.stages[0]
        decode, prefill, engine = tables.decode, tables.prefill, self.engine
        if not items:
            piece = bisect_left(decode.knots, context / sequences) if decode.knots else 0
            return self._run_base[piece][sequences] + self._run_slope[piece][sequences] * context
        tokens = sequences
        value = engine.step_overhead_s + engine.prompt_overhead_s
        base, slope = prefill.base[0], prefill.slope[0]
        for new, before in items:
            tokens += new
            if not before:
                value += base[new]
            elif prefill.knots:
                value += prefill.at(new, before)
            else:
                value += base[new] + slope[new] * before
        sampled = sequences + len(items)
        if sequences:
            mean = context / sequences
            piece = bisect_left(decode.knots, mean) if decode.knots else 0
            value += decode.base[piece][sequences] + decode.slope[piece][sequences] * mean
        return value + tables.linear[tokens] + tables.head[sampled] + sampled * engine.sequence_overhead_s

    def group_step_s(self, sequences: int, context: int, items: Sequence[Item], group: int, groups: int) -> float:
        """As step_s, with prompts that pass one of the groups of layers; what follows them is sampled in the last.

        Raises MappingError for a replica whose layers cannot be passed in groups.
        """
        if self._groups is None:
            if self._layer_groups is None:
                raise MappingError("layers in groups: expected a replica of one stage and one attention group")
            self._groups = self._layer_groups()
        tables, batch = self.stages[0], (sequences, context, items)
        sampled = sequences + (len(items) if group == groups - 1 else 0)
        value = tables.group((sequences, context, ()))[0] - tables.head[sequences] + tables.head[sampled]
        return value + self._groups.added_s(batch, group, groups) + self.overhead_s(sampled, True)

    def decode_run(self, sequences: int, context: int) -> tuple[float, float, float]:
        """(first_s, slope_s, steps): the j-th decode-only step from here takes first_s + j * slope_s for j < steps.

        sequences, context   sequences and the tokens they attend to in the first of the steps
        """
        knots = self.stages[0].decode.knots
        piece = 0
        steps = np.inf
        if knots:
            mean = context / sequences
            piece = bisect_left(knots, mean)
            if piece < len(knots):
                steps = float(int(knots[piece] - mean) + 1)
        slope = self._run_slope[piece][sequences]
        return self._run_base[piece][sequences] + slope * context, slope * sequences, steps

    def stages_run(self, sequences: int, context: int) -> tuple[list[tuple[float, float]], float]:
        """By stage (first_s, slope_s), and for how many steps: as decode_run for a pipeline."""
        runs = []
        most = np.inf
        for tables in self.stages:
            first, slope, steps = group_run(tables, sequences, context)
            runs.append((first, slope))
            most = min(most, steps)
        runs[0] = (runs[0][0] + self.overhead_s(sequences, False), runs[0][1])
        return runs, most

    def stages_s(self, sequences: int, context: int, items: Sequence[Item]) -> list[float]:
        """Seconds in each pipeline stage; the engine's own work is done once, before the first."""
        batch = (sequences, context, items)
        times = [tables.group(batch)[0] for tables in self.stages]
        times[0] += self.overhead_s(sequences + len(items), bool(items))
        return times

    def lockstep_s(self, batches: Sequence[Batch]) -> float:
        """Seconds of a step that attention groups take together, in a replica of one stage."""
        return self.lockstep_stages_s(batches)[0]

    def lockstep_stages_s(self, batches: Sequence[Batch]) -> list[float]:
        """Seconds in each stage of a step that attention groups take together, one batch for each group.

        In every stage the slowest group, then the experts they share; the engine's own work as in stages_s.
        """
        times = []
        for tables in self.stages:
            slowest, total = 0.0, 0
            for batch in batches:
                value, tokens = tables.group(batch)
                slowest = max(slowest, value)
                total += tokens
            times.append(slowest + tables.shared[total])
        sampled = max(sequences + len(items) for sequences, _, items in batches)
        times[0] += self.overhead_s(sampled, any(items for _, _, items in batches))
        return times


def group_run(tables: Tables, sequences: int, context: int) -> tuple[float, float, float]:
    """(first_s, slope_s, steps) of decode steps in one stage, as StepModel.decode_run has them for a whole step.

    Without what attention groups share and the host's work.
    """
    decode = tables.decode
    mean = context / sequences
    piece = bisect_left(decode.knots, mean)
    steps = float(int(decode.knots[piece] - mean) + 1) if piece < len(decode.knots) else np.inf
    slope = decode.slope[piece][sequences]
    first = decode.base[piece][sequences] + slope * mean + tables.linear[sequences] + tables.head[sequences]
    return first, slope, steps


def compile_step_model(
    model: ModelShape,
    mapping: Mapping,
    precision: Precision,
    engine: Engine,
    cost: CostModel,
    *,
    max_tokens: int,
    max_seqs: int,
    overlap: Overlap = "none",
    units: int = 1,
) -> StepModel:
    """The step model of one replica, for steps of up to `max_tokens` tokens and `max_seqs` sequences a scheduler.

    overlap   of collectives with arithmetic, on a device of `units` compute units
    """
    limits = {"max_tokens": max_tokens, "max_seqs": max_seqs}

    def measure(op: Operator) -> Array:
        return cost.time_s(op) * kept(op, cost, engine)

    def layer_groups() -> LayerGroups:
        def tables(layers: Sequence[Layer], first: bool = False) -> Tables:
            return tabulate(
                model, layers, mapping, precision, measure, **limits, first=first, last=False, layers_s=cut, even=False
            )

        return LayerGroups(model.layers, lambda layer: tables((layer,)), tables((), first=True))

    def layers_s(layers: Sequence[Layer], tokens: Array) -> Array:
        return overlapped_s(model, layers, tokens, mapping, precision, measure, units=units, overlap=overlap)

    cut = layers_s if overlap != "none" else None
    stages = tabulate_stages(model, mapping, precision, measure, layers_s=cut, even=False, **limits)
    transfer = packed(np.zeros(max_tokens + 1))
    if mapping.pp > 1:
        tokens = token_grid(max_tokens)
        wire = ops.wire_bytes(precision)
        transfer = _dense(
            tokens,
            cost.time_s(
                ops.Communication("stage transfer", "point-to-point", "pp", tokens / mapping.cp * model.hidden * wire)
            ),
        )
    whole = mapping.pp == mapping.attention_dp == 1
    return StepModel(stages, transfer, engine, max_tokens, max_seqs, layer_groups if whole else None)


def kept(op: Operator, cost: CostModel, engine: Engine) -> Array | float:
    """Share of an operator's time that the engine does not hide in the kernels beside it."""
    if isinstance(op, ops.Elementwise):
        return engine.unfused
    if isinstance(op, ops.ExpertExchange) and op.beside and engine.overlaps_shared_experts:
        taken = cost.time_s(op)
        meanwhile = sum((cost.time_s(other) * kept(other, cost, engine) for other in op.beside), np.zeros_like(taken))
        share: Array = 1.0 - np.divide(np.minimum(meanwhile, taken), taken, out=np.zeros_like(taken), where=taken > 0)
        return share
    return 1.0


def tabulate_stages(
    model: ModelShape,
    mapping: Mapping,
    precision: Precision,
    measure: Callable[[Operator], Array],
    *,
    max_tokens: int,
    max_seqs: int,
    layers_s: Callable[[Sequence[Layer], Array], Array] | None = None,
    even: bool = False,
) -> list[Tables]:
    """Tables of `measure` for every pipeline stage; stages with the same layers and ends share theirs."""
    known: dict[tuple[frozenset[tuple[Layer, int]], bool, bool], Tables] = {}
    stages = []
    for stage, layers in enumerate(stage_layers(model, mapping)):
        first, last = stage == 0, stage == mapping.pp - 1
        key = (frozenset(Counter(layers).items()), first, last)
        if key not in known:
            known[key] = tabulate(
                model,
                layers,
                mapping,
                precision,
                measure,
                max_tokens=max_tokens,
                max_seqs=max_seqs,
                first=first,
                last=last,
                layers_s=layers_s,
                even=even,
            )
        stages.append(known[key])
    return stages
