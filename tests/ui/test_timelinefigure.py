"""The picture of a run: well-formed whatever is in it, small, and with every bar and transfer of its window."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.plan import Plan, Pool
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
from ui import timelinefigure
from ui.timelinefigure import LEFT, RIGHT, WIDTH, middle_s, run_figure, timeline_figure

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "a & b <i>\"c\"</i> ]]> 'd'"


def totals(roles: tuple[str, ...], lanes: tuple[int, ...] | None = None) -> RunTotals:
    """Of a run that lasted 100 s."""
    count = len(roles)
    return RunTotals(
        gpus=count, replicas=count, makespan_s=100.0, model_flops=0.0, hbm_bytes=0.0, energy_j=0.0,
        price_usd_per_h=None, peak_flops_per_s=1.0, memory_bytes_per_s=1.0, lanes=lanes or (1,) * count,
        kv_blocks=(1000,) * count, seed=0, events=0, roles=roles,
    )  # fmt: skip


def log(rows: list[dict[str, float]]):
    return step_frame(np.array([[row.get(name, 0) for name in STEP_COLUMNS] for row in rows], dtype=float))


def pooled(count: int = 400, *, every_s: float = 0.25, prefills: int = 2, decodes: int = 1, **changed) -> Result:
    """Requests that arrive one after the other: 0.1 s in the queue, 0.2 s prefill, 0.05 s of KV, 2 s of decode."""
    request = np.arange(count)
    arrival_s = every_s * request
    source, target = request % prefills, prefills + request % decodes
    ready_s, landed_s = arrival_s + 0.3, arrival_s + 0.35
    steps = [
        {"replica": s, "start_s": t - 0.2, "end_s": t, "steps": 1, "prefill_tokens": 50, "kv_blocks": 10}
        for s, t in zip(source, ready_s, strict=True)
    ]
    steps += [
        {
            "replica": prefills + d,
            "start_s": t,
            "end_s": t + every_s,
            "steps": 10,
            "decode_sequences": 8,
            "kv_blocks": 500,
        }
        for d in range(decodes)
        for t in landed_s
    ]
    rows = zip(request, source, target, np.full(count, 1e9), ready_s, ready_s, landed_s, strict=True)
    made = Result(
        request_frame(
            arrival_s=arrival_s, first_schedule_s=arrival_s + 0.1, first_token_s=landed_s, finish_s=landed_s + 2.0,
            prompt_tokens=np.full(count, 50), output_tokens=np.full(count, 9), rejected=np.zeros(count, dtype=bool),
            replica=target,
        ),
        log(steps),
        span_frame([]),
        totals(("prefill",) * prefills + ("decode",) * decodes),
        transfer_frame([tuple(row) for row in rows]),
        link_frame([NASTY, "b"], [1e9, 4e9], [5e10, 1e10]),
    )  # fmt: skip
    return replace(made, **changed)


def groups(svg: str, name: str) -> list[ET.Element]:
    return [group for group in ET.fromstring(svg).iter(f"{SVG}g") if group.get("class") == name]


def bars(lane: ET.Element, phase: str) -> list[tuple[float, float, float]]:
    """Left, right and height of a lane's bars."""
    path = next((path.get("d") or "" for path in lane.iter(f"{SVG}path") if path.get("class") == phase), "")
    found = re.findall(r"M([-\d.]+) ([-\d.]+)V([-\d.]+)H([-\d.]+)V\2z", path)
    assert len(found) == path.count("M")
    return [(float(left), float(right), float(floor) - float(top)) for left, floor, top, right in found]


def place(time_s: float, window: tuple[float, float]) -> float:
    return LEFT + (time_s - window[0]) / (window[1] - window[0]) * (WIDTH - LEFT - RIGHT)


