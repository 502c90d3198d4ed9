"""What one rank runs in a step: operators as (kind, shape, dtype), with exact FLOPs and bytes and never a time.

Every token count may be a numpy array: one operator then stands for the same operator at many batch sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.mapping import DTYPE_BYTES, Mapping, Precision, weight_bytes
from hwmodels.shape import Attention, FeedForward, ModelShape

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Gemm:
    """m x k activations times k x n weights; `groups` equal products with weights of their own share one launch."""

    name: str
    m: Array
    n: int
    k: int
    precision: Precision
    count: int = 1
    groups: int = 1

    @property
    def flops(self) -> Array:
        """Multiply and add of every product."""
        return 2.0 * self.groups * self.m * self.n * self.k

    @property
    def bytes(self) -> Array:
        """Weights once, inputs and outputs once; nothing where there are no rows."""
        weights = self.n * self.k * weight_bytes(self.precision.weights)
        moved: Array = self.groups * ((self.m > 0) * weights + self.m * row_bytes(self.k, self.n, self.precision))
        return moved


@dataclass(frozen=True, slots=True, eq=False)
class GroupedGemm:
    """Rows of m tokens spread over `experts` weight matrices k x n, of which `active` are touched."""

    name: str
    m: Array
    active: Array
    n: int
    k: int
    precision: Precision
    count: int = 1

    @property
    def flops(self) -> Array:
        """Multiply and add of every routed row."""
        return 2.0 * self.m * self.n * self.k

    @property
    def bytes(self) -> Array:
        """The touched experts' weights once, inputs and outputs once."""
        weights = self.n * self.k * weight_bytes(self.precision.weights)
        return self.active * weights + self.m * row_bytes(self.k, self.n, self.precision)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCore:
    """Softmax(QK')V of `pairs` query-key pairs that reads `read` cached tokens and handles `queries` query tokens.

    phase   'prefill' or 'decode'
    heads, kv_heads, qk_dim, value_dim   per rank; latent attention in decode is one KV head of the latent's width
    shared  whether keys and values are the same cached latent (MLA, absorbed)
    window_tokens   sliding window (pairs and read have it taken into account), None for full attention
    """

    name: str
    phase: str
    queries: Array
    pairs: Array
    read: Array
    heads: int
    kv_heads: int
    qk_dim: int
    value_dim: int
    shared: bool
    precision: Precision
    count: int = 1
    window_tokens: int | None = None

    @property
    def flops(self) -> Array:
        """Two products per pair and head."""
        return 2.0 * self.pairs * self.heads * (self.qk_dim + self.value_dim)

    @property
    def bytes(self) -> Array:
        """Cached keys and values read once, queries in, outputs out, new keys and values written."""
        width = self.kv_heads * (self.qk_dim if self.shared else self.qk_dim + self.value_dim)
        cache = (self.read + self.queries) * width * DTYPE_BYTES[self.precision.kv]
        moved: Array = cache + self.queries * self.heads * (self.qk_dim + self.value_dim) * wire_bytes(self.precision)
        return moved


@dataclass(frozen=True, slots=True, eq=False)
class Elementwise:
    """Norms, rotary embedding, activation functions, permutations: bytes moved by `kernels` launches."""

    name: str
    bytes: Array
    count: int = 1
    kernels: int = 1

    @property
    def flops(self) -> Array:
        """Negligible beside the bytes."""
        return np.zeros_like(self.bytes)


@dataclass(frozen=True, slots=True, eq=False)
class Communication:
    """A collective or transfer of `bytes` (as hwmodels.collectives counts them) over the rank group called `group`.

    experts   the kernel whose rows it carries, in proportion to which its bytes are; None for any other
    """

    name: str
    kind: str
    group: str
    bytes: Array
    count: int = 1
    experts: Experts | None = None

    @property
    def flops(self) -> Array:
        """Reductions are counted as communication."""
        return np.zeros_like(self.bytes)


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """One rank's routed experts in a fused kernel: permute, up, activation, down, weighted sum.

    tokens         tokens of all ranks that share the experts
    rows, active   routed rows and touched experts of the busiest rank, expected
    hidden, intermediate, experts, top_k   of the whole block
    tp, ep         ranks that share each expert, and groups the experts are spread over
    """

    name: str
    tokens: Array
    rows: Array
    active: Array
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tp: int
    ep: int
    gated: bool
    precision: Precision
    count: int = 1

    @property
    def parts(self) -> tuple[Elementwise | GroupedGemm, ...]:
        """The kernels it stands for, each launched once."""
        p, hidden, rows = self.precision, self.hidden, self.rows
        element = wire_bytes(p)
        width = int(np.ceil(self.intermediate / self.tp))
        up = width * (2 if self.gated else 1)
        return (
            Elementwise("permutation", 2.0 * rows * hidden * element),
            GroupedGemm("expert up projection", rows, self.active, up, hidden, p),
            Elementwise("expert activation", rows * (up + width) * element),
            GroupedGemm("expert down projection", rows, self.active, hidden, width, p),
            Elementwise("weighted sum", 2.0 * rows * hidden * element),
        )

    @property
    def flops(self) -> Array:
        """Of all parts."""
        total: Array = sum((part.flops for part in self.parts), np.zeros_like(self.rows))
        return total

    @property
    def bytes(self) -> Array:
        """Of all parts."""
        total: Array = sum((part.bytes for part in self.parts), np.zeros_like(self.rows))
        return total


