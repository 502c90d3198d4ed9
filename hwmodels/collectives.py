"""How long collectives take: every algorithm a library might pick, priced on the cluster graph; the fastest is taken.

Each algorithm is a line over message size: launch + steps * step latency + bytes * (seconds per byte of its most loaded
link). The lower envelope of the lines is what NCCL's and the engines' own tuning tables do by measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster
from hwmodels.topology import TORUS_WRAP, Bottleneck, Indices, Topology, topology, torus_cycle

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "point-to-point"]

#: Steps of kernels in which every rank reaches every other directly: a barrier before and one after each exchange.
EXCHANGE_STEPS = 2
#: Cost of each message beyond the first that a rank posts to its network card; an estimate, of the order that
#: DeepEP's low-latency dispatch grows by from 16 to 256 ranks (118 to 194 us at equal bytes, DeepEP README).
MESSAGE_S = 2e-7
#: Ranks up to which exchanges between all pairs are priced; a larger group would take gigabytes to compile.
MAX_PAIRWISE_RANKS = 1024


@dataclass(frozen=True, slots=True)
class Line:
    """One algorithm: seconds = latency_s + seconds_per_byte * bytes, held up by `link`."""

    algorithm: str
    latency_s: float
    seconds_per_byte: float
    link: str


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective over a fixed group; `lines` are the algorithms that are fastest at some size.

    bottleneck   the most loaded link of the algorithm that large messages take
    """

    lines: tuple[Line, ...]
    bottleneck: str

    def time_s(self, nbytes: ArrayLike) -> NDArray[np.float64]:
        """Seconds for `nbytes` (see compile_collective for what is counted); 0 for 0 bytes or a single rank."""
        size: NDArray[np.float64] = np.asarray(nbytes, dtype=np.float64)
        if not self.lines:
            return np.zeros_like(size)
        fastest = np.full_like(size, np.inf)
        for line in self.lines:
            fastest = np.minimum(fastest, line.latency_s + line.seconds_per_byte * size)
        return np.where(size > 0, fastest, 0.0)

    def algorithm(self, nbytes: float) -> str:
        """Name of the fastest algorithm for `nbytes`."""
        if not self.lines:
            return "none"
        return min(self.lines, key=lambda line: line.latency_s + line.seconds_per_byte * nbytes).algorithm


@lru_cache(maxsize=4096)
def compile_collective(cluster: Cluster, kind: str, ranks: tuple[int, ...]) -> Collective:
    """The collective `kind` over the devices `ranks` of `cluster`.

    What time_s counts as bytes:

    all-reduce       each rank's buffer
    all-gather       the gathered result
    reduce-scatter   each rank's input
    all-to-all       what each rank sends, spread evenly over all ranks, itself included
    point-to-point   the message, from the first of two ranks to the second

    Raises MappingError for an unknown kind or ranks the cluster does not have or cannot join.
    """
    if kind not in get_args(Kind):
        raise MappingError(f"collective {kind!r}: expected one of {', '.join(get_args(Kind))}")
    if len(set(ranks)) != len(ranks) or not ranks or min(ranks) < 0 or max(ranks) >= cluster.gpus:
        raise MappingError(
            f"ranks {_shown(ranks)}: expected different devices from 0 to {cluster.gpus - 1} of {cluster.name}"
        )
    if kind == "point-to-point" and len(ranks) > 2:
        raise MappingError(f"point-to-point between ranks {_shown(ranks)}: expected two")
    if len(ranks) == 1:
        return Collective((), "none")
    group = _Group(topology(cluster), ranks)
    if kind == "all-reduce":
        lines = _all_reduce(group)
    elif kind == "all-to-all":
        lines = _all_to_all(group)
    elif kind == "point-to-point":
        lines = [group.line("direct", group.step_s, group.flows([ranks[0]], [ranks[1]], 1.0))]
    else:
        # An all-reduce of which each rank keeps its share (or to which it adds zeros elsewhere) does the same.
        lines = [*_half_all_reduce(group), *_all_reduce(group)]
    lines = _envelope(lines)
    return Collective(tuple(lines), lines[-1].link)


