"""Errors of cost models on measured kernels: a row is priced as the operator it is, and errors are counted."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import operators as ops
from hwmodels.efficiency import Efficiency
from hwmodels.errors import MeasurementError
from hwmodels.hardware import load_cluster, load_device
from hwmodels.huggingface import load_model
from hwmodels.kernels.table import FAMILIES, checked, write_table
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from planner.validation import kernels
from planner.validation.kernels import ANALYTIC, CALIBRATED, INTERPOLATED, fastest, grouped, kernel_report
from planner.validation.rowprices import analytic_s, sizes

HARDWARE = "h100-sxm"
H100 = load_device(HARDWARE)
COMMON = {"device": HARDWARE, "software": "vllm 1", "kernel": "some", "spread": np.nan, "source": "made up"}


def table(family, *rows):
    return checked(pd.DataFrame([{**COMMON, "seconds": 1.0, **row} for row in rows]), family, "test")


def one(value):
    return np.array([float(value)])


def price(op, gpus=1):
    return AnalyticCost(load_cluster(HARDWARE, gpus), Mapping(tp=gpus)).time_s(op)[0]


def attention(model, phase, *batch, tp, p):
    build = ops.decode_attention if phase == "decode" else ops.prefill_attention
    found = build(load_model(model).layers[0].attention, *map(one, batch), tp, p, 1)
    return next(op for op in found if isinstance(op, ops.AttentionCore))


FP8 = Precision("fp8", "fp8", "fp8")
BF16 = Precision()
#: A row of a table, and the operator of a model that it is.
SAME = {
    "gemm": (
        {"m": 64, "n": 4096, "k": 1024, "dtype": "fp8"},
        ops.Gemm("x", one(64), 4096, 1024, Precision("fp8", "fp8")),
    ),
    "widened gemm": (
        {"m": 300, "n": 4096, "k": 1024, "dtype": "int4"},
        ops.Gemm("x", one(300), 4096, 1024, Precision("int4", "bf16")),
    ),
    "batched_gemm": (
        {"groups": 16, "m": 8, "n": 512, "k": 128, "dtype": "bf16"},
        ops.Gemm("x", one(8), 512, 128, BF16, groups=16),
    ),
    "attention_prefill": (
        {"batch": 1, "new": 700, "before": 300, "heads": 32, "kv_heads": 8, "head_dim": 128, "window": 0,
         "kv_dtype": "bf16", "dtype": "bf16"},
        attention("llama-3.1-8b", "prefill", 700, 300, tp=1, p=BF16),
    ),
    "attention_decode": (
        {"batch": 16, "context": 1000, "heads": 8, "kv_heads": 2, "head_dim": 128, "window": 0, "kv_dtype": "fp8",
         "dtype": "fp8"},
        attention("llama-3.1-8b", "decode", 16, 16000, tp=4, p=FP8),
    ),
    "windowed attention_decode": (
        {"batch": 16, "context": 1000, "heads": 64, "kv_heads": 8, "head_dim": 64, "window": 128, "kv_dtype": "bf16",
         "dtype": "bf16"},
        attention("gpt-oss-20b", "decode", 16, 16000, tp=1, p=BF16),
    ),
    "mla_prefill": (
        {"batch": 1, "new": 512, "before": 128, "heads": 16, "kv_dtype": "bf16", "dtype": "bf16"},
        attention("deepseek-v3", "prefill", 512, 128, tp=8, p=BF16),
    ),
    "mla_decode": (
        {"batch": 4, "context": 2048, "heads": 16, "kv_dtype": "bf16", "dtype": "bf16"},
        attention("deepseek-v3", "decode", 4, 8192, tp=8, p=BF16),
    ),
    "elementwise": ({"bytes": 1 << 20, "dtype": "bf16"}, ops.Elementwise("x", one(1 << 20))),
    "collective": (
        {"kind": "all-reduce", "gpus": 4, "nodes": 1, "bytes": 1 << 20, "dtype": "bf16"},
        ops.Communication("x", "all-reduce", "tp", one(1 << 20)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_a_row_costs_what_the_operator_costs(name):
    row, op = SAME[name]
    family = name.split()[-1]
    rows = table(family, row)
    assert analytic_s(rows, family, HARDWARE, H100)[0] == pytest.approx(price(op, row.get("gpus", 1)), rel=1e-12)
    assert sizes(rows, family)[0] == pytest.approx(op.flops[0] or op.bytes[0])


def test_an_expert_row_costs_what_the_expert_block_costs():
    model = load_model("mixtral-8x7b")
    ff = model.layers[0].feed_forward
    block = ops.expert_feed_forward(model, ff, one(64), one(64), Mapping(tp=4, ep=2, expert_tp=2), BF16, 1)
    op = next(op for op in block if isinstance(op, ops.Experts))
    row = {"tokens": 64, "hidden": model.hidden, "intermediate": ff.intermediate, "experts": ff.experts,
           "top_k": ff.top_k, "tp": 2, "ep": 2, "gated": 1, "distribution": "balanced", "dtype": "bf16"}  # fmt: skip
    assert analytic_s(table("moe", row), "moe", HARDWARE, H100)[0] == pytest.approx(price(op), rel=1e-12)


@settings(max_examples=20)
@given(st.permutations(range(12)))
def test_prices_come_in_the_order_of_the_rows(order):
    shapes = [(m, n, dtype) for m in (1, 64, 500) for n in (512, 4096) for dtype in ("bf16", "fp8")]
    rows = table("gemm", *({"m": m, "n": n, "k": 1024, "dtype": dtype} for m, n, dtype in shapes))
    whole = analytic_s(rows, "gemm", HARDWARE, H100)
    assert np.array_equal(analytic_s(rows.iloc[list(order)], "gemm", HARDWARE, H100), whole[list(order)])


def test_groups_a_cluster_cannot_have_are_not_priced():
    rows = table(
        "collective",
        *({"kind": "all-reduce", "gpus": gpus, "nodes": nodes, "bytes": 1024, "dtype": "bf16"}
          for gpus, nodes in ((8, 1), (16, 2), (8, 2), (16, 1), (10**6, 1))),
    )  # fmt: skip
    assert np.isfinite(analytic_s(rows, "collective", HARDWARE, H100)).tolist() == [True, True, False, False, False]


def test_families_without_an_operator_are_not_priced():
    rows = table("copy", {"kind": "h2d", "bytes": 1024, "dtype": "bf16"})
    assert np.isnan(analytic_s(rows, "copy", HARDWARE, H100)).all()
    assert sizes(rows, "copy").tolist() == [1024]


def test_the_roofline_is_held_against_what_its_operators_stand_for(no_holdouts):
    shape = {"new": 512, "before": 0, "heads": 8, "kv_heads": 8, "head_dim": 128, "window": 0, "kv_dtype": "bf16",
             "dtype": "bf16"}  # fmt: skip
    several = table("attention_prefill", *({"batch": batch, **shape} for batch in (1, 2, 8)))
    report = kernel_report({"attention_prefill": several}, HARDWARE, H100)
    assert {group.whole.n for group in report.groups} == {1}
    copies = table("copy", {"kind": "h2d", "bytes": 1024, "dtype": "bf16"})
    assert not kernel_report({"copy": copies}, HARDWARE, H100).groups


@pytest.fixture
def no_holdouts(monkeypatch):
    monkeypatch.setattr(kernels, "HELD_OUT", {})


def test_errors_are_counted_by_group_and_size():
    ratio = np.array([1.1, 0.8, 1.0, 1.3, np.nan, 2.0, 1.0, 1.0])
    found = pd.DataFrame(
        {"family": "gemm", "dtype": ["bf16"] * 5 + ["fp8"] * 3, "experiment": "point", "size": np.arange(8.0)[::-1],
         "seconds": 2.0, "predicted_s": ratio * 2}
    )  # fmt: skip
    first, second = grouped(found, INTERPOLATED)
    assert (first.dtype, first.whole.n, first.unpriced) == ("bf16", 4, 1)
    assert first.whole.median == pytest.approx(0.15)
    assert first.whole.p90 == pytest.approx(np.quantile([0.1, 0.2, 0.0, 0.3], 0.9))
    assert first.whole.bias == pytest.approx(0.05)
    assert [part.median for part in first.classes] == pytest.approx([0.3, 0.0, 0.2, 0.1])  # small to large
    assert (second.dtype, second.whole.n, len(second.classes)) == ("fp8", 3, 3)


def test_a_group_without_a_price_is_no_group():
    nothing = pd.DataFrame({"family": ["gemm"], "dtype": "bf16", "experiment": "point", "size": 1.0, "seconds": 1.0,
                            "predicted_s": np.nan})  # fmt: skip
    assert grouped(nothing, INTERPOLATED) == []


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from("ab"), st.floats(1e-6, 1)), min_size=1, max_size=20))
def test_of_several_kernels_the_fastest_counts(kernels_):
    rows = pd.DataFrame(
        [
            {"m": m, "n": 16, "k": 16, "dtype": "bf16", **COMMON, "kernel": kernel, "seconds": s}
            for m, kernel, s in kernels_
        ]
    )
    found = fastest(rows, "gemm", np.random.default_rng(0), 100).set_index("m")["seconds"]
    assert found.to_dict() == rows.groupby("m")["seconds"].min().to_dict()
    assert len(fastest(rows, "gemm", np.random.default_rng(0), 2)) <= 2


#: A device whose kernels reach half of what is usual.
SLOW = replace(H100, efficiency=Efficiency(gemm_mfu=0.375, memory_mbu=0.45))


def collectives():
    """All-reduces that take what the calibrated cost model says."""
    rows = [{"kind": "all-reduce", "gpus": gpus, "nodes": 1, "bytes": 2**e, "dtype": "bf16"}
            for gpus in (2, 4, 8) for e in range(10, 28)]  # fmt: skip
    made = table("collective", *rows)
    return made.assign(seconds=analytic_s(made, "collective", HARDWARE, H100))


def products():
    made = table(
        "gemm", *({"m": m, "n": n, "k": 4096, "dtype": "bf16"} for m in (1, 16, 256, 4096) for n in (512, 8192))
    )
    return made.assign(seconds=analytic_s(made, "gemm", HARDWARE, SLOW))


def test_the_calibrated_model_predicts_what_it_made(no_holdouts):
    report = kernel_report({"gemm": products(), "collective": collectives()}, HARDWARE, SLOW)
    errors = {(group.cost, group.family): group.whole for group in report.groups}
    assert errors[CALIBRATED, "gemm"].p90 < 1e-12
    assert errors[CALIBRATED, "collective"].p90 < 1e-12
    assert errors[ANALYTIC, "gemm"].bias < -0.1  # the default efficiencies promise too much of this device
    assert report.measured == {"gemm": 8, "collective": 54}
    assert report.software == {"gemm": ("vllm 1",), "collective": ("vllm 1",)}
    assert report.not_interpolated == ("gemm", "collective")


def test_the_interpolated_model_is_asked_for_the_family_and_counted(monkeypatch):
    asked = []

    def twice(rows, device, rng, limit=2000):
        asked.append((len(rows), device.name, limit))
        return pd.DataFrame({"dtype": rows["dtype"], "experiment": "point", "size": rows["m"].astype(float),
                             "seconds": rows["seconds"], "predicted_s": rows["seconds"] * 2})  # fmt: skip

    monkeypatch.setattr(kernels, "HELD_OUT", {"gemm": twice})
    report = kernel_report({"gemm": products()}, HARDWARE, H100, rows=50)
    assert asked == [(8, HARDWARE, 50)]
    interpolated = next(group for group in report.groups if group.cost == INTERPOLATED)
    assert (interpolated.family, interpolated.whole.median, interpolated.whole.n) == ("gemm", 1.0, 8)
    assert report.not_interpolated == ()


def test_figures_of_a_family_do_not_hang_on_the_others(no_holdouts):
    tables = {"gemm": products(), "collective": collectives()}
    both = kernel_report(tables, HARDWARE, H100, rows=20)
    alone = kernel_report(tables, HARDWARE, H100, rows=20, families=["collective"])
    assert [group for group in both.groups if group.family == "collective"] == list(alone.groups)


def test_every_holdout_belongs_to_a_family():
    assert set(kernels.HELD_OUT) <= set(FAMILIES)


def noisy(family, *shapes, **fixed):
    """A table around the calibrated cost model: every row up to 5 % off, no two alike."""
    made = table(family, *({"dtype": "bf16", **fixed, **shape} for shape in shapes))
    price = analytic_s(made, family, HARDWARE, H100)
    return made.assign(seconds=price * (1 + 0.05 * np.random.default_rng(1).random(len(made))))


def grid(**axes):
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


SIZES = [1, 8, 64, 512, 4096]
TABLES = {
    "gemm": noisy("gemm", *grid(m=SIZES, n=[512, 2048, 8192], k=[512, 2048, 8192])),
    "batched_gemm": noisy("batched_gemm", *grid(groups=[4, 16, 64], m=SIZES), n=512, k=128),
    "moe": noisy(
        "moe", *grid(tokens=SIZES, hidden=[2048, 4096], ep=[1, 4]), intermediate=1024, experts=64, top_k=4, tp=1,
        gated=1, distribution="balanced",
    ),
    "attention_prefill": noisy(
        "attention_prefill", *grid(batch=[1, 4, 16], new=SIZES[1:], heads=[8, 32]), before=0, kv_heads=8, head_dim=128,
        window=0, kv_dtype="bf16",
    ),
    "attention_decode": noisy(
        "attention_decode", *grid(batch=[1, 4, 16, 64], context=SIZES[1:], heads=[8, 32]), kv_heads=8, head_dim=128,
        window=0, kv_dtype="bf16",
    ),
    "mla_prefill": noisy(
        "mla_prefill", *grid(batch=[1, 4, 16], new=SIZES[1:], heads=[16, 128]), before=0, kv_dtype="bf16"
    ),
    "mla_decode": noisy("mla_decode", *grid(batch=[1, 4, 16, 64], context=SIZES[1:], heads=[16, 128]), kv_dtype="bf16"),
    "collective": noisy(
        "collective", *grid(kind=["all-reduce", "all-gather"], gpus=[2, 8], bytes=[2**e for e in range(10, 28, 3)]),
        nodes=1,
    ),
    "expert_exchange": noisy(
        "expert_exchange", *grid(kind=["dispatch", "combine"], gpus=[4, 8], tokens=SIZES), nodes=1, hidden=7168,
        experts=256, top_k=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", kernels.HELD_OUT)
def test_what_is_left_out_tells_nothing_about_its_prediction(family):
    """A tenth more in the row that is left out: its prediction stays what it was, to the last bit."""
    rows = TABLES[family]
    changed = int(np.random.default_rng(2).integers(len(rows)))
    more = rows.copy()
    more.loc[changed, "seconds"] *= 1.1

    def predictions(table):
        found = kernels.HELD_OUT[family](table, H100, np.random.default_rng(3), 10_000)
        found = found[found["seconds"] == table["seconds"].iloc[changed]]
        return found.groupby("experiment")["predicted_s"].agg(list).to_dict()

    before, after = predictions(rows), predictions(more)
    assert "point" in before
    assert after == before


@pytest.mark.parametrize("family", kernels.HELD_OUT)
def test_left_out_rows_of_a_smooth_table_are_predicted(family):
    report = kernel_report({family: TABLES[family]}, HARDWARE, H100, rows=500)
    point = next(group for group in report.groups if (group.cost, group.experiment) == (INTERPOLATED, "point"))
    assert point.whole.median < 0.15
    calibrated = next(group for group in report.groups if group.cost == CALIBRATED)
    assert 0 < calibrated.whole.p90 < 0.05


@pytest.mark.parametrize("family", kernels.HELD_OUT)
def test_a_single_row_is_priced_by_the_roofline_only(family):
    report = kernel_report({family: TABLES[family].iloc[:1]}, HARDWARE, H100)
    assert {group.cost for group in report.groups} == {CALIBRATED, ANALYTIC}


def test_left_out_collectives_are_predicted_from_their_neighbours():
    report = kernel_report({"collective": collectives()}, HARDWARE, H100, rows=100)
    point = next(group for group in report.groups if (group.cost, group.experiment) == (INTERPOLATED, "point"))
    assert point.whole.n > 40
    assert point.whole.median < 0.05


@pytest.mark.parametrize("family", ["gem", "moe", ""])
def test_families_that_were_not_measured_are_told(no_holdouts, family):
    with pytest.raises(MeasurementError, match=f"family '{family}': expected one of gemm, which were measured"):
        kernel_report({"gemm": products()}, HARDWARE, H100, families=[family])


def test_the_command_reads_ones_own_tables(tmp_path, capsys):
    from ui.validatingkernels import kernels as command

    write_table(collectives(), "collective", tmp_path / "collective.parquet")
    command(HARDWARE, source=str(tmp_path), rows=100, as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert {"version", "asked", "groups", "measured", "software", "left_out", "not_interpolated", "wall_s"} <= set(
        content
    )
    assert {group["cost"] for group in content["groups"]} == {INTERPOLATED, CALIBRATED, ANALYTIC}
    assert {"median", "p90", "bias", "n", "smallest", "largest"} == set(content["groups"][0]["whole"])
    command(HARDWARE, source=str(tmp_path), rows=100)
    out = capsys.readouterr().out
    assert "collective on h100-sxm" in out
    assert "calibrated" in out
