"""How are the experts of a large model placed in a minute, with a bound that says how good the result is?

Where nodes are told apart, experts go to nodes first and then to the GPUs of their node (`planner.placementnodes`);
elsewhere, and where links within a node are not much faster, sweeps over the layers look at all GPUs at once
(`planner.placementsweeps`). Swaps valued by the exact ports finish the better of the two (`planner.placementpolish`).
A baseline counts where it is better. Meanwhile another thread works out the bound (`planner.placementbound`).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from planner.placement import Bools, Placement, Problem, objective_of, placement_of
from planner.placementbaselines import eplb, greedy
from planner.placementbound import certify
from planner.placementnodes import nodes_first
from planner.placementpolish import polished
from planner.placementsweeps import Sweeps

#: Links within nodes that are so many times faster than those between never keep dispatch waiting.
FASTER = 4.0
#: Parts of the time after which the start, the swaps and the bound end.
START, POLISH, BOUND = 0.6, 0.9, 0.8


def large(problem: Problem, *, seconds: float = 60.0, seed: int = 0) -> Placement:
    """Place with a certified bound; past `seconds` the best placement found by then with its gap."""
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as other:
        bound = other.submit(certify, problem, deadline=start + BOUND * seconds)
        found = [way(problem).holds for way in (greedy, eplb)]
        if time.perf_counter() < start + START * seconds:
            found += _starts(problem, np.random.default_rng(seed), start + START * seconds)
        best = min(found, key=lambda holds: objective_of(problem, holds).objective)
        if problem.traffic == "ports" and problem.joint is not None and problem.gpus > 1:
            best = polished(problem, best, start + POLISH * seconds)
        certain = bound.result()
    return placement_of(
        problem, best, "large", time.perf_counter() - start,
        bound=certain.objective_s, load_bound=float(certain.load_s.sum()),
    )  # fmt: skip


def _starts(problem: Problem, rng: np.random.Generator, deadline: float) -> list[Bools]:
    """Placements by nodes, and by sweeps over all GPUs where those are not enough."""
    by_nodes = nodes_first(problem, rng, deadline)
    near = problem.node_of[:, None] == problem.node_of
    if by_nodes is not None and problem.link_s[near].max() * FASTER <= problem.link_s[~near].min():
        return [by_nodes]
    sweeps = Sweeps(problem, rng)
    sweeps.run(deadline)
    return [sweeps.best] if by_nodes is None else [by_nodes, sweeps.best]
