"""When do the prompts of requests with images reach prefill, and what do the encode workers do meanwhile?

Nothing behind the encoders holds them back, so the stage is computed before prefill and by itself: arrivals and tiles
go in, the times at which prompts are complete come out. Tiles of one request are spread over several workers; each
worker takes tiles in order of arrival, batch by batch, and pushes the tokens of every request when their batch ends.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.energy import power_w
from hwmodels.hardware import Device
from hwmodels.step_model import Numbers
from simulator.errors import PoolError, TraceError
from simulator.workload import MAX_TOKENS, Requests

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

#: Columns of the logs. A batch ran on a worker from start_s to end_s. A push is what one batch did for one request: its
#: tiles left the worker from sent_s on and their tokens were with prefill at landed_s.
BATCH_COLUMNS = ("worker", "start_s", "end_s", "tiles")
PUSH_COLUMNS = ("request", "worker", "tiles", "sent_s", "landed_s")


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """The images of requests, in the requests' order.

    tiles    tiles of each request, 0 for text alone; one number stands for all
    tokens   tokens the language model sees of a tile

    Raises TraceError for numbers that are not whole or below 0.
    """

    tiles: Counts
    tokens: int

    def __post_init__(self) -> None:
        """Raise TraceError naming the first wrong number."""
        found = np.asarray(self.tiles)
        wrong = np.flatnonzero(~((found >= 0) & (found <= MAX_TOKENS) & (found == np.floor(found))))
        if len(wrong) or found.ndim > 1:
            said = f"tiles[{wrong[0]}] is {found.flat[wrong[0]]}" if len(wrong) else f"tiles has {found.ndim} axes"
            raise TraceError(f"{said}: expected one whole number of at least 0 for each request")
        if self.tokens < 1:
            raise TraceError(f"tokens = {self.tokens}: expected at least 1 for a tile")
        object.__setattr__(self, "tiles", found.astype(np.int64))

    def of(self, count: int) -> Counts:
        """Tiles of each of `count` requests; raises TraceError where there are not as many."""
        if self.tiles.ndim == 0:
            return np.full(count, self.tiles)
        if len(self.tiles) != count:
            raise TraceError(f"tiles has {len(self.tiles)} entries: expected one for each of the {count} requests")
        return self.tiles

    def prompts(self, requests: Requests) -> Requests:
        """The requests, whose prompts are text so far, with the tokens of their images in the prompts.

        Raises TraceError for requests of which is known how their prompts begin: where images stand in these is not.
        """
        if requests.block_hashes is not None and self.tiles.any():
            raise TraceError("requests with images and block ids: expected text alone, or a trace without block ids")
        return replace(requests, prompt_tokens=requests.prompt_tokens + self.tokens * self.of(len(requests)))


@dataclass(frozen=True, slots=True, eq=False)
class EncodeSpec:
    """A pool of encode workers.

    times_s       seconds of a batch by its tiles, 0 to at least batch_tiles (hwmodels.encoder.encode_times_s)
    workers       devices, each with an encoder of its own
    batch_tiles   most tiles of a batch
    shards        most workers the tiles of one request are spread over; 1 keeps requests whole
    tile_bytes    of the tokens of a tile (hwmodels.encoder.Encoder.token_bytes)
    bytes_per_s, latency_s   of the link each worker pushes its tokens over, one push after the other
    device, arithmetic_dtype   of every worker; None where nothing is to be known of power and price
    works         FLOPs and bytes of a batch by its tiles (hwmodels.encoder.encode_work); None where not wanted

    Raises PoolError for numbers that are impossible.
    """

    times_s: Numbers
    workers: int
    batch_tiles: int = 1
    shards: int = 1
    tile_bytes: float = 0.0
    bytes_per_s: float = inf
    latency_s: float = 0.0
    device: Device | None = None
    arithmetic_dtype: str = "bf16"
    works: Sequence[tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        """Raise PoolError for numbers that are impossible."""
        for name in ("workers", "batch_tiles", "shards"):
            if getattr(self, name) < 1:
                raise PoolError(f"encode pool with {name} = {getattr(self, name)}: expected at least 1")
        if len(self.times_s) <= self.batch_tiles:
            raise PoolError(
                f"encode pool with batch_tiles = {self.batch_tiles}: times are known up to {len(self.times_s) - 1} "
                "tiles; expected a smaller batch or more times"
            )
        if not (self.bytes_per_s > 0 and self.latency_s >= 0 and self.tile_bytes >= 0):
            raise PoolError(
                f"encode pool with bytes_per_s = {self.bytes_per_s}, latency_s = {self.latency_s}, tile_bytes = "
                f"{self.tile_bytes}: expected a positive rate, the others at least 0"
            )

    @property
    def tiles_per_s(self) -> float:
        """Tiles the pool can encode and push in the long run, with full batches of the best size."""
        worker = max(
            size / self.times_s[size] if self.times_s[size] else inf for size in range(1, self.batch_tiles + 1)
        )
        return self.workers * (min(worker, self.bytes_per_s / self.tile_bytes) if self.tile_bytes else worker)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What an encode pool did.

    ready_s           when each request's tokens were all with prefill: its arrival if it has no images
    begun_s           when the first batch with a tile of it began, NaN if it has none
    busy_s            seconds each worker encoded
    sizes             batches by their tiles
    batches, pushes   rows of BATCH_COLUMNS and PUSH_COLUMNS, by worker in order of time; empty unless recorded
    """

    ready_s: Floats
    begun_s: Floats
    busy_s: Floats
    sizes: Mapping[int, int]
    batches: Floats
    pushes: Floats

    def consumption(self, spec: EncodeSpec) -> tuple[float, float, float]:
        """FLOPs, bytes, and joules above idle power; zeros where the works or the device are not known."""
        if spec.device is None:
            return 0.0, 0.0, 0.0
        return encode_consumption(spec.works, spec.times_s, self.sizes, spec.device, spec.arithmetic_dtype)


