"""Is the KV of a known context better loaded from storage or computed again, chunk by chunk and at which quality?

CacheGen's answer (Liu et al., SIGCOMM 2024, arXiv:2310.07240) is a rule that looks at one chunk at a time; `best` is
the optimum of a controller that knows the bandwidth to come. Chunks are fetched over one link in order; what arrives is
decoded, or computed if only the text was sent, by one processor in order while the next chunk is under way. Without a
time to keep, `split` has the link load from the end of the context while the processor computes from its start.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Protocol

from hwmodels.errors import ShardwiseError
from hwmodels.step_model import StepModel

#: Seconds to compute (new tokens, after tokens already cached).
Prefill = Callable[[int, int], float]
#: Index of a level of the ladder, best quality first; None: the text, computed again.
Choice = int | None
#: Of English text in UTF-8: about four letters a token.
TEXT_BYTES_PER_TOKEN = 4.0
#: Share by which times may be late through rounding.
ROUNDING = 1e-12


class LoadError(ShardwiseError):
    """Levels, chunks or bandwidths that cannot be as given."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Level:
    """One way to store KV.

    bits_per_value       of the quantised numbers
    size_factor          share of those bits left by coding them without loss, 1 without
    quality_loss         what a context wholly at this level loses, in any unit; recomputed text loses nothing
    decode_values_per_s  numbers restored per second
    """

    name: str
    bits_per_value: float
    size_factor: float = 1.0
    quality_loss: float = 0.0
    decode_values_per_s: float = inf

    def __post_init__(self) -> None:
        """Raise LoadError for a level that stores nothing, gains quality or is never decoded."""
        for name in ("bits_per_value", "size_factor", "decode_values_per_s"):
            if not getattr(self, name) > 0:
                raise LoadError(f"level {self.name}: {name}={getattr(self, name)}, expected more than 0")
        if not self.quality_loss >= 0:
            raise LoadError(f"level {self.name}: quality_loss={self.quality_loss}, expected at least 0")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of a context that are loaded or computed as one.

    nbytes, decode_s     by level, best quality first
    losses               by level: its quality_loss times the chunk's share of the context
    text_bytes, prefill_s   of sending the text and computing its KV after the chunks before it
    """

    tokens: int
    nbytes: tuple[float, ...]
    decode_s: tuple[float, ...]
    losses: tuple[float, ...]
    text_bytes: float
    prefill_s: float

    def sent_bytes(self, choice: Choice) -> float:
        """Bytes over the link."""
        return self.text_bytes if choice is None else self.nbytes[choice]

    def busy_s(self, choice: Choice) -> float:
        """Seconds of the processor."""
        return self.prefill_s if choice is None else self.decode_s[choice]

    def loss(self, choice: Choice) -> float:
        """Share of the context's loss of quality."""
        return 0.0 if choice is None else self.losses[choice]


def cut(
    tokens: int, chunk_tokens: int, values_per_token: float, ladder: Sequence[Level], prefill: Prefill
) -> list[Chunk]:
    """A context of `tokens` tokens in chunks, the last one shorter.

    values_per_token   cached numbers of one token in all layers and ranks (ModelShape.kv_elements_per_token)
    ladder             levels, best quality first

    Raises LoadError for no tokens and for a ladder not in order of quality.
    """
    if tokens < 1 or chunk_tokens < 1:
        raise LoadError(f"tokens={tokens} in chunks of {chunk_tokens}: expected both to be at least 1")
    losses = [level.quality_loss for level in ladder]
    if losses != sorted(losses):
        raise LoadError(f"quality losses {losses}: expected the ladder to start with the best quality")
    chunks = []
    for before in range(0, tokens, chunk_tokens):
        new = min(chunk_tokens, tokens - before)
        values = new * values_per_token
        chunks.append(
            Chunk(
                new,
                tuple(values * level.bits_per_value * level.size_factor / 8 for level in ladder),
                tuple(values / level.decode_values_per_s for level in ladder),
                tuple(level.quality_loss * new / tokens for level in ladder),
                new * TEXT_BYTES_PER_TOKEN,
                prefill(new, before),
            )
        )
    return chunks


def prefill_of(model: StepModel) -> Prefill:
    """Seconds a replica takes to compute a chunk alone, in steps of at most the model's tokens, stage after stage."""

    def step_s(new: int, before: int) -> float:
        times = model.lockstep_stages_s([(0, 0, [(new, before)])])
        return sum(times) + (len(times) - 1) * model.transfer[new]

    def seconds(new: int, before: int) -> float:
        starts = range(before, before + new, model.max_tokens)
        return sum(step_s(min(model.max_tokens, before + new - start), start) for start in starts)

    return seconds


class Link(Protocol):
    """When bytes arrive; later starts never arrive earlier."""

    def arrival_s(self, chunk: int, start_s: float, nbytes: float) -> float:
        """When the last of `nbytes` of the given chunk arrives, sent from `start_s` on."""
        ...


