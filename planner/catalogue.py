"""From a plan to something that can be simulated: step models, KV blocks and devices, compiled once and kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hwmodels.contextkinds import KINDS, require_legal
from hwmodels.engine import Engine, load_engine
from hwmodels.errors import MappingError, OutOfMemoryError
from hwmodels.evidence import evidence
from hwmodels.hardware import Cluster, Efficiency, load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import DTYPE_BYTES, WEIGHT_FORMATS, Mapping, Precision, weight_bytes
from hwmodels.memory import Memory, Sizes, plan_memory, replica_sizes, require_fit
from hwmodels.offloadedcost import OffloadedCost, OffloadedLayers
from hwmodels.overlap import Overlap
from hwmodels.roofline import AnalyticCost
from hwmodels.routing import RoutingStats
from hwmodels.routingfiles import read_routing
from hwmodels.shape import Attention, ModelShape
from hwmodels.shares import SharedSteps, compile_shared_steps
from hwmodels.step_model import CostModel, StepModel, compile_step_model
from hwmodels.tiles import Cut
from hwmodels.work import Work
from planner.encoding import Vision, vision_of, without_encode
from planner.errors import PlanError
from planner.links import handover_of
from planner.offloadchoices import largest_cache
from planner.offloading import Away, away_broken, away_of, require_host, resident
from planner.plan import Plan, Pool
from planner.routedranks import ExpertMap
from planner.scheduling import scheduler_of
from planner.seating import Seating
from planner.sharing import shared_spec
from planner.tiers import tiering_of
from simulator.deployment import Deployment, ReplicaSpec
from simulator.routers import ROUTERS

if TYPE_CHECKING:
    from hwmodels.kernels.library import Kernels

#: What prices may rest on.
COSTS = ("analytic", "calibrated", "measured")
#: The law of redundant experts.
UNDIVIDED = "ep divides the experts and the redundant ones together"


def mapping_of(pool: Pool) -> Mapping:
    """How one replica of the pool is cut."""
    cut = pool.tp, pool.pp, pool.attention_dp, pool.ep, pool.expert_tp, pool.stages
    return Mapping(*cut, pool.redundant_experts, pool.expert_map, pool.cp, pool.cp_kind)


def precision_of(pool: Pool) -> Precision:
    """The number formats of the pool."""
    return Precision(pool.weights, pool.activations, pool.kv, pool.experts)


#: How replicas are cut and kept, what of their experts is away, what overlaps: what step models are made for.
Kind = tuple[Mapping, Precision, Away | None, Overlap]


def kind_of(pool: Pool) -> Kind:
    """The kind of the pool's replicas, where experts do not exceed host memory."""
    return mapping_of(pool), precision_of(pool), away_of(pool), pool.overlap


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
    if mapping.cp > 1:
        law = context_law_broken(attentions, mapping)
        if law is not None:
            return law
    if mapping.pp > len(model.layers):
        return "every stage has a layer"
    if mapping.attention_dp > 1 and not model.is_moe:
        return "attention_dp needs experts"
    if not model.is_moe:
        plain = mapping.ep == mapping.expert_tp == 1 and not mapping.redundant_experts and mapping.expert_map is None
        return None if plain else "ep needs experts"
    if mapping.ep * mapping.expert_tp != mapping.tp * mapping.token_groups:
        return f"ep x expert_tp = tp x {'cp x ' if mapping.cp > 1 else ''}attention_dp"
    experts = [ff for ff in blocks if ff.experts]
    if mapping.ep == 1 and (mapping.redundant_experts or mapping.expert_map is not None):
        return "redundant experts and a map of experts need ep"
    if any((ff.experts + mapping.redundant_experts) % mapping.ep for ff in experts):
        return UNDIVIDED if mapping.redundant_experts else "ep divides the experts"
    if any(ff.experts + mapping.redundant_experts > ff.experts * mapping.ep for ff in experts):
        return "a rank has no more expert slots than there are experts"
    if any(ff.intermediate % mapping.expert_tp for ff in experts):
        return "expert_tp divides the expert width"
    return None


