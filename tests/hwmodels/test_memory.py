"""Memory of one rank: weights add up to the model's, KV blocks end where memory does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.engine import load_engine
from hwmodels.errors import MappingError, OutOfMemoryError
from hwmodels.hardware import load_device
from hwmodels.huggingface import load_model, model_names
from hwmodels.mapping import Mapping, Precision
from hwmodels.memory import (
    activation_elements,
    kv_bytes_per_rank,
    plan_memory,
    replica_sizes,
    require_fit,
    stage_weight_bytes,
)
from hwmodels.step_model import stage_layers

BF16 = Precision()
H100, VLLM = load_device("h100-sxm"), load_engine("vllm")
LIMITS = {"token_budget": 2048, "max_seqs": 64, "block_tokens": 16}


def rank_weights(model, mapping: Mapping, precision: Precision = BF16) -> list[float]:
    """Weight bytes of one rank of every stage."""
    return [weights for weights, _ in replica_sizes(model, mapping, precision).stages]


@pytest.mark.parametrize("name", model_names())
def test_a_single_device_keeps_every_weight(name):
    model = load_model(name)
    assert rank_weights(model, Mapping()) == [2.0 * model.parameters]


def kept_whole(model) -> int:
    """Parameters that every tensor-parallel rank copies: norms, routers, down projections of latents, the rest."""
    total = model.other_parameters
    for layer in model.layers:
        latent = layer.attention.latent
        total += layer.norm_parameters + layer.feed_forward.experts * model.hidden
        if latent is not None:
            total += model.hidden * ((latent.q_rank or 0) + latent.kv_rank + latent.rope_dim)
    return total


@pytest.mark.parametrize(
    ("name", "mapping"),
    [
        ("llama-3.1-70b", Mapping(tp=8)),
        ("llama-3.2-1b", Mapping(tp=4)),
        ("mixtral-8x7b", Mapping(tp=4, expert_tp=4)),
        ("mixtral-8x7b", Mapping(tp=4, ep=4)),
        ("mixtral-8x7b", Mapping(tp=8, ep=4, expert_tp=2)),
        ("deepseek-v3", Mapping(tp=16, ep=16)),
        ("gpt-oss-120b", Mapping(tp=4, ep=4)),
    ],
)
def test_ranks_together_keep_the_model_and_copies_of_what_is_not_cut(name, mapping):
    model = load_model(name)
    (each,) = rank_weights(model, mapping)
    copies = 2.0 * (mapping.tp - 1) * kept_whole(model)
    assert mapping.tp * each == pytest.approx(2.0 * model.parameters + copies, rel=1e-12)


def test_more_ranks_than_kv_heads_keep_copies_of_them():
    model = load_model("llama-3.1-70b")
    (each,) = rank_weights(model, Mapping(tp=16))
    copied = 80 * 8 * 256 * 8192 + 15 * kept_whole(model)
    assert 16 * each == pytest.approx(2.0 * (model.parameters + copied), rel=1e-12)
    assert kv_bytes_per_rank(model.layers, 16, BF16) == kv_bytes_per_rank(model.layers, 8, BF16) == 80 * 256 * 2


def test_attention_groups_copy_attention_and_spread_experts():
    """DeepSeek-V3 over 32 groups: 8 of 256 experts each, everything else whole."""
    model = load_model("deepseek-v3")
    (each,) = rank_weights(model, Mapping(attention_dp=32, ep=32))
    experts = 58 * 256 * 3 * 7168 * 2048
    assert each == pytest.approx(2.0 * (model.parameters - experts + experts / 32), rel=1e-12)


@pytest.mark.parametrize(("pp", "stages"), [(2, None), (3, None), (4, (20, 22, 22, 16)), (80, None)])
def test_stages_add_up_to_the_model(pp, stages):
    model = load_model("llama-3.1-70b")
    mapping = Mapping(pp=pp, stages=stages)
    assert sum(rank_weights(model, mapping)) == pytest.approx(2.0 * model.parameters, rel=1e-12)
    assert sum(len(layers) for layers in stage_layers(model, mapping)) == 80
    kv = sum(per_token for _, per_token in replica_sizes(model, mapping, BF16).stages)
    assert kv == model.kv_bytes_per_token("bf16")


def test_both_ends_of_a_pipeline_keep_tied_embeddings():
    model = load_model("llama-3.2-1b")
    table = 2.0 * model.vocab * model.hidden
    assert sum(rank_weights(model, Mapping(pp=2))) == pytest.approx(2.0 * model.parameters + table, rel=1e-12)


def test_uneven_stages():
    model = load_model("llama-3.1-8b")
    assert [len(layers) for layers in stage_layers(model, Mapping(pp=5))] == [7, 7, 6, 6, 6]
    for stages in ((16, 15), (32, 0), (40, -8), (16, 8, 8)):
        with pytest.raises(MappingError, match="leave stages out for an even split"):
            stage_layers(model, Mapping(pp=2, stages=stages))


@pytest.mark.parametrize(("weights", "bytes_each"), [("fp8", 1.0), ("int4", 0.5 + 2.5 / 128), ("fp4", 0.5 + 1 / 16)])
def test_narrow_weights_leave_embeddings_in_16_bit(weights, bytes_each):
    model = load_model("llama-3.1-8b")
    tables = 2 * model.vocab * model.hidden
    (each,) = rank_weights(model, Mapping(), Precision(weights))
    assert each == pytest.approx((model.parameters - tables) * bytes_each + 2.0 * tables, rel=1e-12)


@pytest.mark.parametrize("name", model_names())
def test_kv_of_one_rank(name):
    model = load_model(name)
    whole = model.kv_bytes_per_token("bf16")
    assert kv_bytes_per_rank(model.layers, 1, BF16) == whole
    assert kv_bytes_per_rank(model.layers, 1, Precision(kv="fp8")) == whole / 2
    latent = any(layer.attention.latent for layer in model.layers)
    halves = latent or any(layer.attention.kv_heads == 1 for layer in model.layers)
    assert kv_bytes_per_rank(model.layers, 2, BF16) == (whole if halves else whole / 2)


def test_memory_of_a_dense_model_by_hand():
    """Llama-3.1-8B on one H100: 0.9 of its memory, less 2 GB, 16.06 GB of weights and a step of 2048 tokens."""
    model = load_model("llama-3.1-8b")
    memory = plan_memory(replica_sizes(model, Mapping(), BF16), H100, VLLM, **LIMITS)
    activations = 2048 * (4 * 4096 + 3 * 14336) * 2 + 64 * 128256 * 4
    left = 0.9 * H100.memory_bytes - 2e9 - 2 * 8_030_261_248 - activations
    assert memory.activations_bytes == activations
    assert memory.kv_bytes == pytest.approx(left)
    assert memory.kv_blocks == int(left / (131072 * 16))


def test_ranks_that_share_experts_hold_whole_rows():
    """Eight rows of DeepSeek-V3's width per token reach every rank of expert_tp, only their inside is cut."""
    model = load_model("deepseek-v3")
    cut = activation_elements(model, Mapping(tp=8, expert_tp=8))
    assert cut == 4 * 7168 + 8 * (7168 + 3 * 2048 / 8) + 3 * 2048 / 8
    spread = activation_elements(model, Mapping(tp=8, ep=8))
    assert spread == pytest.approx(4 * 7168 + max(7168 + 3 * 2048 + 3 * 2048 / 8, 3 * 128 * 192 / 8))


