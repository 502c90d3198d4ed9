"""Is KV that left the devices loaded again, from host memory or disks, or computed again? Whichever is over first.

What a scheduler's cache evicts is written to the tiers of its replica. When a prompt is admitted whose next blocks lie
there, each run of them is loaded if that takes no longer than computing it; the sequence holds its blocks meanwhile and
the others go on without it, as with vLLM's KV connectors. No clock here: moves wait in `outbox` for somebody who has
one (`simulator.loading`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from simulator.handover import Way
from simulator.kvtiers import HBM, Move, Tier, TieredStore
from simulator.loadorcompute import Prefill

#: The way of KV from one memory to another, by the replica, its lane, and the names of both ends (a tier or HBM).
WayOf = Callable[[int, int, str, str], Way]


@dataclass(frozen=True, slots=True, eq=False)
class Tiering:
    """The memories below the devices' and the links to them.

    bytes_per_s, names   capacity of every link, and how it is called
    way                  see WayOf; not asked for two memories that nothing moves between
    capacity_bytes       of each replica: bytes of KV by the name of the tier, nearest first, each at least as large as
                         the one before; empty for a replica without tiers
    """

    bytes_per_s: Sequence[float]
    names: Sequence[str]
    way: WayOf
    capacity_bytes: Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What caching saved in a run, over requests when they were first admitted.

    prompt_tokens    of the requests that were admitted where prefixes are kept
    found_tokens     of them, in the devices' memory
    loaded_tokens    of them, loaded from the tiers below
    loads, load_mean_s   requests something was loaded for, preempted ones again, and the mean time that took
    stored_bytes, loaded_bytes   that left the devices and came back
    links            (name, bytes per second, bytes carried) of every link to a tier
    """

    prompt_tokens: int
    found_tokens: int
    loaded_tokens: int
    loads: int = 0
    load_mean_s: float = float("nan")
    stored_bytes: float = 0.0
    loaded_bytes: float = 0.0
    links: tuple[tuple[str, float, float], ...] = ()

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were not computed."""
        cached = self.found_tokens + self.loaded_tokens
        return cached / self.prompt_tokens if self.prompt_tokens else float("nan")


@dataclass(slots=True, eq=False)
class Errand:
    """A move somebody has to make; `request` is the one that waits for it, None if nobody does."""

    move: Move
    lane: int
    way: Way
    tokens: int
    request: int | None = None

    @property
    def nbytes(self) -> float:
        """Bytes on the links."""
        return self.tokens * self.way.bytes_per_token


@dataclass(slots=True, eq=False)
class Traffic:
    """Loads under way over each link, of all replicas: what a further one would have to share them with."""

    bytes_per_s: Sequence[float]
    loads: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loads = [0] * len(self.bytes_per_s)

    def alone(self, way: Way) -> float:
        """Bytes per second of the way when nothing else is on its links; inf where nothing limits."""
        rates = [self.bytes_per_s[link] / share for link, share in zip(way.links, way.shares, strict=True)]
        return min([way.limit_bytes_per_s, *rates])

    def rate(self, way: Way) -> float:
        """Bytes per second that one more load would get if all shared their links evenly; inf where nothing limits."""
        rates = [
            self.bytes_per_s[link] / share / (1 + self.loads[link])
            for link, share in zip(way.links, way.shares, strict=True)
        ]
        return min([way.limit_bytes_per_s, *rates])

    def count(self, way: Way, change: int) -> None:
        """A load begins (1) or is over (-1)."""
        for link in way.links:
            self.loads[link] += change


class ReplicaTiers:
    """The tiers of one replica, which its lanes share.

    outbox   moves nobody has started yet, in the order in which they were decided
    """

    def __init__(self, tiering: Tiering, replica: int, block_tokens: int, prefill: Prefill, traffic: Traffic) -> None:
        self.block_tokens = block_tokens
        self.prefill = prefill
        self.traffic = traffic
        self.outbox: list[Errand] = []
        self._way = tiering.way
        self._replica = replica
        self._under_way: dict[int, tuple[str, str]] = {}  # ends of every move that is not over, by its number
        self._backlog_s: dict[tuple[str, str], float] = {}  # between two ends, were nothing else on the links
        capacities = tiering.capacity_bytes[replica]
        stored = {name: self._way(replica, 0, HBM, name) for name in capacities}
        loaded = {name: self._way(replica, 0, name, HBM) for name in capacities}
        # All that is stored is so once, whatever its way back: the bytes of a token are those of the way down.
        block_bytes = block_tokens * next(iter(stored.values())).bytes_per_token
        self.store = TieredStore(
            [
                Tier(name, nbytes, traffic.rate(loaded[name]), traffic.rate(stored[name]), loaded[name].latency_s)
                for name, nbytes in capacities.items()
            ],
            block_bytes,
            inclusive=True,
        )

    def lane(self, lane: int) -> LaneTiers:
        """As one scheduler's cache sees them."""
        return LaneTiers(self, lane)

    def take(self, moves: Sequence[Move], lane: int, request: int | None = None) -> None:
        """Put moves that the store asks for into the outbox; a request waits for those to the devices."""
        for move in moves:
            way = self._way(self._replica, lane, move.source, move.target)
            ends = self._under_way[move.serial] = move.source, move.target
            self._backlog_s[ends] = self._backlog_s.get(ends, 0.0) + self._alone_s(way, move)
            waits = request if move.target == HBM else None
            if waits is not None:
                self.traffic.count(way, 1)
            self.outbox.append(Errand(move, lane, way, len(move.blocks) * self.block_tokens, waits))

    def ended(self, errand: Errand) -> None:
        """A move is over."""
        ends = self._under_way.pop(errand.move.serial)
        self._backlog_s[ends] = max(0.0, self._backlog_s[ends] - self._alone_s(errand.way, errand.move))
        self.store.landed(errand.move)
        if errand.request is not None:
            self.traffic.count(errand.way, -1)

    def _alone_s(self, way: Way, move: Move) -> float:
        nbytes, rate = len(move.blocks) * self.block_tokens * way.bytes_per_token, self.traffic.alone(way)
        return way.latency_s + (nbytes / rate if rate < inf else 0.0)

    def worth(self, blocks: Sequence[int], before: int, target: int, lane: int) -> int:
        """How many of the first of these blocks take no longer to load than computing them would add.

        before   tokens in front of them; target: tokens of the whole context
        """
        runs = self.store.lookup(blocks)
        if not runs:
            return 0
        count, size, left_s = 0, self.block_tokens, self.prefill(target - before, before)
        names = [tier.name for tier in self.store.tiers]
        for run in runs:
            tokens = run.blocks * size
            # What lies lower comes up from tier to tier, through those that are large enough for it.
            stops = [name for name in names[: names.index(run.tier)] if self._room(name)]
            # What is still on its way there has to come first.
            awaited = self.store.awaited(blocks[run.start : run.start + run.blocks])
            load_s = max(
                (self._backlog_s[ends] for ends in {self._under_way[serial] for serial in awaited}), default=0.0
            )
            source = run.tier
            for stop in (*reversed(stops), HBM):
                way = self._way(self._replica, lane, source, stop)
                rate = self.traffic.rate(way)
                load_s += way.latency_s + (tokens * way.bytes_per_token / rate if rate < inf else 0.0)
                source = stop
            rest_s = self.prefill(target - before - tokens, before + tokens)
            if load_s > left_s - rest_s:
                break
            count += run.blocks
            before, left_s = before + tokens, rest_s
        return count

    def _room(self, name: str) -> bool:
        return any(tier.name == name and tier.capacity_bytes >= self.store.block_bytes for tier in self.store.tiers)


class LaneTiers:
    """The tiers of a replica as the cache of one of its schedulers sees them; see simulator.prefixcache.Below."""

    __slots__ = ("_lane", "_tiers")

    def __init__(self, tiers: ReplicaTiers, lane: int) -> None:
        self._tiers = tiers
        self._lane = lane

    def store(self, blocks: Sequence[int]) -> None:
        """Blocks are evicted."""
        self._tiers.take(self._tiers.store.evicted(blocks), self._lane)

    def held(self, blocks: Sequence[int]) -> int:
        """How many of the first of these blocks are there."""
        store, count = self._tiers.store, 0
        for block in blocks:
            if block not in store:
                break
            count += 1
        return count

    def load(self, request: int, blocks: Sequence[int], before: int, target: int) -> int:
        """Have the first of these blocks loaded that take no longer to load than to compute; how many."""
        count = self._tiers.worth(blocks, before, target, self._lane)
        if count:
            self._tiers.take(self._tiers.store.fetch(blocks[:count]), self._lane, request)
        return count
