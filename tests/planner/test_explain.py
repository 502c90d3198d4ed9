"""explain: the operators of a step add up to what the simulations' table says, and every one waits for something.

Each pool has the steps of its role, and the memory that simulations of the plan count with.
"""

from dataclasses import replace

import pytest

from hwmodels.errors import OutOfMemoryError
from planner.catalogue import open_catalogue
from planner.errors import PlanError
from planner.explain import explain
from planner.explainplan import explain_plan
from planner.plan import Plan, Pool

POOLS = {
    "one device": ("llama-3.1-8b", 1, Pool(1)),
    "tensor-parallel": ("llama-3.1-70b", 8, Pool(1, tp=8)),
    "pipeline, uneven": ("llama-3.1-8b", 3, Pool(1, pp=3)),
    "weight-only": ("llama-3.1-8b", 1, Pool(1, weights="int4")),
    "experts": ("mixtral-8x7b", 4, Pool(1, tp=4, ep=4)),
    "sliding window": ("gpt-oss-20b", 2, Pool(1, tp=2, expert_tp=2)),
    "attention-DP over nodes": (
        "deepseek-v3",
        16,
        Pool(1, attention_dp=16, ep=16, weights="fp8", activations="fp8", max_seqs=64),
    ),
    "attention-DP in stages": (
        "deepseek-v3",
        16,
        Pool(1, attention_dp=8, ep=8, pp=2, weights="fp8", activations="fp8", max_seqs=64),
    ),
}


@pytest.fixture(scope="module", params=POOLS)
def found(request):
    model, gpus, pool = POOLS[request.param]
    catalogue = open_catalogue(model, "h100-sxm", gpus, "vllm")
    return catalogue, pool, explain(catalogue, pool, batch=48, context=1000, prefill=700)


def test_rows_add_up_to_the_step_model(found):
    for step in found[2].steps:
        assert step.time_s == pytest.approx(step.step_model_s, rel=0.03)
        assert sum(step.bounds.values()) == pytest.approx(step.time_s)
        assert step.binding in step.bounds


def test_memory_adds_up_to_the_device(found):
    catalogue, pool, explanation = found
    memory = explanation.memory
    parts = memory.weights_bytes + memory.activations_bytes + memory.engine_bytes + memory.kv_bytes
    assert parts == pytest.approx(memory.device_bytes)
    assert memory.kv_tokens == catalogue.memory(pool).kv_blocks * pool.block_tokens


def test_collectives_name_algorithm_and_link(found):
    catalogue, pool, explanation = found
    collectives = [row for step in explanation.steps for row in step.rows if row.link]
    assert bool(collectives) == (pool.gpus > 1)
    links = {fabric.name for fabric in (catalogue.cluster.intra, catalogue.cluster.inter) if fabric is not None}
    for row in collectives:
        assert row.algorithm
        assert any(row.link.startswith(name) for name in links) or "PCIe" in row.link
        assert row.flops == 0


def test_no_device_is_used_beyond_its_peaks(found):
    for step in found[2].steps:
        assert 0 < step.mfu <= 1
        assert 0 < step.mbu <= 1


def test_decode_waits_for_memory_and_prefill_for_arithmetic():
    catalogue = open_catalogue("llama-3.1-8b", "h100-sxm", 1, "vllm")
    decode, prefill = explain(catalogue, Pool(1), batch=16, context=512).steps
    assert (decode.binding, prefill.binding) == ("memory", "compute")
    tiny = explain(open_catalogue("tiny-llama-256m", "h100-sxm", 1, "vllm"), Pool(1, max_context_tokens=2048), batch=1)
    norms = [row for row in tiny.steps[0].rows if row.kind == "elementwise"]
    assert {row.bound for row in norms} == {"launch"}


def test_what_the_plan_cannot_run_is_refused():
    catalogue = open_catalogue("llama-3.1-8b", "h100-sxm", 1, "vllm")
    pool = Pool(1, max_seqs=8, token_budget=512)
    for asked, value in (({"batch": 9}, "9"), ({"prefill": 513}, "513"), ({"context": 10**9}, "1000000000")):
        with pytest.raises(PlanError, match=value):
            explain(catalogue, pool, **asked)
    decode, prefill = explain(catalogue, pool).steps
    assert (decode.tokens, prefill.tokens) == (8, 512)
    assert len(explain(catalogue, pool, prefill=0).steps) == 1


PREFILL = Pool(2, tp=2, role="prefill", token_budget=8192)
TWO_KINDS = Plan(
    "llama-3.1-70b",
    "h100-sxm",
    4,
    (PREFILL, Pool(1, tp=8, role="decode", max_seqs=1024, hardware="a100-80-sxm")),
    also={"a100-80-sxm": 8},
)
EIGHT = Pool(1, role="prefill"), Pool(1, role="decode")
PLANS = {
    "two kinds of devices": TWO_KINDS,
    "encoder beside the model": Plan("llama-3.1-8b", "h100-sxm", 2, EIGHT, encoder="qwen2-vl-7b"),
    "encode pool": Plan(
        "llama-3.1-8b", "h100-sxm", 3, (*EIGHT, Pool(1, role="encode", batch_tiles=4)), encoder="qwen2-vl-7b"
    ),
    "shares": Plan("llama-3.1-8b", "h100-sxm", 1, (Pool(1, sharing="nexus"),)),
}


def opened(plan):
    return open_catalogue(plan.model, plan.hardware, plan.gpus, "vllm", also=plan.also)


