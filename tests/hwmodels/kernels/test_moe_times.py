"""Laws of interpolated expert-block times, on tables made up here and on measured ones."""

import importlib.metadata

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import MeasurementError
from hwmodels.hardware import load_device
from hwmodels.kernels import moe_holdout
from hwmodels.kernels.aiconfigurator import DISTRIBUTION, open_wheel
from hwmodels.kernels.expert_routing import exponent_of, load
from hwmodels.kernels.moe import MoeTimes
from hwmodels.kernels.moe_guide import TERMS, fitted_weights, terms
from hwmodels.kernels.table import checked

DEVICE = load_device("h200-sxm")
TOKENS = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
BLOCKS = ((4096, 1536, 128, 8), (2048, 768, 128, 8), (7168, 2048, 256, 8), (4096, 14336, 8, 2))
DISTRIBUTIONS = ("balanced", "power_law_1.01", "power_law_1.2")
TRUE = np.array([4.0, 2.0, 2.0, 0.5, 0.1, 1.0, 2.0, 3.0, 0.5, 0.0, 0.0])


def made_up(
    noise: float = 0.0,
    seed: int = 0,
    dtypes: tuple[str, ...] = ("bf16",),
    cuts: tuple = ((1, 1), (2, 1), (4, 1), (1, 4)),
) -> pd.DataFrame:
    """A table whose times are the terms of the guide with weights TRUE, times lognormal noise."""
    rng = np.random.default_rng(seed)
    frames = []
    for dtype in dtypes:
        for hidden, intermediate, experts, top_k in BLOCKS:
            for tp, ep in cuts:
                for distribution in DISTRIBUTIONS:
                    frames.append(
                        pd.DataFrame({"tokens": TOKENS}).assign(
                            hidden=hidden, intermediate=intermediate, experts=experts, top_k=top_k, tp=tp, ep=ep,
                            gated=1, distribution=distribution, dtype=dtype,
                            seconds=true_s(dtype, TOKENS, hidden, intermediate, experts, top_k, tp, ep, distribution),
                        )
                    )  # fmt: skip
    frame = pd.concat(frames, ignore_index=True)
    frame["seconds"] *= np.exp(noise * rng.standard_normal(len(frame)))
    return checked(
        frame.assign(device=DEVICE.name, software="made up 1", kernel="k", spread=np.nan, source="here"), "moe", "here"
    )


def true_s(dtype, tokens, hidden, intermediate, experts, top_k, tp, ep, distribution):
    tokens = np.asarray(tokens, float)
    here = load(tokens, experts, top_k, ep, exponent_of(distribution))
    width = np.ceil(intermediate / tp)
    return (
        terms(
            dtype,
            DEVICE,
            tokens,
            here.rows,
            here.touched,
            3.0 * hidden * width,
            hidden,
            width,
            top_k,
            experts / ep,
            1.0,
        )
        @ TRUE
    )


@pytest.fixture(scope="module")
def noisy() -> tuple[pd.DataFrame, MoeTimes]:
    rows = made_up(noise=0.2)
    return rows, MoeTimes.fit(rows, DEVICE)


def shape_of(row) -> dict:
    names = ("hidden", "intermediate", "experts", "top_k", "tp", "ep")
    return {name: int(getattr(row, name)) for name in names}


def test_exact_on_the_points_of_the_table(noisy):
    rows, times = noisy
    assert times.left_out == 0
    for row in rows.itertuples():
        found = times.time_s("bf16", row.tokens, **shape_of(row), distribution=row.distribution)
        assert found.seconds == pytest.approx(row.seconds, rel=1e-9)
        assert found.measured == 1.0


@settings(max_examples=60)
@given(
    tokens=st.lists(st.floats(1, 1e6), min_size=1, max_size=8),
    block=st.sampled_from([*BLOCKS, (3072, 1024, 64, 4), (8192, 512, 512, 10)]),
    cut=st.sampled_from([(1, 1), (2, 1), (8, 1), (1, 4), (1, 32), (3, 2)]),
    distribution=st.sampled_from([*DISTRIBUTIONS, "uniform", 0.7, 1.1, 1.5]),
)
def test_finite_positive_within_the_peak_and_the_same_one_by_one(noisy, tokens, block, cut, distribution):
    hidden, intermediate, experts, top_k = block
    tp, ep = cut
    shape = {"hidden": hidden, "intermediate": intermediate, "experts": experts, "top_k": top_k, "tp": tp, "ep": ep}
    found = noisy[1].time_s("bf16", np.array(tokens), **shape, distribution=distribution)
    assert np.isfinite(found.seconds).all() and (found.seconds > 0).all()
    flops = 2 * np.array(tokens) * top_k / ep * 3 * hidden * np.ceil(intermediate / tp)
    assert (found.seconds >= flops / DEVICE.peak_flops_per_s["bf16"] / 1.06).all()
    alone = [float(noisy[1].time_s("bf16", t, **shape, distribution=distribution).seconds) for t in tokens]
    assert alone == pytest.approx(found.seconds, rel=1e-12)
    assert set(np.unique(found.measured)) <= {0.0, 1.0}


