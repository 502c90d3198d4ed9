"""What arrives: requests with times and lengths, read from a trace or drawn from a seeded description of traffic.

A description is data (`Profile`, one YAML file): an arrival process, which draws gaps of mean 1, and lengths, which
draw prompt and output tokens together. Drawing more requests extends the fewer, and another rate only stretches the
clock, so plans are compared under the same requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf, isfinite, log, nan, sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as checked

from hwmodels.yamlfiles import PROFILES, named, read_as
from simulator.blockhashes import BlockHashes, joined, private
from simulator.errors import TraceError

if TYPE_CHECKING:
    from simulator.encode import Images

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]
Lengths = tuple[Tokens, Tokens]

#: Times above 1e9 s (32 years) are dates rather than offsets, and float64 holds no microseconds there.
MAX_ARRIVAL_S = 1e9
#: No context is longer, and the total of any trace that fits in memory stays within int64.
MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """What a deployment is asked to serve, in order of arrival; arrays of equal length n >= 1, read-only copies.

    arrival_s       seconds since the start, non-decreasing, in [0, 1e9]
    prompt_tokens   in [1, 2**31)
    output_tokens   in [1, 2**31), the first token included
    slo_class       index into class_names; one number stands for all requests
    class_names     distinct names of the SLO classes
    block_hashes    which requests begin alike, see simulator.blockhashes; None where nothing is known of it

    Raises TraceError naming the first offending index and value.
    """

    arrival_s: Floats
    prompt_tokens: Tokens
    output_tokens: Tokens
    slo_class: NDArray[np.int16] = field(default_factory=lambda: np.zeros((), np.int16))
    class_names: tuple[str, ...] = ("default",)
    block_hashes: BlockHashes | None = None

    def __post_init__(self) -> None:
        arrival_s = _numbers("arrival_s", self.arrival_s)
        n = len(arrival_s)
        if n == 0:
            raise TraceError("arrival_s is empty: expected at least one request")
        _require("arrival_s", arrival_s, (arrival_s >= 0) & (arrival_s <= MAX_ARRIVAL_S), "in [0, 1e9] seconds")
        ordered = np.concatenate(([True], np.diff(arrival_s) >= 0))
        _require("arrival_s", arrival_s, ordered, "no earlier than the request before it; sort the requests by arrival")
        names = tuple(self.class_names)
        if not 0 < len(names) <= np.iinfo(np.int16).max or len(set(names)) < len(names) or "" in names:
            raise TraceError(f"class_names = {names!r:.80}: expected 1 to 32767 distinct, non-empty names")

        slo_class = np.broadcast_to(self.slo_class, (n,)) if np.ndim(self.slo_class) == 0 else self.slo_class
        columns: dict[str, NDArray[Any]] = {
            "arrival_s": arrival_s,
            "prompt_tokens": _whole("prompt_tokens", self.prompt_tokens, 1, MAX_TOKENS),
            "output_tokens": _whole("output_tokens", self.output_tokens, 1, MAX_TOKENS),
            "slo_class": _whole("slo_class", slo_class, 0, len(names) - 1).astype(np.int16),
        }
        for name, values in columns.items():
            if len(values) != n:
                raise TraceError(f"{name} has {len(values)} entries: expected one for each of the {n} requests")
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        object.__setattr__(self, "class_names", names)
        if self.block_hashes is not None:
            self.block_hashes.check(self.prompt_tokens, self.output_tokens)

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def span_s(self) -> float:
        """Seconds from the first to the last arrival."""
        return float(self.arrival_s[-1] - self.arrival_s[0])

    @property
    def rate_per_s(self) -> float:
        """Mean arrival rate: gaps per second, (n - 1) / span; inf when all arrive at once, nan for one request.

        >>> Requests([0, 1, 4], [8, 8, 8], [2, 2, 2]).rate_per_s
        0.5
        """
        if len(self) == 1:
            return nan
        span_s = self.span_s
        return (len(self) - 1) / span_s if span_s > 0 else inf

    @property
    def total_prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return int(self.prompt_tokens.sum())

    @property
    def total_output_tokens(self) -> int:
        """Output tokens of all requests."""
        return int(self.output_tokens.sum())

    @property
    def max_context_tokens(self) -> int:
        """Prompt and output of the longest request."""
        return int((self.prompt_tokens + self.output_tokens).max())

    def head(self, n: int) -> Requests:
        """The first n requests, or all if there are fewer."""
        _at_least_one("n", n)
        return self.pick(slice(n))

    def pick(self, index: slice | NDArray[Any]) -> Requests:
        """The requests at `index`: a slice, a mask or ascending positions."""
        return self._pick(index, self.arrival_s[index])

    def reordered(self, order: NDArray[np.int64], arrival_s: Floats) -> Requests:
        """The requests at the positions `order`, which arrive at other times, ascending in that order."""
        return self._pick(order, arrival_s)

    def take(self, n: int) -> Requests:
        """The first n requests; a shorter trace is repeated, each round one span and one mean gap after the last.

        So the rate is that of the trace. Requests that all arrive at once, or a single one, are repeated at once.
        Requests of different rounds share no blocks: what is repeated is the traffic, not what it says.

        >>> Requests([0, 1, 2], [5, 6, 7], [1, 1, 1]).take(5).arrival_s.tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
        """
        _at_least_one("n", n)
        if n <= len(self):
            return self.head(n)
        period_s = self.span_s * len(self) / (len(self) - 1) if len(self) > 1 else 0.0
        rounds, position = np.divmod(np.arange(n), len(self))
        arrival_s = np.maximum.accumulate(self.arrival_s[position] + rounds * period_s)
        repeated = self._pick(position, arrival_s)
        hashes = repeated.block_hashes
        return repeated if hashes is None else replace(repeated, block_hashes=hashes.apart(rounds))

    def scaled_to_rate(self, rate_per_s: float) -> Requests:
        """The same requests with all arrival times stretched by one factor, so that their rate is `rate_per_s`.

        A single request has no rate and stays where it is. Raises TraceError when several all arrive at once.
        """
        if not (isfinite(rate_per_s) and rate_per_s > 0):
            raise TraceError(f"rate_per_s = {rate_per_s}: expected a positive, finite number")
        if len(self) == 1:
            return self
        if self.span_s == 0:
            raise TraceError(
                f"all {len(self)} requests arrive at once: expected gaps to stretch; draw arrivals instead"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            arrival_s = self.arrival_s * (self.rate_per_s / rate_per_s)
        if not arrival_s[-1] <= MAX_ARRIVAL_S:
            raise TraceError(f"rate_per_s = {rate_per_s}: expected one at which the last request arrives within 1e9 s")
        return replace(self, arrival_s=arrival_s)

    def labelled(self, slo_class: str) -> Requests:
        """The same requests, all of one SLO class."""
        return replace(self, slo_class=np.zeros((), np.int16), class_names=(slo_class,))

    def _pick(self, index: slice | NDArray[Any], arrival_s: Floats) -> Requests:
        return replace(
            self,
            arrival_s=arrival_s,
            prompt_tokens=self.prompt_tokens[index],
            output_tokens=self.output_tokens[index],
            slo_class=self.slo_class[index],
            block_hashes=None if self.block_hashes is None else self.block_hashes.pick(index),
        )


def mix(*parts: Requests) -> Requests:
    """All requests of `parts` in order of arrival (ties: in the order of the parts); classes of one name become one.

    Requests of different parts share no blocks, and those of a part that knows of none share none.
    """
    if not parts:
        raise TraceError("nothing to mix: expected at least one set of requests")
    names = tuple(dict.fromkeys(name for part in parts for name in part.class_names))
    classes = [np.array([names.index(name) for name in part.class_names])[part.slo_class] for part in parts]
    arrival_s = np.concatenate([part.arrival_s for part in parts])
    order = np.argsort(arrival_s, kind="stable")
    return Requests(
        arrival_s[order],
        np.concatenate([part.prompt_tokens for part in parts])[order],
        np.concatenate([part.output_tokens for part in parts])[order],
        np.concatenate(classes)[order],
        names,
        _mixed_hashes(parts, order),
    )


def _mixed_hashes(parts: Sequence[Requests], order: NDArray[np.int64]) -> BlockHashes | None:
    known = [part.block_hashes for part in parts if part.block_hashes is not None]
    if not known:
        return None
    size = known[0].block_tokens
    every = [private(p.prompt_tokens, size) if p.block_hashes is None else p.block_hashes for p in parts]
    return joined(every).pick(order)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests and how they come: at their arrival times, or in a closed loop.

    concurrency   None for arrival times; otherwise they are ignored: the first `concurrency` requests start at 0 and
                  each one that finishes (or is rejected) starts the next
    think_s       seconds a closed loop waits between a finish and the next start
    images        what is seen in the requests, whose prompts are text; None for text alone
    """

    requests: Requests
    concurrency: int | None = None
    think_s: float = 0.0
    images: Images | None = None

    def __post_init__(self) -> None:
        if self.concurrency is not None:
            _at_least_one("concurrency", self.concurrency)
        if not (isfinite(self.think_s) and self.think_s >= 0):
            raise TraceError(f"think_s = {self.think_s}: expected a finite number >= 0")
        if self.think_s > 0 and self.concurrency is None:
            raise TraceError(
                f"think_s = {self.think_s}: expected 0 without concurrency; set concurrency for a closed loop"
            )

    @property
    def served(self) -> Requests:
        """The requests as prefill sees them: with the tokens of their images in their prompts."""
        return self.requests if self.images is None else self.images.prompts(self.requests)


