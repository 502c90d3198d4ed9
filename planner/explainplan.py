"""Where does the time of a plan's steps go, pool by pool, encode workers included?"""

from __future__ import annotations

import numpy as np

from hwmodels.encoder import encode_operators, encode_work
from hwmodels.mapping import Mapping
from hwmodels.roofline import AnalyticCost
from hwmodels.tiles import Cut
from planner.catalogue import Catalogue
from planner.encoding import Vision, precision_on, vision_of
from planner.explain import Explanation, MemoryUse, Pricing, Row, StepTimes, explain
from planner.plan import Plan, Pool


def explain_plan(
    catalogue: Catalogue,
    plan: Plan,
    *,
    batch: int | None = None,
    context: int = 1024,
    prefill: int | None = None,
    image: Cut | None = None,
) -> list[Explanation]:
    """Memory and steps of every pool of the plan, in its order; see planner.explain.explain for the other arguments.

    image   how the requests' images are cut, in a plan with an encoder; None for a small one of a single tile

    Memory is what simulations of the plan count with: that of the pool's own devices, with the plan's encoder where
    replicas encode for themselves. The step of an encode pool is a full batch of tiles.

    Raises what explain and Catalogue.deployment raise.
    """
    vision = vision_of(plan, image)
    found = []
    for pool in plan.pools:
        if pool.role == "encode" and vision is not None:
            found.append(_encoding(catalogue, plan, pool, vision))
            continue
        own = None if plan.encode_pool is not None or pool.role == "decode" else vision
        found.append(
            explain(
                catalogue, pool, batch=batch, context=context, prefill=prefill, vision=own,
                ssd_gb_per_s=plan.ssd_gb_per_s,
            )
        )  # fmt: skip
    return found


def _encoding(catalogue: Catalogue, plan: Plan, pool: Pool, vision: Vision) -> Explanation:
    """An encode worker, which has one device for itself, with as many tiles as it takes at once."""
    own, encoder = catalogue.of(pool), vision.encoder
    device, engine, cost = own.cluster.device, own.engine, own.prices(Mapping())
    clusters = {plan.hardware: catalogue.cluster, **{name: one.cluster for name, one in catalogue.others.items()}}
    spec = vision.workers(plan, pool, clusters, cost, engine, with_work=False)
    tiles, precision = pool.batch_tiles, precision_on(device)
    found = encode_operators(encoder, np.array([float(tiles)]), vision.patches, precision)
    rows = Pricing(cost, AnalyticCost(own.cluster, Mapping()), engine).rows(found)
    rows.append(Row("scheduling", "host", 1, engine.step_overhead_s + engine.prompt_overhead_s, 0.0, 0.0, "host"))
    time_s = sum(row.time_s for row in rows)
    flops, moved = encode_work(encoder, tiles, vision.patches, precision)
    step = StepTimes(
        f"batch of {tiles} {'tile' if tiles == 1 else 'tiles'} of {vision.patches} patches",
        tiles * encoder.tokens(vision.patches),
        tuple(row for row in rows if row.time_s > 0),
        float(spec.times_s[tiles]),
        flops / (device.peak_flops_per_s[precision.activations] * time_s),
        moved / (device.memory_bytes_per_s * time_s),
    )
    weights = encoder.weights_bytes(precision)
    activations = tiles * encoder.tile_bytes(vision.patches, precision)
    left = device.memory_bytes - weights - activations
    return Explanation(pool, MemoryUse(weights, activations, left, 0.0, device.memory_bytes, 0.0, 0, 0), (step,))
