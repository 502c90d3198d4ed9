"""Dynamo 0.7.1 with its vLLM 0.11.0 workers: launch.sh for bare servers, dynamo.yaml for Kubernetes.

Flags: dynamo/frontend/main.py and dynamo/vllm/args.py of the ai-dynamo 0.7.1 wheel (which pins vllm 0.11.0 and takes
its engine flags, vllm/engine/arg_utils.py). dynamo.yaml is a DynamoGraphDeployment (nvidia.com/v1alpha1) as in Dynamo's
examples/backends/vllm/deploy; `multinode.nodeCount` times `resources.limits.gpu` are the GPUs of a replica, and the
operator adds the flags that join nodes (docs/kubernetes/deployment/multinode-deployment.md, a later page).

Prefill and decode workers: --is-prefill-worker and --is-decode-worker of dynamo/vllm/args.py (--disaggregation-mode in
later releases) with subComponentType as in disagg.yaml of the same folder; the frontend sends a request to a prefill
worker first once there is one, and with --enforce-disagg never without. KV goes by vLLM's NixlConnector, whose 0.11.0
wants equal block sizes and asks every rank for its KV at the first node of the replica (nixl_connector.py). A service's
extraPodSpec is a Kubernetes PodSpec (docs/kubernetes/api_reference), so its nodeSelector picks the devices of a role.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from planner.errors import PlanError
from planner.export.exchange import in_racks, vllm_backend
from planner.export.experts import Seats
from planner.export.handover import Rules, check_handover
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
from planner.export.nodeselectors import node_selectors
from planner.export.vllm import engine_flags, kv_environment, kv_notes, require_stages_inside, stage_environment
from planner.plan import Plan, Pool

VERSION = "0.7.1"
_WORKERS = "vLLM 0.11.0"
_IMAGE = f"nvcr.io/nvidia/ai-dynamo/vllm-runtime:{VERSION}"
RULES = Rules(f"Dynamo {VERSION} ({_WORKERS})", tp="grows", blocks="same", prefill_stages=False, decode_stages=False)

#: Flags and the service's subComponentType by role.
_ROLES = {"prefill": "--is-prefill-worker", "decode": "--is-decode-worker"}

_SETUP = (
    'export ETCD_ENDPOINTS="${ETCD_ENDPOINTS:-http://${NODES[0]}:2379}" '
    'NATS_SERVER="${NATS_SERVER:-nats://${NODES[0]}:4222}"'
)


def launch_files(plan: Plan, replicas: Sequence[Replica], _seats: Mapping[str, Seats]) -> Export:
    """launch.sh and dynamo.yaml; launch.sh only applies the latter when a replica is larger than a node."""
    joined = any(len(replica.nodes) > 1 for replica in replicas)
    notes = common_notes(plan, replicas, scripted=not joined)
    check_handover(plan, RULES, notes)
    for replica in replicas:
        _check_reach(replica)
        require_stages_inside(replica, _WORKERS)
    notes.append("Dynamo needs etcd and NATS; on Kubernetes the operator and a secret named hf-token-secret.")
    if len({(pool.block_tokens, pool.max_context_tokens) for pool in plan.pools}) > 1:
        notes.append("Pools differ in block size or context: Dynamo may refuse workers of one model that disagree.")
    repository = model_repository(plan)
    workers, backends = [], []
    for index, pool in enumerate(plan.pools):
        flags = engine_flags(pool, index, _WORKERS, notes, priority=False)
        backends.append(vllm_backend(pool, f"pools[{index}]", _WORKERS, notes, rack=in_racks(replicas, index)))
        worker = ["python3", "-m", "dynamo.vllm", "--model", repository, *_kv_flags(pool), *flags]
        workers.append(worker)
    frontend = ["python3", "-m", "dynamo.frontend", "--http-port", str(ROUTER_PORT), *_router_flags(plan, notes)]
    if plan.disaggregated:
        frontend.append("--enforce-disagg")
        notes += kv_notes(plan, _WORKERS)
        notes.append("On Kubernetes give prefill and decode pods your NICs (such as rdma/ib) and IPC_LOCK for RDMA.")

    header = f"Dynamo {VERSION} with {_WORKERS}: {len(replicas)} replicas of {repository}"
    if joined:
        notes.append("A replica is larger than a node: Dynamo joins nodes on Kubernetes, so launch.sh calls kubectl.")
        apply = Command(0, ["kubectl", "apply", "-f", beside_script("dynamo.yaml")], title="Kubernetes")
        text = script([apply], 1, header)
    else:
        commands = [Command(0, frontend, title=f"frontend and router, port {ROUTER_PORT}")]
        for replica in replicas:
            env = visible(replica.gpus[0]) | _environment(replica.pool, backends[replica.pool_index])
            env |= kv_environment(replica, 0)
            name = title(replica).rpartition(",")[0]
            commands.append(Command(replica.nodes[0], workers[replica.pool_index], env, name))
        text = script(commands, nodes_of(replicas), header, _SETUP)
    selectors = node_selectors(plan, notes)
    graph = yaml.safe_dump(_graph(plan, replicas, frontend, workers, backends, selectors), sort_keys=False)
    return Export("dynamo", VERSION, {"launch.sh": text, "dynamo.yaml": graph}, tuple(notes))


def _kv_flags(pool: Pool) -> list[str]:
    role = _ROLES.get(pool.role)
    return ["--connector", "nixl", role] if role else ["--connector", "none"]


def _environment(pool: Pool, backend: str | None) -> dict[str, str]:
    """Variables of a pool's workers: uneven stages, and the exchange with the experts, which 0.11.0 has no flag for."""
    return stage_environment(pool) | ({} if backend is None else {"VLLM_ALL2ALL_BACKEND": backend})


