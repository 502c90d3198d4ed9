"""FLOPs and bytes of logged steps against direct sums over the operators of every rank."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels import operators as ops
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Communication, Experts
from hwmodels.step_model import (
    decode_operators,
    linear_operators,
    prefill_operators,
    shared_operators,
    stage_layers,
)
from hwmodels.work import Steps, Work

BF16 = Precision()
LIMITS = {"max_tokens": 8192, "max_seqs": 256}


def steps(sequences: int = 0, context: int = 0, items=(), repeat: int = 1) -> Steps:
    """One segment of the log."""
    pairs = sum(new * before + new * (new + 1) // 2 for new, before in items)
    columns = (repeat, sequences, context, sum(new for new, _ in items), pairs, len(items))
    return Steps(*(np.array([float(value)]) for value in columns))


def direct(model, mapping, sequences: int = 0, context: int = 0, items=(), *, measure) -> float:
    """The measure summed over the operators of one rank of every stage."""

    def n(value: float) -> np.ndarray:
        return np.array(float(value))

    total, tokens = 0.0, n(sequences + sum(new for new, _ in items))
    for stage, layers in enumerate(stage_layers(model, mapping)):
        found = linear_operators(model, layers, tokens, mapping, BF16, first=stage == 0)
        found += shared_operators(model, layers, tokens * mapping.attention_dp, mapping, BF16)
        if stage == mapping.pp - 1:
            found += ops.language_model_head(model, n(sequences + len(items)), mapping.tp)
        if sequences:
            found += decode_operators(layers, n(sequences), n(context), mapping, BF16)
        for new, before in items:
            found += prefill_operators(layers, n(new), n(before), mapping, BF16)
        total += sum(op.count * float(measure(op)) for op in found if not isinstance(op, Communication))
    return total


def flops(op) -> float:
    return op.flops


def moved(op) -> float:
    return op.bytes


BATCHES = [
    {"sequences": 1, "context": 100},
    {"sequences": 37, "context": 37_000},
    {"items": [(512, 0)]},
    {"items": [(777, 5000)]},
    {"sequences": 20, "context": 30_000, "items": [(1500, 1024)]},
]


@pytest.mark.parametrize("name", ["llama-3.1-8b", "deepseek-v3", "mistral-7b", "gpt-oss-20b"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_work_of_a_step_is_the_sum_over_its_operators(name, batch):
    """To 1 %: a window that ends inside a chunk is a bend between the knots of the tables."""
    model = load_model(name)
    found_flops, found_bytes = Work(model, Mapping(), BF16, **LIMITS).of(steps(**batch))
    assert float(found_flops[0]) == pytest.approx(direct(model, Mapping(), **batch, measure=flops), rel=0.01)
    assert float(found_bytes[0]) == pytest.approx(direct(model, Mapping(), **batch, measure=moved), rel=0.01)


def test_flops_of_several_chunks_depend_on_their_pairs_alone():
    model = load_model("llama-3.1-8b")
    items = [(1000, 0), (10, 700), (300, 0)]
    found, _ = Work(model, Mapping(), BF16, **LIMITS).of(steps(items=items))
    assert float(found[0]) == pytest.approx(direct(model, Mapping(), items=items, measure=flops), rel=1e-3)


@pytest.mark.parametrize("prompt", [100, 1000, 8000])
def test_prompts_of_latent_attention_expand_every_token_once(prompt):
    """DeepSeek-V3's own 37 B active parameters, its head for one token, and 128 heads x 320 x 61 layers per pair."""
    model = load_model("deepseek-v3")
    found, _ = Work(model, Mapping(), BF16, **LIMITS).of(steps(items=[(prompt, 0)]))
    norms = sum(layer.norm_parameters for layer in model.layers) + model.other_parameters
    biases = sum(layer.feed_forward.experts for layer in model.layers if layer.feed_forward.router_bias)
    tables = model.vocab * model.hidden
    each = model.active_parameters - 2 * tables - norms - biases
    pairs = prompt * (prompt + 1) / 2
    expected = 2 * each * prompt + 2 * tables + 2 * pairs * 128 * 320 * 61
    assert float(found[0]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "mapping"),
    [("llama-3.1-8b", Mapping(tp=8)), ("llama-3.1-8b", Mapping(pp=4)), ("llama-3.1-70b", Mapping(tp=4, pp=2))],
)
def test_the_work_does_not_depend_on_the_cut(name, mapping):
    model, batch = load_model(name), steps(20, 20_000, [(700, 300)])
    whole, whole_bytes = Work(model, Mapping(), BF16, **LIMITS).of(batch)
    cut, cut_bytes = Work(model, mapping, BF16, **LIMITS).of(batch)
    assert float(cut[0]) == pytest.approx(float(whole[0]), rel=1e-9)
    assert float(cut_bytes[0]) >= float(whole_bytes[0])


