"""FlexSP: lengths in buckets, groups of powers of two, and a mixed-integer program that makes the slowest group fast.

    minimise M  over  A_kg = 0, 1, ...  and  m_g binary     (bucket k of n_k sequences as long as b_k, group g of P_g)
    sum over g of A_kg                       = n_k          every sequence once
    sum over k of b_k A_kg                  <= P_g C m_g    memory
    start + sum over k of T(b_k, P_g) A_kg  <= M            the slowest group
    sum over g of P_g m_g                    = N            all ranks

(arXiv:2412.01523). Groups of one size are alike, so the program can be relaxed to how many there are of each
and what they take together; with M fixed that is m_P M' >= sum over k of T(b_k, P) A_kP, linear in m_P and nearly as
tight as the whole. Its least M by bisection, with every length rounded down, bounds what any grouping reaches, and its
solutions, dealt over their groups longest first, are the groupings that the whole program has to beat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from time import perf_counter
from typing import Any

import numpy as np
import pulp

from planner.errors import PlanError
from planner.sequencegroups import (
    Group,
    GroupCost,
    Partition,
    Round,
    best_static,
    checked,
    least_rounds,
    packed,
    round_s,
    sizes_of,
    work_bound_s,
)

#: Buckets of lengths (the paper's), and of the bound, which can afford more.
BUCKETS, BOUND_BUCKETS = 16, 32
#: Numbers of rounds tried, from the fewest that memory allows (the paper's Blaster).
TRIED_ROUNDS = 5
#: How close bisection comes, and by how much HiGHS's bounds are lowered for its tolerances.
CLOSE, TOLERANCE = 5e-3, 1e-6
#: How close it comes for groups to deal, and what these may take beyond.
COARSE, SLACKS = 0.02, (1.1, 1.05, 1.02)
#: Most variables A_kg for which the whole program is solved; beyond, what it finds in seconds is worse than the dealt.
MOST_VARIABLES = 700


def buckets(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Sorted lengths cut into at most `most` runs with least total of (longest of its run - length), by programming.

    >>> buckets([1, 2, 9, 10, 10], 2)
    [[1, 2], [9, 10, 10]]
    """
    values, counts = np.unique(np.asarray(lengths), return_counts=True)
    n = len(values)
    before = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.concatenate([[0], np.cumsum(counts * values)])
    # waste[i, j] of values i to j in one run
    waste = (before[None, 1:] - before[:-1, None]) * values[None] - (tokens[None, 1:] - tokens[:-1, None])
    waste = np.where(np.tri(n, k=-1, dtype=bool), np.inf, waste.astype(float))
    least, cuts = waste[0], []
    for _ in range(min(most, n) - 1):
        joined = np.vstack([least[:-1, None] + waste[1:]]) if n > 1 else waste
        start = joined.argmin(axis=0) + 1
        better = joined.min(axis=0) < least
        cuts.append(np.where(better, start, 0))
        least = np.where(better, joined.min(axis=0), least)
    ends = [n]
    for cut in reversed(cuts):
        if cut[ends[-1] - 1] > 0:
            ends.append(int(cut[ends[-1] - 1]))
    edges = [0, *reversed(ends)]
    return [np.repeat(values[a:b], counts[a:b]).tolist() for a, b in pairwise(edges)]


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """How many groups there are of each size, and what those of each size take of each bucket together."""

    groups: dict[int, int]
    taken: dict[tuple[int, int], int]


