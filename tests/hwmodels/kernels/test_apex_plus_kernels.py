"""APEX+'s profile CSVs: n counts tokens, sizes are KiB, and the file's name tells the collective."""

from __future__ import annotations

import pandas as pd
import pytest

from hwmodels.errors import MeasurementError
from hwmodels.hardware import load_device
from hwmodels.kernels.apex_plus import read_apex_plus
from hwmodels.kernels.table import beyond_peak

GEMM = {"gpu": "H100-SXM-80GB", "dtype": "half", "m": 4096, "k": 8192, "n": 256, "time(us)": 40}
MHA = {"gpu": "H100-SXM-80GB", "dtype": "half", "num_heads": 32, "head_size": 128, "batch_size": 2, "seq_len": 1024,
       "time(us)": 90}  # fmt: skip
REDUCE = {"gpu": "H100-SXM-80GB", "num_nodes": 1, "num_gpus_per_node": 8, "dtype": "half", "size(kb)": 1024,
          "time(us)": 34.0}  # fmt: skip


def read(tmp_path, name, *rows):
    path = tmp_path / name
    pd.DataFrame(list(rows)).to_csv(path, index=False)
    return read_apex_plus(path)


def test_tokens_are_the_columns_of_the_second_matrix(tmp_path):
    row = read(tmp_path, "gemm_0.csv", GEMM)["gemm"].iloc[0]
    assert row[["m", "n", "k", "dtype", "device"]].tolist() == [256, 4096, 8192, "fp16", "h100-sxm"]
    assert row["seconds"] == pytest.approx(40e-6)


def test_attention_is_of_whole_prompts(tmp_path):
    row = read(tmp_path, "mha_0.csv", MHA)["attention_prefill"].iloc[0]
    assert row[["batch", "new", "before", "heads", "kv_heads", "head_dim"]].tolist() == [2, 1024, 0, 32, 32, 128]
    with pytest.raises(MeasurementError, match="without a causal mask"):
        read(tmp_path, "bimha_0.csv", MHA)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("all_reduce", "all-reduce"),
        ("all_gather", "all-gather"),
        ("reduce_scatter", "reduce-scatter"),
        ("alltoall", "all-to-all"),
        ("sendrecv", "point-to-point"),
    ],
)
def test_collectives(tmp_path, name, kind):
    tables = read(tmp_path, f"{name}.csv", REDUCE, REDUCE | {"size(kb)": 0}, REDUCE | {"gpu": "H200", "dtype": "float"})
    rows = tables["collective"]
    assert rows[["kind", "gpus", "nodes", "bytes", "dtype", "device"]].to_numpy().tolist() == [
        [kind, 8, 1, 1 << 20, "fp16", "h100-sxm"],
        [kind, 8, 1, 1 << 20, "fp32", "h200-sxm"],
    ]
    assert rows["seconds"].tolist() == pytest.approx([34e-6, 34e-6])
    assert tables.left_out == {"message below 1 KiB": 1}


def test_the_name_has_to_tell_the_collective(tmp_path):
    with pytest.raises(MeasurementError, match=r"expected one of all_reduce\.csv, "):
        read(tmp_path, "comm.csv", REDUCE)


def test_lowered_clocks_other_devices_and_formats_are_counted(tmp_path):
    clocked = GEMM | {"graph_clk_freq": 1980}
    tables = read(
        tmp_path,
        "gemm.csv",
        clocked,
        clocked | {"graph_clk_freq": 810, "time(us)": 90},
        clocked | {"gpu": "V100-PCIE-16GB"},
        clocked | {"dtype": "posit"},
    )
    assert tables["gemm"]["seconds"].tolist() == [pytest.approx(40e-6)]
    assert tables.left_out == {
        "measured at a lowered clock": 1,
        "of a device without a profile": 1,
        "number format without a name here": 1,
    }


def test_times_beyond_the_peak_or_cut_off_to_nothing_are_counted(tmp_path):
    tables = read(
        tmp_path, "gemm.csv", GEMM, GEMM | {"n": 512, "time(us)": 0}, GEMM | {"n": 16384, "time(us)": 600}, GEMM
    )
    assert tables.left_out == {"no positive time": 1, "faster than the peak of h100-sxm": 1}
    assert tables["gemm"]["m"].tolist() == [256]
    assert not beyond_peak(tables["gemm"], "gemm", load_device("h100-sxm")).any()


def test_a_file_of_unknown_devices_only_is_empty(tmp_path):
    tables = read(tmp_path, "gemm.csv", GEMM | {"gpu": "V100-PCIE-16GB"})
    assert not tables
    assert tables.left_out.total() == 1


def test_other_layouts_are_told(tmp_path):
    with pytest.raises(MeasurementError, match=r"expected APEX\+'s GEMM, attention or collective layout"):
        read(tmp_path, "gemm.csv", {"m": 1, "n": 2})
