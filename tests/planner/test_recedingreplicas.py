"""A replica whose steps a program decides loses nothing, keeps its TBT limit, and pays for its decisions."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.hardware import load_device
from hwmodels.layergroups import LayerGroups
from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel, Tables
from planner.errors import NoFeasiblePlanError, PlanError
from planner.prefillcosts import Span
from planner.prefilllinear import Ranges, TableClock, linearise
from planner.recedingreplicas import RecedingSpec, receding_spec
from planner.recedingscheduler import Receding, RecedingScheduler
from simulator.deployment import Deployment, ReplicaSpec
from simulator.errors import PoolError
from simulator.itl import itl
from simulator.log import Log
from simulator.scheduler import SchedulerConfig
from simulator.simulate import run, simulate
from simulator.workload import Requests, Workload

MAX_TOKENS, MAX_SEQS = 256, 16
DEVICE = load_device("h100-sxm")
ENGINE = Engine("test", "test", {"default": "vllm"}, 1e-3, 1e-5, 0.0, 1.0, 0.0, 0.9, 0.0)
CHECKED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def model() -> StepModel:
    """Linear in tokens, in sequences and in what they attend to."""
    n, s = np.arange(MAX_TOKENS + 1.0), np.arange(MAX_SEQS + 1.0)
    tables, half = (
        Tables(
            linear=(share * (2e-3 + 1e-5 * n)).tolist(),
            shared=np.zeros(4 * MAX_TOKENS + 1).tolist(),
            head=(1e-5 * s).tolist(),
            decode=Pieces((), ((1e-5 * (s > 0)).tolist(),), ((1e-7 * s).tolist(),)),
            prefill=Pieces((), ((share * 1e-6 * n).tolist(),), ((share * 1e-8 * n).tolist(),)),
        )
        for share in (1.0, 0.5)
    )
    zero = np.zeros(4 * MAX_TOKENS + 1).tolist()
    empty = Pieces((), (zero,), (zero,))
    layers = LayerGroups(["one", "two"], lambda _: half, Tables(zero, zero, zero, empty, empty))  # type: ignore[list-item]
    return StepModel([tables], np.zeros(MAX_TOKENS + 1).tolist(), ENGINE, MAX_TOKENS, MAX_SEQS, lambda: layers)


MODEL = model()
CLOCK = TableClock(MODEL, 2)
LINEAR = linearise(CLOCK, Ranges((1, 200), (0, 200), (0, 12), (10, 200))).step
FLOOR_S = CLOCK.step_s(1, 1, ())


def spec(config: SchedulerConfig, blocks: int, tbt_s: float, **rule: float | str) -> RecedingSpec:
    plain = ReplicaSpec(MODEL, Mapping(), config, blocks, DEVICE)
    return receding_spec(plain, Receding(LINEAR, tbt_s, 3, **{"decision_s": 1e-4, **rule}))  # type: ignore[arg-type]


@st.composite
def replicas(draw: st.DrawFn) -> RecedingSpec:
    """Few blocks, few seats, tight limits: everything is short at some time."""
    config = SchedulerConfig(
        max_seqs=draw(st.sampled_from([1, 3, 12])),
        token_budget=draw(st.sampled_from([40, 200])),
        block_tokens=draw(st.sampled_from([1, 16])),
        max_context_tokens=draw(st.sampled_from([100, 240])),
    )
    blocks = draw(st.sampled_from([320, 800, 40_000])) // config.block_tokens
    tbt_s = draw(st.sampled_from([1.05 * FLOOR_S, 2 * FLOOR_S, inf]))
    axis = draw(st.sampled_from(["tokens", "layers"]))
    return spec(config, blocks, tbt_s, ageing_per_s=draw(st.sampled_from([0.0, 10.0])), axis=axis)


@st.composite
def traffic(draw: st.DrawFn, longest: int = 120) -> Requests:
    count = draw(st.integers(1, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gap_s = draw(st.sampled_from([0.0, 2e-3, 2e-2]))
    arrival_s = np.cumsum(rng.exponential(gap_s, count)) if gap_s else np.zeros(count)
    outputs = rng.integers(1, draw(st.sampled_from([2, 30, longest])) + 1, count)
    return Requests(arrival_s, rng.integers(1, longest + 1, count), outputs)


@CHECKED
@given(replicas(), traffic(), st.one_of(st.none(), st.integers(1, 9)))
def test_requests_and_blocks_are_conserved(one: RecedingSpec, requests: Requests, concurrency: int | None) -> None:
    """Offered = finished + rejected; queues end empty and all KV blocks free; each request's times are in order."""
    started = []

    class Watched(RecedingSpec):
        __slots__ = ()

        def start(self, prompts: list[int], outputs: list[int], log: Log, index: int):  # type: ignore[no-untyped-def]
            started.append(super().start(prompts, outputs, log, index))
            return started[-1]

    watched = Watched(one.model, one.mapping, one.scheduler, one.kv_blocks, one.device, rule=one.rule)
    log = run(Deployment([watched]), Workload(requests, concurrency=concurrency))
    schedule, first, finish = (np.array(t) for t in (log.first_schedule_s, log.first_token_s, log.finish_s))
    served = np.isfinite(finish)
    rejected = np.zeros(len(requests), dtype=bool)
    rejected[log.rejected] = True
    assert (served ^ rejected).all()
    assert (log.arrival_s[served] <= schedule[served] + 1e-12).all()
    assert (schedule[served] < first[served]).all()
    assert (first[served] <= finish[served]).all()
    scheduler = started[0].schedulers[0]
    assert isinstance(scheduler, RecedingScheduler)
    assert scheduler.free == scheduler.kv_blocks
    assert (scheduler.reserved, scheduler.running, scheduler.unfinished, len(scheduler.waiting)) == (0, 0, 0, 0)
    assert (scheduler.progress, scheduler.partial) == ({}, -1)
    assert scheduler.peak_seqs <= one.scheduler.max_seqs


