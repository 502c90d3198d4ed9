"""Laws of interpolated matrix products on small made-up tables, and their error on real ones."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.hardware import load_device
from hwmodels.kernels.aiconfigurator import DISTRIBUTION, open_wheel
from hwmodels.kernels.estimate import Estimate
from hwmodels.kernels.gemm import BatchedGemmTimes, GemmTimes, guide_s, least_s
from hwmodels.kernels.gemm_holdout import held_out
from hwmodels.kernels.table import checked

H100 = load_device("h100-sxm")
SIZES = np.array([1, 8, 64, 65, 256, 1024, 4096])
WIDTHS = np.array([512, 2048, 3072, 8192])
BESIDE = {"device": "h100-sxm", "software": "made up 1", "kernel": "made up", "spread": np.nan, "source": "made up"}


def table(share: object, dtype: str = "bf16") -> pd.DataFrame:
    """A full grid whose times are the guide over `share` (of m, n, k, or one number)."""
    m, n, k = (x.ravel() for x in np.meshgrid(SIZES, WIDTHS, WIDTHS, indexing="ij"))
    eff = share(m, n, k) if callable(share) else share
    seconds = guide_s(dtype, 1.0, m, n, k, H100) / eff
    return checked(pd.DataFrame({"m": m, "n": n, "k": k, "dtype": dtype, "seconds": seconds, **BESIDE}), "gemm", "t")


def noisy(seed: int, scale: float = 0.3) -> pd.DataFrame:
    rows = table(0.8)
    return rows.assign(
        seconds=rows["seconds"] * np.exp(np.abs(np.random.default_rng(seed).normal(0, scale, len(rows))))
    )


def priced(model: GemmTimes, m: object, n: float, k: float, dtype: str = "bf16") -> Estimate:
    found = model.time_s(dtype, np.asarray(m, dtype=float), n, k)
    assert found is not None
    return found


@given(st.integers(0, 2**32 - 1))
def test_table_points_come_back_exactly_however_odd(seed: int) -> None:
    rows = noisy(seed, 1.0)
    model = GemmTimes.fit(rows, H100)
    for (n, k), found in rows.groupby(["n", "k"]):  # type: ignore[misc]
        estimate = priced(model, found["m"].to_numpy(), n, k)
        np.testing.assert_allclose(estimate.seconds, found["seconds"], rtol=1e-12)
        assert (estimate.measured == 1).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(WIDTHS), st.sampled_from(WIDTHS))
def test_between_timed_sizes_the_time_never_turns(seed: int, n: int, k: int) -> None:
    model = GemmTimes.fit(noisy(seed), H100)
    for low, high in pairwise(SIZES):
        steps = np.diff(priced(model, np.linspace(low, high, 50), n, k).seconds)
        assert (steps >= -1e-15).all() or (steps <= 1e-15).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(WIDTHS))
def test_times_that_rise_in_the_table_rise_everywhere(seed: int, n: int) -> None:
    rows = noisy(seed).sort_values(["n", "k", "m"])
    rows["seconds"] = rows.groupby(["n", "k"])["seconds"].cummax()
    model = GemmTimes.fit(rows.reset_index(drop=True), H100)
    seconds = priced(model, np.geomspace(0.25, 60_000, 400), n, 2048).seconds
    assert (np.diff(seconds) >= -1e-15).all()


@given(st.floats(1, 1e6), st.floats(16, 3e5), st.floats(16, 3e5), st.integers(0, 2**32 - 1))
def test_finite_positive_and_no_faster_than_the_peaks(m: float, n: float, k: float, seed: int) -> None:
    rows = noisy(seed)
    quick = rows["m"].to_numpy() >= 1024
    rows.loc[quick, "seconds"] = least_s("bf16", 1.0, rows["m"], rows["n"], rows["k"], H100)[quick] * 1.001
    estimate = priced(GemmTimes.fit(rows, H100), [m], n, k)
    assert np.isfinite(estimate.seconds).all()
    assert (estimate.seconds >= least_s("bf16", 1.0, m, n, k, H100)).all()


def test_scalars_and_arrays_agree() -> None:
    model = GemmTimes.fit(noisy(1), H100)
    m = np.array([1.0, 30, 65, 5000, 90_000])
    whole = priced(model, m, 1536, 2048)
    for i, size in enumerate(m):
        one = priced(model, size, 1536, 2048)
        assert float(one.seconds) == pytest.approx(whole.seconds[i], rel=1e-12)
        assert float(one.measured) == whole.measured[i]


@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (2500, 8192), (40_000, 512), (64, 64)])
def test_a_share_of_the_guide_that_never_changes_is_found_at_every_shape(n: int, k: int) -> None:
    m = np.array([1.0, 20, 500, 4096, 20_000])
    found = priced(GemmTimes.fit(table(0.6), H100), m, n, k).seconds
    np.testing.assert_allclose(found, guide_s("bf16", 1.0, m, n, k, H100) / 0.6, rtol=2e-3)


def test_a_shape_in_between_lies_between_its_neighbours_ratios() -> None:
    rows = table(lambda m, n, k: 0.3 + 0.1 * np.log2(n / 512))
    ratio = priced(GemmTimes.fit(rows, H100), SIZES, 4096, 2048).seconds / guide_s("bf16", 1.0, SIZES, 4096, 2048, H100)
    assert (ratio < 1 / (0.3 + 0.1 * np.log2(3072 / 512))).all()
    assert (ratio > 1 / 0.7).all()


def test_one_glitch_stays_where_it_was_timed() -> None:
    rows = table(0.6)
    odd = (rows["m"] == 256) & (rows["n"] == 2048) & (rows["k"] == 2048)
    model = GemmTimes.fit(rows.assign(seconds=rows["seconds"].mask(odd, rows["seconds"] * 3)), H100)
    assert float(priced(model, 256, 2048, 2048).seconds) == pytest.approx(3 * float(rows.loc[odd, "seconds"].iloc[0]))
    clean = float(guide_s("bf16", 1.0, 256, 2304, 2048, H100)) / 0.6
    assert float(priced(model, 256, 2304, 2048).seconds) == pytest.approx(clean, rel=0.02)


def test_a_hole_takes_the_step_its_neighbours_show() -> None:
    rows = table(lambda m, n, k: np.where(m == 65, 0.4, 0.7))
    hole = (rows["m"] == 65) & (rows["n"] == 2048) & (rows["k"] == 2048)
    model = GemmTimes.fit(rows[~hole].reset_index(drop=True), H100)
    expected = float(rows.loc[hole, "seconds"].iloc[0])
    assert float(priced(model, 65, 2048, 2048).seconds) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("m", "n", "k", "expected"),
    [(500, 2048, 2048, 1), (500, 1024, 1000, 1), (9000, 2048, 2048, 0), (500, 20_000, 512, 0), (500, 128, 128, 0)],
)
def test_measured_says_what_lies_inside_the_table(m: int, n: int, k: int, expected: int) -> None:
    assert float(priced(GemmTimes.fit(table(0.6), H100), m, n, k).measured) == expected


def test_a_gap_wider_than_an_octave_on_both_sides_is_extended() -> None:
    rows = table(0.6)
    model = GemmTimes.fit(rows[rows["n"].isin([512, 8192])].reset_index(drop=True), H100)
    assert float(priced(model, 64, 2048, 2048).measured) == 0


def test_an_unmeasured_format_has_no_price_and_one_row_is_enough() -> None:
    model = GemmTimes.fit(table(0.6).iloc[:1], H100)
    assert model.dtypes == ("bf16",)
    assert model.time_s("fp8", np.ones(1), 512, 512) is None
    assert np.isfinite(priced(model, [1, 50, 5000], 4096, 1024).seconds).all()


def test_of_several_kernels_the_fastest_counts() -> None:
    rows = pd.concat([table(0.6), table(0.7).assign(kernel="other")], ignore_index=True)
    expected = guide_s("bf16", 1.0, 64, 512, 512, H100) / 0.7
    assert float(priced(GemmTimes.fit(rows, H100), 64, 512, 512).seconds) == pytest.approx(float(expected))


def test_rows_beyond_the_peaks_are_not_believed() -> None:
    rows = table(0.6)
    wrong = rows["m"] == 4096
    model = GemmTimes.fit(rows.assign(seconds=rows["seconds"].mask(wrong, rows["seconds"] / 100)), H100)
    seconds = priced(model, 4096, 8192, 8192).seconds
    assert float(seconds) == pytest.approx(float(guide_s("bf16", 1.0, 4096, 8192, 8192, H100)) / 0.6)


def test_arrays_hold_the_whole_model() -> None:
    rows = pd.concat([noisy(3), table(0.5, "fp8")], ignore_index=True)
    model = GemmTimes.fit(rows, H100)
    arrays = model.arrays()
    assert not any(values.dtype.hasobject for values in arrays.values())
    again = GemmTimes.from_arrays(arrays, H100)
    for n, k in ((512, 2048), (1000, 3000), (99_999, 7)):
        one, other = priced(model, SIZES * 3, n, k, "fp8"), priced(again, SIZES * 3, n, k, "fp8")
        np.testing.assert_array_equal(one.seconds, other.seconds)
        np.testing.assert_array_equal(one.measured, other.measured)


def batched(share: float = 0.5) -> pd.DataFrame:
    groups, m, pair = (x.ravel() for x in np.meshgrid([1, 8, 32], [1, 16, 256], [0, 1], indexing="ij"))
    n, k = np.where(pair == 0, 512, 128), np.where(pair == 0, 128, 512)
    seconds = guide_s("bf16", groups, m, n, k, H100) / (share + 0.01 * np.log2(groups))
    frame = pd.DataFrame({"groups": groups, "m": m, "n": n, "k": k, "dtype": "bf16", "seconds": seconds, **BESIDE})
    return checked(frame, "batched_gemm", "t")


def test_batched_products_are_exact_on_the_table_and_between_beyond_it() -> None:
    rows = batched()
    model = BatchedGemmTimes.from_arrays(BatchedGemmTimes.fit(rows, H100).arrays(), H100)
    for row in rows.itertuples():
        found = model.time_s("bf16", row.groups, row.m, row.n, row.k)
        assert found is not None
        assert float(found.seconds) == pytest.approx(row.seconds, rel=1e-12)
        assert float(found.measured) == 1
    between = model.time_s("bf16", 16, np.array([4.0, 100.0]), 512, 128)
    assert between is not None
    assert (between.measured == 1).all()
    share = guide_s("bf16", 16, np.array([4.0, 100.0]), 512, 128, H100) / between.seconds
    assert ((share > 0.53) & (share < 0.55)).all()
    for groups, m, n, k in ((64, 16, 512, 128), (8, 1000, 512, 128), (8, 16, 256, 256)):
        beyond = model.time_s("bf16", groups, m, n, k)
        assert beyond is not None
        assert float(beyond.measured) == 0
        assert 0.5 - 1e-9 <= float(guide_s("bf16", groups, m, n, k, H100) / beyond.seconds) <= 0.55 + 1e-9
    assert model.time_s("fp8", 8, 16, 512, 128) is None


@pytest.mark.parametrize("columns", [{}, {"groups": 8}])
@pytest.mark.parametrize("count", [0, 1])
def test_nothing_can_be_left_out_of_one_row(columns: dict[str, int], count: int) -> None:
    found = held_out(table(0.5).iloc[:count].assign(**columns), H100, np.random.default_rng(0))
    assert found.empty
    assert {"family", "dtype", "experiment", "size", "seconds", "predicted_s"} <= set(found.columns)


def test_left_out_rows_do_not_reach_their_predictions() -> None:
    rows = noisy(5)
    first = held_out(rows, H100, np.random.default_rng(0), limit=60)
    key = ["experiment", "m", "n", "k"]
    hit = first.iloc[[0]]
    changed = rows.copy()
    same = (changed[["m", "n", "k"]] == hit[["m", "n", "k"]].to_numpy()[0]).all(axis=1)
    changed.loc[same, "seconds"] *= 7
    second = held_out(changed, H100, np.random.default_rng(0), limit=60)
    both = hit.merge(second, on=key)
    assert both["seconds_y"].iloc[0] == pytest.approx(7 * both["seconds_x"].iloc[0])
    assert both["predicted_s_y"].iloc[0] == pytest.approx(both["predicted_s_x"].iloc[0], rel=1e-12)


def test_a_device_without_a_format_prices_it_at_its_16_bit_peak() -> None:
    device = replace(H100, peak_flops_per_s={"bf16": H100.peak_flops_per_s["bf16"]})
    assert least_s("fp8", 1.0, 4096, 512, 512, device) == least_s("bf16", 1.0, 4096, 512, 512, device)


def test_error_on_measured_products_of_an_h200() -> None:
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed")
    device = load_device("h200-sxm")
    rows = open_wheel().read("h200-sxm", "tensorrt-llm", "gemm")
    found = held_out(rows[rows["dtype"] == "bf16"], device, np.random.default_rng(2), limit=500)
    error = (found["predicted_s"] / found["seconds"] - 1).abs().groupby(found["experiment"])
    assert error.median()["point"] <= 0.04
    assert error.quantile(0.9)["point"] <= 0.15
    assert error.median()["shape"] <= 0.035
    assert error.quantile(0.9)["beyond"] <= 0.3
