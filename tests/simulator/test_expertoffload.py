"""Steps with experts that do not fit: closed forms, and laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.expertoffload import (
    ExpertCosts,
)
from simulator.errors import OffloadError
from simulator.expertoffload import Offload
from simulator.expertrouting import Active, Draw, SampledRouting, active_experts, power_law
from simulator.expertsharing import SHARINGS
from simulator.offloadedsteps import simulate_offload
from simulator.offloadplan import OffloadPlan, Prefetch

LAYERS, EXPERTS, TOP_K = 4, 8, 2
TOY = ExpertCosts(
    LAYERS, EXPERTS, TOP_K,
    expert_bytes=(8.0, 2.0), gpu_s=((0.0, 1.0), (0.0, 0.5)), cpu_s=((0.0, 3.0), (0.0, 2.0)),
    dense_s=(1.0, 2.0, 1.0, 2.0), once_s=5.0, link_bytes_per_s=2.0,
)  # fmt: skip
ONE = replace(TOY, expert_bytes=(8.0,), gpu_s=TOY.gpu_s[:1], cpu_s=TOY.cpu_s[:1])
POPULARITY = power_law(LAYERS, EXPERTS, 0.5, np.random.default_rng(0))


def simulated(costs: ExpertCosts, plan: OffloadPlan, **options: float):
    routing = SampledRouting(POPULARITY, TOP_K, np.random.default_rng(1), **options)
    return simulate_offload(costs, plan, routing, np.random.default_rng(2), steps=60, warmup=10)


def test_nothing_cached_loads_everything() -> None:
    """By layer: dense, two loads of 4 s after each other, the second expert's 1 s; the first is hidden."""
    result = simulated(ONE, OffloadPlan(0.0))
    assert result.steps_s == pytest.approx(np.full(60, 5.0 + 6.0 + LAYERS * (2 * 4.0 + 1.0)))
    assert result.hit_rate == 0.0
    assert result.loaded_bytes == LAYERS * 2 * 8.0
    assert result.busy["link"] == pytest.approx(LAYERS * 8.0 / result.step_s)


def test_everything_cached_loads_nothing() -> None:
    result = simulated(ONE, OffloadPlan(1.0))
    assert result.steps_s == pytest.approx(np.full(60, 5.0 + 6.0 + LAYERS * 2 * 1.0))
    assert (result.hit_rate, result.loaded_bytes, result.busy["gpu"]) == (1.0, 0.0, pytest.approx(1.0))


def test_a_split_computes_on_the_cpu_what_is_not_cached() -> None:
    result = simulated(ONE, OffloadPlan(0.0, misses="cpu", cpu_threads=1))
    assert result.steps_s == pytest.approx(np.full(60, 5.0 + 6.0 + LAYERS * 2 * 3.0))
    assert result.loaded_bytes == 0.0


def test_from_the_ssd_loads_follow_reads() -> None:
    """8 bytes at 1 byte/s: two reads one after the other, the second load of 4 s and its expert behind them."""
    costs = replace(ONE, host_bytes=0.0, ssd_bytes_per_s=1.0)
    result = simulated(costs, OffloadPlan(0.0))
    assert result.steps_s == pytest.approx(np.full(60, 5.0 + 6.0 + LAYERS * (2 * 8.0 + 4.0 + 1.0)))


def test_a_host_with_room_for_all_is_as_none_behind_it() -> None:
    costs = replace(ONE, ssd_bytes_per_s=1.0)
    plan = OffloadPlan(0.3)
    assert simulated(costs, plan).steps_s.tolist() == simulated(ONE, plan).steps_s.tolist()


def plain_steps_s(costs: ExpertCosts, room: int, draws: list[Draw]) -> list[float]:
    """Loading on demand with LRU per layer, retold with lists of a layer's experts, those longest unused first."""
    held = [list(range(room)) for _ in range(costs.layers)]
    now = gpu = link = 0.0
    took = []
    for draw in draws:
        began = now
        now = gpu = max(now, gpu) + costs.once_s
        for layer, recent in enumerate(held):
            now = gpu = now + costs.dense_s[layer]
            chosen = draw.chosen[layer, 0].tolist()
            missing = [expert for expert in chosen if expert not in recent]
            landed = [now for _ in range(len(chosen) - len(missing))]
            for _ in missing:
                link = max(link, now) + costs.expert_bytes[0] / costs.link_bytes_per_s
                landed.append(link)
            for at in landed:
                now = gpu = max(gpu, at) + costs.gpu_s[0][1]
            for expert in chosen:
                if expert in recent:
                    recent.remove(expert)
            recent += chosen
            del recent[: len(recent) - room]
        took.append(now - began)
    return took


