"""Load or recompute: times by hand, the pipeline's closed form, and optima against brute force."""

from __future__ import annotations

from itertools import product
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import compile_step_model
from simulator.loadorcompute import (
    Choice,
    Chunk,
    Level,
    LoadError,
    OverTime,
    PerChunk,
    always,
    best,
    cachegen,
    cut,
    faster,
    prefill_of,
    replay,
    split,
    stream,
)


def chunk(nbytes: tuple[float, ...], prefill_s: float, decode_s: float = 0.0) -> Chunk:
    losses = tuple(0.01 * level for level in range(len(nbytes)))
    return Chunk(1000, nbytes, (decode_s,) * len(nbytes), losses, 4.0, prefill_s)


# By hand.


def test_a_context_is_cut_into_chunks_that_add_up() -> None:
    ladder = [Level("8 bit", 8, 1.0, 0.0, 1e6), Level("coded", 4, 0.5, 0.1, 1e5)]
    chunks = cut(2500, 1000, 16, ladder, lambda new, before: new * 1e-3 + before * 1e-4)
    assert [c.tokens for c in chunks] == [1000, 1000, 500]
    assert chunks[0].nbytes == (16000.0, 4000.0)
    assert chunks[2].decode_s == (0.008, 0.08)
    assert [c.prefill_s for c in chunks] == pytest.approx([1.0, 1.1, 0.7])
    assert sum(c.losses[1] for c in chunks) == pytest.approx(0.1)


def test_the_next_chunk_is_fetched_while_one_is_decoded() -> None:
    chunks = [chunk((10.0,), 9.0, decode_s=0.5)] * 3
    told = replay(chunks, PerChunk((10.0,)), [0, 0, 0])
    assert told.fetched_s == (1.0, 2.0, 3.0)
    assert told.ready_s == (1.5, 2.5, 3.5)
    apart = stream(chunks, PerChunk((10.0,)), always(0), 10.0, pipelined=False)
    assert apart.ready_s == (1.5, 3.0, 4.5)


def test_text_is_computed_while_the_next_chunk_is_fetched() -> None:
    chunks = [chunk((10.0,), 3.0)] * 2
    told = replay(chunks, PerChunk((10.0,)), [None, 0])
    assert told.ready_s == (3.4, 3.4)
    assert told.fetched_s == (0.4, 1.4)
    assert told.sent_bytes == 14.0


def test_the_rule_takes_the_best_level_within_an_equal_share_of_the_time_left() -> None:
    """4 s for 2 chunks: 20 bytes at 10/s are just in time; then only 2 s are left and the link has become slower."""
    chunks = [chunk((20.0, 5.0), 1.0)] * 2
    told = stream(chunks, PerChunk((10.0, 2.0)), cachegen(chunks, 4.0), 10.0)
    assert told.choices == (0, 0)  # still believing in 10 bytes/s
    assert told.finish_s == 12.0
    warned = stream(chunks, PerChunk((10.0, 2.0)), cachegen(chunks, 4.0), 4.0)
    assert warned.choices == (1, 0)
    hopeless = stream(chunks, PerChunk((10.0, 2.0)), cachegen(chunks, 4.0), 1.0)
    assert hopeless.choices[0] is None


def test_faster_takes_whatever_is_over_first() -> None:
    chunks = [chunk((10.0,), 1.0)]
    assert stream(chunks, PerChunk((20.0,)), faster(chunks), 20.0).choices == (0,)
    assert stream(chunks, PerChunk((5.0,)), faster(chunks), 5.0).choices == (None,)


def test_a_bandwidth_that_changes_while_bytes_are_under_way() -> None:
    link = OverTime((0.0, 1.0, 3.0), (10.0, 5.0, 1.0))
    assert link.arrival_s(0, 0.5, 5.0) == 1.0
    assert link.arrival_s(0, 0.5, 10.0) == 2.0
    assert link.arrival_s(0, 0.5, 16.0) == 4.0
    assert link.arrival_s(0, 7.0, 2.0) == 9.0


