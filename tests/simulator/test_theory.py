"""Queueing theory knows the answers to simple systems; the simulator finds the same numbers.

A replica that runs one request at a time and whose requests are one prompt chunk and one token is a single server: the
service time is the time of that chunk. Waiting time is queue_s, arrival to first schedule.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hwmodels.engine import Engine
from hwmodels.hardware import load_device
from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel, Tables
from simulator.deployment import Deployment, ReplicaSpec
from simulator.routers import ROUTERS
from simulator.scheduler import SchedulerConfig
from simulator.simulate import simulate
from simulator.workload import Requests, Workload

SERVICE_S = 0.01  # per prompt token
MAX_TOKENS, MAX_SEQS = 512, 64
DEVICE = load_device("h100-sxm")


def per_token(max_seqs: int = MAX_SEQS, *, fixed_s: float = 0.0) -> StepModel:
    """Steps of fixed_s + SERVICE_S a token, and nothing else."""
    nothing = [0.0] * (MAX_TOKENS + 1)
    linear = [0.0] + [fixed_s + SERVICE_S * tokens for tokens in range(1, MAX_TOKENS + 1)]
    free = Pieces((), (nothing,), (nothing,))
    engine = Engine("none", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
    return StepModel([Tables(linear, [0.0], nothing, free, free)], nothing, engine, MAX_TOKENS, max_seqs)


def server(*, max_seqs: int = 1, fixed_s: float = 0.0) -> ReplicaSpec:
    config = SchedulerConfig(max_seqs=max_seqs, token_budget=MAX_TOKENS, block_tokens=16, max_context_tokens=4096)
    return ReplicaSpec(per_token(fixed_s=fixed_s), Mapping(), config, 1_000_000, DEVICE)


def poisson(rng: np.random.Generator, rate_per_s: float, prompts: np.ndarray) -> Requests:
    arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, len(prompts)))
    return Requests(arrival_s, prompts, np.ones(len(prompts), dtype=int))


def serve(spec: ReplicaSpec, requests: Requests | Workload) -> pd.DataFrame:
    return simulate(Deployment([spec]), requests, record=False).requests


def assert_mean(values: np.ndarray, expected: float, *, within: float = 0.03, batches: int = 20) -> None:
    """The mean is within 3 % of theory, or theory within the 99.9 % confidence interval of the batch means."""
    means = np.array([batch.mean() for batch in np.array_split(values, batches)])
    half = stats.t.ppf(0.9995, batches - 1) * means.std(ddof=1) / np.sqrt(batches)
    assert half < 0.08 * expected, "too few requests to say anything"
    assert abs(values.mean() - expected) <= max(within * expected, half)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_m_d_1_waiting_time(load: float) -> None:
    """rho s / (2 (1 - rho)) with service time s."""
    requests = poisson(np.random.default_rng(1), load / SERVICE_S, np.ones(150_000, dtype=int))
    wait_s = serve(server(), requests).queue_s.to_numpy()
    assert_mean(wait_s, load * SERVICE_S / (2 * (1 - load)))


@pytest.mark.parametrize("load", [0.3, 0.65])
def test_m_g_1_waiting_time(load: float) -> None:
    """Pollaczek and Khinchine: lambda E[s^2] / (2 (1 - rho)), here with service times of 1 or 9 units."""
    rng = np.random.default_rng(2)
    prompts = rng.choice([1, 9], p=[0.75, 0.25], size=200_000)
    mean, square = 3.0 * SERVICE_S, 21.0 * SERVICE_S**2
    rate = load / mean
    wait_s = serve(server(), poisson(rng, rate, prompts)).queue_s.to_numpy()
    assert_mean(wait_s, rate * square / (2 * (1 - load)))


def test_m_m_1_time_in_system() -> None:
    """s / (1 - rho): geometric prompts of many short tokens are nearly exponential service."""
    rng = np.random.default_rng(3)
    prompts = np.minimum(rng.geometric(1 / 40, size=150_000), MAX_TOKENS)
    mean_s, load = 40 * SERVICE_S, 0.7
    served = serve(server(), poisson(rng, load / mean_s, prompts))
    assert_mean(served.e2e_s.to_numpy(), mean_s / (1 - load), within=0.04)


def test_light_load_does_not_wait() -> None:
    """As the load goes to zero, TTFT is the time of the prompt alone."""
    requests = poisson(np.random.default_rng(4), 1e-4 / SERVICE_S, np.full(2000, 7))
    served = serve(server(), requests)
    assert served.ttft_s.median() == pytest.approx(7 * SERVICE_S, rel=1e-9)


def test_littles_law() -> None:
    """Requests in the system, averaged over time, are throughput times mean time in it; exact on an emptied system."""
    rng = np.random.default_rng(5)
    count = 20_000
    arrival_s = np.cumsum(rng.exponential(1.2 * SERVICE_S, count))
    requests = Requests(arrival_s, rng.integers(1, 4, count), rng.integers(1, 30, count))
    served = serve(server(max_seqs=16, fixed_s=SERVICE_S), requests)
    times = np.concatenate([served.arrival_s, served.finish_s])
    change = np.concatenate([np.ones(count), -np.ones(count)])
    order = np.argsort(times, kind="stable")
    span_s = times.max() - times.min()
    inside = float(np.sum(np.cumsum(change[order])[:-1] * np.diff(times[order]))) / span_s
    assert inside == pytest.approx(count / span_s * served.e2e_s.mean(), rel=1e-9)


@pytest.mark.parametrize("load", [0.25, 0.5, 0.9])
def test_utilisation(load: float) -> None:
    """The share of time the server works is arrival rate times service time."""
    requests = poisson(np.random.default_rng(6), load / SERVICE_S, np.ones(50_000, dtype=int))
    steps = simulate(Deployment([server()]), requests).steps
    assert steps is not None
    busy_s = (steps.end_s - steps.start_s).sum()
    assert busy_s == pytest.approx(50_000 * SERVICE_S, rel=1e-9)
    assert busy_s / (steps.end_s.max() - requests.arrival_s[0]) == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("clients", [1, 4, 16])
@pytest.mark.parametrize("think_s", [0.0, 0.5])
def test_closed_loop_throughput(clients: int, think_s: float) -> None:
    """N clients that wait for an answer and think: throughput is N / (response + think), and at most 1 / service."""
    count = 4000
    requests = Requests(np.zeros(count), np.full(count, 3), np.ones(count, dtype=int))
    served = serve(server(), Workload(requests, concurrency=clients, think_s=think_s))
    per_s = (count - 1) / (served.finish_s.max() - served.finish_s.min())
    settled = served.iloc[count // 4 : -clients]
    assert per_s == pytest.approx(clients / (settled.e2e_s.mean() + think_s), rel=0.02)
    service_s = 3 * SERVICE_S
    assert per_s == pytest.approx(min(1 / service_s, clients / (service_s + think_s)), rel=0.02)


def test_batched_decode_throughput() -> None:
    """N endless decodes on steps of a + b N: the k-th token of all is out after k steps."""
    clients, fixed_s, outputs = 8, 0.05, 400
    requests = Requests(np.zeros(clients), np.ones(clients, dtype=int), np.full(clients, outputs))
    served = serve(server(max_seqs=clients, fixed_s=fixed_s), requests)
    assert served.finish_s.max() == pytest.approx(outputs * (fixed_s + clients * SERVICE_S), rel=1e-9)


def test_random_split_is_four_queues() -> None:
    """A Poisson stream dealt out at random is four Poisson streams: M/D/1 each."""
    load, servers = 0.6, 4
    requests = poisson(np.random.default_rng(8), servers * load / SERVICE_S, np.ones(100_000, dtype=int))
    served = simulate(Deployment([server()] * servers, ROUTERS["random"]), requests, record=False).requests
    assert_mean(served.queue_s.to_numpy(), load * SERVICE_S / (2 * (1 - load)))


def test_round_robin_of_equal_requests_is_one_queue() -> None:
    """Equal services end in the order they began: the n-th request gets the server of request n - 4 (M/D/4); exact."""
    servers = 4
    requests = poisson(np.random.default_rng(9), 3.2 / SERVICE_S, np.ones(5000, dtype=int))
    served = simulate(Deployment([server()] * servers), requests, record=False).requests
    start_s = requests.arrival_s.copy()
    for n in range(servers, len(start_s)):
        start_s[n] = max(start_s[n], start_s[n - servers] + SERVICE_S)
    np.testing.assert_allclose(served.first_schedule_s, start_s, rtol=1e-9)


def test_the_more_a_router_knows_the_less_requests_wait() -> None:
    """Waiting under services of very different length: random > round-robin > power of two > least tokens."""
    rng = np.random.default_rng(10)
    prompts = rng.choice([1, 20], p=[0.9, 0.1], size=60_000)
    requests = poisson(rng, 4 * 0.8 / (2.9 * SERVICE_S), prompts)
    mean_s = [
        simulate(Deployment([server()] * 4, ROUTERS[name]), requests, record=False).requests.queue_s.mean()
        for name in ("random", "round-robin", "power-of-two", "least-tokens")
    ]
    assert all(worse > 1.1 * better for worse, better in pairwise(mean_s)), mean_s
