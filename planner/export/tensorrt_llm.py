"""TensorRT-LLM 1.2.1 (PyTorch backend): one `trtllm-serve` per replica with an options file per pool, nginx in front.

Options: tensorrt_llm/commands/serve.py of the 1.2 series (commit 00209af149e7, not the release tag), BaseLlmArgs in
tensorrt_llm/llmapi/llm_args.py of 1.2.1, and the KvCacheConfig page of the LLM API reference (seen for 1.3.0rc27). With
enable_attention_dp every rank of the tensor-parallel group runs attention for its own requests, and max_batch_size and
max_num_tokens hold per rank, in every pipeline stage ("You can have pp > 1 with attn_dp", a maintainer in pull request
3370). A replica of several nodes is one MPI world: mpirun with trtllm-llmapi-launch.

Prefill and decode pools are context and generation servers behind `trtllm-serve disaggregated`: docs/source/features/
disagg-serving.md, the command's options in serve.py, its file in tensorrt_llm/llmapi/disagg_utils.py, router types in
tensorrt_llm/serve/router.py, and what KV exchange asks of both sides in CacheFormatter::inquireSupport (cpp/
tensorrt_llm/batch_manager/cacheFormatter.cpp), the last four as stored for the 1.2 and 1.3 series.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from planner.errors import PlanError
from planner.export.contexts import helix_options
from planner.export.exchange import in_racks, tensorrt_environment, tensorrt_overlap
from planner.export.experts import Seats, tensorrt_options
from planner.export.handover import Rules, check_handover, of_role, routing_weights_note, transfer_note
from planner.export.launch import (
    ROUTER_PORT,
    Command,
    Export,
    Replica,
    Shell,
    beside_script,
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
from planner.export.queueing import no_layered, require_order, step_tokens
from planner.plan import Plan, Pool

VERSION = "1.2.1"

RULES = Rules(
    f"TensorRT-LLM {VERSION}",
    tp="free",
    blocks="same",
    prefill_stages=True,
    decode_stages=True,
    even_stages=True,
)


def launch_files(plan: Plan, replicas: Sequence[Replica], seats: Mapping[str, Seats]) -> Export:
    """launch.sh, pool0.yaml, pool1.yaml, ... and nginx.conf or disagg_config.yaml for more than one replica."""
    notes = common_notes(plan, replicas)
    check_handover(plan, RULES, notes)
    notes.append("TensorRT-LLM admits a request only when it is sure to finish, where the simulation preempts.")
    repository = model_repository(plan)
    files = {
        f"pool{index}.yaml": yaml.safe_dump(
            _options(pool, index, seats, notes) | helix_options(plan, pool, index, f"TensorRT-LLM {VERSION}", notes),
            sort_keys=False,
        )
        for index, pool in enumerate(plan.pools)
    }
    exchange = [
        tensorrt_environment(pool, f"pools[{index}]", notes, rack=in_racks(replicas, index))
        for index, pool in enumerate(plan.pools)
    ]
    commands = []
    for replica in replicas:
        own = exchange[replica.pool_index]
        argv, env = ["trtllm-serve", repository, *_flags(replica)], visible(replica.gpus[0]) | own
        if len(replica.nodes) > 1:
            argv = [*_mpirun(replica, own), "trtllm-llmapi-launch", *argv]
        commands.append(Command(replica.nodes[0], argv, env, title(replica)))
    extra, router = (_disaggregated if plan.disaggregated else nginx)(plan, replicas, notes)
    header = f"TensorRT-LLM {VERSION}: {len(replicas)} replicas of {repository}"
    files = {"launch.sh": script(router + commands, nodes_of(replicas), header), **files, **extra}
    return Export("tensorrt-llm", VERSION, files, tuple(notes))


def _disaggregated(plan: Plan, replicas: Sequence[Replica], notes: list[str]) -> tuple[dict[str, str], list[Command]]:
    """disagg_config.yaml and the server that sends every request to a context, then to a generation server."""
    kind = {"round-robin": "round_robin", "random": "round_robin"}.get(plan.router, "load_balancing")
    if plan.router == "random":
        notes.append("Router random: trtllm-serve disaggregated has none; it takes turns.")
    if kind == "load_balancing":
        notes.append(f"Router {plan.router}: trtllm-serve disaggregated sends to the server with fewest open requests.")
    how = f"KV goes by UCX when TensorRT-LLM {VERSION} has computed a whole prompt."
    notes += [*transfer_note(plan, how), *routing_weights_note(plan)]
    single = nodes_of(replicas) == 1
    if not single:
        notes.append("disagg_config.yaml names the nodes node0, node1, ...: let them resolve or put addresses there.")
    config: dict[str, Any] = {"hostname": "0.0.0.0", "port": ROUTER_PORT, "backend": "pytorch"}
    for key, role in (("context_servers", "prefill"), ("generation_servers", "decode")):
        urls = [f"{'127.0.0.1' if single else f'node{r.nodes[0]}'}:{r.port}" for r in of_role(replicas, role)]
        router: dict[str, Any] = {"type": kind} | ({"use_tokens": False} if kind == "load_balancing" else {})
        config[key] = {"num_instances": len(urls), "urls": urls, "router": router}
    argv = ["trtllm-serve", "disaggregated", "-c", beside_script("disagg_config.yaml")]
    argv += ["--server_start_timeout", "3600", "--request_timeout", "3600"]
    text = yaml.safe_dump(config, sort_keys=False)
    return {"disagg_config.yaml": text}, [Command(0, argv, title=f"router, port {ROUTER_PORT}")]


def _flags(replica: Replica) -> list[str]:
    pool = replica.pool
    flags = ["--backend", "pytorch", "--host", "0.0.0.0", "--port", str(replica.port)]
    flags += ["--tp_size", str(pool.tp * pool.attention_dp), "--pp_size", str(pool.pp)]
    if pool.ep > 1:
        flags += ["--ep_size", str(pool.ep)]
    flags += ["--gpus_per_node", str(len(replica.gpus[0]))]
    flags += ["--max_batch_size", str(pool.max_seqs)]
    flags += ["--max_num_tokens", str(_step_tokens(pool, "", []))]
    flags += ["--max_seq_len", str(pool.max_context_tokens)]
    return [*flags, "--extra_llm_api_options", beside_script(f"pool{replica.pool_index}.yaml")]


def _step_tokens(pool: Pool, where: str, notes: list[str]) -> int:
    return step_tokens(pool, where, f"TensorRT-LLM {VERSION}", notes, mixed=pool.role != "prefill")


def _mpirun(replica: Replica, passed: Mapping[str, str]) -> list[str]:
    """What starts the replica's ranks on its nodes, with the variables passed on."""
    if len(set(replica.gpus)) > 1:
        raise PlanError(
            f"pools[{replica.pool_index}]: a replica over {len(replica.nodes)} nodes holds different GPUs on each, "
            "expected the same ones for one MPI world; plan larger replicas in a plan of their own"
        )
    share = len(replica.gpus[0])
    hosts = ",".join(f"${{NODES[{node}]}}:{share}" for node in replica.nodes)
    names = [word for name in ("CUDA_VISIBLE_DEVICES", *passed) for word in ("-x", name)]
    return ["mpirun", "-n", str(share * len(replica.nodes)), "-H", Shell(f'"{hosts}"'), *names]


