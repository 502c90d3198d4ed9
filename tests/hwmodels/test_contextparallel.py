"""Context parallelism: closed forms of the volumes, laws of the times, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.collectives import compile_collective
from hwmodels.contextkinds import KINDS, Kind, cached_share, directions, extra_bytes, require_legal, widths
from hwmodels.contextlinks import at_once, collective_s, compile_hop, context_groups
from hwmodels.contextparallel import ContextCost, context_cost, priced_attention
from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster, load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import prefill_attention
from hwmodels.roofline import AnalyticCost
from hwmodels.shape import Attention
from hwmodels.topology import topology

WIDE = Precision()
MHA = Attention(heads=32, kv_heads=32, head_dim=128, value_dim=128)
GQA = Attention(heads=32, kv_heads=8, head_dim=128, value_dim=128)
MLA = load_model("deepseek-v3").layers[0].attention
NODE, PAIR, MESH = load_cluster("h100-sxm", 8), load_cluster("h100-sxm", 16), load_cluster("mi300x", 8)
H = 32 * 128 * 2.0  # bytes of one token's query, or of its keys with multi-head attention


def cost(
    kind: Kind, attention: Attention = GQA, cluster: Cluster = NODE, cp: int = 8, tp: int = 1,
    new: object = 32768.0, before: object = 0.0, layout: str = "zigzag",
) -> ContextCost:  # fmt: skip
    price = priced_attention(AnalyticCost(cluster, Mapping()).time_s, attention, tp, WIDE)
    groups = context_groups(cp, tp)
    return context_cost(cluster, groups, kind, attention, tp, WIDE, new, before, price, layout=layout)  # type: ignore[arg-type]


@given(st.integers(1, 32), st.integers(1, 10**6), st.integers(0, 10**6))
def test_ring_and_all_gather_send_all_but_one_share_of_keys_and_values(cp: int, new: int, before: int) -> None:
    w = widths(MHA, cp, 1, WIDE)
    for kind in ("ring", "all-gather"):
        assert sum(directions(kind, w, cp, new, before)) == pytest.approx(2 * (cp - 1) / cp * (new + before) * H)  # type: ignore[arg-type]


@given(st.integers(0, 5), st.integers(1, 1000))
def test_ulysses_volume_per_link_stays_when_tokens_and_ranks_grow_together(doublings: int, each: int) -> None:
    """4 s h / P elements, the share a rank keeps included: V10."""
    cp = 2**doublings
    sent = float(sum(directions("ulysses", widths(MHA, cp, 1, WIDE), cp, cp * each)))
    assert sent == pytest.approx((cp - 1) / cp * 4 * each * H)


@given(st.integers(2, 32), st.integers(1, 10**6))
def test_tokenring_halves_each_direction_with_mha_and_loses_with_gqa(cp: int, new: int) -> None:
    for attention, ratio in ((MHA, 0.5), (GQA, 2.0)):
        w = widths(attention, cp, 1, WIDE)
        ring = float(directions("ring", w, cp, new)[0])
        onward, back = (float(sent) for sent in directions("tokenring", w, cp, new))
        assert onward == pytest.approx(ratio * ring)
        assert back == pytest.approx(ratio * ring * (1 + 4 / (128 * 2)))  # outputs, and 4 bytes per head


@given(st.integers(1, 10**5), st.integers(0, 10**6))
def test_passing_queries_beats_passing_keys_when_few_of_the_tokens_are_new(new: int, before: int) -> None:
    """new / (new + before) < 2 kv_heads / heads (Meta, arXiv:2411.01783), queries alone."""
    w = widths(GQA, 4, 1, WIDE)
    queries, keys = directions("tokenring", w, 4, new, before)[0], directions("ring", w, 4, new, before)[0]
    assert (queries < keys) == (new / (new + before) < 2 * 8 / 32)


def test_latent_attention_passes_the_latent() -> None:
    assert MLA.latent is not None
    w = widths(MLA, 8, 1, WIDE)
    assert w.kv == (512 + 64) * 2.0
    assert widths(MLA, 8, 8, WIDE).kv == w.kv  # every tensor-parallel rank passes it whole
    assert float(directions("ring", w, 8, 800)[0]) == 7 / 8 * 800 * 1152
    # Ulysses gathers latents whole, for every head reads them.
    assert float(directions("ulysses", w, 8, 800)[0]) == pytest.approx(7 / 8 * (100 * 128 * 192 * 2 + 800 * 1152))


def test_kv_heads_are_divided_as_far_as_they_go_and_then_copied() -> None:
    each = 2 * 128 * 2.0
    assert [widths(GQA, cp, 1, WIDE).kv_copied / each for cp in (1, 4, 8, 32)] == [8, 8, 8, 32]
    assert [cached_share("ulysses", GQA, cp, 1) for cp in (1, 4, 8, 32)] == [1, 1 / 4, 1 / 8, 1 / 8]
    assert cached_share("ring", GQA, 32, 1) == 1 / 32 and cached_share("ulysses", MLA, 8, 1) == 1.0


@pytest.mark.parametrize(
    ("kind", "attention", "cp", "tp", "words"),
    [
        ("ulysses", GQA, 64, 1, "or ring"),
        ("ulysses", GQA, 16, 4, "or ring"),
        ("ulysses", Attention(12, 6, 64, 64), 4, 1, "or ring"),
        ("ring", GQA, 4, 3, "divisor of 32"),
        ("spiral", GQA, 4, 1, "tokenring"),
        ("ring", GQA, 0, 1, "at least 1"),
    ],
)
def test_degrees_that_break_a_law_are_refused_with_a_way_out(
    kind: str, attention: Attention, cp: int, tp: int, words: str
) -> None:
    with pytest.raises(MappingError, match=words):
        require_legal(kind, attention, cp, tp)


@pytest.mark.parametrize("attention", [MHA, GQA, MLA, replace(GQA, window_tokens=4096)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cluster", [NODE, PAIR, MESH])
def test_times_are_consistent(kind: Kind, attention: Attention, cluster: Cluster) -> None:
    found = cost(kind, attention, cluster, cluster.gpus, new=np.array([512.0, 8192, 131072, 4096]),
                 before=np.array([0.0, 0, 0, 200_000]))  # fmt: skip
    assert (found.exposed_s >= 0).all() and (found.hidden_s >= 0).all()
    np.testing.assert_allclose(found.exposed_s + found.hidden_s, found.communication_s, rtol=1e-9)
    assert (found.total_s >= np.maximum(found.attention_s, found.communication_s) * (1 - 1e-12)).all()
    assert (found.total_s <= (found.attention_s + found.communication_s) * (1 + 1e-12)).all()
    assert (found.sent_bytes > 0).all() and (found.extra_bytes > 0).all() and (found.link_bytes > 0).all()
    assert (found.imbalance >= 1).all() and found.link != "none"


@pytest.mark.parametrize("attention", [GQA, MLA, replace(GQA, window_tokens=1024)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_is_plain_attention(kind: Kind, attention: Attention) -> None:
    new, before = np.array([4096.0, 100.0]), np.array([100.0, 20_000.0])
    found = cost(kind, attention, cp=1, new=new, before=before)
    plain = prefill_attention(attention, new, before, 1, WIDE, 1)
    np.testing.assert_allclose(found.total_s, sum(AnalyticCost(NODE, Mapping()).time_s(op) for op in plain))
    for nothing in (found.sent_bytes, found.exposed_s, found.extra_bytes, found.merge_bytes, found.link_bytes):
        assert not nothing.any()


@settings(max_examples=25)
@given(st.sampled_from(KINDS), st.floats(1.0, 50.0), st.integers(2, 8), st.integers(64, 10**5))
def test_exposed_time_falls_with_bandwidth(kind: Kind, faster: float, cp: int, new: int) -> None:
    cp = 2 ** (cp.bit_length() - 1)
    assert NODE.intra is not None
    quick = replace(NODE, intra=replace(NODE.intra, bytes_per_s=faster * NODE.intra.bytes_per_s))
    slow_s, quick_s = (float(cost(kind, MHA, cluster, cp, new=new).exposed_s) for cluster in (NODE, quick))
    assert quick_s <= slow_s * (1 + 1e-9)


@settings(max_examples=25)
@given(st.sampled_from(KINDS), st.integers(1, 10**5), st.integers(0, 10**6))
def test_more_tokens_send_no_less(kind: Kind, new: int, before: int) -> None:
    small, more, cached = (cost(kind, new=new * k, before=b) for k, b in ((1, before), (2, before), (1, before + 64)))
    assert more.sent_bytes >= small.sent_bytes and more.communication_s >= small.communication_s
    assert cached.sent_bytes >= small.sent_bytes and cached.total_s >= small.total_s * (1 - 1e-9)


def test_long_chunks_hide_the_ring_and_short_ones_do_not() -> None:
    found = cost("ring", MHA, PAIR, 16, new=np.array([1024.0, 2**20]))
    assert found.exposed_s[0] > 0.5 * found.communication_s[0]
    assert found.exposed_s[1] == 0.0


def test_zigzag_nearly_halves_a_ring_of_contiguous_pieces() -> None:
    """A contiguous ring takes cp full blocks in all but its first step; zig-zag blocks are half full."""
    even, uneven = (float(cost("ring", new=2**20, layout=layout).attention_s) for layout in ("zigzag", "contiguous"))
    assert 1.6 < uneven / even < 2.0


def test_two_directions_pay_where_links_join_pairs_and_not_at_one_port() -> None:
    """On a mesh the most loaded link carries about half as much as the ring's; a port into a switch carries both."""
    mesh = [float(cost(kind, MHA, MESH, new=65536).link_bytes) for kind in ("ring", "tokenring")]
    port = [float(cost(kind, MHA, NODE, new=65536).link_bytes) for kind in ("ring", "tokenring")]
    assert 0.5 <= mesh[1] / mesh[0] < 0.6
    assert 1.0 <= port[1] / port[0] < 1.02


