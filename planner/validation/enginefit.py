"""Which overheads does an engine have? Fitted on half of the measured layouts, judged on the other half."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hwmodels.engine import Engine, load_engine
from hwmodels.errors import MeasurementError, ShardwiseError
from hwmodels.step_model import Numbers, StepModel, Tables, packed
from planner.catalogue import Catalogue, open_catalogue
from planner.validation.case import Case
from planner.validation.halves import half_of
from planner.workers import Workers, available_cpus
from simulator.deployment import Deployment
from simulator.result import latencies
from simulator.simulate import run

#: Fitted coefficients of an engine, and the size at which each begins to matter.
COEFFICIENTS = {
    "step_overhead_s": 1e-3,
    "sequence_overhead_s": 1e-5,
    "prompt_overhead_s": 1e-2,
    "unfused": 0.5,
    "request_overhead_s": 3e-2,
}
#: Log error beyond which a point counts less and less: rows that tell of something that is not modelled.
SOFT = 0.1
#: Weight of a log error in TTFT beside one in TPOT: repeated runs differ more in it.
TTFT_WEIGHT = 0.5
#: Fewest points to fit to: nine of one odd layout gave SGLang a host time of 10 ms a step. Where models without a draft
#: of their own have fewer, the TPOT (not the TTFT: launch scripts let them poll for requests seldom) of others counts.
ENOUGH = 30


@dataclass(frozen=True, slots=True)
class EngineFit:
    """A fitted engine, and errors before and after on both halves.

    errors   by half ('fitted', 'held-out') and metric: median absolute relative error before and after
    points   that were fitted to, and of the other half
    """

    engine: Engine
    errors: Mapping[str, Mapping[str, tuple[float, float]]]
    points: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A case whose step models are compiled: with nothing fused, and with all that can be."""

    case: Case
    deployment: Deployment
    fused: Deployment

    def log_errors(self, engine: Engine) -> tuple[float, float]:
        """log(predicted / measured) of TTFT and TPOT under the engine's overheads; NaN where one was not measured."""
        replicas = []
        known: dict[int, StepModel] = {}
        for spec, least in zip(self.deployment.replicas, self.fused.replicas, strict=True):
            old = spec.model
            if id(old) not in known:
                pairs = zip(old.stages, least.model.stages, strict=True)
                stages = [_between(most, less, engine.unfused) for most, less in pairs]
                known[id(old)] = StepModel(stages, old.transfer, engine, old.max_tokens, old.max_seqs)
            replicas.append(replace(spec, model=known[id(old)]))
        workload = self.case.workload
        log = run(Deployment(replicas, self.deployment.router, engine.request_overhead_s), workload)
        ttft_s, tpot_s, _ = latencies(
            log.arrival_s, np.array(log.first_token_s), np.array(log.finish_s), workload.requests.output_tokens
        )
        found = []
        for name, values in (("ttft", ttft_s), ("tpot", tpot_s)):
            measured = self.case.measured.get(name, float("nan"))
            found.append(float(np.log(np.nanmean(values[self.case.warmup :]) / measured)))
        return found[0], found[1]


