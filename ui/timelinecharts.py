"""What is under the lanes of a run's picture, on the same axis: requests, KV held, who waits, and KV under way."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulator.result import Result
from ui.latencyfigure import FAINT, GRID, INK, LETTER
from ui.words import percent, printable, scaled

Floats = NDArray[np.float64]

#: Of steps, and of the pools whose steps they mostly are; apart for every kind of colour vision.
PREFILL, DECODE, MIXED, KV, QUEUE = "#d55e00", "#0072b2", "#aa4499", "#008a60", "#b6bdc9"
#: Of a request, with how strong the colour is.
REQUEST_PHASES = (
    ("queue", QUEUE, 1.0),
    ("prefill", PREFILL, 1.0),
    ("room", QUEUE, 1.0),
    ("transfer", KV, 1.0),
    ("decode", DECODE, 0.45),
)
#: Roles from top to bottom, so that KV goes down.
ROLES = {"prefill": PREFILL, "aggregated": FAINT, "mixed": MIXED, "decode": DECODE}
#: Pixels: the picture, what is beside its lanes, and the charts below them.
WIDTH, LEFT, RIGHT, CHART, CHART_GAP = 960, 158, 26, 46, 24
#: Requests that are drawn one by one at most.
REQUESTS = 44
#: Pixels over which curves are averaged.
BIN = 2.0
#: Width of a letter over its size on average, in words, for wide fonts: usual and of weight 600.
PLAIN, BOLD = 0.92 * LETTER, 1.15 * LETTER


@dataclass(frozen=True, slots=True)
class Axis:
    """Time, from left to right."""

    low: float
    high: float

    @property
    def wide(self) -> float:
        """Pixels."""
        return float(WIDTH - LEFT - RIGHT)

    @property
    def pixels_per_s(self) -> float:
        """Pixels of a second."""
        return self.wide / (self.high - self.low)

    def x(self, time_s: ArrayLike) -> Floats:
        """Pixels; times outside the window are at most a picture away from it."""
        pixels = LEFT + (np.asarray(time_s, dtype=float) - self.low) * self.pixels_per_s
        kept: Floats = np.clip(pixels, LEFT - WIDTH, 2 * WIDTH)
        return kept

    def drawn(self, top: float, bottom: float) -> list[str]:
        """Lines at round times, which are written below them."""
        parts = []
        unit, scale = ("s", 1.0) if self.high - self.low >= 0.05 else ("ms", 1e-3)
        for tick in _fine(self.low / scale, self.high / scale):
            x = float(self.x(tick * scale))
            parts.append(f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="{GRID}"/>')
            parts.append(text(x, bottom + 17, f"{tick:.9g}", fill=FAINT, anchor="middle"))
        parts.append(f'<path d="M{LEFT} {bottom:.1f}h{self.wide:.1f}" stroke="{FAINT}"/>')
        return [*parts, text(LEFT + self.wide / 2, bottom + 38, f"time, {unit}", anchor="middle")]


def _fine(low: float, high: float) -> list[float]:
    """Round numbers, exact also where the axis is short and far from 0.

    >>> _fine(1000.0, 1000.5)
    [1000.0, 1000.1, 1000.2, 1000.3, 1000.4, 1000.5]
    """
    raw = (high - low) / 9
    unit = 10.0 ** floor(log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    return [float(f"{i * step:.12g}") for i in range(ceil(low / step), floor(high / step) + 1)]


def request_lines(result: Result, axis: Axis, top: float) -> tuple[list[str], float]:
    """A line for every request that arrives in the window: waits, prompt, KV under way, answer; and where they end."""
    frame = result.requests
    frame = frame[frame["arrival_s"].between(axis.low, axis.high) & frame["finish_s"].notna()].sort_values("arrival_s")
    if not len(frame):
        return [], top - CHART_GAP
    which = "that arrive"
    if len(frame) > REQUESTS:
        which = f"{REQUESTS} of {len(frame):,} that arrive"
        frame = frame.iloc[np.linspace(0, len(frame) - 1, REQUESTS).astype(int)]
    moved = result.transfers[["request", "ready_s", "reserved_s", "landed_s"]]
    ways = frame[["request", "arrival_s", "first_schedule_s", "first_token_s", "finish_s"]].merge(moved, how="left")
    # KV that was sent anew after a failure is part of the answer, as what was computed anew is.
    own = (ways["ready_s"] <= ways["first_token_s"]) & (ways["first_token_s"] <= ways["landed_s"])
    ways = ways.assign(own=own).sort_values(["arrival_s", "request", "own"]).drop_duplicates("request", keep="last")
    names = ("ready_s", "reserved_s", "landed_s")
    ready_s, reserved_s, landed_s = (ways[name].where(ways["own"], ways["first_token_s"]) for name in names)
    times = (ways["arrival_s"], ways["first_schedule_s"], ready_s, np.maximum(ready_s, reserved_s), landed_s)
    edges = [axis.x(time_s) for time_s in (*times, ways["finish_s"])]
    tall = max(2.5, min(5.0, 110 / len(ways)))
    parts = [text(26, top + 14, "Requests", size=12, weight=600)]
    parts.append(text(26, top + 30, fitting(which, 11, LEFT - 30), size=11, fill=FAINT))
    parts.append('<g class="requests" clip-path="url(#window)">')
    for (name, colour, strong), lefts, rights in zip(REQUEST_PHASES, edges[:-1], edges[1:], strict=True):
        bars = "".join(
            f"M{left:.1f} {top + i * tall:.1f}H{right:.1f}v{tall - 0.8:.1f}H{left:.1f}z"
            for i, (left, right) in enumerate(zip(lefts.tolist(), rights.tolist(), strict=True))
            if right > left
        )
        if bars:
            parts.append(f'<path class="{name}" fill="{colour}" fill-opacity="{strong:g}" d="{bars}"/>')
    return [*parts, "</g>"], top + len(ways) * tall


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over time on one scale: (name, colour, values of the bins)."""

    name: str
    unit: str
    curves: Sequence[tuple[str, str, Floats]]
    written: Callable[[float], str]
    note: str = ""

    def drawn(self, axis: Axis, top: float) -> list[str]:
        """Areas between 0 and a round number that holds them."""
        highest = max((float(values.max()) for _, _, values in self.curves if len(values)), default=0.0)
        scale = _above(highest)
        bottom = top + CHART
        parts = [
            f'<g class="chart"><rect x="{LEFT}" y="{top:.1f}" width="{axis.wide:.1f}" height="{CHART}" fill="{GRID}" '
            'fill-opacity="0.25"/>',
            f'<path d="M{LEFT} {bottom:.1f}h{axis.wide:.1f}M{LEFT} {top:.1f}h{axis.wide:.1f}" stroke="{GRID}"/>',
            text(26, top + 18, self.name, size=12, weight=600),
            text(26, top + 34, self.unit, size=12, fill=FAINT),
            text(LEFT - 6, top + 8, self.written(scale), size=11, fill=FAINT, anchor="end"),
            text(LEFT - 6, bottom + 1, "0", size=11, fill=FAINT, anchor="end"),
        ]
        lines = []
        for name, colour, values in self.curves:
            heights = np.round(bottom - values / scale * CHART, 1)
            changes = np.flatnonzero(np.diff(heights, prepend=bottom))
            xs = LEFT + changes * (axis.wide / len(heights))
            line = "".join(f"H{x:.1f}V{y:g}" for x, y in zip(xs, heights[changes], strict=True))
            path = f"M{LEFT} {bottom:.1f}{line}H{WIDTH - RIGHT}"
            parts.append(f'<path class="area" d="{path}V{bottom:.1f}z" fill="{colour}" fill-opacity="0.18"/>')
            hint = f"<title>{escape(name)}</title>"
            lines.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.2">{hint}</path>')
        parts += lines
        x = float(WIDTH - RIGHT)
        for name, colour, _ in reversed(self.curves):
            parts.append(text(x, top - 5, name, size=11, fill=colour, anchor="end", weight=600))
            x -= LETTER * 11 * len(name) + 14
        if self.note:
            parts.append(text(LEFT, top - 5, fitting(self.note, 11, x - LEFT), size=11, fill=FAINT))
        return [*parts, "</g>"]


