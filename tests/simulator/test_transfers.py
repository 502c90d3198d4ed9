"""Routes of KV between replicas and to stores: bytes conserved, ways real, copies counted, misfits refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import MappingError
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.interconnect import Interconnect
from hwmodels.mapping import Mapping
from hwmodels.shape import ModelShape
from simulator.flows import Flows
from simulator.transfers import (
    KvSide,
    Push,
    Route,
    Routes,
    TransferEngine,
    TransferError,
    kv_route,
    layer_wise,
    store_route,
)

LLAMA = load_model("llama-3.1-70b")  # 80 layers, 8 KV heads of 128
QWEN = load_model("qwen3-235b-a22b")  # 94 layers, 4 KV heads of 128
DEEPSEEK = load_model("deepseek-v3")  # 61 layers of one latent of 512 + 64
MODELS = {model.name: model for model in (LLAMA, QWEN, DEEPSEEK)}
RAILS = Interconnect([load_cluster("h100-sxm", 64)])
MIXED = Interconnect(
    [load_cluster("h100-sxm", 16), load_cluster("a100-80-sxm", 8)], ssd_bytes_per_s=1e10, remote_bytes_per_s=4e10
)
DEGREES = [(1, 1, 1), (2, 1, 1), (8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 1, 8), (2, 1, 4), (8, 2, 1), (2, 3, 2)]


def side(
    first: int, tp: int = 1, pp: int = 1, dp: int = 1, group: int = 0, kv: str = "bf16", block: int = 16
) -> KvSide:
    mapping = Mapping(tp=tp, pp=pp, attention_dp=dp, ep=tp * dp)
    return KvSide(tuple(range(first, first + mapping.gpus)), mapping, kv, block, group)


def rate(route: Route, network: Interconnect) -> float:
    """Bytes/s of a flow on the route that is alone."""
    flows = Flows(network.bytes_per_s)
    return flows.rate(flows.start(0.0, route.links, 1e9, shares=route.shares, weight=route.weight))


def test_equal_degrees_move_on_parallel_rails() -> None:
    route = kv_route(RAILS, LLAMA, side(0, tp=8), side(8, tp=8))
    assert route.bytes_per_token == 2 * 80 * 8 * 128 * 2
    assert route.weight == 8
    assert len(route.links) == 8 * 4  # device to card, card to leaf, leaf to card, card to device
    assert all(share == pytest.approx(1 / 8) for share in route.shares)
    assert route.bottleneck_bytes_per_s == pytest.approx(8 * 50e9 * 0.9)
    assert rate(route, RAILS) == pytest.approx(route.bottleneck_bytes_per_s)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(DEGREES), st.sampled_from(DEGREES), st.data())
def test_law_every_receiving_rank_gets_what_it_keeps(
    model: ModelShape, ours: tuple[int, int, int], theirs: tuple[int, int, int], data: st.DataObject
) -> None:
    source = side(0, *ours, group=data.draw(st.integers(0, ours[2] - 1)))
    target = side(32, *theirs, group=data.draw(st.integers(0, theirs[2] - 1)))
    route = kv_route(RAILS, model, source, target)
    attention = model.layers[0].attention
    copies = theirs[0] if attention.latent is not None else max(1, theirs[0] // attention.kv_heads)
    assert route.bytes_per_token == pytest.approx(copies * model.kv_bytes_per_token("bf16"))
    loads = dict(zip(route.links, route.shares, strict=True))
    into = {device: loads.get(RAILS.way(0, device)[-1], 0.0) for device in target.devices}
    receivers = {device for stage in range(theirs[1]) for part in target.parts(stage) for device in part}
    assert sum(into.values()) == pytest.approx(1.0)
    assert all((share > 0) == (device in receivers) for device, share in into.items())
    layers = -(-len(model.layers) // theirs[1]), len(model.layers) // theirs[1]
    each = [into[device] for device in receivers]
    assert max(each) / min(each) == pytest.approx(layers[0] / layers[1] if theirs[1] > 1 else 1.0)
    assert rate(route, RAILS) == pytest.approx(route.bottleneck_bytes_per_s)
    assert route.alone_s(100) >= route.nbytes(100) / route.bottleneck_bytes_per_s


def test_latents_are_sent_by_different_ranks_to_different_groups() -> None:
    first = [kv_route(RAILS, DEEPSEEK, side(0, tp=8), side(8, dp=8, group=group)).links[0] for group in range(8)]
    assert first == [RAILS.way(rank, 8 + rank)[0] for rank in range(8)]


def test_a_replica_keeps_what_is_already_there() -> None:
    route = kv_route(RAILS, LLAMA, side(0, tp=4), side(0, tp=4))
    assert (route.links, route.latency_s, route.alone_s(1000)) == ((), 0.0, 0.0)
    half = kv_route(RAILS, LLAMA, side(0, tp=2), side(0, tp=4))
    assert sum(half.shares) == pytest.approx(2 * 3 / 4)  # device 0 keeps a quarter; the others' pass two links each


def test_clusters_meet_at_their_spines() -> None:
    route = kv_route(MIXED, LLAMA, side(0, tp=8), side(16, tp=8))
    assert route.bottleneck_bytes_per_s == pytest.approx(8 * 25e9 * 0.9)
    assert route.latency_s == pytest.approx(6.5e-6)
    narrow = Interconnect(MIXED.clusters, between_bytes_per_s=1e10)
    assert kv_route(narrow, LLAMA, side(0, tp=8), side(16, tp=8)).bottleneck_bytes_per_s == pytest.approx(1e10)
    back = kv_route(narrow, LLAMA, side(16, tp=8), side(0, tp=8))
    assert not set(back.links) & set(kv_route(narrow, LLAMA, side(0, tp=8), side(16, tp=8)).links)


def test_law_ways_between_clusters_follow_one_another() -> None:
    names = [MIXED.names[link] for link in MIXED.way(3, 17)]
    assert [name.split(",")[1].strip().split(" of ")[0] for name in names] == [
        "gpu 3 to nic 3",
        "nic 3 to leaf 3",
        "leaf 3 to spine",
        "InfiniBand HDR uplink 1",
        "InfiniBand HDR",
        "gpu 1",
    ]
    assert len(MIXED.names) == len(MIXED.bytes_per_s)


def test_stores_keep_one_copy_and_load_all() -> None:
    replica = side(0, tp=8)
    stored = store_route(MIXED, QWEN, replica, "host", load=False)
    loaded = store_route(MIXED, QWEN, replica, "host", load=True)
    assert stored.bytes_per_token == QWEN.kv_bytes_per_token("bf16")
    assert loaded.bytes_per_token == 2 * stored.bytes_per_token
    assert stored.bottleneck_bytes_per_s == pytest.approx(4 * 55e9)
    assert loaded.bottleneck_bytes_per_s == pytest.approx(8 * 55e9)
    latent = store_route(MIXED, DEEPSEEK, replica, "ssd", load=False)
    assert latent.bytes_per_token == DEEPSEEK.kv_bytes_per_token("bf16")
    assert store_route(MIXED, QWEN, replica, "ssd", load=True).bottleneck_bytes_per_s == pytest.approx(1e10)
    assert store_route(MIXED, QWEN, replica, "remote", load=True).bottleneck_bytes_per_s == pytest.approx(4e10)


def test_host_traffic_and_network_share_a_device_s_pcie_link() -> None:
    assert MIXED.to_host(3)[0] == MIXED.way(3, 17)[0]
    alone = Interconnect([load_cluster("h100-sxm", 8)])
    assert not set(alone.to_host(3)) & set(alone.way(3, 5))


def test_messages_and_their_cost() -> None:
    engine = TransferEngine("slow", "test", setup_s=1e-3, layer_s=1e-4, message_s=1e-6, efficiency=0.5)
    route = kv_route(RAILS, LLAMA, side(0, tp=8), side(8, tp=8), engine)
    assert route.messages(33) == 3 * 80 * 2
    assert route.delay_s(33) == pytest.approx(6e-6 + 1e-3 + 80 * 1e-4 + 480e-6)
    assert route.limit_bytes_per_s == pytest.approx(0.5 * 360e9)
    to_more = kv_route(RAILS, LLAMA, side(0, tp=2), side(8, tp=8))
    assert to_more.messages(16) == 4 * 80 * 2  # the heads of each receiver are a piece of their own
    staged = kv_route(RAILS, LLAMA, side(0, tp=2, pp=4), side(8, tp=8), engine)
    assert staged.latency_s == pytest.approx(6e-6 + 3e-6 + 1e-3 + 20 * 1e-4)
    assert kv_route(RAILS, DEEPSEEK, side(0, tp=8), side(8, tp=8)).messages(16) == 61


def test_routes_are_worked_out_once() -> None:
    sides = [side(0, tp=4), side(4, tp=4), side(8, tp=8)]
    routes = Routes(RAILS, LLAMA, sides)
    assert routes.between(0, 2) is routes.between(0, 2)
    assert routes.between(1, 2) == kv_route(RAILS, LLAMA, sides[1], sides[2])


@given(st.floats(1e6, 1e11), st.integers(1, 100), st.floats(0, 10), st.floats(1e9, 1e12))
def test_law_layer_wise_never_beats_bytes_or_computation(
    nbytes: float, layers: int, compute_s: float, bytes_per_s: float
) -> None:
    push = layer_wise(nbytes, layers, compute_s)
    assert push.early_bytes + push.tail_bytes == pytest.approx(nbytes)
    end_s = push.end_s(compute_s, bytes_per_s)
    alone_s = nbytes / bytes_per_s
    assert end_s >= max(compute_s + alone_s / layers, compute_s / layers + alone_s) * (1 - 1e-9)
    assert end_s <= (compute_s + alone_s) * (1 + 1e-9)
    # Layer by layer: each is sent when it is computed and the one before has arrived.
    arrived_s = 0.0
    for layer in range(1, layers + 1):
        arrived_s = max(arrived_s, layer * compute_s / layers) + alone_s / layers
    assert end_s == pytest.approx(arrived_s, rel=1e-9)


def test_layer_wise_of_nothing_to_compute() -> None:
    assert layer_wise(10.0, 2, 0.0) == Push(0.0, 5.0, float("inf"), 5.0)


def test_pools_that_cannot_exchange_kv() -> None:
    with pytest.raises(TransferError, match=r"KV in bf16 to a cache in fp8: expected one format; .* or convert"):
        kv_route(RAILS, LLAMA, side(0), side(8, kv="fp8"))
    with pytest.raises(TransferError, match="KV blocks of 16 tokens to a cache of 64: expected one size"):
        kv_route(RAILS, LLAMA, side(0), side(8, block=64))
    converted = kv_route(RAILS, LLAMA, side(0), side(8, kv="fp8", block=64), convert=True)
    assert converted.bytes_per_token == LLAMA.kv_bytes_per_token("fp8")
    assert converted.block_tokens == 16
    lone = Interconnect([load_cluster("h100-sxm", 8), load_cluster("tpu-v5e", 8)])
    with pytest.raises(TransferError, match="no path from device 0 to device 8: tpu-v5e-pod has no links out of its"):
        kv_route(lone, LLAMA, side(0), side(8))
    with pytest.raises(TransferError, match="device 0: no disks; expected ssd_bytes_per_s"):
        store_route(RAILS, LLAMA, side(0), "ssd", load=True)
    with pytest.raises(TransferError, match="no remote store; expected remote_bytes_per_s"):
        store_route(RAILS, LLAMA, side(0), "remote", load=True)
    with pytest.raises(TransferError, match="store 'tape': expected one of host, ssd, remote"):
        store_route(RAILS, LLAMA, side(0), "tape", load=True)
    with pytest.raises(TransferError, match="3 devices of a replica of 4"):
        KvSide((0, 1, 2), Mapping(tp=4))
    with pytest.raises(TransferError, match="group 2: expected one of 2"):
        side(0, dp=2, group=2)
    with pytest.raises(MappingError, match="device 64: expected one of 0 to 63"):
        RAILS.way(0, 64)


def test_a_lone_node_has_the_links_its_cluster_profile_says() -> None:
    ethernet = load_cluster("hgx-h100-ethernet", 8)
    pair = Interconnect([ethernet, replace(ethernet, name="other")])
    out = pair.bytes_per_s[list(pair.way(0, 8))]
    joined = Interconnect([load_cluster("hgx-h100-ethernet", 16)])
    np.testing.assert_allclose(out[1:-1], joined.bytes_per_s[list(joined.way(0, 8))][1:-1])
    assert out[2] == pytest.approx(8 * 50e9 * 0.85 / 2)
