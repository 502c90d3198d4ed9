"""aiter's tuned tables: formats, chips, the fastest of several kernels, and what is left out and why."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from hwmodels.errors import MeasurementError
from hwmodels.hardware import load_device
from hwmodels.kernels.aiter import read_aiter
from hwmodels.kernels.table import beyond_peak

REFERENCE = Path(__file__).resolve().parents[4] / "shared" / "reference" / "kernels"

GEMM = {"gfx": "gfx942", "cu_num": 304, "config": "a8w8_blockscale_tuned_gemm", "batch": None, "m": 1024, "n": 4096,
        "k": 7168, "dtype": None, "q_dtype_w": None, "lib": "ck", "us": 120.0, "suspect": None}  # fmt: skip
MOE = {"gfx": "gfx942", "cu_num": 304, "tokens": 1024, "model_dim": 4096, "inter_dim": 384, "experts": 128, "topk": 8,
       "q_dtype_a": "torch.bfloat16", "q_dtype_w": "torch.bfloat16", "q_type": "QuantType.No", "use_g1u1": 1,
       "us_total": 525.0, "tflops": 147.26}  # fmt: skip
FP8 = {"q_dtype_a": "torch.float8_e4m3fnuz", "q_dtype_w": "torch.float8_e4m3fnuz"}


def read(tmp_path, *rows, device=None):
    path = tmp_path / "tuned.csv"
    pd.DataFrame(list(rows)).to_csv(path, index=False)
    return read_aiter(path, device)


def test_microseconds_become_seconds(tmp_path):
    tables = read(tmp_path, GEMM)
    assert list(tables) == ["gemm"]
    row = tables["gemm"].iloc[0]
    assert row[["m", "n", "k", "dtype", "device", "kernel"]].tolist() == [1024, 4096, 7168, "fp8_block", "mi300x", "ck"]
    assert row["seconds"] == pytest.approx(120e-6)
    assert not tables.left_out


@pytest.mark.parametrize(
    ("told", "dtype"),
    [
        ({"config": "dsv4_a8w8_blockscale_bpreshuffle_tuned_gemm"}, "fp8_block"),
        ({"config": "a8w8_tuned_gemm", "q_dtype_w": "torch.int8", "dtype": "torch.int8"}, "int8"),
        ({"config": "a8w8_bpreshuffle_tuned_gemm", "q_dtype_w": "torch.float8_e4m3fnuz"}, "fp8"),
        ({"config": "glm5_bf16_tuned_gemm", "dtype": "torch.bfloat16"}, "bf16"),
        ({"config": "a4w4_blockscale_tuned_gemm"}, "fp4"),
    ],
)
def test_formats_of_products(tmp_path, told, dtype):
    assert read(tmp_path, GEMM | told)["gemm"]["dtype"].tolist() == [dtype]


def test_formats_that_cannot_be_told_are_counted(tmp_path):
    tables = read(tmp_path, GEMM, GEMM | {"config": "a8w8_tuned_batched_gemm", "batch": 16})
    assert list(tables) == ["gemm"]
    assert tables.left_out == {"format of the weights not told": 1}


def test_batches_are_products_in_one_launch(tmp_path):
    tables = read(tmp_path, GEMM | {"config": "bf16_tuned_batched_gemm", "batch": 16, "us": 1500.0})
    assert tables["batched_gemm"][["groups", "dtype"]].to_numpy().tolist() == [[16, "bf16"]]


def test_the_fastest_kernel_of_a_shape_is_what_runs(tmp_path):
    tables = read(tmp_path, GEMM, GEMM | {"lib": "asm", "us": 100.0}, GEMM | {"us": 110.0}, GEMM | {"m": 1})
    rows = tables["gemm"].set_index("m")
    assert rows.loc[1024, ["kernel", "seconds"]].tolist() == ["asm", pytest.approx(1e-4)]
    assert len(rows) == 2
    assert tables.left_out == {"slower than another kernel of the same shape": 2}


def test_suspect_and_impossible_rows_are_counted(tmp_path):
    flops = 2 * 4096**3
    beyond = GEMM | {"m": 4096, "n": 4096, "k": 4096, "us": flops / 2614.9e12 * 1e6 / 1.2}
    tables = read(
        tmp_path, GEMM, GEMM | {"m": 2, "suspect": "placeholder"}, beyond, GEMM | {"m": 3, "us": 0}, GEMM | {"gfx": "x"}
    )
    assert tables["gemm"]["m"].tolist() == [1024]
    assert tables.left_out == {
        "marked suspect by the source": 1,
        "faster than the peak of mi300x": 1,
        "no positive time": 1,
        "chip not told or unknown": 1,
    }


def test_chips_are_told_by_architecture_and_units(tmp_path):
    inferred = GEMM | {"gfx": None, "m": 2}
    others = [GEMM | {"gfx": "gfx942", "cu_num": 80}, GEMM | {"gfx": "gfx1250", "cu_num": 256}, GEMM | {"cu_num": None}]
    tables = read(tmp_path, GEMM, inferred, *others)
    assert tables["gemm"]["device"].tolist() == ["mi300x", "mi300x"]
    assert tables.left_out["chip not told or unknown"] == 2
    assert tables.left_out["no profile of mi308x to hold its times against"] == 1
    as_mi325x = read(tmp_path, GEMM, inferred, *others, device="mi325x")
    assert as_mi325x["gemm"]["device"].tolist() == ["mi325x", "mi325x"]
    assert as_mi325x.left_out["not of mi325x"] == 1
    with pytest.raises(MeasurementError, match="'h100-sxm': aiter's tables are of mi300x"):
        read(tmp_path, GEMM, device="h100-sxm")


def test_expert_blocks_are_one_ranks_share(tmp_path):
    row = read(tmp_path, MOE)["moe"].iloc[0]
    assert row[["tokens", "hidden", "intermediate", "experts", "top_k", "tp", "ep", "gated"]].tolist() == [
        1024, 4096, 384, 128, 8, 1, 1, 1]  # fmt: skip
    assert row[["dtype", "distribution"]].tolist() == ["bf16", "balanced"]
    assert row["seconds"] == pytest.approx(525e-6)


@pytest.mark.parametrize(
    ("told", "dtype"),
    [
        (FP8 | {"q_type": "QuantType.per_1x128"}, "fp8_block"),
        (FP8 | {"q_type": "QuantType.per_Token"}, "fp8"),
        ({"q_dtype_w": "torch.int4", "q_type": "QuantType.per_1x32"}, "int4"),
        ({"q_dtype_w": "torch.float4_e2m1fn_x2", "q_type": "QuantType.per_1x32"}, "mxfp4"),
        (FP8 | {"q_dtype_w": "torch.float4_e2m1fn_x2", "q_type": "QuantType.per_1x32"}, "mxfp4_fp8"),
    ],
)
def test_formats_of_expert_blocks(tmp_path, told, dtype):
    assert read(tmp_path, MOE | told)["moe"]["dtype"].tolist() == [dtype]


def test_expert_rows_that_contradict_themselves_are_counted(tmp_path):
    """A copied row keeps the TFLOP/s of its original: here a quarter of what its tokens make."""
    copied = MOE | {"tokens": 4096}
    unnamed = MOE | FP8 | {"tokens": 2048, "tflops": 294.5, "q_type": "QuantType.per_1x32"}
    untold = MOE | {"topk": -1, "tflops": -18.4}
    tables = read(tmp_path, MOE, copied, unnamed, untold)
    assert tables["moe"]["tokens"].tolist() == [1024]
    assert tables.left_out["reported TFLOP/s do not follow from shape and time"] == 2
    assert tables.left_out["format of the weights has no name here"] == 1


def test_other_layouts_are_told(tmp_path):
    with pytest.raises(MeasurementError, match=r"columns missing \['us'\]; expected the layout of aiter"):
        read(tmp_path, {k: v for k, v in GEMM.items() if k != "us"})
    with pytest.raises(MeasurementError, match="not a readable CSV file"):
        read_aiter(tmp_path / "none.csv")


@pytest.mark.parametrize("name", ["amd_aiter_tuned_gemm.csv.gz", "amd_aiter_tuned_fmoe.csv.gz"])
def test_the_published_tables_break_no_peak_and_every_row_is_accounted_for(name):
    path = REFERENCE / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    tables = read_aiter(path)
    assert sum(map(len, tables.values())) + tables.left_out.total() == len(pd.read_csv(path, low_memory=False))
    for family, rows in tables.items():
        assert len(rows) > 20
        assert set(rows["device"]) == {"mi300x"}
        assert not beyond_peak(rows, family, load_device("mi300x")).any()
