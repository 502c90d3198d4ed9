"""Zeppelin: each sequence on one device, round one node's devices, or round several nodes, by where its ring hides.

Ring attention passes keys and values while it computes (arXiv:2509.21841). On P ranks a sequence's attention takes
quadratic s^2 / P seconds and its ring ring_bytes s (P - 1) / P / rate: the longer s, the better the second hides behind
the first. A sequence is spread as far as its ring hides, and at least as far as its memory asks for. Linear layers see
equal tokens on every rank, which a remapping before and after attention pays for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlanError
from planner.sequencegroups import Array, GroupCost, Partition, checked, least_rounds

Indices = NDArray[np.intp]
#: Numbers of rounds tried, from the fewest that memory allows.
TRIED_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Zones:
    """Lengths, in tokens, from which a ring inside a node and a ring over two nodes hide behind attention."""

    intra: float
    inter: float


def ring_rate(cost: GroupCost, ranks: int, node: int, cards: int) -> float:
    """Bytes per s of one hop of a ring: between nodes what `cards` network cards carry together, at most a node's."""
    inside = cost.rate(min(node, ranks))
    return inside if ranks <= node else min(inside, cards * cost.rate(ranks))


def zones(cost: GroupCost, node: int = 8, cards: int = 8) -> Zones:
    """Where quadratic s^2 / P = ring_bytes s (P - 1) / P / rate, with P one node and two."""

    def length(ranks: int) -> float:
        if cost.quadratic_s == 0:
            return inf
        return cost.ring_bytes_per_token * (ranks - 1) / ring_rate(cost, ranks, node, cards) / cost.quadratic_s

    return Zones(length(node), length(2 * node))


def ring_s(cost: GroupCost, length: int, ranks: int, node: int, cards: int) -> float:
    """Seconds of a sequence's attention on a ring, the longer of arithmetic and passing."""
    attending = cost.quadratic_s * length**2 / ranks
    if ranks == 1:
        return attending
    return max(
        attending, cost.ring_bytes_per_token * length * (ranks - 1) / ranks / ring_rate(cost, ranks, node, cards)
    )


def zeppelin(
    lengths: Sequence[int], ranks: int, cost: GroupCost, *, hidden_bytes: float, node: int = 8, cards: int = 8
) -> Partition:
    """A batch in rounds; in each, rings over nodes, then rings in nodes, then single devices, all evenly dealt.

    hidden_bytes   of one token moved to another rank before and after attention, in all layers, forward and backward
    node, cards    devices of a node and network cards that its rings use (1: a ring's own, without the routing layer)

    The longest sequences come first, each to the nodes or device with least attention that still have room; of `n`
    rounds each holds every n-th sequence, so that they are alike. Moved tokens take the links inside a node where they
    stay there. `rounds` is empty: zones overlap on their ranks.

    Raises PlanError as `checked`, and for nodes that do not divide the ranks.
    """
    begun = perf_counter()
    ordered = checked(lengths, ranks, cost)
    node = min(node, ranks)
    if node < 1 or ranks % node:
        raise PlanError(f"nodes of {node}: expected a divisor of {ranks} ranks")
    best, least = inf, least_rounds(ordered, ranks, cost)
    tried = 0
    for count in range(least, least + len(ordered) + 1):
        found = [_round_s(ordered[i::count], ranks, cost, hidden_bytes, node, cards) for i in range(count)]
        if all(found):
            best, tried = min(best, sum(found)), tried + 1
        if tried == TRIED_ROUNDS:
            break
    linear = cost.linear_s * sum(ordered) + cost.quadratic_s * sum(s * s for s in ordered)
    return Partition("Zeppelin", (), best, least * cost.start_s + linear / ranks, perf_counter() - begun)


def _round_s(lengths: Sequence[int], ranks: int, cost: GroupCost, hidden_bytes: float, node: int, cards: int) -> float:
    """Seconds of one round; 0.0 where some sequence finds no room."""
    if not lengths:
        return 0.0
    zone, room = zones(cost, node, cards), cost.tokens_per_rank
    tokens, attention = np.zeros(ranks), np.zeros(ranks)
    for s in lengths:
        over = ceil(s / room)  # ranks that memory asks for
        if over > node or (s >= zone.inter and ranks > node):
            nodes = min(ranks // node, max(2, ceil(over / node)))
        else:
            nodes = 1 if over > 1 or s >= zone.intra else 0
        taken = _chosen(tokens, attention, s, nodes, node, room)
        while taken is None:
            nodes = max(1, 2 * nodes)
            if nodes > ranks // node:
                return 0.0
            taken = _chosen(tokens, attention, s, nodes, node, room)
        tokens[taken] += s / len(taken)
        attention[taken] += ring_s(cost, s, len(taken), node, cards)
    mean = tokens.mean()
    by_node = tokens.reshape(-1, node).mean(axis=1)
    remap_s = hidden_bytes * (
        np.abs(by_node - mean).max() / cost.rate(ranks)
        + np.abs(tokens.reshape(-1, node) - by_node[:, None]).max() / cost.rate(node)
    )
    return float(cost.start_s + attention.max() + cost.linear_s * mean + remap_s)


def _chosen(tokens: Array, attention: Array, length: int, nodes: int, node: int, room: float) -> Indices | None:
    """Ranks of least attention with room for a sequence on `nodes` nodes, on one device for 0; None if none have."""
    if nodes == 0:
        free = np.flatnonzero(tokens + length <= room)
        return np.array([free[attention[free].argmin()]]) if len(free) else None
    fullest, busiest = tokens.reshape(-1, node).max(axis=1), attention.reshape(-1, node).max(axis=1)
    free = np.flatnonzero(fullest + length / (nodes * node) <= room)
    if len(free) < nodes:
        return None
    picked = free[busiest[free].argsort(kind="stable")[:nodes]]
    return np.asarray((picked[:, None] * node + np.arange(node)).ravel())
