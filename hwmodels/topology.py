"""The graph of a cluster's links, the way each transfer takes over it, and what simultaneous transfers load most."""

from __future__ import annotations

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

#: Links of a torus chip, which share its bandwidth.
TORUS_LINKS = 4

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

NO_LINK = -1


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The link that holds simultaneous transfers up longest: how long, and its readable name."""

    seconds: float
    link: str


class Topology:
    """Directed links of a cluster, and the fixed way between any two devices.

    graph          nodes 'gpu 3', 'switch 0' (of node 0), 'bridge 0.1', 'nic 3', 'leaf 2', 'spine'; edges carry
                   bytes_per_s, latency_s, name and index
    bytes_per_s    of every edge by its index: what large messages reach

    Ways are those the hardware takes and not found by search. Between nodes joined by rails, data first moves inside
    the sender's node to the device on the receiver's rail (NCCL's PXN) and then stays on that rail. On a torus it
    follows the row and then the column.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.graph: nx.DiGraph[str] = nx.DiGraph()
        self._rates: list[float] = []
        self._names: list[str] = []
        n, size = cluster.gpus, cluster.gpus_per_node
        self.node: Indices = np.arange(n) // size
        self.local: Indices = np.arange(n) % size
        self.sides = torus_sides(min(n, size))
        self._up, self._down = np.full((2, n), NO_LINK)
        self._bridge = (self.local >= (size + 1) // 2).astype(np.int64)
        self._between_bridges = np.full((cluster.nodes, 2), NO_LINK)
        direct = cluster.intra is not None and cluster.intra.kind == "mesh"
        self._mesh = np.full((n, size) if direct else (0, 0), NO_LINK)
        self._torus = np.full((n, 4), NO_LINK)
        self._nic = np.full((n, 4), NO_LINK)
        self._leaf = np.zeros(n, dtype=np.int64)
        self._spine = np.full((0, 2), NO_LINK)
        self.graph.add_nodes_from(f"gpu {gpu}" for gpu in range(n))
        if cluster.intra is not None:
            self._add_inside(cluster.intra)
        if cluster.nodes > 1 and cluster.inter is not None:
            self._add_between(cluster.inter)
        self.bytes_per_s: Floats = np.array(self._rates)

    def _link(self, a: str, b: str, fabric: Fabric, rate: float, hops: int, name: str) -> tuple[int, int]:
        """Both directions of a link that is one of `hops` on a way; returns the indices of a to b and of b to a."""
        first = len(self._rates)
        for start, end in ((a, b), (b, a)):
            index = len(self._rates)
            self._rates.append(rate * fabric.efficiency)
            self._names.append(f"{name}, {start} to {end}")
            self.graph.add_edge(
                start,
                end,
                index=index,
                bytes_per_s=self._rates[index],
                latency_s=fabric.latency_s / hops,
                name=self._names[index],
            )
        return first, first + 1

    def _add_inside(self, fabric: Fabric) -> None:
        rate, name, size = fabric.bytes_per_s, fabric.name, self.cluster.gpus_per_node
        for gpu in range(self.cluster.gpus):
            node, local = divmod(gpu, size)
            here = f"gpu {gpu}"
            if fabric.kind == "switch":
                self._up[gpu], self._down[gpu] = self._link(here, f"switch {node}", fabric, rate, 2, name)
            elif fabric.kind == "pcie":
                bridge = f"bridge {node}.{self._bridge[gpu]}"
                self._up[gpu], self._down[gpu] = self._link(here, bridge, fabric, rate, 2, name)
            elif fabric.kind == "mesh":
                for peer in range(gpu - local, gpu):
                    there, back = self._link(here, f"gpu {peer}", fabric, rate / (size - 1), 1, name)
                    self._mesh[gpu, peer % size], self._mesh[peer, local] = there, back
        if fabric.kind == "pcie":
            between = fabric.bridge_bytes_per_s or rate
            for node in range(self.cluster.nodes):
                left, right = f"bridge {node}.0", f"bridge {node}.1"
                self._between_bridges[node] = self._link(left, right, fabric, between, 2, "link between host bridges")
        if fabric.kind == "torus":
            grid = np.arange(self.cluster.gpus).reshape(self.sides)
            for axis in (0, 1):
                side = self.sides[axis]
                for line in np.moveaxis(grid, axis, 1):
                    for i in range(side if side == TORUS_WRAP else side - 1):
                        a, b = int(line[i]), int(line[(i + 1) % side])
                        ends = self._link(f"gpu {a}", f"gpu {b}", fabric, rate / TORUS_LINKS, 1, name)
                        self._torus[a, 2 * axis], self._torus[b, 2 * axis + 1] = ends

    def _add_between(self, fabric: Fabric) -> None:
        size, rate = self.cluster.gpus_per_node, fabric.bytes_per_s
        gpus = np.arange(self.cluster.gpus)
        if fabric.kind == "rails":
            self._leaf = gpus // size // RAIL_NODES * size + gpus % size
        else:
            self._leaf = gpus // size
        host = max(rate, self.cluster.host_bytes_per_s)
        for gpu in range(self.cluster.gpus):
            nic = f"nic {gpu}"
            outer = self._link(nic, f"leaf {self._leaf[gpu]}", fabric, rate, 4, fabric.name)
            inner = self._link(f"gpu {gpu}", nic, fabric, host, 4, "PCIe to the network card")
            self._nic[gpu] = inner[0], outer[0], outer[1], inner[1]
        below = np.bincount(self._leaf) * rate / fabric.oversubscription
        self._spine = np.array(
            [
                self._link(f"leaf {leaf}", "spine", fabric, uplink, 4, f"{fabric.name} uplink") if uplink else (-1, -1)
                for leaf, uplink in enumerate(below.tolist())
            ]
        )

    def ways(self, src: ArrayLike, dst: ArrayLike) -> Indices:
        """Edges from each device of `src` to its partner in `dst`: one row per pair, padded with NO_LINK.

        Raises MappingError if a pair is not joined.
        """
        a, b = np.broadcast_arrays(np.asarray(src, dtype=np.int64), np.asarray(dst, dtype=np.int64))
        far = self.node[a] != self.node[b]
        if not far.any():
            return self._ways_inside(a, b)
        inter = self.cluster.inter
        if inter is None:
            raise MappingError(f"devices of several nodes of {self.cluster.name}: expected links between its nodes")
        exit_ = a
        if inter.kind == "rails" and self.cluster.intra is not None:
            on_rail = a - self.local[a] + self.local[b]
            exit_ = np.where(far & (on_rail < self.cluster.gpus), on_rail, a)
        leaves = self._leaf[exit_], self._leaf[b]
        over_spine = far & (leaves[0] != leaves[1])
        outside = [
            np.where(far, self._nic[exit_, 0], NO_LINK),
            np.where(far, self._nic[exit_, 1], NO_LINK),
            np.where(over_spine, self._spine[leaves[0], 0], NO_LINK),
            np.where(over_spine, self._spine[leaves[1], 1], NO_LINK),
            np.where(far, self._nic[b, 2], NO_LINK),
            np.where(far, self._nic[b, 3], NO_LINK),
        ]
        return np.concatenate([self._ways_inside(a, np.where(far, exit_, b)), np.stack(outside, axis=1)], axis=1)

    def _ways_inside(self, a: Indices, b: Indices) -> Indices:
        """Ways between devices of the same node."""
        fabric = self.cluster.intra
        moves = a != b
        if fabric is None:
            return np.full((len(a), 0), NO_LINK)
        if fabric.kind == "mesh":
            return np.where(moves, self._mesh[a, self.local[b]], NO_LINK)[:, None]
        if fabric.kind == "torus":
            return self._ways_on_torus(a, b)
        crosses = self._between_bridges[self.node[a], self._bridge[a]]
        crosses = np.where(self._bridge[a] != self._bridge[b], crosses, NO_LINK)
        columns = [self._up[a], crosses, self._down[b]] if fabric.kind == "pcie" else [self._up[a], self._down[b]]
        return np.where(moves[:, None], np.stack(columns, axis=1), NO_LINK)

    def _ways_on_torus(self, a: Indices, b: Indices) -> Indices:
        """Along the row, then along the column, the shorter way round where a side closes into a ring."""
        here = a.copy()
        columns: list[Indices] = []
        width = self.sides[1]
        for axis in (1, 0):
            side = self.sides[axis]
            for _ in range(side // 2 if side == TORUS_WRAP else side - 1):
                gap = b % width - here % width if axis else b // width - here // width
                if side == TORUS_WRAP:
                    gap = (gap + side // 2) % side - side // 2
                ahead, back = self._torus[here, 2 * axis], self._torus[here, 2 * axis + 1]
                columns.append(np.select([gap > 0, gap < 0], [ahead, back], NO_LINK))
                step = np.sign(gap)
                if axis:
                    here = here - here % width + (here % width + step) % width
                else:
                    here = (here + step * width) % len(self.node)
        return np.stack(columns, axis=1) if columns else np.full((len(a), 0), NO_LINK)

    def path(self, a: int, b: int) -> list[str]:
        """Graph nodes on the way from device `a` to device `b`, both included."""
        ends = {data["index"]: end for _, end, data in self.graph.edges(data=True)}
        return [f"gpu {a}", *(ends[i] for i in self.ways([a], [b])[0].tolist() if i != NO_LINK)]

    def loads(self, src: ArrayLike, dst: ArrayLike, nbytes: ArrayLike) -> Floats:
        """Bytes on every edge when each device of `src` sends `nbytes` to its partner in `dst` at the same time."""
        ways = self.ways(src, dst)
        weights = np.broadcast_to(np.asarray(nbytes, dtype=float), (len(ways),))
        used = ways != NO_LINK
        spread = np.broadcast_to(weights[:, None], ways.shape)[used]
        loads: Floats = np.zeros(len(self.bytes_per_s))
        np.add.at(loads, ways[used], spread)
        return loads

    def switch_loads(self, ranks: ArrayLike, nbytes: float) -> Floats:
        """Bytes on every edge when each of `ranks` sends `nbytes` to its node's switch and gets as many from it."""
        loads: Floats = np.zeros(len(self.bytes_per_s))
        loads[self._up[np.asarray(ranks)]] = nbytes
        loads[self._down[np.asarray(ranks)]] = nbytes
        return loads

    def bottleneck(self, loads: Floats) -> Bottleneck:
        """The edge that needs longest for its load."""
        if not loads.any():
            return Bottleneck(0.0, "none")
        seconds = loads / self.bytes_per_s
        worst = int(seconds.argmax())
        return Bottleneck(float(seconds[worst]), self._names[worst])


@lru_cache(maxsize=64)
def topology(cluster: Cluster) -> Topology:
    """The topology of `cluster`, built once."""
    return Topology(cluster)


def torus_sides(chips: int) -> tuple[int, int]:
    """Rows and columns of the most square grid of `chips`, rows <= columns.

    >>> torus_sides(8), torus_sides(256), torus_sides(7)
    ((2, 4), (16, 16), (1, 7))
    """
    rows = next(side for side in range(int(chips**0.5), 0, -1) if chips % side == 0)
    return rows, chips // rows


def torus_cycle(rows: int, columns: int) -> list[int]:
    """Every chip of a grid once, neighbour to neighbour; it closes into a cycle where a side is even.

    >>> torus_cycle(2, 4)
    [0, 1, 2, 3, 7, 6, 5, 4]
    """
    if rows % 2 and columns % 2 == 0:
        return [chip % rows * columns + chip // rows for chip in torus_cycle(columns, rows)]
    if columns == 1 or rows % 2:
        lines = [range(row * columns, (row + 1) * columns) for row in range(rows)]
        return [chip for row, line in enumerate(lines) for chip in (line if row % 2 == 0 else reversed(line))]
    cycle: list[int] = []
    for row in range(rows):
        inner = range(row * columns + 1, (row + 1) * columns)
        cycle += inner if row % 2 == 0 else reversed(inner)
    return [0, *cycle, *(row * columns for row in range(rows - 1, 0, -1))]
