"""What is told of a placement: its price and the baselines', the busiest rank before and after, simulated steps."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hwmodels.routing import RoutingStats
    from planner.placement import Floats, Placement, Problem
    from planner.placementcheck import Saving, TrafficCheck

#: Part by which a baseline's kernels are faster that is told.
SLOWER = 0.01
#: Quantiles that are told of the busiest rank.
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def busiest(problem: Problem, split: Floats) -> Floats:
    """Choices of the busiest GPU over the mean of all, for every layer."""
    from planner.placement import rank_shares

    return np.asarray(rank_shares(problem, split).max(axis=1) * problem.gpus)


def report_object(problem: Problem, found: Placement, baselines: dict[str, Placement]) -> dict[str, Any]:
    """What --json prints of a placement, and of each baseline under `baselines`; times in seconds per step.

    objective, load_term, traffic_term; bound and load_bound: the best that any of the solvers proved for all
    placements; gap and load_gap: the part of the objective or load term above it; busiest_over_mean, averaged over
    layers, of the worst layer and of each
    """
    every = [found, *baselines.values()]
    bound = min(max(p.bound for p in every), *(p.objective for p in every))
    load_bound = min(max(p.load_bound for p in every), *(p.load_term for p in every))

    def of(placement: Placement) -> dict[str, Any]:
        layers = busiest(problem, placement.split)
        return {
            "busiest_over_mean": float(layers.mean()),
            "busiest_over_mean_worst_layer": float(layers.max()),
            "busiest_over_mean_layers": layers.tolist(),
            "solver": placement.solver,
            "objective": placement.objective,
            "bound": bound,
            "gap": 1 - bound / placement.objective if placement.objective > 0 else 0.0,
            "load_term": placement.load_term,
            "load_bound": load_bound,
            "load_gap": 1 - load_bound / placement.load_term if placement.load_term > 0 else 0.0,
            "traffic_term": placement.traffic_term,
            "wall_s": placement.wall_s,
        }

    return {**of(found), "baselines": {name: of(placement) for name, placement in baselines.items()}}


def no_worse(found: Placement, baselines: dict[str, Placement], *, keep: bool) -> tuple[Placement, str | None]:
    """What the solver found, or the best baseline where that takes less, and then the baseline's name.

    keep   take what was found: a baseline that was asked for
    """
    name = min(baselines, key=lambda baseline: baselines[baseline].objective)
    best = baselines[name]
    if keep or found.objective <= best.objective:
        return found, None
    taken = replace(
        best, solver=found.solver, wall_s=found.wall_s, stopped=found.stopped,
        bound=min(found.bound, best.objective), load_bound=min(found.load_bound, best.load_term),
    )  # fmt: skip
    return taken, name


def distribution(
    stats: RoutingStats, problem: Problem, before: Placement, after: Placement
) -> dict[str, dict[str, Any]]:
    """Busiest / mean rank's tokens of single steps of the problem's tokens, over steps and layers, chance included."""
    from hwmodels.busiest import busiest_rank

    tokens = round(problem.tokens / stats.top_k)
    told = {}
    for name, placement in (("before", before), ("after", after)):
        table = busiest_rank(stats, placement.split.transpose(0, 2, 1), (tokens, 2 * tokens))
        quantiles = table.over_mean(tokens, list(QUANTILES.values())).tolist()
        mean = float((table.rows[:, 0] / table.mean[:, 0]).mean())
        told[name] = {
            "solver": placement.solver, "tokens": tokens, "mean": mean, **dict(zip(QUANTILES, quantiles, strict=True)),
        }  # fmt: skip
    return told


def simulation_object(checks: list[TrafficCheck], saved: list[Saving]) -> dict[str, Any]:
    """What --json prints under `simulation`: by traffic the runs by placement, and what steps save by their size."""
    told = {}
    for check in checks:
        runs = {run.placement: {k: v for k, v in asdict(run).items() if k != "placement"} for run in check.runs}
        told[check.traffic] = {
            "requests": check.requests, "tokens": check.tokens, "steps": check.steps,
            "rank_correlation": check.rank_correlation, "placements": runs,
        }  # fmt: skip
    return {"traffic": told, "savings": [asdict(saving) for saving in saved]}


def show(out: Any, content: dict[str, Any]) -> None:
    """The placement and the baselines as a table, and what they rest on."""
    from ui import rendering
    from ui.words import seconds

    traffic = "with traffic" if content["transitions"] else "load alone (no transitions are known)"
    rendering.say(
        out,
        f"{content['model']} on {content['gpus']} GPUs of {content['hardware']}: {len(content['layers'])} layers of "
        f"{content['experts']} experts, {content['slots_per_gpu']} slots a GPU, up to {content['replicas']} replicas; "
        f"routing of {content['routing']}; {traffic}",
    )
    rows = [
        [
            entry["solver"], f"{entry['busiest_over_mean']:.3f}", f"{entry['busiest_over_mean_worst_layer']:.3f}",
            seconds(entry["objective"]), seconds(entry["bound"]), f"{entry['gap']:.2%}", seconds(entry["experts_s"]),
            seconds(entry["wall_s"]),
        ]
        for entry in [*(e for name, e in content["baselines"].items() if name != content["solver"]), content]
    ]  # fmt: skip
    columns = ["solver", "busiest / mean", "worst layer", "objective", "bound", "gap", "kernels", "took"]
    rendering.show_table(out, "Seconds per step that depend on the placement", columns, rows)
    if told := _how(content):
        rendering.say(out, told)
    tokens = f"{content['tokens']:,} token{'s' * (content['tokens'] != 1)}"
    rendering.say(
        out,
        f"A step of {tokens}; {seconds(content['seconds_per_choice'])} a choice on its rank "
        f"({content['engine']}'s {content['experts_format']} kernels, the arithmetic's rate), "
        f"{content['bytes_per_choice']:,.0f} bytes moved. "
        "Kernels: all that the routed experts take, reading their weights included.",
    )
    least = min(content["baselines"].values(), key=lambda entry: entry["experts_s"])
    if least["experts_s"] < content["experts_s"] * (1 - SLOWER):
        rendering.say(
            out,
            f"In a step as small as this, {least['solver']} takes {seconds(content['experts_s'] - least['experts_s'])} "
            "less: more experts on a rank are more weights to read, which the objective leaves out. Try fewer --slots "
            "or --replicas, or the --tokens of your steps.",
        )
    before, after = content["distribution"]["before"], content["distribution"]["after"]
    told = "; ".join(
        f"{one['solver']} " + ", ".join(f"{name} {one[name]:.2f}" for name in QUANTILES) for one in (before, after)
    )
    rendering.say(out, f"Busiest rank / mean of single steps, over steps and layers, chance included: {told}.")


def _how(content: dict[str, Any]) -> str:
    """Which solver answered instead of the one asked for, which placement is told instead, and what time cut short."""
    from ui.words import seconds

    told = []
    if content["asked_solver"] != content["solver"]:
        told.append(
            f"With copies --solver {content['asked_solver']} is {content['solver']}, an integer program that may keep "
            "a gap."
        )
    if content["instead"]:
        told.append(f"{content['solver']} found none as good as {content['instead']}'s, which is taken.")
    if content["stopped"]:
        told.append(f"Stopped by --seconds ({seconds(content['seconds'])}); more time may narrow the gap.")
    return " ".join(told)


def show_simulation(out: Any, content: dict[str, Any]) -> None:
    """Simulated seconds beside the objective, and what a step of so many tokens saves."""
    from ui import rendering
    from ui.words import number, percent, seconds

    for name, check in content["simulation"]["traffic"].items():
        rows = []
        for placement, run in check["placements"].items():
            part = run["saved_s"] / run["predicted_s"] if run["predicted_s"] else None
            rows.append(
                [
                    placement, seconds(run["objective_s"]), seconds(run["mean_step_s"]), seconds(run["mean_ttft_s"]),
                    seconds(run["mean_tpot_s"]), seconds(run["makespan_s"]), seconds(run["predicted_s"]),
                    seconds(run["saved_s"]), percent(part),
                ]
            )  # fmt: skip
        columns = ["placement", "objective", "mean step", "TTFT", "TPOT", "whole run", "predicted", "saved", "of it"]
        tokens = f"{check['tokens']:,} tokens in {check['steps']:.0f} steps"
        rendering.show_table(out, f"Simulated: {name}, {check['requests']:,} requests, {tokens}", columns, rows)
        rendering.say(out, f"Rank correlation of objective and simulated time: {number(check['rank_correlation'])}.")
    rows = [
        [
            f"{one['tokens']:,}", seconds(one["predicted_s"]), seconds(one["experts_s"]), seconds(one["step_s"]),
            percent(one["experts_s"] / one["predicted_s"] if one["predicted_s"] else None),
        ]
        for one in content["simulation"]["savings"]
    ]  # fmt: skip
    columns = ["tokens of a step", "predicted", "experts", "with exchange", "experts / predicted"]
    rendering.show_table(
        out, f"What a step saves by {content['solver']} against contiguous, by its size", columns, rows, words=0
    )
