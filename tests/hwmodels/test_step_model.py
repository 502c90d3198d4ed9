"""Look-ups of a compiled step model against prices of the same operators, and against each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import operators as ops
from hwmodels.engine import Engine
from hwmodels.evidence import evidence
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import (
    compile_step_model,
    decode_operators,
    group_run,
    kept,
    linear_operators,
    prefill_operators,
    shared_operators,
    stage_layers,
    token_grid,
)

BF16 = Precision()
ENGINE = Engine("test", "made up", {"default": "vllm"}, 1e-3, 1e-5, 0.0, 1.0, 0.0, 0.9, 0.0)
MAX_TOKENS, MAX_SEQS = 8192, 512
PLANS = {
    "llama-3.1-8b": Mapping(),
    "llama-3.1-70b": Mapping(tp=8),
    "mistral-7b": Mapping(tp=2),
    "gpt-oss-20b": Mapping(),
    "mixtral-8x7b": Mapping(tp=4, ep=2, expert_tp=2),
    "deepseek-v3": Mapping(tp=8, ep=8),
}


class Case:
    """A model, how it is cut, its prices and its step model."""

    def __init__(self, name: str, mapping: Mapping) -> None:
        self.model, self.mapping = load_model(name), mapping
        self.cost = AnalyticCost(load_cluster("h200-sxm", max(8, mapping.gpus)), mapping)
        self.steps = compile_step_model(
            self.model, mapping, BF16, ENGINE, self.cost, max_tokens=MAX_TOKENS, max_seqs=MAX_SEQS
        )

    def price(self, found) -> float:
        return sum(float(self.cost.time_s(op) * kept(op, self.cost, ENGINE)) for op in found)

    def direct(self, sequences: int, context: int, items, stage: int = 0) -> float:
        """Seconds of one group's batch in one stage, every operator priced at its very size."""
        last = stage == self.mapping.pp - 1
        layers = stage_layers(self.model, self.mapping)[stage]
        tokens = sequences + sum(new for new, _ in items)
        found = linear_operators(self.model, layers, np.array(float(tokens)), self.mapping, BF16, first=stage == 0)
        if last:
            found += ops.language_model_head(self.model, np.array(float(sequences + len(items))), self.mapping.tp)
        if sequences:
            found += decode_operators(layers, np.array(float(sequences)), np.array(float(context)), self.mapping, BF16)
        for new, before in items:
            found += prefill_operators(layers, np.array(float(new)), np.array(float(before)), self.mapping, BF16)
        return self.price(found)

    def shared(self, tokens: int) -> float:
        return self.price(shared_operators(self.model, self.model.layers, np.array(float(tokens)), self.mapping, BF16))


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: Case(name, mapping) for name, mapping in PLANS.items()}


@pytest.fixture(scope="module")
def llama(cases) -> Case:
    return cases["llama-3.1-8b"]


def log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(np.log(low), np.log(high))))


