"""How long does a matrix product take on a device whose products were timed for other sizes?

Times are kept relative to an analytic guide, as log(time / guide). Along m (rows of activations) that ratio is
interpolated between the timed sizes. A weight shape (n, k) nobody timed takes it from its neighbours: ordinary kriging
(Cressie, Statistics for Spatial Data, 1993, section 3.2) of the ratio in log n and log k, at every timed m, so that
steps that come with m (tiles that are full or not) stay. Beyond the timed sizes the time follows the guide from the
nearest ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from hwmodels.hardware import Device
from hwmodels.kernels.estimate import Estimate
from hwmodels.kernels.table import TOLERANCE, beyond_peak
from hwmodels.mapping import DTYPE_BYTES, WEIGHT_FORMATS

Floats = NDArray[np.float64]

#: The guide's shares of the peaks and its shortest launch, in seconds. Rough on purpose and the same everywhere: the
#: coefficients of device profiles are fitted to measured tables, and would tell a row left out of one.
MFU, MBU, SHORTEST_S = 0.75, 0.9, 3e-6
#: Octaves of n and of k over which the ratio to the guide forgets itself (by 1/e), and the share of its variance that
#: is noise of single timings. Chosen once for all devices, engines and formats, by the error of shapes left out.
REACH, NOISE = np.array([4.0, 6.0]), 0.02
#: Timed shapes that a shape is predicted from.
NEIGHBOURS = 48
#: Rounds in which a timing that neither its neighbours in m nor those in (n, k) confirm loses its say in other shapes.
ROUNDS = 2
#: Points of a curve per gap between two timed sizes.
STEPS = 6
#: A shape counts as measured within this factor of a timed one, in n and in k.
NEAR = 2.0
#: Share of the neighbours, by weight, that must have been timed at a size to fill in for a shape that was not.
MAJORITY = 0.5
#: Bytes of weights from which caches cannot hide the memory's peak bandwidth (as in hwmodels.kernels.table).
UNCACHED_BYTES = 256e6


def guide_s(dtype: str, groups: ArrayLike, m: ArrayLike, n: ArrayLike, k: ArrayLike, device: Device) -> Floats:
    """A smooth roofline of `groups` products m x n x k in one launch, in seconds; grows with every size."""
    g, rows, columns, inner = (np.asarray(x, dtype=float) for x in (groups, m, n, k))
    size, arithmetic = WEIGHT_FORMATS[dtype]
    narrow = DTYPE_BYTES[arithmetic or "bf16"]
    bandwidth = MBU * device.memory_bytes_per_s
    moved = g * (columns * inner * size + rows * inner * narrow + rows * columns * 2) / bandwidth
    busy = 2 * g * rows * columns * inner / (MFU * _peak(dtype, device))
    guide: Floats = SHORTEST_S + np.hypot(moved, busy)
    return guide


def least_s(dtype: str, groups: ArrayLike, m: ArrayLike, n: ArrayLike, k: ArrayLike, device: Device) -> Floats:
    """Seconds below which the device's peaks do not allow a time, the tolerance of measured tables included."""
    weights = np.asarray(groups, float) * np.asarray(n, float) * np.asarray(k, float)
    nbytes = weights * WEIGHT_FORMATS[dtype][0]
    memory_s = np.where(nbytes > UNCACHED_BYTES, nbytes / device.memory_bytes_per_s, 0.0)
    least: Floats = np.maximum(2 * weights * np.asarray(m, float) / _peak(dtype, device), memory_s) / TOLERANCE
    return least


def _peak(dtype: str, device: Device) -> float:
    """Peak of the format that products of `dtype` weights are computed in; 16 bit where the device lacks it."""
    peaks = device.peak_flops_per_s
    wide = peaks.get("bf16", peaks.get("fp16", max(peaks.values())))
    return peaks.get(WEIGHT_FORMATS[dtype][1] or "bf16", wide)


@dataclass(frozen=True, slots=True)
class Curve:
    """Times of one weight shape over m.

    log_m, log_s   the curve, rising where the timings next to it do
    ends           log(time / guide) that hold below and above it, where that does not turn the curve
    timed          range of m that counts as measured; empty where the shape is too far from timed ones
    """

    log_m: Floats
    log_s: Floats
    ends: tuple[float, float]
    timed: tuple[float, float]

    @classmethod
    def through(
        cls, m: Floats, ratio: Floats, clean: Floats, guide: Floats, fine: Floats, timed: tuple[float, float]
    ) -> Self:
        """The curve through log(time / guide) = `ratio` at `m`; `guide` at the finer sizes `fine` of `finer(m)`.

        Between two timed sizes it stays between their times and turns nowhere; beyond them the `clean` ratios hold.
        """
        ends = (float(clean[0]), float(clean[-1]))
        if len(m) == 1:
            return cls(np.log(m), ratio + np.log(guide), ends, timed)
        log_m = np.log(fine)
        free = (np.log(guide) + np.interp(log_m, np.log(m), ratio))[:-1].reshape(-1, STEPS)
        knots = np.log(guide[::STEPS]) + ratio
        left, right = knots[:-1, None], knots[1:, None]
        rising = np.maximum.accumulate(np.clip(free, left, np.maximum(left, right)), axis=1)
        falling = np.minimum.accumulate(np.clip(free, np.minimum(left, right), left), axis=1)
        log_s = np.append(np.where(right >= left, rising, falling).ravel(), knots[-1])
        log_s[::STEPS] = knots
        return cls(log_m, log_s, ends, timed)


