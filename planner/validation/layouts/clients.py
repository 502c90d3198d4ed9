"""The clients that measured: closed loops of random lengths, and queues filled at once."""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np

from simulator.workload import Requests, Workload

#: Shortest length of InferenceX's random requests, relative to the nominal one (RANDOM_RANGE_RATIO).
RANGE_RATIO = 0.8


@lru_cache(maxsize=1024)
def closed_loop(isl: int, osl: int, concurrency: int, ratio: float = RANGE_RATIO) -> Workload:
    """The client of InferenceX: vLLM's benchmark_serving with random requests, ignoring end-of-sequence.

    ratio   lengths are whole numbers equally likely from ratio x nominal to nominal; 1 for fixed lengths

    `concurrency` requests start together and each that finishes starts the next, ten times as many in all and at least
    16 (--num-prompts $((CONC * 10)) --max-concurrency $CONC --request-rate inf). The warm-up requests, twice as many as
    the concurrency, have drained before; nothing of them remains. The same traffic is the same requests, so that
    layouts are compared on equal terms.
    """
    count = max(16, 10 * concurrency)
    rng = np.random.default_rng(zlib.crc32(f"{isl} {osl} {concurrency}".encode()))
    prompts, outputs = (rng.integers(max(1, int(ratio * most)), most, count, endpoint=True) for most in (isl, osl))
    return Workload(Requests(np.zeros(count), prompts, outputs), concurrency=concurrency)


@lru_cache(maxsize=1024)
def all_at_once(isl: int, osl: int, count: int) -> Workload:
    """`count` equal requests, all queued at time 0; rows that ask for the same share them."""
    return Workload(Requests(np.zeros(count), np.full(count, isl), np.full(count, osl)))
