"""KV below the devices' memory: nothing is lost, no link carries more than it can, and loads only where they help."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.mapping import Mapping
from hwmodels.step_model import StepModel
from simulator.blockhashes import BlockHashes, private
from simulator.deployment import Deployment, Removal, Role
from simulator.handover import Handover
from simulator.kvtiers import HBM
from simulator.log import Log
from simulator.reuse import Tiering
from simulator.routers import ROUTERS
from simulator.scheduler import Scheduler, SchedulerConfig
from simulator.shares import Shares, Static
from simulator.simulate import run, simulate
from simulator.workload import Requests


def beside(name: str) -> Any:
    """Another file of tests, for what it builds."""
    found = importlib.util.spec_from_file_location(f"built_by_{name}", Path(__file__).with_name(f"{name}.py"))
    assert found is not None and found.loader is not None
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


prefixes, shared = beside("test_prefix_scheduling"), beside("test_shared")
SIZE, MAX_TOKENS, MAX_SEQS = prefixes.SIZE, prefixes.MAX_TOKENS, prefixes.MAX_SEQS
CHECKED, MAPPINGS, POOLS = prefixes.CHECKED, prefixes.MAPPINGS, prefixes.POOLS
configs, conversations, model = prefixes.configs, prefixes.conversations, prefixes.model
ENOUGH = 1e15  # bytes; a token of KV is one byte


class Watched(prefixes.Watched):  # type: ignore[misc]
    """As there, with its step model and its lanes."""

    @property
    def lanes(self) -> int:
        return self.spec.lanes  # type: ignore[no-any-return]

    @property
    def model(self) -> StepModel:
        return self.spec.model  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Straight:
    """One link, one stream."""

    links: tuple[int, ...]
    latency_s: float = 0.0
    shares: tuple[float, ...] = (1.0,)
    weight: float = 1.0
    bytes_per_token: float = 1.0
    limit_bytes_per_s: float = inf


#: Links of every replica: from and to host memory, from and to disks.
UP, DOWN, SSD_UP, SSD_DOWN = range(4)
WAYS = {
    ("host", HBM): UP, (HBM, "host"): DOWN, ("ssd", "host"): SSD_UP, ("host", "ssd"): SSD_DOWN,
    ("ssd", HBM): SSD_UP, (HBM, "ssd"): SSD_DOWN,
}  # fmt: skip


def tiering(
    replicas: int, capacities: dict[str, float], bytes_per_s: float, ssd_bytes_per_s: float = 1e3, latency_s: float = 0
) -> Tiering:
    rates = [bytes_per_s, bytes_per_s, ssd_bytes_per_s, ssd_bytes_per_s]
    names = [f"{name} {index}" for index in range(replicas) for name in ("up", "down", "ssd up", "ssd down")]

    def way(replica: int, lane: int, source: str, target: str) -> Straight:
        return Straight((4 * replica + WAYS[source, target],), latency_s)

    return Tiering(rates * replicas, names, way, [capacities] * replicas)


def served(watched: Sequence[Any], requests: Requests, tiers: Tiering | None, **other: Any) -> Log:
    return run(Deployment(watched, tiers=tiers, **other), requests)


def apart(requests: Requests, gap_s: float = 50.0) -> Requests:
    """One after the other."""
    return replace(requests, arrival_s=gap_s * np.arange(len(requests)))


TIERS = st.sampled_from([{"host": 320.0}, {"host": 5000.0}, {"host": 320.0, "ssd": 1600.0}, {"ssd": 1600.0}])
RATES = st.sampled_from([1e2, 1e4, 1e6, 1e30])


@CHECKED
@given(configs(), POOLS, conversations(), st.sampled_from(MAPPINGS), st.sampled_from([{"host": 0.0}, {"ssd": 15.0}]))
def test_tiers_without_room_for_a_block_change_nothing(
    config: SchedulerConfig, pool: int, requests: Requests, mapping: Mapping, none: dict[str, float]
) -> None:
    logs = [
        served([Watched(config, pool // config.block_tokens, mapping) for _ in range(2)], requests, tiers,
               router=ROUTERS["prefix-aware"])
        for tiers in (None, tiering(2, none, 1e4))
    ]  # fmt: skip
    for name in ("first_schedule_s", "first_token_s", "finish_s", "replica", "lane"):
        np.testing.assert_array_equal(*(np.array(getattr(log, name)) for log in logs))
    assert logs[0].cached_tokens == logs[1].cached_tokens
    assert not logs[1].tier_bytes.any()


@CHECKED
@given(conversations(), st.sampled_from(["lru", "lfu", "length-aware"]), st.sampled_from(MAPPINGS))
def test_with_room_below_for_all_and_links_that_cost_nothing_hits_are_those_of_a_cache_that_forgets_nothing(
    requests: Requests, policy: str, mapping: Mapping
) -> None:
    """One request at a time; the devices' memory holds hardly more than the longest."""
    hashes = requests.block_hashes
    assert hashes is not None
    slow = apart(requests)
    config = SchedulerConfig("chunked", MAX_SEQS, MAX_TOKENS, 4, 300, policy)
    log = served([Watched(config, 75, mapping)], slow, tiering(1, {"host": ENOUGH}, 1e30))
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
    assert set(log.lane) == {0}  # what another lane has in its own memory would not be found
    assert log.cached_tokens == found


