"""KV of replicas whose tokens lie on several ranks: no byte is lost or sent twice, whatever the two sides' degrees."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.interconnect import Interconnect
from hwmodels.mapping import Mapping, Precision
from hwmodels.memory import cached_bytes_per_rank
from hwmodels.shape import ModelShape
from hwmodels.step_model import stage_layers
from simulator.transfers import KvSide, TransferEngine, kv_route, store_route

LLAMA = load_model("llama-3.1-70b")  # 80 layers, 8 KV heads of 128
DEEPSEEK = load_model("deepseek-v3")  # 61 layers of one latent of 512 + 64
RAILS = Interconnect([load_cluster("h100-sxm", 64)])
CUTS = st.builds(
    lambda tp, cp, pp, kind: Mapping(tp=tp, cp=cp, pp=pp, cp_kind=kind if cp > 1 else "ring"),
    st.sampled_from((1, 2, 4)),
    st.sampled_from((1, 2, 3, 4)),
    st.sampled_from((1, 2)),
    st.sampled_from(("ring", "all-gather")),
) | st.sampled_from((Mapping(cp=8, cp_kind="ulysses"), Mapping(tp=2, cp=4, cp_kind="ulysses")))


def side(first: int, mapping: Mapping) -> KvSide:
    return KvSide(tuple(range(first, first + mapping.gpus)), mapping)


def kept(model: ModelShape, mapping: Mapping) -> float:
    """Bytes of one token on all ranks of the replica, copies counted."""
    each = [cached_bytes_per_rank(layers, mapping, Precision()) for layers in stage_layers(model, mapping)]
    return sum(each) * mapping.tp * mapping.cp


@pytest.mark.parametrize("model", [LLAMA, DEEPSEEK], ids=lambda model: model.name)
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(ours=CUTS, theirs=CUTS)
def test_law_all_ranks_of_the_target_get_what_memory_says_they_keep(
    model: ModelShape, ours: Mapping, theirs: Mapping
) -> None:
    route = kv_route(RAILS, model, side(0, ours), side(32, theirs))
    assert route.bytes_per_token == pytest.approx(kept(model, theirs))
    loads = dict(zip(route.links, route.shares, strict=True))
    into = {device: loads.get(RAILS.way(0, device)[-1], 0.0) for device in range(32, 32 + theirs.gpus)}
    assert sum(into.values()) == pytest.approx(1.0)
    stage = theirs.tp * theirs.cp
    for place, layers in enumerate(stage_layers(model, theirs)):
        each = cached_bytes_per_rank(layers, theirs, Precision()) / kept(model, theirs)
        assert all(into[32 + place * stage + rank] == pytest.approx(each) for rank in range(stage))


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(theirs=CUTS, cut=CUTS)
def test_law_stores_keep_one_copy_of_what_ranks_share(theirs: Mapping, cut: Mapping) -> None:
    for model in (LLAMA, DEEPSEEK):
        stored = store_route(MIXED, model, side(0, cut), "host", load=False)
        loaded = store_route(MIXED, model, side(0, cut), "host", load=True)
        assert stored.bytes_per_token == pytest.approx(model.kv_bytes_per_token("bf16"))
        assert loaded.bytes_per_token == pytest.approx(kept(model, cut))


MIXED = Interconnect([load_cluster("h100-sxm", 64)], ssd_bytes_per_s=1e10)


def test_prefill_over_four_ranks_feeds_one_decoding_rank() -> None:
    route = kv_route(RAILS, LLAMA, side(0, Mapping(cp=4)), side(8, Mapping()))
    assert route.bytes_per_token == model_bytes(LLAMA)
    out = Counter(RAILS.names[link].split(",")[1].strip() for link in route.links)
    assert sum(out.values()) == len(route.links)
    assert route.weight == 4  # every part is sent by the rank that has it, at the same time
    one = kv_route(RAILS, LLAMA, side(0, Mapping()), side(8, Mapping()))
    assert route.bottleneck_bytes_per_s == pytest.approx(one.bottleneck_bytes_per_s)  # into one card
    assert kv_route(RAILS, LLAMA, side(0, Mapping(cp=4)), side(8, Mapping(cp=4))).bottleneck_bytes_per_s == (
        pytest.approx(4 * one.bottleneck_bytes_per_s)
    )


def test_each_rank_sends_its_part_of_the_blocks() -> None:
    engine = TransferEngine("messages", "made up", message_s=1e-6)
    one = kv_route(RAILS, LLAMA, side(0, Mapping()), side(8, Mapping()), engine)
    four = kv_route(RAILS, LLAMA, side(0, Mapping(cp=4)), side(8, Mapping()), engine)
    assert one.messages_per_block == 2 * 80
    assert four.messages_per_block == 2 * 80 / 4


def model_bytes(model: ModelShape) -> float:
    return model.kv_bytes_per_token("bf16")
