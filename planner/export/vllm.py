"""vLLM 0.12.0: one `vllm serve` per replica (and per node of a replica), nginx in front, or vllm-router 0.1.17.

Flags: vllm/engine/arg_utils.py, vllm/entrypoints/openai/cli_args.py and vllm/config of the 0.12.0 wheel. Several nodes:
--nnodes/--node-rank/--master-addr with --headless (ranks of a node in one process group), or, where every attention-DP
rank fits a node, --data-parallel-size-local and --data-parallel-start-rank (docs/serving/data_parallel_deployment.md).
Ranks are numbered data-parallel outermost, then by stage (vllm/distributed/parallel_state.py, initialize_model_
parallel: ExternalDP x DP x PP x TP), where the plan has stages outermost: the same within a node only.

Prefill and decode pools: NixlConnector as in docs/features/nixl_connector_usage.md of 0.12.0; what it asks of them is
checked at the handshake (vllm/distributed/kv_transfer/kv_connector/v1/nixl_connector.py of the wheel: get_target_
remote_rank, _nixl_handshake, _validate_remote_agent_handshake; one side-channel port per attention-DP rank; pipeline
stages would share one table of ranks, vllm issue 40674). The router's flags: vllm_router/router_args.py of its wheel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from planner.errors import PlanError
from planner.export.contexts import no_context
from planner.export.exchange import in_racks, vllm_backend, vllm_overlap
from planner.export.experts import Seats, vllm_flags
from planner.export.handover import Rules, check_handover, of_role, routing_weights_note, transfer_note
from planner.export.launch import (
    ROUTER_PORT,
    Command,
    Export,
    Replica,
    address,
    common_notes,
    compute_dtype,
    model_repository,
    nginx,
    no_static,
    nodes_of,
    script,
    title,
    visible,
)
from planner.export.queueing import no_layered, step_tokens, vllm_queue_flags
from planner.plan import Plan, Pool

VERSION, ROUTER_VERSION = "0.12.0", "0.1.17"

#: vllm/config/cache.py, BlockSize.
BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)

RULES = Rules(f"vLLM {VERSION}", tp="grows", blocks="multiple", prefill_stages=False, decode_stages=False)

#: NixlConnector: kv_role is named, though the router decides who prefills (nixl_connector_usage.md).
_KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


def launch_files(plan: Plan, replicas: Sequence[Replica], _seats: Mapping[str, Seats]) -> Export:
    """launch.sh, and nginx.conf for more than one replica that serves whole requests."""
    notes = common_notes(plan, replicas)
    check_handover(plan, RULES, notes)
    repository = model_repository(plan)
    flags = [
        [*engine_flags(pool, index, f"vLLM {VERSION}", notes), *_exchange_flags(pool, index, replicas, notes)]
        for index, pool in enumerate(plan.pools)
    ]
    commands = []
    for replica in replicas:
        require_stages_inside(replica, f"vLLM {VERSION}")
        for rank in range(len(replica.nodes)):
            argv = ["vllm", "serve", repository]
            argv += ["--host", "0.0.0.0", "--port", str(replica.port)] if rank == 0 else ["--headless"]
            argv += flags[replica.pool_index] + _kv_flags(replica.pool) + _node_flags(replica, rank)
            env = visible(replica.gpus[rank]) | stage_environment(replica.pool) | kv_environment(replica, rank)
            commands.append(Command(replica.nodes[rank], argv, env, title(replica)))
    files: dict[str, str] = {}
    if plan.disaggregated:
        router = [_router(plan, replicas, notes)]
    else:
        files, router = nginx(plan, replicas, notes)
    header = f"vLLM {VERSION}: {len(replicas)} replicas of {repository}"
    return Export(
        "vllm", VERSION, {"launch.sh": script(router + commands, nodes_of(replicas), header), **files}, tuple(notes)
    )


def require_stages_inside(replica: Replica, engine: str) -> None:
    """Raise PlanError where the ranks that share a stage's experts would be on other nodes than in the plan."""
    pool, nodes = replica.pool, len(replica.nodes)
    if nodes > 1 and pool.attention_dp > 1 and pool.pp > 1:
        raise PlanError(
            f"pools[{replica.pool_index}].pp is {pool.pp} with attention_dp {pool.attention_dp} on {nodes} nodes, "
            f"expected a replica within a node: {engine} keeps the stages of an attention group together, so that the "
            "experts of every stage would be spread over the nodes; plan smaller replicas or export for sglang"
        )


