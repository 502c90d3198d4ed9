"""At which request rate does another plan serve better, and what holds each of them back?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.trial import judge
from simulator.deployment import Deployment
from simulator.limits import Limit
from simulator.simulate import run
from simulator.workload import Requests

#: Requests and rates simulated, and how often a crossing is narrowed down.
REQUESTS, RATES, HALVINGS = 2000, 7, 3


@dataclass(frozen=True, slots=True)
class Strain:
    """How near a plan is to its limits at one rate.

    values_s   the statistic of each limit; worst: the largest of them over its limit (above 1: broken)
    limit      which that is
    mean_e2e_s   mean end-to-end time of the requests served
    """

    rate_per_s: float
    values_s: tuple[float, ...]
    worst: float
    limit: Limit
    mean_e2e_s: float


@dataclass(frozen=True, slots=True)
class Crossover:
    """Two plans over the same rates.

    first, second   strains by rate, ascending
    crossings       (rate, whether the second plan is the less strained one above it)
    """

    first: tuple[Strain, ...]
    second: tuple[Strain, ...]
    crossings: tuple[tuple[float, bool], ...]


def strain(deployment: Deployment, requests: Requests, limits: Sequence[Limit], rate_per_s: float, seed: int) -> Strain:
    """Simulate a plan at a rate; a request that is not served breaks every limit."""
    scaled = requests.scaled_to_rate(rate_per_s)
    trial = judge(run(deployment, scaled, seed), scaled, limits, rate_per_s)
    values = [value if np.isfinite(value) else np.inf for value in trial.values_s]
    over = [value / limit.seconds for value, limit in zip(values, limits, strict=True)]
    worst = int(np.argmax(over))
    return Strain(rate_per_s, tuple(values), float(over[worst]), limits[worst], trial.mean_e2e_s)


def crossover(
    first: Deployment, second: Deployment, requests: Requests, limits: Sequence[Limit], most_per_s: float, seed: int
) -> Crossover:
    """Both plans at rates up to `most_per_s`, on the same requests, and where the less strained one changes."""
    some = requests.head(REQUESTS)
    known: dict[tuple[int, float], Strain] = {}

    def at(which: int, rate: float) -> Strain:
        if (which, rate) not in known:
            known[which, rate] = strain((first, second)[which], some, limits, rate, seed)
        return known[which, rate]

    rates = [float(rate) for rate in np.linspace(0.1, 1.0, RATES) * most_per_s]
    ahead = [at(1, rate).worst < at(0, rate).worst for rate in rates]
    crossings = []
    for low, high, before, after in zip(rates, rates[1:], ahead, ahead[1:], strict=False):
        if before != after:
            crossings.append((_narrowed(at, low, high, before), after))
    return Crossover(tuple(at(0, rate) for rate in rates), tuple(at(1, rate) for rate in rates), tuple(crossings))


def _narrowed(at: Callable[[int, float], Strain], low: float, high: float, before: bool) -> float:
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if (at(1, middle).worst < at(0, middle).worst) == before:
            low = middle
        else:
            high = middle
    return (low + high) / 2
