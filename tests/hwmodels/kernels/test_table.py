"""The schema of kernel tables: what it takes, what it refuses with the row, and that it writes whole files or none."""

from __future__ import annotations

import os
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import MeasurementError
from hwmodels.hardware import load_device
from hwmodels.kernels.table import (
    FAMILIES,
    TEXT,
    beyond_peak,
    checked,
    checked_against,
    family_named,
    read_table,
    write_table,
)

H100 = load_device("h100-sxm")

#: One legal row of every family that is far from any peak.
VALUES = {
    "kind": "all-reduce",
    "distribution": "balanced",
    "kv_dtype": "bf16",
    "gated": 1,
    "before": 0,
    "window": 0,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 128,
    "groups": 4,
}
COMMON = {
    "dtype": "bf16",
    "device": "h100-sxm",
    "software": "vllm 0.11",
    "kernel": "some",
    "seconds": 1e-3,
    "spread": 0.01,
    "source": "measured here",
}


def row(family, **changed):
    shape = {column: VALUES.get(column, 16) for column in FAMILIES[family].shape}
    return {**shape, **COMMON, **changed}


def frame(family, *rows):
    return pd.DataFrame([row(family, **changed) for changed in rows or ({},)])


def put(table, at, column, value):
    """The table with one cell changed, whatever the value is."""
    cells = list(table[column])
    cells[at] = value
    return table.assign(**{column: pd.Series(cells, dtype=object)})


