"""How do requests, replicas and budgets bound each other? The mixed-integer linear program of pool sizing.

Counts n_k of replica kinds are whole numbers; the requests of each class are split over them by rates x >= 0:

    whole_c + prefill_c = lambda share_c     whole_c + decode_c = lambda share_c     encode_c = lambda share_c
    busy      sum x / capacity          <= n_k               of every kind, over its phases and the classes
    KV        sum x held_token_s        <= n_k kv_tokens     Little's law: tokens held = rate x tokens x seconds
    NIC       sum x kv_bytes            <= n_k link_bytes_per_s     leaving prefill replicas, entering decode replicas
    link      sum flow kv_bytes         <= link's bytes/s    between hardware types; all of them on the fabric
    budget    devices of every type, dollars per hour, watts

`whole_c` runs on aggregated or mixed replicas and moves no KV. The rows are linear in lambda, so the highest rate and
the least cost at a rate are both mixed-integer linear programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil, floor, inf
from typing import Any, Literal

import pulp

from planner.errors import PlanError
from planner.options import Budget, Demand, Option, Phase, phases_of

Goal = Literal["rate", "cost", "gpus", "power"]
#: Replicas of each option, in their order.
Counts = list[int]
#: Where KV is and how it is written: hardware and KV format.
Site = tuple[str, str]
#: What one replica adds to the goal.
PRICES: dict[str, Callable[[Option], float]] = {
    "cost": lambda option: option.price_usd_per_h or 0.0,
    "gpus": lambda option: option.gpus,
    "power": lambda option: option.power_w,
}
#: A count this close below a whole number is that number.
WHOLE = 1e-6


class Program:
    """The program of the module: variables, then one method for each family of rows.

    rate     requests/s that must be served; None to maximise them
    counts   replicas of each kind where they are fixed, which leaves a linear program for the split of the requests
    most_kinds   that may have replicas
    """

    def __init__(
        self,
        options: Sequence[Option],
        demand: Demand,
        budget: Budget,
        goal: Goal,
        rate: float | None,
        counts: Sequence[int] | None = None,
        most_kinds: int | None = None,
    ) -> None:
        """Build it; rates are counted in `unit` requests/s, so that all numbers are near 1."""
        self.options, self.demand, self.budget, self.rate, self.counts = options, demand, budget, rate, counts
        self.unit = _unit(options, len(demand.classes))
        self.maximises = goal == "rate"
        self.problem = pulp.LpProblem("pools", pulp.LpMaximize if goal == "rate" else pulp.LpMinimize)
        self.n: list[Any] = []
        self.x: dict[tuple[Phase, int, int], Any] = {}
        self.rows: list[tuple[str, Any, float]] = []
        self._binaries = 0
        self._variables()
        self._demand()
        self._replicas()
        self._links()
        self._budget()
        if most_kinds is not None:
            self._few(most_kinds)
        if goal == "rate":
            self.problem += 1.0 * self.served
        else:
            price = PRICES[goal]
            self.problem += pulp.lpSum(price(option) * n for option, n in zip(options, self.n, strict=True))

    def _variables(self) -> None:
        add = self.problem.add_variable
        self.served: Any = add("served", lowBound=0.0) if self.rate is None else self.rate / self.unit
        for k, option in enumerate(self.options):
            if self.counts is not None:
                self.n.append(self.counts[k])
            else:
                most = most_bought(option, self.budget)
                if self.rate is not None:
                    most = min(most, most_needed(option, self.demand, self.rate))
                self.n.append(add(f"n{k}", lowBound=0, upBound=int(most), cat=pulp.LpInteger))
            for c in range(len(self.demand.classes)):
                for phase in phases_of(option, c):
                    self.x[phase, k, c] = add(f"x_{phase}_{k}_{c}", lowBound=0.0)

    def _sum(self, phases: str, c: int) -> Any:
        """Rate of the class in the phases."""
        return pulp.lpSum(x for (phase, _, at), x in self.x.items() if at == c and phase in phases.split())

    def _demand(self) -> None:
        """Every request is prefilled and decoded, and encoded where its class needs it."""
        for c, kind in enumerate(self.demand.classes):
            rate = self.served * kind.share
            self.problem += self._sum("whole prefill", c) == rate
            self.problem += self._sum("whole decode", c) == rate
            if kind.encodes:
                self.problem += self._sum("encode", c) == rate

    def _limit(self, name: str, used: Any, each: float, count: Any = 1) -> None:
        """A row used <= count x each, divided by `each` so that all numbers are near 1."""
        if each == 0:
            self.problem += used <= 0
            return
        row = used * (1 / each) <= count
        self.problem += row
        self.rows.append((name, row, each))

    def _replicas(self) -> None:
        """Time, KV memory and network card of each kind's replicas."""
        for k, option in enumerate(self.options):
            mine = [(phase, option.services[c], x) for (phase, at, c), x in self.x.items() if at == k]
            if not mine:
                continue
            n = self.n[k]
            self._limit(f"busy {option.key}", _total((self.unit / s.per_s(phase), x) for phase, s, x in mine), 1.0, n)
            if option.kv_tokens < inf:
                held = _total((self.unit * s.held_token_s(phase), x) for phase, s, x in mine)
                self._limit(f"kv {option.key}", held, option.kv_tokens, n)
            if option.link_bytes_per_s < inf:
                for phase, way in (("prefill", "out"), ("decode", "in")):
                    moved = [(self.unit * s.kv_bytes, x) for at, s, x in mine if at == phase]
                    if moved:
                        self._limit(f"nic {way} {option.key}", _total(moved), option.link_bytes_per_s, n)

    def _links(self) -> None:
        """KV goes from prefill to decode replicas of the same format, over links that carry so much."""
        budget, options = self.budget, self.options
        senders = [(k, c, x) for (phase, k, c), x in self.x.items() if phase == "prefill"]
        if senders and budget.fabric_bytes_per_s < inf:
            moved = _total((self.unit * options[k].services[c].kv_bytes, x) for k, c, x in senders)
            self._limit("fabric", moved, budget.fabric_bytes_per_s)
        sites = sorted({_site(options[k]) for phase, k, _ in self.x if phase in ("prefill", "decode")})
        if len(sites) == 1 and budget.link(sites[0][0], sites[0][0]) == inf:
            return
        carried: dict[tuple[str, str], list[tuple[float, Any]]] = {}
        for c in range(len(self.demand.classes)):
            flow = {
                (a, b): self.problem.add_variable(f"f_{i}_{j}_{c}", lowBound=0.0)
                for i, a in enumerate(sites)
                for j, b in enumerate(sites)
                if a[1] == b[1] and budget.link(a[0], b[0]) > 0
            }
            for site in sites:
                leaves = self._at("prefill", site, c)
                lands = self._at("decode", site, c)
                each = max((options[k].services[c].kv_bytes for k, _ in leaves), default=0.0)
                self.problem += pulp.lpSum(f for (a, _), f in flow.items() if a == site) == _rates(leaves)
                self.problem += pulp.lpSum(f for (_, b), f in flow.items() if b == site) == _rates(lands)
                for (a, b), f in flow.items():
                    if a == site:
                        carried.setdefault((a[0], b[0]), []).append((self.unit * each, f))
        for (source, target), parts in carried.items():
            if budget.link(source, target) < inf:
                self._limit(f"link {source} > {target}", _total(parts), budget.link(source, target))

    def _at(self, phase: str, site: Site, c: int) -> list[tuple[int, Any]]:
        """(kind, rate) of a class in a phase on the kinds of a site."""
        return [(k, x) for (p, k, at), x in self.x.items() if p == phase and at == c and _site(self.options[k]) == site]

    def _budget(self) -> None:
        """Devices of each type, dollars and watts."""
        if self.counts is not None:
            return
        for name, limit, amounts in spent(self.options, self.budget):
            if limit < inf:
                scale = max(limit, 1.0)
                used = pulp.lpSum(a / scale * n for a, n in zip(amounts, self.n, strict=True) if a)
                self.problem += used <= limit / scale, f"budget of {name}"

    def _few(self, most: int) -> None:
        """At most so many kinds have replicas."""
        used = []
        for n in self.n:
            if n.upBound:
                b = self._binary()
                self.problem += n <= n.upBound * b
                used.append(b)
        self.problem += pulp.lpSum(used) <= most

    def exclude_above(self, counts: Counts) -> None:
        """Cut off every point with at least so many replicas: n_k <= count_k - 1 for one of its kinds or more."""
        fewer = []
        for n, count in zip(self.n, counts, strict=True):
            if count:
                b = self._binary()
                self.problem += n + (n.upBound - count + 1) * b <= n.upBound
                fewer.append(b)
        self.problem += pulp.lpSum(fewer) >= 1

    def exclude_below(self, counts: Counts) -> None:
        """Cut off every point with at most so many replicas: n_k >= count_k + 1 for one kind or more."""
        more = []
        for n, count in zip(self.n, counts, strict=True):
            if n.upBound > count:
                b = self._binary()
                self.problem += n - (count + 1) * b >= 0
                more.append(b)
        self.problem += pulp.lpSum(more) >= 1

    def _binary(self) -> Any:
        self._binaries += 1
        return self.problem.add_variable(f"b{self._binaries}", cat=pulp.LpBinary)

    def solve(self, gap: float, seconds: float, *, required: bool = True) -> tuple[list[int], float] | None:
        """Counts and the bound on the goal; None if there are none.

        required   whether to raise PlanError when the time ran out before any were found
        """
        solver = pulp.HiGHS(msg=False, gapRel=gap, gapAbs=0.0, timeLimit=seconds)
        status = self._run(solver)
        if status == "Not Solved" and required:
            raise PlanError(f"no counts of replicas found in {seconds:.3g} s; expected more time or fewer kinds")
        if status != "Optimal":
            return None
        bound = float(self.problem.solverModel.getInfo().mip_dual_bound)  # HiGHS minimises
        return [round(n.value()) for n in self.n], -bound * self.unit if self.maximises else bound

    def split(self) -> float:
        """Requests/s of fixed counts, split as suits them best; 0 if they cannot serve every class."""
        return float(self.served.value()) * self.unit if self._run(pulp.HiGHS(msg=False)) == "Optimal" else 0.0

    def _run(self, solver: Any) -> str:
        """The solver's status in PuLP's words."""
        return str(pulp.LpStatus[self.problem.solve(solver)])


