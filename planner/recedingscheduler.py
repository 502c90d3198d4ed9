"""How does a scheduler fill steps that a linear program decides on?

Before each step with prompts, planner.prefillnext solves its program over the next few steps; the step takes which
prompts come first from it, and as many of their tokens as the TBT limit lets in, by the step model itself. Several
prompts may be half computed at a time, so that a short one passes a long one. What a decision takes is added to its
step, and the step is filled with what it has left of the limit. Where there is no solution in time, the step takes
chunks, the shortest prompt first; where not even one token fits, nobody is asked and the sequences decode.

On the layer axis, the prompts that the program begins with go together through one group of layers a step, as those of
layered prefill do, in as few groups as the limit allows; the next decision follows the last group. Where a decision
leaves no room in its own step, they begin with the next one.

The policy is told the time of the step boundary, for the weights of prompts that have waited; it never looks at a clock
or at the tokens that sequences have still to come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from time import process_time

import numpy as np

from planner.errors import NoFeasiblePlanError, PlanError
from planner.prefillcosts import LinearStep, Span
from planner.prefillhorizon import Axis, Pending
from planner.prefilllinear import TableClock
from planner.prefillnext import Decision, next_step
from simulator.scheduler import Scheduler, SchedulerConfig

#: Decisions whose median time the next one is expected to take, where times are measured.
REMEMBERED = 32
#: Seconds that the solver may take for a decision that is measured, and for one that is not.
SOLVER_S, LONG_S = 0.02, 3600.0
#: Seconds of the limit set aside for what a measured decision still takes when its step is full.
SPARE_S = 5e-4


@dataclass(slots=True)
class Ledger:
    """What decisions were like: steps decided by the solver and by the fallback (`reasons`: why, by how often), steps
    without room for a prompt, and seconds charged for each decision."""

    solved: int = 0
    fell_back: int = 0
    full: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Receding:
    """How steps are decided.

    linear         model of the program, in seconds of the replica's steps
    tbt_s          longest step with decodes, the decision included
    axis           tokens: prompts are cut into chunks; layers: whole ones go through groups of layers
    steps          of the program's horizon
    seconds        that the solver may take for a decision; None: SOLVER_S where decisions are measured, else as many as
                   it needs, so that nothing depends on the machine
    decision_s     charged for each decision; None for the processor time it is measured to take
    ageing_per_s   by which the weight of a prompt grows in a second of waiting

    Raises PlanError for numbers out of range.
    """

    linear: LinearStep
    tbt_s: float = inf
    steps: int = 8
    axis: Axis = "tokens"
    seconds: float | None = None
    decision_s: float | None = None
    ageing_per_s: float = 0.1

    def __post_init__(self) -> None:
        """Raise what the class says."""
        if self.steps < 1:
            raise PlanError(f"horizon of {self.steps} steps: expected at least 1")
        if not (self.tbt_s > 0 and (self.seconds is None or self.seconds > 0) and self.ageing_per_s >= 0):
            raise PlanError(f"tbt_s={self.tbt_s}, seconds={self.seconds}, ageing_per_s={self.ageing_per_s}: expected "
                            "times above 0 and an ageing of at least 0")  # fmt: skip
        if self.decision_s is not None and not 0 <= self.decision_s < inf:
            raise PlanError(f"decision_s={self.decision_s}: expected a finite time of at least 0")

    @property
    def solver_s(self) -> float:
        """Seconds that the solver may take."""
        if self.seconds is not None:
            return self.seconds
        return SOLVER_S if self.decision_s is None else LONG_S


class RecedingScheduler(Scheduler):
    """A scheduler whose step is decided by `decide`.

    progress   tokens that prompts in prefill have behind them; `partial` is the last of them, if any
    now_s      step boundary at which the step begins, set from outside
    spent_s    what the decision on the formed step took
    """

    __slots__ = ("arrived", "clock", "last", "ledger", "now_s", "progress", "rule", "spent_s")

    def __init__(
        self,
        config: SchedulerConfig,
        kv_blocks: int,
        prompts: list[int],
        outputs: list[int],
        rule: Receding,
        clock: TableClock,
        ledger: Ledger,
    ) -> None:
        super().__init__(config, kv_blocks, prompts, outputs)
        self.rule, self.clock, self.ledger = rule, clock, ledger
        self.progress: dict[int, int] = {}
        self.arrived: dict[int, float] = {}
        self.last: Decision | None = None
        self.now_s = self.spent_s = 0.0
        self._admit = decide
        if rule.axis == "layers":  # whole prompts, which have to fit beside the decodes
            self.longest_tokens = min(self.longest_tokens, max(config.token_budget - config.max_seqs, 0))

    def offer(self, request: int, at_s: float = 0.0) -> bool:
        """Put a request that came at `at_s` into the queue; False if it could never run here."""
        self.arrived[request] = at_s
        return super().offer(request, at_s)

    def target(self, request: int) -> int:
        """Tokens of its prefill: the prompt, and what it emitted before it was interrupted."""
        return self.prompts[request] + self.generated.get(request, 0)

    def advance(self, steps: int) -> list[int]:
        """Take the formed step or steps; the requests that finished."""
        for request, new, before in self.chunks:
            self.progress.pop(request, None)
            if before + new < self.target(request):
                self.progress[request] = before + new
        finished = super().advance(steps)
        if not self.cohort:
            self._latest()
        return finished

    def evict(self) -> list[int]:
        """Forget all requests, for good."""
        self.chunks = [chunk for chunk in self.chunks if chunk[0] not in self.progress]
        return super().evict()

    def _preempt_last(self) -> None:
        if self.partial >= 0 and not self.cohort:
            del self.progress[self.partial]
        super()._preempt_last()
        if not self.cohort:
            self._latest()

    def _latest(self) -> None:
        """The prompt in prefill that gives way first is the one computed last."""
        self.partial, self.partial_done = next(reversed(self.progress.items()), (-1, 0))

    def postpone(self) -> None:
        """Let the prompts of the step begin with the next one."""
        for request, _, _ in self.chunks:
            self.progress.pop(request, None)
        self.cohort, self.partial, self.group = self.chunks, self.chunks[0][0], -1
        self.chunks, self.items = [], []

    def take(self, request: int, tokens: int) -> bool:
        """Put so many tokens of a prompt into the step; False where there is no room for it."""
        before = self.progress.get(request)
        if before is None:
            place = self.waiting.index(request)
            del self.waiting[place]
            self.waiting.appendleft(request)
            self.before = 0
            if not self.admit_head(request, self.target(request)):
                self.waiting.popleft()
                self.waiting.insert(place, request)
                return False
            before = self.before
        if before >= 0:  # else its KV is being loaded
            new = min(tokens, self.target(request) - before)
            self.chunks.append((request, new, before))
            self.items.append((new, before))
        return True


@dataclass(frozen=True, slots=True)
class Late:
    """Prices steps that begin when they are decided on.

    decision_s   that a decision takes; None: the processor time that the process has had since `begun`
    """

    clock: TableClock
    decision_s: float | None
    begun: float

    @property
    def layers(self) -> int:
        """Layers that spans are counted in."""
        return self.clock.layers

    def spent_s(self) -> float:
        """Seconds that the decision has taken."""
        return process_time() - self.begun if self.decision_s is None else self.decision_s

    def spare_s(self) -> float:
        """Seconds that the decision has taken, and what is set aside for the rest of it."""
        return self.spent_s() + (SPARE_S if self.decision_s is None else 0.0)

    def step_s(self, decodes: int, context: int, spans: Sequence[Span]) -> float:
        """Seconds of a step and of the decision on it."""
        return self.spare_s() + self.clock.step_s(decodes, context, spans)


def decide(s: Scheduler) -> None:
    """All decodes, and what the program begins with of the prompts, within the TBT limit and the token budget."""
    assert isinstance(s, RecedingScheduler)
    rule = s.rule
    shortage = s.grow_decodes()
    s.settled = False
    if s.cohort:
        s.chunks, s.cohort = s.cohort, []
        s.items = [(new, before) for _, new, before in s.chunks]
        s.partial = -1
        s.group += 1
        return
    s.group, s.groups = 0, 1
    prompts = _candidates(s, admit=not shortage)
    budget = s.config.token_budget - s.running
    if not prompts or budget < 1:
        return
    usual = rule.decision_s
    if usual is None:
        usual = float(np.median(s.ledger.seconds[-REMEMBERED:] or [0.0])) + SPARE_S
    each, over = divmod(s.context, max(s.running, 1))
    running = [(each + (i < over), rule.steps) for i in range(s.running)]
    least = Span(
        1, min(prompt.before for prompt in prompts.values()), 0, s.clock.layers if rule.axis == "tokens" else 1
    )
    if s.running and s.clock.step_s(s.running, s.context, [least]) + usual > rule.tbt_s:
        s.ledger.full += 1
        return
    late = Late(s.clock, rule.decision_s, process_time())
    decision = _decision(s, prompts, running, late, usual, budget)
    s.spent_s = late.spent_s()
    s.ledger.seconds.append(s.spent_s)
    s.ledger.solved += decision.source == "solver"
    s.ledger.fell_back += decision.source == "fallback"
    if decision.why:
        s.ledger.reasons[decision.why] += 1
    s.last = decision
    room = s.config.max_seqs - s.running - s.expected - len(s.progress)
    for request, span in decision.spans:
        new = request not in s.progress
        if new and room <= 0:
            s.limited.add("seqs")
            continue
        if not s.take(request, span.tokens):
            continue
        room -= new
    if not s.chunks and not s.running and s.progress:
        request, before = next(iter(s.progress.items()))
        s.take(request, min(s.target(request) - before, budget))
    if rule.axis == "layers" and s.running and s.chunks:
        s.groups = _groups(s, rule.tbt_s - late.spare_s())
        if not s.groups:  # the decision leaves no room in its own step
            s.groups = _groups(s, rule.tbt_s) or s.clock.layers
            s.postpone()
        s.spent_s = s.ledger.seconds[-1] = late.spent_s()


def _groups(s: RecedingScheduler, limit_s: float) -> int:
    """Fewest groups of layers in which no step takes longer, one a step; 0 for none, 1 for prompts cut by tokens.

    What the decodes attend to grows by a token a step until the last group.
    """
    if any(before + new < s.target(request) for request, new, before in s.chunks):
        return 1
    step_s = s.clock.model.group_step_s
    for groups in range(1, s.clock.layers + 1):
        context = s.context + groups * s.running
        if all(step_s(s.running, context, s.items, group, groups) <= limit_s for group in range(groups)):
            return groups
    return 0


def _candidates(s: RecedingScheduler, *, admit: bool) -> dict[int, Pending]:
    """Prompts that the next step could compute: those in prefill, and those that wait and have room."""

    def weight(request: int) -> float:
        return 1.0 + s.rule.ageing_per_s * max(0.0, s.now_s - s.arrived.get(request, s.now_s))

    found = {r: Pending(s.target(r) - done, done, weight=weight(r)) for r, done in s.progress.items()}
    if not admit or s.running + s.expected + len(s.progress) >= s.config.max_seqs:
        return found
    free, block = s.free, s.config.block_tokens
    for request in s.waiting:
        target = s.target(request)
        if -(-target // block) <= free or request in s.loaded:
            found[request] = Pending(target, weight=weight(request))
    return found


def _decision(
    s: RecedingScheduler,
    prompts: dict[int, Pending],
    running: Sequence[tuple[int, int]],
    late: Late,
    usual_s: float,
    budget: int,
) -> Decision:
    """What the program says, or, where the linear model finds no room that the step model has, the least of it."""
    rule = s.rule
    held = sum(prompts[r].tokens for r in s.progress)
    try:
        return next_step(
            prompts,
            running,
            replace(rule.linear, host_s=rule.linear.host_s + usual_s),
            late,
            tbt_s=rule.tbt_s,
            budget_tokens=budget,
            axis=rule.axis,
            kv_tokens=s.free * s.config.block_tokens + held + s.running,
            steps=rule.steps,
            seconds=rule.solver_s,
            last=s.last,
        )
    except NoFeasiblePlanError:
        return Decision((), "fallback", "decodes alone exceed the limit by the linear model")