def test_the_split_is_where_computing_and_loading_meet() -> None:
    """Computing 1 s a token, loading 3 tokens a second: a quarter is computed."""
    found = split(8, lambda new, before: float(new), lambda tokens: tokens / 3)
    assert (found.computed_tokens, found.loaded_tokens, found.finish_s) == (2, 6, 2.0)
    whole = split(8, lambda new, before: float(new), lambda tokens: tokens / 3, block_tokens=5)
    assert (whole.computed_tokens, whole.loaded_tokens, whole.finish_s) == (3, 5, 3.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: cut(0, 1000, 1, [], lambda new, before: 0.0),
        lambda: cut(10, 10, 1, [Level("a", 4, quality_loss=0.2), Level("b", 2)], lambda new, before: 0.0),
        lambda: Level("a", 0),
        lambda: Level("a", 4, quality_loss=-1),
        lambda: PerChunk(()),
        lambda: PerChunk((1.0, 0.0)),
        lambda: OverTime((1.0,), (1.0,)),
        lambda: OverTime((0.0, 0.0), (1.0, 1.0)),
        lambda: split(0, lambda new, before: 0.0, lambda tokens: 0.0),
    ],
)
def test_what_cannot_be_is_refused(wrong) -> None:
    with pytest.raises(LoadError, match="expected"):
        wrong()