@pytest.mark.parametrize(("top_k", "room"), [(1, 1), (1, 2), (1, 5), (2, 2)])
def test_loading_with_lru_against_a_plain_retelling(top_k: int, room: int) -> None:
    """Rooms and choices for which it does not matter which of a token's experts counts as used last."""
    routing = SampledRouting(POPULARITY, top_k, np.random.default_rng(6), persistence=0.6)
    draws = [routing.step() for _ in range(150)]
    costs = replace(ONE, top_k=top_k)
    offload = Offload(costs, OffloadPlan(room / EXPERTS), POPULARITY, np.random.default_rng(0))
    got = [offload.step(active_experts(draw, (1.0,))[0]) for draw in draws]
    assert len(set(got)) >= 4
    assert got[30:] == pytest.approx(plain_steps_s(costs, room, draws)[30:])


def test_perfect_prefetch_hides_the_shorter_of_loads_and_work() -> None:
    """All of a layer's needs are loaded a layer ahead: from the second layer on only what is longer counts."""
    fast = replace(ONE, link_bytes_per_s=80.0)
    ahead = simulated(fast, OffloadPlan(0.5, prefetch=Prefetch((1,), (1.0,))))
    plain = simulated(fast, OffloadPlan(0.5))
    resident = simulated(fast, OffloadPlan(1.0))
    assert resident.step_s < ahead.step_s < plain.step_s
    assert ahead.step_s <= resident.step_s + 2 * 0.1 + 1e-9  # the first layer's loads are not foreseen
    assert ahead.hit_rate > 0.75 + 0.2 * plain.hit_rate


def test_wrong_prefetch_costs_the_link() -> None:
    right, wrong = (simulated(ONE, OffloadPlan(0.5, prefetch=Prefetch((1,), (hit,)))) for hit in (1.0, 0.0))
    assert wrong.loaded_bytes > 1.3 * right.loaded_bytes
    assert wrong.step_s > right.step_s


def stepped(plan: OffloadPlan, actives: list[Active], costs: ExpertCosts = ONE) -> tuple[float, Offload]:
    """One step with these experts; the cache starts with the first ones of every layer."""
    offload = Offload(costs, plan, POPULARITY, np.random.default_rng(0))
    return offload.step(actives), offload


@pytest.mark.parametrize(("walk", "took_s"), [(False, 17.0), (True, 19.0)])
def test_walking_stops_at_the_first_layer_with_a_miss(walk: bool, took_s: float) -> None:
    """Layer 0 is known at 6 s, layer 1 at 12 s: its load takes from 6 to 10 s, layer 2's from 10 s or from 12 s on."""
    costs = replace(ONE, dense_s=(1.0, 6.0, 1.0, 2.0))
    plan = OffloadPlan(0.5, prefetch=Prefetch((1, 2), (1.0, 1.0), walk=walk))
    got_s, offload = stepped(plan, [[], [(5, 1, 0)], [(6, 1, 0)], []], costs)
    assert got_s == took_s
    assert offload.loaded_bytes == 16.0


def test_what_is_loaded_ahead_is_kept_until_its_layer() -> None:
    """Two rooms for all layers: layer 2's expert stays, though layer 1 needs room for one of its own."""
    plan = OffloadPlan(2 / 32, per_layer=False, prefetch=Prefetch((2,), (1.0,)))
    _, offload = stepped(plan, [[(0, 1, 0)], [(1, 1, 0)], [(5, 1, 0)], []])
    assert offload.loaded_bytes == 16.0
    assert offload.hits == 2


def test_impact_does_not_load_what_lands_too_late() -> None:
    """Loads of 80 s for layers of 1 to 8 s on the CPU, against loads of 2 s."""
    plan = OffloadPlan(0.25, misses="hybrid", cpu_threads=1, prefetch=Prefetch((1, 2), (1.0, 1.0), impact=True))
    assert simulated(replace(ONE, link_bytes_per_s=0.1), plan).loaded_bytes == 0.0
    assert simulated(replace(ONE, link_bytes_per_s=4.0), plan).loaded_bytes > 0.0


