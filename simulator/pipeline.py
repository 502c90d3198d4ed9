"""Pipeline parallelism in time: one scheduler per micro-batch in flight, stages that wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from hwmodels.step_model import StepModel
from simulator.log import Log
from simulator.scheduler import Scheduler


class PipelineReplica:
    """As many schedulers as stages, each with its share of the KV blocks, like vLLM's virtual engines.

    A scheduler's next step starts when its last one has left the last stage and the first stage is free; it enters a
    stage when it has left the one before and that stage is free, so bubbles appear by themselves. The interface is
    that of Replica, but `end` is when the next step starts: only then is its batch decided, and the requests that
    `commit` returns finish later, at their `finish_s` in the log.
    """

    __slots__ = ("_free_at", "_leaving", "_next", "_ready", "end", "index", "lanes", "log", "model", "now")

    def __init__(self, model: StepModel, schedulers: Sequence[Scheduler], log: Log, index: int) -> None:
        self.model = model
        self.lanes = schedulers
        self.log = log
        self.index = index
        self.now = 0.0
        self.end = inf
        self._free_at = [0.0] * len(model.stages)
        self._ready = [0.0] * len(schedulers)  # when a scheduler's last step leaves the last stage
        self._leaving = [0] * len(schedulers)  # requests that finish with it
        self._next = 0

    @property
    def outstanding_tokens(self) -> int:
        """The load a router sees."""
        return sum(scheduler.outstanding_tokens for scheduler in self.lanes)

    def enqueue(self, request: int, at_s: float) -> None:
        """A request arrives at the scheduler with the fewest unfinished requests."""
        log = self.log
        log.replica[request] = self.index
        unfinished = [
            scheduler.unfinished + (leaving if ready > at_s else 0)
            for scheduler, leaving, ready in zip(self.lanes, self._leaving, self._ready, strict=True)
        ]
        lane = unfinished.index(min(unfinished))
        scheduler = self.lanes[lane]
        if not scheduler.accepts(request):
            log.rejected.append(request)
            return
        log.lane[request] = lane
        if not scheduler.has_work:
            self._ready[lane] = max(self._ready[lane], at_s)
        scheduler.enqueue(request)
        self.plan(inf)

    def plan(self, horizon_s: float) -> float:
        """Choose the scheduler whose step starts next; the time it starts, inf if there is nothing to do."""
        best = inf
        for lane, scheduler in enumerate(self.lanes):
            if self._ready[lane] < best and scheduler.has_work:
                best = self._ready[lane]
                self._next = lane
        self.end = max(best, self._free_at[0])
        return self.end

    def commit(self) -> Sequence[int]:
        """Start the chosen scheduler's step; the requests it will finish."""
        lane = self._next
        now = self.now = self.end
        scheduler, log, model = self.lanes[lane], self.log, self.model
        scheduler.form()
        log.events += 1
        if scheduler.preempted:
            log.preempted(scheduler, self.index, lane)
        log.scheduled(scheduler, now)
        running = scheduler.running if scheduler.decode_runs else 0
        context = scheduler.context if running else 0
        items = [chunk[1:] for chunk in scheduler.chunks]
        transfer = model.transfer[running + sum(new for new, _ in items)]
        at = now - transfer
        free_at = self._free_at
        for stage, busy in enumerate(model.stages_s(running, context, items)):
            at = max(at + transfer, free_at[stage]) + busy
            free_at[stage] = at
        if log.segments is not None:
            log.record(self.index, lane, now, at, 1, 0.0, running, context, scheduler)
        log.prefilled(scheduler, at)
        finished = scheduler.advance(1)
        self._ready[lane] = at
        self._leaving[lane] = len(finished)
        for request in finished:
            log.finish_s[request] = at
        return finished
