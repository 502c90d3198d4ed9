"""Launch files of a plan for a serving engine of a named version."""

from __future__ import annotations

from collections.abc import Callable

from planner.errors import PlanError
from planner.export import dynamo, sglang, tensorrt_llm, vllm
from planner.export.launch import Export, model_repository, place
from planner.plan import Plan
from planner.planfile import check_plan

__all__ = ["ENGINES", "Export", "export", "model_repository"]

#: Engines a plan can be exported for.
ENGINES: dict[str, Callable[..., Export]] = {
    "vllm": vllm.launch_files,
    "sglang": sglang.launch_files,
    "tensorrt-llm": tensorrt_llm.launch_files,
    "dynamo": dynamo.launch_files,
}


def export(plan: Plan, engine: str, gpus_per_node: int = 8) -> Export:
    """The files that launch every pool of a plan, and in `notes` what the engine does differently.

    engine          one of ENGINES
    gpus_per_node   devices of one server; a replica leaves its server only when it is larger than one

    Raises PlanError for a plan that is malformed, does not fit the servers, or that the engine cannot run.
    """
    if engine not in ENGINES:
        raise PlanError(f"engine is {engine!r}, expected one of {', '.join(ENGINES)}; pass one of them with --engine")
    if gpus_per_node < 1:
        raise PlanError(f"gpus_per_node is {gpus_per_node}, expected at least 1; give the GPUs of one server")
    check_plan(plan)
    return ENGINES[engine](plan, place(plan, gpus_per_node))