def test_every_replica_has_a_lane_with_its_steps_in_it() -> None:
    result = pooled()
    window = (50.0, 55.0)
    lanes = groups(timeline_figure(result, "run", window_s=window), "lane")
    assert [lane.get("data-replica") for lane in lanes] == ["0", "1", "2"]
    for number, lane in enumerate(lanes[:2]):
        assert bars(lane, "decode") == bars(lane, "mixed") == []
        own = result.steps[(result.steps["replica"] == number)]
        own = own[(own["end_s"] > window[0]) & (own["start_s"] < window[1])]
        drawn = bars(lane, "prefill")
        assert len(drawn) == len(own) >= 10
        for (left, right, _), start_s, end_s in zip(drawn, own["start_s"], own["end_s"], strict=True):
            assert left == pytest.approx(place(start_s, window), abs=0.06)
            assert right == pytest.approx(place(end_s, window), abs=0.7)
    # Ten steps of 25 ms to a row: each is drawn, for it is wider than 3 pixels; they fill the window.
    drawn = bars(lanes[2], "decode")
    assert len(drawn) == pytest.approx(5.0 / 0.025, abs=2)
    assert {round(height) for _, _, height in drawn} == {34}


def test_bars_are_as_tall_as_their_batch() -> None:
    rows = [
        {"start_s": float(i), "end_s": i + 1.0, "steps": 1, "prefill_tokens": tokens, "decode_sequences": sequences}
        for i, (tokens, sequences) in enumerate([(100, 0), (50, 0), (0, 8), (0, 2), (50, 8)])
    ]
    result = pooled(4, steps=log(rows), totals=totals(("aggregated",)), transfers=transfer_frame([]))
    (lane,) = groups(timeline_figure(result, "run", window_s=(0.0, 5.0)), "lane")
    heights = {phase: [height for _, _, height in bars(lane, phase)] for phase in ("prefill", "decode", "mixed")}
    assert [[round(height / 34.0, 2) for height in heights[phase]] for phase in heights] == [
        [1.0, 0.56], [1.0, 0.34], [1.0]
    ]  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(st.floats(0.0, 90.0), st.floats(0.05, 40.0))
def test_every_transfer_of_the_window_is_drawn_once(low: float, wide: float) -> None:
    result = pooled()
    high = low + wide
    svg = timeline_figure(result, "run", window_s=(low, high))
    seen = (result.transfers["landed_s"] >= low) & (result.transfers["ready_s"] <= high)
    drawn = groups(svg, "kv")
    assert len(drawn) == seen.sum()
    for group, ready_s, landed_s in zip(
        drawn, result.transfers["ready_s"][seen], result.transfers["landed_s"][seen], strict=True
    ):
        dot = group.find(f"{SVG}circle")
        assert dot is not None
        assert float(dot.get("cx", "")) == pytest.approx(place(landed_s, (low, high)), abs=0.06)
        line = [path.get("d") or "" for path in group.iter(f"{SVG}path") if "C" in (path.get("d") or "")]
        assert len(line) == 1
        assert float(line[0][1:].split()[0]) == pytest.approx(place(ready_s, (low, high)), abs=0.06)


def test_kv_that_waits_and_kv_that_goes_early_are_told_apart() -> None:
    moved = [(0, 0, 2, 1e9, 1.0, 0.5, 1.1), (1, 1, 2, 1e9, 1.0, 1.5, 1.6)]
    svg = timeline_figure(pooled(4, transfers=transfer_frame(moved)), "run", window_s=(0.0, 2.0))
    early, late = (list(group.iter(f"{SVG}path")) for group in groups(svg, "kv"))
    assert [path.get("stroke-dasharray") for path in early] == [None, None]
    assert [path.get("stroke-dasharray") for path in late] == ["2 2", None]


def test_what_is_left_out_is_said() -> None:
    result = pooled(prefills=40, decodes=20)
    svg = timeline_figure(result, "run", window_s=(0.0, 100.0))
    assert len(groups(svg, "lane")) == timelinefigure.REPLICAS
    assert f"{timelinefigure.REPLICAS} of 60 replicas are shown" in svg
    many = timeline_figure(pooled(1000), "run", window_s=(0.0, 260.0))
    assert len(groups(many, "kv")) == timelinefigure.TRANSFERS
    assert "KV goes 1000 times to another replica" in many
    assert f"{timelinefigure.TRANSFERS} transfers are shown" in many


