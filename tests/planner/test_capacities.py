"""Capacities of replicas against simulations of prefill-only, decode-only and whole replicas."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from heapq import heappop, heappush

import numpy as np
import pytest
from numpy.typing import NDArray

from planner.capacities import capacities, option
from planner.catalogue import Catalogue, open_catalogue
from planner.decodequeue import decode_capacity, decode_steps_s, lengths_of
from planner.options import Budget, Demand
from planner.plan import Pool
from planner.pools import size_pools
from planner.prefillqueue import prefill_capacities
from planner.trial import capacity
from simulator.deployment import Deployment, ReplicaSpec
from simulator.limits import Limit
from simulator.simulate import run
from simulator.workload import Fixed, Independent, Lognormal, Poisson, Requests, draw_requests

TTFT, TPOT = Limit("ttft", "p99", 2.0), Limit("tpot", "p99", 0.05)


@cache
def catalogue(model: str) -> Catalogue:
    return open_catalogue(model, "h100-sxm", 8, "vllm")


def replica(model: str, tp: int, pp: int = 1, **settings: object) -> ReplicaSpec:
    pool = Pool(1, tp=tp, pp=pp, max_context_tokens=32768)
    return catalogue(model).replica(replace(pool, **settings))  # type: ignore[arg-type]


def traffic(prompt: float, output: float, count: int, *, sigma: float = 0.8) -> Requests:
    outputs = Fixed(1) if output == 1 else Lognormal(mean=output, sigma=sigma, max=4096)
    lengths = Independent(prompt_tokens=Lognormal(mean=prompt, sigma=0.8, max=16384), output_tokens=outputs)
    return draw_requests(np.random.default_rng(0), count, 1.0, Poisson(), lengths)


def simulated(spec: ReplicaSpec, requests: Requests, limits: list[Limit], guess: float) -> float:
    """Highest simulated rate within the limits, to 1 %."""
    _, trials = capacity(
        Deployment([spec]), requests, limits, 0, at_most_per_s=8 * guess, guess_per_s=guess, tolerance=0.01
    )
    return max(trial.rate_per_s for trial in trials if trial.meets)


@pytest.mark.parametrize(
    ("model", "tp", "pp", "policy", "budget", "prompt", "limit", "within"),
    [
        ("llama-3.1-8b", 1, 1, "chunked", 2048, 1024, Limit("ttft", "p99", 0.5), 0.05),
        ("llama-3.1-8b", 1, 1, "chunked", 8192, 300, Limit("ttft", "mean", 0.06), 0.05),
        ("llama-3.1-8b", 1, 1, "prefill-first", 17408, 3000, Limit("ttft", "p90", 1.0), 0.05),
        ("llama-3.1-70b", 4, 1, "chunked", 2048, 1024, Limit("ttft", "p99", 1.0), 0.05),
        ("llama-3.1-70b", 8, 1, "chunked", 8192, 4096, Limit("ttft", "mean", 0.5), 0.05),
        ("llama-3.1-70b", 2, 2, "chunked", 8192, 1024, Limit("ttft", "p90", 1.0), 0.10),
        ("llama-3.1-70b", 4, 2, "prefill-first", 17408, 1024, Limit("ttft", "mean", 0.3), 0.10),
    ],
)
def test_prefill_capacity_against_simulation(
    model: str, tp: int, pp: int, policy: str, budget: int, prompt: int, limit: Limit, within: float
) -> None:
    spec, requests = replica(model, tp, pp, policy=policy, token_budget=budget), traffic(prompt, 1, 1000)
    found = prefill_capacities([spec], requests, [limit])[0]
    assert 0 < found.utilisation < 1
    assert found.rate_per_s == pytest.approx(simulated(spec, requests, [limit], found.rate_per_s), rel=within)


@pytest.mark.parametrize("groups", [2, 4])
def test_prefill_capacity_of_attention_groups_in_stages(groups: int) -> None:
    """Groups of equal parts are a coarser picture than one scheduler: within 12 % of the simulation."""
    cut = {"attention_dp": groups, "ep": groups, "policy": "prefill-first", "token_budget": 17408}
    spec, requests, limit = replica("deepseek-v2-lite", 1, 2, **cut), traffic(1024, 1, 1000), Limit("ttft", "mean", 0.3)
    found = prefill_capacities([spec], requests, [limit])[0]
    assert found.rate_per_s == pytest.approx(simulated(spec, requests, [limit], found.rate_per_s), rel=0.12)


def test_decode_steps_of_attention_groups_in_stages() -> None:
    """A token takes its step through all stages, or the slowest stage's turn with every micro-batch in flight."""
    spec = replica("deepseek-v2-lite", 1, 2, attention_dp=4, ep=4)
    seconds, _ = decode_steps_s(spec.model, spec.mapping, 900.0, 64)
    for n in (1, 7, 64):
        stages = spec.model.lockstep_stages_s([(n, 900 * n, [])] * 4)
        expected = max(sum(stages) + spec.model.transfer[n], 2 * max(stages))
        assert seconds[n] == pytest.approx(expected, rel=1e-9)


