"""Replicas that affect each other, against a step-by-step simulator with one clock for all of them.

The brute force below knows one order at every instant: steps that end are committed, requests that arrive are routed
by the prompt tokens of unfinished requests, replicas that can start a step start it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import deque
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel, Tables
from simulator.deployment import Deployment, ReplicaSpec
from simulator.log import Log
from simulator.routers import ROUTERS
from simulator.scheduler import SchedulerConfig
from simulator.simulate import run
from simulator.workload import Requests, Workload


def neighbour(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = neighbour("oracle")
toys = neighbour("test_engine_against_oracle")


class Lanes:
    """One replica, step by step; a plain replica is a lockstep one with a single lane."""

    def __init__(self, spec: ReplicaSpec) -> None:
        mapping = spec.mapping
        self.model: StepModel = spec.model
        config = toys.oracle_config(spec.scheduler, spec.kv_blocks)
        self.lanes = [oracle.Scheduler(config, lane) for lane in range(mapping.pp * mapping.attention_dp)]
        self.here: list[Any] = []  # unfinished requests

    @property
    def load(self) -> int:
        return sum(request.prompt for request in self.here)

    def arrive(self, request: Any) -> bool:
        lane = min(self.lanes, key=lambda lane: (lane.unfinished, lane.lane))
        if not lane.arrive(request):
            return False
        self.here.append(request)
        return True

    def left(self) -> list[Any]:
        """The requests that have finished since the last call."""
        gone = [request for request in self.here if request.finish_s == request.finish_s]
        self.here = [request for request in self.here if request not in gone]
        return gone


class Together(Lanes):
    """All lanes begin and end every step together."""

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self.batches: list[Any] = []
        self.end_s = inf

    def end_steps(self, now_s: float) -> None:
        if self.end_s <= now_s:
            for lane, batch in zip(self.lanes, self.batches, strict=True):
                lane.commit(batch, self.end_s)
            self.end_s = inf

    def start_steps(self, now_s: float) -> None:
        if self.end_s < inf:
            return
        self.batches = [lane.plan(now_s) for lane in self.lanes]
        if all(batch.is_empty() for batch in self.batches):
            return
        features = [batch.features() for batch in self.batches]
        one = len(self.lanes) == 1
        self.end_s = now_s + (self.model.step_s(*features[0]) if one else self.model.lockstep_s(features))

    def next_s(self) -> float:
        return self.end_s


class Pipeline(Lanes):
    """Flights of as many lanes as there are attention groups, which pass the same stages one after the other."""

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self.groups = spec.mapping.attention_dp
        self.flights = [self.lanes[first : first + self.groups] for first in range(0, len(self.lanes), self.groups)]
        self.flying: dict[int, tuple[list[Any], float]] = {}
        self.ready_s = [0.0] * len(self.flights)
        self.free_s = [0.0] * len(self.flights)

    def arrive(self, request: Any) -> bool:
        known = super().arrive(request)
        if known:
            flight = request.lane // self.groups
            if sum(lane.unfinished for lane in self.flights[flight]) == 1:
                self.ready_s[flight] = request.arrival_s
        return known

    def end_steps(self, now_s: float) -> None:
        for flight, (batches, end_s) in list(self.flying.items()):
            if end_s <= now_s:
                for lane, batch in zip(self.flights[flight], batches, strict=True):
                    lane.commit(batch, end_s)
                self.ready_s[flight] = end_s
                del self.flying[flight]

    def waiting_flights(self) -> list[int]:
        works = [any(lane.unfinished for lane in lanes) for lanes in self.flights]
        return [i for i, some in enumerate(works) if some and i not in self.flying]

    def start_steps(self, now_s: float) -> None:
        ready = self.waiting_flights()
        if not ready or self.free_s[0] > now_s:
            return
        flight = min(ready, key=lambda i: (self.ready_s[i], i))
        batches = [lane.plan(now_s) for lane in self.flights[flight]]
        features = [batch.features() for batch in batches]
        transfer = self.model.transfer[max(count + sum(new for new, _ in items) for count, _, items in features)]
        alone = self.groups == 1
        times = self.model.stages_s(*features[0]) if alone else self.model.lockstep_stages_s(features)
        at = now_s - transfer
        for stage, busy in enumerate(times):
            at = self.free_s[stage] = max(at + transfer, self.free_s[stage]) + busy
        self.flying[flight] = batches, at

    def next_s(self) -> float:
        start = self.free_s[0] if self.waiting_flights() else inf
        return min([start, *(end_s for _, end_s in self.flying.values())])


def brute_force(deployment: Deployment, workload: Workload, seed: int) -> dict[str, Any]:
    """What became of each request; they are sent in the order of the workload."""
    requests, router = workload.requests, deployment.router
    shares = np.array([spec.share for spec in deployment.replicas])
    rng = np.random.default_rng(seed)
    replicas = [Pipeline(spec) if spec.mapping.pp > 1 else Together(spec) for spec in deployment.replicas]
    assigned = router.assign(len(requests), shares, rng) if router.assign else None
    closed = workload.concurrency is not None
    everyone = oracle.make_requests(requests.arrival_s, requests.prompt_tokens, requests.output_tokens, False)
    coming = deque(everyone)
    clients_s = [0.0] * (workload.concurrency or 0)  # when idle clients send their next requests; of no use when open
    places: list[int] = []

    def choose() -> int:
        if assigned is not None:
            return int(assigned[len(places)])
        loads = [replica.load / share for replica, share in zip(replicas, shares, strict=True)]
        if router.name in ("least-tokens", "prefix-aware") or len(replicas) == 1:  # nothing is cached here
            return loads.index(min(loads))
        first = int(rng.integers(len(replicas)))
        second = (first + 1 + int(rng.integers(len(replicas) - 1))) % len(replicas)
        return second if loads[second] < loads[first] else first

    now_s = 0.0
    while True:
        for replica in replicas:
            replica.end_steps(now_s)
            clients_s += [request.finish_s + workload.think_s for request in replica.left()]
        while coming and (min(clients_s, default=inf) if closed else coming[0].arrival_s) <= now_s:
            request = coming.popleft()
            if closed:
                request.arrival_s = min(clients_s)
                clients_s.remove(request.arrival_s)
            index = choose()
            places.append(index)
            if not replicas[index].arrive(request) and closed:
                clients_s.append(request.arrival_s + workload.think_s)
        for replica in replicas:
            replica.start_steps(now_s)
        arrival_s = inf
        if coming:
            arrival_s = min(clients_s, default=inf) if closed else coming[0].arrival_s
        following_s = min([arrival_s, *(replica.next_s() for replica in replicas)])
        if following_s == inf:
            break
        now_s = following_s
    names = ("arrival_s", "first_schedule_s", "first_token_s", "finish_s", "preemptions", "rejected")
    return {name: np.array([getattr(request, name) for request in everyone]) for name in names} | {"replica": places}


KINDS = {
    "plain": Mapping(),
    "attention groups": Mapping(attention_dp=3, ep=3),
    "pipeline": Mapping(pp=2),
    "groups in stages": Mapping(attention_dp=2, ep=2, pp=2),
}


def replica(kind: str, config: SchedulerConfig, blocks: int, share: float = 1.0, scale: float = 1.0) -> ReplicaSpec:
    """A replica whose steps take `scale` times the usual."""
    mapping = KINDS[kind]
    tables = [toys.tables(scale * (1 + 0.3 * stage), ()) for stage in range(mapping.pp)]
    transfer = (scale * (1e-4 + 1e-7 * np.arange(toys.MAX_TOKENS + 1))).tolist()
    model = StepModel(tables, transfer, toys.ENGINE, toys.MAX_TOKENS, toys.MAX_SEQS)
    return ReplicaSpec(model, mapping, config, blocks, toys.DEVICE, share)


def check(deployment: Deployment, workload: Workload, seed: int) -> Log:
    expected = brute_force(deployment, workload, seed)
    log = run(deployment, workload, seed)
    assert list(log.replica) == expected["replica"]
    np.testing.assert_allclose(log.arrival_s, expected["arrival_s"], rtol=1e-9, atol=1e-12)
    toys.same(log, expected)
    return log


@st.composite
def deployments(draw: st.DrawFn, config: SchedulerConfig, blocks: int) -> Deployment:
    """Two or three replicas, each at its own speed, so that they never act at the same instant."""
    kinds = draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=2, max_size=3))
    shares = draw(st.sampled_from([(1.0, 1.0, 1.0), (1.0, 2.5, 0.7)]))
    specs = [
        replica(kind, config, blocks, share, scale)
        for kind, share, scale in zip(kinds, shares, (1.0, 1.0371, 1.2193), strict=False)
    ]
    return Deployment(specs, ROUTERS[draw(st.sampled_from(sorted(ROUTERS)))])


CHECKED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@CHECKED
@given(toys.cases(), st.data())
def test_replicas_behind_a_router(case: Any, data: st.DataObject) -> None:
    config, blocks, arrivals, prompts, outputs = case
    deployment = data.draw(deployments(config, blocks))
    check(deployment, Workload(toys.requests_of(arrivals, prompts, outputs)), seed=5)


@CHECKED
@given(toys.cases(), st.data(), st.integers(1, 12), st.sampled_from([0.0, 0.0137]))
def test_closed_loops(case: Any, data: st.DataObject, concurrency: int, think_s: float) -> None:
    config, blocks, arrivals, prompts, outputs = case
    deployment = data.draw(deployments(config, blocks))
    check(deployment, Workload(toys.requests_of(arrivals, prompts, outputs), concurrency, think_s), seed=5)


def on_a_grid(kind: str, config: SchedulerConfig, step_s: float) -> ReplicaSpec:
    """A replica each of whose steps (in each of its stages) takes `step_s`."""
    mapping = KINDS[kind]
    nothing = [0.0] * (16 * toys.MAX_TOKENS + 1)
    free = Pieces((), (nothing,), (nothing,))
    engine = Engine("none", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
    tables = [Tables([step_s] * (toys.MAX_TOKENS + 1), nothing, nothing, free, free)] * mapping.pp
    model = StepModel(tables, nothing, engine, toys.MAX_TOKENS, toys.MAX_SEQS)
    return ReplicaSpec(model, mapping, config, 60, toys.DEVICE)


@pytest.mark.parametrize("policy", ["chunked", "prefill-first", "orca", "static"])
@pytest.mark.parametrize("kinds", [["plain"], ["pipeline"], ["pipeline", "pipeline"]], ids=str)
@pytest.mark.parametrize("concurrency", [None, 5])
def test_an_arrival_at_a_step_boundary_joins_the_step_that_begins_there(
    policy: Any, kinds: list[str], concurrency: int | None
) -> None:
    """Times are sums of powers of two, so that arrivals fall on boundaries exactly."""
    step_s = 2.0**-6
    config = SchedulerConfig(policy, 3, 100, 4, 128)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        requests = Requests(
            np.cumsum(rng.integers(0, 4, 25)) * step_s / 2, rng.integers(1, 61, 25), rng.integers(1, 30, 25)
        )
        deployment = Deployment([on_a_grid(kind, config, step_s) for kind in kinds], ROUTERS["least-tokens"])
        check(deployment, Workload(requests, concurrency), seed)


def test_clients_of_a_slow_pipeline_do_not_take_requests_before_those_of_a_fast_replica() -> None:
    """The next request goes to whoever is answered first, though the pipeline's step was started first."""
    config = SchedulerConfig("chunked", 8, 64, 4, 128)
    slow, fast = on_a_grid("pipeline", config, 1.0), on_a_grid("plain", config, 0.25)
    requests = Requests(np.zeros(4), np.full(4, 8), np.ones(4, dtype=int))
    log = run(Deployment([slow, fast], ROUTERS["round-robin"]), Workload(requests, concurrency=2))
    # The pipeline answers after 2 s, the other one after 0.25 s; its client sends the third request to the pipeline.
    assert list(log.replica) == [0, 1, 0, 1]
    assert log.arrival_s.tolist() == [0.0, 0.0, 0.25, 2.0]


def test_a_request_is_load_until_it_leaves_the_last_stage() -> None:
    config = SchedulerConfig("chunked", 8, 64, 4, 128)
    replicas = [on_a_grid("pipeline", config, 1.0) for _ in range(2)]
    requests = Requests(np.array([0.0, 1.5, 2.0]), np.full(3, 8), np.ones(3, dtype=int))
    log = run(Deployment(replicas, ROUTERS["least-tokens"]), requests)
    assert list(log.replica) == [0, 1, 0]
    assert list(log.finish_s) == [2.0, 3.5, 4.0]
