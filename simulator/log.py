"""What happened in a run: times by request, and segments of equal steps when they are wanted."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simulator.scheduler import Chunk, Scheduler

if TYPE_CHECKING:
    from simulator.encoding import Encoding

#: See Log.spans.
Span = tuple[int, int, int, float, int, float]


#: Called with the replica, the lane, the chunks of a step, its start and its end, when the step is decided.
Watch = Callable[[int, int, Sequence[Chunk], float, float], None]


class Log:
    """Times by request index, NaN until known; segments (rows of simulator.result.STEP_COLUMNS) when `record` is set.

    All in plain arrays, which stay small and quick up to millions of requests.

    limited, peak_seqs, peak_blocks   which of "kv", "seqs" and "tokens" ever held a scheduler back, and the most
                                      sequences one ran, and KV blocks these would have held at their ends
    transfers        (request, source, target, bytes, ready, reserved, landed) of KV that went from replica to replica
    carried_bytes    over every link between replicas
    requeued, lost_kv_blocks   requests whose replica was removed, and the KV blocks that went with them
    role_switches    replicas that have changed roles
    cached_tokens    by request, prompt tokens that it found cached when first admitted, where there were any
    loaded_tokens    by request, those of them that had to be loaded from the tiers below
    looked_up        requests that were looked up in a cache; None where there is none
    loads_s, stored_bytes, loaded_bytes, tier_bytes   time of every load from the tiers, bytes that left the devices for
                     them and came back, and bytes over each of their links
    encoding   who encodes the images of requests; None where these have none
    watch   told of every step that computes prompts, where somebody wants to know
    spans   (request, replica, lane, first token, tokens, joined) of what requests emitted before they were interrupted;
            joined is when the sequence could first decode, at its first token or later
    """

    __slots__ = (
        "_joined_s",
        "_resumed_s",
        "_spanned",
        "arrival_s",
        "cached_tokens",
        "carried_bytes",
        "encoding",
        "events",
        "finish_s",
        "first_schedule_s",
        "first_token_s",
        "lane",
        "limited",
        "loaded_bytes",
        "loaded_tokens",
        "loads_s",
        "looked_up",
        "lost_kv_blocks",
        "peak_blocks",
        "peak_seqs",
        "preemptions",
        "rejected",
        "replica",
        "requeued",
        "role_switches",
        "segments",
        "spans",
        "stored_bytes",
        "tier_bytes",
        "transfers",
        "watch",
    )  # fmt: skip

    def __init__(self, requests: int, *, record: bool) -> None:
        nan = float("nan")
        self.arrival_s: NDArray[np.float64] = np.empty(0)
        self.first_schedule_s = array("d", [nan]) * requests
        self.first_token_s = array("d", [nan]) * requests
        self.finish_s = array("d", [nan]) * requests
        self.replica = array("i", [-1]) * requests
        self.lane = array("i", [0]) * requests
        self.rejected: list[int] = []
        self.preemptions: dict[int, int] = {}
        self.segments = array("d") if record else None
        self.spans: list[Span] = []
        self.events = 0
        self.watch: Watch | None = None
        self.transfers: list[tuple[int, int, int, float, float, float, float]] = []
        self.carried_bytes: NDArray[np.float64] = np.empty(0)
        self.requeued: list[int] = []
        self.lost_kv_blocks = 0
        self.role_switches = 0
        self.cached_tokens: dict[int, int] = {}
        self.loaded_tokens: dict[int, int] = {}
        self.looked_up: set[int] | None = None
        self.loads_s = array("d")
        self.stored_bytes = self.loaded_bytes = 0.0
        self.tier_bytes: NDArray[np.float64] = np.empty(0)
        self.limited: set[str] = set()
        self.peak_seqs = 0
        self.peak_blocks = 0
        self.encoding: Encoding | None = None
        self._resumed_s: dict[int, float] = {}
        self._spanned: dict[int, int] = {}
        self._joined_s: dict[int, float] = {}

    def extremes(self, schedulers: Iterable[Scheduler]) -> None:
        """Note what held the schedulers back, the most they had in use, and what requests found cached."""
        for scheduler in schedulers:
            self.limited |= scheduler.limited
            self.peak_seqs = max(self.peak_seqs, scheduler.peak_seqs)
            self.peak_blocks = max(self.peak_blocks, scheduler.peak_blocks)
            cache = scheduler.cache
            if cache is not None:
                self.looked_up = cache.admitted | (self.looked_up or set())
                self.cached_tokens = cache.cached_tokens | self.cached_tokens
                self.loaded_tokens = cache.loaded_tokens | self.loaded_tokens

    def renumber(self, order: NDArray[np.int64]) -> None:
        """Give the request at position i the number order[i] in all that is noted."""
        for name in ("first_schedule_s", "first_token_s", "finish_s", "replica", "lane"):
            values = getattr(self, name)
            given = np.empty(len(values), dtype=values.typecode)
            given[order] = values
            setattr(self, name, array(values.typecode, given.tobytes()))
        arrival_s = np.empty_like(self.arrival_s)
        arrival_s[order] = self.arrival_s
        self.arrival_s = arrival_s
        now = order.tolist()
        for name in ("preemptions", "cached_tokens", "loaded_tokens", "_resumed_s", "_spanned", "_joined_s"):
            setattr(self, name, {now[request]: value for request, value in getattr(self, name).items()})
        if self.looked_up is not None:
            self.looked_up = {now[request] for request in self.looked_up}
        self.rejected = [now[request] for request in self.rejected]
        self.requeued = [now[request] for request in self.requeued]
        self.spans = [(now[request], *rest) for request, *rest in self.spans]
        self.transfers = [(now[request], *rest) for request, *rest in self.transfers]

    def scheduled(self, scheduler: Scheduler, at_s: float) -> None:
        """Note the requests whose first chunk starts in the formed step."""
        first_schedule_s = self.first_schedule_s
        for request, _, _ in scheduler.chunks:
            if first_schedule_s[request] != first_schedule_s[request]:
                first_schedule_s[request] = at_s

    def prefilled(self, scheduler: Scheduler, at_s: float) -> None:
        """Note the token that follows every prompt completed by the step just taken."""
        first_token_s = self.first_token_s
        for request in scheduler.prefilled:
            if first_token_s[request] != first_token_s[request]:
                first_token_s[request] = at_s
            else:
                self._resumed_s[request] = at_s

    def joined(self, scheduler: Scheduler, at_s: float) -> None:
        """Note when sequences whose prompt was computed elsewhere join the decodes."""
        for request in scheduler.joined:
            self._joined_s[request] = at_s
        scheduler.joined = []

    def first_shown(self, request: int, at_s: float) -> None:
        """The token that followed the last prefill is only given to the user now."""
        times = self._resumed_s if request in self._resumed_s else self.first_token_s
        times[request] = at_s

    def preempted(self, scheduler: Scheduler, replica: int, lane: int) -> None:
        """Keep what the requests preempted by the formed step had emitted since they last joined."""
        for request in scheduler.preempted:
            self.preemptions[request] = self.preemptions.get(request, 0) + 1
            self.interrupted(request, replica, lane, scheduler.generated.get(request, 0))

    def interrupted(self, request: int, replica: int, lane: int, emitted: int) -> None:
        """Keep the tokens, `emitted` in all, that a request gave away before its KV was lost."""
        earlier = self._spanned.get(request, 0)
        if emitted > earlier:
            start = self._resumed_s.get(request, self.first_token_s[request])
            joined = self._joined_s.pop(request, start)
            self.spans.append((request, replica, lane, start, emitted - earlier, joined))
            self._spanned[request] = emitted

    def last_spans(self, outputs: Sequence[int] | NDArray[np.int64]) -> list[Span]:
        """The spans of all requests that were interrupted or joined later than their first token, the last included."""
        last: list[Span] = []
        for request in self._spanned.keys() | self._joined_s.keys():
            start = self._resumed_s.get(request, self.first_token_s[request])
            emitted = self._spanned.get(request, 0)
            if self.finish_s[request] == self.finish_s[request] and (not emitted or request in self._resumed_s):
                joined = self._joined_s.get(request, start)
                tokens = int(outputs[request]) - emitted
                last.append((request, self.replica[request], self.lane[request], start, tokens, joined))
        return self.spans + sorted(last)

    def record(
        self,
        replica: int,
        lane: int,
        start_s: float,
        end_s: float,
        steps: int,
        slope_s: float,
        running: int,
        context: int,
        s: Scheduler,
        untold: int = 0,
    ) -> None:
        """Append the steps that the scheduler has formed and not yet taken to the segments.

        untold   steps taken that the scheduler has not been told of
        """
        tokens = pairs = 0
        chunks = s.chunks if s.group + 1 == s.groups else ()  # those in groups of layers count in the last of them
        for _, new, before in chunks:
            tokens += new
            pairs += new * before + new * (new + 1) // 2
        assert self.segments is not None
        self.segments.extend(
            (replica, lane, start_s, end_s, steps, slope_s, running, context, tokens, pairs,
             len(chunks), len(s.waiting), s.blocks_held(untold + (1 if s.decode_runs else 0)))
        )  # fmt: skip
