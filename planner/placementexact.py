"""What is the best placement there is? Dynamic programming along the layers tells.

A layer's states are all placements of its experts within the slots (8 experts on 4 GPUs with 2 slots each: 2520). The
objective is a chain, load of each layer plus dispatch between neighbours. With V_0 = load_0,

    V_l(t) = load_l(t) + min over s of  V_(l-1)(s) + dispatch_s(s, t)

is the least cost of layers 0 to l that ends in t, and min V of the last layer is the optimum. Renaming GPUs such that
slots, nodes and links stay as they are changes neither term, so V is the same for all names of a placement: s runs over
one representative each (105 where the four GPUs are alike, 315 on two nodes of two), t over all states. That is exact
for every way of pricing dispatch, the best relabelling between two layers included.
"""

from __future__ import annotations

from itertools import pairwise
from math import inf
from time import perf_counter

import numpy as np

from planner.placement import Floats, Indices, Placement, Problem, placement_of
from planner.placementmilp import milp
from planner.placementstates import States, states_of
from planner.placementsteps import dispatch_between, sending_s

#: Transitions priced at once, which keeps their tables in the cache.
CHUNK = 60_000


def exact(problem: Problem, *, seconds: float = 60.0) -> Placement:
    """The optimum by dynamic programming over all placements of a layer; problems with replicas go to `milp`.

    When time runs out, the best beginning found is continued layer by layer and the bound covers the rest by its least
    load. Raises PlanError where a layer has more placements than can be enumerated.
    """
    start = perf_counter()
    if problem.replicas:
        return milp(problem, seconds=seconds)
    states = states_of(problem)
    load_s = problem.compute_s * _loads(problem, states).max(axis=2)
    least = load_s.min(axis=1)
    back: list[tuple[Indices, Indices]] = []
    value, alive, bound = load_s[0], np.arange(len(states.first)), None
    orbits = np.append(states.first, len(states.gpu))
    took = 0.0
    for layer in range(1, problem.layers):
        if bound is None and perf_counter() + took > start + seconds:
            bound = float(value.min() + least[layer:].sum())
        if bound is not None:
            alive = np.array([value.argmin()])
        begun = perf_counter()
        reached, source = _step(problem, states, layer - 1, value, alive)
        took = perf_counter() - begun
        best = [begin + int(reached[begin:end].argmin()) for begin, end in pairwise(orbits)]
        back.append((np.array(best), source[best]))
        value = load_s[layer] + reached[best]
    last = int(value.argmin())
    gpus = _traced(states, back, last)
    return placement_of(
        problem,
        gpus,
        "exact",
        perf_counter() - start,
        bound=float(value[last]) if bound is None else bound,
        load_bound=float(least.sum()),
        stopped=bound is not None,
    )


def _loads(problem: Problem, states: States) -> Floats:
    """layers x orbits x gpus: shares of the choices."""
    by_set = problem.shares @ states.sets.T
    return np.asarray(by_set[:, states.on_gpu[states.first]])


def _step(problem: Problem, states: States, layer: int, value: Floats, alive: Indices) -> tuple[Floats, Indices]:
    """Least value + dispatch of reaching each state of the next layer, and the orbit it comes from."""
    count = len(states.gpu)
    if problem.joint is None:
        best = int(alive[value[alive].argmin()])
        return np.full(count, value[best]), np.full(count, best)
    joint = problem.joint[layer]
    table = states.sets @ joint @ states.sets.T
    ends = states.sets @ joint.sum(axis=1), states.sets @ joint.sum(axis=0)
    sending = sending_s(problem, states, table)
    reached, source = np.full(count, inf), np.zeros(count, dtype=np.intp)
    rows = max(1, CHUNK // count)
    alive = alive[np.argsort(value[alive])]
    for begin in range(0, len(alive), rows):
        some = alive[begin : begin + rows]
        if value[some[0]] >= np.minimum.reduceat(reached, states.first).max():
            break  # dispatch is not negative: these and all that follow are no cheaper way to any orbit
        cost = value[some, None] + dispatch_between(problem, states, table, ends, states.first[some], sending)
        at = cost.argmin(axis=0)
        cost = cost[at, np.arange(count)]
        better = cost < reached
        reached[better], source[better] = cost[better], some[at[better]]
    return reached, source


def _traced(states: States, back: list[tuple[Indices, Indices]], last: int) -> Indices:
    """GPU of every layer's expert on the cheapest way to an orbit of the last layer."""
    rows, orbit = [], last
    names = np.arange(states.rename.shape[1])  # leads from the orbit's representative to what was chosen
    rows.append(names[states.gpu[states.first[orbit]]])
    for best, source in reversed(back):
        state, orbit = int(best[orbit]), int(source[orbit])
        inverse = np.argsort(states.rename[state])
        names = names[inverse]
        rows.append(names[states.gpu[states.first[orbit]]])
    return np.array(rows[::-1])
