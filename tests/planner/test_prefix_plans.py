"""Plans that keep KV for prompts that begin alike: their files, their bounds, and the command line."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwmodels.overlap import Overlap
from planner import Question, search
from planner.bounds import Screen, computed_prompts, demand
from planner.catalogue import open_catalogue
from planner.errors import PlanError
from planner.export import export
from planner.plan import Plan, Pool
from planner.planfile import check_plan, read_plan, write_plan
from planner.sizing import phase_pools
from planner.space import Choices
from planner.tiers import capacities
from planner.trial import Extremes
from simulator.blockhashes import BlockHashes, private
from simulator.deployment import Deployment, ReplicaSpec
from simulator.kvtiers import HBM
from simulator.limits import Limit, attainment
from simulator.prefixcache import EVICTIONS
from simulator.result import latencies
from simulator.routers import ROUTERS
from simulator.scheduler import SchedulerConfig
from simulator.sessions import descended, of_contexts
from simulator.simulate import run, simulate
from simulator.workload import Requests
from ui.cli import main

POOL = Pool(2, tp=8, prefix_caching="lru", host_kv_gb=500.0, ssd_kv_gb=2000.0)
PLAN = Plan("llama-3.1-70b", "h100-sxm", 16, (POOL,), router="prefix-aware", ssd_gb_per_s=26.0)


def beside(name: str) -> Any:
    """Another file of tests, for what it builds."""
    found = importlib.util.spec_from_file_location(f"planned_by_{name}", Path(__file__).with_name(f"{name}.py"))
    assert found is not None and found.loader is not None
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


bounds = beside("test_bounds")


def test_a_plan_file_keeps_what_the_plan_says_of_prefixes(tmp_path: Path) -> None:
    write_plan(PLAN, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == PLAN
    assert capacities(POOL) == {"host": 5e11, "ssd": 2e12}


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (replace(PLAN, ssd_gb_per_s=None), "ssd_gb_per_s is None, expected what a node's disks read and write"),
        (replace(PLAN, ssd_gb_per_s=0.0), "ssd_gb_per_s is 0.0, expected a finite number above 0"),
        (replace(PLAN, pools=(replace(POOL, ssd_kv_gb=100.0),)), "ssd_kv_gb is 100.0, expected at least host_kv_gb"),
        (replace(PLAN, pools=(replace(POOL, host_kv_gb=-1.0),)), "host_kv_gb is -1.0, expected a finite number"),
        (replace(PLAN, pools=(replace(POOL, prefix_caching="off"),)), "host_kv_gb is 500.0, expected None"),
        (replace(PLAN, pools=(replace(POOL, policy="static"),)), "prefix_caching is 'lru', expected 'off' with policy"),
    ],
)
def test_what_contradicts_itself_is_refused(plan: Plan, told: str) -> None:
    with pytest.raises(PlanError, match=told.replace("[", r"\[")):
        check_plan(plan)


def test_links_are_those_of_the_cluster() -> None:
    """Eight H100 behind PCIe 5 read a token's 320 KiB of KV over all eight links; the disks are what is slow."""
    catalogue = open_catalogue(PLAN.model, PLAN.hardware, PLAN.gpus, PLAN.engine)
    tiers = catalogue.deployment(PLAN).tiers
    assert tiers is not None
    per_token = 80 * 2 * 8 * 128 * 2
    for source, target, rate in (
        ("host", HBM, 8 * catalogue.cluster.host_bytes_per_s),
        (HBM, "host", 8 * catalogue.cluster.host_bytes_per_s),
        ("ssd", "host", 26e9),
        ("host", "ssd", 26e9),
        ("ssd", HBM, 26e9),
    ):
        way = tiers.way(1, 0, source, target)
        assert way.bytes_per_token == per_token
        reached = min(tiers.bytes_per_s[link] / share for link, share in zip(way.links, way.shares, strict=True))
        assert reached == pytest.approx(rate), (source, target)
    assert not set(tiers.way(0, 0, "host", HBM).links) & set(tiers.way(1, 0, "host", HBM).links)
    assert catalogue.deployment(replace(PLAN, pools=(replace(POOL, host_kv_gb=None, ssd_kv_gb=None),))).tiers is None