def undivided(model: ModelShape, mapping: Mapping) -> str:
    """What is expected instead of a number of redundant experts that does not divide: its neighbours that do."""
    counts = {layer.feed_forward.experts for layer in model.layers if layer.feed_forward.experts}
    experts = next(count for count in sorted(counts) if (count + mapping.redundant_experts) % mapping.ep)
    below = mapping.redundant_experts - (experts + mapping.redundant_experts) % mapping.ep
    near = " or ".join(str(number) for number in (below, below + mapping.ep) if number >= 0)
    return (
        f"redundant_experts={mapping.redundant_experts}: expected {near} with ep={mapping.ep} and {experts} experts in "
        f"{model.name}, so that ep divides them together"
    )


def context_law_broken(attentions: Iterable[Attention], mapping: Mapping) -> str | None:
    """The law of context parallelism that the degrees break; None if they are legal."""
    if mapping.cp_kind not in KINDS:
        return f"cp_kind is one of {', '.join(KINDS)}"
    for attention in attentions:
        try:
            require_legal(mapping.cp_kind, attention, mapping.cp, mapping.tp)
        except MappingError:
            return "ulysses gives every rank of tp x cp whole query heads and KV heads, or copies (take ring)"
    return None


@dataclass(slots=True)
class Catalogue:
    """Compiled parts of plans for one model on one cluster under one engine.

    others                 catalogues of the same model on other devices, by hardware, for pools that name theirs
    kernels                measured kernels that price the operators; None for the analytic model alone
    routing                recorded popularity of experts, which makes the busiest rank; None for uniform routing
    placed                 whether experts sit where it suits the recorded routing (planner.placedexperts) in pools
                           without a map; else they are in order, as engines load them
    maps                   which expert is in which slot, by what pools call it in `expert_map`
    seating                where experts sit, by these
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
    placed: bool = False
    maps: dict[str, ExpertMap] = field(default_factory=dict)
    _models: dict[Kind, StepModel] = field(default_factory=dict)
    _works: dict[tuple[Mapping, Precision], Work] = field(default_factory=dict)
    _shared: dict[tuple[Mapping, Precision], SharedSteps] = field(default_factory=dict)
    _away: dict[tuple[int, int, Precision, Away], OffloadedLayers] = field(default_factory=dict)
    _sizes: dict[tuple[Mapping, Precision, Away | None], Sizes] = field(default_factory=dict)
    seating: Seating = field(init=False)

    def __post_init__(self) -> None:
        """Raise RoutingError for routing of another model."""
        plain = self._plain_prices
        self.seating = Seating(self.model, self.cluster, self.routing, self.placed, self.maps, plain)

    def reserve(self, max_tokens: int, max_seqs: int) -> None:
        """Let step models cover steps of this size; those compiled for smaller ones are dropped."""
        if max_tokens > self.max_tokens or max_seqs > self.max_seqs:
            self.max_tokens = max(self.max_tokens, max_tokens)
            self.max_seqs = max(self.max_seqs, max_seqs)
            self._models.clear()
            self._shared.clear()
            self._works.clear()

    def step_model(
        self, mapping: Mapping, precision: Precision, away: Away | None = None, overlap: Overlap = "none"
    ) -> StepModel:
        """The step model of a replica; raises MappingError where the degrees or formats are not possible.

        away      what of its experts its devices do not hold
        overlap   of its collectives with arithmetic
        """
        key = (mapping, precision, away, overlap)
        if key not in self._models:
            self.check(mapping, precision, away)
            self._models[key] = compile_step_model(
                self.model,
                mapping,
                precision,
                self.engine,
                self.step_prices(mapping, precision, away),
                max_tokens=self.max_tokens,
                max_seqs=self.max_seqs,
                overlap=overlap,
                units=self.cluster.device.compute_units,
            )
        return self._models[key]

    def step_prices(self, mapping: Mapping, precision: Precision, away: Away | None = None) -> CostModel:
        """What prices the operators of a replica of which experts may be away."""
        plain = self.prices(mapping)
        return plain if away is None else OffloadedCost(plain, self.away_layers(mapping, precision, away))

    def away_layers(self, mapping: Mapping, precision: Precision, away: Away) -> OffloadedLayers:
        """A layer's experts by the tokens of a step; raises what `check` raises."""
        self.check(mapping, precision, away)
        key = (mapping.tp, mapping.pp if away.ssd_bytes_per_s else 1, precision, away)
        if key not in self._away:
            from planner.offloadprices import layers_of  # simulates: only where experts are away

            self._away[key] = layers_of(
                self.model, self.cluster, mapping, precision, away, self.prices(mapping), self.routing
            )
        return self._away[key]

    def prices(self, mapping: Mapping) -> CostModel:
        """What prices the operators of a replica cut like this."""
        return self.seating.prices(mapping) or self._plain_prices(mapping)

    def _plain_prices(self, mapping: Mapping) -> CostModel:
        """The same under uniform routing."""
        if self.kernels is None:
            return AnalyticCost(self.cluster, mapping)
        from hwmodels.kernels.measured import MeasuredCost

        return MeasuredCost(self.cluster, mapping, self.kernels)

    def evidence(self, pool: Pool, ssd_gb_per_s: float | None = None) -> dict[str, float]:
        """Shares of a step's device time by what its prices rest on; see hwmodels.evidence."""
        mapping, precision = mapping_of(pool), precision_of(pool)
        cost = self.step_prices(mapping, precision, away_of(pool, ssd_gb_per_s))
        return evidence(self.model, mapping, precision, self.engine, cost)

    def plan_evidence(self, plan: Plan) -> dict[str, float]:
        """The same of a whole plan: its pools of replicas, weighted by their devices."""
        shares: dict[str, float] = {}
        gpus = sum(pool.gpus for pool in plan.serving)
        for pool in plan.serving:
            for source, share in self.of(pool).evidence(pool, plan.ssd_gb_per_s).items():
                shares[source] = shares.get(source, 0.0) + share * pool.gpus / gpus
        return shares

    def work(self, mapping: Mapping, precision: Precision) -> Work:
        """FLOPs and bytes of a replica's steps."""
        key = (mapping, precision)
        if key not in self._works:
            self._works[key] = Work(self.model, mapping, precision, max_tokens=self.max_tokens, max_seqs=self.max_seqs)
        return self._works[key]

    def check(self, mapping: Mapping, precision: Precision, away: Away | None = None) -> None:
        """Raise MappingError for degrees or number formats that are not possible.

        Where experts are away, PlanError if they cannot be, OutOfMemoryError if their host has no room for them.
        """
        degrees = {"tp": mapping.tp, "pp": mapping.pp, "attention_dp": mapping.attention_dp, "ep": mapping.ep}
        if mapping.cp != 1:
            degrees["cp"] = mapping.cp
        for name, degree in {**degrees, "expert_tp": mapping.expert_tp}.items():
            if degree < 1:
                raise MappingError(f"{name}={degree}: expected a degree of at least 1")
        law = law_broken(self.model, mapping)
        if law == UNDIVIDED:
            raise MappingError(undivided(self.model, mapping))
        if law is not None:
            told = " ".join(f"{name}={degree}" for name, degree in degrees.items())
            raise MappingError(f"{told} expert_tp={mapping.expert_tp}: breaks the law that {law} of {self.model.name}")
        problem = format_problem(self.cluster, precision)
        if problem is not None:
            raise MappingError(problem)
        if away is not None:
            broken = away_broken(self.model, self.cluster, mapping, precision, away)
            if broken is not None:
                raise PlanError(broken[1])
            require_host(self.model, self.cluster, mapping, precision, away)

    def memory(self, pool: Pool, vision: Vision | None = None) -> Memory:
        """Memory of the pool's fullest rank, with an encoder on its first stage if there is one."""
        mapping, precision, away = key = (mapping_of(pool), precision_of(pool), away_of(pool))
        if key not in self._sizes:
            sizes = replica_sizes(self.model, mapping, precision)
            self._sizes[key] = sizes if away is None else resident(sizes, self.model, mapping, precision, away)
        sizes = self._sizes[key]
        return plan_memory(
            sizes if vision is None else vision.beside(sizes, pool, self.cluster.device),
            self.cluster.device,
            self.engine,
            token_budget=pool.token_budget,
            max_seqs=pool.max_seqs,
            block_tokens=pool.block_tokens,
            max_context_tokens=pool.max_context_tokens,
        )

    def require_fit(self, pool: Pool, vision: Vision | None = None) -> Memory:
        """Memory of the pool's fullest rank; raises OutOfMemoryError unless one KV block fits beside the weights."""
        memory, tokens = self.memory(pool, vision), pool.block_tokens
        try:
            require_fit(memory, self.model, mapping_of(pool), self.cluster.device, tokens, tokens)
        except OutOfMemoryError as error:
            if pool.expert_cache is None or vision is not None:
                raise
            most = largest_cache(self, pool, tokens)
            if not most:
                raise
            raise OutOfMemoryError(
                f"{error}, or expert_cache of at most {most:g} (it is {pool.expert_cache:g})"
            ) from None
        return memory

    def replica(
        self,
        pool: Pool,
        *,
        share: float = 1.0,
        with_work: bool = False,
        vision: Vision | None = None,
        ssd_gb_per_s: float | None = None,
    ) -> ReplicaSpec:
        """One replica of the pool, ready to simulate.

        vision         an encoder that it has beside the model
        ssd_gb_per_s   of the disks of a node, for experts that exceed its memory

        Raises MappingError, SchedulerError, OutOfMemoryError when no request at all would fit, or PlanError for a pool
        without replicas.
        """
        if pool.role == "encode":
            raise PlanError("role 'encode': its devices hold no replicas; expected a role that serves requests")
        mapping, precision, scheduler = mapping_of(pool), precision_of(pool), scheduler_of(pool)
        away = away_of(pool, ssd_gb_per_s)
        self.check(mapping, precision, away)
        if away is not None and pool.sharing is not None:
            raise PlanError(f"sharing {pool.sharing!r} with expert_cache: expected one of them")
        self.reserve(pool.token_budget, pool.max_seqs)
        memory = self.require_fit(pool, vision)
        encoder = None
        if vision is not None:
            if pool.sharing is not None:
                raise PlanError(f"sharing {pool.sharing!r} beside an encoder: expected an encode pool, or no sharing")
            encoder = vision.own(pool, self.cluster.device, self.prices(Mapping()), self.engine, with_work=with_work)
        spec = ReplicaSpec(
            model=self.step_model(mapping, precision, away, pool.overlap),
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
            spec = self.of(pool).replica(
                pool, share=share, with_work=with_work, vision=own, ssd_gb_per_s=plan.ssd_gb_per_s
            )
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
    *,
    placed: bool = False,
    maps: dict[str, ExpertMap] | None = None,
) -> Catalogue:
    """The catalogue of a model on `gpus` devices.

    also   other hardware at hand and its devices

    routing   recorded routing of the model's experts, or a file of it (hwmodels.routingfiles)
    placed, maps   see Catalogue

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
        one = partial(open_catalogue, model, engine=engine, cost=cost, routing=stats, placed=placed, maps=maps)
        others = {name: one(name, n) for name, n in also.items()}
        return replace(one(hardware, gpus), others=others)
    cluster, profile = load_cluster(hardware, gpus), load_engine(engine)
    device = replace(cluster.device, efficiency=Efficiency()) if cost == "analytic" else cluster.device
    cluster = replace(cluster, device=device.of_engine(profile.kernels))
    kernels = None
    if cost == "measured":
        from hwmodels.kernels.library import open_kernels  # reads tables: not what most questions wait for

        kernels = open_kernels(cluster.device, profile.kernels)
    return Catalogue(shape, cluster, profile, kernels, routing=stats, placed=placed, maps=maps or {})
