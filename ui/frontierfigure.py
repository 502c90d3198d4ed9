"""Which mean TTFT goes with which time between tokens, by schedule? The frontier of a prefill study as one SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log
from typing import TYPE_CHECKING, Any

from ui.latencyfigure import FAINT, GRID, INK, LETTER, ticks
from ui.timelinecharts import text, wrapped
from ui.words import printable, seconds

if TYPE_CHECKING:
    from planner.prefillstudy import Outcome, Study

#: Colour and mark of each family: apart for every kind of colour vision, and by shape in grey.
LOOKS = {
    "orca": ("#5b6472", "ring"),
    "prefill-first": ("#a0785a", "diamond"),
    "sarathi-serve": ("#0072b2", "square"),
    "sarathi": ("#56b4e9", "dot"),
    "layered": ("#009e73", "triangle"),
    "shortest": ("#e69f00", "circle"),
    "deadline": ("#cc79a7", "diamond"),
    "receding": ("#d55e00", "star"),
    "receding-layers": ("#1d2433", "star"),
}
#: What families are called.
NAMES = {
    "orca": "Orca", "prefill-first": "prefill first (vLLM V0)", "sarathi": "SARATHI, by chunk",
    "sarathi-serve": "Sarathi-Serve, by budget", "layered": "layered prefill", "shortest": "shortest first, by budget",
    "deadline": "earliest deadline first, by budget", "receding": "program, chunks, by TBT limit",
    "receding-layers": "program, layers, by TBT limit",
}  # fmt: skip
#: Pixels: the picture, its edge, the room beside the plot, and the plot's height.
WIDTH, EDGE, LEFT, LEGEND, TALL = 960, 26, 74, 270, 400
#: Radius of a mark, and part by which axes go beyond the points.
MARK, ROOM = 5.0, 1.15


def frontier_figure(study: Study, content: dict[str, Any]) -> str:
    """Every schedule at the frontier's load, its 99th percentile of the time between tokens to the right, its mean
    TTFT upwards, with the limit and the bound; both axes logarithmic.

    On a white ground of its own, so that it reads on light and on dark pages.
    """
    load = study.loads[study.frontier]
    points = [o for o in (*load.outcomes, *study.wider) if not o.refused and o.tbt_p99_s > 0]
    title = printable(
        f"{content['model']} on {content['gpus']} x {content['hardware']}: {content['traffic']} at "
        f"{load.load_per_s:g} requests/s"
    )
    told = (
        f"{content['requests']:,} requests with prompts of {content['prompt_tokens']:,.0f} tokens in the mean; one "
        "mark for each schedule. Lower and further left is better."
    )
    head, y = [], 34.0
    for line in wrapped(title, 16, 2):
        head.append(text(EDGE, y, line, size=16, weight=600))
        y += 20
    for line in wrapped(told, 12, 2):
        head.append(text(EDGE, y, line, size=12, fill=FAINT))
        y += 16
    top, height = y + 12, round(y + 12 + TALL + 62)
    body = _plot(points, study.limit.seconds, str(study.limit.statistic), load.bound_s, top)
    ground = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10" fill="#ffffff" stroke="{GRID}"/>'
    said = "; ".join(f"{o.name} TTFT {seconds(o.ttft_mean_s)}, TBT {seconds(o.tbt_p99_s)}" for o in points)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif">\n'
        f"<title>{escape(title)}</title>\n<desc>{escape(said)}</desc>\n"
        + "\n".join([ground, *head, *body])
        + "\n</svg>\n"
    )


def _plot(points: Sequence[Outcome], limit_s: float, statistic: str, bound_s: float | None, top: float) -> list[str]:
    """Grid, limit, bound, families and their legend."""
    wide, bottom = WIDTH - LEFT - LEGEND, top + TALL
    across = _Axis([o.tbt_p99_s for o in points] + [limit_s], LEFT, LEFT + wide)
    up = _Axis([o.ttft_mean_s for o in points] + ([bound_s] if bound_s else []), bottom, top)
    parts = []
    for value in ticks(across.low * 1e3, across.high * 1e3, log=True):
        x = across(value / 1e3)
        parts += [_line(x, bottom, x, top, GRID), text(x, bottom + 17, f"{value:g}", fill=FAINT, anchor="middle")]
    for value in ticks(up.low, up.high, log=True):
        y = up(value)
        parts += [_line(LEFT, y, LEFT + wide, y, GRID), text(LEFT - 8, y + 4, f"{value:g}", fill=FAINT, anchor="end")]
    parts.append(_line(LEFT, bottom, LEFT + wide, bottom, FAINT))
    parts.append(
        text(LEFT + wide / 2, bottom + 40, "p99 of the time between tokens, ms (logarithmic)", anchor="middle")
    )
    middle = f"translate(20 {top + TALL / 2:.1f}) rotate(-90)"
    parts.append(f'<text transform="{middle}" text-anchor="middle" font-size="13" fill="{INK}">'
                 "mean time to first token, s (logarithmic)</text>")  # fmt: skip
    x = across(limit_s)
    parts.append(_line(x, bottom, x, top, INK, "5 4"))
    parts.append(text(x + 5, top + 13, f"limit: {statistic} {seconds(limit_s)}", size=12))
    if bound_s:
        y = up(bound_s)
        parts.append(_line(LEFT, y, LEFT + wide, y, INK, "2 3"))
        parts.append(text(LEFT + 6, y - 6, f"no schedule is below {seconds(bound_s)}", size=12))
    families = [family for family in LOOKS if any(o.family == family for o in points)]
    for family in families:
        colour, mark = LOOKS[family]
        mine = [o for o in points if o.family == family]
        places = [(across(o.tbt_p99_s), up(o.ttft_mean_s)) for o in sorted(mine, key=lambda o: o.tbt_p99_s)]
        path = "".join(f"{x:.1f} {y:.1f}L" for x, y in places).rstrip("L")
        if len(places) > 1:
            parts.append(
                f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/>'
            )
        parts += [_mark(x, y, colour, mark) for x, y in places]
    parts += _labels([o for o in points if o.family in ("sarathi-serve", "receding", "receding-layers")], across, up)
    for row, family in enumerate(families):
        y = top + 16 + 24 * row
        parts.append(_mark(LEFT + wide + 26, y - 4, *LOOKS[family]))
        parts.append(text(LEFT + wide + 40, y, NAMES[family]))
    return parts


class _Axis:
    """A logarithmic axis in pixels, a little beyond its values."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self.low, self.high = min(values) / ROOM, max(values) * ROOM
        self.begin, self.end = begin, end

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        return self.begin + (self.end - self.begin) * log(value / self.low) / log(self.high / self.low)


