"""Saved results read back as they were, and appear complete or not at all."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from simulator import save
from simulator.errors import SaveError
from simulator.metrics import summarize
from simulator.result import Result, RunTotals, link_frame, request_frame, transfer_frame
from simulator.save import save_result, write_files, write_text

nan = float("nan")
FILES = ["metrics.json", "requests.csv", "requests.parquet", "timeline.json"]
TOTALS = RunTotals(
    gpus=1,
    replicas=1,
    makespan_s=3.0,
    model_flops=nan,
    hbm_bytes=nan,
    energy_j=nan,
    price_usd_per_h=None,
    peak_flops_per_s=1.0,
    memory_bytes_per_s=1.0,
    lanes=(1,),
    kv_blocks=(10,),
    seed=7,
    events=0,
)
RESULT = Result(
    request_frame(
        arrival_s=[0.0, 0.1 + 0.2],
        first_schedule_s=[0.0, nan],
        first_token_s=[1.0, nan],
        finish_s=[3.0, nan],
        prompt_tokens=[4, 4],
        output_tokens=[5, 1],
        rejected=[False, True],
        class_names=["chat, short"],
    ),
    None,
    None,
    TOTALS,
)
METRICS = summarize(RESULT)


def test_what_is_saved_reads_back(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    save_result(RESULT, METRICS, folder, also={"plan.yaml": "version: 1\n"})
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "plan.yaml"])
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "requests.parquet"), RESULT.requests)
    with (folder / "requests.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(RESULT.requests.columns)
    assert [float(line["arrival_s"]) for line in table] == [0.0, 0.1 + 0.2]
    assert [line["slo_class"] for line in table] == ["chat, short"] * 2
    assert [line["ttft_s"] for line in table] == ["1", ""]
    numbers = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert numbers["overall"]["rejected"] == 1
    assert numbers["mfu"] is None
    assert numbers["totals"]["seed"] == 7
    assert json.loads((folder / "timeline.json").read_text())["traceEvents"]


def test_transfers_and_links_are_saved_where_there_are_any(tmp_path: Path) -> None:
    moved = replace(
        RESULT,
        transfers=transfer_frame([(0, 0, 1, 0.1 + 0.2, 1.0, 0.5, 2.0)]),
        links=link_frame(["nic 0, out", "nic 1, in"], [10.0, 40.0], [15.0, 0.0]),
    )
    save_result(moved, METRICS, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([*FILES, "links.csv", "transfers.csv"])
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "run" / "transfers.csv"),
        moved.transfers,
        check_dtype=False,
        check_exact=True,
    )
    links = pd.read_csv(tmp_path / "run" / "links.csv")
    assert links["name"].tolist() == ["nic 0, out", "nic 1, in"]
    assert links["utilisation"].tolist() == [15.0 / (10.0 * TOTALS.makespan_s), 0.0]

    idle = replace(moved, transfers=transfer_frame([]), totals=replace(TOTALS, makespan_s=0.0))
    save_result(idle, METRICS, tmp_path / "idle")
    assert not (tmp_path / "idle" / "transfers.csv").exists()
    assert pd.read_csv(tmp_path / "idle" / "links.csv")["utilisation"].isna().all()
    save_result(RESULT, METRICS, tmp_path / "run")
    for name in ("links.csv", "transfers.csv"):
        assert pd.read_csv(tmp_path / "run" / name).empty


def test_a_failure_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(result: Result, path: Path) -> None:
        path.write_text("half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "_write_timeline", full)
    with pytest.raises(SaveError, match="No space left") as caught:
        save_result(RESULT, METRICS, tmp_path / "a" / "run")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 8
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "requests.csv").write_text("old")
    with pytest.raises(SaveError):
        save_result(RESULT, METRICS, tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("requests.csv", "old")]


def test_a_bug_midway_leaves_nothing_and_stays_a_bug(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        write_files(tmp_path / "run", {"a": lambda path: None, "b": broken})
    assert list(tmp_path.iterdir()) == []


def test_files_are_replaced_together_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    save_result(RESULT, METRICS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "notes.txt"])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "metrics.json").read_text())["overall"]["requests"] == 2


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_failure_between_two_files_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    (tmp_path / "a").write_text("old a")
    (tmp_path / "c").write_text("old c")
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == nth:
            raise PermissionError(1, "Operation not permitted")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SaveError, match="not permitted"):
        write_files(tmp_path, {name: save._text("new") for name in "abc"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old a", "c": "old c"}


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "metrics.json").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "taken", tmp_path / ("x" * 300)):
        with pytest.raises(SaveError, match="cannot be written"):
            save_result(RESULT, METRICS, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
    assert (tmp_path / "file").read_text() == "mine"


def test_one_text_file_replaces_another(tmp_path: Path) -> None:
    write_text(tmp_path / "plan.yaml", "old")
    write_text(tmp_path / "plan.yaml", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("plan.yaml", "new")]
