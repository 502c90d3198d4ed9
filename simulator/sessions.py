"""Which requests go on from others? Multi-turn sessions and shared contexts, as requests with block ids.

The two ways in which SCBench (arXiv:2412.10319, section 2) reuses KV: in *multi-turn* mode a turn's prompt is all
that was said before it and something new; in *multi-request* mode several sessions put their questions to one context.
Both are one relation: the first `shared` tokens of a request are those of its parent's prompt and answer.
"""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import ArrayLike, NDArray

from simulator.blockhashes import BlockHashes
from simulator.errors import TraceError
from simulator.workload import Arrivals, OneLength, Requests

Ints = NDArray[np.int64]


def descended(
    parents: ArrayLike,
    shared_tokens: ArrayLike,
    prompt_tokens: ArrayLike,
    output_tokens: ArrayLike,
    block_tokens: int,
) -> BlockHashes:
    """Block ids of requests whose beginnings are those of earlier ones; the ids cover the answers too.

    parents         for each request the position of the one whose context it goes on from, -1 for none
    shared_tokens   leading tokens of the prompt that are those of the parent's prompt and answer

    Raises TraceError where a parent does not come first or has fewer tokens than are shared.

    >>> turns = descended([-1, 0], [0, 10], [6, 12], [4, 4], block_tokens=4)
    >>> turns.row(0), turns.row(1)
    ([0, 1, 2], [0, 1, 3, 4])
    """
    parent, shared, prompt, output = (
        np.asarray(values, np.int64) for values in (parents, shared_tokens, prompt_tokens, output_tokens)
    )
    context = prompt + output
    counts = -(-context // block_tokens)
    offsets = np.concatenate(([0], np.cumsum(counts)))
    ids = np.empty(offsets[-1], np.int64)
    fresh = 0
    for index in range(len(parent)):
        origin, common = int(parent[index]), 0
        if origin >= 0:
            if origin >= index:
                raise TraceError(f"request {index} goes on from {origin}: expected one before it")
            if not 0 <= shared[index] <= min(context[origin], prompt[index]):
                raise TraceError(
                    f"request {index} shares {shared[index]} tokens with {origin}: expected at most "
                    f"the {context[origin]} of its context and the {prompt[index]} of the prompt"
                )
            common = int(shared[index]) // block_tokens
            begin = offsets[origin]
            ids[offsets[index] : offsets[index] + common] = ids[begin : begin + common]
        new = int(counts[index]) - common
        ids[offsets[index] + common : offsets[index + 1]] = np.arange(fresh, fresh + new)
        fresh += new
    return BlockHashes(ids, offsets, block_tokens)


class TurnError(TraceError):
    """A turn that cannot follow what was said: `request` is its position, `problem` what is wrong with it."""

    def __init__(self, label: object, turn: int, request: int, problem: str) -> None:
        super().__init__(f"session {label!r}, turn {turn} (request {request}): {problem}")
        self.request, self.problem = request, problem


def chained(
    session: ArrayLike, turn: ArrayLike, prompt_tokens: ArrayLike, output_tokens: ArrayLike, block_tokens: int
) -> BlockHashes:
    """Block ids of turns in order of arrival: each one's prompt begins with all that was said before it.

    session   label of each request's session
    turn      0, 1, 2, ... within it

    Raises TurnError for a turn that is missing, comes twice or out of order, and for a prompt shorter than what was
    said before it.

    >>> turns = chained(["a", "b", "a"], [0, 0, 1], [8, 8, 12], [4, 4, 4], block_tokens=4)
    >>> turns.row(0), turns.row(1), turns.row(2)
    ([0, 1, 2], [3, 4, 5], [0, 1, 2, 6])
    """
    sessions, turns = np.asarray(session), np.asarray(turn)
    prompt, output = np.asarray(prompt_tokens, np.int64), np.asarray(output_tokens, np.int64)
    last: dict[object, int] = {}  # position of each session's latest turn
    parents = np.full(len(prompt), -1, np.int64)
    context = prompt + output
    for index, (label, number) in enumerate(zip(sessions.tolist(), turns.tolist(), strict=True)):
        before = last.get(label, -1)
        expected = turns[before] + 1 if before >= 0 else 0
        if number != expected:
            problem = f"expected turn {expected}; give every turn of a session, from 0 on and in order of arrival"
            raise TurnError(label, number, index, problem)
        if before >= 0 and prompt[index] < context[before]:
            problem = (
                f"prompt of {prompt[index]} tokens; expected at least the {context[before]} of the prompt and answer "
                "before it"
            )
            raise TurnError(label, number, index, problem)
        parents[index] = before
        last[label] = index
    shared = np.where(parents >= 0, context[parents], 0)
    return descended(parents, shared, prompt, output, block_tokens)


def of_turns(requests: Requests, session: ArrayLike, turn: ArrayLike, block_tokens: int = 16) -> Requests:
    """The requests as turns of sessions: a turn's prompt begins with the prompt and the answer of the turn before.

    session   label of each request's session
    turn      0, 1, 2, ... within it, in order of arrival

    Raises TraceError for a turn that is missing, comes twice or out of order, and for a prompt shorter than what was
    said before it.
    """
    sessions, turns = np.asarray(session), np.asarray(turn)
    if len(sessions) != len(requests) or len(turns) != len(requests):
        raise TraceError(
            f"{len(sessions)} sessions, {len(turns)} turns: expected one of each of {len(requests)} requests"
        )
    hashes = chained(sessions, turns, requests.prompt_tokens, requests.output_tokens, block_tokens)
    return replace(requests, block_hashes=hashes)


def of_contexts(requests: Requests, context: ArrayLike, context_tokens: ArrayLike, block_tokens: int = 16) -> Requests:
    """The requests as questions to shared contexts: prompts of one context begin with the same tokens.

    context          label of the context of each request
    context_tokens   its tokens, the same for all requests of one context and at most their prompts

    Raises TraceError where the requests of one context disagree about its tokens.
    """
    labels, sizes = np.asarray(context), np.asarray(context_tokens)
    if len(labels) != len(requests) or len(sizes) != len(requests):
        raise TraceError(
            f"{len(labels)} contexts, {len(sizes)} sizes: expected one of each of {len(requests)} requests"
        )
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    origin = first[inverse]
    if np.any(sizes != sizes[origin]):
        index = int(np.argmax(sizes != sizes[origin]))
        raise TraceError(
            f"context {labels.tolist()[index]!r} has {sizes[index]} tokens in request {index}: expected "
            f"{sizes[origin[index]]}, as in request {origin[index]}"
        )
    over = sizes > requests.prompt_tokens
    if over.any():
        index = int(np.argmax(over))
        raise TraceError(
            f"request {index}: context of {sizes[index]} tokens; expected at most its prompt, "
            f"{requests.prompt_tokens[index]}"
        )
    parents = np.where(origin == np.arange(len(labels)), -1, origin)
    return replace(
        requests, block_hashes=descended(parents, sizes, requests.prompt_tokens, requests.output_tokens, block_tokens)
    )


def draw_sessions(
    rng: np.random.Generator,
    sessions: int,
    rate_per_s: float,
    arrivals: Arrivals,
    turns: OneLength,
    said_tokens: OneLength,
    output_tokens: OneLength,
    pause_s: float,
    block_tokens: int = 16,
) -> Requests:
    """The requests of multi-turn sessions, from streams spawned from `rng`.

    sessions, rate_per_s, arrivals   how many begin, how often and how evenly
    turns                            of one session, drawn like a length
    said_tokens                      what the user adds in each turn; its prompt is that and all that came before
    pause_s                          mean time from one turn's arrival to the next one's, exponential: an open loop, so
                                     a turn may come before the answer to the last one is complete
    """
    starts, numbers, said, answers, pauses = rng.spawn(5)
    begin_s = np.cumsum(arrivals.gaps(starts, sessions)) / rate_per_s
    counts = turns.draw(numbers, sessions)
    session = np.repeat(np.arange(sessions), counts)
    first = np.repeat(np.concatenate(([0], np.cumsum(counts)[:-1])), counts)
    turn = np.arange(len(session)) - first
    new_tokens, output_of = said_tokens.draw(said, len(session)), output_tokens.draw(answers, len(session))
    waits_s = np.where(turn > 0, pauses.standard_exponential(len(session)) * pause_s, 0.0)

    waited_s = np.cumsum(waits_s)
    tokens = np.cumsum(new_tokens + output_of)
    arrival_s = begin_s[session] + waited_s - waited_s[first]
    prompt = tokens - output_of - (tokens - new_tokens - output_of)[first]
    order = np.lexsort((turn, arrival_s))
    requests = Requests(arrival_s[order] - arrival_s.min(), prompt[order], output_of[order])
    return of_turns(requests, session[order], turn[order], block_tokens)


def read_sessions(path: str | PathLike[str], block_tokens: int = 16) -> Requests:
    """Turns of sessions from a CSV file: arrival_s,prompt_tokens,output_tokens,session,turn in order of arrival.

    Raises TraceError naming the file and what is wrong.
    """
    names = ("arrival_s", "prompt_tokens", "output_tokens", "session", "turn")
    types = dict(zip(names, (pa.float64(), pa.int64(), pa.int64(), pa.string(), pa.int64()), strict=True))
    options = pa.csv.ConvertOptions(column_types=types, include_columns=list(names))
    try:
        table = pa.csv.read_csv(pa.BufferReader(Path(path).read_bytes()), convert_options=options)
        missing = [name for name in names if table.column(name).null_count]
        if missing:
            raise TraceError(f"{missing[0]}: expected a value in every row")
        arrival_s, prompt, output, session, turn = (table.column(name).to_numpy() for name in names)
        return of_turns(Requests(arrival_s, prompt, output), session, turn, block_tokens)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise TraceError(f"{path}: {reason}; expected CSV with the columns {','.join(names)}") from None
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None
