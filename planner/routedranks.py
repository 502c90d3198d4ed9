"""Which part of every expert's tokens does each rank of a replica compute, and how busy is the busiest one?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.routing import RoutingStats
from planner.errors import PlanError

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMap:
    """The expert in every slot of every mixture layer.

    slots      mixture layers x slots, as many on every rank and numbered rank by rank
    experts    of a layer
    """

    slots: Indices
    experts: int

    def split(self, ranks: int) -> Floats:
        """Layers x experts x ranks: part of an expert's tokens on each rank; its copies take as many, as in engines."""
        layers, slots = self.slots.shape
        copies = np.zeros((layers, self.experts, ranks))
        np.add.at(copies, (np.arange(layers)[:, None], self.slots, np.arange(slots) * ranks // slots), 1.0)
        return np.asarray(copies / copies.sum(axis=2, keepdims=True))


def in_order(layers: int, experts: int, redundant: int = 0) -> ExpertMap:
    """Experts as engines load them: slot j has expert j mod experts.

    >>> in_order(1, 4, 2).slots.tolist()
    [[0, 1, 2, 3, 0, 1]]
    """
    return ExpertMap(np.tile(np.arange(experts + redundant) % experts, (layers, 1)), experts)


def checked_map(rows: Sequence[Sequence[int]] | Indices, experts: int, layers: Sequence[int], what: str) -> ExpertMap:
    """The map of these rows, one for each of the model's mixture `layers`.

    Raises PlanError, its text starting with `what`, for other numbers of rows, rows of unequal length, what is no
    expert's number, and experts that are in no slot.
    """
    if len(rows) != len(layers):
        raise PlanError(f"{what}: {len(rows)} layers; expected the {len(layers)} mixture layers of the model")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise PlanError(f"{what}: {min(lengths)} to {max(lengths)} slots a layer; expected as many in each")
    for layer, row in zip(layers, rows, strict=True):
        for slot, expert in enumerate(row):
            if isinstance(expert, bool) or not isinstance(expert, int | np.integer) or not 0 <= expert < experts:
                raise PlanError(
                    f"{what}: layer {layer}, slot {slot} has {str(expert)[:40]}; expected an expert from 0 to "
                    f"{experts - 1}"
                )
        missing = sorted(set(range(experts)) - {int(expert) for expert in row})
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise PlanError(
                f"{what}: layer {layer} has no slot for expert {missing[0]}{others}; expected each of the {experts} "
                "in one at least"
            )
    return ExpertMap(np.asarray(rows, dtype=np.intp), experts)


def require_slots(found: ExpertMap, layers: int, experts: int, redundant: int, what: str) -> None:
    """Raise PlanError unless the map is for so many mixture layers, experts and redundant slots."""
    if found.experts != experts or len(found.slots) != layers:
        raise PlanError(
            f"{what}: {len(found.slots)} layers of {found.experts} experts; expected {layers} layers of {experts}"
        )
    slots = found.slots.shape[1]
    if slots != experts + redundant:
        raise PlanError(
            f"{what}: {slots} slots a layer; expected {experts + redundant} ({experts} experts and redundant_experts "
            f"{redundant}); set redundant_experts to {slots - experts}"
        )


def shares_of_ranks(found: ExpertMap, ranks: int) -> Floats:
    """[layers, ranks, experts] as hwmodels.busiest takes them."""
    return found.split(ranks).transpose(0, 2, 1)


def busiest_over_mean(stats: RoutingStats, found: ExpertMap, ranks: int) -> float:
    """Choices of the busiest rank over the mean of all, averaged over layers."""
    return float(np.einsum("le,leg->lg", stats.shares, found.split(ranks)).max(axis=1).mean() * ranks)


def keeps_groups(found: ExpertMap, ranks: int, groups: int, nodes: Sequence[int]) -> bool:
    """Whether every group of experts side by side is on one node in every layer.

    nodes   of the ranks
    """
    if found.experts % groups:
        return False
    node_of_slot = np.asarray(nodes)[np.arange(found.slots.shape[1]) * ranks // found.slots.shape[1]]
    there = np.zeros((len(found.slots), groups, int(node_of_slot.max()) + 1), dtype=bool)
    there[np.arange(len(found.slots))[:, None], found.slots * groups // found.experts, node_of_slot] = True
    return bool((there.sum(axis=2) == 1).all())
