"""Who executes? One process per rank, started once, that holds its share of the model and does what it is told."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd

from hwmodels.errors import MeasurementError, OutOfMemoryError, ShardwiseError
from planner.execute.batch import Batch, Span
from planner.execute.laps import DeviceLaps, HostLaps, Laps, NoLaps
from planner.execute.ranks import Peers
from planner.execute.records import EXECUTED_COLUMNS, Composition, Job, Pass, Served
from planner.execute.serve import Leader, Order, Row, follow
from planner.execute.transformer import Transformer
from planner.profiling.machine import TORCH_DTYPES, open_machine, open_torch
from simulator.log import Log
from simulator.routers import round_robin
from simulator.scheduler import SchedulerConfig
from simulator.workload import Requests

torch: Any = open_torch()
#: Seconds without a word from a process after which it counts as stalled: while starting, and while serving.
START_STALL_S, STALL_S = 600.0, 120.0
#: Seconds between two words of a replica that serves.
REPORT_S = 2.0
#: Seconds between telling all replicas to serve and the run's zero.
LEAD_S = 0.5
#: Of prctl(2).
PR_SET_PDEATHSIG = 1
#: Told the number of requests that have finished.
Progress = Callable[[int], None]


class Stalled(Exception):
    """No process has said anything for too long."""


class Workers:
    """The processes of a job; a context manager.

    stall_s   seconds without a finished step after which a run is given up
    """

    def __init__(self, job: Job, stall_s: float = STALL_S) -> None:
        """Start the processes and let them make their weights.

        Raises MeasurementError where they do not start, OutOfMemoryError where the model does not fit.
        """
        self.job = job
        self.stall_s = stall_s
        self._folder = tempfile.TemporaryDirectory(prefix="shardwise-")
        context = multiprocessing.get_context("spawn")
        _large_pages()
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        per_replica = job.mapping.gpus
        for number in range(job.ranks):
            replica, rank = divmod(number, per_replica)
            mine, theirs = context.Pipe()
            store = str(Path(self._folder.name) / f"replica-{replica}")
            process = context.Process(target=_main, args=(theirs, job, number, replica, rank, store), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(mine)
            self._processes.append(process)
        try:
            self._answers(START_STALL_S)
        except BaseException:
            self.close(kill=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(kill=kind is not None)

    @property
    def leaders(self) -> list[int]:
        """Processes that lead a replica."""
        return list(range(0, self.job.ranks, self.job.mapping.gpus))

    def close(self, *, kill: bool = False) -> None:
        """End the processes."""
        if not kill:
            with suppress(MeasurementError):
                self._tell(("stop",))
        for process in self._processes:
            process.join(timeout=0.0 if kill else 10.0)
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()

    def run_passes(self, compositions: Sequence[Composition]) -> list[Pass]:
        """Run composed steps on all ranks at once; what each rank measured."""
        self._tell(("passes", list(compositions)))
        return [measured for answer in self._answers(max(self.stall_s, STALL_S)) for measured in answer]

    def transfers(self, tokens: Sequence[int]) -> list[tuple[int, float]]:
        """Seconds to send the activations of so many tokens from one pipeline stage to the next, of replica 0."""
        self._tell(("transfers", list(tokens)))
        found: list[tuple[int, float]] = self._answers(max(self.stall_s, STALL_S))[0]
        return found

    def serve(
        self,
        requests: Requests,
        config: SchedulerConfig,
        *,
        measure_laps: bool = False,
        progress: Progress | None = None,
    ) -> Served:
        """Let the requests arrive, in turn at the replicas, and serve them.

        What stalls, fails or is interrupted ends the processes and leaves what happened until then, `broken` saying so.
        """
        job, count = self.job, len(requests)
        assert round_robin.assign is not None
        replica_of = round_robin.assign(count, np.ones(job.replicas), np.random.default_rng(0))
        prompts, outputs = requests.prompt_tokens.tolist(), requests.output_tokens.tolist()
        logs: dict[int, Log] = {}
        rows: list[Row] = []
        answers: dict[int, list[int]] = {}
        running, broken = set(range(job.ranks)), None

        def hear(number: int, said: Any) -> bool:
            kind, content = said
            if kind == "progress":
                logs[number], new = content
                rows.extend(new)
                if progress is not None:
                    progress(sum(int(np.count_nonzero(~np.isnan(log.finish_s))) for log in logs.values()))
                return False
            if number in self.leaders:
                answers.update(content)
            return True

        try:
            zero_s, report_s = time.monotonic() + LEAD_S, min(REPORT_S, self.stall_s / 4)
            for number in range(job.ranks):
                replica = number // job.mapping.gpus
                mine = np.flatnonzero(replica_of == replica)
                arrival_s = requests.arrival_s[mine].tolist()
                order = Order(
                    replica, mine.tolist(), arrival_s, prompts, outputs, config, zero_s, report_s, measure_laps
                )
                self._send(number, ("serve", order))
            self._listen(running, hear, self.stall_s + LEAD_S)
        except Stalled as reason:
            broken = f"stalled: {reason}"
        except ShardwiseError as reason:
            broken = f"failed: {reason}"
        except KeyboardInterrupt:
            broken = "interrupted"
        if broken:
            self.close(kill=True)
        log = merged(list(logs.values()), count)
        log.arrival_s = requests.arrival_s
        steps = pd.DataFrame(rows, columns=list(EXECUTED_COLUMNS)).sort_values(["replica", "start_s"], kind="stable")
        return Served(log, steps.reset_index(drop=True), answers, broken)

    def _tell(self, command: tuple[Any, ...]) -> None:
        for number in range(len(self._connections)):
            self._send(number, command)

    def _send(self, number: int, command: tuple[Any, ...]) -> None:
        try:
            self._connections[number].send(command)
        except OSError:
            raise self._ended(number) from None

    def _ended(self, number: int) -> MeasurementError:
        """The error of a process that is no more."""
        self._processes[number].join(timeout=5.0)
        code = self._processes[number].exitcode
        return MeasurementError(
            f"process {number} of {self.job.ranks} ended with code {code}"
            + (": killed, most likely for want of memory" if code == -signal.SIGKILL else "")
            + "; expected it to serve; try a smaller model"
        )

    def _answers(self, stall_s: float) -> list[Any]:
        """One answer of every process, in their order."""
        found: dict[int, Any] = {}

        def hear(number: int, said: Any) -> bool:
            found[number] = said[1]
            return True

        try:
            self._listen(set(range(self.job.ranks)), hear, stall_s)
        except Stalled as reason:
            raise MeasurementError(f"execution stalled: {reason}; try a smaller model or fewer threads") from None
        return [found[number] for number in sorted(found)]

    def _listen(self, waiting: set[int], hear: Callable[[int, Any], bool], stall_s: float) -> None:
        """Hand what the processes say to `hear` until it has returned True for every one."""
        while waiting:
            ready = wait([self._connections[n] for n in waiting], timeout=stall_s)
            if not ready:
                raise Stalled(f"no word for {stall_s:g} s")
            for number in [n for n in waiting if self._connections[n] in ready]:
                try:
                    said = self._connections[number].recv()
                except (EOFError, OSError):
                    raise self._ended(number) from None
                if said[0] == "error":
                    raise said[1]
                if hear(number, said):
                    waiting.discard(number)


def _large_pages() -> None:
    """Have the processes started from here on keep large tensors in large pages, if glibc can (2.35 or later).

    Looking up 4 KiB pages made products with one row a third slower and their times twice as unsteady.
    """
    name, wanted = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
    others = [
        part for part in os.environ.get(name, "").split(":") if part and not part.startswith("glibc.malloc.hugetlb")
    ]
    os.environ[name] = ":".join([*others, wanted])


def merged(logs: Sequence[Log], count: int) -> Log:
    """One log of what happened at all replicas."""
    whole = Log(count, record=True)
    assert whole.segments is not None
    for log in logs:
        for request in range(count):
            if log.replica[request] >= 0:
                for name in ("first_schedule_s", "first_token_s", "finish_s", "replica", "lane"):
                    getattr(whole, name)[request] = getattr(log, name)[request]
        whole.rejected += log.rejected
        whole.preemptions |= log.preemptions
        whole.segments.extend(log.segments or ())
        whole.spans += log.last_spans([0] * count)[: len(log.spans)]
        whole.events += log.events
        whole.limited |= log.limited
        whole.peak_seqs = max(whole.peak_seqs, log.peak_seqs)
        whole.peak_blocks = max(whole.peak_blocks, log.peak_blocks)
    return whole


def _main(connection: Connection, job: Job, number: int, replica: int, rank: int, store: str) -> None:
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
