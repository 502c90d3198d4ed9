"""Launch files: commands parsed back say the plan, use flags of the named version, and share no GPU."""

import json
import shlex
import subprocess
from collections import defaultdict
from dataclasses import replace

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import planner.export.launch
from planner.errors import PlanError
from planner.export import ENGINES, Seats, export, model_repository
from planner.plan import Plan, Pool


def words(text):
    """Blank-separated words."""
    return text.split()


VLLM = words(
    "--tensor-parallel-size --pipeline-parallel-size --data-parallel-size --enable-expert-parallel --dtype "
    "--quantization --kv-cache-dtype --max-num-seqs --max-num-batched-tokens --block-size --no-enable-prefix-caching "
    "--enable-chunked-prefill --no-enable-chunked-prefill --max-model-len --enable-eplb --eplb-config "
    "--long-prefill-token-threshold --scheduling-policy --enable-dbo --compilation-config"
)

#: Flags of each program, read from the sources named; --no-... are argparse.BooleanOptionalAction.
FLAGS = {
    # vllm 0.12.0 wheel: vllm/engine/arg_utils.py, vllm/entrypoints/openai/cli_args.py
    "vllm": {
        *VLLM,
        *words("--host --port --headless --nnodes --node-rank --master-addr --master-port --kv-transfer-config"),
        "--all2all-backend",
        *words(
            "--data-parallel-size-local --data-parallel-start-rank --data-parallel-address --data-parallel-rpc-port"
        ),
    },
    # vllm-router 0.1.17 wheel: vllm_router/router_args.py
    "vllm-router": set(
        words("--host --port --vllm-pd-disaggregation --policy --worker-startup-timeout-secs --prefill --decode")
    ),
    # vllm 0.11.0 wheel: vllm/engine/arg_utils.py; ai-dynamo 0.7.1 wheel: dynamo/vllm/args.py
    "dynamo.vllm": {*VLLM, "--model", "--connector", "--is-prefill-worker", "--is-decode-worker"},
    # ai-dynamo 0.7.1 wheel: dynamo/frontend/main.py
    "dynamo.frontend": {
        "--http-port",
        "--router-mode",
        "--kv-overlap-score-weight",
        "--no-kv-events",
        "--enforce-disagg",
    },
    # sglang 0.5.6 wheel: sglang/srt/server_args.py
    "sglang.launch_server": set(
        words(
            "--model-path --host --port --nccl-port --tp-size --pp-size --dp-size --enable-dp-attention --ep-size "
            "--dtype --kv-cache-dtype --quantization --max-running-requests --chunked-prefill-size "
            "--max-prefill-tokens --enable-mixed-chunk --schedule-policy --page-size --context-length "
            "--disable-radix-cache --nnodes --node-rank --dist-init-addr --disaggregation-mode "
            "--disaggregation-transfer-backend --disaggregation-bootstrap-port --disaggregation-decode-tp "
            "--disaggregation-decode-dp --disaggregation-prefill-pp --load-balance-method "
            "--prefill-round-robin-balance --ep-num-redundant-experts --ep-dispatch-algorithm --enable-eplb "
            "--init-expert-location --moe-a2a-backend --deepep-mode --enable-two-batch-overlap "
            "--enable-flashinfer-allreduce-fusion --enable-priority-scheduling --schedule-low-priority-values-first"
        )
    ),
    # sglang-router 0.2.4 wheel: sglang_router/router_args.py
    "sglang_router.launch_router": {
        "--host",
        "--port",
        "--policy",
        "--worker-urls",
        "--pd-disaggregation",
        "--prefill",
        "--decode",
    },
    # TensorRT-LLM repository at commit 00209af149e7 (1.2 series): tensorrt_llm/commands/serve.py
    "trtllm-serve": set(
        words(
            "--backend --host --port --tp_size --pp_size --ep_size --gpus_per_node --max_batch_size --max_num_tokens "
            "--max_seq_len --extra_llm_api_options --server_start_timeout --request_timeout"
        )
    ),
    "nginx": set(),
    "kubectl": set(),
}
#: tensorrt_llm 1.2.1, BaseLlmArgs in tensorrt_llm/llmapi/llm_args.py
TENSORRT_OPTIONS = {
    "dtype",
    "enable_chunked_prefill",
    "kv_cache_config",
    "enable_attention_dp",
    "moe_expert_parallel_size",
    "moe_tensor_parallel_size",
    "pp_partition",
    "cache_transceiver_config",
    "moe_config",
    "disable_overlap_scheduler",
}
#: Names of tensorrt_llm/llmapi/disagg_utils.py, extract_disagg_cfg.
DISAGGREGATED_OPTIONS = {"hostname", "port", "backend", "context_servers", "generation_servers"}