# Arrival processes: gaps(rng, n) draws n gaps of mean 1, to be divided by the rate.

_SPEC = ConfigDict(extra="forbid", allow_inf_nan=False)
_ProbabilityTable = Annotated[tuple[float, ...], Field(min_length=2)]


@checked(frozen=True, slots=True, config=_SPEC)
class Poisson:
    """Independent users: exponential gaps."""

    process: Literal["poisson"] = "poisson"

    def gaps(self, rng: np.random.Generator, n: int) -> Floats:
        return rng.standard_exponential(n)


@checked(frozen=True, slots=True, config=_SPEC)
class Gamma:
    """Gamma-distributed gaps with coefficient of variation cv: 1 is Poisson, more is burstier, less is smoother."""

    cv: float = Field(ge=0.001, le=100)
    process: Literal["gamma"] = "gamma"

    def gaps(self, rng: np.random.Generator, n: int) -> Floats:
        return rng.standard_gamma(1 / self.cv**2, n) * self.cv**2


@checked(frozen=True, slots=True, config=_SPEC)
class Deterministic:
    """Equal gaps."""

    process: Literal["deterministic"] = "deterministic"

    def gaps(self, rng: np.random.Generator, n: int) -> Floats:
        return np.ones(n)


@checked(frozen=True, slots=True, config=_SPEC)
class Renewal:
    """Independent gaps from the quantiles of measured ones, for traffic more uneven than a gamma law can say.

    gaps_s   quantile of the gaps at each of `probabilities`, linear in between; the unit drops out
    """

    probabilities: _ProbabilityTable
    gaps_s: tuple[float, ...]
    process: Literal["renewal"] = "renewal"

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_table(self.probabilities, self.gaps_s, "gaps_s", minimum=0)
        if self.gaps_s[-1] <= 0:
            raise ValueError("gaps_s are all 0: expected at least one positive gap")
        return self

    def gaps(self, rng: np.random.Generator, n: int) -> Floats:
        gaps_s = np.array(self.gaps_s)
        mean_s = np.diff(self.probabilities) @ (gaps_s[1:] + gaps_s[:-1]) / 2
        gaps: Floats = np.interp(rng.random(n), self.probabilities, gaps_s) / mean_s
        return gaps