def _options(pool: Pool, index: int, seats: Mapping[str, Seats], notes: list[str]) -> dict[str, Any]:
    where = f"pools[{index}]"
    engine = f"TensorRT-LLM {VERSION}"
    no_static(pool, index, engine)
    no_layered(pool, where, engine)
    require_order(pool, where, engine, priority=False)
    tensorrt_overlap(pool, where, engine, notes)
    _step_tokens(pool, where, notes)
    if pool.attention_dp > 1 and pool.tp > 1:
        raise PlanError(
            f"{where}.tp is {pool.tp} with attention_dp {pool.attention_dp}, expected tp 1: TensorRT-LLM runs "
            "attention on one rank or on all; plan tp 1 or attention_dp 1, or use sglang"
        )
    if pool.block_tokens < 2 or pool.block_tokens & (pool.block_tokens - 1):
        raise PlanError(f"{where}.block_tokens is {pool.block_tokens}, expected a power of two for TensorRT-LLM")
    if pool.kv not in {"bf16", "fp16", "fp32", "fp8"}:
        raise PlanError(f"{where}.kv is {pool.kv!r}, expected the model's type or fp8 for TensorRT-LLM; plan kv fp8")
    if pool.policy == "prefill-first" and pool.role not in ("prefill", "decode"):
        notes.append(
            f"{where}: policy prefill-first is approximated: TensorRT-LLM mixes whole prompts with decodes (policy "
            "orca); sglang runs prefill-first as planned."
        )
    options: dict[str, Any] = {
        "dtype": compute_dtype(pool, index, notes),
        "enable_chunked_prefill": pool.policy == "chunked",
        "kv_cache_config": {
            "dtype": "fp8" if pool.kv == "fp8" else "auto",
            "enable_block_reuse": pool.prefix_caching != "off",
            "tokens_per_block": pool.block_tokens,
        },
    }
    if pool.weights == "fp8":
        notes.append(f"{where}: TensorRT-LLM does not quantise at load: serve a checkpoint that is already fp8.")
    if pool.attention_dp > 1:
        options["enable_attention_dp"] = True
    if pool.ep > 1 or pool.expert_tp > 1:
        options["moe_expert_parallel_size"], options["moe_tensor_parallel_size"] = pool.ep, pool.expert_tp
    options |= tensorrt_options(pool, where, seats, notes)
    if pool.stages is not None:
        options["pp_partition"] = list(pool.stages)
        notes.append(f"{where}: pp_partition is a prototype option of TensorRT-LLM {VERSION}.")
    if pool.role in ("prefill", "decode"):
        # Buffers as long as the longest prompt, as disagg-serving.md recommends.
        options["cache_transceiver_config"] = {"backend": "UCX", "max_tokens_in_buffer": pool.max_context_tokens}
        notes.append(f"{where}: buffers for the KV of {pool.max_context_tokens} tokens in flight are not in the plan.")
    if pool.role == "prefill":
        options["disable_overlap_scheduler"] = True
        notes.append(f"{where}: TensorRT-LLM runs context servers without its overlap scheduler.")
    return options
