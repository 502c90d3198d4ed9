"""How far was the prediction from what ran, and how far are two runs of the same requests from each other?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hwmodels.step_model import StepModel
from planner.validation.statistics import errors

Floats = NDArray[np.float64]

KINDS = ("decode", "prefill", "mixed")
LATENCIES = ("ttft", "tpot", "e2e")
#: Targets: median error of a step, points by which the error of a request may exceed what two runs differ by, bias,
#: and what a ranking of settings must reach.
STEP_LIMIT, ALLOWANCE, BIAS_LIMIT, SPEARMAN_LIMIT, REGRET_LIMIT = 0.05, 0.03, 0.04, 0.9, 0.03
#: Mean error of a request on a GPU, by metric.
GPU_LIMITS = {"ttft": 0.08, "tpot": 0.05, "e2e": 0.05}


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepErrors:
    """Relative errors e = predicted / measured - 1 of n steps; NaN where there is none.

    median_ape, p95_ape   of |e|
    bias                  of the time of all together, sum of predicted / sum of measured - 1
    median_bias           median of e
    share                 of the measured time of all steps
    """

    n: int
    median_ape: float
    p95_ape: float
    bias: float
    median_bias: float
    share: float


def durations(steps: pd.DataFrame) -> Floats:
    """Seconds of every executed step, from forming its batch to knowing its tokens."""
    start_s, end_s = (steps[name].to_numpy(dtype=float) for name in ("start_s", "end_s"))
    seconds: Floats = end_s - start_s
    return seconds


def kinds(steps: pd.DataFrame) -> NDArray[np.str_]:
    """One of KINDS for every executed step."""
    chunks = np.array([len(items) for items in steps["items"]], dtype=int)
    decodes = np.asarray(steps["decode_sequences"], dtype=int)
    return np.where(chunks == 0, "decode", np.where(decodes == 0, "prefill", "mixed"))


def predict_steps(model: StepModel, steps: pd.DataFrame) -> Floats:
    """Seconds the step model says of every executed step; NaN in a pipeline, where steps overlap."""
    if len(model.stages) > 1:
        return np.full(len(steps), np.nan)
    batches = zip(steps["decode_sequences"], steps["decode_context_tokens"], steps["items"], strict=True)
    return np.array([model.step_s(int(n), int(context), items) for n, context, items in batches], dtype=float)


def step_errors(steps: pd.DataFrame, predicted_s: ArrayLike) -> dict[str, StepErrors]:
    """Errors of executed steps (EXECUTED_COLUMNS) by kind, and of 'all'."""
    return errors_by_kind(kinds(steps), predicted_s, durations(steps))


def errors_by_kind(kind: ArrayLike, predicted_s: ArrayLike, measured_s: ArrayLike) -> dict[str, StepErrors]:
    """The same from the kind, the prediction and the measurement of every step.

    >>> found = errors_by_kind(["decode", "mixed"], [1.1, 2.0], [1.0, 4.0])
    >>> round(found["decode"].bias, 9), found["mixed"].median_ape, found["prefill"].n, round(found["all"].bias, 9)
    (0.1, 0.5, 0, -0.38)
    """
    kind = np.asarray(kind)
    p, m = np.asarray(predicted_s, dtype=float), np.asarray(measured_s, dtype=float)
    total = float(m.sum())
    table = {name: _step_errors(p[kind == name], m[kind == name], total) for name in KINDS}
    table["all"] = _step_errors(p, m, total)
    return table


def _step_errors(p: Floats, m: Floats, total_s: float) -> StepErrors:
    nan = float("nan")
    share = float(m.sum()) / total_s if total_s else nan
    usable = np.isfinite(p) & (m > 0)
    p, m = p[usable], m[usable]
    if not len(p):
        return StepErrors(0, nan, nan, nan, nan, share)
    e = p / m - 1.0
    ape = np.abs(e)
    bias = float(p.sum() / m.sum() - 1.0)
    return StepErrors(len(p), float(np.median(ape)), float(np.quantile(ape, 0.95)), bias, float(np.median(e)), share)


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and quantiles of a latency over requests, in seconds."""

    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float

    @classmethod
    def of(cls, values_s: Floats) -> Spread:
        """NaN where there are no values."""
        if not len(values_s):
            return cls(*[float("nan")] * 4)
        return cls(float(values_s.mean()), *map(float, np.quantile(values_s, (0.5, 0.9, 0.99))))


