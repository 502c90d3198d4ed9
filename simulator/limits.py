"""What users are promised: latency limits, and how requests stand to them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.distribution import Ints, achieved, achieved_weighted, quantile_of
from simulator.errors import MetricError
from simulator.result import Floats

Mask = NDArray[np.bool_]

#: What a limit can be set on; per request, except for itl, which has one value per token after the first.
LATENCIES = ("ttft", "tpot", "itl", "e2e")

_UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_LIMIT = re.compile(r"(?:(?P<statistic>[^=]*)=)?(?P<value>[^=]*?)\s*(?P<unit>s|ms|us|µs)")


@dataclass(frozen=True, slots=True)
class Limit:
    """One SLO: `statistic` ("mean", "max", or a percentile such as "p99" or "p99.9") of `metric` at most `seconds`."""

    metric: str
    statistic: str
    seconds: float

    def __post_init__(self) -> None:
        if self.metric not in LATENCIES:
            raise MetricError(f"metric is {self.metric!r}, expected one of {', '.join(LATENCIES)}")
        quantile_of(self.statistic)
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise MetricError(f"{self.metric} limit is {self.seconds} s, expected a finite time above 0, such as 2s")

    @property
    def quantile(self) -> float | None:
        """The fraction the statistic stands for, 1 for the maximum, None for the mean."""
        return quantile_of(self.statistic)

    def __str__(self) -> str:
        return f"{self.metric} {self.statistic} <= {self.seconds:g} s"


#: Limits of every request, or of each SLO class by its name (classes left out have none).
Slos = Mapping[str, Sequence[Limit]] | Sequence[Limit]


def parse_limit(metric: str, text: str) -> Limit:
    """The limit that a text such as "p99=2s", "mean=50ms" or "2s" (p99 is meant) sets on a metric.

    >>> parse_limit("ttft", "p99=2s")
    Limit(metric='ttft', statistic='p99', seconds=2.0)
    >>> parse_limit("tpot", "50ms")
    Limit(metric='tpot', statistic='p99', seconds=0.05)
    """
    found = _LIMIT.fullmatch(text.strip())
    try:
        value = float(found["value"]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not (value > 0 and math.isfinite(value)):
        raise MetricError(f"{metric} limit is {text!r}, expected a time above 0 with its unit, such as 2s or p99=50ms")
    statistic = "p99" if found["statistic"] is None else found["statistic"].strip()
    return Limit(metric, statistic, value * _UNITS_S[found["unit"].replace("µ", "u")])


@dataclass(frozen=True, slots=True)
class Attainment:
    """How requests stand to limits.

    requests, good   requests, and those of them that meet every limit on ttft, tpot and e2e on their own
    values_s         the statistic that was reached for each limit, in the limits' order
    met              whether every limit is met by its statistic
    """

    requests: int
    good: int
    values_s: tuple[float, ...]
    met: bool

    @property
    def fraction(self) -> float:
        """SLO attainment; NaN without requests."""
        return self.good / self.requests if self.requests else math.nan


def attainment(
    ttft_s: Floats,
    tpot_s: Floats,
    e2e_s: Floats,
    limits: Sequence[Limit],
    gaps: tuple[Floats, Ints] | None = None,
) -> Attainment:
    """Hold requests to limits, on plain arrays (see result.latencies).

    gaps   the weighted inter-token latencies, needed for a limit on itl

    A request without an E2E time was rejected or not finished: it meets no limit and counts as infinitely late in every
    statistic but itl. A one-token answer has no TPOT and meets any limit on it. A limit without any value is met.
    """
    latency = {"ttft": ttft_s, "tpot": tpot_s, "e2e": e2e_s}
    lost = np.isnan(e2e_s)
    any_lost = bool(lost.any())
    values_s = []
    for limit in limits:
        if limit.metric == "itl":
            if gaps is None:
                raise MetricError(
                    f"limit is {limit}, expected a run that recorded its steps; simulate with record=True"
                )
            values_s.append(achieved_weighted(*gaps, limit.statistic))
            continue
        values = latency[limit.metric]
        if any_lost:
            values = np.where(lost, np.inf, values)
        if limit.metric == "tpot":
            values = values[~np.isnan(values)]
        values_s.append(achieved(values, limit.statistic))
    good = int(np.count_nonzero(meets_all(ttft_s, tpot_s, e2e_s, limits)))
    met = all(not value > limit.seconds for value, limit in zip(values_s, limits, strict=True))
    return Attainment(len(e2e_s), good, tuple(values_s), met)


def meets_all(ttft_s: Floats, tpot_s: Floats, e2e_s: Floats, limits: Iterable[Limit]) -> Mask:
    """Which requests finished and meet each limit's seconds; a limit on itl holds for all tokens together, not here."""
    latency = {"ttft": ttft_s, "tpot": tpot_s, "e2e": e2e_s}
    good = ~np.isnan(e2e_s)
    for limit in limits:
        if limit.metric != "itl":
            good &= ~(latency[limit.metric] > limit.seconds)
    return good
