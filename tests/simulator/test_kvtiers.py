"""Tiers below HBM: never over capacity, exclusive or inclusive as asked, and every byte accounted for."""

from __future__ import annotations

import gzip
import json
from collections import Counter, OrderedDict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.kvtiers import EVICTIONS, HBM, Move, Tier, TieredStore, TierError, fifo, lfu

BLOCK = 100.0


def tier(name: str, blocks: int, read: float = 1e3, write: float = 1e3, latency_s: float = 0.0) -> Tier:
    return Tier(name, blocks * BLOCK, read, write, latency_s)


def store(*rooms: int, **options: object) -> TieredStore:
    names = ("host", "ssd", "remote")
    return TieredStore([tier(name, room) for name, room in zip(names, rooms, strict=False)], BLOCK, **options)


def links(moves: list[Move]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(move.source, move.target, move.blocks) for move in moves]


# By hand.


def test_evicted_blocks_are_written_to_the_nearest_tier_and_found_there() -> None:
    kept = store(4, 4)
    (move,) = kept.evicted([1, 2, 3])
    assert (move.source, move.target, move.nbytes) == (HBM, "host", 3 * BLOCK)
    assert [(run.tier, run.start, run.blocks) for run in kept.lookup([1, 2, 9, 3])] == [("host", 0, 2)]
    assert kept.held_bytes("host") == 3 * BLOCK


def test_a_full_tier_demotes_what_is_longest_unused_and_the_last_one_drops_it() -> None:
    kept = store(2, 2)
    kept.evicted([1, 2])
    assert links(kept.evicted([3])) == [(HBM, "host", (3,)), ("host", "ssd", (2,))]  # the end of a prompt goes first
    assert links(kept.evicted([4, 5])) == [(HBM, "host", (4, 5)), ("host", "ssd", (1, 3))]
    assert kept.dropped == 1
    assert 2 not in kept


def test_what_exceeds_a_tier_is_written_straight_to_the_next() -> None:
    kept = store(2, 3)
    assert links(kept.evicted([1, 2, 3, 4])) == [(HBM, "host", (1, 2)), (HBM, "ssd", (3, 4))]
    assert [(run.tier, run.blocks) for run in kept.lookup([1, 2, 3, 4])] == [("host", 2), ("ssd", 2)]


def test_a_tier_without_room_is_passed_by() -> None:
    kept = store(2, 0, 2)
    kept.evicted([1, 2])
    assert links(kept.evicted([3])) == [(HBM, "host", (3,)), ("host", "remote", (2,))]


def test_loading_takes_a_block_out_of_exclusive_tiers() -> None:
    kept = store(1, 2)
    kept.evicted([1, 2])
    assert links(kept.fetch([1, 2])) == [("host", HBM, (1,)), ("ssd", HBM, (2,))]
    assert not kept.lookup([1])


def test_loading_copies_a_block_up_inclusive_tiers_and_keeps_it() -> None:
    kept = store(1, 2, inclusive=True)
    assert links(kept.evicted([1, 2])) == [(HBM, "host", (1,)), ("host", "ssd", (1,)), (HBM, "ssd", (2,))]
    kept.evicted([3])  # drops 2, which is longest unused
    assert kept.held_blocks("ssd") == {1, 3}
    assert links(kept.fetch([1])) == [("ssd", "host", (1,)), ("host", HBM, (1,))]
    assert kept.held_blocks("host") == {1}


def test_write_through_writes_when_completed_and_not_again_when_evicted() -> None:
    kept = store(2, write_through=True)
    assert links(kept.completed([1, 2])) == [(HBM, "host", (1, 2))]
    assert kept.evicted([1, 2]) == []
    kept.completed([3])
    assert links(kept.evicted([1, 2])) == [(HBM, "host", (2,))]  # 2 had to go for 3
    assert store(2).completed([1]) == []


def test_prefetch_brings_blocks_up_before_they_are_needed() -> None:
    kept = store(2, 4)
    kept.evicted([1, 2])
    kept.evicted([3, 4])
    assert links(kept.prefetch([1, 2])) == [("ssd", "host", (1, 2)), ("host", "ssd", (4, 3))]
    assert links(kept.fetch([1, 2])) == [("host", HBM, (1, 2))]
    three = store(1, 1, 2)
    three.evicted([1, 2, 3])
    assert links(three.prefetch([1, 2, 3], "ssd")) == []  # 2 is there, and it has no room for 3
    with pytest.raises(TierError, match="'tape'"):
        three.prefetch([1], "tape")


def test_a_move_waits_for_the_one_that_brings_its_blocks() -> None:
    kept = store(2, 2)
    (written,) = kept.evicted([1, 2])
    _, demoted = kept.evicted([3, 4])
    assert demoted.after == (written.serial,)
    (loaded,) = kept.fetch([1])
    assert loaded.after == (demoted.serial,)
    kept.landed(demoted)
    kept.landed(loaded)
    assert kept.fetch([2])[0].after == ()


