"""What do the options say that requests see?"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from hwmodels.encoder import load_encoder
from hwmodels.tiles import Cut
from planner import Plan
from simulator.encode import Images
from ui.questions import OptionError

#: Longest side of an image, in pixels, and most images of a request.
MOST_PX, MOST_IMAGES = 2**16, 2**12


@dataclass(frozen=True, slots=True)
class Pictures:
    """Images that every request has, all of one size.

    size     as it was typed
    cut      of one image; tokens: of one tile
    """

    per_request: int
    size: str
    cut: Cut
    tokens: int

    @property
    def images(self) -> Images:
        """The same for all requests of a workload."""
        return Images(np.array(self.per_request * self.cut.tiles), self.tokens)

    @property
    def words(self) -> str:
        """Such as '2 images of 1280x720 (18 tiles, 4,608 tokens)'."""
        tiles = self.per_request * self.cut.tiles
        noun = "image" if self.per_request == 1 else "images"
        parts = "tile" if tiles == 1 else "tiles"
        return f"{self.per_request} {noun} of {self.size} ({tiles} {parts}, {tiles * self.tokens:,} tokens)"


def pictures(plan: Plan, per_request: int | None, size: str | None) -> Pictures | None:
    """What every request sees; None for text alone.

    Raises OptionError for a size that is not WxH, for one option without the other, and without an encoder in the plan.
    """
    if per_request is None and size is None:
        return None
    if per_request is None:
        raise OptionError(f"--image-size {size}: expected --images-per-request with it")
    if size is None:
        raise OptionError(f"--images-per-request {per_request}: expected --image-size with it, such as 1280x720")
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", size)
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    if not (1 <= width <= MOST_PX and 1 <= height <= MOST_PX):
        raise OptionError(
            f"--image-size {size}: expected WIDTHxHEIGHT in pixels, 1 to {MOST_PX} each, such as 1280x720"
        )
    if not 1 <= per_request <= MOST_IMAGES:
        raise OptionError(f"--images-per-request {per_request}: expected 1 to {MOST_IMAGES}")
    if plan.encoder is None:
        raise OptionError(
            f"--images-per-request {per_request}: the plan has no encoder; expected one such as 'encoder: qwen2-vl-7b' "
            "in its file"
        )
    encoder = load_encoder(plan.encoder)
    cut = encoder.cut(width, height)
    return Pictures(per_request, size, cut, encoder.tokens(cut.patches))
