"""How many requests per second do Splitwise's machines serve within all nine of its limits?

Limits are slowdowns against the same request alone on an A100 machine. Traffic is drawn as the published simulator
draws it: Poisson arrivals, and prompt and output lengths of a trace, independently of each other and with replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf

import numpy as np

from planner.validation.splitwisemachines import Pool, TableModel, deployment_of
from planner.validation.splitwisepools import serve
from simulator.log import Log
from simulator.workload import Requests

#: Width of the range in which the highest rate is known to lie, and the first step of the search before there is one.
TOLERANCE, STRIDE = 1.02, 1.12
#: Requests of a run that says nothing any more.
LEAST = 20


@dataclass(frozen=True, slots=True)
class Slowdown:
    """At least the share `quantile` of the requests may be at most `factor` times slower than alone in `metric`."""

    metric: str
    quantile: float
    factor: float

    def __str__(self) -> str:
        return f"{self.metric} p{100 * self.quantile:g} <= {self.factor:g}x"


def slowdowns(metric: str, p50: float, p90: float, p99: float) -> tuple[Slowdown, ...]:
    """The three limits of one metric."""
    return tuple(Slowdown(metric, q, factor) for q, factor in ((0.5, p50), (0.9, p90), (0.99, p99)))


#: Splitwise (ISCA 2024, arXiv:2311.18677), table VI; tpot is its TBT, a mean over a request's tokens after the first.
LIMITS = (*slowdowns("ttft", 2, 3, 6), *slowdowns("tpot", 1.25, 1.5, 5), *slowdowns("e2e", 1.25, 1.5, 5))


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Where lengths come from, for how long requests arrive, and the seed of all draws."""

    trace: Requests
    seconds: float = 120.0
    seed: int = 0
    one_token: bool = False  # only the first token of every answer

    @property
    def usual_output(self) -> float:
        """Mean output tokens."""
        return 1.0 if self.one_token else float(self.trace.output_tokens.mean())

    def at(self, rate_per_s: float) -> Requests:
        """The requests of this rate; another rate has the same ones on another clock, and more or fewer of them."""
        n = max(1, round(rate_per_s * self.seconds))
        gaps, prompts, outputs = (np.random.default_rng((self.seed, stream)) for stream in range(3))
        arrival_s = np.cumsum(gaps.standard_exponential(n)) / rate_per_s
        prompt_tokens = self.trace.prompt_tokens[prompts.integers(len(self.trace), size=n)]
        output_tokens = self.trace.output_tokens[outputs.integers(len(self.trace), size=n)]
        return Requests(arrival_s, prompt_tokens, np.ones(n, np.int64) if self.one_token else output_tokens)


class Watch:
    """Counts requests beyond every limit, also while a run goes on.

    alone   step times of the machine that a request alone is compared with
    """

    __slots__ = ("allowed", "limits", "most_s", "requests")

    def __init__(self, requests: Requests, alone: TableModel, limits: Sequence[Slowdown]) -> None:
        self.requests, self.limits = requests, limits
        steps = requests.output_tokens - 1.0
        prompt_s = np.frombuffer(alone.prompt_s)[requests.prompt_tokens]  # type: ignore[call-overload]
        alone_s = {"ttft": prompt_s, "tpot": steps * alone.decode_s[1], "e2e": prompt_s + steps * alone.decode_s[1]}
        several = int(np.count_nonzero(steps))
        #: Longest time within each limit; tpot as the time of all tokens after the first.
        self.most_s = [limit.factor * alone_s[limit.metric] for limit in limits]
        self.allowed = [
            floor((1 - limit.quantile) * (several if limit.metric == "tpot" else len(requests)) + 1e-9)
            for limit in limits
        ]

    def beyond(self, log: Log) -> list[int]:
        """Requests that have ended beyond each limit."""
        first_s, finish_s = np.frombuffer(log.first_token_s), np.frombuffer(log.finish_s)
        arrival_s = self.requests.arrival_s
        took_s = {"ttft": first_s - arrival_s, "tpot": finish_s - first_s, "e2e": finish_s - arrival_s}
        return [
            int(np.count_nonzero(took_s[limit.metric] > most_s * (1 + 1e-9)))
            for limit, most_s in zip(self.limits, self.most_s, strict=True)
        ]

    def hopeless(self, log: Log) -> bool:
        """Whether a limit is broken already, whatever becomes of the others."""
        return any(count > allowed for count, allowed in zip(self.beyond(log), self.allowed, strict=True))

    def met(self, log: Log) -> bool:
        """Whether all requests ended and every limit is kept."""
        return not np.isnan(np.frombuffer(log.finish_s)).any() and not self.hopeless(log)

    def tightest(self, log: Log) -> Slowdown:
        """The limit that is broken the most, or is nearest to being broken."""
        shares = [(count + 1) / (most + 1) for count, most in zip(self.beyond(log), self.allowed, strict=True)]
        return self.limits[shares.index(max(shares))]


@dataclass(frozen=True, slots=True)
class Throughput:
    """The highest rate found within the limits; 0 where even the least tried was too much.

    limited_by   the limit that breaks first beyond it
    peak_seqs    most sequences that ran together on one machine at that rate
    """

    rate_per_s: float
    limited_by: str
    peak_seqs: int


def throughput(
    pools: Sequence[Pool],
    traffic: Traffic,
    alone: TableModel,
    guess_per_s: float,
    limits: Sequence[Slowdown] = LIMITS,
    *,
    at_least: float = 0.0,
    at_most: float = inf,
) -> Throughput:
    """Search for the highest rate at which all limits hold together, by bisection from a guess.

    at_least   rate that must be kept for the search to go on; where it is not the answer is 0
    at_most    rate beyond which nobody wants to know; where it is kept it is the answer
    """
    deployment = deployment_of(pools)
    limited_by, peak_seqs = "", 0
    low, high, stride = 0.0, inf, STRIDE
    rate = min(max(guess_per_s, at_least), at_most)
    while high > low * TOLERANCE:
        requests = traffic.at(rate)
        watch = Watch(requests, alone, limits)
        log = serve(deployment, requests, watch.hopeless)
        if watch.met(log):
            low, peak_seqs = rate, log.peak_seqs
        else:
            high, limited_by = rate, str(watch.tightest(log))
        if low == at_most or (low == 0.0 and (high <= at_least or high * traffic.seconds < LEAST)):
            break
        if low and high < inf:
            rate = (low * high) ** 0.5
        else:
            rate = min(low * stride, at_most) if low else max(high / stride, at_least)
            stride = min(stride**2, 2.0)
    return Throughput(low, limited_by, peak_seqs)