#: Maps of experts that plans may name: two mixture layers of four experts in six slots, behind a dense layer.
SEATS = {"map.json": Seats({1: [0, 1, 2, 3, 0, 1], 2: [3, 2, 1, 0, 2, 3]}, 4, 3)}


class Launched:
    """One process of launch.sh: its node, program, flags and environment."""

    def __init__(self, node, argv):
        self.node, self.env, self.flags = node, {}, defaultdict(list)
        while "=" in argv[0] and not argv[0].startswith("-"):
            name, value = argv.pop(0).split("=", 1)
            self.env[name] = value
        self.words = argv
        if argv[0] == "mpirun":
            self.mpi, argv = argv[: argv.index("trtllm-serve")], argv[argv.index("trtllm-serve") :]
        self.program = argv[2] if argv[0] == "python3" else argv[0]
        flag = None
        for word in argv[1:]:
            if word.startswith("--"):
                flag = word
                self.flags[flag] = []
            elif flag:
                self.flags[flag].append(word)

    def number(self, flag, default=1):
        return int(self.flags[flag][0]) if flag in self.flags else default

    @property
    def gpus(self):
        return [int(gpu) for gpu in self.env["CUDA_VISIBLE_DEVICES"].split(",")]


def launched(exported):
    """The processes in launch.sh, after bash has checked its syntax."""
    script = exported.files["launch.sh"]
    check = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert check.returncode == 0, check.stderr
    node, processes = 0, []
    for line in script.replace("\\\n", " ").splitlines():
        if line.rstrip(")").isdigit():
            node = int(line.rstrip(")"))
        elif line.endswith(" &"):
            processes.append(Launched(node, shlex.split(line[:-2])))
    return processes


def workers(exported):
    programs = {"vllm", "dynamo.vllm", "sglang.launch_server", "trtllm-serve"}
    return [p for p in launched(exported) if p.program in programs and "CUDA_VISIBLE_DEVICES" in p.env]


@st.composite
def plans(draw):
    chosen = []
    for _ in range(draw(st.integers(1, 3))):
        tp, pp, d = draw(
            st.sampled_from([(4, 1, 1), (1, 1, 8), (2, 2, 2), (8, 2, 1), (1, 1, 1), (2, 1, 1), (1, 2, 16)])
        )
        ranks = tp * d
        ep = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
        seqs = draw(st.integers(1, 512))
        policy = draw(st.sampled_from(["chunked", "prefill-first", "orca"]))
        pool = Pool(
            replicas=draw(st.integers(1, 3)),
            tp=tp,
            pp=pp,
            attention_dp=d,
            ep=ep,
            expert_tp=ranks // ep,
            redundant_experts=draw(st.sampled_from([0, 0, 2])) if ep > 1 else 0,
            expert_map=draw(st.sampled_from([None, None, "map.json"])) if ep > 1 else None,
            stages=draw(st.none() | st.just((30,) * pp)),
            weights=draw(st.sampled_from(["bf16", "fp8", "int4"])),
            activations=draw(st.sampled_from(["bf16", "bf16", "fp8"])),
            kv=draw(st.sampled_from(["bf16", "fp8"])),
            policy=policy,
            chunk_tokens=draw(st.sampled_from([None, 64])) if policy == "chunked" else None,
            order=draw(st.sampled_from(["fcfs", "fcfs", "priority"])),
            overlap=draw(st.sampled_from(["none", "none", "fused-norm", "two-way"])),
            max_seqs=seqs,
            token_budget=draw(st.integers(max(seqs, 64), 8192)),
            block_tokens=draw(st.sampled_from([16, 32, 64])),
        )
        chosen.append(pool)
    used = sum(pool.gpus for pool in chosen)
    router = draw(st.sampled_from(["round-robin", "random", "least-tokens", "power-of-two"]))
    return Plan("org/model", "h100-sxm", used + draw(st.sampled_from([0, 1, 8])), tuple(chosen), router=router)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(plan=plans())
