"""What does overlapping collectives take off the time of a step's operators, priced one by one?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Array, Operator
from hwmodels.overlap import FUSED, Overlap, overlapped_s
from hwmodels.shape import Layer, ModelShape


@dataclass(frozen=True, slots=True)
class Saved:
    """Seconds of a step that its operators' sum has too much (never below 0 for norms), and of how many layers."""

    name: str
    layers: int
    seconds: float


def saved(
    model: ModelShape,
    runs: Sequence[Sequence[Layer]],
    tokens: float,
    mapping: Mapping,
    precision: Precision,
    measure: Callable[[Operator], Array],
    *,
    units: int,
    overlap: Overlap,
) -> list[Saved]:
    """By norms that all-reduces compute, and by two halves whose collectives run beside each other's arithmetic.

    runs      layers that are overlapped as one: all of a stage, or single ones of a group of layers
    tokens    of each attention group
    measure   seconds of an operator
    units     compute units of a device
    """
    batch = np.array([float(tokens)])

    def taken(how: Overlap) -> float:
        return sum(
            float(overlapped_s(model, run, batch, mapping, precision, measure, units=units, overlap=how)[0])
            for run in runs
        )

    if overlap == "none":
        return []
    layers = sum(len(run) for run in runs)
    plain, fused = taken("none"), taken("fused-norm")
    found = [Saved("norms inside the all-reduce", layers * len(FUSED), plain - fused)]
    if overlap == "two-way":
        found.append(Saved("hidden behind the other half", layers, fused - taken("two-way")))
    return [one for one in found if one.seconds > 0]