def most_bought(option: Option, budget: Budget) -> float:
    """Replicas of a kind that the budget alone pays for."""
    most = inf
    if budget.gpus is not None:
        most = budget.gpus.get(option.hardware, 0) // option.gpus
    for price, limit in ((option.price_usd_per_h or 0.0, budget.usd_per_h), (option.power_w, budget.power_w)):
        if price > 0 and limit < inf:
            most = min(most, floor(limit / price + WHOLE))
    return most


def most_needed(option: Option, demand: Demand, rate_per_s: float) -> int:
    """Replicas of a kind that serve all the demand it can serve: more are never needed."""
    busy = kv = out = into = 0.0
    for index, kind in enumerate(demand.classes):
        service, x = option.services[index], rate_per_s * kind.share
        for phase in phases_of(option, index):
            busy += x / service.per_s(phase)
            kv += x * service.held_token_s(phase)
            out += x * service.kv_bytes if phase == "prefill" else 0.0
            into += x * service.kv_bytes if phase == "decode" else 0.0
    return ceil(max(busy, kv / option.kv_tokens, out / option.link_bytes_per_s, into / option.link_bytes_per_s)) + 1


def unserved(options: Sequence[Option], demand: Demand) -> str | None:
    """The class and phase that none of the kinds serves, in a few words; None if all are served."""
    for index, kind in enumerate(demand.classes):
        offered = {phase for option in options for phase in phases_of(option, index)}
        for phase in ("prefill", "decode", *(["encode"] if kind.encodes else [])):
            if phase not in offered and (phase == "encode" or "whole" not in offered):
                return f"class {kind.name}: no kind of replica can {phase} it within the limits"
    return None


