"""Which links join the replicas of a plan to the host memory and the disks that keep their KV?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from hwmodels.hardware import Cluster
from hwmodels.interconnect import Interconnect
from hwmodels.shape import ModelShape
from planner.placing import placed
from planner.plan import Plan, Pool
from simulator.deployment import ReplicaSpec
from simulator.kvtiers import HBM
from simulator.reuse import Tiering
from simulator.transfers import KvSide, Route, store_route

#: Names of tiers, nearest first.
HOST, SSD = "host", "ssd"


def capacities(pool: Pool) -> dict[str, float]:
    """Bytes of KV that each tier of one of the pool's replicas holds, nearest first."""
    given = {HOST: pool.host_kv_gb, SSD: pool.ssd_kv_gb}
    return {name: 1e9 * gigabytes for name, gigabytes in given.items() if gigabytes is not None}


def tiering_of(
    plan: Plan, specs: list[ReplicaSpec], model: ModelShape, clusters: Mapping[str, Cluster]
) -> Tiering | None:
    """The tiers of the plan's replicas, `specs` in the order of its pools; None where no pool has any.

    Every device reaches its node's host memory over its own link (Cluster.host_bytes_per_s), and the disks of a node
    are shared by all that is on it. What the software adds to the links is not counted. Raises PlanError where the
    replicas have no room.
    """
    pools = [pool for pool in plan.serving for _ in range(pool.replicas)]
    held = [capacities(pool) for pool in pools]
    if not any(held):
        return None
    names = list(clusters)
    disks = None if plan.ssd_gb_per_s is None else 1e9 * plan.ssd_gb_per_s
    network = Interconnect([clusters[name] for name in names], ssd_bytes_per_s=disks)
    places = placed(replace(plan, pools=plan.serving), clusters)

    @cache
    def way(replica: int, lane: int, source: str, target: str) -> Route:
        pool, mapping, (name, devices) = pools[replica], specs[replica].mapping, places[replica]
        first = network.firsts[names.index(name)]
        own = tuple(first + device for device in devices)
        side = KvSide(own, mapping, pool.kv, pool.block_tokens, lane % mapping.attention_dp)
        if HBM in (source, target):
            return store_route(network, model, side, source if target == HBM else target, load=target == HBM)
        return _between(network, model, side, up=source == SSD)

    return Tiering(network.bytes_per_s.tolist(), network.names, way, held)


def _between(network: Interconnect, model: ModelShape, side: KvSide, *, up: bool) -> Route:
    """Between host memory and disks: what the way to or from the disks has beyond host memory."""
    whole = store_route(network, model, side, SSD, load=up)
    host = set(store_route(network, model, side, HOST, load=up).links)
    rest = {link: share for link, share in zip(whole.links, whole.shares, strict=True) if link not in host}
    limit = min(float(network.bytes_per_s[link]) / share for link, share in rest.items())
    once = store_route(network, model, side, SSD, load=False).bytes_per_token
    return replace(
        whole,
        links=tuple(rest),
        shares=tuple(rest.values()),
        bytes_per_token=once,
        bottleneck_bytes_per_s=limit,
        limit_bytes_per_s=limit,
    )
