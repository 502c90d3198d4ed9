"""Every legal plan and only those: laws hold, degrees multiply, counts add up, and brute force finds the same."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from planner.catalogue import Catalogue, law_broken, mapping_of, open_catalogue
from planner.scheduling import scheduler_of
from planner.space import Choices, divisors, enumerate_pools, mappings, placement_broken, replicas_that_fit

SMALL = Choices(token_budgets=(512, 2048), max_seqs=(64, 1024))
CASES = [
    ("llama-3.2-1b", "l4", 4),
    ("llama-3.1-70b", "h100-sxm", 12),
    ("deepseek-v2-lite", "h100-sxm", 8),
    ("qwen3-30b-a3b", "hgx-h100", 16),
    ("gpt-oss-20b", "rtx-4090", 5),
]


def catalogue(model: str, hardware: str, gpus: int) -> Catalogue:
    return open_catalogue(model, hardware, gpus, "vllm")


@pytest.mark.parametrize(("model", "hardware", "gpus"), CASES)
def test_every_pool_obeys_the_laws(model: str, hardware: str, gpus: int) -> None:
    parts = catalogue(model, hardware, gpus)
    shape, cluster = parts.model, parts.cluster
    space = enumerate_pools(parts, SMALL, 4096)
    assert space.pools
    for pool, kv_blocks in space.pools:
        mapping = mapping_of(pool)
        assert law_broken(shape, mapping) is None
        assert placement_broken(mapping, cluster) is None
        assert pool.gpus_per_replica == pool.tp * pool.pp * pool.attention_dp == mapping.gpus <= gpus
        if shape.is_moe:
            assert pool.ep * pool.expert_tp == pool.tp * pool.attention_dp
        else:
            assert pool.ep == pool.expert_tp == pool.attention_dp == 1
        for layer in shape.layers:
            assert layer.attention.heads % pool.tp == 0
            if layer.feed_forward.experts:
                assert layer.feed_forward.experts % pool.ep == 0
                assert layer.feed_forward.intermediate % pool.expert_tp == 0
        assert kv_blocks * pool.block_tokens >= 4096
        assert scheduler_of(pool).token_budget >= (4096 if pool.policy != "chunked" else 1)
        assert replicas_that_fit(pool.gpus_per_replica, cluster) >= 1
    assert len(set(space.pools)) == len(space.pools)


@pytest.mark.parametrize(("model", "hardware", "gpus"), CASES)
def test_pools_and_broken_laws_add_up_to_everything_looked_at(model: str, hardware: str, gpus: int) -> None:
    parts = catalogue(model, hardware, gpus)
    space = enumerate_pools(parts, SMALL, 4096)
    looked_at = len(list(mappings(parts.model, parts.cluster))) * (2 + 1) * 2  # chunked budgets + whole, by max_seqs
    assert len(space.pools) + space.broken.total() == looked_at
    assert min(space.broken.values(), default=1) > 0


def test_counts_of_a_small_dense_model_by_hand() -> None:
    """Llama-3.2-1B has 32 heads, 8 KV heads and 16 layers: on four devices tp 1, 2, 4 with any pp that is left room."""
    parts = catalogue("llama-3.2-1b", "l4", 4)
    assert sorted((m.tp, m.pp) for m in mappings(parts.model, parts.cluster)) == [
        (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (4, 1),
    ]  # fmt: skip
    space = enumerate_pools(parts, SMALL, 4096)
    assert len(space.pools) == 7 * (1 + 2 + 2)  # 1024 sequences do not go into a budget of 512
    assert space.broken == {"max_seqs is at most token_budget": 7}


def test_mappings_against_brute_force() -> None:
    """No legal degrees are missed: all products up to the devices, held against the laws."""
    for model, gpus in (("llama-3.2-1b", 6), ("deepseek-v2-lite", 6), ("gpt-oss-20b", 4)):
        shape, cluster = load_model(model), load_cluster("h100-sxm", gpus)
        degrees = range(1, gpus + 1)
        expected = {
            mapping
            for mapping in (Mapping(a, b, c, d, e) for a, b, c, d, e in product(degrees, repeat=5))
            if mapping.gpus <= gpus and law_broken(shape, mapping) is None
        }
        found = [mapping for mapping in mappings(shape, cluster) if law_broken(shape, mapping) is None]
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_more_memory_for_longer_requests_takes_plans_out() -> None:
    parts = catalogue("llama-3.1-8b", "rtx-4090", 4)
    sizes = [len(enumerate_pools(parts, SMALL, longest).pools) for longest in (128, 8192, 32768, 131072)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


def test_formats_the_device_cannot_multiply_are_counted() -> None:
    parts = catalogue("llama-3.2-1b", "a100-80-sxm", 2)
    both = Choices(precisions=(Precision(), Precision("fp8", "fp8", "bf16")), policies=("chunked",), max_seqs=(8,))
    space = enumerate_pools(parts, both, 1024)
    assert space.broken["the device multiplies in the format"] == len(space.pools) > 0


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number / d == number // d]


@pytest.mark.parametrize(("hardware", "gpus"), [("h100-sxm", 8), ("h100-sxm", 16), ("h100-sxm", 12), ("l4", 5)])
def test_replicas_that_fit_against_packing(hardware: str, gpus: int) -> None:
    cluster = load_cluster(hardware, gpus)
    node = cluster.gpus_per_node
    for size in range(1, gpus + 1):
        if size > node and size % node:
            continue
        nodes = [min(node, gpus - start) for start in range(0, gpus, node)]
        whole = sum(room == node for room in nodes) // max(1, size // node)
        assert replicas_that_fit(size, cluster) == (whole if size > node else sum(room // size for room in nodes))
