"""What does the objective become if experts of a layer sit elsewhere?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from planner.placementprice import dispatch_s, flows, load_s, rank_shares
from planner.placementproblem import Floats, Problem

#: Candidate changes whose flows are held in memory at once.
CHUNK = 2048


class State:
    """A placement under change: loads and flows are kept, and the effect of candidate changes is told without them.

    split    layers x experts x gpus, as in Placement; changed in place by `apply`
    ranks    layers x gpus: share of choices on each GPU
    moved    (layers - 1) x gpus x gpus: X of the module
    """

    def __init__(self, problem: Problem, split: Floats) -> None:
        """Evaluate once; the split is copied."""
        self.problem = problem
        self.split = np.array(split, dtype=np.float64)
        self.ranks = rank_shares(problem, self.split)
        self.moved = flows(problem, self.split)
        self.load_s = load_s(problem, self.ranks)
        self.traffic_s = dispatch_s(problem, self.moved)

    @property
    def objective(self) -> float:
        """Seconds per step."""
        return float(self.load_s.sum() + self.traffic_s.sum())

    def entering(self, layer: int) -> Floats:
        """gpus x experts: share of choices that reach each expert of the layer from each GPU (0 for the first)."""
        if layer == 0 or self.problem.joint is None:
            return np.zeros((self.problem.gpus, self.problem.experts))
        return np.asarray(self.split[layer - 1].T @ self.problem.joint[layer - 1])

    def leaving(self, layer: int) -> Floats:
        """experts x gpus: share of choices that go from each expert of the layer to each GPU (0 for the last)."""
        if layer == self.problem.layers - 1 or self.problem.joint is None:
            return np.zeros((self.problem.experts, self.problem.gpus))
        return np.asarray(self.problem.joint[layer] @ self.split[layer + 1])

    def change(self, layer: int, experts: ArrayLike, rows: ArrayLike) -> Floats:
        """Change of the objective if experts of a layer had other splits, for many candidates at once, in seconds.

        experts   candidates x m: different experts of a candidate
        rows      candidates x m x gpus: their new splits
        """
        e, new = np.atleast_2d(np.asarray(experts, dtype=np.intp)), np.asarray(rows, dtype=np.float64)
        found = np.empty(len(e))
        into, out = self.entering(layer), self.leaving(layer)
        before = self.load_s[layer] + self._traffic_around(layer)
        for first in range(0, len(e), CHUNK):
            part = slice(first, first + CHUNK)
            delta = new[part] - self.split[layer, e[part]]
            ranks = self.ranks[layer] + np.einsum("km,kmg->kg", self.problem.shares[layer, e[part]], delta)
            cost = load_s(self.problem, ranks)
            if layer > 0 and self.problem.joint is not None:
                moved = self.moved[layer - 1] + into[:, e[part]].transpose(1, 0, 2) @ delta
                cost = cost + dispatch_s(self.problem, moved)
            if layer < self.problem.layers - 1 and self.problem.joint is not None:
                moved = self.moved[layer] + delta.transpose(0, 2, 1) @ out[e[part]]
                cost = cost + dispatch_s(self.problem, moved)
            found[part] = cost - before
        return found

    def swap(self, layer: int, first: ArrayLike, second: ArrayLike) -> Floats:
        """Change of the objective if two experts of a layer took each other's places, for many pairs, in seconds."""
        pairs = np.stack([np.atleast_1d(first), np.atleast_1d(second)], axis=1)
        return self.change(layer, pairs, self.split[layer][pairs[:, ::-1]])

    def apply(self, layer: int, experts: ArrayLike, rows: ArrayLike) -> None:
        """Give experts of a layer new splits (m, m x gpus)."""
        e = np.asarray(experts, dtype=np.intp)
        delta = np.asarray(rows, dtype=np.float64) - self.split[layer, e]
        if self.problem.joint is not None:
            if layer > 0:
                self.moved[layer - 1] += self.entering(layer)[:, e] @ delta
                self.traffic_s[layer - 1] = dispatch_s(self.problem, self.moved[layer - 1])
            if layer < self.problem.layers - 1:
                self.moved[layer] += delta.T @ self.leaving(layer)[e]
                self.traffic_s[layer] = dispatch_s(self.problem, self.moved[layer])
        self.ranks[layer] += self.problem.shares[layer, e] @ delta
        self.load_s[layer] = load_s(self.problem, self.ranks[layer])
        self.split[layer, e] += delta

    def _traffic_around(self, layer: int) -> float:
        return float(self.traffic_s[max(layer - 1, 0) : layer + 1].sum())
