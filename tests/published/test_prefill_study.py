"""Published orders of prefill schedulers, reproduced in the simulator on a dense model and a mixture of experts (V24).

One H100 under the profile vllm; the lengths and bursts of Azure's code trace, the lengths of its conversations, and
prompts of 500 to 8000 tokens; loads of about 60 % of what Sarathi-Serve serves with a p99 TBT of 100 ms.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from planner.catalogue import open_catalogue
from planner.plan import Pool
from planner.prefillcontenders import Ways
from planner.prefilllinear import Ranges, TableClock, linearise
from planner.prefillstudy import STALL_FREE, Outcome, Study, study
from planner.recedingreplicas import receding_spec
from planner.recedingscheduler import Receding
from simulator.deployment import Deployment
from simulator.distribution import achieved_weighted
from simulator.itl import itl
from simulator.limits import parse_limit
from simulator.simulate import simulate
from simulator.workload import Requests, load_profile, synthesize

DENSE, EXPERTS = "qwen3-8b", "qwen3-30b-a3b"
LOADS = {
    (DENSE, "code"): 11.0, (DENSE, "conversation"): 15.0, (DENSE, "long"): 3.7,
    (EXPERTS, "code"): 8.8, (EXPERTS, "conversation"): 11.0, (EXPERTS, "long"): 2.4,
}  # fmt: skip
CASES = list(LOADS)
BUDGETS = (512, 1024, 2048, 8192)
#: The program with chunks only, at the limit only.
ALONE: dict[str, Any] = {"kinds": ("receding",), "wider_limits": ()}


def requests_of(traffic: str) -> Requests:
    """Two hundred of short ones, else 120."""
    if traffic == "long":
        rng, n = np.random.default_rng(0), 120
        return Requests(np.cumsum(rng.exponential(1.0, n)), rng.integers(500, 8000, n), rng.integers(50, 250, n))
    return synthesize(load_profile(f"azure-{traffic}-2023"), 120 if traffic == "code" else 200, seed=0)


@cache
def found(model: str, traffic: str) -> Study:
    """The study, with decisions of 3 ms."""
    catalogue = open_catalogue(model, "h100-sxm", 1, "vllm")
    limit = parse_limit("itl", "p99=100ms")
    ways = Ways(budgets=BUDGETS, chunks=(512,))
    load = LOADS[model, traffic]
    return study(catalogue, Pool(1, max_seqs=128), requests_of(traffic), limit, (load,), ways, decision_s=3e-3, **ALONE)


def outcomes(model: str, traffic: str) -> dict[str, Outcome]:
    return {o.name: o for o in found(model, traffic).loads[0].outcomes}


@pytest.mark.parametrize(("model", "traffic"), CASES)
def test_a_budget_trades_the_time_between_tokens_for_the_first_one(model: str, traffic: str) -> None:
    """Sarathi-Serve: a smaller budget has shorter gaps and later first tokens, in the order of the budgets."""
    told = outcomes(model, traffic)
    served = [told[f"sarathi-serve {budget}"] for budget in BUDGETS]
    assert [o.tbt_p99_s for o in served] == sorted(o.tbt_p99_s for o in served)
    assert [o.ttft_mean_s for o in served] == sorted((o.ttft_mean_s for o in served), reverse=True)


@pytest.mark.parametrize(("model", "traffic"), CASES)
def test_whole_prompts_stall_decodes_that_chunks_do_not(model: str, traffic: str) -> None:
    """Sarathi-Serve, section 5: the tail of vLLM's and Orca's gaps is far above that of stall-free batches, whose first
    tokens come later; prompts that go first stall decodes the longest."""
    told = outcomes(model, traffic)
    orca, first, chunk = told["orca"], told["prefill-first"], told["sarathi-serve 512"]
    assert orca.tbt_p99_s > 2 * chunk.tbt_p99_s
    assert first.tbt_p99_s > orca.tbt_p99_s
    assert first.tbt_max_s > 2 * orca.tbt_max_s
    assert max(orca.ttft_mean_s, first.ttft_mean_s) < chunk.ttft_mean_s


@pytest.mark.parametrize(("model", "traffic"), CASES)
def test_a_fixed_chunk_beside_the_decodes_is_near_a_budget_of_as_many_tokens(model: str, traffic: str) -> None:
    """SARATHI's chunk leaves decodes out of the count, so that its steps are a little longer."""
    told = outcomes(model, traffic)
    chunk, budget = told["sarathi 512"], told["sarathi-serve 512"]
    assert budget.tbt_p99_s <= chunk.tbt_p99_s < 1.15 * budget.tbt_p99_s


