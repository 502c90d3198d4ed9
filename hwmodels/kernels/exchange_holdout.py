"""How far off are interpolated expert exchanges, on rows the model has not seen?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hwmodels.hardware import Device
from hwmodels.kernels.exchange import SHAPE, ExchangeTimes
from hwmodels.kernels.holdout import joined

CURVE = ["kernel", "kind", *SHAPE]
#: Fits of the experiment 'point': rows left out together belong to different curves; tables without one shape.
FOLDS, SHAPES = 12, 24


def held_out(rows: pd.DataFrame, device: Device, rng: np.random.Generator, limit: int = 2000) -> pd.DataFrame:
    """Predictions of rows from tables without them, each kernel on its own; size: numbers sent once, tokens * hidden.

    experiment   'point': at most one row of every curve at a time; 'shape': every row of a (group, expert block);
                 'beyond': tokens up to 4x beyond a table cut at a quarter of the most, or at 4 times the fewest
    limit        rows of each experiment
    """
    rows = rows.groupby([*CURVE, "tokens"])["seconds"].min().reset_index()
    curve = rows.groupby(CURVE).ngroup().to_numpy()
    found = []

    def leave_out(experiment: str, gone: np.ndarray, most: int) -> None:
        wanted = rng.permutation(np.flatnonzero(gone))[:most]
        if not gone.all():
            found.append(_predicted(rows[~gone], rows.iloc[wanted], device, experiment))

    for _ in range(FOLDS):
        order = rng.permutation(len(rows))
        _, first = np.unique(curve[order], return_index=True)
        leave_out("point", np.isin(np.arange(len(rows)), order[first]), limit // FOLDS)
    shape = rows.groupby(list(SHAPE)).ngroup().to_numpy()
    for g in rng.permutation(np.unique(shape))[:SHAPES]:
        leave_out("shape", shape == g, max(1, limit // SHAPES))
    tokens = rows["tokens"].to_numpy(float)
    ends = rows.groupby(curve)["tokens"].agg(["min", "max"]).loc[curve].to_numpy(float)
    for gone in (tokens > ends[:, 1] / 4, tokens < ends[:, 0] * 4):
        leave_out("beyond", gone, limit // 2)
    return joined(found, ["kind", "gpus"])


def _predicted(table: pd.DataFrame, rows: pd.DataFrame, device: Device, experiment: str) -> pd.DataFrame:
    predicted = np.full(len(rows), np.nan)
    curve = rows.groupby(CURVE).ngroup().to_numpy()
    tokens = rows["tokens"].to_numpy(float)
    fitted: dict[str, ExchangeTimes] = {}
    for c in np.unique(curve):
        i = np.flatnonzero(curve == c)
        kernel, kind, *shape = (rows[name].iloc[i[0]] for name in CURVE)
        if kernel not in fitted:
            fitted[kernel] = ExchangeTimes.fit(table[table["kernel"] == kernel], device)
        gpus, nodes, hidden, experts, top_k = map(int, shape)
        estimate = fitted[kernel].time_s(str(kind), gpus, nodes, tokens[i], hidden, experts, top_k)
        if estimate is not None:
            predicted[i] = estimate.seconds
    return pd.DataFrame(
        {
            "family": "expert_exchange",
            "dtype": np.where(rows["kind"] == "dispatch", "fp8", "bf16"),
            "experiment": experiment,
            "size": rows["tokens"].to_numpy(float) * rows["hidden"].to_numpy(float),
            "seconds": rows["seconds"].to_numpy(float),
            "predicted_s": predicted,
            "kind": rows["kind"].to_numpy(str),
            "gpus": rows["gpus"].to_numpy(np.int64),
        }
    )
