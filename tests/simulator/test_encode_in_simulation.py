"""Requests with images in whole runs: what an encode pool or an encoder of one's own adds, and that all else stays."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from math import inf

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.hardware import load_device
from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel, Tables
from simulator.deployment import Deployment, ReplicaSpec, Role
from simulator.encode import EncodeSpec, Images, encode_stage
from simulator.encodehere import OwnEncoder
from simulator.errors import PoolError, TraceError
from simulator.handover import Handover
from simulator.metrics import summarize
from simulator.result import Result
from simulator.routers import ROUTERS
from simulator.scheduler import SchedulerConfig
from simulator.sessions import of_contexts
from simulator.simulate import Overrun, run, simulate
from simulator.workload import Requests, Workload

MAX_TOKENS, TOKENS = 512, 8  # in a step; of a tile
PROMPT_S, DECODE_S, TILE_S = 0.0002, 0.004, 0.005
DEVICE = load_device("h100-sxm")
CONFIG = SchedulerConfig("chunked", max_seqs=16, token_budget=MAX_TOKENS, max_context_tokens=4096)


def step_model(stages: int = 1) -> StepModel:
    """Steps of PROMPT_S a prompt token and DECODE_S if there are answers, in every stage."""
    nothing = [0.0] * (MAX_TOKENS + 1)
    prefill = Pieces((), ([PROMPT_S * n for n in range(MAX_TOKENS + 1)],), (nothing,))
    decode = Pieces((), ([0.0] + [DECODE_S] * MAX_TOKENS,), (nothing,))
    engine = Engine("none", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
    tables = [Tables(nothing, 4 * nothing, nothing, decode, prefill) for _ in range(stages)]
    return StepModel(tables, nothing, engine, MAX_TOKENS, 64)


def linear(most: int, fixed_s: float = 0.001) -> list[float]:
    return [0.0] + [fixed_s + TILE_S * tiles for tiles in range(1, most + 1)]


def replica(
    role: Role = "aggregated",
    *,
    own: bool = False,
    blocks: int = 10_000,
    mapping: Mapping | None = None,
    ranks: int = 1,
) -> ReplicaSpec:
    mapping = mapping or Mapping()
    encoder = OwnEncoder(linear(8), 8, ranks) if own else None
    return ReplicaSpec(step_model(mapping.pp), mapping, CONFIG, blocks, DEVICE, role=role, encoder=encoder)


@dataclass(frozen=True)
class Straight:
    """One link, one stream, a byte a token."""

    links: tuple[int, ...] = (0,)
    shares: tuple[float, ...] = (1.0,)
    weight: float = 1.0
    latency_s: float = 0.0
    bytes_per_token: float = 1.0
    limit_bytes_per_s: float = inf


HANDOVER = Handover([1e5], ["link"], lambda *_: Straight(), 4, "serialized", overlap_tokens=1)


def deployments(own: bool = False) -> dict[str, Deployment]:
    """Replicas of all kinds behind all kinds of routers."""
    one, tight = replica(own=own), replica(own=own, blocks=60)
    pair = [replica("prefill", own=own), replica("prefill", own=own), replica("decode")]
    return {
        "alone": Deployment([one]),
        "turns": Deployment([one] * 3),
        "loads": Deployment([one] * 3, ROUTERS["least-tokens"]),
        "short of KV": Deployment([tight] * 2),
        "stages": Deployment([replica(own=own, mapping=Mapping(pp=2))] * 2),
        "groups": Deployment([replica(own=own, mapping=Mapping(attention_dp=2, ep=2))] * 2),
        "groups in stages": Deployment([replica(own=own, mapping=Mapping(attention_dp=2, ep=2, pp=2))] * 2),
        "pools": Deployment(pair, ROUTERS["least-tokens"], handover=HANDOVER),
    }


KINDS = list(deployments())


def traffic(seed: int, count: int = 150, rate_per_s: float = 60.0, most_tiles: int = 12) -> tuple[Requests, Images]:
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, count))
    requests = Requests(
        arrival_s, rng.integers(1, 300, count), rng.integers(1, 60, count), rng.integers(0, 2, count), ("a", "b")
    )
    return requests, Images(rng.integers(0, most_tiles + 1, count) * rng.integers(0, 2, count), TOKENS)


def assert_same(found: Result, expected: Result, *, but: tuple[str, ...] = ()) -> None:
    """Bit for bit, in every column of every frame."""
    for name in ("requests", "steps", "spans", "transfers", "links"):
        frames = [getattr(result, name).drop(columns=list(but), errors="ignore") for result in (found, expected)]
        pd.testing.assert_frame_equal(*frames, check_exact=True)


@pytest.mark.parametrize("kind", KINDS)
def test_without_images_nothing_changes(kind: str) -> None:
    """An encode pool or encoders that nobody needs, and images without tiles, leave the run as it is."""
    requests, _ = traffic(1)
    plain = simulate(deployments()[kind], requests, seed=3)
    pool = EncodeSpec(linear(8), 2, 8, 2)
    nothing = Workload(requests, images=Images(np.array(0), TOKENS))
    for deployment in (deployments(own=True)[kind], replace(deployments()[kind], encode=pool)):
        for load in (requests, nothing):
            assert_same(simulate(deployment, load, seed=3), plain)
    assert_same(simulate(deployments()[kind], nothing, seed=3), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_that_take_no_time_leave_longer_prompts(kind: str) -> None:
    """A worker for every request, no seconds and no bytes: text whose prompts have the images' tokens in them."""
    requests, images = traffic(2)
    plain = simulate(deployments()[kind], images.prompts(requests), seed=3)
    free = EncodeSpec([0.0] * 101, workers=len(requests), batch_tiles=100)
    pool = simulate(replace(deployments()[kind], encode=free), Workload(requests, images=images), seed=3)
    assert_same(pool, plain)
    assert pool.requests.prompt_tokens.tolist() == (requests.prompt_tokens + TOKENS * images.tiles).tolist()
    own = deployments(own=True)[kind]
    own = replace(own, replicas=[replace(s, encoder=s.encoder and OwnEncoder([0.0] * 101, 100)) for s in own.replicas])
    assert_same(simulate(own, Workload(requests, images=images), seed=3), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stage_comes_before_the_replicas(kind: str) -> None:
    """The same as to encode first, serve what comes out in its order, and to count from the users' arrivals."""
    requests, images = traffic(4)
    spec = EncodeSpec(linear(8), 3, 8, 2, tile_bytes=1.0, bytes_per_s=500.0, latency_s=0.001)
    deployment = replace(deployments()[kind], frontend_s=0.0)
    found = simulate(replace(deployment, encode=spec), Workload(requests, images=images), seed=5)
    ready_s = encode_stage(spec, requests.arrival_s, images.tiles).ready_s
    order = np.argsort(ready_s, kind="stable")
    assert (np.diff(order) < 0).any()  # or nothing overtakes
    after = simulate(deployment, images.prompts(requests).reordered(order, ready_s[order]), seed=5)
    frame, served = found.requests, after.requests
    for name in (
        "first_schedule_s",
        "first_token_s",
        "finish_s",
        "replica",
        "lane",
        "preemptions",
        "rejected",
        "slo_class",
    ):
        assert frame[name].to_numpy()[order].tolist() == served[name].tolist(), name
    assert frame.arrival_s.tolist() == requests.arrival_s.tolist()
    assert frame.ttft_s.to_numpy() == pytest.approx(frame.first_token_s.to_numpy() - requests.arrival_s, nan_ok=True)
    assert (frame.first_schedule_s.to_numpy() >= ready_s - 1e-12)[~frame.rejected].all()
    pd.testing.assert_frame_equal(found.steps, after.steps, check_exact=True)
    # Whatever names requests names them as the user does.
    assert sorted(found.spans.request) == sorted(order[after.spans.request])
    assert found.transfers.request.tolist() == order[after.transfers.request].tolist()
    tokens = frame.prompt_tokens.to_numpy()[found.transfers.request]
    assert found.transfers.nbytes.to_numpy() == pytest.approx(tokens)
    # And so the gaps between tokens are the same, by class.
    metrics, expected = summarize(found), summarize(after)
    for name, other in expected.classes.items():
        assert astuple(metrics.classes[name].itl_s) == pytest.approx(astuple(other.itl_s), rel=1e-9)


@pytest.mark.parametrize("own", [False, True])
@settings(max_examples=25)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10_000), rate=st.sampled_from([5.0, 60.0, 1000.0]))
def test_laws(own: bool, kind: str, seed: int, rate: float) -> None:
    """Nothing is lost, every tile is encoded once, and no first token comes before its images are encoded."""
    requests, images = traffic(seed, 60, rate)
    deployment = deployments(own)[kind]
    if not own:
        deployment = replace(deployment, encode=EncodeSpec(linear(8), 2, 8, 2))
    result = simulate(deployment, Workload(requests, images=images), seed)
    frame, use = result.requests, result.encode
    assert use is not None
    assert frame.finish_s.notna().sum() + frame.rejected.sum() == len(requests)
    assert (use.requests, use.tiles) == (int((images.tiles > 0).sum()), int(images.tiles.sum()))
    least = np.array(linear(8))[np.minimum(images.tiles, 8)] * (images.tiles > 0)
    shared = 1.0 if own else 2.0  # workers of a request
    served = ~frame.rejected
    assert (frame.ttft_s.to_numpy() >= least / shared + PROMPT_S * frame.prompt_tokens.to_numpy() - 1e-9)[served].all()
    assert 0 <= use.use <= 1
    if own:
        assert np.isnan(use.wait_mean_s)
        assert use.workers == 0
    else:
        assert use.wait_mean_s <= use.mean_s
        assert use.workers == 2


