"""Kernel timings of the `aiconfigurator-core` wheel (NVIDIA, Apache-2.0), read as data: none of its code runs.

Layout: systems/data/<system>/<group>/<framework>/<version>/<name>_perf.parquet, times in milliseconds (DeepEP's in
microseconds), NCCL's message_size in elements of nccl_dtype. Its `step` is the tokens already cached: for decode
kernels the context is step + 1.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hwmodels.errors import MeasurementError
from hwmodels.kernels.table import FAMILIES

DISTRIBUTION = "aiconfigurator-core"
#: Device profile of every system of the wheel that has one.
SYSTEMS = {
    "a100_sxm": "a100-80-sxm",
    "b200_sxm": "b200-sxm",
    "b300_sxm": "b300-sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "h100_sxm": "h100-sxm",
    "h200_sxm": "h200-sxm",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx-pro-6000",
}
FRAMEWORKS = {"vllm": "vllm", "sglang": "sglang", "tensorrt-llm": "trtllm", "nccl": "nccl"}
DTYPES = {
    "bfloat16": "bf16",
    "half": "fp16",
    "float16": "fp16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "fp4",
    "int8": "int8",
    "int8_wo": "int8",
    "int4_wo": "int4",
    "w4a16_mxfp4": "mxfp4",
    "w4a8_mxfp4_mxfp8": "mxfp4_fp8",
    "w4afp8": "int4_fp8",
}
#: Width of DeepSeek's heads: the part without position, and the latent (arXiv:2412.19437, section 4.2).
NOPE, LATENT = 128, 512
#: Expert blocks without a gate, (hidden, intermediate, experts, top_k): the Nemotron-H family. The tables do not say so
#: but in TensorRT-LLM's kernel_source, which has 'nongated' for these blocks alone; a model is one in every engine.
NOT_GATED = (
    (4096, 2688, 512, 22),
    (2688, 1856, 128, 6),
    (8192, 5120, 512, 22),
    (2048, 5120, 512, 22),
    (1024, 2688, 512, 22),
)
#: GPUs a node has: the trays of a Grace-Blackwell rack have 4 (their moe_a2a tables: one node, ep_size 4), others 8.
NODE_GPUS = {"gb200": 4, "gb300": 4}
COLLECTIVES = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "alltoall": "all-to-all",
}


@dataclass(frozen=True, slots=True)
class Wheel:
    """An installed wheel, or a copy of its data folder."""

    data: Path
    version: str

    def devices(self) -> list[str]:
        """Device profiles it has timings for."""
        return sorted(device for system, device in SYSTEMS.items() if (self.data / system).is_dir())

    def versions(self, device: str, engine: str, family: str) -> list[str]:
        """Versions of `engine` whose kernels of `family` were timed on `device`, oldest first."""
        return sorted({path.parent.name for path, _ in self._files(device, engine, family)}, key=_version)

    def files(self, device: str, engine: str, family: str) -> list[Path]:
        """Files that `read` takes its rows from."""
        return [path for path, _ in self._files(device, engine, family)]

    def read(self, device: str, engine: str, family: str, version: str | None = None) -> pd.DataFrame:
        """Timings of one family on one device in the schema of hwmodels.kernels.table.

        engine    'vllm', 'sglang', 'tensorrt-llm', or 'nccl' for collectives
        version   None: every shape in the latest version that timed it (later versions are partial drops)

        Empty where nothing was measured. Raises MeasurementError for files of another layout.
        """
        columns = list(FAMILIES[family].columns)
        frames: list[pd.DataFrame] = []
        for path, convert in sorted(
            self._files(device, engine, family), key=lambda found: _version(found[0].parent.name)
        ):
            found = path.parent.name
            if version not in (None, found):
                continue
            try:
                raw = pq.read_table(path).to_pandas()
                frame = convert(raw.assign(node_gpus=NODE_GPUS.get(device, 8)))
            except (KeyError, ValueError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
                raise MeasurementError(
                    f"{path}: not the layout of {DISTRIBUTION} 0.12 ({error}); "
                    "install the version the extra 'silicon' pins"
                ) from error
            frame = frame.assign(
                device=device,
                software=f"{engine} {found}",
                spread=np.nan,
                source=f"{DISTRIBUTION} {self.version}",
            )
            frames.append(frame[columns])
        if not frames:
            return pd.DataFrame(columns=columns)
        frame = pd.concat(frames, ignore_index=True)
        frame = frame[(frame["seconds"] > 0) & np.isfinite(frame["seconds"])]
        # Repeated rows are repeated runs: their median is the measurement.
        key = list(FAMILIES[family].key)
        if frame.duplicated(key).any():
            rest = {c: "first" for c in columns if c not in key}
            frame = frame.groupby(key, as_index=False, sort=False).agg({**rest, "seconds": "median"})
        shape = [*FAMILIES[family].shape, "dtype"]
        latest = frame.groupby(shape, sort=False)["software"].transform("last")
        current: pd.DataFrame = frame.loc[frame["software"] == latest, columns].reset_index(drop=True)
        return current

    def _files(
        self, device: str, engine: str, family: str
    ) -> Iterator[tuple[Path, Callable[[pd.DataFrame], pd.DataFrame]]]:
        system = next((s for s, d in SYSTEMS.items() if d == device), None)
        framework = FRAMEWORKS.get(engine)
        if system is None or framework is None:
            return
        for group, name, convert in READERS.get(family, ()):
            for path in sorted((self.data / system / group / framework).glob(f"*/{name}_perf.parquet")):
                yield path, convert


@lru_cache(maxsize=8)
def open_wheel(folder: Path | None = None) -> Wheel:
    """The installed wheel, or the data folder `folder` (its `systems/data`).

    Raises MeasurementError where the wheel is not installed or the folder has another layout.
    """
    if folder is None:
        try:
            distribution = importlib.metadata.distribution(DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError:
            raise MeasurementError(
                f"measured prices need {DISTRIBUTION}, which is not installed; pip install 'shardwise[silicon]', "
                "or plan with --cost calibrated"
            ) from None
        folder = Path(str(distribution.locate_file("aiconfigurator_core/systems/data")))
        version = distribution.version
    else:
        version = "from a folder"
    if not any((folder / system).is_dir() for system in SYSTEMS):
        raise MeasurementError(
            f"{folder}: expected folders such as {', '.join(list(SYSTEMS)[:3])}; "
            f"point to systems/data of {DISTRIBUTION} 0.12"
        )
    return Wheel(folder, version)


def _version(name: str) -> tuple[tuple[int, int, str], ...]:
    """Orders '1.3.0rc20' behind '1.3.0rc5' and both before '1.3.0': numbers by value, candidates before the release."""
    parts: list[tuple[int, int, str]] = []
    for part in re.findall(r"\d+|[a-z]+", name.lower()):
        parts.append((3, int(part), "") if part.isdigit() else (2 if part == "post" else 0, 0, part))
    return (*parts, (1, 0, ""))


def _start(raw: pd.DataFrame, dtype: str) -> pd.DataFrame:
    """A frame with what all tables share; rows in formats nobody serves in (SmoothQuant) are left out."""
    frame = pd.DataFrame({"dtype": raw[dtype].map(DTYPES), "kernel": raw["kernel_source"]}, index=raw.index)
    frame["seconds"] = raw["latency"].astype(float) * 1e-3 if "latency" in raw else np.nan
    return frame


def _gemm(raw: pd.DataFrame) -> pd.DataFrame:
    frame = _start(raw, "gemm_dtype").assign(m=raw["m"], n=raw["n"], k=raw["k"])
    return frame.dropna(subset="dtype")


def _latent_products(raw: pd.DataFrame) -> pd.DataFrame:
    """mla_gen_pre takes queries into the latent space, mla_gen_post results out of it; one product per head."""
    into = raw["op_name"] == "mla_gen_pre"
    return _start(raw, "bmm_dtype").assign(
        groups=raw["num_heads"], m=raw["num_tokens"], n=np.where(into, LATENT, NOPE), k=np.where(into, NOPE, LATENT)
    )


def _moe(raw: pd.DataFrame) -> pd.DataFrame:
    block = pd.MultiIndex.from_frame(raw[["hidden_size", "inter_size", "num_experts", "topk"]])
    nongated = raw["kernel_source"].str.contains("nongated") | block.isin(NOT_GATED)
    frame = _start(raw, "moe_dtype").assign(
        tokens=raw["num_tokens"],
        hidden=raw["hidden_size"],
        intermediate=raw["inter_size"],
        experts=raw["num_experts"],
        top_k=raw["topk"],
        tp=raw["moe_tp_size"],
        ep=raw["moe_ep_size"],
        gated=(~nongated).astype(int),
        distribution=raw["distribution"],
    )
    return frame.dropna(subset="dtype")


def _attention(raw: pd.DataFrame) -> pd.DataFrame:
    return _start(raw, "attn_dtype").assign(
        batch=raw["batch_size"],
        heads=raw["num_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        window=raw.get("window_size", 0),
        kv_dtype=raw["kv_cache_dtype"].map(DTYPES),
    )


def _latent_attention(raw: pd.DataFrame) -> pd.DataFrame:
    return _start(raw, "mla_dtype").assign(
        batch=raw["batch_size"], heads=raw["num_heads"], kv_dtype=raw["kv_cache_dtype"].map(DTYPES)
    )


def _prefill(convert: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda raw: convert(raw).assign(new=raw["isl"], before=raw["step"])


def _decode(convert: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda raw: convert(raw).assign(context=raw["step"] + 1)


def _nccl(raw: pd.DataFrame) -> pd.DataFrame:
    width = raw["nccl_dtype"].map({"half": 2, "int8": 1})
    frame = _start(raw, "nccl_dtype").assign(
        kind=raw["op_name"].map(COLLECTIVES), gpus=raw["num_gpus"], nodes=1, bytes=raw["message_size"] * width
    )
    return frame


def _custom_all_reduce(raw: pd.DataFrame) -> pd.DataFrame:
    """Engines' own all-reduce, as they run it inside CUDA graphs; message_size counts 16-bit elements."""
    frame = _start(raw, "allreduce_dtype").assign(
        kind="all-reduce", gpus=raw["num_gpus"], nodes=1, bytes=raw["message_size"] * 2
    )
    return frame[~raw["kernel_source"].str.endswith("_eager")]


