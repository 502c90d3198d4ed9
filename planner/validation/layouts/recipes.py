"""How the engines of published runs were started: budgets, sequences, KV format, order of prompts and decodes.

Sources: the launch scripts of InferenceX (SemiAnalysisAI/InferenceX, formerly InferenceMAX; benchmarks/*.sh at the
commits named below, Apache-2.0) where there is one for model, engine and devices, else the engine's own defaults.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from planner.validation.layouts.formats import Formats
from planner.validation.layouts.names import Model, System
from simulator.policies import Policy


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one scheduler, as in planner.plan.Pool; with attention_dp every group has its own."""

    policy: Policy
    token_budget: int
    max_seqs: int
    kv: str
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of a launch script that differ from the engine's defaults, and whom they hold for (None: all).

    since          first engine version, as numbers
    token_budget   "2 isl" and "context" stand for twice the prompt and for the longest request
    """

    family: str
    engine: str
    generation: str | None = None
    precision: str | None = None
    since: tuple[int, ...] = ()
    kv: str | None = None
    token_budget: int | str | None = None
    max_seqs: int | None = None


#: The first that holds is taken.
RECIPES = (
    # 70b_fp8_b200_trt_slurm.sh @4e3c32e: max_num_tokens is the longest request; 70b_fp4_b200_trt and
    # 70b_fp8_h200_trt_slurm.sh @9596d23: 16384; kv_cache_config.dtype fp8 in all.
    Recipe("llama-70b", "tensorrt-llm", "blackwell", "fp8", kv="fp8", token_budget="context"),
    Recipe("llama-70b", "tensorrt-llm", kv="fp8", token_budget=16384),
    # 70b_fp8_h100_slurm.sh @c198b20, 70b_fp8_b200_slurm.sh @03ab54e.
    Recipe("llama-70b", "vllm", kv="fp8", token_budget=8192, max_seqs=512),
    # gptoss_fp4_b200.sh, gptoss_fp4_h100.sh, gptoss_fp4_h200_trt.sh @8eec0d4, gptoss_fp4_b200_trt_slurm.sh @cc9bed4.
    Recipe("gpt-oss", "vllm", "blackwell", kv="fp8", token_budget=8192, max_seqs=512),
    Recipe("gpt-oss", "vllm", kv="bf16", token_budget=8192),
    Recipe("gpt-oss", "tensorrt-llm", "blackwell", kv="fp8", token_budget=20000, max_seqs=512),
    Recipe("gpt-oss", "tensorrt-llm", kv="bf16", token_budget=20000),
    # dsr1_fp4_b200.sh @706bece, dsr1_fp8_b200.sh @eb055c7, dsr1_fp8_h200.sh @161e7f6 (KV dtype left at 16 bits).
    Recipe("deepseek", "sglang", "blackwell", "fp4", kv="fp8", token_budget=16384, max_seqs=256),
    Recipe("deepseek", "sglang", "blackwell", kv="fp8", token_budget=32768),
    Recipe("deepseek", "sglang", kv="bf16", token_budget=32768, max_seqs=512),
    # dsr1_fp4_b200_trt.sh @34bc7c4, dsr1_fp8_b200_trt.sh and dsr1_fp8_h200_trt.sh @8eec0d4: kv_cache_config.dtype fp8,
    # max_num_tokens the larger of 8192 and a prompt beside all decodes.
    Recipe("deepseek", "tensorrt-llm", kv="fp8"),
    # minimaxm2.5_fp8_b200.sh and minimaxm2.5_fp4_b300.sh as of vLLM 0.19 (@5632483); @13453b4 (0.17) set neither.
    Recipe("minimax", "vllm", "blackwell", since=(0, 19), kv="fp8", token_budget="2 isl"),
    Recipe("minimax", "vllm", kv="bf16"),
    # kimik2.5_int4_b200.sh @8eec0d4; kimik2.5_fp4_b200.sh @04107b3 (0.17), @380b685 (later).
    Recipe("kimi", "vllm", "blackwell", "fp4", since=(0, 19), kv="fp8", token_budget="2 isl"),
    Recipe("kimi", "vllm", kv="bf16"),
)

#: Tokens and sequences of a step: vLLM V1's online defaults on data-centre devices (8192 and 1024; elsewhere 2048 and
#: 256); SGLang's chunked_prefill_size, 8192, and 16384 on devices of more than 160 GB, its running requests being
#: limited by memory only; TensorRT-LLM's max_num_tokens and max_batch_size.
DEFAULTS = {"vllm": (8192, 1024), "sglang": (8192, 1024), "tensorrt-llm": (8192, 2048)}
#: vLLM V1 cuts prompts to fill the budget beside the decodes; SGLang runs prompts before decodes, in steps of their
#: own; TensorRT-LLM runs whole prompts beside the decodes (chunked context is off by default).
POLICY: dict[str, Policy] = {"vllm": "chunked", "sglang": "prefill-first", "tensorrt-llm": "orca"}
BLOCK_TOKENS = {"vllm": 16, "sglang": 16, "tensorrt-llm": 32}
#: Beyond prompt and output, what the launch scripts add to the longest context.
CONTEXT_MARGIN = 256


def settings_of(
    model: Model,
    engine: str,
    system: System,
    formats: Formats,
    *,
    precision: str,
    version: str,
    isl: int,
    osl: int,
    sequences: int,
) -> Settings:
    """Settings of a scheduler for prompts of up to `isl` tokens, outputs of up to `osl` and `sequences` at a time.

    max_seqs is the engine's own limit or, where fewer can be there, a power of two of at least 256 that holds them: it
    makes no difference to a run and lets plans share tables. The KV cache is 8 bits where the launch script says so;
    where there is none, it is in TensorRT-LLM with quantised weights (the FP8 and NVFP4 checkpoints of NVIDIA carry
    kv_cache_quant_algo FP8), and 16 bits elsewhere.
    """
    recipe = _recipe(model, engine, system, precision, version)
    budget, limit = DEFAULTS[engine]
    if engine == "sglang" and system.generation == "blackwell":
        budget = 16384
    if engine == "vllm" and system.generation not in {"hopper", "blackwell"}:
        budget, limit = 2048, 256
    quantised = formats.experts is not None or formats.weights != "bf16"
    kv = "fp8" if engine == "tensorrt-llm" and quantised else "bf16"
    if recipe is not None:
        budget = _budget(recipe.token_budget, isl, osl) or budget
        limit = recipe.max_seqs or limit
        kv = recipe.kv or kv
    policy: Policy = POLICY[engine]
    if engine == "sglang" and isl > budget:
        policy = "chunked"
    if policy != "chunked":
        # Never less than a request that lost its KV and comes back whole; in steps of 1024 so that plans share tables.
        budget = max(budget, -(-(isl + max(osl, min(sequences, limit))) // 1024) * 1024)
    largest = max(256, 1 << max(0, sequences - 1).bit_length())
    return Settings(policy, budget, min(limit, largest, budget), kv, BLOCK_TOKENS[engine])


def _recipe(model: Model, engine: str, system: System, precision: str, version: str) -> Recipe | None:
    plain = "fp8" if precision == "fp8_block" else precision
    for recipe in RECIPES:
        if (
            (recipe.family, recipe.engine) == (model.family, engine)
            and recipe.generation in {None, system.generation}
            and recipe.precision in {None, plain}
            and version_numbers(version) >= recipe.since
        ):
            return recipe
    return None


def _budget(rule: int | str | None, isl: int, osl: int) -> int | None:
    if rule == "2 isl":
        return 2 * isl
    if rule == "context":
        return isl + osl + CONTEXT_MARGIN
    return rule if isinstance(rule, int) else None


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version; a nightly build is newer than all, an unknown one older.

    >>> version_numbers("v0.19.0"), version_numbers("1.2.0rc6.post2"), version_numbers("")
    ((0, 19, 0), (1, 2, 0), ())
    """
    if "nightly" in version or "dev" in version:
        return (999,)
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in found[1].split(".")) if found else ()
