"""What a run was worth: latencies by SLO class, goodput, throughput, use of the devices, energy and cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from simulator.distribution import Distribution, Ints
from simulator.errors import MetricError
from simulator.itl import gaps_by_group, together
from simulator.limits import Limit, Mask, Slos, attainment, meets_all
from simulator.result import Floats, Result


def meets(result: Result, slos: Slos, window: Window | None = None) -> bool:
    """Whether the statistics of the run (of the requests that arrive in the window) meet every limit of every class."""
    by_class = _by_class(result, slos)
    start_s, end_s = _interval(result, window)
    frame = result.requests
    codes = _members(frame, start_s, end_s) if window else _codes(frame)
    wanted = any(limit.metric == "itl" for limits in by_class.values() for limit in limits)
    gaps = gaps_by_group(result, codes, len(by_class)) if wanted and result.steps is not None else None
    ttft, tpot, e2e = (frame[name].to_numpy() for name in ("ttft_s", "tpot_s", "e2e_s"))
    if not isinstance(slos, Mapping):  # limits of all requests together, whatever their class
        mine = codes >= 0
        every = together(gaps) if gaps is not None else None
        return attainment(ttft[mine], tpot[mine], e2e[mine], slos, every).met
    for code, limits in enumerate(by_class.values()):
        mine = codes == code
        if not attainment(ttft[mine], tpot[mine], e2e[mine], limits, None if gaps is None else gaps[code]).met:
            return False
    return True


def _by_class(result: Result, slos: Slos) -> dict[str, Sequence[Limit]]:
    names = result.classes
    if not isinstance(slos, Mapping):
        return dict.fromkeys(names, tuple(slos))
    for name in slos:
        if name not in names:
            raise MetricError(f"SLO class is {name!r}, expected one of the workload's: {', '.join(names)}")
    return {name: slos.get(name, ()) for name in names}


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the run that is measured: from `warmup` after the first arrival to `cooldown` before the last one.

    Both in seconds or, with fraction=True, as fractions of the time from first to last arrival.
    """

    warmup: float = 0.0
    cooldown: float = 0.0
    fraction: bool = False

    def __post_init__(self) -> None:
        for name in ("warmup", "cooldown"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise MetricError(f"{name} is {value}, expected a finite number of at least 0")


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """The requests of one SLO class, or all of them.

    requests, finished, rejected, preemptions     counts
    ttft_s, tpot_s, itl_s, e2e_s                  of finished requests; itl_s only when steps were recorded
    slo_attainment                                share of the requests that meet each limit of their class on their own
                                                  (ttft, tpot, e2e); rejected and unfinished ones do not
    goodput_requests_per_s                        those requests per second
    output_tokens_per_s, total_tokens_per_s       generated tokens, and prompt tokens with them
    """

    requests: int
    finished: int
    rejected: int
    preemptions: int
    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    e2e_s: Distribution
    slo_attainment: float
    goodput_requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """One run, or the window of it that was measured.

    duration_s                       what rates are taken over: the makespan, or the window's length
    overall, classes                 all requests, and those of each SLO class
    mfu, mbu                         shares of the peak arithmetic and memory bandwidth of the devices with replicas
    kv_use_mean, kv_use_max          share of KV blocks held by running steps: over time and blocks, and of any lane
    queue_mean, queue_max            requests that have arrived and were never scheduled: over time, and at most
    j_per_output_token               energy of the devices with replicas per output token, whole run
    usd_per_million_output_tokens    rent of the devices with replicas at the measured output rate
    NaN where the run does not tell: without recorded steps, without a price, without tokens.
    """

    duration_s: float
    overall: ClassMetrics
    classes: Mapping[str, ClassMetrics]
    goodput_requests_per_s_per_gpu: float
    output_tokens_per_s_per_gpu: float
    mfu: float
    mbu: float
    kv_use_mean: float
    kv_use_max: float
    queue_mean: float
    queue_max: int
    j_per_output_token: float
    usd_per_million_output_tokens: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON: nested dictionaries with None in place of NaN."""
        without_nan: dict[str, Any] = none_for_nan(asdict(self))
        return without_nan

    def flat(self) -> dict[str, float]:
        """One number per name, such as "ttft_s.p99", "mfu", or "chat.ttft_s.p99" when there are several classes."""
        numbers = {name: value for name, value in _leaves(self) if not name.startswith(("overall.", "classes."))}
        numbers |= dict(_leaves(self.overall))
        if len(self.classes) > 1:
            for name, metrics in self.classes.items():
                numbers |= {f"{name}.{leaf}": value for leaf, value in _leaves(metrics)}
        return numbers


def summarize(result: Result, slos: Slos = (), window: Window | None = None) -> Metrics:
    """The metrics of a run, overall and by SLO class.

    With a window, latencies, attainment and goodput are those of requests that arrive in it; rates are over its length.
    Tokens count when they are processed, those of a prompt spread evenly from first schedule to first token, the others
    from first token to finish. mfu, mbu and j_per_output_token always cover the whole run.
    """
    by_class = _by_class(result, slos)
    start_s, end_s = _interval(result, window)
    frame, totals = result.requests, result.totals
    duration_s = end_s - start_s if window else totals.makespan_s
    columns = {
        name: frame[name].to_numpy()
        for name in ("ttft_s", "tpot_s", "e2e_s", "rejected", "preemptions", "prompt_tokens", "output_tokens")
    }
    codes = _codes(frame)
    members = _members(frame, start_s, end_s) if window else codes
    good = np.zeros(len(frame), dtype=bool)
    for code, limits in enumerate(by_class.values()):
        mine = codes == code if len(by_class) > 1 else slice(None)
        good[mine] = meets_all(columns["ttft_s"][mine], columns["tpot_s"][mine], columns["e2e_s"][mine], limits)
    prompts, outputs = _tokens(frame, (start_s, end_s) if window else None)
    gaps = gaps_by_group(result, members, len(by_class)) if result.steps is not None else None

    def metrics_of(mine: Mask, emitters: Mask, itl_s: tuple[Floats, Ints] | None) -> ClassMetrics:
        count, met = int(np.count_nonzero(mine)), int(np.count_nonzero(good & mine))
        output = float(outputs[emitters].sum())
        finished = mine & ~np.isnan(columns["e2e_s"])
        return ClassMetrics(
            requests=count,
            finished=int(np.count_nonzero(finished)),
            rejected=int(np.count_nonzero(columns["rejected"] & mine)),
            preemptions=int(columns["preemptions"][mine].sum()),
            ttft_s=Distribution.of(columns["ttft_s"][finished]),
            tpot_s=Distribution.of(columns["tpot_s"][finished]),
            itl_s=Distribution.of(*(itl_s or (np.empty(0), None))),
            e2e_s=Distribution.of(columns["e2e_s"][finished]),
            slo_attainment=_ratio(met, count),
            goodput_requests_per_s=_ratio(met, duration_s),
            output_tokens_per_s=_ratio(output, duration_s),
            total_tokens_per_s=_ratio(output + float(prompts[emitters].sum()), duration_s),
        )

    overall = metrics_of(members >= 0, codes >= 0, None if gaps is None else together(gaps))
    classes = {next(iter(by_class)): overall} if len(by_class) == 1 else {}
    if len(by_class) > 1:
        for code, name in enumerate(by_class):
            classes[name] = metrics_of(members == code, codes == code, None if gaps is None else gaps[code])
    kv_use_mean, kv_use_max = _kv_use(result, start_s, end_s)
    queue_mean, queue_max = _queue(frame, start_s, end_s)
    served = np.isfinite(columns["e2e_s"])
    price = math.nan if totals.price_usd_per_h is None else totals.price_usd_per_h
    return Metrics(
        duration_s=duration_s,
        overall=overall,
        classes=classes,
        goodput_requests_per_s_per_gpu=_ratio(overall.goodput_requests_per_s, totals.gpus),
        output_tokens_per_s_per_gpu=_ratio(overall.output_tokens_per_s, totals.gpus),
        mfu=_ratio(totals.model_flops, totals.peak_flops_per_s * totals.makespan_s),
        mbu=_ratio(totals.hbm_bytes, totals.memory_bytes_per_s * totals.makespan_s),
        kv_use_mean=kv_use_mean,
        kv_use_max=kv_use_max,
        queue_mean=queue_mean,
        queue_max=queue_max,
        j_per_output_token=_ratio(totals.energy_j, float(columns["output_tokens"][served].sum())),
        usd_per_million_output_tokens=_ratio(price / 3600 * 1e6, overall.output_tokens_per_s),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _interval(result: Result, window: Window | None) -> tuple[float, float]:
    """Start and end of what is measured, in seconds on the run's clock."""
    arrival_s = result.requests["arrival_s"].to_numpy()
    if not len(arrival_s):
        return 0.0, 0.0
    first, last = float(arrival_s.min()), float(arrival_s.max())
    if window is None:
        return first, first + result.totals.makespan_s
    unit = last - first if window.fraction else 1.0
    start, end = first + window.warmup * unit, last - window.cooldown * unit
    if end <= start:
        what = "" if window.fraction else " s"
        raise MetricError(
            f"warmup {window.warmup:g}{what} and cooldown {window.cooldown:g}{what} leave nothing to measure, "
            f"expected less than the {last - first:g} s over which requests arrive; shorten them or send more requests"
        )
    return start, end


def _codes(frame: pd.DataFrame) -> Ints:
    codes: Ints = np.asarray(frame["slo_class"].cat.codes, dtype=np.int64)
    return codes


def _members(frame: pd.DataFrame, start_s: float, end_s: float) -> Ints:
    """The class code of requests that arrive in the window, -1 for others."""
    arrival_s = frame["arrival_s"].to_numpy()
    return np.where((arrival_s >= start_s) & (arrival_s <= end_s), _codes(frame), -1)


def _tokens(frame: pd.DataFrame, window: tuple[float, float] | None) -> tuple[Floats, Floats]:
    """Prompt and output tokens of each finished request, or what of them was processed in the window."""
    finish_s, first_s = frame["finish_s"].to_numpy(), frame["first_token_s"].to_numpy()
    finished = np.isfinite(finish_s)
    prompts = np.where(finished, frame["prompt_tokens"].to_numpy(), 0.0)
    outputs = np.where(finished, frame["output_tokens"].to_numpy(), 0.0)
    if window is None:
        return prompts, outputs

    def share(since_s: Floats, until_s: Floats) -> Floats:
        inside = np.minimum(until_s, window[1]) - np.maximum(since_s, window[0])
        whole = until_s - since_s
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(whole > 0, np.clip(inside / whole, 0.0, 1.0), 0.0)

    first_inside = (first_s >= window[0]) & (first_s <= window[1])
    outputs = np.where(finished, first_inside + (outputs - 1) * share(first_s, finish_s), 0.0)
    return prompts * share(frame["first_schedule_s"].to_numpy(), first_s), outputs


def _kv_use(result: Result, start_s: float, end_s: float) -> tuple[float, float]:
    """Mean over time and blocks of the share of KV blocks held, and the largest share of any lane."""
    steps, totals = result.steps, result.totals
    pools, lanes = np.array(totals.kv_blocks), np.array(totals.lanes)
    if steps is None or steps.empty or not pools.all() or end_s <= start_s:
        return math.nan, math.nan
    share = steps["kv_blocks"].to_numpy() / pools[steps["replica"].to_numpy()]
    begin_s, stop_s = steps["start_s"].to_numpy(), steps["end_s"].to_numpy()
    inside_s = np.maximum(np.minimum(stop_s, end_s) - np.maximum(begin_s, start_s), 0.0)
    mean = float(steps["kv_blocks"].to_numpy() @ inside_s) / (int(lanes @ pools) * (end_s - start_s))
    return mean, float(share[inside_s > 0].max(initial=0))


def _queue(frame: pd.DataFrame, start_s: float, end_s: float) -> tuple[float, int]:
    """Mean (by Little's law, time in queue over time) and maximum of the requests waiting for their first step."""
    waited = ~frame["rejected"].to_numpy()
    arrival_s = np.sort(frame["arrival_s"].to_numpy()[waited])
    schedule_s = frame["first_schedule_s"].to_numpy()[waited]
    schedule_s = np.sort(np.where(np.isnan(schedule_s), np.inf, schedule_s))
    # Sorting each on its own keeps the sum of waits, and the number waiting at any time.
    inside_s = np.clip(schedule_s, start_s, end_s).sum() - np.clip(arrival_s, start_s, end_s).sum()
    # The queue is longest just after an arrival, or as the window opens.
    at_s = np.concatenate(([start_s], arrival_s[(arrival_s >= start_s) & (arrival_s <= end_s)]))
    waiting = np.searchsorted(arrival_s, at_s, side="right") - np.searchsorted(schedule_s, at_s, side="right")
    return _ratio(max(0.0, float(inside_s)), end_s - start_s), int(waiting.max())


def _leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, float]]:
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, (Distribution, ClassMetrics)):
            yield from _leaves(item, f"{prefix}{field.name}.")
        elif not isinstance(item, Mapping):
            yield f"{prefix}{field.name}", item