def gemm(*seconds, m=4096, n=4096, k=4096, dtype="bf16"):
    return frame("gemm", *({"m": m + i, "n": n, "k": k, "dtype": dtype, "seconds": s} for i, s in enumerate(seconds)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_legal_row_of_every_family_is_kept_in_the_familys_order(family):
    shuffled = frame(family)[sorted(FAMILIES[family].columns)]
    kept = checked(shuffled, family, "here")
    assert tuple(kept.columns) == FAMILIES[family].columns
    assert kept.iloc[0].to_dict() == row(family)
    assert not beyond_peak(kept, family, H100).any()
    pd.testing.assert_frame_equal(checked(kept, family, "again"), kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_tables_are_tables(family):
    empty = pd.DataFrame(columns=list(FAMILIES[family].columns))
    assert checked(empty, family, "here").empty
    assert not beyond_peak(checked(empty, family, "here"), family, H100).any()


def test_unknown_families_are_named_with_the_known_ones():
    with pytest.raises(MeasurementError, match=r"'gem': expected one of gemm, "):
        family_named("gem")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_missing_column_is_named(family):
    for column in FAMILIES[family].columns:
        with pytest.raises(MeasurementError, match=re.escape(f"columns missing ['{column}']")):
            checked(frame(family).drop(columns=column), family, "here")


def test_unknown_and_repeated_columns_are_named():
    with pytest.raises(MeasurementError, match=r"unknown \['tflops'\]"):
        checked(gemm(1e-3).assign(tflops=1.0), "gemm", "here")
    twice = pd.concat([gemm(1e-3), gemm(1e-3)[["m"]]], axis=1)
    with pytest.raises(MeasurementError, match=r"here: columns \['m'\] occur more than once"):
        checked(twice, "gemm", "here")


BAD_NUMBERS = [np.nan, None, np.inf, -np.inf, 0, -1, 1.5, "many", "", 1e30, -(10**30), [], {}]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize("column", ["m", "k"])
def test_sizes_are_positive_whole_numbers(column, value):
    rows = put(gemm(1e-3, 2e-3, 3e-3), 1, column, value)
    with pytest.raises(MeasurementError, match=rf"here: row 1: {column} (is missing|= .*; expected a whole number)"):
        checked(rows, "gemm", "here")


@pytest.mark.parametrize("value", [np.nan, None, np.inf, -np.inf, 0.0, -1e-6, "fast", []], ids=repr)
def test_times_are_positive_and_finite(value):
    rows = put(gemm(1e-3, 2e-3), 1, "seconds", value)
    with pytest.raises(MeasurementError, match=r"here: row 1: seconds (is missing|= .*; expected a positive time)"):
        checked(rows, "gemm", "here")


@pytest.mark.parametrize("value", [-0.1, np.inf, "wide"], ids=repr)
def test_a_spread_is_a_share_or_nothing(value):
    with pytest.raises(MeasurementError, match=r"row 0: spread = .*expected a share"):
        checked(put(gemm(1e-3), 0, "spread", value), "gemm", "here")
    assert np.isnan(checked(put(gemm(1e-3), 0, "spread", None), "gemm", "here")["spread"].iloc[0])


@pytest.mark.parametrize(
    ("family", "column", "value"),
    [
        ("gemm", "dtype", "bfloat16"),
        ("moe", "dtype", "nvfp4"),
        ("attention_decode", "dtype", "fp8_block"),  # a format of weights, not of products
        ("attention_decode", "kv_dtype", "e4m3"),
        ("mla_prefill", "kv_dtype", ""),
        ("gemm", "kernel", "  "),
        ("collective", "kind", ""),
    ],
)
def test_names_are_known_where_the_arithmetic_hangs_on_them(family, column, value):
    with pytest.raises(MeasurementError, match=rf"row 0: {column} = {value!r}; expected"):
        checked(frame(family, {column: value}), family, "here")


@given(st.sampled_from(sorted(FAMILIES)), st.data())
def test_one_wrong_cell_anywhere_is_told_with_its_row_and_column(family, data):
    column = data.draw(st.sampled_from([c for c in FAMILIES[family].columns if c != "spread"]))
    rows = data.draw(st.integers(1, 4))
    wrong = data.draw(st.integers(0, rows - 1))
    value = data.draw(st.sampled_from([None, np.nan] if column in TEXT else [None, np.nan, -3, "x", np.inf]))
    number = next(c for c in FAMILIES[family].shape if c not in TEXT)
    table = put(frame(family, *({number: 17 + i} for i in range(rows))), wrong, column, value)
    with pytest.raises(MeasurementError) as told:
        checked(table, family, "here")
    assert str(told.value).startswith(f"here: row {wrong}: {column} ")
    assert "\n" not in str(told.value)


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["a", "b"])), min_size=1, max_size=8))
def test_one_row_per_key(keys):
    table = frame("gemm", *({"m": m, "kernel": kernel} for m, kernel in keys))
    if len(set(keys)) == len(keys):
        assert len(checked(table, "gemm", "here")) == len(keys)
        return
    with pytest.raises(MeasurementError, match="a second time; keep one row per key"):
        checked(table, "gemm", "here")


def test_numbers_written_as_text_are_numbers():
    kept = checked(gemm(1e-3).astype({"m": str, "seconds": str}), "gemm", "here")
    assert kept["m"].iloc[0] == 4096
    assert kept["seconds"].iloc[0] == 1e-3


@given(
    st.integers(1, 20000),
    st.integers(1, 20000),
    st.integers(1, 20000),
    st.sampled_from(["bf16", "fp8", "fp8_block", "int4"]),
    st.floats(0.2, 5.0),
)
def test_efficiency_above_one_is_beyond_the_peak(m, n, k, dtype, efficiency):
    """2mnk over the peak of what multiplies is what no kernel undercuts; int4 weights are widened to 16 bit."""
    peak = H100.peak_flops_per_s["fp8" if dtype.startswith("fp8") else "bf16"]
    seconds = 2.0 * m * n * k / peak / efficiency
    told = bool(beyond_peak(gemm(seconds, m=m, n=n, k=k, dtype=dtype), "gemm", H100).iloc[0])
    if efficiency > 1.06:
        assert told
    weights = n * k * 2
    if efficiency < 1.04 and weights < 256e6:
        assert not told


