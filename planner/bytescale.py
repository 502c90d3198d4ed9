"""ByteScale: any number of ranks for a sequence, by a closed form, and every rank its own number of micro-batches.

A sequence takes the least ranks whose memory holds it, fewer when part of its activations waits in host memory
(arXiv:2502.21231). With l layers, of which all but the first and last can offload the share r,

    D(s) = ceil((2 Act(s) + (1 - r) (l - 2) Act(s)) / (l Act(C))),     C tokens filling a rank

and r as large as a layer's seconds allow: T(s) >= r Act(s) / bandwidth, min(1, l Act(C) / ((l - 2) Act(s))) <= r <= 1.
Act is proportional to tokens. Sequences go to the ranks that are furthest behind, longest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from time import perf_counter

import numpy as np

from planner.errors import PlanError
from planner.sequencegroups import GroupCost, Partition, checked


@dataclass(frozen=True, slots=True)
class Offload:
    """Host memory that activations can wait in.

    layers              of the model
    bytes_per_token     of one layer's activations
    bytes_per_s         to the host or back, the slower of the two
    """

    layers: int
    bytes_per_token: float
    bytes_per_s: float


def ranks_of(length: int, cost: GroupCost, offload: Offload | None = None) -> int:
    """Ranks that a sequence of `length` tokens takes; without host memory ceil(length / C).

    A layer's seconds are those of arithmetic on one rank, an even share of the layers'. Where the share that they hide
    is below the least that counts, nothing is offloaded.

    Raises PlanError for offloading of less than 3 layers, of which none could.
    """
    filled = length / cost.tokens_per_rank
    if offload is None or filled <= 1.0:
        return max(1, ceil(filled - 1e-9))
    layers = offload.layers
    if layers < 3:
        raise PlanError(
            f"offloading from {layers} layers: expected at least 3, of which the first and last keep theirs"
        )
    layer_s = float(cost.compute_s(length, 1)) / layers
    share = min(1.0, layer_s * offload.bytes_per_s / (offload.bytes_per_token * length))
    if share < min(1.0, layers / ((layers - 2) * filled)):
        share = 0.0
    return max(1, ceil((2 + (1 - share) * (layers - 2)) / layers * filled - 1e-9))


def bytescale(lengths: Sequence[int], ranks: int, cost: GroupCost, offload: Offload | None = None) -> Partition:
    """A batch over ranks that do not wait for one another between micro-batches, but where they share a sequence.

    Sequences of several ranks start when the ranks that are free first are all free; the others then go, longest first,
    to the rank with least work, each rank cutting its own into micro-batches of at most C tokens. `rounds` is empty.
    Raises PlanError as `checked`.
    """
    begun = perf_counter()
    ordered = checked(lengths, ranks, cost)
    busy = np.zeros(ranks)
    alone: list[int] = []
    work = 0.0
    for s in ordered:
        shared = ranks_of(s, cost, offload)
        if shared == 1:
            alone.append(s)
            work += float(cost.sequence_s(s, 1))
            continue
        seconds = cost.start_s + float(cost.sequence_s(s, shared))
        first = np.argsort(busy, kind="stable")[:shared]
        busy[first] = busy[first].max() + seconds
        work += shared * seconds
    rows: list[list[float]] = [[] for _ in range(ranks)]
    for s in alone:
        rank = int(busy.argmin())
        room = next((i for i, used in enumerate(rows[rank]) if used + s <= cost.tokens_per_rank), None)
        if room is None:
            rows[rank].append(0.0)
            room = len(rows[rank]) - 1
            busy[rank] += cost.start_s
        rows[rank][room] += s
        busy[rank] += float(cost.sequence_s(s, 1))
    # The ranks of each sequence are given, so their work is; a micro-batch starts for every C tokens at least.
    work += cost.start_s * sum(alone) / cost.tokens_per_rank
    return Partition("ByteScale", (), float(busy.max()), work / ranks, perf_counter() - begun)
