"""Launch files of chunks, orders, overlap and the experts' exchange: what engines are told, noted, and refused."""

import json
import re
import shlex

import pytest
import yaml

from planner.errors import PlanError
from planner.export import ENGINES, export
from planner.plan import Plan, Pool

DENSE = Pool(1, tp=4, max_seqs=64, token_budget=2048)
GROUPS = Pool(1, attention_dp=8, ep=8, max_seqs=64, token_budget=2048)


def plan_of(*pools):
    return Plan("org/m", "h100-sxm", sum(pool.gpus for pool in pools), pools)


def changed(pool, **fields):
    return Pool(**{name: getattr(pool, name) for name in pool.__dataclass_fields__} | fields)


def server(exported):
    """Environment and words of each process of launch.sh that has devices."""
    text = exported.files["launch.sh"].replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        words = shlex.split(line[:-2]) if line.endswith(" &") else []
        env = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_0-9]+=.*", word))
        if "CUDA_VISIBLE_DEVICES" in env:
            found.append((env, words))
    return found


def value(words, flag):
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("engine", ENGINES)
def test_groups_of_layers_are_in_no_engine(engine):
    with pytest.raises(PlanError, match=r"pools\[0\].policy is 'layered', expected another") as told:
        export(plan_of(changed(DENSE, policy="layered")), engine)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", ["shortest", "deadline"])
def test_orders_that_no_engine_has(engine, order):
    pool = changed(DENSE, order=order, deadlines_s=(1.0,) if order == "deadline" else ())
    with pytest.raises(PlanError, match=rf"pools\[0\].order is '{order}', expected fcfs.*plan with --order fcfs"):
        export(plan_of(pool), engine)


def test_priorities():
    plan = plan_of(changed(DENSE, order="priority"))
    told = export(plan, "vllm")
    ((_, words),) = server(told)
    assert value(words, "--scheduling-policy") == "priority"
    assert any("SLO class" in note for note in told.notes)
    ((_, words),) = server(export(plan, "sglang"))
    assert value(words, "--schedule-policy") == "fcfs"  # the only one beside lof that takes priorities
    assert {"--enable-priority-scheduling", "--schedule-low-priority-values-first"} <= set(words)
    for engine in ("tensorrt-llm", "dynamo"):  # the frontend hands over none
        with pytest.raises(PlanError, match="order is 'priority', expected fcfs:"):
            export(plan, engine)
    for engine in ENGINES:
        ((_, words),) = server(export(plan_of(DENSE), engine))
        assert not any("priority" in word for word in words)


@pytest.mark.parametrize(
    ("engine", "flag"),
    [
        ("vllm", "--max-num-batched-tokens"),
        ("dynamo", "--max-num-batched-tokens"),
        ("sglang", "--chunked-prefill-size"),
        ("tensorrt-llm", "--max_num_tokens"),
    ],
)
def test_chunks_are_at_most_what_is_planned_when_the_engine_is_full(engine, flag):
    """Engines count decodes among the tokens of a step, so those of a full engine come on top."""
    told = export(plan_of(changed(DENSE, chunk_tokens=256)), engine)
    ((_, words),) = server(told)
    assert int(value(words, flag)) == 256 + 64
    assert any("chunk_tokens 256 is approximated" in note for note in told.notes)
    assert ("--long-prefill-token-threshold" in words) == (engine in ("vllm", "dynamo"))
    near = export(plan_of(changed(DENSE, chunk_tokens=2000)), engine)
    assert int(value(server(near)[0][1], flag)) == 2048  # never above the budget
    prefill = changed(DENSE, chunk_tokens=256, role="prefill")
    told = export(plan_of(prefill, changed(DENSE, role="decode", chunk_tokens=256)), engine)
    first, second = (words for _, words in server(told))
    assert int(value(first, flag)) == 256  # without decodes exactly
    assert flag not in second or int(value(second, flag)) == 2048
    assert not any("approximated" in note for note in told.notes)


def test_chunks_of_own_steps_are_exact():
    """With pipelining SGLang mixes no decodes into steps with prompts."""
    told = export(plan_of(changed(DENSE, chunk_tokens=256, pp=2)), "sglang")
    assert value(server(told)[0][1], "--chunked-prefill-size") == "256"
    with pytest.raises(PlanError, match=r"chunk_tokens is 8, expected at least block_tokens \(16\)"):
        export(plan_of(changed(DENSE, chunk_tokens=8, pp=2)), "sglang")


