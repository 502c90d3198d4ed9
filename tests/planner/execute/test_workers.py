"""Processes that share a model give the answers of one that has all of it, and say so when they cannot."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest

from hwmodels.errors import MappingError
from hwmodels.mapping import Mapping
from hwmodels.shape import Attention, FeedForward, Layer, ModelShape
from planner.execute.records import Composition, Job
from simulator.scheduler import SchedulerConfig
from simulator.workload import Requests

torch = pytest.importorskip("torch")

from planner.execute.workers import Workers  # noqa: E402

HIDDEN, LAYERS = 64, 4
ATTENTION = Attention(heads=4, kv_heads=2, head_dim=16, value_dim=16)
MODEL = ModelShape("small", HIDDEN, 128, (Layer(ATTENTION, FeedForward(128), 2 * HIDDEN),) * LAYERS, False, 256, HIDDEN)
CONFIG = SchedulerConfig("chunked", max_seqs=6, token_budget=32, max_context_tokens=128)
COUNT = 14
WHOLE = Mapping()


def job(mapping: Mapping = WHOLE, replicas: int = 1, kv_blocks: int = 40) -> Job:
    return Job(MODEL, mapping, replicas, "cpu", "fp32", 1, kv_blocks, 16)


def requests(spacing_s: float = 0.01) -> Requests:
    rng = np.random.default_rng(3)
    prompts, outputs = rng.integers(3, 60, COUNT), rng.integers(1, 16, COUNT)
    return Requests(np.arange(COUNT) * spacing_s, prompts, outputs)


@pytest.fixture(scope="module")
def alone():
    with Workers(job()) as workers:
        yield workers.serve(requests(), CONFIG)


def test_every_request_is_served_in_time(alone):
    asked, log = requests(), alone.log
    assert alone.broken is None
    assert {request: len(answer) for request, answer in alone.answers.items()} == dict(
        enumerate(asked.output_tokens.tolist())
    )
    first, schedule, finish = (np.array(getattr(log, f"{n}_s")) for n in ("first_token", "first_schedule", "finish"))
    assert (asked.arrival_s <= schedule).all() and (schedule < first).all() and (first <= finish).all()


def test_steps_follow_each_other_and_make_all_tokens(alone):
    steps = alone.steps
    assert (steps["end_s"].to_numpy()[:-1] <= steps["start_s"].to_numpy()[1:]).all()
    assert (steps["forward_s"] <= steps["end_s"] - steps["start_s"]).all()
    chunked = sum(new for items in steps["items"] for new, _ in items)
    assert chunked == requests().prompt_tokens.sum()
    assert steps["decode_sequences"].sum() == (requests().output_tokens - 1).sum()


@pytest.mark.parametrize(
    ("mapping", "replicas"),
    [(Mapping(tp=2), 1), (Mapping(pp=2), 1), (Mapping(), 2), (Mapping(tp=2, pp=2), 1), (Mapping(pp=3), 1)],
    ids=str,
)
def test_a_model_cut_over_processes_gives_the_same_answers(alone, mapping, replicas):
    with Workers(job(mapping, replicas)) as workers:
        passes = workers.run_passes([Composition((5, 9), ((7, 3),))])
        served = workers.serve(requests(), CONFIG)
    assert served.broken is None
    assert served.answers == alone.answers
    assert sorted((p.replica, p.stage, p.shard) for p in passes) == [
        (r, s, t) for r in range(replicas) for s in range(mapping.pp) for t in range(mapping.tp)
    ]
    lanes = {(int(r), int(lane)) for r, lane in zip(served.steps["replica"], served.steps["lane"], strict=True)}
    assert lanes == {(r, lane) for r in range(replicas) for lane in range(mapping.pp)}


def test_what_a_full_cache_preempts_is_recomputed_to_the_same_answers(alone):
    scarce = replace(CONFIG, max_context_tokens=80)
    with Workers(job(kv_blocks=7)) as workers:
        served = workers.serve(requests(0.0), scarce)
    assert sum(served.log.preemptions.values()) > 0
    assert served.answers == alone.answers


def test_laps_are_measured_where_they_are_asked_for():
    with Workers(job()) as workers:
        served = workers.serve(requests(), CONFIG, measure_laps=True)
    for laps, forward_s in zip(served.steps["laps"], served.steps["forward_s"], strict=True):
        assert 0 < sum(laps.values()) <= forward_s


@pytest.mark.parametrize(
    ("sent", "told"), [(signal.SIGSTOP, "stalled: no word for 3.5 s"), (signal.SIGKILL, "ended with code -9")]
)
def test_a_process_that_stops_or_dies_leaves_what_happened_until_then(sent, told):
    with Workers(job(), stall_s=3.0) as workers:
        pid = workers._processes[0].pid
        timer = threading.Timer(3.5, os.kill, (pid, sent))
        timer.start()
        served = workers.serve(requests(spacing_s=1.0), CONFIG)
        timer.join()
    assert served.broken is not None and told in served.broken
    finished = np.isfinite(np.array(served.log.finish_s))
    assert 0 < finished.sum() < COUNT
    assert len(served.steps) > 0


def test_silence_between_arrivals_is_no_stall():
    sparse = replace(requests(), arrival_s=np.arange(COUNT) * 0.6)
    with Workers(job(), stall_s=1.0) as workers:
        served = workers.serve(sparse, CONFIG)
    assert served.broken is None and len(served.answers) == COUNT


def test_a_process_that_died_between_two_commands_is_told():
    with Workers(job()) as workers:
        os.kill(workers._processes[0].pid, signal.SIGKILL)
        workers._processes[0].join()
        served = workers.serve(requests(), CONFIG)
    assert served.broken is not None and "ended with code -9" in served.broken


def test_a_model_this_engine_does_not_have_is_refused_by_the_operator():
    sinks = replace(ATTENTION, sinks=True)
    model = replace(MODEL, layers=(Layer(sinks, FeedForward(128), 2 * HIDDEN),) * LAYERS)
    with pytest.raises(MappingError, match="attention sinks"):
        Workers(replace(job(), model=model))
