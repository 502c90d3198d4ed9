"""Where do experts sit if nobody optimises: in order, at random, greedily by load, or replicated as EPLB does?

None of these looks at transitions. Their bound is `simple_bound`.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlanError
from planner.placement import Bools, Floats, Indices, Placement, Problem, placement_of

#: Seats that no expert takes.
EMPTY = -1


def contiguous(problem: Problem) -> Placement:
    """Experts in order: the first E/G on GPU 0, the next on GPU 1, as engines load them; copies are not used."""
    start = perf_counter()
    row = np.repeat(np.arange(problem.gpus), even_counts(problem.experts, problem.slots_of))
    return placement_of(problem, np.tile(row, (problem.layers, 1)), "contiguous", perf_counter() - start)


def random(problem: Problem, *, seed: int = 0) -> Placement:
    """Experts dealt out at random, as many to every GPU as `contiguous` gives it; each layer draws anew."""
    start = perf_counter()
    rng = np.random.default_rng(seed)
    row = np.repeat(np.arange(problem.gpus), even_counts(problem.experts, problem.slots_of))
    gpus = rng.permuted(np.tile(row, (problem.layers, 1)), axis=1)
    return placement_of(problem, gpus, "random", perf_counter() - start)


def greedy(problem: Problem) -> Placement:
    """Each layer's experts from the most loaded on, each to the least loaded GPU with a free slot (LPT); no copies."""
    start = perf_counter()
    holds = np.stack([packed(w, np.ones(len(w), np.intp), problem.slots_of) for w in problem.shares])
    return placement_of(problem, holds, "greedy", perf_counter() - start)


def eplb(problem: Problem, *, groups: int = 1) -> Placement:
    """Copies of the most loaded experts until the replicas are used up, then packed by load.

    groups   of consecutive experts (DeepSeek-V3: 8); if they divide evenly over the nodes, whole groups go to nodes by
             load first, and replication and packing then happen inside each node. Otherwise over all GPUs at once.

    The idea is that of DeepSeek's expert-parallelism load balancer: hierarchical and global balancing. Two copies never
    share a GPU; one that finds no other GPU with a free slot is left out. Raises PlanError for groups that do not
    divide the experts.
    """
    start = perf_counter()
    if groups < 1 or problem.experts % groups:
        raise PlanError(f"{groups} groups; expected a number that divides the {problem.experts} experts")
    nodes = [np.flatnonzero(problem.node_of == node) for node in np.unique(problem.node_of)]
    if not _even(problem, nodes, groups):
        nodes, groups = [np.arange(problem.gpus)], 1
    extra = np.diff(np.arange(len(nodes) + 1) * problem.replicas // len(nodes))
    holds = np.zeros((problem.layers, problem.experts, problem.gpus), dtype=bool)
    for layer, shares in enumerate(problem.shares):
        homes = _homes(shares, groups, len(nodes))
        for node, gpus in enumerate(nodes):
            experts = np.flatnonzero(homes == node)
            copies = replicated(shares[experts], int(extra[node]), len(gpus))
            holds[layer][np.ix_(experts, gpus)] = packed(shares[experts], copies, problem.slots_of[gpus])
    return placement_of(problem, holds, "eplb", perf_counter() - start)


def even_counts(experts: int, slots: Indices) -> Indices:
    """Experts on each GPU: as even as the slots allow, earlier GPUs first; their sum is `experts`."""
    counts = np.zeros_like(slots)
    while (left := experts - int(counts.sum())) > 0:
        room = np.flatnonzero(counts < slots)
        level = counts[room].min()
        counts[room[counts[room] == level][:left]] += 1
    return counts


def replicated(shares: Floats, extra: int, gpus: int) -> Indices:
    """Copies of each expert: one more for the expert with the largest share per copy, `extra` times; at most gpus."""
    copies = np.ones(len(shares), dtype=np.intp)
    for _ in range(min(extra, len(shares) * (gpus - 1))):
        copies[np.where(copies < gpus, shares / copies, -1.0).argmax()] += 1
    return copies


def packed(shares: Floats, copies: Indices, slots: Indices) -> Bools:
    """experts x gpus: copies in order of their share, each to the least loaded GPU with a slot and without that expert.

    A copy that no GPU can take is left out; every expert keeps one, because first copies are guaranteed their slots.
    """
    holds = np.zeros((len(shares), len(slots)), dtype=bool)
    load, free = np.zeros(len(slots)), slots.copy()
    waiting = len(shares)
    for expert in np.argsort(-shares / copies, kind="stable"):
        waiting -= 1
        for copy in range(copies[expert]):
            if copy and free.sum() <= waiting:
                break
            able = (free > 0) & ~holds[expert]
            if not able.any():
                break
            gpu = np.where(able, load, np.inf).argmin()
            holds[expert, gpu] = True
            load[gpu] += shares[expert] / copies[expert]
            free[gpu] -= 1
    return holds


def seated(holds: Bools, seats: Indices) -> Indices:
    """Expert on every seat, EMPTY for none.

    holds   experts x gpus, no more on a GPU than its seats
    seats   GPU of every seat, ascending
    """
    items = np.full(len(seats), EMPTY)
    expert, gpu = np.nonzero(holds)
    order = np.argsort(gpu, kind="stable")
    gpu = gpu[order]
    first = np.searchsorted(seats, np.arange(holds.shape[1]))
    items[first[gpu] + np.arange(len(gpu)) - np.searchsorted(gpu, gpu)] = expert[order]
    return items


def _even(problem: Problem, nodes: list[NDArray[np.intp]], groups: int) -> bool:
    """Whether groups go evenly to nodes whose slots hold them and their part of the replicas."""
    share = problem.experts // len(nodes) - (-problem.replicas // len(nodes))
    return groups % len(nodes) == 0 and all(problem.slots_of[gpus].sum() >= share for gpus in nodes)


def _homes(shares: Floats, groups: int, nodes: int) -> Indices:
    """Node of every expert: whole groups, as many to each node, from the most loaded on."""
    weight = shares.reshape(groups, -1).sum(axis=1)
    held = packed(weight, np.ones(groups, np.intp), np.full(nodes, groups // nodes))
    return np.repeat(held.argmax(axis=1), len(shares) // groups)
