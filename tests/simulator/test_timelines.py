"""Lists of operations get places that break no law, and not far from the best there are."""

from __future__ import annotations

from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.timelines import (
    Operation,
    Rule,
    Schedule,
    TimelineError,
    Timelines,
    Way,
    critical_path,
    earliest_finish,
    in_order,
    list_schedule,
    lower_bound_s,
    on,
    stall_reduction,
)

RULES: tuple[Rule, ...] = (critical_path, earliest_finish, in_order, stall_reduction("a"))
DURATION = st.integers(0, 9).map(float)


@st.composite
def graphs(draw: st.DrawFn, most: int = 12, resources: str = "abc", choice: bool = True) -> list[Operation]:
    """Operations that come behind some of those before them, on one of the resources or on several at once."""
    found: list[Operation] = []
    for index in range(draw(st.integers(1, most))):
        if choice:
            sets = st.sets(st.sampled_from(resources), min_size=1, max_size=2).map(lambda names: tuple(sorted(names)))
            ways = tuple(
                Way(names, draw(DURATION)) for names in draw(st.lists(sets, min_size=1, max_size=2, unique=True))
            )
        else:
            ways = on({draw(st.sampled_from(resources)): draw(DURATION)})
        before = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        found.append(Operation(str(index), ways, tuple(str(one) for one in sorted(before)), draw(DURATION) / 4))
    return found


def assert_lawful(operations: list[Operation], capacities: dict[str, int], schedule: Schedule) -> None:
    """Every operation once, in one of its ways, behind its predecessors; no resource runs more than it can."""
    assert set(schedule.start_s) == {operation.name for operation in operations}
    for operation in operations:
        start_s, way = schedule.start_s[operation.name], schedule.way[operation.name]
        assert way in operation.ways
        assert schedule.end_s[operation.name] == start_s + way.seconds
        assert start_s >= operation.release_s
        assert all(start_s >= schedule.end_s[name] for name in operation.after)
    for resource, capacity in capacities.items():
        names = [name for name, way in schedule.way.items() if resource in way.resources]
        for name in names:
            at_s = schedule.start_s[name]
            running = [one for one in names if schedule.start_s[one] <= at_s < schedule.end_s[one]]
            assert len(running) <= capacity
        assert schedule.busy_s[resource] == pytest.approx(sum(schedule.way[name].seconds for name in names))
        assert 0 <= schedule.utilisation(resource) <= 1 + 1e-12
    assert schedule.makespan_s == max(schedule.end_s.values())


@settings(max_examples=150, deadline=None)
@given(graphs(), st.integers(1, 3), st.sampled_from(RULES))
def test_laws_of_a_schedule(operations: list[Operation], capacity: int, rule: Rule) -> None:
    capacities = {"a": capacity, "b": 1, "c": 2}
    schedule = list_schedule(operations, capacities, rule)
    assert_lawful(operations, capacities, schedule)
    assert schedule.makespan_s >= lower_bound_s(operations, capacities) - 1e-9
    assert list_schedule(operations, capacities, rule) == schedule


@settings(max_examples=100, deadline=None)
@given(graphs(choice=False), st.sampled_from([critical_path, in_order, stall_reduction("a")]))
def test_no_resource_idles_while_something_for_it_is_ready(operations: list[Operation], rule: Rule) -> None:
    """Rules that rank the start first: an operation starts when it is ready or when its resource just ended another."""
    schedule = list_schedule(operations, dict.fromkeys("abc", 1), rule)
    for operation in operations:
        resource = operation.ways[0].resources[0]
        ready_s = max([operation.release_s, *(schedule.end_s[name] for name in operation.after)])
        busy = sorted(
            (schedule.start_s[name], schedule.end_s[name])
            for name, way in schedule.way.items()
            if way.resources[0] == resource and schedule.start_s[name] < schedule.start_s[operation.name]
        )
        at_s = ready_s
        for start_s, end_s in busy:
            if start_s <= at_s:
                at_s = max(at_s, end_s)
        assert schedule.start_s[operation.name] == at_s


def optimum_s(operations: list[Operation], capacities: dict[str, int]) -> float:
    """The shortest makespan over all orders and ways: among them is an optimal one, as places only move forward."""
    best_s = float("inf")
    for ways in product(*(operation.ways for operation in operations)):
        for order in permutations(range(len(operations))):
            lines, ends = Timelines(capacities), dict[str, float]()
            for index in order:
                operation = operations[index]
                if any(name not in ends for name in operation.after):
                    break
                ready_s = max([operation.release_s, *(ends[name] for name in operation.after)])
                ends[operation.name] = lines.run(ways[index].resources, ready_s, ways[index].seconds)
            else:
                best_s = min(best_s, max(ends.values()))
    return best_s


@settings(max_examples=60, deadline=None)
@given(graphs(most=5, resources="ab"), st.sampled_from(RULES))
def test_never_better_than_the_best_of_all_orders(operations: list[Operation], rule: Rule) -> None:
    capacities = {"a": 1, "b": 1}
    best_s = optimum_s(operations, capacities)
    assert lower_bound_s(operations, capacities) <= best_s + 1e-9
    assert list_schedule(operations, capacities, rule).makespan_s >= best_s - 1e-9


