"""Which pools of which replicas on which devices? Sized by an integer program from capacities, then simulated."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

from hwmodels.memory import kv_bytes_per_rank
from planner.capacities import capacities, option
from planner.catalogue import Catalogue, precision_of
from planner.errors import NoFeasiblePlanError, PlanError
from planner.options import Budget, Demand, Option, Service
from planner.plan import Plan, Pool
from planner.poolprogram import Goal
from planner.pools import Point, Sizing, size_pools
from planner.promising import promising
from planner.question import Question
from planner.schedules import DEFAULTS
from planner.space import enumerate_pools
from planner.trial import Trial, attempt, capacity
from planner.workers import Workers, available_cpus
from simulator.deployment import Role

#: Tokens in a step of a prefill replica, and of a decode replica (which recomputes what it had to preempt).
PREFILL_TOKENS, DECODE_TOKENS = (2048, 8192), 2048
#: Prompts in a step of a prefill replica.
PREFILL_SEQS = 256
#: Requests whose queue is followed for a capacity.
FOLLOWED = 1000
#: Kinds of replicas in one plan.
MOST_KINDS = 3
#: Points of the program that are simulated: with few requests, then the best of them with all.
LOOKED_AT, MEASURED = 8, 3
ROUGH_REQUESTS, ROUGH_TOLERANCE = 2000, 0.05
#: Demands the program is given, one after the other, until a point keeps the limits when simulated.
MARGINS = (1.0, 1.1, 1.25, 1.5)

GOALS: dict[str, Goal] = {
    "goodput-per-gpu": "rate",
    "fewest-gpus": "gpus",
    "cost": "cost",
    "energy": "power",
    "latency": "rate",
}


@dataclass(frozen=True, slots=True, eq=False)
class Sized:
    """A point of the program as a plan, and its simulation.

    point   predicted rate, bound, and the rows that hold it down
    trial   the simulation at the highest rate within the limits (at the demanded rate for other objectives), None if
            it never kept them; trials: all that were made
    rough   whether it was simulated with few requests only, because others did better
    """

    plan: Plan
    point: Point
    trial: Trial | None
    trials: tuple[Trial, ...]
    rough: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Sizings:
    """All points simulated, and the program they come from; kinds: pools by the name of their option."""

    sized: tuple[Sized, ...]
    program: Sizing
    kinds: dict[str, Pool]
    wall_s: float


def phase_pools(question: Question, catalogue: Catalogue, hardware: str | None) -> Iterator[Pool]:
    """Every legal replica in the roles prefill and decode on the catalogue's devices.

    hardware   what the pools are to name, None for the plan's own
    """
    longest = int((question.requests.prompt_tokens + question.requests.output_tokens).max())
    allowed = question.choices
    budgets = (
        tuple(tokens for tokens in allowed.token_budgets if tokens in PREFILL_TOKENS) or allowed.token_budgets[-1:]
    )
    prompts = max((most for most in allowed.max_seqs if most <= min(PREFILL_SEQS, budgets[0])), default=1)
    seqs = max((most for most in allowed.max_seqs if most <= allowed.token_budgets[-1]), default=1)
    enough = [tokens for tokens in allowed.token_budgets if tokens >= max(DECODE_TOKENS, seqs)]
    roles: tuple[tuple[Role, tuple[int, ...], int], ...] = (
        ("prefill", budgets, prompts),
        ("decode", (enough[0] if enough else allowed.token_budgets[-1],), seqs),
    )
    # Without decodes a chunk is what a smaller budget is. The formulas know no order of the queue: the first is taken.
    schedules = replace(allowed.schedules, chunk_tokens=(None,), orders=allowed.schedules.orders[:1])
    for role, tokens, most in roles:
        choices = replace(
            allowed, policies=("chunked",), token_budgets=tokens, max_seqs=(most,), schedules=schedules
        )  # fmt: skip
        if role == "decode":  # no prompt is looked up there
            choices = replace(choices, prefix_caching="off")
        for pool, _ in enumerate_pools(catalogue, choices, longest).pools:
            if pool.gpus_per_replica < sum(question.devices.values()):  # the other role needs room
                yield replace(pool, role=role, hardware=hardware)


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """The replicas the program may choose from, by name, and how many legal ones were left out beforehand."""

    options: dict[str, tuple[Pool, Option]]
    considered: int = 0

    def __or__(self, other: Offer) -> Offer:
        return Offer(self.options | other.options, self.considered + other.considered)


def offer(question: Question, catalogue: Catalogue, hardware: str | None) -> Offer:
    """The most promising prefill and decode replicas of one kind of device with what each can do.

    hardware   what the pools are to name, None for the plan's own
    """
    pools = list(phase_pools(question, catalogue, hardware))
    cluster = catalogue.cluster
    found: dict[str, tuple[Pool, Option]] = {}
    card = cluster.inter.bytes_per_s * cluster.inter.efficiency if cluster.inter is not None else inf
    outside = cluster.nodes > 1 or bool(question.also)
    name = question.hardware if hardware is None else hardware
    for precision in dict.fromkeys(precision_of(pool) for pool in pools):
        every = [(pool, catalogue.replica(pool)) for pool in pools if precision_of(pool) == precision]
        kept = promising(every, question.requests, question.limits)
        per_token = kv_bytes_per_rank(catalogue.model.layers, 1, precision)
        transfer_s = _exposed_s(question, catalogue, per_token, card)
        done = capacities(
            [spec for _, spec in kept],
            question.requests,
            question.limits,
            transfer_s=transfer_s,
            frontend_s=catalogue.engine.request_overhead_s + transfer_s,
            whole=False,
            follow=FOLLOWED,
        )
        for (pool, spec), one in zip(kept, done, strict=True):
            key = f"{pool.role} {name} {degrees(pool)} {pool.weights}/{pool.kv}, {pool.token_budget} tokens a step"
            made = option(
                key,
                pool.role,
                name,
                spec,
                [one],
                kv_bytes_per_token=per_token,
                kv_format=pool.kv,
                link_bytes_per_s=card * pool.gpus_per_replica if outside else inf,
            )
            if any(service.prefill_per_s or service.decode_per_s for service in made.services):
                found[key] = pool, made
    return Offer(found, len(pools))


def degrees(pool: Pool) -> str:
    """What tells ways of cutting apart, and schedules that are not the usual ones."""
    names = ("tp", "cp", "pp", "attention_dp", "ep", "expert_tp")
    found = [f"{name}={getattr(pool, name)}" for name in names if name == "tp" or getattr(pool, name) > 1]
    found += [pool.cp_kind] if pool.cp > 1 else []
    found += [f"redundant_experts={pool.redundant_experts}"] if pool.redundant_experts else []
    found += [f"{name}={getattr(pool, name)}" for name, usual in DEFAULTS.items() if getattr(pool, name) != usual]
    return " ".join(found)


def _exposed_s(question: Question, catalogue: Catalogue, bytes_per_token: float, card_bytes_per_s: float) -> float:
    """What a mean prompt waits for its KV: its last layer over one network card, or all of it."""
    layers = len(catalogue.model.layers) if question.transfer == "layer-wise" else 1
    return float(question.requests.prompt_tokens.mean()) * bytes_per_token / layers / card_bytes_per_s


def aggregated_option(key: str, pool: Pool, hardware: str, catalogue: Catalogue, rate_per_s: float) -> Option:
    """A replica that was measured to serve `rate_per_s` whole requests."""
    device, gpus = catalogue.cluster.device, pool.gpus_per_replica
    price = device.price_usd_per_h
    return Option(
        key,
        "aggregated",
        hardware,
        gpus,
        (Service(whole_per_s=rate_per_s),),
        price_usd_per_h=None if price is None else price * gpus,
        power_w=device.tdp_w * gpus,
    )


def budget_of(question: Question) -> Budget:
    """The devices at hand, and what may be spent on them."""
    return Budget(question.devices, question.budget_usd_per_h or inf, question.budget_w or inf)


def plan_of(question: Question, point: Point, kinds: dict[str, Pool]) -> Plan:
    """The point as a plan; replicas of a pool get requests as the program splits them."""
    flow: dict[str, float] = {}
    for share in point.shares:
        flow[share.key] = flow.get(share.key, 0.0) + share.rate_per_s
    pools = []
    for kind, count in point.counts:
        pool = kinds[kind.key]
        pools.append(replace(pool, replicas=count, share=round(max(flow.get(kind.key, 0.0), 1e-3) / count, 6)))
    order = {"aggregated": 0, "prefill": 1, "decode": 2, "mixed": 3}
    pools.sort(key=lambda pool: order[pool.role])
    return Plan(
        question.model,
        question.hardware,
        question.gpus,
        tuple(pools),
        question.engine,
        question.pool_router,
        also=question.also,
        transfer=question.transfer,
    )


def sized(question: Question, catalogue: Catalogue, offered: Offer, *, until_s: float) -> Sizings:
    """Pools from these options: the best points of the program, simulated, best first.

    until_s   value of time.perf_counter() from which on only what has been begun is finished

    Raises NoFeasiblePlanError where the budget or the devices hold nothing that serves the demand.
    """
    started = time.perf_counter()
    goal = GOALS[question.objective]
    kinds = {key: pool for key, (pool, _) in offered.options.items()}
    options = [made for _, made in offered.options.values()]
    if not options:
        raise NoFeasiblePlanError("no replica in any role keeps the limits; relax a limit or add devices")
    simulated: list[Sized] = []
    for margin in MARGINS if question.objective != "goodput-per-gpu" else MARGINS[:1]:
        demand = Demand(rate_per_s=None if goal == "rate" else question.demanded_per_s * margin)
        left_s = max(1.0, (until_s - time.perf_counter()) / 3)
        program = size_pools(
            options, demand, budget_of(question), goal, keep=LOOKED_AT, seconds=left_s, most_kinds=MOST_KINDS
        )
        plans = [(plan_of(question, point, kinds), point) for point in program.points]
        simulated += _simulated(question, catalogue, plans, until_s)
        if any(one.trial is not None for one in simulated):
            break
    best = sorted(simulated, key=lambda one: -_score(question, one))
    return Sizings(tuple(best), program, kinds, time.perf_counter() - started)


def _score(question: Question, one: Sized) -> float:
    if one.trial is None:
        return -inf
    if question.objective == "goodput-per-gpu":
        return one.trial.goodput_per_s
    if question.objective == "energy":
        return -(one.trial.joules_per_token or inf)
    return -one.trial.mean_e2e_s if question.objective == "latency" else -one.point.value


def _simulated(
    question: Question, catalogue: Catalogue, plans: Sequence[tuple[Plan, Point]], until_s: float
) -> list[Sized]:
    """The plans that have room on the cluster, simulated; the best ones with all requests."""

    energy = question.objective == "energy"

    def measure(task: tuple[Plan, Point, float]) -> Sized | None:
        plan, point, guess = task
        try:
            deployment = catalogue.deployment(plan, with_work=energy)
        except PlanError:  # its replicas do not fill the nodes
            return None
        if question.objective != "goodput-per-gpu":
            trial = attempt(
                deployment,
                question.requests,
                question.demanded_per_s,
                question.limits,
                question.seed,
                energy=energy,
            )
            return Sized(plan, point, trial if trial.meets else None, (trial,))
        rough = guess == 0
        best, trials = capacity(
            deployment,
            question.requests.head(ROUGH_REQUESTS) if rough else question.requests,
            question.limits,
            question.seed,
            at_most_per_s=3 * point.rate_per_s,
            guess_per_s=point.rate_per_s if rough else guess,
            tolerance=max(question.tolerance, ROUGH_TOLERANCE) if rough else question.tolerance,
            until_s=until_s,
        )
        if best is not None and question.rate_per_s is not None and best.rate_per_s < question.rate_per_s:
            best = None
        return Sized(plan, point, best, tuple(trials), rough)

    for plan, _ in plans:
        for pool in plan.pools:
            catalogue.of(pool).replica(pool, with_work=energy)  # compiled before the workers are forked
    with Workers(measure, question.jobs or available_cpus()) as workers:
        first = [one for one in workers.map([(plan, point, 0.0) for plan, point in plans]) if one is not None]
        if question.objective != "goodput-per-gpu":
            return first
        kept = sorted((one for one in first if one.trial), key=lambda one: -_score(question, one))[:MEASURED]
        again = workers.map([(one.plan, one.point, one.trial.rate_per_s if one.trial else 0.0) for one in kept])
    replaced = {id(old): new for old, new in zip(kept, again, strict=True) if new is not None}
    return [
        Sized(new.plan, new.point, new.trial, one.trials + new.trials) if (new := replaced.get(id(one))) else one
        for one in first
    ]