@CHECKED
@given(replicas(), traffic())
def test_tokens_are_conserved(one: RecedingSpec, requests: Requests) -> None:
    """Every token asked for is emitted once, whatever was preempted; prompts are computed once, or again after it."""
    result = simulate(Deployment([one]), requests)
    served = result.requests[~result.requests.rejected]
    assert result.steps is not None and result.spans is not None
    decoded = int((result.steps.steps * result.steps.decode_sequences).sum())
    assert decoded + len(served) - result.spans.request.nunique() + len(result.spans) == served.output_tokens.sum()
    computed = result.steps.prefill_tokens.sum()
    assert computed >= served.prompt_tokens.sum()
    if not served.preemptions.any():
        assert computed == served.prompt_tokens.sum()
    assert (result.steps.prefill_tokens + result.steps.decode_sequences <= one.scheduler.token_budget).all()


@CHECKED
@given(replicas(), traffic())
def test_no_step_with_prompts_and_decodes_takes_longer_than_the_limit(one: RecedingSpec, requests: Requests) -> None:
    """The decision included."""
    steps = simulate(Deployment([one]), requests).steps
    assert steps is not None
    both = steps[(steps.prefill_tokens > 0) & (steps.decode_sequences > 0)]
    assert (both.end_s - both.start_s <= one.rule.tbt_s * (1 + 1e-9) + 1e-12).all()


@CHECKED
@given(replicas(), traffic())
def test_same_arguments_same_result(one: RecedingSpec, requests: Requests) -> None:
    """Where a decision is charged a given time, nothing depends on the machine."""
    first, second = (simulate(Deployment([one]), requests, seed=3) for _ in range(2))
    for name in ("requests", "steps", "spans"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name), check_exact=True)


@CHECKED
@given(replicas(), traffic(), st.integers(0, 2**32 - 1))
def test_decisions_do_not_know_output_lengths(one: RecedingSpec, requests: Requests, seed: int) -> None:
    """Until the first request whose output differs would end, all decisions are those of the run with other outputs."""
    longest = one.scheduler.max_context_tokens - int(requests.prompt_tokens.max())
    assume(longest > 1)
    rng = np.random.default_rng(seed)
    ours = np.minimum(requests.output_tokens, longest)
    theirs = np.where(rng.random(len(ours)) < 0.5, rng.permutation(ours), ours)
    runs = [run(Deployment([one]), replace(requests, output_tokens=outputs)) for outputs in (ours, theirs)]
    assume(not runs[0].rejected and not runs[1].rejected)
    until_s = np.minimum(*(np.array(log.finish_s) for log in runs))[ours != theirs].min(initial=np.inf)
    for name in ("first_schedule_s", "first_token_s"):
        times = np.array([getattr(log, name) for log in runs])
        early = times.min(axis=0) < until_s - 1e-9
        np.testing.assert_allclose(times[0][early], times[1][early], rtol=1e-9, atol=1e-12, err_msg=name)


def test_decisions_are_paid_for() -> None:
    """A prompt alone takes a step and a decision; the ledger says so."""
    config = SchedulerConfig(max_seqs=4, token_budget=200, max_context_tokens=240)
    one = spec(config, 1000, inf, decision_s=0.25)
    frame = simulate(Deployment([one]), Requests(np.zeros(1), np.array([100]), np.array([3]))).requests
    assert frame.ttft_s[0] == pytest.approx(0.25 + CLOCK.step_s(0, 0, [Span(100, 0, 0, 2)]))
    assert (one.ledgers[0].solved, one.ledgers[0].fell_back, one.ledgers[0].seconds) == (1, 0, [0.25])


def test_a_short_prompt_passes_a_long_one_that_is_half_computed() -> None:
    """Both are in prefill at a time, which one chunk at a time could not do."""
    config = SchedulerConfig(max_seqs=4, token_budget=40, max_context_tokens=240)
    requests = Requests(np.array([0.0, 1e-3]), np.array([200, 20]), np.array([2, 2]))
    frame = simulate(Deployment([spec(config, 1000, inf)]), requests).requests
    assert frame.first_token_s[1] < frame.first_token_s[0]
    chunked = simulate(Deployment([ReplicaSpec(MODEL, Mapping(), config, 1000, DEVICE)]), requests).requests
    assert chunked.first_token_s[1] >= chunked.first_token_s[0]


