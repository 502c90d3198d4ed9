"""A cache of prefixes does what a list searched from end to end does, and forgets in the order of its policy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.blockhashes import BlockHashes, shared_blocks
from simulator.errors import SchedulerError
from simulator.prefixcache import EVICTIONS, PrefixCache, hit_rate, kv_per_block
from simulator.sessions import descended

spec = importlib.util.spec_from_file_location("prefix_oracle", Path(__file__).with_name("prefix_oracle.py"))
assert spec is not None and spec.loader is not None
slow_rules = importlib.util.module_from_spec(spec)
sys.modules["prefix_oracle"] = slow_rules
spec.loader.exec_module(slow_rules)
SlowCache = slow_rules.SlowCache

SIZE, PER_BLOCK = 4, 2


def family(seed: int, count: int) -> tuple[BlockHashes, list[int], list[int]]:
    """Prompts that go on from one another, with answers that have ids."""
    rng = np.random.default_rng(seed)
    prompts, outputs = rng.integers(1, 40, count), rng.integers(1, 12, count)
    parents = np.array([rng.integers(-1, index) if index else -1 for index in range(count)])
    most = np.minimum(prompts, (prompts + outputs)[parents])
    shared = np.where(parents >= 0, rng.integers(most // 2, most + 1), 0)
    return descended(parents, shared, prompts, outputs, SIZE), prompts.tolist(), outputs.tolist()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(EVICTIONS)), st.sampled_from([0, 6, 20, 1000]))
def test_the_cache_is_the_brute_force_one(seed: int, policy: str, room: int) -> None:
    """Under random interleavings of admissions, completions, endings and shortages."""
    hashes, prompts, outputs = family(seed, 30)
    fast = PrefixCache(hashes, prompts, PER_BLOCK, policy)
    slow = SlowCache([hashes.row(request) for request in range(30)], policy, PER_BLOCK)
    rng = np.random.default_rng(seed)
    waiting, started, computed = list(range(30)), [], []
    while waiting or started or computed:
        act = rng.integers(4)
        if act == 0 and waiting:
            request = waiting.pop(0)
            most = (prompts[request] - 1) // SIZE
            found = slow.prefix(request, most)
            assert fast.peek(request, prompts[request] - 1) == len(found) * SIZE
            assert fast.find(request, prompts[request] - 1) == len(found) * SIZE
            assert fast.shared == PER_BLOCK * sum(bool(entry.users) for entry in found)
            fast.take(request)
            slow.take(request, most)
            started.append(request)
        elif act == 1 and started:
            request = started.pop(int(rng.integers(len(started))))
            whole = prompts[request] // SIZE
            assert fast.complete(request, prompts[request]) == slow.complete(request, whole)
            computed.append(request)
        elif act == 2 and computed:
            request = computed.pop(int(rng.integers(len(computed))))
            tokens = prompts[request] + outputs[request] - 1
            assert fast.release(request, tokens) == slow.release(request, tokens // SIZE)
        elif act == 3 and started and rng.random() < 0.3:
            request = started.pop()  # interrupted in the middle of its prompt
            tokens = int(rng.integers((prompts[request] - 1) // SIZE * SIZE, prompts[request] + 1))
            assert fast.release(request, tokens) == slow.release(request, tokens // SIZE)
        allowed = int(rng.integers(room + 1))
        fast.make_room(allowed)
        slow.make_room(allowed)
        assert fast.cached_kv_blocks == PER_BLOCK * len(slow.entries)
        assert fast.idle_kv_blocks == PER_BLOCK * sum(not entry.users for entry in slow.entries) <= allowed
        assert fast.inserted - fast.evicted == len(slow.entries)
    fast.make_room(0)
    assert fast.cached_kv_blocks == 0


def serve(cache: PrefixCache, request: int, outputs: int = 1) -> int:
    """Admit, compute and end a request at once; the blocks it found."""
    prompt = cache.prompts[request]
    found = cache.find(request, prompt - 1) // SIZE
    cache.take(request)
    cache.complete(request, prompt)
    cache.release(request, prompt + outputs - 1)
    return found


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(EVICTIONS)))
def test_one_after_another_without_a_limit_they_find_what_a_cache_that_forgets_nothing_finds(
    seed: int, policy: str
) -> None:
    """Less at most the blocks an answer's last token completes or that would leave nothing to compute."""
    hashes, prompts, outputs = family(seed, 30)
    cache = PrefixCache(hashes, prompts, PER_BLOCK, policy)
    found = [serve(cache, request, outputs[request]) for request in range(30)]
    ideal = shared_blocks(hashes)
    known: set[int] = set()
    for request in range(30):
        row = hashes.row(request)
        reachable = [block for block in row[: (prompts[request] - 1) // SIZE] if block in known]
        assert found[request] == len(reachable) <= ideal[request]
        known.update(row[: (prompts[request] + outputs[request] - 1) // SIZE])
    assert cache.hit_tokens == sum(found) * SIZE == sum(cache.cached_tokens.values())
    assert cache.lookups == 30


def chains(*rows: list[int]) -> PrefixCache:
    """Prompts of whole blocks and one token more."""
    return PrefixCache(
        BlockHashes.of([[*row, -1 - index] for index, row in enumerate(rows)], SIZE),
        [SIZE * len(row) + 1 for row in rows],
        PER_BLOCK,
    )


def test_a_known_answer() -> None:
    """Room for three blocks: A B, then A C (B is used least recently), then A B D again finds A alone."""
    cache = chains([0, 1], [0, 2], [0, 1, 3], [0, 1, 3])
    assert serve(cache, 0) == 0
    assert serve(cache, 1) == 1
    assert cache.peek(2, 100) == 2 * SIZE
    cache.make_room(2 * PER_BLOCK)  # the end of the chain used longest ago goes: block 1
    assert cache.evicted == 1
    assert serve(cache, 2) == 1
    assert serve(cache, 3) == 3
    assert hit_rate([cache]) == pytest.approx((0 + 1 + 1 + 3) / (3 + 3 + 4 + 4))
    assert cache.cached_tokens == {1: 4, 2: 4, 3: 12}


def test_policies_forget_in_their_own_order() -> None:
    """0-1 was used twice, 5 once and last, 7-8-9 once and first."""
    for policy, left in (("lru", [0, 5]), ("lfu", [0, 1]), ("fifo", [0, 5]), ("length-aware", [0, 1])):
        cache = chains([7, 8, 9], [0, 1], [0, 1], [5])
        cache._evict = EVICTIONS[policy]
        for request in range(4):
            serve(cache, request)
        cache.make_room(2 * PER_BLOCK)
        assert sorted(cache._blocks) == left, policy
    first = chains([0, 1, 2], [5])
    first._evict = EVICTIONS["length-aware"]
    second = chains([0, 1, 2], [5])
    for cache in (first, second):
        serve(cache, 1)
        serve(cache, 0)
        cache.make_room(3 * PER_BLOCK)
    assert sorted(first._blocks) == [0, 1, 5]  # the deepest goes
    assert sorted(second._blocks) == [0, 1, 2]  # the oldest goes


def test_the_last_id_of_a_prompt_that_ends_within_its_block_is_never_shared() -> None:
    """Its tokens may be the same, the KV behind them is not: the answer goes on in the same block."""
    cache = PrefixCache(BlockHashes.of([[0, 1], [0, 1]], SIZE), [6, 6], PER_BLOCK)
    assert serve(cache, 0, 40) == 0
    assert cache.cached_kv_blocks == PER_BLOCK
    assert serve(cache, 1) == 1


def test_outdated_entries_do_not_pile_up() -> None:
    """The order of eviction stays as long as the cache, however often a prefix is used."""
    cache = chains(*([0, 1, 2] for _ in range(5000)))
    for request in range(5000):
        serve(cache, request)
    assert cache.cached_kv_blocks == 3 * PER_BLOCK
    assert len(cache._heap) < 2000
    assert cache.lookups == 5000 and cache.hit_blocks == 3 * 4999


def test_hash_blocks_are_whole_kv_blocks() -> None:
    hashes = BlockHashes.of([[0]], 512)
    assert [kv_per_block(hashes, tokens) for tokens in (16, 64, 512)] == [32, 8, 1]
    for tokens in (24, 1024):
        with pytest.raises(SchedulerError, match="prefix hashes of 512 tokens a block: expected a multiple of the KV"):
            kv_per_block(hashes, tokens)
