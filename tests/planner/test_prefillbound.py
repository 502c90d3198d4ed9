"""No schedule, published, optimised or at random, has a lower mean TTFT than the bound; on plain queues it is exact."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.catalogue import open_catalogue
from planner.errors import NoFeasiblePlanError, PlanError
from planner.plan import Pool
from planner.prefill import clock_of
from planner.prefillbound import ttft_bound
from planner.prefillcosts import LinearStep, Piece, Span
from planner.prefilllinear import TableClock, minorant
from planner.prefillnext import Receding
from planner.prefillpolicies import layered, orca, prefill_first, sarathi, sarathi_serve, shortest_first
from planner.prefillsteps import Job, Policy, Prompt, Running, Schedule, State, Step, Window, follow

seconds = st.floats(0.0, 0.05)
rates = st.floats(0.0, 1e-4)


def at_random(seed: int) -> Policy:
    """Any prompts, cut anywhere by tokens or by layers, with the decodes or without."""
    rng = np.random.default_rng(seed)

    def choose(state: State) -> Step:
        items: list[tuple[Job, Span]] = []
        layers = state.clock.layers
        for i in rng.permutation(len(state.jobs)):
            job = state.jobs[i]
            if rng.random() < 0.4 or not state.fits(job):
                continue
            if job.layers or rng.random() < 0.5:
                items.append((job, Span(job.left, job.tokens, job.layers, int(rng.integers(job.layers, layers)) + 1)))
            else:
                items.append((job, Span(int(rng.integers(1, job.left + 1)), job.tokens, 0, layers)))
        if not items and not state.decodes:
            job = state.jobs[0]
            items.append((job, Span(job.left, job.tokens, job.layers, layers)))
        return Step(tuple(items), not items or bool(rng.random() < 0.6))

    return choose


def policies(seed: int = 0) -> dict[str, Policy]:
    """One of each kind, fresh."""
    return {
        "orca": orca(3000),
        "prefill first": prefill_first(3000),
        "sarathi": sarathi(256),
        "sarathi serve": sarathi_serve(512),
        "layered": layered(None, 3000),
        "shortest": shortest_first(512),
        "shortest, aged": shortest_first(2048, 500.0),
        "random": at_random(seed),
    }


@st.composite
def steps(draw: st.DrawFn) -> LinearStep:
    """Models of one to three pieces."""
    pieces = tuple(
        Piece(draw(seconds), draw(rates), draw(rates), draw(seconds)) for _ in range(draw(st.integers(1, 3)))
    )
    rest = draw(st.floats(0.0, 2e-8)), draw(st.floats(0.0, 1e-7)), draw(st.floats(1e-4, 5e-3)), draw(seconds)
    return LinearStep(pieces, *rest, layers=draw(st.sampled_from([4, 12])))


@st.composite
def windows(draw: st.DrawFn, most: int = 12) -> Window:
    """A few prompts, some of them together, beside a few decodes."""
    n = draw(st.integers(1, most))
    arrivals = sorted(draw(st.lists(st.sampled_from([0.0, 0.1, 0.15, 0.5, 0.9, 2.0]), min_size=n, max_size=n)))
    same = draw(st.booleans())
    prompts = tuple(
        Prompt(at, draw(st.integers(1, 3000)), draw(st.integers(1, 8)), 1.0 if same else draw(st.floats(0.1, 5.0)))
        for at in arrivals
    )
    running = draw(st.lists(st.builds(Running, st.integers(1, 4000), st.integers(1, 60)), max_size=8))
    if draw(st.booleans()):
        running.append(Running(1, 2000))  # decodes for longer than most windows last
    return Window(prompts, tuple(running))


def holds(step: LinearStep, window: Window, schedule: Schedule) -> None:
    """The bound at the schedule's own longest gap and fullest layer is not above its mean TTFT."""
    longest = schedule.max_tbt_s if len(schedule.gap_s) else inf
    for largest in (schedule.largest_tokens, schedule.largest_tokens + 1000, inf):
        kind = {"pauses": not schedule.together, "always": schedule.decoding}
        found = ttft_bound(step, window, longest * (1 + 1e-9), largest, **kind)
        assert found.ttft_s <= schedule.mean_ttft_s * (1 + 1e-9), (schedule.name, found)


@settings(max_examples=120, deadline=None)
@given(steps(), windows(), st.integers(0, 2**31))
def test_no_policy_is_below_the_bound(step: LinearStep, window: Window, seed: int) -> None:
    """Published policies and a random one, on drawn models and traffic."""
    for name, policy in policies(seed).items():
        holds(step, window, follow(window, policy, step, name))


