"""How do the tokens of a model spread over its experts, layer by layer, and from one layer to the next?

A token picks `top_k` different experts in every layer that is a mixture of experts; one pick is a choice. Statistics
are per choice: the share of an expert is its part of all choices of its layer, a transition the chance that, given a
choice of one expert, a choice of the same token in the next mixture layer (any of its top_k, all alike) is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.errors import ProfileError
from hwmodels.shape import ModelShape

Array = NDArray[np.float64]

#: How far the rows of transitions may be from 1, and a share above one pick per token.
TOLERANCE = 1e-6


class RoutingError(ProfileError):
    """Routing statistics that cannot be used as given."""


@dataclass(frozen=True, slots=True, eq=False)
class RoutingStats:
    """Expert loads of every mixture layer, and, where known, the transitions between consecutive ones.

    model         name of the model
    layers        indices in the model of the mixture layers, first layer 0, ascending; L of them
    loads         [L, E] choices counted for each expert, or shares: only ratios within a row count
    top_k         experts a token picks in a layer
    source        where the numbers come from, for reports
    transitions   [L - 1, E, E] rows of probabilities, [l, a, b]: a token that chose a in layers[l] chooses b in
                  layers[l + 1], per choice; None where only loads are known

    Arrays are kept as read-only float64. Raises RoutingError, naming layer and expert, for a wrong shape, a load not a
    positive finite number, an expert picked more than once per token, rows of transitions that do not sum to 1.
    """

    model: str
    layers: tuple[int, ...]
    loads: Array
    top_k: int
    source: str
    transitions: Array | None = None

    def __post_init__(self) -> None:
        loads = _frozen(self.loads, "loads")
        object.__setattr__(self, "loads", loads)
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        _check_loads(self.layers, loads, self.top_k)
        if self.transitions is not None:
            transitions = _frozen(self.transitions, "transitions")
            object.__setattr__(self, "transitions", transitions)
            _check_transitions(self.layers, loads, transitions)

    @property
    def experts(self) -> int:
        """Experts of a layer, E."""
        return int(self.loads.shape[1])

    @property
    def shares(self) -> Array:
        """[L, E] part of a layer's choices that each expert gets; rows sum to 1."""
        shares: Array = self.loads / self.loads.sum(axis=1, keepdims=True)
        return shares

    @property
    def inclusion(self) -> Array:
        """[L, E] probability that a token picks the expert, top_k times its share; rows sum to top_k."""
        inclusion: Array = np.minimum(self.top_k * self.shares, 1.0)
        return inclusion

    def row(self, layer: int) -> int:
        """Which row of `loads` describes the model's layer `layer`; raises RoutingError for a dense layer."""
        if layer not in self.layers:
            raise RoutingError(
                f"layer {layer}: no routing is known for it; expected one of the mixture layers {span(self.layers)}"
            )
        return self.layers.index(layer)

    def check(self, model: ModelShape) -> None:
        """Raises RoutingError unless the mixture layers, experts and top_k are those of `model`."""
        layers, experts, top_k = mixture_of(model)
        if self.layers != layers:
            dense = [layer for layer in self.layers if layer not in layers]
            if dense:
                kind = f"a dense layer of {model.name}" if dense[0] < len(model.layers) else f"beyond {model.name}"
                raise RoutingError(
                    f"layer {dense[0]}: routing is given, but it is {kind}; "
                    f"expected the mixture layers {span(layers)} only"
                )
            missing = [layer for layer in layers if layer not in self.layers]
            raise RoutingError(
                f"layer {missing[0]}: no routing is given, but it is a mixture layer of {model.name}; "
                f"expected all {len(layers)} of the layers {span(layers)}, not {len(self.layers)}"
            )
        if self.experts != experts:
            raise RoutingError(
                f"{self.experts} experts a layer: expected the {experts} of {model.name}; choose the model recorded"
            )
        if self.top_k != top_k:
            raise RoutingError(f"top_k {self.top_k}: expected the {top_k} experts a token of {model.name} picks")

    def marginal_error(self) -> float:
        """Largest difference between a layer's shares and those the layer before sends it through the transitions.

        0 without transitions or for one layer; measured transitions of a token's real path leave rounding only.
        """
        if self.transitions is None or len(self.layers) < 2:
            return 0.0
        arriving = np.einsum("la,lab->lb", self.shares[:-1], self.transitions)
        return float(np.abs(arriving - self.shares[1:]).max())


def mixture_of(model: ModelShape) -> tuple[tuple[int, ...], int, int]:
    """(mixture layers, experts of each, top_k) of a model; raises RoutingError where it has none or mixes kinds."""
    blocks = {index: layer.feed_forward for index, layer in enumerate(model.layers) if layer.feed_forward.experts}
    kinds = {(block.experts, block.top_k) for block in blocks.values()}
    if not kinds:
        raise RoutingError(f"{model.name} is dense: expected a model with experts; leave the routing out")
    if len(kinds) > 1:
        raise RoutingError(
            f"{model.name} has mixture layers of {len(kinds)} kinds (experts, top_k) {sorted(kinds)}: expected one kind"
        )
    experts, top_k = kinds.pop()
    return tuple(blocks), experts, top_k


def uniform(model: ModelShape) -> RoutingStats:
    """Every expert as popular as the others, transitions unknown."""
    layers, experts, top_k = mixture_of(model)
    return RoutingStats(model.name, layers, np.full((len(layers), experts), 1.0 / experts), top_k, "uniform routing")


