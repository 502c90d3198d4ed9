"""How far off are interpolated attention times, on rows the model has not seen?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hwmodels.errors import MeasurementError
from hwmodels.hardware import Device
from hwmodels.kernels.attention import TIMES
from hwmodels.kernels.attention_table import AttentionTimes
from hwmodels.kernels.holdout import COLUMNS, REACH, Folds, joined, points

#: Head counts left out, each on its own.
SHAPES = 10
#: Columns beside COLUMNS, which say where a row lies; `length` is new or context.
DETAIL = ["kv_dtype", "head_dim", "window", "heads", "kv_heads", "batch", "length"]


def held_out(
    rows: pd.DataFrame, device: Device, rng: np.random.Generator, limit: int = 2000, family: str = "attention_prefill"
) -> pd.DataFrame:
    """Predictions of rows by tables without them; size is query-key pairs times heads.

    experiment   'point': scattered rows, at most a fiftieth of the table at a time; their holes are closed with the
                 help of shapes that do as much work. 'between': one length (or one batch) taken out of all shapes, as
                 for sizes that nobody measured, at twice the table's spacing. 'shape': every row of one (heads, KV
                 heads), in all formats. 'beyond': lengths up to 4x beyond a table cut at a quarter of the longest, or
                 at 4x a short one. 'beyond_batch': the same in batch
    limit        rows of each experiment
    """
    if family not in TIMES:
        raise MeasurementError(f"family {family!r}: expected one of {', '.join(TIMES)}")
    times = TIMES[family]
    rows = times.usable(rows, device)
    if rows.empty:
        return joined([], DETAIL)
    experiments = {
        "point": points(rows, rng, limit),
        "between": _gaps(rows, times.SIZE, rng, limit),
        "shape": _shapes(rows, rng),
        "beyond": _cuts(rows, times.SIZE),
        "beyond_batch": _cuts(rows, "batch"),
    }
    frames = []
    for experiment, folds in experiments.items():
        parts = [
            _predicted(times, rows[keep], rows[_thinned(test, rng, limit)], device)
            for keep, test in folds
            if keep.any() and test.any()
        ]
        if parts:
            found = pd.concat(parts, ignore_index=True).assign(experiment=experiment)
            frames.append(found.sample(min(limit, len(found)), random_state=rng))
    return joined(frames, DETAIL)


def _thinned(test: np.ndarray, rng: np.random.Generator, limit: int) -> np.ndarray:
    """At most `limit` of the rows of a mask."""
    kept = np.zeros_like(test)
    kept[rng.permutation(np.flatnonzero(test))[:limit]] = True
    return kept


def _gaps(rows: pd.DataFrame, length: str, rng: np.random.Generator, limit: int) -> Folds:
    for column in (length, "batch"):
        values = np.unique(rows[column].to_numpy(float))[1:-1]
        for value in values:
            at = rows[column].to_numpy(float) == value
            test = _thinned(at, rng, max(1, limit // (2 * len(values))))
            yield ~at, test


def _shapes(rows: pd.DataFrame, rng: np.random.Generator) -> Folds:
    number = rows.groupby(["heads", "kv_heads"]).ngroup().to_numpy()
    for shape in rng.permutation(number.max() + 1)[:SHAPES]:
        yield number != shape, number == shape


def _cuts(rows: pd.DataFrame, column: str) -> Folds:
    """Both ends; the low cut is the shortest size with another one a REACH below."""
    size = rows[column].to_numpy(float)
    top = size.max() / REACH
    yield size <= top, size > top
    values = np.unique(size)
    low = [v for v in values if v / REACH in values]
    if low:
        yield size >= low[0], (size < low[0]) & (size >= low[0] / REACH)


def _predicted(times: type[AttentionTimes], known: pd.DataFrame, test: pd.DataFrame, device: Device) -> pd.DataFrame:
    model = times.fit(known, device)
    seconds = model.predict(test)
    heads = test["heads"].to_numpy(float) * test["batch"].to_numpy(float)
    length = test[times.SIZE].to_numpy(float)
    pairs = length * (length + 1) / 2 if times.SIZE == "new" else length
    found = test.assign(size=heads * pairs, length=length, predicted_s=seconds, family=times.FAMILY, experiment="")
    return found[[*COLUMNS, *DETAIL]].reset_index(drop=True)
