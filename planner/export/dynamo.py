"""Dynamo 0.7.1 with its vLLM 0.11.0 workers: launch.sh for bare servers, dynamo.yaml for Kubernetes.

Flags: dynamo/frontend/main.py and dynamo/vllm/args.py of the ai-dynamo 0.7.1 wheel (which pins vllm 0.11.0 and takes
its engine flags, vllm/engine/arg_utils.py). dynamo.yaml is a DynamoGraphDeployment (nvidia.com/v1alpha1) as in Dynamo's
examples/backends/vllm/deploy; `multinode.nodeCount` times `resources.limits.gpu` are the GPUs of a replica, and the
operator adds the flags that join nodes (docs/kubernetes/deployment/multinode-deployment.md, a later page).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from planner.export.launch import (
    ROUTER_PORT,
    Command,
    Export,
    Replica,
    beside_script,
    common_notes,
    model_repository,
    nodes_of,
    script,
    title,
    visible,
)
from planner.export.vllm import engine_flags, stage_environment
from planner.plan import Plan

VERSION = "0.7.1"
_WORKERS = "vLLM 0.11.0"
_IMAGE = f"nvcr.io/nvidia/ai-dynamo/vllm-runtime:{VERSION}"
_SETUP = (
    'export ETCD_ENDPOINTS="${ETCD_ENDPOINTS:-http://${NODES[0]}:2379}" '
    'NATS_SERVER="${NATS_SERVER:-nats://${NODES[0]}:4222}"'
)


def launch_files(plan: Plan, replicas: Sequence[Replica]) -> Export:
    """launch.sh and dynamo.yaml; launch.sh only applies the latter when a replica is larger than a node."""
    joined = any(len(replica.nodes) > 1 for replica in replicas)
    notes = common_notes(plan, 1 if joined else nodes_of(replicas))
    notes.append("Dynamo needs etcd and NATS; on Kubernetes the operator and a secret named hf-token-secret.")
    if len({(pool.block_tokens, pool.max_context_tokens) for pool in plan.pools}) > 1:
        notes.append("Pools differ in block size or context: Dynamo may refuse workers of one model that disagree.")
    repository = model_repository(plan)
    workers = []
    for index, pool in enumerate(plan.pools):
        flags = engine_flags(pool, index, _WORKERS, notes)
        workers.append(["python3", "-m", "dynamo.vllm", "--model", repository, "--connector", "none", *flags])
    frontend = ["python3", "-m", "dynamo.frontend", "--http-port", str(ROUTER_PORT), *_router_flags(plan, notes)]

    header = f"Dynamo {VERSION} with {_WORKERS}: {len(replicas)} replicas of {repository}"
    if joined:
        notes.append("A replica is larger than a node: Dynamo joins nodes on Kubernetes, so launch.sh calls kubectl.")
        apply = Command(0, ["kubectl", "apply", "-f", beside_script("dynamo.yaml")], title="Kubernetes")
        text = script([apply], 1, header)
    else:
        commands = [Command(0, frontend, title=f"frontend and router, port {ROUTER_PORT}")]
        for replica in replicas:
            env = visible(replica.gpus[0]) | stage_environment(replica.pool)
            name = title(replica).rpartition(",")[0]
            commands.append(Command(replica.nodes[0], workers[replica.pool_index], env, name))
        text = script(commands, nodes_of(replicas), header, _SETUP)
    graph = yaml.safe_dump(_graph(plan, replicas, frontend, workers), sort_keys=False)
    return Export("dynamo", VERSION, {"launch.sh": text, "dynamo.yaml": graph}, tuple(notes))


def _router_flags(plan: Plan, notes: list[str]) -> list[str]:
    if plan.router in {"round-robin", "random"}:
        return ["--router-mode", plan.router]
    notes.append(f"Router {plan.router}: Dynamo has none; its kv mode without cache overlap balances KV blocks.")
    return ["--router-mode", "kv", "--kv-overlap-score-weight", "0", "--no-kv-events"]


def _graph(
    plan: Plan, replicas: Sequence[Replica], frontend: Sequence[str], workers: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """The DynamoGraphDeployment: one frontend, one service per pool."""
    services: dict[str, Any] = {
        "Frontend": {
            "componentType": "frontend",
            "replicas": 1,
            "extraPodSpec": {"mainContainer": _container(frontend)},
        }
    }
    for index, pool in enumerate(plan.pools):
        sample = next(replica for replica in replicas if replica.pool_index == index)
        service: dict[str, Any] = {
            "componentType": "worker",
            "envFromSecret": "hf-token-secret",
            "replicas": pool.replicas,
            "resources": {"limits": {"gpu": str(len(sample.gpus[0]))}},
        }
        if len(sample.nodes) > 1:
            service["multinode"] = {"nodeCount": len(sample.nodes)}
        if pool.stages is not None:
            service["envs"] = [{"name": name, "value": value} for name, value in stage_environment(pool).items()]
        service["extraPodSpec"] = {"mainContainer": _container(workers[index])}
        services[f"VllmWorker{index}"] = service
    name = re.sub(r"[^a-z0-9]+", "-", plan.model.lower()).strip("-")[-40:].strip("-") or "plan"
    return {
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": f"shardwise-{name}"},
        "spec": {"services": services},
    }


def _container(argv: Sequence[str]) -> dict[str, Any]:
    return {"image": _IMAGE, "command": list(argv[:3]), "args": list(argv[3:])}
