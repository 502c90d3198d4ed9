"""How is context parallelism typed?"""

from __future__ import annotations

from dataclasses import replace

from numpy.typing import ArrayLike

from hwmodels.contextkinds import KINDS
from hwmodels.hardware import MAX_GPUS
from planner.space import Choices, long_context, powers_of_two
from ui.questions import OptionError, numbers

#: Steps that are looked at beside the usual ones, since each of several ranks has a part of them only.
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

    cp             numbers between commas, or auto: powers of two where the 99th percentile of `prompt_tokens` is long
                   or where nothing fits otherwise
    token_budget   what was typed of the tokens in a step; None: larger steps are looked at too

    Raises OptionError for anything else, and for kinds without degrees.

    >>> with_context(Choices(), "2,4", "ulysses", prompt_tokens=[1], gpus=8).cp_kinds
    ('ulysses',)
    """
    if cp is None:
        if cp_kind is not None:
            raise OptionError(f"--cp-kind {cp_kind} without --cp: expected degrees such as --cp 1,2,4, or --cp auto")
        return found
    if cp.strip() == "auto":
        degrees = powers_of_two(gpus) if long_context(prompt_tokens) else None
    else:
        degrees = numbers("--cp", cp, MAX_GPUS)
    if cp_kind is not None:
        words = [word.strip() for word in cp_kind.split(",")]
        kinds = tuple(kind for kind in KINDS if kind in words)
        strange = next((word for word in words if word not in KINDS), None)
        if strange is not None:
            raise OptionError(f"--cp-kind {cp_kind}: {strange!r} found, expected some of {', '.join(KINDS)}")
        found = replace(found, cp_kinds=kinds)
    if token_budget is None and degrees != (1,):
        found = replace(found, token_budgets=tuple(sorted({*found.token_budgets, *LARGE_STEPS})))
    return replace(found, cp=degrees)
