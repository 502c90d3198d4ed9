"""Sequence parallelism of linear attention: volumes that know no length, and All-Scan's closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.contextlinks import context_groups, step_s
from hwmodels.errors import MappingError
from hwmodels.hardware import load_cluster
from hwmodels.linearattention import LinearAttention, all_scan_s, linear_cost

NODE, NODES = load_cluster("h100-sxm", 8), load_cluster("h100-sxm", 64)
LINEAR = LinearAttention(heads=32, key_dim=128, value_dim=128)
STATE = 32 * 128 * 128 * 4.0


@given(st.integers(1, 64), st.sampled_from(["lasp-2", "zeco"]), st.integers(1, 64))
def test_volumes_are_states_whatever_the_length(cp: int, kind: str, sequences: int) -> None:
    """Nothing in the price knows how long a sequence is; only its own attention does."""
    seconds = np.array([1e-5, 1e-2, 10.0])
    found = linear_cost(NODES, context_groups(cp), kind, LINEAR, 1, sequences, seconds)  # type: ignore[arg-type]
    states = {"lasp-2": cp - 1, "zeco": min(cp - 1, 1)}[kind]
    np.testing.assert_allclose(found.sent_bytes, states * sequences * STATE)
    assert (found.communication_s == found.communication_s[0]).all()
    np.testing.assert_allclose(found.exposed_s, np.maximum(found.communication_s - seconds, 0.0), atol=1e-12)


@given(st.integers(2, 8), st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]), st.floats(1e3, 1e9))
def test_all_scan_is_cp_plus_blocks_less_two_messages(cp: int, blocks: int, nbytes: float) -> None:
    assert NODE.intra is not None
    tau = step_s(NODE, False) + nbytes / blocks / (NODE.intra.bytes_per_s * NODE.intra.efficiency)
    found = float(all_scan_s(NODE, context_groups(cp), nbytes, blocks))
    assert found == pytest.approx((cp + blocks - 2) * tau)


@settings(max_examples=30)
@given(st.integers(2, 64), st.integers(1, 32))
def test_the_chosen_blocks_are_the_fastest(cp: int, sequences: int) -> None:
    groups = context_groups(cp)
    best = float(linear_cost(NODES, groups, "zeco", LINEAR, 1, sequences, 0.0).communication_s)
    for blocks in (1, 4, 16, 64):
        given_ = linear_cost(NODES, groups, "zeco", LINEAR, 1, sequences, 0.0, blocks=blocks)
        assert best <= float(given_.communication_s) * (1 + 1e-12)


def test_all_scan_overtakes_the_all_gather_as_ranks_grow() -> None:
    """Measured by both papers: the gathered volume grows with the ranks, the scanned one does not."""
    ratio = []
    for cp in (8, 16, 32, 64):
        both = [linear_cost(NODES, context_groups(cp), kind, LINEAR, 1, 8, 0.0) for kind in ("lasp-2", "zeco")]  # type: ignore[arg-type]
        ratio.append(float(both[0].communication_s / both[1].communication_s))
    assert ratio[-1] > 2.0 and ratio[-1] == max(ratio)


@pytest.mark.parametrize(
    ("kind", "tp", "blocks", "words"),
    [("ring", 1, None, "lasp-2 or zeco"), ("zeco", 5, None, "divisor of 32"), ("zeco", 1, 3, "divisor of the 128")],
)
def test_what_cannot_be_says_so(kind: str, tp: int, blocks: int | None, words: str) -> None:
    with pytest.raises(MappingError, match=words):
        linear_cost(NODE, context_groups(2), kind, LINEAR, tp, 1, 0.0, blocks=blocks)  # type: ignore[arg-type]
