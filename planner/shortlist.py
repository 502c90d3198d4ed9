"""Which plans are worth simulating, in which order: all legal ones with bounds no simulation can beat."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from math import ceil, inf

import numpy as np

from hwmodels.energy import RUNNING
from planner.bounds import Screen
from planner.catalogue import Catalogue, Kind, kind_of
from planner.errors import NoFeasiblePlanError
from planner.fit import nothing_fits
from planner.offloadchoices import offered
from planner.plan import Plan, Pool
from planner.question import Question
from planner.scheduling import prompt_tokens_per_step, scheduler_of
from planner.space import Space, enumerate_pools, replicas_that_fit
from simulator.limits import Limit

#: Stands for the objective latency among the limits; nobody is held to it.
MEAN_E2E = Limit("e2e", "mean", 1e9)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A plan and what no simulation of it can beat.

    bound              the objective as a score, higher is better
    rate_bound_per_s   requests per second over the whole run
    kind               how its replicas are cut and kept, and what of their experts is away
    kv_blocks          of each of their schedulers
    """

    plan: Plan
    bound: float
    rate_bound_per_s: float
    kind: Kind
    kv_blocks: int


@dataclass(frozen=True, slots=True)
class Least:
    """What no simulation of a replica can beat: busy seconds for all requests, mean end-to-end time."""

    busy_s: float
    mean_e2e_s: float


@dataclass(slots=True)
class Shortlist:
    """Candidates, best bound first, and what became of the other plans.

    considered     plans looked at
    pruned         how many each law or bound took out
    floors         least value of each limit's statistic over all plans
    fastest_per_s  highest bound on the rate of any plan
    """

    candidates: list[Candidate] = field(default_factory=list)
    considered: int = 0
    pruned: Counter[str] = field(default_factory=Counter)
    floors: dict[Limit, float] = field(default_factory=dict)
    fastest_per_s: float = 0.0


def shortlist(question: Question, catalogue: Catalogue) -> Shortlist:
    """All plans that their bounds leave possible.

    Raises NoFeasiblePlanError when nothing fits, or no bound leaves a plan: the message says which limit, and the best
    value of it that can be reached.
    """
    requests, cluster = question.requests, catalogue.cluster
    if question.objective == "cost" and cluster.device.price_usd_per_h is None:
        raise NoFeasiblePlanError(
            f"objective cost: {cluster.device.name} has no price; give its profile a price_usd_per_h"
        )
    longest = int((requests.prompt_tokens + requests.output_tokens).max())
    if longest > catalogue.model.max_context_tokens:
        raise NoFeasiblePlanError(
            f"longest request: {longest} tokens; {catalogue.model.name} takes at most "
            f"{catalogue.model.max_context_tokens}; "
            "choose a model of longer context or drop the longest requests"
        )
    space = _space(question, catalogue, longest)
    result = Shortlist(considered=len(space.pools) + space.broken.total(), pruned=space.broken)
    if not space.pools and question.choices.away is not None:
        raise NoFeasiblePlanError(
            f"{question.model} on {question.gpus} x {question.hardware} with experts that are away: no plan is left; "
            + ", ".join(f"{count} break {law!r}" for law, count in space.broken.most_common(3))
        )
    if not space.pools:
        raise nothing_fits(question, catalogue, longest)
    catalogue.reserve(max(pool.token_budget for pool, _ in space.pools), max(pool.max_seqs for pool, _ in space.pools))
    groups: dict[Kind, list[tuple[Pool, int]]] = defaultdict(list)
    for pool, kv_blocks in space.pools:
        groups[kind_of(pool)].append((pool, kv_blocks))
    caching = question.choices.prefix_caching != "off"
    screen = Screen(requests, (*question.limits, MEAN_E2E), caching=caching)
    result.floors = dict.fromkeys(question.limits, inf)
    for kind, pools in groups.items():
        mapping, model = kind[0], catalogue.step_model(*kind)
        budgets = np.array([pool.token_budget for pool, _ in pools])
        seqs = np.array([pool.max_seqs for pool, _ in pools], dtype=float)
        kv_tokens = np.array([blocks * pool.block_tokens for pool, blocks in pools], dtype=float)
        chunks = np.array([prompt_tokens_per_step(scheduler_of(pool)) for pool, _ in pools])
        busy_s = screen.work_s(model, mapping.attention_dp, seqs, budgets, kv_tokens, chunks)
        floors = screen.latency_s(model, mapping.attention_dp, chunks)
        for limit in question.limits:
            result.floors[limit] = min(result.floors[limit], float(floors[limit].min()))
        for position, (pool, kv_blocks) in enumerate(pools):
            broken = next((limit for limit in question.limits if floors[limit][position] > limit.seconds), None)
            if broken is not None:
                result.pruned[f"an empty machine keeps {broken}"] += 1
                continue
            least = Least(float(busy_s[position]), float(floors[MEAN_E2E][position]))
            _add_plans(result, question, catalogue, kind, pool, kv_blocks, least)
    if not result.candidates:
        raise _nothing_left(question, result)
    preferred = {"chunked": 0, "prefill-first": 1, "orca": 2, "layered": 3, "static": 4}
    result.candidates.sort(
        key=lambda c: (
            -c.bound,
            preferred[c.plan.pools[0].policy],
            abs(c.plan.pools[0].token_budget - 2048),
            -c.plan.pools[0].max_seqs,
        )
    )
    return result


