"""Requests arrive and replicas serve them, on SimPy's clock."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import numpy as np
import simpy
from numpy.typing import NDArray
from simpy.events import NORMAL, URGENT, EventPriority

from hwmodels.energy import power_w
from hwmodels.work import Steps
from simulator.deployment import AnyReplica, Deployment
from simulator.log import Log
from simulator.result import STEP_COLUMNS, Result, RunTotals, request_frame, span_frame, step_frame
from simulator.workload import Requests, Workload

Progress = Callable[[int], None]
Stop = Callable[[Log], bool]
#: Scheduling decisions a replica takes between two looks at the clock when nobody else can be affected by them.
STRIDE = 512


class Overrun(Exception):
    """A run that was stopped because it had become pointless; `log` is what had happened."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self.log = log


def simulate(
    deployment: Deployment,
    workload: Workload | Requests,
    seed: int = 0,
    *,
    record: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Serve the workload and return what happened.

    record     whether to keep the step log, which the distribution of inter-token times, the use of the devices and
               the timeline are made from
    progress   called now and then with the scheduling decisions taken since the last call

    The same arguments give the same result. Requests that can never fit are rejected and counted.
    """
    log = run(deployment, workload, seed, record=record, progress=progress)
    return collect(deployment, workload, log, seed)


def run(
    deployment: Deployment,
    workload: Workload | Requests,
    seed: int = 0,
    *,
    record: bool = False,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Log:
    """Serve the workload; only the log, for callers that run many times.

    stop   asked now and then whether what happened so far makes the rest pointless; raises Overrun if it does
    """
    if isinstance(workload, Requests):
        workload = Workload(workload)
    requests = workload.requests
    rng = np.random.default_rng(seed)
    log = Log(len(requests), record=record)
    prompts, outputs = requests.prompt_tokens.tolist(), requests.output_tokens.tolist()
    replicas = [spec.start(prompts, outputs, log, index) for index, spec in enumerate(deployment.replicas)]
    env = simpy.Environment()
    log.arrival_s = requests.arrival_s

    def look(events: int) -> None:
        if progress is not None:
            progress(events)
        if stop is not None and stop(log):
            raise Overrun(log)

    try:
        _serve(env, deployment, workload, replicas, rng, log, look)
    finally:
        log.extremes(scheduler for replica in replicas for scheduler in replica.schedulers)
    return log


def _serve(
    env: simpy.Environment,
    deployment: Deployment,
    workload: Workload,
    replicas: Sequence[AnyReplica],
    rng: np.random.Generator,
    log: Log,
    look: Progress,
) -> None:
    """Let the replicas serve the workload, each for itself where nothing joins them."""
    requests, router = workload.requests, deployment.router
    shares = np.array([spec.share for spec in deployment.replicas], dtype=float)
    if workload.concurrency is None and (router.assign is not None or len(replicas) == 1):
        assigned = router.assign(len(requests), shares, rng) if router.assign else np.zeros(len(requests), dtype=int)
        for index, replica in enumerate(replicas):
            mine = np.flatnonzero(assigned == index)
            env.process(_alone(env, replica, requests.arrival_s[mine].tolist(), mine.tolist(), look))
        env.run()
        return
    loads = [_Load() for _ in replicas]
    if router.assign is not None:
        fixed = iter(router.assign(len(requests), shares, rng).tolist())
        route = lambda: next(fixed)  # noqa: E731
    else:
        choose = router.choose
        assert choose is not None
        route = lambda: choose(loads, shares, rng)  # noqa: E731
    together = _Together(env, replicas, loads, route, workload, log, look)
    together.start()
    env.run()
    log.arrival_s = np.array(together.arrival_s)


def _alone(
    env: simpy.Environment,
    replica: AnyReplica,
    arrivals_s: Sequence[float],
    requests: Sequence[int],
    look: Progress,
) -> Generator[simpy.Event, None, None]:
    """Serve requests whose arrivals are known and that nobody else affects; look at the clock every STRIDE events."""
    enqueue, coast, plan, commit = replica.enqueue, replica.coast, replica.plan, replica.commit
    position, count = 0, len(requests)
    upcoming = arrivals_s[0] if count else inf
    events = 0
    while True:
        coast(upcoming)
        while upcoming <= replica.now:
            enqueue(requests[position], upcoming)
            position += 1
            upcoming = arrivals_s[position] if position < count else inf
        end = plan(upcoming)
        if end == inf and upcoming == inf:
            break
        if end == inf:
            end = upcoming
        while upcoming <= end:
            enqueue(requests[position], upcoming)
            position += 1
            upcoming = arrivals_s[position] if position < count else inf
            if replica.end < inf:
                end = replica.end
        if replica.end == inf:
            continue
        commit()
        events += 1
        if events == STRIDE:
            yield env.timeout(max(0.0, replica.now - env.now))
            look(events)
            events = 0
    yield env.timeout(max(0.0, replica.now - env.now))
    look(events)


@dataclass(slots=True)
class _Load:
    """A replica as a router sees it."""

    outstanding_tokens: int = 0


class _Together:
    """Replicas that affect each other: a router that looks at loads, or clients that wait for their answers."""

    def __init__(
        self,
        env: simpy.Environment,
        replicas: Sequence[AnyReplica],
        loads: Sequence[_Load],
        route: Callable[[], int],
        workload: Workload,
        log: Log,
        look: Progress,
    ) -> None:
        self.env = env
        self.replicas = replicas
        self.loads = loads
        self.route = route
        self.log = log
        self.look = look
        self.closed = workload.concurrency is not None
        self.think_s = workload.think_s
        self.arrival_s = workload.requests.arrival_s.tolist()
        self.prompts = workload.requests.prompt_tokens.tolist()
        self.coming = iter(range(len(workload.requests)))
        self.first = workload.concurrency or 1
        self.pending = [False] * len(replicas)  # whether a replica is about to plan at this very instant
        self.version = [0] * len(replicas)  # outdated wake-ups are ignored
        self.commits = 0

    def start(self) -> None:
        """Let the first requests in."""
        for request in range(min(self.first, len(self.arrival_s))):
            self._arrives(0.0 if self.closed else self.arrival_s[request])

    def _at(self, when_s: float, priority: EventPriority, act: Callable[[], None]) -> None:
        """Call `act` at an absolute time; arrivals come before decisions of the same instant."""
        event = self.env.event()
        event.callbacks.append(lambda _: act())
        event._ok = True
        event._value = None
        self.env.schedule(event, priority=priority, delay=max(0.0, when_s - self.env.now))

    def _arrives(self, when_s: float) -> None:
        self._at(when_s, URGENT, lambda: self._arrive(when_s))

    def _arrive(self, now_s: float) -> None:
        request = next(self.coming, None)
        if request is None:
            return
        self.arrival_s[request] = now_s
        index = self.route()
        replica = self.replicas[index]
        before = replica.end
        rejected = len(self.log.rejected)
        replica.enqueue(request, now_s)
        if before == inf:
            self._plan_at(index, now_s)
        elif replica.end != before:
            self._wake_at(index, replica.end)
        accepted = len(self.log.rejected) == rejected
        if accepted:
            self.loads[index].outstanding_tokens += self.prompts[request]
        if self.closed:
            if not accepted:
                self._arrives(now_s + self.think_s)
        elif request + 1 < len(self.arrival_s):
            self._arrives(self.arrival_s[request + 1])

    def _leave(self, index: int, request: int, now_s: float) -> None:
        self.loads[index].outstanding_tokens -= self.prompts[request]
        if self.closed:
            self._arrives(now_s + self.think_s)

    def _plan_at(self, index: int, when_s: float) -> None:
        if not self.pending[index]:
            self.pending[index] = True
            self._at(when_s, NORMAL, lambda: self._plan(index))

    def _plan(self, index: int) -> None:
        self.pending[index] = False
        end = self.replicas[index].plan(inf)
        if end < inf:
            self._wake_at(index, end)

    def _wake_at(self, index: int, when_s: float) -> None:
        version = self.version[index] = self.version[index] + 1
        self._at(when_s, NORMAL, lambda: self._commit(index, version))

    def _commit(self, index: int, version: int) -> None:
        if version != self.version[index]:
            return
        replica = self.replicas[index]
        for request in replica.commit():
            finish_s = self.log.finish_s[request]
            if finish_s > replica.now:  # on its way through the stages of a pipeline
                self._at(finish_s, URGENT, partial(self._leave, index, request, finish_s))
            else:
                self._leave(index, request, finish_s)
        self.commits += 1
        if self.commits % STRIDE == 0:
            self.look(STRIDE)
        self._plan_at(index, replica.now)


def collect(deployment: Deployment, workload: Workload | Requests, log: Log, seed: int) -> Result:
    """The log as frames, with the totals of the run."""
    requests = workload if isinstance(workload, Requests) else workload.requests
    count = len(requests)
    rejected = np.zeros(count, dtype=bool)
    rejected[log.rejected] = True
    preemptions = np.zeros(count, dtype=int)
    preemptions[list(log.preemptions)] = list(log.preemptions.values())
    finish_s = np.array(log.finish_s)
    frame = request_frame(
        arrival_s=log.arrival_s,
        first_schedule_s=log.first_schedule_s,
        first_token_s=log.first_token_s,
        finish_s=finish_s,
        prompt_tokens=requests.prompt_tokens,
        output_tokens=requests.output_tokens,
        rejected=rejected,
        replica=log.replica,
        lane=log.lane,
        preemptions=preemptions,
        class_codes=requests.slo_class,
        class_names=requests.class_names,
    )
    served = finish_s[~rejected]
    makespan_s = float(served.max() - np.min(log.arrival_s)) if len(served) else 0.0
    table = None if log.segments is None else np.frombuffer(log.segments, dtype=float).reshape(-1, len(STEP_COLUMNS))
    flops, moved, energy_j = _consumption(deployment, table, makespan_s)
    devices = [(spec.device, spec.mapping.gpus) for spec in deployment.replicas]
    prices = [device.price_usd_per_h for device, _ in devices]
    idle = deployment.idle_gpus
    price = None
    if devices and all(value is not None for value in prices):
        price = sum(gpus * (device.price_usd_per_h or 0.0) for device, gpus in devices)
        price += idle * (devices[0][0].price_usd_per_h or 0.0)
    totals = RunTotals(
        gpus=deployment.gpus + idle,
        replicas=len(deployment.replicas),
        makespan_s=makespan_s,
        model_flops=flops,
        hbm_bytes=moved,
        energy_j=energy_j,
        price_usd_per_h=price,
        peak_flops_per_s=sum(
            spec.mapping.gpus * spec.device.peak_flops_per_s[spec.arithmetic_dtype] for spec in deployment.replicas
        ),
        memory_bytes_per_s=sum(device.memory_bytes_per_s * gpus for device, gpus in devices),
        lanes=tuple(spec.lanes for spec in deployment.replicas),
        kv_blocks=tuple(spec.kv_blocks for spec in deployment.replicas),
        seed=seed,
        events=log.events,
    )
    steps = None if table is None else step_frame(table)
    spans = None if table is None else span_frame(log.last_spans(requests.output_tokens))
    return Result(frame, steps, spans, totals)


def _consumption(
    deployment: Deployment, table: NDArray[np.float64] | None, makespan_s: float
) -> tuple[float, float, float]:
    """FLOPs, bytes and joules of the run; NaN where the steps were not recorded."""
    nan = float("nan")
    if table is None or any(spec.work is None for spec in deployment.replicas):
        return nan, nan, nan
    columns = {name: table[:, position] for position, name in enumerate(STEP_COLUMNS)}
    flops = moved = joules = 0.0
    for index, spec in enumerate(deployment.replicas):
        mine = columns["replica"] == index
        device, mapping, work = spec.device, spec.mapping, spec.work
        assert work is not None
        names = ("decode_sequences", "decode_context_tokens", "prefill_tokens", "prefill_pairs", "prefill_sequences")
        steps = Steps(columns["steps"][mine], *(columns[name][mine] for name in names))
        step_flops, step_bytes = work.of(steps)
        # A lane keeps its tensor-parallel ranks busy, in a pipeline those of one stage after the other.
        busy_s = (columns["end_s"] - columns["start_s"])[mine]
        on_s = np.maximum(busy_s, 1e-12) * mapping.tp
        compute = step_flops / (on_s * device.peak_flops_per_s[spec.arithmetic_dtype])
        memory = step_bytes / (on_s * device.memory_bytes_per_s)
        power = power_w(device, np.minimum(compute, 1.0), np.minimum(memory, 1.0)) - device.idle_w
        flops += float(step_flops.sum())
        moved += float(step_bytes.sum())
        joules += float((power * busy_s).sum()) * mapping.tp + device.idle_w * mapping.gpus * makespan_s
    if deployment.replicas:
        joules += deployment.idle_gpus * deployment.replicas[0].device.idle_w * makespan_s
    return flops, moved, joules
