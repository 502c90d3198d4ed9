"""Answers as tables and sentences on a terminal, or as plain text in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ui.servingtables import show_serving
from ui.words import (
    at_hand,
    balance,
    in_short,
    in_words,
    kept,
    number,
    part,
    percent,
    printable,
    replicas,
    scaled,
    scheduling,
    seconds,
    shares,
)

if TYPE_CHECKING:
    import pandas as pd

    from hwmodels.hardware import Cluster, Device
    from hwmodels.routing import RoutingStats
    from hwmodels.shape import ModelShape
    from planner import Plan, SearchResult
    from planner.expertbalance import Balance
    from planner.explain import Explanation, StepTimes
    from simulator.limits import Limit
    from simulator.metrics import ClassMetrics, Metrics
    from simulator.result import RunTotals

#: Characters a line may have where there is no terminal to ask.
PIPE_WIDTH = 120
GIB = 2**30


def console() -> Console:
    """Standard output; what is printed is never taken for markup."""
    width = None
    if not sys.stdout.isatty():
        columns = os.environ.get("COLUMNS", "")
        width = max(40, int(columns)) if columns.isdecimal() and len(columns) < 5 else PIPE_WIDTH
    return Console(markup=False, highlight=False, emoji=False, width=width)


def show_table(
    out: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1
) -> None:
    """A titled table whose first `words` columns hold words, the others numbers."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for position, name in enumerate(columns):
        made.add_column(Text(name), justify="left" if position < words else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    out.print()
    say(out, title, "bold")
    out.print(made)
    out.print()


def say(out: Console, text: str, style: str = "") -> None:
    """One paragraph."""
    out.print(Text(printable(text), style=style))


# --- plan -------------------------------------------------------------------------------------------------------------


def show_plan(out: Console, result: SearchResult, traffic: str, metrics: Metrics, totals: RunTotals) -> None:
    """The ranking, the best plan in words and numbers, what was looked at, and the Pareto front."""
    question, best = result.question, result.best
    capacity_asked = question.objective == "goodput-per-gpu" and question.rate_per_s is None
    demand = "the highest rate" if capacity_asked else f"{question.demanded_per_s:.3g} requests/s"
    promised = ", ".join(map(str, question.limits)) or "no limits"
    say(
        out,
        f"{question.model} on {at_hand(question.devices)}, {len(question.requests):,} requests of {traffic} "
        f"at {demand}; {promised}; objective {question.objective} ({result.unit})",
    )
    _show_ranking(out, result)
    say(out, f"Best: {in_words(best.plan)}", "bold green")
    say(out, f"  {_worth(result)}")
    show_metrics(out, f"The best plan at {best.trial.rate_per_s:.3g} requests/s", metrics, totals)
    show_serving(out, result)
    say(out, _searched(result))
    say(out, _proof(result), "bold")
    if result.points:
        points = [
            [in_short(p.plan), scheduling(p.plan),
             *map(number, (p.rate_per_s, p.tokens_per_s_per_gpu, p.tokens_per_s_per_user))]
            for p in result.points
        ]  # fmt: skip
        columns = ["plan", "scheduling", "offered/s", "tokens/s per GPU", "tokens/s per user"]
        show_table(out, "Pareto front of the points simulated within the limits", columns, points, words=2)
    say(out, f"Step times rest on: {shares(result.evidence)}. Searched for {seconds(result.wall_s)}.")


def _show_ranking(out: Console, result: SearchResult) -> None:
    """One row per plan, ties with the best marked '='; columns that would say the same everywhere are left out."""
    ranking, limits = result.ranked, result.question.limits
    formats = [" + ".join(dict.fromkeys(kept(pool) for pool in ranked.plan.pools)) for ranked in ranking]
    idle = [ranked.plan.idle for ranked in ranking]
    columns = {
        "": ["=" if ranked.tie else str(position) for position, ranked in enumerate(ranking, 1)],
        "plan": [in_short(ranked.plan) for ranked in ranking],
        "scheduling": [scheduling(ranked.plan) for ranked in ranking],
    }
    if len(set(formats)) > 1:
        columns["formats"] = formats
    words = len(columns)
    if any(idle):
        columns["idle"] = [str(gpus) for gpus in idle]
    if any(ranked.capacity_per_s is not None for ranked in ranking):
        columns["per GPU"] = [number(ranked.value) for ranked in ranking]
        columns["goodput/s"] = [number(ranked.capacity_per_s) for ranked in ranking]
    else:
        columns["value"] = [number(ranked.value) for ranked in ranking]
    for position, limit in enumerate(limits):
        columns[f"{limit.metric} {limit.statistic}"] = [seconds(ranked.trial.values_s[position]) for ranked in ranking]
    tied = "; '=' cannot be told from the best" if any(ranked.tie for ranked in ranking) else ""
    title = f"Plans by {result.question.objective} (scheduling: sequences/tokens a step{tied})"
    show_table(out, title, list(columns), zip(*columns.values(), strict=True), words=words)


def _worth(result: SearchResult) -> str:
    best = result.best
    text = f"{number(best.value)} {result.unit}"
    if best.capacity_per_s is not None:
        text += f", {number(best.capacity_per_s)} requests/s in all when offered "
        if best.trial.settled:
            text += "the highest rate that keeps them"
        else:
            text += f"{number(best.trial.rate_per_s)}, the highest rate tried, which keeps them; give more --seconds"
    ties = sum(ranked.tie for ranked in result.ranked)
    if ties:
        others = "other plan is" if ties == 1 else "other plans are"
        text += f"; {ties} {others} as good within {percent(result.question.tolerance)}"
    return text


def _searched(result: SearchResult) -> str:
    pruned = "; ".join(
        f"{count:,} break '{law}'" for law, count in sorted(result.pruned.items(), key=lambda item: -item[1])
    )
    return (
        f"Considered {result.considered:,} plans: {sum(result.pruned.values()):,} pruned by law ({pruned or 'none'}), "
        f"{result.simulated:,} simulated in {result.trials:,} runs, {result.untried:,} untried."
    )


def _proof(result: SearchResult) -> str:
    tolerance = percent(result.question.tolerance)
    kind = "aggregated plan" if result.families else "plan"
    if result.families and all(family.name != "aggregated" for family in result.families):
        return "Not proved: the best sizings of the program, or rules tried, over the quickest replicas of each size."
    if not result.untried:
        return f"Proved: no other {kind} considered can be better by more than the tolerance, {tolerance}."
    if not isfinite(result.gap):
        return "No bound on the plans that were not tried; give more --seconds."
    why = f"the bound of {result.untried:,} there was no time for; more --seconds narrow it"
    if result.gap > 1:
        return f"Nothing is proved: the best bound is {number(1 + result.gap)} times the best plan found ({why})."
    return f"No {kind} can be better by more than {percent(result.gap)} ({why})."


# --- simulate ---------------------------------------------------------------------------------------------------------


def show_simulation(
    out: Console,
    plan: Plan,
    traffic: str,
    metrics: Metrics,
    totals: RunTotals,
    limits: Mapping[Limit, bool],
    replications: pd.DataFrame | None,
) -> None:
    """All metrics of one run, and intervals over several."""
    say(out, f"{plan.model} on {' and '.join(plan.devices)}: {in_words(plan)}; {traffic}")
    show_metrics(out, "Requests", metrics, totals)
    for limit, met in limits.items():
        say(out, f"  {limit}: {'kept' if met else 'BROKEN'}", "green" if met else "bold red")
    if replications is not None:
        runs = int(replications["runs"].max())
        rows = [
            [str(name), number(mean), number(half), str(count)]
            for name, mean, half, count in zip(
                replications.index,
                replications["mean"].tolist(),
                replications["half_width"].tolist(),
                replications["runs"].tolist(),
                strict=True,
            )
        ]
        show_table(out, f"Means of {runs} runs with 95 % intervals", ["metric", "mean", "+-", "runs"], rows)


def show_metrics(out: Console, title: str, metrics: Metrics, totals: RunTotals) -> None:
    """Latencies by SLO class, then what the devices did."""
    classes = {"all": metrics.overall, **(metrics.classes if len(metrics.classes) > 1 else {})}
    rows = [row for name, found in classes.items() for row in _latencies(name, found, len(classes) > 1)]
    show_table(out, title, ["latency", "mean", "p50", "p90", "p95", "p99"], rows)
    for name, found in classes.items():
        who = f"class {name}: " if len(classes) > 1 else ""
        say(
            out,
            f"  {who}{found.requests:,} requests, {found.finished:,} finished, {found.rejected:,} rejected, "
            f"{found.preemptions:,} preemptions; goodput {number(found.goodput_requests_per_s)} requests/s, "
            f"{percent(found.slo_attainment)} within limits; {number(found.output_tokens_per_s)} output tokens/s",
        )
    say(
        out,
        f"  {number(metrics.output_tokens_per_s_per_gpu)} output tokens/s per GPU ({totals.gpus} GPUs); "
        f"MFU {percent(metrics.mfu)}, MBU {percent(metrics.mbu)}; KV use mean {percent(metrics.kv_use_mean)}, "
        f"max {percent(metrics.kv_use_max)}; queue mean {number(metrics.queue_mean)}, max {metrics.queue_max}; "
        f"{number(metrics.j_per_output_token)} J per output token, "
        f"{number(metrics.usd_per_million_output_tokens)} USD per million",
    )


def _latencies(name: str, found: ClassMetrics, several: bool) -> list[list[str]]:
    prefix = f"{name} " if several else ""
    kinds = {"TTFT": found.ttft_s, "TPOT": found.tpot_s, "ITL": found.itl_s, "E2E": found.e2e_s}
    return [
        [f"{prefix}{kind}", *(seconds(value) for value in (d.mean, d.p50, d.p90, d.p95, d.p99))]
        for kind, d in kinds.items()
    ]


# --- explain ----------------------------------------------------------------------------------------------------------


def show_explanation(out: Console, plan: Plan, pools: Sequence[Explanation]) -> None:
    """Memory and steps of every pool."""
    say(out, f"{plan.model} on {' and '.join(plan.devices)}: {in_words(plan)}")
    for found in pools:
        memory = found.memory
        parts = {
            "weights": memory.weights_bytes,
            "activations": memory.activations_bytes,
            "engine and unused": memory.engine_bytes,
            "KV cache": memory.kv_bytes,
            "device": memory.device_bytes,
        }
        rows = [[name, f"{size / GIB:.2f}", percent(size / memory.device_bytes)] for name, size in parts.items()]
        what = f"{part(found.pool)}{replicas(found.pool)}: memory of the fullest device"
        show_table(out, what, ["", "GiB", "share"], rows)
        if memory.kv_blocks:
            say(
                out,
                f"  {memory.kv_tokens:,} KV tokens ({memory.kv_blocks:,} blocks) for each scheduler, "
                f"{memory.kv_bytes_per_token:,.0f} bytes a token on the device",
            )
        for step in found.steps:
            _show_step(out, step)


def _show_step(out: Console, step: StepTimes) -> None:
    rows = [
        [row.name, row.kind, row.bound + (f" ({row.algorithm})" if row.algorithm else ""), f"{row.count:,}",
         seconds(row.time_s), percent(row.time_s / step.time_s), scaled(row.flops, "FLOP") if row.flops else "-",
         scaled(row.bytes, "B") if row.bytes else "-", row.source or "engine profile"]
        for row in sorted(step.rows, key=lambda row: -row.time_s)
    ]  # fmt: skip
    columns = ["operator", "kind", "bound by", "count", "time", "share", "FLOPs", "bytes", "price"]
    show_table(out, f"{step.title}: {seconds(step.time_s)}", columns, rows, words=3)
    resources = ", ".join(
        f"{name} {percent(time_s / step.time_s)}" for name, time_s in sorted(step.bounds.items(), key=lambda i: -i[1])
    )
    for row in step.rows:
        if row.hidden_s:
            say(
                out,
                f"  {row.name} ({row.kind}): {seconds(row.hidden_s)} hidden in attention, "
                f"{seconds(row.time_s)} exposed",
            )
    say(
        out,
        f"  bound by {step.binding} ({resources}); MFU {percent(step.mfu)}, MBU {percent(step.mbu)}; "
        f"the step model's table says {seconds(step.step_model_s)}",
    )


def show_balances(out: Console, found: Sequence[Balance], pools: int, routing: RoutingStats | None) -> None:
    """Where the experts of each pool sit, and how busy its busiest rank is; `routing` None for uniform."""
    for one in found:
        say(out, balance(one, pools, "" if routing is None else routing.source))


# --- facts ------------------------------------------------------------------------------------------------------------


def show_models(out: Console, models: Sequence[ModelShape], attention: Mapping[str, str]) -> None:
    """Shipped models."""
    rows = [
        [m.name, attention[m.name], f"{m.parameters / 1e9:.2f}", f"{m.active_parameters / 1e9:.2f}", str(len(m.layers)),
         str(m.hidden), f"{m.kv_bytes_per_token('bf16') / 1024:.4g}", f"{m.max_context_tokens:,}"]
        for m in models
    ]  # fmt: skip
    columns = ["model", "attention", "parameters/1e9", "active/1e9", "layers", "hidden", "KV KiB/token", "context"]
    show_table(out, f"{len(rows)} models (KV in 16 bit); any config.json works too", columns, rows, words=2)


def fitted_error(device: Device) -> str:
    """Median held-out error of the GEMMs' fitted coefficients; a dash where they are estimates."""
    gemm = device.calibration.get("gemm")
    return "-" if gemm is None else percent(gemm.held_out_median_ape)


def show_hardware(out: Console, devices: Sequence[Device], clusters: Sequence[Cluster]) -> None:
    """Shipped devices and clusters."""
    rows = []
    for d in devices:
        peak = d.peak_flops_per_s
        tera = [f"{peak[f] / 1e12:,.0f}" if f in peak else "-" for f in ("bf16", "fp8", "int8")]
        price = "-" if d.price_usd_per_h is None else f"{d.price_usd_per_h:.2f}"
        rows.append(
            [d.name, d.default_cluster, *tera, f"{d.memory_bytes / GIB:,.1f}", f"{d.memory_bytes_per_s / 1e9:,.0f}",
             f"{d.tdp_w:,.0f}", price, fitted_error(d)]
        )  # fmt: skip
    columns = ["device", "cluster", "bf16 TFLOP/s", "fp8", "int8", "GiB", "GB/s", "TDP W", "USD/h", "GEMM error"]
    show_table(out, f"{len(rows)} devices (dense peaks)", columns, rows, words=2)
    links = []
    for c in clusters:
        ends = [
            "-"
            if fabric is None
            else f"{fabric.name}, {fabric.bytes_per_s / 1e9:g} GB/s, {fabric.latency_s * 1e6:g} us"
            for fabric in (c.intra, c.inter)
        ]
        links.append([c.name, c.device.name, *ends, str(c.gpus_per_node)])
    columns = ["cluster", "device", "inside a node", "between nodes", "devices/node"]
    show_table(out, f"{len(links)} clusters (rates per device and direction)", columns, links, words=4)
