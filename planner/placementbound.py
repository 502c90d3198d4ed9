"""What does every placement of a large problem cost at least, and how is that proven?

Shares of a layer's choices: M_l is the busiest GPU's, Y_l (experts x groups) the split over GPUs or over nodes, and
stay_l = sum over e, f of F_ef (Y_l Y_(l+1)^T)_ef the part of the choices that stays in its group between l and l + 1,
where F = w_le p_lef. A traffic term is at least a convex combination of its ports or pairs, so that with n, f the
seconds per share that moves within a node and between nodes (n <= f)

    traffic_l >= f total - (f - n) stay_node - n stay_gpu.

Two upper bounds on stay, both linear in M (sqrt(x y) <= (x t + y / t) / 2) and valid for replicas with any split; with
`planner.placementports` for the port of the hottest expert they are the cuts of the program below.

    transport   X = Y_l Y_(l+1)^T has 0 <= X <= 1, rows and columns that sum to at most the group's slots C, and
                sum_f q_f X_ef <= k M_(l+1), sum_e p_e X_ef <= k M_l for k GPUs a group. For any u, v, a, b >= 0
                stay <= sum_ef (F_ef - u_e - v_f - a_e p_e q_f - b_f q_f p_e)^+ + C (sum u + sum v)
                        + k M_(l+1) sum_e a_e p_e + k M_l sum_f b_f q_f    (weak duality; Adam chooses them)
    spectrum    for P, Q = diag of the shares, sigma_1 >= .. the singular values of P^-1/2 F Q^-1/2, and K groups
                stay <= tau + k sqrt(M_l M_(l+1)) sum_(i <= K) (sigma_i - tau)^+      for any tau >= 0
                as P^1/2 Y has squared singular values of at most k M that sum to at most 1 (von Neumann's trace bound)

The bound of the whole is the least of sum_l compute M_l + sum_l traffic_l over all M_l that the layers' loads allow: a
linear program of one variable per layer and per pair, told from its dual multipliers so that no tolerance enters.

How loose it is, at 58 x 256 on 4 nodes of 8 (tests/benchmarks/placement.py) with half of the choices coupled from layer
to layer: with 32 replicas the search on nodes alone, their GPUs taken as perfectly even, ends 1.8 to 2.1 % above the
bound and the placement on GPUs 2.3 to 3.2 %; so most of what is open is coupled experts that a node's load and slots
keep apart, which the bound lets stay, and the rest is packing. Without replicas 4.1 to 4.6 % are open; how much of that
the hottest expert's GPU forces, with more than those neighbours that send least, is not proven either way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from planner.placement import Floats, Problem
from planner.placementports import hottest_port, neighbours

#: What rounding may add: bounds are lowered by this part.
ROUNDING = 1e-9
#: Steps of the multipliers of the transport bound, and how many pairs of layers step together.
STEPS, PAIRS = 240, 8


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds per step that no placement undercuts.

    load_s         layers: the load term of each layer alone
    traffic_s      (layers - 1): the traffic term of each pair, where the load terms are at their bound
    objective_s    load and traffic together
    """

    load_s: Floats
    traffic_s: Floats
    objective_s: float


@dataclass(frozen=True, slots=True)
class Stay:
    """Upper bound of the part that stays in its group: rest + here M_l + there M_(l+1), for every pair of layers."""

    rest: Floats
    here: Floats
    there: Floats

    def at(self, busiest: Floats) -> Floats:
        """For given shares of the busiest GPUs (layers)."""
        return np.asarray(self.rest + self.here * busiest[:-1] + self.there * busiest[1:])


