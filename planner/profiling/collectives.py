"""How long collectives take between several devices (NCCL) or processes (gloo), each rank a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from planner.profiling.machine import TORCH_DTYPES, Machine, open_torch
from planner.profiling.points import Point

#: Seconds processes may take to find each other and to end, on top of what measuring takes.
START_S = 60.0
#: As in planner.profiling.timing.
WARM_UP, LEAST, MOST, ENOUGH_S, MAX_LAUNCHES = 2, 5, 25, 0.03, 64

#: A point with median seconds, spread and samples, or with the reason why it has none.
Found = tuple[Point, float, float, int, str | None]


def backend(machine: Machine) -> str:
    """The library that runs collectives, which is also the name of the kernel."""
    return "nccl" if machine.kind == "cuda" else "gloo"


def run_collectives(points: Sequence[Point], machine: Machine, seconds: float, point_limit_s: float) -> Iterator[Found]:
    """Measure the points, the groups of one size for their share of `seconds` after which no point is begun.

    The time that processes take to start is not counted.
    Bytes are as hwmodels.collectives counts them. The time of a point is that of its slowest rank.
    """
    ordered = sorted(points, key=lambda point: point.sizes["gpus"])
    for gpus, grouped in groupby(ordered, key=lambda point: point.sizes["gpus"]):
        members = list(grouped)
        yield from _group(gpus, members, machine, seconds * len(members) / len(points), point_limit_s)


def _group(gpus: int, points: list[Point], machine: Machine, seconds: float, limit_s: float) -> Iterator[Found]:
    context = multiprocessing.get_context("spawn")
    found: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        arguments = (gpus, backend(machine), points, seconds, limit_s, str(store), found)
        ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(gpus)]
        for rank in ranks:
            rank.start()
        waits_until = time.monotonic() + seconds + START_S
        try:
            while True:
                try:
                    entry: Found | None = found.get(timeout=1.0)
                except queue.Empty:
                    failed = any(rank.exitcode not in (None, 0) for rank in ranks)
                    if failed or time.monotonic() > waits_until:
                        reason = f"{backend(machine)} between {gpus} ranks " + (
                            "failed" if failed else "did not answer"
                        )
                        yield (points[0], 0.0, 0.0, 0, reason)
                        return
                    continue
                if entry is None:
                    return
                yield entry
        finally:
            for rank in ranks:
                rank.join(timeout=2.0)
                if rank.is_alive():
                    rank.kill()
                    rank.join()


def _rank(
    rank: int, gpus: int, library: str, points: list[Point], seconds: float, limit_s: float, store: str, found: Any
) -> None:
    """One rank: all run every point together; rank 0 decides how often and reports."""
    torch = open_torch()
    distributed = torch.distributed
    if library == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    bound = {"device_id": device} if library == "nccl" else {}
    distributed.init_process_group(library, init_method=f"file://{store}", rank=rank, world_size=gpus, **bound)
    ends = time.monotonic() + seconds
    for point in points:
        go = torch.tensor([float(time.monotonic() < ends)], device=device)
        distributed.broadcast(go, 0)
        if not go.item():
            break
        try:
            launch = _launch(point, torch, device)
            samples = _samples(launch, torch, device, limit_s)
        except (RuntimeError, ValueError) as error:
            if rank == 0:
                found.put((point, 0.0, 0.0, 0, f"{library}: {str(error).splitlines()[0]}"))
            continue
        if rank == 0:
            low, median, high = np.percentile(samples, [25, 50, 75])
            found.put((point, float(median), float((high - low) / median), len(samples), None))
    if rank == 0:
        found.put(None)
    distributed.barrier()
    distributed.destroy_process_group()


def _launch(point: Point, torch: Any, device: Any) -> Any:
    """The collective of the point on random data."""
    distributed, gpus = torch.distributed, point.sizes["gpus"]
    dtype = getattr(torch, TORCH_DTYPES[point.dtype])
    count = point.sizes["bytes"] // dtype.itemsize
    if count % gpus or count * dtype.itemsize != point.sizes["bytes"]:
        raise ValueError(f"bytes of a {point.words['kind']} are a multiple of {gpus} numbers")
    whole, part = torch.randn(count, device=device).to(dtype), torch.randn(count // gpus, device=device).to(dtype)
    # Later versions of torch have other names for the same.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
    launches = {
        "all-reduce": lambda: distributed.all_reduce(whole),
        "all-gather": lambda: gather(whole, part),
        "reduce-scatter": lambda: scatter(part, whole),
        "all-to-all": lambda: distributed.all_to_all_single(torch.empty_like(whole), whole),
    }
    if point.words["kind"] not in launches:
        raise ValueError(f"kind {point.words['kind']!r} is not one of {', '.join(launches)}")
    return launches[point.words["kind"]]


def _samples(launch: Any, torch: Any, device: Any, limit_s: float) -> list[float]:
    """Seconds per launch, of the slowest rank, as often as is worth its time; ValueError where that is too much."""
    once_s = _slowest(launch, 1, torch, device)
    if once_s > limit_s:
        raise ValueError(f"takes more than {limit_s:g} s")
    once_s = min(once_s, *(_slowest(launch, 1, torch, device) for _ in range(WARM_UP)))
    count = int(np.clip(2e-3 / once_s, 1, MAX_LAUNCHES))

    def repeated() -> None:
        for _ in range(count):
            launch()

    run = _captured(repeated, torch, device) if device.type == "cuda" else repeated
    _slowest(run, count, torch, device)
    samples: list[float] = []
    # Every rank sees the same times, so every rank stops after the same sample.
    while len(samples) < LEAST or (len(samples) < MOST and sum(samples) * count < ENOUGH_S):
        samples.append(_slowest(run, count, torch, device))
    return samples


def _slowest(run: Any, count: int, torch: Any, device: Any) -> float:
    """Seconds of one of the `count` launches that `run` stands for, on the rank where they took longest."""
    torch.distributed.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        taken = start.elapsed_time(end) * 1e-3
    else:
        started = time.perf_counter()
        run()
        taken = time.perf_counter() - started
    longest = torch.tensor([taken / count], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
    return float(longest.item())


def _captured(run: Any, torch: Any, device: Any) -> Any:
    """`run` as a CUDA graph, as engines launch collectives, if every rank could capture it; else as it is."""
    graph, done = torch.cuda.CUDAGraph(), 1.0
    try:
        # The library's own threads call the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    except RuntimeError:
        done = 0.0
    torch.cuda.synchronize()
    everywhere = torch.tensor([done], device=device)
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
    return graph.replay if everywhere.item() else run
