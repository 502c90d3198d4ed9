"""How many requests per second does a replica prefill, decode or serve whole, within the latency limits?

Prefill: planner/prefillqueue.py follows the queue of prompts step by step. Decode: planner/decodequeue.py has the law
of the batch. Whole requests: prefills leave the decodes of their scheduler the share 1 - r g of the time, g seconds
more for steps with a request's prompt in them, and stall them: a compound Poisson sum over a request's life, and after
its first token the prompts that queued behind it; prompts in turn wait for the decodes beside them, which lengthen each
of their steps, and for half a decode step before the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.decodequeue import E2E_PREFILL, Decode, Work, decode_capacity, decode_steps_s, lengths_of
from planner.options import Option, Role, Service
from planner.prefillqueue import REQUESTS, Prefill, prefill_capacities, prompt_tables
from planner.scheduling import prompt_tokens_per_step
from simulator.deployment import ReplicaSpec
from simulator.limits import Limit
from simulator.workload import Requests

#: Requests per second of a phase that asks for no work: outputs of one token are not decoded.
NO_WORK = 1e6


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one replica does for one class of requests, in each phase if it does nothing else.

    whole_per_s   served from the prompt to the last token, prefills and decodes sharing the steps
    prompt_tokens mean of the requests
    """

    prefill: Prefill
    decode: Decode
    whole_per_s: float
    whole_token_s: float
    prompt_tokens: float

    def service(self, role: Role, kv_bytes_per_token: float) -> Service:
        """As the pool-sizing program takes it."""
        prefill_per_s, decode_per_s = self.prefill.rate_per_s, min(self.decode.rate_per_s, NO_WORK)
        whole_per_s = self.whole_per_s if role in ("aggregated", "mixed") else 0.0
        apart_s = 1 / prefill_per_s + 1 / decode_per_s if prefill_per_s and decode_per_s else 0.0
        if role == "mixed":  # prefills beside decodes disturb them: as much as in whole requests
            disturbed = min(1.0, whole_per_s * apart_s)
            prefill_per_s, decode_per_s = disturbed * prefill_per_s, disturbed * decode_per_s
        return Service(
            prefill_per_s=prefill_per_s if role in ("prefill", "mixed") else 0.0,
            decode_per_s=decode_per_s if role in ("decode", "mixed") else 0.0,
            whole_per_s=whole_per_s,
            prefill_token_s=self.prefill.held_token_s,
            decode_token_s=self.decode.held_token_s,
            whole_token_s=self.whole_token_s,
            kv_bytes=kv_bytes_per_token * self.prompt_tokens,
        )


def capacities(
    specs: Sequence[ReplicaSpec],
    requests: Requests,
    limits: Sequence[Limit],
    *,
    transfer_s: float = 0.0,
    frontend_s: float = 0.0,
    whole: bool = True,
    follow: int = REQUESTS,
) -> list[Capacity]:
    """Capacities of replicas for requests of one class.

    transfer_s   of a request's KV, for decode replicas; frontend_s as in simulator.deployment.Deployment
    follow       requests that queues of prompts are followed for: fewer are quicker, and rougher in the tails
    whole        whether replicas in roles aggregated or mixed are wanted: 0 otherwise
    """
    ttft = [limit for limit in limits if limit.metric == "ttft"]
    ttft += [Limit("ttft", x.statistic, E2E_PREFILL * x.seconds) for x in limits if x.metric == "e2e"]
    prefills = prefill_capacities(specs, requests, ttft, frontend_s=frontend_s, follow=follow)
    decodes = [decode_capacity(spec, requests, limits, transfer_s=transfer_s) for spec in specs]
    prompt_tokens = float(requests.prompt_tokens.mean())
    beside = [Decode(0.0, 0.0, 0.0, 0.0, "")] * len(specs)
    if whole:
        beside = [
            decode_capacity(spec, requests, limits, work=prefill_work(spec, requests, decode))
            for spec, decode in zip(specs, decodes, strict=True)
        ]
    slowed = prefills
    if whole:
        added = [_beside_s(*each, requests) for each in zip(specs, beside, prefills, strict=True)]
        slowed = prefill_capacities(specs, requests, ttft, frontend_s=frontend_s, beside=added, follow=follow)
    return [
        Capacity(
            prefill,
            decode,
            min(both.rate_per_s, late.rate_per_s),
            both.held_token_s + late.held_token_s,
            prompt_tokens,
        )
        for prefill, decode, both, late in zip(prefills, decodes, beside, slowed, strict=True)
    ]


