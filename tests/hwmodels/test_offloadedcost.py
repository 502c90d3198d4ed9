"""Prices of operators where a part of the experts is not on the device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hwmodels import operators as ops
from hwmodels.errors import MappingError
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.offloadedcost import OffloadedCost, OffloadedLayers
from hwmodels.operators import Experts
from hwmodels.roofline import AnalyticCost

MIXTRAL = load_model("mixtral-8x7b")
INNER = AnalyticCost(load_cluster("rtx-4090", 1), Mapping())
AT = np.array([1.0, 8.0, 64.0])
ZERO = np.zeros(3)


def layers(resident_s: list[float], layer_s: list[float]) -> OffloadedLayers:
    busy = {"gpu": np.array(resident_s), "link": np.array([9.0, 9.0, 0.0]), "cpu": np.array([0.0, 0.0, 9.0])}
    return OffloadedLayers(AT, np.array(resident_s), np.array(layer_s), ZERO, busy, ZERO, np.ones((3, 2)))


TABLE = layers([0.001, 0.002, 0.004], [0.011, 0.032, 0.004])


def block(tokens: np.ndarray, count: int = 32) -> list[ops.Operator]:
    return ops.expert_feed_forward(
        MIXTRAL, MIXTRAL.layers[0].feed_forward, tokens, tokens, Mapping(), Precision(), count
    )


def test_only_experts_take_longer_by_what_the_table_says() -> None:
    cost = OffloadedCost(INNER, TABLE)
    for op in block(AT):
        more = 32 * np.array([0.01, 0.03, 0.0]) if isinstance(op, Experts) else ZERO
        assert cost.time_s(op) == pytest.approx(INNER.time_s(op) + more)


def test_between_and_beyond_the_table() -> None:
    """Linear from 10 ms at one token to 30 ms at eight; as at 64 tokens beyond; nothing where there are none."""
    assert TABLE.extra_s(np.array([1.0, 4.5, 1000.0])) == pytest.approx([0.01, 0.02, 0.0])
    experts = next(op for op in block(np.array([0.0])) if isinstance(op, Experts))
    assert OffloadedCost(INNER, TABLE).time_s(experts) == 0.0


def test_sources_add_up_to_the_time() -> None:
    experts = next(op for op in block(AT) if isinstance(op, Experts))
    faster = layers([0.001, 0.002, 0.004], [0.0009, 0.0018, 0.0036])  # a CPU helps
    for table in (TABLE, faster):
        cost = OffloadedCost(INNER, table)
        assert sum(cost.sources(experts).values()) == pytest.approx(float(cost.time_s(experts).sum()))


@pytest.mark.parametrize(("tokens", "bound"), [(1.0, "host link"), (64.0, None), (60.0, "host CPU")])
def test_what_experts_wait_for(tokens: float, bound: str | None) -> None:
    """At 64 tokens nothing is lost, so that the device itself is what binds."""
    found = {op.name: op for op in block(np.array([tokens]))}
    cost = OffloadedCost(INNER, TABLE)
    assert cost.bound(found["routed experts"]) == bound
    assert cost.bound(found["feed-forward norm"]) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokens": np.array([1.0, 1.0, 2.0])}, "two or more that ascend"),
        ({"layer_s": np.zeros(2)}, "one number for each of 3"),
        ({"level_share": np.ones((2, 2))}, "one number for each of 3"),
    ],
)
def test_tables_that_cannot_be_are_told(change: dict[str, np.ndarray], told: str) -> None:
    with pytest.raises(MappingError, match=told):
        replace(TABLE, **change)
