"""Which keys of a Hugging Face config.json an architecture needs, and what they may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hwmodels.errors import ProfileError

Count = Annotated[int, Field(gt=0, le=10**9)]
Layers = Annotated[int, Field(gt=0, le=10_000)]


class Keys(BaseModel):
    """Keys of a config.json; a configuration carries many more, which are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


K = TypeVar("K", bound=Keys)


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
    n_group: Count = 1
    topk_group: Count = 1
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
    """The keys an architecture needs, checked; ProfileError names the file and the first key at fault."""
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
