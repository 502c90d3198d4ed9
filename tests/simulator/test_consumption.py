"""FLOPs, bytes, joules and KV use of whole runs, for one replica, several, pipelines and attention groups."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from planner.catalogue import Catalogue, open_catalogue
from planner.plan import Plan, Pool
from simulator.metrics import summarize
from simulator.result import Result
from simulator.simulate import simulate
from simulator.workload import Requests

GPUS = 4
SCHEDULE: dict[str, Any] = {"max_seqs": 64, "token_budget": 1024, "max_context_tokens": 2048}


@pytest.fixture(scope="module")
def dense() -> Catalogue:
    return open_catalogue("llama-3.2-1b", "h100-sxm", GPUS, "vllm")


@pytest.fixture(scope="module")
def experts() -> Catalogue:
    return open_catalogue("mixtral-8x7b", "h100-sxm", GPUS, "vllm")


def chat(gap_s: float = 0.01) -> Requests:
    rng = np.random.default_rng(0)
    return Requests(np.cumsum(rng.exponential(gap_s, 80)), rng.integers(1, 900, 80), rng.integers(1, 100, 80))


def served(catalogue: Catalogue, requests: Requests, *pools: Pool) -> Result:
    plan = Plan(catalogue.model.name, "h100-sxm", GPUS, pools, "vllm", "round-robin")
    return simulate(catalogue.deployment(plan, with_work=True), requests, seed=0)


CUTS = [
    (Pool(1, **SCHEDULE),),
    (Pool(3, **SCHEDULE),),
    (Pool(1, pp=4, **SCHEDULE),),
    (Pool(1, tp=2, **SCHEDULE), Pool(2, share=1.0, **SCHEDULE)),
]


def test_flops_depend_on_the_requests_and_not_on_the_cut(dense: Catalogue, experts: Catalogue) -> None:
    """Steps of several chunks are priced as equal ones, and tables are linear between sizes: to 0.5 %."""
    flops = [served(dense, chat(), *pools).totals.model_flops for pools in CUTS]
    assert flops == pytest.approx([flops[0]] * len(flops), rel=5e-3)
    groups = Pool(1, attention_dp=4, ep=4, **SCHEDULE)
    sharded, spread = (
        served(experts, chat(), pool).totals.model_flops for pool in (Pool(1, tp=4, expert_tp=4, **SCHEDULE), groups)
    )
    assert spread == pytest.approx(sharded, rel=5e-3)


@pytest.mark.parametrize("pools", CUTS, ids=str)
def test_power_lies_between_idle_and_peak_and_shares_below_one(dense: Catalogue, pools: tuple[Pool, ...]) -> None:
    result = served(dense, chat(), *pools)
    totals, device = result.totals, dense.cluster.device
    metrics = summarize(result)
    assert 0 < metrics.mfu < 1
    assert 0 < metrics.mbu < 1
    assert 0 < metrics.kv_use_mean <= metrics.kv_use_max <= 1
    used = sum(pool.replicas * pool.gpus_per_replica for pool in pools)
    idle_j = totals.gpus * device.idle_w * totals.makespan_s
    assert idle_j < totals.energy_j < idle_j + used * (device.tdp_w - device.idle_w) * totals.makespan_s


def test_a_replica_without_requests_draws_idle_power(dense: Catalogue) -> None:
    """One request: the second replica never runs, and devices without a replica are not counted."""
    one = Requests(np.zeros(1), np.array([500]), np.array([50]))
    alone, pair = (served(dense, one, Pool(count, **SCHEDULE)).totals for count in (1, 2))
    assert (alone.gpus, alone.lanes, pair.lanes) == (1, (1,), (1, 1))
    idle_j = dense.cluster.device.idle_w * pair.makespan_s
    assert pair.energy_j == pytest.approx(alone.energy_j + idle_j)
    assert pair.model_flops == pytest.approx(alone.model_flops)
    assert pair.peak_flops_per_s == pytest.approx(2 * alone.peak_flops_per_s)


def test_kv_use_holds_each_replica_against_its_own_pool(dense: Catalogue) -> None:
    large, small = Pool(1, tp=2, share=0.001, **SCHEDULE), Pool(1, share=1.0, **SCHEDULE)
    result = served(dense, chat(), large, small)
    assert set(result.requests.replica) == {1}
    metrics, steps, pools = summarize(result), result.steps, result.totals.kv_blocks
    assert steps is not None
    assert pools[0] > pools[1]
    assert metrics.kv_use_max == pytest.approx(steps.kv_blocks.max() / pools[1])
    held = float((steps.kv_blocks * (steps.end_s - steps.start_s)).sum())
    assert metrics.kv_use_mean == pytest.approx(held / result.totals.makespan_s / sum(pools))


def test_what_a_run_used_is_unknown_unless_it_was_recorded(dense: Catalogue) -> None:
    plan = Plan(dense.model.name, "h100-sxm", GPUS, (Pool(1, **SCHEDULE),), "vllm", "round-robin")
    totals = simulate(dense.deployment(plan, with_work=True), chat(), seed=0, record=False).totals
    assert all(math.isnan(value) for value in (totals.model_flops, totals.hbm_bytes, totals.energy_j))
