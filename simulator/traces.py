"""Reading recorded traffic, and condensing it into the statistics of a workload profile.

A file is read by a vectorised parser first. Whatever that one does not accept is read again, line by line, by a plain
parser that either reads it or says which line, which value and what was expected.

    python -m simulator.traces TRACE       prints the statistics of a trace as the body of a workload profile
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.json
import yaml
from numpy.typing import NDArray

from simulator.blockhashes import BlockHashes
from simulator.errors import TraceError
from simulator.sessions import TurnError, chained
from simulator.workload import MAX_ARRIVAL_S, MAX_TOKENS, Floats, Requests

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Layout:
    """A kind of trace.

    columns     names of arrival, prompt and output
    unit        arrival units per second
    relative    whether the first request defines time 0; otherwise arrivals are seconds since the start already
    """

    name: str
    columns: tuple[str, str, str]
    unit: float
    relative: bool


AZURE = _Layout("Azure 2023 CSV", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), 1e9, relative=True)
MOONCAKE = _Layout("Mooncake JSON lines", ("timestamp", "input_length", "output_length"), 1e3, relative=True)
PLAIN = _Layout("plain CSV", ("arrival_s", "prompt_tokens", "output_tokens"), 1.0, relative=False)
SLO_CLASS = "slo_class"
SESSION, TURN = "session", "turn"
HASHES = "hash_ids"
#: Tokens of the blocks that Mooncake's traces hash.
MOONCAKE_BLOCK_TOKENS = 512
#: Tokens of the blocks that sessions are cut into, and how many blocks of a trace are kept at most (1 GiB of ids).
SESSION_BLOCK_TOKENS, _MOST_BLOCKS = 16, 2**27

_KNOWN = (
    f"{','.join(AZURE.columns)} ({AZURE.name}), {','.join(PLAIN.columns)}[,{SLO_CLASS}]"
    f"[,{SESSION},{TURN}] ({PLAIN.name}), or objects with {', '.join(MOONCAKE.columns)} ({MOONCAKE.name})"
)


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of a trace as they stand in the file; AZURE's arrivals are nanoseconds since 1970."""

    arrival: NDArray[Any]
    prompt: Floats
    output: Floats
    slo_class: NDArray[Any]
    class_names: tuple[str, ...] = ("default",)
    session: NDArray[Any] | None = None
    turn: NDArray[np.int64] | None = None
    hashes: BlockHashes | None = None


class _Fault(Exception):
    """What is wrong with a file, and in which line if it is in one."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def read_trace(
    path: str | PathLike[str],
    *,
    drop_empty: bool = False,
    hash_block_tokens: int | None = MOONCAKE_BLOCK_TOKENS,
    session_block_tokens: int | None = SESSION_BLOCK_TOKENS,
) -> Requests:
    """The requests recorded in a file, in order of arrival (equal times: in order of the file).

    The layout is found from the content, gzip included:

    TIMESTAMP,ContextTokens,GeneratedTokens            CSV of AzurePublicDataset; dates, UTC where no offset is given
    arrival_s,prompt_tokens,output_tokens[,slo_class][,session,turn]
                                                       plain CSV; seconds since the start, turns 0, 1, ... of sessions
    {"timestamp", "input_length", "output_length"[, "hash_ids"]}
                                                       JSON lines of Mooncake; milliseconds, block ids of the prompt

    Dates and milliseconds are counted from the earliest request; other columns and keys are ignored. Requests without
    prompt or output tokens (failed ones; the 2023 Azure and the Mooncake traces have none) are an error unless
    `drop_empty`, which leaves them out and logs how many. Raises TraceError naming file, line and value.

    hash_block_tokens      tokens of one block of hash_ids; None leaves them unread
    session_block_tokens   tokens of the blocks that sessions are cut into, see simulator.sessions; None leaves session
                           and turn unread
    """
    try:
        text = _text(Path(path))
        if text.lstrip()[:1] == "{":
            layout, columns = _read_json(text, drop_empty, hash_block_tokens)
        else:
            layout, columns = _read_csv(text, drop_empty, session_block_tokens)
        return _requests(layout, columns, path)
    except _Fault as fault:
        where = f"{path}" if fault.line is None else f"{path}, line {fault.line}"
        raise TraceError(f"{where}: {fault}") from None


def _text(path: Path) -> str:
    """The text of the file, unpacked if it is gzip, without byte-order mark."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _Fault("no such file; check the path") from None
    except IsADirectoryError:
        raise _Fault("is a directory; expected one trace file") from None
    except (OSError, ValueError) as error:
        raise _Fault(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error):
            raise _Fault("gzip data is truncated or damaged; fetch the file again") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _Fault("is UTF-16 text; expected UTF-8, save it as such")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Bytes after a byte-order mark are counted from behind it; the line is the same.
        line = error.object.count(b"\n", 0, error.start) + 1
        raise _Fault(f"byte 0x{error.object[error.start]:02x}: expected UTF-8 text, CSV or JSON lines", line) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _Fault("byte 0x00: expected UTF-8 text, CSV or JSON lines", line)
    if not text.strip():
        raise _Fault(f"is empty; expected {_KNOWN}")
    return text


