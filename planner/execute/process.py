"""What does a rank's process do? It makes its share of the model once, then what it is told until told to stop."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels.errors import MeasurementError, OutOfMemoryError, ShardwiseError
from planner.execute.batch import Batch, Span
from planner.execute.laps import DeviceLaps, HostLaps, Laps, NoLaps
from planner.execute.ranks import Peers
from planner.execute.records import Composition, Job, Pass
from planner.execute.serve import Leader, Order, Row, follow
from planner.execute.transformer import Transformer
from planner.profiling.machine import TORCH_DTYPES, open_machine, open_torch
from simulator.log import Log

torch: Any = open_torch()
#: Of prctl(2).
PR_SET_PDEATHSIG = 1


def run_rank(connection: Connection, job: Job, number: int, replica: int, rank: int, store: str) -> None:
    """A rank's process: make the model, then do what is said until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    _end_with_parent()
    try:
        _serve_commands(connection, job, number, replica, rank, store)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        with suppress(OSError):
            connection.send(("error", _told(error, job)))


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent ends in any way (Linux; elsewhere when it next speaks)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _told(error: Exception, job: Job) -> ShardwiseError:
    """The error as the parent tells it."""
    if isinstance(error, ShardwiseError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "memory" in text.lower():
        return OutOfMemoryError(f"{job.model.name} on {job.device}: {text[:200]}; expected a smaller model or cache")
    last = traceback.extract_tb(error.__traceback__)[-1]
    return MeasurementError(
        f"executing {job.model.name} failed in {Path(last.filename).name}:{last.lineno}: "
        f"{type(error).__name__}: {text[:200]}; expected it to run, please report this"
    )


def _serve_commands(connection: Connection, job: Job, number: int, replica: int, rank: int, store: str) -> None:
    if job.device == "cpu":
        _pin(job, number)
    else:
        torch.cuda.set_device(number)
    open_machine(job.device, threads=job.threads if job.device == "cpu" else None)
    peers = Peers(job, rank, store)
    with torch.inference_mode():
        stage = Transformer(
            job.model, peers.share(job), dtype=job.dtype, device=peers.device,
            kv_blocks=job.kv_blocks * job.mapping.pp, block_tokens=job.block_tokens, seed=job.seed,
        )  # fmt: skip
        gc.collect()
        gc.freeze()
        gc.disable()
        connection.send(("ready", None))
        while True:
            command, *content = connection.recv()
            if command == "stop":
                break
            if command == "passes":
                connection.send(("passes", [_pass(job, stage, peers, replica, made) for made in content[0]]))
            elif command == "transfers":
                connection.send(("transfers", _transfers(job, peers, content[0])))
            else:
                connection.send(("served", _serve(connection, job, stage, peers, content[0])))
            gc.collect()
    peers.close()


def _pin(job: Job, number: int) -> None:
    """Give every process cores of its own, where there are enough."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if job.ranks * job.threads <= len(cores):
        begin = number * job.threads
        os.sched_setaffinity(0, cores[begin : begin + job.threads])


def _laps(job: Job) -> Laps:
    return HostLaps() if job.device == "cpu" else DeviceLaps(torch)


def _serve(connection: Connection, job: Job, stage: Transformer, peers: Peers, order: Order) -> dict[int, list[int]]:
    laps = _laps(job) if order.measure_laps and job.mapping.pp == 1 else NoLaps()
    if peers.rank:
        return follow(job, stage, peers, order, laps)

    def report(log: Log, rows: list[Row]) -> None:
        connection.send(("progress", (log, rows)))

    return Leader(job, stage, peers, order, laps, report).run()


def _pass(job: Job, stage: Transformer, peers: Peers, replica: int, made: Composition) -> Pass:
    """Run a composed step on this rank."""
    laps = _laps(job)
    forward_s, total_s = _timed(job, stage, peers, made, laps)
    return Pass(made, replica, peers.stage, peers.shard, laps.totals(), forward_s, total_s)


def _timed(job: Job, stage: Transformer, peers: Peers, made: Composition, laps: Laps) -> tuple[float, float]:
    """Seconds of a forward pass, and with the preparation of its inputs; ids and cached contents are arbitrary."""
    batch = _composed(job, made)
    hidden = None
    if not stage.share.first:
        hidden = torch.randn(made.tokens, job.model.hidden, device=peers.device).to(stage.dtype)
    peers.barrier()
    started = time.perf_counter()
    inputs = stage.inputs(batch)
    before = time.perf_counter()
    found = stage.forward(inputs, hidden, laps)
    if stage.share.last:
        found.tolist()
    elif job.device != "cpu":
        torch.cuda.synchronize()
    ended = time.perf_counter()
    return ended - before, ended - started


def _composed(job: Job, made: Composition) -> Batch:
    """The batch of a composition, with blocks in the order a busy cache has them: any."""
    blocks = job.kv_blocks * job.mapping.pp
    shuffled = np.random.default_rng(job.seed).permutation(blocks)
    taken = 0

    def span(new: int, before: int) -> Span:
        nonlocal taken
        held = -(-(before + new) // job.block_tokens)
        table = shuffled[np.arange(taken, taken + held) % blocks].tolist()
        taken += held
        return Span([token % job.model.vocab for token in range(new)], before, table)

    decodes = [span(1, context - 1) for context in made.contexts]
    chunks = [span(new, before) for new, before in made.items]
    return Batch(decodes, chunks, job.block_tokens)


def _transfers(job: Job, peers: Peers, tokens: Sequence[int], repeats: int = 9) -> list[tuple[int, float]]:
    """Seconds to the next stage: the median of there and back less half of what an empty message takes so."""
    dtype = getattr(torch, TORCH_DTYPES[job.dtype])
    taken = {}
    for count in (0, *tokens):
        hidden = torch.zeros(max(count, 1), job.model.hidden if count else 1, dtype=dtype, device=peers.device)
        samples = []
        peers.barrier()
        for _ in range(repeats):
            started = time.perf_counter()
            peers.bounce(hidden)
            samples.append(time.perf_counter() - started)
        taken[count] = float(np.median(samples))
    return [(count, taken[count] - taken[0] / 2) for count in tokens]
