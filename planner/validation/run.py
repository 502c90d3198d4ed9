"""Does what runs here run as predicted? Measure operators, predict a whole run, then execute the same requests."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from hwmodels.engine import Engine
from hwmodels.errors import OutOfMemoryError
from hwmodels.hardware import Device
from hwmodels.insitu import InSituCost, engine_of, fit_overheads, transfer_rows
from hwmodels.mapping import Precision
from hwmodels.memory import GIB, activation_elements, replica_sizes
from hwmodels.step_model import StepModel, compile_step_model
from planner.errors import PlanError
from planner.execute.insitu import cost_rows, grid, held_out, profile, rounds
from planner.execute.records import Composition, Job, Pass, Served
from planner.execute.workers import Workers
from planner.profiling.machine import Machine
from planner.validation.execution import Execution, StepErrors, errors_by_kind, predict_steps
from simulator.collect import collect
from simulator.deployment import Deployment, ReplicaSpec
from simulator.result import Result
from simulator.scheduler import SchedulerConfig
from simulator.simulate import simulate
from simulator.workload import Requests, Workload

#: Told what is going on and how much of it is done, None where that is not known.
Progress = Callable[[str, float | None], None]
#: Share of the profiling time for made-up steps; the rest is for a served burst, which shows the host's part.
PASSES = 0.8
#: Steps made up to be predicted, and requests of the burst.
HELD_OUT, BURST = 24, 24
#: Steps of each kind, with prompt chunks and without, that tell the machine's speed.
PROBES = 4
#: Least time for them on either side of a run, as a share of the time for profiling.
PROBING = 0.02
#: Load of --rate auto: of the rate at which the simulator finishes requests that all wait from the beginning.
AUTO_LOAD = 0.7
#: Share of free memory that weights and cache may take.
MEMORY = 0.8


@dataclass(frozen=True, slots=True)
class Question:
    """What is executed and predicted: how, under which scheduler, for which requests."""

    job: Job
    config: SchedulerConfig
    requests: Requests

    @property
    def precision(self) -> Precision:
        """The formats everything is kept in."""
        return Precision(self.job.dtype, self.job.dtype, self.job.dtype)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return int((self.requests.prompt_tokens + self.requests.output_tokens).max())


@dataclass(frozen=True, slots=True)
class Learned:
    """What profiling found.

    rows       operators as measured, columns hwmodels.insitu.ROW_COLUMNS and stage
    passes     passes they were made of
    held_out   errors of made-up steps that the rows have not seen, each the median of its repeats, by kind
    tested     the same steps one by one: kind, predicted_s, measured_s
    probes     a few passes to tell the machine's speed by, and the seconds they took
    probing_s  least time for them
    """

    model: StepModel
    rows: pd.DataFrame
    engine: Engine
    passes: int
    held_out: Mapping[str, StepErrors]
    tested: pd.DataFrame
    probes: Mapping[Composition, float]
    probing_s: float


def sized(question: Question, machine: Machine) -> Question:
    """The question with a KV cache that holds as many of its longest requests as may run, or as memory allows.

    Raises OutOfMemoryError, saying by how much, where the weights and one request do not fit in free memory.
    """
    job, config = question.job, question.config
    sizes = replica_sizes(job.model, job.mapping, question.precision)
    here = job.ranks if machine.kind == "cpu" else 1  # processes that share the memory
    weights = max(stage for stage, _ in sizes.stages)
    per_token = max(token for _, token in sizes.stages)
    steps = config.token_budget * activation_elements(job.model, job.mapping) * 4.0
    free = MEMORY * machine.free_bytes() / here - weights - steps
    block = per_token * config.block_tokens * sizes.pp
    longest = -(-question.longest // config.block_tokens)
    if free < longest * block:
        raise OutOfMemoryError(
            f"{job.model.name} as {job.ranks} process(es) on {machine.name}: {(longest * block - free) / GIB:.1f} GiB "
            f"per process short of weights ({weights / GIB:.1f} GiB), activations and one request of "
            f"{question.longest} tokens; expected a smaller model, fewer processes, or a machine with more free memory"
        )
    wanted = config.max_seqs * longest
    return replace(question, job=replace(job, kv_blocks=int(min(wanted, free // block))))


def learn(
    workers: Workers,
    question: Question,
    minutes: float,
    rng: np.random.Generator,
    progress: Progress,
    configs: Sequence[SchedulerConfig] = (),
) -> Learned:
    """Measure this engine on this machine for `minutes` and compile a step model from that alone.

    configs   further settings whose steps the model is to cover
    """
    job, config, model = question.job, question.config, question.job.model
    budget, seqs = (max(getattr(c, name) for c in (config, *configs)) for name in ("token_budget", "max_seqs"))
    reach = {
        "token_budget": budget,
        "max_seqs": seqs,
        "max_context": min(question.longest, config.max_context_tokens),
        "kv_tokens": job.kv_blocks * job.block_tokens * job.mapping.pp,
    }
    # Steps to test with are measured among the others, so that a machine that drifts does so for both alike.
    unseen = set(held_out(rng, HELD_OUT, **reach))
    first, *others = grid(model, **reach)
    unseen -= {step for steps in (first, *others) for step in steps}
    every = profile(
        workers.run_passes, [[*first, *sorted(unseen, key=repr)], *others], minutes=PASSES * minutes, rng=rng,
        progress=lambda share: progress("measuring operators inside steps", share * PASSES),
    )  # fmt: skip
    passes = [one for one in every if one.composition not in unseen]
    rows = cost_rows(passes, model, job.mapping, question.precision)
    if job.mapping.pp > 1:
        rows = pd.concat([rows, _transfers(workers, question, passes)], ignore_index=True)
    cost = InSituCost(rows)
    progress("serving a burst", PASSES)
    engine = engine_of(f"this engine on {job.device}", _overheads(workers, question, passes))
    step_model = compile_step_model(
        model, job.mapping, question.precision, engine, cost, max_tokens=budget, max_seqs=seqs
    )
    tested = _tested(step_model, [one for one in every if one.composition in unseen])
    errors = errors_by_kind(tested["kind"], tested["predicted_s"], tested["measured_s"])
    return Learned(step_model, rows, engine, len(passes), errors, tested, _probes(passes), PROBING * 60.0 * minutes)


def changed(question: Question, learned: Learned, slower: float) -> StepModel:
    """The step model with everything longer by the share `slower`."""
    job, model, factor = question.job, learned.model, 1.0 + slower
    engine = learned.engine
    host = engine.step_overhead_s, engine.sequence_overhead_s, engine.prompt_overhead_s
    step_s, sequence_s, prompt_s = (seconds * factor for seconds in host)
    return compile_step_model(
        job.model, job.mapping, question.precision, engine_of(engine.name, (step_s, sequence_s, prompt_s)),
        InSituCost(learned.rows.assign(seconds=learned.rows["seconds"] * factor)),
        max_tokens=model.max_tokens, max_seqs=model.max_seqs,
    )  # fmt: skip


def _probes(passes: Sequence[Pass]) -> dict[Composition, float]:
    """Of the measured steps a few small, middling and larger ones of both kinds, with their median seconds."""
    taken: dict[Composition, list[float]] = defaultdict(list)
    for one in passes:
        if one.replica == one.stage == one.shard == 0:
            taken[one.composition].append(one.forward_s)
    chosen: list[Composition] = []
    for several in ([s for s in taken if not s.items], [s for s in taken if s.items]):
        ordered = sorted(several, key=lambda step: (float(np.median(taken[step])), repr(step)))
        chosen += [ordered[len(ordered) * part // PROBES] for part in range(PROBES)] if ordered else []
    return {step: float(np.median(taken[step])) for step in dict.fromkeys(chosen)}


def drift(workers: Workers, learned: Learned, rng: np.random.Generator) -> float:
    """How much longer the same passes take now than when they were profiled, as a share: the median over the steps.

    The first round is for the machine to get going.
    """
    taken: dict[Composition, list[float]] = defaultdict(list)
    started, begun = time.monotonic(), 0
    while begun < 2 or time.monotonic() - started < learned.probing_s:
        begun += 1
        for steps in rounds(list(learned.probes), rng):
            for one in workers.run_passes(steps):
                if begun > 1 and one.replica == one.stage == one.shard == 0:
                    taken[one.composition].append(one.forward_s)
    return float(np.median([np.median(seconds) / learned.probes[step] for step, seconds in taken.items()])) - 1.0


def _transfers(workers: Workers, question: Question, passes: Sequence[Pass]) -> pd.DataFrame:
    """Passing activations on: the message, and what the next stage does before its first operator."""
    job = question.job
    tokens = [2**e for e in range(question.config.token_budget.bit_length())]
    found = workers.transfers(tokens)
    before_s = float(np.median([p.total_s - sum(p.laps.values()) for p in passes if p.stage > 0]))
    seconds = [time_s + before_s for _, time_s in found]
    return transfer_rows(job.model, question.precision, tokens, seconds).assign(stage=0)


def _overheads(workers: Workers, question: Question, passes: Sequence[Pass]) -> tuple[float, float, float]:
    """Host time of a step outside its operators: of the first requests, served as they stand in a queue.

    In a pipeline steps overlap, so it is taken from the made-up steps of the first stage.
    """
    if question.job.mapping.pp > 1:
        mine = [p for p in passes if p.stage == 0]
        sequences = [len(p.composition.contexts) + len(p.composition.items) for p in mine]
        prompts = [bool(p.composition.items) for p in mine]
        return fit_overheads(sequences, prompts, [p.total_s - sum(p.laps.values()) for p in mine])
    burst = question.requests.head(min(BURST * question.job.replicas, len(question.requests)))
    burst = replace(burst, arrival_s=np.zeros(len(burst)))
    served = workers.serve(burst, question.config, measure_laps=True)
    require_whole(served)
    steps = served.steps
    inside = np.array([sum(laps.values()) for laps in steps["laps"]])
    chunks = np.array([len(items) for items in steps["items"]])
    outside = (steps["end_s"] - steps["start_s"]).to_numpy() - inside
    return fit_overheads(steps["decode_sequences"].to_numpy() + chunks, chunks > 0, np.maximum(outside, 0.0))


def require_whole(served: Served) -> None:
    """Raise PlanError where serving broke off."""
    if served.broken:
        raise PlanError(f"serving a first burst of requests {served.broken}; expected it to end, try a smaller model")


def _tested(model: StepModel, passes: Sequence[Pass]) -> pd.DataFrame:
    """Unseen steps, predicted and measured (the median of the repeats), stage by stage, without the host's part."""
    taken: dict[tuple[Composition, int], list[float]] = defaultdict(list)
    for one in passes:
        taken[one.composition, one.stage].append(one.forward_s)
    rows = []
    for (made, stage), seconds in taken.items():
        value, _ = model.stages[stage].group((len(made.contexts), sum(made.contexts), made.items))
        kind = "decode" if not made.items else "mixed" if made.contexts else "prefill"
        rows.append((kind, value, float(np.median(seconds))))
    return pd.DataFrame(rows, columns=["kind", "predicted_s", "measured_s"])


