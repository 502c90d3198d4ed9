"""Where are the keys and values of each sequence? Blocks of a paged cache, handed out as the scheduler counts them."""

from __future__ import annotations

from collections.abc import Sequence

from planner.errors import PlanError


class BlockTables:
    """Which blocks every sequence holds; the tensors themselves belong to the layers.

    blocks, block_tokens   blocks there are, and tokens of each
    """

    __slots__ = ("_free", "_tables", "block_tokens", "blocks")

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._free = list(range(blocks - 1, -1, -1))
        self._tables: dict[int, list[int]] = {}

    @property
    def used(self) -> int:
        """Blocks held by sequences."""
        return self.blocks - len(self._free)

    def grow(self, sequence: int, tokens: int) -> Sequence[int]:
        """Let a sequence hold at least `tokens` tokens; its blocks.

        Raises PlanError when none is left, which the scheduler rules out.
        """
        table = self._tables.setdefault(sequence, [])
        missing = -(-tokens // self.block_tokens) - len(table)
        if missing > len(self._free):
            raise PlanError(
                f"sequence {sequence} needs {missing} more KV blocks for {tokens} tokens and {len(self._free)} of "
                f"{self.blocks} are free: expected a scheduler that counts them"
            )
        for _ in range(missing):
            table.append(self._free.pop())
        return table

    def drop(self, sequence: int) -> None:
        """Take a sequence's blocks back."""
        self._free.extend(reversed(self._tables.pop(sequence, [])))