def test_what_never_fits_is_rejected_by_its_users_number() -> None:
    """The first request's images and prompt fill more than the context; the second is served before it is encoded."""
    requests = Requests([0.0, 0.01], [4090, 10], [8, 2])
    deployment = Deployment([replica()], encode=EncodeSpec(linear(8), 1, 8))
    frame = simulate(deployment, Workload(requests, images=Images(np.array([8, 0]), TOKENS))).requests
    assert frame.rejected.tolist() == [True, False]
    assert frame.finish_s.notna().tolist() == [False, True]


def test_use_and_wait_of_the_workers() -> None:
    """Two requests of 8 tiles at once on one worker, 41 ms each; then one more, later; the last answer ends the run."""
    requests = Requests([0.0, 0.0, 1.0], [10, 10, 10], [1, 1, 1])
    deployment = Deployment([replica()], encode=EncodeSpec(linear(8), 1, 8))
    result = simulate(deployment, Workload(requests, images=Images(np.array([8, 8, 0]), TOKENS)))
    assert result.encode is not None
    assert result.requests.finish_s.tolist() == pytest.approx([0.041 + 0.0148, 0.082 + 0.0148, 1.002])
    assert result.encode.use == pytest.approx(0.082 / 1.002)
    assert result.encode.wait_mean_s == pytest.approx(0.041 / 2)
    assert result.encode.mean_s == pytest.approx((0.041 + 0.082) / 2)


