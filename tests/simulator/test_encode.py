"""Encode pools: theory for one worker, laws for many, the same as a slow event-by-event pool, and the baseline."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations_with_replacement
from math import ceil, inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hwmodels.engine import Engine
from hwmodels.hardware import load_device
from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel, Tables
from simulator.deployment import Deployment, ReplicaSpec
from simulator.encode import EncodePool, EncodeSpec, Images, encode_stage, reached, spread
from simulator.encodehere import OwnEncoder
from simulator.errors import PoolError, TraceError
from simulator.scheduler import SchedulerConfig
from simulator.simulate import simulate
from simulator.workload import Requests, Workload

TILE_S = 0.01


def linear(most: int, *, fixed_s: float = 0.0) -> list[float]:
    """Seconds of batches up to `most` tiles."""
    return [0.0] + [fixed_s + TILE_S * tiles for tiles in range(1, most + 1)]


def poisson(seed: int, rate_per_s: float, count: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate_per_s, count))


def assert_mean(values: np.ndarray, expected: float, *, within: float = 0.03, batches: int = 20) -> None:
    """The mean is within 3 % of theory, or theory within the 99.9 % confidence interval of the batch means."""
    means = np.array([batch.mean() for batch in np.array_split(values, batches)])
    half = stats.t.ppf(0.9995, batches - 1) * means.std(ddof=1) / np.sqrt(batches)
    assert half < 0.1 * expected, "too few requests to say anything"
    assert abs(values.mean() - expected) <= max(within * expected, half)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_worker_and_single_tiles_are_m_d_1(load: float) -> None:
    """Waiting rho s / (2 (1 - rho)) before a service of s."""
    arrival_s = poisson(1, load / TILE_S, 200_000)
    encoded = encode_stage(EncodeSpec(linear(1), workers=1), arrival_s, np.ones(200_000, dtype=int), record=False)
    assert_mean(encoded.ready_s - arrival_s - TILE_S, load * TILE_S / (2 * (1 - load)))
    assert encoded.busy_s[0] == pytest.approx(200_000 * TILE_S)


def test_tiles_in_unequal_numbers_are_m_g_1() -> None:
    """Pollaczek and Khinchine: lambda E[s^2] / (2 (1 - rho)), requests of 1 or 9 tiles one tile a batch."""
    rng = np.random.default_rng(2)
    tiles = rng.choice([1, 9], p=[0.75, 0.25], size=200_000)
    load, mean, square = 0.6, 3.0 * TILE_S, 21.0 * TILE_S**2
    arrival_s = poisson(3, load / mean, 200_000)
    encoded = encode_stage(EncodeSpec(linear(1), workers=1), arrival_s, tiles, record=False)
    assert_mean(encoded.ready_s - arrival_s - tiles * TILE_S, load / mean * square / (2 * (1 - load)))


def test_spread_over_all_workers_is_one_worker_as_fast_as_all() -> None:
    """Requests of 6 tiles over 6 workers: M/D/1 with a service of one tile."""
    load = 0.7
    arrival_s = poisson(4, load / TILE_S, 100_000)
    spec = EncodeSpec(linear(1), workers=6, shards=6)
    encoded = encode_stage(spec, arrival_s, np.full(100_000, 6), record=False)
    assert_mean(encoded.ready_s - arrival_s - TILE_S, load * TILE_S / (2 * (1 - load)))


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 12))
def test_idle_workers_take_as_many_batches_as_the_largest_share(tiles: int, workers: int, shards: int) -> None:
    """ceil(tiles / k) batches of one tile, k the workers a request may be spread over."""
    spec = EncodeSpec(linear(1), workers=workers, shards=shards)
    encoded = encode_stage(spec, [5.0], [tiles])
    rounds = ceil(tiles / min(workers, shards))
    assert encoded.ready_s[0] == pytest.approx(5.0 + rounds * TILE_S, rel=1e-12)
    assert max(Counter(encoded.batches[:, 0]).values()) == rounds


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 7), st.integers(1, 4))
def test_spread_is_as_level_as_any_other(backlogs: list[int], tiles: int, most: int) -> None:
    """Against all ways to give the tiles away, by the largest backlog among the workers that get some."""
    shares = spread(backlogs, tiles, most)
    assert sum(share for _, share in shares) == tiles
    assert len({worker for worker, _ in shares}) == len(shares) <= most
    assert all(share > 0 for _, share in shares)
    best = inf
    for picked in combinations_with_replacement(range(len(backlogs)), tiles):
        given_to = Counter(picked)
        if len(given_to) <= most:
            best = min(best, max(backlogs[worker] + share for worker, share in given_to.items()))
    assert max(backlogs[worker] + share for worker, share in shares) == best


specs = st.builds(
    lambda workers, batch, shards, fixed, rate, latency: EncodeSpec(
        linear(batch, fixed_s=fixed), workers, batch, shards, tile_bytes=1.0, bytes_per_s=rate, latency_s=latency
    ),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.004]),
    st.sampled_from([inf, 1000.0, 70.0]),
    st.sampled_from([0.0, 0.002]),
)
#: Gaps on a grid, so that arrivals and batches meet at the same instants, and tiles.
traffic = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=40)


def arranged(requests: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    gaps, tiles = np.array(requests).T
    return np.cumsum(gaps) * TILE_S / 2, tiles


def slow_pool(spec: EncodeSpec, arrival_s: np.ndarray, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tile by tile: queues of single tiles, looked at whenever a request arrives or a batch ends; ready and begun."""
    queues: list[list[tuple[float, int]]] = [[] for _ in range(spec.workers)]
    ends, sizes = [0.0] * spec.workers, [0] * spec.workers
    link = [0.0] * spec.workers
    ready, begun = arrival_s.astype(float).copy(), np.full(len(tiles), np.nan)

    def work(until_s: float) -> None:
        for index, queue in enumerate(queues):
            while queue and max(ends[index], queue[0][0]) < until_s:
                start = max(ends[index], queue[0][0])
                batch = [r for at, r in queue if at <= start][: spec.batch_tiles]
                del queue[: len(batch)]
                ends[index], sizes[index] = start + spec.times_s[len(batch)], len(batch)
                for request, count in Counter(batch).items():
                    begun[request] = np.fmin(begun[request], start)
                    link[index] = max(link[index], ends[index]) + count * spec.tile_bytes / spec.bytes_per_s
                    ready[request] = max(ready[request], link[index] + spec.latency_s)

    for request, (at, count) in enumerate(zip(arrival_s, tiles, strict=True)):
        if count:
            work(at)
            backlogs = [len(q) + (sizes[i] if ends[i] > at else 0) for i, q in enumerate(queues)]
            for index, share in spread(backlogs, int(count), spec.shards):
                queues[index] += [(at, request)] * share
    work(inf)
    return ready, begun


