"""What a table of kernel timings looks like: one tidy frame per operator family, checked before it is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hwmodels.errors import MeasurementError
from hwmodels.hardware import Device
from hwmodels.mapping import DTYPE_BYTES, WEIGHT_FORMATS
from hwmodels.wholefile import whole_file

#: Columns every table has beside the shape of its family.
#:   dtype      of the weights as in hwmodels.mapping.WEIGHT_FORMATS (gemm, batched_gemm, moe), of the arithmetic
#:              (attention), of the message (others)
#:   device     name of the device profile
#:   software   what ran the kernel, "name version"
#:   kernel     the implementation, as its source calls it
#:   seconds    median time of one launch
#:   spread     interquartile range over the median where it was recorded, NaN where not
#:   source     where the row comes from
COMMON = ("dtype", "device", "software", "kernel", "seconds", "spread", "source")
TEXT = frozenset({"dtype", "kv_dtype", "device", "software", "kernel", "source", "kind", "distribution"})


@dataclass(frozen=True, slots=True)
class Family:
    """One operator family: its shape columns, and the arithmetic and traffic no kernel of that shape can do without.

    shape   column names; those in TEXT are strings, all others whole numbers
    floor   (flops, bytes, format of the arithmetic) of every row; times below them over the device's peaks are wrong
    """

    name: str
    shape: tuple[str, ...]
    floor: Callable[[pd.DataFrame], tuple[np.ndarray, np.ndarray, pd.Series]] | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """Columns that name one measurement."""
        return (*self.shape, "dtype", "device", "software", "kernel")

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, in the order they are written."""
        return (*self.shape, *COMMON)


def _weights(frame: pd.DataFrame) -> tuple[np.ndarray, pd.Series]:
    nbytes = frame["dtype"].map({name: size for name, (size, _) in WEIGHT_FORMATS.items()})
    return nbytes.to_numpy(float), frame["dtype"].map(
        {name: kind or "bf16" for name, (_, kind) in WEIGHT_FORMATS.items()}
    )


def _gemm_floor(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, pd.Series]:
    m, n, k = (frame[c].to_numpy(float) for c in ("m", "n", "k"))
    groups = frame["groups"].to_numpy(float) if "groups" in frame else 1.0
    size, arithmetic = _weights(frame)
    return 2 * groups * m * n * k, groups * n * k * size, arithmetic


def _moe_floor(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, pd.Series]:
    # With skewed routing the timed rank may hold few of the routed rows: one row of one expert is all that is certain.
    _, arithmetic = _weights(frame)
    matrices = 2.0 + frame["gated"].to_numpy(float)
    width = np.ceil(frame["intermediate"].to_numpy(float) / frame["tp"].to_numpy(float))
    weights = matrices * frame["hidden"].to_numpy(float) * width
    return 2 * weights, 0 * weights, arithmetic


def _prefill_floor(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, pd.Series]:
    new, before = frame["new"].to_numpy(float), frame["before"].to_numpy(float)
    pairs = new * before + new * (new + 1) / 2
    if "window" in frame:
        window = frame["window"].to_numpy(float)
        pairs = np.where(window > 0, np.minimum(pairs, new * np.maximum(window, 1)) * 0.5, pairs)
    width = 2.0 * frame["head_dim"].to_numpy(float) if "head_dim" in frame else 192.0 + 128.0
    flops = 2 * frame["batch"].to_numpy(float) * frame["heads"].to_numpy(float) * pairs * width
    return flops, 0 * flops, frame["dtype"]


def _decode_floor(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, pd.Series]:
    context = frame["context"].to_numpy(float)
    if "window" in frame:
        window = frame["window"].to_numpy(float)
        context = np.where(window > 0, np.minimum(context, window), context)
    kv = frame["kv_dtype"].map(DTYPE_BYTES).to_numpy(float)
    if "head_dim" in frame:
        width = 2.0 * frame["kv_heads"].to_numpy(float) * frame["head_dim"].to_numpy(float)
    else:
        width = np.full(len(frame), 576.0)
    nbytes = frame["batch"].to_numpy(float) * context * width * kv
    return 0 * nbytes, nbytes, frame["dtype"]


