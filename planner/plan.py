"""What to run: a plan names everything an engine needs to be launched, and reads and writes as YAML."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from hwmodels.operators import Kind
from hwmodels.overlap import Overlap
from simulator.handover import Mode
from simulator.orders import Order
from simulator.policies import Policy

#: What the devices of a pool do: what simulator.deployment.Role says of replicas, or encode images.
PoolRole = Literal["aggregated", "prefill", "decode", "mixed", "encode"]


Sharing = Literal["static", "semi-pd", "nexus"]
#: Off, or what is forgotten first of the KV that nobody uses: a key of simulator.prefixcache.EVICTIONS.
PrefixCaching = Literal["off", "lru", "lfu", "fifo", "length-aware"]
Routing = Literal["round-robin", "random", "least-tokens", "power-of-two", "prefix-aware"]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Pool:
    """Replicas that are cut, kept and scheduled alike.

    replicas, tp, pp, attention_dp, ep, expert_tp   see hwmodels.mapping.Mapping; replicas is plain data parallelism )
    stages                layers of each pipeline stage, None for the most even split
    redundant_experts     expert slots of a layer beyond one for each expert, see hwmodels.mapping.Mapping
    cp, cp_kind           context-parallel ranks (each of tp ranks) that the tokens of a sequence lie on, and how they
                          attend to one another's: ring, tokenring, ulysses or all-gather, see hwmodels.mapping.Mapping
    expert_map            file that says which expert is in which slot of every mixture layer, in one of the formats of
                          planner.placementfiles, its path relative to the plan file; None: experts in order
    weights, activations, kv, experts   number formats, see hwmodels.mapping.Precision
    policy                how prefill and decode share steps
    max_seqs              sequences in one step of one scheduler
    token_budget          tokens in one step of one scheduler
    chunk_tokens          of them, of prompts at most, with policy chunked; None: what decodes leave
    group_tokens          prompt tokens for each group of layers, with policy layered
    order                 in which the queue waits, see simulator.orders.ranking, which has ageing_tokens_per_s (order
                          shortest) and deadlines_s (order deadline: TTFT aimed at by SLO class, or one for all)
    overlap               of collectives: none, fused-norm (norms inside the all-reduce), two-way (that and two halves)
    block_tokens          tokens of a KV block
    max_context_tokens    longest prompt + output the engine accepts
    share                 requests one replica gets, relative to those of other pools; None for its number of devices
    role                  aggregated serves whole requests, prefill computes prompts whose KV goes to a decode pool,
                          mixed does what either has no room for, encode turns images into tokens: its replicas are
                          workers of one device with the plan's encoder and no language model
    hardware              device or cluster profile; None for the plan's
    sharing               who divides a device between prefill and decode, which then run at once: static, semi-pd
                          (feedback on the targets) or nexus (predicted for every batch); None: they share steps
    shares                of the device's processors for prefill and decode, each in (0, 1], together perhaps above 1
    targets_s             what semi-pd aims at: TTFT and TPOT, in seconds
    batch_tiles           tiles of images that a device encodes at once, where there is an encoder
    spread                encode workers that the tiles of one request are spread over at most; None for all
    prefix_caching        whether KV is kept for other prompts that begin alike, and which of it goes first when room
                          is needed; of effect on traffic with block hashes
    host_kv_gb, ssd_kv_gb   KV of one replica that host memory and disks keep when the devices have no more room for it,
                          in GB (1e9 bytes); disks keep all that host memory does. None: nothing
    expert_cache          part of the routed experts that devices hold, in (0, 1], those of every layer used last; the
                          others come from host memory when they are chosen. None: all
    expert_ladder         weight formats of the experts, from theirs to a narrower one, in which those are loaded that
                          matter less to a token, by HOBBIT's thresholds; those that matter least are left out
    cpu_threads           of the host, for each device, that compute experts which the device does not hold where that
                          is sooner; 0: they are only loaded
    host                  profile of the processor of a node, with its memory; None: planner.offloading.HOST
    """

    replicas: int
    tp: int = 1
    pp: int = 1
    attention_dp: int = 1
    ep: int = 1
    expert_tp: int = 1
    stages: tuple[int, ...] | None = None
    weights: str = "bf16"
    activations: str = "bf16"
    kv: str = "bf16"
    experts: str | None = None
    policy: Policy = "chunked"
    max_seqs: int = 256
    token_budget: int = 2048
    block_tokens: int = 16
    max_context_tokens: int = 32768
    share: float | None = None
    role: PoolRole = "aggregated"
    hardware: str | None = None
    batch_tiles: int = 16
    spread: int | None = None
    sharing: Sharing | None = None
    shares: tuple[float, float] | None = None
    targets_s: tuple[float, float] | None = None
    prefix_caching: PrefixCaching = "off"
    host_kv_gb: float | None = None
    ssd_kv_gb: float | None = None
    redundant_experts: int = 0
    expert_map: str | None = None
    expert_cache: float | None = None
    expert_ladder: tuple[str, ...] | None = None
    cpu_threads: int = 0
    host: str | None = None
    chunk_tokens: int | None = None
    group_tokens: int = 512
    order: Order = "fcfs"
    ageing_tokens_per_s: float = 0.0
    deadlines_s: tuple[float, ...] = ()
    overlap: Overlap = "none"
    cp: int = 1
    cp_kind: Kind = "ring"

    @property
    def gpus_per_replica(self) -> int:
        """Devices of one replica."""
        return self.tp * self.cp * self.pp * self.attention_dp

    @property
    def gpus(self) -> int:
        """Devices of the pool."""
        return self.replicas * self.gpus_per_replica


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Plan:
    """One execution plan: a model on a cluster, served by pools of replicas behind a router.

    model      name of a shipped model or path of a Hugging Face config.json
    hardware   name of a shipped device or cluster profile
    gpus       devices of the cluster (the pools may use fewer; the rest idle)
    engine     name of an engine profile
    also       other devices at hand, by profile name, for pools that name their hardware
    role_switch_s   prefill and decode replicas change roles with the queues before them, and need so long for it once
               they have finished what they have; None: they never do
    transfer   how KV goes from prefill to decode pools: layer by layer while prompts are computed, or afterwards
    encoder    name of a vision encoder or path of its profile, for requests with images; without a pool that encodes,
               the replicas that prefill hold it and encode before they prefill
    ssd_gb_per_s   what the disks of one node read, and write, in GB/s (1e9 bytes); needed where pools keep KV on disks,
                   and where experts exceed the memory of hosts
    """

    model: str
    hardware: str
    gpus: int
    pools: tuple[Pool, ...]
    engine: str = "vllm"
    router: Routing = "round-robin"
    also: dict[str, int] = field(default_factory=dict, hash=False)
    transfer: Mode = "layer-wise"
    role_switch_s: float | None = None
    encoder: str | None = None
    ssd_gb_per_s: float | None = None
    version: int = 2

    @property
    def gpus_used(self) -> int:
        """Devices that hold a replica or encode."""
        return sum(pool.gpus for pool in self.pools)

    @property
    def serving(self) -> tuple[Pool, ...]:
        """The pools that hold replicas of the language model."""
        return tuple(pool for pool in self.pools if pool.role != "encode")

    @property
    def encode_pool(self) -> Pool | None:
        """The pool that encodes images, if there is one."""
        return next((pool for pool in self.pools if pool.role == "encode"), None)

    @property
    def devices(self) -> dict[str, int]:
        """All devices at hand, by profile name."""
        return {self.hardware: self.gpus, **self.also}

    def hardware_of(self, pool: Pool) -> str:
        """The profile of the pool's devices."""
        return pool.hardware or self.hardware

    @property
    def idle(self) -> int:
        """Devices at hand that hold no replica."""
        return sum(self.devices.values()) - self.gpus_used

    @property
    def disaggregated(self) -> bool:
        """Whether prompts and answers are served by different pools."""
        return any(pool.role in ("prefill", "decode") for pool in self.pools)
