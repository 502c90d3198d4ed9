"""What does it cost on this hardware to have an expert here or there: choices on a rank, bytes between ranks?"""

from __future__ import annotations

import numpy as np

from hwmodels.hardware import Cluster
from hwmodels.mapping import DTYPE_BYTES, Mapping, Precision
from hwmodels.operators import Experts
from hwmodels.roofline import AnalyticCost
from hwmodels.routing import RoutingStats
from hwmodels.shape import FeedForward, ModelShape
from hwmodels.topology import NO_LINK, topology
from planner.placement import Floats, Problem, Traffic

#: Rows per expert at which a further row costs arithmetic alone.
MANY_ROWS = 8192


def problem_of(
    stats: RoutingStats, model: ModelShape, cluster: Cluster, formats: Precision, slots: int, replicas: int, tokens: int
) -> Problem:
    """The placement problem of recorded routing on a cluster whose GPUs all hold experts.

    slots    experts of a layer on a GPU
    tokens   of a step on all GPUs, each of which makes top_k choices

    A choice costs `seconds_per_choice` on its rank, and moves the hidden state in the format of the arithmetic over the
    slowest link on the way. Raises MappingError for GPUs that are not joined, PlanError for slots that do not suffice.
    """
    feed_forward = model.layers[stats.layers[0]].feed_forward
    seconds_per_byte, traffic = _links(cluster)
    return Problem(
        stats.loads,
        stats.transitions,
        cluster.gpus,
        slots,
        replicas,
        seconds_per_token=seconds_per_choice(model, feed_forward, cluster, formats),
        seconds_per_byte=seconds_per_byte,
        bytes_per_token=model.hidden * DTYPE_BYTES[formats.activations],
        tokens=float(tokens * stats.top_k),
        nodes=topology(cluster).node.tolist(),
        traffic=traffic,
    )


def seconds_per_choice(model: ModelShape, block: FeedForward, cluster: Cluster, formats: Precision) -> float:
    """Seconds that one more row takes in the routed experts of a rank that has plenty: the arithmetic's rate.

    From the price of the whole kernel (permute, up, activation, down, sum) as the device was calibrated, between
    MANY_ROWS and twice as many per expert. Steps so small that reading weights dominates cost less per choice.
    """
    here = max(1.0, block.experts / cluster.gpus)
    rows = MANY_ROWS * here * np.array([1.0, 2.0])
    kernel = Experts(
        "routed experts", rows * cluster.gpus / block.top_k, rows, np.full(2, here), model.hidden, block.intermediate,
        block.experts, block.top_k, 1, cluster.gpus, block.gated, formats,
    )  # fmt: skip
    less, more = AnalyticCost(cluster, Mapping()).kernel_time_s(kernel).tolist()
    return float((more - less) / (rows[1] - rows[0]))


def _links(cluster: Cluster) -> tuple[Floats, Traffic]:
    """Seconds per byte of the slowest link between any two GPUs, and how transfers share them.

    Ports are shared; links of a mesh or torus are taken as each pair's own.
    """
    links, gpus = topology(cluster), cluster.gpus
    source, target = (side.ravel() for side in np.indices((gpus, gpus)))
    ways = links.ways(source, target) if gpus > 1 else np.full((1, 0), NO_LINK)
    seconds = np.append(1.0 / links.bytes_per_s, 0.0)  # the last for NO_LINK, -1
    slowest = seconds[ways].max(axis=1, initial=0.0).reshape(gpus, gpus)
    direct = cluster.intra is not None and cluster.intra.kind in ("mesh", "torus")
    return slowest, "pairs" if direct else "ports"
