"""From what was typed to what is asked: options into requests, limits and a Question."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import get_args

from hwmodels.errors import ShardwiseError
from hwmodels.hardware import MAX_GPUS, Device, load_cluster
from hwmodels.huggingface import load_model, stored_weights
from hwmodels.mapping import DTYPE_BYTES, WEIGHT_FORMATS, Precision
from hwmodels.yamlfiles import is_path, shortened
from planner import Plan, Question
from planner.catalogue import Catalogue, format_problem, open_catalogue
from planner.errors import PlanError
from planner.offloadchoices import AwayChoices
from planner.offloading import HOST, Away, devices_of_a_node, processor
from planner.plan import PrefixCaching
from planner.planfile import read_plan
from planner.schedules import Schedules
from planner.space import Choices
from simulator.limits import Limit, parse_limit
from simulator.policies import Policy
from simulator.traces import read_trace
from simulator.workload import Requests, load_profile, synthesize

#: What `shardwise plan` asks where nothing else is said.
MODEL, HARDWARE, GPUS, WORKLOAD, REQUESTS, RATE_PER_S = (
    "llama-3.1-70b", "h100-sxm", 16, "azure-conversation-2023", 10_000, 8.0,
)  # fmt: skip
LIMITS: dict[str, str | None] = {"ttft": "p99=2s", "tpot": "p99=50ms", "e2e": None}

#: Largest step that is tabulated; beyond it the tables of one plan take gigabytes.
MOST_TOKENS, MOST_SEQS = 2**18, 2**14


class OptionError(ShardwiseError):
    """Options that cannot be meant together, or not in this form."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Traffic:
    """Where requests come from: a recorded trace or else a workload profile; `count` None for as many as is usual."""

    trace: Path | None = None
    workload: str | None = None
    count: int | None = None
    drop_empty: bool = False

    def __post_init__(self) -> None:
        if self.trace is not None and self.workload is not None:
            raise OptionError(f"--trace {self.trace} and --workload {self.workload}: expected one of them")
        if self.count is not None and self.count < 1:
            raise OptionError(f"--requests {self.count}: expected at least 1")

    @property
    def name(self) -> str:
        """What the traffic is called in answers."""
        return str(self.trace) if self.trace is not None else self.workload or WORKLOAD

    def requests(self, seed: int, rate_per_s: float | None = None) -> Requests:
        """The requests; a trace as recorded and repeated where more are wanted than it has, a profile drawn anew."""
        if self.trace is None:
            found = synthesize(load_profile(self.name), self.count or REQUESTS, seed=seed)
        else:
            recorded = read_trace(self.trace, drop_empty=self.drop_empty)
            found = recorded.head(REQUESTS) if self.count is None else recorded.take(self.count)
        return found if rate_per_s is None else found.scaled_to_rate(rate_per_s)


def limits(asked: dict[str, str | None], usual: dict[str, str | None]) -> tuple[Limit, ...]:
    """The limits typed as ttft, tpot, itl and e2e; `usual` where none is; 'none' means no limit."""
    chosen = asked if any(text is not None for text in asked.values()) else usual
    return tuple(
        parse_limit(metric, text) for metric, text in chosen.items() if text is not None and text.strip() != "none"
    )


def numbers(option: str, text: str, most: int) -> tuple[int, ...]:
    """Whole numbers between commas, ascending."""
    found = set()
    for word in text.split(","):
        try:
            number = int(word)
        except ValueError:
            number = 0
        if not 1 <= number <= most:
            raise OptionError(
                f"{option} {text}: {word!r} found, expected whole numbers from 1 to {most}, such as 512,2048"
            )
        found.add(number)
    return tuple(sorted(found))


