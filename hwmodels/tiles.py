"""Into how many tiles, of how many patches, does an image go before a vision encoder sees it?

The rules are those of the models' image processors, told in our own words; sides are in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, log, sqrt
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from hwmodels.errors import ProfileError

Rule = Literal["grid", "slices", "native"]
Count = Annotated[int, Field(gt=0, strict=True)]


@dataclass(frozen=True, slots=True)
class Cut:
    """One image as an encoder gets it: `tiles` tiles of `patches` patches (of the largest, if they differ)."""

    tiles: int
    patches: int


@checked(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Tiling:
    """How a model cuts images.

    rule         grid: squares of tile_px in the grid nearest to the image's shape, and a thumbnail (InternVL);
                 slices: pieces of about tile_px^2 pixels in the image's own shape, and a thumbnail (MiniCPM-V);
                 native: the whole image as one tile at its own size (Qwen2-VL)
    most_tiles   tiles of an image beside its thumbnail; pieces of tile_px^2 pixels an image is shrunk to under native
    side_px      a side is a multiple of it: one patch, or the patches that become one token
    """

    rule: Rule
    tile_px: Count
    most_tiles: Count
    side_px: Count


def cut(tiling: Tiling, patch_px: int, width_px: int, height_px: int) -> Cut:
    """The tiles of an image of width_px x height_px; ProfileError unless both are positive.

    >>> cut(Tiling("grid", 448, 12, 28), 14, 4032, 3024)  # 4 x 3 and the thumbnail
    Cut(tiles=13, patches=1024)
    >>> cut(Tiling("slices", 448, 9, 14), 14, 4032, 3024)  # 3 x 3 and the thumbnail, each 518 x 392 pixels
    Cut(tiles=10, patches=1036)
    >>> cut(Tiling("native", 28, 16384, 28), 14, 1120, 560)
    Cut(tiles=1, patches=3200)
    """
    if min(width_px, height_px) < 1:
        raise ProfileError(f"image of {width_px} x {height_px} pixels: expected sides of at least 1")
    tiles, sides = RULES[tiling.rule](tiling, width_px, height_px)
    return Cut(tiles, max((wide // patch_px) * (high // patch_px) for wide, high in sides))


Sides = list[tuple[int, int]]


def _grid(tiling: Tiling, width: int, height: int) -> tuple[int, Sides]:
    """The grid whose shape is nearest to the image's; of equally near ones the largest the image half fills.

    OpenGVLab/InternVL2-8B, dynamic_preprocess in its model card; the thumbnail is left out beside a single tile.
    """
    aspect, area, most, side = width / height, width * height, tiling.most_tiles, tiling.tile_px
    grids = {(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1)}
    best, nearest = (1, 1), float("inf")
    for grid in sorted(grids, key=lambda g: (g[0] * g[1], g)):
        off = abs(aspect - grid[0] / grid[1])
        if off < nearest or (off == nearest and area > side * side * grid[0] * grid[1] / 2):
            best, nearest = grid, off
    tiles = best[0] * best[1]
    return tiles + (tiles > 1), [(side, side)]


def _slices(tiling: Tiling, width: int, height: int) -> tuple[int, Sides]:
    """As many pieces as the image has tile_px^2 pixels, give or take one; the grid nearest to its shape by logarithm.

    LLaVA-UHD's partition (arXiv:2403.11703, section 3.1) as in openbmb/MiniCPM-V-2_6, image_processing_minicpmv.py.
    """
    ideal = min(ceil(width * height / tiling.tile_px**2), tiling.most_tiles)
    if ideal <= 1:
        return 1, [_shaped(tiling, width, height, grow=True)]
    counts = [n for n in (ideal - 1, ideal, ideal + 1) if 1 < n <= tiling.most_tiles]
    grids = [(i, n // i) for n in counts for i in range(1, n + 1) if n % i == 0]
    best = min(grids, key=lambda g: abs(log(width / height) - log(g[0] / g[1])))
    piece = _shaped(tiling, width / best[0], height / best[1], grow=True)
    return best[0] * best[1] + 1, [piece, _shaped(tiling, width, height, grow=False)]


def _shaped(tiling: Tiling, width: float, height: float, *, grow: bool) -> tuple[int, int]:
    """Sides of about tile_px^2 pixels in the given shape, in whole side_px; smaller images only `grow` to that."""
    if grow or width * height > tiling.tile_px**2:
        aspect = width / height
        height = int(tiling.tile_px / sqrt(aspect))
        width = int(height * aspect)
    step = tiling.side_px
    return max(round(width / step) * step, step), max(round(height / step) * step, step)


def _native(tiling: Tiling, width: int, height: int) -> tuple[int, Sides]:
    """The image at its own size, sides rounded to side_px, shrunk where it has too many pixels.

    Qwen/Qwen2-VL-7B-Instruct, smart_resize of image_processing_qwen2_vl.py; at least 56 x 56 pixels, side_px^2 x 4.
    """
    step, most = tiling.side_px, tiling.most_tiles * tiling.tile_px**2
    wide, high = max(step, round(width / step) * step), max(step, round(height / step) * step)
    if wide * high > most:
        shrink = sqrt(width * height / most)
        wide, high = (max(step, floor(side / shrink / step) * step) for side in (width, height))
    elif wide * high < 4 * step * step:
        grow = sqrt(4 * step * step / (width * height))
        wide, high = (ceil(side * grow / step) * step for side in (width, height))
    return 1, [(wide, high)]


RULES: dict[str, Callable[[Tiling, int, int], tuple[int, Sides]]] = {
    "grid": _grid,
    "slices": _slices,
    "native": _native,
}
