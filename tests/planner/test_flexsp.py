"""FlexSP's groups against brute force, its buckets against every cut, its bounds against everything found."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.flexsp import bound_s, buckets, cut, flexsp, one_round
from planner.sequencegroups import Group, GroupCost, best_static, flexsp_cost, round_s, work_bound_s

#: Toy constants under which no size of groups is always best.
TOY = GroupCost(1e-6, 1e-3, 0.5, 1.0, ((2, 4000.0), (4, 500.0)), 1000.0)
LENGTHS = st.lists(st.integers(1, 1800), min_size=1, max_size=5)


def shapes(ranks: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Multisets of powers of two up to `largest` that add up to `ranks`."""
    if ranks == 0:
        yield ()
    for size in (1, 2, 4, 8):
        if size <= min(ranks, largest):
            for rest in shapes(ranks - size, size):
                yield (size, *rest)


def brute_force_s(lengths: list[int], ranks: int, cost: GroupCost) -> float:
    """The fastest round there is, by trying all."""
    best = inf
    for sizes in shapes(ranks, ranks):
        for chosen in product(range(len(sizes)), repeat=len(lengths)):
            groups = [
                Group(size, tuple(s for s, g in zip(lengths, chosen, strict=True) if g == i))
                for i, size in enumerate(sizes)
            ]
            if all(sum(group.lengths) <= cost.tokens_per_rank * group.ranks for group in groups):
                best = min(best, round_s(groups, cost))
    return best


@settings(max_examples=15)
@given(LENGTHS)
def test_a_round_is_the_one_that_brute_force_finds(lengths: list[int]) -> None:
    best = brute_force_s(lengths, 4, TOY)
    if best == inf:
        with pytest.raises(PlanError, match="expected"):
            one_round(lengths, 4, TOY)
        return
    groups, bound = one_round(lengths, 4, TOY, seconds=20.0)
    assert round_s(groups, TOY) == pytest.approx(best, rel=1e-6)
    assert bound == pytest.approx(best, rel=1e-5)
    assert sorted(s for group in groups for s in group.lengths) == sorted(lengths)
    assert sum(group.ranks for group in groups) <= 4


@settings(max_examples=25)
@given(LENGTHS)
def test_bounds_are_below_the_best_there_is(lengths: list[int]) -> None:
    best = brute_force_s(lengths, 4, TOY)
    if best < inf:
        assert work_bound_s(lengths, 4, TOY) <= best * (1 + 1e-9)
        assert bound_s(lengths, 4, TOY, seconds=1.0) <= best * (1 + 1e-9)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 4))
def test_buckets_waste_least(lengths: list[int], most: int) -> None:
    ordered = sorted(lengths)

    def waste(runs: list[list[int]]) -> int:
        return sum(run[-1] - s for run in runs for s in run)

    found = buckets(lengths, most)
    assert [s for run in found for s in run] == ordered and len(found) <= most
    least = min(
        waste([ordered[a:b] for a, b in zip((0, *ends), (*ends, len(ordered)), strict=True)])
        for count in range(most)
        for ends in combinations(range(1, len(ordered)), count)
    )
    assert waste(found) == least


@given(st.lists(st.integers(1, 10**5), min_size=1, max_size=60), st.integers(1, 8))
def test_rounds_hold_every_sequence_once_and_like_ones_together(lengths: list[int], rounds: int) -> None:
    ordered = sorted(lengths, reverse=True)
    parts = cut(ordered, rounds)
    assert [s for part in parts for s in part] == ordered and len(parts) <= rounds


@settings(max_examples=8)
@given(st.lists(st.integers(100, 100_000), min_size=1, max_size=40))
def test_a_batch_keeps_its_sequences_its_memory_and_its_bound(lengths: list[int]) -> None:
    cost = flexsp_cost("gpt-7b")
    found = flexsp(lengths, 16, cost, seconds=1.0)
    assert sorted(s for groups in found.rounds for group in groups for s in group.lengths) == sorted(lengths)
    for groups in found.rounds:
        assert sum(group.ranks for group in groups) <= 16
        assert all(sum(group.lengths) <= cost.tokens_per_rank * group.ranks for group in groups)
    assert found.seconds == pytest.approx(sum(round_s(groups, cost) for groups in found.rounds))
    assert found.bound_s <= found.seconds * (1 + 1e-9) and found.gap + 1e-9 >= 0
    assert work_bound_s(lengths, 16, cost) <= found.seconds <= best_static(lengths, 16, cost).seconds


@pytest.mark.parametrize(
    ("lengths", "ranks", "words"),
    [([], 8, "expected some"), ([0], 8, "expected some"), ([10], 6, "power of two"), ([10**6], 8, "take more ranks")],
)
def test_batches_that_cannot_be_say_so(lengths: list[int], ranks: int, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        flexsp(lengths, ranks, flexsp_cost("gpt-7b"))
