"""Routers: shares are kept, loads are looked at, and one replica leaves nothing to choose."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from hwmodels.engine import Engine
from hwmodels.hardware import load_device
from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel, Tables
from simulator.deployment import Deployment, ReplicaSpec
from simulator.routers import ROUTERS, least_tokens, power_of_two, random, round_robin
from simulator.scheduler import SchedulerConfig
from simulator.simulate import simulate
from simulator.workload import Requests, Workload

MAX_TOKENS, MAX_SEQS = 256, 16
LOAD_BLIND = (round_robin, random)


@dataclass
class Replica:
    """What a router sees of one."""

    outstanding_tokens: int
    missing_tokens: int = 0


def spec(share: float = 1.0) -> ReplicaSpec:
    """A replica with steps of 10 ms + 0.1 ms a token."""
    nothing = [0.0] * (MAX_TOKENS + 1)
    linear = [0.01 + 1e-4 * tokens for tokens in range(MAX_TOKENS + 1)]
    free = Pieces((), (nothing,), (nothing,))
    engine = Engine("none", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
    model = StepModel([Tables(linear, [0.0], nothing, free, free)], nothing, engine, MAX_TOKENS, MAX_SEQS)
    config = SchedulerConfig(max_seqs=MAX_SEQS, token_budget=MAX_TOKENS, max_context_tokens=600)
    return ReplicaSpec(model, Mapping(), config, 10_000, load_device("h100-sxm"), share)


def chat(seed: int, count: int = 400, gap_s: float = 0.02) -> Requests:
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(gap_s, count))
    return Requests(arrival_s, rng.integers(1, 200, count), rng.integers(1, 60, count))


def shares_of(router: str, shares: list[float], requests: Requests) -> np.ndarray:
    frame = simulate(Deployment([spec(share) for share in shares], ROUTERS[router]), requests, record=False).requests
    assert frame.finish_s.notna().all()
    return np.bincount(frame.replica, minlength=len(shares)) / len(requests)


def test_round_robin_takes_turns() -> None:
    assert round_robin.assign is not None
    turns = round_robin.assign(7, np.ones(3), np.random.default_rng(0))
    assert turns.tolist() == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("shares", [[3.0, 1.0], [1.0, 2.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
def test_round_robin_is_never_a_request_off_its_shares(shares: list[float]) -> None:
    assert round_robin.assign is not None
    count = 997
    chosen = round_robin.assign(count, np.array(shares), np.random.default_rng(0))
    due = np.arange(1, count + 1)[:, None] * np.array(shares) / sum(shares)
    given = np.cumsum(chosen[:, None] == np.arange(len(shares)), axis=0)
    assert np.abs(given - due).max() < 1 + 1e-9


@pytest.mark.parametrize("router", LOAD_BLIND, ids=lambda router: router.name)
def test_load_blind_routers_draw_the_longer_run_as_an_extension(router: object) -> None:
    """More requests do not change where the first ones go."""
    shares = np.array([1.0, 2.0])
    short, long = (router.assign(n, shares, np.random.default_rng(5)) for n in (50, 500))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(short, long[:50])


def test_random_keeps_shares_on_average() -> None:
    assert random.assign is not None
    chosen = random.assign(40_000, np.array([1.0, 3.0]), np.random.default_rng(1))
    assert np.mean(chosen) == pytest.approx(0.75, abs=0.01)


def test_least_tokens_takes_the_emptiest_for_its_share() -> None:
    assert least_tokens.choose is not None
    replicas = [Replica(300), Replica(100), Replica(250)]
    rng = np.random.default_rng(0)
    assert least_tokens.choose(replicas, np.ones(3), rng) == 1
    assert least_tokens.choose(replicas, np.array([8.0, 1.0, 1.0]), rng) == 0
    assert least_tokens.choose([Replica(5), Replica(5)], np.ones(2), rng) == 0


def test_power_of_two_avoids_the_fullest() -> None:
    """The fullest of three loses against whichever it is drawn with; the emptiest is drawn two times in three."""
    assert power_of_two.choose is not None
    rng = np.random.default_rng(2)
    replicas = [Replica(10), Replica(20), Replica(30)]
    chosen = [power_of_two.choose(replicas, np.ones(3), rng) for _ in range(6000)]
    assert np.bincount(chosen, minlength=3) / 6000 == pytest.approx([2 / 3, 1 / 3, 0.0], abs=0.02)


@pytest.mark.parametrize("router", ROUTERS)
def test_larger_shares_get_more(router: str) -> None:
    """Three in four where loads are not looked at; less where they are, since the replicas are equally fast."""
    given = shares_of(router, [3.0, 1.0], chat(3, count=1500, gap_s=0.006))
    if ROUTERS[router].assign is not None:
        assert given[0] == pytest.approx(0.75, abs=0.03)
    else:
        assert 0.55 < given[0] < 0.8


@pytest.mark.parametrize("concurrency", [None, 5])
def test_one_replica_leaves_nothing_to_choose(concurrency: int | None) -> None:
    """All routers give every request the same times."""
    workload = Workload(chat(4), concurrency=concurrency)
    frames = [
        simulate(Deployment([spec()], router), workload, seed=seed, record=False).requests
        for seed, router in enumerate(ROUTERS.values())
    ]
    for frame in frames[1:]:
        for column in ("first_schedule_s", "first_token_s", "finish_s"):
            np.testing.assert_allclose(frame[column], frames[0][column], rtol=1e-9, err_msg=column)


@pytest.mark.parametrize("router", ROUTERS)
def test_twice_the_replicas_for_twice_the_traffic(router: str) -> None:
    """Each of two replicas serves about half, no slower than one that is alone with half the traffic."""
    alone = simulate(Deployment([spec()]), chat(5, 800, 0.04), record=False).requests
    pair = simulate(Deployment([spec(), spec()], ROUTERS[router]), chat(5, 800, 0.02), record=False).requests
    assert np.mean(pair.replica) == pytest.approx(0.5, abs=0.08)
    assert pair.e2e_s.mean() < 1.1 * alone.e2e_s.mean()


def test_a_prompt_in_its_step_counts_as_load() -> None:
    """The second of two requests goes to the other replica although the first has left the queue."""
    requests = Requests(np.array([0.0, 0.001]), np.array([200, 200]), np.array([1, 1]))
    frame = simulate(Deployment([spec(), spec()], least_tokens), requests, record=False).requests
    assert frame.replica.tolist() == [0, 1]


@pytest.mark.parametrize("router", ROUTERS)
def test_same_seed_same_choices(router: str) -> None:
    """And another seed changes only what is drawn."""
    deployment = Deployment([spec(), spec(), spec()], ROUTERS[router])
    first, again, other = (
        simulate(deployment, chat(6), seed=seed, record=False).requests.replica.to_numpy() for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == (router not in ("random", "power-of-two"))


def test_shares_are_relative() -> None:
    """Doubling all of them changes nothing."""
    requests = chat(7)
    for router in ROUTERS.values():
        runs = [
            simulate(
                Deployment([replace(spec(), share=scale), replace(spec(), share=2 * scale)], router),
                requests,
                record=False,
            ).requests
            for scale in (1.0, 2.0)
        ]
        np.testing.assert_array_equal(runs[0].replica, runs[1].replica)
