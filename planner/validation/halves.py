"""On which side of a fit is a measured point: is it one to fit coefficients to, or one to judge them by?"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

#: What makes a layout: all its points are on one side, whatever their traffic.
LAYOUT = ("system", "backend", "model", "precision", "layout")


def half_of(labels: Mapping[str, str]) -> str:
    """'fitted' or 'held-out', by a checksum of the layout's labels."""
    key = "|".join(labels.get(name, "") for name in LAYOUT)
    return "fitted" if zlib.crc32(key.encode()) % 2 else "held-out"
