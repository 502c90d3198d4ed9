"""Bounds no simulation can beat: work that has to be done, for all plans in one numpy pass.

A replica that serves n requests spends at least the time of the steps they need. Let X be their tokens, D their
decode tokens, K the cached tokens their decode steps attend to. For one scheduler and one pipeline stage

    busy >= N h(X/N) + zeta K + delta N + kappa sum p^2/2 + eta (D + n),     N = max(N_min, X/T*)

with h the lower convex hull of the stage's time over the tokens of a step (so that sum h(T_i) >= N h(X/N) by Jensen),
T* its best tokens per step, zeta, delta, kappa, eta the least time per cached token, decode step, query-key pair and
sampled token, and N_min the fewest decode steps: no step holds more than max_seqs sequences, nor more tokens than
the KV pool, nor, on average over the tokens of requests that meet a TPOT limit s, more sequences than the line below
the decode step time reaches at s (if sum w_i t_i <= s sum w_i and t_i >= a + b w_i, then
sum w_i^2 <= (s - a)/b sum w_i, and N >= (sum w)^2 / sum w^2 by Cauchy and Schwarz). Steps with
prompt tokens, at least as many as full budgets of them, take the engine's prompt overhead. Attention groups in lockstep
share the work: the mean of the busy ones is below their maximum, so the formula holds with X, D and K divided by the
groups; h then is the hull of what a group does by itself plus that of what all do together, and delta counts only the
decode steps that a group has to take for itself. Floors of latency are for a request that finds all groups idle.

Prompts that pass a group of layers a step (policy layered) pass every layer once, beside its decodes or alone, so that
the formula holds layer by layer, N counting the steps in which a layer has tokens. Limits on the prompts of a step
make steps with prompts more, and no order of the queue changes what has to be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.step_model import Pieces, StepModel, Tables, token_grid
from simulator.blockhashes import shared_blocks
from simulator.limits import Limit
from simulator.workload import Requests

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a set of requests needs of any plan.

    requests, tokens, decode_tokens, context_tokens   n, X, D and K of the module's formula
    pairs   sum of p^2/2 over prompts of p tokens
    """

    requests: int
    tokens: float
    decode_tokens: float
    context_tokens: float
    pairs: float


def computed_prompts(requests: Requests) -> NDArray[np.int64]:
    """Prompt tokens that have to be computed even if nothing is ever forgotten; at least the last of each.

    A cache holds no block before a request that has it was there, so of blocks that several have the first computes
    them; with one queue for each cache, requests are computed in the order of their arrival. In another order a later
    one may compute them, but then while this one waits, so that neither the work nor its wait is less.
    """
    return np.maximum(1, _computed_at_least(requests))


def _computed_at_least(requests: Requests) -> NDArray[np.int64]:
    """As computed_prompts, but 0 for prompts found whole: which these are, an order of the queue may change."""
    prompts: NDArray[np.int64] = requests.prompt_tokens.astype(np.int64)
    if requests.block_hashes is None:
        return prompts
    found = shared_blocks(requests.block_hashes) * requests.block_hashes.block_tokens
    return prompts - np.minimum(prompts, found)


def demand(requests: Requests, *, caching: bool = False) -> Demand:
    """The demand of the requests.

    caching   whether KV is kept for prompts that begin alike: decodes attend to all of it, and what is computed of a
              prompt attends at least to itself
    """
    p = requests.prompt_tokens.astype(float)
    d = requests.output_tokens.astype(float) - 1.0
    new = _computed_at_least(requests).astype(float) if caching else p
    context = float((p * d + d * (d + 1) / 2).sum())
    return Demand(len(p), float((new + d).sum()), float(d.sum()), context, float((new * new / 2).sum()))


