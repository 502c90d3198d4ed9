"""How are engines told what part of a step prompts may take, and in which order they wait?

vLLM 0.11.0, 0.12.0   --long-prefill-token-threshold caps what a step takes of one prompt, not of all of them
                      (vllm/v1/core/sched/scheduler.py, schedule; --max-num-partial-prefills is refused by its V1
                      engine, vllm/engine/arg_utils.py); --scheduling-policy fcfs or priority, the lowest value first
                      (vllm/config/scheduler.py)
SGLang 0.5.6          --chunked-prefill-size is of prompts alone, but of prompts and decodes with --enable-mixed-chunk
                      (srt/managers/schedule_policy.py, PrefillAdder); --schedule-policy lpm, random, fcfs, dfs-weight
                      or lof, with fcfs and lof also --enable-priority-scheduling (srt/server_args.py)
TensorRT-LLM 1.2.1    max_num_tokens is of prompts and decodes; requests are taken as they come: priorities of its
                      PyTorch backend came later (pull requests 11330 and 12362, of 2026)
Dynamo 0.7.1          hands its vLLM workers no priorities (dynamo/vllm/handlers.py)
Layered prefill is in none of them.
"""

from __future__ import annotations

from planner.errors import PlanError
from planner.plan import Pool


def no_layered(pool: Pool, where: str, engine: str) -> None:
    """Raise PlanError for prompts that pass a group of layers a step."""
    if pool.policy == "layered":
        raise PlanError(
            f"{where}.policy is 'layered', expected another for {engine}: no exported engine prefills by groups of "
            "layers; plan with policy chunked"
        )


def require_order(pool: Pool, where: str, engine: str, *, priority: bool) -> None:
    """Raise PlanError for an order that the engine's queue does not have; `priority` says whether it knows classes."""
    known = ("fcfs", "priority") if priority else ("fcfs",)
    if pool.order not in known:
        expected = " or ".join(known)
        raise PlanError(
            f"{where}.order is {pool.order!r}, expected {expected}: the queue of {engine} has no such order; plan with "
            f"--order {','.join(known)}"
        )


def step_tokens(pool: Pool, where: str, engine: str, notes: list[str], *, mixed: bool) -> int:
    """Tokens of a step that an engine is asked for which knows no limit of its own for those of prompts.

    mixed   decodes count among them: all that may run are then added to the plan's chunk_tokens, so that a full engine
            gives prompts as many as planned, and one with fewer decodes more
    """
    if pool.chunk_tokens is None or pool.role == "decode":
        return pool.token_budget
    if not mixed:
        return pool.chunk_tokens
    tokens = min(pool.token_budget, pool.chunk_tokens + pool.max_seqs * pool.pp)
    notes.append(
        f"{where}: chunk_tokens {pool.chunk_tokens} is approximated: {engine} limits prompts and decodes of a step "
        f"together, here to {tokens}, so that prompts also take what is left by sequences that do not run."
    )
    return tokens


def vllm_queue_flags(pool: Pool, where: str, engine: str, notes: list[str], *, priority: bool) -> list[str]:
    """Flags of vLLM's queue; raises PlanError for orders it does not have."""
    require_order(pool, where, engine, priority=priority)
    flags = []
    if pool.chunk_tokens is not None and pool.role != "decode":
        flags += ["--long-prefill-token-threshold", str(pool.chunk_tokens)]
    if pool.order == "priority":
        notes.append(f"{where}: requests must carry their SLO class's number as `priority`; the lowest goes first.")
        flags += ["--scheduling-policy", "priority"]
    return flags


def sglang_queue_flags(pool: Pool, where: str, engine: str, notes: list[str]) -> list[str]:
    """Flags of SGLang's queue; raises PlanError for orders it does not have."""
    require_order(pool, where, engine, priority=True)
    flags = ["--schedule-policy", "fcfs"]
    if pool.order == "priority":
        notes.append(
            f"{where}: requests must carry the number of their SLO class as `priority`; the lowest goes first, and "
            "preempts those that run of classes more than 10 higher."
        )
        flags += ["--enable-priority-scheduling", "--schedule-low-priority-values-first"]
    return flags
