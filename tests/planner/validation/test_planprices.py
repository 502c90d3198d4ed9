"""Operators of a plan against measured kernels: what is asked for, what is nearest, and what the shares add up to."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.kernels.estimate import Estimate
from hwmodels.kernels.table import FAMILIES, checked, write_table
from hwmodels.operators import AttentionCore, Gemm
from planner.catalogue import open_catalogue
from planner.errors import PlanError
from planner.plan import Plan, Pool
from planner.planfile import write_plan
from planner.validation.nearest import Index, Wanted, in_line
from planner.validation.planprices import plan_prices

COMMON = {"dtype": "bf16", "device": "h100-sxm", "software": "vllm 1", "kernel": "some", "spread": np.nan,
          "source": "made up", "seconds": 1e-3}  # fmt: skip
POOL = Pool(replicas=1, max_seqs=64, token_budget=1024)


def table(family, *rows):
    return checked(pd.DataFrame([{**COMMON, **row} for row in rows]), family, "test")


class Nothing:
    """No kernel was measured."""

    def estimate(self, op):
        return None


class Products:
    """Products take a millisecond, a quarter of it between measured points; attention takes two beyond them."""

    def estimate(self, op):
        if isinstance(op, Gemm):
            return Estimate(np.array([1e-3]), np.array([0.25]))
        if isinstance(op, AttentionCore):
            return Estimate(np.array([2e-3]), np.array([0.0]))
        return None


def catalogue(model="llama-3.1-8b", gpus=8):
    return open_catalogue(model, "h100-sxm", gpus, "vllm")


def priced(pool=POOL, model="llama-3.1-8b", measured=None, tables=None, **asked):
    return plan_prices(catalogue(model), pool, measured or Nothing(), tables or {}, **asked)


def rows_of(step):
    return {row.name: row for row in step.rows}


def test_the_steps_are_half_the_sequences_and_the_token_budget():
    decode, prefill = priced(context=500)
    assert decode.title == "decode step of 32 sequences at context 500"
    assert prefill.title == "prefill step of 1024 tokens"
    assert rows_of(decode)["decode attention"].shape == {
        "batch": 32, "context": 500, "heads": 32, "kv_heads": 8, "head_dim": 128, "window": 0, "kv_dtype": "bf16"
    }  # fmt: skip
    assert rows_of(prefill)["prefill attention"].shape == {
        "batch": 1, "new": 1024, "before": 0, "heads": 32, "kv_heads": 8, "head_dim": 128, "window": 0,
        "kv_dtype": "bf16",
    }  # fmt: skip
    assert rows_of(decode)["down projection"].shape == {"m": 32, "n": 4096, "k": 14336}
    assert rows_of(decode)["language-model head"].shape["m"] == 32
    assert rows_of(prefill)["language-model head"].shape["m"] == 1


@pytest.mark.parametrize(
    ("pool", "model"),
    [
        (POOL, "llama-3.1-8b"),
        (Pool(replicas=1, tp=4, weights="fp8", activations="fp8", kv="fp8"), "llama-3.1-8b"),
        (Pool(replicas=1, tp=2, pp=2), "llama-3.1-8b"),
        (Pool(replicas=1, tp=8, ep=8), "mixtral-8x7b"),
        (Pool(replicas=1, attention_dp=8, ep=8, max_seqs=32), "mixtral-8x7b"),
        (Pool(replicas=1, tp=2, expert_tp=2), "gpt-oss-20b"),
    ],
)
def test_shares_add_up_and_shapes_are_those_of_the_tables(pool, model):
    for step in priced(pool, model, Products()):
        assert sum(row.share for row in step.rows) == pytest.approx(1)
        assert [row.share for row in step.rows] == sorted((row.share for row in step.rows), reverse=True)
        assert step.seconds["measured"] == pytest.approx(sum(row.count * row.best_s for row in step.rows))
        assert step.seconds["calibrated"] == pytest.approx(sum(row.count * row.calibrated_s for row in step.rows))
        products = sum(row.share for row in step.rows if row.measured_s == 1e-3)
        attention = sum(row.share for row in step.rows if row.measured_s == 2e-3)
        assert step.measured == pytest.approx(0.25 * products)
        assert step.extended == pytest.approx(0.75 * products + attention)
        for row in step.rows:
            told = set(FAMILIES[row.family].shape) - {"distribution"}
            assert set(row.shape) == told


def test_the_step_is_the_one_that_is_simulated():
    """The calibrated prices add up to what the step model says of an engine that adds nothing."""
    found = catalogue()
    idle = {field.name: 0.0 for field in fields(found.engine) if field.name.endswith("overhead_s")}
    found.engine = replace(found.engine, **idle)
    model = found.replica(POOL).model
    decode, prefill = plan_prices(found, POOL, Nothing(), {}, context=512)
    assert decode.seconds["calibrated"] == pytest.approx(model.step_s(32, 32 * 512, []), rel=0.02)
    assert prefill.seconds["calibrated"] == pytest.approx(model.step_s(0, 0, [(1024, 0)]), rel=0.02)


def test_stages_are_added_up():
    whole, cut = priced(Pool(replicas=1))[0], priced(Pool(replicas=1, pp=4))[0]
    assert rows_of(cut)["qkv projection"].count == rows_of(whole)["qkv projection"].count == 32
    assert rows_of(cut)["stage transfer"].count == 3
    assert rows_of(cut)["stage transfer"].shape["kind"] == "point-to-point"


def test_nodes_of_a_group_are_counted():
    pool = Pool(replicas=1, tp=16)
    found = open_catalogue("llama-3.1-70b", "h100-sxm", 16, "vllm")
    step = plan_prices(found, pool, Nothing(), {})[0]
    shape = rows_of(step)["attention all-reduce"].shape
    assert (shape["gpus"], shape["nodes"]) == (16, 2)


def test_the_nearest_kernels_are_told_with_their_distance():
    shape = {"n": 4096, "k": 14336}
    tables = {
        "gemm": table(
            "gemm",
            {"m": 32, **shape, "seconds": 3e-5, "kernel": "slow"},
            {"m": 32, **shape, "seconds": 2e-5, "kernel": "fast"},
            {"m": 64, "n": 8192, "k": 14336, "seconds": 5e-5},
            {"m": 33, **shape, "seconds": 1e-5, "dtype": "fp8"},
            {"m": 16, **shape, "seconds": 4e-5, "dtype": "fp16"},
        )
    }
    row = rows_of(priced(tables=tables, nearest=3)[0])["down projection"]
    assert [(near.shape["m"], near.distance, near.seconds, near.kernel, near.dtype) for near in row.nearest] == [
        (32, 0, 2e-5, "fast", "bf16"),
        (16, 1, 4e-5, "some", "fp16"),
        (64, 2, 5e-5, "some", "bf16"),
    ]
    assert not rows_of(priced(tables=tables, nearest=0)[0])["down projection"].nearest
    assert not rows_of(priced(tables=tables)[0])["decode attention"].nearest


def test_collectives_of_another_kind_are_never_near():
    pool = Pool(replicas=1, tp=4)
    tables = {
        "collective": table(
            "collective",
            {"kind": "all-gather", "gpus": 4, "nodes": 1, "bytes": 32 * 4096 * 2},
            {"kind": "all-reduce", "gpus": 2, "nodes": 1, "bytes": 1024},
        )
    }
    step = priced(pool, tables=tables)[0]
    assert [near.shape["kind"] for near in rows_of(step)["attention all-reduce"].nearest] == ["all-reduce"]


def test_another_cache_format_is_an_octave_away():
    heads = {"context": 1024, "heads": 8, "kv_heads": 2, "head_dim": 128, "window": 0}
    rows = [{"batch": batch, **heads, "kv_dtype": kv} for batch, kv in ((8, "fp8"), (16, "fp16"), (64, "bf16"))]
    index = Index({"attention_decode": table("attention_decode", *rows)})
    found = index.nearest(Wanted("attention_decode", "bf16", {"batch": 8, **heads, "kv_dtype": "bf16"}), 3)
    assert [(near.shape["batch"], near.distance) for near in found] == [(8, 1), (16, 1), (64, 3)]


@given(
    st.lists(st.tuples(*[st.integers(1, 5000)] * 3), min_size=1, max_size=300, unique=True),
    st.tuples(*[st.integers(1, 5000)] * 3),
    st.integers(1, 4),
)
def test_nothing_nearer_is_passed_over(shapes, asked, count):
    rows = table("gemm", *({"m": m, "n": n, "k": k} for m, n, k in shapes))
    found = Index({"gemm": rows}).nearest(Wanted("gemm", "bf16", dict(zip("mnk", asked, strict=True))), count)
    every = sorted(sum(abs(np.log2(a / b)) for a, b in zip(shape, asked, strict=True)) for shape in shapes)
    assert [near.distance for near in found] == pytest.approx(every[:count], abs=1e-9)


def test_a_context_the_plan_cannot_hold_is_told():
    for context in (0, 10**9):
        with pytest.raises(PlanError, match=r"context \d+: expected 1 to \d+ tokens"):
            priced(context=context)


def test_sequences_are_as_many_as_the_cache_holds():
    pool = Pool(replicas=1, max_seqs=1024, token_budget=2048)
    decode = priced(pool, context=16384)[0]
    batch = rows_of(decode)["decode attention"].shape["batch"]
    memory = catalogue().require_fit(pool)
    assert batch == memory.kv_blocks * pool.block_tokens // 16384 < 512


def test_every_operator_of_a_plan_has_a_name_in_the_tables_or_none():
    for model, pool in (
        ("deepseek-v2-lite", Pool(replicas=1, tp=2, ep=2)),
        ("gpt-oss-20b", Pool(replicas=1, experts="mxfp4")),
    ):
        families = {row.name: row.family for step in priced(pool, model) for row in step.rows}
        assert families["routed experts"] == "moe"
        if model == "deepseek-v2-lite":
            assert families["decode attention"] == "mla_decode"
            assert families["prefill attention"] == "mla_prefill"
            assert families["query into latent"] == "batched_gemm"


def test_operators_without_a_kernel_have_no_family():
    """16-bit arithmetic on fp8 weights is run by nothing that was timed."""
    pool = Pool(replicas=1, weights="fp8", activations="bf16")
    row = rows_of(priced(pool)[0])["qkv projection"]
    assert (row.family, row.shape, row.nearest) == ("", {}, ())


def test_shapes_in_a_line():
    assert in_line({"m": 64.0, "kind": "all-reduce"}) == "m 64, kind all-reduce"
    assert in_line({}) == ""


def test_the_command_takes_ones_own_tables(tmp_path, capsys):
    from ui.validatingkernels import plan as command

    rows = [{"kind": "all-reduce", "gpus": 4, "nodes": 1, "bytes": 2**e, "seconds": 1e-5 + 2**e / 2e11}
            for e in range(10, 28)]  # fmt: skip
    write_table(table("collective", *rows), "collective", tmp_path / "tables" / "collective.parquet")
    path = tmp_path / "plan.yaml"
    write_plan(Plan("llama-3.1-8b", "h100-sxm", 4, (Pool(replicas=1, tp=4),)), path)
    command(path, source=str(tmp_path / "tables"), as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert content["kernels"] == {"collective": ["vllm 1"]}
    steps = content["pools"][0]["steps"]
    assert len(steps) == 2
    reduce = next(row for row in steps[0]["rows"] if row["name"] == "attention all-reduce")
    assert reduce["measured_s"] == pytest.approx(1e-5 + reduce["shape"]["bytes"] / 2e11, rel=0.05)
    assert reduce["nearest"][0]["software"] == "vllm 1"
    command(path, hardware="h100-sxm", source=str(tmp_path / "tables"))
    out = capsys.readouterr().out
    assert "decode step of 128 sequences at context 1024" in out
    assert "attention all-reduce" in out
