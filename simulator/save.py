"""Results on disk: files appear complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from simulator.errors import SaveError
from simulator.metrics import Metrics, none_for_nan
from simulator.result import Result
from simulator.timeline import write_timeline

#: Writes one file at the path it is given.
Writer = Callable[[Path], None]


def save_result(
    result: Result, metrics: Metrics, folder: str | os.PathLike[str], *, also: Mapping[str, str] | None = None
) -> None:
    """Write requests.parquet, requests.csv, metrics.json (with the run's totals) and timeline.json into a folder.

    Where KV went from replica to replica, transfers.csv too; where links join them, links.csv, with their utilisation:
    what a link carried over what it could have carried while the run lasted. (Files of these names are replaced by
    empty tables, lest those of another run seem to belong to this one.)

    also   further text files to appear with them, contents by name

    A new folder, its missing parents included, appears with all files in it. In a folder that exists, files of these
    names are replaced, all or none; others stay. Raises SaveError when it cannot be written.
    """
    numbers = {**metrics.as_dict(), "totals": none_for_nan(asdict(result.totals))}
    writers: dict[str, Writer] = {
        "requests.parquet": lambda path: _write_parquet(result, path),
        "requests.csv": lambda path: _write_csv(result.requests.astype({"slo_class": str}), path),
        "metrics.json": _text(json.dumps(numbers, indent=2, allow_nan=False) + "\n"),
        "timeline.json": lambda path: _write_timeline(result, path),
    }
    if len(result.transfers) or os.path.lexists(os.path.join(folder, "transfers.csv")):
        writers["transfers.csv"] = lambda path: _write_csv(result.transfers, path)
    if len(result.links) or os.path.lexists(os.path.join(folder, "links.csv")):
        writers["links.csv"] = lambda path: _write_csv(_used(result), path)
    write_files(folder, writers | {name: _text(text) for name, text in (also or {}).items()})


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write one text file; it appears, or replaces the one that was there, complete or not at all (SaveError)."""
    target = Path(path)
    write_files(target.parent, {target.name: _text(text)})


def write_files(folder: str | os.PathLike[str], writers: Mapping[str, Writer]) -> None:
    """Let each writer write the file of its name into the folder; all of them appear or, with SaveError, none."""
    target = Path(folder)
    try:
        if target.is_dir():
            _replace_in(target, writers)
        else:
            _create(target, writers)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(
            f"{target}: cannot be written ({reason}), "
            "expected a folder that is writable or can be made; choose another path"
        ) from None


def _create(target: Path, writers: Mapping[str, Writer]) -> None:
    """Write beside the topmost folder that is missing, then let that one appear."""
    top = target
    while not os.path.lexists(top.parent):
        top = top.parent
    if os.path.lexists(top):
        raise NotADirectoryError(20, "there is a file of this name")
    with _staging(top.parent, top.name) as stage:
        new = stage / top.name
        inner = new / target.relative_to(top)
        inner.mkdir(parents=True)
        for name, write in writers.items():
            write(inner / name)
        os.rename(new, top)


def _replace_in(target: Path, writers: Mapping[str, Writer]) -> None:
    """Write inside the folder under a hidden name, then swap file by file, and back again if one cannot be."""
    for name in writers:
        if (target / name).is_dir():
            raise IsADirectoryError(21, f"{name} is a folder")
    with _staging(target, "") as stage:
        for name, write in writers.items():
            write(stage / name)
        old = stage / "old"
        old.mkdir()
        done: list[str] = []
        try:
            for name in writers:
                done.append(name)
                if os.path.lexists(target / name):
                    # A second link, so that the name never is without a file.
                    _link(target / name, old / name)
                os.replace(stage / name, target / name)
        except BaseException:
            for name in done:
                if os.path.lexists(old / name):
                    os.replace(old / name, target / name)
                elif not os.path.lexists(stage / name):
                    (target / name).unlink(missing_ok=True)
            raise


def _link(source: Path, copy: Path) -> None:
    try:
        os.link(source, copy, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links
        shutil.copy2(source, copy, follow_symlinks=False)


@contextmanager
def _staging(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder on the same file system, gone afterwards whatever happens."""
    stage = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _text(text: str) -> Writer:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def _write_parquet(result: Result, path: Path) -> None:
    result.requests.to_parquet(path, index=False)


def _used(result: Result) -> pd.DataFrame:
    """The links with `utilisation`, within [0, 1]; NaN for a run that took no time."""
    could_bytes = result.links["bytes_per_s"] * result.totals.makespan_s
    return result.links.assign(utilisation=(result.links["carried_bytes"] / could_bytes).where(could_bytes > 0))


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Empty where a time does not exist; numbers with as many digits as read back to the same value."""
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
    from pyarrow import csv  # type: ignore[import-untyped, unused-ignore]

    table = pa.Table.from_pandas(frame, preserve_index=False)
    csv.write_csv(table, path, csv.WriteOptions(quoting_style="needed"))


def _write_timeline(result: Result, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        write_timeline(result, file)