@dataclass(frozen=True, slots=True)
class RequestErrors:
    """Relative errors e = predicted / measured - 1 of one latency of n requests; NaN where there is none.

    median_ape, mape, p90_ape   of |e|
    bias                        of the mean: mean predicted / mean measured - 1
    predicted, measured         the distributions, of the same requests
    """

    n: int
    median_ape: float
    mape: float
    p90_ape: float
    bias: float
    predicted: Spread
    measured: Spread

    @property
    def mean_error(self) -> float:
        """Relative error of the mean, without its sign."""
        return abs(self.bias)


def paired(predicted: pd.DataFrame, measured: pd.DataFrame, metric: str) -> tuple[Floats, Floats]:
    """A latency of the requests that finished in both request frames and have one, in seconds."""
    columns = ["request", "e2e_s", *([] if metric == "e2e" else [f"{metric}_s"])]
    both = predicted[columns].merge(measured[columns], on="request", suffixes=("_p", "_m"), validate="one_to_one")
    finished = np.isfinite(both["e2e_s_p"]) & np.isfinite(both["e2e_s_m"])
    p, m = (both[f"{metric}_s_{side}"].to_numpy(dtype=float) for side in "pm")
    usable = finished.to_numpy() & np.isfinite(p) & np.isfinite(m) & (m > 0)
    return p[usable], m[usable]


def request_errors(predicted: pd.DataFrame, measured: pd.DataFrame) -> dict[str, RequestErrors]:
    """Errors of TTFT, TPOT and E2E over the requests that finished in both request frames."""
    table = {}
    for metric in LATENCIES:
        p, m = paired(predicted, measured, metric)
        found = errors(p, m)
        p90 = float(np.quantile(np.abs(p / m - 1.0), 0.9)) if len(p) else float("nan")
        bias = float(p.mean() / m.mean() - 1.0) if len(p) else float("nan")
        table[metric] = RequestErrors(len(p), found.median_ape, found.mape, p90, bias, Spread.of(p), Spread.of(m))
    return table


