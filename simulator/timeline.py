"""A run as a Chrome trace: open the file in ui.perfetto.dev or chrome://tracing.

Format: "Trace Event Format" (Google), JSON object with `traceEvents`; times in microseconds. A replica is a process, a
lane one of its threads, a row of the step log a slice; queue and KV use are counters, requests are asynchronous slices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from simulator.result import Result

#: Rows turned into Python objects at a time.
_BLOCK = 1 << 16
_COLUMNS = (
    "replica",
    "lane",
    "start_s",
    "end_s",
    "steps",
    "decode_sequences",
    "prefill_tokens",
    "waiting",
    "kv_blocks",
)


def write_timeline(result: Result, file: TextIO, *, max_requests: int = 1000) -> None:
    """Write the trace, event by event, so that memory does not grow with the run.

    max_requests   asynchronous slices are written for the first that many requests; `otherData.requests` says how many
                   of how many. Slices and counters need a run that recorded its steps.
    """
    shown = min(max_requests, len(result.requests))
    notes = {
        "requests": f"{shown} of {len(result.requests)} requests are shown",
        "steps": "not recorded" if result.steps is None else f"{len(result.steps)} rows of the step log are shown",
    }
    file.write(f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(notes)}, "traceEvents": [')
    separator = "\n"
    for event in _events(result, shown):
        file.write(separator + event)
        separator = ",\n"
    file.write("\n]}\n")


def _events(result: Result, shown: int) -> Iterator[str]:
    yield from _names(result)
    if result.steps is not None:
        yield from _slices(result)
    yield from _requests(result, shown)


def _names(result: Result) -> Iterator[str]:
    frame = result.requests if result.steps is None else result.steps
    pairs = sorted(set(zip(frame["replica"].tolist(), frame["lane"].tolist(), strict=True)))
    for replica in sorted({replica for replica, _ in pairs if replica >= 0}):
        yield _event(ph="M", name="process_name", pid=replica, args={"name": f"replica {replica}"})
    for replica, lane in pairs:
        if replica >= 0:
            yield _event(ph="M", name="thread_name", pid=replica, tid=lane, args={"name": f"lane {lane}"})


def _slices(result: Result) -> Iterator[str]:
    """What ran, and the lane's counters wherever they change; both are 0 between one row and the next."""
    steps = result.steps
    assert steps is not None
    order = np.lexsort((steps["start_s"], steps["lane"], steps["replica"]))
    columns = [steps[name].to_numpy() for name in _COLUMNS]
    last_lane, last_stop = None, 0
    last_values = (0, 0)
    for low in range(0, len(order), _BLOCK):
        rows = order[low : low + _BLOCK]
        for replica, lane, start_s, end_s, count, decodes, prefill, waiting, kv in zip(
            *(column[rows].tolist() for column in columns), strict=True
        ):
            start, stop = round(start_s * 1e9), round(end_s * 1e9)
            if last_lane != (replica, lane) or start > last_stop:
                if last_lane is not None and last_values != (0, 0):
                    yield from _counters(*last_lane, last_stop, 0, 0)
                last_values = (0, 0)
            if (waiting, kv) != last_values:
                yield from _counters(replica, lane, start, waiting, kv)
            last_lane, last_stop, last_values = (replica, lane), stop, (waiting, kv)
            yield (
                f'{{"ph": "X", "cat": "step", "name": "{_name(count, decodes, prefill)}", "pid": {replica}, '
                f'"tid": {lane}, "ts": {_us(start)}, "dur": {_us(stop - start)}}}'
            )
    if last_lane is not None and last_values != (0, 0):
        yield from _counters(*last_lane, last_stop, 0, 0)


def _name(steps: int, decodes: int, prefill: int) -> str:
    """What a row ran, such as "decode x64 (k=12)" or "prefill 2048 + decode x63"."""
    decode = f"decode x{decodes}" + (f" (k={steps})" if steps > 1 else "")
    if not prefill:
        return decode
    return f"prefill {prefill} + {decode}" if decodes else f"prefill {prefill}"


def _counters(replica: int, lane: int, at_ns: int, waiting: int, kv_blocks: int) -> Iterator[str]:
    for name, value in (("waiting", waiting), ("KV blocks", kv_blocks)):
        yield (
            f'{{"ph": "C", "name": "{name}, lane {lane}", "pid": {replica}, "ts": {_us(at_ns)}, '
            f'"args": {{"{name}": {value}}}}}'
        )


def _requests(result: Result, shown: int) -> Iterator[str]:
    """A request from arrival to finish, with its queueing, prefill and decode inside; rejected ones as an instant."""
    frame = result.requests.iloc[:shown]
    names = ("request", "replica", "slo_class", "arrival_s", "first_schedule_s", "first_token_s", "finish_s")
    for request, replica, slo_class, *times_s in zip(*(frame[name].tolist() for name in names), strict=True):
        place = {"cat": "request", "id": request, "pid": max(replica, 0), "tid": 0}
        if any(math.isnan(time_s) for time_s in times_s):
            yield _event(ph="n", name=f"request {request} not served", ts=times_s[0], **place)
            continue
        arrival, schedule, first, finish = times_s
        yield _event(ph="b", name=f"request {request}", ts=arrival, args={"slo_class": slo_class}, **place)
        for name, since, until in (
            ("queue", arrival, schedule),
            ("prefill", schedule, first),
            ("decode", first, finish),
        ):
            if until > since:
                yield _event(ph="b", name=name, ts=since, **place)
                yield _event(ph="e", name=name, ts=until, **place)
        yield _event(ph="e", name=f"request {request}", ts=finish, **place)


def _event(ts: float | None = None, **event: Any) -> str:
    if ts is not None:
        event["ts"] = round(round(ts * 1e9) / 1e3, 3)
    return json.dumps(event)


def _us(nanoseconds: int) -> str:
    """Microseconds with three decimals, so that neighbouring slices touch and never overlap."""
    sign, nanoseconds = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    return f"{sign}{nanoseconds // 1000}.{nanoseconds % 1000:03d}"
