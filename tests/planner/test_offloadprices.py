"""Steps of replicas some of whose experts are away, against simulated ones; and what a search makes of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from math import inf

import numpy as np
import pytest

from hwmodels.mapping import Mapping, Precision
from planner.catalogue import Catalogue, mapping_of, open_catalogue, precision_of
from planner.errors import NoFeasiblePlanError
from planner.explainplan import explain_plan
from planner.offloadchoices import AwayChoices, largest_cache
from planner.offloading import Away, away_of, host_of
from planner.plan import Plan, Pool
from planner.question import Question
from planner.search import Search, search
from planner.space import Choices, enumerate_pools
from simulator.limits import parse_limit
from simulator.offloadedsteps import offloaded_token_s
from simulator.offloadplan import OffloadPlan
from simulator.workload import Requests, load_profile, synthesize

SMALL = Pool(1, max_seqs=8, token_budget=512, max_context_tokens=4096, expert_cache=0.15)
CHOICES = Choices(token_budgets=(512,), max_seqs=(8,), policies=("chunked",))


@cache
def shop(model: str = "mixtral-8x7b", hardware: str = "rtx-4090", gpus: int = 1) -> Catalogue:
    return open_catalogue(model, hardware, gpus, "vllm")


def plan(pool: Pool = SMALL, **changes: object) -> Plan:
    return replace(Plan("mixtral-8x7b", "rtx-4090", pool.gpus, (pool,)), **changes)


def requests(count: int = 30) -> Requests:
    return synthesize(load_profile("short-questions"), count, seed=0)


def test_all_experts_on_devices_is_the_plain_step_model() -> None:
    mapping, precision = mapping_of(SMALL), precision_of(SMALL)
    whole = replace(SMALL, expert_cache=1.0)
    assert away_of(whole) is None
    own = shop(gpus=1)
    plain = own.step_model(mapping, precision)
    simulated = own.step_model(mapping, precision, Away(1.0))
    for batch in ((1, 1000, []), (7, 9000, []), (0, 0, [(300, 0)]), (3, 5000, [(500, 100)])):
        assert simulated.step_s(*batch) == pytest.approx(plain.step_s(*batch), rel=1e-9)


@pytest.mark.parametrize("threads", [0, 16])
def test_a_larger_cache_takes_no_longer(threads: int) -> None:
    own, mapping, precision = shop(), mapping_of(SMALL), precision_of(SMALL)
    models = [own.step_model(mapping, precision, Away(share, None, threads)) for share in (0.1, 0.3, 0.8)]
    for batch in ((1, 1000, []), (6, 6000, []), (0, 0, [(400, 0)])):
        times = [model.step_s(*batch) for model in models]
        assert all(later < 1.01 * earlier for earlier, later in pairwise(times)), times
        assert times[-1] < 0.7 * times[0]
        assert threads or times[-1] > own.step_model(mapping, precision).step_s(*batch)


@pytest.mark.parametrize(("sequences", "share", "threads"), [(1, 0.25, 0), (8, 0.25, 0), (4, 0.4, 24)])
def test_a_decode_step_against_simulated_steps(sequences: int, share: float, threads: int) -> None:
    """Whole steps with all layers and other work, experts one by one instead of in one kernel: within 4 %."""
    own = shop()
    model = own.step_model(Mapping(), Precision(), Away(share, None, threads))
    direct = offloaded_token_s(
        own.model, own.cluster, host_of(own.cluster, Mapping(), Away(share, None, threads)).device,
        OffloadPlan(share, ("bf16",), misses="hybrid" if threads else "load", cpu_threads=threads, popular=True),
        tokens=sequences, steps=150, warmup=40, seed=3,
    )  # fmt: skip
    ours_s = model.step_s(sequences, 1024 * sequences, []) - model.overhead_s(sequences, False)
    assert ours_s == pytest.approx(direct.step_s, rel=0.04)


def test_recorded_popularity_raises_hits() -> None:
    """Two experts of eight get nearly all tokens: a cache of a quarter has them."""
    from hwmodels.routing import RoutingStats

    loads = np.tile([45.0, 45.0, *[10 / 6] * 6], (32, 1))
    stats = RoutingStats("mixtral-8x7b", tuple(range(32)), loads, 2, "test")
    skewed = open_catalogue("mixtral-8x7b", "rtx-4090", 1, "vllm", routing=stats)
    away = Away(0.25)
    there, plain = (one.away_layers(Mapping(), Precision(), away).hit_rate[0] for one in (skewed, shop()))
    assert there > plain + 0.3


def test_ranks_that_share_experts_load_their_parts_at_once() -> None:
    """Two cards with a link each: half the bytes, and a little more than half the time."""
    one = shop().away_layers(Mapping(), Precision(), Away(0.25))
    two = shop(gpus=2).away_layers(Mapping(tp=2, expert_tp=2), Precision(), Away(0.25))
    assert two.loaded_bytes[:3] == pytest.approx(one.loaded_bytes[:3] / 2, rel=0.01)
    assert (two.layer_s[:3] > 0.5 * one.layer_s[:3]).all()
    assert (two.layer_s[:3] < 0.55 * one.layer_s[:3]).all()


def test_rows_of_a_step_say_what_the_table_says() -> None:
    for threads, bound in ((0, "host link"), (16, "host CPU")):
        (found,) = explain_plan(shop(), plan(replace(SMALL, cpu_threads=threads)), batch=4)
        for step in found.steps:
            assert step.time_s == pytest.approx(step.step_model_s, rel=0.05)
            assert step.binding == bound
    assert sum(shop().evidence(SMALL).values()) == pytest.approx(1)


def test_pools_are_enumerated_with_what_was_asked() -> None:
    away = AwayChoices(caches=(0.1, 0.15, 0.9), threads=(0, 8))
    space = enumerate_pools(shop(), replace(CHOICES, away=away), 1024)
    assert {(pool.expert_cache, pool.cpu_threads) for pool, _ in space.pools} == {
        (cache, threads) for cache in (0.1, 0.15) for threads in (0, 8)
    }
    assert space.broken["weights, activations and the longest request fit in memory"] == 2
    two = enumerate_pools(shop(gpus=2), replace(CHOICES, away=replace(away, caches=())), 1024)
    assert all(pool.ep == pool.attention_dp == 1 for pool, _ in two.pools)
    assert {pool.tp * pool.pp for pool, _ in two.pools} == {1, 2}
    assert two.broken["experts stay with the tensor-parallel ranks where a part of them is away"]


def ask(model: str = "mixtral-8x7b", **changes: object) -> Question:
    limits = (parse_limit("ttft", "p99=60s"), parse_limit("tpot", "p99=2s"))
    return replace(
        Question(model, "rtx-4090", 1, requests(), limits=limits, choices=CHOICES, jobs=1, seconds=30.0, keep=4),
        **changes,
    )


def test_a_model_that_does_not_fit_is_served_from_the_host() -> None:
    """Nobody asked: the largest caches that fit, with and without the host's cores; the cores win."""
    look = Search(ask(), lambda _what, _share: None)
    pools = [candidate.plan.pools[0] for candidate in look.list.candidates]
    longest = int((requests().prompt_tokens + requests().output_tokens).max())
    assert max(pool.expert_cache or inf for pool in pools) == largest_cache(
        look.catalogue, replace(SMALL, expert_cache=0.5), longest
    )
    result = search(ask())
    assert result.best.plan.pools[0].cpu_threads == 32
    assert result.best.trial.meets
    assert result.pruned["weights, activations and the longest request fit in memory"]


def test_a_model_that_fits_keeps_its_experts() -> None:
    look = Search(ask("qwen3-30b-a3b", hardware="h100-sxm"), lambda _what, _share: None)
    assert all(candidate.plan.pools[0].expert_cache is None for candidate in look.list.candidates)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "llama-3-70b"}, "GiB short"),
        ({"choices": replace(CHOICES, away=AwayChoices((0.9,)))}, "with experts that are away: no plan is left"),
        ({"choices": replace(CHOICES, away=AwayChoices((0.1,), threads=(99,)))}, "'the host has the cores'"),
    ],
)
def test_questions_that_leave_no_plan_are_told(changes: dict[str, object], told: str) -> None:
    with pytest.raises(NoFeasiblePlanError, match=told):
        Search(ask(**changes), lambda _what, _share: None)