def with_room(blocks: int, mapping: Mapping = Mapping(), slack: float = 0.0):  # noqa: B008
    """A model, and a device with just enough memory for `blocks` KV blocks and `slack` bytes."""
    model = load_model("llama-3.1-8b")
    sizes = replica_sizes(model, mapping, BF16)
    none = plan_memory(sizes, H100, VLLM, **LIMITS)
    needed = blocks * 16 * none.kv_bytes_per_token - none.kv_bytes + slack
    return model, sizes, replace(H100, memory_bytes=H100.memory_bytes + needed / VLLM.memory_fraction)


@pytest.mark.parametrize("blocks", [1, 7, 1000])
def test_blocks_end_where_memory_does(blocks):
    model, sizes, device = with_room(blocks, slack=1e4)
    assert plan_memory(sizes, device, VLLM, **LIMITS).kv_blocks == blocks
    _, _, device = with_room(blocks, slack=-1e4)
    memory = plan_memory(sizes, device, VLLM, **LIMITS)
    assert memory.kv_blocks == blocks - 1
    require_fit(memory, model, Mapping(), device, 16 * (blocks - 1), 16)
    with pytest.raises(OutOfMemoryError, match=r"0\.0 GiB per device short"):
        require_fit(memory, model, Mapping(), device, 16 * (blocks - 1) + 1, 16)


def test_what_does_not_fit_says_by_how_much():
    model = load_model("llama-3.1-70b")
    memory = plan_memory(replica_sizes(model, Mapping(), BF16), H100, VLLM, **LIMITS)
    assert memory.kv_blocks < 0
    with pytest.raises(OutOfMemoryError, match=r"6\d\.\d GiB per device short") as error:
        require_fit(memory, model, Mapping(), H100, 4096, 16)
    assert "\n" not in str(error.value)


def test_schedulers_of_a_pipeline_share_the_blocks_of_the_fullest_stage():
    model = load_model("llama-3.1-8b")
    memory = plan_memory(replica_sizes(model, Mapping(pp=2, stages=(30, 2)), BF16), H100, VLLM, **LIMITS)
    assert memory.kv_bytes_per_token == 30 * 8 * 256 * 2
    assert memory.kv_blocks == int(memory.kv_bytes // (memory.kv_bytes_per_token * 16)) // 2


@settings(max_examples=100, deadline=None)
@given(
    memory=st.floats(1e9, 3e11),
    more=st.floats(0, 1e11),
    pp=st.sampled_from([1, 2, 4]),
    budget=st.integers(1, 16384),
    block=st.sampled_from([1, 16, 64]),
)
def test_more_memory_never_gives_fewer_blocks_and_larger_steps_never_more(memory, more, pp, budget, block):
    sizes = replica_sizes(load_model("llama-3.1-8b"), Mapping(pp=pp), BF16)

    def blocks(size: float, tokens: int) -> int:
        device = replace(H100, memory_bytes=size)
        return plan_memory(sizes, device, VLLM, token_budget=tokens, max_seqs=8, block_tokens=block).kv_blocks

    assert blocks(memory, budget) <= blocks(memory + more, budget)
    assert blocks(memory, budget + 1000) <= blocks(memory, budget)


def test_first_and_last_stage_keep_the_tables():
    model = load_model("llama-3.1-8b")
    layers = model.layers[:4]
    ends = {
        (first, last): stage_weight_bytes(model, layers, Mapping(), BF16, first=first, last=last)
        for first in (True, False)
        for last in (True, False)
    }
    table = 2.0 * model.vocab * model.hidden
    assert ends[True, False] - ends[False, False] == table
    assert ends[True, True] - ends[True, False] == table + 2.0 * model.other_parameters
