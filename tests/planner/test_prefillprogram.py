"""The mixed-integer program of prefill scheduling finds what brute force finds; the relaxation is below it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import NoFeasiblePlanError, PlanError
from planner.prefillcosts import LinearStep, Piece, Span
from planner.prefillhorizon import Horizon, Pending
from planner.prefillprogram import Program

ONE = LinearStep((Piece(1.0, 0.25, 0.1, 0.5),), 0.02, 0.001, 0.2, 0.1, 4)
TWO = LinearStep((Piece(2.0, 0.05, 0.05, 0.7), Piece(0.3, 0.6, 0.3)), 0.02, 0.001, 0.1, 0.0, 4)
FLAT = LinearStep((Piece(2.0, 0.05, 0.05, 0.7), Piece(0.3, 0.6, 0.3)), 0.0, 0.001, 0.1, 0.0, 4)

Schedule = tuple[tuple[int, ...], ...]


def splits(total: int, steps: int, grain: int) -> Iterator[tuple[int, ...]]:
    """All ways of `total` as a sum of multiples of the grain over the steps."""
    for row in itertools.product(range(0, total + 1, grain), repeat=steps):
        if sum(row) == total:
            yield row


def cost(h: Horizon, schedule: Schedule, *, position: str) -> float | None:
    """Weighted TTFT of a schedule, followed step by step; None where it breaks a limit.

    position   what attention is charged by: the mean one of the prompt, or the true one
    """
    done, layers_done, now, total, kv = [0] * len(h.prompts), [p.layers for p in h.prompts], 0.0, 0.0, 0.0
    end: list[float | None] = [None] * len(h.prompts)
    ended: list[int | None] = [None] * len(h.prompts)
    for k in range(h.steps):
        row = [s[k] for s in schedule]
        busy = [r for r, n in enumerate(row) if n]
        release = max((h.prompts[r].release_s for r in busy), default=0.0)
        now = max(now, release)
        count, context = h.decodes(k)
        for r, p in enumerate(h.prompts):
            at = ended[r]
            if at is not None and at < k < at + p.outputs:
                count, context, kv = count + 1, context + p.tokens + p.before, kv + 1
        kv += h.decodes(k)[0]
        bare = LinearStep(h.step.pieces, 0.0, h.step.context_s, h.step.host_s, h.step.prompt_s, h.step.layers)
        spans, attention, seen = [], 0.0, 0.0
        for r in busy:
            p = h.prompts[r]
            if h.axis == "tokens":
                spans.append(Span(row[r], p.before + done[r], 0, h.step.layers))
                middle = p.tokens / 2 if position == "mean" else done[r] + row[r] / 2
                attention += h.step.attention_s * row[r] * (p.before + middle)
                seen += row[r]
                kv += row[r]
            else:
                first = layers_done[r]
                spans.append(Span(p.tokens, p.before, first, first + row[r]))
                part = row[r] / h.step.layers
                attention += h.step.attention_s * part * p.tokens * (p.before + p.tokens / 2)
                seen += p.tokens
                kv += p.tokens * part
        if seen > h.budget_tokens or kv > h.kv_tokens + 1e-9:
            return None
        if busy or count:
            took = bare.step_s(count, context, spans) + attention
            if took > h.limit_s(k) * (1 + 1e-9):
                return None
            now += took
        for r in busy:
            done[r] += row[r]
            layers_done[r] += row[r]
            whole = h.prompts[r].tokens if h.axis == "tokens" else h.step.layers - h.prompts[r].layers
            if done[r] == whole:
                end[r], ended[r] = now, k
    for r, p in enumerate(h.prompts):
        at_s = end[r]
        assert at_s is not None
        total += p.weight * (at_s - p.release_s)
    return total


def brute(h: Horizon, *, position: str = "mean") -> float | None:
    """The least weighted TTFT of all schedules in whole grains."""
    assert h.grain is not None
    lefts = [p.tokens if h.axis == "tokens" else h.step.layers - p.layers for p in h.prompts]
    every = itertools.product(*(list(splits(left, h.steps, h.grain)) for left in lefts))
    found = [c for c in (cost(h, s, position=position) for s in every) if c is not None]
    return min(found) if found else None


CASES = {
    "plain": Horizon(ONE, (Pending(4), Pending(2)), 3, grain=1),
    "weights": Horizon(ONE, (Pending(2, weight=0.2), Pending(3, weight=2.0), Pending(1)), 3, grain=1),
    "budget": Horizon(ONE, (Pending(4), Pending(2)), 4, grain=1, budget_tokens=2),
    "tbt": Horizon(ONE, (Pending(3, 2), Pending(3)), 4, ((30, 9), (10, 2)), grain=1, tbt_s=3.0),
    "decodes after": Horizon(ONE, (Pending(2, outputs=2), Pending(3, outputs=9)), 4, grain=1, budget_tokens=3),
    "kv": Horizon(ONE, (Pending(3, outputs=5), Pending(2)), 4, ((5, 9),), grain=1, kv_tokens=9, budget_tokens=3),
    "releases": Horizon(ONE, (Pending(4), Pending(2, release_s=2.0, weight=3.0)), 3, grain=1),
    "two pieces": Horizon(TWO, (Pending(6), Pending(2)), 3, ((5, 9),), grain=2, tbt_s=4.5),
    "grains": Horizon(TWO, (Pending(8), Pending(4)), 4, ((5, 9),), grain=4, tbt_s=6.0),
    "layers, one prompt": Horizon(TWO, (Pending(9),), 3, ((5, 9),), "layers", grain=1, tbt_s=5.0),
    "layers, begun": Horizon(TWO, (Pending(9, layers=2),), 3, ((5, 9),), "layers", grain=1, tbt_s=5.0),
    "layers, one piece": Horizon(
        LinearStep((Piece(1.0, 0.25, 0.1),), 0.02, 0.0, 0.2, 0.1, 4),
        (Pending(6), Pending(2, weight=2.0)),
        3,
        ((5, 9),),
        "layers",
        grain=1,
        tbt_s=2.4,
    ),
    "layers, budget": Horizon(
        LinearStep((Piece(1.0, 0.25, 0.1),), 0.0, 0.0, 0.2, 0.1, 2),
        (Pending(6), Pending(2)),
        4,
        ((5, 9),),
        "layers",
        grain=1,
        budget_tokens=6,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_program_finds_what_brute_force_finds(name: str) -> None:
    """Every integer schedule of tiny cases, priced step by step, against the exact objective."""
    h = CASES[name]
    least = brute(h)
    assert least is not None
    found = Program(h, "exact").solve()
    assert found is not None and found.optimal
    assert found.objective == pytest.approx(least, rel=1e-5)
    assert found.bound <= least * (1 + 1e-9)
    assert found.gap < 1e-4


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    weights=st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=2, max_size=2),
    budget=st.integers(2, 6),
    limit=st.sampled_from([2.2, 3.0, 9.0]),
    running=st.integers(0, 2),
    step=st.sampled_from([ONE, FLAT]),
)
def test_drawn_cases_agree_with_brute_force(
    tokens: list[int], weights: list[float], budget: int, limit: float, running: int, step: LinearStep
) -> None:
    """The optimum, or that there is none."""
    prompts = tuple(Pending(n, weight=w) for n, w in zip(tokens, weights, strict=False))
    decodes = tuple((5, 9) for _ in range(running))
    try:
        h = Horizon(step, prompts, 3, decodes, tbt_s=limit, budget_tokens=budget, grain=1)
    except NoFeasiblePlanError:
        assert step.step_s(max(running, 1), 5 * running or 1, ()) > limit
        return
    least = brute(h)
    if least is None:
        with pytest.raises(NoFeasiblePlanError, match="no schedule keeps"):
            Program(h, "exact").solve()
        return
    found = Program(h, "exact").solve()
    assert found is not None
    assert found.objective == pytest.approx(least, rel=1e-5)
    relaxed = Program(h, "exact", relaxed=True).solve()
    assert relaxed is not None
    assert relaxed.objective <= least * (1 + 1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if "layers" not in name])
def test_tangents_of_attention_are_a_lower_bound_of_true_positions(name: str) -> None:
    """With attention charged by where a chunk really is, no integer schedule is below the tangents' optimum."""
    h = CASES[name]
    true = brute(h, position="true")
    found = Program(h, "exact", attention="tangent").solve()
    assert true is not None and found is not None
    assert found.bound <= true * (1 + 1e-9)
    assert found.objective >= 0.9 * true


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 9), st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_shared_layers_are_never_overcharged(tokens: list[int], budget: int, running: int, layers: int) -> None:
    """On the layer axis with pieces and reload, the program is at most the true time of a cohort."""
    h = Horizon(TWO, tuple(Pending(n) for n in tokens), 1, tuple((5, 9) for _ in range(running)), "layers")
    found = Program(h, "exact").solve()
    assert found is not None
    true = cost(h, tuple((4,) for _ in tokens), position="mean")
    assert true is not None
    assert found.objective <= true * (1 + 1e-6)


