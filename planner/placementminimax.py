"""Which placement serves several recordings of traffic, judged by the one it serves worst?

    min over placements of  max over recordings f of  sum over layers of compute x max over g of load_flg

The worst recording's sum is at least any convex combination of the sums, so the weights of the recordings rise with
their sums (multiplicative weights) while swaps lower the weighted sum layer by layer. The bound is the largest of the
recordings' own load bounds: no placement serves a recording better than one made for it alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from planner.errors import PlanError
from planner.placement import Bools, Floats, Problem, load_s, rank_shares, split_of
from planner.placementbound import least_busiest
from planner.placementsweeps import Sweeps, copies_of

#: Rounds of weights, and how fast they follow the worst recording (per part of the mean).
ROUNDS, RATE = 8, 10.0


def minimax(problems: Sequence[Problem], *, seconds: float = 60.0, seed: int = 0) -> tuple[Bools, Floats, float]:
    """(placement: layers x experts x gpus, load term under each recording in s, bound of the worst in s).

    The problems differ in their loads only; transitions do not count. Raises PlanError for none, or other differences.
    """
    if not problems:
        raise PlanError("no recordings; expected at least one")
    first = problems[0]
    for other in problems[1:]:
        same = other.shares.shape == first.shares.shape and other.gpus == first.gpus
        same = same and bool((other.slots_of == first.slots_of).all()) and other.compute_s == first.compute_s
        if not same or other.replicas != first.replicas:
            raise PlanError(
                "recordings of different problems; expected the same experts, GPUs, slots, replicas and costs"
            )
    deadline = time.perf_counter() + seconds
    shares = np.array([problem.shares for problem in problems])
    mean = Problem(
        shares.mean(axis=0), None, first.gpus, [int(s) for s in first.slots_of], first.replicas,
        seconds_per_token=first.seconds_per_token, tokens=first.tokens,
    )  # fmt: skip
    hottest = Problem(shares.max(axis=0), None, first.gpus, [int(s) for s in first.slots_of], first.replicas)
    floors = np.array([least_busiest(problem) for problem in problems])
    sweeps = Sweeps(mean, np.random.default_rng(seed))
    sweeps.copies = copies_of(hottest)
    count = len(problems)
    weights = np.full(count, 1.0 / count)
    sweeps.traffics, sweeps.caps = list(shares), floors.copy()
    best, best_s = np.zeros(0, dtype=np.bool_), np.full(count, np.inf)
    zero = np.zeros((first.experts, first.gpus))
    for step in range(ROUNDS):
        sweeps.importance = [float(weight) for weight in weights]
        for layer in range(first.layers):
            if step and time.perf_counter() > deadline:
                break
            if step == 0:
                sweeps.first(layer, zero)
            else:
                sweeps.improve(layer, zero)
        holds = sweeps.split > 0
        terms = np.array([load_s(p, rank_shares(p, split_of(p, holds))).sum() for p in problems])
        if terms.max() < best_s.max():
            best, best_s = holds.copy(), terms
        if time.perf_counter() > deadline:
            break
        weights *= np.exp(RATE * (terms / terms.mean() - 1.0))
        weights /= weights.sum()
        reached = np.array([rank_shares(p, sweeps.split).max(axis=1) for p in problems])
        sweeps.caps = np.maximum(floors, 0.5 * (floors + reached))
    bound = max(float(first.compute_s * floor.sum()) for floor in floors)
    return best, best_s, bound
