"""Launch files of a plan for a serving engine of a named version."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from planner.errors import PlanError
from planner.export import dynamo, sglang, tensorrt_llm, vllm
from planner.export.experts import Seats, require_seats
from planner.export.launch import Export, model_repository, place
from planner.plan import Plan
from planner.planfile import check_plan

__all__ = ["ENGINES", "Export", "Seats", "export", "model_repository"]

#: Engines a plan can be exported for.
ENGINES: dict[str, Callable[..., Export]] = {
    "vllm": vllm.launch_files,
    "sglang": sglang.launch_files,
    "tensorrt-llm": tensorrt_llm.launch_files,
    "dynamo": dynamo.launch_files,
}


def export(
    plan: Plan, engine: str, gpus_per_node: int | Mapping[str, int] = 8, seats: Mapping[str, Seats] | None = None
) -> Export:
    """The files that launch every pool of a plan, and in `notes` what the engine does differently.

    engine          one of ENGINES
    gpus_per_node   devices of one server, or of one server of each hardware in Plan.devices; a replica leaves its
                    server only when it is larger than one
    seats           content of the maps of experts that pools name

    Raises PlanError for a plan that is malformed, does not fit the servers, or that the engine cannot run.
    """
    if engine not in ENGINES:
        raise PlanError(f"engine is {engine!r}, expected one of {', '.join(ENGINES)}; pass one of them with --engine")
    check_plan(plan)
    for name in plan.devices:
        size = gpus_per_node if isinstance(gpus_per_node, int) else gpus_per_node.get(name, 0)
        if size < 1:
            raise PlanError(
                f"gpus_per_node is {size} for {name}, expected at least 1; give the GPUs of one server of each hardware"
            )
    for index, pool in enumerate(plan.pools):
        if pool.role == "encode":
            raise PlanError(
                f"pools[{index}].role is 'encode', expected pools of the language model only: encode workers are not "
                "exported; plan without them, so that the replicas that prefill encode"
            )
        if pool.sharing is not None:
            raise PlanError(
                f"pools[{index}].sharing is {pool.sharing!r}, expected null: none of the exported engines divides a "
                "device between its phases by such a rule; plan --serving aggregated or disaggregated"
            )
        if pool.expert_cache is not None:
            raise PlanError(
                f"pools[{index}].expert_cache is {pool.expert_cache:g}, expected null: no exported launch file keeps a "
                "cache of experts over host memory; MoE-Infinity serves experts that are loaded, KTransformers and "
                "llama.cpp (--n-cpu-moe) those a CPU computes"
            )
    require_seats(plan, seats or {})
    return ENGINES[engine](plan, place(plan, gpus_per_node), seats or {})
