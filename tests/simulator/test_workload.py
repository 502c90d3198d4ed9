"""Requests are what they claim to be, and drawn traffic follows the laws it is drawn from."""

import pickle
from math import inf, isnan, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hwmodels.errors import ProfileError
from simulator.errors import TraceError
from simulator.workload import (
    Deterministic,
    Empirical,
    Fixed,
    Gamma,
    Independent,
    Lognormal,
    Poisson,
    Quantiles,
    Renewal,
    Requests,
    Uniform,
    Workload,
    draw_requests,
    load_profile,
    mix,
    synthesize,
    workload_names,
)

ONE_TOKEN = Independent(Fixed(1), Fixed(1))


def requests(arrival_s, prompt=8, output=2):
    n = len(arrival_s)
    return Requests(arrival_s, [prompt] * n, [output] * n)


def columns(requests):
    return [column.tolist() for column in (requests.arrival_s, requests.prompt_tokens, requests.output_tokens)]


some_requests = st.lists(
    st.tuples(st.floats(0, 1e6), st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1, max_size=20
).map(lambda rows: Requests(*zip(*sorted(rows), strict=True)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "arrival_s is empty: expected at least one request"),
        (([0, nan], [1, 1], [1, 1]), r"arrival_s\[1\] = nan: expected in \[0, 1e9\] seconds"),
        (([0, inf], [1, 1], [1, 1]), r"arrival_s\[1\] = inf"),
        (([-1, 0], [1, 1], [1, 1]), r"arrival_s\[0\] = -1"),
        (([1.7e9], [1], [1]), r"arrival_s\[0\] = 1.7e\+09"),
        (([0, 2, 1], [1, 1, 1], [1, 1, 1]), r"arrival_s\[2\] = 1: expected no earlier"),
        (([0, 1], [1, 0], [1, 1]), r"prompt_tokens\[1\] = 0: expected a whole number in \[1, 2147483647\]"),
        (([0, 1], [1, 1], [1.5, 1]), r"output_tokens\[0\] = 1.5"),
        (([0, 1], [1, 1], [1, 2**63]), r"output_tokens\[1\] = 9.22"),
        (([0, 1], [1, 1], [1]), "output_tokens has 1 entries: expected one for each of the 2 requests"),
        (([0], ["8"], [1]), "prompt_tokens has dtype"),
        (([0], [None], [1]), "prompt_tokens has dtype"),
        (([[0]], [1], [1]), r"arrival_s has dtype int64, shape \(1, 1\)"),
        (([0], [[1], [1, 2]], [1]), "prompt_tokens: expected a sequence of numbers"),
        (([0], [1], [1], [1]), r"slo_class\[0\] = 1: expected a whole number in \[0, 0\]"),
        (([0], [1], [1], [0], ("a", "a")), "class_names"),
        (([0], [1], [1], [0], ()), "class_names"),
    ],
)
def test_wrong_requests_are_named(arguments, message):
    with pytest.raises(TraceError, match=message) as error:
        Requests(*arguments)
    assert "\n" not in str(error.value)


def test_requests_are_a_read_only_copy_and_travel_between_processes():
    arrival_s = np.array([0.0, 1.0])
    made = requests(arrival_s)
    arrival_s[0] = 0.5
    assert made.arrival_s.tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        made.prompt_tokens[0] = 1
    assert columns(pickle.loads(pickle.dumps(made))) == columns(made)
    assert (made.prompt_tokens.dtype, made.slo_class.dtype, made.slo_class.tolist()) == (np.int64, np.int16, [0, 0])
    assert (made.total_prompt_tokens, made.total_output_tokens, made.max_context_tokens) == (16, 4, 10)


def test_rate_counts_gaps():
    assert requests([3, 4, 5]).rate_per_s == 1
    assert requests([2, 2]).rate_per_s == inf
    assert isnan(requests([2]).rate_per_s)


@given(some_requests, st.floats(1e-3, 1e6))
def test_scaling_reaches_the_rate_and_keeps_the_rest(made, rate_per_s):
    if len(made) > 1 and made.span_s < 1e-3:
        return
    scaled = made.scaled_to_rate(rate_per_s)
    assert columns(scaled)[1:] == columns(made)[1:]
    if len(made) > 1:
        # Arrivals late in a long trace are known to a few ulps of their time, not of the span.
        assert scaled.rate_per_s == pytest.approx(rate_per_s, rel=1e-12 + 1e-15 * made.arrival_s[-1] / made.span_s)
    else:
        assert columns(scaled) == columns(made)


