"""Which experts should move now that the traffic has changed, when each move costs bytes?

A plan for one interval: from the placement in use and the routing seen since (a `Problem`), at most `most` copies
arrive on GPUs that did not hold them, over all layers. Every arrival fetches the expert's weights from a GPU that
holds it already, over the cheapest link; all arrivals share the ports, so the seconds charged
are those of the busiest port. What is minimised is the time of an interval:

    steps x objective(new placement)  +  seconds of the migration.

Moves are tried best first: two copies of a layer swap GPUs (two arrivals), or one copy makes way for another expert's
(one arrival, where the leaving expert keeps a copy elsewhere), or a copy moves to or appears on a free slot (one
arrival).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import PlanError
from planner.placement import Bools, Floats, Problem, State, holds_of, objective_of, split_of

#: Gains per arrival below this part of the objective are not worth looking at.
NEGLIGIBLE = 1e-9
#: Candidate moves of a layer, of the busiest GPUs, that are valued by the exact objective.
CANDIDATES = 256


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """What moves in an interval, and whether it pays.

    holds             layers x experts x gpus: the new placement
    arrivals          copies that are new on their GPU, each (layer, expert, from GPU, to GPU)
    migration_bytes   their weights
    migration_s       seconds of the busiest port while they move
    before_s, after_s objective of a step with the placement in use and with the new one
    steps             steps of the interval
    """

    holds: Bools
    arrivals: tuple[tuple[int, int, int, int], ...]
    migration_bytes: float
    migration_s: float
    before_s: float
    after_s: float
    steps: float

    @property
    def saved_s(self) -> float:
        """Seconds that the interval gets shorter, migration charged; never negative."""
        return self.steps * (self.before_s - self.after_s) - self.migration_s


def replace_experts(
    problem: Problem, current: ArrayLike, *, most: int, expert_bytes: float, steps: float, seconds: float = inf
) -> Replacement:
    """Move at most `most` copies, as far as the interval of `steps` steps gets shorter by it.

    problem        the routing now, and the links
    current        the placement in use, as in `objective_of`
    expert_bytes   weights of one expert in one layer
    seconds        wall-clock limit; what was found by then comes back

    Raises PlanError for a placement that breaks the problem's slots, and for numbers that are negative.
    """
    for name, value in (("most", most), ("expert_bytes", expert_bytes), ("steps", steps)):
        if not 0 <= value < inf:
            raise PlanError(f"{name} = {value}; expected a finite number that is not negative")
    old = holds_of(problem, current).copy()
    deadline = time.perf_counter() + seconds
    before_s = objective_of(problem, old).objective
    # per-arrival charge used while choosing: what the mean port would add; the whole plan is charged exactly
    state = State(problem, old / old.sum(axis=2, keepdims=True))
    holds = old.copy()
    best, best_total = old.copy(), steps * before_s
    found: list[_Move | None] = [None] * problem.layers
    stale = set(range(problem.layers))
    budget = most
    while budget > 0 and time.perf_counter() <= deadline:
        for layer in sorted(stale):
            found[layer] = _best_move(problem, state, holds, old, layer, budget)
            if time.perf_counter() > deadline:
                break
        offers = [(move.gain_s / max(move.arrivals, 1), -k) for k, move in enumerate(found) if move is not None]
        if not offers:
            break
        layer = -max(offers)[1]
        move = found[layer]
        assert move is not None
        state.apply(layer, np.array(move.experts), move.rows)
        holds[layer, list(move.experts)] = move.rows > 0
        budget = most - int((holds & ~old).sum())
        reach = 0 if problem.joint is None else 1
        stale = {k for k in range(layer - reach, layer + reach + 1) if 0 <= k < problem.layers}
        stale |= {k for k, other in enumerate(found) if other is not None and other.arrivals > budget}
        step_s = state.objective if problem.split == "even" else objective_of(problem, holds).objective
        total = steps * step_s + _charged(problem, old, holds, expert_bytes)[1]
        if total < best_total:
            best, best_total = holds.copy(), total
    arrivals, charged_s = _charged(problem, old, best, expert_bytes)
    after_s = objective_of(problem, best).objective
    return Replacement(best, arrivals, len(arrivals) * expert_bytes, charged_s, before_s, after_s, steps)


@dataclass(frozen=True, slots=True)
class _Move:
    """New splits of some experts of a layer."""

    experts: tuple[int, ...]
    rows: Floats
    gain_s: float
    arrivals: int


def _best_move(problem: Problem, state: State, holds: Bools, old: Bools, layer: int, budget: int) -> _Move | None:
    """The move of a layer with the largest gain per arrival that the budget allows."""
    held, was = holds[layer], old[layer]
    copies = held.sum(axis=1)
    each = problem.shares[layer] / copies
    ranks = each @ held
    busiest = int(ranks.argmax())
    plans: list[tuple[tuple[int, ...], Bools]] = []
    room = problem.slots_of - held.sum(axis=0)
    spare = problem.replicas - int(copies.sum() - problem.experts)
    hot = np.flatnonzero(held[:, busiest])
    for expert in hot[np.argsort(-each[hot], kind="stable")].tolist():
        for gpu in np.argsort(ranks, kind="stable").tolist():
            if held[expert, gpu] or gpu == busiest:
                continue
            if room[gpu] > 0:
                plans.append(_changed(held, [(expert, busiest, False), (expert, gpu, True)]))
                if spare > 0:
                    plans.append(_changed(held, [(expert, gpu, True)]))
            for other in np.flatnonzero(held[:, gpu]).tolist():
                if copies[other] > 1 and (room[gpu] == 0 or spare <= 0):
                    plans.append(_changed(held, [(other, gpu, False), (expert, gpu, True)]))
                if not held[other, busiest] and each[other] < each[expert]:
                    plans.append(
                        _changed(
                            held,
                            [
                                (expert, busiest, False),
                                (expert, gpu, True),
                                (other, gpu, False),
                                (other, busiest, True),
                            ],
                        )
                    )
    best: _Move | None = None
    value = NEGLIGIBLE * state.objective
    now = int((held & ~was).sum())
    by_size: dict[int, list[tuple[tuple[int, ...], Bools, int]]] = {}
    for experts, rows in plans:
        new = now + int((rows & ~was[list(experts)]).sum()) - int((held[list(experts)] & ~was[list(experts)]).sum())
        if new - now <= budget:
            by_size.setdefault(len(experts), []).append((experts, rows, new - now))
    for group in by_size.values():
        chosen = _promising(problem, layer, held, ranks, group)
        changed = np.array([plan[0] for plan in chosen])
        held_after = np.array([plan[1] for plan in chosen])
        rows = held_after / held_after.sum(axis=2, keepdims=True)
        gains = -state.change(layer, changed, rows)
        for plan, row, gain in zip(chosen, rows, gains.tolist(), strict=True):
            if gain / max(plan[2], 1) > value:
                value = gain / max(plan[2], 1)
                best = _Move(plan[0], row, gain, plan[2])
    return best


def _promising(
    problem: Problem, layer: int, held: Bools, ranks: Floats, group: list[tuple[tuple[int, ...], Bools, int]]
) -> list[tuple[tuple[int, ...], Bools, int]]:
    """The plans with the least busiest GPU, at most CANDIDATES."""
    if len(group) <= CANDIDATES:
        return group
    experts = np.array([plan[0] for plan in group])
    after = np.array([plan[1] for plan in group])
    now = held[experts]
    delta = after / after.sum(axis=2, keepdims=True) - now / now.sum(axis=2, keepdims=True)
    busiest = (ranks + np.einsum("km,kmg->kg", problem.shares[layer, experts], delta)).max(axis=1)
    return [group[k] for k in np.argsort(busiest, kind="stable")[:CANDIDATES]]


def _changed(held: Bools, changes: list[tuple[int, int, bool]]) -> tuple[tuple[int, ...], Bools]:
    """(experts, their rows) after some copies came or went."""
    experts = tuple(sorted({expert for expert, _, _ in changes}))
    rows = held[list(experts)].copy()
    for expert, gpu, there in changes:
        rows[experts.index(expert), gpu] = there
    return experts, rows


def _charged(
    problem: Problem, old: Bools, new: Bools, expert_bytes: float
) -> tuple[tuple[tuple[int, int, int, int], ...], float]:
    """Arrivals with their cheapest source, and seconds of the busiest port: all ports send and receive at once."""
    links: NDArray[np.float64] = np.array(np.broadcast_to(problem.seconds_per_byte, (problem.gpus, problem.gpus)))
    sending, taking = np.zeros(problem.gpus), np.zeros(problem.gpus)
    arrivals = []
    for layer, expert, target in np.argwhere(new & ~old).tolist():
        sources = np.flatnonzero(old[layer, expert])
        ready = links[sources, target] * expert_bytes + sending[sources]
        source = int(sources[int(np.argmin(ready))])
        sending[source] += links[source, target] * expert_bytes
        taking[target] += links[source, target] * expert_bytes
        arrivals.append((layer, expert, source, target))
    return tuple(arrivals), float(max(sending.max(), taking.max()))


def split_after(problem: Problem, replacement: Replacement) -> Floats:
    """Share of each expert's tokens that its copies take after the replacement, layers x experts x gpus."""
    return split_of(problem, replacement.holds)
