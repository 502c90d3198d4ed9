"""What happens when requests really arrive? The loops of the ranks of one replica, on a real clock.

The leader (first stage, first shard) looks at the clock and decides which lane steps next; the others repeat its
schedulers' decisions from the requests it announces, so that nothing but these and the activations travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from planner.execute.batch import Batch
from planner.execute.clock import Clock
from planner.execute.kvcache import BlockTables
from planner.execute.lane import Lane
from planner.execute.laps import Laps
from planner.execute.ranks import IDLE, MOST_NEW, STOP, Expected, Peers
from planner.execute.records import Job
from planner.execute.transformer import Transformer
from simulator.log import Log
from simulator.scheduler import SchedulerConfig

#: A row of records.EXECUTED_COLUMNS.
Row = tuple[Any, ...]
#: Told of what has happened so far: the log, and the rows since the last call.
Report = Callable[[Log, list[Row]], None]


@dataclass(frozen=True, slots=True)
class Order:
    """What a replica is to serve: requests by their numbers in the run, in the order they arrive.

    arrival_s          of `mine`
    prompts, outputs   tokens of all requests of the run
    zero_s             the run's zero on the system's monotonic clock
    report_s           most time between two reports, but for a step that takes longer
    measure_laps       whether the time inside steps is measured too (without pipeline stages)
    """

    replica: int
    mine: list[int]
    arrival_s: list[float]
    prompts: list[int]
    outputs: list[int]
    config: SchedulerConfig
    zero_s: float
    report_s: float
    measure_laps: bool = False


def prompt_ids(job: Job, request: int, tokens: int) -> list[int]:
    """The ids of a request's prompt: any, but the same in every process."""
    drawn = np.random.default_rng([job.seed, request]).integers(job.model.vocab, size=tokens)
    found: list[int] = drawn.tolist()
    return found


def open_lanes(job: Job, order: Order) -> list[Lane]:
    """The replica's lanes: one, or one for every pipeline stage."""
    lanes = job.mapping.pp
    tables = BlockTables(lanes * job.kv_blocks, job.block_tokens)

    def ids(request: int) -> list[int]:
        return prompt_ids(job, request, order.prompts[request])

    return [Lane(order.config, job.kv_blocks, order.prompts, order.outputs, ids, tables) for _ in range(lanes)]


def run_stage(stage: Transformer, peers: Peers, batch: Batch, laps: Laps) -> Any:
    """One stage's forward pass; sampled ids at the last, else None after the activations were sent on."""
    inputs = stage.inputs(batch)
    hidden = None if stage.share.first else peers.receive_hidden(len(batch.positions))
    found = stage.forward(inputs, hidden, laps)
    if stage.share.last:
        return found
    peers.send_hidden(found)
    return None


def follow(job: Job, stage: Transformer, peers: Peers, order: Order, laps: Laps) -> dict[int, list[int]]:
    """A rank that does not lead; the answers it knows."""
    lanes = open_lanes(job, order)
    flying: dict[int, Expected] = {}
    last = stage.share.last
    while True:
        number, requests = peers.hear()
        if number == IDLE:
            stage.stay_warm()
            continue
        if number in flying:  # a shard of the first of several stages: the lane's last step has come back
            lanes[number].advance(flying.pop(number).wait())
        if number == STOP:
            for lane_number, expected in flying.items():
                lanes[lane_number].advance(expected.wait())
            break
        lane = lanes[number]
        for request in requests:
            lane.offer(request)
        batch = lane.form()
        if batch is None:
            continue
        ids = run_stage(stage, peers, batch, laps)
        count = len(batch.sampled)
        if stage.share.first and not last:
            flying[number] = peers.expect_ids(count, number)
            continue
        if last and peers.pp > 1:
            peers.send_ids(ids, number)
        lane.advance(ids.tolist() if last else [0] * count)
    peers.flush()
    return {request: answer for lane in lanes for request, answer in lane.answers.items()}


