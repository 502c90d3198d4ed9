"""Readable rules of prefix caching: one list searched from end to end, and a step-by-step scheduler on top of it.

Slow on purpose, like oracle.py: what is held, shared and idle is counted anew from the requests whenever it is asked.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

spec = importlib.util.spec_from_file_location("oracle", Path(__file__).with_name("oracle.py"))
assert spec is not None and spec.loader is not None
oracle = sys.modules.get("oracle") or importlib.util.module_from_spec(spec)
if "oracle" not in sys.modules:
    sys.modules["oracle"] = oracle
    spec.loader.exec_module(oracle)


@dataclass
class Entry:
    """A cached block of the brute-force cache; nothing is counted ahead, everything is looked up in lists."""

    block_id: int
    depth: int
    born: int
    users: list[int] = field(default_factory=list)
    uses: int = 0
    rested: int = 0


class SlowCache:
    """The same rules over one list of entries."""

    def __init__(self, rows: list[list[int]], policy: str, per_block: int) -> None:
        self.rows = rows
        self.per_block = per_block
        self.policy = policy
        self.entries: list[Entry] = []
        self.clock = 0

    def entry(self, block_id: int) -> Entry | None:
        return next((entry for entry in self.entries if entry.block_id == block_id), None)

    def prefix(self, request: int, blocks: int) -> list[Entry]:
        found = []
        for block_id in self.rows[request][:blocks]:
            entry = self.entry(block_id)
            if entry is None:
                break
            found.append(entry)
        return found

    def take(self, request: int, blocks: int) -> None:
        for entry in self.prefix(request, blocks):
            entry.users.append(request)
            entry.uses += 1

    def put(self, request: int, blocks: int) -> list[Entry]:
        """The entries of the request's blocks that it does not use yet, made where they are missing."""
        self.clock += 1
        new = []
        for depth, block_id in enumerate(self.rows[request][:blocks]):
            entry = self.entry(block_id)
            if entry is None:
                entry = Entry(block_id, depth, self.clock)
                self.entries.append(entry)
            if request not in entry.users:
                new.append(entry)
        return new

    def complete(self, request: int, blocks: int) -> int:
        new = self.put(request, blocks)
        freed = sum(bool(entry.users) for entry in new)
        for entry in new:
            entry.users.append(request)
            entry.uses += 1
        return freed * self.per_block

    def release(self, request: int, blocks: int) -> int:
        for entry in self.put(request, blocks):
            if not entry.users:
                entry.uses += 1
                entry.users.append(request)
        mine = [entry for entry in self.entries if request in entry.users]
        for entry in mine:
            entry.users.remove(request)
        for entry in sorted(mine, key=lambda entry: -entry.depth):
            if not entry.users:
                self.clock += 1
                entry.rested = self.clock
        return sum(bool(entry.users) for entry in mine) * self.per_block

    def order(self, entry: Entry) -> tuple[int, ...]:
        return {
            "lru": (entry.rested,),
            "lfu": (entry.uses, entry.rested),
            "fifo": (entry.born, -entry.depth),
            "length-aware": (entry.uses, -entry.depth, entry.rested),
        }[self.policy]

    def make_room(self, kv_blocks: int) -> None:
        while self.per_block * len(idle := [entry for entry in self.entries if not entry.users]) > kv_blocks:
            self.entries.remove(min(idle, key=self.order))


