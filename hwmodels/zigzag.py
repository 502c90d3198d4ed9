"""How many query-key pairs does each rank attend to when a causal chunk is cut over the ranks of a group?

Position q of a causal prompt sees q + 1 keys, so that equal runs of tokens are unequal work. The zig-zag cuts the chunk
into 2 x cp pieces and gives rank i the pieces i and 2 cp - 1 - i (Llama 3, arXiv:2407.21783, section 3.3.2;
ring-flash-attention): what one of them sees more, the other sees less. Counts telescope, so that they add up to the
whole for any lengths, those that no piece divides included.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.errors import MappingError

Array = NDArray[np.float64]
Layout = Literal["contiguous", "zigzag"]
Passed = Literal["keys", "queries"]

#: Blocks counted at once, which keeps their tables small.
MOST_BLOCKS = 200_000


def pairs_before(queries: ArrayLike, keys: ArrayLike, window_tokens: int | None = None) -> Array:
    """Pairs of the first `queries` positions with the first `keys` positions under a causal mask.

    sum over q < queries of min(q + 1, keys), less what has left the window.

    >>> float(pairs_before(3.0, 2.0))  # 1 + 2 + 2
    5.0
    >>> float(pairs_before(3.0, 3.0, 2))  # 1 + 2 + 2
    5.0
    """
    a, b = np.asarray(queries, dtype=float), np.asarray(keys, dtype=float)

    def causal(a: Array) -> Array:
        m = np.minimum(a, b)
        counted: Array = m * (m + 1) / 2 + (a - m) * b
        return counted

    return causal(a) if window_tokens is None else causal(a) - causal(np.maximum(a - window_tokens, 0.0))


def owned(cp: int, layout: Layout) -> NDArray[np.int64]:
    """[cp, pieces of each]: which of the chunk's equal pieces each rank has.

    Raises MappingError for an unknown layout and for less than one rank.

    >>> owned(2, "zigzag").tolist()
    [[0, 3], [1, 2]]
    """
    if cp < 1:
        raise MappingError(f"cp = {cp}: expected at least 1 rank")
    ranks = np.arange(cp)
    if layout == "contiguous":
        return ranks[:, None]
    if layout == "zigzag":
        return np.stack([ranks, 2 * cp - 1 - ranks], axis=1)
    raise MappingError(f"layout {layout!r}: expected contiguous or zigzag")


def rank_pairs(
    new: ArrayLike, before: ArrayLike, cp: int, layout: Layout = "zigzag", window_tokens: int | None = None
) -> Array:
    """[..., cp]: pairs of each rank's queries with everything they see, `before` cached tokens included."""
    new, before = np.broadcast_arrays(np.asarray(new, dtype=float), np.asarray(before, dtype=float))
    index = owned(cp, layout)
    ends = before[..., None] + _edges(new, index.size)
    pairs = np.diff(pairs_before(ends, np.asarray(before + new)[..., None], window_tokens), axis=-1)
    total: Array = pairs[..., index].sum(axis=-1)
    return total


def _edges(new: Array, count: int) -> Array:
    """[..., count + 1]: ends of `count` equal pieces of the chunk."""
    edges: Array = new[..., None] * np.arange(count + 1) / count
    return edges


def block_pairs(
    new: ArrayLike, before: ArrayLike, cp: int, layout: Layout = "zigzag", window_tokens: int | None = None
) -> Array:
    """[..., cp, cp]: pairs of each rank's queries (row) with each rank's share of the keys (column).

    New keys lie where their queries do. Cached ones are dealt evenly, page by page, so that a query sees as many of
    every rank's. Blocks of pieces that are no whole tokens can be off by a pair, their sum is not.
    """
    new, before = np.broadcast_arrays(np.asarray(new, dtype=float), np.asarray(before, dtype=float))
    index = owned(cp, layout)
    ends = before[..., None] + _edges(new, index.size)
    below = pairs_before(ends[..., :, None], ends[..., None, :], window_tokens)
    pairs = np.diff(np.diff(below, axis=-1), axis=-2)
    fresh = pairs[..., index[:, None, :, None], index[None, :, None, :]].sum(axis=(-1, -2))
    cached = np.diff(below[..., 0], axis=-1)[..., index].sum(axis=-1)
    found: Array = fresh + cached[..., None] / cp
    return found


def step_pairs(
    new: ArrayLike,
    before: ArrayLike,
    cp: int,
    layout: Layout = "zigzag",
    window_tokens: int | None = None,
    passed: Passed = "keys",
) -> Array:
    """[..., cp]: pairs of the busiest rank in each step of a ring, in which rank i has what rank i - step passed on.

    Without a window every step but the first is alike: full pieces of new / cp for some rank if contiguous, half full
    ones for every rank in zig-zag; the first has the own triangles. With one, all blocks are counted.
    """
    new, before = np.broadcast_arrays(np.asarray(new, dtype=float), np.asarray(before, dtype=float))
    owned(cp, layout)  # says what is wrong with them
    if window_tokens is None:
        piece = new / (cp if layout == "contiguous" else 2 * cp)
        own = piece * (piece + 1) / 2 if layout == "contiguous" else 2 * piece * piece + piece
        other = piece * piece if layout == "contiguous" else 2 * piece * piece
        fresh = np.stack([own, *[other] * (cp - 1)], axis=-1)
        alike: Array = fresh + (new * before / cp / cp)[..., None]
        return alike
    ranks = np.arange(cp)
    origin = (ranks - ranks[:, None]) % cp
    rows, columns = (ranks, origin) if passed == "keys" else (origin, ranks)
    found = np.empty((new.size, cp))
    some = max(1, MOST_BLOCKS // cp**2)
    for first in range(0, new.size, some):
        part = slice(first, first + some)
        blocks = block_pairs(new.ravel()[part], before.ravel()[part], cp, layout, window_tokens)
        found[part] = blocks[:, rows, columns].max(axis=-1)
    return found.reshape(*new.shape, cp)


def imbalance(
    new: ArrayLike, before: ArrayLike, cp: int, layout: Layout = "zigzag", window_tokens: int | None = None
) -> Array:
    """The busiest rank's pairs over the mean: 1 is even, cp is all on one rank.

    Contiguous pieces without a cache tend to (2 cp - 1) / cp.

    >>> float(imbalance(4096.0, 1e6, 8)), round(float(imbalance(4096.0, 0.0, 8, "contiguous")), 2)
    (1.0, 1.87)
    """
    pairs = rank_pairs(new, before, cp, layout, window_tokens)
    mean = pairs.mean(axis=-1)
    ratio: Array = np.where(mean > 0, pairs.max(axis=-1) / np.where(mean > 0, mean, 1.0), 1.0)
    return ratio
