"""How the KV of a plan's requests gets from its prefill to its decode pools."""

from __future__ import annotations

from collections.abc import Mapping

from hwmodels.hardware import Cluster
from hwmodels.interconnect import Interconnect
from hwmodels.shape import ModelShape
from planner.placing import placed
from planner.plan import Plan
from simulator.deployment import ReplicaSpec
from simulator.handover import Handover
from simulator.transfers import MOONCAKE_SGLANG, MOONCAKE_VLLM, KvSide, Route, Routes, TransferEngine, TransferError

#: What the software adds to the links, by the engine whose kernels are used; fitted to vLLM where nothing is published.
SOFTWARE: Mapping[str, TransferEngine] = {"sglang": MOONCAKE_SGLANG}


def handover_of(
    plan: Plan,
    specs: list[ReplicaSpec],
    model: ModelShape,
    clusters: Mapping[str, Cluster],
    kernels: str,
) -> Handover:
    """The links between the plan's replicas, `specs` in the order of its pools.

    Raises PlanError where the replicas have no room, TransferError where two pools cannot exchange KV.
    """
    _check_alike(plan)
    names = list(clusters)
    network = Interconnect([clusters[name] for name in names])
    pools = [pool for pool in plan.pools for _ in range(pool.replicas)]
    sides: list[KvSide] = []
    places: dict[tuple[int, int], int] = {}
    for index, (pool, spec, (name, devices)) in enumerate(zip(pools, specs, placed(plan, clusters), strict=True)):
        first = network.firsts[names.index(name)]
        own = tuple(first + device for device in devices)
        for lane in range(spec.lanes):
            places[index, lane] = len(sides)
            group = lane % spec.mapping.attention_dp
            sides.append(KvSide(own, spec.mapping, pool.kv, pool.block_tokens, group))
    routes = Routes(network, model, sides, SOFTWARE.get(kernels, MOONCAKE_VLLM))

    def route(source: int, source_lane: int, target: int, lane: int) -> Route:
        return routes.between(places[source, source_lane], places[target, lane])

    firsts = {id(pool): index for index, pool in reversed(list(enumerate(pools)))}
    sources = [firsts[id(pool)] for pool in plan.pools if pool.role in ("prefill", "mixed") and pool.replicas]
    targets = [firsts[id(pool)] for pool in plan.pools if pool.role in ("decode", "mixed") and pool.replicas]
    for source in sources:
        for target in targets:
            if source != target:
                route(source, 0, target, 0)
    return Handover(network.bytes_per_s.tolist(), network.names, route, len(model.layers), plan.transfer)


def _check_alike(plan: Plan) -> None:
    """Raise TransferError, naming the two pools, where one could not read the KV of another that it is to get."""
    for first, source in enumerate(plan.pools):
        for second, target in enumerate(plan.pools):
            if first == second or source.role not in ("prefill", "mixed") or target.role not in ("decode", "mixed"):
                continue
            if source.kv != target.kv:
                raise TransferError(
                    f"pools[{first}] keeps KV in {source.kv} and pools[{second}] in {target.kv}: expected one format; "
                    "give both the same kv"
                )
            if source.block_tokens != target.block_tokens:
                raise TransferError(
                    f"pools[{first}] has KV blocks of {source.block_tokens} tokens and pools[{second}] of "
                    f"{target.block_tokens}: expected one size; give both the same block_tokens"
                )
