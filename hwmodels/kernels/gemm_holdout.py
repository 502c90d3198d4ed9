"""How far off are interpolated matrix products, on rows the model has not seen?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hwmodels.hardware import Device
from hwmodels.kernels.gemm import BatchedGemmTimes, GemmTimes
from hwmodels.kernels.holdout import FOLD, REACH, Folds, joined, points
from hwmodels.kernels.table import beyond_peak

#: Rounds of leaving out shapes.
ROUNDS = 12


def held_out(rows: pd.DataFrame, device: Device, rng: np.random.Generator, limit: int = 2000) -> pd.DataFrame:
    """Predictions of rows of 'gemm' or (with a column groups) 'batched_gemm' by tables without them; size is flops.

    experiment   'point': scattered rows, at most a fiftieth of the table at a time; 'between': every row of one m,
                 neither the smallest nor the largest: what a size that nobody timed costs; 'shape': every row, in all
                 formats, of scattered (n, k), or of one count of groups; 'beyond': sizes m up to 4x beyond a table cut
                 at a quarter of its largest, or at 4x its smallest; 'beyond_shape': the same in n, and in k
    limit        rows of each experiment
    """
    batched = "groups" in rows
    family = "batched_gemm" if batched else "gemm"
    detail = ["m", "groups", "n", "k"] if batched else ["m", "n", "k"]
    rows = rows[~beyond_peak(rows, family, device)].reset_index(drop=True)
    if rows.empty:
        return joined([], detail)
    experiments: dict[str, list[Folds]] = {
        "point": [points(rows, rng, limit)],
        "between": [_sizes(rows, rng)],
        "shape": [_shapes(rows, ["groups"] if batched else ["n", "k"], rng)],
        "beyond": [_cuts(rows, "m")],
        "beyond_shape": [_cuts(rows, column) for column in (("groups",) if batched else ("n", "k"))],
    }
    frames = []
    for experiment, folds in experiments.items():
        parts = [_predicted(rows[keep], rows[test], device) for fold in folds for keep, test in fold if keep.any()]
        if parts:
            found = pd.concat(parts, ignore_index=True).assign(family=family, experiment=experiment)
            frames.append(found.sample(min(limit, len(found)), random_state=rng))
    return joined(frames, detail)


def _shapes(rows: pd.DataFrame, columns: list[str], rng: np.random.Generator) -> Folds:
    number = rows.groupby(columns).ngroup().to_numpy()
    shapes = rng.permutation(number.max() + 1)
    fold = max(1, int(FOLD * len(shapes)))
    for start in range(0, min(len(shapes), ROUNDS * fold), fold):
        test = np.isin(number, shapes[start : start + fold])
        yield ~test, test


def _sizes(rows: pd.DataFrame, rng: np.random.Generator) -> Folds:
    size = rows["m"].to_numpy()
    for value in rng.permutation(np.unique(size)[1:-1])[:ROUNDS]:
        yield size != value, size == value


def _cuts(rows: pd.DataFrame, column: str) -> Folds:
    """Both ends of every format's table at once."""
    size = rows[column].to_numpy(float)
    by = rows.groupby("dtype")[column]
    top, bottom = by.transform("max").to_numpy(float), by.transform("min").to_numpy(float)
    yield size <= top / REACH, size > top / REACH
    yield size >= bottom * REACH, size < bottom * REACH


def _predicted(known: pd.DataFrame, test: pd.DataFrame, device: Device) -> pd.DataFrame:
    batched = "groups" in test
    shape = ["groups", "n", "k"] if batched else ["n", "k"]
    predicted = pd.Series(np.nan, index=test.index)
    model = (BatchedGemmTimes if batched else GemmTimes).fit(known, device)
    for key, found in test.groupby(["dtype", *shape]):
        dtype, *sizes = key if isinstance(key, tuple) else (key,)
        n, k = float(str(sizes[-2])), float(str(sizes[-1]))
        m = found["m"].to_numpy(float)
        if isinstance(model, BatchedGemmTimes):
            estimate = model.time_s(str(dtype), float(str(sizes[0])), m, n, k)
        else:
            estimate = model.time_s(str(dtype), m, n, k)
        if estimate is not None:
            predicted[found.index] = estimate.seconds
    flops = 2.0 * test[["m", *shape]].astype(float).prod(axis=1)
    frame = pd.DataFrame(
        {
            "dtype": test["dtype"],
            "size": flops,
            "seconds": test["seconds"],
            "predicted_s": predicted,
            **{column: test[column] for column in ("m", *shape)},
        }
    )
    return frame.dropna(subset="predicted_s")