@dataclass(frozen=True, slots=True)
class StageBound:
    """Coefficients of one pipeline stage; see the module.

    hull       h at 0, 1, 2 ... tokens of a group, when all groups have as many
    best       T* for every token budget: the tokens per step with the least h per token
    decode     least time of a decode step of 0, 1, 2 ... sequences a group, convex
    alone      h when the other groups are idle
    token      least time of a decode step, when the other groups are idle
    sample     least time that sampling adds to a step
    """

    hull: Array
    best: NDArray[np.int64]
    decode: Array
    alone: Array
    token: float
    sample: float
    zeta: float
    delta: float
    kappa: Array
    eta: float


def lower_hull(values: Array, points: Sequence[int]) -> Array:
    """The largest convex sequence below values[1:], linear between `points`; values[0] continues the first slope.

    >>> lower_hull(np.array([0.0, 3.0, 5.0, 5.0, 9.0]), [1, 2, 3, 4]).tolist()
    [2.0, 3.0, 4.0, 5.0, 9.0]
    """
    stack: list[int] = []
    for x in points:
        while len(stack) >= 2:
            a, b = stack[-2], stack[-1]
            if (values[b] - values[a]) * (x - b) < (values[x] - values[b]) * (b - a):
                break
            stack.pop()
        stack.append(x)
    hull: Array = np.interp(np.arange(len(values)), stack, values[stack])
    if len(hull) > 2:
        hull[0] = max(0.0, 2 * hull[1] - hull[2])
    return hull


def convex_below(values: Array) -> Array:
    """The largest convex sequence below values[1:] but for rounding; corners are sought on the grid of prices first."""
    points = token_grid(len(values) - 1).astype(int)
    while True:
        hull = lower_hull(values, points.tolist())
        excess = hull[1:] - values[1:]
        above = np.flatnonzero(excess > 1e-12 * values[1:]) + 1
        if not len(above):
            return hull
        worst_first = above[np.argsort(-excess[above - 1])]
        _, worst = np.unique(np.searchsorted(points, worst_first), return_index=True)
        points = np.union1d(points, worst_first[worst])


def _best(hull: Array) -> NDArray[np.int64]:
    """For every token budget, the tokens per step with the least hull per token."""
    tokens = np.arange(1, len(hull))
    per_token = hull[1:] / tokens
    best = np.maximum.accumulate(np.where(per_token <= np.minimum.accumulate(per_token), tokens, 1))
    return np.concatenate([[1], best])


def _least_per(pieces: Pieces, rows: int, reach: float, lowest: float) -> tuple[Array, Array]:
    """Slope below every piece and what is left of the value when it is taken off, by row."""
    base = np.stack([np.asarray(piece) for piece in pieces.base])[:, 1 : rows + 1]
    slope = np.stack([np.asarray(piece) for piece in pieces.slope])[:, 1 : rows + 1]
    ends = np.array([lowest, *pieces.knots, reach])
    least = slope.min(axis=0)
    left = np.minimum(base + (slope - least) * ends[:-1, None], base + (slope - least) * ends[1:, None]).min(axis=0)
    return least, left


def stage_bound(tables: Tables, model: StepModel, groups: int, reach: float, *, overhead: bool) -> StageBound:
    """Coefficients of one stage."""
    tokens, rows = np.arange(model.max_tokens + 1), model.max_seqs
    counts = np.arange(1, rows + 1)
    fixed = model.engine.step_overhead_s if overhead else 0.0
    per_sequence = model.engine.sequence_overhead_s if overhead else 0.0
    own = fixed + np.asarray(tables.linear)
    shared, head = np.asarray(tables.shared), np.asarray(tables.head)[1:]
    # A mean of T tokens over the groups is, rounded up, at least (T - 1) groups + 1 tokens in all.
    together = shared[np.maximum(0, (tokens - 1) * groups + 1)]
    own_hull, together_hull = convex_below(own), convex_below(together)
    hull = own_hull + together_hull

    slope, left = _least_per(tables.decode, rows, reach, 1.0)
    zeta = float((slope / counts).min())
    # slope is per unit of mean context: n sequences of mean context c attend to n c tokens
    residual = left + (slope - zeta * counts)  # at the shortest mean context, 1
    delta = max(0.0, float(residual.min()))
    eta = float((head / np.arange(1, len(head) + 1)).min()) + per_sequence

    group = own[np.minimum(counts, model.max_tokens)] + left + slope + head[:rows] + per_sequence * counts
    group = np.concatenate([[0.0], np.minimum.accumulate(group[::-1])[::-1]])
    decode = convex_below(group) + convex_below(together[np.minimum(np.arange(rows + 1), model.max_tokens)])

    prefill_slope, prefill_left = _least_per(tables.prefill, model.max_tokens, reach, 0.0)
    news = np.arange(1, model.max_tokens + 1)
    kappa = np.minimum(prefill_slope / news, np.maximum(prefill_left, 0) / (news * (news + 1) / 2))
    kappa = np.concatenate([[0.0], np.minimum.accumulate(kappa)])
    alone = hull if groups == 1 else own_hull + convex_below(shared[: model.max_tokens + 1])
    token, sample = float(group[1] + shared[1]), float(head[0]) + per_sequence
    return StageBound(hull, _best(hull), decode, alone, token, sample, zeta, delta, kappa, eta)


