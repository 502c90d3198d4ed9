"""What was asked about KV kept for prompts that begin alike, and what did it save, in words?"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, get_args

from planner.plan import Plan, Pool, PrefixCaching
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

    Raises OptionError for names that are unknown and for what contradicts itself or the plan.
    """
    caching = None if prefix_caching is None else known_caching(prefix_caching)
    if router is not None and router not in ROUTERS:
        raise OptionError(f"--router {router}: expected one of {', '.join(ROUTERS)}")
    pools = tuple(_pool(pool, caching, host_kv_gb, ssd_kv_gb) for pool in plan.pools)
    _check_typed(plan, pools, caching, host_kv_gb, ssd_kv_gb, ssd_gb_per_s)
    found = replace(
        plan,
        pools=pools,
        router=router or plan.router,  # type: ignore[arg-type]
        ssd_gb_per_s=plan.ssd_gb_per_s if ssd_gb_per_s is None else ssd_gb_per_s,
    )
    check_plan(found)
    return found


def _pool(pool: Pool, caching: PrefixCaching | None, host_kv_gb: float | None, ssd_kv_gb: float | None) -> Pool:
    """The pool with what was typed; memory below the device only where prefixes are kept."""
    if pool.role in ("decode", "encode"):
        return pool
    fields: dict[str, Any] = {} if caching is None else {"prefix_caching": caching}
    if (caching or pool.prefix_caching) == "off":
        return replace(pool, **fields, host_kv_gb=None, ssd_kv_gb=None)
    typed = {"host_kv_gb": host_kv_gb, "ssd_kv_gb": ssd_kv_gb}
    fields |= {name: value for name, value in typed.items() if value is not None}
    return replace(pool, **fields)


def _check_typed(
    plan: Plan,
    pools: tuple[Pool, ...],
    caching: PrefixCaching | None,
    host_kv_gb: float | None,
    ssd_kv_gb: float | None,
    ssd_gb_per_s: float | None,
) -> None:
    """Raise OptionError, naming the option, where the `pools` with what was typed contradict themselves."""
    for index, pool in enumerate(pools):
        if caching not in (None, "off") and pool.prefix_caching != "off" and pool.policy == "static":
            raise OptionError(f"--prefix-caching {caching}: expected off, as pools[{index}] of the plan is static")
    sizes = {"--host-kv-gb": host_kv_gb, "--ssd-kv-gb": ssd_kv_gb}
    for option, size in sizes.items():
        if size is not None and all(pool.prefix_caching == "off" for pool in pools):
            raise OptionError(f"{option} {size:g}: expected a plan that keeps prefixes; add --prefix-caching lru")
    if ssd_kv_gb is not None and ssd_gb_per_s is None and plan.ssd_gb_per_s is None:
        raise OptionError(
            f"--ssd-kv-gb {ssd_kv_gb:g}: expected with what a node's disks read and write in GB/s; add --ssd-gb-per-s"
        )
    if ssd_gb_per_s is not None and all(pool.ssd_kv_gb is None for pool in pools):
        raise OptionError(f"--ssd-gb-per-s {ssd_gb_per_s:g}: expected a plan that keeps KV on disks; add --ssd-kv-gb")
    for pool in pools:
        host, ssd = pool.host_kv_gb, pool.ssd_kv_gb
        if host is not None and ssd is not None and ssd < host:
            option = "--host-kv-gb" if ssd_kv_gb is None else "--ssd-kv-gb"
            raise OptionError(
                f"{option} {sizes[option]:g}: expected disks to keep at least what host memory does, of which they "
                f"keep all, not {ssd:g} and {host:g} GB"
            )


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
