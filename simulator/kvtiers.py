"""Where do KV blocks live that the accelerators have no room for, and what must be moved to use them again?

Blocks are integers, chained hashes of everything before and in them, so a block is of use only with all before it. The
store has no clock: it says at once where blocks belong and returns the moves the caller turns into flows. A block whose
move is under way already counts at its target; moves that need it say which earlier ones to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import isfinite

from hwmodels.errors import ShardwiseError

#: Name of the accelerators' own memory in moves.
HBM = "hbm"


class TierError(ShardwiseError):
    """Tiers that cannot hold or move KV as given."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Tier:
    """One memory below the accelerators'.

    capacity_bytes       of KV, 0 or more
    read_bytes_per_s, write_bytes_per_s   of its link, out of it and into it
    latency_s            before the first byte, each way
    """

    name: str
    capacity_bytes: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        """Raise TierError for a name that is taken and for sizes and speeds that cannot be."""
        if not self.name or self.name == HBM:
            raise TierError(f"tier {self.name!r}: expected a name other than {HBM!r}, the accelerators' own memory")
        for name in ("read_bytes_per_s", "write_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise TierError(f"tier {self.name}: {name}={getattr(self, name)}, expected more than 0")
        for name in ("capacity_bytes", "latency_s"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise TierError(f"tier {self.name}: {name}={value}, expected a finite number of at least 0")


@dataclass(frozen=True, slots=True)
class Usage:
    """How a block was used, as numbers of the store's operations.

    entered   when it came into its tier
    used      when it was last stored or asked for
    uses      how often since it came into the store
    """

    entered: int
    used: int
    uses: int


#: What is evicted is least by this; ties fall to the block longest unused.
Eviction = Callable[[Usage], float]


def lru(usage: Usage) -> float:
    """The block longest unused goes first."""
    return usage.used


def lfu(usage: Usage) -> float:
    """The block least often used goes first."""
    return usage.uses


def fifo(usage: Usage) -> float:
    """The block that came first goes first."""
    return usage.entered


EVICTIONS: dict[str, Eviction] = {"lru": lru, "lfu": lfu, "fifo": fifo}


@dataclass(frozen=True, slots=True)
class Move:
    """KV to be sent from one memory to another.

    serial               number of the move, to be told to `landed` when it is over
    blocks, nbytes       what is sent
    source, target       names of tiers, or HBM
    bytes_per_s          of the slower end, when nothing else is sent
    latency_s            before the first byte
    after                serials of moves under way that bring the blocks to the source
    """

    serial: int
    blocks: tuple[int, ...]
    nbytes: float
    source: str
    target: str
    bytes_per_s: float
    latency_s: float
    after: tuple[int, ...] = ()

    @property
    def alone_s(self) -> float:
        """Seconds it takes when nothing else is sent."""
        return self.latency_s + self.nbytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of a prompt that lie in the same tier.

    start, blocks   index of the first in what was looked up, and how many
    """

    tier: str
    start: int
    blocks: int


class _Shelf:
    """The blocks of one tier in the order they would be evicted: a heap whose outdated entries are skipped."""

    __slots__ = ("_heap", "eviction", "held", "room")

    def __init__(self, room: int, eviction: Eviction) -> None:
        self.room = room
        self.eviction = eviction
        self.held: dict[int, Usage] = {}
        self._heap: list[tuple[float, int, int]] = []

    def put(self, block: int, usage: Usage) -> None:
        """Hold the block, or change how it was used."""
        self.held[block] = usage
        heappush(self._heap, (self.eviction(usage), usage.used, block))
        if len(self._heap) > 2 * len(self.held) + 64:
            self._heap = [(self.eviction(usage), usage.used, block) for block, usage in self.held.items()]
            heapify(self._heap)

    def evict(self) -> tuple[int, Usage]:
        """Take out the block that goes first."""
        while True:
            rank, used, block = heappop(self._heap)
            usage = self.held.get(block)
            if usage is not None and usage.used == used and self.eviction(usage) == rank:
                del self.held[block]
                return block, usage


class TieredStore:
    """KV blocks in memories below the accelerators', nearest first.

    tiers           nearest first; each is as large as its whole blocks
    block_bytes     of one block, all ranks together
    eviction        which block of a full tier goes first
    inclusive       False: a block is in one tier at most, loading it takes it out, what a tier evicts moves to the
                    next; True: what a tier holds every tier below holds too, loading copies it to the tiers above,
                    what a tier evicts is dropped from it and from those above
    write_through   False: blocks are stored when HBM evicts them; True: when they are completed, and again on eviction
                    if they were lost meanwhile

    moved_bytes     by (source, target), of all moves returned so far
    dropped         blocks that left the last tier for good
    Raises TierError for names given twice, no tiers, or inclusive tiers that shrink downwards.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        block_bytes: float,
        *,
        eviction: Eviction = lru,
        inclusive: bool = False,
        write_through: bool = False,
    ) -> None:
        if not block_bytes > 0:
            raise TierError(f"block_bytes={block_bytes}: expected more than 0")
        names = [tier.name for tier in tiers]
        if not names or len(set(names)) < len(names):
            raise TierError(f"tiers {names}: expected at least one, each with a name of its own")
        rooms = [int(tier.capacity_bytes // block_bytes) for tier in tiers]
        if inclusive and rooms != sorted(rooms):
            raise TierError(f"inclusive tiers of {rooms} blocks: expected each to hold at least what is above it")
        self.tiers = tuple(tiers)
        self.block_bytes = block_bytes
        self.inclusive = inclusive
        self.write_through = write_through
        self.moved_bytes: dict[tuple[str, str], float] = {}
        self.dropped = 0
        self._shelves = [_Shelf(room, eviction) for room in rooms]
        self._arriving: dict[tuple[int, int], int] = {}  # serials of moves under way by (level, block)
        self._serial = 0
        self._now = 0

    def __contains__(self, block: int) -> bool:
        return self._level(block) is not None

    def tier_of(self, block: int) -> str | None:
        """The nearest tier that holds the block."""
        level = self._level(block)
        return None if level is None else self.tiers[level].name

    def held_bytes(self, tier: str) -> float:
        """Bytes of the blocks in a tier."""
        return len(self._shelves[self._index(tier)].held) * self.block_bytes

    def held_blocks(self, tier: str) -> frozenset[int]:
        """The blocks in a tier."""
        return frozenset(self._shelves[self._index(tier)].held)

    def lookup(self, blocks: Sequence[int]) -> list[Run]:
        """Where the longest available run from the first block on lies; changes nothing."""
        starts: list[tuple[int, int]] = []  # level and first block of every run
        found, last = 0, -1
        for block in blocks:
            level = self._level(block)
            if level is None:
                break
            if level != last:
                starts.append((level, found))
                last = level
            found += 1
        ends = [*(start for _, start in starts[1:]), found]
        return [
            Run(self.tiers[level].name, start, end - start)
            for (level, start), end in zip(starts, ends[: len(starts)], strict=True)
        ]

    def fetch(self, blocks: Sequence[int]) -> list[Move]:
        """Load the longest available run into HBM: the moves there, and those between tiers that it entails.

        The blocks may be any part of a prompt, such as its end while its start is computed.
        """
        found = self._found(blocks)
        self._now += 1
        moves = self._lift(found, 0, uses=1) if self.inclusive else []
        for level, part in self._by_level(found).items():
            moves.append(self._move(part, level, None))
            if not self.inclusive:
                for block in part:
                    self._take(level, block)
        return moves

    def prefetch(self, blocks: Sequence[int], tier: str | None = None) -> list[Move]:
        """Bring the longest available run up to a tier (the nearest by default) before it is asked for."""
        top = 0 if tier is None else self._index(tier)
        found = self._found(blocks)
        self._now += 1
        if self.inclusive:
            return self._lift(found, top, uses=0)
        found = [block for block in found[: self._shelves[top].room] if self._level(block) not in range(top)]
        moves = []
        usages: dict[int, Usage] = {}
        for level, part in self._by_level(found).items():
            if level > top:
                moves.append(self._move(part, level, top))
                usages.update({block: self._take(level, block) for block in part})
        return moves + self._settle(top, found, usages, self._stamps(found), uses=0)

    def evicted(self, blocks: Sequence[int]) -> list[Move]:
        """Blocks HBM has no room for any more, in the order of their prompts: what must be written where."""
        return self._store([block for block in blocks if block not in self] if self.write_through else blocks)

    def completed(self, blocks: Sequence[int]) -> list[Move]:
        """Blocks of a prompt that HBM now holds, in their order: written at once if `write_through`."""
        return self._store(blocks) if self.write_through else []

    def touch(self, blocks: Iterable[int]) -> None:
        """Count a use of blocks that was served elsewhere, such as a hit in HBM."""
        self._now += 1
        for block in blocks:
            for shelf in self._shelves:
                usage = shelf.held.get(block)
                if usage is not None:
                    shelf.put(block, Usage(usage.entered, self._now, usage.uses + 1))

    def awaited(self, blocks: Iterable[int]) -> set[int]:
        """Serials of the moves under way that bring any of these blocks to the nearest tier that holds them."""
        arriving = self._arriving
        if not arriving:
            return set()
        keys = ((self._level(block), block) for block in blocks)
        return {arriving[level, block] for level, block in keys if level is not None and (level, block) in arriving}

    def landed(self, move: Move) -> None:
        """A move is over; later ones need not wait for it."""
        if move.target != HBM:
            level = self._index(move.target)
            for block in move.blocks:
                if self._arriving.get((level, block)) == move.serial:
                    del self._arriving[level, block]

    def _index(self, tier: str) -> int:
        for level, known in enumerate(self.tiers):
            if known.name == tier:
                return level
        raise TierError(f"tier {tier!r}: expected one of {', '.join(known.name for known in self.tiers)}")

    def _level(self, block: int) -> int | None:
        for level, shelf in enumerate(self._shelves):
            if block in shelf.held:
                return level
        return None

    def _found(self, blocks: Sequence[int]) -> list[int]:
        """The blocks of the longest available run."""
        return list(dict.fromkeys(blocks[: sum(run.blocks for run in self.lookup(blocks))]))

    def _by_level(self, blocks: Iterable[int]) -> dict[int, list[int]]:
        """Blocks that are held, by the nearest tier that does, each once."""
        found: dict[int, list[int]] = {}
        for block in dict.fromkeys(blocks):
            level = self._level(block)
            if level is not None:
                found.setdefault(level, []).append(block)
        return found

    def _take(self, level: int, block: int) -> Usage:
        """Remove a block from a tier; its entry in the heap is skipped later."""
        self._arriving.pop((level, block), None)
        return self._shelves[level].held.pop(block)

    def _move(self, blocks: Sequence[int], source: int | None, target: int | None) -> Move:
        """Account a move between levels (None: HBM); blocks that are under way to the source are waited for."""
        ends = [(None if level is None else self.tiers[level]) for level in (source, target)]
        speeds = [end.read_bytes_per_s if side == 0 else end.write_bytes_per_s for side, end in enumerate(ends) if end]
        names = tuple(end.name if end else HBM for end in ends)
        keys = [] if source is None else [(source, block) for block in blocks]
        after = sorted({self._arriving[key] for key in keys if key in self._arriving})
        self._serial += 1
        nbytes = len(blocks) * self.block_bytes
        link = (names[0], names[1])
        self.moved_bytes[link] = self.moved_bytes.get(link, 0.0) + nbytes
        if target is not None:
            self._arriving.update({(target, block): self._serial for block in blocks})
        latency_s = sum(end.latency_s for end in ends if end)
        return Move(self._serial, tuple(blocks), nbytes, *link, min(speeds), latency_s, tuple(after))

    def _store(self, blocks: Sequence[int]) -> list[Move]:
        """Hold blocks that come from HBM, those at the front of a prompt nearest and longest."""
        self._now += 1
        rest = list(dict.fromkeys(blocks))
        if self.inclusive:
            return self._store_everywhere(rest)
        usages: dict[int, Usage] = {}
        for level, part in self._by_level(rest).items():
            if level:  # HBM's copy is as good as the lower tier's, and nearer
                usages.update({block: self._take(level, block) for block in part})
        moves: list[Move] = []
        stamps = self._stamps(rest)
        for level, shelf in enumerate(self._shelves):
            part, rest = rest[: shelf.room], rest[shelf.room :]
            usages.update({block: self._take(level, block) for block in rest if block in shelf.held})
            new = [block for block in part if block not in shelf.held]
            if new:
                moves.append(self._move(new, None, level))
            moves += self._settle(level, part, usages, stamps, uses=1)
        self.dropped += len(rest)
        return moves

    def _settle(
        self, level: int, blocks: Sequence[int], usages: dict[int, Usage], stamps: Mapping[int, int], *, uses: int
    ) -> list[Move]:
        """Put blocks on a shelf that is large enough for them, and what has to make room on the next one down.

        usages   of those that were elsewhere in the store before
        uses     what to add to their uses
        """
        shelf = self._shelves[level]
        here = {block: shelf.held.pop(block) for block in blocks if block in shelf.held}
        victims = [(level, *shelf.evict()) for _ in range(len(shelf.held) + len(blocks) - shelf.room)]
        moves = self._demote(level + 1, victims) if victims else []
        for block in blocks:
            known, now = here.get(block) or usages.get(block), stamps[block]
            entered = here[block].entered if block in here else now
            shelf.put(block, Usage(entered, now, known.uses + uses if known else 1))
        return moves

    def _stamps(self, blocks: Sequence[int]) -> dict[int, int]:
        """When blocks of a prompt are used: the front last, for it is of use without its end, not the other way."""
        self._now += len(blocks)
        return {block: self._now - index for index, block in enumerate(blocks)}

    def _demote(self, target: int, coming: Sequence[tuple[int, int, Usage]]) -> list[Move]:
        """Find room from the tier `target` on for what tiers above it evict; what finds none is dropped.

        coming   (level, block, usage), what should go first before what should go last
        """
        if target == len(self._shelves):
            for level, block, _ in coming:
                self._arriving.pop((level, block), None)
            self.dropped += len(coming)
            return []
        shelf = self._shelves[target]
        over = max(0, len(coming) - shelf.room)
        kept = coming[over:]
        pushed = [(target, *shelf.evict()) for _ in range(len(shelf.held) + len(kept) - shelf.room)]
        by_level: dict[int, list[int]] = {}
        for level, block, _ in kept:
            by_level.setdefault(level, []).append(block)
        moves = [self._move(blocks, level, target) for level, blocks in by_level.items()]
        for level, block, _ in kept:
            self._arriving.pop((level, block), None)
        moves += self._demote(target + 1, [*pushed, *coming[:over]]) if pushed or over else []
        for _, block, usage in kept:
            self._now += 1
            shelf.put(block, Usage(self._now, usage.used, usage.uses))
        return moves

    def _store_everywhere(self, blocks: Sequence[int]) -> list[Move]:
        """Inclusive: every tier takes as much of the front as it can, from the tier above or else from HBM."""
        moves: list[Move] = []
        for level, shelf in enumerate(self._shelves):
            part = blocks[: shelf.room]
            lacking: dict[int | None, list[int]] = {}
            for block in part:
                if block not in shelf.held:
                    above = level - 1 if level and block in self._shelves[level - 1].held else None
                    lacking.setdefault(above, []).append(block)
            moves += [self._move(new, source, level) for source, new in lacking.items()]
            self._include(level, part, uses=1)
        self.dropped += len(blocks[self._shelves[-1].room :])
        return moves

    def _lift(self, blocks: Sequence[int], top: int, *, uses: int) -> list[Move]:
        """Inclusive: copy blocks that are held up to the tier `top`, from each tier to the one above it."""
        moves = []
        for level in reversed(range(top, len(self._shelves))):
            shelf = self._shelves[level]
            part = blocks[: shelf.room]
            new = [block for block in part if block not in shelf.held]
            if new:
                moves.append(self._move(new, level + 1, level))
            self._include(level, part, uses=uses)
        return moves

    def _include(self, level: int, blocks: Sequence[int], *, uses: int) -> None:
        """Put blocks on an inclusive shelf; what it evicts leaves the tiers above as well."""
        shelf = self._shelves[level]
        known = {block: shelf.held.pop(block) for block in blocks if block in shelf.held}
        for _ in range(len(shelf.held) + len(blocks) - shelf.room):
            victim, _ = shelf.evict()
            self._arriving.pop((level, victim), None)
            for above in range(level):
                if victim in self._shelves[above].held:
                    self._take(above, victim)
            self.dropped += level == len(self._shelves) - 1
        for block, now in self._stamps(blocks).items():
            usage = known.get(block)
            shelf.put(block, Usage(usage.entered if usage else now, now, usage.uses + uses if usage else 1))
