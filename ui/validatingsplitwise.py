"""`shardwise validate splitwise`: Splitwise's clusters on its own table, read as published and as measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from planner.validation.splitwise import Report, Row
    from simulator.workload import Requests

Lengths = typer.Option(
    help="Trace that lengths are drawn from, as Azure 2023 CSV [default: the shipped profile of the same trace].",
    metavar="FILE",
)


def splitwise(
    table: Annotated[
        Path, typer.Argument(help="Splitwise's measurements (perf_model.csv of splitwise-sim).", metavar="TABLE")
    ],
    model: Annotated[str, typer.Option(help="bloom-176b, which the published figures are of, or llama2-70b.")] = (
        "bloom-176b"
    ),
    conversation: Annotated[Path | None, Lengths] = None,
    code: Annotated[Path | None, Lengths] = None,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="For how long requests arrive.")] = 120.0,
    quick: Annotated[bool, typer.Option("--quick", help="Only the conversation at equal power.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes [default: one for each processor].")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and lengths.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Simulate Splitwise's clusters under its nine limits, and say what its advantage rests on.

    Step times come from the published table, once looked up as the published simulator does (decode steps at the number
    of sequences, on an axis of prompt tokens x batch) and once as measured over the batch. Pools have the published
    sizes, and those an integer program chooses.
    """
    from planner.validation.splitwise import CONVERSATION, study
    from planner.validation.splitwiseslo import Traffic
    from planner.validation.splitwisetable import read_table
    from ui import jsonout, rendering
    from ui.waiting import bar

    started = time.perf_counter()
    with bar() as waiting:
        waiting.at("reading", None)
        measured = read_table(table)
        lengths = {CONVERSATION: requests_of(conversation, "azure-conversation-2023", seed)}
        if not quick:
            lengths["code"] = requests_of(code, "azure-code-2023", seed)
        traffic = {name: Traffic(trace, seconds, seed) for name, trace in lengths.items()}
        report = study(measured, model, traffic, quick=quick, jobs=jobs, progress=waiting.at)
    wall_s = time.perf_counter() - started
    if as_json:
        print(jsonout.dumps(report_object(report) | {"wall_s": wall_s}))
        return
    show_report(rendering.console(), report)


def requests_of(path: Path | None, profile: str, seed: int) -> Requests:
    """The trace, or as many requests as the recorded hours have, drawn from its profile."""
    from simulator.traces import read_trace
    from simulator.workload import load_profile, synthesize

    return read_trace(path) if path is not None else synthesize(load_profile(profile), 20_000, seed=seed)


def report_object(report: Report) -> dict[str, Any]:
    """What --json prints: rows, ratios, held_out, cap_ratios {prompt, token} and decode_ms by sequences."""
    prompt, token = report.cap_ratios
    return {
        "model": report.model,
        "seconds": report.seconds,
        "rows": [
            asdict(row)
            | {"counts": [{"machine": kind, "role": role, "count": n} for (kind, role), n in row.counts.items()]}
            for row in report.rows
        ],
        "ratios": [asdict(ratio) for ratio in report.ratios],
        "held_out": [asdict(error) for error in report.held_out],
        "cap_ratios": {"prompt": prompt, "token": token},
        "decode_ms": [{"sequences": n, **times} for n, times in report.decode_ms],
        "measured_seqs": report.measured_seqs,
    }


def show_report(out: Console, report: Report) -> None:
    """The table's faults and errors, a table of clusters for each traffic and budget, and the ratios."""
    from ui.rendering import say, show_table
    from ui.words import percent

    say(
        out, f"Splitwise's clusters, {report.model}, {report.seconds:g} s of Poisson arrivals, all nine limits at once."
    )
    for traffic, money in dict.fromkeys((row.traffic, row.money) for row in report.rows):
        rows = [row for row in report.rows if (row.traffic, row.money) == (traffic, money)]
        show_clusters(
            out, f"{traffic.capitalize()}, equal {money}: requests/s with the published look-up and as measured", rows
        )
    lines = [
        [ratio.what, "-" if ratio.published is None else f"{ratio.published:g}", *(
            f"{ratio.ours[lookup]:.2f}" if lookup in ratio.ours else "-" for lookup in ("published", "measured"))]
        for ratio in report.ratios
    ]  # fmt: skip
    show_table(out, "Throughput ratios", ["", "abstract", "published look-up", "as measured"], lines)
    errors = [
        [error.what, error.left_out, f"{error.rows:,}", percent(error.median), percent(error.mean), percent(error.p90)]
        for error in report.held_out
    ]
    title = "Times left out of the table and interpolated from the rest: |predicted / measured - 1|"
    show_table(out, title, ["time", "left out", "rows", "median", "mean", "p90"], errors, words=2)
    steps = [
        [f"{n}", *(f"{times[lookup]:.1f} ms" for lookup in ("published", "measured"))] for n, times in report.decode_ms
    ]
    show_table(out, "Decode step on an A100 machine", ["sequences", "published look-up", "as measured"], steps)
    beyond = [row.peak_seqs for row in report.rows if row.lookup == "measured" and row.peak_seqs > report.measured_seqs]
    if beyond:
        say(
            out,
            f"Measured with up to {report.measured_seqs} sequences; {len(beyond)} clusters had more on a machine for a "
            f"while, at most {max(beyond)}: such steps lie on the line through the last two batches.",
        )
    prompt, token = report.cap_ratios
    say(out, f"Capped H100 over H100: prompt time x{prompt:.2f}, token time x{token:.2f}.")


def show_clusters(out: Console, title: str, rows: Sequence[Row]) -> None:
    """One line for every cluster: its rate with both look-ups, and over that of the best cluster without a split."""
    from ui.rendering import show_table

    by_line: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        name = f"{row.design}, sized" if row.sized == "sized" else row.design
        by_line.setdefault((name, machines(row)), {})[row.lookup] = row
    best = {
        lookup: max((row.rate_per_s for row in rows if row.lookup == lookup and not row.split), default=0.0)
        for lookup in ("published", "measured")
    }
    lines = []
    for (name, counts), found in by_line.items():
        one = next(iter(found.values()))
        line = [name, counts, f"{one.usd_per_h:.0f}", f"{one.kw:.0f}"]
        for lookup, baseline in best.items():
            this = found.get(lookup)
            over = "-" if this is None or not baseline else f"{this.rate_per_s / baseline:.2f}"
            line += ["-", "-"] if this is None else [f"{this.rate_per_s:.1f}", over]
        limits = dict.fromkeys(row.limited_by.split(" <=")[0] for row in found.values())
        lines.append([*line, ", ".join(limits)])
    columns = ["cluster", "machines", "USD/h", "kW", "published", "/base", "measured", "/base", "limited by"]
    show_table(out, title, columns, lines, words=2)


def machines(row: Row) -> str:
    """Such as '25 H100 + 26 A100': for prompts, then for tokens."""
    return " + ".join(f"{count} {name}" for (name, _), count in row.counts.items())
