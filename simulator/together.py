"""Replicas that affect each other, on one clock: a router that looks at loads, or clients that wait for answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import simpy
from simpy.events import NORMAL, URGENT, EventPriority

from simulator.deployment import AnyReplica, Deployment
from simulator.loading import Loading
from simulator.log import Log
from simulator.workload import Workload

#: Called now and then with the scheduling decisions taken since the last call.
Look = Callable[[int], None]
#: Scheduling decisions taken between two such calls.
STRIDE = 512


@dataclass(slots=True)
class Load:
    """A replica as a router sees it."""

    outstanding_tokens: int = 0
    missing_tokens: int = 0


class Together:
    """Replicas that affect each other: a router that looks at loads, or clients that wait for their answers."""

    def __init__(
        self,
        env: simpy.Environment,
        replicas: Sequence[AnyReplica],
        loads: Sequence[Load],
        route: Callable[[], int],
        workload: Workload,
        arrival_s: list[float],
        frontend_s: float,
        log: Log,
        look: Look,
        *,
        deployment: Deployment,
    ) -> None:
        self.env = env
        prefixes = deployment.router.prefixes
        # Where routers want to know what is cached of a request: the caches of each replica.
        schedulers = [replica.schedulers if prefixes else () for replica in replicas]
        self.caches = [[s.cache for s in lanes if s.cache is not None] for lanes in schedulers]
        self.prefixes = prefixes
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
        self.loading: Loading | None = None
        if deployment.tiers is not None:
            self.loading = Loading(deployment, deployment.tiers, replicas, log, self._at, self._load_ended)

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
        self._see(request)
        index = self.route()
        replica = self.replicas[index]
        before = replica.end
        rejected = len(self.log.rejected)
        replica.enqueue(request, now_s)
        self._stirred(index, before, now_s)
        accepted = len(self.log.rejected) == rejected
        if accepted:
            self.loads[index].outstanding_tokens += self.prompts[request]
        if self.closed:
            if not accepted:
                self._arrives(now_s + self.pause_s)
        elif request + 1 < len(self.arrival_s):
            self._arrives(self.arrival_s[request + 1])

    def _stirred(self, index: int, before_s: float, now_s: float) -> None:
        """See to it that a replica acts at the right time, after something that may have changed its plan."""
        replica = self.replicas[index]
        if before_s == inf:
            self._plan_at(index, now_s)
        elif replica.end != before_s:
            self._wake_at(index, replica.end)
        if self.loading is not None:
            self.loading.flush(index, now_s)

    def _load_ended(self, index: int, lane: int, request: int, now_s: float) -> None:
        """What an admitted request waited for has come from below the devices' memory."""
        replica = self.replicas[index]
        before = replica.end
        replica.load_ended(request, lane, now_s)
        self._stirred(index, before, now_s)

    def _see(self, request: int) -> None:
        """Let the router know how much of an arriving request each replica would compute, at the lane that has most."""
        if not self.prefixes:
            return
        prompt = self.prompts[request]
        for load, caches in zip(self.loads, self.caches, strict=True):
            found = 0
            for cache in caches:
                found = max(found, cache.peek(request, prompt - 1))
            load.missing_tokens = prompt - found

    def _finished(self, index: int, request: int) -> None:
        """A step has finished a request, or will when it has left the stages of a pipeline."""
        finish_s = self.log.finish_s[request]
        if finish_s > self.replicas[index].now:
            self._at(finish_s, URGENT, partial(self._leave, index, request, finish_s))
        else:
            self._leave(index, request, finish_s)

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
        if self.loading is not None:
            self.loading.flush(index, self.env.now)

    def _wake_at(self, index: int, when_s: float) -> None:
        version = self.version[index] = self.version[index] + 1
        self._at(when_s, NORMAL, lambda: self._commit(index, version))

    def _commit(self, index: int, version: int) -> None:
        if version != self.version[index]:
            return
        replica = self.replicas[index]
        for request in replica.commit():
            self._finished(index, request)
        if self.loading is not None:
            self.loading.flush(index, replica.now)
        self.commits += 1
        if self.commits % STRIDE == 0:
            self.look(STRIDE)
        self._plan_at(index, replica.now)