def test_lanes_of_attention_groups_in_stages_reach_the_links_of_their_group() -> None:
    """Lane = micro-batch * groups + group: KV of one group goes over the links of its ranks of every stage."""
    pool = Pool(1, attention_dp=2, ep=2, pp=2, prefix_caching="lru", host_kv_gb=50.0, max_context_tokens=8192)
    plan = Plan("deepseek-v2-lite", "h100-sxm", 4, (pool,))
    catalogue = open_catalogue(plan.model, plan.hardware, plan.gpus, plan.engine)
    tiers = catalogue.deployment(plan).tiers
    assert tiers is not None
    ways = [tiers.way(0, lane, "host", HBM) for lane in range(4)]
    assert ways[0] == ways[2] and ways[1] == ways[3]
    assert not set(ways[0].links) & set(ways[1].links)
    assert len(ways[0].links) == 2  # a rank in each of two stages
    pools = (
        Pool(1, attention_dp=2, ep=2, pp=2, role="prefill", max_context_tokens=8192),
        Pool(1, attention_dp=2, ep=2, role="decode", max_context_tokens=8192),
    )
    plan = replace(plan, gpus=6, pools=pools)
    handover = open_catalogue(plan.model, plan.hardware, plan.gpus, plan.engine).deployment(plan).handover
    assert handover is not None
    routes = [handover.route(0, lane, 1, 0) for lane in range(4)]
    assert routes[0] == routes[2] and routes[1] == routes[3]
    assert set(routes[0].links) != set(routes[1].links)


@pytest.mark.parametrize(
    ("engine", "off", "on"),
    [
        ("vllm", "--no-enable-prefix-caching", "--enable-prefix-caching"),
        ("sglang", "--disable-radix-cache", "--policy cache_aware"),
        ("tensorrt-llm", "enable_block_reuse: false", "enable_block_reuse: true"),
        ("dynamo", "--no-enable-prefix-caching", "--router-mode kv --no-kv-events"),
    ],
)
def test_launch_files_switch_caching_as_the_plan_does(engine: str, off: str, on: str) -> None:
    warm, cold = (
        export(replace(PLAN, pools=(replace(POOL, prefix_caching=caching, host_kv_gb=host, ssd_kv_gb=ssd),)), engine, 8)
        for caching, host, ssd in (("lfu", 1.0, 2.0), ("off", None, None))
    )
    texts = [" ".join(" ".join(exported.files.values()).replace("\\\n", " ").split()) for exported in (warm, cold)]
    assert on in texts[0] and off not in texts[0]
    assert off in texts[1]
    told = " ".join(warm.notes)
    assert "prefix_caching lfu is approximated" in told and "host_kv_gb and ssd_kv_gb are not exported" in told
    assert "Prefix caching is switched off, as in the plan." in cold.notes


def test_what_nobody_forgets_need_not_be_computed() -> None:
    requests = Requests([0.0, 1.0, 2.0], [40, 40, 32], [5] * 3)
    hashes = BlockHashes.of([[0, 1, 2], [0, 1, 3], [0, 1]], 16)
    assert computed_prompts(replace(requests, block_hashes=hashes)).tolist() == [40, 8, 1]
    assert computed_prompts(requests).tolist() == [40, 40, 32]
    alone = replace(requests, block_hashes=private(requests.prompt_tokens, 16))
    assert demand(alone, caching=True) == demand(alone) == demand(requests)


