"""Which experts, in which precision, stay where there is no room for all?

Experts are numbered layer * experts + expert; levels of precision are numbered from the best (0), a level beyond the
last stands for an expert that is left out. Nothing here has a clock; uses are counted in tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import ShardwiseError

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

#: HOBBIT's T1 and T2 (arXiv:2411.01433): up to T1 full precision, up to T2 the low one, beyond it nothing.
HOBBIT_THRESHOLDS = (0.6, 0.9)


class ExpertCacheError(ShardwiseError):
    """A cache of experts that cannot be as given."""

    exit_code = 4


def levels(weights: Array, thresholds: Sequence[float]) -> Indices:
    """Level of precision of every chosen expert of a token, by its importance; shape as `weights`.

    weights      gate weights of the chosen experts along the last axis, in any order, above 0; normalised here
    thresholds   ascending, one for each precision there is; an expert's unimportance is the share of the weights above
                 its own, and its level the number of thresholds below that. The heaviest expert has 0 and is always
                 at level 0; a last threshold of 1 leaves no expert out.

    HOBBIT (arXiv:2411.01433): thresholds 0.6 and 0.9 for fp16 and int4. Raises ExpertCacheError for thresholds that
    do not ascend in [0, 1].

    >>> levels(np.array([0.62, 0.28, 0.07, 0.03]), (0.6, 0.9)).tolist()  # 0, 0.62, 0.90, 0.97 lie above them
    [0, 1, 1, 2]
    """
    limits = np.asarray(thresholds, dtype=float)
    if not limits.size or limits.min() < 0 or limits.max() > 1 or (np.diff(limits) < 0).any():
        raise ExpertCacheError(f"thresholds {list(thresholds)}: expected one or more that ascend between 0 and 1")
    order = np.argsort(-weights, axis=-1, kind="stable")
    heaviest = np.take_along_axis(weights, order, axis=-1)
    above = np.cumsum(heaviest, axis=-1) - heaviest
    unimportance = above / heaviest.sum(axis=-1, keepdims=True)
    found = np.empty(weights.shape, dtype=np.int64)
    ranked = (unimportance[..., None] > limits + 1e-12).sum(axis=-1)
    np.put_along_axis(found, order, ranked, axis=-1)
    return found


@dataclass(frozen=True, slots=True)
class Records:
    """How every expert was used so far, by number.

    layers         layers with experts
    layer          of each expert
    used, uses     token of the last use (-1: never), and number of uses
    best_uses      uses at level 0
    score          recent gate scores, see ExpertCache.observe
    """

    layers: int
    layer: Indices
    used: Array
    uses: Array
    best_uses: Array
    score: Array


#: What to keep, by (records, candidates' numbers, layer that runs, tokens so far): the least is evicted.
Eviction = Callable[[Records, Indices, int, int], Array]


def lru(records: Records, experts: Indices, layer: int, tokens: int) -> Array:
    """The expert longest unused goes first; within a token, that of the layer that ran first."""
    kept: Array = records.used[experts] + records.layer[experts] / records.layers
    return kept


def lfu(records: Records, experts: Indices, layer: int, tokens: int) -> Array:
    """The expert least often used goes first."""
    kept: Array = records.uses[experts]
    return kept


def mrs(records: Records, experts: Indices, layer: int, tokens: int) -> Array:
    """The expert with the least recent gate score goes first (HybriMoE's cache, arXiv:2504.05897)."""
    kept: Array = records.score[experts]
    return kept


def layer_distance(records: Records, experts: Indices, layer: int) -> Array:
    """HOBBIT's FLD: 1 for the layer that runs, falling by 1 / layers with every layer until an expert's turn."""
    ahead = (records.layer[experts] - layer) % records.layers
    near: Array = 1 - ahead / records.layers
    return near


def weighted(*, lru: float = 0.25, lfu: float = 0.25, lhu: float = 0.25, fld: float = 0.25) -> Eviction:
    """HOBBIT's weighted sum: recency, frequency, frequency at full precision, and nearness of the layer's turn.

    Each lies in [0, 1]. The paper tunes the weights; equal ones are a guess.
    """

    def kept(records: Records, experts: Indices, layer: int, tokens: int) -> Array:
        so_far = max(1, tokens)
        recent = (records.used[experts] + 1) / so_far
        counts = lfu * records.uses[experts] + lhu * records.best_uses[experts]
        total: Array = lru * recent + counts / so_far + fld * layer_distance(records, experts, layer)
        return total

    return kept


EVICTIONS: dict[str, Eviction] = {"lru": lru, "lfu": lfu, "score": mrs, "weighted": weighted()}


class ExpertCache:
    """Experts held in a memory, with rooms of their own for each level of precision.

    layers, experts   layers with experts, experts of each
    rooms             experts it holds at each level
    eviction          which expert of a full level goes first; ties fall to the place that was filled first
    per_layer         every layer has its part of the rooms, the first ones those that are left over; else all share
                      them, which lets LRU lose an expert whenever all layers' uses in between exceed the rooms
    alpha, top        of the score: S <- alpha * TopP(scores) + (1 - alpha) * S, where TopP keeps the `top` largest
                      scores of a layer and makes the others 0 (HybriMoE: 0.5, twice the experts of a token)

    A copy at a better level serves for a worse one. Raises ExpertCacheError for impossible rooms.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        rooms: Sequence[int],
        *,
        eviction: Eviction = lru,
        per_layer: bool = False,
        alpha: float = 0.5,
        top: int = 4,
    ) -> None:
        if not rooms or min(rooms) < 0:
            raise ExpertCacheError(f"rooms {list(rooms)}: expected a number of at least 0 for each level of precision")
        total = layers * experts
        self.experts = experts
        self.rooms = tuple(min(room, total) for room in rooms)
        self.eviction = eviction
        self.alpha, self.top = alpha, min(top, experts)
        self.records = Records(
            layers, np.repeat(np.arange(layers), experts), np.full(total, -1.0), *(np.zeros(total) for _ in range(3))
        )
        self.tokens = 0
        self._per_group = experts if per_layer else total  # experts that share rooms
        groups = total // self._per_group
        self._held: list[dict[int, int]] = [{} for _ in rooms]  # slot by expert
        self._slots = [[_empty(room // groups + (i < room % groups)) for i in range(groups)] for room in self.rooms]
        self._filled = [[0] * groups for _ in rooms]

    def level_of(self, expert: int, wanted: int) -> int | None:
        """The worst level at which the expert is held that is as good as wanted."""
        for level in range(wanted, -1, -1):
            if expert in self._held[level]:
                return level
        return None

    def holds(self, expert: int, level: int) -> bool:
        """Whether the expert is held at just this level."""
        return expert in self._held[level]

    def held(self, level: int) -> list[int]:
        """The experts held at a level, in the order of their places."""
        return [int(expert) for slots in self._slots[level] for expert in slots if expert >= 0]

    def use(self, experts: Indices, wanted: Indices) -> None:
        """Count a use of different experts, each wanted at a level."""
        self.records.used[experts] = self.tokens
        self.records.uses[experts] += 1
        self.records.best_uses[experts] += wanted == 0

    def observe(self, layer: int, scores: Array) -> None:
        """Update the scores of a layer's experts by the gate scores of a step, one for each of its experts."""
        start = layer * self.experts
        kept = scores
        if self.top < self.experts:
            kept = np.where(scores >= np.partition(scores, -self.top)[-self.top], scores, 0.0)
        score = self.records.score[start : start + self.experts]
        score += self.alpha * (kept - score)

    def fill(self, order: Iterable[int]) -> None:
        """Fill all levels with the first experts of an order, without counting uses."""
        for expert in order:
            for level, held in enumerate(self._held):
                if expert not in held and self._room(expert, level):
                    self._put(expert, level, self._filled[level][expert // self._per_group])

    def admit(self, expert: int, level: int, layer: int, keep: Collection[int] = ()) -> bool:
        """Hold an expert at a level while `layer` runs, in place of one that is not to be kept; False without room."""
        held = self._held[level]
        if expert in held:
            return True
        group = expert // self._per_group
        if self._room(expert, level):
            self._put(expert, level, self._filled[level][group])
            return True
        slots = self._slots[level][group]
        if not len(slots):
            return False
        kept = self.eviction(self.records, slots, layer, self.tokens)
        pinned = [held[other] for other in keep if other in held and other // self._per_group == group]
        if pinned:
            kept = kept.copy()
            kept[pinned] = np.inf
        slot = int(kept.argmin())
        if kept[slot] == np.inf:
            return False
        del held[int(slots[slot])]
        self._put(expert, level, slot)
        return True

    def _room(self, expert: int, level: int) -> bool:
        group = expert // self._per_group
        return self._filled[level][group] < len(self._slots[level][group])

    def _put(self, expert: int, level: int, slot: int) -> None:
        group = expert // self._per_group
        self._slots[level][group][slot] = expert
        self._held[level][expert] = slot
        self._filled[level][group] = max(self._filled[level][group], slot + 1)


def _empty(room: int) -> Indices:
    return np.full(room, -1, dtype=np.int64)