def test_a_move_is_as_fast_as_its_slower_end() -> None:
    tiers = [tier("host", 1, read=50.0, write=40.0, latency_s=1.0), tier("ssd", 1, read=10.0, write=5.0, latency_s=2.0)]
    kept = TieredStore(tiers, BLOCK)
    (written,) = kept.evicted([1])
    assert written.alone_s == 1.0 + BLOCK / 40.0
    _, demoted = kept.evicted([2])
    assert demoted.alone_s == 3.0 + BLOCK / 5.0
    assert kept.fetch([1])[0].alone_s == 2.0 + BLOCK / 10.0


def test_least_often_used_and_first_in_go_first() -> None:
    often = store(2, eviction=lfu)
    often.evicted([1])
    often.evicted([2])
    often.touch([1])
    often.evicted([3])
    assert often.held_blocks("host") == {1, 3}
    first = store(2, eviction=fifo)
    first.evicted([1])
    first.evicted([2])
    first.touch([1])
    first.evicted([3])
    assert first.held_blocks("host") == {2, 3}


@pytest.mark.parametrize(
    ("tiers", "options", "said"),
    [
        ([], {}, "at least one"),
        ([tier("host", 1), tier("host", 1)], {}, "name of its own"),
        ([tier("host", 2), tier("ssd", 1)], {"inclusive": True}, "at least what is above"),
    ],
)
def test_tiers_that_cannot_be(tiers: list[Tier], options: dict[str, bool], said: str) -> None:
    with pytest.raises(TierError, match=said):
        TieredStore(tiers, BLOCK, **options)


def test_a_tier_needs_a_name_a_size_and_speeds() -> None:
    for values in ((HBM, 1.0, 1.0, 1.0), ("a", -1.0, 1.0, 1.0), ("a", float("inf"), 1.0, 1.0), ("a", 1.0, 0.0, 1.0)):
        with pytest.raises(TierError):
            Tier(*values)
    with pytest.raises(TierError, match="block_bytes=0"):
        TieredStore([tier("host", 1)], 0)


# A trace: Mooncake's conversations, blocks of 512 tokens.

TRACE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "traces" / "mooncake_conversation_trace.jsonl.gz"


@pytest.mark.skipif(not TRACE.exists(), reason=f"no reference data at {TRACE.name}")
def test_hit_rates_of_the_conversation_trace() -> None:
    """36.6 % of the blocks with room for all.

    Of the first 2,000 conversations exclusive tiers of 500 and 5,000 blocks serve as much as one of 5,500, inclusive
    ones as much as the larger alone.
    """
    with gzip.open(TRACE, "rt") as lines:
        prompts = [json.loads(line)["hash_ids"] for line in lines]

    def hit_rate(asked: list[list[int]], *rooms: int, inclusive: bool = False) -> float:
        kept, hits = store(*rooms, inclusive=inclusive), 0
        for blocks in asked:
            hits += sum(run.blocks for run in kept.lookup(blocks))
            kept.fetch(blocks)
            kept.evicted(blocks)
        return hits / sum(map(len, asked))

    assert hit_rate(prompts, 200_000) == pytest.approx(0.366, abs=5e-4)
    first = prompts[:2000]
    both = hit_rate(first, 500, 5000)
    assert both == hit_rate(first, 5500)
    assert hit_rate(first, 500, 5000, inclusive=True) == hit_rate(first, 5000, inclusive=True) < both


# Laws.

NAMES = ["evicted", "completed", "fetch", "prefetch", "touch"]


def operations_of(seed: int, count: int) -> list[tuple[str, list[int]]]:
    """Operations on prompts that are paths in a tree with two children a node, those of block n being 2n and 2n + 1."""
    rng = np.random.default_rng(seed)
    leaves = (2 ** rng.uniform(0, 6, count)).astype(int).tolist()
    prompts = [[leaf >> shift for shift in reversed(range(leaf.bit_length()))] for leaf in leaves]
    return list(zip(rng.choice(NAMES, count, p=[0.4, 0.1, 0.3, 0.1, 0.1]).tolist(), prompts, strict=True))


OPERATIONS = st.builds(operations_of, st.integers(0, 2**32 - 1), st.integers(0, 80))
ROOMS = st.lists(st.integers(0, 12), min_size=1, max_size=3)


def contents(kept: TieredStore) -> list[frozenset[int]]:
    return [kept.held_blocks(known.name) for known in kept.tiers]


