"""Laws of re-placement: at most m arrivals, bytes and seconds charged as told, never worse than staying."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.placement import Problem, holds_of, objective_of, solve
from planner.replacement import replace_experts


def problem_of(seed: int, replicas: int = 0, link: float = 1e-9) -> Problem:
    rng = np.random.default_rng(seed)
    return Problem(
        rng.lognormal(0, 0.8, (3, 16)), None, 4, 4 + replicas // 4, replicas, seconds_per_byte=link, tokens=1000.0,
        seconds_per_token=1e-6,
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 9999),
    most=st.integers(0, 12),
    replicas=st.sampled_from([0, 4]),
    old=st.sampled_from(["random", "eplb"]),
)
def test_never_more_arrivals_than_allowed_and_charged_as_moved(seed, most, replicas, old):
    before, now = problem_of(seed, replicas), problem_of(seed + 1, replicas)
    current = solve(before, solver=old).holds
    found = replace_experts(now, current, most=most, expert_bytes=1e3, steps=100)
    new = found.holds & ~current
    assert new.sum() == len(found.arrivals) <= most
    assert found.migration_bytes == 1e3 * new.sum()
    for layer, expert, source, target in found.arrivals:
        assert current[layer, expert, source]
        assert new[layer, expert, target]
    holds_of(now, found.holds)
    assert found.before_s == pytest.approx(objective_of(now, current).objective)
    assert found.after_s == pytest.approx(objective_of(now, found.holds).objective)
    sent = np.zeros((4, 4))
    for _, _, source, target in found.arrivals:
        sent[source, target] += 1e3 * 1e-9
    assert found.migration_s == pytest.approx(max(sent.sum(axis=0).max(), sent.sum(axis=1).max()))
    assert found.saved_s >= -1e-12
    assert found.saved_s == pytest.approx(100 * (found.before_s - found.after_s) - found.migration_s)


def test_nothing_moves_where_moving_costs_more_than_it_saves():
    now = problem_of(3, link=1.0)
    current = solve(now, solver="random").holds
    assert replace_experts(now, current, most=10, expert_bytes=1e9, steps=1).arrivals == ()
    cheap = replace_experts(now, current, most=10, expert_bytes=0, steps=1)
    assert 0 < len(cheap.arrivals) <= 10


def test_more_migrations_help_more_and_reach_near_a_fresh_placement():
    now = problem_of(5)
    current = solve(now, solver="contiguous").holds
    after = [replace_experts(now, current, most=m, expert_bytes=0, steps=1).after_s for m in (0, 2, 6, 40)]
    assert after == sorted(after, reverse=True)
    assert after[0] == pytest.approx(objective_of(now, current).objective)
    fresh = solve(now, solver="large").objective
    assert after[-1] - fresh < 0.4 * (after[0] - fresh)


def test_a_replica_makes_way_for_a_hot_expert_with_one_arrival():
    loads = np.array([[8.0, 1.0, 1.0, 1.0]])
    problem = Problem(loads, None, 2, 3, 2)
    current = np.zeros((1, 4, 2), dtype=bool)
    current[0, 0, 0] = current[0, 1, 0] = current[0, 2, 0] = True
    current[0, 1, 1] = current[0, 2, 1] = current[0, 3, 1] = True
    found = replace_experts(problem, current, most=1, expert_bytes=5.0, steps=1)
    assert [(layer, expert, target) for layer, expert, _, target in found.arrivals] == [(0, 0, 1)]
    assert found.migration_bytes == 5.0


def test_same_problem_same_moves():
    now = problem_of(8, 4)
    current = solve(problem_of(9, 4), solver="eplb").holds
    one, two = (replace_experts(now, current, most=6, expert_bytes=1.0, steps=10) for _ in range(2))
    assert one.arrivals == two.arrivals


@pytest.mark.parametrize("wrong", [{"most": -1}, {"expert_bytes": -1.0}, {"steps": float("inf")}])
def test_numbers_that_make_no_sense_are_named(wrong):
    now = problem_of(1)
    with pytest.raises(PlanError, match=next(iter(wrong))):
        replace_experts(
            now, solve(now, solver="contiguous").holds, **{"most": 1, "expert_bytes": 1.0, "steps": 1.0, **wrong}
        )
