"""How one replica of a model is cut over devices, and in which number formats it is kept."""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes of one element; the 4-bit formats exclude their group scales (see weight_bytes).
DTYPE_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5, "fp4": 0.5}

#: Bytes of scales per 4-bit weight: AWQ/GPTQ int4 one fp16 scale and zero point per 128; NVFP4 one fp8 scale per 16.
SCALE_BYTES = {"int4": 2.5 / 128, "fp4": 1.0 / 16}


def weight_bytes(dtype: str) -> float:
    """Bytes of one stored weight, its share of the group scales included."""
    return DTYPE_BYTES[dtype] + SCALE_BYTES.get(dtype, 0.0)


@dataclass(frozen=True, slots=True)
class Precision:
    """Number formats of weights, activations (the arithmetic of the GEMMs) and KV cache."""

    weights: str = "bf16"
    activations: str = "bf16"
    kv: str = "bf16"


@dataclass(frozen=True, slots=True)
class Mapping:
    """How one replica is cut.

    tp             tensor-parallel ranks that share each attention block (and, without ep, each feed-forward block)
    pp             pipeline stages
    attention_dp   groups of tp ranks that each run attention for their own requests and meet in the expert blocks
    ep             expert-parallel ranks; ep * expert_tp == tp * attention_dp for a mixture of experts
    expert_tp      tensor-parallel ranks that share each expert
    stages         layers of each pipeline stage; None for the most even split

    Ranks are numbered tensor-parallel innermost, then attention_dp, then pp, then replicas.
    """

    tp: int = 1
    pp: int = 1
    attention_dp: int = 1
    ep: int = 1
    expert_tp: int = 1
    stages: tuple[int, ...] | None = None

    @property
    def gpus(self) -> int:
        """Devices of one replica."""
        return self.tp * self.attention_dp * self.pp
