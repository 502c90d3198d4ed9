"""How many prompts per second does a replica prefill with its first tokens in time? The queue of prompts, step by step.

A prefill replica eats a stream of tokens: a step takes what has arrived, up to its budget, cut inside a prompt
(chunked) or between prompts (the other policies), and lasts as long as the step model says. The recursion over steps is
taken for many replicas and rates at once, on the requests' own arrivals and lengths, so that bursts, mixed lengths and
the sharing of a step by waiting prompts are in it: a G/G/1 queue with batches, where a formula for M/G/1 would know
only two moments and no batches. Rates are sought where the limit's statistic of TTFT reaches its seconds.

Approximations: prompts are followed first come, first served, whatever the order of the scheduler's queue; the
schedulers of a pipeline take prompts in turn, not by load, and its stages have the same shares of
every step; attention groups take equal parts of a step's prompts; KV memory never holds a prompt back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.step_model import Pieces, StepModel
from planner.scheduling import prompt_tokens_per_step
from simulator.deployment import ReplicaSpec
from simulator.limits import Limit
from simulator.workload import Requests

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Requests the queue is followed for.
REQUESTS = 2000
#: Shares of the saturated rate that are tried first, and how many between the two that enclose the limit, twice.
LOADS = (0.25, 0.55, 0.8)
REFINED = (3, 2)
#: Replicas x rates followed at once.
LANES = 1024


@dataclass(frozen=True, slots=True)
class Prefill:
    """What a replica prefills within the limits.

    rate_per_s      prompts per second; 0 where an empty replica breaks a limit
    saturated_per_s prompts per second when all have arrived; ttft_s the mean at the rate
    held_token_s    KV tokens x seconds of a request, from its arrival to its first token
    """

    rate_per_s: float
    saturated_per_s: float
    ttft_s: float
    held_token_s: float

    @property
    def utilisation(self) -> float:
        """Share of the saturated rate."""
        return self.rate_per_s / self.saturated_per_s


@dataclass(frozen=True, slots=True)
class PromptTables:
    """Seconds of prompt steps through all stages: by tokens, and of attention in (knot piece, new tokens)."""

    linear: Array
    shared: Array
    knots: Array
    base: Array
    slope: Array
    fixed_s: float
    sampled_s: float
    shares: Array


def prefill_capacities(
    specs: Sequence[ReplicaSpec],
    requests: Requests,
    limits: Sequence[Limit],
    *,
    frontend_s: float = 0.0,
    beside: Sequence[tuple[float, float]] | None = None,
    follow: int = REQUESTS,
) -> list[Prefill]:
    """Prompts per second of each replica at which every limit on ttft is still kept.

    frontend_s   added to every TTFT
    follow       requests the queue is followed for, at most
    beside       for each replica that also decodes, seconds added to every step with prompts and to every TTFT
    """
    some = requests.head(min(follow, len(requests)))
    fitting = np.cumsum(np.sort(some.prompt_tokens))
    known: dict[tuple[int, str, int, int, tuple[float, float]], int] = {}
    alike = []  # replicas whose steps cannot differ are followed once
    more = beside or [(0.0, 0.0)] * len(specs)
    for spec, added in zip(specs, more, strict=True):
        own = spec.scheduler
        budget = prompt_tokens_per_step(own)
        most = min(own.max_seqs, int(np.searchsorted(fitting, budget, side="right")) + 1)
        alike.append(known.setdefault((id(spec.model), own.policy, budget, most, added), len(known)))
    firsts = [alike.index(k) for k in range(len(known))]
    extra = np.array([more[k] for k in firsts]).reshape(-1, 2)
    found = _followed([specs[k] for k in firsts], some, limits, frontend_s, extra) if firsts else []
    return [found[k] for k in alike]


def _followed(
    specs: Sequence[ReplicaSpec], requests: Requests, limits: Sequence[Limit], frontend_s: float, beside: Array
) -> list[Prefill]:
    """The capacities of replicas that all differ: loads on a grid, then between the two that enclose the limit."""
    queue = _Queue(specs, requests, beside[:, 0])
    kinds = np.arange(len(specs))
    saturated = queue.saturated_per_s(kinds)
    rows = np.arange(len(kinds))
    low, high = np.zeros(len(kinds)), np.ones(len(kinds))
    best, worst = np.zeros(len(kinds)), np.full(len(kinds), np.inf)  # how full the fullest limit is at `low` and `high`
    ttft, held = np.zeros(len(kinds)), np.zeros(len(kinds))
    loads = np.tile(np.array(LOADS), (len(kinds), 1))
    for more in (*REFINED, 0):
        full, mean, token_s = queue.fullness(kinds, loads * saturated[:, None], limits, frontend_s + beside[:, 1])
        kept = (full <= 1).cumprod(axis=1).sum(axis=1)  # loads that keep the limits, as all lower ones do
        last, beyond = np.maximum(kept - 1, 0), np.minimum(kept, loads.shape[1] - 1)
        some, broken = kept > 0, kept < loads.shape[1]
        low, best = np.where(some, loads[rows, last], low), np.where(some, full[rows, last], best)
        ttft, held = np.where(some, mean[rows, last], ttft), np.where(some, token_s[rows, last], held)
        high, worst = np.where(broken, loads[rows, beyond], high), np.where(broken, full[rows, beyond], worst)
        loads = low[:, None] + (high - low)[:, None] * (np.arange(more) + 1) / (more + 1)
    share = np.where((low > 0) & np.isfinite(worst), (1 - best) / np.maximum(worst - best, 1e-9), 0.0)
    load = low + np.clip(share, 0.0, 1.0) * (high - low)
    return [Prefill(float(load[k] * saturated[k]), float(saturated[k]), float(ttft[k]), float(held[k])) for k in kinds]


class _Queue:
    """The prompts of the requests in front of each replica."""

    def __init__(self, specs: Sequence[ReplicaSpec], requests: Requests, beside_s: Array) -> None:
        self.beside_s = beside_s
        self.arrival = requests.arrival_s - requests.arrival_s[0]
        self.rate = requests.rate_per_s
        self.prompts = requests.prompt_tokens
        groups = np.array([spec.mapping.attention_dp for spec in specs])
        self.groups = groups
        self.budget = np.array([prompt_tokens_per_step(spec.scheduler) for spec in specs]) * groups
        self.most = np.array([spec.scheduler.max_seqs for spec in specs]) * groups
        self.cuts = np.array([spec.scheduler.policy == "chunked" for spec in specs])
        known: dict[int, int] = {}
        models: list[PromptTables] = []
        self.model = np.zeros(len(specs), dtype=np.int64)
        for k, spec in enumerate(specs):
            if id(spec.model) not in known:
                known[id(spec.model)] = len(models)
                models.append(prompt_tables(spec.model, spec.mapping.pp))
            self.model[k] = known[id(spec.model)]
        self.tables = _stacked(models)
        self.stages = np.array([spec.mapping.pp for spec in specs])
        total = len(self.prompts)
        rows: list[Ints] = []
        self.first_row = np.zeros(int(self.stages.max()) + 1, dtype=np.int64)
        for pp in np.unique(self.stages):
            self.first_row[pp] = len(rows)
            rows += [self.prompts[engine::pp] for engine in range(pp)]
        self.count = np.array([len(row) for row in rows])
        self.cum = np.zeros((len(rows), total + 1), dtype=np.int64)
        for place, row in enumerate(rows):
            self.cum[place, 1 : len(row) + 1] = np.cumsum(row)
            self.cum[place, len(row) + 1 :] = row.sum()
        self.apart = int(self.prompts.sum()) + 1  # tells the rows apart in one ascending array
        self.flat = (self.cum + np.arange(len(rows))[:, None] * self.apart).ravel()
        none, self.whole = np.zeros_like(self.prompts), np.zeros((len(models), total))
        for k, m in enumerate(self.model):
            alone, pp = self._attention(np.full(total, m), self.prompts, none), self.stages[k]
            for engine in range(pp):
                self.whole[m, engine::pp] = np.cumsum(alone[engine::pp])

    def _attention(self, model: Ints, new: Ints, before: Ints) -> Array:
        """Seconds of attention in chunks of `new` tokens after `before` others."""
        tables = self.tables
        new = np.minimum(new, tables.base.shape[2] - 1)
        piece = (before[:, None] > tables.knots[model]).sum(axis=1)
        value: Array = tables.base[model, piece, new] + tables.slope[model, piece, new] * before
        return value

    def finish_s(self, kinds: Ints, rates: Array) -> Array:
        """When each prompt has its first token, of shape (lanes, prompts); lane i is replica kinds[i] at rates[i].

        The schedulers of a pipeline take the prompts in turn, and the one whose last step left the last stage first
        starts the next; its j-th prompt is prompt j pp + engine of all.
        """
        t, model, groups, cuts = self.tables, self.model[kinds], self.groups[kinds], self.cuts[kinds]
        budget, most, pp = self.budget[kinds], self.most[kinds], self.stages[kinds]
        fixed, sampled, share = t.fixed_s[model] + self.beside_s[kinds], t.sampled_s[model], t.shares[model]
        total, lanes, engines = len(self.prompts), np.arange(len(kinds)), int(pp.max())
        slow = np.where(np.isinf(rates), 0.0, self.rate / rates)  # arrivals are stretched by this
        speed = np.where(np.isinf(rates), 0.0, rates / self.rate)
        nth = np.arange(engines)
        some = (nth[None, :] < pp[:, None]) & (nth < total)[None, :]
        head_at = np.where(some, self.arrival[np.minimum(nth, total - 1)][None, :] * slow[:, None], np.inf)
        past_of = np.zeros((len(kinds), engines), dtype=np.int64)  # tokens each engine has done
        at_of = np.zeros((len(kinds), engines), dtype=np.int64)  # its first prompt that is not complete
        ready, free = np.zeros((len(kinds), engines)), np.zeros((len(kinds), engines))
        finish = np.zeros((len(kinds), total))
        left = total * len(kinds)
        while left:
            begins = np.maximum(ready, head_at)
            engine = begins.argmin(axis=1)
            start = np.maximum(begins[lanes, engine], free[:, 0])
            live = np.isfinite(start)
            start = np.where(live, start, 0.0)
            row = self.first_row[pp] + engine
            count = self.count[row]
            head, past = np.minimum(at_of[lanes, engine], count - 1), past_of[lanes, engine]
            come = np.where(slow > 0, np.searchsorted(self.arrival, start * speed, side="right"), total)
            come = np.maximum((come - engine + pp - 1) // pp, head + 1)
            end = np.minimum(self.cum[row, come], past + budget)
            upto = np.searchsorted(self.flat, end + row * self.apart, side="right") - 1 - row * (total + 1)
            upto = np.minimum(np.minimum(upto, count), head + most)
            upto = np.where(cuts, upto, np.maximum(upto, head + 1))
            cut = cuts & (upto < head + most)
            end = np.where(cut, end, self.cum[row, upto])
            done = self.cum[row, upto]
            first = np.minimum(self.cum[row, head + 1], end) - past
            rest = np.where(upto > head, end - done, 0)
            seconds = self._attention(model, first, past - self.cum[row, head])
            seconds += self._attention(model, rest, 0 * rest)
            several = upto > head + 1
            whole = self.whole[model, np.maximum(upto - 1, 0) * pp + engine] - self.whole[model, head * pp + engine]
            seconds += np.where(several, whole, 0.0)
            prompts = upto - head + ((rest > 0) | (upto == head))
            busy = np.clip(prompts, 1, groups)  # attention groups with work
            tokens = end - past
            seconds = seconds / busy + t.linear[model, np.minimum(-(-tokens // busy), t.linear.shape[1] - 1)]
            seconds += t.shared[model, np.minimum(tokens, t.shared.shape[1] - 1)]
            seconds += fixed + sampled * -(-prompts // busy)
            leaves = start
            for stage in range(engines):
                leaves = np.maximum(leaves, free[:, stage]) + seconds * share[:, stage]
                free[:, stage] = np.where(live, leaves, free[:, stage])
            taken = np.where(live, upto - head, 0)
            who = np.repeat(lanes, taken)
            local = head[who] + np.arange(len(who)) - np.repeat(np.cumsum(taken) - taken, taken)
            finish[who, local * pp[who] + engine[who]] = leaves[who]
            left -= len(who)
            ready[lanes, engine] = np.where(live, leaves, ready[lanes, engine])
            past_of[lanes, engine] = np.where(live, end, past)
            at_of[lanes, engine] = np.where(live, upto, at_of[lanes, engine])
            following = at_of[lanes, engine] * pp + engine
            due = self.arrival[np.minimum(following, total - 1)] * slow
            head_at[lanes, engine] = np.where(following < total, due, np.inf)
        return finish

    def fullness(self, kinds: Ints, rates: Array, limits: Sequence[Limit], frontend_s: Array) -> tuple[Array, ...]:
        """Fullest limit's statistic over its seconds, mean TTFT and mean token-seconds of KV, by replica and rate."""
        each = rates.shape[1]
        full, mean, held = np.zeros(rates.size), np.zeros(rates.size), np.zeros(rates.size)
        lane_kinds, lane_rates = np.repeat(kinds, each), rates.ravel()
        for some in self._blocks(lane_kinds):
            rate = lane_rates[some]
            ttft = self.finish_s(lane_kinds[some], rate) - self.arrival[None, :] * (self.rate / rate)[:, None]
            held[some] = (ttft * self.prompts).mean(axis=1)
            ttft = ttft + frontend_s[lane_kinds[some], None]
            mean[some] = ttft.mean(axis=1)
            for limit in limits:
                value = mean[some] if limit.quantile is None else np.quantile(ttft, limit.quantile, axis=1)
                full[some] = np.maximum(full[some], value / limit.seconds)
        return full.reshape(rates.shape), mean.reshape(rates.shape), held.reshape(rates.shape)

    def saturated_per_s(self, kinds: Ints) -> Array:
        """Prompts per second of each kind when all have arrived."""
        found = np.zeros(len(kinds))
        for some in self._blocks(kinds):
            found[some] = len(self.prompts) / self.finish_s(kinds[some], np.full(len(some), np.inf)).max(axis=1)
        return found

    def _blocks(self, kinds: Ints) -> Iterator[Ints]:
        """Positions of lanes that are followed together: pipelines of similar depth."""
        depth = np.ceil(np.log2(self.stages[kinds]))
        for deep in np.unique(depth):
            mine = np.flatnonzero(depth == deep)
            for start in range(0, len(mine), LANES):
                yield mine[start : start + LANES]


