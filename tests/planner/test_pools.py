"""Pool sizing against trying every combination of counts, each with a linear program over pairs of replicas."""

from __future__ import annotations

from itertools import product
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from planner.dominance import undominated
from planner.errors import NoFeasiblePlanError, PlanError
from planner.options import Budget, Class, Demand, Option, Role, Service, phases_of
from planner.poolprogram import Goal
from planner.pools import Point, best_rate_per_s, by_key, counts_of, size_pools

HARDWARE = ("x", "y")
RATES = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5, 8.0])
GOALS: tuple[Goal, ...] = ("rate", "cost", "gpus", "power")
Counts = tuple[int, ...]


@st.composite
def services(draw: st.DrawFn) -> Service:
    return Service(
        *(draw(RATES) for _ in range(4)),
        prefill_token_s=draw(st.sampled_from([0.0, 10.0])),
        decode_token_s=draw(st.sampled_from([0.0, 50.0, 300.0])),
        whole_token_s=draw(st.sampled_from([0.0, 80.0])),
        kv_bytes=draw(st.sampled_from([0.0, 5.0])),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Option], Demand, Budget]:
    """A few kinds of replica, one or two classes, budgets that leave few points."""
    encodes = draw(st.booleans())
    classes = (Class("a", 1.0, encodes),)
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.25, 0.5]))
        classes = (Class("a", share, encodes), Class("b", 1 - share))
    roles: list[Role] = ["aggregated", "prefill", "decode", "mixed", "encode"]
    options = [
        Option(
            f"k{i}",
            draw(st.sampled_from(roles)),
            draw(st.sampled_from(HARDWARE)),
            draw(st.integers(1, 3)),
            tuple(draw(services()) for _ in classes),
            kv_tokens=draw(st.sampled_from([100.0, inf])),
            link_bytes_per_s=draw(st.sampled_from([8.0, inf])),
            kv_format=draw(st.sampled_from(["bf16", "bf16", "fp8"])),
            price_usd_per_h=draw(st.sampled_from([1.0, 2.5, 4.0])),
            power_w=draw(st.sampled_from([0.0, 300.0, 700.0])),
        )
        for i in range(draw(st.integers(2, 4)))
    ]
    bandwidth = st.sampled_from([0.0, 4.0, 12.0, inf])
    budget = Budget(
        {name: draw(st.integers(0, 4)) for name in HARDWARE},
        draw(st.sampled_from([6.0, 10.0, inf])),
        draw(st.sampled_from([1500.0, inf])),
        {(a, b): draw(bandwidth) for a in HARDWARE for b in HARDWARE if draw(st.booleans())},
        draw(st.sampled_from([10.0, inf])),
    )
    return options, Demand(classes, draw(st.sampled_from([0.5, 2.0, 5.0]))), budget


