"""Attention tables: exact where measured, rising in between, never beyond the peak, and honest about the rest."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.hardware import load_device
from hwmodels.kernels.aiconfigurator import DISTRIBUTION, open_wheel
from hwmodels.kernels.attention import (
    TIMES,
    DecodeTimes,
    LatentDecodeTimes,
    LatentPrefillTimes,
    PrefillTimes,
    between,
    filled,
    hiccups,
    outliers,
)
from hwmodels.kernels.attention_holdout import held_out
from hwmodels.kernels.table import TOLERANCE, checked_against
from hwmodels.operators import attended_pairs

DEVICE = load_device("h200-sxm")
PEAK = DEVICE.peak_flops_per_s["bf16"]
BATCHES, LENGTHS, CONTEXTS = (1, 2, 4, 8, 16), (16, 64, 256, 1024, 4096), (2, 16, 128, 1024, 8192, 65536)


def table(family: str, shapes: Any = ((32, 8), (8, 1)), scale: Any = None, **columns: Any) -> pd.DataFrame:
    """Times of an imagined kernel, 5 us + 70 % of the peaks; large work is missing, as in real tables."""
    rows = []
    latent, prefill = family.startswith("mla"), family.endswith("prefill")
    for heads, kv in shapes:
        for i, batch in enumerate(BATCHES):
            for j, size in enumerate(LENGTHS if prefill else CONTEXTS):
                if batch * size > 2**17:
                    continue
                if prefill:
                    seconds = 5e-6 + batch * heads * size * (size + 1) * (320 if latent else 256) / (0.7 * PEAK)
                else:
                    width = 576 if latent else 2 * kv * 128
                    seconds = 5e-6 + 2 * batch * size * width / (0.7 * DEVICE.memory_bytes_per_s)
                seconds *= 1.0 if scale is None else scale[i][j]
                row = {"batch": batch, "heads": heads, "kv_dtype": "bf16", "dtype": "bf16", "seconds": seconds}
                row |= {"new": size, "before": 0} if prefill else {"context": size}
                row |= {} if latent else {"kv_heads": kv, "head_dim": 128, "window": 0}
                rows.append(row)
    frame = pd.DataFrame(rows).assign(device=DEVICE.name, software="imagined 1", kernel="k", spread=np.nan, source="s")
    return checked_against(frame.assign(**columns), family, DEVICE, "imagined")


#: Factors that rise along batch and length by up to 25 % a step.
SCALES = st.lists(st.lists(st.floats(1.0, 1.25), min_size=6, max_size=6), min_size=5, max_size=5).map(
    lambda steps: np.cumprod(np.cumprod(steps, axis=0), axis=1) ** 0.2
)


@settings(max_examples=25)
@given(scale=SCALES, family=st.sampled_from(sorted(TIMES)))
def test_law_table_points_are_exact(scale: np.ndarray, family: str) -> None:
    rows = table(family, scale=scale, shapes=((32, 8), (8, 1), (16, 2))) if "mla" not in family else table(family)
    times = TIMES[family]
    usable = times.usable(rows, DEVICE)
    assert len(usable) == len(rows)
    np.testing.assert_allclose(times.fit(rows, DEVICE).predict(usable), usable["seconds"], rtol=1e-9)


@settings(max_examples=25)
@given(scale=SCALES, kv=st.sampled_from([8, 4, 1]))
def test_law_times_rise_with_batch_and_length_where_the_table_does(scale: np.ndarray, kv: int) -> None:
    sizes = np.geomspace(1, 2e5, 37)
    batches = np.geomspace(1, 400, 41)[:, None]
    models: list[np.ndarray] = []
    for heads in (32, 12):
        decode = DecodeTimes.fit(table("attention_decode", scale=scale), DEVICE)
        prefill = PrefillTimes.fit(table("attention_prefill", scale=scale), DEVICE)
        for found in (
            decode.time_s(heads, kv, 128, 0, "bf16", "bf16", batches, sizes),
            prefill.time_s(heads, kv, 128, 0, "bf16", "bf16", batches, sizes, 0),
        ):
            assert found is not None
            models.append(found.seconds)
    for seconds in models:
        assert np.isfinite(seconds).all() and (seconds > 0).all()
        assert (np.diff(seconds, axis=0) >= -1e-9 * seconds[1:]).all()
        assert (np.diff(seconds, axis=1) >= -1e-9 * seconds[:, 1:]).all()


@settings(max_examples=40)
@given(
    heads=st.sampled_from([1, 5, 8, 12, 32, 64, 96]),
    ratio=st.sampled_from([1, 2, 4, 7]),
    head_dim=st.sampled_from([64, 96, 128, 192]),
    window=st.sampled_from([0, 128, 1000, 4096]),
    kv_dtype=st.sampled_from(["bf16", "fp8"]),
    batch=st.floats(1, 5000),
    size=st.floats(1, 3e5),
    before=st.floats(0, 2e5),
)
def test_law_nothing_is_faster_than_the_peak(
    heads: int, ratio: int, head_dim: int, window: int, kv_dtype: str, batch: float, size: float, before: float
) -> None:
    kv = max(1, heads // ratio)
    prefill = PREFILL.time_s(heads, kv, head_dim, window, "bf16", kv_dtype, batch, size, before)
    decode = DECODE.time_s(heads, kv, head_dim, window, "bf16", kv_dtype, batch, size)
    assert prefill is not None and decode is not None
    pairs = attended_pairs(np.array(size), np.array(before), window or None)
    assert prefill.seconds >= 4 * batch * heads * head_dim * pairs / PEAK / TOLERANCE * (1 - 1e-9)
    seen = min(size, window) if window else size
    nbytes = 2 * batch * seen * kv * head_dim * (1 if kv_dtype == "fp8" else 2)
    if nbytes > 256e6:
        assert decode.seconds >= nbytes / DEVICE.memory_bytes_per_s / TOLERANCE * (1 - 1e-9)
    assert np.isfinite(decode.seconds) and decode.seconds > 1e-6


PREFILL = PrefillTimes.fit(table("attention_prefill"), DEVICE)
DECODE = DecodeTimes.fit(table("attention_decode"), DEVICE)


def test_law_arrays_and_scalars_agree() -> None:
    batch, context = np.array([[1.0], [3.0], [700.0]]), np.array([1.0, 100.0, 5000.5])
    many = DECODE.time_s(8, 1, 128, 0, "bf16", "bf16", batch, context)
    assert many is not None and many.seconds.shape == many.measured.shape == (3, 3)
    for i, b in enumerate(batch[:, 0]):
        for j, c in enumerate(context):
            one = DECODE.time_s(8, 1, 128, 0, "bf16", "bf16", b, c)
            assert one is not None and one.seconds == pytest.approx(many.seconds[i, j], rel=1e-12)


@pytest.mark.parametrize("family", sorted(TIMES))
def test_law_what_comes_from_arrays_gives_the_same_times(family: str) -> None:
    rows = table(family)
    model = TIMES[family].fit(rows, DEVICE)
    arrays = model.arrays()
    assert all(a.dtype != object for a in arrays.values())
    again = TIMES[family].from_arrays(arrays, DEVICE)
    usable = TIMES[family].usable(rows, DEVICE)
    moved = usable.assign(batch=usable["batch"] * 1.3, heads=12)
    np.testing.assert_array_equal(again.predict(moved), model.predict(moved))


def test_an_empty_table_has_no_answer() -> None:
    rows = table("attention_decode")[:0]
    model = DecodeTimes.fit(rows, DEVICE)
    assert model.time_s(32, 8, 128, 0, "bf16", "bf16", 1, 100) is None
    assert DecodeTimes.from_arrays(model.arrays(), DEVICE).time_s(8, 1, 128, 0, "bf16", "bf16", 1, 100) is None
    assert PrefillTimes.fit(table("attention_prefill")[:0], DEVICE).time_s(
        8, 1, 128, 0, "bf16", "bf16", 1, 9, [0, 5]
    ) is None  # fmt: skip


@pytest.mark.parametrize("family", sorted(TIMES))
def test_law_usable_rows_stay_usable(family: str) -> None:
    """At 95 % of the peak, where a row counted too large would be thrown out."""
    rows = table(family, shapes=((32, 1), (64, 1)))
    seconds = 32 * (rows["seconds"] - 5e-6) * 0.7 / 0.95 + 1e-7
    fast = TIMES[family].usable(rows.assign(seconds=seconds, batch=32 * rows["batch"]), DEVICE)
    again = TIMES[family].usable(fast, DEVICE)
    assert len(again) == len(fast) == len(rows)


def test_measured_says_what_lies_inside_the_table() -> None:
    def known(*point: Any) -> float:
        found = DECODE.time_s(*point)
        assert found is not None
        return float(found.measured)

    assert known(32, 8, 128, 0, "bf16", "bf16", 3, 700) == 1
    assert known(24, 4, 128, 0, "bf16", "bf16", 3, 700) == 1  # 6 heads per KV head, between 4 and 8
    assert known(32, 8, 128, 0, "bf16", "bf16", 16, 65536) == 0  # the table ends at 2^17 tokens
    assert known(32, 8, 128, 0, "bf16", "bf16", 3, 1) == 0
    assert known(32, 32, 128, 0, "bf16", "bf16", 3, 700) == 0  # 1 head per KV head
    assert known(32, 8, 96, 0, "bf16", "bf16", 3, 700) == 0
    assert known(32, 8, 128, 128, "bf16", "bf16", 3, 700) == 0
    assert known(32, 8, 128, 0, "bf16", "fp8", 3, 700) == 0
    assert known(32, 8, 128, 0, "fp8", "bf16", 3, 700) == 0


def test_theory_the_imagined_kernel_is_found_between_and_beyond_its_points() -> None:
    """Four heads per KV head were measured at (32, 8); the others are priced at equal work."""
    batch, context = np.array([[1.0], [3.0], [12.0], [64.0]]), np.array([40.0, 700.0, 30000.0])
    for kv in (8, 2, 16):
        found = DECODE.time_s(4 * kv, kv, 128, 0, "bf16", "bf16", batch, context)
        assert found is not None
        truth = 5e-6 + 4 * batch * context * kv * 128 / (0.7 * DEVICE.memory_bytes_per_s)
        np.testing.assert_allclose(found.seconds, truth, rtol=0.06)
    new = np.array([100.0, 1500.0, 16000.0])
    prompt = PREFILL.time_s(32, 8, 128, 0, "bf16", "bf16", batch, new, 0)
    assert prompt is not None
    np.testing.assert_allclose(prompt.seconds, 5e-6 + batch * 32 * new * (new + 1) * 256 / (0.7 * PEAK), rtol=0.1)


def test_theory_chunks_of_a_long_prompt_take_as_long_as_the_prompt() -> None:
    """Four chunks of 4,096 tokens hold the query-key pairs of one prompt of 16,384, and three launches more."""
    chunks = PREFILL.time_s(32, 8, 128, 0, "bf16", "bf16", 1, 4096, np.arange(4) * 4096)
    whole = PREFILL.time_s(32, 8, 128, 0, "bf16", "bf16", 1, 16384, 0)
    assert chunks is not None and whole is not None
    assert chunks.seconds.sum() == pytest.approx(float(whole.seconds) + 15e-6, rel=0.1)
    assert (np.diff(chunks.seconds) > 0).all()
    np.testing.assert_array_equal(chunks.measured, [1, 0, 0, 0])


def test_measured_chunks_are_exact_and_pull_their_neighbours() -> None:
    prompts = table("attention_prefill")
    rule = PREFILL.time_s(32, 8, 128, 0, "bf16", "bf16", 1, 1024, [4096, 4500, 60000])
    assert rule is not None
    chunk = prompts[(prompts["new"] == 1024) & (prompts["batch"] == 1) & (prompts["heads"] == 32)]
    rows = pd.concat([prompts, chunk.assign(before=4096, seconds=1.5 * float(rule.seconds[0]))], ignore_index=True)
    found = PrefillTimes.fit(rows, DEVICE).time_s(32, 8, 128, 0, "bf16", "bf16", 1, 1024, [4096, 4500, 60000])
    assert found is not None
    ratio = found.seconds / rule.seconds
    assert ratio[0] == pytest.approx(1.5)
    assert 1.3 < ratio[1] < 1.5 and 1 <= ratio[2] < ratio[1]
    np.testing.assert_array_equal(found.measured, [1, 1, 0])


def test_a_window_bounds_the_cost_of_context() -> None:
    short, long = (DECODE.time_s(32, 8, 128, 1024, "bf16", "bf16", 4, c) for c in (1024, 65536))
    full = DECODE.time_s(32, 8, 128, 0, "bf16", "bf16", 4, 65536)
    assert short is not None and long is not None and full is not None
    assert long.seconds == pytest.approx(float(short.seconds), rel=0.01)
    assert full.seconds > 5 * long.seconds


def test_a_narrower_cache_costs_less_where_bytes_are_what_counts() -> None:
    wide, narrow = (DECODE.time_s(32, 8, 128, 0, "bf16", kv, 16, 8192) for kv in ("bf16", "fp8"))
    assert wide is not None and narrow is not None
    assert 0.4 < narrow.seconds / wide.seconds < 0.7


def test_an_outlier_is_not_believed() -> None:
    """A hiccup of 150 x in one row, as the wheel's latent decode on H200 has one."""
    rows = table("attention_decode")
    hit = (rows["batch"] == 4) & (rows["context"] == 128) & (rows["heads"] == 32)
    spoilt = rows.assign(seconds=rows["seconds"].where(~hit, rows["seconds"] * 150))
    found = DecodeTimes.fit(spoilt, DEVICE).time_s(32, 8, 128, 0, "bf16", "bf16", 4, 128)
    assert found is not None
    assert found.seconds == pytest.approx(float(rows.loc[hit, "seconds"].iloc[0]), rel=0.1)
    assert found.measured == 1