@given(seed=st.integers(0, 50), distribution=st.sampled_from(DISTRIBUTIONS))
@settings(max_examples=15)
def test_monotone_in_tokens_where_the_table_is(seed, distribution):
    rows = made_up(noise=0.3, seed=seed, cuts=((2, 1),))
    part = rows[(rows["experts"] == 256) & (rows["distribution"] == distribution)].sort_values("tokens")
    rows.loc[part.index, "seconds"] = np.maximum.accumulate(part["seconds"].to_numpy())
    grid = np.geomspace(1, 1e6, 700)
    found = MoeTimes.fit(rows, DEVICE).time_s("bf16", grid, 7168, 2048, 256, 8, 2, 1, distribution=distribution)
    assert (np.diff(np.log(found.seconds)) >= -1e-9).all()


def test_a_shape_left_out_is_priced_by_its_neighbours():
    rows = made_up()
    gone = (rows["hidden"] == 4096) & (rows["experts"] == 128) & (rows["tp"] == 2)
    times = MoeTimes.fit(rows[~gone], DEVICE)
    for distribution in DISTRIBUTIONS:
        found = times.time_s("bf16", TOKENS, 4096, 1536, 128, 8, 2, 1, distribution=distribution)
        true = true_s("bf16", TOKENS, 4096, 1536, 128, 8, 2, 1, distribution)
        assert found.seconds == pytest.approx(true, rel=0.02)
        assert (found.measured == 1).all()


def test_beyond_the_table_follows_the_guide_and_says_so():
    rows = made_up()
    times = MoeTimes.fit(rows[rows["tokens"].between(8, 1024)], DEVICE)
    ends = np.array([1, 4, 4096, 65536])
    found = times.time_s("bf16", ends, 4096, 1536, 128, 8, 1, 1)
    assert found.seconds == pytest.approx(true_s("bf16", ends, 4096, 1536, 128, 8, 1, 1, "balanced"), rel=0.03)
    assert (found.measured == 0).all()


def test_the_guide_recovers_the_weights_it_was_made_of():
    rows = made_up()
    rows = rows.assign(exponent=[exponent_of(name) for name in rows["distribution"]])
    found = fitted_weights(rows, np.zeros(len(rows), int), np.array(["bf16"]), DEVICE)
    assert found.shape == (1, TERMS)
    assert found[0, [0, 1, 2, 3, 7]] == pytest.approx(TRUE[[0, 1, 2, 3, 7]], rel=0.05)


def test_uniform_routing_lies_between_what_was_measured():
    times = MoeTimes.fit(made_up(), DEVICE)
    both = [
        times.time_s("bf16", 16, 7168, 2048, 256, 8, 1, 1, distribution=name).seconds
        for name in ("power_law_1.01", "uniform", "balanced")
    ]
    assert both[0] <= both[1] <= both[2]
    assert times.time_s("bf16", 16, 7168, 2048, 256, 8, 1, 1, distribution="uniform").measured == 1


def test_formats_that_were_not_measured():
    times = MoeTimes.fit(made_up(dtypes=("fp8",)), DEVICE)
    block = {"hidden": 4096, "intermediate": 1536, "experts": 128, "top_k": 8, "tp": 1, "ep": 1}
    assert times.time_s("bf16", 8, **block) is None
    near = times.time_s("fp8_block", TOKENS, **block)
    assert (near.measured == 0).all()
    assert near.seconds == pytest.approx(times.time_s("fp8", TOKENS, **block).seconds, rel=0.05)
    plain = times.time_s("fp8", TOKENS, **block, gated=False)
    assert (plain.measured == 0).all()
    assert (plain.seconds <= times.time_s("fp8", TOKENS, **block).seconds).all()


def test_the_fastest_kernel_of_a_shape_counts():
    rows = made_up()
    slow = rows.assign(kernel="slow", seconds=rows["seconds"] * np.where(rows["tokens"] > 64, 0.5, 2.0))
    both = pd.concat([rows, slow], ignore_index=True)
    found = MoeTimes.fit(both, DEVICE).time_s("bf16", TOKENS, 4096, 1536, 128, 8, 1, 1)
    true = true_s("bf16", TOKENS, 4096, 1536, 128, 8, 1, 1, "balanced")
    assert found.seconds == pytest.approx(true * np.where(TOKENS > 64, 0.5, 1.0), rel=1e-9)


