"""How do Splitwise's machines and pools look to the simulator?

Step times are those of a table. Batches are formed as the published simulator forms them: whole prompts first, first
come first served, up to BATCH_TOKENS, a longer one alone; sequences decode beside them where tokens are left, else they
pause, at most MOST_PAUSES times running. KV is sent layer by layer while its prompt is computed, through one link of
LINK_BYTES_PER_S out of and one into every machine. planner/validation/splitwisepools.py says which machines a request
gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import inf
from typing import Literal

import numpy as np

from hwmodels.hardware import Device, load_cluster
from hwmodels.mapping import Mapping
from hwmodels.step_model import Item, StepModel, packed
from planner.validation.splitwisetable import MIXED, Lookup, PhaseTimes
from simulator.deployment import AnyReplica, Deployment, ReplicaSpec
from simulator.handover import Handover
from simulator.log import Log
from simulator.replica import Replica
from simulator.routers import least_tokens
from simulator.scheduler import Scheduler, SchedulerConfig

#: As the published simulator is configured: tokens and sequences of a step, and how often sequences may pause.
BATCH_TOKENS, MOST_SEQS, MOST_PAUSES = 2048, 512, 4
#: Bytes per second between machines as configured there.
LINK_BYTES_PER_S = 200e9
#: Prompt tokens of the largest step that is priced.
LONGEST_TOKENS = 2**16
BLOCK_TOKENS = 16

#: What a machine does: prompts, tokens, or both ("aggregated").
Role = Literal["prefill", "decode", "aggregated"]


class TableModel(StepModel):
    """Step times read from measured phase times; offers what a Replica of one stage asks of a step model.

    prompt_s, decode_s   by prompt tokens and by sequences of a step

    A step with both takes MIXED times what a prompt of all its tokens takes, and no less than its decodes alone.
    """

    __slots__ = ("decode_s", "prompt_s")

    def __init__(self, times: PhaseTimes, lookup: Lookup) -> None:
        self.prompt_s = packed(times.prompt(np.arange(LONGEST_TOKENS + 1.0)))
        self.decode_s = packed(times.decode(np.arange(MOST_SEQS + 1.0), lookup))
        self.max_seqs, self.max_tokens = MOST_SEQS, LONGEST_TOKENS

    def step_s(self, sequences: int, context: int, items: Sequence[Item]) -> float:
        """Seconds of one step."""
        if not items:
            return self.decode_s[sequences]
        tokens = sum(new for new, _ in items)
        if not sequences:
            return self.prompt_s[tokens]
        return max(MIXED * self.prompt_s[tokens + sequences], self.decode_s[sequences])

    def decode_run(self, sequences: int, context: int) -> tuple[float, float, float]:
        """(first_s, slope_s, steps) of decode-only steps, for which the table knows no context."""
        return self.decode_s[sequences], 0.0, inf


class WholePrompts(Scheduler):
    """Batches as the published simulator forms them.

    pending_tokens   of prompts that are queued or being computed
    pauses           steps in a row that the decodes have waited for prompts
    """

    __slots__ = ("pauses", "pending_tokens")

    def __init__(self, config: SchedulerConfig, kv_blocks: int, prompts: list[int], outputs: list[int]) -> None:
        super().__init__(config, kv_blocks, prompts, outputs)
        self.pauses = 0
        self.pending_tokens = 0
        self._admit = whole_prompts_first

    def offer(self, request: int, at_s: float = 0.0) -> bool:
        """Put a request at the end of the queue; False if it could never run here."""
        accepted = super().offer(request, at_s)
        if accepted:
            self.pending_tokens += self.prompts[request]
        return accepted

    def advance(self, steps: int) -> list[int]:
        """Take the formed step or steps; the requests that finished."""
        again = self.generated
        for request, _, _ in self.chunks:
            if request not in again:  # a preempted one was counted when it came
                self.pending_tokens -= self.prompts[request]
        return super().advance(steps)


def whole_prompts_first(s: Scheduler) -> None:
    """Prompts up to the token budget, the first of any length; decodes beside them where every one has a token left."""
    assert isinstance(s, WholePrompts)
    budget, room = s.config.token_budget, s.config.max_seqs - s.running - s.expected
    if s.grow_decodes():
        return
    patient = s.pauses < MOST_PAUSES or not s.running
    left = budget if patient else budget - s.running
    tokens = 0
    while s.waiting and len(s.chunks) < room:
        head = s.waiting[0]
        target = s.prompts[head] + s.generated.get(head, 0)
        alone = patient and not s.chunks
        if (tokens + target > left and not alone) or not s.admit_head(head, target):
            break
        s.chunks.append((head, target, 0))
        s.items.append((target, 0))
        tokens += target
    pause = bool(s.chunks) and s.running > 0 and tokens + s.running > budget
    s.pauses = s.pauses + 1 if pause else 0
    if pause:
        s.decode_runs = False


@dataclass(frozen=True, slots=True, eq=False)
class MachineSpec(ReplicaSpec):
    """A machine with one model copy, whose scheduler is WholePrompts."""

    def start(self, prompts: list[int], outputs: list[int], log: Log, index: int) -> AnyReplica:
        """A fresh replica."""
        return Replica(self.model, [WholePrompts(self.scheduler, self.kv_blocks, prompts, outputs)], log, index)


@dataclass(frozen=True, slots=True, eq=False)
class Machine:
    """One kind of machine with one model on it.

    kv_tokens, kv_bytes_per_token   tokens that fit beside the weights, and bytes of each
    layers                          of the model
    usd_per_h, kw                   of the machine
    """

    name: str
    model: TableModel
    kv_tokens: int
    kv_bytes_per_token: float
    layers: int
    usd_per_h: float
    kw: float

    def spec(self, role: Role) -> MachineSpec:
        """The machine as a replica."""
        config = SchedulerConfig("chunked", MOST_SEQS, BATCH_TOKENS, BLOCK_TOKENS, LONGEST_TOKENS - MOST_SEQS)
        return MachineSpec(self.model, Mapping(tp=8), config, self.kv_tokens // BLOCK_TOKENS, _any_device(), role=role)


@dataclass(frozen=True, slots=True)
class Pool:
    """Machines of one kind with the same task."""

    machine: Machine
    role: Role
    count: int


@dataclass(frozen=True, slots=True)
class _Way:
    links: tuple[int, ...]
    bytes_per_token: float
    latency_s: float = 0.0
    limit_bytes_per_s: float = inf
    shares: tuple[float, ...] = (1.0, 1.0)
    weight: float = 1.0


def deployment_of(pools: Sequence[Pool]) -> Deployment:
    """The pools behind one router; every machine has a link out and a link in."""
    specs = [spec for pool in pools for spec in [pool.machine.spec(pool.role)] * pool.count]
    machine = pools[0].machine
    count = len(specs)
    handover = Handover(
        bytes_per_s=[LINK_BYTES_PER_S] * (2 * count),
        names=[f"{way} {index}" for way in ("out of", "into") for index in range(count)],
        route=lambda source, _, target, __: _Way((source, count + target), machine.kv_bytes_per_token),
        layers=machine.layers,
        first_token="prefill",
    )
    return Deployment(specs, least_tokens, handover=handover)


def instant(machine: Machine) -> Machine:
    """The machine with prompts that take a nanosecond, memory for all of them, and hardly any KV to send."""
    never = np.array([1.0]), np.array([1e-9])
    model = TableModel(PhaseTimes(*never, never[1], *never), "measured")
    return replace(machine, model=model, kv_tokens=2**30, kv_bytes_per_token=1.0)


@cache
def _any_device() -> Device:
    """A replica has a device; nothing here asks it anything."""
    return load_cluster("a100-80-sxm", 8).device