def test_what_equal_work_shows_twice_is_no_outlier() -> None:
    """(32, 8) at batch 4 does the work of (16, 4) at batch 8."""
    rows = table("attention_decode", shapes=((32, 8), (16, 4)))
    hit = (rows["context"] == 128) & (rows["batch"] * rows["heads"] == 128)
    slow = rows.assign(seconds=rows["seconds"].where(~hit, rows["seconds"] * 2))
    np.testing.assert_allclose(DecodeTimes.fit(slow, DEVICE).predict(slow), slow["seconds"], rtol=1e-9)


def test_of_two_kernels_at_a_point_the_engines_usual_one_counts() -> None:
    rows = table("attention_decode")
    rare = rows[rows["context"] == 128].assign(kernel="rare", seconds=lambda r: r["seconds"] * 3)
    model = DecodeTimes.fit(pd.concat([rare, rows], ignore_index=True), DEVICE)
    np.testing.assert_allclose(model.predict(rows), rows["seconds"], rtol=1e-9)


def test_holes_close_from_their_neighbours_and_from_shapes_alike() -> None:
    axis = np.arange(4.0)
    level = np.add.outer(axis, axis)
    level[1, 1] = np.nan
    closed, measured = filled(level, [], axis, axis)
    assert closed[1, 1] == pytest.approx(2) and measured.all()
    # A step no neighbour shows, but another shape does.
    step = np.where(axis == 1, 5.0, 0.0)[:, None] + np.zeros((4, 4))
    holed = step.copy()
    holed[1, 2] = np.nan
    closed, _ = filled(holed, [step + 1], axis, axis)
    assert closed[1, 2] == pytest.approx(5, abs=0.05)
    level[3, 2:] = np.nan
    closed, measured = filled(level, [], axis, axis)
    assert closed[3, 3] == closed[2, 3] and not measured[3, 2:].any()


