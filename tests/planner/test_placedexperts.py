"""Placements of the search: legal, the same each time, never worse for a swap, as even as the solvers make them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.huggingface import load_model
from hwmodels.routing import RoutingStats, uniform
from planner.placedexperts import Placements, even_out, placed
from planner.placement import Problem, rank_shares
from planner.placementbaselines import contiguous, eplb
from planner.placementbound import least_busiest
from planner.routedranks import busiest_over_mean, in_order, keeps_groups


def recorded(layers: int, experts: int, seed: int, skew: float = 1.5) -> RoutingStats:
    loads = np.random.default_rng(seed).pareto(skew, (layers, experts)) + 0.1
    return RoutingStats("made up", tuple(range(layers)), loads, 1, "made up")


cases = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2), st.integers(0, 999))


@settings(max_examples=30, deadline=None)
@given(cases)
def test_every_rank_has_its_slots_full_of_different_experts_and_every_expert_a_slot(case) -> None:
    ranks, each, spare, seed = case
    spare = min(spare, each * (ranks - 1))
    found = placed(recorded(3, ranks * each, seed), ranks, spare * ranks)
    assert found.slots.shape == (3, ranks * (each + spare))
    for row in found.slots.reshape(3, ranks, each + spare):
        assert set(row.ravel().tolist()) == set(range(ranks * each))
        assert all(len(set(held)) == each + spare for held in row.tolist())
    assert np.array_equal(found.slots, placed(recorded(3, ranks * each, seed), ranks, spare * ranks).slots)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_swaps_relieve_the_busiest_rank_and_keep_copies_slots_and_nodes(case) -> None:
    ranks, each, spare, seed = case
    rng = np.random.default_rng(seed)
    experts = ranks * each
    holds = np.zeros((experts, ranks), dtype=bool)
    holds[np.arange(experts), rng.permutation(experts) % ranks] = True
    holds |= rng.random(holds.shape) < 0.1 * spare
    shares = rng.pareto(1.2, experts) + 0.01
    nodes = np.arange(ranks) // 2
    before = holds.copy()
    even_out(shares, holds, nodes)
    assert (holds.sum(axis=1) == before.sum(axis=1)).all() and (holds.sum(axis=0) == before.sum(axis=0)).all()
    weights = shares / holds.sum(axis=1)
    assert (weights @ holds).max() <= (weights @ before).max() * (1 + 1e-9)
    for node in set(nodes.tolist()):
        mine = nodes == node
        assert (holds[:, mine].sum(axis=1) == before[:, mine].sum(axis=1)).all()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from((2, 4, 8)), st.integers(2, 6), st.integers(0, 1), st.integers(0, 999))
def test_it_is_no_worse_than_the_balancer_and_never_below_what_is_certified(ranks, each, spare, seed) -> None:
    stats = recorded(4, ranks * each, seed)
    problem = Problem(stats.loads, None, ranks, each + spare, spare * ranks)
    found = placed(stats, ranks, spare * ranks)
    here = rank_shares(problem, found.split(ranks)).max(axis=1)
    assert (here >= least_busiest(problem) - 1e-9).all()
    assert here.sum() <= rank_shares(problem, eplb(problem).split).max(axis=1).sum() * (1 + 1e-6)


def test_at_deepseeks_size_the_busiest_rank_comes_near_the_mean() -> None:
    stats = recorded(6, 256, 0, skew=2.5)
    problem = Problem(stats.loads, None, 32, 9, 32)
    before = rank_shares(problem, contiguous(problem).split).max(axis=1).mean() * 32
    assert before > 1.5
    assert busiest_over_mean(stats, in_order(6, 256), 32) == pytest.approx(before)
    assert busiest_over_mean(stats, placed(stats, 32, 32), 32) < 1.01


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 999), st.sampled_from((0, 8, 16)))
def test_groups_stay_on_nodes_where_they_divide_evenly(seed, redundant) -> None:
    stats, nodes = recorded(3, 32, seed), [rank // 2 for rank in range(8)]
    kept, free = placed(stats, 8, redundant, nodes, 8), placed(stats, 8, redundant)
    assert keeps_groups(kept, 8, 8, nodes)
    assert not keeps_groups(in_order(3, 32), 8, 4, [rank % 4 for rank in range(8)])
    assert busiest_over_mean(stats, free, 8) <= busiest_over_mean(stats, kept, 8) * 1.05
    homes = Counter(len({nodes[slot * 8 // len(row)] for slot in np.flatnonzero(row < 4)}) for row in kept.slots)
    assert homes == {1: 3}  # the first group, experts 0 to 3, on one node in each layer


def test_the_cheaper_of_both_ways_is_chosen_once() -> None:
    stats, nodes = recorded(3, 32, 1), (0, 0, 0, 0, 1, 1, 1, 1)
    asked = []

    def price(wanted: bool):
        def told(found) -> float:
            asked.append(found)
            return float(keeps_groups(found, 8, 8, nodes) != wanted)

        return told

    made = Placements(stats, 8)
    assert keeps_groups(made.best(8, 0, nodes, price(True)), 8, 8, nodes)
    assert not keeps_groups(made.best(8, 8, nodes, price(False)), 8, 8, nodes)
    assert made.best(8, 0, nodes, price(False)) is made.best(8, 0, nodes, price(True))
    assert len(asked) == 4
    assert not keeps_groups(made.best(8, 0, (0,) * 8, price(True)), 8, 8, nodes)


def test_copies_help_where_one_expert_has_more_than_a_ranks_part() -> None:
    hot = np.ones((2, 8))
    hot[:, 0] = 20.0
    stats = RoutingStats("made up", (0, 1), hot, 1, "made up")
    assert Placements(stats, 1).copies_help(4)
    assert Placements(stats, 1).copies_help(3)  # which does not divide 8
    assert not Placements(uniform(load_model("mixtral-8x7b")), 1).copies_help(4)
