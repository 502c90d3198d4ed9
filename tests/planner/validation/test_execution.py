"""Errors of a prediction against runs that are known to the last digit: made by hand, or by the simulator itself."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.hardware import load_device
from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel, Tables
from planner.execute.records import EXECUTED_COLUMNS
from planner.validation.execution import (
    BIAS_LIMIT,
    Comparison,
    Execution,
    Ranked,
    Verdict,
    durations,
    errors_by_kind,
    predict_steps,
    ranking,
    request_errors,
    step_errors,
    verdicts,
)
from planner.validation.remainder import e2e_parts, size_classes, step_tokens, unexplained
from simulator.deployment import Deployment, ReplicaSpec
from simulator.result import Result, request_frame
from simulator.scheduler import SchedulerConfig
from simulator.simulate import simulate
from simulator.workload import Requests

MAX_TOKENS, MAX_SEQS = 256, 16
ENGINE = Engine("test", "test", {"default": "vllm"}, 1e-3, 1e-5, 0.0, 1.0, 0.0, 0.9, 0.0)


def model(factor: float = 1.0, *, stages: int = 1) -> StepModel:
    """Linear in tokens, sequences and what they attend to; `factor` times as slow, the engine's own work excepted."""
    n, s = np.arange(MAX_TOKENS + 1.0), np.arange(MAX_SEQS + 1.0)
    tables = Tables(
        linear=(factor * (2e-3 + 1e-5 * n)).tolist(),
        shared=[0.0] * (MAX_TOKENS + 1),
        head=(factor * 1e-5 * s).tolist(),
        decode=Pieces((), ((1e-5 * (s > 0)).tolist(),), ((factor * 1e-7 * s).tolist(),)),
        prefill=Pieces((), ((1e-6 * n).tolist(),), ((1e-8 * n).tolist(),)),
    )
    return StepModel([tables] * stages, [0.0] * (MAX_TOKENS + 1), ENGINE, MAX_TOKENS, MAX_SEQS)


def served(made: StepModel, requests: Requests, *, max_seqs: int = MAX_SEQS) -> Result:
    # Whole prompts, each over half of a step: one a step, since the log does not tell several in a step apart.
    config = SchedulerConfig(
        max_seqs=max_seqs, token_budget=MAX_TOKENS, block_tokens=16, max_context_tokens=4096, policy="prefill-first"
    )
    spec = ReplicaSpec(made, Mapping(), config, 100_000, load_device("h100-sxm"))
    return simulate(Deployment([spec]), requests)


def traffic(rate_per_s: float = 30.0, count: int = 60, seed: int = 0) -> Requests:
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, count))
    return Requests(arrival_s, rng.integers(130, 200, count), rng.integers(1, 30, count))


def executed(result: Result) -> pd.DataFrame:
    """The simulator's step log, step by step, as if it had been executed."""
    assert result.steps is not None
    rows = []
    for row in result.steps.itertuples():
        assert row.prefill_sequences <= 1, "two prompts in a step cannot be told apart"
        first_s = (row.end_s - row.start_s) / row.steps - row.slope_s * (row.steps - 1) / 2
        at_s = row.start_s
        for step in range(row.steps):
            lasts_s = first_s + step * row.slope_s
            items = ((row.prefill_tokens, 0),) if row.prefill_tokens else ()
            context = row.decode_context_tokens + step * row.decode_sequences
            rows.append(
                (row.replica, row.lane, at_s, at_s + lasts_s, lasts_s, row.decode_sequences, context, items, 0, None)
            )
            at_s += lasts_s
    return pd.DataFrame(rows, columns=list(EXECUTED_COLUMNS))


def steps_of(rows: list[tuple[float, float, int, int, tuple[tuple[int, int], ...]]]) -> pd.DataFrame:
    """Executed steps of one lane from (start, end, decoding sequences, context, chunks)."""
    full = [(0, 0, start, end, end - start, n, context, items, 0, None) for start, end, n, context, items in rows]
    return pd.DataFrame(full, columns=list(EXECUTED_COLUMNS))