def test_a_prompt_that_does_not_fit_goes_through_the_layers_in_groups() -> None:
    """Beside a decode, under a limit that half of the layers keep and all of them do not."""
    config = SchedulerConfig(max_seqs=4, token_budget=244, max_context_tokens=240)
    half, every = (MODEL.group_step_s(1, 30, [(200, 0)], 0, groups) for groups in (2, 1))
    requests = Requests(np.array([0.0, 0.02]), np.array([10, 200]), np.array([40, 2]))
    one = spec(config, 1000, (half + every) / 2, axis="layers")
    result = simulate(Deployment([one]), requests)
    assert result.steps is not None
    first, last = result.requests.first_schedule_s[1], result.requests.first_token_s[1]
    inside = result.steps[(result.steps.start_s >= first - 1e-12) & (result.steps.end_s <= last + 1e-12)]
    assert inside.steps.sum() == 2
    assert (inside.decode_sequences == 1).all()
    assert (inside.end_s - inside.start_s <= one.rule.tbt_s).all()
    assert len(one.ledgers[0].seconds) == 2  # one for each prompt: none between the groups


def test_prompts_wait_for_a_decision_that_takes_all_of_its_step() -> None:
    """The step that is decided in has the decode alone; the prompt's first layers follow in the next one."""
    config = SchedulerConfig(max_seqs=4, token_budget=244, max_context_tokens=240)
    half = MODEL.group_step_s(1, 30, [(200, 0)], 0, 2)
    requests = Requests(np.array([0.0, 0.02]), np.array([10, 200]), np.array([40, 2]))
    least = CLOCK.step_s(1, 30, [Span(1, 0, 0, 1)])
    one = spec(config, 1000, 1.02 * half, axis="layers", decision_s=1.01 * half - least)
    result = simulate(Deployment([one]), requests)
    assert result.steps is not None
    inside = result.steps[(result.steps.start_s > 0.02 - 1e-12) & (result.steps.prefill_tokens == 0)]
    assert result.requests.first_schedule_s[1] > 0.02 + one.rule.decision_s  # type: ignore[operator]
    assert ((inside.end_s - inside.start_s) / inside.steps <= one.rule.tbt_s).all()
    assert itl(result)[0].max() <= one.rule.tbt_s * (1 + 1e-9)


def test_without_time_for_the_solver_chunks_are_taken_and_counted() -> None:
    config = SchedulerConfig(max_seqs=8, token_budget=64, max_context_tokens=240)
    one = spec(config, 1000, 2 * FLOOR_S, seconds=1e-9)
    requests = Requests(np.zeros(8), np.full(8, 100), np.full(8, 5))
    frame = simulate(Deployment([one]), requests).requests
    ledger = one.ledgers[0]
    assert frame.finish_s.notna().all()
    assert ledger.fell_back > 0
    assert sum(ledger.reasons.values()) == ledger.fell_back
    assert "no solution in 1e-09 s" in ledger.reasons


def test_measured_decisions_are_charged_what_they_take() -> None:
    config = SchedulerConfig(max_seqs=4, token_budget=200, max_context_tokens=240)
    one = spec(config, 1000, inf)
    one = receding_spec(one, replace(one.rule, decision_s=None))
    frame = simulate(Deployment([one]), Requests(np.zeros(1), np.array([100]), np.array([1]))).requests
    (taken,) = one.ledgers[0].seconds
    assert taken > 0
    assert frame.ttft_s[0] == pytest.approx(taken + CLOCK.step_s(0, 0, [Span(100, 0, 0, 2)]))


def test_gaps_keep_the_limit_where_nothing_is_preempted() -> None:
    rng = np.random.default_rng(0)
    requests = Requests(np.sort(rng.uniform(0, 1, 60)), rng.integers(1, 150, 60), rng.integers(2, 60, 60))
    config = SchedulerConfig(max_seqs=6, token_budget=200, max_context_tokens=240)
    tbt_s = 1.4 * FLOOR_S
    result = simulate(Deployment([spec(config, 10_000, tbt_s)]), requests)
    assert not result.requests.preemptions.any()
    assert itl(result)[0].max() <= tbt_s * (1 + 1e-9)


def test_what_cannot_be_is_refused() -> None:
    config = SchedulerConfig(max_seqs=4, token_budget=64)
    plain = ReplicaSpec(MODEL, Mapping(pp=2), config, 100, DEVICE)
    with pytest.raises(PoolError, match="receding horizon with pp=2"):
        receding_spec(plain, Receding(LINEAR))
    with pytest.raises(NoFeasiblePlanError, match="which is the floor"):
        spec(config, 100, 0.5 * FLOOR_S)
    with pytest.raises(PlanError, match="horizon of 0 steps: expected at least 1"):
        Receding(LINEAR, steps=0)
    with pytest.raises(PlanError, match="decision_s=-1"):
        Receding(LINEAR, decision_s=-1.0)
