"""What is the best placement there is? Dynamic programming along the layers, and a mixed-integer linear program.

A layer's states are all placements of its experts within the slots (8 experts on 4 GPUs with 2 slots each: 2520). The
objective is a chain, load of each layer plus dispatch between neighbours. With V_0 = load_0,

    V_l(t) = load_l(t) + min over s of  V_(l-1)(s) + dispatch_s(s, t)

is the least cost of layers 0 to l that ends in t, and min V of the last layer is the optimum. Renaming GPUs such that
slots, nodes and links stay as they are changes neither term, so V is the same for all names of a placement: s runs over
one representative each (105 where the four GPUs are alike, 315 on two nodes of two), t over all states. That is exact
for every way of pricing dispatch, the best relabelling between two layers included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb, inf
from time import perf_counter
from typing import Any

import numpy as np
import pulp

from planner.errors import PlanError
from planner.placement import Bools, Floats, Indices, Placement, Problem, placement_of
from planner.placementbaselines import greedy

#: Most placements of a layer that are enumerated.
MOST_STATES = 50_000
#: Most transitions between two layers: representatives x states.
MOST_STEPS = 200_000_000
#: Transitions priced at once, which keeps their tables in the cache.
CHUNK = 60_000
#: HiGHS's relative tolerances; its bound is lowered by as much.
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """All placements of one layer; those that are renamings of each other stand together.

    gpu      states x experts: GPU of each expert
    first    index of each orbit's representative
    rename   states x gpus: names that give the state, gpu[t] = rename[t][gpu[representative of t]]
    sets     sets x experts: the sets of experts that a GPU or a node can hold
    on_gpu   states x gpus: index of the GPU's set
    on_node  states x nodes: index of the node's set
    nodes    GPUs of each node
    part     states x nodes: index of what the node's GPUs hold, in `parts`
    parts    for each node: what its GPUs can hold x (indices of its GPUs' sets, then of the node's)
    """

    gpu: Indices
    first: Indices
    rename: Indices
    sets: Floats
    on_gpu: Indices
    on_node: Indices
    nodes: tuple[Indices, ...]
    part: Indices
    parts: tuple[Indices, ...]


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
    )


def states_of(problem: Problem) -> States:
    """Every placement of a layer's experts within the slots, by orbits of the renamings that change nothing.

    Raises PlanError where there are too many.
    """
    count = _count(problem)
    if count > MOST_STATES:
        raise _too_many(f"{count:.3g} placements per layer", MOST_STATES)
    found, free = np.zeros((1, 0), dtype=np.intp), problem.slots_of[None]
    for _ in range(problem.experts):
        row, gpu = np.nonzero(free)
        found = np.column_stack([found[row], gpu])
        free = free[row]
        free[np.arange(len(row)), gpu] -= 1
    order, first, rename = _orbits(found, list(renamings(problem)), problem.gpus)
    if len(first) * len(order) > MOST_STEPS:
        raise _too_many(f"{len(first)} x {len(order)} transitions between two layers", MOST_STEPS)
    gpu = found[order]
    nodes, node_of = np.unique(problem.node_of, return_inverse=True)
    bits = 1 << np.arange(problem.experts)
    on_gpu = ((gpu[:, :, None] == np.arange(problem.gpus)) * bits[:, None]).sum(axis=1)
    on_node = ((node_of[gpu][:, :, None] == np.arange(len(nodes))) * bits[:, None]).sum(axis=1)
    masks, index = np.unique(np.hstack([on_gpu, on_node]), return_inverse=True)
    index = index.reshape(len(gpu), -1)
    sets = ((masks[:, None] & bits) > 0).astype(np.float64)
    on_gpu, on_node = index[:, : problem.gpus], index[:, problem.gpus :]
    members = tuple(np.flatnonzero(node_of == node) for node in range(len(nodes)))
    parts, part = [], []
    for node, own in enumerate(members):
        what, which = np.unique(np.column_stack([on_gpu[:, own], on_node[:, node]]), axis=0, return_inverse=True)
        parts.append(what)
        part.append(which.reshape(-1))
    return States(gpu, first, rename, sets, on_gpu, on_node, members, np.column_stack(part), tuple(parts))


def renamings(problem: Problem) -> Iterator[Indices]:
    """Exchanges of two GPUs, or of two nodes, that leave slots, nodes and links as they are."""
    nodes = [np.flatnonzero(problem.node_of == node) for node in np.unique(problem.node_of)]
    exchanges = [(np.array([a]), np.array([b])) for a, b in combinations(range(problem.gpus), 2)]
    exchanges += [(a, b) for a, b in combinations(nodes, 2) if len(a) == len(b) > 1]
    near = problem.node_of[:, None] == problem.node_of
    for a, b in exchanges:
        names = np.arange(problem.gpus)
        names[a], names[b] = b, a
        square = np.ix_(names, names)
        same = problem.slots_of[names] == problem.slots_of
        if same.all() and (near[square] == near).all() and (problem.link_s[square] == problem.link_s).all():
            yield names


def _orbits(found: Indices, names: list[Indices], gpus: int) -> tuple[Indices, Indices, Indices]:
    """Order of the states by orbit, index of each orbit's first, and the names that lead from it to each state."""
    base = gpus ** np.arange(found.shape[1])
    codes = found @ base
    by_code = np.argsort(codes)
    ranked = codes[by_code]
    rename = np.full((len(found), gpus), -1)
    order: list[Indices] = []
    first: list[int] = []
    seen = 0
    for state in range(len(found)):
        if rename[state, 0] >= 0:
            continue
        first.append(seen)
        rename[state] = np.arange(gpus)
        edge = np.array([state])
        while len(edge):
            order.append(edge)
            seen += len(edge)
            fresh = []
            for name in names:
                there = by_code[np.searchsorted(ranked, name[found[edge]] @ base)]
                new = rename[there, 0] < 0
                rename[there[new]] = name[rename[edge[new]]]
                fresh.append(there[new])
            edge = np.concatenate(fresh) if fresh else edge[:0]
    whole = np.concatenate(order)
    return whole, np.array(first), rename[whole]


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
    reached, source = np.full(count, inf), np.zeros(count, dtype=np.intp)
    rows = max(1, CHUNK // count)
    alive = alive[np.argsort(value[alive])]
    for begin in range(0, len(alive), rows):
        some = alive[begin : begin + rows]
        if value[some[0]] >= np.minimum.reduceat(reached, states.first).max():
            break  # dispatch is not negative: these and all that follow are no cheaper way to any orbit
        cost = value[some, None] + _dispatch_s(problem, states, table, ends, states.first[some])
        at = cost.argmin(axis=0)
        cost = cost[at, np.arange(count)]
        better = cost < reached
        reached[better], source[better] = cost[better], some[at[better]]
    return reached, source


def _dispatch_s(problem: Problem, states: States, table: Floats, ends: tuple[Floats, Floats], some: Indices) -> Floats:
    """Seconds of dispatch from some states to all.

    table   sets x sets: flow from each set of experts to each
    ends    flow that leaves each set, and that reaches it
    """
    leave, arrive = ends
    here, there = states.on_gpu[some], states.on_gpu
    levels = _levels(problem)
    if problem.traffic == "pairs" or (levels is None and problem.traffic == "total"):
        return _pairwise(problem, states, table, here)
    if levels is None:
        return _portwise(problem, states, table, here)
    near_s, far_s = levels
    total = problem.traffic == "total"
    cost = np.zeros((len(some), len(there)))
    if states.on_node.shape[1] == 1:
        each = near_s * ((leave[:, None] if total else np.maximum(leave[:, None], arrive)) - table)
        for g in range(problem.gpus):
            part = each[here[:, g]][:, there[:, g]]
            cost = cost + part / problem.gpus if total else np.maximum(cost, part)
        return cost
    for node, (gpus, parts) in enumerate(zip(states.nodes, states.parts, strict=True)):
        node_cost = np.zeros((len(some), len(parts)))
        entering_node, whole = table[states.on_node[some, node]], parts[:, -1]
        for position, g in enumerate(gpus):
            leaving, there_g = table[here[:, g]], parts[:, position]
            inside, left = leaving[:, whole], leave[here[:, g]][:, None]
            kept = leaving[:, there_g]
            if total:
                node_cost += (near_s * (inside - kept) + far_s * (left - inside)) / problem.gpus
                continue
            entering = entering_node[:, there_g]
            np.maximum(node_cost, near_s * (np.maximum(inside, entering) - kept), out=node_cost)
            np.maximum(node_cost, far_s * np.maximum(left - inside, arrive[there_g] - entering), out=node_cost)
        spread = node_cost[:, states.part[:, node]]
        cost = cost + spread if total else np.maximum(cost, spread, out=cost)
    return cost


def _pairwise(problem: Problem, states: States, table: Floats, here: Indices) -> Floats:
    """The same where pairs of GPUs add up or wait for none: what enters a node depends on what that node holds."""
    total = problem.traffic == "total"
    cost = np.zeros((len(here), len(states.gpu)))
    for node, (gpus, parts) in enumerate(zip(states.nodes, states.parts, strict=True)):
        node_cost = np.zeros((len(here), len(parts)))
        for position, h in enumerate(gpus):
            for g in np.flatnonzero(problem.link_s[:, h]):
                part = problem.link_s[g, h] * table[here[:, g]][:, parts[:, position]]
                if total:
                    node_cost += part / problem.gpus
                else:
                    np.maximum(node_cost, part, out=node_cost)
        spread = node_cost[:, states.part[:, node]]
        cost = cost + spread if total else np.maximum(cost, spread, out=cost)
    return cost


def _portwise(problem: Problem, states: States, table: Floats, here: Indices) -> Floats:
    """The same for the ports of GPUs whose links differ within a node or between nodes."""
    cost = np.zeros((len(here), len(states.gpu)))
    near = problem.node_of[:, None] == problem.node_of
    for kind in (near, ~near):
        entering: dict[int, Floats] = {}
        for g in range(problem.gpus):
            rows, leaving = table[here[:, g]], np.zeros_like(cost)
            for h in np.flatnonzero(problem.link_s[g] * kind[g]).tolist():
                part = problem.link_s[g, h] * rows[:, states.on_gpu[:, h]]
                leaving += part
                entering[h] = entering[h] + part if h in entering else part
            np.maximum(cost, leaving, out=cost)
        for arrived in entering.values():
            np.maximum(cost, arrived, out=cost)
    return cost


def _levels(problem: Problem) -> tuple[float, float] | None:
    """Seconds within and across nodes if all links of either kind are alike, else None."""
    near = problem.node_of[:, None] == problem.node_of
    found = []
    for pairs in (near & ~np.eye(problem.gpus, dtype=bool), ~near):
        links = problem.link_s[pairs]
        if links.size and links.min() != links.max():
            return None
        found.append(float(links[0]) if links.size else 0.0)
    return found[0], found[1]


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


def _count(problem: Problem) -> int:
    """Placements of a layer's experts within the slots, 10^18 at most.

    c_g(n) = sum over k <= slots of (n over k) c_(g-1)(n - k), where k of n experts are on GPU g.
    """
    ways = [1] + [0] * problem.experts
    for slots in problem.slots_of:
        ways = [
            min(sum(comb(n, k) * ways[n - k] for k in range(min(int(slots), n) + 1)), 10**18)
            for n in range(problem.experts + 1)
        ]
    return ways[-1]


def _too_many(what: str, most: int) -> PlanError:
    return PlanError(f"{what}; expected at most {most} to enumerate: use the solver large, or milp on few layers")


def milp(problem: Problem, *, seconds: float = 60.0) -> Placement:
    """The optimum by one mixed-integer linear program, for few layers and experts.

        minimise   sum of t_l + sum of u_l
        t_l       >= sum over e of w_le y_leg                                     load of every GPU
        u_l       >= the ports, pairs or total of the flows sum over e, f of joint_lef z_lefgh
        sum over h of z_lefgh = y_leg       sum over g of z_lefgh = y_(l+1)fh     z >= 0
        sum over e of x_leg <= slots_g      sum over g of x_leg >= 1      sum of x_l <= experts + replicas

    x is binary and tells where copies are. Without replicas y = x, and z is the product of the y. With replicas y is 0
    without a copy and at most 1 ("balanced") or 1/n of an expert with n copies ("even"); where both of a pair's experts
    have copies z may undercut the product, so that the bound stays valid but a gap can remain. Other placements come
    from `greedy` when time runs out before any is found.
    """
    start = perf_counter()
    program = _Program(problem)
    found, bound = program.solve(seconds)
    fallback = greedy(problem)
    best = fallback
    if found is not None:
        best = placement_of(problem, found, "milp", 0.0)
        best = min((best, fallback), key=lambda placement: placement.objective)
    return placement_of(problem, best.holds, "milp", perf_counter() - start, bound=bound)


class _Program:
    """The program of `milp`, in units of the load and traffic of one even layer."""

    def __init__(self, problem: Problem) -> None:
        """Build it."""
        self.problem = problem
        self.unit = problem.compute_s / problem.gpus + float(problem.link_s.max()) or 1.0
        self.lp = pulp.LpProblem("placement", pulp.LpMinimize)
        self.x: dict[tuple[int, int, int], Any] = {}
        self.y: dict[tuple[int, int, int], Any] = {}
        self.costs: list[Any] = []
        for layer in range(problem.layers):
            self._layer(layer)
            if problem.replicas:
                self._copies(layer)
        if problem.joint is not None and problem.gpus > 1:
            for layer in range(problem.layers - 1):
                self._traffic(layer)
        if len(list(renamings(problem))) >= comb(problem.gpus, 2):
            self.lp += self.x[0, 0, 0] == 1  # all GPUs are alike
        self.lp += pulp.lpSum(self.costs)

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

    def solve(self, seconds: float) -> tuple[Bools | None, float]:
        """Where copies are (None if none were found), and the bound in seconds."""
        problem = self.problem
        status = self.lp.solve(pulp.HiGHS(msg=False, gapRel=TOLERANCE / 10, timeLimit=seconds))
        bound = float(self.lp.solverModel.getInfo().mip_dual_bound) * (1.0 - TOLERANCE) * self.unit
        bound = bound if -inf < bound < inf else 0.0
        if pulp.LpStatus[status] != "Optimal":
            return None, bound
        holds = np.zeros((problem.layers, problem.experts, problem.gpus), dtype=bool)
        for place, x in self.x.items():
            holds[place] = x.value() > 0.5
        return holds, bound


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
