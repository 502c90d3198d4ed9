"""What do the experts of a replica take of which its devices hold a part, in steps of any number of tokens?"""

from __future__ import annotations

import numpy as np

from hwmodels import operators as ops
from hwmodels.expertoffload import (
    LINK_LATENCY_S,
    ExpertCosts,
    cpu_expert_s,
    expert_bytes,
    expert_layers,
    gpu_expert_s,
)
from hwmodels.hardware import Cluster
from hwmodels.mapping import Mapping, Precision
from hwmodels.offloadedcost import OffloadedLayers
from hwmodels.operators import Array, Experts
from hwmodels.roofline import AnalyticCost
from hwmodels.routing import RoutingStats
from hwmodels.shape import ModelShape
from hwmodels.step_model import CostModel
from planner.offloading import Away, formats, host_of
from simulator.expertcache import HOBBIT_THRESHOLDS
from simulator.expertrouting import SKEW, popularity_of, power_law
from simulator.offloadedlayers import Sides, offloaded_layers
from simulator.offloadplan import OffloadPlan

#: Of the power law that stands for unknown popularity, and of all draws.
SEED = 0


def offload_plan(precision: Precision, away: Away) -> OffloadPlan:
    """On demand, into a cache of each layer that drops what is longest unused; a CPU helps as HybriMoE decides.

    With two formats a token's less important experts are taken in the lower one or left out, by HOBBIT's thresholds.
    """
    ladder = formats(precision, away)
    return OffloadPlan(
        away.cache,
        ladder,
        HOBBIT_THRESHOLDS if len(ladder) > 1 else (1.0,),
        misses="hybrid" if away.threads else "load",
        cpu_threads=away.threads,
        popular=True,
    )


def layers_of(
    model: ModelShape,
    cluster: Cluster,
    mapping: Mapping,
    precision: Precision,
    away: Away,
    plain: CostModel,
    routing: RoutingStats | None = None,
) -> OffloadedLayers:
    """A layer's experts by the tokens of a step.

    plain     prices the experts of a device that holds them all
    routing   recorded popularity; None for a power law of simulator.expertrouting.SKEW
    """
    layers = expert_layers(model)
    ff = layers[0].feed_forward
    host, ladder = host_of(cluster, mapping, away), formats(precision, away)
    analytic = AnalyticCost(cluster, mapping)

    def gpu_s(level: int, tokens: Array) -> Array:
        return gpu_expert_s(model, ladder[level], tokens, analytic, mapping.tp)

    def cpu_s(level: int, tokens: Array) -> Array:
        return cpu_expert_s(model, ladder[level], tokens, host)

    def resident_s(tokens: Array) -> Array:
        found = ops.expert_feed_forward(model, ff, tokens, tokens, mapping, precision, 1)
        return plain.time_s(next(op for op in found if isinstance(op, Experts)))

    costs = ExpertCosts(
        layers=len(layers),
        experts=ff.experts,
        top_k=ff.top_k,
        expert_bytes=tuple(expert_bytes(model, name) / mapping.tp for name in ladder),
        gpu_s=((),) * len(ladder),
        cpu_s=(),
        dense_s=(0.0,) * len(layers),
        once_s=0.0,
        link_bytes_per_s=cluster.host_bytes_per_s,
        link_latency_s=LINK_LATENCY_S,
        host_bytes=host.memory_bytes,
        ssd_bytes_per_s=host.ssd_bytes_per_s,
    )
    popularity = (
        power_law(len(layers), ff.experts, SKEW, np.random.default_rng(SEED))
        if routing is None
        else popularity_of(routing.loads, ff.top_k)
    )
    sides = Sides(costs, gpu_s, cpu_s if away.threads else None, resident_s)
    return offloaded_layers(sides, offload_plan(precision, away), popularity, seed=SEED)