def _exchange(raw: pd.DataFrame, kind: str, seconds: pd.Series, kernel: pd.Series, gpus: pd.Series) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "dtype": "fp8" if kind == "dispatch" else "bf16",
            "kernel": kernel,
            "seconds": seconds,
            "kind": kind,
            "gpus": gpus,
            "nodes": raw["node_num"],
            "tokens": raw["num_token"] if "num_token" in raw else raw["num_tokens"],
            "hidden": raw["hidden_size"],
            "experts": raw["num_experts"],
            "top_k": raw["num_topk"] if "num_topk" in raw else raw["topk"],
        }
    )


def _deepep_low_latency(raw: pd.DataFrame) -> pd.DataFrame:
    kernel, gpus = "deepep_ll" + raw["kernel_source"].str[:0], raw["node_num"] * raw["node_gpus"]
    return pd.concat(
        [_exchange(raw, kind, raw[f"{kind}_avg_t_us"] * 1e-6, kernel, gpus) for kind in ("dispatch", "combine")],
        ignore_index=True,
    )


def _deepep_normal(raw: pd.DataFrame) -> pd.DataFrame:
    frames = []
    for kind in ("dispatch", "combine"):
        kernel = "deepep_normal_sms" + raw[f"{kind}_sms"].astype(int).astype(str)
        seconds = (raw[f"{kind}_transmit_us"] + raw[f"{kind}_notify_us"]) * 1e-6
        frames.append(_exchange(raw, kind, seconds, kernel, raw["node_num"] * raw["node_gpus"]))
    return pd.concat(frames, ignore_index=True)