def test_closed_holes_keep_to_what_is_measured_around_them() -> None:
    grid = np.array([[1.0, 2.0], [np.nan, 4.0]])
    assert between(grid, np.full((2, 2), 9.0))[1, 0] == 4
    assert between(grid, np.full((2, 2), -9.0))[1, 0] == 1


def test_a_table_point_that_breaks_the_order_bounds_nothing() -> None:
    grid = np.array([[1.0, 9.0, 3.0], [2.0, np.nan, 5.0], [4.0, 6.0, 7.0]])
    assert between(grid, np.full((3, 3), 4.5))[1, 1] == 4.5
    assert hiccups(grid).sum() == 1 and hiccups(grid)[0, 1]


def test_steps_are_no_outliers() -> None:
    level = np.zeros((5, 5))
    level[2:] = 1.0
    assert not outliers(level).any()
    level[3, 3] = 2.0
    assert np.argwhere(outliers(level)).tolist() == [[3, 3]]


def test_latent_attention_has_its_own_widths() -> None:
    decode = LatentDecodeTimes.fit(table("mla_decode", shapes=((16, 1), (64, 1))), DEVICE)
    prefill = LatentPrefillTimes.fit(table("mla_prefill", shapes=((16, 16), (64, 64))), DEVICE)
    one = decode.time_s(16, "bf16", 8, 4000)
    between_heads = decode.time_s(32, "bf16", 8, 4000)
    chunk = prefill.time_s(64, "bf16", 1, [1000, 1000], [0, 3000])
    assert one is not None and between_heads is not None and chunk is not None
    truth = 5e-6 + 2 * 8 * 4000 * 576 / (0.7 * DEVICE.memory_bytes_per_s)
    assert one.seconds == pytest.approx(truth, rel=0.05)
    assert between_heads.seconds == pytest.approx(truth, rel=0.05)
    assert chunk.seconds[1] > 3 * chunk.seconds[0]


