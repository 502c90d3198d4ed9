"""What do experts cost that the accelerator has no room for: bytes to load, seconds on either side?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hwmodels import operators as ops
from hwmodels.errors import MappingError, OutOfMemoryError, ProfileError
from hwmodels.hardware import Cluster, Device
from hwmodels.mapping import WEIGHT_FORMATS, Mapping, Precision, weight_bytes
from hwmodels.operators import Array, Experts, Operator
from hwmodels.roofline import AnalyticCost, arithmetic_dtype
from hwmodels.shape import FeedForward, Layer, ModelShape, feed_forward_parameters

#: Weights one thread streams in products of a vector and a matrix, bytes/s: the median of products of one row with
#: bf16 matrices of more than 4 MB in profiles/measured/xeon-1c, which are 6e9 to 12e9.
THREAD_BYTES_PER_S = 10.8e9
#: Of starting a copy between host and device; an estimate.
LINK_LATENCY_S = 20e-6


@dataclass(frozen=True, slots=True)
class Host:
    """The processor and memories beside an accelerator.

    device               its CPU
    threads              that compute experts; 0: it computes none
    thread_bytes_per_s   weights one thread streams from memory
    memory_bytes         for experts; what does not fit is on the SSD alone
    ssd_bytes_per_s      reads from the SSD, None without
    """

    device: Device
    threads: int = 0
    thread_bytes_per_s: float = THREAD_BYTES_PER_S
    memory_bytes: float = float("inf")
    ssd_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        """Raise ProfileError for more threads than cores, and speeds and sizes that cannot be."""
        if not 0 <= self.threads <= self.device.compute_units:
            raise ProfileError(
                f"threads = {self.threads}: expected 0 to the {self.device.compute_units} cores of {self.device.name}"
            )
        if not self.thread_bytes_per_s > 0:
            raise ProfileError(f"thread_bytes_per_s = {self.thread_bytes_per_s}: expected more than 0")
        if not self.memory_bytes >= 0:
            raise ProfileError(f"host memory of {self.memory_bytes} bytes: expected at least 0")
        if self.ssd_bytes_per_s is not None and not self.ssd_bytes_per_s > 0:
            raise ProfileError(f"ssd_bytes_per_s = {self.ssd_bytes_per_s}: expected more than 0")


@dataclass(frozen=True, slots=True)
class ExpertCosts:
    """A model whose experts may lie outside the accelerator's memory, for steps of a given number of tokens.

    layers, experts, top_k   layers with experts, experts of each, experts of a token
    expert_bytes    by level of precision, from the best
    gpu_s, cpu_s    of one expert, by level, then by its tokens from 0; cpu_s is empty where the CPU computes none
    dense_s         of a layer but for its routed experts, on the accelerator, by layer with experts
    once_s          of a step outside these layers: embedding, layers without experts, head, work of the engine
    link_bytes_per_s, link_latency_s   from the host's memory to the accelerator's
    host_bytes      of the host's memory for experts
    ssd_bytes_per_s reads from the SSD into the host's memory; None: the host holds all
    """

    layers: int
    experts: int
    top_k: int
    expert_bytes: tuple[float, ...]
    gpu_s: tuple[tuple[float, ...], ...]
    cpu_s: tuple[tuple[float, ...], ...]
    dense_s: tuple[float, ...]
    once_s: float
    link_bytes_per_s: float
    link_latency_s: float = 0.0
    host_bytes: float = float("inf")
    ssd_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        """Raise MappingError for numbers that do not fit each other."""
        if not 0 < self.top_k <= self.experts or len(self.dense_s) != self.layers:
            raise MappingError(
                f"top_k = {self.top_k} of {self.experts} experts, {len(self.dense_s)} times of {self.layers} layers: "
                "expected top_k in 1 to experts, and one time per layer"
            )
        if not self.expert_bytes or len(self.gpu_s) != len(self.expert_bytes):
            raise MappingError(f"{len(self.gpu_s)} GPU times: expected one for each of {len(self.expert_bytes)} levels")
        if self.cpu_s and len(self.cpu_s) != len(self.expert_bytes):
            raise MappingError(f"{len(self.cpu_s)} CPU times: expected none or one for each level")
        if self.ssd_bytes_per_s is None and self.host_bytes < self.total_bytes:
            raise OutOfMemoryError(
                f"{self.total_bytes / 2**30:.1f} GiB of experts do not fit the host's {self.host_bytes / 2**30:.1f} "
                "GiB: give an SSD's speed, or fewer levels of precision"
            )

    @property
    def total_bytes(self) -> float:
        """All experts at all levels."""
        return self.layers * self.experts * sum(self.expert_bytes)

    def load_s(self, level: int) -> float:
        """Seconds from the host's memory to the accelerator's, alone."""
        return self.link_latency_s + self.expert_bytes[level] / self.link_bytes_per_s


def expert_layers(model: ModelShape) -> tuple[Layer, ...]:
    """The layers with experts; raises MappingError for a model without, or with experts of several shapes."""
    layers = tuple(layer for layer in model.layers if layer.feed_forward.experts)
    if not layers:
        raise MappingError(f"{model.name} has no experts: expected a mixture of experts")
    if len({layer.feed_forward for layer in layers}) > 1:
        raise MappingError(f"{model.name} has experts of several shapes: expected the same in every layer")
    return layers


def expert_parameters(ff: FeedForward, hidden: int) -> int:
    """Weights of one routed expert.

    >>> expert_parameters(FeedForward(14336, experts=8, top_k=2), 4096)  # Mixtral 8x7B: 3 x 4096 x 14336
    176160768
    """
    dense = FeedForward(ff.intermediate, ff.gated, ff.bias)
    return feed_forward_parameters(dense, hidden)


def expert_bytes(model: ModelShape, weights: str) -> float:
    """Bytes of one routed expert in a weight format, its scales included."""
    return expert_parameters(expert_layers(model)[0].feed_forward, model.hidden) * weight_bytes(weights)


def cache_share_that_fits(model: ModelShape, precision: Precision, memory_bytes: float, other_bytes: float) -> float:
    """Largest part of the routed experts, in the precision's format, that fits beside everything else; in [0, 1].

    other_bytes   KV cache, activations, what the engine takes

    Raises OutOfMemoryError where all but the routed experts does not fit.
    """
    layers = expert_layers(model)
    each = expert_parameters(layers[0].feed_forward, model.hidden)
    count = len(layers) * layers[0].feed_forward.experts
    dense_bytes = (model.parameters - count * each) * weight_bytes(precision.weights)
    room = memory_bytes - dense_bytes - other_bytes
    if room < 0:
        raise OutOfMemoryError(
            f"{model.name} without its experts misses {-room / 2**30:.1f} GiB: take a device with more memory, fewer "
            "tokens or a narrower format"
        )
    return min(1.0, room / (count * each * weight_bytes(precision.of_experts.weights)))


def cpu_expert_s(model: ModelShape, weights: str, tokens: Array, host: Host) -> Array:
    """Seconds of one expert for `tokens` tokens on the host's threads: weights streamed once, or arithmetic.

    Threads stream up to what the memory gives to all of them; arithmetic is the threads' part of the cores'.
    """
    device, e = host.device, host.device.efficiency
    parameters = expert_parameters(expert_layers(model)[0].feed_forward, model.hidden)
    stream = min(host.threads * host.thread_bytes_per_s, e.memory_mbu * device.memory_bytes_per_s)
    peak = device.peak_flops_per_s[arithmetic_dtype(Precision(weights, "bf16"), device)]
    rate = peak * e.gemm_mfu * host.threads / device.compute_units
    moved = parameters * weight_bytes(weights) / stream
    busy: Array = np.where(tokens > 0, np.maximum(moved, 2.0 * parameters * tokens / rate) + device.kernel_launch_s, 0)
    return busy


def gpu_expert_s(model: ModelShape, weights: str, tokens: Array, cost: AnalyticCost, tp: int = 1) -> Array:
    """Seconds of one expert for `tokens` tokens on the `tp` accelerators that hold a part of it each."""
    ff = expert_layers(model)[0].feed_forward
    one = np.ones_like(tokens)
    op = Experts(
        "one expert", tokens, tokens, one, model.hidden, ff.intermediate, 1, 1, tp, 1, ff.gated,
        Precision("bf16", "bf16", "bf16", weights).of_experts,
    )  # fmt: skip
    return np.where(tokens > 0, cost.time_s(op), 0.0)


def compile_expert_costs(
    model: ModelShape,
    cluster: Cluster,
    host: Host,
    ladder: Sequence[str],
    *,
    tokens: int = 1,
    context_tokens: int = 1024,
    prefill: bool = False,
    precision: Precision | None = None,
    overhead_s: float = 0.0,
    link_latency_s: float = LINK_LATENCY_S,
) -> ExpertCosts:
    """Costs of steps of a model on one device of a cluster beside a host.

    ladder           weight formats of the experts, from the best
    tokens           of a step: decoding sequences, or a prompt's new tokens if `prefill`
    context_tokens   that each sequence attends to, or that came before the prompt's new ones
    precision        of all but the routed experts
    overhead_s       of the engine per step
    link_latency_s   of starting a copy

    Raises MappingError for models without experts and unknown formats, OutOfMemoryError for experts that fit nowhere.
    """
    layers = expert_layers(model)
    unknown = [name for name in ladder if name not in WEIGHT_FORMATS]
    if unknown or not ladder:
        raise MappingError(f"ladder {list(ladder)}: expected one or more of {', '.join(WEIGHT_FORMATS)}")
    p = precision or Precision()
    cost, ff = AnalyticCost(cluster, Mapping()), layers[0].feed_forward
    grid = np.arange(tokens + 1, dtype=float)
    times = {layer: _dense_s(model, layer, cost, p, tokens, context_tokens, prefill) for layer in set(model.layers)}
    outside: list[Operator] = ops.embedding(model, np.array([float(tokens)]), 1, p)
    outside += ops.language_model_head(model, np.array([1.0 if prefill else float(tokens)]), 1)
    plain_s = sum(times[layer] for layer in model.layers if not layer.feed_forward.experts)
    return ExpertCosts(
        layers=len(layers),
        experts=ff.experts,
        top_k=ff.top_k,
        expert_bytes=tuple(expert_bytes(model, name) for name in ladder),
        gpu_s=tuple(tuple(gpu_expert_s(model, name, grid, cost).tolist()) for name in ladder),
        cpu_s=tuple(tuple(cpu_expert_s(model, name, grid, host).tolist()) for name in ladder) if host.threads else (),
        dense_s=tuple(times[layer] for layer in layers),
        once_s=overhead_s + plain_s + sum(float(cost.time_s(op).sum()) for op in outside),
        link_bytes_per_s=cluster.host_bytes_per_s,
        link_latency_s=link_latency_s,
        host_bytes=host.memory_bytes,
        ssd_bytes_per_s=host.ssd_bytes_per_s,
    )


def _dense_s(
    model: ModelShape, layer: Layer, cost: AnalyticCost, p: Precision, tokens: int, context: int, prefill: bool
) -> float:
    """Seconds of a layer but for its routed experts."""
    new = np.array([float(tokens)])
    found = ops.attention_linear(model, layer.attention, new, Mapping(), p, 1)
    if prefill:
        found += ops.prefill_attention(layer.attention, new, np.array([float(context)]), 1, p, 1)
    else:
        found += ops.decode_attention(layer.attention, new, new * context, 1, p, 1)
    if layer.feed_forward.experts:
        found += ops.expert_feed_forward(model, layer.feed_forward, new, new, Mapping(), p, 1)
    else:
        found += ops.dense_feed_forward(model, layer.feed_forward, new, 1, p, 1)
    return sum(float(cost.time_s(op).sum()) for op in found if not isinstance(op, Experts))


def touched_share(share: float, tokens: int, correlation: float = 0.0) -> float:
    """Part of a layer's experts that at least one of consecutive tokens touches.

    share         that one token touches, in [0, 1]
    correlation   of an expert's use by one token with that by the next, in [0, 1): a chain of two states
    1 - touched_share is BlockFFN's chunk-level sparsity CLS (arXiv:2507.08771).

    >>> touched_share(0.5, 2)  # of two independent tokens
    0.75
    """
    if not (0 <= share <= 1 and tokens >= 1 and 0 <= correlation < 1):
        raise MappingError(
            f"share = {share}, tokens = {tokens}, correlation = {correlation}: expected a share in [0, 1], 1 or more "
            "tokens and a correlation in [0, 1)"
        )
    joins = share * (1 - correlation)
    return float(1 - (1 - share) * (1 - joins) ** (tokens - 1))


def chunk_weight_bytes(total_bytes: float, chunk_sparsity: float) -> float:
    """Bytes of weights a step reads that verifies a chunk of tokens: (1 - CLS) W (BlockFFN, arXiv:2507.08771)."""
    if not 0 <= chunk_sparsity <= 1:
        raise MappingError(f"chunk-level sparsity {chunk_sparsity}: expected a share in [0, 1]")
    return (1 - chunk_sparsity) * total_bytes
