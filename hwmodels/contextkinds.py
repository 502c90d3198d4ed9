"""What does each kind of context parallelism send, keep and allow, for one attention layer of a chunk?

A chunk of `new` tokens behind `before` cached ones lies on cp ranks, each with new / cp queries. Bytes per token on one
tensor-parallel rank: q of queries, o of outputs (and lse of their log-sum-exp, 4 per head), kv of keys and values. For
latent attention (MLA) ring and all-gather pass the latent (kv_rank + rope_dim), which every receiver expands again.
What each rank sends in one layer, with s = new + before:

    ring         (cp - 1)/cp s kv                    Ring Self-Attention, arXiv:2105.13120; Ring Attention, 2310.01889
    tokenring    (cp - 1)/cp new q forward, (cp - 1)/cp new (o + lse) back                  TokenRing, arXiv:2412.20501
    all-gather   (cp - 1)/cp s kv                                     Llama 3, arXiv:2407.21783, section 3.3.2
    ulysses      (cp - 1)/cp new/cp (q + kv' + o)                             DeepSpeed-Ulysses, arXiv:2309.14509

where kv' has the KV heads copied if there are fewer than cp. Ulysses keeps its cache by heads, so that `before` does
not travel. A sliding window lets only its own part of `before` be of use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.errors import MappingError
from hwmodels.mapping import DTYPE_BYTES, Precision
from hwmodels.operators import Kind as Kind
from hwmodels.operators import kv_heads_per_rank, wire_bytes
from hwmodels.shape import Attention

Array = NDArray[np.float64]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Bytes of one log-sum-exp and of one element of a running output, kept in fp32 by the kernels.
WIDE_BYTES = 4.0


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes of one token on one tensor-parallel rank, in one layer.

    query, out   activations of its query heads; lse   their log-sum-exp
    kv           keys and values as cached; latent attention: the latent with its rotary key
    kv_copied    keys and values that Ulysses sends, all ranks' together: heads copied where there are fewer than cp
    gathered     latents that Ulysses gathers whole, since every head reads all of them
    running      of outputs and their sums that are still being added up, in fp32
    """

    query: float
    out: float
    lse: float
    kv: float
    kv_copied: float
    gathered: float
    running: float


def widths(attention: Attention, cp: int, tp: int, precision: Precision) -> Widths:
    """Widths of a layer: keys and values travel as they are cached, everything else in 16 bit at least."""
    element, cached = wire_bytes(precision), DTYPE_BYTES[precision.kv]
    heads = attention.heads // tp
    if attention.latent is not None:
        kv = (attention.latent.kv_rank + attention.latent.rope_dim) * cached
        copied, gathered = 0.0, kv
    else:
        kv_heads = kv_heads_per_rank(attention, tp)
        head = (attention.head_dim + attention.value_dim) * cached
        kv, copied, gathered = kv_heads * head, max(kv_heads, cp) * head, 0.0
    return Widths(
        query=heads * attention.head_dim * element,
        out=heads * attention.value_dim * element,
        lse=heads * WIDE_BYTES,
        kv=kv,
        kv_copied=copied,
        gathered=gathered,
        running=heads * (attention.value_dim + 1) * WIDE_BYTES,
    )


def require_legal(kind: str, attention: Attention, cp: int, tp: int) -> None:
    """Raise MappingError unless `kind` can cut the layer over cp ranks beside tp tensor-parallel ones.

    Any cp will do but for Ulysses: cp * tp divides the query heads, and the KV heads divide it or are divided by it.
    """
    if kind not in KINDS:
        raise MappingError(f"context parallelism {kind!r}: expected one of {', '.join(KINDS)}")
    if cp < 1 or tp < 1:
        raise MappingError(f"cp = {cp}, tp = {tp}: expected at least 1 of each")
    if attention.heads % tp:
        raise MappingError(f"tp = {tp}: expected a divisor of {attention.heads} query heads")
    if kind != "ulysses":
        return
    ranks = cp * tp
    if attention.heads % ranks:
        raise MappingError(
            f"ulysses with cp = {cp} and tp = {tp}: expected cp * tp = {ranks} to divide {attention.heads} query heads;"
            " take a smaller cp, or ring"
        )
    kv_heads = attention.kv_heads
    if attention.latent is None and kv_heads % ranks and ranks % kv_heads:
        raise MappingError(
            f"ulysses with cp = {cp} and tp = {tp}: expected cp * tp = {ranks} and {kv_heads} KV heads to divide one "
            "another; take another cp, or ring"
        )