def mixed(parts: Sequence[RoutingStats], weights: Sequence[float], source: str) -> RoutingStats:
    """Statistics of traffic that is made of `parts` (traffic classes or time windows), `weights` of the tokens each.

    Transitions are those of the mixture, sum w * share(a) * T(a, b) / sum w * share(a); None where a part has none.
    Raises RoutingError for parts of different models and for weights that are not positive.
    """
    first = parts[0] if parts else None
    if first is None or len(parts) != len(weights):
        raise RoutingError(f"{len(weights)} weights for {len(parts)} parts: expected one positive weight each")
    for part in parts:
        if (part.layers, part.loads.shape, part.top_k) != (first.layers, first.loads.shape, first.top_k):
            raise RoutingError(f"{part.source}: expected the layers, experts and top_k of {first.source}")
    if not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise RoutingError(f"weights {list(weights)}: expected positive numbers, one for each part")
    portions = np.asarray(weights, dtype=float) / float(sum(weights))
    loads = sum((w * part.shares for w, part in zip(portions, parts, strict=True)), np.zeros_like(first.loads))
    paths = [part.transitions for part in parts]
    transitions = None
    if all(path is not None for path in paths):
        flow = sum(
            w * part.shares[:-1, :, None] * path
            for w, part, path in zip(portions, parts, paths, strict=True)
            if path is not None
        )
        transitions = np.asarray(flow) / np.asarray(flow).sum(axis=2, keepdims=True)
    return replace(first, loads=loads, transitions=transitions, source=source)


def rank_shares(shares: Array, placement: Sequence[Sequence[int]], ranks: int) -> Array:
    """[ranks, E] part of an expert's tokens that each rank computes: 1/r on each of its r replicas' ranks.

    shares      [E] of one layer; only its length counts
    placement   for every expert the ranks that hold it (a rank may come twice: two replicas of it there)

    Raises RoutingError for an expert nowhere and a rank that is not there.

    >>> rank_shares(np.array([0.5, 0.5]), [[0], [0, 1]], 2).tolist()
    [[1.0, 0.5], [0.0, 0.5]]
    """
    if len(placement) != len(shares):
        raise RoutingError(f"{len(placement)} experts placed: expected all {len(shares)} of the layer")
    out = np.zeros((ranks, len(shares)))
    for expert, holders in enumerate(placement):
        if not len(holders):
            raise RoutingError(f"expert {expert}: it is on no rank; expected at least one of {ranks}")
        for rank in holders:
            if not 0 <= rank < ranks:
                raise RoutingError(f"expert {expert}: rank {rank} is not there; expected 0 to {ranks - 1}")
            out[rank, expert] += 1.0 / len(holders)
    return out


def span(layers: Sequence[int]) -> str:
    """Layer indices in short.

    >>> span((3, 4, 5, 8))
    '3-5, 8'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _frozen(values: ArrayLike, what: str) -> Array:
    """A read-only float64 copy."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise RoutingError(f"{what}: expected a full table of numbers, one row for each layer") from None
    array.setflags(write=False)
    return array


def _check_loads(layers: tuple[int, ...], loads: Array, top_k: int) -> None:
    if loads.ndim != 2 or len(loads) != len(layers) or not loads.size:
        raise RoutingError(
            f"loads of shape {loads.shape}: expected ({len(layers)} mixture layers, experts), one row for each layer"
        )
    if list(layers) != sorted(set(layers)) or layers[0] < 0:
        raise RoutingError(f"layers {list(layers)}: expected ascending indices from 0, each once")
    if not 1 <= top_k <= loads.shape[1]:
        raise RoutingError(f"top_k {top_k}: expected 1 to the {loads.shape[1]} experts of a layer")
    bad = np.argwhere(~(np.isfinite(loads) & (loads > 0)))
    if len(bad):
        row, expert = (int(i) for i in bad[0])
        more = f" ({len(bad) - 1} more such)" if len(bad) > 1 else ""
        raise RoutingError(
            f"layer {layers[row]}, expert {expert}: load {loads[row, expert]:g}{more}: expected a number above 0; "
            "record more traffic, or add one to every count"
        )
    picks = top_k * loads / loads.sum(axis=1, keepdims=True)
    row, expert = (int(i) for i in np.unravel_index(int(picks.argmax()), picks.shape))
    if picks[row, expert] > 1 + TOLERANCE:
        raise RoutingError(
            f"layer {layers[row]}, expert {expert}: picked {picks[row, expert]:.3g} times per token at top_k {top_k}: "
            "expected at most once, as a token's experts differ; check top_k"
        )


def _check_transitions(layers: tuple[int, ...], loads: Array, transitions: Array) -> None:
    expected = (len(layers) - 1, loads.shape[1], loads.shape[1])
    if transitions.shape != expected:
        raise RoutingError(f"transitions of shape {transitions.shape}: expected {expected}: (layers - 1, from, to)")
    bad = np.argwhere(~(np.isfinite(transitions) & (transitions >= 0)))
    if len(bad):
        row, one, two = (int(i) for i in bad[0])
        raise RoutingError(
            f"layer {layers[row]}, expert {one}: transition {transitions[row, one, two]:g} to expert {two} of layer "
            f"{layers[row + 1]}: expected a probability"
        )
    off = np.abs(transitions.sum(axis=2) - 1)
    if off.size and off.max() > TOLERANCE:
        row, one = (int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
        raise RoutingError(
            f"layer {layers[row]}, expert {one}: transitions sum to {transitions[row, one].sum():.6g}: expected 1"
        )
