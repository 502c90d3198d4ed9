"""What a serving engine adds to its kernels: host work per step and memory it keeps for itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from hwmodels.errors import ProfileError
from hwmodels.yamlfiles import PROFILES, named, read_as

Framework = Literal["vllm", "sglang", "tensorrt-llm"]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Engine:
    """A serving engine's overheads.

    kernels               whose measured kernels price its steps: 'default', and families or formats of a family that
                          are taken from another framework's timings, such as 'gemm fp4'
    step_overhead_s       host time of a step that the device cannot hide (scheduling, input preparation, sampling)
    sequence_overhead_s   the same per sequence in the step
    prompt_overhead_s     host and launch time that a step with prompt tokens takes beyond that: it runs outside the
                          captured graphs, and its inputs are new
    unfused               share of the time of norms, rotations and activation functions that the engine does not hide
                          in the kernels beside them
    overlaps_shared_experts   whether shared experts run while tokens are on their way to the routed ones
    request_overhead_s    from the client to the scheduler and back: network, parsing, tokens to text
    memory_fraction       share of the device's memory the engine may use
    reserve_bytes         part of that share taken by CUDA context, graphs and communication buffers
    """

    name: str
    source: str
    kernels: Mapping[str, Framework] = dataclasses.field(hash=False)
    step_overhead_s: float = Field(ge=0)
    sequence_overhead_s: float = Field(ge=0)
    prompt_overhead_s: float = Field(ge=0)
    unfused: float = Field(ge=0, le=1)
    request_overhead_s: float = Field(ge=0)
    memory_fraction: float = Field(gt=0, le=1)
    reserve_bytes: float = Field(ge=0)
    overlaps_shared_experts: bool = True

    def __post_init__(self) -> None:
        """Raise ProfileError where no framework is named for what has none of its own."""
        if "default" not in self.kernels:
            raise ProfileError(f"engine {self.name}: kernels {dict(self.kernels)}: expected an entry 'default'")


def engine_names() -> list[str]:
    """Names of the shipped engine profiles."""
    return sorted(path.stem for path in (PROFILES / "engines").glob("*.yaml"))


def load_engine(name: str) -> Engine:
    """The engine profile called `name`, or that of the YAML file at the path `name`.

    Raises ProfileError for an unknown name or an invalid file.
    """
    path: Path = named("engine", name, PROFILES / "engines")
    return read_as(Engine, path)
