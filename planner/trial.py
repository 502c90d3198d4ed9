"""What one simulation says about a plan at one rate, and the highest rate at which it keeps its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from simulator.deployment import Deployment
from simulator.log import Log
from simulator.metrics import Limit, attainment
from simulator.result import latencies
from simulator.simulate import Overrun, collect, run
from simulator.workload import Requests


@dataclass(frozen=True, slots=True)
class Trial:
    """One simulated rate.

    rate_per_s      requests offered per second
    meets           whether every limit was kept and no request rejected
    goodput_per_s   requests that kept every limit, over the time from the first arrival to the last finish
    output_tokens_per_s   over the same time
    values_s        the statistic each limit speaks of, NaN where the run was stopped early
    mean_tpot_s, mean_e2e_s   over the requests served
    joules_per_token   energy of the devices in use per output token; NaN where it was not asked for
    """

    rate_per_s: float
    meets: bool
    goodput_per_s: float
    output_tokens_per_s: float
    values_s: tuple[float, ...]
    mean_tpot_s: float
    mean_e2e_s: float
    joules_per_token: float = float("nan")


def attempt(
    deployment: Deployment, requests: Requests, rate_per_s: float, limits: Sequence[Limit], seed: int, *, energy: bool = False
) -> Trial:
    """Simulate the requests, their arrivals stretched to `rate_per_s`.

    A run is stopped as soon as so many requests have broken a limit that the rest cannot make up for it.
    """
    scaled = requests.scaled_to_rate(rate_per_s)
    count = len(scaled)
    arrival = scaled.arrival_s

    def hopeless(log: Log) -> bool:
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
    except Overrun:
        return _failed(rate_per_s, limits)
    trial = judge(log, scaled, limits, rate_per_s)
    if energy and trial.output_tokens_per_s:
        totals = collect(deployment, scaled, log, seed).totals
        trial = replace(trial, joules_per_token=totals.energy_j / (trial.output_tokens_per_s * totals.makespan_s))
    return trial


def _failed(rate_per_s: float, limits: Sequence[Limit]) -> Trial:
    """A run that was stopped or served nobody."""
    nan = float("nan")
    return Trial(rate_per_s, False, 0.0, 0.0, tuple(nan for _ in limits), nan, nan)


def judge(log: Log, requests: Requests, limits: Sequence[Limit], rate_per_s: float) -> Trial:
    """The trial a finished run amounts to."""
    first, finish = np.array(log.first_token_s), np.array(log.finish_s)
    ttft, tpot, e2e = latencies(log.arrival_s, first, finish, requests.output_tokens)
    served = np.isfinite(finish)
    if not served.any():
        return _failed(rate_per_s, limits)
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
    at_least_per_s: float = 0.0,
    tolerance: float = 0.02,
) -> tuple[Trial | None, list[Trial]]:
    """The best trial within the limits, and all trials made, by bisection with the same requests at every rate.

    at_most_per_s    a rate no plan of this kind can keep up with
    at_least_per_s   a rate worth beating: if the limits break there, the answer is None after one trial
    tolerance        relative width at which the bisection ends
    """
    trials: list[Trial] = []

    def meets(rate: float) -> bool:
        trials.append(attempt(deployment, requests, rate, limits, seed))
        return trials[-1].meets

    low, high = 0.0, at_most_per_s
    if at_least_per_s > 0:
        if at_least_per_s >= high or not meets(at_least_per_s):
            return None, trials
        low = at_least_per_s
    else:
        # Find a rate that is kept, halving from the bound: limits that cannot be kept end this in a few trials.
        rate = high * 0.7
        while not meets(rate):
            high = rate
            rate /= 2
            if rate < at_most_per_s / 64:
                return None, trials
        low = rate
    while high - low > tolerance * low:
        middle = (low + high) / 2
        if meets(middle):
            low = middle
        else:
            high = middle
    kept = [trial for trial in trials if trial.meets]
    return max(kept, key=lambda trial: trial.goodput_per_s), trials
