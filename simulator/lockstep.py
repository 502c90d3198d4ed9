"""Attention data parallelism in time: several schedulers that begin every step together and wait for the slowest."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from hwmodels.step_model import StepModel
from simulator.log import Log
from simulator.replica import Before, steps_ended, steps_until
from simulator.scheduler import Scheduler


class LockstepReplica:
    """Attention groups of one replica; the same interface as Replica.

    A request joins the group with the fewest unfinished requests. Steps are counted in one number, `_taken`. While a
    group's batch cannot change, its step time is affine in that number, so the group is not touched; it is told the
    steps it took when its run ends or a request joins it. Steps are taken together for as long as no run ends and the
    same group stays the slowest.

    before_prompts_s   seconds that a step with prompts waits first, by a group's chunks, and the others with it; None:
                       none
    """

    __slots__ = (
        "_base",
        "_begun",
        "_changed",
        "_context",
        "_ends",
        "_first",
        "_prompts",
        "_rise",
        "_running",
        "_sampled",
        "_slope",
        "_start",
        "_steps",
        "_taken",
        "_tokens",
        "_unfinished",
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
        self._start = self._first = self._slope = 0.0
        self._steps = 0
        self._taken = 0
        groups = len(schedulers)
        self._unfinished = [0] * groups
        self._changed = set(range(groups))  # groups whose batch has to be formed anew
        self._begun = [0] * groups  # `_taken` when the group's batch was formed
        self._ends = [inf] * groups  # `_taken` when its run ends; inf when it idles
        self._base = [0.0] * groups  # its step time is base + rise * taken
        self._rise = [0.0] * groups
        self._running = [0] * groups  # its decoding sequences
        self._context = [0] * groups  # and the tokens they attended to in the first step of the run
        self._tokens = [0] * groups
        self._prompts = [False] * groups
        self._sampled = [0] * groups

    def enqueue(self, request: int, at_s: float) -> None:
        """A request arrives at the group with the fewest unfinished requests."""
        log = self.log
        log.replica[request] = self.index
        lane = self._unfinished.index(min(self._unfinished))
        scheduler = self.schedulers[lane]
        may_join = not scheduler.waiting
        if not scheduler.offer(request):
            log.rejected.append(request)
            return
        log.lane[request] = lane
        self._unfinished[lane] += 1
        if may_join:
            self._changed.add(lane)
        if self.end == inf:
            self.now = max(self.now, at_s)
        elif may_join and self._steps > 1:
            self._shorten(at_s)

    def expect(self, request: int) -> int | None:
        """The lane that has set blocks aside for KV to come, None while there is none."""
        for lane in sorted(range(len(self.schedulers)), key=self._unfinished.__getitem__):
            if self.schedulers[lane].expect(request):
                self._unfinished[lane] += 1
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
        self._changed.add(lane)
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
        forgotten: list[int] = []
        for lane, scheduler in enumerate(self.schedulers):
            if self._ends[lane] < inf and self._taken > self._begun[lane]:
                scheduler.advance(self._taken - self._begun[lane])
            self._ends[lane] = inf
            self.log.lost_kv_blocks += scheduler.blocks_held()
            forgotten += scheduler.evict()
            self.log.preempted(scheduler, self.index, lane)
        return forgotten

    def _shorten(self, at_s: float) -> None:
        """Let the planned steps end at the first step boundary at or after `at_s`."""
        self._steps = steps_until(self._first, self._slope, at_s - self._start, self._steps)
        self.end = self._start + self._steps * (self._first + self._slope * (self._steps - 1) / 2)

    def coast(self, until_s: float) -> None:
        """Nothing: plan takes as many steps as pass unchanged."""

    def plan(self, horizon_s: float) -> float:
        """Decide the next step or steps, starting now; the time they end, inf if there is nothing to do."""
        for lane in sorted(self._changed):
            self._form(lane)
        self._changed.clear()
        taken = self._taken
        ends = min(self._ends)
        if ends == inf:
            self.end = inf
            return inf
        start = self._start = self.now
        steps = int(ends) - taken
        times = [base + rise * taken for base, rise in zip(self._base, self._rise, strict=True)]
        slowest = max(times)
        slope = 0.0
        if steps > 1:
            slope = max(rise for time, rise in zip(times, self._rise, strict=True) if time == slowest)
            steepest = max(self._rise)
            if steepest > slope and slowest + slope * (steps - 1) < max(
                time + rise * (steps - 1) for time, rise in zip(times, self._rise, strict=True)
            ):
                # A steeper line overtakes within the steps: stop before the first that does.
                for time, rise in zip(times, self._rise, strict=True):
                    if rise > slope:
                        steps = min(steps, int((slowest - time) / (rise - slope)) + 1)
        model = self.model
        total = sum(self._tokens)
        self._first = slowest + model.stages[0].shared[total] + model.overhead_s(max(self._sampled), any(self._prompts))
        if self.before_prompts_s is not None:
            self._first += self._before(self.before_prompts_s)
        self._slope = slope
        self._steps = steps
        self.end = start + steps * (self._first + slope * (steps - 1) / 2)
        if steps > 1 and horizon_s < self.end:
            self._shorten(horizon_s)
        if self.log.watch is not None:
            for lane, scheduler in enumerate(self.schedulers):
                if scheduler.chunks and self._ends[lane] < inf:
                    self.log.watch(self.index, lane, scheduler.chunks, start, self.end)
        return self.end

    def _before(self, before_prompts_s: Before) -> float:
        """Seconds until all groups with prompts in the next step can begin with it."""
        lanes = (lane for lane, ends in enumerate(self._ends) if self._prompts[lane] and ends < inf)
        return max((before_prompts_s(self.schedulers[lane].chunks) for lane in lanes), default=0.0)

    def _form(self, lane: int) -> None:
        """Let a group form its next batch, after telling it the steps of a run that a request has cut short."""
        scheduler, log, model = self.schedulers[lane], self.log, self.model
        taken = self._taken
        if self._ends[lane] < inf and taken > self._begun[lane]:
            scheduler.advance(taken - self._begun[lane])
        self._begun[lane] = taken
        works = scheduler.form()
        if scheduler.preempted:
            log.preempted(scheduler, self.index, lane)
        if scheduler.joined:
            log.joined(scheduler, self.now)
        running = scheduler.running if scheduler.decode_runs else 0
        context = scheduler.context if running else 0
        chunks = scheduler.chunks
        self._running[lane] = running
        self._context[lane] = context
        self._rise[lane] = 0.0
        self._prompts[lane] = bool(works and chunks)
        if not works:
            self._ends[lane] = inf
            self._base[lane] = 0.0
            self._tokens[lane] = self._sampled[lane] = 0
            return
        self._sampled[lane] = running + len(chunks)
        if chunks:
            log.scheduled(scheduler, self.now)
            self._base[lane], self._tokens[lane] = model.stages[0].group((running, context, scheduler.items))
            self._ends[lane] = taken + 1
            return
        first, rise, limit = model.group_run(running, context)
        steps = min(scheduler.settled_steps(), limit) if scheduler.settled else 1
        self._tokens[lane] = running
        self._rise[lane] = rise
        self._base[lane] = first - rise * taken
        self._ends[lane] = taken + steps

    def commit(self) -> Sequence[int]:
        """Take the planned steps; the requests that finished."""
        log = self.log
        end = self.now = self.end
        log.events += 1
        if log.segments is not None:
            self._record(end)
        taken = self._taken = self._taken + self._steps
        ended: list[int] = []
        for lane, run_ends in enumerate(self._ends):
            if run_ends != taken:
                continue
            scheduler = self.schedulers[lane]
            prefills = bool(scheduler.chunks)
            finished = scheduler.advance(taken - self._begun[lane])
            if prefills:
                log.prefilled(scheduler, end)
            self._begun[lane] = taken
            self._changed.add(lane)
            for request in finished:
                log.finish_s[request] = end
            self._unfinished[lane] -= len(finished)
            ended += finished
        return ended

    def _record(self, end: float) -> None:
        """Append the planned steps of every group that works to the segments."""
        for lane, scheduler in enumerate(self.schedulers):
            if self._ends[lane] == inf:
                continue
            done = self._taken - self._begun[lane]
            running = self._running[lane]
            context = self._context[lane] + done * running
            self.log.record(
                self.index, lane, self._start, end, self._steps, self._slope, running, context, scheduler, done
            )
