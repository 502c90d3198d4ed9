"""The pieces of `validate run` that need no clock: sizes, settings, and the words of a question."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from hwmodels.errors import OutOfMemoryError
from hwmodels.mapping import Mapping
from hwmodels.shape import Attention, FeedForward, Layer, ModelShape
from planner.execute.records import Job
from planner.profiling.machine import Machine
from planner.validation.run import Question, settings, sized
from simulator.scheduler import Scheduler, SchedulerConfig
from simulator.workload import Requests

ATTENTION = Attention(heads=4, kv_heads=2, head_dim=16, value_dim=16)
MODEL = ModelShape("small", 64, 128, (Layer(ATTENTION, FeedForward(128), 128),) * 4, False, 512, 64)
REQUESTS = Requests(np.arange(8.0), np.full(8, 60), np.full(8, 20))
CONFIG = SchedulerConfig("chunked", max_seqs=8, token_budget=64, max_context_tokens=80)


def question(**changed) -> Question:
    return Question(replace(Job(MODEL, Mapping(), 1, "cpu", "fp32", 1, 1, 16), **changed), CONFIG, REQUESTS)


class Fake(Machine):
    """A machine with so much free memory."""

    def __init__(self, free: int) -> None:
        super().__init__(None, "cpu", "fake", "fake", ("fp32",), (0, 0), 2 * free, 0, 0)
        object.__setattr__(self, "_free", free)

    def free_bytes(self) -> int:
        return self._free


def test_the_cache_holds_the_longest_requests_that_may_run():
    assert sized(question(), Fake(10**9)).job.kv_blocks == 8 * 5


def test_a_cache_that_memory_does_not_allow_is_smaller():
    free = 1_600_000
    blocks = sized(question(), Fake(free)).job.kv_blocks
    assert 5 <= blocks < 40
    assert MODEL.kv_bytes_per_token("fp32") * 16 * blocks < free


def test_what_does_not_fit_is_told_with_what_is_missing():
    with pytest.raises(OutOfMemoryError, match=r"\d+\.\d GiB per process short of weights"):
        sized(question(), Fake(10**5))


def test_replicas_share_the_memory_of_a_host():
    free = 1_600_000
    assert sized(question(replicas=2), Fake(2 * free)).job.kv_blocks == sized(question(), Fake(free)).job.kv_blocks


def test_every_setting_is_legal_and_can_run_every_request():
    asked = sized(question(), Fake(10**9))
    found = settings(asked)
    assert len(found) >= 6
    assert len(set(found.values())) == len(found)
    prompts, outputs = REQUESTS.prompt_tokens.tolist(), REQUESTS.output_tokens.tolist()
    for config in found.values():
        scheduler = Scheduler(config, asked.job.kv_blocks, prompts, outputs)
        assert all(scheduler.offer(request) for request in range(len(prompts)))
