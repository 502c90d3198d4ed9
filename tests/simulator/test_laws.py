"""What holds in every run: nothing is lost, nobody works before there is work or rests while there is some."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.hardware import load_cluster, load_device
from hwmodels.huggingface import load_model
from hwmodels.layergroups import LayerGroups
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import Pieces, StepModel, Tables, compile_step_model
from simulator.deployment import AnyReplica, Deployment, ReplicaSpec
from simulator.log import Log
from simulator.orders import ORDERS
from simulator.result import Result
from simulator.routers import ROUTERS
from simulator.scheduler import SchedulerConfig
from simulator.simulate import run, simulate
from simulator.workload import Requests, Workload

MAX_TOKENS, MAX_SEQS = 256, 16
DEVICE = load_device("h100-sxm")
ENGINE = Engine("test", "test", {"default": "vllm"}, 1e-3, 1e-5, 0.0, 1.0, 0.0, 0.9, 0.0)
MAPPINGS = (Mapping(), Mapping(pp=3), Mapping(attention_dp=2, ep=2), Mapping(attention_dp=2, ep=2, pp=2))
NAMES = ["one", "pipeline", "lockstep", "staged lockstep"]
POLICIES = ("chunked", "prefill-first", "orca", "static")
CHECKED = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def tables(share: float = 1.0) -> Tables:
    """Linear in tokens, in sequences and in what they attend to; prompts cost a share of it."""
    n, s = np.arange(MAX_TOKENS + 1.0), np.arange(MAX_SEQS + 1.0)
    return Tables(
        linear=(share * (2e-3 + 1e-5 * n)).tolist(),
        shared=(1e-5 * np.arange(4 * MAX_TOKENS + 1)).tolist(),
        head=(1e-5 * s).tolist(),
        decode=Pieces((), ((1e-5 * (s > 0)).tolist(),), ((1e-7 * s).tolist(),)),
        prefill=Pieces((), ((share * 1e-6 * n).tolist(),), ((share * 1e-8 * n).tolist(),)),
    )


def spec(mapping: Mapping, config: SchedulerConfig, blocks: int) -> ReplicaSpec:
    transfer = (1e-4 + 1e-7 * np.arange(MAX_TOKENS + 1)).tolist()
    layers = LayerGroups(["first", "second"], lambda _: tables(0.5), tables(0.0))  # type: ignore[list-item]
    model = StepModel([tables()] * mapping.pp, transfer, ENGINE, MAX_TOKENS, MAX_SEQS, lambda: layers)
    return ReplicaSpec(model, mapping, config, blocks, DEVICE)


@dataclass
class Watched:
    """A replica specification that remembers the replicas started from it."""

    spec: ReplicaSpec
    share: float = 1.0
    role: str = "aggregated"
    started: list[AnyReplica] = field(default_factory=list)

    def start(self, prompts: list[int], outputs: list[int], log: Log, index: int) -> AnyReplica:
        self.started.append(self.spec.start(prompts, outputs, log, index))
        return self.started[-1]


@st.composite
def traffic(draw: st.DrawFn, longest: int = 120) -> Requests:
    count = draw(st.integers(1, 50))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gap_s = draw(st.sampled_from([0.0, 2e-3, 2e-2, 0.2]))
    arrival_s = np.cumsum(rng.exponential(gap_s, count)) if gap_s else np.zeros(count)
    outputs = rng.integers(1, draw(st.sampled_from([2, 30, longest])) + 1, count)
    prompts, classes = rng.integers(1, longest + 1, count), rng.integers(0, 2, count)
    return Requests(arrival_s, prompts, outputs, classes, ("urgent", "patient"))


@st.composite
def replicas(draw: st.DrawFn, mappings: tuple[Mapping, ...] = MAPPINGS) -> ReplicaSpec:
    """Small token budgets, few blocks, contexts some requests exceed: every limit is met."""
    mapping = draw(st.sampled_from(mappings))
    policy = draw(st.sampled_from((*POLICIES, "layered") if mapping == Mapping() else POLICIES))
    budget = draw(st.sampled_from([40, MAX_TOKENS]))
    config = SchedulerConfig(
        policy,
        max_seqs=draw(st.sampled_from([1, 3, MAX_SEQS])),
        token_budget=budget,
        block_tokens=draw(st.sampled_from([1, 16])),
        max_context_tokens=draw(st.sampled_from([100, 240])),
        chunk_tokens=draw(st.sampled_from([None, 7, budget])) if policy == "chunked" else None,
        group_tokens=draw(st.sampled_from([16, 64])),
        max_groups=2,
        order="fcfs" if policy == "static" else draw(st.sampled_from(ORDERS)),
        ageing_tokens_per_s=draw(st.sampled_from([0.0, 100.0])),
        targets_s=(0.1, 1.0),
    )
    blocks = draw(st.sampled_from([320, 800, 40_000])) // config.block_tokens
    return spec(mapping, config, blocks)


@CHECKED
@given(
    replicas(), traffic(), st.integers(1, 3), st.sampled_from(sorted(ROUTERS)), st.one_of(st.none(), st.integers(1, 9))
)
def test_requests_and_blocks_are_conserved(
    one: ReplicaSpec, requests: Requests, copies: int, router: str, concurrency: int | None
) -> None:
    """Offered = finished + rejected; queues end empty and all KV blocks free; each request's times are in order."""
    watched = [Watched(one) for _ in range(copies)]
    log = run(Deployment(watched, ROUTERS[router]), Workload(requests, concurrency=concurrency))  # type: ignore[arg-type]
    schedule, first, finish = (np.array(t) for t in (log.first_schedule_s, log.first_token_s, log.finish_s))
    served = np.isfinite(finish)
    rejected = np.zeros(len(requests), dtype=bool)
    rejected[log.rejected] = True
    assert len(set(log.rejected)) == len(log.rejected)
    assert (served ^ rejected).all()
    assert np.isnan(schedule[rejected]).all() and np.isnan(first[rejected]).all()
    assert (log.arrival_s[served] <= schedule[served] + 1e-12).all()
    assert (schedule[served] < first[served]).all()
    assert (first[served] <= finish[served]).all()
    assert (first[served & (requests.output_tokens == 1)] == finish[served & (requests.output_tokens == 1)]).all()
    for each in watched:
        for scheduler in each.started[0].schedulers:
            assert scheduler.free == scheduler.kv_blocks
            assert scheduler.reserved == 0
            assert scheduler.peak_blocks >= 0
            assert scheduler.peak_seqs <= one.scheduler.max_seqs
            assert (scheduler.running, scheduler.unfinished, len(scheduler.waiting)) == (0, 0, 0)
            assert not scheduler.waiting


