"""Configurations are read as transformers reads them; bad ones end in one line that names the key and the file."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import ProfileError
from hwmodels.huggingface import load_model, load_profile, model_names, shape_from_config, stored_weights

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
GEMMA = {**LLAMA, "model_type": "gemma2", "head_dim": 8, "sliding_window": 16}


def refused(config, *, words):
    with pytest.raises(ProfileError) as caught:
        shape_from_config(config, "m", "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ") and "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize("key", sorted(set(LLAMA) - {"num_key_value_heads", "model_type"}))
def test_a_missing_key_is_named(key):
    refused({k: v for k, v in LLAMA.items() if k != key}, words=[key, "missing"])


@pytest.mark.parametrize("key", sorted(set(LLAMA) - {"model_type"}))
@pytest.mark.parametrize("value", ["wide", "64", 0, -8, 64.0, float("nan"), float("inf"), True, [64], 10**30])
def test_an_impossible_value_is_named(key, value):
    refused({**LLAMA, key: value}, words=[key, "expected"])


def test_heads_that_do_not_divide():
    refused({**LLAMA, "num_attention_heads": 6}, words=["hidden_size 64", "num_attention_heads 6"])
    refused({**LLAMA, "num_key_value_heads": 3}, words=["num_attention_heads 8", "num_key_value_heads 3"])
    refused({**LLAMA, "num_key_value_heads": 16}, words=["num_key_value_heads 16"])


def test_more_choices_than_experts():
    mixture = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5}
    refused(mixture, words=["num_experts_per_tok 5", "4 experts"])


def test_layer_types_must_fit():
    mistral = {**LLAMA, "model_type": "mistral", "sliding_window": 16}
    refused({**mistral, "layer_types": ["full_attention"]}, words=["layer_types", "2 layers"])
    refused({**mistral, "layer_types": ["full_attention", "linear_attention"]}, words=["linear_attention"])
    types = {"layer_types": ["full_attention", "sliding_attention"]}
    windows = [layer.attention.window_tokens for layer in shape_from_config({**mistral, **types}, "m").layers]
    assert windows == [None, 16]


def test_unknown_architectures():
    refused({**LLAMA, "model_type": "mamba2", "state_size": 16}, words=["mamba2", "state_size", "deepseek_v3"])
    refused({"model_type": "gpt2", "n_embd": 768}, words=["gpt2", "supported"])
    refused({**LLAMA, "model_type": None}, words=["model_type"])
    plain = shape_from_config({**LLAMA, "model_type": "newcomer", "rope_theta": 1e4, "use_moe": False}, "m")
    assert plain.layers == shape_from_config(LLAMA, "m").layers


@pytest.mark.parametrize("config", [None, [], "llama", 3])
def test_what_is_no_mapping(config):
    refused(config, words=["expected a mapping"])


def test_unread_keys_are_ignored():
    assert shape_from_config({**LLAMA, "rope_scaling": {"type": "yarn"}, "x": float("nan")}, "m").hidden == 64


def test_nested_language_model():
    text = {k: v for k, v in LLAMA.items() if k != "model_type"}
    nested = {"model_type": "llava", "tie_word_embeddings": True, "text_config": {**text, "model_type": "llama"}}
    assert shape_from_config(nested, "m") == shape_from_config({**LLAMA, "tie_word_embeddings": True}, "m")


def test_missing_key_value_heads_mean_one_each():
    config = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert shape_from_config(config, "m").layers[0].attention.kv_heads == 8


def test_gemma_windows():
    two = shape_from_config({**GEMMA, "num_hidden_layers": 4}, "m")
    assert [layer.attention.window_tokens for layer in two.layers] == [16, None, 16, None]
    three = shape_from_config({**GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 7}, "m")
    assert [layer.attention.window_tokens for layer in three.layers] == [16] * 5 + [None, 16]


def test_falcon_7b_is_multi_query():
    # tiiuae/falcon-7b with its head tied: 6,921,720,704 parameters as transformers counts them (from memory).
    config = {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71}
    model = shape_from_config({**config, "vocab_size": 65024, "multi_query": True}, "falcon-7b")
    assert model.parameters == 6_921_720_704
    assert model.kv_elements_per_token() == 32 * 2 * 64


def test_qwen_window_starts_late():
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}
    assert [layer.attention.window_tokens for layer in shape_from_config(qwen, "m").layers] == [None, 16]


def test_config_json_by_path_and_by_folder(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert load_model(str(folder)) == load_model(str(folder / "config.json"))
    assert load_model(str(folder)).name == "my-model"


@pytest.mark.parametrize("text", ["", "{", "hello", '{"a": 1} x', "\udc80", "[" * 100_000, "[1, 2]"])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ProfileError, match=r"config\.json"):
        load_model(str(path))


def test_unknown_names_offer_the_nearest(tmp_path):
    with pytest.raises(ProfileError, match=r"llama-3\.1-70b"):
        load_model("meta-llama/Llama-3.1-70B")
    for name in ("", "no/such/config.json", "a\0b", "x" * 5000, str(tmp_path)):
        with pytest.raises(ProfileError):
            load_model(name)
    with pytest.raises(ProfileError, match=r"nearest: [^,]+(, [^,]+){4} \(or give"):  # five where none is alike
        load_model("qqqq")


def test_a_model_profile_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    keys = "".join(f"  {key}: {value}\n" for key, value in LLAMA.items())
    head = "name: mine\nsource: ours\npublished_parameters: 1\npublished_in: here\npublished_exact: false\n"
    path.write_text(head + "config:\n" + keys)
    assert load_model(str(path)) == shape_from_config(LLAMA, "mine")
    path.write_text(head + "colour: red\nconfig:\n" + keys)
    with pytest.raises(ProfileError, match="colour"):
        load_model(str(path))


@pytest.mark.parametrize("name", model_names())
def test_shipped_profiles_name_their_source(name):
    profile = load_profile(name)
    assert profile.source and profile.published_in


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
# Layer counts stay small: what is tested is that nothing but ProfileError comes out.
kinds = ["llama", "mixtral", "qwen3_moe", "deepseek_v3", "falcon", "bloom", "phi", "opt", "gpt_neox", "glm4_moe", "new"]


@given(
    kind=st.sampled_from(kinds),
    changes=st.dictionaries(st.sampled_from([*LLAMA, "head_dim", "layer_types", "sliding_window"]), json_values),
)
def test_any_configuration_is_read_or_refused_in_one_line(kind, changes):
    try:
        model = shape_from_config({**LLAMA, **changes, "model_type": kind}, "m")
    except ProfileError as error:
        assert "\n" not in str(error)
    else:
        assert model.parameters > 0


@pytest.mark.parametrize(
    ("quantization", "stored"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "fp8", "weight_block_size": None}, "fp8"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, None),
        ({"quant_method": "awq", "bits": 4}, None),
        (None, None),
        ("fp8", None),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_format_of_a_checkpoint_is_read(tmp_path, quantization, stored, nested):
    inner = {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": inner} if nested else inner))
    assert stored_weights(str(tmp_path)) == stored


def test_shipped_checkpoints_with_block_scales():
    assert [name for name in model_names() if stored_weights(name) == "fp8_block"] == [
        "deepseek-r1", "deepseek-v3", "kimi-k2", "minimax-m2.5"
    ]  # fmt: skip


def test_the_format_of_an_unknown_model_is_refused():
    with pytest.raises(ProfileError, match="unknown model"):
        stored_weights("no-such-model")
