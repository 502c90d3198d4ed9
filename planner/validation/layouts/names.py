"""Which shipped model and cluster published names mean, and how their number formats read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from planner.validation.layouts.rows import Unmappable


@dataclass(frozen=True, slots=True)
class Model:
    """A published model.

    profile   name of the shipped profile with its shape; None where `reason` says why there is none
    family    models whose checkpoints are quantised alike
    """

    profile: str | None
    family: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class System:
    """A published system: the shipped cluster it means, and the generation of its kernels."""

    cluster: str
    generation: str


_SPARSE = "sparse attention (DeepSeek sparse attention) is not modelled"
_LINEAR = "linear attention (gated delta net) is not modelled"
_CHUNKED = "chunked local attention (Llama 4) is not modelled"
_POWER = "power-capped devices are not modelled"

#: First pattern found in the lower-case name, with every run of other characters turned into one hyphen.
_MODELS: tuple[tuple[str, Model], ...] = (
    (r"glm-?5", Model(None, "glm-5", _SPARSE)),
    (r"deepseek-v3[-.]2(?!\d)|deepseek-v4|dsv4", Model(None, "deepseek-v3.2", _SPARSE)),
    (r"qwen3[-.]5|qwen3-next|qwen-3-5", Model(None, "qwen3.5", _LINEAR)),
    (r"llama-?4", Model(None, "llama-4", _CHUNKED)),
    (r"deepseek-r1|dsr1|deepseek-r-1", Model("deepseek-r1", "deepseek")),
    (r"deepseek-v3|dsv3", Model("deepseek-v3", "deepseek")),
    (r"kimi-?k2(\.\d|-5(?!\d))", Model("kimi-k2.5", "kimi")),
    (r"kimi-?k2", Model("kimi-k2", "deepseek")),
    (r"gpt-?oss-120b", Model("gpt-oss-120b", "gpt-oss")),
    (r"gpt-?oss-20b", Model("gpt-oss-20b", "gpt-oss")),
    (r"minimax-?m2[-.]5", Model("minimax-m2.5", "minimax")),
    (r"qwen3-235b-a22b", Model("qwen3-235b-a22b", "qwen3-moe")),
    (r"qwen3-30b-a3b", Model("qwen3-30b-a3b", "qwen3-moe")),
    (r"qwen3-32b", Model("qwen3-32b", "dense")),
    (r"qwen3-8b", Model("qwen3-8b", "dense")),
    (r"mixtral-8x7b", Model("mixtral-8x7b", "mixtral")),
    (r"mixtral-8x22b", Model("mixtral-8x22b", "mixtral")),
    (r"mistral-7b", Model("mistral-7b", "dense")),
    (r"falcon-180b", Model("falcon-180b", "dense")),
    (r"bloom-176b", Model("bloom-176b", "dense")),
    (r"llama-?v?3[-.]1-405b", Model("llama-3.1-405b", "dense")),
    (r"llama-?v?3[-.]3-70b", Model("llama-3.3-70b", "llama-70b")),
    (r"llama-?v?3[-.]1-70b", Model("llama-3.1-70b", "llama-70b")),
    (r"llama-?v?3[-.]1-8b", Model("llama-3.1-8b", "dense")),
    (r"llama-?v?3-70b", Model("llama-3-70b", "llama-70b")),
    (r"llama-?v?3-8b", Model("llama-3-8b", "dense")),
    (r"llama-?v?2-70b|llama-70b", Model("llama-2-70b", "dense")),
    (r"llama-?v?2-13b", Model("llama-2-13b", "dense")),
    (r"llama-?v?2-7b|llama-7b", Model("llama-2-7b", "dense")),
)

#: First pattern found in the lower-case name, prepared as above. RTX PRO 6000 "SE" is the Server Edition.
_SYSTEMS: tuple[tuple[str, System | str], ...] = (
    (r"pcap|capped", _POWER),
    (r"gb300", System("nvl72-gb300", "blackwell")),
    (r"b300", System("hgx-b300", "blackwell")),
    (r"gb200", System("nvl72-gb200", "blackwell")),
    (r"b200", System("hgx-b200", "blackwell")),
    (r"gh200", "GH200 has no shipped profile"),
    (r"h[12]00-nvl", "H100 NVL and H200 NVL have no shipped profile"),
    (r"h200", System("hgx-h200", "hopper")),
    (r"h100-pcie", System("h100-pcie", "hopper")),
    (r"h100", System("hgx-h100", "hopper")),
    (r"\bh20\b", System("hgx-h20", "hopper")),
    (r"a100.*pcie", System("a100-80-pcie", "ampere")),
    (r"a100.*40", System("a100-40-sxm", "ampere")),
    (r"a100", System("hgx-a100", "ampere")),
    (r"l40s", System("l40s", "ada")),
    (r"rtx-?pro-?6000", System("rtx-pro-6000", "blackwell-workstation")),
    (r"mi300x", System("mi300x-node", "cdna3")),
    (r"mi325x", System("mi325x-node", "cdna3")),
)

_BACKENDS = {"vllm": "vllm", "sglang": "sglang", "trt": "tensorrt-llm", "trtllm": "tensorrt-llm"}
_BACKENDS |= {"tensorrt-llm": "tensorrt-llm", "tensorrt_llm": "tensorrt-llm", "tensorrtllm": "tensorrt-llm"}
_BACKENDS |= {f"dynamo-{short}": name for short, name in _BACKENDS.items()}

_PRECISIONS = {"bf16": "bf16", "fp16": "bf16", "bfloat16": "bf16", "float16": "bf16", "bf16/fp16": "bf16"}
_PRECISIONS |= {"fp8": "fp8", "fp8_block": "fp8_block", "fp4": "fp4", "nvfp4": "fp4", "mxfp4": "mxfp4"}
_PRECISIONS |= {"int4": "int4", "int4_wo": "int4", "w4a16": "int4"}


def model_named(name: str) -> Model:
    """The model a published name means; Unmappable where no shape of it is known."""
    plain = _plain(name)
    found = next((model for pattern, model in _MODELS if re.search(pattern, plain)), None)
    if found is None:
        raise Unmappable("the model has no shipped profile")
    if found.profile is None:
        raise Unmappable(found.reason)
    return found


def system_named(name: str) -> System:
    """The cluster a published name means; Unmappable where none is known."""
    plain = _plain(name)
    found = next((system for pattern, system in _SYSTEMS if re.search(pattern, plain)), None)
    if isinstance(found, System):
        return found
    raise Unmappable(found or "the system has no shipped profile")


def backend_named(name: str) -> str:
    """The engine profile of a published engine name; Unmappable where there is none."""
    found = _BACKENDS.get(name.strip().lower())
    if found is None:
        raise Unmappable("the engine has no shipped profile")
    return found


def precision_named(name: str) -> str:
    """bf16, fp8, fp8_block, fp4, mxfp4 or int4; fp16 counts as bf16 (same bytes, same peak)."""
    found = _PRECISIONS.get(name.strip().lower())
    if found is None:
        raise Unmappable("the number format is not known")
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.strip().lower())
