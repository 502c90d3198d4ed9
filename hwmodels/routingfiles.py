"""Which routing statistics does a recorded file of expert counts or expert choices hold?

JSON (also .gz) or torch files (.pt, read without running code from them), with one of these at the top:

logical_count        [layers, experts] or [steps, layers, experts]: SGLang's recorder in its modes stat and stat_approx;
                     steps of its ring buffer that were never written are all zero and left out
expert_popularity    [layers, experts]: Fiddler's counts (arXiv:2402.07033)
expert_load_window, expert_load   [steps, layers, replicas] or [layers, replicas]: the state of vLLM's load balancer,
                     which has no dump of its own, under its own names; with physical_to_logical_map [layers, replicas]
records              SGLang's modes per_pass and per_token: a list of passes with global_physical_count [layers,
                     replicas] or topk_ids_of_layer [layers, tokens, top_k], -1 for none, and beside it
                     last_physical_to_logical_map; every rank writes its own file: give all of them
routed_experts       [tokens, layers, top_k]: what vLLM and SGLang return with a request when asked to (logical experts)
{layer: {expert: count}}          a dictionary with numbers as keys: vLLM-Ascend's and MindSpeed's token counts
a bare table         [layers, experts]

Layers are all layers of the model, dense ones zero, or the mixture layers only. An expert of a mixture layer that was
never counted is an error unless something is added to every count: recordings that are long enough have none.

Only recordings of choices (topk_ids, routed_experts) tell transitions; all others are aggregates (see
simulator.routingdraws.with_transitions).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.routing import Array, RoutingError, RoutingStats, mixture_of, span
from hwmodels.shape import ModelShape

#: Choices of tokens that are turned into counts at once: bounds memory at 64 MiB for 256 experts.
CHUNK_TOKENS = 32768
#: Keys under which recorders write routing.
RECORDED = (
    *("logical_count", "expert_popularity", "expert_load_window", "expert_load"),
    *("records", "routed_experts"),
)


@dataclass(slots=True)
class _Recording:
    """steps [S, mixture layers, E] counts; joint [mixture layers - 1, E, E] pairs of choices of one token, or None."""

    steps: Array
    joint: Array | None = None


def read_routing(paths: Path | Sequence[Path], model: ModelShape, *, add_count: float = 0.0) -> RoutingStats:
    """The statistics of one file, or of several that are parts of one recording (one for each rank), for `model`.

    add_count   added to every expert's count, for recordings too short to meet every expert

    Raises RoutingError, naming the file and, where there is one, the layer and expert.
    """
    files = [paths] if isinstance(paths, Path) else list(paths)
    source = ", ".join(path.name for path in files)
    return _stats(_recording(files, model), model, add_count, source, ", ".join(map(str, files)))


def is_recording(path: Path) -> bool:
    """Whether the file is a recording of routing under the names that recorders give it, of whatever model."""
    try:
        content = _content(path)
    except RoutingError:
        return False
    return isinstance(content, dict) and any(key in content for key in RECORDED)


def read_windows(path: Path, model: ModelShape, windows: int, *, add_count: float = 0.0) -> list[RoutingStats]:
    """Statistics of `windows` equally long spans of a recording that kept its steps apart, first span first.

    SGLang's ring buffer starts over when it is full: its first rows are then its latest. Raises RoutingError as
    read_routing, and for a file with fewer steps than windows.
    """
    steps = _recording([path], model).steps
    if not 1 <= windows <= len(steps):
        raise RoutingError(f"{path}: {windows} windows of {len(steps)} steps: expected 1 to {len(steps)}")
    parts = np.array_split(steps, windows)
    names = [f"{path.name}, window {i} of {windows}" for i in range(1, windows + 1)]
    return [
        _stats(_Recording(part), model, add_count, name, str(path.parent / name))
        for part, name in zip(parts, names, strict=True)
    ]


def _stats(recording: _Recording, model: ModelShape, add_count: float, source: str, where: str) -> RoutingStats:
    """The statistics, called `source`; what is wrong with them is told of `where`, the files as they were given."""
    layers, experts, top_k = mixture_of(model)
    transitions = None
    loads = recording.steps.sum(axis=0) + add_count
    _require_counts(loads, model, where)
    try:
        if recording.joint is not None and np.all(loads > 0):
            # A count of c more for every expert, spread over all of the next layer: marginals stay those of loads.
            joint = recording.joint + add_count * top_k / experts
            transitions = joint / joint.sum(axis=2, keepdims=True)
        return RoutingStats(model.name, layers, loads, top_k, source, transitions)
    except RoutingError as error:
        raise RoutingError(f"{where}: {error}") from None


def _require_counts(loads: Array, model: ModelShape, where: str) -> None:
    """Raise RoutingError where an expert of a mixture layer was never counted, as a recording that is long enough has
    none such: a count of 0 tells that it was short, not that the expert gets no tokens."""
    layers = mixture_of(model)[0]
    missed = np.argwhere(loads == 0)
    if not len(missed):
        return
    row, expert = (int(i) for i in missed[0])
    if not loads[row].any():
        raise RoutingError(
            f"{where}: layer {layers[row]}: no choice was counted, but it is a mixture layer of {model.name}; "
            "expected counts for every expert; choose the model recorded"
        )
    more = f" ({len(missed) - 1} more such)" if len(missed) > 1 else ""
    raise RoutingError(
        f"{where}: layer {layers[row]}, expert {expert}: count 0{more}: expected a number above 0; record more "
        "traffic, or add something to every count (--add-count 1 of place-experts)"
    )


def _recording(files: Sequence[Path], model: ModelShape) -> _Recording:
    if not files:
        raise RoutingError("no file of routing: expected at least one")
    total: _Recording | None = None
    for path in files:
        try:
            part = _understood(_content(path), model)
        except RoutingError as error:
            raise RoutingError(f"{path}: {error}") from None
        if total is None:
            total = part
            continue
        # Ranks record the same steps; where they do not, the order is lost and only the sum is kept.
        same = total.steps.shape == part.steps.shape
        total.steps = total.steps + part.steps if same else (total.steps.sum(0) + part.steps.sum(0))[None]
        both = total.joint is not None and part.joint is not None
        total.joint = np.asarray(total.joint) + np.asarray(part.joint) if both else None
    assert total is not None
    return total


def _content(path: Path) -> Any:
    """What the file holds, tensors left as they are."""
    if path.is_dir():
        raise RoutingError("is a folder; expected a file of recorded routing, .json, .json.gz or .pt")
    if not path.is_file():
        raise RoutingError("there is no such file")
    if path.suffix in {".pt", ".pth"}:
        try:
            import torch
        except ImportError:
            raise RoutingError("reading it needs torch: install shardwise[profile], or write it as JSON") from None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what its archive, its pickle or its tensors stumble over
            raise RoutingError(f"not a torch file of tensors ({_first_line(error)})") from None
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return json.loads(raw)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RoutingError(f"not JSON ({_first_line(error)}); expected .json, .json.gz or .pt") from None
    except RecursionError:
        raise RoutingError("not JSON of counts (nested too deep); expected a table") from None


def _understood(content: Any, model: ModelShape) -> _Recording:
    if isinstance(content, list):
        return _counted(content, model)
    if not isinstance(content, dict):
        raise RoutingError(f"{type(content).__name__}: expected a table of counts or a dictionary that holds one")
    for key in ("logical_count", "expert_popularity"):
        if key in content:
            return _counted(content[key], model)
    for key in ("expert_load_window", "expert_load"):
        if key in content:
            return _counted(content[key], model, content.get("physical_to_logical_map"))
    if "records" in content:
        return _recorded(content["records"], content.get("last_physical_to_logical_map"), model)
    if "routed_experts" in content:
        ids = _table(content["routed_experts"], "routed_experts", 3)
        return _chosen([ids.swapaxes(0, 1)], None, model)
    if content and all(str(key).isdecimal() and isinstance(row, dict) for key, row in content.items()):
        return _keyed(content, model)
    keys = ", ".join(str(key)[:40] for key in list(content)[:6])
    raise RoutingError(f"keys {keys or 'none'}: expected one of {', '.join(RECORDED)}")


def _counted(values: Any, model: ModelShape, mapping: Any = None) -> _Recording:
    """Counts [layers, experts] or [steps, layers, experts], of replicas where there is a mapping."""
    counts = _table(values, "counts")
    if counts.ndim not in (2, 3):
        raise RoutingError(f"counts of shape {counts.shape}: expected (layers, experts) or (steps, layers, experts)")
    steps = counts if counts.ndim == 3 else counts[None]
    bad = np.argwhere(~np.isfinite(steps) | (steps < 0))
    if len(bad):
        step, layer, expert = (int(i) for i in bad[0])
        where = f"step {step}, " if counts.ndim == 3 else ""
        layers = mixture_of(model)[0]
        named = layers[layer] if steps.shape[1] == len(layers) else layer
        raise RoutingError(
            f"{where}layer {named}, expert {expert}: count {steps[step, layer, expert]:g}: expected a number above 0"
        )
    if counts.ndim == 3:
        steps = steps[steps.any(axis=(1, 2))]
        if not len(steps):
            raise RoutingError("every step is empty: expected a recording with traffic; start it before the requests")
    steps = _mixture_rows(steps, model)
    experts = mixture_of(model)[1]
    if mapping is not None:
        steps = _logical(steps, _mapping(mapping, model), experts)
    if steps.shape[2] != experts:
        raise RoutingError(f"{steps.shape[2]} experts a layer: expected the {experts} of {model.name}")
    return _Recording(steps)


def _mixture_rows(steps: Array, model: ModelShape) -> Array:
    """[S, mixture layers, ...] of rows for all layers or for the mixture layers only."""
    layers = mixture_of(model)[0]
    rows, every = steps.shape[1], len(model.layers)
    if rows == every:
        traffic = np.asarray(steps.reshape(len(steps), rows, -1).any(axis=(0, 2)))
        dense = [layer for layer in range(every) if layer not in layers and traffic[layer]]
        if dense:
            raise RoutingError(
                f"layer {dense[0]}: experts were counted, but it is a dense layer of {model.name}; "
                f"expected zeros outside the mixture layers {span(layers)}; choose the model recorded"
            )
        return steps[:, list(layers)]
    if rows != len(layers):
        kinds = f"its {len(layers)} mixture layers" + ("" if every == len(layers) else f" or all {every} layers")
        raise RoutingError(f"{rows} layers: expected rows for {kinds} of {model.name}; choose the model recorded")
    return steps


def _logical(steps: Array, mapping: NDArray[np.int64], experts: int) -> Array:
    """Counts of replicas summed into those of experts."""
    if steps.shape[1:] != mapping.shape:
        raise RoutingError(f"counts of {steps.shape[1:]} (layers, replicas): expected the {mapping.shape} of their map")
    out = np.zeros((*steps.shape[:2], experts))
    for row, places in enumerate(mapping):
        holds = (places[:, None] == np.arange(experts)).astype(np.float64)
        out[:, row] = steps[:, row] @ holds
    return out


def _mapping(values: Any, model: ModelShape) -> NDArray[np.int64]:
    """[mixture layers, replicas] expert of each replica's slot, -1 for an empty one."""
    layers, experts, _ = mixture_of(model)
    table = _table(values, "physical_to_logical_map", 2)
    if len(table) == len(model.layers):
        table = table[list(layers)]
    if len(table) != len(layers):
        raise RoutingError(f"physical_to_logical_map of {len(table)} layers: expected {len(layers)}")
    bad = np.argwhere((table < -1) | (table >= experts) | (table != np.floor(table)))
    if len(bad):
        row, slot = (int(i) for i in bad[0])
        raise RoutingError(
            f"layer {layers[row]}, replica {slot}: expert {table[row, slot]:g}: expected 0 to {experts - 1}"
        )
    return table.astype(np.int64)


