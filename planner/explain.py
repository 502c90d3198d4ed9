"""Where a step's time goes: its operators priced one by one, and what each of them waits for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hwmodels import operators as ops
from hwmodels.contextattention import ContextPrices
from hwmodels.engine import Engine
from hwmodels.hardware import Cluster, Device
from hwmodels.mapping import Mapping, Precision
from hwmodels.offloadedcost import OffloadedCost
from hwmodels.operators import (
    Array,
    AttentionCore,
    Communication,
    ContextAttention,
    Elementwise,
    ExpertExchange,
    Experts,
    Gemm,
    GroupedGemm,
    Operator,
)
from hwmodels.roofline import AnalyticCost, arithmetic_dtype, attention_dtype, memory_time_s, tile_time_s
from hwmodels.routedcost import RoutedCost
from hwmodels.shape import Layer, ModelShape
from hwmodels.step_model import (
    CostModel,
    StepModel,
    decode_operators,
    kept,
    linear_operators,
    prefill_operators,
    rank_tokens,
    shared_operators,
    stage_layers,
)
from planner.catalogue import Catalogue, mapping_of, precision_of
from planner.encoding import Vision
from planner.errors import PlanError
from planner.explainoverlap import saved
from planner.offloading import Away, away_of
from planner.plan import Pool
from planner.scheduling import scheduler_of
from simulator.policies import layer_groups

#: Decoding sequences of a scheduler where none are asked for.
BATCH = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One operator of a step on one device, all its launches together.

    count        launches
    time_s       of all launches; below 0 for what overlap takes off the others, of kind 'overlap'
    flops, bytes   of all launches; bytes of device memory or, of a collective, what it moves
    bound        'compute', 'memory', 'launch' (starting kernels and filling the memory pipeline), the name of a link,
                 'latency of' a link, 'host', 'overlap' of what nobody waits for, or 'host link', 'host CPU' and 'SSD'
                 for experts that are away
    algorithm    of a collective, the one that is fastest at this size; '' otherwise
    link         the link that holds a collective up; '' otherwise
    source       what most of its price rests on, see hwmodels.evidence
    hidden_s     of a transfer between context-parallel ranks, what more it takes beside attention
    """

    name: str
    kind: str
    count: int
    time_s: float
    flops: float
    bytes: float
    bound: str
    algorithm: str = ""
    link: str = ""
    source: str = ""
    hidden_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step of a replica from start to end, through all pipeline stages.

    title          what the step holds; every attention group holds as much
    tokens         of one scheduler
    step_model_s   what the table that simulations use says
    mfu, mbu       shares of the peaks of the replica's devices while this step is all they do
    """

    title: str
    tokens: int
    rows: tuple[Row, ...]
    step_model_s: float
    mfu: float
    mbu: float

    @property
    def time_s(self) -> float:
        """Sum of the rows."""
        return sum(row.time_s for row in self.rows)

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds by what they wait for."""
        found: dict[str, float] = defaultdict(float)
        for row in self.rows:
            found[row.bound] += row.time_s
        return dict(found)

    @property
    def binding(self) -> str:
        """What most of the time waits for."""
        return max(self.bounds.items(), key=lambda entry: entry[1])[0]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes on the fullest device; the first four add up to the device, kv_tokens are those of one scheduler.

    engine_bytes   what the engine keeps for itself and the part of the device it must not use
    """

    weights_bytes: float
    activations_bytes: float
    engine_bytes: float
    kv_bytes: float
    device_bytes: float
    kv_bytes_per_token: float
    kv_blocks: int
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """One pool: the memory of its fullest device and the steps that its role runs."""

    pool: Pool
    memory: MemoryUse
    steps: tuple[StepTimes, ...]


def explain(
    catalogue: Catalogue,
    pool: Pool,
    *,
    batch: int | None = None,
    context: int = 1024,
    prefill: int | None = None,
    vision: Vision | None = None,
    ssd_gb_per_s: float | None = None,
) -> Explanation:
    """A decode step and a prompt chunk of one replica of the pool; of a prefill or decode pool only its own.

    Where prompts pass groups of layers (policy layered), the first group's step follows that of the chunk in all.

    catalogue  of the plan; the pool's own devices are looked up in it
    batch      decoding sequences of each scheduler; None for BATCH or as many as fit
    context    tokens each of them attends to
    prefill    tokens of the chunk, alone in its step; None for the token budget, 0 for no such step
    vision     an encoder that the replica has beside the model; its own time is not among the steps
    ssd_gb_per_s   of the disks of a node, see planner.plan.Plan

    Raises PlanError for a batch or chunk the plan cannot run, and what Catalogue.replica raises.
    """
    catalogue = catalogue.of(pool)
    table = catalogue.replica(pool, vision=vision, ssd_gb_per_s=ssd_gb_per_s).model
    memory = _memory(catalogue, pool, vision)
    step = _Step(catalogue, pool, table, away_of(pool, ssd_gb_per_s))
    steps = []
    if pool.role != "prefill":
        steps.append(step.decode(_sequences(catalogue, pool, memory, batch, context), context))
    if pool.role != "decode":
        most = min(pool.token_budget, _longest(catalogue, pool), memory.kv_tokens)
        prefill = most if prefill is None else prefill
        if prefill > most:
            raise PlanError(f"prefill {prefill}: expected at most {most} tokens, what a step of the plan can hold")
        if prefill:
            steps.append(step.chunk(prefill))
            groups = layer_groups(prefill, pool.group_tokens, scheduler_of(pool).max_groups)
            if pool.policy == "layered" and groups > 1:
                steps.append(step.first_group(prefill, groups))
    return Explanation(pool, memory, tuple(steps))


def _longest(catalogue: Catalogue, pool: Pool) -> int:
    """Tokens of the longest request that model and plan accept."""
    return min(pool.max_context_tokens, catalogue.model.max_context_tokens)


def _sequences(catalogue: Catalogue, pool: Pool, memory: MemoryUse, batch: int | None, context: int) -> int:
    """The batch of the decode step; raises PlanError where it cannot be."""
    longest = _longest(catalogue, pool)
    if context > longest:
        raise PlanError(f"context {context}: expected at most {longest} tokens, the longest the plan accepts")
    fits = min(pool.max_seqs, pool.token_budget, memory.kv_tokens // context)
    if batch is None:
        batch = min(BATCH, fits)
    if not 1 <= batch <= fits:
        raise PlanError(
            f"batch {batch} at context {context}: expected 1 to {fits} sequences (max_seqs {pool.max_seqs}, "
            f"{memory.kv_tokens} KV tokens); ask for a smaller batch or a shorter context"
        )
    return batch


def _memory(catalogue: Catalogue, pool: Pool, vision: Vision | None) -> MemoryUse:
    memory, device = catalogue.require_fit(pool, vision), catalogue.cluster.device
    unused = device.memory_bytes * (1 - catalogue.engine.memory_fraction)
    return MemoryUse(
        memory.weights_bytes,
        memory.activations_bytes,
        memory.engine_bytes + unused,
        memory.kv_bytes,
        device.memory_bytes,
        memory.kv_bytes_per_token,
        memory.kv_blocks,
        memory.kv_blocks * pool.block_tokens,
    )


@dataclass(frozen=True, slots=True)
class Pricing:
    """What prices operators on one device of a replica, and what it is compared with to say what they wait for."""

    cost: CostModel
    analytic: AnalyticCost
    engine: Engine

    def time_s(self, op: Operator) -> Array:
        """Seconds of the operator that the engine does not hide beside others, by batch size."""
        seconds: Array = self.cost.time_s(op) * kept(op, self.cost, self.engine)
        return seconds

    def rows(self, found: Sequence[Operator]) -> list[Row]:
        """Every operator once, in order of appearance."""
        rows: list[Row] = []
        for op in found:
            rows += self._context_rows(op) if isinstance(op, ContextAttention) else [self._row(op)]
        return _merged(rows)

    def _context_rows(self, op: ContextAttention) -> list[Row]:
        """Attention over several ranks, and what it waits for of their transfers."""
        cost = self.cost.inner if isinstance(self.cost, RoutedCost) else self.cost
        assert isinstance(cost, ContextPrices)  # nothing else prices replicas of several ranks a sequence
        found = cost.context(op)
        sources, launches = cost.sources(op), op.count
        core = next(part for part in op.parts if isinstance(part, AttentionCore))
        link = found.link.split(",")[0]
        attention_s, exposed_s, hidden_s, sent = (
            launches * float(np.sum(values))
            for values in (found.attention_s, found.exposed_s, found.hidden_s, found.sent_bytes)
        )
        return [
            Row(
                op.name, "attention", launches * core.count, attention_s, launches * float(np.sum(op.flops)),
                launches * float(np.sum(op.bytes)), _bound(core, self.analytic),
                source=max(sources, key=lambda name: sources[name]),
            ),
            Row(
                f"{op.name}, between ranks", f"{op.kind} over {op.cp}", launches, exposed_s, 0.0, sent, link,
                link=found.link, source="analytic", hidden_s=hidden_s,
            ),
        ]  # fmt: skip

    def _row(self, op: Operator) -> Row:
        """The operator's price and what it waits for."""
        time_s, sources = float(np.sum(self.time_s(op))), self.cost.sources(op)
        if isinstance(self.cost, RoutedCost):
            op = self.cost.routed(op)
        flops, nbytes = float(np.sum(op.flops)), float(np.sum(op.bytes))
        source = max(sources, key=lambda name: sources[name])
        assert not isinstance(op, ContextAttention)
        if isinstance(op, ExpertExchange):
            phases = self.analytic.exchange(op)
            link, kernel = str(np.ravel(phases.link(op.phase))[0]), str(np.ravel(phases.kernel)[0])
            short = link.split(",")[0]
            return Row(op.name, "exchange", op.count, time_s, 0.0, op.count * nbytes, short, kernel, link, source)
        if not isinstance(op, Communication):
            bound = self.cost.bound(op) if isinstance(self.cost, OffloadedCost) else None
            bound = bound or _bound(op, self.analytic)
            return Row(
                op.name, _KINDS[type(op)], op.count, time_s, op.count * flops, op.count * nbytes, bound, source=source
            )
        lines = self.analytic.collective(op.kind, op.group).lines
        if not lines:
            return Row(op.name, op.kind, op.count, 0.0, 0.0, 0.0, "none")
        line = min(lines, key=lambda line: line.latency_s + line.seconds_per_byte * nbytes)
        link = line.link.split(",")[0]  # which of the alike links it is does not matter here
        bound = link if line.seconds_per_byte * nbytes >= line.latency_s else f"latency of {link}"
        return Row(op.name, op.kind, op.count, time_s, 0.0, op.count * nbytes, bound, line.algorithm, line.link, source)