def devices(hardware: str, gpus: int | None) -> dict[str, int]:
    """The devices at hand from `h100-sxm` with --gpus, or from a list such as `h100-sxm:16,a100-80-sxm:16`."""
    found: dict[str, int] = {}
    # What follows the last colon is a count, unless it is the rest of a path.
    listed = "," in hardware or (":" in hardware and not is_path(hardware.rpartition(":")[2]))
    if not listed:
        return {hardware: GPUS if gpus is None else gpus}
    if gpus is not None:
        raise OptionError(f"--hardware {hardware} with --gpus {gpus}: expected the counts in one place")
    for word in hardware.split(","):
        name, _, count = word.strip().rpartition(":")
        whole = count.isascii() and count.isdecimal() and len(count) <= 9
        if not name or name in found or not whole or not 1 <= int(count) <= MAX_GPUS:
            raise OptionError(
                f"--hardware {shortened(hardware, 80)}: {shortened(word, 40)!r} found, expected different names with "
                f"counts from 1 to {MAX_GPUS}, such as h100-sxm:16,a100-80-sxm:16"
            )
        found[name] = int(count)
    return found


def policies(text: str) -> tuple[Policy, ...]:
    """Scheduling policies between commas."""
    found: list[Policy] = []
    for word in (part.strip() for part in text.split(",")):
        known = next((policy for policy in get_args(Policy) if policy == word), None)
        if known is None:
            raise OptionError(f"--policy {text}: {word!r} found, expected some of {', '.join(get_args(Policy))}")
        found.append(known)
    return tuple(dict.fromkeys(found))


def formats(
    device: Device,
    weights: str | None,
    activations: str | None,
    kv: str | None,
    experts: str | None = None,
    released: str | None = None,
) -> tuple[Precision, ...]:
    """Every combination of the formats between commas; by default 16 bit where the device has it.

    released   format of the model's checkpoint, None for 16 bit: what weights are kept and multiplied in where nothing
               else is typed
    """
    native = next((f for f in ("bf16", "fp16", "fp32", "int8", "fp8") if f in device.peak_flops_per_s), "bf16")
    lists: list[list[str | None]] = []
    stored, computed = list(WEIGHT_FORMATS), list(DTYPE_BYTES)
    arithmetic = native if released is None else WEIGHT_FORMATS[released][1] or native
    as_released = weights is None and activations is None and arithmetic in device.peak_flops_per_s
    for option, text, known, default in (
        ("--weights", weights, stored, released if as_released and released is not None else native),
        ("--activations", activations, computed, arithmetic if as_released else native),
        ("--kv", kv, computed, native),
        ("--experts", experts, stored, None),
    ):
        if text is None:
            lists.append([default])
            continue
        words = list(dict.fromkeys(word.strip() for word in text.split(",")))
        for word in words:
            if word not in known:
                raise OptionError(f"{option} {text}: {word!r} found, expected some of {', '.join(known)}")
        lists.append([*words])
    return tuple(Precision(w or native, a or native, k or native, e) for w, a, k, e in itertools.product(*lists))


def choices(
    question_hardware: str,
    gpus: int,
    *,
    weights: str | None,
    activations: str | None,
    kv: str | None,
    experts: str | None,
    policy: str | None,
    token_budget: str | None,
    max_seqs: str | None,
    prefix_caching: PrefixCaching | None = None,
    away: AwayChoices | None = None,
    schedules: Schedules | None = None,
    model: str | None = None,
    also: Iterable[str] = (),
) -> Choices:
    """What the search may vary; what was not typed is left at its default.

    model   whose checkpoint's format is the default where all devices, also those of `also`, multiply in it
    """
    cluster = load_cluster(question_hardware, gpus)
    released = None if model is None else stored_weights(model)
    others = (load_cluster(name, 1).device for name in also)
    if released is not None and any(WEIGHT_FORMATS[released][1] not in one.peak_flops_per_s for one in others):
        released = None
    every = formats(cluster.device, weights, activations, kv, experts, released)
    legal = tuple(precision for precision in every if format_problem(cluster, precision) is None)
    found = Choices(precisions=legal or every, away=away)
    if policy is not None:
        found = replace(found, policies=policies(policy))
    if token_budget is not None:
        found = replace(found, token_budgets=numbers("--token-budget", token_budget, MOST_TOKENS))
    if max_seqs is not None:
        found = replace(found, max_seqs=numbers("--max-seqs", max_seqs, MOST_SEQS))
    if prefix_caching is not None:
        found = replace(found, prefix_caching=prefix_caching)
    return found if schedules is None else replace(found, schedules=schedules)


