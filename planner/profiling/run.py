"""The measurements themselves: point after point within the time, kept on disk every few seconds, taken up again."""

from __future__ import annotations

import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd

from hwmodels.errors import MeasurementError
from hwmodels.kernels.table import FAMILIES, read_table, write_table
from planner.profiling import kernels
from planner.profiling.about import About, clocks, resumed
from planner.profiling.collectives import backend, run_collectives
from planner.profiling.grid import SHARES, chosen_families, cost_s, group_sizes, guess_s, limit_s, points_for
from planner.profiling.machine import Machine
from planner.profiling.points import Point, work
from planner.profiling.timing import timed

#: Seconds between two times that tables are written.
FLUSH_S = 3.0
#: Share of free memory that operands may take.
MEMORY = 0.6
#: Failures of one kernel in a row after which it is no longer tried.
PATIENCE = 5
#: Says what is going on and what share of it is done.
Progress = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One kernel at one point: seconds per launch with their spread, or the reason why there are none."""

    point: Point
    kernel: str
    seconds: float = 0.0
    spread: float = 0.0
    source: str = ""
    reason: str | None = None


@dataclass(slots=True)
class Forecast:
    """What a launch will take: the least time seen, plus the first guess times what long launches took of theirs."""

    machine: Machine
    seen: dict[tuple[str, str], deque[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=50))
    )

    def learn(self, point: Point, seconds: float) -> None:
        """Take note of a measured launch."""
        self.seen[point.family, point.dtype].append((guess_s(point, self.machine), seconds))

    def cost_s(self, point: Point) -> float:
        """Time that measuring the point will take, in seconds."""
        launches = self.seen.get((point.family, point.dtype), ())
        least = min((seconds for _, seconds in launches), default=0.0)
        rates = [(seconds - least) / guess for guess, seconds in launches if seconds > 4 * least]
        return cost_s(least + guess_s(point, self.machine) * (median(rates) if rates else 1.0), self.machine)


def measure(
    points: Iterable[Point], machine: Machine, *, seconds: float = float("inf"), point_limit_s: float = 10.0
) -> dict[str, pd.DataFrame]:
    """Tables (hwmodels.kernels.table) of the points, by family; points that cannot be measured are not in them.

    seconds         time after which no further point is begun
    point_limit_s   time one point may take
    """
    rows: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes(list(points), machine, seconds, point_limit_s):
        if outcome.reason is None:
            rows[outcome.point.family].append(outcome)
    return {family: frame(found, machine) for family, found in rows.items()}


def frame(found: Sequence[Outcome], machine: Machine) -> pd.DataFrame:
    """Measured outcomes of one family as its table."""
    rows = [
        {
            **outcome.point.columns,
            "device": machine.name,
            "software": machine.software,
            "kernel": outcome.kernel,
            "seconds": outcome.seconds,
            "spread": outcome.spread,
            "source": outcome.source,
        }
        for outcome in found
    ]
    return pd.DataFrame(rows, columns=list(FAMILIES[found[0].point.family].columns))


def outcomes(
    points: Sequence[Point],
    machine: Machine,
    seconds: float,
    point_limit_s: float,
    known: Collection[tuple[Point, str]] = frozenset(),
) -> Iterator[Outcome]:
    """Measure every family in the order given; (point, kernel) in `known` are not measured again.

    Families take turns, so that each has its share of the time so far; collectives come last, all together.
    """
    ends = time.monotonic() + seconds
    together = [p for p in points if p.family == "collective" and (p, backend(machine)) not in known]
    reserved = seconds * SHARES["collective"] if together and np.isfinite(seconds) else 0.0
    forecast, failures = Forecast(machine), Counter[tuple[str, str, str]]()
    queues: dict[str, deque[Point]] = defaultdict(deque)
    for point in points:
        if point.family not in SHARES:
            yield Outcome(point, "", reason=kernels.NEVER[point.family])
        elif point.family != "collective":
            queues[point.family].append(point)
    spent = dict.fromkeys(queues, 0.0)
    while queues:
        family = min(queues, key=lambda name: spent[name] / SHARES[name])
        point = queues[family].popleft()
        if not queues[family]:
            del queues[family]
        started, filling_s = time.monotonic(), machine.arena.filling_s
        left = ends - reserved - started
        found = list(_here(point, machine, left, point_limit_s, known, forecast, failures))
        # Memory is filled once for all families: the one that asks first does not pay for it.
        spent[family] += time.monotonic() - started - (machine.arena.filling_s - filling_s)
        yield from found
    if together:
        yield from _together(together, machine, max(ends - time.monotonic(), 0.0), point_limit_s)


def _here(
    point: Point,
    machine: Machine,
    left: float,
    limit: float,
    known: Collection[tuple[Point, str]],
    forecast: Forecast,
    failures: Counter[tuple[str, str, str]],
) -> Iterator[Outcome]:
    """Every kernel of this process that runs the point."""
    if left <= 0:
        yield Outcome(point, "", reason="no time left")
        return
    try:
        makers = kernels.makers(point, machine)
    except kernels.Unsupported as reason:
        yield Outcome(point, "", reason=str(reason))
        return
    if not makers:
        yield Outcome(point, "", reason="no kernel for it is installed")
    amount = work(point)
    for kernel, make in makers.items():
        kind = (point.family, point.dtype, kernel)
        if (point, kernel) in known:
            continue
        if failures[kind] >= PATIENCE:
            yield Outcome(point, kernel, reason=f"{kernel} failed {PATIENCE} times in a row")
        elif forecast.cost_s(point) > limit:
            yield Outcome(point, kernel, reason=f"expected to take more than {limit:g} s")
        elif forecast.cost_s(point) > left:
            yield Outcome(point, kernel, reason="no time left")
        elif not _fits(amount.held_bytes, machine):
            yield Outcome(point, kernel, reason="larger than free memory")
        else:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what a kernel cannot do, which its error says too
                    timing = timed(make, amount.moved_bytes, machine, min(left, limit))
            except kernels.Unsupported as reason:
                yield Outcome(point, kernel, reason=str(reason))
                continue
            except (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError) as error:
                failures[kind] += 1
                machine.arena.clear()  # it may have been for want of memory
                yield Outcome(point, kernel, reason=f"{kernel}: {' '.join(str(error).split())[:100]}")
                continue
            failures[kind] = 0
            if timing is None:
                forecast.learn(point, limit)
                yield Outcome(point, kernel, reason=f"took more than {limit:g} s")
                continue
            forecast.learn(point, timing.seconds)
            source = f"shardwise profile, {timing.samples} samples, {timing.how}"
            yield Outcome(point, kernel, timing.seconds, timing.spread, source)


def _fits(nbytes: float, machine: Machine) -> bool:
    """Whether operands of that size fit in free memory, if need be without those of earlier points."""
    if nbytes > MEMORY * machine.free_bytes():
        machine.arena.clear()
    return nbytes <= MEMORY * machine.free_bytes()


def _together(points: Sequence[Point], machine: Machine, seconds: float, limit: float) -> Iterator[Outcome]:
    """Collectives, whose processes report as they go."""
    kernel, sizes = backend(machine), group_sizes(machine)
    possible = [point for point in points if point.sizes["gpus"] in sizes and point.sizes["nodes"] == 1]
    missing = dict.fromkeys(points, f"{machine.count} device(s) visible") | dict.fromkeys(possible, "no time left")
    if possible and seconds > 0:
        for point, time_s, spread, samples, reason in run_collectives(possible, machine, min(seconds, 1e9), limit):
            del missing[point]
            yield Outcome(point, kernel, time_s, spread, f"shardwise profile, {samples} samples, {kernel}", reason)
    for point, why in missing.items():
        yield Outcome(point, kernel, reason=why)


@dataclass(frozen=True, slots=True)
class Profiled:
    """What a run left in its folder: the tables, rows measured in this run, and what the folder says of itself."""

    tables: dict[str, pd.DataFrame]
    new: int
    about: About


def profile(
    folder: Path,
    machine: Machine,
    minutes: float,
    families: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Profiled:
    """Measure for `minutes` and keep what is found in `folder`: <family>.parquet and about.yaml.

    What the folder holds already is not measured again. An interrupted run keeps all but its last seconds.
    Raises MeasurementError for a folder of another device or other software, and for an unknown family.
    """
    wanted = chosen_families(families)
    state = resumed(folder, machine)
    tables = read_tables(folder)
    for name, table in tables.items():
        if set(table["device"]) - {machine.name}:
            raise MeasurementError(f"{folder / name}.parquet: holds rows of another device; choose another folder")
    known = {entry for name, table in tables.items() for entry in points_of(name, table)}
    _leave_out(state, machine, wanted, tables)
    points = points_for(minutes, machine, wanted)
    started, minutes_before = time.monotonic(), state.minutes
    fresh: dict[str, list[Outcome]] = defaultdict(list)
    skipped: Counter[str] = Counter()
    new, flushed = 0, started

    def flush() -> None:
        for name, found in fresh.items():
            parts = [tables[name]] if name in tables else []
            tables[name] = pd.concat([*parts, frame(found, machine)], ignore_index=True)
            write_table(tables[name], name, folder / f"{name}.parquet")
        fresh.clear()
        state.minutes = minutes_before + (time.monotonic() - started) / 60
        state.points = {name: len(table) for name, table in tables.items()}
        state.skipped = dict(sorted(skipped.items()))
        state.write(folder)

    state.write(folder)
    try:
        for outcome in outcomes(points, machine, minutes * 60, limit_s(minutes), known):
            if outcome.reason is not None:
                skipped[f"{outcome.point.family} {outcome.point.dtype}: {outcome.reason}"] += 1
            else:
                fresh[outcome.point.family].append(outcome)
                new += 1
            if progress is not None:
                share = (time.monotonic() - started) / (minutes * 60)
                progress(f"{outcome.point.family} {outcome.point.dtype}: {new:,} measured", min(share, 1.0))
            if time.monotonic() - flushed > FLUSH_S:
                flush()
                flushed = time.monotonic()
        state.facts["clocks_after"] = clocks(machine)
    finally:
        flush()
    return Profiled(tables, new, state)


def read_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables a folder holds, by family; raises MeasurementError for one that cannot be read."""
    return {name: read_table(path, name) for name in FAMILIES if (path := folder / f"{name}.parquet").exists()}


def points_of(family: str, table: pd.DataFrame) -> Iterator[tuple[Point, str]]:
    """The points of a table, row by row, with their kernels."""
    columns = FAMILIES[family].shape
    for *shape, dtype, kernel in table[[*columns, "dtype", "kernel"]].itertuples(index=False, name=None):
        yield Point(family, str(dtype), tuple(shape)), str(kernel)


def _leave_out(state: About, machine: Machine, wanted: Collection[str], tables: Collection[str]) -> None:
    """Say of every family that will have no table why."""
    state.left_out = dict(kernels.NEVER)
    for name in SHARES:
        if name == "collective" and not group_sizes(machine):
            state.left_out[name] = "one device is visible"
        elif name not in wanted and name not in tables:
            state.left_out[name] = "not asked for"
    if machine.kind == "cpu":
        state.left_out["copy h2d, d2h"] = "a CPU has no host to copy from or to"
    for dtype in ("bf16", "fp16", "fp8", "int8"):
        if dtype not in machine.dtypes:
            state.left_out[f"gemm {dtype}"] = "the device has no arithmetic in it"
