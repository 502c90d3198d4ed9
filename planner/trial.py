"""What one simulation says about a plan at one rate, and the highest rate at which it keeps its limits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.plan import Pool
from planner.schedules import DEFAULTS
from simulator.collect import collect
from simulator.deployment import Deployment
from simulator.limits import Limit, attainment
from simulator.log import Log
from simulator.result import latencies
from simulator.simulate import Overrun, run
from simulator.workload import Requests


@dataclass(frozen=True, slots=True)
class Extremes:
    """How far a run went: which limits of the scheduler it felt, the most sequences, and the blocks they reserved."""

    limited: frozenset[str] = frozenset()
    peak_seqs: int = 0
    peak_blocks: int = 0

    @classmethod
    def of(cls, log: Log) -> Extremes:
        """Of a run; a request that was rejected might have run with more KV blocks or a larger token budget."""
        limited = log.limited | {"kv", "tokens"} if log.rejected else log.limited
        return cls(frozenset(limited), log.peak_seqs, log.peak_blocks)

    def same_run(self, old: Pool, old_blocks: int, new: Pool, new_blocks: int) -> bool:
        """Whether a run of `old` with these extremes is, event for event, a run of `new`, cut and scheduled alike."""
        if any(getattr(old, name) != getattr(new, name) for name in DEFAULTS):
            return False  # other chunks, groups of layers, orders or overlap
        if old_blocks != new_blocks and ("kv" in self.limited or new_blocks < self.peak_blocks):
            return False
        if old_blocks != new_blocks and new.prefix_caching != "off":
            return False  # what is not reserved keeps prefixes
        if old.max_seqs != new.max_seqs and ("seqs" in self.limited or new.max_seqs < self.peak_seqs):
            return False
        return old.token_budget == new.token_budget or (
            "tokens" not in self.limited and new.token_budget > old.token_budget
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """One simulated rate.

    rate_per_s      requests offered per second
    meets           whether every limit was kept and no request rejected
    goodput_per_s   requests that kept every limit, over the time from the first arrival to the last finish
    output_tokens_per_s   over the same time
    values_s        the statistic each limit speaks of, NaN where the run was stopped early
    mean_tpot_s, mean_e2e_s   over the requests served
    extremes        what held the schedulers back and the most they had in use
    joules_per_token   energy of the devices in use per output token; None where it was not asked for
    settled         where the highest rate was looked for: whether a rate hardly higher is known to break a limit
    """

    rate_per_s: float
    meets: bool
    goodput_per_s: float
    output_tokens_per_s: float
    values_s: tuple[float, ...]
    mean_tpot_s: float
    mean_e2e_s: float
    extremes: Extremes
    joules_per_token: float | None = None
    settled: bool = True


def attempt(
    deployment: Deployment,
    requests: Requests,
    rate_per_s: float,
    limits: Sequence[Limit],
    seed: int,
    *,
    energy: bool = False,
) -> Trial:
    """Simulate the requests, their arrivals stretched to `rate_per_s`.

    A run is stopped as soon as so many requests have broken a limit that the rest cannot make up for it.
    """
    scaled = requests.scaled_to_rate(rate_per_s)
    count = len(scaled)
    arrival = scaled.arrival_s

    looked_at = 0

    def hopeless(log: Log) -> bool:
        nonlocal looked_at
        if log.events < looked_at + count // 4:
            return False
        looked_at = log.events
        first = np.array(log.first_token_s)
        for limit in limits:
            allowed = _may_exceed(limit, count)
            if limit.metric == "ttft" and np.count_nonzero(first - arrival > limit.seconds) > allowed:
                return True
            if limit.metric == "tpot":
                finish = np.array(log.finish_s)
                gaps = np.maximum(scaled.output_tokens - 1, 1)
                if np.count_nonzero((finish - first) / gaps > limit.seconds) > allowed:
                    return True
        return False

    try:
        log = run(deployment, scaled, seed, stop=hopeless, record=energy)
    except Overrun as overrun:
        return _failed(rate_per_s, limits, Extremes.of(overrun.log))
    trial = judge(log, scaled, limits, rate_per_s)
    if energy and trial.output_tokens_per_s:
        totals = collect(deployment, scaled, log, seed).totals
        trial = replace(trial, joules_per_token=totals.energy_j / (trial.output_tokens_per_s * totals.makespan_s))
    return trial


def _failed(rate_per_s: float, limits: Sequence[Limit], extremes: Extremes) -> Trial:
    """A run that was stopped or served nobody."""
    nan = float("nan")
    return Trial(rate_per_s, False, 0.0, 0.0, tuple(nan for _ in limits), nan, nan, extremes)


def judge(log: Log, requests: Requests, limits: Sequence[Limit], rate_per_s: float) -> Trial:
    """The trial a finished run amounts to."""
    first, finish = np.array(log.first_token_s), np.array(log.finish_s)
    ttft, tpot, e2e = latencies(log.arrival_s, first, finish, requests.output_tokens)
    served = np.isfinite(finish)
    if not served.any():
        return _failed(rate_per_s, limits, Extremes.of(log))
    makespan_s = float(finish[served].max() - log.arrival_s.min())
    reached = attainment(ttft, tpot, e2e, limits)
    return Trial(
        rate_per_s=rate_per_s,
        meets=reached.met and bool(served.all()),
        goodput_per_s=reached.good / makespan_s if makespan_s else float("inf"),
        output_tokens_per_s=float(requests.output_tokens[served].sum()) / makespan_s if makespan_s else float("inf"),
        values_s=reached.values_s,
        mean_tpot_s=float(np.nanmean(tpot)) if np.isfinite(tpot).any() else 0.0,
        mean_e2e_s=float(e2e[served].mean()),
        extremes=Extremes.of(log),
    )


def _may_exceed(limit: Limit, count: int) -> float:
    """How many of `count` requests may be above the limit's seconds while its statistic is not."""
    if limit.quantile is None:
        return float("inf")
    return count - int(np.floor(limit.quantile * (count - 1))) - 1


