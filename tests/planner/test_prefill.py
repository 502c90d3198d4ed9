"""The three uses: gaps to the best possible, a table of cuts by load, and the next step of a receding horizon."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import prefillnext
from planner.catalogue import open_catalogue
from planner.errors import NoFeasiblePlanError, PlanError
from planner.plan import Pool
from planner.prefill import Cut, best_possible, choose_cut, choose_cut_of
from planner.prefillcosts import LinearStep, Piece
from planner.prefillhorizon import Axis, Pending
from planner.prefillnext import Receding, next_step
from planner.prefillpolicies import layered, orca, prefill_first, sarathi_serve, shortest_first
from planner.prefillsteps import Running, Window, follow, window_of
from simulator.workload import load_profile, synthesize

#: Weights hidden behind arithmetic above a few hundred tokens; experts that few decodes read but every chunk does.
DENSE = LinearStep((Piece(0.012, 1e-6, 2e-6), Piece(0.0, 2.5e-5, 2.5e-5)), 1e-10, 1e-9, 0.001, 0.001, 32)
EXPERTS = LinearStep((Piece(0.012, 1e-6, 2e-5, 0.018), Piece(0.0, 8e-6, 8e-6)), 1e-10, 1e-9, 0.001, 0.001, 48)


def traffic(n: int, gap_s: float, seed: int = 0, running: int = 20, outputs: int = 60) -> Window:
    """Poisson arrivals of uniform lengths beside decodes."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(gap_s, n))
    many = rng.integers(outputs // 3, outputs, n)
    return window_of(at.tolist(), rng.integers(200, 8000, n).tolist(), many.tolist(), [Running(2000, 200)] * running)


def test_the_gap_of_every_policy_to_the_best_possible() -> None:
    """Bounds are below means; those that break the limit are compared at their own longest gap."""
    window = traffic(60, 0.2)
    policies = {"orca": orca(), "budget": sarathi_serve(512), "shortest": shortest_first(512), "whole": prefill_first()}
    schedules = [follow(window, policy, DENSE, name) for name, policy in policies.items()]
    found = best_possible(window, DENSE, schedules, tbt_s=0.05)
    assert [s.name for s in found.standings] == list(policies)
    for standing in found.standings:
        assert 0 <= standing.gap < 1
        assert standing.bound.ttft_s <= standing.ttft_s
        assert standing.keeps == (standing.max_tbt_s <= 0.05 * (1 + 1e-9))
    by_name = {s.name: s for s in found.standings}
    assert by_name["shortest"].keeps and not by_name["orca"].keeps
    assert by_name["shortest"].gap < by_name["budget"].gap < 0.6


def test_the_table_prefers_larger_steps_at_higher_load() -> None:
    """The best cut of a load has the least mean TTFT of those tried that keep the limit; bounds are below it."""
    cuts = [Cut("budget", n) for n in (512, 1024, 2048, 4096)] + [Cut("layers", 0)]
    windows = {load: traffic(50, 1 / load, running=10) for load in (1.0, 6.0)}
    rows = choose_cut_of(EXPERTS, windows, 0.045, cuts, below=EXPERTS)
    for row in rows:
        assert row.cut is not None and row.bound_s is not None
        within = [mean for _, mean, tbt in row.tried if tbt <= 0.045]
        assert row.ttft_s == min(within)
        assert row.bound_s <= row.ttft_s
        assert len(row.tried) == len(cuts)
    assert rows[1].ttft_s > rows[0].ttft_s
    tight = choose_cut_of(EXPERTS, windows, 0.0332, cuts)
    assert all(row.cut is None or row.tbt_s <= 0.0332 for row in tight)
    none = choose_cut_of(EXPERTS, windows, 0.0145, cuts)
    assert all(row.cut is None and row.tbt_s == min(t for *_, t in row.tried) for row in none)


def test_the_table_of_a_pool() -> None:
    """From a catalogue's step model and a workload, at two loads."""
    catalogue = open_catalogue("qwen3-8b", "h100-sxm", 8, "vllm")
    requests = synthesize(load_profile("azure-conversation-2023"), 40)
    cuts = (Cut("budget", 512), Cut("budget", 2048), Cut("layers", 4), Cut("whole", 8192))
    rows = choose_cut(catalogue, Pool(1), requests, (2.0, 8.0), 0.05, cuts)
    assert [row.load_per_s for row in rows] == [2.0, 8.0]
    for row in rows:
        assert row.bound_s is not None
        assert 0 < row.bound_s <= row.ttft_s
        assert row.tbt_s > 0
    with pytest.raises(NoFeasiblePlanError, match="which is the floor"):
        choose_cut(catalogue, Pool(1), requests, (2.0,), 0.001, cuts)
    with pytest.raises(PlanError, match="5 groups of 36 layers"):
        choose_cut(catalogue, Pool(1), requests, (2.0,), 0.05, (Cut("layers", 5),))
    with pytest.raises(PlanError, match="chunk of 9000 tokens: expected at most the 8192"):
        choose_cut(catalogue, Pool(1), requests, (2.0,), 0.05, (Cut("chunk", 9000),))
    with pytest.raises(PlanError, match="0 loads"):
        choose_cut(catalogue, Pool(1), requests, (), 0.05)


waiting = st.dictionaries(
    st.integers(0, 99), st.builds(Pending, st.integers(1, 5000), st.integers(0, 3000)), min_size=1, max_size=6
)
running = st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 30)), max_size=30)