Arrivals = Annotated[Poisson | Gamma | Deterministic | Renewal, Field(discriminator="process")]


# Lengths of one kind of token: draw(rng, n).


@checked(frozen=True, slots=True, config=_SPEC)
class Fixed:
    """Always the same number of tokens."""

    tokens: int = Field(ge=1, le=MAX_TOKENS)
    kind: Literal["fixed"] = "fixed"

    def draw(self, rng: np.random.Generator, n: int) -> Tokens:
        return np.full(n, self.tokens, np.int64)


@checked(frozen=True, slots=True, config=_SPEC)
class Uniform:
    """Every whole number from low to high, both included, equally often."""

    low: int = Field(ge=1, le=MAX_TOKENS)
    high: int = Field(ge=1, le=MAX_TOKENS)
    kind: Literal["uniform"] = "uniform"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low = {self.low}: expected at most high = {self.high}")
        return self

    def draw(self, rng: np.random.Generator, n: int) -> Tokens:
        return rng.integers(self.low, self.high, n, endpoint=True)


@checked(frozen=True, slots=True, config=_SPEC)
class Lognormal:
    """Lognormal lengths with the given mean and either median p50 or sigma of the logarithm.

    mean = p50 * exp(sigma**2 / 2) holds before rounding and before clipping to [1, max].
    """

    mean: float = Field(ge=1, le=MAX_TOKENS)
    p50: float | None = Field(default=None, ge=1)
    sigma: float | None = Field(default=None, ge=0, le=10)
    max: int = Field(default=MAX_TOKENS, ge=1, le=MAX_TOKENS)
    kind: Literal["lognormal"] = "lognormal"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.p50 is None) == (self.sigma is None):
            raise ValueError(f"p50 = {self.p50}, sigma = {self.sigma}: expected exactly one of them")
        if self.p50 is not None and self.p50 > self.mean:
            raise ValueError(f"p50 = {self.p50}: expected at most the mean, {self.mean}, as in every lognormal law")
        return self

    def draw(self, rng: np.random.Generator, n: int) -> Tokens:
        sigma = sqrt(2 * log(self.mean / self.p50)) if self.p50 is not None else float(self.sigma or 0)
        p50 = self.mean * exp(-(sigma**2) / 2)
        return np.clip(np.rint(p50 * np.exp(sigma * rng.standard_normal(n))), 1, self.max).astype(np.int64)


