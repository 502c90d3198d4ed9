"""Sampled routing: what was asked for comes out."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.expertrouting import SampledRouting, active_experts, popularity_of, power_law

LAYERS, EXPERTS, TOP_K = 4, 8, 2
POPULARITY = power_law(LAYERS, EXPERTS, 0.5, np.random.default_rng(0))


def test_popular_experts_are_chosen_first_by_their_share() -> None:
    popularity = power_law(1, 6, 1.0, np.random.default_rng(3))
    for persistence in (0.0, 0.7):
        routing = SampledRouting(popularity, 2, np.random.default_rng(4), tokens=20, persistence=persistence)
        draws = [routing.step() for _ in range(1500)]
        first = np.concatenate(
            [np.take_along_axis(d.chosen, d.weights.argmax(-1)[..., None], -1).ravel() for d in draws]
        )
        assert np.bincount(first, minlength=6) / len(first) == pytest.approx(popularity[0], abs=0.012)
        assert all((d.chosen[..., 0] != d.chosen[..., 1]).all() for d in draws)
        assert draws[0].weights.sum(-1) == pytest.approx(1)
        assert draws[0].scores.sum(-1) == pytest.approx(1)


@pytest.mark.parametrize(("experts", "top_k", "error"), [(8, 2, 0.1), (64, 6, 0.02), (256, 8, 0.01)])
def test_measured_loads_come_out(experts: int, top_k: int, error: float) -> None:
    """Loads from 1 to 5 within `error`, beside four deviations of the counts over 60,000 tokens."""
    loads = np.linspace(1, 5, experts)[None]
    routing = SampledRouting(popularity_of(loads, top_k), top_k, np.random.default_rng(5), tokens=60_000)
    wanted = 60_000 * top_k * loads[0] / loads.sum()
    got = np.bincount(routing.step().chosen.ravel(), minlength=experts)
    assert (np.abs(got - wanted) < error * wanted + 4 * np.sqrt(wanted)).all()


def test_active_experts_count_every_token_once() -> None:
    routing = SampledRouting(POPULARITY, TOP_K, np.random.default_rng(0), tokens=50)
    draw = routing.step()
    actives, shares = active_experts(draw, (0.6, 0.9))
    assert shares.sum() == LAYERS * 50 * TOP_K
    assert sum(tokens for active in actives for _, tokens, _ in active) == shares[:2].sum()
    single = SampledRouting(POPULARITY, TOP_K, np.random.default_rng(0)).step()
    assert sum(len(active) for active in active_experts(single, (0.6, 0.9))[0]) <= LAYERS * TOP_K
