"""Does it fit: weights, activations and the KV cache of one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from hwmodels.contextattention import kind_of
from hwmodels.contextkinds import cached_share, extra_bytes, require_legal, widths
from hwmodels.engine import Engine
from hwmodels.errors import OutOfMemoryError
from hwmodels.hardware import Device
from hwmodels.mapping import DTYPE_BYTES, Mapping, Precision, weight_bytes
from hwmodels.operators import kv_heads_per_rank, wire_bytes
from hwmodels.shape import Attention, FeedForward, Layer, ModelShape, attention_parameters, feed_forward_parameters
from hwmodels.step_model import stage_layers

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the fullest rank of the fullest stage, and the KV blocks every scheduler of the replica gets.

    weights_bytes, activations_bytes   what the model takes; engine_bytes what the engine keeps for itself
    kv_bytes                           what is left for KV blocks; negative when the model does not fit
    kv_bytes_per_token                 of one cached token on one rank of that stage
    kv_blocks                          blocks one scheduler can hand out
    """

    weights_bytes: float
    activations_bytes: float
    engine_bytes: float
    kv_bytes: float
    kv_bytes_per_token: float
    kv_blocks: int


def kv_bytes_per_rank(layers: Sequence[Layer], tp: int, precision: Precision) -> float:
    """Bytes of one cached token in the given layers on one tensor-parallel rank; MLA latents are kept by every rank."""
    total = 0.0
    for layer in layers:
        attention = layer.attention
        if attention.latent is not None:
            total += attention.latent.kv_rank + attention.latent.rope_dim
        else:
            total += kv_heads_per_rank(attention, tp) * (attention.head_dim + attention.value_dim)
    return total * DTYPE_BYTES[precision.kv]


def _attention_share(attention: Attention, hidden: int, tp: int) -> float:
    """Attention parameters on one rank: heads divided, KV heads copied if fewer than ranks, latents kept whole."""
    total = attention_parameters(attention, hidden)
    if attention.latent is not None:
        latent = attention.latent
        whole = hidden * ((latent.q_rank or 0) + latent.kv_rank + latent.rope_dim)
        return whole + (total - whole) / tp
    kv = attention.kv_heads * (attention.head_dim + attention.value_dim) * hidden
    copied = kv_heads_per_rank(attention, tp) / attention.kv_heads
    return (total - kv) / tp + kv * copied


def _feed_forward_bytes(ff: FeedForward, hidden: int, mapping: Mapping, precision: Precision) -> float:
    """Feed-forward weights on one rank: expert slots over ep x expert_tp, routers whole, the rest over tp."""
    total, others = feed_forward_parameters(ff, hidden), weight_bytes(precision.weights)
    if not ff.experts:
        return total / mapping.tp * others
    routed = ff.experts * feed_forward_parameters(FeedForward(ff.intermediate, ff.gated, ff.bias), hidden)
    router = ff.experts * hidden
    slots = routed * (ff.experts + mapping.redundant_experts) / ff.experts
    experts = slots / (mapping.ep * mapping.expert_tp) * weight_bytes(precision.of_experts.weights)
    return experts + (router + (total - routed - router) / mapping.tp) * others


def stage_weight_bytes(
    model: ModelShape, layers: Sequence[Layer], mapping: Mapping, precision: Precision, *, first: bool, last: bool
) -> float:
    """Bytes of the weights one rank of a stage keeps; embedding and head stay in 16 bit."""
    each = weight_bytes(precision.weights)
    total = each * model.other_parameters if last else 0.0
    for layer, count in Counter(layers).items():
        attention = _attention_share(layer.attention, model.hidden, mapping.tp) + layer.norm_parameters
        total += count * (each * attention + _feed_forward_bytes(layer.feed_forward, model.hidden, mapping, precision))
    table = model.hidden * model.vocab / mapping.tp * max(2.0, each)
    tables = int(first) + int(last) - int(first and last and model.tied_embeddings)
    return total + tables * table