def finer(m: Floats) -> Floats:
    """`m` with STEPS - 1 sizes between each two, evenly in log m."""
    log_m = np.log(m)
    share = np.arange(STEPS) / STEPS
    between = np.exp(log_m[:-1, None] * (1 - share) + log_m[1:, None] * share)
    between[:, 0] = m[:-1]
    return np.append(between.ravel(), m[-1])


def _estimate(curve: Curve, dtype: str, groups: float, m: ArrayLike, n: float, k: float, device: Device) -> Estimate:
    size = np.asarray(m, dtype=float)
    log_m = np.log(size)
    seconds = np.exp(np.interp(log_m, curve.log_m, curve.log_s))
    below, above = log_m < curve.log_m[0], log_m > curve.log_m[-1]
    if below.any() or above.any():
        guide = guide_s(dtype, groups, size, n, k, device)
        seconds = np.where(below, np.minimum(guide * np.exp(curve.ends[0]), seconds), seconds)
        seconds = np.where(above, np.maximum(guide * np.exp(curve.ends[1]), seconds), seconds)
    seconds = np.asarray(np.maximum(seconds, least_s(dtype, groups, size, n, k, device)))
    low, high = curve.timed
    return Estimate(seconds, np.asarray((size >= low) & (size <= high), dtype=float))


@dataclass(frozen=True, slots=True)
class Surface:
    """log(time / guide) of all shapes of one number format.

    m        (M,) timed sizes, ascending
    shapes   (S, d) the shapes, such as (n, k)
    ratio    (M, S) as timed, completed where a shape was not timed at an m
    clean    (M, S) the same with the noise of single timings taken off: what other shapes learn from
    timed    (2, S) smallest and largest m each shape was timed at
    """

    m: Floats
    shapes: Floats
    ratio: Floats
    clean: Floats
    timed: Floats

    @classmethod
    def fit(cls, m: Floats, shapes: Floats, log_ratio: Floats, *, learn: bool = True) -> Self:
        """From one log(time / guide) per row, `shapes` (rows, d); `learn`: shapes complete and correct each other."""
        sizes, at = np.unique(m, return_inverse=True)
        kinds, of = np.unique(shapes, axis=0, return_inverse=True)
        found = np.full((len(sizes), len(kinds)), np.nan)
        found[at, of.ravel()] = log_ratio
        known = np.isfinite(found)
        log_m = np.log(sizes)
        ratio = _completed(log_m, found, known)
        timed = np.array([sizes[known.argmax(axis=0)], sizes[len(sizes) - 1 - known[::-1].argmax(axis=0)]])
        if not learn or len(kinds) == 1:
            return cls(sizes, kinds, ratio, ratio, timed)
        near, weights = _neighbours(np.log2(kinds), np.log2(kinds), apart=True)
        # A size that the neighbours were timed at says more of the gap, steps and all, than the sizes beside it.
        sure = np.abs(weights)
        told = _mixed(known.astype(float), near, sure / sure.sum(axis=1, keepdims=True)) >= MAJORITY
        told &= (np.abs(np.log2(kinds) - np.log2(kinds[near[:, 0]])) <= np.log2(NEAR)).all(axis=1) & ~known
        ratio = np.where(told, _mixed(ratio, near, weights), ratio)
        clean = ratio
        for _ in range(ROUNDS):
            around = _mixed(clean, near, weights)
            clean = np.where(told, around, np.median(np.stack([ratio, _between(log_m, clean), around]), axis=0))
        ratio = np.where(told, _mixed(clean, near, weights), ratio)
        return cls(sizes, kinds, ratio, clean, timed)

    def index(self, *shape: float) -> int | None:
        """Where the shape stands, None where it was not timed."""
        found = np.flatnonzero((self.shapes == np.array(shape, dtype=float)).all(axis=1))
        return int(found[0]) if len(found) else None

    def unseen(self, n: float, k: float) -> tuple[Floats, tuple[float, float]]:
        """Ratios at every m of a shape that was not timed, and the range of m that its neighbours were timed in."""
        here = np.log2([n, k])
        known = np.log2(self.shapes)
        inside = np.clip(here, known.min(axis=0), known.max(axis=0))
        near, weights = _neighbours(known, inside[None, :])
        ratio = _mixed(self.clean, near, weights)[:, 0]
        close = (np.abs(known - here) <= np.log2(NEAR)).all(axis=1)
        if not close.any() or (inside != here).any():
            return ratio, (np.inf, -np.inf)
        return ratio, (float(self.timed[0, close].max()), float(self.timed[1, close].min()))


