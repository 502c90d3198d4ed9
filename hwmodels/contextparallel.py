"""What does attention cost when a long chunk lies on several ranks: bytes, seconds, and what arithmetic cannot hide?

One layer of a prompt chunk, cut over a context-parallel group of the cluster graph. The attention kernel is passed in
as a function of queries, keys and pairs, so that every block is priced by the shape it has. Ring and TokenRing run in
steps that all ranks take together, each as long as the busiest rank's block or the transfer beside it, whichever is
longer; all-gather and Ulysses wait for their collectives. What each kind sends is in hwmodels.contextkinds, how causal
work is balanced in hwmodels.zigzag.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.contextkinds import (
    Kind,
    Widths,
    directions,
    extra_bytes,
    merge_bytes,
    require_legal,
    useful_before,
    widths,
)
from hwmodels.contextlinks import Groups, Hop, all_pairs, at_once, busiest, collective_s, compile_hop
from hwmodels.hardware import Cluster
from hwmodels.mapping import Precision
from hwmodels.operators import AttentionCore, Gemm, Operator, kv_heads_per_rank, scaled
from hwmodels.shape import Attention
from hwmodels.zigzag import Layout, Passed, imbalance, rank_pairs, step_pairs

Array = NDArray[np.float64]


class AttentionTime(Protocol):
    """Prices attention kernels."""

    def __call__(self, queries: Array, keys: Array, pairs: Array, parts: int) -> Array:
        """Seconds of `queries` tokens against `keys`, of whose pairs `pairs` are not masked, for one rank's heads.

        parts   ranks that share the heads of a tensor-parallel rank (Ulysses: cp; otherwise 1)
        """


@dataclass(frozen=True, slots=True, eq=False)
class ContextCost:
    """One layer's attention of one chunk on a context-parallel group; arrays have one value per chunk.

    sent_bytes       what each rank sends
    link_bytes       over the link direction that is loaded longest, and its readable name; collectives are counted as
                     direct pairs, whatever algorithm is fastest
    attention_s      of the busiest rank of every step, nothing waiting for transfers
    communication_s  all transfers, one after the other
    exposed_s        what of it no attention hides, overlapped as the kind does
    extra_bytes      most buffers at once on one rank beside what it holds without context parallelism
    merge_bytes      HBM traffic of adding up partial outputs, of which the kernels are to be priced as element-wise
    imbalance        busiest rank's pairs over the mean
    """

    kind: str
    sent_bytes: Array
    link_bytes: Array
    link: str
    attention_s: Array
    communication_s: Array
    exposed_s: Array
    extra_bytes: Array
    merge_bytes: Array
    imbalance: Array

    @property
    def total_s(self) -> Array:
        """Attention, and the communication that it waits for."""
        return self.attention_s + self.exposed_s

    @property
    def hidden_s(self) -> Array:
        """Seconds of communication that run beside attention."""
        return np.maximum(self.communication_s - self.exposed_s, 0.0)


def priced_attention(
    time_s: Callable[[Operator], Array], attention: Attention, tp: int, precision: Precision
) -> AttentionTime:
    """The prefill kernel of a layer priced by `time_s` (AnalyticCost.time_s), as operators.prefill_attention cuts it.

    Latents are expanded to every head before the kernel, by each rank that reads them and for every block anew (kept,
    they would take as much memory as keys and values of all heads): context parallelism does not divide that work.
    """

    def seconds(queries: Array, keys: Array, pairs: Array, parts: int) -> Array:
        queries, keys, pairs = np.broadcast_arrays(queries, keys, pairs)
        heads, latent = attention.heads // tp // parts, attention.latent
        kv_heads = max(1, kv_heads_per_rank(attention, tp) // parts) if latent is None else heads
        core = AttentionCore(
            "prefill attention", "prefill", queries, pairs, np.maximum(keys - queries, 0.0), heads, kv_heads,
            attention.head_dim, attention.value_dim, False, precision, 1, attention.window_tokens,
        )  # fmt: skip
        found: Array = time_s(core)
        if latent is not None:
            width = heads * (attention.head_dim - latent.rope_dim + attention.value_dim)
            up = Gemm("latent up projection", keys, width, latent.kv_rank, precision)
            found = sum((time_s(op) for op in scaled([up])), found)
        return np.where(pairs > 0, found, 0.0)

    return seconds


def context_cost(
    cluster: Cluster,
    groups: Groups,
    kind: Kind,
    attention: Attention,
    tp: int,
    precision: Precision,
    new: ArrayLike,
    before: ArrayLike,
    attention_s: AttentionTime,
    *,
    layout: Layout = "zigzag",
) -> ContextCost:
    """One layer's attention of `new` tokens behind `before` cached ones, on the first of `groups` by `kind`.

    groups   rings of ranks that work at the same time (contextlinks.context_groups), the priced one first
    layout   how the chunk is cut; Ulysses has every token of its heads and is even by itself

    Raises MappingError for degrees that the kind cannot have and for ranks that the cluster does not have.
    """
    cp = len(groups[0])
    require_legal(kind, attention, cp, tp)
    fresh, cached = np.broadcast_arrays(np.asarray(new, dtype=float), useful_before(attention, before))
    behind = np.broadcast_to(np.asarray(before, dtype=float), fresh.shape)
    w = widths(attention, cp, tp, precision)
    work = _Work(cluster, groups, w, fresh, cached, behind, attention.window_tokens, layout, attention_s)
    attending_s, moving_s, exposed_s, tokens, loads = _KINDS[kind](work)
    link_bytes, link = busiest(cluster, loads)
    onward, back = directions(kind, w, cp, fresh, cached)
    even = kind == "ulysses"
    return ContextCost(
        kind,
        onward + back,
        tokens * link_bytes,
        link,
        attending_s,
        moving_s,
        exposed_s,
        extra_bytes(kind, w, cp, fresh, cached),
        merge_bytes(kind, w, cp, fresh),
        np.ones(fresh.shape) if even else imbalance(fresh, behind, cp, layout, attention.window_tokens),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """A chunk on a group; `cached` are the tokens before it that it can see, of `behind`."""

    cluster: Cluster
    groups: Groups
    w: Widths
    new: Array
    cached: Array
    behind: Array
    window: int | None
    layout: Layout
    attention_s: AttentionTime

    @property
    def cp(self) -> int:
        return len(self.groups[0])

    def blocks_s(self, passed: Passed) -> Array:
        """[..., steps]: the busiest rank's block of every step, in which rank i has what rank i - step passed on."""
        met = step_pairs(self.new, self.behind, self.cp, self.layout, self.window, passed)
        queries, keys = self.new[..., None] / self.cp, (self.new + self.cached)[..., None] / self.cp
        return self.attention_s(queries, keys, met, 1)


