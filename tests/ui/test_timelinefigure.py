"""The picture of a run: well-formed whatever is in it, small, and with every bar and transfer of its window."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.plan import Plan, Pool
from simulator.encode import EncodeUse
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
from ui import timelinecharts, timelinefigure
from ui.timelinecharts import LEFT, RIGHT, WIDTH
from ui.timelinefigure import middle_s, run_figure, timeline_figure

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
        line = [path.get("d") or "" for path in group.iter(f"{SVG}path") if "C" in (path.get("d") or "")]
        if landed_s > high:
            assert dot is None
            assert all(float(path.split()[-2]) == WIDTH - RIGHT for path in line)
            continue
        assert dot is not None
        assert float(dot.get("cx", "")) == pytest.approx(place(landed_s, (low, high)), abs=0.06)
        assert len(line) == 1
        assert float(line[0][1:].split()[0]) == pytest.approx(place(ready_s, (low, high)), abs=0.06)


def test_kv_that_waits_and_kv_that_goes_early_are_told_apart() -> None:
    moved = [(0, 0, 2, 1e9, 1.0, 0.5, 1.1), (1, 1, 2, 1e9, 1.0, 1.5, 1.6)]
    svg = timeline_figure(pooled(4, transfers=transfer_frame(moved)), "run", window_s=(0.0, 2.0))
    early, late = (list(group.iter(f"{SVG}path")) for group in groups(svg, "kv"))
    assert [path.get("stroke-dasharray") for path in early] == [None, None]
    assert [path.get("stroke-dasharray") for path in late] == ["2 2", None]


def test_kv_under_way_when_the_window_ends_is_drawn_to_its_edge() -> None:
    rows = [
        (0, 0, 2, 1e9, 1.0, 1.0, 9.0),  # sent, not there yet
        (1, 1, 2, 1e9, 3.0, 1.0, 3.5),  # layers go while the prompt is computed
        (2, 0, 2, 1e9, 1.0, 3.0, 4.0),  # waits for room
        (3, 0, 2, 1e9, 3.0, 2.5, 3.2),  # later
    ]
    svg = timeline_figure(pooled(4, transfers=transfer_frame(rows)), "run", window_s=(0.0, 2.0))
    sent, ahead, waits = (list(group.iter(f"{SVG}path")) for group in groups(svg, "kv"))
    assert [len(paths) for paths in (sent, ahead, waits)] == [1, 1, 1]
    assert float((sent[0].get("d") or "").split()[-2]) == WIDTH - RIGHT
    assert (ahead[0].get("stroke-width"), waits[0].get("stroke-dasharray")) == ("2.5", "2 2")
    for path in (*ahead, *waits):
        assert float((path.get("d") or "").partition("H")[2]) > WIDTH - RIGHT
    assert "KV goes 3 times" in svg


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
    axis = timelinecharts.Axis(0.0, 10.0)
    rates = timelinecharts.means(axis, [1.0, 2.5, -5.0, 9.9], [2.0, 2.5001, 1.0, 30.0], [3.0, 1e4, 2.0, 5.0])
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


def test_the_window_of_a_congested_run_holds_steps_and_answers() -> None:
    count = 1000
    arrival_s = 0.001 * np.arange(count)
    ends_s = 0.5 * np.arange(1, count + 1)
    steps = [{"start_s": end - 0.5, "end_s": end, "steps": 1, "prefill_tokens": 50, "kv_blocks": 10} for end in ends_s]
    requests = request_frame(
        arrival_s=arrival_s, first_schedule_s=ends_s - 0.5, first_token_s=ends_s, finish_s=ends_s,
        prompt_tokens=np.full(count, 50), output_tokens=np.full(count, 1), rejected=np.zeros(count, dtype=bool),
    )  # fmt: skip
    one = totals(("aggregated",))
    jammed = pooled(4, requests=requests, steps=log(steps), totals=one, transfers=transfer_frame([]))
    low, high = middle_s(jammed)
    assert low == pytest.approx(0.485)
    in_it = requests["arrival_s"].between(low, high) & (requests["first_token_s"] <= high)
    assert in_it.sum() >= timelinefigure.ANSWERED
    assert (
        jammed.steps["start_s"].between(low, high) & (jammed.steps["end_s"] <= high)
    ).sum() >= timelinefigure.PROMPTS
    quick = replace(jammed, requests=requests.assign(first_token_s=arrival_s))
    low, high = middle_s(quick)
    assert high - low == pytest.approx(timelinefigure.STEPS * 0.5, abs=0.5)


def texts(svg: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter(f"{SVG}text"))


@pytest.mark.parametrize("title", ["one " * 80, "x" * 700, "a title of usual length"])
def test_no_line_of_words_goes_over_the_edge(title: str) -> None:
    use = EncodeUse(workers=3, requests=10, tiles=40, use=0.5, wait_mean_s=0.1, mean_s=0.2)
    both = pooled().steps.assign(decode_sequences=lambda rows: np.where(rows["start_s"] % 1 < 0.5, 3, 0))
    many = pooled(
        encode=use,
        steps=pd.concat([both, pooled().steps]),
        totals=replace(totals(("prefill", "prefill", "decode")), requeued=12, role_switches=1234),
        links=link_frame([NASTY * 10], [1e9], [1e9]),
    )
    svg = timeline_figure(many, title)
    for element in texts(svg):
        letter = timelinecharts.BOLD if element.get("font-weight") == "600" else timelinecharts.PLAIN
        wide = len(element.text or "") * int(element.get("font-size", "")) * letter
        x = float(element.get("x", ""))
        at = {"start": x, "middle": x - wide / 2, "end": x - wide}[element.get("text-anchor", "")]
        assert at >= 0 and at + wide <= WIDTH, element.text
    tops = [float(lane.get("y", "")) for lane in ET.fromstring(svg).iter(f"{SVG}rect") if lane.get("fill-opacity")]
    lines = [float(element.get("y", "")) for element in texts(svg) if element.get("x") == "26.0"]
    assert sorted(lines)[1] < min(tops)


def test_failures_roles_and_encoders_are_said() -> None:
    usual = timeline_figure(pooled(), "run")
    assert not any(word in usual for word in ("anew", "change", "encode", "no step after"))
    assert "request waits<" in usual
    lost = replace(totals(("prefill", "prefill", "decode")), requeued=1, role_switches=2)
    svg = timeline_figure(pooled(totals=lost), "run")
    assert "1 request started anew after failures" in svg and "2 changes of role" in svg
    workers = EncodeUse(workers=3, requests=10, tiles=40, use=0.5, wait_mean_s=0.1, mean_s=0.2)
    outside = timeline_figure(pooled(encode=workers), "run")
    assert "request waits or is encoded" in outside and "by 3 encode workers outside these lanes" in outside
    inside = timeline_figure(pooled(encode=EncodeUse(0, 10, 40, 0.5)), "run")
    assert "request waits<" in inside and "Images are encoded in prompt steps" in inside


def test_a_lane_without_further_steps_says_since_when() -> None:
    whole = pooled()
    steps = whole.steps[~((whole.steps["replica"] == 1) & (whole.steps["end_s"] > 51.0))]
    last_s = steps[steps["replica"] == 1]["end_s"].max()
    said = [element.text for element in texts(timeline_figure(replace(whole, steps=steps), "run", window_s=(50, 55)))]
    assert said.count(f"no step after {last_s:.4g} s") == 1
    assert sum(text is not None and "no step" in text for text in said) == 1


def test_a_run_that_served_nothing_is_an_empty_picture() -> None:
    nan = float("nan")
    requests = request_frame(
        arrival_s=[1.0, 1.7], first_schedule_s=[nan] * 2, first_token_s=[nan] * 2, finish_s=[nan] * 2,
        prompt_tokens=[4, 4], output_tokens=[4, 4], rejected=[True] * 2, replica=[-1] * 2,
    )  # fmt: skip
    nothing = replace(totals(("prefill", "decode")), makespan_s=0.0)
    empty = pooled(4, requests=requests, steps=log([]), totals=nothing, transfers=transfer_frame([]))
    svg = timeline_figure(empty, "run")
    assert "All 2 requests were rejected." in svg and "no step ran" in svg
    assert "of a run of" not in svg and not groups(svg, "chart")
    assert len(groups(svg, "lane")) == 2


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
    said = "llama-3.1-70b on 8 x h100-sxm and 8 x a100-80-sxm: 2 x prefill tp=4 + 1 x decode on a100-80-sxm tp=8"
    assert ET.fromstring(svg).findtext(f"{SVG}title") == said
    shared = Plan("llama-3.1-8b", "h100-sxm", 4, (Pool(4, sharing="nexus"),))
    svg = run_figure(pooled(), shared)
    assert ET.fromstring(svg).findtext(f"{SVG}title") == "llama-3.1-8b on 4 x h100-sxm: 4 x nexus tp=1"
