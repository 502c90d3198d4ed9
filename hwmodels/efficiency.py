"""What do kernels reach of a device's peaks? The coefficients of the analytic cost model, estimated or fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class GemmCoefficients:
    """Of matrix products in one weight format; the equation is hwmodels.kernelforms.gemm_time_s.

    start_s            a launch with nothing to do
    mfu                fraction of peak FLOP/s of large products, in (0, 1]
    mbu                fraction of peak memory bandwidth of large products, in (0, 1]
    feed_bytes_per_s   operands one compute unit can bring to its multiply units
    wave_s             filling and draining the pipeline of one wave of output tiles
    split_s            adding up the parts of a split inner dimension
    cast_mbu           bandwidth, over the peak, at which activations are narrowed before the product (caches may lift
                       it above 1); only where the arithmetic is narrower than 16 bit
    """

    start_s: float
    mfu: float
    mbu: float
    feed_bytes_per_s: float
    wave_s: float
    split_s: float
    cast_mbu: float = 1.0


@dataclass(frozen=True, slots=True)
class PrefillCoefficients:
    """Of causal attention over whole prompts or chunks; the equation is hwmodels.kernelforms.prefill_time_s.

    start_s          a launch with nothing to do
    mfu              fraction of peak FLOP/s of the two products, in (0, 1]
    mbu              fraction of peak memory bandwidth for queries, keys, values and results, in (0, 1]
    softmax_per_s    query-key pairs the whole device can exponentiate
    masked_tokens    keys beyond the causal diagonal that every query is multiplied with in vain
    block_s          setting up one block of query rows of one head on one compute unit
    """

    start_s: float
    mfu: float
    mbu: float
    softmax_per_s: float
    masked_tokens: float
    block_s: float


@dataclass(frozen=True, slots=True)
class DecodeCoefficients:
    """Of attention of single new tokens over a cache; the equation is hwmodels.kernelforms.decode_time_s.

    start_s   a launch with nothing to do
    mbu       fraction of peak memory bandwidth at which the cache is read, in (0, 1]
    mfu       fraction of peak FLOP/s of the products, rows of one KV head padded to a tile, in (0, 1]
    head_s    setting up one narrow KV head of one sequence on one compute unit; twice that for heads of 256
    chain_s   one level of the merge of the parts a long context is split into
    """

    start_s: float
    mbu: float
    mfu: float
    head_s: float
    chain_s: float


@dataclass(frozen=True, slots=True)
class ExpertCoefficients:
    """Of fused expert blocks in one weight format; the equation is hwmodels.kernelforms.experts_time_s.

    start_s         all launches with nothing to do
    mfu             fraction of peak FLOP/s of large products, in (0, 1]
    mbu             fraction of peak memory bandwidth at which the touched experts' weights are read, in (0, 1]
    padding_rows    rows every touched expert is multiplied with in vain
    activation_mbu  the same for rows between the kernels (caches may lift it above 1)
    route_s         listing one expert of the rank
    """

    start_s: float
    mfu: float
    mbu: float
    padding_rows: float
    activation_mbu: float
    route_s: float


@dataclass(frozen=True, slots=True)
class KernelCoefficients:
    """Fitted coefficients by number format; empty where a family was not calibrated.

    gemm, moe            by weight format (hwmodels.mapping.WEIGHT_FORMATS)
    attention_*, mla_*   by 'arithmetic/cache', such as 'bf16/fp8'; with a sliding window 'bf16/fp8/window'
    """

    gemm: Mapping[str, GemmCoefficients] = field(default_factory=dict, hash=False)
    attention_prefill: Mapping[str, PrefillCoefficients] = field(default_factory=dict, hash=False)
    attention_decode: Mapping[str, DecodeCoefficients] = field(default_factory=dict, hash=False)
    mla_prefill: Mapping[str, PrefillCoefficients] = field(default_factory=dict, hash=False)
    mla_decode: Mapping[str, DecodeCoefficients] = field(default_factory=dict, hash=False)
    moe: Mapping[str, ExpertCoefficients] = field(default_factory=dict, hash=False)

    def over(self, other: KernelCoefficients) -> KernelCoefficients:
        """These, with those of `other` for the formats they lack."""
        return KernelCoefficients(**{name: {**getattr(other, name), **getattr(self, name)} for name in CALIBRATED})


#: Families with coefficients of their own, and the kind of these.
CALIBRATED: dict[str, type] = {
    "gemm": GemmCoefficients,
    "attention_prefill": PrefillCoefficients,
    "attention_decode": DecodeCoefficients,
    "mla_prefill": PrefillCoefficients,
    "mla_decode": DecodeCoefficients,
    "moe": ExpertCoefficients,
}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What kernels reach of a device's peaks; the roofline's only fitted coefficients.

    gemm_mfu            fraction of peak FLOP/s that large matrix products reach, in (0, 1]
    attention_mfu       the same for prefill attention (softmax between the two products)
    memory_mbu          fraction of peak memory bandwidth that long streams reach, in (0, 1]
    memory_half_bytes   bytes at which a kernel reaches half of that: bandwidth(x) = mbu * peak * x / (x + half)
    gemm_tile           rows and columns of the output tile one compute unit works on at full rate
    kernels             coefficients fitted to kernels of all engines together; they go before the estimates above
    engines             the same fitted to the kernels of one engine, by its name

    The defaults are estimates for a data-centre GPU of NVIDIA's Ampere generation or later: library GEMMs at 0.75,
    attention at 0.55 (FlashAttention-3, arXiv:2407.08608, reports up to 0.75 of H100's peak; prompts being served are
    shorter and uneven), streams at 0.9, a ramp of about one microsecond of bandwidth, tiles of 128 x 128.
    Profile files override them and their `source` says on what ground.
    """

    gemm_mfu: float = 0.75
    attention_mfu: float = 0.55
    memory_mbu: float = 0.9
    memory_half_bytes: float = 3e6
    gemm_tile: tuple[int, int] = (128, 128)
    kernels: KernelCoefficients = KernelCoefficients()
    engines: Mapping[str, KernelCoefficients] = field(default_factory=dict, hash=False)

    def of_engine(self, engine: str | Mapping[str, str]) -> Efficiency:
        """With the kernels of that engine where they were measured apart.

        engine   its name, or names by what they hold for: 'default', families, or formats of one, such as 'gemm fp4'
        """
        names = {"default": engine} if isinstance(engine, str) else dict(engine)
        found: dict[str, dict[str, object]] = {}
        for family in CALIBRATED:
            whose = {
                f: names.get(family, names["default"]) for own in self.engines.values() for f in getattr(own, family)
            }
            whose |= {key.split()[1]: name for key, name in names.items() if key.startswith(f"{family} ")}
            found[family] = {
                f: getattr(self.engines[name], family)[f]
                for f, name in whose.items()
                if name in self.engines and f in getattr(self.engines[name], family)
            }
        if not any(found.values()):
            return self
        return replace(self, kernels=KernelCoefficients(**found).over(self.kernels))  # type: ignore[arg-type]


ESTIMATES = Efficiency()


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the coefficients of one operator family were fitted to, and how well they predict the rest.

    timings               kernels fitted to or predicted
    held_out_median_ape   median of |predicted / measured - 1| over shapes that were not fitted to
    held_out_p90_ape      its 90th percentile
    by_engine             (median of the pooled coefficients, median of the engine's own) on its held-out rows
    left_out              rows not used, by reason
    software, source      what ran the kernels, and where the timings come from
    """

    timings: int
    held_out_median_ape: float
    held_out_p90_ape: float
    by_engine: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    left_out: Mapping[str, int] = field(default_factory=dict, hash=False)
    software: str = ""
    source: str = ""
