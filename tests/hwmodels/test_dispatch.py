"""Exchanges of expert-parallel ranks: laws over sizes, routing and clusters, closed forms, and sampled routing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.dispatch import (
    KERNELS,
    LOW_LATENCY,
    NORMAL,
    Routed,
    compile_exchange,
    copies_per_token,
    dropped_tokens,
    exchange_s,
    exposed_s,
    pair_bytes,
    rail_copies,
    shares_of,
)
from hwmodels.errors import MappingError
from hwmodels.hardware import load_cluster
from hwmodels.routing import RoutingError

hardware = st.sampled_from(("h200-sxm", "b200-sxm", "gb200", "hgx-h100-ethernet", "a100-80-sxm"))
groups = st.sampled_from((2, 4, 8, 16, 32))
kernels = st.sampled_from(sorted(KERNELS))
seeds = st.integers(0, 2**31)


def shares(ranks: int, seed: int) -> np.ndarray:
    drawn: np.ndarray = np.random.default_rng(seed).dirichlet(np.full(ranks, 0.5), size=ranks)
    return drawn


@settings(max_examples=40, deadline=None)
@given(hardware, groups, st.integers(1, 8), st.integers(1, 4096), seeds, st.booleans())
def test_law_bytes_are_conserved(name: str, ranks: int, top_k: int, tokens: int, seed: int, skewed: bool) -> None:
    """What is sent, and what stays, is every token's top_k copies, whatever the routing."""
    cluster = load_cluster(name, ranks)
    routed = Routed(1024, top_k, 64, shares=shares(ranks, seed) if skewed else None)
    copies = copies_per_token(cluster, range(ranks), routed)
    assert copies.picks.sum(axis=1) == pytest.approx(np.full(ranks, top_k))
    kept = tokens * routed.widths[0] * np.diag(copies.picks)
    sent = pair_bytes(cluster, range(ranks), tokens, routed)
    assert sent.sum() + kept.sum() == pytest.approx(ranks * tokens * top_k * routed.widths[0])
    assert not np.diag(sent).any()


@given(groups, st.integers(1, 8), st.integers(1, 10_000))
def test_theory_even_routing_is_the_closed_form(ranks: int, top_k: int, tokens: int) -> None:
    """Both phases in 16 bit move 2 top_k tokens h bytes (EP - 1) / EP per rank (MoE Parallel Folding)."""
    cluster = load_cluster("h200-sxm", ranks)
    routed = Routed(4096, top_k, 64, dispatch="bf16")
    per_rank = 2 * pair_bytes(cluster, range(ranks), tokens, routed).sum(axis=1)
    assert per_rank == pytest.approx(np.full(ranks, 2 * top_k * tokens * 4096 * 2 * (ranks - 1) / ranks))


@settings(max_examples=40, deadline=None)
@given(hardware, groups, st.integers(1, 8), st.integers(1, 4), seeds, st.booleans())
def test_law_a_node_limit_never_adds_traffic(
    name: str, ranks: int, top_k: int, limit: int, seed: int, skewed: bool
) -> None:
    cluster = load_cluster(name, ranks)
    drawn = shares(ranks, seed) if skewed else None
    free, limited = (Routed(1024, top_k, 64, max_nodes=most, shares=drawn) for most in (None, limit))
    assert rail_copies(cluster, range(ranks), limited) <= rail_copies(cluster, range(ranks), free) + 1e-9
    times = [compile_exchange(cluster, tuple(range(ranks)), routed, NORMAL) for routed in (limited, free)]
    assert times[0].between_s[0] <= times[1].between_s[0] * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(hardware, groups, kernels, st.lists(st.integers(0, 100_000), min_size=2, max_size=2), seeds, st.booleans())
def test_law_more_tokens_never_take_less(
    name: str, ranks: int, kernel: str, tokens: list[int], seed: int, skewed: bool
) -> None:
    cluster = load_cluster(name, ranks)
    routed = Routed(1024, 4, 64, shares=shares(ranks, seed) if skewed else None)
    exchange = compile_exchange(cluster, tuple(range(ranks)), routed, KERNELS[kernel])
    for time_s in (exchange.dispatch_s, exchange.combine_s):
        less, more = time_s(sorted(tokens))
        assert 0 <= less <= more
        assert (less > 0) == (min(tokens) > 0)


