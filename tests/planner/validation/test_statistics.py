"""Errors, noise and regret against numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.plan import Plan, Pool
from planner.validation.case import Case
from planner.validation.regret import E2E, LOOP, RATE, TPOT, regret
from planner.validation.serving import Failure, Prediction
from planner.validation.statistics import by_group, by_metric, copies, errors, noise_floor
from simulator.workload import Requests, Workload


def case(measured, *, row="r", choice=(), tp=1, outputs=(11, 11), concurrency=None, **labels) -> Case:
    requests = Requests(np.zeros(len(outputs)), [8] * len(outputs), list(outputs))
    plan = Plan("llama-3.1-8b", "h100-sxm", 8, (Pool(1, tp=tp),))
    return Case(row, {"layout": f"tp={tp}", **labels}, plan, Workload(requests, concurrency), measured, choice)


def predicted(values, *args, **kwargs) -> Prediction:
    return Prediction(case(*args, **kwargs), {"ttft": 9.0, "tpot": 9.0, "e2e": 9.0, "throughput": 9.0} | values, {})


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors_by_hand():
    # e = +0.5, -0.25, 0, +0.1; ranks predicted 1 2 4 3, measured 1 3 4 2
    found = errors([1.5, 3.0, 8.0, 3.3], [1.0, 4.0, 8.0, 3.0])
    assert found.n == 4
    assert found.mape == pytest.approx(0.85 / 4)
    assert found.median_ape == pytest.approx((0.1 + 0.25) / 2)
    assert found.bias == pytest.approx(0.35 / 4)
    assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_ties_share_their_mean_rank():
    # ranks 1.5 1.5 3 against 1 2 3: covariance 1.5, deviations sqrt(1.5) and sqrt(2)
    assert errors([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]).spearman == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_points_that_say_nothing_are_not_counted():
    found = errors([1.0, math.nan, 2.0, 5.0], [2.0, 1.0, 0.0, math.nan])
    assert (found.n, found.mape, found.bias) == (1, 0.5, -0.5)
    assert math.isnan(found.spearman)
    nothing = errors([], [])
    assert nothing.n == 0
    assert all(math.isnan(value) for value in (nothing.mape, nothing.median_ape, nothing.bias, nothing.spearman))


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=30, unique=True), st.floats(0.1, 10))
def test_a_constant_factor_is_all_bias_and_keeps_the_order(measured, factor):
    found = errors(np.array(measured) * factor, measured)
    assert found.mape == pytest.approx(abs(factor - 1), abs=1e-12)
    assert found.median_ape == pytest.approx(abs(factor - 1), abs=1e-12)
    assert found.bias == pytest.approx(factor - 1, abs=1e-12)
    assert found.spearman == pytest.approx(1.0) or len(set((np.array(measured) * factor).tolist())) < len(measured)


def test_metrics_count_the_points_that_measured_them():
    found = by_metric([
        predicted({"ttft": 1.2, "tpot": 2.0}, {"ttft": 1.0, "tpot": 2.0}),
        predicted({"tpot": 1.0}, {"tpot": 2.0}),
    ])  # fmt: skip
    assert {metric: table.n for metric, table in found.items()} == {"ttft": 1, "tpot": 2, "e2e": 0, "throughput": 0}
    assert found["ttft"].bias == pytest.approx(0.2)
    assert found["tpot"].mape == pytest.approx(0.25)


def test_groups_by_every_label_numbers_in_order():
    found = by_group([
        predicted({"ttft": 1.1}, {"ttft": 1.0}, system="a", concurrency_label="128"),
        predicted({"ttft": 0.7}, {"ttft": 1.0}, system="b", concurrency_label="16"),
        predicted({"ttft": 1.5}, {"ttft": 1.0}, system="b", concurrency_label="16", mode="agg"),
    ])  # fmt: skip
    assert list(found["concurrency_label"]) == ["16", "128"]
    assert found["system"]["a"]["ttft"].n == 1
    assert found["system"]["b"]["ttft"].mape == pytest.approx(0.4)
    assert found["mode"]["agg"]["ttft"].n == 1
    assert sum(table["ttft"].n for table in found["system"].values()) == 3


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_of_repeated_rows_by_hand():
    cases = [
        case({"ttft": 0.9, "tpot": 2.0}, system="a", file="one.csv"),
        case({"ttft": 1.1}, system="a", file="two.csv"),  # spread 0.2, deviations 0.1 * sqrt(2)
        case({"ttft": 1.0}, system="b"),
        case({"ttft": 2.0}, system="b"),
        case({"ttft": 3.0}, system="b"),  # spread 1, deviations 0.5, 0, 0.5 times sqrt(3 / 2)
        case({"ttft": 5.0}, system="b", tp=2),  # another layout, once
    ]
    found = noise_floor(cases)
    ttft = found["ttft"]
    assert (ttft.sets, ttft.rows) == (2, 5)
    assert ttft.mean_spread == pytest.approx(0.6)
    assert ttft.median_spread == pytest.approx(0.6)
    assert ttft.mape == pytest.approx((0.2 * math.sqrt(2) + math.sqrt(1.5)) / 5)
    assert ttft.median_ape == pytest.approx(0.1 * math.sqrt(2))
    assert found["tpot"].sets == 0
    assert math.isnan(found["tpot"].mape)


def test_a_row_written_down_twice_is_no_second_measurement():
    cases = [
        case({"ttft": 0.25012, "tpot": 0.02}, file="one.csv"),
        case({"ttft": 0.2501, "tpot": 0.02}, file="two.csv"),  # rounded
        case({"ttft": 0.25012, "tpot": 0.021}, file="two.csv"),  # another run with nearly the same TTFT
        case({"ttft": 0.25012, "tpot": 0.02}, tp=2),
    ]
    assert copies(cases) == 1
    found = noise_floor(cases)
    assert (found["tpot"].sets, found["tpot"].rows) == (1, 2)
    assert found["tpot"].mean_spread == pytest.approx(0.001 / 0.0205)
    assert noise_floor(cases[:2])["ttft"].sets == 0


def test_noise_floor_is_the_error_of_knowing_the_true_mean():
    rng = np.random.default_rng(1)
    cases = [case({"e2e": float(value)}, system=str(i)) for i in range(4000) for value in rng.normal(1.0, 0.05, 2)]
    expected = 0.05 * math.sqrt(2 / math.pi)  # mean |deviation| of a normal distribution
    assert noise_floor(cases)["e2e"].mape == pytest.approx(expected, rel=0.05)


# --- regret -----------------------------------------------------------------------------------------------------------


def test_regret_of_a_rate_is_per_gpu_and_what_is_lost():
    key = ("model", "traffic")
    found = regret([
        predicted({"throughput": 150.0}, {"throughput": 100.0}, choice=key, tp=1),
        predicted({"throughput": 200.0}, {"throughput": 240.0}, choice=key, tp=2),  # measured 120 per GPU, the best
        predicted({"throughput": 100.0}, {"throughput": 180.0}, choice=key, tp=4),  # 45
    ])  # fmt: skip
    (choice,) = found.choices
    assert (choice.objective, choice.chosen, choice.best, choice.layouts) == (RATE, "tp=1", "tp=2", 3)
    assert choice.regret == pytest.approx(1 - 100 / 120)
    assert choice.at_random == pytest.approx((1 - 100 / 120 + 0 + 1 - 45 / 120) / 3)
    assert (found.n, found.best_chosen) == (1, 0.0)
    assert found.mean == found.p90 == pytest.approx(1 / 6)


def test_regret_of_a_closed_loop_follows_littles_law():
    key = ("traffic",)
    # 11 output tokens: e2e = ttft + 10 tpot. Rates per GPU: tp=1: 4 * 11 / (1 + 1); tp=2: 4 * 11 / (0.2 + 0.5) / 2
    found = regret([
        predicted({"ttft": 1.0, "tpot": 0.2}, {"ttft": 1.0, "tpot": 0.1}, choice=key, tp=1, concurrency=4),
        predicted({"ttft": 0.2, "tpot": 0.1}, {"ttft": 0.2, "tpot": 0.05}, choice=key, tp=2, concurrency=4),
    ])  # fmt: skip
    (choice,) = found.choices
    assert choice.objective == LOOP
    assert choice.chosen == choice.best == "tp=2"  # measured 22 and 31.4, predicted 14.7 and 18.3
    assert (choice.regret, found.best_chosen) == (0.0, 1.0)


def test_draws_of_lengths_do_not_decide_what_was_measured_best():
    key = ("traffic",)
    shared = {"choice": key, "concurrency": 4}
    # The same latencies but for a hair; twice as many output tokens were drawn for the slower one.
    found = regret([
        predicted({"ttft": 1.0, "tpot": 0.1}, {"ttft": 1.0, "tpot": 0.1}, tp=1, outputs=(10, 10), **shared),
        predicted({"ttft": 9.0, "tpot": 0.9}, {"ttft": 1.01, "tpot": 0.101}, tp=1, outputs=(20, 20), **shared)
        ,
    ])  # fmt: skip
    assert found.n == 0  # one layout, measured twice
    other = regret([
        predicted({"e2e": 1.0}, {"e2e": 1.0}, tp=1, outputs=(10, 10), layout="a", **shared),
        predicted({"e2e": 9.0}, {"e2e": 1.01}, tp=1, outputs=(20, 20), layout="b", **shared),
    ])  # fmt: skip
    assert other.choices[0].best == "a"


def test_regret_of_latencies_where_nothing_else_was_measured():
    open_loop = regret([
        predicted({"ttft": 1.0, "tpot": 0.1}, {"ttft": 1.0, "tpot": 0.2}, choice=("x",), tp=1),  # e2e 3, predicted 2
        predicted({"ttft": 3.0, "tpot": 0.1}, {"ttft": 1.0, "tpot": 0.1}, choice=("x",), tp=2),  # e2e 2, predicted 4
    ])  # fmt: skip
    (choice,) = open_loop.choices
    assert (choice.objective, choice.chosen, choice.best) == (E2E, "tp=1", "tp=2")
    assert choice.regret == pytest.approx(3 / 2 - 1)
    only_tpot = regret([
        predicted({"tpot": 0.1}, {"tpot": 0.2}, choice=("x",), tp=1),
        predicted({"tpot": 0.3}, {"tpot": 0.1}, choice=("x",), tp=2),
    ])  # fmt: skip
    assert only_tpot.choices[0].objective == TPOT
    assert only_tpot.mean == pytest.approx(1.0)


def test_a_layout_measured_several_times_counts_with_its_mean():
    key = ("x",)
    found = regret([
        predicted({"throughput": 5.0}, {"throughput": 10.0}, choice=key, tp=1),
        predicted({"throughput": 5.0}, {"throughput": 30.0}, choice=key, tp=1),
        predicted({"throughput": 2.0}, {"throughput": 44.0}, choice=key, tp=2),  # 22 per GPU
    ])  # fmt: skip
    (choice,) = found.choices
    assert (choice.chosen, choice.best, choice.layouts) == ("tp=1", "tp=2", 2)
    assert choice.regret == pytest.approx(1 - 20 / 22)


def test_a_layout_that_cannot_be_simulated_can_still_have_been_the_best():
    key = ("x",)
    good = case({"throughput": 50.0}, choice=key, tp=1, row="lost")
    found = regret([predicted({"throughput": 5.0}, {"throughput": 40.0}, choice=key, tp=1, layout="other")],
                   [Failure(good, "does not fit in memory", "")])  # fmt: skip
    assert found.mean == pytest.approx(0.2)
    assert regret([], [Failure(good, "", "")] * 2).n == 0


def test_no_choice_without_two_layouts_and_a_key():
    lone = predicted({"throughput": 5.0}, {"throughput": 40.0}, choice=("x",))
    loose = [predicted({"throughput": 5.0}, {"throughput": 40.0}, tp=tp) for tp in (1, 2)]
    found = regret([lone, *loose])
    assert found.n == 0
    assert math.isnan(found.mean)
    assert math.isnan(found.p90)


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100)), min_size=2, max_size=6))
def test_regret_is_between_nothing_and_the_worst(pairs):
    rows = [
        predicted({"throughput": p}, {"throughput": m}, choice=("x",), layout=str(i)) for i, (p, m) in enumerate(pairs)
    ]
    measured = [m for _, m in pairs]
    found = regret(rows)
    assert 0 <= found.mean <= 1 - min(measured) / max(measured) + 1e-12
    perfect = [Prediction(row.case, {**row.predicted, **row.case.measured}, {}) for row in rows]
    assert regret(perfect).mean == 0
