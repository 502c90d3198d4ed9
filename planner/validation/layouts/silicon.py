"""AIConfigurator's collection of measured serving points: TTFT and TPOT by model, system, engine and parallel layout.

What the columns mean was worked out from the file itself:

tp_size, attention_dp_size, moe_tp_size, moe_ep_size   ranks of attention, groups of them, and ranks of the experts, so
    that tp_size * attention_dp_size = moe_tp_size * moe_ep_size; 0 and missing stand for 1, and dense models' expert
    columns say nothing. Three kinds of rows are read otherwise:
    * Rows exported from InferenceX whose `tp` and `ep` were both n have n * n ranks (tp 64 or attention_dp 64 with
      experts 8 x 8 on one node of 8). Their ids end in `tpN_epN`; and the same runs are in an older export as tp 8
      (DeepSeek on H200, TensorRT-LLM: TPOT 13.82 and 13.81 ms at 4 requests). So there are n ranks, with experts whole:
      n attention groups where attention_dp_size is above 1, one group of n ranks where it is 1.
    * Those of vLLM have tp n, attention_dp n and n * n expert ranks. The launch scripts start them as
      --tensor-parallel-size n --enable-expert-parallel without data parallelism, and older exports of equal runs
      (MiniMax-M2.5 on B200, 16 requests: TPOT 13.65 and 13.62 ms) say tp n, experts n: one group of n ranks. Later
      scripts of MiniMax FP4 know attention groups too; the columns cannot tell, and they are read the same way.
    * Rows of Dynamo deployments leave attention_dp_size out; where concurrency is tp_size times batch_size and the
      experts are whole on each rank, there are tp_size attention groups of one rank.
batch_size    requests of one attention group: times attention_dp_size it is the concurrency, which is taken from
    `silicon_concurrency=` in silicon_data_source where that is given.
precision, gemm_quant_mode   see `formats`; missing is 16 bits.

The client. Rows from InferenceX (files named by a date, database dumps, and the two `*-gap-analysis.csv`, which hold
its traffic) use its client. The others (`.../aic-auto-gap-analysis/data/...`, and Dynamo's with `gtl_job_id=`) name
none. A loop of fixed lengths, as aiperf would send by default, keeps requests in step, so that their prompts meet again
and again. SGLang's rows show it (16 prompts of 1,024 tokens of a 32B model on four H100 take about 0.42 s of
arithmetic, TTFT is 0.41 to 0.53 s for every output length) and get fixed lengths. vLLM's show prompts that come one by
one (0.19 s where 16 prompts take 0.69 s together) and get InferenceX's client, as do TensorRT-LLM's, whose TTFT
rises with the output length and falls with concurrency, which no client known here does.

Speculative decoding is not a column, and some rows look like runs with it. DeepSeek-R1 FP8 on B200 (SGLang 0.5.9, tp 8,
one month) is there twice with TPOT apart by 23 % in the median; on H200 (TensorRT-LLM 1.1.0rc2) the rows with experts
whole (tp 8, moe_ep 8) take 8.6 ms and 494 ms to the first token where those exported with 64 ranks take 13.8 and 313.
Nothing in a row tells, so all are read alike.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from planner.validation.case import Case, Layout
from planner.validation.layouts.clients import RANGE_RATIO
from planner.validation.layouts.names import model_named
from planner.validation.layouts.rows import Row, Unmappable, each_row, measured, number, required, text, whole
from planner.validation.layouts.served import Point, Ranks, has_experts, served

COLUMNS = frozenset({"backend", "model_path", "system", "mode", "isl", "osl", "tp_size", "silicon_ttft_ms"})
_CONCURRENCY = re.compile(r"silicon_concurrency=(\d+)")


def accepts(columns: frozenset[str]) -> bool:
    """Whether a file with these columns has this layout."""
    return columns >= COLUMNS


def read(frame: pd.DataFrame, path: Path) -> Layout:
    """All rows of the file."""
    return each_row(frame, lambda index, row: text(row, "id") or f"{path.stem}:{index + 1}", labels, case)


def labels(row: Row) -> dict[str, str]:
    """What the row calls itself."""
    return {
        "system": text(row, "system"),
        "backend": text(row, "backend"),
        "version": text(row, "backend_version"),
        "model": text(row, "model_path"),
        "precision": text(row, "precision") or "bf16",
        "mode": text(row, "mode"),
        "source": source(row),
        "isl": text(row, "isl"),
        "osl": text(row, "osl"),
    }


def source(row: Row) -> str:
    """Who measured: inferencex, dynamo, or aiconfigurator."""
    told = text(row, "silicon_data_source")
    if "gtl_job_id=" in told:
        return "dynamo"
    return "aiconfigurator" if "aic-auto-gap-analysis" in told else "inferencex"


def case(identity: str, row: Row) -> Case:
    """The case of an aggregated row."""
    if text(row, "mode") != "agg":
        raise Unmappable("disaggregated pools are not simulated yet")
    model = model_named(text(row, "model_path"))
    assert model.profile is not None
    stated = _CONCURRENCY.search(text(row, "silicon_data_source"))
    concurrency = int(stated[1]) if stated else None
    ranks = _ranks(row, concurrency, has_experts(model.profile))
    if concurrency is None:
        concurrency = required(row, "batch_size") * (whole(row, "attention_dp_size") or 1)
    elif ranks.attention_dp == 1 and source(row) == "dynamo" and number(row, "batch_size") != concurrency:
        raise Unmappable("batch_size and concurrency disagree, and the number of replicas is not stated")
    point = Point(
        model=text(row, "model_path"),
        system=text(row, "system"),
        backend=text(row, "backend"),
        precision=text(row, "precision") or "bf16",
        version=text(row, "backend_version"),
        isl=required(row, "isl"),
        osl=required(row, "osl"),
        concurrency=concurrency,
        ranks=ranks,
        gemm=text(row, "gemm_quant_mode"),
        ratio=1.0 if (source(row), text(row, "backend")) == ("aiconfigurator", "sglang") else RANGE_RATIO,
    )
    return served(identity, point, measured(row, 1e-3, ttft="silicon_ttft_ms", tpot="silicon_tpot_ms"), labels(row))


def _ranks(row: Row, concurrency: int | None, moe: bool) -> Ranks:
    """The ranks of a row, read as the module says."""
    tp, pp = required(row, "tp_size"), whole(row, "pp_size") or 1
    groups = whole(row, "attention_dp_size") or 1
    if not moe:
        if groups > 1:
            raise Unmappable("attention groups of a dense model")
        return Ranks(tp, pp)
    expert_tp, ep = whole(row, "moe_tp_size") or 1, whole(row, "moe_ep_size") or 1
    exported = source(row) == "inferencex"
    if exported and expert_tp == ep > 1 and tp * groups == ep * ep:
        return Ranks(1 if groups > 1 else ep, pp, ep if groups > 1 else 1, ep)
    if exported and tp == groups > 1 and (expert_tp, ep) == (1, tp * tp):
        return Ranks(tp, pp, ep=tp)
    if tp * groups != expert_tp * ep:
        raise Unmappable("the ranks of attention and of the experts do not agree")
    batch = number(row, "batch_size")
    if source(row) == "dynamo" and groups == 1 and ep == tp and batch is not None and concurrency == tp * batch:
        return Ranks(1, pp, tp, ep)
    return Ranks(tp, pp, groups, ep, expert_tp)
