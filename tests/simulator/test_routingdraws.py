"""Drawn routing: marginals of made-up statistics, the sampler against enumeration, expected maxima against sampling."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from hwmodels.busiest import LEVELS, busiest_rank, expected_max, most_touched, rank_moments
from hwmodels.routing import RoutingError, RoutingStats, rank_shares
from simulator.routingdraws import (
    Chooser,
    choice_odds,
    draw_counts,
    fit_skew,
    lognormal,
    matched_skew,
    power_law,
    split_counts,
    synthesize,
    with_transitions,
)


def blocks(experts: int, ranks: int) -> np.ndarray:
    """Experts on ranks in their order, equally many each."""
    return rank_shares(np.ones(experts), [[e * ranks // experts] for e in range(experts)], ranks)


# Made-up statistics


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


# Steps


@settings(max_examples=40)
@given(st.integers(2, 30), st.data())
def test_odds_give_the_wanted_inclusion(experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts - 1))
    seed = data.draw(st.integers(0, 1000))
    odds = np.random.default_rng(seed).lognormal(0, 1, experts)
    sets = list(combinations(range(experts), top_k))
    if len(sets) > 5000:
        return
    weights = np.array([np.prod(odds[list(chosen)]) for chosen in sets])
    inclusion = np.zeros(experts)
    for chosen, weight in zip(sets, weights / weights.sum(), strict=True):
        inclusion[list(chosen)] += weight
    found = choice_odds(inclusion[None])[0]
    assert found / found.sum() == pytest.approx(odds / odds.sum(), rel=1e-3)
    weights = np.array([np.prod(found[list(chosen)]) for chosen in sets])
    had = np.zeros(experts)
    for chosen, weight in zip(sets, weights / weights.sum(), strict=True):
        had[list(chosen)] += weight
    assert had == pytest.approx(inclusion, rel=1e-5)


def test_drawn_pairs_against_enumeration() -> None:
    """Every set of two of four experts comes as often as its product of odds says (chi-square over 6 sets)."""
    odds = np.array([0.2, 0.5, 1.0, 2.0])
    sets = list(combinations(range(4), 2))
    chance = np.array([odds[a] * odds[b] for a, b in sets])
    chance /= chance.sum()
    inclusion = np.array([sum(p for p, chosen in zip(chance, sets, strict=True) if e in chosen) for e in range(4)])
    drawn = draw_counts(np.random.default_rng(0), Chooser.of(inclusion), 1, 60_000)
    assert set(drawn.sum(axis=1)) == {2} and drawn.max() == 1
    seen = np.array([(drawn[:, a] & drawn[:, b]).sum() for a, b in sets])
    assert ((seen - 60_000 * chance) ** 2 / (60_000 * chance)).sum() < 20.5  # 0.1 % of chi-square with 5 degrees


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 3000), st.integers(1, 8), st.integers(0, 1000))
def test_choices_are_conserved(experts: int, tokens: int, top_k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    top_k = min(top_k, experts)
    made = synthesize(rng, 1, experts, top_k, 1.0, 1, 0.0)
    counts = draw_counts(rng, Chooser.of(made.inclusion[0]), tokens, 5)
    assert (counts.sum(axis=1) == tokens * top_k).all()
    assert counts.min() >= 0 and counts.max() <= tokens
    placement = [[int(r) for r in rng.integers(0, 4, rng.integers(1, 4))] for _ in range(experts)]
    ranks = split_counts(rng, counts, rank_shares(made.shares[0], placement, 4))
    assert (ranks.sum(axis=1) == tokens * top_k).all() and ranks.min() >= 0


def test_steps_may_have_token_counts_of_their_own() -> None:
    tokens = np.array([0, 1, 7, 5000])
    counts = draw_counts(np.random.default_rng(0), Chooser.of(np.full(8, 0.25)), tokens, 4)
    assert counts.sum(axis=1).tolist() == (2 * tokens).tolist()


# The busiest rank


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
