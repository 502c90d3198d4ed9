"""Where do the experts of a replica sit: as its plan's map says, where the recorded routing suits, or in order?

From that follows how busy its busiest expert rank is, and so what its operators cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hwmodels.busiest import BusiestRank, busiest_rank
from hwmodels.hardware import Cluster
from hwmodels.mapping import Mapping as Cut
from hwmodels.mapping import Precision
from hwmodels.operators import expert_feed_forward
from hwmodels.routedcost import RoutedCost
from hwmodels.routing import RoutingStats, uniform
from hwmodels.shape import FeedForward, ModelShape
from hwmodels.step_model import CostModel
from planner.errors import PlanError
from planner.routedranks import ExpertMap, in_order, keeps_groups, require_slots, shares_of_ranks

if TYPE_CHECKING:
    from planner.placedexperts import Placements

#: Tokens of a rank in the steps that two placements of experts are compared by: decode and prefill.
BLOCK_TOKENS = (64.0, 2048.0)


class Seating:
    """Experts of all replicas of a model on a cluster; what is made for one is kept for those alike.

    routing   recorded; None for uniform routing
    placed    whether experts of replicas without a map sit where it suits the recorded routing, or in order
    maps      by the names that pools have for them
    plain     prices of a replica under uniform routing, every rank as busy as chance makes it
    """

    def __init__(
        self,
        model: ModelShape,
        cluster: Cluster,
        routing: RoutingStats | None,
        placed: bool,
        maps: Mapping[str, ExpertMap],
        plain: Callable[[Cut], CostModel],
    ) -> None:
        """Raise RoutingError for routing of another model."""
        if routing is not None:
            routing.check(model)
        self.model = model
        self.cluster = cluster
        self.routing = routing
        self.placed = placed and routing is not None
        self.maps = maps
        self._plain = plain
        self._busiest: dict[tuple[ExpertMap, int], BusiestRank] = {}
        self._ordered: dict[int, ExpertMap] = {}

    @cached_property
    def stats(self) -> RoutingStats:
        """The recorded routing, or uniform routing; raises RoutingError where the model has no one kind of experts."""
        return self.routing if self.routing is not None else uniform(self.model)

    @cached_property
    def block(self) -> FeedForward:
        """The model's kind of expert block."""
        return self.model.layers[self.stats.layers[0]].feed_forward

    @cached_property
    def _placements(self) -> Placements:
        from planner.placedexperts import Placements  # solvers: not what most questions wait for

        return Placements(self.stats, self.block.groups)

    def prices(self, mapping: Cut) -> RoutedCost | None:
        """What prices the operators of a replica; None where ranks differ by chance alone.

        Raises as expert_map.
        """
        if mapping.ep == 1 or (self.routing is None and mapping.expert_map is None):
            return None
        return self._prices(mapping, self.expert_map(mapping))

    def expert_map(self, mapping: Cut) -> ExpertMap:
        """Which expert is in which slot of a replica with several expert ranks.

        Raises PlanError for a map that is not known or does not have the replica's slots, RoutingError for a model
        without experts or with several kinds of expert blocks.
        """
        stats, redundant = self.stats, mapping.redundant_experts
        if mapping.expert_map is not None:
            if mapping.expert_map not in self.maps:
                raise PlanError(f"expert_map {mapping.expert_map!r}: no such map is known; expected it among the maps")
            found, name = self.maps[mapping.expert_map], f"expert_map {mapping.expert_map!r}"
            require_slots(found, len(stats.layers), stats.experts, redundant, name)
            return found
        if not self.placed:
            if redundant not in self._ordered:
                self._ordered[redundant] = in_order(len(stats.layers), stats.experts, redundant)
            return self._ordered[redundant]
        # Without attention groups nothing is exchanged between ranks, wherever experts sit.
        nodes = self._nodes(mapping) if mapping.token_groups > 1 else (0,) * mapping.ep
        return self._placements.best(mapping.ep, redundant, nodes, lambda found: self.block_s(mapping, found))

    def copies_help(self, mapping: Cut) -> bool:
        """Whether copies of experts can relieve the busiest of the replica's expert ranks, as far as routing is known.

        Where they cannot, they cost memory and weights to read, and no search looks at them.
        """
        return not self.placed or self._placements.copies_help(mapping.ep)

    def block_s(self, mapping: Cut, found: ExpertMap) -> float:
        """Time of an expert block in a small step plus that in a large one, each over its time by plain prices.

        Every rank brings as many tokens, as where each attends for requests of its own.
        """
        tokens, ranks = np.array(BLOCK_TOKENS), mapping.ep * mapping.expert_tp
        even = replace(mapping, tp=1, cp=1, attention_dp=ranks, pp=1, stages=None)
        block = expert_feed_forward(self.model, self.block, tokens, tokens * ranks, even, Precision(), 1)
        plain, routed = self._plain(even), self._prices(even, found)
        usual = sum((plain.time_s(op) for op in block), np.zeros_like(tokens))
        return float((sum((routed.time_s(op) for op in block), np.zeros_like(tokens)) / usual).sum())

    def _prices(self, mapping: Cut, found: ExpertMap) -> RoutedCost:
        """Prices of a replica whose experts sit like this."""
        key = (found, mapping.ep)
        if key not in self._busiest:
            self._busiest[key] = busiest_rank(self.stats, shares_of_ranks(found, mapping.ep))
        whole = keeps_groups(found, mapping.ep, self.block.groups, self._nodes(mapping))
        return RoutedCost(self._plain(mapping), self._busiest[key], whole_groups=whole)

    def _nodes(self, mapping: Cut) -> tuple[int, ...]:
        """Node of each expert rank of a replica that starts on a node of its own."""
        return tuple(rank * mapping.expert_tp // self.cluster.gpus_per_node for rank in range(mapping.ep))
