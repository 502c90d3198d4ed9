"""A layer's experts by the tokens of a step: against whole steps, closed forms, and laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.expertoffload import ExpertCosts
from simulator.errors import OffloadError
from simulator.expertrouting import SampledRouting, power_law
from simulator.offloadedlayers import TOKENS, Sides, offloaded_layers
from simulator.offloadedsteps import simulate_offload
from simulator.offloadplan import OffloadPlan, Prefetch

LAYERS, EXPERTS, TOP_K = 12, 16, 2
LOAD_S, RUN_S = 4.0, 1.0
COSTS = ExpertCosts(
    LAYERS, EXPERTS, TOP_K, expert_bytes=(8.0,), gpu_s=((),), cpu_s=(), dense_s=(0.0,) * LAYERS, once_s=0.0,
    link_bytes_per_s=2.0,
)  # fmt: skip
POPULARITY = power_law(LAYERS, EXPERTS, 0.5, np.random.default_rng(0))


def touched(tokens: np.ndarray) -> np.ndarray:
    """Experts of a layer that a step touches under uniform routing."""
    return EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens)


def sides(cpu_s: float | None = None, costs: ExpertCosts = COSTS) -> Sides:
    """A second for any expert with tokens on the GPU, however many; `cpu_s` for each of its tokens on the CPU."""
    return Sides(
        costs,
        lambda level, tokens: RUN_S * (tokens > 0),
        None if cpu_s is None else lambda level, tokens: cpu_s * tokens,
        lambda tokens: RUN_S * touched(tokens),
    )


def test_all_on_the_device_is_what_it_was_priced_at() -> None:
    found = offloaded_layers(sides(), OffloadPlan(1.0), POPULARITY)
    assert found.layer_s == pytest.approx(found.resident_s)
    assert found.resident_s == pytest.approx(touched(np.array(TOKENS)))
    assert (found.hit_rate == 1).all()
    assert (found.loaded_bytes == 0).all()


def test_a_step_that_touches_all_loads_what_is_not_there() -> None:
    """A quarter of 16 experts is there: twelve loads one after the other, the last expert's second behind them."""
    found = offloaded_layers(sides(), OffloadPlan(0.25), POPULARITY, tokens=(512, 4096))
    assert found.layer_s == pytest.approx([12 * LOAD_S + RUN_S] * 2, rel=1e-3)
    assert found.loaded_bytes == pytest.approx([12 * 8.0] * 2, rel=1e-3)
    assert found.hit_rate == pytest.approx([0.25] * 2)


@pytest.mark.parametrize("tokens", [1, 4, 32])
@pytest.mark.parametrize(("misses", "threads"), [("load", 0), ("hybrid", 1)])
def test_whole_steps_are_layers_and_the_rest(tokens: int, misses: str, threads: int) -> None:
    """Steps of all layers with other work in between, at the same prices: within their errors."""
    plan = OffloadPlan(0.3, misses=misses, cpu_threads=threads, popular=True)
    cpu_s = 1.5 if threads else None
    found = offloaded_layers(sides(cpu_s), plan, POPULARITY, tokens=(tokens, 64), persistence=0.3)
    noise = np.random.default_rng(7)
    routing = SampledRouting(POPULARITY, TOP_K, noise, tokens=tokens, persistence=0.3)
    gpu = [0.0] + [1.0] * tokens
    draws = [routing.step() for _ in range(60)]
    mean = np.mean([[len(np.unique(row)) for row in draw.chosen] for draw in draws])
    scale = touched(np.array(float(tokens))) / mean  # what offloaded_layers does to match the resident price
    costs = replace(
        COSTS,
        gpu_s=(tuple(scale * np.array(gpu)),),
        cpu_s=() if cpu_s is None else (tuple(cpu_s * np.arange(tokens + 1)),),
        dense_s=tuple(float(1 + layer % 3) for layer in range(LAYERS)),
        once_s=5.0,
    )
    whole = simulate_offload(costs, plan, routing, np.random.default_rng(2), steps=200, warmup=40)
    expected_s = 5.0 + sum(costs.dense_s) + LAYERS * found.layer_s[0]
    assert whole.step_s == pytest.approx(expected_s, rel=0.02, abs=4 * whole.error_s)
    assert whole.hit_rate == pytest.approx(found.hit_rate[0], abs=0.04)


@settings(max_examples=10, deadline=None)
@given(st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)), st.sampled_from([1, 3, 10, 100]), st.booleans())
def test_a_larger_cache_takes_no_longer(shares: tuple[float, float], tokens: int, cpu: bool) -> None:
    """Beyond the noise of different draws."""
    less, more = sorted(shares)
    own = sides(0.9 if cpu else None)
    low, high = (
        offloaded_layers(
            own, OffloadPlan(share, misses="hybrid" if cpu else "load", cpu_threads=cpu, popular=True), POPULARITY,
            tokens=(tokens, 4096),
        )
        for share in (less, more)
    )  # fmt: skip
    assert (high.layer_s <= 1.03 * low.layer_s + 1e-9).all()
    assert (high.hit_rate >= low.hit_rate - 0.03).all()
    assert (high.layer_s >= (0 if cpu else 1) * high.resident_s - 1e-9).all()


def test_the_host_helps_or_is_left_out() -> None:
    """A CPU that takes longer than any load changes nothing; one that is quick leaves the link idle."""
    tokens = (1, 16, 256)
    plain = offloaded_layers(sides(), OffloadPlan(0.25, popular=True), POPULARITY, tokens=tokens)
    plan = OffloadPlan(0.25, misses="hybrid", cpu_threads=1, popular=True)
    slow, quick = (offloaded_layers(sides(cpu_s), plan, POPULARITY, tokens=tokens) for cpu_s in (1e6, 1e-3))
    assert slow.layer_s == pytest.approx(plain.layer_s, rel=1e-6)
    assert (quick.layer_s < plain.layer_s).all()
    assert quick.busy_s["link"][0] == 0.0


def test_the_same_seed_gives_the_same_and_disks_take_longer() -> None:
    one, two = (offloaded_layers(sides(), OffloadPlan(0.4), POPULARITY, tokens=(2, 8)) for _ in range(2))
    assert one.layer_s.tolist() == two.layer_s.tolist()
    disks = replace(COSTS, host_bytes=0.5 * COSTS.total_bytes, ssd_bytes_per_s=1.0)
    behind = offloaded_layers(sides(costs=disks), OffloadPlan(0.4), POPULARITY, tokens=(2, 8))
    assert (behind.layer_s > one.layer_s).all()
    assert (behind.busy_s["ssd"] > 0).all()


def test_two_formats_leave_out_what_matters_least() -> None:
    costs = replace(COSTS, expert_bytes=(8.0, 2.0), gpu_s=((), ()))
    plan = OffloadPlan(0.25, ("bf16", "int4"), (0.6, 0.9))
    found = offloaded_layers(sides(costs=costs), plan, POPULARITY, tokens=(1, 8))
    assert found.level_share.sum(axis=1) == pytest.approx([1, 1])
    assert (found.level_share[:, 1:] > 0).all()
    assert found.layer_s[0] < offloaded_layers(sides(), OffloadPlan(0.25), POPULARITY, tokens=(1, 8)).layer_s[0]


def test_loads_ahead_of_time_are_refused() -> None:
    with pytest.raises(OffloadError, match="loads on demand"):
        offloaded_layers(sides(), OffloadPlan(0.3, prefetch=Prefetch((1,), (0.9,))), POPULARITY)
