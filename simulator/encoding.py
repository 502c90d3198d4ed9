"""How do requests with images enter a run: over encode workers, or encoded by the replicas that prefill them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from simulator.deployment import AnyReplica, Deployment
from simulator.encode import Counts, Encoded, EncodeUse, encode_stage, reached
from simulator.encodehere import EncodesFirst
from simulator.errors import PoolError
from simulator.log import Log
from simulator.workload import Floats, Workload


@dataclass(slots=True)
class Encoding:
    """The images of a run and who encodes them.

    tiles       of every request, in order of arrival
    arrival_s   of every request, from its user
    order       position of the requests, as they reach the schedulers, among those in order of arrival; None: the same
    encoded     what the encode pool does; None without one
    own         the replicas that encode for themselves, by position
    groups      their attention groups, each of which encodes on its own devices
    """

    tiles: Counts
    arrival_s: Floats
    order: Counts | None = None
    encoded: Encoded | None = None
    own: dict[int, EncodesFirst] = field(default_factory=dict)
    groups: int = 0

    def attach(self, deployment: Deployment, replicas: Sequence[AnyReplica], log: Log) -> None:
        """Let replicas encode before they prefill if nobody does before them; requests arrive when users send them."""
        log.encoding = self
        if self.order is not None:
            log.arrival_s = self.arrival_s[self.order]
            return
        tiles = self.tiles.tolist()
        for index, (spec, replica) in enumerate(zip(deployment.replicas, replicas, strict=True)):
            if spec.encoder is not None:
                self.own[index] = replica.before_prompts_s = EncodesFirst(spec.encoder, tiles)
                self.groups += spec.mapping.attention_dp

    def detach(self, log: Log) -> None:
        """Give the log's requests the numbers they have in order of arrival."""
        if self.order is not None:
            log.renumber(self.order)

    def use(self, makespan_s: float) -> EncodeUse:
        """In short, over a run that took so long."""
        seen = self.tiles > 0
        counts = int(seen.sum()), int(self.tiles.sum())
        if self.encoded is None:
            busy_s = sum(sum(replica.spent_s) for replica in self.own.values())
            return EncodeUse(0, *counts, _share(busy_s, self.groups * makespan_s))
        found = self.encoded
        workers = len(found.busy_s)
        waits_s, times_s = (found.begun_s - self.arrival_s)[seen], (found.ready_s - self.arrival_s)[seen]
        means = (float(waits_s.mean()), float(times_s.mean())) if len(times_s) else ()
        # Images may be encoded after the last answer, of requests that nobody is left to serve.
        span_s = max([makespan_s, *(found.ready_s[seen] - self.arrival_s.min())])
        return EncodeUse(workers, *counts, _share(float(found.busy_s.sum()), workers * span_s), *means)

    def before_s(self, replica: int, prompts: NDArray[np.bool_]) -> Floats:
        """Seconds a replica encoded in each row of its step log; `prompts` says which of them compute any."""
        found = np.zeros(len(prompts))
        own = self.own.get(replica)
        if own is not None:
            rows = np.flatnonzero(prompts)
            found[rows] = own.spent_s[: len(rows)]
        return found

    def consumption(self, deployment: Deployment) -> tuple[float, float, float]:
        """FLOPs, bytes, and joules above idle power."""
        if self.encoded is not None:
            assert deployment.encode is not None
            return self.encoded.consumption(deployment.encode)
        total = np.zeros(3)
        for index, replica in self.own.items():
            spec = deployment.replicas[index]
            total += replica.consumption(spec.device, spec.arithmetic_dtype)
        flops, moved, joules = total.tolist()
        return flops, moved, joules


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def prepared(deployment: Deployment, workload: Workload, *, record: bool = False) -> tuple[Workload, Encoding | None]:
    """The workload as the schedulers get it, and its images; the workload itself where it has none.

    Raises PoolError where nobody could encode the images, or where clients wait for answers in front of an encode pool:
    it is computed ahead, so it has to know all arrivals.
    """
    if workload.images is None:
        return workload, None
    requests, served = workload.requests, workload.served
    encoding = Encoding(workload.images.of(len(requests)), requests.arrival_s)
    spec = deployment.encode
    if spec is None:
        prefills = (r for r in deployment.replicas if r.role != "decode" or deployment.switch_s is not None)
        if encoding.tiles.any() and any(replica.encoder is None for replica in prefills):
            raise PoolError(
                "requests have images, and replicas that prefill no encoder: expected an encode pool or encoders of "
                "their own"
            )
        return replace(workload, requests=served, images=None), encoding
    if workload.concurrency is not None:
        raise PoolError(
            f"concurrency {workload.concurrency} with images and an encode pool: expected arrival times; encode on the "
            "replicas for a closed loop"
        )
    encoding.encoded = encode_stage(spec, requests.arrival_s, encoding.tiles, record=record)
    arrived = reached(served, encoding.encoded.ready_s)
    encoding.order = arrived.order
    return Workload(arrived.requests), encoding
