"""What to run: a plan names everything an engine needs to be launched, and reads and writes as YAML."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Pool:
    """Replicas that are cut, kept and scheduled alike.

    replicas, tp, pp, attention_dp, ep, expert_tp   see hwmodels.mapping.Mapping; replicas is plain data parallelism )
    stages                layers of each pipeline stage, None for the most even split
    weights, activations, kv, experts   number formats, see hwmodels.mapping.Precision
    policy                how prefill and decode share steps
    max_seqs              sequences in one step of one scheduler
    token_budget          tokens in one step of one scheduler
    block_tokens          tokens of a KV block
    max_context_tokens    longest prompt + output the engine accepts
    share                 requests one replica gets, relative to those of other pools; None for its number of devices
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
    policy: Literal["chunked", "prefill-first", "orca", "static"] = "chunked"
    max_seqs: int = 256
    token_budget: int = 2048
    block_tokens: int = 16
    max_context_tokens: int = 32768
    share: float | None = None

    @property
    def gpus_per_replica(self) -> int:
        """Devices of one replica."""
        return self.tp * self.pp * self.attention_dp

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
    """

    model: str
    hardware: str
    gpus: int
    pools: tuple[Pool, ...]
    engine: str = "vllm"
    router: Literal["round-robin", "random", "least-tokens", "power-of-two"] = "round-robin"
    version: int = 1

    @property
    def gpus_used(self) -> int:
        """Devices that hold a replica."""
        return sum(pool.gpus for pool in self.pools)
