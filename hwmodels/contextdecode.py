"""What does decoding cost when every rank keeps a share of each sequence's cache?

Every rank attends all sequences' new queries to its part of their cached tokens; partial outputs and log-sum-exps are
sent to the rank that owns the sequence and merged there (flash-decoding over ranks; Helix Parallelism,
arXiv:2507.07120, and the decode context parallelism of vLLM do much the same). With B sequences dealt over cp ranks,
each sends

    gather   (cp - 1)/cp B q      merge   (cp - 1)/cp B (o + 4 per head)

in a layer, whatever the context's length. Latent attention is absorbed: queries and outputs are as wide as the latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.contextkinds import WIDE_BYTES, decode_merge_bytes
from hwmodels.contextlinks import Groups, collective_s
from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster
from hwmodels.mapping import Precision
from hwmodels.operators import Operator, shared_decode_attention, wire_bytes
from hwmodels.shape import Attention

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class DecodeCost:
    """One layer's attention of one token per sequence on a context-parallel group.

    sent_bytes    what each rank sends, queries and results
    attention_s   of one rank, for all sequences over its share of their tokens
    gather_s      queries to all ranks
    merge_s       partial outputs to their owners
    merge_bytes   HBM traffic of adding them up, to be priced as element-wise
    """

    sent_bytes: Array
    attention_s: Array
    gather_s: Array
    merge_s: Array
    merge_bytes: Array

    @property
    def exposed_s(self) -> Array:
        """Seconds of communication: all, for attention waits for the queries and the rest for the outputs."""
        return self.gather_s + self.merge_s

    @property
    def total_s(self) -> Array:
        """Attention and communication, one after the other."""
        return self.attention_s + self.exposed_s


def decode_cost(
    cluster: Cluster,
    groups: Groups,
    attention: Attention,
    tp: int,
    precision: Precision,
    sequences: ArrayLike,
    context: ArrayLike,
    time_s: Callable[[Operator], Array],
) -> DecodeCost:
    """One layer's attention of `sequences` sequences of the whole group, with `context` cached tokens in total.

    time_s   prices operators (AnalyticCost.time_s); every rank runs those of
             operators.shared_decode_attention: all sequences, 1 / cp of their tokens

    Raises MappingError where tp does not divide the heads and for ranks that the cluster does not have.
    """
    cp = len(groups[0])
    if tp < 1 or attention.heads % tp:
        raise MappingError(f"tp = {tp}: expected a divisor of {attention.heads} query heads")
    count, cached = np.broadcast_arrays(np.asarray(sequences, dtype=float), np.asarray(context, dtype=float))
    if attention.window_tokens is not None:
        cached = np.minimum(cached, count * attention.window_tokens)
    # The window is applied to the whole context above; to a rank's share of it, it no longer is.
    share = cached / cp
    found = shared_decode_attention(attention, count, share, cp, tp, precision)
    attending_s = sum((time_s(op) for op in found), np.zeros(count.shape))
    if cp == 1:
        zero = np.zeros(count.shape)
        return DecodeCost(zero, attending_s, zero, zero, zero)
    heads, element, latent = attention.heads // tp, wire_bytes(precision), attention.latent
    query = heads * (attention.head_dim if latent is None else latent.kv_rank + latent.rope_dim) * element
    width = attention.value_dim if latent is None else latent.kv_rank
    partial = heads * (width * element + WIDE_BYTES)
    return DecodeCost(
        sent_bytes=(cp - 1) / cp * count * (query + partial),
        attention_s=attending_s,
        gather_s=collective_s(cluster, "all-gather", groups, count * query),
        merge_s=collective_s(cluster, "all-to-all", groups, count * partial),
        merge_bytes=decode_merge_bytes(attention, cp, tp, precision, count),
    )
