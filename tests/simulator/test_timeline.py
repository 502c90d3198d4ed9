"""The trace loads as JSON and says what ran, without overlaps."""

from __future__ import annotations

import io
import json
from decimal import Decimal
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from simulator.result import STEP_COLUMNS, Result, RunTotals, request_frame, span_frame, step_frame
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
