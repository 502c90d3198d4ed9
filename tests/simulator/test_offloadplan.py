"""Plans for experts that do not fit: room by bytes, and what cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hwmodels.expertoffload import (
    ExpertCosts,
)
from simulator.errors import OffloadError
from simulator.offloadplan import OffloadPlan, Prefetch, cache_rooms

LAYERS, EXPERTS, TOP_K = 4, 8, 2
TOY = ExpertCosts(
    LAYERS, EXPERTS, TOP_K,
    expert_bytes=(8.0, 2.0), gpu_s=((0.0, 1.0), (0.0, 0.5)), cpu_s=((0.0, 3.0), (0.0, 2.0)),
    dense_s=(1.0, 2.0, 1.0, 2.0), once_s=5.0, link_bytes_per_s=2.0,
)  # fmt: skip
ONE = replace(TOY, expert_bytes=(8.0,), gpu_s=TOY.gpu_s[:1], cpu_s=TOY.cpu_s[:1])


def test_rooms_share_the_cache_by_bytes() -> None:
    """Half of 32 experts of 8 bytes, a quarter of it for experts of 2 bytes."""
    plan = OffloadPlan(0.5, ("fp16", "int4"), (0.6, 0.9), low_share=0.25)
    assert cache_rooms(TOY, plan) == [12, 16]
    assert cache_rooms(ONE, OffloadPlan(0.5)) == [16]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: OffloadPlan(1.5), "cache_share = 1.5"),
        (lambda: OffloadPlan(0.5, eviction="fifo"), "expected one of lru"),
        (lambda: OffloadPlan(0.5, misses="npu"), "expected one of load"),
        (lambda: OffloadPlan(0.5, ("fp16", "int4")), "expected one for each of fp16, int4"),
        (lambda: OffloadPlan(0.5, misses="hybrid"), "needs at least 1"),
        (lambda: Prefetch((1,), ()), "a hit rate for each lead"),
        (lambda: Prefetch((1,), (1.5,)), "expected shares"),
    ],
)
def test_bad_plans_are_told(make, told: str) -> None:
    with pytest.raises(OffloadError, match=told):
        make()