@pytest.mark.parametrize("kind", ["alone", "stages", "groups", "pools"])
def test_a_lone_request_is_encoded_where_it_is_prefilled(kind: str) -> None:
    """19 tiles in batches of 8: 8, 8 and 3 on one device; on two ranks 8 and 2 on the fuller one."""
    requests, images = Requests([1.0], [40], [3]), Images(np.array(19), TOKENS)
    plain = simulate(deployments()[kind], images.prompts(requests)).requests
    for ranks, encode_s in ((1, 19 * TILE_S + 0.003), (2, 10 * TILE_S + 0.002)):
        deployment = deployments(own=True)[kind]
        specs = [replace(s, encoder=s.encoder and replace(s.encoder, ranks=ranks)) for s in deployment.replicas]
        found = simulate(replace(deployment, replicas=specs), Workload(requests, images=images))
        assert found.requests.ttft_s[0] - plain.ttft_s[0] == pytest.approx(encode_s)
        assert found.requests.e2e_s[0] - plain.e2e_s[0] == pytest.approx(encode_s)
        assert found.encode is not None
        assert found.encode.use > 0


def test_groups_wait_for_the_one_that_encodes() -> None:
    """Attention groups step together: an answer in one pauses for images in the other, once for all that encode."""
    requests = Requests([0.0, 0.1, 0.1], [10, 10, 10], [100, 1, 1])
    deployment = Deployment([replica(own=True, mapping=Mapping(attention_dp=2, ep=2))])
    quiet, busy = (
        simulate(deployment, Workload(requests, images=Images(np.array(tiles), 1))).requests
        for tiles in ([0, 0, 0], [0, 8, 4])
    )
    more_prompt_s = busy.finish_s[0] - quiet.finish_s[0] - (8 * TILE_S + 0.001)
    assert 0 <= more_prompt_s <= 12 * PROMPT_S + 4 * TILE_S + 0.001  # both in one step, or one after the other
    assert set(busy.lane) == {0, 1}


