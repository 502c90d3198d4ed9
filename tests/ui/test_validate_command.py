"""`shardwise validate serving`, run in this process on a few points that the simulator itself measured."""

import csv
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from hwmodels.errors import MeasurementError
from planner.plan import Plan, Pool
from planner.validation.case import Case, Layout, Unmapped
from planner.validation.serving import predict
from simulator.workload import Requests, Workload
from ui.cli import main

METRICS = ("ttft", "tpot", "throughput", "e2e")
ERRORS = {"mape", "median_ape", "bias", "spearman", "n"}
NASTY = "</script><b>row & 'one'"


def point(row: str, tp: int, factor: float, *, system: str = "h100_sxm", backend: str = "vllm") -> Case:
    """A closed loop whose measurement is what the simulator says, divided by `factor`: it predicts too much by it."""
    pool = Pool(1, tp=tp)
    requests = Requests(np.zeros(16), [200] * 16, [12] * 16)
    labels = {"system": system, "backend": backend, "mode": "agg", "layout": f"tp={tp}"}
    case = Case(row, labels, Plan("llama-3.1-8b", "h100-sxm", 4, (pool,)), Workload(requests, 4), {}, ("chat", "4"))
    (found,) = predict(Layout((case,)), "analytic", jobs=1).predictions
    measured = {metric: found.predicted[metric] / factor for metric in ("ttft", "tpot")}
    return Case(row, labels, case.plan, case.workload, measured, case.choice)


@pytest.fixture(scope="module")
def layout() -> Layout:
    cases = (
        point(NASTY, 1, 1.25),
        point("again", 1, 1.0),
        point("two", 2, 2.0, backend="sglang"),
        Case("huge", {"system": "h100_sxm"}, Plan("llama-3.1-405b", "h100-sxm", 1, (Pool(1),)),
             Workload(Requests([0.0], [8], [8]), 1), {"ttft": 1.0}, ()),
    )  # fmt: skip
    return Layout(cases, (Unmapped("torn", {"system": "h100_sxm", "mode": "disagg"}, "disaggregated"),))


@pytest.fixture(autouse=True)
def reader(monkeypatch, layout):
    """Files are read by another module; here every file holds the points above."""

    def read_layout(path: Path, filters) -> Layout:
        if not Path(path).exists():
            raise MeasurementError(f"{path}: no such file, expected a table; check the path")

        def kept(row) -> bool:
            return all(row.labels.get(label) == value for label, value in filters.items())

        return Layout(tuple(filter(kept, layout.cases)), tuple(filter(kept, layout.unmapped)))

    module = ModuleType("planner.validation.read")
    module.read_layout = read_layout
    monkeypatch.setitem(sys.modules, "planner.validation.read", module)


@pytest.fixture
def table(tmp_path) -> str:
    path = tmp_path / "points.csv"
    path.write_text("read by the module above\n")
    return str(path)


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["validate", "serving", *words, "--jobs", "1"])
    out, err = capsys.readouterr()
    return code, out, err


def answer(capsys, *words: str) -> dict:
    code, out, err = run(capsys, *words, "--cost", "analytic", "--json")
    assert (code, err) == (0, "")
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_one_object_with_the_agreed_keys(capsys, table):
    found = answer(capsys, table)
    assert {"version", "rows", "mapped", "unmapped", "groups", "regret", "noise", *METRICS} <= set(found)
    assert (found["version"], found["rows"], found["mapped"]) == (1, 5, 3)
    assert found["unmapped"] == {"disaggregated": 1, "does not fit in memory": 1}
    assert found["mapped"] + sum(found["unmapped"].values()) == found["rows"]
    for metric in METRICS:
        assert set(found[metric]) == ERRORS
    for metric in ("ttft", "tpot"):
        assert found[metric]["n"] == 3
        assert found[metric]["mape"] == pytest.approx((0.25 + 0 + 1) / 3)
        assert found[metric]["bias"] == pytest.approx(found[metric]["mape"])
        assert found[metric]["median_ape"] == pytest.approx(0.25)
    assert found["throughput"] == {"mape": None, "median_ape": None, "bias": None, "spearman": None, "n": 0}
    assert set(found["groups"]) == {"system", "backend", "mode", "layout", "file"}
    assert found["groups"]["backend"]["sglang"]["tpot"]["mape"] == pytest.approx(1.0)
    assert set(found["groups"]["backend"]["vllm"]) == set(METRICS)
    assert found["groups"]["file"]["points.csv"]["ttft"]["n"] == 3
    assert {"mean", "p90", "n"} <= set(found["regret"])
    assert found["regret"]["n"] == 1
    assert set(found["regret"]["latency"]) == {"e2e", "tpot", "ttft"}
    assert found["regret"]["latency"]["tpot"]["n"] == 1
    assert found["noise"]["ttft"]["sets"] == 1
    assert found["noise"]["ttft"]["mean_spread"] == pytest.approx(0.2 / 0.9)  # 1 and 0.8 about their mean
    assert found["evidence"] == {"analytic": pytest.approx(1.0)}


