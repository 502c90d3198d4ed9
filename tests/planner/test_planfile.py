"""Plan files: what is written is read back, and what cannot be used is told in one line."""

import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlanError
from planner.plan import Plan, Pool
from planner.planfile import read_plan, write_plan
from simulator.errors import SaveError

FORMATS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "fp4")


@st.composite
def pools(draw):
    tp, pp, attention_dp = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    ep = draw(st.sampled_from([n for n in range(1, tp * attention_dp + 1) if tp * attention_dp % n == 0]))
    stages = draw(st.none() | st.lists(st.integers(1, 90), min_size=pp, max_size=pp).map(tuple))
    max_seqs = draw(st.integers(1, 512))
    return Pool(
        replicas=draw(st.integers(1, 9)),
        tp=tp,
        pp=pp,
        attention_dp=attention_dp,
        ep=ep,
        expert_tp=tp * attention_dp // ep,
        stages=stages,
        weights=draw(st.sampled_from(FORMATS)),
        kv=draw(st.sampled_from(FORMATS)),
        policy=draw(st.sampled_from(["chunked", "prefill-first", "orca", "static"])),
        max_seqs=max_seqs,
        token_budget=draw(st.integers(max_seqs, 16384)),
        block_tokens=draw(st.sampled_from([1, 16, 64])),
    )


@st.composite
def plans(draw):
    chosen = tuple(draw(st.lists(pools(), min_size=1, max_size=3)))
    used = sum(pool.gpus for pool in chosen)
    text = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20)
    router = draw(st.sampled_from(["round-robin", "random", "least-tokens", "power-of-two"]))
    return Plan(draw(text), draw(text), used + draw(st.integers(0, 8)), chosen, router=router)


@given(plan=plans())
def test_what_is_written_is_read_back(tmp_path_factory, plan):
    path = tmp_path_factory.getbasetemp() / "plan.yaml"
    write_plan(plan, path)
    assert read_plan(path) == plan


PLAN = {"model": "m", "hardware": "h", "gpus": 8, "pools": [{"replicas": 2, "tp": 4}]}


