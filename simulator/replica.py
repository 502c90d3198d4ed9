"""One model replica in time: compressed steps of one scheduler, without SimPy.

Events happen when something changes. While nothing can be admitted, a replica decides at once to take as many decode
steps as pass before the next completion or KV shortage; an arrival meanwhile shortens the jump to the step boundary
that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, inf, sqrt

from hwmodels.step_model import StepModel
from simulator.log import Log
from simulator.scheduler import Chunk, Scheduler

#: Seconds that a step with these prompts has to wait before it, such as for their images to be encoded.
Before = Callable[[Sequence[Chunk]], float]


def steps_until(first_s: float, slope_s: float, wait_s: float, limit: int) -> int:
    """Fewest steps, at least 1 and at most `limit`, whose total time reaches `wait_s`; step j takes first + j slope.

    >>> steps_until(1.0, 0.0, 2.5, 10)
    3
    >>> steps_until(1.0, 1.0, 3.0, 10)  # 1 + 2
    2
    """
    if wait_s <= first_s:
        return 1
    if slope_s > 1e-9 * first_s:
        # k first + slope k (k - 1) / 2 = wait
        half = first_s - slope_s / 2
        guess = (sqrt(half * half + 2 * slope_s * wait_s) - half) / slope_s
    else:
        guess = wait_s / first_s
    if guess >= limit + 2:
        return limit
    steps = max(1, ceil(guess) - 1)
    while steps < limit and steps * (first_s + slope_s * (steps - 1) / 2) < wait_s:
        steps += 1
    return steps if steps < limit else limit


def steps_ended(first_s: float, slope_s: float, wait_s: float, limit: int) -> int:
    """Most steps, at most `limit`, whose total time does not exceed `wait_s`; step j takes first + j slope.

    >>> steps_ended(1.0, 0.0, 2.5, 10), steps_ended(1.0, 0.0, 0.5, 10)
    (2, 0)
    """
    if limit < 1:
        return 0
    steps = steps_until(first_s, slope_s, wait_s, limit)
    return steps - (steps * (first_s + slope_s * (steps - 1) / 2) > wait_s)


class Replica:
    """One scheduler on one step model: the next change is decided by `plan`, can be shortened, is taken by `commit`.

    index   where the replica stands in the log
    now     the step boundary reached, in seconds
    end     when the planned steps end; inf when idle
    before_prompts_s   seconds that a step with prompts waits first, by their chunks; None: none
    """

    __slots__ = (
        "_first",
        "_slope",
        "_start",
        "_steps",
        "before_prompts_s",
        "end",
        "index",
        "log",
        "model",
        "now",
        "scheduler",
        "schedulers",
    )

    def __init__(self, model: StepModel, schedulers: Sequence[Scheduler], log: Log, index: int) -> None:
        self.model = model
        self.schedulers = schedulers
        self.scheduler = schedulers[0]
        self.log = log
        self.index = index
        self.now = 0.0
        self.end = inf
        self.before_prompts_s: Before | None = None
        self._steps = 0
        self._start = 0.0
        self._first = 0.0
        self._slope = 0.0

    def enqueue(self, request: int, at_s: float) -> None:
        """A request arrives: an idle replica can start on it, a jump ends at the next step boundary."""
        log, scheduler = self.log, self.scheduler
        log.replica[request] = self.index
        if not scheduler.offer(request, at_s):
            log.rejected.append(request)
            return
        if self.end == inf:
            self.now = max(self.now, at_s)
        elif self._steps > 1 and scheduler.waiting[0] == request:
            self._shorten(at_s)

    def expect(self, request: int) -> int | None:
        """The lane that has set blocks aside for KV to come, None while there is none."""
        return 0 if self.scheduler.expect(request) else None

    def land(self, request: int, lane: int, at_s: float) -> None:
        """The KV of an expected request has come."""
        self.log.replica[request] = self.index
        self.log.lane[request] = lane
        self.scheduler.land(request)
        self.disturb(lane, at_s)

    def load_ended(self, request: int, lane: int, at_s: float) -> None:
        """The KV that an admitted request waited for has been loaded."""
        self.schedulers[lane].load_ended(request)
        self.disturb(lane, at_s)

    def disturb(self, lane: int, at_s: float) -> None:
        """Something may change in the next step: an idle replica wakes up, a jump ends at the next step boundary."""
        if self.end == inf:
            self.now = max(self.now, at_s)
        else:
            self._shorten(at_s)

    def _shorten(self, at_s: float) -> None:
        """Let the planned steps end at the first step boundary at or after `at_s`."""
        if self._steps > 1 and at_s <= self.end - self._first - self._slope * (self._steps - 1):
            self._steps = steps_until(self._first, self._slope, at_s - self._start, self._steps)
            self.end = self._start + self._steps * (self._first + self._slope * (self._steps - 1) / 2)

    def halt(self, at_s: float) -> Sequence[int]:
        """Stop for good, after the steps that have ended by now; the requests that are left without a replica."""
        steps = steps_ended(self._first, self._slope, at_s - self._start, self._steps - 1) if self.end < inf else 0
        if steps and not self.scheduler.chunks:
            self._steps = steps
            self.end = self._start + steps * (self._first + self._slope * (steps - 1) / 2)
            self.commit()
        self.end = inf
        self.log.lost_kv_blocks += self.scheduler.blocks_held()
        forgotten = self.scheduler.evict()
        self.log.preempted(self.scheduler, self.index, 0)
        return forgotten

    def coast(self, until_s: float) -> None:
        """Decode with unchanging batches to the first step boundary at or after `until_s`, or until plan is needed."""
        scheduler, log, decode_run = self.scheduler, self.log, self.model.decode_run
        finish_s, segments = log.finish_s, log.segments
        now = self.now
        events = 0
        while now < until_s:
            steps = scheduler.form_quietly()
            if not steps:
                break
            running = scheduler.running
            context = scheduler.context_offset + running * (scheduler.steps + 1)
            first, slope, limit = decode_run(running, context)
            if limit < steps:
                steps = int(limit)
            end = now + steps * (first + slope * (steps - 1) / 2)
            if end > until_s:
                steps = steps_until(first, slope, until_s - now, steps)
                end = now + steps * (first + slope * (steps - 1) / 2)
            if segments is not None:
                log.record(self.index, 0, now, end, steps, slope, running, context, scheduler)
            for request in scheduler.advance(steps):
                finish_s[request] = end
            now = end
            events += 1
        log.events += events
        self.now = now
        self._steps = 1

    def plan(self, horizon_s: float) -> float:
        """Decide the next step or steps, starting now; the time they end, inf if there is nothing to do.

        horizon_s   when the next request arrives, as far as is known: steps do not go on past it if it could join
        """
        scheduler = self.scheduler
        if not scheduler.form():
            self.end = inf
            return inf
        start = self._start = self.now
        if scheduler.preempted:
            self.log.preempted(scheduler, self.index, 0)
        if scheduler.joined:
            self.log.joined(scheduler, start)
        if scheduler.decode_runs:
            running = scheduler.running
            context = scheduler.context_offset + running * (scheduler.steps + 1)
        else:
            running = context = 0
        if scheduler.chunks:
            log = self.log
            log.scheduled(scheduler, start)
            self._steps = 1
            self._slope = 0.0
            if scheduler.groups == 1:
                duration = self.model.step_s(running, context, scheduler.items)
            else:
                duration = self.model.group_step_s(running, context, scheduler.items, scheduler.group, scheduler.groups)
            if self.before_prompts_s is not None:
                duration += self.before_prompts_s(scheduler.chunks)
            if log.watch is not None:
                log.watch(self.index, 0, scheduler.chunks, start, start + duration)
        else:
            first, slope, limit = self.model.decode_run(running, context)
            steps = scheduler.settled_steps() if scheduler.settled else 1
            if steps > limit:
                steps = int(limit)
            if steps > 1 and horizon_s < inf and not scheduler.waiting:
                steps = steps_until(first, slope, horizon_s - start, steps)
            self._first = first
            self._slope = slope
            self._steps = steps
            duration = steps * (first + slope * (steps - 1) / 2)
        end = self.end = start + duration
        return end

    def commit(self) -> Sequence[int]:
        """Take the planned steps; the requests that finished."""
        scheduler, log = self.scheduler, self.log
        end = self.now = self.end
        log.events += 1
        if log.segments is not None:
            running = scheduler.running if scheduler.decode_runs else 0
            context = scheduler.context if running else 0
            log.record(self.index, 0, self._start, end, self._steps, self._slope, running, context, scheduler)
        if scheduler.chunks:
            finished = scheduler.advance(1)
            log.prefilled(scheduler, end)
        else:
            finished = scheduler.advance(self._steps)
        finish_s = log.finish_s
        for request in finished:
            finish_s[request] = end
        return finished