def device_of(machine: Machine) -> Device:
    """The machine as the simulator wants devices; its rates are not known and not used."""
    rates = dict.fromkeys(("fp32", "bf16", "fp16"), 1e12)
    return Device(
        name=machine.name, vendor=machine.reported, kind="cpu" if machine.kind == "cpu" else "gpu",
        peak_flops_per_s=rates, memory_bytes=float(machine.memory_bytes), memory_bytes_per_s=1e11,
        compute_units=machine.threads or 1, kernel_launch_s=0.0, tdp_w=0.0, idle_w=0.0, price_usd_per_h=None,
        default_cluster="", source="as reported by the operating system or driver",
    )  # fmt: skip


def deployment(question: Question, model: StepModel, machine: Machine) -> Deployment:
    """What is executed, as it is simulated."""
    job = question.job
    spec = ReplicaSpec(model, job.mapping, question.config, job.kv_blocks, device_of(machine), 1.0, None, job.dtype)
    return Deployment([spec] * job.replicas)


def predict(question: Question, model: StepModel, machine: Machine, seed: int) -> Result:
    """The whole run, simulated."""
    return simulate(deployment(question, model, machine), question.requests, seed)


def automatic_rate(question: Question, model: StepModel, machine: Machine, seed: int) -> float:
    """AUTO_LOAD of the rate at which the deployment works through all requests when they wait from the beginning."""
    waiting = replace(question, requests=replace(question.requests, arrival_s=np.zeros(len(question.requests))))
    makespan_s = predict(waiting, model, machine, seed).totals.makespan_s
    return AUTO_LOAD * len(question.requests) / makespan_s


