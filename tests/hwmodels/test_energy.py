"""Power between idle and TDP, and the measurements its shares were fitted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.energy import power_w
from hwmodels.hardware import device_names, load_device

SPLITWISE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "serving" / "splitwise_perf_model.csv"
shares = st.floats(0, 1)


@given(name=st.sampled_from(device_names()), compute=shares, memory=shares, more=shares)
def test_power_is_between_idle_and_tdp_and_rises_with_work(name, compute, memory, more):
    device = load_device(name)
    power = float(power_w(device, compute, memory))
    assert device.idle_w < power <= device.tdp_w
    assert float(power_w(device, min(1, compute + more), memory)) >= power
    assert float(power_w(device, compute, min(1, memory + more))) >= power


def test_power_is_vectorised():
    device = load_device("h100-sxm")
    power = power_w(device, np.array([0.0, 1.0]), np.array([0.0, 0.0]))
    assert power.tolist() == [70 + 0.19 * 630, 700]


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    """Median rows of Llama-2-70B, batch 1, on A100, by tensor parallelism and prompt length."""
    if not SPLITWISE.exists():
        pytest.skip("the reference data is not here")
    rows = pd.read_csv(SPLITWISE)
    rows = rows[(rows.model == "llama2-70b") & (rows.hardware == "a100-80gb") & (rows.batch_size == 1)]
    rows = rows[(rows.token_size == 128) & (rows.average_power > 0)]
    return rows.groupby(["tensor_parallel", "prompt_size"]).median(numeric_only=True)


@pytest.mark.parametrize(("tp", "power", "traffic"), [(2, 0.72, 0.63), (4, 0.59, 0.38), (8, 0.44, 0.19)])
def test_decode_power_of_splitwise(measured, tp, power, traffic):
    device, row = load_device("a100-80-sxm"), measured.loc[(tp, 512)]
    assert row.average_power == pytest.approx(power, abs=0.02)
    weights = 2 * 69e9 / tp
    read = weights / (row.token_time * 1e-3) / device.memory_bytes_per_s
    assert read == pytest.approx(traffic, abs=0.02)
    assert float(power_w(device, 0.0, read)) / device.tdp_w == pytest.approx(row.average_power, abs=0.05)


def test_prefill_power_of_splitwise(measured):
    """At TP2 prompts from 512 tokens on use half of the arithmetic peak and more, and reach TDP."""
    device = load_device("a100-80-sxm")
    for prompt in (512, 1024, 2048):
        row = measured.loc[(2, prompt)]
        compute = 2 * 69e9 / 2 * prompt / (row.prompt_time * 1e-3) / device.peak_flops_per_s["bf16"]
        assert 0.5 < compute < 0.7
        assert row.peak_power == pytest.approx(1.0, abs=0.1)
        assert float(power_w(device, compute, 0.1)) == device.tdp_w
