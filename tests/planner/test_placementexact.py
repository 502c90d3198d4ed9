"""Dynamic programming, the mixed-integer program and brute force find the same optimum; nothing is below a bound."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import placementstates, placementtuner
from planner.errors import PlanError
from planner.placement import Problem, objective_of, solve
from planner.placementbaselines import contiguous, eplb, greedy, random
from planner.placementexact import exact
from planner.placementmilp import milp
from planner.placementstates import states_of
from planner.placementtuner import bottleneck, tuner, worst_pairs_s

PRICES = ["ports", "pairs", "total"]
#: layers, experts, slots, nodes
SMALL = [
    (3, 4, (2, 2), (0, 0)),
    (3, 4, (2, 2), (0, 1)),
    (2, 4, (3, 2), (0, 0)),
    (2, 4, (1, 1, 1, 1), (0, 0, 1, 1)),
    (2, 5, (2, 2, 2), (0, 0, 1)),
    (2, 6, (2, 2, 2), (0, 0, 0)),
    (1, 6, (2, 2, 2), (0, 1, 2)),
]


def drawn(seed: int, shape: tuple[int, int, Any, Any], traffic: Any, links: str = "levels", **over: Any) -> Problem:
    """Skewed loads and sparse transitions; links alike within and between nodes, or all different."""
    layers, experts, slots, nodes = shape
    rng = np.random.default_rng(seed)
    near = np.array(nodes)[:, None] == np.array(nodes)
    s = np.where(near, 0.25, rng.uniform(0.3, 2.0)) if links == "levels" else rng.uniform(0.1, 1.0, near.shape)
    loads = rng.gamma(1.0, 1.0, (layers, experts)) + 1e-3
    transitions = rng.dirichlet(np.full(experts, 0.3), (layers - 1, experts))
    return Problem(loads, transitions, len(slots), slots, seconds_per_byte=s, nodes=nodes, traffic=traffic, **over)


def placements(problem: Problem) -> list[tuple[int, ...]]:
    """All placements of one layer."""
    every = itertools.product(range(problem.gpus), repeat=problem.experts)
    return [p for p in every if all(p.count(g) <= s for g, s in enumerate(problem.slots_of))]


def brute_force(problem: Problem) -> float:
    """Least objective of all placements of all layers."""
    return min(
        objective_of(problem, np.array(rows)).objective
        for rows in itertools.product(placements(problem), repeat=problem.layers)
    )


@pytest.mark.parametrize("links", ["levels", "different"])
@pytest.mark.parametrize("traffic", PRICES)
@pytest.mark.parametrize("shape", SMALL[:4])
def test_brute_force_finds_nothing_better(shape: Any, traffic: str, links: str) -> None:
    problem = drawn(7, shape, traffic, links)
    found = exact(problem)
    assert found.objective == pytest.approx(brute_force(problem), rel=1e-9)
    assert found.gap <= 1e-12
    assert found.objective == pytest.approx(objective_of(problem, found.holds).objective)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SMALL), traffic=st.sampled_from(PRICES), alike=st.booleans())
def test_the_two_exact_ways_agree(seed: int, shape: Any, traffic: str, alike: bool) -> None:
    problem = drawn(seed, shape, traffic, "levels" if alike else "different")
    one, other = exact(problem), milp(problem)
    assert one.objective == pytest.approx(other.objective, rel=1e-5)
    assert other.gap <= 1e-5
    assert other.bound <= one.objective * (1 + 1e-9)
    assert one.bound <= other.objective * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([*SMALL, (6, 8, (2, 2, 2, 2), (0, 0, 1, 1)), (4, 8, (3, 3, 3), (0, 0, 0))]),
    traffic=st.sampled_from(PRICES),
)
def test_nothing_found_is_below_any_bound(seed: int, shape: Any, traffic: str) -> None:
    problem = drawn(seed, shape, traffic)
    found = [exact(problem), exact(problem, seconds=1e-9), tuner(problem, seconds=0.3), contiguous(problem)]
    found += [greedy(problem), eplb(problem), *(random(problem, seed=seed + at) for at in range(5))]
    bound, load_bound = max(p.bound for p in found), max(p.load_bound for p in found)
    for placement in found:
        assert placement.objective >= bound * (1 - 1e-9)
        assert placement.load_term >= load_bound * (1 - 1e-9)


@pytest.mark.parametrize("traffic", PRICES)
def test_order_of_experts_and_gpus_does_not_change_the_optimum(traffic: str) -> None:
    problem = drawn(3, (5, 8, (2, 2, 2, 2), (0, 0, 1, 1)), traffic)
    rng = np.random.default_rng(0)
    order, ranks = rng.permutation(8), rng.permutation(4)
    assert problem.transitions is not None
    renamed = Problem(
        problem.loads[:, order],
        problem.transitions[:, order][:, :, order],
        4,
        2,
        seconds_per_byte=np.asarray(problem.seconds_per_byte)[ranks][:, ranks],
        nodes=problem.node_of[ranks].tolist(),
        traffic=problem.traffic,
    )
    assert exact(renamed).objective == pytest.approx(exact(problem).objective, rel=1e-12)


@pytest.mark.parametrize(
    ("slots", "nodes", "states", "orbits"),
    [
        ((4, 4), (0, 0), 70, 35),
        ((2, 2, 2, 2), (0, 0, 0, 0), 2520, 105),
        ((2, 2, 2, 2), (0, 0, 1, 1), 2520, 315),
        ((1,) * 8, (0,) * 8, 40320, 1),
        ((1,) * 8, (0,) * 4 + (1,) * 4, 40320, 35),
        ((8, 8), (0, 0), 256, 128),
        ((5, 3), (0, 0), 56, 56),
    ],
)
def test_placements_are_counted(slots: Any, nodes: Any, states: int, orbits: int) -> None:
    problem = drawn(0, (2, 8, slots, nodes), "ports")
    found = states_of(problem)
    assert len(found.gpu) == len(np.unique(found.gpu, axis=0)) == states
    assert len(found.first) == orbits
    begin = np.searchsorted(found.first, np.arange(states), side="right") - 1
    led = np.take_along_axis(found.rename, found.gpu[found.first[begin]], axis=1)
    np.testing.assert_array_equal(led, found.gpu)


@pytest.mark.parametrize("split", ["even", "balanced"])
def test_replicas_by_brute_force(split: Any) -> None:
    """Without transitions the program with copies is exact; with them its bound holds."""
    shape = (1, 3, (2, 2), (0, 0))
    rows = [row for row in itertools.product([False, True], repeat=2) if any(row)]
    for seed in range(2):
        problem = drawn(seed, shape, "ports", replicas=1, split=split)
        layers = [np.array(held) for held in itertools.product(rows, repeat=3)]
        layers = [held for held in layers if held.sum() <= 4 and (held.sum(axis=0) <= 2).all()]
        found = exact(problem)
        assert found.solver == "milp"
        assert found.objective == pytest.approx(min(objective_of(problem, held[None]).objective for held in layers))
        assert found.gap <= 1e-5
        chained = drawn(seed, (2, *shape[1:]), "ports", replicas=1, split=split)
        least = min(objective_of(chained, np.stack(pair)).objective for pair in itertools.product(layers, repeat=2))
        placed = milp(chained)
        assert placed.bound <= least * (1 + 1e-9)
        assert placed.objective >= least * (1 - 1e-9)


def test_without_transitions_every_layer_is_on_its_own() -> None:
    loads = np.random.default_rng(1).gamma(1.0, 1.0, (3, 6))
    whole = exact(Problem(loads, None, 3, 2))
    assert whole.objective == pytest.approx(sum(exact(Problem(row[None], None, 3, 2)).objective for row in loads))
    assert whole.traffic_term == 0.0


def test_layers_with_copies_are_programs_of_their_own_where_nothing_moves() -> None:
    loads = np.random.default_rng(2).gamma(1.0, 1.0, (3, 4))
    whole = milp(Problem(loads, None, 2, 3, 2))
    alone = [milp(Problem(row[None], None, 2, 3, 2)) for row in loads]
    assert whole.objective == pytest.approx(sum(found.objective for found in alone))
    assert whole.bound == pytest.approx(sum(found.bound for found in alone))
    assert whole.gap <= 1e-5 and not whole.stopped


@pytest.mark.parametrize("transitions", [False, True])
@pytest.mark.parametrize("seconds", [1e-9, 0.3])
def test_in_any_time_the_program_is_no_worse_than_the_baselines(transitions: bool, seconds: float) -> None:
    problem = drawn(3, (6, 8, (4,) * 4, (0,) * 4), "ports", replicas=8)
    if not transitions:
        problem = replace(problem, transitions=None)
    found = milp(problem, seconds=seconds)
    best = min(solve(problem, solver=name).objective for name in ("contiguous", "greedy", "eplb"))
    assert found.bound <= found.objective <= best * (1 + 1e-9)
    assert found.stopped or seconds > 1e-9


def test_out_of_time_there_is_still_a_placement_and_its_gap() -> None:
    problem = drawn(5, (12, 8, (2, 2, 2, 2), (0, 0, 0, 0)), "ports")
    late, best = exact(problem, seconds=1e-9), exact(problem)
    assert late.bound <= best.objective <= late.objective
    assert late.gap > 0
    for found in (milp(problem, seconds=0.1), tuner(problem, seconds=1e-9)):
        assert found.bound <= best.objective * (1 + 1e-9)
        assert found.objective >= best.objective * (1 - 1e-9)


def test_too_many_placements_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        PlanError, match=r"1e\+18 placements per layer; expected at most 50000 to enumerate: use the solv"
    ):
        exact(Problem(np.ones((2, 256)), None, 32, 8))
    monkeypatch.setattr(placementstates, "MOST_STEPS", 100)
    with pytest.raises(PlanError, match=r"35 x 70 transitions between two layers"):
        exact(Problem(np.ones((2, 8)), None, 2, 4))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 5))
def test_bottleneck_assignment_by_brute_force(seed: int, size: int) -> None:
    cost = np.random.default_rng(seed).integers(0, 9, (size, size)).astype(float)
    rows = np.arange(size)
    every = [cost[rows, list(columns)] for columns in itertools.permutations(range(size))]
    found = cost[rows, bottleneck(cost)]
    assert found.max() == min(chosen.max() for chosen in every)
    assert found.sum() == min(chosen.sum() for chosen in every if chosen.max() == found.max())


def test_moetuners_programs_by_brute_force() -> None:
    problem = drawn(11, (3, 6, (2, 2, 2), (0, 0, 1)), "pairs")
    clusters = []
    for shares in problem.shares:
        held = placementtuner.cluster(shares, problem.slots_of, 10.0)
        every = [np.array(p)[:, None] == np.arange(3) for p in placements(problem)]
        least = min(np.abs(shares @ other - 1 / 3).sum() for other in every)
        assert np.abs(shares @ held - 1 / 3).sum() <= least / (1 - placementtuner.TOLERANCE) + 1e-9
        clusters.append(held)
    held = np.stack(clusters)
    assert problem.joint is not None
    traffic = held[:-1].transpose(0, 2, 1) @ problem.joint @ held[1:]
    names = [np.array(p) for p in itertools.permutations(range(3))]
    least = min(worst_pairs_s(problem, traffic, np.array(rows)) for rows in itertools.product(names, repeat=3))
    mapped = placementtuner.mapped(problem, held, 20.0)
    assert worst_pairs_s(problem, traffic, mapped) <= least / (1 - placementtuner.TOLERANCE)
    placed = tuner(problem, seconds=20.0)
    assert placed.traffic_term <= worst_pairs_s(problem, traffic, mapped) * 1.03
    assert placed.objective >= exact(problem).objective * (1 - 1e-9)