def test_rows_beyond_the_memory_peak_are_left_out():
    rows = made_up()
    wrong = (rows["distribution"] == "balanced") & (rows["experts"] == 256) & (rows["tp"] == 1) & (rows["ep"] == 1)
    wrong &= rows["tokens"].between(32, 128)
    rows.loc[wrong, "seconds"] /= 4
    times = MoeTimes.fit(rows, DEVICE)
    assert times.left_out == wrong.sum() == 3
    found = times.time_s("bf16", 64, 7168, 2048, 256, 8, 1, 1)
    assert found.seconds >= 256 * 3 * 7168 * 2048 * 2 / DEVICE.memory_bytes_per_s / 1.06


def test_rebuilt_from_its_arrays_it_prices_alike(noisy):
    arrays = noisy[1].arrays()
    assert not any(values.dtype.hasobject for values in arrays.values())
    again = MoeTimes.from_arrays(arrays, DEVICE)
    args = ("bf16", TOKENS, 4096, 1024, 160, 8, 1, 2)
    assert np.array_equal(again.time_s(*args).seconds, noisy[1].time_s(*args).seconds)
    assert again.left_out == noisy[1].left_out


def test_an_empty_table_prices_nothing():
    times = MoeTimes.fit(made_up().iloc[:0], DEVICE)
    assert times.time_s("bf16", 1, 4096, 1536, 128, 8, 1, 1) is None


@pytest.mark.parametrize("word", ["skewed", "power_law_x", -0.5, float("nan")])
def test_unknown_routing_is_refused(noisy, word):
    with pytest.raises(MeasurementError, match="expected 'balanced', 'uniform' or the exponent"):
        noisy[1].time_s("bf16", 1, 4096, 1536, 128, 8, 1, 1, distribution=word)


@given(
    experts=st.sampled_from([8, 60, 128, 256]),
    top_k=st.integers(1, 8),
    ep=st.sampled_from([1, 2, 4, 7, 8]),
    exponent=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.01, 1.2]),
)
def test_loads_keep_within_the_rows_there_are(experts, top_k, ep, exponent):
    tokens = np.geomspace(1, 1e5, 60)
    here = load(tokens, experts, top_k, ep, exponent)
    assert (here.rows >= tokens * top_k / ep * (1 - 1e-9)).all()
    assert (here.rows <= tokens * top_k * (1 + 1e-9)).all()
    assert (here.touched > 0).all()
    assert (here.touched <= np.minimum(here.rows, experts / ep) * (1 + 1e-9)).all()


@pytest.mark.parametrize(("exponent", "ep"), [(1.01, 1), (1.2, 1), (1.01, 8), (1.2, 8)])
def test_power_law_loads_are_those_of_routed_draws(exponent, ep):
    """300 draws of popularity, placement and rows: means within 10 %."""
    rng = np.random.default_rng(5)
    experts, top_k, tokens = 128, 8, 512
    rows, touched = [], []
    for _ in range(300):
        u, largest = rng.random(experts), 0.8 * tokens
        popularity = (1 + u * (largest ** (1 - exponent) - 1)) ** (1 / (1 - exponent))
        counts = rng.multinomial(tokens * top_k, popularity / popularity.sum()).reshape(ep, -1)
        busiest = counts.sum(axis=1).argmax()
        rows.append(counts[busiest].sum())
        touched.append((counts[busiest] > 0).sum())
    found = load(np.array([float(tokens)]), experts, top_k, ep, exponent)
    assert found.rows[0] == pytest.approx(np.mean(rows), rel=0.1)
    assert found.touched[0] == pytest.approx(np.mean(touched), rel=0.1)


def test_left_out_rows_do_not_reach_their_prediction():
    rows = made_up(noise=0.05)
    found = moe_holdout.held_out(rows, DEVICE, np.random.default_rng(1), limit=60)
    assert set(found["experiment"]) == {"point", "shape", "model", "beyond"}
    assert found["predicted_s"].notna().all()
    error = np.abs(found["predicted_s"] / found["seconds"] - 1)
    assert error.min() > 0
    assert error[found["experiment"] == "point"].median() < 0.15


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_can_be_left_out_of_one_row(count):
    found = moe_holdout.held_out(made_up().iloc[:count], DEVICE, np.random.default_rng(0))
    assert found.empty
    assert {"family", "dtype", "experiment", "size", "seconds", "predicted_s"} <= set(found.columns)


def test_measured_blocks_on_h200_are_interpolated_within_targets():
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed")
    rows = open_wheel().read("h200-sxm", "vllm", "moe")
    rows = rows[(rows["dtype"] == "bf16") & (rows["hidden"] == 4096)]
    found = moe_holdout.held_out(rows, DEVICE, np.random.default_rng(0), limit=300)
    error = np.abs(found["predicted_s"] / found["seconds"] - 1).groupby(found["experiment"])
    assert error.median()["point"] < 0.05
    assert error.median()["shape"] < 0.15
