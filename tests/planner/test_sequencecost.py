"""Costs of prompts on groups of ranks against the prices they are fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels.errors import MappingError
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Precision
from planner.flexsp import flexsp
from planner.sequencecost import layers_s, prefill_cost
from planner.sequencegroups import best_static, static

MODEL, CLUSTER, WIDE = load_model("llama-3.1-8b"), load_cluster("h100-sxm", 64), Precision()
COST = prefill_cost(MODEL, CLUSTER, 64, WIDE, tokens_per_rank=32768)


def test_the_fit_is_close_between_and_at_the_lengths_it_saw() -> None:
    lengths = np.array([1500.0, 3000.0, 12_000.0, 50_000.0, 120_000.0])
    fitted = COST.start_s + COST.sequence_s(lengths, 1)
    np.testing.assert_allclose(fitted, layers_s(MODEL, CLUSTER, WIDE, lengths), rtol=0.05)


def test_rates_fall_where_groups_leave_the_node_and_end_at_the_heads() -> None:
    rates = dict(COST.rates)
    assert list(rates) == [2, 4, 8, 16, 32]  # 32 query heads
    assert min(rates[2], rates[4], rates[8]) > 2 * max(rates[16], rates[32])


def test_prompts_of_unlike_lengths_gain_from_groups_of_unlike_sizes() -> None:
    rng = np.random.default_rng(0)
    lengths = [*(int(s) for s in rng.lognormal(np.log(2000), 1.0, 100).clip(64, 30_000)), 400_000]
    found = flexsp(lengths, 16, COST, seconds=2.0)
    assert found.seconds < best_static(lengths, 16, COST).seconds == static(lengths, 16, COST, 16).seconds


def test_mixtures_and_missing_ranks_are_refused() -> None:
    with pytest.raises(MappingError, match="dense model"):
        prefill_cost(load_model("mixtral-8x7b"), CLUSTER, 8, WIDE, tokens_per_rank=1e4)
    with pytest.raises(MappingError, match="expected different devices"):
        prefill_cost(MODEL, load_cluster("h100-sxm", 8), 16, WIDE, tokens_per_rank=1e4)
