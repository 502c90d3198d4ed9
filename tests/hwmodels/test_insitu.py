"""Interpolated operators: exact where they were measured, rising between, refused by name where they were not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import operators as ops
from hwmodels.errors import MeasurementError
from hwmodels.evidence import evidence
from hwmodels.huggingface import load_model
from hwmodels.insitu import (
    InSituCost,
    Sample,
    Surface,
    engine_of,
    fit_overheads,
    rising,
    rows_of,
    transfer_rows,
)
from hwmodels.mapping import Mapping, Precision
from hwmodels.shape import Attention, FeedForward, Layer, ModelShape
from hwmodels.step_model import compile_step_model

FP32 = Precision("fp32", "fp32", "fp32")
ATTENTION = Attention(heads=4, kv_heads=2, head_dim=8, value_dim=8)
WINDOWED = Attention(heads=4, kv_heads=2, head_dim=8, value_dim=8, window_tokens=16)
DENSE = FeedForward(intermediate=64)
SPARSE = FeedForward(intermediate=32, experts=4, top_k=2)


def model_of(*layers: tuple[Attention, FeedForward]) -> ModelShape:
    return ModelShape("made up", 32, 128, tuple(Layer(a, f, 64) for a, f in layers), False, 1024, 32)


def gemm(m: object, name: str = "product", n: int = 16, count: int = 1) -> ops.Gemm:
    return ops.Gemm(name, np.asarray(m, dtype=float), n, 8, FP32, count)


def rows(points: dict[float, float], name: str = "product", signature: str = "16x8") -> pd.DataFrame:
    return pd.DataFrame(
        {"operator": name, "signature": signature, "x": list(points), "y": 0.0, "seconds": list(points.values())}
    )


def surface_of(cells: dict[tuple[float, float], float]) -> Surface:
    x, y = zip(*cells, strict=True)
    return Surface.through(pd.DataFrame({"x": x, "y": y, "seconds": list(cells.values())}))


class TestOneSize:
    COST = InSituCost(rows({1.0: 2.0, 4.0: 5.0, 8.0: 7.0}))

    def test_exact_where_measured_and_times_the_launches(self):
        np.testing.assert_allclose(self.COST.time_s(gemm([1, 4, 8], count=3)), [6.0, 15.0, 21.0])

    def test_linear_between_and_beyond_and_constant_below(self):
        np.testing.assert_allclose(self.COST.time_s(gemm([0.5, 2, 6, 16, 100])), [2.0, 3.0, 6.0, 11.0, 53.0])

    def test_nothing_takes_nothing(self):
        np.testing.assert_array_equal(self.COST.time_s(gemm([0.0, 1.0])), [0.0, 2.0])

    def test_median_of_repeats(self):
        several = pd.concat([rows({1.0: 2.0, 4.0: 5.0}), rows({1.0: 2.0, 4.0: 500.0}), rows({1.0: 1.0, 4.0: 5.0})])
        np.testing.assert_allclose(InSituCost(several).time_s(gemm([1, 4])), [2.0, 5.0])

    def test_one_point_is_constant(self):
        np.testing.assert_allclose(InSituCost(rows({4.0: 5.0})).time_s(gemm([1, 4, 100])), [5.0, 5.0, 5.0])

    def test_falling_measurements_are_evened_out_and_not_extrapolated_below(self):
        cost = InSituCost(rows({1.0: 3.0, 2.0: 5.0, 4.0: 4.0}))
        np.testing.assert_allclose(cost.time_s(gemm([1, 2, 4, 1000])), [3.0, 4.5, 4.5, 4.5])

    def test_sources_tell_measured_sizes_from_larger_ones(self):
        assert self.COST.sources(gemm([1, 8, 16, 0])) == pytest.approx({"measured": 9.0, "extended": 11.0})


CELLS = {(x, y): 1.0 + 2 * x + 0.5 * x * y for x in (1.0, 4.0, 16.0) for y in (0.0, 8.0, 32.0)}


class TestTwoSizes:
    SURFACE = surface_of(CELLS)

    def test_exact_where_measured(self):
        x, y = np.array(list(CELLS)).T
        np.testing.assert_allclose(self.SURFACE.at(x, y), list(CELLS.values()))

    def test_bilinear_between_and_beyond(self):
        x, y = np.array([[2.0], [10.0], [40.0]]), np.array([[0.0, 3.0, 20.0, 100.0]])
        np.testing.assert_allclose(self.SURFACE.at(x, y), 1.0 + 2 * x + 0.5 * x * y)

    def test_broadcasts(self):
        x, y = np.array([1.0, 4.0, 7.0])[:, None], np.array([0.0, 8.0])[None, :]
        found = self.SURFACE.at(x, y)
        assert found.shape == (3, 2)
        for i, j in np.ndindex(3, 2):
            assert float(self.SURFACE.at(x[i, 0], y[0, j])) == pytest.approx(found[i, j])

    @pytest.mark.parametrize("absent", [[(16.0, 32.0)], [(16.0, 32.0), (16.0, 8.0)], [(4.0, 8.0)], [(4.0, 0.0)]])
    def test_cells_that_do_not_fit_are_filled_in_proportion(self, absent):
        ragged = surface_of({cell: value for cell, value in CELLS.items() if cell not in absent})
        x, y = np.array(absent).T
        np.testing.assert_allclose(ragged.at(x, y), [CELLS[cell] for cell in absent])

    def test_filled_cells_are_not_called_measured(self):
        ragged = surface_of({cell: value for cell, value in CELLS.items() if cell != (16.0, 32.0)})
        covered = ragged.covers(np.array([4.0, 16.0, 16.0, 5.0]), np.array([32.0, 8.0, 32.0, 32.0]))
        assert covered.tolist() == [True, True, False, False]


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.tuples(st.integers(1, 6), st.integers(0, 4)), st.floats(1e-6, 10.0), min_size=1, max_size=20),
    st.randoms(use_true_random=False),
)
def test_never_falls_and_is_never_negative(cells, random):
    surface = surface_of({(float(x), float(y)): value for (x, y), value in cells.items()})
    x = np.sort([random.uniform(0.5, 20) for _ in range(12)])
    y = np.sort([random.uniform(0, 20) for _ in range(9)])
    found = surface.at(x[:, None], y[None, :])
    slack = 1e-9 * np.abs(found).max()
    assert found.min() >= 0
    assert np.diff(found, axis=0).min() >= -slack
    assert np.diff(found, axis=1).min() >= -slack


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=15))
def test_rising_keeps_the_sum_and_pools_neighbours(values):
    found = rising(np.array(values))
    assert np.diff(found).min(initial=0.0) >= -1e-9
    assert found.sum() == pytest.approx(sum(values), abs=1e-9)
    # Optimal among rising sequences: no step of the result can be improved by moving the values at and after it.
    residual = np.cumsum(np.array(values) - found)
    assert residual.min() >= -1e-9


def test_an_operator_never_measured_is_refused_by_name():
    cost = InSituCost(rows({1.0: 1.0}))
    with pytest.raises(MeasurementError, match=r"output projection \(16x8\)"):
        cost.time_s(gemm([1.0], name="output projection"))
    with pytest.raises(MeasurementError, match=r"product \(17x8\)"):
        cost.sources(gemm([1.0], n=17))


def test_no_rows_are_refused():
    with pytest.raises(MeasurementError, match="0 rows"):
        InSituCost(rows({}))
    with pytest.raises(MeasurementError, match="without seconds"):
        InSituCost(rows({1.0: 1.0}).drop(columns="seconds"))


class TestRows:
    def test_a_lap_is_shared_by_launches_and_bytes(self):
        model = model_of((ATTENTION, DENSE), (ATTENTION, DENSE), (WINDOWED, DENSE))
        sample = Sample(2, 200, (), {"decode attention": 12.0, "qkv projection": 6.0})
        found = rows_of(model, Mapping(), FP32, 0, [sample]).set_index("operator")
        assert list(found.loc["qkv projection", "seconds"]) == pytest.approx([2.0, 2.0])  # 3 launches of one shape
        attention = found.loc["decode attention"].set_index("signature")
        full, windowed = attention.loc["4/2 heads of 8"], attention.loc["4/2 heads of 8, window 16"]
        assert 2 * full["seconds"] + windowed["seconds"] == pytest.approx(12.0)
        assert full["seconds"] > windowed["seconds"]
        assert (full["x"], full["y"]) == (2, 100)
        assert (windowed["x"], windowed["y"]) == (2, 16)

    def test_prompt_attention_of_several_chunks_is_left_out(self):
        model = model_of((ATTENTION, DENSE))
        one = Sample(0, 0, ((8, 4),), {"prefill attention": 1.0, "up projection": 1.0})
        two = Sample(0, 0, ((8, 4), (4, 0)), {"prefill attention": 5.0, "up projection": 2.0})
        found = rows_of(model, Mapping(), FP32, 0, [one, two])
        attention = found[found.operator == "prefill attention"]
        assert attention[["x", "y", "seconds"]].to_numpy().tolist() == [[8, 4, 1]]
        assert sorted(found[found.operator == "up projection"].x) == [8, 12]

    def test_only_the_ends_of_a_pipeline_embed_and_sample(self):
        model = model_of(*[(ATTENTION, DENSE)] * 2)
        sample = Sample(1, 10, (), {"embedding": 1.0, "up projection": 1.0, "sampling": 1.0})
        first, last = (set(rows_of(model, Mapping(pp=2), FP32, stage, [sample]).operator) for stage in (0, 1))
        assert first == {"embedding", "up projection"}
        assert last == {"up projection", "sampling"}

    def test_experts_by_their_tokens(self):
        model = model_of((ATTENTION, SPARSE), (ATTENTION, SPARSE))
        found = rows_of(model, Mapping(), FP32, 0, [Sample(3, 30, (), {"routed experts": 4.0, "top-k": 1.0})])
        row = found[found.operator == "routed experts"].iloc[0]
        assert (row.x, row.seconds) == (3, 2.0)


def test_transfers_are_priced_in_a_pipeline_and_missed_without():
    model = model_of(*[(ATTENTION, DENSE)] * 2)
    names = ["embedding", "attention norm", "qkv projection", "rotary embedding", "decode attention",
             "prefill attention", "output projection", "feed-forward norm", "up projection", "activation",
             "down projection", "final norm", "language-model head", "sampling"]  # fmt: skip
    samples = [
        Sample(n, 32 * n, items, dict.fromkeys(names, 1e-3 * (n + len(items))))
        for n, items in ((1, ()), (8, ()), (0, ((1, 0),)), (0, ((32, 0),)))
    ]
    mapping, engine = Mapping(pp=2), engine_of("here", (0.0, 0.0, 0.0))
    frames = [rows_of(model, mapping, FP32, stage, samples) for stage in range(2)]
    limits = {"max_tokens": 32, "max_seqs": 8}
    with pytest.raises(MeasurementError, match="stage transfer"):
        compile_step_model(model, mapping, FP32, engine, InSituCost(pd.concat(frames)), **limits)
    moved = transfer_rows(model, FP32, [1, 16, 32], [1e-3, 2e-3, 3e-3])
    steps = compile_step_model(model, mapping, FP32, engine, InSituCost(pd.concat([*frames, moved])), **limits)
    assert [steps.transfer[n] for n in (0, 1, 16, 24, 32)] == pytest.approx([0.0, 1e-3, 2e-3, 2.5e-3, 3e-3])
    assert set(evidence(model, mapping, FP32, engine, InSituCost(pd.concat(frames)))) <= {"measured", "extended"}


class TestOverheads:
    PLANTED = (2e-3, 3e-5, 7e-4)

    def steps(self, rng: np.random.Generator, count: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, has = rng.integers(1, 64, count), rng.random(count) < 0.4
        step_s, sequence_s, prompt_s = self.PLANTED
        return n, has, step_s + sequence_s * n + prompt_s * has

    def test_exact_without_noise(self):
        assert fit_overheads(*self.steps(np.random.default_rng(0))) == pytest.approx(self.PLANTED, rel=1e-6)

    def test_planted_coefficients_are_found_among_outliers(self):
        rng = np.random.default_rng(1)
        n, has, seconds = self.steps(rng)
        seconds = seconds * rng.lognormal(0.0, 0.02, len(seconds))
        hit = rng.random(len(seconds)) < 0.1
        seconds[hit] *= rng.uniform(5, 100, hit.sum())
        assert fit_overheads(n, has, seconds) == pytest.approx(self.PLANTED, rel=0.05)

    def test_none_is_negative(self):
        n = np.arange(1.0, 50.0)
        found = fit_overheads(n, n > 20, 1e-3 - 1e-5 * n - 1e-4 * (n > 20))
        assert min(found) >= 0
        assert found[0] == pytest.approx(6.5e-4, rel=0.3)

    def test_no_prompts_leave_their_share_at_zero(self):
        n = np.arange(1.0, 50.0)
        assert fit_overheads(n, np.zeros(49), 1e-3 + 1e-5 * n) == pytest.approx((1e-3, 1e-5, 0.0))

    def test_no_steps_are_refused(self):
        with pytest.raises(MeasurementError, match="0 steps"):
            fit_overheads([], [], [])

    def test_an_engine_that_hides_nothing(self):
        engine = engine_of("here", self.PLANTED, memory_fraction=0.5, reserve_bytes=1e9)
        assert (engine.step_overhead_s, engine.sequence_overhead_s, engine.prompt_overhead_s) == self.PLANTED
        assert (engine.unfused, engine.request_overhead_s, engine.memory_fraction) == (1.0, 0.0, 0.5)


def test_large_arguments_give_the_same_as_single_ones():
    surface = surface_of(CELLS)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 40, 100_000), rng.uniform(0, 80, 100_000)
    found = surface.at(x, y)
    some = rng.integers(0, len(x), 50)
    np.testing.assert_allclose(found[some], [float(surface.at(x[i], y[i])) for i in some])


def test_a_real_model_names_its_measured_shapes():
    model = load_model("tiny-llama-256m")
    found = rows_of(model, Mapping(tp=2), FP32, 0, [Sample(4, 64, (), {"attention all-reduce": 8.0})])
    row = found[found.operator == "attention all-reduce"].iloc[0]
    assert row.seconds == pytest.approx(8.0 / len(model.layers))
    assert row.signature == "all-reduce over tp"
