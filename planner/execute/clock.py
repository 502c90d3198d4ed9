"""What time is it in the run? A clock that all processes share and that must not go backwards."""

from __future__ import annotations

import time
from collections.abc import Callable

from hwmodels.errors import MeasurementError

#: Sleeping ends late by up to this much; the rest is waited out.
SLEEP_LATE_S = 0.5e-3
#: What is done meanwhile ends this long before.
BUSY_LATE_S = 3e-3


class Clock:
    """Seconds since `zero_s` of the system's monotonic clock, which is the same in all processes of a machine."""

    __slots__ = ("_last", "_read", "_zero_s")

    def __init__(self, zero_s: float, read: Callable[[], float] = time.monotonic) -> None:
        self._zero_s = zero_s
        self._read = read
        self._last = float("-inf")

    def now(self) -> float:
        """Seconds of the run; raises MeasurementError when time went backwards."""
        now = self._read() - self._zero_s
        if now < self._last:
            raise MeasurementError(
                f"the clock went back by {self._last - now:.3g} s: times of this run mean nothing; expected one that "
                "does not, run again on a machine whose processors agree on the time"
            )
        self._last = now
        return now

    def wait_until(self, at_s: float, meanwhile: Callable[[], None] | None = None) -> None:
        """Return at `at_s`, or at once if it has passed.

        meanwhile   called again and again until then, if given; it takes a millisecond or two
        """
        if meanwhile is not None:
            while at_s - self.now() > BUSY_LATE_S:
                meanwhile()
        left = at_s - self.now()
        if left > SLEEP_LATE_S:
            time.sleep(left - SLEEP_LATE_S)
        while self.now() < at_s:
            pass
