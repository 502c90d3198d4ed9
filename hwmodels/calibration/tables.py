"""Which measured rows can coefficients be fitted to, of which device and engines?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hwmodels.calibration.forms import Form
from hwmodels.calibration.unknown import started_from
from hwmodels.errors import MeasurementError
from hwmodels.hardware import DEVICES, Device, load_device
from hwmodels.kernels.aiconfigurator import FRAMEWORKS, SYSTEMS
from hwmodels.kernels.moe_sound import doubtful
from hwmodels.kernels.sources import WHEEL, read_tables
from hwmodels.kernels.table import FAMILIES
from hwmodels.yamlfiles import named

#: A GPU kernel that takes more than HOST_BOUND launch times wherever the peaks ask for less than SMALL of them was
#: waiting for the host that issued it.
HOST_BOUND, SMALL = 20, 2
#: Families in which one row is one kernel, so that HOST_BOUND applies.
SINGLE = frozenset({"gemm", "attention_prefill", "attention_decode", "mla_prefill", "mla_decode"})


@dataclass(frozen=True, slots=True)
class Measured:
    """Tables of one device by family, of all engines.

    text       of the profile the device is from
    left_out   rows of the source that are in no table, by reason
    """

    device: Device
    tables: Mapping[str, pd.DataFrame]
    text: str
    left_out: Mapping[str, int]


def open_measured(place: str, hardware: str | None = None, like: str | None = None) -> Measured:
    """All tables of a device at `place` ('wheel', or what hwmodels.kernels.sources reads), of every engine.

    hardware   a device profile's name or path; needed where the place holds several devices
    like       a profile with the device's datasheet figures, where it has no profile of its own

    Raises MeasurementError where there is nothing of the device, rows of other devices, or rows beyond its peaks.
    """
    path = Path(place)
    if place == WHEEL or any((path / system).is_dir() for system in SYSTEMS):
        if hardware is None:
            raise MeasurementError(f"{place}: holds many devices; name the one to calibrate with --hardware")
        device = load_device(hardware)
        text = named("device", like or hardware, DEVICES).read_text(encoding="utf-8")
        tables, left_out = _of_wheel(place, device)
        return Measured(device, tables, text, left_out)
    found = read_tables(place, hardware)
    return Measured(*started_from(found, path, like or hardware), found.left_out)


def _of_wheel(place: str, device: Device) -> tuple[dict[str, pd.DataFrame], Mapping[str, int]]:
    """Tables of every engine together."""
    found, failed = [], None
    for engine in (name for name in FRAMEWORKS if name != "nccl"):
        try:
            found.append(read_tables(place, device, engine))
        except MeasurementError as error:
            failed = error
    if failed is not None and not found:
        raise failed
    frames = {family: [tables[family] for tables in found if family in tables] for family in FAMILIES}
    left_out: Counter[str] = Counter()
    for tables in found:
        left_out.update(tables.left_out)
    return {
        family: pd.concat(parts, ignore_index=True).drop_duplicates(list(FAMILIES[family].key))
        for family, parts in frames.items()
        if parts
    }, left_out


def engines_of(rows: pd.DataFrame) -> pd.Series:
    """The name of each row's software without its version."""
    return rows["software"].map({name: str(name).split()[0] for name in rows["software"].unique()})


def usable(rows: pd.DataFrame, form: Form, device: Device) -> tuple[pd.DataFrame, dict[str, int]]:
    """The rows that say something of a kernel in a step, and how many others there are, by reason.

    Left out are kernels that were host-bound when they were timed (see HOST_BOUND), rows whose weights or cache came
    out of the last-level cache, read faster than memory can be: in a step other layers' weights lie in between; and
    expert blocks that were not timed as they run (see hwmodels.kernels.moe_sound).
    """
    unused: dict[str, int] = {}
    if rows.empty:
        return rows, unused
    formats = form.formats(rows)
    read_s = np.zeros(len(rows))
    for name in formats.unique():
        here = (formats == name).to_numpy(bool)
        read_s[here] = form.read(rows[here], name) / device.memory_bytes_per_s
    keep = rows["seconds"].to_numpy(float) >= read_s
    if not keep.all():
        unused["read from a cache, faster than memory"] = int((~keep).sum())
    if device.kind == "gpu" and form.family in SINGLE:
        least_s = np.maximum(read_s, _floor_s(rows, form.family, device))
        small = least_s < SMALL * device.kernel_launch_s
        first_s = (
            rows["seconds"].where(small).groupby([rows["software"], rows["kernel"], rows["dtype"]]).transform("min")
        )
        late = (first_s > HOST_BOUND * device.kernel_launch_s).to_numpy(bool)
        if (late & keep).any():
            unused["host-bound when it was timed"] = int((late & keep).sum())
        keep &= ~late
    if form.family == "moe":
        for reason, mask in doubtful(rows, device).items():
            unused[reason] = int((mask & keep).sum())
            keep &= ~mask
    return rows[keep].reset_index(drop=True), unused


def _floor_s(rows: pd.DataFrame, family: str, device: Device) -> np.ndarray:
    """Seconds the device's peak arithmetic asks for."""
    floor = FAMILIES[family].floor
    if floor is None:
        return np.zeros(len(rows))
    flops, _, arithmetic = floor(rows)
    peaks = device.peak_flops_per_s
    peak = arithmetic.map(lambda kind: peaks.get(str(kind), max(peaks.values()))).to_numpy(float)
    found: np.ndarray = flops / peak
    return found
