"""Ways of serving, several kinds of devices, budgets and failures at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ui.cli import main

SMALL = ("--model", "llama-3.1-8b", "--requests", "400", "--seconds", "2", "--token-budget", "2048", "--max-seqs", "128")
PLAN = """
model: llama-3.1-8b
hardware: h100-sxm
gpus: 3
pools:
- {replicas: 2, role: prefill}
- {replicas: 1, role: decode}
"""


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_any_way_of_serving_is_compared_and_saved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = ("plan", *SMALL, "--hardware", "h100-sxm:2,a100-80-sxm:1", "--serving", "any", "--policy", "chunked")
    code, out, err = run(capsys, *words, "--save", str(folder))
    assert (code, err) == (0, "")
    for said in ("Ways of serving", "disaggregated", "aggregated", "shared", "nearest limit", "2 x h100-sxm and 1 x a100"):
        assert said in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 120
    found = json.loads((folder / "result.json").read_text())
    assert {entry["name"] for entry in found["serving"]} == {"aggregated", "disaggregated", "shared"}
    assert found["question"]["also"] == {"a100-80-sxm": 1}
    best = next(entry for entry in found["serving"] if entry["plan"] is not None)
    assert best["rate_per_s"] > 0
    assert found["crossover"] is None or len(found["crossover"]["first"]) == len(found["crossover"]["second"])
    code, again, _ = run(capsys, "simulate", str(folder / "plan.yaml"), "--requests", "100", "--rate", "2", "--json")
    assert code == 0
    assert json.loads(again)["metrics"]["overall"]["finished"] == 100


def test_pools_say_how_kv_went_and_who_failed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    words = ("simulate", str(plan), "--requests", "300", "--rate", "60", "--fail", "0@2")
    code, out, _ = run(capsys, *words)
    assert code == 0
    for said in ("went to another replica", "busiest link", "started anew on other replicas"):
        assert said in " ".join(out.split())
    found = json.loads(run(capsys, *words, "--json")[1])
    assert found["handed_over"]["transfers"] > 250
    assert found["handed_over"]["exposed_s"]["mean"] > 0
    assert found["totals"]["requeued"] >= 1
    assert found["totals"]["roles"] == ["prefill", "prefill", "decode"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("plan", "--hardware", "h100-sxm:16,a100-80-sxm"), 2, "'a100-80-sxm' found"),
        (("plan", "--hardware", "h100-sxm:16,h100-sxm:8"), 2, "'h100-sxm:8' found"),
        (("plan", "--hardware", "h100-sxm:4,a100-80-sxm:4", "--gpus", "8"), 2, "expected the counts in one place"),
        (("plan", "--serving", "split"), 4, "serving 'split': expected one of aggregated, disaggregated, shared, any"),
        (("plan", "--transfer", "pigeon"), 4, "transfer 'pigeon'"),
        (("plan", *SMALL, "--gpus", "4", "--budget-usd-per-h", "0.5"), 7, "does not pay for one h100-sxm"),
        (("plan", *SMALL, "--gpus", "4", "--serving", "disaggregated", "--budget-kw", "0.8"), 7, "kW"),
        (("plan", "--budget-kw", "-1"), 2, "not a finite number above 0"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, told: str
) -> None:
    found, out, err = run(capsys, *words)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert told in err


@pytest.mark.parametrize(("fail", "told"), [("1@x", "such as 2@60"), ("9@5", "expected 0 to 2"), ("2@1", "no replica is left")])
def test_failures_that_cannot_be_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, fail: str, told: str
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    code, _, err = run(capsys, "simulate", str(plan), "--requests", "60", "--rate", "8", "--fail", fail)
    assert code != 0
    assert told in err
