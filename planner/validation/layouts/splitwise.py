"""Splitwise's characterisation of Llama-2-70B and BLOOM-176B: one static batch of prompts on one DGX machine.

prompt_time   ms until all prompts are read, here the TTFT of every request of the batch
token_time    ms per token after it, here the TPOT
e2e_time      ms until the last token. In a part of the rows it is shorter than prompt_time + (token_size - 1) *
              token_time, since generation stopped at an end-of-sequence; it is taken where they agree within 5 %

16-bit weights, tensor parallelism within the machine. Source: splitwise-sim @8f99e7d (data/perf_model.csv), whose
authors measured with the vLLM of 2023; the engine profile of vLLM's V0 stands in for its host overheads.
Llama-2-70B with TP2 and 64 prompts is known to be bad (it is slower than the same on fewer prompts could explain).
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from planner.plan import Plan, Pool
from planner.validation.case import Case, Layout
from planner.validation.layouts.clients import all_at_once
from planner.validation.layouts.names import model_named, system_named
from planner.validation.layouts.rows import Row, Unmappable, each_row, measured, position, required, text
from planner.validation.layouts.served import Ranks, forbidden

COLUMNS = frozenset(
    {"model", "hardware", "prompt_size", "batch_size", "token_size", "prompt_time", "token_time", "tensor_parallel"}
)
ENGINE = "vllm-0.6"
#: Of e2e_time, relative to what prompt_time and token_time add up to.
TOLERANCE = 0.05


def accepts(columns: frozenset[str]) -> bool:
    """Whether a file with these columns has this layout."""
    return columns >= COLUMNS


def read(frame: pd.DataFrame, path: Path) -> Layout:
    """All rows of the file."""
    return each_row(frame, position(path), labels, case)


def labels(row: Row) -> dict[str, str]:
    """What the row calls itself."""
    return {
        "system": text(row, "hardware"),
        "backend": "vllm",
        "version": "2023",
        "model": text(row, "model"),
        "precision": "fp16",
        "mode": "static",
        "isl": text(row, "prompt_size"),
        "osl": text(row, "token_size"),
        "concurrency": text(row, "batch_size"),
    }


def case(identity: str, row: Row) -> Case:
    """The case of a row."""
    model, system = model_named(text(row, "model")), system_named(text(row, "hardware"))
    assert model.profile is not None
    tp, batch = required(row, "tensor_parallel"), required(row, "batch_size")
    prompt, tokens = required(row, "prompt_size"), required(row, "token_size")
    if (model.profile, tp, batch) == ("llama-2-70b", 2, 64):
        raise Unmappable("measurement known to be bad (Llama-2-70B on TP2 with 64 prompts)")
    problem = forbidden(model.profile, Ranks(tp))
    if problem:
        raise Unmappable(problem)
    pool = Pool(
        1,
        tp=tp,
        policy="static",
        max_seqs=batch,
        token_budget=max(batch * prompt, prompt + tokens),
        max_context_tokens=prompt + tokens,
    )
    known = {**labels(row), "layout": str(Ranks(tp)), "gpus": str(tp)}
    return Case(
        row=identity,
        labels=known,
        plan=Plan(model.profile, system.cluster, tp, (pool,), ENGINE),
        workload=all_at_once(prompt, tokens, batch),
        measured=_measured(row, tokens),
        choice=tuple(known[key] for key in ("system", "model", "isl", "osl", "concurrency")),
    )


def _measured(row: Row, tokens: int) -> dict[str, float]:
    found = measured(row, 1e-3, ttft="prompt_time", tpot="token_time", e2e="e2e_time")
    if "e2e" in found and {"ttft", "tpot"} <= set(found):
        whole_s = found["ttft"] + (tokens - 1) * found["tpot"]
        if abs(found["e2e"] / whole_s - 1) > TOLERANCE:
            del found["e2e"]
    return found
