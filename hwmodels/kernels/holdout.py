"""What do the leave-out experiments of every family of kernels share?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

#: Columns of all families' predictions.
COLUMNS = ("family", "dtype", "experiment", "size", "seconds", "predicted_s")
#: Share of a table's rows, or of its shapes, left out at once: nearly all neighbours of what is left out stay in.
FOLD = 0.02
#: How far beyond the cut rows are predicted.
REACH = 4

#: (rows to fit to, rows to predict) as masks over a table.
Folds = Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]


def points(rows: pd.DataFrame, rng: np.random.Generator, limit: int) -> Folds:
    """`limit` scattered rows, FOLD of the table at a time."""
    order = rng.permutation(len(rows))[:limit]
    fold = max(1, int(FOLD * len(rows)))
    for start in range(0, len(order), fold):
        test = np.zeros(len(rows), dtype=bool)
        test[order[start : start + fold]] = True
        yield ~test, test


def joined(frames: Sequence[pd.DataFrame], detail: Sequence[str]) -> pd.DataFrame:
    """All predictions in one table; without any, as from a table of one row, an empty one with COLUMNS and `detail`."""
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*COLUMNS, *detail])
