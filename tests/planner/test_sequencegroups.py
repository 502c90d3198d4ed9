"""Groups of sequences: the published cost, static groups, ByteScale's closed form, Zeppelin's zones."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.bytescale import Offload, bytescale, ranks_of
from planner.errors import PlanError
from planner.sequencegroups import best_static, flexsp_cost, static, work_bound_s
from planner.sequencetable import as_text, compared
from planner.zeppelin import ring_rate, ring_s, zeppelin, zones

COST = flexsp_cost("gpt-7b")
#: Hidden states of one token, there and back, forward and backward, in all layers, in 16 bit.
HIDDEN = 2 * 2 * 32 * 4096 * 2.0
BATCH = st.lists(st.integers(100, 200_000), min_size=1, max_size=60)


def test_the_cost_is_the_published_one() -> None:
    """FlexSP's constants worked out for 8,192 and 131,072 tokens: (231, 22) and (29, 55) ms, (1753, 882) ms."""
    for s, ranks, compute_ms, exchange_ms in ((8192, 8, 231, 22), (8192, 64, 29, 55), (131072, 64, 1753, 882)):
        assert 1e3 * float(COST.compute_s(s, ranks)) == pytest.approx(compute_ms, abs=0.5)
        assert 1e3 * float(COST.exchange_s(s, ranks)) == pytest.approx(exchange_ms, abs=0.5)
    assert 8 * COST.tokens_per_rank < 131072  # "P = 8 out of memory"
    assert float(COST.exchange_s(8192, 1)) == 0.0


@settings(max_examples=40)
@given(BATCH, st.sampled_from([16, 32, 64]))
def test_static_groups_keep_sequences_and_memory(lengths: list[int], size: int) -> None:
    found = static(lengths, 64, COST, size)
    assert sorted(s for groups in found.rounds for group in groups for s in group.lengths) == sorted(lengths)
    for groups in found.rounds:
        assert len(groups) <= 64 // size
        assert all(group.ranks == size and sum(group.lengths) <= COST.tokens_per_rank * size for group in groups)
    assert found.bound_s <= found.seconds * (1 + 1e-9)
    assert best_static(lengths, 64, COST).seconds <= found.seconds


def test_a_size_that_does_not_hold_the_longest_is_refused() -> None:
    with pytest.raises(PlanError, match="whose ranks hold it"):
        static([100_000], 64, COST, 4)
    with pytest.raises(PlanError, match="gpt-7b"):
        flexsp_cost("gpt-8b")


@given(st.integers(1, 10**6))
def test_ranks_of_a_sequence_are_those_its_memory_asks_for(length: int) -> None:
    ranks = ranks_of(length, COST)
    assert ranks == max(1, ceil(length / COST.tokens_per_rank))


@given(st.integers(1, 10**6), st.floats(1e8, 1e12))
def test_offloading_follows_the_closed_form(length: int, bytes_per_s: float) -> None:
    """Nothing but r = 0 and r = 1 where links are slow or fast; with r = 1 only two layers stay."""
    offload = Offload(32, COST.tokens_per_rank, bytes_per_s)
    ranks = ranks_of(length, COST, offload)
    assert 1 <= ranks <= ranks_of(length, COST)
    filled = length / COST.tokens_per_rank
    endless = ranks_of(length, COST, replace(offload, bytes_per_s=1e30))
    assert endless == (1 if filled <= 1 else max(1, ceil(2 / 32 * filled)))
    assert ranks >= endless
    assert ranks_of(length, COST, replace(offload, bytes_per_s=1e-6)) == ranks_of(length, COST)


def test_too_few_layers_to_offload_are_refused() -> None:
    with pytest.raises(PlanError, match="at least 3"):
        ranks_of(10**6, COST, Offload(2, 1e6, 1e9))


@settings(max_examples=40)
@given(BATCH)
def test_bytescale_stands_between_its_bound_and_one_rank_after_the_other(lengths: list[int]) -> None:
    found = bytescale(lengths, 64, COST)
    one_by_one = sum(COST.start_s + float(COST.sequence_s(s, ranks_of(s, COST))) for s in lengths)
    assert found.bound_s * (1 - 1e-9) <= found.seconds <= one_by_one * (1 + 1e-9)


def test_zones_are_where_the_ring_takes_as_long_as_attention() -> None:
    zone = zones(COST)
    for length, ranks in ((zone.intra, 8), (zone.inter, 16)):
        attending = COST.quadratic_s * length**2 / ranks
        passing = COST.ring_bytes_per_token * length * (ranks - 1) / ranks / ring_rate(COST, ranks, 8, 8)
        assert attending == pytest.approx(passing)
        assert ring_s(COST, round(2 * length), ranks, 8, 8) == pytest.approx(4 * attending, rel=1e-3)
    # Rings that use one network card hide later than rings of all eight (its routing layer).
    assert zones(COST, cards=1).inter > 4 * zone.inter


@settings(max_examples=40)
@given(BATCH)
def test_zeppelin_is_no_faster_than_its_work(lengths: list[int]) -> None:
    found = zeppelin(lengths, 64, COST, hidden_bytes=HIDDEN)
    assert np.isfinite(found.seconds) and found.bound_s <= found.seconds * (1 + 1e-9)
    assert found.seconds <= zeppelin(lengths, 64, COST, hidden_bytes=HIDDEN * 10).seconds * (1 + 1e-9)


def test_nodes_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(PlanError, match="divisor of 64"):
        zeppelin([1000], 64, COST, hidden_bytes=HIDDEN, node=6)


def test_the_table_has_all_ways_and_flexsp_beats_static_groups() -> None:
    rng = np.random.default_rng(1)
    lengths = [int(s) for s in rng.lognormal(np.log(2000), 1.2, 120).clip(64, 150_000)]
    rows = compared(lengths, 64, COST, hidden_bytes=HIDDEN, seconds=1.0)
    names = [row.method for row in rows]
    assert names[-3:] == ["FlexSP", "ByteScale", "Zeppelin"] and all(name.startswith("static") for name in names[:-3])
    by_name = {row.method: row for row in rows}
    assert by_name["FlexSP"].seconds <= min(row.seconds for row in rows if row.method.startswith("static"))
    assert min(row.seconds for row in rows[:-2]) >= work_bound_s(lengths, 64, COST)
    assert len(as_text(rows).splitlines()) == 1 + len(rows)