def test_loads_of_a_hop_are_bytes_on_the_ways_taken() -> None:
    groups = context_groups(8, tp=2)
    hop = compile_hop(PAIR, groups, 1)
    links = topology(PAIR)
    src = np.array(groups)
    dst = np.roll(src, -1, axis=1)
    np.testing.assert_allclose(hop.loads, links.loads(src.ravel(), dst.ravel(), 1.0))
    assert float(hop.time_s(1e9)) == pytest.approx(hop.latency_s + 1e9 * (hop.loads / links.bytes_per_s).max())
    assert float(hop.time_s(0.0)) == 0.0
    both = at_once(PAIR, [(hop, 2.0), (compile_hop(PAIR, groups, -1), 3.0)])
    np.testing.assert_allclose(both.loads, 2.0 * hop.loads + 3.0 * links.loads(dst.ravel(), src.ravel(), 1.0))
    assert at_once(PAIR, []).time_s(5.0) == 0.0


def test_groups_at_once_are_never_faster_than_one_alone() -> None:
    shared = load_cluster("rtx-4090", 8)
    for kind in ("all-gather", "all-to-all"):
        alone = float(collective_s(shared, kind, context_groups(4, 2)[:1], 1e8))
        assert alone == float(compile_collective(shared, kind, (0, 2, 4, 6)).time_s(1e8))
        assert float(collective_s(shared, kind, context_groups(4, 2), 1e8)) > 1.2 * alone


def test_buffers_of_all_gather_grow_with_the_prompt_and_of_a_ring_with_its_share() -> None:
    def held(kind: Kind, cp: int) -> float:
        return float(extra_bytes(kind, widths(GQA, cp, 1, WIDE), cp, 8192.0, 1e6))

    assert held("all-gather", 16) > held("all-gather", 4)
    assert held("ring", 16) == pytest.approx(held("ring", 4) / 4)
    assert held("tokenring", 4) < held("ring", 4) / 10  # keys stay where they are


@pytest.mark.parametrize("groups", [((0, 1), (1, 2)), ((0, 1), (2, 3, 4)), ((0, 99),)])
def test_groups_that_cannot_be_are_refused(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(MappingError, match="expected"):
        compile_hop(NODE, groups, 1)
