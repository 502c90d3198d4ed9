"""The mixture of replicas against trying every combination of counts."""

from __future__ import annotations

from itertools import product
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import NoFeasiblePlanError
from planner.mix import Kind, best_mix

Goal = Literal["capacity", "gpus", "cost"]
GOALS: tuple[Goal, ...] = ("capacity", "gpus", "cost")


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Kind], int, float]:
    kinds = [
        Kind(
            str(i),
            draw(st.integers(1, 8)),
            draw(st.integers(0, 200)) / 8,
            draw(st.integers(0, 80)) / 4,
        )
        for i in range(draw(st.integers(1, 4)))
    ]
    return kinds, draw(st.integers(1, 12)), draw(st.integers(0, 400)) / 8


def every_mix(kinds: list[Kind], gpus: int) -> list[tuple[int, ...]]:
    counts = product(*(range(gpus // kind.gpus + 1) for kind in kinds))
    return [n for n in counts if sum(k.gpus * c for k, c in zip(kinds, n, strict=True)) <= gpus]


def total(kinds: list[Kind], counts: tuple[int, ...], what: str) -> float:
    return float(sum(getattr(kind, what) * count for kind, count in zip(kinds, counts, strict=True)))


@settings(max_examples=120, deadline=None)
@given(cases(), st.sampled_from(GOALS))
def test_mix_against_brute_force(case: tuple[list[Kind], int, float], goal: Goal) -> None:
    kinds, gpus, rate = case
    possible = every_mix(kinds, gpus)
    serving = possible if goal == "capacity" else [n for n in possible if total(kinds, n, "capacity_per_s") >= rate]
    if not serving:
        with pytest.raises(NoFeasiblePlanError):
            best_mix(kinds, gpus, goal=goal, rate_per_s=rate)
        return
    mix = best_mix(kinds, gpus, goal=goal, rate_per_s=rate)
    what = {"capacity": "capacity_per_s", "gpus": "gpus", "cost": "usd_per_h"}[goal]
    values = [total(kinds, n, what) for n in serving]
    best = max(values) if goal == "capacity" else min(values)
    assert mix.counts in serving
    assert total(kinds, mix.counts, what) == pytest.approx(best, abs=1e-6)
    assert mix.objective == pytest.approx(best, abs=1e-6)
    assert mix.bound == pytest.approx(best, abs=1e-6)
    assert mix.gpus == total(kinds, mix.counts, "gpus") <= gpus
    assert mix.capacity_per_s == pytest.approx(total(kinds, mix.counts, "capacity_per_s"))


def test_a_mix_fills_what_one_kind_leaves_idle() -> None:
    """Six devices: a replica of four serves best by device, a replica of two takes the rest."""
    mix = best_mix([Kind("four", 4, 10.0), Kind("two", 2, 4.0)], 6, goal="capacity")
    assert (mix.counts, mix.capacity_per_s, mix.gpus) == ((1, 1), 14.0, 6)


def test_demand_beyond_the_devices_says_what_one_kind_reaches() -> None:
    with pytest.raises(NoFeasiblePlanError, match=r"rate 21/s: no mix .* on 8 devices .* reaches 20/s"):
        best_mix([Kind("four", 4, 10.0), Kind("three", 3, 6.0)], 8, goal="gpus", rate_per_s=21.0)


def test_cheapest_is_not_smallest() -> None:
    kinds = [Kind("fast", 1, 10.0, usd_per_h=9.0), Kind("slow", 2, 10.0, usd_per_h=4.0)]
    assert best_mix(kinds, 4, goal="gpus", rate_per_s=10.0).counts == (1, 0)
    assert best_mix(kinds, 4, goal="cost", rate_per_s=10.0).counts == (0, 1)
