"""Ways of serving compared on a terminal: which wins, why, and from which request rate on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from ui.words import in_short, number, percent, seconds

if TYPE_CHECKING:
    from planner.crossover import Strain
    from planner.search import SearchResult


def show_serving(out: Console, result: SearchResult) -> None:
    """The best plan of each way of serving, what holds it down, and the best two over request rates."""
    from ui.rendering import say, show_table

    if not result.families:
        return
    rows = []
    for family in result.families:
        best = family.best
        rows.append(
            [
                family.name,
                in_short(best.plan) if best is not None else f"none: {family.problem}",
                number(best.value) if best is not None else "-",
                number(family.predicted_per_s),
                number(family.rate_per_s),
                str(family.strained_by or "-"),
            ]
        )
    columns = ["serving", "best plan", "value", "predicted/s", "kept/s", "nearest limit"]
    show_table(out, f"Ways of serving ({result.unit}; predicted by the sizing program)", columns, rows, words=2)
    say(
        out,
        "  kept/s: the highest rate offered within the limits; the value counts the whole run, ramp and drain too.",
    )
    for sentence in reasons(result):
        say(out, sentence)
    found = result.crossover
    if found is None:
        return
    names = [family.name for family in result.families if family.best is not None][:2]
    table = [
        [number(a.rate_per_s), _strain(a), seconds(a.mean_e2e_s), _strain(b), seconds(b.mean_e2e_s)]
        for a, b in zip(found.first, found.second, strict=True)
    ]
    columns = ["offered/s", *(f"{name}: {what}" for name in names for what in ("nearest limit", "mean e2e"))]
    show_table(out, "The best two over request rates, and how much of a limit they take", columns, table, words=0)
    say(out, crossing(result), "bold")


def _strain(strain: Strain) -> str:
    return f"{percent(strain.worst)} of {strain.limit.metric} {strain.limit.statistic}"


def reasons(result: SearchResult) -> list[str]:
    """Why the best way of serving wins: what holds each of them down."""
    found = []
    for family in result.families:
        if family.best is None:
            continue
        rate_per_s = family.rate_per_s or 0.0
        text = f"  {family.name}: {number(rate_per_s)} requests/s"
        if family.strained_by is not None:
            text += f", held down by {family.strained_by}"
        if family.predicted_per_s is not None and result.question.objective == "goodput-per-gpu":
            off = family.predicted_per_s / rate_per_s - 1 if rate_per_s else 0.0
            gap = percent(round(family.gap or 0.0, 6))
            text += f"; predicted {number(family.predicted_per_s)}/s with a gap of {gap}"
            if family.held_by:
                text += f", held down by {' and '.join(family.held_by)}"
            if abs(off) > 0.1:
                text += f" ({abs(off):.0%} too {'optimistic' if off > 0 else 'careful'})"
        found.append(text + ".")
    return found


def crossing(result: SearchResult) -> str:
    """Where the less strained way of serving changes."""
    found = result.crossover
    names = [family.name for family in result.families if family.best is not None][:2]
    if found is None or len(names) < 2:
        return "Only one way of serving keeps the limits."
    first, second = names
    ahead = [b.worst < a.worst for a, b in zip(found.first, found.second, strict=True)]
    if not found.crossings:
        nearer = second if ahead[0] else first
        rates = f"{number(found.first[0].rate_per_s)} to {number(found.first[-1].rate_per_s)} requests/s"
        return f"No crossover: from {rates} {nearer} stays further from its limits."
    told = [f"above {number(rate)} requests/s {second if over else first}" for rate, over in found.crossings]
    below = second if not found.crossings[0][1] else first
    return f"Crossover: {below} stays further from its limits at first, {', then '.join(told)}."
