"""Pipeline parallelism in time: one scheduler per micro-batch in flight, stages that wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Protocol

from hwmodels.step_model import StepModel
from simulator.log import Log
from simulator.replica import Before
from simulator.scheduler import Scheduler


class Flight(Protocol):
    """What forms one of the micro-batches in flight, again and again."""

    @property
    def has_work(self) -> bool:
        """Whether a micro-batch would not be empty."""
        ...


class PipelineReplica:
    """As many schedulers as stages, each with its share of the KV blocks, like vLLM's virtual engines.

    A scheduler's next step starts when its last one has left the last stage and the first stage is free; it enters a
    stage when it has left the one before and that stage is free, so bubbles appear by themselves. The interface is
    that of Replica, but `end` is when the next step starts: only then is its batch decided, and the requests that
    `commit` returns finish later, at their `finish_s` in the log.

    before_prompts_s   seconds that a step with prompts waits first in the first stage, by its chunks; None: none

    Where several schedulers form a micro-batch together (simulator/lockstepstages.py), `_flights` has what they form it
    in, one for as many schedulers as the others; here every scheduler is one of its own.
    """

    __slots__ = (
        "_done",
        "_flights",
        "_free_at",
        "_horizon_s",
        "_leaving",
        "_next",
        "_ready",
        "_runs",
        "_steps",
        "_transfers",
        "_width",
        "before_prompts_s",
        "end",
        "index",
        "log",
        "model",
        "now",
        "schedulers",
    )

    def __init__(
        self,
        model: StepModel,
        schedulers: Sequence[Scheduler],
        log: Log,
        index: int,
        flights: Sequence[Flight] | None = None,
    ) -> None:
        self.model = model
        self.schedulers = schedulers
        self.log = log
        self.index = index
        self.now = 0.0
        self.end = inf
        self.before_prompts_s: Before | None = None
        self._flights = schedulers if flights is None else flights
        count = len(self._flights)
        self._width = len(schedulers) // count
        self._free_at = [0.0] * len(model.stages)
        self._ready = [0.0] * count  # when a flight's last step leaves the last stage
        self._leaving = [0] * len(schedulers)  # requests that finish with it, by scheduler
        self._next = 0
        self._horizon_s = -inf
        # While a flight's batch cannot change, its steps are taken from affine stage times and told to it later.
        self._steps = [0] * count  # of its run; 0 where it is in none
        self._done = [0] * count  # steps of the run that have started
        self._runs: list[list[tuple[float, float]]] = [[] for _ in range(count)]  # first and slope by stage
        self._transfers = [0.0] * count

    def enqueue(self, request: int, at_s: float) -> None:
        """A request arrives at the scheduler with the fewest unfinished requests."""
        log, width = self.log, self._width
        log.replica[request] = self.index
        readies = self._ready if width == 1 else [ready for ready in self._ready for _ in range(width)]
        unfinished = [
            scheduler.unfinished + (leaving if ready > at_s else 0)
            for scheduler, leaving, ready in zip(self.schedulers, self._leaving, readies, strict=True)
        ]
        lane = unfinished.index(min(unfinished))
        scheduler, flight = self.schedulers[lane], lane // width
        idle = not self._flights[flight].has_work
        if not scheduler.offer(request, at_s):
            log.rejected.append(request)
            return
        log.lane[request] = lane
        if scheduler.waiting[0] == request:
            self._form_anew(lane)
            if self._ready[flight] == inf:  # its other schedulers wait for blocks
                self._ready[flight] = at_s
        if idle:
            self._ready[flight] = max(self._ready[flight], at_s)
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
        self._awake(lane, at_s)
        self.schedulers[lane].land(request)
        self.disturb(lane, at_s)

    def load_ended(self, request: int, lane: int, at_s: float) -> None:
        """The KV that an admitted request waited for has been loaded."""
        self._awake(lane, at_s)
        self.schedulers[lane].load_ended(request)
        self.disturb(lane, at_s)

    def disturb(self, lane: int, at_s: float) -> None:
        """Something may change in the lane's next step."""
        self._form_anew(lane)
        flight = lane // self._width
        if self._ready[flight] == inf:
            self._ready[flight] = at_s
        self.plan(inf)

    def _awake(self, lane: int, at_s: float) -> None:
        """A lane whose flight has nothing to do will have: its next step starts no earlier than now."""
        flight = lane // self._width
        if not self._flights[flight].has_work:
            self._ready[flight] = max(self._ready[flight], at_s)

    def _form_anew(self, lane: int) -> None:
        """Let the lane form its next batch even in a run, after telling it the steps that have started."""
        if self._steps[lane]:
            self.schedulers[lane].advance(self._done[lane])
            self._steps[lane] = 0

    def halt(self, at_s: float) -> Sequence[int]:
        """Stop for good; the requests that are left without a replica. What has entered the stages leaves them."""
        forgotten: list[int] = []
        for lane, scheduler in enumerate(self.schedulers):
            self._form_anew(lane)
            self.log.lost_kv_blocks += scheduler.blocks_held()
            forgotten += scheduler.evict()
            self.log.preempted(scheduler, self.index, lane)
        self.end = inf
        return forgotten

    def coast(self, until_s: float) -> None:
        """Nothing: commit runs on for as long as nothing changes."""

    def plan(self, horizon_s: float) -> float:
        """Choose the flight whose step starts next; the time it starts, inf if there is nothing to do."""
        # What may arrive unannounced forbids to look ahead.
        self._horizon_s = horizon_s if horizon_s < inf else -inf
        best = inf
        for place, flight in enumerate(self._flights):
            if self._ready[place] < best and flight.has_work:
                best = self._ready[place]
                self._next = place
        self.end = max(best, self._free_at[0])
        return self.end

    def commit(self) -> Sequence[int]:
        """Start the chosen flight's step; the requests it will finish."""
        place = self._next
        now = self.now = self.end
        if self._steps[place]:
            return self._run_on(place, now)
        self.log.events += 1
        return self._begin(place, now)

    def _begin(self, place: int, now: float) -> Sequence[int]:
        """Form a scheduler's step and start it."""
        scheduler, log, model = self.schedulers[place], self.log, self.model
        if not scheduler.form():
            # Nothing to do until blocks come back that another replica's KV holds, or what is being loaded is there.
            self._ready[place] = inf if scheduler.waiting else now
            return ()
        if scheduler.preempted:
            log.preempted(scheduler, self.index, place)
        if scheduler.joined:
            log.joined(scheduler, now)
        log.scheduled(scheduler, now)
        running = scheduler.running if scheduler.decode_runs else 0
        context = scheduler.context if running else 0
        items = scheduler.items
        transfer = model.transfer[running + sum(new for new, _ in items)]
        wait_s = 0.0 if not items or self.before_prompts_s is None else self.before_prompts_s(scheduler.chunks)
        at = self._pass(place, now + wait_s, transfer, model.stages_s(running, context, items))
        if log.segments is not None:
            log.record(self.index, place, now, at, 1, 0.0, running, context, scheduler)
        if not items and scheduler.settled and log.segments is None:
            lines, limit = model.stages_run(running, context)
            steps = int(min(scheduler.settled_steps(), limit))
            if steps > 1:
                self._run(place, lines, transfer, steps)
                return ()
        prefills = bool(items)
        if prefills and log.watch is not None:
            log.watch(self.index, place, scheduler.chunks, now, at)
        finished = self._finish(place, 1, at)
        if prefills:
            log.prefilled(scheduler, at)
        return finished

    def _pass(self, place: int, now: float, transfer_s: float, times_s: Sequence[float]) -> float:
        """Let a step enter the first stage now; when it leaves the last."""
        free_at = self._free_at
        at = now - transfer_s
        for stage, busy in enumerate(times_s):
            at = max(at + transfer_s, free_at[stage]) + busy
            free_at[stage] = at
        self._ready[place] = at
        return at

    def _run(self, place: int, lines: list[tuple[float, float]], transfer_s: float, steps: int) -> None:
        """Of as many steps with these stage times, the first has started."""
        self._runs[place] = lines
        self._transfers[place] = transfer_s
        self._done[place] = 1
        self._steps[place] = steps
        width = self._width
        for lane in range(place * width, (place + 1) * width):
            self._leaving[lane] = 0

    def _run_on(self, place: int, start_s: float) -> Sequence[int]:
        """Start steps of runs until one ends, a batch has to be formed, or a request may arrive."""
        free_at, ready, done, steps = self._free_at, self._ready, self._done, self._steps
        runs, transfers, horizon_s = self._runs, self._transfers, self._horizon_s
        busy = [i for i, flight in enumerate(self._flights) if flight.has_work]
        while True:
            step = done[place]
            transfer = transfers[place]
            at = start_s - transfer
            for stage, (first, slope) in enumerate(runs[place]):
                at += transfer
                if free_at[stage] > at:
                    at = free_at[stage]
                at += first + slope * step
                free_at[stage] = at
            ready[place] = at
            step += 1
            done[place] = step
            if step == steps[place]:
                steps[place] = 0
                return self._finish(place, step, at)
            best = inf
            for i in busy:
                if ready[i] < best:
                    best = ready[i]
                    place = i
            start_s = free_at[0] if free_at[0] > best else best
            if start_s >= horizon_s or not steps[place]:
                return ()

    def _finish(self, place: int, steps: int, at_s: float) -> Sequence[int]:
        """Tell the scheduler the steps it has taken, the last of which ends at `at_s`."""
        finished = self.schedulers[place].advance(steps)
        self._leaving[place] = len(finished)
        for request in finished:
            self.log.finish_s[request] = at_s
        return finished