def frame(ttft_s: list[float], e2e_s: list[float], output_tokens: int = 11) -> pd.DataFrame:
    """Requests that arrive at 0; NaN where something never happened."""
    n = len(ttft_s)
    return request_frame(
        arrival_s=np.zeros(n), first_schedule_s=np.zeros(n), first_token_s=ttft_s, finish_s=e2e_s,
        prompt_tokens=np.full(n, 8), output_tokens=np.full(n, output_tokens), rejected=np.zeros(n, dtype=bool),
    )  # fmt: skip


# --- steps ------------------------------------------------------------------------------------------------------------


def test_step_errors_by_hand():
    steps = steps_of([(0, 1, 2, 20, ()), (1, 3, 2, 22, ()), (3, 7, 0, 0, ((8, 0),)), (7, 8, 1, 10, ((4, 0), (4, 4)))])
    found = step_errors(steps, [1.1, 1.0, 5.0, 1.0])
    assert (found["decode"].n, found["prefill"].n, found["mixed"].n, found["all"].n) == (2, 1, 1, 4)
    assert found["decode"].bias == pytest.approx(2.1 / 3 - 1)  # not the mean of +10 % and -50 %
    assert found["decode"].median_ape == pytest.approx(0.3)
    assert found["decode"].median_bias == pytest.approx(-0.2)
    assert found["decode"].p95_ape == pytest.approx(0.1 + 0.95 * 0.4)
    assert found["prefill"].median_bias == pytest.approx(0.25)
    assert found["prefill"].share == pytest.approx(0.5)
    assert found["all"].bias == pytest.approx(8.1 / 8 - 1)


def test_the_simulators_own_steps_are_predicted_exactly():
    steps = executed(served(model(), traffic()))
    assert set(np.unique(steps["decode_sequences"])) > {0, 1}
    found = step_errors(steps, predict_steps(model(), steps))
    assert found["all"].n == len(steps) > 300
    assert found["all"].p95_ape < 1e-9
    assert found["decode"].n > found["prefill"].n > 10


def test_a_mixed_step_by_hand():
    """9 tokens of which 3 are sampled; 1 decodes over 10 tokens, 4 are new to nothing, and 4 to 4 cached ones."""
    steps = steps_of([(0, 1, 1, 10, ((4, 0), (4, 4)))])
    attention_s = (1e-5 + 1e-7 * 10) + 4e-6 + (4e-6 + 4e-8 * 4)
    expected_s = 1e-3 + 3 * 1e-5 + (2e-3 + 9e-5) + 3e-5 + attention_s
    assert predict_steps(model(), steps) == pytest.approx([expected_s])


def test_steps_of_a_pipeline_are_not_predicted():
    steps = steps_of([(0, 1, 2, 20, ()), (1, 3, 2, 22, ())])
    predicted = predict_steps(model(stages=2), steps)
    assert np.isnan(predicted).all()
    found = step_errors(steps, predicted)["all"]
    assert (found.n, found.share) == (0, 1.0)
    assert math.isnan(found.bias)
    assert unexplained(steps, predicted).kinds == {}


def test_no_steps_at_all():
    steps = steps_of([])
    predicted = predict_steps(model(), steps)
    assert len(predicted) == 0
    assert step_errors(steps, predicted)["all"].n == 0
    assert math.isnan(unexplained(steps, predicted).between)


# --- requests ---------------------------------------------------------------------------------------------------------


def test_request_errors_by_hand():
    found = request_errors(frame([1.0, 3.0], [5.0, 9.0]), frame([2.0, 2.0], [4.0, 12.0]))
    assert found["ttft"].mape == pytest.approx(0.5)
    assert found["ttft"].bias == 0.0  # the means agree
    assert found["tpot"].mape == pytest.approx((1.0 + 0.4) / 2)  # 0.4 : 0.2 and 0.6 : 1.0
    assert found["e2e"].bias == pytest.approx(14 / 16 - 1)
    assert found["e2e"].mean_error == pytest.approx(2 / 16)
    assert (found["e2e"].predicted.p50_s, found["e2e"].measured.p50_s) == (7.0, 8.0)
    assert found["e2e"].measured.p90_s == pytest.approx(4 + 0.9 * 8)


