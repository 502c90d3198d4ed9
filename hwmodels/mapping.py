"""How one replica of a model is cut over devices, and in which number formats it is kept."""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes of one element of what kernels compute with and caches hold; the 4-bit formats exclude their group scales.
DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5, "fp4": 0.5}

#: (bytes of one stored weight with its share of the scales, format its products are computed in) by weight format:
#: fp8 is scaled per tensor or channel, fp8_block per 128 x 128 block; int4 is AWQ/GPTQ (one fp16 scale and zero point
#: per 128); fp4 is NVFP4 (one fp8 scale per 16) with fp4 activations; mxfp4 has one 8-bit scale per 32. Where the
#: second is None, products are computed in the format of the activations.
WEIGHT_FORMATS: dict[str, tuple[float, str | None]] = {
    "fp32": (4.0, "fp32"),
    "bf16": (2.0, "bf16"),
    "fp16": (2.0, "fp16"),
    "fp8": (1.0, "fp8"),
    "fp8_block": (1.0 + 4 / 128**2, "fp8"),
    "int8": (1.0, "int8"),
    "int4": (0.5 + 2.5 / 128, None),
    "int4_fp8": (0.5 + 2.5 / 128, "fp8"),
    "fp4": (0.5 + 1.0 / 16, "fp4"),
    "mxfp4": (0.5 + 1.0 / 32, None),
    "mxfp4_fp8": (0.5 + 1.0 / 32, "fp8"),
}


def weight_bytes(dtype: str) -> float:
    """Bytes of one stored weight, its share of the scales included."""
    return WEIGHT_FORMATS[dtype][0]


@dataclass(frozen=True, slots=True)
class Precision:
    """Number formats of one replica.

    weights, experts   of the stored weights (see WEIGHT_FORMATS), the routed experts' apart; None: as the others
    activations        the arithmetic of the GEMMs
    kv                 the KV cache
    """

    weights: str = "bf16"
    activations: str = "bf16"
    kv: str = "bf16"
    experts: str | None = None

    @property
    def of_experts(self) -> Precision:
        """The formats inside the routed experts: the arithmetic follows from the weights where these are apart."""
        if self.experts is None:
            return self
        arithmetic = WEIGHT_FORMATS[self.experts][1] or ("bf16" if self.activations == "fp4" else self.activations)
        return Precision(self.experts, arithmetic, self.kv)


@dataclass(frozen=True, slots=True)
class Mapping:
    """How one replica is cut.

    tp             tensor-parallel ranks that share each attention block (and, without ep, each feed-forward block)
    pp             pipeline stages
    attention_dp   groups of tp ranks that each run attention for their own requests and meet in the expert blocks
    ep             expert-parallel ranks; ep * expert_tp == tp * cp * attention_dp for a mixture of experts
    expert_tp      tensor-parallel ranks that share each expert
    stages         layers of each pipeline stage; None for the most even split
    redundant_experts   expert slots of a layer beyond one for each expert, over all ep ranks (the engines'
                   --ep-num-redundant-experts): copies that share an expert's tokens. Expert data parallelism of degree
                   d is (d - 1) x experts of them: every expert d times among the same ranks
    expert_map     name of what says which expert is in which slot; None: in order, slot j has expert j mod experts.
                   Slots are numbered rank by rank
    cp             context-parallel ranks, each of tp ranks, that the tokens of a sequence lie on: they share its
                   projections, attention and cache; each has all weights but those of experts, in which they meet as
                   attention groups do
    cp_kind        how they attend to one another's tokens: ring, tokenring, ulysses or all-gather, see
                   hwmodels.contextkinds; but for ulysses the cache lies by tokens, and decoding merges partial outputs

    Ranks are numbered tensor-parallel innermost, then cp, then attention_dp, then pp, then replicas.
    """

    tp: int = 1
    pp: int = 1
    attention_dp: int = 1
    ep: int = 1
    expert_tp: int = 1
    stages: tuple[int, ...] | None = None
    redundant_experts: int = 0
    expert_map: str | None = None
    cp: int = 1
    cp_kind: str = "ring"

    @property
    def gpus(self) -> int:
        """Devices of one replica."""
        return self.tp * self.cp * self.attention_dp * self.pp

    @property
    def token_groups(self) -> int:
        """Groups of tp ranks that bring tokens of their own to the experts of a stage."""
        return self.cp * self.attention_dp