class _Group:
    """Ranks of a collective as the algorithms see them.

    ranks      sorted
    by_node    the ranks of each node
    aligned    whether every node has the same positions taking part, so that each rail is a group of its own
    step_s     one step between ranks: the slowest kind of link among them
    exchange_s one exchange between all ranks of a node; on a torus by as many hops as its sides have
    """

    def __init__(self, links: Topology, ranks: tuple[int, ...]) -> None:
        self.links = links
        cluster = links.cluster
        self.ranks: Indices = np.array(sorted(ranks), dtype=np.int64)
        nodes = links.node[self.ranks]
        self.by_node = [self.ranks[nodes == node] for node in np.unique(nodes)]
        first = links.local[self.by_node[0]]
        self.aligned = all(np.array_equal(links.local[members], first) for members in self.by_node)
        self.launch_s = cluster.device.kernel_launch_s
        self.intra_s = cluster.intra.latency_s if cluster.intra is not None else 0.0
        self.inter_s = cluster.inter.latency_s if cluster.inter is not None else 0.0
        sides = links.sides if cluster.intra is not None and cluster.intra.kind == "torus" else (2, 1)
        self.exchange_s = (
            EXCHANGE_STEPS * self.intra_s * sum(side // 2 if side == TORUS_WRAP else side - 1 for side in sides)
        )
        self.step_s = self.inter_s if len(self.by_node) > 1 else self.intra_s

    def line(self, algorithm: str, steps_s: float, *phases: Bottleneck) -> Line:
        """The line of an algorithm whose phases follow each other; the longest phase names the link."""
        longest = max(phases, key=lambda phase: phase.seconds)
        return Line(algorithm, self.launch_s + steps_s, sum(phase.seconds for phase in phases), longest.link)

    def flows(self, src: ArrayLike, dst: ArrayLike, share: float) -> Bottleneck:
        """Seconds per byte when every pair moves `share` of the bytes at once."""
        return self.links.bottleneck(self.links.loads(src, dst, share))

    def all_pairs(self, share: float) -> Bottleneck:
        """Every rank sends `share` to every other."""
        src, dst = _pairs(self.ranks)
        return self.flows(src, dst, share)

    def node_pairs(self, share: float) -> Bottleneck:
        """Every rank sends `share` to every other of its node."""
        src, dst = zip(*(_pairs(members) for members in self.by_node), strict=True)
        return self.flows(np.concatenate(src), np.concatenate(dst), share)

    def rail_pairs(self, share: float) -> Bottleneck:
        """Every rank sends `share` to every other of its rail; the group must be aligned."""
        rails = np.stack(self.by_node)
        i, j = _pairs(np.arange(len(rails)))
        return self.flows(rails[i].ravel(), rails[j].ravel(), share)

    def rail_neighbours(self, share: float) -> Bottleneck:
        """Every rank sends half of `share` to the next and half to the previous of its rail."""
        rails = np.stack(self.by_node)
        ahead = np.roll(rails, -1, axis=0)
        return self.flows(np.append(rails, ahead), np.append(ahead, rails), share / 2)

    def ring(self, share: float) -> Bottleneck:
        """Every rank passes `share` around, half each way.

        Across nodes there is a ring per rank of the smallest node, so that all network cards are used.
        """
        links, rings = self.links, min(len(members) for members in self.by_node)
        if len(self.by_node) == 1:
            rings = 1
        src, dst = [], []
        for ring in range(rings):
            order = np.concatenate([np.roll(members, -ring) for members in self.by_node])
            if links.cluster.intra is not None and links.cluster.intra.kind == "torus":
                order = self.ranks if len(self.ranks) < len(links.node) else np.array(torus_cycle(*links.sides))
            src += [order, np.roll(order, -1)]
            dst += [np.roll(order, -1), order]
        return self.flows(np.concatenate(src), np.concatenate(dst), share / 2 / rings)

    def tree(self, members: Indices, share: float) -> Bottleneck:
        """Two binary trees over each row of `members`, each with half of `share` up and down (NCCL's double tree)."""
        count = members.shape[1]
        child = np.arange(1, count)
        parent = (child - 1) // 2
        src, dst = [], []
        for order in (members, members[:, ::-1]):
            below, above = order[:, child].ravel(), order[:, parent].ravel()
            src += [below, above]
            dst += [above, below]
        return self.flows(np.concatenate(src), np.concatenate(dst), share / 2)


def _all_reduce(group: _Group) -> list[Line]:
    n, nodes = len(group.ranks), len(group.by_node)
    cluster = group.links.cluster
    depth = int(np.ceil(np.log2(n)))
    ring_s = 2 * (n - 1) / n * ((n - nodes) * group.intra_s + nodes * group.step_s)
    lines = [
        group.line("ring", ring_s, group.ring(2 * (n - 1) / n)),
        group.line("tree", 2 * depth * group.step_s, group.tree(group.ranks[None, :], 1.0)),
    ]
    if nodes == 1:
        exchange_s = group.exchange_s
        lines.append(group.line("one-shot", exchange_s, group.all_pairs(1.0)))
        lines.append(group.line("two-shot", 2 * exchange_s, group.all_pairs(2 / n)))
        if cluster.intra is not None and cluster.intra.in_switch_reduction:
            # Every rank's buffer is read once by the switch, which returns each rank its sum of one n-th; that is then
            # sent up once and multicast: (n + 1) / n of the bytes in both directions.
            port = group.links.bottleneck(group.links.switch_loads(group.ranks, (n + 1) / n))
            slower = cluster.intra.efficiency / cluster.intra.reduction_efficiency
            lines.append(group.line("in-switch", 2 * exchange_s, Bottleneck(port.seconds * slower, port.link)))
    elif group.aligned:
        inside = len(group.by_node[0])
        exchange_s = 2 * group.exchange_s if inside > 1 else 0.0
        local = group.node_pairs(2 / inside)
        levels = int(np.ceil(np.log2(nodes)))
        between = {
            "hierarchical ring": (2 * (nodes - 1), group.rail_neighbours(2 * (nodes - 1) / nodes / inside)),
            "hierarchical tree": (2 * levels, group.tree(np.stack(group.by_node, axis=1), 1 / inside)),
        }
        for name, (steps, phase) in between.items():
            lines.append(group.line(name, exchange_s + steps * group.inter_s, local, phase))
    return lines


def _half_all_reduce(group: _Group) -> list[Line]:
    """All-gather and reduce-scatter: the same transfers, one with the arrows of the other reversed."""
    n, nodes = len(group.ranks), len(group.by_node)
    ring_s = (n - 1) / n * ((n - nodes) * group.intra_s + nodes * group.step_s)
    lines = [group.line("ring", ring_s, group.ring((n - 1) / n))]
    if nodes == 1:
        lines.append(group.line("direct", group.exchange_s, group.all_pairs(1 / n)))
    elif group.aligned:
        inside = len(group.by_node[0])
        exchange_s = group.exchange_s if inside > 1 else 0.0
        levels = int(np.ceil(np.log2(nodes)))
        local, rails = group.node_pairs(1 / inside), group.rail_neighbours((nodes - 1) / nodes / inside)
        lines.append(group.line("hierarchical", exchange_s + levels * group.inter_s, local, rails))
    return lines


def _all_to_all(group: _Group) -> list[Line]:
    n, nodes = len(group.ranks), len(group.by_node)
    exchange_s = group.exchange_s
    lines = []
    if nodes == 1:
        return [group.line("direct", exchange_s, group.all_pairs(1 / n))]
    if n > MAX_PAIRWISE_RANKS and not (group.aligned and nodes <= MAX_PAIRWISE_RANKS):
        raise MappingError(f"all-to-all over {n} ranks: expected at most {MAX_PAIRWISE_RANKS}; use a smaller group")
    if n <= MAX_PAIRWISE_RANKS:
        messages = n - min(len(members) for members in group.by_node)
        steps_s = exchange_s + EXCHANGE_STEPS * group.inter_s + (messages - 1) * MESSAGE_S
        lines.append(group.line("direct", steps_s, group.all_pairs(1 / n)))
    if group.aligned:
        inside = len(group.by_node[0])
        steps_s = (exchange_s if inside > 1 else 0.0) + EXCHANGE_STEPS * group.inter_s + (nodes - 2) * MESSAGE_S
        local, rails = group.node_pairs(1 / inside), group.rail_pairs(1 / nodes)
        lines.append(group.line("hierarchical", steps_s, local, rails))
    return lines


def _pairs(members: Indices) -> tuple[Indices, Indices]:
    """All ordered pairs of different members."""
    i, j = np.nonzero(~np.eye(len(members), dtype=bool))
    return members[i], members[j]


def _envelope(lines: list[Line]) -> list[Line]:
    """The lines that are lowest somewhere, from small messages to large."""
    kept: list[Line] = []
    for line in sorted(lines, key=lambda line: (line.latency_s, line.seconds_per_byte)):
        if not kept or line.seconds_per_byte < kept[-1].seconds_per_byte:
            kept.append(line)
    return kept


def _shown(ranks: tuple[int, ...]) -> str:
    text = ", ".join(map(str, ranks[:8]))
    return f"({text}, ... {len(ranks)} in all)" if len(ranks) > 8 else f"({text})"
