"""When does every operation of a graph run on engines and links that each do a few things at a time?

Engines (GPU, CPU, NPU, memory that computes) and links are resources alike, a transfer is an operation on a link.
List scheduling: of the operations whose predecessors have a place, the one a rule ranks first gets the earliest place
behind what its resources already have. Times are sums of the durations given; equal ranks fall to the operation and the
way that were given first, so the same input gives the same schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapreplace
from math import isfinite

from hwmodels.errors import ShardwiseError


class TimelineError(ShardwiseError):
    """Operations or resources from which no schedule can be made."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run an operation: a unit of each of `resources`, all held for `seconds`."""

    resources: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Operation:
    """What is to run.

    ways        to choose from, one or more
    after       names of the operations that must end before
    release_s   when it may start at the earliest
    """

    name: str
    ways: tuple[Way, ...]
    after: tuple[str, ...] = ()
    release_s: float = 0.0


def on(seconds: Mapping[str, float]) -> tuple[Way, ...]:
    """Ways that hold one resource each, by the seconds it takes there.

    >>> on({"gpu": 1.0, "cpu": 3.0})[1]
    Way(resources=('cpu',), seconds=3.0)
    """
    return tuple(Way((resource,), duration) for resource, duration in seconds.items())


class Timelines:
    """Resources whose units are taken one operation after another, never before what they already have.

    capacities   operations a resource runs at once, 1 or more
    free_s       when a resource is first free, 0 by default

    busy_s       seconds of operations by resource so far, all units together
    Raises TimelineError for a capacity below 1.
    """

    __slots__ = ("_free_s", "busy_s", "capacities")

    def __init__(self, capacities: Mapping[str, int], free_s: Mapping[str, float] | None = None) -> None:
        for resource, capacity in capacities.items():
            if capacity < 1:
                raise TimelineError(f"resource {resource}: capacity={capacity}, expected at least 1; leave it out")
        self.capacities = dict(capacities)
        self._free_s = {name: [(free_s or {}).get(name, 0.0)] * units for name, units in capacities.items()}
        self.busy_s = dict.fromkeys(capacities, 0.0)

    def free_s(self, resource: str) -> float:
        """When a unit of the resource is next free."""
        return self._free_s[resource][0]

    def start_s(self, resources: Sequence[str], ready_s: float) -> float:
        """When something that is ready at `ready_s` would start."""
        for resource in resources:
            free_s = self._free_s[resource][0]
            if free_s > ready_s:
                ready_s = free_s
        return ready_s

    def run(self, resources: Sequence[str], ready_s: float, seconds: float) -> float:
        """Hold a unit of each resource for `seconds` as early as it goes; when that ends."""
        end_s = self.start_s(resources, ready_s) + seconds
        for resource in resources:
            heapreplace(self._free_s[resource], end_s)
            self.busy_s[resource] += seconds
        return end_s


@dataclass(slots=True)
class Graph:
    """Operations as a rule may look at them; positions are those in `operations`.

    successors   positions by position
    waiting      predecessors without a place yet, by position; changes as places are given
    tail_s       longest way from the start of an operation to the end of everything, each in its fastest way
    """

    operations: Sequence[Operation]
    successors: list[list[int]]
    waiting: list[int]
    tail_s: list[float]

    def released(self, position: int) -> list[int]:
        """Operations that only wait for this one."""
        return [after for after in self.successors[position] if self.waiting[after] == 1]


@dataclass(frozen=True, slots=True)
class Place:
    """What a rule ranks: an operation run in one of its ways, as early as its resources and predecessors allow."""

    position: int
    way: Way
    start_s: float
    end_s: float


#: What has the least rank is placed first. With the start first in the rank no resource ever idles while something it
#: could run is ready.
Rule = Callable[[Graph, Place], tuple[float, ...]]


def earliest_finish(graph: Graph, place: Place) -> tuple[float, ...]:
    """What ends first; HybriMoE's choice between CPU and GPU (arXiv:2504.05897)."""
    return (place.end_s,)


def critical_path(graph: Graph, place: Place) -> tuple[float, ...]:
    """What can start first, then what most is waiting behind, then the way that ends first."""
    return place.start_s, -graph.tail_s[place.position], place.end_s


def in_order(graph: Graph, place: Place) -> tuple[float, ...]:
    """What can start first, then as given."""
    return place.start_s, place.position


def stall_reduction(engine: str) -> Rule:
    """What can start first, then what lets most work start on `engine` (llm.npu, arXiv:2407.05858).

    C(g) is the time on `engine` of the operations that only wait for g, taken negative where g itself holds `engine`.
    """

    def rule(graph: Graph, place: Place) -> tuple[float, ...]:
        freed_s = sum(
            min((way.seconds for way in graph.operations[after].ways if engine in way.resources), default=0.0)
            for after in graph.released(place.position)
        )
        return place.start_s, freed_s if engine in place.way.resources else -freed_s, place.end_s

    return rule


@dataclass(frozen=True, slots=True)
class Schedule:
    """When and where every operation runs, by name.

    makespan_s   when the last one ends
    busy_s       seconds of operations by resource, all its units together
    """

    start_s: dict[str, float]
    end_s: dict[str, float]
    way: dict[str, Way]
    makespan_s: float
    busy_s: dict[str, float]
    capacities: dict[str, int] = field(default_factory=dict)

    def utilisation(self, resource: str) -> float:
        """Part of the resource's time until the makespan that is used, in [0, 1]."""
        available_s = self.capacities[resource] * self.makespan_s
        return self.busy_s[resource] / available_s if available_s else 0.0


