"""Block ids stay with their requests, and count what requests share."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.blockhashes import BlockHashes, infinite_cache_hit_rate, joined, shared_blocks
from simulator.errors import TraceError
from simulator.sessions import descended
from simulator.workload import Requests, mix

BLOCK = 4


@st.composite
def families(draw: st.DrawFn) -> Requests:
    """Requests some of which begin like earlier ones."""
    count = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    prompts, outputs = rng.integers(1, 30, count), rng.integers(1, 10, count)
    parents = np.array([rng.integers(-1, index) if index else -1 for index in range(count)])
    most = np.minimum(prompts, (prompts + outputs)[parents])
    shared = np.where(parents >= 0, rng.integers(0, most + 1), 0)
    hashes = descended(parents, shared, prompts, outputs, BLOCK)
    return Requests(np.sort(rng.random(count)), prompts, outputs, block_hashes=hashes)


def rows(requests: Requests) -> list[list[int]]:
    assert requests.block_hashes is not None
    return [requests.block_hashes.row(index) for index in range(len(requests))]


def alike(one: list[int], other: list[int]) -> int:
    """Leading ids in common."""
    common = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        common += 1
    return common


def relations(lists: list[list[int]]) -> list[list[int]]:
    return [[alike(one, other) for other in lists] for one in lists]


@given(families())
def test_shared_blocks_are_the_longest_common_beginning_with_anyone_before(requests: Requests) -> None:
    found = rows(requests)
    longest = [max((alike(found[i], found[j]) for j in range(i)), default=0) for i in range(len(found))]
    assert requests.block_hashes is not None
    requests.block_hashes.check_chained()
    assert shared_blocks(requests.block_hashes).tolist() == longest
    assert infinite_cache_hit_rate(requests.block_hashes) == pytest.approx(sum(longest) / sum(map(len, found)))


@given(families(), st.data())
def test_picking_and_stretching_keep_the_ids(requests: Requests, data: st.DataObject) -> None:
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(requests), max_size=len(requests))))
    mask[0] = True
    lists = rows(requests)
    assert rows(requests.pick(mask)) == [row for row, kept in zip(lists, mask, strict=True) if kept]
    assert rows(requests.head(2)) == lists[:2]
    assert rows(requests.labelled("chat")) == lists
    if requests.span_s:
        assert rows(requests.scaled_to_rate(3.0)) == lists


@given(families(), st.integers(1, 3))
def test_rounds_of_a_repeated_trace_share_nothing_with_each_other(requests: Requests, rounds: int) -> None:
    count = len(requests)
    repeated = rows(requests.take(rounds * count))
    for start in range(0, len(repeated), count):
        assert relations(repeated[start : start + count]) == relations(rows(requests))
        assert all(not alike(repeated[0], row) for row in repeated[max(count, start) : start + count])


@given(families(), families())
def test_what_is_mixed_shares_nothing_but_within_its_part(one: Requests, other: Requests) -> None:
    parts = [replace(part, class_names=(name,)) for part, name in ((one, "one"), (other, "other"))]
    both = mix(*parts)
    lists = rows(both)
    for code, part in enumerate((one, other)):
        mine = np.flatnonzero(both.slo_class == code)
        assert relations([lists[i] for i in mine]) == relations(rows(part))
    for i in range(len(both)):
        for j in range(len(both)):
            assert both.slo_class[i] == both.slo_class[j] or not alike(lists[i], lists[j])


@given(families())
def test_ids_survive_pickling_and_cannot_be_changed(requests: Requests) -> None:
    copy = pickle.loads(pickle.dumps(requests))
    assert rows(copy) == rows(requests)
    assert requests.block_hashes is not None
    with pytest.raises(ValueError, match="read-only"):
        requests.block_hashes.ids[0] = 7


def test_a_part_without_ids_shares_nothing() -> None:
    known = Requests([0, 1], [4, 4], [1, 1], block_hashes=BlockHashes.of([[7], [7]], 4))
    lists = rows(mix(known, Requests([0.5, 0.6], [9, 4], [1, 1])))
    assert [len(row) for row in lists] == [1, 3, 1, 1]
    assert lists[0] == lists[3]
    assert len({value for row in lists for value in row}) == 5
    assert mix(Requests([0], [1], [1]), Requests([0], [1], [1])).block_hashes is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BlockHashes.of([[1]], 0), "block_tokens = 0: expected a whole number >= 1"),
        (lambda: BlockHashes([1, 2], [0, 3], 4), "offsets: expected to ascend from 0 to the number of ids, 2"),
        (lambda: BlockHashes([0.5], [0, 1], 4), "ids has dtype float64"),
        (
            lambda: Requests([0, 1], [8, 9], [1, 1], block_hashes=BlockHashes.of([[1, 2], [1, 2]], 4)),
            "request 1 has 2 block ids: expected 3 for 9 prompt tokens in blocks of 4, or 3 with its answer",
        ),
        (
            lambda: Requests([0, 1], [8, 9], [1, 1], block_hashes=BlockHashes.of([[1, 2]], 4)),
            "block ids of 1 requests: expected those of 2",
        ),
        (lambda: BlockHashes.of([[1, 2], [3, 2]], 4).check_chained(), "request 1: block 2 follows block 3, block 1 in"),
        (lambda: BlockHashes.of([[1, 2], [2]], 4).check_chained(), "request 1: block 2 follows no block, block 1 in"),
        (
            lambda: joined([BlockHashes.of([[1]], 4), BlockHashes.of([[1]], 16)]),
            "prefix hashes of 4 and 16 tokens a block: expected one block size",
        ),
    ],
)
def test_inconsistent_ids_are_refused(build, message) -> None:
    with pytest.raises(TraceError, match=message):
        build()
