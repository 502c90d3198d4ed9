"""The trace loads as JSON and says what ran, without overlaps."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from simulator.result import (
    STEP_COLUMNS,
    Result,
    RunTotals,
    link_frame,
    request_frame,
    span_frame,
    step_frame,
    transfer_frame,
)
from simulator.timeline import write_timeline

nan = float("nan")
TOTALS = RunTotals(
    gpus=1,
    replicas=1,
    makespan_s=1.0,
    model_flops=0.0,
    hbm_bytes=0.0,
    energy_j=0.0,
    price_usd_per_h=None,
    peak_flops_per_s=1.0,
    memory_bytes_per_s=1.0,
    lanes=(1,),
    kv_blocks=(10,),
    seed=0,
    events=0,
)
REQUESTS = request_frame(
    arrival_s=[0.0, 0.5, 0.6],
    first_schedule_s=[0.0, 1.0, nan],
    first_token_s=[1.0, 2.0, nan],
    finish_s=[3.0, 2.0, nan],
    prompt_tokens=[4, 4, 4],
    output_tokens=[5, 1, 1],
    rejected=[False, False, True],
    replica=[0, 0, -1],
)


def log(rows: list[dict[str, float]]) -> Any:
    return step_frame(np.array([[values.get(name, 0) for name in STEP_COLUMNS] for values in rows]))


def load(result: Result, **options: int) -> dict[str, Any]:
    file = io.StringIO()
    write_timeline(result, file, **options)
    trace: dict[str, Any] = json.loads(file.getvalue(), parse_float=Decimal)
    return trace


def test_slices_are_named_by_what_ran() -> None:
    steps = log(
        [
            {"end_s": 1, "steps": 1, "prefill_tokens": 2048, "kv_blocks": 3},
            {
                "start_s": 1,
                "end_s": 2,
                "steps": 1,
                "decode_sequences": 63,
                "prefill_tokens": 512,
                "kv_blocks": 4,
                "waiting": 2,
            },
            {"start_s": 2.5, "end_s": 3, "steps": 12, "decode_sequences": 64, "kv_blocks": 4},
        ]
    )
    events = load(Result(REQUESTS, steps, span_frame([]), TOTALS))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in slices] == ["prefill 2048", "prefill 512 + decode x63", "decode x64 (k=12)"]
    assert [(event["ts"], event["dur"]) for event in slices] == [(0, 1000000), (1000000, 1000000), (2500000, 500000)]
    held = [(event["ts"], event["args"]["KV blocks"]) for event in events if event["name"] == "KV blocks, lane 0"]
    assert held == [(0, 3), (1000000, 4), (2000000, 0), (2500000, 4), (3000000, 0)]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"replica 0", "lane 0"}


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 1), st.floats(0, 0.1), st.floats(1e-5, 2.0)),
        min_size=1,
        max_size=30,
    ),
    st.floats(0, 1e6),
)
def test_slices_of_a_thread_never_overlap(runs: list[tuple[int, int, float, float]], origin: float) -> None:
    now = dict.fromkeys([(replica, lane) for replica in range(3) for lane in range(2)], origin)
    rows = []
    for replica, lane, idle, busy in runs:
        start = now[replica, lane] + idle
        now[replica, lane] = start + busy
        rows.append(
            {
                "replica": replica,
                "lane": lane,
                "start_s": start,
                "end_s": start + busy,
                "steps": 1,
                "decode_sequences": 1,
            }
        )
    events = load(Result(REQUESTS, log(rows), span_frame([]), TOTALS))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == len(rows)
    for thread in {(event["pid"], event["tid"]) for event in slices}:
        own = sorted((event["ts"], event["dur"]) for event in slices if (event["pid"], event["tid"]) == thread)
        assert all(ts + duration <= following for (ts, duration), (following, _) in pairwise(own))


def test_requests_open_and_close_and_the_cap_is_said() -> None:
    trace = load(Result(REQUESTS, None, None, TOTALS), max_requests=2)
    assert trace["otherData"] == {"requests": "2 of 3 requests are shown", "steps": "not recorded"}
    for request in (0, 1):
        own = [event for event in trace["traceEvents"] if event.get("id") == request]
        depth = 0
        for event in own:
            depth += {"b": 1, "e": -1}[event["ph"]]
            assert depth >= 0
        assert depth == 0
        times = [event["ts"] for event in own]
        assert times == sorted(times)
    everything = load(Result(REQUESTS, None, None, TOTALS))
    assert [event["name"] for event in everything["traceEvents"] if event["ph"] == "n"] == ["request 2 not served"]


def test_an_empty_run_is_a_trace_too() -> None:
    result = Result(REQUESTS.iloc[:0], log([]).iloc[:0], span_frame([]), TOTALS)
    assert load(result)["traceEvents"] == []


POOLS = replace(TOTALS, replicas=2, lanes=(1, 1), kv_blocks=(10, 10), roles=("prefill", "decode"))
#: Request 0: its blocks were found while its prompt was computed. Request 1: it waited for room.
MOVED = request_frame(
    arrival_s=[0.0, 0.5],
    first_schedule_s=[0.0, 1.0],
    first_token_s=[1.25, 4.0],
    finish_s=[5.0, 6.0],
    prompt_tokens=[4, 4],
    output_tokens=[5, 3],
    rejected=[False, False],
    replica=[1, 1],
)
TRANSFERS = transfer_frame([(0, 0, 1, 64.0, 1.0, 0.5, 1.25), (1, 0, 1, 64.0, 2.0, 3.0, 4.0)])
POOL_STEPS = log(
    [
        {"end_s": 1, "steps": 1, "prefill_tokens": 4},
        {"start_s": 1, "end_s": 2, "steps": 1, "prefill_tokens": 4},
        {"replica": 1, "start_s": 1.25, "end_s": 3.5, "steps": 2, "decode_sequences": 1},
        {"replica": 1, "start_s": 4, "end_s": 6, "steps": 2, "decode_sequences": 2},
    ]
)
LINKS = link_frame(["a to b"], [64.0], [128.0])


def phases(events: list[dict[str, Any]], category: str, key: int | str) -> dict[str, tuple[Decimal, Decimal]]:
    """Begin and end, in microseconds, of the asynchronous slices of one id."""
    own = [event for event in events if event.get("cat") == category and event.get("id") == key]
    found = {event["name"]: event["ts"] for event in own if event["ph"] == "b"}
    ends = {event["name"]: event["ts"] for event in own if event["ph"] == "e"}
    return {name: (begin, ends.pop(name)) for name, begin in found.items()}


def test_kv_under_way_is_shown_with_its_phases() -> None:
    trace = load(Result(MOVED, POOL_STEPS, span_frame([]), POOLS, TRANSFERS, LINKS))
    assert trace["otherData"]["transfers"] == "2 of 2 transfers are shown"
    events = trace["traceEvents"]
    assert phases(events, "request", 0) == {
        "request 0": (0, 5000000), "prefill": (0, 1000000), "transfer": (1000000, 1250000), "decode": (1250000, 5000000)
    }  # fmt: skip
    assert phases(events, "request", 1) == {
        "request 1": (500000, 6000000), "queue": (500000, 1000000), "prefill": (1000000, 2000000),
        "transfer": (2000000, 4000000), "decode": (4000000, 6000000),
    }  # fmt: skip
    assert phases(events, "transfer", "kv0") == {
        "KV to replica 1": (500000, 1250000), "KV under way": (500000, 1250000)
    }  # fmt: skip
    assert phases(events, "transfer", "kv1") == {
        "KV to replica 1": (2000000, 4000000), "waits for room": (2000000, 3000000), "KV under way": (3000000, 4000000)
    }  # fmt: skip
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"replica 0 (prefill)", "replica 1 (decode)"}
    assert len(load(Result(MOVED, None, None, POOLS, TRANSFERS, LINKS), max_requests=1)["traceEvents"]) < len(events)


def test_arrows_go_from_the_prompts_step_to_the_first_step_that_may_use_the_kv() -> None:
    events = load(Result(MOVED, POOL_STEPS, span_frame([]), POOLS, TRANSFERS, LINKS))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    arrows = [(event["ph"], event["id"], event["pid"], event["ts"]) for event in events if event["ph"] in "sf"]
    assert arrows == [("s", 0, 0, 500000), ("f", 0, 1, 1250000), ("s", 1, 0, 1500000), ("f", 1, 1, 4000000)]
    for _, _, replica, at in arrows:
        assert any(slice["pid"] == replica and slice["ts"] <= at < slice["ts"] + slice["dur"] for slice in slices)


def test_an_arrow_ends_at_the_lane_of_its_request() -> None:
    lanes = pd.concat([POOL_STEPS, POOL_STEPS[POOL_STEPS["replica"] == 1].assign(lane=3)], ignore_index=True)
    events = load(Result(MOVED.assign(lane=[0, 3]), lanes, span_frame([]), POOLS, TRANSFERS, LINKS))["traceEvents"]
    assert [(event["id"], event["tid"]) for event in events if event["ph"] == "f"] == [(0, 0), (1, 3)]


def test_transfers_are_shown_without_steps_but_without_arrows() -> None:
    events = load(Result(MOVED, None, None, POOLS, TRANSFERS, LINKS))["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "b", "e"}
    assert {event["pid"] for event in events if event["ph"] == "M"} == {0, 1}
    assert phases(events, "transfer", "kv1")["waits for room"] == (2000000, 3000000)


def test_kv_sent_anew_is_part_of_the_answer() -> None:
    again = transfer_frame([(0, 0, 1, 64.0, 1.0, 0.5, 1.25), (0, 0, 1, 64.0, 2.0, 2.0, 3.0)])
    events = load(Result(MOVED, None, None, POOLS, again, LINKS))["traceEvents"]
    assert phases(events, "request", 0)["transfer"] == (1000000, 1250000)
    assert phases(events, "request", 0)["decode"] == (1250000, 5000000)
    assert {event["id"] for event in events if event.get("cat") == "transfer"} == {"kv0", "kv1"}
