"""What stays in a cache of experts, and how precise a chosen expert must be."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.expertcache import (
    EVICTIONS,
    HOBBIT_THRESHOLDS,
    ExpertCache,
    ExpertCacheError,
    layer_distance,
    levels,
    lfu,
    lru,
    mrs,
    weighted,
)

WEIGHTS = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8).map(np.array)


@given(WEIGHTS, st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3).map(sorted))
def test_levels_rank_by_weight(weights: np.ndarray, thresholds: list[float]) -> None:
    """The heaviest is at level 0, lighter ones never at a better level, the order given does not matter."""
    found = levels(weights, thresholds)
    assert found[weights.argmax()] == 0
    order = np.argsort(-weights, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    assert found.max() <= len(thresholds)
    assert levels(weights * 7, thresholds).tolist() == found.tolist()
    if thresholds[-1] == 1.0:
        assert found.max() < len(thresholds)


@pytest.mark.parametrize(("heaviest", "second"), [(0.55, 0), (0.6, 0), (0.61, 1), (0.9, 1), (0.91, 2)])
def test_two_experts_of_mixtral(heaviest: float, second: int) -> None:
    """The unimportance of the second is the weight of the first."""
    assert levels(np.array([1 - heaviest, heaviest]), HOBBIT_THRESHOLDS).tolist() == [second, 0]


@pytest.mark.parametrize("thresholds", [(), (0.9, 0.6), (-0.1,), (1.2,)])
def test_bad_thresholds_are_told(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ExpertCacheError, match="ascend between 0 and 1"):
        levels(np.array([1.0]), thresholds)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(sorted(EVICTIONS)), st.booleans())
def test_laws_of_a_cache(data: st.DataObject, eviction: str, per_layer: bool) -> None:
    """Never more than its rooms, nothing twice, what is to be kept is kept, a better copy serves for a worse one."""
    layers, experts = 3, 4
    rooms = data.draw(st.lists(st.integers(0, 14), min_size=1, max_size=2))
    cache = ExpertCache(layers, experts, rooms, eviction=EVICTIONS[eviction], per_layer=per_layer, top=2)
    for _ in range(data.draw(st.integers(1, 40))):
        expert = data.draw(st.integers(0, layers * experts - 1))
        level = data.draw(st.integers(0, len(rooms) - 1))
        keep = data.draw(st.sets(st.integers(0, layers * experts - 1), max_size=3))
        before = [set(cache.held(at)) for at in range(len(rooms))]
        cache.use(np.array([expert]), np.array([level]))
        cache.observe(expert // experts, np.linspace(0, 1, experts))
        admitted = cache.admit(expert, level, expert // experts, keep)
        assert cache.holds(expert, level) == admitted
        for at, room in enumerate(cache.rooms):
            held = cache.held(at)
            assert len(held) == len(set(held)) <= room
            assert keep & before[at] <= set(held)
            if per_layer:
                counts = np.bincount(np.array(held, dtype=int) // experts, minlength=layers)
                assert (counts <= -(-room // layers)).all()
        found = cache.level_of(expert, len(rooms) - 1)
        assert found is None or cache.holds(expert, found)
        cache.tokens += 1


def hits(cache: ExpertCache, requests: np.ndarray) -> float:
    """Part of requests for experts of one layer that were held, loading those that were not."""
    found = 0
    for expert in requests.tolist():
        found += cache.level_of(expert, 0) is not None
        cache.use(np.array([expert]), np.array([0]))
        cache.admit(expert, 0, 0, [expert])
        cache.tokens += 1
    return found / len(requests)


def test_lru_against_king() -> None:
    """Independent requests: the cache holds the last different ones, orders of which have a known probability."""
    shares = np.array([0.4, 0.25, 0.15, 0.12, 0.08])
    exact = 0.0
    for first, second in permutations(range(5), 2):
        exact += shares[first] * shares[second] / (1 - shares[first]) * (shares[first] + shares[second])
    requests = np.random.default_rng(1).choice(5, size=20_000, p=shares)
    assert hits(ExpertCache(1, 5, [2], eviction=lru), requests) == pytest.approx(exact, abs=0.012)


def test_lfu_keeps_the_most_popular() -> None:
    """All but the last of its two places hold the most popular; the last is whatever was asked for last."""
    shares = np.array([0.4, 0.25, 0.15, 0.12, 0.08])
    requests = np.random.default_rng(1).choice(5, size=20_000, p=shares)
    got = hits(ExpertCache(1, 5, [2], eviction=lfu), requests)
    # Admission is forced: in the second place lies the last request other than the most popular.
    others = shares[1:] / shares[1:].sum()
    assert got == pytest.approx(shares[0] + (others * shares[1:]).sum(), abs=0.012)


def test_score_follows_the_gate() -> None:
    """S <- a TopP + (1 - a) S: half of the score comes from the last step, scores below the top count as 0."""
    cache = ExpertCache(1, 4, [2], eviction=mrs, alpha=0.5, top=2)
    cache.observe(0, np.array([0.5, 0.3, 0.15, 0.05]))
    assert cache.records.score.tolist() == [0.25, 0.15, 0.0, 0.0]
    cache.observe(0, np.array([0.1, 0.2, 0.6, 0.1]))
    assert cache.records.score.tolist() == pytest.approx([0.125, 0.175, 0.3, 0.0])
    cache.fill([0, 1])
    assert cache.admit(2, 0, 0)
    assert sorted(cache.held(0)) == [1, 2]


def test_hobbits_sum_weighs_nearness_of_the_turn() -> None:
    """Layer distance alone evicts the expert whose layer has just run."""
    cache = ExpertCache(4, 2, [3], eviction=weighted(lru=0, lfu=0, lhu=0, fld=1))
    cache.fill([0, 2, 4])  # of layers 0, 1 and 2
    assert layer_distance(cache.records, np.array([0, 2, 4]), 1).tolist() == [0.25, 1.0, 0.75]
    assert cache.admit(6, 0, 1)
    assert sorted(cache.held(0)) == [2, 4, 6]


def test_hobbits_sum_weighs_uses_at_full_precision() -> None:
    cache = ExpertCache(1, 3, [2], eviction=weighted(lru=0, lfu=0, lhu=1, fld=0))
    cache.fill([0, 1])
    cache.use(np.array([0, 1]), np.array([1, 0]))
    cache.tokens = 1
    assert cache.admit(2, 0, 0)
    assert sorted(cache.held(0)) == [1, 2]


def test_a_shared_lru_loses_everything_to_a_round_that_is_longer_than_it() -> None:
    """Layers take turns: 4 experts needed again and again do not hit in 3 rooms, but mostly do with rooms per layer."""
    found = {}
    for per_layer in (False, True):
        cache = ExpertCache(4, 2, [3], per_layer=per_layer)
        found[per_layer] = 0
        for _ in range(10):
            for layer in range(4):
                found[per_layer] += cache.level_of(2 * layer, 0) is not None
                cache.use(np.array([2 * layer]), np.array([0]))
                cache.admit(2 * layer, 0, layer)
            cache.tokens += 1
    assert found == {False: 0, True: 27}


@pytest.mark.parametrize("rooms", [[], [-1]])
def test_bad_rooms_are_told(rooms: list[int]) -> None:
    with pytest.raises(ExpertCacheError, match="expected a number of at least 0"):
        ExpertCache(1, 1, rooms)