def test_only_requests_that_finished_in_both_count():
    nan = math.nan
    found = request_errors(frame([1.0, 1.0, nan], [2.0, 2.0, nan]), frame([1.0, 9.0, 1.0], [2.0, nan, 2.0]))
    assert {metric: errors.n for metric, errors in found.items()} == {"ttft": 1, "tpot": 1, "e2e": 1}
    assert found["ttft"].mape == 0.0


def test_one_token_answers_have_no_tpot():
    found = request_errors(frame([1.0], [1.0], output_tokens=1), frame([2.0], [2.0], output_tokens=1))
    assert (found["tpot"].n, found["e2e"].n) == (0, 1)
    assert math.isnan(found["tpot"].predicted.mean_s)


def test_requests_are_matched_by_name_not_by_row():
    one = frame([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert request_errors(one, one.iloc[::-1])["e2e"].mape == 0.0


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(0.2, 5.0))
def test_a_constant_factor_is_all_bias(e2e_s, factor):
    measured = frame([value / 2 for value in e2e_s], e2e_s)
    predicted = frame([value / 2 * factor for value in e2e_s], [value * factor for value in e2e_s])
    for errors in request_errors(predicted, measured).values():
        assert errors.bias == pytest.approx(factor - 1, abs=1e-9)
        assert errors.mape == pytest.approx(abs(factor - 1), abs=1e-9)
        assert errors.predicted.p99_s == pytest.approx(factor * errors.measured.p99_s)


# --- what is left -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_parts_add_up_to_the_bias(seed, count):
    rng = np.random.default_rng(seed)
    ends = np.cumsum(rng.uniform(0.1, 1.0, count))
    rows = []
    for start, end in zip([0.0, *ends], ends, strict=False):
        decodes = int(rng.integers(0, 12))
        items = tuple((int(new), 0) for new in rng.integers(1, 400, rng.integers(0 if decodes else 1, 3)))
        rows.append((start, end, decodes, 10 * decodes, items))
    steps = steps_of(rows)
    predicted = durations(steps) * rng.lognormal(0, 0.3, count)
    left = unexplained(steps, predicted)
    bias = step_errors(steps, predicted)["all"].bias
    for parts in (left.kinds, left.sizes):
        assert sum(part.n for part in parts.values()) == count
        assert sum(part.share for part in parts.values()) == pytest.approx(1.0)
        assert sum(part.of_total for part in parts.values()) == pytest.approx(bias, abs=1e-12)


def test_sizes_count_new_tokens():
    steps = steps_of([(0, 1, 4, 99, ()), (1, 2, 0, 0, ((5, 100),)), (2, 3, 3, 30, ((60, 0), (2, 7)))])
    assert step_tokens(steps).tolist() == [4, 5, 65]
    names, at = size_classes(step_tokens(steps))
    assert [names[i] for i in at] == ["1-4", "5-16", "65-256"]


def test_a_machine_that_slows_down_is_noticed():
    """Steps of 1 s that all take 1.25 s from the middle on: the first third fits, the last is under-predicted."""
    lasts = [1.0] * 45 + [1.25] * 45
    ends = np.cumsum(lasts)
    steps = steps_of([(end - last, end, 2, 20, ()) for end, last in zip(ends, lasts, strict=True)])
    left = unexplained(steps.iloc[::-1], np.ones(90))  # whatever the order of the rows
    assert left.first_third == pytest.approx(0.0)
    assert left.last_third == pytest.approx(-0.2)
    assert left.persistence > 0.9
    assert left.jitter == pytest.approx(0.0, abs=1e-12)
    assert left.between == pytest.approx(0.0, abs=1e-12)


def test_pure_noise_is_told_from_what_persists():
    """Of noise of deviation s the median step deviates by 0.6745 s, the quartile of the normal distribution."""
    lasts = 1.0 + np.random.default_rng(0).normal(0, 0.05, 4000)
    ends = np.cumsum(lasts)
    steps = steps_of([(end - last, end, 2, 20, ()) for end, last in zip(ends, lasts, strict=True)])
    left = unexplained(steps, np.ones(4000))
    assert left.jitter == pytest.approx(0.6745 * 0.05, rel=0.05)
    assert left.jitter == pytest.approx(step_errors(steps, np.ones(4000))["all"].median_ape, rel=0.05)
    assert abs(left.persistence) < 0.05


def test_time_between_steps_counts_while_sequences_run():
    steps = steps_of([(0, 1, 1, 9, ()), (1.5, 2.5, 1, 10, ()), (9.5, 10.5, 0, 0, ((8, 0),)), (10.5, 11.5, 1, 9, ())])
    assert unexplained(steps, np.ones(4)).between == pytest.approx(0.5 / 4)  # not the idle time before the prompt


def test_steps_alone_explain_the_error_of_requests_that_never_meet():
    """Far apart, a request's E2E is the time of its own steps: nothing is left to gaps or queues."""
    requests = Requests(np.arange(10) * 10.0, np.full(10, 100), np.full(10, 20))
    real, predicted = served(model(1.3), requests), served(model(), requests)
    steps = executed(real)
    parts = e2e_parts(steps, predict_steps(model(), steps), predicted.requests, real.requests)
    assert parts.n == 10
    assert parts.error < -0.1
    assert parts.steps == pytest.approx(parts.error, rel=1e-9)
    assert parts.gaps == pytest.approx(0.0, abs=1e-9)
    assert parts.rest == pytest.approx(0.0, abs=1e-9)


def test_gaps_are_told_from_steps():
    """Two steps of 1 s, predicted exactly, with 1 s between them, where none was predicted."""
    steps = steps_of([(0, 1, 0, 0, ((8, 0),)), (2, 3, 1, 9, ())])
    real, predicted = frame([1.0], [3.0], output_tokens=2), frame([1.0], [2.0], output_tokens=2)
    real["replica"] = real["lane"] = 0
    parts = e2e_parts(steps, [1.0, 1.0], predicted, real)
    assert (parts.error, parts.steps, parts.gaps) == pytest.approx((-1 / 3, 0.0, -1 / 3))
    assert parts.rest == pytest.approx(0.0, abs=1e-12)


def test_queues_are_left_to_the_rest():
    """Under load slower steps make longer queues, more than the steps of the run itself account for."""
    requests = traffic(rate_per_s=60.0)
    real, predicted = served(model(1.3), requests, max_seqs=2), served(model(), requests, max_seqs=2)
    steps = executed(real)
    parts = e2e_parts(steps, predict_steps(model(), steps), predicted.requests, real.requests)
    assert parts.error < parts.steps < 0
    assert parts.rest < 0
    assert parts.error == pytest.approx(parts.steps + parts.gaps + parts.rest)


# --- the whole --------------------------------------------------------------------------------------------------------


def run_of(factor: float, requests: Requests) -> Execution:
    result = served(model(factor), requests)
    steps = executed(result)
    return Execution(result.requests, steps, predict_steps(model(), steps))


def test_a_perfect_prediction_meets_every_target():
    requests = traffic()
    comparison = Comparison.of(served(model(), requests).requests, [run_of(1.0, requests)] * 2)
    found = verdicts(comparison, comparison.steps[0], ranking([Ranked("a", 1.0, 1.0), Ranked("b", 2.0, 3.0)]))
    assert [verdict.met for verdict in found] == [True] * len(found)
    assert comparison.runs[0].finished == 60
    assert max(verdict.figure for verdict in found if verdict.sense != "at least") < 1e-9


def test_a_prediction_of_a_quicker_machine_misses_them():
    requests = traffic()
    runs = [run_of(1.4, requests), run_of(1.41, requests)]
    comparison = Comparison.of(served(model(), requests).requests, runs)
    found = {verdict.name: verdict for verdict in verdicts(comparison)}
    assert not found["median step error, served steps"].met
    assert not found["mean E2E error, two runs + 3 points"].met
    bias = found["bias of mean E2E"]
    assert not bias.met
    assert bias.figure < -BIAS_LIMIT
    assert list(comparison.apart) == [(0, 1)]
    assert comparison.apart[0, 1]["e2e"].bias > 0  # the later run was slower
    assert comparison.noise("e2e") < comparison.error("e2e") / 4


def test_a_single_run_has_no_noise_to_be_judged_by():
    requests = traffic()
    found = verdicts(Comparison.of(served(model(), requests).requests, [run_of(1.0, requests)]))
    assert [v.met for v in found if "two runs" in v.name] == [None] * 3
    assert [v.met for v in found if "bias" in v.name] == [True] * 3


def test_nothing_ran():
    comparison = Comparison.of(frame([1.0], [2.0]), [])
    assert [verdict.met for verdict in verdicts(comparison)] == [None] * 7


def test_limits_of_a_gpu_come_besides():
    requests = traffic()
    comparison = Comparison.of(served(model(), requests).requests, [run_of(1.2, requests)])
    (found,) = (v for v in verdicts(comparison, limits={"e2e": 0.05}) if v.name == "mean E2E error")
    assert found.met is False


@pytest.mark.parametrize(
    ("figure", "sense", "limit", "met"),
    [(0.05, "at most", 0.05, True), (0.051, "at most", 0.05, False), (-0.041, "within", 0.04, False),
     (-0.04, "within", 0.04, True), (0.9, "at least", 0.9, True), (0.89, "at least", 0.9, False),
     (math.nan, "at most", 0.05, None), (0.1, "at most", math.nan, None)],
)  # fmt: skip
def test_limits_are_included(figure, sense, limit, met):
    assert Verdict("x", figure, sense, limit).met is met


# --- settings ---------------------------------------------------------------------------------------------------------


def test_ranking_by_hand():
    found = ranking([Ranked("a", 1.0, 2.2), Ranked("b", 3.0, 2.0), Ranked("c", 4.0, 6.0), Ranked("d", 9.0, 7.0)])
    assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert found.regret == pytest.approx(0.1)
    assert found.at_random == pytest.approx((0.1 + 0.0 + 2.0 + 2.5) / 4)
    assert found.predicted_order == ("a", "b", "c", "d")
    assert found.measured_order == ("b", "a", "c", "d")


def test_settings_predicted_to_be_equally_good_are_chosen_equally():
    found = ranking([Ranked("a", 1.0, 2.0), Ranked("b", 1.0, 3.0), Ranked("c", 5.0, 9.0)])
    assert found.regret == pytest.approx(0.25)


def test_settings_that_did_not_run_are_left_out():
    found = ranking([Ranked("a", 1.0, math.nan), Ranked("b", math.nan, 1.0), Ranked("c", 2.0, 4.0)])
    assert [setting.name for setting in found.settings] == ["c"]
    assert (found.regret, math.isnan(found.spearman)) == (0.0, True)
    nothing = ranking([])
    assert nothing.settings == ()
    assert math.isnan(nothing.regret)


@given(st.lists(st.floats(0.1, 100.0), min_size=2, max_size=12, unique=True), st.floats(0.1, 10))
def test_a_prediction_that_keeps_the_order_loses_nothing(measured, factor):
    settings = [Ranked(str(i), factor * value, value) for i, value in enumerate(measured)]
    assume(len({setting.predicted for setting in settings}) == len(settings))
    found = ranking(settings)
    assert found.spearman == pytest.approx(1.0)
    assert found.regret == 0.0
    assert found.predicted_order == found.measured_order
    assert found.at_random >= 0.0


def test_held_out_steps_come_without_a_log():
    found = errors_by_kind(["decode", "decode", "prefill"], [1.0, 2.0, 3.0], [1.0, 1.0, 3.0])
    assert (found["decode"].n, found["mixed"].n) == (2, 0)
    assert found["all"].bias == pytest.approx(0.2)
