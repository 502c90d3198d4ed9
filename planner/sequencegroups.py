"""Which ranks should share which sequences when the lengths in one batch differ?

A group of P ranks that shares sequences by Ulysses takes, forward and backward (FlexSP, arXiv:2412.01523),

    start + sum over its sequences of T(s, P),    T(s, P) = (quadratic s^2 + linear s) / P + bytes s / P / rate(P)

and a round of groups side by side as long as its slowest. Short sequences on many ranks wait for links between nodes;
long ones do not fit on few. Static groups, the usual practice, are in this file; planner.flexsp, planner.bytescale and
planner.zeppelin choose by sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf
from time import perf_counter

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import PlanError

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GroupCost:
    """Seconds and memory of sequences on groups of ranks.

    quadratic_s, linear_s   of one rank per token squared and per token
    start_s                 of each round of a group
    bytes_per_token         sent by all ranks of a group together
    rates                   (ranks, bytes per s and rank that they exchange at), ascending; between two, the larger's
    tokens_per_rank         that a rank's memory holds in one round
    ring_bytes_per_token    of keys and values passed round a ring, by each rank but for 1 / P, forward and backward
    """

    quadratic_s: float
    linear_s: float
    start_s: float
    bytes_per_token: float
    rates: tuple[tuple[int, float], ...]
    tokens_per_rank: float
    ring_bytes_per_token: float = 0.0

    def rate(self, ranks: int) -> float:
        """Bytes per s of an exchange between `ranks` ranks."""
        return next((rate for size, rate in self.rates if size >= ranks), self.rates[-1][1])

    def compute_s(self, lengths: ArrayLike, ranks: int) -> Array:
        """Arithmetic of each sequence on `ranks` ranks."""
        s: Array = np.asarray(lengths, dtype=float)
        return (self.quadratic_s * s * s + self.linear_s * s) / ranks

    def exchange_s(self, lengths: ArrayLike, ranks: int) -> Array:
        """All-to-alls of each sequence."""
        s: Array = np.asarray(lengths, dtype=float)
        return s * 0.0 if ranks == 1 else self.bytes_per_token * s / ranks / self.rate(ranks)

    def sequence_s(self, lengths: ArrayLike, ranks: int) -> Array:
        """T(s, P) of each sequence, without the start of its round."""
        return self.compute_s(lengths, ranks) + self.exchange_s(lengths, ranks)


def _flexsp(model: str) -> GroupCost:
    """FlexSP's shipped constants for 64 A100 (arXiv:2412.01523, repository, branch flexsp).

    Its alphas are in ms and its activations in MB per token. Exchanged are 4 activations of every layer, forward and
    backward, in 16 bit. Depth and width of the 30B model are taken to be LLaMA-30B's. A rank's tokens are what 90 % of
    80 GB hold beside 16 bytes per parameter over 64 ranks (ZeRO-3). Rings pass keys and values forward and, with their
    gradients, backward.
    """
    quadratic, linear, start, megabytes, layers, hidden, billions = {
        "gpt-7b": (5.128e-6, 0.18396, 629.4, 4.48, 32, 4096, 7),
        "gpt-13b": (9.2852e-6, 0.3060, 1132.6, 4.22, 40, 5120, 13),
        "gpt-30b": (15.4262e-6, 0.8036, 2789.4, 3.417, 60, 6656, 30),
    }[model]
    rates = zip((2, 4, 8, 16, 32, 64), (119.5e9, 104.1e9, 96.5e9, 10.33e9, 5.94e9, 4.87e9), strict=True)
    return GroupCost(
        quadratic * 1e-3, linear * 1e-3, start * 1e-3, 4 * 2 * layers * hidden * 2.0, tuple(rates),
        (0.9 * 80e9 - 16e9 * billions / 64) / (megabytes * 1e6), 3 * 2 * layers * hidden * 2.0,
    )  # fmt: skip


@lru_cache(maxsize=8)
def flexsp_cost(model: str) -> GroupCost:
    """The cost of 'gpt-7b', 'gpt-13b' or 'gpt-30b' on 64 A100. Raises PlanError for another."""
    if model not in ("gpt-7b", "gpt-13b", "gpt-30b"):
        raise PlanError(f"cost of {model!r}: expected gpt-7b, gpt-13b or gpt-30b")
    return _flexsp(model)


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that `ranks` ranks share in one round."""

    ranks: int
    lengths: tuple[int, ...]


Round = tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Partition:
    """Where every sequence of a batch goes.

    rounds     groups side by side, one round after the other; empty where ranks do not run in rounds
    seconds    of the whole batch
    bound_s    no partition of the kind is faster (see the method for what may vary); 0 where none is known
    solve_s    that finding it took
    """

    method: str
    rounds: tuple[Round, ...]
    seconds: float
    bound_s: float
    solve_s: float

    @property
    def gap(self) -> float:
        """(seconds - bound) / seconds."""
        return (self.seconds - self.bound_s) / self.seconds if self.seconds else 0.0


