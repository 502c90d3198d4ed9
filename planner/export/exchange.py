"""Which flags make an engine exchange tokens with its experts, and overlap collectives, as the plan was priced?

Attention groups with experts on several ranks are priced with DeepEP's kernels, the faster of its two for each step,
and with an all-to-all over NVLink in racks that are one NVLink domain (hwmodels/dispatch.py).

vLLM 0.12.0      --all2all-backend deepep_low_latency, deepep_high_throughput or, over racks' NVLink, flashinfer_
                 all2allv (vllm/config/parallel.py), in 0.11.0 the variable VLLM_ALL2ALL_BACKEND; low-latency kernels
                 take VLLM_MOE_DP_CHUNK_SIZE (256) tokens of a rank at a time (vllm/model_executor/layers/fused_moe);
                 without a choice tokens are all-gathered. --enable-dbo runs two micro-batches beside each other, with
                 DeepEP only (vllm/config/vllm.py), from 512 tokens with prompts and 32 without. The pass
                 fuse_allreduce_rms (enable_fi_allreduce_fusion in 0.11.0, where it looks for the custom rms_norm) is
                 for compute capability 9.0 and 10.0 and all-reduces of a few MB (vllm/compilation/collective_fusion.py)
SGLang 0.5.6     --moe-a2a-backend deepep spreads experts over all ranks of a stage; --deepep-mode auto takes the normal
                 kernels in steps with prompts and the low-latency ones in others, which have buffers for SGLANG_DEEPEP_
                 NUM_MAX_DISPATCH_TOKENS_PER_RANK tokens, 128 unless told and 1,024 at most (srt/layers/moe/token_
                 dispatcher/deepep.py). --enable-two-batch-overlap (srt/batch_overlap); --enable-flashinfer-allreduce-
                 fusion (srt/layers/communicator.py: up to 2,048 tokens, without DP attention, Hopper and Blackwell)
TensorRT-LLM 1.2 chooses its exchange by itself: over racks' NVLink, else DeepEP where TRTLLM_CAN_USE_DEEP_EP is 1, else
                 all-gathers (tensorrt_llm/_torch/modules/fused_moe); its models fuse all-reduce and norm by default
                 (TRTLLM_LLAMA_EAGER_FUSION_DISABLED in modeling_llama.py switches it off)
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from planner.errors import PlanError
from planner.export.launch import Replica
from planner.plan import Pool

#: Devices of a server beyond which it is a rack of NVLink alone: hwmodels.dispatch.BOARD.
BOARD = 8
#: Tokens of a rank in one low-latency exchange: SGLang's default, and the most its buffers may have.
FEW, MOST = 128, 1024


def in_racks(replicas: Sequence[Replica], index: int) -> bool:
    """Whether replicas of the pool are in servers of more devices than an NVLink board has."""
    return any(replica.pool_index == index and replica.server_gpus > BOARD for replica in replicas)


def exchanges(pool: Pool) -> bool:
    """Whether attention groups send tokens to experts on other ranks."""
    return pool.attention_dp > 1 and pool.ep > 1


def vllm_backend(pool: Pool, where: str, engine: str, notes: list[str], *, rack: bool) -> str | None:
    """vLLM's exchange for the pool, None without one."""
    if not exchanges(pool):
        return None
    notes.append(
        f"{where}: the exchange with the experts needs kernels of their own, DeepEP or FlashInfer (vLLM's docs on EP)."
    )
    if rack and pool.overlap != "two-way":
        return "flashinfer_all2allv"
    if pool.role == "prefill":
        return "deepep_high_throughput"
    if pool.role != "decode":
        notes.append(
            f"{where}: the plan is priced with the faster of DeepEP's kernels for each step; {engine} has one for all, "
            "here deepep_low_latency, which takes prompts in pieces of VLLM_MOE_DP_CHUNK_SIZE tokens; where prompts "
            "are most of the work take deepep_high_throughput, or export for sglang, which changes kernels by step."
        )
    return "deepep_low_latency"


def vllm_overlap(pool: Pool, where: str, engine: str, notes: list[str]) -> list[str]:
    """Flags for the plan's overlap; raises PlanError for one that vLLM does not have."""
    flags: list[str] = []
    if pool.overlap == "two-way" and pool.tp * pool.attention_dp > 1:
        _require_exchange(pool, where, engine, "--enable-dbo")
        flags.append("--enable-dbo")
        notes.append(
            f"{where}: {engine} runs steps in two micro-batches from 512 tokens with prompts and 32 without "
            "(--dbo-prefill-token-threshold, --dbo-decode-token-threshold), the plan those that gain from it."
        )
    if pool.overlap != "none" and pool.tp > 1:
        passes: dict[str, object] = {"pass_config": {"fuse_allreduce_rms": True}}
        if "0.11" in engine:
            passes = {"pass_config": {"enable_fi_allreduce_fusion": True}, "custom_ops": ["+rms_norm"]}
        flags += ["--compilation-config", json.dumps(passes, separators=(",", ":"))]
        notes.append(
            f"{where}: {engine} computes norms inside all-reduces by FlashInfer, on Hopper and Blackwell, with tp 2, 4 "
            "or 8, and only up to a few MB (0.5 MB on Hopper with tp 8), the plan at all sizes."
        )
    return flags