def _recorded(records: Any, mapping: Any, model: ModelShape) -> _Recording:
    """SGLang's detailed modes: counts of replicas, or choices of tokens, pass by pass."""
    passes = [entry for entry in records if isinstance(entry, dict)] if isinstance(records, list) else []
    if not passes or len(passes) != len(records):
        raise RoutingError("records: expected a list of at least one forward pass")
    places = None if mapping is None else _mapping(mapping, model)
    if "topk_ids_of_layer" in passes[0]:
        ids = (_table(entry.get("topk_ids_of_layer", []), "topk_ids_of_layer", 3) for entry in passes)
        return _chosen(ids, places, model)
    counts = [_table(entry.get("global_physical_count", []), "global_physical_count", 2) for entry in passes]
    if len({count.shape for count in counts}) > 1:
        raise RoutingError("global_physical_count changes its shape between passes: expected one model's")
    return _counted(np.stack(counts), model, places)


def _chosen(batches: Iterable[Array], mapping: NDArray[np.int64] | None, model: ModelShape) -> _Recording:
    """Counts and pairs of choices of tokens' choices [layers, tokens, top_k] in each batch."""
    layers, experts, _ = mixture_of(model)
    places = np.tile(np.arange(experts), (len(layers), 1)) if mapping is None else mapping
    joint = np.zeros((len(layers) - 1, experts, experts))
    steps = []
    for batch in batches:
        # A token's experts differ: equal ids are a row never written (zeros or -1 in a dense layer).
        unwritten = (batch == batch[..., :1]).all(axis=2, keepdims=True) & (batch.shape[2] > 1)
        ids = np.where(unwritten, -1, np.where(batch == np.floor(batch), batch, -2))
        rows = _mixture_rows(ids[None] + 1, model)[0] - 1  # empty choices are -1: zeros of a dense layer
        counts = np.zeros((len(layers), experts))
        for start in range(0, rows.shape[1], CHUNK_TOKENS):
            before: NDArray[np.float32] | None = None
            for row, layer in enumerate(layers):
                picks = _picks(rows[row, start : start + CHUNK_TOKENS], places[row], experts, layer)
                counts[row] += picks.sum(axis=0, dtype=np.float64)
                if before is not None:
                    joint[row - 1] += before.T @ picks
                before = picks
        steps.append(counts)
    if not steps:
        raise RoutingError("no tokens: expected a recording with traffic")
    return _Recording(np.stack(steps), joint)


