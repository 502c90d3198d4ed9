"""Steps with experts that do not fit: closed forms, laws, and the clocks against the general executor."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.errors import MappingError, OutOfMemoryError, ProfileError
from hwmodels.expertoffload import (
    THREAD_BYTES_PER_S,
    ExpertCosts,
    Host,
    cache_share_that_fits,
    chunk_weight_bytes,
    compile_expert_costs,
    cpu_expert_s,
    expert_bytes,
    gpu_expert_s,
    touched_share,
)
from hwmodels.hardware import load_cluster, load_device
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import compile_step_model
from hwmodels.yamlfiles import PROFILES
from simulator.expertoffload import (
    SHARINGS,
    Active,
    Draw,
    Offload,
    OffloadError,
    OffloadPlan,
    Prefetch,
    SampledRouting,
    Work,
    active_experts,
    cache_rooms,
    ends_s,
    hybrid,
    offloaded_token_s,
    popularity_of,
    power_law,
    simulate_offload,
)
from simulator.timelines import Graph, Operation, Place, list_schedule, on

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


@st.composite
def works(draw: st.DrawFn, most: int = 5) -> list[Work]:
    """Experts of a layer, each more expensive with more tokens, some of them there."""
    found = []
    for expert in range(draw(st.integers(1, most))):
        tokens, there = draw(st.integers(1, 9)), draw(st.booleans())
        found.append(Work(expert, tokens, 0, 0.5 + 0.01 * tokens, 0.8 + 0.2 * tokens, 0.0 if there else 1.3, 0.0, 0.0))
    return found


def in_sequence(graph: Graph, place: Place) -> tuple[float, ...]:
    """As given, whether or not something else could start before."""
    return (place.position,)


@settings(max_examples=100, deadline=None)
@given(works(), st.sampled_from(sorted(SHARINGS)), st.tuples(*[st.floats(0, 3)] * 3))
def test_clocks_against_the_general_executor(layer: list[Work], name: str, clocks: tuple[float, float, float]) -> None:
    """The same loads and experts as operations of a graph end when the layer's clocks say."""
    order = SHARINGS[name](layer, clocks)
    assert sorted(work.expert for work, _ in order) == sorted(work.expert for work in layer)
    operations = []
    for work, on_cpu in order:
        after: tuple[str, ...] = ()
        if not on_cpu and work.load_s:
            operations.append(Operation(f"load {work.expert}", on({"link": work.load_s})))
            after = (f"load {work.expert}",)
        seconds = {"cpu": work.cpu_s} if on_cpu else {"gpu": work.gpu_s}
        operations.append(Operation(f"run {work.expert}", on(seconds), after))
    names = ("gpu", "cpu", "link")
    schedule = list_schedule(
        operations, dict.fromkeys(names, 1), in_sequence, free_s=dict(zip(names, clocks, strict=True))
    )
    ran = [end for name, end in schedule.end_s.items() if name.startswith("run")]
    gpu_s, cpu_s, _ = ends_s(order, clocks)
    used = [end for end, where in ((gpu_s, False), (cpu_s, True)) if any(on_cpu is where for _, on_cpu in order)]
    assert max(ran) == pytest.approx(max(used))


def best_s(layer: list[Work]) -> float:
    """The shortest layer over all orders and all splits."""
    start = (0.0, 0.0, 0.0)
    return min(
        max(ends_s(list(zip(order, sides, strict=True)), start)[:2])
        for order in permutations(layer)
        for sides in product((False, True), repeat=len(layer))
    )


@settings(max_examples=40, deadline=None)
@given(works(4))
def test_hybrimoes_rule_is_near_the_best_split(layer: list[Work]) -> None:
    """Never below the best of all orders and splits, and at most twice as long (1.22 in 3000 random layers)."""
    took_s = max(ends_s(hybrid(layer, (0.0, 0.0, 0.0)), (0.0, 0.0, 0.0))[:2])
    least_s = best_s(layer)
    assert least_s - 1e-9 <= took_s <= 2 * least_s


