"""How do the ways of giving a batch's sequences to ranks compare?"""

from __future__ import annotations

from collections.abc import Sequence

from planner.bytescale import Offload, bytescale
from planner.flexsp import flexsp
from planner.sequencegroups import GroupCost, Partition, checked, sizes_of, static
from planner.zeppelin import zeppelin


def compared(
    lengths: Sequence[int],
    ranks: int,
    cost: GroupCost,
    *,
    hidden_bytes: float,
    offload: Offload | None = None,
    node: int = 8,
    seconds: float = 20.0,
) -> list[Partition]:
    """Static groups of every size that holds the longest sequence, FlexSP, ByteScale and Zeppelin, in this order.

    hidden_bytes, node   as planner.zeppelin has them; seconds   of FlexSP's search

    The four do not stand on the same ground: static groups, FlexSP and ByteScale exchange by Ulysses and hide nothing,
    Zeppelin's rings hide behind attention; static groups, FlexSP and Zeppelin run in rounds, ByteScale's ranks do not.
    Raises PlanError as planner.sequencegroups.checked.
    """
    longest = checked(lengths, ranks, cost)[0]
    fitting = [size for size in sizes_of(ranks) if longest <= cost.tokens_per_rank * size]
    return [
        *(static(lengths, ranks, cost, size) for size in fitting),
        flexsp(lengths, ranks, cost, seconds=seconds),
        bytescale(lengths, ranks, cost, offload),
        zeppelin(lengths, ranks, cost, hidden_bytes=hidden_bytes, node=node),
    ]


def as_text(rows: Sequence[Partition]) -> str:
    """One line for each: seconds, over the fastest static groups', bound, gap, rounds."""
    static_s = min(row.seconds for row in rows if row.method.startswith("static"))
    lines = [f"{'method':<18}{'seconds':>9}{'speedup':>9}{'bound':>9}{'gap':>7}{'rounds':>8}"]
    for row in rows:
        rounds = str(len(row.rounds)) if row.rounds else "-"
        speedup = f"{static_s / row.seconds:.2f}x"
        lines.append(f"{row.method:<18}{row.seconds:>9.2f}{speedup:>9}{row.bound_s:>9.2f}{row.gap:>7.1%}{rounds:>8}")
    return "\n".join(lines)
