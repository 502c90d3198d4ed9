"""How are efficiencies and calibrations written in a device profile? Schemas in human units, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from hwmodels.efficiency import (
    CALIBRATED,
    Calibration,
    DecodeCoefficients,
    Efficiency,
    ExpertCoefficients,
    GemmCoefficients,
    KernelCoefficients,
    PrefillCoefficients,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=True)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
#: Ending in a file, ending in SI, and the factor between them.
UNITS = (("_us", "_s", 1e-6), ("_gb_per_s", "_bytes_per_s", 1e9), ("_t_per_s", "_per_s", 1e12))
#: Digits kept of a fitted coefficient; it is not known better.
DIGITS = 4


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _GemmFile(_File):
    start_us: Positive
    mfu: Fraction
    mbu: Fraction
    feed_gb_per_s: Positive
    wave_us: NotNegative
    split_us: NotNegative
    cast_mbu: Positive = 1.0


class _PrefillFile(_File):
    start_us: Positive
    mfu: Fraction
    mbu: Fraction
    softmax_t_per_s: Positive
    masked_tokens: NotNegative
    block_us: NotNegative


class _DecodeFile(_File):
    start_us: Positive
    mbu: Fraction
    mfu: Fraction
    head_us: NotNegative
    chain_us: NotNegative


class _ExpertFile(_File):
    start_us: Positive
    mfu: Fraction
    mbu: Fraction
    padding_rows: NotNegative
    activation_mbu: Positive
    route_us: NotNegative


class _KernelsFile(_File):
    gemm: dict[Text, _GemmFile] = {}
    attention_prefill: dict[Text, _PrefillFile] = {}
    attention_decode: dict[Text, _DecodeFile] = {}
    mla_prefill: dict[Text, _PrefillFile] = {}
    mla_decode: dict[Text, _DecodeFile] = {}
    moe: dict[Text, _ExpertFile] = {}

    def kernels(self) -> KernelCoefficients:
        """In SI."""
        return KernelCoefficients(
            gemm={name: GemmCoefficients(**in_si(c.model_dump())) for name, c in self.gemm.items()},
            attention_prefill=_all(PrefillCoefficients, self.attention_prefill),
            attention_decode=_all(DecodeCoefficients, self.attention_decode),
            mla_prefill=_all(PrefillCoefficients, self.mla_prefill),
            mla_decode=_all(DecodeCoefficients, self.mla_decode),
            moe=_all(ExpertCoefficients, self.moe),
        )


class EfficiencyFile(_File):
    """The block `efficiency` of a device profile."""

    gemm_mfu: Fraction = Efficiency().gemm_mfu
    attention_mfu: Fraction = Efficiency().attention_mfu
    memory_mbu: Fraction = Efficiency().memory_mbu
    memory_half_mb: Positive = Efficiency().memory_half_bytes / 1e6
    gemm_tile: tuple[Annotated[int, Field(gt=0, strict=True)], Annotated[int, Field(gt=0, strict=True)]] = (
        Efficiency().gemm_tile
    )
    kernels: _KernelsFile = _KernelsFile()
    engines: dict[Text, _KernelsFile] = {}

    def efficiency(self) -> Efficiency:
        """In SI."""
        return Efficiency(
            gemm_mfu=self.gemm_mfu,
            attention_mfu=self.attention_mfu,
            memory_mbu=self.memory_mbu,
            memory_half_bytes=self.memory_half_mb * 1e6,
            gemm_tile=self.gemm_tile,
            kernels=self.kernels.kernels(),
            engines={name: kernels.kernels() for name, kernels in self.engines.items()},
        )


class CalibrationFile(_File):
    """One family of the block `calibration` of a device profile."""

    timings: Annotated[int, Field(gt=0, strict=True)]
    held_out_median_ape: NotNegative
    held_out_p90_ape: NotNegative
    by_engine: dict[Text, tuple[NotNegative, NotNegative]] = {}
    left_out: dict[Text, Annotated[int, Field(ge=0, strict=True)]] = {}
    software: Text
    source: Text

    def calibration(self) -> Calibration:
        """As hwmodels.hardware keeps it."""
        return Calibration(**self.model_dump())


def in_si(human: Mapping[str, float]) -> dict[str, float]:
    """Names and values in SI.

    >>> in_si({"start_us": 2.0, "mfu": 0.8, "feed_gb_per_s": 200.0})
    {'start_s': 2e-06, 'mfu': 0.8, 'feed_bytes_per_s': 200000000000.0}
    """
    found = {}
    for name, value in human.items():
        for ending, si, factor in UNITS:
            if name.endswith(ending):
                name, value = name.removesuffix(ending) + si, value * factor
                break
        found[name] = value
    return found


def in_human(coefficients: Any) -> dict[str, float]:
    """Names and values as files have them, rounded to DIGITS; those at their defaults are left out.

    >>> in_human(DecodeCoefficients(1.23456e-6, 0.9, 0.5, 0.0, 2e-6))
    {'start_us': 1.235, 'mbu': 0.9, 'mfu': 0.5, 'head_us': 0.0, 'chain_us': 2.0}
    """
    found = {}
    for part in fields(coefficients):
        name, value = part.name, float(getattr(coefficients, part.name))
        if value == part.default:
            continue
        for ending, si, factor in sorted(UNITS, key=lambda unit: -len(unit[1])):
            if name.endswith(si):
                name, value = name.removesuffix(si) + ending, value / factor
                break
        found[name] = float(f"{value:.{DIGITS}g}")
    return found


def kernels_block(kernels: KernelCoefficients) -> dict[str, dict[str, dict[str, float]]]:
    """The block `kernels` (or one of `engines`), without empty families."""
    blocks = {name: {f: in_human(c) for f, c in getattr(kernels, name).items()} for name in CALIBRATED}
    return {name: block for name, block in blocks.items() if block}


def calibration_block(calibration: Mapping[str, Calibration]) -> dict[str, dict[str, Any]]:
    """The block `calibration`."""
    return {
        family: {
            "timings": c.timings,
            "held_out_median_ape": round(c.held_out_median_ape, 4),
            "held_out_p90_ape": round(c.held_out_p90_ape, 4),
            "by_engine": {engine: [round(x, 4) for x in pair] for engine, pair in c.by_engine.items()},
            "left_out": dict(c.left_out),
            "software": c.software,
            "source": c.source,
        }
        for family, c in calibration.items()
    }


def yaml_text(content: Mapping[str, Any]) -> str:
    """A block of a profile as YAML: mappings of plain values on one line, the others opened."""
    return yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118)


class _Dumper(yaml.SafeDumper):
    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        node = super().represent_mapping(tag, mapping, flow_style)
        node.flow_style = bool(mapping) and all(isinstance(value, (int, float)) for value in mapping.values())
        return node

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _all(kind: Any, files: Mapping[str, _File]) -> dict[str, Any]:
    return {name: kind(**in_si(file.model_dump())) for name, file in files.items()}