def test_popular_experts_are_chosen_first_by_their_share() -> None:
    popularity = power_law(1, 6, 1.0, np.random.default_rng(3))
    for persistence in (0.0, 0.7):
        routing = SampledRouting(popularity, 2, np.random.default_rng(4), tokens=20, persistence=persistence)
        draws = [routing.step() for _ in range(1500)]
        first = np.concatenate(
            [np.take_along_axis(d.chosen, d.weights.argmax(-1)[..., None], -1).ravel() for d in draws]
        )
        assert np.bincount(first, minlength=6) / len(first) == pytest.approx(popularity[0], abs=0.012)
        assert all((d.chosen[..., 0] != d.chosen[..., 1]).all() for d in draws)
        assert draws[0].weights.sum(-1) == pytest.approx(1)
        assert draws[0].scores.sum(-1) == pytest.approx(1)


@pytest.mark.parametrize(("experts", "top_k", "error"), [(8, 2, 0.1), (64, 6, 0.02), (256, 8, 0.01)])
def test_measured_loads_come_out(experts: int, top_k: int, error: float) -> None:
    """Loads from 1 to 5 within `error`, beside four deviations of the counts over 60,000 tokens."""
    loads = np.linspace(1, 5, experts)[None]
    routing = SampledRouting(popularity_of(loads, top_k), top_k, np.random.default_rng(5), tokens=60_000)
    wanted = 60_000 * top_k * loads[0] / loads.sum()
    got = np.bincount(routing.step().chosen.ravel(), minlength=experts)
    assert (np.abs(got - wanted) < error * wanted + 4 * np.sqrt(wanted)).all()


def test_persistent_routing_raises_hits() -> None:
    low, high = (simulated(ONE, OffloadPlan(0.4), persistence=p).hit_rate for p in (0.0, 0.9))
    assert high > low + 0.1


def test_active_experts_count_every_token_once() -> None:
    routing = SampledRouting(POPULARITY, TOP_K, np.random.default_rng(0), tokens=50)
    draw = routing.step()
    actives, shares = active_experts(draw, (0.6, 0.9))
    assert shares.sum() == LAYERS * 50 * TOP_K
    assert sum(tokens for active in actives for _, tokens, _ in active) == shares[:2].sum()
    single = SampledRouting(POPULARITY, TOP_K, np.random.default_rng(0)).step()
    assert sum(len(active) for active in active_experts(single, (0.6, 0.9))[0]) <= LAYERS * TOP_K


def test_rooms_share_the_cache_by_bytes() -> None:
    """Half of 32 experts of 8 bytes, a quarter of it for experts of 2 bytes."""
    plan = OffloadPlan(0.5, ("fp16", "int4"), (0.6, 0.9), low_share=0.25)
    assert cache_rooms(TOY, plan) == [12, 16]
    assert cache_rooms(ONE, OffloadPlan(0.5)) == [16]


def test_a_better_copy_serves_what_could_be_worse() -> None:
    plan = OffloadPlan(1.0, ("fp16", "int4"), (0.6, 0.9), low_share=0.0)
    offload = Offload(TOY, plan, POPULARITY, np.random.default_rng(0))
    took_s = offload.step([[(0, 1, 1)], [], [], []])
    assert took_s == 5.0 + 6.0 + 1.0
    assert offload.hits == 1


MIXTRAL, HOST = load_model("mixtral-8x7b"), load_device("xeon-8592")


def test_bytes_of_an_expert() -> None:
    """3 x 4096 x 14336 weights; DeepSeek-V3 3 x 7168 x 2048 in blocks of fp8."""
    assert expert_bytes(MIXTRAL, "fp16") == 3 * 4096 * 14336 * 2
    assert expert_bytes(load_model("deepseek-v3"), "fp8_block") == 3 * 7168 * 2048 * (1 + 4 / 128**2)
    with pytest.raises(MappingError, match="has no experts"):
        expert_bytes(load_model("llama-3-8b"), "fp16")


