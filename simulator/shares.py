"""Who gets which part of the compute units when prefill and decode run at once? Policies, without a clock.

A policy is a frozen description; `start` makes the controller of one run. Controllers are told what happened and asked
for shares whenever a phase is about to begin a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hwmodels.shares import SharedSteps, crowding
from hwmodels.step_model import Item
from simulator.errors import SchedulerError

#: Least share a controller leaves a phase with.
LEAST = 0.1


@dataclass(frozen=True, slots=True)
class Shares:
    """Parts of the compute units that prefill and decode may use, each in (0, 1]; together they may exceed 1.

    lend   whether a phase has all units while the other has nothing to run
    """

    prefill: float
    decode: float
    lend: bool = False

    def __post_init__(self) -> None:
        """Raise SchedulerError for shares that are none."""
        for name, share in (("prefill", self.prefill), ("decode", self.decode)):
            if not 0 < share <= 1:
                raise SchedulerError(f"{name} share {share:g}: expected a part of the compute units in (0, 1]")

    def together(self) -> tuple[float, float]:
        """What each phase has while both run: where they ask for more than all units, in proportion."""
        total = max(1.0, self.prefill + self.decode)
        return self.prefill / total, self.decode / total


@dataclass(slots=True)
class State:
    """What a controller may look at when a phase is about to begin a step.

    steps               prices of steps at any share
    items               prompt chunks in flight or about to be; empty where there are none
    sequences, context  decoding sequences, and the tokens they attend to in the next step
    kv_use              part of the KV blocks held
    """

    now_s: float
    steps: SharedSteps
    items: Sequence[Item]
    sequences: int
    context: int
    kv_use: float


class Controller(Protocol):
    """Chooses the shares of one run."""

    def first_token(self, ttft_s: float) -> None:
        """A request has its first token."""
        ...

    def finished(self, tpot_s: float) -> None:
        """A request of more than one token is done."""
        ...

    def stepped(self, prefill_unit_s: float, iterations: int) -> None:
        """Steps were taken; a prefill step for so many seconds times its share, decode steps for 0."""
        ...

    def decide(self, state: State) -> Shares:
        """The shares of the steps that begin now."""
        ...


class Policy(Protocol):
    """Shares to begin with, how long a change takes, and what decides on changes."""

    @property
    def shares(self) -> Shares:
        """At the beginning."""
        ...

    @property
    def switch_s(self) -> float:
        """From a decision to the first step with the new shares; the old ones hold until then."""
        ...

    def start(self) -> Controller | None:
        """The controller of one run; None where the shares never change."""
        ...


@dataclass(frozen=True, slots=True)
class Static:
    """The same shares for good."""

    shares: Shares
    switch_s: float = 0.0

    def start(self) -> None:
        """Nobody decides."""
        return


@dataclass(frozen=True, slots=True)
class SemiPD:
    """Feedback on two latency limits (semi-PD, arXiv:2504.19867, Algorithm 1).

    ttft_s, tpot_s   limits, on the `percentile` of the requests of a window
    window           iterations (steps of either phase) between two decisions
    step, max_step   by how much a share is raised, and at most in one decision
    switch_s         starting a process with the new share; the old one works on meanwhile (estimate)
    """

    ttft_s: float
    tpot_s: float
    percentile: float = 0.9
    window: int = 200
    step: float = 0.05
    max_step: float = 0.3
    shares: Shares = field(default_factory=lambda: Shares(0.8, 1.0))
    switch_s: float = 1.0

    def start(self) -> Controller:
        """The controller of one run."""
        return _Feedback(self)


class _Feedback:
    """Algorithm 1: where exactly one limit fails, raise that phase's share until its fitted law says that it passes.

    The laws are TTFT = a1 / (x - load) + b1 and TPOT = a2 / y + b2 with x and y the shares of the units while both
    phases run; `load` is what prefill would use of a whole device, observed. They are fitted to the windows so far;
    with one share seen, b is 0. A share that is at 1 already gains by the other one's giving up as much.
    """

    def __init__(self, policy: SemiPD) -> None:
        self.policy = policy
        self.shares = policy.shares
        self.ttfts: list[float] = []
        self.tpots: list[float] = []
        self.iterations = 0
        self.unit_s = 0.0
        self.since_s = 0.0
        self.load = 0.0
        self.seen: tuple[deque[tuple[float, float]], deque[tuple[float, float]]] = (deque(maxlen=16), deque(maxlen=16))

    def first_token(self, ttft_s: float) -> None:
        self.ttfts.append(ttft_s)

    def finished(self, tpot_s: float) -> None:
        self.tpots.append(tpot_s)

    def stepped(self, prefill_unit_s: float, iterations: int) -> None:
        self.iterations += iterations
        self.unit_s += prefill_unit_s

    def decide(self, state: State) -> Shares:
        """The same shares until a window is full that has requests of both kinds."""
        policy = self.policy
        if self.iterations < policy.window or not self.ttfts or not self.tpots:
            return self.shares
        ttft_s, tpot_s = (float(np.quantile(values, policy.percentile)) for values in (self.ttfts, self.tpots))
        passed_s = max(state.now_s - self.since_s, 1e-9)
        self.load = min(self.unit_s / passed_s, 0.99)
        x, y = self.shares.together()
        self.seen[0].append((1 / max(x - self.load, 0.01), ttft_s))
        self.seen[1].append((1 / y, tpot_s))
        fails = ttft_s > policy.ttft_s, tpot_s > policy.tpot_s
        if fails[0] != fails[1]:
            self.shares = self._raised(0 if fails[0] else 1)
        self.ttfts, self.tpots = [], []
        self.iterations, self.unit_s, self.since_s = 0, 0.0, state.now_s
        return self.shares

    def _raised(self, phase: int) -> Shares:
        """Shares with the phase raised until it is predicted to pass, by max_step at most."""
        policy = self.policy
        limit_s = policy.tpot_s if phase else policy.ttft_s
        a, b = _law(self.seen[phase])
        shares = self.shares
        for _ in range(max(1, round(policy.max_step / policy.step))):
            raised = _moved(shares, phase, policy.step)
            if raised == shares:
                break
            shares = raised
            own = shares.together()[phase]
            if a / max(own - (0.0 if phase else self.load), 0.01) + b <= limit_s:
                break
        return shares


def _law(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of value = a u + b by least squares, a >= 0 and b >= 0; b = 0 where all u are the same."""
    u, value = np.array(points).T
    if np.ptp(u) > 1e-3 * u.mean():
        a, b = (float(number) for number in np.polyfit(u, value, 1))
        if a > 0 and b >= 0:
            return a, b
    return float(value @ u / (u @ u)), 0.0


