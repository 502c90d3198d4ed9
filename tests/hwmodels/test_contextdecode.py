"""Decoding over sharded caches, and the memory of long prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.contextdecode import decode_cost
from hwmodels.contextlinks import context_groups
from hwmodels.contextmemory import context_memory, smallest_cp
from hwmodels.engine import load_engine
from hwmodels.errors import MappingError, OutOfMemoryError
from hwmodels.hardware import load_cluster, load_device
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.memory import GIB
from hwmodels.operators import decode_attention
from hwmodels.roofline import AnalyticCost

NODE, WIDE = load_cluster("h100-sxm", 8), Precision()
PRICE = AnalyticCost(NODE, Mapping())
LLAMA, DEEPSEEK = load_model("llama-3.1-8b"), load_model("deepseek-v3")
MILLION = 2**20


@given(st.sampled_from([2, 4, 8]), st.integers(1, 256), st.integers(1, 10**6))
def test_decode_sends_queries_and_partial_outputs_whatever_the_context(cp: int, sequences: int, each: int) -> None:
    found = decode_cost(
        NODE, context_groups(cp), LLAMA.layers[0].attention, 1, WIDE, sequences, sequences * each, PRICE.time_s
    )
    assert float(found.sent_bytes) == pytest.approx((cp - 1) / cp * sequences * 32 * (128 * 2 + 128 * 2 + 4))
    assert float(found.exposed_s) > 0 and float(found.merge_bytes) > 0


def test_one_rank_is_plain_decoding() -> None:
    attention, count, context = LLAMA.layers[0].attention, np.array([1.0, 64.0]), np.array([1e5, 1e6])
    found = decode_cost(NODE, ((0,),), attention, 1, WIDE, count, context, PRICE.time_s)
    plain = sum(PRICE.time_s(op) for op in decode_attention(attention, count, context, 1, WIDE, 1))
    np.testing.assert_allclose(found.total_s, plain)


def test_sharding_pays_for_long_contexts_and_costs_for_short_ones() -> None:
    attention = LLAMA.layers[0].attention
    one, eight = (
        decode_cost(NODE, context_groups(cp), attention, 1, WIDE, 1.0, np.array([1e3, 1e6]), PRICE.time_s).total_s
        for cp in (1, 8)
    )
    assert eight[0] > one[0] and eight[1] < one[1] / 5


def test_latent_decoding_sends_the_width_of_the_latent() -> None:
    found = decode_cost(NODE, context_groups(4), DEEPSEEK.layers[0].attention, 8, WIDE, 8.0, 8e4, PRICE.time_s)
    assert float(found.sent_bytes) == pytest.approx(3 / 4 * 8 * 16 * (576 * 2 + 512 * 2 + 4))


def test_a_million_tokens_take_their_closed_form() -> None:
    """Llama 3.1 8B: 32 layers x 8 KV heads x 2 x 128 x 2 bytes = 128 KiB per token, 128 GiB for 2^20 tokens."""
    for cp, tp, pp in ((1, 1, 1), (8, 1, 1), (4, 2, 1), (2, 8, 2)):
        found = context_memory(LLAMA, Mapping(tp=tp, pp=pp), cp, "ring", MILLION, 8192, WIDE)
        assert found.kv_bytes == pytest.approx(128 * GIB / cp / tp / pp)
    by_heads = context_memory(LLAMA, Mapping(), 8, "ulysses", MILLION, 8192, WIDE)
    copied = context_memory(LLAMA, Mapping(), 16, "ulysses", MILLION, 8192, WIDE)
    assert by_heads.kv_bytes == pytest.approx(16 * GIB) and copied.kv_bytes == by_heads.kv_bytes
    assert copied.activations_bytes == pytest.approx(by_heads.activations_bytes / 2)


@settings(max_examples=25)
@given(st.integers(0, 5), st.integers(1, MILLION), st.sampled_from(["ring", "tokenring", "all-gather"]))
def test_more_ranks_never_hold_more_cache(doublings: int, tokens: int, kind: str) -> None:
    chunk = min(tokens, 8192)
    held = [
        context_memory(LLAMA, Mapping(), cp, kind, tokens, chunk, WIDE)  # type: ignore[arg-type]
        for cp in (2**doublings, 2 ** (doublings + 1))
    ]
    assert held[1].kv_bytes == pytest.approx(held[0].kv_bytes / 2)
    assert held[1].weights_bytes == held[0].weights_bytes


def test_the_smallest_degree_fits_and_half_of_it_does_not() -> None:
    device, engine = load_device("h100-sxm"), load_engine("vllm")
    usable = device.memory_bytes * engine.memory_fraction - engine.reserve_bytes
    cp = smallest_cp(LLAMA, Mapping(), "ring", MILLION, 8192, WIDE, device, engine)
    assert cp == 4
    for degree, fits in ((cp, True), (cp // 2, False)):
        memory = context_memory(LLAMA, Mapping(), degree, "ring", MILLION, 8192, WIDE)
        assert (memory.total_bytes <= usable) == fits
    with pytest.raises(OutOfMemoryError, match="GiB per device short"):
        smallest_cp(DEEPSEEK, Mapping(tp=8, ep=8), "ring", MILLION, 8192, WIDE, device, engine, most=16)
    with pytest.raises(MappingError, match="or ring"):
        smallest_cp(DEEPSEEK, Mapping(tp=8, ep=8), "ulysses", MILLION, 8192, WIDE, device, engine)


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(MappingError, match="no larger chunk"):
        context_memory(LLAMA, Mapping(), 2, "ring", 100, 200, WIDE)
    with pytest.raises(MappingError, match="divisor of 32"):
        decode_cost(NODE, context_groups(2), LLAMA.layers[0].attention, 3, WIDE, 1.0, 100.0, PRICE.time_s)
