"""What does a step run for attention whose tokens lie on several ranks, and how long does one layer of it take?

ContextAttention stands for the kernels of one layer and what they send one another. Prompt chunks follow
hwmodels.contextparallel. Decoding follows hwmodels.contextdecode where the cache lies by tokens; Ulysses keeps it by
heads, so that every rank attends with its heads to whole contexts, and one all-to-all carries queries, keys and values
there and another the outputs back. Adding up partial outputs is an element-wise kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from hwmodels.contextdecode import decode_cost
from hwmodels.contextkinds import KINDS, Kind, decode_merge_bytes, merge_bytes, require_legal, widths
from hwmodels.contextlinks import Groups, all_pairs, busiest, collective_s, context_groups
from hwmodels.contextparallel import context_cost, priced_attention
from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Array, ContextAttention, Elementwise, Operator, decode_attention
from hwmodels.shape import Attention


class Prices(Protocol):
    """What prices single operators; a step_model.CostModel is one."""

    def time_s(self, op: Operator) -> Array:
        """Seconds of all launches."""
        ...

    def sources(self, op: Operator) -> dict[str, float]:
        """The same seconds, summed, by what they rest on."""
        ...


@runtime_checkable
class ContextPrices(Protocol):
    """What prices attention over several ranks in parts; AnalyticCost and MeasuredCost do."""

    def context(self, op: ContextAttention) -> ContextTimes:
        """One launch of the operator."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ContextTimes:
    """One layer; arrays have one value per batch size.

    attention_s      of the busiest rank, nothing waiting for transfers
    communication_s  all transfers, one after the other
    exposed_s        what of it no attention hides
    sent_bytes       by each rank
    link             that is loaded longest, its readable name
    """

    attention_s: Array
    communication_s: Array
    exposed_s: Array
    sent_bytes: Array
    link: str

    @property
    def total_s(self) -> Array:
        """Attention, and the communication that it waits for."""
        return self.attention_s + self.exposed_s

    @property
    def hidden_s(self) -> Array:
        """Seconds of communication that run beside attention."""
        return np.maximum(self.communication_s - self.exposed_s, 0.0)


def kind_of(mapping: Mapping) -> Kind:
    """The mapping's kind of context parallelism; raises MappingError for an unknown one."""
    for kind in KINDS:
        if kind == mapping.cp_kind:
            return kind
    raise MappingError(f"cp_kind {mapping.cp_kind!r}: expected one of {', '.join(KINDS)}")


def context_operators(
    phase: str, attention: Attention, tokens: Array, context: Array, mapping: Mapping, p: Precision, count: int
) -> list[Operator]:
    """Attention of `count` layers and the sums of its partial outputs, on one rank; arguments as of ContextAttention.

    Raises MappingError for degrees that the kind cannot have.
    """
    kind, cp, tp = kind_of(mapping), mapping.cp, mapping.tp
    require_legal(kind, attention, cp, tp)
    found: list[Operator] = [
        ContextAttention(f"{phase} attention", phase, kind, attention, cp, tp, tokens, context, p, count)
    ]
    if phase == "decode" and kind != "ulysses":
        merged = decode_merge_bytes(attention, cp, tp, p, tokens)
        found.append(Elementwise("merge of partial outputs", merged, count))
    elif kind in ("ring", "tokenring"):
        merged = merge_bytes(kind, widths(attention, cp, tp, p), cp, tokens)
        found.append(Elementwise("merge of partial outputs", merged, count, kernels=cp - 1))
    return found


def groups_of(mapping: Mapping) -> Groups:
    """All context-parallel groups of the first stage, which work at the same time, the first rank's first.

    >>> groups_of(Mapping(tp=2, cp=2))
    ((0, 2), (1, 3))
    """
    each = mapping.tp * mapping.cp
    starts = range(0, each * mapping.attention_dp, each)
    return tuple(group for first in starts for group in context_groups(mapping.cp, mapping.tp, first))


def context_times(
    cluster: Cluster, groups: Groups, op: ContextAttention, time_s: Callable[[Operator], Array]
) -> ContextTimes:
    """One launch of the operator on the first of `groups`; `time_s` prices single kernels.

    Raises MappingError for ranks that the cluster does not have.
    """
    attention, tp, p = op.attention, op.tp, op.precision
    if op.phase == "prefill":
        kernel = priced_attention(time_s, attention, tp, p)
        found = context_cost(cluster, groups, op.kind, attention, tp, p, op.tokens, op.context, kernel)
        return ContextTimes(found.attention_s, found.communication_s, found.exposed_s, found.sent_bytes, found.link)
    if op.kind == "ulysses":
        return _by_heads(cluster, groups, op, time_s)
    one = decode_cost(cluster, groups, attention, tp, p, op.tokens, op.context, time_s)
    link = busiest(cluster, all_pairs(cluster, groups))[1]
    return ContextTimes(one.attention_s, one.exposed_s, one.exposed_s, one.sent_bytes, link)


def _by_heads(
    cluster: Cluster, groups: Groups, op: ContextAttention, time_s: Callable[[Operator], Array]
) -> ContextTimes:
    """Decoding under Ulysses: new tokens to the ranks of their heads, outputs back; a new latent goes to all."""
    w, cp = widths(op.attention, op.cp, op.tp, op.precision), op.cp
    tokens, context = np.broadcast_arrays(op.tokens, op.context)
    attending_s = np.zeros(tokens.shape)
    for kernel in decode_attention(op.attention, tokens, context, op.tp * cp, op.precision, 1):
        attending_s = attending_s + time_s(kernel)
    inward, outward = tokens / cp * (w.query + w.kv_copied), tokens / cp * w.out
    moving_s = collective_s(cluster, "all-to-all", groups, inward) + collective_s(
        cluster, "all-to-all", groups, outward
    )
    if w.gathered:
        moving_s = moving_s + collective_s(cluster, "all-gather", groups, tokens * w.gathered)
    sent = (cp - 1) / cp * (inward + outward + tokens * w.gathered)
    return ContextTimes(attending_s, moving_s, moving_s, sent, busiest(cluster, all_pairs(cluster, groups))[1])


def context_sources(cluster: Cluster, groups: Groups, op: ContextAttention, prices: Prices) -> dict[str, float]:
    """Seconds of all launches, summed over the batch sizes, by what they rest on: transfers are analytic."""
    seen: dict[str, float] = {}

    def time_s(kernel: Operator) -> Array:
        for source, seconds in prices.sources(kernel).items():
            seen[source] = seen.get(source, 0.0) + seconds
        return prices.time_s(kernel)

    found = context_times(cluster, groups, op, time_s)
    attention_s, kernels_s = op.count * float(np.sum(found.attention_s)), sum(seen.values())
    result = {source: attention_s * seconds / kernels_s for source, seconds in seen.items()} if kernels_s else {}
    result["analytic"] = result.get("analytic", 0.0) + op.count * float(np.sum(found.exposed_s))
    return result
