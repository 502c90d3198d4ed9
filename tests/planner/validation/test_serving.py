"""Measured points are simulated with their own client: what the simulator measured is predicted without error."""

import numpy as np
import pytest

from planner.catalogue import open_catalogue
from planner.plan import Plan, Pool
from planner.validation.case import Case, Layout, Unmapped
from planner.validation.regret import regret
from planner.validation.serving import predict, together
from planner.validation.statistics import by_metric
from simulator.simulate import simulate
from simulator.workload import Requests, Workload

MODEL, HARDWARE, ENGINE, COST = "llama-3.1-8b", "h100-sxm", "vllm", "analytic"


def client(concurrency: int | None, count: int = 24, *, prompt: int = 300, seed: int = 0) -> Workload:
    rng = np.random.default_rng(seed)
    prompts = rng.integers(int(0.8 * prompt), prompt + 1, count)
    arrival_s = np.arange(count) / 5 if concurrency is None else np.zeros(count)
    return Workload(Requests(arrival_s, prompts, rng.integers(20, 26, count)), concurrency)


def plan(pool: Pool, *, model: str = MODEL, hardware: str = HARDWARE, gpus: int = 4) -> Plan:
    return Plan(model, hardware, gpus, (pool,), ENGINE)


def measured_by_simulation(row: str, pool: Pool, workload: Workload, warmup: int = 0) -> Case:
    """A point whose measurement is the frame of a recorded run, evaluated with pandas."""
    chosen = plan(pool)
    catalogue = open_catalogue(MODEL, HARDWARE, chosen.gpus, ENGINE, COST)
    frame = simulate(catalogue.deployment(chosen, with_work=True), workload).requests.iloc[warmup:]
    window_s = frame["finish_s"].max() - frame["arrival_s"].min()
    measured = {
        "ttft": frame["ttft_s"].mean(),
        "tpot": frame["tpot_s"].dropna().mean(),
        "e2e": frame["e2e_s"].mean(),
        "throughput": frame["output_tokens"].sum() / window_s,
    }
    layout = f"{pool.replicas} x tp={pool.tp}"
    return Case(row, {"layout": layout, "model": MODEL}, chosen, workload, measured, ("chat",), warmup)


@pytest.fixture(scope="module")
def own_cases() -> tuple[Case, ...]:
    closed = client(4)
    return (
        measured_by_simulation("tp1", Pool(1), closed),
        measured_by_simulation("tp2", Pool(1, tp=2), closed),
        measured_by_simulation("warm", Pool(1, tp=2), client(4, seed=1), warmup=8),
        measured_by_simulation("open", Pool(2, tp=2), client(None)),
        measured_by_simulation("small", Pool(1, token_budget=256, max_seqs=8), closed),
    )


def test_what_the_simulator_measured_is_predicted_without_error(own_cases):
    found = predict(Layout(own_cases), COST, jobs=1)
    assert [p.case.row for p in found.predictions] == ["tp1", "tp2", "warm", "open", "small"]
    for metric, table in by_metric(found.predictions).items():
        assert table.n == 5, metric
        assert table.mape == pytest.approx(0, abs=1e-9), metric
    assert regret(found.predictions).mean == 0
    assert all(sum(p.evidence.values()) == pytest.approx(1) for p in found.predictions)
    assert all(set(p.evidence) == {"analytic"} for p in found.predictions)


def test_several_processes_say_the_same_in_the_same_order(own_cases):
    one, two = (predict(Layout(own_cases * 3), COST, jobs=jobs) for jobs in (1, 2))
    assert [(p.case.row, p.predicted) for p in one.predictions] == [(p.case.row, p.predicted) for p in two.predictions]


def test_a_prediction_depends_on_its_own_row_only(own_cases):
    alone = [predict(Layout((case,)), COST, jobs=1).predictions[0].predicted for case in own_cases]
    large = measured_by_simulation("large", Pool(1, token_budget=16384, max_seqs=2048), client(4))
    among = predict(Layout((large, *reversed(own_cases), large)), COST, jobs=1).predictions
    assert [p.predicted for p in reversed(among[1:-1])] == alone


def test_the_opening_burst_is_part_of_the_mean_ttft():
    """With all requests at once nobody is served before the first step ends, and most wait for several."""
    burst, steady = client(32, 32), client(1, 32)
    cases = [Case("x", {}, plan(Pool(1, token_budget=512)), load, {"ttft": 1.0}, ()) for load in (burst, steady)]
    first, second = predict(Layout(tuple(cases)), COST, jobs=1).predictions
    assert first.predicted["ttft"] > 3 * second.predicted["ttft"]
    single = Case("y", {}, plan(Pool(1, token_budget=512)), client(1, 4), {}, (), warmup=3)
    (last,) = predict(Layout((single,)), COST, jobs=1).predictions
    outputs = single.workload.requests.output_tokens[3]
    assert last.predicted["e2e"] == pytest.approx(last.predicted["ttft"] + (outputs - 1) * last.predicted["tpot"])
    assert last.predicted["throughput"] == pytest.approx(outputs / last.predicted["e2e"])


