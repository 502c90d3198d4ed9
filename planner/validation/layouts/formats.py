"""In which number formats a published checkpoint is kept, where a row names only one."""

from __future__ import annotations

from dataclasses import dataclass

from planner.validation.layouts.names import Model, System
from planner.validation.layouts.rows import Unmappable


@dataclass(frozen=True, slots=True)
class Formats:
    """As in planner.plan.Pool: dense weights, arithmetic, and the routed experts' weights where they differ."""

    weights: str
    activations: str
    experts: str | None = None


#: Families whose published FP8 checkpoints are scaled per 128 x 128 block (`weight_block_size` in their config.json).
BLOCK_SCALED = frozenset({"deepseek", "minimax", "qwen3-moe"})


def formats_of(model: Model, precision: str, system: System, gemm: str = "") -> Formats:
    """Formats of a model's checkpoint, by its published precision.

    gemm   format the row names for dense products, "" where it does not

    fp8     block-scaled for the families above and where the row says so, per tensor or channel otherwise
            (NVIDIA's Llama and Qwen checkpoints).
    fp4     NVFP4, except that
            gpt-oss is MXFP4 in the experts and 16 bits elsewhere (its model card); its activations in the experts are
            16 bits on Hopper (Marlin and Triton kernels) and 8 bits on Blackwell (MXFP8: InferenceX sets
            VLLM_USE_FLASHINFER_MOE_MXFP4_MXFP8 for vLLM, the TRTLLM kernels of TensorRT-LLM use it by themselves);
            DeepSeek's is NVIDIA's FP4-v2 checkpoint (InferenceX: nvidia/DeepSeek-R1-0528-FP4-V2), which keeps the
            query and KV projections in 16 bits and has the output projection, shared experts and dense blocks in
            NVFP4. One format for both stands in, fp8: of a layer's 231 M dense weights 70 M are 16-bit and 161 M are
            4-bit, 230 MB against 231 MB in fp8, and the arithmetic takes 0.95 of fp8's time;
            Kimi-K2.5 and MiniMax-M2.5 (NVIDIA's checkpoints) are assumed to be quantised in the experts only.
    int4    weights only; Kimi-K2.5 in the experts only (quantization_config of its config.json).
    """
    moe = model.family in {"deepseek", "kimi", "minimax", "gpt-oss"}
    if model.family == "gpt-oss" and precision in {"fp4", "fp8", "mxfp4"}:
        return Formats("bf16", "bf16", "mxfp4_fp8" if system.generation.startswith("blackwell") else "mxfp4")
    if precision == "bf16":
        return Formats("bf16", "bf16")
    if precision == "int4":
        return Formats("bf16", "bf16", "int4") if moe else Formats("int4", "bf16")
    if precision in {"fp8", "fp8_block"}:
        block = model.family in BLOCK_SCALED or "fp8_block" in {precision, gemm}
        return Formats("fp8_block" if block else "fp8", "fp8")
    if precision != "fp4":
        raise Unmappable("the number format is not known")
    if not system.generation.startswith("blackwell"):
        raise Unmappable("NVFP4 on a device without FP4 arithmetic")
    if model.family == "deepseek":
        return Formats("fp8", "fp8", "fp4")
    return Formats("bf16", "bf16", "fp4") if moe else Formats("fp4", "fp4")