def test_the_host_keeps_what_was_used_last() -> None:
    """Room for two, none on the GPU: expert 0 is asked for between others and never read again, expert 1 is."""
    costs = replace(ONE, host_bytes=16.0, ssd_bytes_per_s=1.0)
    offload = Offload(costs, OffloadPlan(0.0), POPULARITY, np.random.default_rng(0))
    reads = []
    for expert in (0, 1, 0, 2, 0, 1):
        offload.step([[(expert, 1, 0)], [], [], []])
        reads.append(offload.lines.busy_s["ssd"] / 8.0)
    assert reads == [0, 1, 1, 2, 2, 3]


def test_an_expert_on_its_way_from_the_ssd_is_waited_for() -> None:
    """A read of 8 s asked for at 0 s is over at 8 s for whoever asks meanwhile."""
    costs = replace(ONE, host_bytes=16.0, ssd_bytes_per_s=1.0)
    offload = Offload(costs, OffloadPlan(0.0), POPULARITY, np.random.default_rng(0))
    assert [offload._in_host(0, 5, 0, at_s) for at_s in (0.0, 1.0, 9.0)] == [8.0, 8.0, 9.0]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SHARINGS)), st.sampled_from(["lru", "lfu", "score", "weighted"]), st.booleans(),
    st.floats(0, 1), st.integers(1, 3), st.sampled_from([Prefetch(), Prefetch((1, 2), (0.9, 0.5), walk=True),
    Prefetch((2,), (0.7,)), Prefetch((1, 2), (0.8, 0.6), impact=True)]), st.booleans(),
)  # fmt: skip
def test_laws_of_steps(
    misses: str, eviction: str, per_layer: bool, share: float, tokens: int, prefetch: Prefetch, ssd: bool
) -> None:
    """Clocks only run forward, no resource is used more than all the time, same seeds give the same steps."""
    costs = replace(
        TOY,
        gpu_s=tuple(tuple(row[1] * min(n, 1) for n in range(tokens + 1)) for row in TOY.gpu_s),
        cpu_s=tuple(tuple(row[1] * n for n in range(tokens + 1)) for row in TOY.cpu_s),
    )
    if ssd:
        costs = replace(costs, ssd_bytes_per_s=5.0, host_bytes=0.4 * costs.total_bytes)
    plan = OffloadPlan(
        share, ("fp16", "int4"), (0.6, 0.9), eviction=eviction, per_layer=per_layer, misses=misses,
        cpu_threads=1, prefetch=prefetch,
    )  # fmt: skip
    runs = []
    for _ in range(2):
        routing = SampledRouting(POPULARITY, TOP_K, np.random.default_rng(1), tokens=tokens, persistence=0.5)
        runs.append(simulate_offload(costs, plan, routing, np.random.default_rng(2), steps=10, warmup=2))
    assert runs[0].steps_s.tolist() == runs[1].steps_s.tolist()
    result = runs[0]
    assert (result.steps_s >= costs.once_s + sum(costs.dense_s) - 1e-9).all()
    assert all(part <= 1 + 1e-9 for name, part in result.busy.items() if name in ("gpu", "cpu"))
    assert 0 <= result.hit_rate <= 1
    assert sum(result.level_share) == pytest.approx(1)
    if misses == "cpu" and not prefetch.leads:
        assert result.loaded_bytes == 0


def test_persistent_routing_raises_hits() -> None:
    low, high = (simulated(ONE, OffloadPlan(0.4), persistence=p).hit_rate for p in (0.0, 0.9))
    assert high > low + 0.1


def test_a_better_copy_serves_what_could_be_worse() -> None:
    plan = OffloadPlan(1.0, ("fp16", "int4"), (0.6, 0.9), low_share=0.0)
    offload = Offload(TOY, plan, POPULARITY, np.random.default_rng(0))
    took_s = offload.step([[(0, 1, 1)], [], [], []])
    assert took_s == 5.0 + 6.0 + 1.0
    assert offload.hits == 1


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SampledRouting(np.zeros((1, 2)), 1, np.random.default_rng(0)), "popularity above 0"),
        (lambda: Offload(ONE, OffloadPlan(0, ("a", "b"), (0.5, 1)), POPULARITY, np.random.default_rng(0)), "1 levels"),
        (lambda: simulate_offload(ONE, OffloadPlan(0), None, None, steps=3), "at least 10"),
    ],
)
def test_bad_steps_are_told(make, told: str) -> None:
    with pytest.raises(OffloadError, match=told):
        make()
