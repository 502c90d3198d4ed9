"""What a plan is made of, compiled once, and what is said of plans that cannot be."""

from __future__ import annotations

import pytest

from hwmodels.errors import MappingError, OutOfMemoryError
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from planner.catalogue import format_problem, law_broken, mapping_of, open_catalogue, precision_of
from planner.plan import Plan, Pool
from simulator.errors import SchedulerError

DENSE, MOE = load_model("llama-3.1-8b"), load_model("deepseek-v2-lite")


@pytest.mark.parametrize(
    ("model", "mapping", "law"),
    [
        (DENSE, Mapping(tp=3), "tp divides the attention heads"),
        (DENSE, Mapping(tp=16), None),  # each of 8 KV heads is kept twice
        (DENSE, Mapping(pp=33), "every stage has a layer"),
        (DENSE, Mapping(attention_dp=2), "attention_dp needs experts"),
        (DENSE, Mapping(tp=2, ep=2), "ep needs experts"),
        (MOE, Mapping(attention_dp=4, ep=4), None),
        (MOE, Mapping(tp=2, attention_dp=2, ep=2), "ep x expert_tp = tp x attention_dp"),
        (MOE, Mapping(attention_dp=2, pp=2, ep=2), None),
        (MOE, Mapping(attention_dp=2, pp=2, ep=4), "ep x expert_tp = tp x attention_dp"),
        (MOE, Mapping(attention_dp=3, ep=3), "ep divides the experts"),
        (MOE, Mapping(attention_dp=3, expert_tp=3), "expert_tp divides the expert width"),
    ],
)
def test_the_law_that_is_broken_is_named(model: object, mapping: Mapping, law: str | None) -> None:
    assert law_broken(model, mapping) == law  # type: ignore[arg-type]


def test_step_models_are_compiled_once_and_again_when_a_plan_asks_for_larger_steps() -> None:
    catalogue = open_catalogue("llama-3.2-1b", "l4", 2, "vllm")
    catalogue.max_tokens, catalogue.max_seqs = 512, 64
    first = catalogue.step_model(Mapping(), Precision())
    assert catalogue.step_model(Mapping(), Precision()) is first
    spec = catalogue.replica(Pool(1, token_budget=1024, max_seqs=16))
    assert spec.model is not first
    assert spec.model.max_tokens == 1024
    assert spec.model.max_seqs == 64
    assert spec.model.step_s(8, 800, [(100, 0)]) == pytest.approx(first.step_s(8, 800, [(100, 0)]), rel=1e-6)


def test_a_deployment_has_every_replica_and_the_idle_devices() -> None:
    catalogue = open_catalogue("llama-3.2-1b", "l4", 8, "vllm")
    pools = (Pool(2, tp=2, token_budget=512, max_seqs=64), Pool(1, token_budget=512, max_seqs=64))
    deployment = catalogue.deployment(Plan("llama-3.2-1b", "l4", 8, pools))
    assert [spec.mapping.gpus for spec in deployment.replicas] == [2, 2, 1]
    assert deployment.gpus == 5
    assert deployment.replicas[0].share == 2 * deployment.replicas[2].share


def test_a_pool_is_read_as_mapping_and_formats() -> None:
    pool = Pool(3, 2, 1, 4, 8, 1, weights="fp8", activations="fp8", kv="fp8")
    assert mapping_of(pool) == Mapping(2, 1, 4, 8, 1, None)
    assert precision_of(pool) == Precision("fp8", "fp8", "fp8")
    assert (pool.gpus_per_replica, pool.gpus) == (8, 24)


def test_plans_that_cannot_be_say_so_in_one_line() -> None:
    catalogue = open_catalogue("llama-3.1-70b", "a100-80-sxm", 8, "vllm")
    for pool, error, said in (
        (Pool(1, tp=3), MappingError, "tp=3 .*tp divides the attention heads of llama-3.1-70b"),
        (Pool(1, tp=0), MappingError, "tp=0: expected a degree of at least 1"),
        (Pool(1, tp=8, weights="fp8", activations="fp8"), MappingError, "activations in fp8: .* multiplies in .* only"),
        (Pool(1, tp=8, weights="fp64"), MappingError, "weights in 'fp64': expected one of"),
        (Pool(1), OutOfMemoryError, "llama-3.1-70b on 1 x .* GiB per device short"),
        (Pool(1, tp=8, max_seqs=512, token_budget=256), SchedulerError, "max_seqs=512"),
    ):
        with pytest.raises(error, match=said) as caught:
            catalogue.replica(pool)
        assert "\n" not in str(caught.value)


def test_weights_wider_than_activations_are_refused() -> None:
    cluster = open_catalogue("llama-3.2-1b", "h100-sxm", 1, "vllm").cluster
    assert format_problem(cluster, Precision()) is None
    assert format_problem(cluster, Precision("int4", "bf16", "fp8")) is None
    assert "expected weights no wider" in str(format_problem(cluster, Precision("bf16", "fp8", "fp8")))