@pytest.mark.parametrize("name", PLANS)
def test_decode_steps_cost_what_their_operators_do(cases, name):
    """Within 1 % for any number of sequences and any mean context, on either side of a window or on it."""
    case, rng = cases[name], np.random.default_rng(1)
    for _ in range(60):
        sequences = log_uniform(rng, 1, MAX_SEQS)
        context = sequences * log_uniform(rng, 1, case.model.max_context_tokens)
        expected = case.direct(sequences, context, ()) + case.steps.overhead_s(sequences, False)
        assert case.steps.step_s(sequences, context, ()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", PLANS)
def test_mixed_steps_cost_what_their_operators_do(cases, name):
    """Within 2 % for any chunks beside any decoding sequences; just above a row of tiles, too."""
    case, rng = cases[name], np.random.default_rng(2)
    reach = case.model.max_context_tokens
    for _ in range(60):
        sequences = log_uniform(rng, 1, 300) if rng.random() < 0.5 else 0
        context = sequences * log_uniform(rng, 1, reach)
        items = [
            (log_uniform(rng, 1, 2048) + int(rng.integers(2)), int(rng.integers(2)) * log_uniform(rng, 1, reach))
            for _ in range(rng.integers(1, 4))
        ]
        expected = case.direct(sequences, context, items) + case.steps.overhead_s(sequences + len(items), bool(items))
        assert case.steps.step_s(sequences, context, items) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", PLANS)
def test_tables_are_the_prices_themselves_on_the_grid(cases, name):
    case = cases[name]
    tables = case.steps.stages[0]
    for n in (1, 2, 17, 256, 257, 512, 1025, 2048, 8192):
        tokens = np.array(float(n))
        found = linear_operators(case.model, case.model.layers, tokens, case.mapping, BF16, first=True)
        # Times that would fall as the size grows are held, which is rare.
        assert tables.linear[n] == pytest.approx(case.price(found), rel=1e-3)
    for n in (1, 100, 512):
        head = ops.language_model_head(case.model, np.array(float(n)), case.mapping.tp)
        assert tables.head[n] == pytest.approx(case.price(head), rel=1e-9)
    assert tables.linear[0] == tables.head[0] == 0.0


@pytest.mark.parametrize("limit", [1, 2, 255, 256, 257, 1000, 1024, 8193, 100_000])
def test_the_grid_rises_to_its_limit(limit):
    grid = token_grid(limit)
    assert grid[0] == 1
    assert grid[-1] == limit
    assert np.all(np.diff(grid) > 0)
    assert np.array_equal(grid, grid.round())


@pytest.mark.parametrize("name", PLANS)
def test_a_run_is_the_steps_it_stands_for(cases, name):
    """first + j slope of decode_run, group_run and stages_run equal the single steps, up to the last one promised."""
    steps, rng = cases[name].steps, np.random.default_rng(3)
    for _ in range(40):
        sequences = log_uniform(rng, 1, MAX_SEQS)
        context = log_uniform(rng, sequences, sequences * 20_000)
        first, slope, count = steps.decode_run(sequences, context)
        assert count >= 1
        for j in {0, 1, 100, int(min(count, 1e5)) - 1}:
            if j < count:
                single = steps.step_s(sequences, context + j * sequences, ())
                assert first + j * slope == pytest.approx(single, rel=1e-9)
        group_first, group_slope, group_count = group_run(steps.stages[0], sequences, context)
        assert group_first + steps.overhead_s(sequences, False) == pytest.approx(first, rel=1e-12)
        assert (group_slope, group_count) == (pytest.approx(slope, rel=1e-12), count)
        ((stage_first, stage_slope),), stage_count = steps.stages_run(sequences, context)
        assert (stage_first, stage_slope) == (pytest.approx(first, rel=1e-12), pytest.approx(slope, rel=1e-12))
        assert stage_count == count


batches = st.tuples(
    st.integers(0, 200),
    st.integers(1, 30_000),
    st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 30_000)), max_size=3),
).filter(lambda batch: batch[0] or batch[2])


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(PLANS)), batch=batches)
def test_one_stage_and_one_group_agree_with_a_step(cases, name, batch):
    steps = cases[name].steps
    sequences, mean, items = batch
    context = sequences * mean
    expected = steps.step_s(sequences, context, items)
    assert steps.stages_s(sequences, context, items) == [pytest.approx(expected, rel=1e-12)]
    assert steps.lockstep_s([(sequences, context, items)]) == pytest.approx(expected, rel=1e-12)
    assert steps.lockstep_stages_s([(sequences, context, items)]) == steps.stages_s(sequences, context, items)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(PLANS)), batch=batches, more=st.integers(1, 500))
