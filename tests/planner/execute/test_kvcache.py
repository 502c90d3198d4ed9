"""Laws of the block tables: a block is held once or free, never both, and none is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.execute.kvcache import BlockTables

#: (sequence, tokens to grow to), or 0 to drop it.
MOVES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=60)


@given(st.integers(1, 24), st.integers(1, 7), MOVES)
def test_blocks_are_handed_out_once_and_conserved(blocks: int, block_tokens: int, moves: list[tuple[int, int]]) -> None:
    tables = BlockTables(blocks, block_tokens)
    held: dict[int, list[int]] = {}
    for sequence, tokens in moves:
        needed = -(-tokens // block_tokens)
        before = held.get(sequence, [])
        others = sum(len(found) for other, found in held.items() if other != sequence)
        if not tokens:
            tables.drop(sequence)
            held.pop(sequence, None)
        elif others + max(needed, len(before)) > blocks:
            with pytest.raises(PlanError, match=f"sequence {sequence} needs .* of {blocks} are free"):
                tables.grow(sequence, tokens)
        else:
            held[sequence] = list(tables.grow(sequence, tokens))
            assert held[sequence][: len(before)] == before  # what is cached stays where it is
            assert len(held[sequence]) == max(needed, len(before))
        everything = [block for found in held.values() for block in found]
        assert len(set(everything)) == len(everything) == tables.used
        assert set(everything) <= set(range(blocks))
    for sequence in held:
        tables.drop(sequence)
    assert tables.used == 0
    assert sorted(tables.grow(99, blocks * block_tokens)) == list(range(blocks))
