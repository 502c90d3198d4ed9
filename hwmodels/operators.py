"""What one rank runs in a step: operators as (kind, shape, dtype), with exact FLOPs and bytes and never a time.

Every token count may be a numpy array: one operator then stands for the same operator at many batch sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, lgamma
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hwmodels.mapping import DTYPE_BYTES, Mapping, Precision, weight_bytes
from hwmodels.shape import Attention, FeedForward, ModelShape

Array = NDArray[np.float64]
#: How ranks attend to tokens that lie on others, see hwmodels.contextkinds.
Kind = Literal["ring", "tokenring", "ulysses", "all-gather"]


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
    redundant      slots that copies of experts take, over all groups
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
    redundant: int = 0

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


@dataclass(frozen=True, slots=True, eq=False)
class ExpertExchange:
    """Tokens of every rank go to the ranks of their chosen experts, or the experts' results come back.

    phase       'dispatch' or 'combine'
    tokens      that each rank brings
    hidden, experts, top_k   of the expert block
    ep          groups that the experts are spread over
    formats     on the wire: of tokens dispatched, and of results
    max_nodes   nodes that the experts of a token may lie on, None for any
    shares      [layers, ep] of the choices that fall on each group, layer by layer; None for even ones
    beside      arithmetic that waits for neither, which an engine may run meanwhile
    """

    name: str
    phase: str
    tokens: Array
    hidden: int
    experts: int
    top_k: int
    ep: int
    formats: tuple[str, str]
    max_nodes: int | None = None
    shares: Array | None = None
    beside: tuple[Gemm | Elementwise, ...] = ()
    count: int = 1

    @property
    def flops(self) -> Array:
        """Sums of results are counted as communication."""
        return np.zeros_like(self.tokens)

    @property
    def bytes(self) -> Array:
        """A copy for each chosen expert, or for each group where these are fewer; scales are left out."""
        dtype = self.formats[self.phase == "combine"]
        sent: Array = self.tokens * min(self.top_k, self.ep) * self.hidden * DTYPE_BYTES[dtype]
        return sent


@dataclass(frozen=True, slots=True, eq=False)
class ContextAttention:
    """Attention of a layer whose tokens lie on cp ranks, what these send one another included.

    phase     'prefill' or 'decode'
    kind      of context parallelism, a key of hwmodels.contextkinds
    tokens    new tokens of a chunk or decoding sequences, of all cp ranks together
    context   tokens cached before the chunk, or tokens that all the sequences attend to in total
    """

    name: str
    phase: str
    kind: Kind
    attention: Attention
    cp: int
    tp: int
    tokens: Array
    context: Array
    precision: Precision
    count: int = 1

    @property
    def parts(self) -> list[Operator]:
        """Kernels of an average rank; launches within one layer are their counts.

        Ring and TokenRing run one for every rank's keys or queries. Latents are expanded by every rank that reads them.
        """
        a, cp, p = self.attention, self.cp, self.precision
        tokens, context = np.broadcast_arrays(self.tokens, self.context)
        if self.phase == "decode" and self.kind == "ulysses":
            return decode_attention(a, tokens, context, self.tp * cp, p, 1)
        if self.phase == "decode":
            # The window limits whole contexts, not a rank's share of them.
            seen = context if a.window_tokens is None else np.minimum(context, tokens * a.window_tokens)
            return shared_decode_attention(a, tokens, seen / cp, cp, self.tp, p)
        heads, kv_heads = a.heads // self.tp, kv_heads_per_rank(a, self.tp)
        pairs = attended_pairs(tokens, context, a.window_tokens) / cp
        read = context if a.window_tokens is None else np.minimum(context, a.window_tokens)
        queries, launches = tokens / cp, 1
        if self.kind == "ulysses":
            queries, heads, kv_heads, pairs = tokens, heads // cp, max(1, kv_heads // cp), pairs * cp
        elif self.kind == "all-gather":
            read = read + tokens - queries
        else:
            read, pairs, launches = read / cp, pairs / cp, cp
        core = AttentionCore(
            self.name, "prefill", queries, pairs, read, heads, heads if a.latent is not None else kv_heads, a.head_dim,
            a.value_dim, False, p, launches, a.window_tokens,
        )  # fmt: skip
        if a.latent is None:
            return [core]
        width = heads * (a.head_dim - a.latent.rope_dim + a.value_dim)
        up = Gemm("latent up projection", read + queries, width, a.latent.kv_rank, p, launches)
        return [*scaled([up]), core]

    @property
    def flops(self) -> Array:
        """Of an average rank."""
        total: Array = sum((part.count * part.flops for part in self.parts), np.zeros_like(self.tokens + self.context))
        return total

    @property
    def bytes(self) -> Array:
        """Of an average rank's kernels; what is sent is not counted."""
        total: Array = sum((part.count * part.bytes for part in self.parts), np.zeros_like(self.tokens + self.context))
        return total


Operator = (
    Gemm | GroupedGemm | AttentionCore | Elementwise | Communication | Experts | ExpertExchange | ContextAttention
)


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


