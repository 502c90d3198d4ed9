"""No simulated plan beats its bounds: random plans, loads and limits, and every coefficient against the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwmodels.mapping import Mapping, Precision
from hwmodels.overlap import Overlap
from hwmodels.step_model import StepModel
from planner.bounds import Screen, demand, lower_hull, stage_bound
from planner.catalogue import Catalogue, open_catalogue
from planner.scheduling import prompt_tokens_per_step
from simulator.deployment import Deployment, ReplicaSpec
from simulator.limits import Limit, attainment
from simulator.orders import ORDERS, Order
from simulator.policies import Policy
from simulator.result import latencies
from simulator.routers import ROUTERS
from simulator.scheduler import SchedulerConfig
from simulator.simulate import run
from simulator.workload import Requests

MAX_TOKENS, MAX_SEQS = 2048, 64
FP8 = Precision("fp8", "fp8", "fp8")

#: (model, device, mapping, precision): dense and MoE, GQA, MLA and sliding windows, every kind of replica.
CUTS = [
    ("llama-3.2-1b", "l4", Mapping(), Precision()),
    ("llama-3.2-1b", "l4", Mapping(tp=2, pp=2), Precision()),
    ("llama-3.1-8b", "h100-sxm", Mapping(tp=4), FP8),
    ("llama-3.1-8b", "h100-sxm", Mapping(pp=3), Precision("int4", "bf16", "bf16")),
    ("gpt-oss-20b", "h100-sxm", Mapping(tp=2, expert_tp=2), Precision()),
    ("gpt-oss-20b", "h100-sxm", Mapping(attention_dp=2, ep=2), Precision()),
    ("deepseek-v2-lite", "h100-sxm", Mapping(attention_dp=4, ep=4), Precision()),
    ("deepseek-v2-lite", "h100-sxm", Mapping(tp=2, ep=2), Precision()),
    ("qwen3-30b-a3b", "h100-sxm", Mapping(attention_dp=8, ep=8), FP8),
    ("qwen3-30b-a3b", "h100-sxm", Mapping(tp=2, attention_dp=3, ep=2, expert_tp=3), Precision()),
    ("qwen3-30b-a3b", "h100-sxm", Mapping(tp=2, pp=2, ep=2), Precision()),
    ("deepseek-v2-lite", "h100-sxm", Mapping(attention_dp=2, ep=2, pp=2), Precision()),
    ("qwen3-30b-a3b", "h100-sxm", Mapping(tp=2, attention_dp=2, ep=4, pp=2), FP8),
]


@cache
def catalogue(model: str, hardware: str) -> Catalogue:
    found = open_catalogue(model, hardware, 8, "vllm")
    found.max_tokens, found.max_seqs = MAX_TOKENS, MAX_SEQS
    return found


@cache
def compiled(cut: int, overlap: Overlap = "none") -> StepModel:
    model, hardware, mapping, precision = CUTS[cut]
    return catalogue(model, hardware).step_model(mapping, precision, overlap=overlap)


@st.composite
def traffic(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaps of mean 1 (or none at all), prompt and output tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.sampled_from([1, 2, 5, 20, 60]))
    longest = draw(st.sampled_from([4, 100, 900]))
    prompts = rng.integers(1, longest + 1, count)
    outputs = rng.integers(1, draw(st.sampled_from([1, 3, 20, 150])) + 1, count)
    if draw(st.booleans()):
        prompts[:], outputs[:] = prompts[0], outputs[0]
    return rng.exponential(1.0, count), prompts, outputs


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, Overlap, SchedulerConfig, float, int]:
    """A cut, its overlap, a scheduler, how short of KV blocks it is (0: just the longest request fits) and replicas."""
    policies: list[Policy] = ["chunked", "chunked", "prefill-first", "orca", "static", "layered", "layered"]
    policy = draw(st.sampled_from(policies))
    whole = [cut for cut, (_, _, mapping, _) in enumerate(CUTS) if mapping.pp == mapping.attention_dp == 1]
    cut = draw(st.sampled_from(whole) if policy == "layered" else st.integers(0, len(CUTS) - 1))
    overlap: Overlap = draw(st.sampled_from(["none", "none", "fused-norm", "two-way"]))
    budget = draw(st.sampled_from([64, 128, 500, MAX_TOKENS])) if policy == "chunked" else MAX_TOKENS
    order: Order = draw(st.sampled_from(["fcfs", *ORDERS])) if policy != "static" else "fcfs"
    config = SchedulerConfig(
        policy,
        draw(st.sampled_from([1, 2, 7, 16, 64])),
        budget,
        draw(st.sampled_from([1, 16])),
        1100,
        chunk_tokens=draw(st.sampled_from([None, 1, 50])) if policy == "chunked" else None,
        group_tokens=draw(st.sampled_from([1, 20, 512])),
        order=order,
        ageing_tokens_per_s=draw(st.sampled_from([0.0, 1000.0])),
        targets_s=(0.1, 2.0),
    )
    return cut, overlap, config, draw(st.sampled_from([0.0, 0.05, 1.0])), draw(st.integers(1, 3))


METRICS = ("ttft", "tpot", "e2e")
STATISTICS = ("mean", "p50", "p90", "p99", "max")


@settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    plans(),
    traffic(),
    st.sampled_from([0.0, 0.05, 0.5, 0.9, 2.0]),
    st.sampled_from(sorted(ROUTERS)),
    st.lists(st.tuples(st.sampled_from(METRICS), st.sampled_from(STATISTICS)), max_size=3),
)
def test_no_simulation_beats_the_bounds(
    plan: tuple[int, Overlap, SchedulerConfig, float, int],
    arriving: tuple[np.ndarray, np.ndarray, np.ndarray],
    load: float,
    router: str,
    kinds: Sequence[tuple[str, str]],
) -> None:
    cut, overlap, config, roomy, replicas = plan
    gaps, prompts, outputs = arriving
    model_name, hardware, mapping, _ = CUTS[cut]
    model = compiled(cut, overlap)
    longest = config.max_context_tokens if config.policy == "static" else int((prompts + outputs).max())
    blocks = -(-longest // config.block_tokens) + int(roomy * 20_000 / config.block_tokens)
    count = len(prompts)
    classes = np.arange(count) % 3
    everything = Requests(np.zeros(count), prompts, outputs, slo_class=classes, class_names=("a", "b", "c"))

    def work_s(limits: Sequence[Limit]) -> float:
        found = Screen(everything, limits).work_s(
            model,
            mapping.attention_dp,
            np.array([float(config.max_seqs)]),
            np.array([config.token_budget]),
            np.array([float(blocks * config.block_tokens)]),
            np.array([prompt_tokens_per_step(config)]),
        )
        return float(found[0])

    bare_s = work_s(())
    arrival = np.cumsum(gaps) * bare_s / count / replicas / load if load else np.zeros(count)
    device = catalogue(model_name, hardware).cluster.device
    spec = ReplicaSpec(model, mapping, config, blocks, device)
    deployment = Deployment([spec] * replicas, ROUTERS[router], model.engine.request_overhead_s)
    log = run(deployment, replace(everything, arrival_s=arrival))
    finish = np.array(log.finish_s)
    assert np.isfinite(finish).all()
    span_s = float(finish.max() - arrival.min())
    assert count / span_s <= replicas * count / bare_s * (1 + 1e-9)

    # The tightest limits the run keeps are those it just reaches.
    times = latencies(arrival, log.first_token_s, finish, outputs)
    wanted = [Limit(metric, statistic, 1e6) for metric, statistic in kinds]
    reached = attainment(*times, wanted).values_s
    limits = [replace(limit, seconds=value) for limit, value in zip(wanted, reached, strict=True) if np.isfinite(value)]
    floors = Screen(everything, limits).latency_s(
        model, mapping.attention_dp, np.array([prompt_tokens_per_step(config)])
    )
    for limit in limits:
        assert floors[limit][0] <= limit.seconds * (1 + 1e-9), limit
    assert span_s >= work_s(limits) / replicas * (1 - 1e-9)


@pytest.mark.parametrize("cut", range(len(CUTS)))
def test_coefficients_are_below_every_step(cut: int) -> None:
    """One step of any batch takes at least what the bound adds up for it, in every stage."""
    mapping = CUTS[cut][2]
    groups = mapping.attention_dp
    model = compiled(cut)
    reach = 1100.0
    rng = np.random.default_rng(cut)
    for stage in {0, len(model.stages) - 1}:
        bound = stage_bound(model.stages[stage], model, groups, reach, overhead=stage == 0)
        for _ in range(400):
            batches = []
            for _ in range(groups):
                sequences = int(rng.integers(0, MAX_SEQS - 1)) * int(rng.random() < 0.7)
                context = sum(int(c) for c in rng.integers(2, rng.choice([3, 200, 1101]), sequences))
                chunks = [
                    (int(new), int(rng.integers(0, 200)) * int(rng.random() < 0.5))
                    for new in rng.integers(1, rng.choice([2, 100, 600]), int(rng.integers(0, 3)))
                ]
                batches.append((sequences, context, chunks))
            tokens = [n + sum(new for new, _ in chunks) for n, _, chunks in batches]
            if not sum(tokens):
                continue
            takes_s = model.lockstep_stages_s(batches)[stage]
            mean = sum(tokens) / groups
            low = int(mean)
            part = bound.hull[low] + (mean - low) * (bound.hull[low + 1] - bound.hull[low])
            contexts = sum(context for _, context, _ in batches) / groups
            decoding = sum(1 for n, _, _ in batches if n) / groups
            pairs = sum(new * before + new * (new + 1) / 2 for _, _, chunks in batches for new, before in chunks)
            sampled = sum(n + len(chunks) for n, _, chunks in batches) / groups
            least_s = part + bound.zeta * contexts + bound.delta * decoding + bound.eta * sampled
            least_s += bound.kappa[max(tokens)] * pairs / groups
            assert least_s <= takes_s * (1 + 1e-9)


@pytest.mark.parametrize("cut", range(len(CUTS)))
def test_coefficients_are_convex_and_not_trivial(cut: int) -> None:
    bound = stage_bound(compiled(cut).stages[0], compiled(cut), CUTS[cut][2].attention_dp, 1100.0, overhead=True)
    assert np.all(np.diff(bound.hull, 2) >= -1e-9 * bound.hull[1:-1])
    assert np.all(np.diff(bound.decode, 2) >= -1e-9 * bound.decode[1:-1])
    assert bound.hull[1] > 1e-4
    assert bound.zeta > 0
    assert np.all(bound.best[1:] <= np.arange(1, len(bound.best)))
    assert bound.best[512] > 64


def test_bounds_are_near_what_a_crowded_replica_reaches() -> None:
    """An overloaded replica with long outputs comes within 15 % of the bound: it prunes."""
    model = compiled(0)
    count = 300
    requests = Requests(np.zeros(count), np.full(count, 200), np.full(count, 300))
    config = SchedulerConfig("chunked", MAX_SEQS, 512, 16, 1100)
    blocks = 50_000
    spec = ReplicaSpec(model, Mapping(), config, blocks, catalogue("llama-3.2-1b", "l4").cluster.device)
    span_s = max(run(Deployment([spec]), requests).finish_s)
    least_s = Screen(requests, ()).work_s(model, 1, np.array([64.0]), np.array([512]), np.array([16.0 * blocks]))[0]
    assert 0.85 * span_s < least_s <= span_s


def test_a_lone_request_reaches_the_floors() -> None:
    """On an empty machine the TTFT floor is the prefill step and the TPOT floor a decode step at a short context."""
    model = compiled(0)
    requests = Requests(np.zeros(1), np.array([128]), np.array([2]))
    limits = [Limit("ttft", "max", 1.0), Limit("tpot", "max", 1.0)]
    floors = Screen(requests, limits).latency_s(model, 1, np.array([2048]))
    way_s = model.engine.request_overhead_s
    assert floors[limits[0]][0] == pytest.approx(way_s + model.step_s(0, 0, [(128, 0)]), rel=0.05)
    assert floors[limits[1]][0] == pytest.approx(model.step_s(1, 129, []), rel=0.05)


def test_demand_by_hand() -> None:
    """Prompts 3 and 1, outputs 2 and 1: the first decodes one token that attends to four."""
    found = demand(Requests(np.zeros(2), np.array([3, 1]), np.array([2, 1])))
    assert (found.requests, found.tokens, found.decode_tokens) == (2, 5.0, 1.0)
    assert (found.context_tokens, found.pairs) == (4.0, 5.0)


@given(st.lists(st.floats(0, 1e3), min_size=4, max_size=40))
def test_lower_hull_is_the_largest_convex_sequence_below(values: list[float]) -> None:
    column = np.array(values)
    points = list(range(1, len(column)))
    hull = lower_hull(column, points)[1:]
    assert np.all(hull <= column[1:] + 1e-9)
    assert np.all(np.diff(hull, 2) >= -1e-6)
    for i in points:  # by definition: the least chord over i
        chords = [
            column[a] + (column[b] - column[a]) * (i - a) / (b - a) if b > a else column[i]
            for a in range(1, i + 1)
            for b in range(i, len(column))
        ]
        assert hull[i - 1] == pytest.approx(min(chords), abs=1e-6)


def test_small_chunks_raise_the_bounds() -> None:
    """A prompt of 1000 tokens in chunks of 50 takes twenty steps; the floor of its TTFT knows, and so does the work."""
    model, limit = compiled(0), Limit("ttft", "max", 1.0)
    requests = Requests(np.arange(50.0), np.full(50, 1000), np.full(50, 20))
    screen, budget = Screen(requests, [limit]), np.array([2048, 2048])
    chunks = np.array([2048, 50])
    whole, cut = screen.latency_s(model, 1, chunks)[limit]
    spec = ReplicaSpec(
        model, Mapping(), SchedulerConfig("chunked", 64, 2048, 16, 1100, chunk_tokens=50), 9000,
        catalogue("llama-3.2-1b", "l4").cluster.device,
    )  # fmt: skip
    log = run(Deployment([spec], ROUTERS["round-robin"], model.engine.request_overhead_s), requests)
    took = log.first_token_s[0] - log.arrival_s[0]
    assert 1.5 * whole < cut <= took < 1.3 * cut
    seqs, kv = np.full(2, 64.0), np.full(2, 1e6)
    least = screen.work_s(model, 1, seqs, budget, kv, chunks)
    assert least[1] > least[0] == screen.work_s(model, 1, seqs, budget, kv)[0]