@st.composite
def conversations(draw: st.DrawFn) -> Requests:
    """Requests at once, many of which go on from earlier ones."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.sampled_from([2, 10, 60]))
    prompts = rng.integers(1, draw(st.sampled_from([100, 900])) + 1, count)
    outputs = rng.integers(1, draw(st.sampled_from([1, 20, 150])) + 1, count)
    parents = np.array([rng.integers(-1, index) if index else -1 for index in range(count)])
    most = np.minimum(prompts, (prompts + outputs)[parents])
    shared = np.where(parents >= 0, rng.integers(most // 2, most + 1), 0)
    hashes = descended(parents, shared, prompts, outputs, 16)
    if draw(st.booleans()):
        hashes = BlockHashes.of([hashes.row(i)[: -(-int(prompts[i]) // 16)] for i in range(count)], 16)
    return Requests(np.zeros(count), prompts, outputs, block_hashes=hashes)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    bounds.plans(),
    conversations(),
    st.sampled_from([0.0, 0.05, 0.5, 0.9, 2.0]),
    st.sampled_from(sorted(ROUTERS)),
    st.sampled_from(sorted(EVICTIONS)),
    st.lists(st.tuples(st.sampled_from(bounds.METRICS), st.sampled_from(bounds.STATISTICS)), max_size=3),
)
def test_no_simulation_that_keeps_prefixes_beats_the_bounds(
    plan: tuple[int, Overlap, SchedulerConfig, float, int],
    everything: Requests,
    load: float,
    router: str,
    eviction: str,
    kinds: Sequence[tuple[str, str]],
) -> None:
    cut, overlap, config, roomy, replicas = plan
    policy = "chunked" if config.policy == "static" else config.policy
    config = replace(config, policy=policy, prefix_caching=eviction)
    prompts, outputs, count = everything.prompt_tokens, everything.output_tokens, len(everything)
    model_name, hardware, mapping, _ = bounds.CUTS[cut]
    model = bounds.compiled(cut, overlap)
    longest = int((prompts + outputs).max())
    blocks = -(-longest // config.block_tokens) + int(roomy * 20_000 / config.block_tokens)

    def work_s(limits: Sequence[Limit]) -> float:
        sizes = np.array([float(config.max_seqs)]), np.array([config.token_budget])
        kv_tokens = np.array([float(blocks * config.block_tokens)])
        return float(Screen(everything, limits, caching=True).work_s(model, mapping.attention_dp, *sizes, kv_tokens)[0])

    bare_s = work_s(())
    gaps = np.random.default_rng(count).exponential(1.0, count)
    arrival = np.cumsum(gaps) * bare_s / count / replicas / load if load else np.zeros(count)
    spec = ReplicaSpec(model, mapping, config, blocks, bounds.catalogue(model_name, hardware).cluster.device)
    deployment = Deployment([spec] * replicas, ROUTERS[router], model.engine.request_overhead_s)
    log = run(deployment, replace(everything, arrival_s=arrival))
    finish = np.array(log.finish_s)
    assert np.isfinite(finish).all()
    span_s = float(finish.max() - arrival.min())
    assert span_s >= bare_s / replicas * (1 - 1e-9)
    times = latencies(arrival, log.first_token_s, finish, outputs)
    wanted = [Limit(metric, statistic, 1e6) for metric, statistic in kinds]  # type: ignore[arg-type]
    reached = attainment(*times, wanted).values_s
    limits = [replace(limit, seconds=value) for limit, value in zip(wanted, reached, strict=True) if np.isfinite(value)]
    floors = Screen(everything, limits, caching=True).latency_s(
        model, mapping.attention_dp, np.array([config.token_budget])
    )
    for limit in limits:
        assert floors[limit][0] <= limit.seconds * (1 + 1e-9), limit
    assert span_s >= work_s(limits) / replicas * (1 - 1e-9)


def test_sequences_that_share_a_prompt_are_more_than_the_pool_would_hold_of_each() -> None:
    """Twenty contexts of about 950 tokens, 784 of them in common, in a pool of 4,320."""
    count, config = 20, SchedulerConfig("chunked", 64, 2048, 16, 1100, "lru")
    requests = Requests(np.r_[0.0, np.full(count - 1, 5.0)], [800] * count, [150] * count)
    requests = of_contexts(requests, np.zeros(count, dtype=int), np.full(count, 784), 16)
    model, blocks = bounds.compiled(0), 270
    spec = ReplicaSpec(model, bounds.CUTS[0][2], config, blocks, bounds.catalogue(*bounds.CUTS[0][:2]).cluster.device)
    log = run(Deployment([spec]), requests)
    span_s = max(log.finish_s) - 5.0 + log.finish_s[0]
    sizes = np.array([64.0]), np.array([2048]), np.array([16.0 * blocks])
    least_s = float(Screen(requests, (), caching=True).work_s(model, 1, *sizes)[0])
    assert least_s <= span_s
    decode_steps = (requests.prompt_tokens * 149).sum() / (16 * blocks)
    assert span_s < decode_steps * model.step_s(1, 800, [])  # what a pool that shares nothing would need at least


def agents(count: int = 200, rate_per_s: float = 4.0) -> Requests:
    """Questions behind one of a few long contexts."""
    rng = np.random.default_rng(2)
    requests = Requests(
        np.cumsum(rng.exponential(1 / rate_per_s, count)), rng.integers(1050, 1200, count), rng.integers(1, 40, count)
    )
    return of_contexts(requests, rng.integers(3, size=count), np.full(count, 1024), 64)


def asked(**other: Any) -> Question:
    choices = Choices(policies=("chunked",), token_budgets=(512, 2048), max_seqs=(64,), **other)
    limits = (Limit("ttft", "p99", 0.4), Limit("tpot", "p99", 0.05))
    return Question("llama-3.2-1b", "l4", 4, agents(), limits=limits, choices=choices, seconds=60.0)


def test_a_search_with_caching_finds_more_goodput_within_its_bounds() -> None:
    cold = search(asked())
    warm = search(replace(asked(prefix_caching="lru"), router="prefix-aware"))
    assert warm.best.value > 1.5 * cold.best.value
    for ranked in warm.ranked:
        assert ranked.score <= ranked.bound * (1 + 1e-9)
        assert all(pool.prefix_caching == "lru" for pool in ranked.plan.pools)
    assert warm.best.plan.router == "prefix-aware"
    assert warm.gap == 0.0


def test_decode_pools_keep_no_prefixes() -> None:
    question = asked(prefix_caching="lfu")
    catalogue = open_catalogue(question.model, question.hardware, question.gpus, question.engine)
    kept = {(pool.role, pool.prefix_caching) for pool in phase_pools(question, catalogue, None)}
    assert kept == {("prefill", "lfu"), ("decode", "off")}


def test_runs_with_caches_of_other_sizes_are_not_the_same() -> None:
    """Blocks that nobody reserves keep prefixes, so their number matters even where nobody waits for them."""
    run_of = Extremes(frozenset(), 4, 10)
    off, on = Pool(1), Pool(1, prefix_caching="lru")
    assert run_of.same_run(off, 1000, off, 900)
    assert not run_of.same_run(on, 1000, on, 900)
    assert run_of.same_run(on, 1000, on, 1000)


def trace(path: Path, requests: Requests) -> Path:
    """As Mooncake publishes traces."""
    hashes = requests.block_hashes
    assert hashes is not None
    with gzip.open(path, "wt") as out:
        for index in range(len(requests)):
            row = {
                "timestamp": round(1000 * float(requests.arrival_s[index])),
                "input_length": int(requests.prompt_tokens[index]),
                "output_length": int(requests.output_tokens[index]),
                "hash_ids": hashes.row(index),
            }
            out.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A plan without caching, and a trace of conversations."""
    plan = Plan("llama-3.2-1b", "l4", 2, (Pool(2, token_budget=2048, max_seqs=64, max_context_tokens=8192),))
    write_plan(plan, tmp_path / "plan.yaml")
    rng = np.random.default_rng(1)
    requests = Requests(np.cumsum(rng.exponential(0.2, 60)), rng.integers(2100, 2500, 60), [10] * 60)
    return str(tmp_path / "plan.yaml"), str(
        trace(tmp_path / "trace.jsonl.gz", of_contexts(requests, rng.integers(4, size=60), np.full(60, 2048), 512))
    )


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["simulate", *words, "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def test_the_command_line_says_what_was_found_cached(
    capsys: pytest.CaptureFixture[str], files: tuple[str, str]
) -> None:
    plan, requests = files
    cold = told(capsys, plan, "--trace", requests)
    assert cold["caching"] is None and cold["notes"] == []
    warm = told(capsys, plan, "--trace", requests, "--prefix-caching", "lru", "--router", "prefix-aware")
    assert warm["plan"]["router"] == "prefix-aware"
    assert [pool["prefix_caching"] for pool in warm["plan"]["pools"]] == ["lru"]
    use = warm["caching"]
    with gzip.open(requests, "rt") as lines:
        assert use["prompt_tokens"] == sum(json.loads(line)["input_length"] for line in lines)
    assert use["found_tokens"] > 0 == use["loaded_tokens"]
    assert use["hit_rate"] == pytest.approx(use["found_tokens"] / use["prompt_tokens"])
    assert warm["metrics"]["overall"]["ttft_s"]["mean"] < cold["metrics"]["overall"]["ttft_s"]["mean"]
    assert main(["simulate", plan, "--trace", requests, "--prefix-caching", "lru", "--host-kv-gb", "10"]) == 0
    text = capsys.readouterr().out
    assert "Prefix caching: " in " ".join(text.split())
    assert "10 GB in host memory" in " ".join(text.split())


