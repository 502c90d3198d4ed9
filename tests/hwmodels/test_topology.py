"""The cluster graph: ways exist, are as short as they should be, and loads add up."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster, Fabric, load_cluster, load_device
from hwmodels.topology import NO_LINK, Topology, topology, torus_cycle, torus_sides

CLUSTERS = [
    ("hgx-h100", 20),
    ("hgx-h100-ethernet", 16),
    ("mi300x", 12),
    ("l40s", 11),
    ("tpu-v5e", 12),
    ("tpu-v5e", 256),
    ("xeon-8592", 6),
    ("gb200", 80),
]


@pytest.mark.parametrize(("hardware", "gpus"), CLUSTERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_law_ways_follow_links_from_end_to_end(hardware: str, gpus: int, data: st.DataObject) -> None:
    links = topology(load_cluster(hardware, gpus))
    a, b = (data.draw(st.integers(0, gpus - 1)) for _ in range(2))
    way = links.path(a, b)
    assert (way[0], way[-1]) == (f"gpu {a}", f"gpu {b}")
    assert len(set(way)) == len(way)
    assert all(links.graph.has_edge(*step) for step in pairwise(way))
    if links.node[a] == links.node[b] or (links.local[a] == links.local[b] and hardware != "xeon-8592"):
        assert len(way) - 1 == nx.shortest_path_length(links.graph, f"gpu {a}", f"gpu {b}")


@pytest.mark.parametrize(("hardware", "gpus"), CLUSTERS)
def test_law_everything_is_joined_both_ways(hardware: str, gpus: int) -> None:
    links = topology(load_cluster(hardware, gpus))
    assert nx.is_strongly_connected(links.graph)
    indices = sorted(data["index"] for _, _, data in links.graph.edges(data=True))
    assert indices == list(range(len(links.bytes_per_s)))
    assert all(data["bytes_per_s"] == links.bytes_per_s[data["index"]] for _, _, data in links.graph.edges(data=True))


def test_rails_are_used_as_libraries_do() -> None:
    links = topology(load_cluster("h100-sxm", 16))
    assert links.path(1, 9) == ["gpu 1", "nic 1", "leaf 1", "nic 9", "gpu 9"]
    assert links.path(0, 9) == ["gpu 0", "switch 0", "gpu 1", "nic 1", "leaf 1", "nic 9", "gpu 9"]
    flat = topology(load_cluster("hgx-h100-ethernet", 16))
    assert flat.path(0, 9) == ["gpu 0", "nic 0", "leaf 0", "spine", "leaf 1", "nic 9", "gpu 9"]


def test_a_torus_closes_only_at_its_full_side() -> None:
    pod = topology(load_cluster("tpu-v5e", 256))
    assert pod.path(0, 15) == ["gpu 0", "gpu 15"]
    assert pod.path(0, 240) == ["gpu 0", "gpu 240"]
    part = topology(load_cluster("tpu-v5e", 16))
    assert part.path(0, 3) == ["gpu 0", "gpu 1", "gpu 2", "gpu 3"]


@pytest.mark.parametrize("sides", [(1, 1), (1, 7), (2, 4), (4, 4), (3, 4), (4, 3), (3, 5), (16, 16)])
def test_torus_cycle_visits_neighbours(sides: tuple[int, int]) -> None:
    rows, columns = sides
    cycle = torus_cycle(rows, columns)
    assert sorted(cycle) == list(range(rows * columns))
    closing = 1 if rows > 1 and columns > 1 and (rows % 2 == 0 or columns % 2 == 0) else 0
    following = cycle[1:] + cycle[:1] * closing
    for a, b in zip(cycle, following, strict=False):
        (i, j), (k, m) = divmod(a, columns), divmod(b, columns)
        assert abs(i - k) + abs(j - m) == 1
    assert torus_sides(rows * columns)[0] <= torus_sides(rows * columns)[1]


def test_the_most_loaded_link_is_named() -> None:
    cluster = load_cluster("h100-sxm", 16)
    links = topology(cluster)
    assert cluster.intra is not None and cluster.inter is not None
    two_senders = links.bottleneck(links.loads([0, 1], [2, 2], [1e9, 2e9]))
    assert two_senders.link == "NVLink 4, switch 0 to gpu 2"
    assert two_senders.seconds == pytest.approx(3e9 / (cluster.intra.bytes_per_s * cluster.intra.efficiency))
    across = links.bottleneck(links.loads([0, 1], [8, 2], 1e9))
    assert across.link == "InfiniBand NDR, nic 0 to leaf 0"
    assert across.seconds == pytest.approx(1e9 / (cluster.inter.bytes_per_s * cluster.inter.efficiency))
    assert links.bottleneck(links.loads([3], [3], 1e9)).seconds == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15), st.floats(0, 1e9)), min_size=1, max_size=20))
def test_law_loads_add_up_over_flows(flows: list[tuple[int, int, float]]) -> None:
    links = topology(load_cluster("h100-sxm", 16))
    together = links.loads(*(list(column) for column in zip(*flows, strict=True)))
    alone = sum(links.loads([a], [b], [nbytes]) for a, b, nbytes in flows)
    np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-3)


def test_devices_that_are_not_joined() -> None:
    device = load_device("l4")
    apart = Topology(Cluster("apart", device, 2, 1, None, None, 1e9))
    with pytest.raises(MappingError, match="apart: expected links between"):
        apart.ways([0], [1])
    fabric = Fabric("bus", "pcie", 1e9, 1e-6, 1.0, bridge_bytes_per_s=1e9)
    lone = Topology(Cluster("pair", device, 2, 2, fabric, None, 1e9))
    assert (lone.ways([0], [0]) == NO_LINK).all()


def test_five_hundred_devices_are_all_in_the_graph() -> None:
    graph = Topology(load_cluster("h100-sxm", 512)).graph
    assert {f"gpu {rank}" for rank in range(512)} <= set(graph)
