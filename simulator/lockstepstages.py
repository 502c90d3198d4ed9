"""Attention data parallelism over pipeline stages: micro-batches of several groups that pass every stage together."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from hwmodels.step_model import StepModel
from simulator.attentiongroups import AttentionGroups
from simulator.log import Log
from simulator.pipeline import PipelineReplica
from simulator.scheduler import Scheduler


class StagedLockstepReplica(PipelineReplica):
    """A pipeline whose stages have attention groups that meet in their experts.

    As many micro-batches as stages are in flight, each of one batch from every group: lane = micro-batch * groups +
    group, each with its own scheduler and its share of its group's KV blocks. A micro-batch is in a stage for as long
    as its slowest group and then the experts take; to the next one goes what the group with most tokens sends. A
    request joins the lane with the fewest unfinished requests.
    """

    __slots__ = ("_groups",)

    def __init__(self, model: StepModel, schedulers: Sequence[Scheduler], log: Log, index: int) -> None:
        width = len(schedulers) // len(model.stages)
        self._groups = [
            AttentionGroups(model, schedulers[lane : lane + width], log, index, lane)
            for lane in range(0, len(schedulers), width)
        ]
        super().__init__(model, schedulers, log, index, self._groups)

    def _form_anew(self, lane: int) -> None:
        """Let the lane form its next batch even in a run, of which the steps that have started count."""
        place, group = divmod(lane, self._width)
        groups = self._groups[place]
        groups.changed.add(group)
        if self._steps[place]:
            groups.take(self._done[place], self._ready[place])
            self._steps[place] = 0

    def halt(self, at_s: float) -> Sequence[int]:
        """Stop for good; the requests that are left without a replica. What has entered the stages leaves them."""
        forgotten: list[int] = []
        for place, groups in enumerate(self._groups):
            self._form_anew(place * self._width)
            forgotten += groups.evict()
        self.end = inf
        return forgotten

    def _begin(self, place: int, now: float) -> Sequence[int]:
        """Form a step of all groups and start it."""
        groups, log = self._groups[place], self.log
        if groups.form(now) == inf:
            waits = any(scheduler.waiting for scheduler in groups.schedulers)
            self._ready[place] = inf if waits else now
            return ()
        lines, steps = groups.lines()
        transfer = self.model.transfer[groups.tokens]
        wait_s = groups.before_s(self.before_prompts_s)
        at = self._pass(place, now + wait_s, transfer, [first for first, _ in lines])
        if log.segments is not None:
            groups.record(now, at, 1, 0.0)
        elif steps > 1:
            self._run(place, lines, transfer, steps)
            return ()
        groups.tell(now, at)
        return self._finish(place, 1, at)

    def _finish(self, place: int, steps: int, at_s: float) -> Sequence[int]:
        """Tell the groups the steps they have taken, the last of which ends at `at_s`."""
        finished = self._groups[place].take(steps, at_s)
        width = self._width
        for lane in range(place * width, (place + 1) * width):
            self._leaving[lane] = 0
        for request in finished:
            self._leaving[self.log.lane[request]] += 1
        return finished
