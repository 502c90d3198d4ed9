"""Two streams, two halves: what is hidden follows from the schedule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.overlap import Block, Overlap, halves_of, overlapped_s, two_streams_s
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import compile_step_model, kept, linear_operators

ENGINE = Engine("test", "made up", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
CLUSTER = load_cluster("hgx-h100", 8)
TOKENS = np.array([64.0, 512.0, 1024.0, 4096.0, 8192.0])

seconds = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=8)


def blocks(times: list[tuple[float, float]]) -> list[Block]:
    return [Block(np.array(compute), np.array(exchange)) for compute, exchange in times]


def step(
    name: str, mapping: Mapping, overlap: Overlap, *, forced: bool = False, tokens: np.ndarray = TOKENS, cluster=CLUSTER
):
    model, cost = load_model(name), AnalyticCost(cluster, mapping)
    return overlapped_s(
        model, model.layers, tokens, mapping, Precision(), lambda op: cost.time_s(op) * kept(op, cost, ENGINE),
        units=cluster.device.compute_units, overlap=overlap, forced=forced,
    )  # fmt: skip


@given(seconds, seconds)
def test_neither_stream_is_beaten_nor_are_both_taken_in_a_row(front, back) -> None:
    size = min(len(front), len(back))
    front, back = front[:size], back[:size]
    took = float(two_streams_s(blocks(front), blocks(back)))
    compute, exchange = (sum(block[i] for block in front + back) for i in (0, 1))
    assert max(compute, exchange) - 1e-9 <= took <= compute + exchange + 1e-9
    for half in (front, back):
        assert took >= sum(sum(block) for block in half) - 1e-9


@given(seconds, st.integers(0, 7), st.floats(0, 5))
def test_a_longer_kernel_or_collective_never_ends_sooner(times, place, more) -> None:
    before = float(two_streams_s(blocks(times), blocks(times)))
    compute, exchange = times[place % len(times)]
    for slower in ((compute + more, exchange), (compute, exchange + more)):
        longer = [slower if i == place % len(times) else pair for i, pair in enumerate(times)]
        assert float(two_streams_s(blocks(longer), blocks(times))) >= before - 1e-9


@given(st.integers(1, 40_000))
def test_halves_hold_all_tokens(tokens: int) -> None:
    for front, back in halves_of(np.array([float(tokens)])):
        assert front[0] >= 0 and back[0] >= 0 and front[0] + back[0] == tokens


@pytest.mark.parametrize(
    ("name", "mapping"), [("llama-3.1-8b", Mapping(tp=4)), ("mixtral-8x7b", Mapping(tp=8, expert_tp=8))]
)
def test_without_overlap_it_is_the_sum_of_the_operators(name: str, mapping: Mapping) -> None:
    model, cost = load_model(name), AnalyticCost(CLUSTER, mapping)
    found = linear_operators(model, model.layers, TOKENS, mapping, Precision(), first=False)
    together = sum(cost.time_s(op) * kept(op, cost, ENGINE) for op in found)
    assert step(name, mapping, "none") == pytest.approx(together)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b"])
def test_overlap_never_costs_where_it_is_chosen(name: str) -> None:
    mapping = Mapping(tp=8, expert_tp=8) if name == "mixtral-8x7b" else Mapping(tp=8)
    none, fused, two = (step(name, mapping, overlap) for overlap in ("none", "fused-norm", "two-way"))  # type: ignore[arg-type]
    assert (fused <= none).all() and (two <= fused + 1e-12).all()
    assert (step(name, mapping, "two-way", forced=True) >= two - 1e-12).all()


def test_one_rank_has_nothing_to_hide() -> None:
    assert step("llama-3.1-8b", Mapping(), "two-way") == pytest.approx(step("llama-3.1-8b", Mapping(), "none"))


def test_two_batches_hide_the_expert_exchange_of_attention_groups() -> None:
    """Over several nodes, where it takes long; few tokens of a rank would only have its experts read twice."""
    mapping, tokens = Mapping(attention_dp=32, ep=32), np.array([64.0, 4096.0])
    none, two = (
        step("deepseek-v2-lite", mapping, o, tokens=tokens, cluster=load_cluster("hgx-h100", 32))  # type: ignore[arg-type]
        for o in ("none", "two-way")
    )
    assert two[1] < 0.9 * none[1]
    assert two[0] == none[0]


@pytest.mark.parametrize(
    ("name", "mapping"), [("llama-3.3-70b", Mapping(tp=8)), ("deepseek-v2-lite", Mapping(attention_dp=8, ep=8))]
)
def test_step_models_hide_what_the_schedule_of_two_streams_hides(name: str, mapping: Mapping) -> None:
    cost, model = AnalyticCost(CLUSTER, mapping), load_model(name)
    limits = {"max_tokens": 4096, "max_seqs": 16, "units": CLUSTER.device.compute_units}
    none, two = (
        compile_step_model(model, mapping, Precision(), ENGINE, cost, overlap=overlap, **limits)  # type: ignore[arg-type]
        for overlap in ("none", "two-way")
    )
    batch = (0, 0, [(4096, 0)])
    saved = none.lockstep_s([batch] * mapping.attention_dp) - two.lockstep_s([batch] * mapping.attention_dp)
    tokens = np.array([4096.0])
    expected = step(name, mapping, "none", tokens=tokens) - step(name, mapping, "two-way", tokens=tokens)
    assert saved == pytest.approx(float(expected[0]), rel=0.02, abs=1e-9)
    few = (2, 2000, [])
    assert two.lockstep_s([few] * mapping.attention_dp) <= none.lockstep_s([few] * mapping.attention_dp) + 1e-12
