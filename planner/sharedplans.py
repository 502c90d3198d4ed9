"""Which replicas that prefill and decode at once, under which rule, keep the limits at the highest rate?"""

from __future__ import annotations

import time
from dataclasses import replace

from planner.catalogue import Catalogue, mapping_of, precision_of
from planner.estimate import estimate_rate_per_s
from planner.plan import Plan, Pool
from planner.question import Question
from planner.schedules import Schedules
from planner.space import enumerate_pools, replicas_that_fit
from planner.trial import Trial, attempt, capacity
from planner.workers import Workers, available_cpus

#: Ways of cutting that are tried under every rule, and plans of those that are measured with all requests.
CUTS, MEASURED = 3, 2
ROUGH_REQUESTS, ROUGH_TOLERANCE = 1500, 0.08
#: Tokens in a prefill step.
BUDGET = 2048

#: Static shares that are tried: prefill, decode.
SPLITS = ((0.3, 0.7), (0.5, 0.5), (0.6, 1.0), (1.0, 1.0))

Measured = tuple[Plan, Trial | None, list[Trial]]


def shared_plans(question: Question, catalogue: Catalogue, until_s: float) -> list[Measured]:
    """Plans, the best first, with their trial at the highest rate within the limits (at the demanded rate for other
    objectives), None where they kept none, and all trials made.

    until_s   value of time.perf_counter() from which on no further plan is begun
    """
    pools = _cuts(question, catalogue)
    plans = [_plan(question, catalogue, ruled) for pool in pools for ruled in _rules(question, pool)]

    energy = question.objective == "energy"

    def measure(task: tuple[Plan, float]) -> Measured:
        plan, guess = task
        if time.perf_counter() > until_s and not guess:
            return plan, None, []
        deployment = catalogue.deployment(plan, with_work=energy)
        if question.objective != "goodput-per-gpu":
            trial = attempt(
                deployment,
                question.requests,
                question.demanded_per_s,
                question.limits,
                question.seed,
                energy=energy,
            )
            return plan, trial if trial.meets else None, [trial]
        rate = guess or plan.pools[0].replicas * _estimate(question, catalogue, plan.pools[0])
        best, trials = capacity(
            deployment,
            question.requests if guess else question.requests.head(ROUGH_REQUESTS),
            question.limits,
            question.seed,
            at_most_per_s=8 * rate,
            guess_per_s=rate,
            tolerance=question.tolerance if guess else max(question.tolerance, ROUGH_TOLERANCE),
            until_s=until_s,
        )
        if best is not None and question.rate_per_s is not None and best.rate_per_s < question.rate_per_s:
            best = None
        return plan, best, trials

    for plan in plans:
        catalogue.replica(plan.pools[0], with_work=energy)  # compiled before the workers are forked
    with Workers(measure, question.jobs or available_cpus()) as workers:
        first = workers.map([(plan, 0.0) for plan in plans])
        if question.objective != "goodput-per-gpu":
            return first
        kept = sorted((one for one in first if one[1] is not None), key=_rate, reverse=True)[:MEASURED]
        again = workers.map([(plan, trial.rate_per_s) for plan, trial, _ in kept if trial is not None])
    return sorted(again, key=_rate, reverse=True) + [one for one in first if one[1] is None]


def _rules(question: Question, pool: Pool) -> list[Pool]:
    """The pool under every rule that is tried for the question's limits."""
    plain = replace(pool, policy="chunked", role="aggregated")
    found = [replace(plain, sharing="static", shares=split) for split in SPLITS]
    found.append(replace(plain, sharing="nexus"))
    ttft_s = min((limit.seconds for limit in question.limits if limit.metric == "ttft"), default=None)
    tpot_s = min((limit.seconds for limit in question.limits if limit.metric == "tpot"), default=None)
    if ttft_s is not None and tpot_s is not None:
        found.append(replace(plain, sharing="semi-pd", targets_s=(ttft_s, tpot_s)))
    return found


def _rate(measured: Measured) -> float:
    return measured[1].goodput_per_s if measured[1] is not None else 0.0


def _cuts(question: Question, catalogue: Catalogue) -> list[Pool]:
    """The ways of cutting a replica that are guessed to serve most per device, as many as are tried.

    Phases beside each other have schedulers of their own, whose order is the rule's and whose collectives are not cut.
    """
    longest = int((question.requests.prompt_tokens + question.requests.output_tokens).max())
    allowed = question.choices
    budget = BUDGET if BUDGET in allowed.token_budgets else allowed.token_budgets[-1]
    seqs = max((n for n in allowed.max_seqs if n <= budget), default=budget)
    choices = replace(
        allowed, policies=("chunked",), token_budgets=(budget,), max_seqs=(seqs,), away=None, schedules=Schedules()
    )  # fmt: skip
    pools = [
        pool
        for pool, _ in enumerate_pools(catalogue, choices, longest).pools
        if pool.pp == pool.attention_dp == pool.cp == 1 and replicas_that_fit(pool.gpus_per_replica, catalogue.cluster)
    ]
    order = sorted(pools, key=lambda pool: -_estimate(question, catalogue, pool) / pool.gpus_per_replica)
    return order[:CUTS]


def _estimate(question: Question, catalogue: Catalogue, pool: Pool) -> float:
    """Requests per second that one replica is guessed to serve."""
    model = catalogue.step_model(mapping_of(pool), precision_of(pool))
    return estimate_rate_per_s(model, mapping_of(pool), question.requests, question.limits)


def _plan(question: Question, catalogue: Catalogue, pool: Pool) -> Plan:
    """As many replicas as fit."""
    most = min(replicas_that_fit(pool.gpus_per_replica, catalogue.cluster), question.gpus // pool.gpus_per_replica)
    pools = (replace(pool, replicas=max(most, 1)),)
    return Plan(question.model, question.hardware, question.gpus, pools, question.engine, question.router)
