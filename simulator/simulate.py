"""Requests arrive and replicas serve them, on SimPy's clock."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import numpy as np
import simpy
from simpy.events import NORMAL, URGENT, EventPriority

from simulator.collect import collect
from simulator.deployment import AnyReplica, Deployment
from simulator.log import Log
from simulator.result import Result
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
    frontend_s = deployment.frontend_s
    reaching_s = requests.arrival_s + frontend_s
    if workload.concurrency is None and (router.assign is not None or len(replicas) == 1):
        assigned = router.assign(len(requests), shares, rng) if router.assign else np.zeros(len(requests), dtype=int)
        for index, replica in enumerate(replicas):
            mine = np.flatnonzero(assigned == index)
            env.process(_alone(env, replica, reaching_s[mine].tolist(), mine.tolist(), look))
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
    together = _Together(env, replicas, loads, route, workload, reaching_s.tolist(), frontend_s, log, look)
    together.start()
    env.run()
    if workload.concurrency is not None:
        log.arrival_s = np.array(together.arrival_s) - frontend_s


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
        arrival_s: list[float],
        frontend_s: float,
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
        self.frontend_s = frontend_s
        self.pause_s = workload.think_s + frontend_s  # from an answer to the next request's arrival
        self.arrival_s = arrival_s  # at the schedulers
        self.prompts = workload.requests.prompt_tokens.tolist()
        self.coming = iter(range(len(workload.requests)))
        self.first = workload.concurrency or 1
        self.pending = [False] * len(replicas)  # whether a replica is about to plan at this very instant
        self.version = [0] * len(replicas)  # outdated wake-ups are ignored
        self.commits = 0

    def start(self) -> None:
        """Let the first requests in."""
        for request in range(min(self.first, len(self.arrival_s))):
            self._arrives(self.frontend_s if self.closed else self.arrival_s[request])

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
                self._arrives(now_s + self.pause_s)
        elif request + 1 < len(self.arrival_s):
            self._arrives(self.arrival_s[request + 1])

    def _leave(self, index: int, request: int, now_s: float) -> None:
        self.loads[index].outstanding_tokens -= self.prompts[request]
        if self.closed:
            self._arrives(now_s + self.pause_s)

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