class CachingScheduler(oracle.Scheduler):
    """The oracle's scheduler with a cache; `rows` are block ids of `size` tokens by request."""

    def __init__(self, config: oracle.OracleConfig, rows: list[list[int]], size: int, policy: str) -> None:
        self.live: list[oracle.Request] = []
        self.found: dict[int, int] = {}  # cached tokens at the first admission
        super().__init__(config)
        self.size = size
        self.cache = SlowCache(rows, policy, size // config.block_tokens)

    @property
    def free_blocks(self) -> int:
        """The pool less what running sequences hold, every block once."""
        if not self.live:
            return self.config.kv_blocks
        per_block = self.cache.per_block
        used = [entry for entry in self.cache.entries if entry.users]
        own = sum(request.blocks for request in self.live) - per_block * sum(len(entry.users) for entry in used)
        return self.config.kv_blocks - own - per_block * len(used)

    @free_blocks.setter
    def free_blocks(self, value: int) -> None:
        """Counted, not kept."""

    def known(self, request: oracle.Request, tokens: int) -> int:
        """Whole blocks with ids within the first `tokens` tokens."""
        row = self.cache.rows[request.index]
        answered = len(row) > ceil(request.prompt / self.size)
        return min(len(row), (tokens if answered else min(tokens, request.prompt)) // self.size)

    def release(self, request: oracle.Request) -> None:
        self.cache.release(request.index, self.known(request, request.cached))
        request.blocks = 0
        self.live.remove(request)

    def hit(self, request: oracle.Request) -> tuple[int, int]:
        """Blocks of the hashes that the request would find, and new KV blocks it would take."""
        self.cache.make_room(self.free_blocks)
        found = self.cache.prefix(request.index, self.known(request, request.target - 1))
        used = sum(bool(entry.users) for entry in found)
        return len(found), self.blocks_for(request.target) - used * self.cache.per_block

    def enter(self, now_s: float, found: int) -> oracle.Request:
        request = self.admit_head(now_s, self.blocks_for(self.waiting[0].target))
        self.cache.take(request.index, found)
        self.live.append(request)
        request.cached = found * self.size
        self.found.setdefault(request.index, request.cached)
        return request

    def grow(self) -> bool:
        self.cache.make_room(self.free_blocks)
        return super().grow()

    def plan(self, now_s: float) -> oracle.Batch:
        batch = super().plan(now_s)
        self.cache.make_room(self.free_blocks)
        held = self.config.kv_blocks - self.free_blocks
        idle = sum(not entry.users for entry in self.cache.entries) * self.cache.per_block
        assert held >= 0 and held + idle <= self.config.kv_blocks
        return batch

    def plan_chunked(self, now_s: float) -> oracle.Batch:
        preempted = self.grow()
        batch = oracle.Batch(decodes=list(self.decoding))
        left = self.config.token_budget - len(self.decoding)
        sequences = len(self.decoding) + bool(self.partial)
        if self.partial:
            chunk = min(self.partial.target - self.partial.cached, left)
            if chunk > 0:
                batch.prefills.append((self.partial, chunk))
            left -= chunk
            if self.partial.cached + chunk < self.partial.target:
                return batch
        while not preempted and left > 0 and self.waiting and sequences < self.config.max_seqs:
            found, blocks = self.hit(self.waiting[0])
            if blocks > self.free_blocks:
                break
            request = self.enter(now_s, found)
            sequences += 1
            chunk = min(request.target - request.cached, left)
            batch.prefills.append((request, chunk))
            left -= chunk
            if request.cached + chunk < request.target:
                break
        return batch

    def admit_whole(self, batch: oracle.Batch, now_s: float, left: int, reserved: int | None = None) -> None:
        while self.waiting and len(self.decoding) + len(batch.prefills) < self.config.max_seqs:
            found, blocks = self.hit(self.waiting[0])
            new = self.waiting[0].target - found * self.size
            if new > left or blocks > self.free_blocks:
                break
            batch.prefills.append((self.enter(now_s, found), new))
            left -= new

    def commit(self, batch: oracle.Batch, end_s: float) -> list[oracle.Request]:
        """Sequences that end leave first, in the order of their numbers; then prompts become known to others."""
        finished = []
        for request in batch.decodes:
            request.cached += 1
            request.emit(end_s)
        for request in sorted(batch.decodes, key=lambda request: request.index):
            if request.generated == request.output:
                self.decoding.remove(request)
                self.release(request)
                finished.append(request)
        for request, new in batch.prefills:
            whole = request.target
            request.cached += new
            if request.cached < whole:
                self.partial = request
                continue
            if request is self.partial:
                self.partial = None
            self.cache.complete(request.index, self.known(request, whole))
            request.emit(end_s)
            if request.generated == request.output:
                self.release(request)
                finished.append(request)
            else:
                self.decoding.append(request)
        self.unfinished -= len(finished)
        return finished
