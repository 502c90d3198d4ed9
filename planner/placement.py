"""On which GPUs should the experts of every layer sit, and how far is that from the best there is?

A `Problem` (planner.placementproblem) tells experts, GPUs and costs; a placement is judged by its seconds per step
(planner.placementprice): compute of the busiest GPU of every layer plus dispatch between neighbouring layers. Every
solver returns a `Placement` whose `bound` no placement of the problem undercuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import ArrayLike

from planner.errors import PlanError
from planner.placementprice import (
    Cost,
    all_traffic,
    dispatch_s,
    flows,
    holds_of,
    load_s,
    objective_of,
    rank_shares,
    split_of,
)
from planner.placementproblem import Bools, Floats, Indices, Problem, Split, Traffic
from planner.placementstate import State

__all__ = [
    "Bools", "Cost", "Floats", "Indices", "Placement", "Problem", "Split", "State", "Traffic", "dispatch_s", "flows",
    "holds_of", "load_s", "objective_of", "placement_of", "rank_shares", "simple_bound", "solve", "split_of",
]  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Experts on GPUs, what that costs and what any placement costs at least.

    holds          layers x experts x gpus: whether the GPU holds a copy of the expert
    split          same shape: share of the expert's tokens that each copy takes
    objective      load_term + traffic_term, s per step
    bound          seconds that no placement of the problem undercuts
    load_bound     the same for the load term alone
    stopped        whether the time limit ended the search or the proof
    """

    holds: Bools
    split: Floats
    objective: float
    load_term: float
    traffic_term: float
    bound: float
    load_bound: float
    solver: str
    wall_s: float
    stopped: bool = False

    @property
    def gap(self) -> float:
        """How much of the objective is not proven to be needed, in [0, 1]."""
        return _gap(self.objective, self.bound)

    @property
    def load_gap(self) -> float:
        """The same for the load term."""
        return _gap(self.load_term, self.load_bound)

    @property
    def assignment(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """For every layer and expert the GPUs that hold it, in ascending order."""
        return tuple(tuple(tuple(int(g) for g in np.flatnonzero(row)) for row in layer) for layer in self.holds)


def solve(
    problem: Problem, *, solver: str = "exact", seconds: float = 60.0, seed: int = 0, groups: int = 1
) -> Placement:
    """Place the experts with one of the solvers.

    solver    exact, milp, tuner, large, contiguous, random, greedy, eplb
    seconds   wall-clock limit; the best placement found by then comes back with its gap
    seed      of the solvers that draw: random, large
    groups    groups of consecutive experts that eplb keeps in one node (DeepSeek-V3: 8)

    Raises PlanError for a solver that is not known, and for a problem beyond the size that `exact` enumerates.
    """
    if not seconds > 0:
        raise PlanError(f"a limit of {seconds} s; expected a positive time")
    from planner import placementbaselines as baselines

    if solver in ("exact", "milp"):
        from planner import placementexact, placementmilp

        return (placementexact.exact if solver == "exact" else placementmilp.milp)(problem, seconds=seconds)
    if solver == "tuner":
        from planner import placementtuner

        return placementtuner.tuner(problem, seconds=seconds)
    if solver == "large":
        from planner import placementlarge

        return placementlarge.large(problem, seconds=seconds, seed=seed)
    if solver == "random":
        return baselines.random(problem, seed=seed)
    if solver == "eplb":
        return baselines.eplb(problem, groups=groups)
    if solver not in ("contiguous", "greedy"):
        raise PlanError(f"solver {solver!r}; expected exact, milp, tuner, large, contiguous, random, greedy or eplb")
    return (baselines.contiguous if solver == "contiguous" else baselines.greedy)(problem)


def placement_of(
    problem: Problem,
    assignment: ArrayLike,
    solver: str,
    wall_s: float,
    *,
    bound: float | None = None,
    load_bound: float | None = None,
    stopped: bool = False,
) -> Placement:
    """The assignment with its costs, its bound no worse than `simple_bound` and no higher than what was reached."""
    holds = holds_of(problem, assignment)
    split = split_of(problem, holds)
    load = float(load_s(problem, rank_shares(problem, split)).sum())
    traffic = all_traffic(problem, split)
    simple = simple_bound(problem)
    load_bound = max(simple.load_term, load_bound or 0.0)
    bound = max(simple.objective, load_bound + simple.traffic_term, bound or 0.0)
    return Placement(
        holds, split, load + traffic, load, traffic, min(bound, load + traffic), min(load_bound, load), solver, wall_s,
        stopped,
    )  # fmt: skip


def simple_bound(problem: Problem) -> Cost:
    """What every placement costs at least, from closed forms.

    load      the busiest GPU has at least the mean; with r replicas some copy has at least the max over experts of
              w / n with the best copies n (sum n = experts + r; one more for the largest w / n, r times); without
              replicas two GPUs' worth of experts collide: among the k G + 1 most loaded some GPU has k + 1, which weigh
              at least as the last k + 1 of them
    traffic   a choice stays on its GPU only if the next expert is among the slots' worth of experts there, so that at
              most the sum over e of its heaviest `slots` transitions stays (and the same seen from f); the rest moves,
              at best over all ports or pairs at once
    """
    most = problem.shares.max(axis=1)
    if problem.replicas:
        copies = np.ones_like(problem.shares)
        rows = np.arange(problem.layers)
        for _ in range(problem.replicas):
            each = np.where(copies < problem.gpus, problem.shares / copies, 0.0)
            copies[rows, each.argmax(axis=1)] += 1
        most = (problem.shares / copies).max(axis=1)
    else:
        ranked = -np.sort(-problem.shares, axis=1)
        for k in range(1, (problem.experts - 1) // problem.gpus + 1):
            last = k * problem.gpus + 1
            most = np.maximum(most, ranked[:, last - k - 1 : last].sum(axis=1))
    load = problem.compute_s * float(np.maximum(most, 1.0 / problem.gpus).sum())
    if problem.joint is None or problem.gpus == 1:
        return Cost(load, 0.0)
    slots = min(int(problem.slots_of.max()), problem.experts)
    total = problem.joint.sum(axis=(1, 2))
    stays = [
        np.partition(ways, -slots, axis=2)[:, :, -slots:].sum(axis=(1, 2))
        for ways in (problem.joint, problem.joint.transpose(0, 2, 1))
    ]
    moves = np.maximum(total - np.minimum(*stays), 0.0)
    return Cost(load, float(moves.sum() / _capacity_per_s(problem)))


def _capacity_per_s(problem: Problem) -> float:
    """Most choices' shares that can move per second of dispatch when every port or pair is busy."""
    links, apart = problem.link_s, ~np.eye(problem.gpus, dtype=bool)
    if not links[apart].all():
        return inf
    if problem.traffic == "pairs":
        return float((1.0 / links[apart]).sum())
    if problem.traffic == "total":
        return float(problem.gpus / links[apart].min())
    near = problem.node_of[:, None] == problem.node_of
    fastest = [np.where(ports & apart, links, inf).min(axis=1) for ports in (near, ~near)]
    return float(sum((1.0 / s).sum() for s in fastest))


def _gap(value: float, bound: float) -> float:
    return 0.0 if value <= 0 else max(0.0, (value - bound) / value)
