"""Launch files of prefill and decode pools: roles, the router that joins them, devices per role, what is refused."""

import json
import re
import shlex
import subprocess

import pytest
import yaml

from planner.errors import PlanError
from planner.export import ENGINES, export
from planner.plan import Plan, Pool

PREFILL = Pool(2, tp=2, role="prefill", token_budget=8192, max_seqs=16)
DECODE = Pool(1, tp=4, role="decode", token_budget=512)
PLAN = Plan("llama-3.1-70b", "h100-sxm", 8, (PREFILL, DECODE))
TWO_KINDS = Plan(
    "llama-3.1-70b",
    "h100-sxm",
    8,
    (PREFILL, Pool(2, tp=4, role="decode", hardware="a100-80-sxm")),
    also={"a100-80-sxm": 8},
)


def commands(exported):
    """Words of every process of launch.sh by its title, shell variables left as they are; bash checks the syntax."""
    script = exported.files["launch.sh"]
    check = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert check.returncode == 0, check.stderr
    found = re.findall(r"^# ([^\n]+)\n((?:[^#\n][^\n]*\n)+)", script, re.MULTILINE)
    return [
        (title, shlex.split(text.replace("\\\n", " "))[:-1]) for title, text in found if text.rstrip().endswith("&")
    ]


def of(exported, part):
    """Processes whose title has the part."""
    return [words for title, words in commands(exported) if part in title]


def after(words, flag):
    """The words behind every appearance of a flag, up to the next one."""
    values = []
    for position, word in enumerate(words):
        if word == flag:
            rest = words[position + 1 :]
            end = next((i for i, other in enumerate(rest) if other.startswith("--")), len(rest))
            values.append(" ".join(rest[:end]))
    return values


def settings_of(words):
    """Environment before a command."""
    return dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))


def test_vllm_gives_each_role_its_connector_and_each_replica_its_side_channel():
    exported = export(PLAN, "vllm")
    roles = {
        role: [json.loads(*after(words, "--kv-transfer-config")) for words in of(exported, role)]
        for role in ("prefill", "decode")
    }
    assert roles["prefill"] == [{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}] * 2
    assert roles["decode"] == [{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}]
    channels = [settings_of(words) for words in of(exported, "pool ")]
    assert len({env["VLLM_NIXL_SIDE_CHANNEL_PORT"] for env in channels}) == 3
    assert {env["VLLM_NIXL_SIDE_CHANNEL_HOST"] for env in channels} == {"${NODES[0]}"}


def test_vllm_router_knows_every_replica_by_its_role():
    exported = export(PLAN, "vllm")
    (router,) = of(exported, "router")
    ports = {role: [*after(words, "--port")] for role in ("prefill", "decode") for words in of(exported, role)}
    assert router[0] == "vllm-router" and "--vllm-pd-disaggregation" in router
    assert after(router, "--prefill") == ["http://${NODES[0]}:8200", "http://${NODES[0]}:8300"]
    assert after(router, "--decode") == [f"http://${{NODES[0]}}:{ports['decode'][0]}"] == ["http://${NODES[0]}:8100"]
    assert "nginx.conf" not in exported.files
    assert any("vllm-router 0.1.17" in note for note in exported.notes)


def test_vllm_side_channel_is_on_the_node_of_each_part_of_a_replica():
    plan = Plan("org/m", "h", 24, (Pool(1, tp=8, role="prefill"), Pool(1, tp=16, role="decode")))
    decode = of(export(plan, "vllm"), "decode")
    assert [settings_of(words)["VLLM_NIXL_SIDE_CHANNEL_HOST"] for words in decode] == ["${NODES[0]}", "${NODES[1]}"]


def test_decode_pools_take_prompts_longer_than_their_budget():
    decode = Pool(1, tp=4, role="decode", policy="prefill-first", token_budget=512)
    exported = export(Plan("llama-3.1-70b", "h100-sxm", 8, (PREFILL, decode)), "vllm")
    (words,) = of(exported, "decode")
    assert "--enable-chunked-prefill" in words and after(words, "--max-model-len") == ["32768"]
    assert not any("approximated" in note for note in exported.notes)