@pytest.mark.parametrize(
    "mapping",
    [
        Mapping(tp=4, ep=4),
        Mapping(tp=4, expert_tp=4),
        Mapping(attention_dp=4, ep=4),
        Mapping(tp=2, attention_dp=2, ep=2, expert_tp=2),
    ],
)
def test_experts_compute_what_is_routed_to_them_wherever_they_are(mapping):
    """Lanes together; every rank also routes for itself."""
    model = load_model("mixtral-8x7b")
    whole, _ = Work(model, Mapping(), BF16, **LIMITS).of(steps(40, 40_000))
    share = 40 // mapping.attention_dp
    lane, _ = Work(model, mapping, BF16, **LIMITS).of(steps(share, 1000 * share))
    routers = 2 * 40 * 4096 * 8 * 32 * (mapping.tp - 1)
    assert mapping.attention_dp * float(lane[0]) - routers == pytest.approx(float(whole[0]), rel=1e-9)


def test_a_segment_is_the_sum_of_its_steps():
    model = load_model("llama-3.1-8b")
    work = Work(model, Mapping(), BF16, **LIMITS)
    run = work.of(steps(16, 16_000, repeat=101))
    singles = [work.of(steps(16, 16_000 + 16 * j)) for j in range(101)]
    for together, each in zip(run, zip(*singles, strict=True), strict=True):
        assert float(together[0]) == pytest.approx(float(np.sum(each)), rel=1e-9)


def test_many_segments_are_priced_at_once():
    model = load_model("llama-3.2-1b")
    work = Work(model, Mapping(), BF16, **LIMITS)
    one, two = steps(3, 300, repeat=5), steps(items=[(64, 0)])
    both = Steps(*(np.concatenate([getattr(s, name) for s in (one, two)]) for name in Steps.__dataclass_fields__))
    for together, a, b in zip(work.of(both), work.of(one), work.of(two), strict=True):
        assert together == pytest.approx([float(a[0]), float(b[0])])


def test_decode_moves_at_least_the_weights():
    model = load_model("llama-3.1-8b")
    _, found = Work(model, Mapping(tp=2), BF16, **LIMITS).of(steps(1, 1000))
    weights = 2 * (model.parameters - model.vocab * model.hidden)
    assert weights + 1000 * 131072 < float(found[0]) < 1.05 * (weights + 1000 * 131072)


def test_few_tokens_read_few_experts():
    model = load_model("deepseek-v3")
    layer = [
        op
        for op in ops.expert_feed_forward(
            model, model.layers[-1].feed_forward, np.array(1.0), np.array(1.0), Mapping(), BF16, 1
        )
        if isinstance(op, Experts)
    ]
    assert [float(op.active) for op in layer] == [pytest.approx(8.0)]
    _, found = Work(model, Mapping(), BF16, **LIMITS).of(steps(1, 1000))
    assert float(found[0]) < 2.1 * model.active_parameters
