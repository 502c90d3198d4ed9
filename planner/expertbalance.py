"""How busy is the busiest expert rank of every pool of a plan, against experts in order?"""

from __future__ import annotations

from dataclasses import dataclass

from planner.catalogue import Catalogue, mapping_of
from planner.plan import Plan
from planner.routedranks import busiest_over_mean, in_order


@dataclass(frozen=True, slots=True)
class Balance:
    """Where the experts of a pool sit, and the choices of its busiest expert rank over the mean of all ranks.

    pool          its number in the plan
    how           'placed' by the routing, 'map' of the plan, or in 'order'
    expert_map    the pool's map, None without
    ranks, redundant_experts   of the pool
    in_order      with experts in order and none redundant, averaged over the mixture layers
    busiest_over_mean   as the plan has them
    """

    pool: int
    how: str
    expert_map: str | None
    ranks: int
    redundant_experts: int
    in_order: float
    busiest_over_mean: float


def balances(catalogue: Catalogue, plan: Plan) -> list[Balance]:
    """Of every pool with several expert ranks, where routing is recorded or the pool has a map."""
    found = []
    for index, pool in enumerate(plan.pools):
        own, mapping = catalogue.of(pool), mapping_of(pool)
        if pool.ep == 1 or (own.routing is None and pool.expert_map is None):
            continue
        here, stats = own.seating.expert_map(mapping), own.seating.stats
        how = "map" if pool.expert_map is not None else "placed" if own.seating.placed else "order"
        before = busiest_over_mean(stats, in_order(len(stats.layers), stats.experts), pool.ep)
        after = busiest_over_mean(stats, here, pool.ep)
        found.append(Balance(index, how, pool.expert_map, pool.ep, pool.redundant_experts, before, after))
    return found
