"""What is computed: the shape of a model, layer by layer, with exact parameter and KV counts."""

from __future__ import annotations

from dataclasses import dataclass


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
    qk_norm         whether queries and keys are normalised per head
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
    """

    intermediate: int
    gated: bool = True
    bias: bool = False
    experts: int = 0
    top_k: int = 0
    shared_intermediate: int = 0
    router_bias: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer layer; norm_parameters counts its normalisation weights (and biases)."""

    attention: Attention
    feed_forward: FeedForward
    norm_parameters: int