def away(cache: str | None, ladder: str | None, threads: str | None, host: str | None) -> AwayChoices | None:
    """What may be varied where experts are not all on devices; None where nothing was typed.

    >>> away("0.5,0.25", None, "0,16", None)
    AwayChoices(caches=(0.25, 0.5), ladder=None, threads=(0, 16), host=None, pipelines=True)
    """
    if cache is None and ladder is None and threads is None and host is None:
        return None
    caches: set[float] = set()
    for word in () if cache is None or cache.strip() == "fit" else cache.split(","):
        try:
            part = float(word)
        except ValueError:
            part = 0.0
        if not 0 < part <= 1:
            raise OptionError(
                f"--expert-cache {cache}: {word!r} found, expected 'fit', or parts of the experts above 0 and at most 1"
            )
        caches.add(part)
    formats_typed = None if ladder is None else tuple(word.strip() for word in ladder.split(","))
    if formats_typed is not None and (len(formats_typed) != 2 or any(f not in WEIGHT_FORMATS for f in formats_typed)):
        raise OptionError(f"--expert-ladder {ladder}: expected two of {', '.join(WEIGHT_FORMATS)}, such as bf16,int4")
    words = ["0"] if threads is None else [word.strip() for word in threads.split(",")]
    if not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        raise OptionError(f"--cpu-threads {threads}: expected whole numbers of at least 0, such as 0,16")
    return AwayChoices(tuple(sorted(caches)), formats_typed, tuple(sorted({int(word) for word in words})), host)


def check_experts(
    model: str, typed: Mapping[str, object], hardware: str, gpus: int, away: AwayChoices | None = None
) -> None:
    """Raise OptionError for options about experts of a dense model, and for more threads than a host has cores.

    typed   such options with what was typed, None for nothing

    PlanError and ProfileError for a host that is no processor.
    """
    shape = load_model(model)
    strange = next((option for option, value in typed.items() if value is not None), None)
    if not shape.is_moe and strange is not None:
        raise OptionError(f"{strange} {typed[strange]}: {shape.name} is dense; leave {strange} out")
    if away is None:
        return
    host, node = Away(1.0, host=away.host or HOST), devices_of_a_node(load_cluster(hardware, gpus))
    cores = processor(host).compute_units
    if max(away.threads) > cores // node:
        raise OptionError(
            f"--cpu-threads {typed.get('--cpu-threads')}: {max(away.threads)} found, expected at most {cores // node} "
            f"for each of {node} device(s) of a node: {host.host} has {cores} cores"
        )


def check_rate(question: Question) -> None:
    """Raise PlanError where the traffic has no rate of its own that could be demanded."""
    if question.objective != "goodput-per-gpu" and not isfinite(question.demanded_per_s):
        raise PlanError(
            f"rate of {len(question.requests)} request(s): expected two or more that arrive apart; give --rate"
        )


def located(model: str) -> str:
    """A model's name as it is, a path made absolute, so that a saved plan can be used from any folder."""
    return str(Path(model).resolve()) if model.endswith(".json") or "/" in model else model


def told(path: Path | None) -> str | None:
    """A file that was typed, as text."""
    return None if path is None else str(path)


def opened(path: Path, cost: str = "calibrated", routing: Path | None = None) -> tuple[Plan, Catalogue]:
    """A plan file and what its plan is made of; raises a ShardwiseError for one that cannot be simulated.

    routing   a file of recorded routing; None for uniform routing
    """
    plan = read_plan(path)
    maps = None
    if any(pool.expert_map is not None for pool in plan.pools):
        from planner.placementfiles import expert_maps  # and its solvers: only where there is a map

        maps = expert_maps(plan, path.parent, load_model(plan.model))
    catalogue = open_catalogue(
        plan.model, plan.hardware, plan.gpus, plan.engine, cost, plan.also, routing=told(routing), maps=maps
    )
    for index, pool in enumerate(plan.pools):
        most = {
            "token_budget": MOST_TOKENS, "max_seqs": MOST_SEQS, "max_context_tokens": catalogue.model.max_context_tokens
        }  # fmt: skip
        for key, value in most.items():
            if getattr(pool, key) > value:
                raise PlanError(f"{path}: pools[{index}].{key} is {getattr(pool, key)}, expected at most {value}")
    return plan, catalogue
