"""Chunks, orders, groups of layers and overlap at the command line: searches, explanations, exports, errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from ui.cli import main

DENSE = ("--model", "llama-3.3-70b", "--hardware", "h100-sxm", "--gpus", "8", "--requests", "60", "--seconds", "20")
EXPERTS = ("--model", "qwen3-30b-a3b", "--hardware", "h100-sxm", "--gpus", "2", "--requests", "40", "--seconds", "20")
ASKED = ("--token-budget", "8192", "--max-seqs", "64", "--objective", "latency", "--rate", "2")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def found(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    answer: dict[str, Any] = json.loads(out)
    return answer


def test_two_halves_of_a_step_beat_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Eight GPUs that sum over NVLink after every block: the same plan is quicker with its collectives hidden."""
    words = ("--policy", "chunked", "--overlap", "none,two-way", "--save", str(tmp_path / "answer"))
    answer = found(capsys, "plan", *DENSE, *ASKED, *words)
    assert answer["question"]["schedules"]["overlaps"] == ["none", "two-way"]
    values = {plan["plan"]["pools"][0]["overlap"]: plan["value"] for plan in answer["ranked"][:2]}
    (first, second) = (plan["plan"]["pools"][0] for plan in answer["ranked"][:2])
    assert (first["tp"], first["overlap"]) == (8, "two-way")
    assert {**first, "overlap": "none"} == second
    assert values["two-way"] < 0.97 * values["none"]
    assert "overlap two-way" in answer["best"]["words"]
    with (tmp_path / "answer" / "plans.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["overlap"] for row in rows[:2]] == ["two-way", "none"]
    assert {(row["chunk_tokens"], row["group_tokens"], row["order"]) for row in rows} == {("", "", "fcfs")}
    plan = str(next((tmp_path / "answer").glob("*.yaml")))
    (explained,) = found(capsys, "explain", plan)["pools"]
    for step in explained["steps"]:
        rows_s = {row["name"]: row["time_s"] for row in step["operators"]}
        assert sum(rows_s.values()) == pytest.approx(step["time_s"])
        assert step["time_s"] == pytest.approx(step["step_model_s"], rel=0.01)
    assert rows_s["hidden behind the other half"] < 0
    code, out, _ = run(capsys, "explain", plan)
    assert code == 0 and "overlap -" in " ".join(out.split())
    code, _, err = run(capsys, "export", plan, "--engine", "vllm")
    assert code != 0 and "pools[0].overlap is 'two-way'" in err and err.count("\n") == 1


def test_chunks_orders_and_groups_of_layers_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--policy", "chunked,layered", "--chunk-tokens", "none,256", "--group-tokens", "256,1024")
    few = ("--token-budget", "2048", "--max-seqs", "64", "--objective", "latency", "--rate", "2")
    answer = found(capsys, "plan", *EXPERTS, *few, *words, "--order", "fcfs,shortest", "--ageing", "100")
    assert answer["considered"] == answer["simulated"] + sum(answer["pruned"].values())
    pools = [plan["plan"]["pools"][0] for plan in answer["ranked"]]
    assert {pool["order"] for pool in pools} == {"fcfs", "shortest"}
    assert {pool["ageing_tokens_per_s"] for pool in pools if pool["order"] == "shortest"} == {100.0}
    assert all(pool["chunk_tokens"] is None for pool in pools if pool["policy"] == "layered")
    assert all(pool["pp"] == pool["attention_dp"] == 1 for pool in pools if pool["policy"] == "layered")
    assert len({json.dumps(pool) for pool in pools}) == len(pools)


def test_groups_of_layers_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = ("--max-seqs", "64", "--objective", "latency", "--rate", "2", "--save", str(tmp_path / "answer"))
    answer = found(capsys, "plan", *EXPERTS, "--policy", "layered", *few)
    assert {plan["plan"]["pools"][0]["policy"] for plan in answer["ranked"]} == {"layered"}
    plan = str(next((tmp_path / "answer").glob("*.yaml")))
    told = found(capsys, "explain", plan, "--prefill", "2048")
    step = told["pools"][0]["steps"][-1]
    assert step["title"] == "step of layer group 1 of 4 for 2048 tokens"
    assert step["time_s"] == pytest.approx(step["step_model_s"], rel=0.01)
    code, _, err = run(capsys, "export", plan)
    assert code != 0 and "pools[0].policy is 'layered'" in err and err.count("\n") == 1


def test_groups_of_layers_on_two_stages_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    pool = "{replicas: 1, pp: 2, policy: layered, token_budget: 8192, max_seqs: 8}"
    path.write_text(f"model: llama-3.2-1b\nhardware: h100-sxm\ngpus: 2\npools:\n- {pool}\n")
    code, out, err = run(capsys, "simulate", str(path), "--requests", "10")
    assert code != 0 and out == "" and err.count("\n") == 1
    assert "policy is 'layered', expected another where pp is 2: layers pass in groups on one stage and one" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--order", "oldest"), "--order oldest: 'oldest' found, expected some of fcfs, shortest, deadline, priority"),
        (("--order", "deadline"), "--order deadline without --deadlines: expected TTFT aimed at"),
        (("--order", "deadline", "--deadlines", "soon"), "--deadlines soon: 'soon' found, expected times above 0"),
        (("--order", "deadline", "--deadlines", "1s,0s"), "--deadlines 1s,0s: '0s' found"),
        (("--chunk-tokens", "0"), "--chunk-tokens 0: '0' found, expected whole numbers from 1"),
        (("--chunk-tokens", "many"), "--chunk-tokens many"),
        (("--group-tokens", "x"), "--group-tokens x: 'x' found"),
        (("--overlap", "both"), "--overlap both: 'both' found, expected some of none, fused-norm, two-way"),
        (("--ageing", "-1"), "'--ageing': -1.0 is not a finite number of at least 0"),
        (("--policy", "static", "--order", "shortest"), "--order shortest with --policy static: static batches take"),
        (("--policy", "layered", "--chunk-tokens", "512"), "--chunk-tokens 512 with --policy layered: chunked alone"),
        (("--deadlines", "2s"), "--deadlines 2s without --order deadline: no other order heeds it"),
        (("--deadlines", "2s", "--order", "fcfs"), "--deadlines 2s without --order deadline"),
        (("--ageing", "100"), "--ageing 100.0 without --order shortest: no other order heeds it"),
        (("--group-tokens", "256"), "--group-tokens 256 with --policy chunked,prefill-first: layered alone has groups"),
        (("--chunk-tokens", "none,8192"), "--chunk-tokens 8192: expected some below the largest token budget, 8192"),
        (("--policy", "layers"), "--policy layers: 'layers' found, expected some of chunked"),
    ],
)
def test_words_that_mean_nothing_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    code, out, err = run(capsys, "plan", "--model", "llama-3.2-1b", "--gpus", "1", "--requests", "20", *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and told in err