@pytest.mark.parametrize("family", sorted(TIMES))
def test_left_out_rows_are_predicted_without_them(family: str) -> None:
    rows = table(family, shapes=((32, 8), (16, 4), (8, 1)) if "mla" not in family else ((32, 1), (16, 1)))
    if family == "mla_prefill":
        rows = table(family)
    found = held_out(rows, DEVICE, np.random.default_rng(0), limit=60, family=family)
    assert {"family", "dtype", "experiment", "size", "seconds", "predicted_s"} <= set(found.columns)
    assert {"point", "between", "shape", "beyond", "beyond_batch"} == set(found["experiment"])
    error = (found["predicted_s"] / found["seconds"] - 1).abs()
    assert error.median() < 0.05
    # A row that is wrong must come out wrong: its own time may not reach its prediction.
    spoilt = rows.assign(seconds=rows["seconds"].where(rows.index != 7, rows["seconds"] * 1.3))
    again = held_out(spoilt, DEVICE, np.random.default_rng(0), limit=200, family=family)
    point = again[again["experiment"] == "point"]
    off = (point["predicted_s"] / point["seconds"] - 1).abs()
    assert off.max() > 0.15


@pytest.mark.parametrize("family", sorted(TIMES))
@pytest.mark.parametrize("count", [0, 1])
def test_nothing_can_be_left_out_of_one_row(family: str, count: int) -> None:
    found = held_out(table(family).iloc[:count], DEVICE, np.random.default_rng(0), family=family)
    assert found.empty
    assert {"family", "dtype", "experiment", "size", "seconds", "predicted_s"} <= set(found.columns)


