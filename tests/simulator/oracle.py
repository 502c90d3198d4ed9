"""The readable step-by-step simulator that the compressed engine must agree with.

Every step visits every sequence, every token is emitted one by one and nothing is skipped or summed in closed form:
slow on purpose and easy to check by eye. `Scheduler` holds the rules and knows no clock; one small SimPy process per
variant (`replica`, `lockstep`, `pipeline`) turns its batches into time. Results are arrays over the requests in the
order given; times are in seconds, nan where something never happened.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf, isnan, nan
from typing import Any, Literal

import numpy as np
import simpy

Items = list[tuple[int, int]]
Features = tuple[int, int, Items]
StepTime = Callable[[int, int, Items], float]
StageTimes = Callable[[int, int, Items], Sequence[float]]
GroupStepTime = Callable[[int, int, Items, int, int], float]
Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True)
class OracleConfig:
    """One scheduler; token_budget bounds the tokens of a step, kv_blocks the pool of block_tokens-sized blocks."""

    policy: Literal["chunked", "prefill-first", "orca", "static", "layered"]
    max_seqs: int
    token_budget: int
    block_tokens: int
    max_context_tokens: int
    kv_blocks: int
    chunk_tokens: int | None = None
    group_tokens: int = 512
    max_groups: int = 16
    order: Literal["fcfs", "shortest", "deadline", "priority"] = "fcfs"
    ageing_tokens_per_s: float = 0.0
    targets_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.policy not in ("chunked", "prefill-first", "orca", "static", "layered"):
            raise ValueError(f"policy(={self.policy!r}) must be chunked, prefill-first, orca, static or layered.")
        if self.policy == "chunked" and self.max_seqs > self.token_budget:
            raise ValueError(f"max_seqs(={self.max_seqs}) must be <= token_budget(={self.token_budget}) when chunked.")


@dataclass(eq=False, slots=True)
class Request:
    """One request: `cached` tokens have their KV in `blocks` blocks, `generated` tokens were emitted so far."""

    index: int
    arrival_s: float
    prompt: int
    output: int
    generated: int = 0
    cached: int = 0
    blocks: int = 0
    admission: int = -1
    lane: int = -1
    preemptions: int = 0
    rank: float = 0.0  # its place in the queue: lower goes first
    rejected: bool = False
    first_schedule_s: float = nan
    first_token_s: float = nan
    finish_s: float = nan
    token_s: list[float] | None = None

    @property
    def target(self) -> int:
        """Tokens to prefill: the prompt, after a preemption also what had been generated."""
        return self.prompt + self.generated

    @property
    def slo_class(self) -> int:
        return slo_class(self.prompt, self.output)

    def emit(self, now_s: float) -> None:
        self.generated += 1
        if self.generated == 1:
            self.first_token_s = now_s
        if self.generated == self.output:
            self.finish_s = now_s
        if self.token_s is not None:
            self.token_s.append(now_s)


def slo_class(prompt: int, output: int) -> int:
    """Classes as good as drawn."""
    return (7 * prompt + output) % 3


@dataclass(slots=True)
class Batch:
    """What one step runs; padding rows are finished sequences of a static batch.

    Prompts go through all layers, or through `group` of `groups`.
    """

    decodes: list[Request] = field(default_factory=list)
    padding: list[Request] = field(default_factory=list)
    prefills: list[tuple[Request, int]] = field(default_factory=list)
    group: int = 0
    groups: int = 1

    def features(self) -> Features:
        """(decode sequences, their context tokens with the new one, (new tokens, context before) per prefill)."""
        rows = self.decodes + self.padding
        context = 0
        for request in rows:
            context += request.cached + 1
        return len(rows), context, [(new, request.cached) for request, new in self.prefills]

    def is_empty(self) -> bool:
        return not (self.decodes or self.padding or self.prefills)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one lane; free and held blocks are those at its start, after admission and growth."""

    lane: int
    start_s: float
    end_s: float
    decode_sequences: int
    decode_context_tokens: int
    items: Items
    decode_indices: list[int]
    prefill_indices: list[int]
    free_blocks: int
    held_blocks: int


