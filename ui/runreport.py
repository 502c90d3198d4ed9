"""What a prediction held against real runs amounts to: as one JSON object, as CSV, and on a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.validation.execution import LATENCIES, Comparison, Ranking, StepErrors, Verdict, verdicts
from planner.validation.remainder import E2eParts, Unexplained, e2e_parts, unexplained
from ui import runtables
from ui.jsonout import dumps
from ui.rendering import say, show_table

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class ProfileSummary:
    """What the step model rests on.

    wall_s     the time profiling took
    passes     forward passes measured
    held_out   errors of passes that were measured but not fitted to, by kind
    """

    wall_s: float
    passes: int
    held_out: Mapping[str, StepErrors]


@dataclass(frozen=True, slots=True, eq=False)
class RunReport:
    """A prediction, the runs it was held against, and what is to be known of both.

    about       {what: words}, such as machine, model, mapping, traffic, scheduler
    profile     None where the step model came from elsewhere
    ranking     of scheduler settings; None where only one was run
    objective   what these are ranked by, with its unit
    partial     why the runs broke off; None where they did not
    limits      of the mean error of a request by latency, besides what two runs differ by
    """

    about: Mapping[str, str]
    comparison: Comparison
    profile: ProfileSummary | None = None
    ranking: Ranking | None = None
    objective: str = "mean E2E, s"
    partial: str | None = None
    limits: Mapping[str, float] | None = None

    @property
    def verdicts(self) -> list[Verdict]:
        """The targets."""
        held_out = None if self.profile is None else self.profile.held_out
        return verdicts(self.comparison, held_out, self.ranking, self.limits)

    @property
    def remainders(self) -> list[tuple[Unexplained, E2eParts]]:
        """What is left in every run."""
        predicted = self.comparison.predicted
        return [
            (
                unexplained(run.steps, run.predicted_step_s),
                e2e_parts(run.steps, run.predicted_step_s, predicted, run.requests),
            )
            for run in self.comparison.runs
        ]


# --- JSON -------------------------------------------------------------------------------------------------------------


def report_object(report: RunReport) -> dict[str, Any]:
    """The layout of --json and report.json, which only grows; times in seconds, errors as shares, unknown is null.

    version, status   1; 'complete', or 'partial' with `reason`
    about             {what: words}
    requests          in the trace; `predicted` of them finish in the simulation
    believe           a few sentences on what to believe
    targets           list of {name, figure, sense, limit, met}
    profile           {wall_s, passes, held_out {kind: step errors}} or null
    runs              list of {finished, drift [before, after], at_speed {metric: request errors}, steps {kind: step
                      errors}, requests {metric: request errors}, unexplained {kinds, sizes, first_third, last_third,
                      persistence, jitter, between}, e2e_parts {n, error, steps, gaps, rest}}
    apart             list of {runs: [earlier, later], requests {metric: request errors of the later}}
    ranking           {objective, spearman, regret, at_random, settings, predicted_order, measured_order} or null

    step errors       n, median_ape, p95_ape, bias, median_bias, share
    request errors    n, median_ape, mape, p90_ape, bias, predicted and measured {mean_s, p50_s, p90_s, p99_s}
    """
    comparison, profile = report.comparison, report.profile
    content = {
        "version": 1,
        "status": "complete" if report.partial is None else "partial",
        **({} if report.partial is None else {"reason": report.partial}),
        "about": dict(report.about),
        "requests": len(comparison.predicted),
        "predicted": int(np.isfinite(comparison.predicted["e2e_s"]).sum()),
        "believe": runtables.belief(report),
        "targets": [{**asdict(verdict), "met": verdict.met} for verdict in report.verdicts],
        "profile": None if profile is None else asdict(profile),
        "runs": [
            {
                "finished": run.finished,
                "drift": list(run.drift),
                "at_speed": _table(at_speed),
                "steps": _table(steps),
                "requests": _table(requests),
                "unexplained": asdict(left),
                "e2e_parts": asdict(parts),
            }
            for run, steps, requests, at_speed, (left, parts) in zip(
                comparison.runs,
                comparison.steps,
                comparison.requests,
                comparison.at_speed,
                report.remainders,
                strict=True,
            )
        ],
        "apart": [
            {"runs": [earlier + 1, later + 1], "requests": _table(found)}
            for (earlier, later), found in comparison.apart.items()
        ],
        "ranking": None if report.ranking is None else {"objective": report.objective, **asdict(report.ranking)},
    }
    finite: dict[str, Any] = json.loads(dumps(content))
    return finite


def _table(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asdict(errors) for name, errors in found.items()}


# --- CSV --------------------------------------------------------------------------------------------------------------


def runs_text(comparison: Comparison) -> str:
    """One line per request: its sizes, its arrival, and its latencies as predicted and in every run, in seconds.

    Empty where it did not get so far.
    """
    columns = [f"{metric}_s" for metric in LATENCIES]
    table = comparison.predicted[["request", "prompt_tokens", "output_tokens", "arrival_s", *columns]]
    table = table.rename(columns={name: f"predicted_{name}" for name in columns})
    for position, run in enumerate(comparison.runs, 1):
        measured = run.requests[["request", *columns]]
        table = table.merge(
            measured.rename(columns={name: f"run_{position}_{name}" for name in columns}),
            on="request", how="left", validate="one_to_one",
        )  # fmt: skip
    return table.to_csv(index=False, lineterminator="\n")


# --- terminal ---------------------------------------------------------------------------------------------------------


def show_report(out: Console, report: RunReport) -> None:
    """What was run, what to believe, the targets, errors of requests and steps, what is left, and the settings."""
    for what, words in report.about.items():
        say(out, f"{what}: {words}")
    if report.profile is not None:
        say(out, runtables.profile_words(report.profile))
    if report.partial is not None:
        say(out, f"Partial: {report.partial}", "bold red")
    show_table(out, f"Targets ({runtables.met_words(report)})", runtables.TARGET_COLUMNS, runtables.target_rows(report))
    show_table(out, "Requests", runtables.REQUEST_COLUMNS, runtables.request_rows(report), words=2)
    for line in runtables.drift_words(report):
        say(out, line)
    show_table(out, "Latencies", runtables.SPREAD_COLUMNS, runtables.spread_rows(report), words=2)
    steps = runtables.step_rows(report)
    if steps:  # those of a pipeline overlap, and are not predicted one by one
        show_table(out, "Steps", runtables.STEP_COLUMNS, steps, words=2)
    for position, (left, parts) in enumerate(report.remainders, 1):
        if left.kinds:
            show_table(
                out,
                f"What is left of the step times in run {position}",
                runtables.PART_COLUMNS,
                runtables.part_rows(left),
            )
        for line in runtables.left_words(left, parts):
            say(out, line)
    if report.ranking is not None:
        title = f"Settings by {report.objective} (lower is better)"
        show_table(out, title, runtables.RANKING_COLUMNS, runtables.ranking_rows(report.ranking))
        say(out, runtables.ranking_words(report.ranking))
    out.print()
    say(out, runtables.belief(report), "bold")