OneLength = Annotated[Fixed | Uniform | Lognormal, Field(discriminator="kind")]


# Lengths of requests: draw(rng, n) gives prompt and output tokens.


@checked(frozen=True, slots=True, config=_SPEC)
class Independent:
    """Prompt and output lengths that know nothing of each other."""

    prompt_tokens: OneLength
    output_tokens: OneLength
    kind: Literal["independent"] = "independent"

    def draw(self, rng: np.random.Generator, n: int) -> Lengths:
        prompt_rng, output_rng = rng.spawn(2)
        return self.prompt_tokens.draw(prompt_rng, n), self.output_tokens.draw(output_rng, n)


@checked(frozen=True, slots=True, config=_SPEC)
class Quantiles:
    """Lengths from the quantiles of a trace, outputs given the rank of the prompt.

    prompt_tokens   quantile at each of `probabilities`, linear in between
    output_tokens   the same for the outputs of each group of requests; the groups are equally many requests each, by
                    ascending prompt, so any dependence of output on prompt is kept, monotone or not
    """

    probabilities: _ProbabilityTable
    prompt_tokens: tuple[float, ...]
    output_tokens: Annotated[tuple[tuple[float, ...], ...], Field(min_length=1)]
    kind: Literal["quantiles"] = "quantiles"

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_table(self.probabilities, self.prompt_tokens, "prompt_tokens", minimum=1)
        for group, values in enumerate(self.output_tokens):
            _check_table(self.probabilities, values, f"output_tokens[{group}]", minimum=1)
        return self

    def draw(self, rng: np.random.Generator, n: int) -> Lengths:
        rank, level = rng.random((n, 2)).T
        prompt = np.interp(rank, self.probabilities, self.prompt_tokens)
        group = np.minimum(rank * len(self.output_tokens), len(self.output_tokens) - 1).astype(np.intp)
        output = np.empty(n)
        for index, values in enumerate(self.output_tokens):
            members = group == index
            output[members] = np.interp(level[members], self.probabilities, values)
        return np.rint(prompt).astype(np.int64), np.rint(output).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Empirical:
    """Prompt and output of requests drawn from a trace, with replacement and always as a pair."""

    requests: Requests

    def draw(self, rng: np.random.Generator, n: int) -> Lengths:
        pick = rng.integers(len(self.requests), size=n)
        return self.requests.prompt_tokens[pick], self.requests.output_tokens[pick]