@settings(max_examples=30, deadline=None)
@given(groups, seeds)
def test_law_skew_never_relieves_the_busiest_link(ranks: int, seed: int) -> None:
    """A copy per expert: the links into some rank or node carry at least the mean, which even routing gives each."""
    cluster = load_cluster("h200-sxm", ranks)
    drawn = np.random.default_rng(seed).dirichlet(np.full(ranks, 0.5))
    even, skewed = (
        compile_exchange(cluster, tuple(range(ranks)), Routed(1024, 4, 64, shares=s), LOW_LATENCY)
        for s in (None, drawn)
    )
    if cluster.nodes == 1:
        assert skewed.inside_s[0] >= even.inside_s[0] * (1 - 1e-9)
    assert skewed.between_s[0] >= even.between_s[0] * (1 - 1e-9)


def test_law_one_rank_costs_nothing() -> None:
    phases = exchange_s(load_cluster("h200-sxm", 8), [3], [0, 1, 4096], Routed(7168, 8, 256))
    assert not phases.total_s.any()


def test_law_best_is_the_faster_kernel() -> None:
    cluster, tokens, routed = load_cluster("h200-sxm", 32), np.arange(1, 4097, 13), Routed(7168, 8, 256)
    best = exchange_s(cluster, range(32), tokens, routed)
    modes = [exchange_s(cluster, range(32), tokens, routed, mode).total_s for mode in ("low-latency", "normal")]
    assert best.total_s == pytest.approx(np.minimum(*modes))
    assert best.kernel[0] == "low-latency"
    assert best.kernel[-1] == "normal"


