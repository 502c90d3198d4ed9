"""How busy is the busiest expert rank of every pool of a plan, against experts in order?"""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.routing import RoutingStats
from planner.catalogue import Catalogue, mapping_of
from planner.plan import Plan
from planner.routedranks import ExpertMap, busiest_over_mean, in_order

#: The busiest rank over the mean up to which a map is even, and above which it is not.
EVEN, UNEVEN = 1.05, 1.2


@dataclass(frozen=True, slots=True)
class Balance:
    """Where the experts of a pool sit, and the choices of its busiest expert rank over the mean of all ranks.

    pool          its number in the plan
    how           'placed' by the routing, 'map' of the plan, or in 'order'
    expert_map    the pool's map, None without
    ranks, redundant_experts   of the pool
    in_order      with experts in order and none redundant, averaged over the mixture layers
    busiest_over_mean   as the plan has them
    even_for      fewer ranks that a map of the plan suits and for which it may have been made; None where none do
    """

    pool: int
    how: str
    expert_map: str | None
    ranks: int
    redundant_experts: int
    in_order: float
    busiest_over_mean: float
    even_for: int | None = None


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
        even_for = made_for(stats, here, pool.ep) if how == "map" else None
        found.append(Balance(index, how, pool.expert_map, pool.ep, pool.redundant_experts, before, after, even_for))
    return found


def made_for(stats: RoutingStats, found: ExpertMap, ranks: int) -> int | None:
    """Fewer ranks over which a map that is uneven over `ranks` is even; None where it is even, or over none.

    A map made for r ranks evens out their slots and leaves halves of them to chance, so that the busiest rank jumps
    from r to the next number of ranks. Maps that are uneven for another reason, such as other traffic, grow step by
    step.
    """
    counts = [n for n in range(2, ranks + 1) if ranks % n == 0]
    over = [busiest_over_mean(stats, found, n) for n in counts]
    if over[-1] <= UNEVEN:
        return None
    return next(
        (n for n, here, there in zip(counts, over, over[1:], strict=False) if here <= EVEN < UNEVEN < there), None
    )