@pytest.fixture(scope="module")
def wheel() -> Any:
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs {DISTRIBUTION}")
    return open_wheel()


@pytest.mark.parametrize(("family", "bound"), [("mla_prefill", 0.03), ("mla_decode", 0.04)])
def test_published_left_out_points_of_the_wheel(wheel: Any, family: str, bound: float) -> None:
    rows = wheel.read("h200-sxm", "sglang", family)
    found = held_out(rows, DEVICE, np.random.default_rng(0), limit=150, family=family)
    error = (found["predicted_s"] / found["seconds"] - 1).abs()
    median = error.groupby(found["experiment"]).median()
    assert median["point"] < bound
    assert error[found["experiment"] == "beyond"].quantile(0.9) < 0.3


def test_published_wheel_points_are_exact(wheel: Any) -> None:
    """But for outliers, under one row in two hundred."""
    rows = wheel.read("h200-sxm", "vllm", "attention_decode")
    rows = rows[(rows["head_dim"] == 128) & (rows["window"] == 0) & (rows["kv_dtype"] == "bf16")]
    usable = DecodeTimes.usable(rows, DEVICE)
    model = DecodeTimes.fit(rows, DEVICE)
    off = np.abs(model.predict(usable) / usable["seconds"] - 1)
    assert (off > 1e-9).mean() < 0.005