def test_the_proxy_is_the_published_formula() -> None:
    """Mean step x sum of w (1 - done so far) + reload per step, of the solution itself."""
    h = Horizon(ONE, (Pending(40, weight=2.0), Pending(20)), 5, ((50, 9),), tbt_s=9.0, budget_tokens=20)
    found = Program(h, "proxy", mean_step_s=3.0).solve()
    assert found is not None
    done = found.fractions.cumsum(axis=1)
    used = np.count_nonzero(found.fractions.sum(axis=0) > 1e-6)
    expected = 3.0 * (np.array([2.0, 1.0]) @ (1 - done)).sum() + used * (0.5 + 0.1)
    assert found.objective == pytest.approx(expected, abs=1e-5)
    assert found.step_s.max() <= 9.0 + 1e-6
    assert (h.prompts[0].tokens * found.fractions[0] + h.prompts[1].tokens * found.fractions[1]).max() <= 20 + 1e-6
    assert found.bound <= found.objective


def test_the_layer_axis_is_chosen_by_what_reloads_cost() -> None:
    """The same prompt within the same TBT: layers win where reloads cost much, tokens where weights are hidden."""
    best = {}
    for kind, step in {
        "experts": LinearStep((Piece(0.010, 1e-6, 0.0, 0.020), Piece(0.0, 8e-6)), layers=8),
        "dense": LinearStep((Piece(0.010, 1e-6, 0.0, 0.0), Piece(0.0, 3e-5)), layers=8),
    }.items():
        for axis in ("tokens", "layers"):
            h = Horizon(step, (Pending(4096),), 10, ((500, 99),), axis, tbt_s=0.032)  # type: ignore[arg-type]
            found = Program(h, "exact").solve()
            assert found is not None
            best[kind, axis] = found.objective
    assert best["experts", "layers"] < 0.8 * best["experts", "tokens"]
    assert best["dense", "layers"] > 1.1 * best["dense", "tokens"]


