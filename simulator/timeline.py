"""A run as a Chrome trace: open the file in ui.perfetto.dev or chrome://tracing.

Format: "Trace Event Format" (Google), JSON object with `traceEvents`; times in microseconds. A replica is a process, a
lane one of its threads, a row of the step log a slice; queue and KV use are counters. Requests are asynchronous slices,
and so is KV that goes from replica to replica, with an arrow from the step that computed it to one that may use it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np
import pandas as pd

from simulator.result import TRANSFER_COLUMNS, Floats, Result

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
#: Times that are the same but for rounding.
_SAME_S = 1e-9
_NOTHING: tuple[Floats, Floats, list[int]] = (np.empty(0), np.empty(0), [])
_ANY = -1


def write_timeline(result: Result, file: TextIO, *, max_requests: int = 1000) -> None:
    """Write the trace, event by event, so that memory does not grow with the run.

    max_requests   asynchronous slices are written for the first that many requests and their KV; `otherData.requests`
                   says how many of how many. Slices, arrows and counters need a run that recorded its steps.
    """
    shown = min(max_requests, len(result.requests))
    moved = int((result.transfers["request"] < shown).sum())
    notes = {
        "requests": f"{shown} of {len(result.requests)} requests are shown",
        **({"transfers": f"{moved} of {len(result.transfers)} transfers are shown"} if len(result.transfers) else {}),
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
    yield from _transfers(result, shown)


def _names(result: Result) -> Iterator[str]:
    frame = result.requests if result.steps is None else result.steps
    found = set(zip(frame["replica"].tolist(), frame["lane"].tolist(), strict=True))
    if result.steps is None:
        found |= {(source, 0) for source in result.transfers["source"].tolist()}
    pairs = sorted(found)
    for replica in sorted({replica for replica, _ in pairs if replica >= 0}):
        yield _event(ph="M", name="process_name", pid=replica, args={"name": _process(result, replica)})
    for replica, lane in pairs:
        if replica >= 0:
            yield _event(ph="M", name="thread_name", pid=replica, tid=lane, args={"name": f"lane {lane}"})


def _process(result: Result, replica: int) -> str:
    """Such as "replica 2 (decode)"; what serves whole requests needs no word."""
    roles = result.totals.roles
    role = roles[replica] if replica < len(roles) else "aggregated"
    return f"replica {replica}" if role == "aggregated" else f"replica {replica} ({role})"


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
    """A request from arrival to finish with its phases inside; rejected ones as an instant.

    The phases are queue, prefill, transfer (of KV, where another replica decodes) and decode. What was computed anew
    after a preemption or the loss of a replica belongs to decode, and so does KV that was sent anew.
    """
    frame = result.requests.iloc[:shown]
    moves = result.transfers[result.transfers["request"] < shown]
    columns = (moves[name].tolist() for name in ("request", "ready_s", "landed_s"))
    under_way: dict[int, list[tuple[float, float]]] = {}
    for request, ready, landed in zip(*columns, strict=True):
        under_way.setdefault(request, []).append((ready, landed))
    names = ("request", "replica", "slo_class", "arrival_s", "first_schedule_s", "first_token_s", "finish_s")
    for request, replica, slo_class, *times_s in zip(*(frame[name].tolist() for name in names), strict=True):
        place = {"cat": "request", "id": request, "pid": max(replica, 0), "tid": 0}
        if any(math.isnan(time_s) for time_s in times_s):
            yield _event(ph="n", name=f"request {request} not served", ts=times_s[0], **place)
            continue
        arrival, schedule, first, finish = times_s
        yield _event(ph="b", name=f"request {request}", ts=arrival, args={"slo_class": slo_class}, **place)
        moved = (times for times in under_way.get(request, ()) if times[0] <= first <= times[1])
        computed, joined = next(moved, (first, first))
        for name, since, until in (
            ("queue", arrival, schedule),
            ("prefill", schedule, computed),
            ("transfer", computed, joined),
            ("decode", joined, finish),
        ):
            if until > since:
                yield _event(ph="b", name=name, ts=since, **place)
                yield _event(ph="e", name=name, ts=until, **place)
        yield _event(ph="e", name=f"request {request}", ts=finish, **place)


def _transfers(result: Result, shown: int) -> Iterator[str]:
    """KV at its source: while it waits for room, then under way until it has landed; arrows where steps are known.

    Room may be found, and KV sent, while the prompt is still being computed.
    """
    frame = result.transfers[result.transfers["request"] < shown]
    ends = None if result.steps is None else _Ends(result.steps)
    columns = (frame[name].tolist() for name in TRANSFER_COLUMNS)
    places, lanes = (result.requests[name].tolist() for name in ("replica", "lane"))
    for number, row in enumerate(zip(*columns, strict=True)):
        request, source, target, nbytes, ready, reserved, landed = row
        place = {"cat": "transfer", "id": f"kv{number}", "pid": source, "tid": 0}
        name = f"KV to replica {target}"
        told = {"request": request, "bytes": nbytes, "seconds after the prompt": landed - ready}
        yield _event(ph="b", name=name, ts=min(ready, reserved), args=told, **place)
        for phase, since, until in (("waits for room", ready, reserved), ("KV under way", reserved, landed)):
            if until > since:
                yield _event(ph="b", name=phase, ts=since, **place)
                yield _event(ph="e", name=phase, ts=until, **place)
        yield _event(ph="e", name=name, ts=landed, **place)
        begin = ends.computed_by(source, ready) if ends is not None else None
        lane = lanes[request] if places[request] == target else _ANY
        end = ends.used_by(target, lane, landed) if ends is not None else None
        if begin is not None and end is not None:
            arrow = {"cat": "kv", "name": "KV", "id": number}
            yield _event(ph="s", pid=source, tid=begin[0], ts=begin[1], **arrow)
            yield _event(ph="f", bp="e", pid=target, tid=end[0], ts=end[1], **arrow)


class _Ends:
    """Where arrows begin and end: in slices, for a viewer draws none between them."""

    def __init__(self, steps: pd.DataFrame) -> None:
        self.prompts = _by_place(steps[steps["prefill_tokens"] > 0], "end_s")
        self.all = _by_place(steps, "start_s")

    def computed_by(self, replica: int, at_s: float) -> tuple[int, float] | None:
        """Lane and middle of the last step with prompts that had ended by then."""
        edges, middles, lanes = self.prompts.get((replica, _ANY), _NOTHING)
        position = int(np.searchsorted(edges, at_s + _SAME_S, side="right")) - 1
        return (lanes[position], float(middles[position])) if position >= 0 else None

    def used_by(self, replica: int, lane: int, at_s: float) -> tuple[int, float] | None:
        """Lane and start of the first steps that began then or later."""
        edges, _, lanes = self.all.get((replica, lane), self.all.get((replica, _ANY), _NOTHING))
        position = int(np.searchsorted(edges, at_s - _SAME_S))
        return (lanes[position], float(edges[position])) if position < len(edges) else None


def _by_place(steps: pd.DataFrame, edge: str) -> dict[tuple[int, int], tuple[Floats, Floats, list[int]]]:
    """Edges in order, middles and lanes of the steps of every replica and lane, and of all lanes of a replica."""
    found = {}
    steps = steps.sort_values(edge, kind="stable")
    for replica in steps["replica"].unique().tolist():
        mine = steps[steps["replica"] == replica]
        for lane in (_ANY, *mine["lane"].unique().tolist()):
            rows = mine if lane == _ANY else mine[mine["lane"] == lane]
            middles = (rows["start_s"] + rows["end_s"]).to_numpy() / 2
            found[replica, lane] = rows[edge].to_numpy(), middles, rows["lane"].tolist()
    return found


def _event(ts: float | None = None, **event: Any) -> str:
    if ts is not None:
        event["ts"] = round(round(ts * 1e9) / 1e3, 3)
    return json.dumps(event)


def _us(nanoseconds: int) -> str:
    """Microseconds with three decimals, so that neighbouring slices touch and never overlap."""
    sign, nanoseconds = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    return f"{sign}{nanoseconds // 1000}.{nanoseconds % 1000:03d}"
