"""`shardwise prefill-study`: how should this traffic's prefill be cut and ordered, and how near is that to the best?"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from planner.catalogue import Catalogue
    from planner.plan import Pool

#: What is compared where nothing else is said: a mixture of experts on one device, prompts that far outweigh answers.
MODEL, HARDWARE, WORKLOAD, REQUESTS = "qwen3-30b-a3b", "h100-sxm", "azure-code-2023", 300
#: What --save writes.
FILES = ("study.json", "study.csv", "frontier.svg")


def prefill_study(
    plan: Annotated[
        Path | None,
        typer.Argument(
            help="Plan file whose first pool is studied [default: one replica of --model].", metavar="[PLAN]",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"Shipped model, or a Hugging Face config.json [default: {MODEL}].")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help=f"Device or cluster [default: {HARDWARE}].")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Devices of the replica [default: tp].")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor parallelism [default: gpus].")] = None,
    ep: Annotated[int, typer.Option(min=1, help="Expert parallelism, within tp.")] = 1,
    engine: Annotated[str | None, typer.Option(help="Engine profile [default: vllm].")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Recorded requests, as for 'shardwise simulate'.", metavar="FILE"),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(help=f"Shipped traffic profile or YAML file [default: {WORKLOAD}].", metavar="NAME"),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=2, help=f"Requests to serve at every load [default: {REQUESTS}].")
    ] = None,
    drop_empty: Annotated[bool, typer.Option("--drop-empty", help="Leave out traced requests without tokens.")] = False,
    tbt: Annotated[
        str, typer.Option(help="Limit on the time between tokens.", metavar="LIMIT")
    ] = "p99=100ms",
    rates: Annotated[
        str | None,
        typer.Option(
            help="Loads, in requests per second of the replica, such as 2,4,8 [default: 40, 60, 80 and 95 % of what "
            "Sarathi-Serve serves at most within the limit].",
            metavar="LIST",
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Tokens of a step.", metavar="LIST")
    ] = "256,512,1024,2048,4096,8192",
    chunks: Annotated[str, typer.Option(help="Prompt tokens of a step, of SARATHI.", metavar="LIST")] = "256,512,1024",
    groups: Annotated[
        str | None,
        typer.Option(
            help="Groups of layers, each dividing them, of layered prefill [default: one for every 512 tokens].",
            metavar="LIST",
        ),
    ] = None,
    ageing: Annotated[float, typer.Option(help="Tokens that a second of waiting counts for, shortest first.")] = 100.0,
    deadlines: Annotated[
        str,
        typer.Option(
            help="TTFT aimed at by class; where the traffic has one class, of as many of equal size by length.",
            metavar="LIST",
        ),
    ] = "1s,4s",
    max_seqs: Annotated[int | None, typer.Option(min=1, help="Sequences in a step [default: 128].")] = None,
    horizon: Annotated[int, typer.Option(help="Steps that the program looks ahead.")] = 8,
    decision: Annotated[
        str,
        typer.Option(help="What a decision of the program takes, such as 3ms or 0ms, or 'measured'.", metavar="TIME"),
    ] = "measured",
    cost: Annotated[
        str, typer.Option(help="What prices rest on: analytic, calibrated or measured.", metavar="NAME")
    ] = "calibrated",
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    save: Annotated[
        Path | None, typer.Option(help="Folder for study.json, study.csv and frontier.svg.", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:  # fmt: skip
    """Serve the same traffic with every published way of scheduling prefill, side by side, at several loads.

    Orca, prefill first (vLLM V0), SARATHI, Sarathi-Serve, layered prefill, shortest and earliest deadline first, and a
    linear program over the next steps whose own time counts. Beside them a mean TTFT that no schedule goes below.
    """
    from planner.prefillcontenders import Ways
    from planner.prefillstudy import study
    from simulator.limits import parse_limit
    from simulator.save import write_files
    from ui import jsonout, questions, rendering, saving
    from ui.frontierfigure import frontier_figure
    from ui.prefillreport import report_object, rows_text, show
    from ui.waiting import bar

    saving.require_writable(save, FILES)
    if not (isfinite(ageing) and ageing >= 0):
        raise questions.OptionError(f"--ageing {ageing}: expected a finite number of at least 0")
    limit = parse_limit("itl", tbt)
    ways = Ways(
        questions.numbers("--budgets", budgets, questions.MOST_TOKENS),
        questions.numbers("--chunks", chunks, questions.MOST_TOKENS),
        () if groups is None else questions.numbers("--groups", groups, 1024),
        ageing,
        tuple(parse_limit("ttft", word.strip()).seconds for word in deadlines.split(",")),
    )
    loads = () if rates is None else _rates(rates)
    decision_s = None if decision == "measured" else _decision_s(decision)
    if plan is not None and (model, hardware, gpus, tp, engine, max_seqs) != (None,) * 6:
        raise questions.OptionError(f"{plan} with --model, --hardware, --gpus, --tp, --engine or --max-seqs: expected "
                                    "one of the two to say what is studied")  # fmt: skip
    traffic = questions.Traffic(trace, workload or (None if trace else WORKLOAD), requests or REQUESTS, drop_empty)
    arriving = traffic.requests(seed)
    catalogue, pool = _studied(plan, model, hardware, gpus, tp, ep, engine, max_seqs, cost)
    with bar() as waiting:
        found = study(
            catalogue, pool, arriving, limit, loads, ways, horizon=horizon, decision_s=decision_s, waiting=waiting.at
        )
    content = report_object(found) | {
        "model": catalogue.model.name, "hardware": catalogue.cluster.device.name, "gpus": pool.gpus_per_replica,
        "traffic": traffic.name, "requests": len(arriving), "prompt_tokens": float(arriving.prompt_tokens.mean()),
        "output_tokens": float(arriving.output_tokens.mean()), "max_seqs": pool.max_seqs, "horizon": horizon,
        "decision_s": decision_s, "seed": seed,
    }  # fmt: skip
    if save is not None:
        texts = {"study.json": jsonout.dumps(content) + "\n", "study.csv": rows_text(found),
                 "frontier.svg": frontier_figure(found, content)}  # fmt: skip
        write_files(save, {name: saving.text_writer(text) for name, text in texts.items()})
    if as_json:
        print(jsonout.dumps(content))
        return
    out = rendering.console()
    show(out, found, content)
    if save is not None:
        rendering.say(out, f"Saved to {save}: {', '.join(FILES)}.")


def _studied(
    plan: Path | None,
    model: str | None,
    hardware: str | None,
    gpus: int | None,
    tp: int | None,
    ep: int,
    engine: str | None,
    max_seqs: int | None,
    cost: str,
) -> tuple[Catalogue, Pool]:
    """What is studied: the first pool of a plan that serves requests, or one replica of a model."""
    from planner.catalogue import open_catalogue
    from planner.plan import Pool
    from ui import questions

    if plan is not None:
        opened, catalogue = questions.opened(plan, cost)
        pool = opened.serving[0]
        return catalogue.of(pool), pool
    tp = tp or gpus or 1
    if gpus is not None and gpus != tp:
        raise questions.OptionError(f"--gpus {gpus} with --tp {tp}: expected as many; one replica is studied")
    catalogue = open_catalogue(questions.located(model or MODEL), hardware or HARDWARE, tp, engine or "vllm", cost)
    experts = any(layer.feed_forward.experts for layer in catalogue.model.layers)
    if tp % ep:
        raise questions.OptionError(f"--ep {ep} with --tp {tp}: expected a number that divides it")
    return catalogue, Pool(1, tp=tp, ep=ep, expert_tp=tp // ep if experts else 1, max_seqs=max_seqs or 128)


def _rates(text: str) -> tuple[float, ...]:
    from ui.questions import OptionError

    found = []
    for word in text.split(","):
        try:
            rate = float(word)
        except ValueError:
            rate = 0.0
        if not (isfinite(rate) and rate > 0):
            raise OptionError(f"--rates {text}: {word!r} found, expected requests per second above 0, such as 2,4,8")
        found.append(rate)
    return tuple(sorted(set(found)))


def _decision_s(text: str) -> float:
    from simulator.limits import parse_limit
    from ui.questions import OptionError

    if text.strip() in ("0", "0s", "0ms"):
        return 0.0
    found = parse_limit("itl", text)
    if "=" in text:
        raise OptionError(f"--decision {text}: expected a time such as 3ms, or 'measured'")
    return found.seconds
