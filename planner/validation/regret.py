"""Had one chosen among measured layouts by their predictions, how much worse than the best would one have fared?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

import numpy as np

from planner.validation.case import Case
from planner.validation.serving import Failure, Prediction

#: What layouts are chosen for, the first that all of a choice were measured by.
RATE, LOOP, E2E, TPOT, TTFT = "tokens/s per GPU", "closed-loop tokens/s per GPU", "E2E", "TPOT", "TTFT"
OBJECTIVES = (RATE, LOOP, E2E, TPOT, TTFT)


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice among measured layouts.

    key         what the layouts have in common
    objective   one of OBJECTIVES
    layouts     measured layouts, those that cannot be simulated included (they are never chosen)
    chosen, best   the layout with the best prediction, and with the best measurement
    regret      of a rate, the share of the best that is lost, 1 - chosen / best; of a latency, what is added to the
                best, chosen / best - 1
    at_random   the mean regret over all layouts: what knowing nothing costs
    """

    key: tuple[str, ...]
    objective: str
    layouts: int
    chosen: str
    best: str
    regret: float
    at_random: float


@dataclass(frozen=True, slots=True)
class Regret:
    """All choices: `mean` and `p90` of their regrets, and how many there are (n)."""

    choices: tuple[Choice, ...]

    @property
    def n(self) -> int:
        """Choices between at least two measured layouts."""
        return len(self.choices)

    @property
    def mean(self) -> float:
        """Mean regret."""
        return float(np.mean([choice.regret for choice in self.choices])) if self.choices else float("nan")

    @property
    def p90(self) -> float:
        """Regret that one choice in ten exceeds."""
        return float(np.quantile([choice.regret for choice in self.choices], 0.9)) if self.choices else float("nan")

    @property
    def best_chosen(self) -> float:
        """Share of the choices that fell on the best measured layout."""
        return float(np.mean([choice.regret == 0 for choice in self.choices])) if self.choices else float("nan")

    @property
    def at_random(self) -> float:
        """Mean regret of a choice at random."""
        return float(np.mean([choice.at_random for choice in self.choices])) if self.choices else float("nan")


def regret(
    predictions: Sequence[Prediction], failures: Sequence[Failure] = (), objectives: Sequence[str] = OBJECTIVES
) -> Regret:
    """Regret of every choice between two or more measured layouts of which at least one could be simulated.

    objectives   what may be chosen for; the first of them that all layouts of a choice were measured by is taken

    Layouts may use different numbers of devices, so rates are per device. A client that keeps `concurrency` requests in
    flight is served at concurrency / e2e requests a second (Little's law), hence at
    concurrency * mean output tokens / (e2e * devices) tokens per second and device, with
    e2e = ttft + (mean output tokens - 1) * tpot where it was not measured itself. Predictions enter by the very metrics
    that were measured. Of a layout measured several times, the mean counts.
    """
    known = {id(p.case): p.predicted for p in predictions}
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in (*(p.case for p in predictions), *(f.case for f in failures)):
        if case.choice:
            groups.setdefault(case.choice, []).append(case)
    found = (_choose(key, cases, known, objectives) for key, cases in groups.items())
    return Regret(tuple(choice for choice in found if choice is not None))


def _choose(
    key: tuple[str, ...], cases: Sequence[Case], known: Mapping[int, Mapping[str, float]], objectives: Sequence[str]
) -> Choice | None:
    layouts: dict[str, list[Case]] = {}
    for case in cases:
        layouts.setdefault(case.labels.get("layout") or str(case.plan.pools), []).append(case)
    # Clients that are the same but for what they draw: so that no draw decides which measurement is the best.
    outputs = fmean(case.workload.requests.output_tokens.mean() for case in cases)
    for objective in objectives:
        usable: dict[str, float] = {}
        scores: dict[str, float] = {}
        for name, group in layouts.items():
            measured = [score(objective, case, case.measured, outputs) for case in group]
            if any(value is None for value in measured):
                break
            usable[name] = _mean(measured)
            predicted = [
                score(objective, case, {metric: known[id(case)][metric] for metric in case.measured}, outputs)
                for case in group
                if id(case) in known
            ]
            if any(value is not None for value in predicted):
                scores[name] = _mean(predicted)
        if len(usable) < max(2, len(layouts)) or not scores:
            continue
        best, chosen = (max(sorted(table), key=table.__getitem__) for table in (usable, scores))
        lost = {name: _regret(objective, value, usable[best]) for name, value in usable.items()}
        return Choice(key, objective, len(usable), chosen, best, lost[chosen], fmean(lost.values()))
    return None


def score(objective: str, case: Case, metrics: Mapping[str, float], outputs: float) -> float | None:
    """How good metrics of a case are, larger is better: a rate, or the inverse of a latency; None if they do not tell.

    outputs   mean output tokens of a request
    """
    e2e = metrics.get("e2e")
    if e2e is None and "ttft" in metrics and "tpot" in metrics:
        e2e = metrics["ttft"] + (outputs - 1) * metrics["tpot"]
    loop = case.workload.concurrency
    rate = metrics.get("throughput") if objective == RATE else loop * outputs / e2e if loop and e2e else None
    if objective in (RATE, LOOP):
        value = None if rate is None else rate / case.plan.gpus_used
    else:
        latency = {E2E: e2e, TPOT: metrics.get("tpot"), TTFT: metrics.get("ttft")}[objective]
        value = 1.0 / latency if latency else None
    return value if value is not None and isfinite(value) and value > 0 else None


def _mean(values: Sequence[float | None]) -> float:
    return fmean(value for value in values if value is not None)


def _regret(objective: str, value: float, best: float) -> float:
    return 1.0 - value / best if objective in (RATE, LOOP) else best / value - 1.0
