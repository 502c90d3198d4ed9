"""Every legal way to cut and schedule one replica: a generator whose filters are the laws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike

from hwmodels.contextattention import kind_of
from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Kind
from hwmodels.shape import ModelShape
from planner.catalogue import Catalogue, context_law_broken, format_problem, law_broken
from planner.offloadchoices import AwayChoices, ways_away
from planner.plan import Pool, PrefixCaching
from planner.schedules import Schedules
from simulator.policies import Policy


@dataclass(frozen=True, slots=True)
class Choices:
    """What the search may vary beside the parallel degrees.

    spare_slots   of an expert rank and layer, beyond its even part of the experts; None for none, and one as well where
                  experts are placed by recorded routing
    cp            degrees of context parallelism that are looked at; None: 1, and larger powers of two where no replica
                  fits (long_context says where prompts are long enough to ask for them in any case)
    cp_kinds      kinds of it
    context_budgets   those of token_budgets that are for replicas with cp above 1 only
    away          of experts that devices do not hold; None: they hold all, unless nothing would fit
    schedules     chunks, groups of layers, orders of the queue and overlap
    """

    precisions: tuple[Precision, ...] = (Precision(),)
    policies: tuple[Policy, ...] = ("chunked", "prefill-first")
    token_budgets: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    max_seqs: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    block_tokens: int = 16
    prefix_caching: PrefixCaching = "off"
    spare_slots: tuple[int, ...] | None = None
    away: AwayChoices | None = None
    schedules: Schedules = field(default_factory=Schedules)
    cp: tuple[int, ...] | None = (1,)
    cp_kinds: tuple[Kind, ...] = ("ring",)
    context_budgets: tuple[int, ...] = ()

    def budgets(self, cp: int) -> tuple[int, ...]:
        """Token budgets that are looked at with this degree of context parallelism.

        >>> Choices(token_budgets=(512, 16384), context_budgets=(16384,)).budgets(1)
        (512,)
        """
        kept = tuple(tokens for tokens in self.token_budgets if cp > 1 or tokens not in self.context_budgets)
        return kept or self.token_budgets


@dataclass(slots=True)
class Space:
    """Legal pools of one replica each with the KV blocks of their schedulers, and how many pools each law took out."""

    pools: list[tuple[Pool, int]] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)


#: The law of copies of experts (planner.placedexperts.UNEVEN).
NO_RELIEF = "copies of experts relieve the busiest rank by more than 1 %"
#: The context a plan allows is the longest request rounded up to a multiple of this.
CONTEXT_STEP = 1024
#: Prompts beyond which context parallelism is worth a look: pairs are a third of an 8B model's FLOPs.
LONG_TOKENS = 32_768


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def long_context(prompt_tokens: ArrayLike) -> bool:
    """Whether prompts are long enough to try several ranks for each: the 99th percentile is above LONG_TOKENS."""
    return float(np.quantile(np.asarray(prompt_tokens), 0.99)) > LONG_TOKENS


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4 ... up to `most`.

    >>> powers_of_two(12)
    (1, 2, 4, 8)
    """
    return tuple(1 << place for place in range(most.bit_length()))


