"""What mean TTFT can no schedule of a window go below, whatever it cuts, by tokens or by layers, and in which order?

Given a step model that is nowhere above the true one (a LinearStep, or prefilllinear.minorant of tables), and schedules
that (1) show a layer at most N prompt tokens in a step, (2) let all running sequences decode in a step or none, (3)
keep every gap between tokens within the TBT limit, the first one counted from the window's start.

**Work.** Take any piece i and theta in [0, 1]. A step in which D sequences with K tokens of context decode lasts at
least

    A + C D + G K + sum over its items of (share of the layers) (B n + d n (before + n/2))
    A = (1 - theta) (host + base_i)     B = token_i + (theta (host + base_i) + prompt + reload_i) / N
    C = decode_i                        G = context

(or with `prompt`, where there are prompts, in A instead of in B) because the maximum over pieces is no less than piece
i, the parts of the layers with prompts add up to at most one, and a layer that sees n <= N tokens costs base + reload
>= (base + reload) n / N: what a step costs once is shared by at most N tokens. A prompt of L tokens needs p = B L + d
L^2 / 2 of such work between its arrival and its first token: all its tokens pass all layers, and the attention adds up
to that however the prompt is cut.

**Speed.** Where no sequence need decode, take every step's work as done in the step, evenly, all its items at once: a
preemptive schedule of one machine of speed 1 that completes no prompt later than the true one and starts none before it
has come. Decode j is alive at t if t < left_j x (the least step with its attention): it has that many steps before it.
While D such sequences are alive, the time g between the ends of two steps that decode is at most the TBT limit, and O =
A + C D + G K of it is not the prompts'. Take that as the end of the gap, and do the same work in the same order, none
before it truly began, at the speed (g - O) / g <= 1 - O / tbt =: s(t). Work w that truly ran from a to a + w <= g - O
is done by a + w g / (g - O) = a + w + w O / (g - O), within the gap, and at most O late. Where every step decodes, a
gap is a step, which completes its prompts at its end: nothing is late. Where steps may leave the decodes out
(`pauses`), O(0), the largest, is taken off the bound. The speed is a function of time alone, and rises.

**Order.** For a machine whose speed is given and jobs that may be interrupted, shortest remaining work first minimises
the sum of completion times: where a schedule deviates, exchange the slots of two jobs from then on, first those of the
shorter (Schrage 1968); the speed at each time stays as it was. Largest weight / work first minimises the sum of w x M,
M the mean time at which a job is worked on: exchanging work of two jobs between two times pays exactly where it brings
the larger w / p forward; and a job done at a speed of at most 1 is not complete before M + p / 2 (Goemans, Queyranne,
Schulz, Skutella and Wang 2002). The first holds for equal weights, the second for all; and no prompt is faster than
alone in the machine. The bound is the largest of the three over all pieces and thetas.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import product
from math import ceil, inf
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlanError
from planner.prefillcosts import LinearStep
from planner.prefillhorizon import require_tbt
from planner.prefillsteps import Window

Floats = NDArray[np.float64]
#: Parts of a step's fixed time that are shared out over its tokens instead of being charged by step.
THETAS = (0.0, 0.5, 1.0)
#: Seconds of work below which a piece says nothing of a prompt.
LEAST_WORK_S = 1e-12
#: Speed, for 0, of a machine that never gets to a prompt within the limit: its bound is long, not infinite.
LEAST_SPEED = 1e-6
#: (time from which it holds, speed): ascending in time, beginning at 0.
Speeds = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Bound:
    """A weighted mean TTFT that no schedule goes below, and what proves it.

    proof   shortest first, weighted mean times, or alone: see the module
    """

    ttft_s: float
    proof: str


def ttft_bound(
    step: LinearStep,
    window: Window,
    tbt_s: float = inf,
    max_tokens: float = inf,
    *,
    pauses: bool = True,
    always: bool = False,
) -> Bound:
    """The bound of the module.

    max_tokens   prompt tokens that a layer sees in a step at most
    pauses       whether steps may leave the running sequences out
    always       only for schedules in which at every time until the last prompt is complete some sequence decodes, so
                 that the TBT limit holds throughout: the speed is that of one decode where none is known to be alive

    Raises NoFeasiblePlanError, with the floor, for a TBT limit below a decode step, PlanError for max_tokens below 1.
    """
    if not max_tokens >= 1:
        raise PlanError(f"max_tokens={max_tokens}: expected at least 1")
    require_tbt(step, window.running, tbt_s)
    prompts = window.prompts
    release = np.array([p.arrival_s for p in prompts])
    weight = np.array([p.weight for p in prompts])
    weight = weight if weight.any() else np.ones(len(prompts))
    tokens = np.array([float(p.tokens) for p in prompts])
    alone = np.array([_alone(step, p.tokens, max_tokens) for p in prompts])
    best = Bound(float(alone @ weight / weight.sum()), "alone")
    equal = bool((weight == weight[0]).all())
    by_time = attrgetter("ttft_s")
    for piece in step.pieces:
        for theta, prompt in product(THETAS, (0.0, step.prompt_s)):
            fixed = (1 - theta) * (step.host_s + piece.base_s) + prompt
            once = theta * (step.host_s + piece.base_s) + (step.prompt_s - prompt) + piece.reload_s
            work = tokens * (piece.token_s + once / max_tokens) + step.attention_s * tokens**2 / 2
            if work.min() < LEAST_WORK_S:
                continue
            slow, late = _speeds(step, window, tbt_s, fixed, piece.decode_s, always)
            for speeds, over in [(slow, late if pauses else 0.0)] + ([([(0.0, 1.0)], 0.0)] if pauses and late else []):
                middle = _mean_times(release, work, -weight / work, speeds) + work / 2
                mean_s = float((middle - release) @ weight / weight.sum())
                best = max(best, Bound(mean_s - over, "weighted mean times"), key=by_time)
                if equal:
                    mean_s = float((_shortest_first(release, work, speeds) - release).mean())
                    best = max(best, Bound(mean_s - over, "shortest first"), key=by_time)
    return Bound(best.ttft_s * (1 - 1e-9), best.proof)


def _alone(step: LinearStep, tokens: int, max_tokens: float) -> float:
    """Least seconds of a prompt that has the machine to itself: every layer sees it in so many steps at least."""
    times = max(1, ceil(tokens / max_tokens))
    blocks = max(times * (p.base_s + p.reload_s) + p.token_s * tokens for p in step.pieces)
    return times * (step.host_s + step.prompt_s) + blocks + step.attention_s * tokens**2 / 2


def _speeds(
    step: LinearStep, window: Window, tbt_s: float, fixed_s: float, decode_s: float, always: bool
) -> tuple[Speeds, float]:
    """The machine's speed over time, and O(0): see the module."""
    least = step.host_s + max(p.base_s + p.decode_s for p in step.pieces)
    ends = sorted((r.left * (least + step.context_s * r.context), r.context) for r in window.running if r.left > 0)
    if tbt_s == inf:
        return [(0.0, 1.0)], 0.0
    one = fixed_s + decode_s + step.context_s if always else 0.0
    speeds, begin, first = [], 0.0, one
    for i, (end, _) in enumerate(ends):
        alive = ends[i:]
        lost = fixed_s + decode_s * len(alive) + step.context_s * sum(context for _, context in alive)
        first = max(first, lost)
        if end > begin:
            speeds.append((begin, max(0.0, 1.0 - lost / tbt_s)))
            begin = end
    return [*speeds, (begin, max(LEAST_SPEED, 1.0 - one / tbt_s))], first


