"""How fast does each of many simultaneous transfers move when they share links max-min fairly?

A flow is a number of bytes on their way over a fixed set of links. At any time the rates are the weighted max-min fair
ones: no flow can be given more without taking from one that has no more per stream (Bertsekas and Gallager, Data
Networks, section 6.5.2). They change only when a flow starts or ends, and then only those of flows that the change
reaches; between two changes every flow moves in a straight line. There is no clock here: the caller says what time it
is and asks when something happens next.

What keeps a change cheap, each exact: links that another one always fills first are never looked at (flowlinks); a
flow that finds room on all its links moves at once, and otherwise only rates that change are worked out (maxmin); a
flow that slows down is looked at again only when it was to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.flowlinks import Flow, FlowError, Link, Path, add_path, fractions_of
from simulator.maxmin import MaxMin


@dataclass(frozen=True, slots=True)
class FlowRecord:
    """One flow that has ended: its number, when it began to move, when its last byte arrived, and its bytes."""

    flow: int
    start_s: float
    end_s: float
    nbytes: float


class Flows:
    """Transfers over links of `capacities_bytes_per_s`, in the order of time.

    record   keep a FlowRecord of every flow in `records`

    Times given to its methods never go back.
    """

    def __init__(self, capacities_bytes_per_s: ArrayLike, *, record: bool = False) -> None:
        capacities = np.asarray(capacities_bytes_per_s, dtype=float)
        if capacities.ndim != 1 or not (np.isfinite(capacities) & (capacities > 0)).all():
            raise FlowError("capacities of links: expected one positive, finite number of bytes/s for each")
        self.records: list[FlowRecord] | None = [] if record else None
        self.now_s = 0.0
        self._links = [Link(index, capacity) for index, capacity in enumerate(capacities.tolist())]
        self._paths: dict[tuple[tuple[int, ...], tuple[float, ...] | None, float], Path] = {}
        self._flows: dict[int, Flow] = {}
        self._rates = MaxMin()
        self._due = self._rates.due
        self._postponed: list[tuple[float, int, Path, float, float, int]] = []
        self._ended: list[tuple[int, float]] = []
        self._count = 0

    def __len__(self) -> int:
        """Flows on their way."""
        return len(self._flows)

    def start(
        self,
        at_s: float,
        links: tuple[int, ...],
        nbytes: float,
        *,
        shares: tuple[float, ...] | None = None,
        weight: float = 1.0,
        priority: int = 0,
        limit_bytes_per_s: float = inf,
        earliest_s: float | None = None,
    ) -> int:
        """Start a flow of `nbytes` over `links` and return its number.

        shares             fraction of its bytes that crosses each link; all of them by default
        weight             streams it stands for: where links are short it gets as much as that many flows
        priority           flows of higher priority take what they can before others get any
        limit_bytes_per_s  the most it can move, as the rate at which its bytes are made
        earliest_s         when it starts to move, if that is after `at_s`

        Without links and without a limit it takes no time. Raises FlowError for what cannot be a flow.
        """
        path = self._paths.get((links, shares, weight))
        if path is None:
            path = self._new_path(links, shares, weight)
        if not (0.0 <= nbytes < inf and limit_bytes_per_s > 0.0):
            raise FlowError(
                f"flow of {nbytes} bytes at most {limit_bytes_per_s} bytes/s: expected at least 0 bytes and a limit "
                "above 0"
            )
        if at_s < self.now_s:
            raise FlowError(f"flow at {at_s} s: expected no earlier than {self.now_s} s, the time already reached")
        number = self._count
        self._count = number + 1
        if earliest_s is not None and earliest_s > at_s:
            heappush(self._postponed, (earliest_s, number, path, nbytes, limit_bytes_per_s, priority))
            return number
        if (self._due and self._due[0][0] <= at_s) or (self._postponed and self._postponed[0][0] <= at_s):
            self._run(at_s)
        self.now_s = at_s
        self._begin(at_s, number, path, nbytes, limit_bytes_per_s, priority)
        return number

    def next_s(self) -> float:
        """When a flow next ends or starts to move; inf if none will."""
        due = self._due
        while due:
            at, number, flow = due[0]
            if at != flow.due:
                heappop(due)
            elif at < flow.end:
                heappop(due)
                flow.due = flow.end
                if flow.end < inf:
                    heappush(due, (flow.end, number, flow))
            else:
                break
        at = due[0][0] if due else inf
        if self._postponed and self._postponed[0][0] < at:
            at = self._postponed[0][0]
        return self._ended[0][1] if self._ended else at

    def advance(self, to_s: float) -> list[tuple[int, float]]:
        """Move everything on to `to_s`; number and time of the flows that have ended since the last call, in order."""
        if to_s < self.now_s:
            raise FlowError(f"advance to {to_s} s: expected no earlier than {self.now_s} s, the time already reached")
        if (self._due and self._due[0][0] <= to_s) or (self._postponed and self._postponed[0][0] <= to_s):
            self._run(to_s)
        if to_s < inf:
            self.now_s = to_s
        if not self._ended:
            return []
        ended = self._ended
        self._ended = []
        return ended

    def cancel(self, flow: int, at_s: float) -> float:
        """Take a flow off its links at `at_s`; returns the bytes it has moved.

        All of them if it has ended by then; `advance` still tells so. Raises FlowError unless it was on its way.
        """
        if at_s < self.now_s:
            raise FlowError(f"cancel at {at_s} s: expected no earlier than {self.now_s} s, the time already reached")
        for place, entry in enumerate(self._postponed):
            if entry[1] == flow and entry[0] > at_s:
                del self._postponed[place]
                heapify(self._postponed)
                return 0.0
        self._run(at_s)
        self.now_s = at_s
        moving = self._moving(flow)
        moved = self.moved(flow, at_s)
        self._remove(moving, at_s, moved)
        return moved

    def rate(self, flow: int) -> float:
        """Bytes/s of a flow now; 0 before it moves and after it has ended."""
        moving = self._flows.get(flow)
        return 0.0 if moving is None else moving.level * moving.path.weight

    def moved(self, flow: int, at_s: float) -> float:
        """Bytes a flow on its way has moved by `at_s`, a time up to which no rate changes."""
        moving = self._moving(flow)
        left = moving.left - moving.level * (at_s - moving.since)
        return min(max(moving.nbytes - left * moving.path.weight, 0.0), moving.nbytes)

    def carried_bytes(self) -> NDArray[np.float64]:
        """Bytes that have crossed each link so far."""
        total = np.zeros(len(self._links))
        for path in self._paths.values():
            for link, fraction in path.fractions.items():
                total[link.index] += fraction * path.carried
        for number, flow in self._flows.items():
            moved = self.moved(number, self.now_s)
            for link, fraction in flow.path.fractions.items():
                total[link.index] += fraction * moved
        return total

    def busy_s(self) -> NDArray[np.float64]:
        """Seconds of its full speed each link has worked: the integral of the part of it that is in use."""
        capacities: NDArray[np.float64] = np.array([link.capacity for link in self._links])
        return self.carried_bytes() / capacities

    def _moving(self, flow: int) -> Flow:
        moving = self._flows.get(flow)
        if moving is None:
            raise FlowError(f"flow {flow}: expected one that is on its way")
        return moving

    def _run(self, to_s: float) -> None:
        """End and begin whatever is due by `to_s`."""
        due, postponed = self._due, self._postponed
        while True:
            if postponed and postponed[0][0] <= to_s and (not due or postponed[0][0] < due[0][0]):
                at, number, path, nbytes, limit, priority = heappop(postponed)
                self._begin(at, number, path, nbytes, limit, priority)
            elif due and due[0][0] <= to_s:
                at, number, flow = heappop(due)
                if at != flow.due:
                    continue
                if at < flow.end:
                    flow.due = flow.end
                    if flow.end < inf:
                        heappush(due, (flow.end, number, flow))
                    continue
                self._ended.append((number, at))
                self._remove(flow, at, flow.nbytes)
            else:
                return

    def _begin(self, at: float, number: int, path: Path, nbytes: float, limit: float, priority: int) -> None:
        """Put a flow on its links."""
        peak = path.peak
        if limit < peak * path.weight:
            peak = limit / path.weight
        if not nbytes or peak == inf:
            path.carried += nbytes
            self._ended.append((number, at))
            if self.records is not None:
                self.records.append(FlowRecord(number, at, at, nbytes))
            return
        self._flows[number] = flow = Flow(number, path, nbytes, peak, priority, at)
        self._rates.enter(flow, at)

    def _remove(self, flow: Flow, at: float, moved: float) -> None:
        """Take a flow off its links and keep what it has moved."""
        del self._flows[flow.number]
        flow.path.carried += moved
        if self.records is not None:
            self.records.append(FlowRecord(flow.number, flow.start, at, moved))
        self._rates.leave(flow, at)

    def _new_path(self, links: tuple[int, ...], shares: tuple[float, ...] | None, weight: float) -> Path:
        """The path of flows over `links`."""
        if not 0.0 < weight < inf:
            raise FlowError(f"weight {weight} of a flow: expected streams above 0")
        path = Path(fractions_of(self._links, links, shares), weight)
        for link in add_path(path):
            for other in link.paths:
                other.watched.append((link, other.streams[link]))
            for flow in self._flows.values():
                streams = flow.path.streams.get(link)
                if streams is not None:
                    link.flows[flow] = streams
                    link.room -= streams * flow.level
        self._paths[links, shares, weight] = path
        return path
