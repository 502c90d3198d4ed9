"""Context parallelism at the command line: simulated, explained, searched, and errors in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from planner.catalogue import open_catalogue
from planner.space import Choices, enumerate_pools
from ui.cli import main
from ui.contextwords import LARGE_STEPS, with_context
from ui.questions import OptionError

PLAN = """
model: llama-3.1-8b
hardware: h100-sxm
gpus: 8
pools:
- {replicas: 2, cp: 4, cp_kind: tokenring, token_budget: 16384, max_seqs: 32}
"""


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


@pytest.fixture
def plan(tmp_path: Path) -> str:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return str(path)


def test_a_plan_is_simulated(capsys: pytest.CaptureFixture[str], plan: str) -> None:
    code, out, err = run(capsys, "simulate", plan, "--requests", "100", "--rate", "2")
    assert (code, err) == (0, "")
    assert "2 replicas of tp=1 cp=4 (tokenring)" in out
    assert "100 requests, 100 finished" in out
    code, out, _ = run(capsys, "simulate", plan, "--requests", "100", "--rate", "2", "--json")
    assert json.loads(out)["plan"]["pools"][0]["cp"] == 4


def test_a_plan_is_explained(capsys: pytest.CaptureFixture[str], plan: str) -> None:
    code, out, err = run(capsys, "explain", plan)
    assert (code, err) == (0, "")
    assert "prefill attention, between ranks (tokenring over 4):" in out
    assert "hidden in attention" in out
    assert "exposed" in out


def test_a_search_names_the_degrees(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "llama-3.2-1b", "--hardware", "h100-sxm", "--gpus", "2", "--requests", "100", "--seconds", "2")
    few = ("--policy", "chunked", "--token-budget", "2048", "--max-seqs", "64")
    code, out, err = run(capsys, "plan", *words, *few, "--cp", "2", "--cp-kind", "ulysses", "--objective", "latency")
    assert (code, err) == (0, "")
    assert "cp=2 (ulysses)" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--cp", "two"), "--cp two: 'two' found, expected 1,2,4 or auto"),
        (("--cp", "2/3"), "--cp 2/3: '2/3' found, expected 1,2,4 or auto"),
        (("--cp", "0"), "--cp 0: '0' found, expected 1,2,4 or auto"),
        (("--gpus", "2", "--cp", "3"), "--cp 3: '3' found, expected at most 2, the devices at hand"),
        (("--cp", "1", "--cp-kind", "ulysses"), "--cp-kind ulysses with --cp 1: expected degrees above 1 too"),
        (("--cp", "2", "--cp-kind", "spiral"), "--cp-kind spiral: 'spiral' found, expected some of ring, tokenring"),
        (("--cp-kind", "ring"), "--cp-kind ring without --cp: expected degrees such as --cp 1,2,4, or --cp auto"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str) -> None:
    code, out, err = run(capsys, "plan", "--requests", "20", *words)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_a_ring_is_offered_beyond_the_heads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.replace("cp: 4", "cp: 64").replace("tokenring", "ulysses").replace("gpus: 8", "gpus: 128"))
    code, _, err = run(capsys, "simulate", str(path), "--requests", "10")
    assert code == 4
    assert "take ring" in err


def test_a_search_without_the_heads_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "llama-3.1-8b", "--hardware", "h100-sxm", "--gpus", "64", "--requests", "20", "--seconds", "2")
    code, out, err = run(capsys, "plan", *words, "--cp", "64", "--cp-kind", "ulysses")
    assert (code, out) == (4, "")
    assert err.count("\n") == 1
    assert "cp 64 of llama-3.1-8b with kind ulysses" in err
    assert "divides its 32 query heads, or kind ring" in err


def test_larger_steps_are_for_several_ranks_only() -> None:
    """Short prompts: auto tries one rank, with the usual steps; degrees that were typed have the larger ones too."""
    catalogue = open_catalogue("llama-3.2-1b", "h100-sxm", 2, "vllm")
    usual = Choices(policies=("chunked", "prefill-first"), max_seqs=(8,))
    auto = with_context(usual, "auto", None, prompt_tokens=[1000], gpus=2)
    pools = [enumerate_pools(catalogue, choices, 4096).pools for choices in (usual, auto)]
    assert pools[0] and pools[0] == pools[1]
    typed = with_context(usual, "1,2", None, prompt_tokens=[1000], gpus=2)
    both = [pool for pool, _ in enumerate_pools(catalogue, typed, 4096).pools]
    assert [pool for pool in both if pool.cp == 1] == [pool for pool, _ in pools[0]]
    steps = {pool.token_budget for pool in both if pool.cp == 2 and pool.policy == "chunked"}
    assert steps == {*usual.token_budgets, *LARGE_STEPS}
    asked = with_context(replace(usual, token_budgets=(2048, 16_384)), "1,2", None, prompt_tokens=[9], gpus=2)
    assert asked.budgets(1) == (2048, 16_384)


def test_what_was_typed_is_what_is_looked_at() -> None:
    usual = Choices()
    assert with_context(usual, None, None, prompt_tokens=[10**6], gpus=8) is usual
    short, long = (with_context(usual, "auto", None, prompt_tokens=[n], gpus=8) for n in (1000, 10**5))
    assert short.cp is None
    assert long.cp == (1, 2, 4, 8)
    assert set(LARGE_STEPS) <= set(long.token_budgets)
    typed = with_context(usual, "4,2", "ulysses,ring", prompt_tokens=[1], gpus=8, token_budget="2048")
    assert (typed.cp, typed.cp_kinds, typed.token_budgets) == ((2, 4), ("ring", "ulysses"), usual.token_budgets)
    assert with_context(usual, "1", None, prompt_tokens=[1], gpus=8) == usual
    with pytest.raises(OptionError, match="without --cp"):
        with_context(usual, None, "ring", prompt_tokens=[1], gpus=8)
