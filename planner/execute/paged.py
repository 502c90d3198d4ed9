"""What does every row of a step see? Its sequence's keys and values, read out of the blocks of a paged cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.execute.batch import Batch, Ints, Span
from planner.profiling.machine import open_torch

if TYPE_CHECKING:
    from planner.execute.transformer import Transformer

torch: Any = open_torch()
Tensor = Any


@dataclass(slots=True)
class Reach:
    """What the tokens of one span see: its blocks from the first that its first token's window reaches.

    oldest, first   token number of the oldest seen, and of the beginning of these blocks
    """

    span: Span
    oldest: int
    first: int
    blocks: Ints
    table: Tensor = None

    def cached(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (tokens, KV heads, width) from the oldest seen to the span's end."""
        key, value = cache.index_select(1, self.table).flatten(1, 2)[:, self.oldest - self.first :].unbind()
        seen = self.span.end - self.oldest
        return key[:seen], value[:seen]


def reach(span: Span, window: int | None, block_tokens: int) -> Reach:
    """What a span sees of its sequence."""
    oldest = 0 if window is None else max(0, span.before - window + 1)
    begin, end = oldest // block_tokens, -(-span.end // block_tokens)
    return Reach(span, oldest, begin * block_tokens, np.array(span.table[begin:end], dtype=np.int64))


class Inputs:
    """One step's rows as tensors of a device, and attention over what they see.

    tokens, positions, slots   by row: its id, its place in its sequence, and where its keys and values go
    sampled                    rows behind which a token is sampled
    cos, sin                   (rows, 1, width/2): the angles of its place
    decodes, chunks            decoding sequences, and prompt chunks that follow them
    """

    def __init__(self, batch: Batch, owner: Transformer) -> None:
        self.decodes, self.padded = len(batch.decodes), owner.padded
        self.chunks = len(batch.chunks)
        self._masks: dict[tuple[int, int | None], Tensor] = {}

        def reaches(spans: list[Span]) -> dict[int | None, list[Reach]]:
            return {window: [reach(span, window, batch.block_tokens) for span in spans] for window in owner.windows}

        self._chunks, self._decodes = reaches(batch.chunks), reaches(batch.decodes)
        single = [found for spans in self._chunks.values() for found in spans]
        wide: list[Ints] = []
        if self.padded and self.decodes:
            ends = np.array([span.end for span in batch.decodes], dtype=np.int64)
            for spans in self._decodes.values():
                wide += [ends, np.array([found.oldest for found in spans]), np.array([found.first for found in spans])]
                tables = np.zeros((self.decodes, max(len(found.blocks) for found in spans)), dtype=np.int64)
                for row, found in enumerate(spans):
                    tables[row, : len(found.blocks)] = found.blocks
                wide.append(tables.ravel())
        else:
            single += [found for spans in self._decodes.values() for found in spans]
        # One transfer brings everything to the device.
        parts = [
            batch.tokens, batch.positions, batch.slots, batch.sampled, *wide, *(found.blocks for found in single)
        ]  # fmt: skip
        made = torch.from_numpy(np.concatenate(parts)).to(owner.device, non_blocking=True)
        tensors = list(made.split([len(part) for part in parts]))
        self.tokens, self.positions, self.slots, self.sampled = tensors[:4]
        for found, table in zip(single, tensors[4 + len(wide) :], strict=True):
            found.table = table
        #: By window: ends, oldest, first and tables of all decoding sequences.
        self._wide = {window: tensors[4 + 4 * i : 8 + 4 * i] for i, window in enumerate(owner.windows) if wide}
        self.cos, self.sin = owner.cos[self.positions, None], owner.sin[self.positions, None]

    def looped_decode(self, query: Tensor, cache: Tensor, window: int | None, result: Tensor) -> None:
        """Sequence by sequence: each reads its own blocks and no more."""
        for row, found in enumerate(self._decodes[window]):
            key, value = found.cached(cache)
            # The heads that share keys stand where query tokens would: all of them see the whole context.
            grouped = query[row].view(1, key.shape[1], -1, query.shape[-1])
            result[row] = _attend(grouped, key.transpose(0, 1)[None], value.transpose(0, 1)[None]).reshape(-1)

    def padded_decode(self, query: Tensor, cache: Tensor, window: int | None, result: Tensor) -> None:
        """All sequences in one launch, as long as the longest of them."""
        tables = self._wide[window][3]
        key, value = cache.index_select(1, tables).unflatten(1, (self.decodes, -1)).flatten(2, 3)
        grouped = query.reshape(self.decodes, key.shape[2], -1, query.shape[-1])
        mask = self._padding(key.shape[1], window)
        result.copy_(_attend(grouped, key.transpose(1, 2), value.transpose(1, 2), mask).reshape(self.decodes, -1))

    def _padding(self, length: int, window: int | None) -> Tensor:
        wanted = -1, window
        if wanted not in self._masks:
            ends, oldest, first, _ = self._wide[window]
            at = first[:, None] + torch.arange(length, device=ends.device)
            self._masks[wanted] = ((at >= oldest[:, None]) & (at < ends[:, None]))[:, None, None]
        return self._masks[wanted]

    def prefill(self, query: Tensor, cache: Tensor, window: int | None, result: Tensor) -> None:
        """Prompt chunk by prompt chunk, causally behind what is cached of each."""
        row = self.decodes
        for number, found in enumerate(self._chunks[window]):
            key, value = found.cached(cache)
            rows = slice(row, row + len(found.span.tokens))
            # KV heads stand where sequences would, and are shared by the query heads of their group without a copy.
            grouped = query[rows].transpose(0, 1).unflatten(0, (key.shape[1], -1))
            key, value = (
                kept.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1) for kept in (key, value)
            )  # fmt: skip
            mask = self._causal(number, window)
            attended = _attend(grouped, key, value, mask, causal=mask is None)
            result[rows] = attended.flatten(0, 1).transpose(0, 1).flatten(1)
            row = rows.stop

    def _causal(self, number: int, window: int | None) -> Tensor:
        found = self._chunks[window][number]
        new, before = len(found.span.tokens), found.span.before - found.oldest
        if before == 0 and (window is None or new <= window):
            return None  # plainly causal
        wanted = number, window
        if wanted not in self._masks:
            seen = torch.ones(new, before + new, dtype=torch.bool, device=self.tokens.device).tril(before)
            self._masks[wanted] = seen if window is None else seen.triu(before - window + 1)
        return self._masks[wanted]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor = None, causal: bool = False) -> Tensor:
    """torch's attention of (sequences, heads, tokens, width)."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
