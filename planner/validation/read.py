"""Which measurements are in a file: the layout is told by the column names, and rows are chosen by their labels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hwmodels.errors import MeasurementError
from planner.validation.case import Case, Layout, Unmapped
from planner.validation.layouts import (
    apex_plus,
    inferencex,
    mlperf,
    silicon,
    splitwise,
    trtllm_throughput,
    vllm_requests,
)


@dataclass(frozen=True, slots=True)
class Reader:
    """One layout: how its files are recognised and read, and what columns it expects."""

    name: str
    accepts: Callable[[frozenset[str]], bool]
    read: Callable[[pd.DataFrame, Path], Layout]
    columns: frozenset[str]


#: In the order they are tried; no file fits two.
READERS = tuple(
    Reader(module.__name__.rsplit(".", 1)[1].replace("_", "-"), module.accepts, module.read, module.COLUMNS)
    for module in (silicon, trtllm_throughput, apex_plus, splitwise, vllm_requests, inferencex, mlperf)
)


def read_layout(path: str | os.PathLike[str], filters: str | Mapping[str, str] = "") -> Layout:
    """The measured points of a CSV or JSON file (a list of objects, or one), each a case or unmapped with a reason.

    filters   labels that rows must have, `system=h100_sxm,mode=agg`; several values are joined by |, case is ignored

    Raises MeasurementError for a file that cannot be read or has no known layout, and for filters by labels that no
    row of the file has.
    """
    source = Path(path)
    frame = _frame(source)
    columns = frozenset(str(column) for column in frame.columns)
    reader = next((reader for reader in READERS if reader.accepts(columns)), None)
    if reader is None:
        known = "; ".join(f"{reader.name} ({', '.join(sorted(reader.columns))})" for reader in READERS)
        found = ", ".join(sorted(columns)) or "none"
        raise MeasurementError(f"{source}: columns {found}: expected those of a known layout: {known}")
    return chosen(reader.read(frame, source), filters, str(source))


def chosen(layout: Layout, filters: str | Mapping[str, str], source: str) -> Layout:
    """The rows of a layout whose labels are as `filters` asks; see read_layout."""
    wanted = _wanted(filters, source) if isinstance(filters, str) else dict(filters)
    rows: tuple[Case | Unmapped, ...] = (*layout.cases, *layout.unmapped)
    labels = sorted({key for row in rows for key in row.labels})
    for key in wanted:
        if key not in labels:
            raise MeasurementError(f"{source}: filter {key}={wanted[key]}: expected a label among {', '.join(labels)}")
    values = {key: {value.strip().lower() for value in told.split("|")} for key, told in wanted.items()}

    def fits(row: Case | Unmapped) -> bool:
        return all(row.labels.get(key, "").lower() in allowed for key, allowed in values.items())

    return Layout(tuple(filter(fits, layout.cases)), tuple(filter(fits, layout.unmapped)))


def _wanted(filters: str, source: str) -> dict[str, str]:
    wanted = {}
    for part in filter(None, (part.strip() for part in filters.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise MeasurementError(f"{source}: filter {part!r}: expected label=value, as in system=h100_sxm,mode=agg")
        wanted[key.strip()] = value.strip()
    return wanted


def _frame(source: Path) -> pd.DataFrame:
    """The table in the file; an empty one is an error."""
    try:
        if source.suffix == ".json":
            frame = pd.json_normalize(_objects(json.loads(source.read_text(encoding="utf-8")), source))
        else:
            frame = pd.read_csv(source, low_memory=False, skipinitialspace=True)
    except OSError as error:
        raise MeasurementError(f"{source}: cannot be read ({error.strerror}), expected a CSV or JSON file") from None
    except (ValueError, RecursionError) as error:  # pandas' parser errors are ValueErrors
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MeasurementError(f"{source}: is not a table ({told}), expected CSV or a JSON list of objects") from None
    if frame.empty:
        raise MeasurementError(f"{source}: has no rows, expected at least one measurement")
    frame.columns = [str(column).strip() for column in frame.columns]
    return frame


def _objects(data: Any, source: Path) -> list[Any]:
    found = data if isinstance(data, list) else [data]
    if not all(isinstance(entry, dict) for entry in found):
        raise MeasurementError(f"{source}: is JSON of another kind, expected an object or a list of objects")
    return found
