"""From a plan to something that can be simulated: step models, KV blocks and devices, compiled once and kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hwmodels.busiest import BusiestRank, busiest_rank
from hwmodels.engine import Engine, load_engine
from hwmodels.errors import MappingError
from hwmodels.evidence import evidence
from hwmodels.hardware import Cluster, Efficiency, load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import DTYPE_BYTES, WEIGHT_FORMATS, Mapping, Precision, weight_bytes
from hwmodels.memory import Memory, Sizes, plan_memory, replica_sizes, require_fit
from hwmodels.roofline import AnalyticCost
from hwmodels.routedcost import RoutedCost
from hwmodels.routing import RoutingStats
from hwmodels.routingfiles import read_routing
from hwmodels.shape import ModelShape
from hwmodels.shares import SharedSteps, compile_shared_steps
from hwmodels.step_model import CostModel, StepModel, compile_step_model
from hwmodels.tiles import Cut
from hwmodels.work import Work
from planner.encoding import Vision, vision_of, without_encode
from planner.errors import PlanError
from planner.links import handover_of
from planner.plan import Plan, Pool
from planner.routedranks import require_placement, shares_of_ranks
from planner.sharing import shared_spec
from planner.tiers import tiering_of
from simulator.deployment import Deployment, ReplicaSpec
from simulator.routers import ROUTERS
from simulator.scheduler import SchedulerConfig

if TYPE_CHECKING:
    from hwmodels.kernels.library import Kernels

#: What prices may rest on.
COSTS = ("analytic", "calibrated", "measured")


def mapping_of(pool: Pool) -> Mapping:
    """How one replica of the pool is cut."""
    return Mapping(pool.tp, pool.pp, pool.attention_dp, pool.ep, pool.expert_tp, pool.stages)


def precision_of(pool: Pool) -> Precision:
    """The number formats of the pool."""
    return Precision(pool.weights, pool.activations, pool.kv, pool.experts)


def scheduler_of(pool: Pool) -> SchedulerConfig:
    """How the pool's engines form batches."""
    return SchedulerConfig(
        pool.policy,
        pool.max_seqs,
        pool.token_budget,
        pool.block_tokens,
        pool.max_context_tokens,
        pool.prefix_caching,
    )


def law_broken(model: ModelShape, mapping: Mapping) -> str | None:
    """The law of the model that the degrees break, in a few words; None if they are legal.

    Heads and experts are divided evenly; KV heads are divided or copied evenly; ep * expert_tp covers the ranks that
    hold a stage's experts; attention groups exist only where experts bring them together again.
    """
    attentions = {layer.attention for layer in model.layers}
    blocks = {layer.feed_forward for layer in model.layers}
    if any(a.heads % mapping.tp for a in attentions):
        return "tp divides the attention heads"
    if any(a.latent is None and a.kv_heads % mapping.tp and mapping.tp % a.kv_heads for a in attentions):
        return "tp divides the KV heads or is a multiple of them"
    if any(not ff.experts and ff.intermediate % mapping.tp for ff in blocks):
        return "tp divides the feed-forward width"
    if mapping.pp > len(model.layers):
        return "every stage has a layer"
    if mapping.attention_dp > 1 and not model.is_moe:
        return "attention_dp needs experts"
    if mapping.attention_dp > 1 and mapping.pp > 1:
        return "attention_dp runs without pipeline stages"
    if not model.is_moe:
        return None if mapping.ep == mapping.expert_tp == 1 else "ep needs experts"
    if mapping.ep * mapping.expert_tp != mapping.tp * mapping.attention_dp:
        return "ep x expert_tp = tp x attention_dp"
    experts = [ff for ff in blocks if ff.experts]
    if any(ff.experts % mapping.ep for ff in experts):
        return "ep divides the experts"
    if any(ff.intermediate % mapping.expert_tp for ff in experts):
        return "expert_tp divides the expert width"
    return None