def test_sglang_servers_and_router_agree_on_bootstrap_ports():
    exported = export(PLAN, "sglang")
    prefill, decode = of(exported, "prefill"), of(exported, "decode")
    assert all(after(words, "--disaggregation-mode") == ["prefill"] for words in prefill)
    assert [after(words, "--disaggregation-mode") for words in decode] == [["decode"]]
    assert all(after(words, "--disaggregation-transfer-backend") == ["mooncake"] for words in prefill + decode)
    bootstraps = [after(words, "--disaggregation-bootstrap-port")[0] for words in prefill]
    assert len(set(bootstraps)) == 2 and not any("--disaggregation-bootstrap-port" in words for words in decode)
    (router,) = of(exported, "router")
    ports = [after(words, "--port")[0] for words in prefill]
    assert "--pd-disaggregation" in router and "--worker-urls" not in router
    assert after(router, "--prefill") == [
        f"http://${{NODES[0]}}:{port} {bootstrap}" for port, bootstrap in zip(ports, bootstraps, strict=True)
    ]
    assert after(router, "--decode") == ["http://${NODES[0]}:8100"]


def test_sglang_tells_prefill_of_decode_only_what_is_true_of_all():
    (words, _) = of(export(PLAN, "sglang"), "prefill")
    assert after(words, "--disaggregation-decode-tp") == ["4"] and after(words, "--disaggregation-decode-dp") == ["1"]
    other = Plan("llama-3.1-70b", "h100-sxm", 10, (*PLAN.pools, Pool(1, tp=2, role="decode")))
    assert not any("--disaggregation-decode-tp" in words for words in of(export(other, "sglang"), "prefill"))


def test_sglang_pairs_attention_groups_and_pipelined_prefill():
    pools = (Pool(1, tp=2, pp=2, role="prefill"), Pool(1, tp=2, attention_dp=4, ep=8, role="decode"))
    exported = export(Plan("org/m", "h", 12, pools), "sglang")
    (decode,) = of(exported, "decode")
    assert "--prefill-round-robin-balance" in decode and after(decode, "--disaggregation-prefill-pp") == ["2"]
    assert not any("--enable-mixed-chunk" in words for words in of(exported, "pool "))


def test_tensorrt_llm_lists_context_and_generation_servers():
    exported = export(PLAN, "tensorrt-llm")
    config = yaml.safe_load(exported.files["disagg_config.yaml"])
    assert config["context_servers"]["urls"] == ["127.0.0.1:8200", "127.0.0.1:8300"]
    assert config["context_servers"]["num_instances"] == 2
    assert config["generation_servers"] == {
        "num_instances": 1,
        "urls": ["127.0.0.1:8100"],
        "router": {"type": "round_robin"},
    }
    (router,) = of(exported, "router")
    assert router[:4] == ["trtllm-serve", "disaggregated", "-c", "$HERE/disagg_config.yaml"]
    context, generation = (yaml.safe_load(exported.files[f"pool{index}.yaml"]) for index in (0, 1))
    assert context["cache_transceiver_config"] == {"backend": "UCX", "max_tokens_in_buffer": 32768}
    assert context["cache_transceiver_config"] == generation["cache_transceiver_config"]
    assert context["disable_overlap_scheduler"] is True and "disable_overlap_scheduler" not in generation


def test_dynamo_has_a_service_for_each_role():
    exported = export(PLAN, "dynamo")
    services = yaml.safe_load(exported.files["dynamo.yaml"])["spec"]["services"]
    assert set(services) == {"Frontend", "VllmPrefillWorker0", "VllmDecodeWorker1"}
    prefill, decode = services["VllmPrefillWorker0"], services["VllmDecodeWorker1"]
    assert [s["subComponentType"] for s in (prefill, decode)] == ["prefill", "decode"]
    assert [(s["replicas"], s["resources"]["limits"]["gpu"]) for s in (prefill, decode)] == [(2, "2"), (1, "4")]
    for service, flag in ((prefill, "--is-prefill-worker"), (decode, "--is-decode-worker")):
        arguments = service["extraPodSpec"]["mainContainer"]["args"]
        assert flag in arguments and after(arguments, "--connector") == ["nixl"]
        assert "nodeSelector" not in service["extraPodSpec"]
    assert "--enforce-disagg" in services["Frontend"]["extraPodSpec"]["mainContainer"]["args"]


