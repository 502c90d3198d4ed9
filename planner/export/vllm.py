"""vLLM 0.12.0: one `vllm serve` per replica (and per node of a replica), nginx in front.

Flags: vllm/engine/arg_utils.py, vllm/entrypoints/openai/cli_args.py and vllm/config of the 0.12.0 wheel. Several nodes:
--nnodes/--node-rank/--master-addr with --headless (ranks of a node in one process group), or, where every attention-DP
rank fits a node, --data-parallel-size-local and --data-parallel-start-rank (docs/serving/data_parallel_deployment.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.errors import PlanError
from planner.export.launch import (
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
from planner.plan import Plan, Pool

VERSION = "0.12.0"

#: vllm/config/cache.py, BlockSize.
BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)


def launch_files(plan: Plan, replicas: Sequence[Replica]) -> Export:
    """launch.sh, and nginx.conf for more than one replica."""
    notes = common_notes(plan, nodes_of(replicas))
    repository = model_repository(plan)
    flags = [engine_flags(pool, index, f"vLLM {VERSION}", notes) for index, pool in enumerate(plan.pools)]
    commands = []
    for replica in replicas:
        for rank in range(len(replica.nodes)):
            argv = ["vllm", "serve", repository]
            argv += ["--host", "0.0.0.0", "--port", str(replica.port)] if rank == 0 else ["--headless"]
            argv += flags[replica.pool_index] + _node_flags(replica, rank)
            env = visible(replica.gpus[rank]) | stage_environment(replica.pool)
            commands.append(Command(replica.nodes[rank], argv, env, title(replica)))
    files, router = nginx(plan, replicas, notes)
    header = f"vLLM {VERSION}: {len(replicas)} replicas of {repository}"
    return Export(
        "vllm", VERSION, {"launch.sh": script(router + commands, nodes_of(replicas), header), **files}, tuple(notes)
    )


def stage_environment(pool: Pool) -> dict[str, str]:
    """Uneven pipeline stages (vllm/distributed/utils.py, get_pp_indices)."""
    return {} if pool.stages is None else {"VLLM_PP_LAYER_PARTITION": ",".join(map(str, pool.stages))}


def engine_flags(pool: Pool, index: int, engine: str, notes: list[str]) -> list[str]:
    """Flags of one pool that do not depend on the replica; also what Dynamo's vLLM worker takes."""
    where = f"pools[{index}]"
    no_static(pool, index, engine)
    if pool.block_tokens not in BLOCK_SIZES:
        raise PlanError(f"{where}.block_tokens is {pool.block_tokens}, expected one of {BLOCK_SIZES} for {engine}")
    if pool.max_seqs > pool.token_budget:
        raise PlanError(
            f"{where}.max_seqs is {pool.max_seqs}, expected at most token_budget ({pool.token_budget}) for {engine}"
        )
    # One scheduler feeds all pipeline stages; the plan counts the sequences of each of its pp batches in flight.
    max_seqs = min(pool.max_seqs * pool.pp, pool.token_budget)
    if max_seqs < pool.max_seqs * pool.pp:
        notes.append(f"{where}: {engine} takes at most token_budget sequences, so {max_seqs} over all pipeline stages.")
    flags = ["--tensor-parallel-size", str(pool.tp), "--pipeline-parallel-size", str(pool.pp)]
    flags += _expert_flags(pool, where, engine)
    flags += ["--dtype", compute_dtype(pool, index, notes)]
    if pool.weights == "fp8":
        flags += ["--quantization", "fp8"]
    if pool.kv == "fp8":
        flags += ["--kv-cache-dtype", "fp8"]
    elif pool.kv not in {"bf16", "fp16", "fp32"}:
        raise PlanError(f"{where}.kv is {pool.kv!r}, expected the model's type or fp8 for {engine}; plan kv fp8")
    flags += ["--max-num-seqs", str(max_seqs), "--max-num-batched-tokens", str(pool.token_budget)]
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
    flags, context = ["--no-enable-prefix-caching"], pool.max_context_tokens
    if pool.policy == "chunked":
        flags.append("--enable-chunked-prefill")
    else:
        # vllm/v1/core/sched/scheduler.py: without chunks a whole prompt joins the running decodes if the budget allows.
        flags.append("--no-enable-chunked-prefill")
        notes.append(f"{where}: {engine} warns that running without chunked prefill is not officially supported.")
        if pool.policy == "prefill-first":
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