def checked(watched: Sequence[Any], log: Log, requests: Requests, tiers: Tiering) -> None:
    """All accepted requests end, all blocks are given back, no link carries more than it can."""
    done = np.isfinite(np.array(log.finish_s))
    done[log.rejected] = ~done[log.rejected]
    assert done.all()
    for each in watched:
        for scheduler in each.started[0].schedulers:
            assert not scheduler.loading and not scheduler.loaded
            assert scheduler.free == scheduler.kv_blocks
            assert scheduler.reserved == 0 and scheduler.unfinished == 0
            assert scheduler.cache is not None and not scheduler.cache._held
    for request, tokens in log.cached_tokens.items():
        assert 0 < tokens <= requests.prompt_tokens[request] - 1
        assert log.loaded_tokens.get(request, 0) <= tokens
    served_s = np.array(log.finish_s)[np.isfinite(log.finish_s)]
    if len(served_s):  # what is evicted last goes down after the last answer
        span_s = max(float(served_s.max()) - float(log.arrival_s.min()), 0.0)
        up = log.tier_bytes.reshape(-1, 4)[:, UP] / np.array(tiers.bytes_per_s).reshape(-1, 4)[:, UP]
        assert (up <= span_s * (1 + 1e-9)).all()
    if not any("ssd" in held for held in tiers.capacity_bytes):
        assert log.tier_bytes.reshape(-1, 4)[:, UP].sum() == pytest.approx(log.loaded_bytes)
        assert log.tier_bytes.reshape(-1, 4)[:, DOWN].sum() == pytest.approx(log.stored_bytes)
        assert log.loaded_bytes >= sum(log.loaded_tokens.values())


