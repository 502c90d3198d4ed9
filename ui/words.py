"""Plans, numbers and units as people say them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hwmodels.routing import RoutingStats
    from hwmodels.shape import ModelShape
    from planner.expertbalance import Balance
    from planner.plan import Plan, Pool
    from simulator.encode import EncodeUse


def cut(pool: Pool) -> str:
    """The degrees that are above 1, tp always."""
    degrees = {"pp": pool.pp, "attention_dp": pool.attention_dp, "ep": pool.ep, "expert_tp": pool.expert_tp}
    more = [f"redundant_experts={pool.redundant_experts}"] if pool.redundant_experts else []
    more += [f"cp={pool.cp} ({pool.cp_kind})"] if pool.cp > 1 else []
    return " ".join([f"tp={pool.tp}", *(f"{name}={degree}" for name, degree in degrees.items() if degree > 1), *more])


def kept(pool: Pool) -> str:
    """The number formats, in one word where they are one."""
    if pool.weights == pool.activations == pool.kv:
        shared = pool.weights
    else:
        shared = f"{pool.weights} weights, {pool.activations} activations, {pool.kv} KV"
    return (shared if pool.experts is None else f"{pool.experts} experts, {shared}") + away(pool)


def away(pool: Pool) -> str:
    """What of the experts devices hold, such as ', 18 % of the experts on devices, 32 host threads'; or nothing."""
    if pool.expert_cache is None:
        return ""
    ladder = "" if pool.expert_ladder is None else f" in {'/'.join(pool.expert_ladder)}"
    threads = f", {pool.cpu_threads} host threads a device" if pool.cpu_threads else ""
    return f", {percent(pool.expert_cache)} of the experts on devices{ladder}{threads}"


def remembered(pool: Pool) -> str:
    """What is kept of prompts that begin alike, such as ', prefixes kept (lru; 1000 GB in host memory)', or nothing."""
    if pool.prefix_caching == "off":
        return ""
    tiers = (("host memory", pool.host_kv_gb), ("disks", pool.ssd_kv_gb))
    where = "".join(f"; {gigabytes:g} GB in {name}" for name, gigabytes in tiers if gigabytes is not None)
    return f", prefixes kept ({pool.prefix_caching}{where})"


def replicas(pool: Pool) -> str:
    """How many of what, such as '4 replicas of tp=4'."""
    return f"{pool.replicas} {'replica' if pool.replicas == 1 else 'replicas'} of {cut(pool)}"


def workers(pool: Pool) -> str:
    """An encode pool, such as '6 encode workers on l40s'."""
    where = f" on {pool.hardware}" if pool.hardware else ""
    return f"{pool.replicas} encode {'worker' if pool.replicas == 1 else 'workers'}{where}"


def part(pool: Pool) -> str:
    """What the pool does and on what, in front of how it is cut; nothing for plain replicas on the plan's devices.

    Such as 'prefill ' or 'decode on a100-80-sxm '.
    """
    words: list[str] = [pool.role] if pool.role != "aggregated" else []
    words += [f"on {pool.hardware}"] if pool.hardware else []
    if pool.sharing is not None:
        parts = "" if pool.shares is None else " " + "/".join(f"{share:.0%}" for share in pool.shares)
        words.append(f"{pool.sharing}{parts}")
    return "".join(f"{word} " for word in words)


def at_hand(devices: Mapping[str, int]) -> str:
    """Devices, such as '16 x h100-sxm and 16 x a100-80-sxm'."""
    return " and ".join(f"{count} x {name}" for name, count in devices.items())


def in_short(plan: Plan) -> str:
    """How the plan cuts the model, such as '4 x tp=4' or '2 x prefill tp=4 + 1 x decode tp=8'."""
    return " + ".join(
        workers(pool) if pool.role == "encode" else f"{pool.replicas} x {part(pool)}{cut(pool)}" for pool in plan.pools
    )


def scheduling(plan: Plan) -> str:
    """Policies with the most sequences and tokens of a step, such as 'chunked 256/2048'."""
    return " + ".join(f"{pool.policy} {pool.max_seqs}/{pool.token_budget}{brief(pool)}" for pool in plan.serving)


def told(pool: Pool) -> str:
    """What is unusual in the pool's schedule, to be added to its policy and budgets; empty where nothing is.

    >>> from planner.plan import Pool
    >>> told(Pool(1, chunk_tokens=256, order="shortest", ageing_tokens_per_s=50.0, overlap="two-way"))
    ', prompts 256 tokens a step, shortest first (ageing 50 tokens/s), overlap two-way'
    """
    parts = []
    if pool.chunk_tokens is not None:
        parts.append(f"prompts {pool.chunk_tokens} tokens a step")
    if pool.policy == "layered":
        parts.append(f"a group of layers for every {pool.group_tokens} prompt tokens")
    if pool.order == "shortest":
        parts.append(f"shortest first (ageing {pool.ageing_tokens_per_s:g} tokens/s)")
    elif pool.order == "deadline":
        parts.append(f"earliest deadline first ({', '.join(f'{d:g} s' for d in pool.deadlines_s)})")
    elif pool.order == "priority":
        parts.append("by priority of classes")
    if pool.overlap != "none":
        parts.append(f"overlap {pool.overlap}")
    return "".join(f", {part}" for part in parts)


def brief(pool: Pool) -> str:
    """The same in the fewest words, for tables.

    >>> from planner.plan import Pool
    >>> brief(Pool(1, chunk_tokens=256, order="shortest", overlap="two-way"))
    ' chunk 256 shortest two-way'
    """
    words = [f"chunk {pool.chunk_tokens}"] if pool.chunk_tokens is not None else []
    words += [f"group {pool.group_tokens}"] if pool.policy == "layered" and pool.group_tokens != 512 else []
    words += [word for word, usual in ((pool.order, "fcfs"), (pool.overlap, "none")) if word != usual]
    return "".join(f" {word}" for word in words)


def in_words(plan: Plan) -> str:
    """What the plan runs, such as '4 replicas of tp=4 (chunked, ...) on 16 GPUs; 0 idle'."""
    kinds = [
        f"{part(pool)}{replicas(pool)} ({pool.policy}, up to {pool.max_seqs} sequences and {pool.token_budget} tokens "
        f"a step{told(pool)}, {kept(pool)}{remembered(pool)})"
        if pool.role != "encode"
        else f"{workers(pool)} ({plan.encoder}, up to {pool.batch_tiles} tiles a batch)"
        for pool in plan.pools
    ]
    if plan.encoder is not None and plan.encode_pool is None:
        kinds[-1] += f", {plan.encoder} where prompts are computed,"
    return f"{' + '.join(kinds)} on {plan.gpus_used} of {sum(plan.devices.values())} GPUs; {plan.idle} idle"


def seconds(value: float | None) -> str:
    """A time with the unit that suits it; a dash where there is none.

    >>> seconds(0.0234), seconds(2.5), seconds(0.0000041), seconds(None)
    ('23.4 ms', '2.5 s', '4.1 us', '-')
    """
    if value is None or not isfinite(value):
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}" if abs(value) < 1000 else f"{value:.0f} s"
    return "0 s" if value == 0 else f"{value / 1e-6:.3g} us"


def number(value: float | None) -> str:
    """Three figures, thousands separated; a dash where there is none.

    >>> number(1234567.0), number(0.01234), number(float("nan"))
    ('1,234,567', '0.0123', '-')
    """
    if value is None or not isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def scaled(value: float, unit: str) -> str:
    """With a decimal prefix.

    >>> scaled(3.2e9, "B"), scaled(5, "FLOP")
    ('3.2 GB', '5 FLOP')
    """
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def percent(share: float | None) -> str:
    """A share; a dash where there is none."""
    return "-" if share is None or not isfinite(share) else f"{100 * share:.3g} %"


def printable(text: str) -> str:
    """The text on one line, with characters a terminal would act on written out.

    >>> printable("a\\nb\\x1b[31m")
    'a\\\\nb\\\\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def attention(model: ModelShape) -> str:
    """Kinds of attention and of feed-forward blocks, such as 'GQA 8, window 128, MoE 128/4'."""
    blocks = list(dict.fromkeys(layer.attention for layer in model.layers))
    first = blocks[0]
    if first.latent is not None:
        kind = "MLA"
    elif first.kv_heads == first.heads:
        kind = "MHA"
    else:
        kind = "MQA" if first.kv_heads == 1 else f"GQA {first.kv_heads}"
    windows = {block.window_tokens for block in blocks} - {None}
    words = [kind, *(f"window {window}" for window in sorted(w for w in windows if w is not None))]
    experts = next((layer.feed_forward for layer in model.layers if layer.feed_forward.experts), None)
    return ", ".join(words + ([] if experts is None else [f"MoE {experts.experts}/{experts.top_k}"]))


