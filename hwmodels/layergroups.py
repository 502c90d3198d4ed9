"""How long is a step whose prompts pass through one group of layers while its decodes pass through all of them?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from hwmodels.shape import Layer

if TYPE_CHECKING:
    from hwmodels.step_model import Batch, Tables


class LayerGroups:
    """What prompts add to a step of decodes in some of the layers, from tables of one layer of each kind.

    layers      of the stage, in order
    tables      of one layer like the given one
    embedding   tables of the embedding alone

    Groups of n layers in G parts are those of an even cut, the first n mod G with a layer more (numpy's array_split).
    """

    __slots__ = ("_counts", "_cuts", "_embedding", "_layers")

    def __init__(self, layers: Sequence[Layer], tables: Callable[[Layer], Tables], embedding: Tables) -> None:
        self._layers = len(layers)
        self._embedding = embedding
        kinds = dict.fromkeys(layers)
        self._counts = [(tables(kind), [0, *accumulate(layer == kind for layer in layers)]) for kind in kinds]
        self._cuts: dict[tuple[int, int], tuple[int, int]] = {}

    def added_s(self, batch: Batch, group: int, groups: int) -> float:
        """Seconds that the batch's prompts add in the group, beside its decodes; sampling and host work not included.

        >>> from hwmodels.step_model import Pieces, Tables
        >>> none = Pieces((), ([0.0, 0.0, 0.0, 0.0],), ([0.0, 0.0, 0.0, 0.0],))
        >>> layer = Tables([0.0, 1.0, 1.5, 2.0], [0.0], [0.0], none, none)
        >>> free = Tables([0.0] * 4, [0.0], [0.0], none, none)
        >>> both = LayerGroups(["a", "a", "a"], lambda kind: layer, free)
        >>> [both.added_s((1, 9, [(2, 0)]), group, 2) for group in (0, 1)]  # 2 layers, 1 layer: from 1.0 to 2.0 each
        [2.0, 1.0]
        """
        sequences, _, items = batch
        tokens = sequences + sum(new for new, _ in items)
        start, end = self._cut(group, groups)
        added = 0.0
        for tables, passed in self._counts:
            count = passed[end] - passed[start]
            if count:
                one = tables.linear[tokens] - tables.linear[sequences]
                for new, before in items:
                    one += tables.prefill.at(new, before)
                added += count * one
        if group == 0:
            added += self._embedding.linear[tokens] - self._embedding.linear[sequences]
        return added

    def _cut(self, group: int, groups: int) -> tuple[int, int]:
        """First layer of the group, and the one behind its last."""
        key = group, groups
        if key not in self._cuts:
            size, more = divmod(self._layers, groups)
            start = group * size + min(group, more)
            self._cuts[key] = start, start + size + (group < more)
        return self._cuts[key]
