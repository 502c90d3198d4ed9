"""Tables of any known layout at a place: recognised by columns or folder, of one device, and what is told otherwise."""

from __future__ import annotations

import pandas as pd
import pytest

from hwmodels.errors import MeasurementError
from hwmodels.hardware import load_device
from hwmodels.kernels.published import read_published
from hwmodels.kernels.sources import read_tables
from hwmodels.kernels.table import FAMILIES, write_table

OWN = {"m": 4096, "n": 4096, "k": 4096, "dtype": "bf16", "device": "h100-sxm", "software": "torch 2.9",
       "kernel": "cublas", "seconds": 2e-4, "spread": 0.01, "source": "measured here"}  # fmt: skip
WHEEL_GEMM = {"gemm_dtype": "bfloat16", "m": 64, "n": 4096, "k": 4096, "kernel_source": "torch", "latency": 0.05}
WHEEL_NCCL = {"nccl_dtype": "half", "op_name": "all_gather", "num_gpus": 8, "message_size": 1000,
              "kernel_source": "nccl", "latency": 0.04}  # fmt: skip
AITER = {"gfx": "gfx942", "cu_num": 304, "config": "a8w8_blockscale_tuned_gemm", "batch": None, "m": 1024, "n": 4096,
         "k": 7168, "dtype": None, "q_dtype_w": None, "lib": "ck", "us": 120.0, "suspect": None}  # fmt: skip
APEX = {"gpu": "H100-SXM-80GB", "dtype": "half", "m": 4096, "k": 8192, "n": 256, "time(us)": 40}
VIDUR = {"time_stats.all_reduce.median": 0.033, "num_workers": 8, "size": 1048576, "collective": "all_reduce",
         "devices_per_node": 8}  # fmt: skip
A2A = {"ep_size": 8, "batch_per_rank": 1, "dispatch_us": 18.9, "dispatch_GBps": 6.07, "combine_us": 31.0,
       "combine_GBps": 3.7}  # fmt: skip
DEEPEP = {"lib_version": "V1", "mode": "low-latency", "gpu": "H800", "ep": 16, "tokens_per_rank": 128, "hidden": 7168,
          "topk": 8, "dispatch_dtype": "FP8", "combine_dtype": "BF16", "dispatch_latency_us": 118,
          "combine_latency_us": 195}  # fmt: skip
DEEPGEMM = {"kind": "dense", "groups": 1, "m": 4096, "n": 7168, "k": 16384, "tflops": 1358}


def csv(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows)).to_csv(path, index=False)
    return path


def own(folder, *changed):
    write_table(pd.DataFrame([OWN | c for c in changed or ({},)]), "gemm", folder / "gemm.parquet")
    return folder


@pytest.fixture
def wheel(tmp_path):
    for framework, group, name, row in (
        ("vllm", "gemm", "gemm", WHEEL_GEMM),
        ("sglang", "gemm", "gemm", WHEEL_GEMM | {"latency": 0.06}),
        ("nccl", "comm", "nccl", WHEEL_NCCL),
    ):
        path = tmp_path / "h200_sxm" / group / framework / "1.0" / f"{name}_perf.parquet"
        path.parent.mkdir(parents=True)
        pd.DataFrame([row]).to_parquet(path)
    return tmp_path


def test_a_wheel_gives_one_engine_and_nccl(wheel):
    tables = read_tables(wheel, "h200-sxm")
    assert {family: rows["software"].tolist() for family, rows in tables.items()} == {
        "gemm": ["vllm 1.0"],
        "collective": ["nccl 1.0"],
    }
    assert read_tables(wheel, load_device("h200-sxm"), "sglang")["gemm"]["seconds"].tolist() == [pytest.approx(6e-5)]


def test_a_wheel_is_asked_for_a_device_it_has(wheel):
    with pytest.raises(MeasurementError, match="holds many devices; name the one to read"):
        read_tables(wheel)
    with pytest.raises(MeasurementError, match="no kernels of vllm on h100-sxm; expected a device of h200-sxm"):
        read_tables(wheel, "h100-sxm")
    with pytest.raises(MeasurementError, match=r"engine 'llama\.cpp': expected one of vllm, sglang"):
        read_tables(wheel, "h200-sxm", "llama.cpp")


def test_impossible_rows_of_a_wheel_are_counted(wheel):
    path = next(wheel.rglob("vllm/1.0/gemm_perf.parquet"))
    pd.DataFrame([WHEEL_GEMM, WHEEL_GEMM | {"m": 65536, "latency": 0.5}]).to_parquet(path)
    tables = read_tables(wheel, "h200-sxm")
    assert len(tables["gemm"]) == 1
    assert tables.left_out == {"gemm: faster than the peak of h200-sxm": 1}


def test_own_tables_are_read_by_their_names(tmp_path):
    folder = own(tmp_path / "mine")
    for place in (folder, folder / "gemm.parquet"):
        rows = read_tables(place, "h100-sxm")["gemm"]
        assert tuple(rows.columns) == FAMILIES["gemm"].columns
        assert len(rows) == 1
    with pytest.raises(MeasurementError, match="the file's name tells the family; expected one of gemm"):
        (folder / "gemm.parquet").rename(folder / "products.parquet")
        read_tables(folder)


def test_an_impossible_row_of_ones_own_is_an_error_with_the_row(tmp_path):
    folder = own(tmp_path, {}, {"m": 8192, "seconds": 2e-5})
    for device in (None, "h100-sxm", load_device("h100-sxm")):
        with pytest.raises(MeasurementError, match=r"gemm\.parquet: row 1 takes 2e-05 s, less than the peak"):
            read_tables(folder, device)