class Scheduler:
    """The rules of one replica or lane: what the next step runs (`plan`), what is true after it (`commit`)."""

    def __init__(self, config: OracleConfig, lane: int = 0) -> None:
        self.config = config
        self.lane = lane
        self.waiting: list[Request] = []
        self.cohort: Batch | None = None  # prompts on their way through the groups of layers
        self.partial: Request | None = None
        self.decoding: list[Request] = []
        self.padding: list[Request] = []
        self.free_blocks = config.kv_blocks
        self.admissions = 0
        self.unfinished = 0

    # Arrival

    def can_ever_run(self, request: Request) -> bool:
        c = self.config
        longest = request.prompt + request.output - 1
        if request.prompt + request.output > c.max_context_tokens:
            return False
        if self.blocks_for(longest) > c.kv_blocks:
            return False
        if c.policy != "chunked" and longest > c.token_budget:
            return False
        return c.policy != "static" or self.blocks_for(c.max_context_tokens) <= c.kv_blocks

    def arrive(self, request: Request) -> bool:
        """Queue the request, or reject it for good and say so with False."""
        if not self.can_ever_run(request):
            request.rejected = True
            return False
        request.lane = self.lane
        if self.config.order == "shortest":
            request.rank = request.prompt + self.config.ageing_tokens_per_s * request.arrival_s
        elif self.config.order == "deadline":
            targets = self.config.targets_s
            request.rank = request.arrival_s + targets[min(request.slo_class, len(targets) - 1)]
        elif self.config.order == "priority":
            request.rank = request.arrival_s
        self.waiting.append(request)
        self.unfinished += 1
        return True

    def importance(self, request: Request) -> int:
        """Lower goes first, whatever the ranks."""
        return request.slo_class if self.config.order == "priority" else 0

    def head(self) -> Request:
        """Who is first in the queue; among equals the one that has waited longest."""
        return min(self.waiting, key=lambda request: (self.importance(request), request.rank))

    def make_way(self, batch: Batch) -> bool:
        """Preempt a decoding sequence that is less important than the head of the queue; whether there was one."""
        later = [request for request in self.decoding if self.importance(request) > self.importance(self.head())]
        if not later:
            return False
        victim = max(later, key=lambda request: (self.importance(request), request.admission))
        self.preempt(victim)
        batch.decodes = [request for request in batch.decodes if request is not victim]
        return True

    # KV blocks

    def blocks_for(self, tokens: int) -> int:
        return ceil(tokens / self.config.block_tokens)

    def held_blocks(self) -> int:
        running = [*self.decoding, *self.padding, *([self.partial] if self.partial else [])]
        return sum(request.blocks for request in running)

    def release(self, request: Request) -> None:
        self.free_blocks += request.blocks
        request.blocks = 0

    def preempt_last(self) -> None:
        """Send the sequence admitted last, of the least important ones, back to the front of the queue."""
        running = [*self.decoding, *([self.partial] if self.partial else [])]
        self.preempt(max(running, key=lambda request: (self.importance(request), request.admission)))

    def preempt(self, victim: Request) -> None:
        """Its KV is lost; it must recompute everything."""
        if victim is self.partial:
            self.partial = None
        else:
            self.decoding.remove(victim)
        self.release(victim)
        victim.cached = 0
        victim.preemptions += 1
        victim.rank = -inf
        self.waiting.insert(0, victim)

    def grow(self) -> bool:
        """Give each decoding sequence whose last block is full one more; True if that took a preemption."""
        preempted = False
        while True:
            full = [request for request in self.decoding if request.cached % self.config.block_tokens == 0]
            if len(full) <= self.free_blocks:
                break
            self.preempt_last()
            preempted = True
        for request in full:
            request.blocks += 1
            self.free_blocks -= 1
        return preempted

    def admit_head(self, now_s: float, blocks: int) -> Request:
        request = self.head()
        self.waiting.remove(request)
        request.blocks = blocks
        self.free_blocks -= blocks
        request.admission = self.admissions
        self.admissions += 1
        if isnan(request.first_schedule_s):
            request.first_schedule_s = now_s
        return request

    # A step

    def plan(self, now_s: float) -> Batch:
        """The batch of the step that starts now; allocates its KV."""
        if self.config.policy == "chunked":
            return self.plan_chunked(now_s)
        if self.config.policy == "prefill-first":
            return self.plan_prefill_first(now_s)
        if self.config.policy == "orca":
            return self.plan_orca(now_s)
        if self.config.policy == "layered":
            return self.plan_layered(now_s)
        return self.plan_static(now_s)

    def plan_chunked(self, now_s: float) -> Batch:
        preempted = self.grow()
        batch = Batch(decodes=list(self.decoding))
        left = self.config.token_budget - len(self.decoding)
        if self.config.chunk_tokens is not None:
            left = min(left, self.config.chunk_tokens)
        sequences = len(self.decoding)
        prefill_open = False
        if self.partial:
            sequences += 1
            chunk = min(self.partial.target - self.partial.cached, left)
            if chunk > 0:
                batch.prefills.append((self.partial, chunk))
                left -= chunk
            prefill_open = self.partial.cached + chunk < self.partial.target
        while not preempted and not prefill_open and left > 0 and self.waiting:
            target = self.head().target
            blocks = self.blocks_for(target)
            if sequences >= self.config.max_seqs or blocks > self.free_blocks:
                if not self.make_way(batch):
                    break
                sequences -= 1
                continue
            request = self.admit_head(now_s, blocks)
            sequences += 1
            chunk = min(target, left)
            batch.prefills.append((request, chunk))
            left -= chunk
            prefill_open = chunk < target
        return batch

    def plan_prefill_first(self, now_s: float) -> Batch:
        batch = Batch()
        self.admit_whole(batch, now_s, self.config.token_budget)
        if batch.prefills:
            return batch
        self.grow()
        return Batch(decodes=list(self.decoding))

    def plan_orca(self, now_s: float) -> Batch:
        preempted = self.grow()
        batch = Batch(decodes=list(self.decoding))
        if not preempted:
            self.admit_whole(batch, now_s, self.config.token_budget - len(self.decoding))
        return batch

    def plan_layered(self, now_s: float) -> Batch:
        preempted = self.grow()
        batch = Batch(decodes=list(self.decoding))
        if self.cohort:
            batch.prefills, batch.groups = self.cohort.prefills, self.cohort.groups
            batch.group = self.cohort.group + 1
        elif not preempted:
            self.admit_whole(batch, now_s, self.config.token_budget - len(self.decoding))
            tokens = sum(new for _, new in batch.prefills)
            batch.groups = min(self.config.max_groups, max(1, ceil(tokens / self.config.group_tokens)))
        return batch

    def plan_static(self, now_s: float) -> Batch:
        if self.decoding or self.padding:
            return Batch(decodes=list(self.decoding), padding=list(self.padding))
        reserved = self.blocks_for(self.config.max_context_tokens)
        batch = Batch()
        self.admit_whole(batch, now_s, self.config.token_budget, reserved)
        return batch

    def admit_whole(self, batch: Batch, now_s: float, left: int, reserved: int | None = None) -> None:
        """Admit whole prompts from the head of the queue while sequences, `left` tokens and KV blocks allow it."""
        while self.waiting:
            target = self.head().target
            if target > left:
                return
            blocks = self.blocks_for(target) if reserved is None else reserved
            if len(self.decoding) + len(batch.prefills) >= self.config.max_seqs or blocks > self.free_blocks:
                if not self.make_way(batch):
                    return
                continue
            batch.prefills.append((self.admit_head(now_s, blocks), target))
            left -= target

    def commit(self, batch: Batch, end_s: float) -> list[Request]:
        """Emit the tokens of a step that ended; returns the requests it finished."""
        for request in batch.padding:
            request.cached += 1
        for request in batch.decodes:
            request.cached += 1
            request.emit(end_s)
        self.cohort = batch if batch.prefills and batch.group + 1 < batch.groups else None
        for request, new in batch.prefills if self.cohort is None else []:
            request.cached += new
            if request.cached < request.target:
                self.partial = request
                continue
            if request is self.partial:
                self.partial = None
            request.emit(end_s)
            self.decoding.append(request)

        finished = [request for request in self.decoding if request.generated == request.output]
        self.decoding = [request for request in self.decoding if request.generated < request.output]
        self.unfinished -= len(finished)
        if self.config.policy == "static":
            self.padding += finished
            if not self.decoding:
                for request in self.padding:
                    self.release(request)
                self.padding = []
        else:
            for request in finished:
                self.release(request)
        return finished


