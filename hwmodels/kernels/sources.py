"""Which kernel tables are at a place, whoever wrote them, in the schema of hwmodels.kernels.table?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd

from hwmodels.errors import MeasurementError
from hwmodels.hardware import Device, load_device
from hwmodels.kernels.aiconfigurator import FRAMEWORKS, SYSTEMS, Wheel, open_wheel
from hwmodels.kernels.aiter import CHIPS, GEMM_COLUMNS, MOE_COLUMNS, read_aiter
from hwmodels.kernels.apex_plus import is_apex_plus, read_apex_plus
from hwmodels.kernels.published import is_published, read_published
from hwmodels.kernels.reading import SAME_PEAKS, Tables, keep, peaks_of, read_csv
from hwmodels.kernels.table import FAMILIES, beyond_peak, checked_against, read_table
from hwmodels.kernels.vidur import is_vidur, read_vidur, told_device

WHEEL = "wheel"
KNOWN = (
    "'wheel', its folder systems/data, a folder of <family>.parquet as 'shardwise profile' writes it, or CSV files of "
    "aiter's tuned tables, Vidur's or APEX+'s profiles, DeepEP, DeepGEMM or TensorRT-LLM all-to-all"
)


def read_tables(place: str | Path, device: str | Device | None = None, engine: str | None = None) -> Tables:
    """Tables by family of one device and, where asked for, one engine.

    place    'wheel' for the installed aiconfigurator-core, a file, or a folder (its CSVs are looked for in subfolders)
    device   a profile's name or path, or the device; needed where the place holds several
    engine   'vllm', 'sglang' or 'tensorrt-llm'; None: every software (of the wheel: vllm). NCCL serves all of them

    Rows of public sources that break the device's peaks are left out and counted (`left_out`); such a row in tables of
    the user's own raises MeasurementError, as does a place with nothing known or nothing of what was asked for.
    """
    given = load_device(device) if isinstance(device, str) and device not in SAME_PEAKS else device
    name = given.name if isinstance(given, Device) else given
    peaks = given if isinstance(given, Device) else None
    path = Path(place)
    if str(place) == WHEEL or any((path / system).is_dir() for system in SYSTEMS):
        if name is None or peaks is None:
            raise MeasurementError(f"{place}: holds many devices; name the one to read")
        return _wheel(open_wheel(None if str(place) == WHEEL else path), peaks, engine or "vllm")
    if not path.exists():
        raise MeasurementError(f"{place}: does not exist; expected {KNOWN}")
    own = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    if own:
        tables = _own(own, peaks)
    else:
        files = sorted(f for f in path.rglob("*") if _is_csv(f)) if path.is_dir() else [path]
        tables = _public(files, name, lone=not path.is_dir())
    return _selected(tables, place, name, engine)


def _is_csv(path: Path) -> bool:
    return path.is_file() and path.name.endswith((".csv", ".csv.gz"))


def _wheel(wheel: Wheel, device: Device, engine: str) -> Tables:
    if engine not in FRAMEWORKS:
        raise MeasurementError(f"engine {engine!r}: expected one of {', '.join(FRAMEWORKS)}, whose kernels were timed")
    left_out: Counter[str] = Counter()
    tables = {}
    for family in FAMILIES:
        frames = [wheel.read(device.name, engine, family)]
        if family == "collective" and engine != "nccl":
            frames.append(wheel.read(device.name, "nccl", family))
        frames = [frame for frame in frames if len(frame)]
        if frames:
            rows = pd.concat(frames, ignore_index=True)
            reason = f"{family}: faster than the peak of {device.name}"
            tables[family] = keep(rows, ~beyond_peak(rows, family, device), reason, left_out).reset_index(drop=True)
    if not tables:
        raise MeasurementError(
            f"the wheel has no kernels of {engine} on {device.name}; expected a device of {', '.join(wheel.devices())}"
        )
    return Tables(tables, left_out)


def _own(files: list[Path], device: Device | None) -> Tables:
    """Tables somebody measured and keeps as Parquet, one file per family: every row has to be right."""
    tables = {}
    for path in files:
        if path.stem not in FAMILIES:
            raise MeasurementError(f"{path}: the file's name tells the family; expected one of {', '.join(FAMILIES)}")
        frame = read_table(path, path.stem)
        peaks = device
        if peaks is None and len(frame):
            # Without a profile there is no peak to hold the rows against; one device per table is asked for below.
            peaks = peaks_of(str(frame["device"].iloc[0]))
        tables[path.stem] = frame if peaks is None else checked_against(frame, path.stem, peaks, str(path))
    return Tables(tables, {})


def _public(files: list[Path], device: str | None, *, lone: bool) -> Tables:
    left_out: Counter[str] = Counter()
    found: dict[str, list[pd.DataFrame]] = {}
    for path in files:
        raw_columns = set(_header(path))
        if raw_columns >= GEMM_COLUMNS or raw_columns >= MOE_COLUMNS:
            chips = {name for names in CHIPS.values() for name in names}
            tables = read_aiter(path, device if device in chips else None)
        elif is_vidur(raw_columns):
            tables = read_vidur(path, told_device(path) or device)
        elif is_apex_plus(raw_columns):
            tables = read_apex_plus(path)
        elif is_published(raw_columns):
            tables = read_published(path)
        elif lone:
            some = ", ".join(sorted(raw_columns)[:6])
            raise MeasurementError(f"{path}: columns {some} are of no known layout; expected {KNOWN}")
        else:
            left_out[f"{path.name}: of no known layout"] += 1
            continue
        left_out.update(tables.left_out)
        for family, frame in tables.items():
            found.setdefault(family, []).append(frame)
    return Tables({family: _united(frames, family) for family, frames in found.items()}, left_out)


def _header(path: Path) -> list[str]:
    return [str(column) for column in read_csv(path, rows=1).columns]


def _united(frames: list[pd.DataFrame], family: str) -> pd.DataFrame:
    """One table of several files; a kernel that several of them timed counts with its median."""
    frame = pd.concat(frames, ignore_index=True)
    key = list(FAMILIES[family].key)
    if frame.duplicated(key).any():
        rest = {c: "first" for c in frame.columns if c not in key}
        frame = frame.groupby(key, as_index=False, sort=False).agg({**rest, "seconds": "median"})
    united: pd.DataFrame = frame[list(FAMILIES[family].columns)]
    return united


def _selected(tables: Tables, place: str | Path, device: str | None, engine: str | None) -> Tables:
    """Rows of the device and the engine; one device only."""
    left_out = Counter(tables.left_out)
    devices = sorted({str(name) for frame in tables.values() for name in frame["device"].unique()})
    software = sorted({str(name) for frame in tables.values() for name in frame["software"].unique()})
    if device is None and len(devices) > 1:
        raise MeasurementError(f"{place}: rows of {', '.join(devices)}; name one of these devices")
    kept = {}
    for family, frame in tables.items():
        if device is not None:
            frame = keep(frame, frame["device"] == device, f"not of {device}", left_out)
        if engine is not None:
            ran = frame["software"].str.split().str[0].isin([engine, "nccl"])
            frame = keep(frame, ran, f"not run by {engine}", left_out)
        kept[family] = frame.reset_index(drop=True)
    selected = Tables(kept, left_out)
    if not selected:
        what = " ".join(part for part in (device, engine) if part)
        holds = f"rows of {', '.join(devices)} run by {', '.join(software)}" if devices else f"{KNOWN}"
        raise MeasurementError(f"{place}: no usable rows{' of ' + what if what else ''}; expected {holds}")
    return selected
