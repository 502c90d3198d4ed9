"""Inter-token latencies, recovered exactly from the step log of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from simulator.distribution import Ints
from simulator.errors import MetricError
from simulator.result import Floats, Result

#: Steps whose ends are computed at a time, so that temporary arrays stay small.
_BLOCK = 1 << 20


def itl(result: Result) -> tuple[Floats, Ints]:
    """Every gap between two tokens of the same request, exactly, as gaps in seconds and how often each occurs.

    A sequence that decodes emits at the end of every decode step of its lane, so one gap between step ends counts for
    all sequences that live through it. Requests that did not finish are left out. Raises MetricError when the steps
    were not recorded. Memory: about 50 bytes for each decode step of the busiest lane, 16 for each gap returned.
    """
    return together(gaps_by_group(result, np.zeros(len(result.requests), dtype=np.int64), 1))


def together(gaps: Sequence[tuple[Floats, Ints]]) -> tuple[Floats, Ints]:
    if len(gaps) == 1:
        return gaps[0]
    return np.concatenate([pair[0] for pair in gaps]), np.concatenate([pair[1] for pair in gaps])


def gaps_by_group(result: Result, groups: Ints, count: int) -> list[tuple[Floats, Ints]]:
    """The gaps of the requests of each of `count` groups; a negative group is left out."""
    if result.steps is None:
        raise MetricError("steps were not recorded, expected a run that did; simulate with record=True")
    request, lane, first_s, tokens, joined_s = _spans(result)
    group = groups[request]
    steps = result.steps[result.steps["decode_sequences"].to_numpy() > 0]
    step_lane = lane_key(steps["replica"], steps["lane"])
    columns = [steps[name].to_numpy() for name in ("start_s", "end_s", "steps", "slope_s")]
    order = np.lexsort((columns[0], step_lane))
    step_lane, columns = step_lane[order], [column[order] for column in columns]

    found: list[list[tuple[Floats, Ints]]] = [[] for _ in range(count)]
    last_s = first_s.copy()
    by_lane = np.argsort(lane, kind="stable")
    for key in np.unique(lane[tokens > 1]):
        low, high = np.searchsorted(step_lane, (key, key + 1))
        ends_s = _step_ends(*(column[low:high] for column in columns))
        low, high = np.searchsorted(lane[by_lane], (key, key + 1))
        mine = by_lane[low:high]
        mine = mine[tokens[mine] > 1]
        start = np.searchsorted(ends_s, joined_s[mine], side="right")  # the step of the span's second token
        stop = start + tokens[mine] - 2  # and that of its last
        if stop.max() >= len(ends_s):
            raise ValueError(f"request {request[mine[stop.argmax()]]} emits more tokens than its lane has decode steps")
        last_s[mine] = ends_s[stop]
        lead_s = ends_s[start] - first_s[mine]
        gaps_s = np.diff(ends_s)
        for index in range(count):
            member = group[mine] == index
            if not member.any():
                continue
            weights = np.bincount(start[member], minlength=len(ends_s))
            weights -= np.bincount(stop[member], minlength=len(ends_s))
            np.cumsum(weights, out=weights)
            lived = weights[:-1] > 0
            found[index] += [(gaps_s[lived], weights[:-1][lived]), _once(lead_s[member])]
        del ends_s, gaps_s

    # From the last token before an interruption to the first one after it.
    order = np.lexsort((first_s, request))
    resumed = np.flatnonzero(np.diff(request[order]) == 0)
    paused_s = first_s[order[resumed + 1]] - last_s[order[resumed]]
    for index in range(count):
        found[index].append(_once(paused_s[group[order[resumed]] == index]))
    return [together(pairs) for pairs in found]


def _once(gaps_s: Floats) -> tuple[Floats, Ints]:
    return gaps_s, np.ones(len(gaps_s), dtype=np.int64)


def lane_key(replica: pd.Series[int], lane: pd.Series[int]) -> Ints:
    return replica.to_numpy(np.int64) << 32 | lane.to_numpy(np.int64)


def _spans(result: Result) -> tuple[Ints, Ints, Floats, Ints, Floats]:
    """Request, lane key, time of the first token, tokens and time of joining of every stretch of finished requests."""
    frame = result.requests
    plain = np.isfinite(frame["finish_s"].to_numpy())
    finished = plain.copy()
    spans = result.spans
    if spans is not None:
        plain[spans["request"].to_numpy()] = False
    request = np.flatnonzero(plain)
    lane = lane_key(frame["replica"], frame["lane"])[plain]
    first_s = frame["first_token_s"].to_numpy()[plain]
    tokens = frame["output_tokens"].to_numpy(np.int64)[plain]
    if spans is None or spans.empty:
        return request, lane, first_s, tokens, first_s
    spans = spans[finished[spans["request"].to_numpy()]]
    return (
        np.concatenate((request, spans["request"].to_numpy(np.int64))),
        np.concatenate((lane, lane_key(spans["replica"], spans["lane"]))),
        np.concatenate((first_s, spans["first_token_s"].to_numpy())),
        np.concatenate((tokens, spans["tokens"].to_numpy(np.int64))),
        np.concatenate((first_s, spans["joined_s"].to_numpy())),
    )


def _step_ends(start_s: Floats, end_s: Floats, steps: Ints, slope_s: Floats) -> Floats:
    """When each step of the rows ends: after j + 1 steps, start + (j + 1) first + slope j (j + 1) / 2."""
    offsets = np.concatenate(([0], np.cumsum(steps)))
    first_s = (end_s - start_s) / steps - slope_s * (steps - 1) / 2
    ends_s = np.empty(offsets[-1])
    low = 0
    while low < len(steps):
        high = max(low + 1, int(np.searchsorted(offsets, offsets[low] + _BLOCK, side="right")) - 1)
        rows = slice(low, high)
        j = np.arange(offsets[low], offsets[high]) - np.repeat(offsets[rows], steps[rows])
        block = np.repeat(slope_s[rows] / 2, steps[rows])
        block *= j
        block += np.repeat(first_s[rows], steps[rows])
        block *= j + 1
        block += np.repeat(start_s[rows], steps[rows])
        ends_s[offsets[low] : offsets[high]] = block
        low = high
    ends_s[offsets[1:] - 1] = end_s  # exactly, because first tokens are compared with it
    return ends_s
