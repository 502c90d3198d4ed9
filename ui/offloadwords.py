"""How is it told what of the experts devices hold, how often that is enough, and where the time of the others goes?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.catalogue import Catalogue, mapping_of, precision_of
from planner.fit import nothing_fits
from planner.offloading import away_of, formats, host_of
from ui.rendering import say, show_table
from ui.words import percent, scaled, seconds

if TYPE_CHECKING:
    from rich.console import Console

    from planner.plan import Plan
    from planner.question import Question

#: Steps of so many tokens are told: one sequence, several, and a prompt.
TOKENS = (1, 16, 1024)
WORKING = {"gpu": "device", "link": "host link", "cpu": "host CPU", "ssd": "SSD"}


def experts_away(catalogue: Catalogue, plan: Plan) -> list[dict[str, Any]]:
    """What JSON says of every pool some of whose experts are not on its devices.

    by_tokens   of steps: seconds of a layer's experts and with all of them on devices, the part of a step's experts
                that is there, bytes a device loads for a layer, part of the time each side works, tokens by format
    """
    found = []
    for index, pool in enumerate(plan.pools):
        away = away_of(pool, plan.ssd_gb_per_s)
        if away is None:
            continue
        own, mapping, precision = catalogue.of(pool), mapping_of(pool), precision_of(pool)
        layers = own.away_layers(mapping, precision, away)
        names = [*formats(precision, away), "left out"]
        steps = {}
        for tokens in TOKENS:
            at = np.array([float(tokens)])
            layer_s = float(layers.at(layers.layer_s, at)[0])
            steps[str(tokens)] = {
                "layer_s": layer_s,
                "resident_s": float(layers.at(layers.resident_s, at)[0]),
                "hit_rate": float(layers.at(layers.hit_rate, at)[0]),
                "loaded_bytes": float(layers.at(layers.loaded_bytes, at)[0]),
                "busy": {name: float(layers.at(row, at)[0]) / layer_s for name, row in layers.busy_s.items()},
                "formats": {
                    name: float(layers.at(row, at)[0]) for name, row in zip(names, layers.level_share.T, strict=True)
                },
            }
        part = host_of(own.cluster, mapping, away)
        found.append(
            {
                "pool": index,
                "expert_cache": away.cache,
                "cpu_threads": away.threads,
                "host": away.host,
                "host_memory_bytes": part.memory_bytes,
                "by_tokens": steps,
            }
        )
    return found


def note_on(question: Question, catalogue: Catalogue, plan: Plan) -> str | None:
    """What it would take to hold all experts on devices, where nobody asked for less; None where they are there."""
    if question.choices.away is not None or all(pool.expert_cache is None for pool in plan.pools):
        return None
    longest = int((question.requests.prompt_tokens + question.requests.output_tokens).max())
    return f"{nothing_fits(question, catalogue, longest)}; until then some experts are left to the host"


def show_experts_away(out: Console, found: Sequence[Mapping[str, Any]], pools: int) -> None:
    """The same as a table for each pool."""
    for one in found:
        where = f" of pool {one['pool'] + 1}" if pools > 1 else ""
        who = f"computed by {one['cpu_threads']} threads a device, or loaded" if one["cpu_threads"] else "loaded"
        kept = f"{percent(one['expert_cache'])} on devices, the others in the memory of {one['host']}"
        columns = ["tokens in a step", "found", "loaded a layer", "time a layer", "all on devices", "at work"]
        rows = []
        for tokens, step in one["by_tokens"].items():
            busy = [f"{WORKING[name]} {percent(part)}" for name, part in step["busy"].items() if part > 0]
            times = seconds(step["layer_s"]), seconds(step["resident_s"])
            rows.append([tokens, percent(step["hit_rate"]), scaled(step["loaded_bytes"], "B"), *times, ", ".join(busy)])
        show_table(out, f"Experts{where}: {kept}, {who}", columns, rows, words=0)
        if one["cpu_threads"]:
            say(out, "  Energy and cost are those of the devices; the host's are not counted.")
        lower = one["by_tokens"]["1"]["formats"]
        if len(lower) > 2:
            parts = ", ".join(f"{percent(share)} {name}" for name, share in lower.items())
            say(out, f"  Of a token's choices: {parts}; what that does to answers is not modelled.")
