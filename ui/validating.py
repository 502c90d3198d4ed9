"""`shardwise validate`: how far are answers from what was really measured?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="validate", help="Compare predictions with what was really measured.", rich_markup_mode=None)

#: What --save writes.
FILES = ("report.json", "rows.csv", "choices.csv", "report.html")


@app.callback()
def validate() -> None:
    """Compare predictions with what was really measured."""


@app.command("serving")
def serving_command(
    files: Annotated[list[Path], typer.Argument(help="Tables of measured serving points.", metavar="FILE...")],
    only: Annotated[
        str | None,
        typer.Option(
            "--filter", help="Rows to take by their labels, such as system=h100_sxm,mode=agg.", metavar="LIST"
        ),
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(
            help="What step times rest on: measured, calibrated or analytic [default: measured where there are kernels "
            "of the device, else calibrated]."
        ),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes [default: one for each processor].")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Folder for rows.csv, choices.csv, report.html and report.json.", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Simulate every measured serving point with the client that measured it, and report the errors and the regret.

    Rows that cannot be simulated are counted with the reason.
    """
    from planner.catalogue import COSTS
    from planner.validation.read import read_layout
    from planner.validation.serving import predict, together
    from simulator.save import write_files
    from ui import jsonout, questions, rendering, saving, words
    from ui.validationpage import page
    from ui.validationreport import Report, choices_text, report_object, rows_text, show_report
    from ui.waiting import bar

    if cost is not None and cost not in COSTS:
        raise questions.OptionError(f"--cost {cost}: expected one of {', '.join(COSTS)}")
    filters = read_filters(only)
    saving.require_writable(save, FILES)
    started = time.perf_counter()
    with bar() as waiting:
        waiting.at("reading", None)
        layout = together({name: read_layout(path, filters) for name, path in zip(names(files), files, strict=True)})
        if not layout.cases and not layout.unmapped:
            said = f"--filter {only}: selects no row" if only else "no row"
            raise questions.OptionError(f"{said} of {', '.join(map(str, files))}; expected at least one")
        found = predict(layout, cost, jobs=jobs, progress=waiting.at)
        waiting.at("measuring", None)
        wall_s = time.perf_counter() - started
        report = Report.of(
            [words.printable(str(path)) for path in files], cost or "measured, else calibrated", found, wall_s
        )
        content = report_object(report)
        if save is not None:
            waiting.at("writing the results", None)
            texts = jsonout.dumps(content) + "\n", rows_text(report), choices_text(report), page(report)
            write_files(save, {name: saving.text_writer(text) for name, text in zip(FILES, texts, strict=True)})
    if as_json:
        print(jsonout.dumps(content))
        return
    out = rendering.console()
    show_report(out, report)
    if save is not None:
        rendering.say(out, f"Saved to {save}: {', '.join(FILES)}.")


def read_filters(text: str | None) -> dict[str, str]:
    """The labels and values of --filter; raises OptionError for anything else.

    >>> read_filters("system=h100_sxm, mode=agg")
    {'system': 'h100_sxm', 'mode': 'agg'}
    """
    from ui.questions import OptionError

    found: dict[str, str] = {}
    for word in text.split(",") if text is not None else ():
        label, equals, value = (part.strip() for part in word.partition("="))
        if not (label and equals and value):
            raise OptionError(f"--filter {text}: {word.strip()!r} found, expected label=value, such as mode=agg")
        if label in found:
            raise OptionError(f"--filter {text}: {label} is given twice, expected one value for each label")
        found[label] = value
    return found


def names(files: Sequence[Path]) -> list[str]:
    """What the files are called in groups: their names, or their paths where two are alike; each file once.

    >>> names([Path("a/x.csv"), Path("b/y.csv")]), names([Path("a/x.csv"), Path("b/x.csv")])
    (['x.csv', 'y.csv'], ['a/x.csv', 'b/x.csv'])
    """
    from ui.questions import OptionError
    from ui.words import printable

    if len({path.resolve() for path in files}) < len(files):
        raise OptionError(f"{' '.join(map(str, files))}: expected every file once")
    short = [printable(path.name) for path in files]
    return short if len(set(short)) == len(short) else [printable(str(path)) for path in files]
