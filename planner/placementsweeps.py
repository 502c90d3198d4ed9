"""How do sweeps over the layers improve a placement, one layer at a time while its neighbours stay?

With port prices theta (the convex weights with which a busiest port is a sum over ports) the traffic around a layer is
linear, sum of T_eg over its copies, and the layer is an assignment of copies to slots with a penalty for GPUs above the
busiest GPU that is unavoidable:

    min  sum over copies c of T_c,gpu(c)  +  compute x sum over g of (load_g - cap)^+       each slot one copy.

A first pass, an assignment problem per layer under load prices, puts together what belongs together in all layers
(`planner.placementmodes`). Sweeps to and fro improve it by balanced swaps of two copies, many at once where they touch
different GPUs; prices follow the busiest ports, ever more sharply from sweep to sweep. The best placement of all sweeps
by the exact objective counts.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from planner.placement import Floats, Indices, Problem, dispatch_s, load_s
from planner.placementbaselines import EMPTY
from planner.placementbound import least_busiest
from planner.placementmodes import distances

#: Rounds of load prices in the first pass; most rounds of swaps when a layer is visited; most sweeps.
PRICE_ROUNDS, SWAP_ROUNDS, SWEEPS = 4, 60, 32
#: Sweeps with flat prices, before ports count one by one.
FLAT = 2
#: A GPU is charged for its own port above the mean port and this part of the way to the busiest.
ALLOWED = 0.1
#: Prices of ports go as exp(time / (sharpness x busiest)); sharpness falls from sweep to sweep, to the least.
SHARPNESS, COOLING, LEAST_SHARP = 0.4, 0.8, 0.02
#: Seconds charged per second of compute above its cap; above 1, so that the cap is worth keeping.
EXACT = 1.05
#: The same for ports: less than 1, as more than one is above its cap at once and only the busiest costs time.
PORT = 0.4
#: A sweep that gains less than this part of the objective gains too little.
WORTHWHILE = 2e-4
#: Sweeps in all that may gain too little before it ends.
PATIENCE = 4


def copies_of(problem: Problem) -> Indices:
    """Copies of every expert, layers x experts: each replica to the expert with the most tokens per copy."""
    shares = problem.shares
    copies = np.ones(shares.shape, dtype=np.intp)
    rows = np.arange(problem.layers)
    room = int((problem.slots_of > 0).sum())
    for _ in range(problem.replicas):
        each = np.where(copies < room, shares / copies, -1.0)
        chosen = each.argmax(axis=1)
        copies[rows, chosen] += each[rows, chosen] >= 0
    return copies


class Sweeps:
    """A placement that is improved layer by layer.

    seats     GPU of every seat (slot); the seats of a GPU are alike
    items     layers x seats: the expert of every seat, EMPTY for none
    split     layers x experts x gpus
    best      layers x experts x gpus, boolean: the best placement met, by the exact objective
    """

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self.problem = problem
        self.seats = np.repeat(np.arange(problem.gpus), np.minimum(problem.slots_of, problem.experts))
        self.copies = copies_of(problem)
        self.cap = least_busiest(problem)
        #: Shares that count in the load term, each with its part of it and the busiest GPU's share to aim at.
        self.traffics, self.importance, self.caps = [problem.shares], [1.0], self.cap[None].copy()
        self.rng = rng
        layers, experts, gpus = problem.layers, problem.experts, problem.gpus
        self.items = np.full((layers, len(self.seats)), EMPTY)
        self.split = np.zeros((layers, experts, gpus))
        self.link = np.repeat(self._flat_prices()[None], max(layers - 1, 1), axis=0)
        self.best = np.zeros((layers, experts, gpus), dtype=np.bool_)
        self.best_s = np.inf

    @property
    def any(self) -> bool:
        """Whether a placement of all layers was met."""
        return self.best_s < np.inf

    def run(self, deadline: float, late: float | None = None) -> None:
        """First pass, then sweeps, until they gain too little or time is up; past `late` also the first pass ends."""
        problem = self.problem
        _, group = np.unique(problem.node_of, return_inverse=True)
        if group.max() == 0:
            group = np.arange(problem.gpus)
        moving = problem.joint is not None and problem.layers > 1 and problem.gpus > 1
        if moving:
            apart = distances(problem, int(group.max()) + 1, self.rng, deadline=deadline)
            apart *= float(self.link.mean())  # seconds, so that load prices are of a size with it
        for layer in range(problem.layers):
            if time.perf_counter() > (deadline if late is None else late):
                return
            aim = apart[layer][:, group] * problem.shares[layer][:, None] if moving else self.pull(layer)
            self.first(layer, aim)
        self._keep()
        last, idle = self.best_s, 0
        for sweep in range(SWEEPS):
            order = range(problem.layers)
            for layer in reversed(order) if sweep % 2 == 0 else order:
                if time.perf_counter() > deadline:
                    break
                self.improve(layer, self.pull(layer), ports=sweep >= FLAT)
                if sweep >= FLAT:
                    self._reprice(layer, max(LEAST_SHARP, SHARPNESS * COOLING ** (sweep - FLAT)))
            self._keep()
            if time.perf_counter() > deadline:
                break
            if sweep >= FLAT + 2 or not moving:
                if last - self.best_s < WORTHWHILE * last:
                    idle += 1
                last = self.best_s
                if idle >= (PATIENCE if moving else 1):
                    break

    def pull(self, layer: int) -> Floats:
        """T of the module, experts x gpus, s."""
        problem = self.problem
        pull = np.zeros((problem.experts, problem.gpus))
        if problem.joint is None:
            return pull
        if layer > 0:
            pull += (problem.joint[layer - 1].T @ self.split[layer - 1]) @ self.link[layer - 1]
        if layer < problem.layers - 1:
            pull += (problem.joint[layer] @ self.split[layer + 1]) @ self.link[layer].T
        return pull

    def first(self, layer: int, pull: Floats) -> None:
        """Experts of a layer onto empty seats, given the layer before: replicas one by one, then the others at once."""
        problem = self.problem
        copies = self.copies[layer]
        weights = problem.shares[layer] / copies
        items = np.full(len(self.seats), EMPTY)
        loads = np.zeros(problem.gpus)
        free = np.bincount(self.seats, minlength=problem.gpus)
        taken: list[tuple[int, int]] = []
        for expert in sorted(np.flatnonzero(copies > 1).tolist(), key=lambda e: -weights[e]):
            cost = pull[expert] / copies[expert] + problem.compute_s * (
                np.maximum(loads + weights[expert] - self.cap[layer], 0.0) + 0.1 * loads
            )
            cost[free == 0] = np.inf
            for gpu in np.argsort(cost, kind="stable")[: copies[expert]].tolist():
                taken.append((expert, gpu))
                loads[gpu] += weights[expert]
                free[gpu] -= 1
        for expert, gpu in taken:
            seat = np.flatnonzero((self.seats == gpu) & (items == EMPTY))[0]
            items[seat] = expert
        single = np.flatnonzero(copies == 1)
        seats = np.flatnonzero(items == EMPTY)
        where = self.seats[seats]
        price = np.zeros(problem.gpus)
        step = 0.3 * float(np.median((pull.max(axis=1) - pull.min(axis=1))[single] / weights[single].clip(1e-12)))
        step = step or problem.compute_s
        best = np.inf
        for _ in range(PRICE_ROUNDS):
            cost = (pull[single] + price * weights[single, None])[:, where]
            _, columns = linear_sum_assignment(cost)
            ranks = loads + np.bincount(where[columns], weights=weights[single], minlength=problem.gpus)
            over = np.maximum(ranks - self.cap[layer], 0.0)
            value = pull[single, where[columns]].sum() + problem.compute_s * over.sum()
            if value < best:
                best, chosen = value, columns
            price += step * (ranks * problem.gpus - 1.0)
            price = np.maximum(price, 0.0)
        items[seats[chosen]] = single
        self.items[layer] = items
        self._resplit(layer)
        self.improve(layer, pull)

    def improve(self, layer: int, pull: Floats, *, ports: bool = False) -> None:
        """Balanced swaps of one layer until none helps."""
        problem, items, seats = self.problem, self.items[layer], self.seats
        copies = self.copies[layer]
        real = items >= 0
        expert = np.where(real, items, 0)
        part = np.where(real, 1.0 / copies[expert], 0.0)
        cost = part[:, None] * pull[expert]
        kinds = len(self.traffics)
        own = [
            np.repeat(problem.compute_s * weight * traffic[layer][:, None], problem.gpus, axis=1)
            for weight, traffic in zip(self.importance, self.traffics, strict=True)
        ]
        own += self._ports(layer) if ports else []
        uses = np.array([part[:, None] * use[expert] for use in own])  # resources x seats x gpus
        everyone = np.arange(len(seats))
        full = np.zeros((len(uses), problem.gpus))
        for gpu in range(problem.gpus):
            full[:, gpu] = uses[:, seats == gpu, gpu].sum(axis=1)
        slack = full[kinds:].max(axis=1) - full[kinds:].mean(axis=1)
        cap = np.append(
            problem.compute_s * np.asarray(self.importance) * self.caps[:, layer],
            full[kinds:].mean(axis=1) + ALLOWED * slack,
        )
        charge = [EXACT] * kinds + [PORT] * (len(uses) - kinds)
        many = bool((copies > 1).any())
        item = items.copy()
        held = self.split[layer] > 0
        upper = np.triu(np.ones((len(seats), len(seats)), dtype=bool), 1) & (seats[:, None] != seats)
        least = 1e-6 * problem.compute_s / problem.gpus / len(seats)
        for _ in range(SWAP_ROUNDS):
            here = cost[:, seats]
            mine = here[everyone, everyone]
            gain = mine[:, None] + mine - here - here.T
            for use, load, limit, worth in zip(uses, full, cap, charge, strict=True):
                there = use[:, seats]  # i at j's GPU
                room = (load - limit)[seats]
                after = there - there[everyone, everyone] + room  # overload of j's GPU with i instead of j
                np.maximum(after, 0.0, out=after)
                over = np.maximum(room, 0.0)
                gain -= worth * (after + after.T - over - over[:, None])
            good = (gain > least) & upper
            if many:
                has = held[np.maximum(item, 0)][:, seats] & (item >= 0)[:, None]  # seat j's GPU holds i's expert
                good &= ~has & ~has.T
            pairs = np.flatnonzero(good)
            if not len(pairs):
                break
            values = gain.ravel()[pairs]
            if len(pairs) > 2000:
                top = np.argpartition(-values, 2000)[:2000]
                pairs, values = pairs[top], values[top]
            pairs = pairs[np.argsort(-values, kind="stable")]
            busy: set[int] = set()
            for pair in pairs.tolist():
                i, j = divmod(pair, len(seats))
                g, h = int(seats[i]), int(seats[j])
                if g in busy or h in busy:
                    continue
                busy.update((g, h))
                full[:, g] += uses[:, j, g] - uses[:, i, g]
                full[:, h] += uses[:, i, h] - uses[:, j, h]
                for seat, other in ((i, h), (j, g)):
                    if item[seat] >= 0:
                        held[item[seat], seats[seat]] = False
                        held[item[seat], other] = True
                item[[i, j]] = item[[j, i]]
                cost[[i, j]] = cost[[j, i]]
                uses[:, [i, j]] = uses[:, [j, i]]
                if len(busy) >= problem.gpus - 1:
                    break
        self.items[layer] = item
        self._resplit(layer)

    def _ports(self, layer: int) -> list[Floats]:
        """Seconds of a GPU's own ports for each expert on it, experts x gpus: sending to the next layer, receiving."""
        problem = self.problem
        if problem.joint is None or problem.traffic != "ports":
            return []
        near = problem.node_of[:, None] == problem.node_of
        kind = near if (problem.link_s * ~near).max() == 0 else ~near
        out = []
        if layer < problem.layers - 1 and self.split[layer + 1].any():
            out.append((problem.joint[layer] @ self.split[layer + 1]) @ (problem.link_s * kind).T)
        if layer > 0 and self.split[layer - 1].any():
            out.append((problem.joint[layer - 1].T @ self.split[layer - 1]) @ (problem.link_s * kind))
        return out

    def _resplit(self, layer: int) -> None:
        items, real = self.items[layer], self.items[layer] >= 0
        self.split[layer] = 0.0
        self.split[layer, items[real], self.seats[real]] = 1.0 / self.copies[layer, items[real]]

    def moved(self, pair: int) -> Floats:
        """X of a pair of layers, gpus x gpus."""
        joint: Any = self.problem.joint
        return np.asarray(self.split[pair].T @ joint[pair] @ self.split[pair + 1])

    def _keep(self) -> None:
        """Remember the placement if it is the best so far."""
        problem = self.problem
        load = load_s(problem, np.einsum("le,leg->lg", problem.shares, self.split)).sum()
        traffic = 0.0
        if problem.joint is not None:
            traffic = sum(float(dispatch_s(problem, self.moved(pair))) for pair in range(problem.layers - 1))
        if load + traffic < self.best_s:
            self.best_s = float(load + traffic)
            self.best = self.split > 0

    def _flat_prices(self) -> Floats:
        """Seconds per share moved between two GPUs when every port of the slower kind is as busy as the others."""
        return priced_links(self.problem, np.ones((self.problem.gpus, self.problem.gpus)), 0.05)

    def _reprice(self, layer: int, sharpness: float) -> None:
        if self.problem.joint is None or self.problem.traffic == "total":
            return
        for pair in (layer - 1, layer):
            if 0 <= pair < self.problem.layers - 1:
                self.link[pair] = priced_links(self.problem, self.moved(pair), sharpness)


def priced_links(problem: Problem, moved: Floats, sharpness: float) -> Floats:
    """Slope of a smoothed busiest port (or pair) in each flow, gpus x gpus, s; its weights sum to 1.

    Weights go as exp(time / (SHARPNESS x busiest time)): all but even among ports as busy as each other.
    """
    links = problem.link_s
    if problem.traffic == "total" or not (moved * links).any():
        return np.asarray(links / problem.gpus)
    if problem.traffic == "pairs":
        time_s = moved * links
        weight = np.exp((time_s - time_s.max()) / (sharpness * time_s.max()))
        return np.asarray(weight / weight.sum() * links)
    near = problem.node_of[:, None] == problem.node_of
    ports = [links * near, links * ~near]
    times = np.array([way for cost in ports for way in ((moved * cost).sum(axis=1), (moved * cost).sum(axis=0))])
    weight = np.exp((times - times.max()) / (sharpness * times.max()))
    weight /= weight.sum()
    out = np.zeros_like(links)
    for kind, cost in enumerate(ports):
        out += cost * (weight[2 * kind][:, None] + weight[2 * kind + 1])
    return out