def certify(problem: Problem, *, deadline: float = inf) -> Bound:
    """The bound of a problem; past `deadline` (time.perf_counter seconds) it stops improving, and stays valid."""
    least = least_busiest(problem)
    load = problem.compute_s * least * (1 - ROUNDING)
    pairs = problem.layers - 1
    if problem.joint is None or problem.gpus == 1 or not pairs or not problem.link_s.any():
        return Bound(load, np.zeros(max(pairs, 0)), float(load.sum()))
    rates = _rates(problem)
    gpus, nodes = np.arange(problem.gpus), problem.node_of
    apart = len(set(nodes.tolist())) > 1
    slots = min(int(problem.slots_of.max()), problem.experts)
    most = np.maximum(np.minimum(np.sort(problem.shares, axis=1)[:, -slots:].sum(axis=1), 1.0), least)
    total = problem.joint.sum(axis=(1, 2))
    hottest: list[tuple[Floats, Floats, Floats]] = []
    if problem.traffic == "ports":
        crossing, groups = (problem.node_of[:, None] != nodes, nodes) if apart else (gpus[:, None] != gpus, gpus)
        hottest = hottest_port(problem, groups, float(problem.link_s[crossing].min()), least, most)
    # Then nodes: where time is short, what leaves a node counts for more than what leaves a GPU.
    by_node = _stays(problem, nodes, least, deadline) if apart and any(f > n for n, f in rates) else []
    by_gpu = _stays(problem, gpus, least, deadline) if any(n and f for n, f in rates) else []
    cuts: list[tuple[Floats, Floats, Floats]] = []
    none = [Stay(total, np.zeros(pairs), np.zeros(pairs))]
    for n, f in rates:
        for node in by_node if f > n else none:
            for gpu in by_gpu if n else none:
                cuts.append(
                    (
                        f * total - (f - n) * node.rest - n * gpu.rest,
                        (f - n) * node.here + n * gpu.here,
                        (f - n) * node.there + n * gpu.there,
                    )
                )
    cuts += hottest
    traffic = np.maximum(np.max([c - h * least[:-1] - t * least[1:] for c, h, t in cuts], axis=0), 0.0)
    whole = _whole(problem, least, most, cuts)
    return Bound(load, traffic, max(whole, float(load.sum())) * (1 - ROUNDING))


