"""`shardwise validate run`: what was predicted, beside what really ran on this machine."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

    from planner.execute.workers import Workers
    from planner.profiling.machine import Machine
    from planner.validation.execution import Execution, Ranking
    from planner.validation.run import Learned, Question
    from simulator.result import Result
    from simulator.save import Writer
    from simulator.scheduler import SchedulerConfig
    from ui.asked import Asked
    from ui.questions import Traffic
    from ui.runreport import RunReport
    from ui.waiting import Bar

REQUESTS = 200
#: What is written: before anything is executed, and at the end.
BEFORE = ("prediction.json", "prediction.parquet", "operators.parquet")
AFTER = ("report.json", "report.html", "requests.csv", "latencies.svg")


@dataclass(slots=True)
class Executed:
    """What really ran; `broken` says why it ended early."""

    runs: list[Execution] = field(default_factory=list)
    ranking: Ranking | None = None
    broken: str | None = None


def run_command(
    model: Annotated[
        str | None, typer.Option(help="Shipped model, or path of a config.json [default: tiny-llama-256m].")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan file: as many replicas of its first pool as fit here.", metavar="FILE")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 [default: fp32 on a CPU, else bf16].")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks, each a process [default: 1].")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline stages [default: 1].")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Replicas [default: 1].")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="chunked, prefill-first, orca or static [default: chunked].")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a step [default: 128 on a CPU, else 2048].")
    ] = None,
    max_seqs: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a step [default: 8 on a CPU, else 64].")
    ] = None,
    requests: Annotated[int, typer.Option(min=2, max=1_000_000, help="Requests to serve.")] = REQUESTS,
    rate: Annotated[
        str, typer.Option(help="Requests per second; auto: 70 % of what the simulator finds possible.")
    ] = "auto",
    trace: Annotated[Path | None, typer.Option(help="Recorded requests.", metavar="FILE")] = None,
    workload: Annotated[
        str | None,
        typer.Option(help="Workload profile [default: short-questions on a CPU, else azure-conversation-2023]."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.05, max=1440.0, help="Time for measuring operators.")] = 3.0,
    runs: Annotated[int, typer.Option(min=1, max=9, help="Real runs: two show how much they differ.")] = 2,
    settings: Annotated[
        int, typer.Option(min=0, help="Requests (10 or more) to try each of eight scheduler settings with; 0: none.")
    ] = 0,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of a process on a CPU [default: all cores but one, shared; 8 at most]."),
    ] = None,
    stall: Annotated[
        float, typer.Option(min=1.0, max=86400.0, help="Seconds without a word after which a run is given up.")
    ] = 120.0,
    save: Annotated[Path, typer.Option(help="Folder for the prediction and the report.", metavar="DIR")] = Path(
        "validated-run"
    ),
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Of requests, weights and the order of measurements.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Execute a model on this machine with real arrivals, beside what was predicted before.

    Operators are measured inside forward passes of a small engine, a step model is made of these alone, the simulator
    predicts the whole run, the prediction is written to DIR, and then the same requests are served on a real clock.
    """
    from ui import jsonout, questions, rendering, saving

    if device not in ("cpu", "cuda"):
        raise questions.OptionError(f"--device {device}: expected cpu or cuda")
    if 0 < settings < 10:
        raise questions.OptionError(f"--settings {settings}: expected 0, or 10 and more, or chance ranks them")
    saving.require_writable(save, (*BEFORE, *AFTER))
    from ui.asked import USUAL, Asked, read_rate
    from ui.runreport import report_object, show_report

    rate_per_s = read_rate(rate)
    usual = None if trace is not None else workload or USUAL[device][1]
    traffic = questions.Traffic(trace, usual if trace is None else workload, requests)
    asked = Asked(device, model, plan, dtype, tp, pp, dp, scheduler, budget, max_seqs, threads, seed, rate_per_s)
    question, machine = asked.question(traffic)
    report, found = validated(question, machine, traffic, asked, minutes, runs, settings, stall, save, seed)
    if as_json:
        print(jsonout.dumps(report_object(report)))
    else:
        out = rendering.console()
        show_report(out, report)
        names = [*BEFORE, *(f"steps-{number}.parquet" for number in range(1, len(found.runs) + 1)), *AFTER]
        rendering.say(out, f"Saved to {save}: {', '.join(names)}.")
    give_up(found.broken, save)


