"""What one measured serving point says: who served what, how, for which client, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.plan import Plan
from simulator.workload import Workload

#: Metrics a point may carry. Latencies are means over requests in seconds; throughput is output tokens per second of
#: the whole deployment.
METRICS = ("ttft", "tpot", "e2e", "throughput")


@dataclass(frozen=True, slots=True)
class Case:
    """One measured point, ready to be simulated.

    row        its id in the file
    labels     what groups and filters go by: system, backend, version, model, precision, mode, layout (the mapping in
               words), isl, osl, concurrency
    plan       the deployment that was measured
    workload   the client that measured it
    warmup     requests at the head of the workload that were not counted
    measured   by metric of METRICS
    choice     points that differ only in their layout share this key: one could have chosen between them
    """

    row: str
    labels: Mapping[str, str]
    plan: Plan
    workload: Workload
    measured: Mapping[str, float]
    choice: tuple[str, ...]
    warmup: int = 0


@dataclass(frozen=True, slots=True)
class Unmapped:
    """One row that does not say enough, or describes what the simulator does not model; `reason` without numbers."""

    row: str
    labels: Mapping[str, str]
    reason: str


@dataclass(frozen=True, slots=True)
class Layout:
    """The rows of a file."""

    cases: tuple[Case, ...]
    unmapped: tuple[Unmapped, ...] = field(default=())