def _completed(log_m: Floats, found: Floats, known: NDArray[np.bool_]) -> Floats:
    """Every column with its gaps filled from its own values: between them linear in log m, beyond them constant."""
    full = found.copy()
    for column in np.flatnonzero(~known.all(axis=0)):
        here = known[:, column]
        full[~here, column] = np.interp(log_m[~here], log_m[here], found[here, column])
    return full


def _between(log_m: Floats, ratio: Floats) -> Floats:
    """What the sizes before and after say of each size."""
    if len(log_m) < 3:
        return ratio
    share = ((log_m[1:-1] - log_m[:-2]) / (log_m[2:] - log_m[:-2]))[:, None]
    inner = (1 - share) * ratio[:-2] + share * ratio[2:]
    return np.concatenate([ratio[1:2], inner, ratio[-2:-1]])


def _mixed(ratio: Floats, near: NDArray[np.intp], weights: Floats) -> Floats:
    """(M, points): the neighbours' ratios, weighted."""
    mixed = np.zeros((len(ratio), len(near)))
    for j in range(near.shape[1]):
        mixed += ratio[:, near[:, j]] * weights[:, j]
    return mixed


def _neighbours(known: Floats, wanted: Floats, *, apart: bool = False) -> tuple[NDArray[np.intp], Floats]:
    """(points, J) which known points each wanted one is predicted from, and with what weights, which sum to 1.

    Both in octaves; `apart`: the wanted points are the known ones, and each is predicted from the others.
    """
    count = min(NEIGHBOURS, len(known) - apart)
    asked = np.arange(1, count + 1) + apart
    near = np.asarray(cKDTree(known / REACH).query(wanted / REACH, k=asked, p=1)[1], dtype=np.intp)
    points = known[near] / REACH
    matrix = np.ones((len(near), count + 1, count + 1))
    matrix[:, :-1, :-1] = np.exp(-np.abs(points[:, :, None] - points[:, None]).sum(axis=-1))
    matrix[:, :-1, :-1] += NOISE * np.eye(count)
    matrix[:, -1, -1] = 0.0
    right = np.ones((len(near), count + 1, 1))
    right[:, :-1, 0] = np.exp(-np.abs(points - wanted[:, None] / REACH).sum(axis=-1))
    weights = np.asarray(np.linalg.solve(matrix, right)[:, :-1, 0], dtype=np.float64)
    return near, weights


def _usable(rows: pd.DataFrame, family: str, device: Device, shape: list[str]) -> pd.DataFrame:
    """Rows the device's peaks allow; of several kernels timed for one product the fastest, as engines try to choose."""
    allowed = rows.loc[~beyond_peak(rows, family, device), ["dtype", "m", *shape, "seconds"]]
    key = ["dtype", "m", *shape]
    fastest: pd.DataFrame = (
        allowed.sort_values("seconds").drop_duplicates(key) if allowed.duplicated(key).any() else allowed
    )
    return fastest


def _packed(surfaces: Mapping[str, Surface]) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"dtypes": np.array(list(surfaces), dtype=np.str_)}
    for name, surface in surfaces.items():
        for part in ("m", "shapes", "ratio", "clean", "timed"):
            arrays[f"{name}.{part}"] = getattr(surface, part)
    return arrays


def _unpacked(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Surface]:
    return {
        str(name): Surface(*(arrays[f"{name}.{part}"] for part in ("m", "shapes", "ratio", "clean", "timed")))
        for name in arrays["dtypes"]
    }


