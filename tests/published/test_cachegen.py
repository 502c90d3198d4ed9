"""CacheGen (SIGCOMM 2024, arXiv:2310.07240): KV 3.5 to 4.3 times smaller, contexts loaded 2.7 to 3.7 times sooner.

Sizes 3.7-4.3x and delays 2.7-3x are of the first abstract, 3.5-4.3x and 3.2-3.7x of the last, against KV in 8 bit and
against text that is computed again.

Setting: Mistral-7B (grouped KV, 65,536 numbers a token) with a context of 9,400 tokens in chunks of 1,500 on one RTX
A6000, which stands in for the paper's A40 (same chip, 3 % more arithmetic), at bandwidths drawn for every chunk,
uniform between 0.1 and 10 Gbit/s as in CacheGen's repository; SLO 2 s as by its default, 0.5 s as in its demonstration.

What follows from the mechanism: bytes from the model's shape, the time to compute chunks from the step model, the
pipeline, and what the rule makes of a bandwidth it knows of one chunk late. What is taken from the paper: how much
smaller the best level is. What is assumed: two lower levels (0.7 and 0.45 of its bytes), their losses of quality
(2, 5 and 12 %), decoding of 4e9 numbers a second, and that the bandwidth is known when the first chunk is sent.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from hwmodels.engine import load_engine
from hwmodels.hardware import load_cluster, load_device
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.memory import kv_bytes_per_rank
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import compile_step_model
from simulator.loadorcompute import (
    Chunk,
    Controller,
    Level,
    Load,
    PerChunk,
    Prefill,
    always,
    best,
    cachegen,
    cut,
    prefill_of,
    split,
    stream,
)

CONTEXT, CHUNK = 9400, 1500
DECODE = 4e9
#: One link per trace; with 400 of them means are known to about 3 %.
LINKS = [
    PerChunk(tuple((gigabits * 1e9 / 8).tolist()))
    for gigabits in np.random.default_rng(61).uniform(0.1, 10.0, (400, -(-CONTEXT // CHUNK)))
]
SMALLER = (3.5, 3.9, 4.3)


@cache
def prefill() -> Prefill:
    cluster = replace(load_cluster("pcie4-node", 1), device=load_device("rtx-a6000"))
    cost = AnalyticCost(cluster, Mapping())
    model = compile_step_model(
        load_model("mistral-7b"), Mapping(), Precision(), load_engine("vllm"), cost, max_tokens=2048, max_seqs=2
    )
    return prefill_of(model)


def values_per_token() -> float:
    return kv_bytes_per_rank(load_model("mistral-7b").layers, 1, Precision(kv="int8"))


@cache
def coded(smaller: float) -> list[Chunk]:
    bits = 8 / smaller
    ladder = [
        Level("default", bits, 1.0, 0.02, DECODE),
        Level("smaller", bits, 0.7, 0.05, DECODE),
        Level("smallest", bits, 0.45, 0.12, DECODE),
    ]
    return cut(CONTEXT, CHUNK, values_per_token(), ladder, prefill())


@cache
def quantised() -> list[Chunk]:
    return cut(CONTEXT, CHUNK, values_per_token(), [Level("8 bit", 8)], prefill())


def loads(chunks: list[Chunk], controller: Controller) -> list[Load]:
    """On every trace, the bandwidth of the first chunk known."""
    return [stream(chunks, link, controller, link.bytes_per_s[0]) for link in LINKS]


def mean_s(told: list[Load]) -> float:
    return float(np.mean([load.finish_s for load in told]))


def late(told: list[Load], slo_s: float) -> float:
    """Share of the traces on which the SLO is missed."""
    return float(np.mean([load.finish_s > slo_s for load in told]))


def test_recomputing_a_chunk_takes_what_the_repository_assumes() -> None:
    """0.2 s for a chunk [repo]; 0.23 to 0.26 s by the analytic model of an RTX A6000 for the first and the last."""
    assert prefill()(CHUNK, 0) == pytest.approx(0.2, rel=0.3)
    assert prefill()(CHUNK, CONTEXT - CHUNK) == pytest.approx(0.2, rel=0.35)


def coded_bits(bins: int, spread: float) -> float:
    """Entropy of Gaussian KV of 1,024 channels, quantised by the largest of each token and coded channel by channel.

    spread   of the logarithms of the channels' scales
    """
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1000, 1024)) * np.exp(spread * rng.standard_normal(1024))
    most = bins // 2 - 1
    whole = np.rint(values * (most / np.abs(values).max(axis=1, keepdims=True))).astype(int)
    counts = np.stack([(whole == value).sum(axis=0) for value in range(-most, most + 1)])
    share = counts[counts > 0] / len(values)
    return float(-(share * np.log2(share)).sum() / 1024)


def times_smaller_than_8_bit(bits_32: float, bits_16: float) -> float:
    """Bins of the repository's setting for 7B: 32 for the first 10 layers' keys and 2 layers' values, 16 else."""
    keys, values = (10 * bits_32 + 22 * bits_16) / 32, (2 * bits_32 + 30 * bits_16) / 32
    return 8 / ((keys + values) / 2)


def test_what_makes_kv_3_5_to_4_3_times_smaller() -> None:
    """The bins alone give 1.9x and coding like channels 2.4x; 3.5 to 4.3x takes channels of scales that differ.

    A spread of e^0.5 is enough (3.6x), of e^0.65 more than that (4.6x): what real KV has is the paper's measurement.
    """
    assert times_smaller_than_8_bit(5.0, 4.0) == pytest.approx(1.91, abs=0.01)
    same, half, more = (
        times_smaller_than_8_bit(coded_bits(32, spread), coded_bits(16, spread)) for spread in (0.0, 0.5, 0.65)
    )
    assert same == pytest.approx(2.4, abs=0.1)
    assert 3.5 < half < 4.3 < more