@dataclass(slots=True)
class Catalogue:
    """Compiled parts of plans for one model on one cluster under one engine.

    others                 catalogues of the same model on other devices, by hardware, for pools that name theirs
    kernels                measured kernels that price the operators; None for the analytic model alone
    routing                recorded popularity of experts, which makes the busiest rank; None for uniform routing
    placement              layers x experts x ranks, part of an expert's tokens on each rank (planner.placement's
                           `split`), for replicas of as many expert ranks; else experts sit in their order
    max_tokens, max_seqs   largest step the step models are tabulated for; they grow when a plan asks for more
    """

    model: ModelShape
    cluster: Cluster
    engine: Engine
    kernels: Kernels | None = None
    max_tokens: int = 8192
    max_seqs: int = 1024
    others: dict[str, Catalogue] = field(default_factory=dict)
    routing: RoutingStats | None = None
    placement: NDArray[np.float64] | None = None
    _models: dict[tuple[Mapping, Precision], StepModel] = field(default_factory=dict)
    _works: dict[tuple[Mapping, Precision], Work] = field(default_factory=dict)
    _shared: dict[tuple[Mapping, Precision], SharedSteps] = field(default_factory=dict)
    _sizes: dict[tuple[Mapping, Precision], Sizes] = field(default_factory=dict)
    _busiest: dict[int, BusiestRank] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise RoutingError for routing of another model, PlanError for a placement of other experts."""
        if self.routing is not None:
            self.routing.check(self.model)
        if self.placement is not None:
            if self.routing is None:
                raise PlanError("a placement of experts without routing; expected both (--routing)")
            require_placement(self.placement, self.routing)

    def reserve(self, max_tokens: int, max_seqs: int) -> None:
        """Let step models cover steps of this size; those compiled for smaller ones are dropped."""
        if max_tokens > self.max_tokens or max_seqs > self.max_seqs:
            self.max_tokens = max(self.max_tokens, max_tokens)
            self.max_seqs = max(self.max_seqs, max_seqs)
            self._models.clear()
            self._shared.clear()
            self._works.clear()

    def step_model(self, mapping: Mapping, precision: Precision) -> StepModel:
        """The step model of a replica; raises MappingError where the degrees or formats are not possible."""
        key = (mapping, precision)
        if key not in self._models:
            self.check(mapping, precision)
            self._models[key] = compile_step_model(
                self.model,
                mapping,
                precision,
                self.engine,
                self.prices(mapping),
                max_tokens=self.max_tokens,
                max_seqs=self.max_seqs,
            )
        return self._models[key]

    def prices(self, mapping: Mapping) -> CostModel:
        """What prices the operators of a replica cut like this."""
        plain = self._plain_prices(mapping)
        if self.routing is None or mapping.ep == 1:
            return plain
        if mapping.ep not in self._busiest:
            self._busiest[mapping.ep] = busiest_rank(
                self.routing, shares_of_ranks(self.routing, mapping.ep, self.placement)
            )
        return RoutedCost(plain, self._busiest[mapping.ep])

    def _plain_prices(self, mapping: Mapping) -> CostModel:
        """The same under uniform routing."""
        if self.kernels is None:
            return AnalyticCost(self.cluster, mapping)
        from hwmodels.kernels.measured import MeasuredCost

        return MeasuredCost(self.cluster, mapping, self.kernels)

    def evidence(self, pool: Pool) -> dict[str, float]:
        """Shares of a step's device time by what its prices rest on; see hwmodels.evidence."""
        mapping = mapping_of(pool)
        return evidence(self.model, mapping, precision_of(pool), self.engine, self.prices(mapping))

    def plan_evidence(self, plan: Plan) -> dict[str, float]:
        """The same of a whole plan: its pools of replicas, weighted by their devices."""
        shares: dict[str, float] = {}
        gpus = sum(pool.gpus for pool in plan.serving)
        for pool in plan.serving:
            for source, share in self.of(pool).evidence(pool).items():
                shares[source] = shares.get(source, 0.0) + share * pool.gpus / gpus
        return shares

    def work(self, mapping: Mapping, precision: Precision) -> Work:
        """FLOPs and bytes of a replica's steps."""
        key = (mapping, precision)
        if key not in self._works:
            self._works[key] = Work(self.model, mapping, precision, max_tokens=self.max_tokens, max_seqs=self.max_seqs)
        return self._works[key]

    def check(self, mapping: Mapping, precision: Precision) -> None:
        """Raise MappingError for degrees or number formats that are not possible."""
        degrees = {"tp": mapping.tp, "pp": mapping.pp, "attention_dp": mapping.attention_dp, "ep": mapping.ep}
        for name, degree in {**degrees, "expert_tp": mapping.expert_tp}.items():
            if degree < 1:
                raise MappingError(f"{name}={degree}: expected a degree of at least 1")
        law = law_broken(self.model, mapping)
        if law is not None:
            told = " ".join(f"{name}={degree}" for name, degree in degrees.items())
            raise MappingError(f"{told} expert_tp={mapping.expert_tp}: breaks the law that {law} of {self.model.name}")
        problem = format_problem(self.cluster, precision)
        if problem is not None:
            raise MappingError(problem)

    def memory(self, pool: Pool, vision: Vision | None = None) -> Memory:
        """Memory of the pool's fullest rank, with an encoder on its first stage if there is one."""
        key = (mapping_of(pool), precision_of(pool))
        if key not in self._sizes:
            self._sizes[key] = replica_sizes(self.model, *key)
        sizes = self._sizes[key]
        return plan_memory(
            sizes if vision is None else vision.beside(sizes, pool, self.cluster.device),
            self.cluster.device,
            self.engine,
            token_budget=pool.token_budget,
            max_seqs=pool.max_seqs,
            block_tokens=pool.block_tokens,
        )

    def require_fit(self, pool: Pool, vision: Vision | None = None) -> Memory:
        """Memory of the pool's fullest rank; raises OutOfMemoryError unless one KV block fits beside the weights."""
        memory, tokens = self.memory(pool, vision), pool.block_tokens
        require_fit(memory, self.model, mapping_of(pool), self.cluster.device, tokens, tokens)
        return memory

    def replica(
        self, pool: Pool, *, share: float = 1.0, with_work: bool = False, vision: Vision | None = None
    ) -> ReplicaSpec:
        """One replica of the pool, ready to simulate.

        vision   an encoder that it has beside the model

        Raises MappingError, SchedulerError, OutOfMemoryError when no request at all would fit, or PlanError for a pool
        without replicas.
        """
        if pool.role == "encode":
            raise PlanError("role 'encode': its devices hold no replicas; expected a role that serves requests")
        mapping, precision, scheduler = mapping_of(pool), precision_of(pool), scheduler_of(pool)
        self.check(mapping, precision)
        self.reserve(pool.token_budget, pool.max_seqs)
        memory = self.require_fit(pool, vision)
        encoder = None
        if vision is not None:
            if pool.sharing is not None:
                raise PlanError(f"sharing {pool.sharing!r} beside an encoder: expected an encode pool, or no sharing")
            encoder = vision.own(pool, self.cluster.device, self.prices(Mapping()), self.engine, with_work=with_work)
        spec = ReplicaSpec(
            model=self.step_model(mapping, precision),
            mapping=mapping,
            scheduler=scheduler,
            kv_blocks=memory.kv_blocks,
            device=self.cluster.device,
            share=share,
            work=self.work(mapping, precision) if with_work else None,
            arithmetic_dtype=precision.activations,
            role=pool.role,
            encoder=encoder,
        )
        if pool.sharing is None:
            return spec
        return shared_spec(spec, self.shared_steps(mapping, precision), pool)

    def shared_steps(self, mapping: Mapping, precision: Precision) -> SharedSteps:
        """Step models of a replica whose prefill and decode share the device, at any share."""
        key = (mapping, precision)
        if key not in self._shared:
            self._shared[key] = compile_shared_steps(
                self.model,
                mapping,
                precision,
                self.engine,
                self.prices(mapping),
                self.cluster,
                max_tokens=self.max_tokens,
                max_seqs=self.max_seqs,
            )
        return self._shared[key]

    def of(self, pool: Pool) -> Catalogue:
        """The catalogue of the pool's devices."""
        return self if pool.hardware is None else self.others.get(pool.hardware, self)

    def deployment(self, plan: Plan, *, with_work: bool = False, image: Cut | None = None) -> Deployment:
        """All replicas of the plan behind its router.

        image   how the requests' images are cut, in a plan with an encoder

        Raises MappingError, SchedulerError, OutOfMemoryError, or PlanError where replicas that exchange KV find no
        room.
        """
        specs: list[ReplicaSpec] = []
        vision, encode_pool = vision_of(plan, image), plan.encode_pool
        for pool in plan.serving:
            share = float(pool.gpus_per_replica) if pool.share is None else pool.share
            own = None if encode_pool is not None or pool.role == "decode" else vision
            spec = self.of(pool).replica(pool, share=share, with_work=with_work, vision=own)
            specs += [spec] * pool.replicas
        clusters = {plan.hardware: self.cluster, **{name: one.cluster for name, one in self.others.items()}}
        handover = encode = None
        if plan.disaggregated:
            serving = without_encode(plan)
            handover = handover_of(serving, specs, self.model, clusters, self.engine.kernels["default"])
        if vision is not None and encode_pool is not None:
            prices = self.of(encode_pool).prices(Mapping())
            encode = vision.workers(plan, encode_pool, clusters, prices, self.engine, with_work=with_work)
        tiers = tiering_of(plan, specs, self.model, clusters)
        frontend_s = self.engine.request_overhead_s
        return Deployment(
            specs,
            ROUTERS[plan.router],
            frontend_s,
            handover,
            switch_s=plan.role_switch_s,
            encode=encode,
            tiers=tiers,
        )


