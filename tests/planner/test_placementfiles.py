"""Maps that engines read: every slot filled, every expert somewhere, the placement kept."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.huggingface import load_model
from planner.errors import PlanError
from planner.placement import Problem, objective_of, solve
from planner.placementfiles import (
    NAMES,
    SGLANG,
    VLLM,
    VLLM_ASCEND,
    engine_files,
    expert_maps,
    filled,
    read_expert_map,
    slot_maps,
)
from planner.plan import Plan, Pool

#: 27 layers, the first of them dense, with 64 experts.
LITE = load_model("deepseek-v2-lite")


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


@settings(deadline=None, max_examples=15)
@given(ranks=st.sampled_from([2, 4, 8]), spare=st.integers(0, 2), seed=st.integers(0, 999))
def test_what_is_written_is_read_again_from_every_file(tmp_path_factory, ranks, spare, seed):
    folder = tmp_path_factory.mktemp("maps")
    rng = np.random.default_rng(seed)
    extra = spare * ranks
    maps = np.stack([rng.permutation(np.r_[np.arange(64), rng.choice(64, extra, replace=False)]) for _ in range(26)])
    for name, text in engine_files(maps, ranks, 64, range(1, 27), 27).items():
        (folder / name).write_text(text)
        found = read_expert_map(folder / name, LITE, ranks)
        assert np.array_equal(found.slots, maps)
        split = found.split(ranks)
        assert split.shape == (26, 64, ranks) and np.allclose(split.sum(axis=2), 1)
        held = maps.reshape(26, ranks, -1)
        for layer, expert in ((0, 0), (25, 63), (13, 30)):
            copies = (held[layer] == expert).sum(axis=1)
            assert split[layer, expert] == pytest.approx(copies / copies.sum())


ROW = list(range(64))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("{}", "is no map of experts; expected one of sglang"),
        ("[1, 2]", "expected a list of slots for every layer"),
        (json.dumps([ROW] * 25), "25 layers; expected the 26 mixture layers"),
        (json.dumps({"physical_to_logical_map": [ROW] * 26}), "26 layers; expected all 27 of the model"),
        (json.dumps([ROW] * 25 + [[*ROW, 0]]), "64 to 65 slots a layer"),
        (json.dumps([ROW] * 25 + [[*ROW[:-1], 64]]), "layer 26, slot 63 has 64; expected an expert from 0 to 63"),
        (json.dumps([[*ROW[:-1], 1.5]] + [ROW] * 25), "layer 1, slot 63 has 1.5"),
        (json.dumps([[*ROW[:-1], True]] + [ROW] * 25), "layer 1, slot 63 has True"),
        (json.dumps([ROW] * 25 + [[0] * 64]), "layer 26 has no slot for expert 1 and 62 more"),
        (json.dumps([ROW] * 25 + [[*ROW[:-1], 0]]), "layer 26 has no slot for expert 63; expected"),
        (json.dumps([[*ROW, 0]] * 26), "65 slots a layer do not divide over 2 expert ranks"),
        (json.dumps({"layer_list": [{}]}), "a layer without device_list"),
        (json.dumps({"layer_list": [{"device_list": [{"device_expert": ROW}]}]}), "1 devices a layer; expected the 2"),
        (json.dumps({"layer_list": [{"device_list": [{}, {}]}]}), "expected a list of slots for every layer"),
        (
            json.dumps({"layer_list": [{"device_list": [{"device_expert": ROW}, {"device_expert": [0]}]}]}),
            "devices with unequal numbers of experts",
        ),
    ],
)
def test_a_map_that_cannot_be_meant_is_refused(tmp_path, content, told):
    file = tmp_path / "map.json"
    file.write_text(content)
    with pytest.raises(PlanError, match=f"map.json: .*{told}|map.json: {told}"):
        read_expert_map(file, LITE, 2)


@pytest.mark.parametrize("name", ["counts.json", "counts.json.gz"])
def test_a_recording_is_told_as_one(tmp_path, name):
    path = tmp_path / name
    text = json.dumps({"logical_count": [[1] * 8] * 32}).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    with pytest.raises(PlanError, match=f"{name}: is a recording of routing; shardwise place-experts --save makes"):
        read_expert_map(path, load_model("mixtral-8x7b"))


def test_maps_of_a_plan_lie_beside_it_and_have_its_slots(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps([ROW + ROW[:2]] * 26))
    pool = Pool(1, tp=2, ep=2, redundant_experts=2, expert_map="map.json")
    plan = Plan("deepseek-v2-lite", "h100-sxm", 4, (pool, replace(pool, expert_map=None)))
    assert list(expert_maps(plan, tmp_path, LITE)) == ["map.json"]
    for changed, told in (
        ({"redundant_experts": 0}, r"pools\[0\].expert_map .*66 slots a layer; expected 64 .*redundant_experts to 2"),
        ({"expert_map": "none.json"}, "none.json: cannot be read"),
    ):
        with pytest.raises(PlanError, match=told):
            expert_maps(replace(plan, pools=(replace(pool, **changed),)), tmp_path, LITE)
