"""A guess at the rate a replica keeps within its limits, from a fluid model: where to look, not what to believe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hwmodels.mapping import Mapping
from hwmodels.step_model import StepModel
from simulator.limits import Limit
from simulator.workload import Requests

#: A p99 of time per output token is about this many times its mean in chat traffic (seen in simulations).
TAIL = 1.6
#: Prefill keeps its latency up to about this share of a replica's time.
PREFILL_SHARE = 0.8
#: Part of a replica's time in prefill that is guessed at least.
LEAST = 1e-3


def estimate_rate_per_s(model: StepModel, mapping: Mapping, requests: Requests, limits: Sequence[Limit]) -> float:
    """Requests per second of one replica.

    With rate r and prefill time g a request, decodes get the share 1 - r g of the time: TPOT = step(n) / (1 - r g) with
    n = r d TPOT sequences for d tokens a request. The rate grows until TPOT reaches its limit or prefill its share.
    """
    prompt = int(requests.prompt_tokens.mean())
    decodes = max(1.0, float(requests.output_tokens.mean() - 1))
    context = prompt + int(decodes / 2)
    whole = [(min(prompt, model.max_tokens), 0)]
    groups, lanes = mapping.attention_dp, mapping.pp * mapping.attention_dp

    def through(n: int) -> tuple[float, float]:
        """Time of a decode step through all stages, and in the slowest."""
        n = min(max(n, 1), model.max_seqs)
        stages = model.lockstep_stages_s([(n, n * context, [])] * groups)
        return sum(stages), max(stages)

    prefill_s = max(model.lockstep_stages_s([(0, 0, whole)] * groups)) / groups
    most_tpot_s = min((limit.seconds / TAIL for limit in limits if limit.metric == "tpot"), default=np.inf)

    def keeps(rate: float) -> bool:
        """Whether prefill keeps its share and decodes their limit."""
        left = 1 - rate * prefill_s
        if left < 1 - PREFILL_SHARE:
            return False
        tpot_s = through(1)[0]
        for _ in range(12):
            n = round(rate * decodes * tpot_s / lanes)
            latency, slowest = through(n)
            tpot_s = max(latency, slowest * (mapping.pp if n else 1)) / left
        return tpot_s <= most_tpot_s and rate * decodes * tpot_s / lanes <= model.max_seqs

    rate, kept = 0.05 / max(prefill_s, 1e-9), 0.0
    for _ in range(60):
        if not keeps(rate):
            break
        kept = rate
        rate *= 1.1
    while not kept and rate * prefill_s > LEAST:  # decodes that take much longer than prompts, as from host memory
        rate /= 1.1
        kept = rate if keeps(rate) else 0.0
    return max(kept, LEAST / max(prefill_s, 1e-9))
