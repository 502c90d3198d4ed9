"""How long do routed experts take of which the device holds a part?

Steps are simulated elsewhere, for some numbers of tokens; here what a layer of experts takes longer (or shorter, where
the CPU helps) than one whose experts are all there is added to the price of the operator that stands for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwmodels.errors import MappingError
from hwmodels.operators import Array, Experts, Operator
from hwmodels.step_model import CostModel


@dataclass(frozen=True, slots=True, eq=False)
class OffloadedLayers:
    """One layer's routed experts in steps of some numbers of tokens, on average over layers and steps.

    tokens        of a step, ascending, at least two
    resident_s    with all experts on the device
    layer_s       with a part of them there
    hit_rate      of the experts of a step, those that are there when they are known
    busy_s        by resource (gpu, cpu, link, ssd), seconds it works for the layer; over layer_s the part of the time
    loaded_bytes  over the link of one device
    level_share   [numbers of tokens, formats + 1] of the routed tokens, those computed in each format, then left out
    """

    tokens: Array
    resident_s: Array
    layer_s: Array
    hit_rate: Array
    busy_s: dict[str, Array]
    loaded_bytes: Array
    level_share: Array

    def __post_init__(self) -> None:
        """Raise MappingError for numbers of tokens that do not ascend, or as many other numbers."""
        if len(self.tokens) < 2 or (np.diff(self.tokens) <= 0).any():
            raise MappingError(f"tokens {self.tokens.tolist()}: expected two or more that ascend")
        rows = (self.resident_s, self.layer_s, self.hit_rate, self.loaded_bytes, *self.busy_s.values())
        if any(row.shape != self.tokens.shape for row in rows) or len(self.level_share) != len(self.tokens):
            raise MappingError(f"expected one number for each of {len(self.tokens)} numbers of tokens")

    def extra_s(self, tokens: Array) -> Array:
        """Seconds that a layer takes longer than with all experts there; linear in between, as at the ends beyond."""
        return self.at(self.layer_s - self.resident_s, tokens)

    def at(self, values: Array, tokens: Array) -> Array:
        """`values`, one for each of self.tokens, at other numbers of tokens."""
        found: Array = np.interp(tokens, self.tokens, values)
        return found


class OffloadedCost:
    """Prices operators as `inner` does, and those of the experts for a device that holds a part of them."""

    def __init__(self, inner: CostModel, layers: OffloadedLayers) -> None:
        self.inner = inner
        self.layers = layers

    def time_s(self, op: Operator) -> Array:
        """Seconds of all launches of the operator."""
        seconds = self.inner.time_s(op)
        return np.maximum(seconds + self.extra_s(op), 0.0) if isinstance(op, Experts) else seconds

    def extra_s(self, op: Operator) -> Array:
        """What of it is due to experts that are not there; below 0 where a CPU helps more than that costs."""
        if not isinstance(op, Experts):
            return np.zeros(1)
        return np.where(op.tokens > 0, op.count * self.layers.extra_s(op.tokens), 0.0)

    def sources(self, op: Operator) -> dict[str, float]:
        """The same seconds by what they rest on; what is simulated counts as analytic."""
        found = self.inner.sources(op)
        total, before = float(np.sum(self.time_s(op))), sum(found.values())
        if total < before:
            return {name: value * total / before for name, value in found.items()}
        return {**found, "analytic": found.get("analytic", 0.0) + total - before}

    def bound(self, op: Operator) -> str | None:
        """What experts wait for if that is not the device: 'host link', 'host CPU' or 'SSD'; None if it is."""
        if not isinstance(op, Experts) or float(np.sum(self.extra_s(op))) <= 0:
            return None
        busy = {name: float(np.sum(self.layers.at(row, op.tokens))) for name, row in self.layers.busy_s.items()}
        return {"link": "host link", "cpu": "host CPU", "ssd": "SSD"}.get(max(busy, key=lambda name: busy[name]))