@CHECKED
@given(replicas(), traffic())
def test_same_arguments_same_result(one: ReplicaSpec, requests: Requests) -> None:
    deployment = Deployment([one, one], ROUTERS["power-of-two"])
    first, second = (simulate(deployment, requests, seed=3) for _ in range(2))
    for name in ("requests", "steps", "spans"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name), check_exact=True)


@CHECKED
@given(replicas((Mapping(),)), traffic())
def test_work_is_conserved(one: ReplicaSpec, requests: Requests) -> None:
    """Steps do not overlap, and the replica rests only from when it is empty until the next accepted arrival."""
    result = simulate(Deployment([one]), requests)
    served = result.requests[~result.requests.rejected]
    assert result.steps is not None
    start, end = result.steps.start_s.to_numpy(), result.steps.end_s.to_numpy()
    if not len(start):
        return
    assert start[0] == pytest.approx(served.arrival_s.min(), abs=1e-12)
    for before, after in zip(end[:-1], start[1:], strict=True):
        assert after >= before - 1e-9
        if after > before + 1e-9:
            assert ((served.finish_s <= before + 1e-9) | (served.arrival_s >= after - 1e-9)).all()


@CHECKED
@given(replicas(), traffic(), st.integers(1, 6), st.sampled_from([0.0, 0.05]))
def test_closed_loop_never_exceeds_its_concurrency(
    one: ReplicaSpec, requests: Requests, concurrency: int, think_s: float
) -> None:
    workload = Workload(requests, concurrency=concurrency, think_s=think_s)
    frame = simulate(Deployment([one]), workload, record=False).requests
    served = frame[~frame.rejected]
    times = np.concatenate([served.finish_s, served.arrival_s])
    change = np.repeat([-1, 1], len(served))  # of equal times, the finish comes first: it lets the next one in
    inside = np.cumsum(change[np.argsort(times, kind="stable")])
    assert not len(inside) or inside.max() <= concurrency
    assert (served.ttft_s > 0).all()


