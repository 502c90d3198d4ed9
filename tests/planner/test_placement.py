"""The objective is its formula, changes are told as they are, and what cannot be placed is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.placement import (
    Placement,
    Problem,
    State,
    dispatch_s,
    flows,
    holds_of,
    objective_of,
    placement_of,
    simple_bound,
    solve,
    split_of,
)

SHAPES = st.tuples(st.integers(1, 4), st.integers(2, 6), st.integers(1, 4))


def drawn(seed: int, layers: int, experts: int, gpus: int, **over: Any) -> Problem:
    """A problem with skewed loads, sparse transitions and two nodes of different links."""
    rng = np.random.default_rng(seed)
    nodes = np.arange(gpus) * 2 // gpus
    links = np.where(nodes[:, None] == nodes, 0.25, rng.uniform(0.5, 2.0))
    given: dict[str, Any] = {
        "slots": -(-experts // gpus) + 1,
        "seconds_per_token": 2.0,
        "seconds_per_byte": links,
        "bytes_per_token": 3.0,
        "tokens": 5.0,
        "nodes": tuple(nodes.tolist()),
    }
    loads = rng.gamma(0.7, 1.0, (layers, experts)) + 1e-3
    return Problem(loads, rng.dirichlet(np.full(experts, 0.3), (layers - 1, experts)), gpus, **(given | over))


def holds_at_random(problem: Problem, seed: int) -> np.ndarray:
    """Copies dealt out at random, some experts with more than one."""
    rng = np.random.default_rng(seed)
    holds = np.zeros((problem.layers, problem.experts, problem.gpus), dtype=bool)
    for layer in holds:
        for expert in rng.permutation(problem.experts):
            layer[expert, rng.choice(np.flatnonzero(layer.sum(axis=0) < problem.slots_of))] = True
        for expert in rng.permutation(problem.experts)[: problem.replicas]:
            layer[expert] |= (layer.sum(axis=0) < problem.slots_of) & (rng.random(problem.gpus) < 0.5)
            while layer.sum() > problem.experts + problem.replicas:
                layer[expert, np.flatnonzero(layer[expert])[0]] = False
    return holds


def by_hand(problem: Problem, holds: np.ndarray) -> tuple[float, float]:
    """The formula of the module, one choice at a time."""
    load = traffic = 0.0
    gpus = range(problem.gpus)
    y = [[[h / sum(row) for h in row] for row in layer] for layer in holds.astype(float).tolist()]
    for layer in range(problem.layers):
        w = problem.loads[layer] / problem.loads[layer].sum()
        load += 2.0 * 5.0 * max(sum(w[e] * y[layer][e][g] for e in range(problem.experts)) for g in gpus)
        if layer == problem.layers - 1 or problem.transitions is None:
            continue
        seconds = np.zeros((problem.gpus, problem.gpus))
        for e in range(problem.experts):
            for f in range(problem.experts):
                for g in gpus:
                    for h in gpus:
                        moved = w[e] * problem.transitions[layer, e, f] * y[layer][e][g] * y[layer + 1][f][h]
                        seconds[g, h] += 5.0 * 3.0 * moved * float(np.asarray(problem.seconds_per_byte)[g, h])
        apart = [(g, h) for g in gpus for h in gpus if g != h]
        node = problem.nodes
        assert node is not None
        if problem.traffic == "pairs":
            traffic += max((seconds[pair] for pair in apart), default=0.0)
        elif problem.traffic == "total":
            traffic += sum(seconds[pair] for pair in apart) / problem.gpus
        else:
            ports = [0.0]
            for g in gpus:
                for near in (True, False):
                    others = [h for h in gpus if h != g and (node[g] == node[h]) is near]
                    ports += [sum(seconds[g, h] for h in others), sum(seconds[h, g] for h in others)]
            traffic += max(ports)
    return load, traffic


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), shape=SHAPES, traffic=st.sampled_from(["ports", "pairs", "total"]), more=st.booleans()
)
def test_the_objective_is_its_formula(seed: int, shape: tuple[int, int, int], traffic: Any, more: bool) -> None:
    replicas = min(2, (shape[2] - 1) * shape[1], shape[2]) if more else 0
    problem = drawn(seed, *shape, traffic=traffic, replicas=replicas)
    holds = holds_at_random(problem, seed)
    cost = objective_of(problem, holds)
    assert (cost.load_term, cost.traffic_term) == pytest.approx(by_hand(problem, holds), rel=1e-9, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), shape=SHAPES, traffic=st.sampled_from(["ports", "pairs", "total"]))
def test_names_of_experts_do_not_matter(seed: int, shape: tuple[int, int, int], traffic: Any) -> None:
    problem = drawn(seed, *shape, traffic=traffic)
    holds = holds_at_random(problem, seed)
    order = np.random.default_rng(seed).permutation(problem.experts)
    assert problem.transitions is not None
    renamed = drawn(seed, *shape, traffic=traffic, slots=problem.slots)
    renamed = Problem(
        problem.loads[:, order],
        problem.transitions[:, order][:, :, order],
        problem.gpus,
        problem.slots,
        seconds_per_token=2.0,
        seconds_per_byte=problem.seconds_per_byte,
        bytes_per_token=3.0,
        tokens=5.0,
        nodes=problem.nodes,
        traffic=traffic,
    )
    assert objective_of(renamed, holds[:, order]).objective == pytest.approx(objective_of(problem, holds).objective)
    assert simple_bound(renamed).objective == pytest.approx(simple_bound(problem).objective)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), shape=SHAPES, traffic=st.sampled_from(["ports", "pairs", "total"]), more=st.booleans()
)
def test_no_placement_is_below_the_simple_bound(
    seed: int, shape: tuple[int, int, int], traffic: Any, more: bool
) -> None:
    replicas = min(2, (shape[2] - 1) * shape[1], shape[2]) if more else 0
    problem = drawn(seed, *shape, traffic=traffic, replicas=replicas, split="balanced")
    bound = simple_bound(problem)
    for at in range(5):
        cost = objective_of(problem, holds_at_random(problem, seed + at))
        assert cost.load_term >= bound.load_term * (1 - 1e-9)
        assert cost.traffic_term >= bound.traffic_term * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), shape=SHAPES, traffic=st.sampled_from(["ports", "pairs", "total"]))
def test_changes_are_told_as_they_turn_out(seed: int, shape: tuple[int, int, int], traffic: Any) -> None:
    problem = drawn(seed, *shape, traffic=traffic)
    rng = np.random.default_rng(seed)
    state = State(problem, split_of(problem, holds_at_random(problem, seed)))
    for _ in range(4):
        layer = int(rng.integers(problem.layers))
        pairs = np.array([rng.choice(problem.experts, 2, replace=False) for _ in range(3)])
        told = state.swap(layer, pairs[:, 0], pairs[:, 1])
        before, first = state.objective, pairs[0]
        state.apply(layer, first, state.split[layer, first[::-1]])
        assert state.objective - before == pytest.approx(told[0], abs=1e-9)
        fresh = State(problem, state.split)
        assert state.objective == pytest.approx(fresh.objective)
        np.testing.assert_allclose(state.moved, fresh.moved, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), traffic=st.sampled_from(["ports", "pairs", "total"]))
def test_new_copies_are_told_as_they_turn_out(seed: int, traffic: Any) -> None:
    problem = drawn(seed, 3, 5, 3, traffic=traffic, replicas=2)
    before, after = (split_of(problem, holds_at_random(problem, seed + at)) for at in range(2))
    for layer in range(3):
        state = State(problem, before)
        told = state.change(layer, np.arange(5)[None], after[layer][None])
        changed = before.copy()
        changed[layer] = after[layer]
        assert told[0] == pytest.approx(State(problem, changed).objective - state.objective, abs=1e-9)
        state.apply(layer, np.arange(5), after[layer])
        assert state.objective == pytest.approx(State(problem, changed).objective)


def test_a_balanced_split_fills_the_least_loaded() -> None:
    holds = np.array([[[True, True], [True, False], [False, True]]])
    loads = np.array([[6.0, 3.0, 1.0]])
    even = Problem(loads, None, 2, 2, 1)
    balanced = Problem(loads, None, 2, 2, 1, split="balanced")
    assert objective_of(even, holds).load_term == pytest.approx(0.6)  # 3 + 3 of 10
    assert objective_of(balanced, holds).load_term == pytest.approx(0.5)
    assert split_of(balanced, holds)[0, 0] == pytest.approx([2 / 6, 4 / 6])


def test_ports_of_a_gpu_work_at_once_and_pairs_wait_for_their_port() -> None:
    problem = Problem(np.ones((2, 3)), np.full((1, 3, 3), 1 / 3), 3, 1, seconds_per_byte=1.0, nodes=(0, 0, 1))
    moved = np.array([[0.0, 0.1, 0.4], [0.0, 0.0, 0.2], [0.0, 0.0, 0.0]])
    assert dispatch_s(problem, moved) == pytest.approx(0.6)  # what enters GPU 2 over its network card
    one_node = Problem(np.ones((2, 3)), np.full((1, 3, 3), 1 / 3), 3, 1, seconds_per_byte=1.0)
    assert dispatch_s(one_node, moved[:, [1, 0, 2]][[1, 0, 2]]) == pytest.approx(0.6)
    assert dispatch_s(Problem(np.ones((1, 3)), None, 3, 1, seconds_per_byte=1.0, traffic="pairs"), moved) == 0.4


def test_what_moves_is_what_is_chosen() -> None:
    problem = drawn(1, 4, 6, 3)
    moved = flows(problem, split_of(problem, holds_at_random(problem, 1)))
    assert moved.sum(axis=(1, 2)) == pytest.approx(np.ones(3))


def test_bound_and_gap_of_a_placement() -> None:
    problem = Problem(np.array([[3.0, 1.0]]), None, 2, 2)
    found = placement_of(problem, np.array([[0, 0]]), "hand", 0.0)
    assert isinstance(found, Placement)
    assert (found.objective, found.bound, found.gap) == (1.0, 0.75, 0.25)
    assert found.assignment == (((0,), (0,)),)
    assert placement_of(problem, np.array([[0, 1]]), "hand", 0.0, bound=2.0).gap == 0.0


BAD = [
    ({"slots": 1}, r"3 slots on 3 GPUs cannot hold 4 experts: 1 slots are missing; expected at least 2 slots per GPU"),
    ({"slots": (2, 1, 0)}, r"1 slots are missing"),
    ({"slots": (2, 2)}, r"slots of 2 GPUs; expected one number, or one for each of the 3 GPUs"),
    ({"slots": -1}, r"-1 slots on a GPU"),
    ({"slots": 2, "replicas": 3}, r"3 replicas beyond the 2 slots that 4 experts leave on 3 GPUs; .* 3 slots per GPU"),
    ({"replicas": -1}, r"replicas = -1"),
    ({"gpus": 0}, r"gpus = 0; expected at least 1"),
    ({"seconds_per_byte": [[0, 1, 1], [1, 0, np.inf], [1, 1, 0]]}, r"rank 2 cannot be reached from rank 1"),
    ({"seconds_per_byte": [[0, 1, 1], [-1, 0, 1], [1, 1, 0]]}, r"-1.0 s/byte from rank 1 to 0"),
    ({"seconds_per_byte": np.ones((2, 2))}, r"seconds_per_byte of shape \(2, 2\); expected one number or \(3, 3\)"),
    ({"loads": np.ones(4)}, r"loads of shape \(4,\)"),
    ({"loads": [[1, 1, 1, 1], [1, -2, 1, 1]]}, r"load -2.0 of expert 1 in layer 1"),
    ({"loads": [[1, 1, 1, 1], [0, 0, 0, 0]]}, r"layer 1 has no load at all; .*leave dense layers out"),
    ({"transitions": np.ones((1, 4, 3)) / 3}, r"transitions of shape \(1, 4, 3\); expected \(1, 4, 4\)"),
    ({"transitions": np.full((1, 4, 4), 0.3)}, r"transitions of expert 0 in layer 0 sum to 1.2"),
    ({"nodes": (0, 1)}, r"nodes of 2 GPUs"),
    ({"tokens": -1.0}, r"tokens = -1.0"),
    ({"seconds_per_token": np.inf}, r"seconds_per_token = inf"),
    ({"traffic": "most"}, r"traffic 'most'; expected ports, pairs or total"),
    ({"split": "most"}, r"split 'most'; expected even or balanced"),
]


@pytest.mark.parametrize(("over", "told"), BAD)
def test_what_cannot_be_placed_is_said(over: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        Problem(**({"loads": np.ones((2, 4)), "transitions": None, "gpus": 3, "slots": 2} | over))


WRONG = [
    (np.zeros((2, 3), int), r"an assignment of shape \(2, 3\)"),
    (np.array([[0, 1, 2, 3], [0, 0, 1, 1]]), r"on GPU 0 or 3; expected 0 to 2"),
    (np.array([[0, 0, 0, 1], [0, 0, 1, 1]]), r"layer 0 puts 3 experts on GPU 0; expected at most its 2 slots"),
    (np.zeros((2, 4, 3), bool), r"layer 0 has no GPU for expert 0"),
]


@pytest.mark.parametrize(("assignment", "told"), WRONG)
def test_an_assignment_keeps_to_the_problem(assignment: np.ndarray, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        objective_of(Problem(np.ones((2, 4)), None, 3, 2), assignment)


def test_copies_are_counted() -> None:
    holds = np.ones((1, 2, 2), dtype=bool)
    assert holds_of(Problem(np.ones((1, 2)), None, 2, 2, 2), holds).sum() == 4
    with pytest.raises(PlanError, match="layer 0 has 2 extra copies; expected at most 1 replicas"):
        holds_of(Problem(np.ones((1, 2)), None, 2, 2, 1), holds)


def test_solvers_by_name() -> None:
    problem = drawn(3, 3, 4, 2)
    for name in ("exact", "milp", "tuner", "contiguous", "random", "greedy", "eplb"):
        found = solve(problem, solver=name, seconds=10.0)
        assert found.solver == name
        assert found.objective == pytest.approx(objective_of(problem, found.holds).objective)
    with pytest.raises(PlanError, match="solver 'best'; expected exact, milp, "):
        solve(problem, solver="best")
    with pytest.raises(PlanError, match="a limit of 0 s; expected a positive time"):
        solve(problem, seconds=0)