@settings(max_examples=10, deadline=None)
@given(steps(), windows(4), st.sampled_from(["tokens", "layers"]))
def test_the_receding_horizon_is_not_below_the_bound(step: LinearStep, window: Window, axis: str) -> None:
    """Nor is what the program decides."""
    floor = step.step_s(12, 100_000, ())
    policy = Receding(step, floor + 0.05, axis=axis, steps=4, seconds=0.1)  # type: ignore[arg-type]
    holds(step, window, follow(window, policy, step, axis))


@pytest.fixture(scope="module")
def clock() -> TableClock:
    """A mixture of experts on one device."""
    return clock_of(open_catalogue("qwen3-30b-a3b", "h100-sxm", 8, "vllm"), Pool(1), 8192)[0]


@settings(max_examples=25, deadline=None)
@given(window=windows(6), seed=st.integers(0, 2**31))
def test_no_policy_on_a_step_model_is_below_the_bound_of_its_minorant(
    clock: TableClock, window: Window, seed: int
) -> None:
    """The true clock is not linear; the certified model below it bounds it all the same."""
    below = minorant(clock.model, clock.layers)
    for name in ("sarathi serve", "prefill first", "layered", "shortest"):
        holds(below, window, follow(window, policies(seed)[name], clock, name))


def test_it_is_exact_where_whole_prompts_alone_are_best() -> None:
    """Without fixed times, shortest-first in one step each is optimal when all prompts are there: the bound says so."""
    step = LinearStep((Piece(0.0, 1e-4),), 1e-9)
    window = Window(tuple(Prompt(0.0, n) for n in (900, 100, 400, 1600)))
    schedule = follow(window, shortest_first(1), step, "token by token")
    order = sorted(p.tokens for p in window.prompts)
    ends = np.cumsum([1e-4 * n + 1e-9 * n**2 / 2 for n in order])
    found = ttft_bound(step, window)
    assert found.ttft_s == pytest.approx(ends.mean())
    assert schedule.mean_ttft_s == pytest.approx(found.ttft_s, rel=1e-3)


def test_weights_are_served_by_weight_over_work() -> None:
    """Smith's rule: two prompts at once, the bound of mean times is exact for jobs that are not interrupted."""
    step = LinearStep((Piece(0.0, 1e-3),))
    window = Window((Prompt(0.0, 100, weight=1.0), Prompt(0.0, 300, weight=9.0)))
    found = ttft_bound(step, window)
    assert found.proof == "weighted mean times"
    assert found.ttft_s == pytest.approx((9 * 0.3 + 1 * 0.4) / 10)


def test_decodes_that_must_go_on_take_their_share() -> None:
    """Half of every gap is a decode step: the machine has half its speed while the decodes are there."""
    step = LinearStep((Piece(0.05, 1e-4),))
    window = Window((Prompt(0.0, 1000),), (Running(100, 1000),))
    free = ttft_bound(step, window, inf, inf, pauses=False)
    tight = ttft_bound(step, window, 0.1, inf, pauses=False)
    assert free.ttft_s == pytest.approx(0.15)  # alone in a step
    assert tight.ttft_s == pytest.approx(0.2)
    assert follow(window, sarathi_serve(501), step).mean_ttft_s == pytest.approx(0.2)


def test_a_tighter_limit_or_a_smaller_step_never_lowers_the_bound() -> None:
    """It is monotone in both."""
    step = LinearStep((Piece(0.02, 1e-6, 1e-5, 0.01), Piece(0.0, 3e-5, 3e-5)), 1e-10, 1e-9, 0.001, 0.001)
    rng = np.random.default_rng(0)
    prompts = tuple(Prompt(0.1 * i, int(n)) for i, n in enumerate(rng.integers(100, 6000, 40)))
    window = Window(prompts, (Running(1000, 200),) * 20)
    by_limit = [ttft_bound(step, window, limit, 4096).ttft_s for limit in (1.0, 0.1, 0.05, 0.03)]
    by_size = [ttft_bound(step, window, 0.1, size).ttft_s for size in (inf, 8192, 1024, 256)]
    assert by_limit == sorted(by_limit)
    assert by_size == sorted(by_size)
    assert by_size[0] < by_size[-1]


def test_limits_that_cannot_be_kept_are_named() -> None:
    """A TBT limit below the running decodes names the floor."""
    step = LinearStep((Piece(0.02, 1e-6),))
    window = Window((Prompt(0.0, 10),), (Running(100, 5),) * 3)
    with pytest.raises(NoFeasiblePlanError, match="3 decodes alone takes 20 ms"):
        ttft_bound(step, window, 0.01)
    with pytest.raises(PlanError, match="max_tokens=0"):
        ttft_bound(step, window, 1.0, 0)