def test_more_work_takes_no_less_time(cases, name, batch, more):
    """More context, longer chunks that start later, and more sequences of the same mean context; to 0.1 %."""
    steps = cases[name].steps
    sequences, mean, items = batch
    least = steps.step_s(sequences, sequences * mean, items) * (1 - 1e-3)
    if sequences:
        assert steps.step_s(sequences, sequences * (mean + more), items) >= least
        joined = min(sequences + more, 500)
        assert steps.step_s(joined, joined * mean, items) >= least
    if items:
        (new, before), *others = items
        assert steps.step_s(sequences, sequences * mean, [(new + more, before), *others]) >= least
        assert steps.step_s(sequences, sequences * mean, [(new, before + more), *others]) >= least


def test_decode_is_as_fast_as_memory_allows(llama):
    """One sequence of Llama-3.1-8B reads 15 GB a token, at 60 to 95 % of bandwidth when host work is left out."""
    time = llama.steps.step_s(1, 100, ()) - llama.steps.overhead_s(1, False)
    read = 2 * (8_030_261_248 - 128256 * 4096)
    assert 0.6 <= read / time / llama.cost.device.memory_bytes_per_s <= 0.95


def test_prefill_is_compute_bound(llama):
    time = llama.steps.step_s(0, 0, [(8192, 0)])
    flops = 2 * 6.98e9 * 8192 + 32 * 4 * 32 * 128 * 8192 * 8193 / 2
    assert 0.5 <= flops / time / llama.cost.device.peak_flops_per_s["bf16"] <= 0.8


def test_narrow_weights_speed_up_decode_but_not_prefill(llama):
    steps = compile_step_model(
        llama.model, Mapping(), Precision("int4"), ENGINE, llama.cost, max_tokens=4096, max_seqs=8
    )
    host = llama.steps.overhead_s(1, False)
    assert steps.step_s(1, 100, ()) - host < 0.6 * (llama.steps.step_s(1, 100, ()) - host)
    assert steps.step_s(0, 0, [(4096, 0)]) > llama.steps.step_s(0, 0, [(4096, 0)])


def test_uneven_stages_are_each_priced_for_themselves():
    case = Case("llama-3.1-8b", Mapping(pp=3, stages=(8, 16, 8)))
    sequences, context, items = 20, 20_000, [(100, 50)]
    times = case.steps.stages_s(sequences, context, items)
    times[0] -= case.steps.overhead_s(21, True)
    assert times == [pytest.approx(case.direct(sequences, context, items, stage), rel=0.005) for stage in range(3)]
    assert times[1] > 1.5 * times[0]
    runs, _ = case.steps.stages_run(sequences, context)
    assert [first for first, _ in runs] == pytest.approx(case.steps.stages_s(sequences, context, ()), rel=1e-12)
    wire = ops.Communication("t", "point-to-point", "pp", np.array(120 * 4096 * 2.0))
    assert case.steps.transfer[120] == pytest.approx(float(case.cost.time_s(wire)))
    assert case.steps.transfer[0] == 0.0


def test_one_stage_passes_nothing_on(llama):
    assert max(llama.steps.transfer) == 0.0


def test_groups_wait_for_the_slowest_and_share_the_experts():
    case = Case("deepseek-v3", Mapping(attention_dp=8, ep=8))
    small, large = (4, 4000, []), (64, 64_000, [(512, 0)])
    step = case.steps.lockstep_s([small, large] * 4)
    tokens = 4 * (4 + 64 + 512)
    expected = case.direct(*large) + case.shared(tokens) + case.steps.overhead_s(65, True)
    assert step == pytest.approx(expected, rel=0.01)
    assert case.steps.lockstep_s([large, small]) == case.steps.lockstep_s([small, large])
    assert case.steps.lockstep_s([large, small]) > case.steps.lockstep_s([small, small])


