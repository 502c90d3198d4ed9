"""InferenceX results and MLPerf summaries, and what the reader says of files it does not know."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from hwmodels.errors import MeasurementError
from planner.planfile import check_plan
from planner.validation.case import Case, Layout
from planner.validation.read import read_layout

RESULT = {
    "hw": "h200-nb", "model": "deepseek-ai/DeepSeek-R1-0528", "framework": "sglang", "precision": "fp8", "isl": 1024,
    "osl": 1024, "conc": 32, "tp": 8, "ep": 1, "dp_attention": "false", "tput_per_gpu": 500.0,
    "output_tput_per_gpu": 250.0, "mean_ttft": 0.4, "median_ttft": 0.3, "mean_tpot": 0.02, "mean_intvty": 50.0,
    "mean_e2el": 21.0,
}  # fmt: skip
MLPERF = {
    "SystemName": "DGX", "accelerator_model_name": "NVIDIA H200-SXM-141GB", "accelerators_per_node": 8,
    "number_of_nodes": 1, "MlperfModel": "llama2-70b-99", "Scenario": "Offline", "Result": 34000.0, "Units": "Tokens/s",
}  # fmt: skip
SETUP = "- {tp: 1, precision: fp8, isl: 300, osl: 294, requests: 500}\n"


def results(folder: Path, *rows: Mapping[str, object]) -> Layout:
    path = folder / "agg.json"
    path.write_text(json.dumps(list(rows)))
    return read_layout(path)


def one(found: Layout) -> Case:
    assert not found.unmapped, found.unmapped
    (case,) = found.cases
    check_plan(case.plan)
    return case


def changed(row: Mapping[str, object], **cells: object) -> dict[str, object]:
    return {key: value for key, value in {**row, **cells}.items() if value is not None}


def test_a_result_is_a_case_with_all_its_metrics(tmp_path: Path) -> None:
    case = one(results(tmp_path, RESULT))
    assert case.measured == {"ttft": 0.4, "tpot": 0.02, "e2e": 21.0, "throughput": 2000.0}
    assert (case.plan.model, case.plan.hardware, case.plan.gpus) == ("deepseek-r1", "hgx-h200", 8)
    assert (case.workload.concurrency, case.labels["statistic"]) == (32, "mean")


def test_other_names_and_milliseconds(tmp_path: Path) -> None:
    renamed = {
        "hardware": "h200",
        "backend": "sglang",
        "concurrency": 32,
        "mean_ttft_ms": 400.0,
        "median_tpot_ms": 20.0,
    }
    gone = dict.fromkeys(["hw", "framework", "conc", "mean_ttft", "median_ttft", "mean_tpot", "mean_intvty"])
    case = one(results(tmp_path, changed(RESULT, **renamed, **gone)))
    assert (case.measured["ttft"], case.measured["tpot"]) == (pytest.approx(0.4), pytest.approx(0.02))
    assert case.labels["statistic"] == "mean and median"


def test_interactivity_is_the_inverse_of_tpot(tmp_path: Path) -> None:
    assert one(results(tmp_path, changed(RESULT, mean_tpot=None))).measured["tpot"] == pytest.approx(0.02)


def test_metrics_may_be_nested(tmp_path: Path) -> None:
    names = [key for key in RESULT if key.startswith(("mean_", "median_")) or "tput" in key]
    nested = {**changed(RESULT, **dict.fromkeys(names)), "metrics": {name: RESULT[name] for name in names}}
    assert one(results(tmp_path, nested)).measured["throughput"] == 2000.0


def test_dp_attention_makes_every_rank_a_group(tmp_path: Path) -> None:
    pool = one(results(tmp_path, changed(RESULT, dp_attention=True, ep=8, framework="trt"))).plan.pools[0]
    assert (pool.tp, pool.attention_dp, pool.ep, pool.expert_tp) == (1, 8, 8, 1)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"disagg": True}, "disaggregated"),
        ({"spec_decoding": "mtp"}, "speculative"),
        ({"ep": 3}, "do not agree"),
        ({"conc": None}, "conc is missing"),
        ({"framework": "atom"}, "engine"),
        ({"mean_ttft": -0.4}, "not positive"),
    ],
)
def test_results_that_cannot_be_mapped(tmp_path: Path, cells: Mapping[str, object], expected: str) -> None:
    found = results(tmp_path, RESULT, {**RESULT, **cells})
    assert len(found.cases) == 1
    assert expected in found.unmapped[0].reason


def mlperf(folder: Path, setup: str | None, **cells: object) -> Layout:
    path, row = folder / "summary.csv", {**MLPERF, **cells}
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([list(row), list(row.values())])
    if setup is not None:
        path.with_suffix(".yaml").write_text(setup)
    return read_layout(path)


def test_an_offline_result_fills_the_system_with_replicas(tmp_path: Path) -> None:
    case = one(mlperf(tmp_path, SETUP))
    assert (case.plan.model, case.plan.gpus, case.plan.pools[0].replicas) == ("llama-2-70b", 8, 8)
    assert case.measured == {"throughput": 34000.0}
    assert len(case.workload.requests) == 500
    assert set(case.workload.requests.arrival_s) == {0.0}


def test_a_server_result_is_driven_at_its_rate(tmp_path: Path) -> None:
    requests = one(mlperf(tmp_path, SETUP, Scenario="Server")).workload.requests
    assert requests.rate_per_s == pytest.approx(34000 / 294, rel=0.2)


def test_mlperf_rows_that_cannot_be_mapped(tmp_path: Path) -> None:
    assert "no configuration" in mlperf(tmp_path, None).unmapped[0].reason
    assert "tokens per second" in mlperf(tmp_path, SETUP, Units="Samples/s").unmapped[0].reason
    assert "scenario" in mlperf(tmp_path, SETUP, Scenario="SingleStream").unmapped[0].reason
    match = "- {match: {Scenario: Server}, tp: 1, precision: fp8, isl: 300, osl: 294}\n"
    assert "no entry" in mlperf(tmp_path, match).unmapped[0].reason
    assert "more ranks" in mlperf(tmp_path, SETUP.replace("tp: 1", "tp: 8"), accelerators_per_node=4).unmapped[0].reason


@pytest.mark.parametrize(
    ("setup", "told"),
    [
        ("- {tp: 1}\n", "precision"),
        ("- {tp: 0, precision: fp8, isl: 1, osl: 1}\n", "tp"),
        ("- {precision: fp3, isl: 1, osl: 1}\n", "number format"),
        ("- {precision: fp8, isl: 1, osl: 1, engine: abacus}\n", "abacus"),
        ("- 5\n", "entry 1 is 5"),
        ("- {tp: [\n", "expected YAML"),
    ],
)
def test_a_bad_configuration_is_named_with_its_entry(tmp_path: Path, setup: str, told: str) -> None:
    with pytest.raises(MeasurementError, match=rf"summary\.yaml: .*{told}"):
        mlperf(tmp_path, setup)


def test_unknown_columns_are_told_with_the_layouts_known(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("colour,taste\nred,sweet\n")
    with pytest.raises(MeasurementError, match=r"other\.csv: columns colour, taste: .*silicon \(.*mlperf \("):
        read_layout(path)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "", "is not a table"),
        ("a.csv", "hw,model\n", "has no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "is not a table"),
        ("a.json", "{", "is not a table"),
        ("a.json", "[1, 2]", "another kind"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, name: str, text: str, told: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(MeasurementError, match=told):
        read_layout(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="cannot be read"):
        read_layout(tmp_path / "none.csv")
