"""What a validation against measured serving found: as one JSON object, as CSV, and on a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from planner.validation.case import METRICS
from planner.validation.regret import E2E, TPOT, TTFT, Regret, regret
from planner.validation.serving import Predictions
from planner.validation.statistics import Errors, Noise, by_group, by_metric, copies, noise_floor
from ui.rendering import say, show_table
from ui.words import number, percent, seconds

if TYPE_CHECKING:
    from rich.console import Console

#: Labels whose groups are shown on a terminal, and the most values one may have there; the rest is in the files.
SHOWN = ("file", "system", "backend", "model", "precision", "mode")
MOST_VALUES = 24
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "throughput": "tokens/s"}


@dataclass(frozen=True, slots=True)
class Report:
    """Predictions and what they amount to.

    files      as they were given
    cost       what prices were asked to rest on
    found      every row
    errors     by metric
    groups     by label, value, metric
    noise      by metric
    copies     rows that say the same as another one
    regret     of choices among measured layouts
    latency_regret   the same, had one chosen for a latency alone, by metric
    evidence   mean share over the predicted rows by what prices rest on
    wall_s     the time it took
    """

    files: tuple[str, ...]
    cost: str
    found: Predictions
    errors: Mapping[str, Errors]
    groups: Mapping[str, Mapping[str, Mapping[str, Errors]]]
    noise: Mapping[str, Noise]
    copies: int
    regret: Regret
    latency_regret: Mapping[str, Regret]
    evidence: Mapping[str, float]
    wall_s: float

    @classmethod
    def of(cls, files: Sequence[str], cost: str, found: Predictions, wall_s: float) -> Report:
        """All statistics of the predictions."""
        shares: dict[str, float] = {}
        for prediction in found.predictions:
            for source, share in prediction.evidence.items():
                shares[source] = shares.get(source, 0.0) + share / len(found.predictions)
        return cls(
            files=tuple(files),
            cost=cost,
            found=found,
            errors=by_metric(found.predictions),
            groups=by_group(found.predictions),
            noise=noise_floor(found.cases),
            copies=copies(found.cases),
            regret=regret(found.predictions, found.failures),
            latency_regret={
                metric: regret(found.predictions, found.failures, [objective])
                for metric, objective in (("e2e", E2E), ("tpot", TPOT), ("ttft", TTFT))
            },
            evidence=dict(sorted(shares.items(), key=lambda item: -item[1])),
            wall_s=wall_s,
        )

    @property
    def metrics(self) -> list[str]:
        """Metrics that were measured at least once."""
        return [metric for metric in METRICS if self.errors[metric].n]


# --- JSON -------------------------------------------------------------------------------------------------------------


def report_object(report: Report) -> dict[str, Any]:
    """The layout of --json, which only grows.

    rows, mapped   rows selected, and those with a prediction
    unmapped       {reason: rows without one}
    ttft, tpot, throughput, e2e   {mape, median_ape, bias, spearman, n}, errors relative to the measurement
    groups         {label: {value: {metric: as above}}}
    noise          {metric: {mape, median_ape, mean_spread, median_spread, sets, rows}} of rows measured more than once
    copies         rows that only repeat another one; they count in the errors, not in the noise
    regret         mean, p90, n; best_chosen, at_random (see planner.validation.regret); latency {e2e, tpot, ttft: as
                   regret, where the layout with the lowest latency is wanted, whatever devices it takes}
    evidence       {source of prices: mean share of a step's device time}
    files, cost, wall_s
    """
    return {
        "files": list(report.files),
        "cost": report.cost,
        "rows": report.found.rows,
        "mapped": len(report.found.predictions),
        "unmapped": report.found.reasons,
        **_metrics(report.errors),
        "groups": {
            label: {value: _metrics(table) for value, table in values.items()}
            for label, values in report.groups.items()
        },
        "noise": {metric: asdict(noise) for metric, noise in report.noise.items()},
        "copies": report.copies,
        "regret": {**_regret(report.regret), "latency": {m: _regret(r) for m, r in report.latency_regret.items()}},
        "evidence": dict(report.evidence),
        "wall_s": report.wall_s,
    }


def _regret(found: Regret) -> dict[str, float]:
    return {
        "mean": found.mean,
        "p90": found.p90,
        "n": found.n,
        "best_chosen": found.best_chosen,
        "at_random": found.at_random,
    }


def _metrics(table: Mapping[str, Errors]) -> dict[str, dict[str, float]]:
    return {metric: asdict(errors) for metric, errors in table.items()}


# --- CSV --------------------------------------------------------------------------------------------------------------


def rows_text(report: Report) -> str:
    """One line per row: its labels, measurements, predictions, relative errors, evidence, or why it has none."""
    found = report.found
    every = [*(case.labels for case in found.cases), *(row.labels for row in found.unmapped)]
    labels = list(dict.fromkeys(label for row in every for label in row))
    sources = list(report.evidence)
    columns = [f"{kind}_{metric}" for metric in METRICS for kind in ("measured", "predicted", "error")]
    lines: list[list[object]] = []
    for p in found.predictions:
        numbers: list[object] = []
        for metric in METRICS:
            measured, predicted = p.case.measured.get(metric), p.predicted[metric]
            numbers += [measured, predicted, predicted / measured - 1 if measured else None]
        shares = [p.evidence.get(source, 0.0) for source in sources]
        lines.append([p.case.row, *_values(p.case.labels, labels), *numbers, *shares, "", ""])
    for f in found.failures:
        numbers = [value for metric in METRICS for value in (f.case.measured.get(metric), None, None)]
        blank = [None] * len(sources)
        lines.append([f.case.row, *_values(f.case.labels, labels), *numbers, *blank, f.reason, f.detail])
    for row in found.unmapped:
        blank = [None] * (len(columns) + len(sources))
        lines.append([row.row, *_values(row.labels, labels), *blank, row.reason, ""])
    header = ["row", *labels, *columns, *(f"evidence_{source}" for source in sources), "unmapped", "detail"]
    return _csv(header, lines)


def choices_text(report: Report) -> str:
    """One line per choice among measured layouts."""
    header = ["choice", "objective", "layouts", "chosen", "best", "regret", "at_random"]
    return _csv(
        header,
        (
            [" | ".join(c.key), c.objective, c.layouts, c.chosen, c.best, c.regret, c.at_random]
            for c in report.regret.choices
        ),
    )


def _values(labels: Mapping[str, str], names: Iterable[str]) -> list[str]:
    return [labels.get(name, "") for name in names]


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return table.getvalue()


# --- terminal ---------------------------------------------------------------------------------------------------------


def show_report(out: Console, report: Report) -> None:
    """Errors by metric and group, regret, and the rows without a prediction."""
    say(out, summary(report))
    show_table(out, "Predicted against measured", ERROR_COLUMNS, error_rows(report))
    for label in SHOWN:
        values = report.groups.get(label, {})
        if 1 < len(values) <= MOST_VALUES:
            columns, rows = group_rows(report, label, bias=len(report.metrics) <= 2)
            show_table(out, f"By {label}", columns, rows)
    say(out, regret_words(report), "bold")
    if report.found.reasons:
        rows = [[reason, f"{count:,}"] for reason, count in report.found.reasons.items()]
        show_table(out, "Rows without a prediction", ["reason", "rows"], rows)


def summary(report: Report) -> str:
    """How many rows of what, and what the prices rest on."""
    found = report.found
    shares = ", ".join(f"{source} {percent(share)}" for source, share in report.evidence.items()) or "nothing"
    predicted = len(found.predictions)
    return (
        f"{found.rows:,} {'row' if found.rows == 1 else 'rows'} of {', '.join(report.files)}: {predicted:,} predicted, "
        f"{found.rows - predicted:,} not; {report.copies:,} only repeat another. Step times rest on: {shares}. "
        f"Took {seconds(report.wall_s)}."
    )


#: Of the table of errors; the noise is that of rows measured more than once.
ERROR_COLUMNS = ("metric", "rows", "MAPE", "median APE", "bias", "Spearman", "noise MAPE", "noise median", "repeated")


def error_rows(report: Report) -> list[list[str]]:
    """One line per measured metric."""
    rows = []
    for metric in report.metrics:
        e, noise = report.errors[metric], report.noise[metric]
        rows.append(
            [NAMES[metric], f"{e.n:,}", percent(e.mape), percent(e.median_ape), signed(e.bias), number(e.spearman),
             percent(noise.mape), percent(noise.median_ape), f"{noise.rows:,}"]
        )  # fmt: skip
    return rows


def group_rows(report: Report, label: str, *, bias: bool) -> tuple[list[str], list[list[str]]]:
    """Columns, and one line per value of the label: rows, then MAPE, median and bias of every metric."""
    kinds = ["MAPE", "median", *(["bias"] if bias else [])]
    columns = [label, "rows", *(f"{NAMES[metric]} {kind}" for metric in report.metrics for kind in kinds)]
    rows = []
    for value, table in report.groups[label].items():
        cells = [value, f"{max(table[metric].n for metric in METRICS):,}"]
        for metric in report.metrics:
            e = table[metric]
            cells += [percent(e.mape), percent(e.median_ape), *([signed(e.bias)] if bias else [])]
        rows.append(cells)
    return columns, rows


def regret_words(report: Report) -> str:
    """What choosing by predictions would have cost."""
    found = report.regret
    if not found.n:
        return "Regret: no two measured layouts could have been chosen between."
    return (
        f"Regret: mean {percent(found.mean)}, p90 {percent(found.p90)} over {found.n:,} choices among measured "
        f"layouts; the best was chosen in {percent(found.best_chosen)}; a choice at random would lose "
        f"{percent(found.at_random)}. Choosing for a latency alone: "
        + ", ".join(f"{NAMES[metric]} {percent(other.mean)}" for metric, other in report.latency_regret.items())
        + "."
    )


def signed(share: float) -> str:
    """A share with its sign.

    >>> signed(0.05), signed(-0.2), signed(float("nan"))
    ('+5 %', '-20 %', '-')
    """
    return ("+" if share > 0 else "") + percent(share)
