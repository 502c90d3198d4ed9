"""Plans as YAML files: read with one-line errors, written completely or not at all."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hwmodels.hardware import MAX_GPUS
from hwmodels.mapping import DTYPE_BYTES, WEIGHT_FORMATS, weight_bytes
from hwmodels.wholefile import whole_file
from hwmodels.yamlfiles import dumped, plain, shortened
from planner.errors import PlanError
from planner.plan import Plan, Pool
from planner.scheduling import scheduler_of
from simulator.errors import SaveError, SchedulerError

#: Newest layout of a plan file this release reads.
VERSION = 2

_PLAN = TypeAdapter(Plan)
_KEYS = {Plan: list(Plan.__annotations__), Pool: list(Pool.__annotations__)}
_COUNTS = ("replicas", "tp", "pp", "attention_dp", "ep", "expert_tp", "cp")
_FORMATS: dict[str, list[str]] = {
    "weights": list(WEIGHT_FORMATS),
    "experts": list(WEIGHT_FORMATS),
    "activations": list(DTYPE_BYTES),
    "kv": list(DTYPE_BYTES),
}
#: What stands for keys that are no single value.
_SHAPES = {
    "pools": "a list of pools such as [{replicas: 1}]",
    "stages": "a list of layer counts such as [40, 40]",
    "shares": "two numbers such as [0.6, 1.0]",
    "targets_s": "two times in seconds such as [2.0, 0.05]",
    "expert_ladder": "two weight formats such as [bf16, int4]",
    "deadlines_s": "times in seconds such as [1.0, 10.0]",
    "also": "names of profiles with counts such as {l4: 2}",
}
#: What stands for numbers that the command line also knows by a word.
_WORDS = {"expert_cache": "a part of the experts such as 0.25; shardwise plan --expert-cache fit finds the largest"}
#: Bounds of a pool's share of the requests, and of the time to change roles: beyond them sums and clocks lose digits.
_SHARE, _ROLE_SWITCH_S = (1e-9, 1e9), 1e6
_LIMITS = ("max_seqs", "token_budget", "block_tokens", "max_context_tokens", "batch_tiles")


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a YAML file; PlanError names the file, the key, its value and what was expected."""
    source = os.fspath(path)
    data = _load(source)
    version = data.get("version", VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise PlanError(f"{source}: version is {version!r}, expected 1 to {VERSION}; plan again or update shardwise")
    try:
        # JSON in between: strict (no "8" for 8, no yes for 1), yet lists may stand for tuples.
        plan = _PLAN.validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise PlanError(f"{source}: {_first(error)}") from None
    check_plan(plan, source)
    return plan


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan as YAML; the file appears complete or, with SaveError, not at all."""
    check_plan(plan)
    target = Path(path)
    text = dumped(_PLAN.dump_python(plan, mode="json"))
    try:
        with whole_file(target) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(
            f"{target}: cannot be written ({error.strerror}), expected a writable folder; choose another path"
        ) from None


def check_plan(plan: Plan, source: str = "plan") -> None:
    """Raise PlanError, its text starting with `source`, unless the plan could be launched on some cluster."""
    problem = next(_problems(plan), None)
    if problem is not None:
        raise PlanError(f"{source}: {problem}")


def _problems(plan: Plan) -> Iterator[str]:
    for key in ("model", "hardware", "engine", "encoder"):
        value = getattr(plan, key)
        if (key, value) != ("encoder", None) and (not value or not value.isprintable()):
            yield f"{key} is {value!r}, expected a name or a path of printable characters"
    if plan.gpus < 1:
        yield f"gpus is {plan.gpus}, expected at least 1"
    if plan.gpus > MAX_GPUS:
        yield f"gpus is {plan.gpus}, expected at most {MAX_GPUS}"
    if not plan.pools:
        yield "pools is empty, expected at least one pool of replicas"
    for index, pool in enumerate(plan.pools):
        for problem in _pool_problems(pool):
            yield f"pools[{index}].{problem}"
    if plan.role_switch_s is not None and not 0 <= plan.role_switch_s <= _ROLE_SWITCH_S:
        yield f"role_switch_s is {plan.role_switch_s}, expected a finite time of at least 0 and at most 1e6"
    for name, gpus in plan.also.items():
        if not name or not name.isprintable():
            yield f"also has the name {name!r}, expected a name or a path of printable characters"
        if gpus < 1 or name == plan.hardware:
            yield f"also[{name!r}] is {gpus}, expected at least 1 device of another profile than hardware"
        if gpus > MAX_GPUS:
            yield f"also[{name!r}] is {gpus}, expected at most {MAX_GPUS} devices"
    for name, gpus in plan.devices.items():
        used = sum(pool.gpus for pool in plan.pools if plan.hardware_of(pool) == name)
        if used > gpus:
            key = "gpus" if name == plan.hardware else f"also[{name!r}]"
            yield f"{key} is {gpus}, expected at least the {used} its pools hold; raise it or take replicas away"
    for index, pool in enumerate(plan.pools):
        if plan.hardware_of(pool) not in plan.devices:
            yield f"pools[{index}].hardware is {pool.hardware!r}, expected one of {', '.join(plan.devices)}"
    roles = {pool.role for pool in plan.pools}
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        if role in roles and not roles & {other, "mixed"}:
            yield f"pools have role {role} but none has {other} or mixed, expected a pool of that role"
    yield from _encode_problems(plan)
    disks = next((index for index, pool in enumerate(plan.pools) if pool.ssd_kv_gb is not None), None)
    if disks is not None and plan.ssd_gb_per_s is None:
        yield f"ssd_gb_per_s is None, expected what a node's disks read and write in GB/s with pools[{disks}].ssd_kv_gb"
    if plan.ssd_gb_per_s is not None and not (isfinite(plan.ssd_gb_per_s) and plan.ssd_gb_per_s > 0):
        yield f"ssd_gb_per_s is {plan.ssd_gb_per_s}, expected a finite number above 0"


def _encode_problems(plan: Plan) -> Iterator[str]:
    encode = [index for index, pool in enumerate(plan.pools) if pool.role == "encode"]
    if not encode:
        for index, pool in enumerate(plan.pools):
            if plan.encoder is not None and pool.sharing is not None:
                yield f"pools[{index}].sharing is {pool.sharing!r}, expected None with an encoder and no encode pool"
        return
    if plan.encoder is None:
        yield f"pools[{encode[0]}].role is 'encode' but encoder is null, expected a vision encoder's name or profile"
    if len(encode) > 1:
        yield f"pools[{encode[1]}].role is 'encode' like that of pools[{encode[0]}], expected one such pool at most"
    if not plan.serving:
        yield "pools have role encode only, expected a pool of replicas too"
    for key in _COUNTS[1:]:
        value = getattr(plan.pools[encode[0]], key)
        if value != 1:
            yield f"pools[{encode[0]}].{key} is {value}, expected 1 with role encode: its workers have one device each"


def _pool_problems(pool: Pool) -> Iterator[str]:
    for key in _COUNTS + _LIMITS:
        if getattr(pool, key) < 1:
            yield f"{key} is {getattr(pool, key)}, expected at least 1"
    for key, known in _FORMATS.items():
        value = getattr(pool, key)
        if value not in known and (key, value) != ("experts", None):
            yield f"{key} is {value!r}, expected one of {', '.join(known)}"
    if pool.hardware is not None and (not pool.hardware or not pool.hardware.isprintable()):
        yield f"hardware is {pool.hardware!r}, expected a profile's name or path, or null for the plan's"
    if pool.share is not None and not _SHARE[0] <= pool.share <= _SHARE[1]:
        yield f"share is {pool.share}, expected a finite number above 0, from {_SHARE[0]:g} to {_SHARE[1]:g}"
    yield from _sharing_problems(pool)
    yield from _caching_problems(pool)
    yield from _expert_problems(pool)
    if pool.stages is not None and (len(pool.stages) != pool.pp or min(pool.stages, default=0) < 1):
        yield f"stages is {list(pool.stages)}, expected {pool.pp} layer counts (one per stage) of at least 1"
    ranks = pool.tp * pool.cp * pool.attention_dp
    if (pool.ep > 1 or pool.expert_tp > 1) and pool.ep * pool.expert_tp != ranks:
        what = "tp * attention_dp" if pool.cp == 1 else "tp * cp * attention_dp"
        yield f"ep is {pool.ep}, expected ep * expert_tp ({pool.expert_tp}) to equal {what} ({ranks})"
    if pool.cp == 1 and pool.cp_kind != "ring":
        yield f"cp_kind is {pool.cp_kind!r}, expected 'ring' with cp 1, or cp above 1"
    yield from _slot_problems(pool)
    if pool.spread is not None and not 1 <= pool.spread <= pool.replicas:
        yield f"spread is {pool.spread}, expected 1 to replicas ({pool.replicas})"
    if pool.policy == "chunked" and pool.max_seqs > pool.token_budget:
        yield f"max_seqs is {pool.max_seqs}, expected at most token_budget ({pool.token_budget}) with policy chunked"
    elif pool.max_seqs <= pool.token_budget:
        try:
            scheduler_of(pool)
        except SchedulerError as error:
            yield str(error).replace("targets_s", "deadlines_s")
    if pool.policy == "layered" and (pool.pp > 1 or pool.attention_dp > 1):
        where = f"pp is {pool.pp}" if pool.pp > 1 else f"attention_dp is {pool.attention_dp}"
        yield (
            f"policy is 'layered', expected another where {where}: layers pass in groups on one stage and one "
            "attention group"
        )
    elif pool.policy == "layered" and pool.role != "aggregated":
        yield f"policy is 'layered', expected chunked with role {pool.role}: groups of layers pass beside own decodes"


def _slot_problems(pool: Pool) -> Iterator[str]:
    if pool.redundant_experts < 0:
        yield f"redundant_experts is {pool.redundant_experts}, expected at least 0"
    if pool.redundant_experts > 0 and pool.ep == 1:
        yield f"redundant_experts is {pool.redundant_experts}, expected 0 with ep 1: no other rank would take tokens"
    if pool.expert_map is not None:
        if not pool.expert_map or not pool.expert_map.isprintable():
            yield f"expert_map is {pool.expert_map!r}, expected a path of printable characters, or null"
        if pool.ep == 1:
            yield f"expert_map is {pool.expert_map!r}, expected null with ep 1: every rank has all experts"


def _caching_problems(pool: Pool) -> Iterator[str]:
    if pool.prefix_caching != "off" and pool.policy == "static":
        yield f"prefix_caching is {pool.prefix_caching!r}, expected 'off' with policy static"
    for key in ("host_kv_gb", "ssd_kv_gb"):
        value = getattr(pool, key)
        if value is None:
            continue
        if not (isfinite(value) and value >= 0):
            yield f"{key} is {value}, expected a finite number of at least 0"
        if pool.prefix_caching == "off":
            yield f"{key} is {value}, expected None with prefix_caching 'off': nothing would be looked for there"
    if pool.ssd_kv_gb is not None and pool.host_kv_gb is not None and pool.ssd_kv_gb < pool.host_kv_gb:
        yield f"ssd_kv_gb is {pool.ssd_kv_gb}, expected at least host_kv_gb ({pool.host_kv_gb}), all of which it keeps"


def _expert_problems(pool: Pool) -> Iterator[str]:
    if pool.expert_cache is None:
        for key, default in (("expert_ladder", None), ("cpu_threads", 0), ("host", None)):
            if getattr(pool, key) != default:
                yield f"{key} is {getattr(pool, key)!r}, expected {default} without expert_cache, which is None"
        return
    if not 0 < pool.expert_cache <= 1:
        yield f"expert_cache is {pool.expert_cache}, expected a part of the experts above 0 and at most 1"
    for key, value in (("ep", pool.ep), ("attention_dp", pool.attention_dp), ("cp", pool.cp)):
        if value > 1:
            yield f"{key} is {value}, expected 1 with expert_cache: experts spread over ranks are all on devices"
    for key, none in (("sharing", pool.sharing), ("role", "encode" if pool.role == "encode" else None)):
        if none is not None:
            yield f"{key} is {none!r}, expected another with expert_cache, or expert_cache None"
    if pool.cpu_threads < 0:
        yield f"cpu_threads is {pool.cpu_threads}, expected at least 0"
    if pool.host is not None and (not pool.host or not pool.host.isprintable()):
        yield f"host is {pool.host!r}, expected a processor's profile or path, or null for the usual one"
    if pool.expert_ladder is None:
        return
    first, ladder = pool.experts or pool.weights, list(pool.expert_ladder)
    if len(ladder) != 2 or any(name not in WEIGHT_FORMATS for name in ladder):
        yield f"expert_ladder is {ladder}, expected two of {', '.join(WEIGHT_FORMATS)}: thresholds are known for two"
    elif ladder[0] != first or weight_bytes(ladder[1]) >= weight_bytes(first):
        yield f"expert_ladder is {ladder}, expected {first}, the experts' format, and then a narrower one"


def _sharing_problems(pool: Pool) -> Iterator[str]:
    if pool.sharing is None:
        if pool.shares is not None or pool.targets_s is not None:
            yield "sharing is None, expected static, semi-pd or nexus where there are shares or targets_s"
        return
    for key, usual in (("overlap", "none"), ("chunk_tokens", None), ("order", "fcfs")):
        if getattr(pool, key) != usual:
            yield f"{key} is {getattr(pool, key)!r}, expected {usual!r} with sharing {pool.sharing!r}"
    whole = pool.pp == pool.attention_dp == pool.cp == 1
    if pool.policy != "chunked" or pool.role != "aggregated" or not whole:
        yield (
            f"sharing is {pool.sharing!r}, expected None unless policy is chunked, role aggregated, pp, attention_dp "
            "and cp 1"
        )
    if pool.sharing == "static" and pool.shares is None:
        yield "shares is None, expected the parts of prefill and decode, such as [0.6, 1.0], with sharing static"
    if pool.sharing == "semi-pd" and pool.targets_s is None:
        yield "targets_s is None, expected TTFT and TPOT in seconds, such as [2.0, 0.05], with sharing semi-pd"
    if pool.shares is not None and not all(0 < share <= 1 for share in pool.shares):
        yield f"shares is {list(pool.shares)}, expected two parts above 0 and at most 1"
    if pool.targets_s is not None and not all(isfinite(value) and value > 0 for value in pool.targets_s):
        yield f"targets_s is {list(pool.targets_s)}, expected two finite times above 0"


def _load(source: str) -> dict[str, Any]:
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"{source}: cannot be read ({error.strerror}), expected a plan file; write one with shardwise plan --save"
        ) from None
    except UnicodeDecodeError:
        raise PlanError(f"{source}: is not UTF-8 text, expected a plan file in YAML") from None
    try:
        data = plain(text)
    except ValueError as error:
        told = shortened(str(error))
        keys = "expected a word" in told
        way_out = "; give each key once, and in quotes where it is a number" if keys else ", expected YAML"
        raise PlanError(f"{source}: {told}{way_out}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        kind = "empty" if data is None else "not a mapping of names"
        raise PlanError(f"{source}: is {kind}, expected keys such as {', '.join(_KEYS[Plan][:4])}")
    return data


def _first(error: ValidationError) -> str:
    """The first thing pydantic found wrong, as `key is value, expected ...`."""
    detail = error.errors(include_url=False)[0]
    location = detail["loc"]
    keys = [part for part in location if isinstance(part, str)]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if keys[:1] == ["also"] and len(location) > 1:
        name = f"also[{location[1]!r}]"
    kind, value = detail["type"], detail.get("input")
    shown = shortened(repr(value), 60)
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        known = _KEYS[Pool if location[0] == "pools" and len(location) > 1 else Plan]
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{name} is an unknown key (value {shown}), expected one of {', '.join(known)}{hint}"
    if kind == "missing" and keys and location[-1] != keys[-1]:  # an item of a list that is too short
        return f"{name.rpartition('[')[0]} is {shown}, expected {_SHAPES.get(keys[-1], 'more items')}"
    if kind in {"tuple_type", "dict_type", "too_long", "too_short"} and keys and location[-1] == keys[-1] in _SHAPES:
        return f"{name} is {shown}, expected {_SHAPES[keys[-1]]}"
    if kind == "dataclass_type":
        return f"{name} is {shown}, expected keys such as {', '.join(_KEYS[Pool][:4])}"
    if kind in {"missing", "missing_argument"}:
        return f"{name} is missing, expected {', '.join(_KEYS[Pool if 'pools' in location else Plan])}"
    message = _WORDS.get(str(location[-1])) or detail["msg"].removeprefix("Input should be ").rstrip(".")
    return f"{name} is {shown}, expected {message}"
