"""Metrics against definitions: brute force token by token, numpy's quantiles, Little's law, a known mean."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from simulator.distribution import Distribution
from simulator.errors import MetricError
from simulator.itl import itl
from simulator.limits import Limit, attainment, parse_limit
from simulator.metrics import Window, meets, replicate, summarize
from simulator.result import Result, RunTotals, latencies, request_frame, span_frame, step_frame
from simulator.simulate import simulate

spec = importlib.util.spec_from_file_location("engine", Path(__file__).with_name("test_engine_against_oracle.py"))
assert spec is not None and spec.loader is not None
engine = importlib.util.module_from_spec(spec)  # its small step model and the oracle
spec.loader.exec_module(engine)

nan = float("nan")


def totals(**changes: object) -> RunTotals:
    values: dict[str, object] = {
        "gpus": 4,
        "replicas": 2,
        "makespan_s": 10.0,
        "model_flops": 2e15,
        "hbm_bytes": 1e13,
        "energy_j": 5000.0,
        "price_usd_per_h": 36.0,
        "peak_flops_per_s": 1e15,
        "memory_bytes_per_s": 4e12,
        "lanes": (1, 1),
        "kv_blocks": (100, 100),
        "seed": 0,
        "events": 0,
    }
    return RunTotals(**(values | changes))  # type: ignore[arg-type]


def row(
    replica: int, lane: int, start: float, end: float, k: int, slope: float, decodes: int, prefill: int = 0, kv: int = 0
) -> tuple[float, ...]:
    return (replica, lane, start, end, k, slope, decodes, 0, prefill, 0, int(prefill > 0), 0, kv)


def plain(count: int, seed: int = 0, classes: int = 1) -> Result:
    """Requests with made-up times, no steps."""
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.uniform(0, 100, count))
    schedule = arrival + rng.exponential(0.5, count)
    first = schedule + rng.exponential(0.2, count)
    output = rng.integers(1, 300, count)
    finish = first + (output - 1) * rng.uniform(0.01, 0.05, count)
    rejected = rng.random(count) < 0.02
    for times in (schedule, first, finish):
        times[rejected] = nan
    frame = request_frame(
        arrival_s=arrival,
        first_schedule_s=schedule,
        first_token_s=first,
        finish_s=finish,
        prompt_tokens=rng.integers(1, 2000, count),
        output_tokens=output,
        rejected=rejected,
        class_codes=rng.integers(0, classes, count),
        class_names=[f"class{index}" for index in range(classes)],
    )
    return Result(frame, None, None, totals(makespan_s=float(np.nanmax(finish) - arrival[0])))


# --- limits


@pytest.mark.parametrize(
    ("text", "statistic", "seconds"),
    [
        ("p99=2s", "p99", 2.0),
        ("2s", "p99", 2.0),
        ("mean=50ms", "mean", 0.05),
        ("p99.9 = 250 us", "p99.9", 250e-6),
        ("max=1e-1s", "max", 0.1),
    ],
)
def test_a_limit_is_read_with_its_unit(text: str, statistic: str, seconds: float) -> None:
    limit = parse_limit("tpot", text)
    assert (limit.metric, limit.statistic) == ("tpot", statistic)
    assert limit.seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", "2", "nans", "p99=nan s", "-2s", "p99=-1ms", "0s", "infs", "p0=1s", "p101=1s", "median=1s", "=1s", "p99="],
)
def test_a_bad_limit_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(MetricError, match=r"expected") as caught:
        parse_limit("ttft", text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(MetricError, match="'tbt', expected one of ttft"):
        parse_limit("tbt", "2s")


# --- distributions


@given(
    st.lists(st.tuples(st.floats(0, 1e3, allow_subnormal=False), st.integers(1, 7)), min_size=1, max_size=40),
)
def test_weighted_quantiles_are_those_of_the_repeated_values(pairs: list[tuple[float, int]]) -> None:
    values = np.array([value for value, _ in pairs])
    weights = np.array([weight for _, weight in pairs], dtype=np.int64)
    got = Distribution.of(values, weights)
    repeated = np.repeat(values, weights)
    assert got.count == len(repeated)
    assert got.mean == pytest.approx(repeated.mean())
    expected = np.quantile(repeated, [0.5, 0.9, 0.95, 0.99])
    assert [got.p50, got.p90, got.p95, got.p99] == pytest.approx(list(expected), rel=1e-12)
    assert got.p50 <= got.p90 <= got.p95 <= got.p99 <= values.max()


@given(st.lists(st.one_of(st.floats(0, 1e3), st.just(nan)), max_size=60))
def test_quantiles_leave_nan_out(values: list[float]) -> None:
    array = np.array(values)
    real = array[~np.isnan(array)]
    got = Distribution.of(array)
    assert got.count == len(real)
    if len(real):
        assert got.p99 == pytest.approx(np.quantile(real, 0.99), rel=1e-12)
        assert got.mean == pytest.approx(real.mean())
    else:
        assert np.isnan(got.p50)


# --- attainment


def test_a_lost_request_is_infinitely_late() -> None:
    ttft, tpot, e2e = latencies(np.zeros(3), [1.0, 2.0, nan], [5.0, 2.0, nan], [5, 1, 5])
    got = attainment(ttft, tpot, e2e, [Limit("ttft", "p50", 2.0), Limit("ttft", "max", 9.0), Limit("tpot", "p50", 9.0)])
    assert got.values_s == (2.0, np.inf, np.inf)  # TPOT of 1 s and of the lost one: the median lies between them
    assert not got.met
    assert (got.good, got.requests) == (2, 3)
    assert attainment(ttft, tpot, e2e, [Limit("ttft", "p50", 2.0)]).met


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=50), st.sampled_from(["mean", "p50", "p90", "p99.9", "max"]))
def test_the_reached_statistic_is_numpys(values: list[float], statistic: str) -> None:
    array = np.array(values)
    fraction = {"p50": 0.5, "p90": 0.9, "p99.9": 0.999, "max": 1.0}.get(statistic)
    expected = array.mean() if fraction is None else np.quantile(array, fraction)
    (reached,) = attainment(array, array, array, [Limit("e2e", statistic, 1.0)]).values_s
    assert reached == pytest.approx(expected, rel=1e-12)


@given(st.floats(0.05, 5), st.floats(1.01, 3))
def test_attainment_grows_with_the_limit(seconds: float, factor: float) -> None:
    frame = plain(200).requests
    ttft, tpot, e2e = (frame[name].to_numpy() for name in ("ttft_s", "tpot_s", "e2e_s"))
    tight = attainment(ttft, tpot, e2e, [Limit("ttft", "p90", seconds)])
    loose = attainment(ttft, tpot, e2e, [Limit("ttft", "p90", seconds * factor)])
    assert tight.good <= loose.good
    assert tight.met <= loose.met


def test_a_limit_on_itl_needs_the_steps() -> None:
    with pytest.raises(MetricError, match="record=True"):
        meets(plain(10), [Limit("itl", "p99", 1.0)])


def test_a_class_that_is_not_in_the_workload_is_named() -> None:
    with pytest.raises(MetricError, match="'chat', expected one of the workload's: class0, class1"):
        summarize(plain(10, classes=2), {"chat": []})


# --- inter-token latencies


@st.composite
def lanes(draw: st.DrawFn) -> tuple[Result, list[list[float]]]:
    """A run made token by token, and the times of every token of every request.

    Each lane's batch changes at random: requests join in mixed or prefill-only steps, are interrupted and come back;
    between changes, steps get longer by a constant.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pause = draw(st.booleans())  # prefill-only steps, as prefill-first and static batching do
    steps: list[tuple[float, ...]] = []
    tokens: list[list[float]] = []
    owner: list[tuple[int, int]] = []
    spans: list[tuple[int, int, int, float, int]] = []
    for replica, lane in [(0, 0), (0, 1), (1, 0)][: draw(st.integers(1, 3))]:
        now = float(rng.uniform(0, 1))
        running: set[int] = set()
        open_spans: dict[int, tuple[float, int]] = {}
        stopped: list[int] = []
        for _ in range(draw(st.integers(0, 12))):
            act = rng.integers(0, 4)
            if act == 0 and running:  # an interruption, then it waits
                request = int(rng.choice(sorted(running)))
                running.discard(request)
                stopped.append(request)
                spans.append((request, replica, lane, *open_spans.pop(request)))
            if act <= 2:  # someone joins at the end of a step with a prefill
                if stopped and rng.random() < 0.5:
                    request = stopped.pop()
                else:
                    request = len(tokens)
                    tokens.append([])
                    owner.append((replica, lane))
                decodes = 0 if pause else len(running)
                end = now + float(rng.uniform(0.1, 1))
                steps.append(row(replica, lane, now, end, 1, 0.0, decodes, prefill=5))
                now = end
                for other in running if decodes else ():
                    tokens[other].append(now)
                    open_spans[other] = (open_spans[other][0], open_spans[other][1] + 1)
                tokens[request].append(now)
                open_spans[request] = (now, 1)
                running.add(request)
            elif running:
                count, first, slope = int(rng.integers(1, 6)), float(rng.uniform(0.1, 1)), float(rng.uniform(0, 0.05))
                end = now + count * first + slope * count * (count - 1) / 2
                steps.append(row(replica, lane, now, end, count, slope, len(running)))
                for j in range(count):
                    emitted = end if j == count - 1 else now + (j + 1) * first + slope * j * (j + 1) / 2
                    for other in running:
                        tokens[other].append(emitted)
                        open_spans[other] = (open_spans[other][0], open_spans[other][1] + 1)
                now = end
            else:
                now += float(rng.uniform(0, 1))
            for request in [r for r in running if rng.random() < 0.2]:  # finished
                running.discard(request)
        for request, span in open_spans.items():
            spans.append((request, replica, lane, *span))
    assume(tokens)
    interrupted = {request for request, count in Counter(span[0] for span in spans).items() if count > 1}
    frame = request_frame(
        arrival_s=np.zeros(len(tokens)),
        first_schedule_s=np.zeros(len(tokens)),
        first_token_s=[times[0] for times in tokens],
        finish_s=[times[-1] for times in tokens],
        prompt_tokens=[5] * len(tokens),
        output_tokens=[len(times) for times in tokens],
        rejected=False,
        replica=[replica for replica, _ in owner],
        lane=[lane for _, lane in owner],
        class_codes=np.arange(len(tokens)) % 2,
        class_names=["even", "odd"],
    )
    order = rng.permutation(len(steps))  # rows of different lanes come in any order
    log = step_frame(np.array(steps)[order].ravel())
    kept = span_frame([(*span, span[3]) for span in spans if span[0] in interrupted])
    return Result(frame, log, kept, totals(kv_blocks=(0, 0))), tokens


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(lanes())
def test_itl_is_what_counting_token_by_token_gives(case: tuple[Result, list[list[float]]]) -> None:
    result, tokens = case
    gaps, weights = itl(result)
    brute = np.sort(np.concatenate([np.diff(times) for times in tokens]))
    assert np.all(weights > 0)
    np.testing.assert_allclose(np.sort(np.repeat(gaps, weights)), brute, rtol=1e-9, atol=1e-12)
    metrics = summarize(result)
    assert metrics.overall.itl_s.count == len(brute)
    for parity, name in enumerate(["even", "odd"]):
        own = np.concatenate([np.diff(times) for times in tokens[parity::2]] or [np.empty(0)])
        assert metrics.classes[name].itl_s.count == len(own)
        if len(own):
            assert metrics.classes[name].itl_s.p90 == pytest.approx(np.quantile(own, 0.9), rel=1e-9)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["chunked", "prefill-first", "orca", "static"]),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([300, 600, 4000]),
)
def test_itl_of_the_engine_is_that_of_the_oracles_tokens(seed: int, policy: str, block: int, tokens: int) -> None:
    """Jumps of many steps, preemptions and resumptions included (small KV pools, long answers)."""
    rng = np.random.default_rng(seed)
    count = 30
    arrivals = np.cumsum(rng.exponential(1e-2, count))
    prompts, outputs = rng.integers(1, 60, count), rng.integers(1, 200, count)
    config = engine.SchedulerConfig(policy, 8, 300, block, 300)
    steps = engine.model()
    deployment = engine.Deployment(
        [engine.ReplicaSpec(steps, engine.Mapping(), config, tokens // block, engine.DEVICE)]
    )
    result = simulate(deployment, engine.Requests(arrivals, prompts, outputs))
    told = engine.oracle.run_oracle(
        engine.oracle_config(config, tokens // block), steps.step_s, arrivals, prompts, outputs, tokens=True
    )
    gaps, weights = itl(result)
    brute = np.sort(np.concatenate([np.diff(times) for times in told["token_s"]]))
    np.testing.assert_allclose(np.sort(np.repeat(gaps, weights)), brute, rtol=1e-7, atol=1e-9)


def test_itl_of_a_million_steps_in_one_row_stays_small() -> None:
    """Mean TPOT and mean ITL of one request are the same number, however the steps are stored."""
    steps = 1_500_000
    log = step_frame(np.array(row(0, 0, 1.0, 1.0 + 0.01 * steps, steps, 0.0, 1)))
    frame = request_frame(
        arrival_s=[0.0],
        first_schedule_s=[0.5],
        first_token_s=[1.0],
        finish_s=[1.0 + 0.01 * steps],
        prompt_tokens=[5],
        output_tokens=[steps + 1],
        rejected=[False],
    )
    result = Result(frame, log, span_frame([]), totals())
    gaps, weights = itl(result)
    assert int(weights.sum()) == steps
    assert float(gaps @ weights) / steps == pytest.approx(float(frame["tpot_s"].iloc[0]))


def test_a_log_that_lacks_steps_is_a_bug_and_says_whose() -> None:
    frame = request_frame(
        arrival_s=[0.0],
        first_schedule_s=[0.0],
        first_token_s=[1.0],
        finish_s=[3.0],
        prompt_tokens=[1],
        output_tokens=[3],
        rejected=[False],
    )
    log = step_frame(np.array([row(0, 0, 1.0, 2.0, 1, 0.0, 1)]))
    with pytest.raises(ValueError, match="request 0 emits more tokens"):
        itl(Result(frame, log, None, totals()))


# --- summary


def by_hand() -> Result:
    """Four requests in 10 s on 4 GPUs: a good chat, a slow chat, a batch request, a rejected one."""
    frame = request_frame(
        arrival_s=[0.0, 1.0, 2.0, 3.0],
        first_schedule_s=[0.0, 3.0, 2.0, nan],
        first_token_s=[1.0, 5.0, 4.0, nan],
        finish_s=[3.0, 9.0, 10.0, nan],
        prompt_tokens=[100, 100, 100, 100],
        output_tokens=[5, 5, 31, 5],
        rejected=[False, False, False, True],
        preemptions=[0, 2, 0, 0],
        class_codes=[0, 0, 1, 0],
        class_names=["chat", "batch"],
    )
    log = step_frame(np.array([row(0, 0, 0.0, 4.0, 1, 0.0, 0, 5, kv=50), row(1, 0, 5.0, 10.0, 1, 0.0, 0, 5, kv=100)]))
    return Result(frame, log.assign(decode_sequences=0), span_frame([]), totals())


def test_the_summary_of_four_requests_by_hand() -> None:
    result = by_hand()
    frame = result.requests
    metrics = summarize(
        Result(frame, None, None, result.totals),
        {"chat": [Limit("ttft", "p99", 2.0), Limit("tpot", "p99", 0.6)], "batch": [Limit("e2e", "mean", 60.0)]},
    )
    overall, chat = metrics.overall, metrics.classes["chat"]
    assert (overall.requests, overall.finished, overall.rejected, overall.preemptions) == (4, 3, 1, 2)
    assert (chat.ttft_s.mean, chat.ttft_s.p50, chat.e2e_s.mean) == (2.5, 2.5, 5.5)
    assert chat.tpot_s.p50 == pytest.approx(0.75)
    assert chat.slo_attainment == pytest.approx(1 / 3)
    assert overall.slo_attainment == pytest.approx(0.5)
    assert overall.goodput_requests_per_s == pytest.approx(0.2)
    assert metrics.goodput_requests_per_s_per_gpu == pytest.approx(0.05)
    assert overall.output_tokens_per_s == pytest.approx(4.1)
    assert overall.total_tokens_per_s == pytest.approx(34.1)
    assert metrics.output_tokens_per_s_per_gpu == pytest.approx(1.025)
    assert metrics.mfu == pytest.approx(0.2)
    assert metrics.mbu == pytest.approx(0.25)
    assert metrics.j_per_output_token == pytest.approx(5000 / 41)
    assert metrics.usd_per_million_output_tokens == pytest.approx(0.01 / 4.1 * 1e6)
    assert metrics.queue_mean == pytest.approx(0.2)  # one request waits 2 s of 10
    assert metrics.queue_max == 1
    assert np.isnan(metrics.kv_use_mean)
    assert overall.itl_s.count == 0


def test_kv_use_is_over_time_and_blocks() -> None:
    result = by_hand()
    idle = result.requests.assign(finish_s=nan)  # no tokens to look for in the steps
    metrics = summarize(Result(idle, result.steps, result.spans, result.totals))
    assert metrics.kv_use_mean == pytest.approx((0.5 * 4 + 1.0 * 5) / 20)
    assert metrics.kv_use_max == 1.0


def test_limits_are_judged_by_class_or_together() -> None:
    result = by_hand()
    assert meets(result, {"batch": [Limit("e2e", "max", 8.0)]})
    assert not meets(result, {"batch": [Limit("e2e", "max", 7.9)]})
    assert not meets(result, {"chat": [Limit("ttft", "max", 60.0)]})  # one was rejected
    assert meets(result, [Limit("ttft", "p50", 3.0)])


def test_a_window_measures_the_requests_that_arrive_in_it() -> None:
    result = by_hand()
    measured = summarize(
        Result(result.requests, None, None, result.totals), [Limit("e2e", "max", 8.0)], Window(warmup=0.5, cooldown=0.5)
    )
    assert measured.duration_s == 2.0
    assert measured.overall.requests == 2
    assert measured.overall.goodput_requests_per_s == pytest.approx(1.0)
    # From 0.5 s to 2.5 s: one first token, and 1.5 s of the 2 s over which it emits 4 more; half of its prompt, and
    # 0.5 s of the 2 s of the batch request's.
    assert measured.overall.output_tokens_per_s == pytest.approx((1 + 3) / 2)
    assert measured.overall.total_tokens_per_s == pytest.approx((1 + 3 + 50 + 25) / 2)
    half = summarize(Result(result.requests, None, None, result.totals), window=Window(0.5, 0.0, fraction=True))
    assert half.overall.requests == 2


@pytest.mark.parametrize("window", [Window(2, 1), Window(0.5, 0.5, fraction=True), Window(1e9)])
def test_a_window_that_leaves_nothing_is_refused(window: Window) -> None:
    with pytest.raises(MetricError, match="leave nothing to measure"):
        summarize(by_hand(), window=window)


@pytest.mark.parametrize("value", [-1.0, nan, np.inf])
def test_a_window_of_no_length_is_refused(value: float) -> None:
    with pytest.raises(MetricError, match="finite number of at least 0"):
        Window(warmup=value)


def test_requests_are_conserved_over_classes() -> None:
    metrics = summarize(plain(1000, classes=3), [Limit("ttft", "p99", 1.0)])
    for name in ("requests", "finished", "rejected", "goodput_requests_per_s", "output_tokens_per_s"):
        parts = sum(getattr(part, name) for part in metrics.classes.values())
        assert parts == pytest.approx(getattr(metrics.overall, name))


@given(st.integers(0, 1000))
def test_the_queue_follows_littles_law_and_the_definition(seed: int) -> None:
    result = plain(60, seed)
    frame = result.requests[~result.requests["rejected"]]
    metrics = summarize(result)
    assert metrics.queue_mean == pytest.approx(frame["queue_s"].sum() / result.totals.makespan_s)
    arrival, schedule = frame["arrival_s"].to_numpy(), frame["first_schedule_s"].to_numpy()
    assert metrics.queue_max == max(int(((arrival <= t) & (schedule > t)).sum()) for t in arrival)


def test_a_run_without_requests_has_no_statistics() -> None:
    empty = request_frame(
        arrival_s=[],
        first_schedule_s=[],
        first_token_s=[],
        finish_s=[],
        prompt_tokens=[],
        output_tokens=[],
        rejected=[],
    )
    metrics = summarize(Result(empty, None, None, totals(makespan_s=0.0)))
    assert metrics.overall.requests == 0
    assert metrics.as_dict()["overall"]["ttft_s"]["p99"] is None


def test_a_run_of_rejected_requests_has_no_statistics() -> None:
    frame = request_frame(
        arrival_s=[1.0],
        first_schedule_s=[nan],
        first_token_s=[nan],
        finish_s=[nan],
        prompt_tokens=[9],
        output_tokens=[9],
        rejected=[True],
    )
    metrics = summarize(
        Result(frame, step_frame([]), span_frame([]), totals(makespan_s=0.0)), [Limit("ttft", "p99", 1.0)]
    )
    assert metrics.overall.slo_attainment == 0.0
    assert np.isnan(metrics.j_per_output_token)


# --- replications


def shifted(mean_s: float) -> Callable[[int], Result]:
    def run(seed: int) -> Result:
        rng = np.random.default_rng(seed)
        first = rng.exponential(mean_s, 50)
        frame = request_frame(
            arrival_s=np.zeros(50),
            first_schedule_s=np.zeros(50),
            first_token_s=first,
            finish_s=first + 1,
            prompt_tokens=np.ones(50),
            output_tokens=np.ones(50),
            rejected=False,
        )
        return Result(frame, None, None, totals())

    return run


def test_intervals_cover_the_known_mean_about_as_often_as_they_say() -> None:
    run = shifted(2.0)
    covered = 0
    for trial in range(60):
        table = replicate(run, range(10 * trial, 10 * trial + 10))
        row = table.loc["ttft_s.mean"]
        covered += abs(row["mean"] - 2.0) <= row["half_width"]
    assert stats.binom.cdf(covered, 60, 0.95) > 1e-3


def test_the_interval_is_students() -> None:
    run = shifted(2.0)
    means = [float(run(seed).requests["ttft_s"].mean()) for seed in range(5)]
    row = replicate(run, range(5), confidence=0.9).loc["ttft_s.mean"]
    low, high = stats.t.interval(0.9, 4, np.mean(means), stats.sem(means))
    assert (row["mean"] - row["half_width"], row["mean"] + row["half_width"]) == pytest.approx((low, high))
    assert row["runs"] == 5


def test_one_run_has_no_interval_and_none_no_table() -> None:
    run = shifted(1.0)
    assert replicate(run, [1])["half_width"].isna().all()
    with pytest.raises(MetricError, match="seeds is empty"):
        replicate(run, [])
    with pytest.raises(MetricError, match="confidence"):
        replicate(run, [1], confidence=95)