def prompt_tables(model: StepModel, pp: int) -> PromptTables:
    """Sums over the stages of a step model."""
    linear = np.sum([np.asarray(stage.linear) for stage in model.stages], axis=0)
    linear = linear + (pp - 1) * np.asarray(model.transfer)
    knots = np.array(sorted({knot for stage in model.stages for knot in stage.prefill.knots}))
    edges = np.concatenate([[0.0], knots, [np.inf]])
    inside = np.where(np.isinf(edges[1:]), edges[:-1] + 1, edges[1:])
    pieces = [[_piece(stage.prefill, x) for stage in model.stages] for x in inside]
    base = np.array([np.sum([part[0] for part in parts], axis=0) for parts in pieces])
    slope = np.array([np.sum([part[1] for part in parts], axis=0) for parts in pieces])
    head = sum(float(stage.head[1]) for stage in model.stages)
    engine = model.engine
    width = model.max_tokens
    each = [stage.linear[width] + stage.prefill.base[0][width] + stage.shared[-1] for stage in model.stages]
    each[0] += engine.step_overhead_s + engine.prompt_overhead_s
    return PromptTables(
        linear,
        np.sum([np.asarray(stage.shared) for stage in model.stages], axis=0),
        knots,
        base,
        slope,
        engine.step_overhead_s + engine.prompt_overhead_s + head,
        engine.sequence_overhead_s,
        np.array(each) / sum(each),
    )


