"""What do prompts wait and decodes stall for when steps are chosen by a policy? Followed step by step, without events.

A policy looks at what waits and runs and says what the next step computes; `follow` prices the step, moves time on, and
notes the end of the step that completes a prompt (its first token) and every gap between tokens. It is the scheduling
alone, on any clock of planner.prefillcosts: no transfers, pipelines, prefix caches or preemption, which the simulator
has. KV is set aside for a request's whole life before its first token is computed, so that nothing is ever thrown out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf, isfinite
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlanError
from planner.prefillcosts import Clock, Span, ranges

#: Steps after which a schedule that does not end is given up.
MOST_STEPS = 2_000_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request: its arrival, prompt, output tokens (the first included), weight of its TTFT, and TTFT limit."""

    arrival_s: float
    tokens: int
    outputs: int = 1
    weight: float = 1.0
    ttft_s: float = inf

    def __post_init__(self) -> None:
        """Raise PlanError for numbers out of range."""
        fine = self.arrival_s >= 0 and isfinite(self.arrival_s) and self.weight >= 0 and self.ttft_s > 0
        if not fine or self.tokens < 1 or self.outputs < 1:
            raise PlanError(f"{self}: expected arrival and weight of at least 0, tokens and outputs of at least 1")


class Running(NamedTuple):
    """A sequence that decodes at the start: tokens it attends to in its first step, tokens still to come."""

    context: int
    left: int


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of traffic: prompts in order of arrival, what runs at its start, KV tokens and sequences at most."""

    prompts: tuple[Prompt, ...]
    running: tuple[Running, ...] = ()
    kv_tokens: float = inf
    max_seqs: int = 1024

    def __post_init__(self) -> None:
        """Raise PlanError where prompts are missing, out of order, or could never run."""
        if not self.prompts:
            raise PlanError("window without prompts: expected at least one")
        arrivals = [p.arrival_s for p in self.prompts]
        if arrivals != sorted(arrivals):
            raise PlanError("prompts out of order: expected them by arrival")
        if len(self.running) > self.max_seqs or self.max_seqs < 1:
            raise PlanError(f"{len(self.running)} sequences run: expected at most max_seqs={self.max_seqs}")
        held = sum(r.context + r.left for r in self.running)
        longest = max(p.tokens + p.outputs for p in self.prompts)
        if max(held, longest) > self.kv_tokens:
            raise PlanError(
                f"{max(held, longest)} tokens of KV needed: expected at most kv_tokens={self.kv_tokens:.0f}"
            )


@dataclass(slots=True)
class Job:
    """A prompt that has arrived and is not complete: how many of its tokens, and of its layers, are done."""

    index: int
    prompt: Prompt
    tokens: int = 0
    layers: int = 0
    admitted: bool = False

    @property
    def left(self) -> int:
        """Tokens left."""
        return self.prompt.tokens - self.tokens


@dataclass(slots=True)
class State:
    """What a policy sees: jobs in order of arrival, decodes and the tokens they attend to next, the clock, free KV."""

    now_s: float
    jobs: list[Job]
    decodes: int
    context: int
    clock: Clock
    kv_free: float
    seats: int
    _taken: dict[int, int] = field(default_factory=dict)

    def fits(self, job: Job) -> bool:
        """Whether the job can be in the next step beside those that asked before; notes that it will be."""
        if job.admitted or job.index in self._taken:
            return True
        need = job.prompt.tokens + job.prompt.outputs
        if self.seats <= len(self._taken) or need > self.kv_free - sum(self._taken.values()):
            return False
        self._taken[job.index] = need
        return True


@dataclass(frozen=True, slots=True)
class Step:
    """What a step computes: (job, its span) and whether all running sequences decode in it."""

    items: tuple[tuple[Job, Span], ...] = ()
    decode: bool = True


Policy = Callable[[State], Step]


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """What came of it.

    ttft_s     of each prompt; gap_s, gap_count: gaps between tokens, and of how many tokens
    weights    of the prompts; steps; end_s; largest_tokens: most prompt tokens that a layer saw in a step
    together   whether every step with running sequences decoded
    decoding   whether some sequence was running at every time until the last prompt was complete
    """

    name: str
    ttft_s: NDArray[np.float64]
    gap_s: NDArray[np.float64]
    gap_count: NDArray[np.int64]
    weights: NDArray[np.float64]
    steps: int
    end_s: float
    largest_tokens: int
    together: bool
    decoding: bool

    @property
    def mean_ttft_s(self) -> float:
        """Weighted mean."""
        return float(self.ttft_s @ self.weights / self.weights.sum())

    @property
    def max_tbt_s(self) -> float:
        """Longest gap between two tokens of a request; 0 without gaps."""
        return float(self.gap_s.max()) if len(self.gap_s) else 0.0

    def tbt_s(self, quantile: float) -> float:
        """The gap that this fraction of all gaps does not exceed."""
        if not len(self.gap_s):
            return 0.0
        order = np.argsort(self.gap_s)
        reached = np.cumsum(self.gap_count[order])
        return float(self.gap_s[order][np.searchsorted(reached, quantile * reached[-1] * (1 - 1e-12))])


def follow(window: Window, policy: Policy, clock: Clock, name: str = "policy") -> Schedule:
    """The schedule that a policy makes of a window, to the last token.

    Raises PlanError for a step that is empty though something could run, or that breaks the order of a prompt's work.
    """
    prompts, n = window.prompts, len(window.prompts)
    ttft = np.zeros(n)
    gaps: list[float] = []
    counts: list[int] = []
    now, steps, coming, largest, together, decoding = 0.0, 0, 0, 0, True, True
    jobs: list[Job] = []
    finish: list[tuple[int, int]] = []  # (decode steps at which it ends, tokens of KV it gives back)
    decoded, decodes, context, free = 0, 0, 0, window.kv_tokens
    since: list[tuple[float, int]] = []  # (time of the last token, sequences)
    for sequence in window.running:
        if sequence.left > 0:
            heappush(finish, (sequence.left, sequence.context + sequence.left))
            decodes, context = decodes + 1, context + sequence.context
            free -= sequence.context + sequence.left
    if decodes:
        since.append((0.0, decodes))
    while True:
        while coming < n and prompts[coming].arrival_s <= now:
            jobs.append(Job(coming, prompts[coming]))
            coming += 1
        if not jobs and not decodes:
            if coming == n:
                break
            now = prompts[coming].arrival_s
            decoding = False
            continue
        admitted = sum(job.admitted for job in jobs)
        state = State(now, list(jobs), decodes, context, clock, free, window.max_seqs - decodes - admitted)
        step = policy(state)
        decode = step.decode and decodes > 0
        spans = [span for _, span in step.items]
        if not spans and not decode:
            raise PlanError(f"{name}: an empty step at {now:.6g} s with {len(jobs)} prompts and {decodes} decodes")
        steps += 1
        if steps > MOST_STEPS:
            raise PlanError(f"{name}: no end after {MOST_STEPS} steps; expected a policy that serves every prompt")
        _check(name, step, clock, state)
        now += clock.step_s(decodes if decode else 0, context if decode else 0, spans)
        together &= decode or not decodes
        decoding &= decodes > 0 or not (jobs or coming < n)
        if spans:
            largest = max(largest, *(tokens for _, _, tokens in ranges(spans, clock.layers)))
        if decode:
            gaps += [now - last for last, _ in since]
            counts += [count for _, count in since]
            decoded, context = decoded + 1, context + decodes
            while finish and finish[0][0] <= decoded:
                held = heappop(finish)[1]
                decodes, context, free = decodes - 1, context - held, free + held
            since = [(now, decodes)] if decodes else []
        joined = 0
        for job, span in step.items:
            if not job.admitted:
                job.admitted = True
                free -= job.prompt.tokens + job.prompt.outputs
            whole = span.end - span.first == clock.layers
            job.tokens, job.layers = (job.tokens + span.tokens, 0) if whole else (job.tokens, span.end)
            if job.tokens < job.prompt.tokens and job.layers < clock.layers:
                continue
            ttft[job.index] = now - job.prompt.arrival_s
            jobs.remove(job)
            left, held = job.prompt.outputs - 1, job.prompt.tokens + job.prompt.outputs
            if left:
                heappush(finish, (decoded + left, held))
                decodes, context, joined = decodes + 1, context + job.prompt.tokens + 1, joined + 1
            else:
                free += held
        if joined:
            since.append((now, joined))
    weights = np.array([p.weight for p in prompts])
    weights = weights if weights.any() else np.ones(n)
    return Schedule(
        name, ttft, np.array(gaps), np.array(counts, np.int64), weights, steps, now, largest, together, decoding
    )


def _check(name: str, step: Step, clock: Clock, state: State) -> None:
    """Raise PlanError for work out of order, beyond a prompt's end, or without room."""
    seen: set[int] = set()
    for job, span in step.items:
        whole = span.first == 0 and span.end == clock.layers and not job.layers
        by_tokens = whole and span.before == job.tokens and 1 <= span.tokens <= job.left
        by_layers = span.first == job.layers < span.end <= clock.layers and span.tokens == job.left
        if not (by_tokens or (by_layers and span.before == job.tokens)) or job.index in seen:
            raise PlanError(f"{name}: {span} of prompt {job.index}, {job.tokens} tokens and {job.layers} layers done")
        seen.add(job.index)
        if not state.fits(job):
            raise PlanError(f"{name}: prompt {job.index} admitted without room for it")


def window_of(
    arrival_s: Sequence[float],
    prompt_tokens: Sequence[int],
    output_tokens: Sequence[int],
    running: Sequence[Running] = (),
    **limits: float,
) -> Window:
    """A window of requests, in arrays of equal length as simulator.workload.Requests has them."""
    rows = zip(arrival_s, prompt_tokens, output_tokens, strict=True)
    prompts = tuple(Prompt(float(at), int(tokens), int(outputs)) for at, tokens, outputs in rows)
    return Window(prompts, tuple(running), limits.get("kv_tokens", inf), int(limits.get("max_seqs", 1024)))
