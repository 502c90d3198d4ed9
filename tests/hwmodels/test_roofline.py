"""Prices of single kernels: laws of a roofline, and credible efficiencies of well-known products."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import operators as ops
from hwmodels.efficiency import Efficiency
from hwmodels.hardware import device_names, load_cluster, load_device
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import AttentionCore, Communication, Elementwise, Experts, Gemm, GroupedGemm
from hwmodels.roofline import AnalyticCost, memory_time_s, rank_groups, tile_time_s

BF16 = Precision()
H100 = load_device("h100-sxm")
COST = AnalyticCost(load_cluster("h100-sxm", 8), Mapping(tp=8))
PEAK, BANDWIDTH = H100.peak_flops_per_s["bf16"], H100.memory_bytes_per_s


def gemm(m: float, n: int = 8192, k: int = 8192, precision: Precision = BF16, **more: int) -> Gemm:
    return Gemm("gemm", np.array(float(m)), n, k, precision, **more)


def seconds(op: ops.Operator) -> float:
    return float(COST.time_s(op))


def test_a_gemv_streams_its_weights():
    op = gemm(1)
    assert seconds(op) >= float(op.bytes) / BANDWIDTH
    assert 0.6 <= float(op.bytes) / BANDWIDTH / seconds(op) <= 0.95


def test_a_large_product_keeps_the_multiply_units_busy():
    assert 0.65 <= float(gemm(8192).flops) / PEAK / seconds(gemm(8192)) <= 0.8


def test_fp8_nearly_doubles_a_large_product():
    """By the peaks; calibrated coefficients know that activations are narrowed first, which takes part of it."""
    fp8 = Precision("fp8", "fp8", "fp8")
    bare = AnalyticCost(replace(load_cluster("h100-sxm", 1), device=replace(H100, efficiency=Efficiency())), Mapping())
    assert 1.8 <= float(bare.time_s(gemm(8192)) / bare.time_s(gemm(8192, precision=fp8))) <= 2.05
    assert 1.3 <= seconds(gemm(8192)) / seconds(gemm(8192, precision=fp8)) <= 2.05


def test_narrow_weights_speed_up_decode_but_not_prefill():
    int4 = Precision("int4", "bf16", "bf16")
    assert seconds(gemm(1)) / seconds(gemm(1, precision=int4)) > 2.5
    assert seconds(gemm(8192, precision=int4)) > seconds(gemm(8192))


def test_the_smallest_kernel_takes_a_launch():
    tiny = seconds(gemm(1, 1, 1))
    assert H100.kernel_launch_s < tiny < H100.kernel_launch_s + 2e-6
    assert seconds(Elementwise("norm", np.array(2.0))) > H100.kernel_launch_s
    three = seconds(Elementwise("norm", np.array(2.0), kernels=3))
    assert three == pytest.approx(seconds(Elementwise("norm", np.array(2.0))) + 2 * H100.kernel_launch_s)


def test_nothing_to_do_takes_no_time():
    zero = np.array(0.0)
    core = AttentionCore("a", "decode", zero, zero, zero, 8, 8, 128, 128, False, BF16)
    nothing = [
        gemm(0),
        GroupedGemm("g", zero, zero, 8, 8, BF16),
        core,
        Elementwise("e", zero),
        Communication("c", "all-reduce", "tp", zero),
    ]
    assert [seconds(op) for op in nothing] == [0.0] * 5


def test_launches_add_up():
    assert seconds(gemm(64, count=80)) == pytest.approx(80 * seconds(gemm(64)))
    assert seconds(Communication("c", "all-reduce", "tp", np.array(1e6), count=3)) == pytest.approx(
        3 * seconds(Communication("c", "all-reduce", "tp", np.array(1e6)))
    )


sizes = st.integers(1, 20_000)


@settings(max_examples=300, deadline=None)
@given(m=sizes, n=sizes, k=sizes, groups=st.integers(1, 64), dtype=st.sampled_from(["bf16", "fp8", "int8", "int4"]))
def test_no_product_beats_the_peaks(m, n, k, groups, dtype):
    op = gemm(m, n, k, Precision(dtype, "bf16" if dtype == "int4" else dtype, "bf16"), groups=groups)
    peak = H100.peak_flops_per_s[op.precision.activations]
    assert seconds(op) >= max(float(op.flops) / peak, float(op.bytes) / BANDWIDTH)


@settings(max_examples=200, deadline=None)
@given(m=st.floats(0.1, 1e5), active=st.floats(0.01, 256), n=sizes, k=sizes)
def test_no_grouped_product_beats_the_peaks(m, active, n, k):
    op = GroupedGemm("g", np.array(m), np.array(min(active, m)), n, k, BF16)
    assert seconds(op) >= max(float(op.flops) / PEAK, float(op.bytes) / BANDWIDTH)


@settings(max_examples=200, deadline=None)
@given(queries=st.integers(1, 9000), before=st.integers(0, 100_000), heads=st.sampled_from([1, 8, 32]))
def test_no_attention_beats_the_peaks(queries, before, heads):
    q, b = np.array(float(queries)), np.array(float(before))
    pairs = ops.attended_pairs(q, b, None)
    op = AttentionCore("a", "prefill", q, pairs, b, heads, 1, 128, 128, False, BF16)
    assert seconds(op) >= max(float(op.flops) / PEAK, float(op.bytes) / BANDWIDTH)


KERNELS = {
    "product": lambda m, n: gemm(m, n, 4096),
    "narrow product": lambda m, n: gemm(m, n, 4096, Precision("fp8", "fp8")),
    "prefill": lambda m, n: AttentionCore(
        "a", "prefill", np.array(float(m)), ops.attended_pairs(np.array(float(m)), np.array(float(n)), None),
        np.array(float(n)), 8, 1, 128, 128, False, BF16,
    ),
    "decode": lambda m, n: AttentionCore(
        "a", "decode", np.array(float(m)), np.array(float(m * n)), np.array(float(m * n)), 8, 1, 128, 128, False, BF16
    ),
    "experts": lambda m, n: Experts(
        "e", np.array(float(m)), np.array(2.0 * m), np.array(min(2.0 * m, 8.0)), 4096, n, 8, 2, 1, 1, True, BF16
    ),
}  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(kernel=st.sampled_from(sorted(KERNELS)), m=sizes, n=sizes)
def test_a_calibrated_kernel_takes_its_launch_and_its_longer_part_at_least_and_all_parts_at_most(kernel, m, n):
    op = KERNELS[kernel](m, n)
    parts = COST.fitted_parts_s(op)
    compute, memory, launch = parts["compute"], parts["memory"], parts["launch"]
    assert min(parts.values()) > 0
    assert launch + max(compute, memory) <= seconds(op) * (1 + 1e-9)
    assert seconds(op) <= (launch + compute + memory) * (1 + 1e-9)


def test_what_was_not_calibrated_has_no_fitted_parts():
    bare = AnalyticCost(replace(COST.cluster, device=replace(H100, efficiency=Efficiency())), Mapping(tp=8))
    assert bare.fitted_parts_s(gemm(64)) is None
    assert COST.fitted_parts_s(Elementwise("norm", np.array(1e6))) is None


@settings(max_examples=200, deadline=None)
@given(m=sizes, n=sizes, k=sizes, more=st.integers(1, 5000), which=st.sampled_from("mnk"))
def test_larger_products_take_no_less_time(m, n, k, more, which):
    larger = {"m": m, "n": n, "k": k}
    larger[which] += more
    assert seconds(gemm(**larger)) >= seconds(gemm(m, n, k)) * (1 - 1e-12)


def test_a_wave_that_is_not_full_takes_as_long_as_a_full_one():
    """132 full tiles of 128 x 128 are one wave of H100; one more row of tiles never comes free at this size."""
    width = 33 * 128
    one = float(tile_time_s(np.array(4 * 128.0), width, 8192, 1, H100, BF16))
    assert one == pytest.approx(2 * 512 * width * 8192 / (PEAK * H100.efficiency.gemm_mfu))
    assert float(tile_time_s(np.array(4 * 128.0 + 1), width, 8192, 1, H100, BF16)) > one


def test_streams_reach_half_of_their_bandwidth_at_the_half_size():
    e = H100.efficiency
    rate = e.memory_half_bytes / float(memory_time_s(e.memory_half_bytes, H100))
    assert rate == pytest.approx(e.memory_mbu * BANDWIDTH / 2)
    assert float(memory_time_s(0.0, H100)) == 0.0
    assert 1e12 / float(memory_time_s(1e12, H100)) == pytest.approx(e.memory_mbu * BANDWIDTH, rel=1e-4)


@pytest.mark.parametrize("name", device_names())
def test_every_device_prices_every_kernel(name):
    """The head, which stays in 16 bit, also where a device knows only one of the two 16-bit formats."""
    cost = AnalyticCost(load_cluster(name, 1), Mapping())
    activations = next(d for d in ("bf16", "fp16") if d in cost.device.peak_flops_per_s)
    precision = Precision(activations, activations, activations)
    model = load_model("mixtral-8x7b")
    n = np.array([1.0, 100.0])
    for op in [
        *ops.language_model_head(model, n, 1),
        *ops.expert_feed_forward(model, model.layers[0].feed_forward, n, n, Mapping(), precision, 1),
        *ops.decode_attention(model.layers[0].attention, n, n * 50, 1, precision, 1),
    ]:
        times = cost.time_s(op)
        assert np.all(np.isfinite(times))
        assert np.all(times >= cost.device.kernel_launch_s)
        assert times[1] >= times[0]


def test_groups_are_numbered_as_the_mapping_says():
    assert rank_groups(Mapping(tp=2, attention_dp=4, ep=4, expert_tp=2)) == {
        "tp": (0, 1),
        "ep": (0, 2, 4, 6),
        "expert_tp": (0, 1),
        "pp": (0,),
    }
    assert rank_groups(Mapping(tp=4, pp=2))["pp"] == (0, 4)
