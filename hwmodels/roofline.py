"""The analytic cost model: a roofline whose efficiency is a curve over size, fitted to real kernels where it could be.

Kernels of a calibrated format follow hwmodels.kernelforms with the device's coefficients; others the estimates below.
"""

from __future__ import annotations

from collections.abc import Mapping as TypingMapping
from dataclasses import replace
from functools import lru_cache

import numpy as np

from hwmodels import kernelforms
from hwmodels.collectives import Collective, compile_collective
from hwmodels.contextattention import ContextTimes, Prices, context_sources, context_times, groups_of
from hwmodels.dispatch import Phases, Routed, exchange_s
from hwmodels.efficiency import DecodeCoefficients, ExpertCoefficients, GemmCoefficients, PrefillCoefficients
from hwmodels.hardware import Cluster, Device
from hwmodels.mapping import DTYPE_BYTES, WEIGHT_FORMATS, Mapping, Precision, weight_bytes
from hwmodels.operators import (
    Array,
    AttentionCore,
    Communication,
    ContextAttention,
    Elementwise,
    ExpertExchange,
    Experts,
    Gemm,
    GroupedGemm,
    Operator,
    wire_bytes,
)

#: Tile menu relative to the device's GEMM tile: (rows, columns, share of the full tile's rate). A library picks the
#: fastest; smaller tiles reuse less data per byte loaded into the multiprocessor. Estimated from the ratio of
#: arithmetic to shared-memory traffic of the tiles.
TILES = ((1.0, 1.0, 1.0), (0.5, 1.0, 0.85), (0.5, 0.5, 0.7), (0.125, 0.5, 0.25))
#: Splits of the inner dimension, which fill the device when there are few output tiles, and their share of the rate.
SPLITS = ((1, 1.0), (2, 0.92), (4, 0.85), (8, 0.75))
#: Share of the GEMM rate left when narrow weights are widened to the activations' format inside the kernel.
DEQUANTIZE = 0.9
#: Coefficients that say how fast kernels compute and how fast they move bytes; the others say what starting takes.
ARITHMETIC, TRAFFIC = ("mfu", "feed_bytes_per_s", "softmax_per_s"), ("mbu", "cast_mbu", "activation_mbu")


def memory_time_s(nbytes: Array | float, device: Device) -> Array:
    """Time to move `nbytes`, in seconds: a kernel of `memory_half_bytes` reaches half of the asymptotic bandwidth.

    bandwidth(x) = mbu * peak * x / (x + half), so the time is affine in x.
    """
    e = device.efficiency
    size = np.asarray(nbytes, dtype=float)
    moved: Array = np.where(size > 0, (size + e.memory_half_bytes) / (e.memory_mbu * device.memory_bytes_per_s), 0.0)
    return moved


def arithmetic_dtype(precision: Precision, device: Device) -> str:
    """The format the multiply units work in; the 16-bit formats stand in for each other."""
    if precision.activations in device.peak_flops_per_s:
        return precision.activations
    return attention_dtype(precision, device)


def tile_time_s(m: Array, n: float, k: float, products: Array | float, device: Device, precision: Precision) -> Array:
    """Time of `products` GEMMs m x n x k limited by the multiply units, in seconds, by the best tile of the menu.

    Output tiles run in waves over the compute units; a wave that is not full takes as long as a full one.
    """
    e = device.efficiency
    rate = device.peak_flops_per_s[arithmetic_dtype(precision, device)] * e.gemm_mfu / device.compute_units
    if weight_bytes(precision.weights) < DTYPE_BYTES[precision.activations]:
        rate *= DEQUANTIZE
    rows, columns = e.gemm_tile
    best: Array = np.full(np.shape(m), np.inf)
    for height, width, share in TILES:
        tile_m, tile_n = rows * height, columns * width
        tiles = np.ceil(m / tile_m) * np.ceil(n / tile_n) * products
        for split, kept in SPLITS:
            waves = np.ceil(tiles * split / device.compute_units)
            best = np.minimum(best, waves * (2 * tile_m * tile_n * k / split) / (rate * share * kept))
    return best