def encoding(use: EncodeUse) -> str:
    """What encoding images took, such as '600 tiles of 300 requests; 4 encode workers 12 % busy, ...'."""
    what = f"{use.tiles:,} tiles of {use.requests:,} requests"
    if not use.workers:
        return f"{what}; replicas that prefill spend {percent(use.use)} of the time encoding them"
    noun = "worker" if use.workers == 1 else "workers"
    return (
        f"{what}; {use.workers} encode {noun} {percent(use.use)} busy; a request waits {seconds(use.wait_mean_s)} for "
        f"its encoding to begin and has its tokens after {seconds(use.mean_s)}, on average"
    )


def shares(parts: Mapping[str, float]) -> str:
    """Shares by name, such as 'measured 91 %, analytic 9 %'."""
    return ", ".join(f"{name} {percent(share)}" for name, share in parts.items())


def routing(stats: RoutingStats, plan: Plan) -> str:
    """Which routing of tokens to experts step times rest on, in a sentence."""
    spread = any(pool.ep > 1 or pool.expert_cache is not None for pool in plan.serving)
    effect = "" if spread else ", of no effect where no replica spreads experts (ep above 1) or leaves some to its host"
    return f"Routing: {stats.source}{effect}."


def maps_of_engine(found: Sequence[Balance], engine: str) -> str | None:
    """What the engine does with a placement that step times rest on; None where it starts from it.

    Releases and options as in planner.export.experts.
    """
    if not engine.startswith("vllm") or all(one.how == "order" for one in found):
        return None
    return (
        "step times rest on where experts are placed; vLLM 0.12 starts with experts in order and rebalances while "
        "serving; sglang and tensorrt-llm start from the map"
    )


def balance(found: Balance, pools: int, source: str) -> str:
    """How busy the busiest expert rank of a pool is, before and after; `source` of the routing, empty for uniform.

    Such as 'Experts placed from counts.json, 32 redundant: busiest rank 2.61x -> 1.01x the mean.'
    """
    how = {"placed": f"placed from {source}", "map": f"as in {found.expert_map}", "order": "in order"}[found.how]
    where = f" of pool {found.pool + 1}" if pools > 1 else ""
    more = f", {found.redundant_experts} redundant" if found.redundant_experts else ""
    if not source:
        return (
            f"Experts{where} {how}{more}. No routing is recorded (--routing): tokens choose all experts alike, which "
            f"gives the busiest rank {found.busiest_over_mean:.2f}x the mean."
        )
    moved = found.how != "order" or found.redundant_experts > 0
    before = f"{found.in_order:.2f}x -> " if moved else ""
    told = f"Experts{where} {how}{more}: busiest rank {before}{found.busiest_over_mean:.2f}x the mean."
    if found.even_for is not None:
        told += f" The map is even over {found.even_for} ranks, for which it may have been made, not for {found.ranks}."
    return told
