"""Baselines hold every expert within the slots, and do what their names say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.placement import Problem, holds_of, simple_bound
from planner.placementbaselines import contiguous, eplb, even_counts, greedy, packed, random, replicated


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    experts=st.integers(1, 12),
    slots=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    data=st.data(),
)
def test_every_baseline_is_a_placement_above_the_bound(
    seed: int, layers: int, experts: int, slots: list[int], data: st.DataObject
) -> None:
    while sum(min(s, experts) for s in slots) < experts:
        slots = [s + 1 for s in slots]
    spare = sum(min(s, experts) for s in slots) - experts
    rng = np.random.default_rng(seed)
    problem = Problem(
        rng.gamma(0.5, 1.0, (layers, experts)) + 1e-6,
        rng.dirichlet(np.ones(experts), (layers - 1, experts)),
        len(slots),
        slots,
        data.draw(st.integers(0, spare)),
        seconds_per_byte=0.3,
        nodes=tuple(np.arange(len(slots)) // 2),
    )
    groups = data.draw(st.sampled_from([g for g in range(1, experts + 1) if experts % g == 0]))
    bound = simple_bound(problem)
    for found in (contiguous(problem), random(problem, seed=seed), greedy(problem), eplb(problem, groups=groups)):
        holds_of(problem, found.holds)  # every expert somewhere, slots and replicas kept
        assert found.load_term >= bound.load_term * (1 - 1e-9)
        assert found.objective >= found.bound * (1 - 1e-9)
        assert 0 <= found.gap <= 1


def test_contiguous_goes_in_order() -> None:
    found = contiguous(Problem(np.ones((2, 6)), None, 3, 2))
    assert found.assignment == (((0,), (0,), (1,), (1,), (2,), (2,)),) * 2


@given(slots=st.lists(st.integers(0, 5), min_size=1, max_size=6), data=st.data())
def test_counts_are_as_even_as_slots_allow(slots: list[int], data: st.DataObject) -> None:
    experts = data.draw(st.integers(0, sum(slots)))
    counts = even_counts(experts, np.array(slots))
    assert counts.sum() == experts
    assert (counts <= slots).all()
    assert all(c >= counts.max() - 1 or c == s for c, s in zip(counts, slots, strict=True))


def test_random_is_seeded_and_differs_from_layer_to_layer() -> None:
    problem = Problem(np.ones((4, 32)), None, 4, 8)
    first, again, other = (random(problem, seed=seed) for seed in (1, 1, 2))
    assert first.assignment == again.assignment != other.assignment
    assert len(set(first.assignment)) == 4


def test_greedy_is_longest_first() -> None:
    found = greedy(Problem(np.array([[5.0, 4.0, 3.0, 3.0, 2.0, 1.0]]), None, 2, 3))
    assert found.load_term == pytest.approx(0.5)  # 5 + 3 + 1, 4 + 3 + 2 of 18
    assert found.assignment == (((0,), (1,), (1,), (0,), (1,), (0,)),)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=5), extra=st.integers(0, 4), gpus=st.integers(1, 4))
def test_copies_bring_down_the_largest_share_as_far_as_it_goes(weights: list[int], extra: int, gpus: int) -> None:
    def least(rest: int, at: int = 0) -> float:
        if at == len(weights):
            return 0.0
        tried = range(1, min(rest + 1, gpus) + 1)
        return min(max(weights[at] / n, least(rest - n + 1, at + 1)) for n in tried)

    copies = replicated(np.array(weights, float), extra, gpus)
    assert copies.sum() <= len(weights) + extra
    assert copies.max() <= gpus
    assert max(w / n for w, n in zip(weights, copies, strict=True)) == pytest.approx(least(extra))


def test_hot_experts_are_copied_and_copies_are_apart() -> None:
    loads = np.array([[8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0]])
    found = eplb(Problem(loads, None, 4, 3, 4))
    assert found.holds[0].sum() == 12
    assert found.holds[0, 0].sum() == 4
    assert found.load_term == pytest.approx(0.25)
    assert greedy(Problem(loads, None, 4, 3, 4)).load_term == pytest.approx(0.5)


def test_groups_stay_in_their_node() -> None:
    rng = np.random.default_rng(0)
    problem = Problem(rng.gamma(1.0, 1.0, (3, 16)), None, 4, 5, 4, nodes=(0, 0, 1, 1))
    found = eplb(problem, groups=4)
    for layer in found.holds:
        nodes = np.stack([layer[:, :2].any(axis=1), layer[:, 2:].any(axis=1)])
        assert (nodes.sum(axis=0) == 1).all()
        of_group = nodes[1].reshape(4, 4)
        assert (of_group == of_group[:, :1]).all()
        assert of_group[:, 0].sum() == 2
        assert layer.sum() == 20
    free = eplb(problem, groups=1)
    assert free.load_term <= found.load_term * 1.05
    with pytest.raises(PlanError, match="3 groups; expected a number that divides the 16 experts"):
        eplb(problem, groups=3)


def test_a_copy_without_a_free_gpu_is_left_out() -> None:
    held = packed(np.array([9.0, 1.0]), np.array([3, 1]), np.array([2, 1]))
    assert held.tolist() == [[True, True], [True, False]]
