"""How long is a step cut into two halves, whose collectives run beside each other's arithmetic?

The tokens of a step are cut in two; while the results of one half are summed over the ranks, the other half computes
(TokenWeave, arXiv:2505.11329; two micro-batches around the expert exchange, DeepSeek-V3, arXiv:2412.19437, section
3.4). Nothing is assumed of how much that hides: every kernel of either half is priced at its own size, and two streams
carry them out in turn. Splitting costs what it costs: tiles that are not full, weights and experts read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from hwmodels import operators as ops
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Array, Operator
from hwmodels.shape import Layer, ModelShape

#: How a step's collectives are overlapped: not at all; norms computed inside the all-reduce; that and two halves.
Overlap = Literal["none", "fused-norm", "two-way"]
#: Compute units that a collective holds while it runs (TokenWeave measures 108, 76 and 75 us for the all-reduce of
#: 1,024 tokens of width 8,192 on eight H100 with 2, 4 and 8 of their 132).
UNITS = 4
#: The front half ends at a multiple of one of these, rows of output tiles, so that few waves of tiles are added.
ROWS = (1, 64, 128, 256)
#: Norms between an all-reduce and the next product, which a fused kernel computes on each rank's part of the tokens
#: between reduce-scatter and all-gather: 75.4 us instead of 75 at 1,024 tokens, 502 instead of 501 at 8,192.
FUSED = frozenset({"attention norm", "feed-forward norm"})


@dataclass(frozen=True, slots=True)
class Block:
    """Kernels that follow each other, and the collective behind them, in seconds; arrays over sizes of the step."""

    compute_s: Array
    exchange_s: Array


def two_streams_s(front: Sequence[Block], back: Sequence[Block]) -> Array:
    """Seconds until both halves have passed all blocks, one stream for kernels and one for collectives.

    The kernel stream takes the halves in turn, block by block; a half goes on when its last collective has ended, and
    collectives run one at a time in the order they are reached.

    >>> one = Block(np.array(2.0), np.array(1.0))
    >>> float(two_streams_s([one, one], [one, one]))  # 8 of arithmetic; only the last collective shows
    9.0
    >>> float(two_streams_s([one], [Block(np.array(0.0), np.array(0.0))]))
    3.0
    """
    shape = np.broadcast(front[0].compute_s, back[0].compute_s).shape
    kernels, wires = np.zeros(shape), np.zeros(shape)
    ready = [np.zeros(shape), np.zeros(shape)]
    for pair in zip(front, back, strict=True):
        for half, block in enumerate(pair):
            kernels = np.maximum(kernels, ready[half]) + block.compute_s
            sent = block.exchange_s > 0
            wires = np.where(sent, np.maximum(wires, kernels) + block.exchange_s, wires)
            ready[half] = np.where(sent, wires, kernels)
    done: Array = np.maximum(kernels, np.maximum(*ready))
    return done


def blocks_of(
    found: Sequence[Operator], measure: Callable[[Operator], Array], shape: tuple[int, ...], slower: float
) -> list[Block]:
    """Operators of one layer as blocks; arithmetic takes `slower` times as long beside a collective."""
    blocks: list[Block] = []
    compute = np.zeros(shape)
    for op in found:
        seconds = np.broadcast_to(measure(op), shape)
        if isinstance(op, (ops.Communication, ops.ExpertExchange)):
            blocks.append(Block(compute * slower, seconds))
            compute = np.zeros(shape)
        else:
            compute = compute + seconds
    return [*blocks, Block(compute * slower, np.zeros(shape))]


def halves_of(tokens: Array) -> list[tuple[Array, Array]]:
    """Ways to cut steps of so many tokens in two, of nearly equal size; the front half at tile rows."""
    ways = []
    for rows in ROWS:
        for rounding in (np.floor, np.ceil):
            front = np.clip(rounding(tokens / 2 / rows) * rows, 0, tokens)
            ways.append((front, tokens - front))
    return ways


def overlapped_s(
    model: ModelShape,
    layers: Sequence[Layer],
    tokens: Array,
    mapping: Mapping,
    precision: Precision,
    measure: Callable[[Operator], Array],
    *,
    units: int,
    overlap: Overlap,
    forced: bool = False,
) -> Array:
    """Seconds of all that depends on the step's tokens alone in the layers, their collectives overlapped.

    tokens    of steps, [N]; of each attention group, all holding as many
    units     compute units of the device
    forced    cut every step in two; otherwise those that gain from it

    Attention over the cache runs beside no collective here, so that what is hidden is not overestimated. The embedding
    is not included.
    """

    def fused(op: Operator) -> Array:
        return np.zeros_like(op.bytes) if op.name in FUSED and mapping.tp > 1 else measure(op)

    def of(layer: Layer, count: Array) -> list[Operator]:
        own = count if mapping.cp == 1 else np.ceil(count / mapping.cp)
        found = ops.attention_linear(model, layer.attention, own, mapping, precision, 1)
        ff = layer.feed_forward
        if ff.experts:
            everyone = count * mapping.attention_dp
            return found + ops.expert_feed_forward(model, ff, own, everyone, mapping, precision, 1)
        return found + ops.dense_feed_forward(model, ff, own, mapping.tp, precision, 1)

    price = measure if overlap == "none" else fused
    shape = tokens.shape
    kinds = dict.fromkeys(layers)
    alone = {layer: sum((price(op) for op in of(layer, tokens)), np.zeros(shape)) for layer in kinds}
    whole: Array = sum((alone[layer] for layer in layers), np.zeros(shape))
    if overlap != "two-way" or not layers:
        return whole
    slower = units / max(1, units - UNITS)
    best = np.full(shape, np.inf)
    for parts in halves_of(tokens):
        cut = {layer: [blocks_of(of(layer, part), price, shape, slower) for part in parts] for layer in kinds}
        front: list[Block] = []
        back: list[Block] = []
        for layer, run in groupby(layers):
            times = len(list(run))
            front += cut[layer][0] * times
            back += cut[layer][1] * times
        best = np.minimum(best, two_streams_s(front, back))
    return best if forced else np.minimum(best, whole)
