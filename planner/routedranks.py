"""Which part of every expert's tokens does each rank of a replica compute?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hwmodels.routing import RoutingStats
from planner.errors import PlanError

Floats = NDArray[np.float64]


def shares_of_ranks(stats: RoutingStats, ranks: int, placement: Floats | None) -> Floats:
    """[layers, ranks, experts] as hwmodels.busiest takes them: by the placement if it is for so many ranks.

    Otherwise experts sit in their order, as many on every rank, as engines load them.
    """
    if placement is not None and placement.shape[2] == ranks:
        return np.asarray(placement, dtype=np.float64).transpose(0, 2, 1)
    held: Floats = (np.arange(stats.experts) * ranks // stats.experts == np.arange(ranks)[:, None]).astype(np.float64)
    return np.broadcast_to(held, (len(stats.layers), *held.shape))


def require_placement(placement: Floats, stats: RoutingStats) -> None:
    """Raise PlanError unless it is layers x experts x ranks of the routing, and every expert's parts sum to 1."""
    expected = stats.loads.shape
    if placement.ndim != 3 or placement.shape[:2] != expected:
        raise PlanError(
            f"placement of shape {placement.shape}; expected {expected[0]} layers x {expected[1]} experts x ranks"
        )
    off = np.abs(placement.sum(axis=2) - 1)
    if not (placement >= 0).all() or not off.max() < 1e-6:
        layer, expert = (int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
        raise PlanError(
            f"layer {stats.layers[layer]}, expert {expert}: its parts on ranks sum to "
            f"{placement[layer, expert].sum():.4g}; expected parts of at least 0 that sum to 1"
        )