def _read_csv(text: str, drop_empty: bool, block_tokens: int | None) -> tuple[_Layout, _Columns]:
    head = re.search(r"\S[^\r\n]*", text)
    assert head is not None  # _text refuses blank files
    header_line = text.count("\n", 0, head.start()) + 1
    try:
        names = [name.strip() for name in next(csv.reader([head.group()]))]
    except csv.Error:
        names = [head.group()]
    layout = _csv_layout(names, header_line)
    wanted = list(layout.columns)
    if layout is PLAIN and SLO_CLASS in names:
        wanted.append(SLO_CLASS)
    if layout is PLAIN and block_tokens is not None and SESSION in names and TURN in names:
        wanted += [SESSION, TURN]
    repeated = [name for name in wanted if names.count(name) > 1]
    if repeated:
        raise _Fault(f"column {repeated[0]} appears {names.count(repeated[0])} times: expected once", header_line)

    places = {name: names.index(name) for name in wanted}
    columns = _fast_csv(text[head.end() :], layout, len(names), places)
    if columns is None or not _sound(layout, columns, drop_empty):
        rows = _csv_rows(text, header_line, len(names), list(places.values()))
        columns = _checked(layout, rows, drop_empty, wanted[len(layout.columns) :])
    if columns.session is not None and columns.turn is not None and block_tokens is not None:
        rows = _csv_rows(text, header_line, len(names), [])
        hashes = _turn_hashes(columns, columns.session, columns.turn, block_tokens, rows)
        columns = replace(columns, hashes=hashes)
    return layout, columns


