"""Maps that engines read: every slot filled, every expert somewhere, the placement kept."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.placement import Problem, objective_of, solve
from planner.placementfiles import NAMES, SGLANG, VLLM, VLLM_ASCEND, engine_files, filled, slot_maps


def problem(layers=3, experts=8, gpus=4, slots=3, replicas=4, seed=0) -> Problem:
    return Problem(np.random.default_rng(seed).pareto(1.5, (layers, experts)) + 0.1, None, gpus, slots, replicas)


@settings(deadline=None, max_examples=40)
@given(
    gpus=st.integers(1, 5), extra=st.integers(0, 2), solver=st.sampled_from(["contiguous", "greedy", "eplb", "random"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_slot_is_filled_and_copies_stay_where_they_were(gpus, extra, solver, seed):
    experts = 4 * gpus
    asked = problem(2, experts, gpus, min(4 + extra, experts), min(extra, experts - 4) * gpus, seed)
    before = solve(asked, solver=solver, seed=seed).holds
    after = filled(asked, before)
    assert (after.sum(axis=1) == asked.slots_of).all()
    assert (after | before == after).all()
    maps = slot_maps(asked, after)
    for layer, row in enumerate(maps.reshape(2, gpus, -1)):
        for gpu, held in enumerate(row.tolist()):
            assert held == sorted(set(held)) == np.flatnonzero(after[layer, :, gpu]).tolist()
        assert set(row.ravel().tolist()) == set(range(experts))


def test_the_most_loaded_expert_is_copied_to_the_least_loaded_gpu():
    asked = Problem(np.array([[8.0, 2.0, 3.0, 4.0]]), None, 2, 3, 2)
    before = solve(asked, solver="contiguous").holds  # 0, 1 | 2, 3: loads 10 and 7
    after = filled(asked, before)
    assert slot_maps(asked, after).tolist() == [[0, 1, 3, 0, 2, 3]]
    assert objective_of(asked, after).objective < objective_of(asked, before).objective


def test_files_hold_the_map_in_the_form_of_each_engine():
    maps = np.array([[0, 2, 1, 0], [1, 2, 0, 1]])
    files = engine_files(maps, 2, 3, layers=(1, 3), model_layers=4)
    assert tuple(files) == NAMES
    assert json.loads(files[SGLANG]) == {
        "physical_to_logical_map": [[0, 1, 2, 0], [0, 2, 1, 0], [0, 1, 2, 0], [1, 2, 0, 1]]
    }
    assert json.loads(files[VLLM]) == maps.tolist()
    ascend = json.loads(files[VLLM_ASCEND])
    assert ascend["moe_layer_count"] == 2
    assert ascend["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 2,
        "device_list": [{"device_id": 0, "device_expert": [1, 2]}, {"device_id": 1, "device_expert": [0, 1]}],
    }


def test_what_engines_cannot_hold_is_refused():
    with pytest.raises(PlanError, match="9 slots on a GPU for 8 experts"):
        filled(problem(slots=9), solve(problem(slots=9), solver="greedy").holds)
    uneven = problem(slots=[3, 3, 3, 4], replicas=0)
    with pytest.raises(PlanError, match="3 to 4 slots on a GPU"):
        slot_maps(uneven, filled(uneven, solve(uneven, solver="greedy").holds))
    with pytest.raises(PlanError, match="empty slots"):
        slot_maps(problem(), solve(problem(), solver="greedy").holds)
