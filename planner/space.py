"""Every legal way to cut and schedule one replica: a generator whose filters are the laws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from hwmodels.hardware import Cluster
from hwmodels.mapping import Mapping, Precision
from hwmodels.shape import ModelShape
from planner.catalogue import Catalogue, format_problem, law_broken
from planner.plan import Pool, PrefixCaching
from simulator.scheduler import Policy


@dataclass(frozen=True, slots=True)
class Choices:
    """What the search may vary beside the parallel degrees."""

    precisions: tuple[Precision, ...] = (Precision(),)
    policies: tuple[Policy, ...] = ("chunked", "prefill-first")
    token_budgets: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    max_seqs: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    block_tokens: int = 16
    prefix_caching: PrefixCaching = "off"


@dataclass(slots=True)
class Space:
    """Legal pools of one replica each with the KV blocks of their schedulers, and how many pools each law took out."""

    pools: list[tuple[Pool, int]] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)


#: The context a plan allows is the longest request rounded up to a multiple of this.
CONTEXT_STEP = 1024


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def mappings(model: ModelShape, cluster: Cluster) -> Iterator[Mapping]:
    """All degrees whose product is at most the cluster's devices; not yet held against the laws.

    Experts either stay with the tensor-parallel ranks (expert_tp) or are spread (ep), or both.
    """
    heads = max(layer.attention.heads for layer in model.layers)
    for tp in divisors(heads):
        if tp > cluster.gpus:
            break
        for pp in range(1, min(cluster.gpus // tp, len(model.layers)) + 1):
            for groups in range(1, cluster.gpus // (tp * pp) + 1) if model.is_moe else (1,):
                ranks = tp * groups
                for ep in divisors(ranks) if model.is_moe else (1,):
                    yield Mapping(tp, pp, groups, ep, ranks // ep if model.is_moe else 1)


def placement_broken(mapping: Mapping, cluster: Cluster) -> str | None:
    """The law of the cluster that a replica breaks: groups neither straddle nodes nor leave them ragged."""
    node = cluster.gpus_per_node
    if cluster.nodes > 1 and mapping.gpus > node and mapping.gpus % node:
        return "a replica larger than a node fills nodes"
    if (mapping.tp > node and mapping.tp % node) or (mapping.tp <= node and mapping.gpus > node and node % mapping.tp):
        return "a tensor-parallel group does not straddle nodes"
    return None


def replicas_that_fit(gpus_per_replica: int, cluster: Cluster) -> int:
    """Replicas the cluster holds when small ones stay inside a node."""
    node = cluster.gpus_per_node
    if gpus_per_replica > node:
        return cluster.gpus // gpus_per_replica
    whole, rest = divmod(cluster.gpus, node)
    return whole * (node // gpus_per_replica) + rest // gpus_per_replica


def enumerate_pools(catalogue: Catalogue, choices: Choices, longest_tokens: int) -> Space:
    """All legal replicas; the longest request (prompt + output) must fit beside the weights.

    Every policy but 'chunked' runs whole prompts, so its step must hold the longest request.
    """
    space = Space()
    model, cluster = catalogue.model, catalogue.cluster
    whole = max(choices.token_budgets[-1], longest_tokens)
    served = min(model.max_context_tokens, -(-longest_tokens // CONTEXT_STEP) * CONTEXT_STEP)
    for mapping in mappings(model, cluster):
        law = law_broken(model, mapping) or placement_broken(mapping, cluster)
        for precision in choices.precisions:
            for policy in choices.policies:
                for budget in choices.token_budgets if policy == "chunked" else (whole,):
                    for max_seqs in choices.max_seqs:
                        broken = law
                        if broken is None and format_problem(cluster, precision) is not None:
                            broken = "the device multiplies in the format"
                        if broken is None and max_seqs > budget:
                            broken = "max_seqs is at most token_budget"
                        if broken is None and policy == "static" and choices.prefix_caching != "off":
                            broken = "static batches keep no prefixes"
                        if broken is not None:
                            space.broken[broken] += 1
                            continue
                        pool = Pool(
                            1, mapping.tp, mapping.pp, mapping.attention_dp, mapping.ep, mapping.expert_tp, None,
                            precision.weights, precision.activations, precision.kv, precision.experts, policy,
                            max_seqs, budget, choices.block_tokens, served, prefix_caching=choices.prefix_caching,
                        )  # fmt: skip
                        kv_blocks = catalogue.memory(pool).kv_blocks
                        if kv_blocks < -(-longest_tokens // choices.block_tokens):
                            space.broken["weights, activations and the longest request fit in memory"] += 1
                        else:
                            space.pools.append((pool, kv_blocks))
    return space
