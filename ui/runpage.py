"""A prediction held against real runs as one HTML page that needs nothing else: plots and tables."""

from __future__ import annotations

from html import escape
from math import log10
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from planner.validation.execution import KINDS, LATENCIES, Comparison, durations, kinds
from ui import runtables
from ui.runreport import RunReport
from ui.validationpage import BAND, STYLE, table

#: Colour and dash of the prediction and of each run; colour and marker of each run's or kind's points. The colours are
#: those of Okabe and Ito, told apart by every kind of colour vision.
CURVES = (("#0072b2", "solid"), ("#d55e00", "solid"), ("#1d2433", "dash"), ("#cc79a7", "dot"))
RUNS = (("#d55e00", "circle"), ("#0072b2", "x-thin-open"), ("#cc79a7", "diamond-open"))
KIND_POINTS = {
    "decode": ("#0072b2", "circle"),
    "prefill": ("#e69f00", "square"),
    "mixed": ("#009e73", "diamond"),
}
#: Steps drawn of a run, evenly spaced; errors are of all of them.
POINTS = 4000
#: (unit on the axis, its size in seconds) by metric.
UNITS = {"ttft": ("ms", 1e-3), "tpot": ("ms", 1e-3), "e2e": ("s", 1.0), "step": ("ms", 1e-3)}
GRID = "#e6e9ef"