def _picks(ids: Array, places: NDArray[np.int64], experts: int, layer: int) -> NDArray[np.float32]:
    """[tokens, E] 1 where the token picked the expert."""
    bad = (ids < -1) | (ids >= len(places))
    if bad.any():
        raise RoutingError(f"layer {layer}: choice {ids[bad][0]:g}: expected an expert 0 to {len(places) - 1}")
    picks = np.zeros((len(ids), experts), dtype=np.float32)
    token, choice = np.nonzero(ids >= 0)
    picks[token, places[ids[token, choice].astype(np.int64)]] = 1
    return picks


def _keyed(content: dict[str, dict[str, Any]], model: ModelShape) -> _Recording:
    """{layer: {expert: count}}; layers left out are dense, experts left out were never picked."""
    layers, experts, _ = mixture_of(model)
    numbers = sorted(int(key) for key in content)
    every = any(number not in layers for number in numbers) or set(layers) <= set(numbers)
    first = numbers[0]
    if numbers == list(range(first, first + len(layers))) and not set(layers) <= set(numbers):
        every = False  # mixture layers numbered among themselves
    size = len(model.layers) if every else len(layers)
    table = np.zeros((size, experts))
    for key, row in content.items():
        layer = int(key) - (0 if every else first)
        if not 0 <= layer < size:
            raise RoutingError(f"layer {key}: expected 0 to {size - 1} of {model.name}")
        for expert, count in row.items():
            if not str(expert).isdecimal() or not int(expert) < experts:
                raise RoutingError(f"layer {key}, expert {expert}: expected an expert 0 to {experts - 1}")
            if isinstance(count, bool) or not isinstance(count, int | float):
                raise RoutingError(f"layer {key}, expert {expert}: count {count!r}: expected a number above 0")
            table[layer, int(expert)] = count
    return _counted(table, model)


def _table(values: Any, what: str, dimensions: int | None = None) -> Array:
    """Numbers as float64, of lists or of a tensor; the first that is none is named by its place."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError):
        array = np.empty((), dtype=object)
    if array.dtype.kind not in "iuf" or not array.size:
        raise RoutingError(f"{what}: {_fault(values)}")
    if dimensions is not None and array.ndim != dimensions:
        raise RoutingError(f"{what} of shape {array.shape}: expected {dimensions} dimensions")
    return array.astype(np.float64)


def _fault(values: Any) -> str:
    """What keeps nested lists from being a table of numbers."""
    if not isinstance(values, list) or not values or not all(isinstance(row, list) and row for row in values):
        return "expected a full table of numbers, one row of experts for each layer"
    for layer, row in enumerate(values):
        if len(row) != len(values[0]):
            return f"layer {layer}: {len(row)} entries: expected {len(values[0])} as in layer 0"
        for expert, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, int | float | list):
                return f"layer {layer}, expert {expert}: {value!r}: expected a number"
    return "expected a full table of numbers, every row as long as the others"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
