"""Published policies cut and order prompts as they are described, and what follows them counts every token once."""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.prefillcosts import LinearStep, Piece, Span
from planner.prefillpolicies import (
    deadline_first,
    group_rule,
    layer_ends,
    layered,
    orca,
    prefill_first,
    sarathi,
    sarathi_serve,
    shortest_first,
)
from planner.prefillsteps import Job, Policy, Prompt, Running, State, Step, Window, follow, window_of

STEP = LinearStep((Piece(0.01, 1e-5, 1e-5, 0.005),), 1e-9, 1e-8, 0.001, 0.001, 16)


def noted(policy: Policy, steps: list[tuple[int, Step]]) -> Policy:
    """The policy, with (decodes, step) of every step kept."""

    def choose(state: State) -> Step:
        step = policy(state)
        steps.append((state.decodes, step))
        return step

    return choose


def kinds() -> dict[str, Policy]:
    """One of each, fresh."""
    return {
        "orca": orca(1500, 4),
        "prefill first": prefill_first(1500),
        "sarathi": sarathi(200, 64),
        "sarathi serve": sarathi_serve(300),
        "layered": layered(),
        "shortest": shortest_first(300, 50.0),
        "deadline": deadline_first(300),
    }


@st.composite
def windows(draw: st.DrawFn) -> Window:
    """Prompts with outputs and limits, beside decodes, with little KV and few seats."""
    n = draw(st.integers(1, 10))
    arrivals = sorted(draw(st.lists(st.floats(0.0, 1.0), min_size=n, max_size=n)))
    limits = st.sampled_from([0.5, 2.0, inf])
    prompts = tuple(
        Prompt(at, draw(st.integers(1, 2500)), draw(st.integers(1, 9)), 1.0, draw(limits)) for at in arrivals
    )
    running = draw(st.lists(st.builds(Running, st.integers(1, 900), st.integers(1, 20)), max_size=4))
    return Window(prompts, tuple(running), draw(st.sampled_from([4000.0, inf])), draw(st.integers(4, 12)))


@settings(max_examples=60, deadline=None)
@given(windows())
def test_every_token_is_computed_once_and_every_gap_counted(window: Window) -> None:
    """Token-layers of all spans = those of all prompts; gaps = tokens after the first; TTFT is no less than alone."""
    for name, policy in kinds().items():
        steps: list[tuple[int, Step]] = []
        schedule = follow(window, noted(policy, steps), STEP, name)
        work = sum(s.tokens * (s.end - s.first) for _, step in steps for _, s in step.items)
        assert work == STEP.layers * sum(p.tokens for p in window.prompts)
        outputs = sum(p.outputs - 1 for p in window.prompts) + sum(r.left for r in window.running)
        assert schedule.gap_count.sum() == outputs
        alone = [STEP.alone_s(p.tokens) for p in window.prompts]
        assert (schedule.ttft_s >= np.array(alone) * (1 - 1e-9)).all()
        assert schedule.together == (name != "prefill first" or schedule.together)


@settings(max_examples=40, deadline=None)
@given(windows(), st.sampled_from([64, 300, 1000]))
def test_a_budget_bounds_every_gap(window: Window, budget: int) -> None:
    """Stall-free: no step of Sarathi-Serve is longer than one with a full budget, so no gap is."""
    steps: list[tuple[int, Step]] = []
    schedule = follow(window, noted(sarathi_serve(budget), steps), STEP)
    for decodes, step in steps:
        assert decodes + sum(s.tokens for _, s in step.items) <= max(budget, decodes)
    attended = sum(p.tokens + p.outputs for p in window.prompts) + sum(r.context + r.left for r in window.running)
    longest = max(p.tokens for p in window.prompts)
    full = STEP.step_s(window.max_seqs, attended, [Span(budget, longest, 0, 16)])
    assert schedule.max_tbt_s <= full


def state(jobs: list[Job], decodes: int = 0) -> State:
    """Something to decide."""
    return State(1.0, jobs, decodes, 100 * decodes, STEP, inf, 100)


def job(index: int, tokens: int, arrival_s: float = 0.0, **rest: Any) -> Job:
    """A prompt that waits."""
    return Job(index, Prompt(arrival_s, tokens, **rest))


