"""Which coefficients fit measured kernels best, and how far are they from kernels of shapes they never saw?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from hwmodels.calibration.forms import FORMS, Form
from hwmodels.calibration.tables import engines_of, usable
from hwmodels.efficiency import Calibration, KernelCoefficients
from hwmodels.errors import MeasurementError
from hwmodels.hardware import Device
from hwmodels.operators import Array

#: Rows of one format a fit rests on, drawn evenly from the engines; more did not change held-out errors by a percent.
FIT_ROWS = 3000
#: Rows of one format an engine needs for coefficients of its own, and a family at all.
LEAST_ROWS = 20
#: Relative error from which the loss grows linearly: rows of other kernels or disturbed runs do not pull.
ROBUST = 0.05
#: Share of the shapes that is fitted to.
TRAINING = 0.5


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients of one family, number format and engine (None: all together).

    timings   rows the coefficients rest on, drawn from the training shapes
    error     predicted / measured - 1 of every row of the other shapes, by engine
    """

    family: str
    format: str
    engine: str | None
    coefficients: Any
    timings: int
    error: Mapping[str, Array]

    @property
    def errors(self) -> Array:
        """Of all engines."""
        return np.concatenate(list(self.error.values()))


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What `calibrate` found.

    device     the given one with the fitted coefficients and what they rest on
    fits       every fit, of all engines together first
    left_out   rows not used, by reason
    """

    device: Device
    fits: tuple[Fit, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def errors(self, families: Iterable[str], *, own: bool) -> Array:
        """Of all held-out rows of the families, by each engine's own coefficients or by those of all together."""
        of = set(families)
        found = [fit.errors for fit in self.fits if fit.family in of and (fit.engine is not None) == own]
        return np.concatenate(found) if found else np.zeros(0)


def calibrate(
    tables: Mapping[str, pd.DataFrame],
    device: Device,
    rng: np.random.Generator,
    progress: Callable[[str, float | None], None] = lambda what, share: None,
) -> Calibrated:
    """Fit the coefficients of every family with a table to half of its shapes and measure the error on the others.

    tables   by family, in the schema of hwmodels.kernels.table, of one device
    rng      draws the shapes and rows that are fitted to, those of a family whatever other families there are

    Coefficients are fitted to all engines together, the rows of each weighing the same, and to each engine's alone.
    What the device had before stays for families without a fit; of others, formats without one are gone. Raises
    MeasurementError where no family has enough rows.
    """
    fits: list[Fit] = []
    records: dict[str, Calibration] = dict(device.calibration)
    left_out: dict[str, int] = {}
    present = [family for family in FORMS if family in tables]
    dice = dict(zip(FORMS, rng.spawn(len(FORMS)), strict=True))
    for done, family in enumerate(present):
        progress(f"fitting {family}", done / len(present))
        form = FORMS[family]
        rows, unused = usable(tables[family], form, device)
        found = _fit_family(form, rows, device, dice[family])
        fits += found
        for reason, count in unused.items():
            left_out[f"{family}: {reason}"] = count
        if found:
            records[family] = _record(found, rows, unused)
    if not fits:
        have = ", ".join(f"{family} {len(table)}" for family, table in tables.items()) or "no tables"
        raise MeasurementError(
            f"calibration of {device.name}: {have}; expected {LEAST_ROWS} rows of one number format to fit to at "
            f"least, and others to check, in one of {', '.join(FORMS)}; measure longer with 'shardwise profile'"
        )
    efficiency = device.efficiency

    def kept(before: KernelCoefficients) -> KernelCoefficients:
        return replace(before, **{fit.family: {} for fit in fits})

    engines = {
        name: _collected([fit for fit in fits if fit.engine == name]).over(kept(efficiency.engines.get(name, _NONE)))
        for name in dict.fromkeys([*efficiency.engines, *(fit.engine for fit in fits if fit.engine is not None)])
    }
    kernels = _collected([fit for fit in fits if fit.engine is None]).over(kept(efficiency.kernels))
    fitted = replace(device, efficiency=replace(efficiency, kernels=kernels, engines=engines), calibration=records)
    return Calibrated(fitted, tuple(sorted(fits, key=lambda fit: fit.engine is not None)), left_out)


_NONE = KernelCoefficients()


