"""The whole chain on planted times, and what is measured within a budget, on a clock that only passes move."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import operators as ops
from hwmodels.errors import MeasurementError
from hwmodels.evidence import evidence
from hwmodels.insitu import InSituCost, Sample, engine_of, transfer_rows
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Operator
from hwmodels.shape import Attention, FeedForward, Layer, ModelShape
from hwmodels.step_model import (
    compile_step_model,
    decode_operators,
    linear_operators,
    prefill_operators,
    stage_layers,
)
from planner.execute.insitu import (
    LEAST,
    MOST,
    RUN,
    WARM_UP,
    affordable,
    cost_rows,
    depths,
    grid,
    held_out,
    profile,
    rounds,
    sizes,
    spread,
    typical,
)
from planner.execute.records import Composition, Pass

FP32 = Precision("fp32", "fp32", "fp32")
LIMITS = {"token_budget": 96, "max_seqs": 12, "max_context": 512}
FULL = Attention(heads=4, kv_heads=2, head_dim=8, value_dim=8)
DENSE, SPARSE = FeedForward(intermediate=64), FeedForward(intermediate=32, experts=4, top_k=2)
MODELS = {
    "dense": (ModelShape("dense", 32, 128, (Layer(FULL, DENSE, 64),) * 4, False, 512, 32), Mapping()),
    "tensor-parallel": (ModelShape("dense", 32, 128, (Layer(FULL, DENSE, 64),) * 4, False, 512, 32), Mapping(tp=2)),
    "pipeline of both": (
        ModelShape("both", 32, 128, (Layer(FULL, DENSE, 64), Layer(FULL, SPARSE, 64)) * 2, False, 512, 32),
        Mapping(pp=2),
    ),
}


def planted_s(op: Operator) -> float:
    """One launch: affine in the rows, tokens, bytes or query-key pairs; other coefficients for every operator."""
    rate = 1.0 + len(op.name) % 5
    if isinstance(op, ops.AttentionCore):
        # In a decode the pairs are sequences x context. In a chunk they are new x before, but for its triangle.
        pairs = op.queries * op.read if op.phase == "prefill" else op.read
        return float((2e-5 + 3e-6 * op.queries + 4e-8 * pairs).sum())
    if isinstance(op, ops.Experts):
        return float((1e-4 + 5e-6 * op.tokens).sum())
    size = op.m if isinstance(op, ops.Gemm) else op.bytes / 256.0
    return float((1e-5 * rate + 2e-6 * rate * size).sum())


def operators_of(step: Composition, stage: int, model: ModelShape, mapping: Mapping) -> list[Operator]:
    one = np.ones(1)
    layers = stage_layers(model, mapping)[stage]
    found = linear_operators(model, layers, step.tokens * one, mapping, FP32, first=stage == 0)
    if stage == mapping.pp - 1:
        found += ops.language_model_head(model, (len(step.contexts) + len(step.items)) * one, mapping.tp)
    if step.contexts:
        count, context = len(step.contexts), sum(step.contexts)
        found += decode_operators(layers, count * one, context * one, mapping, FP32)
    for new, before in step.items:
        found += prefill_operators(layers, new * one, before * one, mapping, FP32)
    return found


def planted_pass(step: Composition, stage: int, shard: int, model: ModelShape, mapping: Mapping) -> Pass:
    laps: dict[str, float] = {}
    for op in operators_of(step, stage, model, mapping):
        laps[op.name] = laps.get(op.name, 0.0) + op.count * planted_s(op)
    total = sum(laps.values())
    return Pass(step, 0, stage, shard, laps, total, total)


class Machine:
    """Executes compositions in planted times; `clock` moves while it does, and not otherwise."""

    def __init__(self, seconds=lambda step: 0.05 + 0.01 * step.tokens) -> None:
        self.now, self.asked, self._seconds = 100.0, [], seconds

    def clock(self) -> float:
        return self.now

    def run(self, steps: list[Composition]) -> list[Pass]:
        self.asked += steps
        took = [self._seconds(step) for step in steps]
        self.now += sum(took)
        return [Pass(s, 0, 0, 0, {"everything": t}, t, t) for s, t in zip(steps, took, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_planted_times_come_back_from_the_step_model(name):
    model, mapping = MODELS[name]
    steps = [step for level in grid(model, **LIMITS) for step in level]
    ranks = [(stage, shard) for stage in range(mapping.pp) for shard in range(mapping.tp)]
    rows = cost_rows(
        [planted_pass(step, stage, shard, model, mapping) for step in steps for stage, shard in ranks],
        model, mapping, FP32,
    )  # fmt: skip
    if mapping.pp > 1:
        tokens = np.array([1.0, 96.0])
        rows = rows.merge(transfer_rows(model, FP32, tokens, 1e-5 + 1e-7 * tokens), how="outer")
    engine = engine_of("here", (1e-3, 1e-5, 1e-4))
    built = compile_step_model(model, mapping, FP32, engine, InSituCost(rows), max_tokens=96, max_seqs=12)
    for step in held_out(np.random.default_rng(0), 60, **LIMITS):
        overhead = 1e-3 + 1e-5 * (len(step.contexts) + len(step.items)) + 1e-4 * bool(step.items)
        found = built.stages_s(len(step.contexts), sum(step.contexts), step.items)
        found[0] -= overhead
        for stage, seconds in enumerate(found):
            assert seconds == pytest.approx(
                sum(op.count * planted_s(op) for op in operators_of(step, stage, model, mapping)), rel=0.01
            ), (step, stage)


def test_every_operator_of_a_step_is_measured_and_not_extended():
    model, mapping = MODELS["dense"]
    limits = {"token_budget": 1024, "max_seqs": 128, "max_context": 512}
    steps = [step for level in grid(model, **limits) for step in level]
    rows = cost_rows([planted_pass(step, 0, 0, model, mapping) for step in steps], model, mapping, FP32)
    cost = InSituCost(rows)
    # The reference step decodes 64 sequences at the model's longest context, beyond any mean of spread ones.
    attention = {"decode attention", "prefill attention"}
    found = evidence(model, mapping, FP32, engine_of("here", (0.0, 0.0, 0.0)), cost)
    assert found["measured"] > 0.8
    for step in held_out(np.random.default_rng(1), 30, **limits):
        for op in operators_of(step, 0, model, mapping):
            if op.name not in attention:
                assert cost.sources(op)["extended"] == 0.0, op.name


@settings(max_examples=60, deadline=None)
@given(
    token_budget=st.integers(1, 3000),
    max_seqs=st.integers(1, 300),
    max_context=st.integers(2, 600),
    held=st.one_of(st.none(), st.integers(1, 5000)),
)
def test_grid_keeps_to_the_limits_and_reaches_them(token_budget, max_seqs, max_context, held):
    model, _ = MODELS["dense"]
    limits = {"token_budget": token_budget, "max_seqs": max_seqs, "max_context": max_context}
    reach = min(max_context, model.max_context_tokens)
    levels = grid(model, **limits, kv_tokens=held)
    steps = [step for level in levels for step in level]
    assert len(set(steps)) == len(steps)
    for step in steps:
        assert 1 <= step.tokens <= token_budget
        assert len(step.contexts) + len(step.items) <= max(max_seqs, 1)
        assert all(1 <= context <= reach for context in step.contexts)
        assert all(new >= 1 and before >= 0 and new + before <= reach for new, before in step.items)
        cached = sum(step.contexts) + sum(new + before for new, before in step.items)
        assert held is None or cached <= held
    most = min(max_seqs, token_budget)
    if held is None:
        assert max(len(step.contexts) for step in levels[0]) == most
        assert max(step.items[0][0] for step in levels[0] if step.items) == min(token_budget, reach)
        if token_budget <= reach * max_seqs:
            assert max(step.tokens for step in levels[0]) == token_budget


def test_sizes_end_at_the_limit_and_keep_apart():
    for limit in range(1, 2000):
        found = sizes(limit)
        assert found[-1] == limit
        assert all(later >= 1.15 * size for size, later in pairwise(found))
    assert depths(2048) == [32, 128, 512, 2048]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 300), st.integers(0, 5000))
def test_spread_contexts_keep_their_mean(mean, count, more):
    found = spread(mean, count, mean + more)
    assert len(found) == count
    assert sum(found) == mean * count
    assert 1 <= min(found) <= max(found) <= mean + more


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 500), st.integers(1, 40), st.integers(2, 600), st.integers(0, 2**32 - 1))
def test_held_out_steps_keep_to_the_limits(token_budget, max_seqs, max_context, seed):
    limits = {"token_budget": token_budget, "max_seqs": max_seqs, "max_context": max_context}
    steps = held_out(np.random.default_rng(seed), 9, **limits)
    assert len(steps) == 9
    for step in steps:
        assert 1 <= step.tokens <= token_budget
        assert 1 <= len(step.contexts) + len(step.items) <= max_seqs
        assert len(step.items) <= 3
        assert all(1 <= context <= max_context for context in step.contexts)
        assert all(new >= 1 and before >= 0 and new + before <= max_context for new, before in step.items)
    assert steps == held_out(np.random.default_rng(seed), 9, **limits)


class TestBudget:
    LEVELS = grid(MODELS["dense"][0], **LIMITS)

    def measured(self, minutes: float, **more) -> tuple[Machine, list[Pass]]:
        machine = Machine(**more)
        passes = profile(machine.run, self.LEVELS, minutes=minutes, rng=np.random.default_rng(0), clock=machine.clock)
        return machine, passes

    def test_the_coarse_round_is_made_whatever_it_takes(self):
        _, passes = self.measured(0.0)
        counts = Counter(p.composition for p in passes)
        assert set(counts) == set(self.LEVELS[0])
        assert {step: 1 for step in self.LEVELS[0] if step.items} == {s: n for s, n in counts.items() if s.items}
        assert min(counts[step] for step in self.LEVELS[0] if not step.items) >= RUN

    @pytest.mark.parametrize("minutes", [1.0, 2.0, 4.0])
    def test_the_time_is_kept_to_a_batch(self, minutes):
        machine, _ = self.measured(minutes)
        longest = (1 + RUN) * (0.05 + 0.01 * LIMITS["token_budget"])
        assert machine.now - 100.0 <= 60.0 * minutes + longest

    @pytest.mark.parametrize("minutes", [2.0, 4.0, 8.0])
    def test_points_that_are_measured_are_repeated(self, minutes):
        _, passes = self.measured(minutes)
        counts = Counter(p.composition for p in passes)
        assert set(self.LEVELS[0]) < set(counts)
        assert min(counts.values()) >= LEAST
        assert max(n for step, n in counts.items() if step.items) <= MOST

    def test_more_time_measures_more_points_and_then_ends(self):
        some, more, everything = ({p.composition for p in self.measured(m)[1]} for m in (1.0, 2.0, 100.0))
        assert some < more < everything == {step for level in self.LEVELS for step in level}
        machine, passes = self.measured(100.0)
        assert {n for step, n in Counter(p.composition for p in passes).items() if step.items} == {MOST}
        assert machine.now - 100.0 < 100 * 60.0

    def test_warm_up_is_dropped_and_every_round_has_its_own_order(self):
        machine, passes = self.measured(100.0)
        assert len(machine.asked) == len(passes) + WARM_UP
        prompts = [p.composition for p in passes if p.composition.items]
        each = len(prompts) // MOST
        assert sorted(prompts[-2 * each : -each], key=repr) == sorted(prompts[-each:], key=repr)
        assert prompts[-2 * each : -each] != prompts[-each:]

    def test_decode_steps_come_in_runs_behind_prompts_as_in_service(self):
        for steps in rounds(self.LEVELS[0], np.random.default_rng(1)):
            prompts = [step for step in steps if step.items]
            decodes = [step for step in steps if not step.items]
            assert len(prompts) <= 1 and steps[: len(prompts)] == prompts
            assert decodes == decodes[:1] * RUN

    def test_the_quick_points_of_a_level_come_first(self):
        took = {step: 0.05 + 0.01 * step.tokens for step in self.LEVELS[0]}
        riding = RUN * float(np.mean([s for step, s in took.items() if not step.items]))
        known = sum(s + riding for step, s in took.items() if step.items)
        chosen = affordable(self.LEVELS, took, LEAST * 4 * riding + (LEAST - 1) * known)
        prompts = [step for step in chosen if step.items]
        assert prompts
        assert set(chosen) < set(self.LEVELS[1])
        left = [step.tokens for step in self.LEVELS[1] if step.items and step not in chosen]
        assert max(step.tokens for step in prompts) <= min(left)

    def test_progress_ends_at_the_whole(self):
        machine, shares = Machine(), []
        profile(
            machine.run, self.LEVELS, minutes=0.5, rng=np.random.default_rng(0), progress=shares.append,
            clock=machine.clock,
        )  # fmt: skip
        assert shares == sorted(shares)
        assert shares[-1] == 1.0

    def test_nothing_to_measure_is_refused(self):
        with pytest.raises(MeasurementError, match="0, expected at least 1"):
            profile(Machine().run, [[]], minutes=1.0, rng=np.random.default_rng(0))


class TestTypical:
    STEP = Composition((4, 8))

    def passes(self, *laps: dict[str, float]) -> list[Pass]:
        return [Pass(self.STEP, 0, 0, 0, lap, sum(lap.values()), sum(lap.values())) for lap in laps]

    def test_laps_add_up_to_the_usual_pass(self):
        found = typical(self.passes({"a": 1.0, "b": 3.0}, {"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 1.0}))
        assert found[self.STEP, 0] == Sample(2, 12, (), {"a": 2.0, "b": 2.0})

    def test_a_disturbed_pass_has_no_say(self):
        found = typical(self.passes(*[{"a": 1.0, "b": 3.0}] * 4, {"a": 100.0, "b": 3.0}))
        assert found[self.STEP, 0].laps == pytest.approx({"a": 1.0, "b": 3.0})

    def test_a_stage_without_passes_is_refused(self):
        model, mapping = MODELS["pipeline of both"]
        with pytest.raises(MeasurementError, match="stage 1"):
            cost_rows([planted_pass(self.STEP, 0, 0, model, mapping)], model, mapping, FP32)
