"""Which batches do attention groups run that begin every step together, and how long do these take in each stage?"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from hwmodels.step_model import StepModel, Tables, group_run
from simulator.log import Log
from simulator.replica import Before
from simulator.scheduler import Scheduler

#: (first_s, slope_s) of steps that follow each other: the j-th takes first_s + j slope_s.
Line = tuple[float, float]


class AttentionGroups:
    """Attention groups that begin and end every step together, without a clock.

    Steps are counted in one number, `taken`. While a group's batch cannot change, its step time in a stage is affine in
    that number, so the group is not touched; its scheduler is told the steps it took when its run ends or when the
    group is among those `changed`.

    index, first_lane   where the replica stands in the log, and the first group among its lanes
    """

    __slots__ = (
        "_begun",
        "_costs",
        "_ends",
        "_prompts",
        "_sampled",
        "_stages",
        "_taken",
        "_tokens",
        "changed",
        "first_lane",
        "index",
        "log",
        "model",
        "schedulers",
    )

    def __init__(
        self, model: StepModel, schedulers: Sequence[Scheduler], log: Log, index: int, first_lane: int = 0
    ) -> None:
        self.model = model
        self.schedulers = schedulers
        self.log = log
        self.index = index
        self.first_lane = first_lane
        groups = len(schedulers)
        self.changed = set(range(groups))  # groups whose batch has to be formed anew
        kinds: list[Tables] = []  # stages that are alike cost the same
        for tables in model.stages:
            if not any(tables is kind for kind in kinds):
                kinds.append(tables)
        self._stages = [next(k for k, kind in enumerate(kinds) if kind is tables) for tables in model.stages]
        self._taken = 0
        self._begun = [0] * groups  # `_taken` when the group's batch was formed
        self._ends = [inf] * groups  # `_taken` when its run ends; inf when it idles
        # In stages of each kind, its (base, rise), of a step that takes base + rise * taken, and their tables.
        self._costs: list[tuple[list[Line], Tables]] = [([(0.0, 0.0)] * groups, tables) for tables in kinds]
        self._tokens = [0] * groups
        self._prompts = [False] * groups
        self._sampled = [0] * groups

    @property
    def has_work(self) -> bool:
        """Whether a step would not be empty."""
        return min(self._ends) < inf or any(self.schedulers[lane].has_work for lane in self.changed)

    def form(self, now_s: float) -> float:
        """Let the changed groups form their next batches; `taken` when the first run ends, inf if all groups idle."""
        for lane in sorted(self.changed):
            self._form(lane, now_s)
        self.changed.clear()
        return min(self._ends)

    def _form(self, lane: int, now_s: float) -> None:
        """Let a group form its next batch, after telling it the steps of a run that was cut short."""
        scheduler, log = self.schedulers[lane], self.log
        taken = self._taken
        if self._ends[lane] < inf and taken > self._begun[lane]:
            scheduler.advance(taken - self._begun[lane])
        self._begun[lane] = taken
        works = scheduler.form()
        if scheduler.preempted:
            log.preempted(scheduler, self.index, self.first_lane + lane)
        if scheduler.joined:
            log.joined(scheduler, now_s)
        running = scheduler.running if scheduler.decode_runs else 0
        chunks = scheduler.chunks
        self._prompts[lane] = bool(chunks)
        self._sampled[lane] = running + len(chunks)
        if works and not chunks:
            self._tokens[lane] = running
            context = scheduler.context
            steps: float = scheduler.settled_steps() if scheduler.settled else 1
            for lines, tables in self._costs:
                first, slope, limit = group_run(tables, running, context)
                lines[lane] = first - slope * taken, slope
                if limit < steps:
                    steps = limit
            self._ends[lane] = taken + steps
            return
        self._tokens[lane] = 0
        self._ends[lane] = taken + 1 if works else inf
        if works:
            log.scheduled(scheduler, now_s)
            batch = (running, scheduler.context if running else 0, scheduler.items)
        value = 0.0
        for lines, tables in self._costs:
            if works:
                value, self._tokens[lane] = tables.group(batch)
            lines[lane] = value, 0.0

    def lines(self) -> tuple[list[Line], int]:
        """By stage, the seconds of the formed steps, and for how many of them they hold.

        In every stage that of its slowest group, then what all do together; the host's work comes before the first.
        """
        steps = int(min(self._ends)) - self._taken
        kinds: list[Line] = []
        for kind in range(len(self._costs)):
            first, slope, steps = self._line(kind, steps)
            kinds.append((first, slope))
        lines = [kinds[kind] for kind in self._stages]
        first, slope = lines[0]
        lines[0] = first + self.model.overhead_s(max(self._sampled), any(self._prompts)), slope
        return lines, steps

    def _line(self, kind: int, steps: int) -> tuple[float, float, int]:
        """Of at most `steps` steps in a stage of this kind: (first_s, slope_s, steps) until another group is slowest.

        A group's steps are lines over `taken`; the first is the maximum, the slope is 0 for a single step.
        """
        lines, tables = self._costs[kind]
        taken = self._taken
        first = max([base + rise * taken for base, rise in lines])
        slope = 0.0
        if steps > 1:
            slope = max([rise for base, rise in lines if base + rise * taken == first])
            last = taken + steps - 1
            if max([base + rise * last for base, rise in lines]) > first + slope * (steps - 1):
                # A steeper line overtakes within the steps: stop before the first that does.
                for base, rise in lines:
                    if rise > slope:
                        steps = min(steps, int((first - base - rise * taken) / (rise - slope)) + 1)
        return first + tables.shared[sum(self._tokens)], slope, steps

    @property
    def tokens(self) -> int:
        """Of the group that has most in the formed step."""
        return max(self._tokens)

    def before_s(self, before: Before | None) -> float:
        """Seconds until all groups with prompts in the formed step can begin with it, by what their chunks wait for."""
        if before is None:
            return 0.0
        prompts = (lane for lane, has in enumerate(self._prompts) if has)
        return max((before(self.schedulers[lane].chunks) for lane in prompts), default=0.0)

    def tell(self, start_s: float, end_s: float) -> None:
        """Let those who watch know of the formed prompts."""
        if self.log.watch is not None:
            for lane, has in enumerate(self._prompts):
                if has:
                    chunks = self.schedulers[lane].chunks
                    self.log.watch(self.index, self.first_lane + lane, chunks, start_s, end_s)

    def record(self, start_s: float, end_s: float, steps: int, slope_s: float) -> None:
        """Append formed steps of every group that works to the segments."""
        for lane, scheduler in enumerate(self.schedulers):
            if self._ends[lane] == inf:
                continue
            done = self._taken - self._begun[lane]
            running = scheduler.running if scheduler.decode_runs else 0
            context = scheduler.context + done * running if running else 0
            row = (start_s, end_s, steps, slope_s, running, context)
            self.log.record(self.index, self.first_lane + lane, *row, scheduler, done)

    def take(self, steps: int, end_s: float) -> list[int]:
        """Take formed steps, the last of which ends at `end_s`; the requests that finished."""
        log, ends = self.log, self._ends
        taken = self._taken = self._taken + steps
        ended: list[int] = []
        for _ in range(ends.count(taken)):
            lane = ends.index(taken)
            ends[lane] = inf
            self.changed.add(lane)
            scheduler = self.schedulers[lane]
            prefills = bool(scheduler.chunks)
            finished = scheduler.advance(taken - self._begun[lane])
            if prefills:
                log.prefilled(scheduler, end_s)
            self._begun[lane] = taken
            if finished:
                for request in finished:
                    log.finish_s[request] = end_s
                ended += finished
        return ended

    def evict(self) -> list[int]:
        """Forget all requests, for good."""
        forgotten: list[int] = []
        for lane, scheduler in enumerate(self.schedulers):
            if self._ends[lane] < inf and self._taken > self._begun[lane]:
                scheduler.advance(self._taken - self._begun[lane])
            self._ends[lane] = inf
            self.log.lost_kv_blocks += scheduler.blocks_held()
            forgotten += scheduler.evict()
            self.log.preempted(scheduler, self.index, self.first_lane + lane)
        return forgotten
