"""How many replicas of which kind in which role serve a mix of traffic best? Integer programs with proven bounds.

The program is that of planner/poolprogram.py (pool sizing as Splitwise, arXiv:2311.18677, and EPD, arXiv:2501.05460,
do it by search), solved by HiGHS through PuLP, over the kinds that no other kind replaces (planner/dominance.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from planner.dominance import undominated
from planner.errors import NoFeasiblePlanError, PlanError
from planner.options import Budget, Demand, Option, phases_of
from planner.poolprogram import WHOLE, Counts, Goal, Program, most_bought, spent, unserved

#: Times a point is sought for each one wanted: some turn out to be part of an earlier one with idle replicas added.
ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One limit at the chosen counts, with the requests split so that the rate is highest.

    used, limit   in the row's own unit: replicas, tokens, bytes/s, devices, USD/h or W
    weight        share of the rate that the row explains (its dual price times its limit over the rate); the weights
                  of all rows add up to 1, and a row with a weight above 0 is tight: the rate falls if it is optimistic
    """

    name: str
    used: float
    limit: float
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """Requests per second of a class that one kind of replica serves in one phase."""

    key: str
    phase: str
    class_name: str
    rate_per_s: float


@dataclass(frozen=True, slots=True)
class Point:
    """Counts of replicas and what they come to.

    counts       (kind, replicas), only those above 0
    value        the goal: requests/s, USD/h, devices or W; bound: what no point not listed before it can exceed
    rate_per_s   highest rate of these replicas, at least the one demanded
    usd_per_h    None where a kind has no price
    rows         limits, the heaviest first; shares: who serves what at that rate
    """

    counts: tuple[tuple[Option, int], ...]
    value: float
    bound: float
    rate_per_s: float
    gpus: int
    usd_per_h: float | None
    power_w: float
    rows: tuple[Row, ...]
    shares: tuple[Share, ...]

    @property
    def gap(self) -> float:
        """How much better than this point another can still be, as a fraction."""
        return abs(self.bound - self.value) / max(abs(self.value), 1e-12)

    @property
    def tight(self) -> tuple[Row, ...]:
        """The rows that hold the rate down."""
        return tuple(row for row in self.rows if row.weight > WHOLE)

    def count(self, key: str) -> int:
        """Replicas of the kind called `key`."""
        return sum(count for option, count in self.counts if option.key == key)


@dataclass(frozen=True, slots=True)
class Sizing:
    """The answer: points, best first; none contains all replicas of another one.

    options, kept   kinds given, and those not dominated by another one
    proven          whether the first point was proven within the gap asked for
    """

    points: tuple[Point, ...]
    options: int
    kept: int
    proven: bool

    @property
    def best(self) -> Point:
        """The best point found."""
        return self.points[0]


def size_pools(
    options: Sequence[Option],
    demand: Demand,
    budget: Budget,
    goal: Goal = "rate",
    *,
    keep: int = 1,
    gap: float = 1e-3,
    seconds: float = 30.0,
    most_kinds: int | None = None,
) -> Sizing:
    """The `keep` best counts of replicas.

    goal      rate: the highest rate within the budget; cost (USD/h), gpus or power (W): the least that serves
              demand.rate_per_s
    keep      points wanted: the first is the best, each later one the best of those that neither contain an earlier
              one nor, for the goal rate, are contained in one; no replica of any can be left out without loss
    gap       relative gap at which the solver stops
    seconds   wall-clock limit; fewer points come back when it is reached
    most_kinds   different kinds of replica that anyone wants to run; None for any number

    Adding replicas lowers neither the rate nor the cost, so all points that contain an earlier one are worse or equal
    and are cut off at once: at least one of its kinds must have fewer, chosen by one binary each.

    Raises NoFeasiblePlanError when the budget holds nothing that serves the demand (with the cheapest that does), and
    PlanError for a question that cannot be meant.
    """
    _check(options, demand, budget, goal)
    until_s = time.perf_counter() + seconds
    kept = undominated(options)
    missing = unserved(kept, demand)
    if missing is not None:
        raise NoFeasiblePlanError(f"{missing}; expected other kinds, relaxed limits or more devices per replica")
    rate = None if goal == "rate" else demand.rate_per_s
    points: list[Point] = []
    contained: list[Counts] = []  # cut off with all that contain them
    for _ in range(ATTEMPTS * keep):
        left_s = until_s - time.perf_counter()
        if len(points) == keep or (points and left_s <= 0):
            break
        model = Program(kept, demand, budget, goal, rate, most_kinds=most_kinds)
        for counts in contained:
            model.exclude_above(counts)
        if goal == "rate":
            for point in points:
                model.exclude_below(counts_of(point, kept))
        found = model.solve(gap, max(left_s, 0.1), required=not points)
        if found is None:
            break
        counts, bound = found
        least = _trimmed(counts, kept, demand, budget, rate)
        if any(_within(least, counts_of(point, kept)) for point in points):
            contained.append(counts)
            continue
        point = _point(least, kept, demand, budget, goal, bound)
        if point.rate_per_s <= 0:
            break
        contained.append(least)
        points.append(point)
    if not points:
        raise _nothing_fits(kept, demand, budget, goal)
    proven = points[0].gap <= gap + 1e-9
    points.sort(key=lambda point: -point.value if goal == "rate" else point.value)
    return Sizing(tuple(points), len(options), len(kept), proven)