def test_one_token_answers_have_no_tpot():
    requests = Requests(np.zeros(4), [100] * 4, [1] * 4)
    (found,) = predict(
        Layout((Case("x", {}, plan(Pool(1)), Workload(requests, 2), {"tpot": 1.0, "ttft": 1.0}, ()),)), COST, jobs=1
    ).predictions
    assert np.isnan(found.predicted["tpot"])
    assert by_metric([found])["tpot"].n == 0
    assert by_metric([found])["ttft"].n == 1


def test_rows_that_cannot_be_simulated_are_counted_with_the_reason():
    load = client(2, 4)

    def case(row: str, pool: Pool, **kwargs) -> Case:
        return Case(row, {}, plan(pool, **kwargs), load, {"ttft": 1.0}, ())

    long_prompts = Case("long", {}, plan(Pool(1, max_context_tokens=64)), load, {"ttft": 1.0}, ())
    warm = Case("warm", {}, plan(Pool(1)), load, {"ttft": 1.0}, (), warmup=4)
    cases = (
        case("good", Pool(1)),
        case("big", Pool(1), model="llama-3.1-405b"),
        case("bigger", Pool(1, tp=2), model="llama-3.1-405b"),
        case("odd", Pool(1, tp=3)),
        case("odder", Pool(1, tp=5), gpus=5),
        case("unknown", Pool(1), model="no-such-model"),
        case("too many", Pool(1), hardware="phone"),
        case("format", Pool(1, activations="fp4", weights="fp4"), hardware="a100-80-sxm"),
        long_prompts,
        warm,
    )
    layout = Layout(cases, (Unmapped("torn", {}, "no concurrency"), Unmapped("worn", {}, "no concurrency")))
    found = predict(layout, COST, jobs=1)
    assert [p.case.row for p in found.predictions] == ["good"]
    assert found.rows == 12
    reasons = found.reasons
    assert sum(reasons.values()) == 11
    assert reasons["does not fit in memory"] == 2
    assert reasons["no concurrency"] == 2
    assert reasons["requests that can never fit in the KV cache or the context"] == 1
    assert reasons["every request is a warm-up request"] == 1
    (law,) = [count for reason, count in reasons.items() if reason.startswith("illegal layout: breaks the law that tp")]
    assert law == 2  # tp = 3 and tp = 5: the same fault
    assert any("no-such-model" in reason for reason in reasons)
    assert reasons["gpus = N: phone joins at most N"] == 1
    details = {failure.case.row: failure.detail for failure in found.failures}
    assert "tp=3" in details["odd"]
    assert "GiB" in details["big"]
    assert list(reasons.values()) == sorted(reasons.values(), reverse=True)


def test_prices_without_kernels_are_refused_when_asked_for_and_replaced_when_not(monkeypatch, own_cases):
    from hwmodels.errors import MeasurementError
    from planner.validation import serving

    def without_kernels(model, hardware, gpus, engine, cost):
        if cost == "measured":
            raise MeasurementError("no measured kernels of this device: expected some; choose --cost calibrated")
        return open_catalogue(model, hardware, gpus, engine, cost)

    monkeypatch.setattr(serving, "open_catalogue", without_kernels)
    layout = Layout(own_cases[:1])
    refused = predict(layout, "measured", jobs=1)
    assert list(refused.reasons) == ["no measured kernels of this device: expected some"]
    replaced = predict(layout, None, jobs=1)
    assert replaced.predictions[0].predicted == predict(layout, "calibrated", jobs=1).predictions[0].predicted


def test_several_files_are_one_layout_with_a_label():
    case = Case("a", {"system": "s"}, plan(Pool(1)), client(1, 2), {}, ())
    both = together({"one.csv": Layout((case,)), "two.csv": Layout((case,), (Unmapped("b", {}, "why"),))})
    assert [row.labels for row in both.cases] == [
        {"system": "s", "file": "one.csv"},
        {"system": "s", "file": "two.csv"},
    ]
    assert both.unmapped[0].labels == {"file": "two.csv"}


def test_progress_is_told():
    case = Case("a", {}, plan(Pool(1)), client(1, 2), {}, ())
    told: list[tuple[str, float | None]] = []
    predict(Layout((case,)), COST, jobs=1, progress=lambda what, share: told.append((what, share)))
    assert told[0] == ("simulating: 0 of 1 rows", 0.0)
    assert predict(Layout(()), COST, jobs=1).rows == 0