def _labels(points: Sequence[Outcome], across: _Axis, up: _Axis) -> list[str]:
    """Settings beside points, where there is room for them."""
    taken: list[tuple[float, float]] = []
    parts = []
    for o in points:
        told = o.name.removeprefix(o.family).replace("at ", "").strip()
        x, y = across(o.tbt_p99_s) + 8, up(o.ttft_mean_s) + (16 if o.family == "receding" else -6)
        if not told or any(abs(x - a) < LETTER * 11 * len(told) + 6 and abs(y - b) < 13 for a, b in taken):
            continue
        taken.append((x, y))
        parts.append(text(x, y, told, size=11, fill=LOOKS[o.family][0]))
    return parts


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="{colour}"{dashed}/>'


def _mark(x: float, y: float, colour: str, shape: str) -> str:
    """A small filled shape with a white edge."""
    r = MARK
    corners = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "diamond": [(0, -1.3 * r), (1.3 * r, 0), (0, 1.3 * r), (-1.3 * r, 0)],
        "triangle": [(0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)],
        "star": [(0, -1.9 * r), (0.55 * r, -0.55 * r), (1.9 * r, 0), (0.55 * r, 0.55 * r), (0, 1.9 * r),
                 (-0.55 * r, 0.55 * r), (-1.9 * r, 0), (-0.55 * r, -0.55 * r)],
    }  # fmt: skip
    drawn = f'fill="{colour}" stroke="#ffffff"'
    if shape == "ring":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{1.7 * r:.1f}" fill="none" stroke="{colour}" stroke-width="2"/>'
    if shape in ("circle", "dot"):
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r * (1.1 if shape == "circle" else 0.6):.1f}" {drawn}/>'
    path = "L".join(f"{x + a:.1f} {y + b:.1f}" for a, b in corners[shape])
    return f'<path d="M{path}Z" {drawn}/>'
