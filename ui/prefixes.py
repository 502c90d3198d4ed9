"""What was asked about KV kept for prompts that begin alike, and what did it save, in words?"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, get_args

from planner.plan import Plan, PrefixCaching
from planner.planfile import check_plan
from simulator.routers import ROUTERS
from ui.questions import OptionError
from ui.words import number, percent, scaled, seconds

if TYPE_CHECKING:
    from simulator.reuse import CacheUse


def known_caching(name: str) -> PrefixCaching:
    """The name, if it is one of a way of keeping prefixes; raises OptionError."""
    found = next((known for known in get_args(PrefixCaching) if known == name), None)
    if found is None:
        raise OptionError(f"--prefix-caching {name}: expected one of {', '.join(get_args(PrefixCaching))}")
    return found  # type: ignore[no-any-return]


def changed(
    plan: Plan,
    prefix_caching: str | None,
    router: str | None,
    host_kv_gb: float | None,
    ssd_kv_gb: float | None,
    ssd_gb_per_s: float | None,
) -> Plan:
    """The plan with what was typed in place of its own; pools that compute no prompts keep no prefixes.

    Raises OptionError for names that are unknown, PlanError for what contradicts itself.
    """
    typed: dict[str, Any] = {"host_kv_gb": host_kv_gb, "ssd_kv_gb": ssd_kv_gb}
    typed["prefix_caching"] = None if prefix_caching is None else known_caching(prefix_caching)
    fields = {name: value for name, value in typed.items() if value is not None}
    if prefix_caching == "off":
        fields = {"host_kv_gb": None, "ssd_kv_gb": None, **fields}
    if router is not None and router not in ROUTERS:
        raise OptionError(f"--router {router}: expected one of {', '.join(ROUTERS)}")
    pools = tuple(pool if pool.role in ("decode", "encode") else replace(pool, **fields) for pool in plan.pools)
    found = replace(
        plan,
        pools=pools,
        router=router or plan.router,  # type: ignore[arg-type]
        ssd_gb_per_s=plan.ssd_gb_per_s if ssd_gb_per_s is None else ssd_gb_per_s,
    )
    check_plan(found)
    return found


def note_on(plan: Plan, *, hashed: bool) -> str | None:
    """What is odd about prefix caching or its absence; None if nothing is.

    hashed   whether it is known which prompts of the traffic begin alike
    """
    caching = any(pool.prefix_caching != "off" for pool in plan.serving)
    if caching and not hashed:
        return "the traffic does not say which prompts begin alike (block hashes), so that none is found cached"
    if plan.router == "prefix-aware" and not (caching and hashed):
        return "router prefix-aware with nothing cached: it looks at outstanding tokens alone"
    return None


def in_words(use: CacheUse) -> str:
    """What caching saved, such as 'Prefix caching: 40 % of 1,200,000 prompt tokens found cached, ...'."""
    text = (
        f"Prefix caching: {percent(use.hit_rate)} of {number(use.prompt_tokens)} prompt tokens found cached, "
        f"{number(use.found_tokens)} in device memory"
    )
    if use.links:
        text += (
            f" and {number(use.loaded_tokens)} below, in {use.loads:,} loads of {seconds(use.load_mean_s)} on average; "
            f"{scaled(use.stored_bytes, 'B')} written there, {scaled(use.loaded_bytes, 'B')} loaded"
        )
    return text + "."


def as_object(use: CacheUse | None) -> dict[str, Any] | None:
    """For JSON: links nothing went over are left out."""
    if use is None:
        return None
    used = [dict(zip(("name", "bytes_per_s", "carried_bytes"), link, strict=True)) for link in use.links if link[2]]
    return {**asdict(use), "hit_rate": use.hit_rate, "links": used}
