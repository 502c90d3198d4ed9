"""What placements cost on real hardware: the arithmetic of a choice, and links within and between nodes."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Precision
from hwmodels.routing import uniform
from planner.errors import PlanError
from planner.placementcosts import problem_of, seconds_per_choice


def test_a_choice_costs_what_its_arithmetic_takes_at_a_rate_the_device_has() -> None:
    model, cluster = load_model("mixtral-8x7b"), load_cluster("h100-sxm", 4)
    block = model.layers[0].feed_forward
    flops = 3 * 2 * model.hidden * block.intermediate
    for name in ("bf16", "fp8"):
        ideal = flops / cluster.device.peak_flops_per_s[name]
        assert ideal < seconds_per_choice(model, block, cluster, Precision(name, name)) < 6 * ideal


def test_a_problem_has_the_links_of_its_cluster() -> None:
    """Two nodes of eight: NVLink within, the slower network between, nothing to oneself."""
    model, cluster = load_model("mixtral-8x7b"), load_cluster("hgx-h100", 16)
    problem = problem_of(uniform(model), model, cluster, Precision("fp8", "fp8"), 1, 8, 1000)
    assert problem.tokens == 2000 and problem.bytes_per_token == model.hidden
    assert problem.node_of.tolist() == [0] * 8 + [1] * 8
    near, far = problem.link_s[0, 1], problem.link_s[0, 8]
    assert far > 3 * near > 0
    assert problem.link_s[:8, :8][~np.eye(8, dtype=bool)] == pytest.approx(near)
    assert problem.link_s[:8, 8:] == pytest.approx(far)


def test_slots_that_do_not_suffice() -> None:
    model, cluster = load_model("mixtral-8x7b"), load_cluster("hgx-h100", 4)
    with pytest.raises(PlanError, match="4 slots are missing"):
        problem_of(uniform(model), model, cluster, Precision(), 1, 0, 1000)
