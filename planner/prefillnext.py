"""What should the next step compute? The program over a few steps, its first step taken, and solved again after it.

The program is the proxy of planner.prefillprogram on the linear model. Its first step says which prompts are served,
and in which order; how much of them is what the clock that the engine goes by lets into the TBT limit, so that an error
of the linear model never breaks the limit. Where the solver has found nothing in its time, or there is nothing to find,
the step is what shortest-first would take, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from planner.errors import NoFeasiblePlanError, PlanError
from planner.prefillcosts import Clock, LinearStep, Span
from planner.prefillhorizon import Axis, Horizon, Pending, require_tbt
from planner.prefillprogram import Program
from planner.prefillsolution import shifted
from planner.prefillsteps import State, Step

#: Prompts that a program is about at most: those with the most weight per token left.
MOST_PROMPTS = 16
#: A prompt's part below this is not taken.
LEAST_PART = 1e-6


@dataclass(frozen=True, slots=True)
class Decision:
    """A step.

    spans      (key of the prompt, its span), in the order they are served
    source     solver, or fallback and `why`
    objective, bound, gap   of the program; values, keys: to start the next solution from
    """

    spans: tuple[tuple[int, Span], ...]
    source: str = "solver"
    why: str = ""
    objective: float = 0.0
    bound: float = 0.0
    gap: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict)
    keys: tuple[int, ...] = ()


def next_step(
    waiting: Mapping[int, Pending],
    running: Sequence[tuple[int, int]],
    step: LinearStep,
    clock: Clock | None = None,
    *,
    tbt_s: float = inf,
    budget_tokens: float = 8192,
    kv_tokens: float = inf,
    axis: Axis = "tokens",
    steps: int = 8,
    seconds: float = 0.05,
    last: Decision | None = None,
    relaxed: bool = True,
) -> Decision:
    """What the next step computes of the prompts that wait, by key.

    running   (tokens attended to in the next step, tokens to come) of each decode
    clock     prices what is decided; the linear model itself if left out
    steps     of the horizon; seconds: that the solver may take; last: the decision before, to start from
    relaxed   whether a step may have prompts by half, which leaves a linear program: sooner solved, its bound is lower

    Raises PlanError for a horizon of no steps, NoFeasiblePlanError, with the floor, for a TBT limit below the decodes.
    """
    if steps < 1:
        raise PlanError(f"horizon of {steps} steps: expected at least 1")
    require_tbt(step, running, tbt_s if running else inf)
    if not waiting:
        return Decision(())
    keys = tuple(sorted(waiting, key=lambda key: waiting[key].tokens / max(waiting[key].weight, 1e-9)))
    begun = [key for key in keys if waiting[key].layers > 0]
    keys = tuple(begun + [key for key in keys if key not in begun][: max(MOST_PROMPTS - len(begun), 0)])
    prompts = tuple(waiting[key] for key in keys)
    limit = tbt_s if running else inf
    try:
        horizon = Horizon(step, prompts, steps, tuple(running), axis, limit, budget_tokens, kv_tokens, finish=False)
        mean_step_s = limit if limit < inf else step.alone_s(min(budget_tokens, sum(p.tokens for p in prompts)))
        start = (
            shifted(last.values, {last.keys.index(k): i for i, k in enumerate(keys) if k in last.keys}) if last else {}
        )
        found = Program(horizon, "proxy", mean_step_s, relaxed=relaxed).solve(seconds, 1e-3, start)
        why = f"no solution in {seconds:g} s"
    except NoFeasiblePlanError as error:
        found, why = None, str(error)
    order = list(range(len(keys)))
    if found is not None:
        order.sort(key=lambda r: (-prompts[r].layers, found.fractions[r, 0] < LEAST_PART, r))
    wanted = {keys[r]: (prompts[r], 0.0 if found is None else float(found.fractions[r, 0])) for r in order}
    filled = _by_tokens if axis == "tokens" else _by_layers
    spans = filled(wanted, running, clock or step, limit, budget_tokens, kv_tokens)
    if found is None:
        return Decision(spans, "fallback", why)
    return Decision(spans, "solver", "", found.objective, found.bound, found.gap, found.values, keys)


Wanted = Mapping[int, tuple[Pending, float]]


def _by_tokens(
    wanted: Wanted, running: Sequence[tuple[int, int]], clock: Clock, limit: float, budget: float, kv_tokens: float
) -> tuple[tuple[int, Span], ...]:
    """Prompts in order, as many tokens as the limit, budget and KV allow, the last one cut."""
    count, context = len(running), sum(c for c, _ in running)
    spans: list[tuple[int, Span]] = []
    room = min(budget, kv_tokens - count)
    for key, (prompt, _) in wanted.items():
        most = int(min(prompt.tokens, room))
        if most < 1:
            break

        def fits(tokens: int, prompt: Pending = prompt) -> bool:
            span = Span(tokens, prompt.before, 0, clock.layers)
            return clock.step_s(count, context, [*(s for _, s in spans), span]) <= limit

        low, high = (most, most) if fits(most) else (0, most)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        if low < 1:
            break
        spans.append((key, Span(low, prompt.before, 0, clock.layers)))
        room -= low
        if low < prompt.tokens:
            break
    if not spans and not running:
        key, (prompt, _) = next(iter(wanted.items()))
        spans.append((key, Span(1, prompt.before, 0, clock.layers)))
    return tuple(spans)


def _by_layers(
    wanted: Wanted, running: Sequence[tuple[int, int]], clock: Clock, limit: float, budget: float, kv_tokens: float
) -> tuple[tuple[int, Span], ...]:
    """Those under way go on together; else the prompts the program begins with, through as many layers as fit.

    A prompt of which not even one layer fits is cut by tokens.
    """
    count, context = len(running), sum(c for c, _ in running)
    begun = {key: prompt for key, (prompt, _) in wanted.items() if prompt.layers}
    if begun:
        cohort = begun
    else:
        cohort, room = {}, min(budget, kv_tokens - count)
        for key, (prompt, part) in wanted.items():
            if prompt.tokens <= room and (part >= LEAST_PART or not cohort):
                cohort[key] = prompt
                room -= prompt.tokens
    if not cohort:
        return ()
    first = min(prompt.layers for prompt in cohort.values())
    cohort = {key: prompt for key, prompt in cohort.items() if prompt.layers == first}
    for end in range(clock.layers, first, -1):
        spans = tuple((key, Span(p.tokens, p.before, first, end)) for key, p in cohort.items())
        if clock.step_s(count, context, [s for _, s in spans]) <= limit:
            return spans
    if running and not begun and len(cohort) > 1:  # one layer of all of them is too much: the first alone
        key = next(iter(cohort))
        return _by_layers({key: wanted[key]}, running, clock, limit, budget, kv_tokens)
    return () if begun else _by_tokens(wanted, running, clock, limit, budget, kv_tokens)


class Receding:
    """A policy for planner.prefillsteps that asks `next_step` before every step with prompts.

    step       linear model; tbt_s and the rest as in next_step
    solved, fell_back   steps decided by the solver and by the fallback; reasons: why, by how often
    """

    def __init__(
        self,
        step: LinearStep,
        tbt_s: float,
        *,
        budget_tokens: float = 8192,
        axis: Axis = "tokens",
        steps: int = 8,
        seconds: float = 0.05,
        relaxed: bool = True,
        ageing_per_s: float = 0.0,
    ) -> None:
        """Every second of waiting makes a prompt's weight greater by `ageing_per_s` of it."""
        self.relaxed = relaxed
        self.step, self.tbt_s, self.budget, self.axis = step, tbt_s, budget_tokens, axis
        self.steps, self.seconds, self.ageing = steps, seconds, ageing_per_s
        self.solved = self.fell_back = 0
        self.reasons: dict[str, int] = {}
        self.last: Decision | None = None

    def __call__(self, state: State) -> Step:
        """The next step of a state."""
        jobs = {job.index: job for job in state.jobs}
        if not jobs:
            return Step()
        waiting = {}
        for index, job in jobs.items():
            if job.admitted or job.prompt.tokens + job.prompt.outputs <= state.kv_free:
                aged = job.prompt.weight * (1.0 + self.ageing * (state.now_s - job.prompt.arrival_s))
                waiting[index] = Pending(job.left, job.tokens, job.layers, aged)
        each, over = divmod(state.context, max(state.decodes, 1))
        running = [(each + (i < over), self.steps) for i in range(state.decodes)]
        decision = next_step(
            waiting,
            running,
            self.step,
            state.clock,
            tbt_s=self.tbt_s,
            budget_tokens=self.budget,
            axis=self.axis,
            steps=self.steps,
            seconds=self.seconds,
            last=self.last,
            relaxed=self.relaxed,
        )
        self.last = decision
        if waiting:
            self.solved += decision.source == "solver"
            self.fell_back += decision.source == "fallback"
        if decision.why:
            self.reasons[decision.why] = self.reasons.get(decision.why, 0) + 1
        return Step(tuple((jobs[key], span) for key, span in decision.spans if state.fits(jobs[key])), True)