def _unit(options: Sequence[Option], classes: int) -> float:
    """Requests/s that one replica serves, about: the best one's in the phase and class that are slowest."""
    best: dict[tuple[Phase, int], float] = {}
    for option in options:
        for c in range(classes):
            for phase in phases_of(option, c):
                best[phase, c] = max(best.get((phase, c), 0.0), option.services[c].per_s(phase))
    return min(best.values())


def _site(option: Option) -> Site:
    """Where KV is and how it is written."""
    return option.hardware, option.kv_format


def _rates(found: list[tuple[int, Any]]) -> Any:
    """Sum of the rates of some kinds."""
    return pulp.lpSum(x for _, x in found)


def _total(parts: Iterable[tuple[float, Any]]) -> Any:
    """Sum of coefficient times variable."""
    return pulp.LpAffineExpression([(x, float(a)) for a, x in parts])


def spent(options: Sequence[Option], budget: Budget) -> list[tuple[str, float, list[float]]]:
    """(what, budget of it, what one replica of each kind takes) of devices by type, dollars and watts."""
    found = []
    for hardware in sorted({option.hardware for option in options}):
        limit = inf if budget.gpus is None else float(budget.gpus.get(hardware, 0))
        found.append((f"gpus {hardware}", limit, [float(o.gpus) if o.hardware == hardware else 0.0 for o in options]))
    found.append(("usd per h", budget.usd_per_h, [o.price_usd_per_h or 0.0 for o in options]))
    found.append(("watts", budget.power_w, [o.power_w for o in options]))
    return found
