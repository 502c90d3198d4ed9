"""The command line where experts do not fit: what is offered, what is told, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.planfile import read_plan
from ui.cli import main
from ui.questions import OptionError, away

ASKED = [
    "plan", "--model", "mixtral-8x7b", "--hardware", "rtx-4090", "--gpus", "1", "--workload", "short-questions",
    "--requests", "30", "--token-budget", "512", "--max-seqs", "8", "--policy", "chunked", "--ttft", "p99=60s",
    "--tpot", "p99=2s",
]  # fmt: skip


def test_what_does_not_fit_is_served_from_the_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody asked for it; the plan that is saved simulates, and is neither exported nor executed."""
    assert main([*ASKED, "--save", str(tmp_path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (found,) = content["experts_away"]
    pool = content["best"]["plan"]["pools"][0]
    assert 0.1 < found["expert_cache"] == pool["expert_cache"] < 0.25
    assert found["cpu_threads"] == 32
    assert "the smallest cluster that would do is 5 x rtx-4090" in content["notes"][0]
    for step in found["by_tokens"].values():
        assert 0.8 * found["expert_cache"] < step["hit_rate"] < 0.5
        assert step["layer_s"] > step["resident_s"] > 0
        assert 0.9 < max(step["busy"].values()) < 1.0001
    saved = str(tmp_path / "plan.yaml")
    assert read_plan(saved).pools[0].expert_cache == found["expert_cache"]
    assert main(["simulate", saved, "--workload", "short-questions", "--requests", "20", "--rate", "0.1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "of the experts on devices, 32 host threads" in told
    assert "on devices, the others in the memory of xeon-8592, computed by 32 threads a device, or loaded" in told
    assert main(["explain", saved, "--batch", "1"]) == 0
    assert "bound by host CPU" in " ".join(capsys.readouterr().out.split())
    assert main(["export", saved]) == 4
    assert "no exported launch file keeps a cache of experts" in capsys.readouterr().err
    assert main(["validate", "run", "--plan", saved, "--device", "cpu"]) != 0
    assert "simulated, not executed" in capsys.readouterr().err


def test_what_is_asked_for_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--expert-cache", "0.1,0.15", "--expert-ladder", "bf16,int4"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "15 % of the experts on devices in bf16/int4" in told
    assert "the others in the memory of xeon-8592, loaded" in told
    assert "host link 9" in told
    assert "left out; what that does to answers is not modelled" in told


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--expert-cache", "0"], 2, "--expert-cache 0: '0' found, expected 'fit', or parts"),
        (["--expert-cache", "0.2,much"], 2, "'much' found"),
        (["--expert-ladder", "bf16"], 2, "--expert-ladder bf16: expected two of"),
        (["--cpu-threads", "-1"], 2, "--cpu-threads -1: expected whole numbers"),
        (["--host-cpu", "xeon-9999"], 3, "xeon-9999"),
        (["--host-cpu", "rtx-4090"], 4, "expected the profile of a processor"),
        (["--host-cpu", "nope"], 3, "unknown processor 'nope'; nearest: xeon-8592 (or"),
        (["--cpu-threads", "65"], 2, "expected at most 64 for each of 1 device(s) of a node: xeon-8592 has 64 cores"),
        (["--cpu-threads", "100000"], 2, "--cpu-threads 100000: 100000 found, expected at most 64"),
        (["--no-experts-placed"], 2, "--no-experts-placed without --routing"),
        (["--expert-cache", "0.5"], 7, "with experts that are away: no plan is left"),
    ],
)
def test_options_that_cannot_be_are_told(
    options: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*ASKED, *options]) == code
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ["--experts", "int4"],
        ["--expert-cache", "0.5"],
        ["--expert-ladder", "bf16,int4"],
        ["--cpu-threads", "8"],
        ["--host-cpu", "xeon-8592"],
    ],
)
def test_options_of_experts_are_refused_for_dense_models(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "llama-3.1-8b", "--gpus", "1", *option]) == 2
    out, err = capsys.readouterr()
    said = f"error: {' '.join(option)}: llama-3.1-8b is dense; leave {option[0]} out\n"
    assert (out, err) == ("", said)


def test_a_plan_file_that_keeps_too_many_experts_is_told_how_many_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"

    def explained(cache: str) -> tuple[int, str]:
        plan.write_text(
            f"model: mixtral-8x7b\nhardware: rtx-4090\ngpus: 1\npools: [{{replicas: 1, expert_cache: {cache}}}]\n"
        )
        return main(["explain", str(plan), "--batch", "1"]), capsys.readouterr().err

    code, err = explained("fit")
    assert code == 4 and "expert_cache is 'fit', expected a part of the experts such as 0.25" in err
    code, err = explained("0.6")
    assert code == 5 and err.count("\n") == 1
    most = float(err.partition("expert_cache of at most ")[2].partition(" (it is 0.6)")[0])
    assert explained(str(most))[0] == 0
    assert explained(str(most + 0.01))[0] == 5


def test_nothing_typed_is_nothing_asked() -> None:
    assert away(None, None, None, None) is None
    found = away("fit", None, "8", "xeon-8592")
    assert found is not None
    assert (found.caches, found.threads, found.host) == ((), (8,), "xeon-8592")
    with pytest.raises(OptionError):
        away("2", None, None, None)