@CHECKED
@given(replicas((Mapping(),)), traffic(), st.integers(0, 2**32 - 1))
def test_policies_do_not_know_output_lengths(one: ReplicaSpec, requests: Requests, seed: int) -> None:
    """Until the first request whose output differs would end, all decisions are those of the run with other outputs."""
    longest = one.scheduler.max_context_tokens - int(requests.prompt_tokens.max())
    assume(longest > 1)
    rng = np.random.default_rng(seed)
    ours = np.minimum(requests.output_tokens, longest)
    changed = rng.random(len(ours)) < 0.5
    theirs = np.where(changed, rng.permutation(ours), ours)
    runs = [run(Deployment([one]), replace(requests, output_tokens=outputs)) for outputs in (ours, theirs)]
    assume(not runs[0].rejected and not runs[1].rejected)
    differs = ours != theirs
    finish = np.minimum(*(np.array(log.finish_s) for log in runs))
    until_s = finish[differs].min(initial=np.inf)
    for name in ("first_schedule_s", "first_token_s"):
        times = np.array([getattr(log, name) for log in runs])
        early = times.min(axis=0) < until_s - 1e-9
        np.testing.assert_allclose(times[0][early], times[1][early], rtol=1e-9, atol=1e-12, err_msg=name)


def tokens_emitted(result: Result) -> int:
    """Tokens of all decode steps, and one for every prompt completed, recomputed ones included."""
    assert result.steps is not None and result.spans is not None
    served = result.requests[~result.requests.rejected]
    decoded = int((result.steps.steps * result.steps.decode_sequences).sum())
    interrupted = result.spans.request.nunique()
    return decoded + len(served) - interrupted + len(result.spans)


@CHECKED
@given(replicas((Mapping(),)), traffic())
def test_tokens_are_conserved(one: ReplicaSpec, requests: Requests) -> None:
    """Every token asked for is emitted once, whatever was preempted on the way; prompts are computed at least once."""
    assume(one.scheduler.policy != "static")  # whose finished rows run on as padding
    result = simulate(Deployment([one]), requests)
    served = result.requests[~result.requests.rejected]
    assert tokens_emitted(result) == served.output_tokens.sum()
    assert result.steps is not None
    computed = result.steps.prefill_tokens.sum()
    assert computed >= served.prompt_tokens.sum()
    if not served.preemptions.any():
        assert computed == served.prompt_tokens.sum()


@pytest.mark.parametrize("policy", ["chunked", "prefill-first", "orca"])
@pytest.mark.parametrize("mapping", MAPPINGS, ids=NAMES)
def test_preempted_requests_finish_with_all_tokens(policy: str, mapping: Mapping) -> None:
    """Contexts that outgrow the blocks: their spans add up to their outputs."""
    count = 12
    requests = Requests(np.zeros(count), np.full(count, 30), np.full(count, 100))
    config = SchedulerConfig(policy, max_seqs=8, token_budget=MAX_TOKENS, block_tokens=4, max_context_tokens=240)  # type: ignore[arg-type]
    result = simulate(Deployment([spec(mapping, config, 40)]), requests)
    frame = result.requests
    assert frame.finish_s.notna().all()
    assert frame.preemptions.sum() > 0
    assert result.spans is not None
    tokens = result.spans.groupby("request").tokens.sum()
    assert (frame.set_index("request").output_tokens[tokens.index] == tokens).all()
    assert set(tokens.index) <= set(frame.request[frame.preemptions > 0])
    resumed = result.spans.sort_values("first_token_s").groupby("request").first_token_s.first()
    np.testing.assert_allclose(resumed, frame.set_index("request").first_token_s[resumed.index])


@pytest.mark.parametrize("mapping", MAPPINGS, ids=NAMES)
@pytest.mark.parametrize("concurrency", [None, 2])
def test_what_never_fits_is_rejected_and_holds_up_nobody(mapping: Mapping, concurrency: int | None) -> None:
    """Too long a context, and more KV than there is: counted, with no times."""
    prompts, outputs = np.array([10, 500, 10, 200, 10]), np.array([5, 5, 900, 60, 5])
    config = SchedulerConfig(max_seqs=4, token_budget=64, max_context_tokens=300)
    requests = Requests(np.arange(5.0), prompts, outputs)
    frame = simulate(
        Deployment([spec(mapping, config, 10)]), Workload(requests, concurrency=concurrency), record=False
    ).requests
    assert frame.rejected.tolist() == [False, True, True, True, False]
    assert frame.finish_s.isna().tolist() == frame.rejected.tolist()
    everything = Requests(np.zeros(3), np.full(3, 500), np.ones(3, dtype=int))
    none = simulate(Deployment([spec(mapping, config, 10)]), Workload(everything, concurrency=concurrency))
    assert none.requests.rejected.all()
    assert none.totals.makespan_s == 0.0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mapping", MAPPINGS, ids=NAMES)