def capacity(
    deployment: Deployment,
    requests: Requests,
    limits: Sequence[Limit],
    seed: int,
    *,
    at_most_per_s: float,
    guess_per_s: float,
    beat: bool = False,
    tolerance: float = 0.02,
    until_s: float = float("inf"),
) -> tuple[Trial | None, list[Trial]]:
    """The trial at the highest rate within the limits, and all trials made: bisection with the same requests.

    at_most_per_s   a rate no plan of this kind can keep up with
    guess_per_s     where to start
    beat            whether breaking a limit at the guess settles it: the answer then is None after one trial
    tolerance       relative width at which the bisection ends
    until_s         value of time.perf_counter() from which on a rate that was kept is good enough
    """
    trials: list[Trial] = []

    def meets(rate: float) -> bool:
        trials.append(attempt(deployment, requests, rate, limits, seed))
        return trials[-1].meets

    low, high = 0.0, at_most_per_s
    rate = min(guess_per_s, at_most_per_s)
    if meets(rate):
        low = rate
        step = 1.1
        while low < high and time.perf_counter() < until_s and meets(min(high, low * step)):
            low = min(high, low * step)
            step = min(2.0, step * step)
        high = min(high, low * step)
    elif beat:
        return None, trials
    else:
        step = 1.15
        while not low:
            high, rate = rate, rate / step
            step = min(2.0, step * step)
            if rate < at_most_per_s / 256 or (len(trials) > 3 and time.perf_counter() > until_s):
                return None, trials
            if meets(rate):
                low = rate
    while high - low > tolerance * low and time.perf_counter() < until_s:
        middle = (low + high) / 2
        if meets(middle):
            low = middle
        else:
            high = middle
    best = max((trial for trial in trials if trial.meets), key=lambda trial: trial.goodput_per_s)
    return replace(best, settled=high - low <= tolerance * low), trials
