"""Replicas get devices of their own: whole nodes, or part of one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.hardware import load_cluster
from planner.errors import PlanError
from planner.placing import placed
from planner.plan import Plan, Pool


@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_no_two_replicas_share_a_device_and_small_ones_stay_in_a_node(counts: list[int], data: st.DataObject) -> None:
    sizes = [data.draw(st.sampled_from([1, 2, 4, 8, 16])) for _ in counts]
    pools = tuple(Pool(count, tp=size) for count, size in zip(counts, sizes, strict=True))
    plan = Plan("llama-3.1-70b", "h100-sxm", 64, pools)
    cluster = load_cluster("h100-sxm", 64)
    if plan.gpus_used > 64:
        with pytest.raises(PlanError, match="finds no room"):
            placed(plan, {"h100-sxm": cluster})
        return
    found = placed(plan, {"h100-sxm": cluster})
    devices = [device for _, own in found for device in own]
    assert len(devices) == len(set(devices)) == plan.gpus_used
    assert max(devices) < 64
    for (_, own), size in zip(found, [s for s, c in zip(sizes, counts, strict=True) for _ in range(c)], strict=True):
        nodes = {device // 8 for device in own}
        assert len(own) == size
        assert len(nodes) == max(1, size // 8)


def test_every_kind_of_device_is_numbered_by_itself() -> None:
    pools = (Pool(2, tp=4, role="prefill"), Pool(1, tp=8, role="decode", hardware="a100-80-sxm"))
    plan = Plan("llama-3.1-70b", "h100-sxm", 8, pools, also={"a100-80-sxm": 8})
    clusters = {name: load_cluster(name, gpus) for name, gpus in plan.devices.items()}
    assert placed(plan, clusters) == [
        ("h100-sxm", (0, 1, 2, 3)),
        ("h100-sxm", (4, 5, 6, 7)),
        ("a100-80-sxm", tuple(range(8))),
    ]


def test_what_does_not_fill_nodes_is_told() -> None:
    plan = Plan("llama-3.1-70b", "h100-sxm", 16, (Pool(4, tp=3, pp=1),))
    found = placed(plan, {"h100-sxm": load_cluster("h100-sxm", 16)})
    assert [own[0] // 8 for _, own in found] == [0, 0, 1, 1]
    crowded = Plan("llama-3.1-70b", "h100-sxm", 16, (Pool(5, tp=3, pp=1),))
    with pytest.raises(PlanError, match=r"replica of 3 devices finds no room in the nodes of h100-sxm \(16 devices\)"):
        placed(crowded, {"h100-sxm": load_cluster("h100-sxm", 16)})