def format_problem(cluster: Cluster, precision: Precision) -> str | None:
    """Why the device cannot work in these formats; None if it can."""
    device = cluster.device
    for name in (precision.weights, precision.experts or precision.weights):
        if name not in WEIGHT_FORMATS:
            return f"weights in {name!r}: expected one of {', '.join(WEIGHT_FORMATS)}"
    for name in (precision.activations, precision.kv):
        if name not in DTYPE_BYTES:
            return f"number format {name!r}: expected one of {', '.join(DTYPE_BYTES)}"
    for part in (precision, precision.of_experts):
        if part.activations not in device.peak_flops_per_s:
            known = ", ".join(device.peak_flops_per_s)
            return f"activations in {part.activations}: {device.name} multiplies in {known} only; choose one of these"
        if int(weight_bytes(part.weights)) > DTYPE_BYTES[part.activations]:
            return f"weights in {part.weights} under activations in {part.activations}: expected weights no wider"
    return None


def open_catalogue(
    model: str,
    hardware: str,
    gpus: int,
    engine: str,
    cost: str = "calibrated",
    also: dict[str, int] | None = None,
    routing: str | RoutingStats | None = None,
    placement: NDArray[np.float64] | None = None,
) -> Catalogue:
    """The catalogue of a model on `gpus` devices.

    also   other hardware at hand and its devices

    routing     recorded routing of the model's experts, or a file of it (hwmodels.routingfiles)
    placement   see Catalogue

    cost   what the prices rest on: 'analytic' (a roofline with the default efficiencies), 'calibrated' (with those of
           the device's profile) or 'measured' (kernels that were timed, the calibrated roofline where there are none)

    Raises ProfileError for unknown names, RoutingError for routing of another model, MeasurementError where no
    kernels were measured.
    """
    if cost not in COSTS:
        raise PlanError(f"cost {cost!r}: expected one of {', '.join(COSTS)}")
    shape = load_model(model)
    stats = read_routing(Path(routing), shape) if isinstance(routing, str) else routing
    if also:
        routed = (stats, placement)
        others = {name: open_catalogue(model, name, n, engine, cost, None, *routed) for name, n in also.items()}
        return replace(open_catalogue(model, hardware, gpus, engine, cost, None, *routed), others=others)
    cluster, profile = load_cluster(hardware, gpus), load_engine(engine)
    device = replace(cluster.device, efficiency=Efficiency()) if cost == "analytic" else cluster.device
    cluster = replace(cluster, device=device.of_engine(profile.kernels))
    if cost != "measured":
        return Catalogue(shape, cluster, profile, routing=stats, placement=placement)
    from hwmodels.kernels.library import open_kernels  # reads tables: not what most questions wait for

    kernels = open_kernels(cluster.device, profile.kernels)
    return Catalogue(shape, cluster, profile, kernels, routing=stats, placement=placement)
