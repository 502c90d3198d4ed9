"""Where do experts sit if MoETuner's two integer linear programs place them?

ILP-1, layer by layer, clusters experts so that clusters are loaded alike; T_c = sum over e of P_e x_ce:

    minimise  sum over c of |T_c - mean|      sum over c of x_ce = 1      1 <= sum over e of x_ce <= slots_c

ILP-2 gives the clusters of every layer to GPUs, one each, so that the worst pairs of GPUs exchange little; C_l(c, d) is
what cluster c of layer l sends to cluster d of the next, B the bandwidths:

    minimise  sum over l of max over g, h of  C_l(c, d) y_lcg y_(l+1)dh / B_gh      sum over g of y_lcg = 1 = sum over c

(MoETuner as noted in SYSTEMS.md 2.3 #183; its tolerance of 0.025.) Three things are ours: products are replaced by
flows with the y as their sums, slots stand in for the paper's equal number of experts per GPU over all layers (the same
if slots x GPUs = experts), and where the whole ILP-2 is too large or late, layers follow one by one: with the layer
before in place, ILP-2 is a bottleneck assignment. Copies of experts are not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from time import perf_counter
from typing import Any

import numpy as np
import pulp
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from planner.placement import Bools, Floats, Indices, Placement, Problem, placement_of
from planner.placementbaselines import packed

#: MoETuner's relative tolerance for both programs.
TOLERANCE = 0.025
#: Most products of ILP-2, (layers - 1) x gpus^4, that are tried at once.
MOST_PRODUCTS = 20_000


def tuner(problem: Problem, *, seconds: float = 60.0) -> Placement:
    """Clusters by ILP-1, then GPUs by ILP-2; what a program does not find in time comes from its fallback.

    Half of the time is for each. ILP-2 minimises the pairs' traffic as MoETuner does, also where the problem prices
    dispatch by ports; the placement tells the problem's own objective. Its bound is `simple_bound`.
    """
    start = perf_counter()
    clusters = []
    for layer in range(problem.layers):
        left = start + seconds / 2 - perf_counter()
        clusters.append(cluster(problem.shares[layer], problem.slots_of, left / (problem.layers - layer)))
    held = np.stack(clusters)
    gpu_of = mapped(problem, held, start + seconds - perf_counter())
    holds = np.zeros((problem.layers, problem.experts, problem.gpus), dtype=bool)
    for own, clustered, gpus in zip(holds, held, gpu_of, strict=True):
        own[:, gpus] = clustered
    took = perf_counter() - start
    return placement_of(problem, holds, "tuner", took, stopped=took >= seconds)


def cluster(shares: Floats, slots: Indices, seconds: float) -> Bools:
    """ILP-1 of one layer: experts x clusters; the greedy clusters where the program finds none better in time."""
    start = packed(shares, np.ones(len(shares), np.intp), slots)
    if seconds <= 0 or len(slots) == 1:
        return start
    lp = pulp.LpProblem("clusters", pulp.LpMinimize)
    experts, gpus = range(len(shares)), range(len(slots))
    x = {(e, c): lp.add_variable(f"x_{e}_{c}", cat=pulp.LpBinary) for e in experts for c in gpus}
    if slots.min() == slots.max():  # clusters are alike: number them by their heaviest expert
        for rank, e in enumerate(np.argsort(-shares)[: len(slots) - 1].tolist()):
            for c in range(rank + 1, len(slots)):
                lp += x[e, c] == 0
    apart = []
    for e in experts:
        lp += pulp.lpSum(x[e, c] for c in gpus) == 1
    for c in gpus:
        size = pulp.lpSum(x[e, c] for e in experts)
        lp += size <= int(slots[c])
        if len(shares) >= len(slots) and slots.min() > 0:
            lp += size >= 1
        over, under = lp.add_variable(f"over_{c}", lowBound=0.0), lp.add_variable(f"under_{c}", lowBound=0.0)
        lp += _total((float(shares[e]) * len(slots), x[e, c]) for e in experts) - 1.0 == over - under
        apart += [over, under]
    lp += pulp.lpSum(apart)
    if not _solved(lp, seconds):
        return start
    found = np.array([[x[e, c].value() > 0.5 for c in gpus] for e in experts])
    return min((found, start), key=lambda holds: float(np.abs(shares @ holds - 1.0 / len(slots)).sum()))


def mapped(problem: Problem, held: Bools, seconds: float) -> Indices:
    """ILP-2: layers x clusters, the GPU of every cluster.

    held   layers x experts x clusters
    """
    if problem.joint is None or problem.gpus == 1 or problem.layers == 1:
        return np.tile(np.arange(problem.gpus), (problem.layers, 1))
    traffic = held[:-1].transpose(0, 2, 1) @ problem.joint @ held[1:]
    fits = held.sum(axis=1)[:, :, None] <= problem.slots_of
    chain = _chain(problem, traffic, fits)
    if seconds <= 0 or (problem.layers - 1) * problem.gpus**4 > MOST_PRODUCTS:
        return chain
    whole = _whole(problem, traffic, fits, seconds)
    if whole is None:
        return chain
    return min((whole, chain), key=lambda gpu_of: worst_pairs_s(problem, traffic, gpu_of))


def worst_pairs_s(problem: Problem, traffic: Floats, gpu_of: Indices) -> float:
    """ILP-2's objective, s: sum over layers of the slowest pair of GPUs."""
    links = problem.link_s[gpu_of[:-1, :, None], gpu_of[1:, None, :]]
    return float((traffic * links).max(axis=(1, 2)).sum())