@pytest.mark.parametrize("rate_per_s", [0, -1, nan, inf, 1e-300])
def test_impossible_rates_are_refused(rate_per_s):
    with pytest.raises(TraceError, match="rate_per_s = "):
        requests([0, 1]).scaled_to_rate(rate_per_s)
    with pytest.raises(TraceError, match="rate_per_s = "):
        draw_requests(np.random.default_rng(0), 5, rate_per_s, Poisson(), ONE_TOKEN)


def test_requests_that_arrive_at_once_cannot_be_stretched():
    with pytest.raises(TraceError, match="all 3 requests arrive at once"):
        requests([1, 1, 1]).scaled_to_rate(2)


@given(some_requests, st.integers(1, 70))
def test_take_repeats_lengths_in_order_at_the_rate_of_the_trace(made, n):
    taken = made.take(n)
    assert len(taken) == n
    assert taken.prompt_tokens.tolist() == [int(made.prompt_tokens[i % len(made)]) for i in range(n)]
    k = min(n, len(made))
    assert taken.arrival_s[:k].tolist() == made.arrival_s[:k].tolist()
    if n % len(made) == 0 and made.span_s > 1e-3:
        assert taken.rate_per_s == pytest.approx(made.rate_per_s, rel=1e-6)


def test_head_is_at_most_what_is_there():
    assert len(requests([0, 1, 2]).head(2)) == 2
    assert len(requests([0, 1, 2]).head(9)) == 3
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(TraceError, match="expected a whole number >= 1"):
            requests([0]).head(wrong)


def test_mix_sorts_by_arrival_keeps_ties_in_order_and_joins_classes():
    chat, code = requests([0, 1, 1], prompt=1).labelled("chat"), requests([0, 1], prompt=2).labelled("code")
    both = mix(chat, code, chat.head(1))
    assert both.class_names == ("chat", "code")
    assert both.arrival_s.tolist() == [0, 0, 0, 1, 1, 1]
    assert both.slo_class.tolist() == [0, 1, 0, 0, 0, 1]
    assert both.prompt_tokens.tolist() == [1, 2, 1, 1, 1, 2]
    assert mix(both).class_names == both.class_names
    with pytest.raises(TraceError, match="nothing to mix"):
        mix()


def test_closed_loops_are_checked():
    assert Workload(requests([0]), concurrency=4, think_s=0.5).concurrency == 4
    for settings in ({"concurrency": 0}, {"concurrency": 1, "think_s": -1}, {"concurrency": 1, "think_s": nan}):
        with pytest.raises(TraceError, match="expected"):
            Workload(requests([0]), **settings)
    with pytest.raises(TraceError, match="expected 0 without concurrency"):
        Workload(requests([0]), think_s=1)


@pytest.mark.parametrize(
    ("process", "cv"),
    [
        (Poisson(), 1),
        (Gamma(cv=0.3), 0.3),
        (Gamma(cv=3), 3),
        (Deterministic(), 0),
        (Renewal((0, 0.5, 1), (0, 0, 4)), (5 / 3) ** 0.5),  # half the gaps 0, half uniform: E g = 1, E g^2 = 8/3
    ],
)
def test_gaps_have_the_mean_and_variation_of_their_law(process, cv):
    drawn = draw_requests(np.random.default_rng(7), 200_000, 4.0, process, ONE_TOKEN)
    gaps_s = np.diff(drawn.arrival_s)
    assert drawn.arrival_s[0] == 0
    assert gaps_s.mean() == pytest.approx(0.25, rel=0.02)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.03, abs=1e-6)


def test_poisson_gaps_are_exponential():
    gaps = Poisson().gaps(np.random.default_rng(3), 100_000)
    for x in (0.1, 1.0, 3.0):
        assert np.mean(gaps > x) == pytest.approx(np.exp(-x), abs=0.005)


def test_lengths_follow_their_law():
    rng = np.random.default_rng(11)
    assert set(Fixed(7).draw(rng, 10)) == {7}
    uniform = Uniform(3, 5).draw(rng, 30_000)
    assert [np.mean(uniform == k) for k in (3, 4, 5)] == pytest.approx([1 / 3] * 3, abs=0.01)
    by_median = Lognormal(mean=1000, p50=600).draw(rng, 200_000)
    assert (by_median.mean(), np.median(by_median)) == (pytest.approx(1000, rel=0.01), pytest.approx(600, rel=0.01))
    by_sigma = Lognormal(mean=1000, sigma=0.5, max=1500).draw(rng, 200_000)
    assert np.median(by_sigma) == pytest.approx(1000 * np.exp(-0.125), rel=0.01)
    assert by_sigma.max() == 1500
    assert Lognormal(mean=1, sigma=10).draw(rng, 1000).min() == 1