@pytest.mark.parametrize("traffic", ["code", "long"])
def test_layer_groups_beat_chunks_on_experts_and_lose_on_a_dense_model(traffic: str) -> None:
    """Layered Prefill (arXiv:2510.08055): with experts, chunks of 512 tokens load nearly all experts again for each;
    groups of layers load them once a prompt, so that both TTFT and TBT are shorter. On a dense model both are longer.
    """
    sparse, dense = outcomes(EXPERTS, traffic), outcomes(DENSE, traffic)
    for told, better in ((sparse, True), (dense, False)):
        layered, chunk = told["layered by rule"], told["sarathi-serve 512"]
        assert (layered.ttft_mean_s < chunk.ttft_mean_s) is better
        assert (layered.tbt_p99_s < chunk.tbt_p99_s) is better


def test_short_prompts_leave_layer_groups_less_to_save() -> None:
    """On conversations with experts, their first tokens come sooner than those of chunks, by less than with long
    prompts, and their gaps are a few percent longer."""
    ratios = {}
    for traffic in ("conversation", "long"):
        told = outcomes(EXPERTS, traffic)
        ratios[traffic] = told["layered by rule"].ttft_mean_s / told["sarathi-serve 512"].ttft_mean_s
    assert ratios["long"] < ratios["conversation"] < 1


@pytest.mark.parametrize(("model", "traffic"), CASES)
def test_orders_help_the_mean_and_nothing_undercuts_the_bound(model: str, traffic: str) -> None:
    """Where prompts queue, the shortest first has the lesser mean TTFT, and every mean is above the bound."""
    told = outcomes(model, traffic)
    for budget in BUDGETS[:3]:
        assert told[f"shortest {budget}"].ttft_mean_s < told[f"sarathi-serve {budget}"].ttft_mean_s
    load = found(model, traffic).loads[0]
    assert load.bound_s is not None
    assert all(load.bound_s <= o.ttft_mean_s for o in load.outcomes)
    window = found(model, traffic).window
    assert window is not None
    assert all(s.bound.ttft_s <= s.ttft_s for s in window.standings)


@pytest.mark.parametrize(("model", "traffic"), CASES)
def test_the_program_keeps_the_limit_where_whole_prompts_break_it(model: str, traffic: str) -> None:
    """Its mean TTFT is below that of every budget and chunk, first come first served, that keeps the limit."""
    told = outcomes(model, traffic)
    program = told["receding"]
    assert program.keeps and program.tbt_max_s <= 0.1 * (1 + 1e-9)
    assert not told["orca"].keeps
    fixed = [o for o in told.values() if o.keeps and o.family in ("sarathi", "sarathi-serve", "layered")]
    assert program.ttft_mean_s < min(o.ttft_mean_s for o in fixed)


def test_at_equal_gaps_the_program_on_layers_beats_layered_prefill() -> None:
    """On experts, with the lengths of code: as many groups as the limit asks for, and the shortest prompts together."""
    catalogue, requests = open_catalogue(EXPERTS, "h100-sxm", 1, "vllm"), requests_of("code").scaled_to_rate(8.8)
    longest = requests.max_context_tokens
    catalogue.reserve(longest + 129, 256)
    pool = Pool(1, max_seqs=128, token_budget=longest + 129, max_context_tokens=longest)
    layered = catalogue.replica(replace(pool, policy="layered"))
    theirs = simulate(Deployment([layered]), requests)
    tbt_s = achieved_weighted(*itl(theirs), "p99")
    linear = linearise(TableClock(layered.model, len(catalogue.model.layers)), Ranges(decodes=(4, 64))).step
    rule = Receding(linear, tbt_s, axis="layers", decision_s=3e-3)
    ours = simulate(Deployment([receding_spec(catalogue.replica(pool), rule)]), requests)
    assert itl(ours)[0].max() <= tbt_s * (1 + 1e-9)
    assert ours.requests.ttft_s.mean() < 0.75 * theirs.requests.ttft_s.mean()


def test_at_equal_gaps_the_program_beats_fixed_budgets_on_long_contexts() -> None:
    """Mooncake's conversations, up to 110,000 tokens: a step of fixed budget grows with what prompts attend to, one
    that is filled up to the limit does not; with decisions of 3 ms, and the p99 TBT of the best budget as its limit,
    the program has less than two thirds of its mean TTFT."""
    catalogue = open_catalogue(DENSE, "h100-sxm", 1, "vllm")
    requests = synthesize(load_profile("mooncake-conversation"), 120, seed=0)
    limit = parse_limit("itl", "p99=80ms")
    ways = Ways(budgets=(512, 1024), chunks=(512,))
    told = study(catalogue, Pool(1, max_seqs=128), requests, limit, (0.5,), ways, decision_s=3e-3, **ALONE)
    rival = told.loads[0].best(STALL_FREE)
    assert rival is not None and told.equal is not None
    assert told.equal.tbt_p99_s <= rival.tbt_p99_s * (1 + 1e-9)
    assert told.equal.ttft_mean_s < 2 / 3 * rival.ttft_mean_s
