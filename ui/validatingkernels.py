"""`shardwise validate kernels` and `validate plan`: cost models and plans held against measured kernels."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from hwmodels.hardware import Device
    from hwmodels.kernels.library import Kernels
    from planner.plan import Plan
    from planner.validation.kernels import KernelReport
    from planner.validation.nearest import Near
    from planner.validation.planprices import Price, PricedStep

Source = Annotated[
    str,
    typer.Option(
        help="Measured kernels: 'wheel' (aiconfigurator-core, extra 'silicon'), a folder that 'shardwise profile' "
        "wrote, or CSV files of aiter, Vidur or APEX+.",
        metavar="SOURCE",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
KernelsOf = Annotated[
    str | None,
    typer.Option(
        "--engine", help="Whose kernels: vllm, sglang or tensorrt-llm [default: vllm's of the wheel, all of a folder]."
    ),
]


def kernels(
    hardware: Annotated[str, typer.Option(help="Device, or cluster, whose kernels were measured.")],
    engine: KernelsOf = None,
    source: Source = "wheel",
    families: Annotated[
        str | None,
        typer.Option(help="Operator families, such as gemm,attention_decode [default: all].", metavar="LIST"),
    ] = None,
    rows: Annotated[int, typer.Option(min=20, help="Rows of each family and experiment, about.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows that are left out.")] = 0,
    as_json: Json = False,
) -> None:
    """Leave measured kernels out and predict them: error of every cost model by family, format and size.

    The interpolated model predicts rows left out of its table ('point': one row, 'shape': all rows of its shape,
    'beyond': sizes up to 4x beyond the table); the roofline, with the device's efficiencies (calibrated) and with the
    default ones (analytic), is held against rows drawn from the table.
    """
    from hwmodels.hardware import load_cluster
    from hwmodels.kernels.sources import read_tables
    from planner.validation.kernels import kernel_report
    from ui import jsonout, rendering
    from ui.waiting import bar

    chosen = None if families is None else [word.strip() for word in families.split(",")]
    device = load_cluster(hardware, 1).device
    started = time.perf_counter()
    with bar() as waiting:
        waiting.at("reading", None)
        tables = read_tables(source, device, engine)
        report = kernel_report(
            tables,
            hardware,
            device,
            families=chosen,
            rows=rows,
            seed=seed,
            left_out=tables.left_out,
            progress=waiting.at,
        )
    wall_s = time.perf_counter() - started
    if as_json:
        asked = {"hardware": hardware, "device": device.name, "source": source, "engine": engine, "rows": rows,
                 "seed": seed}  # fmt: skip
        print(jsonout.dumps({"asked": asked, **asdict(report), "wall_s": wall_s}))
        return
    show_kernels(rendering.console(), report, f"{device.name}, {source}{f', {engine}' if engine else ''}")


def show_kernels(out: Console, report: KernelReport, title: str) -> None:
    """A table for each family: every cost model, format and experiment, and the median error by size."""
    from planner.validation.kernels import CLASSES
    from ui.rendering import say, show_table
    from ui.words import percent

    columns = ["cost model", "format", "left out", "rows", "median", "p90", "bias"]
    columns += ["by size: small", *[""] * (CLASSES - 2), "large"]
    for family, count in report.measured.items():
        groups = [group for group in report.groups if group.family == family]
        lines = [
            [group.cost, group.dtype, group.experiment, f"{group.whole.n:,}", percent(group.whole.median),
             percent(group.whole.p90), f"{100 * group.whole.bias:+.2g} %",
             *(percent(part.median) for part in group.classes), *["-"] * (CLASSES - len(group.classes))]
            for group in groups
        ]  # fmt: skip
        ran = ", ".join(report.software[family])
        show_table(out, f"{family} on {title}: {count:,} timings ({ran})", columns, lines, words=3)
        unpriced = sum(group.unpriced for group in groups)
        if unpriced:
            say(out, f"  {unpriced:,} rows without a price are not counted")
    say(out, "Errors are |predicted / measured - 1|; bias is the median of predicted / measured - 1.")
    if report.not_interpolated:
        say(out, f"Priced by the roofline only: {', '.join(report.not_interpolated)}.")
    for reason, count in report.left_out.items():
        say(out, f"Left out: {count:,} rows, {reason}.")


def plan(
    plan: Annotated[
        Path, typer.Argument(help="Plan file in YAML, as 'shardwise plan --save' writes it.", metavar="PLAN")
    ],
    hardware: Annotated[
        str | None, typer.Option(help="Device or cluster to price it on [default: the plan's].")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Whose kernels: vllm, sglang or tensorrt-llm [default: those of the plan's engine]."),
    ] = None,
    source: Source = "wheel",
    context: Annotated[int, typer.Option(min=1, help="Tokens each decoding sequence attends to.")] = 1024,
    nearest: Annotated[int, typer.Option(min=0, max=100, help="Measured kernels to show for each operator.")] = 2,
    as_json: Json = False,
) -> None:
    """Hold every operator of a plan's steps against its nearest measured kernels.

    The steps: a decode step of half of max_seqs sequences, and a prompt chunk of the token budget.
    """
    from hwmodels.kernels.measured import MeasuredCost
    from planner.catalogue import mapping_of, open_catalogue
    from planner.validation.planprices import plan_prices
    from ui import jsonout, questions, rendering
    from ui.waiting import bar

    chosen, _ = questions.opened(plan)
    if hardware is not None:
        chosen = replace(chosen, hardware=hardware)
    catalogue = open_catalogue(chosen.model, chosen.hardware, chosen.gpus, chosen.engine)
    with bar() as waiting:
        waiting.at("reading kernels", None)
        found, tables = measured_kernels(source, catalogue.cluster.device, engine, catalogue.engine.kernels)
        pools = []
        for pool in chosen.pools:
            cost = MeasuredCost(catalogue.cluster, mapping_of(pool), found)
            pools.append(plan_prices(catalogue, pool, cost, tables, context=context, nearest=nearest))
    if as_json:
        content = {
            "plan": asdict(chosen),
            "source": source,
            "engine": engine,
            "kernels": {family: sorted(table["software"].unique()) for family, table in tables.items()},
            "pools": [{"steps": [asdict(step) for step in steps]} for steps in pools],
        }
        print(jsonout.dumps(content))
        return
    show_plan_prices(rendering.console(), chosen, pools)


def measured_kernels(
    source: str, device: Device, engine: str | None, usual: Mapping[str, str]
) -> tuple[Kernels, Mapping[str, pd.DataFrame]]:
    """Interpolated tables, and their rows by family.

    engine   whose kernels; None: of the wheel those of `usual` (hwmodels.engine.Engine.kernels), elsewhere all

    Raises MeasurementError where there are none.
    """
    from hwmodels.errors import MeasurementError
    from hwmodels.kernels.aiconfigurator import open_wheel
    from hwmodels.kernels.library import STAND_INS, measured_rows, open_kernels
    from hwmodels.kernels.sources import WHEEL, read_tables
    from planner.validation.fitted import fit_kernels

    if engine is not None and engine not in STAND_INS:
        raise MeasurementError(f"engine {engine!r}: expected one of {', '.join(STAND_INS)}, whose kernels were timed")
    if source == WHEEL:
        wheel, choice = open_wheel(), usual if engine is None else {"default": engine}
        found = open_kernels(device, choice, wheel)
        timed = [field.name for field in fields(found) if getattr(found, field.name) is not None]
        return found, {family: measured_rows(wheel, device, choice, family) for family in timed}
    tables = read_tables(source, device, engine)
    return fit_kernels(tables, device), tables


def show_plan_prices(out: Console, plan: Plan, pools: list[tuple[PricedStep, ...]]) -> None:
    """A table for each step: every operator and below it the kernels nearest to it."""
    from ui.rendering import say, show_table
    from ui.words import in_words, percent, replicas, seconds

    say(out, f"{plan.model} on {plan.hardware}: {in_words(plan)}")
    columns = ["operator", "shape or nearest kernel", "octaves", "count", "share", "analytic", "calibrated", "measured"]
    for pool, steps in zip(plan.pools, pools, strict=True):
        for step in steps:
            lines = [line for row in step.rows for line in _lines(row)]
            show_table(out, f"{replicas(pool)}: {step.title}", columns, lines, words=2)
            times = ", ".join(f"{cost} {seconds(value)}" for cost, value in step.seconds.items())
            say(
                out,
                f"  on the device: {times}; of the measured time {percent(step.measured)} lies between measured "
                f"kernels, {percent(step.extended)} beyond them, the rest is calibrated",
            )


def _lines(row: Price) -> list[list[str]]:
    from planner.validation.nearest import in_line
    from ui.words import percent, seconds

    beyond = "" if row.measured_s is None or row.inside > 0.5 else " (beyond)"
    first = [row.name, " ".join(filter(None, (row.family, row.dtype, in_line(row.shape)))), "", f"{row.count:,}",
             percent(row.share), seconds(row.analytic_s), seconds(row.calibrated_s),
             seconds(row.measured_s) + beyond]  # fmt: skip
    return [first, *(_near(near, row) for near in row.nearest)]


def _near(near: Near, row: Price) -> list[str]:
    """A measured kernel: what sets it apart from the operator, and who ran it."""
    from planner.validation.nearest import in_line
    from ui.words import seconds

    apart = {name: value for name, value in near.shape.items() if value != row.shape.get(name)}
    told = in_line(apart) if apart else "this shape"
    told += f" in {near.dtype}" if row.dtype and near.dtype != row.dtype else ""
    return [
        "",
        f"- {told}: {near.software} {near.kernel}",
        f"{near.distance:.2f}",
        "",
        "",
        "",
        "",
        seconds(near.seconds),
    ]