def execute(
    workers: Workers, question: Question, learned: Learned, machine: Machine, seed: int, progress: Progress, what: str
) -> tuple[Execution, Served]:
    """The whole run, for real, in the same words as the simulator's."""
    count = len(question.requests)
    served = workers.serve(
        question.requests, question.config,
        progress=lambda finished: progress(f"{what}: {finished:,} of {count:,} requests", finished / count),
    )  # fmt: skip
    result = collect(deployment(question, learned.model, machine), Workload(question.requests), served.log, seed)
    return Execution(result.requests, served.steps, predict_steps(learned.model, served.steps)), served


def at_speed(
    execution: Execution, question: Question, learned: Learned, machine: Machine, drift: tuple[float, float], seed: int
) -> Execution:
    """The run with how fast the machine was before and after it, and what the simulator predicts at that speed."""
    model = changed(question, learned, sum(drift) / 2)
    return replace(execution, drift=drift, at_speed=predict(question, model, machine, seed).requests)


def settings(question: Question) -> dict[str, SchedulerConfig]:
    """Scheduler settings that differ in what they do to the question's requests: budgets, sequences, policies."""
    base, longest = question.config, question.longest
    budget, seqs = base.token_budget, base.max_seqs
    whole = max(budget, longest + seqs)
    small, few = max(budget // 4, 16), max(seqs // 4, 1)
    found = {
        f"chunked {seqs}/{budget}": replace(base, policy="chunked"),
        f"chunked {min(seqs, small)}/{small}": replace(
            base, policy="chunked", token_budget=small, max_seqs=min(seqs, small)
        ),
        f"chunked {few}/{budget}": replace(base, policy="chunked", max_seqs=few),
        f"chunked 1/{budget}": replace(base, policy="chunked", max_seqs=1),
        f"prefill-first {seqs}/{whole}": replace(base, policy="prefill-first", token_budget=whole),
        f"prefill-first {few}/{whole}": replace(base, policy="prefill-first", token_budget=whole, max_seqs=few),
        f"orca {seqs}/{whole}": replace(base, policy="orca", token_budget=whole),
        f"static {few}/{whole}": replace(base, policy="static", token_budget=whole, max_seqs=few),
    }
    return found
