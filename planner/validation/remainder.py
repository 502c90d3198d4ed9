"""Where is the error that is left: in which steps, in which part of the run, and between the steps?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from planner.validation.execution import KINDS, Floats, durations, kinds

#: Upper ends of the classes of steps by tokens; larger steps are in a class of their own.
SIZES = (4, 16, 64, 256, 1024)


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the steps, beside the time of all.

    share        of the measured time of all steps
    of_total     predicted less measured time of these steps, over the measured time of all: parts add up to the bias
    median_bias  median of predicted / measured - 1
    """

    n: int
    share: float
    of_total: float
    median_bias: float


@dataclass(frozen=True, slots=True)
class Unexplained:
    """What is left of the step times once predicted; NaN where it cannot be told.

    kinds, sizes    by kind, and by tokens of the step ('1-4', ...); those that never ran are left out
    first_third, last_third   median of predicted / measured - 1 in the first and the last third of the steps: apart
                    where the machine became slower or quicker
    persistence     rank correlation of a step's error with that of the next: near 0 for pure noise, near 1 for
                    something slow that the step model does not know
    jitter          median deviation of like steps: decode steps that follow each other with the same sequences should
                    take the same time, so |next / this - 1| / sqrt(2); no step model can do better
    between         time between steps while sequences were running, over the measured time of all steps
    """

    kinds: dict[str, Part]
    sizes: dict[str, Part]
    first_third: float
    last_third: float
    persistence: float
    jitter: float
    between: float


def step_tokens(steps: pd.DataFrame) -> Floats:
    """New tokens of every executed step."""
    prompts = np.array([sum(new for new, _ in items) for items in steps["items"]], dtype=float)
    tokens: Floats = prompts + steps["decode_sequences"].to_numpy(dtype=float)
    return tokens


def size_classes(tokens: ArrayLike) -> tuple[list[str], np.ndarray]:
    """Names of the classes, and the position of each step's.

    >>> names, at = size_classes([1, 4, 5, 2000])
    >>> [names[i] for i in at]
    ['1-4', '1-4', '5-16', '1025+']
    """
    starts = (1, *(end + 1 for end in SIZES))
    names = [f"{start}-{end}" for start, end in zip(starts, SIZES, strict=False)] + [f"{starts[-1]}+"]
    return names, np.searchsorted(SIZES, np.asarray(tokens, dtype=float), side="left")


def unexplained(steps: pd.DataFrame, predicted_s: ArrayLike) -> Unexplained:
    """Where executed steps (EXECUTED_COLUMNS) differ from their predicted seconds."""
    nan = float("nan")
    order = np.lexsort((steps["start_s"], steps["lane"], steps["replica"]))
    steps = steps.iloc[order]
    p, m = np.asarray(predicted_s, dtype=float)[order], durations(steps)
    usable = np.isfinite(p) & (m > 0)
    if not usable.any():
        return Unexplained({}, {}, nan, nan, nan, nan, nan)
    steps, p, m = steps[usable], p[usable], m[usable]
    e = p / m - 1.0
    total_s = float(m.sum())

    def part(chosen: np.ndarray) -> Part:
        error_s = float((p[chosen] - m[chosen]).sum())
        return Part(int(chosen.sum()), float(m[chosen].sum()) / total_s, error_s / total_s, float(np.median(e[chosen])))

    kind = kinds(steps)
    names, size = size_classes(step_tokens(steps))
    start, end = (steps[name].to_numpy(dtype=float) for name in ("start_s", "end_s"))
    decodes = steps["decode_sequences"].to_numpy()
    place = steps[["replica", "lane"]].to_numpy()
    after = np.all(place[1:] == place[:-1], axis=1)  # the same lane's next step
    alike = after & (kind[1:] == "decode") & (kind[:-1] == "decode") & (decodes[1:] == decodes[:-1])
    running = after & (decodes[1:] > 0)
    by_time = e[np.argsort(start, kind="stable")]
    third = len(e) // 3
    return Unexplained(
        kinds={name: part(kind == name) for name in KINDS if (kind == name).any()},
        sizes={name: part(size == i) for i, name in enumerate(names) if (size == i).any()},
        first_third=float(np.median(by_time[:third])) if third else nan,
        last_third=float(np.median(by_time[-third:])) if third else nan,
        persistence=_rank_correlation(e[:-1][after], e[1:][after]),
        jitter=float(np.median(np.abs(m[1:][alike] / m[:-1][alike] - 1.0)) / np.sqrt(2)) if alike.any() else nan,
        between=float((start[1:] - end[:-1])[running].sum()) / total_s,
    )


