"""Which experts are to be placed on which GPUs, and what does it cost to have them apart or together?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import PlanError

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Bools = NDArray[np.bool_]
Traffic = Literal["ports", "pairs", "total"]
Split = Literal["even", "balanced"]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Experts to place, and what it costs to have them apart or together.

    loads               layers x experts; shares or counts, read row by row, not negative, each row with a positive sum
    transitions         (layers - 1) x experts x experts, rows sum to 1 (0 for an expert that is never chosen), or None
                        where nothing is known of them: then there is no traffic term
    gpus                ranks that hold experts
    slots               experts that a GPU can hold per layer: one number, or one for each GPU
    replicas            extra copies per layer at most; copies of an expert sit on different GPUs
    seconds_per_token   compute of one expert choice on the busiest rank, s
    seconds_per_byte    gpus x gpus (or one number) from row to column, finite; the diagonal is not read
    bytes_per_token     bytes of hidden state that one choice moves
    tokens              expert choices per step and layer: tokens x top_k
    nodes               node of each GPU; None: all in one. Tells NVLink ports from network ports, and EPLB its groups
    traffic             how dispatch is priced; see planner.placementprice
    split               tokens of copies: "even", or "balanced": the split with the least busiest GPU, a linear program

    Raises PlanError for shapes that disagree, negative or empty loads, rows that do not sum to 1, slots that cannot
    hold all experts, replicas beyond the slots, and ranks that cannot be reached.
    """

    loads: Floats
    transitions: Floats | None
    gpus: int
    slots: int | Sequence[int]
    replicas: int = 0
    seconds_per_token: float = 1.0
    seconds_per_byte: ArrayLike = 0.0
    bytes_per_token: float = 1.0
    tokens: float = 1.0
    nodes: Sequence[int] | None = None
    traffic: Traffic = "ports"
    split: Split = "even"
    #: layers x experts: loads divided by their row's sum.
    shares: Floats = field(init=False)
    #: (layers - 1) x experts x experts: share of choices that go from e to f; None without transitions.
    joint: Floats | None = field(init=False)
    #: Slots of every GPU.
    slots_of: Indices = field(init=False)
    #: Node of every GPU.
    node_of: Indices = field(init=False)
    #: gpus x gpus, diagonal 0: seconds if all choices of a layer moved over that pair.
    link_s: Floats = field(init=False)
    #: Seconds of compute if all choices of a layer were on one GPU.
    compute_s: float = field(init=False)

    def __post_init__(self) -> None:
        """Check, and derive what the evaluation needs."""
        loads = np.asarray(self.loads, dtype=np.float64)
        _checked_loads(loads)
        layers, experts = loads.shape
        put = object.__setattr__
        put(self, "loads", loads)
        put(self, "shares", loads / loads.sum(axis=1, keepdims=True))
        put(self, "joint", None)
        if self.transitions is not None:
            transitions = np.asarray(self.transitions, dtype=np.float64)
            _checked_transitions(transitions, layers, experts)
            put(self, "transitions", transitions)
            put(self, "joint", self.shares[:-1, :, None] * transitions)
        if self.gpus < 1:
            raise PlanError(f"gpus = {self.gpus}; expected at least 1 rank to hold the experts")
        put(self, "slots_of", _checked_slots(self.slots, self.gpus, experts, self.replicas))
        nodes = np.zeros(self.gpus) if self.nodes is None else np.asarray(self.nodes)
        if nodes.shape != (self.gpus,):
            raise PlanError(f"nodes of {nodes.size} GPUs; expected one node for each of the {self.gpus} GPUs")
        put(self, "node_of", nodes.astype(np.intp))
        for name in ("seconds_per_token", "bytes_per_token", "tokens"):
            value = getattr(self, name)
            if not 0 <= value < inf:
                raise PlanError(f"{name} = {value}; expected a finite number that is not negative")
        if self.traffic not in ("ports", "pairs", "total"):
            raise PlanError(f"traffic {self.traffic!r}; expected ports, pairs or total")
        if self.split not in ("even", "balanced"):
            raise PlanError(f"split {self.split!r}; expected even or balanced")
        put(self, "link_s", self.tokens * self.bytes_per_token * _checked_links(self.seconds_per_byte, self.gpus))
        put(self, "compute_s", float(self.tokens * self.seconds_per_token))

    @property
    def layers(self) -> int:
        """MoE layers."""
        return int(self.loads.shape[0])

    @property
    def experts(self) -> int:
        """Routed experts per layer."""
        return int(self.loads.shape[1])


