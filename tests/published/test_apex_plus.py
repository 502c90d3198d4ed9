"""Measured serving of Llama-3.1-70B by vLLM 0.6.0 on eight H100: three ways to cut it, three traces, two rates.

The runs are those of APEX+ (microsoft/apex_plus @8769096, vllm/results, MIT licence): TP8, two replicas of TP4 and four
of TP2 behind a round-robin split. Pools and numbers of requests are those of planner.validation.layouts.apex_plus, with
97 % of the memory as in the launch scripts. Here all replicas of a plan are simulated together, under Poisson arrivals
with the mean lengths of the rows.

One number is fitted, the step overhead of the engine profile `vllm-0.6`, to one row: lmsys at 0.25/s on TP8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hwmodels.engine import load_engine
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from planner.catalogue import Catalogue
from planner.plan import Plan
from planner.validation.layouts.apex_plus import REQUESTS, SPLITS, pool, requests_in
from simulator.simulate import run
from simulator.workload import Fixed, Independent, Poisson, draw_requests

MEASURED = Path(__file__).resolve().parents[3] / "shared" / "reference" / "serving" / "apex_plus.csv"
pytestmark = pytest.mark.skipif(not MEASURED.exists(), reason=f"no reference data at {MEASURED.name}")

#: Tensor-parallel degree of the replicas.
PLANS = {plan: tp for plan, (_, tp) in SPLITS.items()}
CASES = [(trace, rate) for trace in REQUESTS for rate in (0.25, 0.5)]
FITTED_ON = ("lmsys", 0.25, "8TP")


@dataclass(frozen=True)
class Row:
    """A plan under a trace: tokens of `replicas` replicas, and what was measured, in seconds."""

    replicas: int
    prompt_tokens: float
    output_tokens: float
    ttft_s: float
    tpot_s: float


@cache
def measured() -> dict[tuple[str, float, str], Row]:
    """By trace, rate and plan, means over the replicas; rows of lone replicas are cumulative averages and left out."""
    rows = pd.read_csv(MEASURED).dropna(subset=["tpot_mean_s"])
    rows["plan"] = rows.parallelism.str.extract(r"^(8TP|2DP4TP|4DP2TP)(?:_\d)?$", expand=False)
    found = {}
    for (trace, rate, plan), group in rows.groupby(["workload", "arrival_rate_per_s", "plan"]):
        outputs = group.output_tokens_sum
        found[str(trace), float(str(rate)), str(plan)] = Row(
            replicas=len(group),
            prompt_tokens=float(group.prompt_tokens_sum.sum()),
            output_tokens=float(outputs.sum()),
            ttft_s=float(group.ttft_mean_s.mean()),
            tpot_s=float((group.tpot_mean_s * outputs).sum() / outputs.sum()),
        )
    return found


@cache
def catalogue(engine: str) -> Catalogue:
    memory = replace(load_engine(engine), memory_fraction=0.97)
    cluster = load_cluster("hgx-h100", 8)
    cluster = replace(cluster, device=cluster.device.of_engine(memory.kernels))
    return Catalogue(load_model("llama-3.1-70b"), cluster, memory)


@cache
def predicted(engine: str, trace: str, rate_per_s: float, plan: str) -> tuple[float, float]:
    """Mean TTFT and TPOT of a simulated run, in seconds."""
    row = measured()[trace, rate_per_s, plan]
    count = requests_in(trace, plan)
    share = row.replicas * PLANS[plan] / 8  # of the requests whose rows there are
    lengths = Independent(
        Fixed(round(row.prompt_tokens / share / count)), Fixed(round(row.output_tokens / share / count))
    )
    requests = draw_requests(np.random.default_rng(7), count, rate_per_s, Poisson(), lengths)
    deployment = catalogue(engine).deployment(Plan("llama-3.1-70b", "hgx-h100", 8, (pool(*SPLITS[plan]),), engine))
    log = run(deployment, requests)
    first, finish = np.array(log.first_token_s), np.array(log.finish_s)
    tpot_s = (finish - first) / (requests.output_tokens - 1)
    return float((first - requests.arrival_s).mean()), float(tpot_s.mean())


def test_step_overhead_is_what_the_fitted_row_asks_for() -> None:
    _, tpot_s = predicted("vllm-0.6", *FITTED_ON)
    assert tpot_s == pytest.approx(measured()[FITTED_ON].tpot_s, rel=0.01)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("trace", "rate_per_s"), CASES)
def test_time_per_output_token_within_20_percent(trace: str, rate_per_s: float, plan: str) -> None:
    _, tpot_s = predicted("vllm-0.6", trace, rate_per_s, plan)
    assert tpot_s == pytest.approx(measured()[trace, rate_per_s, plan].tpot_s, rel=0.2)


@pytest.mark.parametrize(("trace", "rate_per_s"), CASES)
def test_plans_rank_as_measured(trace: str, rate_per_s: float) -> None:
    """Every pair of plans in both metrics; TTFTs measured within 5 % of each other (TP8 and TP4 on lmsys) are ties."""
    for better, worse in (("8TP", "2DP4TP"), ("2DP4TP", "4DP2TP"), ("8TP", "4DP2TP")):
        seen = [measured()[trace, rate_per_s, plan] for plan in (better, worse)]
        told = [predicted("vllm-0.6", trace, rate_per_s, plan) for plan in (better, worse)]
        assert seen[0].tpot_s < seen[1].tpot_s
        assert told[0][1] < told[1][1]
        if abs(seen[0].ttft_s / seen[1].ttft_s - 1) > 0.05:
            assert (told[0][0] < told[1][0]) == (seen[0].ttft_s < seen[1].ttft_s), (better, worse)


def test_long_prompts_first_token_within_30_percent() -> None:
    """Summarization (2,757 prompt tokens) is the trace whose TTFT is device time rather than host time."""
    for rate_per_s in (0.25, 0.5):
        for plan in PLANS:
            ttft_s, _ = predicted("vllm-0.6", "summarization", rate_per_s, plan)
            assert ttft_s == pytest.approx(measured()["summarization", rate_per_s, plan].ttft_s, rel=0.3)
