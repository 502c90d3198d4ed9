"""The linear iteration model prices steps by its formula, fits step models as well as it says, and stays below."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.catalogue import open_catalogue
from planner.errors import PlanError
from planner.plan import Pool
from planner.prefill import clock_of
from planner.prefillcosts import LinearStep, Piece, Span
from planner.prefilllinear import Ranges, TableClock, fit, linearise, looks, minorant, predicted

ONE = LinearStep((Piece(0.01, 2e-5, 1e-4, 0.004),), 1e-9, 1e-8, 0.001, 0.002, 8)
TWO = LinearStep((Piece(0.02, 0.0, 1e-5, 0.008), Piece(0.0, 4e-5, 4e-5)), 1e-9, 1e-8, 0.001, 0.002, 8)


@pytest.fixture(scope="module")
def clocks() -> dict[str, TableClock]:
    """Step models of a dense model and of a mixture of experts on one device."""
    found = {}
    for model in ("qwen3-8b", "qwen3-30b-a3b"):
        catalogue = open_catalogue(model, "h100-sxm", 8, "vllm")
        found[model] = clock_of(catalogue, Pool(1), 8192 + 256)[0]
    return found


def test_a_step_of_one_piece_is_the_formula() -> None:
    """host + prompt + base + token n + decode D + reload + attention n (before + n/2) + context K."""
    expected = 0.001 + 0.002 + 0.01 + 2e-5 * 300 + 1e-4 * 5 + 0.004 + 1e-9 * 300 * (700 + 150) + 1e-8 * 4000
    assert ONE.step_s(5, 4000, [Span(300, 700, 0, 8)]) == pytest.approx(expected)
    assert ONE.step_s(5, 4000, ()) == pytest.approx(0.001 + 0.01 + 1e-4 * 5 + 1e-8 * 4000)


def test_a_group_of_layers_costs_its_share() -> None:
    """Two of eight layers see 1000 tokens, bound by arithmetic; the others wait for their weights."""
    alone = 0.001 + 0.002 + 0.25 * 4e-5 * 1000 + 0.25 * 1e-9 * 1000 * 500
    assert TWO.step_s(0, 0, [Span(1000, 0, 2, 4)]) == pytest.approx(alone)
    beside = alone + 0.25 * 4e-5 + 0.75 * (0.02 + 1e-5) + 1e-8 * 700
    assert TWO.step_s(1, 700, [Span(1000, 0, 2, 4)]) == pytest.approx(beside)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=6), st.sampled_from([ONE, TWO]))
def test_cutting_a_prompt_never_costs_less_and_its_attention_is_the_same(chunks: list[int], step: LinearStep) -> None:
    """The sum over the chunks is at least the whole; without what is paid once a step, it is exactly the whole."""
    total = sum(chunks)
    spans = [Span(n, sum(chunks[:i]), 0, step.layers) for i, n in enumerate(chunks)]
    cut = sum(step.step_s(0, 0, [span]) for span in spans)
    assert cut >= step.alone_s(total) * (1 - 1e-12)
    bare = LinearStep((Piece(0.0, 1e-5),), step.attention_s, layers=step.layers)
    assert sum(bare.step_s(0, 0, [span]) for span in spans) == pytest.approx(bare.alone_s(total))


@given(st.integers(1, 8), st.integers(1, 5000), st.sampled_from([ONE, TWO]))
def test_layer_groups_pay_reload_once_and_the_other_layers_base_again(groups: int, n: int, step: LinearStep) -> None:
    """G groups of equal layers: (G - 1) decode steps' blocks more than the whole prompt in one step."""
    ends = [round(step.layers * g / groups) for g in range(groups + 1)]
    spans = [Span(n, 0, a, b) for a, b in pairwise(ends)]
    cut = sum(step.step_s(3, 0, [span]) for span in spans)
    once = step.step_s(3, 0, [Span(n, 0, 0, step.layers)])
    again = step.host_s + step.prompt_s + step.blocks_s(0, 3)
    assert cut == pytest.approx(once + (groups - 1) * again)


@pytest.mark.parametrize("step", [ONE, TWO])
def test_the_fit_finds_a_linear_model_again(step: LinearStep) -> None:
    """Look-ups of a model with as many pieces are fitted without error."""
    rng = np.random.default_rng(0)
    points = [tuple(map(int, row)) for row in rng.integers((0, 0, 0, 1), (3000, 4000, 60, 4000), (300, 4))]
    points += [(0, 0, d, 1000) for d in range(1, 60, 7)]
    found = fit(
        points,
        [predicted(step, p) for p in points],
        len(step.pieces),
        host_s=step.host_s,
        prompt_s=step.prompt_s,
        layers=8,
    )
    for point in points:
        assert predicted(found, point) == pytest.approx(predicted(step, point), rel=2e-3)


