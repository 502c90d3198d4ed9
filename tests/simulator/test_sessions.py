"""A turn goes on from what was said, a question from its context, and a missing turn is told."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.blockhashes import infinite_cache_hit_rate, shared_blocks
from simulator.errors import TraceError
from simulator.sessions import descended, draw_sessions, of_contexts, of_turns, read_sessions
from simulator.workload import Fixed, Poisson, Requests, Uniform

BLOCK = 16


def three_turns(prompts: list[int] | None = None) -> Requests:
    return Requests([0, 1, 2, 3], prompts or [40, 40, 90, 150], [20, 20, 30, 10])


def test_a_turn_shares_the_whole_blocks_of_what_was_said_before_it() -> None:
    """60 and 120 tokens were said: 3 and 7 whole blocks of 16."""
    turns = of_turns(three_turns(), ["a", "b", "a", "a"], [0, 0, 1, 2], BLOCK)
    assert turns.block_hashes is not None
    assert shared_blocks(turns.block_hashes).tolist() == [0, 0, 3, 7]
    turns.block_hashes.check_chained()


def test_questions_to_one_context_share_its_whole_blocks() -> None:
    asked = Requests(np.arange(4), [50, 60, 33, 70], [5] * 4)
    shared = of_contexts(asked, ["x", "x", "y", "x"], [40, 40, 33, 40], BLOCK).block_hashes
    assert shared is not None
    assert shared_blocks(shared).tolist() == [0, 2, 0, 2]


@pytest.mark.parametrize(
    ("session", "turn", "message"),
    [
        (["a", "b", "a", "a"], [0, 0, 2, 3], r"session 'a', turn 2 \(request 2\): expected turn 1; give every turn"),
        (["a", "b", "a", "a"], [0, 1, 1, 2], r"session 'b', turn 1 \(request 1\): expected turn 0"),
        (["a", "b", "a", "a"], [0, 0, 1, 1], r"turn 1 \(request 3\): expected turn 2"),
        (["a", "a", "a", "a"], [0, 1, 2, 3], r"prompt of 40 tokens; expected at least the 60 of the prompt and answer"),
        (["a"], [0], "1 sessions, 1 turns: expected one of each of 4 requests"),
    ],
)
def test_missing_turns_and_forgetful_prompts_are_refused(session, turn, message) -> None:
    with pytest.raises(TraceError, match=message):
        of_turns(three_turns(), session, turn, BLOCK)


def test_contexts_and_parents_that_cannot_be_are_refused() -> None:
    with pytest.raises(TraceError, match="context 'x' has 41 tokens in request 1: expected 40, as in request 0"):
        of_contexts(three_turns(), ["x"] * 4, [40, 41, 40, 40])
    with pytest.raises(TraceError, match="request 0: context of 41 tokens; expected at most its prompt, 40"):
        of_contexts(three_turns(), ["x"] * 4, [41] * 4)
    with pytest.raises(TraceError, match="request 1 goes on from 2: expected one before it"):
        descended([-1, 2, -1], [0, 1, 0], [5] * 3, [5] * 3, BLOCK)
    with pytest.raises(TraceError, match="request 1 shares 11 tokens with 0: expected at most the 10 of its context"):
        descended([-1, 0], [0, 11], [5, 20], [5, 5], BLOCK)


def test_drawn_sessions_have_the_lengths_and_the_sharing_they_were_asked_for() -> None:
    """Ten turns of 32 new tokens and 16 of answer, in whole blocks: turn k finds 3 k of its 3 k + 3 blocks."""
    drawn = draw_sessions(
        np.random.default_rng(1), 200, 2.0, Poisson(), Fixed(10), Fixed(32), Fixed(16), pause_s=20.0, block_tokens=BLOCK
    )
    assert len(drawn) == 2000 and drawn.arrival_s[0] == 0
    assert sorted(set(drawn.prompt_tokens.tolist())) == [32 + 48 * turn for turn in range(10)]
    assert drawn.block_hashes is not None
    expected = sum(3 * turn for turn in range(10)) / sum(3 * turn + 3 for turn in range(10))
    assert infinite_cache_hit_rate(drawn.block_hashes) == pytest.approx(expected, rel=1e-12)
    # 200 sessions begin at 2/s; each lasts nine pauses of 20 s.
    assert drawn.arrival_s.mean() == pytest.approx(50 + 90, rel=0.1)
    short = draw_sessions(np.random.default_rng(1), 500, 2.0, Poisson(), Uniform(1, 3), Fixed(8), Fixed(4), 5.0)
    assert len(short) == pytest.approx(1000, rel=0.1)


def test_a_file_of_turns_is_read_and_its_faults_are_told(tmp_path) -> None:
    path = tmp_path / "turns.csv"
    head = "arrival_s,prompt_tokens,output_tokens,session,turn,note\n"
    path.write_text(head + "0,40,20,a,0,x\n1,40,20,7,0,y\n2,90,30,a,1,z\n")
    hashes = read_sessions(path, BLOCK).block_hashes
    assert hashes is not None
    assert shared_blocks(hashes).tolist() == [0, 0, 3]
    for text, message in (
        (head + "0,40,20,a,0,x\n2,90,30,a,2,z\n", "turns.csv: session 'a', turn 2"),
        (head + "0,40,20,a,zero,x\n", "turns.csv: .*zero.*; expected CSV with the columns"),
        ("arrival_s,prompt_tokens\n0,1\n", "turns.csv: .*output_tokens.*; expected CSV"),
        (head + "0,,20,a,0,x\n", "turns.csv: prompt_tokens: expected a value in every row"),
        (head + "1,40,20,a,0,x\n0,40,20,b,0,x\n", r"turns.csv: arrival_s\[1\] = 0: expected no earlier"),
    ):
        path.write_text(text)
        with pytest.raises(TraceError, match=message):
            read_sessions(path)
    with pytest.raises(TraceError, match="nowhere: cannot be read"):
        read_sessions(tmp_path / "nowhere")
