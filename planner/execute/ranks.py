"""How do the processes of a replica talk? Collectives between shards, messages between pipeline stages."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from planner.execute.records import Job
from planner.execute.transformer import Share, Tensor
from planner.profiling.machine import TORCH_DTYPES, open_torch

torch: Any = open_torch()
#: Most requests one message announces; more go with the next step.
MOST_NEW = 62
#: What a message says instead of a lane: nothing more comes, or nothing has come yet.
STOP, IDLE = -1, -2
#: How long a rank waits for another.
PATIENCE = timedelta(hours=6)


class Peers:
    """The processes of one replica, numbered tensor-parallel innermost: rank = stage x tp + shard."""

    def __init__(self, job: Job, rank: int, store: str) -> None:
        """Meet the others at the file `store`."""
        mapping = job.mapping
        self.rank, self.count = rank, mapping.gpus
        self.tp, self.pp = mapping.tp, mapping.pp
        self.stage, self.shard = divmod(rank, mapping.tp)
        self.device = "cpu" if job.device == "cpu" else f"cuda:{torch.cuda.current_device()}"
        self._dtype = getattr(torch, TORCH_DTYPES[job.dtype])
        self._width = job.model.hidden
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._group: Any = None
        if self.count == 1:
            return
        distributed = torch.distributed
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "gloo" if job.device == "cpu" else "cpu:gloo,cuda:nccl",
            init_method=f"file://{store}",
            rank=rank,
            world_size=self.count,
            timeout=PATIENCE,
        )
        for stage in range(mapping.pp):
            group = distributed.new_group(list(range(stage * mapping.tp, (stage + 1) * mapping.tp)), timeout=PATIENCE)
            if stage == self.stage:
                self._group = group

    def share(self, job: Job) -> Share:
        """This rank's part of the model."""
        return Share(job.mapping, self.stage, self.shard, self._reduce, self._gather)

    def _reduce(self, x: Tensor) -> None:
        torch.distributed.all_reduce(x, group=self._group)

    def _gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.tp)]
        torch.distributed.all_gather(parts, x.contiguous(), group=self._group)
        return torch.cat(parts, dim=-1)

    def barrier(self) -> None:
        """Wait for all ranks of the replica."""
        if self.count > 1:
            torch.distributed.barrier()

    def announce(self, lane: int, requests: Sequence[int]) -> None:
        """From the leader: the lane that steps next, and the requests it was offered before."""
        message = _message(lane, requests)
        if self.tp > 1:
            torch.distributed.broadcast(message, self.stage * self.tp, group=self._group)
        self._pass_on(message)

    def hear(self) -> tuple[int, list[int]]:
        """What the leader announced; a stage passes it on to the next one."""
        message = torch.zeros(MOST_NEW + 2, dtype=torch.int64)
        if self.stage == 0:
            torch.distributed.broadcast(message, 0, group=self._group)
        else:
            torch.distributed.recv(message, self.rank - self.tp)
        self._pass_on(message)
        lane, count, *requests = message.tolist()
        return lane, requests[:count]

    def _pass_on(self, message: Tensor) -> None:
        if self.stage < self.pp - 1:
            self._send(message, self.rank + self.tp)

    def send_hidden(self, hidden: Tensor) -> None:
        """To the same shard of the next stage."""
        self._send(hidden.contiguous(), self.rank + self.tp)

    def receive_hidden(self, rows: int) -> Tensor:
        """From the same shard of the stage before, (rows, width)."""
        hidden = torch.empty(rows, self._width, dtype=self._dtype, device=self.device)
        torch.distributed.recv(hidden, self.rank - self.tp)
        return hidden

    def send_ids(self, ids: Tensor, lane: int) -> None:
        """From the last stage to the same shard of the first."""
        self._send(ids.cpu(), self.shard, tag=1 + lane)

    def bounce(self, hidden: Tensor) -> None:
        """There and back: activations from the first stage to the second, and one number in return."""
        there, back = self.shard + self.tp, self.shard
        answer = torch.zeros(1, dtype=torch.int64)
        if self.stage == 0:
            torch.distributed.send(hidden, there)
            torch.distributed.recv(answer, there)
        elif self.stage == 1:
            torch.distributed.recv(hidden, back)
            torch.distributed.send(answer, back)

    def expect_ids(self, count: int, lane: int) -> Expected:
        """What send_ids will bring."""
        ids = torch.full((count,), -1, dtype=torch.int64)
        source = (self.pp - 1) * self.tp + self.shard
        return Expected(torch.distributed.irecv(ids, source, tag=1 + lane), ids)

    def _send(self, tensor: Tensor, rank: int, tag: int = 0) -> None:
        """Do not wait until it has arrived; memory is kept until then."""
        self._sent.append((torch.distributed.isend(tensor, rank, tag=tag), tensor))
        # gloo says only to who waits that something has arrived; of each lane two messages are on their way at most.
        if len(self._sent) > 4 * self.pp:
            work, _ = self._sent.popleft()
            work.wait()

    def flush(self) -> None:
        """Wait until everything sent has arrived."""
        while self._sent:
            work, _ = self._sent.popleft()
            work.wait()

    def close(self) -> None:
        """Leave the others."""
        if self.count > 1:
            self.flush()
            torch.distributed.destroy_process_group()


class Expected:
    """Ids on their way."""

    __slots__ = ("_ids", "_work")

    def __init__(self, work: Any, ids: Tensor) -> None:
        self._work = work
        self._ids = ids

    @property
    def here(self) -> bool:
        """Whether they have arrived; ids are never negative, and gloo does not say."""
        return bool((self._ids >= 0).all())

    def wait(self) -> list[int]:
        """The ids."""
        self._work.wait()
        found: list[int] = self._ids.tolist()
        return found


def _message(lane: int, requests: Sequence[int]) -> Tensor:
    values = np.zeros(MOST_NEW + 2, dtype=np.int64)
    values[:2] = lane, len(requests)
    values[2 : 2 + len(requests)] = requests
    return torch.from_numpy(values)
