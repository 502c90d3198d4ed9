"""How busy is the port of the GPU that holds the hottest expert, whatever else is placed where?

What an expert sends to other groups is its share less what can stay: by a fractional knapsack, over the multiplier l
>= 0,

    stay_e <= sum_f (F_ef - l q_f)^+ + l k M_(l+1)       (k GPUs a group, M the busiest GPU's share)
    out_e  >= sum_f F_ef - stay_e,

a line in M for the l that is best at the least M. With r replicas the copies n of the r + 1 experts that send most
are chosen to make the largest out_e / n least (one more for the largest, r times); some copy sends that much, and so
does its port. Received shares are the same seen from the layer after. For GPUs whose ports are alike or faster than
the fastest link says, seconds are shares times that link's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planner.placement import Floats, Problem

Cut = tuple[Floats, Floats, Floats]


def hottest_port(problem: Problem, groups: NDArray[np.intp], seconds: float, least: Floats) -> list[Cut]:
    """Cuts (const, here, there): a pair's busiest port takes at least const - here M_l - there M_(l+1) seconds.

    groups     of the GPUs; what leaves a group passes the ports
    seconds    of a port if all of a layer's choices passed it, at least
    """
    assert problem.joint is not None
    size = int(np.bincount(groups).max())
    none = np.zeros(problem.layers - 1)
    out = [
        _least_sent(problem, joint, q, m, size)
        for joint, q, m in zip(problem.joint, problem.shares[1:], least[1:], strict=True)
    ]
    into = [
        _least_sent(problem, joint.T, p, m, size)
        for joint, p, m in zip(problem.joint, problem.shares, least, strict=False)
    ]
    (send, send_slope), (take, take_slope) = (np.array(side).T * seconds for side in (out, into))
    return [(send, none, send_slope), (take, take_slope, none)]


def _least_sent(problem: Problem, flow: Floats, other: Floats, busiest: float, size: int) -> tuple[float, float]:
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
    top = np.argsort(-sent)[: problem.replicas + 1]
    copies = np.ones(len(top))
    for _ in range(problem.replicas):
        each = np.where(copies < problem.gpus, sent[top] / copies, -1.0)
        copies[int(each.argmax())] += 1
    steepest = float(slope[top].max())
    return float((sent[top] / copies).max()) + steepest * busiest, steepest
