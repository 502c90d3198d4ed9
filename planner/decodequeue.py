"""How many requests per second does a replica decode within the limits? A law of its batch, in closed form.

The n sequences of a scheduler share its steps: each gets a token every s(n) seconds. That is a symmetric queue
with state-dependent rates, whose law depends on output lengths only through their mean E[d] (Kelly, Reversibility and
Stochastic Networks, 1979, ch. 3): with a = rate x E[d] tokens/s of Poisson arrivals

    P(n) ~ prod_{i <= n} a s(i) / i      mean TPOT = E[n] / a      (Little)

where beyond `slots` sequences (max_seqs, or what the KV pool holds with HEADROOM deviations) the rest wait: s(i) =
s(slots) i / slots. A step varies with n and with the contexts c: Var(s) = Var(s(n)) + E[n] z^2 Var(c), z seconds a
token of context. A request of d tokens averages that over its life, which divides the variance of its TPOT by
x^2 / (2 (x - 1 + exp(-x))) with x = d / theta, theta = E[d^2] / (2 E[d]) Var(n) / E[n], taking TPOT for normal and the
correlation of n in time for exponential. The capacity is the highest rate that keeps the limits.

Limits on E2E are divided: E2E_PREFILL of the seconds for the first token, the rest for the decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammainc, ndtr

from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel
from simulator.deployment import ReplicaSpec
from simulator.limits import Limit
from simulator.workload import Requests

Array = NDArray[np.float64]

#: Standard deviations of the tokens in the KV pool that are kept free.
HEADROOM = 2.33
#: Shares of the saturated rate that are tried.
LOADS = np.linspace(0.01, 0.99, 99)
#: Share of a limit on E2E that the first token may take.
E2E_PREFILL = 0.25
#: Output lengths the law of TPOT is averaged over.
LENGTHS = 64


@dataclass(frozen=True, slots=True)
class Decode:
    """What a replica decodes within the limits.

    rate_per_s     requests per second; 0 where not even one sequence keeps the limits
    sequences      mean of those that decode, in all schedulers together; tpot_s mean time per token
    held_token_s   KV tokens x seconds of a request
    limited_by     'seqs', 'kv' or the limit that holds the rate down
    """

    rate_per_s: float
    sequences: float
    tpot_s: float
    held_token_s: float
    limited_by: str


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds that the prefill of a request takes from decodes beside it: mean, and means of the square and the cube.

    each   prompts that one scheduler waits for, by prompt of its own
    """

    seconds: float
    square: float
    cube: float
    each: float


@dataclass(frozen=True, slots=True)
class Lengths:
    """Moments of decode steps d = output - 1 and of contexts c, averaged over time as decoding sequences see them.

    context, context_square   E[c] and E[c^2] of a sequence in the batch
    steps, theta              E[d] and E[d^2] / (2 E[d])
    quantiles                 of d among the requests that decode
    decoding                  share of the requests with d > 0
    """

    context: float
    context_square: float
    steps: float
    theta: float
    quantiles: Array
    decoding: float


def lengths_of(requests: Requests) -> Lengths:
    """The moments of the requests."""
    p = requests.prompt_tokens.astype(float)
    d = requests.output_tokens.astype(float) - 1
    total = max(float(d.sum()), 1e-9)
    several = d[d > 0]
    levels = (np.arange(LENGTHS) + 0.5) / LENGTHS
    return Lengths(
        float((d * (p + (d + 1) / 2)).sum() / total),
        float((d * p * p + p * d * d + d**3 / 3).sum() / total),
        float(d.mean()),
        float((several**2).mean() / (2 * several.mean())) if len(several) else 1.0,
        np.quantile(several, levels) if len(several) else np.ones(1),
        len(several) / len(d),
    )


def _at(pieces: Pieces, mean: float, rows: int) -> tuple[Array, Array]:
    """Value of the first rows at x = mean, and its slope in x."""
    piece = int(np.searchsorted(pieces.knots, mean)) if pieces.knots else 0
    slope = np.asarray(pieces.slope[piece])[: rows + 1]
    return np.asarray(pieces.base[piece])[: rows + 1] + slope * mean, slope