def _checked_loads(loads: Floats) -> None:
    if loads.ndim != 2 or not loads.size:
        raise PlanError(f"loads of shape {loads.shape}; expected MoE layers x experts")
    if not np.isfinite(loads).all() or loads.min() < 0:
        layer, expert = np.argwhere(~(np.isfinite(loads) & (loads >= 0)))[0]
        raise PlanError(
            f"load {loads[layer, expert]} of expert {expert} in layer {layer}; expected a count or share that is not "
            "negative"
        )
    if not loads.sum(axis=1).all():
        layer = int(np.flatnonzero(loads.sum(axis=1) == 0)[0])
        raise PlanError(f"layer {layer} has no load at all; expected MoE layers only (leave dense layers out)")


def _checked_transitions(transitions: Floats, layers: int, experts: int) -> None:
    expected = (layers - 1, experts, experts)
    if transitions.shape != expected:
        raise PlanError(f"transitions of shape {transitions.shape}; expected {expected} for loads {(layers, experts)}")
    sums = transitions.sum(axis=2)
    wrong = ~(np.isclose(sums, 1.0, atol=1e-6) | (sums == 0)) | (transitions < 0).any(axis=2)
    if wrong.any():
        layer, expert = np.argwhere(wrong)[0]
        raise PlanError(
            f"transitions of expert {expert} in layer {layer} sum to {sums[layer, expert]:.6g}; expected probabilities "
            "that sum to 1, or 0 for an expert that is never chosen"
        )


def _checked_slots(slots: int | Sequence[int], gpus: int, experts: int, replicas: int) -> Indices:
    given = np.full(gpus, slots) if np.ndim(slots) == 0 else np.asarray(slots)
    if given.shape != (gpus,):
        raise PlanError(f"slots of {given.size} GPUs; expected one number, or one for each of the {gpus} GPUs")
    if given.min() < 0:
        raise PlanError(f"{given.min()} slots on a GPU; expected a number that is not negative")
    useful = int(np.minimum(given, experts).sum())
    if useful < experts:
        raise PlanError(
            f"{useful} slots on {gpus} GPUs cannot hold {experts} experts: {experts - useful} slots are missing; "
            f"expected at least {-(-experts // gpus)} slots per GPU"
        )
    if replicas < 0:
        raise PlanError(f"replicas = {replicas}; expected a number that is not negative")
    if experts + replicas > useful:
        raise PlanError(
            f"{replicas} replicas beyond the {useful - experts} slots that {experts} experts leave on {gpus} GPUs; "
            f"expected fewer replicas or {-(-(experts + replicas) // gpus)} slots per GPU"
        )
    return given.astype(np.intp)


def _checked_links(seconds_per_byte: ArrayLike, gpus: int) -> Floats:
    given = np.asarray(seconds_per_byte, dtype=np.float64)
    if given.ndim and given.shape != (gpus, gpus):
        raise PlanError(f"seconds_per_byte of shape {given.shape}; expected one number or {(gpus, gpus)}")
    links = np.array(np.broadcast_to(given, (gpus, gpus)))
    np.fill_diagonal(links, 0.0)
    if not np.isfinite(links).all():
        source, target = np.argwhere(~np.isfinite(links))[0]
        raise PlanError(f"rank {target} cannot be reached from rank {source}; expected a link between all ranks")
    if links.min() < 0:
        source, target = np.argwhere(links < 0)[0]
        raise PlanError(f"{links[source, target]} s/byte from rank {source} to {target}; expected none below 0")
    return links
