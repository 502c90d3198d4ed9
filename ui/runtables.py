"""What do the tables and sentences of a report on real runs say, wherever they are shown?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from planner.validation.execution import ALLOWANCE, LATENCIES, Ranking, Spread
from planner.validation.remainder import E2eParts, Unexplained
from ui.validationreport import signed
from ui.words import number, percent, seconds

if TYPE_CHECKING:
    from ui.runreport import ProfileSummary, RunReport


def profile_words(profile: ProfileSummary) -> str:
    """What profiling took and how well it predicts what it did not see."""
    found = profile.held_out.get("all")
    held = (
        ""
        if found is None or not found.n
        else f"; {found.n:,} passes left out are predicted to {percent(found.median_ape)} (median), "
        f"{percent(found.p95_ape)} (p95)"
    )
    return f"profile: {profile.passes:,} passes measured in {seconds(profile.wall_s)}{held}"


TARGET_COLUMNS = ("target", "reached", "limit", "met")


def target_rows(report: RunReport) -> list[list[str]]:
    """One line per target; a dash where it cannot be told."""
    rows = []
    for verdict in report.verdicts:
        shown = number if verdict.sense == "at least" else percent
        reached = signed(verdict.figure) if verdict.sense == "within" else shown(verdict.figure)
        sign = "+-" if verdict.sense == "within" else f"{verdict.sense} "
        limit = sign + shown(verdict.limit) if np.isfinite(verdict.limit) else "-"
        met = {True: "yes", False: "no", None: "-"}[verdict.met]
        rows.append([verdict.name, reached, limit, met])
    return rows


def met_words(report: RunReport) -> str:
    """How many targets were met."""
    met = [verdict.met for verdict in report.verdicts]
    unknown = met.count(None)
    return f"{met.count(True)} of {len(met)} met" + (f", {unknown} cannot be told" if unknown else "")


REQUEST_COLUMNS = ("metric", "compared", "requests", "mean off by", "MAPE", "median APE", "p90 APE")


def request_rows(report: RunReport) -> list[list[str]]:
    """One line per latency and run, then what runs differ by."""
    comparison = report.comparison
    compared = {f"predicted : run {i}": found for i, found in enumerate(comparison.requests, 1)}
    compared |= {f"at its speed : run {i}": found for i, found in enumerate(comparison.at_speed, 1) if found}
    compared |= {f"run {j + 1} : run {i + 1}": found for (i, j), found in comparison.apart.items()}
    rows = []
    for metric in LATENCIES:
        for name, found in compared.items():
            e = found[metric]
            errors = [percent(e.mape), percent(e.median_ape), percent(e.p90_ape)]
            rows.append([metric.upper(), name, f"{e.n:,}", signed(e.bias), *errors])
    return rows


SPREAD_COLUMNS = ("metric", "of", "requests", "mean", "p50", "p90", "p99")


def spread_rows(report: RunReport) -> list[list[str]]:
    """Mean and quantiles of every latency, predicted and in every run, of the requests that finished there."""
    frames = {"predicted": report.comparison.predicted}
    frames |= {f"run {i}": run.requests for i, run in enumerate(report.comparison.runs, 1)}
    rows = []
    for metric in LATENCIES:
        for name, frame in frames.items():
            values = frame.loc[np.isfinite(frame["e2e_s"]), f"{metric}_s"].to_numpy(dtype=float)
            values = values[np.isfinite(values)]
            spread = asdict(Spread.of(values)).values()
            rows.append([metric.upper(), name, f"{len(values):,}", *map(seconds, spread)])
    return rows


STEP_COLUMNS = ("steps", "of", "steps run", "share of time", "median APE", "p95 APE", "total off by", "median bias")


def step_rows(report: RunReport) -> list[list[str]]:
    """One line per kind of step and run, held-out passes first."""
    tables = {} if report.profile is None else {"held-out passes": report.profile.held_out}
    tables |= {f"run {i}": found for i, found in enumerate(report.comparison.steps, 1)}
    return [
        [kind, name, f"{e.n:,}", percent(e.share), percent(e.median_ape), percent(e.p95_ape), signed(e.bias),
         signed(e.median_bias)]
        for name, table in tables.items() for kind, e in table.items() if e.n
    ]  # fmt: skip


PART_COLUMNS = ("steps", "count", "share of time", "of the total error", "median bias")


def part_rows(left: Unexplained) -> list[list[str]]:
    """One line per kind, then per size."""
    named = {**left.kinds, **{f"{name} tokens": part for name, part in left.sizes.items()}}
    return [
        [name, f"{part.n:,}", percent(part.share), signed(part.of_total), signed(part.median_bias)]
        for name, part in named.items()
    ]


def drift_words(report: RunReport) -> list[str]:
    """How the machine's speed changed, run by run; nothing where that was not measured."""
    lines = []
    for position, run in enumerate(report.comparison.runs, 1):
        if np.isfinite(run.drift).all():
            before, after = (signed(share) for share in run.drift)
            lines.append(
                f"Against profiling, the same passes took {before} of time just before run {position} and {after} just "
                "after: 'at its speed' is the prediction with all steps changed by the mean of both."
            )
    return lines


