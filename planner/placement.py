"""On which GPUs should the experts of every layer sit, and how far is that from the best there is?

A placement is judged by the seconds per step that depend on it, with w_le the share of layer l's expert choices that
go to expert e, p_lef the probability that a choice of e is followed by f in the next MoE layer, and y_leg the share of
expert e's tokens that its copy on GPU g takes (sum over g = 1; 0 or 1 without replicas):

    objective = sum over l of  tokens x seconds_per_token x max over g of (sum over e of w_le y_leg)         load term
              + sum over l < L-1 of  dispatch_s(tokens x bytes_per_token x X_l)                           traffic term
    X_lgh     = sum over e, f of  w_le p_lef y_leg y_(l+1)fh      share of choices that move from GPU g to GPU h

The hidden state of a choice moves from the GPU of its expert straight to the GPU of the next layer's expert, which is
MoETuner's view of the traffic; copies are chosen independently in both layers. With s_gh the seconds per byte between
two GPUs, x_gh the bytes of a layer and x_gg free, dispatch_s is one of

    ports   max over g of  sum over h of x_gh s_gh  and of  sum over h of x_hg s_hg,  where h runs over the other GPUs
            of g's node (its NVLink port) and over those of other nodes (its network card): four ports move at once
    pairs   max over g != h of  x_gh s_gh                                         (MoETuner's second ILP, SYSTEMS #183)
    total   sum over g != h of  x_gh s_gh / gpus                                        (the mean port's sending time)

Every solver returns a `Placement` whose `bound` no placement of the problem undercuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from planner.errors import PlanError

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Bools = NDArray[np.bool_]
Traffic = Literal["ports", "pairs", "total"]
Split = Literal["even", "balanced"]
#: Candidate changes whose flows are held in memory at once.
CHUNK = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Experts to place, and what it costs to have them apart or together.

    loads               layers x experts; shares or counts, read row by row, not negative, each row with a positive sum
    transitions         (layers - 1) x experts x experts, rows sum to 1 (0 for an expert that is never chosen), or None
                        where nothing is known of them: then there is no traffic term
    gpus                ranks that hold experts
    slots               experts that a GPU can hold per layer: one number, or one for each GPU
    replicas            extra copies per layer at most; copies of an expert sit on different GPUs
    seconds_per_token   compute of one expert choice on the busiest rank, s
    seconds_per_byte    gpus x gpus (or one number) from row to column, finite; the diagonal is not read
    bytes_per_token     bytes of hidden state that one choice moves
    tokens              expert choices per step and layer: tokens x top_k
    nodes               node of each GPU; None: all in one. Tells NVLink ports from network ports, and EPLB its groups
    traffic             how dispatch is priced; see the module
    split               tokens of copies: "even", or "balanced": the split with the least busiest GPU, a linear program

    Raises PlanError for shapes that disagree, negative or empty loads, rows that do not sum to 1, slots that cannot
    hold all experts, replicas beyond the slots, and ranks that cannot be reached.
    """

    loads: Floats
    transitions: Floats | None
    gpus: int
    slots: int | Sequence[int]
    replicas: int = 0
    seconds_per_token: float = 1.0
    seconds_per_byte: ArrayLike = 0.0
    bytes_per_token: float = 1.0
    tokens: float = 1.0
    nodes: Sequence[int] | None = None
    traffic: Traffic = "ports"
    split: Split = "even"
    #: layers x experts: loads divided by their row's sum.
    shares: Floats = field(init=False)
    #: (layers - 1) x experts x experts: share of choices that go from e to f; None without transitions.
    joint: Floats | None = field(init=False)
    #: Slots of every GPU.
    slots_of: Indices = field(init=False)
    #: Node of every GPU.
    node_of: Indices = field(init=False)
    #: gpus x gpus, diagonal 0: seconds if all choices of a layer moved over that pair.
    link_s: Floats = field(init=False)
    #: Seconds of compute if all choices of a layer were on one GPU.
    compute_s: float = field(init=False)

    def __post_init__(self) -> None:
        """Check, and derive what the evaluation needs."""
        loads = np.asarray(self.loads, dtype=np.float64)
        _checked_loads(loads)
        layers, experts = loads.shape
        put = object.__setattr__
        put(self, "loads", loads)
        put(self, "shares", loads / loads.sum(axis=1, keepdims=True))
        put(self, "joint", None)
        if self.transitions is not None:
            transitions = np.asarray(self.transitions, dtype=np.float64)
            _checked_transitions(transitions, layers, experts)
            put(self, "transitions", transitions)
            put(self, "joint", self.shares[:-1, :, None] * transitions)
        if self.gpus < 1:
            raise PlanError(f"gpus = {self.gpus}; expected at least 1 rank to hold the experts")
        put(self, "slots_of", _checked_slots(self.slots, self.gpus, experts, self.replicas))
        nodes = np.zeros(self.gpus) if self.nodes is None else np.asarray(self.nodes)
        if nodes.shape != (self.gpus,):
            raise PlanError(f"nodes of {nodes.size} GPUs; expected one node for each of the {self.gpus} GPUs")
        put(self, "node_of", nodes.astype(np.intp))
        for name in ("seconds_per_token", "bytes_per_token", "tokens"):
            value = getattr(self, name)
            if not 0 <= value < inf:
                raise PlanError(f"{name} = {value}; expected a finite number that is not negative")
        if self.traffic not in ("ports", "pairs", "total"):
            raise PlanError(f"traffic {self.traffic!r}; expected ports, pairs or total")
        if self.split not in ("even", "balanced"):
            raise PlanError(f"split {self.split!r}; expected even or balanced")
        put(self, "link_s", self.tokens * self.bytes_per_token * _checked_links(self.seconds_per_byte, self.gpus))
        put(self, "compute_s", float(self.tokens * self.seconds_per_token))

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.loads.shape[0])

    @property
    def experts(self) -> int:
        """Routed experts per layer."""
        return int(self.loads.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Experts on GPUs, what that costs and what any placement costs at least.

    holds          layers x experts x gpus: whether the GPU holds a copy of the expert
    split          same shape: share of the expert's tokens that each copy takes
    objective      load_term + traffic_term, s per step
    bound          seconds that no placement of the problem undercuts
    load_bound     the same for the load term alone
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


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds per step of a placement."""

    load_term: float
    traffic_term: float

    @property
    def objective(self) -> float:
        """Both terms."""
        return self.load_term + self.traffic_term


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
        from planner import placementexact

        return (placementexact.exact if solver == "exact" else placementexact.milp)(problem, seconds=seconds)
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


def holds_of(problem: Problem, assignment: ArrayLike) -> Bools:
    """Boolean layers x experts x gpus of an assignment given like that, or as the GPU of every layer's expert.

    Raises PlanError where an expert has no GPU, a GPU holds more than its slots, or more copies exist than replicas
    are allowed.
    """
    given = np.asarray(assignment)
    if given.dtype == np.bool_ and given.shape == (problem.layers, problem.experts, problem.gpus):
        holds = given
    elif given.shape == (problem.layers, problem.experts) and np.issubdtype(given.dtype, np.integer):
        if given.min() < 0 or given.max() >= problem.gpus:
            raise PlanError(f"an expert on GPU {given.min()} or {given.max()}; expected 0 to {problem.gpus - 1}")
        holds = given[..., None] == np.arange(problem.gpus)
    else:
        raise PlanError(
            f"an assignment of shape {given.shape} and type {given.dtype}; expected GPU numbers of "
            f"{(problem.layers, problem.experts)} or booleans of {(problem.layers, problem.experts, problem.gpus)}"
        )
    copies = holds.sum(axis=2)
    if copies.min() < 1:
        layer, expert = np.argwhere(copies < 1)[0]
        raise PlanError(f"layer {layer} has no GPU for expert {expert}; expected at least one copy")
    over = holds.sum(axis=1) - problem.slots_of
    if over.max() > 0:
        layer, gpu = np.argwhere(over > 0)[0]
        raise PlanError(
            f"layer {layer} puts {holds[layer, :, gpu].sum()} experts on GPU {gpu}; expected at most its "
            f"{problem.slots_of[gpu]} slots"
        )
    extra = copies.sum(axis=1) - problem.experts
    if extra.max() > problem.replicas:
        raise PlanError(
            f"layer {int(extra.argmax())} has {extra.max()} extra copies; expected at most {problem.replicas} replicas"
        )
    return holds


def split_of(problem: Problem, holds: Bools) -> Floats:
    """Share of each expert's tokens that its copies take, layers x experts x gpus."""
    even: Floats = np.asarray(holds / holds.sum(axis=2, keepdims=True))
    if problem.split == "even":
        return even
    for layer in np.flatnonzero(holds.sum(axis=(1, 2)) > problem.experts):
        even[layer] = _balanced(problem.shares[layer], holds[layer])
    return even


def objective_of(problem: Problem, assignment: ArrayLike) -> Cost:
    """Seconds per step of an assignment (GPU numbers, layers x experts; or booleans, layers x experts x gpus).

    Raises PlanError for an assignment that breaks the problem's slots or replicas.
    """
    split = split_of(problem, holds_of(problem, assignment))
    return Cost(float(load_s(problem, rank_shares(problem, split)).sum()), _all_traffic(problem, split))


def rank_shares(problem: Problem, split: Floats) -> Floats:
    """Share of a layer's choices on each GPU, layers x gpus."""
    return np.asarray(np.einsum("le,leg->lg", problem.shares, split))


def flows(problem: Problem, split: Floats) -> Floats:
    """X of the module: share of choices that move between GPUs, (layers - 1) x gpus x gpus."""
    if problem.joint is None or problem.layers < 2:
        return np.zeros((max(problem.layers - 1, 0), problem.gpus, problem.gpus))
    return np.asarray(split[:-1].transpose(0, 2, 1) @ problem.joint @ split[1:])


def load_s(problem: Problem, shares: Floats) -> Floats:
    """Seconds of the busiest GPU; shares of GPUs along the last axis."""
    return np.asarray(problem.compute_s * shares.max(axis=-1))


def dispatch_s(problem: Problem, moved: Floats) -> Floats:
    """Seconds of dispatch for flows X (..., gpus, gpus) as the problem prices them."""
    if problem.traffic == "pairs":
        return np.asarray((moved * problem.link_s).max(axis=(-2, -1)))
    if problem.traffic == "total":
        return np.asarray(np.einsum("...gh,gh->...", moved, problem.link_s) / problem.gpus)
    near = problem.node_of[:, None] == problem.node_of
    busiest = np.zeros(moved.shape[:-2])
    for ports in (near, ~near):
        if problem.link_s[ports].any():
            cost = problem.link_s * ports
            for way in ("...gh,gh->...g", "...gh,gh->...h"):
                np.maximum(busiest, np.einsum(way, moved, cost).max(axis=-1), out=busiest)
    return busiest


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


def placement_of(
    problem: Problem,
    assignment: ArrayLike,
    solver: str,
    wall_s: float,
    *,
    bound: float | None = None,
    load_bound: float | None = None,
) -> Placement:
    """The assignment with its costs, its bound no worse than `simple_bound` and no higher than what was reached."""
    holds = holds_of(problem, assignment)
    split = split_of(problem, holds)
    load = float(load_s(problem, rank_shares(problem, split)).sum())
    traffic = _all_traffic(problem, split)
    simple = simple_bound(problem)
    load_bound = max(simple.load_term, load_bound or 0.0)
    bound = max(simple.objective, load_bound + simple.traffic_term, bound or 0.0)
    return Placement(
        holds, split, load + traffic, load, traffic, min(bound, load + traffic), min(load_bound, load), solver, wall_s
    )


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


def _all_traffic(problem: Problem, split: Floats) -> float:
    return float(dispatch_s(problem, flows(problem, split)).sum())


def _gap(value: float, bound: float) -> float:
    return 0.0 if value <= 0 else max(0.0, (value - bound) / value)


def _balanced(shares: Floats, holds: Bools) -> Floats:
    """Split of one layer with the least busiest GPU: min t, sum_e w_e y_eg <= t, sum_g y_eg = 1, y >= 0."""
    e, g = np.nonzero(holds)
    n, gpus = len(e), holds.shape[1]
    column = np.arange(n)
    most = coo_array(
        (np.append(shares[e], -np.ones(gpus)), (np.append(g, np.arange(gpus)), np.append(column, np.full(gpus, n))))
    )
    whole = coo_array((np.ones(n), (e, column)), shape=(len(shares), n + 1))
    cost = np.zeros(n + 1)
    cost[n] = 1.0
    found: Any = linprog(cost, A_ub=most, b_ub=np.zeros(gpus), A_eq=whole, b_eq=np.ones(len(shares)), method="highs")
    split = np.zeros(holds.shape)
    split[e, g] = np.maximum(found.x[:n], 0.0)
    return np.asarray(split / split.sum(axis=1, keepdims=True))


def _checked_loads(loads: Floats) -> None:
    if loads.ndim != 2 or not loads.size:
        raise PlanError(f"loads of shape {loads.shape}; expected MoE layers x experts")
    if not np.isfinite(loads).all() or loads.min() < 0:
        layer, expert = np.argwhere(~(np.isfinite(loads) & (loads >= 0)))[0]
        raise PlanError(
            f"load {loads[layer, expert]} of expert {expert} in layer {layer}; expected a count or share that is not "
            "negative"
        )
    if not loads.sum(axis=1).all():
        layer = int(np.flatnonzero(loads.sum(axis=1) == 0)[0])
        raise PlanError(f"layer {layer} has no load at all; expected MoE layers only (leave dense layers out)")


def _checked_transitions(transitions: Floats, layers: int, experts: int) -> None:
    expected = (layers - 1, experts, experts)
    if transitions.shape != expected:
        raise PlanError(f"transitions of shape {transitions.shape}; expected {expected} for loads {(layers, experts)}")
    sums = transitions.sum(axis=2)
    wrong = ~(np.isclose(sums, 1.0, atol=1e-6) | (sums == 0)) | (transitions < 0).any(axis=2)
    if wrong.any():
        layer, expert = np.argwhere(wrong)[0]
        raise PlanError(
            f"transitions of expert {expert} in layer {layer} sum to {sums[layer, expert]:.6g}; expected probabilities "
            "that sum to 1, or 0 for an expert that is never chosen"
        )


def _checked_slots(slots: int | Sequence[int], gpus: int, experts: int, replicas: int) -> Indices:
    given = np.full(gpus, slots) if np.ndim(slots) == 0 else np.asarray(slots)
    if given.shape != (gpus,):
        raise PlanError(f"slots of {given.size} GPUs; expected one number, or one for each of the {gpus} GPUs")
    if given.min() < 0:
        raise PlanError(f"{given.min()} slots on a GPU; expected a number that is not negative")
    useful = int(np.minimum(given, experts).sum())
    if useful < experts:
        raise PlanError(
            f"{useful} slots on {gpus} GPUs cannot hold {experts} experts: {experts - useful} slots are missing; "
            f"expected at least {-(-experts // gpus)} slots per GPU"
        )
    if replicas < 0:
        raise PlanError(f"replicas = {replicas}; expected a number that is not negative")
    if experts + replicas > useful:
        raise PlanError(
            f"{replicas} replicas beyond the {useful - experts} slots that {experts} experts leave on {gpus} GPUs; "
            f"expected fewer replicas or {-(-(experts + replicas) // gpus)} slots per GPU"
        )
    return given.astype(np.intp)


def _checked_links(seconds_per_byte: ArrayLike, gpus: int) -> Floats:
    given = np.asarray(seconds_per_byte, dtype=np.float64)
    if given.ndim and given.shape != (gpus, gpus):
        raise PlanError(f"seconds_per_byte of shape {given.shape}; expected one number or {(gpus, gpus)}")
    links = np.array(np.broadcast_to(given, (gpus, gpus)))
    np.fill_diagonal(links, 0.0)
    if not np.isfinite(links).all():
        source, target = np.argwhere(~np.isfinite(links))[0]
        raise PlanError(f"rank {target} cannot be reached from rank {source}; expected a link between all ranks")
    if links.min() < 0:
        source, target = np.argwhere(links < 0)[0]
        raise PlanError(f"{links[source, target]} s/byte from rank {source} to {target}; expected none below 0")
    return links
