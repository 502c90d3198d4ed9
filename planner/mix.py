"""How many replicas of each kind: a small MILP over measured capacities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pulp

from planner.errors import NoFeasiblePlanError


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of replica: its devices, the rate it keeps within the limits, and what it costs to run."""

    name: str
    gpus: int
    capacity_per_s: float
    usd_per_h: float = 0.0


@dataclass(frozen=True, slots=True)
class Mix:
    """Replicas of each kind, in the order of the kinds, with the solver's bound on the objective.

    capacity_per_s   of all replicas together
    """

    counts: tuple[int, ...]
    capacity_per_s: float
    gpus: int
    objective: float
    bound: float


def best_mix(
    kinds: Sequence[Kind],
    gpus: int,
    *,
    goal: Literal["capacity", "gpus", "cost"],
    rate_per_s: float = 0.0,
) -> Mix:
    """Counts n_c of replicas that serve most, or serve `rate_per_s` with fewest devices or dollars.

        capacity:    max  sum_c r_c n_c          gpus:   min  sum_c g_c n_c          cost:   min  sum_c usd_c n_c
        budget:      sum_c g_c n_c <= gpus
        demand:      sum_c r_c n_c >= rate       (not for capacity)

    Raises NoFeasiblePlanError when the demand cannot be met on so many devices.
    """
    problem = pulp.LpProblem("mix", pulp.LpMaximize if goal == "capacity" else pulp.LpMinimize)
    n = [
        problem.add_variable(f"n_{i}", lowBound=0, upBound=gpus // kind.gpus, cat=pulp.LpInteger)
        for i, kind in enumerate(kinds)
    ]
    used = pulp.lpSum(kind.gpus * count for kind, count in zip(kinds, n, strict=True))
    served = pulp.lpSum(kind.capacity_per_s * count for kind, count in zip(kinds, n, strict=True))
    paid = pulp.lpSum(kind.usd_per_h * count for kind, count in zip(kinds, n, strict=True))
    problem += {"capacity": served, "gpus": used, "cost": paid}[goal]
    problem += used <= gpus, "budget"
    if goal != "capacity":
        problem += served >= rate_per_s, "demand"
    status = problem.solve(pulp.HiGHS(msg=False, gapRel=0.0))
    if pulp.LpStatus[status] != "Optimal":
        best = max((kind.capacity_per_s * (gpus // kind.gpus) for kind in kinds), default=0.0)
        raise NoFeasiblePlanError(
            f"rate {rate_per_s:g}/s: no mix of replicas on {gpus} devices serves it; one kind alone "
            f"reaches {best:.3g}/s; add devices or lower the rate"
        )
    counts = tuple(round(count.value()) for count in n)
    objective = float(pulp.value(problem.objective))
    bound = float(problem.solverModel.getInfo().mip_dual_bound)  # HiGHS minimises
    return Mix(
        counts,
        sum(kind.capacity_per_s * count for kind, count in zip(kinds, counts, strict=True)),
        sum(kind.gpus * count for kind, count in zip(kinds, counts, strict=True)),
        objective,
        bound if goal != "capacity" else -bound,
    )