@pytest.mark.parametrize("name", PLANS)
def test_memory_and_steps_are_those_of_simulations(name):
    plan = PLANS[name]
    catalogue = opened(plan)
    specs = iter(catalogue.deployment(plan).replicas)
    for pool, found in zip(plan.pools, explain_plan(catalogue, plan), strict=True):
        assert found.pool == pool
        own = catalogue.of(pool).cluster.device
        memory = found.memory
        assert memory.device_bytes == own.memory_bytes
        parts = memory.weights_bytes + memory.activations_bytes + memory.engine_bytes + memory.kv_bytes
        assert parts == pytest.approx(memory.device_bytes)
        if pool.role == "encode":
            continue
        simulated = [next(specs) for _ in range(pool.replicas)]
        assert {spec.kv_blocks for spec in simulated} == {memory.kv_blocks}
        for step in found.steps:
            assert step.time_s == pytest.approx(step.step_model_s, rel=0.03)
    assert next(specs, None) is None


def test_a_pool_has_the_steps_of_its_role():
    catalogue = opened(TWO_KINDS)
    prefill, decode = explain_plan(catalogue, TWO_KINDS, context=2000)
    assert [step.title for step in prefill.steps] == ["prefill step of 8192 tokens"]
    assert [step.title for step in decode.steps] == ["decode step of 64 sequences at context 2000"]
    # What one role cannot run is no matter for the other: a prefill pool keeps no 1000 sequences.
    assert explain_plan(catalogue, TWO_KINDS, batch=512)[1].steps[0].tokens == 512
    assert explain_plan(catalogue, TWO_KINDS, prefill=0)[0].steps == ()
    mixed = explain(open_catalogue("llama-3.1-8b", "h100-sxm", 1, "vllm"), Pool(1, role="mixed"))
    assert len(mixed.steps) == 2


def test_an_encode_worker_has_a_batch_of_tiles():
    plan = PLANS["encode pool"]
    found = explain_plan(opened(plan), plan)[2]
    (step,) = found.steps
    assert step.title.startswith("batch of 4 tiles")
    assert step.time_s == pytest.approx(step.step_model_s, rel=1e-6)
    assert 0 < step.mfu <= 1 and 0 < step.mbu <= 1
    assert found.memory.kv_blocks == 0 and found.memory.weights_bytes > 1e9
    with pytest.raises(OutOfMemoryError, match="batch_tiles of at most"):
        large = Plan(
            plan.model, plan.hardware, 3, (*EIGHT, Pool(1, role="encode", batch_tiles=10**7)), encoder=plan.encoder
        )
        explain_plan(opened(plan), large)


OVERLAPPED = {
    "dense": ("llama-3.3-70b", 8, Pool(1, tp=8, overlap="two-way"), 4096),
    "norms alone": ("llama-3.3-70b", 8, Pool(1, tp=8, overlap="fused-norm"), 4096),
    "stages": ("llama-3.3-70b", 8, Pool(1, tp=4, pp=2, overlap="two-way"), 4096),
    "experts": ("mixtral-8x7b", 4, Pool(1, tp=4, ep=4, overlap="two-way"), 16384),
    "attention groups": (
        "deepseek-v3", 16,
        Pool(1, attention_dp=16, ep=16, weights="fp8", activations="fp8", max_seqs=64, overlap="two-way"), 2048,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERLAPPED)
def test_what_overlap_hides_is_a_row_of_its_own(name):
    model, gpus, pool, tokens = OVERLAPPED[name]
    pool = replace(pool, token_budget=tokens)
    catalogue = open_catalogue(model, "h100-sxm", gpus, "vllm")
    alone = explain(catalogue, replace(pool, overlap="none"), batch=48, context=1000, prefill=tokens)
    for step, before in zip(
        explain(catalogue, pool, batch=48, context=1000, prefill=tokens).steps, alone.steps, strict=True
    ):
        assert step.time_s == pytest.approx(step.step_model_s, rel=0.01)
        taken = {row.name: row.time_s for row in step.rows if row.kind == "overlap"}
        assert all(seconds < 0 for seconds in taken.values())
        assert sum(taken.values()) == pytest.approx(step.time_s - before.time_s)
        assert step.binding != "overlap"
        if "prefill" in step.title:  # so many tokens are worth two halves
            assert ("hidden behind the other half" in taken) == (pool.overlap == "two-way")
            assert ("norms inside the all-reduce" in taken) == (pool.tp > 1)
            assert step.step_model_s < 0.99 * before.step_model_s


@pytest.mark.parametrize("overlap", ["none", "two-way"])
def test_a_group_of_layers_has_a_step_of_its_own(overlap):
    catalogue = open_catalogue("llama-3.1-8b", "h100-sxm", 2, "vllm")
    pool = Pool(1, tp=2, policy="layered", group_tokens=512, overlap=overlap)
    decode, whole, group = explain(catalogue, pool, batch=16, context=1000, prefill=2048).steps
    assert group.title == "step of layer group 1 of 4 for 2048 tokens"
    for step in (decode, whole, group):
        assert step.time_s == pytest.approx(step.step_model_s, rel=0.01)
    names = {row.name for row in group.rows}
    assert "embedding" in names and "language-model head" not in names
    flops = {step.title: sum(row.flops for row in step.rows if row.name == "router" or "projection" in row.name)
             for step in (whole, group)}  # fmt: skip
    assert flops[group.title] == pytest.approx(flops[whole.title] / 4)
    assert len(explain(catalogue, pool, batch=16, context=1000, prefill=500).steps) == 2  # all layers at once
