"""How much one replica computes and moves: FLOPs and bytes of logged steps, summed over its ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Array, Operator
from hwmodels.shape import ModelShape
from hwmodels.step_model import Pieces, Tables, tabulate_stages


def flops_of(op: Operator) -> Array:
    """FLOPs of all launches of an operator."""
    return op.count * op.flops


def bytes_of(op: Operator) -> Array:
    """Device-memory bytes of all launches of an operator; what a collective sends is not counted."""
    return op.count * op.bytes if hasattr(op, "precision") or hasattr(op, "kernels") else 0.0 * op.bytes


@dataclass(frozen=True, slots=True)
class Steps:
    """Columns of logged steps, one value per segment; see simulator.result.

    repeat, decode_sequences, decode_context_tokens, prefill_tokens, prefill_pairs, prefill_sequences
    """

    repeat: Array
    decode_sequences: Array
    decode_context_tokens: Array
    prefill_tokens: Array
    prefill_pairs: Array
    prefill_sequences: Array


class Work:
    """FLOPs and bytes of a replica's steps.

    Prompt chunks of one step count as equal ones with the same query-key pairs in all, which is exact for one chunk and
    for FLOPs without windows. FLOPs take experts as evenly loaded, which their sum over ranks does not depend on;
    bytes take every rank as the busiest.
    """

    def __init__(
        self, model: ModelShape, mapping: Mapping, precision: Precision, *, max_tokens: int, max_seqs: int
    ) -> None:
        self._ranks = mapping.tp * mapping.cp
        self._groups = mapping.attention_dp
        even = replace(mapping, ep=1, expert_tp=mapping.ep * mapping.expert_tp, redundant_experts=0)
        self._flops = tabulate_stages(
            model, even, precision, flops_of, max_tokens=max_tokens, max_seqs=max_seqs, even=True
        )
        self._bytes = tabulate_stages(model, mapping, precision, bytes_of, max_tokens=max_tokens, max_seqs=max_seqs)

    def of(self, steps: Steps) -> tuple[Array, Array]:
        """FLOPs and bytes of every segment, all ranks of the lane's attention group together."""
        return self._ranks * self._sum(self._flops, steps), self._ranks * self._sum(self._bytes, steps)

    def _sum(self, stages: list[Tables], steps: Steps) -> Array:
        tokens = (steps.decode_sequences + steps.prefill_tokens).astype(int)
        sampled = (steps.decode_sequences + steps.prefill_sequences).astype(int)
        total: Array = np.zeros(len(tokens))
        for tables in stages:
            linear, shared, head = (np.asarray(values) for values in (tables.linear, tables.shared, tables.head))
            once = linear[tokens] + head[np.minimum(sampled, len(head) - 1)]
            if self._groups > 1:
                once = once + shared[np.minimum(tokens * self._groups, len(shared) - 1)]
            total += steps.repeat * (once + _decode(tables.decode, steps) + _prefill(tables.prefill, steps))
        return total


def _decode(pieces: Pieces, steps: Steps) -> Array:
    """The decode attention of a segment's middle step."""
    rows = steps.decode_sequences.astype(int)
    return _at(pieces, rows, steps.decode_context_tokens / np.maximum(rows, 1) + (steps.repeat - 1) / 2)


def _prefill(pieces: Pieces, steps: Steps) -> Array:
    """The attention inside a segment's prompt chunks: pairs = chunks * (new * before + new * (new + 1) / 2)."""
    chunks = np.maximum(steps.prefill_sequences, 1)
    new = np.rint(steps.prefill_tokens / chunks).astype(int)
    before = steps.prefill_pairs / chunks / np.maximum(new, 1) - (new + 1) / 2
    attention: Array = chunks * _at(pieces, new, np.maximum(before, 0))
    return attention


def _at(pieces: Pieces, rows: NDArray[np.int64], x: Array) -> Array:
    """Pieces.at for many points at once; 0 in row 0."""
    piece = np.searchsorted(np.asarray(pieces.knots), x)
    base = np.stack([np.asarray(values) for values in pieces.base])
    slope = np.stack([np.asarray(values) for values in pieces.slope])
    value: Array = np.where(rows > 0, base[piece, rows] + slope[piece, rows] * x, 0.0)
    return value
