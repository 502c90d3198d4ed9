"""Cumulative latencies of a prediction and of real runs side by side, as one SVG picture made without a browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

import numpy as np
from numpy.typing import ArrayLike

from planner.validation.execution import LATENCIES, Comparison

#: Colour, width and dash of the prediction and of each run: apart for every kind of colour vision, and in grey.
LINES = (("#0072b2", 4.0, ""), ("#d55e00", 1.6, ""), ("#1d2433", 1.6, "5 3"), ("#cc79a7", 1.6, "1.5 2.5"))
#: Pixels: the picture, the plots in it, and the room around them.
WIDTH, HEIGHT, LEFT, GAP, TOP, BOTTOM, RIGHT = 960, 340, 62, 36, 84, 56, 26
#: An axis that spans more than this factor is logarithmic.
WIDE = 12.0
#: Width of a letter over the size of the type, a little more than usual.
LETTER = 0.6
INK, FAINT, GRID = "#1d2433", "#5b6472", "#e3e7ee"


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: seconds by curve name, the prediction first."""

    name: str
    curves: Mapping[str, ArrayLike]


def latency_figure(comparison: Comparison, title: str) -> str:
    """TTFT, TPOT and E2E of the requests that were served, predicted and in every run, as SVG."""
    frames = {"predicted": comparison.predicted}
    frames |= {f"real run {i}": run.requests for i, run in enumerate(comparison.runs, 1)}
    panels = [
        Panel(metric.upper(), {name: frame[f"{metric}_s"].to_numpy(dtype=float) for name, frame in frames.items()})
        for metric in LATENCIES
    ]
    return cdf_svg(title, panels)


def cdf_svg(title: str, panels: Sequence[Panel]) -> str:
    """The share of requests that were at most so slow, a step curve for every set of seconds; NaN counts as no request.

    On a white ground of its own, so that it reads on light and on dark pages.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    wide = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1)) / len(panels)
    size = max(9, min(16, int((WIDTH - LEFT - RIGHT) / (LETTER * max(1, len(title))))))
    body = [
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10" fill="#ffffff" stroke="{GRID}"/>',
        _text(LEFT, 30, title, size=size, weight=600),
        *_legend(names),
        _text(0, 0, "share of requests", fill=FAINT, turn=f"translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"),
    ]
    for position, panel in enumerate(panels):
        body += _plot(panel, names, LEFT + position * (wide + GAP), wide, shares=position == 0)
    told = f"Cumulative {', '.join(panel.name for panel in panels)}: {', '.join(names)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif">\n'
        f"<title>{escape(title)}</title>\n<desc>{escape(told)}</desc>\n" + "\n".join(body) + "\n</svg>\n"
    )


def _plot(panel: Panel, names: Sequence[str], left: float, wide: float, *, shares: bool) -> list[str]:
    """Grid, ticks and curves; the shares are written beside the first plot only."""
    bottom, tall = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    found = {name: np.sort(values[np.isfinite(values)]) for name, values in _arrays(panel.curves).items()}
    found = {name: values for name, values in found.items() if len(values)}
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - tick * tall
        parts.append(f'<path d="M{left:.1f} {y:.1f}h{wide:.1f}" stroke="{GRID}"/>')
        if shares:
            parts.append(_text(left - 6, y + 4, f"{tick:.0%}", fill=FAINT, anchor="end"))
    if not found:
        return [*parts, _text(left + wide / 2, TOP + tall / 2, f"no {panel.name}", fill=FAINT, anchor="middle")]
    low, high = min(values[0] for values in found.values()), max(values[-1] for values in found.values())
    unit, scale = ("s", 1.0) if high >= 1 else ("ms", 1e-3) if high >= 1e-3 else ("us", 1e-6)
    low, high = low / scale, high / scale
    log = low > 0 and high / low > WIDE
    low, high = (low / 1.05, high * 1.05) if log or high == low else (low - (high - low) / 40, high + (high - low) / 40)

    def across(values: np.ndarray) -> np.ndarray:
        part = np.log(values / low) / np.log(high / low) if log else (values - low) / (high - low)
        pixels: np.ndarray = left + np.clip(part, 0.0, 1.0) * wide
        return pixels

    for value in ticks(low, high, log=log):
        x = float(across(np.array([value]))[0])
        parts.append(f'<path d="M{x:.1f} {bottom}v{-tall}" stroke="{GRID}"/>')
        parts.append(_text(x, bottom + 17, f"{value:g}", fill=FAINT, anchor="middle"))
    parts.append(f'<path d="M{left:.1f} {bottom}h{wide:.1f}" stroke="{FAINT}"/>')
    axis = f"{panel.name}, {unit}" + (" (logarithmic)" if log else "")
    parts.append(_text(left + wide / 2, bottom + 38, axis, anchor="middle"))
    for position, name in enumerate(names):
        if name in found:
            path = _steps(across(found[name] / scale), bottom, tall, left + wide)
            parts.append(f'<path d="{path}" fill="none" stroke-linejoin="round" {_stroke(position)}/>')
    return parts


def _arrays(curves: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values, dtype=float) for name, values in curves.items()}


def _steps(x: np.ndarray, bottom: float, tall: float, end: float) -> str:
    """The path of a step curve through sorted pixels, one step for all that share a tenth of a pixel."""
    places, counts = np.unique(np.round(x, 1), return_counts=True)
    heights = np.round(bottom - np.cumsum(counts) / len(x) * tall, 1)
    steps = "".join(f"H{place:g}V{height:g}" for place, height in zip(places, heights, strict=True))
    return f"M{places[0]:g} {bottom:g}{steps}H{end:.1f}"


def ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Round numbers within an axis, few enough for their labels.

    >>> ticks(0.0, 9.0, log=False), ticks(3.0, 700.0, log=True)
    ([0.0, 2.0, 4.0, 6.0, 8.0], [3.0, 10.0, 30.0, 100.0, 300.0])
    """
    if log:
        decades = range(floor(log10(low)), ceil(log10(high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
            found = [value for value in found if low <= value <= high]
            if len(found) <= 6:
                break
        return found
    raw = (high - low) / 5
    unit = 10.0 ** floor(log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    return [float(f"{i * step:.6g}") for i in range(ceil(low / step), floor(high / step) + 1)]


def _legend(names: Sequence[str]) -> list[str]:
    parts = []
    x = float(LEFT)
    for position, name in enumerate(names):
        parts.append(f'<path d="M{x:.1f} 54h30" fill="none" {_stroke(position)}/>')
        parts.append(_text(x + 38, 58, name))
        x += 62 + LETTER * 13 * len(name)
    return parts


def _stroke(position: int) -> str:
    colour, width, dash = LINES[min(position, len(LINES) - 1)]
    return f'stroke="{colour}" stroke-width="{width:g}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _text(
    x: float, y: float, text: str, *, size: int = 13, fill: str = INK, anchor: str = "start", weight: int = 400,
    turn: str = "",
) -> str:  # fmt: skip
    place = f'transform="{turn}" text-anchor="middle"' if turn else f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" font-weight="{weight}" fill="{fill}">{escape(text)}</text>'
