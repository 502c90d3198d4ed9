"""What an architecture implies beyond its keys: biases, norms, windows and mixtures of every layer.

The rules are those of the model classes in the transformers library, one short function per architecture. Vision towers
and multi-token-prediction modules are left out, and so is `quantization_config`: the number format is a choice of the
plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hwmodels.configkeys import (
    Bloom,
    Decoder,
    DeepSeekMoe,
    Falcon,
    Gemma,
    GlmMoe,
    Heads,
    Llama,
    MiniMax,
    Mixtral,
    NeoX,
    Opt,
    Phi,
    Qwen,
    QwenMoe,
    read,
)
from hwmodels.errors import ProfileError
from hwmodels.shape import Attention, FeedForward, Latent, Layer, ModelShape

Reader = Callable[[Mapping[str, Any], str, str], ModelShape]


def assemble(name: str, keys: Decoder, layer: Callable[[int], Layer], other_parameters: int) -> ModelShape:
    """The model whose i-th layer is layer(i); equal layers become one object."""
    seen: dict[Layer, Layer] = {}
    made = (layer(index) for index in range(keys.num_hidden_layers))
    return ModelShape(
        name=name,
        hidden=keys.hidden_size,
        vocab=keys.vocab_size,
        layers=tuple(seen.setdefault(one, one) for one in made),
        tied_embeddings=keys.tie_word_embeddings,
        max_context_tokens=keys.max_position_embeddings,
        other_parameters=other_parameters,
    )


def never(index: int) -> bool:
    """No layer."""
    return False


def always(index: int) -> bool:
    """Every layer."""
    return True


def grouped(
    name: str,
    keys: Llama,
    feed_forward: Callable[[int], FeedForward],
    *,
    slides: Callable[[int], bool] = never,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
    sinks: bool = False,
    norms: int = 2,
    qk_norm_parameters: int | None = None,
) -> ModelShape:
    """A decoder of grouped-query attention and RMS norms.

    slides               layers that attend within sliding_window only, where the configuration has no layer_types
    norms                norms of hidden_size per layer
    qk_norm_parameters   weights of the query and key norms of a layer; by default one head's width each
    """

    def layer(index: int) -> Layer:
        sliding = keys.layer_types[index] == "sliding_attention" if keys.layer_types else slides(index)
        attention = Attention(
            heads=keys.num_attention_heads,
            kv_heads=keys.kv_heads,
            head_dim=keys.head_width,
            value_dim=keys.head_width,
            window_tokens=keys.sliding_window if sliding else None,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            sinks=sinks,
        )
        inner = 2 * keys.head_width if qk_norm_parameters is None else qk_norm_parameters
        return Layer(attention, feed_forward(index), norms * keys.hidden_size + (inner if qk_norm else 0))

    return assemble(name, keys, layer, other_parameters=keys.hidden_size)


def llama(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Llama 1 to 3, Yi; attention_bias means all four projections."""
    keys = read(Llama, config, where)
    ff = FeedForward(keys.intermediate_size, bias=keys.mlp_bias)
    return grouped(name, keys, lambda _: ff, qkv_bias=keys.attention_bias, out_bias=keys.attention_bias)


