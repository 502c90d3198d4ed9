"""How far off are interpolated expert-block times, on rows the model has not seen?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from hwmodels.hardware import Device
from hwmodels.kernels.holdout import joined
from hwmodels.kernels.moe import MoeTimes
from hwmodels.kernels.moe_guide import SHAPE

KEY = ["tokens", *SHAPE, "dtype", "distribution"]
#: Fits of the experiment 'point': rows left out together belong to different curves.
FOLDS = 6
#: Tables without one shape, or one model, that are fitted.
SHAPES, MODELS = 24, 8


def held_out(rows: pd.DataFrame, device: Device, rng: np.random.Generator, limit: int = 2000) -> pd.DataFrame:
    """Predictions of rows from tables without them; size: floating-point operations of the mean rank.

    experiment   'point': at most one row of every curve at a time; 'shape': every row of a shape with its tp and ep, in
                 all formats and routings; 'model': the same for all tp and ep of an expert block; 'beyond': tokens up
                 to 4x beyond a table cut at a quarter of the most, or at 4 times the fewest
    limit        rows of each experiment
    """
    rows = rows.reset_index(drop=True)
    best = rows.loc[rows.groupby(KEY)["seconds"].idxmin(), [*KEY, "seconds"]].reset_index(drop=True)
    code = rows.groupby(KEY).ngroup().to_numpy()  # best is sorted by the same keys
    found = []

    def leave_out(experiment: str, wanted: np.ndarray, gone: np.ndarray) -> None:
        if len(wanted) and not gone.all():
            times = MoeTimes.fit(rows[~gone[code]], device)
            found.append(_predicted(times, best.iloc[wanted].assign(experiment=experiment)))

    curve = best.groupby([*SHAPE, "dtype", "distribution"]).ngroup().to_numpy()
    for _ in range(FOLDS):
        order = rng.permutation(len(best))
        _, first = np.unique(curve[order], return_index=True)
        picked = rng.permutation(order[first])[: limit // FOLDS]
        leave_out("point", picked, np.isin(np.arange(len(best)), picked))
    for experiment, columns, count in (("shape", list(SHAPE), SHAPES), ("model", list(SHAPE[:4]), MODELS)):
        group = best.groupby(columns).ngroup().to_numpy()
        for g in rng.permutation(np.unique(group))[:count]:
            gone = group == g
            members = np.flatnonzero(gone)
            leave_out(experiment, rng.permutation(members)[: max(1, limit // count)], gone)
    tokens = best["tokens"].to_numpy(float)
    most = best.groupby(curve)["tokens"].transform("max").to_numpy(float)[np.arange(len(best))]
    fewest = best.groupby(curve)["tokens"].transform("min").to_numpy(float)
    for gone in (tokens > most / 4, tokens < fewest * 4):
        leave_out("beyond", rng.permutation(np.flatnonzero(gone))[: limit // 2], gone)
    return joined(found, ["distribution", "tokens"])


def _predicted(times: MoeTimes, rows: pd.DataFrame) -> pd.DataFrame:
    predicted = np.full(len(rows), np.nan)
    columns = [*SHAPE, "dtype", "distribution"]
    code = rows.groupby(columns, sort=False).ngroup().to_numpy()
    tokens = rows["tokens"].to_numpy(float)
    for group in np.unique(code):
        i = np.flatnonzero(code == group)
        shape: dict[str, Any] = {name: rows[name].iloc[i[0]] for name in columns}
        found = times.time_s(tokens=tokens[i], **shape)
        if found is not None:
            predicted[i] = found.seconds
    width = np.ceil(rows["intermediate"] / rows["tp"])
    flops = 2.0 * rows["tokens"] * rows["top_k"] / rows["ep"] * (2 + rows["gated"]) * rows["hidden"] * width
    return pd.DataFrame(
        {
            "family": "moe",
            "dtype": rows["dtype"],
            "experiment": rows["experiment"],
            "size": flops,
            "seconds": rows["seconds"],
            "predicted_s": predicted,
            "distribution": rows["distribution"],
            "tokens": rows["tokens"],
        }
    )