def prefill_work(spec: ReplicaSpec, requests: Requests, decode: Decode) -> Work:
    """What a request's prompt adds to the steps of the decodes it is prefilled beside, half as many as in `decode`.

    Schedulers of a pipeline wait for their own prompts in all stages and for the others' in the slowest; attention
    groups wait for each other's, taken one at a time.
    """
    model, mapping, groups = spec.model, spec.mapping, spec.mapping.attention_dp
    tables = prompt_tables(model, mapping.pp)
    budget = min(spec.scheduler.token_budget, model.max_tokens)
    n = int(min(decode.sequences / spec.lanes / 2, budget // 2))
    left, before, seconds = requests.prompt_tokens.copy(), np.zeros(len(requests)), np.zeros(len(requests))
    while (left > 0).any():
        new = np.minimum(left, min(budget - n, prompt_tokens_per_step(spec.scheduler)))
        linear = tables.linear[n + new] - tables.linear[n] + tables.shared[n * groups + new] - tables.shared[n * groups]
        attention = tables.base[0][new] + tables.slope[0][new] * before
        seconds += np.where(new > 0, linear + attention + model.engine.prompt_overhead_s, 0.0)
        left, before = left - new, before + new
    square, cube = float((seconds**2).mean()), float((seconds**3).mean())
    others = 1 + (mapping.pp - 1) * float(tables.shares.max())
    return Work(float(seconds.mean()), square, cube, others * groups)


def _beside_s(spec: ReplicaSpec, both: Decode, prefill: Prefill, requests: Requests) -> tuple[float, float]:
    """Seconds that decodes add to a step with prompts, and to the wait of a prompt for a step."""
    if not both.rate_per_s:
        return 0.0, 0.0
    tables, mapping = prompt_tables(spec.model, spec.mapping.pp), spec.mapping
    sequences = both.sequences / spec.lanes * min(1.0, prefill.rate_per_s / both.rate_per_s)
    rows = min(spec.scheduler.max_seqs, spec.model.max_seqs)
    seconds, _ = decode_steps_s(spec.model, mapping, lengths_of(requests).context, rows)
    step_s = float(np.interp(sequences, np.arange(rows + 1), seconds))
    n = round(sequences)
    most = min(spec.scheduler.token_budget - n, prompt_tokens_per_step(spec.scheduler))
    new = min(int(requests.prompt_tokens.mean()), most)
    every = n * mapping.attention_dp
    attention_s = max(0.0, step_s - float(tables.linear[n] + tables.shared[every] + tables.fixed_s))
    added_s = attention_s + float(tables.linear[n + new] - tables.linear[new])
    added_s += float(tables.shared[every + new] - tables.shared[new])
    busy = 1 - float(np.exp(-sequences))  # whether anything decodes when a prompt comes
    return busy * added_s, busy * step_s / 2


def option(
    key: str,
    role: Role,
    hardware: str,
    spec: ReplicaSpec,
    classes: Sequence[Capacity],
    *,
    kv_bytes_per_token: float = 0.0,
    kv_format: str = "",
    link_bytes_per_s: float = np.inf,
) -> Option:
    """A replica in a role, with what it does for each class of requests; priced and powered as its devices are.

    kv_bytes_per_token   of the whole model, see hwmodels.shape.ModelShape.kv_bytes_per_token
    kv_format, link_bytes_per_s   as in planner.options.Option
    """
    device, gpus = spec.device, spec.mapping.gpus
    price = device.price_usd_per_h
    return Option(
        key,
        role,
        hardware,
        gpus,
        tuple(capacity.service(role, kv_bytes_per_token) for capacity in classes),
        kv_tokens=float(spec.lanes * spec.kv_blocks * spec.scheduler.block_tokens),
        link_bytes_per_s=link_bytes_per_s,
        kv_format=kv_format,
        price_usd_per_h=None if price is None else price * gpus,
        power_w=device.tdp_w * gpus,
    )