#: Shapes, by family. Counts are per launch on one device.
#:   gemm               m x k activations times k x n weights
#:   batched_gemm       `groups` such products in one launch
#:   moe                both (gated: three) expert matrices with activation; `tokens` of all ranks that share the
#:                      experts; `intermediate` of a whole expert, cut by `tp`; experts spread over `ep` ranks;
#:                      distribution 'balanced' or 'power_law_<exponent>'
#:   attention_prefill  `batch` prompts of `new` tokens behind `before` cached ones; window 0: none
#:   attention_decode   `batch` sequences attending to `context` tokens each (the new one included)
#:   mla_*              the same for DeepSeek's latent attention (512 + 64 wide, absorbed in decode), core kernel only
#:   collective         kind and bytes as hwmodels.collectives counts them, over `gpus` in `nodes`
#:   expert_exchange    kind 'dispatch' or 'combine' of `tokens` per rank over `gpus` in `nodes`
#:   quantize           m x k numbers scaled into a narrower format: kind 'scale' (amax) or 'cast'
#:   elementwise        `bytes` read and written by one launch
#:   copy               kind 'h2d', 'd2h' or 'd2d'
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("gemm", ("m", "n", "k"), _gemm_floor),
        Family("batched_gemm", ("groups", "m", "n", "k"), _gemm_floor),
        Family(
            "moe",
            ("tokens", "hidden", "intermediate", "experts", "top_k", "tp", "ep", "gated", "distribution"),
            _moe_floor,
        ),
        Family(
            "attention_prefill",
            ("batch", "new", "before", "heads", "kv_heads", "head_dim", "window", "kv_dtype"),
            _prefill_floor,
        ),
        Family(
            "attention_decode",
            ("batch", "context", "heads", "kv_heads", "head_dim", "window", "kv_dtype"),
            _decode_floor,
        ),
        Family("mla_prefill", ("batch", "new", "before", "heads", "kv_dtype"), _prefill_floor),
        Family("mla_decode", ("batch", "context", "heads", "kv_dtype"), _decode_floor),
        Family("collective", ("kind", "gpus", "nodes", "bytes")),
        Family("expert_exchange", ("kind", "gpus", "nodes", "tokens", "hidden", "experts", "top_k")),
        Family("quantize", ("kind", "m", "k")),
        Family("elementwise", ("bytes",)),
        Family("copy", ("kind", "bytes")),
    )
}

#: A time may undercut the peaks by this much: boost clocks, caches that keep part of a cycled buffer, rounding.
TOLERANCE = 1.05
#: Where not one kernel with this much to do reaches this share of the peak, the times are not in seconds.
LONG_S, SLOW = 1e-4, 1e-3


