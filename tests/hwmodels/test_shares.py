"""A share of a device is slower by what it lacks and no more; two phases draw no more than the pool."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.errors import MappingError
from hwmodels.hardware import load_cluster, load_device
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Array, Communication, Gemm, Operator
from hwmodels.roofline import AnalyticCost
from hwmodels.shares import (
    SharedCost,
    SharedSteps,
    bandwidth_share,
    compile_shared_steps,
    crowding,
    half_share,
    slice_of,
)
from hwmodels.step_model import compile_step_model
from hwmodels.work import Steps, Work

IDLE_HOST = Engine("idle host", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
MODEL, CLUSTER, MAPPING, PRECISION = load_model("llama-3-8b"), load_cluster("a100-80-sxm", 1), Mapping(), Precision()
COST = AnalyticCost(CLUSTER, MAPPING)
LIMITS = {"max_tokens": 4096, "max_seqs": 256}


@pytest.fixture(scope="module")
def steps() -> SharedSteps:
    return compile_shared_steps(MODEL, MAPPING, PRECISION, IDLE_HOST, COST, CLUSTER, **LIMITS)


def test_all_units_are_the_device_itself(steps: SharedSteps) -> None:
    whole = compile_step_model(MODEL, MAPPING, PRECISION, IDLE_HOST, COST, **LIMITS)
    assert steps.prefill(1.0, [(2000, 0)])[0] == whole.step_s(0, 0, [(2000, 0)])
    assert steps.decode(1.0, 64, 30_000)[0] == whole.step_s(64, 30_000, [])
    assert slice_of(CLUSTER.device, 1.0) == CLUSTER.device


@pytest.mark.parametrize("device", ["a100-80-sxm", "h100-sxm", "mi300x"])
def test_fewer_units_are_never_faster_and_never_slower_than_in_proportion(device: str) -> None:
    """Twice the units save at most half the time, but for the waves of tiles that happen to fill fewer units better."""
    cluster = load_cluster(device, 1)
    some = compile_shared_steps(MODEL, MAPPING, PRECISION, IDLE_HOST, AnalyticCost(cluster, MAPPING), cluster, **LIMITS)
    shares = [0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
    for items, sequences, context in (([(4000, 0)], 200, 100_000), ([(100, 2000), (30, 0)], 4, 2_000)):
        for times in (
            [some.prefill(share, items)[0] for share in shares],
            [some.decode(share, sequences, context)[0] for share in shares],
        ):
            assert (np.diff(times) < 0).all()
            assert (np.array(times) * shares <= 1.1 * times[-1]).all()


def test_decode_saturates_where_prefill_does_not(steps: SharedSteps) -> None:
    """From half the units on a decode step gains little, a long prompt almost everything (Nexus, arXiv:2507.06608)."""
    prefill = [steps.prefill(share, [(4000, 0)])[0] for share in (0.5, 1.0)]
    decode = [steps.decode(share, 16, 8_000)[0] for share in (0.5, 1.0)]
    assert prefill[0] / prefill[1] > 1.8
    assert decode[0] / decode[1] < 1.35


def test_bandwidth_of_few_units_is_near_the_measured() -> None:
    """Copies by 1, 8, 32 and 64 of 132 units of an H100 SXM5, as a part of all units' 1992 GB/s; within 17 %."""
    device = load_device("h100-sxm")
    reached = replace(device, memory_bytes_per_s=1992e9 / device.efficiency.memory_mbu)
    assert device.compute_units == 132
    for units, gb_per_s in ((1, 66.7), (8, 362.8), (32, 1183), (64, 1722)):
        assert bandwidth_share(units / 132, half_share(reached)) == pytest.approx(gb_per_s / 1992, rel=0.17)


@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.01, 5))
def test_bandwidth_rises_with_the_units_ever_more_slowly(one: float, other: float, half: float) -> None:
    few, many = sorted((one, other))
    assert bandwidth_share(few, half) <= bandwidth_share(many, half) <= 1 + 1e-12
    assert bandwidth_share(few, half) / few >= bandwidth_share(many, half) / many - 1e-12


def test_half_the_bandwidth_doubles_only_what_waits_for_memory(steps: SharedSteps) -> None:
    prefill, decode = steps.prefill(0.6, [(4000, 0)]), steps.decode(0.4, 16, 8_000)
    assert 0 < prefill[1] < 0.05 * prefill[0]
    assert 0.5 * decode[0] < decode[1] <= decode[0]


