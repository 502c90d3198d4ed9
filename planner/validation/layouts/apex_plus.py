"""APEX+'s runs of vLLM 0.6.0: Llama-3.1-70B on eight H100 as TP8, two replicas of TP4 or four of TP2, three traces.

A row is one replica; those of a split (`2DP4TP_0`, `2DP4TP_1`) share a trace round-robin, so the requests of one are
every second (fourth) of a Poisson process. What the launch scripts say (microsoft/apex_plus @8769096, vllm/results) is
set here: TP2 with a maximum length of 24,272 tokens, hence whole prompts first; TP4 and TP8 with the model's 131,072
tokens, for which vLLM 0.6 turns chunked prefill on with 512 tokens a step. They also give vLLM 97 % of the memory; the
engine profile's 90 % leave as much KV as these loads ever use.

Requests have the mean lengths of their row (generation stopped early at end-of-sequence). How many there were is
estimated from the size of the result files, which have a line for each. Rows of a lone replica (`2TP`, `4TP`) are
cumulative averages over a growing trace, and unmapped.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from planner.plan import Plan, Pool
from planner.validation.case import Case, Layout
from planner.validation.layouts.names import model_named, precision_named
from planner.validation.layouts.rows import Row, Unmappable, each_row, measured, number, position, text
from simulator.workload import Requests, Workload

COLUMNS = frozenset({"workload", "arrival_rate_per_s", "parallelism", "prompt_tokens_sum", "output_tokens_sum"})
COLUMNS |= {"ttft_mean_s", "tpot_mean_s"}
ENGINE = "vllm-0.6"
#: Requests of a trace; the split "creation" traces hold more and shorter ones than the whole one.
REQUESTS: dict[str, int | dict[str, int]] = {
    "creation": {"8TP": 510, "2DP4TP": 800, "4DP2TP": 800},
    "lmsys": 1037,
    "summarization": 1300,
}
#: Replicas of a plan and the tensor-parallel degree of each.
SPLITS = {"8TP": (1, 8), "2DP4TP": (2, 4), "4DP2TP": (4, 2)}


def accepts(columns: frozenset[str]) -> bool:
    """Whether a file with these columns has this layout."""
    return columns >= COLUMNS


def read(frame: pd.DataFrame, path: Path) -> Layout:
    """All rows of the file."""
    return each_row(frame, position(path), labels, case)


def labels(row: Row) -> dict[str, str]:
    """What the row calls itself."""
    return {
        "system": text(row, "node") or "8xH100-SXM-80GB",
        "backend": "vllm",
        "version": "0.6.0",
        "model": text(row, "model") or "Llama-3.1-70B",
        "precision": text(row, "quant") or "bf16",
        "mode": "rate",
        "workload": text(row, "workload"),
        "rate": text(row, "arrival_rate_per_s"),
    }


def pool(replicas: int, tp: int) -> Pool:
    """Replicas as the launch scripts started them."""
    if tp == 2:
        return Pool(replicas, tp=tp, policy="prefill-first", token_budget=24272, max_context_tokens=24272)
    return Pool(replicas, tp=tp, token_budget=512, max_context_tokens=131072)


def requests_in(trace: str, plan: str) -> int:
    """Requests of a trace as it was given to a plan."""
    counts = REQUESTS[trace]
    return counts if isinstance(counts, int) else counts[plan]


def case(identity: str, row: Row) -> Case:
    """The replica of a row and its share of the requests."""
    found = re.fullmatch(r"(8TP|2DP4TP|4DP2TP)(?:_(\d))?", text(row, "parallelism"))
    if found is None:
        raise Unmappable("a lone replica: its averages are cumulative")
    plan, trace, rate_per_s = found[1], text(row, "workload"), number(row, "arrival_rate_per_s")
    if trace not in REQUESTS or rate_per_s is None or rate_per_s <= 0:
        raise Unmappable("the trace or its rate is not known")
    replicas, tp = SPLITS[plan]
    place = int(found[2] or 0)
    if place >= replicas:
        raise Unmappable("more replicas than the plan has")
    model = model_named(text(row, "model") or "Llama-3.1-70B")
    precision_named(text(row, "quant") or "bf16")
    assert model.profile is not None
    metrics = measured(row, 1.0, ttft="ttft_mean_s", tpot="tpot_mean_s")
    known = {**labels(row), "layout": f"{replicas} x TP{tp}", "gpus": str(tp)}
    return Case(
        row=identity,
        labels=known,
        plan=Plan(model.profile, "hgx-h100", tp, (pool(1, tp),), ENGINE),
        workload=Workload(_requests(row, requests_in(trace, plan), rate_per_s, replicas, place)),
        measured=metrics,
        choice=tuple(known[key] for key in ("system", "model", "workload", "rate")),
    )


def _requests(row: Row, count: int, rate_per_s: float, replicas: int, place: int) -> Requests:
    """Every replicas-th request of the trace, of the row's mean lengths; all plans see the same arrivals."""
    prompts, outputs = number(row, "prompt_tokens_sum"), number(row, "output_tokens_sum")
    if prompts is None or outputs is None:
        raise Unmappable("the tokens of the requests are not given")
    rng = np.random.default_rng(zlib.crc32(f"{text(row, 'workload')} {rate_per_s}".encode()))
    arrival_s = np.cumsum(rng.standard_exponential(count) / rate_per_s)[place::replicas]
    mine = len(arrival_s)
    prompt, output = (max(1, round(total / mine)) for total in (prompts, outputs))
    return Requests(arrival_s - arrival_s[0], np.full(mine, prompt), np.full(mine, output))
