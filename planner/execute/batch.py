"""What does one step compute? The rows of all its sequences, and where their keys and values are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(slots=True)
class Span:
    """Tokens of one sequence that run in the step.

    tokens   their ids, in order
    before   tokens of the sequence that are cached already
    table    its blocks, enough for all of these
    """

    tokens: Sequence[int]
    before: int
    table: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens that are cached after the step."""
        return self.before + len(self.tokens)


@dataclass(slots=True)
class Batch:
    """One step: a token of every decoding sequence, then the prompt chunks.

    Rows are numbered in this order; the last row of every span is sampled.
    """

    decodes: list[Span]
    chunks: list[Span]
    block_tokens: int
    tokens: Ints = field(init=False)
    positions: Ints = field(init=False)
    slots: Ints = field(init=False)
    sampled: Ints = field(init=False)

    def __post_init__(self) -> None:
        """Number the rows."""
        spans = [*self.decodes, *self.chunks]
        self.tokens = np.array([token for span in spans for token in span.tokens], dtype=np.int64)
        self.sampled = np.array(list(accumulate(len(span.tokens) for span in spans)), dtype=np.int64) - 1
        block = self.block_tokens
        at = np.array([span.before for span in self.decodes], dtype=np.int64)
        places = [at]
        rows = [
            np.array([span.table[span.before // block] for span in self.decodes], dtype=np.int64) * block + at % block
        ]
        for span in self.chunks:
            at = np.arange(span.before, span.end, dtype=np.int64)
            places.append(at)
            rows.append(np.asarray(span.table, dtype=np.int64)[at // block] * block + at % block)
        self.positions = np.concatenate(places)
        self.slots = np.concatenate(rows)

    @property
    def context(self) -> int:
        """Tokens that the decoding sequences attend to, their new ones included."""
        return sum(span.end for span in self.decodes)

    @property
    def items(self) -> list[tuple[int, int]]:
        """(new tokens, tokens cached before) of every chunk, as the step model takes them."""
        return [(len(span.tokens), span.before) for span in self.chunks]
