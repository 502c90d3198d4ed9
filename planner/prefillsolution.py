"""What did the solver find, how sure is it, and from where may the next solution start?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

#: HiGHS's feasibility tolerance, relative: a bound is lowered by as much.
TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A solution.

    fractions      prompts x steps: f of the module
    step_s         T_k; objective, bound: of the program; gap: (objective - bound) / objective
    optimal        whether the solver came to its end; values: of all variables, to start the next solution from
    """

    fractions: NDArray[np.float64]
    step_s: NDArray[np.float64]
    objective: float
    bound: float
    optimal: bool
    values: Mapping[str, float]

    @property
    def gap(self) -> float:
        """Part of the objective that may still be saved."""
        return max(0.0, (self.objective - self.bound) / self.objective) if self.objective > 0 else 0.0


def shifted(values: Mapping[str, float], kept: Mapping[int, int]) -> dict[str, float]:
    """Values of a solution's variables one step on, as a start for the next one.

    kept   new number of each prompt that is still there, by its number in the solution

    >>> shifted({"z_0": 1.0, "z_1": 0.5, "n_2_1": 0.25, "n_0_1": 0.75}, {2: 0})
    {'z_0': 0.5, 'n_0_0': 0.25}
    """
    found = {}
    for name, value in values.items():
        kind, *numbers = name.split("_")
        *prompt, k = map(int, numbers)
        if k > 0 and all(r in kept for r in prompt):
            found["_".join([kind, *(str(kept[r]) for r in prompt), str(k - 1)])] = value
    return found


def run(problem: Any, seconds: float, gap: float, start: Mapping[str, float] | None) -> tuple[str, float, bool] | None:
    """Minimise with HiGHS: (status in PuLP's words, bound, whether it came to its end); None where it found no point.

    start   values of the variables to begin with, by name; those it does not have begin at their least value
    """
    solver = pulp.HiGHS(msg=False, gapRel=gap, timeLimit=seconds)
    if start:

        def begin(lp: Any) -> None:
            point = lp.solverModel.getSolution()
            point.col_value = [start.get(v.name, v.lowBound or 0.0) for v in lp.variables()]
            lp.solverModel.setSolution(point)
            lp.solverModel.run()

        solver.callSolver = begin
    try:
        status = str(pulp.LpStatus[problem.solve(solver)])
    except IndexError:  # it left no values at all
        return None
    info = problem.solverModel.getInfo()
    if status == "Infeasible":
        return status, 0.0, True
    if info.primal_solution_status != 2:  # HiGHS's kSolutionStatusFeasible
        return None
    value = float(pulp.value(problem.objective))
    optimal = bool(problem.sol_status == pulp.LpSolutionOptimal)
    if problem.isMIP():
        bound = float(info.mip_dual_bound) + float(problem.objective.constant)  # which PuLP keeps from the solver
    else:
        bound = value if optimal else -np.inf
    return status, min(bound, value) - TOLERANCE * abs(value), optimal
