"""How far off are interpolated collectives, on rows the model has not seen?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from hwmodels.hardware import Device
from hwmodels.kernels.collective import CollectiveTimes


def held_out(rows: pd.DataFrame, device: Device, rng: np.random.Generator, limit: int = 2000) -> pd.DataFrame:
    """Predictions of rows from tables without them; only rows that the whole table would use.

    experiment   'point': one size of one curve; 'shape': a whole (kind, GPUs); 'beyond': sizes up to 4x beyond a table
                 cut at a quarter of the largest, or at 4 times the smallest
    limit        rows of each experiment
    """
    rows = rows.reset_index(drop=True)
    whole = CollectiveTimes.fit(rows, device)
    curve = np.repeat(np.arange(len(whole.kinds)), np.diff(whole.starts))
    used = pd.DataFrame(
        {
            "kind": whole.kinds[curve],
            "gpus": whole.gpus[curve],
            "bytes": whole.bytes,
            "seconds": whole.seconds,
            "dtype": "bf16",
        }
    )
    ends = used.groupby(curve)["bytes"].agg(["min", "max"]).loc[curve].to_numpy(float)
    experiments: list[tuple[str, np.ndarray, np.ndarray]] = []
    for i in rng.permutation(len(used))[:limit]:
        experiments.append(("point", np.array([i]), np.arange(len(used)) == i))
    for c in range(len(whole.kinds)):
        experiments.append(("shape", np.flatnonzero(curve == c), curve == c))
    size = used["bytes"].to_numpy(float)
    for gone in (size > ends[:, 1] / 4, size < ends[:, 0] * 4):
        experiments.append(("beyond", np.flatnonzero(gone), gone))
    table = used.assign(nodes=1, software="kept", kernel="kept")
    return pd.concat(
        [_predicted(CollectiveTimes.fit(table[~gone], device), used.iloc[i], name) for name, i, gone in experiments],
        ignore_index=True,
    )


def _predicted(times: CollectiveTimes, rows: pd.DataFrame, experiment: str) -> pd.DataFrame:
    predicted = np.full(len(rows), np.nan)
    code = rows.groupby(["kind", "gpus"]).ngroup().to_numpy()
    size = rows["bytes"].to_numpy(float)
    for group in np.unique(code):
        i = np.flatnonzero(code == group)
        found = times.time_s(str(rows["kind"].iloc[i[0]]), int(rows["gpus"].iloc[i[0]]), size[i])
        if found is not None:
            predicted[i] = found.seconds
    return pd.DataFrame(
        {
            "family": "collective",
            "dtype": rows["dtype"],
            "experiment": experiment,
            "size": rows["bytes"].astype(float),
            "seconds": rows["seconds"],
            "predicted_s": predicted,
            "kind": rows["kind"],
            "gpus": rows["gpus"],
        }
    )
