"""How else may a pool be scheduled, beside its policy and budgets: chunks, groups of layers, orders, overlap."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from hwmodels.overlap import Overlap
from simulator.orders import Order, ranking
from simulator.policies import Policy


@dataclass(frozen=True, slots=True)
class Schedules:
    """What the search varies; by the names of a pool's fields (planner.plan.Pool).

    chunk_tokens   with policy chunked, where they are below the budget; None: what decodes leave of it
    group_tokens   with policy layered
    orders         of the queue; static batches take requests as they come
    """

    chunk_tokens: tuple[int | None, ...] = (None,)
    group_tokens: tuple[int, ...] = (512,)
    orders: tuple[Order, ...] = ("fcfs",)
    ageing_tokens_per_s: float = 0.0
    deadlines_s: tuple[float, ...] = ()
    overlaps: tuple[Overlap, ...] = ("none",)

    def __post_init__(self) -> None:
        """Raise SchedulerError for an order without what it needs."""
        for order in self.orders:
            ranking(order, self.ageing_tokens_per_s, self.deadlines_s)

    def of(self, policy: Policy, budget: int, *, alone: bool = False) -> list[dict[str, Any]]:
        """Fields of pools with this policy and budget that are not at their defaults, one way each.

        alone   whether a stage is one rank, which has no collectives to overlap

        >>> Schedules(chunk_tokens=(None, 256, 4096), orders=("fcfs", "shortest")).of("chunked", 512)[1:3]
        [{'order': 'shortest'}, {'chunk_tokens': 256}]
        """
        chunks = [c for c in self.chunk_tokens if c is None or c < budget] if policy == "chunked" else [None]
        groups = self.group_tokens if policy == "layered" else (512,)
        orders = self.orders if policy != "static" else ("fcfs",)
        overlaps = ("none",) if alone else self.overlaps
        ways = []
        for chunk, group, order, overlap in product(chunks or [None], groups, orders, overlaps):
            way: dict[str, Any] = {"chunk_tokens": chunk, "group_tokens": group, "order": order, "overlap": overlap}
            if order == "shortest":
                way["ageing_tokens_per_s"] = self.ageing_tokens_per_s
            if order == "deadline":
                way["deadlines_s"] = self.deadlines_s
            ways.append({name: value for name, value in way.items() if value != DEFAULTS[name]})
        return ways


DEFAULTS = {"chunk_tokens": None, "group_tokens": 512, "order": "fcfs", "overlap": "none",
            "ageing_tokens_per_s": 0.0, "deadlines_s": ()}  # fmt: skip
