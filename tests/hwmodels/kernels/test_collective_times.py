"""Laws of interpolated collectives, on tables made up here and on measured ones."""

import importlib.metadata

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.hardware import load_cluster, load_device
from hwmodels.kernels import collective_holdout
from hwmodels.kernels.aiconfigurator import DISTRIBUTION, open_wheel
from hwmodels.kernels.collective import CollectiveTimes
from hwmodels.kernels.table import checked

DEVICE = load_device("h200-sxm")
BYTES = 2 ** np.arange(9, 30)
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
LATENCY_S, BYTES_PER_S = 5e-6, 300e9


def true_s(kind: str, gpus: int, nbytes) -> np.ndarray:
    sent = (gpus - 1) / gpus * (2 if kind == "all-reduce" else 1)
    return LATENCY_S * np.log2(gpus) + np.asarray(nbytes, float) * sent / BYTES_PER_S


def made_up(
    noise: float = 0.0, seed: int = 0, software: str = "nccl 1", dtype: str = "fp16", kinds=KINDS
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frames = [
        pd.DataFrame({"bytes": BYTES, "kind": kind, "gpus": gpus, "seconds": true_s(kind, gpus, BYTES)})
        for kind in kinds
        for gpus in (2, 4, 8)
    ]
    frame = pd.concat(frames, ignore_index=True)
    frame["seconds"] *= np.exp(noise * rng.standard_normal(len(frame)))
    names = {"device": DEVICE.name, "software": software, "kernel": software, "spread": np.nan, "source": "here"}
    return checked(frame.assign(nodes=1, dtype=dtype, **names), "collective", "here")


@pytest.fixture(scope="module")
def noisy() -> CollectiveTimes:
    return CollectiveTimes.fit(made_up(0.2), DEVICE)


def wheel_rows(device: str, engine: str) -> pd.DataFrame:
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed")
    wheel = open_wheel()
    frames = [wheel.read(device, name, "collective") for name in (engine, "nccl")]
    return pd.concat([frame for frame in frames if len(frame)], ignore_index=True)


@given(seed=st.integers(0, 100), noise=st.sampled_from([0.0, 0.2]))
@settings(max_examples=15)
def test_exact_on_the_points_of_the_table(seed, noise):
    rows = made_up(noise, seed)
    times = CollectiveTimes.fit(rows, DEVICE)
    assert times.left_out == 0
    for (kind, gpus), part in rows.groupby(["kind", "gpus"]):
        found = times.time_s(kind, gpus, part["bytes"].to_numpy())
        assert found.seconds == pytest.approx(part["seconds"].to_numpy(), rel=1e-9)
        assert (found.measured == 1).all()


@given(
    kind=st.sampled_from(KINDS),
    gpus=st.sampled_from([2, 3, 4, 6, 8, 16, 72]),
    sizes=st.lists(st.floats(1, 1e13), min_size=1, max_size=8),
)
@settings(max_examples=60)
def test_finite_positive_and_the_same_one_by_one(noisy, kind, gpus, sizes):
    times = noisy
    found = times.time_s(kind, gpus, np.array(sizes))
    assert np.isfinite(found.seconds).all() and (found.seconds > 0).all()
    alone = [float(times.time_s(kind, gpus, size).seconds) for size in sizes]
    assert alone == pytest.approx(found.seconds, rel=1e-12)


@given(seed=st.integers(0, 100), gpus=st.sampled_from([2, 3, 4, 6, 8, 16]))
@settings(max_examples=20)
def test_monotone_in_bytes_where_the_table_is(seed, gpus):
    rows = made_up(0.3, seed).sort_values(["kind", "gpus", "bytes"])
    rows["seconds"] = rows.groupby(["kind", "gpus"])["seconds"].cummax()
    found = CollectiveTimes.fit(rows, DEVICE).time_s("all-reduce", gpus, np.geomspace(1, 1e12, 500))
    assert (np.diff(np.log(found.seconds)) >= -1e-9).all()


@pytest.mark.parametrize("gpus", [3, 6, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_were_not_measured_scale(kind, gpus):
    found = CollectiveTimes.fit(made_up(), DEVICE).time_s(kind, gpus, BYTES)
    assert found.seconds == pytest.approx(true_s(kind, gpus, BYTES), rel=0.06)
    assert (found.measured == 0).all()


def test_beyond_the_table_the_line_goes_on():
    times = CollectiveTimes.fit(made_up(), DEVICE)
    sizes = np.array([1.0, 64.0, 2.0**31, 2.0**42])
    found = times.time_s("all-gather", 8, sizes)
    assert found.seconds == pytest.approx(true_s("all-gather", 8, sizes), rel=0.01)
    assert (found.measured == 0).all()


def test_an_engine_brings_its_all_reduce_and_nccl_the_rest():
    nccl, own = made_up(), made_up(software="engine 1", dtype="bf16")
    own = own[own["bytes"] <= 2**20].assign(seconds=own["seconds"] * 0.5)
    times = CollectiveTimes.fit(pd.concat([nccl, own]), DEVICE)
    share = np.where(BYTES <= 2**20, 0.5, 1.0)
    assert times.time_s("all-reduce", 4, BYTES).seconds == pytest.approx(true_s("all-reduce", 4, BYTES) * share)
    assert times.time_s("all-gather", 4, BYTES).seconds == pytest.approx(true_s("all-gather", 4, BYTES))


def test_an_all_reduce_twice_as_slow_as_nccl_is_not_what_an_engine_runs():
    nccl, own = made_up(), made_up(software="engine 1", dtype="bf16", kinds=("all-reduce",))
    slow = own["bytes"] >= 2**24
    own["seconds"] *= np.where(slow, 2.5, 0.6)
    times = CollectiveTimes.fit(pd.concat([nccl, own]), DEVICE)
    assert times.left_out == slow.sum()
    share = np.where(BYTES >= 2**24, 1.0, 0.6)
    assert times.time_s("all-reduce", 8, BYTES).seconds == pytest.approx(true_s("all-reduce", 8, BYTES) * share)


def test_sixteen_bit_rows_are_preferred_and_others_better_than_none():
    narrow = made_up(dtype="int8").assign(seconds=lambda rows: rows["seconds"] * 3)
    both = CollectiveTimes.fit(pd.concat([narrow, made_up()]), DEVICE)
    assert both.time_s("all-gather", 2, 2**20).seconds == pytest.approx(true_s("all-gather", 2, 2**20))
    alone = CollectiveTimes.fit(narrow, DEVICE)
    assert alone.time_s("all-gather", 2, 2**20).seconds == pytest.approx(3 * true_s("all-gather", 2, 2**20))


def test_pathological_groups_are_left_out_and_priced_by_the_nearest():
    rows = made_up()
    broken = (rows["gpus"] == 8) & (rows["bytes"] >= 2**18)
    rows["seconds"] *= np.where(broken, 30, 1)
    times = CollectiveTimes.fit(rows, DEVICE)
    assert times.left_out == broken.sum() == len(KINDS) * 12
    found = times.time_s("all-reduce", 8, BYTES)
    assert found.seconds == pytest.approx(true_s("all-reduce", 8, BYTES), rel=0.1)
    assert (found.measured == (BYTES < 2**18)).all()


def test_kinds_that_were_not_measured_have_no_price():
    assert CollectiveTimes.fit(made_up(), DEVICE).time_s("point-to-point", 2, 1024) is None
    assert CollectiveTimes.fit(made_up().iloc[:0], DEVICE).time_s("all-reduce", 2, 1024) is None


def test_rebuilt_from_its_arrays_it_prices_alike():
    times = CollectiveTimes.fit(made_up(0.2), DEVICE)
    arrays = times.arrays()
    assert not any(values.dtype.hasobject for values in arrays.values())
    again = CollectiveTimes.from_arrays(arrays, DEVICE)
    sizes = np.geomspace(100, 1e9, 40)
    assert np.array_equal(again.time_s("all-reduce", 6, sizes).seconds, times.time_s("all-reduce", 6, sizes).seconds)


def test_left_out_rows_do_not_reach_their_prediction():
    found = collective_holdout.held_out(made_up(0.1), DEVICE, np.random.default_rng(0), limit=20)
    assert set(found["experiment"]) == {"point", "shape", "beyond"}
    assert found["predicted_s"].notna().all()
    assert np.abs(found["predicted_s"] / found["seconds"] - 1).min() > 0


def test_measured_bytes_are_those_of_the_cluster_graph():
    """Counted as hwmodels.collectives does, no kind moves more than the links of eight H200 can carry, nor far less."""
    link = load_cluster("h200-sxm", 8).intra.bytes_per_s
    times = CollectiveTimes.fit(wheel_rows("h200-sxm", "nccl"), DEVICE)
    size = 2.0**29
    for kind in KINDS[1:]:
        moved = size * 7 / 8 / float(times.time_s(kind, 8, size).seconds)
        assert 0.5 * link < moved < link


def test_measured_collectives_on_h200_are_interpolated_within_targets():
    found = collective_holdout.held_out(wheel_rows("h200-sxm", "vllm"), DEVICE, np.random.default_rng(0), limit=60)
    point = found[found["experiment"] == "point"]
    error = np.abs(point["predicted_s"] / point["seconds"] - 1)
    large = point["size"] >= 2**20
    assert error[large].median() < 0.05
    assert error[~large].median() < 0.15


def test_eight_l40s_without_peer_access_are_not_believed():
    rows = wheel_rows("l40s", "vllm")
    times = CollectiveTimes.fit(rows, load_device("l40s"))
    assert times.left_out > 20
    kept = pd.DataFrame({"gpus": np.repeat(times.gpus, np.diff(times.starts)), "bytes": times.bytes})
    assert kept.loc[kept["gpus"] == 8, "bytes"].max() < 2**20
    assert kept.loc[kept["gpus"] == 2, "bytes"].max() >= 2**29
