"""The oracle against cases small enough to follow by hand, and against the laws every run must obey."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.simulator.oracle import (
    Features,
    Items,
    OracleConfig,
    run_oracle,
    run_oracle_closed_loop,
    run_oracle_lockstep,
    run_oracle_pipeline,
)

POLICIES = ("chunked", "prefill-first", "orca", "static")
ROOMY = OracleConfig("chunked", max_seqs=8, token_budget=64, block_tokens=2, max_context_tokens=100, kv_blocks=400)


def one_second(decodes: int, context: int, items: Items) -> float:
    return 1.0


def affine(decodes: int, context: int, items: Items) -> float:
    return 1.0 + 0.1 * decodes + 0.01 * context + 0.5 * sum(new for new, _ in items)


def shape_of(run: dict[str, Any]) -> list[Features]:
    return [(s.decode_sequences, s.decode_context_tokens, s.items) for s in run["steps"]]


# Policies by hand: A = request 0 with 6 prompt tokens at t = 0, then B and, where three are needed, C.


@pytest.mark.parametrize(
    ("step_s", "first_schedule_s", "tokens_s"),
    [
        (one_second, [0, 1], [[2, 3], [3, 4, 5]]),
        (affine, [0, 3], [[6, 7.67], [7.67, 8.81, 9.96]]),
    ],
)
def test_chunked_by_hand(step_s, first_schedule_s, tokens_s):
    config = replace(ROOMY, max_seqs=2, token_budget=4)
    run = run_oracle(config, step_s, [0, 0.5], [6, 3], [2, 3], tokens=True, records=True)
    assert shape_of(run) == [
        (0, 0, [(4, 0)]),
        (0, 0, [(2, 4), (2, 0)]),
        (1, 7, [(1, 2)]),
        (1, 4, []),
        (1, 5, []),
    ]
    check_times(run, first_schedule_s, tokens_s)


@pytest.mark.parametrize(
    ("step_s", "first_schedule_s", "tokens_s"),
    [
        (one_second, [0, 1, 3], [[1, 3], [2, 3, 5], [4]]),
        (affine, [0, 4, 7.81], [[4, 7.81], [6.5, 7.81, 12.46], [11.31]]),
    ],
)
def test_prefill_first_by_hand(step_s, first_schedule_s, tokens_s):
    config = replace(ROOMY, policy="prefill-first", max_seqs=2, token_budget=8)
    run = run_oracle(config, step_s, [0, 0.5, 0.5], [6, 3, 5], [2, 3, 1], tokens=True, records=True)
    assert shape_of(run) == [
        (0, 0, [(6, 0)]),
        (0, 0, [(3, 0)]),
        (2, 11, []),
        (0, 0, [(5, 0)]),
        (1, 5, []),
    ]
    check_times(run, first_schedule_s, tokens_s)


@pytest.mark.parametrize(
    ("step_s", "first_schedule_s", "tokens_s"),
    [
        (one_second, [0, 1, 2], [[1, 2], [2, 3, 4], [3]]),
        (affine, [0, 4, 6.67], [[4, 6.67], [6.67, 10.31, 11.46], [10.31]]),
    ],
)
def test_orca_by_hand(step_s, first_schedule_s, tokens_s):
    config = replace(ROOMY, policy="orca", max_seqs=3, token_budget=8)
    run = run_oracle(config, step_s, [0, 0.5, 0.5], [6, 3, 5], [2, 3, 1], tokens=True, records=True)
    assert shape_of(run) == [
        (0, 0, [(6, 0)]),
        (1, 7, [(3, 0)]),
        (1, 4, [(5, 0)]),
        (1, 5, []),
    ]
    check_times(run, first_schedule_s, tokens_s)


@pytest.mark.parametrize(
    ("step_s", "first_schedule_s", "tokens_s"),
    [
        (one_second, [0, 0, 4], [[1, 2], [1, 2, 3, 4], [5]]),
        (affine, [0, 0, 9.49], [[5.5, 6.81], [5.5, 6.81, 8.14, 9.49], [12.99]]),
    ],
)
def test_static_by_hand_pads_with_finished_sequences(step_s, first_schedule_s, tokens_s):
    # Two reservations of 10 tokens fill the ten blocks, so C waits for the whole batch.
    config = replace(ROOMY, policy="static", max_seqs=3, token_budget=16, max_context_tokens=10, kv_blocks=10)
    run = run_oracle(config, step_s, [0, 0, 0], [6, 3, 5], [2, 4, 1], tokens=True, records=True)
    assert shape_of(run) == [
        (0, 0, [(6, 0), (3, 0)]),
        (2, 7 + 4, []),
        (2, 8 + 5, []),
        (2, 9 + 6, []),
        (0, 0, [(5, 0)]),
    ]
    check_times(run, first_schedule_s, tokens_s)


def check_times(run, first_schedule_s, tokens_s):
    np.testing.assert_allclose(run["first_schedule_s"], first_schedule_s, rtol=1e-12)
    for got, expected in zip(run["token_s"], tokens_s, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(run["first_token_s"], [t[0] for t in tokens_s], rtol=1e-12)
    np.testing.assert_allclose(run["finish_s"], [t[-1] for t in tokens_s], rtol=1e-12)


# Preemption by hand


@pytest.mark.parametrize("policy", ["chunked", "prefill-first", "orca"])
def test_the_sequence_admitted_last_is_preempted_and_recomputes_prompt_and_output(policy):
    config = replace(ROOMY, policy=policy, max_seqs=2, token_budget=8, kv_blocks=4)
    run = run_oracle(config, one_second, [0, 0], [2, 2], [4, 4], tokens=True, records=True)
    assert run["token_s"] == [[1, 2, 3, 4], [1, 2, 3, 5]]
    assert run["preemptions"].tolist() == [0, 1]
    assert shape_of(run) == [(0, 0, [(2, 0), (2, 0)]), (2, 6, []), (2, 8, []), (1, 5, []), (0, 0, [(5, 0)])]


def test_a_preempted_partial_prefill_loses_its_progress_and_waits_for_room():
    config = replace(ROOMY, max_seqs=2, token_budget=3, kv_blocks=4)
    run = run_oracle(config, one_second, [0, 0], [2, 5], [4, 1], tokens=True, records=True)
    assert shape_of(run) == [
        (0, 0, [(2, 0), (1, 0)]),
        (1, 3, []),
        (1, 4, []),
        (1, 5, []),
        (0, 0, [(3, 0)]),
        (0, 0, [(2, 3)]),
    ]
    assert run["preemptions"].tolist() == [0, 1]
    assert run["first_schedule_s"].tolist() == [0, 0]
    assert run["finish_s"].tolist() == [4, 6]


def test_a_preempted_sequence_keeps_its_place_before_those_who_wait():
    config = replace(ROOMY, policy="orca", max_seqs=2, token_budget=8, kv_blocks=4)
    run = run_oracle(config, one_second, [0, 0, 0], [2, 2, 2], [4, 4, 1], records=True)
    assert [s.prefill_indices for s in run["steps"]] == [[0, 1], [], [], [], [1, 2]]


# Admission control


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"max_context_tokens": 10}, 10),  # prompt + output
        ({"kv_blocks": 5, "max_context_tokens": 10}, 10),
        ({"kv_blocks": 4}, 9),  # the last token is never cached: 8 tokens fill four blocks
        ({"token_budget": 8}, 9),
    ],
)
def test_requests_that_can_never_run_are_rejected_and_no_others(policy, change, limit):
    if policy == "static" and change == {"kv_blocks": 4}:
        limit = 0
    if policy == "chunked" and "token_budget" in change:
        limit = 100
    config = replace(ROOMY, **{"policy": policy, **change})
    outputs = np.arange(1, 14)
    run = run_oracle(config, one_second, np.zeros(13), np.full(13, 4), outputs)
    assert run["rejected"].tolist() == (4 + outputs > limit).tolist()
    assert np.array_equal(np.isnan(run["finish_s"]), run["rejected"])


def test_chunked_needs_a_token_for_every_sequence():
    with pytest.raises(ValueError, match=r"max_seqs\(=65\) must be <= token_budget\(=64\)"):
        replace(ROOMY, max_seqs=65)


def test_an_idle_replica_starts_at_the_arrival_to_the_last_bit():
    arrivals = [0.1, 10.1, 20.3, 1e6 + 0.7]
    run = run_oracle(ROOMY, lambda *_: 0.3, arrivals, [3] * 4, [2] * 4)
    assert run["first_schedule_s"].tolist() == arrivals


# Closed loop, lockstep, pipeline by hand


def test_closed_loop_starts_the_next_request_when_one_finishes_or_is_rejected():
    run = run_oracle_closed_loop(ROOMY, one_second, 2, [2, 2, 500, 2, 2], [2, 1, 1, 1, 1])
    assert run["arrival_s"].tolist() == [0, 0, 1, 1, 2]
    assert run["rejected"].tolist() == [False, False, True, False, False]
    np.testing.assert_array_equal(run["finish_s"], [2, 1, np.nan, 2, 3])


def test_lockstep_lanes_wait_for_the_slowest():
    seen: list[list[Features]] = []

    def coupled_s(batches: list[Features]) -> float:
        seen.append(batches)
        return 1.0 + max(0.5 * sum(new for new, _ in items) for _, _, items in batches)

    # The fourth request comes at the very end of a step: it sees lane 1 empty. The fifth finds a tie.
    run = run_oracle_lockstep(ROOMY, 2, coupled_s, [0, 0, 0.5, 3, 3], [2, 4, 2, 2, 2], [2, 1, 1, 1, 1])
    assert run["lane"].tolist() == [0, 1, 0, 1, 1]
    assert run["finish_s"].tolist() == [6, 3, 6, 6, 6]
    assert seen == [[(0, 0, [(2, 0)]), (0, 0, [(4, 0)])], [(1, 3, [(2, 0)]), (0, 0, [(2, 0), (2, 0)])]]


def test_lockstep_shows_an_idle_lane_as_an_empty_batch():
    seen: list[list[Features]] = []
    run_oracle_lockstep(ROOMY, 2, lambda batches: seen.append(batches) or 1.0, [0], [2], [1])
    assert seen == [[(0, 0, [(2, 0)]), (0, 0, [])]]


@pytest.mark.parametrize(("batches", "stages"), [(1, 4), (4, 2), (4, 4), (8, 4)])
def test_pipeline_bubble_is_stages_minus_one_over_batches(batches, stages):
    # GPipe (arXiv:1811.06965, section 2.3): m equal micro-batches on p stages leave a bubble of p - 1 slots.
    n = batches
    run = run_oracle_pipeline(ROOMY, n, lambda *_: [1.0] * stages, lambda _: 0.0, [0] * n, [2] * n, [1] * n)
    busy_s = batches * 1.0
    assert run["finish_s"].max() / busy_s - 1 == pytest.approx((stages - 1) / batches)


@pytest.mark.parametrize(
    ("transfer", "tokens_s"),
    [(0.0, [[2, 4, 6], [3, 5, 7]]), (0.5, [[2.5, 5, 7.5], [3.5, 6, 8.5]])],
)
def test_two_lanes_on_two_stages_take_turns(transfer, tokens_s):
    run = run_oracle_pipeline(ROOMY, 2, lambda *_: [1, 1], lambda _: transfer, [0, 0], [2, 2], [3, 3], tokens=True)
    assert run["token_s"] == tokens_s


def test_a_slow_stage_holds_back_what_follows():
    run = run_oracle_pipeline(ROOMY, 2, lambda *_: [1, 3], lambda _: 0.0, [0, 0], [2, 2], [2, 2], tokens=True)
    assert run["token_s"] == [[4, 10], [7, 13]]


def test_a_lane_fixes_its_batch_when_stage_0_takes_it():
    run = run_oracle_pipeline(
        ROOMY, 2, lambda *_: [1, 1], lambda _: 0.0, [0, 0.25, 0.75, 0.8], [2] * 4, [1] * 4, records=True
    )
    assert run["lane"].tolist() == [0, 1, 0, 1]
    assert [(s.start_s, s.prefill_indices) for s in run["steps"]] == [(0, [0]), (1, [1, 3]), (2, [2])]
    assert run["finish_s"].tolist() == [2, 3, 4, 3]


def test_stage_0_serves_the_lane_that_was_ready_first_and_of_two_the_lower():
    # At t = 1 lane 0 has just finished with work left, lanes 1 and 2 wait since 0.2; one stage, so no overlap.
    run = run_oracle_pipeline(
        ROOMY, 3, lambda *_: [1.0], lambda _: 0.0, [0, 0.2, 0.2, 0.5], [2] * 4, [1] * 4, records=True
    )
    assert [(s.lane, s.start_s) for s in run["steps"]] == [(0, 0), (1, 1), (2, 2), (0, 3)]


def test_pipeline_transfers_carry_every_token_of_the_step():
    tokens: list[int] = []
    run_oracle_pipeline(ROOMY, 1, lambda *_: [1.0, 1.0], lambda n: tokens.append(n) or 0.0, [0, 1], [5, 7], [2, 1])
    assert tokens == [5, 1 + 7]


# Laws on random work under KV pressure


def random_work(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = 60
    arrivals = np.cumsum(rng.exponential(2.0, n))
    if seed % 3 == 0:
        arrivals = np.round(arrivals)
    return arrivals, rng.integers(1, 30, n), rng.integers(1, 20, n)


VARIANTS = {
    "replica": lambda config, *work, **ask: run_oracle(config, affine, *work, **ask),
    "closed": lambda config, _, *work, **ask: run_oracle_closed_loop(config, affine, 7, *work, **ask),
    "lockstep": lambda config, *work, **ask: run_oracle_lockstep(
        config, 3, lambda batches: max(affine(*batch) for batch in batches), *work, **ask
    ),
    "pipeline": lambda config, *work, **ask: run_oracle_pipeline(
        replace(config, kv_blocks=2 * config.kv_blocks),
        2,
        lambda *batch: [0.4 * affine(*batch), 0.6 * affine(*batch)],
        lambda tokens: 0.01 * tokens,
        *work,
        **ask,
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_laws_hold_under_kv_pressure(policy, variant):
    config = OracleConfig(policy, max_seqs=6, token_budget=40, block_tokens=4, max_context_tokens=46, kv_blocks=14)
    preemptions = 0
    for seed in range(6):
        arrivals, prompts, outputs = random_work(seed)
        run = VARIANTS[variant](config, arrivals, prompts, outputs, tokens=True, records=True)
        ran = ~run["rejected"]
        assert ran.any()

        # Everything that was let in finishes, with its tokens in order and none lost.
        assert [len(t) for t in run["token_s"]] == np.where(ran, outputs, 0).tolist()
        assert all((np.diff(t) > 0).all() for t in run["token_s"])
        for earlier, later in [("arrival_s", "first_schedule_s"), ("first_token_s", "finish_s")]:
            assert (run[earlier][ran] <= run[later][ran]).all()
        assert (run["first_schedule_s"][ran] < run["first_token_s"][ran]).all()
        assert np.isnan(run["first_schedule_s"][~ran]).all()

        last_end = {}
        for step in run["steps"]:
            assert step.free_blocks >= 0
            assert step.free_blocks + step.held_blocks == config.kv_blocks
            assert step.decode_sequences + len(step.items) <= config.max_seqs
            if policy in ("chunked", "orca"):
                assert step.decode_sequences + sum(new for new, _ in step.items) <= config.token_budget
            if policy in ("prefill-first", "static"):
                assert not (step.decode_sequences and step.items)
            assert step.start_s >= last_end.get(step.lane, 0.0)
            last_end[step.lane] = step.end_s

        # Each request prefills its prompt once; only a preemption makes it do so again.
        prefilled = sum(new for step in run["steps"] for new, _ in step.items)
        assert prefilled >= prompts[ran].sum()
        if not run["preemptions"].any():
            assert prefilled == prompts[ran].sum()
        preemptions += run["preemptions"].sum()

        again = VARIANTS[variant](config, arrivals, prompts, outputs)
        np.testing.assert_array_equal(again["finish_s"], run["finish_s"])
    assert (preemptions > 0) == (policy != "static")


def test_one_lane_variants_agree_with_the_replica():
    config = OracleConfig("chunked", max_seqs=6, token_budget=40, block_tokens=4, max_context_tokens=46, kv_blocks=14)
    for seed in range(6):
        work = random_work(seed)
        alone = run_oracle(config, affine, *work)
        locked = run_oracle_lockstep(config, 1, lambda batches: affine(*batches[0]), *work)
        piped = run_oracle_pipeline(config, 1, lambda *batch: [affine(*batch)], lambda _: 0.0, *work)
        for name in ("first_schedule_s", "first_token_s", "finish_s", "preemptions"):
            np.testing.assert_array_equal(alone[name], locked[name])
            np.testing.assert_array_equal(alone[name], piped[name])
