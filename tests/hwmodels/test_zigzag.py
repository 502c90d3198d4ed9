"""Laws of cutting a causal chunk over ranks: nothing lost, nothing twice, zig-zag even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import MappingError
from hwmodels.operators import attended_pairs
from hwmodels.zigzag import block_pairs, imbalance, owned, pairs_before, rank_pairs, step_pairs

LAYOUTS = st.sampled_from(["contiguous", "zigzag"])
WINDOWS = st.one_of(st.none(), st.integers(1, 5000))


@given(st.integers(1, 40), st.integers(0, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_pairs_are_those_of_a_mask_counted_one_by_one(queries: int, keys: int, window: int | None) -> None:
    q, k = np.mgrid[:queries, :keys]
    mask = (k <= q) & (k > q - (window or queries + 1))
    assert float(pairs_before(queries, keys, window)) == mask.sum()


@given(st.integers(1, 4096), st.integers(0, 100_000), st.integers(1, 33), LAYOUTS, WINDOWS)
def test_pairs_over_ranks_and_over_blocks_add_up_to_the_whole(
    new: int, before: int, cp: int, layout: str, window: int | None
) -> None:
    whole = float(attended_pairs(np.array(float(new)), np.array(float(before)), window))
    ranks, blocks = rank_pairs(new, before, cp, layout, window), block_pairs(new, before, cp, layout, window)
    assert ranks.sum() == pytest.approx(whole, rel=1e-9)
    np.testing.assert_allclose(blocks.sum(axis=-1), ranks, rtol=1e-7, atol=1e-6 * whole)
    assert blocks.min() >= -1.0 - 1e-6 * whole  # pieces of less than a token


@given(st.integers(1, 64), st.integers(1, 100), st.integers(0, 100_000))
def test_zigzag_is_exactly_even_whatever_is_cached(cp: int, piece: int, before: int) -> None:
    pairs = rank_pairs(2 * cp * piece, before, cp, "zigzag")
    assert (pairs == pairs[0]).all()


@given(st.integers(2, 64), st.integers(1, 100))
def test_zigzag_blocks_of_every_ring_step_are_even(cp: int, piece: int) -> None:
    blocks = block_pairs(2 * cp * piece, 0, cp, "zigzag")
    others = blocks[~np.eye(cp, dtype=bool)]
    np.testing.assert_allclose(others, 2.0 * piece**2)
    np.testing.assert_allclose(np.diag(blocks), 2.0 * piece**2 + piece)


@given(st.integers(1, 5000), st.integers(0, 50_000), st.integers(1, 12), LAYOUTS, st.sampled_from(["keys", "queries"]))
def test_steps_of_a_ring_are_the_busiest_of_their_blocks(
    new: int, before: int, cp: int, layout: str, passed: str
) -> None:
    blocks = block_pairs(new, before, cp, layout)
    steps = [
        max(blocks[i, (i - step) % cp] if passed == "keys" else blocks[(i - step) % cp, i] for i in range(cp))
        for step in range(cp)
    ]
    scale = 1e-7 * blocks.sum()
    np.testing.assert_allclose(step_pairs(new, before, cp, layout, None, passed), steps, rtol=1e-7, atol=scale)
    wide = step_pairs([[new, new]], before, cp, layout, 10**6, passed)
    np.testing.assert_allclose(wide, [[steps, steps]], rtol=1e-7, atol=scale)


@given(st.integers(2, 64), st.integers(1, 100))
def test_contiguous_imbalance_has_its_closed_form_and_fades_behind_a_cache(cp: int, piece: int) -> None:
    """Busiest: b + n (cp - 1)/cp + (n/cp + 1)/2 keys per query; mean: b + (n + 1)/2."""
    new = cp * piece
    before = np.array([0.0, new, 10.0 * new, 1000.0 * new])
    expected = (before + new - piece + (piece + 1) / 2) / (before + (new + 1) / 2)
    found = imbalance(new, before, cp, "contiguous")
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert (np.diff(found) < 0).all() and found[0] <= (2 * cp - 1) / cp + 1e-9


def test_a_window_makes_contiguous_pieces_nearly_even() -> None:
    """All but the first piece see whole windows: busiest over mean is 1 / (1 - (w - 1) / 2n), zig-zag no less."""
    contiguous, zigzag = (float(imbalance(65536, 0, 8, layout, 1024)) for layout in ("contiguous", "zigzag"))
    assert contiguous == pytest.approx(1 / (1 - 1023 / 2 / 65536), rel=1e-12)
    assert zigzag == pytest.approx(contiguous, rel=1e-12)


@given(st.integers(1, 64), LAYOUTS)
def test_every_piece_has_one_owner(cp: int, layout: str) -> None:
    index = owned(cp, layout)
    assert sorted(index.ravel().tolist()) == list(range(index.size)) and len(index) == cp


@pytest.mark.parametrize(("cp", "layout"), [(0, "zigzag"), (4, "striped")])
def test_what_cannot_be_cut_says_so(cp: int, layout: str) -> None:
    with pytest.raises(MappingError, match="expected"):
        owned(cp, layout)  # type: ignore[arg-type]