def _all_to_all(raw: pd.DataFrame) -> pd.DataFrame:
    """The engines' own dispatch and combine; kernel_source with the number of SMs it may use."""
    kernel = raw["comm_backend"] + "_sms" + raw["sms"].astype(int).astype(str)
    frames = []
    for kind in ("dispatch", "combine"):
        rows = raw[raw["phase"] == kind]
        seconds = (rows["transmit_us"] + rows["notify_us"]) * 1e-6
        frames.append(_exchange(rows, kind, seconds, kernel[rows.index], rows["ep_size"]))
    return pd.concat(frames, ignore_index=True)


def _quantize(kind: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda raw: _start(raw, "quant_dtype").assign(kind=kind, m=raw["m"], k=raw["k"])


#: Where a family's timings lie (group, file) and how they are read.
READERS: dict[str, tuple[tuple[str, str, Callable[[pd.DataFrame], pd.DataFrame]], ...]] = {
    "gemm": (("gemm", "gemm", _gemm),),
    "batched_gemm": (("mla_bmm", "mla_bmm", _latent_products),),
    "moe": (("moe", "moe", _moe),),
    "attention_prefill": (("attention", "context_attention", _prefill(_attention)),),
    "attention_decode": (("attention", "generation_attention", _decode(_attention)),),
    "mla_prefill": (("mla", "context_mla", _prefill(_latent_attention)),),
    "mla_decode": (("mla", "generation_mla", _decode(_latent_attention)),),
    "collective": (("comm", "nccl", _nccl), ("comm", "custom_allreduce", _custom_all_reduce)),
    "expert_exchange": (
        ("comm", "wideep_deepep_ll", _deepep_low_latency),
        ("comm", "wideep_deepep_normal", _deepep_normal),
        ("comm", "moe_a2a", _all_to_all),
    ),
    "quantize": (("quantize", "computescale", _quantize("scale")), ("quantize", "scale_matrix", _quantize("cast"))),
}