@settings(max_examples=60, deadline=None)
@given(graphs(most=6, resources="a", choice=False), st.integers(1, 3), st.sampled_from([critical_path, in_order]))
def test_graham_bound(operations: list[Operation], units: int, rule: Rule) -> None:
    """Equal machines, no releases: at most 2 - 1/m times the optimum (Graham 1969), whatever the rule."""
    free = [Operation(op.name, op.ways, op.after) for op in operations]
    capacities = {"a": units}
    best_s = optimum_s(free, capacities)
    assert list_schedule(free, capacities, rule).makespan_s <= (2 - 1 / units) * best_s + 1e-9


@settings(max_examples=60, deadline=None)
@given(graphs(most=6, resources="ab", choice=False), st.sampled_from([critical_path, in_order, stall_reduction("a")]))
def test_two_engines_at_most_twice_the_optimum(operations: list[Operation], rule: Rule) -> None:
    """Without releases one of the two always works, and no schedule is shorter than half of all work."""
    free = [Operation(op.name, op.ways, op.after) for op in operations]
    capacities = {"a": 1, "b": 1}
    assert list_schedule(free, capacities, rule).makespan_s <= 2 * optimum_s(free, capacities) + 1e-9


def test_critical_path_goes_first() -> None:
    """A short start of a long chain before a long operation nothing waits for."""
    operations = [
        Operation("alone", on({"a": 3.0})),
        Operation("first", on({"a": 1.0})),
        Operation("then", on({"b": 5.0}), ("first",)),
    ]
    assert list_schedule(operations, {"a": 1, "b": 1}, critical_path).makespan_s == 6.0
    assert list_schedule(operations, {"a": 1, "b": 1}, in_order).makespan_s == 9.0


def test_llm_npu_rule_feeds_the_npu() -> None:
    """Of two that the CPU could start, the one behind which the NPU has more to do (llm.npu's C(g))."""
    operations = [
        Operation("small", on({"cpu": 1.0})),
        Operation("large", on({"cpu": 1.0})),
        Operation("npu small", on({"npu": 2.0}), ("small",)),
        Operation("npu large", on({"npu": 7.0}), ("large",)),
    ]
    schedule = list_schedule(operations, {"cpu": 1, "npu": 1}, stall_reduction("npu"))
    assert schedule.start_s["large"] == 0.0
    assert schedule.makespan_s == 10.0
    assert schedule.utilisation("npu") == pytest.approx(0.9)


def test_llm_npu_rule_frees_the_others_from_the_npu() -> None:
    """Of two that run on the NPU itself, the one behind which it has less to do."""
    operations = [
        Operation("for the npu", on({"npu": 1.0})),
        Operation("for the cpu", on({"npu": 1.0})),
        Operation("npu", on({"npu": 5.0}), ("for the npu",)),
        Operation("cpu", on({"cpu": 5.0}), ("for the cpu",)),
    ]
    schedule = list_schedule(operations, {"cpu": 1, "npu": 1}, stall_reduction("npu"))
    assert schedule.start_s["for the cpu"] == 0.0
    assert schedule.makespan_s == 7.0


def test_a_link_is_a_resource_and_an_operation_may_hold_two() -> None:
    operations = [
        Operation("load", (Way(("link", "bridge"), 2.0),)),
        Operation("other", (Way(("bridge",), 1.0),)),
        Operation("run", on({"gpu": 1.0, "cpu": 5.0}), ("load",)),
    ]
    schedule = list_schedule(operations, dict.fromkeys(("link", "bridge", "gpu", "cpu"), 1), in_order)
    assert schedule.start_s == {"load": 0.0, "other": 2.0, "run": 2.0}
    assert schedule.makespan_s == 3.0


def test_resources_may_be_busy_before() -> None:
    schedule = list_schedule([Operation("run", on({"gpu": 1.0}))], {"gpu": 1}, free_s={"gpu": 4.0})
    assert schedule.makespan_s == 5.0
    assert list_schedule([], {"gpu": 1}).makespan_s == 0.0


@pytest.mark.parametrize(
    ("operations", "told"),
    [
        ([Operation("x", on({"a": 1.0})), Operation("x", on({"a": 1.0}))], "'x' is given twice"),
        ([Operation("x", on({"a": 1.0}), ("y",))], "after 'y'"),
        ([Operation("x", on({"z": 1.0}))], "runs on z: expected different ones of a, b"),
        ([Operation("x", (Way(("a", "a"), 1.0),))], "expected different ones"),
        ([Operation("x", ())], "no way to run"),
        ([Operation("x", on({"a": -1.0}))], "expected a finite time"),
        ([Operation("x", on({"a": 1.0}), release_s=float("inf"))], "expected a finite time"),
        ([Operation("x", on({"a": 1.0}), ("y",)), Operation("y", on({"a": 1.0}), ("x",))], "wait for each other"),
    ],
)
def test_bad_input_is_told(operations: list[Operation], told: str) -> None:
    with pytest.raises(TimelineError, match=told):
        list_schedule(operations, {"a": 1, "b": 1})


def test_capacity_below_one_is_told() -> None:
    with pytest.raises(TimelineError, match="capacity=0"):
        Timelines({"a": 0})
