"""What would the simulator have said of measured serving points, each served by its own client?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import MappingError, MeasurementError, OutOfMemoryError, ShardwiseError
from planner.catalogue import Catalogue, mapping_of, open_catalogue, precision_of
from planner.plan import Plan
from planner.validation.case import Case, Layout, Unmapped
from planner.workers import Workers, available_cpus
from simulator.log import Log
from simulator.result import latencies
from simulator.simulate import run

#: (words for people, share done).
Progress = Callable[[str, float | None], None]
#: Metrics and evidence of a case, or reason and detail of a failure.
Answer = tuple[dict[str, float], dict[str, float]] | tuple[str, str]
#: Most cases of one task, and tasks of one process between two reports of progress.
TASK, ROUND = 16, 8
#: Size of the smallest tables of step times, so that most cases share theirs.
LEAST_TOKENS, LEAST_SEQS = 8192, 1024


@dataclass(frozen=True, slots=True)
class Prediction:
    """One point as simulated.

    predicted   by metric: means over the counted requests in seconds (tpot over those of two or more output tokens,
                each the mean gap after its first token), and output tokens per second from first arrival to last finish
    evidence    share of a step's time by what its price rests on, over the devices of the plan
    """

    case: Case
    predicted: Mapping[str, float]
    evidence: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Failure:
    """A point that cannot be simulated: `reason` without numbers, for counting; `detail` with them."""

    case: Case
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Predictions:
    """Every row of a layout: predicted, failed, or not mapped by the reader."""

    predictions: tuple[Prediction, ...]
    failures: tuple[Failure, ...] = ()
    unmapped: tuple[Unmapped, ...] = ()

    @property
    def rows(self) -> int:
        """Rows read."""
        return len(self.predictions) + len(self.failures) + len(self.unmapped)

    @property
    def reasons(self) -> dict[str, int]:
        """Rows without a prediction by reason, the most frequent first."""
        found = Counter([*(row.reason for row in self.unmapped), *(row.reason for row in self.failures)])
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @property
    def cases(self) -> tuple[Case, ...]:
        """All measured points that were mapped to a plan, those that cannot be simulated included."""
        return (*(p.case for p in self.predictions), *(f.case for f in self.failures))


def together(layouts: Mapping[str, Layout]) -> Layout:
    """The rows of several files as one layout, each labelled with its `file`."""
    cases: list[Case] = []
    unmapped: list[Unmapped] = []
    for name, layout in layouts.items():
        cases += (replace(case, labels={**case.labels, "file": name}) for case in layout.cases)
        unmapped += (replace(row, labels={**row.labels, "file": name}) for row in layout.unmapped)
    return Layout(tuple(cases), tuple(unmapped))


def predict(
    layout: Layout, cost: str | None = None, *, jobs: int | None = None, progress: Progress = lambda what, share: None
) -> Predictions:
    """Simulate every case, on `jobs` processes (by default one for each processor); rows keep their order.

    cost   what prices rest on, see open_catalogue; None for measured kernels where there are some, else calibrated

    Cases of one model, cluster, engine and cut share a step model. A prediction depends on its own row only.
    """
    jobs = jobs or available_cpus()
    found: dict[int, Prediction | Failure] = {}
    with Workers(partial(_perform, layout.cases, cost), jobs) as workers:
        for tasks in _rounds(_tasks(layout.cases), jobs * ROUND):
            progress(f"simulating: {len(found):,} of {len(layout.cases):,} rows", len(found) / len(layout.cases))
            tasks = sorted(tasks, key=lambda task: -sum(_size(layout.cases[index]) for index in task))
            for task, answers in zip(tasks, workers.map(tasks), strict=True):
                found |= {index: _told(layout.cases[index], *ans) for index, ans in zip(task, answers, strict=True)}
    _opened.cache_clear()
    ordered = [found[index] for index in range(len(layout.cases))]
    return Predictions(
        tuple(answer for answer in ordered if isinstance(answer, Prediction)),
        tuple(answer for answer in ordered if isinstance(answer, Failure)),
        layout.unmapped,
    )


def _answer(case: Case, cost: str | None) -> Answer:
    """Simulate one case: its metrics and evidence, or the reason and the detail why it cannot be."""
    counted = np.arange(len(case.workload.requests)) >= case.warmup
    if not counted.any():
        reason = "every request is a warm-up request"
        return reason, f"{reason}: {case.warmup} of {len(counted)}"
    try:
        shop = _opened(*_shop_key(case.plan), cost)
        deployment = shop.catalogue.deployment(case.plan)
    except ShardwiseError as error:
        return _reason(error), str(error)
    log = run(deployment, case.workload)
    if log.rejected:
        detail = f"{len(log.rejected)} of {len(counted)} requests can never fit beside the weights, or in the context"
        return "requests that can never fit in the KV cache or the context", detail
    return _metrics(case, log, counted), shop.evidence(case.plan)


def _metrics(case: Case, log: Log, counted: NDArray[np.bool_]) -> dict[str, float]:
    """Means over the counted requests, and their output tokens per second of the time they take together."""
    arrival_s, finish_s = np.asarray(log.arrival_s)[counted], np.asarray(log.finish_s)[counted]
    tokens = case.workload.requests.output_tokens[counted]
    ttft_s, tpot_s, e2e_s = latencies(arrival_s, np.asarray(log.first_token_s)[counted], finish_s, tokens)
    gaps = tpot_s[np.isfinite(tpot_s)]
    return {
        "ttft": float(ttft_s.mean()),
        "tpot": float(gaps.mean()) if len(gaps) else float("nan"),
        "e2e": float(e2e_s.mean()),
        "throughput": float(tokens.sum() / (finish_s.max() - arrival_s.min())),
    }


@dataclass(slots=True)
class _Shop:
    """A catalogue, and what the prices of every cut in it rest on."""

    catalogue: Catalogue
    known: dict[object, dict[str, float]] = field(default_factory=dict)

    def evidence(self, plan: Plan) -> dict[str, float]:
        """Shares by source, over the devices of the plan."""
        shares: dict[str, float] = {}
        for pool in plan.pools:
            key = mapping_of(pool), precision_of(pool)
            if key not in self.known:
                self.known[key] = self.catalogue.evidence(pool)
            for source, share in self.known[key].items():
                shares[source] = shares.get(source, 0.0) + share * pool.gpus / plan.gpus_used
        return shares


def _shop_key(plan: Plan) -> tuple[str, str, int, str, int, int]:
    """What plans must have in common to be compiled by one catalogue, the size of its tables (powers of 2) included."""
    tokens = max((LEAST_TOKENS, *(pool.token_budget for pool in plan.pools)))
    seqs = max((LEAST_SEQS, *(pool.max_seqs for pool in plan.pools)))
    return (
        plan.model,
        plan.hardware,
        plan.gpus,
        plan.engine,
        1 << (tokens - 1).bit_length(),
        1 << (seqs - 1).bit_length(),
    )


@lru_cache(maxsize=2)
def _opened(model: str, hardware: str, gpus: int, engine: str, tokens: int, seqs: int, cost: str | None) -> _Shop:
    """A catalogue whose tables are as large as these plans ask, so that no other row changes their prices."""
    try:
        catalogue = open_catalogue(model, hardware, gpus, engine, cost or "measured")
    except MeasurementError:
        if cost is not None:
            raise
        catalogue = open_catalogue(model, hardware, gpus, engine, "calibrated")
    catalogue.reserve(tokens, seqs)
    return _Shop(catalogue)


def _tasks(cases: Sequence[Case]) -> list[list[int]]:
    """Positions of cases that share step models, those that share a catalogue next to each other."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, case in enumerate(cases):
        cuts = tuple((mapping_of(pool), precision_of(pool)) for pool in case.plan.pools)
        groups.setdefault((_shop_key(case.plan), cuts), []).append(index)
    order = sorted(groups, key=lambda key: key[0])
    return [groups[key][start : start + TASK] for key in order for start in range(0, len(groups[key]), TASK)]


def _rounds(tasks: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    rest = iter(tasks)
    while some := list(islice(rest, size)):
        yield some


def _size(case: Case) -> int:
    return len(case.workload.requests)


def _perform(cases: Sequence[Case], cost: str | None, task: Sequence[int]) -> list[Answer]:
    """What a worker is asked; it knows the cases since it was forked, and does not send them back."""
    return [_answer(cases[index], cost) for index in task]


def _told(case: Case, first: dict[str, float] | str, second: dict[str, float] | str) -> Prediction | Failure:
    if isinstance(first, str):
        return Failure(case, first, str(second))
    assert not isinstance(second, str)
    return Prediction(case, first, second)


def _reason(error: ShardwiseError) -> str:
    """Why, in words that rows of the same fault share: without the values, and without the way out."""
    if isinstance(error, OutOfMemoryError):
        return "does not fit in memory"
    text = str(error)
    if isinstance(error, MappingError):
        text = "illegal layout: " + text.split(": ", 1)[-1]
    return re.sub(r"(?<![\w.-])\d[\d.,]*", "N", text.split("; ", 1)[0])