def _rank_correlation(a: Floats, b: Floats) -> float:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


@dataclass(frozen=True, slots=True)
class E2eParts:
    """What the error of the mean E2E is made of, as shares of the mean measured E2E; error = steps + gaps + rest.

    error   mean predicted less mean measured, of the requests that finished in both
    steps   had every step of the run taken the predicted time: what the requests' own steps would differ by
    gaps    had there been no time between steps while the requests were there; never above 0
    rest    other batches than predicted, other queues, other replicas
    """

    n: int
    error: float
    steps: float
    gaps: float
    rest: float


def e2e_parts(steps: pd.DataFrame, predicted_s: ArrayLike, predicted: pd.DataFrame, measured: pd.DataFrame) -> E2eParts:
    """Shares of the E2E error in the steps that ran while a request was there, between them, and elsewhere.

    steps, predicted_s    executed steps and their predicted seconds; all parts but the error are NaN if these are
    predicted, measured   request frames

    A request waits or runs from its arrival to its finish; the steps of its lane fill that time but for the gaps. What
    they add to its E2E is their predicted less their measured time, a step that the arrival falls into counting by the
    part that follows. Batches are taken as they were: that shorter steps also make smaller ones is in the rest.
    """
    p = np.asarray(predicted_s, dtype=float)
    both = measured.merge(predicted[["request", "e2e_s"]], on="request", suffixes=("", "_p"), validate="one_to_one")
    both = both[np.isfinite(both["e2e_s"]) & np.isfinite(both["e2e_s_p"])]
    nan = float("nan")
    if both.empty:
        return E2eParts(0, nan, nan, nan, nan)
    mean_s = float(both["e2e_s"].mean())
    error = float(both["e2e_s_p"].mean()) / mean_s - 1.0
    if not len(p) or not np.isfinite(p).all():
        return E2eParts(len(both), error, nan, nan, nan)
    from_steps_s = gaps_s = 0.0
    place = steps[["replica", "lane"]].to_numpy()
    for (replica, lane), group in both.groupby(["replica", "lane"]):
        chosen = np.flatnonzero((place[:, 0] == replica) & (place[:, 1] == lane))
        chosen = chosen[np.argsort(steps["start_s"].to_numpy(dtype=float)[chosen])]
        if not len(chosen):
            continue
        start, end = (steps[name].to_numpy(dtype=float)[chosen] for name in ("start_s", "end_s"))
        knots = np.column_stack([start, end]).ravel()

        def until(at_s: Floats, amount_s: Floats, knots: Floats = knots) -> Floats:
            """Sum of the steps' amounts up to a time, each spread evenly over its step."""
            after = np.cumsum(amount_s)
            return np.interp(at_s, knots, np.column_stack([after - amount_s, after]).ravel())

        arrival, finish = (group[name].to_numpy(dtype=float) for name in ("arrival_s", "finish_s"))
        busy = end - start
        from_steps_s += float((until(finish, p[chosen] - busy) - until(arrival, p[chosen] - busy)).sum())
        gaps_s -= float((finish - arrival - until(finish, busy) + until(arrival, busy)).sum())
    in_steps, in_gaps = (value / len(both) / mean_s for value in (from_steps_s, gaps_s))
    return E2eParts(len(both), error, in_steps, in_gaps, error - in_steps - in_gaps)