#: Seconds of attention, of communication and of what of it is exposed, then tokens, and bytes on every edge for each.
_Found = tuple[Array, Array, Array, Array, Array]


def _ring(work: _Work) -> _Found:
    """Keys and values one place further in every step but the last, while the block that is there is attended to."""
    blocks_s, cp, tokens = work.blocks_s("keys"), work.cp, work.new + work.cached
    hop = at_once(work.cluster, [(compile_hop(work.cluster, work.groups, 1), work.w.kv / cp)])
    hop_s = hop.time_s(tokens)
    exposed_s = np.maximum(hop_s[..., None] - blocks_s[..., :-1], 0.0).sum(axis=-1)
    return blocks_s.sum(axis=-1), (cp - 1) * hop_s, exposed_s, tokens, (cp - 1) * hop.loads


def _tokenring(work: _Work) -> _Found:
    """Queries one place further in every step, partial outputs of the step before straight back to their owners."""
    blocks_s, cp = work.blocks_s("queries"), work.cp
    exposed_s, moving_s = np.zeros(work.new.shape), np.zeros(work.new.shape)
    loads = at_once(work.cluster, []).loads
    for step in range(cp + 1 if cp > 1 else 1):
        sent: list[tuple[Hop, float]] = []
        if step < cp - 1:
            sent.append((compile_hop(work.cluster, work.groups, 1), work.w.query / cp))
        if step >= 2:
            sent.append((compile_hop(work.cluster, work.groups, 1 - step), (work.w.out + work.w.lse) / cp))
        hop = at_once(work.cluster, sent)
        hop_s = hop.time_s(work.new)
        loads = loads + hop.loads
        moving_s = moving_s + hop_s
        exposed_s = exposed_s + (np.maximum(hop_s - blocks_s[..., step], 0.0) if step < cp else hop_s)
    return blocks_s.sum(axis=-1), moving_s, exposed_s, work.new, loads


def _gathered(work: _Work) -> _Found:
    """All keys and values first, then one kernel over them."""
    seen = work.new + work.cached
    pairs = rank_pairs(work.new, work.behind, work.cp, work.layout, work.window).max(axis=-1)
    attending_s = work.attention_s(work.new / work.cp, seen, pairs, 1)
    moving_s = collective_s(work.cluster, "all-gather", work.groups, seen * work.w.kv)
    return attending_s, moving_s, moving_s, seen, work.w.kv / work.cp * all_pairs(work.cluster, work.groups)


def _ulysses(work: _Work) -> _Found:
    """Every token of a share of the heads: queries, keys and values there, outputs back."""
    w, cp = work.w, work.cp
    pairs = rank_pairs(work.new, work.behind, 1, "contiguous", work.window)[..., 0]
    attending_s = work.attention_s(work.new, work.new + work.cached, pairs, cp)
    move = partial(collective_s, work.cluster, "all-to-all", work.groups)
    inward, outward = work.new / cp * (w.query + w.kv_copied), work.new / cp * w.out
    latents_s = collective_s(work.cluster, "all-gather", work.groups, work.new * w.gathered)
    moving_s = move(inward) + move(outward) + latents_s
    each = ((w.query + w.kv_copied + w.out) / cp + w.gathered) / cp
    return attending_s, moving_s, moving_s, work.new, each * all_pairs(work.cluster, work.groups)


_KINDS: dict[str, Callable[[_Work], _Found]] = {
    "ring": _ring,
    "tokenring": _tokenring,
    "all-gather": _gathered,
    "ulysses": _ulysses,
}