class Arrivals:
    """Requests still to come, by (arrival, index); in a closed loop a request that leaves starts the next one."""

    def __init__(self, requests: list[Request], concurrency: int | None = None) -> None:
        self.pending = deque(sorted(requests, key=lambda request: (request.arrival_s, request.index)))
        self.held: deque[Request] = deque()
        if concurrency is not None:
            self.held = deque(list(self.pending)[concurrency:])
            self.pending = deque(list(self.pending)[:concurrency])

    def next_s(self) -> float:
        return self.pending[0].arrival_s if self.pending else inf

    def one_left(self, now_s: float) -> None:
        if self.held:
            request = self.held.popleft()
            request.arrival_s = now_s
            self.pending.append(request)

    def route_one(self, lanes: list[Scheduler]) -> Scheduler | None:
        """Hand the next request to the lane with the fewest unfinished ones; None if it was rejected."""
        request = self.pending.popleft()
        lane = min(lanes, key=lambda lane: (lane.unfinished, lane.lane))
        if lane.arrive(request):
            return lane
        self.one_left(request.arrival_s)
        return None


@dataclass(slots=True)
class Log:
    """Step records, kept when asked for."""

    steps: list[StepRecord] | None

    def add(self, lane: Scheduler, batch: Batch, start_s: float, end_s: float) -> None:
        if self.steps is None:
            return
        newcomers = [r for r, _ in batch.prefills if r is not lane.partial]
        self.steps.append(
            StepRecord(
                lane.lane,
                start_s,
                end_s,
                *batch.features(),
                decode_indices=[request.index for request in batch.decodes],
                prefill_indices=[request.index for request, _ in batch.prefills],
                free_blocks=lane.free_blocks,
                held_blocks=lane.held_blocks() + sum(request.blocks for request in newcomers),
            )
        )


