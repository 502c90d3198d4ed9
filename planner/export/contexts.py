"""Which plans of context parallelism can an engine launch?

None whole, in the versions that are exported. What each has was read in:

vLLM 0.12.0         --prefill-context-parallel-size has its ranks (vllm/config/parallel.py), but no attention backend
                    says supports_pcp (pull requests 28723 for GQA and 28988 for MLA were closed, not merged);
                    --decode-context-parallel-size divides the copies of KV heads among the ranks of tp, no ranks more
SGLang 0.5.6        --enable-nsa-prefill-context-parallel, for DeepSeek's sparse attention alone (server_args.py)
TensorRT-LLM 1.2    --cp_size with cp_config: Helix for generation servers of models with latent attention
                    (docs/source/features/helix.md; pull request 9342; GQA came with 11570 in 1.3); star attention,
                    which is approximate
"""

from __future__ import annotations

from typing import Any

from hwmodels.huggingface import load_model
from planner.errors import PlanError
from planner.plan import Plan, Pool


def no_context(pool: Pool, index: int, engine: str, why: str) -> None:
    """Raise PlanError for a pool whose sequences lie on several ranks; `why` says what the engine has instead."""
    if pool.cp > 1:
        raise PlanError(
            f"pools[{index}].cp is {pool.cp}, expected 1 for {engine}: {why}; plan tp instead, or keep the plan for "
            "simulation"
        )


def helix_options(plan: Plan, pool: Pool, index: int, engine: str, notes: list[str]) -> dict[str, Any]:
    """TensorRT-LLM's options of a decode pool whose cache lies on several ranks by tokens; none without such ranks.

    Raises PlanError for other pools with context parallelism, and models without latent attention.
    """
    if pool.cp == 1:
        return {}
    latent = all(layer.attention.latent is not None for layer in load_model(plan.model).layers)
    if pool.role != "decode" or pool.cp_kind == "ulysses" or not latent:
        what = f"role {pool.role}, cp_kind {pool.cp_kind}, {'' if latent else 'no '}latent attention"
        no_context(pool, index, engine, f"its Helix is for decode pools of models with latent attention, not {what}")
    notes.append(
        f"pools[{index}]: Helix is experimental in {engine}, tested with DeepSeek-V3 on Blackwell; it divides dense "
        f"feed-forward blocks over all {pool.cp * pool.tp} ranks, where the plan has them over each {pool.tp} of them."
    )
    return {
        "context_parallel_size": pool.cp,
        "cp_config": {"cp_type": "HELIX", "tokens_per_block": pool.block_tokens},
    }
