"""Made-up routing: marginals of statistics and transitions, fits that find the skew that was put in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.routing import RoutingError, RoutingStats
from simulator.routingdraws import fit_skew, lognormal, matched_skew, power_law, synthesize, with_transitions


@settings(max_examples=30)
@given(
    st.integers(1, 4),
    st.integers(3, 40),
    st.integers(1, 3),
    st.floats(0, 1.5),
    st.integers(1, 5),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_made_up_loads_and_transitions_agree(
    layers: int, experts: int, top_k: int, skew: float, topics: int, concentration: float, seed: int
) -> None:
    for shape in (power_law, lognormal):
        rng = np.random.default_rng(seed)
        made = synthesize(rng, layers, experts, top_k, skew, topics, concentration, shape=shape)
        assert made.marginal_error() < 1e-9
        assert made.inclusion.max() <= 1 + 1e-9
        again = synthesize(
            np.random.default_rng(seed), layers, experts, top_k, skew, topics, concentration, shape=shape
        )
        assert made.loads.tolist() == again.loads.tolist()


@settings(max_examples=30)
@given(st.integers(2, 4), st.integers(2, 30), st.floats(0, 1), st.booleans(), st.integers(0, 1000))
def test_assumed_transitions_keep_the_loads(
    layers: int, experts: int, concentration: float, in_order: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    bare = RoutingStats("m", tuple(range(layers)), rng.random((layers, experts)) + 0.01, 1, "drawn")
    full = with_transitions(bare, concentration, None if in_order else rng)
    assert full.marginal_error() < 1e-9
    assert full.loads.tolist() == bare.loads.tolist()


def test_concentration_runs_from_independence_to_one_successor() -> None:
    bare = RoutingStats("m", (0, 1), np.ones((2, 16)), 2, "even")
    free, tied = with_transitions(bare, 0.0), with_transitions(bare, 1.0)
    assert free.transitions is not None and tied.transitions is not None
    assert free.transitions == pytest.approx(np.full((1, 16, 16), 1 / 16))
    assert np.sort(tied.transitions[0], axis=1)[:, -1] == pytest.approx(1)


def test_topics_bind_layers_together() -> None:
    def bond(topics: int) -> float:
        """Mutual information of two layers' choices, nats."""
        made = synthesize(np.random.default_rng(3), 2, 32, 2, 0.7, topics, 0.0)
        assert made.transitions is not None
        return float(
            (made.shares[0][:, None] * made.transitions[0] * np.log(made.transitions[0] / made.shares[1])).sum()
        )

    assert bond(1) == pytest.approx(0, abs=1e-12)
    assert bond(8) > 0.02


@given(st.floats(0.1, 1.5), st.sampled_from([8, 64, 256]))
def test_fits_find_the_skew_that_was_put_in(skew: float, experts: int) -> None:
    def made(shares: np.ndarray) -> RoutingStats:
        return RoutingStats("m", (0,), shares[None], 1, "made")

    power, normal = fit_skew(made(power_law(experts, skew))), fit_skew(made(lognormal(experts, skew)))
    assert power.exponent[0] == pytest.approx(skew, rel=1e-9) and power.exponent_r2[0] == pytest.approx(1)
    assert normal.sigma[0] == pytest.approx(skew, rel=1e-9) and normal.sigma_r2[0] == pytest.approx(1)
    assert power.sigma_r2[0] < 1 and normal.exponent_r2[0] < 1
    for shape in (power_law, lognormal):
        assert matched_skew(made(shape(experts, skew)), shape)[0] == pytest.approx(skew, rel=1e-6)
        assert matched_skew(made(np.full(experts, 1 / experts)), shape)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k 9 of 8"),
        ({"skew": -1.0}, "skew -1"),
        ({"skew": float("nan")}, "skew nan"),
        ({"topics": 0}, "topics 0"),
        ({"concentration": 1.5}, "concentration 1.5: expected a part from 0 to 1"),
    ],
)
def test_made_up_statistics_out_of_range(changes: dict, message: str) -> None:
    values = {"layers": 2, "experts": 8, "top_k": 2, "skew": 0.5, "topics": 1, "concentration": 0.0} | changes
    with pytest.raises(RoutingError, match=message):
        synthesize(np.random.default_rng(0), **values)