def _piece(pieces: Pieces, x: float) -> tuple[Array, Array]:
    """Base and slope at x by new tokens."""
    at = int(np.searchsorted(pieces.knots, x)) if pieces.knots else 0
    return np.asarray(pieces.base[at]), np.asarray(pieces.slope[at])


@dataclass(frozen=True, slots=True)
class _Stack:
    """The same of several models, the model first; knots that a model lacks are at infinity."""

    linear: Array
    shared: Array
    knots: Array
    base: Array
    slope: Array
    fixed_s: Array
    sampled_s: Array
    shares: Array


def _stacked(models: Sequence[PromptTables]) -> _Stack:
    """Tables padded to one shape: sizes beyond a table's end are read at its end."""
    deep, stages = max(len(m.knots) for m in models), max(len(m.shares) for m in models)
    knots = np.full((len(models), deep), np.inf)
    for i, m in enumerate(models):
        knots[i, : len(m.knots)] = m.knots

    def grown(arrays: list[Array]) -> Array:
        wide = max(a.shape[-1] for a in arrays)
        rows = max(a.shape[0] for a in arrays) if arrays[0].ndim > 1 else 0
        out = []
        for a in arrays:
            a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, wide - a.shape[-1])], mode="edge")
            out.append(np.pad(a, [(0, rows - a.shape[0]), (0, 0)], mode="edge") if rows else a)
        return np.stack(out)

    return _Stack(
        grown([m.linear for m in models]),
        grown([m.shared for m in models]),
        knots,
        grown([m.base for m in models]),
        grown([m.slope for m in models]),
        np.array([m.fixed_s for m in models]),
        np.array([m.sampled_s for m in models]),
        np.array([np.pad(m.shares, (0, stages - len(m.shares))) for m in models]),
    )