def stage_environment(pool: Pool) -> dict[str, str]:
    """Uneven pipeline stages (vllm/distributed/utils.py, get_pp_indices)."""
    return {} if pool.stages is None else {"VLLM_PP_LAYER_PARTITION": ",".join(map(str, pool.stages))}


def kv_environment(replica: Replica, rank: int) -> dict[str, str]:
    """Where a node of a prefill or decode replica answers for its KV (vllm/envs.py), nothing for other replicas."""
    if replica.pool.role not in _KV_ROLES:
        return {}
    return {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": address(replica.nodes[rank]),
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(replica.kv_port),
    }


def kv_notes(plan: Plan, engine: str) -> list[str]:
    """What NixlConnector does with the KV between pools of the plan."""
    if not plan.disaggregated:
        return []
    how = f"KV goes by {engine}'s NixlConnector (package nixl): decode replicas fetch it when a whole prompt is done."
    notes = [*transfer_note(plan, how), *routing_weights_note(plan)]
    if len({plan.hardware_of(pool) for pool in plan.pools}) > 1:
        notes.append(
            f"{engine} hands KV over only between equal attention backends: where the devices' defaults differ, set "
            "VLLM_ATTENTION_BACKEND (FLASH_ATTN, or TRITON_MLA for latent attention) for all workers."
        )
    return notes


def _kv_flags(pool: Pool) -> list[str]:
    if pool.role not in _KV_ROLES:
        return []
    config = {"kv_connector": "NixlConnector", "kv_role": _KV_ROLES[pool.role]}
    return ["--kv-transfer-config", json.dumps(config, separators=(",", ":"))]


def _router(plan: Plan, replicas: Sequence[Replica], notes: list[str]) -> Command:
    """vllm-router joins prefill and decode replicas, chosen separately."""
    policy = {"round-robin": "round_robin", "random": "random"}.get(plan.router, "power_of_two")
    notes += kv_notes(plan, f"vLLM {VERSION}")
    notes.append(
        f"The router is vllm-router {ROUTER_VERSION} (project vllm-project/router), a package of its own; vLLM's own "
        "example, tests/v1/kv_connector/nixl_integration/toy_proxy_server.py, only takes turns."
    )
    if plan.router not in {"round-robin", "random"}:
        what = "knows no prefixes and " if plan.router == "prefix-aware" else ""
        notes.append(f"Router {plan.router}: vllm-router's power_of_two {what}compares open requests, not tokens.")
    argv = ["vllm-router", "--host", "0.0.0.0", "--port", str(ROUTER_PORT), "--vllm-pd-disaggregation"]
    argv += ["--policy", policy, "--worker-startup-timeout-secs", "3600"]
    for role in _KV_ROLES:
        for replica in of_role(replicas, role):
            argv += [f"--{role}", address(replica.nodes[0], replica.port, "http://")]
    return Command(0, argv, title=f"router, port {ROUTER_PORT}")


def _exchange_flags(pool: Pool, index: int, replicas: Sequence[Replica], notes: list[str]) -> list[str]:
    backend = vllm_backend(pool, f"pools[{index}]", f"vLLM {VERSION}", notes, rack=in_racks(replicas, index))
    return [] if backend is None else ["--all2all-backend", backend]