def test_dynamo_puts_each_role_on_its_devices():
    exported = export(TWO_KINDS, "dynamo")
    services = yaml.safe_load(exported.files["dynamo.yaml"])["spec"]["services"]
    pods = [services[name]["extraPodSpec"] for name in ("VllmPrefillWorker0", "VllmDecodeWorker1")]
    label = "nvidia.com/gpu.product"
    assert [pod["nodeSelector"][label] for pod in pods] == ["NVIDIA-H100-80GB-HBM3", "NVIDIA-A100-SXM4-80GB"]
    assert all(pod["tolerations"][0]["key"] == "nvidia.com/gpu" for pod in pods)
    assert "nodeSelector" not in services["Frontend"]["extraPodSpec"]


def test_dynamo_tells_devices_apart_that_have_no_name_or_the_same():
    pools = (PREFILL, Pool(1, tp=4, role="decode", hardware="hgx-h100-ethernet"))
    exported = export(Plan("llama-3.1-70b", "hgx-h100", 8, pools, also={"hgx-h100-ethernet": 8}), "dynamo")
    services = yaml.safe_load(exported.files["dynamo.yaml"])["spec"]["services"]
    selectors = [services[name]["extraPodSpec"]["nodeSelector"] for name in ("VllmPrefillWorker0", "VllmDecodeWorker1")]
    assert selectors == [{"shardwise/device": "hgx-h100"}, {"shardwise/device": "hgx-h100-ethernet"}]
    assert any("shardwise/device=hgx-h100 on the nodes" in note for note in exported.notes)


@pytest.mark.parametrize("engine", ENGINES)
def test_nodes_of_each_kind_hold_the_pools_of_their_devices(engine):
    exported = export(TWO_KINDS, engine)
    _, first, second, _ = re.split(r"^(?:\d+|\*)\)", exported.files["launch.sh"], flags=re.MULTILINE)
    assert first.count(", prefill") == 2 and ", decode" not in first
    assert second.count(", decode") == 2 and ", prefill" not in second
    assert any("0 to 0 h100-sxm, 1 to 1 a100-80-sxm" in note for note in exported.notes)


def test_servers_of_each_kind_have_their_own_size():
    plan = Plan("org/m", "a", 4, (Pool(1, role="prefill"), Pool(1, tp=8, role="decode", hardware="b")), also={"b": 8})
    exported = export(plan, "vllm", {"a": 4, "b": 4})
    assert [len(of(exported, role)) for role in ("prefill", "decode")] == [1, 2]
    with pytest.raises(PlanError, match="gpus_per_node is 0 for b"):
        export(plan, "vllm", {"a": 4})