def test_laws_of_launch_files(engine, plan):
    try:
        exported = export(plan, engine, seats=SEATS)
    except PlanError as error:
        assert "\n" not in str(error) and "expected" in str(error)
        assume(False)
    assert exported.version and all("\n" not in note for note in exported.notes)
    for process in launched(exported):
        assert set(process.flags) <= FLAGS[process.program]
    for name, text in exported.files.items():
        if name.endswith(".yaml"):
            options = yaml.safe_load(text)
            assert name == "dynamo.yaml" or set(options) <= TENSORRT_OPTIONS
    if any("kubectl" in process.words for process in launched(exported)):
        assert_graph_holds_the_pools(plan, yaml.safe_load(exported.files["dynamo.yaml"]))
        return
    assert_gpus_are_disjoint_and_whole(plan, exported)


@st.composite
def disaggregated_plans(draw):
    """Prefill pools on h100-sxm and decode pools on either device, that most engines could join."""
    block, kv = draw(st.sampled_from([16, 64])), draw(st.sampled_from(["bf16", "fp8"]))
    pools = []
    for role in ["prefill"] * draw(st.integers(1, 2)) + ["decode"] * draw(st.integers(1, 2)):
        tp, pp, d = draw(
            st.sampled_from([(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 1, 4), (1, 1, 16), (2, 2, 1)])
        )
        pool = Pool(
            replicas=draw(st.integers(1, 3)),
            tp=tp,
            pp=pp if role == "prefill" else 1,
            attention_dp=d,
            ep=1,
            expert_tp=tp * d,
            kv=kv,
            policy=draw(st.sampled_from(["chunked", "prefill-first", "orca"])),
            max_seqs=draw(st.integers(1, 64)),
            token_budget=draw(st.integers(64, 8192)),
            block_tokens=block,
            role=role,
            hardware=draw(st.sampled_from([None, "a100-80-sxm"])) if role == "decode" else None,
        )
        pools.append(pool)
    here = sum(pool.gpus for pool in pools if pool.hardware is None)
    there = sum(pool.gpus for pool in pools if pool.hardware is not None)
    router = draw(st.sampled_from(["round-robin", "random", "least-tokens", "power-of-two"]))
    transfer = draw(st.sampled_from(["layer-wise", "serialized"]))
    spare = draw(st.sampled_from([0, 3]))
    also = {"a100-80-sxm": there + spare} if there + spare else {}
    return Plan("org/model", "h100-sxm", here + spare, tuple(pools), router=router, also=also, transfer=transfer)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(plan=disaggregated_plans())
def test_laws_of_launch_files_of_pools(engine, plan):
    try:
        exported = export(plan, engine, seats=SEATS)
    except PlanError as error:
        assert "\n" not in str(error) and "expected" in str(error)
        assume(False)
    assert all("\n" not in note for note in exported.notes)
    processes = launched(exported)
    for process in processes:
        assert set(process.flags) <= FLAGS[process.program]
    for name, text in exported.files.items():
        known = DISAGGREGATED_OPTIONS if name == "disagg_config.yaml" else TENSORRT_OPTIONS
        if name.endswith(".yaml") and name != "dynamo.yaml":
            assert set(yaml.safe_load(text)) <= known
    if engine == "dynamo":
        assert_graph_holds_the_pools(plan, yaml.safe_load(exported.files["dynamo.yaml"]))
        if any("kubectl" in process.words for process in processes):
            return
    assert_devices_are_those_of_the_pools(plan, exported)
    assert_ports_are_distinct(exported)


