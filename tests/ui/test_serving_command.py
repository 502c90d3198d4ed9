"""Ways of serving, several kinds of devices, budgets and failures at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.planfile import read_plan
from ui.cli import main
from ui.prefixes import changed
from ui.questions import devices

SMALL = (
    "--model",
    "llama-3.1-8b",
    "--requests",
    "400",
    "--seconds",
    "2",
    "--token-budget",
    "2048",
    "--max-seqs",
    "128",
)
COUNTS = "expected different names with counts from 1 to 16384, such as h100-sxm:16,a100-80-sxm:16"
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
    for said in (
        "Ways of serving",
        "disaggregated",
        "aggregated",
        "shared",
        "nearest limit",
        "2 x h100-sxm and 1 x a100",
    ):
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
    for said in ("of KV to another replica", "busiest link", "had to start anew"):
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
        (("plan", "--hardware", "h100-sxm:-1"), 2, COUNTS),
        (("plan", "--hardware", "h100-sxm:2.5"), 2, COUNTS),
        (("plan", "--hardware", "h100-sxm:1e3"), 2, COUNTS),
        (("plan", "--hardware", "h100-sxm:"), 2, COUNTS),
        (("plan", "--hardware", "h100-sxm:0"), 2, COUNTS),
        (("plan", "--hardware", "h100-sxm:16385"), 2, COUNTS),
        (("plan", "--hardware", "h100-sxm:99999999"), 2, COUNTS),
        (("plan", "--hardware", "h100-sxm:٣"), 2, COUNTS),
        (("plan", "--hardware", "h100-sxm:2,l4:"), 2, COUNTS),
        (("plan", "--hardware", ":4"), 2, COUNTS),
        (("plan", "--hardware", "h100-sxm:4,a100-80-sxm:4", "--gpus", "8"), 2, "expected the counts in one place"),
        (("plan", "--serving", "split"), 4, "serving 'split': expected one of aggregated, disaggregated, shared, any"),
        (("plan", "--transfer", "pigeon"), 4, "transfer 'pigeon'"),
        (("plan", *SMALL, "--gpus", "4", "--budget-usd-per-h", "0.5"), 7, "replica that fits, 1 x h100-sxm, takes"),
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


@pytest.mark.parametrize(
    ("fail", "told"), [("1@x", "such as 2@60"), ("9@5", "expected 0 to 2"), ("2@1", "no replica is left")]
)
def test_failures_that_cannot_be_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, fail: str, told: str
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    code, _, err = run(capsys, "simulate", str(plan), "--requests", "60", "--rate", "8", "--fail", fail)
    assert code != 0
    assert told in err


def test_a_colon_in_a_path_is_no_count() -> None:
    assert devices("c:/my.yaml", 8) == {"c:/my.yaml": 8}
    assert devices("./my.yaml:4", None) == {"./my.yaml": 4}
    assert devices("h100-sxm:16384", None) == {"h100-sxm": 16384}


CACHED = PLAN.replace("role: prefill", "role: prefill, prefix_caching: lru")


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        (PLAN, ("--host-kv-gb", "10"), "--host-kv-gb 10: expected a plan that keeps prefixes; add --prefix-caching"),
        (PLAN, ("--ssd-kv-gb", "10", "--ssd-gb-per-s", "5"), "--ssd-kv-gb 10: expected a plan that keeps prefixes"),
        (CACHED, ("--prefix-caching", "off", "--host-kv-gb", "10"), "--host-kv-gb 10: expected a plan that keeps"),
        (CACHED, ("--ssd-kv-gb", "10"), "--ssd-kv-gb 10: expected with what a node's disks read and write in GB/s"),
        (CACHED, ("--ssd-gb-per-s", "10"), "--ssd-gb-per-s 10: expected a plan that keeps KV on disks; add"),
        (PLAN, ("--ssd-gb-per-s", "10"), "--ssd-gb-per-s 10: expected a plan that keeps KV on disks"),
        (
            CACHED,
            ("--ssd-kv-gb", "10", "--host-kv-gb", "20", "--ssd-gb-per-s", "5"),
            "--ssd-kv-gb 10: expected disks to keep at least what host memory does",
        ),
        (
            PLAN.replace("role: prefill", "role: prefill, policy: static"),
            ("--prefix-caching", "lru"),
            "--prefix-caching lru: expected off, as pools[0] of the plan is static",
        ),
    ],
)
def test_memory_that_could_keep_nothing_is_told_by_its_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: tuple[str, ...], told: str
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    code, out, err = run(capsys, "simulate", str(plan), "--requests", "20", "--rate", "8", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert told in err


def test_memory_goes_to_the_pools_that_keep_prefixes(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(CACHED.replace("gpus: 3", "gpus: 4") + "- {replicas: 1, role: mixed}\n")
    found = changed(read_plan(path), None, None, 10.0, 20.0, 5.0)
    assert [pool.host_kv_gb for pool in found.pools] == [10.0, None, None]
    assert (found.pools[0].ssd_kv_gb, found.ssd_gb_per_s) == (20.0, 5.0)
    off = changed(found, "off", None, None, None, None)
    assert [(pool.prefix_caching, pool.host_kv_gb, pool.ssd_kv_gb) for pool in off.pools] == [("off", None, None)] * 3


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("kv: fp8", "pools[0] keeps KV in bf16 and pools[1] in fp8: expected one format; give both the same kv"),
        ("block_tokens: 32", "pools[0] has KV blocks of 16 tokens and pools[1] of 32: expected one size; give both"),
    ],
)
def test_pools_that_keep_kv_differently_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, more: str, told: str
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.replace("role: decode", f"role: decode, {more}"))
    code, _, err = run(capsys, "simulate", str(plan), "--requests", "20", "--rate", "8")
    assert code == 4
    assert told in err and "convert" not in err


def test_a_trace_of_sessions_finds_prefixes_cached(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Two turns, the second 100 s later: of its 90 tokens the 60 said before are found but for a block cut short."""
    plan, trace = tmp_path / "plan.yaml", tmp_path / "turns.csv"
    plan.write_text("model: llama-3.1-8b\nhardware: h100-sxm\ngpus: 1\npools:\n- {replicas: 1}\n")
    head = "arrival_s,prompt_tokens,output_tokens,session,turn\n"
    trace.write_text(head + "0,40,20,a,0\n100,90,30,a,1\n")
    words = ("simulate", str(plan), "--trace", str(trace), "--prefix-caching", "lru", "--json")
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert json.loads(out)["caching"]["found_tokens"] == 48
    trace.write_text(head + "0,40,20,a,0\n100,90,30,a,2\n")
    code, _, err = run(capsys, *words)
    assert (code, err.count("\n")) == (6, 1)
    assert "turns.csv, line 3: session 'a', turn 2: expected turn 1" in err