def list_schedule(
    operations: Sequence[Operation],
    capacities: Mapping[str, int],
    rule: Rule = critical_path,
    *,
    free_s: Mapping[str, float] | None = None,
) -> Schedule:
    """Give every operation a place, one after another by the rule.

    capacities   operations each resource runs at once
    free_s       when a resource is first free, 0 by default

    Raises TimelineError for names given twice or unknown, operations without a way, durations that are negative or not
    finite, and operations that wait for each other.

    >>> load, run = Operation("load", on({"link": 2.0})), Operation("run", on({"gpu": 1.0, "cpu": 4.0}), ("load",))
    >>> list_schedule([load, run], {"gpu": 1, "cpu": 1, "link": 1}).makespan_s
    3.0
    """
    graph = graph_of(operations, capacities)
    lines = Timelines(capacities, free_s)
    ready_s = [operation.release_s for operation in operations]
    ready = [position for position, waiting in enumerate(graph.waiting) if not waiting]
    start: dict[str, float] = {}
    end: dict[str, float] = {}
    ways: dict[str, Way] = {}
    while ready:
        ranked = []
        for position in ready:
            for choice, way in enumerate(operations[position].ways):
                start_s = lines.start_s(way.resources, ready_s[position])
                place = Place(position, way, start_s, start_s + way.seconds)
                ranked.append((rule(graph, place), position, choice, place))
        place = min(ranked, key=lambda entry: entry[:3])[3]
        name = operations[place.position].name
        start[name], ways[name] = place.start_s, place.way
        end[name] = end_s = lines.run(place.way.resources, place.start_s, place.way.seconds)
        ready.remove(place.position)
        for after in graph.successors[place.position]:
            graph.waiting[after] -= 1
            ready_s[after] = max(ready_s[after], end_s)
            if not graph.waiting[after]:
                ready.append(after)
    return Schedule(start, end, ways, max(end.values(), default=0.0), lines.busy_s, lines.capacities)


def lower_bound_s(operations: Sequence[Operation], capacities: Mapping[str, int]) -> float:
    """A makespan no schedule beats: the critical path, and the work of each resource over its capacity.

    Work counts on a resource if every way of the operation holds it, in the fastest; over all resources together the
    fastest way counts once for each it holds. Raises TimelineError as list_schedule.
    """
    graph = graph_of(operations, capacities)
    paths = (operation.release_s + tail for operation, tail in zip(operations, graph.tail_s, strict=True))
    bound_s = max(paths, default=0.0)
    for resource, capacity in capacities.items():
        own = (op for op in operations if all(resource in way.resources for way in op.ways))
        bound_s = max(bound_s, sum(min(way.seconds for way in op.ways) for op in own) / capacity)
    least_s = sum(min(way.seconds * len(way.resources) for way in op.ways) for op in operations)
    return max(bound_s, least_s / max(1, sum(capacities.values())))


def graph_of(operations: Sequence[Operation], resources: Collection[str]) -> Graph:
    """The operations with what follows each; raises TimelineError as list_schedule."""
    positions = {operation.name: position for position, operation in enumerate(operations)}
    if len(positions) < len(operations):
        names = [operation.name for operation in operations]
        twice = next(name for name in names if names.count(name) > 1)
        raise TimelineError(f"operation {twice!r} is given twice: expected a name of its own for each")
    successors: list[list[int]] = [[] for _ in operations]
    waiting = [0] * len(operations)
    for position, operation in enumerate(operations):
        _check(operation, resources)
        for name in dict.fromkeys(operation.after):
            if name not in positions:
                raise TimelineError(f"operation {operation.name!r} is after {name!r}: expected an operation given too")
            successors[positions[name]].append(position)
            waiting[position] += 1
    order = _ordered(operations, successors, waiting)
    tail_s = [0.0] * len(operations)
    for position in reversed(order):
        least_s = min(way.seconds for way in operations[position].ways)
        tail_s[position] = least_s + max((tail_s[after] for after in successors[position]), default=0.0)
    return Graph(operations, successors, waiting, tail_s)


def _check(operation: Operation, resources: Collection[str]) -> None:
    if not operation.ways:
        raise TimelineError(f"operation {operation.name!r} has no way to run: expected one or more")
    for value in (operation.release_s, *(way.seconds for way in operation.ways)):
        if not (isfinite(value) and value >= 0):
            raise TimelineError(f"operation {operation.name!r}: {value} s, expected a finite time of at least 0")
    for way in operation.ways:
        unknown = [resource for resource in way.resources if resource not in resources]
        if unknown or len(set(way.resources)) < len(way.resources):
            raise TimelineError(
                f"operation {operation.name!r} runs on {', '.join(way.resources)}: expected different ones of "
                f"{', '.join(resources)}"
            )


def _ordered(operations: Sequence[Operation], successors: list[list[int]], waiting: list[int]) -> list[int]:
    """Positions so that every operation comes behind those it is after."""
    left = list(waiting)
    ready = [position for position, count in enumerate(left) if not count]
    order = []
    while ready:
        order.append(ready.pop())
        for after in successors[order[-1]]:
            left[after] -= 1
            if not left[after]:
                ready.append(after)
    if len(order) < len(operations):
        stuck = [operations[position].name for position, count in enumerate(left) if count]
        raise TimelineError(f"operations {', '.join(stuck[:8])} wait for each other: expected no circle")
    return order
