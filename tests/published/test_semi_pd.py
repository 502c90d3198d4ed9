"""semi-PD (arXiv:2504.19867): its two fitted laws come out of the share model, its advantage where there is host work.

Llama-3-8B on an A100, requests about as long as ShareGPT's (lognormal, means of 300 and 200 tokens; an estimate). The
paper's fits, normalised to 1 on the whole device, are TTFT = 0.6809 / (x - load) + 0.022 and TPOT = 0.6284 / y + 0.3818
(R^2 0.995); at x = 1 the first says load = 1 - 0.6809 / 0.978 = 0.304. Its abstract: 1.55 to 1.72 times more requests
within their limits for Llama models.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from hwmodels.engine import Engine, load_engine
from hwmodels.shares import compile_shared_steps
from planner.catalogue import Catalogue, mapping_of, open_catalogue, precision_of
from planner.plan import Pool
from simulator.deployment import Deployment, ReplicaSpec
from simulator.log import Log
from simulator.shared import SharedSpec
from simulator.shares import Policy, SemiPD, Shares, Static
from simulator.simulate import run
from simulator.workload import Independent, Lognormal, Poisson, Requests, draw_requests

POOL = Pool(1, max_seqs=256, token_budget=8192)
IDLE_HOST = Engine("idle host", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 2e9)
SGLANG = load_engine("sglang")
LENGTHS = Independent(Lognormal(mean=300, sigma=1.2, max=8000), Lognormal(mean=200, sigma=0.8, max=2000))
LIMITS = {"ttft_s": 1.0, "tpot_s": 0.025}


@cache
def aggregated(engine: Engine) -> tuple[Catalogue, ReplicaSpec]:
    opened = open_catalogue("llama-3-8b", "a100-80-sxm", 1, "vllm")
    catalogue = Catalogue(opened.model, opened.cluster, engine)
    return catalogue, catalogue.replica(POOL)


@cache
def shared(engine: Engine, policy: Policy, half: float | None = None) -> SharedSpec:
    catalogue, one = aggregated(engine)
    mapping = mapping_of(POOL)
    steps = compile_shared_steps(
        catalogue.model, mapping, precision_of(POOL), engine, catalogue.prices(mapping), catalogue.cluster,
        max_tokens=POOL.token_budget, max_seqs=POOL.max_seqs, half=half,
    )  # fmt: skip
    return SharedSpec(
        model=one.model, mapping=mapping, scheduler=one.scheduler, kv_blocks=one.kv_blocks, device=one.device,
        steps=steps, policy=policy,
    )  # fmt: skip


def requests(count: int, rate_per_s: float) -> Requests:
    return draw_requests(np.random.default_rng(0), count, rate_per_s, Poisson(), LENGTHS)


def latencies(log: Log, some: Requests) -> tuple[np.ndarray, np.ndarray]:
    """TTFT of every request, and TPOT, 0 for answers of one token."""
    first, finish = np.array(log.first_token_s), np.array(log.finish_s)
    return first - some.arrival_s, (finish - first) / np.maximum(some.output_tokens - 1, 1)


def r_squared(values: np.ndarray, fitted: np.ndarray) -> float:
    return float(1 - ((values - fitted) ** 2).sum() / ((values - values.mean()) ** 2).sum())


def law(u: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """R^2, a and b of values = a u + b, both normalised to a + b = 1 of u = 1 on the whole device by the caller."""
    a, b = np.polyfit(u, values, 1)
    return r_squared(values, a * u + b), float(a), float(b)


def test_v27_first_tokens_follow_a_queue_on_the_share() -> None:
    """TTFT = a / (x - load) + b with R^2 > 0.995; a within 15 %, b and the load within 0.08 of the published."""
    some = replace(requests(6000, 10.0), output_tokens=np.ones(6000, dtype=np.int64))
    shares = np.arange(0.4, 1.01, 0.1)
    ttft_s = np.array(
        [
            latencies(run(Deployment([shared(IDLE_HOST, Static(Shares(min(1.0, x), 0.1)))]), some), some)[0].mean()
            for x in shares.tolist()
        ]
    )
    fits = [(*law(1 / (shares - load), ttft_s), load) for load in np.arange(0.0, 0.39, 0.005)]
    fit, a, b, load = max(fits)
    whole = a / (1 - load) + b
    assert fit > 0.995
    assert a / whole == pytest.approx(0.6809, rel=0.15)
    assert b / whole == pytest.approx(0.022, abs=0.08)
    assert load == pytest.approx(0.304, abs=0.08)


@cache
def decode_law(half: float | None) -> tuple[float, float, float]:
    """R^2, a2 and b2 over y = 0.2 to 0.7, prefill with the rest of the units, at 5 requests/s."""
    some = requests(4000, 5.0)
    shares = np.arange(0.2, 0.71, 0.1)
    tpot_s = []
    for y in shares.tolist():
        log = run(Deployment([shared(IDLE_HOST, Static(Shares(1 - y, y)), half)]), some)
        tpot_s.append(latencies(log, some)[1][some.output_tokens > 1].mean())
    fit, a, b = law(1 / shares, np.array(tpot_s))
    return fit, a / (a + b), b / (a + b)


def test_v27_output_tokens_take_a_part_that_shrinks_with_the_share_and_a_part_that_does_not() -> None:
    """TPOT = a / y + b with R^2 > 0.99: a 0.40 where units draw what was measured on an H100, against 0.6284 published.

    Units that draw less (half = 1) give 0.62 and 0.38. Which device, load and kernels the fit is of is not known here.
    """
    fit, a, b = decode_law(None)
    assert fit > 0.99
    assert 0.3 < a < 0.6284
    assert 0.3818 < b < 0.7
    fit, a, b = decode_law(1.0)
    assert fit > 0.99
    assert a == pytest.approx(0.6284, rel=0.1)
    assert b == pytest.approx(0.3818, rel=0.1)


def good(spec: ReplicaSpec, rate_per_s: float) -> float:
    """Part of the requests within both limits."""
    some = requests(3000, rate_per_s)
    ttft_s, tpot_s = latencies(run(Deployment([spec]), some), some)
    return float(((ttft_s <= LIMITS["ttft_s"]) & (tpot_s <= LIMITS["tpot_s"])).mean())


def chunked(engine: Engine, budget: int) -> ReplicaSpec:
    one = aggregated(engine)[1]
    return replace(one, scheduler=replace(one.scheduler, token_budget=budget))


def best_chunked(engine: Engine, rate_per_s: float) -> float:
    return max(good(chunked(engine, budget), rate_per_s) for budget in (512, 2048, 8192))


def test_semi_pd_serves_more_within_limits_where_prompts_cost_host_time() -> None:
    """90 % of the requests within 1 s and 25 ms, host work as in the profile sglang (24.7 ms in steps with prompts).

    Chunked prefill, with the best of three budgets, up to 8.3 requests/s, semi-PD up to 12.7: 1.54 times as many.
    """
    policy = SemiPD(**LIMITS)
    assert best_chunked(SGLANG, 7.8) >= 0.9 > best_chunked(SGLANG, 8.7)
    assert good(shared(SGLANG, policy), 12.2) >= 0.9 > good(shared(SGLANG, policy), 13.6)
    assert 12.2 / 8.7 < (1.55 + 1.72) / 2 < 13.6 / 7.8


def test_without_host_work_sharing_gains_nothing_on_ideal_chunks() -> None:
    """Mixed steps read the weights once for both phases and cost nothing else here: 14.3 against 13.9 requests/s."""
    policy = SemiPD(**LIMITS)
    assert best_chunked(IDLE_HOST, 14.0) >= 0.9
    assert good(shared(IDLE_HOST, policy), 13.3) >= 0.9 > good(shared(IDLE_HOST, policy), 14.8)


def test_semi_pd_moves_units_to_the_phase_that_breaks_its_limit() -> None:
    """From shares under which half of the requests break a limit."""
    bad = Shares(0.3, 1.0)
    assert good(shared(SGLANG, Static(bad)), 12.0) < 0.5
    assert good(shared(SGLANG, SemiPD(**LIMITS, shares=bad)), 12.0) > 0.8