def test_threads_stream_until_the_memory_is_full() -> None:
    """Twice the threads take half the time, but all 64 not less than 85 % of 358 GB/s."""
    one = np.array([1.0])
    seconds = [float(cpu_expert_s(MIXTRAL, "fp16", one, Host(HOST, n))[0]) - 5e-6 for n in (1, 2, 64)]
    assert seconds[0] == pytest.approx(2 * seconds[1])
    assert seconds[0] == pytest.approx(3 * 4096 * 14336 * 2 / THREAD_BYTES_PER_S)
    assert seconds[2] == pytest.approx(3 * 4096 * 14336 * 2 / (0.85 * 358e9))
    many = cpu_expert_s(MIXTRAL, "fp16", np.array([4096.0]), Host(HOST, 32))  # half of 60 % of 249 Tflop/s
    assert many[0] - 5e-6 == pytest.approx(2 * 176_160_768 * 4096 / (0.5 * 0.6 * 249e12))


def test_thread_bandwidth_is_that_measured() -> None:
    pandas = pytest.importorskip("pandas")
    rows = pandas.read_parquet(PROFILES / "measured" / "xeon-1c" / "gemm.parquet")
    rows = rows[(rows.m == 1) & (rows.dtype == "bf16") & (rows.n * rows.k * 2 > 4e6)]
    rates = rows.n * rows.k * 2 / rows.seconds
    assert rates.median() == pytest.approx(THREAD_BYTES_PER_S, rel=0.01)
    assert rates.min() > 6e9
    assert rates.max() < 12e9


def test_an_expert_on_the_gpu_is_bound_by_its_memory() -> None:
    """One token: the weights at 90 % of 1008 GB/s, and no more than a fifth beside that."""
    cost = AnalyticCost(load_cluster("rtx-4090", 1), Mapping())
    seconds = float(gpu_expert_s(MIXTRAL, "fp16", np.array([1.0]), cost)[0])
    least_s = 3 * 4096 * 14336 * 2 / (0.9 * 1008e9)
    assert least_s < seconds < 1.2 * least_s
    assert float(gpu_expert_s(MIXTRAL, "fp16", np.array([0.0]), cost)[0]) == 0.0


def test_all_experts_cached_is_near_the_step_of_a_model_that_fits() -> None:
    """One sequence, Mixtral on a B200: two experts one after the other take longer than in one fused kernel."""
    cluster = load_cluster("b200-sxm", 1)
    idle = Engine("idle host", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 2e9)
    steps = compile_step_model(
        MIXTRAL, Mapping(), Precision(), idle, AnalyticCost(cluster, Mapping()), max_tokens=8, max_seqs=8
    )
    fused_s = steps.step_s(1, 1024, ())
    result = offloaded_token_s(MIXTRAL, cluster, HOST, OffloadPlan(1.0, ("bf16",)), steps=10, warmup=0)
    assert fused_s < result.step_s < 1.2 * fused_s


def test_share_that_fits() -> None:
    """46.7e9 weights of which 256 experts of 176e6: on 24 GB beside 2 GB, 23 % of the experts."""
    device = load_device("rtx-4090")
    share = cache_share_that_fits(MIXTRAL, Precision(), device.memory_bytes, 2e9)
    dense = (MIXTRAL.parameters - 256 * 176_160_768) * 2
    assert share * 256 * 176_160_768 * 2 + dense + 2e9 == pytest.approx(device.memory_bytes)
    assert cache_share_that_fits(MIXTRAL, Precision(), 1e12, 0) == 1.0
    with pytest.raises(OutOfMemoryError, match="without its experts misses"):
        cache_share_that_fits(MIXTRAL, Precision(), 2e9, 0)


