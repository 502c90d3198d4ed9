"""Measured prices are the table's where there is a table, and the roofline's where there is none."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hwmodels import operators as ops
from hwmodels.engine import Engine
from hwmodels.evidence import evidence
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.kernels.estimate import Estimate
from hwmodels.kernels.gemm import GemmTimes
from hwmodels.kernels.library import Kernels, without_scaling
from hwmodels.kernels.measured import MeasuredCost
from hwmodels.kernels.table import checked
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Elementwise, ExpertExchange, Gemm
from hwmodels.roofline import AnalyticCost, attention_format, product_format
from hwmodels.step_model import CostModel, compile_step_model

BF16 = Precision("bf16", "bf16", "bf16")
CLUSTER = load_cluster("h100-sxm", 8)


def gemm_rows(dtype: str = "bf16", slow: float = 3.0) -> pd.DataFrame:
    """`slow` times the time of the roofline, at a grid of shapes."""
    rows = []
    for n in (1024, 2048, 4096, 8192, 16384, 32768):
        for k in (1024, 2048, 4096, 8192, 16384):
            for m in (1, 16, 64, 256, 1024, 4096, 16384):
                flops, moved = 2.0 * m * n * k, 2.0 * (n * k + m * (n + k))
                rows.append((m, n, k, slow * max(flops / 989e12, moved / 3.35e12) + 4e-6))
    frame = pd.DataFrame(rows, columns=["m", "n", "k", "seconds"])
    return checked(
        frame.assign(
            dtype=dtype, device="h100-sxm", software="made up 1", kernel="one", spread=np.nan, source="this test"
        ),
        "gemm",
        "test",
    )


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(GemmTimes.fit(gemm_rows(), CLUSTER.device), None, None, None, None, None, None, None)


def test_products_cost_what_the_table_says_and_the_rest_what_the_roofline_says(kernels):
    measured, analytic = MeasuredCost(CLUSTER, Mapping(), kernels), AnalyticCost(CLUSTER, Mapping())
    rows = gemm_rows()
    row = rows[(rows.n == 4096) & (rows.k == 8192)]
    op = Gemm("product", row.m.to_numpy(float), 4096, 8192, BF16, count=5)
    assert measured.time_s(op) == pytest.approx(5 * row.seconds.to_numpy(), rel=1e-6)
    assert measured.sources(op)["measured"] == pytest.approx(float(measured.time_s(op).sum()))
    norm = Elementwise("norm", np.array([1e6, 1e8]))
    assert np.array_equal(measured.time_s(norm), analytic.time_s(norm))


def test_a_product_without_rows_costs_nothing(kernels):
    op = Gemm("product", np.array([0.0, 1.0]), 4096, 8192, BF16)
    time_s = MeasuredCost(CLUSTER, Mapping(), kernels).time_s(op)
    assert time_s[0] == 0 < time_s[1]


def test_formats_without_a_table_fall_back(kernels):
    op = Gemm("product", np.array([64.0]), 4096, 8192, Precision("fp8", "fp8", "fp8"))
    measured, analytic = MeasuredCost(CLUSTER, Mapping(), kernels), AnalyticCost(CLUSTER, Mapping())
    assert np.array_equal(measured.time_s(op), analytic.time_s(op))
    assert set(measured.sources(op)) <= {"analytic", "calibrated"}


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        (BF16, "bf16"),
        (Precision("fp16", "fp16"), "bf16"),
        (Precision("fp8", "fp8"), "fp8"),
        (Precision("fp8_block", "fp8"), "fp8_block"),
        (Precision("fp8", "bf16"), None),
        (Precision("int4", "bf16"), "int4"),
        (Precision("fp4", "fp4"), "fp4"),
        (Precision("mxfp4", "bf16"), "mxfp4"),
    ],
)
def test_formats_have_the_names_of_the_tables(precision, name):
    assert product_format(precision) == name


def test_attention_is_computed_in_8_bits_only_where_cache_and_products_are():
    assert attention_format(Precision("fp8", "fp8", "fp8")) == "fp8"
    assert attention_format(Precision("bf16", "bf16", "fp8")) == "bf16"
    assert attention_format(BF16) == "bf16"


def test_a_step_model_of_measured_products_takes_longer_and_says_why(kernels):
    idle_engine = Engine("idle", "made up", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
    model = load_model("llama-3.2-1b")
    limits = {"max_tokens": 512, "max_seqs": 64}
    prices: dict[str, CostModel] = {
        "measured": MeasuredCost(CLUSTER, Mapping(), kernels),
        "analytic": AnalyticCost(CLUSTER, Mapping()),
    }
    steps = {
        name: compile_step_model(model, Mapping(), BF16, idle_engine, cost, **limits) for name, cost in prices.items()
    }
    assert steps["measured"].step_s(0, 0, [(512, 0)]) > 1.2 * steps["analytic"].step_s(0, 0, [(512, 0)])
    shares = evidence(model, Mapping(), BF16, idle_engine, prices["measured"])
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["measured"] > 0.5
    found = ops.language_model_head(model, np.ones(1), 1)
    assert all(prices["measured"].time_s(op)[0] > 0 for op in found)


def test_static_scales_need_no_search():
    rows = gemm_rows("fp8").head(14)
    quantize = pd.DataFrame({"kind": ["scale", "cast"], "m": [1, 1], "k": [1024, 1024], "seconds": [1e-6, 9.0]})
    cut = without_scaling(rows, quantize)
    both = rows.merge(cut, on=["m", "n", "k"])
    at = (both.m == 1) & (both.k == 1024)
    assert both.seconds_y[at].to_numpy() == pytest.approx(both.seconds_x[at].to_numpy() - 1e-6)
    assert np.array_equal(both.seconds_y[~at], both.seconds_x[~at])
    wide = gemm_rows("bf16").head(14)
    assert np.array_equal(without_scaling(wide, quantize).seconds, wide.seconds)


def exchanged(mapping: Mapping, formats: tuple[str, str], tokens: list[float], **changes: Any) -> ExpertExchange:
    return ExpertExchange("expert dispatch", "dispatch", np.array(tokens), 7168, 256, 8, mapping.ep, formats, **changes)


def test_measured_exchanges_price_steps_where_there_are_some() -> None:
    """As the table says for what was timed; other formats, limits and loads by the roofline's ratio; else the links."""
    cluster, mapping = load_cluster("h200-sxm", 32), Mapping(attention_dp=32, ep=32)
    known = SimpleNamespace(
        time_s=lambda kind, gpus, nodes, tokens, hidden, experts, top_k: Estimate(
            gpus * nodes * 1e-7 * tokens, np.where(tokens <= 1024, 1.0, 0.0)
        )
    )
    none = {"gemm": None, "batched_gemm": None, "moe": None, "collective": None}
    cost = MeasuredCost(cluster, mapping, SimpleNamespace(expert_exchange=known, **none))  # type: ignore[arg-type]
    op = exchanged(mapping, ("fp8", "bf16"), [16.0, 1024.0, 4096.0], count=3)
    analytic = cost.analytic.time_s(op)
    assert cost.time_s(op) == pytest.approx([3 * 128e-7 * 16, 3 * 128e-7 * 1024, analytic[2]])
    assert cost.sources(op) == {
        "measured": pytest.approx(float(cost.time_s(op)[:2].sum())), "extended": pytest.approx(float(analytic[2]))
    }  # fmt: skip
    wide = exchanged(mapping, ("bf16", "bf16"), [16.0, 1024.0, 4096.0], count=3)
    assert cost.time_s(wide)[:2] == pytest.approx((cost.time_s(op) * cost.analytic.time_s(wide) / analytic)[:2])
    assert cost.sources(wide)["measured"] == 0.0
    skewed = replace(op, shares=np.random.default_rng(0).dirichlet(np.ones(32), 2))
    assert cost.time_s(skewed) == pytest.approx(cost.time_s(op) * cost.analytic.time_s(skewed) / analytic)
    assert (cost.time_s(skewed) > cost.time_s(op)).all()
    alone = MeasuredCost(cluster, mapping, SimpleNamespace(expert_exchange=None, **none))  # type: ignore[arg-type]
    assert alone.time_s(op) == pytest.approx(analytic)
    one = MeasuredCost(cluster, Mapping(attention_dp=8, expert_tp=8), SimpleNamespace(expert_exchange=known, **none))  # type: ignore[arg-type]
    assert (one.time_s(exchanged(Mapping(), ("fp8", "bf16"), [16.0])) == 0).all()
