"""Orders of the queue, chunks below the budget, and prompts that pass the layers in groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.engine import Engine
from hwmodels.errors import MappingError
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import StepModel, compile_step_model
from simulator.deployment import Deployment, ReplicaSpec
from simulator.errors import PoolError, SchedulerError
from simulator.itl import itl
from simulator.result import Result
from simulator.scheduler import Scheduler, SchedulerConfig
from simulator.simulate import simulate
from simulator.workload import Requests

ENGINE = Engine("test", "test", {"default": "vllm"}, 1e-3, 1e-5, 2e-3, 1.0, 0.0, 0.9, 0.0)
CLUSTER = load_cluster("h100-sxm", 8)
NAMES = ("llama-3.1-8b", "mixtral-8x7b", "deepseek-v2-lite", "qwen3-30b-a3b")


@pytest.fixture(scope="module")
def models() -> dict[str, StepModel]:
    mapping = Mapping(tp=2, expert_tp=2)
    return {
        name: compile_step_model(
            load_model(name),
            mapping if load_model(name).is_moe else Mapping(tp=2),
            Precision(),
            ENGINE,
            AnalyticCost(CLUSTER, mapping),
            max_tokens=4096,
            max_seqs=64,
        )
        for name in NAMES
    }


def served(model: StepModel, config: SchedulerConfig, requests: Requests, blocks: int = 10_000) -> Result:
    spec = ReplicaSpec(model, Mapping(), config, blocks, CLUSTER.device)
    return simulate(Deployment([spec]), requests)


def asked(*rows: tuple[float, int, int], classes: tuple[int, ...] | None = None) -> Requests:
    arrival_s, prompts, outputs = (np.array(column) for column in zip(*rows, strict=True))
    if classes is None:
        return Requests(arrival_s, prompts, outputs)
    return Requests(arrival_s, prompts, outputs, np.array(classes), ("urgent", "patient"))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    sequences=st.integers(0, 60),
    mean=st.integers(1, 4000),
    items=st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 2000)), min_size=1, max_size=3),
    groups=st.integers(1, 12),
)
def test_groups_of_layers_add_up_to_all_of_them(models, name, sequences, mean, items, groups) -> None:
    """What prompts add to decodes, group by group, is what they add to one step through all layers."""
    model = models[name]
    context = sequences * mean
    decodes = model.step_s(sequences, context, ()) if sequences else model.overhead_s(0, False)
    host = model.overhead_s(sequences, True) - model.overhead_s(sequences, False)
    added = [model.group_step_s(sequences, context, items, group, groups) - decodes - host for group in range(groups)]
    together = model.step_s(sequences, context, items) - decodes - host
    assert sum(added) == pytest.approx(together, rel=0.02, abs=1e-6)
    assert min(added) >= -1e-9


def test_a_cohort_passes_one_group_of_layers_a_step(models) -> None:
    model = models["mixtral-8x7b"]
    config = SchedulerConfig("layered", 64, 4096, group_tokens=512, max_groups=16)
    result = served(model, config, asked((0.0, 1000, 1), (0.0, 1001, 1)))
    expected = sum(model.group_step_s(0, 0, [(1000, 0), (1001, 0)], group, 4) for group in range(4))
    assert result.requests.first_token_s.tolist() == pytest.approx([expected] * 2)
    assert result.steps.prefill_tokens.tolist() == [0, 0, 0, 2001]


def test_decodes_go_on_while_a_cohort_passes(models) -> None:
    """The longest wait between tokens of a running sequence is that for a group, not for the prompt."""
    model = models["mixtral-8x7b"]
    requests = asked((0.0, 10, 200), (0.5, 4000, 2))
    whole, grouped = (
        itl(served(model, SchedulerConfig(policy, 64, 4096), requests))[0].max()  # type: ignore[arg-type]
        for policy in ("orca", "layered")
    )
    assert grouped < 0.3 * whole


@pytest.mark.parametrize(("name", "low", "high"), [("qwen3-30b-a3b", 0.6, 0.9), ("llama-3.1-8b", 1.0, 1.3)])
def test_many_experts_gain_from_groups_of_layers_and_dense_layers_do_not(models, name, low, high) -> None:
    """A prompt beside four decodes, cut into layers or into chunks for as many steps.

    Chunks read nearly all of 128 experts each, layers read them once in all; what is read for four decodes is little
    beside it. A dense layer is read by the decodes in any case (Layered Prefill, arXiv:2510.08055: TTFT -70 % at best).
    """
    model, prompt, chunk = models[name], 4000, 512
    chunks = [(min(chunk, prompt - done), done) for done in range(0, prompt, chunk)]
    cut_tokens = sum(model.step_s(4, 4 * 500, [item]) for item in chunks)
    cut_layers = sum(model.group_step_s(4, 4 * 500, [(prompt, 0)], group, len(chunks)) for group in range(len(chunks)))
    assert low < cut_layers / cut_tokens < high


@pytest.mark.parametrize("mapping", [Mapping(pp=2), Mapping(attention_dp=2, ep=2)])
def test_layers_pass_in_groups_on_one_stage_and_one_attention_group_only(models, mapping: Mapping) -> None:
    with pytest.raises(PoolError, match=r"policy layered with pp=.*expected 1 and 1"):
        ReplicaSpec(models["mixtral-8x7b"], mapping, SchedulerConfig("layered"), 100, CLUSTER.device)
    bare = StepModel(models["mixtral-8x7b"].stages, [0.0] * 4097, ENGINE, 4096, 64)
    with pytest.raises(MappingError, match="layers in groups"):
        bare.group_step_s(0, 0, [(5, 0)], 0, 2)


def first_tokens(model: StepModel, requests: Requests, **fields) -> list[int]:
    """Requests in the order of their first tokens, one running at a time."""
    found = served(model, SchedulerConfig(max_seqs=1, token_budget=4096, **fields), requests)
    return found.requests.first_token_s.to_numpy().argsort(kind="stable").tolist()


def test_the_shortest_prompt_goes_first_until_others_have_aged(models) -> None:
    model = models["llama-3.1-8b"]
    requests = asked((0.0, 100, 300), (0.01, 3000, 2), (0.02, 500, 2), (0.4, 2500, 2), (0.41, 20, 2))
    assert first_tokens(model, requests) == [0, 1, 2, 3, 4]
    assert first_tokens(model, requests, order="shortest") == [0, 4, 2, 3, 1]
    # 0.39 s of waiting are 780 tokens at 2,000 tokens a second: more than 3,000 - 2,500, less than 500 - 20.
    assert first_tokens(model, requests, order="shortest", ageing_tokens_per_s=2000.0) == [0, 2, 4, 1, 3]


def test_deadlines_order_by_arrival_and_target(models) -> None:
    model = models["llama-3.1-8b"]
    requests = asked((0.0, 100, 200), (0.01, 50, 2), (0.05, 50, 2), (0.2, 50, 2), classes=(0, 1, 1, 0))
    assert first_tokens(model, requests, order="deadline", targets_s=(1.0, 1.1)) == [0, 1, 2, 3]
    assert first_tokens(model, requests, order="deadline", targets_s=(0.1, 0.27)) == [0, 1, 3, 2]
    assert first_tokens(model, requests, order="deadline", targets_s=(1.0,)) == [0, 1, 2, 3]


def test_an_urgent_request_takes_the_place_of_a_patient_one(models) -> None:
    model = models["llama-3.1-8b"]
    requests = asked((0.0, 100, 400), (0.1, 100, 400), (0.2, 100, 5), classes=(1, 1, 0))
    config = SchedulerConfig(max_seqs=2, token_budget=4096, order="priority")
    found = served(model, config, requests).requests
    assert found.preemptions.tolist() == [0, 1, 0]
    assert found.first_token_s[2] - 0.2 < 0.1
    assert found.finish_s[1] > found.finish_s[0]
    patient = served(model, config, asked((0.0, 100, 400), (0.1, 100, 400), (0.2, 100, 5), classes=(1, 1, 1)))
    assert patient.requests.preemptions.sum() == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(8, 40),
)
def test_nobody_runs_while_a_more_urgent_class_waits(
    wanted: list[tuple[int, int, int]], seqs: int, blocks: int
) -> None:
    """After a step is formed, no decoding sequence is of a later class than the head of the queue."""
    prompts, outputs, classes = (list(column) for column in zip(*wanted, strict=True))
    config = SchedulerConfig(max_seqs=seqs, token_budget=256, block_tokens=16, max_context_tokens=128, order="priority")
    scheduler = Scheduler(config, blocks, prompts, outputs)
    scheduler.classes = classes
    for request in range(len(wanted)):
        scheduler.offer(request, float(request))
        for _ in range(2):
            if scheduler.form():
                if scheduler.waiting and scheduler.running:
                    head = classes[scheduler.waiting[0]]
                    assert max(classes[r] for r in scheduler._finish_at) <= head or scheduler.partial >= 0
                scheduler.advance(1)
    for _ in range(10_000):
        if not scheduler.form():
            break
        scheduler.advance(1)
    assert scheduler.unfinished == 0 and scheduler.free == blocks and scheduler.reserved == 0


def test_chunks_below_the_budget_leave_room_for_decodes_alone(models) -> None:
    """SARATHI's fixed chunk: a prompt of 1,000 tokens takes four steps of 256 whatever the budget."""
    model = models["llama-3.1-8b"]
    config = SchedulerConfig(max_seqs=64, token_budget=4096, chunk_tokens=256)
    steps = served(model, config, asked((0.0, 1000, 1))).steps
    assert steps.prefill_tokens.tolist() == [256, 256, 256, 232]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"chunk_tokens": 4096}, "chunk_tokens=4096: expected 1 to the token_budget of 2048"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"policy": "orca", "chunk_tokens": 5}, "chunk_tokens=5 with policy orca: expected chunked"),
        ({"order": "longest"}, "order='longest': expected one of fcfs, shortest, deadline, priority"),
        ({"order": "deadline"}, "order=deadline with targets_s=()"),
        ({"order": "deadline", "targets_s": (1.0, -1.0)}, "expected seconds above 0"),
        ({"order": "shortest", "ageing_tokens_per_s": -1.0}, "ageing_tokens_per_s=-1.0"),
        ({"policy": "static", "order": "shortest"}, "order=shortest with policy static"),
        ({"policy": "layered", "group_tokens": 0}, "group_tokens=0"),
    ],
)
def test_settings_that_cannot_be(fields, told) -> None:
    with pytest.raises(SchedulerError, match=told.replace("(", r"\(").replace(")", r"\)")):
        SchedulerConfig(**fields)
