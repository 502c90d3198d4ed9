"""Which model is meant: shipped profiles and Hugging Face configurations read into a ModelShape.

A config.json leaves out what its architecture implies (which projections have biases, how many norms a layer has, what
a missing key means). Those rules are the ones of the model classes in the transformers library, one short function per
architecture below. Only the language model is read: vision towers and multi-token-prediction modules are left out, and
so is `quantization_config`, because the number format is a choice of the plan.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hwmodels.errors import ProfileError
from hwmodels.shape import Attention, FeedForward, Latent, Layer, ModelShape

PROFILES = Path(__file__).resolve().parents[1] / "profiles"

Count = Annotated[int, Field(gt=0, le=10**9)]
Layers = Annotated[int, Field(gt=0, le=10_000)]


class Keys(BaseModel):
    """Keys of a config.json; a configuration carries many more, which are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


K = TypeVar("K", bound=Keys)
Reader = Callable[[Mapping[str, Any], str, str], ModelShape]


class Decoder(Keys):
    """Keys every architecture has, under the names most of them use."""

    hidden_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    vocab_size: Count
    max_position_embeddings: Count
    tie_word_embeddings: bool = False


class Heads(Decoder):
    """Heads that share hidden_size evenly, or are head_dim wide each."""

    head_dim: Count | None = None

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
                " (give head_dim if that is meant)"
            )
        return self


class Llama(Heads):
    """Rotary positions, RMS norms, grouped queries, gated feed-forward."""

    intermediate_size: Count
    num_key_value_heads: Count | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    layer_types: list[str] | None = None
    sliding_window: Count | None = None

    @property
    def kv_heads(self) -> int:
        """Key-value heads; one per query head where the key is missing (Llama 1)."""
        return self.num_key_value_heads or self.num_attention_heads

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of"
                f" num_key_value_heads {self.kv_heads}"
            )
        return self

    @model_validator(mode="after")
    def _known_layers(self) -> Self:
        if self.layer_types is None:
            return self
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        for kind in self.layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(f"layer_types holds {kind!r}, expected 'full_attention' or 'sliding_attention'")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types holds 'sliding_attention' but sliding_window is missing")
        return self


class Qwen(Llama):
    """Llama with a window from layer max_window_layers on, if use_sliding_window."""

    num_key_value_heads: Count
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Field(ge=0)] | None = None


class Routed(Keys):
    """Mixture-of-experts keys; each architecture has its own name for the number of experts."""

    experts: Count = Field(validation_alias="num_local_experts")
    num_experts_per_tok: Count

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.num_experts_per_tok > self.experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds the {self.experts} experts")
        return self


class Mixtral(Llama, Routed):
    """Every layer is a mixture whose experts are intermediate_size wide (also gpt-oss)."""

    num_key_value_heads: Count


class QwenMoe(Qwen, Routed):
    """Mixtures every decoder_sparse_step layers, but not in mlp_only_layers."""

    experts: Count = Field(validation_alias="num_experts")
    moe_intermediate_size: Count
    shared_expert_intermediate_size: Annotated[int, Field(ge=0)] = 0
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[int] = []


class GlmMoe(Llama, Routed):
    """GLM-4.5: mixtures behind first_k_dense_replace dense layers."""

    num_key_value_heads: Count
    experts: Count = Field(validation_alias="n_routed_experts")
    moe_intermediate_size: Count
    n_shared_experts: Annotated[int, Field(ge=0)]
    first_k_dense_replace: Annotated[int, Field(ge=0)]
    use_qk_norm: bool = False


class MiniMax(Mixtral):
    """MiniMax-M2: norms over all query and key heads together."""

    use_qk_norm: bool
    use_routing_bias: bool
    shared_intermediate_size: Annotated[int, Field(ge=0)] = 0


class Gemma(Llama):
    """Gemma 2 and 3: sandwich norms, a window in all but every sliding_window_pattern-th layer."""

    num_key_value_heads: Count
    head_dim: Count
    sliding_window: Count
    sliding_window_pattern: Count | None = None
    tie_word_embeddings: bool = True


class DeepSeek(Decoder):
    """Multi-head latent attention; mixtures behind first_k_dense_replace dense layers."""

    intermediate_size: Count
    q_lora_rank: Count | None
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count
    attention_bias: bool = False


class DeepSeekMoe(DeepSeek, Routed):
    """DeepSeek-V2, V3, R1 and Kimi K2."""

    experts: Count = Field(validation_alias="n_routed_experts")
    moe_intermediate_size: Count
    n_shared_experts: Annotated[int, Field(ge=0)]
    first_k_dense_replace: Annotated[int, Field(ge=0)]
    moe_layer_freq: Count = 1


class Falcon(Heads):
    """Falcon, 7B (one key-value head) and the later decoder (num_kv_heads)."""

    num_hidden_layers: Layers = Field(validation_alias=AliasChoices("num_hidden_layers", "n_layer"))
    num_attention_heads: Count = Field(validation_alias=AliasChoices("num_attention_heads", "n_head"))
    num_kv_heads: Count | None = Field(None, validation_alias=AliasChoices("num_kv_heads", "n_head_kv"))
    max_position_embeddings: Count = 2048
    tie_word_embeddings: bool = True
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    ffn_hidden_size: Count | None = None
    num_ln_in_parallel_attn: Count | None = None

    @property
    def kv_heads(self) -> int:
        """Key-value heads: num_kv_heads in the later decoder, else one (multi_query) or one per head."""
        if self.multi_query and not self.new_decoder_architecture:
            return 1
        return self.num_kv_heads or self.num_attention_heads

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )
        return self