@given(ROOMS, OPERATIONS, st.sampled_from(sorted(EVICTIONS)), st.booleans(), st.booleans())
def test_capacity_places_and_bytes(
    rooms: list[int], operations: list[tuple[str, list[int]]], eviction: str, inclusive: bool, write_through: bool
) -> None:
    """After every operation no tier is over capacity, tiers are exclusive or inclusive, moves explain what is where.

    A block moved was at its source before the operation or came there by an earlier move of it; a block held was there
    before or was moved there.
    """
    rooms = sorted(rooms) if inclusive else rooms
    kept = store(*rooms, eviction=EVICTIONS[eviction], inclusive=inclusive, write_through=write_through)
    total: Counter[tuple[str, str]] = Counter()
    for operation, blocks in operations:
        before = kept.lookup(blocks)
        replayed = {known.name: set(kept.held_blocks(known.name)) for known in kept.tiers}
        moves = getattr(kept, operation)(blocks) or []
        for move in moves:
            assert move.nbytes == len(move.blocks) * BLOCK > 0
            assert len(set(move.blocks)) == len(move.blocks)
            assert move.source != move.target
            assert move.source == HBM or set(move.blocks) <= replayed[move.source]
            if move.target != HBM:
                replayed[move.target] |= set(move.blocks)
            total[move.source, move.target] += move.nbytes
        if operation == "fetch":
            loaded = [block for move in moves if move.target == HBM for block in move.blocks]
            assert sorted(loaded) == sorted(blocks[: sum(run.blocks for run in before)])
        held = contents(kept)
        for known, room, blocks_held in zip(kept.tiers, rooms, held, strict=True):
            assert len(blocks_held) <= room
            assert blocks_held <= replayed[known.name]
        for upper, lower in pairwise(held):
            assert upper <= lower if inclusive else not upper & lower
        if not inclusive:
            assert sum(map(len, held)) == len(frozenset().union(*held))
    assert kept.moved_bytes == dict(total)


@given(ROOMS, OPERATIONS, st.sampled_from(sorted(EVICTIONS)))
def test_exclusive_bytes_in_are_bytes_out_or_held_or_dropped(
    rooms: list[int], operations: list[tuple[str, list[int]]], eviction: str
) -> None:
    """Stores of blocks the tiers already hold bring nothing in but replace what is there, so they are left out."""
    kept = store(*rooms, eviction=EVICTIONS[eviction])
    lost_on_the_way = 0
    for operation, blocks in operations:
        if operation == "evicted":
            blocks = [block for block in blocks if block not in kept]
            lost_on_the_way += max(0, len(blocks) - sum(rooms))
        getattr(kept, operation)(blocks)
    into = sum(nbytes for (source, _), nbytes in kept.moved_bytes.items() if source == HBM)
    out = sum(nbytes for (_, target), nbytes in kept.moved_bytes.items() if target == HBM)
    held = sum(map(len, contents(kept)))
    assert into + lost_on_the_way * BLOCK == out + (held + kept.dropped) * BLOCK


@given(OPERATIONS, st.booleans())
def test_with_room_for_all_nothing_is_lost(operations: list[tuple[str, list[int]]], inclusive: bool) -> None:
    """Every block given to the store and, if exclusive, not taken out again is found."""
    kept = store(2, 64) if not inclusive else store(64, 64, inclusive=True)
    there: set[int] = set()
    for operation, blocks in operations:
        if operation == "evicted":
            there |= set(blocks)
        if operation == "fetch" and not inclusive:
            run = next((i for i, block in enumerate(blocks) if block not in there), len(blocks))
            there -= set(blocks[:run])
        getattr(kept, operation)(blocks)
        assert frozenset().union(*contents(kept)) == there
    assert kept.dropped == 0


@given(ROOMS, OPERATIONS)
def test_exclusive_lru_tiers_hold_what_one_of_their_size_would(
    rooms: list[int], operations: list[tuple[str, list[int]]]
) -> None:
    tiers, one = store(*rooms), store(sum(rooms))
    for operation, blocks in operations:
        if operation in ("evicted", "fetch"):
            getattr(tiers, operation)(blocks)
            getattr(one, operation)(blocks)
        assert frozenset().union(*contents(tiers)) == one.held_blocks("host")
        assert tiers.dropped == one.dropped


@given(st.integers(0, 8), st.integers(0, 8), OPERATIONS)
def test_a_larger_lru_tier_holds_all_that_a_smaller_one_does(
    room: int, more: int, operations: list[tuple[str, list[int]]]
) -> None:
    small, large = store(room, inclusive=True), store(room + more, inclusive=True)
    for operation, blocks in operations:
        if operation == "evicted":
            small.evicted(blocks)
            large.evicted(blocks)
        assert small.held_blocks("host") <= large.held_blocks("host")


@given(st.integers(0, 8), OPERATIONS)
def test_one_exclusive_lru_tier_is_an_ordered_dictionary(room: int, operations: list[tuple[str, list[int]]]) -> None:
    kept = store(room)
    oracle: OrderedDict[int, None] = OrderedDict()
    for operation, blocks in operations:
        getattr(kept, operation)(blocks)
        if operation == "evicted":
            for block in blocks:
                oracle.pop(block, None)
            for block in reversed(blocks[:room]):
                oracle[block] = None
            while len(oracle) > room:
                oracle.popitem(last=False)
        elif operation in ("fetch", "prefetch"):
            run = next((i for i, block in enumerate(blocks) if block not in oracle), len(blocks))
            for block in reversed(blocks[:run]):
                del oracle[block]
                if operation == "prefetch":
                    oracle[block] = None
        elif operation == "touch":
            for block in sorted(set(blocks) & set(oracle)):  # touched at once: equals go by number
                oracle.move_to_end(block)
        assert kept.held_blocks("host") == set(oracle)
