"""How well do a delay and a rate, fitted to some measured KV transfers, predict the others?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Line:
    """A transfer's time: seconds = delay_s + bytes / bytes_per_s."""

    delay_s: float
    bytes_per_s: float

    def time_s(self, nbytes: Sequence[float]) -> Floats:
        """Seconds of transfers of so many bytes."""
        return self.delay_s + np.asarray(nbytes, dtype=float) / self.bytes_per_s


def fit_line(nbytes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line with the least squares of relative errors; at least two transfers of different sizes."""
    size, time = np.asarray(nbytes, dtype=float), np.asarray(seconds, dtype=float)
    scaled = np.stack([1.0 / time, size / time], axis=1)
    (delay, per_byte), *_ = np.linalg.lstsq(scaled, np.ones_like(time), rcond=None)
    return Line(float(delay), float(1.0 / per_byte))


def left_out(nbytes: Sequence[float], seconds: Sequence[float], parts: int) -> Floats:
    """Relative error of each transfer, predicted from the others.

    parts   every parts-th transfer is left out at a time, beginning with each in turn; as many parts as transfers
            leave out one at a time
    """
    size, time = np.asarray(nbytes, dtype=float), np.asarray(seconds, dtype=float)
    place = np.arange(len(size)) % parts
    errors = np.zeros(len(size))
    for part in range(parts):
        kept, out = place != part, place == part
        errors[out] = fit_line(size[kept].tolist(), time[kept].tolist()).time_s(size[out].tolist()) / time[out] - 1
    return errors