def assert_devices_are_those_of_the_pools(plan, exported):
    """No device twice, and as many of each hardware as the plan's pools hold; nodes of 8 in the plan's order."""
    held = []
    for process in workers(exported):
        hosts = [process.node]
        if hasattr(process, "mpi"):
            hosts = [int(part.split("[")[1].split("]")[0]) for part in process.mpi[4].split(",")]
        held += [(node, gpu) for node in hosts for gpu in process.gpus]
    assert len(set(held)) == len(held) and all(gpu < 8 for _, gpu in held)
    first = -(-plan.gpus // 8) if any(pool.hardware is None for pool in plan.pools) else 0
    here = sum(pool.gpus for pool in plan.pools if pool.hardware is None)
    assert sum(node < first for node, _ in held) == here and len(held) == plan.gpus_used


def assert_ports_are_distinct(exported):
    """No two processes of a node listen on one port, ranges of side channels included."""
    taken = set()
    for process in launched(exported):
        mine = [flag for name in ("--port", "--http-port", "--nccl-port") for flag in process.flags[name]]
        mine += process.flags["--disaggregation-bootstrap-port"]
        ports = [int(port) for port in mine]
        if "VLLM_NIXL_SIDE_CHANNEL_PORT" in process.env:
            base = int(process.env["VLLM_NIXL_SIDE_CHANNEL_PORT"])
            ranks = process.number("--tensor-parallel-size") * process.number("--data-parallel-size")
            ports += range(base, base + ranks)
        for port in ports:
            assert (process.node, port) not in taken
            taken.add((process.node, port))


def assert_graph_holds_the_pools(plan, graph):
    services = graph["spec"]["services"]
    for index, pool in enumerate(plan.pools):
        role = pool.role.title() if pool.role in ("prefill", "decode") else ""
        service = services[f"Vllm{role}Worker{index}"]
        per_node = int(service["resources"]["limits"]["gpu"])
        assert per_node * service.get("multinode", {"nodeCount": 1})["nodeCount"] == pool.gpus_per_replica
        assert service["replicas"] == pool.replicas
        arguments = service["extraPodSpec"]["mainContainer"]["args"]
        assert {word for word in arguments if word.startswith("--")} <= FLAGS["dynamo.vllm"]


def assert_gpus_are_disjoint_and_whole(plan, exported):
    held, endpoints, sizes = set(), set(), []
    for process in workers(exported):
        hosts = [process.node]
        if hasattr(process, "mpi"):
            text = process.mpi[process.mpi.index("-H") + 1]
            hosts = [int(part.split("[")[1].split("]")[0]) for part in text.split(",")]
        mine = {(node, gpu) for node in hosts for gpu in process.gpus}
        assert not mine & held and all(gpu < 8 and node * 8 + gpu < plan.gpus for node, gpu in mine)
        held |= mine
        if "--port" in process.flags:
            endpoint = (process.node, process.number("--port"))
            assert endpoint not in endpoints
            endpoints.add(endpoint)
        if not is_follower(process):
            sizes.append(degrees(process))
    assert len(held) == plan.gpus_used
    assert sorted(sizes) == sorted(pool.gpus_per_replica for pool in plan.pools for _ in range(pool.replicas))


def is_follower(process):
    return "--headless" in process.flags or process.number("--node-rank", 0) > 0


def degrees(process):
    """GPUs of the whole replica according to its flags."""
    if process.program in {"vllm", "dynamo.vllm"}:
        names = ("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size")
    else:
        names = ("--tp-size", "--pp-size") if process.program.startswith("sglang") else ("--tp_size", "--pp_size")
    product = 1
    for name in names:
        product *= process.number(name)
    return product


def only(plan, engine):
    exported = export(plan, engine)
    (process,) = workers(exported)
    return process, exported


def test_vllm_says_the_plan():
    pool = Pool(1, tp=4, weights="fp8", activations="fp8", kv="fp8", max_seqs=64, token_budget=4096, block_tokens=32)
    process, exported = only(Plan("org/m", "h100-sxm", 4, (pool,)), "vllm")
    assert process.words[:3] == ["vllm", "serve", "org/m"] and exported.version == "0.12.0"
    assert process.flags["--quantization"] == ["fp8"] and process.flags["--kv-cache-dtype"] == ["fp8"]
    expected = {
        "--max-num-seqs": 64,
        "--max-num-batched-tokens": 4096,
        "--block-size": 32,
        "--max-model-len": 32768,
        "--tensor-parallel-size": 4,
    }
    assert {flag: process.number(flag) for flag in expected} == expected
    assert "nginx.conf" not in exported.files


def test_vllm_over_two_nodes_with_pipelining():
    pool = Pool(1, tp=8, pp=2, stages=(41, 39))
    processes = workers(export(Plan("org/m", "h", 16, (pool,)), "vllm"))
    assert [p.node for p in processes] == [0, 1] and [p.number("--node-rank") for p in processes] == [0, 1]
    assert all(p.number("--nnodes") == 2 and p.flags["--master-addr"] == ["${NODES[0]}"] for p in processes)
    assert ["--headless" in p.flags for p in processes] == [False, True]
    assert all(p.env["VLLM_PP_LAYER_PARTITION"] == "41,39" for p in processes)


def test_vllm_over_two_nodes_with_expert_parallelism():
    pool = Pool(1, attention_dp=16, ep=16)
    processes = workers(export(Plan("org/m", "h", 16, (pool,)), "vllm"))
    assert [p.number("--data-parallel-start-rank", 0) for p in processes] == [0, 8]
    assert all(p.number("--data-parallel-size-local") == 8 and "--enable-expert-parallel" in p.flags for p in processes)


def test_attention_groups_in_pipeline_stages():
    """One node: all engines; several: those that number stages outermost, as plans do."""
    inside = Pool(1, attention_dp=4, ep=4, pp=2, max_seqs=32, token_budget=1024)
    process, _ = only(Plan("org/m", "h", 8, (inside,)), "vllm")
    assert (process.number("--data-parallel-size"), process.number("--pipeline-parallel-size")) == (4, 2)
    assert process.number("--max-num-seqs") == 2 * 32  # one scheduler for each group feeds both stages
    across = Pool(1, attention_dp=8, ep=8, pp=2, max_seqs=32, token_budget=1024)
    plan = Plan("org/m", "h", 16, (across,))
    servers = workers(export(plan, "sglang"))
    expected = {"--tp-size": 8, "--dp-size": 8, "--ep-size": 8, "--pp-size": 2, "--max-running-requests": 32 * 8 * 2}
    assert [server.number("--node-rank") for server in servers] == [0, 1]
    assert all({flag: server.number(flag) for flag in expected} == expected for server in servers)
    exported = export(plan, "tensorrt-llm")
    (process,) = workers(exported)
    assert (process.number("--tp_size"), process.number("--pp_size")) == (8, 2)
    assert yaml.safe_load(exported.files["pool0.yaml"])["enable_attention_dp"]
    for engine in ("vllm", "dynamo"):
        with pytest.raises(PlanError, match="pp is 2 with attention_dp 8 on 2 nodes, expected a replica within a node"):
            export(plan, engine)


def test_a_replica_larger_than_a_node_is_cut_between_tensor_parallel_groups():
    processes = workers(export(Plan("org/m", "h", 24, (Pool(1, tp=4, pp=3),)), "vllm"))
    assert [p.gpus for p in processes] == [[0, 1, 2, 3]] * 3


def test_sglang_multiplies_what_the_server_divides():
    pool = Pool(1, tp=2, attention_dp=4, ep=4, expert_tp=2, max_seqs=32, token_budget=1000)
    process, exported = only(Plan("org/m", "h", 8, (pool,)), "sglang")
    expected = {"--tp-size": 8, "--dp-size": 4, "--ep-size": 4, "--max-running-requests": 128}
    assert {flag: process.number(flag) for flag in expected} == expected
    assert process.number("--chunked-prefill-size") == 4 * 992
    assert any("992 tokens instead of 1000" in note for note in exported.notes)


def test_sglang_runs_prefill_first_as_planned():
    pool = Pool(1, policy="prefill-first", token_budget=8192)
    process, exported = only(Plan("org/m", "h", 1, (pool,)), "sglang")
    assert process.number("--chunked-prefill-size") == -1 and process.number("--max-prefill-tokens") == 8192
    assert not any("approximated" in note for note in exported.notes)


def test_tensorrt_llm_options():
    pool = Pool(2, attention_dp=4, ep=2, expert_tp=2, kv="fp8", policy="orca")
    exported = export(Plan("org/m", "h", 8, (pool,)), "tensorrt-llm")
    assert [p.number("--tp_size") for p in workers(exported)] == [4, 4]
    options = yaml.safe_load(exported.files["pool0.yaml"])
    assert options["enable_attention_dp"] and not options["enable_chunked_prefill"]
    assert options["moe_expert_parallel_size"] * options["moe_tensor_parallel_size"] == 4
    assert options["kv_cache_config"] == {"dtype": "fp8", "enable_block_reuse": False, "tokens_per_block": 16}


def test_tensorrt_llm_over_two_nodes_is_one_mpi_world():
    process, _ = only(Plan("org/m", "h", 16, (Pool(1, tp=16),)), "tensorrt-llm")
    assert process.mpi[:5] == ["mpirun", "-n", "16", "-H", "${NODES[0]}:8,${NODES[1]}:8"]


def test_dynamo_frontend_routes():
    exported = export(Plan("org/m", "h", 8, (Pool(2, tp=4),), router="least-tokens"), "dynamo")
    (frontend,) = [p for p in launched(exported) if p.program == "dynamo.frontend"]
    assert frontend.flags["--router-mode"] == ["kv"] and any("least-tokens" in note for note in exported.notes)


@pytest.mark.parametrize("router, line", [("power-of-two", "random two least_conn;"), ("least-tokens", "least_conn;")])
def test_nginx_routes_to_every_replica(router, line):
    exported = export(Plan("org/m", "h", 16, (Pool(3, tp=4),), router=router), "vllm")
    text = exported.files["nginx.conf"]
    assert line in text and text.count("{") == text.count("}")
    assert [row.strip() for row in text.splitlines() if row.strip().startswith("server ") and ":" in row] == [
        "server node0:8100;",
        "server node0:8200;",
        "server node1:8100;",
    ]


@pytest.mark.parametrize(
    "engine, pool, told",
    [
        ("triton", Pool(1), "expected one of vllm"),
        ("vllm", Pool(1, policy="static"), "policy is 'static'"),
        ("sglang", Pool(1, policy="static"), "policy chunked"),
        ("vllm", Pool(1, tp=8, ep=4, expert_tp=2), "expected 1 or 8"),
        ("vllm", Pool(1, block_tokens=48), "block_tokens is 48"),
        ("vllm", Pool(1, kv="int4"), "kv is 'int4'"),
        ("vllm", Pool(1, policy="orca", max_seqs=512, token_budget=256), "max_seqs is 512"),
        ("sglang", Pool(1, kv="int8"), "kv is 'int8'"),
        ("sglang", Pool(1, token_budget=32, max_seqs=8, block_tokens=64), "token_budget is 32"),
        ("tensorrt-llm", Pool(1, tp=2, attention_dp=2), "plan tp 1"),
        ("tensorrt-llm", Pool(1, block_tokens=48), "power of two"),
        ("vllm", Pool(1, activations="fp8"), "activations is 'fp8'"),
        ("vllm", Pool(5, tp=3), "finds no room"),
        ("vllm", Pool(1, tp=0), "tp is 0"),
    ],
)
def test_what_an_engine_cannot_run_is_told(engine, pool, told):
    with pytest.raises(PlanError) as caught:
        export(Plan("org/m", "h", 16, (pool,)), engine)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_names_are_quoted_for_the_shell():
    model = "a b'; touch $(x) \"/config.json"
    process, _ = only(Plan(model, "h", 1, (Pool(1),)), "vllm")
    assert process.words[2] == "a b'; touch $(x) \""


def test_repository_of_a_shipped_model(tmp_path, monkeypatch):
    monkeypatch.setattr(planner.export.launch, "_MODELS", tmp_path)
    (tmp_path / "short.yaml").write_text("repository: org/Long-Name\n")
    (tmp_path / "bare.yaml").write_text("source: somewhere\n")
    names = {
        name: model_repository(Plan(name, "h", 1, (Pool(1),))) for name in ("short", "bare", "other", "x/config.json")
    }
    assert names == {"short": "org/Long-Name", "bare": "bare", "other": "other", "x/config.json": "x"}
    assert any("No repository" in note for note in export(Plan("bare", "h", 1, (Pool(1),)), "vllm").notes)


def test_idle_nodes_and_unknown_ranks_end_the_script():
    script = export(Plan("org/m", "h", 16, (Pool(1, tp=16),)), "tensorrt-llm").files["launch.sh"]
    run = {
        rank: subprocess.run(["bash", "-s"], input=script, text=True, env={"NODE_RANK": rank}) for rank in ("1", "7")
    }
    assert run["1"].returncode == 0 and run["7"].returncode == 2


COPIES = Pool(2, tp=2, ep=2, redundant_experts=2, weights="fp8", activations="fp8", expert_map="map.json")


def test_copies_of_experts_and_their_places_reach_the_engines():
    plan = Plan("org/m", "h", 4, (COPIES,))
    told = export(plan, "sglang", seats=SEATS)
    for process in workers(told):
        assert process.flags["--ep-num-redundant-experts"] == ["2"]
        assert process.flags["--ep-dispatch-algorithm"] == ["dynamic"] and "--enable-eplb" not in process.flags
        assert process.flags["--init-expert-location"] == ["$HERE/pool0-experts.json"]
    rows = json.loads(told.files["pool0-experts.json"])
    assert rows == {"physical_to_logical_map": [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 2, 3]]}
    told = export(plan, "tensorrt-llm", seats=SEATS)
    assert yaml.safe_load(told.files["pool0.yaml"])["moe_config"] == {
        "backend": "WIDEEP",
        "load_balancer": {
            "num_slots": 6,
            "initial_global_assignments": {1: [0, 1, 2, 3, 0, 1], 2: [3, 2, 1, 0, 2, 3]},
            "layer_updates_per_iter": 0,
        },
    }
    for engine in ("vllm", "dynamo"):
        told = export(plan, engine, seats=SEATS)
        for process in workers(told):
            assert json.loads(process.flags["--eplb-config"][0]) == {"num_redundant_experts": 2}
            assert "--enable-eplb" in process.flags
        assert any("takes no map of experts" in note for note in told.notes)


def test_copies_without_a_map_are_left_to_the_engines_balancer():
    plan = Plan("org/m", "h", 4, (replace(COPIES, expert_map=None),))
    (first, *_) = workers(export(plan, "sglang"))
    assert "--enable-eplb" in first.flags and "--init-expert-location" not in first.flags
    assert not any("map" in note for note in export(plan, "vllm").notes)
    with pytest.raises(PlanError, match=r"pools\[0\].redundant_experts is 2 without expert_map"):
        export(plan, "tensorrt-llm")
    for engine in ENGINES:
        text = export(Plan("org/m", "h", 4, (Pool(2, tp=2, ep=2, weights="fp8", activations="fp8"),)), engine).files
        assert not any("eplb" in one or "redundant" in one or "moe_config" in one for one in text.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_map_whose_content_is_missing_is_refused(engine):
    with pytest.raises(PlanError, match=r"pools\[0\].expert_map is 'map.json', expected its content too"):
        export(Plan("org/m", "h", 4, (COPIES,)), engine)