def test_the_published_rules() -> None:
    """What each takes of the same queue beside 10 decodes."""
    jobs = [job(0, 700), job(1, 100), job(2, 900, ttft_s=0.3)]

    def spans(policy: Policy) -> list[tuple[int, int]]:
        return [(j.index, s.tokens) for j, s in policy(state(jobs, 10)).items]

    assert spans(orca(1000)) == [(0, 700), (1, 100)]
    assert spans(orca(8192, 1)) == [(0, 700)]
    assert not prefill_first(1000)(state(jobs, 10)).decode
    assert spans(prefill_first(800)) == [(0, 700), (1, 100)]
    assert spans(sarathi(256)) == [(0, 246)]
    assert spans(sarathi(250, tile=128)) == [(0, 246)]
    assert spans(sarathi_serve(800)) == [(0, 700), (1, 90)]
    assert spans(shortest_first(800)) == [(1, 100), (0, 690)]
    assert spans(shortest_first(800, ageing_tokens_per_s=1e6)) == [(1, 100), (0, 690)]
    assert spans(deadline_first(800)) == [(2, 790)]
    aged = [job(0, 700, 0.0), job(1, 100, 0.9)]
    items = shortest_first(500, ageing_tokens_per_s=1000.0)(state(aged)).items
    assert [(j.index, s.tokens) for j, s in items] == [(0, 500)]


def test_layered_prefill_walks_a_cohort_through_groups_of_layers() -> None:
    """Two prompts of 1000 tokens in all: two groups of 8 layers; the third waits for the next cohort."""
    window = window_of([0.0, 0.0, 0.001], [600, 400, 513], [1, 1, 1], [Running(10, 9)])
    steps: list[tuple[int, Step]] = []
    schedule = follow(window, noted(layered(), steps), STEP)
    walked = [[(j.index, s.first, s.end) for j, s in step.items] for _, step in steps if step.items]
    assert walked == [[(0, 0, 8), (1, 0, 8)], [(0, 8, 16), (1, 8, 16)], [(2, 0, 8)], [(2, 8, 16)]]
    assert all(step.decode for _, step in steps)
    assert schedule.ttft_s[0] == schedule.ttft_s[1]
    assert [group_rule(n) for n in (1, 512, 513, 8192)] == [1, 1, 2, 16]
    assert layer_ends(10, 4) == [3, 6, 8, 10]
    assert layer_ends(3, 9) == [1, 2, 3]


def test_prefill_first_stalls_decodes_and_chunks_do_not() -> None:
    """The reason for chunked prefill, in one queue."""
    rng = np.random.default_rng(0)
    at = np.cumsum(rng.exponential(0.05, 60))
    window = window_of(at.tolist(), rng.integers(500, 4000, 60).tolist(), [30] * 60, [Running(500, 60)] * 8)
    stalled, chunked = (follow(window, policy, STEP) for policy in (prefill_first(8192), sarathi_serve(512)))
    assert stalled.max_tbt_s > 3 * chunked.max_tbt_s
    assert stalled.mean_ttft_s < chunked.mean_ttft_s


def test_gaps_are_measured_over_pauses() -> None:
    """A sequence that waits while a prompt runs alone waits for both steps."""
    window = window_of([0.0], [1000], [1], [Running(10, 2)])
    schedule = follow(window, prefill_first(8192), STEP)
    prompt = STEP.step_s(0, 0, [Span(1000, 0, 0, 16)])
    first, second = STEP.step_s(1, 10, ()), STEP.step_s(1, 11, ())
    assert schedule.ttft_s[0] == pytest.approx(prompt)
    assert schedule.gap_s.tolist() == pytest.approx([prompt + first, second])
    assert schedule.tbt_s(0.5) == pytest.approx(second)
    assert schedule.tbt_s(0.99) == schedule.max_tbt_s == pytest.approx(prompt + first)


def test_bad_input_is_named() -> None:
    """Chunks above the budget, groups that do not divide, windows that cannot be served, policies out of order."""
    with pytest.raises(PlanError, match="chunk of 600 tokens: expected at most the budget of 512"):
        sarathi(600, budget=512)
    with pytest.raises(PlanError, match="5 groups of 16 layers: expected a number that divides them, such as 4"):
        layered(5, layers=16)
    with pytest.raises(PlanError, match="5 groups of 16 layers"):
        follow(window_of([0.0], [10], [1]), layered(5), STEP)
    with pytest.raises(PlanError, match="budget=0"):
        sarathi_serve(0)
    with pytest.raises(PlanError, match="ageing"):
        shortest_first(10, -1.0)
    with pytest.raises(PlanError, match="at least one"):
        Window(())
    with pytest.raises(PlanError, match="order"):
        Window((Prompt(1.0, 1), Prompt(0.0, 1)))
    with pytest.raises(PlanError, match="tokens of KV"):
        Window((Prompt(0.0, 100),), kv_tokens=50)
    with pytest.raises(PlanError, match="at least 1"):
        Prompt(0.0, 0)
    with pytest.raises(PlanError, match="an empty step"):
        follow(window_of([0.0], [10], [1]), lambda state: Step(), STEP)
    with pytest.raises(PlanError, match="0 tokens and 0 layers done"):
        follow(window_of([0.0], [10], [1]), lambda s: Step(((s.jobs[0], Span(5, 3, 0, 16)),)), STEP)
