"""Plans under recorded routing: uniform counts change little, uneven ones cost time, and a placement wins some back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.busiest import busiest_rank
from hwmodels.huggingface import load_model
from hwmodels.kernels.estimate import Estimate
from hwmodels.kernels.expert_routing import load
from hwmodels.kernels.measured import ROUTING, MeasuredCost
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Communication, ExpertExchange, Experts, expert_feed_forward
from hwmodels.roofline import AnalyticCost
from hwmodels.routedcost import RoutedCost, typical_layers
from hwmodels.routing import RoutingError, RoutingStats, uniform
from planner import Question
from planner.catalogue import Catalogue, mapping_of, open_catalogue, precision_of
from planner.errors import PlanError
from planner.explain import explain
from planner.families import _Comparison
from planner.placement import Placement, Problem
from planner.placementbaselines import contiguous, eplb, greedy
from planner.placementfiles import filled, slot_maps
from planner.plan import Pool
from planner.routedranks import ExpertMap, in_order, shares_of_ranks
from planner.search import Search
from simulator.limits import Limit
from simulator.routingdraws import synthesize
from simulator.workload import load_profile
from simulator.workload import synthesize as traffic
from ui.cli import main

MIXTRAL = "mixtral-8x7b"
DEEPSEEK = Pool(1, attention_dp=32, ep=32, weights="fp8", activations="fp8", max_seqs=256)


def opened(routing: RoutingStats | None = None) -> Catalogue:
    return open_catalogue(MIXTRAL, "h100-sxm", 8, "vllm", routing=routing)


def uneven(model: str, skew: float, seed: int = 0) -> RoutingStats:
    """Uniform routing of the model with made-up loads of that skew."""
    even = uniform(load_model(model))
    drawn = synthesize(np.random.default_rng(seed), len(even.layers), even.experts, even.top_k, skew, 1, 0.0)
    return replace(even, loads=drawn.loads, source=drawn.source)


def steps(catalogue: Catalogue, pool: Pool, batch: int, prompt: int) -> tuple[float, float]:
    """(seconds of a decode step, of a prompt step) with the same in every attention group."""
    model = catalogue.step_model(mapping_of(pool), precision_of(pool))
    if pool.attention_dp == 1:
        return model.step_s(batch, batch * 1000, ()), model.step_s(0, 0, ((prompt, 0),))
    groups = pool.attention_dp
    return model.lockstep_s([(batch, batch * 1000, ())] * groups), model.lockstep_s([(0, 0, ((prompt, 0),))] * groups)


@pytest.mark.parametrize("ep", [2, 4, 8])
def test_uniform_counts_price_steps_as_chance_alone_does(ep: int) -> None:
    pool = Pool(1, tp=8, ep=ep, expert_tp=8 // ep)
    plain, routed = opened(), opened(uniform(load_model(MIXTRAL)))
    for batch in (16, 64, 256):
        assert steps(routed, pool, batch, 2048) == pytest.approx(steps(plain, pool, batch, 2048), rel=0.02)
    for batch in (1, 2, 4, 8):  # where operators over-estimate the busiest rank, as they say
        before, after = steps(plain, pool, batch, 2048)[0], steps(routed, pool, batch, 2048)[0]
        assert 0.8 * before < after <= before


@pytest.mark.parametrize(("ep", "rows"), [(2, 1 + 3 / 7), (4, 1 + 1 / 7), (8, 1.0)])
def test_one_tokens_busiest_rank_is_counted_within_five_percent(ep: int, rows: float) -> None:
    """Two of eight experts: both on one rank in 3 of 7 cases with four experts a rank, 1 of 7 with two."""
    mapping = Mapping(tp=8, ep=ep, expert_tp=8 // ep)
    cost = opened(uniform(load_model(MIXTRAL))).prices(mapping)
    assert isinstance(cost, RoutedCost)
    kernel = cost.routed(next(op for op in experts_of(mapping, np.ones(1)) if isinstance(op, Experts)))
    assert isinstance(kernel, Experts) and kernel.rows[0] == pytest.approx(rows, rel=0.05)


def test_uniform_counts_price_a_large_replica_as_chance_alone_does() -> None:
    model = load_model("deepseek-v3")
    plain, routed = (
        open_catalogue("deepseek-v3", "h100-sxm", 32, "sglang", routing=stats) for stats in (None, uniform(model))
    )
    for batch in (1, 8, 32, 128):
        assert steps(routed, DEEPSEEK, batch, 2048) == pytest.approx(steps(plain, DEEPSEEK, batch, 2048), rel=0.05)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from((2, 4, 8)), st.floats(0.2, 1.2), st.integers(0, 2**31))
def test_uneven_experts_are_never_quicker_where_all_are_busy(ep: int, skew: float, seed: int) -> None:
    """With few tokens they can be: popular experts together touch fewer, whose weights are less to read."""
    pool, stats = Pool(1, tp=8, ep=ep, expert_tp=8 // ep), uneven(MIXTRAL, skew, seed)
    even, skewed = (steps(opened(s), pool, 1024, 4096) for s in (uniform(load_model(MIXTRAL)), stats))
    assert skewed[0] >= even[0] and skewed[1] > even[1]


@pytest.mark.parametrize("pack", [greedy, eplb])
def test_a_placement_takes_time_off_an_uneven_step(pack) -> None:
    stats = uneven("deepseek-v3", 0.8)
    spare = 32 if pack is eplb else 0

    def map_of(placement: Placement, problem: Problem) -> ExpertMap:
        return ExpertMap(slot_maps(problem, filled(problem, placement.holds)), stats.experts)

    plain, more = (Problem(stats.loads, None, 32, 8 + extra // 32, extra, tokens=1.0) for extra in (0, spare))
    maps = {"ordered": map_of(contiguous(plain), plain), "packed": map_of(pack(more), more)}
    catalogue = open_catalogue("deepseek-v3", "h100-sxm", 32, "sglang", routing=stats, maps=maps)
    nothing, ordered, packed = (
        steps(catalogue, replace(DEEPSEEK, expert_map=name, redundant_experts=redundant), 128, 4096)
        for name, redundant in ((None, 0), ("ordered", 0), ("packed", spare))
    )
    assert ordered == pytest.approx(nothing)
    assert packed[0] < nothing[0] and packed[1] < 0.9 * nothing[1]


def test_prices_are_the_plain_ones_without_expert_ranks() -> None:
    catalogue = opened(uneven(MIXTRAL, 0.5))
    assert isinstance(catalogue.prices(Mapping(tp=4, expert_tp=4)), AnalyticCost)
    assert isinstance(catalogue.prices(Mapping(tp=4, ep=4)), RoutedCost)


def experts_of(mapping: Mapping, tokens: np.ndarray) -> list:
    model = load_model(MIXTRAL)
    block = model.layers[0].feed_forward
    return expert_feed_forward(model, block, tokens / mapping.attention_dp, tokens, mapping, Precision(), 1)


def test_rows_touched_experts_and_gathered_bytes_are_those_of_the_busiest_rank() -> None:
    stats, mapping = uneven(MIXTRAL, 0.6), Mapping(tp=2, attention_dp=4, ep=4, expert_tp=2)
    cost = opened(stats).prices(mapping)
    assert isinstance(cost, RoutedCost)
    table = busiest_rank(stats, shares_of_ranks(in_order(32, 8), 4))
    tokens = np.array([0.0, 1.0, 3.0, 64.0, 100.0, 1e4, 2.0**17])
    found = experts_of(mapping, tokens)
    kernel = next(op for op in found if isinstance(op, Experts))
    routed = cost.routed(kernel)
    assert isinstance(routed, Experts)
    wanted = [np.mean([table.at(n)[0] for n in tokens], axis=1), np.mean([table.at(n)[1] for n in tokens], axis=1)]
    assert routed.rows == pytest.approx(wanted[0])
    assert routed.active == pytest.approx(np.minimum(wanted[1], wanted[0]))
    assert (routed.active <= stats.experts / 4 + 1e-9).all() and routed.rows[0] == 0
    assert (routed.rows >= tokens * 2 / 4 - 1e-9).all() and (routed.rows <= tokens * 2 + 1e-9).all()
    gathers = [op for op in found if isinstance(op, Communication) and op.group == "expert_tp"]
    assert len(gathers) == 2
    for op in gathers:
        assert cost.routed(op).bytes[1:] == pytest.approx(op.bytes[1:] * routed.rows[1:] / kernel.rows[1:])
    exchanges = [op for op in found if isinstance(op, ExpertExchange)]
    assert [op.phase for op in exchanges] == ["dispatch", "combine"]
    for op in exchanges:
        assert (cost.time_s(op)[1:] >= cost.inner.time_s(op)[1:]).all()
        assert cost.time_s(op)[-1] > 1.05 * cost.inner.time_s(op)[-1]
    for op in found:
        if op is not kernel and op not in gathers and op not in exchanges:
            assert cost.routed(op) is op
            assert cost.time_s(op) == pytest.approx(cost.inner.time_s(op))


def test_exchanges_of_even_routing_take_as_long_as_without_statistics() -> None:
    stats, mapping = uniform(load_model(MIXTRAL)), Mapping(attention_dp=8, ep=8)
    cost = opened(stats).prices(mapping)
    assert isinstance(cost, RoutedCost)
    for op in experts_of(mapping, np.array([8.0, 512.0, 1e5])):
        if isinstance(op, ExpertExchange):
            # Shares draw choices independently: a token meets an eighth of its second choices on the first's rank.
            assert cost.time_s(op) == pytest.approx(cost.inner.time_s(op), rel=0.1)


@pytest.mark.parametrize(("layers", "kept"), [(3, 3), (8, 8), (58, 8)])
def test_a_few_layers_stand_for_all_in_exchanges(layers: int, kept: int) -> None:
    shares = np.random.default_rng(1).dirichlet(np.ones(4), layers)
    typical = typical_layers(shares)
    assert len(typical) == kept and {tuple(row) for row in typical} <= {tuple(row) for row in shares}
    assert typical.max(axis=1).mean() == pytest.approx(shares.max(axis=1).mean(), rel=0.05)


def test_measured_kernels_are_scaled_from_the_routing_they_were_timed_under() -> None:
    stats, mapping = uneven(MIXTRAL, 0.6), Mapping(tp=4, ep=4)
    cluster = opened().cluster
    moe = SimpleNamespace(time_s=lambda dtype, tokens, *a, **k: Estimate(1e-6 * tokens, np.ones_like(tokens)))
    plain = MeasuredCost(cluster, mapping, SimpleNamespace(moe=moe, gemm=None, collective=None))  # type: ignore[arg-type]
    cost = RoutedCost(plain, busiest_rank(stats, shares_of_ranks(in_order(32, 8), 4)))
    kernel = next(op for op in experts_of(mapping, np.array([4.0, 512.0, 8192.0])) if isinstance(op, Experts))
    timed = load(kernel.tokens, 8, 2, 4, ROUTING)
    analytic = AnalyticCost(cluster, mapping)
    ratio = analytic.time_s(cost.routed(kernel)) / analytic.time_s(
        replace(kernel, rows=timed.rows, active=timed.touched)
    )
    assert cost.time_s(kernel) == pytest.approx(plain.time_s(kernel) * ratio)
    assert cost.sources(kernel) == {"extended": pytest.approx(float(cost.time_s(kernel).sum()))}
    nothing = RoutedCost(MeasuredCost(cluster, mapping, SimpleNamespace(moe=None)), cost.busiest)  # type: ignore[arg-type]
    assert nothing.time_s(kernel) == pytest.approx(analytic.time_s(cost.routed(kernel)))


def test_an_explained_step_adds_up_and_counts_the_busiest_ranks_work() -> None:
    pool = Pool(1, tp=4, ep=4)
    plain, routed = (
        explain(opened(stats), pool, batch=256, context=1000, prefill=2048) for stats in (None, uneven(MIXTRAL, 0.6))
    )
    for step, before in zip(routed.steps, plain.steps, strict=True):
        assert step.time_s == pytest.approx(step.step_model_s, rel=0.03)
        work, was = (next(r.flops for r in s.rows if r.kind == "experts") for s in (step, before))
        assert work > was


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"logical_count": (1000 * uneven(MIXTRAL, 0.6).shares).tolist()}))
    return file


def test_searches_price_by_the_file_of_the_question(recording: Path) -> None:
    requests = traffic(load_profile("short-questions"), 20, seed=0)
    question = Question(
        MIXTRAL, "h100-sxm", 4, requests, limits=(Limit("ttft", "p99", 5.0),), routing=str(recording), jobs=1
    )
    for catalogue in (Search(question, lambda *_: None).catalogue, _Comparison(question, lambda *_: None).catalogue):
        assert catalogue.routing is not None and catalogue.routing.source == "counts.json"
    mixed = open_catalogue(MIXTRAL, "h100-sxm", 4, "vllm", also={"a100-80-sxm": 4}, routing=str(recording))
    assert mixed.others["a100-80-sxm"].routing is mixed.routing is not None


def test_routing_of_another_model_is_refused(recording: Path) -> None:
    with pytest.raises(RoutingError, match=r"llama-3\.2-1b is dense"):
        open_catalogue("llama-3.2-1b", "h100-sxm", 1, "vllm", routing=str(recording))
    with pytest.raises(RoutingError, match="choose the model recorded"):
        open_catalogue("deepseek-v3", "h100-sxm", 8, "vllm", routing=str(recording))
    with pytest.raises(RoutingError, match="no routing is given"):
        opened(replace(uniform(load_model(MIXTRAL)), layers=(0,), loads=np.ones((1, 8))))
    with pytest.raises(RoutingError, match="there is no such file"):
        open_catalogue(MIXTRAL, "h100-sxm", 8, "vllm", routing="nowhere.json")


def test_a_map_of_other_experts_is_refused() -> None:
    maps = {"few": in_order(32, 4), "short": in_order(31, 8), "more": in_order(32, 8, 4)}
    catalogue = open_catalogue(MIXTRAL, "h100-sxm", 8, "vllm", maps=maps)
    for name, told in (
        ("few", "32 layers of 4 experts; expected 32 layers of 8"),
        ("short", "31 layers of 8 experts; expected 32 layers of 8"),
        ("more", "12 slots a layer; expected 8 .*; set redundant_experts to 4"),
        ("none", "no such map is known"),
    ):
        with pytest.raises(PlanError, match=f"expert_map '{name}': {told}"):
            catalogue.prices(Mapping(tp=4, ep=4, expert_map=name))


def test_commands_say_which_routing_they_go_by(recording: Path, tmp_path: Path, capsys) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"model: {MIXTRAL}\nhardware: h100-sxm\ngpus: 4\nengine: vllm\nrouter: round-robin\n"
        "pools:\n- replicas: 1\n  tp: 4\n  ep: 4\n"
    )
    times = []
    for words in ([], ["--routing", str(recording)]):
        assert main(["explain", str(plan), "--batch", "256", "--json", *words]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content.get("routing") == ("counts.json" if words else None)
        times.append([step["time_s"] for step in content["pools"][0]["steps"]])
    assert all(after > before for before, after in zip(*times, strict=True))
    asked = ["simulate", str(plan), "--workload", "short-questions", "--requests", "20"]
    assert main([*asked, "--routing", str(recording)]) == 0
    assert "Routing: counts.json.\n" in capsys.readouterr().out
    assert main(asked) == 0
    assert "Routing" not in capsys.readouterr().out
    plan.write_text(plan.read_text().replace("  ep: 4", "  expert_tp: 4"))
    assert main([*asked, "--routing", str(recording)]) == 0
    assert "of no effect where no replica spreads experts" in " ".join(capsys.readouterr().out.split())