def test_a_filter_selects_rows(capsys, table):
    found = answer(capsys, table, "--filter", "backend=sglang, mode=agg")
    assert (found["rows"], found["mapped"], found["unmapped"]) == (1, 1, {})
    assert found["ttft"]["spearman"] is None
    assert (found["regret"]["n"], found["regret"]["mean"]) == (0, None)


def test_several_files_are_one_report_with_a_group_each(capsys, tmp_path):
    paths = [tmp_path / "a" / "x.csv", tmp_path / "b" / "x.csv", tmp_path / "y.csv"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    found = answer(capsys, *map(str, paths[1:]))
    assert set(found["groups"]["file"]) == {"x.csv", "y.csv"}
    assert found["rows"] == 10
    alike = answer(capsys, *map(str, paths[:2]))
    assert set(alike["groups"]["file"]) == {str(path) for path in paths[:2]}
    code, _, err = run(capsys, str(paths[0]), str(paths[0]))
    assert (code, err.count("\n")) == (2, 1)


def test_tables_on_a_terminal(capsys, table):
    code, out, err = run(capsys, table, "--cost", "analytic")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    said = " ".join(out.split())
    for words in (
        *(
            "5 rows of",
            "3 predicted, 2 not",
            "analytic 100 %",
            "TTFT",
            "TPOT",
            "MAPE",
            "median APE",
            "bias",
            "Spearman",
        ),
        *("By backend", "sglang", "Regret: mean", "does not fit in memory", "disaggregated"),
    ):
        assert words in said, words
    assert max(map(len, out.splitlines())) <= 120


class Page(HTMLParser):
    """What a browser would make of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data) -> None:
        if self.tags[-1:] in (["td"], ["th"]):
            self.cells.append(data)


def test_saved_files(capsys, table, tmp_path, layout):
    folder = tmp_path / "new" / "out"
    found = answer(capsys, table, "--save", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["choices.csv", "report.html", "report.json", "rows.csv"]
    assert json.loads((folder / "report.json").read_text()) == found

    rows = pd.read_csv(folder / "rows.csv").set_index("row")
    assert len(rows) == found["rows"]
    assert rows.loc[NASTY, "error_ttft"] == pytest.approx(0.25)
    assert rows.loc["two", "predicted_tpot"] == pytest.approx(2 * rows.loc["two", "measured_tpot"])
    assert rows.loc["two", "evidence_analytic"] == pytest.approx(1.0)
    assert rows.loc["two", "layout"] == "tp=2"
    assert rows.loc["torn", "unmapped"] == "disaggregated"
    assert rows.loc["huge", "unmapped"] == "does not fit in memory"
    assert "GiB" in rows.loc["huge", "detail"]
    assert rows["unmapped"].isna().sum() == found["mapped"]
    with (folder / "rows.csv").open(encoding="utf-8", newline="") as file:
        assert len({len(line) for line in csv.reader(file)}) == 1

    (choice,) = pd.read_csv(folder / "choices.csv").to_dict("records")
    assert choice["layouts"] == 2
    assert choice["regret"] == pytest.approx(found["regret"]["mean"])

    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.outside  # nothing is fetched from anywhere
    assert "b" not in page.tags  # what a row is called is no markup
    assert page.tags.count("script") >= 3
    assert {"TTFT", "does not fit in memory", "disaggregated", "sglang"} <= set(page.cells)
    assert 'id="plot-ttft"' in text
    assert 'id="plot-tpot"' in text
    assert "plot-throughput" not in text  # was not measured
    assert "vllm on h100_sxm" in text


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--filter", "system"], 2, "'system' found, expected label=value"),
        (["--filter", "=x"], 2, "expected label=value"),
        (["--filter", "mode=agg,mode=disagg"], 2, "mode is given twice"),
        (["--filter", "mode=agg,,"], 2, "'' found, expected label=value"),
        (["--filter", "system=tpu"], 2, "--filter system=tpu: selects no row"),
        (["--cost", "guessed"], 2, "expected one of analytic, calibrated, measured"),
        (["--save", "/dev/null/x"], 8, "cannot be written"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, table, words, code, said):
    found, out, err = run(capsys, table, *words)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_a_missing_file_is_one_line(capsys):
    code, out, err = run(capsys, "no-such.csv")
    assert (code, out, err.count("\n")) == (MeasurementError.exit_code, "", 1)


def test_nothing_predicted_is_still_a_report(capsys, table, tmp_path):
    found = answer(capsys, table, "--filter", "mode=disagg", "--save", str(tmp_path / "out"))
    assert (found["rows"], found["mapped"], found["unmapped"]) == (1, 0, {"disaggregated": 1})
    assert found["ttft"]["n"] == 0
    assert "disaggregated" in (tmp_path / "out" / "report.html").read_text()
    code, out, _ = run(capsys, table, "--filter", "mode=disagg", "--cost", "analytic")
    assert code == 0
    assert "1 row of" in out
