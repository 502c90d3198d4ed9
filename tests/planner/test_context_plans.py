"""Plans whose sequences lie on several ranks: laws, files, explanations, exports, and what nothing else can serve."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hwmodels.errors import MappingError
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping
from planner import Question, search
from planner.catalogue import law_broken, mapping_of, open_catalogue
from planner.errors import PlanError
from planner.explain import explain
from planner.export import export
from planner.plan import Plan, Pool
from planner.planfile import check_plan, read_plan, write_plan
from planner.space import Choices, enumerate_pools, long_context, mappings, powers_of_two
from simulator.limits import Limit
from simulator.simulate import simulate
from simulator.workload import Requests
from ui.words import cut

LLAMA, QWEN, DEEPSEEK = (load_model(name) for name in ("llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v3"))
#: One KV head of 256 in 80 layers: 80 KiB a token, which tensor parallelism copies and stages of a pipeline, each with
#: a batch in flight, do not divide.
LONG = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 80, "num_attention_heads": 16,
    "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 4096, "vocab_size": 32000,
    "max_position_embeddings": 1_048_576, "tie_word_embeddings": False,
}  # fmt: skip


def plan(*pools: Pool, model: str = "llama-3.1-8b", gpus: int = 8) -> Plan:
    return Plan(model, "h100-sxm", gpus, pools)


def traffic(prompt: int, count: int = 2, gap_s: float = 60.0) -> Requests:
    return Requests(np.arange(count) * gap_s, np.full(count, prompt), np.full(count, 4))


@pytest.mark.parametrize(
    ("pool", "told"),
    [
        (Pool(1, cp=0), r"pools\[0\].cp is 0, expected at least 1"),
        (Pool(1, cp_kind="ulysses"), r"pools\[0\].cp_kind is 'ulysses', expected 'ring' with cp 1"),
        (Pool(1, cp=2, sharing="nexus"), "sharing is 'nexus', expected None unless.*cp 1"),
        (Pool(1, cp=2, expert_cache=0.5), "cp is 2, expected 1 with expert_cache"),
        (Pool(1, tp=2, cp=2, ep=2), r"ep is 2, expected ep \* expert_tp \(1\) to equal tp \* cp \* attention_dp \(4\)"),
        (Pool(4, cp=4), "gpus is 8, expected at least the 16 its pools hold"),
    ],
)
def test_plan_files_say_what_is_wrong(pool: Pool, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        check_plan(plan(pool))


def test_plan_files_keep_degrees_and_know_kinds(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    found = plan(Pool(1, tp=2, cp=4, cp_kind="all-gather"))
    write_plan(found, path)
    assert read_plan(path) == found
    path.write_text(path.read_text().replace("all-gather", "spiral"))
    with pytest.raises(PlanError, match=r"cp_kind is 'spiral'.*'ring'.*'ulysses'"):
        read_plan(path)


@pytest.mark.parametrize(
    ("mapping", "law"),
    [
        (Mapping(cp=8, cp_kind="ulysses"), None),
        (Mapping(cp=3), None),
        (Mapping(cp=3, cp_kind="ulysses"), "take ring"),
        (Mapping(cp=64, cp_kind="ulysses"), "take ring"),
        (Mapping(cp=2, cp_kind="spiral"), "cp_kind is one of ring, tokenring, ulysses, all-gather"),
        (Mapping(tp=2, cp=2, pp=2), None),
        (Mapping(cp=2, attention_dp=2), "attention_dp needs experts"),
    ],
)
def test_laws_of_a_dense_model(mapping: Mapping, law: str | None) -> None:
    broken = law_broken(LLAMA, mapping)
    assert broken is None if law is None else broken is not None and law in broken


def test_experts_cover_the_ranks_of_a_sequence() -> None:
    assert law_broken(QWEN, Mapping(tp=2, cp=4, ep=8)) is None
    assert law_broken(QWEN, Mapping(cp=2, attention_dp=2, ep=2, expert_tp=2)) is None
    assert law_broken(QWEN, Mapping(tp=2, cp=4, ep=2)) == "ep x expert_tp = tp x cp x attention_dp"


def test_more_ranks_than_heads_are_offered_a_ring() -> None:
    catalogue = open_catalogue("llama-3.1-8b", "h100-sxm", 64, "vllm")
    with pytest.raises(MappingError, match=r"tp=1 .*cp=64.*ulysses.*\(take ring\) of llama-3.1-8b"):
        catalogue.replica(Pool(1, cp=64, cp_kind="ulysses"))
    assert catalogue.replica(Pool(1, cp=64, max_seqs=8)).mapping.gpus == 64


def test_spaces_have_powers_of_two_where_they_are_asked_for() -> None:
    cluster = load_cluster("h100-sxm", 8)
    plain = list(mappings(LLAMA, cluster))
    assert all(mapping.cp == 1 for mapping in plain)
    found = list(mappings(LLAMA, cluster, cps=powers_of_two(8), cp_kinds=("ring", "ulysses")))
    assert [mapping for mapping in found if mapping.cp == 1] == plain
    assert {(m.cp, m.cp_kind) for m in found if m.cp > 1} == {(d, k) for d in (2, 4, 8) for k in ("ring", "ulysses")}
    assert max(mapping.gpus for mapping in found) == 8
    assert len(set(found)) == len(found)
    experts = list(mappings(QWEN, cluster, cps=(1, 2)))
    assert {mapping.ep for mapping in experts if mapping.cp == 2 and mapping.tp == 2 and mapping.pp == 1} == {1, 2, 4}
    assert all(mapping.attention_dp == 1 for mapping in experts if mapping.cp > 1)


def test_only_long_prompts_ask_for_it_by_themselves() -> None:
    assert not long_context(np.full(100, 32_768))
    assert long_context(np.full(100, 32_769))
    assert not long_context(np.r_[np.full(999, 1000), 1_000_000])


def test_where_something_fits_nothing_else_is_looked_at() -> None:
    catalogue = open_catalogue("llama-3.1-8b", "h100-sxm", 4, "vllm")
    small = {"token_budgets": (2048,), "max_seqs": (8,), "policies": ("chunked",)}
    usual, asked = (enumerate_pools(catalogue, Choices(**small, cp=cp), 4096) for cp in ((1,), None))  # type: ignore[arg-type]
    assert usual == asked


def test_only_several_ranks_hold_a_prompt_of_a_million_tokens(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LONG))
    choices = {"token_budgets": (65_536,), "max_seqs": (8,), "policies": ("chunked",), "cp_kinds": ("ring", "ulysses")}

    def asked(cp: tuple[int, ...] | None) -> Question:
        return Question(
            str(config), "h100-sxm", 4, traffic(1_000_000, gap_s=1000.0), limits=(Limit("ttft", "p99", 1000.0),),
            objective="latency", choices=Choices(**choices, cp=cp), seconds=4.0, jobs=1,  # type: ignore[arg-type]
        )  # fmt: skip

    catalogue = open_catalogue(str(config), "h100-sxm", 4, "vllm")
    assert not enumerate_pools(catalogue, asked((1,)).choices, 1_000_004).pools
    result = search(asked(None))
    assert all(ranked.plan.pools[0].cp > 1 for ranked in result.ranked)
    best = result.best.plan.pools[0]
    assert best.cp * best.tp == 4
    # Heads divide neither the one KV head nor the ranks beyond it: Ulysses keeps all of the cache on each.
    assert best.cp_kind == "ring"
    assert result.best.trial.meets


def test_prompts_computed_by_four_ranks_are_handed_to_one() -> None:
    found = plan(Pool(1, role="prefill", cp=4, cp_kind="all-gather", token_budget=8192), Pool(1, role="decode"), gpus=5)
    requests = traffic(20_000, count=5, gap_s=2.0)
    run = simulate(open_catalogue("llama-3.1-8b", "h100-sxm", 5, "vllm").deployment(found, with_work=True), requests)
    sent = run.transfers["nbytes"].sum()
    assert sent == pytest.approx(requests.prompt_tokens.sum() * LLAMA.kv_bytes_per_token("bf16"))
    alone = plan(Pool(1, role="prefill", token_budget=8192), Pool(1, role="decode"), gpus=2)
    slow = simulate(open_catalogue("llama-3.1-8b", "h100-sxm", 2, "vllm").deployment(alone, with_work=True), requests)
    assert run.requests["first_token_s"].mean() < slow.requests["first_token_s"].mean()
    assert run.totals.model_flops == pytest.approx(slow.totals.model_flops, rel=1e-6)
    assert run.totals.energy_j > slow.totals.energy_j


def test_explanations_add_up_and_say_what_is_hidden() -> None:
    catalogue = open_catalogue("llama-3.1-8b", "h100-sxm", 8, "vllm")
    for kind in ("ring", "tokenring", "ulysses", "all-gather"):
        pool = Pool(1, cp=8, cp_kind=kind, token_budget=32_768, max_seqs=16)  # type: ignore[arg-type]
        for step in explain(catalogue, pool, batch=8).steps:
            assert step.time_s == pytest.approx(step.step_model_s, rel=0.01)
            assert 0 < step.mfu < 1
            between = next(row for row in step.rows if row.name.endswith("between ranks"))
            assert between.kind == f"{kind} over 8"
            assert between.bound == "NVLink 4"
            assert between.bytes > 0
            assert (between.hidden_s > 0) == (kind in ("ring", "tokenring") and "prefill" in step.title)


def test_plans_name_it() -> None:
    assert cut(Pool(1, tp=2, cp=4, cp_kind="ulysses")) == "tp=2 cp=4 (ulysses)"
    assert mapping_of(Pool(1, tp=2, cp=4, cp_kind="ulysses")) == Mapping(tp=2, cp=4, cp_kind="ulysses")
    assert Pool(2, tp=2, cp=4).gpus == 16


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm", "dynamo"])
def test_engines_that_have_no_such_thing_refuse(engine: str) -> None:
    with pytest.raises(PlanError, match=r"pools\[0\].cp is 4, expected 1 for .*; plan tp instead, or keep"):
        export(plan(Pool(1, cp=4)), engine, {"h100-sxm": 8})


def test_tensorrt_llm_decodes_latents_by_helix() -> None:
    formats = {"weights": "fp8_block", "activations": "fp8", "block_tokens": 32, "ep": 8}
    pools = Pool(1, tp=8, role="prefill", **formats), Pool(1, tp=2, cp=4, role="decode", **formats)  # type: ignore[arg-type]
    found = export(plan(*pools, model="deepseek-v3", gpus=16), "tensorrt-llm", {"h100-sxm": 8})
    assert "context_parallel_size: 4\ncp_config:\n  cp_type: HELIX\n  tokens_per_block: 32" in found.files["pool1.yaml"]
    assert "context_parallel" not in found.files["pool0.yaml"]
    assert any("Helix is experimental" in note for note in found.notes)
    wrong = pools[0], Pool(1, tp=2, cp=4, cp_kind="ulysses", role="decode", **formats)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="cp_kind ulysses"):
        export(plan(*wrong, model="deepseek-v3", gpus=16), "tensorrt-llm", {"h100-sxm": 8})


@pytest.mark.parametrize(("hardware", "gpus"), [("l4", 4), ("h100-sxm", 8)])
def test_law_no_simulation_beats_its_bound(hardware: str, gpus: int) -> None:
    choices = Choices(
        token_budgets=(2048, 16_384), max_seqs=(8,), policies=("chunked",), cp=(1, 2, 4),
        cp_kinds=("ring", "tokenring", "ulysses", "all-gather"),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    requests = Requests(np.arange(30) * 3.0, rng.integers(1000, 40_000, 30), rng.integers(2, 60, 30))
    question = Question(
        "llama-3.2-1b", hardware, gpus, requests, limits=(Limit("ttft", "p99", 100.0),), objective="latency",
        choices=choices, seconds=5.0, jobs=1, keep=100,
    )  # fmt: skip
    result = search(question)
    assert any(ranked.plan.pools[0].cp > 1 for ranked in result.ranked)
    assert all(ranked.score <= ranked.bound + 1e-9 for ranked in result.ranked)