@CHECKED
@given(configs(), POOLS, conversations(), st.sampled_from(MAPPINGS), TIERS, RATES, st.sampled_from([0.0, 1e-3]))
def test_nothing_is_lost_and_no_link_carries_more_than_it_can(
    config: SchedulerConfig,
    pool: int,
    requests: Requests,
    mapping: Mapping,
    below: dict[str, float],
    bytes_per_s: float,
    latency_s: float,
) -> None:
    watched = [Watched(config, pool // config.block_tokens, mapping) for _ in range(2)]
    tiers = tiering(2, below, bytes_per_s, latency_s=latency_s)
    form = Scheduler.form

    def watch(scheduler: Scheduler) -> bool:
        runs = form(scheduler)
        assert scheduler.blocks_held(1 if scheduler.decode_runs else 0) <= scheduler.kv_blocks
        assert not scheduler.loading.keys() & {request for request, _, _ in scheduler.chunks}
        return runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "form", watch)
        log = served(watched, requests, tiers, router=ROUTERS["prefix-aware"])
    checked(watched, log, requests, tiers)


@CHECKED
@given(
    configs(), POOLS, conversations(), TIERS, RATES,
    st.sampled_from([("prefill", "decode"), ("prefill", "mixed"), ("prefill", "prefill", "decode", "mixed")]),
    st.sampled_from(["serialized", "layer-wise"]), st.booleans(),
)  # fmt: skip
def test_prompts_that_are_handed_over_load_what_was_evicted(
    config: SchedulerConfig,
    pool: int,
    requests: Requests,
    below: dict[str, float],
    bytes_per_s: float,
    roles: tuple[Role, ...],
    mode: Any,
    fails: bool,
) -> None:
    """With what was found or loaded all of a prompt's KV is sent; a replica that fails takes nothing along."""
    watched = [Watched(config, pool // config.block_tokens, role=role) for role in roles]
    handover = Handover([1e4], ["link"], lambda *_: prefixes.Straight(), 4, mode, overlap_tokens=1)
    tiers = tiering(len(roles), below, bytes_per_s)
    removals = [Removal(float(requests.arrival_s[-1]) + 5e-3, 0)] if fails and len(roles) == 4 else []
    log = served(watched, requests, tiers, handover=handover, removals=removals, router=ROUTERS["prefix-aware"])
    if not removals:
        checked(watched, log, requests, tiers)
        lost = set(log.preemptions)
        for request, _, _, nbytes, *_ in log.transfers:
            if request not in lost:
                assert nbytes == pytest.approx(requests.prompt_tokens[request])
    done = np.isfinite(np.array(log.finish_s))
    done[log.rejected] = ~done[log.rejected]
    assert done.all()


@CHECKED
@given(conversations(), TIERS, RATES, st.sampled_from([None, 15.0]))
def test_replicas_whose_phases_share_a_device_go_on_while_kv_is_loaded(
    requests: Requests, below: dict[str, float], bytes_per_s: float, ageing: float | None
) -> None:
    config = SchedulerConfig("chunked", MAX_SEQS, 64, 4, 240, "lru")
    watched = Watched(config, 60)
    watched.spec = shared.spec(Static(Shares(0.6, 0.7)), config, 60, ageing=ageing)
    tiers = tiering(1, below, bytes_per_s)
    checked([watched], served([watched], requests, tiers), requests, tiers)


@CHECKED
@given(conversations(), TIERS, RATES, st.sampled_from([0.0, 1e-3]), st.sampled_from(["chunked", "prefill-first"]))
def test_a_lone_request_is_never_answered_later_for_what_it_loads(
    requests: Requests, below: dict[str, float], bytes_per_s: float, latency_s: float, policy: Any
) -> None:
    config = SchedulerConfig(policy, MAX_SEQS, 64 if policy == "chunked" else MAX_TOKENS, 4, 240, "lru")
    slow = apart(requests)
    logs = [
        served([Watched(config, 60)], slow, tiers)
        for tiers in (None, tiering(1, below, bytes_per_s, bytes_per_s / 10, latency_s))
    ]
    before, after = (np.array(log.first_token_s) - log.arrival_s for log in logs)
    served_s = np.isfinite(before)
    assert (after[served_s] <= before[served_s] * (1 + 1e-9) + 1e-12).all()
    loaded = list(logs[1].loaded_tokens)
    if bytes_per_s > 1e20 and not latency_s:
        assert (after[loaded] < before[loaded]).all()


def three(prefix_blocks: int = 6) -> Requests:
    """A prompt, one that drives it out of a memory of 60 blocks of 4 tokens, and one that begins as the first."""
    rows = [[*range(prefix_blocks), 90], [*range(20, 35)], [*range(prefix_blocks), 91]]
    return Requests([0.0, 10.0, 20.0], [100, 236, 100], [2, 2, 2], block_hashes=BlockHashes.of(rows, SIZE))


CONFIG = SchedulerConfig("chunked", MAX_SEQS, MAX_TOKENS, 4, 240, "lru")


@pytest.mark.parametrize(("bytes_per_s", "loads"), [(96 / 0.9e-3, True), (96 / 1.2e-3, False)])
def test_a_prefix_is_loaded_or_computed_whichever_is_over_first(bytes_per_s: float, loads: bool) -> None:
    """Computing 96 tokens more adds 1.05 ms to the step."""
    watched = Watched(CONFIG, 60)
    log = served([watched], three(), tiering(1, {"host": ENOUGH}, bytes_per_s))
    step_s = watched.spec.model.step_s
    ttft_s = log.first_token_s[2] - 20.0
    if loads:
        assert log.loaded_tokens == {2: 96}
        assert ttft_s == pytest.approx(96 / bytes_per_s + step_s(0, 0, [(4, 96)]), rel=1e-9)
        assert list(log.loads_s) == pytest.approx([96 / bytes_per_s])
        assert log.loaded_bytes == 96
    else:
        assert not log.loaded_tokens
        assert ttft_s == pytest.approx(step_s(0, 0, [(100, 0)]))
    assert log.stored_bytes >= 96


def test_what_lies_on_disks_comes_up_through_host_memory() -> None:
    """Host memory holds 14 blocks, of which a second long prompt leaves none for the prefix of 6."""
    rows = [[*range(6), 90], [*range(20, 35)], [*range(40, 55)], [*range(6), 91]]
    hashes = BlockHashes.of(rows, SIZE)
    requests = Requests([0.0, 10.0, 20.0, 30.0], [100, 236, 236, 100], [2] * 4, block_hashes=hashes)
    for host, load_s in ((ENOUGH, 3e-4), (14.0 * SIZE, 9e-4), (0.0, 6e-4)):
        watched = Watched(CONFIG, 60)
        tiers = tiering(1, {"host": host, "ssd": ENOUGH}, 96 / 3e-4, 96 / 6e-4)
        log = served([watched], requests, tiers)
        assert list(log.loads_s) == pytest.approx([load_s])
        assert log.loaded_tokens == {3: 96}
        assert log.first_token_s[3] - 30.0 == pytest.approx(load_s + watched.spec.model.step_s(0, 0, [(4, 96)]))
        assert log.tier_bytes[SSD_UP] == (0.0 if host == ENOUGH else 96.0)


def test_two_loads_at_once_share_the_link_and_others_run_meanwhile() -> None:
    rows = [[*range(6), 90], [*range(20, 35)], [*range(6), 91], [*range(6), 92], [93]]
    hashes = BlockHashes.of(rows, SIZE)
    requests = Requests([0.0, 10.0, 20.0, 20.0, 20.0], [100, 236, 100, 100, 10], [2] * 5, block_hashes=hashes)
    watched = Watched(CONFIG, 60)
    bytes_per_s = 96 / 0.45e-3
    log = served([watched], requests, tiering(1, {"host": ENOUGH}, bytes_per_s))
    assert log.loaded_tokens == {2: 96, 3: 96}
    assert list(log.loads_s) == pytest.approx([0.9e-3] * 2)
    first = watched.spec.model.step_s(0, 0, [(10, 0)])
    assert log.first_token_s[4] - 20.0 == pytest.approx(first)  # longer than the loads
    assert log.first_schedule_s[2] == pytest.approx(20.0 + first)
    assert log.first_token_s[2] == log.first_token_s[3]


@pytest.mark.parametrize(("down_s", "loads"), [(2e-4, True), (1.0, False)])
def test_nobody_waits_for_what_takes_long_to_go_down(down_s: float, loads: bool) -> None:
    """The first prompt is wanted again right after it was driven out: 96 bytes go down in down_s and up in no time."""
    requests = replace(three(), arrival_s=np.array([0.0, 10.0, 10.001]))
    watched = Watched(SchedulerConfig("chunked", 1, MAX_TOKENS, 4, 240, "lru"), 60)
    tiers = tiering(1, {"host": ENOUGH}, 1e30)
    slow = replace(tiers, bytes_per_s=[1e30, 96 / down_s, 1e30, 1e30])
    log = served([watched], replace(requests, output_tokens=np.array([2, 1, 2])), slow)
    assert (2 in log.loaded_tokens) == loads
    ends_s, step_s = log.finish_s[1], watched.spec.model.step_s
    expected = step_s(0, 0, [(4, 96)] if loads else [(100, 0)])
    assert log.first_token_s[2] - ends_s == pytest.approx(expected)


def test_the_run_tells_what_was_found_loaded_and_moved() -> None:
    tiers = tiering(1, {"host": ENOUGH}, 1e6)
    use = simulate(Deployment([prefixes.Watched(CONFIG, 60).spec], tiers=tiers), three()).caching
    assert use is not None
    assert (use.prompt_tokens, use.found_tokens, use.loaded_tokens, use.loads) == (436, 0, 96, 1)
    assert use.hit_rate == pytest.approx(96 / 436)
    assert use.load_mean_s == pytest.approx(96e-6)
    carried = {name: nbytes for name, _, nbytes in use.links}
    assert carried["up 0"] == use.loaded_bytes == 96
    assert carried["down 0"] == use.stored_bytes
    alone = replace(three(), block_hashes=private(three().prompt_tokens, SIZE))
    nothing = simulate(Deployment([prefixes.Watched(CONFIG, 60).spec]), alone).caching
    assert nothing is not None and nothing.hit_rate == 0.0
    assert simulate(Deployment([prefixes.Watched(CONFIG, 60).spec]), replace(alone, block_hashes=None)).caching is None


@pytest.mark.parametrize("mode", ["serialized", "layer-wise"])
def test_kv_found_cached_is_sent_like_any_other(mode: Any) -> None:
    """96 of 100 tokens are found, all 100 are sent, and only a layer of the 4 computed ones is left at the end."""
    rows = [[*range(6), 90], [*range(6), 91]]
    requests = Requests([0.0, 10.0], [100, 100], [2, 2], block_hashes=BlockHashes.of(rows, SIZE))
    watched = [Watched(CONFIG, 100, role=role) for role in ("prefill", "decode")]
    bytes_per_s, layers = 1e6, 4
    handover = Handover([bytes_per_s], ["link"], lambda *_: prefixes.Straight(), layers, mode, overlap_tokens=1)
    log = served(watched, requests, None, handover=handover)
    assert log.cached_tokens == {1: 96}
    last = 100 if mode == "serialized" else 4 / layers
    step_s = watched[0].spec.model.step_s(0, 0, [(4, 96)])
    assert log.first_token_s[1] - 10.0 == pytest.approx(step_s + last / bytes_per_s, rel=1e-9)
    assert [nbytes for _, _, _, nbytes, *_ in log.transfers] == pytest.approx([100, 100])
