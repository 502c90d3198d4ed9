"""The wheel's layout read as data: a miniature of its folders, with the traps its tables hold."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import MeasurementError
from hwmodels.hardware import load_device
from hwmodels.kernels.aiconfigurator import DISTRIBUTION, READERS, _version, open_wheel
from hwmodels.kernels.table import FAMILIES, beyond_peak, checked

#: One raw row of every file, with times in ms except where the column's name says us.
GEMM = {"gemm_dtype": "bfloat16", "m": 64, "n": 4096, "k": 4096, "kernel_source": "torch", "latency": 0.05}
BATCHED = {"op_name": "mla_gen_pre", "bmm_dtype": "bfloat16", "num_heads": 16, "num_tokens": 8,
           "kernel_source": "torch", "latency": 0.01}  # fmt: skip
MOE = {"moe_dtype": "fp8_block", "num_tokens": 128, "hidden_size": 7168, "inter_size": 2048, "num_experts": 256,
       "topk": 8, "moe_tp_size": 1, "moe_ep_size": 8, "distribution": "power_law_1.2", "kernel_source": "deepgemm",
       "latency": 1.5}  # fmt: skip
ATTENTION = {"attn_dtype": "bfloat16", "kv_cache_dtype": "fp8", "batch_size": 4, "isl": 512, "num_heads": 32,
             "num_key_value_heads": 8, "head_dim": 128, "step": 100, "window_size": 0, "kernel_source": "flash",
             "latency": 0.2}  # fmt: skip
LATENT = {"mla_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "batch_size": 4, "isl": 512, "num_heads": 16,
          "step": 100, "kernel_source": "flashmla", "latency": 0.3}  # fmt: skip
NCCL = {"nccl_dtype": "half", "op_name": "all_gather", "num_gpus": 8, "message_size": 1000, "kernel_source": "nccl",
        "latency": 0.04}  # fmt: skip
CUSTOM = {"allreduce_dtype": "bfloat16", "num_gpus": 8, "message_size": 500, "kernel_source": "vllm", "latency": 0.02}
LOW = {"node_num": 2, "hidden_size": 7168, "num_token": 128, "num_topk": 8, "num_experts": 256,
       "kernel_source": "deepep", "dispatch_avg_t_us": 118.0, "combine_avg_t_us": 195.0}  # fmt: skip
NORMAL = {"node_num": 2, "hidden_size": 7168, "num_token": 4096, "num_topk": 8, "num_experts": 256,
          "dispatch_sms": 24.0, "combine_sms": 20.0, "dispatch_transmit_us": 300.0, "dispatch_notify_us": 20.0,
          "combine_transmit_us": 400.0, "combine_notify_us": 30.0}  # fmt: skip
A2A = {"node_num": 1, "ep_size": 8, "hidden_size": 7168, "num_tokens": 64, "topk": 8, "num_experts": 256,
       "comm_backend": "nvlink", "sms": 16.0, "phase": "combine", "transmit_us": 50.0, "notify_us": 5.0}  # fmt: skip
QUANTIZE = {"quant_dtype": "fp8", "m": 64, "k": 4096, "kernel_source": "triton", "latency": 0.005}
FILES = {
    ("gemm", "gemm"): GEMM,
    ("mla_bmm", "mla_bmm"): BATCHED,
    ("moe", "moe"): MOE,
    ("attention", "context_attention"): ATTENTION,
    ("attention", "generation_attention"): ATTENTION,
    ("mla", "context_mla"): LATENT,
    ("mla", "generation_mla"): LATENT,
    ("comm", "nccl"): NCCL,
    ("comm", "custom_allreduce"): CUSTOM,
    ("comm", "wideep_deepep_ll"): LOW,
    ("comm", "wideep_deepep_normal"): NORMAL,
    ("comm", "moe_a2a"): A2A,
    ("quantize", "computescale"): QUANTIZE,
    ("quantize", "scale_matrix"): QUANTIZE,
}


def store(root, group, name, *rows, framework="vllm", version="0.11.0", system="h200_sxm"):
    path = root / system / group / framework / version / f"{name}_perf.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows)).to_parquet(path)
    return open_wheel(root)


@pytest.fixture
def whole(tmp_path):
    for (group, name), row in FILES.items():
        store(tmp_path, group, name, row)
    return open_wheel(tmp_path)


def test_the_miniature_has_every_file_that_is_read():
    assert set(FILES) == {(group, name) for readers in READERS.values() for group, name, _ in readers}


@pytest.mark.parametrize("family", READERS)
def test_every_family_comes_out_tidy_and_within_the_peak(whole, family):
    rows = whole.read("h200-sxm", "vllm", family)
    assert len(rows) >= 1
    tidy = checked(rows, family, "wheel")
    assert set(tidy["device"]) == {"h200-sxm"}
    assert set(tidy["software"]) == {"vllm 0.11.0"}
    assert tidy["source"].str.startswith(DISTRIBUTION).all()
    assert not beyond_peak(tidy, family, load_device("h200-sxm")).any()


def test_milliseconds_become_seconds(whole):
    assert whole.read("h200-sxm", "vllm", "gemm")["seconds"].tolist() == [pytest.approx(0.05e-3)]


def test_nccl_counts_elements_and_bytes_are_asked_for(tmp_path):
    wheel = store(
        tmp_path, "comm", "nccl", NCCL, NCCL | {"nccl_dtype": "int8", "op_name": "alltoall"}, framework="nccl"
    )
    rows = wheel.read("h200-sxm", "nccl", "collective")
    assert rows[["kind", "bytes", "dtype"]].to_numpy().tolist() == [
        ["all-gather", 2000, "fp16"],
        ["all-to-all", 1000, "int8"],
    ]


def test_an_engines_own_all_reduce_counts_16_bit_elements_and_graphs_only(tmp_path):
    wheel = store(
        tmp_path, "comm", "custom_allreduce", CUSTOM, CUSTOM | {"kernel_source": "vllm_eager", "latency": 9.0}
    )
    rows = wheel.read("h200-sxm", "vllm", "collective")
    assert rows[["kind", "bytes", "seconds"]].to_numpy().tolist() == [["all-reduce", 1000, pytest.approx(2e-5)]]


def test_expert_exchange_is_in_microseconds(whole):
    rows = whole.read("h200-sxm", "vllm", "expert_exchange").set_index(["kernel", "kind"])
    seconds = {key: round(value * 1e6) for key, value in rows["seconds"].items()}
    assert seconds == {
        ("deepep_ll", "dispatch"): 118,
        ("deepep_ll", "combine"): 195,
        ("deepep_normal_sms24", "dispatch"): 320,
        ("deepep_normal_sms20", "combine"): 430,
        ("nvlink_sms16", "combine"): 55,
    }
    assert rows.loc[("deepep_ll", "dispatch"), ["gpus", "nodes"]].tolist() == [16, 2]
    assert rows.loc[("nvlink_sms16", "combine"), ["gpus", "nodes"]].tolist() == [8, 1]


@pytest.mark.parametrize(
    ("system", "device", "gpus"), [("gb200", "gb200", 8), ("gb300", "gb300", 8), ("b200_sxm", "b200-sxm", 16)]
)
def test_nodes_of_grace_blackwell_racks_have_four_gpus(tmp_path, system, device, gpus):
    store(tmp_path, "comm", "wideep_deepep_ll", LOW, system=system)
    wheel = store(tmp_path, "comm", "wideep_deepep_normal", NORMAL, system=system)
    rows = wheel.read(device, "vllm", "expert_exchange")
    assert len(rows) == 4
    assert set(rows["gpus"]) == {gpus}
    assert set(rows["nodes"]) == {2}


def test_step_counts_the_tokens_before(whole):
    prefill = whole.read("h200-sxm", "vllm", "attention_prefill").iloc[0]
    assert (prefill["new"], prefill["before"], prefill["kv_dtype"]) == (512, 100, "fp8")
    decode = whole.read("h200-sxm", "vllm", "mla_decode").iloc[0]
    assert decode["context"] == 101


def test_latent_products_go_into_and_out_of_the_latent(tmp_path):
    wheel = store(tmp_path, "mla_bmm", "mla_bmm", BATCHED, BATCHED | {"op_name": "mla_gen_post"})
    rows = wheel.read("h200-sxm", "vllm", "batched_gemm")
    assert rows[["groups", "m", "n", "k"]].to_numpy().tolist() == [[16, 8, 512, 128], [16, 8, 128, 512]]


def test_formats_nobody_serves_in_are_left_out(tmp_path):
    wheel = store(tmp_path, "gemm", "gemm", GEMM, GEMM | {"gemm_dtype": "int8_sq"})
    assert wheel.read("h200-sxm", "vllm", "gemm")["dtype"].tolist() == ["bf16"]
    wheel = store(tmp_path, "moe", "moe", MOE, MOE | {"kernel_source": "cutlass_nongated"})
    assert sorted(wheel.read("h200-sxm", "vllm", "moe")["gated"]) == [0, 1]


@pytest.mark.parametrize(("experts", "gated"), [(512, 0), (256, 1)])
def test_a_block_without_a_gate_is_one_in_every_engine(tmp_path, experts, gated):
    row = MOE | {"hidden_size": 4096, "inter_size": 2688, "num_experts": experts, "topk": 22, "kernel_source": "triton"}
    wheel = store(tmp_path, "moe", "moe", row)
    assert wheel.read("h200-sxm", "vllm", "moe")["gated"].tolist() == [gated]


@given(st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=7))
def test_repeated_rows_are_runs_and_their_median_counts(tmp_path_factory, milliseconds):
    root = tmp_path_factory.mktemp("wheel")
    wheel = store(root, "gemm", "gemm", *(GEMM | {"latency": value} for value in milliseconds))
    rows = wheel.read("h200-sxm", "vllm", "gemm")
    assert rows["seconds"].tolist() == [pytest.approx(np.median(milliseconds) * 1e-3)]


def test_times_that_are_none_are_left_out(tmp_path):
    bad = [GEMM | {"m": 1 + i, "latency": value} for i, value in enumerate([0.0, -1.0, np.nan, np.inf])]
    wheel = store(tmp_path, "gemm", "gemm", GEMM, *bad)
    assert wheel.read("h200-sxm", "vllm", "gemm")["m"].tolist() == [64]


def test_every_shape_comes_from_the_newest_version_that_timed_it(tmp_path):
    store(tmp_path, "gemm", "gemm", GEMM | {"latency": 3.0}, GEMM | {"m": 1}, version="0.9.2")
    store(tmp_path, "gemm", "gemm", GEMM | {"latency": 1.0}, GEMM | {"m": 2}, version="0.11.0")
    wheel = store(tmp_path, "gemm", "gemm", GEMM | {"latency": 2.0}, version="0.11.0rc5")
    rows = wheel.read("h200-sxm", "vllm", "gemm").set_index("m")
    assert rows["software"].to_dict() == {64: "vllm 0.11.0", 1: "vllm 0.9.2", 2: "vllm 0.11.0"}
    assert rows.loc[64, "seconds"] == pytest.approx(1e-3)
    assert wheel.versions("h200-sxm", "vllm", "gemm") == ["0.9.2", "0.11.0rc5", "0.11.0"]
    old = wheel.read("h200-sxm", "vllm", "gemm", version="0.9.2")
    assert sorted(old["m"]) == [1, 64]
    assert set(old["software"]) == {"vllm 0.9.2"}


def test_versions_are_ordered_by_number_and_candidates_come_first():
    names = ["1.3.0", "1.3.0rc5", "1.3.0rc20", "1.2.9", "0.20.0", "1.10.0", "1.3.0.post1"]
    assert sorted(names, key=_version) == ["0.20.0", "1.2.9", "1.3.0rc5", "1.3.0rc20", "1.3.0", "1.3.0.post1", "1.10.0"]


def test_what_was_not_measured_is_empty_with_all_columns(whole):
    for device, engine, family in (
        ("h200-sxm", "sglang", "gemm"),
        ("h100-sxm", "vllm", "gemm"),
        ("mi300x", "vllm", "gemm"),
        ("h200-sxm", "vllm", "elementwise"),
        ("h200-sxm", "no engine", "gemm"),
    ):
        rows = whole.read(device, engine, family)
        assert rows.empty
        assert tuple(rows.columns) == FAMILIES[family].columns
    assert whole.devices() == ["h200-sxm"]


@pytest.mark.parametrize(("group", "name"), FILES)
def test_another_layout_is_a_clear_error(tmp_path, group, name):
    family = next(f for f, readers in READERS.items() if (group, name) in {(g, n) for g, n, _ in readers})
    for column in FILES[group, name]:
        if column in {"window_size", "isl", "op_name", "phase", "kernel_source"}:
            continue  # optional, or read by one of two families
        row = {c: v for c, v in FILES[group, name].items() if c != column}
        wheel = store(tmp_path, group, name, row)
        if column == "latency":
            assert wheel.read("h200-sxm", "vllm", family).empty
            continue
        with pytest.raises(MeasurementError, match=rf"{name}_perf\.parquet: not the layout of {DISTRIBUTION}"):
            wheel.read("h200-sxm", "vllm", family)


def test_a_broken_file_is_a_clear_error(tmp_path):
    wheel = store(tmp_path, "gemm", "gemm", GEMM)
    next(tmp_path.rglob("*.parquet")).write_bytes(b"not parquet")
    with pytest.raises(MeasurementError, match="not the layout of"):
        wheel.read("h200-sxm", "vllm", "gemm")


def test_a_folder_of_something_else_is_a_clear_error(tmp_path):
    with pytest.raises(MeasurementError, match="expected folders such as a100_sxm"):
        open_wheel(tmp_path)


def test_a_missing_wheel_is_a_clear_error(monkeypatch):
    def nowhere(name):
        raise importlib.metadata.PackageNotFoundError(name)

    open_wheel.cache_clear()
    monkeypatch.setattr(importlib.metadata, "distribution", nowhere)
    with pytest.raises(MeasurementError, match=r"pip install 'shardwise\[silicon\]'"):
        open_wheel()
    open_wheel.cache_clear()


def test_the_installed_wheel_has_the_layout_and_breaks_no_peak():
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed")
    wheel = open_wheel()
    assert {"h100-sxm", "h200-sxm", "b200-sxm"} <= set(wheel.devices())
    for family in ("batched_gemm", "collective", "expert_exchange"):
        rows = checked(wheel.read("h200-sxm", "vllm", family), family, "wheel")
        assert len(rows) > 50
        assert not beyond_peak(rows, family, load_device("h200-sxm")).any()