@pytest.mark.parametrize(("model", "most"), [("qwen3-8b", 0.10), ("qwen3-30b-a3b", 0.60)])
def test_the_error_is_stated_and_is_that_of_other_points(
    clocks: dict[str, TableClock], model: str, most: float
) -> None:
    """The stated errors are those at points that were not fitted; experts of few tokens are what is hard to fit."""
    clock = clocks[model]
    found = linearise(clock, Ranges())
    others = looks(clock, Ranges(), 0.5)
    assert not set(others) >= set(looks(clock, Ranges(), 0.0))
    true = [clock.step_s(d, d * c, [Span(n, b, 0, clock.layers)] if n else []) for n, b, d, c in others]
    error = [abs(predicted(found.step, x) / t - 1) for x, t in zip(others, true, strict=True)]
    assert found.max_error == pytest.approx(max(error))
    assert found.median_error == pytest.approx(float(np.median(error)))
    assert found.median_error < 0.02
    assert found.max_error < most
    assert "median" in str(found)


def test_experts_show_as_reload_and_dense_weights_do_not(clocks: dict[str, TableClock]) -> None:
    """Prompt tokens of a mixture read experts that few decodes do not; those of a dense model read nothing more."""
    reload = {}
    for model, clock in clocks.items():
        step = linearise(clock, Ranges(decodes=(4, 16)), 1).step
        reload[model] = step.pieces[0].reload_s / step.blocks_s(0, 8)
    assert reload["qwen3-30b-a3b"] > 5 * reload["qwen3-8b"]
    assert reload["qwen3-30b-a3b"] > 0.5


@pytest.mark.parametrize("model", ["qwen3-8b", "qwen3-30b-a3b"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_minorant_is_below_every_step(clocks: dict[str, TableClock], model: str, data: st.DataObject) -> None:
    """Of any decodes, contexts, chunks and layer groups within the tables."""
    clock = clocks[model]
    below = minorant(clock.model, clock.layers)
    decodes = data.draw(st.integers(0, 256))
    context = decodes * data.draw(st.integers(1, 40_000))
    spans = []
    for _ in range(data.draw(st.integers(0 if decodes else 1, 3))):
        first = data.draw(st.integers(0, clock.layers - 1))
        whole = data.draw(st.booleans())
        end = clock.layers if whole else data.draw(st.integers(first + 1, clock.layers))
        tokens = data.draw(st.one_of(st.integers(1, 64), st.integers(1, 2700)))
        spans.append(Span(tokens, data.draw(st.integers(0, 30_000)), 0 if whole else first, end))
    assert below.step_s(decodes, context, spans) <= clock.step_s(decodes, context, spans) * (1 + 1e-9)


def test_a_minorant_is_not_far_below_large_steps(clocks: dict[str, TableClock]) -> None:
    """A bound that is trivially low proves nothing: 4096 tokens come within 15 % of the truth."""
    for clock in clocks.values():
        span = [Span(4096, 0, 0, clock.layers)]
        assert minorant(clock.model, clock.layers).step_s(0, 0, span) > 0.85 * clock.step_s(0, 0, span)


def test_what_cannot_be_linearised_is_named(clocks: dict[str, TableClock]) -> None:
    """Ranges beyond the tables, empty ranges, no pieces, negative times."""
    clock = clocks["qwen3-8b"]
    with pytest.raises(PlanError, match="tables for"):
        linearise(clock, Ranges(tokens=(1, 100_000)))
    with pytest.raises(PlanError, match="ascending"):
        Ranges(tokens=(10, 5))
    with pytest.raises(PlanError, match="0 pieces"):
        linearise(clock, Ranges(), 0)
    with pytest.raises(PlanError, match="at least 0"):
        LinearStep((Piece(-1.0),))
    with pytest.raises(PlanError, match="take time"):
        LinearStep((Piece(0.0),))
    with pytest.raises(PlanError, match="expected at most"):
        clock.step_s(0, 0, [Span(clock.model.max_tokens + 1, 0, 0, clock.layers)])
    with pytest.raises(PlanError, match="one stage"):
        two = dataclasses.replace(clock)
        model = two.model
        minorant(type(model)([*model.stages, *model.stages], model.transfer, model.engine, 64, 64), clock.layers)