def test_empirical_lengths_stay_pairs():
    trace = Requests([0, 1, 2], [10, 20, 30], [1, 2, 3])
    prompt, output = Empirical(trace).draw(np.random.default_rng(0), 9_000)
    assert np.array_equal(prompt, 10 * output)
    assert np.bincount(output)[1:] == pytest.approx([3_000] * 3, rel=0.05)


def test_quantiles_give_outputs_of_the_prompts_own_group():
    lengths = Quantiles((0, 1), (1, 1001), ((5, 5), (50, 60)))
    prompt, output = lengths.draw(np.random.default_rng(0), 50_000)
    assert prompt.mean() == pytest.approx(501, rel=0.02)
    assert set(output[prompt < 500]) == {5}
    assert output[prompt > 502].mean() == pytest.approx(55, rel=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gamma(cv=0), "cv"),
        (lambda: Gamma(cv=nan), "cv"),
        (lambda: Fixed(tokens=0), "tokens"),
        (lambda: Uniform(5, 3), "expected at most high"),
        (lambda: Lognormal(mean=100), "expected exactly one"),
        (lambda: Lognormal(mean=100, p50=50, sigma=1), "expected exactly one"),
        (lambda: Lognormal(mean=100, p50=200), "expected at most the mean"),
        (lambda: Renewal((0, 1), (0, 0)), "at least one positive gap"),
        (lambda: Renewal((0, 0.5), (0, 1)), "ascend from 0 to 1"),
        (lambda: Quantiles((0, 1), (5, 3), ((1, 2),)), "not to descend"),
        (lambda: Quantiles((0, 1), (1, 3), ((0, 2),)), "from at least 1"),
        (lambda: Quantiles((0, 1), (1, 3), ((1, 2, 3),)), "3 entries"),
    ],
)
def test_impossible_laws_are_refused(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


@pytest.mark.parametrize("name", workload_names())
def test_more_requests_extend_fewer_and_the_rate_only_stretches_time(name):
    profile = load_profile(name)
    few, many = synthesize(profile, 50, seed=5), synthesize(profile, 500, seed=5)
    assert columns(many.head(50)) == columns(few)
    faster = synthesize(profile, 50, rate_per_s=2 * profile.rate_per_s, seed=5)
    assert columns(faster)[1:] == columns(few)[1:]
    assert faster.arrival_s == pytest.approx(few.arrival_s / 2, rel=1e-12)
    assert columns(synthesize(profile, 50, seed=6)) != columns(few)


def test_arrivals_and_lengths_are_separate_streams():
    rngs = [np.random.default_rng(1) for _ in range(2)]
    poisson, gamma = (
        draw_requests(rng, 20, 1.0, process, Independent(Uniform(1, 1000), Uniform(1, 1000)))
        for rng, process in zip(rngs, (Poisson(), Gamma(cv=2)), strict=True)
    )
    assert columns(poisson)[1:] == columns(gamma)[1:]
    assert poisson.prompt_tokens.tolist() != poisson.output_tokens.tolist()


def test_a_users_own_profile_is_a_yaml_file(tmp_path):
    path = tmp_path / "mine.yaml"
    body = """name: mine
source: made up
rate_per_s: 3
arrivals: {process: gamma, cv: 2}
lengths:
  kind: independent
  prompt_tokens: {kind: lognormal, mean: 800, p50: 500, max: 4096}
  output_tokens: {kind: fixed, tokens: 128}
"""
    path.write_text(body)
    drawn = synthesize(load_profile(str(path)), 100)
    assert (drawn.prompt_tokens.max() <= 4096, set(drawn.output_tokens)) == (True, {128})
    for wrong in ("cv: 0", "cv: .nan", "process: weibull", "cv: 1, sigma: 2"):
        path.write_text(body.replace("cv: 2" if "cv" in wrong else "process: gamma", wrong))
        with pytest.raises(ProfileError, match="arrivals") as error:
            load_profile(str(path))
        assert "\n" not in str(error.value)
    with pytest.raises(ProfileError, match="azure-conversation-2023"):
        load_profile("azure-conversation")
