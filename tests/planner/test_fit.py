"""A model that fits no plan: by how much, and the cluster that would do."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hwmodels.hardware import load_cluster
from hwmodels.mapping import Precision
from hwmodels.memory import GIB
from planner.catalogue import Catalogue, open_catalogue
from planner.errors import NoFeasiblePlanError
from planner.fit import nothing_fits, shortest
from planner.question import Question
from planner.search import search
from planner.space import Choices, enumerate_pools
from simulator.limits import Limit
from simulator.workload import Requests

LIMITS = (Limit("ttft", "p99", 10.0),)


def question(model: str, hardware: str, gpus: int, longest: int = 2000, choices: Choices | None = None) -> Question:
    requests = Requests(np.arange(3.0), np.full(3, longest - 100), np.full(3, 100))
    return Question(model, hardware, gpus, requests, limits=LIMITS, choices=choices or Choices())


def fits(asked: Question, gpus: int, longest: int = 2000) -> bool:
    catalogue = open_catalogue(asked.model, asked.hardware, gpus, asked.engine)
    return bool(enumerate_pools(catalogue, asked.choices, longest).pools)


@pytest.mark.parametrize(
    ("model", "hardware", "gpus"),
    [("llama-3.1-70b", "h100-sxm", 1), ("yi-34b", "rtx-4090", 1), ("deepseek-v2-lite", "l4", 1)],
)
def test_the_smallest_cluster_that_would_do_does_and_none_before_it(model: str, hardware: str, gpus: int) -> None:
    asked = question(model, hardware, gpus)
    catalogue = open_catalogue(model, hardware, gpus, asked.engine)
    said = str(nothing_fits(asked, catalogue, 2000))
    if not catalogue.model.is_moe:  # some of whose experts may be left to the host
        with pytest.raises(NoFeasiblePlanError, match=re.escape(said)):
            search(asked)
    found = re.search(r"(\d+\.\d) GiB short .* smallest cluster that would do is (\d+) x", said)
    assert found is not None, said
    assert "\n" not in said
    assert float(found[1]) > 0
    smallest = int(found[2])
    assert smallest > gpus
    assert fits(asked, smallest)
    assert not any(fits(asked, fewer) for fewer in range(gpus, smallest))


def test_what_is_missing_is_what_the_weights_alone_need_and_more() -> None:
    """70.6 G parameters in bf16 on one H100: 131.4 GiB of weights, of which less than 74.5 GiB fit."""
    asked = question("llama-3.1-70b", "h100-sxm", 1)
    catalogue = open_catalogue(asked.model, asked.hardware, 1, asked.engine)
    missing = shortest(asked, catalogue, 2000)
    weights = 70.55e9 * 2
    usable = catalogue.cluster.device.memory_bytes * catalogue.engine.memory_fraction
    assert weights - usable < missing < weights - usable + 8 * GIB


def test_nothing_is_missing_where_it_fits() -> None:
    asked = question("llama-3.2-1b", "h100-sxm", 1)
    assert shortest(asked, open_catalogue(asked.model, asked.hardware, 1, asked.engine), 2000) <= 0


def test_narrower_weights_miss_less() -> None:
    narrow = Choices(precisions=(Precision("int4", "bf16", "bf16"),))
    wide, slim = question("llama-3.1-70b", "l4", 1), question("llama-3.1-70b", "l4", 1, choices=narrow)
    catalogue = open_catalogue("llama-3.1-70b", "l4", 1, "vllm")
    assert shortest(slim, catalogue, 2000) < shortest(wide, catalogue, 2000) / 2


def test_formats_the_device_lacks_are_what_is_told() -> None:
    asked = question("llama-3.1-8b", "a100-80-sxm", 1, choices=Choices(precisions=(Precision("fp8", "fp8", "fp8"),)))
    with pytest.raises(NoFeasiblePlanError, match=r"activations in fp8: .* multiplies in"):
        search(asked)


def test_nothing_is_counted_where_the_format_is_the_problem() -> None:
    """Falcon-180B on a phone: first of all its device cannot multiply in the format."""
    asked = question("falcon-180b", "snapdragon-8-gen3", 1)
    cluster = load_cluster(asked.hardware, 1)
    catalogue = Catalogue(open_catalogue(asked.model, "h100-sxm", 1, "vllm").model, cluster, open_catalogue(
        "llama-3.2-1b", asked.hardware, 1, "vllm").engine)  # fmt: skip
    said = str(nothing_fits(asked, catalogue, 2000))
    assert "\n" not in said
    assert "activations in bf16" in said