# --- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Execution:
    """One real run.

    requests           as simulator.result.request_frame; NaN where a run that broke off left something open
    steps              columns planner.execute.records.EXECUTED_COLUMNS
    predicted_step_s   of every one of these steps, see predict_steps
    drift              how much longer the same passes took just before and after the run than when they were profiled
    at_speed           the requests as they are predicted with all steps that much longer, the mean of both
    """

    requests: pd.DataFrame
    steps: pd.DataFrame
    predicted_step_s: Floats
    drift: tuple[float, float] = (float("nan"), float("nan"))
    at_speed: pd.DataFrame | None = None

    @property
    def finished(self) -> int:
        """Requests that were served to their end."""
        return int(np.isfinite(self.requests["e2e_s"]).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The prediction beside every run, and the runs beside each other.

    predicted   the simulator's request frame
    runs        real runs of the same requests
    steps       by run: errors of its steps by kind
    requests    by run: errors of the prediction by latency
    apart       by pair of runs, the earlier taken for the measurement: what they differ by
    at_speed    by run: errors of the prediction at the speed the machine had then; empty where that is not known
    """

    predicted: pd.DataFrame
    runs: tuple[Execution, ...]
    steps: tuple[dict[str, StepErrors], ...]
    requests: tuple[dict[str, RequestErrors], ...]
    apart: dict[tuple[int, int], dict[str, RequestErrors]]
    at_speed: tuple[dict[str, RequestErrors], ...] = ()

    @classmethod
    def of(cls, predicted: pd.DataFrame, runs: Sequence[Execution]) -> Comparison:
        """All errors; `runs` may be empty."""
        return cls(
            predicted=predicted,
            runs=tuple(runs),
            steps=tuple(step_errors(run.steps, run.predicted_step_s) for run in runs),
            requests=tuple(request_errors(predicted, run.requests) for run in runs),
            apart={
                (i, j): request_errors(runs[j].requests, runs[i].requests) for i, j in combinations(range(len(runs)), 2)
            },
            at_speed=tuple({} if run.at_speed is None else request_errors(run.at_speed, run.requests) for run in runs),
        )

    def error(self, metric: str) -> float:
        """Mean error of a request's latency, the mean over the runs."""
        return _mean([found[metric].mape for found in self.requests])

    def bias(self, metric: str) -> float:
        """Error of the mean latency with its sign, the mean over the runs."""
        return _mean([found[metric].bias for found in self.requests])

    def noise(self, metric: str) -> float:
        """Mean difference of a request's latency between two runs, the mean over the pairs; NaN for a single run."""
        return _mean([found[metric].mape for found in self.apart.values()])


def _mean(values: Sequence[float]) -> float:
    """Of those that exist: a run that broke off before anything finished has no say."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ranked:
    """A scheduler setting with what was predicted and measured of it; lower is better."""

    name: str
    predicted: float
    measured: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """Settings by prediction and by measurement, the best first.

    spearman    rank correlation of predictions and measurements; NaN where either side is all the same
    regret      measured of the setting predicted to be best / measured of the best - 1; of several that are predicted
                to be equally good, their mean
    at_random   mean regret of all settings: what knowing nothing costs
    """

    settings: tuple[Ranked, ...]
    spearman: float
    regret: float
    at_random: float
    predicted_order: tuple[str, ...]
    measured_order: tuple[str, ...]


def ranking(settings: Sequence[Ranked]) -> Ranking:
    """How well predictions order the settings; those without a prediction or a measurement are left out.

    >>> found = ranking([Ranked("a", 1.0, 2.2), Ranked("b", 3.0, 2.0), Ranked("c", 4.0, 6.0)])
    >>> round(found.spearman, 9), round(found.regret, 9), found.predicted_order, found.measured_order
    (0.5, 0.1, ('a', 'b', 'c'), ('b', 'a', 'c'))
    """
    known = tuple(s for s in settings if np.isfinite(s.predicted) and np.isfinite(s.measured) and s.measured > 0)
    p, m = np.array([s.predicted for s in known]), np.array([s.measured for s in known])
    lost = m / m.min() - 1.0 if known else m
    return Ranking(
        settings=known,
        spearman=errors(p, m).spearman,
        regret=float(lost[p == p.min()].mean()) if known else float("nan"),
        at_random=float(lost.mean()) if known else float("nan"),
        predicted_order=tuple(s.name for s in sorted(known, key=lambda s: s.predicted)),
        measured_order=tuple(s.name for s in sorted(known, key=lambda s: s.measured)),
    )


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target.

    sense   'at most', 'within' (either sign) or 'at least' the limit
    """

    name: str
    figure: float
    sense: str
    limit: float

    @property
    def met(self) -> bool | None:
        """None where there is no figure or nothing to hold it against."""
        if not (np.isfinite(self.figure) and np.isfinite(self.limit)):
            return None
        if self.sense == "at least":
            return self.figure >= self.limit
        return (abs(self.figure) if self.sense == "within" else self.figure) <= self.limit


def verdicts(
    comparison: Comparison,
    held_out: Mapping[str, StepErrors] | None = None,
    ranked: Ranking | None = None,
    limits: Mapping[str, float] | None = None,
) -> list[Verdict]:
    """Every target with the figure reached; over several runs, their mean.

    held_out   errors of steps that were profiled but not fitted to
    limits     of the mean error of a request by latency, such as GPU_LIMITS, besides what two runs differ by
    """
    found = []
    if held_out is not None:
        found.append(Verdict("median step error, held-out steps", held_out["all"].median_ape, "at most", STEP_LIMIT))
    served = _mean([table["all"].median_ape for table in comparison.steps])
    found.append(Verdict("median step error, served steps", served, "at most", STEP_LIMIT))
    for metric in LATENCIES:
        limit = comparison.noise(metric) + ALLOWANCE
        found.append(
            Verdict(f"mean {metric.upper()} error, two runs + 3 points", comparison.error(metric), "at most", limit)
        )
    for metric, limit in (limits or {}).items():
        found.append(Verdict(f"mean {metric.upper()} error", comparison.error(metric), "at most", limit))
    found += [
        Verdict(f"bias of mean {metric.upper()}", comparison.bias(metric), "within", BIAS_LIMIT) for metric in LATENCIES
    ]
    if ranked is not None:
        found.append(Verdict("rank correlation of settings", ranked.spearman, "at least", SPEARMAN_LIMIT))
        found.append(Verdict("regret of the chosen setting", ranked.regret, "at most", REGRET_LIMIT))
    return found