def validated(
    question: Question,
    machine: Machine,
    traffic: Traffic,
    asked: Asked,
    minutes: float,
    runs: int,
    settings: int,
    stall_s: float,
    save: Path,
    seed: int,
) -> tuple[RunReport, Executed]:
    """Measure, predict, execute, compare; both halves are written to the folder."""
    import numpy as np

    from hwmodels.errors import ShardwiseError
    from planner.execute.workers import Workers
    from planner.validation import run as loop
    from planner.validation.execution import GPU_LIMITS, Comparison
    from simulator.save import write_files
    from ui.asked import about
    from ui.runreport import ProfileSummary, RunReport
    from ui.waiting import bar

    with bar() as waiting:
        waiting.at("making weights", None)
        with Workers(question.job, stall_s) as workers:
            tried = loop.settings(question) if settings else {}
            started = time.monotonic()
            rng = np.random.default_rng(seed)
            learned = loop.learn(workers, question, minutes, rng, waiting.at, tuple(tried.values()))
            profile = ProfileSummary(time.monotonic() - started, learned.passes, learned.held_out)
            waiting.at("predicting", None)
            if asked.rate_per_s is None:
                rate_per_s = loop.automatic_rate(question, learned.model, machine, seed)
                question = replace(question, requests=question.requests.scaled_to_rate(rate_per_s))
            predicted = loop.predict(question, learned.model, machine, seed)
            words = about(question, machine, traffic, asked.note(question))
            write_files(save, before(words, learned, predicted))
            forget(save)
            found = Executed()
            try:
                execute(workers, question, learned, machine, runs, found, seed, waiting)
                if tried and found.broken is None:
                    few = replace(question, requests=question.requests.head(settings))
                    choose(workers, few, learned, machine, tried, found, seed, waiting)
            except KeyboardInterrupt:
                found.broken = "interrupted"
            except ShardwiseError as error:
                found.broken = f"failed: {error}"
            if found.broken is not None:
                workers.close(kill=True)
        report = RunReport(
            words,
            Comparison.of(predicted.requests, found.runs),
            profile,
            found.ranking,
            partial=found.broken,
            limits=GPU_LIMITS if question.job.device == "cuda" else None,
        )
        waiting.at("writing the report", None)
        with uninterrupted():
            write_files(save, after(report, found))
    return report, found


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, and is forgotten."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def forget(folder: Path) -> None:
    """Take away what an earlier run into the folder found: it belongs to another prediction."""
    for path in (*(folder / name for name in AFTER), *folder.glob("steps-*.parquet")):
        path.unlink(missing_ok=True)


def before(words: Mapping[str, str], learned: Learned, predicted: Result) -> dict[str, Writer]:
    """The files that say what was expected, and why."""
    from simulator.metrics import none_for_nan, summarize
    from ui import jsonout, saving

    content = {
        "version": 1,
        "about": dict(words),
        "predicted": none_for_nan(summarize(predicted, ()).flat()),
        "host": {
            name: getattr(learned.engine, name)
            for name in ("step_overhead_s", "sequence_overhead_s", "prompt_overhead_s")
        },
        "held_out_steps": none_for_nan({kind: asdict(found) for kind, found in learned.held_out.items()}),
    }
    texts = saving.text_writer(jsonout.dumps(content) + "\n")
    return {
        "prediction.json": texts,
        "prediction.parquet": _table(predicted.requests),
        "operators.parquet": _table(learned.rows),
    }


def after(report: RunReport, found: Executed) -> dict[str, Writer]:
    """The files that say what happened."""
    from ui import jsonout, saving
    from ui.latencyfigure import latency_figure
    from ui.runpage import page
    from ui.runreport import report_object, runs_text

    texts = {
        "report.json": jsonout.dumps(report_object(report)) + "\n",
        "report.html": page(report),
        "requests.csv": runs_text(report.comparison),
        "latencies.svg": latency_figure(report.comparison, f"{report.about['model']}: {report.about['traffic']}"),
    }
    steps = {f"steps-{number}.parquet": _table(_plain(run.steps)) for number, run in enumerate(found.runs, 1)}
    return steps | {name: saving.text_writer(text) for name, text in texts.items()}


def _plain(steps: pd.DataFrame) -> pd.DataFrame:
    """Executed steps as parquet takes them."""
    import pandas as pd

    items = pd.Series([[list(item) for item in items] for items in steps["items"]], index=steps.index, dtype=object)
    return steps.drop(columns="laps").assign(items=items)


def _table(frame: pd.DataFrame) -> Writer:
    def write(path: Path) -> None:
        frame.to_parquet(path, index=False)

    return write


def execute(
    workers: Workers,
    question: Question,
    learned: Learned,
    machine: Machine,
    runs: int,
    found: Executed,
    seed: int,
    waiting: Bar,
) -> None:
    """The same requests, run after run, until one breaks off; how fast the machine is, before and after each."""
    import numpy as np

    from planner.validation import run as loop

    rng = np.random.default_rng(seed)
    for number in range(1, runs + 1):
        before_s = loop.drift(workers, learned, rng)
        execution, served = loop.execute(
            workers, question, learned, machine, seed, waiting.at, f"run {number} of {runs}"
        )
        found.runs.append(execution)
        found.broken = served.broken
        if served.broken:
            break
        drift = before_s, loop.drift(workers, learned, rng)
        found.runs[-1] = loop.at_speed(execution, question, learned, machine, drift, seed)


def choose(
    workers: Workers,
    question: Question,
    learned: Learned,
    machine: Machine,
    tried: Mapping[str, SchedulerConfig],
    found: Executed,
    seed: int,
    waiting: Bar,
) -> None:
    """Every setting, predicted and executed: would the best one have been chosen?"""
    from planner.validation import run as loop
    from planner.validation.execution import Ranked, ranking

    predictions = {}
    for name, config in tried.items():
        changed = replace(question, config=config)
        predictions[name] = float(loop.predict(changed, learned.model, machine, seed).requests["e2e_s"].mean())
    ranked = []
    for name, config in tried.items():
        execution, served = loop.execute(
            workers, replace(question, config=config), learned, machine, seed, waiting.at, name
        )
        if served.broken:
            found.broken = served.broken
            break
        ranked.append(Ranked(name, predictions[name], float(execution.requests["e2e_s"].mean())))
    found.ranking = ranking(ranked)


def give_up(broken: str | None, save: Path) -> None:
    """After a run that broke off: the exit code of an interruption, or an error that says where the rest is."""
    from hwmodels.errors import MeasurementError

    if broken == "interrupted":
        raise KeyboardInterrupt
    if broken is not None:
        raise MeasurementError(f"execution {broken}; what happened until then is in {save}, marked as partial")
