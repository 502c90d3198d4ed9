"""One serving run of vLLM, a row for each request: when it arrived, and how long its tokens took.

The whole file is one point: its requests at their arrival times, and the means of TTFT, TPOT and E2E over them (ms in
the file, TPOT per request). Source of the reference file: LLMServingSim @5daddb2, vLLM 0.19 with CUDA graphs off
(--enforce-eager), so that every kernel is launched from Python; the mode says so, and the engine profile `vllm-eager`
is taken where there is one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from hwmodels.engine import engine_names
from planner.plan import Plan, Pool
from planner.validation.case import Case, Layout, Unmapped
from planner.validation.layouts.names import model_named, system_named
from planner.validation.layouts.rows import Row, Unmappable, records, required, text
from planner.validation.layouts.served import Ranks, forbidden, has_experts
from simulator.errors import TraceError
from simulator.workload import Requests, Workload

COLUMNS = frozenset({"hardware", "model", "vllm_version", "tp", "max_num_seqs", "max_num_batched_tokens", "arrival_s"})
COLUMNS |= {"input_toks", "output_toks", "ttft_ms", "tpot_ms", "e2e_ms"}
#: Columns that describe the run, the same in every row.
RUN = ("hardware", "model", "vllm_version", "tp", "dp", "enable_ep", "max_num_seqs", "max_num_batched_tokens")
#: vLLM's block, and the longest context it was started with is not in the file.
BLOCK_TOKENS, CONTEXT = 16, 32768


def accepts(columns: frozenset[str]) -> bool:
    """Whether a file with these columns has this layout."""
    return columns >= COLUMNS


def read(frame: pd.DataFrame, path: Path) -> Layout:
    """The file as one case, named after it."""
    first = next(iter(records(frame)))
    try:
        return Layout((case(path.name, frame, first),))
    except Unmappable as problem:
        return Layout((), (Unmapped(path.name, labels(first), str(problem)),))


def labels(row: Row) -> dict[str, str]:
    """What the run calls itself."""
    return {
        "system": text(row, "hardware"),
        "backend": "vllm",
        "version": text(row, "vllm_version"),
        "model": text(row, "model"),
        "precision": text(row, "precision") or "bf16",
        "mode": text(row, "mode") or "eager",
    }


def case(identity: str, frame: pd.DataFrame, first: Row) -> Case:
    """The run in the file."""
    for column in RUN:
        if column in frame and len(frame[column].drop_duplicates()) > 1:
            raise Unmappable(f"{column} differs between requests of one run")
    model, system = model_named(text(first, "model")), system_named(text(first, "hardware"))
    assert model.profile is not None
    tp = required(first, "tp")
    replicas = required(first, "dp") if "dp" in first else 1
    moe = has_experts(model.profile)
    parallel = moe and text(first, "enable_ep").lower() == "true"
    ranks = Ranks(tp, ep=tp if parallel else 1, expert_tp=tp if moe and not parallel else 1)
    if moe and replicas > 1:
        raise Unmappable("attention groups of a mixture of experts are not told from replicas")
    problem = forbidden(model.profile, ranks)
    if problem:
        raise Unmappable(problem)
    requests, metrics = _requests(frame), _measured(frame)
    known = labels(first)
    pool = Pool(
        replicas,
        tp=tp,
        ep=ranks.ep,
        expert_tp=ranks.expert_tp,
        max_seqs=required(first, "max_num_seqs"),
        token_budget=required(first, "max_num_batched_tokens"),
        block_tokens=BLOCK_TOKENS,
        max_context_tokens=max(CONTEXT, requests.max_context_tokens),
    )
    eager = known["mode"] == "eager" and "vllm-eager" in engine_names()
    return Case(
        row=identity,
        labels={**known, "layout": str(ranks), "gpus": str(pool.gpus)},
        plan=Plan(model.profile, system.cluster, pool.gpus, (pool,), "vllm-eager" if eager else "vllm"),
        workload=Workload(requests),
        measured=metrics,
        choice=(),
    )


def _requests(frame: pd.DataFrame) -> Requests:
    ordered = frame.sort_values("arrival_s", kind="stable")
    try:
        return Requests(
            ordered["arrival_s"].to_numpy(), ordered["input_toks"].to_numpy(), ordered["output_toks"].to_numpy()
        )
    except TraceError as error:
        raise Unmappable(f"requests that cannot be read ({str(error).split(' ', 1)[0]})") from None


def _measured(frame: pd.DataFrame) -> dict[str, float]:
    """Means in seconds; of TPOT over the requests that have one."""
    found = {}
    for metric in ("ttft", "tpot", "e2e"):
        values = pd.to_numeric(frame[f"{metric}_ms"], errors="coerce").to_numpy(float)
        if metric != "tpot" and np.isnan(values).any():
            raise Unmappable(f"{metric}_ms is missing for a request")
        found[metric] = float(np.nanmean(values)) * 1e-3
    return found
