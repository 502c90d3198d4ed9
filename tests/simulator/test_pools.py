"""Prompts here and answers there: theory, the laws of the hand-over, and what happens when a replica fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.hardware import load_device
from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel, Tables
from simulator.deployment import Deployment, Removal, ReplicaSpec, Role
from simulator.errors import PoolError
from simulator.handover import Handover, Mode
from simulator.itl import itl
from simulator.result import Result
from simulator.routers import ROUTERS
from simulator.scheduler import SchedulerConfig
from simulator.simulate import simulate
from simulator.workload import Requests

TOKEN_S, MAX_TOKENS, BLOCK, LAYERS = 0.01, 512, 16, 4
DEVICE = load_device("h100-sxm")


@dataclass(frozen=True)
class Straight:
    """One link, one stream."""

    links: tuple[int, ...] = (0,)
    shares: tuple[float, ...] = (1.0,)
    weight: float = 1.0
    latency_s: float = 0.0
    bytes_per_token: float = 1.0
    limit_bytes_per_s: float = inf


def model(fixed_s: float, stages: int = 1) -> StepModel:
    """Steps of fixed_s + TOKEN_S a token in every stage."""
    nothing = [0.0] * (MAX_TOKENS + 1)
    linear = [0.0] + [fixed_s + TOKEN_S * tokens for tokens in range(1, MAX_TOKENS + 1)]
    free = Pieces((), (nothing,), (nothing,))
    engine = Engine("none", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
    return StepModel([Tables(linear, 4 * nothing, nothing, free, free)] * stages, nothing, engine, MAX_TOKENS, 64)


def spec(
    role: Role, *, max_seqs: int = 32, blocks: int = 100_000, mapping: Mapping | None = None, fixed_s: float = 0.0
) -> ReplicaSpec:
    config = SchedulerConfig(max_seqs=max_seqs, token_budget=MAX_TOKENS, block_tokens=BLOCK, max_context_tokens=8192)
    mapping = mapping or Mapping()
    return ReplicaSpec(model(fixed_s, mapping.pp), mapping, config, blocks, DEVICE, role=role)


def handover(bytes_per_s: float = 1e15, mode: Mode = "serialized", **changes: object) -> Handover:
    """One link between all replicas; a token of KV is one byte."""
    return Handover(
        [bytes_per_s], ["link"], lambda *_: Straight(), LAYERS, mode,
        **{"overlap_tokens": 1, **changes},  # type: ignore[arg-type]
    )  # fmt: skip


def traffic(seed: int, count: int, rate_per_s: float, longest: int = 100, outputs: int = 20) -> Requests:
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, count))
    return Requests(arrival_s, rng.integers(1, longest + 1, count), rng.integers(1, outputs + 1, count))


def test_two_queues_in_a_row_match_theory() -> None:
    """Burke: the departures of M/M/1 are Poisson, so a sequence of queues behaves like queues on their own."""
    rng = np.random.default_rng(3)
    count, service_s = 120_000, 40 * TOKEN_S
    # Geometric lengths stand for exponential times; the wait in M/G/1 is rho (1 + cv^2)/2 s/(1 - rho).
    prompts, answers = rng.geometric(1 / 40, count), rng.geometric(1 / 40, count)
    load = 0.6
    requests = Requests(np.cumsum(rng.exponential(service_s / load, count)), np.minimum(prompts, 500), answers + 1)
    one = [spec("prefill", max_seqs=1), spec("decode", max_seqs=1)]
    result = simulate(Deployment(one, handover=handover(first_token="prefill")), requests, record=False)
    frame, sent = result.requests, result.transfers.set_index("request")
    assert len(sent) == count
    wait_s = service_s * load / (1 - load)
    assert frame.queue_s.mean() == pytest.approx(wait_s, rel=0.04)
    waited_s = sent.landed_s - sent.ready_s
    assert waited_s.mean() == pytest.approx(wait_s, rel=0.05)


@pytest.mark.parametrize("mode", ["serialized", "layer-wise"])
def test_a_lone_request_takes_prefill_transfer_and_decode_one_after_the_other(mode: Mode) -> None:
    requests = Requests([0.0], [100], [11])
    bytes_per_s = 200.0  # the transfer takes 0.5 s, the prompt 1 s
    pools = [spec("prefill"), spec("decode")]
    result = simulate(Deployment(pools, handover=handover(bytes_per_s, mode)), requests)
    exposed_s = 0.5 if mode == "serialized" else 0.5 / LAYERS
    row = result.requests.iloc[0]
    assert row.ttft_s == pytest.approx(1.0 + exposed_s)
    assert row.e2e_s == pytest.approx(1.0 + exposed_s + 10 * TOKEN_S)
    gaps, times = itl(result)
    assert np.average(gaps, weights=times) == pytest.approx(TOKEN_S)
    assert result.links.carried_bytes.sum() == pytest.approx(100.0)
    early = simulate(Deployment(pools, handover=handover(bytes_per_s, mode, first_token="prefill")), requests)
    assert early.requests.ttft_s[0] == pytest.approx(1.0)
    gaps, times = itl(early)
    assert gaps.max() == pytest.approx(exposed_s + TOKEN_S)
    assert times.sum() == 10


def checked(result: Result, requests: Requests, bytes_per_s: float) -> None:
    """What holds for every run in which nothing is lost."""
    frame, sent = result.requests, result.transfers
    assert np.isfinite(frame.finish_s[~frame.rejected]).all()
    split = requests.output_tokens > 1
    assert len(sent) <= split.sum()
    prompts = requests.prompt_tokens[sent.request]
    assert np.allclose(sent.nbytes, prompts)
    assert result.links.carried_bytes.sum() == pytest.approx(prompts.sum())
    assert (sent.landed_s >= sent.reserved_s - 1e-9).all()
    whole_s = prompts / bytes_per_s
    # At least as long as the bytes take from the first chunk's start; what is sent of the last step comes after it.
    started_s = frame.first_schedule_s.to_numpy()[sent.request]
    assert (sent.landed_s - started_s >= whole_s * (1 - 1e-9)).all()
    assert (sent.landed_s >= sent.ready_s - 1e-9).all()
    span_s = frame.finish_s.max() - frame.arrival_s.min()
    assert result.links.carried_bytes.sum() <= bytes_per_s * span_s * (1 + 1e-9)
    gaps, times = itl(result)
    assert times.sum() == (requests.output_tokens - 1).sum()
    assert (gaps * times).sum() == pytest.approx((frame.finish_s - frame.first_token_s).sum(), rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    bytes_per_s=st.sampled_from([50.0, 300.0, 1e4]),
    mode=st.sampled_from(["serialized", "layer-wise"]),
    first=st.sampled_from(["prefill", "decode"]),
    roles=st.sampled_from(
        [
            ("prefill", "decode"),
            ("prefill", "prefill", "decode", "decode"),
            ("prefill", "decode", "mixed"),
            ("prefill", "decode", "aggregated"),
            ("prefill", "mixed"),
            ("mixed", "decode"),
        ]
    ),
    router=st.sampled_from(sorted(ROUTERS)),
    blocks=st.sampled_from([12, 40, 10_000]),
    pp=st.sampled_from([1, 1, 2]),
    dp=st.sampled_from([1, 1, 2]),
)
def test_every_request_is_served_and_every_byte_arrives(
    seed: int,
    bytes_per_s: float,
    mode: Mode,
    first: str,
    roles: Sequence[Role],
    router: str,
    blocks: int,
    pp: int,
    dp: int,
) -> None:
    requests, cut = traffic(seed, 60, 8.0), Mapping(attention_dp=dp, ep=dp, pp=pp)
    specs = [spec(role, blocks=blocks, max_seqs=8, mapping=cut, fixed_s=0.002) for role in roles]
    deployment = Deployment(specs, ROUTERS[router], handover=handover(bytes_per_s, mode, first_token=first))
    result = simulate(deployment, requests)
    checked(result, requests, bytes_per_s)
    again = simulate(deployment, requests)
    assert again.requests.equals(result.requests)


def test_kv_waits_on_the_prefill_side_until_there_is_room() -> None:
    """The decode replica holds one answer at a time, so the second waits although the link is quick."""
    requests = Requests([0.0, 0.0], [100, 100], [51, 2])
    pools = [spec("prefill", max_seqs=2), spec("decode", max_seqs=1)]
    result = simulate(Deployment(pools, handover=handover(1e6)), requests)
    first, second = result.requests.finish_s
    sent = result.transfers.set_index("request")
    assert sent.reserved_s[1] == pytest.approx(first)
    assert second > first


def test_mixed_replicas_take_over_when_prompts_pile_up() -> None:
    requests = traffic(5, 200, 1.0, longest=180, outputs=5)
    pools = [spec("prefill"), spec("decode"), spec("mixed")]
    alone = Deployment(pools[:2], handover=handover())
    assert simulate(Deployment(pools, handover=handover()), requests).requests.ttft_s.mean() == pytest.approx(
        simulate(alone, requests).requests.ttft_s.mean()
    )
    helped = Deployment(pools, handover=handover(), overflow_tokens=300)
    assert simulate(helped, requests).requests.ttft_s.mean() < 0.7 * simulate(alone, requests).requests.ttft_s.mean()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    at_s=st.floats(0.0, 12.0),
    gone=st.integers(0, 3),
    mode=st.sampled_from(["serialized", "layer-wise"]),
    first=st.sampled_from(["prefill", "decode"]),
    dp=st.sampled_from([1, 2]),
)
def test_nothing_is_lost_when_a_replica_fails(
    seed: int, at_s: float, gone: int, mode: Mode, first: str, dp: int
) -> None:
    requests = traffic(seed, 60, 8.0)
    roles: tuple[Role, ...] = ("prefill", "prefill", "decode", "decode")
    specs = [spec(role, fixed_s=0.002, mapping=Mapping(attention_dp=dp, ep=dp)) for role in roles]
    link = handover(300.0, mode, first_token=first)
    result = simulate(Deployment(specs, handover=link, removals=[Removal(at_s, gone)]), requests)
    frame = result.requests
    assert np.isfinite(frame.finish_s).all()
    gaps, times = itl(result)
    assert times.sum() == (requests.output_tokens - 1).sum()
    assert (gaps * times).sum() == pytest.approx((frame.finish_s - frame.first_token_s).sum(), rel=1e-6, abs=1e-6)
    assert (frame.replica[frame.finish_s > at_s + 1e-9] != gone).all()
    if frame.finish_s.max() <= at_s:
        assert result.totals.requeued == result.totals.lost_kv_blocks == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), at_s=st.floats(0.0, 12.0), dp=st.sampled_from([1, 2, 3]))
def test_nobody_is_lost_when_a_replica_of_several_stages_fails(seed: int, at_s: float, dp: int) -> None:
    """What has entered its stages leaves them; all else starts anew elsewhere, and no token is given out twice."""
    requests = traffic(seed, 60, 8.0)
    specs = [spec("aggregated", fixed_s=0.002, mapping=Mapping(attention_dp=dp, ep=dp, pp=2))] * 2
    result = simulate(Deployment(specs, removals=[Removal(at_s, 0)]), requests)
    frame = result.requests
    assert np.isfinite(frame.finish_s).all()
    assert result.spans is not None and result.steps is not None
    moved = result.spans.groupby("request").tokens.sum()
    assert (frame.set_index("request").output_tokens[moved.index] == moved).all()
    longest_s = (result.steps.end_s - result.steps.start_s).max()
    assert (frame.replica[frame.finish_s > at_s + longest_s] == 1).all()


def test_an_aggregated_replica_fails_and_the_other_takes_over() -> None:
    requests = Requests([0.0, 0.0], [100, 100], [101, 101])
    calm = simulate(Deployment([spec("aggregated")] * 2), requests).requests
    result = simulate(Deployment([spec("aggregated")] * 2, removals=[Removal(1.505, 1)]), requests)
    frame = result.requests
    assert result.totals.requeued == 1
    assert result.totals.lost_kv_blocks == -(-150 // BLOCK)
    # 51 tokens were out: the prompt and these are computed anew beside the other's decodes.
    assert calm.finish_s.tolist() == pytest.approx([2.0, 2.0])
    assert frame.ttft_s.tolist() == pytest.approx([1.0, 1.0])
    # The prompt of 151 tokens joins the step that follows 1.51 s and delays the other's decode by as much.
    assert frame.finish_s[0] == pytest.approx(2.0 + 1.51 + 0.48, abs=0.02)
    assert frame.finish_s[1] > frame.finish_s[0]


@pytest.mark.parametrize(
    ("roles", "told"),
    [
        (("prefill",), "role prefill but none decode or mixed"),
        (("decode", "aggregated"), "role decode but none prefill or mixed"),
        (("prefill", "encode"), "role 'encode'"),
    ],
)
def test_roles_that_cannot_serve_are_refused(roles: Sequence[Role], told: str) -> None:
    with pytest.raises(PoolError, match=told):
        Deployment([spec(role) for role in roles], handover=handover())
    with pytest.raises(PoolError, match="no links"):
        Deployment([spec("prefill"), spec("decode")])


def test_a_decode_pool_too_small_for_a_request_rejects_it() -> None:
    pools = [spec("prefill"), spec("decode", blocks=5)]
    result = simulate(Deployment(pools, handover=handover()), Requests([0.0, 1.0], [100, 30], [2, 2]))
    assert result.requests.rejected.tolist() == [True, False]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), switch_s=st.sampled_from([0.0, 0.7]))
def test_replicas_change_roles_with_the_queues_and_serve_everybody(seed: int, switch_s: float) -> None:
    """Traffic that turns from answers to prompts: a decode replica comes over, and the prompts wait less."""
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(0.8, 200))
    requests = Requests(arrival_s, rng.integers(60, 180, 200), rng.integers(2, 6, 200))
    pools = [spec("prefill"), spec("decode"), spec("decode"), spec("decode")]
    fixed = simulate(Deployment(pools, ROUTERS["least-tokens"], handover=handover()), requests)
    moved = simulate(Deployment(pools, ROUTERS["least-tokens"], handover=handover(), switch_s=switch_s), requests)
    assert np.isfinite(moved.requests.finish_s).all()
    assert moved.totals.role_switches > 0 == fixed.totals.role_switches
    assert moved.requests.ttft_s.mean() < fixed.requests.ttft_s.mean()


def test_no_step_runs_more_sequences_than_a_scheduler_may() -> None:
    """A mixed replica gets prompts of its own and KV from others at the same time."""
    requests = traffic(2, 400, 3.0, longest=160, outputs=60)
    pools = [spec("prefill"), spec("mixed", max_seqs=6), spec("decode", max_seqs=4)]
    result = simulate(Deployment(pools, handover=handover(), overflow_tokens=200), requests)
    assert result.steps is not None
    together = result.steps.decode_sequences + result.steps.prefill_sequences
    assert together[result.steps.replica == 1].max() == 6
    assert together[result.steps.replica == 2].max() <= 4
    assert np.isfinite(result.requests.finish_s).all()


def test_requests_wait_for_a_role_that_a_replica_is_about_to_take_up() -> None:
    """The only prefill replica fails; a decode replica comes over, and nobody is turned away."""
    requests = traffic(7, 150, 4.0, longest=40, outputs=8)
    pools = [spec("prefill"), spec("decode"), spec("decode")]
    failing = {"handover": handover(), "removals": [Removal(5.0, 0)]}
    moved = simulate(Deployment(pools, ROUTERS["least-tokens"], switch_s=0.7, **failing), requests)  # type: ignore[arg-type]
    assert np.isfinite(moved.requests.finish_s).all()
    assert moved.totals.role_switches == 1
    stuck = simulate(Deployment(pools, ROUTERS["least-tokens"], **failing), requests)  # type: ignore[arg-type]
    assert stuck.requests.rejected.any()
    alone = Deployment(pools[:2], ROUTERS["least-tokens"], switch_s=0.7, **failing)  # type: ignore[arg-type]
    assert simulate(alone, requests).requests.rejected.any()
