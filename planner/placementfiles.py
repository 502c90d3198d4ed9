"""In which files do inference engines take a placement of experts before their first step?

Engines number physical slots GPU by GPU and take, for every layer, the logical expert in each slot. No slot may stay
empty: the others get further copies of the experts with the most load per copy.

sglang-expert-location.json    --init-expert-location: {"physical_to_logical_map": [layers][slots]} with a row for every
                               layer of the model, and no other key (sgl-project/sglang, srt/eplb/expert_location.py);
                               slots beyond the experts are --ep-num-redundant-experts
vllm-expert-map.json           [MoE layers][slots], what vllm-project/vllm#49572 reads as eplb_config's
                               initial_expert_map_path; releases up to 0.26 have no option that takes a placement
vllm-ascend-expert-map.json    expert_map_path of vLLM-Ascend's eplb_config: moe_layer_count and layer_list, of each MoE
                               layer the device_list with the device_expert of every device (vllm_ascend/eplb)
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from planner.errors import PlanError
from planner.placement import Bools, Indices, Problem, holds_of

SGLANG = "sglang-expert-location.json"
VLLM = "vllm-expert-map.json"
VLLM_ASCEND = "vllm-ascend-expert-map.json"
NAMES = (SGLANG, VLLM, VLLM_ASCEND)


def filled(problem: Problem, holds: Bools) -> Bools:
    """The placement, layers x experts x gpus, with a copy in every slot.

    One slot at a time, the expert with the most load per copy that some GPU with an empty slot does not hold goes to
    the least loaded such GPU (copies share evenly, as in engines). Raises PlanError for an assignment that breaks the
    problem's slots, and for more slots on a GPU than there are experts.
    """
    most = int(problem.slots_of.max())
    if most > problem.experts:
        raise PlanError(f"{most} slots on a GPU for {problem.experts} experts; expected at most one slot for each")
    full = np.array(holds_of(problem, holds))
    for shares, layer in zip(problem.shares, full, strict=True):
        empty = problem.slots_of - layer.sum(axis=0)
        while empty.any():
            each = shares / layer.sum(axis=1)
            open_ = ~layer & (empty > 0)
            expert = int(np.where(open_.any(axis=1), each, -1.0).argmax())
            gpu = int(np.where(open_[expert], each @ layer, np.inf).argmin())
            layer[expert, gpu] = True
            empty[gpu] -= 1
    return full


def slot_maps(problem: Problem, holds: Bools) -> Indices:
    """The expert in every slot, layers x slots of all GPUs, GPU by GPU and there in ascending order.

    Raises PlanError unless every GPU has as many slots as the others and a copy in each.
    """
    slots = problem.slots_of
    if slots.min() != slots.max():
        raise PlanError(
            f"{slots.min()} to {slots.max()} slots on a GPU; expected as many on each, as engines have them"
        )
    if not (holds.sum(axis=1) == slots).all():
        raise PlanError("a placement with empty slots; expected a copy in each, as engines have them")
    experts = np.nonzero(holds.transpose(0, 2, 1))[2]
    return np.asarray(experts.reshape(problem.layers, -1), dtype=np.intp)


def engine_files(
    maps: Indices, gpus: int, experts: int, layers: Sequence[int] | None = None, model_layers: int | None = None
) -> dict[str, str]:
    """Contents of the files, by name.

    maps           slot_maps
    experts        of a layer
    layers         of the model, that the rows of `maps` are for; None: all
    model_layers   dense ones included; their rows, which SGLang's map has but nothing reads, have experts in order
    """
    moe_layers, slots = maps.shape
    rows = range(moe_layers) if layers is None else layers
    every = np.tile(np.arange(slots) % experts, (moe_layers if model_layers is None else model_layers, 1))
    every[list(rows)] = maps
    devices = maps.reshape(moe_layers, gpus, -1).tolist()
    ascend = {
        "moe_layer_count": moe_layers,
        "layer_list": [
            {
                "layer_id": layer,
                "device_count": gpus,
                "device_list": [{"device_id": gpu, "device_expert": held} for gpu, held in enumerate(row)],
            }
            for layer, row in enumerate(devices)
        ],
    }
    contents = (SGLANG, {"physical_to_logical_map": every.tolist()}), (VLLM, maps.tolist()), (VLLM_ASCEND, ascend)
    return {name: json.dumps(content) + "\n" for name, content in contents}