@dataclass(frozen=True, slots=True)
class PerChunk:
    """A link whose bandwidth is drawn per chunk, as in CacheGen's evaluation; the last holds for chunks beyond."""

    bytes_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise LoadError for bandwidths that are not positive."""
        _require_bandwidths(self.bytes_per_s)

    def arrival_s(self, chunk: int, start_s: float, nbytes: float) -> float:
        """When the last of `nbytes` of the given chunk arrives, sent from `start_s` on."""
        return start_s + nbytes / self.bytes_per_s[min(chunk, len(self.bytes_per_s) - 1)]


@dataclass(frozen=True, slots=True)
class OverTime:
    """A link whose bandwidth changes at given times.

    times_s       ascending from 0: when each bandwidth begins
    bytes_per_s   the last holds for ever
    """

    times_s: tuple[float, ...]
    bytes_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise LoadError for times that do not ascend from 0 and bandwidths that are not positive."""
        _require_bandwidths(self.bytes_per_s)
        times = list(self.times_s)
        if len(times) != len(self.bytes_per_s) or times[0] != 0 or times != sorted(set(times)):
            raise LoadError(f"times {times}: expected as many as bandwidths, ascending from 0")

    def arrival_s(self, chunk: int, start_s: float, nbytes: float) -> float:
        """When the last of `nbytes` arrives, sent from `start_s` on."""
        piece = max(0, bisect_left(self.times_s, start_s) - 1)
        now, left = start_s, nbytes
        while piece + 1 < len(self.times_s):
            room = (self.times_s[piece + 1] - now) * self.bytes_per_s[piece]
            if left <= room:
                break
            now, left, piece = self.times_s[piece + 1], left - room, piece + 1
        return now + left / self.bytes_per_s[piece]


def _require_bandwidths(bytes_per_s: Sequence[float]) -> None:
    if not bytes_per_s or not all(value > 0 and isfinite(value) for value in bytes_per_s):
        raise LoadError(f"bandwidths {list(bytes_per_s)}: expected at least one, all positive and finite")


@dataclass(frozen=True, slots=True)
class Load:
    """How a context was loaded.

    choices        by chunk
    fetched_s      when each chunk had arrived
    ready_s        when its KV was decoded or computed
    sent_bytes     over the link
    quality_loss   of the whole context
    """

    choices: tuple[Choice, ...]
    fetched_s: tuple[float, ...]
    ready_s: tuple[float, ...]
    sent_bytes: float
    quality_loss: float

    @property
    def finish_s(self) -> float:
        """When all KV is there."""
        return self.ready_s[-1]


#: What to do with chunk i: (i, time by which all before it are ready, bandwidth measured last) -> choice.
Controller = Callable[[int, float, float], Choice]


def stream(
    chunks: Sequence[Chunk], link: Link, controller: Controller, prior_bytes_per_s: float, *, pipelined: bool = True
) -> Load:
    """Load a context chunk by chunk, each as the controller says when the link is free for it.

    prior_bytes_per_s   bandwidth the controller is told before any was measured
    pipelined           whether a chunk is fetched while the one before it is decoded or computed
    """
    choices: list[Choice] = []
    fetched: list[float] = []
    ready: list[float] = []
    free_s = ready_s = sent = loss = 0.0
    bytes_per_s = prior_bytes_per_s
    for index, chunk in enumerate(chunks):
        choice = controller(index, max(free_s, ready_s), bytes_per_s)
        nbytes = chunk.sent_bytes(choice)
        fetched_s = link.arrival_s(index, free_s, nbytes)
        if fetched_s > free_s:
            bytes_per_s = nbytes / (fetched_s - free_s)
        ready_s = max(fetched_s, ready_s) + chunk.busy_s(choice)
        free_s = fetched_s if pipelined else ready_s
        sent += nbytes
        loss += chunk.loss(choice)
        choices.append(choice)
        fetched.append(fetched_s)
        ready.append(ready_s)
    return Load(tuple(choices), tuple(fetched), tuple(ready), sent, loss)


def cachegen(chunks: Sequence[Chunk], slo_s: float) -> Controller:
    """CacheGen's rule: the best level that is sent within an equal share of the time left, else the text.

    A level fits if bytes/bandwidth <= (slo_s - now) / remaining chunks, with the bandwidth of the chunk before.
    """

    def choose(index: int, now_s: float, bytes_per_s: float) -> Choice:
        share_s = (slo_s - now_s) / (len(chunks) - index)
        fitting = (level for level, nbytes in enumerate(chunks[index].nbytes) if nbytes / bytes_per_s <= share_s)
        return next(fitting, None)

    return choose


def always(choice: Choice) -> Controller:
    """The same choice for every chunk: None for plain recomputation, a level for a fixed encoding."""
    return lambda index, now_s, bytes_per_s: choice


def faster(chunks: Sequence[Chunk], level: int = 0) -> Controller:
    """Per chunk whatever is over first by the measured bandwidth: loading one level, or text and computing."""

    def choose(index: int, now_s: float, bytes_per_s: float) -> Choice:
        chunk = chunks[index]
        load_s = max(chunk.nbytes[level] / bytes_per_s, chunk.decode_s[level])
        return level if load_s <= chunk.text_bytes / bytes_per_s + chunk.prefill_s else None

    return choose


