"""A map that was made for fewer ranks gives itself away; one that is even, or uneven for other reasons, does not."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels.routing import RoutingStats
from planner.expertbalance import made_for
from planner.placement import Problem, solve
from planner.placementfiles import slot_maps
from planner.routedranks import ExpertMap, in_order


def stats_of(seed: int, experts: int = 128) -> RoutingStats:
    loads = np.random.default_rng(seed).lognormal(0, 0.7, (6, experts))
    return RoutingStats("made-up", tuple(range(6)), loads, 8, "seed")


def map_of(stats: RoutingStats, ranks: int) -> ExpertMap:
    problem = Problem(stats.loads, None, ranks, stats.experts // ranks)
    return ExpertMap(slot_maps(problem, solve(problem, solver="greedy").holds), stats.experts)


@pytest.mark.parametrize("seed", range(3))
def test_a_map_for_fewer_ranks_is_noticed(seed: int) -> None:
    stats = stats_of(seed)
    assert made_for(stats, map_of(stats, 8), 16) == 8
    assert made_for(stats, map_of(stats, 8), 32) == 8


@pytest.mark.parametrize("seed", range(3))
def test_maps_for_these_ranks_or_more_and_maps_of_other_traffic_are_not(seed: int) -> None:
    stats, other = stats_of(seed), stats_of(seed + 100)
    assert made_for(stats, map_of(stats, 16), 16) is None
    assert made_for(stats, map_of(stats, 16), 8) is None
    assert made_for(stats, map_of(other, 16), 16) is None
    assert made_for(stats, in_order(6, 128), 16) is None