def _above(value: float) -> float:
    """The round number that holds a value.

    >>> _above(7.2), _above(0.031), _above(0.0)
    (8.0, 0.04, 1.0)
    """
    if value <= 0:
        return 1.0
    unit = 10.0 ** floor(log10(value))
    return next(float(f"{factor * unit:.6g}") for factor in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if factor * unit >= value)


def charts(result: Result, axis: Axis) -> list[Chart]:
    """KV blocks of each pool, requests that wait, and KV under way."""
    found = []
    totals, steps, requests, moved = result.totals, result.steps, result.requests, result.transfers
    roles = np.array(totals.roles or ("aggregated",) * totals.replicas)
    if steps is not None:
        curves = []
        for role in ROLES:
            own = np.flatnonzero(roles == role)
            blocks = sum(totals.lanes[i] * totals.kv_blocks[i] for i in own.tolist())
            if blocks:
                rows = steps[steps["replica"].isin(own)]
                held = means(axis, rows["start_s"], rows["end_s"], rows["kv_blocks"] / blocks)
                curves.append((f"{role} pool" if role != "aggregated" else "all replicas", ROLES[role], held))
        note = "while steps run" if len(moved) else ""
        found.append(Chart("KV held", "of each pool", curves, lambda share: f"{share * 100:g} %", note))
    served = requests[requests["first_schedule_s"].notna()]
    waiting = means(axis, served["arrival_s"], served["first_schedule_s"], np.ones(len(served)))
    until = "from arrival to first step" + (", encoding included" if encodes_before(result) else "")
    curves = [(until, PREFILL if len(moved) else FAINT, waiting)]
    if len(moved):
        room_s = moved[["ready_s", "reserved_s"]].max(axis=1)
        curves.append(("for room to decode", KV, means(axis, moved["ready_s"], room_s, np.ones(len(moved)))))
    found.append(Chart("Waiting", "requests", curves, lambda count: f"{count:g}"))
    if len(moved):
        under_way_s = np.maximum(moved["landed_s"] - moved["reserved_s"], 1e-12)
        rates = means(axis, moved["reserved_s"], moved["landed_s"], moved["nbytes"] / under_way_s / 1e9)
        found.append(
            Chart("KV sent", "GB/s", [("all transfers", KV, rates)], lambda rate: f"{rate:g}", _busiest(result))
        )
    return found


