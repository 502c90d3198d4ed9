"""What every reader of a foreign kernel table does: open the file, count what it leaves out, check what it keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from hwmodels.errors import MeasurementError
from hwmodels.hardware import Device, device_names, load_device
from hwmodels.kernels.table import FAMILIES, beyond_peak, checked

#: Devices without a profile of their own whose peaks are those of another: H800 is H100 with narrower NVLink.
SAME_PEAKS = {"h800-sxm": "h100-sxm"}


class Tables(dict[str, pd.DataFrame]):
    """Checked tables by family, none of them empty.

    left_out   rows of the source that are in no table, by reason
    """

    def __init__(self, tables: Mapping[str, pd.DataFrame], left_out: Mapping[str, int]) -> None:
        super().__init__({family: frame for family, frame in tables.items() if len(frame)})
        self.left_out: Counter[str] = Counter({reason: n for reason, n in left_out.items() if n})


def read_csv(path: Path, rows: int | None = None) -> pd.DataFrame:
    """The CSV file, gzip too, or its first `rows`; raises MeasurementError where it is none or has no rows."""
    try:
        frame = pd.read_csv(path, low_memory=False, nrows=rows)
    except (OSError, EOFError, ValueError) as error:
        # pandas' own parsing errors are ValueErrors.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise MeasurementError(f"{path}: not a readable CSV file ({reason}); expected a table of timings") from None
    if frame.empty:
        raise MeasurementError(f"{path}: has no rows; expected a table of timings")
    return frame


def require_columns(frame: pd.DataFrame, columns: set[str], where: object, layout: str) -> None:
    """Raise MeasurementError unless the frame has all `columns` of the `layout`."""
    missing = sorted(columns - set(frame.columns))
    if missing:
        raise MeasurementError(f"{where}: columns missing {missing}; expected the layout of {layout}")


@lru_cache(maxsize=64)
def peaks_of(name: str) -> Device | None:
    """The device whose peaks bound rows of the device called `name`; None where there is no profile."""
    name = SAME_PEAKS.get(name, name)
    return load_device(name) if name in device_names() else None


def keep(frame: pd.DataFrame, wanted: pd.Series, reason: str, left_out: Counter[str]) -> pd.DataFrame:
    """The rows that are `wanted`; the others are counted under `reason`."""
    left_out[reason] += int((~wanted).sum())
    kept: pd.DataFrame = frame[wanted]
    return kept


def tidied(
    frame: pd.DataFrame, family: str, where: object, left_out: Counter[str], *, best: tuple[str, ...] | None = None
) -> pd.DataFrame:
    """The table of one family from rows with its columns, in seconds; what cannot be used is counted in `left_out`.

    best   None: rows with the same key are repeated runs, their median counts; else: columns of which only the
           fastest row is kept, for sources that list what a tuner tried

    Rows without a positive finite time or with a shape that is no whole number, rows of devices that have no profile to
    hold them against, and rows faster than the device's peaks allow (see table.beyond_peak) are left out.
    """
    found = FAMILIES[family]
    rows = frame[list(found.columns)]
    seconds = pd.to_numeric(rows["seconds"], errors="coerce")
    rows = keep(rows, np.isfinite(seconds) & (seconds > 0), "no positive time", left_out)
    rows = keep(rows, rows[[c for c in found.columns if c != "spread"]].notna().all(axis=1), "incomplete", left_out)
    if best is None:
        merged = rows.groupby(list(found.key), as_index=False, sort=False).agg(
            {**{c: "first" for c in found.columns if c not in found.key}, "seconds": "median"}
        )
        rows = merged[list(found.columns)]
    else:
        rows = keep(rows, ~_slower(rows, best), "slower than another kernel of the same shape", left_out)
    rows = checked(rows, family, str(where))
    parts = []
    for device, part in rows.groupby("device", sort=False):
        peaks = peaks_of(str(device))
        if peaks is None:
            left_out[f"no profile of {device} to hold its times against"] += len(part)
            continue
        parts.append(keep(part, ~beyond_peak(part, family, peaks), f"faster than the peak of {device}", left_out))
    return pd.concat(parts, ignore_index=True) if parts else rows.iloc[:0]


def _slower(rows: pd.DataFrame, by: tuple[str, ...]) -> pd.Series:
    """Which rows have a faster (or equal, earlier) one with the same values of `by`."""
    ordered = rows.sort_values("seconds", kind="stable")
    return ordered.duplicated(list(by)).reindex(rows.index)
