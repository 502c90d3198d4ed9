"""How are experts placed where the links between nodes are what dispatch waits for: nodes first, then their GPUs?

A network card carries what leaves its GPU's node and what enters it, and that depends on the node of every expert
only. So the large problem falls apart:

    nodes   place the experts of all layers on nodes as if each were one GPU: with the slots of its GPUs, and compute
            and network 1/GPUs as slow. Its sweeps look at swaps between 4 places rather than 32.
    GPUs    of a node: with the nodes settled, every copy has three fixed numbers, seconds of compute, of sending and
            of receiving; what remains is to pack copies such that no GPU has much of any. Layer by layer and node by
            node, swaps lower the sum of squares of the seconds above what cannot be avoided.

Replicas that a hot expert needs keep it in its node; the others go where slots are left over.
"""

from __future__ import annotations

import time

import numpy as np

from planner.placement import Bools, Floats, Indices, Problem
from planner.placementbaselines import EMPTY, packed, seated
from planner.placementbound import least_busiest
from planner.placementsweeps import Sweeps

#: An expert with more than this part of a GPU's mean share gets copies before nodes are chosen.
HOT = 0.7
#: Rounds of swaps of one layer in one node at most.
ROUNDS = 80


def nodes_first(problem: Problem, rng: np.random.Generator, deadline: float, late: float) -> Bools | None:
    """Placement layers x experts x gpus; None where nodes make no difference, or time is too short.

    deadline, late   when the search on nodes ends, and the packing into their GPUs, time.perf_counter() s
    """
    node = np.unique(problem.node_of, return_inverse=True)[1]
    size = np.bincount(node)
    if problem.joint is None or problem.traffic != "ports" or len(size) < 2 or size.max() == 1 or problem.layers < 2:
        return None
    whole = _of_nodes(problem, node, size)
    sweeps = Sweeps(whole, rng)
    sweeps.run(deadline, deadline + (late - deadline) / 2 if late < np.inf else late)
    return packed_in_nodes(problem, node, sweeps.best, late) if sweeps.any else None


