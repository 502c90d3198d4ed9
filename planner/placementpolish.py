"""Which swaps of two copies lower the whole objective, everything they touch told exactly?

A copy that leaves GPU g for h changes the load and the sending and receiving of g and h in its layer, and, by what it
exchanges with each GPU of the layers around, their sending and receiving. For all swaps of a copy on a busiest GPU (or
one that makes a neighbour's port the busiest) with any other copy of the layer the changes are

    load, sent, received of g and h:  those of the two copies;
    sent from g' in the layer before: (part_i into_g'i - part_j into_g'j) (s_g'h - s_g'g), and so for the layer after,

and each of the three maxima (load; ports of the pair before; ports of the pair after) is smoothed to
m + tau m log sum exp((x - m) / (tau m)), so that the second busiest counts too. The best swap is done while one helps.
Only the kind of ports that is slower, between nodes where there are several, is looked at.
"""

from __future__ import annotations

import time

import numpy as np

from planner.placement import Bools, Floats, Indices, Problem, dispatch_s, load_s
from planner.placementbaselines import EMPTY, seated

#: Softness of the maxima, sweep by sweep.
SOFTNESS = (0.02, 0.01, 0.005)
#: Sweeps and swaps per visit of a layer at most; seats tried for each busy neighbour.
SWEEPS, SWAPS, DRAWN = 12, 8, 8
#: A sweep that gains less than this part of the objective is the last.
WORTHWHILE = 3e-4
#: Gains below this part of a layer's seconds are rounding.
LEAST = 1e-7


def polished(problem: Problem, holds: Bools, deadline: float) -> Bools:
    """The placement after sweeps of swaps; the best met by the exact objective, never a worse one."""
    work = _Polish(problem, holds)
    last = work.best_s
    for sweep in range(SWEEPS):
        softness = SOFTNESS[min(sweep, len(SOFTNESS) - 1)]
        order = range(problem.layers)
        for layer in reversed(order) if sweep % 2 else order:
            if time.perf_counter() > deadline:
                break
            work.improve(layer, softness)
        work.keep()
        if time.perf_counter() > deadline or (sweep >= len(SOFTNESS) and last - work.best_s < WORTHWHILE * last):
            break
        last = work.best_s
    return work.best


