"""Which kinds of replica are worth a close look in a role? The quickest of their size in one typical step."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np

from planner.plan import Pool
from planner.scheduling import prompt_tokens_per_step
from simulator.deployment import ReplicaSpec
from simulator.limits import Limit
from simulator.workload import Requests

#: Kinds kept in each role of each size in devices.
KEPT = 3


def promising(
    kinds: Sequence[tuple[Pool, ReplicaSpec]], requests: Requests, limits: Sequence[Limit], kept: int = KEPT
) -> list[tuple[Pool, ReplicaSpec]]:
    """Of each role and size in devices, the `kept` kinds that do most in a step that alone keeps the limits."""
    found: list[tuple[Pool, ReplicaSpec]] = []
    for role, gpus in dict.fromkeys((pool.role, pool.gpus_per_replica) for pool, _ in kinds):
        mine = [(pool, spec) for pool, spec in kinds if (pool.role, pool.gpus_per_replica) == (role, gpus)]
        rate = _prompts_per_s if role == "prefill" else _tokens_per_s
        scores = [rate(spec, requests, limits) for _, spec in mine]
        best = sorted(range(len(mine)), key=lambda i: -scores[i])
        found += [mine[i] for i in best[:kept] if scores[i] > 0]
    return found


def _least(limits: Sequence[Limit], metric: str) -> float:
    return min((limit.seconds for limit in limits if limit.metric in (metric, "e2e")), default=inf)


def _prompts_per_s(spec: ReplicaSpec, requests: Requests, limits: Sequence[Limit]) -> float:
    """Prompt tokens per second in steps full of mean prompts; 0 if a long one breaks the limit on TTFT by itself."""
    model, mapping, budget = spec.model, spec.mapping, prompt_tokens_per_step(spec.scheduler)

    def step_s(items: list[tuple[int, int]]) -> tuple[float, float]:
        """Time through all stages, and of the slowest."""
        stages = model.lockstep_stages_s([(0, 0, items)] * mapping.attention_dp)
        return sum(stages), max(stages)

    long = int(np.quantile(requests.prompt_tokens, 0.9))
    chunks = [(min(budget, long - done), done) for done in range(0, long, budget)]
    if sum(step_s([chunk])[0] for chunk in chunks) > _least(limits, "ttft"):
        return 0.0
    mean = min(int(requests.prompt_tokens.mean()), budget)
    items = [(mean, 0)] * max(1, budget // max(mean, 1))
    return mapping.attention_dp * len(items) * mean / step_s(items)[1]


def _tokens_per_s(spec: ReplicaSpec, requests: Requests, limits: Sequence[Limit]) -> float:
    """Tokens per second of the largest batch that keeps the limit on TPOT, fits the KV and may run."""
    model, mapping = spec.model, spec.mapping
    context = int(requests.prompt_tokens.mean() + requests.output_tokens.mean() / 2)
    most = min(spec.scheduler.max_seqs, model.max_seqs, spec.kv_blocks * spec.scheduler.block_tokens // max(context, 1))
    limit = _least(limits, "tpot")

    def token_s(n: int) -> float:
        stages = model.lockstep_stages_s([(n, n * context, [])] * mapping.attention_dp)
        return max(sum(stages), mapping.pp * max(stages))

    if most < 1 or token_s(1) > limit:
        return 0.0
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if token_s(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return spec.lanes * low / token_s(low)