def _of_nodes(problem: Problem, node: Indices, size: Indices) -> Problem:
    """The problem whose GPUs are the nodes."""
    count = len(size)
    slots = np.bincount(node, weights=np.minimum(problem.slots_of, problem.experts)).astype(int)
    wanted = (np.ceil(problem.shares * problem.gpus / HOT).clip(1, size.min()) - 1).sum(axis=1).max()
    spare = int((slots.sum() - problem.experts) // count)
    reserve = min(-(-int(min(wanted, problem.replicas)) // count), spare, int(slots.min()))
    member = np.asarray(node[:, None] == np.arange(count), dtype=np.float64) / size
    links = member.T @ problem.link_s @ member / size.mean()
    return Problem(
        problem.loads, problem.transitions, count, (slots - reserve).tolist(),
        seconds_per_token=problem.compute_s / size.mean(), seconds_per_byte=links,
    )  # fmt: skip


def packed_in_nodes(problem: Problem, node: Indices, home: Bools, deadline: float) -> Bools:
    """Copies on GPUs, layers x experts x gpus.

    node   of each GPU
    home   layers x experts x nodes: where the expert is
    """
    assert problem.joint is not None
    far = problem.link_s * (node[:, None] != node)
    count = int(node.max()) + 1
    per_node = np.array([far[:, node == k].mean(axis=1) for k in range(count)])  # nodes x gpus: seconds from a GPU
    into = np.array([far[node == k].mean(axis=0) for k in range(count)])
    least = problem.compute_s * least_busiest(problem)
    split = home.astype(np.float64)
    holds = np.zeros((problem.layers, problem.experts, problem.gpus), dtype=bool)
    for layer in range(problem.layers):
        uses = [np.repeat(problem.compute_s * problem.shares[layer][:, None], problem.gpus, axis=1)]
        if layer < problem.layers - 1:
            uses.append((problem.joint[layer] @ split[layer + 1]) @ per_node)
        if layer > 0:
            uses.append((problem.joint[layer - 1].T @ split[layer - 1]) @ into)
        at_home = np.array([np.where(home[layer][:, node], use, 0.0).max(axis=1) for use in uses])
        weight = (at_home / np.maximum(at_home.sum(axis=1, keepdims=True), 1e-300)).max(axis=0)
        copies = _copies(problem, weight, node, home[layer])
        for k in range(count):
            gpus = np.flatnonzero(node == k)
            experts = np.flatnonzero(home[layer, :, k])
            own = np.array([use[np.ix_(experts, gpus)] for use in uses])
            start = packed(problem.shares[layer, experts], copies[experts], problem.slots_of[gpus])
            floor = np.zeros(len(uses))
            floor[0] = least[layer]
            found = start if time.perf_counter() > deadline else swapped(own, start, problem.slots_of[gpus], floor)
            holds[layer][np.ix_(experts, gpus)] = found
    return holds


def _copies(problem: Problem, weight: Floats, node: Indices, home: Bools) -> Indices:
    """Copies of every expert: replicas to the most loaded copies whose node has slots left, one per GPU."""
    count = home.shape[1]
    copies = np.ones(problem.experts, dtype=np.intp)
    where = home.argmax(axis=1)
    room = np.bincount(node, weights=(problem.slots_of > 0).astype(float), minlength=count)[where]
    free = np.bincount(node, weights=np.minimum(problem.slots_of, problem.experts), minlength=count) - home.sum(axis=0)
    for _ in range(problem.replicas):
        each = np.where((copies < room) & (free[where] > 0), weight / copies, -1.0)
        expert = int(each.argmax())
        if each[expert] <= 0:
            break
        copies[expert] += 1
        free[where[expert]] -= 1
    return copies


def swapped(uses: Floats, start: Bools, slots: Indices, floor: Floats) -> Bools:
    """Swaps of two copies (or a copy and an empty slot) until none lowers the squares of what is above the caps.

    uses    resources x experts x gpus: seconds of a whole expert on a GPU
    start   experts x gpus
    slots   of the GPUs
    floor   resources: seconds of the busiest GPU that cannot be avoided; caps are no lower
    """
    gpus = len(slots)
    seats = np.repeat(np.arange(gpus), np.minimum(slots, len(start)))
    item = seated(start, seats)
    copies = start.sum(axis=1)
    real = item >= 0
    expert = np.where(real, item, 0)
    use = np.where(real, 1.0 / copies[expert], 0.0)[:, None] * uses[:, expert]  # resources x seats x gpus
    everyone = np.arange(len(seats))
    load = np.stack([use[:, seats == g, g].sum(axis=1) for g in range(gpus)], axis=1)
    cap = np.maximum(load.mean(axis=1), floor)[:, None]
    upper = np.triu(np.ones((len(seats), len(seats)), dtype=bool), 1) & (seats[:, None] != seats)
    many = bool((copies > 1).any())
    held = start.copy()
    least = 1e-6 * float((cap**2).max())
    for _ in range(ROUNDS):
        there = use[:, :, seats]
        after = there - there[:, everyone, everyone][:, None, :] + (load - cap)[:, seats][:, None, :]
        after = np.square(np.maximum(after, 0.0)).sum(axis=0)  # seat j's GPU with i instead of j
        over = np.square(np.maximum(load - cap, 0.0)).sum(axis=0)[seats]
        gain = over[:, None] + over - after - after.T
        good = (gain > least) & upper
        if many:
            has = held[np.maximum(item, 0)][:, seats] & (item >= 0)[:, None]
            good &= ~has & ~has.T
        pairs = np.flatnonzero(good)
        if not len(pairs):
            break
        pairs = pairs[np.argsort(-gain.ravel()[pairs], kind="stable")]
        busy: set[int] = set()
        for pair in pairs.tolist():
            i, j = divmod(pair, len(seats))
            g, h = int(seats[i]), int(seats[j])
            if g in busy or h in busy:
                continue
            busy.update((g, h))
            load[:, g] += use[:, j, g] - use[:, i, g]
            load[:, h] += use[:, i, h] - use[:, j, h]
            for seat, other in ((i, h), (j, g)):
                if item[seat] != EMPTY:
                    held[item[seat], seats[seat]] = False
                    held[item[seat], other] = True
            item[[i, j]] = item[[j, i]]
            use[:, [i, j]] = use[:, [j, i]]
            if len(busy) >= gpus - 1:
                break
    return held
