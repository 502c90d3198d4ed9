"""Ways of serving in one answer: pools sized and simulated, several kinds of devices, budgets, crossovers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner import Question, search
from planner.catalogue import open_catalogue
from planner.crossover import crossover
from planner.errors import NoFeasiblePlanError, PlanError
from planner.plan import Plan, Pool
from planner.planfile import check_plan, read_plan, write_plan
from planner.space import Choices
from simulator.limits import parse_limit
from simulator.simulate import simulate
from simulator.transfers import TransferError
from simulator.workload import load_profile, synthesize

LIMITS = (parse_limit("ttft", "p99=2s"), parse_limit("tpot", "p99=30ms"))
FEW = Choices(policies=("chunked",), token_budgets=(2048,), max_seqs=(256,))


def question(**changes: object) -> Question:
    requests = synthesize(load_profile("azure-conversation-2023"), 1500)
    asked = Question("llama-3.1-8b", "h100-sxm", 4, requests, limits=LIMITS, choices=FEW, seconds=2.0, jobs=1)
    return replace(asked, **changes)  # type: ignore[arg-type]


def test_disaggregated_pools_are_sized_simulated_and_near_what_was_predicted() -> None:
    result = search(question(serving="disaggregated"))
    best = result.best
    assert best.plan.disaggregated
    check_plan(best.plan)
    assert best.plan.gpus_used <= 4
    roles = {pool.role for pool in best.plan.pools}
    assert roles == {"prefill", "decode"}
    (family,) = result.families
    assert family.name == "disaggregated"
    assert family.gap is not None
    assert family.gap <= 1e-3
    assert family.predicted_per_s == pytest.approx(best.trial.rate_per_s, rel=0.25)
    assert all(value <= limit.seconds for value, limit in zip(best.trial.values_s, LIMITS, strict=True))
    assert result.crossover is None


def test_any_has_both_ways_in_one_ranking_and_their_rates_side_by_side() -> None:
    result = search(question(serving="any"))
    names = [family.name for family in result.families if family.best is not None]
    assert {"aggregated", "disaggregated"} <= set(names)
    values = [ranked.value for ranked in result.ranked]
    assert values == sorted(values, reverse=True)
    assert result.families[0].best is not None
    assert result.best.value == pytest.approx(result.families[0].best.value)
    found = result.crossover
    assert found is not None
    rates = [strain.rate_per_s for strain in found.first]
    assert rates == sorted(rates)
    assert rates == [strain.rate_per_s for strain in found.second]


def test_two_kinds_of_devices_serve_together() -> None:
    result = search(question(serving="any", gpus=2, also={"a100-80-sxm": 2}))
    used = {result.best.plan.hardware_of(pool) for pool in result.best.plan.pools}
    assert used <= {"h100-sxm", "a100-80-sxm"}
    alone = search(question(serving="aggregated", gpus=2))
    assert (result.best.capacity_per_s or 0) > 1.05 * (alone.best.capacity_per_s or 0)


def test_a_budget_buys_fewer_devices_or_says_what_one_costs() -> None:
    price = open_catalogue("llama-3.1-8b", "h100-sxm", 1, "vllm").cluster.device.price_usd_per_h
    assert price is not None
    result = search(question(budget_usd_per_h=2.5 * price))
    assert result.best.plan.gpus_used <= 2
    with pytest.raises(NoFeasiblePlanError, match=f"1 x h100-sxm, takes {price:g} USD/h"):
        search(question(budget_usd_per_h=0.5 * price))
    with pytest.raises(NoFeasiblePlanError, match=r"kW"):
        search(question(budget_w=100.0))
    pools = search(question(serving="disaggregated", budget_usd_per_h=3.5 * price))
    assert pools.best.plan.gpus_used <= 3
    with pytest.raises(NoFeasiblePlanError, match=r"USD"):
        search(question(serving="disaggregated", budget_usd_per_h=1.5 * price))


def test_the_cheapest_pools_for_a_rate_keep_the_limits_at_it() -> None:
    result = search(question(serving="disaggregated", objective="fewest-gpus", rate_per_s=6.0))
    best = result.best
    assert best.value == best.plan.gpus_used
    assert best.trial.rate_per_s == pytest.approx(6.0)
    assert all(value <= limit.seconds for value, limit in zip(best.trial.values_s, LIMITS, strict=True))


def test_crossings_are_where_the_less_strained_plan_changes() -> None:
    """One large replica answers sooner while there is little to do; small ones have more room."""
    catalogue = open_catalogue("llama-3.1-8b", "h100-sxm", 4, "vllm")
    requests = synthesize(load_profile("azure-conversation-2023"), 1200)
    large = catalogue.deployment(Plan("llama-3.1-8b", "h100-sxm", 4, (Pool(1, tp=4),)))
    small = catalogue.deployment(Plan("llama-3.1-8b", "h100-sxm", 4, (Pool(4),)))
    found = crossover(large, small, requests, LIMITS, 60.0, 0)
    ahead = [b.worst < a.worst for a, b in zip(found.first, found.second, strict=True)]
    assert (ahead[0], ahead[-1]) == (False, True)
    ((rate, second_ahead),) = found.crossings
    assert second_ahead
    before = max(strain.rate_per_s for strain, over in zip(found.first, ahead, strict=True) if not over)
    after = min(strain.rate_per_s for strain, over in zip(found.first, ahead, strict=True) if over)
    assert before < rate < after
    same = crossover(small, small, requests, LIMITS, 40.0, 0)
    assert same.crossings == ()


def test_plans_with_roles_read_as_they_were_written(tmp_path: object) -> None:
    pools = (Pool(1, tp=2, role="prefill"), Pool(1, tp=2, role="decode", hardware="a100-80-sxm"))
    plan = Plan("llama-3.1-8b", "h100-sxm", 2, pools, also={"a100-80-sxm": 2}, transfer="serialized")
    path = f"{tmp_path}/plan.yaml"
    write_plan(plan, path)
    assert read_plan(path) == plan


@pytest.mark.parametrize(
    ("pools", "also", "told"),
    [
        ((Pool(1, role="prefill"),), {}, "role prefill but none has decode or mixed"),
        ((Pool(1, role="prefill"), Pool(1, role="decode", hardware="a100-80-sxm")), {}, "hardware is 'a100-80-sxm'"),
        ((Pool(5, role="mixed"),), {}, "gpus is 4, expected at least the 5"),
        ((Pool(1),), {"a100-80-sxm": 0}, r"also\['a100-80-sxm'\] is 0"),
    ],
)
def test_pools_that_cannot_be_are_refused(pools: tuple[Pool, ...], also: dict[str, int], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        check_plan(Plan("llama-3.1-8b", "h100-sxm", 4, pools, also=also))


def test_pools_that_cannot_exchange_kv_are_told_before_anything_runs() -> None:
    catalogue = open_catalogue("llama-3.1-8b", "h100-sxm", 2, "vllm")
    blocks = (Pool(1, role="prefill", block_tokens=16), Pool(1, role="decode", block_tokens=32))
    with pytest.raises(TransferError, match=r"KV blocks of 16 tokens and .* of 32: expected one size"):
        catalogue.deployment(Plan("llama-3.1-8b", "h100-sxm", 2, blocks))
    formats = (Pool(1, role="prefill", kv="fp8"), Pool(1, role="decode"))
    with pytest.raises(TransferError, match=r"keeps KV in fp8 and .* in bf16: expected one format"):
        catalogue.deployment(Plan("llama-3.1-8b", "h100-sxm", 2, formats))
    apart = open_catalogue("llama-3.2-1b", "h100-sxm", 1, "vllm", also={"tpu-v5e": 1})
    assert apart.others["tpu-v5e"].cluster.inter is None
    pools = (Pool(1, role="prefill"), Pool(1, role="decode", hardware="tpu-v5e"))
    with pytest.raises(TransferError, match="no path"):
        apart.deployment(Plan("llama-3.2-1b", "h100-sxm", 1, pools, also={"tpu-v5e": 1}))


def test_transfers_are_seen_in_the_result() -> None:
    catalogue = open_catalogue("llama-3.1-8b", "h100-sxm", 2, "vllm")
    pools = (Pool(1, role="prefill"), Pool(1, role="decode"))
    requests = synthesize(load_profile("azure-conversation-2023"), 300, rate_per_s=4.0)
    result = simulate(catalogue.deployment(Plan("llama-3.1-8b", "h100-sxm", 2, pools)), requests)
    sent = result.transfers
    assert len(sent) == (requests.output_tokens > 1).sum()
    # 32 layers x 8 heads x 128 x 2 x 2 bytes
    assert np.allclose(sent.nbytes, requests.prompt_tokens[sent.request] * 131072)
    assert (result.links.carried_bytes <= result.links.bytes_per_s * result.totals.makespan_s).all()


def test_energy_is_measured_alike_for_every_way_of_serving() -> None:
    result = search(question(serving="any", objective="energy", rate_per_s=6.0))
    assert {family.name for family in result.families if family.best is not None} == {
        "aggregated",
        "disaggregated",
        "shared",
    }
    for ranked in result.ranked:
        assert ranked.value == ranked.trial.joules_per_token
        assert 0.01 < ranked.value < 100
