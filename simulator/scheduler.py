"""Which sequences run in the next step: continuous batching with paged KV, without a clock.

A decoding sequence is never touched while it decodes. The scheduler counts its decode steps in one number, `steps`;
a sequence stores `cached - steps` from the moment it joins and the value of `steps` at which it finishes, so contexts,
block needs and completions of any number of unchanging steps follow in constant time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from operator import mul

from simulator.errors import SchedulerError
from simulator.orders import Order, Rank, ranking
from simulator.policies import POLICIES, Policy
from simulator.prefixcache import EVICTIONS, PrefixCache

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
                         orca: whole prompts beside the decodes; static: a batch runs to its end;
                         layered: whole prompts, a group of layers a step, beside the decodes (Layered Prefill)
    max_seqs             sequences in one step
    token_budget         tokens in one step
    block_tokens         tokens of one KV block
    max_context_tokens   longest prompt + output
    prefix_caching       off, or the order in which KV that nobody uses is forgotten: a key of
                         simulator.prefixcache.EVICTIONS; of effect where requests come with block hashes
    chunk_tokens         prompt tokens in one step at most, of policy chunked; None: what decodes leave of the budget
    group_tokens, max_groups   of policy layered: prompt tokens for each group of layers, and most groups of layers
    order                in which the queue waits, see simulator.orders.ranking, as for
    ageing_tokens_per_s, targets_s
    """

    policy: Policy = "chunked"
    max_seqs: int = 256
    token_budget: int = 2048
    block_tokens: int = 16
    max_context_tokens: int = 32768
    prefix_caching: str = "off"
    chunk_tokens: int | None = None
    group_tokens: int = 512
    max_groups: int = 16
    order: Order = "fcfs"
    ageing_tokens_per_s: float = 0.0
    targets_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raise SchedulerError for settings that contradict each other."""
        for name in ("max_seqs", "token_budget", "block_tokens", "max_context_tokens", "group_tokens", "max_groups"):
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
        if self.chunk_tokens is not None:
            if self.policy != "chunked":
                raise SchedulerError(f"chunk_tokens={self.chunk_tokens} with policy {self.policy}: expected chunked")
            if not 1 <= self.chunk_tokens <= self.token_budget:
                raise SchedulerError(
                    f"chunk_tokens={self.chunk_tokens}: expected 1 to the token_budget of {self.token_budget}; "
                    "lower it or raise the budget"
                )
        ranking(self.order, self.ageing_tokens_per_s, self.targets_s)
        if self.policy == "static" and self.order != "fcfs":
            raise SchedulerError(f"order={self.order} with policy static: expected a policy that admits at every step")
        if self.prefix_caching != "off":
            if self.prefix_caching not in EVICTIONS:
                expected = ", ".join(EVICTIONS)
                raise SchedulerError(f"prefix_caching={self.prefix_caching!r}: expected off, {expected}")
            if self.policy == "static":
                raise SchedulerError("prefix_caching with policy static: expected a policy that pages its KV")


class Scheduler:
    """The queue, the running sequences and the KV blocks of one engine.

    prompts, outputs   tokens of every request of the run; outputs tell when a sequence ends, policies never see them
    classes            SLO class of every request; empty: all are alike
    kv_blocks          blocks of the KV pool
    group, groups      which of how many groups of layers the prompts of the formed step go through; (0, 1): all
    cohort             prompts on their way through the groups of layers, between steps
    rank               of every request, where the queue is not first come, first served
    cache              the blocks whose KV is kept for other prompts, None where none is; blocks that several sequences
                       share are counted once, those that nobody uses not at all: they give way
    """

    __slots__ = (
        "_admit",
        "_apart",
        "_block",
        "_finish_at",
        "_heap",
        "_needs",
        "_padded",
        "_ranking",
        "_weights",
        "before",
        "cache",
        "chunks",
        "classes",
        "cohort",
        "config",
        "context_offset",
        "decode_runs",
        "expected",
        "generated",
        "group",
        "groups",
        "items",
        "joined",
        "kv_blocks",
        "landed",
        "limited",
        "loaded",
        "loading",
        "longest_tokens",
        "outputs",
        "partial",
        "partial_done",
        "peak_blocks",
        "peak_seqs",
        "preempted",
        "prefilled",
        "prompts",
        "rank",
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
        self.classes: Sequence[int] = ()
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
        self.group, self.groups = 0, 1
        self.cohort: list[Chunk] = []
        self.rank: dict[int, Rank] = {}
        self.limited: set[str] = set()  # which of "kv", "seqs" and "tokens" ever kept a request out or cut a prompt
        self.peak_seqs = 0
        self.peak_blocks = 0  # most blocks ever reserved
        self._block = config.block_tokens
        self._admit = POLICIES[config.policy]
        self._ranking = ranking(config.order, config.ageing_tokens_per_s, config.targets_s)
        self._needs = [0] * config.block_tokens  # sequences that need a block when steps % block_tokens is the index
        self._finish_at: dict[int, int] = {}  # value of `steps` at which each decoding sequence ends, as admitted
        self._heap: list[int] = []  # the same, as finish << REQUEST_BITS | request; outdated ones stay in
        # Blocks beyond the last full one of a sequence that needs a block at index i, when steps % block_tokens is r.
        block = config.block_tokens
        self._weights = [tuple((i - r) % block for i in range(block)) for r in range(block)]
        self._apart = 0  # blocks of sequences that do not decode: in prefill, on their way to or from another replica
        self.partial = -1
        self.partial_done = 0
        self.before = 0  # tokens that the sequence admitted last found cached
        self._padded = config.policy == "static"
        # The last token of an output is never cached; a whole prompt, or what a preemption makes of it, is one step.
        self.longest_tokens = min(config.max_context_tokens, kv_blocks * config.block_tokens + 1)
        if config.policy != "chunked":
            self.longest_tokens = min(self.longest_tokens, config.token_budget + 1)
        if self._padded and config.max_context_tokens > kv_blocks * config.block_tokens:
            self.longest_tokens = 0

    def offer(self, request: int, at_s: float = 0.0) -> bool:
        """Put a request that came at `at_s` into the queue; False if it could never run here."""
        if self.prompts[request] + self.outputs[request] > self.longest_tokens:
            return False
        if self._ranking is None:
            self.waiting.append(request)
        else:
            slo_class = self.classes[request] if self.classes else 0
            self.rank[request] = self._ranking(self.prompts[request], slo_class, at_s)
            self._queue(request)
        self.unfinished += 1
        return True

    def _queue(self, request: int) -> None:
        """Put a request at the place of its rank."""
        rank = self.rank
        self.waiting.insert(bisect_right(self.waiting, rank[request], key=rank.__getitem__), request)

    def _first(self, request: int) -> None:
        """Put a request before all that wait; where classes have priority, before all of its class."""
        if self._ranking is not None:
            slo_class = self.rank[request][0] if request in self.rank else 0
            self.rank[request] = (slo_class, float("-inf"))
            if self.config.order == "priority":
                self.waiting.insert(bisect_left(self.waiting, self.rank[request], key=self.rank.__getitem__), request)
                return
        self.waiting.appendleft(request)

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
        self.waiting.extend(request for request, _, _ in self.cohort)
        if self.cohort:
            self.cohort, self.partial, self.groups = [], -1, 1
        self.waiting.extend(request for request, _, _ in self.chunks if request != self.partial)
        self.waiting.extend(self.loading)
        self.loading.clear()
        self.loaded.clear()
        self.landed = []
        while self.partial >= 0 or self._finish_at:
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
        return self.running > 0 or self.partial >= 0 or bool(self.waiting) or bool(self.landed)

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
        if self.waiting or self.partial >= 0 or self._padded:
            if self.loaded:
                self._loaded_first()
            self._admit(self)
        else:
            self.grow_decodes()
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
        if self.waiting or self.partial >= 0 or scarce or self._padded or not self.running:
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
        if chunks and self.group + 1 < self.groups:
            self.prefilled = []
            self.cohort, self.partial = chunks, chunks[0][0]
            self.chunks = []
            self.items = []
        elif chunks:
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
                    self.partial = request
                    self.partial_done = before + new
                    continue
                if before:
                    self.partial = -1
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
        self._first(request)

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
        if self.partial >= 0 and not self.cohort and not self._later_class(self.partial):
            request, cached = self.partial, self.partial_done
            self.partial = -1
            self._apart -= -(-(self.prompts[request] + self.generated.get(request, 0)) // block)
        else:
            request, finish = self._victim()
            left = finish - self.steps
            cached = self.prompts[request] + self.outputs[request] - 1 - left
            self.running -= 1
            self.context_offset -= cached - self.steps
            self._needs[(self.steps - cached) % block] -= 1
            self.generated[request] = self.outputs[request] - left
        self.reserved -= -(-(self.prompts[request] + self.outputs[request] - 1) // block)
        if self.cache is not None:
            self._own(-self.cache.release(request, cached))
        self._first(request)
        self.preempted.append(request)

    def _victim(self) -> tuple[int, int]:
        """The decoding sequence that gives way, and when it would have ended: the one admitted last, of the last class.

        Dictionaries keep the order of admission.
        """
        if self.config.order != "priority":
            return self._finish_at.popitem()
        classes = self.classes
        request = max(reversed(self._finish_at), key=lambda r: classes[r] if classes else 0)
        return request, self._finish_at.pop(request)

    def _later_class(self, request: int) -> bool:
        """Whether a sequence decodes whose class has less priority than the request's."""
        classes = self.classes
        if self.config.order != "priority" or not classes or not self._finish_at:
            return False
        return max(classes[r] for r in self._finish_at) > classes[request]

    def make_way(self, request: int) -> bool:
        """Preempt one sequence of a later class than the request's, where classes have priority; whether one was."""
        if not self._later_class(request):
            return False
        partial, self.partial = self.partial, -1
        self._preempt_last()
        self.partial = partial
        self.decode_runs = self.decode_runs and self.running > 0
        self.settled = False
        return True

    def grow_decodes(self) -> bool:
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

    def find(self, request: int, target: int) -> int:
        """How many of `target` tokens are cached; at least the last one has to be computed."""
        if self.cache is None:
            return 0
        if request in self.loaded:
            return self.loaded[request]
        self.cache.make_room(self.free)
        return self.cache.find(request, target - 1)

    def admit_head(self, request: int, target: int) -> bool:
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
            self.before = self.loaded.pop(request)
            self.waiting.popleft()
            return True
        block = self._block
        self.before = self.find(request, target)
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
                self.before = -1
        cache.make_room(self.free)
        return True