def fit_coefficients(form: Form, rows: pd.DataFrame, formats: str, device: Device) -> Any:
    """The coefficients with the least robust error of log(time) over the rows, all of one format."""
    limits = form.limits(formats, device)
    start, least, most = (np.log([limits[name][i] for name in limits]) for i in range(3))
    predict, measured = form.predict(rows, formats, device), np.log(rows["seconds"].to_numpy(float))

    def away(x: Array) -> Array:
        return np.asarray(np.log(predict(form.kind(**dict(zip(limits, np.exp(x), strict=True))))) - measured)

    found = least_squares(
        away, start, bounds=(least, most), loss="soft_l1", f_scale=ROBUST, diff_step=1e-3, max_nfev=40
    )
    return form.kind(**dict(zip(limits, np.exp(found.x).tolist(), strict=True)))


def trained(rows: pd.DataFrame, form: Form, rng: np.random.Generator) -> np.ndarray:
    """Which rows are of a shape that is fitted to: half of the shapes; half of the rows where there is one shape."""
    shapes = rows.groupby(list(form.shape), sort=True).ngroup().to_numpy()
    count = int(shapes.max()) + 1
    if count == 1:
        shapes, count = np.arange(len(rows)), len(rows)
    chosen = np.zeros(count, dtype=bool)
    chosen[rng.permutation(count)[: max(1, round(count * TRAINING))]] = True
    kept: np.ndarray = chosen[shapes]
    return kept


def _fit_family(form: Form, rows: pd.DataFrame, device: Device, rng: np.random.Generator) -> list[Fit]:
    """Of every format, all engines together and each alone."""
    if rows.empty:
        return []
    found = []
    training = trained(rows, form, rng)
    formats, engines = form.formats(rows), engines_of(rows)
    for name in sorted(formats.unique()):
        here = (formats == name).to_numpy(bool)
        part = list(dict.fromkeys(engines[here]))
        for engine in [None, *sorted(part)]:
            mine = here if engine is None else here & (engines == engine).to_numpy(bool)
            held = mine & ~training
            drawn = _drawn(engines, mine & training, rng)
            if len(drawn) < LEAST_ROWS or not held.any():
                continue
            coefficients = fit_coefficients(form, rows.iloc[drawn], name, device)
            predicted = form.predict(rows[held], name, device)(coefficients)
            error = predicted / rows["seconds"].to_numpy(float)[held] - 1
            ran = engines.to_numpy()[held]
            by_engine = {str(one): error[ran == one] for one in dict.fromkeys(ran)}
            found.append(Fit(form.family, name, engine, coefficients, len(drawn), by_engine))
    return found


def _drawn(engines: pd.Series, among: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions of at most FIT_ROWS rows, as many of each engine as there are of all."""
    parts = [np.flatnonzero(among & (engines == engine).to_numpy(bool)) for engine in engines[among].unique()]
    if not parts:
        return np.zeros(0, np.int64)
    share = FIT_ROWS // len(parts)
    return np.concatenate([rng.permutation(part)[:share] for part in parts])


def _collected(fits: list[Fit]) -> KernelCoefficients:
    """Of fits of one engine."""
    return KernelCoefficients(
        **{family: {fit.format: fit.coefficients for fit in fits if fit.family == family} for family in FORMS}
    )


def _record(fits: list[Fit], rows: pd.DataFrame, unused: Mapping[str, int]) -> Calibration:
    pooled = [fit for fit in fits if fit.engine is None]
    errors = np.abs(np.concatenate([fit.errors for fit in pooled]))
    engines = sorted({engine for fit in pooled for engine in fit.error})
    by_engine = {}
    for engine in engines:
        own = [fit.errors for fit in fits if fit.engine == engine]
        of_all = np.concatenate([fit.error[engine] for fit in pooled if engine in fit.error])
        of_own = np.concatenate(own) if own else of_all
        by_engine[engine] = (float(np.median(np.abs(of_all))), float(np.median(np.abs(of_own))))
    return Calibration(
        timings=len(rows),
        held_out_median_ape=float(np.median(errors)),
        held_out_p90_ape=float(np.quantile(errors, 0.9)),
        by_engine=by_engine,
        left_out=dict(unused),
        software=", ".join(sorted(rows["software"].unique())),
        source=", ".join(sorted(rows["source"].unique())),
    )


def coefficients_of(fit: Fit) -> dict[str, float]:
    """By name."""
    return dict(zip((part.name for part in fields(fit.coefficients)), astuple(fit.coefficients), strict=True))
