"""What does linear attention send when a sequence lies on several ranks: states by all-gather, or by a pipelined scan?

Linear attention carries one state per head, key_dim x value_dim, from token to token; a rank needs the state of all
tokens before its own, whatever their number.

    lasp-2   every rank gathers every rank's local state and sums those before it (LASP-2, arXiv:2502.07563): each sends
             (cp - 1) states, one collective
    zeco     All-Scan: a rank receives the running state of the one before it in K blocks, adds its own and forwards
             them (ZeCO, arXiv:2507.01004): each sends one state, and the last rank has it after the first block has
             passed cp - 1 hops and K - 1 blocks have followed. With equal hops that is (cp + K - 2) tau(state / K), tau
             the seconds of one message; the paper's tau(state) + (cp - 1) tau(state) / K is that with tau proportional
             to size and one block's time more

Both run beside attention within the rank's own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.contextlinks import Groups, all_pairs, busiest, collective_s, members, step_s
from hwmodels.contextparallel import ContextCost
from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster
from hwmodels.topology import NO_LINK, topology

Array = NDArray[np.float64]
LinearKind = Literal["lasp-2", "zeco"]


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """One block of linear attention; element_bytes of its states, which kernels keep in fp32."""

    heads: int
    key_dim: int
    value_dim: int
    element_bytes: float = 4.0

    def state_bytes(self, tp: int = 1) -> float:
        """Bytes of the state of one sequence on one of tp tensor-parallel ranks, independent of its length."""
        return self.heads / tp * self.key_dim * self.value_dim * self.element_bytes


def linear_cost(
    cluster: Cluster,
    groups: Groups,
    kind: LinearKind,
    attention: LinearAttention,
    tp: int,
    sequences: ArrayLike,
    beside_s: ArrayLike,
    after_s: ArrayLike = 0.0,
    *,
    blocks: int | None = None,
) -> ContextCost:
    """One layer of `sequences` sequences, each cut evenly over the first of `groups`.

    beside_s   attention within a rank's tokens, which needs no other rank's state
    after_s    what the state of the tokens before is needed for
    blocks     K of All-Scan; None: the divisor of key_dim that is fastest, each block being whole rows of the state

    Raises MappingError for an unknown kind, a tp that does not divide the heads, and blocks that do not divide
    the rows.
    """
    if kind not in ("lasp-2", "zeco"):
        raise MappingError(f"sequence parallelism {kind!r} of linear attention: expected lasp-2 or zeco")
    if tp < 1 or attention.heads % tp:
        raise MappingError(f"tp = {tp}: expected a divisor of {attention.heads} heads of linear attention")
    cp = len(groups[0])
    state, beside, after = np.broadcast_arrays(
        np.asarray(sequences, dtype=float) * attention.state_bytes(tp),
        np.asarray(beside_s, dtype=float),
        np.asarray(after_s, dtype=float),
    )
    if kind == "lasp-2":
        moving_s = collective_s(cluster, "all-gather", groups, cp * state)
        sent, held, unit = (cp - 1) * state, (cp - 1) * state, all_pairs(cluster, groups)
    else:
        rows = attention.key_dim
        if blocks is not None and (blocks < 1 or rows % blocks):
            raise MappingError(f"All-Scan in {blocks} blocks: expected a divisor of the {rows} rows of a state")
        counts = [k for k in range(1, rows + 1) if rows % k == 0] if blocks is None else [blocks]
        moving_s = np.min([all_scan_s(cluster, groups, state, k) for k in counts], axis=0)
        sent = held = (cp > 1) * state
        unit = _chain(cluster, groups)[1]
    link_bytes, link = busiest(cluster, unit)
    return ContextCost(
        kind, sent, state * link_bytes, link, beside + after, moving_s, np.maximum(moving_s - beside, 0.0), held,
        np.zeros_like(state), np.ones_like(state),
    )  # fmt: skip


def all_scan_s(cluster: Cluster, groups: Groups, nbytes: ArrayLike, blocks: int) -> Array:
    """Seconds until the last rank has `nbytes` of running state that come in `blocks` blocks."""
    size: Array = np.asarray(nbytes, dtype=float)
    waits_s, loads = _chain(cluster, groups)
    if not len(waits_s):
        return np.zeros_like(size)
    links = topology(cluster)
    src = members(cluster, groups)
    ways = links.ways(src[0, :-1], src[0, 1:])
    each = np.where(ways == NO_LINK, 0.0, (loads / links.bytes_per_s)[ways]).max(axis=1)
    hop_s = waits_s + size[..., None] / blocks * each
    total: Array = hop_s.sum(axis=-1) + (blocks - 1) * hop_s.max(axis=-1)
    return np.where(size > 0, total, 0.0)


def _chain(cluster: Cluster, groups: Groups) -> tuple[Array, Array]:
    """(latency of each hop of the first group, bytes on each edge when every rank but the last sends one on)."""
    links, ranks = topology(cluster), members(cluster, groups)
    far = links.node[ranks[0, :-1]] != links.node[ranks[0, 1:]]
    waits = np.where(far, step_s(cluster, True), step_s(cluster, False))
    return waits, links.loads(ranks[:, :-1].ravel(), ranks[:, 1:].ravel(), 1.0)
