"""InferenceX results (SemiAnalysis; formerly InferenceMAX): one closed-loop point per row, as its files write it.

Names of columns are those of utils/process_result.py (agg_*.json) and of the dashboard's database, flattened; a table
that names one thing twice is read by the first name below. Times are in seconds where the name says nothing (the
writers of those files divide by 1000) and in milliseconds where it ends in `_ms`; interactivity (`intvty`) is
1 / TPOT. Throughputs are per GPU: times the devices they are those of the deployment.

tp, ep, dp_attention   tp is the number of devices of a replica. With dp_attention each is an attention group of its
    own; ep of them, or all where ep is 1 and dp_attention is set with vLLM, hold whole experts.

Means are taken where there are some, else medians (the label `statistic` says which); nothing else is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from planner.validation.case import Case, Layout
from planner.validation.layouts.names import backend_named, model_named
from planner.validation.layouts.rows import Row, Unmappable, each_row, number, position, required, text, whole
from planner.validation.layouts.served import Point, Ranks, has_experts, served

#: Other names of each column, the first that is there counts.
NAMES: Mapping[str, tuple[str, ...]] = {
    "hw": ("hw", "hardware", "gpu", "system", "runner_type"),
    "model": ("model", "model_id", "infmax_model_prefix", "model_prefix"),
    "framework": ("framework", "backend", "engine"),
    "precision": ("precision", "quant"),
    "isl": ("isl", "input_len", "random_input_len"),
    "osl": ("osl", "output_len", "random_output_len"),
    "conc": ("conc", "concurrency", "max_concurrency"),
    "tp": ("tp", "decode_tp", "tp_size"),
    "ep": ("ep", "decode_ep", "ep_size"),
    "dp_attention": ("dp_attention", "dp_attn", "decode_dp_attention", "dpa"),
    "version": ("version", "framework_version", "image"),
    "disagg": ("disagg", "disaggregated"),
    "spec": ("spec_decoding", "spec_method", "mtp"),
}
#: What a file must name to have this layout, whatever it calls it, beside one of METRICS.
COLUMNS = frozenset({"hw", "model", "framework", "precision", "isl", "osl", "conc", "tp"})

#: (column, metric, scale, exponent): metric = scale * value ** exponent.
_TIMES = (("ttft", "ttft", 1.0), ("tpot", "tpot", 1.0), ("intvty", "tpot", -1.0), ("e2el", "e2e", 1.0))
_RATES = ("output_tput_per_gpu", "output_tokens_per_s_per_gpu", "output_throughput_per_gpu")
METRICS = frozenset(
    {*_RATES, *(f"{kind}_{name}{unit}" for kind in ("mean", "median") for name, _, _ in _TIMES for unit in ("", "_ms"))}
)


def accepts(columns: frozenset[str]) -> bool:
    """Whether a file with these columns has this layout."""
    plain = {_plain(column) for column in columns}
    return all(plain & set(NAMES[key]) for key in COLUMNS) and bool(plain & METRICS)


def read(frame: pd.DataFrame, path: Path) -> Layout:
    """All rows of the file; what is nested (`metrics.mean_ttft`) counts as a column."""
    frame = frame.rename(columns=_plain)
    frame = frame.loc[:, ~frame.columns.duplicated()]
    return each_row(frame, position(path), labels, case)


def labels(row: Row) -> dict[str, str]:
    """What the row calls itself."""
    keys = {"system": "hw", "backend": "framework", "version": "version", "model": "model", "precision": "precision"}
    found = {label: _cell(row, key) for label, key in keys.items()}
    found["version"] = found["version"].rsplit(":", 1)[-1]
    mode = "disagg" if _flag(row, "disagg") else "agg"
    return {
        **found,
        "mode": mode,
        "isl": _cell(row, "isl"),
        "osl": _cell(row, "osl"),
        "concurrency": _cell(row, "conc"),
    }


def case(identity: str, row: Row) -> Case:
    """The case of an aggregated row without speculative decoding."""
    if _flag(row, "disagg"):
        raise Unmappable("disaggregated pools are not simulated yet")
    if _cell(row, "spec").lower() not in {"", "none", "off", "false", "0"}:
        raise Unmappable("speculative decoding is not modelled")
    known = labels(row)
    model = model_named(known["model"])
    backend = backend_named(known["backend"])
    assert model.profile is not None
    ranks = _ranks(row, has_experts(model.profile), backend)
    point = Point(
        model=known["model"],
        system=known["system"],
        backend=backend,
        precision=known["precision"],
        version=known["version"],
        isl=required(row, _named(row, "isl")),
        osl=required(row, _named(row, "osl")),
        concurrency=required(row, _named(row, "conc")),
        ranks=ranks,
    )
    metrics, statistic = _measured(row, ranks.tp * ranks.attention_dp)
    return served(identity, point, metrics, {**known, "statistic": statistic})


def _ranks(row: Row, moe: bool, backend: str) -> Ranks:
    tp, ep = required(row, _named(row, "tp")), whole(row, _named(row, "ep")) or 1
    grouped = _flag(row, "dp_attention")
    if not moe:
        if grouped:
            raise Unmappable("attention groups of a dense model")
        return Ranks(tp)
    if grouped and ep == 1 and backend == "vllm":
        ep = tp
    if tp % ep:
        raise Unmappable("the ranks of attention and of the experts do not agree")
    return Ranks(1, 1, tp, ep, tp // ep) if grouped else Ranks(tp, 1, 1, ep, tp // ep)


def _measured(row: Row, gpus: int) -> tuple[dict[str, float], str]:
    """Metrics, and whether their latencies are means, medians or both."""
    found: dict[str, float] = {}
    statistics = []
    for kind in ("mean", "median"):
        for name, metric, exponent in _TIMES:
            for unit, scale in (("", 1.0), ("_ms", 1e-3)):
                value = number(row, f"{kind}_{name}{unit}")
                if value is None or metric in found or (unit and exponent < 0):
                    continue
                if value <= 0:
                    raise Unmappable(f"{kind}_{name}{unit} is not positive")
                found[metric] = (value * scale) ** exponent
                statistics.append(kind)
    for column in _RATES:
        value = number(row, column)
        if value is not None and value > 0:
            found.setdefault("throughput", value * gpus)
    if not found:
        raise Unmappable("no measured metric")
    return found, " and ".join(dict.fromkeys(statistics)) or "mean"


def _named(row: Row, key: str) -> str:
    """The column that says `key` in this row: the first of its names with a value, else the first there is."""
    present = [name for name in NAMES[key] if name in row]
    return next((name for name in present if text(row, name)), present[0] if present else key)


def _cell(row: Row, key: str) -> str:
    return text(row, _named(row, key))


def _flag(row: Row, key: str) -> bool:
    return _cell(row, key).lower() in {"true", "1", "1.0", "yes"}


def _plain(column: str) -> str:
    """A column's name in lower case, without the name of what it was nested in."""
    return column.rsplit(".", 1)[-1].strip().lower().replace(" ", "_")