def counts_of(point: Point, options: Sequence[Option]) -> Counts:
    """Replicas of each of the options at the point."""
    found = {option.key: count for option, count in point.counts}
    return [found.get(option.key, 0) for option in options]


def _within(few: Counts, many: Counts) -> bool:
    """Whether one point has no more replicas of any kind than another."""
    return all(a <= b for a, b in zip(few, many, strict=True))


def _check(options: Sequence[Option], demand: Demand, budget: Budget, goal: Goal) -> None:
    """Raise PlanError for what cannot be meant."""
    if len({option.key for option in options}) < len(options):
        raise PlanError("options: expected distinct keys")
    for option in options:
        if len(option.services) != len(demand.classes):
            raise PlanError(
                f"option {option.key}: {len(option.services)} services for {len(demand.classes)} classes of requests; "
                "expected one each"
            )
    if goal != "rate" and demand.rate_per_s is None:
        raise PlanError(f"goal {goal!r} has no rate: expected demand.rate_per_s")
    free = [o.key for o in options if o.price_usd_per_h is None]
    if free and (goal == "cost" or budget.usd_per_h < inf):
        raise PlanError(f"option {free[0]}: its devices have no price; expected one for a goal or budget in USD")
    endless = [o.key for o in options if goal == "rate" and most_bought(o, budget) == inf]
    if endless:
        raise PlanError(f"goal 'rate': nothing limits the number of {endless[0]}; expected devices, dollars or watts")


def _program(counts: Counts, options: Sequence[Option], demand: Demand, budget: Budget) -> Program | None:
    """The linear program for the highest rate of fixed counts, over the kinds in use; None if a class is not served."""
    used = [k for k, count in enumerate(counts) if count]
    some = [options[k] for k in used]
    if unserved(some, demand) is not None:
        return None
    return Program(some, demand, budget, "rate", None, [counts[k] for k in used])


def best_rate_per_s(counts: Counts, options: Sequence[Option], demand: Demand, budget: Budget) -> float:
    """Highest rate of fixed counts of replicas, requests split as suits them best; links of the budget apply."""
    program = _program(counts, options, demand, budget)
    return 0.0 if program is None else program.split()


def _trimmed(counts: Counts, options: Sequence[Option], demand: Demand, budget: Budget, rate: float | None) -> Counts:
    """The counts without replicas that add nothing to the rate, or that the demanded rate does not need."""
    target = best_rate_per_s(counts, options, demand, budget) if rate is None else rate
    least = list(counts)
    for k in sorted((k for k, count in enumerate(least) if count), key=lambda k: -options[k].gpus):
        while least[k]:
            fewer = [count - (at == k) for at, count in enumerate(least)]
            if best_rate_per_s(fewer, options, demand, budget) < target * (1 - 1e-9):
                break
            least = fewer
    return least


