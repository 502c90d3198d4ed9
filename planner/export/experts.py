"""How are engines told which experts have copies, and on which rank each of them sits?

vLLM        --enable-eplb and --eplb-config {"num_redundant_experts": ...}: vllm/config/parallel.py and
            vllm/engine/arg_utils.py of 0.11.0 and 0.12.0. Neither takes a map: experts start in order, and are
            rearranged by the load of the last `window_size` steps every `step_interval` steps
SGLang      --ep-num-redundant-experts, --init-expert-location with physical_to_logical_map, and
            --ep-dispatch-algorithm dynamic, which spreads an expert's tokens evenly over its copies:
            python/sglang/srt/server_args.py and srt/eplb of 0.5.6
TensorRT-LLM   moe_config.load_balancer: num_slots and initial_global_assignments by layer of the model, which stay as
            they are with layer_updates_per_iter 0: MoeLoadBalancerConfig and validate_load_balancer of
            tensorrt_llm/llmapi/llm_args.py (1.2 series); examples/wide_ep asks for the backend WIDEEP
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.errors import PlanError
from planner.plan import Plan, Pool


@dataclass(frozen=True, slots=True)
class Seats:
    """Experts of one pool's map.

    rows           experts in the slots, rank by rank, of each mixture layer by its index in the model
    experts        of a layer
    model_layers   dense ones included
    """

    rows: Mapping[int, Sequence[int]]
    experts: int
    model_layers: int


def require_seats(plan: Plan, seats: Mapping[str, Seats]) -> None:
    """Raise PlanError for a pool whose map is not given."""
    for index, pool in enumerate(plan.pools):
        if pool.expert_map is not None and pool.expert_map not in seats:
            raise PlanError(
                f"pools[{index}].expert_map is {pool.expert_map!r}, expected its content too: export from a plan file "
                "with the map beside it"
            )


def vllm_flags(pool: Pool, where: str, engine: str, notes: list[str]) -> list[str]:
    """Flags of vLLM's own balancer, none for a pool without copies or a map."""
    if not pool.redundant_experts and pool.expert_map is None:
        return []
    if pool.expert_map is not None:
        notes.append(
            f"{where}: {engine} takes no map of experts: it starts with experts in order, and its balancer finds a "
            "placement of its own after some thousand steps; sglang and tensorrt-llm start with the plan's."
        )
    config = {"num_redundant_experts": pool.redundant_experts}
    return ["--enable-eplb", "--eplb-config", json.dumps(config, separators=(",", ":"))]


def sglang_map(pool: Pool, seats: Mapping[str, Seats]) -> str | None:
    """Content of the file for --init-expert-location; None for a pool without a map."""
    if pool.expert_map is None:
        return None
    found = seats[pool.expert_map]
    slots = found.experts + pool.redundant_experts
    dense = [slot % found.experts for slot in range(slots)]  # rows that nothing reads
    every = [list(found.rows.get(layer, dense)) for layer in range(found.model_layers)]
    return json.dumps({"physical_to_logical_map": every}) + "\n"


def sglang_flags(pool: Pool) -> list[str]:
    """Flags beside --init-expert-location; without a map SGLang's balancer places copies while serving."""
    if not pool.redundant_experts and pool.expert_map is None:
        return []
    flags = ["--ep-num-redundant-experts", str(pool.redundant_experts), "--ep-dispatch-algorithm", "dynamic"]
    return flags if pool.expert_map is not None else [*flags, "--enable-eplb"]


def tensorrt_options(pool: Pool, where: str, seats: Mapping[str, Seats], notes: list[str]) -> dict[str, Any]:
    """The options moe_config; empty for a pool without copies or a map.

    Raises PlanError for copies without a map, of which TensorRT-LLM would have to know the number of slots.
    """
    if not pool.redundant_experts and pool.expert_map is None:
        return {}
    if pool.expert_map is None:
        raise PlanError(
            f"{where}.redundant_experts is {pool.redundant_experts} without expert_map, expected a map of the experts "
            "for TensorRT-LLM; write one with shardwise place-experts --save"
        )
    found = seats[pool.expert_map]
    notes.append(f"{where}: TensorRT-LLM's load balancer runs with its MoE backend WIDEEP.")
    balancer = {
        "num_slots": found.experts + pool.redundant_experts,
        "initial_global_assignments": {layer: list(row) for layer, row in found.rows.items()},
        "layer_updates_per_iter": 0,
    }
    return {"moe_config": {"backend": "WIDEEP", "load_balancer": balancer}}