def until(env: simpy.Environment, when_s: float) -> simpy.Event:
    """The event at an absolute time; now + (when - now) may miss it by an ulp, so processes keep `when` themselves."""
    return env.timeout(max(0.0, when_s - env.now))


def replica(
    env: simpy.Environment,
    scheduler: Scheduler,
    step_s: StepTime,
    arrivals: Arrivals,
    log: Log,
    group_step_s: GroupStepTime | None = None,
) -> Process:
    """One replica: a step, its commit, the next step; idle until the next arrival when there is nothing to run."""
    now_s = 0.0
    while True:
        while arrivals.next_s() <= now_s:
            arrivals.route_one([scheduler])
        batch = scheduler.plan(now_s)
        if batch.is_empty():
            require_no_work(scheduler)
            if arrivals.next_s() == inf:
                return
            now_s = arrivals.next_s()
            yield until(env, now_s)
            continue
        if batch.groups == 1:
            end_s = now_s + step_s(*batch.features())
        else:
            assert group_step_s is not None
            end_s = now_s + group_step_s(*batch.features(), batch.group, batch.groups)
        log.add(scheduler, batch, now_s, end_s)
        yield until(env, end_s)
        for _ in scheduler.commit(batch, end_s):
            arrivals.one_left(end_s)
        now_s = end_s


def lockstep(
    env: simpy.Environment,
    lanes: list[Scheduler],
    coupled_s: Callable[[list[Features]], float],
    arrivals: Arrivals,
    log: Log,
) -> Process:
    """Lanes that begin and end every step together; a lane with nothing to run idles in it."""
    now_s = 0.0
    while True:
        while arrivals.next_s() <= now_s:
            arrivals.route_one(lanes)
        batches = [lane.plan(now_s) for lane in lanes]
        if all(batch.is_empty() for batch in batches):
            require_no_work(*lanes)
            if arrivals.next_s() == inf:
                return
            now_s = arrivals.next_s()
            yield until(env, now_s)
            continue
        end_s = now_s + coupled_s([batch.features() for batch in batches])
        for lane, batch in zip(lanes, batches, strict=True):
            if not batch.is_empty():
                log.add(lane, batch, now_s, end_s)
        yield until(env, end_s)
        # Whoever came during the step was routed by the counts of that moment, so before the step's finishes.
        while arrivals.next_s() < end_s:
            arrivals.route_one(lanes)
        for lane, batch in zip(lanes, batches, strict=True):
            lane.commit(batch, end_s)
        now_s = end_s


