"""In which files do inference engines take a placement of experts before their first step, and what do they say?

Engines number physical slots GPU by GPU and take, for every layer, the logical expert in each slot. No slot may stay
empty: the others get further copies of the experts with the most load per copy.

sglang-expert-location.json    --init-expert-location: {"physical_to_logical_map": [layers][slots]} with a row for every
                               layer of the model, and no other key (sgl-project/sglang, srt/eplb/expert_location.py);
                               slots beyond the experts are --ep-num-redundant-experts
vllm-expert-map.json           [MoE layers][slots], what vllm-project/vllm#49572 reads as eplb_config's
                               initial_expert_map_path; releases up to 0.26 have no option that takes a placement
vllm-ascend-expert-map.json    expert_map_path of vLLM-Ascend's eplb_config: moe_layer_count and layer_list, of each MoE
                               layer the device_list with the device_expert of every device (vllm_ascend/eplb)

A plan's `expert_map` is any of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels.routing import mixture_of
from hwmodels.routingfiles import is_recording
from hwmodels.shape import ModelShape
from planner.catalogue import Catalogue, mapping_of
from planner.errors import PlanError
from planner.export.experts import Seats
from planner.placement import Bools, Indices, Problem, holds_of
from planner.plan import Plan
from planner.routedranks import ExpertMap, checked_map, require_slots

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


def read_expert_map(path: Path, model: ModelShape, ranks: int | None = None) -> ExpertMap:
    """Which expert is in which slot, from a file of any engine.

    ranks   that the slots are to divide over; the devices of a vLLM-Ascend map

    Raises PlanError, which names the file, for one that cannot be read or is none of these (a recording of routing is
    told as one), for another number of layers or ranks, and as planner.routedranks.checked_map; RoutingError for a
    model without experts.
    """
    layers, experts, _ = mixture_of(model)
    if is_recording(path):
        raise PlanError(f"{path}: is a recording of routing; shardwise place-experts --save makes a map of it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            f"{path}: cannot be read ({error.strerror}); expected a map of experts as shardwise place-experts --save "
            "writes it"
        ) from None
    except (ValueError, RecursionError):
        raise PlanError(f"{path}: is not JSON; expected one of {', '.join(NAMES)}") from None
    rows = _rows(content, str(path), layers, len(model.layers), ranks)
    found = checked_map(rows, experts, layers, str(path))
    if ranks is not None and found.slots.shape[1] % ranks:
        raise PlanError(
            f"{path}: {found.slots.shape[1]} slots a layer do not divide over {ranks} expert ranks; expected as many "
            "on each"
        )
    return found


def _rows(content: Any, what: str, layers: Sequence[int], model_layers: int, ranks: int | None) -> list[list[Any]]:
    """The rows of the mixture layers as the file has them."""
    if isinstance(content, list):
        return _lists(content, what)
    if isinstance(content, dict) and "physical_to_logical_map" in content:
        every = _lists(content["physical_to_logical_map"], what)
        if len(every) != model_layers:
            raise PlanError(f"{what}: {len(every)} layers; expected all {model_layers} of the model, dense ones too")
        return [every[layer] for layer in layers]
    if not isinstance(content, dict) or not isinstance(content.get("layer_list"), list):
        raise PlanError(f"{what}: is no map of experts; expected one of {', '.join(NAMES)}")
    rows = []
    for layer in content["layer_list"]:
        devices = layer.get("device_list") if isinstance(layer, dict) else None
        if not isinstance(devices, list) or not all(isinstance(device, dict) for device in devices):
            raise PlanError(f"{what}: a layer without device_list; expected {VLLM_ASCEND} of place-experts")
        if ranks is not None and len(devices) != ranks:
            raise PlanError(f"{what}: {len(devices)} devices a layer; expected the {ranks} expert ranks of the pool")
        held = _lists([device.get("device_expert") for device in devices], what)
        if len({len(experts) for experts in held}) > 1:
            raise PlanError(f"{what}: devices with unequal numbers of experts; expected as many on each")
        rows.append([expert for experts in held for expert in experts])
    return rows


def _lists(content: Any, what: str) -> list[list[Any]]:
    if not isinstance(content, list) or not all(isinstance(row, list) for row in content):
        raise PlanError(f"{what}: expected a list of slots for every layer")
    return content


def expert_maps(plan: Plan, folder: Path, model: ModelShape) -> dict[str, ExpertMap]:
    """The maps that the pools of a plan name, read relative to `folder`, by those names.

    Raises PlanError as read_expert_map, and for one whose slots are not those of the pool.
    """
    found: dict[str, ExpertMap] = {}
    for index, pool in enumerate(plan.pools):
        if pool.expert_map is None:
            continue
        path = folder / pool.expert_map
        found[pool.expert_map] = one = read_expert_map(path, model, pool.ep)
        layers, experts, _ = mixture_of(model)
        require_slots(one, len(layers), experts, pool.redundant_experts, f"pools[{index}].expert_map {path}")
    return found


def plan_with_maps(plan: Plan, catalogue: Catalogue) -> tuple[Plan, dict[str, str]]:
    """The plan with a map for every pool whose experts the catalogue places, and the maps' files, to lie beside it."""
    pools, files = [], {}
    for index, pool in enumerate(plan.pools):
        own = catalogue.of(pool)
        if pool.ep > 1 and pool.expert_map is None and own.seating.placed:
            layers, experts, _ = mixture_of(own.model)
            slots = own.seating.expert_map(mapping_of(pool)).slots
            name = f"expert-map-{index}.json"
            files[name] = engine_files(slots, pool.ep, experts, layers, len(own.model.layers))[SGLANG]
            pool = replace(pool, expert_map=name)
        pools.append(pool)
    return replace(plan, pools=tuple(pools)), files


def seats_of(maps: Mapping[str, ExpertMap], model: ModelShape) -> dict[str, Seats]:
    """The maps as launch files take them."""
    if not maps:
        return {}
    layers, experts, _ = mixture_of(model)
    return {
        name: Seats(dict(zip(layers, found.slots.tolist(), strict=True)), experts, len(model.layers))
        for name, found in maps.items()
    }