def test_prefill_follows_the_simulation_prompt_by_prompt() -> None:
    """Far below and near saturation, one scheduler: the mean TTFT of the recursion is that of the event engine."""
    spec, requests = replica("llama-3.1-8b", 1, token_budget=2048), traffic(1024, 1, 1000)
    saturated = prefill_capacities([spec], requests, [])[0].saturated_per_s
    for load in (0.1, 0.6, 0.9):
        scaled = requests.scaled_to_rate(load * saturated)
        ttft = np.array(run(Deployment([spec]), scaled, 0).first_token_s) - scaled.arrival_s
        mean = float(ttft.mean())
        above = prefill_capacities([spec], requests, [Limit("ttft", "mean", mean)])[0]
        assert above.rate_per_s == pytest.approx(load * saturated, rel=0.03)


def test_prefill_with_a_limit_an_empty_replica_breaks() -> None:
    spec = replica("llama-3.1-8b", 1)
    assert prefill_capacities([spec], traffic(1024, 1, 200), [Limit("ttft", "mean", 1e-3)])[0].rate_per_s == 0


def decode_only(spec: ReplicaSpec, requests: Requests, rate: float) -> NDArray[np.float64]:
    """TPOT of requests whose KV is at a decode replica as they arrive, taking one step at a time."""
    scaled = requests.scaled_to_rate(rate)
    arrivals, prompts = scaled.arrival_s.tolist(), scaled.prompt_tokens.tolist()
    decodes = (scaled.output_tokens - 1).tolist()
    block, waiting, ends = spec.scheduler.block_tokens, [], []
    now, coming, head, steps, context, reserved = 0.0, 0, 0, 0, 0, 0
    finish = scaled.arrival_s.copy()
    while ends or head < len(waiting) or coming < len(arrivals):
        if not ends and head == len(waiting):
            now = max(now, arrivals[coming])
        while coming < len(arrivals) and arrivals[coming] <= now:
            if decodes[coming]:
                waiting.append(coming)
            coming += 1
        while head < len(waiting) and len(ends) < spec.scheduler.max_seqs:
            request = waiting[head]
            blocks = -(-(prompts[request] + decodes[request]) // block)
            if reserved + blocks > spec.kv_blocks:
                break
            head, reserved = head + 1, reserved + blocks
            context += prompts[request] - steps
            heappush(ends, (steps + decodes[request], request))
        if not ends:
            continue
        now += spec.model.decode_run(len(ends), context + len(ends) * (steps + 1))[0]
        steps += 1
        while ends and ends[0][0] <= steps:
            _, request = heappop(ends)
            finish[request] = now
            context -= prompts[request] + decodes[request] - steps
            reserved -= -(-(prompts[request] + decodes[request]) // block)
    several = scaled.output_tokens > 1
    tpot: NDArray[np.float64] = ((finish - scaled.arrival_s) / np.maximum(scaled.output_tokens - 1, 1))[several]
    return tpot


@pytest.mark.parametrize(
    ("model", "tp", "output", "max_seqs", "kv_blocks", "statistic", "slower", "within"),
    [
        ("llama-3.1-8b", 1, 256, 256, None, "p99", 1.4, 0.15),
        ("llama-3.1-8b", 1, 256, 256, None, "mean", 1.3, 0.05),
        ("llama-3.1-8b", 1, 64, 256, None, "p90", 1.8, 0.10),
        ("llama-3.1-70b", 4, 256, 256, None, "p99", 1.4, 0.15),
        ("llama-3.1-70b", 4, 256, 256, 4000, "p90", 1.8, 0.15),
        ("llama-3.1-70b", 4, 256, 32, None, "mean", 1.3, 0.10),
    ],
)
def test_decode_capacity_against_simulation(
    model: str,
    tp: int,
    output: int,
    max_seqs: int,
    kv_blocks: int | None,
    statistic: str,
    slower: float,
    within: float,
) -> None:
    spec, requests = replica(model, tp, max_seqs=max_seqs), traffic(1024, output, 2500)
    spec = spec if kv_blocks is None else replace(spec, kv_blocks=kv_blocks)
    alone_s = decode_steps_s(spec.model, spec.mapping, 1024.0, 4)[0][1]
    limit = Limit("tpot", statistic, slower * alone_s)
    found = decode_capacity(spec, requests, [limit], transfer_s=0.0)
    low, high = 0.0, 3 * found.rate_per_s
    for _ in range(8):
        middle = (low + high) / 2
        tpot = decode_only(spec, requests, middle)
        value = tpot.mean() if limit.quantile is None else np.quantile(tpot, limit.quantile)
        low, high = (middle, high) if value <= limit.seconds else (low, middle)
    assert found.rate_per_s == pytest.approx((low + high) / 2, rel=within)


def test_kv_of_a_decode_replica_is_never_overcommitted() -> None:
    """Little's law at the capacity: tokens held on average leave room in the pool."""
    spec, requests = replace(replica("llama-3.1-70b", 4), kv_blocks=2000), traffic(1024, 256, 500)
    found = decode_capacity(spec, requests, [Limit("tpot", "p99", 1.0)], transfer_s=0.0)
    assert found.limited_by == "kv"
    assert found.rate_per_s * found.held_token_s < 2000 * spec.scheduler.block_tokens
    assert found.sequences * lengths_of(requests).context < 2000 * spec.scheduler.block_tokens


@pytest.mark.parametrize(
    ("model", "tp", "prompt", "output"),
    [("llama-3.1-8b", 1, 1024, 256), ("llama-3.1-70b", 4, 300, 600), ("llama-3.1-70b", 8, 1024, 256)],
)
def test_whole_capacity_against_simulation(model: str, tp: int, prompt: int, output: int) -> None:
    spec, requests = replica(model, tp), traffic(prompt, output, 1500)
    alone_s = decode_steps_s(spec.model, spec.mapping, float(prompt), 4)[0][1]
    limits = [TTFT, Limit("tpot", "p99", 2.5 * alone_s)]
    found = capacities([spec], requests, limits)[0]
    assert found.whole_per_s < min(found.prefill.rate_per_s, found.decode.rate_per_s)
    assert found.whole_per_s == pytest.approx(simulated(spec, requests, limits, found.whole_per_s), rel=0.15)


def test_tighter_limits_and_longer_requests_lower_every_capacity() -> None:
    spec = replica("llama-3.1-70b", 4)
    easy = capacities([spec], traffic(1024, 256, 500), [TTFT, TPOT])[0]
    for requests, limits in [
        (traffic(1024, 256, 500), [Limit("ttft", "p99", 1.0), Limit("tpot", "p99", 0.03)]),
        (traffic(2048, 512, 500), [TTFT, TPOT]),
    ]:
        hard = capacities([spec], requests, limits)[0]
        assert hard.prefill.rate_per_s < easy.prefill.rate_per_s
        assert hard.decode.rate_per_s < easy.decode.rate_per_s
        assert hard.whole_per_s < easy.whole_per_s


def test_options_of_one_replica_in_every_role() -> None:
    """What the pool-sizing program gets: prices, KV and rates by role; a mixed replica is no better than both apart."""
    spec, requests = replica("llama-3.1-70b", 4), traffic(1024, 256, 500)
    found = capacities([spec], requests, [TTFT, TPOT])
    roles = ("aggregated", "prefill", "decode", "mixed")
    some = [option(role, role, "h100-sxm", spec, found, kv_bytes_per_token=327680.0) for role in roles]
    for each in some:
        assert each.gpus == 4
        assert each.power_w == 4 * spec.device.tdp_w
        assert each.services[0].kv_bytes == pytest.approx(327680.0 * requests.prompt_tokens.mean())
    assert some[3].services[0].whole_per_s == some[0].services[0].whole_per_s
    assert some[3].services[0].decode_per_s <= some[2].services[0].decode_per_s
    best = size_pools(some, Demand(), Budget({"h100-sxm": 16})).best
    assert best.rate_per_s >= 4 * found[0].whole_per_s * (1 - 1e-9)


def test_outputs_of_one_token_need_no_decode() -> None:
    spec = replica("llama-3.1-8b", 1)
    found = capacities([spec], traffic(1024, 1, 300), [TTFT, TPOT])
    assert found[0].decode.rate_per_s == np.inf
    pools = [option(role, role, "x", spec, found) for role in ("prefill", "decode")]  # type: ignore[arg-type]
    best = size_pools(pools, Demand(), Budget({"x": 3})).best
    assert best.rate_per_s == pytest.approx(2 * found[0].prefill.rate_per_s, rel=1e-3)


def test_a_chunk_of_prompts_alone_is_a_smaller_budget() -> None:
    """Without decodes beside them, prompts are cut as by a budget of as many tokens, in simulation and in the queue."""
    requests = traffic(1024, 1, 400)
    small = replica("llama-3.1-8b", 1, token_budget=512, max_seqs=256)
    chunks = replica("llama-3.1-8b", 1, token_budget=2048, max_seqs=256, chunk_tokens=512)
    large = replica("llama-3.1-8b", 1, token_budget=2048, max_seqs=256)
    first, second, other = prefill_capacities([small, chunks, large], requests, [TTFT])
    assert first.rate_per_s == pytest.approx(second.rate_per_s) != pytest.approx(other.rate_per_s)
    logs = [run(Deployment([spec]), requests.scaled_to_rate(first.rate_per_s)) for spec in (small, chunks)]
    np.testing.assert_allclose(logs[0].first_token_s, logs[1].first_token_s)
    whole = [one.whole_per_s for one in capacities([chunks, large], traffic(1024, 100, 400), [TTFT, TPOT])]
    assert whole[0] != pytest.approx(whole[1], rel=1e-3)
