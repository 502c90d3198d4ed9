"""The same function on many tasks, on several processes where the platform can fork: same results, sooner."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.pool import Pool
from types import TracebackType
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Answer = TypeVar("Answer")

_function: Callable[[Any], Any] | None = None  # in a worker: what it was forked to do


def _begin(function: Callable[[Any], Any]) -> None:
    """Start a worker: it leaves Ctrl-C to its parent."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _answer(task: Any) -> Any:
    assert _function is not None
    return _function(task)


class Workers(Generic[Task, Answer]):
    """Maps `function` over tasks with `jobs` processes; whatever it refers to is as it was when the workers started."""

    def __init__(self, function: Callable[[Task], Answer], jobs: int) -> None:
        self._function = function
        self._pool: Pool | None = None
        if jobs > 1 and sys.platform == "linux":
            self._pool = multiprocessing.get_context("fork").Pool(jobs, _begin, (function,))

    def map(self, tasks: Sequence[Task]) -> list[Answer]:
        """The answers, in the order of the tasks."""
        if self._pool is None or len(tasks) < 2:
            return [self._function(task) for task in tasks]
        return self._pool.map(_answer, tasks, chunksize=1)

    def __enter__(self) -> Workers[Task, Answer]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()


def available_cpus() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
