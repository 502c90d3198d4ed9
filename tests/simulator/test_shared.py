"""Prefill and decode at once on one device: as an oracle that takes every step by itself, and what always holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.hardware import load_device
from hwmodels.mapping import Mapping
from hwmodels.shares import NO_ENGINE, SharedSteps, bandwidth_share, crowding
from hwmodels.step_model import Pieces, StepModel, Tables
from simulator.blockhashes import BlockHashes
from simulator.deployment import Deployment, ReplicaSpec
from simulator.errors import SchedulerError
from simulator.itl import gaps_by_group
from simulator.log import Log
from simulator.metrics import summarize
from simulator.result import STEP_COLUMNS
from simulator.routers import ROUTERS
from simulator.scheduler import SchedulerConfig
from simulator.shared import DECODE, PREFILL, SharedReplica, SharedScheduler, SharedSpec
from simulator.shares import Nexus, Policy, SemiPD, Shares, State, Static
from simulator.simulate import run, simulate
from simulator.workload import Requests, Workload

MAX_TOKENS, MAX_SEQS = 256, 16
DEVICE = load_device("h100-sxm")
ENGINE = Engine("test", "test", {"default": "vllm"}, 1e-4, 1e-5, 2e-4, 1.0, 0.0, 0.9, 0.0)
CHECKED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROOMY = SchedulerConfig(max_seqs=MAX_SEQS, token_budget=100, max_context_tokens=4096)


def tables(compute: float, memory: float) -> Tables:
    """Linear in tokens, sequences and contexts; most of the tokens' time is arithmetic, of the caches' traffic."""
    n, s = np.arange(MAX_TOKENS + 1.0), np.arange(MAX_SEQS + 1.0)
    return Tables(
        linear=(compute * 5e-5 * n + memory * 2e-3).tolist(),
        shared=[0.0],
        head=(memory * 1e-5 * s).tolist(),
        decode=knotted(memory * s),
        prefill=Pieces((), ((compute * 1e-6 * n).tolist(),), ((compute * 1e-8 * n).tolist(),)),
    )


def knotted(scale: np.ndarray) -> Pieces:
    """1e-5 + 1e-6 x up to 60, half as steep beyond."""
    base = [(scale * 1e-5).tolist(), (scale * 4e-5).tolist()]
    return Pieces((60.0,), tuple(base), ((scale * 1e-6).tolist(), (scale * 5e-7).tolist()))


def steps(ceiling: float = 1e12) -> SharedSteps:
    def compiled(share: float, memory: float) -> StepModel:
        slower = tables(1 / share, 1 / (bandwidth_share(share, 0.3) * memory))
        return StepModel([slower], [0.0], ENGINE, MAX_TOKENS, MAX_SEQS)

    bytes_moved = StepModel([tables(0.2, 1.0)], [0.0], NO_ENGINE, MAX_TOKENS, MAX_SEQS)
    return SharedSteps(compiled, bytes_moved, 100, ceiling)


STEPS, CROWDED = steps(), steps(0.6)


def spec(policy: Policy, config: SchedulerConfig = ROOMY, blocks: int = 100_000, some: SharedSteps = STEPS,
         ageing: float | None = None) -> SharedSpec:  # fmt: skip
    return SharedSpec(
        model=some.at(1.0)[0], mapping=Mapping(), scheduler=config, kv_blocks=blocks, device=DEVICE, steps=some,
        policy=policy, ageing=ageing,
    )  # fmt: skip


def oracle(some: SharedSteps, shares: Shares, requests: Requests, budget: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """First tokens and finishes: first come, first served, one step at a time, memory for all."""
    arrival, prompt, output = (c.tolist() for c in (requests.arrival_s, requests.prompt_tokens, requests.output_tokens))
    first, finish = np.full(len(arrival), np.nan), np.full(len(arrival), np.nan)
    coming, waiting, running = list(range(len(arrival))), [], []
    done_tokens = dict.fromkeys(coming, 0)  # of the prompt
    emitted = dict.fromkeys(coming, 0)
    chunk: list[tuple[int, int, int]] = []
    batch: list[int] = []
    left = {"p": 0.0, "d": 0.0}
    now = 0.0
    while True:
        while coming and arrival[coming[0]] <= now:
            waiting.append(coming.pop(0))
        if not batch and running:
            batch, left["d"] = list(running), 1.0
        if not chunk and waiting:
            room, seats = budget, MAX_SEQS - len(running)
            for request in waiting:
                if room and seats:
                    before = done_tokens[request]
                    new = min(prompt[request] - before, room)
                    chunk.append((request, new, before))
                    room, seats = room - new, seats - 1
            left["p"] = 1.0 if chunk else 0.0
        x, y = shares.prefill, shares.decode
        if chunk and batch:
            x, y = shares.together()
        elif shares.lend:
            x = y = 1.0
        whole = {"p": inf, "d": inf}
        if chunk:
            prefill = some.prefill(x, [(new, before) for _, new, before in chunk])
            whole["p"] = prefill[0]
        if batch:
            context = sum(prompt[r] + emitted[r] for r in batch)
            decode = some.decode(y, len(batch), context)
            whole["d"] = decode[0]
        if chunk and batch:
            slower = crowding(prefill, decode, some.ceiling_bytes_per_s)
            whole = {"p": prefill[0] + slower[0] * prefill[1], "d": decode[0] + slower[1] * decode[1]}
        ends = {lane: now + left[lane] * whole[lane] if whole[lane] < inf else inf for lane in whole}
        then = min(*ends.values(), arrival[coming[0]] if coming else inf)
        if then == inf:
            return first, finish
        for lane in left:
            left[lane] -= (then - now) / whole[lane]
        now = then
        if ends["d"] == now:
            for request in batch:
                emitted[request] += 1
                if emitted[request] == output[request]:
                    running.remove(request)
                    finish[request] = now
            batch = []
        if ends["p"] == now:
            for request, new, before in chunk:
                done_tokens[request] = before + new
                if before + new == prompt[request]:
                    first[request] = now
                    emitted[request] = 1
                    waiting.remove(request)
                    if output[request] == 1:
                        finish[request] = now
                    else:
                        running.append(request)
            chunk = []


@st.composite
def traffic(draw: st.DrawFn, longest: int = 120) -> Requests:
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gap_s = draw(st.sampled_from([0.0, 2e-3, 2e-2, 0.2]))
    arrival_s = np.cumsum(rng.exponential(gap_s, count)) if gap_s else np.zeros(count)
    outputs = rng.integers(1, draw(st.sampled_from([2, 30, longest])) + 1, count)
    return Requests(arrival_s, rng.integers(1, longest + 1, count), outputs)


SHARES = st.sampled_from(
    [Shares(0.5, 0.5), Shares(0.7, 0.3, lend=True), Shares(0.8, 1.0), Shares(1.0, 1.0), Shares(0.3, 0.4)]
)
POLICIES = st.sampled_from(
    [
        Static(Shares(0.6, 0.4)),
        Static(Shares(0.95, 0.05)),
        Static(Shares(1.0, 0.5, lend=True)),
        SemiPD(0.05, 4e-3, window=10, switch_s=0.01),
        SemiPD(0.5, 2e-3, window=5, switch_s=0.0),
        Nexus(),
        Nexus(decode_slack=1.5, prefill_slack=1.6, kv_pressure=0.1),
    ]
)


@CHECKED
@given(traffic(), SHARES)
def test_is_the_step_by_step_oracle(requests: Requests, shares: Shares) -> None:
    """Compressed decode steps and steps that change their speed under way: to 1e-9 of every time."""
    log = run(Deployment([spec(Static(shares))]), requests)
    first, finish = oracle(STEPS, shares, requests)
    np.testing.assert_allclose(np.array(log.first_token_s), first, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.array(log.finish_s), finish, rtol=1e-9, atol=1e-12)


@CHECKED
@given(traffic(), SHARES)
def test_with_a_crowded_memory_runs_of_steps_stay_near_the_oracle(requests: Requests, shares: Shares) -> None:
    """The crowding of a run of equal batches is that of its first step; contexts grow 120-fold here within runs.

    Whoever comes as a step begins may take part in it or in the next one: a step more or less, too.
    """
    log = run(Deployment([spec(Static(shares), some=CROWDED)]), requests, record=True)
    first, finish = oracle(CROWDED, shares, requests)
    rows = np.array(log.segments).reshape(-1, len(STEP_COLUMNS))
    start, end, steps = (rows[:, STEP_COLUMNS.index(name)] for name in ("start_s", "end_s", "steps"))
    step_s = float(((end - start) / steps).max())
    np.testing.assert_allclose(np.array(log.finish_s), finish, rtol=0.05, atol=step_s)
    np.testing.assert_allclose(np.array(log.first_token_s), first, rtol=0.05, atol=step_s)


def test_a_crowded_memory_slows_both_phases() -> None:
    requests = Requests(np.arange(20) * 0.01, np.full(20, 90), np.full(20, 40))
    free, crowded = (
        run(Deployment([spec(Static(Shares(0.5, 0.5)), some=some)]), requests) for some in (STEPS, CROWDED)
    )
    assert np.mean(crowded.first_token_s) > 1.05 * np.mean(free.first_token_s)
    assert np.mean(crowded.finish_s) > 1.05 * np.mean(free.finish_s)


def test_one_token_answers_are_a_replica_that_is_the_slice() -> None:
    """Without decodes the prefill stream on half the units is an aggregated replica of that slice."""
    rng = np.random.default_rng(1)
    requests = Requests(np.cumsum(rng.exponential(0.01, 300)), rng.integers(1, 121, 300), np.ones(300, dtype=int))
    shared = run(Deployment([spec(Static(Shares(0.5, 0.5)))]), requests)
    alone = run(Deployment([ReplicaSpec(STEPS.at(0.5)[0], Mapping(), ROOMY, 100_000, DEVICE)]), requests)
    np.testing.assert_allclose(shared.first_token_s, alone.first_token_s, rtol=1e-12)


@CHECKED
@given(
    traffic(),
    POLICIES,
    st.sampled_from([None, 0.0, 100.0]),
    st.sampled_from([320, 800, 40_000]),
    st.sampled_from([1, 16]),
    st.sampled_from(["one", "together", "closed"]),
)
def test_requests_tokens_and_blocks_are_conserved(
    requests: Requests, policy: Policy, ageing: float | None, tokens: int, block: int, way: str
) -> None:
    """Nothing is lost with few blocks, small budgets and preemptions; every token is in the log, once and in time."""
    config = SchedulerConfig(max_seqs=5, token_budget=40, block_tokens=block, max_context_tokens=240)
    started: list[SharedReplica] = []

    class Checked(SharedReplica):
        def commit(self) -> Sequence[int]:
            finished = super().commit()
            assert self.scheduler.blocks_held() <= self.scheduler.kv_blocks
            return finished

    class Watched(SharedSpec):
        def start(self, prompts: list[int], outputs: list[int], log: Log, index: int) -> SharedReplica:  # type: ignore[override]
            scheduler = SharedScheduler(self.scheduler, self.kv_blocks, prompts, outputs, self.ageing)
            started.append(Checked(self.steps, scheduler, self.policy, log, index))
            return started[-1]

    one = spec(policy, config, tokens // block, CROWDED, ageing)
    watched = Watched(**{name: getattr(one, name) for name in SharedSpec.__dataclass_fields__})
    copies = 1 if way == "one" else 2
    workload = Workload(requests, concurrency=4 if way == "closed" else None)
    result = simulate(Deployment([watched] * copies, ROUTERS["least-tokens"]), workload)
    frame = result.requests
    served = frame[~frame.rejected]
    assert served.finish_s.notna().all() and frame[frame.rejected].first_token_s.isna().all()
    assert (served.arrival_s <= served.first_schedule_s + 1e-12).all()
    assert (served.first_schedule_s < served.first_token_s).all()
    assert (served.first_token_s <= served.finish_s).all()
    for replica in started:
        scheduler = replica.schedulers[0]
        assert scheduler.free == scheduler.kv_blocks
        assert (scheduler.reserved, scheduler.running, scheduler.unfinished, len(scheduler.waiting)) == (0, 0, 0, 0)
        assert scheduler.peak_seqs <= config.max_seqs
    log = result.steps
    assert log is not None
    assert ((log.prefill_tokens > 0) == (log.lane == PREFILL)).all()
    assert ((log.decode_sequences > 0) == (log.lane == DECODE)).all()
    for _, rows in log.groupby(["replica", "lane"]):
        ordered = rows.sort_values(["start_s", "end_s"])
        assert (ordered.start_s.to_numpy()[1:] >= ordered.end_s.to_numpy()[:-1] - 1e-9).all()
    (gaps_s, counts), *_ = gaps_by_group(result, np.zeros(len(frame), dtype=np.int64), 1)
    assert counts.sum() == (served.output_tokens - 1).sum()
    assert gaps_s @ counts == pytest.approx((served.finish_s - served.first_token_s).sum(), rel=1e-9, abs=1e-9)
    metrics = summarize(result)
    assert not metrics.kv_use_max > 1


@CHECKED
@given(traffic(), POLICIES, st.integers(0, 2**32 - 1))
def test_policies_do_not_know_output_lengths(requests: Requests, policy: Policy, seed: int) -> None:
    """Until the first request whose output differs would end, all is as in the run with other outputs."""
    rng = np.random.default_rng(seed)
    ours = requests.output_tokens
    theirs = np.where(rng.random(len(ours)) < 0.5, rng.permutation(ours), ours)
    logs = [run(Deployment([spec(policy)]), replace(requests, output_tokens=outputs)) for outputs in (ours, theirs)]
    until_s = np.minimum(*(np.array(log.finish_s) for log in logs))[ours != theirs].min(initial=np.inf)
    times = np.array([log.first_token_s for log in logs])
    early = times.min(axis=0) < until_s - 1e-9
    np.testing.assert_allclose(times[0][early], times[1][early], rtol=1e-9, atol=1e-12)


@CHECKED
@given(traffic(), POLICIES)
def test_same_arguments_same_log(requests: Requests, policy: Policy) -> None:
    logs = [run(Deployment([spec(policy)]), requests, record=True) for _ in range(2)]
    assert logs[0].segments == logs[1].segments
    assert logs[0].finish_s.tolist() == logs[1].finish_s.tolist()


def test_shortest_prompts_first_and_ageing() -> None:
    """While one prompt is computed five arrive; ageing lets the long one that came first go first."""
    requests = Requests(
        np.array([0.0, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3]), np.array([100, 100, 70, 50, 90, 30]), np.full(6, 2)
    )
    for ageing, order in ((None, [0, 1, 2, 3, 4, 5]), (0.0, [0, 5, 3, 2, 4, 1]), (1e6, [0, 1, 5, 3, 2, 4])):
        log = run(Deployment([spec(Static(Shares(0.5, 0.5)), ageing=ageing)]), requests)
        first_s = np.array(log.first_token_s)[order]
        assert (np.diff(first_s) >= 0).all() and first_s[1] < first_s[-1], ageing


def test_runs_stay_compressed_while_the_queue_waits_for_memory() -> None:
    """A queue that cannot move costs no events: they come with completions, not with steps."""
    requests = Requests(np.zeros(200), np.full(200, 100), np.full(200, 100))
    log = run(Deployment([spec(Static(Shares(0.5, 0.5)), replace(ROOMY, block_tokens=1), blocks=1000)]), requests)
    steps = 99 * 200 / 5  # five fit at a time
    assert log.events < steps / 3


def test_a_stopped_replica_leaves_the_unfinished() -> None:
    requests = Requests(np.zeros(6), np.full(6, 50), np.array([2, 2, 2, 60, 60, 60]))
    log = Log(6, record=True)
    replica = spec(Static(Shares(0.5, 0.5))).start(
        requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), log, 0
    )
    for request in range(6):
        replica.enqueue(request, 0.0)
    finished: list[int] = []
    while replica.plan(inf) < 0.05:
        finished += replica.commit()
    left = replica.halt(0.05)
    assert sorted([*finished, *left]) == list(range(6))
    assert 0 < len(finished) < 6
    assert replica.end == inf


@CHECKED
@given(traffic(), st.sampled_from([None, 0.0, 100.0]), st.sampled_from([320, 800, 40_000]))
def test_prompts_that_begin_alike_are_computed_once(requests: Requests, ageing: float | None, tokens: int) -> None:
    """All prompts share their whole blocks as far as they go: served like others, computed in part."""
    config = SchedulerConfig(max_seqs=5, token_budget=40, block_tokens=16, max_context_tokens=240, prefix_caching="lru")
    alike = BlockHashes.of([range(-(-int(prompt) // 16)) for prompt in requests.prompt_tokens], 16)
    one = spec(Static(Shares(0.6, 0.4)), config, tokens // 16, ageing=ageing)
    result = simulate(Deployment([one]), replace(requests, block_hashes=alike))
    frame, log = result.requests, result.steps
    assert log is not None
    served = frame[~frame.rejected]
    assert served.finish_s.notna().all()
    assert (log.kv_blocks >= 0).all()
    (_, counts), *_ = gaps_by_group(result, np.zeros(len(frame), dtype=np.int64), 1)
    assert counts.sum() == (served.output_tokens - 1).sum()
    computed, asked = log.prefill_tokens.sum(), served.prompt_tokens.sum()
    if len(served) > 10 and tokens == 40_000 and not served.preemptions.any():
        assert computed < asked


# Controllers.


def state(now_s: float, kv_use: float = 0.0, sequences: int = 8) -> State:
    return State(now_s, STEPS, [(100, 0)], sequences, 60 * sequences, kv_use)


def feed(
    policy: SemiPD, ttft_s: Callable[[Shares], float], tpot_s: Callable[[Shares], float], windows: int
) -> list[Shares]:
    """Shares after each of some windows of requests with these latencies."""
    controller = policy.start()
    shares, seen = policy.shares, []
    for window in range(windows):
        controller.first_token(ttft_s(shares))
        controller.finished(tpot_s(shares))
        controller.stepped(0.2, policy.window)
        shares = controller.decide(state(window + 1.0))
        seen.append(shares)
    return seen


def test_semi_pd_keeps_shares_where_both_limits_pass_or_both_fail() -> None:
    policy = SemiPD(1.0, 0.05, shares=Shares(0.5, 0.8))
    for ttft_s, tpot_s in ((0.5, 0.01), (2.0, 0.1)):
        assert set(feed(policy, lambda _, t=ttft_s: t, lambda _, t=tpot_s: t, 4)) == {policy.shares}


def test_semi_pd_raises_the_failing_phase_until_it_passes() -> None:
    """The load is 0.2, and latencies follow the published laws: the fitted ones find the share in a few windows."""
    policy = SemiPD(1.0, 0.05, shares=Shares(0.4, 1.0))

    def ttft_s(shares: Shares) -> float:
        return 0.2 / (shares.together()[0] - 0.2)

    seen = feed(policy, ttft_s, lambda shares: 0.01 / shares.together()[1], 8)
    assert ttft_s(policy.shares) > policy.ttft_s
    assert ttft_s(seen[-1]) <= policy.ttft_s
    assert seen[-1] == seen[-2]
    assert seen[-1].together()[0] < 0.5  # no more than it takes
    least = SemiPD(1.0, 0.001, shares=Shares(1.0, 1.0))
    hopeless = feed(least, lambda _: 0.1, lambda _: 0.01, 40)
    assert hopeless[-1] == Shares(0.1, 1.0)


def test_nexus_gives_the_favoured_phase_what_the_other_can_spare() -> None:
    policy = Nexus(decode_slack=2.0, prefill_slack=2.0, parts=10)
    batch = (8, 480)
    for kv_use in (0.0, 0.9):
        shares = policy.start().decide(state(0.0, kv_use))
        assert shares.prefill + shares.decode == pytest.approx(1)
        own_s, alone_s = (
            (STEPS.decode(shares.decode, *batch)[0], STEPS.decode(1.0, *batch)[0])
            if kv_use < 0.5
            else (STEPS.prefill(shares.prefill, [(100, 0)])[0], STEPS.prefill(1.0, [(100, 0)])[0])
        )
        assert own_s <= 2 * alone_s
        further = (
            STEPS.decode(shares.decode - 0.1, *batch)[0] if kv_use < 0.5
            else STEPS.prefill(shares.prefill - 0.1, [(100, 0)])[0]
        )  # fmt: skip
        assert further > 2 * alone_s
    assert policy.start().decide(state(0.0, sequences=0)) == policy.shares
    assert Nexus(hysteresis=1.0).start().decide(state(0.0)) == policy.shares


@pytest.mark.parametrize(("prefill", "decode"), [(0.0, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_shares_outside_their_range_are_refused(prefill: float, decode: float) -> None:
    with pytest.raises(SchedulerError, match="in \\(0, 1\\]"):
        Shares(prefill, decode)


def test_batching_policies_that_mix_phases_and_other_roles_are_refused() -> None:
    with pytest.raises(SchedulerError, match="whole requests"):
        replace(spec(Static(Shares(0.5, 0.5))), role="prefill").start([1], [1], Log(1, record=False), 0)
    with pytest.raises(SchedulerError, match="chunked"):
        spec(Static(Shares(0.5, 0.5)), replace(ROOMY, policy="orca")).start([1], [1], Log(1, record=False), 0)