def affordable(options: list[Option], budget: Budget) -> list[Counts]:
    assert budget.gpus is not None
    gpus = budget.gpus
    found = []
    for counts in product(*(range(gpus[option.hardware] // option.gpus + 1) for option in options)):
        chosen = list(zip(options, counts, strict=True))
        used = {name: sum(o.gpus * n for o, n in chosen if o.hardware == name) for name in HARDWARE}
        paid = sum((o.price_usd_per_h or 0.0) * n for o, n in chosen)
        power = sum(o.power_w * n for o, n in chosen)
        if all(used[name] <= gpus[name] for name in HARDWARE) and paid <= budget.usd_per_h and power <= budget.power_w:
            found.append(counts)
    return found


def rate_of(counts: Counts, options: list[Option], demand: Demand, budget: Budget) -> float:
    """Highest rate, with one variable for each pair of a prefill and a decode replica kind instead of flows."""
    columns: list[dict[str, float]] = []
    lower: list[dict[str, float]] = []
    for c, kind in enumerate(demand.classes):
        does = [phases_of(option, c) if counts[k] else () for k, option in enumerate(options)]
        for a, one in enumerate(options):
            s = one.services[c]
            if "whole" in does[a]:
                columns.append({f"busy{a}": 1 / s.whole_per_s, f"kv{a}": s.whole_token_s})
                lower.append({f"served{c}": 1.0})
            if "encode" in does[a] and kind.encodes:
                columns.append({f"busy{a}": 1 / s.encode_per_s})
                lower.append({f"encoded{c}": 1.0})
            for b, other in enumerate(options):
                way = budget.link(one.hardware, other.hardware)
                if "prefill" not in does[a] or "decode" not in does[b] or one.kv_format != other.kv_format or way == 0:
                    continue
                t, column = other.services[c], {}
                for name, amount in (
                    (f"busy{a}", 1 / s.prefill_per_s),
                    (f"busy{b}", 1 / t.decode_per_s),
                    (f"kv{a}", s.prefill_token_s),
                    (f"kv{b}", t.decode_token_s),
                    (f"out{a}", s.kv_bytes),
                    (f"in{b}", t.kv_bytes),
                    (f"{one.hardware}>{other.hardware}", s.kv_bytes),
                    ("fabric", s.kv_bytes),
                ):
                    column[name] = column.get(name, 0.0) + amount
                columns.append(column)
                lower.append({f"served{c}": 1.0})
    limits: dict[str, float] = {"fabric": budget.fabric_bytes_per_s}
    limits |= {f"{a}>{b}": budget.link(a, b) for a in HARDWARE for b in HARDWARE}
    for k, option in enumerate(options):
        limits[f"busy{k}"] = counts[k]
        limits[f"kv{k}"] = counts[k] * option.kv_tokens if counts[k] else 0.0
        limits[f"out{k}"] = limits[f"in{k}"] = counts[k] * option.link_bytes_per_s if counts[k] else 0.0
    upper = [([column.get(name, 0.0) for column in columns] + [0.0], m) for name, m in limits.items() if m < inf]
    for c, kind in enumerate(demand.classes):
        for what in ["served", *(["encoded"] if kind.encodes else [])]:
            upper.append(([-row.get(f"{what}{c}", 0.0) for row in lower] + [kind.share], 0.0))
    answer = linprog(
        [0.0] * len(columns) + [-1.0],
        np.array([row for row, _ in upper]),
        [limit for _, limit in upper],
        method="highs",
    )
    assert answer.status == 0
    return float(-answer.fun)


def value_of(counts: Counts, options: list[Option], goal: Goal, rate: float) -> float:
    """The goal, higher is better."""
    chosen = list(zip(options, counts, strict=True))
    cost = sum((o.price_usd_per_h or 0.0) * n for o, n in chosen)
    gpus = float(sum(o.gpus * n for o, n in chosen))
    return {"rate": rate, "cost": -cost, "gpus": -gpus, "power": -sum(o.power_w * n for o, n in chosen)}[goal]


def within(few: Counts, many: Counts) -> bool:
    return all(a <= b for a, b in zip(few, many, strict=True))


def replicas(point: Point, options: list[Option]) -> Counts:
    return tuple(counts_of(point, options))


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(GOALS))
def test_pools_against_brute_force(case: tuple[list[Option], Demand, Budget], goal: Goal) -> None:
    """The best value, the k best, their rates and bounds; nothing where nothing serves."""
    options, demand, budget = case
    assert demand.rate_per_s is not None
    kept = undominated(options)
    rates = {counts: rate_of(counts, options, demand, budget) for counts in affordable(options, budget)}
    least = 1e-9 if goal == "rate" else demand.rate_per_s
    serving = {counts: rate for counts, rate in rates.items() if rate >= least * (1 - 1e-9)}
    if not serving:
        with pytest.raises(NoFeasiblePlanError):
            size_pools(options, demand, budget, goal, gap=0.0)
        return
    sizing = size_pools(options, demand, budget, goal, keep=4, gap=0.0)
    values = {counts: value_of(counts, options, goal, rate) for counts, rate in serving.items()}
    sign = 1 if goal == "rate" else -1
    assert sign * sizing.best.value == pytest.approx(max(values.values()), rel=1e-6, abs=1e-6)
    assert sizing.proven

    irredundant = {
        counts: value
        for counts, value in values.items()
        if all(n == 0 or option in kept for option, n in zip(options, counts, strict=True))
        and not any(
            few != counts and within(few, counts) and (goal != "rate" or serving[few] >= serving[counts] * (1 - 1e-7))
            for few in serving
        )
    }
    earlier: list[Counts] = []
    for point in sizing.points:
        counts = replicas(point, options)
        assert counts in irredundant
        assert point.rate_per_s == pytest.approx(serving[counts], rel=1e-6)
        assert sign * point.bound >= sign * point.value - 1e-6 * abs(point.value)
        rest = [v for n, v in irredundant.items() if not any(within(n, e) or within(e, n) for e in earlier)]
        assert sign * point.value == pytest.approx(max(rest), rel=1e-6, abs=1e-6)
        assert not any(within(counts, e) or within(e, counts) for e in earlier)
        earlier.append(counts)
    if len(sizing.points) < 4:
        assert all(any(within(n, e) or within(e, n) for e in earlier) for n in irredundant)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_rows_explain_the_rate(case: tuple[list[Option], Demand, Budget]) -> None:
    """Duality: prices times limits add up to the rate; rows with a price are used up, none beyond its limit."""
    options, demand, budget = case
    try:
        best = size_pools(options, demand, budget).best
    except NoFeasiblePlanError:
        return
    assert sum(row.weight for row in best.rows) == pytest.approx(1.0, rel=1e-6)
    for row in best.rows:
        assert row.used <= row.limit * (1 + 1e-6) + 1e-9
    for row in best.tight:
        assert row.used == pytest.approx(row.limit, rel=1e-6)
    for kind in demand.classes:
        mine = [share for share in best.shares if share.class_name == kind.name]
        for phases in ({"prefill", "whole"}, {"decode", "whole"}, *([{"encode"}] if kind.encodes else [])):
            served = sum(share.rate_per_s for share in mine if share.phase in phases)
            assert served == pytest.approx(kind.share * best.rate_per_s, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_more_budget_is_never_worse(case: tuple[list[Option], Demand, Budget]) -> None:
    options, demand, budget = case
    assert budget.gpus is not None
    more = Budget({name: count + 1 for name, count in budget.gpus.items()}, budget.usd_per_h, budget.power_w,
                  budget.link_bytes_per_s, budget.fabric_bytes_per_s)  # fmt: skip
    try:
        less = size_pools(options, demand, budget, gap=0.0).best.value
    except NoFeasiblePlanError:
        return
    assert size_pools(options, demand, more, gap=0.0).best.value >= less * (1 - 1e-6)


def plain(key: str, role: Role, gpus: int, per_s: float, *, hardware: str = "x", usd: float = 1.0) -> Option:
    phase = "whole" if role == "aggregated" else role
    return Option(key, role, hardware, gpus, (Service(**{f"{phase}_per_s": per_s}),), price_usd_per_h=usd)


def test_small_replicas_beside_pools_use_what_is_left() -> None:
    """Eight devices: 1 prefill and 2 decode replicas of two serve 10/s; an aggregated one takes the last two."""
    options = [plain("p", "prefill", 2, 10.0), plain("d", "decode", 2, 5.0), plain("a", "aggregated", 2, 3.0)]
    best = size_pools(options, Demand(), Budget({"x": 8})).best
    assert by_key(best) == {"p": 1, "d": 2, "a": 1}
    assert best.value == pytest.approx(13.0)
    assert {row.name for row in best.tight} >= {"busy a"}


def test_a_mixed_replica_divides_its_time() -> None:
    """Half a second of prefill and half of decode each request: one per second, or the phases that others leave it."""
    both = Option("m", "mixed", "x", 1, (Service(prefill_per_s=2.0, decode_per_s=2.0, whole_per_s=0.8),))
    assert size_pools([both], Demand(), Budget({"x": 1})).best.value == pytest.approx(1.0)
    pools = [both, plain("p", "prefill", 1, 2.0)]
    assert size_pools(pools, Demand(), Budget({"x": 2})).best.value == pytest.approx(2.0)


def test_classes_may_go_to_different_pools() -> None:
    long = Option("long", "aggregated", "x", 1, (Service(whole_per_s=4.0), Service(whole_per_s=2.0)))
    short = Option("short", "aggregated", "x", 1, (Service(whole_per_s=8.0), Service()))
    best = size_pools([long, short], Demand((Class("chat", 0.8), Class("book", 0.2))), Budget({"x": 2})).best
    assert by_key(best) == {"long": 1, "short": 1}
    # 0.8 r <= 8 + 4 (1 - 0.2 r / 2)
    assert best.value == pytest.approx(10.0)
    assert {(s.class_name, s.key) for s in best.shares if s.rate_per_s > 1e-6} >= {("chat", "short"), ("book", "long")}


def test_no_more_kinds_than_wanted() -> None:
    """One kind alone serves less than two together, and the bound says so."""
    options = [plain("a", "aggregated", 3, 3.3), plain("b", "aggregated", 2, 2.0)]
    assert size_pools(options, Demand(), Budget({"x": 8})).best.value == pytest.approx(8.6)
    one = size_pools(options, Demand(), Budget({"x": 8}), most_kinds=1, gap=0.0).best
    assert by_key(one) == {"b": 4}
    assert one.value == pytest.approx(8.0) == one.bound


def test_links_between_types_hold_the_rate_down() -> None:
    prefill = Option("p", "prefill", "x", 1, (Service(prefill_per_s=10.0, kv_bytes=1e9),))
    decode = Option("d", "decode", "y", 1, (Service(decode_per_s=10.0, kv_bytes=1e9),))
    budget = Budget({"x": 1, "y": 1}, link_bytes_per_s={("x", "y"): 4e9})
    best = size_pools([prefill, decode], Demand(), budget).best
    assert best.value == pytest.approx(4.0)
    assert [row.name for row in best.tight] == ["link x > y"]


@pytest.mark.parametrize("way", [{"links": {("x", "y"): 0.0}}, {"format": "fp8"}])
def test_pools_that_cannot_exchange_kv(way: dict[str, object]) -> None:
    prefill = Option("p", "prefill", "x", 1, (Service(prefill_per_s=1.0, kv_bytes=1.0),), kv_format="bf16")
    decode = Option("d", "decode", "y", 1, (Service(decode_per_s=1.0, kv_bytes=1.0),), kv_format=str(way.get("format", "bf16")))  # fmt: skip # noqa: E501
    links = way.get("links", {})
    assert isinstance(links, dict)
    with pytest.raises(NoFeasiblePlanError, match="links carry too little KV"):
        size_pools([prefill, decode], Demand(), Budget({"x": 4, "y": 4}, link_bytes_per_s=links))


def test_a_budget_nothing_fits_in_names_the_cheapest() -> None:
    options = [plain("p", "prefill", 2, 10.0, usd=5.0), plain("d", "decode", 1, 4.0, usd=2.0)]
    with pytest.raises(
        NoFeasiblePlanError, match=r"20/s: .* 4 x, 0 y, 100 USD/h .* 8/s.* 2 x p \+ 5 x d: 9 x, 20 USD/h"
    ):
        size_pools(options, Demand(rate_per_s=20.0), Budget({"x": 4, "y": 0}, 100.0), "cost")
    with pytest.raises(NoFeasiblePlanError, match=r"any rate: .* 1 x p \+ 1 x d: 3 x, 7 USD/h"):
        size_pools(options, Demand(), Budget({"x": 4}, 5.0))


def test_a_phase_nobody_does() -> None:
    with pytest.raises(NoFeasiblePlanError, match="class default: no kind of replica can decode it"):
        size_pools([plain("p", "prefill", 1, 1.0)], Demand(), Budget({"x": 4}))


@pytest.mark.parametrize(
    ("options", "demand", "budget", "goal", "told"),
    [
        ([plain("a", "aggregated", 1, 1.0)] * 2, Demand(), Budget({"x": 4}), "rate", "distinct"),
        ([plain("a", "aggregated", 1, 1.0)], Demand(), Budget({"x": 4}), "cost", "no rate"),
        ([plain("a", "aggregated", 1, 1.0)], Demand(), Budget(), "rate", "nothing limits"),
        ([Option("a", "aggregated", "x", 1, ())], Demand(), Budget({"x": 4}), "rate", "0 services for 1 classes"),
        ([Option("a", "aggregated", "x", 1, (Service(whole_per_s=1.0),))], Demand(rate_per_s=1.0), Budget(), "cost", "no price"),  # noqa: E501
    ],
)  # fmt: skip
def test_questions_that_cannot_be_meant(
    options: list[Option], demand: Demand, budget: Budget, goal: Goal, told: str
) -> None:
    with pytest.raises(PlanError, match=told):
        size_pools(options, demand, budget, goal)


def test_two_small_replicas_replace_a_large_one() -> None:
    """Half the devices and half the capacity, twice: the large one is left out; a faster large one stays."""
    kinds = [("l", 4, 10.0, 2.0), ("s", 2, 5.0, 1.0), ("f", 4, 10.5, 2.0)]
    large, small, fast = (plain(key, "prefill", gpus, rate, usd=usd) for key, gpus, rate, usd in kinds)
    assert [option.key for option in undominated([large, small])] == ["s"]
    assert [option.key for option in undominated([fast, small])] == ["f", "s"]
    assert [option.key for option in undominated([small, small])] == ["s"]


@settings(max_examples=40, deadline=None)
@given(cases())
def test_leaving_out_dominated_kinds_loses_nothing(case: tuple[list[Option], Demand, Budget]) -> None:
    options, demand, budget = case
    every = max(best_rate_per_s(list(n), options, demand, budget) for n in affordable(options, budget))
    kept = undominated(options)
    fewer = max((best_rate_per_s(list(n), kept, demand, budget) for n in affordable(kept, budget)), default=0.0)
    assert fewer == pytest.approx(every, rel=1e-6, abs=1e-9)