def left_words(left: Unexplained, parts: E2eParts) -> list[str]:
    """What is left beside the kinds and sizes of steps; nothing where it cannot be told."""
    lines = []
    if left.kinds:
        lines.append(
            f"Like steps in a row differ by {percent(left.jitter)}, which no step model can tell. The error was "
            f"{signed(left.first_third)} in the first third of the run and {signed(left.last_third)} in the last; that "
            f"of one step goes with that of the next by {number(left.persistence)} (0: noise, 1: something slow). Time "
            f"between steps adds {percent(left.between)}."
        )
    if np.isfinite(parts.steps):
        lines.append(
            f"The mean E2E is off by {signed(parts.error)}: {_points(parts.steps)} from the steps' own errors, "
            f"{_points(parts.gaps)} from time between steps, {_points(parts.rest)} from other batches and queues."
        )
    return lines


def _points(share: float) -> str:
    """A share with its sign, to a hundredth of a percent: parts that add up."""
    return signed(round(share, 4) + 0.0)


RANKING_COLUMNS = ("setting", "predicted", "measured", "predicted place", "measured place")


def ranking_rows(ranking: Ranking) -> list[list[str]]:
    """One line per setting, the best measured first."""
    known = {setting.name: setting for setting in ranking.settings}
    rows = []
    for place, name in enumerate(ranking.measured_order, 1):
        setting = known[name]
        predicted_place = ranking.predicted_order.index(name) + 1
        rows.append([name, number(setting.predicted), number(setting.measured), str(predicted_place), str(place)])
    return rows


def ranking_words(ranking: Ranking) -> str:
    """How well one would have chosen."""
    if len(ranking.settings) < 2:
        return "No two settings were both predicted and measured."
    return (
        f"Rank correlation {number(ranking.spearman)}; the setting predicted to be best is "
        f"{percent(ranking.regret)} worse than the best one, one taken at random {percent(ranking.at_random)}."
    )


def belief(report: RunReport) -> str:
    """What to believe of the prediction, in a few sentences."""
    comparison = report.comparison
    served = [metric for metric in LATENCIES if np.isfinite(comparison.error(metric))]
    if not served:
        return "No request was served to its end both in the simulation and for real: there is nothing to compare."
    names = _joined([metric.upper() for metric in served])
    worst = max(abs(comparison.bias(metric)) for metric in served)
    told = [
        f"Mean {names} were predicted to within {percent(worst)} of what ran "
        f"({_joined([signed(comparison.bias(metric)) for metric in served])}).",
        f"A single request was off by {_joined([percent(comparison.error(metric)) for metric in served])} on average",
    ]
    noise = {metric: comparison.noise(metric) for metric in served if np.isfinite(comparison.noise(metric))}
    if not noise:
        told[-1] += "; it was run once, so how much of that is noise is not known."
        return " ".join(told)
    told[-1] += (
        f", where two real runs of the same requests differ by "
        f"{_joined([percent(difference) for difference in noise.values()])}."
    )
    beyond = {metric: comparison.error(metric) - difference for metric, difference in noise.items()}
    worse = [metric.upper() for metric, points in beyond.items() if points > ALLOWANCE]
    if worse:
        told.append(f"For {_joined(worse)} the prediction misses more than noise explains.")
    elif max(beyond.values()) <= 0:
        told.append("The prediction comes as close as another real run.")
    else:
        told.append(f"The prediction comes as close as another real run, but for {100 * ALLOWANCE:g} points at most.")
    apart = max(found[metric].mean_error for found in comparison.apart.values() for metric in noise if found[metric].n)
    told.append(
        f"The means of two runs differ by up to {percent(apart)}: take plans for equal whose predictions differ by "
        f"less than {percent(max(worst, apart))}."
    )
    return " ".join(told)


def _joined(words: Sequence[str]) -> str:
    """As said in a sentence.

    >>> _joined(["a"]), _joined(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
