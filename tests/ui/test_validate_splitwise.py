"""`shardwise validate splitwise`, run in this process on a small table and a few machines."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from hwmodels.errors import MeasurementError
from planner.validation import splitwise as study
from planner.validation import splitwisesizing
from planner.validation.splitwisetable import COLUMNS
from ui.cli import main

RATIOS = {"what", "published", "ours"}


def written(path: Path) -> Path:
    """Prompts take 40 ms + 0.125 ms a token, decode steps 40 ms + 0.5 ms a sequence, H100 half of both."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for hardware, faster, capped in (("a100-80gb", 1, 1), ("h100-80gb", 2, 1), ("h100-80gb-pcap", 2, 1.3)):
            for prompt, batch in ((128, 1), (512, 1), (2048, 1), (8192, 1), (512, 16), (512, 64)):
                prompt_ms, token_ms = (40 + prompt * batch / 8) / faster * capped, (40 + batch / 2) / faster
                rows.writerow(["llama2-70b", hardware, 8, prompt, batch, 128, prompt_ms, token_ms])
    return path


@pytest.fixture
def table(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(splitwisesizing, "SAMPLE", {"prefill": 3, "decode": 3})
    few = {"AA": (2, 2), "HH": (1, 1), "HA": (1, 2), "HHcap": (1, 1)}
    monkeypatch.setattr(study, "BUDGETS", {"power": 2 * 44.0, "cost": 2 * 4.76})
    monkeypatch.setattr(study, "PUBLISHED", {"power": few, "cost": few})
    return str(written(tmp_path / "perf_model.csv"))


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["validate", "splitwise", *words])
    out, err = capsys.readouterr()
    return code, out, err


def small(table: str) -> list[str]:
    return [table, "--model", "llama2-70b", "--quick", "--seconds", "4", "--jobs", "1"]


def test_json_has_every_cluster_and_ratio(table, capsys):
    code, out, err = run(capsys, *small(table), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["version"] == 1
    assert (found["model"], found["seconds"]) == ("llama2-70b", 4)
    assert {row["lookup"] for row in found["rows"]} == {"published", "measured"}
    assert {row["money"] for row in found["rows"]} == {"power"}
    for row in found["rows"]:
        assert row["rate_per_s"] > 0
        assert row["kw"] == pytest.approx(
            sum(study.MACHINES[part["machine"]][3] * part["count"] for part in row["counts"])
        )
    assert all(set(ratio) == RATIOS for ratio in found["ratios"])
    assert found["cap_ratios"] == {"prompt": pytest.approx(1.3), "token": pytest.approx(1.0)}
    assert found["decode_ms"][2] == {"sequences": 64, "published": pytest.approx(40.5), "measured": pytest.approx(72)}


def test_the_table_names_clusters_and_both_look_ups(table, capsys):
    code, out, err = run(capsys, *small(table))
    assert (code, err) == (0, "")
    told = " ".join(out.split())
    for word in (
        "Baseline-A100", "Splitwise-HHcap", "any split, sized", "2 A100 + 2 A100", "published look-up", "as measured",
        "Throughput ratios", "2.35", "Capped H100 over H100: prompt time x1.30, token time x1.00.",
    ):  # fmt: skip
        assert word in told


def test_lengths_come_from_traces_or_else_from_the_shipped_profiles(table, tmp_path, monkeypatch, capsys):
    trace = tmp_path / "trace.csv"
    rows = "".join(f"2023-11-16 18:15:{second:02d},600,20\n" for second in range(20))
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    seen = {}

    def look(table, model, traffic, **options):
        seen.update(traffic)
        raise MeasurementError("seen enough")

    monkeypatch.setattr(study, "study", look)
    code, _, err = run(capsys, table, "--conversation", str(trace), "--seconds", "30", "--seed", "5")
    assert (code, err) == (9, "error: seen enough\n")
    conversation, code_traffic = seen["conversation"], seen["code"]
    assert set(conversation.trace.prompt_tokens.tolist()) == {600}
    assert set(conversation.trace.output_tokens.tolist()) == {20}
    assert (conversation.seconds, conversation.seed) == (30, 5)
    assert code_traffic.trace.prompt_tokens.mean() == pytest.approx(2048, rel=0.05)
    seen.clear()
    assert run(capsys, table, "--quick")[0] == 9
    assert list(seen) == ["conversation"]
    assert seen["conversation"].trace.prompt_tokens.mean() == pytest.approx(1155, rel=0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.csv"], "nowhere.csv: no such file, expected Splitwise's perf_model.csv"),
        (["{table}", "--model", "gpt-2"], "model 'gpt-2': expected one of bloom-176b, llama2-70b"),
        (["{table}", "--model", "bloom-176b"], "no rows of bloom-176b on a100-80gb with 8 GPUs"),
    ],
)
def test_what_cannot_be_read_is_one_line(table, capsys, words, said):
    code, out, err = run(capsys, *[word.format(table=table) for word in words])
    assert (code, out) == (9, "")
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1


def test_without_a_table_the_usage_is_wrong(capsys):
    code, _, err = run(capsys)
    assert code == 2
    assert err.startswith("error: Missing argument 'TABLE'")
