"""How far is every cost model from measured kernels it has not seen, by family, format and size?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import pandas as pd

from hwmodels.efficiency import Efficiency
from hwmodels.errors import MeasurementError
from hwmodels.hardware import Device
from hwmodels.kernels import attention_holdout, collective_holdout, exchange_holdout, gemm_holdout, moe_holdout
from hwmodels.kernels.table import FAMILIES
from planner.validation.rowprices import analytic_s, is_operator, sizes

#: Cost models in the order they are told.
INTERPOLATED, CALIBRATED, ANALYTIC = "interpolated", "calibrated", "analytic"
#: What the roofline is held against: it is fitted to no single row, so none has to be left out.
EVERY = "sampled"
#: Rows of a group are told apart in this many classes with as many rows each, from small to large.
CLASSES = 4


class HoldOut(Protocol):
    """Predictions of rows by tables without them: columns family, dtype, experiment, size, seconds, predicted_s."""

    def __call__(self, rows: pd.DataFrame, device: Device, rng: np.random.Generator, limit: int = ...) -> pd.DataFrame:
        """At most about `limit` rows of each experiment."""
        ...


HELD_OUT: dict[str, HoldOut] = {
    "gemm": gemm_holdout.held_out,
    "batched_gemm": gemm_holdout.held_out,
    "moe": moe_holdout.held_out,
    "collective": collective_holdout.held_out,
    "expert_exchange": exchange_holdout.held_out,
    **{
        family: partial(attention_holdout.held_out, family=family)
        for family in ("attention_prefill", "attention_decode", "mla_prefill", "mla_decode")
    },
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Absolute relative errors |predicted / measured - 1| of n rows.

    bias       median of predicted / measured - 1: above 0 predicts too much
    smallest, largest   size: floating-point operations, or bytes of collectives and small operators
    """

    median: float
    p90: float
    bias: float
    n: int
    smallest: float
    largest: float


@dataclass(frozen=True, slots=True)
class Group:
    """Errors of one cost model on one family, format and experiment.

    experiment   'point', 'shape', 'beyond', ...: what was left out, see the family's held_out; 'sampled' for the
                 roofline: rows drawn from the table (of prefill attention those of a single prompt, which is what its
                 operator stands for)
    unpriced     rows the cost model has no price for
    classes      the same by size, from small to large, with as many rows each
    """

    cost: str
    family: str
    dtype: str
    experiment: str
    whole: Spread
    unpriced: int
    classes: tuple[Spread, ...]


@dataclass(frozen=True, slots=True)
class KernelReport:
    """Errors of all cost models on the tables of one device.

    measured   rows by family
    software   what ran them, by family
    left_out   rows of the source that are in no table, by reason
    not_interpolated   families that only the roofline prices
    """

    groups: tuple[Group, ...]
    measured: Mapping[str, int]
    software: Mapping[str, tuple[str, ...]]
    left_out: Mapping[str, int]
    not_interpolated: tuple[str, ...]


def kernel_report(
    tables: Mapping[str, pd.DataFrame],
    hardware: str,
    device: Device,
    *,
    families: Sequence[str] | None = None,
    rows: int = 2000,
    seed: int = 0,
    left_out: Mapping[str, int] | None = None,
    progress: Callable[[str, float | None], None] = lambda what, share: None,
) -> KernelReport:
    """Errors of the interpolated, calibrated and analytic cost models on measured tables.

    tables     by family, of one device
    hardware   name or path of the device or cluster, for the links of collectives
    families   None for all the tables have
    rows       about how many of each family and experiment are predicted

    Raises MeasurementError for families that are unknown or not in the tables.
    """
    chosen = list(tables) if families is None else list(dict.fromkeys(families))
    for family in chosen:
        if family not in FAMILIES or family not in tables:
            raise MeasurementError(f"family {family!r}: expected one of {', '.join(tables)}, which were measured here")
    groups: list[Group] = []
    for index, family in enumerate(chosen):
        progress(f"leaving out {family}", index / len(chosen))
        # A stream of its own: a family's figures do not hang on which others were asked for.
        rng = np.random.default_rng([seed, list(FAMILIES).index(family)])
        table = tables[family]
        if family in HELD_OUT and len(table) > 1:  # nothing follows from no row
            found = HELD_OUT[family](table, device, rng, rows)
            if len(found):
                groups += grouped(found.assign(family=family), INTERPOLATED)
        progress(f"pricing {family}", (index + 0.8) / len(chosen))
        picked = fastest(table[is_operator(table, family)], family, rng, rows)
        known = picked[["dtype", "seconds"]].assign(family=family, experiment=EVERY, size=sizes(picked, family))
        for cost, priced in ((CALIBRATED, device), (ANALYTIC, replace(device, efficiency=Efficiency()))):
            predicted = analytic_s(picked, family, hardware, priced)
            if np.isfinite(predicted).any():
                groups += grouped(known.assign(predicted_s=predicted), cost)
    return KernelReport(
        tuple(groups),
        {family: len(tables[family]) for family in chosen},
        {family: tuple(sorted(tables[family]["software"].unique())) for family in chosen},
        dict(left_out or {}),
        tuple(family for family in chosen if family not in HELD_OUT),
    )


def fastest(table: pd.DataFrame, family: str, rng: np.random.Generator, rows: int) -> pd.DataFrame:
    """At most `rows` shapes of the table, each with the fastest of its kernels, which is the one that engines run."""
    shape = [*FAMILIES[family].shape, "dtype"]
    order = table["seconds"].to_numpy().argsort(kind="stable")
    best = table.iloc[order].drop_duplicates(shape)
    picked: pd.DataFrame = best.iloc[np.sort(rng.permutation(len(best))[:rows])].reset_index(drop=True)
    return picked


def grouped(found: pd.DataFrame, cost: str) -> list[Group]:
    """Errors by family, format and experiment, of a frame with the columns a HoldOut gives."""
    groups = []
    order = {experiment: place for place, experiment in enumerate(found["experiment"].unique())}
    parts = found.groupby([found["experiment"].map(order), "dtype"])
    for _, part in parts:
        family, dtype, experiment = (part[column].iloc[0] for column in ("family", "dtype", "experiment"))
        ratio = part["predicted_s"].to_numpy(float) / part["seconds"].to_numpy(float)
        size = part["size"].to_numpy(float)
        priced = np.isfinite(ratio)
        if not priced.any():
            continue
        ratio, size = ratio[priced], size[priced]
        classes = [chunk for chunk in np.array_split(np.argsort(size, kind="stable"), CLASSES) if len(chunk)]
        groups.append(
            Group(
                cost,
                str(family),
                str(dtype),
                str(experiment),
                _spread(ratio, size),
                int((~priced).sum()),
                tuple(_spread(ratio[chunk], size[chunk]) for chunk in classes),
            )
        )
    return groups


def _spread(ratio: np.ndarray, size: np.ndarray) -> Spread:
    error = np.abs(ratio - 1)
    return Spread(
        float(np.median(error)),
        float(np.quantile(error, 0.9)),
        float(np.median(ratio - 1)),
        len(ratio),
        float(size.min()),
        float(size.max()),
    )