@settings(max_examples=30, deadline=None)
@given(waiting, running, st.sampled_from([DENSE, EXPERTS]), st.sampled_from([64, 700, 8192]), st.floats(0.0, 0.05))
def test_a_step_keeps_every_limit(
    waiting: dict[int, Pending], running: list[tuple[int, int]], step: LinearStep, budget: int, slack_s: float
) -> None:
    """Priced by the clock it stays within the TBT limit and the budget, takes of each prompt what is left at most."""
    count, context = len(running), sum(c for c, _ in running)
    tbt_s = step.step_s(max(count, 1), context, ()) + slack_s
    decision = next_step(waiting, running, step, tbt_s=tbt_s, budget_tokens=budget, steps=4, seconds=5.0)
    spans = [span for _, span in decision.spans]
    if running:
        assert step.step_s(count, context, spans) <= tbt_s
    else:
        assert spans
    assert sum(s.tokens for s in spans) <= budget
    assert len({key for key, _ in decision.spans}) == len(spans)
    for key, span in decision.spans:
        assert 1 <= span.tokens <= waiting[key].tokens
        assert span.before == waiting[key].before
    assert decision.source == "solver"
    assert decision.bound <= decision.objective


def test_a_solver_out_of_time_falls_back_and_says_so() -> None:
    """The fallback serves the least left first, within the same limits."""
    waiting = {1: Pending(3000), 2: Pending(100), 3: Pending(900)}
    decision = next_step(waiting, [(500, 10)] * 4, DENSE, tbt_s=0.03, seconds=0.0)
    assert decision.source == "fallback"
    assert decision.why == "no solution in 0 s"
    assert [key for key, _ in decision.spans][:2] == [2, 3]
    policy = Receding(DENSE, 0.05, seconds=0.0)
    window = traffic(10, 0.2)
    schedule = follow(window, policy, DENSE)
    assert policy.fell_back > 0 and policy.solved == 0
    assert policy.reasons == {"no solution in 0 s": policy.fell_back}
    assert schedule.max_tbt_s <= 0.05 * (1 + 1e-9)


@pytest.mark.parametrize("axis", ["tokens", "layers"])
def test_the_receding_horizon_keeps_the_limit_throughout(axis: Axis) -> None:
    """Every gap of every sequence, on both axes, while more sequences join and contexts grow."""
    policy = Receding(EXPERTS, 0.04, axis=axis, seconds=1.0)
    schedule = follow(traffic(25, 0.2), policy, EXPERTS)
    assert schedule.max_tbt_s <= 0.04 * (1 + 1e-9)
    assert policy.solved > 0 and policy.fell_back == 0