@pytest.mark.parametrize("smaller", SMALLER)
def test_delay_against_8_bit_and_text_over_the_traces(smaller: float) -> None:
    """SLO 2 s. For 3.5, 3.9 and 4.3 times smaller: 3.5, 3.8, 4.2x sooner than 8 bit and 2.4, 2.6, 2.9x than text.

    Each is known to 4 %. Published 2.7 to 3.7x, here to 15 %: against 8 bit it is the ratio of sizes and little else.
    """
    adapted = mean_s(loads(coded(smaller), cachegen(coded(smaller), 2.0)))
    assert 0.93 * smaller <= mean_s(loads(quantised(), always(0))) / adapted <= 1.04 * smaller
    assert 0.85 * 2.7 <= mean_s(loads(coded(smaller), always(None))) / adapted <= 3.7


@pytest.mark.parametrize("smaller", SMALLER)
def test_delay_at_a_steady_bandwidth(smaller: float) -> None:
    """Smaller KV counts in full while the link is slow; at 10 Gbit/s decoding takes its part, at 1 text is as quick."""
    gained = []
    for gigabits in (1.0, 3.0, 10.0):
        link = PerChunk((gigabits * 1e9 / 8,))
        told = stream(coded(smaller), link, always(0), 1.0).finish_s
        gained.append(stream(quantised(), link, always(0), 1.0).finish_s / told)
        text = stream(coded(smaller), link, always(None), 1.0).finish_s / told
        if gigabits == 3.0:
            assert 3.2 <= text <= 4.1
        assert (text > 1.5) == (gigabits > 1.0)
    assert smaller > gained[0] > gained[1] > gained[2] > 2.7


def test_the_rule_keeps_the_slo_where_8_bit_does_not() -> None:
    """2 s: late on 3 % of the traces where 8 bit is on 42 %, and never if the next chunk's bandwidth is known."""
    chunks = coded(3.9)
    assert late(loads(quantised(), always(0)), 2.0) == pytest.approx(0.42, abs=0.05)
    assert late(loads(chunks, cachegen(chunks, 2.0)), 2.0) < 0.05
    assert late([informed(chunks, link, 2.0) for link in LINKS], 2.0) == 0.0


def informed(chunks: list[Chunk], link: PerChunk, slo_s: float) -> Load:
    """CacheGen's rule told the bandwidth of the chunk it decides on instead of that of the one before."""
    rule = cachegen(chunks, slo_s)
    return stream(chunks, link, lambda index, now_s, _: rule(index, now_s, link.bytes_per_s[index]), 1.0)


def test_how_far_the_rule_is_from_the_optimum() -> None:
    """0.5 s can be kept on 98 % of the traces; the rule keeps it on 47 %, told the next chunk's bandwidth on 73 %.

    The best level alone keeps it on 55 %: where bandwidths of chunks have nothing to do with each other, the last one
    is worse than no guide. 8-bit KV and text alone are always late.
    """
    chunks = coded(3.9)
    optimum = [best(chunks, link, 0.5) for link in LINKS]
    uninformed, told = loads(chunks, cachegen(chunks, 0.5)), [informed(chunks, link, 0.5) for link in LINKS]
    assert late(optimum, 0.5) == pytest.approx(0.02, abs=0.01)
    assert late(uninformed, 0.5) == pytest.approx(0.53, abs=0.05)
    assert late(told, 0.5) == pytest.approx(0.27, abs=0.05)
    assert late(uninformed, 0.5) > late(loads(chunks, always(0)), 0.5) > late(told, 0.5)
    assert late(loads(quantised(), always(0)), 0.5) == 1.0 == late(loads(chunks, always(None)), 0.5)
    for ours, known in zip(told, optimum, strict=True):
        assert ours.finish_s > 0.5 or (known.finish_s <= 0.5 and known.quality_loss <= ours.quality_loss + 1e-9)


def test_the_rule_forgoes_text_that_would_be_in_time() -> None:
    """2 s are enough to compute everything (1.6 s, no loss); the rule takes any level that fits and loses 2 %."""
    chunks = coded(3.9)
    assert all(best(chunks, link, 2.0).quality_loss == 0 for link in LINKS)
    lost = np.mean([load.quality_loss for load in loads(chunks, cachegen(chunks, 2.0))])
    assert lost == pytest.approx(0.021, abs=0.002)


def test_decoding_hides_behind_the_next_chunk() -> None:
    """At 3 Gbit/s seven chunks that take 25 ms each to decode, but for a short last one, cost 13 ms instead of 154."""
    chunks, link = coded(3.9), PerChunk((3e9 / 8,))
    pipelined = stream(chunks, link, always(0), 1.0)
    apart = stream(chunks, link, always(0), 1.0, pipelined=False)
    decode_s = [chunk.decode_s[0] for chunk in chunks]
    assert pipelined.finish_s <= pipelined.fetched_s[-1] + max(decode_s)
    assert apart.finish_s == pytest.approx(pipelined.fetched_s[-1] + sum(decode_s))


def test_computing_from_the_front_while_loading_from_the_back() -> None:
    """8-bit KV at 3 Gbit/s takes 1.64 s to load and 1.56 s to compute; both at once 0.79 s."""
    bytes_per_s = 3e9 / 8
    found = split(CONTEXT, prefill(), lambda tokens: tokens * values_per_token() / bytes_per_s, block_tokens=16)
    alone = min(prefill()(CONTEXT, 0), CONTEXT * values_per_token() / bytes_per_s)
    assert 0.5 < found.finish_s / alone < 0.6
    assert found.loaded_tokens % 16 == 0
