"""One simulated rate, the highest rate within the limits, and when one run stands for another plan's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from hwmodels.mapping import Mapping, Precision
from hwmodels.overlap import Overlap
from hwmodels.step_model import StepModel
from planner.catalogue import Catalogue, open_catalogue
from planner.plan import Pool
from planner.schedules import DEFAULTS
from planner.scheduling import scheduler_of
from planner.trial import Extremes, attempt, capacity
from simulator.deployment import Deployment, ReplicaSpec
from simulator.errors import TraceError
from simulator.limits import Limit
from simulator.orders import ORDERS
from simulator.policies import Policy
from simulator.routers import ROUTERS
from simulator.simulate import run
from simulator.workload import Requests

MAX_TOKENS, MAX_SEQS = 1024, 64
MAPPINGS = [Mapping(), Mapping(pp=2), Mapping(tp=2, pp=3)]
LAYERED = [Mapping(), Mapping(tp=2)]
GROUPED = [
    Mapping(attention_dp=2, ep=2),
    Mapping(attention_dp=4, expert_tp=4),
    Mapping(attention_dp=2, ep=2, pp=2),
]


@cache
def catalogue(model: str) -> Catalogue:
    found = open_catalogue(model, "h100-sxm", 8, "vllm")
    found.max_tokens, found.max_seqs = MAX_TOKENS, MAX_SEQS
    return found


@cache
def compiled(mapping: Mapping, overlap: Overlap = "none") -> StepModel:
    name = "deepseek-v2-lite" if mapping.attention_dp > 1 else "llama-3.2-1b"
    return catalogue(name).step_model(mapping, Precision(), overlap=overlap)


def deployment(mapping: Mapping, pool: Pool, blocks: int, router: str = "round-robin") -> Deployment:
    device = catalogue("llama-3.2-1b").cluster.device
    spec = ReplicaSpec(compiled(mapping, pool.overlap), mapping, scheduler_of(pool), blocks, device)
    return Deployment([spec] * pool.replicas, ROUTERS[router])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Mapping, Pool, int, Pool, int, Requests, str]:
    """Two schedulers on the same step model, and requests that press them more or less."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.sampled_from([1, 3, 15, 40]))
    gap_s = draw(st.sampled_from([0.0, 1e-3, 1e-2, 0.05]))
    prompts = rng.integers(1, draw(st.sampled_from([4, 60, 400])) + 1, count)
    outputs = rng.integers(1, draw(st.sampled_from([1, 2, 25, 120])) + 1, count)
    arrival = np.cumsum(rng.exponential(gap_s, count)) if gap_s else np.zeros(count)
    requests = Requests(arrival, prompts, outputs, rng.integers(0, 3, count), ("a", "b", "c"))
    policy: Policy = draw(st.sampled_from(["chunked", "prefill-first", "orca", "static", "layered"]))
    orders = (*("fcfs",) * 3, *ORDERS) if policy != "static" else ("fcfs",)
    block = draw(st.sampled_from([1, 8]))

    def pool() -> Pool:
        return Pool(
            replicas=1,
            policy=policy,
            max_seqs=draw(st.sampled_from([1, 2, 4, 8, 16, 64])),
            token_budget=draw(st.sampled_from([64, 128, 600, MAX_TOKENS])),
            block_tokens=block,
            max_context_tokens=draw(st.just(600)),
            chunk_tokens=draw(st.sampled_from([None, None, 8, 60])) if policy == "chunked" else None,
            group_tokens=draw(st.sampled_from([512, 512, 16])),
            order=draw(st.sampled_from(orders)),
            ageing_tokens_per_s=draw(st.sampled_from([0.0, 1000.0])),
            deadlines_s=(0.05, 0.5),
            overlap=draw(st.sampled_from(["none", "none", "two-way"])),
        )

    def blocks() -> int:
        return draw(st.sampled_from([20, 100, 300, 520, 600, 900, 2000, 9000])) * 8 // block

    old, new = pool(), pool()
    old_blocks = blocks()
    if draw(st.booleans()):
        new = replace(new, token_budget=old.token_budget)
    if draw(st.booleans()):
        new = replace(new, max_seqs=old.max_seqs)
    if draw(st.integers(0, 3)):
        new = replace(new, **{name: getattr(old, name) for name in DEFAULTS})
    new_blocks = draw(st.sampled_from([old_blocks, old_blocks - 1, old_blocks // 2, 2 * old_blocks]))
    replicas = draw(st.integers(1, 2))
    mapping = draw(st.sampled_from(LAYERED if policy == "layered" else MAPPINGS + GROUPED))
    router = draw(st.sampled_from(sorted(ROUTERS)))
    old, new = replace(old, replicas=replicas), replace(new, replicas=replicas)
    return mapping, old, old_blocks, new, new_blocks, requests, router


@settings(max_examples=900, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pairs())
def test_a_run_said_to_be_the_same_is_the_same(
    case: tuple[Mapping, Pool, int, Pool, int, Requests, str],
) -> None:
    mapping, old, old_blocks, new, new_blocks, requests, router = case
    first = run(deployment(mapping, old, old_blocks, router), requests)
    same = Extremes.of(first).same_run(old, old_blocks, new, new_blocks)
    event(f"said to be the same: {same}")
    if not same:
        return
    second = run(deployment(mapping, new, new_blocks, router), requests)
    for name in ("first_schedule_s", "first_token_s", "finish_s"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=1e-9, atol=1e-12, err_msg=name)
    assert first.replica == second.replica
    assert first.lane == second.lane
    assert sorted(first.rejected) == sorted(second.rejected)
    assert first.preemptions == second.preemptions


def test_a_run_without_pressure_stands_for_roomier_plans_and_not_for_tighter_ones() -> None:
    pool = Pool(1, max_seqs=16, token_budget=600, max_context_tokens=600)
    requests = Requests(np.arange(20.0) / 20, np.full(20, 100), np.full(20, 30))
    log = run(deployment(Mapping(), pool, 500), requests)
    extremes = Extremes.of(log)
    assert not extremes.limited
    roomier = replace(pool, max_seqs=64, token_budget=1024)
    assert extremes.same_run(pool, 500, roomier, 9000)
    assert not extremes.same_run(pool, 500, replace(pool, token_budget=512), 500)
    assert not extremes.same_run(pool, 500, replace(pool, max_seqs=extremes.peak_seqs - 1), 500)
    assert not extremes.same_run(pool, 500, pool, extremes.peak_blocks - 1)
    for fields in ({"chunk_tokens": 64}, {"order": "shortest"}, {"group_tokens": 64}, {"overlap": "two-way"}):
        assert not extremes.same_run(pool, 500, replace(pool, **fields), 500)


EVEN = Requests(np.arange(200.0), np.full(200, 200), np.full(200, 40))
POOL = Pool(1, max_seqs=16, token_budget=512, max_context_tokens=600)


@pytest.mark.parametrize("statistic", ["mean", "p99", "max"])
@pytest.mark.parametrize("guess_per_s", [0.5, 12.0, 1000.0])
@pytest.mark.parametrize("tolerance", [0.2, 0.02])
def test_capacity_brackets_the_highest_rate_within_the_limits(
    statistic: str, guess_per_s: float, tolerance: float
) -> None:
    """Equal requests at equal gaps: latency grows with the rate, so there is one highest rate."""
    limits = (Limit("ttft", statistic, 0.1), Limit("tpot", statistic, 0.004))
    target = deployment(Mapping(), POOL, 2000)
    best, trials = capacity(target, EVEN, limits, 0, at_most_per_s=2000.0, guess_per_s=guess_per_s, tolerance=tolerance)
    assert best is not None
    assert best.meets
    assert best in trials
    highest = max(trial.rate_per_s for trial in trials if trial.meets)
    assert attempt(target, EVEN, highest, limits, 0).meets
    assert not attempt(target, EVEN, highest * (1 + 1.01 * tolerance), limits, 0).meets
    assert best.goodput_per_s == max(trial.goodput_per_s for trial in trials if trial.meets)


def test_capacity_never_goes_past_what_is_possible_at_most() -> None:
    target = deployment(Mapping(), POOL, 2000)
    best, trials = capacity(target, EVEN, (Limit("ttft", "max", 5.0),), 0, at_most_per_s=10.0, guess_per_s=4.0)
    assert best is not None
    assert best.rate_per_s == max(trial.rate_per_s for trial in trials) == 10.0


def test_capacity_to_beat_is_settled_by_one_trial() -> None:
    target = deployment(Mapping(), POOL, 2000)
    found = capacity(target, EVEN, (Limit("ttft", "max", 0.05),), 0, at_most_per_s=1e3, guess_per_s=900.0, beat=True)
    assert found[0] is None
    assert len(found[1]) == 1


def test_capacity_of_limits_that_no_rate_keeps_is_none() -> None:
    target = deployment(Mapping(), POOL, 2000)
    best, trials = capacity(target, EVEN, (Limit("tpot", "max", 1e-6),), 0, at_most_per_s=100.0, guess_per_s=10.0)
    assert best is None
    assert trials
    assert not any(trial.meets for trial in trials)


def test_a_run_stopped_early_is_one_that_breaks_a_limit() -> None:
    """Whatever is stopped would have broken its limit at the end."""
    rng = np.random.default_rng(1)
    requests = Requests(np.cumsum(rng.exponential(1.0, 300)), rng.integers(1, 300, 300), rng.integers(1, 60, 300))
    target = deployment(Mapping(), POOL, 2000)
    kept = broken = 0
    for rate in (2.0, 30.0, 60.0, 100.0, 200.0, 1000.0):
        for limits in ((Limit("ttft", "p90", 0.05),), (Limit("tpot", "p99", 0.0025),), (Limit("e2e", "mean", 0.3),)):
            trial = attempt(target, requests, rate, limits, 0)
            whole = run(target, requests.scaled_to_rate(rate))
            first, finish = np.array(whole.first_token_s), np.array(whole.finish_s)
            arrival, gaps = whole.arrival_s, requests.output_tokens - 1
            values = {"ttft": first - arrival, "e2e": finish - arrival}
            values["tpot"] = ((finish - first)[gaps > 0]) / gaps[gaps > 0]
            (limit,) = limits
            at = values[limit.metric]
            reached = at.mean() if limit.quantile is None else np.quantile(at, limit.quantile)
            assert trial.meets == (reached <= limit.seconds)
            if np.isfinite(trial.values_s[0]):
                assert trial.values_s[0] == pytest.approx(reached)
            kept, broken = kept + trial.meets, broken + (not trial.meets)
    assert kept > 3
    assert broken > 3


def test_a_rejected_request_breaks_the_promise() -> None:
    requests = Requests(np.arange(4.0), np.array([10, 10, 590, 10]), np.array([5, 5, 50, 5]))
    trial = attempt(deployment(Mapping(), POOL, 2000), requests, 1.0, (Limit("ttft", "p50", 5.0),), 0)
    assert not trial.meets
    assert trial.goodput_per_s > 0


@pytest.mark.parametrize("mapping", MAPPINGS + GROUPED)
def test_one_request_and_one_token_answers(mapping: Mapping) -> None:
    limits = (Limit("ttft", "p99", 2.0), Limit("tpot", "p99", 0.05), Limit("e2e", "max", 5.0))
    target = deployment(mapping, POOL, 2000)
    one = attempt(target, Requests(np.zeros(1), np.array([64]), np.array([8])), 3.0, limits, 0)
    assert one.meets
    assert one.goodput_per_s == pytest.approx(1 / one.mean_e2e_s)
    short = attempt(target, Requests(np.arange(30.0), np.full(30, 64), np.ones(30, int)), 3.0, limits, 0)
    assert short.meets
    assert short.mean_tpot_s == 0.0


def test_requests_that_come_all_at_once_have_no_rate_to_stretch() -> None:
    with pytest.raises(TraceError, match="all 5 requests arrive at once"):
        attempt(deployment(Mapping(), POOL, 2000), Requests(np.zeros(5), np.full(5, 9), np.full(5, 9)), 1.0, (), 0)