def _turn_hashes(
    columns: _Columns, session: NDArray[Any], turn: NDArray[np.int64], size: int, rows: Iterator[_Row]
) -> BlockHashes:
    """The block ids of the turns of sessions, in the order of the file; `rows` are read to name the line of a fault."""
    order = np.argsort(columns.arrival, kind="stable")
    prompt, output = (values[order].astype(np.int64) for values in (columns.prompt, columns.output))
    blocks = int(np.sum(-(-(prompt + output) // size)))
    if blocks > _MOST_BLOCKS:
        raise _Fault(
            f"sessions of {blocks} blocks of {size} tokens: expected at most {_MOST_BLOCKS}; give a part of the trace"
        )
    try:
        hashes = chained(session[order], turn[order], prompt, output, size)
    except TurnError as error:
        row = int(order[error.request])
        line = next(line for index, (line, _) in enumerate(rows) if index == row)
        raise _Fault(f"session {_shown(str(session[row]))}, turn {turn[row]}: {error.problem}", line) from None
    return hashes.pick(np.argsort(order))


def _csv_layout(names: list[str], line: int) -> _Layout:
    found = {layout: [name for name in layout.columns if name in names] for layout in (AZURE, PLAIN)}
    best = max(found, key=lambda layout: len(found[layout]))
    if len(found[best]) == len(best.columns):
        return best
    shown = _shown(",".join(names))
    if found[best]:
        missing = ", ".join(name for name in best.columns if name not in names)
        raise _Fault(f"header {shown}: {missing} missing; expected {','.join(best.columns)} as in {best.name}", line)
    raise _Fault(f"header {shown}: expected {_KNOWN}", line)


def _fast_csv(body: str, layout: _Layout, width: int, places: Mapping[str, int]) -> _Columns | None:
    """The named columns at their `places` by Arrow's parser, or None if it does not accept every value of them."""
    positions = list(places.values())
    keys = [str(position) for position in positions]
    text = (SLO_CLASS, SESSION)
    types = {str(place): pa.string() if name in text else pa.float64() for name, place in places.items()}
    if layout is AZURE:
        # Arrow wants to know beforehand whether dates carry offsets; the first row tells.
        first = body.lstrip().partition("\n")[0].split(",")[positions[0] :][:1]
        offset = bool(first) and re.search(r":\d.*(Z|[+-]\d\d(:?\d\d)?)$", first[0].strip(' "\r')) is not None
        types[keys[0]] = pa.timestamp("ns", tz="UTC" if offset else None)
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(body.encode()),
            pa.csv.ReadOptions(column_names=[str(position) for position in range(width)]),
            convert_options=pa.csv.ConvertOptions(column_types=types, include_columns=keys),
        )
    except pa.ArrowException:
        return None
    return _from_table(table.select(keys).rename_columns(list(places)))


def _read_json(text: str, drop_empty: bool, block_tokens: int | None) -> tuple[_Layout, _Columns]:
    schema = pa.schema([*((name, pa.float64()) for name in MOONCAKE.columns), (HASHES, pa.list_(pa.int64()))])
    options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    rows: pa.ChunkedArray | None = None
    try:
        table = pa.json.read_json(pa.BufferReader(text.encode()), parse_options=options)
        columns = _from_table(table.select(list(MOONCAKE.columns)))
        rows = table.column(HASHES)
    except pa.ArrowException:
        columns = None
    if columns is None or not _sound(MOONCAKE, columns, drop_empty):
        columns = _checked(MOONCAKE, _json_rows(text), drop_empty, [])
    if block_tokens is not None:
        hashes = _hashes(text, rows, columns.prompt.astype(np.int64), block_tokens)
        columns = replace(columns, hashes=hashes)
    return MOONCAKE, columns


def _hashes(text: str, rows: pa.ChunkedArray | None, prompts: NDArray[np.int64], size: int) -> BlockHashes | None:
    """The block ids of all prompts, from Arrow's column if it is sound; None where no request has any."""
    if f'"{HASHES}"' not in text or (rows is not None and rows.null_count == len(rows)):
        return None
    blocks = -(-prompts // size)
    hashes: BlockHashes | None = None
    if rows is not None and not rows.null_count:
        flat = pa.compute.list_flatten(rows)
        if not flat.null_count and (not len(flat) or pa.compute.min(flat).as_py() >= 0):
            counts = pa.compute.list_value_length(rows).to_numpy()
            if np.array_equal(counts, blocks):
                hashes = BlockHashes(flat.to_numpy(), np.concatenate(([0], np.cumsum(counts))), size)
    if hashes is None:
        found = _hash_rows(text, prompts, blocks, size)
        if found is None:
            return None
        hashes = BlockHashes.of(found, size)
    try:
        hashes.check_chained()
    except TraceError as error:
        raise _Fault(f"{HASHES}: {error}") from None
    return hashes


def _hash_rows(text: str, prompts: NDArray[np.int64], blocks: NDArray[np.int64], size: int) -> list[list[int]] | None:
    """The block ids line by line, None if no line has any (null is none, too).

    Raises _Fault at the first line that has none where others do, or whose ids are not those of its blocks.
    """
    lines = [(line, content) for line, content in enumerate(text.split("\n"), 1) if content.strip()]
    values = [json.loads(content).get(HASHES) for _, content in lines]
    if all(ids is None for ids in values):
        return None
    found: list[list[int]] = []
    for (line, content), ids in zip(lines, values, strict=True):
        if ids is None:
            raise _Fault(f"{_shown(content)}: {HASHES} missing; expected in all lines or in none", line)
        if not isinstance(ids, list) or not all(type(value) is int and 0 <= value < 2**63 for value in ids):
            raise _Fault(f"{HASHES} = {_shown(ids)}: expected a list of whole numbers in [0, 2^63)", line)
        row = len(found)
        if len(ids) != blocks[row]:
            raise _Fault(
                f"{len(ids)} {HASHES} for {prompts[row]} prompt tokens: expected {blocks[row]}, one for every "
                f"{size} tokens; from Python, read_trace takes other block sizes as hash_block_tokens, or None to "
                "leave the ids out",
                line,
            )
        found.append(ids)
    return found


def _from_table(table: pa.Table) -> _Columns | None:
    if len(table) == 0 or any(column.null_count for column in table.columns):
        return None
    arrival, prompt, output = table.columns[:3]
    if pa.types.is_timestamp(arrival.type):
        arrival = arrival.cast(pa.int64())
    numbers = (arrival.to_numpy(), prompt.to_numpy(), output.to_numpy())
    columns = _Columns(*numbers, slo_class=np.zeros(len(table), np.int64))
    if SLO_CLASS in table.column_names:
        encoded = pa.compute.utf8_trim_whitespace(table.column(SLO_CLASS)).combine_chunks().dictionary_encode()
        names = tuple(encoded.dictionary.to_pylist())
        if "" in names:
            return None
        columns = replace(columns, slo_class=encoded.indices.to_numpy(), class_names=names)
    if SESSION in table.column_names:
        session = pa.compute.utf8_trim_whitespace(table.column(SESSION)).to_numpy()
        turn = table.column(TURN).to_numpy()
        if np.any(session == "") or not np.all((turn >= 0) & (turn <= MAX_TOKENS) & (turn == np.floor(turn))):
            return None
        columns = replace(columns, session=session, turn=turn.astype(np.int64))
    return columns


def _sound(layout: _Layout, columns: _Columns, drop_empty: bool) -> bool:
    """Whether every value is one that the line-by-line parser accepts as well."""
    tokens = np.concatenate([columns.prompt, columns.output])
    fewest = 0 if drop_empty else 1
    if not np.all((tokens >= fewest) & (tokens <= MAX_TOKENS) & (tokens == np.floor(tokens))):
        return False
    return layout is AZURE or bool(np.all((columns.arrival >= 0) & (columns.arrival <= _latest(layout))))


# The line-by-line parser: rows of (line, values), then one check per value.

_Row = tuple[int, list[Any]]


def _csv_rows(text: str, header_line: int, width: int, positions: Sequence[int]) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""))
    header_seen = False
    try:
        for row in reader:
            if not row or (len(row) == 1 and not row[0].strip()):
                continue
            if not header_seen:
                header_seen = True
                continue
            if len(row) != width:
                raise _Fault(f"{len(row)} fields: expected {width}, as in line {header_line}", reader.line_num)
            yield reader.line_num, [row[position].strip() for position in positions]
    except csv.Error as error:
        raise _Fault(f"not CSV ({error})", reader.line_num) from None


def _json_rows(text: str) -> Iterator[_Row]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            raise _Fault(f"{_shown(content)}: expected one JSON object", line) from None
        if not isinstance(value, dict):
            raise _Fault(f"{_shown(content)}: expected one JSON object", line)
        missing = [name for name in MOONCAKE.columns if name not in value]
        if missing:
            raise _Fault(f"{_shown(content)}: {missing[0]} missing", line)
        yield line, [value[name] for name in MOONCAKE.columns]


def _checked(layout: _Layout, rows: Iterator[_Row], drop_empty: bool, extra: Sequence[str]) -> _Columns:
    """The columns of `rows`, every value checked; raises _Fault at the first one that is wrong.

    extra   names of the columns after the three of the layout
    """
    arrival_of = _nanoseconds if layout is AZURE else _number
    arrival_name, prompt_name, output_name = layout.columns
    latest, fewest = _latest(layout), 0 if drop_empty else 1
    way_out = "" if drop_empty else "; drop_empty leaves requests without tokens out"
    arrivals, prompts, outputs, classes, sessions, turns = [], [], [], [], [], []
    codes: dict[str, int] = {}
    for line, (arrival_value, prompt_value, output_value, *others) in rows:
        arrival = arrival_of(arrival_value)
        if arrival is None or not (layout is AZURE or 0 <= arrival <= latest):
            unit = {AZURE: "a date and time", PLAIN: "seconds", MOONCAKE: "milliseconds"}[layout]
            limits = "" if layout is AZURE else f" in [0, {latest:g}]"
            raise _Fault(f"{arrival_name} = {_shown(arrival_value)}: expected {unit}{limits}", line)
        counts = []
        for name, value in ((prompt_name, prompt_value), (output_name, output_value)):
            count = _number(value)
            if count is None or not (fewest <= count <= MAX_TOKENS and count == int(count)):
                hint = way_out if count == 0 else ""
                raise _Fault(f"{name} = {_shown(value)}: expected a whole number in [{fewest}, 2^31){hint}", line)
            counts.append(count)
        labels = dict(zip(extra, others, strict=True))
        for name in (SLO_CLASS, SESSION):
            if labels.get(name) == "":
                raise _Fault(f"{name} is empty: expected a name", line)
        if TURN in labels:
            turn = _number(labels[TURN])
            if turn is None or not (0 <= turn <= MAX_TOKENS and turn == int(turn)):
                raise _Fault(f"{TURN} = {_shown(labels[TURN])}: expected a whole number in [0, 2^31)", line)
            turns.append(int(turn))
            sessions.append(labels[SESSION])
        arrivals.append(arrival)
        prompts.append(counts[0])
        outputs.append(counts[1])
        classes.append(codes.setdefault(labels[SLO_CLASS], len(codes)) if SLO_CLASS in labels else 0)
    if not arrivals:
        raise _Fault("has no rows below its header; expected at least one request")
    numbers = (np.array(prompts, np.float64), np.array(outputs, np.float64), np.array(classes, np.int64))
    # Nanoseconds since 1970 leave int64 in the year 2262; Python's integers do not.
    dtype = object if layout is AZURE else np.float64
    columns = _Columns(np.array(arrivals, dtype), *numbers, tuple(codes) or ("default",))
    if TURN not in extra:
        return columns
    return replace(columns, session=np.array(sessions, object), turn=np.array(turns, np.int64))


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_DATE = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[ T](\d\d(?::\d\d)?|\d\d:\d\d:\d\d(?:\.(\d{1,9}))?)(Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII
)


def _number(value: object) -> float | None:
    """`value` as a finite float, or None if it is not a number."""
    if isinstance(value, str):
        value = float(value) if _NUMBER.fullmatch(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def _nanoseconds(value: str) -> int | None:
    """Nanoseconds since 1970 of an ISO 8601 date, with or without time, or None if it is not one."""
    match = _DATE.fullmatch(value)
    if match is None:
        return None
    date, time, decimals, offset = match.groups()
    clock = (time or "00").partition(".")[0]
    try:
        moment = datetime.fromisoformat(f"{date}T{clock}{offset or '+00:00'}")
    except ValueError:
        return None
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 10**9 + int((decimals or "0").ljust(9, "0"))


def _latest(layout: _Layout) -> float:
    """The latest arrival that is accepted, in the layout's unit; float64's integers bound milliseconds."""
    return 2.0**53 if layout.relative else MAX_ARRIVAL_S


def _shown(value: object) -> str:
    """`value` on one line and short."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, float | bool) else _compact(value)
    text = ascii(text) if isinstance(value, str) else text
    return text if len(text) <= 60 else text[:57] + "..."


def _compact(value: object) -> str:
    try:
        return ascii(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too long to show"


def _requests(layout: _Layout, columns: _Columns, path: str | PathLike[str]) -> Requests:
    """The requests of checked columns: empty ones left out, times counted from the first, sorted."""
    arrival = columns.arrival
    kept = (columns.prompt >= 1) & (columns.output >= 1)
    if not kept.any():
        raise _Fault("every request lacks prompt or output tokens; expected at least one that was served")
    if not kept.all():
        _LOG.warning("%s: left out %d of %d requests without prompt or output tokens", path, (~kept).sum(), len(kept))
    arrival = arrival[kept]
    if layout.relative:
        arrival = arrival - arrival.min()
    arrival_s = arrival.astype(np.float64) / layout.unit
    order = np.argsort(arrival_s, kind="stable")
    try:
        return Requests(
            arrival_s[order],
            columns.prompt[kept][order].astype(np.int64),
            columns.output[kept][order].astype(np.int64),
            columns.slo_class[kept][order],
            columns.class_names,
            None if columns.hashes is None else columns.hashes.pick(np.flatnonzero(kept)[order]),
        )
    except TraceError as error:
        raise _Fault(str(error)) from None


# Statistics for a workload profile.

_TAIL = (0.001, 0.005, 0.01, 0.025)
PROBABILITIES = (0.0, *_TAIL, *(round(0.05 * k, 2) for k in range(1, 20)), *(1 - p for p in reversed(_TAIL)), 1.0)


def summarize(requests: Requests, groups: int = 10) -> dict[str, Any]:
    """The statistics of a trace as the keys rate_per_s, arrivals and lengths of simulator.workload.Profile.

    groups   the outputs are described separately for this many groups of equally many requests, by ascending prompt

    Order is not kept: consecutive requests are independent in the profile. Raises TraceError where there is no rate.
    """
    if requests.span_s <= 0:
        raise TraceError(f"{len(requests)} requests within 0 s: expected a trace with gaps to describe")
    by_prompt = requests.output_tokens[np.argsort(requests.prompt_tokens, kind="stable")]
    return {
        "rate_per_s": float(f"{requests.rate_per_s:.5g}"),
        "arrivals": _arrival_statistics(requests.arrival_s),
        "lengths": {
            "kind": "quantiles",
            "probabilities": [round(p, 3) for p in PROBABILITIES],
            "prompt_tokens": _quantiles(requests.prompt_tokens),
            "output_tokens": [_quantiles(part) for part in np.array_split(by_prompt, min(groups, len(requests)))],
        },
    }


def _arrival_statistics(arrival_s: Floats) -> dict[str, Any]:
    """Gamma gaps up to cv 2; beyond that one number says too little, and the quantiles of the gaps are given."""
    gaps_s = np.diff(arrival_s)
    if np.mean(gaps_s == 0) > 0.1:
        # Stamped in batches by a coarse clock: the gaps say nothing, the counts per window still do.
        window_s = min(10 * float(np.median(gaps_s[gaps_s > 0])), float(arrival_s[-1] - arrival_s[0]) / 2)
        cv = _dispersion_cv(arrival_s, window_s)
        return {"process": "gamma", "cv": round(min(max(cv, 0.001), 100.0), 3)}
    cv = float(gaps_s.std() / gaps_s.mean())
    if cv < 0.001:
        return {"process": "deterministic"}
    if cv <= 2:
        return {"process": "gamma", "cv": round(cv, 3)}
    return {
        "process": "renewal",
        "probabilities": [round(p, 3) for p in PROBABILITIES],
        "gaps_s": [float(f"{gap:.4g}") for gap in np.quantile(gaps_s, PROBABILITIES)],
    }


def _dispersion_cv(arrival_s: Floats, window_s: float) -> float:
    """The cv of the gaps of a renewal process whose counts per window have the same variance over mean.

    Var N(t) / E N(t) tends to cv**2 for long windows (Cox, Renewal Theory, 1962).
    """
    window = np.floor((arrival_s - arrival_s[0]) / window_s)
    windows = window[-1]  # the last one is cut off by the end of the trace and left out
    _, counts = np.unique(window[window < windows], return_counts=True)
    mean = counts.sum() / windows
    return float(np.sqrt((np.square(counts, dtype=np.float64).sum() / windows - mean**2) / mean))


def _quantiles(values: NDArray[np.int64]) -> list[int]:
    return [round(value) for value in np.quantile(values, PROBABILITIES)]


if __name__ == "__main__":
    try:
        statistics = summarize(read_trace(sys.argv[1]))
    except (IndexError, TraceError) as problem:
        sys.exit(f"usage: python -m simulator.traces TRACE ({problem})")
    print(yaml.safe_dump(statistics, sort_keys=False, width=116, default_flow_style=None), end="")
