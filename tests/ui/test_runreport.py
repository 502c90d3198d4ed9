"""Reports on real runs: every number arrives in JSON, CSV, terminal and page, and no word is taken for markup."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from planner.execute.records import EXECUTED_COLUMNS
from planner.validation.execution import Comparison, Execution, Ranked, durations, errors_by_kind, ranking
from simulator.result import request_frame
from ui import runtables
from ui.latencyfigure import LINES, WIDTH, Panel, cdf_svg, latency_figure, ticks
from ui.runpage import page
from ui.runreport import ProfileSummary, RunReport, report_object, runs_text, show_report

NASTY = "</script><b>8 & 'cores'"
COUNT = 40
SVG = "{http://www.w3.org/2000/svg}"


def requests(factor: float, *, finished: int = COUNT) -> pd.DataFrame:
    """Requests `factor` times as slow as others; those after the first `finished` never get their first token."""
    rng = np.random.default_rng(0)
    arrival_s = np.cumsum(rng.exponential(0.1, COUNT))
    ttft_s, decode_s = factor * rng.uniform(0.02, 0.4, COUNT), factor * rng.uniform(0.5, 2.0, COUNT)
    never = np.where(np.arange(COUNT) < finished, 0.0, math.nan)
    return request_frame(
        arrival_s=arrival_s, first_schedule_s=arrival_s, first_token_s=arrival_s + ttft_s + never,
        finish_s=arrival_s + ttft_s + decode_s + never, prompt_tokens=np.full(COUNT, 100),
        output_tokens=np.full(COUNT, 21), rejected=np.zeros(COUNT, dtype=bool),
    )  # fmt: skip


def execution(factor: float, *, finished: int = COUNT) -> Execution:
    """A run whose steps all are predicted to take 10 ms."""
    lasts_s = np.full(60, 0.01 * factor)
    end_s = np.cumsum(lasts_s)
    items = [((64, 0),) if i % 10 == 0 else () for i in range(60)]
    decodes = [0 if i % 20 == 0 else 4 for i in range(60)]
    values = (0, 0, end_s - lasts_s, end_s, lasts_s, decodes, [50 * n for n in decodes], items, 0, None)
    steps = pd.DataFrame(dict(zip(EXECUTED_COLUMNS, values, strict=True)))
    return Execution(requests(factor, finished=finished), steps, np.full(60, 0.01))


def report(runs: list[Execution], **kwargs) -> RunReport:
    held_out = errors_by_kind(["decode", "mixed"], [1.02, 1.04], [1.0, 1.0])
    made = RunReport(
        {"machine": NASTY, "model": "tiny <llama>", "traffic": "40 requests"},
        Comparison.of(requests(1.0), runs),
        ProfileSummary(42.0, 800, held_out),
        ranking([Ranked(f"chunked {NASTY}", 1.0, 1.1), Ranked("chunked 256/32", 2.0, 1.0)]),
    )
    return replace(made, **kwargs)


@pytest.fixture(scope="module")
def whole() -> RunReport:
    return report([execution(1.0), execution(1.25)])


def broken() -> RunReport:
    return report([execution(1.0, finished=7)], partial=f"stopped {NASTY}", ranking=None, profile=None)


def nothing() -> RunReport:
    return report([], partial="interrupted before the first step", ranking=None)


def printed(made: RunReport, width: int = 120) -> str:
    out = io.StringIO()
    show_report(Console(file=out, markup=False, highlight=False, emoji=False, width=width), made)
    return out.getvalue()


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_says_what_was_found(whole):
    found = report_object(whole)
    assert (found["version"], found["status"], "reason" in found) == (1, "complete", False)
    assert (found["requests"], found["predicted"]) == (COUNT, COUNT)
    first, second = found["runs"]
    assert first["requests"]["e2e"]["mape"] == 0.0
    assert second["requests"]["ttft"]["bias"] == pytest.approx(1 / 1.25 - 1)
    assert second["steps"]["all"]["bias"] == pytest.approx(1 / 1.25 - 1)
    assert second["finished"] == COUNT
    assert found["apart"][0]["runs"] == [1, 2]
    assert found["apart"][0]["requests"]["tpot"]["mape"] == pytest.approx(0.25)
    assert found["profile"]["passes"] == 800
    assert found["ranking"]["regret"] == pytest.approx(0.1)
    assert {target["met"] for target in found["targets"]} == {True, False}


def test_json_has_no_number_that_does_not_exist(whole):
    for made in (whole, broken(), nothing()):
        text = json.dumps(report_object(made), allow_nan=False)
        assert json.loads(text)["version"] == 1
    (run,) = report_object(broken())["runs"]
    assert run["finished"] == 7
    assert run["steps"]["prefill"]["n"] == 3
    assert [t["limit"] for t in report_object(broken())["targets"] if "two runs" in t["name"]] == [None] * 3


def test_a_run_that_broke_off_says_so():
    found = report_object(broken())
    assert (found["status"], found["reason"]) == ("partial", f"stopped {NASTY}")
    assert (found["profile"], found["ranking"]) == (None, None)


# --- CSV --------------------------------------------------------------------------------------------------------------


def test_every_request_is_a_line(whole):
    rows = list(csv.DictReader(io.StringIO(runs_text(whole.comparison))))
    assert len(rows) == COUNT
    assert [row["request"] for row in rows] == [str(i) for i in range(COUNT)]
    row = rows[3]
    assert float(row["run_2_e2e_s"]) == pytest.approx(1.25 * float(row["predicted_e2e_s"]))
    assert float(row["run_1_ttft_s"]) == float(row["predicted_ttft_s"])
    assert (row["prompt_tokens"], row["output_tokens"]) == ("100", "21")


def test_what_never_happened_is_empty():
    rows = list(csv.DictReader(io.StringIO(runs_text(broken().comparison))))
    assert [row["run_1_e2e_s"] == "" for row in rows] == [False] * 7 + [True] * (COUNT - 7)


# --- terminal ---------------------------------------------------------------------------------------------------------


def test_tables_show_targets_runs_and_noise(whole):
    text = printed(whole)
    for line in ("predicted : run 1", "predicted : run 2", "run 2 : run 1", "held-out passes", "17-64 tokens"):
        assert line in text
    assert re.search(r"median step error, held-out steps\s+3 %\s+at most 5 %\s+yes", text)
    assert re.search(r"regret of the chosen setting\s+10 %\s+at most 3 %\s+no", text)
    assert re.search(r"E2E\s+run 2 : run 1\s+40\s+\+25 %\s+25 %\s+25 %\s+25 %", text)
    assert NASTY in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_partial_report_is_readable():
    text = printed(broken())
    assert f"Partial: stopped {NASTY}" in text
    assert "it was run once" in text
    assert re.search(r"E2E\s+run 1\s+7 ", text)
    assert "there is nothing to compare" in printed(nothing())


def told(*factors: float) -> str:
    """The belief after runs so many times as slow as predicted."""
    return runtables.belief(report([execution(factor) for factor in factors]))


def test_what_to_believe_follows_from_the_errors():
    assert "comes as close as another real run." in told(0.96, 1.04)
    assert "but for 3 points at most" in told(1.02, 1.03)
    assert "TTFT, TPOT and E2E the prediction misses more than noise explains" in told(1.2, 1.21)
    # Means of the two runs 25 % apart; the prediction misses them by 0 and by 20 %, by 10 % on average.
    assert "less than 25 %" in told(1.0, 1.25)
    assert "within 10 % of what ran" in told(1.0, 1.25)


# --- page -------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Tags outside of scripts, ids, and the text that is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.text += data


def read(made: RunReport) -> Tags:
    tags = Tags()
    tags.feed(page(made))
    return tags


def test_the_page_shows_every_plot_and_takes_no_word_for_markup(whole):
    tags = read(whole)
    kinds = [f"plot-{kind}-{metric}" for kind in ("cdf", "scatter") for metric in ("ttft", "tpot", "e2e")]
    steps = [f"plot-{kind}-{run}" for run in (1, 2) for kind in ("steps", "drift")]
    assert {*kinds, *steps} <= set(tags.ids)
    assert "b" not in tags.tags  # the one in NASTY
    assert "llama" not in tags.tags
    assert NASTY in tags.text
    assert runtables.belief(whole) in tags.text


def test_the_page_of_a_partial_report():
    tags = read(broken())
    assert f"Partial: stopped {NASTY}" in tags.text
    assert "plot-drift-1" in tags.ids
    assert "plot-cdf-e2e" in read(nothing()).ids


def test_a_pipeline_has_no_step_plots():
    run = execution(1.0)
    tags = read(report([replace(run, predicted_step_s=np.full(len(durations(run.steps)), math.nan))]))
    assert "plot-scatter-e2e" in tags.ids
    assert not [name for name in tags.ids if "drift" in name or "steps" in name]


def test_a_pipeline_has_no_step_errors():
    run = execution(1.0)
    made = report([replace(run, predicted_step_s=np.full(len(durations(run.steps)), math.nan))], profile=None)
    text = printed(made)
    assert "median APE  p95 APE" not in text
    assert "What is left" not in text
    assert report_object(made)["runs"][0]["steps"]["all"]["bias"] is None


# --- figure -----------------------------------------------------------------------------------------------------------


def curves(svg: str) -> dict[str, list[list[tuple[float, float]]]]:
    """Corners of the step curves, by colour, left to right."""
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for path in ET.fromstring(svg).iter(f"{SVG}path"):
        if path.get("fill") == "none" and "V" in path.attrib["d"]:
            numbers = [float(text) for text in re.findall(r"-?\d+\.?\d*", path.attrib["d"])]
            x, y = numbers[0], numbers[1]
            corners = [(x, y)]
            for across, up in zip(numbers[2:-1:2], numbers[3::2], strict=True):
                corners.append((across, up))
            found.setdefault(path.attrib["stroke"], []).append(corners)
    return found


def test_the_figure_draws_every_latency_of_every_run(whole):
    title = f"Latencies on {NASTY}"
    svg = latency_figure(whole.comparison, title)
    root = ET.fromstring(svg)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert title in texts
    assert {"predicted", "real run 1", "real run 2", "share of requests"} <= set(texts)
    assert len([text for text in texts if text and text.startswith(("TTFT, ", "TPOT, ", "E2E, "))]) == 3
    found = curves(svg)
    assert {colour: len(drawn) for colour, drawn in found.items()} == {colour: 3 for colour, _, _ in LINES[:3]}
    # The first run is the prediction; the second is slower everywhere.
    predicted, same, slower = (found[colour] for colour, _, _ in LINES[:3])
    assert predicted == same
    for one, other in zip(predicted, slower, strict=True):
        assert np.mean([x for x, _ in other]) > np.mean([x for x, _ in one])


@given(
    st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=50),
    st.lists(st.floats(1e-5, 1e3) | st.just(math.nan), max_size=50),
)
def test_curves_rise_from_none_to_all_inside_the_picture(one, other):
    for drawn in curves(cdf_svg("x", [Panel("E2E", {"predicted": one, "run": other})])).values():
        (corners,) = drawn
        x, y = np.array(corners).T
        assert (np.diff(x) >= 0).all()
        assert (np.diff(y) <= 0).all()
        assert 0 <= x.min() <= x.max() <= WIDTH
        assert y[0] - y[-1] == pytest.approx(200.0)  # the height of a plot


def test_a_latency_that_nobody_has():
    svg = cdf_svg("x", [Panel("TPOT", {"predicted": [math.nan]})])
    assert "no TPOT" in svg
    assert curves(svg) == {}


@given(st.floats(1e-3, 1e3), st.floats(1.2, 1e4), st.booleans())
def test_ticks_are_few_and_within(low, ratio, log):
    high = low * ratio
    found = ticks(low, high, log=log)
    assert len(found) <= 8
    assert found == sorted(set(found))
    assert all(low * (1 - 1e-5) <= tick <= high * (1 + 1e-5) for tick in found)
    assert len(found) >= 1 or ratio < 10