def test_traffic_is_that_of_the_work_tables(steps: SharedSteps) -> None:
    work = Work(MODEL, MAPPING, PRECISION, **LIMITS)
    one = np.ones(1)
    rows = Steps(one, 64 * one, 30_000 * one, 0 * one, 0 * one, 0 * one)
    assert steps.decode(0.5, 64, 30_000)[2] == pytest.approx(work.of(rows)[1][0], rel=1e-9)
    rows = Steps(one, 0 * one, 0 * one, 2000 * one, 2000 * 2001 / 2 * one, one)
    assert steps.prefill(0.5, [(2000, 0)])[2] == pytest.approx(work.of(rows)[1][0], rel=1e-9)


POSITIVE = st.floats(0.01, 10)
STEP = st.tuples(POSITIVE, st.floats(0, 1), st.floats(0, 1))


@given(STEP, STEP, st.floats(0.5, 2), st.floats(0.05, 2))
def test_latency_is_that_of_what_both_phases_draw(
    one: tuple[float, float, float], other: tuple[float, float, float], reached: float, half: float
) -> None:
    """Steps that draw at most what all units reach, and half of it at half the bandwidth, as all real ones."""
    ceiling = reached * (1 + half)

    def real(step: tuple[float, float, float]) -> tuple[float, float, float]:
        alone, waiting, drawn = step
        memory = waiting * alone
        return alone, memory, drawn * min(alone, (alone + memory) / 2) * reached

    steps = real(one), real(other)
    slower = crowding(*steps, ceiling)
    assert slower == pytest.approx(crowding(*reversed(steps), ceiling)[::-1], abs=1e-9)
    both = sum(moved / (alone + memory * u) for (alone, memory, moved), u in zip(steps, slower, strict=True))
    for (alone, _, moved), u in zip(steps, slower, strict=True):
        assert 0 <= u <= 1
        if moved and max(slower) < 1 - 1e-9:
            assert (1 + u) * (1 - both / ceiling) == pytest.approx(1 - moved / alone / ceiling, rel=1e-6)
    assert crowding(steps[0], (1.0, 1.0, 0.0), ceiling)[0] == pytest.approx(0, abs=1e-12)


@given(st.floats(0.05, 0.95), st.floats(0.05, 2))
def test_two_phases_that_wait_for_memory_draw_together_what_all_units_draw(share: float, half: float) -> None:
    """x (1 + half) / (x + half) alone; x of the whole beside the other 1 - x: one law for one slice and for two."""
    shares = share, 1 - share
    steps = [(1 / bandwidth_share(part, half), 1 / bandwidth_share(part, half), 1.0) for part in shares]
    slower = crowding(steps[0], steps[1], 1 + half)
    if max(slower) < 1 - 1e-9:
        drawn = [1 / (alone * (1 + u)) for (alone, _, _), u in zip(steps, slower, strict=True)]
        assert drawn == pytest.approx(shares, rel=1e-6)


class Measured:
    """Twice the analytic price, as a measured kernel might cost."""

    def time_s(self, op: Operator) -> Array:
        return 2 * COST.time_s(op)

    def sources(self, op: Operator) -> dict[str, float]:
        return {"measured": float(np.sum(self.time_s(op)))}


def test_measured_prices_scale_as_the_analytic_ones() -> None:
    op = Gemm("projection", np.array([1.0, 64.0, 4096.0]), 4096, 4096, PRECISION)
    analytic = SharedCost(COST, CLUSTER, MAPPING, 0.3)
    measured = SharedCost(Measured(), CLUSTER, MAPPING, 0.3)
    np.testing.assert_allclose(measured.time_s(op), 2 * analytic.time_s(op), rtol=1e-12)
    assert (analytic.time_s(op) > COST.time_s(op)).all()
    assert list(measured.sources(op)) == ["measured"]


def test_collectives_keep_their_price() -> None:
    cluster, mapping = load_cluster("hgx-a100", 4), Mapping(tp=4)
    cost = AnalyticCost(cluster, mapping)
    op = Communication("sum", "all-reduce", "tp", np.array([1e6]))
    assert SharedCost(cost, cluster, mapping, 0.2).time_s(op) == cost.time_s(op)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, float("nan")])
def test_shares_outside_their_range_are_refused(share: float) -> None:
    with pytest.raises(MappingError, match="above 0, at most 1"):
        slice_of(load_device("h100-sxm"), share)


def test_pipelines_and_attention_groups_are_refused() -> None:
    for mapping in (Mapping(pp=2), replace(MAPPING, attention_dp=2)):
        with pytest.raises(MappingError, match="cut the replica by tp"):
            compile_shared_steps(MODEL, mapping, PRECISION, IDLE_HOST, COST, CLUSTER, **LIMITS)


def test_steps_are_compiled_once_per_unit_count(steps: SharedSteps) -> None:
    assert steps.at(0.5) is steps.at(0.5 + 0.1 / steps.units)
    assert steps.at(0.5) is not steps.at(0.51)
