"""Which placements does a layer have, and which of them are the same but for the names of GPUs?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from planner.errors import PlanError
from planner.placement import Floats, Indices, Problem

#: Most placements of a layer that are enumerated.
MOST_STATES = 50_000
#: Most transitions between two layers: representatives x states.
MOST_STEPS = 200_000_000


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """All placements of one layer; those that are renamings of each other stand together.

    gpu      states x experts: GPU of each expert
    first    index of each orbit's representative
    rename   states x gpus: names that give the state, gpu[t] = rename[t][gpu[representative of t]]
    sets     sets x experts: the sets of experts that a GPU or a node can hold
    on_gpu   states x gpus: index of the GPU's set
    on_node  states x nodes: index of the node's set
    nodes    GPUs of each node
    part     states x nodes: index of what the node's GPUs hold, in `parts`
    parts    for each node: what its GPUs can hold x (indices of its GPUs' sets, then of the node's)
    """

    gpu: Indices
    first: Indices
    rename: Indices
    sets: Floats
    on_gpu: Indices
    on_node: Indices
    nodes: tuple[Indices, ...]
    part: Indices
    parts: tuple[Indices, ...]


def states_of(problem: Problem) -> States:
    """Every placement of a layer's experts within the slots, by orbits of the renamings that change nothing.

    Raises PlanError where there are too many.
    """
    count = _count(problem)
    if count > MOST_STATES:
        raise _too_many(f"{count:.3g} placements per layer", MOST_STATES)
    found, free = np.zeros((1, 0), dtype=np.intp), problem.slots_of[None]
    for _ in range(problem.experts):
        row, gpu = np.nonzero(free)
        found = np.column_stack([found[row], gpu])
        free = free[row]
        free[np.arange(len(row)), gpu] -= 1
    order, first, rename = _orbits(found, list(renamings(problem)), problem.gpus)
    if len(first) * len(order) > MOST_STEPS:
        raise _too_many(f"{len(first)} x {len(order)} transitions between two layers", MOST_STEPS)
    gpu = found[order]
    nodes, node_of = np.unique(problem.node_of, return_inverse=True)
    bits = 1 << np.arange(problem.experts)
    on_gpu = ((gpu[:, :, None] == np.arange(problem.gpus)) * bits[:, None]).sum(axis=1)
    on_node = ((node_of[gpu][:, :, None] == np.arange(len(nodes))) * bits[:, None]).sum(axis=1)
    masks, index = np.unique(np.hstack([on_gpu, on_node]), return_inverse=True)
    index = index.reshape(len(gpu), -1)
    sets = ((masks[:, None] & bits) > 0).astype(np.float64)
    on_gpu, on_node = index[:, : problem.gpus], index[:, problem.gpus :]
    members = tuple(np.flatnonzero(node_of == node) for node in range(len(nodes)))
    parts, part = [], []
    for node, own in enumerate(members):
        what, which = np.unique(np.column_stack([on_gpu[:, own], on_node[:, node]]), axis=0, return_inverse=True)
        parts.append(what)
        part.append(which.reshape(-1))
    return States(gpu, first, rename, sets, on_gpu, on_node, members, np.column_stack(part), tuple(parts))


def renamings(problem: Problem) -> Iterator[Indices]:
    """Exchanges of two GPUs, or of two nodes, that leave slots, nodes and links as they are."""
    nodes = [np.flatnonzero(problem.node_of == node) for node in np.unique(problem.node_of)]
    exchanges = [(np.array([a]), np.array([b])) for a, b in combinations(range(problem.gpus), 2)]
    exchanges += [(a, b) for a, b in combinations(nodes, 2) if len(a) == len(b) > 1]
    near = problem.node_of[:, None] == problem.node_of
    for a, b in exchanges:
        names = np.arange(problem.gpus)
        names[a], names[b] = b, a
        square = np.ix_(names, names)
        same = problem.slots_of[names] == problem.slots_of
        if same.all() and (near[square] == near).all() and (problem.link_s[square] == problem.link_s).all():
            yield names


def _orbits(found: Indices, names: list[Indices], gpus: int) -> tuple[Indices, Indices, Indices]:
    """Order of the states by orbit, index of each orbit's first, and the names that lead from it to each state."""
    base = gpus ** np.arange(found.shape[1])
    codes = found @ base
    by_code = np.argsort(codes)
    ranked = codes[by_code]
    rename = np.full((len(found), gpus), -1)
    order: list[Indices] = []
    first: list[int] = []
    seen = 0
    for state in range(len(found)):
        if rename[state, 0] >= 0:
            continue
        first.append(seen)
        rename[state] = np.arange(gpus)
        edge = np.array([state])
        while len(edge):
            order.append(edge)
            seen += len(edge)
            fresh = []
            for name in names:
                there = by_code[np.searchsorted(ranked, name[found[edge]] @ base)]
                new = rename[there, 0] < 0
                rename[there[new]] = name[rename[edge[new]]]
                fresh.append(there[new])
            edge = np.concatenate(fresh) if fresh else edge[:0]
    whole = np.concatenate(order)
    return whole, np.array(first), rename[whole]


def _count(problem: Problem) -> int:
    """Placements of a layer's experts within the slots, 10^18 at most.

    c_g(n) = sum over k <= slots of (n over k) c_(g-1)(n - k), where k of n experts are on GPU g.
    """
    ways = [1] + [0] * problem.experts
    for slots in problem.slots_of:
        ways = [
            min(sum(comb(n, k) * ways[n - k] for k in range(min(int(slots), n) + 1)), 10**18)
            for n in range(problem.experts + 1)
        ]
    return ways[-1]


def _too_many(what: str, most: int) -> PlanError:
    return PlanError(f"{what}; expected at most {most} to enumerate: use the solver large, or milp on few layers")
