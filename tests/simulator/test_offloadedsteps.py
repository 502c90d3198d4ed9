"""Mean steps of models whose experts do not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hwmodels.engine import Engine
from hwmodels.hardware import load_cluster, load_device
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import compile_step_model
from simulator.errors import OffloadError
from simulator.offloadedsteps import offloaded_token_s
from simulator.offloadplan import OffloadPlan

MIXTRAL, HOST = load_model("mixtral-8x7b"), load_device("xeon-8592")


def test_all_experts_cached_is_near_the_step_of_a_model_that_fits() -> None:
    """One sequence, Mixtral on a B200: two experts one after the other take longer than in one fused kernel."""
    cluster = load_cluster("b200-sxm", 1)
    idle = Engine("idle host", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 2e9)
    steps = compile_step_model(
        MIXTRAL, Mapping(), Precision(), idle, AnalyticCost(cluster, Mapping()), max_tokens=8, max_seqs=8
    )
    fused_s = steps.step_s(1, 1024, ())
    result = offloaded_token_s(MIXTRAL, cluster, HOST, OffloadPlan(1.0, ("bf16",)), steps=10, warmup=0)
    assert fused_s < result.step_s < 1.2 * fused_s


def test_prefill_and_models_with_dense_layers_run() -> None:
    cluster = load_cluster("rtx-4090", 1)
    lite = load_model("deepseek-v2-lite")
    plan = OffloadPlan(0.3, misses="hybrid", cpu_threads=8)
    prompt = offloaded_token_s(lite, cluster, HOST, plan, tokens=64, context_tokens=0, prefill=True, steps=10)
    token = offloaded_token_s(lite, cluster, HOST, plan, steps=20)
    assert prompt.step_s > 2 * token.step_s
    more = offloaded_token_s(lite, cluster, HOST, replace(plan, cpu_threads=32), steps=20)
    assert more.step_s < token.step_s
    larger = offloaded_token_s(lite, cluster, HOST, replace(plan, cache_share=0.6), steps=20)
    assert larger.step_s < token.step_s


def test_loads_of_another_shape_are_told() -> None:
    with pytest.raises(OffloadError, match="expected 32 layers of 8 experts"):
        offloaded_token_s(MIXTRAL, load_cluster("rtx-4090", 1), HOST, OffloadPlan(0.2), loads=np.ones((2, 2)), steps=10)
