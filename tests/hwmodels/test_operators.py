"""FLOPs and bytes of operator lists against sums written out by hand, loops and Monte Carlo."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import operators as ops
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import AttentionCore, Communication, ExpertExchange, Experts, Gemm, GroupedGemm
from hwmodels.shape import Attention, Latent, attention_parameters, feed_forward_parameters
from hwmodels.step_model import decode_operators, linear_operators, shared_operators

BF16 = Precision()
ONE = Mapping()


def number(value: float) -> np.ndarray:
    return np.array(float(value))


def flops(found) -> float:
    return float(sum(op.count * op.flops for op in found))


def communications(found) -> list[Communication]:
    return [op for op in found if isinstance(op, Communication)]


def one_step(model, mapping, tokens, precision=BF16):
    """Everything a rank does for `tokens` decoding sequences of 100 attended tokens each."""
    n = number(tokens)
    return [
        *linear_operators(model, model.layers, n, mapping, precision, first=True),
        *shared_operators(model, model.layers, n * mapping.attention_dp, mapping, precision),
        *decode_operators(model.layers, n, n * 100, mapping, precision),
        *ops.language_model_head(model, n, mapping.tp),
    ]


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-70b", "llama-3.2-1b"])
def test_flops_of_a_dense_token_are_twice_the_weights_it_meets_and_attention(name):
    model, context = load_model(name), 100
    norms = sum(layer.norm_parameters for layer in model.layers)
    embeddings = model.vocab * model.hidden * (1 if model.tied_embeddings else 2)
    in_layers = model.parameters - embeddings - model.other_parameters - norms
    attention = sum(4 * context * layer.attention.heads * layer.attention.head_dim for layer in model.layers)
    expected = 2 * (in_layers + model.vocab * model.hidden) + attention
    assert flops(one_step(model, ONE, 1)) == pytest.approx(expected, rel=1e-12)
    assert flops(one_step(model, ONE, 7)) == pytest.approx(7 * expected, rel=1e-12)


def test_flops_of_mixtral_tokens_are_twice_the_active_weights():
    model = load_model("mixtral-8x7b")
    a, ff = model.layers[0].attention, model.layers[0].feed_forward
    layer = attention_parameters(a, model.hidden) + feed_forward_parameters(ff, model.hidden, active=True)
    expected = 2 * (32 * layer + model.vocab * model.hidden) + 32 * 4 * 100 * a.heads * a.head_dim
    assert flops(one_step(model, ONE, 1)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("name", ["llama-3.1-70b", "llama-3.1-8b"])
def test_tensor_parallel_ranks_share_the_flops(name, tp):
    model = load_model(name)
    assert tp * flops(one_step(model, Mapping(tp=tp), 16)) == pytest.approx(flops(one_step(model, ONE, 16)), rel=1e-12)


@pytest.mark.parametrize("expert_tp", [2, 4, 8])
def test_ranks_share_the_flops_of_experts_cut_by_width(expert_tp):
    model = load_model("mixtral-8x7b")
    router = 2 * 16 * model.hidden * 8 * 32  # every rank routes for itself
    cut = flops(one_step(model, Mapping(tp=expert_tp, expert_tp=expert_tp), 16)) - router
    assert expert_tp * cut == pytest.approx(flops(one_step(model, ONE, 16)) - router, rel=1e-12)


def test_more_ranks_than_kv_heads_copy_them():
    attention = load_model("llama-3.1-70b").layers[0].attention
    assert [ops.kv_heads_per_rank(attention, tp) for tp in (1, 2, 8, 16, 64)] == [8, 4, 1, 1, 1]


def test_decode_attention_of_gqa_reads_its_cache_once():
    attention = load_model("llama-3.1-70b").layers[0].attention
    for tp, kv_heads in ((1, 8), (8, 1)):
        (core,) = ops.decode_attention(attention, number(3), number(3000), tp, BF16, 1)
        heads = 64 // tp
        assert float(core.flops) == 4 * 3000 * heads * 128
        cache = (3000 + 3) * kv_heads * 2 * 128 * 2
        assert float(core.bytes) == cache + 3 * heads * 2 * 128 * 2


def test_a_narrow_cache_is_read_faster_but_queries_stay_in_16_bit():
    attention = load_model("llama-3.1-70b").layers[0].attention
    (wide,) = ops.decode_attention(attention, number(1), number(1000), 1, BF16, 1)
    (narrow,) = ops.decode_attention(attention, number(1), number(1000), 1, Precision("fp8", "fp8", "fp8"), 1)
    queries = 64 * 2 * 128 * 2
    assert float(narrow.bytes) - queries == (float(wide.bytes) - queries) / 2


def test_products_of_narrow_inputs_leave_in_16_bit():
    op = Gemm("g", number(10), 300, 200, Precision("fp8", "fp8", "fp8"))
    assert float(op.bytes) == 300 * 200 + 10 * (200 + 2 * 300)
    assert float(Gemm("g", number(0), 300, 200, BF16).bytes) == 0
    int4 = Gemm("g", number(1), 128, 128, Precision("int4", "bf16", "bf16"))
    assert float(int4.bytes) == 128 * 128 * 0.5 + 128 * 2.5 + 2 * 256


def test_mla_decodes_absorbed_and_prefills_expanded():
    """DeepSeek-V3: 128 heads of 128 + 64 and 128, latents of 512 + 64 (arXiv:2412.19437, section 4.2)."""
    attention = load_model("deepseek-v3").layers[0].attention
    decode = ops.decode_attention(attention, number(2), number(2000), 1, BF16, 1)
    absorb = 2 * 2 * 128 * (128 * 512 + 512 * 128)
    core = 2 * 2000 * 128 * (512 + 64 + 512)
    assert flops(decode) == absorb + core
    (kernel,) = [op for op in decode if isinstance(op, AttentionCore)]
    assert float(kernel.bytes) == 2002 * 576 * 2 + 2 * 128 * (576 + 512) * 2

    prefill = ops.prefill_attention(attention, number(100), number(50), 1, BF16, 1)
    expand = 2 * 150 * 512 * 128 * (128 + 128)
    pairs = 100 * 50 + 100 * 101 // 2
    assert flops(prefill) == expand + 2 * pairs * 128 * (192 + 128)
    # A single token costs the same weights either way; only the core differs.
    assert absorb / 2 == 2 * 512 * 128 * (128 + 128)


def test_mla_ranks_share_heads_but_not_latents():
    model = load_model("deepseek-v3")
    attention = model.layers[0].attention
    whole = ops.attention_linear(model, attention, number(5), ONE, BF16, 1)
    cut = ops.attention_linear(model, attention, number(5), Mapping(tp=8), BF16, 1)
    down = 2 * 5 * 7168 * (1536 + 512 + 64)
    assert 8 * (flops(cut) - down) + down == flops(whole)
    expected = 7168 * (1536 + 576) + 1536 * 128 * 192 + 128 * 128 * 7168
    assert flops(whole) == 2 * 5 * expected


@given(new=st.integers(0, 40), before=st.integers(0, 60), window=st.none() | st.integers(1, 50))
def test_attended_pairs_are_what_a_loop_counts(new, before, window):
    expected = 0
    for position in range(before, before + new):
        expected += position + 1 if window is None else min(position + 1, window)
    assert float(ops.attended_pairs(number(new), number(before), window)) == expected


@given(new=st.lists(st.integers(1, 50), min_size=1, max_size=5), window=st.none() | st.integers(1, 64))
def test_chunks_attend_to_as_many_pairs_as_the_whole_prompt(new, window):
    starts = np.cumsum([0, *new[:-1]])
    parts = ops.attended_pairs(np.array(new, float), starts.astype(float), window)
    assert float(parts.sum()) == float(ops.attended_pairs(number(sum(new)), number(0), window))


def test_windows_clip_what_is_read():
    windowed = Attention(heads=4, kv_heads=2, head_dim=8, value_dim=8, window_tokens=100)
    (decode,) = ops.decode_attention(windowed, number(3), number(3 * 500), 1, BF16, 1)
    assert float(decode.flops) == 4 * 300 * 4 * 8
    (prefill,) = ops.prefill_attention(windowed, number(1), number(500), 1, BF16, 1)
    assert float(prefill.flops) == 4 * 100 * 4 * 8


def picks(rng: np.random.Generator, tokens: int, experts: int, top_k: int, ranks: int) -> np.ndarray:
    """Rows of every expert of every rank [runs, ranks, experts per rank] under uniform routing."""
    runs = 200
    chosen = np.argsort(rng.random((runs, tokens, experts)), axis=2)[:, :, :top_k].reshape(runs, -1)
    rows = np.zeros((runs, experts), int)
    np.add.at(rows, (np.arange(runs)[:, None], chosen), 1)
    return rows.reshape(runs, ranks, -1)


ROUTING = [(256, 8, 8), (256, 8, 32), (128, 8, 8), (8, 2, 4), (32, 4, 2)]


@pytest.mark.parametrize(("experts", "top_k", "ranks"), ROUTING)
@pytest.mark.parametrize("tokens", [1, 4, 32, 200])
def test_active_experts_are_those_of_monte_carlo(experts, top_k, ranks, tokens):
    rows = picks(np.random.default_rng(1), tokens, experts, top_k, ranks)
    expected = ops.expected_active_experts(experts / ranks, number(tokens * top_k), experts, top_k, number(tokens))
    assert float(expected) == pytest.approx((rows > 0).sum(axis=2).mean(), rel=0.05)


@pytest.mark.parametrize(("experts", "top_k", "ranks"), ROUTING)
@pytest.mark.parametrize("tokens", [1, 4, 32, 200])
def test_the_busiest_rank_is_a_little_above_monte_carlo(experts, top_k, ranks, tokens):
    rows = picks(np.random.default_rng(2), tokens, experts, top_k, ranks)
    mean = number(tokens * top_k / ranks)
    busiest = rows.sum(axis=2).max(axis=1).mean()
    estimate = float(ops.busiest_rank_rows(mean, ranks))
    assert 0.95 * busiest <= estimate <= 1.4 * busiest

    touched = ops.expected_active_experts(experts / ranks, number(1e9), experts, top_k, number(tokens))
    most = (rows > 0).sum(axis=2).max(axis=1).mean()
    estimate = min(float(ops.busiest_rank_experts(touched, experts / ranks, ranks)), estimate)
    assert 0.95 * most <= estimate <= 1.4 * most


@given(rows=st.floats(0, 1e6), ranks=st.integers(1, 512))
def test_the_busiest_rank_has_between_the_mean_and_all_rows(rows, ranks):
    busiest = float(ops.busiest_rank_rows(number(rows), ranks))
    assert rows <= busiest * (1 + 1e-12)
    assert busiest <= rows * ranks * (1 + 1e-12)
    assert busiest >= min(1, rows * ranks) * (1 - 1e-12)


def test_one_token_touches_a_whole_expert_of_the_busiest_rank():
    """Spread over as many ranks as experts, a rank has one expert or none; a step waits for one that has one."""
    model = load_model("deepseek-v3")
    ff = model.layers[-1].feed_forward
    found = ops.expert_feed_forward(model, ff, number(1), number(1), Mapping(tp=64, ep=256), BF16, 1)
    (experts,) = (op for op in found if isinstance(op, Experts))
    assert float(experts.active) == 1
    assert [float(part.active) for part in experts.parts if isinstance(part, GroupedGemm)] == [1, 1]


def test_collectives_come_with_the_degrees_that_need_them():
    dense, moe = load_model("llama-3.1-8b"), load_model("deepseek-v3")
    assert communications(one_step(dense, ONE, 8)) == []
    assert communications(one_step(moe, ONE, 8)) == []
    in_tp = communications(one_step(dense, Mapping(tp=2), 8))
    assert {(c.kind, c.group) for c in in_tp} == {("all-reduce", "tp"), ("all-gather", "tp")}
    reduces = [c for c in in_tp if c.kind == "all-reduce"]
    assert sum(c.count for c in reduces) == 2 * 32 + 1
    assert {float(c.bytes) for c in reduces} == {8 * 4096 * 2.0}
    spread = one_step(moe, Mapping(attention_dp=8, ep=8), 8)
    assert communications(spread) == []
    assert [e.phase for e in spread if isinstance(e, ExpertExchange)] == ["dispatch", "combine"]
    both = one_step(moe, Mapping(tp=2, attention_dp=4, ep=4, expert_tp=2), 8)
    assert {c.group for c in communications(both)} == {"tp", "expert_tp"}
    assert {float(e.tokens) for e in both if isinstance(e, ExpertExchange)} == {8 / 2}


def test_dispatch_sends_a_token_to_every_rank_it_may_choose():
    model = load_model("deepseek-v3")
    ff = model.layers[-1].feed_forward
    fp8 = Precision("fp8", "fp8", "bf16")
    found = ops.expert_feed_forward(model, ff, number(10), number(320), Mapping(attention_dp=32, ep=32), fp8, 1)
    sent = {op.name: float(op.bytes) for op in found if isinstance(op, ExpertExchange)}
    assert sent == {"expert dispatch": 10 * 8 * 7168 * 1.0, "expert combine": 10 * 8 * 7168 * 2.0}


def test_a_token_goes_to_an_expert_groups_ranks_once():
    """Choices of one token in the same group of experts need it there once."""
    ff = load_model("mixtral-8x7b").layers[0].feed_forward
    for groups in (1, 2, 4, 8):
        of_group = [expert * groups // ff.experts for expert in range(ff.experts)]
        drawn = [len({of_group[a], of_group[b]}) for a, b in combinations(range(ff.experts), 2)]
        assert ops.groups_of_token(ff.experts, 2, groups) == pytest.approx(np.mean(drawn))
    whole = Mapping(attention_dp=4, ep=1, expert_tp=4)
    found = ops.expert_feed_forward(load_model("mixtral-8x7b"), ff, number(10), number(40), whole, BF16, 1)
    (gather,) = (c for c in communications(found) if c.kind == "all-gather")
    assert float(gather.bytes) == pytest.approx(40 * 4096 * 2.0)


@given(
    heads=st.integers(1, 8),
    nope=st.integers(1, 16),
    rope=st.integers(1, 8),
    value=st.integers(1, 16),
    rank=st.integers(1, 16),
    q_rank=st.none() | st.integers(1, 16),
)
def test_mla_tokens_meet_every_weight_once(heads, nope, rope, value, rank, q_rank):
    attention = Attention(heads, heads, nope + rope, value, latent=Latent(q_rank, rank, rope))
    model = load_model("llama-3.2-1b")
    found = [
        *ops.attention_linear(model, attention, number(1), ONE, BF16, 1),
        *ops.decode_attention(attention, number(1), number(1), 1, BF16, 1),
    ]
    gemms = flops(op for op in found if isinstance(op, Gemm))
    assert gemms == 2 * attention_parameters(attention, model.hidden)


def test_arrays_stand_for_single_values():
    model = load_model("mixtral-8x7b")
    tokens = np.array([1.0, 5.0, 64.0])
    mapping = Mapping(tp=2, ep=2)
    many = linear_operators(model, model.layers, tokens, mapping, BF16, first=True)
    for i, n in enumerate(tokens):
        for one, all_ in zip(
            linear_operators(model, model.layers, number(n), mapping, BF16, first=True), many, strict=True
        ):
            assert float(one.bytes) == pytest.approx(float(np.broadcast_to(all_.bytes, (3,))[i]), rel=1e-12)
            assert float(one.flops) == pytest.approx(float(np.broadcast_to(all_.flops, (3,))[i]), rel=1e-12)


def test_the_formats_of_the_experts_may_differ_from_the_rest():
    """gpt-oss: 16-bit attention beside MXFP4 experts whose products are computed in 16 bit."""
    mixed = Precision("bf16", "bf16", "bf16", "mxfp4")
    assert mixed.of_experts == Precision("mxfp4", "bf16", "bf16")
    assert Precision("bf16", "bf16", "bf16", "fp4").of_experts.activations == "fp4"
    assert BF16.of_experts == BF16
    model = load_model("gpt-oss-20b")
    ff = model.layers[-1].feed_forward
    found = ops.expert_feed_forward(model, ff, number(64), number(64), ONE, mixed, 1)
    (experts,) = (op for op in found if isinstance(op, Experts))
    wide = ops.expert_feed_forward(model, ff, number(64), number(64), ONE, BF16, 1)
    (whole,) = (op for op in wide if isinstance(op, Experts))
    assert experts.flops == whole.flops
    assert float(experts.bytes) < 0.4 * float(whole.bytes)
