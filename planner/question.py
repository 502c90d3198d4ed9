"""What somebody asks: a model, devices, traffic, limits and what to be best at."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, get_args

from planner.errors import PlanError
from planner.plan import Routing
from planner.space import Choices
from simulator.handover import Mode
from simulator.limits import Limit
from simulator.routers import ROUTERS
from simulator.workload import Requests

Objective = Literal["goodput-per-gpu", "fewest-gpus", "cost", "energy", "latency"]
Serving = Literal["aggregated", "disaggregated", "shared", "any"]


#: Requests below which no pools are sized.
FEWEST = 20


@dataclass(frozen=True, slots=True)
class Question:
    """Which plan serves this model on these devices under this traffic within these limits?

    model, hardware, engine   names of shipped profiles or paths
    gpus          devices at hand
    also          other devices at hand, by profile name
    serving       aggregated: every replica serves whole requests; disaggregated: prefill and decode pools; shared:
                  prefill and decode at once on shares of a device's processors; any: whichever is best
    transfer      how KV goes from prefill to decode pools
    budget_usd_per_h, budget_w   what the devices in use may cost and draw
    requests      the traffic; its arrival times are stretched to rate_per_s
    rate_per_s    requests per second that must be served; None for the traffic's own rate
    limits        what every class of requests is promised (TTFT, TPOT, E2E)
    objective     goodput-per-gpu: the highest goodput within the limits, by device at hand, idle ones too;
                  fewest-gpus, cost (USD per million output tokens), energy (joules per output token) and latency
                  (mean end-to-end time) at rate_per_s
    choices       what may be varied beside the degrees
    router        how requests are spread over replicas; pool_router: over those of pools with roles
    seconds       wall-clock time after which no further plan is simulated
    jobs          processes that simulate; None for as many as there are processors
    cost          what prices rest on: analytic, calibrated or measured; see planner.catalogue.open_catalogue
    routing       file of the recorded routing of the model's experts (hwmodels.routingfiles); None for uniform routing
    experts_placed   whether experts are placed by it (planner.placedexperts), or in order as engines load them
    tolerance     relative width of a capacity's bisection
    """

    model: str
    hardware: str
    gpus: int
    requests: Requests
    rate_per_s: float | None = None
    limits: tuple[Limit, ...] = ()
    objective: Objective = "goodput-per-gpu"
    engine: str = "vllm"
    choices: Choices = field(default_factory=Choices)
    router: Routing = "round-robin"
    pool_router: Routing = "least-tokens"
    seed: int = 0
    seconds: float = 13.0
    tolerance: float = 0.02
    jobs: int | None = None
    cost: str = "calibrated"
    keep: int = 10
    also: dict[str, int] = field(default_factory=dict, hash=False)
    serving: Serving = "aggregated"
    transfer: Mode = "layer-wise"
    budget_usd_per_h: float | None = None
    budget_w: float | None = None
    routing: str | None = None
    experts_placed: bool = True

    def __post_init__(self) -> None:
        """Raise PlanError for a question that cannot be meant."""
        if self.objective not in get_args(Objective):
            raise PlanError(f"objective {self.objective!r}: expected one of {', '.join(get_args(Objective))}")
        if self.serving not in get_args(Serving):
            raise PlanError(f"serving {self.serving!r}: expected one of {', '.join(get_args(Serving))}")
        for name, budget in (("budget_usd_per_h", self.budget_usd_per_h), ("budget_w", self.budget_w)):
            if budget is not None and not (isfinite(budget) and budget > 0):
                raise PlanError(f"{name} {budget}: expected a finite number above 0")
        if self.transfer not in get_args(Mode):
            raise PlanError(f"transfer {self.transfer!r}: expected one of {', '.join(get_args(Mode))}")
        for router in (self.router, self.pool_router):
            if router not in ROUTERS:
                raise PlanError(f"router {router!r}: expected one of {', '.join(ROUTERS)}")
        if self.serving in ("disaggregated", "shared") and "chunked" not in self.choices.policies:
            raise PlanError(
                f"serving {self.serving} with policies {', '.join(self.choices.policies)}: replicas of pools and those "
                "that share devices run chunked; expected chunked among the policies"
            )
        if self.serving == "disaggregated" and sum(self.devices.values()) < 2:
            raise PlanError("serving disaggregated on 1 device: expected two or more, for prompts and answers")
        if self.serving in ("disaggregated", "any") and len(self.requests) < FEWEST:
            raise PlanError(
                f"serving {self.serving} for {len(self.requests)} requests: expected at least {FEWEST}, from which "
                "pools are sized"
            )
        if self.rate_per_s is not None and not (isfinite(self.rate_per_s) and self.rate_per_s > 0):
            raise PlanError(f"rate {self.rate_per_s}: expected a finite number of requests per second above 0")
        if not (isfinite(self.seconds) and self.seconds > 0):
            raise PlanError(f"seconds {self.seconds}: expected a finite time above 0")
        if not 0 < self.tolerance < 1:
            raise PlanError(f"tolerance {self.tolerance}: expected a fraction between 0 and 1")
        if len(self.requests) > 1 and self.requests.span_s == 0:
            raise PlanError(
                f"all {len(self.requests)} requests arrive at once: expected gaps to stretch to a rate; "
                "draw arrivals instead"
            )
        if len(self.requests) == 1 and self.rate_per_s is None and self.objective != "goodput-per-gpu":
            raise PlanError("one request has no rate: expected rate_per_s (--rate), or more requests")
        if self.objective == "goodput-per-gpu" and not self.limits:
            raise PlanError(
                "objective goodput-per-gpu: expected at least one limit (--ttft, --tpot or --e2e) to be good at"
            )
        for limit in self.limits:
            if limit.metric == "itl":
                raise PlanError(
                    "limit on itl: a search is limited by ttft, tpot and e2e; see itl with 'shardwise simulate'"
                )

    @property
    def devices(self) -> dict[str, int]:
        """All devices at hand, by profile name."""
        return {self.hardware: self.gpus, **self.also}

    @property
    def demanded_per_s(self) -> float:
        """The rate that must be served."""
        return self.rate_per_s if self.rate_per_s is not None else self.requests.rate_per_s
