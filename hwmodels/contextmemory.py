"""How much memory does a long prompt take on each rank, and how many context-parallel ranks does it need at least?"""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.contextkinds import Kind, cached_share, extra_bytes, require_legal, widths
from hwmodels.engine import Engine
from hwmodels.errors import MappingError, OutOfMemoryError
from hwmodels.hardware import Device
from hwmodels.mapping import Mapping, Precision
from hwmodels.memory import GIB, kv_bytes_per_rank, replica_sizes
from hwmodels.shape import ModelShape
from hwmodels.step_model import stage_layers


@dataclass(frozen=True, slots=True)
class ContextMemory:
    """Bytes on one rank of the fullest pipeline stage, for one sequence of `tokens` tokens.

    kv_bytes            its share of the cache
    activations_bytes   of a chunk's tensors, new / cp tokens
    buffers_bytes       of context parallelism, in the layer that needs most
    """

    tokens: int
    weights_bytes: float
    kv_bytes: float
    activations_bytes: float
    buffers_bytes: float

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.activations_bytes + self.buffers_bytes


def context_memory(
    model: ModelShape, mapping: Mapping, cp: int, kind: Kind, tokens: int, chunk: int, precision: Precision
) -> ContextMemory:
    """Memory of a prompt of `tokens` tokens that comes in chunks of `chunk` tokens; weights are whole on all cp ranks.

    mapping   tp and pp of one of the cp groups

    Raises MappingError for degrees that the kind cannot have, and less than one token.
    """
    if tokens < 1 or not 1 <= chunk <= tokens:
        raise MappingError(f"chunks of {chunk} of {tokens} tokens: expected at least 1 token, and no larger chunk")
    sizes = replica_sizes(model, mapping, precision)
    buffers = 0.0
    for attention in {layer.attention for layer in model.layers}:
        require_legal(kind, attention, cp, mapping.tp)
        w = widths(attention, cp, mapping.tp, precision)
        buffers = max(buffers, float(extra_bytes(kind, w, cp, float(chunk), float(tokens - chunk))))
    kv = [
        sum(
            cached_share(kind, layer.attention, cp, mapping.tp) * kv_bytes_per_rank([layer], mapping.tp, precision)
            * min(tokens, layer.attention.window_tokens or tokens)
            for layer in layers
        )
        for layers in stage_layers(model, mapping)
    ]  # fmt: skip
    stages = [(weights, held) for (weights, _), held in zip(sizes.stages, kv, strict=True)]
    weights, held = max(stages, key=sum)
    return ContextMemory(tokens, weights, held, chunk / cp * sizes.activation_bytes_per_token, buffers)


def smallest_cp(
    model: ModelShape,
    mapping: Mapping,
    kind: Kind,
    tokens: int,
    chunk: int,
    precision: Precision,
    device: Device,
    engine: Engine,
    *,
    most: int = 1024,
) -> int:
    """The least power of two of context-parallel ranks on whose devices one prompt fits.

    Raises OutOfMemoryError when none up to `most` will do, and MappingError when `kind` cannot go as far.
    """
    usable = device.memory_bytes * engine.memory_fraction - engine.reserve_bytes
    cp, least = 1, float("inf")
    while cp <= most:
        needed = context_memory(model, mapping, cp, kind, tokens, chunk, precision).total_bytes
        if needed <= usable:
            return cp
        least = min(least, needed)
        cp *= 2
    raise OutOfMemoryError(
        f"{model.name} with {tokens} tokens on {device.name} (tp={mapping.tp} pp={mapping.pp}): "
        f"{(least - usable) / GIB:.1f} GiB per device short at every {kind} degree up to {most}; expected more "
        "tensor or pipeline parallelism, narrower formats or smaller chunks"
    )
