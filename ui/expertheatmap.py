"""Which ranks are busy in which layers, before experts were placed and after? One SVG picture of two heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ui.latencyfigure import FAINT, GRID
from ui.timelinecharts import text, wrapped
from ui.words import printable

#: From idle to overloaded: ever darker, so that it reads in grey and with every kind of colour vision.
COLOURS = ("#fff3d1", "#fdd087", "#f59a4c", "#dd5a38", "#a82042", "#651145", "#2a0a33")
#: Loads over the mean that a colour stands for, the finest that needs no more than CLASSES colours.
STEPS, CLASSES = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0), 16
#: Part of all loads that the scale tells apart; the last colour is for all above.
TOLD = 0.995
#: Cells of a map at most; beyond, neighbours share a cell, which shows the largest of their loads.
ROWS, COLUMNS = 80, 64
#: Pixels: the picture, its edge, what is left of the first map, and a map at most.
WIDTH, EDGE, LEFT, WIDE, TALL = 960, 26, 60, 384, 300
#: Of the column beside a map that has the busiest rank of every layer.
BUSIEST, APART = 12, 6


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """One heat map: [layers, ranks] loads over the mean of their layer."""

    name: str
    loads: NDArray[np.float64]

    @property
    def told(self) -> str:
        """Its title."""
        most = self.loads.max(axis=1)
        return f"{self.name}: busiest / mean {most.mean():.2f}, worst layer {most.max():.2f}"


def heat_map(title: str, told: str, layers: Sequence[int], panels: Sequence[Panel]) -> str:
    """The maps side by side on one scale, with the busiest rank of each layer beside it, as SVG.

    layers   of the model, that the rows stand for

    On a white ground of its own, so that it reads on light and on dark pages.
    """
    title = printable(title)
    head, y = [], 34.0
    for line in wrapped(title, 16, 2):
        head.append(text(EDGE, y, line, size=16, weight=600))
        y += 20
    for line in wrapped(told, 12, 3):
        head.append(text(EDGE, y, line, size=12, fill=FAINT))
        y += 16
    step, classes = scale(panels)
    top = y + 24
    body, tall = [], 0.0
    for position, panel in enumerate(panels):
        left = LEFT + position * (WIDTH - EDGE - 14) / len(panels)
        parts, tall = _drawn(panel, layers, left, top, step, classes)
        body += parts
    most = max(float(panel.loads.max()) for panel in panels)
    body += _legend(step, classes, most, top + tall + 56)
    height = round(top + tall + 104)
    ground = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10" fill="#ffffff" stroke="{GRID}"/>'
    said = f"{told} {'; '.join(panel.told for panel in panels)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif">\n'
        f"<title>{escape(title)}</title>\n<desc>{escape(said)}</desc>\n"
        + "\n".join([ground, *head, *body])
        + "\n</svg>\n"
    )


def scale(panels: Sequence[Panel]) -> tuple[float, int]:
    """(step, classes): class i is for loads nearer to i step than to its neighbours, the last one for all above.

    So an even load, 1 for every rank, lies in the middle of a class.
    """
    every = np.concatenate([panel.loads.ravel() for panel in panels])
    top = max(1.5, float(np.quantile(every, TOLD)))
    step = next((step for step in STEPS if top / step <= CLASSES), top / CLASSES)
    return step, int(top / step + 0.5) + 1


def colour(number: int, classes: int) -> str:
    """The colour of a class, on straight lines between COLOURS.

    >>> colour(0, 4), colour(3, 4)
    ('#fff3d1', '#2a0a33')
    """
    place = number / max(classes - 1, 1) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    one, two = (tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in COLOURS[low : low + 2])
    return "#" + "".join(f"{round(a + (place - low) * (b - a)):02x}" for a, b in zip(one, two, strict=True))


def coarser(loads: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    """At most so many rows and columns, as many neighbours in each but the last; the largest load of each cell.

    >>> coarser(np.array([[1.0, 3.0, 2.0]]), 1, 2).tolist()
    [[3.0, 2.0]]
    """
    for axis, most in ((0, rows), (1, columns)):
        starts = np.arange(0, loads.shape[axis], ceil(loads.shape[axis] / most))
        loads = np.maximum.reduceat(loads, starts, axis=axis)
    return loads


def _drawn(
    panel: Panel, layers: Sequence[int], left: float, top: float, step: float, classes: int
) -> tuple[list[str], float]:
    """A map with its axes, and how tall it is."""
    (count, ranks), cells = panel.loads.shape, coarser(panel.loads, ROWS, COLUMNS)
    rows, columns = cells.shape
    wide, tall = max(1, WIDE // columns), max(2, min(14, TALL // rows))
    width, height = wide * columns, tall * rows
    kinds = np.minimum((cells / step + 0.5).astype(int), classes - 1)
    worst = kinds.max(axis=1, keepdims=True)
    beside = left + width + APART
    parts = [
        text(left, top - 10, panel.told, size=13, weight=600),
        *_cells(kinds, classes, left, top, wide, tall),
        *_cells(worst, classes, beside, top, BUSIEST, tall),
    ]
    for row in _marks(count):
        y = top + row / count * height + tall / 2 + 4
        parts.append(text(left - 6, y, str(layers[row]), size=11, fill=FAINT, anchor="end"))
    for rank in _marks(ranks):
        x = left + (rank + 0.5) / ranks * width
        parts.append(text(x, top + height + 15, str(rank), size=11, fill=FAINT, anchor="middle"))
    parts.append(text(left + width / 2, top + height + 31, "rank", size=12, fill=FAINT, anchor="middle"))
    parts.append(text(beside + BUSIEST / 2, top + height + 15, "max", size=11, fill=FAINT, anchor="middle"))
    parts.append(_turned("layer of the model", left - 32, top + height / 2))
    return parts, height


def _cells(kinds: NDArray[np.int_], classes: int, left: float, top: float, wide: int, tall: int) -> list[str]:
    """Cells by colour, neighbours of a row in one stroke; the commonest colour is the ground."""
    rows, columns = kinds.shape
    ground = int(np.bincount(kinds.ravel()).argmax())
    strokes: dict[int, list[str]] = {}
    for y, row in enumerate(kinds.tolist()):
        x = 0
        for kind, run in groupby(row):
            length = len(list(run))
            if kind != ground:
                strokes.setdefault(kind, []).append(f"M{x} {y}h{length}")
            x += length
    size = f'width="{columns * wide}" height="{rows * tall}"'
    drawn = "".join(
        f'<path stroke="{colour(kind, classes)}" d="{"".join(found)}"/>' for kind, found in sorted(strokes.items())
    )
    # Strokes are as wide as a row is tall, so that a cell is told by its corner and length alone.
    return [
        f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{colour(ground, classes)}"/>',
        f'<g transform="translate({left:.1f} {top + tall / 2:.1f}) scale({wide} {tall})" fill="none" '
        f'shape-rendering="crispEdges">{drawn}</g>',
        f'<rect x="{left - 0.5:.1f}" y="{top - 0.5:.1f}" width="{columns * wide + 1}" height="{rows * tall + 1}" '
        f'fill="none" stroke="{FAINT}" stroke-opacity="0.5"/>',
    ]


def _legend(step: float, classes: int, most: float, top: float) -> list[str]:
    """The colours with the loads in their middle."""
    wide = min(44.0, (WIDTH - 2 * EDGE - 330) / classes)
    left = EDGE + 250.0
    parts = [text(left - 12, top + 12, "load of a rank / mean of its layer", size=12, fill=FAINT, anchor="end")]
    every = max(1, ceil(28 / wide))
    for kind in range(classes):
        x = left + kind * wide
        parts.append(
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{wide:.1f}" height="16" fill="{colour(kind, classes)}" '
            f'stroke="{FAINT}" stroke-opacity="0.5" stroke-width="0.5"/>'
        )
        if kind % every == 0:
            parts.append(text(x + wide / 2, top + 30, f"{kind * step:.4g}", size=11, fill=FAINT, anchor="middle"))
    if most > (classes - 0.5) * step:
        parts.append(text(left + classes * wide + 6, top + 12, f"up to {most:.2f}", size=11, fill=FAINT))
    return parts


def _marks(count: int) -> list[int]:
    """Rows or columns with a number: about eight, at round distances.

    >>> _marks(8), _marks(32)
    ([0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 8, 12, 16, 20, 24, 28])
    """
    apart = next(step for step in (1, 2, 4, 8, 16, 32, 64, count) if step * 8 >= count)
    return list(range(0, count, apart))


def _turned(words: str, x: float, y: float) -> str:
    return (
        f'<text transform="translate({x:.1f} {y:.1f}) rotate(-90)" text-anchor="middle" font-size="12" '
        f'fill="{FAINT}">{escape(words)}</text>'
    )