@pytest.mark.parametrize("decodes", [1, 20])
def test_a_whole_run_is_a_small_file_too(decodes: int) -> None:
    result = pooled(4000, decodes=decodes, every_s=0.02)
    assert len(timeline_figure(result, "run", window_s=(0.0, 90.0))) < 150_000
    assert len(timeline_figure(result, "run")) < 150_000


def test_bytes_are_conserved_and_means_are_means() -> None:
    axis = timelinefigure._Axis(0.0, 10.0)
    rates = timelinefigure._means(axis, [1.0, 2.5, -5.0, 9.9], [2.0, 2.5001, 1.0, 30.0], [3.0, 1e4, 2.0, 5.0])
    assert rates.sum() * 10.0 / len(rates) == pytest.approx(3.0 + 1.0 + 2.0 + 0.5)
    assert rates[0] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(5.0)


def test_the_middle_of_a_run() -> None:
    result = pooled()
    low, high = middle_s(result)
    assert result.requests["arrival_s"].between(low, high, inclusive="left").sum() == timelinefigure.ARRIVALS
    assert low + high == pytest.approx(100.0, abs=0.5)
    assert middle_s(pooled(3)) == (0.0, pytest.approx(0.5 + 0.35 + 0.25))
    together = pooled(100, every_s=0.0)
    low, high = middle_s(together)
    assert low == 0.0 < high


def test_no_word_is_taken_for_markup() -> None:
    svg = timeline_figure(pooled(), NASTY)
    root = ET.fromstring(svg)
    assert root.findtext(f"{SVG}title") == NASTY
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert NASTY in texts
    assert ET.fromstring(timeline_figure(pooled(4), "a \x07 bell")).findtext(f"{SVG}title") == r"a \x07 bell"
    assert any(text is not None and f"{NASTY}, 50 % of 1 GB/s" in text for text in texts)


def test_empty_and_odd_runs_are_pictures_too() -> None:
    whole = pooled()
    none = replace(whole, requests=whole.requests.iloc[:0], steps=log([]).iloc[:0], transfers=transfer_frame([]))
    nan = float("nan")
    rejected = request_frame(
        arrival_s=[1.0], first_schedule_s=[nan], first_token_s=[nan], finish_s=[nan], prompt_tokens=[4],
        output_tokens=[4], rejected=[True], replica=[-1],
    )  # fmt: skip
    for result in (
        none,
        replace(none, totals=replace(whole.totals, makespan_s=0.0)),
        replace(none, requests=rejected),
        replace(whole, steps=None, spans=None),
        replace(whole, totals=replace(whole.totals, roles=())),
    ):
        svg = timeline_figure(result, "run")
        assert len(groups(svg, "lane")) == 3
        assert not re.search(r"nan|inf[^o]", svg)
        ET.fromstring(svg)
    assert "steps were not recorded" in timeline_figure(replace(whole, steps=None), "run")
    with pytest.raises(ValueError, match="expected one that ends after it begins"):
        timeline_figure(whole, "run", window_s=(2.0, 2.0))


def test_lanes_that_share_a_replicas_kv_are_drawn() -> None:
    rows = [
        {"lane": 0, "end_s": 2.0, "steps": 1, "prefill_tokens": 5},
        {"lane": 1, "end_s": 2.0, "steps": 1, "decode_sequences": 5},
    ]
    result = pooled(2, steps=log(rows), totals=totals(("aggregated",)), transfers=transfer_frame([]))
    (lane,) = groups(timeline_figure(result, "run", window_s=(0.0, 2.0)), "lane")
    assert len(bars(lane, "prefill")) == len(bars(lane, "decode")) == 1


def test_the_title_says_what_runs() -> None:
    pools = (Pool(2, tp=4, role="prefill"), Pool(1, tp=8, role="decode", hardware="a100-80-sxm"))
    plan = Plan("llama-3.1-70b", "h100-sxm", 8, pools, also={"a100-80-sxm": 8})
    svg = run_figure(pooled(), plan)
    said = "llama-3.1-70b on 8 h100-sxm and 8 a100-80-sxm: prefill 2 x tp=4 + decode 1 x tp=8 on a100-80-sxm"
    assert ET.fromstring(svg).findtext(f"{SVG}title") == said