@dataclass(frozen=True, slots=True)
class ReplicaBound:
    """Coefficients of a replica: of its distinct stages, and summed over all of them for what passes through.

    decode, alone, token, sample, kappa   sums of those of StageBound; best as there, for `alone`
    """

    stages: list[StageBound]
    decode: Array
    alone: Array
    best: NDArray[np.int64]
    token: float
    sample: float
    kappa: Array


def replica_bound(model: StepModel, groups: int, reach: float) -> ReplicaBound:
    """Coefficients of a replica whose requests have up to `reach` tokens."""
    known: dict[int, StageBound] = {}
    every = []
    for stage, tables in enumerate(model.stages):
        mark = id(tables) if stage else 0
        if mark not in known:
            known[mark] = stage_bound(tables, model, groups, reach, overhead=stage == 0)
        every.append(known[mark])
    alone = np.sum([bound.alone for bound in every], axis=0)
    return ReplicaBound(
        list(known.values()),
        np.sum([bound.decode for bound in every], axis=0),
        alone,
        _best(alone),
        sum(bound.token for bound in every),
        sum(bound.sample for bound in every),
        np.sum([bound.kappa for bound in every], axis=0),
    )


class Screen:
    """Bounds of plans, vectorised over the plans that share a step model.

    caching   whether the plans keep KV for prompts that begin alike; sequences then share blocks, so that the KV pool
              says nothing of how many run
    """

    def __init__(self, requests: Requests, limits: Sequence[Limit], *, caching: bool = False) -> None:
        self.caching = caching
        self.demand = demand(requests, caching=caching)
        self.limits = tuple(limits)
        self._reach = float((requests.prompt_tokens + requests.output_tokens).max())
        prompts = np.sort(computed_prompts(requests) if caching else requests.prompt_tokens)
        decodes = np.sort(requests.output_tokens - 1)
        self._prompt_at = {limit: _order_statistic(prompts, limit) for limit in self.limits}
        self._decodes_at = {limit: _order_statistic(decodes, limit) for limit in self.limits}
        self._strict = {limit: _strict_tokens(decodes, limit) for limit in self.limits}
        self._known: dict[tuple[int, int], ReplicaBound] = {}

    def _bounds(self, model: StepModel, groups: int) -> ReplicaBound:
        """Coefficients of a replica, derived once."""
        key = (id(model), groups)
        if key not in self._known:
            self._known[key] = replica_bound(model, groups, self._reach)
        return self._known[key]

    def work_s(
        self,
        model: StepModel,
        groups: int,
        max_seqs: Array,
        budgets: NDArray[np.int64],
        kv_tokens: Array,
        chunks: NDArray[np.int64] | None = None,
    ) -> Array:
        """Least busy seconds of one replica that serves the whole demand, one value per plan (the module's formula).

        max_seqs, budgets, kv_tokens   of each plan's schedulers
        chunks                         prompt tokens of their steps at most; None: the budgets
        """
        chunks = budgets if chunks is None else chunks
        need = self.demand
        replica = self._bounds(model, groups)
        tokens, decodes, context = need.tokens / groups, need.decode_tokens / groups, need.context_tokens / groups
        fewest = own = np.maximum(decodes / max_seqs, 0.0 if self.caching else context / kv_tokens)
        for limit in self.limits:
            if self._strict[limit]:
                fewest = np.maximum(
                    fewest, self._strict[limit] / groups / _most_sequences(replica.decode, limit.seconds)
                )
        if groups == 1:
            own = fewest
        result = np.zeros(len(budgets))
        prompt_steps = (tokens - decodes) / chunks
        for stage, bound in enumerate(replica.stages):
            steps = np.maximum(fewest, tokens / bound.best[budgets])
            busy = steps * _between(bound.hull, tokens / steps) + bound.zeta * context + bound.delta * own
            busy += bound.kappa[chunks] * need.pairs / groups + bound.eta * (decodes + need.requests / groups)
            if stage == 0:
                busy += prompt_steps * model.engine.prompt_overhead_s
            result = np.maximum(result, busy)
        return result

    def latency_s(self, model: StepModel, groups: int, budgets: NDArray[np.int64]) -> dict[Limit, Array]:
        """The least value each limit's statistic can take, one per plan: every request finds an empty machine.

        budgets   prompt tokens of a step at most
        """
        replica = self._bounds(model, groups)
        found: dict[Limit, Array] = {}
        for limit in self.limits:
            prompt, decodes = self._prompt_at[limit], self._decodes_at[limit]
            chunks = np.maximum(1.0, prompt / replica.best[budgets])
            engine = model.engine
            first = engine.request_overhead_s + np.maximum(1.0, prompt / budgets) * engine.prompt_overhead_s
            first = first + chunks * _between(replica.alone, prompt / chunks)
            first += replica.kappa[budgets] * prompt * prompt / 2
            first += replica.sample
            if limit.metric == "ttft":
                found[limit] = first
            elif limit.metric == "e2e" and limit.quantile is None:
                found[limit] = first + decodes * replica.token  # both convex, so at most their mean over the requests
            elif limit.metric == "e2e":
                found[limit] = np.maximum(first, decodes * replica.token)
            else:
                found[limit] = np.full(len(budgets), replica.token)
        return found


