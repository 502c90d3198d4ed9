"""The graph of a cluster's links, the way each transfer takes over it, and what simultaneous transfers load most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster, Fabric

#: Nodes below one leaf switch of a rail: half the ports of a 64-port switch (NVIDIA's scalable unit of 32 HGX nodes).
RAIL_NODES = 32

#: A torus side that closes into a ring; shorter sides are cut out of a larger grid (TPU v5e: 16, Google Cloud docs).
TORUS_WRAP = 16

Node = str
Edges = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Load:
    """What a set of simultaneous transfers costs on its most loaded link.

    seconds      time of one unit of weight per byte: largest load / bandwidth
    link         readable name of that link
    """

    seconds: float
    link: str


class Topology:
    """Directed links of a cluster as a networkx graph, and the fixed way between any two devices.

    Nodes of the graph are 'gpu 3', 'switch 0' (of node 0), 'bridge 0.1', 'nic 3', 'leaf 2' and 'spine'. Edges carry
    bytes_per_s, latency_s, name and index. Ways are the ones the hardware uses and not a search: between nodes, data
    first moves inside the node to the device on the receiver's rail (NCCL's PXN), then stays on that rail.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.graph = nx.DiGraph()
        self._bytes_per_s: list[float] = []
        self._names: list[str] = []
        n = cluster.gpus
        self.node = np.arange(n) // cluster.gpus_per_node
        self.local = np.arange(n) % cluster.gpus_per_node
        self._sides = torus_sides(min(n, cluster.gpus_per_node))
        if cluster.intra is not None:
            self._add_inside(cluster.intra)
        if cluster.nodes > 1 and cluster.inter is not None:
            self._add_between(cluster.inter)
        self.bytes_per_s: Floats = np.array(self._bytes_per_s)

    # Building

    def _link(self, a: Node, b: Node, bytes_per_s: float, latency_s: float, name: str) -> None:
        """Both directions of a link; `name` is what a user calls it."""
        for start, end in ((a, b), (b, a)):
            index = len(self._names)
            self._bytes_per_s.append(bytes_per_s)
            self._names.append(f"{name} ({start} to {end})")
            self.graph.add_edge(
                start, end, index=index, bytes_per_s=bytes_per_s, latency_s=latency_s, name=self._names[index]
            )

    def _add_inside(self, fabric: Fabric) -> None:
        rate, half_latency = fabric.bytes_per_s, fabric.latency_s / 2
        size = self.cluster.gpus_per_node
        for gpu, (node, local) in enumerate(zip(self.node.tolist(), self.local.tolist(), strict=True)):
            here = f"gpu {gpu}"
            if fabric.kind == "switch":
                self._link(here, f"switch {node}", rate, half_latency, "switch link")
            elif fabric.kind == "pcie":
                self._link(here, f"bridge {node}.{self._bridge(local)}", rate, half_latency, "PCIe link")
            elif fabric.kind == "mesh":
                for other in range(local):
                    self._link(here, f"gpu {gpu - local + other}", rate / (size - 1), fabric.latency_s, "mesh link")
            else:
                columns = self._sides[1]
                for step, side, position in ((1, columns, local % columns), (columns, self._sides[0], local // columns)):
                    ahead = gpu + step
                    if position + 1 < side and ahead < self.cluster.gpus and self.node[ahead] == node:
                        self._link(here, f"gpu {ahead}", rate / 4, fabric.latency_s, "torus link")
                    elif side == TORUS_WRAP and position + 1 == side:
                        self._link(here, f"gpu {gpu - step * (side - 1)}", rate / 4, fabric.latency_s, "torus link")
        if fabric.kind == "pcie":
            between = fabric.bridge_bytes_per_s or rate
            for node in range(self.cluster.nodes):
                self._link(f"bridge {node}.0", f"bridge {node}.1", between, half_latency, "link between host bridges")

    def _add_between(self, fabric: Fabric) -> None:
        rate, hop_latency = fabric.bytes_per_s, fabric.latency_s / 4
        below: dict[str, float] = {}
        for gpu in range(self.cluster.gpus):
            leaf = f"leaf {self._leaf(gpu)}"
            self._link(f"gpu {gpu}", f"nic {gpu}", rate, hop_latency, "PCIe to network card")
            self._link(f"nic {gpu}", leaf, rate, hop_latency, "network card")
            below[leaf] = below.get(leaf, 0.0) + rate
        for leaf, total in below.items():
            self._link(leaf, "spine", total / fabric.oversubscription, hop_latency, "uplink")

    def _bridge(self, local: int) -> int:
        """Host bridge (CPU socket) of a device's position: the first half of the node's slots is on 0."""
        return int(local >= (self.cluster.gpus_per_node + 1) // 2)

    def _leaf(self, gpu: int) -> int:
        """Leaf switch of a device's network card."""
        node, local = divmod(gpu, self.cluster.gpus_per_node)
        if self.cluster.inter is not None and self.cluster.inter.kind == "ethernet":
            return node
        return node // RAIL_NODES * self.cluster.gpus_per_node + local

    # Ways

    def path(self, a: int, b: int) -> list[Node]:
        """Graph nodes from device `a` to device `b`, both included.

        Raises MappingError if there is no link between them.
        """
        if a == b:
            return [f"gpu {a}"]
        if self.node[a] == self.node[b]:
            return self._path_inside(a, b)
        if self.cluster.inter is None:
            raise MappingError(f"devices {a} and {b} of {self.cluster.name}: expected a link between their nodes")
        entry = a - int(self.local[a]) + int(self.local[b])
        start = a
        head = [f"gpu {a}"]
        if self.cluster.inter.kind == "rails" and entry < self.cluster.gpus and self.cluster.intra is not None:
            head = self._path_inside(a, entry) if entry != a else head
            start = entry
        out, into = f"leaf {self._leaf(start)}", f"leaf {self._leaf(b)}"
        middle = [out] if out == into else [out, "spine", into]
        return [*head, f"nic {start}", *middle, f"nic {b}", f"gpu {b}"]

    def _path_inside(self, a: int, b: int) -> list[Node]:
        fabric = self.cluster.intra
        node, first = int(self.node[a]), a - int(self.local[a])
        ends = [f"gpu {a}", f"gpu {b}"]
        if fabric is None or fabric.kind == "mesh":
            return ends
        if fabric.kind == "switch":
            return [ends[0], f"switch {node}", ends[1]]
        if fabric.kind == "pcie":
            bridges = [self._bridge(int(self.local[g])) for g in (a, b)]
            return [ends[0], *(f"bridge {node}.{i}" for i in sorted(set(bridges), key=bridges.index)), ends[1]]
        return [f"gpu {first + local}" for local in self._torus_way(int(self.local[a]), int(self.local[b]))]

    def _torus_way(self, a: int, b: int) -> Iterator[int]:
        """Positions on the way: along the row first, then along the column, the shorter way round where it closes."""
        columns = self._sides[1]
        (row, column), (to_row, to_column) = divmod(a, columns), divmod(b, columns)
        yield a
        while column != to_column:
            column = _towards(column, to_column, columns)
            yield row * columns + column
        while row != to_row:
            row = _towards(row, to_row, self._sides[0])
            yield row * columns + column

    @lru_cache(maxsize=1 << 18)  # noqa: B019 - topologies live as long as the process (see topology())
    def edges(self, a: int, b: int) -> tuple[int, ...]:
        """Indices of the links from device `a` to device `b`."""
        way = self.path(a, b)
        return tuple(self.graph.edges[pair]["index"] for pair in zip(way, way[1:], strict=False))