def pipeline(
    env: simpy.Environment,
    flights: list[list[Scheduler]],
    stage_s: Callable[[list[Features]], Sequence[float]],
    transfer_s: Callable[[int], float],
    arrivals: Arrivals,
    log: Log,
) -> Process:
    """Flights whose steps pass through the same stages, first ready first served.

    The lanes of a flight begin and end every step together; one with nothing to run idles in it. The transfer to the
    next stage is that of the lane with most tokens. At each instant: steps that end are committed, requests that arrive
    are routed, then stage 0 takes the batches of a flight.
    """
    now_s = 0.0
    stage_free_s: dict[int, float] = defaultdict(float)
    ready_s = [0.0 for _ in flights]
    in_flight: dict[int, tuple[list[Batch], float]] = {}
    every = [lane for lanes in flights for lane in lanes]
    flight_of = {lane.lane: i for i, lanes in enumerate(flights) for lane in lanes}
    while True:
        for i, lanes in enumerate(flights):
            if i in in_flight and in_flight[i][1] <= now_s:
                batches, end_s = in_flight.pop(i)
                for lane, batch in zip(lanes, batches, strict=True):
                    lane.commit(batch, end_s)
                ready_s[i] = end_s

        while arrivals.next_s() <= now_s:
            arrival_s = arrivals.next_s()
            routed = arrivals.route_one(every)
            if routed is not None:
                i = flight_of[routed.lane]
                if sum(lane.unfinished for lane in flights[i]) == 1:
                    ready_s[i] = arrival_s

        ready = [i for i, lanes in enumerate(flights) if i not in in_flight and any(lane.unfinished for lane in lanes)]
        if ready and stage_free_s[0] <= now_s:
            i = min(ready, key=lambda i: (ready_s[i], i))
            batches = [lane.plan(now_s) for lane in flights[i]]
            if all(batch.is_empty() for batch in batches):
                require_no_work(*flights[i])
            features = [batch.features() for batch in batches]
            transfer = max(transfer_s(decodes + sum(new for new, _ in items)) for decodes, _, items in features)
            end_s = now_s
            for stage, seconds in enumerate(stage_s(features)):
                begin_s = now_s if stage == 0 else max(end_s + transfer, stage_free_s[stage])
                end_s = begin_s + seconds
                stage_free_s[stage] = end_s
            for lane, batch in zip(flights[i], batches, strict=True):
                if not batch.is_empty():
                    log.add(lane, batch, now_s, end_s)
            in_flight[i] = (batches, end_s)
            ready.remove(i)

        wake_s = min([arrivals.next_s(), *(end_s for _, end_s in in_flight.values())])
        if ready:
            wake_s = min(wake_s, stage_free_s[0])
        if wake_s == inf:
            return
        now_s = wake_s
        yield until(env, now_s)


def require_no_work(*lanes: Scheduler) -> None:
    for lane in lanes:
        if lane.unfinished:
            raise RuntimeError(f"lane {lane.lane} has {lane.unfinished} unfinished requests and nothing it can run")


def run_oracle(
    config: OracleConfig,
    step_s: StepTime,
    arrivals: Sequence[float],
    prompts: Sequence[int],
    outputs: Sequence[int],
    *,
    tokens: bool = False,
    records: bool = False,
    group_step_s: GroupStepTime | None = None,
) -> dict[str, Any]:
    """One replica under an open stream of arrivals (s)."""
    env, log = simpy.Environment(), Log([] if records else None)
    requests = make_requests(arrivals, prompts, outputs, tokens)
    scheduler = Scheduler(config)
    env.process(replica(env, scheduler, step_s, Arrivals(requests), log, group_step_s))
    env.run()
    return result(requests, [scheduler], log, tokens)


