"""What is simulated: replicas with their step models, schedulers and devices, behind a router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from hwmodels.hardware import Device
from hwmodels.mapping import Mapping
from hwmodels.step_model import StepModel
from hwmodels.work import Work
from simulator.encode import EncodeSpec
from simulator.encodehere import OwnEncoder
from simulator.errors import PoolError
from simulator.handover import Handover
from simulator.lockstep import LockstepReplica
from simulator.lockstepstages import StagedLockstepReplica
from simulator.log import Log
from simulator.pipeline import PipelineReplica
from simulator.replica import Replica
from simulator.reuse import Tiering
from simulator.routers import Router, round_robin
from simulator.scheduler import Scheduler, SchedulerConfig

#: What a replica does: everything (aggregated); prompts or answers only; or either, where the others are short of room.
Role = Literal["aggregated", "prefill", "decode", "mixed"]
ROLES: tuple[Role, ...] = get_args(Role)

AnyReplica = Replica | LockstepReplica | PipelineReplica


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaSpec:
    """One model copy: how it is cut, how it schedules, and what its steps cost.

    kv_blocks   blocks each of its schedulers can hand out: of a group's KV, its micro-batches have equal shares
    share       its share of the requests under a router that does not look at loads, relative to the others'
    role        what it does, see Role
    work        FLOPs and bytes of its steps; None where they are not wanted
    encoder     encodes images before the prompts they are in, where no encode pool does; None: it gets no images
    """

    model: StepModel
    mapping: Mapping
    scheduler: SchedulerConfig
    kv_blocks: int
    device: Device
    share: float = 1.0
    work: Work | None = None
    arithmetic_dtype: str = "bf16"
    role: Role = "aggregated"
    encoder: OwnEncoder | None = None

    def __post_init__(self) -> None:
        """Raise PoolError for layers passed in groups where one stage or attention group has not all of them."""
        mapping = self.mapping
        if self.scheduler.policy == "layered" and (mapping.pp > 1 or mapping.attention_dp > 1):
            raise PoolError(
                f"policy layered with pp={mapping.pp}, attention_dp={mapping.attention_dp}: expected 1 and 1; "
                "use policy chunked"
            )

    @property
    def lanes(self) -> int:
        """Schedulers, each with its own KV blocks: one for every attention group of every micro-batch in flight.

        Lane = micro-batch * attention_dp + group, and as many micro-batches are in flight as there are stages.
        """
        return self.mapping.pp * self.mapping.attention_dp

    def start(self, prompts: list[int], outputs: list[int], log: Log, index: int) -> AnyReplica:
        """A fresh replica that serves requests from the given lists and writes to `log`."""
        mapping = self.mapping
        schedulers = [Scheduler(self.scheduler, self.kv_blocks, prompts, outputs) for _ in range(self.lanes)]
        kind: type[Replica] | type[LockstepReplica] | type[PipelineReplica] = Replica
        if mapping.pp > 1:
            kind = StagedLockstepReplica if mapping.attention_dp > 1 else PipelineReplica
        elif mapping.attention_dp > 1:
            kind = LockstepReplica
        return kind(self.model, schedulers, log, index)


@dataclass(frozen=True, slots=True)
class Removal:
    """A replica, by its position, that fails at a time of the run, in seconds."""

    at_s: float
    replica: int


@dataclass(frozen=True, slots=True, eq=False)
class Deployment:
    """Replicas behind a router.

    frontend_s       from the client to a scheduler and back: network, parsing, tokens to text; no replica waits for it
    handover         how KV goes from prefill to decode replicas; needed where there are any
    overflow_tokens  a mixed replica takes a prompt if the chosen prefill replica has this many tokens of prompts before
                     it (Splitwise's threshold)
    switch_s         prefill and decode replicas change roles with the queues before them, by the rule in
                     simulator.roleswitch: this long after such a replica has finished what it has; None: never
    removals         replicas that fail during the run
    encode           workers that encode images before requests reach the replicas; None: there are none
    tiers            memories below the devices' that keep KV for prompts that begin alike; None: there are none

    Raises PoolError for roles that cannot serve a request together.
    """

    replicas: Sequence[ReplicaSpec]
    router: Router = field(default=round_robin)
    frontend_s: float = 0.0
    handover: Handover | None = None
    overflow_tokens: int = 8192
    switch_s: float | None = None
    removals: Sequence[Removal] = ()
    encode: EncodeSpec | None = None
    tiers: Tiering | None = None

    def __post_init__(self) -> None:
        """Raise PoolError for roles that cannot serve a request together."""
        roles = {spec.role for spec in self.replicas}
        unknown = roles - set(ROLES)
        if unknown:
            raise PoolError(f"role {min(unknown)!r}: expected one of {', '.join(ROLES)}")
        for role, other in (("prefill", "decode"), ("decode", "prefill")):
            if role in roles and not roles & {other, "mixed"}:
                raise PoolError(f"pools have role {role} but none {other} or mixed; add a pool of that role")
        if roles & {"prefill", "decode"} and self.handover is None:
            raise PoolError("pools of roles prefill and decode have no links between them; expected a handover")
        for spec in self.replicas:
            if spec.role in ("decode", "mixed") and spec.scheduler.policy == "static":
                raise PoolError(f"a {spec.role} pool with policy static: expected one that admits at every step")
        for removal in self.removals:
            if not 0 <= removal.replica < len(self.replicas):
                raise PoolError(f"removal of replica {removal.replica}: expected 0 to {len(self.replicas) - 1}")

    @property
    def pooled(self) -> bool:
        """Whether replicas have different parts to play, or one may leave."""
        return bool(self.removals) or any(spec.role != "aggregated" for spec in self.replicas)

    @property
    def gpus(self) -> int:
        """Devices that hold a replica or encode."""
        return sum(spec.mapping.gpus for spec in self.replicas) + (self.encode.workers if self.encode else 0)
