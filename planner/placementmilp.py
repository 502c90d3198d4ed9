"""What is the best placement of few experts in few layers, by one mixed-integer linear program?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import comb, inf
from time import perf_counter
from typing import Any

import numpy as np
import pulp

from planner.placement import Bools, Placement, Problem, placement_of
from planner.placementbaselines import contiguous, eplb, greedy
from planner.placementstates import renamings

#: HiGHS's relative tolerances; its bound is lowered by as much.
TOLERANCE = 1e-6


def milp(problem: Problem, *, seconds: float = 60.0) -> Placement:
    """The optimum by one mixed-integer linear program, for few layers and experts.

        minimise   sum of t_l + sum of u_l
        t_l       >= sum over e of w_le y_leg                                     load of every GPU
        u_l       >= the ports, pairs or total of the flows sum over e, f of joint_lef z_lefgh
        sum over h of z_lefgh = y_leg       sum over g of z_lefgh = y_(l+1)fh     z >= 0
        sum over e of x_leg <= slots_g      sum over g of x_leg >= 1      sum of x_l <= experts + replicas

    x is binary and tells where copies are. Without replicas y = x, and z is the product of the y. With replicas y is 0
    without a copy and at most 1 ("balanced") or 1/n of an expert with n copies ("even"); where both of a pair's experts
    have copies z may undercut the product, so that the bound stays valid but a gap can remain. Without transitions
    layers are programs of their own, each with its part of the time that is left. Where a program finds nothing in
    time, or is not even written down, and where a baseline is better, the best of them is taken.
    """
    start = perf_counter()
    apart = problem.joint is None or problem.gpus == 1
    parts = [problem]
    if apart:
        parts = [replace(problem, loads=row[None], transitions=None) for row in problem.loads]
    holds, bound, stopped = [], 0.0, False
    for done, part in enumerate(parts):
        left = start + seconds - perf_counter()
        program = _Program(part, perf_counter() + left / (len(parts) - done))
        found, low = program.solve()
        ways = [contiguous(part), greedy(part), eplb(part)]
        if found is not None:
            ways.append(placement_of(part, found, "milp", 0.0))
        best = min(ways, key=lambda placement: placement.objective)
        holds.append(best.holds)
        bound += min(max(low, best.bound), best.objective)
        stopped |= program.stopped
    return placement_of(
        problem, np.concatenate(holds), "milp", perf_counter() - start,
        bound=bound, load_bound=bound if apart else None, stopped=stopped,
    )  # fmt: skip


class _Program:
    """The program of `milp`, in units of the load and traffic of one even layer."""

    def __init__(self, problem: Problem, deadline: float) -> None:
        """Build it; past `deadline` (perf_counter seconds) it stays incomplete and is not solved."""
        self.problem = problem
        self.deadline = deadline
        self.unit = problem.compute_s / problem.gpus + float(problem.link_s.max()) or 1.0
        self.lp = pulp.LpProblem("placement", pulp.LpMinimize)
        self.x: dict[tuple[int, int, int], Any] = {}
        self.y: dict[tuple[int, int, int], Any] = {}
        self.costs: list[Any] = []
        #: Whether time ended the search.
        self.stopped = True
        for layer in range(problem.layers):
            if self.late:
                return
            self._layer(layer)
            if problem.replicas:
                self._copies(layer)
        if problem.joint is not None and problem.gpus > 1:
            for layer in range(problem.layers - 1):
                self._traffic(layer)
        if len(list(renamings(problem))) >= comb(problem.gpus, 2):
            self.lp += self.x[0, 0, 0] == 1  # all GPUs are alike
        self.lp += pulp.lpSum(self.costs)

    @property
    def late(self) -> bool:
        """Whether time is up."""
        return perf_counter() > self.deadline

    def _layer(self, layer: int) -> None:
        """Copies within slots, and the busiest GPU."""
        problem, add = self.problem, self.lp.add_variable
        experts, gpus = range(problem.experts), range(problem.gpus)
        for e in experts:
            for g in gpus:
                x = self.x[layer, e, g] = add(f"x_{layer}_{e}_{g}", cat=pulp.LpBinary)
                self.y[layer, e, g] = add(f"y_{layer}_{e}_{g}", lowBound=0.0) if problem.replicas else x
            self.lp += pulp.lpSum(self.y[layer, e, g] for g in gpus) == 1
        busiest = self._cost(f"t_{layer}")
        for g in gpus:
            self.lp += pulp.lpSum(self.x[layer, e, g] for e in experts) <= int(problem.slots_of[g])
            weights = problem.compute_s / self.unit * problem.shares[layer]
            self.lp += _total((float(weights[e]), self.y[layer, e, g]) for e in experts) <= busiest

    def _copies(self, layer: int) -> None:
        """Tokens only where copies are, and evenly over them if so asked."""
        problem = self.problem
        gpus = range(problem.gpus)
        most = min(problem.replicas + 1, problem.gpus)
        every = pulp.lpSum(self.x[layer, e, g] for e in range(problem.experts) for g in gpus)
        self.lp += every <= problem.experts + problem.replicas
        for e in range(problem.experts):
            if problem.split == "balanced":
                for g in gpus:
                    self.lp += self.y[layer, e, g] <= self.x[layer, e, g]
                continue
            counts = range(1, most + 1)
            n = {k: self.lp.add_variable(f"n_{layer}_{e}_{k}", cat=pulp.LpBinary) for k in counts}
            self.lp += pulp.lpSum(n.values()) == 1
            self.lp += pulp.lpSum(self.x[layer, e, g] for g in gpus) == _total((float(k), n[k]) for k in counts)
            for g in gpus:
                part = {k: self.lp.add_variable(f"p_{layer}_{e}_{g}_{k}", lowBound=0.0) for k in counts}
                self.lp += pulp.lpSum(part.values()) == self.x[layer, e, g]
                self.lp += _total((1.0 / k, part[k]) for k in counts) == self.y[layer, e, g]
                for k in counts:
                    self.lp += part[k] <= n[k]

    def _traffic(self, layer: int) -> None:
        """Flows of every pair of experts between every pair of GPUs, and the dispatch they take."""
        problem = self.problem
        assert problem.joint is not None
        gpus = range(problem.gpus)
        moved: dict[tuple[int, int], list[tuple[float, Any]]] = {(g, h): [] for g in gpus for h in gpus if g != h}
        for e, f in np.argwhere(problem.joint[layer] > 0).tolist():
            if self.late:
                return
            z = {(g, h): self.lp.add_variable(f"z_{layer}_{e}_{f}_{g}_{h}", lowBound=0.0) for g in gpus for h in gpus}
            for g in gpus:
                self.lp += pulp.lpSum(z[g, h] for h in gpus) == self.y[layer, e, g]
                self.lp += pulp.lpSum(z[h, g] for h in gpus) == self.y[layer + 1, f, g]
            for (g, h), parts in moved.items():
                seconds = float(problem.joint[layer, e, f] * problem.link_s[g, h]) / self.unit
                if seconds > 0:
                    parts.append((seconds, z[g, h]))
        cost = self._cost(f"u_{layer}")
        for pairs, scale in _queues(problem):
            self.lp += _total((scale * a, z) for pair in pairs for a, z in moved[pair]) <= cost

    def _cost(self, name: str) -> Any:
        cost = self.lp.add_variable(name, lowBound=0.0)
        self.costs.append(cost)
        return cost

    def solve(self) -> tuple[Bools | None, float]:
        """Where copies are (None if none were found), and the bound in seconds."""
        problem = self.problem
        left = self.deadline - perf_counter()
        if left <= 0:
            return None, 0.0
        solver = pulp.HiGHS(msg=False, gapRel=TOLERANCE / 10, timeLimit=left)
        solver.callSolver = self._run
        status = self.lp.solve(solver)
        self.stopped = self.late
        bound = float(self.lp.solverModel.getInfo().mip_dual_bound) * (1.0 - TOLERANCE) * self.unit
        bound = bound if -inf < bound < inf else 0.0
        if pulp.LpStatus[status] != "Optimal":
            return None, bound
        holds = np.zeros((problem.layers, problem.experts, problem.gpus), dtype=bool)
        for place, x in self.x.items():
            holds[place] = x.value() > 0.5
        return holds, bound

    def _run(self, lp: Any) -> None:
        """HiGHS, with the time that handing over the program has left."""
        lp.solverModel.setOptionValue("time_limit", max(self.deadline - perf_counter(), 0.0))
        lp.solverModel.run()


def _queues(problem: Problem) -> list[tuple[list[tuple[int, int]], float]]:
    """Pairs of GPUs whose traffic waits for each other, and by what their seconds are multiplied."""
    gpus = range(problem.gpus)
    pairs = [(g, h) for g in gpus for h in gpus if g != h]
    if problem.traffic == "pairs":
        return [([pair], 1.0) for pair in pairs]
    if problem.traffic == "total":
        return [(pairs, 1.0 / problem.gpus)]
    node_of = problem.node_of
    found = []
    for g in gpus:
        for near in (True, False):
            others = [h for h in gpus if h != g and (node_of[g] == node_of[h]) == near]
            if others:
                found += [([(g, h) for h in others], 1.0), ([(h, g) for h in others], 1.0)]
    return found


def _total(parts: Iterable[tuple[float, Any]]) -> Any:
    """Sum of coefficient times variable."""
    return pulp.LpAffineExpression([(variable, a) for a, variable in parts])
