"""The command line, run in this process: answers, files, JSON, and one line for everything that is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from planner.planfile import read_plan
from ui.cli import main

SMALL = ["--model", "llama-3.1-8b", "--gpus", "2", "--requests", "200", "--seconds", "2"]
FEW = ["--max-seqs", "64,256", "--token-budget", "2048"]
PLAN = {"model": "llama-3.1-8b", "hardware": "h100-sxm", "gpus": 2, "pools": [{"replicas": 2, "tp": 1}]}
HEADER = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    return str(path)


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def answer(capsys, *words: str) -> dict:
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert found["version"] == 1
    return found


# --- answers ----------------------------------------------------------------------------------------------------------


def test_plan_prints_one_object_and_saves_it(capsys, tmp_path):
    folder = tmp_path / "new" / "out"
    found = answer(capsys, "plan", *SMALL, *FEW, "--save", str(folder))
    assert set(found) == {
        *("version", "question", "best", "ranked", "considered", "pruned", "simulated", "trials", "untried", "gap"),
        *("pareto", "evidence", "wall_s", "serving", "crossover"),
    }
    best = found["best"]
    assert best["value"] == max(entry["value"] for entry in found["ranked"])
    assert best["metrics"]["overall"]["finished"] == 200
    assert {key: value for key, value in best.items() if key not in ("metrics", "totals")} == found["ranked"][0]
    assert json.loads((folder / "result.json").read_text()) == found
    plan = read_plan(folder / "plan.yaml")
    assert json.loads(json.dumps(best["plan"])) == json.loads(json.dumps(_as_dict(plan)))
    assert len(pd.read_csv(folder / "plans.csv")) == len(found["ranked"])
    assert len(pd.read_csv(folder / "requests.csv")) == 200
    assert json.loads((folder / "timeline.json").read_text())["traceEvents"]
    limits = ["--ttft", "p99=2s", "--tpot", "p99=50ms"]
    rate = str(best["rate_per_s"])
    again = answer(capsys, "simulate", str(folder / "plan.yaml"), "--requests", "200", "--rate", rate, *limits)
    assert again["metrics"] == best["metrics"]


def _as_dict(plan) -> dict:
    from dataclasses import asdict

    return asdict(plan)


def test_plan_in_words(capsys):
    code, out, err = run(capsys, "plan", *SMALL, *FEW, "--rate", "2", "--objective", "fewest-gpus")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    for said in (
        "Best: 1 replica of tp=1",
        "on 1 of 2 GPUs; 1 idle",
        "Considered",
        "pruned",
        "tolerance",
        "Step times rest on: calibrated ",
    ):
        assert said in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 120


def test_simulate_all_metrics(capsys, plan_file, tmp_path):
    words = ["simulate", plan_file, "--requests", "100", "--rate", "4", "--ttft", "p99=2s", "--itl", "max=1us"]
    code, out, err = run(capsys, *words, "--save", str(tmp_path / "run"))
    assert (code, err) == (0, "")
    for said in ("TTFT", "TPOT", "ITL", "E2E", "MFU", "MBU", "kept", "BROKEN", "J per output token", "USD per million"):
        assert said in out
    assert sorted(os.listdir(tmp_path / "run")) == [
        "metrics.json", "requests.csv", "requests.parquet", "result.json", "timeline.json", "timeline.svg"
    ]  # fmt: skip
    found = answer(capsys, *words)
    assert list(found["limits"].values()) == [True, False]
    assert found["totals"]["gpus"] == 2
    assert found["replications"] is None


def test_simulate_closed_loop_replications_and_window(capsys, plan_file):
    words = ["simulate", plan_file, "--requests", "60", "--replications", "3", "--warmup", "1", "--cooldown", "1"]
    found = answer(capsys, *words)
    assert found["replications"]["ttft_s.mean"]["runs"] == 3
    assert found["replications"]["ttft_s.mean"]["half_width"] > 0
    closed = answer(capsys, "simulate", plan_file, "--requests", "60", "--concurrency", "4")
    assert closed["metrics"]["overall"]["finished"] == 60


def test_simulate_a_trace_by_class(capsys, plan_file, tmp_path):
    trace = tmp_path / "[red]trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens,slo_class\n0,10,5,chat\n1,20,5,batch\n2,40000,5,batch\n")
    found = answer(capsys, "simulate", plan_file, "--trace", str(trace))
    assert set(found["metrics"]["classes"]) == {"chat", "batch"}
    assert found["metrics"]["overall"]["rejected"] == 1
    _, out, _ = run(capsys, "simulate", plan_file, "--trace", str(trace))
    assert "[red]trace.csv" in out


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm", "dynamo"])
def test_export_prints_and_saves(capsys, plan_file, tmp_path, engine):
    code, out, _ = run(capsys, "export", plan_file, "--engine", engine)
    assert code == 0
    assert "#!/" in out
    found = answer(capsys, "export", plan_file, "--engine", engine)
    assert found["engine"] == engine
    assert run(capsys, "export", plan_file, "--engine", engine, "--save", str(tmp_path / "launch"))[0] == 0
    assert sorted(os.listdir(tmp_path / "launch")) == sorted(found["files"])
    for name in found["files"]:
        assert os.access(tmp_path / "launch" / name, os.X_OK) == name.endswith(".sh")


def test_explain(capsys, plan_file):
    found = answer(capsys, "explain", plan_file, "--batch", "8")
    for step in found["pools"][0]["steps"]:
        assert sum(row["time_s"] for row in step["operators"]) == pytest.approx(step["step_model_s"], rel=0.03)
        assert sum(row["share"] for row in step["operators"]) == pytest.approx(1)
    _, out, _ = run(capsys, "explain", plan_file)
    assert "KV tokens" in out
    assert "bound by memory" in out


def test_models_and_hardware(capsys):
    models = {model["name"]: model for model in answer(capsys, "models")["models"]}
    assert models["llama-3.1-70b"]["kv_bytes_per_token"] == 327680
    assert all(model["source"] for model in models.values())
    hardware = answer(capsys, "hardware")
    assert {device["name"] for device in hardware["devices"]} > {"h100-sxm", "tpu-v5e"}
    assert all(device["source"] for device in hardware["devices"])
    for command in ("models", "hardware"):
        code, out, err = run(capsys, command)
        assert (code, err) == (0, "")
        assert "\x1b" not in out


def test_models_does_not_wait_for_the_simulator():
    program = (
        "import sys; from ui.cli import main; main(['models']); main(['--help'])\n"
        "slow = {'pandas', 'scipy', 'pyarrow', 'simpy', 'pulp'} & set(sys.modules); sys.exit(str(slow) if slow else 0)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Exit codes" in done.stdout


# --- what is wrong ----------------------------------------------------------------------------------------------------


def wrong(capsys, code: int, said: str, *words: str) -> None:
    found, out, err = run(capsys, *words)
    assert found == code, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert said in err


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (2, "--gpus", ["--gpus", "0"]),
        (2, "--gpus", ["--gpus", "two"]),
        (2, "nan", ["--rate", "nan"]),
        (2, "-1", ["--rate", "-1"]),
        (2, "inf", ["--rate", "inf"]),
        (2, "0.0", ["--seconds", "0"]),
        (2, "nan", ["--tolerance", "nan"]),
        (2, "--requests", ["--requests", "0"]),
        (2, "--seed", ["--seed", "-1"]),
        (2, "expected one of them", ["--trace", "a.csv", "--workload", "azure-code-2023"]),
        (2, "'x'", ["--max-seqs", "8,x"]),
        (2, "'0'", ["--token-budget", "0"]),
        (2, "fp8", ["--weights", "fp7"]),
        (2, "prefill-first", ["--policy", "fifo"]),
        (2, "--no-such", ["--no-such"]),
        (3, "llama-3.1-70b", ["--model", "llama-3.1-70"]),
        (3, "h100-sxm", ["--hardware", "h100"]),
        (3, "azure-conversation-2023", ["--workload", "azure-conversation"]),
        (3, "sglang", ["--engine", "sglan"]),
        (3, "16384", ["--gpus", "1000000"]),
        (4, "fewest-gpus", ["--objective", "fewest"]),
        (4, "round-robin", ["--router", "robin"]),
        (4, "p99=50ms", ["--ttft", "soon"]),
        (4, "'p99=nan s'", ["--ttft", "p99=nan s"]),
        (4, "'-2s'", ["--tpot", "-2s"]),
        (4, "limit", ["--ttft", "none"]),
        (6, "check the path", ["--trace", "nowhere.csv"]),
        (7, "GiB short", ["--model", "llama-3.1-70b", "--gpus", "1"]),
        (7, "rtx-4090 multiplies in", ["--hardware", "rtx-4090", "--activations", "fp4"]),
        (7, "ttft p99", ["--ttft", "p99=1us"]),
        (7, "lower rate", ["--rate", "100000"]),
    ],
)  # fmt: skip
def test_wrong_questions(capsys, tmp_path, code, said, words):
    folder = tmp_path / "out"
    wrong(capsys, code, said, "plan", *SMALL, *words, "--save", str(folder))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (HEADER, "no rows"),
        (HEADER + "0,10,5\n1,ten,5\n", "line 3"),
        (HEADER + "0,10,5\nnan,10,5\n", "line 3"),
        (HEADER + "0,-10,5\n", "line 2"),
        (HEADER + "0,0,5\n", "drop_empty"),
        ("time,prompt\n1,2\n", "line 1"),
        ('{"timestamp": 1, "input_length": 5}\n', "line 1"),
    ],
)
def test_wrong_traces(capsys, tmp_path, text, said):
    trace = tmp_path / "t.csv"
    trace.write_text(text)
    wrong(capsys, 6, said, "plan", "--gpus", "2", "--model", "llama-3.1-8b", "--trace", str(trace))


def test_requests_without_a_rate(capsys, tmp_path):
    trace = tmp_path / "t.csv"
    small = ["plan", "--gpus", "1", "--model", "llama-3.1-8b", "--trace", str(trace), "--seconds", "1", *FEW]
    trace.write_text(HEADER + "0,10,5\n")
    wrong(capsys, 4, "--rate", *small, "--objective", "latency")
    trace.write_text(HEADER + "0,10,5\n0,10,5\n")
    wrong(capsys, 4, "at once", *small)
    trace.write_text(HEADER + "0,10,5\n1,140000,5\n")
    wrong(capsys, 7, "140005", *small)


@pytest.mark.parametrize(
    ("code", "said", "text"),
    [
        (4, "not a mapping", "- 1\n"),
        (4, "tag", "model: !!python/object:os.system {}\n"),
        (4, "empty", ""),
        (4, "pools", yaml.safe_dump({key: PLAN[key] for key in ("model", "hardware", "gpus")})),
        (4, "replica", yaml.safe_dump({**PLAN, "pools": [{"replicas": 2, "tq": 1}]})),
        (4, "token_budget", yaml.safe_dump({**PLAN, "pools": [{"replicas": 1, "token_budget": 10**9}]})),
        (4, "max_context_tokens", yaml.safe_dump({**PLAN, "pools": [{"replicas": 1, "max_context_tokens": 10**6}]})),
        (4, "tp=3", yaml.safe_dump({**PLAN, "gpus": 3, "pools": [{"replicas": 1, "tp": 3}]})),
        (4, "at least the 4", yaml.safe_dump({**PLAN, "pools": [{"replicas": 4}]})),
        (5, "GiB", yaml.safe_dump({**PLAN, "model": "llama-3.1-70b"})),
        (3, "llama-3.1-8b", yaml.safe_dump({**PLAN, "model": "llama-3.1-8"})),
    ],
)
@pytest.mark.parametrize("command", ["simulate", "explain"])
def test_wrong_plans(capsys, tmp_path, command, code, said, text):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    wrong(capsys, code, said, command, str(path))


def test_wrong_simulations(capsys, plan_file, tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text(HEADER + "0,10,5\n1,10,5\n")
    for code, said, words in [
        (2, "expected one of them", ["--rate", "2", "--concurrency", "2"]),
        (2, "all runs would be the same", ["--trace", str(trace), "--replications", "2"]),
        (2, "--concurrency", ["--concurrency", "0"]),
        (2, "nan", ["--warmup", "nan"]),
        (4, "nothing to measure", ["--requests", "10", "--warmup", "1000"]),
        (6, "concurrency", ["--think", "1", "--requests", "10"]),
    ]:
        wrong(capsys, code, said, "simulate", plan_file, *words)
    wrong(capsys, 4, "cannot be read", "simulate", str(tmp_path / "none.yaml"))
    wrong(capsys, 4, "sglang", "export", plan_file, "--engine", "tgi")


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/shardwise"])
def test_save_is_refused_before_the_work(capsys, tmp_path, monkeypatch, where):
    import planner

    monkeypatch.setattr(planner, "search", lambda *_: pytest.fail("searched before looking at --save"))
    (tmp_path / "file").write_text("mine")
    wrong(capsys, 8, "cannot be written", "plan", *SMALL, "--save", str(tmp_path / where))
    assert (tmp_path / "file").read_text() == "mine"


def test_names_cannot_break_the_line(capsys):
    wrong(capsys, 6, "\\x1b[31m", "plan", "--trace", "a\nb\x1b[31m[bold]")


def test_interrupt_is_one_line(capsys, plan_file, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ui.questions.read_trace", interrupted)
    wrong(capsys, 130, "interrupted", "simulate", plan_file, "--trace", "x")


def test_bugs_keep_their_traceback(plan_file, monkeypatch):
    monkeypatch.setattr("ui.questions.read_plan", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["explain", plan_file])
