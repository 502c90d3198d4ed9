"""Drawn choices: the sampler against enumeration, and nothing lost on the way to the ranks."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.routing import rank_shares
from simulator.choicedraws import Chooser, choice_odds, draw_counts, split_and_touched, split_counts
from simulator.routingdraws import synthesize


@settings(max_examples=40)
@given(st.integers(2, 12), st.data())
def test_odds_give_the_wanted_inclusion(experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts - 1))
    seed = data.draw(st.integers(0, 1000))
    odds = np.random.default_rng(seed).lognormal(0, 1, experts)
    sets = np.array(list(combinations(range(experts), top_k)))

    def inclusion_of(odds: np.ndarray) -> np.ndarray:
        weights = odds[sets].prod(axis=1)
        return np.bincount(sets.ravel(), np.repeat(weights / weights.sum(), top_k), experts)

    inclusion = inclusion_of(odds)
    found = choice_odds(inclusion[None])[0]
    assert found / found.sum() == pytest.approx(odds / odds.sum(), rel=1e-3)
    assert inclusion_of(found) == pytest.approx(inclusion, rel=1e-5)


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


def test_touched_experts_are_those_with_tokens() -> None:
    """Without copies the experts counted on a rank; a copy is touched by a part of its expert's tokens only."""
    rng = np.random.default_rng(3)
    counts = draw_counts(rng, Chooser.of(np.full(12, 0.25)), 3, 500)
    alone = rank_shares(np.ones(12), [[e % 4] for e in range(12)], 4)
    rows, touched = split_and_touched(rng, counts, alone)
    assert touched.tolist() == ((counts > 0) @ (alone.T > 0).astype(int)).tolist()
    copied = rank_shares(np.ones(12), [[e % 4, (e + 1) % 4] for e in range(12)], 4)
    rows, touched = split_and_touched(rng, counts, copied)
    assert (touched <= rows).all() and ((touched > 0) == (rows > 0)).all()
    most = (counts > 0) @ (copied.T > 0).astype(int)
    assert (touched <= most).all() and touched.sum() < most.sum()
    assert touched.sum() > (counts > 0).sum()
