"""Exact parameter and KV counts against published figures and against sums written out independently."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.huggingface import load_model, load_profile, model_names, shape_from_config


@pytest.mark.parametrize("name", model_names())
def test_parameters_match_published_count(name):
    profile = load_profile(name)
    assert profile.name == name
    tolerance = 5e-4 if profile.published_exact else 5e-3
    assert load_model(name).parameters == pytest.approx(profile.published_parameters, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("mixtral-8x7b", 46_702_792_704),
        ("deepseek-v3", 671_026_419_200),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("phi-2", 2_779_683_840),
        ("bloom-176b", 176_247_271_424),
        ("falcon-180b", 179_522_565_120),
        ("yi-34b", 34_388_917_248),
    ],
)
def test_parameters_are_exact(name, parameters):
    assert load_model(name).parameters == parameters


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("llama-3.1-70b", 327_680),
        ("llama-2-7b", 524_288),
        ("mixtral-8x7b", 131_072),
        ("deepseek-v3", 61 * (512 + 64) * 2),
        ("bloom-176b", 70 * 112 * 128 * 2 * 2),
        ("falcon-180b", 80 * 8 * 64 * 2 * 2),
        ("gpt-oss-120b", 36 * 8 * 64 * 2 * 2),
    ],
)
def test_kv_bytes_per_token_are_exact(name, kv_bytes):
    model = load_model(name)
    assert model.kv_bytes_per_token("bf16") == kv_bytes
    assert model.kv_bytes_per_token("fp8") == kv_bytes / 2
    assert model.kv_bytes_per_token("bf16", model.layers[:1]) == kv_bytes / len(model.layers)


@pytest.mark.parametrize(
    ("name", "active", "tolerance"),
    [
        # Mistral's Mixtral 8x7B and 8x22B announcements; DeepSeek-V3 report, section 1; Qwen3 report, Table 2.
        ("mixtral-8x7b", 12.9e9, 0.005),
        ("mixtral-8x22b", 39e9, 0.01),
        ("deepseek-v3", 37e9, 0.02),
        ("qwen3-235b-a22b", 22e9, 0.01),
        ("qwen3-30b-a3b", 3.3e9, 0.02),
    ],
)
def test_active_parameters_match_published_figures(name, active, tolerance):
    model = load_model(name)
    assert model.is_moe
    assert model.active_parameters == pytest.approx(active, rel=tolerance)


def test_dense_models_use_all_parameters():
    model = load_model("llama-3.1-8b")
    assert not model.is_moe
    assert model.active_parameters == model.parameters


def test_equal_layers_are_one_object():
    counts = Counter(map(id, load_model("deepseek-v3").layers))
    assert sorted(counts.values()) == [3, 58]


def test_windows_alternate_in_gpt_oss():
    windows = [layer.attention.window_tokens for layer in load_model("gpt-oss-20b").layers]
    assert windows == [128, None] * 12


def test_windows_of_mistral_and_qwen():
    assert {layer.attention.window_tokens for layer in load_model("mistral-7b").layers} == {4096}
    assert {layer.attention.window_tokens for layer in load_model("qwen2.5-7b").layers} == {None}


@given(
    layers=st.integers(1, 6),
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 4),
    head_dim=st.integers(1, 64),
    extra=st.integers(0, 100),
    intermediate=st.integers(1, 999),
    vocab=st.integers(1, 9999),
    tied=st.booleans(),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
)
def test_llama_parameters_equal_the_sum_of_its_tensors(
    layers, kv_heads, group, head_dim, extra, intermediate, vocab, tied, attention_bias, mlp_bias
):
    hidden, heads = kv_heads * group * head_dim + extra, kv_heads * group
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
    }
    q, kv = heads * head_dim, kv_heads * head_dim
    tensors = [(vocab, hidden), (hidden,)] + ([] if tied else [(vocab, hidden)])
    for _ in range(layers):
        tensors += [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (hidden,), (hidden,)]
        tensors += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
        tensors += [(q,), (kv,), (kv,), (hidden,)] if attention_bias else []
        tensors += [(intermediate,), (intermediate,), (hidden,)] if mlp_bias else []
    expected = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in tensors)
    model = shape_from_config(config, "random")
    assert model.parameters == expected
    assert model.kv_elements_per_token() == layers * 2 * kv