def test_a_short_file_takes_the_defaults(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    assert read_plan(path) == Plan("m", "h", 8, (Pool(2, tp=4),))


def pool(**changes):
    return {**PLAN, "pools": [{**PLAN["pools"][0], **changes}]}


@pytest.mark.parametrize(
    "data, told",
    [
        ({**PLAN, "gpu": 8}, ["gpu is an unknown key", "did you mean gpus?"]),
        (pool(tpp=2), ["pools[0].tpp", "unknown key", "expert_tp"]),
        ({"model": "m"}, ["hardware is missing"]),
        (pool(tp=-1), ["pools[0].tp is -1", "at least 1"]),
        (pool(tp="4"), ["pools[0].tp is '4'", "valid integer"]),
        (pool(tp=True), ["pools[0].tp is True", "valid integer"]),
        (pool(tp=1.5), ["pools[0].tp is 1.5"]),
        (pool(tp=float("nan")), ["pools[0].tp is nan"]),
        (pool(max_seqs=float("inf")), ["pools[0].max_seqs is inf"]),
        (pool(policy="fifo"), ["pools[0].policy is 'fifo'", "'chunked'"]),
        (pool(weights="fp7"), ["pools[0].weights is 'fp7'", "bf16"]),
        (pool(pp=2, stages=[40]), ["pools[0].stages is [40]", "2 layer counts"]),
        (pool(ep=2), ["pools[0].ep is 2", "tp * attention_dp (4)"]),
        (pool(max_seqs=4096), ["pools[0].max_seqs is 4096", "token_budget (2048)"]),
        ({**PLAN, "pools": []}, ["pools is empty"]),
        ({**PLAN, "gpus": 7}, ["gpus is 7", "at least the 8"]),
        ({**PLAN, "gpus": 0}, ["gpus is 0"]),
        ({**PLAN, "model": "a\nb"}, ["model is 'a\\nb'"]),
        ({**PLAN, "version": 3}, ["version is 3", "expected 1 to 2"]),
        ({**PLAN, "version": "new"}, ["version is 'new'"]),
        *((pool(share=value), ["pools[0].share is", "finite number above 0"]) for value in (0, -1, 1e308, 1e-300)),
        *((pool(share=float(value)), ["pools[0].share is", "finite number above 0"]) for value in ("nan", "inf")),
        (pool(hardware=""), ["pools[0].hardware is ''", "null for the plan's"]),
        (pool(hardware="a\nb"), ["pools[0].hardware is 'a\\nb'"]),
        ({**PLAN, "role_switch_s": 1e300}, ["role_switch_s is 1e+300", "at most 1e6"]),
        ({**PLAN, "role_switch_s": float("nan")}, ["role_switch_s is nan", "finite"]),
        ({**PLAN, "gpus": 16385}, ["gpus is 16385", "at most 16384"]),
        ({**PLAN, "also": {"l4": 10**23}}, [f"also['l4'] is {10**23}", "at most 16384"]),
        ({**PLAN, "also": {"": 8}}, ["also has the name ''"]),
        ({**PLAN, "also": {"l4": 1.5}}, ["also['l4'] is 1.5", "valid integer"]),
        ({**PLAN, "also": ["l4"]}, ["also is ['l4']", "names of profiles with counts such as {l4: 2}"]),
        ({**PLAN, "also": None}, ["also is None", "names of profiles with counts"]),
        ({**PLAN, "also": {1: 2}}, ["line", "key '1'", "in quotes where it is a number"]),
        (pool(shares=[0.5]), ["pools[0].shares is [0.5]", "two numbers such as [0.6, 1.0]"]),
        (pool(shares=[0.5, 0.5, 0.5]), ["pools[0].shares is [0.5, 0.5, 0.5]", "two numbers"]),
        (pool(shares=0.5), ["pools[0].shares is 0.5", "two numbers"]),
        (pool(shares=["a", 1]), ["pools[0].shares[0] is 'a'", "valid number"]),
        (pool(targets_s=[2]), ["pools[0].targets_s is [2]", "two times in seconds"]),
        (pool(targets_s={"ttft": 2}), ["pools[0].targets_s is {'ttft': 2}", "two times in seconds"]),
        (pool(policy="layered", pp=2), ["pools[0].policy is 'layered'", "pp is 2"]),
        (pool(policy="layered", attention_dp=2), ["pools[0].policy is 'layered'", "attention_dp is 2"]),
        (pool(policy="layered", role="prefill"), ["pools[0].policy is 'layered'", "role prefill"]),
        (pool(policy="orca", chunk_tokens=64), ["pools[0].chunk_tokens=64 with policy orca"]),
        (pool(chunk_tokens=4096), ["pools[0].chunk_tokens=4096", "token_budget of 2048"]),
        (pool(order="deadline"), ["pools[0].order=deadline", "seconds above 0"]),
        (pool(order="longest"), ["pools[0].order is 'longest'", "'shortest'"]),
        (pool(overlap="three-way"), ["pools[0].overlap is 'three-way'", "'two-way'"]),
        (pool(deadlines_s=2), ["pools[0].deadlines_s is 2", "times in seconds such as"]),
        (pool(sharing="nexus", chunk_tokens=64), ["pools[0].chunk_tokens is 64", "sharing 'nexus'"]),
        (pool(sharing="nexus", order="shortest"), ["pools[0].order is 'shortest'", "sharing 'nexus'"]),
        (pool(sharing="nexus", overlap="two-way"), ["pools[0].overlap is 'two-way'", "sharing 'nexus'"]),
        (pool(stages=40), ["pools[0].stages is 40", "a list of layer counts"]),
        ({**PLAN, "pools": 3}, ["pools is 3", "a list of pools"]),
        ({**PLAN, "pools": [3]}, ["pools[0] is 3", "keys such as replicas, tp"]),
        (pool(tp="4" * 999), ["pools[0].tp is '444", "...", "valid integer"]),
        ([PLAN], ["not a mapping"]),
        (None, ["is empty"]),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(tmp_path, data, told):
    path = tmp_path / "plan.yaml"
    path.write_text("" if data is None else yaml.safe_dump(data))
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and "expected" in message
    assert all(part in message for part in told), message
    assert not any(word in message for word in ("Tuple", "array", "object", "dataclass", "after validation"))


@pytest.mark.parametrize(
    "text, told",
    [
        ("model: !!python/object/apply:os.getcwd []\n", "line 1"),
        ("model: !mine x\n", "tag"),
        ("a: [1\nb: 2\n", "line 2"),
        ("- 1\n- 2\n", "not a mapping"),
        ("1: 2\n", "expected a word"),
        ("just words\n", "not a mapping"),
        ("gpus: 4\ngpus: 2\n", "not used before"),
        ("a: &a [x, x]\nb: [*a, *a]\n", "anchors"),
        ("gpus: 2024-13-45\n", "expected"),
        ("[" * 5000, "expected YAML"),
        ("\x00", "expected YAML"),
    ],
)
def test_text_that_is_no_plan_is_told_in_one_line(tmp_path, text, told):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("missing.yaml", ".", "binary"):
        with pytest.raises(PlanError, match="expected a plan file"):
            read_plan(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "plan.yaml"
    write_plan(Plan("m", "h", 8, (Pool(1),)), path)
    before = path.read_text()

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SaveError, match="No space left"):
        write_plan(Plan("other", "h", 8, (Pool(1),)), path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(SaveError, match="writable folder"):
        write_plan(Plan("m", "h", 8, (Pool(1),)), tmp_path / "none" / "plan.yaml")


def test_a_plan_that_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(PlanError, match="tp is 0"):
        write_plan(Plan("m", "h", 8, (Pool(1, tp=0),)), tmp_path / "plan.yaml")
    assert not list(tmp_path.iterdir())


def test_names_that_look_like_numbers_stay_names(tmp_path):
    plan = Plan(model="0", hardware="0E0", gpus=1, pools=(Pool(1),), engine="1e9")
    write_plan(plan, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan


@pytest.mark.parametrize("share", [1e-9, 2, 1e9])
def test_shares_and_switching_times_within_reason_are_kept(tmp_path, share):
    plan = Plan("m", "h", 8, (Pool(1, share=float(share)),), role_switch_s=1e6)
    write_plan(plan, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan


def test_plans_are_keys_whatever_devices_they_name():
    plans = [Plan("m", "h100-sxm", 2, (Pool(1),), also=also) for also in ({}, {"l4": 1}, {})]
    assert len(set(plans)) == 2
