"""What does a simulated replica do whose steps a linear program decides on (planner.recedingscheduler)?

It tells its scheduler the time of each step boundary, and adds what the decision took to the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from planner.prefillhorizon import require_tbt
from planner.prefilllinear import TableClock
from planner.recedingscheduler import Ledger, Receding, RecedingScheduler
from simulator.deployment import AnyReplica, ReplicaSpec
from simulator.errors import PoolError
from simulator.log import Log
from simulator.replica import Replica


class RecedingReplica(Replica):
    """A replica whose scheduler decides with a program, and is told the time."""

    __slots__ = ()

    def plan(self, horizon_s: float) -> float:
        """Decide the next step, starting now; the time it ends, the decision included."""
        scheduler = self.scheduler
        assert isinstance(scheduler, RecedingScheduler)
        scheduler.now_s, scheduler.spent_s = self.now, 0.0
        end = super().plan(horizon_s)
        if scheduler.spent_s and end < inf and not scheduler.chunks:  # decided that no prompt runs
            self._first += scheduler.spent_s
            end = self.end = end + scheduler.spent_s
        return end


@dataclass(frozen=True, slots=True, eq=False)
class RecedingSpec(ReplicaSpec):
    """A model copy whose steps are decided by a program; of its scheduler, the policy and order do not count.

    ledgers   of the replicas started from it, in order
    """

    rule: Receding = field(kw_only=True)
    ledgers: list[Ledger] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise PoolError for pipelines, attention groups, and encoders; NoFeasiblePlanError for a TBT limit below a
        decode step."""
        if self.lanes > 1 or self.encoder is not None:
            raise PoolError(
                f"a receding horizon with pp={self.mapping.pp}, attention_dp={self.mapping.attention_dp}"
                f"{', an encoder' if self.encoder else ''}: expected 1 and 1, and none; use policy chunked"
            )
        require_tbt(TableClock(self.model, self.rule.linear.layers), (), self.rule.tbt_s)

    def start(self, prompts: list[int], outputs: list[int], log: Log, index: int) -> AnyReplica:
        """A fresh replica."""
        clock = TableClock(self.model, self.rule.linear.layers)
        self.ledgers.append(Ledger())
        scheduler = RecedingScheduler(
            self.scheduler, self.kv_blocks, prompts, outputs, self.rule, clock, self.ledgers[-1]
        )
        replica = RecedingReplica(self.model, [scheduler], log, index)
        replica.before_prompts_s = lambda chunks: scheduler.spent_s
        return replica


def receding_spec(spec: ReplicaSpec, rule: Receding) -> RecedingSpec:
    """The replica, with its steps decided by a program."""
    return RecedingSpec(
        spec.model,
        spec.mapping,
        spec.scheduler,
        spec.kv_blocks,
        spec.device,
        spec.share,
        spec.work,
        spec.arithmetic_dtype,
        spec.role,
        spec.encoder,
        rule=rule,
    )
