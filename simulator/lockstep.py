"""Attention data parallelism in time: several schedulers that begin every step together and wait for the slowest."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from hwmodels.step_model import StepModel
from simulator.log import Log
from simulator.replica import steps_until
from simulator.scheduler import Scheduler


class LockstepReplica:
    """Attention groups of one replica; the same interface as Replica.

    A request joins the group with the fewest unfinished requests. While no group's batch can change, steps are taken
    together for as long as the same group stays the slowest: its affine step times then are the replica's.
    """

    __slots__ = (
        "_contexts",
        "_first",
        "_slope",
        "_start",
        "_steps",
        "end",
        "index",
        "log",
        "model",
        "now",
        "schedulers",
    )

    def __init__(self, model: StepModel, schedulers: Sequence[Scheduler], log: Log, index: int) -> None:
        self.model = model
        self.schedulers = schedulers
        self.log = log
        self.index = index
        self.now = 0.0
        self.end = inf
        self._steps = 0
        self._start = 0.0
        self._first = 0.0
        self._slope = 0.0
        self._contexts: list[tuple[int, int]] = []

    @property
    def outstanding_tokens(self) -> int:
        """The load a router sees."""
        return sum(scheduler.outstanding_tokens for scheduler in self.schedulers)

    def enqueue(self, request: int, at_s: float) -> None:
        """A request arrives at the group with the fewest unfinished requests."""
        log = self.log
        log.replica[request] = self.index
        lane = min(range(len(self.schedulers)), key=lambda i: self.schedulers[i].unfinished)
        scheduler = self.schedulers[lane]
        if not scheduler.accepts(request):
            log.rejected.append(request)
            return
        log.lane[request] = lane
        may_join = not scheduler.waiting
        scheduler.enqueue(request)
        if self.end == inf:
            self.now = max(self.now, at_s)
        elif may_join and self._steps > 1:
            self._shorten(at_s)

    def _shorten(self, at_s: float) -> None:
        """Let the planned steps end at the first step boundary at or after `at_s`."""
        self._steps = steps_until(self._first, self._slope, at_s - self._start, self._steps)
        self.end = self._start + self._steps * (self._first + self._slope * (self._steps - 1) / 2)

    def plan(self, horizon_s: float) -> float:
        """Decide the next step or steps, starting now; the time they end, inf if there is nothing to do."""
        log = self.log
        start = self._start = self.now
        busy = prefills = False
        settled = True
        batches = []
        for lane, scheduler in enumerate(self.schedulers):
            if scheduler.form():
                busy = True
            if scheduler.preempted:
                log.preempted(scheduler, self.index, lane)
            settled = settled and scheduler.settled
            if scheduler.chunks:
                prefills = True
                log.scheduled(scheduler, start)
            running = scheduler.running if scheduler.decode_runs else 0
            batches.append((running, scheduler.context if running else 0, [chunk[1:] for chunk in scheduler.chunks]))
        if not busy:
            self.end = inf
            return inf
        self._contexts = [(running, context) for running, context, _ in batches]
        self._first = self.model.lockstep_s(batches)
        self._slope = 0.0
        self._steps = 1
        if settled and not prefills:
            steps = min(scheduler.settled_steps() for scheduler in self.schedulers if scheduler.decode_runs)
            if steps > 1:
                self._steps, self._slope = self._affine_steps(steps)
        self.end = start + self._steps * (self._first + self._slope * (self._steps - 1) / 2)
        if self._steps > 1 and horizon_s < self.end:
            self._shorten(horizon_s)
        return self.end

    def _affine_steps(self, steps: int) -> tuple[int, float]:
        """For how many of the next `steps` decode steps one group stays the slowest, and how much longer each gets.

        Group times are affine in the step, so the slowest group is overtaken where its line meets a steeper one.
        """
        runs = [self.model.group_run(running, context) for running, context in self._contexts if running]
        first, slope, _ = max(runs)
        steps = int(min(steps, *(limit for _, _, limit in runs)))
        for other_first, other_slope, _ in runs:
            if other_slope > slope:
                meet = (first - other_first) / (other_slope - slope)
                if meet < steps - 1:
                    steps = int(meet) + 1
        return steps, slope

    def commit(self) -> Sequence[int]:
        """Take the planned steps; the requests that finished."""
        log = self.log
        end = self.now = self.end
        log.events += 1
        ended: list[int] = []
        for lane, scheduler in enumerate(self.schedulers):
            if not scheduler.decode_runs and not scheduler.chunks:
                continue
            if log.segments is not None:
                running, context = self._contexts[lane]
                log.record(self.index, lane, self._start, end, self._steps, self._slope, running, context, scheduler)
            log.prefilled(scheduler, end)
            finished = scheduler.advance(self._steps)
            for request in finished:
                log.finish_s[request] = end
            ended += finished
        return ended
