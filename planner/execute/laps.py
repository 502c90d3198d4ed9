"""Where does the time inside a step go? A clock that is read between operators, on the host or on the device."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any, Protocol


class Laps(Protocol):
    """Reads a clock between operators."""

    def start(self) -> None:
        """A forward pass begins."""
        ...

    def lap(self, name: str) -> None:
        """The operator called `name` is done; what follows belongs to the next one."""
        ...

    def totals(self) -> dict[str, float]:
        """Seconds by operator since start, all its launches together."""
        ...


class NoLaps:
    """Reads nothing: for passes that are only to be fast."""

    def start(self) -> None:
        """Nothing."""

    def lap(self, name: str) -> None:
        """Nothing."""

    def totals(self) -> dict[str, float]:
        """Nothing."""
        return {}


class HostLaps:
    """The host's clock: where the host computes, the end of one operator is the beginning of the next."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, float]] = []
        self._begin = 0.0

    def start(self) -> None:
        """A forward pass begins."""
        self._marks = []
        self._begin = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the time."""
        self._marks.append((name, time.perf_counter()))

    def totals(self) -> dict[str, float]:
        """Seconds by operator."""
        found: dict[str, float] = defaultdict(float)
        before = self._begin
        for name, at in self._marks:
            found[name] += at - before
            before = at
        return dict(found)


class DeviceLaps:
    """Events in the device's stream, which does not wait for them to be read."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """A forward pass begins."""
        self._marks = []
        self._note("")

    def lap(self, name: str) -> None:
        """Put an event behind the operator."""
        self._note(name)

    def _note(self, name: str) -> None:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def totals(self) -> dict[str, float]:
        """Seconds by operator; waits for the device."""
        self._torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (_, before), (name, at) in zip(self._marks, self._marks[1:], strict=False):
            found[name] += before.elapsed_time(at) * 1e-3
        return dict(found)