def test_norms_inside_the_all_reduce():
    plan = plan_of(changed(DENSE, overlap="fused-norm"))
    ((_, words),) = server(export(plan, "vllm"))
    assert json.loads(value(words, "--compilation-config")) == {"pass_config": {"fuse_allreduce_rms": True}}
    ((_, words),) = server(export(plan, "dynamo"))  # 0.11.0 has another name, and matches the custom operator alone
    found = json.loads(value(words, "--compilation-config"))
    assert found == {"pass_config": {"enable_fi_allreduce_fusion": True}, "custom_ops": ["+rms_norm"]}
    ((_, words),) = server(export(plan, "sglang"))
    assert "--enable-flashinfer-allreduce-fusion" in words
    assert any("by default" in note for note in export(plan, "tensorrt-llm").notes)
    alone = plan_of(Pool(1, overlap="fused-norm"))  # nothing is reduced
    for engine in ENGINES:
        ((_, words),) = server(export(alone, engine))
        assert not any("fusion" in word or "compilation" in word for word in words)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_halves_of_a_dense_step_are_in_no_engine(engine):
    with pytest.raises(PlanError, match=r"pools\[0\].overlap is 'two-way'.*expected none or fused-norm"):
        export(plan_of(changed(DENSE, overlap="two-way")), engine)
    export(plan_of(Pool(1, overlap="two-way")), engine)  # one rank has nothing to hide


def test_two_halves_around_the_exchange():
    plan = plan_of(changed(GROUPS, overlap="two-way"))
    ((_, words),) = server(export(plan, "vllm"))
    assert "--enable-dbo" in words and value(words, "--all2all-backend").startswith("deepep")
    ((env, words),) = server(export(plan, "dynamo"))
    assert "--enable-dbo" in words and env["VLLM_ALL2ALL_BACKEND"].startswith("deepep")
    ((_, words),) = server(export(plan, "sglang"))
    assert "--enable-two-batch-overlap" in words and value(words, "--moe-a2a-backend") == "deepep"
    with pytest.raises(PlanError, match="overlap is 'two-way'"):
        export(plan, "tensorrt-llm")
    uneven = changed(GROUPS, overlap="two-way", ep=4, expert_tp=2)
    with pytest.raises(PlanError, match="ep 4 and expert_tp 2, expected none or fused-norm"):
        export(plan_of(uneven), "sglang")


def test_the_exchange_is_the_one_that_was_priced():
    prefill, decode = changed(GROUPS, role="prefill"), changed(GROUPS, role="decode", max_seqs=512)
    (_, first), (_, second) = server(export(plan_of(prefill, decode), "vllm"))
    assert value(first, "--all2all-backend") == "deepep_high_throughput"
    assert value(second, "--all2all-backend") == "deepep_low_latency"
    (one, first), (two, second) = server(export(plan_of(prefill, decode), "sglang"))
    assert [value(words, "--deepep-mode") for words in (first, second)] == ["normal", "low_latency"]
    room = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
    assert (one.get(room), two.get(room)) == (None, "512")
    told = export(plan_of(GROUPS), "vllm")
    assert value(server(told)[0][1], "--all2all-backend") == "deepep_low_latency"
    assert any("faster of DeepEP's kernels for each step" in note for note in told.notes)
    ((env, words),) = server(export(plan_of(GROUPS), "sglang"))
    assert value(words, "--deepep-mode") == "auto" and room not in env
    ((env, _),) = server(export(plan_of(GROUPS), "tensorrt-llm"))
    assert env["TRTLLM_CAN_USE_DEEP_EP"] == "1"
    with pytest.raises(PlanError, match=r"max_seqs is 2000 with tp 1, expected at most 1024"):
        export(plan_of(changed(GROUPS, max_seqs=2000)), "sglang")


def test_racks_exchange_over_nvlink():
    plan = Plan("org/m", "gb200-nvl72", 16, (changed(GROUPS, attention_dp=16, ep=16),))
    ((_, words),) = server(export(plan, "vllm", 72))
    assert value(words, "--all2all-backend") == "flashinfer_all2allv"
    ((env, _),) = server(export(plan, "tensorrt-llm", 72))
    assert "TRTLLM_CAN_USE_DEEP_EP" not in env
    graph = yaml.safe_load(export(plan, "dynamo", 72).files["dynamo.yaml"])
    assert graph["spec"]["services"]["VllmWorker0"]["envs"] == [
        {"name": "VLLM_ALL2ALL_BACKEND", "value": "flashinfer_all2allv"}
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_without_attention_groups_or_spread_experts_nothing_is_exchanged(engine):
    for pool in (DENSE, Pool(1, tp=4, ep=4), Pool(1, attention_dp=4, expert_tp=4)):
        ((env, words),) = server(export(plan_of(pool), engine))
        assert not any("all2all" in word or "a2a" in word or "deepep" in word for word in words)
        assert set(env) == {"CUDA_VISIBLE_DEVICES"}
