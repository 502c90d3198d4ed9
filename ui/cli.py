"""The command `shardwise`: what to run, simulated, explained and exported.

Commands import what they need when they run, so that looking something up does not wait for the simulator.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hwmodels.errors import ShardwiseError
from ui.calibrating import calibrate as calibrate_command
from ui.enginefitting import engine as engine_fit_command
from ui.placingexperts import place_experts as place_experts_command
from ui.prefillstudy import prefill_study as prefill_study_command
from ui.profiling import profile as profile_command
from ui.validating import app as validate_app
from ui.validatingkernels import kernels as kernels_command
from ui.validatingkernels import plan as plan_prices_command
from ui.validatingrun import run_command
from ui.validatingsplitwise import splitwise as splitwise_command

if TYPE_CHECKING:
    from simulator.result import Result

EXIT_CODES = """Exit codes: 0 done; 2 wrong usage; 3 a model, device, engine or workload that is unknown or whose file
is wrong; 4 a plan, limit or setting that contradicts itself or the model; 5 a plan that does not fit in memory; 6 a
trace or traffic that cannot be replayed; 7 no plan fits or keeps the limits; 8 results that cannot be written; 9
measurements that are missing or wrong; 130 interrupted. Errors are one line on standard error."""

app = typer.Typer(
    name="shardwise",
    help="Which execution plan should serve this model on this hardware for this traffic, and how do we know?",
    epilog=EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

validate_app.command("engine")(engine_fit_command)
app.command("calibrate")(calibrate_command)
app.command("place-experts")(place_experts_command)
app.command("prefill-study")(prefill_study_command)
app.command("profile")(profile_command)
validate_app.command("kernels")(kernels_command)
validate_app.command("plan")(plan_prices_command)
validate_app.command("run")(run_command)
validate_app.command("splitwise")(splitwise_command)
app.add_typer(validate_app)

#: What typer raises for options it cannot read, wherever it keeps click.
_Usage: type[Exception] = typer.BadParameter.__mro__[1]
_Unreadable: type[Exception] = _Usage.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Expected failures are one line on standard error, bugs a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    try:
        code = app(args=words or ["--help"], prog_name="shardwise", standalone_mode=False)
        sys.stdout.flush()
    except ShardwiseError as error:
        return _failed(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _failed("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        return 1
    except _Unreadable as error:
        return _failed(_unreadable(error), 2)
    if code == 130:
        return _failed("interrupted", 130)
    return code if isinstance(code, int) else 0


def _unreadable(error: Exception) -> str:
    """What is told of an option that typer cannot read: with the value, which its ranges leave out."""
    told = str(getattr(error, "format_message", error.__str__)())
    faults: list[dict[str, object]] = getattr(error.__cause__, "errors", list)()
    if not faults:
        return told
    said = str(faults[0]["msg"])
    wanted = said.removeprefix("Input should be ").partition(", unable")[0]
    for long, short in (("greater than or equal to", "at least"), ("less than or equal to", "at most")):
        wanted = wanted.replace(long, short)
    return told.replace(said, f"{faults[0]['input']} found, expected {wanted}")


def _failed(message: str, code: int) -> int:
    from ui.words import printable

    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _above_zero(value: float | None) -> float | None:
    if value is not None and not (isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not a finite number above 0")
    return value


def _not_negative(value: float | None) -> float | None:
    if value is not None and not (isfinite(value) and value >= 0):
        raise typer.BadParameter(f"{value} is not a finite number of at least 0")
    return value


PlanFile = Annotated[
    Path, typer.Argument(help="Plan file in YAML, as 'shardwise plan --save' writes it.", metavar="PLAN")
]
Trace = Annotated[
    Path | None,
    typer.Option(help="Recorded requests: Azure 2023 CSV, Mooncake JSON lines or plain CSV, gzip too.", metavar="FILE"),
]
Workload = Annotated[
    str | None,
    typer.Option(help="Shipped traffic profile or YAML file [default: azure-conversation-2023].", metavar="NAME"),
]
DropEmpty = Annotated[bool, typer.Option("--drop-empty", help="Leave out traced requests without tokens.")]
Requests = Annotated[
    int | None,
    typer.Option(
        min=1, help="Requests to take; a shorter trace is repeated [default: 10000, or a whole shorter trace]."
    ),
]
Ttft = Annotated[str | None, typer.Option(help="Limit on the time to first token, such as p99=2s.", metavar="LIMIT")]
Tpot = Annotated[
    str | None, typer.Option(help="Limit on the time per output token, such as p99=50ms.", metavar="LIMIT")
]
E2e = Annotated[str | None, typer.Option(help="Limit on the end-to-end time, such as mean=20s.", metavar="LIMIT")]
Itl = Annotated[str | None, typer.Option(help="Limit on the time between tokens, such as p99=80ms.", metavar="LIMIT")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]
Save = Annotated[Path | None, typer.Option(help="Folder to write the results to.", metavar="DIR")]
Cost = Annotated[
    str,
    typer.Option(
        help="What prices rest on: analytic, calibrated (coefficients fitted to measured kernels) or measured (the "
        "kernels themselves; needs the extra 'silicon').",
        metavar="NAME",
    ),
]
Routing = Annotated[
    Path | None,
    typer.Option(
        help="Recorded expert counts of the model, which make the busiest rank [default: uniform routing].",
        metavar="FILE",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
List = typer.Option(metavar="LIST", show_default=False)
PrefixCaching = Annotated[
    str | None,
    typer.Option(
        help="Keep KV for prompts that begin alike, and forget the rest in this order: lru, lfu, fifo or length-aware; "
        "or off. Of effect on traffic with block hashes.",
        metavar="NAME",
    ),
]


@app.command("plan")
def plan_command(
    model: Annotated[
        str | None, typer.Option(help="Shipped model, or a Hugging Face config.json [default: llama-3.1-70b].")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Device or cluster, or several with counts, such as h100-sxm:16,a100-80-sxm:16 [default: h100-sxm]."
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Devices at hand [default: 16].")] = None,
    serving: Annotated[
        str,
        typer.Option(
            help="aggregated: every replica serves whole requests; disaggregated: pools for prompts and for answers; "
            "shared: both at once on shares of each device; any: whichever is best.",
            metavar="NAME",
        ),
    ] = "aggregated",
    transfer: Annotated[
        str, typer.Option(help="How KV goes to decode pools: layer-wise or serialized.", metavar="NAME")
    ] = "layer-wise",
    budget_usd_per_h: Annotated[
        float | None, typer.Option(callback=_above_zero, help="What the devices in use may cost.", metavar="USD")
    ] = None,
    budget_kw: Annotated[
        float | None, typer.Option(callback=_above_zero, help="What the devices in use may draw at most.", metavar="KW")
    ] = None,
    trace: Trace = None,
    workload: Workload = None,
    requests: Requests = None,
    drop_empty: DropEmpty = False,
    rate: Annotated[
        float | None,
        typer.Option(
            callback=_above_zero,
            help="Requests per second that must be served [default: 8 for the default model, devices and traffic; else "
            "as many as possible for goodput-per-gpu, and the traffic's own rate for other objectives].",
        ),
    ] = None,
    ttft: Ttft = None,
    tpot: Tpot = None,
    e2e: E2e = None,
    objective: Annotated[
        str, typer.Option(help="goodput-per-gpu, fewest-gpus, cost, energy or latency.")
    ] = "goodput-per-gpu",
    engine: Annotated[str, typer.Option(help="Engine profile whose overheads are counted.")] = "vllm",
    router: Annotated[
        str | None,
        typer.Option(
            help="round-robin, random, least-tokens, power-of-two or prefix-aware [default: round-robin, and "
            "least-tokens for pools with roles].",
        ),
    ] = None,
    prefix_caching: PrefixCaching = None,
    weights: Annotated[
        str | None, typer.Option(help="Formats of the weights, such as bf16,fp8.", metavar="LIST")
    ] = None,
    activations: Annotated[str | None, typer.Option(help="Formats of the arithmetic.", metavar="LIST")] = None,
    kv: Annotated[str | None, typer.Option(help="Formats of the KV cache.", metavar="LIST")] = None,
    experts: Annotated[
        str | None, typer.Option(help="Formats of the routed experts [default: as the weights].", metavar="LIST")
    ] = None,
    expert_cache: Annotated[
        str | None,
        typer.Option(
            help="Parts of the experts that devices hold, such as 0.25,0.5, or 'fit' for the largest that fit; the "
            "others are in the memory of the host [default: all, and 'fit' where nothing fits otherwise].",
            metavar="LIST",
        ),
    ] = None,
    expert_ladder: Annotated[
        str | None,
        typer.Option(
            help="Formats of such experts, by what they matter to a token, such as bf16,int4.", metavar="LIST"
        ),
    ] = None,
    cpu_threads: Annotated[
        str | None, typer.Option(help="Threads of the host for each device that compute such experts.", metavar="LIST")
    ] = None,
    host_cpu: Annotated[
        str | None, typer.Option(help="Processor of a node, with its memory [default: xeon-8592].", metavar="NAME")
    ] = None,
    cost: Cost = "calibrated",
    routing: Routing = None,
    experts_placed: Annotated[
        bool,
        typer.Option(
            help="Where routing is recorded, place experts by it, with copies where these help, or leave them in order."
        ),
    ] = True,
    policy: Annotated[
        str | None, typer.Option(help="Schedulers: chunked, prefill-first, orca, static, layered.", metavar="LIST")
    ] = None,
    token_budget: Annotated[str | None, typer.Option(help="Tokens in a step.", metavar="LIST")] = None,
    max_seqs: Annotated[str | None, typer.Option(help="Sequences in a step.", metavar="LIST")] = None,
    chunk_tokens: Annotated[
        str | None,
        typer.Option(help="Prompt tokens in a step, 'none' for what decodes leave [default: none].", metavar="LIST"),
    ] = None,
    group_tokens: Annotated[
        str | None,
        typer.Option(help="Prompt tokens for each group of layers, policy layered [default: 512].", metavar="LIST"),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(help="Orders of the queue: fcfs, shortest, deadline, priority [default: fcfs].", metavar="LIST"),
    ] = None,
    ageing: Annotated[
        float | None,
        typer.Option(callback=_not_negative, help="Tokens that a second of waiting counts for, order shortest."),
    ] = None,
    deadlines: Annotated[
        str | None,
        typer.Option(help="TTFT aimed at, order deadline: 2s, or one for each class such as 1s,10s.", metavar="LIST"),
    ] = None,
    overlap: Annotated[
        str | None,
        typer.Option(help="Of collectives: none, fused-norm, two-way [default: none].", metavar="LIST"),
    ] = None,
    cp: Annotated[
        str | None,
        typer.Option(
            help="Ranks that a sequence's tokens lie on, such as 1,2,4; auto: powers of two where prompts are long "
            "(p99 above 32,768 tokens) or nothing fits otherwise [default: 1].",
            metavar="LIST",
        ),
    ] = None,
    cp_kind: Annotated[
        str | None,
        typer.Option(
            help="How they attend to one another's: ring, tokenring, ulysses, all-gather [default: ring].",
            metavar="LIST",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(callback=_above_zero, help="Time after which no further plan is tried [default: 13]."),
    ] = None,
    seed: Seed = 0,
    tolerance: Annotated[
        float | None, typer.Option(callback=_above_zero, help="Relative width of what counts as equal [default: 0.02].")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="Plans to show.")] = 10,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Search for the best plan; without options, for Llama-3.1-70B on 16 H100 under a conversation workload.

    Limits hold together; where none is given, ttft p99=2s and tpot p99=50ms hold ('none' takes one away).
    """
    from planner import Question, search
    from planner.catalogue import open_catalogue
    from planner.expertbalance import balances
    from simulator.metrics import summarize
    from simulator.save import save_result
    from simulator.simulate import simulate
    from ui import jsonout, offloadwords, prefixes, questions, rendering, saving, words
    from ui.contextwords import with_context
    from ui.schedulewords import schedules
    from ui.timelinefigure import run_figure
    from ui.waiting import bar

    names = ("plan.yaml", "plans.csv", "result.json", "timeline.svg")
    saving.require_writable(save, names)
    traffic = questions.Traffic(trace, workload, requests, drop_empty)
    if rate is None and all(option is None for option in (model, hardware, gpus, trace, workload)):
        rate = questions.RATE_PER_S
    given = {"seconds": seconds, "tolerance": tolerance}
    at_hand = questions.devices(hardware or questions.HARDWARE, gpus)
    (hardware, gpus), *also = at_hand.items()
    about_experts = {
        "--experts": experts, "--expert-cache": expert_cache, "--expert-ladder": expert_ladder,
        "--cpu-threads": cpu_threads, "--host-cpu": host_cpu,
    }  # fmt: skip
    asked_away = questions.away(expert_cache, expert_ladder, cpu_threads, host_cpu)
    questions.check_experts(model or questions.MODEL, about_experts, hardware, gpus, asked_away)
    if routing is None and not experts_placed:
        raise questions.OptionError("--no-experts-placed without --routing: expected recorded counts, or neither")
    arriving = traffic.requests(seed)
    question = Question(
        model=questions.located(model or questions.MODEL),
        hardware=hardware,
        gpus=gpus,
        requests=arriving,
        rate_per_s=rate,
        limits=questions.limits({"ttft": ttft, "tpot": tpot, "e2e": e2e}, questions.LIMITS),
        objective=objective,  # type: ignore[arg-type]  # checked by the question
        engine=engine,
        choices=with_context(
            questions.choices(
                hardware,
                gpus,
                weights=weights,
                activations=activations,
                kv=kv,
                experts=experts,
                policy=policy,
                token_budget=token_budget,
                max_seqs=max_seqs,
                prefix_caching=None if prefix_caching is None else prefixes.known_caching(prefix_caching),
                away=asked_away,
                schedules=schedules(chunk_tokens, group_tokens, order, ageing, deadlines, overlap),
                model=model or questions.MODEL,
                also=dict(also),
            ),
            cp,
            cp_kind,
            prompt_tokens=arriving.prompt_tokens,
            gpus=sum(at_hand.values()),
            token_budget=token_budget,
        ),
        **({} if router is None else {"router": router, "pool_router": router}),  # type: ignore[arg-type]
        seed=seed,
        keep=keep,
        cost=cost,
        routing=questions.told(routing),
        experts_placed=experts_placed,
        also=dict(also),
        serving=serving,  # type: ignore[arg-type]
        transfer=transfer,  # type: ignore[arg-type]
        budget_usd_per_h=budget_usd_per_h,
        budget_w=None if budget_kw is None else 1000 * budget_kw,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    questions.check_rate(question)
    with bar() as waiting:
        result = search(question, waiting.at)
        best = result.best
        asked = result.question
        catalogue = open_catalogue(
            asked.model, asked.hardware, asked.gpus, asked.engine, asked.cost, asked.also, asked.routing,
            placed=asked.experts_placed,
        )  # fmt: skip
        arrivals = question.requests
        if isfinite(best.trial.rate_per_s):
            arrivals = arrivals.scaled_to_rate(best.trial.rate_per_s)
        run = simulate(catalogue.deployment(best.plan, with_work=True), arrivals, seed, progress=waiting.count)
        metrics = summarize(run, question.limits)
        seated, saved = balances(catalogue, best.plan), best.plan
        maps: dict[str, str] = {}
        if save is not None and seated:
            from planner.placementfiles import plan_with_maps  # and its solvers

            saved, maps = plan_with_maps(best.plan, catalogue)
            seated = [replace(one, expert_map=saved.pools[one.pool].expert_map) for one in seated]
        content = jsonout.plan_object(result, traffic.name, metrics, run.totals, saved)
        if run.caching is not None:
            content["best"]["caching"] = prefixes.as_object(run.caching)
        if catalogue.routing is not None:
            content |= {"routing": catalogue.routing.source, "experts": [asdict(one) for one in seated]}
        away = offloadwords.experts_away(catalogue, best.plan)
        odd = offloadwords.note_on(asked, catalogue, best.plan), words.maps_of_engine(seated, catalogue.engine.name)
        notes = [note for note in odd if note]
        content |= {"experts_away": away} if away else {}
        content |= {"notes": notes} if away or notes else {}
        if save is not None:
            waiting.at("writing the results", None)
            texts = saving.plan_text(saved), saving.ranking_text(result), jsonout.dumps(content) + "\n"
            picture = run_figure(run, best.plan)
            save_result(run, metrics, save, also=dict(zip(names, (*texts, picture), strict=True)) | maps)
    if as_json:
        print(jsonout.dumps(content))
        return
    for note in notes:
        print(f"note: {words.printable(note)}", file=sys.stderr)
    out = rendering.console()
    rendering.show_plan(out, result, traffic.name, metrics, run.totals)
    if catalogue.routing is not None:
        rendering.say(out, words.routing(catalogue.routing, best.plan))
    rendering.show_balances(out, seated, len(best.plan.pools), catalogue.routing)
    offloadwords.show_experts_away(out, away, len(best.plan.pools))
    if run.caching is not None:
        rendering.say(out, prefixes.in_words(run.caching))
    if save is not None:
        files = ", ".join(("plan.yaml", *maps, "plans.csv", "result.json", "timeline.svg"))
        rendering.say(out, f"Saved to {save}: {files} and the best plan's run.")


@app.command("simulate")
def simulate_command(
    plan: PlanFile,
    trace: Trace = None,
    workload: Workload = None,
    requests: Requests = None,
    drop_empty: DropEmpty = False,
    rate: Annotated[
        float | None, typer.Option(callback=_above_zero, help="Requests per second [default: the traffic's own].")
    ] = None,
    fail: Annotated[
        list[str] | None,
        typer.Option(help="A replica that fails, by its number, and when: 2@60 (seconds); may be repeated."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight in a closed loop, instead of arrival times.")
    ] = None,
    think: Annotated[
        float | None, typer.Option(callback=_not_negative, help="Seconds between an answer and the next request.")
    ] = None,
    images_per_request: Annotated[
        int | None, typer.Option(help="Images in every request, for a plan with an encoder.", metavar="N")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Their size in pixels, such as 1280x720.", metavar="WxH")
    ] = None,
    prefix_caching: PrefixCaching = None,
    router: Annotated[
        str | None,
        typer.Option(help="round-robin, random, least-tokens, power-of-two or prefix-aware [default: the plan's]."),
    ] = None,
    host_kv_gb: Annotated[
        float | None,
        typer.Option(callback=_not_negative, help="KV of a replica that host memory keeps, in GB.", metavar="GB"),
    ] = None,
    ssd_kv_gb: Annotated[
        float | None,
        typer.Option(callback=_not_negative, help="KV of a replica that disks keep, in GB.", metavar="GB"),
    ] = None,
    ssd_gb_per_s: Annotated[
        float | None,
        typer.Option(callback=_above_zero, help="What the disks of a node read, and write, in GB/s.", metavar="RATE"),
    ] = None,
    ttft: Ttft = None,
    tpot: Tpot = None,
    itl: Itl = None,
    e2e: E2e = None,
    cost: Cost = "calibrated",
    routing: Routing = None,
    seed: Seed = 0,
    replications: Annotated[int, typer.Option(min=1, max=1000, help="Independent runs, for confidence intervals.")] = 1,
    warmup: Annotated[
        float, typer.Option(callback=_not_negative, help="Seconds after the first arrival that are not measured.")
    ] = 0.0,
    cooldown: Annotated[
        float, typer.Option(callback=_not_negative, help="Seconds before the last arrival that are not measured.")
    ] = 0.0,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Simulate one plan: all metrics by SLO class, and with --save the requests, metrics and a Perfetto timeline."""
    from planner.encoding import encoder_note
    from planner.expertbalance import balances
    from simulator.metrics import Window, meets, replicate, summarize
    from simulator.save import save_result
    from simulator.simulate import simulate
    from simulator.workload import Workload as Load
    from ui import jsonout, offloadwords, poolwords, prefixes, questions, rendering, saving, words
    from ui.pictures import pictures
    from ui.timelinefigure import run_figure
    from ui.waiting import bar

    saving.require_writable(save)
    if rate is not None and concurrency is not None:
        raise questions.OptionError(f"--rate {rate:g} and --concurrency {concurrency}: expected one of them")
    traffic = questions.Traffic(trace, workload, requests, drop_empty)
    limits = questions.limits({"ttft": ttft, "tpot": tpot, "itl": itl, "e2e": e2e}, {})
    chosen, catalogue = questions.opened(plan, cost, routing)
    chosen = prefixes.changed(chosen, prefix_caching, router, host_kv_gb, ssd_kv_gb, ssd_gb_per_s)
    seen = pictures(chosen, images_per_request, image_size)
    if replications > 1 and trace is not None and chosen.router in ("round-robin", "least-tokens", "prefix-aware"):
        raise questions.OptionError(
            f"--replications {replications} with --trace {trace} under router {chosen.router}: nothing is drawn, so "
            "all runs would be the same; expected --workload or a random router"
        )
    window = Window(warmup, cooldown) if warmup or cooldown else None
    recorded = traffic.requests(seed, rate) if trace is not None else None
    first: list[Result] = []
    started = time.perf_counter()
    with bar() as waiting:
        waiting.at("compiling step models", None)
        deployment = catalogue.deployment(chosen, with_work=True, image=seen.cut if seen else None)
        if fail:
            deployment = replace(deployment, removals=poolwords.removals(fail))

        def run(run_seed: int) -> Result:
            found = recorded or traffic.requests(run_seed, rate)
            load = Load(found, concurrency, think or 0.0, seen.images if seen else None)
            result = simulate(deployment, load, run_seed, progress=waiting.count)
            if not first:
                first.append(result)
            return result

        intervals = None
        if replications > 1:
            intervals = replicate(run, range(seed, seed + replications), limits, window=window)
        else:
            run(seed)
        waiting.at("measuring", None)
        metrics = summarize(first[0], limits, window)
        kept = {limit: meets(first[0], [limit], window) for limit in limits}
        wall_s = time.perf_counter() - started
        evidence = catalogue.plan_evidence(chosen)
        totals = first[0].totals
        content = jsonout.simulation_object(chosen, metrics, totals, kept, intervals, evidence, wall_s)
        use, saved = first[0].encode, first[0].caching
        seated = balances(catalogue, chosen)
        odd = encoder_note(chosen, catalogue.model), prefixes.note_on(chosen, hashed=saved is not None)
        notes = [note for note in (*odd, words.maps_of_engine(seated, catalogue.engine.name)) if note]
        content |= {"encode": None if use is None else asdict(use), "caching": prefixes.as_object(saved)}
        content |= {"notes": notes, "handed_over": poolwords.handed_over(first[0])}
        away = offloadwords.experts_away(catalogue, chosen)
        if away:
            content["experts_away"] = away
        if catalogue.routing is not None:
            content["routing"] = catalogue.routing.source
        if seated:
            content["experts"] = [asdict(one) for one in seated]
        if save is not None:
            waiting.at("writing the results", None)
            texts = {"result.json": jsonout.dumps(content) + "\n", "timeline.svg": run_figure(first[0], chosen)}
            save_result(first[0], metrics, save, also=texts)
    if as_json:
        print(jsonout.dumps(content))
        return
    for note in notes:
        print(f"note: {words.printable(note)}", file=sys.stderr)
    how = (
        f"{concurrency} in flight" if concurrency is not None else "at its own rate" if rate is None else f"{rate:g}/s"
    )
    out = rendering.console()
    what = f"{len(first[0].requests):,} requests of {traffic.name}{f' with {seen.words}' if seen else ''}, {how}"
    rendering.show_simulation(out, chosen, what, metrics, totals, kept, intervals)
    if use is not None:
        rendering.say(out, f"  {words.encoding(use)}")
    if saved is not None:
        rendering.say(out, f"  {prefixes.in_words(saved)}")
    for sentence in poolwords.sentences(first[0]):
        rendering.say(out, f"  {sentence}")
    rendering.say(out, f"Step times rest on: {words.shares(evidence)}.")
    if catalogue.routing is not None:
        rendering.say(out, words.routing(catalogue.routing, chosen))
    rendering.show_balances(out, seated, len(chosen.pools), catalogue.routing)
    offloadwords.show_experts_away(out, away, len(chosen.pools))
    if save is not None:
        more = ", transfers.csv" * bool(len(first[0].transfers)) + ", links.csv" * bool(len(first[0].links))
        files = "requests.csv, requests.parquet, metrics.json, timeline.json, timeline.svg, result.json" + more
        rendering.say(out, f"Saved to {save}: {files}.")


@app.command("export")
def export_command(
    plan: PlanFile,
    engine: Annotated[
        str | None,
        typer.Option(help="vllm, sglang, tensorrt-llm or dynamo [default: the plan's engine].", metavar="ENGINE"),
    ] = None,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Print the files that launch the plan; what the engine does differently goes to standard error."""
    from planner.export import export
    from ui import jsonout, questions, saving, words

    saving.require_writable(save)
    chosen, catalogue = questions.opened(plan)
    for pool in chosen.serving:
        catalogue.of(pool).require_fit(pool)
    nodes = {name: one.cluster.gpus_per_node for name, one in catalogue.others.items()}
    nodes[chosen.hardware] = catalogue.cluster.gpus_per_node
    seats = None
    if catalogue.maps:
        from planner.placementfiles import seats_of  # and its solvers

        seats = seats_of(catalogue.maps, catalogue.model)
    exported = export(chosen, engine or chosen.engine, nodes, seats)
    if save is not None:
        saving.write_launch_files(save, exported.files)
    if as_json:
        content = {"engine": exported.engine, "engine_version": exported.version, "files": dict(exported.files)}
        print(jsonout.dumps({**content, "notes": list(exported.notes)}))
        return
    for note in exported.notes:
        print(f"note: {words.printable(note)}", file=sys.stderr)
    if save is not None:
        print(f"Saved to {words.printable(str(save))}: {', '.join(exported.files)}.")
        return
    for name, text in exported.files.items():
        if len(exported.files) > 1:
            print(f"# ---- {name} ----")
        print(text, end="" if text.endswith("\n") else "\n")
    if len(exported.files) > 1:
        print(f"note: --save DIR writes {', '.join(exported.files)} side by side", file=sys.stderr)


@app.command("explain")
def explain_command(
    plan: PlanFile,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Decoding sequences of one scheduler [default: 64, or what fits].")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens each of them attends to.")] = 1024,
    prefill: Annotated[
        int | None, typer.Option(min=0, help="Tokens of the prompt chunk; 0 for none [default: the token budget].")
    ] = None,
    cost: Cost = "calibrated",
    routing: Routing = None,
    as_json: Json = False,
) -> None:
    """Show where the time of a step goes, operator by operator, and which resource binds it."""
    from planner.expertbalance import balances
    from planner.explainplan import explain_plan
    from ui import jsonout, questions, rendering, words

    chosen, catalogue = questions.opened(plan, cost, routing)
    pools = explain_plan(catalogue, chosen, batch=batch, context=context, prefill=prefill)
    routed, seated = catalogue.routing, balances(catalogue, chosen)
    if as_json:
        content = jsonout.explanation_object(chosen, pools)
        content |= {} if routed is None else {"routing": routed.source}
        print(jsonout.dumps(content | ({"experts": [asdict(one) for one in seated]} if seated else {})))
        return
    out = rendering.console()
    rendering.show_explanation(out, chosen, pools)
    if routed is not None:
        rendering.say(out, words.routing(routed, chosen))
    rendering.show_balances(out, seated, len(chosen.pools), routed)


@app.command("models")
def models_command(as_json: Json = False) -> None:
    """List the shipped models."""
    from hwmodels.huggingface import load_model, load_profile, model_names
    from ui import jsonout, rendering, words

    shapes = [load_model(name) for name in model_names()]
    attention = {shape.name: words.attention(shape) for shape in shapes}
    if as_json:
        print(jsonout.dumps(jsonout.models_object([load_profile(name) for name in model_names()], shapes, attention)))
        return
    rendering.show_models(rendering.console(), shapes, attention)


@app.command("hardware")
def hardware_command(as_json: Json = False) -> None:
    """List the shipped devices and clusters."""
    from hwmodels.hardware import cluster_names, device_names, load_cluster, load_device
    from ui import jsonout, rendering

    devices = [load_device(name) for name in device_names()]
    clusters = [load_cluster(name, 1) for name in cluster_names()]
    if as_json:
        print(jsonout.dumps(jsonout.hardware_object(devices, clusters)))
        return
    rendering.show_hardware(rendering.console(), devices, clusters)
