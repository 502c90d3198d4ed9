"""HybriMoE (arXiv:2504.05897): 1.33 times faster prompts, 1.70 times faster decoding than hybrid systems before it.

With the constants of its public code, in ms: an expert takes coefficient x tokens + 0.79 on the CPU (1 for DeepSeek,
0.2 Mixtral, 0.8 Qwen2), 0.5 on the GPU whatever its tokens, 0.418 over the bus. Assumed: 1 ms for the rest of a layer,
popularity a power law of exponent 0.3, noise of the routing correlated by 0.5 from token to token, predictions 90, 80
and 70 % right one to three layers ahead. The published figures are means over models, caches and lengths.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from hwmodels.expertoffload import ExpertCosts
from simulator.expertrouting import SampledRouting, power_law
from simulator.expertsharing import Work, ends_s, hybrid
from simulator.offloadedsteps import Offloaded, simulate_offload
from simulator.offloadplan import OffloadPlan, Prefetch

#: (layers with experts, experts, experts of a token, ms per token on the CPU).
MODELS = {"deepseek-v2-lite": (26, 64, 6, 1.0), "mixtral": (32, 8, 2, 0.2), "qwen2-57b": (28, 64, 8, 0.8)}
SHARES = (0.25, 0.5, 0.75)
IMPACT = Prefetch((1, 2, 3), (0.9, 0.8, 0.7), impact=True)


def hybrimoe(share: float, prefetch: Prefetch = IMPACT) -> OffloadPlan:
    return OffloadPlan(share, misses="hybrid", cpu_threads=1, eviction="score", prefetch=prefetch)


def split(share: float) -> OffloadPlan:
    """The most popular experts on the GPU for good, the others on the CPU."""
    return OffloadPlan(share, misses="cpu", cpu_threads=1, popular=True)


def costs(model: str, tokens: int) -> ExpertCosts:
    layers, experts, top_k, coefficient = MODELS[model]
    cpu_s = tuple((coefficient * n + 0.79) * 1e-3 if n else 0.0 for n in range(tokens + 1))
    gpu_s = tuple(0.5e-3 if n else 0.0 for n in range(tokens + 1))
    return ExpertCosts(layers, experts, top_k, (1.0,), (gpu_s,), (cpu_s,), (1e-3,) * layers, 0.0, 1.0)


@cache
def served(model: str, plan: OffloadPlan, tokens: int = 1, load_s: float = 0.418e-3) -> Offloaded:
    layers, experts, top_k, _ = MODELS[model]
    shares, noise, guesses = np.random.default_rng(0).spawn(3)
    popularity = power_law(layers, experts, 0.3, shares)
    decode = tokens == 1
    routing = SampledRouting(popularity, top_k, noise, tokens=tokens, persistence=0.5 if decode else 0.0)
    steps, warmup = (50, 20) if decode else (10, 2)
    timed = replace(costs(model, tokens), link_bytes_per_s=1 / load_s)
    return simulate_offload(timed, plan, routing, guesses, steps=steps, warmup=warmup)


def test_the_rule_on_a_layer() -> None:
    """Two there, two not: the GPU computes both that are there and the third, loaded meanwhile; the CPU the last.

    GPU 0.5, 1.0, 1.5 ms (the load of 0.418 ms is over by then); CPU 1.79 ms, but sooner than the GPU's fourth at 2.0.
    """
    there = [Work(0, 3, 0, 0.5, 3.79, 0.0, 0.0, 0.0), Work(1, 2, 0, 0.5, 2.79, 0.0, 0.0, 0.0)]
    missing = [Work(2, 2, 0, 0.5, 2.79, 0.418, 0.0, 0.0), Work(3, 1, 0, 0.5, 1.79, 0.418, 0.0, 0.0)]
    order = hybrid([missing[1], there[1], missing[0], there[0]], (0.0, 0.0, 0.0))
    assert {work.expert: on_cpu for work, on_cpu in order} == {0: False, 1: False, 2: False, 3: True}
    assert ends_s(order, (0.0, 0.0, 0.0)) == pytest.approx((1.5, 1.79, 0.418))


def test_decoding_against_a_fixed_split() -> None:
    """Published: 1.70. Here 1.46 on average over three models and three caches, from 1.0 to 2.3; never slower."""
    gains = [
        served(model, split(share)).step_s / served(model, hybrimoe(share)).step_s
        for model in MODELS
        for share in SHARES
    ]
    assert min(gains) > 1.0
    assert 1.3 < np.mean(gains) < 1.75
    assert max(gains) < 2.5


def test_the_smaller_the_cache_the_larger_the_gain() -> None:
    for model in MODELS:
        gains = [served(model, split(share)).step_s / served(model, hybrimoe(share)).step_s for share in SHARES]
        assert gains == sorted(gains, reverse=True)


def test_prompts_against_loading_on_demand() -> None:
    """Published: 1.33 for prompts of 32 to 1,024 tokens.

    Here 1.13 to 1.22 at 32 tokens and up to 1.07 at 128: the CPU's time grows with the tokens, in these constants the
    GPU's does not. The fixed split takes more than three times as long.
    """
    for model in MODELS:
        ours_s = served(model, hybrimoe(0.25), 32).step_s
        on_demand_s = served(model, OffloadPlan(0.25), 32).step_s
        assert 1.1 < on_demand_s / ours_s < 1.33
        assert served(model, split(0.25), 32).step_s > 3 * ours_s
        longer = served(model, OffloadPlan(0.25), 128).step_s / served(model, hybrimoe(0.25, Prefetch()), 128).step_s
        assert 0.999 < longer < on_demand_s / ours_s


def test_prefetch_brings_nothing_where_loads_are_shorter_than_the_work_they_precede() -> None:
    """0.418 ms on the bus, 0.5 ms on the GPU: all gain is the schedule's."""
    for model in MODELS:
        ahead_s, plain_s = (served(model, hybrimoe(0.25, prefetch)).step_s for prefetch in (IMPACT, Prefetch()))
        assert ahead_s == pytest.approx(plain_s, rel=0.01)
        assert served(model, split(0.25)).step_s > 1.15 * plain_s


def test_prefetch_by_impact_where_loads_are_long() -> None:
    """Loads of 2 ms: prefetching what shortens schedules most brings 1.13 to 1.20."""
    for model in MODELS:
        ahead, plain = (served(model, hybrimoe(0.25, prefetch), load_s=2e-3) for prefetch in (IMPACT, Prefetch()))
        assert 1.1 < plain.step_s / ahead.step_s < 1.25
        assert ahead.hit_rate > plain.hit_rate + 0.1