@dataclass(frozen=True, slots=True)
class EncodeUse:
    """What encoding took in a run, in short.

    workers       encode workers; 0 where the replicas encoded for themselves
    requests, tiles   requests that had images, and their tiles
    use           share of the time from first arrival to last finish that the workers, or these replicas, encoded
    wait_mean_s   mean time of a request with images from its arrival to its first batch's start; NaN without workers
    mean_s        mean time from its arrival to all its tokens' being with prefill; NaN without workers
    """

    workers: int
    requests: int
    tiles: int
    use: float
    wait_mean_s: float = nan
    mean_s: float = nan


def encode_consumption(
    works: Sequence[tuple[float, float]] | None,
    times_s: Numbers,
    sizes: Mapping[int, int],
    device: Device,
    dtype: str,
) -> tuple[float, float, float]:
    """FLOPs, bytes and joules above idle power of batches, counted by their tiles; zeros without works."""
    flops = moved = joules = 0.0
    if works is None:
        return flops, moved, joules
    for size, count in sizes.items():
        (batch_flops, batch_bytes), seconds = works[size], times_s[size]
        compute = min(1.0, batch_flops / (seconds * device.peak_flops_per_s[dtype]))
        memory = min(1.0, batch_bytes / (seconds * device.memory_bytes_per_s))
        flops += count * batch_flops
        moved += count * batch_bytes
        joules += count * seconds * (float(power_w(device, compute, memory)) - device.idle_w)
    return flops, moved, joules


def spread(backlogs: Sequence[int], tiles: int, most: int) -> list[tuple[int, int]]:
    """Give `tiles` tiles to at most `most` workers so that the largest backlog among these stays smallest.

    backlogs   tiles each worker has before it; of equal ones the first is filled first

    Returns (worker, tiles), shares of idle workers differ by one at most.

    >>> spread([0, 0, 0], 7, 3)
    [(0, 3), (1, 2), (2, 2)]
    >>> spread([4, 0, 1], 3, 3)
    [(1, 2), (2, 1)]
    >>> spread([4, 0, 1], 3, 1)
    [(1, 3)]
    """
    if most == 1 or tiles == 1:
        return [(backlogs.index(min(backlogs)), tiles)]
    order = sorted(range(len(backlogs)), key=backlogs.__getitem__)
    limit = min(most, len(order))
    level, used = tiles + backlogs[order[0]], 1  # the sum of what the used workers will have before them
    while used < limit and level > backlogs[order[used]] * used:
        level += backlogs[order[used]]
        used += 1
    least, more = divmod(level, used)
    shares = [(order[i], least + (i < more) - backlogs[order[i]]) for i in range(used)]
    return [share for share in shares if share[1]]


class _Worker:
    """One device: its queue of (request, tiles), the batch it runs, and the link it pushes over."""

    __slots__ = ("busy_s", "end_s", "link_s", "queue", "queued", "running", "since_s")

    def __init__(self) -> None:
        self.queue: deque[tuple[int, int]] = deque()
        self.queued = 0
        self.since_s = 0.0  # when the queue was last empty
        self.running = 0
        self.end_s = 0.0
        self.link_s = 0.0
        self.busy_s = 0.0


