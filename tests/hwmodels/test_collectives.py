"""Collectives: laws over sizes, bandwidths and groups, and published measurements."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.collectives import Collective, compile_collective
from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster, Fabric, load_cluster

KERNELS = Path(__file__).resolve().parents[3] / "shared" / "reference" / "kernels"
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "point-to-point")
HARDWARE = ("h100-sxm", "a100-80-sxm", "mi300x", "l40s", "hgx-h100-ethernet", "gb200", "gaudi3", "xeon-8592")

kinds = st.sampled_from(KINDS)
hardware = st.sampled_from(HARDWARE)
sizes = st.floats(1, 1e11)


def group(kind: str, cluster: Cluster) -> tuple[int, ...]:
    return (0, cluster.gpus - 1) if kind == "point-to-point" else tuple(range(cluster.gpus))


def whole(kind: str, name: str, gpus: int) -> Collective:
    cluster = load_cluster(name, gpus)
    return compile_collective(cluster, kind, group(kind, cluster))


@settings(max_examples=100, deadline=None)
@given(kinds, hardware, st.integers(2, 20), sizes, sizes)
def test_law_time_grows_with_bytes(kind: str, name: str, gpus: int, a: float, b: float) -> None:
    times = whole(kind, name, gpus).time_s([0.0, min(a, b), max(a, b)])
    assert times[0] == 0 < times[1] <= times[2]


@settings(max_examples=60, deadline=None)
@given(kinds, hardware, st.integers(2, 20), sizes, st.floats(1, 10), st.booleans())
def test_law_time_falls_with_bandwidth(
    kind: str, name: str, gpus: int, nbytes: float, factor: float, inside: bool
) -> None:
    cluster = load_cluster(name, gpus)
    assert cluster.intra is not None and cluster.inter is not None

    def faster(fabric: Fabric) -> Fabric:
        bridge = fabric.bridge_bytes_per_s
        return replace(
            fabric,
            bytes_per_s=fabric.bytes_per_s * factor,
            bridge_bytes_per_s=None if bridge is None else bridge * factor,
        )

    changed = replace(cluster, intra=faster(cluster.intra)) if inside else replace(cluster, inter=faster(cluster.inter))
    ranks = group(kind, cluster)
    slow, fast = (compile_collective(c, kind, ranks).time_s(nbytes) for c in (cluster, changed))
    assert fast <= slow * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(hardware, st.integers(2, 8), sizes)
def test_law_bytes_bound_every_collective(name: str, n: int, nbytes: float) -> None:
    """No rank can send less than (n - 1) / n of the bytes, nor all-reduce without a switch's help less than twice that.

    With the switch adding, (n + 1) / n go out and come in. Patarasuk and Yuan, J. Parallel Distrib. Comput. 69 (2009).
    """
    n = min(n, load_cluster(name, 1).gpus_per_node)
    fabric = load_cluster(name, n).intra
    assert fabric is not None
    for kind in ("all-gather", "reduce-scatter", "all-to-all"):
        assert whole(kind, name, n).time_s(nbytes) >= (n - 1) / n * nbytes / fabric.bytes_per_s
    least = min(n + 1, 2 * (n - 1)) if fabric.in_switch_reduction else 2 * (n - 1)
    assert whole("all-reduce", name, n).time_s(nbytes) >= least / n * nbytes / fabric.bytes_per_s


@settings(max_examples=60, deadline=None)
@given(hardware, st.integers(2, 40), sizes)
def test_law_all_reduce_is_no_faster_than_its_halves(name: str, gpus: int, nbytes: float) -> None:
    reduce = whole("all-reduce", name, gpus).time_s(nbytes)
    assert reduce >= whole("reduce-scatter", name, gpus).time_s(nbytes)
    assert reduce >= whole("all-gather", name, gpus).time_s(nbytes)


@settings(max_examples=40, deadline=None)
@given(kinds, st.permutations(range(8)), st.integers(2, 8), sizes)
def test_law_places_on_a_switch_do_not_matter(kind: str, order: list[int], n: int, nbytes: float) -> None:
    cluster = load_cluster("h100-sxm", 8)
    n = 2 if kind == "point-to-point" else n
    here = compile_collective(cluster, kind, tuple(order[:n])).time_s(nbytes)
    assert here == pytest.approx(compile_collective(cluster, kind, tuple(range(n))).time_s(nbytes), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(kinds, st.sampled_from(["h100-sxm", "a100-80-sxm", "mi300x", "l40s", "hgx-h100-ethernet"]), sizes)
def test_law_crossing_nodes_costs_more(kind: str, name: str, nbytes: float) -> None:
    """For a pair; every one of these has a wider way inside a node than its network card."""
    cluster = load_cluster(name, 16)
    inside = compile_collective(cluster, kind, (0, 1)).time_s(nbytes)
    assert compile_collective(cluster, kind, (0, 8)).time_s(nbytes) > inside


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_has_nobody_to_talk_to(kind: str) -> None:
    alone = compile_collective(load_cluster("phone", 1), kind, (0,))
    assert alone.time_s(np.array([0.0, 1e9])).tolist() == [0, 0]
    assert (alone.bottleneck, alone.algorithm(1e9)) == ("none", "none")


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        ("broadcast", (0, 1)),
        ("all-reduce", (0, 0)),
        ("all-reduce", ()),
        ("all-reduce", (0, 8)),
        ("all-reduce", (-1, 0)),
        ("point-to-point", (0, 1, 2)),
    ],
)
def test_wrong_groups_are_told_off(kind: str, ranks: tuple[int, ...]) -> None:
    with pytest.raises(MappingError, match="expected"):
        compile_collective(load_cluster("h100-sxm", 8), kind, ranks)


def test_published_all_reduce_on_eight_h100() -> None:
    """TokenWeave (arXiv:2505.11329) repository, all-reduce with multimem instructions on 8 H100, hidden 8192, bf16."""
    tokens = np.array([64, 256, 1024, 2048, 4096, 8192, 16384, 32768])
    measured_us = np.array([16.5, 28, 75, 136, 257, 501, 986, 1957])
    collective = whole("all-reduce", "hgx-h100", 8)
    np.testing.assert_allclose(collective.time_s(tokens * 8192 * 2) * 1e6, measured_us, rtol=0.2)
    assert all(collective.algorithm(n * 16384.0) == "in-switch" for n in tokens.tolist())
    assert 8e-6 <= collective.time_s(16384) <= 12e-6
    assert collective.bottleneck.startswith("NVLink 4, gpu")


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("a100-80-sxm", 225e9, 245e9), ("h100-sxm", 440e9, 500e9), ("mi300x", 300e9, 340e9), ("l40s", 20e9, 25e9)],
)
def test_large_all_reduces_reach_the_usual_bus_bandwidth(name: str, low: float, high: float) -> None:
    """2 (n - 1) / n bytes / time of 8 devices and 1 GB, within what nccl-tests and rccl-tests commonly report.

    The ranges are common knowledge rather than one published table; they keep the profiles honest.
    """
    assert low <= 2 * 7 / 8 * 1e9 / whole("all-reduce", name, 8).time_s(1e9) <= high


@pytest.mark.skipif(not KERNELS.exists(), reason="needs shared/reference/kernels")
def test_published_all_to_all_on_gb200() -> None:
    """TensorRT-LLM's all-to-all on GB200, dispatch of 512 to 2048 tokens a rank over 8 to 64 ranks, within 25 %.

    Bytes are bandwidth * time of the table: 8 copies of each token, some of them to the rank itself. Its kernels also
    count and place tokens, which is not part of the collective. The profile's efficiency rests on its 8-rank rows.
    """
    with (KERNELS / "a2a_gb200.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["batch_per_rank"]) >= 512 and int(row["ep_size"]) <= 64]
    assert rows
    for row in rows:
        measured_s = float(row["dispatch_us"]) * 1e-6
        nbytes = float(row["dispatch_GBps"]) * 1e9 * measured_s
        assert whole("all-to-all", "gb200", int(row["ep_size"])).time_s(nbytes) == pytest.approx(measured_s, rel=0.25)


def test_small_messages_are_not_free_and_large_ones_cross_nodes_hierarchically() -> None:
    collective = whole("all-reduce", "h100-sxm", 64)
    assert collective.algorithm(1e4) == "hierarchical tree"
    assert collective.algorithm(1e9) in ("hierarchical ring", "ring")
    assert collective.time_s(1e4) > 30e-6
    assert "InfiniBand" in whole("all-to-all", "h100-sxm", 64).bottleneck
    assert "uplink" in whole("all-reduce", "hgx-h100-ethernet", 16).bottleneck
