"""How long do prompts and decode steps take on Splitwise's machines, by its published measurements?

The table (splitwise-sim @8f99e7d, data/perf_model.csv) has one static batch in each row: `batch_size` prompts of
`prompt_size` tokens, prompt_time and token_time in ms, on the GPUs of one machine. Times are read from it as a function
of the tokens of a batch of prompts, and of the sequences of a decode step. For the latter there are two ways:

as published   the published simulator fits token_time over prompt_size x batch_size and looks it up at the number of
               sequences, far left of what the axis begins with
as measured    token_time over batch_size, at the one prompt size that was measured with many sequences

Known faults of the file: Llama-2-70B on two GPUs with 64 prompts is bad and left out; the rows of the capped H100 were
not measured but are those of the H100 with prompt_time x 1.30.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.errors import MeasurementError

Floats = NDArray[np.float64]
Lookup = Literal["published", "measured"]
LOOKUPS: tuple[Lookup, ...] = ("published", "measured")
COLUMNS = ("model", "hardware", "tensor_parallel", "prompt_size", "batch_size", "token_size", "prompt_time",
           "token_time")  # fmt: skip
#: What the published simulator multiplies the time of a batch of prompts with when sequences decode beside them.
MIXED = 1.1


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Measured medians of one model on one machine.

    tokens, prompt_s         prompt tokens in a batch, ascending, and the time until all of them are read
    token_s                  time of a decode step of the batches that had these tokens as prompts
    sequences, decode_s      sequences that decode together, ascending, and the time of a step
    """

    tokens: Floats
    prompt_s: Floats
    token_s: Floats
    sequences: Floats
    decode_s: Floats

    def prompt(self, tokens: Floats) -> Floats:
        """Seconds for batches of this many prompt tokens: linear between measured ones, constant below the least.

        Beyond the largest batch the last two go on in a line.
        """
        return onwards(tokens, self.tokens, self.prompt_s)

    def decode(self, sequences: Floats, lookup: Lookup) -> Floats:
        """Seconds of decode steps of this many sequences."""
        if lookup == "published":
            return onwards(sequences, self.tokens, self.token_s)
        return onwards(sequences, self.sequences, self.decode_s)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Errors |predicted / measured - 1| of what was left out of the table and interpolated from the rest.

    what       prompt or token
    left_out   rows: a fifth of all rows, others of the same batch stay; batches: all rows of one batch in turn, but for
               the smallest and the largest batch of each machine
    """

    what: str
    left_out: str
    rows: int
    median: float
    mean: float
    p90: float


def onwards(at: Floats, x: Floats, y: Floats) -> Floats:
    """y at `at`, linear between the points (x, y), constant before the first, along the last two after the last."""
    found: Floats = np.interp(at, x, y)
    if len(x) > 1:
        slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
        found = np.where(at > x[-1], y[-1] + slope * (at - x[-1]), found)
    return found


def read_table(path: Path) -> pd.DataFrame:
    """The rows of the file, bad ones left out, times in seconds as prompt_s and token_s.

    Raises MeasurementError for a file that cannot be read or lacks a column.
    """
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError:
        raise MeasurementError(
            f"{path}: no such file, expected Splitwise's perf_model.csv; give its path with --table"
        ) from None
    except (OSError, ValueError) as error:
        raise MeasurementError(f"{path}: cannot be read as CSV ({' '.join(str(error).split())})") from None
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise MeasurementError(f"{path}: column {missing[0]} is missing, expected {', '.join(COLUMNS)}")
    numbers = frame[list(COLUMNS[2:])].apply(pd.to_numeric, errors="coerce")
    wrong = ~(numbers > 0).all(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong.to_numpy()))
        raise MeasurementError(f"{path}, line {row + 2}: expected numbers above 0 in {', '.join(COLUMNS[2:])}")
    bad = (
        frame["model"].astype(str).str.startswith("llama2-70b")
        & (numbers["tensor_parallel"] == 2)
        & (numbers["batch_size"] == 64)
    )
    found: pd.DataFrame = pd.concat([frame[["model", "hardware"]].astype(str), numbers], axis=1)[~bad].copy()
    found["tokens"] = found["prompt_size"] * found["batch_size"]
    found["prompt_s"], found["token_s"] = found["prompt_time"] / 1e3, found["token_time"] / 1e3
    return found


def phase_times(table: pd.DataFrame, model: str, hardware: str, tp: int = 8) -> PhaseTimes:
    """The medians of one model on one machine; raises MeasurementError where there are none."""
    rows = table[(table["model"] == model) & (table["hardware"] == hardware) & (table["tensor_parallel"] == tp)]
    if rows.empty:
        known = sorted({f"{m} on {h} with {t:g} GPUs" for m, h, t in _groups(table)})
        raise MeasurementError(f"no rows of {model} on {hardware} with {tp} GPUs; expected one of {', '.join(known)}")
    by_tokens = rows.groupby("tokens")[["prompt_s", "token_s"]].median()
    by_batch = _decoded(rows).groupby("batch_size")["token_s"].median()
    return PhaseTimes(
        tokens=by_tokens.index.to_numpy(dtype=float),
        prompt_s=by_tokens["prompt_s"].to_numpy(),
        token_s=by_tokens["token_s"].to_numpy(),
        sequences=by_batch.index.to_numpy(dtype=float),
        decode_s=by_batch.to_numpy(),
    )


def held_out(table: pd.DataFrame, seed: int = 0) -> list[HeldOut]:
    """How far interpolation is off, by leaving rows out and by leaving batches out (V14)."""
    rng = np.random.default_rng(seed)
    measured = table[~table["hardware"].str.endswith("pcap")]
    random = rng.random(len(measured)) < 0.2
    by_rows: dict[str, list[Floats]] = {"prompt": [], "token": []}
    by_batches: dict[str, list[Floats]] = {"prompt": [], "token": []}
    for key in _groups(measured):
        mine = (measured[["model", "hardware", "tensor_parallel"]] == list(key)).all(axis=1).to_numpy()
        kept, out = measured[mine & ~random], measured[mine & random]
        whole = measured[mine]
        for what, axis in (("prompt", "tokens"), ("token", "batch_size")):
            # Decode steps are read over the batch size, so they are tested where it varies: at the common prompt.
            pick = _decoded if what == "token" else _all
            left, rest, every = pick(out), pick(kept), pick(whole)
            if len(left) and len(rest):
                by_rows[what].append(_errors(rest, left, axis, f"{what}_s"))
            for value in np.unique(every[axis])[1:-1]:
                inside = every[axis] == value
                by_batches[what].append(_errors(every[~inside], every[inside], axis, f"{what}_s"))
    found = []
    for left_out, errors in (("rows", by_rows), ("batches", by_batches)):
        for what, parts in errors.items():
            if parts:
                values = np.concatenate(parts)
                spread = float(np.median(values)), float(values.mean()), float(np.quantile(values, 0.9))
                found.append(HeldOut(what, left_out, len(values), *spread))
    return found


def cap_ratios(table: pd.DataFrame, capped: str, full: str) -> tuple[float, float]:
    """Median prompt time and token time on the capped machine over those on the full one, batch by batch (V17)."""
    key = ["model", "tensor_parallel", "prompt_size", "batch_size", "token_size"]
    medians = table.groupby(["hardware", *key])[["prompt_s", "token_s"]].median()
    ratios = (medians.loc[capped] / medians.loc[full]).dropna()
    return float(ratios["prompt_s"].median()), float(ratios["token_s"].median())


def _groups(table: pd.DataFrame) -> Iterator[tuple[str, str, float]]:
    for model, hardware, tp in table[["model", "hardware", "tensor_parallel"]].drop_duplicates().to_numpy():
        yield str(model), str(hardware), float(tp)


def _common_prompt(rows: pd.DataFrame) -> float:
    """The prompt size that was measured with the most batch sizes."""
    return float(rows.groupby("prompt_size")["batch_size"].nunique().idxmax())  # type: ignore[arg-type]


def _decoded(rows: pd.DataFrame) -> pd.DataFrame:
    if rows.empty:
        return rows
    many = rows[rows["prompt_size"] == _common_prompt(rows)]
    found: pd.DataFrame = many[many["token_size"] == many["token_size"].min()]
    return found


def _all(rows: pd.DataFrame) -> pd.DataFrame:
    return rows


def _errors(kept: pd.DataFrame, out: pd.DataFrame, axis: str, value: str) -> Floats:
    medians = kept.groupby(axis)[value].median()
    predicted = onwards(out[axis].to_numpy(float), medians.index.to_numpy(float), medians.to_numpy())
    errors: Floats = np.abs(predicted / out[value].to_numpy(float) - 1)
    return errors
