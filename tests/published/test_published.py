"""Figures that papers publish, reproduced by the simulator; each test names its source and its tolerance."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from hwmodels.engine import Engine
from hwmodels.hardware import load_cluster, load_device
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import Pieces, StepModel, Tables, compile_step_model
from planner.catalogue import open_catalogue
from planner.plan import Plan, Pool
from simulator.deployment import Deployment, ReplicaSpec
from simulator.policies import Policy
from simulator.scheduler import SchedulerConfig
from simulator.simulate import run
from simulator.workload import Fixed, Independent, Poisson, Requests, draw_requests

IDLE_HOST = Engine("idle host", "test", {"default": "vllm"}, 0.0, 0.0, 0.0, 1.0, 0.0, 0.9, 0.0)
PLENTY = 1_000_000  # KV blocks


def at_once(count: int, prompt: int, output: int) -> Requests:
    return Requests(np.zeros(count), np.full(count, prompt), np.full(count, output))


def makespan_s(model: StepModel, mapping: Mapping, config: SchedulerConfig, requests: Requests) -> float:
    """When the last of the requests ends on one replica with memory for all."""
    deployment = Deployment([ReplicaSpec(model, mapping, config, PLENTY, load_device("h100-sxm"))])
    return float(max(run(deployment, requests).finish_s))


# V03: Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, SC 2021,
# section 2.2: the bubble is (p - 1)/m of the ideal time with p stages and m micro-batches, (p - 1)/(v m) when every
# device holds v chunks of layers. The one-way pipeline of an inference engine has the same share.


def bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Idle time of a pipeline over its ideal time."""
    return (stages - 1) / (chunks * micro_batches)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 8), (8, 64), (64, 512)])
def test_v03_pipeline_bubble(stages: int, micro_batches: int) -> None:
    """Equal batches through equal stages; exact."""
    stage_s = 0.01
    nothing = Pieces((), ([0.0, 0.0],), ([0.0, 0.0],))
    tables = Tables([0.0, stage_s], [0.0], [0.0, 0.0], nothing, nothing)
    model = StepModel([tables] * stages, [0.0, 0.0], IDLE_HOST, 1, 1)
    one_request_a_step = SchedulerConfig(max_seqs=1, token_budget=1)
    total_s = makespan_s(model, Mapping(pp=stages), one_request_a_step, at_once(micro_batches, 1, 1))
    ideal_s = micro_batches * stage_s
    assert total_s / ideal_s - 1 == pytest.approx(bubble(stages, micro_batches), rel=1e-9)


def test_v03_published_percentages() -> None:
    """12.3 % for p = 64 and m = 512, 6.2 % with two chunks per device."""
    assert bubble(64, 512) == pytest.approx(0.123, abs=5e-4)
    assert bubble(64, 512, chunks=2) == pytest.approx(0.062, abs=5e-4)


# V18: Yi-34B on two A100 with tensor parallelism, Sarathi-Serve (arXiv:2403.02310), from the data of its repository.

DECODE_MS = {1: 46.8, 2: 47.5, 4: 48.8, 8: 69.7, 16: 77.3, 32: 87.9, 64: 127.8, 128: 189.3}
PREFILL_MS = {512: 105.6, 1024: 214.0, 2048: 366.0, 4096: 758.0, 8192: 1863.0, 16384: 4407.0}
#: (prompt tokens, chunk tokens) and the time of the chunked prompt over that of the whole one.
CHUNKED = {
    (4095, 512): 1.19,
    (4095, 1024): 1.20,
    (4095, 2048): 1.02,
    (2047, 512): 1.15,
    (2047, 1024): 1.17,
    (2047, 2048): 1.00,
}


def decode_line(sizes: list[int]) -> tuple[float, float]:
    """(ms per sequence, ms per step) of a straight line through published decode steps."""
    slope, base = np.polyfit(sizes, [DECODE_MS[size] for size in sizes], 1)
    return float(slope), float(base)


@cache
def yi_34b() -> StepModel:
    """Tokens x time as published; what grows faster than linearly is attention, a constant time per query-key pair.

    That constant is what two prompts of 8192 tokens save over one of 16384; below 512 tokens the decode line begins.
    """
    most = 16384
    per_pair_s = 1e-3 * (PREFILL_MS[16384] - 2 * PREFILL_MS[8192]) / (16384**2 / 2 - 8192**2)
    per_sequence, base = decode_line(list(DECODE_MS))
    sizes = np.array([0, *PREFILL_MS])
    linear_ms = [base, *(ms - 1e3 * per_pair_s * size**2 / 2 for size, ms in PREFILL_MS.items())]
    tokens = np.arange(most + 1.0)
    linear_s = 1e-3 * np.interp(tokens, sizes, linear_ms)
    sequences = np.arange(129.0)
    decode_s = 1e-3 * (base + per_sequence * sequences) - linear_s[:129]
    nothing = Pieces((), (np.maximum(decode_s, 0.0).tolist(),), ([0.0] * 129,))
    prefill = Pieces((), ((per_pair_s * tokens**2 / 2).tolist(),), ((per_pair_s * tokens).tolist(),))
    tables = Tables(linear_s.tolist(), [0.0], [0.0] * 129, nothing, prefill)
    return StepModel([tables], [0.0] * (most + 1), IDLE_HOST, most, 128)


