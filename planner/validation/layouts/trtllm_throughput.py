"""TensorRT-LLM's published throughputs: output tokens per second of a deployment whose queue is never empty.

tokens_per_s_total   output tokens per second of all devices, from the first request to the last token
tp, pp, ep, attn_dp  attn_dp 1 means enable_attention_dp: every one of the tp ranks is an attention group of its own
batch_size           only where batches were static (0.5 and 0.9, gptSessionBenchmark): that many requests, once

Requests of equal length are all queued at once (trtllm-bench throughput); how many is what the documentation of 1.0
says for each length (docs/source/performance/perf-overview.md @00f3768). The settings are those of trtllm-bench: up to
2048 sequences and 8192 tokens a step, prompts whole, the KV cache in 8 bits beside quantised weights.

Mixtures of experts: until 0.17 TensorRT-LLM cut experts like dense layers unless told otherwise (moe_tp_size =
tp_size), which is taken where the row leaves it open and attention is not in groups. Where the documentation only says
that --ep was given, the row is unmapped.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from planner.plan import Plan, Pool
from planner.validation.case import Case, Layout
from planner.validation.layouts.clients import all_at_once
from planner.validation.layouts.formats import Formats, formats_of
from planner.validation.layouts.names import Model, model_named, precision_named, system_named
from planner.validation.layouts.recipes import CONTEXT_MARGIN
from planner.validation.layouts.rows import Row, Unmappable, each_row, measured, number, position, required, text, whole
from planner.validation.layouts.served import Ranks, forbidden, has_experts

COLUMNS = frozenset({"model", "quant", "gpu", "tp", "pp", "n_gpus", "isl", "osl", "tokens_per_s_total"})

#: Requests by (isl, osl); elsewhere REQUESTS, as for the longest ones.
COUNTS = {(128, 128): 30000, (128, 2048): 3000, (2048, 128): 3000, (1000, 1000): 3000, (500, 2000): 3000}
COUNTS |= {(128, 4096): 1500, (1000, 2000): 1500, (2048, 2048): 1500, (5000, 500): 1500}
REQUESTS = 1000
MAX_SEQS, TOKEN_BUDGET = 2048, 8192


def accepts(columns: frozenset[str]) -> bool:
    """Whether a file with these columns has this layout."""
    return columns >= COLUMNS


def read(frame: pd.DataFrame, path: Path) -> Layout:
    """All rows of the file."""
    return each_row(frame, position(path), labels, case)


def labels(row: Row) -> dict[str, str]:
    """What the row calls itself."""
    return {
        "system": text(row, "gpu"),
        "backend": text(row, "engine") or "TensorRT-LLM",
        "version": text(row, "version"),
        "model": text(row, "model"),
        "precision": text(row, "quant"),
        "mode": "static" if text(row, "batch_size") else "saturated",
        "isl": text(row, "isl"),
        "osl": text(row, "osl"),
    }


def case(identity: str, row: Row) -> Case:
    """The case of a row."""
    model, system = model_named(text(row, "model")), system_named(text(row, "gpu"))
    formats = formats_of(model, precision_named(text(row, "quant")), system)
    ranks = _ranks(row, model)
    isl, osl, batch = required(row, "isl"), required(row, "osl"), whole(row, "batch_size")
    pool = _pool(ranks, formats, isl, osl, batch)
    if pool.gpus != required(row, "n_gpus"):
        raise Unmappable("the ranks are not those of the devices")
    count = batch or COUNTS.get((isl, osl), REQUESTS)
    known = {**labels(row), "layout": str(ranks), "gpus": str(pool.gpus), "concurrency": ""}
    traffic = ("system", "model", "precision", "version", "mode", "isl", "osl")
    assert model.profile is not None
    return Case(
        row=identity,
        labels=known,
        plan=Plan(model.profile, system.cluster, pool.gpus, (pool,), "tensorrt-llm"),
        workload=all_at_once(isl, osl, count),
        measured=measured(row, 1.0, throughput="tokens_per_s_total"),
        choice=tuple(known[key] for key in traffic),
    )


def _ranks(row: Row, model: Model) -> Ranks:
    assert model.profile is not None
    tp, pp, ep = required(row, "tp"), whole(row, "pp") or 1, whole(row, "ep")
    grouped = (number(row, "attn_dp") or 0) == 1
    if not has_experts(model.profile):
        ranks = Ranks(tp, pp)
    elif ep is None and tp > 1 and (text(row, "attn_dp") == "" or grouped):
        raise Unmappable("the cut of the experts is not stated")
    elif tp % (ep or 1):
        raise Unmappable("the ranks of attention and of the experts do not agree")
    else:
        experts = ep or 1
        ranks = Ranks(1, pp, tp, experts, tp // experts) if grouped else Ranks(tp, pp, 1, experts, tp // experts)
    problem = forbidden(model.profile, ranks)
    if problem:
        raise Unmappable(problem)
    return ranks


def _pool(ranks: Ranks, formats: Formats, isl: int, osl: int, batch: int | None) -> Pool:
    budget = max(TOKEN_BUDGET, -(-(isl + osl) // 1024) * 1024)
    quantised = formats.experts is not None or formats.weights != "bf16"
    return Pool(
        1,
        tp=ranks.tp,
        pp=ranks.pp,
        attention_dp=ranks.attention_dp,
        ep=ranks.ep,
        expert_tp=ranks.expert_tp,
        weights=formats.weights,
        activations=formats.activations,
        kv="fp8" if quantised else "bf16",
        experts=formats.experts,
        # A batch that starts together and ends together: its prompts first, in steps of the budget.
        policy="orca" if batch is None else "prefill-first",
        max_seqs=MAX_SEQS if batch is None else batch,
        token_budget=budget,
        block_tokens=32,
        max_context_tokens=isl + osl + CONTEXT_MARGIN,
    )