def engine_flags(pool: Pool, index: int, engine: str, notes: list[str], *, priority: bool = True) -> list[str]:
    """Flags of one pool that do not depend on the replica; also what Dynamo's vLLM worker takes.

    priority   whether requests reach the engine with theirs
    """
    where = f"pools[{index}]"
    no_static(pool, index, engine)
    no_layered(pool, where, engine)
    no_context(pool, index, engine, "none of its attention backends has prefill context parallelism")
    if pool.block_tokens not in BLOCK_SIZES:
        raise PlanError(f"{where}.block_tokens is {pool.block_tokens}, expected one of {BLOCK_SIZES} for {engine}")
    if pool.max_seqs > pool.token_budget:
        raise PlanError(
            f"{where}.max_seqs is {pool.max_seqs}, expected at most token_budget ({pool.token_budget}) for {engine}"
        )
    tokens = step_tokens(pool, where, engine, notes, mixed=pool.role != "prefill")
    # One scheduler feeds all pipeline stages; the plan counts the sequences of each of its pp batches in flight.
    max_seqs = min(pool.max_seqs * pool.pp, tokens)
    if max_seqs < pool.max_seqs * pool.pp:
        notes.append(
            f"{where}: {engine} takes at most as many sequences as tokens of a step, so {max_seqs} over all pipeline "
            "stages."
        )
    flags = ["--tensor-parallel-size", str(pool.tp), "--pipeline-parallel-size", str(pool.pp)]
    flags += _expert_flags(pool, where, engine) + vllm_flags(pool, where, engine, notes)
    flags += ["--dtype", compute_dtype(pool, index, notes)]
    if pool.weights == "fp8":
        flags += ["--quantization", "fp8"]
    if pool.kv == "fp8":
        flags += ["--kv-cache-dtype", "fp8"]
    elif pool.kv not in {"bf16", "fp16", "fp32"}:
        raise PlanError(f"{where}.kv is {pool.kv!r}, expected the model's type or fp8 for {engine}; plan kv fp8")
    flags += ["--max-num-seqs", str(max_seqs), "--max-num-batched-tokens", str(tokens)]
    flags += vllm_queue_flags(pool, where, engine, notes, priority=priority) + vllm_overlap(pool, where, engine, notes)
    return [*flags, "--block-size", str(pool.block_tokens), *_policy_flags(pool, where, engine, notes)]


def _expert_flags(pool: Pool, where: str, engine: str) -> list[str]:
    ranks = pool.tp * pool.attention_dp
    if pool.ep not in {1, ranks}:
        raise PlanError(
            f"{where}.ep is {pool.ep}, expected 1 or {ranks} (all ranks) for {engine}; plan one of them or use sglang"
        )
    flags = ["--data-parallel-size", str(pool.attention_dp)] if pool.attention_dp > 1 else []
    return [*flags, "--enable-expert-parallel"] if pool.ep > 1 else flags


def _policy_flags(pool: Pool, where: str, engine: str, notes: list[str]) -> list[str]:
    caching = "--no-enable-prefix-caching" if pool.prefix_caching == "off" else "--enable-prefix-caching"
    flags, context = [caching], pool.max_context_tokens
    if pool.policy == "chunked" or pool.role == "decode":
        flags.append("--enable-chunked-prefill")
    else:
        # vllm/v1/core/sched/scheduler.py: without chunks a whole prompt joins the running decodes if the budget allows.
        flags.append("--no-enable-chunked-prefill")
        notes.append(f"{where}: {engine} warns that running without chunked prefill is not officially supported.")
        if pool.policy == "prefill-first" and pool.role != "prefill":
            notes.append(
                f"{where}: policy prefill-first is approximated: {engine} mixes whole prompts with decodes (policy "
                "orca); sglang runs prefill-first as planned."
            )
        if context > pool.token_budget:
            context = pool.token_budget
            notes.append(f"{where}: without chunks {engine} needs max-model-len <= token_budget, so it is {context}.")
    return [*flags, "--max-model-len", str(context)]


def _node_flags(replica: Replica, rank: int) -> list[str]:
    """Flags that join the nodes of one replica, none for a replica within a node."""
    nodes, pool = len(replica.nodes), replica.pool
    if nodes == 1:
        return []
    head, port = address(replica.nodes[0]), str(replica.rendezvous_port)
    share, group = len(replica.gpus[0]), pool.tp * pool.pp
    if pool.attention_dp > 1 and share % group == 0:
        local = share // group
        flags = ["--data-parallel-size-local", str(local), "--data-parallel-address", head]
        flags += ["--data-parallel-rpc-port", port]
        return flags + (["--data-parallel-start-rank", str(rank * local)] if rank else [])
    if group % share:
        raise PlanError(
            f"pools[{replica.pool_index}]: {share} GPUs per node hold no whole number of tp * pp = {group} ranks, "
            "expected one to divide the other; plan other degrees"
        )
    return ["--nnodes", str(nodes), "--node-rank", str(rank), "--master-addr", head, "--master-port", port]