class AnalyticCost:
    """Prices operators by roofline; collectives by the cluster graph. One per (cluster, mapping)."""

    def __init__(self, cluster: Cluster, mapping: Mapping) -> None:
        self.cluster = cluster
        self.device = cluster.device
        self.groups = rank_groups(mapping)
        self.context_groups = groups_of(mapping) if mapping.cp > 1 else ()

    def time_s(self, op: Operator) -> Array:
        """Seconds all launches of `op` take, one value per batch size it stands for."""
        if isinstance(op, Communication):
            return op.count * self.collective(op.kind, op.group).time_s(op.bytes)
        if isinstance(op, ExpertExchange):
            phases = self.exchange(op)
            return op.count * (phases.dispatch_s if op.phase == "dispatch" else phases.combine_s)
        if isinstance(op, ContextAttention):
            return op.count * self.context(op).total_s
        return op.count * self.kernel_time_s(op)

    def sources(self, op: Operator) -> dict[str, float]:
        """The same seconds, summed, by what they rest on."""
        if isinstance(op, ContextAttention):
            return context_sources(self.cluster, self.context_groups, op, self)
        return {"calibrated" if self.calibrated(op) else "analytic": float(np.sum(self.time_s(op)))}

    def calibrated(self, op: Operator) -> bool:
        """Whether the price rests on coefficients fitted to kernels of its family and formats."""
        if isinstance(op, (Communication, ExpertExchange, Elementwise, GroupedGemm, ContextAttention)):
            return False
        fitted, key = _fitted_for(op, self.device)
        return bool(key) and key[0] in fitted

    def collective(self, kind: str, group: str) -> Collective:
        """The collective `kind` over the rank group called `group`."""
        return compiled(self.cluster, kind, self.groups[group])

    def exchange(self, op: ExpertExchange) -> Phases:
        """Both phases of the exchange of which `op` is one, once."""
        routed = Routed(op.hidden, op.top_k, op.experts, *op.formats, op.max_nodes)
        return exchange_s(self.cluster, self.groups["ep"], op.tokens, routed, layers=op.shares)

    def context(self, op: ContextAttention, prices: Prices | None = None) -> ContextTimes:
        """One launch of attention over several ranks, its kernels priced by `prices`; None: by this model."""
        return context_times(self.cluster, self.context_groups, op, (prices or self).time_s)

    def fitted_parts_s(self, op: Operator) -> dict[str, float] | None:
        """Seconds of one launch that 'compute', 'memory' and 'launch' would each take alone.

        None where no coefficients were fitted. Compute and memory overlap, the launch does not.
        """
        if isinstance(op, (Communication, ExpertExchange, Elementwise, GroupedGemm, ContextAttention)):
            return None
        fitted = _coefficients(op, self.device)
        if fitted is None:
            return None

        def without_s(rates: tuple[str, ...]) -> float:
            instant: dict[str, float] = {name: np.inf for name in rates if hasattr(fitted, name)}
            c: Coefficients = replace(fitted, **instant)  # type: ignore[arg-type]
            return float(np.sum(_fitted_time_s(op, c, self.device)))

        launch_s = without_s(ARITHMETIC + TRAFFIC)
        return {
            "compute": without_s(TRAFFIC) - launch_s,
            "memory": without_s(ARITHMETIC) - launch_s,
            "launch": launch_s,
        }

    def kernel_time_s(self, op: Gemm | GroupedGemm | AttentionCore | Elementwise | Experts) -> Array:
        """Seconds of one launch; zero where there is nothing to do."""
        if not isinstance(op, (Elementwise, GroupedGemm)):
            fitted = _coefficients(op, self.device)
            if fitted is not None:
                return np.where(op.bytes > 0, _fitted_time_s(op, fitted, self.device), 0.0)
        if isinstance(op, Experts):
            parts: Array = sum((self.kernel_time_s(part) for part in op.parts), np.zeros_like(op.rows))
            return parts
        device = self.device
        moved = memory_time_s(op.bytes, device)
        launch = device.kernel_launch_s
        busy: Array
        if isinstance(op, Elementwise):
            busy = moved + (op.kernels - 1) * launch
        elif isinstance(op, Gemm):
            busy = np.maximum(moved, tile_time_s(op.m, op.n, op.k, op.groups, device, op.precision))
        elif isinstance(op, GroupedGemm):
            products = np.maximum(op.active, 1)
            busy = np.maximum(moved, tile_time_s(op.m / products, op.n, op.k, products, device, op.precision))
        else:
            peak = device.peak_flops_per_s[attention_dtype(op.precision, device)]
            busy = np.maximum(moved, op.flops / (peak * device.efficiency.attention_mfu))
        worked = (op.bytes > 0) & (busy > 0)
        return np.where(worked, busy + launch, 0.0)


def attention_dtype(precision: Precision, device: Device) -> str:
    """Attention multiplies in 16 bit whatever the projections use, in 32 bit where the device has nothing narrower."""
    if precision.activations == "fp32":
        return "fp32"
    return next(dtype for dtype in ("bf16", "fp16", "fp32") if dtype in device.peak_flops_per_s)


def product_format(precision: Precision) -> str | None:
    """The name of a product of these formats in tables and coefficients; None where engines have no such kernel."""
    arithmetic = WEIGHT_FORMATS[precision.weights][1] or "bf16"
    sixteen = {"bf16", "fp16"}
    if arithmetic in sixteen and precision.activations in sixteen:
        return precision.weights if precision.weights not in sixteen else "bf16"
    return precision.weights if arithmetic == precision.activations else None


