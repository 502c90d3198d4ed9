"""How long do operators take when recorded routing, not chance alone, makes the busiest rank what it is?

Ranks meet after every layer of experts, so the busiest one sets the time. Operators are cut for uniform routing, where
only chance tells ranks apart; here they get the rows and touched experts that the recorded popularity of experts and
the ranks they sit on lead to (hwmodels.busiest), the mean over the mixture layers. Exchanges carry each rank's share.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hwmodels.busiest import BusiestRank
from hwmodels.operators import Array, Communication, ExpertExchange, Experts, Operator
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import CostModel

#: Layers whose shares stand for all in exchanges.
LAYERS = 8


class RoutedCost:
    """Prices operators as `inner` does, those of the experts for the busiest rank of recorded routing.

    Measured kernels were timed under a routing of their own, whatever the operator says: their price is scaled by what
    the analytic model tells of the two.

    whole_groups   whether the nodes hold whole groups of experts, so that a model's limit on the groups of a token
                   limits its nodes
    """

    def __init__(self, inner: CostModel, busiest: BusiestRank, *, whole_groups: bool = True) -> None:
        self.inner = inner
        self.busiest = busiest.average
        self.shares = typical_layers(busiest.shares)
        self.whole_groups = whole_groups

    def routed(self, op: Operator) -> Operator:
        """The operator for the busiest rank: rows, touched experts, and bytes that go with the rows."""
        if isinstance(op, Experts):
            rows, touched = (values[0] for values in self.busiest.at(op.tokens))
            return replace(op, rows=rows, active=np.minimum(touched, rows))
        if isinstance(op, ExpertExchange):
            return replace(op, shares=self.shares, max_nodes=op.max_nodes if self.whole_groups else None)
        if isinstance(op, Communication) and op.experts is not None:
            experts = self.routed(op.experts)
            assert isinstance(experts, Experts)
            was = op.experts.rows
            return replace(op, bytes=op.bytes * np.where(was > 0, experts.rows / np.maximum(was, 1e-300), 1.0))
        return op

    def time_s(self, op: Operator) -> Array:
        """Seconds of all launches of the operator on the busiest rank."""
        scale = self._scale(op)
        return self.inner.time_s(self.routed(op)) if scale is None else self.inner.time_s(op) * scale

    def sources(self, op: Operator) -> dict[str, float]:
        """The same seconds by what they rest on; measured ones that were scaled count as extended."""
        if self._scale(op) is None:
            return self.inner.sources(self.routed(op))
        return {"extended": float(np.sum(self.time_s(op)))}

    def _scale(self, op: Operator) -> Array | None:
        """What a measured price is scaled by; None where `inner` goes by the operator's own rows."""
        if not isinstance(op, Experts) or isinstance(self.inner, AnalyticCost):
            return None
        from hwmodels.kernels.expert_routing import load
        from hwmodels.kernels.measured import ROUTING, MeasuredCost  # there already where prices are measured

        if not isinstance(self.inner, MeasuredCost) or self.inner.estimate(op) is None:
            return None
        timed = load(np.maximum(op.tokens, 1.0), op.experts, op.top_k, op.ep, ROUTING)
        was = self.inner.analytic.time_s(replace(op, rows=timed.rows, active=timed.touched))
        now = self.inner.analytic.time_s(self.routed(op))
        scale: Array = np.divide(now, was, out=np.ones_like(now), where=was > 0)
        return scale


def typical_layers(shares: Array) -> Array:
    """[layers, ranks] at most LAYERS of them, those at even distances in the order of their busiest ranks.

    >>> typical_layers(np.array([[0.5, 0.5], [0.9, 0.1]])).tolist()
    [[0.5, 0.5], [0.9, 0.1]]
    """
    order = shares.max(axis=1).argsort(kind="stable")
    picked = ((np.arange(LAYERS) + 0.5) * len(order) / LAYERS).astype(int) if len(order) > LAYERS else slice(None)
    typical: Array = shares[order[picked]]
    return typical
