"""Nodes first and swaps by exact ports: valid placements, never worse, near a planted optimum."""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.placement import Problem, holds_of, objective_of, solve
from planner.placementbaselines import EMPTY, eplb, random, seated
from planner.placementbound import certify
from planner.placementnodes import nodes_first
from planner.placementpolish import polished


def drawn(seed: int, replicas: int, *, nodes: int = 2, spare: int = 0, **over: Any) -> Problem:
    """Topics, two nodes of three GPUs, and a network ten times slower than the links within nodes."""
    rng = np.random.default_rng(seed)
    layers, experts, gpus = 4, 24, 6
    node = np.arange(gpus) * nodes // gpus
    topic = np.array([rng.permutation(np.arange(experts) % 4) for _ in range(layers)])
    loads = rng.gamma(2.0, size=(layers, experts)) + 0.05
    joined = [(a[:, None] == b) * w + 0.02 for a, b, w in zip(topic[:-1], topic[1:], loads[1:], strict=True)]
    transitions = np.array([flow / flow.sum(axis=1, keepdims=True) for flow in joined])
    links = np.where(node[:, None] == node, 0.05, 0.5)
    slots = 4 + -(-replicas // gpus) + spare
    return Problem(loads, transitions, gpus, slots, replicas, seconds_per_byte=links, nodes=node.tolist(), **over)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), replicas=st.sampled_from([0, 4, 6]), spare=st.integers(0, 1))
def test_swaps_never_end_worse_nor_below_the_bound(seed: int, replicas: int, spare: int) -> None:
    problem = drawn(seed, replicas, spare=spare)
    bound = certify(problem).objective_s
    for start in (random(problem, seed=seed), eplb(problem)):
        better = polished(problem, start.holds, inf)
        cost = objective_of(problem, better)  # raises where slots or replicas are broken
        assert cost.objective <= start.objective * (1 + 1e-9)
        assert cost.objective >= bound * (1 - 1e-9)
        assert (better.sum(axis=2) == start.holds.sum(axis=2)).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), replicas=st.sampled_from([0, 6]))
def test_nodes_first_places_every_expert_within_the_slots(seed: int, replicas: int) -> None:
    problem = drawn(seed, replicas)
    found = nodes_first(problem, np.random.default_rng(0), inf, inf)
    assert found is not None
    assert holds_of(problem, found) is found
    assert objective_of(problem, found).objective >= certify(problem).objective_s * (1 - 1e-9)
    assert objective_of(problem, found).objective < random(problem).objective


def test_nodes_first_needs_nodes_and_ports() -> None:
    rng = np.random.default_rng(0)
    assert nodes_first(drawn(0, 0, nodes=1), rng, inf, inf) is None
    assert nodes_first(drawn(0, 0, traffic="pairs"), rng, inf, inf) is None


def test_a_swap_that_undoes_harm_is_found() -> None:
    """Experts that talk in pairs, two of them exchanged: one swap is the way back."""
    joint = np.kron(np.eye(4), np.ones((2, 2)) / 2)
    problem = Problem(np.ones((3, 8)), np.array([joint, joint]), 4, 2, seconds_per_byte=1.0)
    gpus = np.tile(np.arange(8) // 2, (3, 1))
    gpus[1, [0, 5]] = gpus[1, [5, 0]]
    assert objective_of(problem, gpus).traffic_term > 0
    fixed = polished(problem, gpus[..., None] == np.arange(4), inf)
    assert objective_of(problem, fixed).traffic_term == pytest.approx(0.0, abs=1e-12)


def test_seats_hold_what_gpus_hold() -> None:
    holds = np.array([[False, True], [True, True], [True, False]])
    assert seated(holds, np.array([0, 0, 0, 1, 1])).tolist() == [1, 2, EMPTY, 0, 1]


@pytest.mark.parametrize("solver", ["large", "milp", "tuner"])
@pytest.mark.parametrize("replicas", [0, 6])
def test_no_time_still_gives_a_placement_with_its_gap(solver: str, replicas: int) -> None:
    problem = drawn(3, replicas)
    found = solve(problem, solver=solver, seconds=1e-6)
    assert holds_of(problem, found.holds) is found.holds
    assert 0 < found.bound <= found.objective
    assert found.bound <= solve(problem, solver="large", seconds=20).objective
