"""Stall-free schedules: no gap between tokens is longer than T(budget), the longest step of so many tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.hardware import load_device
from hwmodels.mapping import Mapping
from hwmodels.step_model import Pieces, StepModel, Tables
from simulator.deployment import Deployment, ReplicaSpec
from simulator.itl import itl
from simulator.orders import ORDERS
from simulator.scheduler import SchedulerConfig
from simulator.simulate import simulate
from simulator.workload import Requests

MAX_TOKENS, MAX_SEQS = 512, 16
ENGINE = Engine("test", "test", {"default": "vllm"}, 1e-3, 1e-5, 0.0, 1.0, 2e-3, 0.9, 0.0)
CHECKED = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def model(weights_s: float, token_s: float, pair_s: float) -> StepModel:
    """Weights that are read at least, then time by the token; attention by the token and position."""
    n, s = np.arange(MAX_TOKENS + 1.0), np.arange(MAX_SEQS + 1.0)
    tables = Tables(
        linear=np.maximum(weights_s, token_s * n).tolist(),
        shared=np.zeros(4 * MAX_TOKENS + 1).tolist(),
        head=(1e-5 * s).tolist(),
        decode=Pieces((), ((1e-5 * (s > 0)).tolist(),), ((1e-7 * s).tolist(),)),
        prefill=Pieces((), ((pair_s * n * n / 2).tolist(),), ((pair_s * n).tolist(),)),
    )
    return StepModel([tables], np.zeros(MAX_TOKENS + 1).tolist(), ENGINE, MAX_TOKENS, MAX_SEQS)


def longest_s(steps: StepModel, budget: int, prompt_tokens: int, config: SchedulerConfig) -> float:
    """T(budget): decodes of the longest context, and prompt tokens in as few or many prompts as there may be."""
    longest = config.max_context_tokens
    found = []
    for decodes in range(min(config.max_seqs, budget) + 1):
        new = min(budget - decodes, prompt_tokens)
        room = min(new, max(config.max_seqs - decodes, 0))
        for prompts in {0, min(1, room), room}:
            parts = [new // prompts + (i < new % prompts) for i in range(prompts)]
            items = [(part, longest) for part in parts]
            if decodes or items:
                found.append(steps.step_s(decodes, decodes * longest, items))
    return max(found)


@st.composite
def traffic(draw: st.DrawFn) -> Requests:
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrival_s = np.cumsum(rng.exponential(draw(st.sampled_from([1e-3, 1e-2, 0.1])), count))
    classes = rng.integers(0, 2, count).astype(np.int16)
    return Requests(arrival_s, rng.integers(1, 300, count), rng.integers(1, 100, count), classes, ("a", "b"))


@CHECKED
@given(
    traffic(),
    st.sampled_from([16, 40, 128, 400]),
    st.sampled_from([None, 5, 16]),
    st.sampled_from([1, 4, MAX_SEQS]),
    st.sampled_from(ORDERS),
    st.floats(1e-4, 1e-2),
    st.floats(1e-6, 1e-4),
    st.floats(0.0, 1e-7),
)
def test_no_gap_is_longer_than_a_full_step(
    requests: Requests,
    budget: int,
    chunk: int | None,
    seqs: int,
    order: str,
    weights_s: float,
    token_s: float,
    pair_s: float,
) -> None:
    """Of any policy that fills steps up to a budget, in any order, with any step times that grow with the tokens."""
    config = SchedulerConfig(
        "chunked",
        max_seqs=seqs,
        token_budget=budget,
        max_context_tokens=400,
        chunk_tokens=chunk,
        order=order,  # type: ignore[arg-type]
        ageing_tokens_per_s=100.0,
        targets_s=(0.1, 1.0),
    )
    steps = model(weights_s, token_s, pair_s)
    result = simulate(Deployment([ReplicaSpec(steps, Mapping(), config, 10_000, load_device("h100-sxm"))]), requests)
    assume(not result.requests.preemptions.any())  # a sequence that another class throws out does stall
    gaps, _ = itl(result)
    limit = longest_s(steps, budget, budget if chunk is None else chunk, config)
    assert (gaps <= limit * (1 + 1e-9)).all()
    tpot = result.requests.tpot_s.to_numpy()
    assert (tpot[~np.isnan(tpot)] <= limit * (1 + 1e-9)).all()


@pytest.mark.parametrize("policy", ["prefill-first", "orca"])
def test_whole_prompts_do_stall(policy: str) -> None:
    """Under the budget's step time of a chunked scheduler, gaps of these are longer: the law tells them apart."""
    steps = model(1e-3, 5e-5, 1e-8)
    requests = Requests(np.array([0.0, 0.01, 0.01]), np.array([20, 300, 300]), np.array([50, 2, 2]))
    gaps = {}
    for name, budget in ((policy, 400), ("chunked", 40)):
        config = SchedulerConfig(name, max_seqs=4, token_budget=budget, max_context_tokens=400)  # type: ignore[arg-type]
        spec = ReplicaSpec(steps, Mapping(), config, 10_000, load_device("h100-sxm"))
        gaps[name] = itl(simulate(Deployment([spec]), requests))[0].max()
        limit = longest_s(steps, 40, 40, config)
    assert gaps["chunked"] <= limit < gaps[policy]