def decode_steps_s(model: StepModel, mapping: Mapping, context: float, rows: int) -> tuple[Array, Array]:
    """Seconds between two tokens of a sequence with 0, 1, 2 ... sequences a scheduler, and seconds a token of context.

    A pipeline gives a sequence a token when its step has passed all stages and the slowest has done those of the
    other schedulers. Row 0 is that of one sequence.
    """
    n = np.arange(rows + 1)
    stages, slopes = [], []
    for tables in model.stages:
        decode, slope = _at(tables.decode, context, rows)
        shared = np.asarray(tables.shared)[n * mapping.attention_dp] if mapping.attention_dp > 1 else 0.0
        stages.append(decode + np.asarray(tables.linear)[n] + np.asarray(tables.head)[n] + shared)
        slopes.append(slope / np.maximum(n, 1))
    stages[0] = stages[0] + model.engine.step_overhead_s + n * model.engine.sequence_overhead_s
    through = np.sum(stages, axis=0) + (mapping.pp - 1) * np.asarray(model.transfer)[n]
    seconds = np.maximum(through, mapping.pp * np.max(stages, axis=0))
    seconds[0] = seconds[1]
    slope = np.sum(slopes, axis=0)
    slope[0] = slope[1]
    return seconds, slope


def decode_capacity(
    spec: ReplicaSpec,
    requests: Requests,
    limits: Sequence[Limit],
    *,
    transfer_s: float | None = None,
    work: Work | None = None,
) -> Decode:
    """Requests per second that the replica decodes within the limits on tpot, itl and e2e.

    transfer_s   from the first token to where a sequence may join the decodes, for which it then waits half a step;
                 both count for TPOT and E2E. None where it decodes on the replica that prefilled it.
    work         what the prefill of a request takes from the decodes of its scheduler; None for none
    """
    lengths, mapping = lengths_of(requests), spec.mapping
    rows = min(spec.scheduler.max_seqs, spec.model.max_seqs)
    seconds, per_token = decode_steps_s(spec.model, mapping, lengths.context, rows)
    if not lengths.decoding:
        return Decode(np.inf, 0.0, float(seconds[1]), 0.0, "")
    block = spec.scheduler.block_tokens
    held = lengths.context + block / 2
    by_kv = _kv_slots(spec.kv_blocks * block / held, lengths.context_square / held**2)
    slots = min(rows, int(by_kv))
    if slots < 1:
        return Decode(0.0, 0.0, float(seconds[1]), 0.0, "kv")
    n = np.arange(1, slots + max(64, slots // 2) + 1)
    each = seconds[np.minimum(n, slots)] * np.maximum(n / slots, 1.0)
    most = slots / seconds[slots]  # tokens per second
    if work is None:
        full = most / lengths.steps
        law = _law(most * LOADS, n, each, slots)
    else:  # decodes get the time that prefills leave them
        full = 1 / (work.seconds * work.each + lengths.steps / most)
        left = 1 - LOADS * full * work.seconds * work.each
        law = _law(full * LOADS * lengths.steps, n, each[None, :] / left[:, None], slots)
    z = per_token[np.clip(np.rint(law.mean), 1, slots).astype(int)]
    spread = z**2 * law.mean * max(lengths.context_square - lengths.context**2, 0.0)
    theta = lengths.theta * law.variance / law.mean
    none = np.zeros(len(LOADS))
    stalls = none, none, none
    if work is not None:
        prompts = full * LOADS * work.each  # per second
        wait = work.seconds + prompts * work.square / (2 * left)  # Pollaczek and Khinchine
        # Prompts that come in a stall prolong it: moments of busy periods, which start in the decodes' own time.
        starts = prompts * left * law.tpot_s
        square = work.square / left**3
        cube = work.cube / left**4 + 3 * prompts * work.square**2 / left**5
        stalls = starts * square, starts * cube, (1 - left) / left * wait
    steps = _Steps(law.tpot_s, np.sqrt(law.step_variance + spread), theta, *stalls, transfer_s)
    broken = {str(limit): ~_keeps(limit, requests, lengths, steps) for limit in limits if limit.metric != "ttft"}
    bad = np.logical_or.reduce([np.zeros(len(LOADS), dtype=bool), *broken.values()])
    last = int(np.argmax(bad)) - 1 if bad.any() else len(LOADS) - 1
    if last < 0:
        return Decode(0.0, 0.0, float(seconds[1]), 0.0, next(name for name, rows in broken.items() if rows[0]))
    limited = next((name for name, rows in broken.items() if last + 1 < len(LOADS) and rows[last + 1]), "")
    tpot_s = float(law.tpot_s[last])
    return Decode(
        float(spec.lanes * full * LOADS[last]),
        float(law.inside[last] * spec.lanes),
        tpot_s,
        float(held * (law.inside[last] / (full * LOADS[last]) + (transfer_s or 0.0))),
        limited or ("kv" if by_kv < rows else "seqs"),
    )


def _kv_slots(most: float, square: float) -> float:
    """Sequences n with n + HEADROOM sqrt(n square) <= most, all in sequences of mean size."""
    spread = HEADROOM * np.sqrt(square)
    return float(((np.sqrt(spread**2 + 4 * most) - spread) / 2) ** 2)


@dataclass(frozen=True, slots=True)
class _Law:
    """By load: mean and variance of the sequences of a scheduler, mean TPOT and the variance of a step.

    inside   mean of those that are not waiting for a slot
    """

    mean: Array
    inside: Array
    variance: Array
    tpot_s: Array
    step_variance: Array


def _law(tokens_per_s: Array, n: NDArray[np.int64], each: Array, slots: int) -> _Law:
    """The law of n at rates of `tokens_per_s` a scheduler, n sequences taking each[..., n - 1] seconds a token."""
    log_p = np.log(tokens_per_s)[:, None] * n + np.cumsum(np.log(each / n), axis=-1)
    log_p = np.concatenate([np.zeros((len(tokens_per_s), 1)), log_p], axis=1)
    p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    mean = p[:, 1:] @ n
    variance = np.maximum(p[:, 1:] @ n**2 - mean**2, 1e-12)
    seen = p[:, :-1] / p[:, :-1].sum(axis=1, keepdims=True)  # an arrival makes it n + 1
    step, square = (seen * each).sum(axis=1), (seen * each**2).sum(axis=1)
    inside = p[:, 1:] @ np.minimum(n, slots)
    return _Law(mean, inside, variance, mean / tokens_per_s, np.maximum(square - step**2, 0.0))


def _below(z: Array, skew: Array) -> Array:
    """P(X <= z) of a standardised variable with this skewness: a shifted gamma law, normal where there is none."""
    shape = 4 / np.maximum(skew, 1e-3) ** 2
    gamma: Array = gammainc(shape, np.maximum(shape + np.sqrt(shape) * z, 0.0))
    return np.where(skew > 1e-2, gamma, ndtr(z))


@dataclass(frozen=True, slots=True)
class _Steps:
    """By load: what a request's time per token is made of.

    mean, sigma, theta   of a step's seconds the mean, deviation and correlation in steps
    square, cube         second and third cumulant of the prefills in the time of one token
    start                mean seconds of the prompts that come right after a request's own
    """

    mean: Array
    sigma: Array
    theta: Array
    square: Array
    cube: Array
    start: Array
    transfer_s: float | None


def _keeps(limit: Limit, requests: Requests, lengths: Lengths, steps: _Steps) -> NDArray[np.bool_]:
    """At which loads the limit is kept."""
    d, tpot = lengths.quantiles[None, :], steps.mean[:, None]
    late = steps.start[:, None] + (0.0 if steps.transfer_s is None else steps.transfer_s + tpot / 2)
    values = late + tpot * d if limit.metric == "e2e" else late / d + tpot
    seconds = limit.seconds * (1 - E2E_PREFILL if limit.metric == "e2e" else 1.0)
    if limit.quantile is None:
        share = lengths.decoding if limit.metric == "e2e" else 1.0
        mean: Array = steps.mean if limit.metric == "itl" else values.mean(axis=1) * share
        return mean <= seconds
    if limit.metric == "itl":
        kept = ndtr((seconds - steps.mean) / np.maximum(np.sqrt(steps.sigma**2 + steps.square), 1e-12))
    else:
        x = np.maximum(d / steps.theta[:, None], 1e-3)
        smooth = 2 * (x - 1 + np.exp(-x)) / x**2
        square, cube, start = steps.square[:, None], steps.cube[:, None], steps.start[:, None]
        own = np.sqrt(steps.sigma[:, None] ** 2 * smooth + square / d + (start / d) ** 2)
        skew = (cube / d**2 + 2 * (start / d) ** 3) / np.maximum(own, 1e-12) ** 3
        room = (seconds - values) / (d if limit.metric == "e2e" else 1.0)
        kept = _below(room / np.maximum(own, 1e-12), skew).mean(axis=1)
    if limit.metric == "e2e":
        kept = 1 - (1 - kept) * lengths.decoding
    wanted = limit.quantile if limit.quantile < 1 else 1 - 0.5 / len(requests)
    enough: NDArray[np.bool_] = kept >= wanted
    return enough
