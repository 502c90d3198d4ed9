"""Interpolated kernels of tables that do not come from the wheel."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from hwmodels.hardware import Device
from hwmodels.kernels.attention import DecodeTimes, LatentDecodeTimes, LatentPrefillTimes, PrefillTimes
from hwmodels.kernels.collective import CollectiveTimes
from hwmodels.kernels.gemm import BatchedGemmTimes, GemmTimes
from hwmodels.kernels.library import Kernels
from hwmodels.kernels.moe import MoeTimes


def fit_kernels(tables: Mapping[str, pd.DataFrame], device: Device) -> Kernels:
    """Kernels of one device from its tables by family; None for families that were not measured."""

    def of(family: str) -> pd.DataFrame | None:
        return tables.get(family)

    gemm, batched, moe = of("gemm"), of("batched_gemm"), of("moe")
    prefill, decode = of("attention_prefill"), of("attention_decode")
    latent_prefill, latent_decode, collective = of("mla_prefill"), of("mla_decode"), of("collective")
    return Kernels(
        gemm=None if gemm is None else GemmTimes.fit(gemm, device),
        batched_gemm=None if batched is None else BatchedGemmTimes.fit(batched, device),
        moe=None if moe is None else MoeTimes.fit(moe, device),
        attention_prefill=None if prefill is None else PrefillTimes.fit(prefill, device),
        attention_decode=None if decode is None else DecodeTimes.fit(decode, device),
        mla_prefill=None if latent_prefill is None else LatentPrefillTimes.fit(latent_prefill, device),
        mla_decode=None if latent_decode is None else LatentDecodeTimes.fit(latent_decode, device),
        collective=None if collective is None else CollectiveTimes.fit(collective, device),
    )