def _moved(shares: Shares, phase: int, step: float) -> Shares:
    """Shares with the phase's raised by a step, or where it has all already, the other's lowered; LEAST at least."""
    both = [shares.prefill, shares.decode]
    if both[phase] < 1:
        both[phase] = min(1.0, both[phase] + step)
    else:
        both[1 - phase] = max(LEAST, both[1 - phase] - step)
    return Shares(both[0], both[1], shares.lend)


@dataclass(frozen=True, slots=True)
class Nexus:
    """A split that is predicted for every batch (Nexus, arXiv:2507.06608v2, Algorithm 1).

    One phase is favoured: prefill, and decode from `kv_pressure` on, because only decode gives memory back. It gets the
    largest share with which the other phase's step takes at most its slack times what it takes alone on all units.
    The split changes only by `hysteresis` or more. The order of prompts is SharedScheduler's (the paper's gamma: 15).

    prefill_slack, decode_slack   the paper's alpha and beta; its 1.3 and 1.1 belong to curves on which decode hardly
                                  gains beyond half of the units. On steeper ones bounds that tight leave the phase that
                                  is favoured with less than the other, and long queues
    kv_pressure                   as in the paper, section 5
    parts                         candidate splits are k / parts (the paper: 100)
    hysteresis                    an estimate
    """

    prefill_slack: float = 2.0
    decode_slack: float = 2.0
    kv_pressure: float = 0.7
    hysteresis: float = 0.05
    parts: int = 20
    shares: Shares = field(default_factory=lambda: Shares(0.5, 0.5, lend=True))
    switch_s: float = 0.0

    def start(self) -> Controller:
        """The controller of one run."""
        return _Predictive(self)


class _Predictive:
    """Nexus's search from the present split on: towards the favoured phase while the other bears it, else back."""

    def __init__(self, policy: Nexus) -> None:
        self.policy = policy
        self.shares = policy.shares
        self.split = round(policy.shares.prefill * policy.parts)

    def first_token(self, ttft_s: float) -> None:
        """Not looked at."""

    def finished(self, tpot_s: float) -> None:
        """Not looked at."""

    def stepped(self, prefill_unit_s: float, iterations: int) -> None:
        """Not looked at."""

    def decide(self, state: State) -> Shares:
        """The split for the two batches, the present one where one of them is empty."""
        if not state.items or not state.sequences:
            return self.shares
        policy, parts = self.policy, self.policy.parts
        favoured = int(state.kv_use >= policy.kv_pressure)
        other = 1 - favoured
        steps, batch = state.steps, (state.sequences, state.context)
        if other:
            bound_s = policy.decode_slack * steps.decode(1.0, *batch)[0]
        else:
            bound_s = policy.prefill_slack * steps.prefill(1.0, state.items)[0]

        def bears(split: int) -> bool:
            prefill_share = split / parts
            own = steps.decode(1 - prefill_share, *batch) if other else steps.prefill(prefill_share, state.items)
            alone_s, memory_s, _ = own
            if not alone_s <= bound_s < alone_s + memory_s:  # whatever the crowding, which is at most 1
                return alone_s <= bound_s
            its = steps.prefill(prefill_share, state.items) if other else steps.decode(1 - prefill_share, *batch)
            return alone_s + memory_s * crowding(own, its, steps.ceiling_bytes_per_s)[0] <= bound_s

        towards = 1 if favoured == 0 else -1
        split = self.split
        if bears(split):
            while 1 <= split + towards <= parts - 1 and bears(split + towards):
                split += towards
        else:
            while 1 <= split - towards <= parts - 1:
                split -= towards
                if bears(split):
                    break
        if abs(split - self.split) >= max(1.0, policy.hysteresis * parts):
            self.split = split
            self.shares = Shares(split / parts, 1 - split / parts, self.shares.lend)
        return self.shares
