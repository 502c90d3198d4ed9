"""How busy is the port of the GPU that holds the hottest expert, whatever else is placed where?

What an expert sends to other groups is its share less what can stay: by a fractional knapsack, over the multiplier l
>= 0,

    stay_e <= sum_f (F_ef - l q_f)^+ + l k M_(l+1)       (k GPUs a group, M the busiest GPU's share)
    out_e  >= sum_f F_ef - stay_e,

a line in M for the l that is best at the least M. Without replicas the hottest expert's GPU holds as many others, at
least those that send least, as there are too few slots elsewhere; their sums count too. With r replicas the copies n of
the r + 1 experts that send most are chosen to make the largest out_e / n least (one more for the largest, r times);
some copy sends that much, and so does its port. Received shares are the same seen from the layer after. For GPUs whose
ports are alike or faster than the fastest link says, seconds are shares times that link's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.placement import Floats, Problem

Cut = tuple[Floats, Floats, Floats]
#: Points of the busiest GPU's share at which the slope of a cut is checked.
GRID = 120


def hottest_port(problem: Problem, groups: NDArray[np.intp], seconds: float, least: Floats, most: Floats) -> list[Cut]:
    """Cuts (const, here, there): a pair's busiest port takes at least const - here M_l - there M_(l+1) seconds.

    groups     of the GPUs; what leaves a group passes the ports
    seconds    of a port if all of a layer's choices passed it, at least
    least      share of the busiest GPU of each layer at least, where cuts are best
    most       the same at most
    """
    assert problem.joint is not None
    size = int(np.bincount(groups).max())
    none = np.zeros(problem.layers - 1)
    out = [
        _least_sent(problem, joint, q, m, top, size)
        for joint, q, m, top in zip(problem.joint, problem.shares[1:], least[1:], most[1:], strict=True)
    ]
    into = [
        _least_sent(problem, joint.T, p, m, top, size)
        for joint, p, m, top in zip(problem.joint, problem.shares, least, most, strict=False)
    ]
    (send, send_slope), (take, take_slope) = (np.array(side).T * seconds for side in (out, into))
    return [(send, none, send_slope), (take, take_slope, none)]


def _least_sent(
    problem: Problem, flow: Floats, other: Floats, busiest: float, most: float, size: int
) -> tuple[float, float]:
    """(const, slope) of what some copy sends at least, const - slope M."""
    ratio = np.divide(flow, other, out=np.zeros_like(flow), where=other > 0)
    order = np.argsort(-ratio, axis=1)
    filled = np.cumsum(other[order], axis=1)
    last = np.minimum((filled < size * busiest).sum(axis=1), flow.shape[1] - 1)
    rows = np.arange(len(flow))
    critical = ratio[rows, order[rows, last]]
    kept = np.maximum(flow - critical[:, None] * other, 0.0).sum(axis=1)
    const, slope = flow.sum(axis=1) - kept, critical * size
    sent = const - slope * busiest
    if not problem.replicas:
        return _with_neighbours(sent, slope, busiest, most, neighbours(problem))
    top = np.argsort(-sent)[: problem.replicas + 1]
    copies = np.ones(len(top))
    for _ in range(problem.replicas):
        each = np.where(copies < problem.gpus, sent[top] / copies, -1.0)
        copies[int(each.argmax())] += 1
    steepest = float(slope[top].max())
    return float((sent[top] / copies).max()) + steepest * busiest, steepest


def neighbours(problem: Problem) -> int:
    """Other experts at least on any expert's GPU without replicas: all free slots may be on its GPU."""
    useful = np.minimum(problem.slots_of, problem.experts)
    return max(0, int(useful.min() - 1 - (useful.sum() - problem.experts)))


def _with_neighbours(sent: Floats, slope: Floats, busiest: float, most: float, others: int) -> tuple[float, float]:
    """(const, slope) of what the GPU of the expert that sends most sends at least.

    sent, slope   of every expert: for M = busiest + d it sends at least sent - slope d, and never less than nothing
    most          no M is larger

    The least sum phi(d) of the others is a sum of smallest lines, so concave as long as none is below 0. The line's
    slope is the steepest (phi(0) - phi(d)) / d: that of the first point of a geometric grid up to there, and, as phi
    falls, at most (phi(0) - phi(next point)) / d beyond.
    """
    slope = np.where(sent > 0, slope, 0.0)
    sent = np.maximum(sent, 0.0)
    first = int(sent.argmax())

    def least(lines: Floats) -> Floats:
        rest = np.sort(np.delete(lines, first, axis=1), axis=1)[:, :others].sum(axis=1)
        return np.asarray(lines[:, first] + rest)

    at = float(least(sent[None])[0])
    if most <= busiest:
        return at, 0.0
    grid = (most - busiest) * np.geomspace(1e-3, 1.0, GRID)
    lines = sent - slope * grid[:, None]
    fallen = at - least(np.maximum(lines, 0.0))
    steepest = max(float((at - least(lines[:1]))[0] / grid[0]), float((fallen[1:] / grid[:-1]).max()), 0.0)
    return at + steepest * busiest, steepest