def _check_reach(replica: Replica) -> None:
    """Raise PlanError where KV would be asked for at the wrong node."""
    pool, share = replica.pool, len(replica.gpus[0])
    if pool.role in _ROLES and pool.tp > share:
        raise PlanError(
            f"pools[{replica.pool_index}].tp is {pool.tp} with {share} GPUs per node, expected at most {share}: "
            f"{_WORKERS} hands over no KV of attention groups across nodes; plan tp {share} or export for vllm"
        )


def _router_flags(plan: Plan, notes: list[str]) -> list[str]:
    if plan.router in {"round-robin", "random"}:
        return ["--router-mode", plan.router]
    if plan.router == "prefix-aware":
        return ["--router-mode", "kv", "--no-kv-events"]
    notes.append(f"Router {plan.router}: Dynamo has none; its kv mode without cache overlap balances KV blocks.")
    return ["--router-mode", "kv", "--kv-overlap-score-weight", "0", "--no-kv-events"]


def _graph(
    plan: Plan,
    replicas: Sequence[Replica],
    frontend: Sequence[str],
    workers: Sequence[Sequence[str]],
    backends: Sequence[str | None],
    selectors: Mapping[str, Mapping[str, str]],
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
            **({"subComponentType": pool.role} if pool.role in _ROLES else {}),
            "envFromSecret": "hf-token-secret",
            "replicas": pool.replicas,
            "resources": {"limits": {"gpu": str(len(sample.gpus[0]))}},
        }
        if len(sample.nodes) > 1:
            service["multinode"] = {"nodeCount": len(sample.nodes)}
        environment = _environment(pool, backends[index])
        if environment:
            service["envs"] = [{"name": name, "value": value} for name, value in environment.items()]
        selector = selectors[plan.hardware_of(pool)]
        service["extraPodSpec"] = _placement(selector) | {"mainContainer": _container(workers[index])}
        services[f"Vllm{pool.role.title() if pool.role in _ROLES else ''}Worker{index}"] = service
    name = re.sub(r"[^a-z0-9]+", "-", plan.model.lower()).strip("-")[-40:].strip("-") or "plan"
    return {
        "apiVersion": "nvidia.com/v1alpha1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": f"shardwise-{name}"},
        "spec": {"services": services},
    }


def _placement(selector: Mapping[str, str]) -> dict[str, Any]:
    """Where pods may run: on nodes with the label, whose GPU taint they tolerate; anywhere without one."""
    if not selector:
        return {}
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    return {"nodeSelector": dict(selector), "tolerations": [toleration]}


def _container(argv: Sequence[str]) -> dict[str, Any]:
    return {"image": _IMAGE, "command": list(argv[:3]), "args": list(argv[3:])}
