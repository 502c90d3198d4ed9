"""SCBench's two ways to share a context (arXiv:2412.10319) and APE's independent encoding (arXiv:2502.05431).

What the papers state about cost is a mechanism, not a figure: KV dropped for one question has to be made again for the
next, a cache of every token has not, contexts that do not see each other cost the sum of squares.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import ProfileError
from hwmodels.huggingface import load_model
from hwmodels.kvmodifiers import (
    FULL,
    KVMethod,
    Turn,
    double_sparsity,
    duo_attention,
    independent_pairs,
    lserve,
    session,
    snapkv,
)

CONTEXT = 100_000
TURNS = [Turn(100, 50)] * 5
SPARSE_ENCODING = KVMethod(prefill_share=0.1)  # MInference and its like: O(n) memory, fewer pairs
REUSABLE = {
    "full": FULL,
    "sparse encoding": SPARSE_ENCODING,
    "head split": duo_attention(0.5),
    "retrieval": lserve(),
    "labels": double_sparsity(),
}


@pytest.mark.parametrize("method", REUSABLE.values(), ids=REUSABLE)
def test_kv_of_every_token_is_computed_once(method: KVMethod) -> None:
    """After the first turn only the question is prefilled; in a session the answers before it are cached as well."""
    talk = session(method, CONTEXT, TURNS, "multi-turn")
    assert [cost.prefill_tokens for cost in talk] == [CONTEXT + 100, 100, 100, 100, 100]
    assert [cost.reused_tokens for cost in talk] == [0, *(CONTEXT + 150 * turn for turn in range(1, 5))]
    shared = session(method, CONTEXT, TURNS, "multi-request")
    assert [cost.prefill_tokens for cost in shared] == [CONTEXT + 100, 100, 100, 100, 100]
    assert {cost.reused_tokens for cost in shared[1:]} == {CONTEXT}


def test_kv_dropped_for_one_question_is_computed_again_for_the_next() -> None:
    talk = session(snapkv(1024), CONTEXT, TURNS, "multi-turn")
    assert [cost.prefill_tokens for cost in talk] == [CONTEXT + 100 + 150 * turn for turn in range(5)]
    shared = session(snapkv(1024), CONTEXT, TURNS, "multi-request")
    assert {cost.prefill_tokens for cost in shared} == {CONTEXT + 100}
    assert {cost.reused_tokens for cost in shared} == {0}


def test_dropping_wins_the_first_question_and_loses_the_session() -> None:
    """It decodes with 1 % of the reads, but five turns take five prefills: 4.98 times the pairs of full attention."""
    dropping, full = (session(method, CONTEXT, TURNS, "multi-request") for method in (snapkv(1024), FULL))
    assert dropping[0].prefill_pairs == full[0].prefill_pairs
    assert dropping[0].retrieved < 0.011 * full[0].retrieved
    assert dropping[-1].stored < 0.011 * full[-1].stored
    pairs = sum(cost.prefill_pairs for cost in dropping) / sum(cost.prefill_pairs for cost in full)
    assert pairs == pytest.approx(5 * 100_100**2 / (100_100**2 + 4 * 2 * 100 * 100_050), rel=1e-3)
    tokens = sum(cost.prefill_tokens for cost in dropping) / sum(cost.prefill_tokens for cost in full)
    assert tokens > 4.9


def test_sparse_encoding_saves_pairs_and_keeps_what_is_stored() -> None:
    sparse, full = (session(method, CONTEXT, TURNS, "multi-turn") for method in (SPARSE_ENCODING, FULL))
    assert sparse[0].prefill_pairs == pytest.approx(0.1 * full[0].prefill_pairs)
    assert [cost.stored for cost in sparse] == [cost.stored for cost in full]


def test_what_lies_in_a_lower_tier_is_loaded_before_each_later_turn() -> None:
    talk = session(FULL, CONTEXT, TURNS, "multi-turn", offloaded=True)
    assert [cost.loaded for cost in talk] == [cost.reused_tokens for cost in talk]
    assert session(snapkv(1024), CONTEXT, TURNS, "multi-turn", offloaded=True)[1].loaded == 0
    nbytes = talk[1].loaded * load_model("llama-3.1-8b").kv_bytes_per_token("bf16")
    assert nbytes == pytest.approx(100_150 * 131_072)


@given(
    st.sampled_from([*REUSABLE.values(), snapkv(64)]),
    st.integers(1, 5000),
    st.lists(st.builds(Turn, st.integers(1, 500), st.integers(0, 300)), min_size=1, max_size=5),
    st.sampled_from(["multi-turn", "multi-request"]),
)
def test_every_prompt_is_computed_or_reused(method: KVMethod, context: int, turns: list[Turn], mode) -> None:
    costs = session(method, context, turns, mode)
    history = context
    for cost, turn in zip(costs, turns, strict=True):
        assert cost.prefill_tokens + cost.reused_tokens == history + turn.query_tokens
        assert cost.prefill_tokens >= turn.query_tokens
        end = history + turn.query_tokens + turn.answer_tokens
        by_step = sum(float(method.read(history + turn.query_tokens + step)) for step in range(turn.answer_tokens))
        assert cost.retrieved == pytest.approx(by_step)
        history = end if mode == "multi-turn" else context


# APE.


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=10), st.integers(0, 500))
def test_contexts_apart_never_cost_more_than_joined(contexts: list[int], prefix: int) -> None:
    apart = independent_pairs(contexts, shared_prefix=prefix)
    assert apart <= float(FULL.pairs(prefix + sum(contexts))) * (1 + 1e-12)
    cached = independent_pairs(contexts, shared_prefix=prefix, cached=[True] * len(contexts))
    assert cached == 0
    if len(contexts) == 1:
        assert apart == pytest.approx(float(FULL.pairs(prefix + contexts[0])))


def test_ten_equal_contexts_cost_a_tenth() -> None:
    """Sum of L^2 over (sum of L)^2 is 1/n for n equal contexts."""
    joined = float(FULL.pairs(10 * 10_000))
    assert independent_pairs([10_000] * 10) / joined == pytest.approx(1 / 10, rel=1e-3)
    assert independent_pairs([10_000] * 10, cached=[True] * 9 + [False]) / joined == pytest.approx(1 / 100, rel=1e-2)


def test_flags_are_one_per_context() -> None:
    with pytest.raises(ProfileError, match="2 flags for 1"):
        independent_pairs([10], cached=[True, False])
