"""KV between the devices and the tiers below them, on the clock of a run: moves as flows over links that many share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf

from simpy.events import URGENT, EventPriority

from simulator.deployment import AnyReplica, Deployment, ReplicaSpec
from simulator.flows import Flows
from simulator.kvtiers import HBM
from simulator.loadorcompute import Prefill, prefill_of
from simulator.log import Log
from simulator.reuse import Errand, ReplicaTiers, Tiering, Traffic

#: Calls a function at a time of the run.
At = Callable[[float, EventPriority, Callable[[], None]], None]
#: Told of the replica, its lane, the request and the time when all is there that the request waited for.
Ended = Callable[[int, int, int, float], None]


class Loading:
    """Starts the moves that the tiers of all replicas ask for and tells schedulers when what they wait for is there.

    at        calls a function at a time
    ended     see Ended
    """

    def __init__(
        self,
        deployment: Deployment,
        tiering: Tiering,
        replicas: Sequence[AnyReplica],
        log: Log,
        at: At,
        ended: Ended,
    ) -> None:
        self.at = at
        self.ended = ended
        self.replicas = replicas
        self.log = log
        self.flows = Flows(tiering.bytes_per_s)
        self.traffic = Traffic(tiering.bytes_per_s)
        self.tiers: list[ReplicaTiers | None] = []
        self.due_s = inf
        self._flying: dict[int, tuple[int, Errand]] = {}  # by flow: the replica and the errand
        self._moving: dict[tuple[int, int], list[tuple[int, Errand]]] = {}  # by replica and move: who waits for its end
        self._open: dict[tuple[int, int], tuple[int, float]] = {}  # by replica and request: moves left, and since when
        for index, (spec, replica) in enumerate(zip(deployment.replicas, replicas, strict=True)):
            caches = [scheduler.cache for scheduler in replica.schedulers]
            first = caches[0]
            if first is None or not tiering.capacity_bytes[index]:
                self.tiers.append(None)
                continue
            size = first.hashes.block_tokens
            tiers = ReplicaTiers(tiering, index, size, _prefill(spec), self.traffic)
            self.tiers.append(tiers)
            for lane, cache in enumerate(caches):
                if cache is not None:
                    cache.below = tiers.lane(lane)

    def flush(self, index: int, now_s: float) -> None:
        """Start the moves that a replica has asked for."""
        tiers = self.tiers[index]
        if tiers is None or not tiers.outbox:
            return
        errands, tiers.outbox = tiers.outbox, []
        for errand in errands:
            if errand.request is not None:
                left, since_s = self._open.get((index, errand.request), (0, now_s))
                self._open[index, errand.request] = left + 1, since_s
        for errand in errands:
            self._moving[index, errand.move.serial] = []
            waits = [serial for serial in errand.move.after if (index, serial) in self._moving]
            if waits:  # the last of them is over last, or another is looked for then
                self._moving[index, waits[-1]].append((index, errand))
            else:
                self._start(index, errand, now_s)
        self._tick()

    def _start(self, index: int, errand: Errand, now_s: float) -> None:
        way = errand.way
        at_s = max(now_s, self.flows.now_s)
        flow = self.flows.start(
            at_s,
            tuple(way.links),
            errand.nbytes,
            shares=tuple(way.shares),
            weight=way.weight,
            limit_bytes_per_s=way.limit_bytes_per_s,
            earliest_s=at_s + way.latency_s,
        )
        self._flying[flow] = index, errand

    def _tick(self) -> None:
        """Be there when the next flow begins or ends."""
        next_s = self.flows.next_s()
        if next_s < self.due_s:
            self.due_s = next_s
            self.at(next_s, URGENT, partial(self._flow_on, next_s))

    def _flow_on(self, due_s: float) -> None:
        if due_s == self.due_s:
            self.due_s = inf
            # Times that SimPy has added up may differ from ours in the last bit.
            for flow, _ in self.flows.advance(max(due_s, self.flows.now_s)):
                self._ended(*self._flying.pop(flow), due_s)
            self._tick()

    def _ended(self, index: int, errand: Errand, now_s: float) -> None:
        """A move is over: those that waited for it can start, and perhaps a prompt is complete."""
        tiers, log, move = self.tiers[index], self.log, errand.move
        assert tiers is not None
        tiers.ended(errand)
        for _, waiting in self._moving.pop((index, move.serial)):
            rest = [serial for serial in waiting.move.after if (index, serial) in self._moving]
            if rest:
                self._moving[index, rest[-1]].append((index, waiting))
            else:
                self._start(index, waiting, now_s)
        if move.source == HBM:
            log.stored_bytes += errand.nbytes
        if errand.request is None:
            return
        log.loaded_bytes += errand.nbytes
        left, since_s = self._open.pop((index, errand.request))
        if left > 1:
            self._open[index, errand.request] = left - 1, since_s
            return
        scheduler = self.replicas[index].schedulers[errand.lane]
        if errand.request in scheduler.loading:  # else its replica was removed
            log.loads_s.append(now_s - since_s)
            self.ended(index, errand.lane, errand.request, now_s)


def _prefill(spec: ReplicaSpec) -> Prefill:
    """Seconds to compute tokens after others when nothing else runs, in steps of the scheduler's budget."""
    model, budget = spec.model, spec.scheduler.token_budget
    step_s = prefill_of(model) if spec.lanes > 1 else lambda new, before: model.step_s(0, 0, [(new, before)])

    def seconds(new: int, before: int) -> float:
        starts = range(before, before + new, budget)
        return sum(step_s(min(budget, before + new - start), start) for start in starts)

    return seconds