class _Polish:
    """Items on seats with their split."""

    def __init__(self, problem: Problem, holds: Bools) -> None:
        self.problem = problem
        self.copies = holds.sum(axis=2)
        self.split = np.asarray(holds / self.copies[..., None])
        self.seats = np.repeat(np.arange(problem.gpus), np.minimum(problem.slots_of, problem.experts))
        self.items = np.array([seated(layer, self.seats) for layer in holds])
        near = problem.node_of[:, None] == problem.node_of
        far = problem.link_s * ~near
        self.links = far if far.any() else problem.link_s
        self.best, self.best_s = holds, np.inf
        self.keep()

    def keep(self) -> None:
        """Remember the placement if it is the best so far."""
        problem = self.problem
        load = load_s(problem, np.einsum("le,leg->lg", problem.shares, self.split)).sum()
        traffic = 0.0
        if problem.joint is not None:
            for k, joint in enumerate(problem.joint):
                traffic += float(dispatch_s(problem, self.split[k].T @ joint @ self.split[k + 1]))
        if load + traffic < self.best_s:
            self.best, self.best_s = self.split > 0, float(load + traffic)

    def improve(self, layer: int, softness: float) -> None:
        """Swaps in one layer."""
        problem, links, seats, items = self.problem, self.links, self.seats, self.items[layer]
        assert problem.joint is not None
        gpus = problem.gpus
        copies = self.copies[layer]
        before, after = layer > 0, layer < problem.layers - 1
        zero = np.zeros((problem.experts, gpus))
        into = problem.joint[layer - 1].T @ self.split[layer - 1] if before else zero  # experts x gpus
        out = problem.joint[layer] @ self.split[layer + 1] if after else zero
        real = items >= 0
        expert = np.where(real, items, 0)
        part = np.where(real, 1.0 / copies[expert], 0.0)[:, None]
        into, out = part * into[expert], part * out[expert]  # seats x gpus
        load = problem.compute_s * part[:, 0] * problem.shares[layer, expert]
        sends, takes = out @ links.T, into @ links  # seats x gpus: its own port's seconds if it sat there
        rows = np.arange(len(seats))
        held = self.split[layer] > 0
        item = items.copy()
        swapped = False
        for _ in range(SWAPS):
            at = np.zeros((gpus, len(seats)))
            at[seats, rows] = 1.0
            loads = at @ load
            sent, taken = at @ sends[rows, seats], at @ takes[rows, seats]
            reach = links[:, seats]
            sent_before = (into.T * reach).sum(axis=1)  # by GPUs of the layer before
            taken_after = (out.T * links[seats].T).sum(axis=1)
            first = self._candidates(loads, sent, taken, sent_before, taken_after, into, out)
            g, h = seats[first][:, None], seats[None]
            i = first[:, None]
            change = _soft(loads, None, None, (load[None] - load[i], load[i] - load[None]), g, h, softness)
            if after:
                mine = sends[rows, seats]
                delta = (
                    sends[rows[None], g] - mine[i],  # j now at g
                    sends[i, h] - mine[None],
                )
                other = (out[first][:, None] - out[None]) * (links[seats][None] - links[seats[first]][:, None])
                change = change + _soft(sent, taken_after, other, delta, g, h, softness)
            if before:
                mine = takes[rows, seats]
                delta = (takes[rows[None], g] - mine[i], takes[i, h] - mine[None])
                other = (into[first][:, None] - into[None]) * (links.T[seats][None] - links.T[seats[first]][:, None])
                change = change + _soft(taken, sent_before, other, delta, g, h, softness)
            bad = g == h
            if copies.max() > 1:
                safe = np.maximum(item, 0)
                bad = bad | (held[safe[first]][:, seats] & (item[first] >= 0)[:, None])
                bad = bad | (held[safe][:, seats[first]].T & (item >= 0)[None])
            change[np.broadcast_to(bad, change.shape)] = np.inf
            x, j = np.unravel_index(int(change.argmin()), change.shape)
            if not change[x, j] < -LEAST * float(loads.max()):
                break
            k = int(first[x])
            for seat, other_seat in ((k, int(j)), (int(j), k)):
                if item[seat] != EMPTY:
                    held[item[seat], seats[seat]] = False
                    held[item[seat], seats[other_seat]] = True
            both, turned = [k, int(j)], [int(j), k]
            for kept in (item, load, into, out, sends, takes):
                kept[both] = kept[turned]
            swapped = True
        if swapped:
            self.items[layer] = item
            self.split[layer] = held / copies[:, None]

    def _candidates(
        self, loads: Floats, sent: Floats, taken: Floats, sent_before: Floats, taken_after: Floats, into: Floats,
        out: Floats,
    ) -> Indices:  # fmt: skip
        """Seats worth moving: those of the busiest GPUs, and those that busy GPUs of other layers reach over links."""
        worst = {int(loads.argmax())}
        seats, links = self.seats, self.links
        chosen = []
        if sent.max() >= taken_after.max():
            worst.add(int(sent.argmax()))
        elif taken_after.any():
            g = int(taken_after.argmax())
            chosen.append(np.argsort(-(out[:, g] * links[seats, g]))[:DRAWN])
        if taken.max() >= sent_before.max():
            worst.add(int(taken.argmax()))
        elif sent_before.any():
            g = int(sent_before.argmax())
            chosen.append(np.argsort(-(into[:, g] * links[g, seats]))[:DRAWN])
        chosen.append(np.flatnonzero(np.isin(seats, list(worst))))
        return np.unique(np.concatenate(chosen))


def _soft(
    own: Floats, others: Floats | None, change: Floats | None, delta: tuple[Floats, Floats], g: Indices, h: Indices,
    softness: float,
) -> Floats:  # fmt: skip
    """Change of the smoothed maximum over own (where g and h change by delta) and others (which change by change)."""
    top = float(own.max()) if others is None else max(float(own.max()), float(others.max()))
    if top <= 0:
        return np.zeros(np.broadcast_shapes(delta[0].shape, delta[1].shape))
    scale = softness * top
    now = np.exp((own - top) / scale)
    total = now.sum() - now[g] - now[h]
    total = total + np.exp(np.minimum((own[g] + delta[0] - top) / scale, 300.0))
    total = total + np.exp(np.minimum((own[h] + delta[1] - top) / scale, 300.0))
    before = now.sum()
    if others is not None and change is not None:
        before = before + np.exp((others - top) / scale).sum()
        shifted = (change + (others - top)) / scale
        total = total + np.exp(np.minimum(shifted, 300.0).astype(np.float32).clip(-80, 80)).sum(axis=2)
    return np.asarray(scale * (np.log(np.maximum(total, 1e-300)) - np.log(before)))
