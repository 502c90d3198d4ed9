"""Laws of interpolated expert exchanges, on tables made up here and on measured ones."""

import importlib.metadata

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import MeasurementError
from hwmodels.hardware import load_device
from hwmodels.kernels import exchange_holdout
from hwmodels.kernels.aiconfigurator import DISTRIBUTION, open_wheel
from hwmodels.kernels.exchange import ExchangeTimes
from hwmodels.kernels.table import checked

DEVICE = load_device("h100-sxm")
FEW, MANY = 2 ** np.arange(0, 9), 2 ** np.arange(4, 15)
SHAPES = ((4096, 128, 8), (7168, 256, 8), (7168, 384, 6), (2048, 128, 8))
GROUPS = ((8, 1), (16, 2), (32, 4))


def true_s(kernel: str, kind: str, gpus: int, nodes: int, tokens, hidden: int, top_k: int) -> np.ndarray:
    """Low-latency kernels start sooner and send more: a copy per expert, not per rank."""
    low, width = "_ll" in kernel, 1 if kind == "dispatch" else 2
    copies = top_k + 0.5 if low else 1 + gpus * (1 - (1 - 1 / gpus) ** top_k)
    start_s = (12e-6 if low else 40e-6) * nodes**0.5
    return start_s + np.asarray(tokens, float) * hidden * copies * width * nodes * 3e-12


