"""The answer to a question: ranked, reproducible, bounded, and one line where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hwmodels.mapping import Precision
from planner import Question, SearchResult, search
from planner.catalogue import Catalogue, open_catalogue
from planner.errors import NoFeasiblePlanError, PlanError
from planner.plan import Plan
from planner.search import Search
from planner.shortlist import shortlist
from planner.space import Choices
from planner.trial import attempt
from simulator.limits import Limit
from simulator.workload import Requests, mix

LIMITS = (Limit("ttft", "p99", 2.0), Limit("tpot", "p99", 0.05))
FEW = Choices(token_budgets=(512, 2048), max_seqs=(16, 128))
OBJECTIVES = ("goodput-per-gpu", "fewest-gpus", "cost", "energy", "latency")


def traffic(count: int = 150, rate_per_s: float = 4.0, prompt: int = 600, output: int = 60, seed: int = 0) -> Requests:
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / rate_per_s, count))  # the first arrives after 0
    return Requests(arrival, rng.integers(1, prompt, count), rng.integers(1, output, count))


def question(model: str = "llama-3.2-1b", hardware: str = "l4", gpus: int = 4, **other: object) -> Question:
    settings = {"requests": traffic(), "rate_per_s": 4.0, "limits": LIMITS, "choices": FEW, "seconds": 60.0}
    return Question(model, hardware, gpus, **(settings | other))  # type: ignore[arg-type]


def answer(**other: object) -> SearchResult:
    return search(question(**other))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def answers() -> dict[str, SearchResult]:
    return {objective: answer(objective=objective) for objective in OBJECTIVES}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_ranking_is_in_order_and_within_the_limits(answers: dict[str, SearchResult], objective: str) -> None:
    result = answers[objective]
    scores = [ranked.score for ranked in result.ranked]
    assert scores == sorted(scores, reverse=True)
    assert result.best is result.ranked[0]
    assert not result.best.tie
    tolerance = result.question.tolerance
    for ranked in result.ranked:
        assert ranked.plan.gpus_used <= ranked.plan.gpus == 4
        assert ranked.trial.meets
        assert ranked.score <= ranked.bound * (1 + 1e-9) if ranked.bound > 0 else ranked.score <= ranked.bound + 1e-9
        near = ranked.score >= scores[0] - tolerance * abs(scores[0])
        assert ranked.tie == (near and ranked is not result.best)
    sign = 1 if objective == "goodput-per-gpu" else -1
    assert [ranked.value for ranked in result.ranked] == [sign * score for score in scores]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_enough_time_nothing_is_left_to_be_better(answers: dict[str, SearchResult], objective: str) -> None:
    result = answers[objective]
    assert result.gap == 0.0
    assert result.untried == 0
    assert 0 < result.simulated <= result.trials
    assert result.considered == result.simulated + sum(result.pruned.values())


@pytest.mark.parametrize("objective", ["goodput-per-gpu", "cost"])
def test_the_same_question_gets_the_same_answer(answers: dict[str, SearchResult], objective: str) -> None:
    again = answer(objective=objective)
    assert again.ranked == answers[objective].ranked
    assert (again.simulated, again.trials, again.pruned) == (
        answers[objective].simulated, answers[objective].trials, answers[objective].pruned,
    )  # fmt: skip
    assert again.points == answers[objective].points


def test_operating_points_beat_each_other_in_one_thing(answers: dict[str, SearchResult]) -> None:
    points = answers["goodput-per-gpu"].points
    assert points
    throughput = [point.tokens_per_s_per_gpu for point in points]
    speed = [point.tokens_per_s_per_user for point in points]
    assert throughput == sorted(throughput, reverse=True)
    assert speed == sorted(speed)
    assert len(set(speed)) == len(speed)


def test_no_time_still_gives_an_answer_and_says_what_was_left() -> None:
    result = answer(seconds=1e-3)
    assert result.best.trial.meets
    assert result.untried > 0
    assert result.gap > 0


# What no simulation can exceed.

SMALL_CASES = [
    ("llama-3.2-1b", "l4", 3, Precision()),
    ("deepseek-v2-lite", "h100-sxm", 4, Precision()),
    ("gpt-oss-20b", "h100-sxm", 2, Precision()),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("model", "hardware", "gpus", "precision"), SMALL_CASES)
def test_no_plan_exceeds_its_bound(model: str, hardware: str, gpus: int, precision: Precision, objective: str) -> None:
    """Every shortlisted plan that keeps the limits, simulated at a low and at a high rate."""
    for rate, count in ((0.5, 30), (25.0, 120)):
        asked = question(
            model, hardware, gpus,
            requests=traffic(count, rate), rate_per_s=rate, objective=objective,
            limits=(Limit("ttft", "p99", 60.0), Limit("tpot", "p99", 1.0)),
            choices=replace(FEW, precisions=(precision,), policies=("chunked", "prefill-first", "orca", "static")),
        )  # fmt: skip
        look = Search(asked, lambda _what, _share: None)
        candidates = look.list.candidates
        chosen = np.random.default_rng(0).permutation(len(candidates))[:40]
        met = 0
        for candidate in (candidates[i] for i in chosen):
            energy = objective == "energy"
            deployment = look.catalogue.deployment(candidate.plan, with_work=energy)
            trial = attempt(deployment, asked.requests, rate, asked.limits, 0, energy=energy)
            if not trial.meets:
                continue
            met += 1
            if objective == "goodput-per-gpu":
                score = trial.goodput_per_s / gpus
            else:
                score = -look._value(candidate.plan, trial)
            assert score <= candidate.bound + 1e-9 * abs(candidate.bound), candidate
        assert met


def test_plans_pruned_by_the_floors_do_break_the_limit() -> None:
    """With a TTFT limit near the fastest floor, each plan left out breaks it on an empty machine."""
    requests = Requests(np.arange(5.0) * 1e3, np.full(5, 2000), np.full(5, 4))
    asked = question("deepseek-v2-lite", "l4", 8, requests=requests, limits=(Limit("ttft", "p50", 1e3),))
    asked = replace(asked, rate_per_s=None)
    catalogue: Catalogue = open_catalogue(asked.model, asked.hardware, asked.gpus, asked.engine)
    loose = shortlist(asked, catalogue)
    asked = replace(asked, limits=(Limit("ttft", "p50", 1.2 * min(loose.floors.values())),))
    kept = {replace(c.plan.pools[0], replicas=1) for c in shortlist(asked, catalogue).candidates}
    left_out = [c for c in loose.candidates if replace(c.plan.pools[0], replicas=1) not in kept]
    assert kept
    assert left_out
    for candidate in left_out[:: max(1, len(left_out) // 25)]:
        trial = attempt(catalogue.deployment(candidate.plan), requests, requests.rate_per_s, asked.limits, 0)
        assert not trial.meets


# What cannot be answered.


def told(asked: Question) -> str:
    with pytest.raises(NoFeasiblePlanError) as caught:
        search(asked)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_limit_below_what_an_empty_machine_takes() -> None:
    said = told(question(limits=(Limit("tpot", "p99", 1e-5),)))
    assert said.startswith("tpot p99 <= 1e-05 s: no plan on 4 x l4 gets below ")
    floor = float(said.split("gets below ")[1].split(" s")[0])
    assert 1e-4 < floor < 0.05


def test_a_limit_nobody_keeps_names_the_best_value() -> None:
    """A burst: the machine is fast enough when empty, and it is not empty."""
    burst = Requests(np.repeat(np.arange(10.0) / 1e3, 20), np.full(200, 600), np.full(200, 20))
    said = told(question(requests=burst, rate_per_s=None, objective="latency", limits=(Limit("ttft", "p99", 0.2),)))
    assert "ttft p99 <= 0.2 s" in said or said.startswith("rate ")


def test_a_rate_beyond_all_plans() -> None:
    said = told(question(rate_per_s=5000.0))
    assert said.startswith("rate 5000/s: no plan on 4 x l4 can exceed ")
    assert "expected about" in said


def test_a_model_too_large_says_how_much_and_how_many() -> None:
    said = told(question("llama-3.1-70b", "l4", 2))
    assert "GiB short" in said
    assert "the smallest cluster that would do is" in said


def test_a_request_longer_than_the_context() -> None:
    long = Requests(np.arange(3.0), np.array([10, 200_000, 10]), np.full(3, 10))
    said = told(question(requests=long))
    assert said.startswith("longest request: 200010 tokens; llama-3.2-1b takes at most 131072")


def test_a_device_without_a_price_cannot_be_asked_for_cost() -> None:
    catalogue = open_catalogue("llama-3.2-1b", "l4", 1, "vllm")
    device = replace(catalogue.cluster.device, price_usd_per_h=None)
    catalogue.cluster = replace(catalogue.cluster, device=device)
    with pytest.raises(NoFeasiblePlanError, match=r"objective cost: .* has no price"):
        shortlist(question(objective="cost"), catalogue)


@pytest.mark.parametrize(
    "broken",
    [
        {"objective": "fastest"},
        {"router": "best"},
        {"rate_per_s": float("nan")},
        {"rate_per_s": -1.0},
        {"rate_per_s": float("inf")},
        {"seconds": 0.0},
        {"tolerance": 1.0},
        {"limits": ()},
        {"limits": (Limit("itl", "p99", 0.1),)},
    ],
)
def test_questions_that_cannot_be_meant(broken: dict[str, object]) -> None:
    with pytest.raises(PlanError) as caught:
        question(**broken)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# Odd traffic.


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_single_request(objective: str) -> None:
    one = Requests(np.zeros(1), np.array([300]), np.array([20]))
    result = answer(requests=one, objective=objective)
    assert result.best.trial.meets
    assert np.isfinite(result.best.value)
    if objective == "goodput-per-gpu":
        assert answer(requests=one, rate_per_s=None).best.trial.meets
    else:
        with pytest.raises(PlanError, match="one request has no rate"):
            question(requests=one, rate_per_s=None, objective=objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_token_answers(objective: str) -> None:
    short = Requests(np.arange(50) / 4, np.full(50, 300), np.ones(50, int))
    result = answer(requests=short, objective=objective)
    assert result.best.trial.meets
    assert np.isfinite(result.best.value)


@pytest.mark.parametrize("objective", ["goodput-per-gpu", "latency"])
def test_all_requests_at_once_cannot_be_stretched(objective: str) -> None:
    crowd = Requests(np.zeros(20), np.full(20, 300), np.full(20, 20))
    for rate in (None, 4.0):
        with pytest.raises(PlanError, match="all 20 requests arrive at once"):
            question(requests=crowd, rate_per_s=rate, objective=objective)


def test_classes_of_requests_are_held_to_the_same_limits() -> None:
    both = mix(traffic(80, 2.0).labelled("chat"), traffic(80, 2.0, prompt=50, seed=1).labelled("code"))
    result = answer(requests=both)
    assert result.best.trial.meets
    assert set(both.class_names) == {"chat", "code"}


def test_without_a_demanded_rate_the_traffic_keeps_its_own() -> None:
    result = answer(rate_per_s=None, objective="latency")
    assert result.best.trial.rate_per_s == pytest.approx(traffic().rate_per_s)


def test_idle_devices_are_said() -> None:
    """Three devices and a model that needs two: one is idle, and the goodput is by all three."""
    result = answer(model="llama-3.1-8b", hardware="rtx-4090", gpus=3, requests=traffic(60, 1.0), rate_per_s=1.0)
    plan: Plan = result.best.plan
    assert plan.gpus == 3
    assert plan.gpus_used <= 3
    assert result.best.value == pytest.approx(result.best.trial.goodput_per_s / 3, rel=0.5) or plan.gpus_used == 3
