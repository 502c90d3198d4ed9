"""The compressed engine gives every request the times that the step-by-step oracle gives it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.hardware import load_device
from hwmodels.layergroups import LayerGroups
from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel, Tables
from simulator.deployment import Deployment, ReplicaSpec
from simulator.lockstep import LockstepReplica
from simulator.lockstepstages import StagedLockstepReplica
from simulator.log import Log
from simulator.orders import ORDERS
from simulator.pipeline import PipelineReplica
from simulator.scheduler import Scheduler, SchedulerConfig
from simulator.simulate import _alone, run
from simulator.workload import Requests, Workload

spec = importlib.util.spec_from_file_location("oracle", Path(__file__).with_name("oracle.py"))
assert spec is not None and spec.loader is not None
oracle = importlib.util.module_from_spec(spec)
__import__("sys").modules["oracle"] = oracle
spec.loader.exec_module(oracle)

MAX_TOKENS, MAX_SEQS = 512, 32
POLICIES = ("chunked", "prefill-first", "orca", "static")
ENGINE = Engine(
    name="test",
    source="test",
    kernels={"default": "vllm"},
    step_overhead_s=1e-3,
    sequence_overhead_s=1e-5,
    prompt_overhead_s=3e-3,
    unfused=1.0,
    request_overhead_s=0.0,
    memory_fraction=0.9,
    reserve_bytes=0.0,
)


def tables(scale: float, knots: tuple[float, ...], attention_s: float = 1e-7) -> Tables:
    """A stage with fixed, linear and attention parts; with knots, attention gets dearer beyond each.

    attention_s   seconds a cached token
    """
    n = np.arange(MAX_TOKENS + 1, dtype=float)
    s = np.arange(MAX_SEQS + 1, dtype=float)

    def pieces(rows: np.ndarray, unit: float) -> Pieces:
        slopes = [unit * (piece + 1) for piece in range(len(knots) + 1)]
        base, bases = 0.0, []
        for piece in range(len(slopes)):
            if piece:
                base += (slopes[piece - 1] - slopes[piece]) * knots[piece - 1]
            bases.append(base)
        return Pieces(
            knots,
            tuple((rows * b + 1e-5 * (rows > 0)).tolist() for b in bases),
            tuple((rows * slope).tolist() for slope in slopes),
        )

    return Tables(
        linear=(scale * (2e-3 + 1e-5 * n)).tolist(),
        shared=(scale * 1e-5 * np.arange(16 * MAX_TOKENS + 1)).tolist(),
        head=(scale * 1e-5 * s).tolist(),
        decode=pieces(s, scale * attention_s),
        prefill=pieces(n, scale * attention_s),
    )


def model(stages: int = 1, knots: tuple[float, ...] = ()) -> StepModel:
    scales = [1.0 + 0.3 * stage for stage in range(stages)]
    transfer = (1e-4 + 1e-7 * np.arange(MAX_TOKENS + 1)).tolist()
    stage_tables = [tables(scale, knots) for scale in scales]
    layers = LayerGroups(["a", "b", "b"], lambda kind: tables(0.2 if kind == "a" else 0.4, knots), tables(0.01, ()))  # type: ignore[list-item]
    return StepModel(stage_tables, transfer, ENGINE, MAX_TOKENS, MAX_SEQS, lambda: layers)


@st.composite
def cases(draw: st.DrawFn, layered: bool = False) -> tuple[SchedulerConfig, int, list[float], list[int], list[int]]:
    count = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    gap = draw(st.sampled_from([0.0, 1e-3, 1e-2, 1e-1]))
    arrivals = np.cumsum(rng.exponential(gap, count) if gap else np.zeros(count))
    longest = draw(st.sampled_from([8, 60, 300]))
    prompts = rng.integers(1, longest + 1, count)
    outputs = rng.integers(1, draw(st.sampled_from([2, 30, 200])) + 1, count)
    policy = draw(st.sampled_from(POLICIES))
    max_seqs = draw(st.sampled_from([1, 3, 8, MAX_SEQS]))
    budget = draw(st.sampled_from([32, 100, MAX_TOKENS]))
    block = draw(st.sampled_from([1, 4, 16]))
    blocks = draw(st.sampled_from([20, 60, 200, 4000])) * 16 // block
    if layered:
        policy = "layered"
    config = SchedulerConfig(
        policy,
        max_seqs,
        budget,
        block,
        draw(st.sampled_from([128, 600])),
        chunk_tokens=draw(st.sampled_from([None, None, 5, 30])) if policy == "chunked" else None,
        group_tokens=draw(st.sampled_from([7, 50, 300])),
        max_groups=draw(st.sampled_from([2, 5])),
        order="fcfs" if policy == "static" else draw(st.sampled_from(("fcfs", *ORDERS))),
        ageing_tokens_per_s=draw(st.sampled_from([0.0, 500.0])),
        targets_s=(0.05, 0.3),
    )
    return config, blocks, arrivals.tolist(), prompts.tolist(), outputs.tolist()


def requests_of(arrivals: list[float], prompts: list[int], outputs: list[int]) -> Requests:
    classes = [oracle.slo_class(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    return Requests(np.array(arrivals), np.array(prompts), np.array(outputs), np.array(classes), ("a", "b", "c"))


def same(log: object, expected: dict[str, np.ndarray]) -> None:
    for name in ("first_schedule_s", "first_token_s", "finish_s"):
        np.testing.assert_allclose(np.array(getattr(log, name)), expected[name], rtol=1e-9, atol=1e-12, err_msg=name)
    count = len(expected["finish_s"])
    rejected = np.zeros(count, dtype=bool)
    rejected[log.rejected] = True  # type: ignore[attr-defined]
    np.testing.assert_array_equal(rejected, expected["rejected"])
    preemptions = [log.preemptions.get(i, 0) for i in range(count)]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(preemptions, expected["preemptions"])


def oracle_config(config: SchedulerConfig, blocks: int) -> object:
    return oracle.OracleConfig(
        config.policy, config.max_seqs, config.token_budget, config.block_tokens, config.max_context_tokens, blocks,
        config.chunk_tokens, config.group_tokens, config.max_groups, config.order, config.ageing_tokens_per_s,
        config.targets_s,
    )  # fmt: skip


CHECKED = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DEVICE = load_device("h100-sxm")


@CHECKED
@given(cases(), st.sampled_from([(), (40.0,), (10.0, 100.0)]))
def test_one_scheduler(
    case: tuple[SchedulerConfig, int, list[float], list[int], list[int]], knots: tuple[float, ...]
) -> None:
    config, blocks, arrivals, prompts, outputs = case
    steps = model(knots=knots)
    deployment = Deployment([ReplicaSpec(steps, Mapping(), config, blocks, DEVICE)])
    log = run(deployment, requests_of(arrivals, prompts, outputs), record=True)
    same(log, oracle.run_oracle(oracle_config(config, blocks), steps.step_s, arrivals, prompts, outputs))


@CHECKED
@given(cases(layered=True), st.sampled_from([(), (40.0,)]), st.one_of(st.none(), st.integers(1, 12)))
def test_prompts_in_groups_of_layers(
    case: tuple[SchedulerConfig, int, list[float], list[int], list[int]],
    knots: tuple[float, ...],
    concurrency: int | None,
) -> None:
    config, blocks, arrivals, prompts, outputs = case
    steps = model(knots=knots)
    deployment = Deployment([ReplicaSpec(steps, Mapping(), config, blocks, DEVICE)])
    log = run(deployment, Workload(requests_of(arrivals, prompts, outputs), concurrency=concurrency))
    limits, timed = oracle_config(config, blocks), {"group_step_s": steps.group_step_s}
    if concurrency is None:
        same(log, oracle.run_oracle(limits, steps.step_s, arrivals, prompts, outputs, **timed))
    else:
        same(log, oracle.run_oracle_closed_loop(limits, steps.step_s, concurrency, prompts, outputs, **timed))


@CHECKED
@given(cases(), st.integers(1, 12))
def test_closed_loop(case: tuple[SchedulerConfig, int, list[float], list[int], list[int]], concurrency: int) -> None:
    config, blocks, arrivals, prompts, outputs = case
    steps = model()
    deployment = Deployment([ReplicaSpec(steps, Mapping(), config, blocks, DEVICE)])
    workload = Workload(requests_of(arrivals, prompts, outputs), concurrency=concurrency)
    log = run(deployment, workload)
    same(log, oracle.run_oracle_closed_loop(oracle_config(config, blocks), steps.step_s, concurrency, prompts, outputs))


@CHECKED
@given(cases(), st.integers(2, 4))
def test_pipeline(case: tuple[SchedulerConfig, int, list[float], list[int], list[int]], stages: int) -> None:
    config, blocks, arrivals, prompts, outputs = case
    steps = model(stages)
    deployment = Deployment([ReplicaSpec(steps, Mapping(pp=stages), config, blocks // stages, DEVICE)])
    log = run(deployment, requests_of(arrivals, prompts, outputs))
    expected = oracle.run_oracle_pipeline(
        oracle_config(config, blocks),
        stages,
        steps.stages_s,
        lambda tokens: steps.transfer[tokens],
        arrivals,
        prompts,
        outputs,
    )
    same(log, expected)


@CHECKED
@given(cases(), st.integers(2, 5), st.sampled_from([(), (40.0,)]))
def test_attention_data_parallel(
    case: tuple[SchedulerConfig, int, list[float], list[int], list[int]], groups: int, knots: tuple[float, ...]
) -> None:
    config, blocks, arrivals, prompts, outputs = case
    steps = model(knots=knots)
    deployment = Deployment([ReplicaSpec(steps, Mapping(attention_dp=groups, ep=groups), config, blocks, DEVICE)])
    log = run(deployment, requests_of(arrivals, prompts, outputs))
    same(
        log,
        oracle.run_oracle_lockstep(oracle_config(config, blocks), groups, steps.lockstep_s, arrivals, prompts, outputs),
    )


@CHECKED
@given(cases(), st.integers(2, 3), st.integers(1, 4), st.sampled_from([(), (40.0,), (10.0, 100.0)]))
def test_attention_data_parallel_in_stages(
    case: tuple[SchedulerConfig, int, list[float], list[int], list[int]],
    stages: int,
    groups: int,
    knots: tuple[float, ...],
) -> None:
    config, blocks, arrivals, prompts, outputs = case
    steps = model(stages, knots)
    mapping = Mapping(pp=stages, attention_dp=groups, ep=groups)
    spec = ReplicaSpec(steps, mapping, config, blocks // stages, DEVICE)
    expected = oracle.run_oracle_staged_lockstep(
        oracle_config(config, blocks),
        stages,
        groups,
        steps.lockstep_stages_s if groups > 1 else lambda batches: steps.stages_s(*batches[0]),
        lambda tokens: steps.transfer[tokens],
        arrivals,
        prompts,
        outputs,
    )
    for record in (False, True):  # steps that are recorded are taken one by one
        log = run(Deployment([spec]), requests_of(arrivals, prompts, outputs), record=record)
        same(log, expected)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_group_of_many_short_requests_overtakes_one_of_few_long_ones(stages: int) -> None:
    """Within a run of unchanging batches another group becomes the slowest, in each stage at its own step."""
    scales = [1.0 + 0.3 * stage for stage in range(stages)]
    each = [tables(scale, (), attention_s) for scale, attention_s in zip(scales, (1e-5, 3e-5, 2e-6), strict=False)]
    steps = StepModel(each, [1e-4] * (MAX_TOKENS + 1), ENGINE, MAX_TOKENS, MAX_SEQS)
    # Requests take turns between the two groups of the first micro-batch, then between those of the next.
    long, short = [250] * 2, [3] * 14
    prompts = [length for pair in zip(long + [1] * 12, short, strict=True) for length in pair]
    outputs = [150 if length > 1 else 1 for length in prompts]
    arrivals = [0.0] * len(prompts)
    config = SchedulerConfig("chunked", MAX_SEQS, MAX_TOKENS, 16, 600)
    spec = ReplicaSpec(steps, Mapping(attention_dp=2, ep=2, pp=stages), config, 4000, DEVICE)
    log = run(Deployment([spec]), requests_of(arrivals, prompts, outputs))
    expected = oracle.run_oracle_staged_lockstep(
        oracle_config(config, 4000 * stages),
        stages,
        2,
        steps.lockstep_stages_s,
        lambda tokens: steps.transfer[tokens],
        arrivals,
        prompts,
        outputs,
    )
    same(log, expected)


@CHECKED
@given(cases(), st.integers(1, 4), st.sampled_from([(), (40.0,)]))
def test_one_group_in_stages_is_a_pipeline_and_groups_in_one_stage_are_in_lockstep(
    case: tuple[SchedulerConfig, int, list[float], list[int], list[int]], width: int, knots: tuple[float, ...]
) -> None:
    """The same times, to the last bits, whichever of the classes serves the requests."""
    config, blocks, arrivals, prompts, outputs = case
    requests = requests_of(arrivals, prompts, outputs)

    def times(kind: Any, steps: StepModel) -> Log:
        log = Log(len(requests), record=False)
        log.arrival_s = requests.arrival_s
        schedulers = [Scheduler(config, blocks, prompts, outputs) for _ in range(width)]
        replica = kind(steps, schedulers, log, 0)
        env = simpy.Environment()
        env.process(_alone(env, replica, arrivals, list(range(len(requests))), lambda _: None))
        env.run()
        return log

    in_line = model(width, knots)
    alone = [replace(stage, shared=[0.0] * len(stage.shared)) for stage in in_line.stages]  # one group shares nothing
    in_line = StepModel(alone, in_line.transfer, ENGINE, MAX_TOKENS, MAX_SEQS)
    beside = model(1, knots)
    for single, steps in ((PipelineReplica, in_line), (LockstepReplica, beside)):
        one, other = times(single, steps), times(StagedLockstepReplica, steps)
        for name in ("first_schedule_s", "first_token_s", "finish_s"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-14, err_msg=name)
        assert (one.lane, one.rejected, one.preemptions) == (other.lane, other.rejected, other.preemptions)


@pytest.mark.parametrize("router", ["least-tokens", "power-of-two", "round-robin"])
def test_one_replica_behind_any_router(router: str) -> None:
    from simulator.routers import ROUTERS

    rng = np.random.default_rng(3)
    requests = requests_of(
        np.cumsum(rng.exponential(0.01, 200)).tolist(),
        rng.integers(1, 60, 200).tolist(),
        rng.integers(1, 60, 200).tolist(),
    )
    config = SchedulerConfig(max_seqs=8, token_budget=64, max_context_tokens=600)
    spec = ReplicaSpec(model(), Mapping(), config, 500, DEVICE)
    alone = run(Deployment([spec]), requests)
    routed = run(Deployment([spec, spec], ROUTERS[router]), requests)
    assert np.isfinite(routed.finish_s).all()
    assert max(routed.replica) == 1
    assert np.mean(routed.finish_s) < np.mean(alone.finish_s)
