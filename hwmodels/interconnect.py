"""Which links join the devices, hosts and stores of one or several clusters, and which way does a transfer take?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster, Fabric
from hwmodels.topology import NO_LINK, Topology, topology

#: Links one after the other, as indices into Interconnect.bytes_per_s.
Way = tuple[int, ...]


class Interconnect:
    """The links of several clusters in one network, with those to host memory and to stores outside it.

    clusters       devices are numbered through all of them, in this order
    bytes_per_s    of every link by its index: what large messages reach; names: what people call it
    between_bytes_per_s        between the spines of two clusters, per direction and pair; None: as wide as they are
    host_memory_bytes_per_s    of each node's host memory, per direction, for all its devices together; None: no limit
                               but each device's own link (Cluster.host_bytes_per_s)
    ssd_bytes_per_s            of each node's solid-state disks, per direction; None: it has none
    remote_bytes_per_s         of a store that all nodes reach, per direction, all together; None: there is none

    Clusters are joined through their spines. Host traffic of a device that has a network card shares the device's PCIe
    link with it, as on boards where both hang off one PCIe switch.
    """

    def __init__(
        self,
        clusters: Sequence[Cluster],
        *,
        between_bytes_per_s: float | None = None,
        host_memory_bytes_per_s: float | None = None,
        ssd_bytes_per_s: float | None = None,
        remote_bytes_per_s: float | None = None,
    ) -> None:
        self.clusters = tuple(clusters)
        ends = np.cumsum([cluster.gpus for cluster in self.clusters])
        self.firsts = tuple(int(end) - cluster.gpus for end, cluster in zip(ends, self.clusters, strict=True))
        self.devices = int(ends[-1])
        self.names: list[str] = []
        self._rates: list[float] = []
        self._topologies = [topology(cluster) for cluster in self.clusters]
        self._offsets: list[int] = []
        for links in self._topologies:
            self._offsets.append(len(self._rates))
            self._rates += links.bytes_per_s.tolist()
            names = {data["index"]: data["name"] for _, _, data in links.graph.edges(data=True)}
            self.names += [names[index] for index in range(len(links.bytes_per_s))]
        self._out: dict[int, Way] = {}
        self._in: dict[int, Way] = {}
        for place in range(len(self.clusters)):
            self._add_cards(place)
        self._between: dict[tuple[int, int], Way] = {}
        if between_bytes_per_s is not None:
            for a in range(len(self.clusters)):
                for b in range(len(self.clusters)):
                    if a != b:
                        name = f"network from {self.clusters[a].name} to {self.clusters[b].name}"
                        self._between[a, b] = (self._add(between_bytes_per_s, name),)
        self._hosts: dict[int, tuple[Way, Way]] = {}
        self._ssds: dict[tuple[int, int], tuple[Way, Way]] = {}
        for place in range(len(self.clusters)):
            self._add_hosts(place, host_memory_bytes_per_s, ssd_bytes_per_s)
        self._remote = None if remote_bytes_per_s is None else self._both(remote_bytes_per_s, "remote store")
        self.bytes_per_s: NDArray[np.float64] = np.array(self._rates)

    def place(self, device: int) -> tuple[int, int]:
        """Cluster of a device and its number there."""
        if not 0 <= device < self.devices:
            raise MappingError(f"device {device}: expected one of 0 to {self.devices - 1}")
        place = max(place for place, first in enumerate(self.firsts) if first <= device)
        return place, device - self.firsts[place]

    def node(self, device: int) -> tuple[int, int]:
        """Cluster and node of a device."""
        place, rank = self.place(device)
        return place, rank // self.clusters[place].gpus_per_node

    def local(self, device: int) -> int:
        """Position of a device in its node, which is its rail where there are rails."""
        place, rank = self.place(device)
        return rank % self.clusters[place].gpus_per_node

    def way(self, source: int, target: int) -> Way:
        """Links from one device to another; none if they are the same. Raises MappingError if they are not joined."""
        (a, rank), (b, other) = self.place(source), self.place(target)
        if a == b:
            found = self._topologies[a].ways([rank], [other])[0]
            return tuple(self._offsets[a] + int(index) for index in found if index != NO_LINK)
        for place in (a, b):
            if self.clusters[place].inter is None:
                raise MappingError(
                    f"no path from device {source} to device {target}: {self.clusters[place].name} has no links out of "
                    "its nodes; expected a cluster profile with 'inter', or both sides in one cluster"
                )
        return self._out[source] + self._between.get((a, b), ()) + self._in[target]

    def latency_s(self, source: int, target: int) -> float:
        """Seconds the first byte takes between two devices, by the step latencies of the fabrics on the way."""
        if source == target:
            return 0.0
        (a, rank), (b, other) = self.place(source), self.place(target)
        inside, outside = self.clusters[a].intra, [self.clusters[a].inter, self.clusters[b].inter]
        if self.node(source) == self.node(target):
            return inside.latency_s if inside is not None else 0.0
        total = max(fabric.latency_s for fabric in outside if fabric is not None)
        over_rail = a == b and outside[0] is not None and outside[0].kind == "rails" and inside is not None
        size = self.clusters[a].gpus_per_node
        if over_rail and inside is not None and rank % size != other % size:
            total += inside.latency_s
        return total

    def to_host(self, device: int) -> Way:
        """Links from a device to its host's memory."""
        return self._hosts[device][0]

    def from_host(self, device: int) -> Way:
        """Links from its host's memory to a device."""
        return self._hosts[device][1]

    def to_ssd(self, device: int) -> Way:
        """Links from a device over host memory to its node's disks. Raises MappingError if there are none."""
        return self._hosts[device][0] + self._ssd(device)[0]

    def from_ssd(self, device: int) -> Way:
        """Links from its node's disks over host memory to a device. Raises MappingError if there are none."""
        return self._ssd(device)[1] + self._hosts[device][1]

    def to_remote(self, device: int) -> Way:
        """Links from a device over its network card to the remote store. Raises MappingError if there is none."""
        return self._out.get(device, self._hosts[device][0]) + self._store()[0]

    def from_remote(self, device: int) -> Way:
        """Links from the remote store over its network card to a device. Raises MappingError if there is none."""
        return self._store()[1] + self._in.get(device, self._hosts[device][1])

    def _ssd(self, device: int) -> tuple[Way, Way]:
        found = self._ssds.get(self.node(device))
        if found is None:
            raise MappingError(f"device {device}: no disks; expected ssd_bytes_per_s of the network to be given")
        return found

    def _store(self) -> tuple[Way, Way]:
        if self._remote is None:
            raise MappingError("no remote store; expected remote_bytes_per_s of the network to be given")
        return self._remote

    def _add(self, rate: float, name: str) -> int:
        self._rates.append(rate)
        self.names.append(name)
        return len(self._rates) - 1

    def _both(self, rate: float, name: str) -> tuple[Way, Way]:
        """A link into something and one out of it."""
        return (self._add(rate, f"to {name}"),), (self._add(rate, f"from {name}"),)

    def _add_cards(self, place: int) -> None:
        """The ways out of a cluster and into it: device, card, leaf, spine; built here for a cluster of one node."""
        cluster, links, first, offset = (
            self.clusters[place], self._topologies[place], self.firsts[place], self._offsets[place],
        )  # fmt: skip
        if cluster.inter is None:
            return
        if cluster.nodes > 1:
            for rank in range(cluster.gpus):
                ahead, back = _to_spine(links, rank)
                self._out[first + rank] = tuple(offset + index for index in ahead)
                self._in[first + rank] = tuple(offset + index for index in back)
        else:
            self._add_lone_node(cluster, cluster.inter, first)

    def _add_lone_node(self, cluster: Cluster, fabric: Fabric, first: int) -> None:
        """Cards and leaf switches of a node whose cluster needs none for itself, sized as Topology sizes them."""
        rate = fabric.bytes_per_s * fabric.efficiency
        port = max(fabric.bytes_per_s, cluster.host_bytes_per_s) * fabric.efficiency
        leaves = cluster.gpus if fabric.kind == "rails" else 1
        each = rate * cluster.gpus / leaves / fabric.oversubscription
        up = [self._both(each, f"spine, {fabric.name} uplink {leaf} of {cluster.name}") for leaf in range(leaves)]
        for rank in range(cluster.gpus):
            inner = self._both(port, f"network card, gpu {rank} of {cluster.name}")
            outer = self._both(rate, f"leaf, {fabric.name} of gpu {rank} of {cluster.name}")
            out, into = up[rank % leaves]
            self._out[first + rank] = inner[0] + outer[0] + out
            self._in[first + rank] = into + outer[1] + inner[1]

    def _add_hosts(self, place: int, memory: float | None, ssd: float | None) -> None:
        cluster, first = self.clusters[place], self.firsts[place]
        for node in range(cluster.nodes):
            name = f"node {node} of {cluster.name}"
            shared: tuple[Way, Way] = ((), ()) if memory is None else self._both(memory, f"host memory, {name}")
            if ssd is not None:
                self._ssds[place, node] = self._both(ssd, f"disks, {name}")
            ranks = range(node * cluster.gpus_per_node, min((node + 1) * cluster.gpus_per_node, cluster.gpus))
            for device in (first + rank for rank in ranks):
                if device in self._out:
                    port: tuple[Way, Way] = self._out[device][:1], self._in[device][-1:]
                    for index in (*port[0], *port[1]):
                        self._rates[index] = max(self._rates[index], cluster.host_bytes_per_s)
                else:
                    port = self._both(cluster.host_bytes_per_s, f"host, gpu {device - first} of {cluster.name}")
                self._hosts[device] = port[0] + shared[0], shared[1] + port[1]


def _to_spine(links: Topology, rank: int) -> tuple[list[int], list[int]]:
    """Links of a device to its cluster's spine and back."""
    nic = f"nic {rank}"
    leaf = next(end for end in links.graph.successors(nic) if end.startswith("leaf"))
    nodes = [f"gpu {rank}", nic, leaf, "spine"]
    ahead = [int(links.graph.edges[a, b]["index"]) for a, b in pairwise(nodes)]
    nodes.reverse()
    return ahead, [int(links.graph.edges[a, b]["index"]) for a, b in pairwise(nodes)]
