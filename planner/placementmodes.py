"""Which experts of all layers belong together, before any of them has a GPU?

With P_l the diagonal of a layer's shares and Y_l its split over groups, what stays within groups is

    tr(Y_l^T F_l Y_(l+1)) = tr(A_l^T N_l A_(l+1)),     A = P^1/2 Y,  N_l = P_l^-1/2 F_l P_(l+1)^-1/2.

Relaxed to matrices H_l with orthonormal
columns, orthogonal to the square roots of the shares (the mode that all placements have in common), the sum over layers
is raised by one layer after the other: H_l = polar factor of (N_(l-1)^T H_(l-1) + N_l H_(l+1)). Rows of P^-1/2 H are
then points that lie together, across layers, for experts whose tokens go together; k-means of them give bundles, and
bundles whose loads add up evenly make the groups.
"""

from __future__ import annotations

import time
from math import inf

import numpy as np
from numpy.typing import NDArray

from planner.placement import Floats, Problem

#: Tours along the layers and back, rounds and starts of the means, rounds of swaps of bundles.
TOURS, ROUNDS, SEEDS, SWAPS = 6, 30, 4, 200
#: Bundles of experts for each group, as far as there are at most so many bundles.
BUNDLES, MOST = 8, 32
#: Flow that a unit of load above a group's part outweighs.
BALANCE = 4.0


def distances(problem: Problem, groups: int, rng: np.random.Generator, *, deadline: float = inf) -> Floats:
    """Squared distance of every expert to the nearest bundle of each group, layers x experts x groups.

    Needs transitions and at least two groups; the scale means nothing, only comparisons within the table do. Past
    `deadline` (time.perf_counter() s) tours and starts of the means end early.
    """
    bundles = min(max(groups, min(BUNDLES * groups, MOST)), problem.experts)
    points = _points(problem, min(bundles - 1, problem.experts - 1), rng, deadline)
    flat, weight = points.reshape(-1, points.shape[2]), problem.shares.reshape(-1)
    best, centres = np.inf, flat[:bundles]
    for start in range(SEEDS):
        if start and time.perf_counter() > deadline:
            break
        value, found = _means(flat, weight, bundles, rng)
        if value < best:
            best, centres = value, found
    far = _squares(flat, centres).reshape(problem.layers, problem.experts, bundles)
    home = _bundled(problem, far.argmin(axis=2), bundles, groups)
    return np.stack(
        [far[:, :, home == k].min(axis=2) if (home == k).any() else far.max(axis=2) for k in range(groups)], axis=2
    )


def _bundled(problem: Problem, bundle: NDArray[np.intp], bundles: int, groups: int) -> NDArray[np.intp]:
    """Group of every bundle: loads even, and by swaps of two bundles as much flow within groups as they allow."""
    assert problem.joint is not None
    member = np.asarray(bundle[:, :, None] == np.arange(bundles), dtype=np.float64)
    load = np.einsum("le,leb->b", problem.shares, member) / problem.layers
    flow = np.zeros((bundles, bundles))
    for k, joint in enumerate(problem.joint):
        flow += member[k].T @ joint @ member[k + 1]
    flow = (flow + flow.T) / (problem.layers - 1)
    np.fill_diagonal(flow, 0.0)
    home = np.zeros(bundles, dtype=np.intp)
    sums = np.zeros(groups)
    for b in np.argsort(-load, kind="stable").tolist():
        home[b] = int(sums.argmin())
        sums[home[b]] += load[b]
    for _ in range(SWAPS):
        inside = flow @ (home[:, None] == np.arange(groups))
        here, there = inside[np.arange(bundles), home], inside[:, home]
        gain = there + there.T - here[:, None] - here - 2 * flow
        change = load - load[:, None]  # i's group gets that much more
        over = np.maximum(sums - 1.0 / groups, 0.0)[home]
        more = (sums - 1.0 / groups)[home]
        gain -= BALANCE * (
            np.maximum(more[:, None] + change, 0.0) + np.maximum(more - change, 0.0) - over[:, None] - over
        )
        gain[home[:, None] == home] = 0.0
        i, j = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[i, j] <= 1e-12:
            break
        sums[home[i]] += change[i, j]
        sums[home[j]] -= change[i, j]
        home[i], home[j] = home[j], home[i]
    return home


def _points(problem: Problem, modes: int, rng: np.random.Generator, deadline: float) -> Floats:
    """Rows of P^-1/2 H, layers x experts x modes; each mode as long as the part of it that a transition keeps."""
    assert problem.joint is not None
    root = np.sqrt(problem.shares)
    scale = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    links = [scale[k][:, None] * joint * scale[k + 1] for k, joint in enumerate(problem.joint)]
    h = [_polar(rng.standard_normal((problem.experts, modes)), root[0])]
    for link, there in zip(links, root[1:], strict=True):
        h.append(_polar(link.T @ h[-1], there))
    for tour in range(TOURS):
        order = range(problem.layers)
        for layer in reversed(order) if tour % 2 == 0 else order:
            if time.perf_counter() > deadline:
                break
            drawn = np.zeros_like(h[layer])
            if layer > 0:
                drawn += links[layer - 1].T @ h[layer - 1]
            if layer < problem.layers - 1:
                drawn += links[layer] @ h[layer + 1]
            h[layer] = _polar(drawn, root[layer])
    common = sum((h[k].T @ link @ h[k + 1] for k, link in enumerate(links)), np.zeros((modes, modes)))
    strength, turn = np.linalg.eigh((common + common.T) / (2 * len(links)))
    return np.asarray((np.array(h) @ turn) * scale[:, :, None] * np.maximum(strength, 0.0))


def _polar(drawn: Floats, root: Floats) -> Floats:
    """The closest matrix with orthonormal columns that are orthogonal to root."""
    drawn = drawn - np.outer(root, root @ drawn)
    u, _, v = np.linalg.svd(drawn, full_matrices=False)
    return np.asarray(u @ v)


def _squares(points: Floats, centres: Floats) -> Floats:
    inner = points @ centres.T
    return np.asarray((points**2).sum(axis=1)[:, None] - 2 * inner + (centres**2).sum(axis=1))


def _means(points: Floats, weight: Floats, groups: int, rng: np.random.Generator) -> tuple[float, Floats]:
    """Weighted k-means from one drawing of far-apart points."""
    first = [int(rng.choice(len(points), p=weight / weight.sum()))]
    near = ((points - points[first[0]]) ** 2).sum(axis=1)
    for _ in range(groups - 1):
        odds = near * weight
        total = odds.sum()
        first.append(int(rng.choice(len(points), p=odds / total)) if total > 0 else int(rng.integers(len(points))))
        near = np.minimum(near, ((points - points[first[-1]]) ** 2).sum(axis=1))
    centres = points[first].copy()
    for _ in range(ROUNDS):
        nearest = _squares(points, centres).argmin(axis=1)
        mass = np.bincount(nearest, weights=weight, minlength=groups)
        for axis in range(points.shape[1]):
            sums = np.bincount(nearest, weights=weight * points[:, axis], minlength=groups)
            centres[:, axis] = np.where(mass > 0, sums / np.maximum(mass, 1e-300), centres[:, axis])
    return float(_squares(points, centres).min(axis=1) @ weight), centres