def made_up(noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frames = []
    for kernel, tokens in (("deepep_ll", FEW), ("deepep_normal_sms20", MANY)):
        for kind in ("dispatch", "combine"):
            for gpus, nodes in GROUPS:
                for hidden, experts, top_k in SHAPES:
                    seconds = true_s(kernel, kind, gpus, nodes, tokens, hidden, top_k)
                    frames.append(
                        pd.DataFrame({"tokens": tokens, "seconds": seconds}).assign(
                            kernel=kernel,
                            kind=kind,
                            gpus=gpus,
                            nodes=nodes,
                            hidden=hidden,
                            experts=experts,
                            top_k=top_k,
                        )
                    )
    frame = pd.concat(frames, ignore_index=True)
    frame["seconds"] *= np.exp(noise * rng.standard_normal(len(frame)))
    names = {"device": DEVICE.name, "software": "made up 1", "spread": np.nan, "source": "here"}
    return checked(frame.assign(dtype="bf16", **names), "expert_exchange", "here")


@pytest.fixture(scope="module")
def noisy() -> ExchangeTimes:
    return ExchangeTimes.fit(made_up(0.2), DEVICE)


KEY = ["kind", "gpus", "nodes", "hidden", "experts", "top_k"]


@given(seed=st.integers(0, 100), mode=st.sampled_from(["best", "low-latency", "normal"]))
@settings(max_examples=10)
def test_exact_on_the_points_of_the_table(seed, mode):
    rows = made_up(0.2, seed)
    times = ExchangeTimes.fit(rows, DEVICE)
    if mode != "best":
        rows = rows[rows["kernel"].str.contains("_ll") == (mode == "low-latency")]
    for row in rows.groupby([*KEY, "tokens"])["seconds"].min().reset_index().itertuples():
        found = times.time_s(row.kind, row.gpus, row.nodes, row.tokens, row.hidden, row.experts, row.top_k, mode)
        assert found.seconds == pytest.approx(row.seconds, rel=1e-9)
        assert found.measured == 1


@given(
    kind=st.sampled_from(["dispatch", "combine"]),
    group=st.sampled_from([*GROUPS, (4, 1), (64, 8), (2, 1)]),
    shape=st.sampled_from([*SHAPES, (5120, 64, 2), (8192, 512, 22)]),
    mode=st.sampled_from(["best", "low-latency", "normal"]),
    tokens=st.lists(st.floats(1, 1e9), min_size=1, max_size=6),
)
@settings(max_examples=60)
def test_finite_positive_and_the_same_one_by_one(noisy, kind, group, shape, mode, tokens):
    times = noisy
    hidden, experts, top_k = shape
    found = times.time_s(kind, *group, np.array(tokens), hidden, experts, top_k, mode)
    assert np.isfinite(found.seconds).all() and (found.seconds > 0).all()
    alone = [float(times.time_s(kind, *group, n, hidden, experts, top_k, mode).seconds) for n in tokens]
    assert alone == pytest.approx(found.seconds, rel=1e-12)


@given(seed=st.integers(0, 100), mode=st.sampled_from(["low-latency", "normal"]))
@settings(max_examples=15)
def test_monotone_in_tokens_where_the_table_is(seed, mode):
    rows = made_up(0.3, seed).sort_values("tokens")
    rows["seconds"] = rows.groupby(["kernel", *KEY])["seconds"].cummax()
    times = ExchangeTimes.fit(rows, DEVICE)
    for hidden in (7168, 6144):
        found = times.time_s("combine", 8, 1, np.geomspace(1, 1e8, 400), hidden, 256, 8, mode)
        assert (np.diff(np.log(found.seconds)) >= -1e-9).all()


def test_the_faster_kernel_is_taken_at_every_size():
    times = ExchangeTimes.fit(made_up(), DEVICE)
    tokens = np.array([1, 16, 64, 256, 4096])
    args = (tokens, 7168, 256, 8)
    both = [true_s(kernel, "combine", 8, 1, tokens, 7168, 8) for kernel in ("deepep_ll", "deepep_normal_sms20")]
    best = np.minimum(*both)
    assert best[0] == both[0][0] and best[-1] == both[1][-1]
    assert times.time_s("combine", 8, 1, *args).seconds == pytest.approx(best)
    assert times.time_s("combine", 8, 1, *args, "normal").seconds[1:] == pytest.approx(both[1][1:])
    assert times.time_s("combine", 8, 1, *args, "low-latency").seconds[:-1] == pytest.approx(both[0][:-1])


def test_shapes_that_were_not_measured_scale_by_what_they_move():
    times = ExchangeTimes.fit(made_up(), DEVICE)
    for mode, kernel, tokens in (("low-latency", "deepep_ll", FEW), ("normal", "deepep_normal_sms20", MANY)):
        found = times.time_s("dispatch", 8, 1, tokens, 6144, 256, 7, mode)
        assert found.seconds == pytest.approx(true_s(kernel, "dispatch", 8, 1, tokens, 6144, 7), rel=0.03)
        assert (found.measured == 1).all()


def test_groups_that_were_not_measured_follow_the_nearest_and_say_so():
    times = ExchangeTimes.fit(made_up(), DEVICE)
    found = times.time_s("dispatch", 4, 1, MANY, 7168, 256, 8)
    assert (found.measured == 0).all()
    assert (found.seconds <= times.time_s("dispatch", 8, 1, MANY, 7168, 256, 8).seconds * 1.01).all()


def test_what_was_not_measured_has_no_price():
    rows = made_up()
    times = ExchangeTimes.fit(rows[rows["kernel"] == "deepep_ll"], DEVICE)
    assert times.time_s("combine", 8, 1, 4, 7168, 256, 8, "normal") is None
    assert times.time_s("gather", 8, 1, 4, 7168, 256, 8) is None
    assert ExchangeTimes.fit(rows.iloc[:0], DEVICE).time_s("combine", 8, 1, 4, 7168, 256, 8) is None
    with pytest.raises(MeasurementError, match="expected 'best', 'low-latency' or 'normal'"):
        times.time_s("combine", 8, 1, 4, 7168, 256, 8, "fast")


def test_rebuilt_from_its_arrays_it_prices_alike():
    times = ExchangeTimes.fit(made_up(0.2), DEVICE)
    arrays = times.arrays()
    assert not any(values.dtype.hasobject for values in arrays.values())
    again = ExchangeTimes.from_arrays(arrays, DEVICE)
    args = ("combine", 16, 2, np.geomspace(1, 1e5, 30), 5120, 160, 6)
    assert np.array_equal(again.time_s(*args).seconds, times.time_s(*args).seconds)


def test_left_out_rows_do_not_reach_their_prediction():
    found = exchange_holdout.held_out(made_up(0.1), DEVICE, np.random.default_rng(0), limit=120)
    assert set(found["experiment"]) == {"point", "shape", "beyond"}
    assert found["predicted_s"].notna().all()
    assert np.abs(found["predicted_s"] / found["seconds"] - 1).min() > 0


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_can_be_left_out_of_one_row(count):
    found = exchange_holdout.held_out(made_up().iloc[:count], DEVICE, np.random.default_rng(0))
    assert found.empty
    assert {"family", "dtype", "experiment", "size", "seconds", "predicted_s"} <= set(found.columns)


def test_measured_exchanges_on_h100_are_interpolated():
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed")
    rows = open_wheel().read("h100-sxm", "sglang", "expert_exchange")
    rows = rows[rows["kernel"].isin(["deepep_ll", "deepep_normal_sms24"])]
    found = exchange_holdout.held_out(rows, DEVICE, np.random.default_rng(0), limit=300)
    error = np.abs(found["predicted_s"] / found["seconds"] - 1).groupby(found["experiment"])
    assert error.median()["point"] < 0.05
    assert error.quantile(0.9)["beyond"] < 0.3