class _Machine:
    """Time and speed: how much work is done by when."""

    def __init__(self, speeds: Speeds) -> None:
        self.speeds = speeds
        self.at = 0

    def run(self, now: float, until: float, work: float) -> tuple[float, float, float]:
        """(time, work done, integral of time over it) from `now` to `until` or the work's end, at one speed."""
        while self.at + 1 < len(self.speeds) and self.speeds[self.at + 1][0] <= now:
            self.at += 1
        speed = self.speeds[self.at][1]
        if self.at + 1 < len(self.speeds):
            until = min(until, self.speeds[self.at + 1][0])
        if speed > 0 and now + work / speed <= until:
            until, done = now + work / speed, work
        else:
            done = speed * (until - now)
        return until, done, done * (now + until) / 2


def _shortest_first(release: Floats, work: Floats, speeds: Speeds) -> Floats:
    """Completion times when the job with the least work left always runs."""
    machine, n = _Machine(speeds), len(work)
    done, now, coming = np.zeros(n), 0.0, 0
    waiting: list[tuple[float, int]] = []
    while coming < n or waiting:
        while coming < n and release[coming] <= now:
            heappush(waiting, (float(work[coming]), coming))
            coming += 1
        following = float(release[coming]) if coming < n else inf
        if not waiting:
            now = following
            continue
        left, job = heappop(waiting)
        now, did, _ = machine.run(now, following, left)
        if did < left:
            heappush(waiting, (left - did, job))
        else:
            done[job] = now
    return done


def _mean_times(release: Floats, work: Floats, rank: Floats, speeds: Speeds) -> Floats:
    """Mean time at which each job is worked on, when the one with the lowest rank always runs."""
    machine, n = _Machine(speeds), len(work)
    left, moment, now, coming = work.copy(), np.zeros(n), 0.0, 0
    waiting: list[tuple[float, int]] = []
    while coming < n or waiting:
        while coming < n and release[coming] <= now:
            heappush(waiting, (float(rank[coming]), coming))
            coming += 1
        following = float(release[coming]) if coming < n else inf
        if not waiting:
            now = following
            continue
        job = waiting[0][1]
        now, did, area = machine.run(now, following, float(left[job]))
        moment[job] += area
        if did < left[job]:
            left[job] -= did
        else:
            left[job] = 0.0
            heappop(waiting)
    return moment / work