def _chain(problem: Problem, traffic: Floats, fits: Bools) -> Indices:
    """Layer after layer, each a bottleneck assignment given the one before; ties go to the least sum."""
    gpu_of = [linear_sum_assignment(~fits[0])[1]]
    for layer, moved in enumerate(traffic):
        cost = (moved[:, :, None] * problem.link_s[gpu_of[-1]][:, None, :]).max(axis=0)
        cost[~fits[layer + 1]] = inf
        gpu_of.append(bottleneck(cost))
    return np.array(gpu_of)


def bottleneck(cost: Floats) -> Indices:
    """Column of every row in the assignment with the least largest entry, and among those the least sum.

    cost   square; inf where not allowed
    """
    values = np.unique(cost[np.isfinite(cost)])
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        found = maximum_bipartite_matching(csr_array(cost <= values[middle]), perm_type="column")
        low, high = (low, middle) if (found >= 0).all() else (middle + 1, high)
    most = values[low]
    forbidden = (abs(most) + 1.0) * (len(cost) + 1.0)
    return np.asarray(linear_sum_assignment(np.where(cost <= most, cost, forbidden))[1])


def _whole(problem: Problem, traffic: Floats, fits: Bools, seconds: float) -> Indices | None:
    """ILP-2 of all layers at once; None if nothing was found in time."""
    gpus = range(problem.gpus)
    unit = float((traffic.max(axis=(1, 2)) * problem.link_s.max()).mean()) or 1.0
    lp = pulp.LpProblem("mapping", pulp.LpMinimize)
    y = {
        (layer, c, g): lp.add_variable(f"y_{layer}_{c}_{g}", cat=pulp.LpBinary)
        for layer in range(problem.layers)
        for c in gpus
        for g in gpus
    }
    for layer, c, g in np.argwhere(~fits).tolist():
        lp += y[layer, c, g] == 0
    for layer in range(problem.layers):
        for at in gpus:
            lp += pulp.lpSum(y[layer, at, g] for g in gpus) == 1
            lp += pulp.lpSum(y[layer, c, at] for c in gpus) == 1
    worst = []
    for layer, moved in enumerate(traffic):
        worst.append(lp.add_variable(f"worst_{layer}", lowBound=0.0))
        pairs: dict[tuple[int, int], list[tuple[float, Any]]] = {(g, h): [] for g in gpus for h in gpus if g != h}
        for c in gpus:
            for d in gpus:
                z = {(g, h): lp.add_variable(f"z_{layer}_{c}_{d}_{g}_{h}", lowBound=0.0) for g in gpus for h in gpus}
                for at in gpus:
                    lp += pulp.lpSum(z[at, h] for h in gpus) == y[layer, c, at]
                    lp += pulp.lpSum(z[g, at] for g in gpus) == y[layer + 1, d, at]
                for (g, h), parts in pairs.items():
                    parts.append((float(moved[c, d] * problem.link_s[g, h]) / unit, z[g, h]))
        for parts in pairs.values():
            lp += _total(parts) <= worst[-1]
    lp += pulp.lpSum(worst)
    if not _solved(lp, seconds):
        return None
    values = np.array([y[key].value() for key in y]).reshape(problem.layers, problem.gpus, problem.gpus)
    return np.asarray(values.argmax(axis=2))


def _solved(lp: Any, seconds: float) -> bool:
    """Whether HiGHS found whole numbers within the time."""
    status = lp.solve(pulp.HiGHS(msg=False, gapRel=TOLERANCE, timeLimit=seconds))
    return bool(pulp.LpStatus[status] == "Optimal")


def _total(parts: Iterable[tuple[float, Any]]) -> Any:
    """Sum of coefficient times variable."""
    return pulp.LpAffineExpression([(variable, a) for a, variable in parts])