def test_a_solution_may_start_from_the_last_one() -> None:
    """A full solution handed back gives the same optimum."""
    h = CASES["tbt"]
    first = Program(h, "exact").solve()
    assert first is not None
    again = Program(h, "exact").solve(start=first.values)
    assert again is not None
    assert again.objective == pytest.approx(first.objective)


def test_no_time_finds_nothing_and_says_so() -> None:
    """None, rather than an error or a false bound."""
    h = Horizon(TWO, tuple(Pending(n) for n in range(20, 60)), 12, ((5, 9),), grain=1, tbt_s=50.0)
    assert Program(h, "exact").solve(seconds=0.0) is None


def test_bad_horizons_are_named() -> None:
    """No steps, no budget, a limit below the floor, pieces that do not divide, nothing to do, too few steps."""
    prompt = (Pending(10),)
    with pytest.raises(PlanError, match="horizon of 0 steps"):
        Horizon(ONE, prompt, 0)
    with pytest.raises(PlanError, match="budget of 0"):
        Horizon(ONE, prompt, 1, budget_tokens=0)
    with pytest.raises(NoFeasiblePlanError, match=r"1 decodes alone takes 1330 ms, which is the floor"):
        Horizon(ONE, prompt, 1, ((30, 5),), tbt_s=1.0)
    with pytest.raises(
        PlanError, match="10 tokens left in pieces of 4: expected a number that divides them, such as 2"
    ):
        Horizon(ONE, prompt, 1, grain=4)
    with pytest.raises(PlanError, match="4 layers left in pieces of 3"):
        Horizon(ONE, prompt, 1, axis="layers", grain=3)
    with pytest.raises(PlanError, match="4 layers passed"):
        Horizon(ONE, (Pending(10, layers=4),), 1, axis="layers")
    with pytest.raises(PlanError, match="no prompts"):
        Program(Horizon(ONE, (), 1)).solve()
    with pytest.raises(PlanError, match="exact objective"):
        Program(Horizon(ONE, (Pending(3, release_s=1.0),), 2))
    with pytest.raises(NoFeasiblePlanError, match="1 prompts in 2 steps"):
        Program(Horizon(ONE, prompt, 2, budget_tokens=3)).solve()
    with pytest.raises(PlanError, match="at least 1"):
        Pending(0)
