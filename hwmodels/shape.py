"""What is computed: the shape of a model, layer by layer, with exact parameter and KV counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from hwmodels.mapping import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1): what is cached is one latent per token.

    q_rank     width of the compressed query, None where queries are projected directly
    kv_rank    width of the cached latent
    rope_dim   width of the rotary key shared by all heads, cached beside the latent
    """

    q_rank: int | None
    kv_rank: int
    rope_dim: int


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention block; MHA and MQA are GQA with kv_heads equal to heads and to 1.

    head_dim        width of a query and key head (MLA: the part without position + rope_dim)
    value_dim       width of a value head
    window_tokens   sliding window, None for full attention
    latent          given for MLA only
    qkv_bias, out_bias   whether the projections have biases
    qk_norm         whether queries and keys are normalised before they meet
    sinks           whether every head has one learned logit that takes attention away (gpt-oss)
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window_tokens: int | None = None
    latent: Latent | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class FeedForward:
    """One feed-forward block, dense (experts == 0) or a mixture of experts.

    intermediate          width of the dense block or of one routed expert
    shared_intermediate   total width of the shared experts, 0 without
    shared_gate           whether a learned gate weighs the shared experts (Qwen2-MoE)
    groups, top_groups    groups of experts side by side, and those that the experts of one token are chosen from
                          (DeepSeek-V3, arXiv:2412.19437, section 2.1.2: 4 of 8)
    """

    intermediate: int
    gated: bool = True
    bias: bool = False
    experts: int = 0
    top_k: int = 0
    shared_intermediate: int = 0
    router_bias: bool = False
    shared_gate: bool = False
    groups: int = 1
    top_groups: int = 1

    @property
    def max_nodes(self) -> int | None:
        """Nodes that hold all experts of a token, each with whole groups of experts; None where any may."""
        return self.top_groups if self.groups > 1 else None


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer layer.

    norm_parameters   weights and biases of every norm in the layer, those inside the attention block (queries, keys,
                      latents) included
    """

    attention: Attention
    feed_forward: FeedForward
    norm_parameters: int


def attention_parameters(attention: Attention, hidden: int) -> int:
    """Weights, biases and sinks of one attention block; its norms are counted by Layer.norm_parameters.

    >>> attention_parameters(Attention(heads=2, kv_heads=1, head_dim=4, value_dim=4), hidden=8)  # 64 + 32 + 32 + 64
    192
    """
    heads, latent = attention.heads, attention.latent
    out = heads * attention.value_dim * hidden + (hidden if attention.out_bias else 0)
    sinks = heads if attention.sinks else 0
    query = heads * attention.head_dim
    if latent is None:
        width = query + attention.kv_heads * (attention.head_dim + attention.value_dim)
        return hidden * width + (width if attention.qkv_bias else 0) + out + sinks
    rank = latent.q_rank
    down = latent.kv_rank + latent.rope_dim + (rank or 0)
    up_query = (hidden if rank is None else rank) * query
    up_kv = latent.kv_rank * heads * (attention.head_dim - latent.rope_dim + attention.value_dim)
    return hidden * down + (down if attention.qkv_bias else 0) + up_query + up_kv + out + sinks


def feed_forward_parameters(ff: FeedForward, hidden: int, *, active: bool = False) -> int:
    """Weights and biases of one feed-forward block with its router; only the top_k experts of a token if `active`.

    >>> feed_forward_parameters(FeedForward(intermediate=10), hidden=4)  # gate, up and down of 40 each
    120
    """
    matrices = 3 if ff.gated else 2

    def block(width: int) -> int:
        bias = (matrices - 1) * width + hidden if ff.bias else 0
        return matrices * hidden * width + bias

    if ff.experts == 0:
        return block(ff.intermediate)
    router = ff.experts * hidden + (ff.experts if ff.router_bias else 0)
    shared = block(ff.shared_intermediate) if ff.shared_intermediate else 0
    gate = hidden if ff.shared_gate else 0
    return (ff.top_k if active else ff.experts) * block(ff.intermediate) + router + shared + gate


def kv_elements_per_token(attention: Attention) -> int:
    """Numbers one token leaves in the cache of one layer: keys and values, or the latent and rotary key of MLA."""
    if attention.latent is not None:
        return attention.latent.kv_rank + attention.latent.rope_dim
    return attention.kv_heads * (attention.head_dim + attention.value_dim)


def layer_parameters(layer: Layer, hidden: int, *, active: bool = False) -> int:
    """Weights of one layer; only the experts that serve one token if `active`."""
    attention = attention_parameters(layer.attention, hidden)
    return attention + feed_forward_parameters(layer.feed_forward, hidden, active=active) + layer.norm_parameters


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only language model.

    hidden, vocab        width of the residual stream; rows of the embedding, padding included
    layers               one entry per layer, first layer first; equal layers are one object
    tied_embeddings      whether the language-model head reuses the embedding
    max_context_tokens   longest context the model was made for
    other_parameters     what is in no layer, embedding or head: final norm, learned positions, bias of the head
    """

    name: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    tied_embeddings: bool
    max_context_tokens: int
    other_parameters: int

    @property
    def parameters(self) -> int:
        """All weights, multi-token-prediction modules left out."""
        return self._count(active=False)

    @property
    def active_parameters(self) -> int:
        """Weights that serve one token: all but the experts it is not routed to.

        The embedding is counted whole, as in Mistral's "12.9B active" for Mixtral 8x7B; some vendors leave it out.
        """
        return self._count(active=True)

    @property
    def is_moe(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return any(layer.feed_forward.experts for layer in self.layers)

    def kv_elements_per_token(self, layers: Iterable[Layer] | None = None) -> int:
        """Numbers one token leaves in the caches of `layers` (all by default), as long as no window drops it."""
        counts = Counter(self.layers if layers is None else layers)
        return sum(n * kv_elements_per_token(layer.attention) for layer, n in counts.items())

    def kv_bytes_per_token(self, kv_dtype: str, layers: Iterable[Layer] | None = None) -> float:
        """Bytes one token takes in the caches of `layers` (all by default), as long as no window drops it."""
        return self.kv_elements_per_token(layers) * DTYPE_BYTES[kv_dtype]

    def _count(self, *, active: bool) -> int:
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return (
            sum(n * layer_parameters(layer, self.hidden, active=active) for layer, n in Counter(self.layers).items())
            + embeddings
            + self.other_parameters
        )
