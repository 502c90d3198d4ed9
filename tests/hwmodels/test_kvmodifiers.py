"""Methods that keep, read or compute less: closed forms against sums over tokens, and the figures they publish."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.engine import load_engine
from hwmodels.errors import ProfileError
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.kvmodifiers import (
    FULL,
    RETRIEVAL_GQA,
    RETRIEVAL_MHA,
    BlockTopK,
    KVMethod,
    ModifiedCost,
    cache_bytes,
    double_sparsity,
    duo_attention,
    kinetics,
    lserve,
    modified,
    snapkv,
)
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import decode_attention, prefill_attention
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import StepModel, compile_step_model

METHODS = st.builds(
    KVMethod,
    retrieval_heads=st.floats(0, 1),
    sink_tokens=st.integers(0, 64),
    recent_tokens=st.integers(0, 256),
    held_tokens=st.one_of(st.just(float("inf")), st.integers(0, 4096)),
    read_tokens=st.one_of(st.just(float("inf")), st.integers(0, 4096)),
    read_share=st.floats(0, 1),
    prefill_share=st.floats(0, 1),
)


@given(METHODS, st.integers(0, 10_000))
def test_no_method_without_an_index_holds_or_reads_more_than_full_attention(method: KVMethod, tokens: int) -> None:
    read, held = float(method.read(tokens)), float(method.held(tokens))
    assert 0 <= read <= held * (1 + 1e-12)
    assert held <= tokens * (1 + 1e-12)
    assert float(method.pairs(tokens)) <= float(FULL.pairs(tokens)) * (1 + 1e-12)


@given(METHODS, st.integers(1, 300), st.integers(0, 300))
def test_pairs_are_a_sum_over_tokens_and_chunks_add_up(method: KVMethod, new: int, before: int) -> None:
    share, window = method.retrieval_heads, method.window_tokens
    visible = np.arange(before + 1, before + new + 1)
    summed = share * method.prefill_share * visible.sum() + (1 - share) * np.minimum(visible, window).sum()
    assert float(method.pairs(new, before)) == pytest.approx(float(summed))
    assert float(method.pairs(before + new)) == pytest.approx(
        float(method.pairs(before)) + float(method.pairs(new, before))
    )


def test_full_attention_leaves_operators_as_they_are() -> None:
    attention, precision = load_model("llama-3-8b").layers[0].attention, Precision()
    n, context, before = np.array([1.0, 8.0]), np.array([100.0, 9000.0]), np.array([0.0, 500.0])
    for op in (
        *decode_attention(attention, n, context, 1, precision, 1),
        *prefill_attention(attention, n, before, 1, precision, 1),
    ):
        same = modified(op, FULL)
        assert same.flops == pytest.approx(op.flops)
        assert same.bytes == pytest.approx(op.bytes)


def test_layers_with_a_window_are_left_as_they_are() -> None:
    windowed = load_model("gpt-oss-20b")
    dtypes = {layer.attention.window_tokens for layer in windowed.layers}
    assert None in dtypes and len(dtypes) == 2
    plain = cache_bytes(windowed, "bf16", FULL, 100_000)
    sparse = cache_bytes(windowed, "bf16", snapkv(0), 100_000)
    assert 0 < sparse < plain
    half = [layer for layer in windowed.layers if layer.attention.window_tokens is not None]
    assert sparse == windowed.kv_bytes_per_token("bf16", half) * half[0].attention.window_tokens


def test_the_format_of_the_cache_scales_its_bytes() -> None:
    shape = load_model("llama-3-8b")
    assert cache_bytes(shape, "int4", FULL, 1000) == cache_bytes(shape, "bf16", FULL, 1000) / 4
    assert cache_bytes(shape, "bf16", FULL, 1000) == 1000 * shape.kv_bytes_per_token("bf16")


def test_evictions_come_after_the_prefill() -> None:
    attention = load_model("llama-3-8b").layers[0].attention
    (op,) = prefill_attention(attention, np.array([512.0]), np.array([8192.0]), 1, Precision(), 1)
    assert modified(op, snapkv(1024)).bytes == pytest.approx(op.bytes)
    (op,) = decode_attention(attention, np.array([4.0]), np.array([4 * 8192.0]), 1, Precision(), 1)
    assert modified(op, snapkv(1024)).flops == pytest.approx(op.flops / 8)


def test_sources_add_up_to_the_time() -> None:
    cost = ModifiedCost(AnalyticCost(load_cluster("hgx-a100", 8), Mapping()), duo_attention(0.5))
    attention = load_model("llama-3-8b").layers[0].attention
    for op in decode_attention(attention, np.array([4.0]), np.array([4 * 8192.0]), 1, Precision(), 1):
        assert sum(cost.sources(op).values()) == pytest.approx(float(cost.time_s(op).sum()))


@pytest.mark.parametrize(
    "wrong", [{"retrieval_heads": 1.5}, {"read_share": -0.1}, {"held_tokens": -1}, {"selection_steps": 0}]
)
def test_shares_and_counts_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ProfileError, match=next(iter(wrong))):
        KVMethod(**wrong)


# DuoAttention (arXiv:2410.10819). Its repository evaluates a quarter of the heads of Llama-2-7B and half of those of
# Llama-3-8B on an A100-80GB; contexts of 100K and 320K are those of its prefill figure.
DUO = {"llama-2-7b": (RETRIEVAL_MHA, 100_000), "llama-3-8b": (RETRIEVAL_GQA, 320_000)}


@cache
def steps(name: str, method: KVMethod) -> StepModel:
    shape = replace(load_model(name), max_context_tokens=400_000)
    cost = ModifiedCost(AnalyticCost(load_cluster("hgx-a100", 8), Mapping()), method)
    return compile_step_model(shape, Mapping(), Precision(), load_engine("vllm"), cost, max_tokens=4096, max_seqs=2)


@pytest.mark.parametrize(("name", "published"), [("llama-2-7b", 2.55), ("llama-3-8b", 1.67)])
def test_duo_attention_memory_with_weights(name: str, published: float) -> None:
    """Up to 2.55x and 1.67x less memory [abstract]: weights and caches in bf16 give 2.47 and 1.57; within 10 %."""
    share, tokens = DUO[name]
    shape = load_model(name)
    full, split = (
        2 * shape.parameters + cache_bytes(shape, "bf16", method, tokens) for method in (FULL, duo_attention(share))
    )
    assert full / split == pytest.approx(published, rel=0.1)
    million = cache_bytes(shape, "bf16", FULL, 1e6) / cache_bytes(shape, "bf16", duo_attention(share), 1e6)
    assert 0.99 / share < million < 1 / share


@pytest.mark.parametrize(("name", "published"), [("llama-2-7b", 2.18), ("llama-3-8b", 1.50)])
def test_duo_attention_decode(name: str, published: float) -> None:
    """Up to 2.18x and 1.50x faster decode [abstract]: 2.23 and 1.50 by the analytic model of an A100; within 10 %."""
    share, tokens = DUO[name]
    full, split = (steps(name, method).step_s(1, tokens, []) for method in (FULL, duo_attention(share)))
    assert full / split == pytest.approx(published, rel=0.1)


@pytest.mark.parametrize(("name", "published"), [("llama-2-7b", 1.73), ("llama-3-8b", 1.63)])
def test_duo_attention_prefill(name: str, published: float) -> None:
    """Up to 1.73x and 1.63x faster prefill [abstract]; 2.13x and 1.78x here, streaming heads at full efficiency.

    The streaming kernels of the paper are not as good as that: ours may be faster by up to 30 %, not slower.
    """
    share, tokens = DUO[name]
    full, split = (
        sum(steps(name, m).step_s(0, 0, [(min(4096, tokens - start), start)]) for start in range(0, tokens, 4096))
        for m in (FULL, duo_attention(share))
    )
    assert published <= full / split <= 1.3 * published


def test_duo_attention_3_3_million_tokens_on_one_a100() -> None:
    """Llama-3-8B, 8-bit weights, 4-bit cache, 3.3M tokens [abstract]: 62 GB of 80, where full attention takes 116."""
    shape = load_model("llama-3-8b")
    device = load_cluster("hgx-a100", 8).device

    def total(method: KVMethod) -> float:
        return shape.parameters + cache_bytes(shape, "int4", method, 3.3e6)

    assert total(duo_attention(RETRIEVAL_GQA)) < 0.9 * device.memory_bytes < device.memory_bytes < total(FULL)


def test_double_sparsity_attention() -> None:
    """Attention up to 14.1x faster at a share of 1/16 [abstract], bytes alone: 14.2x with 4-bit labels of the keys.

    With labels as wide as the cache it would be 10.7x at most, and 8x if a sixteenth of keys and values were scanned.
    """
    assert 1e5 / float(double_sparsity().read(1e5)) == pytest.approx(14.1, rel=0.02)
    assert 1e5 / float(double_sparsity(label_bits=16).read(1e5)) == pytest.approx(32 / 3)
    assert 1e5 / float(KVMethod(read_share=1 / 16, label_share=1 / 16).read(1e5)) == pytest.approx(8.0)
    assert float(double_sparsity().held(1e5)) > 1e5  # it forgets nothing


def test_lserve_reads_a_constant_budget_but_for_the_selector() -> None:
    method = lserve(4096, page_tokens=16, selection_steps=4)
    attended = method.attended(np.array([8192, 65_536, 262_144]))
    assert attended == pytest.approx(0.5 * 4096 + 0.5 * 320)
    assert float(method.read(65_536)) == pytest.approx(0.5 * 4096 + 0.5 * 320 + 0.5 * 65_536 / 16 / 4)
    assert float(method.read(1024)) == pytest.approx(0.5 * (1024 + 64 / 4) + 0.5 * 320)


# V05, Kinetics (arXiv:2506.05333): rows of its repository's tables (Infini-AI-Lab/Kinetics, MIT licence,
# cost_model/aime24), Qwen3-8B on the first question of AIME 2024, in units of 1e12 eFLOPs, means over 32 answers.
QWEN3_8B = 8.19e9
DENSE_LENGTHS = [
    8253, 12777, 8502, 11134, 10950, 9364, 13403, 14893, 10085, 10553, 29481, 19360, 10311, 15844, 17722, 30719,
    10485, 13003, 25976, 10114, 15756, 12063, 24963, 9307, 12267, 12365, 13096, 11417, 10001, 4870, 19562, 16167,
]  # fmt: skip
SPARSE_LENGTHS = [
    10238, 30767, 11963, 12777, 9715, 16134, 16538, 11023, 10200, 30767, 14016, 13061, 11286, 14032, 13155, 9947,
    11487, 30767, 12431, 15507, 12246, 11891, 15643, 20678, 13742, 11060, 28172, 11390, 9458, 17437, 30767, 9318,
]  # fmt: skip
#: The question's tokens with the chat template: the number that explains the first figure, found to be whole.
PROMPT_TOKENS = 155
DENSE = {
    1: (304.50358475517595, 10085.874487056),
    2: (609.0071695103519, 19989.043391232),
    4: (1218.0143390207038, 39795.381199584),
    32: (9744.11471216563, 317084.11051651195),
}
#: 64 blocks of 16 tokens.
SPARSE = {
    1: (267.02939694549593, 1731.620048976),
    2: (534.0587938909919, 3457.128673872),
    4: (1068.1175877819837, 6908.125243392),
    32: (8544.94070225587, 55222.19278164),
}


def mean_cost(lengths: list[int], trials: int, sparse: BlockTopK | None = None) -> tuple[float, float]:
    shape = load_model("qwen3-8b")
    costs = [kinetics(QWEN3_8B, shape, PROMPT_TOKENS, length, trials, sparse) for length in lengths]
    return float(np.mean([c.compute for c in costs])) / 1e12, float(np.mean([c.memory for c in costs])) / 1e12


@pytest.mark.parametrize("trials", DENSE)
def test_v05_dense(trials: int) -> None:
    assert mean_cost(DENSE_LENGTHS, trials) == pytest.approx(DENSE[trials], rel=1e-9)


@pytest.mark.parametrize("trials", SPARSE)
def test_v05_block_top_k(trials: int) -> None:
    """The tables add max(0, B-c)^2/2 tokens where the sum over steps has them less; with that they are met exactly."""
    shape, sparse = load_model("qwen3-8b"), BlockTopK(64, 16)
    attention = shape.layers[0].attention
    depth = attention.head_dim * len(shape.layers)
    slip = (sparse.budget_tokens - PROMPT_TOKENS) ** 2  # twice the half
    compute, memory = mean_cost(SPARSE_LENGTHS, trials, sparse)
    compute += trials * 4 * slip * attention.heads * depth / 1e12
    memory += trials * 562.5 * 4 * slip * attention.kv_heads * depth / 1e12
    assert (compute, memory) == pytest.approx(SPARSE[trials], rel=1e-9)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_tokens_read_under_a_budget_are_the_sum_over_steps(prompt: int, generated: int) -> None:
    """To half a step's tokens: the closed form is the integral of min(B, c + i) over the steps."""
    shape, sparse = load_model("qwen3-8b"), BlockTopK(64, 16)
    cached = sum(layer.attention.kv_heads * layer.attention.head_dim for layer in shape.layers)
    scores = (2 * prompt + generated) // 16 * generated
    told = kinetics(QWEN3_8B, shape, prompt, generated, 1, sparse, eflops_per_byte=1.0).memory
    read = (told / cached - scores) / 4
    steps_read = np.minimum(sparse.budget_tokens, prompt + np.arange(generated + 1))
    assert read == pytest.approx(float((steps_read[1:] + steps_read[:-1]).sum() / 2), abs=1.0)


def test_eflops_are_not_defined_for_latents() -> None:
    with pytest.raises(ProfileError, match="full attention"):
        kinetics(1e9, load_model("deepseek-v3"), 10, 10)
