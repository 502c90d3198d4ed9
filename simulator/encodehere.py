"""What if there are no encode workers, and the replica that prefills a prompt encodes its images first?

Baseline of disaggregated encoding: the replica does nothing else while it encodes, its decodes included, and it is
alone with the images of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hwmodels.step_model import Numbers, StepModel
from simulator.deployment import AnyReplica, ReplicaSpec
from simulator.errors import PoolError
from simulator.log import Log
from simulator.replica import Replica
from simulator.scheduler import Scheduler


@dataclass(frozen=True, slots=True, eq=False)
class OwnEncoder:
    """An encoder that shares a replica's devices.

    times_s       seconds of a batch by its tiles, 0 to at least batch_tiles
    tiles         of every request of the run
    batch_tiles   most tiles of a batch

    Raises PoolError where times are not known for such a batch.
    """

    times_s: Numbers
    tiles: Sequence[int]
    batch_tiles: int

    def __post_init__(self) -> None:
        """Raise PoolError where times are not known for a full batch."""
        if not 1 <= self.batch_tiles < len(self.times_s):
            raise PoolError(
                f"encoder with batch_tiles = {self.batch_tiles}: expected 1 to {len(self.times_s) - 1}, the tiles that "
                "times are known of"
            )

    def seconds(self, requests: Sequence[int]) -> float:
        """To encode the images of requests whose prompts begin in the same step, batch by batch."""
        full, rest = divmod(sum(self.tiles[request] for request in requests), self.batch_tiles)
        return full * self.times_s[self.batch_tiles] + self.times_s[rest]


class EncodingReplica(Replica):
    """A replica whose steps are longer by the time to encode the images of prompts that begin in them.

    Tokens of images are kept until the request ends: a prompt that is computed again does not encode again.
    """

    __slots__ = ("_encoded", "_encoder")

    def __init__(
        self, model: StepModel, schedulers: Sequence[Scheduler], log: Log, index: int, encoder: OwnEncoder
    ) -> None:
        super().__init__(model, schedulers, log, index)
        self._encoder = encoder
        self._encoded: set[int] = set()

    def plan(self, horizon_s: float) -> float:
        """As Replica.plan, the encoder's time before it."""
        end = super().plan(horizon_s)
        fresh = [r for r, _, before in self.scheduler.chunks if not before and r not in self._encoded]
        if fresh:
            self._encoded.update(fresh)
            self.end = end = end + self._encoder.seconds(fresh)
        return end


@dataclass(frozen=True, slots=True, eq=False)
class EncodingSpec(ReplicaSpec):
    """A replica that encodes for itself; raises PoolError for one of several pipeline stages or attention groups."""

    encoder: OwnEncoder | None = None

    def __post_init__(self) -> None:
        """Raise PoolError where there is no encoder, or more than one scheduler."""
        if self.encoder is None or self.lanes > 1:
            raise PoolError("a replica that encodes needs an encoder, and no pipeline stages or attention groups")

    def start(self, prompts: list[int], outputs: list[int], log: Log, index: int) -> AnyReplica:
        """A fresh replica that serves requests from the given lists and writes to `log`."""
        assert self.encoder is not None
        scheduler = Scheduler(self.scheduler, self.kv_blocks, prompts, outputs)
        return EncodingReplica(self.model, [scheduler], log, index, self.encoder)
