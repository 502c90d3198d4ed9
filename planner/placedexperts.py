"""Where do experts sit in the plans of a search, which knows how tokens were routed and has no time to lose?

Copies go to the experts with the most load per copy and are packed by load, as expert-parallel load balancers do it,
all layers at once; then the busiest rank of each layer swaps experts with others for as long as that relieves it. There
is no clock and no chance in it: the same routing gives the same map. `shardwise place-experts` takes longer and proves
how near the best it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hwmodels.routing import RoutingStats
from planner.placement import Bools, Floats, Problem
from planner.placementbaselines import eplb
from planner.placementfiles import filled, slot_maps
from planner.routedranks import ExpertMap, Indices, busiest_over_mean, keeps_groups

#: Swaps per layer at most, for every rank.
SWAPS_PER_RANK = 16
#: Least relief of the busiest rank that is worth a swap, as a part of its load.
RELIEF = 1e-6
#: Part of the mean by which the busiest rank is above it, from which on copies are worth their memory.
UNEVEN = 0.01


def placed(
    stats: RoutingStats, ranks: int, redundant: int, nodes: Sequence[int] | None = None, groups: int = 1
) -> ExpertMap:
    """A map of the recorded experts on ranks with as many slots each, `redundant` slots beyond one per expert.

    nodes, groups   of the ranks, and groups of experts side by side that stay on one node where they divide evenly

    Raises PlanError for slots that do not divide over the ranks.
    """
    slots = (stats.experts + redundant) // ranks
    homes = np.zeros(ranks, dtype=np.intp) if nodes is None or groups == 1 else np.asarray(nodes, dtype=np.intp)
    problem = Problem(stats.loads, None, ranks, slots, redundant, nodes=homes.tolist())
    holds = _packed(problem, groups if len(set(homes.tolist())) > 1 else 1)
    for layer in np.flatnonzero((holds.sum(axis=1) != slots).any(axis=1)):
        alone = Problem(stats.loads[layer : layer + 1], None, ranks, slots, redundant, nodes=homes.tolist())
        holds[layer] = filled(alone, eplb(alone, groups=groups).holds)[0]
    for shares, layer in zip(problem.shares, holds, strict=True):
        even_out(shares, layer, homes)
    return ExpertMap(slot_maps(problem, holds), stats.experts)


def _packed(problem: Problem, groups: int) -> Bools:
    """Layers x experts x ranks; copies for which there was no rank without that expert are missing.

    Where nodes take as many groups, ranks and copies each, whole groups go to nodes by load first.
    """
    layers, experts, ranks, slots = problem.layers, problem.experts, problem.gpus, int(problem.slots_of[0])
    names, sizes = np.unique(problem.node_of, return_counts=True)
    nodes = len(names)
    if groups == 1 or groups % nodes or experts % groups or len(set(sizes.tolist())) > 1 or problem.replicas % nodes:
        return _dealt(problem.shares, problem.replicas, np.full(ranks, slots))
    size = experts // groups
    loads = problem.shares.reshape(layers, groups, size).sum(axis=2)
    home = _dealt(loads, 0, np.full(nodes, groups // nodes)).argmax(axis=2)
    holds = np.zeros((layers, experts, ranks), dtype=bool)
    rows = np.arange(layers)[:, None]
    for node, name in enumerate(names):
        mine = np.argsort(home != node, axis=1, kind="stable")[:, : groups // nodes]
        own = (mine[:, :, None] * size + np.arange(size)).reshape(layers, -1)
        gpus = np.flatnonzero(problem.node_of == name)
        dealt = _dealt(problem.shares[rows, own], problem.replicas // nodes, np.full(len(gpus), slots))
        holds[rows[:, :, None], own[:, :, None], gpus] = dealt
    return holds


def _dealt(shares: Floats, extra: int, slots: Indices) -> Bools:
    """Layers x experts x ranks: `extra` copies of the most loaded, each to the least loaded rank that can take it.

    shares   layers x experts
    slots    of every rank
    """
    layers, experts = shares.shape
    rows = np.arange(layers)
    copies = np.ones(shares.shape, dtype=np.intp)
    for _ in range(extra):
        copies[rows, np.where(copies < len(slots), shares / copies, -1.0).argmax(axis=1)] += 1
    each = shares / copies
    order = np.argsort(-each, axis=1, kind="stable")
    items = np.stack([np.repeat(row, count[row]) for row, count in zip(order, copies, strict=True)])
    holds = np.zeros((layers, experts, len(slots)), dtype=bool)
    load, free = np.zeros((layers, len(slots))), np.tile(slots, (layers, 1))
    for item in items.T:
        able = (free > 0) & ~holds[rows, item]
        rank = np.where(able, load, np.inf).argmin(axis=1)
        took = able[rows, rank]
        holds[rows[took], item[took], rank[took]] = True
        load[rows, rank] += np.where(took, each[rows, item], 0.0)
        free[rows, rank] -= took
    return holds


def even_out(shares: Floats, holds: Bools, homes: Indices) -> None:
    """Swap experts of the busiest rank with those of others of its node (`homes`) until none relieves it; in place.

    shares   of the layer's choices, by expert
    holds    experts x ranks

    Each swap is the one that leaves the busier of the two ranks least busy, the first of several.
    """
    each = shares / holds.sum(axis=1)
    load = each @ holds
    for _ in range(SWAPS_PER_RANK * holds.shape[1]):
        busiest = int(load.argmax())
        mine = np.flatnonzero(holds[:, busiest])
        theirs, rank = np.nonzero(holds & ((homes == homes[busiest]) & (np.arange(len(load)) != busiest)))
        if not len(theirs):
            return
        moved = each[mine][:, None] - each[theirs]
        after = np.maximum(load[busiest] - moved, load[rank] + moved)
        after[holds[mine][:, rank] | holds[theirs, busiest]] = np.inf
        best, other = np.unravel_index(int(after.argmin()), after.shape)
        if not after[best, other] < load[busiest] * (1 - RELIEF):
            return
        here, there, where = mine[best], theirs[other], rank[other]
        holds[here, [busiest, where]] = False, True
        holds[there, [busiest, where]] = True, False
        load[busiest] -= moved[best, other]
        load[where] += moved[best, other]


class Placements:
    """Maps made from one recording, each made once."""

    def __init__(self, stats: RoutingStats, groups: int) -> None:
        """groups   of experts side by side that the model chooses a token's experts from; 1 where it has none."""
        self.stats = stats
        self.groups = groups
        self._made: dict[tuple[int, int, tuple[int, ...]], ExpertMap] = {}
        self._chosen: dict[tuple[int, int, tuple[int, ...]], ExpertMap] = {}
        self._help: dict[int, bool] = {}

    def best(
        self, ranks: int, redundant: int, nodes: tuple[int, ...], price: Callable[[ExpertMap], float]
    ) -> ExpertMap:
        """The map for ranks on these nodes.

        Where tokens stay within groups of experts, ranks can be evened out over all nodes, or groups kept on nodes,
        which saves traffic between them: the one with the lower `price` is taken.
        """
        if self.groups == 1 or len(set(nodes)) == 1:
            return self._once(ranks, redundant, ())
        key = (ranks, redundant, nodes)
        if key not in self._chosen:
            free, kept = self._once(ranks, redundant, ()), self._once(ranks, redundant, nodes)
            keeps = keeps_groups(kept, ranks, self.groups, nodes)
            self._chosen[key] = kept if keeps and price(kept) < price(free) else free
        return self._chosen[key]

    def copies_help(self, ranks: int) -> bool:
        """Whether experts without copies leave the busiest rank clearly above the mean, or do not divide evenly."""
        if self.stats.experts % ranks:
            return True
        if ranks not in self._help:
            over = busiest_over_mean(self.stats, self._once(ranks, 0, ()), ranks) - 1
            self._help[ranks] = over > UNEVEN
        return self._help[ranks]

    def _once(self, ranks: int, redundant: int, nodes: tuple[int, ...]) -> ExpertMap:
        key = (ranks, redundant, nodes)
        if key not in self._made:
            self._made[key] = placed(self.stats, ranks, redundant, nodes, self.groups if nodes else 1)
        return self._made[key]
