"""MLPerf Inference results: tokens per second of whole systems, and a file beside them that says how they were cut.

Results name the system, its accelerators, the benchmark, the scenario and the result; how the model was deployed is in
the submitters' code. So a YAML file of the same name must say it: a list of entries, each with `match` (columns and the
values they must have; none for all rows) and

    tp, pp, ep, attention_dp   of one replica (1 where left out); the accelerators hold as many replicas as fit
    engine       engine profile ("tensorrt-llm" where left out)
    precision    bf16, fp8, fp4, mxfp4 or int4
    kv           number format of the KV cache (as the engine has it where left out)
    isl, osl     mean prompt and output tokens of the benchmark's data
    policy, max_seqs, token_budget   as in planner.plan.Pool (the engine's own where left out)
    requests     how many are simulated (REQUESTS where left out)

The first entry that matches a row counts. Offline: all requests are queued at once. Server: Poisson arrivals; the
result is the rate of tokens at which the latency limits were kept, so requests come at result / osl.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from hwmodels.engine import load_engine
from hwmodels.errors import MeasurementError, ProfileError
from hwmodels.yamlfiles import plain
from planner.plan import Plan, Pool
from planner.validation.case import Case, Layout, Unmapped
from planner.validation.layouts.clients import all_at_once
from planner.validation.layouts.formats import formats_of
from planner.validation.layouts.names import model_named, precision_named, system_named
from planner.validation.layouts.recipes import CONTEXT_MARGIN, settings_of
from planner.validation.layouts.rows import Row, Unmappable, each_row, number, position, records, text, whole
from planner.validation.layouts.served import Ranks, forbidden, has_experts
from simulator.workload import Fixed, Independent, Poisson, Workload, draw_requests

#: Names of each column in the published tables (summary.csv, summary_results.json, the results page).
NAMES = {
    "system": ("SystemName", "System", "System Name", "System Name (click + for details)"),
    "accelerator": ("Accelerator", "accelerator_model_name"),
    "count": ("# of Accelerators", "# of accelerators", "a#", "Accelerators", "accelerators_per_node"),
    "nodes": ("Nodes", "number_of_nodes", "# of Nodes"),
    "model": ("MlperfModel", "Model", "Benchmark"),
    "scenario": ("Scenario",),
    "result": ("Result", "Performance_Result", "Avg. Result at System Name"),
    "units": ("Units", "Performance_Units"),
}
COLUMNS = frozenset({"accelerator", "count", "model", "scenario", "result", "units"})
REQUESTS = 3000

_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Setup:
    """One entry of the file beside the results; see the module."""

    precision: str
    isl: _Count
    osl: _Count
    match: dict[str, Any] = Field(default_factory=dict)
    tp: _Count = 1
    pp: _Count = 1
    ep: _Count = 1
    attention_dp: _Count = 1
    engine: str = "tensorrt-llm"
    kv: str | None = None
    policy: Literal["chunked", "prefill-first", "orca", "static"] | None = None
    max_seqs: _Count | None = None
    token_budget: _Count | None = None
    requests: _Count = REQUESTS


def accepts(columns: frozenset[str]) -> bool:
    """Whether a file with these columns has this layout."""
    return all(columns & set(NAMES[key]) for key in COLUMNS)


def read(frame: pd.DataFrame, path: Path) -> Layout:
    """All rows of the file; without the configuration beside it none becomes a case.

    Raises MeasurementError for a configuration that cannot be read.
    """
    beside = next((one for one in (path.with_suffix(".yaml"), path.with_suffix(".yml")) if one.is_file()), None)
    if beside is None:
        reason = "no configuration beside the results (a YAML file of the same name)"
        named = position(path)
        return Layout((), tuple(Unmapped(named(i, row), labels(row), reason) for i, row in enumerate(records(frame))))
    setups = _setups(beside)
    return each_row(frame, position(path), labels, lambda identity, row: case(identity, row, setups))


def labels(row: Row) -> dict[str, str]:
    """What the row calls itself."""
    return {
        "system": _cell(row, "accelerator"),
        "machine": _cell(row, "system"),
        "model": _cell(row, "model"),
        "mode": _cell(row, "scenario").lower(),
    }


def case(identity: str, row: Row, setups: tuple[Setup, ...]) -> Case:
    """The case of a row whose unit is tokens per second."""
    units, scenario = _cell(row, "units").lower().replace(" ", ""), _cell(row, "scenario").lower()
    if units not in {"tokens/s", "tokens/sec", "tokens/second"}:
        raise Unmappable("the result is not in tokens per second")
    if scenario not in {"offline", "server", "interactive"}:
        raise Unmappable("the scenario is not Offline, Server or Interactive")
    setup = next((setup for setup in setups if _matches(row, setup)), None)
    if setup is None:
        raise Unmappable("no entry of the configuration matches")
    result = number(row, _named(row, "result"))
    if result is None or result <= 0:
        raise Unmappable("no measured metric")
    gpus = (whole(row, _named(row, "count")) or 0) * _nodes(row)
    plan, ranks = _plan(row, setup, gpus)
    if scenario == "offline":
        workload = all_at_once(setup.isl, setup.osl, setup.requests)
    else:
        rng = np.random.default_rng(zlib.crc32(identity.encode()))
        lengths = Independent(Fixed(setup.isl), Fixed(setup.osl))
        workload = Workload(draw_requests(rng, setup.requests, result / setup.osl, Poisson(), lengths))
    known = {**labels(row), "backend": setup.engine, "precision": setup.precision, "layout": str(ranks)}
    known |= {"isl": str(setup.isl), "osl": str(setup.osl), "gpus": str(plan.gpus)}
    return Case(identity, known, plan, workload, {"throughput": result}, choice=())


def _plan(row: Row, setup: Setup, gpus: int) -> tuple[Plan, Ranks]:
    model, system = model_named(_cell(row, "model")), system_named(_cell(row, "accelerator"))
    assert model.profile is not None
    size = setup.tp * setup.attention_dp
    if has_experts(model.profile) and size % setup.ep == 0:
        ranks = Ranks(setup.tp, setup.pp, setup.attention_dp, setup.ep, size // setup.ep)
    else:
        ranks = Ranks(setup.tp, setup.pp, setup.attention_dp, setup.ep)
    problem = forbidden(model.profile, ranks)
    if problem:
        raise Unmappable(problem)
    replicas = gpus // (size * setup.pp)
    if replicas == 0:
        raise Unmappable("a replica has more ranks than the system has accelerators")
    precision = precision_named(setup.precision)
    formats = formats_of(model, precision, system)
    kernels = load_engine(setup.engine).kernels["default"]
    settings = settings_of(
        model,
        kernels,
        system,
        formats,
        precision=precision,
        version="",
        isl=setup.isl,
        osl=setup.osl,
        sequences=setup.requests,
    )
    pool = Pool(
        replicas,
        tp=ranks.tp,
        pp=ranks.pp,
        attention_dp=ranks.attention_dp,
        ep=ranks.ep,
        expert_tp=ranks.expert_tp,
        weights=formats.weights,
        activations=formats.activations,
        kv=setup.kv or settings.kv,
        experts=formats.experts,
        policy=setup.policy or settings.policy,
        max_seqs=setup.max_seqs or settings.max_seqs,
        token_budget=setup.token_budget or settings.token_budget,
        block_tokens=settings.block_tokens,
        max_context_tokens=setup.isl + setup.osl + CONTEXT_MARGIN,
    )
    return Plan(model.profile, system.cluster, pool.gpus, (pool,), setup.engine), ranks


def _setups(path: Path) -> tuple[Setup, ...]:
    try:
        data = plain(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MeasurementError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise MeasurementError(f"{path}: {str(error).splitlines()[0]}, expected YAML") from None
    entries = data if isinstance(data, list) else [data]
    found = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise MeasurementError(
                f"{path}: entry {index + 1} is {entry!r:.60}, expected keys such as tp and precision"
            )
        try:
            setup = Setup(**entry)
            precision_named(setup.precision)
            load_engine(setup.engine)
        except ProfileError as error:
            raise MeasurementError(f"{path}: entry {index + 1}: {error}") from None
        except (TypeError, ValueError, Unmappable) as error:
            told = " ".join(str(error).split())
            raise MeasurementError(f"{path}: entry {index + 1}: {told:.200}") from None
        found.append(replace(setup, match={str(key): str(value) for key, value in setup.match.items()}))
    return tuple(found)


def _matches(row: Row, setup: Setup) -> bool:
    return all(text(row, column).lower() == value.lower() for column, value in setup.match.items())


def _nodes(row: Row) -> int:
    """Nodes, where the accelerators are those of one."""
    per_node = _named(row, "count") == "accelerators_per_node"
    return (whole(row, _named(row, "nodes")) or 1) if per_node else 1


def _named(row: Row, key: str) -> str:
    return next((name for name in NAMES[key] if text(row, name)), NAMES[key][0])


def _cell(row: Row, key: str) -> str:
    return text(row, _named(row, key))
