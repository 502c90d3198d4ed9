"""What does a simulated replica do whose every step with prompts is decided by a linear program?

Before each step with prompts, planner.prefillnext solves its program over the next few steps; the step takes which
prompts come first from it, and as many of their tokens as the TBT limit lets in, by the step model itself. Several
prompts may be half computed at a time, so that a short one passes a long one. What a decision takes is added to its
step, and set aside from the limit before the step is filled. Where there is no solution in time, the step takes chunks,
the shortest prompt first; where not even one token fits, nobody is asked and the sequences decode.

The policy is told the time of the step boundary, for the weights of prompts that have waited; it never looks at a clock
or at the tokens that sequences have still to come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from time import perf_counter

from planner.errors import NoFeasiblePlanError, PlanError
from planner.prefillcosts import LinearStep, Span
from planner.prefillhorizon import Pending, require_tbt
from planner.prefilllinear import TableClock
from planner.prefillnext import Decision, next_step
from simulator.deployment import AnyReplica, ReplicaSpec
from simulator.errors import PoolError
from simulator.log import Log
from simulator.replica import Replica
from simulator.scheduler import Scheduler, SchedulerConfig

#: Decisions whose longest time is set aside for the next one where times are measured.
REMEMBERED = 32


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
    steps          of the program's horizon
    seconds        that the solver may take for a decision
    decision_s     charged for each decision; None for what it is measured to take
    ageing_per_s   by which the weight of a prompt grows in a second of waiting

    Raises PlanError for numbers out of range.
    """

    linear: LinearStep
    tbt_s: float = inf
    steps: int = 8
    seconds: float = 0.05
    decision_s: float | None = None
    ageing_per_s: float = 0.1

    def __post_init__(self) -> None:
        """Raise what the class says."""
        if self.steps < 1:
            raise PlanError(f"horizon of {self.steps} steps: expected at least 1")
        if not (self.tbt_s > 0 and self.seconds > 0 and self.ageing_per_s >= 0):
            raise PlanError(f"tbt_s={self.tbt_s}, seconds={self.seconds}, ageing_per_s={self.ageing_per_s}: expected "
                            "times above 0 and an ageing of at least 0")  # fmt: skip
        if self.decision_s is not None and not 0 <= self.decision_s < inf:
            raise PlanError(f"decision_s={self.decision_s}: expected a finite time of at least 0")


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
        self._latest()
        return finished

    def evict(self) -> list[int]:
        """Forget all requests, for good."""
        self.chunks = [chunk for chunk in self.chunks if chunk[0] not in self.progress]
        return super().evict()

    def _preempt_last(self) -> None:
        if self.partial >= 0:
            del self.progress[self.partial]
        super()._preempt_last()
        self._latest()

    def _latest(self) -> None:
        """The prompt in prefill that gives way first is the one computed last."""
        self.partial, self.partial_done = next(reversed(self.progress.items()), (-1, 0))

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


def decide(s: Scheduler) -> None:
    """All decodes, and what the program begins with of the prompts, within the TBT limit and the token budget."""
    assert isinstance(s, RecedingScheduler)
    rule = s.rule
    shortage = s.grow_decodes()
    s.settled = False
    prompts = _candidates(s, admit=not shortage)
    budget = s.config.token_budget - s.running
    if not prompts or budget < 1:
        return
    recent = s.ledger.seconds[-REMEMBERED:] if rule.decision_s is None else [rule.decision_s]
    limit = rule.tbt_s - max(recent, default=0.0)
    each, over = divmod(s.context, max(s.running, 1))
    running = [(each + (i < over), rule.steps) for i in range(s.running)]
    least = Span(1, min(prompt.before for prompt in prompts.values()), 0, s.clock.layers)
    if s.running and s.clock.step_s(s.running, s.context, [least]) > limit:
        s.ledger.full += 1
        return
    begun = perf_counter()
    decision = _decision(s, prompts, running, limit, budget)
    s.spent_s = perf_counter() - begun if rule.decision_s is None else rule.decision_s
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


def _candidates(s: RecedingScheduler, *, admit: bool) -> dict[int, Pending]:
    """Prompts that the next step could compute: those in prefill, and those that wait and have room."""
    weight = lambda r: 1.0 + s.rule.ageing_per_s * max(0.0, s.now_s - s.arrived.get(r, s.now_s))  # noqa: E731
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
    limit_s: float,
    budget: int,
) -> Decision:
    """What the program says, or, where the linear model finds no room that the step model has, the least of it."""
    rule = s.rule
    held = sum(prompts[r].tokens for r in s.progress)
    try:
        return next_step(
            prompts,
            running,
            rule.linear,
            s.clock,
            tbt_s=limit_s,
            budget_tokens=budget,
            kv_tokens=s.free * s.config.block_tokens + held + s.running,
            steps=rule.steps,
            seconds=rule.seconds,
            last=s.last,
        )
    except NoFeasiblePlanError:
        return Decision((), "fallback", "decodes alone exceed the limit by the linear model")


class RecedingReplica(Replica):
    """A replica whose scheduler decides with a program, and is told the time."""

    __slots__ = ()

    def plan(self, horizon_s: float) -> float:
        """Decide the next step, starting now; the time it ends, the decision included."""
        scheduler = self.scheduler
        assert isinstance(scheduler, RecedingScheduler)
        scheduler.now_s, scheduler.spent_s = self.now, 0.0
        end = super().plan(horizon_s)
        if scheduler.spent_s and end < inf and not scheduler.chunks:  # decided that no prompt runs
            self._first += scheduler.spent_s
            end = self.end = end + scheduler.spent_s
        return end


@dataclass(frozen=True, slots=True, eq=False)
class RecedingSpec(ReplicaSpec):
    """A model copy whose steps are decided by a program; of its scheduler, the policy and order do not count.

    ledgers   of the replicas started from it, in order
    """

    rule: Receding = field(kw_only=True)
    ledgers: list[Ledger] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise PoolError for pipelines, attention groups, and encoders; NoFeasiblePlanError for a TBT limit below a
        decode step."""
        if self.lanes > 1 or self.encoder is not None:
            raise PoolError(
                f"a receding horizon with pp={self.mapping.pp}, attention_dp={self.mapping.attention_dp}"
                f"{', an encoder' if self.encoder else ''}: expected 1 and 1, and none; use policy chunked"
            )
        require_tbt(TableClock(self.model, self.rule.linear.layers), (), self.rule.tbt_s)

    def start(self, prompts: list[int], outputs: list[int], log: Log, index: int) -> AnyReplica:
        """A fresh replica."""
        clock = TableClock(self.model, self.rule.linear.layers)
        self.ledgers.append(Ledger())
        scheduler = RecedingScheduler(
            self.scheduler, self.kv_blocks, prompts, outputs, self.rule, clock, self.ledgers[-1]
        )
        replica = RecedingReplica(self.model, [scheduler], log, index)
        replica.before_prompts_s = lambda chunks: scheduler.spent_s
        return replica


def receding_spec(spec: ReplicaSpec, rule: Receding) -> RecedingSpec:
    """The replica, with its steps decided by a program."""
    return RecedingSpec(
        spec.model,
        spec.mapping,
        spec.scheduler,
        spec.kv_blocks,
        spec.device,
        spec.share,
        spec.work,
        spec.arithmetic_dtype,
        spec.role,
        spec.encoder,
        rule=rule,
    )
