"""Requests arrive and replicas serve them, on SimPy's clock."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from math import inf

import numpy as np
import simpy

from simulator.collect import collect
from simulator.deployment import AnyReplica, Deployment
from simulator.encoding import prepared
from simulator.log import Log
from simulator.pools import Pools
from simulator.prefixcache import equip
from simulator.result import Result
from simulator.together import STRIDE, Load, Look, Together
from simulator.workload import Requests, Workload

Progress = Callable[[int], None]
Stop = Callable[[Log], bool]


class Overrun(Exception):
    """A run that was stopped because it had become pointless; `log` is what had happened."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self.log = log


def simulate(
    deployment: Deployment,
    workload: Workload | Requests,
    seed: int = 0,
    *,
    record: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Serve the workload and return what happened.

    record     whether to keep the step log, which the distribution of inter-token times, the use of the devices and
               the timeline are made from
    progress   called now and then with the scheduling decisions taken since the last call

    The same arguments give the same result. Requests that can never fit are rejected and counted.
    """
    log = run(deployment, workload, seed, record=record, progress=progress)
    return collect(deployment, workload, log, seed)


def run(
    deployment: Deployment,
    workload: Workload | Requests,
    seed: int = 0,
    *,
    record: bool = False,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Log:
    """Serve the workload; only the log, for callers that run many times.

    stop   asked now and then whether what happened so far makes the rest pointless; raises Overrun if it does
    """
    if isinstance(workload, Requests):
        workload = Workload(workload)
    workload, encoding = prepared(deployment, workload, record=record)
    requests = workload.requests
    rng = np.random.default_rng(seed)
    log = Log(len(requests), record=record)
    prompts, outputs = requests.prompt_tokens.tolist(), requests.output_tokens.tolist()
    replicas = [
        spec.start(prompts, outputs.copy() if deployment.pooled else outputs, log, index)
        for index, spec in enumerate(deployment.replicas)
    ]
    if len(requests.class_names) > 1:
        classes = requests.slo_class.tolist()
        for replica in replicas:
            for scheduler in replica.schedulers:
                scheduler.classes = classes
    if requests.block_hashes is not None:
        equip([scheduler for replica in replicas for scheduler in replica.schedulers], requests.block_hashes)
    env = simpy.Environment()
    log.arrival_s = requests.arrival_s
    if encoding is not None:
        encoding.attach(deployment, replicas, log)

    def look(events: int) -> None:
        if progress is not None:
            progress(events)
        if stop is not None and stop(log):
            raise Overrun(log)

    try:
        _serve(env, deployment, workload, replicas, rng, log, look)
    finally:
        log.extremes(scheduler for replica in replicas for scheduler in replica.schedulers)
        if encoding is not None:
            encoding.detach(log)
    return log


def _serve(
    env: simpy.Environment,
    deployment: Deployment,
    workload: Workload,
    replicas: Sequence[AnyReplica],
    rng: np.random.Generator,
    log: Log,
    look: Look,
) -> None:
    """Let the replicas serve the workload, each for itself where nothing joins them."""
    requests, router = workload.requests, deployment.router
    shares = np.array([spec.share for spec in deployment.replicas], dtype=float)
    frontend_s = deployment.frontend_s
    reaching_s = requests.arrival_s + frontend_s
    if deployment.pooled:
        pools = Pools(env, deployment, replicas, workload, reaching_s.tolist(), rng, log, look)
        pools.start()
        env.run()
        log.carried_bytes = pools.flows.carried_bytes()
        if pools.loading is not None:
            log.tier_bytes = pools.loading.flows.carried_bytes()
        if workload.concurrency is not None:
            log.arrival_s = np.array(pools.arrival_s) - frontend_s
        return
    if deployment.tiers is None and workload.concurrency is None and (router.assign is not None or len(replicas) == 1):
        assigned = router.assign(len(requests), shares, rng) if router.assign else np.zeros(len(requests), dtype=int)
        for index, replica in enumerate(replicas):
            mine = np.flatnonzero(assigned == index)
            env.process(_alone(env, replica, reaching_s[mine].tolist(), mine.tolist(), look))
        env.run()
        return
    loads = [Load() for _ in replicas]
    if router.assign is not None:
        fixed = iter(router.assign(len(requests), shares, rng).tolist())
        route = lambda: next(fixed)  # noqa: E731
    else:
        choose = router.choose
        assert choose is not None
        route = lambda: choose(loads, shares, rng)  # noqa: E731
    together = Together(
        env, replicas, loads, route, workload, reaching_s.tolist(), frontend_s, log, look, deployment=deployment
    )
    together.start()
    env.run()
    if together.loading is not None:
        log.tier_bytes = together.loading.flows.carried_bytes()
    if workload.concurrency is not None:
        log.arrival_s = np.array(together.arrival_s) - frontend_s


def _alone(
    env: simpy.Environment,
    replica: AnyReplica,
    arrivals_s: Sequence[float],
    requests: Sequence[int],
    look: Look,
) -> Generator[simpy.Event, None, None]:
    """Serve requests whose arrivals are known and that nobody else affects; look at the clock every STRIDE events."""
    enqueue, coast, plan, commit = replica.enqueue, replica.coast, replica.plan, replica.commit
    position, count = 0, len(requests)
    upcoming = arrivals_s[0] if count else inf
    events = 0
    while True:
        coast(upcoming)
        while upcoming <= replica.now:
            enqueue(requests[position], upcoming)
            position += 1
            upcoming = arrivals_s[position] if position < count else inf
        end = plan(upcoming)
        if end == inf and upcoming == inf:
            break
        if end == inf:
            end = upcoming
        while upcoming <= end:
            enqueue(requests[position], upcoming)
            position += 1
            upcoming = arrivals_s[position] if position < count else inf
            if replica.end < inf:
                end = replica.end
        if replica.end == inf:
            continue
        commit()
        events += 1
        if events == STRIDE:
            yield env.timeout(max(0.0, replica.now - env.now))
            look(events)
            events = 0
    yield env.timeout(max(0.0, replica.now - env.now))
    look(events)