def activation_elements(model: ModelShape, mapping: Mapping) -> float:
    """Peak elements of a step's tensors on one rank per token it has: residual, normed input, widest projection."""
    widest = 0.0
    for layer in set(model.layers):
        a, ff = layer.attention, layer.feed_forward
        qkv = (a.heads + 2 * a.kv_heads) * a.head_dim / mapping.tp
        up = 3 * ff.intermediate / mapping.tp
        if ff.experts:
            # Ranks that share an expert keep whole rows of its input, and their part of the rows inside it.
            rows = mapping.token_groups * ff.top_k / mapping.ep
            routed = rows * (model.hidden + 3 * ff.intermediate / mapping.expert_tp)
            up = routed + 3 * ff.shared_intermediate / mapping.tp
        widest = max(widest, qkv, up)
    return 4 * model.hidden + widest


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a replica's memory is made of, whatever its scheduler.

    stages   bytes of the weights and of one cached token, on one rank of every pipeline stage
    activation_bytes_per_token, logits_bytes_per_sequence   of a step, on one rank
    context_bytes_per_token   that attention over several ranks keeps of others' tokens for each of a context, in the
                              layer that needs most
    """

    stages: tuple[tuple[float, float], ...]
    activation_bytes_per_token: float
    logits_bytes_per_sequence: float
    pp: int
    context_bytes_per_token: float = 0.0


def replica_sizes(model: ModelShape, mapping: Mapping, precision: Precision) -> Sizes:
    """Sizes of a replica; logits are in fp32."""
    stages = [
        (
            stage_weight_bytes(model, layers, mapping, precision, first=stage == 0, last=stage == mapping.pp - 1),
            cached_bytes_per_rank(layers, mapping, precision),
        )
        for stage, layers in enumerate(stage_layers(model, mapping))
    ]
    fresh, context = (0.0, 0.0) if mapping.cp == 1 else context_buffers(model, mapping, precision)
    return Sizes(
        tuple(stages),
        activation_elements(model, mapping) * wire_bytes(precision) / mapping.cp + fresh,
        model.vocab / mapping.tp * 4.0 / mapping.cp,
        mapping.pp,
        context,
    )


def cached_bytes_per_rank(layers: Sequence[Layer], mapping: Mapping, precision: Precision) -> float:
    """Bytes that one rank keeps of one cached token in the layers, on average where cp ranks share the cache."""
    if mapping.cp == 1:
        return kv_bytes_per_rank(layers, mapping.tp, precision)
    kind, cp, tp = kind_of(mapping), mapping.cp, mapping.tp
    return sum(
        cached_share(kind, layer.attention, cp, tp) * kv_bytes_per_rank([layer], tp, precision) for layer in layers
    )


def context_buffers(model: ModelShape, mapping: Mapping, precision: Precision) -> tuple[float, float]:
    """Bytes of buffers on one rank, in the layers that need most: for every new token of a chunk, and of its context.

    Raises MappingError for degrees that the kind of context parallelism cannot have.
    """
    kind, cp, tp = kind_of(mapping), mapping.cp, mapping.tp
    fresh = context = 0.0
    for attention in {layer.attention for layer in model.layers}:
        require_legal(kind, attention, cp, tp)
        w = widths(attention, cp, tp, precision)
        fresh = max(fresh, float(extra_bytes(kind, w, cp, 1.0, 0.0)))
        if attention.window_tokens is None:  # a window needs little of a long context
            context = max(context, float(extra_bytes(kind, w, cp, 0.0, 1.0)))
    return fresh, context


def plan_memory(
    sizes: Sizes,
    device: Device,
    engine: Engine,
    *,
    token_budget: int,
    max_seqs: int,
    block_tokens: int,
    max_context_tokens: int = 0,
) -> Memory:
    """Memory of the stage that leaves least room for KV; kv_blocks is 0 or below when the model does not fit.

    With pipeline stages every scheduler gets an equal share of the blocks. Ranks that share a sequence's tokens attend
    to one sequence at a time, the longest of `max_context_tokens`.
    """
    activations = token_budget * sizes.activation_bytes_per_token + max_seqs * sizes.logits_bytes_per_sequence
    activations += max_context_tokens * sizes.context_bytes_per_token
    usable = device.memory_bytes * engine.memory_fraction - engine.reserve_bytes - activations

    def blocks(stage: tuple[float, float]) -> int:
        return int((usable - stage[0]) // (stage[1] * block_tokens)) // sizes.pp

    weights, per_token = min(sizes.stages, key=blocks)
    return Memory(weights, activations, engine.reserve_bytes, usable - weights, per_token, blocks((weights, per_token)))


def require_fit(
    memory: Memory, model: ModelShape, mapping: Mapping, device: Device, tokens: int, block_tokens: int
) -> None:
    """Raise OutOfMemoryError unless a sequence of `tokens` tokens fits beside the weights."""
    needed = ceil(tokens / block_tokens)
    if memory.kv_blocks < needed:
        missing = (needed * mapping.pp * block_tokens * memory.kv_bytes_per_token - memory.kv_bytes) / GIB
        raise OutOfMemoryError(
            f"{model.name} on {mapping.gpus} x {device.name} (tp={mapping.tp} pp={mapping.pp}): {missing:.1f} GiB "
            f"per device short of weights, activations and one sequence of {tokens} tokens; expected more "
            f"devices per replica, narrower weights or a shorter context"
        )
