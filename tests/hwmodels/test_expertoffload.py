"""What experts cost on either side: bytes, seconds, what fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hwmodels.errors import MappingError, OutOfMemoryError, ProfileError
from hwmodels.expertoffload import (
    THREAD_BYTES_PER_S,
    ExpertCosts,
    Host,
    cache_share_that_fits,
    chunk_weight_bytes,
    compile_expert_costs,
    cpu_expert_s,
    expert_bytes,
    gpu_expert_s,
    touched_share,
)
from hwmodels.hardware import load_cluster, load_device
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from hwmodels.yamlfiles import PROFILES

LAYERS, EXPERTS, TOP_K = 4, 8, 2
TOY = ExpertCosts(
    LAYERS, EXPERTS, TOP_K,
    expert_bytes=(8.0, 2.0), gpu_s=((0.0, 1.0), (0.0, 0.5)), cpu_s=((0.0, 3.0), (0.0, 2.0)),
    dense_s=(1.0, 2.0, 1.0, 2.0), once_s=5.0, link_bytes_per_s=2.0,
)  # fmt: skip
ONE = replace(TOY, expert_bytes=(8.0,), gpu_s=TOY.gpu_s[:1], cpu_s=TOY.cpu_s[:1])
MIXTRAL, HOST = load_model("mixtral-8x7b"), load_device("xeon-8592")


def test_bytes_of_an_expert() -> None:
    """3 x 4096 x 14336 weights; DeepSeek-V3 3 x 7168 x 2048 in blocks of fp8."""
    assert expert_bytes(MIXTRAL, "fp16") == 3 * 4096 * 14336 * 2
    assert expert_bytes(load_model("deepseek-v3"), "fp8_block") == 3 * 7168 * 2048 * (1 + 4 / 128**2)
    with pytest.raises(MappingError, match="has no experts"):
        expert_bytes(load_model("llama-3-8b"), "fp16")


def test_threads_stream_until_the_memory_is_full() -> None:
    """Twice the threads take half the time, but all 64 not less than 85 % of 358 GB/s."""
    one = np.array([1.0])
    seconds = [float(cpu_expert_s(MIXTRAL, "fp16", one, Host(HOST, n))[0]) - 5e-6 for n in (1, 2, 64)]
    assert seconds[0] == pytest.approx(2 * seconds[1])
    assert seconds[0] == pytest.approx(3 * 4096 * 14336 * 2 / THREAD_BYTES_PER_S)
    assert seconds[2] == pytest.approx(3 * 4096 * 14336 * 2 / (0.85 * 358e9))
    many = cpu_expert_s(MIXTRAL, "fp16", np.array([4096.0]), Host(HOST, 32))  # half of 60 % of 249 Tflop/s
    assert many[0] - 5e-6 == pytest.approx(2 * 176_160_768 * 4096 / (0.5 * 0.6 * 249e12))


def test_thread_bandwidth_is_that_measured() -> None:
    pandas = pytest.importorskip("pandas")
    rows = pandas.read_parquet(PROFILES / "measured" / "xeon-1c" / "gemm.parquet")
    rows = rows[(rows.m == 1) & (rows.dtype == "bf16") & (rows.n * rows.k * 2 > 4e6)]
    rates = rows.n * rows.k * 2 / rows.seconds
    assert rates.median() == pytest.approx(THREAD_BYTES_PER_S, rel=0.01)
    assert rates.min() > 6e9
    assert rates.max() < 12e9


def test_an_expert_on_the_gpu_is_bound_by_its_memory() -> None:
    """One token: the weights at 90 % of 1008 GB/s, and no more than a fifth beside that."""
    cost = AnalyticCost(load_cluster("rtx-4090", 1), Mapping())
    seconds = float(gpu_expert_s(MIXTRAL, "fp16", np.array([1.0]), cost)[0])
    least_s = 3 * 4096 * 14336 * 2 / (0.9 * 1008e9)
    assert least_s < seconds < 1.2 * least_s
    assert float(gpu_expert_s(MIXTRAL, "fp16", np.array([0.0]), cost)[0]) == 0.0


def test_share_that_fits() -> None:
    """46.7e9 weights of which 256 experts of 176e6: on 24 GB beside 2 GB, 23 % of the experts."""
    device = load_device("rtx-4090")
    share = cache_share_that_fits(MIXTRAL, Precision(), device.memory_bytes, 2e9)
    dense = (MIXTRAL.parameters - 256 * 176_160_768) * 2
    assert share * 256 * 176_160_768 * 2 + dense + 2e9 == pytest.approx(device.memory_bytes)
    assert cache_share_that_fits(MIXTRAL, Precision(), 1e12, 0) == 1.0
    with pytest.raises(OutOfMemoryError, match="without its experts misses"):
        cache_share_that_fits(MIXTRAL, Precision(), 2e9, 0)


@pytest.mark.parametrize(
    ("share", "tokens", "correlation", "touched"), [(0.2, 8, 0.0, 1 - 0.8**8), (0.3, 1, 0.5, 0.3), (1, 5, 0, 1)]
)
def test_touched_share(share: float, tokens: int, correlation: float, touched: float) -> None:
    assert touched_share(share, tokens, correlation) == pytest.approx(touched)


def test_touched_share_against_a_chain() -> None:
    """Two states, share 0.2, correlation 0.6: used next with 0.2 + 0.8 x 0.6 if used, else with 0.2 x 0.4."""
    rng = np.random.default_rng(0)
    used = rng.random(200_000) < 0.2
    ever = used.copy()
    for _ in range(4):
        used = rng.random(len(used)) < np.where(used, 0.2 + 0.8 * 0.6, 0.2 * 0.4)
        ever |= used
    assert ever.mean() == pytest.approx(touched_share(0.2, 5, 0.6), abs=0.005)
    assert used.mean() == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: Host(HOST, 65), ProfileError, "expected 0 to the 64 cores"),
        (lambda: Host(HOST, 1, ssd_bytes_per_s=0.0), ProfileError, "ssd_bytes_per_s"),
        (lambda: replace(ONE, host_bytes=100.0), OutOfMemoryError, "give an SSD"),
        (lambda: replace(ONE, top_k=9), MappingError, "top_k = 9"),
        (lambda: replace(TOY, gpu_s=TOY.gpu_s[:1]), MappingError, "1 GPU times"),
        (lambda: touched_share(2.0, 1), MappingError, "expected a share"),
        (lambda: chunk_weight_bytes(1.0, 1.2), MappingError, "chunk-level"),
        (
            lambda: compile_expert_costs(MIXTRAL, load_cluster("rtx-4090", 1), Host(HOST), ("int3",)),
            MappingError,
            "expected one or more of fp32",
        ),
    ],
)
def test_bad_costs_are_told(make, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()