class EncodePool:
    """Encode workers without a clock of their own: `offer` requests in order of time, `advance` to look at them.

    ready_s   by request, when its tokens are with prefill, as far as its batches have been formed
    begun_s   by request, when its first batch begins, NaN until it is formed
    """

    __slots__ = ("_batches", "_pushes", "_sizes", "_workers", "begun_s", "ready_s", "spec")

    def __init__(self, spec: EncodeSpec, requests: int, *, record: bool = False) -> None:
        self.spec = spec
        self.ready_s = array("d", [0.0]) * requests
        self.begun_s = array("d", [nan]) * requests
        self._sizes = [0] * (spec.batch_tiles + 1)
        self._workers = [_Worker() for _ in range(spec.workers)]
        self._batches = array("d") if record else None
        self._pushes = array("d") if record else None

    @property
    def waiting(self) -> int:
        """Tiles in queues: no batch has them yet."""
        return sum(worker.queued for worker in self._workers)

    def offer(self, request: int, tiles: int, at_s: float) -> None:
        """A request arrives at `at_s`, no earlier than what was offered before."""
        if not tiles:
            self.ready_s[request] = at_s
            return
        backlogs = []
        workers = self._workers
        for index, worker in enumerate(workers):
            if worker.queued and worker.end_s < at_s:
                self._run(index, at_s)
            backlogs.append(worker.queued + (worker.running if worker.end_s > at_s else 0))
        for index, share in spread(backlogs, tiles, self.spec.shards):
            worker = workers[index]
            if not worker.queued:
                worker.since_s = at_s
            worker.queue.append((request, share))
            worker.queued += share

    def advance(self, until_s: float) -> None:
        """Form the batches that start before `until_s`; one that starts at that instant may still get more tiles."""
        for index, worker in enumerate(self._workers):
            if worker.queued:
                self._run(index, until_s)

    def encoded(self) -> Encoded:
        """What has happened so far."""
        batches = np.frombuffer(self._batches or b"").reshape(-1, len(BATCH_COLUMNS))
        pushes = np.frombuffer(self._pushes or b"").reshape(-1, len(PUSH_COLUMNS))
        return Encoded(
            np.array(self.ready_s),
            np.array(self.begun_s),
            np.array([worker.busy_s for worker in self._workers]),
            {size: count for size, count in enumerate(self._sizes) if count},
            batches[np.argsort(batches[:, 0], kind="stable")],
            pushes[np.argsort(pushes[:, 1], kind="stable")],
        )

    def _run(self, index: int, until_s: float) -> None:
        """Form one worker's batches that start before `until_s`, and push what they make."""
        spec, worker, ready_s, begun_s = self.spec, self._workers[index], self.ready_s, self.begun_s
        queue, room, times_s, latency_s = worker.queue, spec.batch_tiles, spec.times_s, spec.latency_s
        tile_s = spec.tile_bytes / spec.bytes_per_s
        while queue:
            start_s = max(worker.end_s, worker.since_s)
            if start_s >= until_s:
                return
            size = min(room, worker.queued)
            end_s = start_s + times_s[size]
            left = size
            while left:
                request, tiles = queue[0]
                if tiles <= left:
                    queue.popleft()
                else:
                    queue[0] = (request, tiles - left)
                    tiles = left
                left -= tiles
                if not begun_s[request] <= start_s:
                    begun_s[request] = start_s
                sent_s = max(end_s, worker.link_s)
                worker.link_s = sent_s + tiles * tile_s
                landed_s = worker.link_s + latency_s
                if landed_s > ready_s[request]:
                    ready_s[request] = landed_s
                if self._pushes is not None:
                    self._pushes.extend((request, index, tiles, sent_s, landed_s))
            worker.queued -= size
            worker.running = size
            self._sizes[size] += 1
            worker.end_s = end_s
            worker.busy_s += times_s[size]
            if self._batches is not None:
                self._batches.extend((index, start_s, end_s, size))


def encode_stage(spec: EncodeSpec, arrival_s: ArrayLike, tiles: ArrayLike, *, record: bool = True) -> Encoded:
    """Let a pool encode the images of requests that arrive at `arrival_s`, in order of arrival.

    tiles    of each request, 0 for text alone
    record   whether to keep the batches and pushes

    Raises TraceError where the arrays do not fit together or arrivals are out of order.

    >>> spec = EncodeSpec(times_s=[0.0, 1.0, 2.0], workers=2, batch_tiles=2, shards=2)
    >>> encode_stage(spec, [0.0, 0.5, 9.0], [4, 1, 0]).ready_s.tolist()  # 2 + 2 tiles, then 1 behind them
    [2.0, 3.0, 9.0]
    """
    times, counts = np.asarray(arrival_s, dtype=float), np.asarray(tiles)
    if times.shape != counts.shape or times.ndim != 1:
        raise TraceError(f"{times.size} arrivals and {counts.size} tile counts: expected one of each for every request")
    if np.any(np.diff(times) < 0):
        raise TraceError("arrival_s falls: expected requests in order of arrival")
    pool = EncodePool(spec, len(times), record=record)
    offer = pool.offer
    for request, (count, at_s) in enumerate(zip(counts.tolist(), times.tolist(), strict=True)):
        offer(request, count, at_s)
    pool.advance(inf)
    return pool.encoded()


@dataclass(frozen=True, slots=True, eq=False)
class Reached:
    """Requests as prefill gets them.

    requests   arrivals are the times their prompts were complete, in that order
    order      position of each of them among the original requests
    """

    requests: Requests
    order: Counts

    def back(self, values: ArrayLike) -> Floats:
        """Times by reached request, by original request."""
        found = np.empty(len(self.order))
        found[self.order] = values
        return found


def reached(requests: Requests, ready_s: ArrayLike) -> Reached:
    """The requests as they reach prefill at ready_s, by request; of equal times the earlier arrival first."""
    times = np.asarray(ready_s, dtype=float)
    order = np.argsort(times, kind="stable")
    return Reached(requests.reordered(order, times[order]), order)
