"""SGLang 0.5.6: one `sglang.launch_server` per replica (and per node of a replica), sglang-router 0.2.4 in front.

Flags and their checks: python/sglang/srt/server_args.py of the 0.5.6 wheel and sglang_router/router_args.py of the
0.2.4 wheel. --tp-size counts all ranks of a pipeline stage; attention runs on tp-size / dp-size of them, experts on
tp-size / ep-size (srt/layers/dp_attention.py, srt/distributed/parallel_state.py). With DP attention the server divides
--max-running-requests and --chunked-prefill-size by dp-size, with pipelining the former by pp-size. Every stage has its
own attention groups (initialize_dp_attention forms them over pp-size x tp-size ranks, stages outermost).

Prefill and decode pools: docs/advanced_features/pd_disaggregation.md; the checks are in ServerArgs._handle_
disaggregation and in srt/disaggregation (common/conn.py: which ranks read from which, decode stages "not supported
yet"; mooncake/conn.py and nixl/conn.py: pages are sent as they lie, so their size and format must agree, or cut into
heads by send_kvcache_slice, which knows no copies of heads; caches with windows are refused when degrees differ).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.errors import PlanError
from planner.export.contexts import no_context
from planner.export.exchange import in_racks, sglang_environment, sglang_exchange, sglang_overlap
from planner.export.experts import Seats, sglang_flags, sglang_map
from planner.export.handover import (
    Rules,
    check_handover,
    of_role,
    pools_of_role,
    routing_weights_note,
    transfer_note,
)
from planner.export.launch import (
    ROUTER_PORT,
    Command,
    Export,
    Replica,
    address,
    beside_script,
    common_notes,
    compute_dtype,
    model_repository,
    no_static,
    nodes_of,
    script,
    title,
    visible,
)
from planner.export.queueing import no_layered, sglang_queue_flags, step_tokens
from planner.plan import Plan, Pool

VERSION, ROUTER_VERSION = "0.5.6", "0.2.4"

RULES = Rules(f"SGLang {VERSION}", tp="divides", blocks="same", prefill_stages=True, decode_stages=False, copies=False)

_HOW = (
    f"KV goes by mooncake (package mooncake-transfer-engine, RDMA), chunk by chunk as SGLang {VERSION} computes a "
    "prompt; --disaggregation-transfer-backend nixl is the other way."
)

_KV = {"bf16": "bf16", "fp16": "auto", "fp32": "auto", "fp8": "fp8_e4m3", "fp4": "fp4_e2m1"}


def launch_files(plan: Plan, replicas: Sequence[Replica], seats: Mapping[str, Seats]) -> Export:
    """launch.sh with every server and, for more than one replica, the router; the maps of experts of its pools."""
    notes = common_notes(plan, replicas)
    check_handover(plan, RULES, notes)
    repository = model_repository(plan)
    flags = [
        _flags(pool, index, notes, rack=in_racks(replicas, index)) + _kv_flags(plan, pool)
        for index, pool in enumerate(plan.pools)
    ]
    maps = {f"pool{index}-experts.json": sglang_map(pool, seats) for index, pool in enumerate(plan.pools)}
    for own, (name, text) in zip(flags, maps.items(), strict=True):
        own += [] if text is None else ["--init-expert-location", beside_script(name)]
    commands = _router(plan, replicas, notes)
    for replica in replicas:
        for rank, node in enumerate(replica.nodes):
            argv = ["python3", "-m", "sglang.launch_server", "--model-path", repository]
            # Left to itself the server draws its NCCL port among those where other servers of the node will listen.
            argv += ["--host", "0.0.0.0", "--port", str(replica.port), "--nccl-port", str(replica.port + 20_000)]
            argv += flags[replica.pool_index]
            if replica.pool.role == "prefill":
                argv += ["--disaggregation-bootstrap-port", str(replica.kv_port)]
            if len(replica.nodes) > 1:
                _check_share(replica)
                argv += ["--nnodes", str(len(replica.nodes)), "--node-rank", str(rank)]
                argv += ["--dist-init-addr", address(replica.nodes[0], replica.rendezvous_port)]
            env = visible(replica.gpus[rank]) | sglang_environment(replica.pool, replica.pool_index)
            if replica.pool.stages is not None:
                env["SGLANG_PP_LAYER_PARTITION"] = ",".join(map(str, replica.pool.stages))
            commands.append(Command(node, argv, env, title(replica)))
    header = f"SGLang {VERSION}: {len(replicas)} replicas of {repository}"
    files = {"launch.sh": script(commands, nodes_of(replicas), header)}
    files |= {name: text for name, text in maps.items() if text is not None}
    return Export("sglang", VERSION, files, tuple(notes))


def _kv_flags(plan: Plan, pool: Pool) -> list[str]:
    """Flags of a prefill or decode pool that do not depend on the replica.

    Servers tell each other their degrees when they connect, so those of the other role are given only where there is
    one answer, and one that the server accepts.
    """
    if pool.role not in ("prefill", "decode"):
        return []
    flags = ["--disaggregation-mode", pool.role, "--disaggregation-transfer-backend", "mooncake"]
    if pool.role == "prefill":
        shapes = {(other.tp * other.attention_dp, other.attention_dp) for _, other in pools_of_role(plan, "decode")}
        ranks, groups = min(shapes)
        own = pool.tp * pool.attention_dp
        if len(shapes) == 1 and max(ranks, own) % min(ranks, own) == 0:
            flags += ["--disaggregation-decode-tp", str(ranks), "--disaggregation-decode-dp", str(groups)]
        return [*flags, "--load-balance-method", "round_robin"] if pool.attention_dp > 1 else flags
    stages = {other.pp for _, other in pools_of_role(plan, "prefill")}
    if len(stages) == 1 and stages != {1}:
        flags += ["--disaggregation-prefill-pp", str(stages.pop())]
    return [*flags, "--prefill-round-robin-balance"] if pool.attention_dp > 1 else flags


def _check_share(replica: Replica) -> None:
    """Raise PlanError unless nodes hold whole tensor-parallel groups or the groups whole nodes."""
    share, group = len(replica.gpus[0]), replica.pool.tp * replica.pool.attention_dp
    if share % group and group % share:
        raise PlanError(
            f"pools[{replica.pool_index}]: {share} GPUs per node and stages of {group} GPUs, expected one to divide "
            "the other for SGLang; plan other degrees"
        )


def _flags(pool: Pool, index: int, notes: list[str], *, rack: bool) -> list[str]:
    where, d = f"pools[{index}]", pool.attention_dp
    no_static(pool, index, f"SGLang {VERSION}")
    no_layered(pool, where, f"SGLang {VERSION}")
    no_context(pool, index, f"SGLang {VERSION}", "it cuts prompts over ranks for DeepSeek's sparse attention alone")
    if pool.kv not in _KV:
        raise PlanError(f"{where}.kv is {pool.kv!r}, expected one of {', '.join(_KV)} for SGLang; plan kv fp8")
    flags = ["--tp-size", str(pool.tp * d), "--pp-size", str(pool.pp)]
    if d > 1:
        flags += ["--dp-size", str(d), "--enable-dp-attention"]
        notes.append(f"{where}: SGLang offers DP attention for DeepSeek and Qwen mixture-of-experts models.")
    if pool.ep > 1:
        flags += ["--ep-size", str(pool.ep), *sglang_flags(pool)]
    flags += sglang_exchange(pool, where, notes, rack=rack) + sglang_overlap(pool, where, f"SGLang {VERSION}", notes)
    flags += ["--dtype", compute_dtype(pool, index, notes), "--kv-cache-dtype", _KV[pool.kv]]
    if pool.weights == "fp8":
        flags += ["--quantization", "fp8"]
    flags += ["--max-running-requests", str(pool.max_seqs * d * pool.pp)]
    flags += [*_policy_flags(pool, where, notes), *sglang_queue_flags(pool, where, f"SGLang {VERSION}", notes)]
    flags += ["--page-size", str(pool.block_tokens), "--context-length", str(pool.max_context_tokens)]
    return [*flags, "--disable-radix-cache"] if pool.prefix_caching == "off" else flags


def _policy_flags(pool: Pool, where: str, notes: list[str]) -> list[str]:
    if pool.role == "decode":
        return []
    if pool.policy == "chunked":
        name = "token_budget" if pool.chunk_tokens is None else "chunk_tokens"
        mixed = pool.role != "prefill" and pool.pp == 1
        tokens = step_tokens(pool, where, f"SGLang {VERSION}", notes, mixed=mixed)
        chunk = tokens // pool.block_tokens * pool.block_tokens
        if chunk == 0:
            raise PlanError(
                f"{where}.{name} is {getattr(pool, name)}, expected at least block_tokens ({pool.block_tokens}): "
                "SGLang cuts chunks at page boundaries"
            )
        if chunk < tokens:
            notes.append(f"{where}: SGLang's chunks are whole pages, so {chunk} tokens instead of {tokens}.")
        flags = ["--chunked-prefill-size", str(chunk * pool.attention_dp)]
        if pool.role == "prefill":
            return flags
        if pool.pp == 1:
            return [*flags, "--enable-mixed-chunk"]
        notes.append(f"{where}: SGLang {VERSION} refuses mixed steps with pipelining; chunks run in own steps.")
        return flags
    if pool.policy == "orca" and pool.role != "prefill":
        notes.append(
            f"{where}: policy orca is approximated: SGLang runs whole prompts before decodes (policy prefill-first); "
            "vllm and tensorrt-llm mix them."
        )
    if pool.max_context_tokens > pool.token_budget:
        notes.append(f"{where}: SGLang takes prompts up to the context length even beyond token_budget.")
    return ["--chunked-prefill-size", "-1", "--max-prefill-tokens", str(pool.token_budget)]


def _router(plan: Plan, replicas: Sequence[Replica], notes: list[str]) -> list[Command]:
    if len(replicas) == 1:
        notes.append(f"One replica: clients use its port {replicas[0].port} directly.")
        return []
    known = {"round-robin": "round_robin", "random": "random", "prefix-aware": "cache_aware"}
    policy = known.get(plan.router, "power_of_two")
    if plan.router == "least-tokens":
        notes.append("Router least-tokens: sglang-router has no such policy; power_of_two over its load comes nearest.")
    notes.append(f"The router is sglang-router {ROUTER_VERSION}, a package of its own.")
    argv = ["python3", "-m", "sglang_router.launch_router", "--host", "0.0.0.0", "--port", str(ROUTER_PORT)]
    argv += ["--policy", policy]
    if plan.disaggregated:
        notes += [*transfer_note(plan, _HOW, layerwise=True), *routing_weights_note(plan)]
        argv.append("--pd-disaggregation")
        for replica in of_role(replicas, "prefill"):
            argv += ["--prefill", address(replica.nodes[0], replica.port, "http://"), str(replica.kv_port)]
        for replica in of_role(replicas, "decode"):
            argv += ["--decode", address(replica.nodes[0], replica.port, "http://")]
        return [Command(0, argv, title=f"router, port {ROUTER_PORT}")]
    argv.append("--worker-urls")
    argv += [address(replica.nodes[0], replica.port, "http://") for replica in replicas]
    return [Command(0, argv, title=f"router, port {ROUTER_PORT}")]
