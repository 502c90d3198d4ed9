"""The busiest rank: expected maxima, quantiles and touched experts against sampling, exact sums and enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from hwmodels.busiest import LEVELS, busiest_rank, expected_max, most_touched, rank_moments
from hwmodels.routing import RoutingError, rank_shares
from simulator.choicedraws import Chooser, draw_counts, split_counts
from simulator.routingdraws import synthesize


def blocks(experts: int, ranks: int) -> np.ndarray:
    """Experts on ranks in their order, equally many each."""
    return rank_shares(np.ones(experts), [[e * ranks // experts] for e in range(experts)], ranks)


@pytest.mark.parametrize("tokens", [16, 400, 30_000])
def test_two_ranks_against_the_exact_binomial(tokens: int) -> None:
    """One pick of two experts: the busiest has max(x, n - x) tokens, x binomial."""
    for share in (0.5, 0.4, 0.1):
        inclusion = np.array([[share, 1 - share]])
        means, variances = rank_moments(inclusion, np.eye(2))
        x = np.arange(tokens + 1)
        chance = binom.pmf(x, tokens, share)
        exact = (np.maximum(x, tokens - x) * chance).sum()
        assert expected_max(tokens * means, tokens * variances).mean[0] == pytest.approx(exact, rel=0.01)


CASES = [
    pytest.param(256, 8, (8, 16, 32, 64), 0.7, id="like DeepSeek-V3"),
    pytest.param(256, 8, (8, 16, 32, 64), 0.0, id="DeepSeek-V3, uniform"),
    pytest.param(8, 2, (2, 4, 8), 0.25, id="like Mixtral"),
    pytest.param(8, 2, (2, 4, 8), 0.0, id="Mixtral, uniform"),
]


@pytest.mark.parametrize(("experts", "top_k", "ranks", "skew"), CASES)
@pytest.mark.parametrize("tokens", [16, 1024, 32768])
def test_expected_maximum_against_sampling(
    experts: int, top_k: int, ranks: tuple[int, ...], skew: float, tokens: int
) -> None:
    """Within 1 % of the mean of 4,000 steps (whose standard error is below 0.3 %), touched experts as well."""
    rng = np.random.default_rng(tokens)
    made = synthesize(rng, 1, experts, top_k, skew, 1, 0.0)
    counts = draw_counts(rng, Chooser.of(made.inclusion[0]), tokens, 4000)
    for ep in ranks:
        shares = blocks(experts, ep)
        table = busiest_rank(made, shares, (tokens, 2 * tokens))
        busiest = split_counts(rng, counts, shares).max(axis=1)
        assert table.rows[0, 0] == pytest.approx(busiest.mean(), rel=0.01)
        assert table.deviation[0, 0] == pytest.approx(busiest.std(), rel=0.15)
        touched = (counts > 0).astype(float) @ shares.T
        assert table.touched[0, 0] == pytest.approx(touched.max(axis=1).mean(), rel=0.01)
        assert table.active[0, 0] == pytest.approx(touched.mean(), rel=0.005)
        if tokens > 16:  # whole tokens are coarser than this with fewer
            middle = np.quantile(busiest, LEVELS[2:-2])
            assert table.quantiles[0, 0, 2:-2] == pytest.approx(middle, rel=0.01)


def test_replicas_against_sampling() -> None:
    rng = np.random.default_rng(5)
    made = synthesize(rng, 1, 64, 4, 1.0, 1, 0.0)
    hot = np.argsort(-made.shares[0])[:8]
    placement = [[e % 8] + ([(e + 3) % 8, (e + 5) % 8] if e in hot else []) for e in range(64)]
    shares = rank_shares(made.shares[0], placement, 8)
    for tokens in (16, 2048):
        counts = split_counts(rng, draw_counts(rng, Chooser.of(made.inclusion[0]), tokens, 4000), shares)
        table = busiest_rank(made, shares, (tokens, 2 * tokens))
        assert table.rows[0, 0] == pytest.approx(counts.max(axis=1).mean(), rel=0.01)


def test_draws_from_the_table_have_its_mean_and_spread() -> None:
    rng = np.random.default_rng(0)
    made = synthesize(rng, 2, 64, 4, 0.7, 1, 0.0)
    table = busiest_rank(made, blocks(64, 8))
    for tokens in (50, 3000):
        drawn = np.array([table.draw(rng, tokens) for _ in range(4000)])
        assert drawn.mean(axis=0) == pytest.approx(table.at(tokens)[0], rel=0.01)
        column = busiest_rank(made, blocks(64, 8), (tokens, 2 * tokens)).deviation[:, 0]
        assert drawn.std(axis=0) == pytest.approx(column, rel=0.1)


@settings(max_examples=25)
@given(st.sampled_from([(16, 2, 4), (64, 8, 8), (60, 4, 6)]), st.floats(0, 1.2), st.integers(0, 1000))
def test_the_table_stays_within_its_bounds(sizes: tuple[int, int, int], skew: float, seed: int) -> None:
    experts, top_k, ranks = sizes
    made = synthesize(np.random.default_rng(seed), 2, experts, top_k, skew, 1, 0.0)
    table = busiest_rank(made, blocks(experts, ranks))
    most = (table.mean * ranks) / top_k * min(top_k, experts // ranks)
    heaviest = (made.inclusion @ blocks(experts, ranks).T).max(axis=1)[:, None]
    assert (table.rows >= heaviest * table.tokens * 0.999).all()  # Jensen: the maximum of means is below the mean
    assert (table.rows[:, 4:] <= most[:, 4:] * 1.02).all()
    assert (np.diff(table.rows, axis=1) > 0).all() and (np.diff(table.touched, axis=1) > -1e-9).all()
    assert (table.active <= table.touched + 1e-9).all() and table.touched.max() <= experts // ranks + 1e-9
    assert (np.diff(table.quantiles, axis=2) >= -1e-9).all()


def test_the_table_between_its_token_counts() -> None:
    made = synthesize(np.random.default_rng(0), 3, 256, 8, 0.7, 1, 0.0)
    tokens = (3, 45, 700, 12_000, 400_000)
    table, direct = busiest_rank(made, blocks(256, 32)), busiest_rank(made, blocks(256, 32), tokens)
    rows, touched = table.at(tokens)
    assert rows == pytest.approx(direct.rows, rel=0.005)
    assert touched == pytest.approx(direct.touched, rel=0.005)
    assert table.at(0)[0] == pytest.approx(0) and table.at(64)[0].shape == (3,)


def test_one_rank_has_every_token() -> None:
    made = synthesize(np.random.default_rng(0), 2, 8, 2, 0.5, 1, 0.0)
    table = busiest_rank(made, np.ones((1, 8)))
    assert table.rows == pytest.approx(2 * np.tile(table.tokens, (2, 1)), rel=2e-3)
    assert (table.deviation < 0.01 * table.rows).all()


def test_token_counts_that_do_not_ascend() -> None:
    made = synthesize(np.random.default_rng(0), 1, 8, 2, 0.5, 1, 0.0)
    for tokens in ((16,), (16, 16), (0, 4)):
        with pytest.raises(RoutingError, match="expected at least two, ascending"):
            busiest_rank(made, blocks(8, 2), tokens)


def test_most_touched_against_enumeration() -> None:
    picked = np.array([[[0.9, 0.2, 0.0], [0.5, 0.4, 0.3]]])
    exact = 0.0
    for bits in np.ndindex(2, 2, 2, 2, 2, 2):
        chance = np.prod([p if bit else 1 - p for p, bit in zip(picked.ravel(), bits, strict=True)])
        exact += chance * max(sum(bits[:3]), sum(bits[3:]))
    assert most_touched(picked)[0] == pytest.approx(exact, rel=1e-12)


def test_busiest_over_mean_over_steps_and_layers_against_sampling() -> None:
    """Layers of different skew in one pot: quantiles of 3,000 steps of each, within 1.5 % and one token."""
    rng = np.random.default_rng(1)
    made = synthesize(rng, 4, 64, 4, 0.9, 1, 0.0)
    levels = [0.1, 0.5, 0.9, 0.99]
    for tokens in (100, 5000):
        drawn = [
            split_counts(rng, draw_counts(rng, Chooser.of(row), tokens, 3000), blocks(64, 8)).max(axis=1)
            for row in made.inclusion
        ]
        wanted = np.quantile(np.array(drawn) / (tokens * 4 / 8), levels)
        found = busiest_rank(made, blocks(64, 8), (tokens, 2 * tokens)).over_mean(tokens, levels)
        assert (np.abs(found - wanted) < 0.015 * wanted + 1 / (tokens * 4 / 8)).all()


def test_busiest_over_mean_of_many_tokens_is_that_of_the_loads() -> None:
    made = synthesize(np.random.default_rng(2), 3, 64, 4, 0.9, 1, 0.0)
    heaviest = (made.shares @ blocks(64, 8).T).max(axis=1) * 8
    found = busiest_rank(made, blocks(64, 8), (10**7, 10**8)).over_mean(10**8, [0.0, 0.5, 1.0])
    assert found == pytest.approx(np.sort(heaviest), rel=0.002)