def encodes_before(result: Result) -> bool:
    """Whether workers of their own encode the requests' images before the first step."""
    return result.encode is not None and result.encode.workers > 0


def _busiest(result: Result) -> str:
    links, lasted_s = result.links, result.totals.makespan_s
    if not len(links) or lasted_s <= 0:
        return ""
    use = (links["carried_bytes"] / (links["bytes_per_s"] * lasted_s)).to_numpy()
    link = links.iloc[int(use.argmax())]
    rate = scaled(float(link["bytes_per_s"]), "B/s")
    return f"busiest link over the whole run: {printable(link['name'])}, {percent(float(use.max()))} of {rate}"


def means(axis: Axis, starts_s: ArrayLike, ends_s: ArrayLike, values: ArrayLike) -> Floats:
    """Over every BIN of the axis, the mean of the sum of what holds from its start to its end."""
    starts, ends, held = (np.asarray(array, dtype=float) for array in (starts_s, ends_s, values))
    edges = np.linspace(axis.low, axis.high, int(axis.wide / BIN) + 1)
    seen = (ends > axis.low) & (starts < axis.high)
    begins, stops, held = np.maximum(starts[seen], axis.low), np.minimum(ends[seen], axis.high), held[seen]
    times = np.concatenate([[axis.low], begins, stops, [axis.high]])
    order = np.argsort(times, kind="stable")
    sums = np.cumsum(np.concatenate([[0.0], held, -held, [0.0]])[order])
    times = times[order]
    integral = np.concatenate([[0.0], np.cumsum(sums[:-1] * np.diff(times))])
    means: Floats = np.diff(np.interp(edges, times, integral)) / np.diff(edges)
    return np.maximum(means, 0.0)


def fitting(words: str, size: float, wide: float, letter: float = PLAIN) -> str:
    """The words, with their end left out where they would be wider than so many pixels.

    >>> fitting("far too long", 10, 60.0)
    'far too l…'
    """
    most = max(2, int(wide / (letter * size)))
    return words if len(words) <= most else f"{words[: most - 1].rstrip()}…"


def wrapped(words: str, size: float, lines: int, wide: float = WIDTH - 2 * 26, letter: float = PLAIN) -> list[str]:
    """The words on at most so many lines; words without a space are broken, what has no place is left out.

    >>> wrapped("one two three four", 10, 2, 60.0)
    ['one two', 'three four']
    """
    most = max(2, int(wide / (letter * size)))
    found = textwrap.wrap(words, most, break_on_hyphens=False) or [""]
    return (
        [*found[: lines - 1], fitting(" ".join(found[lines - 1 :]), size, wide, letter)]
        if len(found) > lines
        else found
    )


def text(
    x: float, y: float, text: str, *, size: int = 13, fill: str = INK, anchor: str = "start", weight: int = 400
) -> str:  # fmt: skip
    """One line of words."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{fill}">{escape(text)}</text>'
    )
