"""Who executes? Processes, one per rank, that are started once, told what to do, and watched."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd

from hwmodels.errors import MeasurementError, ShardwiseError
from planner.execute.process import run_rank
from planner.execute.records import EXECUTED_COLUMNS, Composition, Job, Pass, Served
from planner.execute.serve import Order, Row
from simulator.log import Log
from simulator.routers import round_robin
from simulator.scheduler import SchedulerConfig
from simulator.workload import Requests

#: Seconds without a word from a process after which it counts as stalled: while starting, and while serving.
START_STALL_S, STALL_S = 600.0, 120.0
#: Seconds between two words of a replica that serves.
REPORT_S = 2.0
#: Seconds between telling all replicas to serve and the run's zero.
LEAD_S = 0.5
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
            process = context.Process(target=run_rank, args=(theirs, job, number, replica, rank, store), daemon=True)
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

    Behind a pause of a second, products with one row took 28 ms per 40 MB with pages of 4 KiB and 16 ms with these.
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