def _point(
    counts: Counts, options: Sequence[Option], demand: Demand, budget: Budget, goal: Goal, bound: float
) -> Point:
    """The counts with their rate, their limits and who serves what."""
    program = _program(counts, options, demand, budget)
    rate = 0.0 if program is None else program.split()
    rows, shares = [], []
    if program is not None and rate > 0:
        for name, row, each in program.rows:
            limit = -row.constant  # used - limit <= 0
            weight = max(0.0, -row.pi) * limit * program.unit / rate
            rows.append(Row(name, (limit - row.slack) * each, limit * each, weight))
        for (phase, k, c), x in program.x.items():
            served = float(x.value()) * program.unit
            if served > 1e-9 * rate:
                shares.append(Share(program.options[k].key, phase, demand.classes[c].name, served))
    totals = {}
    priceless = any(o.price_usd_per_h is None for o, count in zip(options, counts, strict=True) if count)
    for name, limit, amounts in spent(options, budget):
        used = sum(a * count for a, count in zip(amounts, counts, strict=True))
        totals[name] = used
        if limit < inf:
            rows.append(Row(name, used, limit))
    rows.sort(key=lambda row: -row.weight)
    gpus = sum(option.gpus * count for option, count in zip(options, counts, strict=True))
    value = {"rate": rate, "cost": totals["usd per h"], "gpus": float(gpus), "power": totals["watts"]}[goal]
    return Point(
        tuple((option, count) for option, count in zip(options, counts, strict=True) if count),
        value,
        bound,
        rate,
        gpus,
        None if priceless else totals["usd per h"],
        totals["watts"],
        tuple(rows),
        tuple(shares),
    )


def _nothing_fits(options: Sequence[Option], demand: Demand, budget: Budget, goal: Goal) -> NoFeasiblePlanError:
    """Say what the budget reaches, and the cheapest replicas that serve the demand without it."""
    links = Budget(None, link_bytes_per_s=budget.link_bytes_per_s, fabric_bytes_per_s=budget.fabric_bytes_per_s)
    least: Goal = "cost" if goal == "cost" or budget.usd_per_h < inf else "power" if goal == "power" else "gpus"
    unit = min(s.per_s(phase) for o in options for i, s in enumerate(o.services) for phase in phases_of(o, i))
    rate = unit * 1e-3 if goal == "rate" or demand.rate_per_s is None else demand.rate_per_s
    asked = "any rate" if goal == "rate" else f"rate {rate:g}/s"
    wanted = Demand(demand.classes, rate)
    found = Program(options, wanted, links, least, rate).solve(1e-3, 30.0)
    if found is None:
        return NoFeasiblePlanError(
            f"{asked}: no pools serve it on any number of devices: the links carry too little KV from prefill to "
            "decode replicas; expected wider links, aggregated replicas, or one KV format"
        )
    point = _point(_trimmed(found[0], options, wanted, links, rate), options, wanted, links, "cost", 0.0)
    needs = " + ".join(f"{count} x {option.key}" for option, count in point.counts)
    most = ""
    if goal != "rate":
        bounded = all(most_bought(option, budget) < inf for option in options)
        reached = Program(options, demand, budget, "rate", None).solve(1e-3, 30.0) if bounded else None
        if reached is not None:
            most = f"; it reaches {best_rate_per_s(reached[0], options, demand, budget):.4g}/s"
    by_type: dict[str, int] = {}
    for option, count in point.counts:
        by_type[option.hardware] = by_type.get(option.hardware, 0) + count * option.gpus
    devices = ", ".join(f"{count} {hardware}" for hardware, count in by_type.items())
    paid = "" if point.usd_per_h is None else f"{point.usd_per_h:.4g} USD/h, "
    return NoFeasiblePlanError(
        f"{asked}: no pools within {budget} serve it{most}; the least that do are {needs}: {devices}, "
        f"{paid}{point.power_w / 1e3:.3g} kW; raise the budget or lower the demand"
    )


def by_key(point: Point) -> Mapping[str, int]:
    """Replicas of each kind in use, by its key."""
    return {option.key: count for option, count in point.counts}
