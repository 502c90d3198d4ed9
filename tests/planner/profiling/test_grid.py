"""The grid of points: every family, the ends before the middle, and never more than the budget allows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import MeasurementError
from hwmodels.huggingface import load_model
from hwmodels.kernels.table import FAMILIES
from planner.profiling.grid import SHARES, cost_s, depths, guess_s, limit_s, points_for, shapes
from planner.profiling.machine import Machine, slug
from planner.profiling.points import Point, work

GPU = Machine(
    torch=SimpleNamespace(__version__="0"),
    kind="cuda",
    reported="NVIDIA Test",
    name="test",
    dtypes=("bf16", "fp16", "fp8", "int8", "fp32"),
    capability=(9, 0),
    memory_bytes=80 << 30,
    cache_bytes=50 << 20,
    cycle_bytes=100 << 20,
    count=4,
)


@pytest.fixture(scope="module")
def points() -> list[Point]:
    return points_for(8, GPU)


def test_no_point_comes_twice_and_all_fit_their_family(points):
    assert len(set(points)) == len(points)
    assert {point.family for point in points} == set(SHARES)
    for point in points[:: len(points) // 500]:
        assert point == Point.of(point.family, point.dtype, **point.words, **point.sizes)


def test_the_first_tenth_already_spans_the_range_of_rows_and_contexts(points):
    for family, column in (("gemm", "m"), ("attention_decode", "context"), ("moe", "tokens")):
        every = [point.sizes[column] for point in points if point.family == family]
        first = every[: len(every) // 10]
        assert (min(first), max(first)) == (min(every), max(every))
        assert len(set(first)) > len(set(every)) / 2


def test_a_longer_budget_keeps_the_order_and_adds_larger_points(points):
    short = points_for(0.1, GPU, ["gemm"])
    longer, both = [point for point in points if point.family == "gemm"], set(short)
    assert [point for point in longer if point in both] == short
    assert max(work(p).flops for p in longer) > max(work(p).flops for p in short)
    assert all(cost_s(guess_s(point, GPU), GPU) < limit_s(0.1) for point in short)


def test_one_device_has_no_collectives_and_four_have_groups_of_two_and_four():
    assert points_for(1, replace(GPU, count=1), ["collective"]) == []
    assert {point.sizes["gpus"] for point in points_for(1, GPU, ["collective"])} == {2, 4}


def test_formats_the_device_lacks_are_not_asked_for():
    old = replace(GPU, dtypes=("fp16", "fp32"))
    assert {point.dtype for point in points_for(0.1, old)} == {"fp16", "fp32"}


@pytest.mark.parametrize("family", ["gem", "mla_prefill"])
def test_families_that_are_unknown_or_not_measured_are_refused(family):
    with pytest.raises(MeasurementError, match=family):
        points_for(1, GPU, [family])


def test_shapes_of_a_model_are_those_of_its_config():
    found = shapes([load_model("llama-3.1-8b")], [1, 2])
    assert {(6144, 4096), (28672, 4096), (4096, 14336), (14336, 4096)} <= set(found["gemm"])
    assert set(found["attention"]) == {(32, 8, 128), (16, 4, 128)}
    assert not found["moe"]
    assert (4096, 14336, 8, 2, 1, 2, 1) in shapes([load_model("mixtral-8x7b")], [2])["moe"]


@given(st.integers(1, 70))
def test_ladders_begin_with_their_ends_and_halve(count):
    found = depths(count)
    assert found[0] == found[-1] == 0
    for depth in range(1, max(found) + 1):
        done = [i for i in range(count) if found[i] <= depth]
        assert max(b - a for a, b in pairwise(done)) <= -(-(count - 1) // 2**depth)


@given(st.sampled_from(sorted({"gemm", "attention_prefill", "attention_decode"})), st.integers(1, 4096))
def test_work_is_never_below_the_floor_of_the_table(family, size):
    import pandas as pd

    shape = {"m": size, "n": 64, "k": 32, "batch": 2, "new": size, "before": 7, "context": size, "heads": 8}
    shape |= {"kv_heads": 2, "head_dim": 64, "window": 0, "kv_dtype": "bf16"}
    point = Point.of(family, "bf16", **{column: shape[column] for column in FAMILIES[family].shape})
    flops, nbytes, _ = FAMILIES[family].floor(pd.DataFrame([point.columns]))
    amount = work(point)
    assert amount.flops >= flops[0] * (1 - 1e-12)
    assert amount.held_bytes >= amount.moved_bytes >= nbytes[0] * (1 - 1e-12)


@pytest.mark.parametrize("shape", [{"m": 1, "n": 2}, {"m": 1, "n": 2, "k": "3"}])
def test_points_with_other_columns_or_types_are_refused(shape):
    with pytest.raises(MeasurementError, match="gemm point with"):
        Point.of("gemm", "bf16", **shape)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "xeon"),
        ("AMD EPYC 7763 64-Core Processor", "epyc-7763"),
        ("", "device"),
    ],
)
def test_names_are_made_of_what_devices_report(reported, name):
    assert slug(reported) == name