class Bloom(Heads):
    """BLOOM: ALiBi, biases everywhere, a norm behind the embedding."""

    hidden_size: Count = Field(validation_alias=AliasChoices("hidden_size", "n_embed"))
    num_hidden_layers: Layers = Field(validation_alias=AliasChoices("n_layer", "num_hidden_layers"))
    num_attention_heads: Count = Field(validation_alias=AliasChoices("n_head", "num_attention_heads"))
    max_position_embeddings: Count = Field(2048, validation_alias="seq_length")
    tie_word_embeddings: bool = True


class Phi(Heads):
    """Phi-1 and Phi-2: parallel attention and feed-forward behind one norm, biases everywhere."""

    intermediate_size: Count
    num_key_value_heads: Count | None = None
    qk_layernorm: bool = False


class NeoX(Heads):
    """GPT-NeoX and Pythia."""

    intermediate_size: Count
    attention_bias: bool = True


class Opt(Heads):
    """OPT: learned positions."""

    ffn_dim: Count
    word_embed_proj_dim: Count
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    tie_word_embeddings: bool = True


def read(keys: type[K], config: Mapping[str, Any], where: str) -> K:
    """The keys an architecture needs, checked; ProfileError names the first key at fault, the file and the expectation."""
    try:
        return keys.model_validate(dict(config))
    except ValidationError as error:
        raise ProfileError(f"{where}: {fault(error)}") from None


def fault(error: ValidationError) -> str:
    """The first fault pydantic found, in one line.

    >>> try: Decoder.model_validate({"hidden_size": "wide"})
    ... except ValidationError as error: fault(error)
    "hidden_size is 'wide', expected a valid integer"
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{key} is missing; copy it from the model's config.json"
    if first["type"] == "extra_forbidden":
        return f"{key} is no known key; remove it"
    if not key or first["type"] == "value_error":
        return expected
    shown = repr(first["input"])
    return f"{key} is {shown if len(shown) <= 40 else shown[:37] + '...'}, expected {expected}"


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

#: Keys with a meaning in a Llama configuration, or none for a model's shape.
PLAIN_KEYS = frozenset(
    """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size
    max_position_embeddings tie_word_embeddings attention_bias mlp_bias model_type architectures auto_map name_or_path
    _name_or_path attention_dropout bos_token_id eos_token_id pad_token_id dtype torch_dtype hidden_act
    initializer_range pretraining_tp quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta
    transformers_version use_cache
    """.split()
)


def shape_from_config(config: Mapping[str, Any], name: str, where: str | None = None) -> ModelShape:
    """The model a Hugging Face configuration describes.

    config   the keys of config.json; the language model may be nested as text_config
    where    file the configuration came from, for error messages; the name by default

    Raises ProfileError for an architecture not known, and for a key that is missing or impossible.
    """
    where = where or name
    if not isinstance(config, Mapping):
        raise ProfileError(f"{where}: {type(config).__name__} found, expected a mapping of config.json keys")
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        inherited = {key: config[key] for key in ("model_type", "tie_word_embeddings") if key in config}
        config = {**inherited, **nested}
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ProfileError(f"{where}: model_type is {kind!r}, expected one of {', '.join(READERS)}")
    if kind in READERS:
        return READERS[kind](config, name, where)
    unusual = [key for key, value in config.items() if value and key not in PLAIN_KEYS]
    lacking = [key for key, field in Llama.model_fields.items() if field.is_required() and key not in config]
    if unusual or lacking:
        reason = f"unlike Llama it has {unusual[0]}" if unusual else f"unlike Llama it lacks {lacking[0]}"
        raise ProfileError(f"{where}: model_type {kind!r} is not supported ({reason}); supported: {', '.join(READERS)}")
    return llama(config, name, where)


class ModelProfile(BaseModel):
    """A shipped model: facts and where they come from.

    published_parameters   number of parameters its maker published, in published_in
    published_exact        whether that is the exact count rather than a rounded one
    config                 keys of the model's config.json
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    source: str
    published_parameters: Annotated[int, Field(gt=0)]
    published_in: str
    published_exact: bool
    config: dict[str, Any]


def model_names() -> list[str]:
    """Names of the shipped models."""
    return sorted(path.stem for path in (PROFILES / "models").glob("*.yaml"))


def load_profile(name: str) -> ModelProfile:
    """The facts of a shipped model; ProfileError with the nearest names if there is none."""
    if name not in model_names():
        raise ProfileError(unknown(name))
    path = PROFILES / "models" / f"{name}.yaml"
    try:
        return ModelProfile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ProfileError(f"{path.name}: {fault(error)}") from None


def load_model(name_or_path: str) -> ModelShape:
    """A shipped model by name, or that of a config.json (its path or its folder's).

    Raises ProfileError for an unknown name and for a file that cannot be read.
    """
    if name_or_path in model_names():
        profile = load_profile(name_or_path)
        return shape_from_config(profile.config, profile.name, f"{profile.name}.yaml")
    path = Path(name_or_path)
    try:
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ProfileError(unknown(name_or_path))
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{name_or_path}: {error.strerror}; expected a model name or a config.json") from None
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not JSON ({error}), expected a Hugging Face config.json") from None
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return shape_from_config(config, name, str(path))


def unknown(name: str) -> str:
    """What to say of a name that is neither a shipped model nor a file."""
    near = difflib.get_close_matches(name.lower(), model_names(), n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"shipped: {', '.join(model_names())}"
    return f"{name!r} is neither a shipped model nor a config.json or its folder; {hint}"
