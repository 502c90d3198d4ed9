"""`shardwise prefill-study`, run in this process on little traffic."""

import csv
import json
import xml.etree.ElementTree as ET

import pytest

from planner.prefillcontenders import FAMILIES, Ways
from ui.cli import main
from ui.frontierfigure import NAMES
from ui.prefillstudy import BUDGETS, CHUNKS, FILES

SMALL = (
    "--requests", 40, "--budgets", "512,2048,8192", "--chunks", "512", "--rates", "3,6", "--decision", "3ms",
    "--max-seqs", 64,
)  # fmt: skip


def run(capsys, *words):
    code = main(["prefill-study", *map(str, words)])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What one study printed and saved."""
    folder = tmp_path_factory.mktemp("study") / "out"
    assert main(["prefill-study", *map(str, SMALL), "--save", str(folder)]) == 0
    return folder


def test_the_tables_have_every_family_and_the_bound(capsys):
    code, out, _ = run(capsys, *SMALL)
    assert code == 0
    for name in ("orca", "prefill-first", "sarathi 512", "sarathi-serve 2048", "layered by rule", "shortest 512",
                 "deadline 512", "receding at 2 x"):  # fmt: skip
        assert name in out
    for words in ("no schedule of these", "From the middle of that run on", "(given), which its steps include"):
        assert words in " ".join(out.split())
    assert max(len(line) for line in out.splitlines()) <= 120


def test_json_is_one_object_that_agrees_with_itself(capsys):
    code, out, _ = run(capsys, *SMALL, "--json")
    answer = json.loads(out)
    assert code == 0
    assert [load["load_per_s"] for load in answer["loads"]] == [3, 6]
    assert answer["limit"] == {"statistic": "p99", "seconds": 0.1}
    assert answer["floor_s"] < 0.1
    for load in answer["loads"]:
        outcomes = {o["name"]: o for o in load["outcomes"]}
        assert {o["family"] for o in load["outcomes"]} == set(FAMILIES)
        kept = {name: o["ttft_mean_s"] for name, o in outcomes.items() if o["keeps"]}
        assert load["best"] == min(kept, key=kept.get)
        assert load["published"] == min([name for name in kept if not name.startswith("receding")], key=kept.get)
        assert load["cuts"]["groups"] in ("layered by rule", None)
        for o in outcomes.values():
            assert load["bound_s"] <= o["ttft_mean_s"] <= o["ttft_p99_s"]
            assert o["gap"] == pytest.approx(1 - load["bound_s"] / o["ttft_mean_s"])
            assert o["keeps"] == (o["tbt_s"] <= 0.1)
            assert o["refused"] == 0
    program = outcomes["receding"]["decisions"]
    assert program["solved"] > 0 and program["median_s"] == program["most_s"] == 0.003
    most = {one["name"]: one for one in answer["most"]}
    assert most["sarathi-serve 8192"]["rate_per_s"] > most["sarathi-serve 512"]["rate_per_s"]
    window = answer["window"]
    assert all(s["bound_s"] <= s["ttft_s"] for s in window["standings"])
    wider = [o["name"] for o in answer["frontier"]["wider"]]
    assert {f"receding at {x} x" for x in ("1.25", "1.5", "2")} <= set(wider)
    assert "receding-layers at 0.5 x" in wider
    assert answer["frontier"]["equal"]["tbt_s"] <= 0.1


def test_what_is_saved(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    with (saved / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    content = json.loads((saved / "study.json").read_text())
    assert len(rows) == sum(len(load["outcomes"]) for load in content["loads"]) + len(content["frontier"]["wider"])
    first = content["loads"][0]["outcomes"][0]
    assert float(rows[0]["ttft_mean_s"]) == first["ttft_mean_s"]


def test_the_picture_is_small_and_has_every_family_the_limit_and_the_bound(saved):
    text = (saved / "frontier.svg").read_text()
    assert len(text.encode()) < 40_000
    words = [node.text for node in ET.fromstring(text).iter() if node.tag.endswith("text")]
    assert set(NAMES.values()) <= set(words)
    assert any(word.startswith("limit: p99 100 ms") for word in words)
    assert any(word.startswith("no schedule is below") for word in words)


def test_a_plan_file_is_studied_as_it_is(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "version: 2\nmodel: qwen3-8b\nhardware: h100-sxm\ngpus: 4\npools:\n- {replicas: 2, tp: 2, max_seqs: 32}\n"
    )
    code, out, err = run(capsys, path, "--requests", 20, "--rates", 2, "--budgets", "512,8192", "--chunks", 512,
                         "--decision", "0ms", "--json")  # fmt: skip
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert (answer["model"], answer["gpus"], answer["max_seqs"]) == ("qwen3-8b", 2, 32)
    code, _, err = run(capsys, path, "--model", "qwen3-8b")
    assert code == 2 and err.count("\n") == 1 and "expected one of the two" in err


def test_pipelines_are_studied_without_layers_program_and_bound(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "version: 2\nmodel: qwen3-8b\nhardware: h100-sxm\ngpus: 2\npools:\n- {replicas: 1, pp: 2, max_seqs: 32}\n"
    )
    code, out, _ = run(capsys, path, "--requests", 20, "--rates", 2, "--budgets", "512", "--chunks", 512, "--save",
                       tmp_path / "out")  # fmt: skip
    assert code == 0
    assert "layered" not in out and "receding" not in out
    assert "no bound is known" in " ".join(out.split())
    assert "-: groups and program not tried for pipelines and attention groups. The longer table above is at 2 " in (
        " ".join(out.split())
    )


def names(answer, family):
    return [o["name"] for o in answer["loads"][0]["outcomes"] if o["family"] == family]


def test_only_budgets_that_every_sequence_fits_in_are_tried_by_default(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "version: 2\nmodel: qwen3-8b\nhardware: h100-sxm\ngpus: 2\npools:\n- {replicas: 1, pp: 2, max_seqs: 1024}\n"
    )
    assert (Ways().budgets, Ways().chunks) == (BUDGETS, CHUNKS)
    code, out, err = run(capsys, path, "--requests", 10, "--rates", 2, "--json")
    assert (code, err) == (0, "")
    assert names(json.loads(out), "sarathi-serve") == [f"sarathi-serve {n}" for n in (1024, 2048, 4096, 8192)]
    code, _, err = run(capsys, path, "--budgets", "256,2048")
    assert code == 2 and "--budgets 256,2048: 256 found, expected at least 1024 tokens" in err


@pytest.mark.parametrize(("budget", "chunks"), [(512, (256, 512)), (128, (128,))])
def test_only_chunks_within_a_budget_are_tried_by_default(budget, chunks, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "version: 2\nmodel: qwen3-8b\nhardware: h100-sxm\ngpus: 2\npools:\n- {replicas: 1, pp: 2, max_seqs: 32}\n"
    )
    code, out, err = run(capsys, path, "--requests", 10, "--rates", 2, "--budgets", budget, "--json")
    assert (code, err) == (0, "")
    assert names(json.loads(out), "sarathi") == [f"sarathi {n}" for n in chunks]


def test_what_a_dash_means_and_where_the_longer_table_is_are_told(capsys):
    code, out, _ = run(capsys, *SMALL)
    assert code == 0
    told = " ".join(out.split())
    assert "The longer table above is at 6 requests per second, the highest at which a schedule keeps the" in told
    code, out, _ = run(capsys, *SMALL, "--tbt", "max=8ms")
    told = " ".join(out.split())
    assert code == 0
    assert "-: no schedule of that kind keeps the limit at that load. The longer table above is at 3 requests" in told
    assert "the lowest, as no schedule keeps the limit at any." in told


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--horizon", 0), 2, "'--horizon': 0 found, expected at least 1"),
        (("--horizon", 100000), 2, "'--horizon': 100000 found, expected at most 64"),
        (("--tbt", "p99=1ms"), 7, "which is the floor; expected at least that\n"),
        (("--tbt", "p99=1ms"), 7, "a step of 1 decode alone"),
        (("--tbt", "ttft=1"), 2, "--tbt ttft=1: expected a time above 0 with its unit, for mean, max or a percentile"),
        (("--tbt", "ttft=1s"), 2, "--tbt ttft=1s: expected a time above 0"),
        (("--chunks", 16384), 2, "--chunks 16384: 16384 found, expected at most 8192, the largest of --budgets"),
        (("--groups", 7), 4, "7 groups of 48 layers: expected a number that divides them, such as 6"),
        (("--budgets", "32,512"), 2, "--budgets 32,512: 32 found, expected at least 64 tokens"),
        (("--max-seqs", 10000), 2, "max_seqs of 10000: expected at most 8192"),
        (("--rates", "2,0"), 2, "expected requests per second above 0"),
        (("--decision", "soon"), 2, "--decision soon: expected a time such as 3ms or 0ms, or 'measured'"),
        (("--decision", "3"), 2, "--decision 3: expected a time such as 3ms"),
        (("--decision", "p99=3ms"), 2, "--decision p99=3ms: expected a time such as 3ms"),
        (("--deadlines", "abc"), 2, "--deadlines abc: expected times above 0 with units, such as 1s,4s"),
        (("--deadlines", "1s,2"), 2, "--deadlines 1s,2: '2' found, expected times above 0 with units, such as 1s,4s"),
        (("--ageing", -1), 2, "--ageing -1.0: expected a finite number of at least 0"),
        (("--gpus", 2, "--tp", 1), 2, "--gpus 2 with --tp 1: expected as many"),
        (("--tp", 2, "--ep", 3), 2, "--ep 3 with --tp 2: expected a number that divides it"),
    ],
)
def test_mistakes_are_one_line(words, code, told, capsys):
    found, out, err = run(capsys, *SMALL, *words)
    assert (found, out) == (code, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert told in err