def none_for_nan(value: Any) -> Any:
    """Nested dictionaries with None in place of every number that is not finite, as JSON wants it."""
    if isinstance(value, Mapping):
        return {key: none_for_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replicate(
    run: Callable[[int], Result],
    seeds: Iterable[int],
    slos: Slos = (),
    *,
    window: Window | None = None,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Mean and Student-t confidence interval of every metric over independent runs.

    run   the result for one seed

    One row per name of `Metrics.flat`; columns `mean`, `half_width` (NaN below two runs) and `runs`, the number of runs
    in which the metric was not NaN. The interval mean ± half_width assumes about normal means of runs, see A. Law,
    Simulation Modeling and Analysis, chapter 9 (replication/deletion approach).
    """
    if not 0 < confidence < 1:
        raise MetricError(f"confidence is {confidence}, expected a fraction between 0 and 1, such as 0.95")
    rows = [summarize(run(seed), slos, window).flat() for seed in seeds]
    if not rows:
        raise MetricError("seeds is empty, expected at least one; two or more give an interval")
    from scipy.special import stdtrit  # slow to import, and only needed here

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = []
    for name in names:
        values = np.array([row.get(name, math.nan) for row in rows], dtype=float)
        values = values[np.isfinite(values)]
        runs = len(values)
        half = math.nan
        if runs > 1:
            half = float(stdtrit(runs - 1, (1 + confidence) / 2)) * float(values.std(ddof=1)) / math.sqrt(runs)
        table.append((float(values.mean()) if runs else math.nan, half, runs))
    return pd.DataFrame(table, index=pd.Index(names, name="metric"), columns=["mean", "half_width", "runs"])
