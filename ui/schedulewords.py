"""How are the cut and the order of prefill work typed?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar, get_args

from hwmodels.overlap import Overlap
from planner.schedules import DEFAULTS, Schedules
from planner.space import Choices
from simulator.errors import MetricError, SchedulerError
from simulator.limits import parse_limit
from simulator.orders import ORDERS
from ui.questions import MOST_TOKENS, OptionError, numbers

T = TypeVar("T", bound=str)


def schedules(
    chunk_tokens: str | None,
    group_tokens: str | None,
    order: str | None,
    ageing: float | None,
    deadlines: str | None,
    overlap: str | None,
) -> Schedules:
    """What may be varied of schedules, of lists between commas; what was not typed is left at its default.

    Raises OptionError for words that are none of those known, orders without what they need, and what only one order
    heeds without it.

    >>> schedules("256,none", None, "fcfs,shortest", 100.0, None, None).chunk_tokens
    (None, 256)
    """
    fields: dict[str, Any] = {}
    if chunk_tokens is not None:
        words = [word.strip() for word in chunk_tokens.split(",")]
        sizes = [word for word in words if word != "none"]
        fields["chunk_tokens"] = (None,) * ("none" in words)
        if sizes:
            fields["chunk_tokens"] += numbers("--chunk-tokens", ",".join(sizes), MOST_TOKENS)
    if group_tokens is not None:
        fields["group_tokens"] = numbers("--group-tokens", group_tokens, MOST_TOKENS)
    if order is not None:
        fields["orders"] = _some_of("--order", order, ORDERS)
    if ageing is not None:
        fields["ageing_tokens_per_s"] = ageing
    if deadlines is not None:
        fields["deadlines_s"] = tuple(_deadline_s(deadlines, word.strip()) for word in deadlines.split(","))
    if overlap is not None:
        fields["overlaps"] = _some_of("--overlap", overlap, get_args(Overlap))
    if "deadline" in fields.get("orders", ()) and deadlines is None:
        raise OptionError(
            f"--order {order} without --deadlines: expected TTFT aimed at, such as 2s, or 1s,10s by class"
        )
    for option, typed, needed in (("--deadlines", deadlines, "deadline"), ("--ageing", ageing, "shortest")):
        if typed is not None and needed not in fields.get("orders", ()):
            raise OptionError(
                f"{option} {typed} without --order {needed}: no other order heeds it; add that, or leave it out"
            )
    try:
        return replace(Schedules(), **fields)
    except SchedulerError as error:
        raise OptionError(str(error)) from None


def require_heeded(choices: Choices) -> None:
    """Raise OptionError for ways of scheduling that none of the policies and budgets of the choices would heed."""
    asked, policies = choices.schedules, choices.policies
    among = f"with --policy {','.join(policies)}"
    if asked.orders != (DEFAULTS["order"],) and set(policies) == {"static"}:
        raise OptionError(
            f"--order {','.join(asked.orders)} {among}: static batches take requests as they come; add another policy, "
            "or leave it out"
        )
    if asked.group_tokens != (DEFAULTS["group_tokens"],) and "layered" not in policies:
        words = ",".join(map(str, asked.group_tokens))
        raise OptionError(
            f"--group-tokens {words} {among}: layered alone has groups of layers; add it, or leave it out"
        )
    sizes = [tokens for tokens in asked.chunk_tokens if tokens is not None]
    words = ",".join(map(str, sizes))
    if sizes and "chunked" not in policies:
        raise OptionError(f"--chunk-tokens {words} {among}: chunked alone cuts prompts; add it, or leave it out")
    most = max(choices.token_budgets)
    if sizes and min(sizes) >= most:
        raise OptionError(f"--chunk-tokens {words}: expected some below the largest token budget, {most}, or none")


def _deadline_s(text: str, word: str) -> float:
    try:
        return parse_limit("ttft", word).seconds
    except MetricError:
        raise OptionError(
            f"--deadlines {text}: {word!r} found, expected times above 0 with a unit, such as 2s, or 1s,10s by class"
        ) from None


def _some_of(option: str, text: str, known: Sequence[T]) -> tuple[T, ...]:
    """Words of `known` between commas."""
    found = []
    for word in (part.strip() for part in text.split(",")):
        match = next((one for one in known if one == word), None)
        if match is None:
            raise OptionError(f"{option} {text}: {word!r} found, expected some of {', '.join(known)}")
        found.append(match)
    return tuple(dict.fromkeys(found))
