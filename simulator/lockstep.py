"""Attention data parallelism in time: several schedulers that begin every step together and wait for the slowest."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from hwmodels.step_model import StepModel
from simulator.attentiongroups import AttentionGroups
from simulator.log import Log
from simulator.replica import Before, steps_ended, steps_until
from simulator.scheduler import Scheduler


class LockstepReplica(AttentionGroups):
    """Attention groups of one replica; the same interface as Replica.

    A request joins the group with the fewest unfinished requests. Steps are taken together for as long as no run ends
    and the same group stays the slowest.

    before_prompts_s   seconds that a step with prompts waits first, by a group's chunks, and the others with it; None:
                       none
    """

    __slots__ = ("_first", "_slope", "_start", "_steps", "before_prompts_s", "end", "now")

    def __init__(self, model: StepModel, schedulers: Sequence[Scheduler], log: Log, index: int) -> None:
        super().__init__(model, schedulers, log, index)
        self.now = 0.0
        self.end = inf
        self.before_prompts_s: Before | None = None
        self._start = self._first = self._slope = 0.0
        self._steps = 0

    def enqueue(self, request: int, at_s: float) -> None:
        """A request arrives at the group with the fewest unfinished requests."""
        log = self.log
        log.replica[request] = self.index
        unfinished = [scheduler.unfinished for scheduler in self.schedulers]
        lane = unfinished.index(min(unfinished))
        scheduler = self.schedulers[lane]
        if not scheduler.offer(request, at_s):
            log.rejected.append(request)
            return
        log.lane[request] = lane
        may_join = scheduler.waiting[0] == request
        if may_join:
            self.changed.add(lane)
        if self.end == inf:
            self.now = max(self.now, at_s)
        elif may_join and self._steps > 1:
            self._shorten(at_s)

    def expect(self, request: int) -> int | None:
        """The lane that has set blocks aside for KV to come, None while there is none."""
        for lane in sorted(range(len(self.schedulers)), key=lambda lane: self.schedulers[lane].unfinished):
            if self.schedulers[lane].expect(request):
                return lane
        return None

    def land(self, request: int, lane: int, at_s: float) -> None:
        """The KV of an expected request has come."""
        self.log.replica[request] = self.index
        self.log.lane[request] = lane
        self.schedulers[lane].land(request)
        self.disturb(lane, at_s)

    def load_ended(self, request: int, lane: int, at_s: float) -> None:
        """The KV that an admitted request waited for has been loaded."""
        self.schedulers[lane].load_ended(request)
        self.disturb(lane, at_s)

    def disturb(self, lane: int, at_s: float) -> None:
        """Something may change in the lane's next step."""
        self.changed.add(lane)
        if self.end == inf:
            self.now = max(self.now, at_s)
        elif self._steps > 1:
            self._shorten(at_s)

    def halt(self, at_s: float) -> Sequence[int]:
        """Stop for good, after the steps that have ended by now; the requests that are left without a replica."""
        steps = steps_ended(self._first, self._slope, at_s - self._start, self._steps - 1) if self.end < inf else 0
        if steps and not any(self._prompts):
            self._steps = steps
            self.end = self._start + steps * (self._first + self._slope * (steps - 1) / 2)
            self.commit()
        self.end = inf
        return self.evict()

    def _shorten(self, at_s: float) -> None:
        """Let the planned steps end at the first step boundary at or after `at_s`."""
        self._steps = steps_until(self._first, self._slope, at_s - self._start, self._steps)
        self.end = self._start + self._steps * (self._first + self._slope * (self._steps - 1) / 2)

    def coast(self, until_s: float) -> None:
        """Nothing: plan takes as many steps as pass unchanged."""

    def plan(self, horizon_s: float) -> float:
        """Decide the next step or steps, starting now; the time they end, inf if there is nothing to do."""
        start = self._start = self.now
        ends = self.form(start)
        if ends == inf:
            self.end = inf
            return inf
        first, slope, steps = self._line(0, int(ends) - self._taken)
        first += self.model.overhead_s(max(self._sampled), any(self._prompts))
        if self.before_prompts_s is not None:
            first += self.before_s(self.before_prompts_s)
        self._first = first
        self._slope = slope
        self._steps = steps
        self.end = start + steps * (first + slope * (steps - 1) / 2)
        if steps > 1 and horizon_s < self.end:
            self._shorten(horizon_s)
        if self.log.watch is not None:
            self.tell(start, self.end)
        return self.end

    def commit(self) -> Sequence[int]:
        """Take the planned steps; the requests that finished."""
        end = self.now = self.end
        self.log.events += 1
        if self.log.segments is not None:
            self.record(self._start, end, self._steps, self._slope)
        return self.take(self._steps, end)