@checked(frozen=True, slots=True, config=_SPEC)
class Profile:
    """A description of traffic: the content of profiles/workloads/NAME.yaml or of a user's own file.

    rate_per_s   mean arrival rate where none is asked for
    """

    name: str
    source: str
    rate_per_s: Annotated[float, Field(gt=0)]
    arrivals: Arrivals
    lengths: Annotated[Independent | Quantiles, Field(discriminator="kind")]


def workload_names() -> list[str]:
    """Names of the shipped workload profiles."""
    return sorted(path.stem for path in (PROFILES / "workloads").glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """The workload profile called `name`, or that of the YAML file at the path `name`.

    Raises ProfileError for an unknown name or an invalid file.
    """
    return read_as(Profile, named("workload", name, PROFILES / "workloads"))


def draw_requests(
    rng: np.random.Generator,
    n: int,
    rate_per_s: float,
    arrivals: Poisson | Gamma | Deterministic | Renewal,
    lengths: Independent | Quantiles | Empirical,
) -> Requests:
    """n requests, the first at time 0, from two streams spawned from `rng`: arrivals and lengths.

    `rate_per_s` is the mean of the process; the rate of one draw differs by about cv / sqrt(n).
    """
    _at_least_one("n", n)
    if not (isfinite(rate_per_s) and rate_per_s > 0):
        raise TraceError(f"rate_per_s = {rate_per_s}: expected a positive, finite number")
    arrival_rng, length_rng = rng.spawn(2)
    ticks = np.cumsum(arrivals.gaps(arrival_rng, n))
    with np.errstate(over="ignore"):
        arrival_s = (ticks - ticks[0]) / rate_per_s
    if not arrival_s[-1] <= MAX_ARRIVAL_S:
        raise TraceError(f"rate_per_s = {rate_per_s}: expected one at which {n} requests arrive within 1e9 s")
    return Requests(arrival_s, *lengths.draw(length_rng, n))


def synthesize(profile: Profile, n: int, rate_per_s: float | None = None, seed: int = 0) -> Requests:
    """n requests as `profile` describes them, at its own mean rate unless another is given."""
    rate_per_s = profile.rate_per_s if rate_per_s is None else rate_per_s
    rng = np.random.default_rng(seed)
    return draw_requests(rng, n, rate_per_s, profile.arrivals, profile.lengths)


def _check_table(probabilities: Sequence[float], values: Sequence[float], name: str, minimum: float) -> None:
    if probabilities[0] != 0 or probabilities[-1] != 1 or np.any(np.diff(probabilities) <= 0):
        raise ValueError("probabilities: expected to ascend from 0 to 1")
    if len(values) != len(probabilities):
        raise ValueError(
            f"{name} has {len(values)} entries: expected one for each of {len(probabilities)} probabilities"
        )
    if values[0] < minimum or values[-1] > MAX_TOKENS or np.any(np.diff(values) < 0):
        raise ValueError(f"{name}: expected not to descend, from at least {minimum} to at most {MAX_TOKENS}")


def _numbers(name: str, values: ArrayLike) -> Floats:
    """A float64 copy of a one-dimensional column of numbers."""
    try:
        column = np.array(values)
        if column.ndim != 1 or (len(column) and column.dtype.kind not in "iuf"):
            raise TraceError(f"{name} has dtype {column.dtype}, shape {column.shape}: expected a sequence of numbers")
        return column.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise TraceError(f"{name}: expected a sequence of numbers ({error})") from None


def _whole(name: str, values: ArrayLike, low: int, high: int) -> Tokens:
    """An int64 copy of a one-dimensional column of whole numbers in [low, high]; float64 holds all of them exactly."""
    numbers = _numbers(name, values)
    sound = (numbers >= low) & (numbers <= high) & (numbers == np.floor(numbers))
    _require(name, numbers, sound, f"a whole number in [{low}, {high}]")
    return numbers.astype(np.int64)


def _require(name: str, values: Floats, sound: NDArray[np.bool_], expected: str) -> None:
    if not sound.all():
        index = int(np.argmin(sound))
        raise TraceError(f"{name}[{index}] = {values[index]:g}: expected {expected}")


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise TraceError(f"{name} = {value}: expected a whole number >= 1")
