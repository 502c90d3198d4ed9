"""Which prompts need not be computed again? The hashed KV blocks of one scheduler, kept after their requests.

A block of the hashes is the unit of sharing; it is a whole number of KV blocks. Blocks that running sequences use are
counted once, however many use them. Blocks that nobody uses stay until their room is needed and are then evicted in
the order of a policy. No clock and no KV accounting of sequences here: the scheduler says what fits and counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

from simulator.blockhashes import BlockHashes
from simulator.errors import SchedulerError

_DEPTHS = 20  # bits of a block's place in its chain
_STAMPS = 48  # bits of a time stamp
_DEEPEST = (1 << _DEPTHS) - 1


class Block:
    """One cached block of the hashes.

    refs    running sequences that use it
    uses    requests that ever did
    depth   blocks before it in its chain
    born    stamp of its insertion
    key     where it stands in the order of eviction, lowest first; meaningful while refs is 0
    """

    __slots__ = ("born", "depth", "id", "key", "refs", "uses")

    def __init__(self, block_id: int, depth: int, born: int, refs: int) -> None:
        self.id = block_id
        self.depth = depth
        self.born = born
        self.refs = refs
        self.uses = 1
        self.key = -1


#: The place in the order of eviction of a block that nobody uses any more, from the block and the stamp of that moment.
#: Of the blocks of one request the last get the earlier stamps: what comes first is of use to more prompts.
Eviction = Callable[[Block, int], int]


def _lru(block: Block, stamp: int) -> int:
    """Least recently used first (vLLM, SGLang)."""
    return stamp


def _lfu(block: Block, stamp: int) -> int:
    """Least often used first, of equals the least recently used."""
    return block.uses << _STAMPS | stamp


def _fifo(block: Block, stamp: int) -> int:
    """In the order of insertion, of those inserted together the deepest first."""
    return block.born << _DEPTHS | _DEEPEST - block.depth


def _length_aware(block: Block, stamp: int) -> int:
    """Least often used first, of equals the one furthest from the start (LengthAwareCache, arXiv:2407.00079)."""
    return (block.uses << _DEPTHS | _DEEPEST - block.depth) << _STAMPS | stamp


EVICTIONS: dict[str, Eviction] = {"lru": _lru, "lfu": _lfu, "fifo": _fifo, "length-aware": _length_aware}


class Below(Protocol):
    """Memories that take what the cache has no more room for."""

    def store(self, blocks: Sequence[int]) -> None:
        """Blocks are evicted; those that come first in their prompts come first here."""
        ...

    def held(self, blocks: Sequence[int]) -> int:
        """How many of the first of these blocks are there."""
        ...

    def load(self, request: int, blocks: Sequence[int], before: int, target: int) -> int:
        """Have as many of the first of these blocks loaded as is worth while; how many.

        before   tokens in front of them; target: tokens of the whole context, of which the rest is computed
        """
        ...


class PrefixCache:
    """The cached prefixes of one scheduler.

    hashes          block ids of every request of the run
    prompts         their prompt tokens
    kv_per_block    KV blocks of one block of the hashes
    eviction        key of EVICTIONS
    rows            where the caches of one run keep the ids of requests that have not ended, and whether they cover
                    their answers

    lookups, hit_blocks    requests that were admitted, and blocks they found; what a request finds again after a
                           preemption is its own and not counted
    inserted, evicted      blocks
    cached_tokens          by request, what it found when first admitted and what was loaded then; where that is nothing
                           there is no entry
    admitted               requests that ever were
    loaded_tokens          by request, what was loaded for it from below when it was first admitted
    shared                 KV blocks of the prefix found last that running sequences hold anyway
    below                  where evicted blocks go, None: they are lost
    """

    __slots__ = (
        "_blocks",
        "_clock",
        "_evict",
        "_first",
        "_found",
        "_heap",
        "_held",
        "_idle",
        "_rows",
        "_size",
        "admitted",
        "below",
        "cached_tokens",
        "evicted",
        "hashes",
        "hit_blocks",
        "inserted",
        "kv_per_block",
        "loaded_tokens",
        "lookups",
        "prompts",
        "shared",
    )

    def __init__(
        self,
        hashes: BlockHashes,
        prompts: Sequence[int],
        kv_per_block: int,
        eviction: str = "lru",
        rows: dict[int, tuple[list[int], bool]] | None = None,
    ) -> None:
        self.hashes = hashes
        self.prompts = prompts
        self.kv_per_block = kv_per_block
        self.lookups = self.hit_blocks = self.inserted = self.evicted = 0
        self.cached_tokens: dict[int, int] = {}
        self.loaded_tokens: dict[int, int] = {}
        self.shared = 0
        self.below: Below | None = None
        self._first = False  # whether the request that took a prefix last is new
        self._size = hashes.block_tokens
        self._evict = EVICTIONS[eviction]
        self._blocks: dict[int, Block] = {}
        self._held: dict[int, list[Block]] = {}  # leading blocks that running sequences use
        self._idle: dict[int, Block] = {}  # blocks that nobody uses, by key
        self._heap: list[int] = []  # their keys; outdated ones stay in until they are many
        self._clock = 0
        self.admitted: set[int] = set()
        self._found: list[Block] = []
        self._rows = {} if rows is None else rows

    @property
    def idle_kv_blocks(self) -> int:
        """KV blocks that are cached and used by nobody."""
        return len(self._idle) * self.kv_per_block

    @property
    def cached_kv_blocks(self) -> int:
        """KV blocks that are cached, in use or not."""
        return len(self._blocks) * self.kv_per_block

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that were not computed."""
        return self.hit_blocks * self._size

    def _ids(self, request: int, tokens: int) -> list[int]:
        """Ids of the blocks that lie within the first `tokens` tokens of the request's context."""
        known = self._rows.get(request)
        if known is None:
            row = self.hashes.row(request)
            known = self._rows[request] = row, len(row) > -(-self.prompts[request] // self._size)
        row, answered = known
        if not answered and tokens > self.prompts[request]:
            tokens = self.prompts[request]  # the last id may name a block that the prompt leaves unfinished
        return row[: tokens // self._size]

    def peek(self, request: int, tokens: int) -> int:
        """How many of the request's first `tokens` tokens are cached, here or below, without any effect."""
        blocks, found = self._blocks, 0
        ids = self._ids(request, tokens)
        for block_id in ids:
            if block_id not in blocks:
                break
            found += 1
        if self.below is not None:
            found += self.below.held(ids[found:])
        return found * self._size

    def find(self, request: int, tokens: int) -> int:
        """How many of the request's first `tokens` tokens are cached; sets `shared`; `take` acts on it."""
        blocks = self._blocks
        found: list[Block] = []
        in_use = 0
        for block_id in self._ids(request, tokens):
            block = blocks.get(block_id)
            if block is None:
                break
            found.append(block)
            if block.refs:
                in_use += 1
        self._found = found
        self.shared = in_use * self.kv_per_block
        return len(found) * self._size

    def take(self, request: int) -> None:
        """The request uses the prefix found last, until `release`."""
        found = self._found
        idle = self._idle
        for block in found:
            if not block.refs:
                del idle[block.key]
            block.refs += 1
            block.uses += 1
        self._held[request] = found
        self._found = []
        self._first = request not in self.admitted
        if self._first:
            self.admitted.add(request)
            self.lookups += 1
            self.hit_blocks += len(found)
            if found:
                self.cached_tokens[request] = len(found) * self._size

    def load(self, request: int, target: int) -> int:
        """Have what follows the prefix just taken loaded from below, all but the last of the `target` tokens at most.

        Returns the tokens of the context that will be there then, 0 if nothing is loaded.
        """
        assert self.below is not None
        known = len(self._held[request])
        more = self.below.load(request, self._ids(request, target - 1)[known:], known * self._size, target)
        if more and self._first:
            self.loaded_tokens[request] = more * self._size
            self.cached_tokens[request] = (known + more) * self._size
        return (known + more) * self._size if more else 0

    def complete(self, request: int, tokens: int) -> int:
        """The first `tokens` tokens are computed: others find them, and the request goes on using them.

        Blocks that have come into the cache meanwhile replace its own; returns the KV blocks this frees.
        """
        held = self._held[request]
        blocks, freed, depth = self._blocks, 0, len(held)
        born = self._clock = self._clock + 1
        for block_id in self._ids(request, tokens)[depth:]:
            block = blocks.get(block_id)
            if block is None:
                block = blocks[block_id] = Block(block_id, depth, born, 1)
                self.inserted += 1
            else:
                if block.refs:
                    freed += 1
                else:
                    del self._idle[block.key]
                block.refs += 1
                block.uses += 1
            held.append(block)
            depth += 1
        return freed * self.kv_per_block

    def release(self, request: int, tokens: int) -> int:
        """The request ends or is interrupted with `tokens` tokens computed, which stay cached while there is room.

        Returns the KV blocks of its own that others still use.
        """
        held = self._held.pop(request, [])
        others = 0
        ended: list[Block] = []
        for block in held:
            block.refs -= 1
            if block.refs:
                others += 1
            else:
                ended.append(block)
        blocks = self._blocks
        born = self._clock = self._clock + 1
        for depth, block_id in enumerate(self._ids(request, tokens)[len(held) :], len(held)):
            known = blocks.get(block_id)
            if known is None:
                known = blocks[block_id] = Block(block_id, depth, born, 0)
                self.inserted += 1
            elif known.refs:
                continue
            else:
                del self._idle[known.key]
                known.uses += 1
            ended.append(known)
        self._rows.pop(request, None)
        self._rest(ended)
        return others * self.kv_per_block

    def _rest(self, ended: list[Block]) -> None:
        """Nobody uses these leading blocks of a request any more: they may be evicted, the last ones first."""
        heap, idle, evict, clock = self._heap, self._idle, self._evict, self._clock
        for block in reversed(ended):
            clock += 1
            key = block.key = evict(block, clock)
            idle[key] = block
            heappush(heap, key)
        self._clock = clock
        if len(heap) > 4 * len(idle) + 1024:
            self._heap = list(idle)
            heapify(self._heap)

    def make_room(self, kv_blocks: int) -> None:
        """Evict blocks that nobody uses until they fill at most `kv_blocks` KV blocks."""
        most = max(0, kv_blocks) // self.kv_per_block
        idle, heap, blocks = self._idle, self._heap, self._blocks
        evicted = len(idle) - most
        if evicted <= 0:
            return
        gone: list[int] = []
        while len(idle) > most:
            block = idle.pop(heappop(heap), None)
            if block is not None:
                del blocks[block.id]
                gone.append(block.id)
        self.evicted += evicted
        if self.below is not None:
            gone.reverse()
            self.below.store(gone)


def kv_per_block(hashes: BlockHashes, block_tokens: int) -> int:
    """KV blocks of `block_tokens` tokens in one block of the hashes; raises SchedulerError if that is no whole number.

    >>> kv_per_block(BlockHashes.of([[0, 1]], 512), 16)
    32
    """
    whole, rest = divmod(hashes.block_tokens, block_tokens)
    if rest or not whole:
        raise SchedulerError(
            f"prefix hashes of {hashes.block_tokens} tokens a block: expected a multiple of the KV block's "
            f"{block_tokens}; set block_tokens to a divisor of {hashes.block_tokens}"
        )
    return whole


class Settings(Protocol):
    """What a scheduler says of its cache."""

    @property
    def prefix_caching(self) -> str: ...

    @property
    def block_tokens(self) -> int: ...


class Caching(Protocol):
    """A scheduler as far as its cache is concerned."""

    cache: PrefixCache | None

    @property
    def config(self) -> Settings: ...

    @property
    def prompts(self) -> Sequence[int]: ...


def equip(schedulers: Iterable[Caching], hashes: BlockHashes) -> None:
    """Give an empty cache to every scheduler whose settings ask for one; raises SchedulerError as kv_per_block does."""
    rows: dict[int, tuple[list[int], bool]] = {}
    for scheduler in schedulers:
        settings = scheduler.config
        if settings.prefix_caching != "off":
            blocks = kv_per_block(hashes, settings.block_tokens)
            scheduler.cache = PrefixCache(hashes, scheduler.prompts, blocks, settings.prefix_caching, rows)


def hit_rate(caches: Iterable[PrefixCache]) -> float:
    """Blocks found over blocks asked for, cut-short last ones included; nan before the first request."""
    found = asked = 0
    for cache in caches:
        found += cache.hit_blocks
        asked += sum(-(-cache.prompts[request] // cache.hashes.block_tokens) for request in cache.admitted)
    return found / asked if asked else float("nan")
