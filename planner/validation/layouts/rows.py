"""What a cell says: text and numbers of one row, or a reason in words why the row cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd

from planner.validation.case import Case, Layout, Unmapped

Row = Mapping[Hashable, Any]


class Unmappable(Exception):
    """A row that does not become a case; the text is the reason, without numbers so that equal ones can be counted."""


def text(row: Row, key: str) -> str:
    """The cell as stripped text, "" where it is missing."""
    value = row.get(key)
    return "" if value is None or (isinstance(value, float) and value != value) else str(value).strip()


def number(row: Row, key: str) -> float | None:
    """The cell as a finite number, None where it is missing; Unmappable for anything else."""
    value = text(row, key)
    if not value:
        return None
    try:
        found = float(value)
    except ValueError:
        raise Unmappable(f"{key} is not a number") from None
    if not isfinite(found):
        raise Unmappable(f"{key} is not a finite number")
    return found


def whole(row: Row, key: str) -> int | None:
    """The cell as a whole number, None where it is missing or 0."""
    value = number(row, key)
    if value is None or value == 0:
        return None
    if value != int(value) or value < 0:
        raise Unmappable(f"{key} is not a whole number")
    return int(value)


def required(row: Row, key: str) -> int:
    """The cell as a whole number of at least 1."""
    value = whole(row, key)
    if value is None:
        raise Unmappable(f"{key} is missing")
    return value


def measured(row: Row, scale: float, **columns: str) -> dict[str, float]:
    """Metrics from columns, times `scale`; missing ones are left out, and one that is not positive is Unmappable."""
    found = {}
    for metric, column in columns.items():
        value = number(row, column)
        if value is not None:
            if value <= 0:
                raise Unmappable(f"{column} is not positive")
            found[metric] = value * scale
    if not found:
        raise Unmappable("no measured metric")
    return found


def each_row(
    frame: pd.DataFrame,
    name: Callable[[int, Row], str],
    labels: Callable[[Row], Mapping[str, str]],
    case: Callable[[str, Row], Case],
) -> Layout:
    """Every row once: as the case `case` makes of it, or with the reason why it cannot.

    name    the id of a row, from its position and cells
    labels  what is known of a row that does not become a case
    """
    cases: list[Case] = []
    unmapped: list[Unmapped] = []
    for index, row in enumerate(records(frame)):
        identity = name(index, row)
        try:
            cases.append(case(identity, row))
        except Unmappable as problem:
            unmapped.append(Unmapped(identity, dict(labels(row)), str(problem)))
    return Layout(tuple(cases), tuple(unmapped))


def records(frame: pd.DataFrame) -> Iterable[Row]:
    """The rows as mappings from column to cell."""
    return frame.to_dict("records")


def position(path: str | Path) -> Callable[[int, Row], str]:
    """Names for rows without an id: the file's stem and the row's number, from 1."""
    stem = Path(path).name.split(".")[0]
    return lambda index, row: f"{stem}:{index + 1}"
