"""How is context parallelism typed?"""

from __future__ import annotations

from dataclasses import replace

from numpy.typing import ArrayLike

from hwmodels.contextkinds import KINDS
from planner.space import Choices, long_context, powers_of_two
from ui.questions import OptionError
from ui.schedulewords import require_heeded

#: Steps that several ranks for each sequence are tried with too, since each of them has a part of a step only.
LARGE_STEPS = (16_384, 32_768, 65_536)


def with_context(
    found: Choices,
    cp: str | None,
    cp_kind: str | None,
    *,
    prompt_tokens: ArrayLike,
    gpus: int,
    token_budget: str | None = None,
) -> Choices:
    """The choices with the degrees and kinds of context parallelism that were typed; as they were where none were.

    They are complete then, so that ways of scheduling that none of them heeds are refused here too.

    cp             numbers between commas, or auto: powers of two where the 99th percentile of `prompt_tokens` is long
                   or where nothing fits otherwise
    gpus           all devices at hand, which no degree exceeds
    token_budget   what was typed of the tokens in a step; None: with several ranks larger steps are looked at too

    Raises OptionError for anything else, and for kinds without degrees above 1.

    >>> with_context(Choices(), "2,4", "ulysses", prompt_tokens=[1], gpus=8).cp_kinds
    ('ulysses',)
    """
    chosen = _chosen(found, cp, cp_kind, prompt_tokens, gpus, token_budget)
    require_heeded(chosen)
    return chosen


def _chosen(
    found: Choices, cp: str | None, cp_kind: str | None, prompt_tokens: ArrayLike, gpus: int, token_budget: str | None
) -> Choices:
    if cp is None:
        if cp_kind is not None:
            raise OptionError(f"--cp-kind {cp_kind} without --cp: expected degrees such as --cp 1,2,4, or --cp auto")
        return found
    if cp.strip() == "auto":
        degrees = powers_of_two(gpus) if long_context(prompt_tokens) else None
    else:
        degrees = _degrees(cp, gpus)
    if cp_kind is not None:
        if degrees == (1,) and cp.strip() != "auto":
            raise OptionError(f"--cp-kind {cp_kind} with --cp {cp}: expected degrees above 1 too, such as --cp 1,2,4")
        words = [word.strip() for word in cp_kind.split(",")]
        kinds = tuple(kind for kind in KINDS if kind in words)
        strange = next((word for word in words if word not in KINDS), None)
        if strange is not None:
            raise OptionError(f"--cp-kind {cp_kind}: {strange!r} found, expected some of {', '.join(KINDS)}")
        found = replace(found, cp_kinds=kinds)
    if token_budget is None and degrees != (1,):
        larger = tuple(tokens for tokens in LARGE_STEPS if tokens not in found.token_budgets)
        every = tuple(sorted((*found.token_budgets, *larger)))
        found = replace(found, token_budgets=every, context_budgets=larger)
    return replace(found, cp=degrees)


def _degrees(cp: str, gpus: int) -> tuple[int, ...]:
    """Degrees between commas, ascending."""
    words = [word.strip() for word in cp.split(",")]
    for word in words:
        if not (word.isascii() and word.isdecimal() and len(word) < 10 and int(word) > 0):
            raise OptionError(f"--cp {cp}: {word!r} found, expected 1,2,4 or auto")
        if int(word) > gpus:
            raise OptionError(f"--cp {cp}: {word!r} found, expected at most {gpus}, the devices at hand")
    return tuple(sorted({int(word) for word in words}))