def replay(chunks: Sequence[Chunk], link: Link, choices: Sequence[Choice]) -> Load:
    """Load a context with all choices given."""
    return stream(chunks, link, lambda index, now_s, bytes_per_s: choices[index], inf)


def best(chunks: Sequence[Chunk], link: Link, slo_s: float) -> Load:
    """The least loss of quality with which all KV is there by `slo_s`, the bandwidth known beforehand.

    Among choices of equal loss the one over first; where nothing is over in time, the one over first of all. Exact: a
    partial choice is given up only for one that has its chunks fetched and ready no later and loses no more, and the
    link never rewards waiting. The number of partial choices kept is small as long as losses take few values.
    """
    in_time = _search(chunks, link, slo_s)
    if in_time:
        return replay(chunks, link, in_time[0][3])
    soonest = min(_search([replace(chunk, losses=(0.0,) * len(chunk.nbytes)) for chunk in chunks], link, inf))
    return replay(chunks, link, soonest[3])


#: (loss, ready_s, fetched_s, choices) of the first chunks.
_Partial = tuple[float, float, float, tuple[Choice, ...]]


def _search(chunks: Sequence[Chunk], link: Link, slo_s: float) -> list[_Partial]:
    """Choices for all chunks that are ready by `slo_s` and that no others match, by loss and then time."""
    after_s = [0.0]  # that the processor needs at least for the chunks from here on
    for chunk in reversed(chunks):
        after_s.append(after_s[-1] + min(chunk.busy_s(choice) for choice in _options(chunk)))
    after_s.reverse()
    kept: list[_Partial] = [(0.0, 0.0, 0.0, ())]
    for index, chunk in enumerate(chunks):
        grown: list[_Partial] = []
        for loss, ready_s, fetched_s, choices in kept:
            for choice in _options(chunk):
                fetched = link.arrival_s(index, fetched_s, chunk.sent_bytes(choice))
                ready = max(fetched, ready_s) + chunk.busy_s(choice)
                if ready + after_s[index + 1] <= slo_s * (1 + ROUNDING):
                    grown.append((round(loss + chunk.loss(choice), 12), ready, fetched, (*choices, choice)))
        kept = _undominated(grown)
    return kept


def _options(chunk: Chunk) -> list[Choice]:
    return [None, *range(len(chunk.nbytes))]


def _undominated(partial: list[_Partial]) -> list[_Partial]:
    """Those that no other one matches or beats in loss, ready_s and fetched_s at once."""
    front: list[tuple[float, float]] = []  # (ready_s, fetched_s) of those kept, ready_s rising and fetched_s falling
    kept = []
    for one in sorted(partial, key=lambda one: one[:3]):
        point = one[1:3]
        place = bisect_left(front, (point[0], inf))
        if place and front[place - 1][1] <= point[1]:
            continue
        end = place - 1 if place and front[place - 1][0] == point[0] else place
        stop = place
        while stop < len(front) and front[stop][1] >= point[1]:
            stop += 1
        front[end:stop] = [point]
        kept.append(one)
    return kept


@dataclass(frozen=True, slots=True)
class Split:
    """A context computed from its start while it is loaded from its end.

    computed_tokens, loaded_tokens   of the two parts
    finish_s                         when the later of both is over
    """

    computed_tokens: int
    loaded_tokens: int
    finish_s: float


def split(tokens: int, prefill: Prefill, load: Callable[[int], float], *, block_tokens: int = 1) -> Split:
    """The split at which computing and loading at once are over first.

    prefill   only called for tokens after none; rises with them
    load      seconds to load so many tokens; rises with them
    block_tokens   only whole blocks are loaded

    Tokens attend to what is before them, so it is the start that can be computed without the rest (Jin et al., Cake,
    arXiv:2410.03065). max(prefill(k), load(tokens - k)) falls until the two cross and rises thereafter: the optimum is
    next to the crossing, found by bisection.
    """
    if tokens < 1 or block_tokens < 1:
        raise LoadError(f"tokens={tokens} in blocks of {block_tokens}: expected both to be at least 1")
    blocks = tokens // block_tokens

    def at(loaded_blocks: int) -> tuple[float, float]:
        loaded = loaded_blocks * block_tokens
        computed = tokens - loaded
        return (prefill(computed, 0) if computed else 0.0), (load(loaded) if loaded else 0.0)

    low, high = 0, blocks  # the first number of blocks whose loading takes no less than computing the rest
    while low < high:
        middle = (low + high) // 2
        compute_s, load_s = at(middle)
        low, high = (low, middle) if load_s >= compute_s else (middle + 1, high)
    finish_s, loaded = min((max(at(count)), count) for count in {max(low - 1, 0), low})
    return Split(tokens - loaded * block_tokens, loaded * block_tokens, finish_s)
