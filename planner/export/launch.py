"""What the engines share: replicas placed on servers, shell scripts, a front router, the model's repository."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from planner.errors import PlanError
from planner.plan import Plan, Pool

_MODELS = Path(__file__).resolve().parents[2] / "profiles" / "models"

#: Where clients send their requests; replicas listen from FIRST_PORT on, PORT_STEP apart, because SGLang opens
#: further ports next to its own (0.5.6, PortArgs.init_new: +233 and one per attention-DP rank).
ROUTER_PORT, FIRST_PORT, PORT_STEP = 8000, 8100, 100

WIDE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Export:
    """Files that launch a plan, by name, for one version of one engine; notes are caveats, one line each."""

    engine: str
    version: str
    files: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Replica:
    """One model copy and its devices: `gpus` of each of `nodes`, as many on each, of servers of `server_gpus`."""

    pool: Pool
    pool_index: int
    nodes: tuple[int, ...]
    gpus: tuple[tuple[int, ...], ...]
    port: int
    server_gpus: int = 8

    @property
    def rendezvous_port(self) -> int:
        """Where the servers of one replica find each other."""
        return self.port + 10_000

    @property
    def kv_port(self) -> int:
        """Where decode replicas ask for the replica's KV: the first of up to a port per rank, between its others."""
        return self.port + 5_050


class Shell(str):
    """A word for the shell to expand; every other word is quoted."""


@dataclass(frozen=True, slots=True)
class Command:
    """A process on one node."""

    node: int
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    title: str = ""

    def render(self) -> str:
        """The command line, one option per line."""
        lines = [f"{name}={_word(value)}" for name, value in self.env.items()]
        for word in self.argv:
            if word.startswith("--") or not lines or len(lines) == len(self.env):
                lines.append(_word(word))
            else:
                lines[-1] += f" {_word(word)}"
        return f"# {self.title}\n" + " \\\n  ".join(lines) + " &\n"


def _word(word: str) -> str:
    return str(word) if isinstance(word, Shell) else shlex.quote(word)


def address(node: int, port: int | None = None, scheme: str = "") -> Shell:
    """The address of a node in launch.sh, where NODES holds them all."""
    return Shell(f'"{scheme}${{NODES[{node}]}}' + (f':{port}"' if port is not None else '"'))


def beside_script(name: str) -> Shell:
    """The path of an exported file next to launch.sh."""
    return Shell(f'"$HERE/{name}"')