def sglang_exchange(pool: Pool, where: str, notes: list[str], *, rack: bool) -> list[str]:
    """Flags of SGLang's exchange, none for a pool without one."""
    if not exchanges(pool):
        return []
    if pool.expert_tp > 1:
        notes.append(
            f"{where}: SGLang's DeepEP has no expert_tp ({pool.expert_tp} in the plan): tokens are all-gathered, "
            f"which takes longer than planned; plan ep {pool.tp * pool.attention_dp} and expert_tp 1."
        )
        return []
    notes.append(f"{where}: the exchange with the experts needs DeepEP (package deep_ep).")
    if rack:
        notes.append(f"{where}: the plan is priced with an all-to-all over NVLink, which SGLang's DeepEP comes near.")
    mode = {"prefill": "normal", "decode": "low_latency"}.get(pool.role, "auto")
    return ["--moe-a2a-backend", "deepep", "--deepep-mode", mode]


def sglang_environment(pool: Pool, index: int) -> dict[str, str]:
    """Room for the decodes of each rank in low-latency exchanges, where they are more than SGLang expects."""
    if not exchanges(pool) or pool.expert_tp > 1 or pool.role == "prefill":
        return {}
    tokens = -(-pool.max_seqs // pool.tp)
    if tokens <= FEW:
        return {}
    if tokens > MOST:
        raise PlanError(
            f"pools[{index}].max_seqs is {pool.max_seqs} with tp {pool.tp}, expected at most {MOST * pool.tp} for "
            f"SGLang: DeepEP's low-latency exchange takes {MOST} tokens of a rank; plan fewer sequences"
        )
    return {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": str(tokens)}


def sglang_overlap(pool: Pool, where: str, engine: str, notes: list[str]) -> list[str]:
    """Flags for the plan's overlap; raises PlanError for one that SGLang does not have."""
    flags: list[str] = []
    if pool.overlap == "two-way" and pool.tp * pool.attention_dp > 1:
        _require_exchange(pool, where, engine, "--enable-two-batch-overlap")
        flags.append("--enable-two-batch-overlap")
        notes.append(
            f"{where}: SGLang overlaps two batches in DeepSeek, Qwen, GLM-4 and MiniMax mixtures, in every step whose "
            "attention groups all prefill or all decode; the plan in steps that gain from it."
        )
    if pool.overlap != "none" and pool.tp > 1:
        if pool.attention_dp > 1:
            notes.append(f"{where}: with DP attention SGLang computes no norms inside all-reduces, as the plan does.")
        else:
            flags.append("--enable-flashinfer-allreduce-fusion")
            notes.append(
                f"{where}: SGLang computes norms inside all-reduces in steps of up to 2048 tokens, on Hopper and "
                "Blackwell, in DeepSeek, gpt-oss, Qwen3, GLM-4 and others, not Llama 3; the plan in all."
            )
    return flags


def tensorrt_environment(pool: Pool, where: str, notes: list[str], *, rack: bool) -> dict[str, str]:
    """What lets TensorRT-LLM choose the exchange that the plan was priced with."""
    if not exchanges(pool):
        return {}
    notes.append(
        f"{where}: TensorRT-LLM chooses the exchange itself: all-to-all only with more expert ranks than experts of a "
        "token, DeepEP only where built in and with 16-bit activations, else slower all-gathers."
    )
    return {} if rack else {"TRTLLM_CAN_USE_DEEP_EP": "1"}


def tensorrt_overlap(pool: Pool, where: str, engine: str, notes: list[str]) -> None:
    """Note what TensorRT-LLM does by itself of the plan's overlap; raise PlanError for what it does not have."""
    if pool.tp * pool.attention_dp == 1 or pool.overlap == "none":
        return
    if pool.overlap == "two-way":
        raise PlanError(
            f"{where}.overlap is 'two-way', expected none or fused-norm for {engine}: it computes no half of a step "
            "beside the other's collectives; plan with --overlap none,fused-norm"
        )
    if pool.tp > 1:
        notes.append(f"{where}: {engine} computes norms inside all-reduces by default, in the models that have it.")


def _require_exchange(pool: Pool, where: str, engine: str, flag: str) -> None:
    """Raise PlanError for two halves without the exchange that the engine overlaps."""
    if not exchanges(pool) or pool.expert_tp > 1:
        raise PlanError(
            f"{where}.overlap is 'two-way' with attention_dp {pool.attention_dp}, ep {pool.ep} and expert_tp "
            f"{pool.expert_tp}, expected none or fused-norm: {engine} overlaps two halves of a step around DeepEP's "
            f"exchange alone ({flag}), with attention groups and experts on all ranks; plan with --overlap "
            "none,fused-norm"
        )
