"""Which devices does each replica of a plan get?"""

from __future__ import annotations

from collections.abc import Mapping

from hwmodels.hardware import Cluster
from planner.errors import PlanError
from planner.plan import Plan


def placed(plan: Plan, clusters: Mapping[str, Cluster]) -> list[tuple[str, tuple[int, ...]]]:
    """Hardware and device numbers of every replica, pool by pool.

    Replicas larger than a node get whole nodes, smaller ones never straddle two; the largest are placed first, each in
    the first node with room. Raises PlanError where they do not fit like that.
    """
    wanted = [(plan.hardware_of(pool), pool.gpus_per_replica) for pool in plan.pools for _ in range(pool.replicas)]
    free = {
        name: [
            list(range(first, min(first + cluster.gpus_per_node, cluster.gpus)))
            for first in range(0, cluster.gpus, cluster.gpus_per_node)
        ]
        for name, cluster in clusters.items()
    }
    found: dict[int, tuple[int, ...]] = {}
    for position in sorted(range(len(wanted)), key=lambda i: -wanted[i][1]):
        name, gpus = wanted[position]
        size, nodes = clusters[name].gpus_per_node, free[name]
        if gpus > size:
            whole = [node for node in nodes if len(node) == size][: -(-gpus // size)]
            devices = [device for node in whole for device in node]
            if len(devices) < gpus:
                raise _crowded(plan, name, gpus)
            for node in whole:
                node.clear()
            found[position] = tuple(devices[:gpus])
            continue
        room = next((node for node in nodes if len(node) >= gpus), None)
        if room is None:
            raise _crowded(plan, name, gpus)
        found[position] = tuple(room[:gpus])
        del room[:gpus]
    return [(wanted[position][0], found[position]) for position in range(len(wanted))]


def _crowded(plan: Plan, name: str, gpus: int) -> PlanError:
    return PlanError(
        f"a replica of {gpus} devices finds no room in the nodes of {name} ({plan.devices[name]} devices) beside the "
        "others; expected replicas that fill nodes, or none across two"
    )