def test_prefill_follows_the_step_model() -> None:
    """Chunks longer than a step are cut; stages come one after the other."""
    idle = Engine("idle host", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
    shape, cluster = load_model("llama-3.2-1b"), load_cluster("hgx-h100", 8)
    whole, cut_in_two = (
        compile_step_model(
            shape, mapping, Precision(), idle, AnalyticCost(cluster, mapping), max_tokens=2048, max_seqs=8
        )
        for mapping in (Mapping(), Mapping(pp=2))
    )
    seconds = prefill_of(whole)
    assert seconds(1000, 500) == pytest.approx(whole.step_s(0, 0, [(1000, 500)]))
    assert seconds(3000, 100) == pytest.approx(seconds(2048, 100) + seconds(952, 2148))
    assert prefill_of(cut_in_two)(1000, 500) > seconds(1000, 500)


# Laws.

BANDWIDTHS = st.lists(st.floats(0.5, 50.0), min_size=1, max_size=6)
TIMES = st.lists(st.floats(0.01, 3.0), min_size=6, max_size=6)


@st.composite
def contexts(draw: st.DrawFn, most: int = 5) -> list[Chunk]:
    made = []
    for _ in range(draw(st.integers(1, most))):
        sizes = sorted(draw(st.lists(st.floats(0.5, 40.0), min_size=1, max_size=3)), reverse=True)
        decode = tuple(draw(st.floats(0.0, 1.0)) for _ in sizes)
        losses = tuple(sorted(draw(st.sampled_from([0.0, 0.01, 0.02, 0.05])) for _ in sizes))
        made.append(Chunk(1000, tuple(sizes), decode, losses, 0.1, draw(st.floats(0.05, 5.0))))
    return made


@st.composite
def links(draw: st.DrawFn) -> PerChunk | OverTime:
    speeds = tuple(draw(BANDWIDTHS))
    if draw(st.booleans()):
        return PerChunk(speeds)
    return OverTime(tuple(np.cumsum([0.0, *draw(TIMES)])[: len(speeds)].tolist()), speeds)


def options(chunks: list[Chunk]) -> list[tuple[Choice, ...]]:
    return list(product(*([None, *range(len(one.nbytes))] for one in chunks)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_the_optimum_is_that_of_brute_force(seed: int, count: int, levels: int, over_time: bool) -> None:
    """Whatever is the time to keep: every time at which some choice is over, just met and just missed."""
    rng = np.random.default_rng(seed)
    chunks = [
        Chunk(
            1000,
            tuple(sorted(rng.uniform(1, 40, levels), reverse=True)),
            tuple(rng.uniform(0, 1, levels)),
            tuple(sorted(rng.choice([0.0, 0.01, 0.02, 0.05], levels))),
            0.1,
            rng.uniform(0.1, 4),
        )
        for _ in range(count)
    ]
    speeds = tuple(rng.uniform(2, 40, count).tolist())
    link = OverTime(tuple(np.arange(count).tolist()), speeds) if over_time else PerChunk(speeds)
    loads = [replay(chunks, link, choices) for choices in options(chunks)]
    soonest = min(load.finish_s for load in loads)
    for slo_s in [0.9 * soonest, *rng.choice([load.finish_s for load in loads], 8)]:
        for asked_s in (slo_s * (1 + 1e-6), slo_s * (1 - 1e-6)):
            in_time = [load.quality_loss for load in loads if load.finish_s <= asked_s]
            found = best(chunks, link, asked_s)
            if in_time:
                assert found.finish_s <= asked_s
                assert found.quality_loss == pytest.approx(min(in_time), abs=1e-9)
            else:
                assert found.finish_s == pytest.approx(soonest)


@given(contexts(), links(), st.floats(0.05, 20.0), st.floats(0.5, 50.0))
def test_the_rule_is_never_better_than_the_optimum(
    chunks: list[Chunk], link: PerChunk | OverTime, slo_s: float, prior: float
) -> None:
    told, found = stream(chunks, link, cachegen(chunks, slo_s), prior), best(chunks, link, slo_s)
    if told.finish_s <= slo_s:
        assert found.finish_s <= slo_s * (1 + 1e-12)
        assert found.quality_loss <= told.quality_loss + 1e-9
    assert replay(chunks, link, told.choices) == told


@given(contexts(), links(), st.data())
def test_times_of_a_load(chunks: list[Chunk], link: PerChunk | OverTime, data: st.DataObject) -> None:
    """Two stages in series: ready_i = max over j <= i of (fetched_j + work from j to i); nothing beats the link."""
    choices = data.draw(st.sampled_from(options(chunks)))
    load = replay(chunks, link, choices)
    work = [one.busy_s(choice) for one, choice in zip(chunks, choices, strict=True)]
    closed = max(load.fetched_s[j] + sum(work[j:]) for j in range(len(chunks)))
    assert load.finish_s == pytest.approx(closed)
    assert load.finish_s >= load.sent_bytes / max(link.bytes_per_s) * (1 - 1e-9)
    assert load.finish_s >= sum(work)
    if isinstance(link, PerChunk):
        apart = stream(chunks, link, lambda index, now_s, bandwidth: choices[index], 1.0, pipelined=False)
        assert load.finish_s <= apart.finish_s * (1 + 1e-9)
    else:
        total = OverTime(link.times_s, link.bytes_per_s).arrival_s(0, 0.0, load.sent_bytes)
        assert load.fetched_s[-1] == pytest.approx(total)


@given(links(), st.floats(0.0, 20.0), st.floats(0.0, 5.0), st.floats(0.0, 100.0))
def test_a_later_start_never_arrives_earlier(
    link: PerChunk | OverTime, start_s: float, wait_s: float, nbytes: float
) -> None:
    assert link.arrival_s(0, start_s, nbytes) <= link.arrival_s(0, start_s + wait_s, nbytes) * (1 + 1e-12)


@given(
    st.integers(1, 200),
    st.floats(0.0, 2.0),
    st.floats(1e-3, 0.1),
    st.floats(0.0, 1e-3),
    st.floats(1e-3, 0.5),
    st.integers(1, 7),
)
def test_the_split_is_that_of_brute_force(
    tokens: int, fixed_s: float, linear_s: float, square_s: float, load_s: float, block: int
) -> None:
    def prefill(new: int, before: int) -> float:
        return fixed_s + linear_s * new + square_s * new * new

    def load(count: int) -> float:
        return load_s * count

    found = split(tokens, prefill, load, block_tokens=block)

    def over_s(loaded: int) -> float:
        return max(prefill(tokens - loaded, 0) if loaded < tokens else 0.0, load(loaded))

    assert found.finish_s == min(over_s(count) for count in range(0, tokens + 1, block))
    assert found.computed_tokens + found.loaded_tokens == tokens
    assert found.finish_s <= min(prefill(tokens, 0), inf if tokens % block else load(tokens))