def group_s(group: Group, cost: GroupCost) -> float:
    """Seconds of one group in one round."""
    return cost.start_s + float(cost.sequence_s(group.lengths, group.ranks).sum())


def round_s(groups: Sequence[Group], cost: GroupCost) -> float:
    """Seconds of one round: of its slowest group."""
    return max((group_s(group, cost) for group in groups), default=0.0)


def checked(lengths: Sequence[int], ranks: int, cost: GroupCost) -> list[int]:
    """The lengths, longest first.

    Raises PlanError for none, lengths below 1, ranks that are no power of two, and sequences that no group holds.
    """
    if ranks < 1 or ranks & (ranks - 1):
        raise PlanError(f"{ranks} ranks: expected a power of two, of which all groups are")
    if not lengths or min(lengths) < 1:
        raise PlanError(
            f"{len(lengths)} sequences, shortest {min(lengths, default=0)}: expected some, of 1 token or more"
        )
    most = int(cost.tokens_per_rank * ranks)
    if max(lengths) > most:
        raise PlanError(
            f"a sequence of {max(lengths)} tokens: expected at most {most} on {ranks} ranks; take more ranks or cut it"
        )
    return sorted((int(s) for s in lengths), reverse=True)


def sizes_of(ranks: int) -> list[int]:
    """Powers of two up to `ranks`."""
    return [1 << i for i in range(ranks.bit_length())]


def least_rounds(lengths: Sequence[int], ranks: int, cost: GroupCost) -> int:
    """Rounds that memory asks for."""
    return max(1, ceil(sum(lengths) / (ranks * cost.tokens_per_rank) - 1e-9))


def work_bound_s(lengths: Sequence[int], ranks: int, cost: GroupCost) -> float:
    """No groups in rounds are faster: every sequence at the size where it takes fewest rank-seconds, on even ranks."""
    least = np.full(len(lengths), inf)
    for size in sizes_of(ranks):
        fits = np.asarray(lengths) <= cost.tokens_per_rank * size
        least = np.minimum(least, np.where(fits, size * cost.sequence_s(lengths, size), inf))
    return least_rounds(lengths, ranks, cost) * cost.start_s + float(least.sum()) / ranks


def packed(lengths: Sequence[int], bins: int, size: int, cost: GroupCost) -> list[list[int]] | None:
    """Sequences, longest first, each to the bin of least work that has room on `size` ranks; None if none has."""
    room = int(cost.tokens_per_rank * size)
    tokens, work = np.zeros(bins), np.zeros(bins)
    found: list[list[int]] = [[] for _ in range(bins)]
    for s, seconds in zip(lengths, cost.sequence_s(lengths, size), strict=True):
        open_ = np.flatnonzero(tokens + s <= room)
        if not len(open_):
            return None
        chosen = int(open_[work[open_].argmin()])
        found[chosen].append(s)
        tokens[chosen] += s
        work[chosen] += seconds
    return found


def static(lengths: Sequence[int], ranks: int, cost: GroupCost, size: int) -> Partition:
    """All groups of `size` ranks: sequences packed evenly, packs of like work in one round, rounds as few as are best.

    Raises PlanError as `checked`, and where the longest does not fit on `size` ranks.
    """
    begun = perf_counter()
    ordered = checked(lengths, ranks, cost)
    if size not in sizes_of(ranks) or ordered[0] > cost.tokens_per_rank * size:
        raise PlanError(
            f"groups of {size} for a sequence of {ordered[0]} tokens: expected a power of two up to {ranks} whose "
            f"ranks hold it, {cost.tokens_per_rank:.0f} tokens each"
        )
    best: tuple[float, tuple[Round, ...]] = (inf, ())
    least, side = least_rounds(ordered, ranks, cost), ranks // size
    for rounds in range(least, least + len(ordered) + 1):
        bins = packed(ordered, rounds * side, size, cost)
        if bins is not None:
            groups = sorted((Group(size, tuple(b)) for b in bins if b), key=lambda g: -group_s(g, cost))
            cut = tuple(tuple(groups[i : i + side]) for i in range(0, len(groups), side))
            best = min(best, (sum(round_s(groups, cost) for groups in cut), cut), key=lambda found: found[0])
        if best[1] and rounds >= least + 4:
            break
    bound = work_bound_s(ordered, ranks, cost)
    return Partition(f"static, {size} ranks", best[1], best[0], bound, perf_counter() - begun)


def best_static(lengths: Sequence[int], ranks: int, cost: GroupCost) -> Partition:
    """The fastest static size."""
    longest = max(checked(lengths, ranks, cost))
    fitting = [size for size in sizes_of(ranks) if longest <= cost.tokens_per_rank * size]
    return min((static(lengths, ranks, cost, size) for size in fitting), key=lambda found: found.seconds)
