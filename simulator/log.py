"""What happened in a run: times by request, and segments of equal steps when they are wanted."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from simulator.scheduler import Scheduler


class Log:
    """Times by request index, NaN until known; segments (rows of simulator.result.STEP_COLUMNS) when `record` is set.

    All in plain arrays, which stay small and quick up to millions of requests.

    limited, peak_seqs, peak_blocks   which of "kv", "seqs" and "tokens" ever held a scheduler back, and the most
                                      sequences one ran, and KV blocks these would have held at their ends
    spans   (request, replica, lane, first token, tokens) of what preempted requests emitted between preemptions
    """

    __slots__ = (
        "_resumed_s",
        "_spanned",
        "arrival_s",
        "events",
        "finish_s",
        "first_schedule_s",
        "first_token_s",
        "lane",
        "limited",
        "peak_blocks",
        "peak_seqs",
        "preemptions",
        "rejected",
        "replica",
        "segments",
        "spans",
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
        self.spans: list[tuple[int, int, int, float, int]] = []
        self.events = 0
        self.limited: set[str] = set()
        self.peak_seqs = 0
        self.peak_blocks = 0
        self._resumed_s: dict[int, float] = {}
        self._spanned: dict[int, int] = {}

    def extremes(self, schedulers: Iterable[Scheduler]) -> None:
        """Note what held the schedulers back and the most they had in use."""
        for scheduler in schedulers:
            self.limited |= scheduler.limited
            self.peak_seqs = max(self.peak_seqs, scheduler.peak_seqs)
            self.peak_blocks = max(self.peak_blocks, scheduler.peak_blocks)

    def scheduled(self, scheduler: Scheduler, at_s: float) -> None:
        """Note the requests whose first chunk starts in the formed step."""
        first_schedule_s = self.first_schedule_s
        for request, _, before in scheduler.chunks:
            if not before and first_schedule_s[request] != first_schedule_s[request]:
                first_schedule_s[request] = at_s

    def prefilled(self, scheduler: Scheduler, at_s: float) -> None:
        """Note the token that follows every prompt completed by the step just taken."""
        first_token_s = self.first_token_s
        for request in scheduler.prefilled:
            if first_token_s[request] != first_token_s[request]:
                first_token_s[request] = at_s
            else:
                self._resumed_s[request] = at_s

    def preempted(self, scheduler: Scheduler, replica: int, lane: int) -> None:
        """Keep what the requests preempted by the formed step had emitted since they last joined."""
        for request in scheduler.preempted:
            self.preemptions[request] = self.preemptions.get(request, 0) + 1
            emitted = scheduler.generated.get(request, 0)
            earlier = self._spanned.get(request, 0)
            if emitted > earlier:
                start = self._resumed_s.get(request, self.first_token_s[request])
                self.spans.append((request, replica, lane, start, emitted - earlier))
                self._spanned[request] = emitted

    def last_spans(self, outputs: Sequence[int] | NDArray[np.int64]) -> list[tuple[int, int, int, float, int]]:
        """The spans of all preempted requests, their last ones included."""
        last = [
            (
                request,
                self.replica[request],
                self.lane[request],
                self._resumed_s[request],
                int(outputs[request]) - emitted,
            )
            for request, emitted in self._spanned.items()
            if request in self._resumed_s and self.finish_s[request] == self.finish_s[request]
        ]
        return self.spans + last

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
        for _, new, before in s.chunks:
            tokens += new
            pairs += new * before + new * (new + 1) // 2
        assert self.segments is not None
        self.segments.extend(
            (replica, lane, start_s, end_s, steps, slope_s, running, context, tokens, pairs,
             len(s.chunks), len(s.waiting), s.blocks_held(untold + (1 if s.decode_runs else 0)))
        )  # fmt: skip