def run_oracle_closed_loop(
    config: OracleConfig,
    step_s: StepTime,
    concurrency: int,
    prompts: Sequence[int],
    outputs: Sequence[int],
    *,
    tokens: bool = False,
    records: bool = False,
    group_step_s: GroupStepTime | None = None,
) -> dict[str, Any]:
    """One replica that `concurrency` clients keep busy: a request that finishes or is rejected starts the next."""
    env, log = simpy.Environment(), Log([] if records else None)
    requests = make_requests([0.0] * len(prompts), prompts, outputs, tokens)
    scheduler = Scheduler(config)
    env.process(replica(env, scheduler, step_s, Arrivals(requests, concurrency), log, group_step_s))
    env.run()
    return result(requests, [scheduler], log, tokens)


def run_oracle_lockstep(
    config: OracleConfig,
    lanes: int,
    coupled_s: Callable[[list[Features]], float],
    arrivals: Sequence[float],
    prompts: Sequence[int],
    outputs: Sequence[int],
    *,
    tokens: bool = False,
    records: bool = False,
) -> dict[str, Any]:
    """Attention-DP: every lane has the whole config for itself; coupled_s sees (0, 0, []) for a lane that idles."""
    env, log = simpy.Environment(), Log([] if records else None)
    requests = make_requests(arrivals, prompts, outputs, tokens)
    schedulers = [Scheduler(config, lane) for lane in range(lanes)]
    env.process(lockstep(env, schedulers, coupled_s, Arrivals(requests), log))
    env.run()
    return result(requests, schedulers, log, tokens)


def run_oracle_pipeline(
    config: OracleConfig,
    lanes: int,
    stage_s: StageTimes,
    transfer_s: Callable[[int], float],
    arrivals: Sequence[float],
    prompts: Sequence[int],
    outputs: Sequence[int],
    *,
    tokens: bool = False,
    records: bool = False,
) -> dict[str, Any]:
    """A pipelined replica: kv_blocks are shared out evenly over the lanes, the other limits hold per lane."""
    return run_oracle_staged_lockstep(
        config,
        lanes,
        1,
        lambda batches: stage_s(*batches[0]),
        transfer_s,
        arrivals,
        prompts,
        outputs,
        tokens=tokens,
        records=records,
    )


def run_oracle_staged_lockstep(
    config: OracleConfig,
    flights: int,
    groups: int,
    stage_s: Callable[[list[Features]], Sequence[float]],
    transfer_s: Callable[[int], float],
    arrivals: Sequence[float],
    prompts: Sequence[int],
    outputs: Sequence[int],
    *,
    tokens: bool = False,
    records: bool = False,
) -> dict[str, Any]:
    """A pipelined replica of attention groups: each group's kv_blocks are shared out evenly over the flights.

    Lane = flight * groups + group; stage_s sees the batches of a flight's lanes, (0, 0, []) for one that idles.
    """
    env, log = simpy.Environment(), Log([] if records else None)
    requests = make_requests(arrivals, prompts, outputs, tokens)
    share = replace(config, kv_blocks=config.kv_blocks // flights)
    schedulers = [Scheduler(share, lane) for lane in range(flights * groups)]
    together = [schedulers[first : first + groups] for first in range(0, len(schedulers), groups)]
    env.process(pipeline(env, together, stage_s, transfer_s, Arrivals(requests), log))
    env.run()
    return result(requests, schedulers, log, tokens)


def make_requests(
    arrivals: Sequence[float], prompts: Sequence[int], outputs: Sequence[int], tokens: bool
) -> list[Request]:
    return [
        Request(i, float(arrival), int(prompt), int(output), token_s=[] if tokens else None)
        for i, (arrival, prompt, output) in enumerate(zip(arrivals, prompts, outputs, strict=True))
    ]


def result(requests: list[Request], lanes: list[Scheduler], log: Log, tokens: bool) -> dict[str, Any]:
    """Arrays over the requests; a run that lost a request or a block raises."""
    require_no_work(*lanes)
    for lane in lanes:
        if lane.free_blocks != lane.config.kv_blocks:
            raise RuntimeError(f"free_blocks(={lane.free_blocks}) must end at kv_blocks(={lane.config.kv_blocks}).")
    names = ("arrival_s", "first_schedule_s", "first_token_s", "finish_s", "preemptions", "rejected", "lane")
    out: dict[str, Any] = {name: np.array([getattr(request, name) for request in requests]) for name in names}
    if tokens:
        out["token_s"] = [request.token_s for request in requests]
    if log.steps is not None:
        out["steps"] = log.steps
    return out
