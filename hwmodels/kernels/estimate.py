"""What an interpolated table answers: times, and how much of each is measurement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Estimate:
    """Times of kernels.

    seconds    one launch each
    measured   1 where the point lies inside the measured table, 0 where the time follows the analytic curve from the
               nearest measured point
    """

    seconds: NDArray[np.float64]
    measured: NDArray[np.float64]