Operator = Gemm | GroupedGemm | AttentionCore | Elementwise | Communication | Experts


def wire_bytes(p: Precision) -> float:
    """Bytes of one activation between kernels and ranks: 16 bit at least, only GEMM inputs are quantised further."""
    return max(2.0, DTYPE_BYTES[p.activations])


def row_bytes(k: int, n: int, p: Precision) -> float:
    """Bytes of one row of k inputs, in the format of the arithmetic, and n outputs, in 16 bit at least."""
    return k * DTYPE_BYTES[p.activations] + n * wire_bytes(p)


def scaled(found: list[Operator]) -> list[Operator]:
    """The operators with a kernel before every block-scaled product that scales its activations, 128 at a time, to fp8.

    Scales per tensor are static, known from the checkpoint, and applied where the activations are made.
    """
    result: list[Operator] = []
    for op in found:
        if isinstance(op, Gemm) and op.precision.weights == "fp8_block" and op.groups == 1:
            result.append(Elementwise(f"scaling for {op.name}", op.m * op.k * (2.0 + 1.0 + 4.0 / 128), op.count))
        result.append(op)
    return result


def kv_heads_per_rank(attention: Attention, tp: int) -> int:
    """KV heads a rank keeps; heads are replicated once there are more ranks than heads."""
    return max(1, attention.kv_heads // tp)


def attention_linear(
    model: ModelShape, attention: Attention, tokens: Array, mapping: Mapping, p: Precision, count: int
) -> list[Operator]:
    """Projections, norm and rotary embedding of one attention block for `tokens` tokens of any phase."""
    t, hidden, element = mapping.tp, model.hidden, wire_bytes(p)
    heads = attention.heads // t
    ops: list[Operator] = [Elementwise("attention norm", 4.0 * tokens * hidden * element, count)]
    if attention.latent is None:
        kv = kv_heads_per_rank(attention, t)
        width = heads * attention.head_dim + kv * (attention.head_dim + attention.value_dim)
        ops.append(Gemm("qkv projection", tokens, width, hidden, p, count))
        ops.append(Elementwise("rotary embedding", 2.0 * tokens * width * element, count))
    else:
        latent = attention.latent
        down = (latent.q_rank or 0) + latent.kv_rank + latent.rope_dim
        ops.append(Gemm("latent down projection", tokens, down, hidden, p, count))
        ops.append(Elementwise("latent norm, rotary embedding", 4.0 * tokens * down * element, count, kernels=2))
        ops.append(Gemm("query projection", tokens, heads * attention.head_dim, latent.q_rank or hidden, p, count))
    ops.append(Gemm("output projection", tokens, hidden, heads * attention.value_dim, p, count))
    if t > 1:
        ops.append(Communication("attention all-reduce", "all-reduce", "tp", tokens * hidden * element, count))
    return scaled(ops)


def decode_attention(
    attention: Attention, sequences: Array, context: Array, tp: int, p: Precision, count: int
) -> list[Operator]:
    """Attention of `sequences` single tokens over `context` cached tokens in total (the new tokens included).

    With a sliding window the total is clipped at sequences x window, exact when all contexts are on one side of it.
    MLA runs weight-absorbed: queries are taken into the latent space and results out of it
    (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).
    """
    if attention.window_tokens is not None:
        context = np.minimum(context, sequences * attention.window_tokens)
    heads = attention.heads // tp
    if attention.latent is None:
        kv = kv_heads_per_rank(attention, tp)
        return [
            AttentionCore("decode attention", "decode", sequences, context, context, heads, kv,
                          attention.head_dim, attention.value_dim, False, p, count, attention.window_tokens)
        ]  # fmt: skip
    latent = attention.latent
    width = latent.kv_rank + latent.rope_dim
    nope = attention.head_dim - latent.rope_dim
    return [
        Gemm("query into latent", sequences, latent.kv_rank, nope, p, count, groups=heads),
        AttentionCore(
            "decode attention", "decode", sequences, context, context, heads, 1, width, latent.kv_rank, True, p, count
        ),
        Gemm("latent into value", sequences, attention.value_dim, latent.kv_rank, p, count, groups=heads),
    ]


def attended_pairs(new: Array, before: Array, window_tokens: int | None) -> Array:
    """Query-key pairs of `new` tokens behind `before` cached ones under a causal mask, each seeing its window.

    >>> float(attended_pairs(np.array(3.0), np.array(2.0), None))  # 3 + 4 + 5
    12.0
    >>> float(attended_pairs(np.array(3.0), np.array(2.0), 4))  # 3 + 4 + 4
    11.0
    """
    full = new * before + new * (new + 1) / 2
    if window_tokens is None:
        return full
    beyond = np.clip(before + new - window_tokens, 0, new)
    overshoot = np.maximum(before - window_tokens, 0)
    excess: Array = beyond * overshoot + beyond * (beyond + 1) / 2
    return full - excess


def prefill_attention(
    attention: Attention, new: Array, before: Array, tp: int, p: Precision, count: int
) -> list[Operator]:
    """Causal attention of one prompt chunk of `new` tokens that follows `before` cached tokens.

    MLA runs unabsorbed: keys and values of the whole context are expanded from the latent for every chunk.
    """
    heads = attention.heads // tp
    pairs = attended_pairs(new, before, attention.window_tokens)
    window = attention.window_tokens
    read = before if window is None else np.minimum(before, window)
    if attention.latent is None:
        kv = kv_heads_per_rank(attention, tp)
        return [
            AttentionCore("prefill attention", "prefill", new, pairs, read, heads, kv,
                          attention.head_dim, attention.value_dim, False, p, count, window)
        ]  # fmt: skip
    latent = attention.latent
    expanded = heads * (attention.head_dim - latent.rope_dim + attention.value_dim)
    return [
        *scaled([Gemm("latent up projection", read + new, expanded, latent.kv_rank, p, count)]),
        AttentionCore("prefill attention", "prefill", new, pairs, read, heads, heads,
                      attention.head_dim, attention.value_dim, False, p, count),
    ]  # fmt: skip


def dense_feed_forward(
    model: ModelShape, ff: FeedForward, tokens: Array, tp: int, p: Precision, count: int
) -> list[Operator]:
    """A dense feed-forward block shared by tp ranks."""
    element = wire_bytes(p)
    width = ff.intermediate / tp
    up = int(np.ceil(width)) * (2 if ff.gated else 1)
    ops: list[Operator] = [
        Elementwise("feed-forward norm", 4.0 * tokens * model.hidden * element, count),
        Gemm("up projection", tokens, up, model.hidden, p, count),
        Elementwise("activation", tokens * (up + width) * element, count),
        Gemm("down projection", tokens, model.hidden, int(np.ceil(width)), p, count),
    ]
    if tp > 1:
        ops.append(Communication("feed-forward all-reduce", "all-reduce", "tp", tokens * model.hidden * element, count))
    return scaled(ops)


def expected_active_experts(experts_here: float, rows: Array, experts: int, top_k: int, total_tokens: Array) -> Array:
    """Expected number of a rank's experts that at least one of `total_tokens` tokens picks, routing uniform.

    experts_here * (1 - (1 - top_k/experts)^tokens), never more than the routed rows.
    """
    touched = experts_here * -np.expm1(total_tokens * np.log1p(-min(top_k / experts, 1 - 1e-12)))
    active: Array = np.minimum(touched, np.maximum(rows, 0))
    return active


def busiest_rank_rows(rows: Array, ranks: int) -> Array:
    """Expected rows of the busiest of `ranks` ranks when `rows` fall on each on average, routing uniform.

    Rows per rank are nearly binomial; the expected maximum of `ranks` normal variables is about
    sigma * sqrt(2 ln ranks) (the first-order term of the Gumbel limit), an over-estimate where there are rows for
    every rank, and never more than all rows or less than one of them.
    """
    if ranks == 1:
        return rows
    spread = np.sqrt(rows * (1 - 1 / ranks) * 2 * np.log(ranks))
    busiest: Array = np.clip(rows + spread, np.minimum(rows * ranks, 1), rows * ranks)
    return busiest


def busiest_rank_experts(touched: Array, experts_here: float, ranks: int) -> Array:
    """Expected touched experts of the busiest of `ranks` ranks, each of `experts_here`, when `touched` are on average.

    As busiest_rank_rows: the touched experts of a rank are nearly binomial too.
    """
    if ranks == 1:
        return touched
    spread = np.sqrt(np.maximum(touched * (1 - touched / experts_here), 0) * 2 * np.log(ranks))
    busiest: Array = np.clip(touched + spread, np.minimum(touched * ranks, 1), experts_here)
    return busiest


def expert_feed_forward(
    model: ModelShape, ff: FeedForward, tokens: Array, total_tokens: Array, mapping: Mapping, p: Precision, count: int
) -> list[Operator]:
    """A mixture-of-experts block: route, dispatch, expert products, combine.

    tokens         tokens of this rank's attention group
    total_tokens   tokens of all attention_dp groups, which meet in the experts
    """
    hidden, element = model.hidden, wire_bytes(p)
    rows = busiest_rank_rows(total_tokens * ff.top_k / mapping.ep, mapping.ep)
    touched = expected_active_experts(ff.experts / mapping.ep, rows, ff.experts, ff.top_k, total_tokens)
    active = np.minimum(busiest_rank_experts(touched, ff.experts / mapping.ep, mapping.ep), rows)
    experts = Experts(
        "routed experts", total_tokens, rows, active, hidden, ff.intermediate, ff.experts, ff.top_k,
        mapping.expert_tp, mapping.ep, ff.gated, p.of_experts, count,
    )  # fmt: skip
    ops: list[Operator] = [
        Elementwise("feed-forward norm", 4.0 * tokens * hidden * element, count),
        Gemm("router", tokens, ff.experts, hidden, Precision("bf16", "bf16", p.kv), count),
        Elementwise("top-k", 6.0 * tokens * ff.experts, count),
        experts,
    ]
    if ff.shared_intermediate:
        shared = int(np.ceil(ff.shared_intermediate / mapping.tp))
        ops.append(Gemm("shared expert up projection", tokens, shared * (2 if ff.gated else 1), hidden, p, count))
        ops.append(Elementwise("shared expert activation", 3.0 * tokens * shared * element, count))
        ops.append(Gemm("shared expert down projection", tokens, hidden, shared, p, count))
    if mapping.attention_dp > 1:
        # Each rank keeps 1/tp of its group's tokens and sends every one to the ranks of its chosen experts
        # (at most ep of them), then gets the partial sums back in bf16.
        sent = tokens / mapping.tp * min(ff.top_k, mapping.ep) * hidden
        ops.append(
            Communication("expert dispatch", "all-to-all", "ep", sent * DTYPE_BYTES[p.of_experts.activations], count)
        )
        ops.append(Communication("expert combine", "all-to-all", "ep", sent * 2.0, count))
        if mapping.expert_tp > 1:
            gathered = rows * hidden
            for name, kind, size in (("expert all-gather", "all-gather", element),
                                     ("expert reduce-scatter", "reduce-scatter", 2.0)):  # fmt: skip
                ops.append(Communication(name, kind, "expert_tp", gathered * size, count, experts))
        if mapping.tp > 1:
            ops.append(Communication("token all-gather", "all-gather", "tp", tokens * hidden * element, count))
    elif mapping.gpus // mapping.pp > 1:
        ops.append(Communication("expert all-reduce", "all-reduce", "tp", tokens * hidden * element, count))
    return scaled(ops)


def embedding(model: ModelShape, tokens: Array, tp: int, p: Precision) -> list[Operator]:
    """Token embedding, sharded over the vocabulary."""
    element = wire_bytes(p)
    ops: list[Operator] = [Elementwise("embedding", 2.0 * tokens * model.hidden * element)]
    if tp > 1:
        ops.append(Communication("embedding all-reduce", "all-reduce", "tp", tokens * model.hidden * element))
    return ops


def language_model_head(model: ModelShape, sampled: Array, tp: int) -> list[Operator]:
    """Final norm and vocabulary projection of the `sampled` tokens, and greedy sampling over their logits.

    Engines keep the head in 16 bit whatever the rest is quantised to.
    """
    wide = Precision("bf16", "bf16", "bf16")
    width = int(np.ceil(model.vocab / tp))
    ops: list[Operator] = [
        Elementwise("final norm", 4.0 * sampled * model.hidden),
        Gemm("language-model head", sampled, width, model.hidden, wide),
        Elementwise("sampling", 4.0 * sampled * width * 3, kernels=3),
    ]
    if tp > 1:
        ops.append(Communication("logits all-gather", "all-gather", "tp", sampled * model.vocab * 2.0))
    return ops