def shared_decode_attention(
    attention: Attention, sequences: Array, context: Array, cp: int, tp: int, p: Precision
) -> list[Operator]:
    """decode_attention on one of cp ranks that attends all `sequences` to its part, `context` tokens, of their caches.

    `context` has the window taken into account. Latent queries and values are made by the rank that owns the sequence.
    """
    found = decode_attention(attention, sequences, context, tp, p, 1)
    return [replace(op, m=op.m / cp) if isinstance(op, Gemm) else op for op in found]


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


def expected_active_slots(slots: int, rows: Array, experts: int, top_k: int, total_tokens: Array, ranks: int) -> Array:
    """Expected slots of the average of `ranks` ranks with a token, `slots` of a layer in all, routing uniform.

    Every expert has c = slots // experts copies or, slots % experts of them, one more. Each copy takes as many of its
    expert's tokens, so that it gets none of T with probability (1 - top_k / (experts c))^T:

        sum over experts of  c x (1 - (1 - top_k / (experts c))^T) / ranks

    as expected_active_experts where there are no more slots than experts. Copies are taken to sit so that ranks are
    even on average, which balancers see to.
    """
    least, more = divmod(slots, experts)
    touched = np.zeros_like(rows)
    for copies, count in ((least, experts - more), (least + 1, more)):
        here = count * copies / ranks
        touched = touched + expected_active_experts(here, rows, experts * copies, top_k, total_tokens)
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


def groups_of_token(experts: int, top_k: int, groups: int) -> float:
    """Expected number of `groups`, as many of the `experts` in each, that hold any of top_k experts drawn evenly.

    >>> round(groups_of_token(experts=6, top_k=2, groups=2), 9)  # the second is beside the first in two of five draws
    1.6
    """
    others = experts - experts / groups
    if others < top_k:
        return groups
    none = lgamma(others + 1) - lgamma(others - top_k + 1) - lgamma(experts + 1) + lgamma(experts - top_k + 1)
    return groups * (1 - exp(none))


def expert_feed_forward(
    model: ModelShape, ff: FeedForward, tokens: Array, total_tokens: Array, mapping: Mapping, p: Precision, count: int
) -> list[Operator]:
    """A mixture-of-experts block: route, dispatch, expert products, combine.

    tokens         tokens of this rank's attention group, of a cp rank its own
    total_tokens   tokens of all attention_dp groups and their cp ranks, which meet in the experts
    """
    hidden, element = model.hidden, wire_bytes(p)
    rows = busiest_rank_rows(total_tokens * ff.top_k / mapping.ep, mapping.ep)
    slots = ff.experts + mapping.redundant_experts
    touched = expected_active_slots(slots, rows, ff.experts, ff.top_k, total_tokens, mapping.ep)
    active = np.minimum(busiest_rank_experts(touched, slots / mapping.ep, mapping.ep), rows)
    experts = Experts(
        "routed experts", total_tokens, rows, active, hidden, ff.intermediate, ff.experts, ff.top_k,
        mapping.expert_tp, mapping.ep, ff.gated, p.of_experts, count, mapping.redundant_experts,
    )  # fmt: skip
    ops: list[Operator] = [
        Elementwise("feed-forward norm", 4.0 * tokens * hidden * element, count),
        Gemm("router", tokens, ff.experts, hidden, Precision("bf16", "bf16", p.kv), count),
        Elementwise("top-k", 6.0 * tokens * ff.experts, count),
    ]
    shared: tuple[Gemm | Elementwise, ...] = ()
    if ff.shared_intermediate:
        width = int(np.ceil(ff.shared_intermediate / mapping.tp))
        shared = (
            Gemm("shared expert up projection", tokens, width * (2 if ff.gated else 1), hidden, p, count),
            Elementwise("shared expert activation", 3.0 * tokens * width * element, count),
            Gemm("shared expert down projection", tokens, hidden, width, p, count),
        )
    if mapping.token_groups == 1:
        ops += [experts, *shared]
        if mapping.gpus // mapping.pp > 1:
            ops.append(Communication("expert all-reduce", "all-reduce", "tp", tokens * hidden * element, count))
        return scaled(ops)
    # Each rank keeps 1/tp of its group's tokens and gets the sums back in bf16.
    formats = (p.of_experts.activations, "bf16")
    dispatch, combine = (
        ExpertExchange(f"expert {phase}", phase, tokens / mapping.tp, hidden, ff.experts, ff.top_k, mapping.ep, formats,
                       ff.max_nodes, beside=beside, count=count)
        for phase, beside in (("dispatch", shared), ("combine", ()))
    )  # fmt: skip
    gathered = rows / ff.top_k * groups_of_token(ff.experts, ff.top_k, mapping.ep) * hidden
    ops += [dispatch, *shared]
    if mapping.expert_tp > 1:
        size = gathered * element
        ops.append(Communication("expert all-gather", "all-gather", "expert_tp", size, count, experts))
    ops.append(experts)
    if mapping.expert_tp > 1:
        size = gathered * 2.0
        ops.append(Communication("expert reduce-scatter", "reduce-scatter", "expert_tp", size, count, experts))
    ops.append(combine)
    if mapping.tp > 1:
        ops.append(Communication("token all-gather", "all-gather", "tp", tokens * hidden * element, count))
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
