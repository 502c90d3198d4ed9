"""`shardwise validate run`: the whole loop on a model small enough for a test, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ui.cli import main

torch = pytest.importorskip("torch")

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 128, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def model(tmp_path) -> str:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(path)


def run(*words: str) -> int:
    return main(["validate", "run", *words])


def test_one_command_measures_predicts_executes_and_compares(model, tmp_path, capsys):
    folder = tmp_path / "out"
    code = run(
        "--model", model, "--requests", "40", "--minutes", "0.1", "--settings", "12", "--threads", "1",
        "--save", str(folder), "--json",
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0, captured.err
    found = json.loads(captured.out)
    assert found["status"] == "complete"
    assert found == json.loads((folder / "report.json").read_text())
    assert {path.name for path in folder.iterdir()} == {
        *("prediction.json", "prediction.parquet", "operators.parquet", "report.json", "report.html"),
        *("requests.csv", "latencies.svg", "steps-1.parquet", "steps-2.parquet"),
    }
    predicted = pd.read_parquet(folder / "prediction.parquet")
    requests = pd.read_csv(folder / "requests.csv")
    assert len(predicted) == len(requests) == 40
    assert np.isfinite(predicted["e2e_s"]).all()
    prediction = json.loads((folder / "prediction.json").read_text())
    assert prediction["predicted"]["e2e_s.mean"] == pytest.approx(predicted["e2e_s"].mean())
    # The prediction was there before anything was served.
    assert (folder / "prediction.json").stat().st_mtime < (folder / "steps-1.parquet").stat().st_mtime
    # A shared machine may be several times slower for seconds; but not a hundred times.
    steps = pd.read_parquet(folder / "steps-1.parquet")
    assert steps["decode_sequences"].sum() + steps["items"].map(len).sum() >= predicted["output_tokens"].sum()
    assert 0.01 < predicted["e2e_s"].median() / requests.filter(like="e2e").iloc[:, -1].median() < 100


def test_a_cut_model_is_predicted_and_executed_too(model, tmp_path, capsys):
    for cut in ("--tp", "--pp", "--dp"):
        folder = tmp_path / cut
        code = run(
            "--model", model, cut, "2", "--requests", "12", "--runs", "1", "--minutes", "0.05", "--threads", "1",
            "--save", str(folder),
        )  # fmt: skip
        captured = capsys.readouterr()
        if (os.cpu_count() or 1) < 2:
            assert code == 4 and "processor cores" in captured.err
            continue
        assert code == 0, captured.err
        assert "TTFT" in captured.out and "Saved to" in captured.out


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--model", "deepseek-v3"], 4, "latent attention"),
        (["--model", "gpt-oss-20b"], 4, "attention sinks"),
        (["--model", "no-such-model"], 3, "no-such-model"),
        (["--model", "llama-3.1-405b", "--requests", "4"], 5, "GiB"),
        (["--scheduler", "fifo"], 2, "prefill-first"),
        (["--dtype", "fp8"], 2, "fp32, bf16, fp16"),
        (["--rate", "fast"], 2, "such as 0.7"),
        (["--device", "tpu"], 2, "cpu or cuda"),
        (["--tp", "512"], 4, "512 processes"),
        (["--workload", "mooncake-conversation"], 2, "longest request"),
        (["--max-seqs", "64", "--budget", "32"], 4, "max_seqs=64"),
        (["--settings", "3"], 2, "10 and more"),
        (["--threads", "1000"], 2, "1000 threads"),
        (["--stall", "inf"], 2, "--stall"),
        (["--minutes", "inf"], 2, "--minutes"),
        (["--requests", "99999999999"], 2, "--requests"),
        (["--seed", "99999999999999999999999"], 2, "--seed"),
    ],
)
def test_what_cannot_be_executed_is_refused_in_one_line_before_anything_is_measured(
    words, code, told, tmp_path, capsys
):
    folder = tmp_path / "out"
    assert run(*words, "--save", str(folder)) == code
    error = capsys.readouterr().err
    assert told in error and len(error.strip().splitlines()) == 1
    assert not folder.exists()


def test_a_trace_whose_requests_arrive_at_once_is_refused_before_anything_is_measured(model, tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,8,4\n0,8,4\n", encoding="utf-8")
    assert run("--model", model, "--trace", str(trace), "--requests", "2", "--save", str(tmp_path / "out")) == 2
    assert "trace.csv: its 2 request(s) arrive at one instant" in capsys.readouterr().err


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor core")
def test_experts_are_cut_with_the_rest(tmp_path, capsys):
    path = tmp_path / "experts.json"
    moe = {**CONFIG, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    path.write_text(json.dumps(moe), encoding="utf-8")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "steps-2.parquet").write_text("of an earlier run")
    code = run(
        "--model", str(path), "--tp", "2", "--requests", "12", "--runs", "1", "--minutes", "0.05", "--threads", "1",
        "--save", str(folder),
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    assert not (folder / "steps-2.parquet").exists()


def test_a_plan_file_says_what_is_executed(model, tmp_path, capsys):
    import yaml

    pool = {
        "tp": 1,
        "replicas": 3,
        "max_seqs": 4,
        "token_budget": 48,
        "weights": "fp32",
        "activations": "fp32",
        "kv": "fp32",
    }
    plan = {
        "model": model,
        "hardware": "h100-sxm",
        "gpus": 4,
        "engine": "vllm",
        "router": "round-robin",
        "pools": [pool],
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    folder = tmp_path / "out"
    code = run(
        "--plan", str(path), "--dp", "1", "--requests", "12", "--runs", "1", "--minutes", "0.05", "--threads", "1",
        "--save", str(folder), "--json",
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0, captured.err
    about = json.loads(captured.out)["about"]
    assert "4/48" in about["scheduler"]
    assert about["plan"].endswith("pool 1 of 1, 1 of its 3 replica(s)")


def test_an_interrupted_run_leaves_a_report_that_says_so(model, tmp_path):
    folder = tmp_path / "out"
    command = [
        sys.executable, "-c", "import sys; from ui.cli import main; sys.exit(main(sys.argv[1:]))", "validate", "run",
        "--model", model, "--requests", "60", "--rate", "2", "--minutes", "0.05", "--threads", "1",
        "--save", str(folder),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ends = time.monotonic() + 120
    while not (folder / "prediction.json").exists() and time.monotonic() < ends and process.poll() is None:
        time.sleep(0.1)
    time.sleep(8.0)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "partial" and report["reason"] == "interrupted"
    requests = pd.read_csv(folder / "requests.csv")
    measured = requests.filter(like="e2e").iloc[:, -1]
    assert 0 < measured.notna().sum() < 60
    assert Path(folder / "steps-1.parquet").exists()