class _Step:
    """Steps of one replica of a pool; every attention group holds the same batch."""

    def __init__(self, catalogue: Catalogue, pool: Pool, table: StepModel, away: Away | None) -> None:
        self.model: ModelShape = catalogue.model
        self.cluster: Cluster = catalogue.cluster
        self.mapping: Mapping = mapping_of(pool)
        self.precision: Precision = precision_of(pool)
        self.pricing = Pricing(
            catalogue.step_prices(self.mapping, self.precision, away),
            AnalyticCost(self.cluster, self.mapping),
            catalogue.engine,
        )
        self.table = table
        self.overlap = pool.overlap

    def decode(self, sequences: int, context: int) -> StepTimes:
        """One token for each of the sequences."""
        total = sequences * context

        def attention(layers: Sequence[Layer]) -> list[Operator]:
            return decode_operators(layers, _one(sequences), _one(total), self.mapping, self.precision)

        title = f"decode step of {sequences} {_plural(sequences, 'sequence')} at context {context}"
        return self._times(title, sequences, sequences, attention, (sequences, total, []))

    def chunk(self, new: int) -> StepTimes:
        """The first tokens of a prompt, alone."""

        def attention(layers: Sequence[Layer]) -> list[Operator]:
            return prefill_operators(layers, _one(new), _one(0), self.mapping, self.precision)

        return self._times(f"prefill step of {new} {_plural(new, 'token')}", new, 1, attention, (0, 0, [(new, 0)]))

    def first_group(self, new: int, groups: int) -> StepTimes:
        """The first of the groups of layers for a prompt, alone; a replica of one stage and one attention group."""
        layers = self.model.layers[: -(-len(self.model.layers) // groups)]
        found = linear_operators(self.model, layers, _one(new), self.mapping, self.precision, first=True)
        found += prefill_operators(layers, _one(new), _one(0), self.mapping, self.precision)
        title = f"step of layer group 1 of {groups} for {new} {_plural(new, 'token')}"
        table_s = self.table.group_step_s(0, 0, [(new, 0)], 0, groups)
        return self._step(title, new, found, [(layer,) for layer in layers], self.table.overhead_s(0, True), table_s)

    def _times(
        self,
        title: str,
        tokens: int,
        sampled: int,
        attention: Callable[[Sequence[Layer]], list[Operator]],
        batch: tuple[int, int, Sequence[tuple[int, int]]],
    ) -> StepTimes:
        mapping, groups = self.mapping, self.mapping.attention_dp
        found: list[Operator] = []
        for stage, layers in enumerate(stage_layers(self.model, mapping)):
            first, last = stage == 0, stage == mapping.pp - 1
            found += linear_operators(self.model, layers, _one(tokens), mapping, self.precision, first=first)
            found += shared_operators(self.model, layers, _one(tokens * groups), mapping, self.precision)
            found += attention(layers)
            if last:
                found += ops.language_model_head(self.model, rank_tokens(_one(sampled), mapping.cp), mapping.tp)
            else:
                sent = _one(tokens / mapping.cp * self.model.hidden * ops.wire_bytes(self.precision))
                found.append(Communication("stage transfer", "point-to-point", "pp", sent))
        table_s = sum(self.table.lockstep_stages_s([batch] * groups)) + (mapping.pp - 1) * self.table.transfer[tokens]
        host_s = self.table.overhead_s(sampled, bool(batch[2]))
        return self._step(title, tokens, found, stage_layers(self.model, mapping), host_s, table_s)

    def _step(
        self,
        title: str,
        tokens: int,
        found: Sequence[Operator],
        runs: Sequence[Sequence[Layer]],
        host_s: float,
        table_s: float,
    ) -> StepTimes:
        """Of operators, the layers that are overlapped together, the host's seconds and those of the step model."""
        rows = self.pricing.rows(found)
        rows.append(Row("scheduling and sampling", "host", 1, host_s, 0.0, 0.0, "host"))
        device = self.cluster.device
        for one in saved(
            self.model, runs, tokens, self.mapping, self.precision, self.pricing.time_s,
            units=device.compute_units, overlap=self.overlap,
        ):  # fmt: skip
            rows.append(Row(one.name, "overlap", one.layers, -one.seconds, 0.0, 0.0, "overlap", source="step model"))
        time_s = sum(row.time_s for row in rows) * self.mapping.pp  # each device works on its stage's share of it
        peak = device.peak_flops_per_s[arithmetic_dtype(self.precision, device)]
        moved = sum(row.bytes for row in rows if not row.link)
        return StepTimes(
            title,
            tokens,
            tuple(row for row in rows if row.time_s != 0 or row.hidden_s > 0),
            table_s,
            sum(row.flops for row in rows) / (peak * time_s),
            moved / (device.memory_bytes_per_s * time_s),
        )


_KINDS: dict[type, str] = {
    Gemm: "GEMM", GroupedGemm: "grouped GEMM", Experts: "experts", AttentionCore: "attention",
    Elementwise: "elementwise",
}  # fmt: skip


def _bound(op: Gemm | GroupedGemm | AttentionCore | Elementwise | Experts, analytic: AnalyticCost) -> str:
    """Which part of a kernel's time is longest: arithmetic, memory traffic, or getting started.

    Arithmetic and traffic overlap, the start does not; the ramp of memory_time_s counts as start. Of experts without
    fitted coefficients, the largest product decides.
    """
    parts = analytic.fitted_parts_s(op)
    if parts is not None:
        return max(parts, key=lambda name: parts[name])
    device = analytic.device
    if isinstance(op, Experts):
        op = max(op.parts, key=lambda part: float(np.sum(part.bytes)))
    e = device.efficiency
    traffic_s = float(np.sum(op.bytes)) / (e.memory_mbu * device.memory_bytes_per_s)
    kernels = op.kernels if isinstance(op, Elementwise) else 1
    ramp_s = float(np.sum(memory_time_s(op.bytes, device))) - traffic_s
    launch_s = kernels * device.kernel_launch_s
    compute_s = _compute_s(op, device)
    if compute_s > traffic_s + ramp_s:
        return "compute" if compute_s >= launch_s else "launch"
    return "memory" if traffic_s >= ramp_s + launch_s else "launch"


def _compute_s(op: Gemm | GroupedGemm | AttentionCore | Elementwise, device: Device) -> float:
    """Time the multiply units alone would take."""
    if isinstance(op, Elementwise):
        return 0.0
    if isinstance(op, AttentionCore):
        peak = device.peak_flops_per_s[attention_dtype(op.precision, device)]
        return float(np.sum(op.flops)) / (peak * device.efficiency.attention_mfu)
    if isinstance(op, Gemm):
        return float(np.sum(tile_time_s(op.m, op.n, op.k, op.groups, device, op.precision)))
    rows = op.m / np.maximum(op.active, 1)
    return float(np.sum(tile_time_s(rows, op.n, op.k, op.active, device, op.precision)))


def _merged(rows: Sequence[Row]) -> list[Row]:
    """Rows of the same operator as one, in order of appearance."""
    together: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row.name, row.kind, row.bound, row.algorithm)
        old = together.get(key)
        if old is not None:
            row = Row(
                row.name, row.kind, old.count + row.count, old.time_s + row.time_s, old.flops + row.flops,
                old.bytes + row.bytes, row.bound, row.algorithm, row.link, row.source, old.hidden_s + row.hidden_s,
            )  # fmt: skip
        together[key] = row
    return list(together.values())


def _one(value: float) -> ops.Array:
    """A batch size as operators take it."""
    return np.array([float(value)])


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"
