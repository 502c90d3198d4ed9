"""What profile does a measured device start from: its own, another's, or what its best kernels show?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from hwmodels.calibration.forms import arithmetic_of
from hwmodels.efficiency import Efficiency
from hwmodels.errors import MeasurementError
from hwmodels.hardware import DEVICES, Device, device_names, load_device
from hwmodels.kernels.table import FAMILIES, checked_against
from hwmodels.yamlfiles import named, read_mapping

#: Peaks of a device nobody knows: the best measured rate over the share of the peak that good kernels reach (estimate).
REACHED = 0.9


def started_from(
    tables: Mapping[str, pd.DataFrame], where: Path, like: str | None
) -> tuple[Device, Mapping[str, pd.DataFrame], str]:
    """(device, tables, text of the profile) of tables of one device that are at `where`.

    like   profile whose datasheet figures hold for the device; None: its own, or, where none is shipped, estimates:
           peaks from the best measured rates, the rest from about.yaml

    Raises MeasurementError for rows of several devices and for rows beyond the peaks.
    """
    names = sorted({str(name) for table in tables.values() for name in table["device"].unique()})
    if len(names) != 1:
        raise MeasurementError(f"{where}: rows of {', '.join(names) or 'no device'}; expected one device per folder")
    (name,) = names
    if like is None and name in device_names():
        like = name
    if like is not None:
        text = named("device", like, DEVICES).read_text(encoding="utf-8")
        device = replace(load_device(like), name=name)
        if like != name:
            # Coefficients of another device are no evidence of this one.
            device = replace(device, efficiency=_estimates(device.efficiency), calibration={})
    else:
        text = _estimated(name, tables, where)
        device = _loaded(text)
    tables = {f: checked_against(table, f, device, f"{where / f}.parquet") for f, table in tables.items()}
    return device, tables, text


def _estimates(efficiency: Efficiency) -> Efficiency:
    """Without fitted coefficients."""
    e = efficiency
    return Efficiency(e.gemm_mfu, e.attention_mfu, e.memory_mbu, e.memory_half_bytes, e.gemm_tile)


def _loaded(text: str) -> Device:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "device.yaml"
        path.write_text(text, encoding="utf-8")
        return load_device(str(path))


def best_rates(tables: Mapping[str, pd.DataFrame]) -> tuple[dict[str, float], float]:
    """(FLOP/s by format of the arithmetic, bytes/s) of the best kernels of the tables."""
    flops_per_s: dict[str, float] = {}
    bytes_per_s = 0.0
    for family, table in tables.items():
        seconds = table["seconds"].to_numpy(float)
        floor = FAMILIES[family].floor
        if floor is not None and len(table):
            flops, nbytes, formats = floor(table)
            arithmetic = formats.map(lambda kind: arithmetic_of(kind) if kind in ("int4", "mxfp4") else kind)
            for kind, rate in pd.Series(flops / seconds).groupby(arithmetic.to_numpy()).max().items():
                flops_per_s[str(kind)] = max(flops_per_s.get(str(kind), 0.0), float(rate))
            large = nbytes > np.quantile(nbytes, 0.9)
            if large.any():
                bytes_per_s = max(bytes_per_s, float((nbytes / seconds)[large].max()))
        elif family in {"elementwise", "copy"} and len(table):
            moved = table["bytes"].to_numpy(float)
            inside = table["kind"].eq("d2d").to_numpy(bool) if "kind" in table else np.ones(len(table), dtype=bool)
            large = inside & (moved > np.quantile(moved, 0.9))
            if large.any():
                bytes_per_s = max(bytes_per_s, float((moved / seconds)[large].max()))
    return {kind: rate for kind, rate in flops_per_s.items() if rate > 0}, bytes_per_s


def _estimated(name: str, tables: Mapping[str, pd.DataFrame], where: Path) -> str:
    """The profile of a device of which only these tables are known."""
    flops_per_s, bytes_per_s = best_rates(tables)
    if not flops_per_s or not bytes_per_s:
        raise MeasurementError(
            f"{where}: {name} has no profile, and {', '.join(tables)} do not show its peaks; measure gemm too, or name "
            "a profile with its datasheet figures: --like h200-sxm"
        )
    if not {"bf16", "fp16"} & set(flops_per_s):
        flops_per_s["bf16"] = max(flops_per_s.values())
    path = where / "about.yaml"
    about: dict[str, Any] = read_mapping(path) if path.is_file() else {}
    cpu = about.get("kind") == "cpu"
    power_w = float((about.get("clocks") or {}).get("power_limit_w") or (350.0 if cpu else 400.0))
    quickest_s = min(float(table["seconds"].min()) for table in tables.values() if len(table))
    facts: dict[str, Any] = {
        "name": name,
        "vendor": "unknown",
        "kind": "cpu" if cpu else "gpu",
        "source": f"{about.get('reported_name', name)}, not a datasheet: peaks are the best measured rates over "
        f"{REACHED}; memory as the device reports it where it was asked; launch time of the quickest kernel at most; "
        "power, links and everything else are estimates",
        "cluster": "xeon-server" if cpu else "pcie5-node",
        "peak_tflops": {kind: _short(rate / REACHED / 1e12) for kind, rate in flops_per_s.items()},
        "memory_gib": _short(float(about.get("memory_bytes", 16 * 2**30)) / 2**30),
        "memory_gb_per_s": _short(bytes_per_s / REACHED / 1e9),
        "compute_units": int(about.get("threads") or about.get("multiprocessors") or 100),
        "kernel_launch_us": _short(min(quickest_s, 5e-6 if cpu else 2.5e-6) * 1e6),
        "tdp_w": power_w,
        "idle_w": power_w / 8,
    }
    if cpu:
        facts["efficiency"] = {"gemm_tile": [32, 32]}
    return yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=118)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