def mappings(
    model: ModelShape,
    cluster: Cluster,
    spare_slots: tuple[int, ...] = (0,),
    cps: tuple[int, ...] = (1,),
    cp_kinds: tuple[Kind, ...] = ("ring",),
) -> Iterator[Mapping]:
    """All degrees whose product is at most the cluster's devices; not yet held against the laws.

    Experts either stay with the tensor-parallel ranks (expert_tp) or are spread (ep), or both. Spread ones may have
    spare slots for copies, as Choices says. Context-parallel ranks, of any kind, come without attention groups, which
    would divide the same experts once more.
    """
    heads = max(layer.attention.heads for layer in model.layers)
    experts = max(layer.feed_forward.experts for layer in model.layers)
    for tp in divisors(heads):
        if tp > cluster.gpus:
            break
        for pp in range(1, min(cluster.gpus // tp, len(model.layers)) + 1):
            room = cluster.gpus // (tp * pp)
            groups: list[tuple[int, int, Kind]] = []
            if 1 in cps:
                groups += [(1, count, "ring") for count in (range(1, room + 1) if model.is_moe else (1,))]
            groups += [(cp, 1, kind) for cp in cps if 1 < cp <= room for kind in cp_kinds]
            for cp, attention_dp, kind in groups:
                ranks = tp * cp * attention_dp
                for ep in divisors(ranks) if model.is_moe else (1,):
                    for spare in spare_slots if ep > 1 else (0,):
                        redundant = (experts // ep + spare) * ep - experts if spare else 0
                        expert_tp = ranks // ep if model.is_moe else 1
                        yield Mapping(
                            tp, pp, attention_dp, ep, expert_tp, redundant_experts=redundant, cp=cp, cp_kind=kind
                        )


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

    Every policy but 'chunked' runs whole prompts, so its step must hold the longest request. Where `choices.cp` is None
    and no replica fits, those of several context-parallel ranks are.

    Raises MappingError where the model has not the heads for any of the degrees and kinds in `choices`.
    """
    if choices.cp is not None:
        _require_heads(catalogue.model, choices.cp, choices.cp_kinds)
    space = _enumerated(catalogue, choices, longest_tokens, (1,) if choices.cp is None else choices.cp)
    if space.pools or choices.cp is not None:
        return space
    found = _enumerated(catalogue, choices, longest_tokens, powers_of_two(catalogue.cluster.gpus)[1:])
    return Space(found.pools, space.broken + found.broken)


def _require_heads(model: ModelShape, cps: tuple[int, ...], kinds: tuple[Kind, ...]) -> None:
    """Raise MappingError where every degree and kind breaks the law of heads with tp 1, and so with any tp."""
    attentions = [layer.attention for layer in model.layers]
    laws = [context_law_broken(attentions, Mapping(cp=cp, cp_kind=kind)) for cp in cps if cp > 1 for kind in kinds]
    if 1 in cps or not laws or None in laws:
        return
    heads = max(attention.heads for attention in attentions)
    raise MappingError(
        f"cp {', '.join(map(str, cps))} of {model.name} with kind {', '.join(kinds)}: {laws[0]}; "
        f"expected a cp that divides its {heads} query heads, or kind ring"
    )


def _enumerated(catalogue: Catalogue, choices: Choices, longest_tokens: int, cps: tuple[int, ...]) -> Space:
    space = Space()
    model, cluster = catalogue.model, catalogue.cluster
    served = min(model.max_context_tokens, -(-longest_tokens // CONTEXT_STEP) * CONTEXT_STEP)
    usual = (0, 1) if catalogue.placed and catalogue.routing is not None else (0,)
    spare_slots = usual if choices.spare_slots is None else choices.spare_slots
    for mapping in mappings(model, cluster, spare_slots, cps, choices.cp_kinds):
        budgets = choices.budgets(mapping.cp)
        whole = max(budgets[-1], longest_tokens)
        least = budgets[0] if "chunked" in choices.policies else whole, choices.max_seqs[0]
        law = law_broken(model, mapping) or placement_broken(mapping, cluster)
        if law is None and choices.spare_slots is None and mapping.redundant_experts:
            law = None if catalogue.seating.copies_help(mapping) else NO_RELIEF
        for precision in choices.precisions:
            ways, unserved = (
                ([{}], law)
                if choices.away is None or law is not None
                else ways_away(catalogue, choices.away, mapping, precision, longest_tokens, least)
            )
            for policy in choices.policies:
                for budget in budgets if policy == "chunked" else (whole,):
                    cuts = choices.schedules.of(policy, budget, alone=mapping.tp * mapping.token_groups == 1)
                    for max_seqs in choices.max_seqs:
                        broken = unserved
                        if broken is None and format_problem(cluster, precision) is not None:
                            broken = "the device multiplies in the format"
                        if broken is None and max_seqs > budget:
                            broken = "max_seqs is at most token_budget"
                        if broken is None and policy == "static" and choices.prefix_caching != "off":
                            broken = "static batches keep no prefixes"
                        if broken is None and policy == "layered" and (mapping.pp > 1 or mapping.attention_dp > 1):
                            broken = "layers pass in groups on one stage and one attention group"
                        if broken is not None:
                            space.broken[broken] += 1
                            continue
                        pool = Pool(
                            1, mapping.tp, mapping.pp, mapping.attention_dp, mapping.ep, mapping.expert_tp, None,
                            precision.weights, precision.activations, precision.kv, precision.experts, policy,
                            max_seqs, budget, choices.block_tokens, served, prefix_caching=choices.prefix_caching,
                            redundant_experts=mapping.redundant_experts, cp=mapping.cp, cp_kind=kind_of(mapping),
                        )  # fmt: skip
                        every = [{**way, **cut} for way in ways for cut in cuts]
                        for kept in [replace(pool, **fields) if fields else pool for fields in every]:
                            kv_blocks = catalogue.memory(kept).kv_blocks
                            if kv_blocks < -(-longest_tokens // choices.block_tokens):
                                space.broken["weights, activations and the longest request fit in memory"] += 1
                            else:
                                space.pools.append((kept, kv_blocks))
    return space