def test_the_command_line_refuses_or_notes_what_cannot_help(
    capsys: pytest.CaptureFixture[str], files: tuple[str, str]
) -> None:
    plan, requests = files
    for words, told_, code in (
        (["--prefix-caching", "mru"], "--prefix-caching mru: expected one of off, lru", 2),
        (["--router", "best"], "--router best: expected one of", 2),
        (["--host-kv-gb", "5"], "--host-kv-gb 5: expected a plan that keeps prefixes", 2),
        (["--prefix-caching", "lru", "--ssd-kv-gb", "5"], "--ssd-kv-gb 5: expected with what a node's disks", 2),
    ):
        assert main(["simulate", plan, "--trace", requests, *words]) == code
        assert told_ in capsys.readouterr().err
    notes = told(capsys, plan, "--requests", "50", "--prefix-caching", "lru")["notes"]
    assert len(notes) == 1 and "block hashes" in notes[0]
    notes = told(capsys, plan, "--trace", requests, "--router", "prefix-aware")["notes"]
    assert len(notes) == 1 and "nothing cached" in notes[0]


def test_plan_searches_with_prefix_caching(
    capsys: pytest.CaptureFixture[str], files: tuple[str, str], tmp_path: Path
) -> None:
    words = [
        "plan",
        "--model",
        "llama-3.2-1b",
        "--hardware",
        "l4",
        "--gpus",
        "2",
        "--trace",
        files[1],
        "--seconds",
        "3",
    ]
    words += ["--policy", "chunked", "--token-budget", "2048", "--max-seqs", "64", "--ttft", "p99=1s"]
    assert main([*words, "--prefix-caching", "lru", "--router", "prefix-aware", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["question"]["prefix_caching"] == "lru"
    assert content["best"]["plan"]["pools"][0]["prefix_caching"] == "lru"
    assert content["best"]["caching"]["hit_rate"] > 0


def test_tiers_of_a_plan_shorten_what_is_computed() -> None:
    """A replica whose memory holds few conversations finds the rest in host memory."""
    rng = np.random.default_rng(3)
    requests = Requests(np.cumsum(rng.exponential(0.5, 300)), rng.integers(3000, 6000, 300), [20] * 300)
    hashes = of_contexts(requests, rng.integers(40, size=300), np.full(300, 2048), 512)
    pool = Pool(1, weights="bf16", token_budget=8192, prefix_caching="lru")
    catalogue = open_catalogue("llama-3.1-8b", "l4", 1, "vllm")
    plan = Plan("llama-3.1-8b", "l4", 1, (pool,))
    found = {}
    for gigabytes in (None, 20.0):
        plan = replace(plan, pools=(replace(pool, host_kv_gb=gigabytes),))
        use = simulate(catalogue.deployment(plan), hashes, record=False).caching
        assert use is not None
        found[gigabytes] = use
    assert found[20.0].hit_rate > found[None].hit_rate + 0.1
    assert found[20.0].loads > 0
