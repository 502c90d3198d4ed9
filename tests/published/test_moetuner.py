"""MoETuner's gains over contiguous experts: 9.3 % end to end on 8 H100 (EP4 TP2), 17.5 % on 2 x 8 H200 (EP4 TP4).

Mixtral-8x7B, forward passes of 8 sequences of 2,048 tokens, bf16. The routing is assumed, not MoETuner's own: loads as
recorded for Mixtral-8x7B on questions of one subject (fiddler's counts), of whose choices half are taken to follow from
the expert of the layer before, in an order drawn with seed 0. Hidden states move from expert to expert, as MoETuner
counts them, once to be dispatched and once to be combined, over ports of the cluster profiles; the busiest rank's
experts, attention and the tensor-parallel collectives around both are priced by the cost model. Nothing is fitted.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from hwmodels import operators as ops
from hwmodels.collectives import compile_collective
from hwmodels.folding import Fold
from hwmodels.hardware import Cluster, load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from hwmodels.routing import RoutingStats
from hwmodels.routingfiles import read_routing
from planner.placement import Placement, Problem, solve
from simulator.routingdraws import with_transitions

ROUTING = Path(__file__).resolve().parents[3] / "shared" / "reference" / "moe_routing"
FILES = sorted(ROUTING.glob("mixtral_8x7b*.json"))
pytestmark = pytest.mark.skipif(not FILES, reason="no reference data: shared/reference/moe_routing")

#: Hardware, devices, tensor-parallel degree, published gain.
SETTINGS = {"8 H100": ("h100-sxm", 8, 2, 0.093), "2 x 8 H200": ("h200-sxm", 16, 4, 0.175)}
SEQUENCES, LENGTH, RANKS = 8, 2048, 4
TOKENS = SEQUENCES * LENGTH
MODEL = load_model("mixtral-8x7b")
CONCENTRATION = 0.5
WIDE = Precision("bf16", "bf16", "bf16")


@cache
def stats(file: int, concentration: float = CONCENTRATION) -> RoutingStats:
    return with_transitions(read_routing(FILES[file], MODEL), concentration, np.random.default_rng(0))


def both_ways_s(cluster: Cluster, ranks: np.ndarray, nbytes: float) -> float:
    """An all-gather and the reduce-scatter that undoes it."""
    group = tuple(int(rank) for rank in ranks)
    return sum(
        float(compile_collective(cluster, kind, group).time_s(nbytes)) for kind in ("all-gather", "reduce-scatter")
    )


def experts_s(cluster: Cluster, tp: int, rows: float) -> float:
    """One rank's experts with `rows` routed rows."""
    ff = MODEL.layers[0].feed_forward
    op = ops.Experts(
        "experts", np.array([float(TOKENS)]), np.array([rows]), np.array([ff.experts / RANKS]), MODEL.hidden,
        ff.intermediate, ff.experts, ff.top_k, tp, RANKS, True, WIDE,
    )  # fmt: skip
    cost = AnalyticCost(cluster, Mapping())
    return sum(float(cost.time_s(part)[0]) for part in op.parts)


@cache
def elsewhere_s(setting: str) -> float:
    """Seconds of a forward pass that placement does not touch."""
    hardware, gpus, tp, _ = SETTINGS[setting]
    cluster, layer, mine = load_cluster(hardware, gpus), MODEL.layers[0], TOKENS / RANKS
    cost = AnalyticCost(cluster, Mapping())
    one = ops.prefill_attention(layer.attention, np.array([float(LENGTH)]), np.zeros(1), tp, WIDE, 1)
    found = ops.attention_linear(MODEL, layer.attention, np.array([mine]), Mapping(tp=tp), WIDE, 1)
    spent = mine / LENGTH * sum(float(cost.time_s(op)[0]) for op in one)
    spent += sum(float(cost.time_s(op)[0]) for op in found if not isinstance(op, ops.Communication))
    spent += both_ways_s(cluster, np.arange(tp), mine * MODEL.hidden * 2.0)
    return len(MODEL.layers) * spent


def problem(setting: str, routing: RoutingStats) -> Problem:
    """Seconds per row of the busiest rank, its share of the collectives around the experts included."""
    hardware, gpus, tp, _ = SETTINGS[setting]
    cluster = load_cluster(hardware, gpus)
    fold = Fold(tp=tp, dp=RANKS, etp=tp, ep=RANKS, folded=False)
    rows = TOKENS * routing.top_k / RANKS
    around = both_ways_s(cluster, fold.groups("etp")[0], rows * MODEL.hidden * 2.0)
    per_row = (experts_s(cluster, tp, 2 * rows) - experts_s(cluster, tp, rows) + around) / rows
    node = fold.groups("ep")[0] // cluster.gpus_per_node
    assert cluster.intra is not None
    assert cluster.inter is not None
    rates = [fabric.bytes_per_s * fabric.efficiency * tp for fabric in (cluster.inter, cluster.intra)]
    same = node[:, None] == node
    return Problem(
        routing.shares, routing.transitions, RANKS, 2, seconds_per_token=per_row,
        seconds_per_byte=1 / np.where(same, rates[1], rates[0]), bytes_per_token=2 * MODEL.hidden * 2.0,
        tokens=TOKENS * float(routing.top_k), nodes=node.tolist(),
    )  # fmt: skip


@cache
def placed(setting: str, solver: str, file: int = 0, concentration: float = CONCENTRATION) -> Placement:
    limit_s = 1.0 if solver == "tuner" else 60.0  # the second program takes all it gets, the others end by themselves
    return solve(problem(setting, stats(file, concentration)), solver=solver, seconds=limit_s)


def gain(setting: str, solver: str, file: int = 0, concentration: float = CONCENTRATION) -> float:
    """Part of a forward pass with contiguous experts that the solver's placement saves."""
    before, after = (placed(setting, name, file, concentration) for name in ("contiguous", solver))
    whole = elsewhere_s(setting)
    return 1 - (whole + after.objective) / (whole + before.objective)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gain_of_the_tuner(setting: str) -> None:
    """Direction and rough size: within half and one and a half of what is published."""
    found, published = gain(setting, "tuner"), SETTINGS[setting][3]
    print(f"{setting}: tuner {found:.3f}, published {published}")
    assert 0.5 * published < found < 1.5 * published


def test_two_nodes_gain_more_than_one() -> None:
    assert gain("2 x 8 H200", "tuner") > gain("8 H100", "tuner")


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_optimum_gains_at_least_as_much(setting: str) -> None:
    best = placed(setting, "exact")
    print(f"{setting}: optimum {gain(setting, 'exact'):.3f}, gap {best.gap:.4f}")
    assert gain(setting, "exact") >= gain(setting, "tuner") - 1e-9
    assert best.gap < 1e-6


@pytest.mark.parametrize("setting", SETTINGS)
def test_transitions_that_follow_more_gain_more(setting: str) -> None:
    """And the gain that is left without any comes from the load alone."""
    gains = [gain(setting, "exact", concentration=c) for c in (0.0, 0.4, 0.8)]
    print(setting, gains)
    assert 0 < gains[0] < gains[1] < gains[2]


@pytest.mark.parametrize("file", range(len(FILES)))
def test_gain_with_other_recordings(file: int) -> None:
    """Subjects differ in how uneven contiguous experts are; the sign does not."""
    found = {setting: gain(setting, "exact", file) for setting in SETTINGS}
    print(FILES[file].stem, found)
    assert min(found.values()) > 0.03
