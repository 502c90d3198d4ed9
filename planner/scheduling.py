"""How do the engines of a pool form their batches?"""

from __future__ import annotations

from planner.plan import Pool
from simulator.scheduler import SchedulerConfig


def prompt_tokens_per_step(scheduler: SchedulerConfig) -> int:
    """Tokens of prompts in one step at most, while nothing decodes."""
    chunk = scheduler.chunk_tokens
    return scheduler.token_budget if chunk is None else min(chunk, scheduler.token_budget)


def scheduler_of(pool: Pool) -> SchedulerConfig:
    """The scheduler of each of its engines. Raises SchedulerError for settings that contradict each other."""
    return SchedulerConfig(
        pool.policy,
        pool.max_seqs,
        pool.token_budget,
        pool.block_tokens,
        pool.max_context_tokens,
        pool.prefix_caching,
        pool.chunk_tokens,
        pool.group_tokens,
        order=pool.order,
        ageing_tokens_per_s=pool.ageing_tokens_per_s,
        targets_s=pool.deadlines_s,
    )
