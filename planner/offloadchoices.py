"""Which parts of the experts, formats and threads of the host are worth a look where experts may be away?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hwmodels.errors import OutOfMemoryError
from hwmodels.mapping import Mapping, Precision
from planner.offloading import Away, away_broken, away_of, devices_of_a_node, processor, require_host
from planner.plan import Pool

if TYPE_CHECKING:
    from planner.catalogue import Catalogue

#: Caches are looked at in steps of a hundredth of the experts.
STEPS = 100
#: Of the longest request, as many are to fit beside the second cache that is offered, with a step of so many tokens
#: and sequences.
REQUESTS, USUAL = 8, (2048, 64)


@dataclass(frozen=True, slots=True)
class AwayChoices:
    """What the search may vary where experts are away; see planner.plan.Pool.

    caches      parts of the experts on devices; empty for the largest that fits beside one request, and beside several
    ladder, host   of all plans
    threads     of the host for each device
    pipelines   whether plans with several stages are looked at; each kind of plan takes about a second to price
    """

    caches: tuple[float, ...] = ()
    ladder: tuple[str, ...] | None = None
    threads: tuple[int, ...] = (0,)
    host: str | None = None
    pipelines: bool = True


def offered(catalogue: Catalogue) -> AwayChoices | None:
    """What is looked at when nobody asked and nothing fits: with and without half of the host's cores, one stage.

    None where the model has no experts. No second format: that would change the answers.
    """
    if not catalogue.model.is_moe:
        return None
    half = processor(Away(1.0)).compute_units // devices_of_a_node(catalogue.cluster) // 2
    return AwayChoices(threads=(0, half) if half else (0,), pipelines=False)


def ways_away(
    catalogue: Catalogue,
    choices: AwayChoices,
    mapping: Mapping,
    precision: Precision,
    longest_tokens: int,
    least: tuple[int, int],
) -> tuple[list[dict[str, Any]], str | None]:
    """What to change in pools that are cut like this, once for every choice; without any, the law that they break.

    longest_tokens   prompt and output of the longest request
    least            tokens and sequences of the smallest step that is looked at
    """
    found: list[dict[str, Any]] = []
    if mapping.pp > 1 and not choices.pipelines:
        return found, "experts are away in replicas of one stage where nobody asked for them"
    law: str | None = "a part of the experts fits beside the longest request"
    for threads in choices.threads:
        way: dict[str, Any] = {"expert_ladder": choices.ladder, "cpu_threads": threads, "host": choices.host}
        pool = Pool(
            1, mapping.tp, mapping.pp, mapping.attention_dp, mapping.ep, mapping.expert_tp, mapping.stages,
            precision.weights, precision.activations, precision.kv, precision.experts, **way,
        )  # fmt: skip
        broken = _law_broken(catalogue, mapping, precision, pool)
        if broken is not None:
            law = broken
            continue
        caches = set(choices.caches)
        if not caches:
            small = replace(pool, token_budget=least[0], max_seqs=least[1])
            usual = replace(pool, token_budget=USUAL[0], max_seqs=USUAL[1])
            caches.add(largest_cache(catalogue, small, longest_tokens))
            caches.add(largest_cache(catalogue, usual, REQUESTS * longest_tokens))
        found += [{**way, "expert_cache": cache} for cache in sorted(caches, reverse=True) if cache]
    return found, None if found else law


def _law_broken(catalogue: Catalogue, mapping: Mapping, precision: Precision, pool: Pool) -> str | None:
    """What keeps experts of such a pool from being away."""
    away = away_of(replace(pool, expert_cache=1 / STEPS))
    assert away is not None
    broken = away_broken(catalogue.model, catalogue.cluster, mapping, precision, away)
    if broken is not None:
        return broken[0]
    try:
        require_host(catalogue.model, catalogue.cluster, mapping, precision, away)
    except OutOfMemoryError:
        return "host memory holds the experts"
    return None


def largest_cache(catalogue: Catalogue, pool: Pool, tokens: int) -> float:
    """The largest cache, in hundredths, that leaves the pool's schedulers room for so many tokens; 0 without any."""
    low, high = 0, STEPS  # at low it fits, or low is 0
    while low < high:
        part = (low + high + 1) // 2
        memory = catalogue.memory(replace(pool, expert_cache=part / STEPS))
        if memory.kv_blocks * pool.block_tokens >= tokens:
            low = part
        else:
            high = part - 1
    return low / STEPS
