"""Nexus (arXiv:2507.06608v2): how the phases scale with the units, and what a predicted split is worth against chunks.

As in the paper: Llama-3.1-8B on an L20 (92 units, 119.5 TFLOP/s, 864 GB/s, 48 GB; the L40S's kernels) under its mixed
workload, 60 % ShareGPT and 40 % Long Data Collections, lognormal through the medians and 95th percentiles of table 1.
Host work as in the profile vllm. Its claims: up to 2.2 times the throughput, 20 times lower TTFT and 2.5 times lower
time between tokens than vLLM's chunked prefill.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from hwmodels.engine import load_engine
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.shares import SharedSteps, compile_shared_steps
from planner.catalogue import Catalogue, mapping_of, precision_of
from planner.plan import Pool
from simulator.deployment import Deployment, ReplicaSpec
from simulator.shared import SharedSpec
from simulator.shares import Nexus
from simulator.simulate import run
from simulator.workload import Requests

POOL = Pool(1, max_seqs=256, token_budget=2048, max_context_tokens=16384)
AGEING = 15.0  # section 5


@cache
def l20() -> tuple[ReplicaSpec, SharedSteps]:
    engine = load_engine("vllm")
    cluster = load_cluster("l40s", 1)
    device = cluster.device
    slower = 119.5e12 / device.peak_flops_per_s["bf16"]
    device = replace(
        device,
        name="l20",
        compute_units=92,
        peak_flops_per_s={dtype: rate * slower for dtype, rate in device.peak_flops_per_s.items()},
        memory_bytes_per_s=864e9,
    )
    cluster = replace(cluster, device=device.of_engine(engine.kernels))
    catalogue = Catalogue(load_model("llama-3.1-8b"), cluster, engine)
    mapping = mapping_of(POOL)
    steps = compile_shared_steps(
        catalogue.model, mapping, precision_of(POOL), engine, catalogue.prices(mapping), cluster,
        max_tokens=POOL.token_budget, max_seqs=POOL.max_seqs,
    )  # fmt: skip
    return catalogue.replica(POOL), steps


def nexus(policy: Nexus, ageing: float | None) -> SharedSpec:
    one, steps = l20()
    return SharedSpec(
        model=one.model, mapping=one.mapping, scheduler=one.scheduler, kv_blocks=one.kv_blocks, device=one.device,
        steps=steps, policy=policy, ageing=ageing,
    )  # fmt: skip


def mixed(count: int, rate_per_s: float) -> Requests:
    rng = np.random.default_rng(0)
    is_long = rng.random(count) < 0.4

    def lengths(p50: float, p95: float) -> np.ndarray:
        sigma = np.log(p95 / p50) / 1.645
        return np.maximum(1, np.rint(p50 * np.exp(sigma * rng.standard_normal(count)))).astype(np.int64)

    prompts = np.where(is_long, np.minimum(lengths(5461, 9292), 12_000), np.minimum(lengths(432, 970), 4000))
    outputs = np.where(is_long, lengths(159, 339), np.minimum(lengths(37, 383), 1000))
    return Requests(np.cumsum(rng.exponential(1 / rate_per_s, count)), prompts, outputs)


@cache
def served(which: str, rate_per_s: float) -> dict[str, float]:
    """Seconds: mean, median TTFT; mean TPOT; mean latency per output token."""
    some = mixed(2000, rate_per_s)
    spec = {
        "chunked": l20()[0],
        "fcfs": nexus(Nexus(), None),
        "nexus": nexus(Nexus(), AGEING),
        "tight": nexus(Nexus(prefill_slack=1.3, decode_slack=1.1), AGEING),
    }[which]
    log = run(Deployment([spec]), some)
    first, finish = np.array(log.first_token_s), np.array(log.finish_s)
    several = some.output_tokens > 1
    tpot_s = ((finish - first) / np.maximum(some.output_tokens - 1, 1))[several]
    return {
        "ttft": float((first - some.arrival_s).mean()),
        "ttft p50": float(np.median(first - some.arrival_s)),
        "tpot": float(tpot_s.mean()),
        "normalised": float(((finish - some.arrival_s) / some.output_tokens).mean()),
    }


def test_figure_5_prefill_follows_the_units_and_decode_soon_does_not() -> None:
    """Gains of the next tenth of the units; section 3.2 has another model, Qwen2.5-3B: to 8 points of 100."""
    _, steps = l20()
    prefill = {share: steps.prefill(share, [(2048, 0)])[0] for share in (0.3, 0.4, 0.7, 0.8)}
    decode = {share: steps.decode(share, 32, 32 * 3000)[0] for share in (0.3, 0.4, 0.5, 0.6, 0.8, 0.9)}

    def gain(times: dict[float, float], share: float, more: float) -> float:
        return 1 - times[more] / times[share]

    assert abs(gain(prefill, 0.3, 0.4) - 0.25) < 0.08
    assert abs(gain(prefill, 0.7, 0.8) - 0.10) < 0.08
    assert abs(gain(decode, 0.3, 0.4) - 0.10) < 0.08
    assert abs(gain(decode, 0.5, 0.6) - 0.03) < 0.08
    assert abs(gain(decode, 0.8, 0.9) - 0.03) < 0.08
    assert gain(prefill, 0.3, 0.4) > gain(decode, 0.3, 0.4) > gain(decode, 0.5, 0.6) > gain(decode, 0.8, 0.9)


def test_tokens_come_faster_than_with_chunks_at_equal_load() -> None:
    """At 1.2 requests/s the time per output token is 2.9 times lower, the latency per token 2.0 times.

    Within 0.2 s per token both serve 1.10 and 1.27 requests/s: 1.16 times as many, where the paper has up to 2.2.
    """
    chunked, split = served("chunked", 1.2), served("nexus", 1.2)
    assert 2 < chunked["tpot"] / split["tpot"] < 4
    assert 1.5 < chunked["normalised"] / split["normalised"] < 3
    assert served("chunked", 1.15)["normalised"] > 0.2 > served("nexus", 1.23)["normalised"]


def test_most_first_tokens_come_sooner_where_chunks_queue_but_not_their_mean() -> None:
    """The median is many times lower once chunks queue (the shortest first); the mean is not, as long prompts wait.

    What decode is given, prefill lacks: it is bound by arithmetic, and its queue grows. Against the paper's mean.
    """
    chunked, split = served("chunked", 1.5), served("nexus", 1.5)
    assert chunked["ttft p50"] / split["ttft p50"] > 5
    assert split["ttft"] > 0.7 * chunked["ttft"]


def test_shortest_prompts_first_lowers_the_mean_ttft() -> None:
    """Section 6.5's direction: against first come, first served, with the same split."""
    assert served("nexus", 1.2)["ttft"] < 0.6 * served("fcfs", 1.2)["ttft"]


def test_slacks_of_the_paper_starve_prefill_on_these_curves() -> None:
    """A decode step within 1.1 of its least time takes most units here, where it gains from all of them a little."""
    assert served("tight", 1.0)["ttft"] > 20 * served("nexus", 1.0)["ttft"]
    assert served("tight", 1.0)["tpot"] < served("nexus", 1.0)["tpot"]
