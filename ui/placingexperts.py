"""`shardwise place-experts`: on which GPUs should the experts of a model sit, given how tokens were routed?"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hwmodels.hardware import Cluster
    from hwmodels.mapping import Precision
    from hwmodels.routing import RoutingStats
    from hwmodels.shape import ModelShape
    from planner.placement import Floats, Placement, Problem

SOLVERS = ("large", "exact", "milp", "tuner", "contiguous", "random", "greedy", "eplb")
BASELINES = ("contiguous", "random", "greedy", "eplb")

#: The picture that --save writes beside the maps.
PICTURE = "experts.svg"


def place_experts(
    routing: Annotated[
        list[Path],
        typer.Argument(
            help="Recorded expert counts or choices; the files of all ranks of one recording. Rows of dense layers are "
            "zeros or left out; every expert of a mixture layer needs a count above 0 (see --add-count).",
            metavar="ROUTING...",
        ),
    ],
    model: Annotated[str, typer.Option(help="Shipped model, or a Hugging Face config.json.")] = "deepseek-v3",
    hardware: Annotated[str, typer.Option(help="Device or cluster.", metavar="NAME")] = "h200-sxm",
    gpus: Annotated[int, typer.Option(min=1, help="Ranks that share the experts of a layer.")] = 32,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=0, help="Extra copies of experts per layer, at most [default: 0; with --slots, all there is room for]."
        ),
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Experts a GPU holds per layer [default: (experts + replicas) / gpus].")
    ] = None,
    solver: Annotated[
        str, typer.Option(help=", ".join(SOLVERS) + " (exact with copies is milp).", metavar="NAME")
    ] = "large",
    seconds: Annotated[
        float,
        typer.Option(
            help="Time after which the solver's best placement is taken; reading, baselines and tables come on top."
        ),
    ] = 60.0,
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
        str | None,
        typer.Option(help="Format of the experts [default: where the device multiplies in fp8, that of the checkpoint, "
                     "or fp8; else bf16]."),
    ] = None,
    engine: Annotated[str, typer.Option(help="Engine profile whose kernels are counted.")] = "vllm",
    groups: Annotated[
        int, typer.Option(min=1, help="Groups of experts that the baseline eplb keeps in a node (DeepSeek-V3: 8).")
    ] = 1,
    add_count: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Added to every count of the mixture layers. A count of 0 is refused without it: it tells that the "
            "recording was short, not that the expert is never chosen.",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the solvers that draw.")] = 0,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the maps that SGLang, vLLM and vLLM-Ascend read, and experts.svg, a heat map of ranks' "
            "loads before and after.",
            metavar="DIR",
        ),
    ] = None,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="Also simulate prefill-heavy and decode-heavy traffic under every placement, and tell the seconds "
            "saved beside those that the objective predicts.",
        ),
    ] = False,
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
    from planner.placementcheck import checked_by_simulation, experts_s, savings
    from planner.placementcosts import problem_of
    from planner.placementfiles import NAMES
    from simulator.routingdraws import with_transitions
    from simulator.save import write_files
    from ui import jsonout, questions, rendering, saving
    from ui.placementreport import distribution, no_worse, report_object, show, show_simulation, simulation_object
    from ui.waiting import bar

    if solver not in SOLVERS:
        raise questions.OptionError(f"--solver {solver!r}: expected one of {', '.join(SOLVERS)}")
    if not (isfinite(seconds) and seconds > 0):
        raise questions.OptionError(f"--seconds {seconds}: expected a finite time above 0")
    if not isfinite(add_count):
        raise questions.OptionError(f"--add-count {add_count}: expected a finite number of at least 0")
    if concentration is not None and not 0 <= concentration <= 1:  # nan
        raise questions.OptionError(f"--concentration {concentration}: expected a part of choices from 0 to 1")
    saving.require_writable(save, (*NAMES, PICTURE))
    catalogue = open_catalogue(questions.located(model), hardware, gpus, engine)
    shape, cluster = catalogue.model, catalogue.cluster
    with bar() as waiting:
        waiting.at("reading", None)
        stats = read_routing(routing, shape, add_count=add_count)
        stats.check(shape)
        if concentration is not None:
            stats = with_transitions(stats, concentration)
        each, replicas = _slots(stats, gpus, replicas, slots)
        formats = _precision(questions.located(model), cluster, weights)
        problem = problem_of(stats, shape, cluster, formats, each, replicas, tokens or 128 * gpus)
        baselines = {}
        for name in BASELINES:
            waiting.at(f"placing: {name}", None)
            baselines[name] = solve(problem, solver=name, seconds=seconds, seed=seed, groups=groups)
        waiting.at(f"placing: {solver}", None)
        found = baselines.get(solver) or solve(problem, solver=solver, seconds=seconds, seed=seed)
        found, instead = no_worse(found, baselines, keep=solver in BASELINES)
        content = report_object(problem, found, baselines)
        content |= {
            "model": shape.name, "hardware": cluster.name, "gpus": gpus, "slots_per_gpu": each, "replicas": replicas,
            "experts": stats.experts, "layers": list(stats.layers), "routing": stats.source,
            "transitions": stats.transitions is not None, "tokens": tokens or 128 * gpus,
            "experts_format": formats.weights, "engine": engine, "asked_solver": solver, "instead": instead,
            "stopped": found.stopped, "seconds": seconds,
            "seconds_per_choice": problem.seconds_per_token, "bytes_per_choice": problem.bytes_per_token,
        }  # fmt: skip
        for entry, placement in [(content, found), *((content["baselines"][n], p) for n, p in baselines.items())]:
            entry["experts_s"] = experts_s(catalogue, stats, problem, placement, formats, content["tokens"])
        content["distribution"] = distribution(stats, problem, baselines["contiguous"], found)
        if simulate:
            waiting.at("simulating", None)
            every = {**baselines, found.solver: found}
            checks = checked_by_simulation(catalogue, stats, problem, every, formats, seed)
            saved = savings(catalogue, stats, problem, baselines["contiguous"], found, formats)
            content["simulation"] = simulation_object(checks, saved)
        if save is not None:
            files, content["saved"] = _files(stats, problem, shape, baselines["contiguous"], found, content)
            write_files(save, {name: saving.text_writer(text) for name, text in files.items()})
    if as_json:
        print(jsonout.dumps(content))
        return
    out = rendering.console()
    show(out, content)
    if simulate:
        show_simulation(out, content)
    if save is not None:
        kept = content["saved"]
        rendering.say(
            out,
            f"Saved to {save}: {', '.join(kept['files'])}; {kept['redundant_experts']} redundant experts; "
            f"{kept['filled_slots']:,} empty slots filled with copies; busiest / mean "
            f"{kept['busiest_over_mean']:.3f} with tokens split evenly over copies.",
        )


def _files(
    stats: RoutingStats,
    problem: Problem,
    model: ModelShape,
    before: Placement,
    after: Placement,
    content: dict[str, Any],
) -> tuple[dict[str, str], dict[str, Any]]:
    """Contents of what --save writes, by name, and what is told of them."""
    from planner.placement import rank_shares
    from planner.placementfiles import engine_files, filled, slot_maps
    from ui.expertheatmap import Panel, heat_map
    from ui.placementreport import busiest

    full = filled(problem, after.holds)
    even: Floats = full / full.sum(axis=2, keepdims=True)
    files = engine_files(slot_maps(problem, full), problem.gpus, stats.experts, stats.layers, len(model.layers))
    panels = [
        Panel(f"{when} ({placement.solver})", rank_shares(problem, split) * problem.gpus)
        for when, placement, split in (("before", before, before.split), ("after", after, even))
    ]
    slots = content["slots_per_gpu"] * problem.gpus
    title = f"{model.name}: load of {problem.gpus} GPUs of {content['hardware']} before and after placement of experts"
    told = (
        f"Routing of {stats.source}; {len(stats.layers)} layers of {stats.experts} experts, afterwards in {slots} "
        "slots. Max: the busiest rank of a layer."
    )
    files[PICTURE] = heat_map(title, told, stats.layers, panels)
    return files, {
        "files": list(files),
        "filled_slots": int(full.sum() - after.holds.sum()),
        "redundant_experts": slots - stats.experts,
        "busiest_over_mean": float(busiest(problem, even).mean()),
    }


def _precision(model: str, cluster: Cluster, weights: str | None) -> Precision:
    """Formats of the experts; arithmetic in that of the weights where the device has it."""
    from hwmodels.huggingface import stored_weights
    from hwmodels.mapping import WEIGHT_FORMATS, Precision
    from ui.questions import OptionError

    peaks = cluster.device.peak_flops_per_s
    chosen = weights or ((stored_weights(model) or "fp8") if "fp8" in peaks else "bf16")
    if chosen not in WEIGHT_FORMATS:
        raise OptionError(f"--weights {chosen!r}: expected one of {', '.join(WEIGHT_FORMATS)}")
    arithmetic = WEIGHT_FORMATS[chosen][1] or "bf16"
    if arithmetic not in peaks:
        raise OptionError(f"--weights {chosen}: {cluster.device.name} does not multiply in {arithmetic}; "
                          f"expected a format of {', '.join(peaks)}")  # fmt: skip
    return Precision(chosen, arithmetic)


def _slots(stats: RoutingStats, gpus: int, copies: int | None, given: int | None) -> tuple[int, int]:
    """Slots per GPU and replicas; slots without a number of replicas may all be filled with copies.

    Raises PlanError where experts and replicas do not divide evenly, or a GPU has no use for all slots.
    """
    from planner.errors import PlanError

    if given is not None:
        if given > stats.experts:
            raise PlanError(f"{given} slots on a GPU for {stats.experts} experts; expected at most one slot for each")
        return given, max(0, given * gpus - stats.experts) if copies is None else copies
    replicas = copies or 0
    slots, over = divmod(stats.experts + replicas, gpus)
    if over:
        fewer = f"{replicas - over} or " if replicas >= over else ""
        raise PlanError(
            f"{stats.experts} experts and {replicas} replicas do not divide over {gpus} GPUs ({over} left over); "
            f"expected {fewer}{replicas + gpus - over} replicas, or --slots"
        )
    return slots, replicas