def useful_before(attention: Attention, before: ArrayLike) -> Array:
    """Cached tokens that any query of the chunk can see: all, or the window."""
    cached: Array = np.asarray(before, dtype=float)
    return cached if attention.window_tokens is None else np.minimum(cached, attention.window_tokens)


def directions(kind: Kind, w: Widths, cp: int, new: ArrayLike, before: ArrayLike = 0.0) -> tuple[Array, Array]:
    """Bytes that each rank sends in one layer, (onward, back): 'back' goes to where queries came from."""
    fresh = np.asarray(new, dtype=float)
    passed = fresh + np.asarray(before, dtype=float)
    others = (cp - 1) / cp
    zero = np.zeros_like(passed)
    if kind == "tokenring":
        return others * fresh * w.query + zero, others * fresh * (w.out + w.lse) + zero
    if kind == "ulysses":
        inward = fresh / cp * (w.query + w.kv_copied) + fresh * w.gathered
        return others * inward + zero, others * fresh / cp * w.out + zero
    return others * passed * w.kv, zero


def extra_bytes(kind: Kind, w: Widths, cp: int, new: ArrayLike, before: ArrayLike = 0.0) -> Array:
    """Most bytes of buffers on one rank at once beside what it holds without context parallelism, in one layer.

    Ring and TokenRing hold one block in use and one arriving, and running outputs in fp32 (TokenRing: the partial
    outputs on their way as well); Ulysses what arrives of queries, keys, values and outputs; all-gather the others'
    keys and values.
    """
    if cp == 1:
        return np.zeros(np.broadcast_shapes(np.shape(new), np.shape(before)))
    fresh, passed = np.broadcast_arrays(np.asarray(new, dtype=float), np.asarray(new) + np.asarray(before, dtype=float))
    blocks = min(2, cp - 1)
    if kind == "ring":
        held = blocks * passed / cp * w.kv + fresh / cp * w.running
    elif kind == "tokenring":
        held = fresh / cp * (blocks * (w.query + w.out + w.lse) + w.running)
    elif kind == "ulysses":
        held = fresh / cp * (w.query + w.kv_copied + w.out) + (cp - 1) / cp * fresh * w.gathered
    else:
        held = (cp - 1) / cp * passed * w.kv
    total: Array = held
    return total


def merge_bytes(kind: Kind, w: Widths, cp: int, new: ArrayLike) -> Array:
    """HBM traffic, on each rank and in one layer, of adding up the partial outputs that ring and TokenRing leave."""
    parts = cp - 1 if kind in ("ring", "tokenring") else 0
    merged: Array = parts * np.asarray(new, dtype=float) / cp * (2 * w.running + w.out)
    return merged


def decode_merge_bytes(attention: Attention, cp: int, tp: int, precision: Precision, sequences: ArrayLike) -> Array:
    """The same of decoding, cp ranks' parts of every sequence's output; nothing for one rank.

    Absorbed latent attention has outputs as wide as the latent.
    """
    count = np.asarray(sequences, dtype=float)
    if cp == 1:
        return np.zeros(count.shape)
    heads, element = attention.heads // tp, wire_bytes(precision)
    width = attention.value_dim if attention.latent is None else attention.latent.kv_rank
    merged: Array = count * heads * (width * element + WIDE_BYTES) + count / cp * heads * width * element
    return merged


def cached_share(kind: str, attention: Attention, cp: int, tp: int) -> float:
    """Part of a layer's KV cache, as one tensor-parallel rank holds it without cp, that one of cp ranks keeps.

    1 / cp by sequence. Ulysses divides KV heads, so that it saves nothing beyond their number, nor for latents.
    """
    if kind != "ulysses":
        return 1.0 / cp
    if attention.latent is not None:
        return 1.0
    return 1.0 / min(cp, kv_heads_per_rank(attention, tp))
