"""Vidur's profiling CSVs: shapes of one rank, milliseconds, bytes, and where the device is told."""

from __future__ import annotations

import pandas as pd
import pytest

from hwmodels.errors import MeasurementError
from hwmodels.hardware import load_device
from hwmodels.kernels.table import beyond_peak
from hwmodels.kernels.vidur import read_vidur

#: Llama-2-70B on four ranks as Vidur writes it; of every operator the median is read.
MEDIANS_MS = {"emb": 0.1, "input_layernorm": 0.05, "attn_pre_proj": 0.6, "attn_rope": 0.02, "attn_post_proj": 0.5,
              "post_attention_layernorm": 0.05, "mlp_up_proj": 3.4, "mlp_act": 0.1, "mlp_down_proj": 1.7,
              "add": 0.06}  # fmt: skip
MLP = {f"time_stats.{operator}.median": value for operator, value in MEDIANS_MS.items()} | {
    "time_stats.mlp_up_proj.min": 1.0, "n_head": 64, "n_kv_head": 8, "n_embd": 8192, "n_expanded_embd": 28672,
    "vocab_size": 32768, "use_gated_mlp": True, "num_tokens": 1024, "num_tensor_parallel_workers": 4}  # fmt: skip
PREFILL = {"time_stats.attn_prefill.median": 0.9, "time_stats.attn_decode.median": None, "n_embd": 8192, "n_q_head": 64,
           "n_kv_head": 8, "block_size": 16, "num_tensor_parallel_workers": 2, "max_model_len": 4096, "batch_size": 1,
           "prefill_chunk_size": 512, "kv_cache_size": 1024, "is_prefill": True,
           "attention_backend": "AttentionBackend.FLASH_ATTENTION"}  # fmt: skip
DECODE = PREFILL | {"time_stats.attn_prefill.median": None, "time_stats.attn_decode.median": 0.04, "batch_size": 8,
                    "prefill_chunk_size": 0, "is_prefill": False}  # fmt: skip
REDUCE = {"time_stats.all_reduce.median": 0.033, "rank": 0, "num_workers": 8, "size": 1048576,
          "collective": "all_reduce", "devices_per_node": 8, "max_devices_per_node": 8}  # fmt: skip


def read(tmp_path, *rows, folder="compute/a100/llama", device=None):
    path = tmp_path / folder / "table.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows)).to_csv(path, index=False)
    return read_vidur(path, device)


def test_products_are_those_of_one_rank(tmp_path):
    rows = read(tmp_path, MLP)["gemm"]
    assert rows[["m", "n", "k"]].to_numpy().tolist() == [
        [1024, (64 + 2 * 8) // 4 * 128, 8192],
        [1024, 8192, 16 * 128],
        [1024, 2 * 7168, 8192],
        [1024, 8192, 7168],
    ]
    assert rows["seconds"].tolist() == pytest.approx([0.6e-3, 0.5e-3, 3.4e-3, 1.7e-3])
    assert set(rows["dtype"]) == {"fp16"}
    assert set(rows["device"]) == {"a100-80-sxm"}


def test_a_plain_feed_forward_has_one_matrix_up(tmp_path):
    rows = read(tmp_path, MLP | {"use_gated_mlp": False})["gemm"]
    assert rows["n"].tolist()[2] == 7168


def test_small_operators_count_the_bytes_they_move(tmp_path):
    rows = read(tmp_path, MLP)["elementwise"].set_index("kernel")["bytes"]
    assert rows["input_layernorm"] == 1024 * 8192 * 2 * 2
    assert rows["add"] == 1024 * 8192 * 3 * 2
    assert rows["mlp_act"] == 1024 * 7168 * 3 * 2
    assert rows["attn_rope"] == 1024 * (16 + 2) * 128 * 2 * 2


def test_attention_is_told_apart_by_phase(tmp_path):
    tables = read(tmp_path, PREFILL, DECODE, folder="network/h100_dgx")
    prefill, decode = tables["attention_prefill"].iloc[0], tables["attention_decode"].iloc[0]
    heads = ["heads", "kv_heads", "head_dim", "kernel", "device"]
    assert prefill[["batch", "new", "before"]].tolist() == [1, 512, 1024]
    assert decode[["batch", "context"]].tolist() == [8, 1025]
    assert prefill[heads].tolist() == decode[heads].tolist() == [32, 4, 128, "flash_attention", "h100-sxm"]
    assert (prefill["seconds"], decode["seconds"]) == (pytest.approx(0.9e-3), pytest.approx(0.04e-3))


def test_collectives_count_bytes_as_we_do(tmp_path):
    gather = REDUCE | {"collective": "all_gather", "time_stats.all_gather.median": 0.05}
    pair = REDUCE | {"collective": "send_recv", "num_workers": 2, "devices_per_node": 1,
                     "time_stats.send_recv.median": 0.3}  # fmt: skip
    tables = read(tmp_path, REDUCE, gather, pair, REDUCE | {"collective": "broadcast"}, folder="network/a100_dgx")
    rows = tables["collective"]
    assert rows[["kind", "gpus", "nodes", "bytes"]].to_numpy().tolist() == [
        ["all-reduce", 8, 1, 1048576],
        ["all-gather", 8, 1, 8 * 1048576],
        ["point-to-point", 2, 2, 1048576],
    ]
    assert rows["seconds"].tolist() == pytest.approx([0.033e-3, 0.05e-3, 0.3e-3])
    assert tables.left_out == {"collective that no engine uses": 1}


def test_repeated_rows_are_runs(tmp_path):
    rows = read(tmp_path, *(REDUCE | {"time_stats.all_reduce.median": t} for t in (0.03, 0.05, 0.9)))["collective"]
    assert rows["seconds"].tolist() == [pytest.approx(0.05e-3)]


def test_times_beyond_the_peak_are_counted(tmp_path):
    tables = read(tmp_path, MLP, MLP | {"num_tokens": 65536})
    # 65,536 tokens in the times of 1,024: all four products.
    assert tables.left_out == {"faster than the peak of a100-80-sxm": 4}
    assert not beyond_peak(tables["gemm"], "gemm", load_device("a100-80-sxm")).any()


def test_times_rounded_to_nothing_are_counted(tmp_path):
    tables = read(tmp_path, MLP | {"time_stats.add.median": 0.0})
    assert tables.left_out == {"no positive time": 1}


def test_the_device_is_told_by_the_folder_or_by_the_caller(tmp_path):
    with pytest.raises(MeasurementError, match="neither columns nor folder tell the device"):
        read(tmp_path, MLP, folder="elsewhere")
    assert set(read(tmp_path, MLP, folder="elsewhere", device="h100-sxm")["gemm"]["device"]) == {"h100-sxm"}
    assert set(read(tmp_path, MLP, device="a100-80-pcie")["gemm"]["device"]) == {"a100-80-pcie"}


def test_other_layouts_are_told(tmp_path):
    with pytest.raises(MeasurementError, match=r"expected Vidur's mlp, attention or collective layout"):
        read(tmp_path, {"m": 1, "n": 2})
