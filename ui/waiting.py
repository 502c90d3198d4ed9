"""A progress bar on the terminal for anything that takes more than a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

#: Seconds before a bar appears.
PATIENCE_S = 1.0


@dataclass(slots=True)
class Bar:
    """Appears on standard error once the work has taken PATIENCE_S, and only on a terminal; leaves nothing behind."""

    console: Console = field(default_factory=lambda: Console(stderr=True, markup=False, highlight=False))
    started: float = field(default_factory=time.monotonic)
    shown: Progress | None = None
    task: TaskID | None = None
    events: int = 0

    def at(self, what: str, share: float | None) -> None:
        """Say what is going on and how much of it is done, in [0, 1]; None where that is not known."""
        if self.shown is None:
            if not self.console.is_terminal or time.monotonic() - self.started < PATIENCE_S:
                return
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
            self.shown = Progress(*columns, console=self.console, transient=True, refresh_per_second=4)
            self.shown.start()
            self.task = self.shown.add_task(what, total=None)
        assert self.task is not None
        self.shown.update(self.task, description=what, total=None if share is None else 1.0, completed=share or 0.0)

    def count(self, events: int) -> None:
        """Further scheduling decisions of a simulation, whose end is not known in advance."""
        self.events += events
        self.at(f"simulating: {self.events:,} scheduling decisions", None)

    def close(self) -> None:
        """Take the bar away."""
        if self.shown is not None:
            self.shown.stop()
            self.shown = None


@contextmanager
def bar() -> Iterator[Bar]:
    """A bar for the time of a block."""
    found = Bar()
    try:
        yield found
    finally:
        found.close()
