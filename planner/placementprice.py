"""How many seconds per step does a placement cost?

What counts are the seconds per step that depend on the placement, with w_le the share of layer l's expert choices that
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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linprog
from scipy.sparse import coo_array

from planner.errors import PlanError
from planner.placementproblem import Bools, Floats, Problem


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds per step of a placement."""

    load_term: float
    traffic_term: float

    @property
    def objective(self) -> float:
        """Both terms."""
        return self.load_term + self.traffic_term


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
    return Cost(float(load_s(problem, rank_shares(problem, split)).sum()), all_traffic(problem, split))


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


def all_traffic(problem: Problem, split: Floats) -> float:
    """Seconds of dispatch of all pairs of layers."""
    return float(dispatch_s(problem, flows(problem, split)).sum())


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