def family_named(name: str) -> Family:
    """The operator family called `name`; raises MeasurementError for an unknown one."""
    if name not in FAMILIES:
        raise MeasurementError(f"operator family {name!r}: expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _shown(value: object) -> str:
    """A cell as people write it, text in quotes."""
    plain = value.item() if isinstance(value, np.generic) else value
    return repr(plain)


def checked(frame: pd.DataFrame, name: str, where: str) -> pd.DataFrame:
    """The table in the family's column order and types.

    Raises MeasurementError for missing, unknown or repeated columns, missing values, number formats without a name,
    times or counts that are not positive, and keys that occur twice; `where` names the file in the message.
    """
    family = family_named(name)
    repeated = sorted(set(frame.columns[frame.columns.duplicated()].astype(str)))
    if repeated:
        raise MeasurementError(f"{where}: columns {repeated} occur more than once; keep one of each")
    missing = [c for c in family.columns if c not in frame.columns]
    unknown = [c for c in frame.columns if c not in family.columns]
    if missing or unknown:
        raise MeasurementError(
            f"{where}: columns missing {missing}, unknown {unknown}; a {name} table has {', '.join(family.columns)}"
        )
    frame = frame.loc[:, list(family.columns)].reset_index(drop=True)
    for column in family.columns:
        values = frame[column]
        empty = values.isna() & (column != "spread")
        if empty.any():
            raise MeasurementError(
                f"{where}: row {int(np.argmax(empty))}: {column} is missing; drop the row or fill it"
            )
        if column in TEXT:
            frame[column] = values.astype(str)
            known = _formats(family, column)
            bad = (~frame[column].isin(known) if known else frame[column].str.strip() == "").to_numpy(bool)
            if bad.any():
                row = int(np.argmax(bad))
                expected = f"one of {', '.join(known)}" if known else "a name"
                raise MeasurementError(f"{where}: row {row}: {column} = {_shown(values[row])}; expected {expected}")
            continue
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(float, na_value=np.nan)
        least = 0 if column in {"before", "window", "gated", "spread"} else 1
        if column == "seconds":
            bad = ~np.isfinite(numbers) | (numbers <= 0)
            expected = "a positive time in seconds"
        elif column == "spread":
            bad = values.notna().to_numpy(bool) & ~(np.isfinite(numbers) & (numbers >= 0))
            expected = "a share of the median of at least 0, or nothing"
        else:
            # Beyond 2^53 a float no longer tells whole numbers apart.
            bad = ~np.isfinite(numbers) | (numbers < least) | (numbers != np.floor(numbers)) | (numbers > 2**53)
            expected = f"a whole number of at least {least}"
        if bad.any():
            row = int(np.argmax(bad))
            raise MeasurementError(f"{where}: row {row}: {column} = {_shown(values[row])}; expected {expected}")
        frame[column] = numbers.astype(float if column in {"seconds", "spread"} else np.int64)
    twice = frame.duplicated(list(family.key))
    if twice.any():
        row = int(np.argmax(twice))
        key = " ".join(f"{c}={_shown(frame[c].iloc[row])}" for c in family.key)
        raise MeasurementError(f"{where}: row {row} measures {key} a second time; keep one row per key")
    return frame


def _formats(family: Family, column: str) -> tuple[str, ...]:
    """Names a column of number formats may hold; empty for other columns and families without a floor."""
    if family.floor is None or column not in {"dtype", "kv_dtype"}:
        return ()
    weights = column == "dtype" and family.name in {"gemm", "batched_gemm", "moe"}
    return tuple(WEIGHT_FORMATS if weights else DTYPE_BYTES)


def beyond_peak(frame: pd.DataFrame, name: str, device: Device) -> pd.Series:
    """Which rows claim more than the device's peak arithmetic or memory bandwidth allows (times TOLERANCE)."""
    return pd.Series(frame["seconds"].to_numpy(float) < _least_s(frame, name, device) / TOLERANCE, index=frame.index)


def _least_s(frame: pd.DataFrame, name: str, device: Device) -> np.ndarray:
    """Seconds the device's peaks ask for, by row; 0 for families without a floor."""
    floor = family_named(name).floor
    if floor is None or frame.empty:
        return np.zeros(len(frame))
    flops, nbytes, arithmetic = floor(frame)
    peaks = dict(device.peak_flops_per_s)
    wide = peaks.get("bf16", peaks.get("fp16", max(peaks.values())))
    peak = arithmetic.map(lambda kind: peaks.get(str(kind), wide)).to_numpy(float)
    # Repeated launches may find small operands in the cache, so bandwidth is only held against large ones.
    memory_s = np.where(nbytes > 256e6, nbytes / device.memory_bytes_per_s, 0.0)
    least_s: np.ndarray = np.maximum(flops / peak, memory_s)
    return least_s


def checked_against(frame: pd.DataFrame, name: str, device: Device, where: str) -> pd.DataFrame:
    """`checked`, of one device, no row beyond its peaks; raises MeasurementError with the row otherwise."""
    frame = checked(frame, name, where)
    others = sorted(set(frame["device"]) - {device.name})
    if others:
        raise MeasurementError(f"{where}: rows of {', '.join(others)} beside {device.name}; keep one device per table")
    wrong = beyond_peak(frame, name, device)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise MeasurementError(
            f"{where}: row {row} takes {frame['seconds'].iloc[row]:.3g} s, less than the peak of {device.name} allows; "
            "check the unit of the times (seconds) and of the sizes (elements, not bytes, in matrix shapes)"
        )
    least_s = _least_s(frame, name, device)
    long = least_s > LONG_S
    if long.any() and (least_s[long] < frame["seconds"].to_numpy(float)[long] * SLOW).all():
        row = int(np.argmax(long))
        raise MeasurementError(
            f"{where}: row {row} takes {frame['seconds'].iloc[row]:.3g} s, and no row like it reaches a thousandth of "
            f"the peak of {device.name}; check the unit of the times (seconds)"
        )
    return frame


def read_table(path: Path, name: str) -> pd.DataFrame:
    """The table in a Parquet file; raises MeasurementError where it is none or breaks the schema."""
    try:
        frame = pq.read_table(path).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise MeasurementError(f"{path}: not a readable Parquet file ({error})") from error
    return checked(frame, name, str(path))


def write_table(frame: pd.DataFrame, name: str, path: Path) -> None:
    """Write the table as Parquet, whole or not at all, also beside other writers of the same path.

    Raises MeasurementError where it breaks the schema or the folder cannot be written.
    """
    table = pa.Table.from_pandas(checked(frame, name, str(path)), preserve_index=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            pq.write_table(table, unfinished, compression="zstd")
    except OSError as error:
        raise MeasurementError(
            f"{path}: cannot be written ({error.strerror or error}); choose a folder that can be written"
        ) from None