def _between(values: Array, at: Array) -> Array:
    """values at real positions, linear between."""
    low = np.minimum(at.astype(int), len(values) - 2)
    between: Array = values[low] + (at - low) * (values[low + 1] - values[low])
    return between


def _order_statistic(ascending: NDArray[np.int64], limit: Limit) -> float:
    """The value at the limit's quantile, rounded down to an element; for a limit on the mean, the mean."""
    if limit.quantile is None:
        return float(ascending.mean())
    return float(ascending[int(np.floor(limit.quantile * (len(ascending) - 1)))])


def _strict_tokens(decodes: NDArray[np.int64], limit: Limit) -> float:
    """Decode tokens that must keep a TPOT or ITL limit even if those left out are as many as its quantile allows."""
    if limit.quantile is None or limit.metric not in ("tpot", "itl"):
        return 0.0
    if limit.metric == "itl":
        return float(np.floor(limit.quantile * (decodes.sum() - 1)))
    several = decodes[decodes > 0]
    return float(several[: int(np.floor(limit.quantile * (len(several) - 1)))].sum()) if len(several) else 0.0


def _most_sequences(decode: Array, seconds: float) -> float:
    """Where the supporting line of the convex decode step time reaches `seconds`, in sequences; at least 1."""
    inside = min(int(np.searchsorted(decode[1:], seconds, side="right")), len(decode) - 2)
    if inside < 1:
        return 1.0
    slope = decode[inside + 1] - decode[inside]
    return float(max(1.0, inside + (seconds - decode[inside]) / slope)) if slope > 0 else float("inf")