def test_a_closed_loop_encodes_on_the_replicas() -> None:
    """One client: every request takes its encoding, its prompt and its answer, one after the other."""
    requests, images = Requests(np.zeros(5), np.full(5, 20), np.full(5, 3)), Images(np.array([4, 0, 4, 4, 8]), TOKENS)
    frame = simulate(Deployment([replica(own=True)]), Workload(requests, 1, images=images)).requests
    encode_s = np.array(linear(8))[images.tiles]
    assert frame.e2e_s.to_numpy() == pytest.approx(encode_s + PROMPT_S * frame.prompt_tokens.to_numpy() + 2 * DECODE_S)
    assert np.diff(frame.arrival_s) == pytest.approx(frame.e2e_s[:-1].to_numpy())


def test_a_run_that_is_stopped_has_its_requests_in_order() -> None:
    """Who stops a run sees what the users saw, and so does who gets the log."""
    requests, images = traffic(7, 3000)
    deployment = Deployment([replica()] * 2, encode=EncodeSpec(linear(8), 3, 8, 2))
    looks = 0

    def stop(log: object) -> bool:
        nonlocal looks
        looks += 1
        return looks == 3

    with pytest.raises(Overrun) as caught:
        run(deployment, Workload(requests, images=images), stop=stop)
    log = caught.value.log
    assert log.arrival_s.tolist() == requests.arrival_s.tolist()
    whole = run(deployment, Workload(requests, images=images))
    seen = ~np.isnan(log.finish_s)
    assert 0 < seen.sum() < len(requests)
    assert np.array(log.finish_s)[seen].tolist() == np.array(whole.finish_s)[seen].tolist()


def test_encoding_counts_in_power_and_price() -> None:
    """Idle workers draw idle power and cost their rent; busy ones what their arithmetic draws, and count as FLOPs."""
    requests = Requests([0.0], [10], [1])
    works = [(1e9 * n, 1e6 * n) for n in range(9)]
    spec = EncodeSpec(linear(8), 2, 8, device=DEVICE, works=works)
    text, seen = (
        simulate(Deployment([replica()], encode=spec), Workload(requests, images=Images(np.array(n), TOKENS)))
        for n in (0, 8)
    )
    assert text.totals.gpus == 3
    assert text.totals.price_usd_per_h == pytest.approx(3 * (DEVICE.price_usd_per_h or 0))
    assert text.totals.peak_flops_per_s == 3 * DEVICE.peak_flops_per_s["bf16"]
    assert np.isnan(seen.totals.model_flops)  # the replica's own work is not known here
    encoded = encode_stage(spec, [0.0], [8])
    flops, moved, joules = encoded.consumption(spec)
    assert (flops, moved) == (8e9, 8e6)
    seconds = linear(8)[8]
    running = 0.19 + 0.75 * 8e6 / (seconds * DEVICE.memory_bytes_per_s)
    running += 1.5 * 8e9 / (seconds * DEVICE.peak_flops_per_s["bf16"])
    assert joules == pytest.approx((DEVICE.tdp_w - DEVICE.idle_w) * running * seconds)


def test_bad_combinations_are_told_in_one_line() -> None:
    requests, images = traffic(8)
    pool = Deployment([replica()], encode=EncodeSpec(linear(8), 1, 8))
    for deployment, load, said in (
        (Deployment([replica()]), Workload(requests, images=images), "images, and replicas that prefill no encoder"),
        (pool, Workload(requests, 4, images=images), "concurrency 4 with images and an encode pool"),
    ):
        with pytest.raises(PoolError, match=said):
            simulate(deployment, load)
    shared = of_contexts(requests, np.zeros(len(requests)), np.ones(len(requests)))
    with pytest.raises(TraceError, match="images and block ids"):
        simulate(pool, Workload(shared, images=images))
