"""What did every replica do, and when did KV go from one to the other? One SVG picture of a stretch of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from simulator.result import Result
from ui.latencyfigure import FAINT, GRID, INK, LETTER
from ui.words import cut, percent, printable, scaled

if TYPE_CHECKING:
    from planner.plan import Plan

Floats = NDArray[np.float64]

#: Of steps, and of the pools whose steps they mostly are; apart for every kind of colour vision.
PREFILL, DECODE, MIXED, KV, QUEUE = "#d55e00", "#0072b2", "#aa4499", "#008a60", "#b6bdc9"
PHASES = (("prefill", PREFILL), ("decode", DECODE), ("mixed", MIXED))
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
#: Pixels: the picture, what is beside its lanes, where they begin, and the parts below them.
WIDTH, LEFT, RIGHT, TOP, CHART, CHART_GAP = 960, 158, 26, 100, 46, 24
#: Pixels between two lanes, between pools, and between pools that KV goes between.
LANE_GAP, POOL_GAP, KV_GAP = 5.0, 14.0, 54.0
#: Most that are drawn; more lanes and transfers are left out and counted, more bars are merged.
REPLICAS, TRANSFERS, REQUESTS, BARS = 24, 300, 44, 2400
#: Requests that arrive in the window where none is given.
ARRIVALS = 30
#: Pixels over which curves are averaged.
BIN = 2.0


def run_figure(result: Result, plan: Plan) -> str:
    """The middle of a run of a plan, see timeline_figure."""
    pools = []
    for pool in plan.pools:
        role = "" if pool.role == "aggregated" else f"{pool.role} "
        pools.append(f"{role}{pool.replicas} x {cut(pool)}" + (f" on {pool.hardware}" if pool.hardware else ""))
    devices = " and ".join(f"{count} {name}" for name, count in plan.devices.items())
    return timeline_figure(result, f"{plan.model} on {devices}: {' + '.join(pools)}")


def timeline_figure(result: Result, title: str, *, window_s: tuple[float, float] | None = None) -> str:
    """Steps of every replica as bars, KV that goes from one to the other as lines, and what became of requests, as SVG.

    window_s   times of the run to show; by default a stretch in its middle in which ARRIVALS requests arrive

    Bars are as tall as their batch: tokens of a prompt, sequences of a decode step, over the most in the picture. Below
    them the requests that arrive, the KV blocks that steps hold, how many requests wait, and KV under way, each
    transfer at its mean rate. On a
    white ground of its own, so that it reads on light and on dark pages. Raises ValueError for a window that ends
    before it begins.
    """
    low, high = window_s or middle_s(result)
    if not low < high:
        raise ValueError(f"window {low:g} s to {high:g} s: expected one that ends after it begins")
    title = printable(title)  # XML has no place for most control characters
    axis = _Axis(low, high)
    lanes, below = _lanes(result)
    shown = {lane.replica for lane in lanes}
    moved = _within(result.transfers, "ready_s", "landed_s", low, high)
    bars = _steps(result, lanes, axis)
    body = [*_pools(lanes), *bars, *_transfers(moved, lanes, axis)]
    strip, below = _requests(result, axis, below + CHART_GAP)
    body += strip
    charts = list(_charts(result, axis))
    bottom = below + CHART_GAP
    for chart in charts:
        body += chart.drawn(axis, bottom)
        bottom += CHART + CHART_GAP
    bottom -= CHART_GAP
    tall = round(bottom + 52)
    arrivals = int(result.requests["arrival_s"].between(low, high).sum())
    told = f"{high - low:.3g} s of a run of {result.totals.makespan_s:.4g} s, in which {arrivals} requests arrive"
    if len(result.transfers):
        told += f" and KV goes {len(moved)} times to another replica"
    told += "."
    if result.totals.replicas > len(shown):
        told += f" {len(shown)} of {result.totals.replicas} replicas are shown."
    if len(moved) > TRANSFERS:
        told += f" {TRANSFERS} transfers are shown."
    present = [phase for phase in PHASES if any(f'class="{phase[0]}"' in bar for bar in bars)]
    clip = f'<clipPath id="window"><rect x="{LEFT}" y="0" width="{axis.wide}" height="{tall}"/></clipPath>'
    head = [
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{tall - 1}" rx="10" fill="#ffffff" stroke="{GRID}"/>',
        _text(26, 30, title, size=_fitting(title, 16), weight=600),
        _text(26, 51, told, size=_fitting(told, 12), fill=FAINT),
        *_legend(present, kv=len(result.transfers) > 0),
        *axis.drawn(TOP - 6, bottom),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}" '
        f'role="img" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif">\n'
        f"<title>{escape(title)}</title>\n<desc>{escape(told)}</desc>\n<defs>{clip}</defs>\n"
        + "\n".join(head + body)
        + "\n</svg>\n"
    )


def middle_s(result: Result, requests: int = ARRIVALS) -> tuple[float, float]:
    """A stretch of the run around its middle arrival in which so many requests arrive; all of a shorter run."""
    arrival_s = np.sort(result.requests["arrival_s"].to_numpy())
    ends = [frame["end_s"].max() for frame in (result.steps,) if frame is not None and len(frame)]
    last_s = float(max([*arrival_s[-1:], *ends], default=0.0))
    if len(arrival_s) <= requests:
        first_s = float(arrival_s[0]) if len(arrival_s) else 0.0
        return first_s, last_s if last_s > first_s else first_s + 1.0
    start = (len(arrival_s) - requests) // 2
    low, high = float(arrival_s[start]), float(arrival_s[start + requests])
    return low, high if high > low else low + max(last_s - low, 1.0)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Time, from left to right."""

    low: float
    high: float

    @property
    def wide(self) -> float:
        return float(WIDTH - LEFT - RIGHT)

    @property
    def pixels_per_s(self) -> float:
        return self.wide / (self.high - self.low)

    def x(self, time_s: ArrayLike) -> Floats:
        """Pixels; times outside the window are at most a picture away from it."""
        pixels = LEFT + (np.asarray(time_s, dtype=float) - self.low) * self.pixels_per_s
        kept: Floats = np.clip(pixels, LEFT - WIDTH, 2 * WIDTH)
        return kept

    def drawn(self, top: float, bottom: float) -> list[str]:
        parts = []
        unit, scale = ("s", 1.0) if self.high - self.low >= 0.05 else ("ms", 1e-3)
        for tick in _fine(self.low / scale, self.high / scale):
            x = float(self.x(tick * scale))
            parts.append(f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="{GRID}"/>')
            parts.append(_text(x, bottom + 17, f"{tick:.9g}", fill=FAINT, anchor="middle"))
        parts.append(f'<path d="M{LEFT} {bottom:.1f}h{self.wide:.1f}" stroke="{FAINT}"/>')
        return [*parts, _text(LEFT + self.wide / 2, bottom + 38, f"time, {unit}", anchor="middle")]


def _fine(low: float, high: float) -> list[float]:
    """Round numbers, exact also where the axis is short and far from 0.

    >>> _fine(1000.0, 1000.5)
    [1000.0, 1000.1, 1000.2, 1000.3, 1000.4, 1000.5]
    """
    raw = (high - low) / 9
    unit = 10.0 ** floor(log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    return [float(f"{i * step:.12g}") for i in range(ceil(low / step), floor(high / step) + 1)]


@dataclass(frozen=True, slots=True)
class _Lane:
    """One replica's place in the picture; its schedulers share the height."""

    replica: int
    role: str
    schedulers: int
    top: float
    height: float

    @property
    def bottom(self) -> float:
        return self.top + self.height


def _lanes(result: Result) -> tuple[list[_Lane], float]:
    """The replicas by role, and where they end."""
    totals = result.totals
    roles = totals.roles or ("aggregated",) * totals.replicas
    pools = {role: [i for i, own in enumerate(roles) if own == role] for role in ROLES}
    while sum(map(len, pools.values())) > REPLICAS:
        max(pools.values(), key=len).pop()
    count = sum(map(len, pools.values()))
    usual = 34.0 if count <= 6 else 26.0 if count <= 12 else 16.0
    # A replica whose phases run at once on shares of its devices logs more lanes than it has KV pools.
    steps = result.steps
    most = steps.groupby("replica")["lane"].max() + 1 if steps is not None and len(steps) else pd.Series(dtype=int)
    logged = dict(zip(most.index.tolist(), most.tolist(), strict=True))
    lanes: list[_Lane] = []
    y = float(TOP)
    for role, replicas in pools.items():
        if replicas and lanes:
            y += KV_GAP if len(result.transfers) else POOL_GAP
        for replica in replicas:
            schedulers = max(totals.lanes[replica], logged.get(replica, 0))
            height = min(48.0, max(usual, 5.0 * schedulers))
            lanes.append(_Lane(replica, role, schedulers, y, height))
            y += height + LANE_GAP
    return lanes, y - LANE_GAP


def _pools(lanes: Sequence[_Lane]) -> list[str]:
    """Names and grounds of the lanes."""
    parts, named = [], set()
    for lane in lanes:
        middle = lane.top + lane.height / 2 + 4
        parts.append(
            f'<rect x="{LEFT}" y="{lane.top:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{lane.height:.1f}" '
            f'fill="{GRID}" fill-opacity="0.45"/>'
        )
        parts.append(_text(LEFT - 8, middle, f"replica {lane.replica}", size=12, fill=FAINT, anchor="end"))
        if lane.role not in named and lane.role != "aggregated":
            parts.append(_text(26, middle, lane.role, weight=600, fill=ROLES[lane.role]))
        named.add(lane.role)
    return parts


def _steps(result: Result, lanes: Sequence[_Lane], axis: _Axis) -> list[str]:
    """A group for every lane, and in it a path for every phase."""
    steps = result.steps
    if steps is None:
        middle = LEFT + axis.wide / 2
        return [
            f'<g class="lane" data-replica="{lane.replica}">'
            + _text(middle, lane.top + lane.height / 2 + 4, "steps were not recorded", fill=FAINT, anchor="middle")
            + "</g>"
            for lane in lanes
        ]
    steps = _within(steps, "start_s", "end_s", axis.low, axis.high)
    most = {
        name: max(1, int(steps[name].max())) if len(steps) else 1 for name in ("prefill_tokens", "decode_sequences")
    }
    own = {lane.replica: steps[steps["replica"] == lane.replica] for lane in lanes}
    least = 0.7
    while True:
        bars = {
            (lane.replica, number): _bars(rows[rows["lane"] == number], most, axis, least)
            for lane in lanes
            for rows in (own[lane.replica],)
            for number in range(lane.schedulers)
        }
        if sum(map(len, bars.values())) <= BARS or least > axis.wide:
            break
        least *= 1.5
    parts = []
    for lane in lanes:
        tall = lane.height / lane.schedulers
        paths = dict.fromkeys(range(len(PHASES)), "")
        for number in range(lane.schedulers):
            floor = lane.top + (number + 1) * tall
            for left, right, share, phase in bars[lane.replica, number]:
                top = floor - tall * (0.12 + 0.88 * share)
                paths[phase] += f"M{left:.1f} {floor:.1f}V{top:.1f}H{right:.1f}V{floor:.1f}z"
        drawn = [
            f'<path class="{PHASES[phase][0]}" fill="{PHASES[phase][1]}" d="{path}"/>'
            for phase, path in paths.items()
            if path
        ]
        group = f'<g class="lane" data-replica="{lane.replica}" clip-path="url(#window)">'
        parts.append(group + "".join(drawn) + "</g>")
    return parts


def _bars(rows: pd.DataFrame, most: dict[str, int], axis: _Axis, least: float) -> list[tuple[float, float, float, int]]:
    """Left, right, share of the height and phase; those narrower than `least` pixels join their neighbours."""
    rows = rows.sort_values("start_s")
    count = rows["steps"].to_numpy()
    start, end = rows["start_s"].to_numpy(), rows["end_s"].to_numpy()
    # A row is drawn as the steps it stands for where they can be told apart.
    count = np.where((end - start) * axis.pixels_per_s >= 3.0 * count, count, 1)
    which = np.repeat(np.arange(len(rows)), count)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    one_s = ((end - start) / count)[which]
    starts, ends = start[which] + nth * one_s, start[which] + (nth + 1) * one_s
    inside = (ends > axis.low) & (starts < axis.high)
    prefill = rows["prefill_tokens"].to_numpy()[which][inside]
    decode = rows["decode_sequences"].to_numpy()[which][inside]
    phases = np.where(prefill > 0, np.where(decode > 0, 2, 0), 1)
    shares = np.maximum(prefill / most["prefill_tokens"], decode / most["decode_sequences"])
    lefts, rights = axis.x(starts[inside]), axis.x(ends[inside])
    bars: list[tuple[float, float, float, int]] = []
    held: list[tuple[float, float, int]] = []  # width, share, phase of what is merged
    left = 0.0
    values = zip(lefts.tolist(), rights.tolist(), shares.tolist(), phases.tolist(), strict=True)
    for begin, stop, share, phase in values:
        if not held:
            left = begin
        held.append((stop - begin, share, phase))
        if stop - left >= least:
            bars.append(_merged(left, stop, held))
            held = []
    if held:
        bars.append(_merged(left, stop, held))
    return bars


def _merged(left: float, right: float, held: Sequence[tuple[float, float, int]]) -> tuple[float, float, float, int]:
    """One bar for several: their mean height, and the phase that most of the time went to."""
    wide = sum(width for width, _, _ in held) or 1.0
    share = sum(width * share for width, share, _ in held) / wide
    by_phase = [sum(width for width, _, phase in held if phase == own) for own in range(len(PHASES))]
    right -= 0.6 if right - left > 2.0 else 0.0  # neighbours stay apart
    return left, right, share, int(np.argmax(by_phase))


def _transfers(moved: pd.DataFrame, lanes: Sequence[_Lane], axis: _Axis) -> list[str]:
    """A line for the KV of every request: along its source while it is computed or waits, then over to its target."""
    place = {lane.replica: lane for lane in lanes}
    moved = moved[moved["source"].isin(place) & moved["target"].isin(place)]
    if len(moved) > TRANSFERS:
        moved = moved.iloc[np.linspace(0, len(moved) - 1, TRANSFERS).astype(int)]
    told = len(moved) <= 100
    parts = []
    columns = ("request", "source", "target", "nbytes", "ready_s", "reserved_s", "landed_s")
    for request, source, target, nbytes, ready, reserved, landed in zip(
        *(moved[name].tolist() for name in columns), strict=True
    ):
        down = place[target].top > place[source].top
        since = place[source].bottom if down else place[source].top
        until = place[target].top if down else place[target].bottom
        early, left, sent, right = axis.x([min(ready, reserved), ready, max(ready, reserved), landed]).tolist()
        bend = (until - since) / 2
        line = f"M{sent:.1f} {since:.1f}C{sent:.1f} {since + bend:.1f} {right:.1f} {until - bend:.1f} {right:.1f} "
        line += f"{until:.1f}"
        waits = f'<path d="M{left:.1f} {since:.1f}H{sent:.1f}" stroke-dasharray="2 2"/>' if sent > left else ""
        ahead = f'<path d="M{early:.1f} {since:.1f}H{left:.1f}" stroke-width="2.5"/>' if left > early else ""
        hint = ""
        if told:
            hint = f"<title>request {request}: {scaled(nbytes, 'B')}, {(landed - ready) * 1e3:.3g} ms</title>"
        parts.append(
            f'<g class="kv">{hint}{ahead}{waits}<path d="{line}"/>'
            f'<circle cx="{right:.1f}" cy="{until:.1f}" r="2" fill="{KV}"/></g>'
        )
    style = f'fill="none" stroke="{KV}" stroke-width="1.3" stroke-opacity="0.85" clip-path="url(#window)"'
    return [f'<g class="transfers" {style}>', *parts, "</g>"] if parts else []


def _requests(result: Result, axis: _Axis, top: float) -> tuple[list[str], float]:
    """A line for every request that arrives in the window: waits, prompt, KV under way, answer; and where they end."""
    frame = result.requests
    frame = frame[frame["arrival_s"].between(axis.low, axis.high) & frame["finish_s"].notna()].sort_values("arrival_s")
    if not len(frame):
        return [], top - CHART_GAP
    title = "Requests"
    if len(frame) > REQUESTS:
        title = f"{REQUESTS} of {len(frame)} requests"
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
    parts = [_text(26, top + 14, title, size=12, weight=600), _text(26, top + 30, "that arrive", size=12, fill=FAINT)]
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
class _Chart:
    """Curves over time on one scale: (name, colour, values of the bins)."""

    name: str
    unit: str
    curves: Sequence[tuple[str, str, Floats]]
    written: Callable[[float], str]
    note: str = ""

    def drawn(self, axis: _Axis, top: float) -> list[str]:
        """Areas between 0 and a round number that holds them."""
        highest = max((float(values.max()) for _, _, values in self.curves if len(values)), default=0.0)
        scale = _above(highest)
        bottom = top + CHART
        parts = [
            f'<g class="chart"><rect x="{LEFT}" y="{top:.1f}" width="{axis.wide:.1f}" height="{CHART}" fill="{GRID}" '
            'fill-opacity="0.25"/>',
            f'<path d="M{LEFT} {bottom:.1f}h{axis.wide:.1f}M{LEFT} {top:.1f}h{axis.wide:.1f}" stroke="{GRID}"/>',
            _text(26, top + 18, self.name, size=12, weight=600),
            _text(26, top + 34, self.unit, size=12, fill=FAINT),
            _text(LEFT - 6, top + 8, self.written(scale), size=11, fill=FAINT, anchor="end"),
            _text(LEFT - 6, bottom + 1, "0", size=11, fill=FAINT, anchor="end"),
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
            parts.append(_text(x, top - 5, name, size=11, fill=colour, anchor="end", weight=600))
            x -= LETTER * 11 * len(name) + 14
        if self.note:
            parts.append(_text(LEFT, top - 5, self.note, size=11, fill=FAINT))
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


def _charts(result: Result, axis: _Axis) -> list[_Chart]:
    """KV blocks of each pool, requests that wait, and KV under way."""
    charts = []
    totals, steps, requests, moved = result.totals, result.steps, result.requests, result.transfers
    roles = np.array(totals.roles or ("aggregated",) * totals.replicas)
    if steps is not None:
        curves = []
        for role in ROLES:
            own = np.flatnonzero(roles == role)
            blocks = sum(totals.lanes[i] * totals.kv_blocks[i] for i in own.tolist())
            if blocks:
                rows = steps[steps["replica"].isin(own)]
                held = _means(axis, rows["start_s"], rows["end_s"], rows["kv_blocks"] / blocks)
                curves.append((f"{role} pool" if role != "aggregated" else "all replicas", ROLES[role], held))
        note = "while steps run" if len(moved) else ""
        charts.append(_Chart("KV held", "of each pool", curves, lambda share: f"{share * 100:g} %", note))
    served = requests[requests["first_schedule_s"].notna()]
    waiting = _means(axis, served["arrival_s"], served["first_schedule_s"], np.ones(len(served)))
    curves = [("from arrival to first step", PREFILL if len(moved) else FAINT, waiting)]
    if len(moved):
        room_s = moved[["ready_s", "reserved_s"]].max(axis=1)
        curves.append(("for room to decode", KV, _means(axis, moved["ready_s"], room_s, np.ones(len(moved)))))
    charts.append(_Chart("Waiting", "requests", curves, lambda count: f"{count:g}"))
    if len(moved):
        under_way_s = np.maximum(moved["landed_s"] - moved["reserved_s"], 1e-12)
        rates = _means(axis, moved["reserved_s"], moved["landed_s"], moved["nbytes"] / under_way_s / 1e9)
        charts.append(
            _Chart("KV sent", "GB/s", [("all transfers", KV, rates)], lambda rate: f"{rate:g}", _busiest(result))
        )
    return charts


def _busiest(result: Result) -> str:
    links, lasted_s = result.links, result.totals.makespan_s
    if not len(links) or lasted_s <= 0:
        return ""
    use = (links["carried_bytes"] / (links["bytes_per_s"] * lasted_s)).to_numpy()
    link = links.iloc[int(use.argmax())]
    rate = scaled(float(link["bytes_per_s"]), "B/s")
    return f"busiest link over the whole run: {printable(link['name'])}, {percent(float(use.max()))} of {rate}"


def _means(axis: _Axis, starts_s: ArrayLike, ends_s: ArrayLike, values: ArrayLike) -> Floats:
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


def _within(frame: pd.DataFrame, since: str, until: str, low: float, high: float) -> pd.DataFrame:
    """The rows that hold at some time of a window."""
    return frame[(frame[until] >= low) & (frame[since] <= high)]


def _legend(present: Sequence[tuple[str, str]], *, kv: bool) -> list[str]:
    parts, x, y = [], float(LEFT), 78
    for name, colour in present:
        text = {"prefill": "prompts", "decode": "decode", "mixed": "prompts and decode in one step"}[name]
        parts.append(f'<rect x="{x:.1f}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 18, y, text))
        x += 44 + 7 * len(text)
    if kv:
        parts.append(f'<path d="M{x:.1f} {y - 4}h22" stroke="{KV}" stroke-width="1.6"/>')
        parts.append(f'<circle cx="{x + 22:.1f}" cy="{y - 4}" r="2.4" fill="{KV}"/>')
        parts.append(_text(x + 32, y, "KV to another replica"))
        x += 58 + 7 * len("KV to another replica")
    parts.append(f'<rect x="{x:.1f}" y="{y - 10}" width="12" height="12" fill="{QUEUE}"/>')
    parts.append(_text(x + 18, y, "request waits"))
    parts.append(
        _text(WIDTH - RIGHT, y, "bars: steps in a row with one batch, as tall as it", size=11, fill=FAINT, anchor="end")
    )
    return parts


def _fitting(text: str, size: int) -> int:
    """The type size at which a text fits into the picture, at most `size`."""
    return max(8, min(size, int((WIDTH - 2 * 26) / (LETTER * 0.92 * max(1, len(text))))))


def _text(
    x: float, y: float, text: str, *, size: int = 13, fill: str = INK, anchor: str = "start", weight: int = 400
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{fill}">{escape(text)}</text>'
    )
