"""Placements in simulated steps: the same work under each, the objective's order, and where its seconds come true."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hwmodels.mapping import Precision
from hwmodels.routing import RoutingStats, uniform
from hwmodels.step_model import shared_operators
from planner.catalogue import Catalogue, mapping_of, open_catalogue, precision_of
from planner.placement import Placement, Problem, solve
from planner.placementcheck import (
    PER_GPU,
    checked_by_simulation,
    experts_s,
    on_one_node,
    prices_of,
    replica_of,
    requests_of,
    savings,
)
from planner.placementcosts import problem_of
from planner.placementfiles import slot_maps
from planner.routedranks import ExpertMap
from simulator.routingdraws import synthesize

Case = tuple[Catalogue, RoutingStats, Problem, dict[str, Placement]]
FORMATS = Precision()
SOLVERS = ("contiguous", "random", "greedy", "eplb")


def case(slots: int, replicas: int) -> Case:
    """Mixtral-8x7B on 4 H100, skewed routing."""
    catalogue = open_catalogue("mixtral-8x7b", "h100-sxm", 4, "vllm")
    even = uniform(catalogue.model)
    made = synthesize(np.random.default_rng(4), len(even.layers), 8, 2, 0.5, 1, 0.0)
    stats = replace(even, loads=made.loads)
    problem = problem_of(stats, catalogue.model, catalogue.cluster, FORMATS, slots, replicas, 512)
    return catalogue, stats, problem, {name: solve(problem, solver=name) for name in SOLVERS}


@pytest.fixture(scope="module")
def mixtral() -> Case:
    """Two experts on every GPU."""
    return case(2, 0)


@pytest.fixture(scope="module")
def copied() -> Case:
    """Three on every GPU, four of them copies, where the solver makes copies."""
    return case(3, 4)


def test_a_lower_objective_is_a_shorter_run(mixtral: Case) -> None:
    for check in checked_by_simulation(*mixtral, FORMATS):
        first = check.runs[0]
        assert (first.placement, first.predicted_s, first.saved_s) == ("contiguous", 0, 0)
        assert check.rank_correlation == 1
        by_objective = sorted(check.runs, key=lambda run: run.objective_s)
        for name in ("makespan_s", "mean_step_s", "mean_ttft_s", "mean_tpot_s"):
            values = [getattr(run, name) for run in by_objective]
            assert values == sorted(values) and values[0] < values[-1]
        for run in check.runs[1:]:
            assert run.saved_s == pytest.approx(first.makespan_s - run.makespan_s)
            assert 0.5 < run.saved_s / run.predicted_s < 1.5


def test_copies_cost_what_reading_them_takes_which_the_objective_does_not_know(copied: Case) -> None:
    """Three experts on a rank instead of two: prompts gain by an even load, small steps lose by half more weights."""
    *question, placements = copied
    some = {name: placements[name] for name in ("contiguous", "eplb")}
    prefill, decode = checked_by_simulation(*question, some, FORMATS)
    for check in (prefill, decode):
        assert check.runs[1].objective_s < check.runs[0].objective_s and check.runs[1].predicted_s > 0
    assert prefill.runs[1].saved_s > 0
    assert decode.runs[1].saved_s < 0


def test_runs_are_made_of_all_tokens_and_of_steps_one_after_the_other(mixtral: Case) -> None:
    for check in checked_by_simulation(*mixtral, FORMATS):
        requests = requests_of(check.traffic, 4, 512, 0)
        # The last token of an answer is not computed upon.
        assert check.tokens == requests.total_prompt_tokens + requests.total_output_tokens - len(requests)
        for run in check.runs:
            assert run.mean_step_s * check.steps <= run.makespan_s * (1 + 1e-9)
            assert run.mean_step_s * check.steps == pytest.approx(run.makespan_s, rel=0.1)


def test_savings_are_those_of_the_arithmetic_in_large_steps_only(mixtral: Case) -> None:
    catalogue, stats, problem, placements = mixtral
    found = savings(catalogue, stats, problem, placements["contiguous"], placements["greedy"], FORMATS)
    assert [saving.tokens for saving in found] == [4 * n for n in PER_GPU]
    per_token = [saving.predicted_s / saving.tokens for saving in found]
    assert per_token == pytest.approx([per_token[0]] * len(found))
    of_it = [saving.experts_s / saving.predicted_s for saving in found]
    assert of_it[-1] == pytest.approx(1, abs=0.1)
    assert of_it[0] < 0.5 and of_it[0] < of_it[1] < of_it[2] < of_it[-1]
    priced = [
        [
            experts_s(catalogue, stats, problem, placements[name], FORMATS, one.tokens)
            for name in ("contiguous", "greedy")
        ]
        for one in found
    ]
    assert [before - after for before, after in priced] == pytest.approx([one.experts_s for one in found], rel=0.01)


def test_a_placement_against_itself_saves_nothing(copied: Case) -> None:
    catalogue, stats, problem, placements = copied
    for saving in savings(catalogue, stats, problem, placements["eplb"], placements["eplb"], FORMATS):
        assert saving.predicted_s == saving.experts_s == saving.step_s == 0


def test_steps_are_those_of_a_plan_with_the_map(copied: Case) -> None:
    """The map written for engines, in a plan's expert_map, has the experts' price and the exchange's."""
    catalogue, stats, problem, placements = copied
    found = ExpertMap(slot_maps(problem, placements["eplb"].holds), stats.experts)
    pool = replace(replica_of(problem, stats.experts, FORMATS, 512), expert_map="found")
    planned = Catalogue(catalogue.model, catalogue.cluster, catalogue.engine, routing=stats, maps={"found": found})
    tokens = np.array([64.0, 4096.0])
    layers = catalogue.model.layers
    ops = shared_operators(catalogue.model, layers, tokens, mapping_of(pool), precision_of(pool))
    ours, theirs = prices_of(catalogue, pool, stats, placements["eplb"]), planned.prices(mapping_of(pool))
    assert len(ops) > 2
    for op in ops:
        assert ours.time_s(op) == pytest.approx(theirs.time_s(op), rel=1e-9)


def test_groups_on_nodes() -> None:
    holds = np.zeros((1, 4, 4), dtype=bool)
    holds[0, [0, 1, 2, 3], [0, 1, 2, 3]] = True
    nodes = np.array([0, 0, 1, 1])
    assert on_one_node(holds, 2, nodes)
    assert not on_one_node(holds, 1, nodes)
    assert not on_one_node(holds, 3, nodes)
    holds[0, 0, 2] = True  # a copy on the other node
    assert not on_one_node(holds, 2, nodes)


def test_the_same_seed_draws_the_same_requests() -> None:
    one, same, other = (requests_of("decode-heavy", 4, 512, seed) for seed in (1, 1, 2))
    assert len(one) == 512
    assert one.output_tokens.tolist() == same.output_tokens.tolist() != other.output_tokens.tolist()
    assert len(requests_of("decode-heavy", 4, 1, 0)) == 4
