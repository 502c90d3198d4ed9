"""How long does one launch take: the median of repeats whose operands come from memory, without launch overhead."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.profiling.machine import Machine

#: Does the work of one launch on operands of its own.
Launch = Callable[[], object]
#: A sample holds enough launches to last this long (the resolution of device events is about 0.5 us).
SAMPLE_S = {"cuda": 2e-3, "cpu": 1e-3}
#: Samples: at least LEAST, then until they add up to ENOUGH_S, at most MOST.
LEAST, MOST, ENOUGH_S = 5, 25, 0.03
#: Launches of one sample, and sets of operands they cycle through.
MAX_LAUNCHES = 256
#: Calls before anything is timed: libraries choose kernels and compile in the first ones.
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one launch, interquartile range over median, samples taken, and how it was launched."""

    seconds: float
    spread: float
    samples: int
    how: str


def timed(make: Callable[[], Launch], set_bytes: float, machine: Machine, limit_s: float) -> Timing | None:
    """Time the launches that `make` prepares; None where a single one takes longer than `limit_s`.

    make        prepares one launch on the next operands of the arena
    set_bytes   memory one launch touches: so many are prepared that together they exceed the cache
    """
    machine.arena.rewind()
    first = make()
    once_s = _once(first, machine)
    if limit_s < once_s < max(10 * limit_s, 5.0):
        once_s = _once(first, machine)  # the first launch of all loads the library
    if once_s > limit_s:
        return None
    for _ in range(WARM_UP):
        once_s = min(once_s, _once(first, machine))
        if once_s * (LEAST + 1) > limit_s:
            break
    sets = int(np.clip(np.ceil(machine.cycle_bytes / max(set_bytes, 1.0)), 1, MAX_LAUNCHES))
    # Operands that fill the cache once would still be found there: two sets of them are not.
    sets = max(sets, 2) if set_bytes < machine.cycle_bytes else 1
    launches = [first, *(make() for _ in range(sets - 1))]
    count = int(np.clip(np.ceil(SAMPLE_S[machine.kind] / once_s), 1, MAX_LAUNCHES))
    if machine.kind == "cuda":
        count = int(np.clip(max(count, sets), 1, max(1.0, limit_s / (LEAST + 1) / once_s)))
        return _on_device([launches[i % sets] for i in range(count)], machine, limit_s)
    samples: list[float] = []
    at = 0
    while _more(samples, count, limit_s):
        batch = [launches[(at + i) % sets] for i in range(count)]
        at += count
        started = time.perf_counter()
        for launch in batch:
            launch()
        samples.append((time.perf_counter() - started) / count)
    return _timing(samples, "called one by one")


def _more(samples: Sequence[float], count: int, limit_s: float) -> bool:
    """Whether another sample is worth its time."""
    spent = sum(samples) * count
    if len(samples) < LEAST:
        return len(samples) < 3 or spent * (1 + 1 / len(samples)) < limit_s
    return len(samples) < MOST and spent < ENOUGH_S


def _timing(samples: Sequence[float], how: str) -> Timing:
    low, median, high = np.percentile(samples, [25, 50, 75])
    return Timing(float(median), float((high - low) / median), len(samples), how)


def _once(launch: Launch, machine: Machine) -> float:
    if machine.kind == "cuda":
        machine.torch.cuda.synchronize()
    started = time.perf_counter()
    launch()
    if machine.kind == "cuda":
        machine.torch.cuda.synchronize()
    return max(time.perf_counter() - started, 1e-7)


def _on_device(launches: Sequence[Launch], machine: Machine, limit_s: float) -> Timing:
    """Launches captured in one CUDA graph, as serving engines run them, timed by events around each replay."""
    torch = machine.torch

    def one_by_one() -> None:
        for launch in launches:
            launch()

    replay: Callable[[], Any] = one_by_one
    how = "launched one by one"
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            one_by_one()
        replay, how = graph.replay, "CUDA graph"
    except RuntimeError:
        # A kernel that talks to the host cannot be captured.
        torch.cuda.synchronize()
    samples: list[float] = []
    while _more(samples, len(launches), limit_s):
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(LEAST)]
        replay()  # the device is busy while the host queues what is timed, or the gap would be counted
        for start, end in pairs:
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        samples += [start.elapsed_time(end) * 1e-3 / len(launches) for start, end in pairs]
    return _timing(samples, how)
