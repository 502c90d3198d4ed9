"""How long do the routed experts of single steps take, if every token's choices are drawn?

The reference for step models, which take the expected busiest rank of the average layer instead (hwmodels.routedcost).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hwmodels.operators import Experts
from hwmodels.roofline import AnalyticCost
from hwmodels.routing import Array, RoutingStats
from simulator.choicedraws import Chooser, draw_counts, split_and_touched


def sampled_experts_s(
    rng: np.random.Generator,
    stats: RoutingStats,
    rank_shares: Array,
    cost: AnalyticCost,
    op: Experts,
    tokens: int,
    steps: int,
) -> Array:
    """[steps] seconds of the routed experts of all mixture layers, each as slow as its slowest rank.

    rank_shares   [L, G, E] part of an expert's tokens that each rank computes
    op            the kernel of one layer, whose rows and touched experts are replaced by those drawn

    Layers are drawn independently of each other. A rank without tokens takes no time.
    """
    total = np.zeros(steps)
    for inclusion, shares in zip(stats.inclusion, rank_shares, strict=True):
        counts = draw_counts(rng, Chooser.of(inclusion), tokens, steps)
        rows, touched = split_and_touched(rng, counts, shares)
        whole = np.full(rows.shape, float(tokens))
        kernel = replace(op, tokens=whole, rows=rows.astype(float), active=touched.astype(float), count=1)
        total += np.where(rows > 0, cost.time_s(kernel), 0.0).max(axis=1)
    return total
