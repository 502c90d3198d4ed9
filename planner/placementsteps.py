"""How long is dispatch from some placements of a layer to all placements of the next?"""

from __future__ import annotations

import numpy as np

from planner.placement import Floats, Indices, Problem
from planner.placementstates import States


def dispatch_between(
    problem: Problem,
    states: States,
    table: Floats,
    ends: tuple[Floats, Floats],
    some: Indices,
    sending: Floats | None,
) -> Floats:
    """Seconds of dispatch from some states to all.

    table   sets x sets: flow from each set of experts to each
    ends    flow that leaves each set, and that reaches it
    sending what sending_s tells
    """
    leave, arrive = ends
    here, there = states.on_gpu[some], states.on_gpu
    levels = _levels(problem)
    if problem.traffic == "pairs" or (levels is None and problem.traffic == "total"):
        return _pairwise(problem, states, table, here)
    if levels is None:
        assert sending is not None
        return _portwise(problem, states, table, here, sending)
    near_s, far_s = levels
    total = problem.traffic == "total"
    cost = np.zeros((len(some), len(there)))
    if states.on_node.shape[1] == 1:
        each = near_s * ((leave[:, None] if total else np.maximum(leave[:, None], arrive)) - table)
        for g in range(problem.gpus):
            part = each[here[:, g]][:, there[:, g]]
            cost = cost + part / problem.gpus if total else np.maximum(cost, part)
        return cost
    for node, (gpus, parts) in enumerate(zip(states.nodes, states.parts, strict=True)):
        node_cost = np.zeros((len(some), len(parts)))
        entering_node, whole = table[states.on_node[some, node]], parts[:, -1]
        for position, g in enumerate(gpus):
            leaving, there_g = table[here[:, g]], parts[:, position]
            inside, left = leaving[:, whole], leave[here[:, g]][:, None]
            kept = leaving[:, there_g]
            if total:
                node_cost += (near_s * (inside - kept) + far_s * (left - inside)) / problem.gpus
                continue
            entering = entering_node[:, there_g]
            np.maximum(node_cost, near_s * (np.maximum(inside, entering) - kept), out=node_cost)
            np.maximum(node_cost, far_s * np.maximum(left - inside, arrive[there_g] - entering), out=node_cost)
        spread = node_cost[:, states.part[:, node]]
        cost = cost + spread if total else np.maximum(cost, spread, out=cost)
    return cost


def _pairwise(problem: Problem, states: States, table: Floats, here: Indices) -> Floats:
    """The same where pairs of GPUs add up or wait for none: what enters a node depends on what that node holds."""
    total = problem.traffic == "total"
    cost = np.zeros((len(here), len(states.gpu)))
    for node, (gpus, parts) in enumerate(zip(states.nodes, states.parts, strict=True)):
        node_cost = np.zeros((len(here), len(parts)))
        for position, h in enumerate(gpus):
            for g in np.flatnonzero(problem.link_s[:, h]):
                part = problem.link_s[g, h] * table[here[:, g]][:, parts[:, position]]
                if total:
                    node_cost += part / problem.gpus
                else:
                    np.maximum(node_cost, part, out=node_cost)
        spread = node_cost[:, states.part[:, node]]
        cost = cost + spread if total else np.maximum(cost, spread, out=cost)
    return cost


def sending_s(problem: Problem, states: States, table: Floats) -> Floats | None:
    """gpus x sets x states: seconds of a GPU's busier port that sends, if it holds the set, to each next placement.

    None where `dispatch_between` does without.
    """
    if problem.traffic != "ports" or _levels(problem) is not None:
        return None
    near = problem.node_of[:, None] == problem.node_of
    busiest = np.zeros((problem.gpus, len(states.sets), len(states.gpu)))
    for kind in (near, ~near):
        cost = problem.link_s * kind
        for g in range(problem.gpus):
            sent = np.zeros(busiest.shape[1:])
            for h in np.flatnonzero(cost[g]):
                sent += cost[g, h] * table[:, states.on_gpu[:, h]]
            np.maximum(busiest[g], sent, out=busiest[g])
    return busiest


def _portwise(problem: Problem, states: States, table: Floats, here: Indices, sending: Floats) -> Floats:
    """The same for the ports of GPUs whose links differ within a node or between nodes."""
    near = problem.node_of[:, None] == problem.node_of
    cost: Floats = np.array(sending[0, here[:, 0]])
    for g in range(1, problem.gpus):
        np.maximum(cost, sending[g, here[:, g]], out=cost)
    for h in range(problem.gpus):
        taken = np.zeros((len(here), len(states.sets)))
        for kind in (near, ~near):
            links = problem.link_s[:, h] * kind[:, h]
            np.maximum(taken, np.einsum("g,sgb->sb", links, table[here]), out=taken)
        np.maximum(cost, taken[:, states.on_gpu[:, h]], out=cost)
    return cost


def _levels(problem: Problem) -> tuple[float, float] | None:
    """Seconds within and across nodes if all links of either kind are alike, else None."""
    near = problem.node_of[:, None] == problem.node_of
    found = []
    for pairs in (near & ~np.eye(problem.gpus, dtype=bool), ~near):
        links = problem.link_s[pairs]
        if links.size and links.min() != links.max():
            return None
        found.append(float(links[0]) if links.size else 0.0)
    return found[0], found[1]