def _relaxed(
    counts: Sequence[int], lengths: Sequence[float], ranks: int, cost: GroupCost, limit_s: float, seconds: float
) -> _Relaxed | None:
    """Groups that finish within `limit_s` when those of one size share their work; None if there are none."""
    room = limit_s - cost.start_s
    problem = pulp.LpProblem("shared", pulp.LpMinimize)
    m = {p: problem.add_variable(f"m_{p}", lowBound=0, upBound=ranks // p, cat=pulp.LpInteger) for p in sizes_of(ranks)}
    a: dict[tuple[int, int], Any] = {}
    for p in m:
        work_s = cost.sequence_s(lengths, p)
        for k, (n, s) in enumerate(zip(counts, lengths, strict=True)):
            if s <= cost.tokens_per_rank * p and work_s[k] <= room:
                a[k, p] = problem.add_variable(f"a_{k}_{p}", lowBound=0, upBound=n, cat=pulp.LpInteger)
        problem += _total((work_s[k] / room, a[k, q]) for k, q in a if q == p) <= m[p], f"work_{p}"
        cap = cost.tokens_per_rank * p
        problem += _total((lengths[k] / cap, a[k, q]) for k, q in a if q == p) <= m[p], f"memory_{p}"
    for k, n in enumerate(counts):
        parts = [a[k, p] for p in m if (k, p) in a]
        if not parts:
            return None
        problem += pulp.lpSum(parts) == n, f"all_{k}"
    problem += _total((p, m[p]) for p in m) == ranks, "ranks"
    status = problem.solve(pulp.HiGHS(msg=False, timeLimit=seconds, gapRel=0.0))
    if pulp.LpStatus[status] == "Infeasible":
        return None
    if pulp.LpStatus[status] != "Optimal":
        raise TimeoutError
    return _Relaxed(
        {p: round(x.value()) for p, x in m.items() if round(x.value())},
        {at: round(x.value()) for at, x in a.items() if round(x.value())},
    )


def _total(parts: Iterable[tuple[float, Any]]) -> Any:
    """Sum of coefficient times variable."""
    return pulp.LpAffineExpression([(variable, float(a)) for a, variable in parts])


def bound_s(lengths: Sequence[int], ranks: int, cost: GroupCost, *, seconds: float = 5.0) -> float:
    """No groups of powers of two do one round of `lengths` in less; bisection upwards from the least work."""
    deadline = perf_counter() + seconds
    runs = buckets(lengths, BOUND_BUCKETS)
    counts, floors = [len(run) for run in runs], [run[0] for run in runs]
    low = work_bound_s(lengths, ranks, cost)
    high = inf
    limit = low * (1.0 + CLOSE)
    while high > low * (1.0 + CLOSE) and perf_counter() < deadline:
        try:
            solution = _relaxed(counts, floors, ranks, cost, limit, deadline - perf_counter())
        except TimeoutError:
            break
        low, high = (limit, high) if solution is None else (low, limit)
        limit = 1.25 * low if high == inf else 0.5 * (low + high)
    return low * (1.0 - TOLERANCE)


def _candidates(
    runs: Sequence[Sequence[int]], ranks: int, cost: GroupCost, low: float, deadline: float
) -> Iterator[Round]:
    """Groups dealt from what the relaxed program reaches, by bisection upwards from `low` and then with some slack."""
    counts, means = [len(run) for run in runs], [sum(run) / len(run) for run in runs]
    high, limit, slacks = inf, low * (1.0 + CLOSE), list(SLACKS)
    while perf_counter() < deadline:
        try:
            solution = _relaxed(counts, means, ranks, cost, limit, deadline - perf_counter())
        except TimeoutError:
            return
        dealt = None if solution is None else _dealt(solution, runs, cost)
        if dealt is not None:
            yield dealt
        if high > low * (1.0 + COARSE):
            low, high = (limit, high) if solution is None else (low, limit)
            limit = 1.2 * low if high == inf else 0.5 * (low + high)
        if high <= low * (1.0 + COARSE):
            if not slacks:
                return
            limit = high * slacks.pop()


def _dealt(solution: _Relaxed, runs: Sequence[Sequence[int]], cost: GroupCost) -> Round | None:
    """A relaxed solution's sequences dealt over its groups, longest first; None where memory does not allow it.

    Of each bucket the longest sequences go to the largest groups.
    """
    taken: dict[int, list[int]] = {p: [] for p in solution.groups}
    for k, run in enumerate(runs):
        rest = sorted(run, reverse=True)
        for p in sorted(solution.groups, reverse=True):
            n = solution.taken.get((k, p), 0)
            taken[p] += rest[:n]
            rest = rest[n:]
    found: list[Group] = []
    for p, count in solution.groups.items():
        bins = packed(sorted(taken[p], reverse=True), count, p, cost)
        if bins is None:
            return None
        found += [Group(p, tuple(b)) for b in bins]
    return tuple(found)


def one_round(lengths: Sequence[int], ranks: int, cost: GroupCost, *, seconds: float = 5.0) -> tuple[Round, float]:
    """(groups for one round of `lengths`, seconds that no groups beat). Raises PlanError for too many tokens."""
    deadline = perf_counter() + seconds
    low = bound_s(lengths, ranks, cost, seconds=seconds / 2)
    best = _dealt_round(lengths, ranks, cost, low, perf_counter() + seconds / 4)
    runs = buckets(lengths, BUCKETS)
    if len(runs) * (2 * ranks - 1) <= MOST_VARIABLES:
        whole, proved = _whole(runs, ranks, cost, deadline - perf_counter())
        if whole is not None:
            best = min(best, whole, key=lambda groups: round_s(groups, cost))
        if all(run[0] == run[-1] for run in runs):
            low = max(low, proved)
    return tuple(sorted((g for g in best if g.lengths), key=lambda g: -g.ranks)), low


def _dealt_round(lengths: Sequence[int], ranks: int, cost: GroupCost, low: float, deadline: float) -> Round:
    """The best of the candidates and of equal groups. Raises PlanError where none holds the tokens."""
    rounds = list(_candidates(buckets(lengths, BUCKETS), ranks, cost, low, deadline))
    for size in sizes_of(ranks):
        bins = packed(sorted(lengths, reverse=True), ranks // size, size, cost)
        if bins is not None:
            rounds.append(tuple(Group(size, tuple(b)) for b in bins))
    if not rounds:
        raise PlanError(f"{sum(lengths)} tokens on {ranks} ranks in one round: expected fewer; take more rounds")
    return min(rounds, key=lambda groups: round_s(groups, cost))


def _whole(runs: Sequence[Sequence[int]], ranks: int, cost: GroupCost, seconds: float) -> tuple[Round | None, float]:
    """(groups by the program at the head of this file, None if it found none; its bound for lengths rounded up)."""
    counts, tops = [len(run) for run in runs], [run[-1] for run in runs]
    problem = pulp.LpProblem("groups", pulp.LpMinimize)
    slowest = problem.add_variable("slowest", lowBound=0)
    problem += slowest
    groups = [(p, i) for p in sizes_of(ranks) for i in range(ranks // p)]
    m = {g: problem.add_variable(f"m_{g[0]}_{g[1]}", cat=pulp.LpBinary) for g in groups}
    a: dict[tuple[int, tuple[int, int]], Any] = {}
    for g in groups:
        p, i = g
        cap, work_s = cost.tokens_per_rank * p, cost.sequence_s(tops, p)
        for k, n in enumerate(counts):
            if tops[k] <= cap:
                a[k, g] = problem.add_variable(f"a_{k}_{p}_{i}", lowBound=0, upBound=n, cat=pulp.LpInteger)
                problem += a[k, g] <= n * m[g]
        own = [k for k in range(len(counts)) if (k, g) in a]
        problem += _total((tops[k] / cap, a[k, g]) for k in own) <= m[g], f"memory_{p}_{i}"
        problem += cost.start_s + _total((work_s[k], a[k, g]) for k in own) <= slowest, f"work_{p}_{i}"
        if i:
            problem += m[g] <= m[p, i - 1], f"alike_{p}_{i}"
    for k, n in enumerate(counts):
        problem += pulp.lpSum(x for (j, _), x in a.items() if j == k) == n, f"all_{k}"
    problem += _total((p, m[p, i]) for p, i in groups) == ranks, "ranks"
    status = problem.solve(pulp.HiGHS(msg=False, timeLimit=max(seconds, 0.1), gapRel=TOLERANCE / 10))
    proved = float(problem.solverModel.getInfo().mip_dual_bound) * (1.0 - TOLERANCE)
    proved = proved if -inf < proved < inf else 0.0
    if pulp.LpStatus[status] != "Optimal":
        return None, proved
    rest = [sorted(run, reverse=True) for run in runs]
    found = []
    for g in sorted(groups, reverse=True):
        mine: list[int] = []
        for k in range(len(counts)):
            n = round(a[k, g].value()) if (k, g) in a else 0
            mine += rest[k][:n]
            rest[k] = rest[k][n:]
        if m[g].value() > 0.5:
            found.append(Group(g[0], tuple(mine)))
    return tuple(found), proved


def cut(ordered: Sequence[int], rounds: int) -> list[list[int]]:
    """Sorted lengths in `rounds` runs of about equal tokens; like lengths share a round."""
    ends = np.cumsum(ordered)
    index = np.minimum((ends - np.asarray(ordered) / 2) * rounds / ends[-1], rounds - 1).astype(int)
    parts = [[s for s, at in zip(ordered, index, strict=True) if at == i] for i in range(rounds)]
    return [part for part in parts if part]


def flexsp(lengths: Sequence[int], ranks: int, cost: GroupCost, *, seconds: float = 20.0) -> Partition:
    """A batch in rounds of groups that suit their lengths; the numbers of rounds tried share half of `seconds`.

    `bound_s` covers the groups of the rounds chosen, not what is in which round. Static groups are taken where nothing
    faster is found. Raises PlanError as `checked`.
    """
    begun = perf_counter()
    ordered = checked(lengths, ranks, cost)
    fallback = best_static(ordered, ranks, cost)
    least = least_rounds(ordered, ranks, cost)
    tried: list[tuple[float, int]] = []
    for count in range(least, least + len(ordered)):
        parts = cut(ordered, count)
        each = seconds / 2 / TRIED_ROUNDS / len(parts)
        try:
            found = [
                _dealt_round(part, ranks, cost, work_bound_s(part, ranks, cost), perf_counter() + each)
                for part in parts
            ]
        except PlanError:
            continue
        tried.append((sum(round_s(groups, cost) for groups in found), count))
        if len(tried) == TRIED_ROUNDS:
            break
    best = fallback.seconds, fallback.rounds, fallback.bound_s
    if tried:
        parts = cut(ordered, min(tried)[1])
        left = seconds - (perf_counter() - begun)
        closer = [one_round(part, ranks, cost, seconds=max(left, 0.5) / len(parts)) for part in parts]
        total = sum(round_s(groups, cost) for groups, _ in closer)
        if total < best[0]:
            best = total, tuple(groups for groups, _ in closer), sum(low for _, low in closer)
    return Partition("FlexSP", best[1], best[0], best[2], perf_counter() - begun)