def _space(question: Question, catalogue: Catalogue, longest: int) -> Space:
    """All legal replicas; where none fits, those that leave some of their experts to the host."""
    space = enumerate_pools(catalogue, question.choices, longest)
    away = offered(catalogue) if not space.pools and question.choices.away is None else None
    if away is None:
        return space
    found = enumerate_pools(catalogue, replace(question.choices, away=away), longest)
    return Space(found.pools, space.broken + found.broken)


def _add_plans(
    result: Shortlist,
    question: Question,
    catalogue: Catalogue,
    kind: Kind,
    pool: Pool,
    kv_blocks: int,
    least: Least,
) -> None:
    """The plans made of copies of one replica that can serve the demanded rate by their bound."""
    rate_each = len(question.requests) / least.busy_s
    most = replicas_that_fit(pool.gpus_per_replica, catalogue.cluster)
    result.fastest_per_s = max(result.fastest_per_s, most * rate_each)
    needs_rate = question.objective != "goodput-per-gpu" or question.rate_per_s is not None
    fewest = max(1, ceil(question.demanded_per_s / rate_each - 1e-9)) if needs_rate else 1
    if most < fewest:
        result.pruned["the bound on its rate reaches the demand"] += 1
        return
    counts = range(fewest, most + 1) if question.objective in ("fewest-gpus", "cost", "energy") else (most,)
    result.considered += len(counts) - 1
    for count in counts:
        plan = Plan(
            question.model,
            question.hardware,
            question.gpus,
            (replace(pool, replicas=count),),
            question.engine,
            question.router,
        )
        bound = _bound(question, catalogue, plan, count * rate_each, least)
        result.candidates.append(Candidate(plan, bound, count * rate_each, kind, kv_blocks))


def _bound(question: Question, catalogue: Catalogue, plan: Plan, rate_bound_per_s: float, least: Least) -> float:
    """The score that no simulation of the plan exceeds."""
    device, gpus = catalogue.cluster.device, plan.gpus_used
    if question.objective == "goodput-per-gpu":
        return rate_bound_per_s / question.gpus
    if question.objective == "fewest-gpus":
        return -float(gpus)
    tokens = float(question.requests.output_tokens.sum())
    arriving_s = (len(question.requests) - 1) / question.demanded_per_s
    span_s = max(arriving_s, len(question.requests) / rate_bound_per_s)
    if question.objective == "cost":
        return -(device.price_usd_per_h or 0.0) * gpus * span_s / 3600 / tokens * 1e6
    if question.objective == "energy":
        # Idle power all the time, and what running at all adds on the ranks of one stage and one attention group, at
        # least one of which is running for as long as the work takes.
        running_w = (device.tdp_w - device.idle_w) * RUNNING
        ranks = plan.pools[0].tp * plan.pools[0].cp
        return -(device.idle_w * gpus * span_s + running_w * least.busy_s * ranks) / tokens
    return -least.mean_e2e_s


def _nothing_left(question: Question, result: Shortlist) -> NoFeasiblePlanError:
    """Say which limit or rate no plan can keep, and what the best would be."""
    for limit in question.limits:
        if result.floors[limit] > limit.seconds:
            return NoFeasiblePlanError(
                f"{limit}: no plan on {question.gpus} x {question.hardware} gets below {result.floors[limit]:.4g} s "
                "even on an empty machine; relax the limit, use faster devices, or narrower weights"
            )
    needed = ceil(question.gpus * question.demanded_per_s / max(result.fastest_per_s, 1e-9))
    return NoFeasiblePlanError(
        f"rate {question.demanded_per_s:g}/s: no plan on {question.gpus} x {question.hardware} can exceed "
        f"{result.fastest_per_s:.3g}/s; expected about {needed} devices or a lower rate"
    )
