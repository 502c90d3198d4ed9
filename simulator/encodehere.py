"""What if there are no encode workers, and the replica that prefills a prompt encodes its images first?

The default of engines, and the baseline of disaggregated encoding: the replica does nothing else while it encodes, its
decodes included.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from hwmodels.hardware import Device
from hwmodels.step_model import Numbers
from simulator.encode import encode_consumption
from simulator.errors import PoolError
from simulator.scheduler import Chunk


@dataclass(frozen=True, slots=True, eq=False)
class OwnEncoder:
    """An encoder that shares a replica's devices.

    times_s       seconds of a batch on one device by its tiles, 0 to at least batch_tiles
    batch_tiles   most tiles of a batch on one device
    ranks         devices that encode side by side, each with a whole encoder: the tensor-parallel ranks of a scheduler,
                  in a pipeline those of its first stage (vLLM's --mm-encoder-tp-mode data)
    works         FLOPs and bytes of a batch on one device by its tiles; None where they are not wanted

    Raises PoolError where times are not known for a full batch.
    """

    times_s: Numbers
    batch_tiles: int
    ranks: int = 1
    works: Sequence[tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        """Raise PoolError where times are not known for a full batch."""
        if not 1 <= self.batch_tiles < len(self.times_s):
            raise PoolError(
                f"encoder with batch_tiles = {self.batch_tiles}: expected 1 to {len(self.times_s) - 1}, the tiles that "
                "times are known of"
            )
        if self.ranks < 1:
            raise PoolError(f"encoder with ranks = {self.ranks}: expected at least 1")


class EncodesFirst:
    """Makes the steps of one replica longer by the time to encode the images of prompts that begin in them.

    tiles     of every request of the run
    spent_s   on images, of every step with prompts so far
    batches   of all ranks, by their tiles

    Tokens of images are kept until the request ends: a prompt that is computed again does not encode again.
    """

    __slots__ = ("_encoded", "batches", "encoder", "spent_s", "tiles")

    def __init__(self, encoder: OwnEncoder, tiles: Sequence[int]) -> None:
        self.encoder = encoder
        self.tiles = tiles
        self.spent_s = array("d")
        self.batches: dict[int, int] = {}
        self._encoded: set[int] = set()

    def __call__(self, chunks: Sequence[Chunk]) -> float:
        """Seconds before a step with these prompts: tiles shared out evenly over the ranks, batch by batch."""
        fresh = [request for request, _, _ in chunks if self.tiles[request] and request not in self._encoded]
        if not fresh:
            self.spent_s.append(0.0)
            return 0.0
        self._encoded.update(fresh)
        encoder = self.encoder
        least, more = divmod(sum(self.tiles[request] for request in fresh), encoder.ranks)
        self._count(least, encoder.ranks - more)
        self._count(least + 1, more)
        seconds = self._seconds(least + (more > 0))
        self.spent_s.append(seconds)
        return seconds

    def _seconds(self, tiles: int) -> float:
        full, rest = divmod(tiles, self.encoder.batch_tiles)
        return full * self.encoder.times_s[self.encoder.batch_tiles] + self.encoder.times_s[rest]

    def _count(self, tiles: int, ranks: int) -> None:
        full, rest = divmod(tiles, self.encoder.batch_tiles)
        for size, count in ((self.encoder.batch_tiles, full), (rest, 1)):
            if size and count and ranks:
                self.batches[size] = self.batches.get(size, 0) + count * ranks

    def consumption(self, device: Device, dtype: str) -> tuple[float, float, float]:
        """FLOPs, bytes, and joules above idle power; zeros where the works are not known."""
        return encode_consumption(self.encoder.works, self.encoder.times_s, self.batches, device, dtype)
