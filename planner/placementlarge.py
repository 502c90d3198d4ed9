"""How are the experts of a large model placed in a minute, with a bound that says how good the result is?

Where nodes are told apart, experts go to nodes first and then to the GPUs of their node (`planner.placementnodes`);
elsewhere, and where links within a node are not much faster, sweeps over the layers look at all GPUs at once
(`planner.placementsweeps`). Swaps valued by the exact ports finish the better of the two (`planner.placementpolish`).
A baseline counts where it is better. Meanwhile another thread works out the bound (`planner.placementbound`), which
waits for the start: on a busy machine the placement comes first. Every phase has its part of the time, so that one that
gets little of the machine leaves the later ones theirs. Without transitions layers are apart, each placed as by the
method that is best for it.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from planner.placement import Bools, Placement, Problem, objective_of, placement_of, rank_shares, split_of
from planner.placementbaselines import contiguous, eplb, greedy
from planner.placementbound import Bound, certify
from planner.placementnodes import nodes_first
from planner.placementpolish import polished
from planner.placementsweeps import Sweeps

#: Links within nodes that are so many times faster than those between never keep dispatch waiting.
FASTER = 4.0
#: Parts of the time after which the first sweeps, packing into nodes, and both the swaps and the bound end.
START, PACK, END = 0.5, 0.7, 0.95


def large(problem: Problem, *, seconds: float = 60.0, seed: int = 0) -> Placement:
    """Place with a certified bound; past `seconds` the best placement found by then with its gap."""
    start = time.perf_counter()
    begin, pack, end = (start + part * seconds for part in (START, PACK, END))
    moving = problem.joint is not None and problem.gpus > 1
    found = [way(problem).holds for way in (contiguous, greedy, eplb)]
    rng = np.random.default_rng(seed)
    if not moving:
        found.append(_layer_by_layer(problem, found, rng, end))
        stopped = time.perf_counter() > end
    else:
        if time.perf_counter() < begin:
            found += _starts(problem, rng, begin, pack)
        stopped = time.perf_counter() > begin
    with ThreadPoolExecutor(1) as other:
        bound = other.submit(_certified, problem, end)
        best = min(found, key=lambda holds: objective_of(problem, holds).objective)
        if problem.traffic == "ports" and moving:
            best = polished(problem, best, end)
            stopped |= time.perf_counter() > end
        certain, late = bound.result()
    return placement_of(
        problem, best, "large", time.perf_counter() - start,
        bound=certain.objective_s, load_bound=float(certain.load_s.sum()),
        stopped=stopped or (late and moving),
    )  # fmt: skip


def _certified(problem: Problem, deadline: float) -> tuple[Bound, bool]:
    """The bound, and whether time ended its improvement."""
    found = certify(problem, deadline=deadline)
    return found, time.perf_counter() > deadline


def _layer_by_layer(problem: Problem, others: list[Bools], rng: np.random.Generator, deadline: float) -> Bools:
    """Of sweeps and other placements the least busy one for each layer, where nothing moves between layers."""
    sweeps = Sweeps(problem, rng)
    sweeps.run(deadline)
    swept = np.where(sweeps.split.any(axis=(1, 2), keepdims=True), sweeps.split > 0, others[0])
    every = np.stack([swept, *others])
    load = np.stack([rank_shares(problem, split_of(problem, holds)).max(axis=1) for holds in every])
    return np.asarray(every[load.argmin(axis=0), np.arange(problem.layers)])


def _starts(problem: Problem, rng: np.random.Generator, begin: float, pack: float) -> list[Bools]:
    """Placements by nodes, and by sweeps over all GPUs where those are not enough; none where time is too short.

    begin, pack   when sweeps end, and swaps within the nodes
    """
    by_nodes = nodes_first(problem, rng, begin, pack)
    near = problem.node_of[:, None] == problem.node_of
    if by_nodes is not None and problem.link_s[near].max() * FASTER <= problem.link_s[~near].min():
        return [by_nodes]
    sweeps = Sweeps(problem, rng)
    if time.perf_counter() < begin:
        sweeps.run(begin, pack)
    return [found for found in (by_nodes, sweeps.best if sweeps.any else None) if found is not None]
