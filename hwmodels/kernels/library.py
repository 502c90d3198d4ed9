"""Which measured kernels price an engine's steps on a device: one interpolated table per operator family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import pandas as pd
from numpy.typing import NDArray

from hwmodels.errors import MeasurementError
from hwmodels.hardware import Device
from hwmodels.kernels.aiconfigurator import Wheel, open_wheel
from hwmodels.kernels.attention import DecodeTimes, LatentDecodeTimes, LatentPrefillTimes, PrefillTimes
from hwmodels.kernels.cache import cached, fingerprint
from hwmodels.kernels.collective import CollectiveTimes
from hwmodels.kernels.gemm import BatchedGemmTimes, GemmTimes
from hwmodels.kernels.moe import MoeTimes
from hwmodels.kernels.table import beyond_peak

#: Whose kernels stand in where an engine's own were not timed, by engine: the families were timed with different care.
STAND_INS = {
    "vllm": ("vllm", "sglang", "tensorrt-llm"),
    "sglang": ("sglang", "vllm", "tensorrt-llm"),
    "tensorrt-llm": ("tensorrt-llm", "sglang", "vllm"),
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """Interpolated tables of one device; None for a family that was not measured on it.

    sources   by family, whose kernels these are
    """

    gemm: GemmTimes | None
    batched_gemm: BatchedGemmTimes | None
    moe: MoeTimes | None
    attention_prefill: PrefillTimes | None
    attention_decode: DecodeTimes | None
    mla_prefill: LatentPrefillTimes | None
    mla_decode: LatentDecodeTimes | None
    collective: CollectiveTimes | None
    sources: Mapping[str, str]


class _Model(Protocol):
    @classmethod
    def fit(cls, rows: pd.DataFrame, device: Device) -> Self: ...

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], device: Device) -> Self: ...

    def arrays(self) -> dict[str, NDArray[Any]]: ...


M = TypeVar("M", bound=_Model)


def open_kernels(device: Device, engine: str, wheel: Wheel | None = None) -> Kernels:
    """Kernels of `engine` ('vllm', 'sglang', 'tensorrt-llm') on the device, from the installed wheel by default.

    Raises MeasurementError where the wheel is missing or has nothing of the device.
    """
    wheel = open_wheel() if wheel is None else wheel
    if device.name not in wheel.devices():
        raise MeasurementError(
            f"measured kernels of {device.name}: expected one of {', '.join(wheel.devices())}; "
            "plan with --cost calibrated, or profile the device with 'shardwise profile'"
        )
    sources: dict[str, str] = {}

    def load(kind: type[M], family: str) -> M | None:
        for name in STAND_INS[engine]:
            files = wheel.files(device.name, name, family)
            if family == "collective":
                files = [*files, *wheel.files(device.name, "nccl", family)]
            if files:
                sources[family] = name
                key = fingerprint(files, device.name, name, family, repr(device))
                return kind.from_arrays(cached(key, _build(kind, wheel, device, name, family)), device)
        return None

    return Kernels(
        gemm=load(GemmTimes, "gemm"),
        batched_gemm=load(BatchedGemmTimes, "batched_gemm"),
        moe=load(MoeTimes, "moe"),
        attention_prefill=load(PrefillTimes, "attention_prefill"),
        attention_decode=load(DecodeTimes, "attention_decode"),
        mla_prefill=load(LatentPrefillTimes, "mla_prefill"),
        mla_decode=load(LatentDecodeTimes, "mla_decode"),
        collective=load(CollectiveTimes, "collective"),
        sources=sources,
    )


def _build(
    kind: type[M], wheel: Wheel, device: Device, engine: str, family: str
) -> Callable[[], dict[str, NDArray[Any]]]:
    def build() -> dict[str, NDArray[Any]]:
        return kind.fit(measured_rows(wheel, device, engine, family), device).arrays()

    return build


def measured_rows(wheel: Wheel, device: Device, engine: str, family: str) -> pd.DataFrame:
    """The wheel's rows of one engine (for collectives NCCL's too) that the device's peaks allow."""
    frames = [wheel.read(device.name, engine, family)]
    if family == "collective":
        frames.append(wheel.read(device.name, "nccl", family))
    rows = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    kept: pd.DataFrame = rows[~beyond_peak(rows, family, device)].reset_index(drop=True)
    return kept
