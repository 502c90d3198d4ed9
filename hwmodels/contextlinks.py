"""How long does every rank of a ring take to pass something to the rank some places further, all at the same time?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.collectives import Collective, compile_collective
from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster
from hwmodels.topology import topology

Array = NDArray[np.float64]
#: Groups of ranks that do the same at the same time, the priced one first.
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Hop:
    """Every rank of every group sends to ranks further round its group.

    latency_s   of one step: launch of a kernel and the slowest kind of link on any way
    loads       bytes on each of the cluster's edges per unit sent
    unit_s      seconds per unit, of the edge that needs longest
    """

    latency_s: float
    loads: Array
    unit_s: float

    def time_s(self, units: ArrayLike) -> Array:
        """Seconds for `units` from every rank; 0 for none."""
        size: Array = np.asarray(units, dtype=float)
        return np.where(size > 0, self.latency_s + self.unit_s * size, 0.0)


def context_groups(cp: int, tp: int = 1, first: int = 0) -> Groups:
    """Groups of cp ranks that stand `tp` apart, one for each tensor-parallel rank; numbered from `first`.

    >>> context_groups(2, tp=2)
    ((0, 2), (1, 3))
    """
    return tuple(tuple(range(first + rank, first + cp * tp, tp)) for rank in range(tp))


@lru_cache(maxsize=4096)
def compile_hop(cluster: Cluster, groups: Groups, distance: int) -> Hop:
    """To the rank `distance` places further, rings in the order given; units are bytes.

    Raises MappingError for ranks the cluster does not have.
    """
    links, src = topology(cluster), members(cluster, groups)
    dst = np.roll(src, -distance, axis=1)
    far = bool((links.node[src] != links.node[dst]).any())
    moves = src != dst
    loads = links.loads(src[moves], dst[moves], 1.0)
    return Hop(step_s(cluster, far), loads, links.bottleneck(loads).seconds)


def at_once(cluster: Cluster, sent: Sequence[tuple[Hop, float]]) -> Hop:
    """Hops that start together, each with so many bytes for every unit; none: nothing is sent."""
    links = topology(cluster)
    loads = sum((weight * hop.loads for hop, weight in sent), np.zeros(len(links.bytes_per_s)))
    return Hop(max((hop.latency_s for hop, _ in sent), default=0.0), loads, links.bottleneck(loads).seconds)


def members(cluster: Cluster, groups: Groups) -> NDArray[np.int64]:
    """Groups x ranks. Raises MappingError for ranks the cluster does not have, and unequal or overlapping groups."""
    for ranks in groups:
        compile_collective(cluster, "all-gather", ranks)  # says what is wrong with a group
    taken = [rank for ranks in groups for rank in ranks]
    if len(set(taken)) != len(taken) or len({len(ranks) for ranks in groups}) != 1:
        raise MappingError(f"{len(groups)} groups at once: expected equally many different ranks in each")
    return np.array(groups, dtype=np.int64)


def step_s(cluster: Cluster, far: bool) -> float:
    """Latency of one message: launch of a kernel, and the link inside a node or, if `far`, between nodes."""
    fabric = cluster.inter if far else cluster.intra
    return cluster.device.kernel_launch_s + (fabric.latency_s if fabric is not None else 0.0)


def all_pairs(cluster: Cluster, groups: Groups) -> Array:
    """Bytes on each edge when every rank sends one byte to every other of its group."""
    loads: Array = np.zeros(len(topology(cluster).bytes_per_s))
    for distance in range(1, len(groups[0])):
        loads = loads + compile_hop(cluster, groups, distance).loads
    return loads


def collective_s(cluster: Cluster, kind: str, groups: Groups, nbytes: ArrayLike) -> Array:
    """Seconds of a collective (bytes as compile_collective counts them) while the other groups do the same.

    What the groups share, ports of a host or an oversubscribed spine, adds the time that pairs of all groups take
    beyond those of one.
    """
    ranks = groups[0]
    found: Collective = compile_collective(cluster, kind, ranks)
    alone_s = found.time_s(nbytes)
    if len(groups) == 1 or len(ranks) == 1:
        return alone_s
    links = topology(cluster)
    one, every = (links.bottleneck(all_pairs(cluster, some)).seconds for some in ((ranks,), groups))
    beyond: Array = alone_s + (every - one) / len(ranks) * np.asarray(nbytes, dtype=float)
    return beyond


def busiest(cluster: Cluster, loads: Array) -> tuple[float, str]:
    """(bytes on the edge that needs longest, its name) of bytes on every edge."""
    links = topology(cluster)
    found = links.bottleneck(loads)
    return (float(loads[(loads / links.bytes_per_s).argmax()]) if len(loads) else 0.0), found.link
