"""How far are predictions from measurements, overall and by group, and how far are measurements from each other?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from planner.validation.case import METRICS, Case
from planner.validation.serving import Prediction

#: Labels that say where a row was found rather than what was measured.
PLACES = frozenset({"file", "source"})
#: Rows that agree in everything they measured to this share are one measurement written down twice, not two.
COPY = 5e-4


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors e = predicted / measured - 1 of n points; NaN where there are too few of them.

    mape, median_ape   mean and median of |e|
    bias               mean of e: above 0 predicts too much
    spearman           rank correlation of predictions and measurements
    """

    mape: float
    median_ape: float
    bias: float
    spearman: float
    n: int


@dataclass(frozen=True, slots=True)
class Noise:
    """How much measurements of the same thing differ: `sets` of two or more `rows`, copies of a row left out.

    mean_spread, median_spread   of (largest - smallest) / mean, over the sets
    mape, median_ape             the errors that knowing the true mean of every set would still leave, over the rows:
                                 the deviation from the set's mean, times sqrt(k / (k - 1)) for k rows, since the mean
                                 of a few follows them (Bessel's correction)
    """

    mean_spread: float
    median_spread: float
    mape: float
    median_ape: float
    sets: int
    rows: int


def errors(predicted: ArrayLike, measured: ArrayLike) -> Errors:
    """Errors of points; those whose prediction or measurement is not a positive number are not counted.

    >>> found = errors([1.1, 1.8], [1.0, 2.0])
    >>> round(found.mape, 9), round(found.median_ape, 9), round(found.bias, 9), round(found.spearman, 9), found.n
    (0.1, 0.1, 0.0, 1.0, 2)
    """
    p, m = np.asarray(predicted, dtype=float), np.asarray(measured, dtype=float)
    usable = np.isfinite(p) & np.isfinite(m) & (m > 0)
    p, m = p[usable], m[usable]
    nan = float("nan")
    if not len(p):
        return Errors(nan, nan, nan, nan, 0)
    e = p / m - 1.0
    ape = np.abs(e)
    return Errors(float(ape.mean()), float(np.median(ape)), float(e.mean()), _spearman(p, m), len(p))


def _spearman(p: np.ndarray, m: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties at their mean rank; NaN where either side is constant."""
    if len(p) < 2 or np.ptp(p) == 0 or np.ptp(m) == 0:
        return float("nan")
    return float(np.clip(np.corrcoef(rankdata(p), rankdata(m))[0, 1], -1.0, 1.0))


def by_metric(predictions: Iterable[Prediction]) -> dict[str, Errors]:
    """Errors of every metric, over the points that measured it."""
    found = list(predictions)
    table = {}
    for metric in METRICS:
        points = [(p.predicted[metric], p.case.measured[metric]) for p in found if metric in p.case.measured]
        table[metric] = errors([predicted for predicted, _ in points], [measured for _, measured in points])
    return table


def by_group(predictions: Sequence[Prediction]) -> dict[str, dict[str, dict[str, Errors]]]:
    """Errors by label, by its value, by metric; a point without a label is in none of its groups."""
    members: dict[str, dict[str, list[Prediction]]] = {}
    for prediction in predictions:
        for label, value in prediction.case.labels.items():
            members.setdefault(label, {}).setdefault(value, []).append(prediction)
    return {
        label: {value: by_metric(values[value]) for value in sorted(values, key=natural)}
        for label, values in members.items()
    }


def natural(text: str) -> tuple[int, float, str]:
    """Sorts numbers by size and before words.

    >>> sorted(["b", "128", "a", "16"], key=natural)
    ['16', '128', 'a', 'b']
    """
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def noise_floor(cases: Iterable[Case]) -> dict[str, Noise]:
    """Noise of every metric, from the points with equal labels (but for where they were found) and an equal plan."""
    sets = [originals(alike) for alike in _alike(cases)]
    table = {}
    for metric in METRICS:
        spreads: list[float] = []
        deviations: list[float] = []
        for alike in sets:
            values = np.array([case.measured[metric] for case in alike if metric in case.measured], dtype=float)
            values = values[np.isfinite(values) & (values > 0)]
            if len(values) < 2:
                continue
            mean = values.mean()
            spreads.append(float(np.ptp(values) / mean))
            deviations += (np.abs(values / mean - 1.0) * np.sqrt(len(values) / (len(values) - 1))).tolist()
        nan = float("nan")
        table[metric] = Noise(
            mean_spread=float(np.mean(spreads)) if spreads else nan,
            median_spread=float(np.median(spreads)) if spreads else nan,
            mape=float(np.mean(deviations)) if deviations else nan,
            median_ape=float(np.median(deviations)) if deviations else nan,
            sets=len(spreads),
            rows=len(deviations),
        )
    return table


def copies(cases: Iterable[Case]) -> int:
    """Points that only repeat what another one says (they count in the errors, but are no second measurement)."""
    return sum(len(alike) - len(originals(alike)) for alike in _alike(cases))


def originals(alike: Sequence[Case]) -> list[Case]:
    """The points without those that repeat the measurements of an earlier one to COPY, the rounding of reports."""
    kept: list[Case] = []
    for case in alike:
        if not any(_same(case.measured, other.measured) for other in kept):
            kept.append(case)
    return kept


def _same(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one.keys() == other.keys() and all(isclose(one[name], other[name], rel_tol=COPY) for name in one)


def _alike(cases: Iterable[Case]) -> list[list[Case]]:
    """Points that say the same of what was measured, wherever they were found."""
    sets: dict[object, list[Case]] = {}
    for case in cases:
        labels = frozenset((label, value) for label, value in case.labels.items() if label not in PLACES)
        sets.setdefault((labels, case.plan, case.choice), []).append(case)
    return list(sets.values())
