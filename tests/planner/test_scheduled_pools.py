"""Pools for prefill, decode and shared devices: which chunks, orders and overlaps are looked at, and told apart."""

from __future__ import annotations

import numpy as np

from planner.catalogue import open_catalogue
from planner.prefillqueue import prefill_capacities
from planner.question import Question
from planner.schedules import Schedules
from planner.sharedplans import _cuts
from planner.sizing import degrees, offer, phase_pools
from planner.space import Choices
from simulator.limits import Limit
from simulator.workload import Requests

SCHEDULES = Schedules(
    chunk_tokens=(None, 256), orders=("shortest", "fcfs"), ageing_tokens_per_s=50.0, overlaps=("none", "two-way")
)


def asked() -> Question:
    choices = Choices(token_budgets=(2048,), max_seqs=(64,), schedules=SCHEDULES)
    requests = Requests(np.arange(200.0), np.full(200, 1500), np.full(200, 100))
    return Question("llama-3.1-8b", "h100-sxm", 4, requests, limits=(Limit("ttft", "p99", 2.0),), choices=choices)


def test_phases_are_looked_at_with_each_overlap_in_one_order() -> None:
    """Neither the queue of prompts nor the law of the batch knows orders; without decodes a chunk is a budget."""
    question = asked()
    catalogue = open_catalogue(question.model, question.hardware, question.gpus, question.engine)
    pools = list(phase_pools(question, catalogue, None))
    assert {(pool.role, pool.overlap) for pool in pools} == {
        (role, overlap) for role in ("prefill", "decode") for overlap in ("none", "two-way")
    }
    assert {pool.overlap for pool in pools if pool.tp == 1} == {"none"}  # which has nothing to overlap
    assert {(pool.order, pool.chunk_tokens, pool.policy) for pool in pools} == {("shortest", None, "chunked")}
    assert len({(pool.role, degrees(pool)) for pool in pools}) == len(pools)


def test_replicas_that_differ_in_overlap_are_options_of_their_own() -> None:
    question = asked()
    catalogue = open_catalogue(question.model, question.hardware, question.gpus, question.engine)
    options = offer(question, catalogue, None).options
    prefill = {pool.overlap: pool for pool, _ in options.values() if (pool.role, pool.tp, pool.pp) == ("prefill", 2, 1)}
    assert set(prefill) == {"none", "two-way"}
    specs = [catalogue.replica(prefill[overlap]) for overlap in ("none", "two-way")]
    plain, quick = prefill_capacities(specs, question.requests, question.limits)
    assert quick.rate_per_s > 1.02 * plain.rate_per_s


def test_shared_devices_schedule_by_their_own_rule() -> None:
    question = asked()
    catalogue = open_catalogue(question.model, question.hardware, question.gpus, question.engine)
    pools = _cuts(question, catalogue)
    assert pools and {(pool.order, pool.overlap, pool.chunk_tokens) for pool in pools} == {("fcfs", "none", None)}
