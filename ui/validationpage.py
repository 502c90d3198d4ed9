"""A validation report as one HTML page that needs nothing else: scatter plots and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import log10
from typing import TYPE_CHECKING, Any

from planner.validation.serving import Prediction
from ui.validationreport import ERROR_COLUMNS, NAMES, Report, error_rows, group_rows, regret_words, signed, summary
from ui.words import percent

if TYPE_CHECKING:
    from planner.validation.regret import Choice

#: Half-width of the band around the diagonal.
BAND = 0.2
#: Worst choices shown; all of them are in choices.csv.
CHOICES = 50
#: (unit on the axis, its size in SI) by metric.
UNITS = {"ttft": ("ms", 1e-3), "tpot": ("ms", 1e-3), "e2e": ("s", 1.0), "throughput": ("output tokens/s", 1.0)}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1d2433 }
table { border-collapse: collapse; margin: .4rem 0 1.6rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #dde2ea }
th:first-child, td:first-child, .words td, .words th { text-align: left }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(34rem, 1fr)); gap: 1rem }
summary { cursor: pointer; font-weight: 600; margin: .3rem 0 }
"""


def page(report: Report) -> str:
    """The whole page, with the plotting library in it."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped, unused-ignore]

    plots = [_plot(report, metric) for metric in report.metrics]
    parts = [
        f"<h1>Predicted against measured serving</h1><p>{escape(summary(report))}</p>",
        "<h2>Errors</h2>",
        table(ERROR_COLUMNS, error_rows(report)),
        "<p>Errors are relative to the measurement; bias above 0 predicts too much. Noise is the error that would be "
        "left to someone who knew the true mean of every point that was measured more than once.</p>",
        f'<div class="plots">{"".join(plots)}</div>',
        "<h2>Choosing a layout</h2>",
        f"<p>{escape(regret_words(report))}</p>",
        _choices(report.regret.choices),
        "<h2>By group</h2>",
        *(_group(report, label) for label in report.groups),
        "<h2>Rows without a prediction</h2>",
        _reasons(report),
    ]
    title = escape(", ".join(report.files))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>Validation of {title}</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{''.join(parts)}</body></html>\n"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """An HTML table of plain text; `kind` "words" aligns all of it to the left."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _group(report: Report, label: str) -> str:
    columns, rows = group_rows(report, label, bias=True)
    return f"<details><summary>{escape(label)} ({len(rows)})</summary>{table(columns, rows)}</details>"


def _choices(choices: Sequence[Choice]) -> str:
    worst = sorted((choice for choice in choices if choice.regret > 0), key=lambda choice: -choice.regret)[:CHOICES]
    if not worst:
        return ""
    columns = ("choice", "objective", "layouts", "chosen", "best measured", "regret")
    rows = ((", ".join(c.key), c.objective, str(c.layouts), c.chosen, c.best, percent(c.regret)) for c in worst)
    return f"<details><summary>The {len(worst)} costliest choices</summary>{table(columns, rows, 'words')}</details>"


def _reasons(report: Report) -> str:
    reasons = report.found.reasons
    if not reasons:
        return "<p>None: every row was predicted.</p>"
    return table(("reason", "rows"), ((reason, f"{count:,}") for reason, count in reasons.items()))


def _plot(report: Report, metric: str) -> str:
    """Predicted over measured on equal logarithmic axes, with the diagonal and the band, coloured by who served."""
    import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]

    unit, scale = UNITS[metric]
    points = [
        p for p in report.found.predictions
        if p.case.measured.get(metric, 0.0) > 0 and p.predicted[metric] > 0
    ]  # fmt: skip
    served: dict[str, list[Prediction]] = {}
    for p in points:
        served.setdefault(" on ".join(p.case.labels.get(name, "?") for name in ("backend", "system")), []).append(p)
    values = [value for p in points for value in (p.case.measured[metric], p.predicted[metric])]
    low, high = min(values) / scale / 1.3, max(values) / scale * 1.3
    figure = go.Figure()
    for factor, dash, name in ((1 + BAND, "dot", f"+-{BAND:.0%}"), (1 - BAND, "dot", ""), (1.0, "solid", "equal")):
        figure.add_scatter(
            x=[low, high], y=[low * factor, high * factor], mode="lines", name=name, showlegend=bool(name),
            line={"color": "#8a93a3", "width": 1, "dash": dash}, hoverinfo="skip",
        )  # fmt: skip
    for name in sorted(served):
        figure.add_scatter(
            x=[p.case.measured[metric] / scale for p in served[name]],
            y=[p.predicted[metric] / scale for p in served[name]],
            mode="markers",
            name=escape(name),
            marker={"size": 6, "opacity": 0.65},
            hovertext=[_hover(p, metric) for p in served[name]],
            hoverinfo="text",
        )
    axis: dict[str, Any] = {"type": "log", "range": [log10(low), log10(high)], "gridcolor": "#e6e9ef"}
    figure.update_layout(
        title=f"{NAMES[metric]} ({len(points):,} rows)",
        xaxis={**axis, "title": f"measured, {unit}"},
        yaxis={**axis, "title": f"predicted, {unit}"},
        plot_bgcolor="white",
        height=560,
        margin={"l": 60, "r": 10, "t": 50, "b": 50},
        legend={"font": {"size": 10}},
    )
    markup: str = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=f"plot-{metric}", config={"responsive": True}
    )
    return f"<div>{markup}</div>"


def _hover(p: Prediction, metric: str) -> str:
    """What a point says of itself; plotly reads it as markup."""
    unit, scale = UNITS[metric]
    measured, predicted = p.case.measured[metric], p.predicted[metric]
    error = signed(predicted / measured - 1)
    lines = [
        p.case.row,
        f"measured {measured / scale:.4g} {unit}, predicted {predicted / scale:.4g} ({error})",
        *(f"{label}: {value}" for label, value in p.case.labels.items()),
        "prices: " + ", ".join(f"{source} {percent(share)}" for source, share in p.evidence.items()),
    ]
    return "<br>".join(escape(line) for line in lines)