def test_v18_decode_line() -> None:
    """51.6 ms + 1.108 ms per sequence over all points; half of the points predict the other half within 20 %."""
    per_sequence, base = decode_line(list(DECODE_MS))
    assert base == pytest.approx(51.6, abs=0.05)
    assert per_sequence == pytest.approx(1.108, abs=5e-4)
    per_sequence, base = decode_line([1, 4, 16, 64])
    for size in (2, 8, 32, 128):
        assert base + per_sequence * size == pytest.approx(DECODE_MS[size], rel=0.2), size


def test_v18_mixed_step() -> None:
    """1021 prompt tokens and 3 decodes take 217.6 ms, 1024 prompt tokens alone 217.2 ms (table 2); within 5 %."""
    model = yi_34b()
    mixed_s, alone_s = model.step_s(3, 3 * 1024, [(1021, 0)]), model.step_s(0, 0, [(1024, 0)])
    assert mixed_s == pytest.approx(0.2176, rel=0.05)
    assert alone_s == pytest.approx(0.2172, rel=0.05)
    assert abs(mixed_s - alone_s) / 3 < 0.1 * model.step_s(3, 3 * 1024, []) / 3


@pytest.mark.parametrize(("prompt", "chunk"), CHUNKED)
def test_v18_chunk_overhead(prompt: int, chunk: int) -> None:
    """Time of a prompt cut into chunks over that of the whole prompt, within 5 %; no ratio went into the model."""

    def prompt_s(budget: int) -> float:
        config = SchedulerConfig(max_seqs=1, token_budget=budget)
        return makespan_s(yi_34b(), Mapping(), config, at_once(1, prompt, 1))

    assert prompt_s(chunk) / prompt_s(16384) == pytest.approx(CHUNKED[prompt, chunk], rel=0.05)


# V22: LLaMA-13B in fp16 on one RTX A6000, SARATHI (arXiv:2308.16369), priced by the analytic cost model.

SEQUENCES = 18  # of 1024 tokens, what fits beside the weights in 48 GB


@cache
def llama_13b_a6000() -> StepModel:
    cost = AnalyticCost(load_cluster("rtx-a6000", 1), Mapping())
    fp16 = Precision("fp16", "fp16", "fp16")
    return compile_step_model(
        load_model("llama-13b"), Mapping(), fp16, IDLE_HOST, cost, max_tokens=18432, max_seqs=SEQUENCES
    )


def test_v22_decodes_that_ride_along_cost_a_tenth() -> None:
    """12.49 ms per token in a decode-only batch of 4, 1.2 ms beside a prompt of 1021 tokens; ratio within 25 %."""
    model = llama_13b_a6000()
    alone_s = model.step_s(4, 4 * 1024, []) / 4
    riding_s = (model.step_s(3, 3 * 1024, [(1021, 0)]) - model.step_s(0, 0, [(1021, 0)])) / 3
    assert alone_s == pytest.approx(12.49e-3, rel=0.25)
    assert alone_s / riding_s == pytest.approx(12.49 / 1.2, rel=0.25)


def test_v22_end_to_end_gain() -> None:
    """1.33 times the throughput of separate prefill and decode batches; within 25 %.

    A step of 256 tokens, chunk and decodes together, fills whole GEMM tiles; prompts P and outputs D in the ratio
    P:D = C/(B - 1) let every decode ride along. Chunks of 256 tokens besides the decodes spoil the tiles: the paper's
    tile-quantisation effect.
    """
    step, riders = 256, SEQUENCES - 1
    output = round(1024 / (1 + (step - riders) / riders))
    requests = at_once(20 * SEQUENCES, 1024 - output, output)

    def total_s(policy: Policy, budget: int) -> float:
        config = SchedulerConfig(policy, max_seqs=SEQUENCES, token_budget=budget, max_context_tokens=1024)
        return makespan_s(llama_13b_a6000(), Mapping(), config, requests)

    separate_s = total_s("static", SEQUENCES * 1024)
    gain = separate_s / total_s("chunked", step)
    assert gain == pytest.approx(1.33, rel=0.25)
    assert gain > 1.15
    assert gain > 1.1 * separate_s / total_s("chunked", step + riders)


# V25: Llama-3.1-70B on eight H100, measured with vLLM 0.6 (microsoft/apex_plus @8769096): TTFT and TPOT rise from TP8
# over two replicas of TP4 to four of TP2. test_apex_plus.py compares the values.

TRACES = {"creation": (309, 1140), "lmsys": (73, 74), "summarization": (2757, 131)}  # mean prompt and output tokens


@pytest.mark.parametrize("trace", TRACES)
def test_v25_order_of_plans(trace: str) -> None:
    """Under the default engine too."""
    catalogue = open_catalogue("llama-3.1-70b", "hgx-h100", 8, "vllm")
    prompt, output = (Fixed(tokens) for tokens in TRACES[trace])
    requests = draw_requests(np.random.default_rng(1), 200, 0.25, Poisson(), Independent(prompt, output))
    means = []
    for tp in (8, 4, 2):
        pool = Pool(8 // tp, tp=tp, token_budget=512)
        log = run(catalogue.deployment(Plan("llama-3.1-70b", "hgx-h100", 8, (pool,))), requests)
        first, finish = np.array(log.first_token_s), np.array(log.finish_s)
        means.append(((first - requests.arrival_s).mean(), (finish - first).mean()))
    assert means == sorted(means)
    assert [tpot for _, tpot in means] == sorted(tpot for _, tpot in means)
