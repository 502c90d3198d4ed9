"""Steps of context-parallel replicas: work conserved, memory divided, prompts faster, transfers as in closed form."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.contextattention import ContextTimes, context_operators, groups_of
from hwmodels.contextkinds import KINDS, directions, widths
from hwmodels.engine import load_engine
from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster, load_cluster
from hwmodels.huggingface import load_model
from hwmodels.kernels.estimate import Estimate
from hwmodels.kernels.measured import MeasuredCost
from hwmodels.mapping import Mapping, Precision
from hwmodels.memory import cached_bytes_per_rank, plan_memory, replica_sizes
from hwmodels.operators import Array, ContextAttention, Gemm, Operator
from hwmodels.overlap import Overlap
from hwmodels.roofline import AnalyticCost, rank_groups
from hwmodels.shape import ModelShape
from hwmodels.step_model import (
    StepModel,
    compile_step_model,
    decode_operators,
    linear_operators,
    prefill_operators,
    rank_tokens,
)
from hwmodels.work import Steps, Work, flops_of

LLAMA, QWEN, DEEPSEEK = (load_model(name) for name in ("llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v3"))
GPT_OSS = load_model("gpt-oss-20b")  # every second layer has a window of 128 tokens
BF16, VLLM = Precision(), load_engine("vllm")
H100 = load_cluster("h100-sxm", 8)
LONG = 131_072


def cut(cp: int, kind: str = "ring", **degrees: int) -> Mapping:
    return Mapping(cp=cp, cp_kind=kind if cp > 1 else "ring", **degrees)


def of_model(model: ModelShape, cp: int, kind: str = "ring", tp: int = 1) -> Mapping:
    return cut(cp, kind, tp=tp, expert_tp=cp * tp if model.is_moe else 1)


def model_of(mapping: Mapping, cluster: Cluster = H100, tokens: int = LONG, overlap: Overlap = "none") -> StepModel:
    cost = AnalyticCost(cluster, mapping)
    return compile_step_model(
        LLAMA, mapping, BF16, VLLM, cost, max_tokens=tokens, max_seqs=64, overlap=overlap, units=132
    )


def one(value: float) -> Array:
    return np.array([float(value)])


def flops(found: list[Operator]) -> float:
    return sum(float(flops_of(op).sum()) for op in found)


def attention_of(found: list[Operator]) -> ContextAttention:
    return next(op for op in found if isinstance(op, ContextAttention))


def times(mapping: Mapping, phase: str, tokens: float, context: float, cluster: Cluster = H100) -> ContextTimes:
    op = attention_of(context_operators(phase, LLAMA.layers[0].attention, one(tokens), one(context), mapping, BF16, 1))
    return AnalyticCost(cluster, mapping).context(op)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from([LLAMA, QWEN, GPT_OSS]),
    st.sampled_from(KINDS),
    st.sampled_from([2, 4, 8]),
    st.integers(1, 20_000),
    st.integers(0, 100_000),
)
def test_law_flops_of_all_ranks_do_not_depend_on_cp(
    model: ModelShape, kind: str, cp: int, tokens: int, context: int
) -> None:
    whole, shared = of_model(model, 1), of_model(model, cp, kind)

    def total(mapping: Mapping) -> tuple[float, float, float]:
        limits = model, model.layers, one(tokens), mapping, BF16
        return tuple(  # type: ignore[return-value]
            mapping.cp * flops(found)
            for found in (
                linear_operators(*limits, first=True, even=True),
                decode_operators(model.layers, one(tokens), one(tokens + context), mapping, BF16),
                prefill_operators(model.layers, one(tokens), one(context), mapping, BF16),
            )
        )

    assert total(shared) == pytest.approx(total(whole), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_law_latents_are_expanded_by_every_rank_that_reads_them(kind: str) -> None:
    whole, shared = of_model(DEEPSEEK, 1), of_model(DEEPSEEK, 4, kind)
    before = prefill_operators(DEEPSEEK.layers, one(4096), one(8192), whole, BF16)
    again = flops([op for op in before if isinstance(op, Gemm)]) * (0 if kind == "ulysses" else 3)
    now = prefill_operators(DEEPSEEK.layers, one(4096), one(8192), shared, BF16)
    assert 4 * flops(now) == pytest.approx(flops(before) + again, rel=1e-9)
    for kinds in ((whole, 1), (shared, 4)):
        found = decode_operators(DEEPSEEK.layers, one(8), one(80_000), kinds[0], BF16)
        assert kinds[1] * flops(found) == pytest.approx(
            flops(decode_operators(DEEPSEEK.layers, one(8), one(80_000), whole, BF16)), rel=1e-9
        )


@pytest.mark.parametrize("model", [LLAMA, QWEN], ids=lambda model: model.name)
def test_law_work_of_logged_steps_is_conserved(model: ModelShape) -> None:
    steps = Steps(
        *(np.array(values, dtype=float) for values in ([1, 5], [3, 8], [9e3, 4e4], [500, 0], [4e5, 0], [1, 0]))
    )

    def done(cp: int) -> tuple[Array, Array]:
        return Work(model, of_model(model, cp), BF16, max_tokens=1024, max_seqs=16).of(steps)

    (flops_1, bytes_1), (flops_4, bytes_4) = done(1), done(4)
    assert flops_4 == pytest.approx(flops_1, rel=1e-9)
    assert (bytes_4 > 1.2 * bytes_1).all()  # every rank reads weights of its own


def test_one_rank_is_priced_like_plain_attention() -> None:
    for model in (LLAMA, GPT_OSS, DEEPSEEK):
        mapping = of_model(model, 1)
        cost = AnalyticCost(H100, mapping)
        cost.context_groups = groups_of(mapping)
        for attention in {layer.attention for layer in model.layers}:
            for phase, tokens, context, plain in (
                ("prefill", 3000, 5000, prefill_operators),
                ("decode", 30, 70_000, decode_operators),
            ):
                only = [layer for layer in model.layers if layer.attention == attention][:1]
                found = plain(only, one(tokens), one(context), mapping, BF16)
                usual = sum(float(cost.time_s(op)[0]) for op in found)
                op = ContextAttention("attention", phase, "ring", attention, 1, 1, one(tokens), one(context), BF16)
                assert float(cost.time_s(op)[0]) == pytest.approx(usual, rel=1e-12)
                assert op.flops == pytest.approx(flops(found), rel=1e-12)


def test_without_context_parallelism_nothing_of_it_is_there() -> None:
    found = prefill_operators(LLAMA.layers, one(8), one(0), Mapping(), BF16)
    found += decode_operators(LLAMA.layers, one(8), one(80), Mapping(), BF16)
    assert not any(isinstance(op, ContextAttention) for op in found)
    assert "cp" not in rank_groups(Mapping(tp=8))
    assert replica_sizes(LLAMA, Mapping(), BF16).context_bytes_per_token == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_128k_tokens_is_the_faster_the_more_ranks_share_it(kind: str) -> None:
    found = [model_of(cut(cp, kind)).step_s(0, 0, [(LONG, 0)]) for cp in (1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    assert 6.0 < found[0] / found[3] <= 8.0


def test_kinds_send_and_hide_what_their_closed_forms_say() -> None:
    """Llama 8B: keys and values are 2048 wide, queries and outputs 4096; NVLink hides what can be hidden of 128k."""
    found = {kind: times(cut(8, kind), "prefill", LONG, 0) for kind in KINDS}
    sent = {kind: float(one.sent_bytes[0]) for kind, one in found.items()}
    w = widths(LLAMA.layers[0].attention, 8, 1, BF16)
    for kind in KINDS:
        assert sent[kind] == pytest.approx(float(sum(directions(kind, w, 8, LONG))))
    assert sent["ulysses"] < sent["ring"] == sent["all-gather"] < sent["tokenring"]
    assert sent["ring"] == 7 / 8 * LONG * 2048 * 2
    assert found["ring"].exposed_s == 0.0
    assert found["ring"].hidden_s > 0.0
    for kind in ("ulysses", "all-gather"):
        assert found[kind].exposed_s == found[kind].communication_s > 0.0
    # TokenRing's last partial outputs come when there is nothing left to attend to.
    assert 0.0 < found["tokenring"].exposed_s < found["tokenring"].communication_s
    assert found["ulysses"].exposed_s < found["all-gather"].exposed_s


def test_a_ring_over_nodes_is_exposed_where_chunks_are_short() -> None:
    """Every chunk of 2048 passes 100k cached tokens on: Ulysses sends of the new tokens only."""
    nodes = load_cluster("h100-sxm", 16)
    ring, ulysses = (times(cut(16, kind), "prefill", 2048, 100_000, cluster=nodes) for kind in ("ring", "ulysses"))
    assert ring.exposed_s > 0.5 * ring.communication_s
    assert float(ulysses.sent_bytes[0]) < 0.05 * float(ring.sent_bytes[0])
    assert ring.total_s > 2 * ulysses.total_s
    assert "NVLink" not in ring.link


def test_decoding_long_contexts_reads_a_part_of_the_cache_on_each_rank() -> None:
    one_rank = model_of(cut(1), tokens=256)
    for kind in KINDS:
        eight = model_of(cut(8, kind), tokens=256)
        assert eight.step_s(8, 8 * LONG, []) < 0.6 * one_rank.step_s(8, 8 * LONG, [])
    # Short ones cost more than they save: queries and outputs travel in every layer.
    assert model_of(cut(8), tokens=256).step_s(1, 100, []) > one_rank.step_s(1, 100, [])


@pytest.mark.parametrize("model", [LLAMA, QWEN, GPT_OSS], ids=lambda model: model.name)
def test_memory_of_a_rank_falls_with_cp(model: ModelShape) -> None:
    def sizes(cp: int, kind: str) -> tuple[float, int]:
        found = replica_sizes(model, of_model(model, cp, kind), BF16)
        limits = {"token_budget": 8192, "max_seqs": 64, "block_tokens": 16, "max_context_tokens": LONG}
        return found.stages[0][1], plan_memory(found, H100.device, VLLM, **limits).kv_blocks

    for kind in KINDS:
        (whole, blocks), (quarter, more) = sizes(1, kind), sizes(4, kind)
        assert quarter == pytest.approx(whole / 4)
        assert more > 3.9 * blocks
    assert cached_bytes_per_rank(LLAMA.layers, cut(16, "ulysses"), BF16) == pytest.approx(
        cached_bytes_per_rank(LLAMA.layers, cut(8, "ulysses"), BF16)
    )  # no more than the 8 KV heads


def test_gathered_keys_need_room_that_grows_with_the_context() -> None:
    def blocks(kind: str, context: int) -> int:
        sizes = replica_sizes(LLAMA, cut(8, kind), BF16)
        limits = {"token_budget": 8192, "max_seqs": 64, "block_tokens": 16}
        return plan_memory(sizes, H100.device, VLLM, **limits, max_context_tokens=context).kv_blocks

    assert blocks("ulysses", LONG) == blocks("ulysses", 0)
    lost = {kind: (blocks(kind, 0) - blocks(kind, LONG)) * 16 for kind in ("ring", "all-gather")}
    # One layer of 32; a rank's cached token is an eighth: 7 of 8 parts, or two blocks of an eighth.
    assert lost["all-gather"] == pytest.approx(LONG * 7 / 32, abs=32)
    assert lost["ring"] == pytest.approx(LONG * 2 / 32, abs=32)


def test_experts_are_spread_over_the_ranks_that_share_a_sequence() -> None:
    spread, kept = (replace(of_model(QWEN, 4, tp=2), ep=ep, expert_tp=8 // ep) for ep in (8, 1))
    names = {op.name for op in linear_operators(QWEN, QWEN.layers, one(4096), spread, BF16, first=False)}
    assert {"expert dispatch", "expert combine"} <= names
    assert rank_groups(spread)["ep"] == tuple(range(8))
    assert rank_groups(spread)["cp"] == (0, 2, 4, 6)
    for mapping in (spread, kept):
        weights = replica_sizes(QWEN, mapping, BF16).stages[0][0]
        assert weights < 0.4 * replica_sizes(QWEN, Mapping(), BF16).stages[0][0]


def test_attention_groups_and_stages_come_behind_the_ranks_of_a_sequence() -> None:
    mapping = replace(cut(2), tp=2, pp=2, attention_dp=2, ep=8)
    assert mapping.gpus == 16
    assert rank_groups(mapping) == {
        "tp": (0, 1), "cp": (0, 2), "ep": tuple(range(8)), "expert_tp": (0,), "pp": (0, 8)
    }  # fmt: skip
    assert groups_of(mapping) == ((0, 2), (1, 3), (4, 6), (5, 7))


def test_pipelines_attention_groups_and_overlap_have_steps() -> None:
    two = model_of(cut(2, pp=2), tokens=4096)
    alone = model_of(cut(2), tokens=4096)
    batch = [(4, 4000, [(2000, 0)])]
    assert sum(two.lockstep_stages_s(batch)) == pytest.approx(alone.lockstep_s(batch), rel=0.01)
    cost = AnalyticCost(H100, mapping := replace(cut(2, "ulysses"), attention_dp=2, tp=2, ep=8))
    model = compile_step_model(QWEN, mapping, BF16, VLLM, cost, max_tokens=512, max_seqs=16)
    assert model.lockstep_s(batch_of := [(4, 4000, [(300, 0)])] * 2) > 0
    assert model.lockstep_s(batch_of) > model.lockstep_s([(4, 4000, [(200, 0)])] * 2)
    overlapped = model_of(cut(2, tp=2), tokens=4096, overlap="two-way")
    plain = model_of(cut(2, tp=2), tokens=4096)
    assert overlapped.step_s(0, 0, [(4096, 0)]) < plain.step_s(0, 0, [(4096, 0)])


def test_parts_of_tokens_are_whole_unless_they_are_to_be_summed() -> None:
    assert rank_tokens(np.array([1.0, 8.0, 9.0]), 4).tolist() == [1.0, 2.0, 3.0]
    assert rank_tokens(np.array([1.0, 8.0, 9.0]), 4, even=True).tolist() == [0.25, 2.0, 2.25]


def test_degrees_that_heads_forbid_are_refused() -> None:
    with pytest.raises(MappingError, match=r"ulysses with cp = 3.*or ring"):
        prefill_operators(LLAMA.layers, one(8), one(0), cut(3, "ulysses"), BF16)
    with pytest.raises(MappingError, match="cp_kind 'spiral': expected one of ring, tokenring"):
        prefill_operators(LLAMA.layers, one(8), one(0), cut(2, "spiral"), BF16)
    with pytest.raises(MappingError, match=r"rank|devices"):
        model_of(cut(16), tokens=64)


class CausalTable:
    """Measured prefill attention that takes a second for every million pairs of a head, masked causally."""

    def time_s(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        window: int,
        formats: str,
        kv: str,
        one: Array,
        new: Array,
        read: Array,
    ) -> Estimate:
        seconds = heads * (new * read + new * (new + 1) / 2) / 1e6
        return Estimate(seconds, np.ones_like(seconds))


@pytest.mark.parametrize("kind", KINDS)
def test_measured_kernels_price_blocks_by_the_pairs_they_have(kind: str) -> None:
    """Tables are causal; how much a block that is masked otherwise differs from that, the analytic model tells."""
    kernels = SimpleNamespace(attention_prefill=CausalTable(), gemm=None, attention_decode=None, collective=None)
    cost = MeasuredCost(H100, cut(4, kind), kernels)  # type: ignore[arg-type]
    layer = LLAMA.layers[0].attention
    op = attention_of(context_operators("prefill", layer, one(LONG), one(0), cut(4, kind), BF16, 1))
    whole = 32 * LONG * (LONG + 1) / 2 / 1e6
    assert float(cost.context(op).attention_s[0]) == pytest.approx(whole / 4, rel=0.05)
    assert float(cost.time_s(op)[0]) == pytest.approx(float(cost.context(op).total_s[0]))
    sources = cost.sources(op)
    assert sum(sources.values()) == pytest.approx(float(cost.time_s(op)[0]))
    assert sources["measured"] > 0.99 * sum(sources.values())
