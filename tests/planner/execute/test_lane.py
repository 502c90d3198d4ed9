"""Whether every request's tokens go where they belong, whatever the schedule: a model that reads them back knows.

The model is a checksum over all tokens of a sequence, read token by token out of a paged cache as attention reads keys.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.execute.batch import Batch
from planner.execute.kvcache import BlockTables
from planner.execute.lane import Lane
from simulator.policies import Policy
from simulator.scheduler import SchedulerConfig

BLOCK_TOKENS, VOCAB = 4, 9973
POLICIES: tuple[Policy, ...] = ("chunked", "prefill-first", "orca", "static")


def following(tokens: list[int]) -> int:
    """The token after these; depends on each and on its place."""
    return sum((place + 3) ** 2 * token for place, token in enumerate(tokens)) % VOCAB


def prompt(request: int, length: int) -> list[int]:
    """Ids that no two requests share."""
    return [(request * 1009 + 31 * place + 1) % VOCAB for place in range(length)]


def expected(request: int, length: int, outputs: int) -> list[int]:
    """The answer of the request if it is alone."""
    tokens = prompt(request, length)
    for _ in range(outputs):
        tokens.append(following(tokens))
    return tokens[length:]


class Checksum:
    """Samples a step: writes every row to its slot, reads every span's sequence back from its table."""

    def __init__(self, slots: int) -> None:
        self.cache = np.full((slots, 2), -1)

    def __call__(self, batch: Batch) -> list[int]:
        assert len(set(batch.slots.tolist())) == len(batch.slots)
        self.cache[batch.slots, 0], self.cache[batch.slots, 1] = batch.tokens, batch.positions
        sampled, row = [], -1
        for number, span in enumerate((*batch.decodes, *batch.chunks)):
            row += len(span.tokens)
            assert batch.sampled[number] == row
            slots = [span.table[at // batch.block_tokens] * batch.block_tokens + at % batch.block_tokens
                     for at in range(span.end)]  # fmt: skip
            tokens, places = self.cache[slots].T.tolist()
            assert places == list(range(span.end))
            sampled.append(following(tokens))
        assert row + 1 == len(batch.tokens)
        return sampled


def serve(config: SchedulerConfig, kv_blocks: int, lengths: list[tuple[int, int]]) -> int:
    """Serve requests of (prompt, output) tokens, offered one a step, and check every law; the preemptions."""
    prompts, outputs = [list(column) for column in zip(*lengths, strict=True)]
    tables = BlockTables(kv_blocks, BLOCK_TOKENS)
    lane = Lane(config, kv_blocks, prompts, outputs, lambda r: prompt(r, prompts[r]), tables)
    sample, scheduler = Checksum(kv_blocks * BLOCK_TOKENS), lane.scheduler
    served, finished, preemptions, offered = set(), [], 0, 0
    static = config.policy == "static"
    while True:
        if offered < len(lengths):
            served |= {offered} if lane.offer(offered) else set()
            offered += 1
        batch = lane.form()
        preemptions += len(scheduler.preempted)
        if batch is None:
            if offered < len(lengths):
                continue
            break
        held = scheduler.blocks_held(1 if scheduler.decode_runs else 0)
        assert tables.used <= held if static else tables.used == held
        assert batch.items == scheduler.items
        assert len(batch.decodes) == (scheduler.running if scheduler.decode_runs else 0)
        if batch.decodes:
            assert batch.context <= scheduler.context if static else batch.context == scheduler.context
        assert len(batch.tokens) <= max(config.token_budget, len(batch.decodes))
        spans = [block for span in (*batch.decodes, *batch.chunks) for block in span.table]
        assert len(set(spans)) == len(spans)
        finished += lane.advance(sample(batch))
    assert sorted(finished) == sorted(served) == sorted(lane.answers)
    for request in served:
        assert lane.answers[request] == expected(request, *lengths[request])
    assert tables.used == 0 and not scheduler.has_work
    return preemptions


@settings(max_examples=150, deadline=None)
@given(
    policy=st.sampled_from(POLICIES),
    max_seqs=st.integers(1, 6),
    budget=st.integers(6, 40),
    kv_blocks=st.integers(5, 24),
    lengths=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 16)), min_size=1, max_size=9),
)
def test_answers_do_not_depend_on_the_schedule(
    policy: Policy, max_seqs: int, budget: int, kv_blocks: int, lengths: list[tuple[int, int]]
) -> None:
    config = SchedulerConfig(policy, max_seqs, budget, BLOCK_TOKENS, kv_blocks * BLOCK_TOKENS // 2)
    serve(config, kv_blocks, lengths)


@pytest.mark.parametrize("policy", ["chunked", "prefill-first", "orca"])
def test_preempted_sequences_are_recomputed(policy: Policy) -> None:
    assert serve(SchedulerConfig(policy, 6, 30, BLOCK_TOKENS), 12, [(9 + r, 12) for r in range(6)]) >= 2


def test_a_prompt_in_progress_is_preempted() -> None:
    # One sequence decodes while a prompt of 5 blocks comes in 3 tokens at a time: 8 blocks do not last for both.
    assert serve(SchedulerConfig("chunked", 4, 4, BLOCK_TOKENS), 8, [(8, 20), (20, 2)]) >= 1


def test_padding_of_a_static_batch_grows_as_the_scheduler_counts_it() -> None:
    lane = Lane(SchedulerConfig("static", 2, 16, 4, 16), 8, [3, 3], [2, 9], lambda r: prompt(r, 3), BlockTables(8, 4))
    assert lane.offer(0) and lane.offer(1)
    contexts = []
    while (batch := lane.form()) is not None:
        if batch.decodes:
            assert batch.context == lane.scheduler.context
            contexts.append(batch.context)
        lane.advance([7] * len(batch.sampled))
    assert contexts == [8, 10, 12, 14, 16, 18, 20, 22]
    assert [len(lane.answers[request]) for request in (0, 1)] == [2, 9]


def test_a_request_that_never_fits_is_refused() -> None:
    lane = Lane(SchedulerConfig("chunked", 2, 16, 4, 16), 8, [12], [9], lambda r: prompt(r, 12), BlockTables(8, 4))
    assert not lane.offer(0)
    assert lane.form() is None
