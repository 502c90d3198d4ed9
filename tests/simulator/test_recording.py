"""Recording a run changes nothing about it, and what is recorded accounts for every token and block."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwmodels.mapping import Mapping
from simulator.collect import collect
from simulator.deployment import Deployment, ReplicaSpec
from simulator.itl import itl
from simulator.result import Result
from simulator.routers import ROUTERS
from simulator.simulate import run
from simulator.workload import Workload


def neighbour(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toys = neighbour("test_engine_against_oracle")
MAPPINGS = {
    "plain": Mapping(),
    "attention groups": Mapping(attention_dp=3, ep=3),
    "pipeline": Mapping(pp=3),
    "groups in stages": Mapping(attention_dp=2, ep=2, pp=2),
}


@st.composite
def runs(draw: st.DrawFn) -> tuple[Deployment, Workload]:
    """One or two replicas of any kind, behind any router, open or closed loop."""
    config, blocks, arrivals, prompts, outputs = draw(toys.cases())
    knots = draw(st.sampled_from([(), (10.0, 100.0)]))
    specs = []
    for kind in draw(st.lists(st.sampled_from(sorted(MAPPINGS)), min_size=1, max_size=2)):
        mapping = MAPPINGS[kind]
        model = toys.model(mapping.pp, knots)
        specs.append(ReplicaSpec(model, mapping, config, blocks // mapping.pp, toys.DEVICE))
    workload = Workload(toys.requests_of(arrivals, prompts, outputs), draw(st.sampled_from([None, None, 1, 7])))
    return Deployment(specs, ROUTERS[draw(st.sampled_from(sorted(ROUTERS)))]), workload


CHECKED = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def recorded(case: tuple[Deployment, Workload]) -> Result:
    deployment, workload = case
    return collect(deployment, workload, run(deployment, workload, 3, record=True), 3)


def lanes(result: Result) -> list[pd.DataFrame]:
    """The steps of each lane, in the order of the log."""
    assert result.steps is not None
    return [steps for _, steps in result.steps.groupby(["replica", "lane"])]


@CHECKED
@given(runs())
def test_recording_changes_nothing(case: tuple[Deployment, Workload]) -> None:
    deployment, workload = case
    kept, bare = (run(deployment, workload, 3, record=record) for record in (True, False))
    for name in ("arrival_s", "first_schedule_s", "first_token_s", "finish_s"):
        np.testing.assert_allclose(getattr(kept, name), getattr(bare, name), rtol=1e-12, atol=1e-14, err_msg=name)
    for name in ("replica", "lane", "rejected", "preemptions"):
        assert getattr(kept, name) == getattr(bare, name), name


@CHECKED
@given(runs())
def test_segments_account_for_every_token(case: tuple[Deployment, Workload]) -> None:
    """Tokens come from decode steps and at the end of prompts: once for each request and once after each preemption
    that found it decoding. Prompt tokens and query-key pairs are those of all prompts, recomputed ones again."""
    result = recorded(case)
    assert result.steps is not None and result.spans is not None
    served = result.requests[~result.requests.rejected]
    emitted = int(served.output_tokens.sum())
    interrupted = int((result.spans.groupby("request").size() - 1).sum()) if len(result.spans) else 0
    decodes = int((result.steps.decode_sequences * result.steps.steps).sum())
    if case[0].replicas[0].scheduler.policy != "static":
        assert decodes + len(served) + interrupted == emitted
    else:  # rows of finished sequences stay in the batch
        assert decodes + len(served) >= emitted
    if not served.preemptions.any():
        prompts = served.prompt_tokens
        assert int(result.steps.prefill_tokens.sum()) == int(prompts.sum())
        assert int(result.steps.prefill_pairs.sum()) == int((prompts * (prompts + 1) // 2).sum())
    for spans in (group for _, group in result.spans.groupby("request")):
        assert int(spans.tokens.sum()) == int(result.requests.output_tokens[spans.request.iloc[0]])


@CHECKED
@given(runs())
def test_segments_of_a_lane_follow_each_other_within_its_blocks(case: tuple[Deployment, Workload]) -> None:
    result = recorded(case)
    for steps in lanes(result):
        assert (steps.end_s > steps.start_s).all()
        assert (steps.start_s.to_numpy()[1:] >= steps.end_s.to_numpy()[:-1] - 1e-12).all()
        pool = case[0].replicas[int(steps.replica.iloc[0])].kv_blocks
        assert ((steps.kv_blocks >= 1) & (steps.kv_blocks <= pool)).all()
        assert (steps.decode_sequences + steps.prefill_sequences >= 1).all()
        mixed = steps[steps.prefill_sequences > 0]
        assert ((mixed.steps == 1) & (mixed.slope_s == 0)).all()
    assert result.steps is not None
    finish_s = result.requests.finish_s.dropna()
    if len(finish_s):
        assert np.isclose(result.steps.end_s.max(), finish_s.max(), rtol=1e-12)


@CHECKED
@given(runs())
def test_contexts_grow_by_one_token_a_sequence_and_step(case: tuple[Deployment, Workload]) -> None:
    """Where two rows decode the same sequences without anything between, the second attends to what the first left."""
    for steps in lanes(recorded(case)):
        columns: dict[str, Any] = {str(name): steps[name].to_numpy() for name in steps}
        rows, count = columns["decode_sequences"], columns["steps"]
        after = columns["decode_context_tokens"] + rows * count
        quiet = (columns["prefill_sequences"][:-1] == 0) & (columns["prefill_sequences"][1:] == 0)
        # Fewer sequences have less context; as many have exactly this, unless one was preempted or replaced.
        same = quiet & (rows[1:] == rows[:-1]) & (columns["kv_blocks"][1:] >= columns["kv_blocks"][:-1])
        assert (columns["decode_context_tokens"][1:][same] == after[:-1][same]).all()


@CHECKED
@given(runs())
def test_gaps_between_tokens_add_up_to_the_time_from_first_token_to_finish(case: tuple[Deployment, Workload]) -> None:
    if case[0].replicas[0].scheduler.policy == "static":
        return
    result = recorded(case)
    gaps_s, weights = itl(result)
    served = result.requests[~result.requests.rejected]
    assert int(weights.sum()) == int((served.output_tokens - 1).sum())
    assert np.isclose(gaps_s @ weights, (served.finish_s - served.first_token_s).sum(), rtol=1e-9, atol=1e-12)


@CHECKED
@given(toys.cases(), st.sampled_from(sorted(MAPPINGS)))
def test_rows_are_the_steps_of_the_oracle(case: Any, kind: str) -> None:
    """The first step of every row, found by counting the steps before it: time, batch, contexts and blocks held."""
    config, blocks, arrivals, prompts, outputs = case
    mapping = MAPPINGS[kind]
    model = toys.model(mapping.pp)
    spec = ReplicaSpec(model, mapping, config, blocks // mapping.pp, toys.DEVICE)
    result = recorded((Deployment([spec]), Workload(toys.requests_of(arrivals, prompts, outputs))))
    oracle, given_case = toys.oracle, (arrivals, prompts, outputs)
    checked = toys.oracle_config(config, blocks)
    if kind == "plain":
        expected = oracle.run_oracle(checked, model.step_s, *given_case, records=True)
    elif kind == "pipeline":
        expected = oracle.run_oracle_pipeline(
            checked, mapping.pp, model.stages_s, model.transfer.__getitem__, *given_case, records=True
        )
    elif kind == "groups in stages":
        cut, times = (mapping.pp, mapping.attention_dp), (model.lockstep_stages_s, model.transfer.__getitem__)
        expected = oracle.run_oracle_staged_lockstep(checked, *cut, *times, *given_case, records=True)
    else:
        expected = oracle.run_oracle_lockstep(
            checked, mapping.attention_dp, model.lockstep_s, *given_case, records=True
        )
    of_lane: dict[int, list[Any]] = {}
    for step in expected["steps"]:
        of_lane.setdefault(step.lane, []).append(step)
    assert result.steps is not None
    assert set(of_lane) == set(result.steps.lane)
    for lane, rows in result.steps.groupby("lane"):
        steps = of_lane[int(str(lane))]
        assert int(rows.steps.sum()) == len(steps)
        place = 0
        row: Any
        for row in rows.itertuples():
            step = steps[place]
            place += row.steps
            assert np.isclose(row.start_s, step.start_s, rtol=1e-9, atol=1e-12)
            assert np.isclose(row.end_s, steps[place - 1].end_s, rtol=1e-9, atol=1e-12)
            assert row.decode_sequences == step.decode_sequences
            assert row.decode_context_tokens == step.decode_context_tokens
            assert row.prefill_tokens == sum(new for new, _ in step.items)
            assert row.prefill_pairs == sum(new * before + new * (new + 1) // 2 for new, before in step.items)
            assert row.prefill_sequences == len(step.items)
            assert row.kv_blocks == step.held_blocks