def least_busiest(problem: Problem) -> Floats:
    """Share of the busiest GPU of each layer at least.

    The mean; w / n of the best numbers of copies n; among the k G + 1 most loaded experts some GPU holds k + 1 of them;
    without replicas, the GPU of an expert holds as many others, at least the least loaded, as the free slots force.
    """
    ranked = -np.sort(-problem.shares, axis=1)
    gpus, experts = problem.gpus, problem.experts
    least = np.full(problem.layers, 1.0 / gpus)
    if problem.replicas:
        copies = np.ones_like(ranked)
        rows = np.arange(problem.layers)
        for _ in range(problem.replicas):
            copies[rows, np.where(copies < gpus, ranked / copies, 0.0).argmax(axis=1)] += 1
        return np.asarray(np.maximum(least, (ranked / copies).max(axis=1)))
    for k in range((experts - 1) // gpus + 1):
        last = k * gpus + 1
        least = np.maximum(least, ranked[:, last - k - 1 : last].sum(axis=1))
    others = neighbours(problem)
    if others > 0:
        least = np.maximum(least, ranked[:, 0] + ranked[:, -others:].sum(axis=1))
    return least


def spectrum(problem: Problem, groups: NDArray[np.intp], least: Floats, *, deadline: float = inf) -> Stay:
    """The spectral bound on what stays in the groups of GPUs; past `deadline`, that no more stays than there is."""
    assert problem.joint is not None
    size, count = int(np.bincount(groups).max()), len(set(groups.tolist()))
    scale = np.zeros_like(problem.shares)
    np.divide(1.0, np.sqrt(problem.shares), out=scale, where=problem.shares > 0)
    found = np.empty((problem.layers - 1, min(count, problem.experts)))
    for pair, joint in enumerate(problem.joint):
        if time.perf_counter() > deadline:
            found[pair] = joint.sum()
            continue
        scaled = scale[pair][:, None] * joint * scale[pair + 1]
        found[pair] = np.linalg.svd(scaled, compute_uv=False)[: found.shape[1]]
    tau = found[:, -1]
    slope = size * (found - tau[:, None]).sum(axis=1)
    tilt = np.sqrt(least[1:] / least[:-1])
    return Stay(tau, slope * tilt / 2, slope / tilt / 2)


def transport(problem: Problem, groups: NDArray[np.intp], least: Floats, *, deadline: float = inf) -> Stay:
    """The transport bound on what stays in the groups of GPUs; better multipliers until `deadline`."""
    assert problem.joint is not None
    size = int(np.bincount(groups).max())
    slots = float(
        min(np.bincount(groups, weights=np.minimum(problem.slots_of, problem.experts)).max(), problem.experts)
    )
    found = [np.empty(problem.layers - 1) for _ in range(3)]
    for first in range(0, problem.layers - 1, PAIRS):
        part = slice(first, min(first + PAIRS, problem.layers - 1))
        if time.perf_counter() > deadline:
            found[0][part] = problem.joint[part].sum(axis=(1, 2))
            found[1][part] = found[2][part] = 0.0
            continue
        after = slice(part.start + 1, part.stop + 1)
        game = _Game(
            problem.joint[part], problem.shares[part], problem.shares[after], slots, size * least[part],
            size * least[after],
        )  # fmt: skip
        for out, value in zip(found, game.solve(deadline), strict=True):
            out[part] = value
    return Stay(found[0], size * found[1], size * found[2])


def _stays(problem: Problem, groups: NDArray[np.intp], least: Floats, deadline: float) -> list[Stay]:
    return [spectrum(problem, groups, least, deadline=deadline), transport(problem, groups, least, deadline=deadline)]


class _Game:
    """The dual of the transport bound for some pairs of layers: multipliers u, v, a, b, driven down by Adam."""

    def __init__(self, flow: Floats, p: Floats, q: Floats, slots: float, here: Floats, there: Floats) -> None:
        self.flow, self.p, self.q, self.slots, self.here, self.there = flow, p, q, slots, here, there
        self.unit = 1.0 / flow.shape[1] ** 2
        lift = np.zeros_like(flow)
        weight = p[:, :, None] * q[:, None, :]
        np.divide(flow, weight, out=lift, where=weight > 0)
        kept = 1 - min(slots / flow.shape[1], 1.0)
        rows, columns = np.quantile(lift, kept, axis=2), np.quantile(lift, kept, axis=1)
        #: u / unit, v / unit, a, b; pairs x 4 x experts.
        self.start = np.stack([np.zeros_like(p), np.zeros_like(p), rows / 2, columns / 2], axis=1)
        self.price = np.empty_like(self.start)
        self.price[:, :2] = slots * self.unit
        self.price[:, 2] = there[:, None] * p
        self.price[:, 3] = here[:, None] * q
        self.flow32, self.p32, self.q32 = (x.astype(np.float32) for x in (flow / self.unit, p, q))

    def solve(self, deadline: float) -> tuple[Floats, Floats, Floats]:
        """(rest, here, there) of the best multipliers met."""
        x = self.start
        best, best_value = x.copy(), self.value(x)
        one, two = np.zeros_like(x), np.zeros_like(x)
        size = np.maximum(self.start.max(axis=(1, 2), keepdims=True), 1.0)
        for step in range(1, STEPS + 1):
            if time.perf_counter() > deadline:
                break
            slope = self.slope(x) / self.price.clip(1e-12)
            one += 0.15 * (slope - one)
            two += 0.03 * (slope**2 - two)
            rate = 0.15 * size * 0.01 ** (step / STEPS)
            x = np.maximum(x - rate * (one / (1 - 0.85**step)) / (np.sqrt(two / (1 - 0.97**step)) + 1e-6), 0.0)
            if step % 20 == 0 or step == STEPS:
                value = self.value(x)
                better = value < best_value
                best[better], best_value[better] = x[better], value[better]
        there = (best[:, 2] * self.p).sum(axis=1)
        here = (best[:, 3] * self.q).sum(axis=1)
        rest = best_value - self.there * there - self.here * here
        return rest, here, there

    def value(self, x: Floats) -> Floats:
        """The bound itself, in full precision."""
        left = self.flow - self.unit * (x[:, 0, :, None] + x[:, 1, None, :])
        left -= (x[:, 2, :, None] + x[:, 3, None, :]) * (self.p[:, :, None] * self.q[:, None, :])
        return np.asarray(np.maximum(left, 0.0).sum(axis=(1, 2)) + (self.price * x).sum(axis=(1, 2)))

    def slope(self, x: Floats) -> Floats:
        """A subgradient of the bound, pairs x 4 x experts."""
        y = x.astype(np.float32)
        weight = (y[:, 2] * self.p32 / np.float32(self.unit))[:, :, None] * self.q32[:, None, :]
        weight += self.p32[:, :, None] * (y[:, 3] * self.q32 / np.float32(self.unit))[:, None, :]
        weight += y[:, 0, :, None]
        weight += y[:, 1, None, :]
        taken = (self.flow32 > weight).astype(np.float32)
        ones = np.ones(taken.shape[1:2], dtype=np.float32)
        out = np.empty_like(x)
        out[:, 0] = -self.unit * (taken @ ones)
        out[:, 1] = -self.unit * (ones @ taken)
        out[:, 2] = -self.p * (taken @ self.q32[:, :, None])[:, :, 0]
        out[:, 3] = -self.q * (self.p32[:, None, :] @ taken)[:, 0, :]
        return np.asarray(out + self.price)


def _rates(problem: Problem) -> list[tuple[float, float]]:
    """(n, f) for which n moved-within-nodes + f moved-between-nodes is never above the traffic term; n <= f."""
    links = problem.link_s
    near = (problem.node_of[:, None] == problem.node_of) & ~np.eye(problem.gpus, dtype=bool)
    far = problem.node_of[:, None] != problem.node_of
    kinds = []
    for kind in (near, far):
        if not kind.any():
            kinds.append(inf)
        elif problem.traffic == "pairs":
            kinds.append(float(1.0 / (1.0 / links[kind]).sum()) if links[kind].all() else 0.0)
        elif problem.traffic == "total":
            kinds.append(float(links[kind].min() / problem.gpus))
        else:
            kinds.append(float(links[kind].min() / kind.any(axis=1).sum()))
    n, f = kinds
    if n == inf or f == inf:
        only = min(n, f)
        return [(only, only)]
    if problem.traffic == "total":
        return [(min(n, f), f)]
    both = n * f / (n + f) if n + f > 0 else 0.0
    return [(0.0, f), (both, both)]


def _whole(problem: Problem, least: Floats, most: Floats, cuts: list[tuple[Floats, Floats, Floats]]) -> float:
    """min over M, t of  sum compute M + sum t,  t_l >= cut - here M_l - there M_(l+1),  t >= 0,  least <= M <= most."""
    layers, pairs = problem.layers, problem.layers - 1
    row = np.arange(pairs)
    blocks, right = [], []
    for k, (const, here, there) in enumerate(cuts):
        blocks.append((row + k * pairs, row, -here))
        blocks.append((row + k * pairs, row + 1, -there))
        blocks.append((row + k * pairs, row + layers, -np.ones(pairs)))
        right.append(-const)
    i, j, value = (np.concatenate([block[k] for block in blocks]) for k in range(3))
    matrix = coo_array((value, (i, j)), shape=(pairs * len(cuts), layers + pairs)).tocsr()
    cost = np.append(np.full(layers, problem.compute_s), np.ones(pairs))
    limits = [*zip(least, most, strict=True), *[(0.0, None)] * pairs]
    scale = max(float(cost.max()), 1e-300)
    found: Any = linprog(cost / scale, matrix, np.concatenate(right) / scale, bounds=limits, method="highs")
    if found.status != 0:
        weights = np.zeros((len(cuts), pairs))
        weights[0] = 1.0
    else:
        weights = np.maximum(-found.ineqlin.marginals, 0.0).reshape(len(cuts), pairs) * scale
        weights /= np.maximum(weights.sum(axis=0), 1.0)
    slope = np.full(layers, problem.compute_s)
    total = 0.0
    for weight, (const, here, there) in zip(weights, cuts, strict=True):
        total += float(weight @ const)
        slope[:-1] -= weight * here
        slope[1:] -= weight * there
    return total + float(np.minimum(slope * least, slope * most).sum())
