"""Which requests begin alike? Ids of the blocks of their contexts, equal where everything up to a block's end is.

The ids are chained: a block's id stands for its tokens and all tokens before them, so two requests share exactly
their common leading ids. This is what engines hash (vLLM's automatic prefix caching) and what Mooncake's traces
publish as `hash_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.errors import TraceError

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class BlockHashes:
    """Block ids of n requests, in their order; read-only copies.

    ids            of all requests, one after the other
    offsets        n + 1 positions in `ids`: those of request i are ids[offsets[i]:offsets[i + 1]]
    block_tokens   tokens of one block, for all requests

    Raises TraceError where the offsets do not cut up the ids.
    """

    ids: Ids
    offsets: Ids
    block_tokens: int

    def __post_init__(self) -> None:
        size = self.block_tokens
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise TraceError(f"block_tokens = {size!r}: expected a whole number >= 1")
        for name in ("ids", "offsets"):
            values = np.array(getattr(self, name))
            if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
                raise TraceError(f"{name} has dtype {values.dtype}, shape {values.shape}: expected whole numbers")
            values = values.astype(np.int64)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        offsets = self.offsets
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(self.ids) or np.any(np.diff(offsets) < 0):
            raise TraceError(f"offsets: expected to ascend from 0 to the number of ids, {len(self.ids)}")

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], block_tokens: int) -> BlockHashes:
        """From the ids of each request."""
        offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows], dtype=np.int64)))
        ids = np.fromiter((value for row in rows for value in row), np.int64, int(offsets[-1]))
        return cls(ids, offsets, block_tokens)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def counts(self) -> Ids:
        """Ids of each request."""
        return np.diff(self.offsets)

    def row(self, request: int) -> list[int]:
        """The ids of one request."""
        ids: list[int] = self.ids[self.offsets[request] : self.offsets[request + 1]].tolist()
        return ids

    def check(self, prompt_tokens: Ids, output_tokens: Ids) -> None:
        """Raise TraceError at the first request whose ids do not cover its prompt, or its prompt and its answer.

        Blocks begin at multiples of block_tokens; the last one may be cut short.
        """
        if len(self) != len(prompt_tokens):
            raise TraceError(f"block ids of {len(self)} requests: expected those of {len(prompt_tokens)}")
        size, counts = self.block_tokens, self.counts
        short, long = -(-prompt_tokens // size), -(-(prompt_tokens + output_tokens) // size)
        sound = (counts == short) | (counts == long)
        if not sound.all():
            index = int(np.argmin(sound))
            raise TraceError(
                f"request {index} has {counts[index]} block ids: expected {short[index]} for {prompt_tokens[index]} "
                f"prompt tokens in blocks of {size}, or {long[index]} with its answer; check the block size"
            )

    def check_chained(self) -> None:
        """Raise TraceError at the first id that does not always follow the same one: then it names no whole prefix."""
        before = np.empty_like(self.ids)
        before[1:] = self.ids[:-1]
        starts = self.offsets[:-1][self.counts > 0]
        first_block = np.zeros(len(self.ids), bool)
        first_block[starts] = True
        _, first, inverse = np.unique(self.ids, return_index=True, return_inverse=True)
        origin = first[inverse]
        same = np.where(first_block, first_block[origin], ~first_block[origin] & (before == before[origin]))
        if not same.all():
            at = int(np.argmin(same))
            request = int(np.searchsorted(self.offsets, at, side="right")) - 1
            shown = ["no block" if first_block[place] else f"block {before[place]}" for place in (at, int(origin[at]))]
            where = "in an earlier request" if origin[at] < self.offsets[request] else "where it was first"
            raise TraceError(
                f"request {request}: block {self.ids[at]} follows {shown[0]}, {shown[1]} {where}; "
                "expected ids that stand for the whole prefix"
            )

    def pick(self, index: slice | NDArray[np.generic]) -> BlockHashes:
        """Those of the requests at `index`: a slice, a mask or positions."""
        chosen = np.arange(len(self))[index]
        counts = self.counts[chosen]
        offsets = np.concatenate(([0], np.cumsum(counts)))
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
        return BlockHashes(self.ids[np.repeat(self.offsets[chosen], counts) + within], offsets, self.block_tokens)

    def apart(self, part: ArrayLike) -> BlockHashes:
        """The same, but requests with different `part` numbers (>= 0, one per request) share nothing any more."""
        part = np.repeat(np.asarray(part, np.int64), self.counts)
        _, dense = np.unique(self.ids, return_inverse=True)
        span = int(dense.max(initial=-1)) + 1
        return BlockHashes(dense.astype(np.int64) + part * span, self.offsets, self.block_tokens)


def private(prompt_tokens: Ids, block_tokens: int) -> BlockHashes:
    """Ids of prompts that share nothing."""
    offsets = np.concatenate(([0], np.cumsum(-(-prompt_tokens // block_tokens))))
    return BlockHashes(np.arange(offsets[-1]), offsets, block_tokens)


def joined(parts: Sequence[BlockHashes]) -> BlockHashes:
    """One set after the other; requests of different sets share nothing, whatever their ids.

    Raises TraceError where the blocks are not of one size.
    """
    sizes = sorted({part.block_tokens for part in parts})
    if len(sizes) != 1:
        raise TraceError(
            f"prefix hashes of {' and '.join(map(str, sizes))} tokens a block: expected one block size; "
            "hash the requests again in blocks of one size"
        )
    offsets = np.concatenate(([0], np.cumsum(np.concatenate([part.counts for part in parts]))))
    together = BlockHashes(np.concatenate([part.ids for part in parts]), offsets, sizes[0])
    return together.apart(np.repeat(np.arange(len(parts)), [len(part) for part in parts]))


def shared_blocks(hashes: BlockHashes) -> Ids:
    """Leading blocks of each request that an earlier request had too: the hits of a cache that forgets nothing.

    Of a cache that keys whole chains and is fed at every arrival, cut-short last blocks included, as published
    statistics of traces count them; an engine finds a little less (`simulator.prefixcache`).

    >>> shared_blocks(BlockHashes.of([[1, 2, 3], [1, 2, 4], [1, 5], [6]], 512)).tolist()
    [0, 2, 1, 0]
    """
    _, first, inverse = np.unique(hashes.ids, return_index=True, return_inverse=True)
    owner = np.repeat(np.arange(len(hashes)), hashes.counts)
    new = np.flatnonzero(owner[first[inverse]] == owner)  # ids that no earlier request has
    # Chained ids: behind the first new one of a request, all are new.
    hits = hashes.counts.copy()
    np.minimum.at(hits, owner[new], new - hashes.offsets[owner[new]])
    return hits


def infinite_cache_hit_rate(hashes: BlockHashes) -> float:
    """The share of all blocks that a cache that forgets nothing would have found; nan without blocks.

    >>> infinite_cache_hit_rate(BlockHashes.of([[1, 2, 3], [1, 2, 4], [1, 5]], 512))
    0.375
    """
    blocks = len(hashes.ids)
    return float(shared_blocks(hashes).sum()) / blocks if blocks else float("nan")