def page(report: RunReport) -> str:
    """The whole page, with the plotting library in it."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped, unused-ignore]

    title = (
        f"Predicted against run: {report.about.get('model', 'a model')} on {report.about.get('machine', 'a machine')}"
    )
    parts = [
        "<h1>Predicted against run</h1>",
        *([f"<p><b>Partial: {escape(report.partial)}</b></p>"] if report.partial is not None else []),
        f"<p>{escape(runtables.belief(report))}</p>",
        table(("what", "is"), [list(item) for item in report.about.items()], "words"),
        *([] if report.profile is None else [f"<p>{escape(runtables.profile_words(report.profile))}</p>"]),
        f"<h2>Targets ({escape(runtables.met_words(report))})</h2>",
        table(runtables.TARGET_COLUMNS, runtables.target_rows(report)),
        "<h2>Requests</h2>",
        table(runtables.REQUEST_COLUMNS, runtables.request_rows(report)),
        "<p>Errors are relative to what ran; above 0 predicts too much. Lines that compare two runs show the noise of "
        "the machine: no prediction can be expected to come closer.</p>",
        table(runtables.SPREAD_COLUMNS, runtables.spread_rows(report)),
        _plots([_cdf(report.comparison, metric) for metric in LATENCIES]),
        _plots([_scatter(report.comparison, metric) for metric in LATENCIES]),
        *_step_table(report),
        _plots([figure for position in range(len(report.comparison.runs)) for figure in _steps(report, position)]),
        *_left(report),
    ]
    if report.ranking is not None:
        parts += [
            f"<h2>Settings by {escape(report.objective)}</h2>",
            table(runtables.RANKING_COLUMNS, runtables.ranking_rows(report.ranking)),
            f"<p>{escape(runtables.ranking_words(report.ranking))}</p>",
        ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{''.join(parts)}</body></html>\n"
    )


def _step_table(report: RunReport) -> list[str]:
    """Errors of steps; those of a pipeline overlap, and are not predicted one by one."""
    rows = runtables.step_rows(report)
    return ["<h2>Steps</h2>", table(runtables.STEP_COLUMNS, rows)] if rows else []


def _left(report: RunReport) -> list[str]:
    """What the step model leaves unexplained, by run."""
    parts = []
    for position, (left, e2e) in enumerate(report.remainders, 1):
        lines = runtables.left_words(left, e2e)
        if lines:
            parts += [
                f"<h2>What is left in run {position}</h2>",
                *([table(runtables.PART_COLUMNS, runtables.part_rows(left))] if left.kinds else []),
                *(f"<p>{escape(line)}</p>" for line in lines),
            ]
    return parts


def _plots(figures: list[tuple[str, Any]]) -> str:
    drawn = "".join(
        "<div>"
        + figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"plot-{name}", config={"responsive": True})
        + "</div>"
        for name, figure in figures
    )
    return f'<div class="plots">{drawn}</div>' if drawn else ""


def _figure(title: str, x: dict[str, Any], y: dict[str, Any]) -> Any:
    import plotly.graph_objects as go  # type: ignore[import-untyped, unused-ignore]

    return go.Figure(
        layout={
            "title": title,
            "xaxis": {"gridcolor": GRID, **x},
            "yaxis": {"gridcolor": GRID, **y},
            "plot_bgcolor": "white",
            "height": 460,
            "margin": {"l": 60, "r": 10, "t": 50, "b": 50},
        }
    )


def _cdf(comparison: Comparison, metric: str) -> tuple[str, Any]:
    """Share of the requests that were at most so slow, predicted and in every run."""
    unit, scale = UNITS[metric]
    frames = {"predicted": comparison.predicted}
    frames |= {f"run {i}": run.requests for i, run in enumerate(comparison.runs, 1)}
    figure = _figure(
        f"{metric.upper()} of all requests",
        {"title": f"{metric.upper()}, {unit}", "type": "log"},
        {"title": "share of requests", "range": [0, 1.02], "tickformat": ".0%"},
    )
    for position, (name, frame) in enumerate(frames.items()):
        values = np.sort(frame[f"{metric}_s"].dropna().to_numpy(dtype=float)) / scale
        colour, dash = CURVES[min(position, len(CURVES) - 1)]
        figure.add_scatter(
            x=values.tolist(), y=(np.arange(1, len(values) + 1) / max(len(values), 1)).tolist(), mode="lines",
            name=name, line={"color": colour, "dash": dash, "shape": "hv", "width": 1.5 if position else 3},
        )  # fmt: skip
    return f"cdf-{metric}", figure


def _scatter(comparison: Comparison, metric: str) -> tuple[str, Any]:
    """Predicted over measured of every request, with the diagonal and the band, by run."""
    unit, scale = UNITS[metric]
    clouds = {}
    for position, run in enumerate(comparison.runs, 1):
        joined = comparison.predicted.merge(run.requests, on="request", suffixes=("", "_run"), validate="one_to_one")
        x, y = (joined[f"{metric}_s{end}"].to_numpy(dtype=float) / scale for end in ("_run", ""))
        usable = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
        clouds[f"run {position}"] = x[usable], y[usable], _hover(joined[usable], metric)
    figure = _diagonal(f"{metric.upper()} of every request", unit, [(x, y) for x, y, _ in clouds.values()])
    for position, (name, (x, y, hover)) in enumerate(clouds.items()):
        colour, symbol = RUNS[min(position, len(RUNS) - 1)]
        figure.add_scatter(
            x=x.tolist(), y=y.tolist(), mode="markers", name=name, hovertext=hover, hoverinfo="text",
            marker={"size": 6, "opacity": 0.6, "color": colour, "symbol": symbol, "line": {"width": 1}},
        )  # fmt: skip
    return f"scatter-{metric}", figure


def _hover(joined: pd.DataFrame, metric: str) -> list[str]:
    """What a request says of itself; plotly reads it as markup."""
    unit, scale = UNITS[metric]
    columns = ("request", "prompt_tokens", "output_tokens", f"{metric}_s_run", f"{metric}_s")
    return [
        f"request {request}: {prompt} + {output} tokens<br>"
        f"ran {ran / scale:.4g} {unit}, predicted {said / scale:.4g} {unit} ({said / ran - 1:+.1%})"
        for request, prompt, output, ran, said in zip(*(joined[name] for name in columns), strict=True)
    ]


def _diagonal(title: str, unit: str, clouds: list[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> Any:
    """Equal logarithmic axes around the clouds, with the diagonal and the band."""
    values = np.concatenate([np.concatenate(cloud) for cloud in clouds] or [np.empty(0)])
    low, high = (float(values.min()) / 1.1, float(values.max()) * 1.1) if len(values) else (1.0, 10.0)
    axis = {"type": "log", "range": [log10(low), log10(high)]}
    figure = _figure(title, {**axis, "title": f"ran, {unit}"}, {**axis, "title": f"predicted, {unit}"})
    for factor, dash, name in ((1 + BAND, "dot", f"+-{BAND:.0%}"), (1 - BAND, "dot", ""), (1.0, "solid", "equal")):
        figure.add_scatter(
            x=[low, high], y=[low * factor, high * factor], mode="lines", name=name, showlegend=bool(name),
            line={"color": "#8a93a3", "width": 1, "dash": dash}, hoverinfo="skip",
        )  # fmt: skip
    return figure


def _steps(report: RunReport, position: int) -> list[tuple[str, Any]]:
    """Predicted over measured step times by kind, and their error over the run; nothing in a pipeline."""
    run = report.comparison.runs[position]
    measured, predicted = durations(run.steps), run.predicted_step_s
    usable = np.flatnonzero(np.isfinite(predicted) & (measured > 0) & (predicted > 0))
    if not len(usable):
        return []
    shown = usable[np.linspace(0, len(usable) - 1, min(len(usable), POINTS)).astype(int)]
    kind, start = kinds(run.steps)[shown], run.steps["start_s"].to_numpy(dtype=float)[shown]
    unit, scale = UNITS["step"]
    x, y = measured[shown] / scale, predicted[shown] / scale
    of = f"{len(shown):,} of {len(usable):,} steps of run {position + 1}"
    scatter = _diagonal(f"Step times ({of})", unit, [(x, y)])
    error = y / x - 1.0
    most = max(0.1, float(np.quantile(np.abs(error), 0.99)) * 1.2)
    drift = _figure(
        f"Error of the step time ({of})",
        {"title": "time of the run, s"},
        {"title": "predicted / ran - 1", "tickformat": "+.0%", "range": [-most, most]},
    )
    for name in KINDS:
        colour, symbol = KIND_POINTS[name]
        # The rarer kinds are drawn last and larger, so as not to drown among the decode steps.
        size, opacity = (5, 0.5) if name == "decode" else (7, 0.8)
        marker = {"size": size, "opacity": opacity, "color": colour, "symbol": symbol}
        for figure, across, up in ((scatter, x, y), (drift, start, error)):
            figure.add_scatter(
                x=across[kind == name].tolist(), y=up[kind == name].tolist(), mode="markers", name=name, marker=marker
            )
    return [(f"steps-{position + 1}", scatter), (f"drift-{position + 1}", drift)]