def test_a_prompt_too_long_for_a_layer_is_cut_by_tokens() -> None:
    """One layer of 100,000 tokens exceeds the limit: the step takes as many tokens through all layers as fit."""
    decision = next_step({1: Pending(100_000)}, [(500, 9)], DENSE, tbt_s=0.03, budget_tokens=200_000, axis="layers")
    ((key, span),) = decision.spans
    assert (key, span.first, span.end) == (1, 0, DENSE.layers)
    assert 1 <= span.tokens < 100_000
    assert DENSE.step_s(1, 500, [span]) <= 0.03 < DENSE.step_s(1, 500, [span._replace(tokens=span.tokens + 1)])


def test_whole_and_fractional_steps_serve_the_same_prompts() -> None:
    """The relaxation's bound is no higher, and on this queue its first step is that of the mixed-integer program."""
    waiting = {i: Pending(tokens) for i, tokens in enumerate((3000, 500, 4000, 900))}
    by_kind = {
        relaxed: next_step(waiting, [(500, 10)] * 4, EXPERTS, tbt_s=0.04, seconds=10.0, relaxed=relaxed)
        for relaxed in (True, False)
    }
    assert by_kind[True].bound <= by_kind[False].objective
    assert by_kind[True].spans == by_kind[False].spans


def test_a_decision_starts_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next program is given the last solution one step on, for the prompts that are still there."""
    waiting = {7: Pending(5000), 9: Pending(2000)}
    first = next_step(waiting, [(500, 10)] * 4, EXPERTS, tbt_s=0.04, seconds=5.0)
    assert first.values and set(first.keys) == {7, 9}
    given: list[dict[str, float]] = []
    real = prefillnext.shifted

    def kept(values: dict[str, float], prompts: dict[int, int]) -> dict[str, float]:
        given.append(real(values, prompts))
        return given[-1]

    monkeypatch.setattr(prefillnext, "shifted", kept)
    second = next_step(
        {7: Pending(5000), 3: Pending(100)}, [(500, 10)] * 4, EXPERTS, tbt_s=0.04, seconds=5.0, last=first
    )
    assert second.source == "solver"
    number = first.keys.index(7), second.keys.index(7)
    assert given[0][f"n_{number[1]}_0"] == first.values[f"n_{number[0]}_1"]
    assert "n_0_6" not in given[0] or number[1] == 0


def test_the_receding_horizon_beats_fixed_budgets_at_the_same_gaps() -> None:
    """With experts that chunks reload, the least mean TTFT of all policies whose gaps are as short."""
    window, limit = traffic(60, 0.2), 0.035
    fixed = {f"budget {n}": sarathi_serve(n) for n in (256, 512, 1024, 1500, 2048, 4096)}
    fixed |= {f"shortest {n}": shortest_first(n) for n in (256, 512, 1024, 1500, 2048, 4096)}
    fixed |= {"layered": layered(), "orca": orca(), "first": prefill_first()}
    schedules = [follow(window, policy, EXPERTS, name) for name, policy in fixed.items()]
    best = min(s.mean_ttft_s for s in schedules if s.tbt_s(0.99) <= limit)
    receding = follow(window, Receding(EXPERTS, limit, axis="layers", seconds=1.0), EXPERTS)
    assert receding.tbt_s(0.99) <= limit
    assert receding.mean_ttft_s < best


def test_horizons_of_zero_and_limits_below_the_floor() -> None:
    """Both name what is wrong."""
    with pytest.raises(PlanError, match="horizon of 0 steps"):
        next_step({1: Pending(5)}, [], DENSE, steps=0)
    with pytest.raises(NoFeasiblePlanError, match=r"2 decodes alone takes 13\.01 ms, which is the floor"):
        next_step({1: Pending(5)}, [(1000, 5)] * 2, DENSE, tbt_s=0.01)
    assert next_step({}, [(1000, 5)], DENSE, tbt_s=inf).spans == ()
