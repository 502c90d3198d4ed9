"""Laws of the large solver and its bound: never above brute force, never above any placement, deterministic."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.placement import Placement, Problem, objective_of, rank_shares, solve
from planner.placementbound import certify, least_busiest
from planner.placementlarge import large
from planner.placementminimax import minimax


def drawn(
    seed: int, layers: int, experts: int, gpus: int, *, slots: int, replicas: int = 0, traffic: str = "ports",
    split: str = "even", nodes: int = 1, sharp: float = 1.5, byte_s: float = 0.7,
) -> Problem:  # fmt: skip
    """Skewed loads and clustered transitions."""
    rng = np.random.default_rng(seed)
    odds = np.exp(sharp * rng.standard_normal((layers - 1, experts, experts)))
    node = np.arange(gpus) // -(-gpus // nodes)
    links = np.where(node[:, None] == node, 0.2, 1.0) * byte_s * rng.uniform(0.8, 1.2, (gpus, gpus))
    return Problem(
        rng.gamma(1.5, size=(layers, experts)) + 0.01, odds / odds.sum(axis=2, keepdims=True), gpus, slots, replicas,
        seconds_per_byte=links, nodes=node.tolist(), traffic=traffic, split=split,  # type: ignore[arg-type]
    )  # fmt: skip


def every_layer(problem: Problem) -> list[np.ndarray]:
    """All ways to hold the experts of one layer, experts x gpus."""
    rows = [np.array(row, dtype=bool) for row in itertools.product((False, True), repeat=problem.gpus) if any(row)]
    found = []
    for choice in itertools.product(rows, repeat=problem.experts):
        holds = np.array(choice)
        if (holds.sum(axis=0) <= problem.slots_of).all() and holds.sum() <= problem.experts + problem.replicas:
            found.append(holds)
    return found


def brute_force(problem: Problem) -> tuple[float, float]:
    """Least objective and least load term."""
    ways = every_layer(problem)
    costs = [objective_of(problem, np.array(layers)) for layers in itertools.product(ways, repeat=problem.layers)]
    return min(cost.objective for cost in costs), min(cost.load_term for cost in costs)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from(
        [(2, 4, 2, 2, 0, 1), (3, 4, 2, 2, 0, 2), (2, 4, 2, 3, 0, 2), (2, 3, 2, 2, 1, 2), (2, 4, 4, 1, 0, 2)]
    ),
    traffic=st.sampled_from(["ports", "pairs", "total"]),
    split=st.sampled_from(["even", "balanced"]),
    byte_s=st.sampled_from([0.05, 0.7, 20.0]),
)
def test_bound_is_at_most_brute_force_which_is_at_most_the_solver(seed, shape, traffic, split, byte_s):
    layers, experts, gpus, slots, replicas, nodes = shape
    problem = drawn(
        seed,
        layers,
        experts,
        gpus,
        slots=slots,
        replicas=replicas,
        nodes=nodes,
        traffic=traffic,
        split=split,
        byte_s=byte_s,
    )
    best, least_load = brute_force(problem)
    bound = certify(problem)
    assert bound.objective_s <= best * (1 + 1e-9)
    assert bound.load_s.sum() <= least_load * (1 + 1e-9)
    found = large(problem, seconds=20)
    assert best <= found.objective * (1 + 1e-9)
    assert found.bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("traffic", ["ports", "pairs", "total"])
@pytest.mark.parametrize("replicas", [0, 8])
@pytest.mark.parametrize("seed", range(3))
def test_no_placement_of_any_method_is_below_the_bound(traffic, replicas, seed):
    problem = drawn(seed, 4, 32, 8, slots=4 + replicas // 8, replicas=replicas, traffic=traffic, nodes=2)
    bound = certify(problem)
    found: dict[str, Placement] = {
        name: solve(problem, solver=name, seconds=20) for name in ("large", "contiguous", "random", "greedy", "eplb")
    }
    for name, placement in found.items():
        assert bound.objective_s <= placement.objective * (1 + 1e-9), name
        assert bound.load_s.sum() <= placement.load_term * (1 + 1e-9), name
        assert placement.bound <= found["large"].objective * (1 + 1e-9), name
    assert found["large"].objective == pytest.approx(objective_of(problem, found["large"].holds).objective)
    assert found["large"].objective <= min(p.objective for p in found.values())


def test_independent_tokens_with_equal_experts_are_solved_to_optimality():
    experts, gpus = 32, 8
    problem = Problem(
        np.ones((3, experts)), np.full((2, experts, experts), 1 / experts), gpus, 4, seconds_per_byte=1.0,
        traffic="total",
    )  # fmt: skip
    found = large(problem)
    assert found.load_term == pytest.approx(3 / gpus)
    assert found.traffic_term == pytest.approx(2 * (1 - 1 / gpus) / gpus)
    assert found.gap < 1e-6


@pytest.mark.parametrize("nodes", [1, 4])
def test_planted_clusters_are_found_and_proven(nodes):
    rng = np.random.default_rng(5)
    layers, experts, gpus = 6, 64, 4 if nodes == 1 else 16
    cluster = np.array([rng.permutation(np.arange(experts) % 4) for _ in range(layers)])
    transitions = np.array([(a[:, None] == b) / (experts / 4) for a, b in itertools.pairwise(cluster)])
    node = np.arange(gpus) // (gpus // 4 if nodes > 1 else gpus)
    problem = Problem(
        np.ones((layers, experts)), transitions, gpus, experts // gpus, nodes=node.tolist(),
        seconds_per_byte=np.where(node[:, None] == node, 0.0 if nodes > 1 else 1.0, 1.0),
    )  # fmt: skip
    found = large(problem)
    assert found.traffic_term == pytest.approx(0.0, abs=1e-9)
    assert found.gap < 1e-6


def test_without_transitions_the_load_is_nearly_the_bound():
    rng = np.random.default_rng(3)
    loads = rng.lognormal(0, 0.7, (5, 128))
    for replicas, allowed in ((0, 0.02), (16, 0.02)):
        problem = Problem(loads, None, 16, 8 + replicas // 16, replicas)
        found = large(problem)
        assert found.traffic_term == 0
        assert found.load_gap <= allowed


def test_same_seed_same_placement():
    problem = drawn(1, 4, 32, 8, slots=5, replicas=8, nodes=2)
    one, two = large(problem, seed=7), large(problem, seed=7)
    assert (one.holds == two.holds).all()
    assert one.bound == two.bound


def test_time_limit_returns_the_best_found_with_its_gap():
    problem = drawn(2, 6, 64, 8, slots=8, nodes=2)
    found = large(problem, seconds=1e-3)
    assert found.holds.sum(axis=2).min() == 1
    assert 0 < found.bound <= found.objective
    assert 0 <= found.gap < 1
    longer = large(problem, seconds=30)
    assert longer.objective <= found.objective * (1 + 1e-12)
    assert longer.bound >= found.bound * (1 - 1e-12)


@pytest.mark.parametrize("transitions", [True, False])
@pytest.mark.parametrize("seconds", [1e-3, 0.02, 0.1, 0.3])
def test_short_limits_are_never_worse_than_the_baselines_and_tell_that_time_ended(transitions, seconds):
    problem = drawn(3, 8, 128, 16, slots=9, replicas=16, nodes=2)
    if not transitions:
        problem = replace(problem, transitions=None)
    found = large(problem, seconds=seconds)
    best = min(solve(problem, solver=name).objective for name in ("contiguous", "greedy", "eplb"))
    assert found.bound <= found.objective <= best * (1 + 1e-9)
    assert found.stopped or seconds > 1e-3
    assert objective_of(problem, found.holds).objective == pytest.approx(found.objective)


def test_a_search_that_ends_by_itself_was_not_stopped():
    assert not large(drawn(1, 3, 16, 4, slots=4, nodes=2), seconds=600).stopped


def test_without_transitions_every_layer_is_as_good_as_the_best_baseline_for_it():
    rng = np.random.default_rng(8)
    problem = Problem(rng.lognormal(0, 1.2, (6, 64)), None, 8, 9, 8)
    found = rank_shares(problem, large(problem, seconds=0.01).split).max(axis=1)
    for name in ("contiguous", "greedy", "eplb"):
        assert (found <= rank_shares(problem, solve(problem, solver=name).split).max(axis=1) * (1 + 1e-9)).all()


def test_uneven_slots_are_respected():
    rng = np.random.default_rng(0)
    problem = Problem(rng.gamma(2, size=(3, 20)), None, 4, [3, 9, 6, 4], 2)
    found = large(problem)
    assert (found.holds.sum(axis=1) <= problem.slots_of).all()
    assert found.holds.sum(axis=(1, 2)).max() <= 22


def test_least_busiest_counts_the_forced_neighbours():
    problem = Problem(np.array([[4.0, 1, 1, 1, 1, 1]]), None, 2, 3)
    assert least_busiest(problem)[0] == pytest.approx(6 / 9)
    loose = Problem(np.array([[4.0, 1, 1, 1, 1, 1]]), None, 2, 5)
    assert least_busiest(loose)[0] == pytest.approx(1 / 2)


def test_minimax_is_no_worse_than_the_worst_of_single_placements():
    rng = np.random.default_rng(4)
    base = rng.lognormal(0, 0.6, (4, 64))
    problems = [Problem(base * rng.lognormal(0, 0.5, base.shape), None, 8, 9, 8) for _ in range(3)]
    holds, terms, bound = minimax(problems, seconds=20)
    assert bound <= terms.max() * (1 + 1e-9)
    for term, problem in zip(terms, problems, strict=True):
        assert term == pytest.approx(objective_of(problem, holds).load_term)
    worst = min(max(objective_of(p, large(one).holds).load_term for p in problems) for one in problems)
    assert terms.max() <= worst
    with pytest.raises(PlanError, match="at least one"):
        minimax([])
