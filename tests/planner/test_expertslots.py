"""Redundant experts cost memory and relieve the busiest rank; plans, searches and commands know where experts sit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.busiest import busiest_rank
from hwmodels.errors import MappingError
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision, weight_bytes
from hwmodels.memory import stage_weight_bytes
from hwmodels.operators import Experts, expected_active_experts, expected_active_slots, expert_feed_forward
from hwmodels.routing import RoutingStats, uniform
from hwmodels.shape import FeedForward, feed_forward_parameters
from hwmodels.work import Steps, Work
from planner.catalogue import Catalogue, law_broken, mapping_of, open_catalogue, precision_of
from planner.errors import PlanError
from planner.expertbalance import balances
from planner.placedexperts import placed
from planner.placementfiles import plan_with_maps
from planner.plan import Plan, Pool
from planner.planfile import check_plan, read_plan, write_plan
from planner.routedranks import in_order, shares_of_ranks
from planner.space import Choices, enumerate_pools, mappings
from simulator.routingdraws import synthesize
from ui.cli import main

MODEL = load_model("deepseek-v2-lite")
BLOCK = MODEL.layers[-1].feed_forward  # 64 experts, 6 a token


def uneven(model: str, skew: float = 0.8, seed: int = 0) -> RoutingStats:
    """Uniform routing of the model with made-up loads of that skew."""
    even = uniform(load_model(model))
    drawn = synthesize(np.random.default_rng(seed), len(even.layers), even.experts, even.top_k, skew, 1, 0.0)
    return replace(even, loads=drawn.loads, source=drawn.source)


def written(stats: RoutingStats, path: Path) -> Path:
    """The counts as a file; dense layers have rows of zeros."""
    rows = np.zeros((len(load_model(stats.model).layers), stats.experts))
    rows[list(stats.layers)] = 1000 * stats.shares
    path.write_text(json.dumps({"logical_count": rows.tolist()}))
    return path


# --- memory and operators ---------------------------------------------------------------------------------------------


@given(st.sampled_from((2, 4, 8)), st.integers(0, 3), st.sampled_from((1, 2)))
def test_each_redundant_expert_takes_its_weights_on_one_rank(ep: int, spare: int, expert_tp: int) -> None:
    cut = Mapping(tp=ep * expert_tp, ep=ep, expert_tp=expert_tp)
    precision = Precision("fp8", "fp8", "bf16", "int4")

    def of(mapping: Mapping) -> float:
        return stage_weight_bytes(MODEL, MODEL.layers, mapping, precision, first=True, last=True)

    expert = feed_forward_parameters(FeedForward(BLOCK.intermediate, BLOCK.gated, BLOCK.bias), MODEL.hidden)
    more = of(replace(cut, redundant_experts=spare * ep)) - of(cut)
    assert more == pytest.approx(26 * spare * expert * weight_bytes("int4") / expert_tp)


def test_expert_data_parallelism_is_every_expert_once_more() -> None:
    """64 redundant experts on 8 ranks hold what 4 ranks without any do, and touch and compute as much in the mean."""
    twice, half = Mapping(tp=8, ep=8, redundant_experts=64), Mapping(tp=8, ep=4, expert_tp=2)
    assert law_broken(MODEL, twice) is None
    precision = Precision()
    one, two = (
        stage_weight_bytes(MODEL, MODEL.layers, mapping, precision, first=True, last=True) for mapping in (half, twice)
    )
    experts = 64 * feed_forward_parameters(FeedForward(BLOCK.intermediate, BLOCK.gated, BLOCK.bias), MODEL.hidden)
    assert two - one == pytest.approx(26 * experts * 2.0 * (2 / 8 - 1 / 8))
    steps = Steps(*(np.array([float(v)]) for v in (1, 64, 64_000, 0, 0, 0)))
    plain = Mapping(tp=8, ep=8)
    flops = [Work(MODEL, m, precision, max_tokens=64, max_seqs=64).of(steps)[0] for m in (plain, twice)]
    assert flops[0] == flops[1]


@given(st.integers(1, 64), st.integers(0, 200), st.sampled_from((1.0, 4.0, 30.0, 1000.0)))
def test_slots_with_a_token_are_those_of_experts_where_none_is_redundant_and_more_with_copies(
    experts: int, redundant: int, tokens: float
) -> None:
    top_k, ranks, total = min(4, experts), 4, np.array([tokens])
    rows = total * top_k / ranks
    before = expected_active_slots(experts, rows, experts, top_k, total, ranks)
    assert before == pytest.approx(expected_active_experts(experts / ranks, rows, experts, top_k, total))
    after = expected_active_slots(experts + redundant, rows, experts, top_k, total, ranks)
    assert after >= before - 1e-9 and after <= min(float(rows[0]), (experts + redundant) / ranks) + 1e-9


def test_slots_with_a_token_are_counted_as_drawn() -> None:
    rng = np.random.default_rng(0)
    experts, slots, top_k, tokens, draws = 16, 21, 2, 12, 4000
    copies = np.where(np.arange(experts) < slots - experts, 2, 1)
    first = np.r_[0, np.cumsum(copies)[:-1]]
    touched = 0
    for _ in range(draws):
        chosen = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :top_k].ravel()
        touched += len(np.unique(first[chosen] + rng.integers(0, copies[chosen])))
    rows, total = np.array([tokens * top_k / 3]), np.array([float(tokens)])
    assert 3 * expected_active_slots(slots, rows, experts, top_k, total, 3) == pytest.approx(touched / draws, rel=0.01)


@pytest.mark.parametrize("redundant", [0, 8, 64])
def test_operators_of_even_routing_are_those_of_a_balanced_map(redundant: int) -> None:
    mapping, stats = Mapping(tp=8, ep=8, redundant_experts=redundant), uniform(MODEL)
    table = busiest_rank(stats, shares_of_ranks(placed(stats, 8, redundant), 8))
    tokens = np.array([16.0, 128.0, 2048.0])
    (op,) = (
        op for op in expert_feed_forward(MODEL, BLOCK, tokens, tokens, mapping, Precision(), 1)
        if isinstance(op, Experts)
    )  # fmt: skip
    rows, touched = (values.mean(axis=0) for values in table.at(tokens))
    assert op.rows == pytest.approx(rows, rel=0.15)
    assert op.active[1:] == pytest.approx(touched[1:], rel=0.05)
    assert touched[0] * 0.99 <= op.active[0] <= touched[0] * 1.15  # over-estimated with few tokens, as it says


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "law"),
    [
        (Mapping(tp=8, ep=8, redundant_experts=8), None),
        (Mapping(tp=8, ep=8, redundant_experts=8 * 56), None),
        (Mapping(attention_dp=3, ep=3, redundant_experts=2), None),
        (Mapping(tp=8, ep=8, redundant_experts=4), "ep divides the experts and the redundant ones together"),
        (Mapping(tp=8, ep=8, redundant_experts=8 * 57), "a rank has no more expert slots than there are experts"),
        (Mapping(tp=8, expert_tp=8, redundant_experts=8), "redundant experts and a map of experts need ep"),
        (Mapping(tp=8, expert_tp=8, expert_map="map.json"), "redundant experts and a map of experts need ep"),
    ],
)
def test_laws_of_redundant_experts(mapping: Mapping, law: str | None) -> None:
    assert law_broken(MODEL, mapping) == law


@pytest.mark.parametrize(
    ("ep", "redundant", "near"),
    [(8, 5, "0 or 8"), (8, 12, "8 or 16"), (3, 2, "1 or 4"), (12, 1, "4"), (128, 1, "0 or 128")],
)
def test_redundant_experts_that_do_not_divide_are_told_their_neighbours(ep: int, redundant: int, near: str) -> None:
    catalogue = open_catalogue("qwen3-30b-a3b", "h100-sxm", 128, "vllm")
    experts = catalogue.model.layers[0].feed_forward.experts
    assert all((experts + int(number)) % ep == 0 for number in near.split(" or "))
    told = f"redundant_experts={redundant}: expected {near} with ep={ep} and {experts} experts"
    with pytest.raises(MappingError, match=re.escape(told)):
        catalogue.check(Mapping(attention_dp=ep, ep=ep, redundant_experts=redundant), Precision())


def test_a_dense_model_has_none() -> None:
    for mapping in (Mapping(redundant_experts=1), Mapping(expert_map="map.json")):
        assert law_broken(load_model("llama-3.2-1b"), mapping) == "ep needs experts"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"redundant_experts": -1}, "redundant_experts is -1, expected at least 0"),
        ({"ep": 1, "expert_tp": 4, "redundant_experts": 4}, "redundant_experts is 4, expected 0 with ep 1"),
        ({"ep": 1, "expert_tp": 4, "expert_map": "map.json"}, "expert_map is 'map.json', expected null with ep 1"),
        ({"expert_map": ""}, "expert_map is '', expected a path"),
    ],
)
def test_plans_say_what_is_wrong(changed: dict[str, object], told: str, tmp_path: Path) -> None:
    pool = Pool(1, tp=4, ep=4)
    with pytest.raises(PlanError, match=rf"pools\[0\].{told}"):
        check_plan(Plan("mixtral-8x7b", "h100-sxm", 4, (replace(pool, **changed),)))  # type: ignore[arg-type]
    good = Plan("mixtral-8x7b", "h100-sxm", 4, (replace(pool, redundant_experts=4, expert_map="map.json"),))
    write_plan(good, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == good


# --- searches ---------------------------------------------------------------------------------------------------------


def test_copies_are_looked_at_where_they_relieve_the_busiest_rank() -> None:
    stats = uneven("mixtral-8x7b", 1.0)
    choices = Choices(policies=("chunked",), max_seqs=(64,), token_budgets=(2048,))

    def spare(routing: RoutingStats | None, experts_placed: bool, **more: object) -> dict[int, set[int]]:
        parts = open_catalogue("mixtral-8x7b", "h100-sxm", 4, "vllm", routing=routing, placed=experts_placed)
        space = enumerate_pools(parts, replace(choices, **more), 2048)  # type: ignore[arg-type]
        return {
            ep: {pool.redundant_experts for pool, _ in space.pools if pool.ep == ep}
            for ep in {pool.ep for pool, _ in space.pools}
        }

    assert spare(stats, True) == {1: {0}, 2: {0, 2}, 3: {1}, 4: {0, 4}}
    assert spare(stats, False) == spare(None, True) == {1: {0}, 2: {0}, 4: {0}}
    assert spare(uniform(load_model("mixtral-8x7b")), True) == {1: {0}, 2: {0}, 3: {1}, 4: {0}}
    assert spare(None, False, spare_slots=(0, 2))[4] == {0, 8}


def test_without_spare_slots_the_space_is_as_it_was() -> None:
    model, cluster = load_model("mixtral-8x7b"), open_catalogue("mixtral-8x7b", "h100-sxm", 8, "vllm").cluster
    assert all(not mapping.redundant_experts for mapping in mappings(model, cluster))
    assert len(list(mappings(model, cluster, (0, 1)))) > len(list(mappings(model, cluster)))


@settings(max_examples=8, deadline=None)
@given(st.sampled_from((2, 4, 8)), st.floats(0.4, 1.2), st.integers(0, 999))
def test_steps_with_placed_experts_are_no_slower_where_all_are_busy(ep: int, skew: float, seed: int) -> None:
    stats, pool = uneven("mixtral-8x7b", skew, seed), Pool(1, tp=8, ep=ep, expert_tp=8 // ep)
    before, after = (
        open_catalogue("mixtral-8x7b", "h100-sxm", 8, "vllm", routing=stats, placed=way)
        .step_model(mapping_of(pool), precision_of(pool)).step_s(0, 0, ((4096, 0),))
        for way in (False, True)
    )  # fmt: skip
    assert after <= before * (1 + 1e-9)


def test_groups_stay_on_nodes_only_where_that_saves_more_than_it_costs() -> None:
    """DeepSeek-V3 picks a token's experts from 4 of 8 groups; whichever map is chosen is the quicker one."""
    stats = uneven("deepseek-v3", 0.6)
    parts = open_catalogue("deepseek-v3", "h200-sxm", 32, "sglang", routing=stats, placed=True)
    mapping = Mapping(attention_dp=32, ep=32)
    nodes = [rank // 8 for rank in range(32)]
    chosen = parts.seating.expert_map(mapping)
    both = [placed(stats, 32, 0), placed(stats, 32, 0, nodes, 8)]
    prices = [parts.seating.block_s(mapping, one) for one in both]
    assert parts.seating.block_s(mapping, chosen) == pytest.approx(min(prices))
    assert parts.seating.expert_map(mapping) is chosen


# --- plans and commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path, RoutingStats]:
    """A plan file with the map of placed experts beside it, and the recorded routing."""
    stats = uneven("mixtral-8x7b", 1.0)
    parts = open_catalogue("mixtral-8x7b", "h100-sxm", 8, "sglang", routing=stats, placed=True)
    pool = Pool(1, tp=4, ep=4, redundant_experts=4)
    plan = Plan("mixtral-8x7b", "h100-sxm", 8, (pool, replace(pool, ep=1, expert_tp=4, redundant_experts=0)), "sglang")
    named, files = plan_with_maps(plan, parts)
    assert [pool.expert_map for pool in named.pools] == ["expert-map-0.json", None] and list(files) == [
        "expert-map-0.json"
    ]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    write_plan(named, tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml", written(stats, tmp_path / "counts.json"), stats


def test_a_saved_plan_is_priced_as_the_search_priced_it(saved: tuple[Path, Path, RoutingStats]) -> None:
    from ui.questions import opened

    plan, routing, stats = saved
    chosen, catalogue = opened(plan, routing=routing)
    own = replace(chosen.pools[0], expert_map=None)
    searched, ordered = (
        open_catalogue("mixtral-8x7b", "h100-sxm", 8, "sglang", routing=stats, placed=way) for way in (True, False)
    )

    def step(catalogue: Catalogue, pool: Pool) -> float:
        return catalogue.step_model(mapping_of(pool), precision_of(pool)).step_s(64, 64_000, ((2048, 0),))

    assert step(catalogue, chosen.pools[0]) == pytest.approx(step(searched, own), rel=1e-6)
    assert step(catalogue, chosen.pools[0]) < step(ordered, own)
    (found,) = balances(catalogue, chosen)
    assert (found.pool, found.how, found.ranks, found.redundant_experts) == (0, "map", 4, 4)
    assert found.in_order > 1.3 and found.busiest_over_mean < 1.05 < found.in_order
    assert balances(ordered, replace(chosen, pools=(own,)))[0].how == "order"
    assert balances(open_catalogue("mixtral-8x7b", "h100-sxm", 8, "sglang"), replace(chosen, pools=(own,))) == []


def test_simulate_explain_and_export_go_by_the_map(saved: tuple[Path, Path, RoutingStats], capsys) -> None:
    plan, routing, _ = saved
    asked = ["simulate", str(plan), "--workload", "short-questions", "--requests", "20"]
    assert main([*asked, "--routing", str(routing)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Experts of pool 1 as in expert-map-0.json, 4 redundant: busiest rank" in out
    assert main(asked) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "No routing is recorded (--routing): tokens choose all experts alike, which gives the busiest rank" in out
    assert "x ->" not in out
    assert main(["explain", str(plan), "--routing", str(routing), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["experts"]
    assert told["how"] == "map" and told["busiest_over_mean"] < told["in_order"]
    assert main(["export", str(plan), "--save", str(plan.parent / "launch")]) == 0
    rows = json.loads((plan.parent / "launch" / "pool0-experts.json").read_text())
    assert rows == json.loads((plan.parent / "expert-map-0.json").read_text())
    assert "--ep-num-redundant-experts 4" in (plan.parent / "launch" / "launch.sh").read_text()
    (plan.parent / "expert-map-0.json").write_text("[[0]]")
    assert main(asked) == 4
    assert "1 layers; expected the 32 mixture layers of the model" in capsys.readouterr().err


def test_a_search_prefers_placed_experts_serves_more_with_them_and_saves_where_they_sit(tmp_path: Path, capsys) -> None:
    routing = written(uneven("qwen3-235b-a22b"), tmp_path / "counts.json")
    words = [
        "plan", "--model", "qwen3-235b-a22b", "--hardware", "h100-sxm", "--gpus", "16", "--workload", "short-questions",
        "--requests", "100", "--policy", "chunked", "--max-seqs", "64", "--token-budget", "2048", "--seconds", "100",
        "--ttft", "p99=1s", "--tpot", "p99=50ms", "--routing", str(routing), "--keep", "60",
        "--tolerance", "0.03",
    ]  # fmt: skip
    folder = tmp_path / "saved"
    assert main([*words, "--save", str(folder)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Experts placed from counts.json: busiest rank" in out and "expert-map-0.json" in out
    assert main([*words, "--no-experts-placed", "--json"]) == 0
    placed, ordered = json.loads((folder / "result.json").read_text()), json.loads(capsys.readouterr().out)
    assert placed["question"]["experts_placed"] and not ordered["question"]["experts_placed"]
    best = placed["best"]["plan"]["pools"][0]
    assert best["ep"] > 1 and placed["best"]["value"] > 1.05 * ordered["best"]["value"]

    def spread(content) -> dict[str, float]:
        """The best rate of each way to cut the model that spreads experts over all devices."""
        found: dict[str, float] = {}
        for ranked in content["ranked"]:
            if ranked["plan"]["pools"][0]["ep"] == 16:
                found[ranked["words"]] = max(ranked["value"], found.get(ranked["words"], 0.0))
        return found

    before, after = spread(ordered), spread(placed)
    both = before.keys() & after.keys()
    gains = sorted(after[plan] / before[plan] for plan in both)
    assert len(gains) >= 4 and gains[-4] > 1.05  # the others within what bisection over 100 requests tells apart
    assert gains[0] > 0.9
    (told,) = placed["experts"]
    assert told["how"] == "placed" and told["busiest_over_mean"] < 1.1 < told["in_order"]
    assert all(one["how"] == "order" for one in ordered["experts"])
    (pool,) = yaml.safe_load((folder / "plan.yaml").read_text())["pools"]
    assert pool == best == placed["ranked"][0]["plan"]["pools"][0] and best["expert_map"] == "expert-map-0.json"
    assert told["expert_map"] == "expert-map-0.json"
    assert placed["best"]["j_per_output_token"] == placed["best"]["metrics"]["j_per_output_token"] > 0
    assert any("vLLM 0.12 starts with experts in order" in note for note in placed["notes"]) and "notes" not in ordered
    assert main(["explain", str(folder / "plan.yaml"), "--routing", str(routing), "--json"]) == 0
    (again,) = json.loads(capsys.readouterr().out)["experts"]
    assert again["busiest_over_mean"] == pytest.approx(told["busiest_over_mean"])


def test_experts_in_order_repeat_from_the_first() -> None:
    split = in_order(1, 4, 4).split(2)
    assert split.tolist() == [[[0.5, 0.5]] * 4]
    assert np.array_equal(in_order(2, 8).split(4)[0].argmax(axis=1), [0, 0, 1, 1, 2, 2, 3, 3])