def mistral(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Mistral and Phi-3: sliding_window, if given, holds in every layer."""
    keys = read(Llama, config, where)
    ff = FeedForward(keys.intermediate_size)
    return grouped(name, keys, lambda _: ff, slides=always)


def mixtral(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Mixtral."""
    keys = read(Mixtral, config, where)
    ff = FeedForward(keys.intermediate_size, experts=keys.experts, top_k=keys.num_experts_per_tok)
    return grouped(name, keys, lambda _: ff, slides=always)


def gpt_oss(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """gpt-oss: biases in every projection, expert and router, sinks, a window in every other layer."""
    keys = read(Mixtral, {"attention_bias": True, **config}, where)
    ff = FeedForward(
        keys.intermediate_size, bias=True, experts=keys.experts, top_k=keys.num_experts_per_tok, router_bias=True
    )
    bias = keys.attention_bias
    return grouped(
        name, keys, lambda _: ff, slides=lambda index: index % 2 == 0, qkv_bias=bias, out_bias=bias, sinks=True
    )


def minimax_m2(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """MiniMax-M2 and M2.5."""
    keys = read(MiniMax, config, where)
    ff = FeedForward(
        keys.intermediate_size,
        experts=keys.experts,
        top_k=keys.num_experts_per_tok,
        shared_intermediate=keys.shared_intermediate_size,
        router_bias=keys.use_routing_bias,
    )
    inner = (keys.num_attention_heads + keys.kv_heads) * keys.head_width
    return grouped(name, keys, lambda _: ff, qk_norm=keys.use_qk_norm, qk_norm_parameters=inner)


def slides_late(keys: Qwen) -> Callable[[int], bool]:
    """Qwen's window: from layer max_window_layers on, if it is used at all."""
    first = keys.max_window_layers or 0
    return lambda index: keys.use_sliding_window and index >= first


def qwen2(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Qwen2 and Qwen2.5: biases on queries, keys and values."""
    keys = read(Qwen, config, where)
    ff = FeedForward(keys.intermediate_size)
    return grouped(name, keys, lambda _: ff, slides=slides_late(keys), qkv_bias=True)


def qwen3(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Qwen3: query and key norms instead of biases."""
    keys = read(Qwen, config, where)
    ff, bias = FeedForward(keys.intermediate_size), keys.attention_bias
    return grouped(name, keys, lambda _: ff, slides=slides_late(keys), qkv_bias=bias, out_bias=bias, qk_norm=True)


def qwen_mixtures(keys: QwenMoe) -> Callable[[int], FeedForward]:
    """The feed-forward block of each layer of Qwen2-MoE and Qwen3-MoE; Qwen2's shared expert has a gate."""
    dense = FeedForward(keys.intermediate_size)
    mixture = FeedForward(
        keys.moe_intermediate_size,
        experts=keys.experts,
        top_k=keys.num_experts_per_tok,
        shared_intermediate=keys.shared_expert_intermediate_size,
        shared_gate=keys.shared_expert_intermediate_size > 0,
    )
    step, plain = keys.decoder_sparse_step, set(keys.mlp_only_layers)
    return lambda index: mixture if (index + 1) % step == 0 and index not in plain else dense


def qwen2_moe(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Qwen1.5-MoE and Qwen2-MoE."""
    keys = read(QwenMoe, config, where)
    return grouped(name, keys, qwen_mixtures(keys), slides=slides_late(keys), qkv_bias=True)


def qwen3_moe(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Qwen3-MoE."""
    keys = read(QwenMoe, config, where)
    bias = keys.attention_bias
    return grouped(
        name, keys, qwen_mixtures(keys), slides=slides_late(keys), qkv_bias=bias, out_bias=bias, qk_norm=True
    )


def gemma2(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Gemma 2: four norms per layer, a window in every other layer."""
    keys = read(Gemma, config, where)
    ff = FeedForward(keys.intermediate_size)
    return grouped(name, keys, lambda _: ff, slides=lambda index: index % 2 == 0, norms=4)


def gemma3(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Gemma 3: four norms per layer, query and key norms, full attention in every sixth layer."""
    keys = read(Gemma, config, where)
    ff, pattern = FeedForward(keys.intermediate_size), keys.sliding_window_pattern or 6
    return grouped(name, keys, lambda _: ff, slides=lambda index: (index + 1) % pattern > 0, norms=4, qk_norm=True)


def glm4(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """GLM-4-0414: four norms per layer; attention_bias leaves the output projection out."""
    keys = read(Llama, config, where)
    ff = FeedForward(keys.intermediate_size)
    return grouped(name, keys, lambda _: ff, qkv_bias=keys.attention_bias, norms=4)


def glm4_moe(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """GLM-4.5 to 4.7."""
    keys = read(GlmMoe, config, where)
    dense = FeedForward(keys.intermediate_size)
    mixture = FeedForward(
        keys.moe_intermediate_size,
        experts=keys.experts,
        top_k=keys.num_experts_per_tok,
        shared_intermediate=keys.n_shared_experts * keys.moe_intermediate_size,
        router_bias=True,
    )
    return grouped(
        name,
        keys,
        lambda index: mixture if index >= keys.first_k_dense_replace else dense,
        qkv_bias=keys.attention_bias,
        qk_norm=keys.use_qk_norm,
    )


def deepseek(router_bias: bool) -> Reader:
    """DeepSeek-V2 and, with a bias per expert that balances the router's load, V3, R1 and Kimi K2."""

    def deepseek_reader(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
        keys = read(DeepSeekMoe, config, where)
        attention = Attention(
            heads=keys.num_attention_heads,
            kv_heads=keys.num_attention_heads,
            head_dim=keys.qk_nope_head_dim + keys.qk_rope_head_dim,
            value_dim=keys.v_head_dim,
            latent=Latent(keys.q_lora_rank, keys.kv_lora_rank, keys.qk_rope_head_dim),
            qkv_bias=keys.attention_bias,
            out_bias=keys.attention_bias,
        )
        dense = FeedForward(keys.intermediate_size)
        mixture = FeedForward(
            keys.moe_intermediate_size,
            experts=keys.experts,
            top_k=keys.num_experts_per_tok,
            shared_intermediate=keys.n_shared_experts * keys.moe_intermediate_size,
            router_bias=router_bias,
            groups=keys.n_group,
            top_groups=keys.topk_group,
        )
        norms = 2 * keys.hidden_size + keys.kv_lora_rank + (keys.q_lora_rank or 0)

        def layer(index: int) -> Layer:
            routed = index >= keys.first_k_dense_replace and index % keys.moe_layer_freq == 0
            return Layer(attention, mixture if routed else dense, norms)

        return assemble(name, keys, layer, other_parameters=keys.hidden_size)

    return deepseek_reader


def classic(
    name: str, keys: Heads, kv_heads: int, intermediate: int, *, bias: bool, norms: int, other_parameters: int
) -> ModelShape:
    """A decoder of LayerNorms (weight and bias each, `norms` per layer) and two-matrix feed-forward blocks."""
    attention = Attention(
        heads=keys.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=keys.head_width,
        value_dim=keys.head_width,
        qkv_bias=bias,
        out_bias=bias,
    )
    layer = Layer(attention, FeedForward(intermediate, gated=False, bias=bias), norms * 2 * keys.hidden_size)
    return assemble(name, keys, lambda _: layer, other_parameters)


def falcon(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Falcon 7B, 40B, 180B."""
    keys = read(Falcon, config, where)
    side_by_side = keys.num_ln_in_parallel_attn or (2 if keys.new_decoder_architecture else 1)
    norms = side_by_side if keys.parallel_attn else 2
    width, other = keys.ffn_hidden_size or 4 * keys.hidden_size, 2 * keys.hidden_size
    return classic(name, keys, keys.kv_heads, width, bias=keys.bias, norms=norms, other_parameters=other)


def bloom(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """BLOOM: norms behind the embedding and before the head."""
    keys = read(Bloom, config, where)
    width, other = 4 * keys.hidden_size, 4 * keys.hidden_size
    return classic(name, keys, keys.num_attention_heads, width, bias=True, norms=2, other_parameters=other)


def phi(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Phi-1, Phi-1.5 and Phi-2; the head has a bias."""
    keys = read(Phi, config, where)
    if keys.qk_layernorm:
        raise ProfileError(f"{where}: qk_layernorm is true, expected false (no published Phi model has it)")
    kv_heads, other = keys.num_key_value_heads or keys.num_attention_heads, 2 * keys.hidden_size + keys.vocab_size
    return classic(name, keys, kv_heads, keys.intermediate_size, bias=True, norms=1, other_parameters=other)


def gpt_neox(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """GPT-NeoX-20B and Pythia."""
    keys = read(NeoX, config, where)
    if not keys.attention_bias:
        raise ProfileError(f"{where}: attention_bias is false, expected true (as in GPT-NeoX-20B and Pythia)")
    heads, other = keys.num_attention_heads, 2 * keys.hidden_size
    return classic(name, keys, heads, keys.intermediate_size, bias=True, norms=2, other_parameters=other)


def opt(config: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """OPT: max_position_embeddings + 2 learned positions."""
    keys = read(Opt, config, where)
    if keys.word_embed_proj_dim != keys.hidden_size or not keys.do_layer_norm_before:
        raise ProfileError(
            f"{where}: word_embed_proj_dim {keys.word_embed_proj_dim} and do_layer_norm_before"
            f" {keys.do_layer_norm_before}, expected {keys.hidden_size} and True (opt-350m is not supported)"
        )
    other = (keys.max_position_embeddings + 2) * keys.hidden_size + 2 * keys.hidden_size
    heads, bias = keys.num_attention_heads, keys.enable_bias
    return classic(name, keys, heads, keys.ffn_dim, bias=bias, norms=2, other_parameters=other)


#: How each `model_type` is read.
READERS: dict[str, Reader] = {
    "llama": llama,
    "mistral": mistral,
    "phi3": mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_vl_text": qwen3,
    "qwen3_moe": qwen3_moe,
    "qwen3_vl_moe_text": qwen3_moe,
    "deepseek_v2": deepseek(router_bias=False),
    "deepseek_v3": deepseek(router_bias=True),
    "kimi_k2": deepseek(router_bias=True),
    "gpt_oss": gpt_oss,
    "minimax_m2": minimax_m2,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "glm4": glm4,
    "glm4_moe": glm4_moe,
    "falcon": falcon,
    "bloom": bloom,
    "phi": phi,
    "gpt_neox": gpt_neox,
    "opt": opt,
}
