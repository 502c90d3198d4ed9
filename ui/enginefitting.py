"""`shardwise validate engine`: overheads fitted to one half of the measured layouts and judged by the other."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from planner.validation.enginefit import EngineFit


def engine(
    files: Annotated[list[Path], typer.Argument(help="Tables of measured serving points.", metavar="FILE...")],
    name: Annotated[str, typer.Option("--engine", help="Engine profile to start from: a shipped name or a YAML file.")],
    only: Annotated[
        str | None, typer.Option("--filter", help="Rows to take by their labels, such as mode=agg.", metavar="LIST")
    ] = None,
    cost: Annotated[str, typer.Option(help="What step times rest on: measured, calibrated or analytic.")] = "measured",
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes [default: one for each processor].")] = None,
    save: Annotated[Path | None, typer.Option(help="Engine profile to write.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Fit an engine's overheads to half of the measured layouts, and report the errors on both halves."""
    from planner.validation.enginefit import COEFFICIENTS, fit_engine
    from planner.validation.read import read_layout
    from simulator.save import write_files
    from ui import jsonout, rendering, saving
    from ui.waiting import bar

    if save is not None:
        saving.require_writable(save.parent, (save.name,))
    cases = [case for path in files for case in read_layout(path, only or "").cases]
    with bar() as waiting:
        fit = fit_engine(cases, name, cost, jobs=jobs, progress=lambda what: waiting.at(what, None))
    if save is not None:
        text = profile_text(fit)
        write_files(save.parent, {save.name: saving.text_writer(text)})
    if as_json:
        print(jsonout.dumps({"engine": asdict(fit.engine), "points": fit.points, "errors": fit.errors}))
        return
    out = rendering.console()
    rows = [[key, f"{getattr(fit.engine, key):.3g}"] for key in COEFFICIENTS]
    rendering.show_table(out, f"{fit.engine.name}: fitted to {fit.points['fitted']} points", ["coefficient", "s"], rows)
    errors = [
        [half, metric.upper(), f"{fit.points[half]:,}", *(f"{100 * error:.1f} %" for error in pair)]
        for half, metrics in fit.errors.items()
        for metric, pair in metrics.items()
    ]
    columns = ["layouts", "metric", "points", "before", "after"]
    rendering.show_table(out, "Median absolute error", columns, errors, words=2)
    if save is not None:
        rendering.say(out, f"Saved to {save}.")


def profile_text(fit: EngineFit) -> str:
    """The engine profile as YAML, with what its coefficients rest on appended to its source."""
    from hwmodels.yamlfiles import PROFILES, dumped, named, plain
    from planner.validation.enginefit import COEFFICIENTS

    path = named("engine", fit.engine.name, PROFILES / "engines")
    content = plain(path.read_text(encoding="utf-8"))
    content |= {key: getattr(fit.engine, key) for key in COEFFICIENTS}
    held = fit.errors["held-out"]
    told = (
        f"Overheads fitted by 'shardwise validate engine' to {fit.points['fitted']} measured serving points; on the "
        f"{fit.points['held-out']} points of other layouts the median error is {100 * held['ttft'][1]:.1f} % in TTFT "
        f"and {100 * held['tpot'][1]:.1f} % in TPOT."
    )
    content["source"] = f"{content['source'].split(' Overheads fitted by')[0].strip()} {told}"
    return dumped(content)
