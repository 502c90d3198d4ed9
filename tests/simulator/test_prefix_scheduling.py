"""A scheduler with a cache serves every request when the step-by-step rules say, and keeps what it must keep."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import numpy as np
import pytest
import simpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.hardware import load_device
from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel, Tables
from simulator.blockhashes import BlockHashes, private
from simulator.deployment import AnyReplica, Deployment, ReplicaSpec, Role
from simulator.errors import SchedulerError
from simulator.handover import Handover
from simulator.log import Log
from simulator.prefixcache import EVICTIONS, hit_rate
from simulator.routers import ROUTERS
from simulator.scheduler import Scheduler, SchedulerConfig
from simulator.sessions import descended, of_contexts
from simulator.simulate import run
from simulator.together import Load
from simulator.workload import Requests

spec = importlib.util.spec_from_file_location("prefix_oracle", Path(__file__).with_name("prefix_oracle.py"))
assert spec is not None and spec.loader is not None
slow_rules = importlib.util.module_from_spec(spec)
sys.modules["prefix_oracle"] = slow_rules
spec.loader.exec_module(slow_rules)
oracle = slow_rules.oracle

SIZE = 16
MAX_TOKENS, MAX_SEQS = 256, 16
CHECKED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ENGINE = Engine("test", "test", {"default": "vllm"}, 1e-3, 1e-5, 0.0, 1.0, 0.0, 0.9, 0.0)
MAPPINGS = (Mapping(), Mapping(pp=2), Mapping(attention_dp=2, ep=2), Mapping(attention_dp=2, ep=2, pp=2))


def model(stages: int = 1) -> StepModel:
    """Linear in tokens, in sequences and in what they attend to."""
    n, s = np.arange(MAX_TOKENS + 1.0), np.arange(MAX_SEQS + 1.0)
    tables = Tables(
        linear=(2e-3 + 1e-5 * n).tolist(),
        shared=(1e-5 * np.arange(4 * MAX_TOKENS + 1)).tolist(),
        head=(1e-5 * s).tolist(),
        decode=Pieces((), ((1e-5 * (s > 0)).tolist(),), ((1e-7 * s).tolist(),)),
        prefill=Pieces((), ((1e-6 * n).tolist(),), ((1e-8 * n).tolist(),)),
    )
    transfer = (1e-4 + 1e-7 * n).tolist()
    return StepModel([tables] * stages, transfer, ENGINE, MAX_TOKENS, MAX_SEQS)


class Watched:
    """A replica specification that remembers the replicas started from it."""

    share = 1.0

    def __init__(
        self, config: SchedulerConfig, blocks: int, mapping: Mapping = MAPPINGS[0], role: Role = "aggregated"
    ) -> None:
        self.spec = ReplicaSpec(model(mapping.pp), mapping, config, blocks, load_device("h100-sxm"))
        self.role = role
        self.scheduler = config
        self.started: list[AnyReplica] = []

    def start(self, prompts: list[int], outputs: list[int], log: Log, index: int) -> AnyReplica:
        self.started.append(self.spec.start(prompts, outputs, log, index))
        return self.started[-1]

    @property
    def caches(self) -> list:
        return [scheduler.cache for replica in self.started for scheduler in replica.schedulers]


def served(watched: Watched, requests: Requests) -> Log:
    return run(Deployment([watched]), requests)  # type: ignore[list-item]


@st.composite
def conversations(draw: st.DrawFn, answers: bool | None = None) -> Requests:
    """Requests many of which go on from earlier ones; with or without ids of their answers."""
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gap_s = draw(st.sampled_from([0.0, 5e-3, 5e-2, 0.5]))
    arrival_s = np.cumsum(rng.exponential(gap_s, count)) if gap_s else np.zeros(count)
    prompts = rng.integers(1, draw(st.sampled_from([40, 150])) + 1, count)
    outputs = rng.integers(1, draw(st.sampled_from([2, 30, 100])) + 1, count)
    parents = np.array([rng.integers(-1, index) if index else -1 for index in range(count)])
    most = np.minimum(prompts, (prompts + outputs)[parents])
    shared = np.where(parents >= 0, rng.integers(most // 2, most + 1), 0)
    hashes = descended(parents, shared, prompts, outputs, SIZE)
    if not (draw(st.booleans()) if answers is None else answers):
        rows = [hashes.row(i)[: -(-int(prompts[i]) // SIZE)] for i in range(count)]
        hashes = BlockHashes.of(rows, SIZE)
    return Requests(arrival_s, prompts, outputs, block_hashes=hashes)


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    return SchedulerConfig(
        draw(st.sampled_from(["chunked", "prefill-first", "orca"])),
        max_seqs=draw(st.sampled_from([1, 3, MAX_SEQS])),
        token_budget=draw(st.sampled_from([MAX_SEQS, 40, MAX_TOKENS])),
        block_tokens=draw(st.sampled_from([1, 4, 16])),
        max_context_tokens=draw(st.sampled_from([100, 240])),
        prefix_caching=draw(st.sampled_from(sorted(EVICTIONS))),
    )


POOLS = st.sampled_from([128, 240, 480, 4000])


def same_as_oracle(config: SchedulerConfig, pool: int, requests: Requests) -> Log:
    """First schedule, first token, finish, preemptions, cached tokens, and what is left in the cache."""
    blocks = pool // config.block_tokens
    watched = Watched(config, blocks)
    log = served(watched, requests)
    hashes = requests.block_hashes
    assert hashes is not None
    limits = oracle.OracleConfig(
        config.policy, config.max_seqs, config.token_budget, config.block_tokens, config.max_context_tokens, blocks
    )
    rows = [hashes.row(index) for index in range(len(requests))]
    scheduler = slow_rules.CachingScheduler(limits, rows, SIZE, config.prefix_caching)
    columns = (requests.arrival_s, requests.prompt_tokens, requests.output_tokens)
    mine = oracle.make_requests(*(column.tolist() for column in columns), False)
    env, steps = simpy.Environment(), oracle.Log(None)
    env.process(oracle.replica(env, scheduler, watched.spec.model.step_s, oracle.Arrivals(mine), steps))
    env.run()
    expected = oracle.result(mine, [scheduler], steps, False)
    for name in ("first_schedule_s", "first_token_s", "finish_s"):
        np.testing.assert_allclose(np.array(getattr(log, name)), expected[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert [log.preemptions.get(i, 0) for i in range(len(requests))] == expected["preemptions"].tolist()
    cache = watched.caches[0]
    assert cache.cached_tokens == {index: tokens for index, tokens in scheduler.found.items() if tokens}
    assert sorted(cache._blocks) == sorted(entry.block_id for entry in scheduler.cache.entries)
    return log


@CHECKED
@given(configs(), POOLS, conversations())
def test_times_and_hits_are_those_of_the_step_by_step_rules(
    config: SchedulerConfig, pool: int, requests: Requests
) -> None:
    same_as_oracle(config, pool, requests)


def test_a_prompt_interrupted_half_way_finds_what_it_had_computed() -> None:
    """A decode outgrows the pool after four chunks of 15 tokens of a prompt: 3 whole blocks of 16 stay."""
    config = SchedulerConfig("chunked", MAX_SEQS, MAX_SEQS, 1, 240, "lru")
    requests = Requests([0.0, 0.025], [16, 100], [20, 2])
    requests = replace(requests, block_hashes=private(requests.prompt_tokens, SIZE))
    log = same_as_oracle(config, 128, requests)
    assert log.preemptions == {1: 1}
    watched = Watched(config, 128)
    began = []
    form = Scheduler.form

    def watch(scheduler: Scheduler) -> bool:
        runs = form(scheduler)
        began.extend(before for request, _, before in scheduler.chunks if request == 1)
        if scheduler.cache is not None:
            assert scheduler.blocks_held() + scheduler.cache.idle_kv_blocks <= scheduler.kv_blocks
        return runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "form", watch)
        served(watched, requests)
    assert began[:5] == [0, 15, 30, 45, 48]


@CHECKED
@given(configs(), POOLS, conversations(), st.sampled_from(MAPPINGS))
def test_nothing_is_lost_and_the_pool_is_never_exceeded(
    config: SchedulerConfig, pool: int, requests: Requests, mapping: Mapping
) -> None:
    """All accepted requests end, all blocks are given back, hits leave a token to compute; on every kind of replica."""
    watched = Watched(config, pool // config.block_tokens, mapping)
    form = Scheduler.form

    def watch(scheduler: Scheduler) -> bool:
        runs = form(scheduler)
        assert scheduler.cache is not None
        if any(request != scheduler.partial for request, _, _ in scheduler.chunks):  # otherwise evicted in time
            assert 0 <= scheduler.cache.idle_kv_blocks <= scheduler.free
        return runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "form", watch)
        log = served(watched, requests)
    done = np.isfinite(np.array(log.finish_s))
    done[log.rejected] = ~done[log.rejected]
    assert done.all()
    for scheduler in watched.started[0].schedulers:
        assert scheduler.free == scheduler.kv_blocks
        assert scheduler.reserved == 0
        cache = scheduler.cache
        assert cache is not None and not cache._held
        assert cache.idle_kv_blocks == cache.cached_kv_blocks <= scheduler.kv_blocks
        assert cache.inserted - cache.evicted == len(cache._blocks)
        for request, tokens in cache.cached_tokens.items():
            assert 0 < tokens <= requests.prompt_tokens[request] - 1
    first, schedule = np.array(log.first_token_s), np.array(log.first_schedule_s)
    assert (schedule[np.isfinite(first)] < first[np.isfinite(first)]).all()


@CHECKED
@given(configs(), POOLS, conversations(), st.sampled_from(MAPPINGS))
def test_a_cache_without_shared_prefixes_changes_nothing(
    config: SchedulerConfig, pool: int, requests: Requests, mapping: Mapping
) -> None:
    """Unless a preempted request finds its own blocks again: those are left out."""
    blocks = pool // config.block_tokens
    alone = replace(requests, block_hashes=private(requests.prompt_tokens, SIZE))
    on, off, unknown = (
        served(Watched(c, blocks, mapping), r)
        for c, r in (
            (config, alone),
            (replace(config, prefix_caching="off"), requests),
            (config, replace(requests, block_hashes=None)),
        )
    )
    for name in ("first_schedule_s", "first_token_s", "finish_s"):
        times = [np.array(getattr(log, name)) for log in (on, off, unknown)]
        np.testing.assert_array_equal(times[1], times[2])
        if not off.preemptions:
            np.testing.assert_array_equal(times[0], times[1])


@CHECKED
@given(conversations(), st.sampled_from(sorted(EVICTIONS)))
def test_with_memory_and_time_enough_hits_are_those_of_a_cache_that_forgets_nothing(
    requests: Requests, policy: str
) -> None:
    """One request at a time: what it finds is what earlier prompts and answers have in common with it."""
    hashes = requests.block_hashes
    assert hashes is not None
    slow = replace(requests, arrival_s=10.0 * np.arange(len(requests)))
    config = SchedulerConfig("chunked", MAX_SEQS, MAX_TOKENS, 4, 300, policy)
    watched = Watched(config, 100_000)
    log = served(watched, slow)
    assert not log.rejected
    known: set[int] = set()
    found = {}
    for index in range(len(slow)):
        prompt, row = int(slow.prompt_tokens[index]), hashes.row(index)
        hits = sum(block in known for block in row[: (prompt - 1) // SIZE])
        if hits:
            found[index] = hits * SIZE
        whole = prompt // SIZE
        if len(row) > -(-prompt // SIZE):
            whole = (prompt + int(slow.output_tokens[index]) - 1) // SIZE
        known.update(row[:whole])
    cache = watched.caches[0]
    assert cache.cached_tokens == found
    assert cache.lookups == len(slow)
    assert hit_rate([cache]) == pytest.approx(
        sum(found.values()) / SIZE / sum(-(-int(prompt) // SIZE) for prompt in slow.prompt_tokens)
    )


def test_a_hit_shortens_the_prefill_and_two_users_hold_a_block_once() -> None:
    """96 of 100 prompt tokens are cached for the second and third request; these two share 24 blocks of 4."""
    count = 3
    rows = [[*range(6), 6 + index] for index in range(count)]
    hashes = BlockHashes.of(rows, SIZE)
    requests = Requests([0.0, 5.0, 5.0], [100] * count, [50] * count, block_hashes=hashes)
    config = SchedulerConfig("chunked", MAX_SEQS, MAX_TOKENS, 4, 240, "lru")
    watched = Watched(config, 62)  # 38 blocks a request alone, 38 + 14 for two that share; 76 if they did not
    log = served(watched, requests)
    assert watched.caches[0].cached_tokens == {1: 96, 2: 96}
    step_s = watched.spec.model.step_s
    first = np.array(log.first_token_s) - requests.arrival_s
    assert first[0] == pytest.approx(step_s(0, 0, [(100, 0)]))
    assert first[1] == first[2] == pytest.approx(step_s(0, 0, [(4, 96), (4, 96)]))
    assert not log.preemptions
    cold = served(Watched(replace(config, prefix_caching="off"), 62), requests)
    assert cold.preemptions or cold.first_token_s[2] > cold.first_token_s[1]


@dataclass(frozen=True)
class Straight:
    """One link, one stream; a token of KV is one byte."""

    links: tuple[int, ...] = (0,)
    shares: tuple[float, ...] = (1.0,)
    weight: float = 1.0
    latency_s: float = 0.0
    bytes_per_token: float = 1.0
    limit_bytes_per_s: float = inf


@CHECKED
@given(
    configs(),
    POOLS,
    conversations(),
    st.sampled_from([("prefill", "decode"), ("prefill", "mixed"), ("prefill", "prefill", "decode", "mixed")]),
    st.sampled_from([1e3, 1e9]),
)
def test_replicas_that_hand_their_kv_over_keep_what_they_must(
    config: SchedulerConfig, pool: int, requests: Requests, roles: tuple[Role, ...], bytes_per_s: float
) -> None:
    """A prompt's blocks are in use until they are sent, then cached; all are given back."""
    watched = [Watched(config, pool // config.block_tokens, role=role) for role in roles]
    handover = Handover([bytes_per_s], ["link"], lambda *_: Straight(), 4, "serialized", overlap_tokens=1)
    log = run(Deployment(watched, handover=handover), requests)  # type: ignore[arg-type]
    done = np.isfinite(np.array(log.finish_s))
    done[log.rejected] = ~done[log.rejected]
    assert done.all()
    for each in watched:
        for scheduler in each.started[0].schedulers:
            assert scheduler.free == scheduler.kv_blocks
            assert scheduler.reserved == 0
            assert scheduler.cache is not None and not scheduler.cache._held


def system_prompts(count: int = 400, kinds: int = 12) -> Requests:
    """Questions behind one of a dozen long contexts, drawn at random."""
    rng = np.random.default_rng(5)
    kind = rng.integers(kinds, size=count)
    requests = Requests(np.cumsum(rng.exponential(0.005, count)), rng.integers(170, 220, count), [8] * count)
    return of_contexts(requests, kind, np.full(count, 160), SIZE)


def test_looking_at_prefixes_finds_more_of_them_and_answers_sooner() -> None:
    """Four replicas with room for four contexts beside their work: every one can keep its own three of the twelve."""
    config = SchedulerConfig("chunked", MAX_SEQS, MAX_TOKENS, 16, 240, "lru")
    rate, ttft_s = {}, {}
    for name in ("round-robin", "least-tokens", "prefix-aware"):
        watched = [Watched(config, 70) for _ in range(4)]
        log = run(Deployment(watched, ROUTERS[name]), system_prompts())  # type: ignore[arg-type]
        rate[name] = hit_rate(cache for each in watched for cache in each.caches)
        ttft_s[name] = float(np.mean(np.array(log.first_token_s) - log.arrival_s))
        assert np.bincount(np.array(log.replica), minlength=4).min() > 60, name
    assert rate["prefix-aware"] > 1.8 * max(rate["round-robin"], rate["least-tokens"]), rate
    assert ttft_s["prefix-aware"] < 0.92 * min(ttft_s["round-robin"], ttft_s["least-tokens"]), ttft_s


def test_without_caches_it_is_the_router_of_fewest_tokens() -> None:
    config = SchedulerConfig("chunked", MAX_SEQS, MAX_TOKENS, 16, 240)
    logs = [
        run(Deployment([Watched(config, 70) for _ in range(3)], ROUTERS[name]), system_prompts())  # type: ignore[list-item]
        for name in ("prefix-aware", "least-tokens")
    ]
    assert logs[0].replica == logs[1].replica


def test_a_long_queue_outweighs_a_cached_prefix() -> None:
    """160 tokens of prefix are worth 1,600 outstanding ones."""
    choose, rng = ROUTERS["prefix-aware"].choose, np.random.default_rng(0)
    assert choose is not None
    for outstanding, chosen in ((1590, 0), (1610, 1)):
        loads = [Load(outstanding, 40), Load(0, 200)]
        assert choose(loads, np.ones(2), rng) == chosen


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SchedulerError, match="prefix_caching='mru': expected off, lru, lfu, fifo, length-aware"):
        SchedulerConfig(prefix_caching="mru")
    with pytest.raises(SchedulerError, match="prefix_caching with policy static"):
        SchedulerConfig("static", prefix_caching="lru")
    requests = Requests([0.0], [16], [1], block_hashes=BlockHashes.of([[0]], SIZE))
    with pytest.raises(SchedulerError, match="prefix hashes of 16 tokens a block: expected a multiple"):
        served(Watched(SchedulerConfig(block_tokens=24, prefix_caching="lru"), 100), requests)