def attention_format(precision: Precision) -> str:
    """The arithmetic of attention: 8 bit where the cache is and the products are no wider, 16 bit otherwise."""
    return "fp8" if precision.kv == "fp8" and precision.activations in {"fp8", "fp4"} else "bf16"


def attention_formats(op: AttentionCore) -> str:
    """Key of the coefficients; decode, which waits for the cache, has one set for both kinds of arithmetic."""
    arithmetic = attention_format(op.precision) if op.phase == "prefill" else "bf16"
    cache = "bf16" if op.precision.kv == "fp16" else op.precision.kv
    return f"{arithmetic}/{cache}" + ("" if op.window_tokens is None else "/window")


Coefficients = GemmCoefficients | ExpertCoefficients | PrefillCoefficients | DecodeCoefficients


def _coefficients(op: Gemm | Experts | AttentionCore, device: Device) -> Coefficients | None:
    """What was fitted to kernels like `op`, or to the most similar ones; None where none were."""
    fitted, keys = _fitted_for(op, device)
    return next((fitted[key] for key in keys if key in fitted), None)


def _fitted_for(
    op: Gemm | Experts | AttentionCore, device: Device
) -> tuple[TypingMapping[str, Coefficients], tuple[str, ...]]:
    """(coefficients of its family, keys under which those of its formats and of ever less similar ones are kept)."""
    kernels = device.efficiency.kernels
    if isinstance(op, AttentionCore):
        formats = attention_formats(op)
        wide = formats.replace("fp8/", "bf16/", 1) if formats.startswith("fp8/") else formats
        keys = tuple(dict.fromkeys((formats, wide, formats.removesuffix("/window"), wide.removesuffix("/window"))))
        if op.phase == "prefill":
            return (kernels.attention_prefill if op.qk_dim == op.value_dim else kernels.mla_prefill), keys
        return (kernels.mla_decode if op.shared else kernels.attention_decode), keys
    found = product_format(op.precision)
    return (kernels.moe if isinstance(op, Experts) else kernels.gemm), (found,) if found is not None else ()


def _fitted_time_s(op: Gemm | Experts | AttentionCore, c: Coefficients, device: Device) -> Array:
    """Seconds of one launch by the equation of its kind."""
    p = op.precision
    if isinstance(op, Gemm) and isinstance(c, GemmCoefficients):
        return kernelforms.gemm_time_s(
            c, op.m, op.n, op.k, op.groups, device, device.peak_flops_per_s[arithmetic_dtype(p, device)],
            DTYPE_BYTES[p.activations], weight_bytes(p.weights), wire_bytes(p),
        )  # fmt: skip
    if isinstance(op, Experts) and isinstance(c, ExpertCoefficients):
        return kernelforms.experts_time_s(
            c, op.rows, op.active, (op.experts + op.redundant) / op.ep, op.hidden, np.ceil(op.intermediate / op.tp),
            2 + op.gated, device, device.peak_flops_per_s[arithmetic_dtype(p, device)], weight_bytes(p.weights),
        )  # fmt: skip
    assert isinstance(op, AttentionCore)
    kv_bytes = DTYPE_BYTES[p.kv]
    if isinstance(c, PrefillCoefficients):
        formats = attention_formats(op)
        kind = "fp8" if formats.startswith("fp8") and "fp8" in device.peak_flops_per_s else attention_dtype(p, device)
        return kernelforms.prefill_time_s(
            c, 1.0, op.queries, op.read, op.pairs, op.heads, op.kv_heads, op.qk_dim, op.value_dim, device,
            device.peak_flops_per_s[kind], kv_bytes,
        )  # fmt: skip
    assert isinstance(c, DecodeCoefficients)
    return kernelforms.decode_time_s(
        c, op.queries, op.read / np.maximum(op.queries, 1.0), op.heads, op.kv_heads, op.qk_dim, op.value_dim,
        op.qk_dim if op.shared else op.qk_dim + op.value_dim, device,
        device.peak_flops_per_s[attention_dtype(p, device)], kv_bytes,
    )  # fmt: skip


def rank_groups(mapping: Mapping) -> dict[str, tuple[int, ...]]:
    """Ranks of the first replica's first groups, numbered as Mapping says."""
    stage = mapping.tp * mapping.token_groups
    cp = {"cp": groups_of(mapping)[0]} if mapping.cp > 1 else {}
    return cp | {
        "tp": tuple(range(mapping.tp)),
        "ep": tuple(range(0, stage, mapping.expert_tp)),
        "expert_tp": tuple(range(mapping.expert_tp)),
        "pp": (0, stage) if mapping.pp > 1 else (0,),
    }


@lru_cache(maxsize=4096)
def compiled(cluster: Cluster, kind: str, ranks: tuple[int, ...]) -> Collective:
    """compile_collective, once per cluster and group."""
    return compile_collective(cluster, kind, ranks)
