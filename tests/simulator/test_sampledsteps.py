"""Drawn steps in seconds: the step model's routed experts against them, and cases that can be told without drawing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hwmodels.busiest import busiest_rank
from hwmodels.hardware import load_cluster
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Experts
from hwmodels.roofline import AnalyticCost
from hwmodels.routedcost import RoutedCost
from hwmodels.routing import rank_shares
from simulator.routingdraws import synthesize
from simulator.sampledsteps import sampled_experts_s

COST = AnalyticCost(load_cluster("h200-sxm", 8), Mapping(attention_dp=8, ep=8))


def kernel(tokens: int, layers: int, ranks: int) -> Experts:
    """64 experts, 4 for a token; rows and touched experts are for others to fill in."""
    batch = np.array([float(tokens)])
    return Experts("routed experts", batch, batch, batch, 4096, 1536, 64, 4, 1, ranks, True, Precision(), layers)


@pytest.mark.parametrize("copies", [0, 8])
@pytest.mark.parametrize("tokens", [64, 1024, 16384])
def test_the_step_model_is_within_two_percent_of_drawn_steps(tokens: int, copies: int) -> None:
    made = synthesize(np.random.default_rng(0), 6, 64, 4, 0.8, 1, 0.0)
    hot = np.argsort(-made.shares, axis=1)[:, :copies]
    shares = np.stack(
        [
            rank_shares(row, [[e // 8, (e // 8 + 4) % 8] if e in few else [e // 8] for e in range(64)], 8)
            for row, few in zip(made.shares, hot, strict=True)
        ]
    )
    op = kernel(tokens, 6, 8)
    drawn = sampled_experts_s(np.random.default_rng(1), made, shares, COST, op, tokens, 500)
    assert drawn.std() / drawn.mean() / 500**0.5 < 0.004
    assert RoutedCost(COST, busiest_rank(made, shares)).time_s(op)[0] == pytest.approx(drawn.mean(), rel=0.02)


def test_one_rank_has_all_rows() -> None:
    made = synthesize(np.random.default_rng(0), 2, 64, 4, 0.5, 1, 0.0)
    op = kernel(8192, 2, 1)
    drawn = sampled_experts_s(np.random.default_rng(1), made, np.ones((2, 1, 64)), COST, op, 8192, 20)
    full = replace(op, rows=np.array([4.0 * 8192]), active=np.array([64.0]))
    assert drawn == pytest.approx(np.full(20, COST.time_s(full)[0]), rel=1e-9)


def test_a_step_is_as_slow_as_the_slowest_rank() -> None:
    """All tokens on one rank of two: that of all rows on one, whatever the other would take."""
    made = synthesize(np.random.default_rng(0), 1, 64, 4, 0.5, 1, 0.0)
    one = np.stack([np.ones(64), np.zeros(64)])[None]
    op = kernel(1024, 1, 2)
    drawn = sampled_experts_s(np.random.default_rng(1), made, one, COST, op, 1024, 10)
    alone = sampled_experts_s(np.random.default_rng(1), made, one[:, :1], COST, op, 1024, 10)
    assert drawn.tolist() == alone.tolist()