def visible(gpus: Iterable[int]) -> dict[str, str]:
    """The environment that limits a process to some devices of its node."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}


def place(plan: Plan, gpus_per_node: int | Mapping[str, int]) -> tuple[Replica, ...]:
    """Give every replica its own devices, largest replicas first, each on the first node of its hardware with room.

    A replica larger than a node takes equal shares of the fewest nodes, cut between tensor-parallel groups where that
    is possible. Nodes are numbered hardware by hardware, in the plan's order, leaving out what no pool is on. Raises
    PlanError when the nodes have too many small gaps.
    """
    kinds = node_kinds(plan, gpus_per_node)
    room = [gpus for _, gpus in kinds]
    count = len(kinds)
    taken, ports = [0] * count, [FIRST_PORT] * count
    copies = [(pool, index) for index, pool in enumerate(plan.pools) for _ in range(pool.replicas)]
    replicas = []
    for pool, index in sorted(copies, key=lambda copy: -copy[0].gpus_per_replica):
        hardware = plan.hardware_of(pool)
        own = [node for node in range(count) if kinds[node][0] == hardware]
        size = node_size(gpus_per_node, hardware)
        for share in _shares(pool, size):
            nodes = [node for node in own if room[node] - taken[node] >= share]
            nodes = nodes[: pool.gpus_per_replica // share]
            if len(nodes) * share == pool.gpus_per_replica:
                break
        else:
            raise PlanError(
                f"pools[{index}]: a replica of {pool.gpus_per_replica} GPUs finds no room on {len(own)} nodes of "
                f"{size} GPUs, expected it not to straddle nodes; plan fewer replicas or other sizes"
            )
        port = max(ports[node] for node in nodes)
        gpus = tuple(tuple(range(taken[node], taken[node] + share)) for node in nodes)
        for node in nodes:
            taken[node] += share
            ports[node] = port + PORT_STEP
        replicas.append(Replica(pool, index, tuple(nodes), gpus, port, size))
    return tuple(sorted(replicas, key=lambda replica: (replica.nodes[0], replica.gpus[0])))


def node_size(gpus_per_node: int | Mapping[str, int], hardware: str) -> int:
    """Devices of one server with the hardware."""
    return gpus_per_node if isinstance(gpus_per_node, int) else gpus_per_node[hardware]


def node_kinds(plan: Plan, gpus_per_node: int | Mapping[str, int]) -> list[tuple[str, int]]:
    """Hardware and devices of every node, those of hardware without pools left out."""
    used = {plan.hardware_of(pool) for pool in plan.pools}
    return [
        (name, min(node_size(gpus_per_node, name), gpus - first))
        for name, gpus in plan.devices.items()
        if name in used
        for first in range(0, gpus, node_size(gpus_per_node, name))
    ]


def _shares(pool: Pool, gpus_per_node: int) -> list[int]:
    """GPUs per node a replica may take, best first."""
    size = pool.gpus_per_replica
    if size <= gpus_per_node:
        return [size]
    shares = [share for share in range(gpus_per_node, 0, -1) if size % share == 0]
    groups = (pool.tp, pool.tp * pool.pp)
    return sorted(shares, key=lambda share: any(share % group and group % share for group in groups))


def model_repository(plan: Plan) -> str:
    """What the engine loads: the Hugging Face repository of a shipped model, or the folder of a config.json.

    A shipped profile names it under `repository`; without one the name itself is returned.
    """
    if plan.model.endswith(".json"):
        return str(Path(plan.model).parent)
    profile = _MODELS / f"{plan.model}.yaml"
    if profile.parent != _MODELS or not profile.is_file():
        return plan.model
    data = yaml.safe_load(profile.read_text(encoding="utf-8"))
    return str(data.get("repository", plan.model))


def common_notes(plan: Plan, replicas: Sequence[Replica], scripted: bool = True) -> list[str]:
    """Caveats that hold for every engine; scripted tells whether launch.sh runs on every node, or once."""
    nodes = nodes_of(replicas) if scripted else 1
    notes = prefix_notes(plan)
    if model_repository(plan) == plan.model and not plan.model.endswith(".json") and "/" not in plan.model:
        notes.append(f"No repository is known for {plan.model!r}: put a Hugging Face repository in its place.")
    gpus = sum(plan.devices.values())
    if gpus > plan.gpus_used:
        notes.append(f"{gpus - plan.gpus_used} of {gpus} GPUs are not used by this plan.")
    if nodes > 1:
        notes.append("Run launch.sh on every node with HOSTS='address0 address1 ...' and NODE_RANK=0, 1, ...")
    carry: dict[str, list[int]] = {}
    for replica in replicas:
        carry.setdefault(plan.hardware_of(replica.pool), []).extend(replica.nodes)
    if nodes > 1 and len(carry) > 1:
        kinds = ", ".join(f"{min(nodes)} to {max(nodes)} {name}" for name, nodes in carry.items())
        notes.append(f"Nodes carry different devices; order HOSTS so that they are: {kinds}.")
    if plan.disaggregated and nodes > 1:
        notes.append("KV goes between nodes: their NICs need RDMA for the rates that were planned with.")
    if not plan.disaggregated and any(pool.role == "mixed" for pool in plan.pools):
        notes.append("Mixed pools without prefill and decode pools beside them serve whole requests.")
    if plan.role_switch_s is not None:
        notes.append(
            f"role_switch_s {plan.role_switch_s:g} is not exported: replicas keep the roles they start with, "
            "those of the plan change theirs with the queues."
        )
    return notes


def compute_dtype(pool: Pool, index: int, notes: list[str]) -> str:
    """The engine's name of the unquantised number format of a pool, with notes on what cannot be asked for."""
    where = f"pools[{index}]"
    if pool.weights in WIDE:
        if pool.activations not in WIDE:
            raise PlanError(
                f"{where}.activations is {pool.activations!r} with {pool.weights} weights, expected a wide format; "
                f"plan weights {pool.activations} or activations {pool.weights}"
            )
        if pool.weights != pool.activations:
            notes.append(f"{where}: engines keep weights and activations in one type, here {pool.activations}.")
    elif pool.weights not in {"fp8", "fp8_block"}:
        notes.append(f"{where}: serve a checkpoint quantised to {pool.weights}; engines read how from its config.")
    if pool.experts not in {None, pool.weights}:
        notes.append(f"{where}: serve a checkpoint whose experts are quantised to {pool.experts}.")
    if pool.weights == "fp8" and pool.activations in WIDE:
        notes.append(f"{where}: fp8 weights: engines also quantise activations to fp8 where the GPU can.")
    return WIDE.get(pool.activations, "bfloat16")


