"""How many machines of which kind for prompts and for tokens, within a budget of cost or power?

Capacities come from the simulator: some machines of one kind do one task only, and the highest rate within the limits
of that task (TTFT for prompts, TBT for tokens) is shared among them. planner.pools chooses the counts; it takes pools
as fluids that do not disturb each other, so its best points are simulated before one is believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.options import Budget, Demand, Option, Service
from planner.pools import size_pools
from planner.validation.splitwisemachines import Machine, Pool, Role, TableModel, instant
from planner.validation.splitwiseslo import LIMITS, Slowdown, Throughput, Traffic, throughput

#: Machines whose capacity is measured together: about as many as there will be, since larger pools queue less.
SAMPLE: Mapping[Role, int] = {"prefill": 30, "decode": 10}
#: A machine for tokens that keeps up with this many for prompts of its kind counts as no better: one is enough.
ENOUGH = 8
#: Requests per second of one machine by its name and task.
Capacities = Mapping[tuple[str, Role], float]


@dataclass(frozen=True, slots=True)
class Choice:
    """Counts by machine and task, the rate the integer program expects of them, and the bound no counts exceed."""

    counts: Mapping[tuple[str, Role], int]
    expected_per_s: float
    bound_per_s: float


def capacity(machine: Machine, role: Role, traffic: Traffic, alone: TableModel) -> float:
    """Requests per second and machine of a pool that keeps the limits of its task, while the other takes no time."""
    model, trace, count = machine.model, traffic.trace, SAMPLE[role]
    read_s = float(np.mean([model.prompt_s[tokens] for tokens in trace.prompt_tokens.tolist()]))
    if role == "prefill":
        # Answers of one token: what is left of a request is its prompt.
        prompts = replace(traffic, one_token=True)
        pools = [Pool(machine, "aggregated", count)]
        return throughput(pools, prompts, alone, 0.7 * count / read_s, of_metric("ttft")).rate_per_s / count
    # By Little's law, with as many sequences as fit and as decode 1.25 times slower than alone.
    fit = machine.kv_tokens / float((trace.prompt_tokens + trace.output_tokens).mean())
    quick = [n for n, seconds in enumerate(model.decode_s) if n and n <= fit and seconds <= 1.25 * alone.decode_s[1]]
    seqs = max(quick, default=1)
    guess_per_s = count * seqs / (model.decode_s[seqs] * float(trace.output_tokens.mean()))
    pools = [Pool(instant(machine), "prefill", count), Pool(machine, "decode", count)]
    most_per_s = ENOUGH * count / read_s
    return throughput(pools, traffic, alone, guess_per_s, of_metric("tpot"), at_most=most_per_s).rate_per_s / count


def of_metric(metric: str) -> tuple[Slowdown, ...]:
    """The limits on one metric."""
    return tuple(limit for limit in LIMITS if limit.metric == metric)


def choices(
    machines: Mapping[str, Machine],
    capacities: Capacities,
    kinds: Sequence[tuple[str, Role]],
    budget: Budget,
    keep: int,
) -> list[Choice]:
    """The `keep` best counts within the budget; raises NoFeasiblePlanError where nothing can serve."""
    options = [
        Option(
            key=f"{name}/{role}",
            role=role,
            hardware=name,
            gpus=8,
            services=(Service(**{f"{role}_per_s": capacities[name, role]}),),
            price_usd_per_h=machines[name].usd_per_h,
            power_w=1e3 * machines[name].kw,
        )
        for name, role in kinds
    ]
    kind_of = {f"{name}/{role}": (name, role) for name, role in kinds}
    points = size_pools(options, Demand(), budget, "rate", keep=keep).points
    return [
        Choice({kind_of[option.key]: count for option, count in point.counts}, point.rate_per_s, points[0].bound)
        for point in points
    ]


def pools_of(counts: Mapping[tuple[str, Role], int], machines: Mapping[str, Machine]) -> list[Pool]:
    """The counts as pools."""
    return [Pool(machines[name], role, count) for (name, role), count in counts.items()]


def best_of(
    chosen: Sequence[Choice], machines: Mapping[str, Machine], traffic: Traffic, alone: TableModel
) -> tuple[Choice, Throughput]:
    """The choice that serves the highest rate when simulated, the first of equals."""
    best = chosen[0]
    reached = throughput(pools_of(best.counts, machines), traffic, alone, best.expected_per_s)
    for choice in chosen[1:]:
        pools = pools_of(choice.counts, machines)
        found = throughput(pools, traffic, alone, reached.rate_per_s, at_least=reached.rate_per_s * 1.01)
        if found.rate_per_s > reached.rate_per_s:
            best, reached = choice, found
    return best, reached