class Leader:
    """The rank that takes requests in and reports what became of them."""

    def __init__(self, job: Job, stage: Transformer, peers: Peers, order: Order, laps: Laps, report: Report) -> None:
        self.job, self.stage, self.peers, self.order, self.laps = job, stage, peers, order, laps
        self.lanes = open_lanes(job, order)
        self.log = Log(len(order.prompts), record=True)
        self.clock = Clock(order.zero_s)
        self._report = report
        self._rows: list[Row] = []
        self._reported_s = 0.0
        self._next = 0
        self._announced: list[list[int]] = [[] for _ in self.lanes]

    def run(self) -> dict[int, list[int]]:
        """Serve all requests; the answers."""
        self.clock.wait_until(0.0)
        if self.peers.pp > 1:
            self._pipeline()
        else:
            self._steps()
        if self.peers.count > 1:
            self.peers.announce(STOP, [])
            self.peers.flush()
        self.log.extremes(lane.scheduler for lane in self.lanes)
        self._report(self.log, self._rows)
        return {request: answer for lane in self.lanes for request, answer in lane.answers.items()}

    @property
    def _upcoming_s(self) -> float:
        return self.order.arrival_s[self._next] if self._next < len(self.order.mine) else inf

    def _take_in(self, now_s: float) -> None:
        """Offer what has arrived to the lane with the fewest unfinished requests."""
        while self._upcoming_s <= now_s:
            number = min(range(len(self.lanes)), key=lambda i: self.lanes[i].scheduler.unfinished)
            if len(self._announced[number]) == MOST_NEW:
                return  # the others come with the next step
            request = self.order.mine[self._next]
            self._next += 1
            self.log.replica[request] = self.order.replica
            if self.lanes[number].offer(request):
                self.log.lane[request] = number
                self._announced[number].append(request)
            else:
                self.log.rejected.append(request)

    def _beat(self, now_s: float) -> None:
        """Report now and then, also where nothing happens, so that silence means a stall."""
        if now_s - self._reported_s > self.order.report_s:
            self._reported_s = now_s
            self._report(self.log, self._rows)
            self._rows = []

    def _idle(self) -> None:
        """Nothing to do: have all ranks keep their weights at hand."""
        self._beat(self.clock.now())
        if self.peers.count > 1:
            self.peers.announce(IDLE, [])
        self.stage.stay_warm()

    def _announce(self, number: int) -> None:
        """Tell the other ranks which lane steps next, and what it was offered since its last step."""
        if self.peers.count > 1:
            self.peers.announce(number, self._announced[number])
        self._announced[number] = []

    def _steps(self) -> None:
        """One lane, one step after the other."""
        lane, clock, log = self.lanes[0], self.clock, self.log
        now = clock.now()
        while True:
            self._take_in(now)
            if not lane.scheduler.has_work:
                if self._upcoming_s == inf:
                    return
                clock.wait_until(self._upcoming_s, self._idle)
                now = clock.now()
                continue
            start = now
            self._announce(0)
            batch = lane.form()
            if batch is None:
                now = clock.now()
                continue
            if lane.scheduler.preempted:
                log.preempted(lane.scheduler, self.order.replica, 0)
            log.scheduled(lane.scheduler, start)
            inputs = self.stage.inputs(batch)
            before = clock.now()
            ids = self.stage.forward(inputs, None, self.laps).tolist()
            now = clock.now()
            self._done(0, batch, start, now, now - before, ids)
            self._beat(now)

    def _pipeline(self) -> None:
        """As many lanes as stages: a lane's next step starts when its last one has come back."""
        lanes, clock, log, peers = self.lanes, self.clock, self.log, self.peers
        flying: dict[int, tuple[Expected, Batch, float, float]] = {}  # in the order they left
        ready = [0.0] * len(lanes)
        now = clock.now()
        while True:
            for number in [n for n, (expected, *_) in flying.items() if expected.here]:
                self._land(number, flying, ready)
            now = clock.now()
            self._take_in(now)
            able = [n for n, lane in enumerate(lanes) if n not in flying and lane.scheduler.has_work]
            if not able:
                if flying:
                    self._land(next(iter(flying)), flying, ready)
                elif self._upcoming_s == inf:
                    return
                else:
                    clock.wait_until(self._upcoming_s, self._idle)
                continue
            number = min(able, key=lambda n: ready[n])
            lane, start = lanes[number], now
            self._announce(number)
            batch = lane.form()
            if batch is None:
                continue
            if lane.scheduler.preempted:
                log.preempted(lane.scheduler, self.order.replica, number)
            log.scheduled(lane.scheduler, start)
            expected = peers.expect_ids(len(batch.sampled), number)
            run_stage(self.stage, peers, batch, self.laps)
            flying[number] = expected, batch, start, clock.now() - start
            self._beat(now)

    def _land(self, number: int, flying: dict[int, tuple[Expected, Batch, float, float]], ready: list[float]) -> None:
        expected, batch, start, forward_s = flying.pop(number)
        ids = expected.wait()
        ready[number] = now = self.clock.now()
        self._done(number, batch, start, now, forward_s, ids)

    def _done(self, number: int, batch: Batch, start: float, end: float, forward_s: float, ids: Sequence[int]) -> None:
        """Note a step and take it."""
        lane, log, replica = self.lanes[number], self.log, self.order.replica
        scheduler = lane.scheduler
        running = scheduler.running if scheduler.decode_runs else 0
        context = scheduler.context if running else 0
        log.events += 1
        log.record(replica, number, start, end, 1, 0.0, running, context, scheduler)
        laps = self.laps.totals() or None
        row = (replica, number, start, end, forward_s, running, context, batch.items, len(scheduler.waiting), laps)
        self._rows.append(row)
        prefills = bool(scheduler.chunks)
        finished = lane.advance(ids)
        if prefills:
            log.prefilled(scheduler, end)
        for request in finished:
            log.finish_s[request] = end
