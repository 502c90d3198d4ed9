"""How much one replica computes and moves: FLOPs and bytes of logged steps, summed over its ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Array, Operator
from hwmodels.shape import ModelShape
from hwmodels.step_model import Pieces, Tables, prefill_operators, stage_layers, tabulate_stages


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
    """FLOPs and bytes of a replica's steps. Prompt attention is counted per query-key pair, so windows count in full."""

    def __init__(
        self, model: ModelShape, mapping: Mapping, precision: Precision, *, max_tokens: int, max_seqs: int
    ) -> None:
        self._ranks = mapping.tp
        self._groups = mapping.attention_dp
        limits = {"max_tokens": max_tokens, "max_seqs": max_seqs}
        self._flops = tabulate_stages(model, mapping, precision, flops_of, **limits)
        self._bytes = tabulate_stages(model, mapping, precision, bytes_of, **limits)
        new, reach = np.array([1024.0, 1024.0]), np.array([0.0, 1024.0])
        self._flops_per_pair = 0.0
        for layers in stage_layers(model, mapping):
            for op in prefill_operators(layers, new, reach, mapping, precision):
                values = np.broadcast_to(flops_of(op), (2,))
                self._flops_per_pair += float(values[1] - values[0]) / 1024.0**2

    def of(self, steps: Steps) -> tuple[Array, Array]:
        """FLOPs and bytes of every segment, all ranks of the lane's attention group together."""
        flops = self._sum(self._flops, steps) + self._flops_per_pair * steps.prefill_pairs
        moved = self._sum(self._bytes, steps)
        return self._ranks * flops, self._ranks * moved

    def _sum(self, stages: list[Tables], steps: Steps) -> Array:
        tokens = (steps.decode_sequences + steps.prefill_tokens).astype(int)
        sampled = (steps.decode_sequences + steps.prefill_sequences).astype(int)
        total: Array = np.zeros(len(tokens))
        for tables in stages:
            linear, shared, head = (np.asarray(values) for values in (tables.linear, tables.shared, tables.head))
            once = linear[tokens] + head[np.minimum(sampled, len(head) - 1)]
            if self._groups > 1:
                once = once + shared[np.minimum(tokens * self._groups, len(shared) - 1)] / 1.0
            total += steps.repeat * (once + _decode(tables.decode, steps))
        return total


def _decode(pieces: Pieces, steps: Steps) -> Array:
    """The decode attention of a segment's middle step."""
    rows = steps.decode_sequences.astype(int)
    mean = steps.decode_context_tokens / np.maximum(rows, 1) + (steps.repeat - 1) / 2
    piece = np.searchsorted(np.asarray(pieces.knots), mean)
    base, slope = np.asarray(pieces.base), np.asarray(pieces.slope)
    value: Array = np.where(rows > 0, base[piece, rows] + slope[piece, rows] * mean, 0.0)
    return value