@pytest.mark.parametrize("engine", ENGINES)
def test_the_version_is_said_with_the_transfer(engine):
    exported = export(PLAN, engine)
    (note,) = [note for note in exported.notes if note.startswith("KV goes by")]
    version = "0.11.0" if engine == "dynamo" else exported.version
    assert version in note
    serialized = Plan(PLAN.model, PLAN.hardware, PLAN.gpus, PLAN.pools, transfer="serialized")
    (other,) = [note for note in export(serialized, engine).notes if note.startswith("KV goes by")]
    assert [("transfer is" in text) for text in (note, other)] == (
        [False, True] if engine == "sglang" else [True, False]
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_roles_that_change_are_noted(engine):
    switching = Plan(PLAN.model, PLAN.hardware, PLAN.gpus, PLAN.pools, role_switch_s=0.7)
    told = [[note for note in export(plan, engine).notes if "role_switch_s" in note] for plan in (PLAN, switching)]
    assert told[0] == []
    (note,) = told[1]
    assert "role_switch_s 0.7 is not exported" in note


def changed(prefill=(), decode=(), model="org/m"):
    """The plan with other pools, on enough devices."""
    pools = (Pool(**{"replicas": 1, "role": "prefill", **dict(prefill)}),)
    pools += (Pool(**{"replicas": 1, "role": "decode", **dict(decode)}),)
    return Plan(model, "h100-sxm", 64, pools)


@pytest.mark.parametrize(
    "engines, plan, told",
    [
        ("vllm sglang tensorrt-llm dynamo", changed(decode={"kv": "fp8"}), "pools[1].kv is fp8 with bf16 in pools[0]"),
        ("vllm", changed({"block_tokens": 64}), "pools[1].block_tokens is 16 with 64"),
        ("sglang tensorrt-llm dynamo", changed(decode={"block_tokens": 32}), "pools[1].block_tokens is 32 with 16"),
        ("vllm dynamo", changed({"tp": 4}, {"tp": 2}), "expected a multiple of it"),
        ("vllm sglang dynamo", changed({"tp": 2}, {"tp": 3}), "pools[1].tp is 3 with 2 in pools[0]"),
        ("vllm dynamo", changed({"pp": 2}), "pools[0].pp is 2, expected 1"),
        ("vllm sglang dynamo", changed(decode={"pp": 2}), "pools[1].pp is 2, expected 1"),
        ("tensorrt-llm", changed({"pp": 2, "stages": (41, 39)}), "stages is [41, 39]"),
        ("dynamo", changed({"tp": 8}, {"tp": 16}), "pools[1].tp is 16 with 8 GPUs per node"),
        ("vllm sglang", changed({"tp": 4}, {"tp": 16}, "llama-3.1-70b"), "at most the model's 8 KV heads"),
        ("sglang", changed({"tp": 8}, {"tp": 16}, "llama-3.1-70b"), "at most the model's 8 KV heads"),
    ],
)
def test_what_engines_cannot_join_is_told(engines, plan, told):
    for engine in engines.split():
        with pytest.raises(PlanError) as caught:
            export(plan, engine)
        assert told in str(caught.value) and "\n" not in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize(
    "engine, plan",
    [
        ("vllm", changed(decode={"block_tokens": 32})),
        ("sglang", changed({"tp": 4}, {"tp": 2})),
        ("sglang", changed({"pp": 2})),
        ("tensorrt-llm", changed({"tp": 4, "pp": 2}, {"tp": 2})),
        ("vllm", changed({"tp": 8}, {"tp": 16}, "llama-3.1-70b")),
        ("vllm", changed({"tp": 4}, {"tp": 16}, "deepseek-v3")),
        ("sglang", changed({"tp": 16}, {"tp": 4}, "deepseek-v3")),
    ],
)
def test_what_engines_can_join_is_written(engine, plan):
    assert of(export(plan, engine), "prefill")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("role", ["aggregated", "mixed"])
def test_other_roles_beside_prefill_and_decode_are_refused(engine, role):
    plan = Plan("org/m", "h100-sxm", 16, (*PLAN.pools, Pool(1, role=role)))
    with pytest.raises(PlanError, match=rf"pools\[2\].role is '{role}' beside prefill and decode pools"):
        export(plan, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_mixed_pools_alone_are_served_whole(engine):
    exported = export(Plan("org/m", "h100-sxm", 2, (Pool(2, role="mixed"),)), engine)
    assert not any("disagg" in text for name, text in exported.files.items() if name != "disagg_config.yaml")
    assert any("serve whole requests" in note for note in exported.notes)


@pytest.mark.parametrize("engine", ENGINES)
def test_encode_pools_are_refused(engine):
    pools = (Pool(1), Pool(1, role="encode"))
    with pytest.raises(PlanError, match=r"pools\[1\].role is 'encode'"):
        export(Plan("org/m", "h100-sxm", 2, pools, encoder="vit"), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_shares_of_a_device_are_refused(engine):
    with pytest.raises(PlanError, match=r"pools\[0\].sharing is 'static'"):
        export(Plan("org/m", "h100-sxm", 1, (Pool(1, sharing="static", shares=(0.5, 0.5)),)), engine)


def test_pools_on_devices_of_two_vendors_are_refused():
    pools = (PREFILL, Pool(1, tp=4, role="decode", hardware="mi300x"))
    with pytest.raises(PlanError, match="devices of AMD, NVIDIA, expected one vendor's"):
        export(Plan("llama-3.1-70b", "h100-sxm", 8, pools, also={"mi300x": 8}), "vllm")


def test_unequal_contexts_and_unknown_heads_are_noted():
    exported = export(changed({"tp": 1, "max_context_tokens": 8192}, {"tp": 2}), "vllm")
    assert any("within 8192 tokens" in note for note in exported.notes)
    assert any("at least 2 KV heads" in note for note in exported.notes)