@settings(max_examples=200)
@given(specs, traffic)
def test_the_same_as_a_pool_that_handles_every_tile(spec: EncodeSpec, requests: list[tuple[int, int]]) -> None:
    arrival_s, tiles = arranged(requests)
    found, (ready, begun) = encode_stage(spec, arrival_s, tiles), slow_pool(spec, arrival_s, tiles)
    assert found.ready_s == pytest.approx(ready, rel=1e-12)
    assert found.begun_s == pytest.approx(begun, rel=1e-12, nan_ok=True)


@settings(max_examples=200)
@given(specs, traffic)
def test_laws(spec: EncodeSpec, requests: list[tuple[int, int]]) -> None:
    arrival_s, tiles = arranged(requests)
    encoded = encode_stage(spec, arrival_s, tiles)
    pushed, last = np.zeros(len(tiles)), arrival_s.copy()
    sent: dict[float, float] = defaultdict(float)
    for request, worker, count, sent_s, landed_s in encoded.pushes:
        pushed[int(request)] += count
        last[int(request)] = max(last[int(request)], landed_s)
        # No push beats bytes over bandwidth, and a link carries one after the other.
        gone_s = sent_s + count * spec.tile_bytes / spec.bytes_per_s
        assert landed_s == pytest.approx(gone_s + spec.latency_s, rel=1e-12)
        assert sent_s >= sent[worker] - 1e-12
        sent[worker] = gone_s
    assert pushed.tolist() == tiles.tolist()  # every tile is encoded once
    assert encoded.ready_s.tolist() == last.tolist()  # the prompt is ready with the last push, whichever that is
    assert np.all(encoded.ready_s[tiles == 0] == arrival_s[tiles == 0])
    assert encoded.batches[:, 3].sum() == tiles.sum()
    busy, end = np.zeros(spec.workers), np.zeros(spec.workers)
    for number, start_s, end_s, count in encoded.batches:
        worker = int(number)
        assert 1 <= count <= spec.batch_tiles
        assert end_s - start_s == pytest.approx(spec.times_s[int(count)], rel=1e-9)
        # Nobody idles while tiles wait: a batch starts when the one before ends, or with an arrival.
        assert start_s == end[worker] or (start_s > end[worker] and start_s in arrival_s)
        busy[worker] += spec.times_s[int(count)]
        end[worker] = end_s
    assert encoded.busy_s == pytest.approx(busy, rel=1e-12)