def fit_engine(
    cases: Sequence[Case], name: str, cost: str, *, jobs: int | None = None, progress: Callable[[str], None] = print
) -> EngineFit:
    """The engine profile `name` with its COEFFICIENTS fitted to the half of `cases` that half_of calls 'fitted'.

    Robust least squares (Cauchy) on the log errors of mean TTFT and TPOT. Raises MeasurementError where too few cases
    of the engine can be simulated.
    """
    start = load_engine(name)
    progress("compiling step models")
    prepared = _prepared([case for case in cases if case.plan.engine == name], cost)
    halves = np.array([half_of(item.case.labels) for item in prepared])
    silent = np.array([may_speculate(item.case) for item in prepared], dtype=bool)
    mine = np.flatnonzero((halves == "fitted") & ~silent)
    if len(mine) < ENOUGH:
        mine = np.flatnonzero(halves == "fitted")
    if len(mine) < ENOUGH:
        raise MeasurementError(f"engine {name}: {len(mine)} points to fit to; expected at least {ENOUGH} of its name")
    with Workers(partial(_errors, prepared), jobs or available_cpus()) as workers:

        def errors(engine: Engine, indices: NDArray[np.int64]) -> NDArray[np.float64]:
            chunks = [chunk.tolist() for chunk in np.array_split(indices, max(1, len(indices) // 8)) if len(chunk)]
            return np.concatenate(workers.map([(engine, chunk) for chunk in chunks]))

        scale = np.array(list(COEFFICIENTS.values()))
        weights = np.column_stack([np.where(silent[mine], 0.0, TTFT_WEIGHT), np.ones(len(mine))])
        calls = 0

        def residuals(x: NDArray[np.float64]) -> NDArray[np.float64]:
            nonlocal calls
            calls += 1
            found: NDArray[np.float64] = np.nan_to_num(errors(_with(start, x * scale), mine) * weights).ravel()
            progress(f"run {calls}: mean |log error| {np.mean(np.abs(found)):.4f}")
            return found

        most = 1.0 / scale  # a second, or all
        first = np.array([getattr(start, key) for key in COEFFICIENTS]) / scale
        solution = least_squares(
            residuals,
            np.clip(first, 0.1, 0.9 * most),
            bounds=(0, most),
            loss="cauchy",
            f_scale=SOFT,
            diff_step=0.05,
            max_nfev=10,
        )
        fitted = _with(start, solution.x * scale)
        everyone = np.arange(len(prepared))
        before, after = errors(start, everyone), errors(fitted, everyone)
    return EngineFit(
        fitted,
        {
            half: {
                metric: (_median(before[halves == half, column]), _median(after[halves == half, column]))
                for column, metric in enumerate(("ttft", "tpot"))
            }
            for half in ("fitted", "held-out")
        },
        {"fitted": len(mine), "held-out": int(np.sum(halves == "held-out"))},
    )


def _between(most: Tables, least: Tables, share: float) -> Tables:
    """Tables with `share` of what can be fused left over; it is in the parts that depend on tokens alone."""

    def blend(a: Numbers, b: Numbers) -> Numbers:
        return packed(share * np.asarray(a) + (1 - share) * np.asarray(b))

    return replace(
        most,
        linear=blend(most.linear, least.linear),
        shared=blend(most.shared, least.shared),
        head=blend(most.head, least.head),
    )


def may_speculate(case: Case) -> bool:
    """Whether the model brings its own draft (DeepSeek's multi-token prediction), whose use published rows do not tell.

    Rows that agree in every column differ by a third in TPOT, as with and without it: judged, and fitted to only where
    there is little else.
    """
    return "deepseek" in case.plan.model.lower()


def _with(engine: Engine, values: NDArray[np.float64]) -> Engine:
    return replace(engine, **dict(zip(COEFFICIENTS, (float(f"{v:.3g}") for v in values), strict=True)))  # type: ignore[arg-type]


def _median(log_errors: NDArray[np.float64]) -> float:
    return float(np.nanmedian(np.abs(np.expm1(log_errors)))) if len(log_errors) else float("nan")


def _errors(prepared: Sequence[_Prepared], task: tuple[Engine, list[int]]) -> NDArray[np.float64]:
    engine, indices = task
    return np.array([prepared[index].log_errors(engine) for index in indices])


def _prepared(cases: Sequence[Case], cost: str) -> list[_Prepared]:
    """The cases that fit and whose requests fit, with step models compiled; cases of one cluster share a catalogue."""
    opened: dict[tuple[str, str, int, int, int], tuple[Catalogue, ...]] = {}
    found = []
    for case in cases:
        plan = case.plan
        tokens = max(8192, *(1 << (pool.token_budget - 1).bit_length() for pool in plan.pools))
        seqs = max(1024, *(1 << (pool.max_seqs - 1).bit_length() for pool in plan.pools))
        key = plan.model, plan.hardware, plan.gpus, tokens, seqs
        try:
            if key not in opened:
                catalogue = open_catalogue(*key[:3], plan.engine, cost)
                opened[key] = tuple(_catalogue(catalogue, share, tokens, seqs) for share in (1.0, 0.0))
            nothing, everything = opened[key]
            found.append(_Prepared(case, nothing.deployment(plan), everything.deployment(plan)))
        except ShardwiseError:
            continue
    return found


def _catalogue(catalogue: Catalogue, unfused: float, tokens: int, seqs: int) -> Catalogue:
    """The same for an engine that leaves this share unfused, with tables as large as its cases ask."""
    engine = replace(catalogue.engine, unfused=unfused)
    return Catalogue(catalogue.model, catalogue.cluster, engine, catalogue.kernels, tokens, seqs)