def test_own_tables_of_another_device_are_refused(tmp_path):
    folder = own(tmp_path)
    with pytest.raises(MeasurementError, match="rows of h100-sxm beside h200-sxm"):
        read_tables(folder, "h200-sxm")


def test_own_tables_of_a_device_without_a_profile_are_taken_as_they_are(tmp_path):
    """It is from these that a profile is fitted."""
    assert read_tables(own(tmp_path, {"device": "my-gpu"}))["gemm"]["device"].tolist() == ["my-gpu"]


def test_an_engine_selects_its_software(tmp_path):
    folder = own(tmp_path, {"software": "vllm 0.11"}, {"software": "sglang 0.5"})
    tables = read_tables(folder, engine="sglang")
    assert tables["gemm"]["software"].tolist() == ["sglang 0.5"]
    assert tables.left_out == {"not run by sglang": 1}
    with pytest.raises(
        MeasurementError, match=r"no usable rows of tensorrt-llm; expected rows of h100-sxm run by sglang"
    ):
        read_tables(folder, engine="tensorrt-llm")


@pytest.mark.parametrize(
    ("name", "row", "device", "families"),
    [
        ("tuned.csv", AITER, "mi300x", ["gemm"]),
        ("tuned.csv.gz", AITER, "mi325x", ["gemm"]),
        ("gemm_0.csv", APEX, "h100-sxm", ["gemm"]),
        ("h100_dgx/all_reduce.csv", VIDUR, "h100-sxm", ["collective"]),
        ("anywhere/all_reduce.csv", VIDUR, "a100-80-sxm", ["collective"]),
        ("a2a.csv", A2A, "gb200", ["expert_exchange"]),
        ("deepep.csv", DEEPEP, "h800-sxm", ["expert_exchange"]),
        ("deepgemm.csv", DEEPGEMM, "h800-sxm", ["gemm"]),
        ("deepgemm.csv", DEEPGEMM | {"kind": "grouped_masked", "groups": 4, "m": 256}, None, ["batched_gemm"]),
    ],
)
def test_csv_files_are_recognised_by_their_columns(tmp_path, name, row, device, families):
    tables = read_tables(csv(tmp_path / name, row), device)
    assert list(tables) == families
    assert {d for rows in tables.values() for d in rows["device"]} == {device or "h800-sxm"}


def test_a_folder_of_csv_files_is_one_device(tmp_path):
    csv(tmp_path / "aiter" / "tuned.csv", AITER)
    csv(tmp_path / "apex" / "gemm_0.csv", APEX)
    csv(tmp_path / "apex" / "gemm_1.csv", APEX | {"time(us)": 44}, APEX | {"n": 512})
    csv(tmp_path / "other.csv", {"a": 1})
    tables = read_tables(tmp_path, "h100-sxm")
    assert tables["gemm"].set_index("m")["seconds"].to_dict() == {
        256: pytest.approx(42e-6),  # the median of both files
        512: pytest.approx(40e-6),
    }
    assert tables.left_out == {"other.csv: of no known layout": 1, "not of h100-sxm": 1}
    with pytest.raises(MeasurementError, match="rows of h100-sxm, mi300x; name one of these devices"):
        read_tables(tmp_path)


def test_places_with_nothing_known_tell_what_is(tmp_path):
    for place, said in (
        (tmp_path / "none", "does not exist; expected 'wheel', "),
        (tmp_path, "no usable rows; expected 'wheel', "),
        (csv(tmp_path / "x.csv", {"a": 1}), "columns a are of no known layout; expected 'wheel', "),
    ):
        with pytest.raises(MeasurementError, match=said) as told:
            read_tables(place)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00bad\x80", b"a,b\n"])
def test_files_that_are_no_tables_are_told(tmp_path, content):
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    with pytest.raises(MeasurementError, match=r"broken\.csv: (not a readable CSV file|has no rows)") as told:
        read_tables(path)
    assert "\n" not in str(told.value)


def test_deepgemm_times_follow_from_the_rate(tmp_path):
    rows = read_published(csv(tmp_path / "t.csv", DEEPGEMM | {"groups": 4, "kind": "grouped_contiguous"}))
    row = rows["batched_gemm"].iloc[0]
    assert row["seconds"] == pytest.approx(2 * 4 * 4096 * 7168 * 16384 / 1358e12)
    assert row[["groups", "m", "n", "k", "dtype"]].tolist() == [4, 4096, 7168, 16384, "fp8_block"]
    beyond = read_published(csv(tmp_path / "t.csv", DEEPGEMM, DEEPGEMM | {"m": 64, "tflops": 2500}))
    assert beyond.left_out == {"faster than the peak of h800-sxm": 1}


def test_deepep_rows_without_a_time_are_counted(tmp_path):
    rows = read_published(
        csv(tmp_path / "t.csv", DEEPEP, DEEPEP | {"dispatch_latency_us": None}, DEEPEP | {"gpu": "SM90"})
    )
    exchange = rows["expert_exchange"]
    assert exchange[["kind", "gpus", "nodes", "tokens", "dtype"]].to_numpy().tolist() == [
        ["dispatch", 16, 2, 128, "fp8"],
        ["combine", 16, 2, 128, "bf16"],
    ]
    assert exchange["seconds"].tolist() == pytest.approx([118e-6, 195e-6])
    assert rows.left_out == {"a bandwidth without bytes or time": 1, "of a device that is not named": 1}