@pytest.mark.parametrize("limit", [None, 2])
def test_theory_copies_match_sampled_routing(limit: int | None) -> None:
    """Even routing with and without a limit of nodes: 20,000 sampled tokens, 64 experts on 16 ranks of 4 nodes."""
    rng, ranks, experts, top_k, count = np.random.default_rng(1), 32, 64, 6, 20_000
    scores = rng.random((count, experts))
    if limit is not None:
        allowed = rng.random((count, 4)).argsort(axis=1) < limit
        scores[~np.repeat(allowed, experts // 4, axis=1)] = 0.0
    chosen = scores.argsort(axis=1)[:, -top_k:]
    by_rank, by_node = chosen // (experts // ranks), chosen // (experts // 4)
    on_ranks = np.mean([len(set(row)) for row in by_rank.tolist()])
    on_nodes = np.mean([len(set(row)) for row in by_node.tolist()])
    copies = copies_per_token(load_cluster("h200-sxm", 32), range(32), Routed(1, top_k, experts, max_nodes=limit))
    assert copies.ranks.sum(axis=1).mean() == pytest.approx(on_ranks, rel=0.01)
    assert copies.nodes.sum(axis=1).mean() == pytest.approx(on_nodes, rel=0.01)


def test_even_shares_are_even_routing_but_for_drawing_with_repetition() -> None:
    cluster = load_cluster("h200-sxm", 32)
    even, given_ = (
        copies_per_token(cluster, range(32), Routed(7168, 8, 256, shares=s)) for s in (None, np.full(32, 1 / 32))
    )
    assert given_.picks == pytest.approx(even.picks)
    assert given_.ranks == pytest.approx(even.ranks, rel=0.03)
    assert given_.nodes == pytest.approx(even.nodes, rel=0.03)


def test_forwarding_sends_one_copy_per_node_over_the_rail() -> None:
    """16 ranks in two nodes: a token crosses once, not as often as it has experts there."""
    cluster, routed = load_cluster("h200-sxm", 16), Routed(7168, 8, 256)
    normal = compile_exchange(cluster, tuple(range(16)), routed, NORMAL)
    low = compile_exchange(cluster, tuple(range(16)), routed, LOW_LATENCY)
    copies = copies_per_token(cluster, range(16), routed)
    assert rail_copies(cluster, range(16), routed) == pytest.approx(copies.nodes[0, 1])
    assert normal.between_s[0] / low.between_s[0] == pytest.approx(copies.nodes[0, 1] / 4)


def test_the_slowest_link_is_named() -> None:
    routed = Routed(7168, 8, 256)
    one = compile_exchange(load_cluster("h200-sxm", 8), tuple(range(8)), routed, LOW_LATENCY)
    many = compile_exchange(load_cluster("h200-sxm", 32), tuple(range(32)), routed, LOW_LATENCY)
    assert all("NVLink" in name for name in one.links)
    assert all("InfiniBand" in name for name in many.links)


def test_a_group_inside_a_node_avoids_the_rails() -> None:
    cluster, routed = load_cluster("h200-sxm", 64), Routed(4096, 2, 8, dispatch="bf16")
    inside = exchange_s(cluster, range(8), 4096, routed, "normal")
    spread = exchange_s(cluster, range(0, 64, 8), 4096, routed, "normal")
    assert spread.total_s > 3 * inside.total_s


def test_shares_of_a_placement() -> None:
    """Experts 0 and 1 on rank 0, expert 2 on both, expert 3 on rank 1."""
    found = shares_of([1, 1, 4, 2], [[0], [0], [0, 1], [1]], 2)
    assert found.tolist() == [0.5, 0.5]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(2, 16), st.floats(0.25, 4), seeds)
def test_theory_dropped_tokens(tokens: int, experts: int, factor: float, seed: int) -> None:
    """The closed form against the binomial distribution summed up."""
    drawn = np.random.default_rng(seed).dirichlet(np.ones(experts))
    capacity = np.ceil(factor * tokens / experts - 1e-9)
    expected = 0.0
    for p in drawn:
        pmf = np.array([1.0])
        for _ in range(tokens):
            pmf = np.convolve(pmf, [1 - p, p])
        expected += float((np.maximum(np.arange(tokens + 1) - capacity, 0) * pmf).sum())
    assert float(dropped_tokens(tokens, drawn, 1, factor)) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert float(dropped_tokens(tokens, drawn, 1, None)) == 0


def test_overlap() -> None:
    assert float(exposed_s(3.0, 5.0)) == 8
    assert float(exposed_s(3.0, 5.0, shared_s=1.0)) == 7
    assert float(exposed_s(3.0, 5.0, shared_s=4.0)) == 5
    assert float(exposed_s(3.0, 5.0, other_s=6.0)) == 2
    assert float(exposed_s(3.0, 5.0, other_s=9.0)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 300}, "top_k 300 of 256"),
        ({"max_nodes": 0}, "max_nodes = 0"),
        ({"dispatch": "fp7"}, "fp7"),
        ({"shares": np.ones(4)}, "shares of shape"),
    ],
)
def test_bad_routing_is_told(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"hidden": 7168, "top_k": 8, "experts": 256} | change
    with pytest.raises(MappingError, match=message):
        exchange_s(load_cluster("h200-sxm", 8), range(8), 1, Routed(**arguments))  # type: ignore[arg-type]


def test_bad_ranks_modes_and_placements_are_told() -> None:
    cluster, routed = load_cluster("h200-sxm", 8), Routed(7168, 8, 256)
    with pytest.raises(MappingError, match="expected different devices"):
        exchange_s(cluster, [0, 8], 1, routed)
    with pytest.raises(MappingError, match="exchange mode 'fast'"):
        exchange_s(cluster, [0, 1], 1, routed, "fast")  # type: ignore[arg-type]
    with pytest.raises(RoutingError, match="expert 1: it is on no rank"):
        shares_of([1, 1], [[0], []], 2)
    with pytest.raises(MappingError, match="not all 0"):
        shares_of([0, 0], [[0], [0]], 2)
    with pytest.raises(MappingError, match="capacity_factor"):
        dropped_tokens(4, [0.5, 0.5], 1, 0.0)
