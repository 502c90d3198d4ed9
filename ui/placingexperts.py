"""`shardwise place-experts`: on which GPUs should the experts of a model sit, given how tokens were routed?"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

if TYPE_CHECKING:
    from hwmodels.hardware import Cluster
    from hwmodels.mapping import Precision
    from hwmodels.routing import RoutingStats
    from hwmodels.shape import FeedForward, ModelShape
    from planner.placement import Floats, Placement, Problem, Traffic

SOLVERS = ("large", "exact", "milp", "tuner", "contiguous", "random", "greedy", "eplb")
BASELINES = ("contiguous", "random", "greedy", "eplb")

#: Rows per expert at which a further row costs arithmetic alone.
MANY_ROWS = 8192


def place_experts(
    routing: Annotated[
        list[Path],
        typer.Argument(help="Recorded expert counts or choices; the files of all ranks of one recording.",
                       metavar="ROUTING..."),
    ],
    model: Annotated[str, typer.Option(help="Shipped model, or a Hugging Face config.json.")] = "deepseek-v3",
    hardware: Annotated[str, typer.Option(help="Device or cluster.", metavar="NAME")] = "h200-sxm",
    gpus: Annotated[int, typer.Option(min=1, help="Ranks that share the experts of a layer.")] = 32,
    replicas: Annotated[int, typer.Option(min=0, help="Extra copies of experts per layer, at most.")] = 0,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Experts a GPU holds per layer [default: (experts + replicas) / gpus].")
    ] = None,
    solver: Annotated[str, typer.Option(help=", ".join(SOLVERS) + ".", metavar="NAME")] = "large",
    seconds: Annotated[float, typer.Option(help="Time after which the best placement found is taken.")] = 60.0,
    concentration: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0,
            help="Assume transitions: this part of choices goes from popular to popular experts of the next layer, the "
            "others anywhere [default: as recorded; without, traffic is left out].",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a step, all GPUs [default: 128 a GPU].")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Format of the experts [default: fp8 where the device has it, else bf16].")
    ] = None,
    engine: Annotated[str, typer.Option(help="Engine profile whose kernels are counted.")] = "vllm",
    groups: Annotated[
        int, typer.Option(min=1, help="Groups of experts that the baseline eplb keeps in a node (DeepSeek-V3: 8).")
    ] = 1,
    add_count: Annotated[
        float, typer.Option(min=0.0, help="Added to every count, for recordings that miss an expert.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the solvers that draw.")] = 0,
    save: Annotated[
        Path | None, typer.Option(help="Folder for the maps that SGLang, vLLM and vLLM-Ascend read.", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:  # fmt: skip
    """Place experts so that the busiest rank's compute and the traffic between layers take least, and prove how near.

    An objective is seconds per step, a bound what no placement undercuts, the gap the part of the objective not proven
    to be needed. Compute is the busiest rank's choices at the cost of a further row in the routed experts' kernels;
    traffic moves each choice's hidden state from its expert's GPU to that of the next layer's expert.
    """
    from hwmodels.routingfiles import read_routing
    from planner.catalogue import open_catalogue
    from planner.placement import solve
    from planner.placementfiles import NAMES, engine_files, filled, slot_maps
    from simulator.routingdraws import with_transitions
    from simulator.save import write_files
    from ui import jsonout, questions, rendering, saving
    from ui.waiting import bar

    if solver not in SOLVERS:
        raise questions.OptionError(f"--solver {solver!r}: expected one of {', '.join(SOLVERS)}")
    if not (isfinite(seconds) and seconds > 0):
        raise questions.OptionError(f"--seconds {seconds}: expected a finite time above 0")
    if not isfinite(add_count) or (concentration is not None and not isfinite(concentration)):
        raise questions.OptionError("--add-count and --concentration: expected finite numbers")
    saving.require_writable(save, NAMES)
    catalogue = open_catalogue(questions.located(model), hardware, gpus, engine)
    shape, cluster = catalogue.model, catalogue.cluster
    with bar() as waiting:
        waiting.at("reading", None)
        stats = read_routing(routing, shape, add_count=add_count)
        stats.check(shape)
        if concentration is not None:
            stats = with_transitions(stats, concentration)
        each = _slots(stats, gpus, replicas, slots)
        formats = _precision(cluster, weights)
        problem = problem_of(stats, shape, cluster, formats, each, replicas, tokens or 128 * gpus)
        baselines = {}
        for name in BASELINES:
            waiting.at(f"placing: {name}", None)
            baselines[name] = solve(problem, solver=name, seconds=seconds, seed=seed, groups=groups)
        waiting.at(f"placing: {solver}", None)
        found = baselines.get(solver) or solve(problem, solver=solver, seconds=seconds, seed=seed)
        content = report_object(problem, found, baselines)
        content |= {
            "model": shape.name, "hardware": cluster.name, "gpus": gpus, "slots_per_gpu": each, "replicas": replicas,
            "experts": stats.experts, "layers": list(stats.layers), "routing": stats.source,
            "transitions": stats.transitions is not None, "tokens": tokens or 128 * gpus,
            "experts_format": formats.weights,
            "seconds_per_choice": problem.seconds_per_token, "bytes_per_choice": problem.bytes_per_token,
        }  # fmt: skip
        if save is not None:
            full = filled(problem, found.holds)
            files = engine_files(slot_maps(problem, full), gpus, stats.experts, stats.layers, len(shape.layers))
            even: Floats = full / full.sum(axis=2, keepdims=True)
            content["saved"] = {
                "files": list(files),
                "filled_slots": int(full.sum() - found.holds.sum()),
                "redundant_experts": each * gpus - stats.experts,
                "busiest_over_mean": float(busiest(problem, even).mean()),
            }
            write_files(save, {name: saving.text_writer(text) for name, text in files.items()})
    if as_json:
        print(jsonout.dumps(content))
        return
    out = rendering.console()
    _show(out, content)
    if save is not None:
        kept = content["saved"]
        rendering.say(
            out,
            f"Saved to {save}: {', '.join(kept['files'])}; {kept['redundant_experts']} redundant experts; "
            f"{kept['filled_slots']:,} empty slots filled with copies; busiest / mean "
            f"{kept['busiest_over_mean']:.3f} with tokens split evenly over copies.",
        )


def problem_of(
    stats: RoutingStats, model: ModelShape, cluster: Cluster, formats: Precision, slots: int, replicas: int, tokens: int
) -> Problem:
    """The placement problem of recorded routing on a cluster whose GPUs all hold experts.

    slots    experts of a layer on a GPU
    tokens   of a step on all GPUs, each of which makes top_k choices

    A choice costs `seconds_per_choice` on its rank, and moves the hidden state in the format of the arithmetic over the
    slowest link on the way. Raises MappingError for GPUs that are not joined, PlanError for slots that do not suffice.
    """
    from hwmodels.mapping import DTYPE_BYTES
    from hwmodels.topology import topology
    from planner.placement import Problem

    feed_forward = model.layers[stats.layers[0]].feed_forward
    seconds_per_byte, traffic = _links(cluster)
    return Problem(
        stats.loads,
        stats.transitions,
        cluster.gpus,
        slots,
        replicas,
        seconds_per_token=seconds_per_choice(model, feed_forward, cluster, formats),
        seconds_per_byte=seconds_per_byte,
        bytes_per_token=model.hidden * DTYPE_BYTES[formats.activations],
        tokens=float(tokens * stats.top_k),
        nodes=topology(cluster).node.tolist(),
        traffic=traffic,
    )


def seconds_per_choice(model: ModelShape, block: FeedForward, cluster: Cluster, formats: Precision) -> float:
    """Seconds that one more row takes in the routed experts of a rank that has plenty: the arithmetic's rate.

    From the price of the whole kernel (permute, up, activation, down, sum) as the device was calibrated, between
    MANY_ROWS and twice as many per expert. Steps so small that reading weights dominates cost less per choice.
    """
    from hwmodels.mapping import Mapping
    from hwmodels.operators import Experts
    from hwmodels.roofline import AnalyticCost

    here = max(1.0, block.experts / cluster.gpus)
    rows = MANY_ROWS * here * np.array([1.0, 2.0])
    kernel = Experts(
        "routed experts", rows * cluster.gpus / block.top_k, rows, np.full(2, here), model.hidden, block.intermediate,
        block.experts, block.top_k, 1, cluster.gpus, block.gated, formats,
    )  # fmt: skip
    less, more = AnalyticCost(cluster, Mapping()).kernel_time_s(kernel).tolist()
    return float((more - less) / (rows[1] - rows[0]))


def _links(cluster: Cluster) -> tuple[Floats, Traffic]:
    """Seconds per byte of the slowest link between any two GPUs, and how transfers share them.

    Ports are shared; links of a mesh or torus are taken as each pair's own.
    """
    from hwmodels.topology import NO_LINK, topology

    links, gpus = topology(cluster), cluster.gpus
    source, target = (side.ravel() for side in np.indices((gpus, gpus)))
    ways = links.ways(source, target) if gpus > 1 else np.full((1, 0), NO_LINK)
    seconds = np.append(1.0 / links.bytes_per_s, 0.0)  # the last for NO_LINK, -1
    slowest = seconds[ways].max(axis=1, initial=0.0).reshape(gpus, gpus)
    direct = cluster.intra is not None and cluster.intra.kind in ("mesh", "torus")
    return slowest, "pairs" if direct else "ports"


def _precision(cluster: Cluster, weights: str | None) -> Precision:
    """Formats of the experts; arithmetic in that of the weights where the device has it."""
    from hwmodels.mapping import WEIGHT_FORMATS, Precision
    from ui.questions import OptionError

    peaks = cluster.device.peak_flops_per_s
    chosen = weights or ("fp8" if "fp8" in peaks else "bf16")
    if chosen not in WEIGHT_FORMATS:
        raise OptionError(f"--weights {chosen!r}: expected one of {', '.join(WEIGHT_FORMATS)}")
    arithmetic = WEIGHT_FORMATS[chosen][1] or "bf16"
    if arithmetic not in peaks:
        raise OptionError(f"--weights {chosen}: {cluster.device.name} does not multiply in {arithmetic}; "
                          f"expected a format of {', '.join(peaks)}")  # fmt: skip
    return Precision(chosen, arithmetic)


def _slots(stats: RoutingStats, gpus: int, replicas: int, given: int | None) -> int:
    """Slots per GPU; raises PlanError where experts and replicas do not divide evenly."""
    from planner.errors import PlanError

    if given is not None:
        return given
    slots, over = divmod(stats.experts + replicas, gpus)
    if over:
        fewer = f"{replicas - over} or " if replicas >= over else ""
        raise PlanError(
            f"{stats.experts} experts and {replicas} replicas do not divide over {gpus} GPUs ({over} left over); "
            f"expected {fewer}{replicas + gpus - over} replicas, or --slots"
        )
    return slots


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


def _show(out: Any, content: dict[str, Any]) -> None:
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
            seconds(entry["objective"]), seconds(entry["bound"]), f"{entry['gap']:.2%}", seconds(entry["wall_s"]),
        ]
        for entry in [*(e for name, e in content["baselines"].items() if name != content["solver"]), content]
    ]  # fmt: skip
    columns = ["solver", "busiest / mean", "worst layer", "objective", "bound", "gap", "took"]
    rendering.show_table(out, "Seconds per step that depend on the placement", columns, rows)
    rendering.say(
        out,
        f"A step of {content['tokens']:,} tokens; {seconds(content['seconds_per_choice'])} a choice on its rank "
        f"({content['experts_format']}, the arithmetic's rate), {content['bytes_per_choice']:,.0f} bytes moved.",
    )