def no_static(pool: Pool, index: int, engine: str) -> None:
    """Raise PlanError for static batching, which serving engines no longer offer."""
    if pool.policy == "static":
        raise PlanError(
            f"pools[{index}].policy is 'static', expected a continuous policy: {engine} cannot batch statically; "
            "plan with policy chunked"
        )


def title(replica: Replica) -> str:
    """What a comment says of a replica."""
    pool = replica.pool
    degrees = f"tp={pool.tp} pp={pool.pp} attention_dp={pool.attention_dp} ep={pool.ep}"
    degrees += f" cp={pool.cp}" if pool.cp > 1 else ""
    role = f", {pool.role}" if pool.role in ("prefill", "decode") else ""
    return f"pool {replica.pool_index}{role}: {degrees}, port {replica.port}"


def nodes_of(replicas: Sequence[Replica]) -> int:
    """Nodes that hold a replica."""
    return 1 + max(node for replica in replicas for node in replica.nodes)


def script(commands: Sequence[Command], nodes: int, header: str, setup: str = "") -> str:
    """A bash script that runs the commands of its node until one of them ends, then stops the others."""
    lines = [
        "#!/usr/bin/env bash",
        f"# {header}",
        "set -euo pipefail",
        'HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"',
        "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT",
    ]
    if nodes == 1:
        lines += ["NODES=(127.0.0.1)", setup, *(command.render() for command in commands)]
    else:
        names = " ".join(f"node{node}" for node in range(nodes))
        lines += [f'read -ra NODES <<<"${{HOSTS:-{names}}}"', setup, 'case "${NODE_RANK:?number of this node}" in']
        for node in range(nodes):
            mine = [command.render() for command in commands if command.node == node]
            lines += [f"{node})", *(mine or ["exit 0"]), ";;"]
        lines += [f'*) echo "NODE_RANK is $NODE_RANK, expected 0 to {nodes - 1}" >&2; exit 2 ;;', "esac"]
    return "\n".join(line for line in [*lines, "wait -n", ""] if line or line is lines[-1])


def prefix_notes(plan: Plan) -> list[str]:
    """What the engines do otherwise about KV that is kept for prompts that begin alike."""
    if all(pool.prefix_caching == "off" for pool in plan.serving):
        return ["Prefix caching is switched off, as in the plan."]
    notes = []
    for index, pool in enumerate(plan.pools):
        if pool.prefix_caching not in ("off", "lru"):
            notes.append(
                f"pools[{index}]: prefix_caching {pool.prefix_caching} is approximated: what was used longest ago goes "
                "first."
            )
        if pool.host_kv_gb or pool.ssd_kv_gb:
            notes.append(
                f"pools[{index}]: host_kv_gb and ssd_kv_gb are not exported: see vLLM's --kv-offloading-size, SGLang's "
                "--enable-hierarchical-cache, TensorRT-LLM's kv_cache_config.host_cache_size."
            )
    return notes


def nginx(plan: Plan, replicas: Sequence[Replica], notes: list[str]) -> tuple[dict[str, str], list[Command]]:
    """A front router where the engine has none of its own: nginx.conf and its command, nothing for one replica.

    Balancing methods: ngx_http_upstream_module of nginx 1.15.1 and later.
    """
    if len(replicas) == 1:
        notes.append(f"One replica: clients use its port {replicas[0].port} directly.")
        return {}, []
    method = {
        "round-robin": "",
        "random": "random;",
        "least-tokens": "least_conn;",
        "power-of-two": "random two least_conn;",
        "prefix-aware": "least_conn;",
    }[plan.router]
    if plan.router == "prefix-aware":
        notes.append("Router prefix-aware: nginx knows nothing of prefixes; it compares open requests.")
    elif plan.router in {"least-tokens", "power-of-two"}:
        notes.append(f"Router {plan.router}: nginx compares open requests, not outstanding tokens.")
    single = nodes_of(replicas) == 1
    if not single:
        notes.append("nginx.conf names the nodes node0, node1, ...: let them resolve or put addresses there.")
    servers = [f"server {'127.0.0.1' if single else f'node{r.nodes[0]}'}:{r.port};" for r in replicas]
    upstream = "\n    ".join([method, *servers] if method else servers)
    text = f"""events {{ worker_connections 8192; }}
http {{
  upstream replicas {{
    {upstream}
  }}
  server {{
    listen {ROUTER_PORT};
    location / {{
      proxy_pass http://replicas;
      proxy_http_version 1.1;
      proxy_buffering off;
      proxy_read_timeout 1h;
    }}
  }}
}}
"""
    argv = ["nginx", "-c", beside_script("nginx.conf"), "-g", "daemon off;"]
    return {"nginx.conf": text}, [Command(0, argv, title=f"router, port {ROUTER_PORT}")]
