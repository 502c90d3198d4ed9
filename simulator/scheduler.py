"""Which sequences run in the next step: continuous batching with paged KV, without a clock.

A decoding sequence is never touched while it decodes. The scheduler counts its decode steps in one number, `steps`;
a sequence stores `cached - steps` from the moment it joins and the value of `steps` at which it finishes, so contexts,
block needs and completions of any number of unchanging steps follow in constant time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from operator import mul
from typing import Literal

from simulator.errors import SchedulerError
from simulator.prefixcache import EVICTIONS, PrefixCache

Policy = Literal["chunked", "prefill-first", "orca", "static"]
#: Requests are told from steps by their low bits.
REQUEST_BITS = 32
REQUEST_MASK = (1 << REQUEST_BITS) - 1
#: Tokens kept free for every sequence's answer before more KV may come (SGLang's num_reserved_decode_tokens).
GROWTH_TOKENS = 512
#: (request, new tokens, tokens cached before them) of one prompt chunk.
Chunk = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How an engine forms its batches.

    policy               chunked: prompts cut to fill a token budget beside the decodes (Sarathi-Serve, vLLM V1);
                         prefill-first: whole prompts before any decode (vLLM V0);
                         orca: whole prompts beside the decodes; static: a batch runs to its end
    max_seqs             sequences in one step
    token_budget         tokens in one step
    block_tokens         tokens of one KV block
    max_context_tokens   longest prompt + output
    prefix_caching       off, or the order in which KV that nobody uses is forgotten: a key of
                         simulator.prefixcache.EVICTIONS; of effect where requests come with block hashes
    """

    policy: Policy = "chunked"
    max_seqs: int = 256
    token_budget: int = 2048
    block_tokens: int = 16
    max_context_tokens: int = 32768
    prefix_caching: str = "off"

    def __post_init__(self) -> None:
        """Raise SchedulerError for settings that contradict each other."""
        for name in ("max_seqs", "token_budget", "block_tokens", "max_context_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SchedulerError(f"{name}={value}: expected an integer of at least 1")
        if self.policy not in POLICIES:
            raise SchedulerError(f"policy={self.policy!r}: expected one of {', '.join(POLICIES)}")
        if self.max_seqs > self.token_budget:
            raise SchedulerError(
                f"max_seqs={self.max_seqs}: every decoding sequence takes a token of the step, so at most "
                f"token_budget={self.token_budget} can run; lower max_seqs or raise token_budget"
            )
        if self.prefix_caching != "off":
            if self.prefix_caching not in EVICTIONS:
                expected = ", ".join(EVICTIONS)
                raise SchedulerError(f"prefix_caching={self.prefix_caching!r}: expected off, {expected}")
            if self.policy == "static":
                raise SchedulerError("prefix_caching with policy static: expected a policy that pages its KV")


class Scheduler:
    """The queue, the running sequences and the KV blocks of one engine.

    prompts, outputs   tokens of every request of the run; outputs tell when a sequence ends, policies never see them
    kv_blocks          blocks of the KV pool
    cache              the blocks whose KV is kept for other prompts, None where none is; blocks that several sequences
                       share are counted once, those that nobody uses not at all: they give way
    """

    __slots__ = (
        "_admit",
        "_apart",
        "_before",
        "_block",
        "_finish_at",
        "_heap",
        "_needs",
        "_padded",
        "_partial",
        "_partial_done",
        "_weights",
        "cache",
        "chunks",
        "config",
        "context_offset",
        "decode_runs",
        "expected",
        "generated",
        "items",
        "joined",
        "kv_blocks",
        "landed",
        "limited",
        "loaded",
        "loading",
        "longest_tokens",
        "outputs",
        "peak_blocks",
        "peak_seqs",
        "preempted",
        "prefilled",
        "prompts",
        "reserved",
        "running",
        "settled",
        "steps",
        "unfinished",
        "waiting",
    )

    def __init__(self, config: SchedulerConfig, kv_blocks: int, prompts: list[int], outputs: list[int]) -> None:
        self.config = config
        self.kv_blocks = kv_blocks
        self.prompts = prompts
        self.outputs = outputs
        self.cache: PrefixCache | None = None
        self.waiting: deque[int] = deque()
        self.expected = 0  # sequences whose KV is to come from another replica
        self.landed: list[int] = []  # those whose KV has come and that join the decodes in the next step
        self.joined: list[int] = []  # those that have joined and that the log has not been told of
        self.loading: dict[int, int] = {}  # admitted sequences whose KV is being loaded: tokens that they will have
        self.loaded: dict[int, int] = {}  # those that have it and are first in the queue
        self.unfinished = 0
        self.reserved = 0  # blocks its admitted sequences will hold when they end: nothing is scarce while they fit
        self.steps = 0
        self.running = 0  # sequences in a decode step, padding rows included
        self.context_offset = 0  # sum over them of cached - steps
        self.chunks: list[Chunk] = []
        self.items: list[tuple[int, int]] = []  # the same without the requests
        self.prefilled: list[int] = []  # by the last call of advance(): requests whose prompt was completed
        self.decode_runs = False
        self.settled = True  # whether the next step can differ only through an arrival, a completion or a KV shortage
        self.generated: dict[int, int] = {}  # tokens emitted before the last preemption
        self.preempted: list[int] = []  # by the last call of form()
        self.limited: set[str] = set()  # which of "kv", "seqs" and "tokens" ever kept a request out or cut a prompt
        self.peak_seqs = 0
        self.peak_blocks = 0  # most blocks ever reserved
        self._block = config.block_tokens
        self._admit = POLICIES[config.policy]
        self._needs = [0] * config.block_tokens  # sequences that need a block when steps % block_tokens is the index
        self._finish_at: dict[int, int] = {}  # value of `steps` at which each decoding sequence ends, as admitted
        self._heap: list[int] = []  # the same, as finish << REQUEST_BITS | request; outdated ones stay in
        # Blocks beyond the last full one of a sequence that needs a block at index i, when steps % block_tokens is r.
        block = config.block_tokens
        self._weights = [tuple((i - r) % block for i in range(block)) for r in range(block)]
        self._apart = 0  # blocks of sequences that do not decode: in prefill, on their way to or from another replica
        self._partial = -1
        self._partial_done = 0
        self._before = 0  # tokens that the sequence admitted last found cached
        self._padded = config.policy == "static"
        # The last token of an output is never cached; a whole prompt, or what a preemption makes of it, is one step.
        self.longest_tokens = min(config.max_context_tokens, kv_blocks * config.block_tokens + 1)
        if config.policy != "chunked":
            self.longest_tokens = min(self.longest_tokens, config.token_budget + 1)
        if self._padded and config.max_context_tokens > kv_blocks * config.block_tokens:
            self.longest_tokens = 0

    def offer(self, request: int) -> bool:
        """Put a request at the end of the queue; False if it could never run here."""
        if self.prompts[request] + self.outputs[request] > self.longest_tokens:
            return False
        self.waiting.append(request)
        self.unfinished += 1
        return True

    def fits(self, request: int) -> bool:
        """Whether the request could run here alone."""
        return self.prompts[request] + self.outputs[request] <= self.longest_tokens

    def _prompt(self, request: int) -> int:
        """Tokens of its next prefill: the prompt, and what it emitted before it was interrupted."""
        return self.prompts[request] + self.generated.get(request, 0)

    def hold(self, request: int) -> None:
        """Keep the KV of a request that has just finished, because another replica goes on with it."""
        blocks = -(-self._prompt(request) // self._block)
        if self.cache is not None:
            self.cache.find(request, self._prompt(request))
            self.cache.take(request)
            blocks -= self.cache.shared
        self._apart += blocks
        self.reserved += blocks

    def release(self, request: int) -> None:
        """Give the blocks of `hold` back."""
        blocks = -(-self._prompt(request) // self._block)
        if self.cache is not None:
            blocks -= self.cache.release(request, self._prompt(request))
        self._apart -= blocks
        self.reserved -= blocks

    def expect(self, request: int) -> bool:
        """Set blocks aside for the KV of a prompt that another replica computes; False while that would be unsafe.

        Beside the prompt, GROWTH_TOKENS stay free for every sequence that is here or under way.
        """
        block = self._block
        others = self.running + self.expected + len(self.chunks)
        if others >= self.config.max_seqs:
            self.limited.add("seqs")
            return False
        blocks = -(-self._prompt(request) // block)
        reserved = self.reserved - (-(self.prompts[request] + self.outputs[request] - 1) // block)
        growth = (others + 1) * -(-GROWTH_TOKENS // block) if others else 0
        if reserved > self.kv_blocks and blocks + growth > self.free:
            self.limited.add("kv")
            return False
        self.reserved = reserved
        if reserved > self.peak_blocks:
            self.peak_blocks = reserved
        self._apart += blocks
        self.expected += 1
        self.unfinished += 1
        return True

    def land(self, request: int) -> None:
        """The KV of an expected request has come: it decodes from the next step on."""
        self.landed.append(request)

    def unexpect(self, request: int) -> None:
        """The KV of an expected request will not come."""
        self._apart -= -(-self._prompt(request) // self._block)
        self.reserved -= -(-(self.prompts[request] + self.outputs[request] - 1) // self._block)
        self.expected -= 1
        self.unfinished -= 1

    def evict(self) -> list[int]:
        """Forget all requests, for good; `preempted` has those among them that had begun to decode."""
        self.preempted = []
        for request in self.landed:
            self.unexpect(request)
            self.waiting.append(request)
        self.waiting.extend(request for request, _, _ in self.chunks if request != self._partial)
        self.waiting.extend(self.loading)
        self.loading.clear()
        self.loaded.clear()
        self.landed = []
        while self._partial >= 0 or self._finish_at:
            self._preempt_last()
        forgotten = list(self.waiting)
        self.waiting.clear()
        self.unfinished -= len(forgotten)
        return forgotten

    def blocks_held(self, ahead: int = 0) -> int:
        """KV blocks in use once every decoding sequence has cached `ahead` more tokens."""
        if self._padded:
            return self.reserved
        at = self.steps + ahead
        missing: int = sum(map(mul, self._needs, self._weights[at % self._block]))
        return (self.context_offset + self.running * at + missing) // self._block + self._apart

    @property
    def free(self) -> int:
        """KV blocks that can be given to new sequences, those of the formed decode step set aside."""
        return self.kv_blocks - self.blocks_held(1 if self.decode_runs else 0)

    @property
    def has_work(self) -> bool:
        """Whether a step would not be empty."""
        return self.running > 0 or self._partial >= 0 or bool(self.waiting) or bool(self.landed)

    @property
    def context(self) -> int:
        """Tokens the next decode step attends to, its own new tokens included."""
        return self.context_offset + self.running * (self.steps + 1)

    def form(self) -> bool:
        """Decide the next step: sets `chunks` and `decode_runs`; False if there is nothing to run."""
        if self.preempted:
            self.preempted = []
        self.settled = True
        if self.landed:
            self._join_landed()
        if self.waiting or self._partial >= 0 or self._padded:
            if self.loaded:
                self._loaded_first()
            self._admit(self)
        else:
            self._grow_decodes()
        return self.decode_runs or bool(self.chunks)

    def settled_steps(self) -> int:
        """How many decode steps, the formed one included, run before a completion or a KV shortage."""
        heap, finish_at = self._heap, self._finish_at
        first = heap[0]
        while finish_at.get(first & REQUEST_MASK) != first >> REQUEST_BITS:
            heappop(heap)
            first = heap[0]
        steps = (first >> REQUEST_BITS) - self.steps
        if steps > 1 and self.reserved > self.kv_blocks:
            # The first step's blocks are set aside already; find how many more steps the free blocks carry.
            left, now, block, needs = self.free, self.steps, self._block, self._needs
            whole = left // self.running
            left -= whole * self.running
            taken = 1 + whole * block
            while taken < steps:
                left -= needs[(now + taken) % block]
                if left < 0:
                    break
                taken += 1
            steps = min(steps, taken)
        return steps

    def form_quietly(self) -> int:
        """With nothing waiting or in prefill: form a decode step and say how many run before a completion or shortage.

        0 where form() has to decide; else the same as form() and settled_steps() in one.
        """
        scarce = self.reserved > self.kv_blocks
        if self.waiting or self._partial >= 0 or scarce or self._padded or not self.running:
            return 0
        self.decode_runs = True
        return self.settled_steps()

    def advance(self, steps: int) -> list[int]:
        """Take `steps` steps of the formed kind (1 if it has chunks); the requests that finished, in any order."""
        chunks = self.chunks
        if chunks and self.running + len(chunks) > self.peak_seqs:
            self.peak_seqs = self.running + len(chunks)
        if self.decode_runs:
            self.steps += steps
            if not chunks and self._heap[0] >> REQUEST_BITS > self.steps:
                return []
        finished: list[int] = []
        block, finish_at, cache = self._block, self._finish_at, self.cache
        if cache is not None:
            cache.make_room(self.kv_blocks - self.blocks_held())
        if self.decode_runs:
            heap = self._heap
            due = (self.steps + 1) << REQUEST_BITS
            while heap and heap[0] < due:
                entry = heappop(heap)
                request, at = entry & REQUEST_MASK, entry >> REQUEST_BITS
                if finish_at.get(request) == at:
                    del finish_at[request]
                    finished.append(request)
                    if not self._padded:
                        cached = self.prompts[request] + self.outputs[request] - 1
                        self.running -= 1
                        self.context_offset -= cached - at
                        self._needs[(at - cached) % block] -= 1
                        self.reserved -= -(-cached // block)
                        if cache is not None:
                            self._own(-cache.release(request, cached))
        if chunks:
            self.prefilled = []
            now = self.steps
            prompts, outputs, generated = self.prompts, self.outputs, self.generated
            for request, new, before in chunks:
                target = prompts[request]
                left = outputs[request] - 1
                if generated and request in generated:
                    target += generated[request]
                    left -= generated[request]
                if before + new < target:
                    self._partial = request
                    self._partial_done = before + new
                    continue
                if before:
                    self._partial = -1
                self.prefilled.append(request)
                self._apart -= -(-target // block)
                if cache is not None:
                    self._own(cache.complete(request, target))
                if left:
                    finish_at[request] = now + left
                    heappush(self._heap, now + left << REQUEST_BITS | request)
                    self.running += 1
                    self.context_offset += target - now
                    self._needs[(now - target) % block] += 1
                else:
                    finished.append(request)
                    if self._padded:
                        self.running += 1
                        self.context_offset += target - now
                    else:
                        self.reserved -= -(-target // block)
                        if cache is not None:
                            self._own(-cache.release(request, target))
            self.chunks = []
            self.items = []
        if finished:
            self.unfinished -= len(finished)
            if self._padded and not finish_at:
                self.running = 0
                self.context_offset = 0
                self.reserved = 0
        return finished

    def _join_landed(self) -> None:
        """Let the sequences whose KV has come decode, after the one token that their prompts have given already."""
        block, now = self._block, self.steps
        self.joined = self.landed
        self.landed = []
        for request in self.joined:
            prompt = self._prompt(request)
            finish = now + self.outputs[request] - 1 - self.generated.get(request, 0)
            self._finish_at[request] = finish
            heappush(self._heap, finish << REQUEST_BITS | request)
            self.expected -= 1
            self.running += 1
            self.context_offset += prompt - now
            self._needs[(now - prompt) % block] += 1
            self._apart -= -(-prompt // block)
        self.peak_seqs = max(self.peak_seqs, self.running)

    def load_ended(self, request: int) -> None:
        """The KV that an admitted sequence waited for is there: what is left of its prompt can be computed."""
        tokens = self.loaded[request] = self.loading.pop(request)
        assert self.cache is not None
        self._own(self.cache.complete(request, tokens))
        self.waiting.appendleft(request)

    def _loaded_first(self) -> None:
        """Sequences that hold their blocks already go before those that need some."""
        waiting, loaded = self.waiting, self.loaded
        if any(request != waiting[place] for place, request in enumerate(loaded)):
            self.waiting = deque([*loaded, *(request for request in waiting if request not in loaded)])

    def _own(self, fewer: int) -> None:
        """Count `fewer` KV blocks less: so many more are shared, of which every sequence counts its own."""
        self._apart -= fewer
        self.reserved -= fewer

    def _preempt_last(self) -> None:
        """Send the sequence admitted last back to the front of the queue, to be recomputed."""
        block = self._block
        if self._partial >= 0:
            request, cached = self._partial, self._partial_done
            self._partial = -1
            self._apart -= -(-(self.prompts[request] + self.generated.get(request, 0)) // block)
        else:
            request, finish = self._finish_at.popitem()  # dictionaries keep the order of admission
            left = finish - self.steps
            cached = self.prompts[request] + self.outputs[request] - 1 - left
            self.running -= 1
            self.context_offset -= cached - self.steps
            self._needs[(self.steps - cached) % block] -= 1
            self.generated[request] = self.outputs[request] - left
        self.reserved -= -(-(self.prompts[request] + self.outputs[request] - 1) // block)
        if self.cache is not None:
            self._own(-self.cache.release(request, cached))
        self.waiting.appendleft(request)
        self.preempted.append(request)

    def _grow_decodes(self) -> bool:
        """Give every decoding sequence room for its next token, preempting while there is none; whether any was."""
        if not self.running:
            self.decode_runs = False
            return False
        self.decode_runs = True
        if self.reserved <= self.kv_blocks or self.kv_blocks >= self.blocks_held(1):
            return False
        self.limited.add("kv")
        if self.cache is not None:
            self.cache.make_room(self.kv_blocks - self.blocks_held())
        while self.kv_blocks < self.blocks_held(1):
            self._preempt_last()
        self.decode_runs = self.running > 0
        self.settled = False
        return True

    def _find(self, request: int, target: int) -> int:
        """How many of `target` tokens are cached; at least the last one has to be computed."""
        if self.cache is None:
            return 0
        if request in self.loaded:
            return self.loaded[request]
        self.cache.make_room(self.free)
        return self.cache.find(request, target - 1)

    def _admit_head(self, request: int, target: int) -> bool:
        """Take the head of the queue with a context of `target` tokens from it, if there are blocks for them.

        Sets `_before`, the tokens of it that are cached; -1 where it has to wait until more are loaded.
        """
        if self.cache is not None:
            return self._admit_cached(request, target, self.cache)
        block = self._block
        blocks = -(-target // block)
        last = -(-(self.prompts[request] + self.outputs[request] - 1) // block)
        if self._padded:
            last = -(-self.config.max_context_tokens // block)
        reserved = self.reserved + last
        if reserved > self.kv_blocks and (self._padded or blocks > self.free):
            self.limited.add("kv")
            return False
        self.reserved = reserved
        if reserved > self.peak_blocks:
            self.peak_blocks = reserved
        self._apart += blocks
        self.waiting.popleft()
        return True

    def _admit_cached(self, request: int, target: int, cache: PrefixCache) -> bool:
        """The same where prefixes are kept: what is cached needs no blocks of its own."""
        if request in self.loaded:
            self._before = self.loaded.pop(request)
            self.waiting.popleft()
            return True
        block = self._block
        self._before = self._find(request, target)
        blocks = -(-target // block) - cache.shared
        reserved = self.reserved - (-(self.prompts[request] + self.outputs[request] - 1) // block) - cache.shared
        if reserved > self.kv_blocks and blocks > self.free:
            self.limited.add("kv")
            return False
        self.reserved = reserved
        self.peak_blocks = max(self.peak_blocks, reserved)
        self._apart += blocks
        self.waiting.popleft()
        cache.take(request)
        if cache.below is not None:
            tokens = cache.load(request, target)
            if tokens:
                self.loading[request] = tokens
                self._before = -1
        cache.make_room(self.free)
        return True


def _chunked(s: Scheduler) -> None:
    """All decodes, the prompt in progress, new prompts, up to the token budget (Sarathi-Serve, arXiv:2403.02310)."""
    shortage = s._grow_decodes()
    partial = s._partial
    if partial < 0 and not s.waiting:
        return
    left = s.config.token_budget - s.running
    if partial >= 0 and left > 0:
        done = s._partial_done
        target = s.prompts[partial] + s.generated.get(partial, 0)
        new = min(target - done, left)
        s.chunks.append((partial, new, done))
        s.items.append((new, done))
        left -= new
        if done + new < target:
            return
        partial = -1
    if shortage or partial >= 0 or not s.waiting:
        return
    room = s.config.max_seqs - s.running - s.expected - len(s.chunks)
    while s.waiting:
        if left <= 0 or room <= 0:
            s.limited.add("tokens" if left <= 0 else "seqs")
            return
        head = s.waiting[0]
        target = s.prompts[head] + (s.generated.get(head, 0) if s.generated else 0)
        if not s._admit_head(head, target):
            return
        before = s._before
        if before < 0:
            continue
        new = target - before
        if new > left:
            s.limited.add("tokens")
            new = left
        s.chunks.append((head, new, before))
        s.items.append((new, before))
        left -= new
        room -= 1


def _whole_prompts(s: Scheduler, left: int) -> None:
    """Admit whole prompts, first come first served, while tokens, sequences and blocks last."""
    room = s.config.max_seqs - s.running - s.expected
    while s.waiting:
        head = s.waiting[0]
        target = s.prompts[head] + (s.generated.get(head, 0) if s.generated else 0)
        if room <= 0 or target - s._find(head, target) > left:
            s.limited.add("seqs" if room <= 0 else "tokens")
            return
        if not s._admit_head(head, target):
            return
        before = s._before
        if before < 0:
            continue
        s.chunks.append((head, target - before, before))
        s.items.append((target - before, before))
        left -= target - before
        room -= 1


def _prefill_first(s: Scheduler) -> None:
    """Whole prompts alone in a step as long as one can be admitted, decodes otherwise (vLLM V0)."""
    s.decode_runs = False
    _whole_prompts(s, s.config.token_budget)
    if not s.chunks:
        s._grow_decodes()


def _orca(s: Scheduler) -> None:
    """Whole prompts in the same step as the decodes (Orca, OSDI 2022)."""
    if not s._grow_decodes():
        _whole_prompts(s, s.config.token_budget - s.running)


def _static(s: Scheduler) -> None:
    """A batch is admitted together, reserves its longest context, and runs until its last sequence ends."""
    s.decode_runs = s.running > 0
    if not s.decode_runs:
        _whole_prompts(s, s.config.token_budget)


POLICIES: dict[str, Callable[[Scheduler], None]] = {
    "chunked": _chunked,
    "prefill-first": _prefill_first,
    "orca": _orca,
    "static": _static,
}
