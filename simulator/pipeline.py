"""Pipeline parallelism in time: one scheduler per micro-batch in flight, stages that wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from hwmodels.step_model import StepModel
from simulator.log import Log
from simulator.replica import Before
from simulator.scheduler import Scheduler


class PipelineReplica:
    """As many schedulers as stages, each with its share of the KV blocks, like vLLM's virtual engines.

    A scheduler's next step starts when its last one has left the last stage and the first stage is free; it enters a
    stage when it has left the one before and that stage is free, so bubbles appear by themselves. The interface is
    that of Replica, but `end` is when the next step starts: only then is its batch decided, and the requests that
    `commit` returns finish later, at their `finish_s` in the log.

    before_prompts_s   seconds that a step with prompts waits first in the first stage, by its chunks; None: none
    """

    __slots__ = (
        "_done",
        "_free_at",
        "_horizon_s",
        "_leaving",
        "_left",
        "_next",
        "_ready",
        "_runs",
        "_transfers",
        "before_prompts_s",
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
        self.before_prompts_s: Before | None = None
        self._free_at = [0.0] * len(model.stages)
        self._ready = [0.0] * len(schedulers)  # when a scheduler's last step leaves the last stage
        self._leaving = [0] * len(schedulers)  # requests that finish with it
        self._next = 0
        self._horizon_s = -inf
        # While a scheduler's batch cannot change, its steps are taken from affine stage times and told to it later.
        self._left = [0] * len(schedulers)  # steps still to start of the run
        self._done = [0] * len(schedulers)  # steps started
        self._runs: list[list[tuple[float, float]]] = [[] for _ in schedulers]  # first and slope by stage
        self._transfers = [0.0] * len(schedulers)

    def enqueue(self, request: int, at_s: float) -> None:
        """A request arrives at the scheduler with the fewest unfinished requests."""
        log = self.log
        log.replica[request] = self.index
        unfinished = [
            scheduler.unfinished + (leaving if ready > at_s else 0)
            for scheduler, leaving, ready in zip(self.schedulers, self._leaving, self._ready, strict=True)
        ]
        lane = unfinished.index(min(unfinished))
        scheduler = self.schedulers[lane]
        idle, may_join = not scheduler.has_work, not scheduler.waiting
        if not scheduler.offer(request):
            log.rejected.append(request)
            return
        log.lane[request] = lane
        if self._left[lane] and may_join:
            scheduler.advance(self._done[lane])
            self._left[lane] = 0
        if idle:
            self._ready[lane] = max(self._ready[lane], at_s)
        self.plan(inf)

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
        if not self.schedulers[lane].has_work:
            self._ready[lane] = max(self._ready[lane], at_s)
        self.schedulers[lane].land(request)
        self.disturb(lane, at_s)

    def load_ended(self, request: int, lane: int, at_s: float) -> None:
        """The KV that an admitted request waited for has been loaded."""
        if not self.schedulers[lane].has_work:
            self._ready[lane] = max(self._ready[lane], at_s)
        self.schedulers[lane].load_ended(request)
        self.disturb(lane, at_s)

    def disturb(self, lane: int, at_s: float) -> None:
        """Something may change in the lane's next step."""
        if self._left[lane]:
            self.schedulers[lane].advance(self._done[lane])
            self._left[lane] = 0
        if self._ready[lane] == inf:
            self._ready[lane] = at_s
        self.plan(inf)

    def halt(self, at_s: float) -> Sequence[int]:
        """Stop for good; the requests that are left without a replica. What has entered the stages leaves them."""
        forgotten: list[int] = []
        for lane, scheduler in enumerate(self.schedulers):
            if self._left[lane]:
                scheduler.advance(self._done[lane])
                self._left[lane] = 0
            self.log.lost_kv_blocks += scheduler.blocks_held()
            forgotten += scheduler.evict()
            self.log.preempted(scheduler, self.index, lane)
        self.end = inf
        return forgotten

    def coast(self, until_s: float) -> None:
        """Nothing: commit runs on for as long as nothing changes."""

    def plan(self, horizon_s: float) -> float:
        """Choose the scheduler whose step starts next; the time it starts, inf if there is nothing to do."""
        # What may arrive unannounced forbids to look ahead.
        self._horizon_s = horizon_s if horizon_s < inf else -inf
        best = inf
        for lane, scheduler in enumerate(self.schedulers):
            if self._ready[lane] < best and scheduler.has_work:
                best = self._ready[lane]
                self._next = lane
        self.end = max(best, self._free_at[0])
        return self.end

    def commit(self) -> Sequence[int]:
        """Start the chosen scheduler's step; the requests it will finish."""
        lane = self._next
        now = self.now = self.end
        scheduler, log, model = self.schedulers[lane], self.log, self.model
        free_at = self._free_at
        if self._left[lane]:
            return self._run_on(lane, now)
        log.events += 1
        if not scheduler.form():
            # Nothing to do until blocks come back that another replica's KV holds, or what is being loaded is there.
            self._ready[lane] = inf if scheduler.waiting else now
            return ()
        if scheduler.preempted:
            log.preempted(scheduler, self.index, lane)
        if scheduler.joined:
            log.joined(scheduler, now)
        log.scheduled(scheduler, now)
        running = scheduler.running if scheduler.decode_runs else 0
        context = scheduler.context if running else 0
        items = scheduler.items
        transfer = model.transfer[running + sum(new for new, _ in items)]
        at = now - transfer
        if items and self.before_prompts_s is not None:
            at += self.before_prompts_s(scheduler.chunks)
        for stage, busy in enumerate(model.stages_s(running, context, items)):
            at = max(at + transfer, free_at[stage]) + busy
            free_at[stage] = at
        if log.segments is not None:
            log.record(self.index, lane, now, at, 1, 0.0, running, context, scheduler)
        self._ready[lane] = at
        if not items and scheduler.settled and log.segments is None:
            self._runs[lane], limit = model.stages_run(running, context)
            steps = int(min(scheduler.settled_steps(), limit))
            if steps > 1:
                self._transfers[lane] = transfer
                self._done[lane] = 1
                self._left[lane] = steps - 1
                self._leaving[lane] = 0
                return ()
        prefills = bool(items)
        if prefills and log.watch is not None:
            log.watch(self.index, lane, scheduler.chunks, now, at)
        finished = self._finish(lane, 1, at)
        if prefills:
            log.prefilled(scheduler, at)
        return finished

    def _run_on(self, lane: int, start_s: float) -> Sequence[int]:
        """Start steps of runs until one ends, a batch has to be formed, or a request may arrive."""
        free_at, ready, left, done = self._free_at, self._ready, self._left, self._done
        busy = [i for i, scheduler in enumerate(self.schedulers) if scheduler.has_work]
        horizon_s = self._horizon_s
        while True:
            step = done[lane]
            transfer = self._transfers[lane]
            at = start_s - transfer
            for stage, (first, slope) in enumerate(self._runs[lane]):
                at += transfer
                if free_at[stage] > at:
                    at = free_at[stage]
                at += first + slope * step
                free_at[stage] = at
            ready[lane] = at
            done[lane] = step + 1
            left[lane] -= 1
            if not left[lane]:
                return self._finish(lane, step + 1, at)
            best = inf
            for i in busy:
                if ready[i] < best:
                    best = ready[i]
                    lane = i
            start_s = max(best, free_at[0])
            if start_s >= horizon_s or not left[lane]:
                return ()

    def _finish(self, lane: int, steps: int, at_s: float) -> Sequence[int]:
        """Tell the scheduler the steps it has taken, the last of which ends at `at_s`."""
        finished = self.schedulers[lane].advance(steps)
        self._leaving[lane] = len(finished)
        for request in finished:
            self.log.finish_s[request] = at_s
        return finished