@dataclass(frozen=True, slots=True)
class GemmTimes:
    """Times of m x k activations times k x n weights on one device with one engine's kernels."""

    device: Device
    surfaces: Mapping[str, Surface]
    _curves: dict[tuple[str, float, float], Curve] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def fit(cls, rows: pd.DataFrame, device: Device) -> Self:
        """From a table of family 'gemm' of one device and one engine; rows beyond the device's peaks are not used."""
        surfaces = {}
        for dtype, found in _usable(rows, "gemm", device, ["n", "k"]).groupby("dtype"):
            m, n, k, seconds = (found[c].to_numpy(float) for c in ("m", "n", "k", "seconds"))
            ratio = np.log(seconds / guide_s(str(dtype), 1.0, m, n, k, device))
            surfaces[str(dtype)] = Surface.fit(m, np.stack([n, k], axis=1), ratio)
        return cls(device, surfaces)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Weight formats that were timed."""
        return tuple(self.surfaces)

    def time_s(self, dtype: str, m: ArrayLike, n: float, k: float) -> Estimate | None:
        """Seconds of one launch for every m; None where no product of this format was timed."""
        surface = self.surfaces.get(dtype)
        if surface is None:
            return None
        key = (dtype, float(n), float(k))
        if key not in self._curves:
            self._curves[key] = self._curve(surface, *key)
        return _estimate(self._curves[key], dtype, 1.0, m, n, k, self.device)

    def _curve(self, surface: Surface, dtype: str, n: float, k: float) -> Curve:
        index = surface.index(n, k)
        if index is None:
            ratio, timed = surface.unseen(n, k)
            clean = ratio
        else:
            ratio, clean = surface.ratio[:, index], surface.clean[:, index]
            timed = (float(surface.timed[0, index]), float(surface.timed[1, index]))
        fine = finer(surface.m)
        return Curve.through(surface.m, ratio, clean, guide_s(dtype, 1.0, fine, n, k, self.device), fine, timed)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that from_arrays needs."""
        return _packed(self.surfaces)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], device: Device) -> Self:
        """The model that `arrays` came from."""
        return cls(device, _unpacked(arrays))


@dataclass(frozen=True, slots=True)
class BatchedGemmTimes:
    """Times of `groups` products m x n x k in one launch: per head into and out of a latent space.

    Tables hold few (n, k), each for many group counts: between these the ratio to the guide is interpolated in
    log groups, and an (n, k) that was not timed follows the guide from the nearest that was.
    """

    device: Device
    surfaces: Mapping[str, Surface]
    _curves: dict[tuple[str, float, float, float], Curve] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def fit(cls, rows: pd.DataFrame, device: Device) -> Self:
        """From a table of family 'batched_gemm' of one device and one engine."""
        surfaces = {}
        for key, found in _usable(rows, "batched_gemm", device, ["groups", "n", "k"]).groupby(["dtype", "n", "k"]):
            assert isinstance(key, tuple)
            dtype, n, k = str(key[0]), int(str(key[1])), int(str(key[2]))
            m, groups, seconds = (found[c].to_numpy(float) for c in ("m", "groups", "seconds"))
            ratio = np.log(seconds / guide_s(dtype, groups, m, n, k, device))
            surfaces[f"{dtype}/{n}/{k}"] = Surface.fit(m, groups[:, None], ratio, learn=False)
        return cls(device, surfaces)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Weight formats that were timed."""
        return tuple(dict.fromkeys(name.split("/")[0] for name in self.surfaces))

    def time_s(self, dtype: str, groups: float, m: ArrayLike, n: float, k: float) -> Estimate | None:
        """Seconds of one launch for every m; None where no product of this format was timed."""
        if dtype not in self.dtypes:
            return None
        key = (dtype, float(groups), float(n), float(k))
        if key not in self._curves:
            self._curves[key] = self._curve(*key)
        return _estimate(self._curves[key], dtype, groups, m, n, k, self.device)

    def _curve(self, dtype: str, groups: float, n: float, k: float) -> Curve:
        pairs = {
            name: (float(found[1]), float(found[2])) for name in self.surfaces if (found := name.split("/"))[0] == dtype
        }
        nearest = min(pairs, key=lambda name: (abs(np.log(pairs[name][0] / n)) + abs(np.log(pairs[name][1] / k)), name))
        surface = self.surfaces[nearest]
        counts = surface.shapes[:, 0]
        inside = float(np.clip(groups, counts[0], counts[-1]))
        right = int(np.clip(np.searchsorted(counts, inside), min(1, len(counts) - 1), len(counts) - 1))
        left = right if counts[right] == inside else max(right - 1, 0)
        if counts[left] == inside:
            right = left
        share = 0.0 if left == right else float(np.log(inside / counts[left]) / np.log(counts[right] / counts[left]))
        ratio = (1 - share) * surface.ratio[:, left] + share * surface.ratio[:, right]
        low, high = max(surface.timed[0, [left, right]]), min(surface.timed[1, [left, right]])
        known = pairs[nearest] == (n, k) and inside == groups
        timed = (float(low), float(high)) if known else (np.inf, -np.inf)
        fine = finer(surface.m)
        return Curve.through(surface.m, ratio, ratio, guide_s(dtype, groups, fine, n, k, self.device), fine, timed)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that from_arrays needs."""
        return _packed(self.surfaces)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], device: Device) -> Self:
        """The model that `arrays` came from."""
        return cls(device, _unpacked(arrays))