def test_prefill_and_models_with_dense_layers_run() -> None:
    cluster = load_cluster("rtx-4090", 1)
    lite = load_model("deepseek-v2-lite")
    plan = OffloadPlan(0.3, misses="hybrid", cpu_threads=8)
    prompt = offloaded_token_s(lite, cluster, HOST, plan, tokens=64, context_tokens=0, prefill=True, steps=10)
    token = offloaded_token_s(lite, cluster, HOST, plan, steps=20)
    assert prompt.step_s > 2 * token.step_s
    more = offloaded_token_s(lite, cluster, HOST, replace(plan, cpu_threads=32), steps=20)
    assert more.step_s < token.step_s
    larger = offloaded_token_s(lite, cluster, HOST, replace(plan, cache_share=0.6), steps=20)
    assert larger.step_s < token.step_s


@pytest.mark.parametrize(
    ("share", "tokens", "correlation", "touched"), [(0.2, 8, 0.0, 1 - 0.8**8), (0.3, 1, 0.5, 0.3), (1, 5, 0, 1)]
)
def test_touched_share(share: float, tokens: int, correlation: float, touched: float) -> None:
    assert touched_share(share, tokens, correlation) == pytest.approx(touched)


def test_touched_share_against_a_chain() -> None:
    """Two states, share 0.2, correlation 0.6: used next with 0.2 + 0.8 x 0.6 if used, else with 0.2 x 0.4."""
    rng = np.random.default_rng(0)
    used = rng.random(200_000) < 0.2
    ever = used.copy()
    for _ in range(4):
        used = rng.random(len(used)) < np.where(used, 0.2 + 0.8 * 0.6, 0.2 * 0.4)
        ever |= used
    assert ever.mean() == pytest.approx(touched_share(0.2, 5, 0.6), abs=0.005)
    assert used.mean() == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: OffloadPlan(1.5), "cache_share = 1.5"),
        (lambda: OffloadPlan(0.5, eviction="fifo"), "expected one of lru"),
        (lambda: OffloadPlan(0.5, misses="npu"), "expected one of load"),
        (lambda: OffloadPlan(0.5, ("fp16", "int4")), "expected one for each of fp16, int4"),
        (lambda: OffloadPlan(0.5, misses="hybrid"), "needs at least 1"),
        (lambda: Prefetch((1,), ()), "a hit rate for each lead"),
        (lambda: Prefetch((1,), (1.5,)), "expected shares"),
        (lambda: SampledRouting(np.zeros((1, 2)), 1, np.random.default_rng(0)), "popularity above 0"),
        (lambda: Offload(ONE, OffloadPlan(0, ("a", "b"), (0.5, 1)), POPULARITY, np.random.default_rng(0)), "1 levels"),
        (lambda: simulate_offload(ONE, OffloadPlan(0), None, None, steps=3), "at least 10"),
    ],
)
def test_bad_plans_are_told(make, told: str) -> None:
    with pytest.raises(OffloadError, match=told):
        make()


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: Host(HOST, 65), ProfileError, "expected 0 to the 64 cores"),
        (lambda: Host(HOST, 1, ssd_bytes_per_s=0.0), ProfileError, "ssd_bytes_per_s"),
        (lambda: replace(ONE, host_bytes=100.0), OutOfMemoryError, "give an SSD"),
        (lambda: replace(ONE, top_k=9), MappingError, "top_k = 9"),
        (lambda: replace(TOY, gpu_s=TOY.gpu_s[:1]), MappingError, "1 GPU times"),
        (lambda: touched_share(2.0, 1), MappingError, "expected a share"),
        (lambda: chunk_weight_bytes(1.0, 1.2), MappingError, "chunk-level"),
        (
            lambda: compile_expert_costs(MIXTRAL, load_cluster("rtx-4090", 1), Host(HOST), ("int3",)),
            MappingError,
            "expected one or more of fp32",
        ),
    ],
)
def test_bad_costs_are_told(make, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()


def test_loads_of_another_shape_are_told() -> None:
    with pytest.raises(OffloadError, match="expected 32 layers of 8 experts"):
        offloaded_token_s(MIXTRAL, load_cluster("rtx-4090", 1), HOST, OffloadPlan(0.2), loads=np.ones((2, 2)), steps=10)
