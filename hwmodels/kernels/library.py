"""Which measured kernels price an engine's steps on a device: one interpolated table per operator family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.errors import MeasurementError
from hwmodels.hardware import Device
from hwmodels.kernels.aiconfigurator import Wheel, open_wheel
from hwmodels.kernels.attention import DecodeTimes, LatentDecodeTimes, LatentPrefillTimes, PrefillTimes
from hwmodels.kernels.cache import cached, fingerprint
from hwmodels.kernels.collective import CollectiveTimes
from hwmodels.kernels.exchange import ExchangeTimes
from hwmodels.kernels.gemm import BatchedGemmTimes, GemmTimes
from hwmodels.kernels.moe import MoeTimes
from hwmodels.kernels.moe_sound import sound
from hwmodels.kernels.table import beyond_peak

#: Whose kernels stand in where an engine's own were not timed, by engine: the families were timed with different care.
STAND_INS = {
    "vllm": ("vllm", "sglang", "tensorrt-llm"),
    "sglang": ("sglang", "vllm", "tensorrt-llm"),
    "tensorrt-llm": ("tensorrt-llm", "sglang", "vllm"),
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """Interpolated tables of one device; None for a family that was not measured on it."""

    gemm: GemmTimes | None
    batched_gemm: BatchedGemmTimes | None
    moe: MoeTimes | None
    attention_prefill: PrefillTimes | None
    attention_decode: DecodeTimes | None
    mla_prefill: LatentPrefillTimes | None
    mla_decode: LatentDecodeTimes | None
    collective: CollectiveTimes | None
    expert_exchange: ExchangeTimes | None = None


class _Model(Protocol):
    @classmethod
    def fit(cls, rows: pd.DataFrame, device: Device) -> Self: ...

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], device: Device) -> Self: ...

    def arrays(self) -> dict[str, NDArray[Any]]: ...


M = TypeVar("M", bound=_Model)


def open_kernels(device: Device, choice: Mapping[str, str], wheel: Wheel | None = None) -> Kernels:
    """Kernels on the device, from the installed wheel by default.

    choice   whose: 'default', and families ('moe') or formats of a family ('gemm fp4') that are taken from another
             framework ('vllm', 'sglang', 'tensorrt-llm')

    Raises MeasurementError where the wheel is missing or has nothing of the device.
    """
    wheel = open_wheel() if wheel is None else wheel
    if device.name not in wheel.devices():
        raise MeasurementError(
            f"measured kernels of {device.name}: expected one of {', '.join(wheel.devices())}; "
            "plan with --cost calibrated, on a hardware file that 'shardwise calibrate' fits to a profile of the device"
        )

    def load(kind: type[M], family: str) -> M | None:
        whose = _frameworks(wheel, device.name, choice, family)
        names = set(whose.values())
        if family == "moe":
            names |= set(STAND_INS)
        if family == "collective":
            names.add("nccl")
        files = [path for name in sorted(names) for path in wheel.files(device.name, name, family)]
        if not files:
            return None
        key = fingerprint(files, family, repr(sorted(whose.items())), repr(device))
        build = partial(_fitted, kind, wheel, device, choice, family)
        return kind.from_arrays(cached(key, build), device)

    return Kernels(
        gemm=load(GemmTimes, "gemm"),
        batched_gemm=load(BatchedGemmTimes, "batched_gemm"),
        moe=load(MoeTimes, "moe"),
        attention_prefill=load(PrefillTimes, "attention_prefill"),
        attention_decode=load(DecodeTimes, "attention_decode"),
        mla_prefill=load(LatentPrefillTimes, "mla_prefill"),
        mla_decode=load(LatentDecodeTimes, "mla_decode"),
        collective=load(CollectiveTimes, "collective"),
        expert_exchange=load(ExchangeTimes, "expert_exchange"),
    )


def _fitted(
    kind: type[M], wheel: Wheel, device: Device, choice: Mapping[str, str], family: str
) -> dict[str, NDArray[Any]]:
    return kind.fit(measured_rows(wheel, device, choice, family), device).arrays()


def _frameworks(wheel: Wheel, device: str, choice: Mapping[str, str], family: str) -> dict[str, str]:
    """By format ('' for all others), the framework whose timings of the family are taken: the chosen, or a stand-in."""
    words = {"": choice.get(family, choice["default"])}
    words |= {key.split()[1]: name for key, name in choice.items() if key.startswith(f"{family} ")}
    found = {}
    for dtype, name in words.items():
        able = [other for other in STAND_INS[name] if wheel.files(device, other, family)]
        if able:
            found[dtype] = able[0]
    return found


def measured_rows(wheel: Wheel, device: Device, choice: Mapping[str, str], family: str) -> pd.DataFrame:
    """Rows of the chosen frameworks (for collectives NCCL's too) that the device's peaks allow.

    Formats of experts of which a framework has doubtful timings only (hwmodels.kernels.moe_sound) are a stand-in's.
    """
    whose = _frameworks(wheel, device.name, choice, family)
    frames = []
    for dtype, name in whose.items():
        rows = wheel.read(device.name, name, family)
        if (name, family) == ("tensorrt-llm", "gemm"):
            rows = without_scaling(rows, wheel.read(device.name, name, "quantize"))
        if family == "moe":
            rows = _sound(wheel, device, name, rows)
        frames.append(rows[rows["dtype"] == dtype] if dtype else rows[~rows["dtype"].isin(list(whose))])
    if family == "collective":
        frames.append(wheel.read(device.name, "nccl", family))
    rows = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    kept: pd.DataFrame = rows[~beyond_peak(rows, family, device)].reset_index(drop=True)
    return kept


def _sound(wheel: Wheel, device: Device, engine: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The engine's timings of experts without the doubtful ones; what formats lose by that all, a stand-in's."""
    frames = [sound(rows, device)]
    lost = set(rows["dtype"]) - set(frames[0]["dtype"])
    for other in STAND_INS[engine][1:]:
        if lost:
            theirs = sound(wheel.read(device.name, other, "moe"), device)
            frames.append(theirs[theirs["dtype"].isin(list(lost))])
            lost -= set(theirs["dtype"])
    return pd.concat(frames, ignore_index=True)


def without_scaling(products: pd.DataFrame, quantize: pd.DataFrame) -> pd.DataFrame:
    """TensorRT-LLM's fp8 products without the search for the activations' largest value that was timed with them.

    Checkpoints quantised for it bring static scales. On an H200 a product of 8192 x 8192 weights takes 30 us at one
    row, 7 of them for this; vLLM's, timed with static scales, takes 22.
    """
    scales = quantize[quantize["kind"] == "scale"].groupby(["m", "k"])["seconds"].median()
    keys = pd.MultiIndex.from_frame(products[["m", "k"]])
    extra = scales.reindex(keys).fillna(0.0).to_numpy() * (products["dtype"] == "fp8").to_numpy()
    seconds = np.maximum(products["seconds"].to_numpy() - extra, 0.5 * products["seconds"].to_numpy())
    return products.assign(seconds=seconds)
