"""`shardwise prefill-study`: how should this traffic's prefill be cut and ordered, and how near is that to the best?"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from planner.catalogue import Catalogue
    from planner.plan import Pool
    from simulator.limits import Limit

#: What is compared where nothing else is said: a mixture of experts on one device, prompts that far outweigh answers.
MODEL, HARDWARE, WORKLOAD, REQUESTS = "qwen3-30b-a3b", "h100-sxm", "azure-code-2023", 300
#: Tokens and prompt tokens of a step that are tried where nothing else is said, ascending.
BUDGETS, CHUNKS = (256, 512, 1024, 2048, 4096, 8192), (256, 512, 1024)
#: Steps that the program may look ahead: the time of every decision grows with them.
MOST_STEPS = 64
#: What --save writes.
FILES = ("study.json", "study.csv", "frontier.svg")


def _words(counts: Iterable[int]) -> str:
    return ",".join(map(str, counts))


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
        str | None,
        typer.Option(
            help=f"Tokens of a step [default: those of {_words(BUDGETS)} that max_seqs decodes fit in].",
            metavar="LIST",
        ),
    ] = None,
    chunks: Annotated[
        str | None,
        typer.Option(
            help=f"Prompt tokens of a step, of SARATHI [default: those of {_words(CHUNKS)} within the largest budget].",
            metavar="LIST",
        ),
    ] = None,
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
    horizon: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Steps that the program looks ahead.")] = 8,
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
    from simulator.save import write_files
    from ui import jsonout, questions, rendering, saving
    from ui.frontierfigure import frontier_figure
    from ui.prefillreport import report_object, rows_text, show
    from ui.waiting import bar

    saving.require_writable(save, FILES)
    if not (isfinite(ageing) and ageing >= 0):
        raise questions.OptionError(f"--ageing {ageing}: expected a finite number of at least 0")
    limit = _tbt(tbt)
    token_budgets = None if budgets is None else questions.numbers("--budgets", budgets, questions.MOST_TOKENS)
    chunk_tokens = None if chunks is None else questions.numbers("--chunks", chunks, questions.MOST_TOKENS)
    layer_groups = () if groups is None else questions.numbers("--groups", groups, 1024)
    deadlines_s = tuple(_time_s("--deadlines", deadlines, word, "times above 0 with units, such as 1s,4s")
                        for word in deadlines.split(","))  # fmt: skip
    loads = () if rates is None else _rates(rates)
    decision_s = None if decision == "measured" else _decision_s(decision)
    if plan is not None and (model, hardware, gpus, tp, engine, max_seqs) != (None,) * 6:
        raise questions.OptionError(f"{plan} with --model, --hardware, --gpus, --tp, --engine or --max-seqs: expected "
                                    "one of the two to say what is studied")  # fmt: skip
    traffic = questions.Traffic(trace, workload or (None if trace else WORKLOAD), requests or REQUESTS, drop_empty)
    arriving = traffic.requests(seed)
    catalogue, pool = _studied(plan, model, hardware, gpus, tp, ep, engine, max_seqs, cost)
    token_budgets = _budgets(token_budgets, pool.max_seqs)
    ways = Ways(token_budgets, _chunks(chunk_tokens, token_budgets[-1]), layer_groups, ageing, deadlines_s)
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


def _budgets(typed: tuple[int, ...] | None, max_seqs: int) -> tuple[int, ...]:
    """Tokens of a step, in all of which a decode of every sequence fits: those typed, or what is left of BUDGETS."""
    from ui.questions import OptionError

    if max_seqs > BUDGETS[-1]:
        raise OptionError(f"max_seqs of {max_seqs}: expected at most {BUDGETS[-1]} sequences in a step, as are studied")
    if typed is not None and typed[0] < max_seqs:
        raise OptionError(
            f"--budgets {_words(typed)}: {typed[0]} found, expected at least {max_seqs} tokens, one for every sequence "
            "(max_seqs)"
        )
    return typed or tuple(tokens for tokens in BUDGETS if tokens >= max_seqs)


def _chunks(typed: tuple[int, ...] | None, most: int) -> tuple[int, ...]:
    """Prompt tokens of a step within the largest budget: those typed, or what is left of CHUNKS, or all of it."""
    from ui.questions import OptionError

    if typed is not None and typed[-1] > most:
        raise OptionError(
            f"--chunks {_words(typed)}: {typed[-1]} found, expected at most {most}, the largest of --budgets"
        )
    return typed or tuple(tokens for tokens in CHUNKS if tokens <= most) or (most,)


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


def _tbt(text: str) -> Limit:
    from simulator.errors import MetricError
    from simulator.limits import parse_limit
    from ui.questions import OptionError

    try:
        return parse_limit("itl", text)
    except MetricError:
        raise OptionError(
            f"--tbt {text}: expected a time above 0 with its unit, for mean, max or a percentile, such as p99=100ms"
        ) from None


def _decision_s(text: str) -> float:
    if text.strip() in ("0", "0s", "0ms", "0us"):
        return 0.0
    return _time_s("--decision", text, text, "a time such as 3ms or 0ms, or 'measured'")


def _time_s(option: str, text: str, word: str, expected: str) -> float:
    """Seconds of one word of an option, which has a unit and no statistic."""
    from simulator.errors import MetricError
    from simulator.limits import parse_limit
    from ui.questions import OptionError

    try:
        if "=" not in word:
            return parse_limit("ttft", word).seconds
    except MetricError:
        pass
    found = "" if word == text else f"{word!r} found, "
    raise OptionError(f"{option} {text}: {found}expected {expected}")
