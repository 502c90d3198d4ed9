"""How do published systems choose the next step? Policies for planner.prefillsteps, each a few lines.

orca            whole prompts beside all decodes (Orca, OSDI 2022)
prefill_first   whole prompts alone as long as one can be admitted, decodes otherwise (vLLM V0)
sarathi         one chunk of one prompt beside all decodes, chunk + decodes filling whole tiles (arXiv:2308.16369)
sarathi_serve   all decodes, then chunks of prompts up to a token budget (arXiv:2403.02310)
layered         a cohort of whole prompts, one group of layers a step, decodes through all layers (layered prefill)
shortest_first  as sarathi_serve, the prompt with the least left first, less so the longer it waits
deadline_first  as sarathi_serve, the earliest TTFT deadline first
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, inf

from planner.errors import PlanError
from planner.prefillcosts import Span
from planner.prefillsteps import Job, Policy, State, Step

Order = Callable[[Job, State], float]
#: Tokens of a cohort at most, and tokens of a prompt for each group of layers (layered prefill's rule).
COHORT_TOKENS, GROUP_TOKENS = 8192, 512


def first_come(job: Job, state: State) -> float:
    """Order of arrival."""
    return job.index


def whole(job: Job, state: State) -> Span:
    """What is left of a prompt, through all layers."""
    return Span(job.left, job.tokens, 0, state.clock.layers)


def _whole_prompts(state: State, budget: float, most: float) -> list[tuple[Job, Span]]:
    """Whole prompts in order of arrival within a budget; the first may exceed it, or it would wait for ever."""
    items: list[tuple[Job, Span]] = []
    left = budget
    for job in state.jobs:
        if len(items) >= most or (job.left > left and items) or not state.fits(job):
            break
        items.append((job, whole(job, state)))
        left -= job.left
    return items


def orca(budget: float = 8192, most_prompts: float = inf) -> Policy:
    """Whole prompts beside the decodes, up to so many tokens and prompts a step."""
    _positive("budget", budget)
    return lambda state: Step(tuple(_whole_prompts(state, budget - state.decodes, most_prompts)), True)


def prefill_first(budget: float = 8192) -> Policy:
    """Whole prompts alone, as long as there are any with room."""
    _positive("budget", budget)

    def choose(state: State) -> Step:
        items = _whole_prompts(state, budget, inf)
        return Step(tuple(items), not items)

    return choose


def sarathi(chunk: int, tile: int = 1, budget: float = inf) -> Policy:
    """One chunk beside the decodes: `chunk` tokens with them, rounded to whole tiles.

    Raises PlanError for a chunk above the token budget of a step.
    """
    _positive("chunk", chunk)
    if chunk > budget:
        raise PlanError(f"chunk of {chunk} tokens: expected at most the budget of {budget:.0f} tokens a step")

    def choose(state: State) -> Step:
        total = ceil(max(chunk, state.decodes + 1) / tile) * tile
        return Step(tuple(_chunks(state, total - state.decodes, 1, first_come)), True)

    return choose


def sarathi_serve(budget: int, order: Order = first_come) -> Policy:
    """All decodes, then what is left of prompts, cut at the budget."""
    _positive("budget", budget)
    return lambda state: Step(tuple(_chunks(state, budget - state.decodes, inf, order)), True)


def _chunks(state: State, budget: float, most: float, order: Order) -> list[tuple[Job, Span]]:
    """Chunks of prompts in an order, those admitted first when a policy keeps to arrival."""
    items: list[tuple[Job, Span]] = []
    for job in sorted(state.jobs, key=lambda j: order(j, state)):
        if budget < 1 or len(items) >= most:
            break
        if not state.fits(job):
            if order is first_come:
                break
            continue
        tokens = int(min(job.left, budget))
        items.append((job, Span(tokens, job.tokens, 0, state.clock.layers)))
        budget -= tokens
    if not items and not state.decodes:  # a budget that decodes had filled
        job = next(j for j in state.jobs if state.fits(j))
        items.append((job, Span(1, job.tokens, 0, state.clock.layers)))
    return items


def shortest_first(budget: int, ageing_tokens_per_s: float = 0.0) -> Policy:
    """Least tokens left first, each second of waiting counting as so many tokens less."""
    if not ageing_tokens_per_s >= 0:
        raise PlanError(f"ageing of {ageing_tokens_per_s} tokens/s: expected at least 0")

    def rank(job: Job, state: State) -> float:
        return job.left - ageing_tokens_per_s * (state.now_s - job.prompt.arrival_s)

    return sarathi_serve(budget, rank)


def deadline_first(budget: int) -> Policy:
    """Earliest arrival + TTFT limit first; those without a limit last, in order of arrival."""

    def rank(job: Job, state: State) -> float:
        due = job.prompt.arrival_s + job.prompt.ttft_s
        return due if due < inf else 1e12 + job.index

    return sarathi_serve(budget, rank)


def group_rule(tokens: int) -> int:
    """Groups of layers for a cohort: one for every 512 tokens, rounded up.

    >>> [group_rule(n) for n in (1, 512, 513, 8192)]
    [1, 1, 2, 16]
    """
    return max(1, ceil(tokens / GROUP_TOKENS))


def layer_ends(layers: int, groups: int) -> list[int]:
    """Last layer + 1 of each group, as even as they go, larger groups first.

    >>> layer_ends(10, 4)
    [3, 6, 8, 10]
    """
    groups = min(groups, layers)
    sizes = [layers // groups + (g < layers % groups) for g in range(groups)]
    return [sum(sizes[: g + 1]) for g in range(groups)]


def require_groups(layers: int, groups: int) -> None:
    """Raise PlanError for groups of layers that do not divide them."""
    if groups < 1 or layers % groups:
        fits = [g for g in range(1, layers + 1) if layers % g == 0]
        nearest = min(fits, key=lambda g: abs(g - groups))
        raise PlanError(f"{groups} groups of {layers} layers: expected a number that divides them, such as {nearest}")


def layered(groups: int | None = None, cohort_tokens: float = COHORT_TOKENS, layers: int | None = None) -> Policy:
    """A cohort of whole prompts goes through one group of layers a step; the next one starts when it is through.

    groups   of equal size, whose number must divide `layers`; None for one per 512 tokens of the cohort, as even as
             they go

    Raises PlanError for groups that do not divide.
    """
    _positive("cohort_tokens", cohort_tokens)
    if groups is not None and layers is not None:
        require_groups(layers, groups)
    ends: list[int] = []
    cohort: list[Job] = []

    def choose(state: State) -> Step:
        if not cohort:
            cohort[:] = [job for job, _ in _whole_prompts(state, cohort_tokens, inf)]
            if not cohort:
                return Step()
            if groups is not None:
                require_groups(state.clock.layers, groups)
            ends[:] = layer_ends(state.clock.layers, groups or group_rule(sum(job.left for job in cohort)))
        first, end = cohort[0].layers, ends.pop(0)
        step = Step(tuple((job, Span(job.left, job.tokens, first, end)) for job in cohort), True)
        if not ends:
            cohort.clear()
        return step

    return choose


def _positive(name: str, value: float) -> None:
    if not value >= 1:
        raise PlanError(f"{name}={value}: expected at least 1")
