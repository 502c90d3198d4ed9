"""What did every replica do, and when did KV go from one to the other? One SVG picture of a stretch of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from simulator.result import Result
from ui.latencyfigure import FAINT, GRID
from ui.timelinecharts import (
    BOLD,
    CHART,
    CHART_GAP,
    DECODE,
    KV,
    LEFT,
    MIXED,
    PREFILL,
    QUEUE,
    RIGHT,
    ROLES,
    WIDTH,
    Axis,
    charts,
    encodes_before,
    request_lines,
    text,
    wrapped,
)
from ui.words import at_hand, in_short, printable, scaled

if TYPE_CHECKING:
    from planner.plan import Plan

PHASES = (("prefill", PREFILL), ("decode", DECODE), ("mixed", MIXED))
#: Pixels between two lanes, between pools, and between pools that KV goes between.
LANE_GAP, POOL_GAP, KV_GAP = 5.0, 14.0, 54.0
#: Most that are drawn; more lanes and transfers are left out and counted, more bars are merged.
REPLICAS, TRANSFERS, BARS = 24, 300, 2400
#: Of a window where none is given: requests that arrive in it, steps and steps with prompts that end in it at least,
#: and requests among them that have their first token in it at least.
ARRIVALS, STEPS, PROMPTS, ANSWERED = 30, 24, 8, 3
#: Share of the picture without steps from which on a lane says that there are none any more.
SILENT = 0.2
#: Pixels of a letter of the legend, and of the note behind it.
LEGEND_LETTER, NOTE_LETTER = 7, 5.4


def run_figure(result: Result, plan: Plan) -> str:
    """The middle of a run of a plan, see timeline_figure."""
    return timeline_figure(result, f"{plan.model} on {at_hand(plan.devices)}: {in_short(plan)}")


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
    axis = Axis(low, high)
    moved = result.transfers
    since_s = moved[["ready_s", "reserved_s"]].min(axis=1)  # layers go before the last of the prompt is computed
    moved = moved[(moved["landed_s"] >= low) & (since_s <= high)]
    ran = result.steps is None or len(result.steps) > 0 or bool(result.requests["finish_s"].notna().any())
    told = _told(result, axis, moved) if ran else _idle(result)
    head, y = [], 30.0
    for line in wrapped(title, 16, 3, letter=BOLD):
        head.append(text(26, y, line, size=16, weight=600))
        y += 20
    for line in wrapped(told, 12, 4):
        head.append(text(26, y + 1, line, size=12, fill=FAINT))
        y += 16
    lanes, below = _lanes(result, y + (34 if ran else 8))
    bars = _steps(result, lanes, axis)
    if ran:
        present = [phase for phase in PHASES if any(f'class="{phase[0]}"' in bar for bar in bars)]
        legend, lower = _legend(present, y + 12, kv=len(result.transfers) > 0, encoded=encodes_before(result))
        if lower:
            lanes, below = _lanes(result, y + 34 + lower)
            bars = _steps(result, lanes, axis)
        head += legend
    body = [*_pools(lanes), *bars, *_transfers(moved, lanes, axis)]
    body += _silence(result, lanes, axis) if ran else _nothing(lanes, axis)
    bottom = below
    if ran:
        strip, below = request_lines(result, axis, below + CHART_GAP)
        body += strip
        bottom = below + CHART_GAP
        for chart in charts(result, axis):
            body += chart.drawn(axis, bottom)
            bottom += CHART + CHART_GAP
        bottom -= CHART_GAP
        head += axis.drawn(lanes[0].top - 6 if lanes else y, bottom)
    tall = round(bottom + (52 if ran else 26))
    ground = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{tall - 1}" rx="10" fill="#ffffff" stroke="{GRID}"/>'
    clip = f'<clipPath id="window"><rect x="{LEFT}" y="0" width="{axis.wide}" height="{tall}"/></clipPath>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}" '
        f'role="img" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif">\n'
        f"<title>{escape(title)}</title>\n<desc>{escape(told)}</desc>\n<defs>{clip}</defs>\n"
        + "\n".join([ground, *head, *body])
        + "\n</svg>\n"
    )


def _told(result: Result, axis: Axis, moved: pd.DataFrame) -> str:
    """What the picture shows of the run, and what it does not."""
    totals, encode = result.totals, result.encode
    arrivals = int(result.requests["arrival_s"].between(axis.low, axis.high).sum())
    said = (
        f"{axis.high - axis.low:.3g} s of a run of {totals.makespan_s:.4g} s, in which {_counted(arrivals, 'request')} "
    )
    said += "arrives" if arrivals == 1 else "arrive"
    if len(result.transfers):
        said += f" and KV goes {'once' if len(moved) == 1 else f'{len(moved)} times'} to another replica"
    parts = [said + "."]
    if totals.replicas > REPLICAS:
        parts.append(f"{REPLICAS} of {totals.replicas} replicas are shown.")
    if len(moved) > TRANSFERS:
        parts.append(f"{TRANSFERS} transfers are shown.")
    if encode is not None:
        where = f"{_counted(encode.workers, 'encode worker')} outside these lanes" if encode.workers else "prompt steps"
        parts.append(f"Images are encoded {'by' if encode.workers else 'in'} {where}.")
    rejected = int(result.requests["rejected"].sum())
    if rejected:
        parts.append(f"In the whole run {_counted(rejected, 'request')} {'was' if rejected == 1 else 'were'} rejected.")
    if totals.requeued:
        parts.append(f"In the whole run {_counted(totals.requeued, 'request')} started anew after failures.")
    if totals.role_switches:
        parts.append(
            f"In the whole run {_counted(totals.role_switches, 'change')} of role; lanes are ordered by the roles at "
            "its start."
        )
    return " ".join(parts)


def _idle(result: Result) -> str:
    """Why there is nothing to show."""
    frame = result.requests
    if not len(frame):
        return "No request arrived."
    rejected, count = int(frame["rejected"].sum()), len(frame)
    if rejected == count:
        return f"{'The only request was' if count == 1 else f'All {count:,} requests were'} rejected."
    return f"None of {_counted(count, 'request')} was served; {rejected:,} rejected."


def _nothing(lanes: Sequence[_Lane], axis: Axis) -> list[str]:
    middle = LEFT + axis.wide / 2
    return [
        text(middle, lane.top + lane.height / 2 + 4, "no step ran", size=12, fill=FAINT, anchor="middle")
        for lane in lanes
    ]


def _silence(result: Result, lanes: Sequence[_Lane], axis: Axis) -> list[str]:
    """In the lanes of replicas that do nothing more, though requests arrive: since when."""
    steps, parts = result.steps, []
    if steps is None:
        return []
    ends = steps.groupby("replica")["end_s"].max()
    newest_s = float(result.requests["arrival_s"].max())
    for lane in lanes:
        last_s = float(ends.get(lane.replica, axis.low))
        since_s = max(last_s, axis.low)
        if newest_s <= last_s or axis.high - since_s < SILENT * (axis.high - axis.low):
            continue
        said = f"no step after {last_s:.4g} s" if lane.replica in ends.index else "no step in the whole run"
        parts.append(text(WIDTH - RIGHT - 6, lane.top + lane.height / 2 + 4, said, size=11, fill=FAINT, anchor="end"))
    return parts


def middle_s(result: Result, requests: int = ARRIVALS) -> tuple[float, float]:
    """A stretch of the run from around its middle arrival; all of a run of as few requests as `requests`.

    So long that so many requests arrive, that STEPS steps end and PROMPTS with prompts in them, and that ANSWERED of
    those requests have their first token, so far as the run goes.
    """
    arrival_s = np.sort(result.requests["arrival_s"].to_numpy())
    steps = result.steps
    ends = [steps["end_s"].max()] if steps is not None and len(steps) else []
    last_s = float(max([*arrival_s[-1:], *ends], default=0.0))
    if len(arrival_s) <= requests:
        first_s = float(arrival_s[0]) if len(arrival_s) else 0.0
        return first_s, last_s if last_s > first_s else first_s + 1.0
    start = (len(arrival_s) - requests) // 2
    low, high = float(arrival_s[start]), float(arrival_s[start + requests])
    if not high > low:
        high = low + max(last_s - low, 1.0)
    return low, max(high, min(last_s, _busy_until(result, low, high)))


def _busy_until(result: Result, low: float, high: float) -> float:
    """When enough has happened since `low` to be seen, of steps and of the requests that arrive up to `high`."""
    times_s = [low]
    if result.steps is not None:
        rows = result.steps[result.steps["start_s"] >= low].sort_values("end_s")
        enough = np.flatnonzero(np.cumsum(rows["steps"].to_numpy()) >= STEPS)
        prompts = rows["end_s"].to_numpy()[rows["prefill_tokens"].to_numpy() > 0]
        times_s += rows["end_s"].to_numpy()[enough[:1]].tolist() + prompts[PROMPTS - 1 : PROMPTS].tolist()
    own = result.requests[result.requests["arrival_s"].between(low, high)]
    answered = np.sort(own["first_token_s"].dropna().to_numpy())
    return float(max(times_s + answered[ANSWERED - 1 : ANSWERED].tolist()))


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


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


def _lanes(result: Result, top: float) -> tuple[list[_Lane], float]:
    """The replicas by role, from `top` down, and where they end."""
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
    y = top
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
        parts.append(text(LEFT - 8, middle, f"replica {lane.replica}", size=12, fill=FAINT, anchor="end"))
        if lane.role not in named and lane.role != "aggregated":
            parts.append(text(26, middle, lane.role, weight=600, fill=ROLES[lane.role]))
        named.add(lane.role)
    return parts


def _steps(result: Result, lanes: Sequence[_Lane], axis: Axis) -> list[str]:
    """A group for every lane, and in it a path for every phase."""
    steps = result.steps
    if steps is None:
        middle = LEFT + axis.wide / 2
        return [
            f'<g class="lane" data-replica="{lane.replica}">'
            + text(middle, lane.top + lane.height / 2 + 4, "steps were not recorded", fill=FAINT, anchor="middle")
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


def _bars(rows: pd.DataFrame, most: dict[str, int], axis: Axis, least: float) -> list[tuple[float, float, float, int]]:
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


def _transfers(moved: pd.DataFrame, lanes: Sequence[_Lane], axis: Axis) -> list[str]:
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
        edge, middle = float(WIDTH - RIGHT), (since + until) / 2
        drawn = f'<path d="M{early:.1f} {since:.1f}H{left:.1f}" stroke-width="2.5"/>' if left > early else ""
        drawn += f'<path d="M{left:.1f} {since:.1f}H{sent:.1f}" stroke-dasharray="2 2"/>' if sent > left else ""
        if landed <= axis.high:
            line = f"M{sent:.1f} {since:.1f}C{sent:.1f} {middle:.1f} {right:.1f} {middle:.1f} {right:.1f} {until:.1f}"
            drawn += f'<path d="{line}"/><circle cx="{right:.1f}" cy="{until:.1f}" r="2" fill="{KV}"/>'
        elif sent < edge:  # it is half-way when the window ends
            drawn += f'<path d="M{sent:.1f} {since:.1f}C{sent:.1f} {middle:.1f} {sent:.1f} {middle:.1f} {edge:.1f} '
            drawn += f'{middle:.1f}"/>'
        hint = ""
        if told:
            hint = f"<title>request {request}: {scaled(nbytes, 'B')}, {(landed - ready) * 1e3:.3g} ms</title>"
        parts.append(f'<g class="kv">{hint}{drawn}</g>')
    style = f'fill="none" stroke="{KV}" stroke-width="1.3" stroke-opacity="0.85" clip-path="url(#window)"'
    return [f'<g class="transfers" {style}>', *parts, "</g>"] if parts else []


def _within(frame: pd.DataFrame, since: str, until: str, low: float, high: float) -> pd.DataFrame:
    """The rows that hold at some time of a window."""
    return frame[(frame[until] >= low) & (frame[since] <= high)]


def _legend(present: Sequence[tuple[str, str]], y: float, *, kv: bool, encoded: bool) -> tuple[list[str], float]:
    """What the colours mean, from y down, and how far beyond one line it goes."""
    named = {"prefill": "prompts", "decode": "decode", "mixed": "prompts and decode in one step"}
    entries = [(colour, named[name]) for name, colour in present]
    entries += [(KV, "KV to another replica")] if kv else []
    entries.append((QUEUE, "request waits or is encoded" if encoded else "request waits"))
    note = "bars: steps in a row with one batch, as tall as it"
    parts, x, first = [], float(LEFT), y
    for colour, said in entries:
        wide = 18 + LEGEND_LETTER * len(said)
        if x + wide > WIDTH - RIGHT:
            x, y = float(LEFT), y + 20
        if colour == KV:
            parts.append(f'<path d="M{x:.1f} {y - 4}h14" stroke="{KV}" stroke-width="1.6"/>')
            parts.append(f'<circle cx="{x + 12:.1f}" cy="{y - 4}" r="2.4" fill="{KV}"/>')
        else:
            parts.append(f'<rect x="{x:.1f}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(text(x + 18, y, said))
        x += wide + 22
    if x + NOTE_LETTER * len(note) > WIDTH - RIGHT:
        y += 18
    parts.append(text(WIDTH - RIGHT, y, note, size=11, fill=FAINT, anchor="end"))
    return parts, y - first