def test_large_weights_cannot_be_read_faster_than_memory_allows():
    n = k = 16384
    least = n * k * 2 / H100.memory_bytes_per_s
    assert beyond_peak(gemm(least * 0.9, m=1, n=n, k=k), "gemm", H100).all()
    assert not beyond_peak(gemm(least * 1.1, m=1, n=n, k=k), "gemm", H100).any()


def test_a_cache_cannot_be_read_faster_than_memory_allows():
    shape = {"batch": 64, "context": 32768, "kv_heads": 8, "heads": 64, "head_dim": 128}
    least = 64 * 32768 * 2 * 8 * 128 * 2 / H100.memory_bytes_per_s
    told = beyond_peak(
        frame("attention_decode", {**shape, "seconds": least * 0.9}, {**shape, "seconds": least * 1.1}),
        "attention_decode",
        H100,
    )
    assert told.tolist() == [True, False]
    windowed = frame("attention_decode", {**shape, "window": 128, "seconds": least * 0.9})
    assert not beyond_peak(windowed, "attention_decode", H100).any()


def test_times_in_the_wrong_unit_are_refused_with_the_row():
    fair = np.array([2e-4, 4e-4])
    checked_against(gemm(*fair), "gemm", H100, "here")
    with pytest.raises(MeasurementError, match=r"here: row 0 takes 2e-07 s, less than the peak of h100-sxm allows"):
        checked_against(gemm(*(fair / 1e3)), "gemm", H100, "here")
    with pytest.raises(MeasurementError, match=r"here: row 0 takes 0\.2 s, and no row like it reaches a thousandth"):
        checked_against(gemm(*(fair * 1e3)), "gemm", H100, "here")
    # Small kernels say nothing about the unit: launches take what they take.
    checked_against(gemm(5e-3, m=1, n=16, k=16), "gemm", H100, "here")


def test_tables_are_of_one_device():
    mixed = frame("gemm", {"m": 1}, {"m": 2, "device": "h200-sxm"})
    with pytest.raises(MeasurementError, match="rows of h200-sxm beside h100-sxm"):
        checked_against(mixed, "gemm", H100, "here")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read(family, tmp_path):
    path = tmp_path / "deep" / f"{family}.parquet"
    table = frame(family, {"seconds": 1e-3, "spread": None})
    write_table(table, family, path)
    pd.testing.assert_frame_equal(read_table(path, family), checked(table, family, "here"))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_wrong_table_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "gemm.parquet"
    write_table(gemm(1e-3), "gemm", path)
    before = path.read_bytes()
    with pytest.raises(MeasurementError):
        write_table(gemm(-1.0), "gemm", path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "gemm.parquet"
    write_table(gemm(1e-3), "gemm", path)
    before = path.read_bytes()

    def full(table, where, compression):
        where.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hwmodels.kernels.table.pq.write_table", full)
    with pytest.raises(MeasurementError, match=r"gemm\.parquet: cannot be written \(No space left on device\)"):
        write_table(gemm(2e-3), "gemm", path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MeasurementError, match="cannot be written") as told:
        write_table(gemm(1e-3), "gemm", tmp_path / "file" / "gemm.parquet")
    assert "\n" not in str(told.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_told_in_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(MeasurementError, match="cannot be written"):
        write_table(gemm(1e-3), "gemm", tmp_path / "gemm.parquet")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"m,n,k\n1,2,3\n"])
def test_files_that_are_no_tables_are_named(tmp_path, content):
    path = tmp_path / "gemm.parquet"
    path.write_bytes(content)
    with pytest.raises(MeasurementError, match=r"gemm\.parquet: not a readable Parquet file"):
        read_table(path, "gemm")
    with pytest.raises(MeasurementError, match=r"none\.parquet: not a readable Parquet file"):
        read_table(tmp_path / "none.parquet", "gemm")


def test_a_table_of_another_family_is_refused(tmp_path):
    write_table(gemm(1e-3), "gemm", tmp_path / "gemm.parquet")
    with pytest.raises(MeasurementError, match="columns missing"):
        read_table(tmp_path / "gemm.parquet", "moe")
