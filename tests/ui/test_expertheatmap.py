"""The heat maps: what is drawn is what was given, on one scale, in a small file that is well-formed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ui.expertheatmap import CLASSES, Panel, coarser, colour, heat_map, scale

SVG = "{http://www.w3.org/2000/svg}"


def made(layers: int, ranks: int, spread: float, seed: int = 0) -> np.ndarray:
    loads = np.random.default_rng(seed).lognormal(0, spread, (layers, ranks))
    return loads * ranks / loads.sum(axis=1, keepdims=True)


def picture(*panels: Panel) -> ET.Element:
    return ET.fromstring(heat_map("model <on> GPUs", "routing & more", range(3, 3 + len(panels[0].loads)), panels))


def maps(root: ET.Element) -> list[list[list[str]]]:
    """Colours of the cells of every map, the busiest ranks' columns among them, in the order of the picture."""
    found, elements = [], list(root)
    for ground, strokes in pairwise(elements):
        if strokes.tag != SVG + "g":
            continue
        wide, tall = (int(n) for n in re.findall(r"scale\((\d+) (\d+)\)", strokes.get("transform", ""))[0])
        columns, rows = int(ground.get("width", "0")) // wide, int(ground.get("height", "0")) // tall
        cells = [[ground.get("fill", "")] * columns for _ in range(rows)]
        for path in strokes:
            for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)", path.get("d", "")):
                for column in range(int(x), int(x) + int(length)):
                    assert cells[int(y)][column] == ground.get("fill"), "a cell is drawn once"
                    cells[int(y)][column] = path.get("stroke", "")
        found.append(cells)
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.floats(0, 1.5), st.integers(0, 100))
def test_cells_have_the_colour_of_their_load(layers: int, ranks: int, spread: float, seed: int) -> None:
    panels = [Panel("before", made(layers, ranks, spread, seed)), Panel("after", made(layers, ranks, spread / 3, seed))]
    step, classes = scale(panels)
    drawn = maps(picture(*panels))
    assert len(drawn) == 4
    for panel, cells, most in zip(panels, drawn[::2], drawn[1::2], strict=True):
        for loads, row, (worst,) in zip(panel.loads, cells, most, strict=True):
            kinds = [min(int(load / step + 0.5), classes - 1) for load in loads]
            assert row == [colour(kind, classes) for kind in kinds]
            assert worst == colour(max(kinds), classes)


def test_titles_tell_busiest_over_mean() -> None:
    uneven = np.array([[0.5, 1.5], [0.25, 1.75]])
    said = [
        "".join(element.itertext()) for element in picture(Panel("before", uneven), Panel("after", np.ones((2, 2))))
    ]
    assert "before: busiest / mean 1.62, worst layer 1.75" in said
    assert "after: busiest / mean 1.00, worst layer 1.00" in said
    assert {"rank", "layer of the model", "load of a rank / mean of its layer", "3", "4"} <= set(said)
    assert "model <on> GPUs" in said


def test_an_even_load_has_one_colour_whatever_the_rounding() -> None:
    nearly = 1 + 1e-3 * np.random.default_rng(0).standard_normal((58, 32))
    drawn = maps(picture(Panel("before", made(58, 32, 0.8)), Panel("after", nearly)))
    assert len({cell for row in drawn[2] for cell in row}) == 1


@pytest.mark.parametrize(("layers", "ranks"), [(58, 32), (58, 64), (61, 320), (200, 8), (1, 1)])
def test_files_are_small_and_maps_have_their_place(layers: int, ranks: int) -> None:
    panels = [Panel("before", made(layers, ranks, 1.0)), Panel("after", made(layers, ranks, 0.5))]
    root = picture(*panels)
    assert len(ET.tostring(root)) < 60_000
    wide, high = int(root.get("width", "0")), int(root.get("height", "0"))
    assert wide == 960 and high < 600
    for shape in root.iter(SVG + "rect"):
        assert float(shape.get("x", "0")) + float(shape.get("width", "0")) <= wide
        assert float(shape.get("y", "0")) + float(shape.get("height", "0")) <= high


def test_colours_grow_darker() -> None:
    for classes in range(2, CLASSES + 2):
        greys = []
        for kind in range(classes):
            red, green, blue = (int(colour(kind, classes)[i : i + 2], 16) for i in (1, 3, 5))
            greys.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
        assert all(a > b for a, b in pairwise(greys))


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 12), st.integers(1, 12))
def test_neighbours_that_share_a_cell_show_the_largest(rows: int, columns: int, most: int, wide: int) -> None:
    loads = made(rows, columns, 1.0)
    small = coarser(loads, most, wide)
    assert small.shape[0] <= most and small.shape[1] <= wide
    assert small.max() == loads.max()
    if rows <= most and columns <= wide:
        assert small.tolist() == loads.tolist()