def test_more_traffic_is_not_served_sooner(policy: str, mapping: Mapping) -> None:
    """The same requests at rising rates: mean TTFT does not fall (1 % of slack for luck with step boundaries)."""
    rng = np.random.default_rng(12)
    count = 1500
    requests = Requests(np.cumsum(rng.exponential(1.0, count)), rng.integers(1, 100, count), rng.integers(1, 60, count))
    config = SchedulerConfig(policy, MAX_SEQS, MAX_TOKENS, 16, 240)  # type: ignore[arg-type]
    deployment = Deployment([spec(mapping, config, 4000)])
    ttft_s = []
    for rate_per_s in 2.0 ** np.arange(0, 9):
        log = run(deployment, requests.scaled_to_rate(rate_per_s))
        ttft_s.append(np.mean(np.array(log.first_token_s) - log.arrival_s))
    assert all(later >= 0.99 * sooner for sooner, later in pairwise(ttft_s)), ttft_s
    assert ttft_s[-1] > 2 * ttft_s[0]


@pytest.mark.parametrize("concurrency", [None, 24])
@pytest.mark.parametrize("faster", ["memory", "arithmetic", "all"])
def test_a_faster_device_does_not_finish_later(faster: str, concurrency: int | None) -> None:
    """Mean finish time under the same requests, Llama-3.2-1B on one device of rising speed."""
    rng = np.random.default_rng(13)
    count = 300
    requests = Requests(
        np.cumsum(rng.exponential(0.02, count)), rng.integers(1, 2000, count), rng.integers(1, 200, count)
    )
    shape, cluster = load_model("llama-3.2-1b"), load_cluster("a100-80-sxm", 1)
    config = SchedulerConfig(max_seqs=32, token_budget=512)
    finish_s = []
    for factor in (0.5, 1.0, 1.5, 3.0):
        device = cluster.device
        if faster != "arithmetic":
            device = replace(device, memory_bytes_per_s=factor * device.memory_bytes_per_s)
        if faster != "memory":
            peaks = {dtype: factor * peak for dtype, peak in device.peak_flops_per_s.items()}
            device = replace(device, peak_flops_per_s=peaks)
        cost = AnalyticCost(replace(cluster, device=device), Mapping())
        model = compile_step_model(shape, Mapping(), Precision(), ENGINE, cost, max_tokens=512, max_seqs=32)
        deployment = Deployment([ReplicaSpec(model, Mapping(), config, 40_000, device)])
        log = run(deployment, Workload(requests, concurrency=concurrency))
        finish_s.append(np.mean(np.array(log.finish_s)))
    assert all(later <= 1.0001 * sooner for sooner, later in pairwise(finish_s)), finish_s
    assert finish_s[-1] < finish_s[0]


@given(frontend_s=st.floats(0, 0.5), concurrency=st.sampled_from([None, 3]))
@settings(max_examples=20)
def test_the_way_to_the_scheduler_and_back_adds_to_latencies_and_keeps_clients_waiting(frontend_s, concurrency):
    """Open loop: the same run, every first token later by it. Closed loop: every cycle longer by it."""
    arrivals = np.arange(12) * 0.05
    requests = Requests(arrivals, np.full(12, 40), np.full(12, 6))
    near = Deployment([spec(Mapping(), SchedulerConfig("chunked", 8, 256, 16, 1024), 100)])
    far = replace(near, frontend_s=frontend_s)
    load = Workload(requests, concurrency)
    before, after = (simulate(d, load).requests for d in (near, far))
    if concurrency is None:
        assert np.allclose(after.ttft_s, before.ttft_s + frontend_s, atol=1e-12)
        assert np.array_equal(after.arrival_s, arrivals)
    else:
        assert after.finish_s.max() >= before.finish_s.max() + 4 * frontend_s - 1e-9
        assert (after.ttft_s >= frontend_s).all()
        assert after.arrival_s.min() == pytest.approx(0, abs=1e-12)