@given(specs, traffic, st.lists(st.integers(0, 40), max_size=20))
def test_looking_at_a_pool_does_not_change_it(
    spec: EncodeSpec, requests: list[tuple[int, int]], looks: list[int]
) -> None:
    """Batches may be formed at any moments in between: same times, same batches; and again the same."""
    arrival_s, tiles = arranged(requests)
    pool = EncodePool(spec, len(tiles), record=True)
    moments = sorted(look * TILE_S / 4 for look in looks)
    for request, (at_s, count) in enumerate(zip(arrival_s.tolist(), tiles.tolist(), strict=True)):
        while moments and moments[0] <= at_s:
            pool.advance(moments.pop(0))
        pool.offer(request, count, at_s)
    pool.advance(inf)
    assert pool.waiting == 0
    found, expected = pool.encoded(), encode_stage(spec, arrival_s, tiles)
    for name in ("ready_s", "busy_s", "batches", "pushes"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


@given(st.integers(1, 5), st.integers(1, 8), st.permutations([0, 3, 1, 7, 2, 7]))
def test_equal_requests_may_come_in_any_order(workers: int, shards: int, order: list[int]) -> None:
    """Requests of one moment: the sum of tiles decides when the pool has done them all, whoever comes first."""
    spec = EncodeSpec(linear(1), workers=workers, shards=max(workers, shards))
    tiles = np.array(order)
    encoded = encode_stage(spec, np.full(6, 2.0), tiles)
    assert encoded.ready_s.max() == pytest.approx(2.0 + ceil(tiles.sum() / workers) * TILE_S, rel=1e-12)


def test_spreading_a_request_shortens_its_way_and_costs_nothing() -> None:
    """6 workers, 20 tiles, light load: a sixth of the time, but for rounding up; the same work."""
    arrival_s = poisson(5, 0.02 / TILE_S, 2000)
    tiles = np.full(2000, 20)
    whole = encode_stage(EncodeSpec(linear(20), 6, 20, shards=1), arrival_s, tiles, record=False)
    spread_out = encode_stage(EncodeSpec(linear(20), 6, 20, shards=6), arrival_s, tiles, record=False)
    assert np.median(whole.ready_s - arrival_s) == pytest.approx(20 * TILE_S)
    assert np.median(spread_out.ready_s - arrival_s) == pytest.approx(4 * TILE_S)
    assert spread_out.busy_s.sum() == pytest.approx(whole.busy_s.sum())


def test_a_link_slower_than_the_encoder_is_what_counts() -> None:
    """100 requests at once, 2 tiles each of 1 byte at 50 byte/s: 40 ms of link beside 20 ms of encoding."""
    spec = EncodeSpec(linear(2), 1, 2, tile_bytes=1.0, bytes_per_s=50.0, latency_s=0.5)
    encoded = encode_stage(spec, np.zeros(100), np.full(100, 2))
    assert encoded.ready_s.max() == pytest.approx(0.02 + 100 * 0.04 + 0.5)
    assert encoded.busy_s[0] == pytest.approx(100 * 0.02)


@settings(max_examples=30)
@given(specs)
def test_a_pool_with_plenty_to_do_reaches_its_rate(spec: EncodeSpec) -> None:
    """Two thousand tiles a worker at once: never faster than tiles_per_s, and only the start and the end below it."""
    tiles = 2000 * spec.workers
    encoded = encode_stage(spec, np.zeros(tiles), np.ones(tiles, dtype=int), record=False)
    assert encoded.ready_s.max() >= tiles / spec.tiles_per_s * (1 - 1e-9)
    assert encoded.ready_s.max() == pytest.approx(tiles / spec.tiles_per_s, rel=0.01)


def test_requests_reach_prefill_in_the_order_their_prompts_are_complete() -> None:
    requests = Requests([0.0, 0.01, 0.02], [100, 7, 50], [1, 2, 3])
    images = Images(np.array([9, 0, 1]), tokens=64)
    spec = EncodeSpec(linear(1), workers=2)
    prompts = images.prompts(requests)
    assert prompts.prompt_tokens.tolist() == [100 + 576, 7, 114]
    arrived = reached(prompts, encode_stage(spec, requests.arrival_s, images.of(3)).ready_s)
    assert arrived.order.tolist() == [1, 2, 0]
    assert arrived.requests.arrival_s == pytest.approx([0.01, 0.03, 0.09])
    assert arrived.requests.prompt_tokens.tolist() == [7, 114, 676]
    assert arrived.requests.output_tokens.tolist() == [2, 3, 1]
    assert arrived.back(arrived.requests.arrival_s) == pytest.approx([0.09, 0.01, 0.03])


def test_bad_input_is_told_in_one_line() -> None:
    for bad, said in (
        (lambda: EncodeSpec(linear(4), workers=0), "workers = 0: expected at least 1"),
        (lambda: EncodeSpec(linear(4), 1, batch_tiles=5), "times are known up to 4 tiles"),
        (lambda: EncodeSpec(linear(4), 1, bytes_per_s=0.0), "expected a positive rate"),
        (lambda: OwnEncoder(linear(4), 5), "expected 1 to 4"),
        (lambda: OwnEncoder(linear(4), 4, ranks=0), "ranks = 0"),
    ):
        with pytest.raises(PoolError, match=said):
            bad()
    for bad, said in (
        (lambda: Images(np.array([1, -2]), 64), r"tiles\[1\] is -2: expected one whole number"),
        (lambda: Images(np.array([1.5]), 64), r"tiles\[0\] is 1.5"),
        (lambda: Images(np.array([1]), 0), "tokens = 0"),
        (lambda: Images(np.array([1, 2]), 64).of(3), "2 entries: expected one for each of the 3"),
        (lambda: encode_stage(EncodeSpec(linear(1), 1), [0.0], [1, 2]), "1 arrivals and 2 tile counts"),
        (lambda: encode_stage(EncodeSpec(linear(1), 1), [1.0, 0.0], [1, 2]), "in order of arrival"),
    ):
        with pytest.raises(TraceError, match=said):
            bad()


# The baseline: a replica that encodes for itself.

DEVICE = load_device("h100-sxm")
CONFIG = SchedulerConfig("prefill-first", max_seqs=8, token_budget=256, max_context_tokens=4096)
PROMPT_S, DECODE_S = 0.001, 0.005


def step_model() -> StepModel:
    """Prompt tokens of PROMPT_S each beside decode steps of DECODE_S."""
    nothing = [0.0] * 257
    prefill = Pieces((), ([PROMPT_S * n for n in range(257)],), (nothing,))
    decode = Pieces((), ([0.0] + [DECODE_S] * 256,), (nothing,))
    engine = Engine("none", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
    return StepModel([Tables(nothing, [0.0], nothing, decode, prefill)], nothing, engine, 256, 64)


def encoding(*, batch_tiles: int = 64, config: SchedulerConfig = CONFIG, blocks: int = 10_000) -> Deployment:
    encoder = OwnEncoder(linear(64, fixed_s=0.002), batch_tiles)
    return Deployment([ReplicaSpec(step_model(), Mapping(), config, blocks, DEVICE, encoder=encoder)])


def seen(requests: Requests, tiles: list[int]) -> Workload:
    """Images whose tokens are counted in the prompts already, but for one a tile."""
    images = Images(np.array(tiles), tokens=1)
    text = replace(requests, prompt_tokens=requests.prompt_tokens - images.of(len(requests)))
    return Workload(text, images=images)


def plain(config: SchedulerConfig = CONFIG, blocks: int = 10_000) -> Deployment:
    return Deployment([ReplicaSpec(step_model(), Mapping(), config, blocks, DEVICE)])


def test_a_lone_request_is_encoded_and_then_prefilled() -> None:
    """7 tiles in batches of 3: two full ones and a single tile, 2 ms each beside the tiles; 40 prompt tokens."""
    frame = simulate(encoding(batch_tiles=3), seen(Requests([1.0], [40], [3]), [7])).requests
    assert frame.ttft_s[0] == pytest.approx(7 * TILE_S + 3 * 0.002 + 40 * PROMPT_S)
    assert frame.e2e_s[0] == pytest.approx(frame.ttft_s[0] + 2 * DECODE_S)


def test_encoding_holds_up_the_decodes_beside_it() -> None:
    """The first request's answer pauses for the second one's tiles and prompt."""
    requests = Requests([0.0, 0.1], [10, 30], [100, 1])
    alone = simulate(plain(), requests).requests
    both = simulate(encoding(), seen(requests, [0, 20])).requests
    assert both.finish_s[0] - alone.finish_s[0] == pytest.approx(20 * TILE_S + 0.002)
    assert both.ttft_s[1] - alone.ttft_s[1] == pytest.approx(20 * TILE_S + 0.002)


def test_text_alone_takes_as_long_as_without_an_encoder() -> None:
    rng = np.random.default_rng(6)
    requests = Requests(poisson(7, 20.0, 300), rng.integers(1, 200, 300), rng.integers(1, 40, 300))
    assert (
        simulate(encoding(), seen(requests, [0] * 300)).requests.finish_s.tolist()
        == simulate(plain(), requests).requests.finish_s.tolist()
    )


@pytest.mark.parametrize("load", [0.4, 0.7])
def test_one_request_at_a_time_is_m_d_1_of_both_times(load: float) -> None:
    """Service is the time to encode and to prefill; waiting is to the first schedule."""
    config = SchedulerConfig("prefill-first", max_seqs=1, token_budget=256, max_context_tokens=4096)
    service_s = 0.002 + 4 * TILE_S + 20 * PROMPT_S
    arrival_s = poisson(8, load / service_s, 60_000)
    requests = Requests(arrival_s, np.full(60_000, 20), np.ones(60_000, dtype=int))
    found = simulate(encoding(config=config), seen(requests, [4] * 60_000), record=False).requests
    assert_mean(found.queue_s.to_numpy(), load * service_s / (2 * (1 - load)))
    assert found.ttft_s.min() == pytest.approx(service_s)


def test_a_preempted_request_is_not_encoded_again() -> None:
    """Eight answers outgrow the KV blocks; all replicas' time is steps and one encoding of each request."""
    config = SchedulerConfig("prefill-first", max_seqs=8, token_budget=256, block_tokens=16, max_context_tokens=240)
    requests = Requests(np.zeros(8), np.full(8, 32), np.full(8, 100))
    deployment = encoding(config=config, blocks=40)
    result = simulate(deployment, seen(requests, [5] * 8))
    without = simulate(plain(config, 40), requests)
    assert result.requests.preemptions.sum() > 0
    assert result.requests.preemptions.tolist() == without.requests.preemptions.tolist()
    extra = result.requests.finish_s.max() - without.requests.finish_s.max()
    assert extra == pytest.approx(0.002 + 8 * 5 * TILE_S)  # all eight prompts begin in one step