def test_groups_in_stages_have_the_work_of_groups_in_one():
    """Both stages of DeepSeek-V3 together take what one stage of all layers takes; each has its own experts' part."""
    one = Case("deepseek-v3", Mapping(attention_dp=8, ep=8)).steps
    two = Case("deepseek-v3", Mapping(attention_dp=8, ep=8, pp=2)).steps
    for batch in ((4, 4000, []), (64, 64_000, [(512, 0)]), (0, 0, [(2048, 2048)])):
        times = two.lockstep_stages_s([batch] * 8)
        assert sum(times) == pytest.approx(one.lockstep_s([batch] * 8), rel=1e-3)
        assert min(times) > 0.4 * sum(times)
    assert min(tables.shared[2048] for tables in two.stages) > 0.4 * one.stages[0].shared[2048]


def test_shared_experts_hide_behind_the_dispatch_where_the_engine_lets_them():
    case = Case("deepseek-v3", Mapping(attention_dp=8, ep=8))
    alone = replace(ENGINE, overlaps_shared_experts=False)
    for tokens in (8.0, 8 * 512.0, 8 * 8192.0):
        found = shared_operators(case.model, case.model.layers, np.array(tokens), case.mapping, BF16)
        dispatch = next(op for op in found if isinstance(op, ops.ExpertExchange) and op.phase == "dispatch")
        assert [op.name for op in dispatch.beside] == [op.name for op in found if op.name.startswith("shared expert")]
        arithmetic = sum(float(case.cost.time_s(op)) for op in dispatch.beside)
        together = arithmetic + float(case.cost.time_s(dispatch) * kept(dispatch, case.cost, ENGINE))
        assert together == pytest.approx(max(arithmetic, float(case.cost.time_s(dispatch))))
        assert kept(dispatch, case.cost, alone) == 1.0
        combine = next(op for op in found if isinstance(op, ops.ExpertExchange) and op.phase == "combine")
        assert kept(combine, case.cost, ENGINE) == 1.0


def test_without_groups_nothing_is_shared(cases):
    assert all(max(case.steps.stages[0].shared) == 0.0 for case in cases.values())


@pytest.mark.parametrize(("max_tokens", "max_seqs"), [(1, 1), (8, 8), (300, 7), (7, 300)])
def test_small_limits(llama, max_tokens, max_seqs):
    steps = compile_step_model(
        llama.model, Mapping(), BF16, ENGINE, llama.cost, max_tokens=max_tokens, max_seqs=max_seqs
    )
    assert steps.step_s(1, 10, ()) == pytest.approx(llama.steps.step_s(1, 10, ()), rel=1e-3)
    assert steps.step_s(0, 0, [(1, 0)]) == pytest.approx(llama.steps.step_s(0, 0, [(1, 0)]), rel=1e-3)


def test_host_work_is_counted_once_a_step_and_once_a_sequence(llama):
    assert llama.steps.overhead_s(3, False) == pytest.approx(1e-3 + 3e-5)
    idle = Engine("none", "made up", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
    bare = compile_step_model(llama.model, Mapping(), BF16, idle, llama.cost, max_tokens=512, max_seqs=64)
    items = [(100, 0), (50, 10)]
    assert llama.steps.step_s(4, 400, items) - bare.step_s(4, 400, items) == pytest.approx(1e-3 + 6e-5)


def test_prices_say_what_they_rest_on(llama):
    shares = evidence(llama.model, Mapping(), BF16, ENGINE, llama.cost)
    assert sum(shares.values()) == pytest.approx(1)
    assert set(shares) == {"calibrated", "analytic"}  # norms and activations are not fitted
    guessed = AnalyticCost(load_cluster("a10", 1), Mapping())
    assert evidence(llama.model, Mapping(), BF16, ENGINE, guessed) == {"analytic": pytest.approx(1.0)}


def test_what_an_engine_hides_is_no_evidence(llama):
    fused = evidence(llama.model, Mapping(), BF16, replace(ENGINE, unfused=0.0), llama.cost)
    assert fused.get("analytic", 0.0) < evidence(llama.model, Mapping(), BF16, ENGINE, llama.cost)["analytic"]
