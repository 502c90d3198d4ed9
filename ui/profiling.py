"""`shardwise profile`: how fast are this machine's kernels?"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from planner.profiling import Profiled


def _minutes(value: float) -> float:
    if not (isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not a finite number above 0")
    return value


def profile(
    save: Annotated[
        Path,
        typer.Option(help="Folder for the tables; one that was begun on this machine is continued.", metavar="DIR"),
    ],
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    minutes: Annotated[float, typer.Option(callback=_minutes, help="Time for measuring.")] = 8.0,
    families: Annotated[
        str | None,
        typer.Option(help="Operator families, such as gemm,copy [default: all that run here].", metavar="LIST"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the device in the tables [default: from what it reports].")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that a CPU computes with [default: torch's choice].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Measure the kernels of this machine with torch: tables of timings that prices can rest on.

    The most informative points come first, so a short run covers the whole range, coarsely; running again refines it.
    """
    from planner.profiling import open_machine
    from planner.profiling import profile as measure_into
    from ui import jsonout, rendering, saving
    from ui.waiting import bar

    saving.require_writable(save, ("about.yaml",))
    machine = open_machine(device, name, threads)
    wanted = None if families is None else [word.strip() for word in families.split(",") if word.strip()]
    with bar() as waiting:
        found = measure_into(save, machine, minutes, wanted, waiting.at)
    if as_json:
        print(jsonout.dumps(profile_object(found)))
        return
    out = rendering.console()
    title = f"{machine.name} ({machine.reported}), {machine.software}: {found.new:,} rows measured"
    columns = ["family", "format", "kernel", "rows", "fastest", "slowest", "spread", "at best"]
    rendering.show_table(out, title, columns, [_cells(group) for group in groups(found)], words=3)
    for what, why in found.about.left_out.items():
        rendering.say(out, f"left out: {what}: {why}")
    rendering.say(out, f"Saved to {save}: {', '.join(f'{family}.parquet' for family in found.tables)}, about.yaml.")


def profile_object(found: Profiled) -> dict[str, Any]:
    """What --json prints: new, groups [family, dtype, kernel, rows, fastest_s, ...], about."""
    return {"new": found.new, "groups": groups(found), "about": {**found.about.facts, **found.about.state}}


def groups(found: Profiled) -> list[dict[str, Any]]:
    """Every kernel in the tables, with its range of times and the best rates it reached."""
    rows = []
    for family, table in found.tables.items():
        for (dtype, kernel), part in table.groupby(["dtype", "kernel"], sort=False):
            flops, moved = _best(family, part)
            rows.append(
                {
                    "family": family,
                    "dtype": dtype,
                    "kernel": kernel,
                    "rows": len(part),
                    "fastest_s": float(part["seconds"].min()),
                    "slowest_s": float(part["seconds"].max()),
                    "median_spread": float(part["spread"].median()),
                    "best_flops_per_s": flops,
                    "best_bytes_per_s": moved,
                }
            )
    return rows


def _best(family: str, part: pd.DataFrame) -> tuple[float, float]:
    """Highest FLOP/s and bytes/s of any row."""
    from planner.profiling.points import work
    from planner.profiling.run import points_of

    done = [
        (work(point), seconds) for (point, _), seconds in zip(points_of(family, part), part["seconds"], strict=True)
    ]
    return max(w.flops / seconds for w, seconds in done), max(w.moved_bytes / seconds for w, seconds in done)


def _cells(group: dict[str, Any]) -> list[str]:
    from ui import words

    flops, moved = group["best_flops_per_s"], group["best_bytes_per_s"]
    best = (
        f"{flops / 1e12:,.3g} TFLOP/s"
        if group["family"] in ("gemm", "moe", "attention_prefill")
        else f"{moved / 1e9:,.3g} GB/s"
    )
    return [
        *(group["family"], group["dtype"], group["kernel"], f"{group['rows']:,}"),
        *(words.seconds(group["fastest_s"]), words.seconds(group["slowest_s"])),
        *(words.percent(group["median_spread"]), best),
    ]
