"""What is simulated: replicas with their step models, schedulers and devices, behind a router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hwmodels.hardware import Device
from hwmodels.mapping import Mapping
from hwmodels.step_model import StepModel
from hwmodels.work import Work
from simulator.lockstep import LockstepReplica
from simulator.log import Log
from simulator.pipeline import PipelineReplica
from simulator.replica import Replica
from simulator.routers import Router, round_robin
from simulator.scheduler import Scheduler, SchedulerConfig

AnyReplica = Replica | LockstepReplica | PipelineReplica


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaSpec:
    """One model copy: how it is cut, how it schedules, and what its steps cost.

    kv_blocks   blocks each of its schedulers can hand out
    share       its share of the requests under a router that does not look at loads, relative to the others'
    work        FLOPs and bytes of its steps; None where they are not wanted
    """

    model: StepModel
    mapping: Mapping
    scheduler: SchedulerConfig
    kv_blocks: int
    device: Device
    share: float = 1.0
    work: Work | None = None
    arithmetic_dtype: str = "bf16"

    @property
    def lanes(self) -> int:
        """Schedulers, each with its own KV blocks: one for every pipeline stage or attention group."""
        return self.mapping.pp * self.mapping.attention_dp

    def start(self, prompts: list[int], outputs: list[int], log: Log, index: int) -> AnyReplica:
        """A fresh replica that serves requests from the given lists and writes to `log`."""
        mapping = self.mapping
        schedulers = [Scheduler(self.scheduler, self.kv_blocks, prompts, outputs) for _ in range(self.lanes)]
        kind: type[Replica] | type[LockstepReplica] | type[PipelineReplica] = Replica
        if mapping.pp > 1:
            kind = PipelineReplica
        elif mapping.attention_dp > 1:
            kind = LockstepReplica
        return kind(self.model, schedulers, log, index)


@dataclass(frozen=True, slots=True, eq=False)
class Deployment:
    """Replicas behind a router.

    frontend_s   from the client to a scheduler and back: network, parsing, tokens to text; no replica waits for it
    """

    replicas: Sequence[ReplicaSpec]
    router: Router = field(default=round_robin)
    frontend_s: float = 0.0

    @property
    def gpus(self) -> int:
        """Devices that hold a replica."""
        return sum(spec.mapping.gpus for spec in self.replicas)
