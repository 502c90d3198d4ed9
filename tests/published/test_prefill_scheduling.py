"""Published prefill scheduling on the linear iteration model: Sarathi-Serve's steps, layered prefill's two sides."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from planner.catalogue import open_catalogue
from planner.plan import Pool
from planner.prefill import clock_of
from planner.prefillcosts import LinearStep, Piece, Span
from planner.prefilllinear import Ranges, TableClock, fit, linearise, predicted
from planner.prefillpolicies import layered, sarathi_serve
from planner.prefillsteps import Running, Schedule, Window, follow, window_of

# V18: Yi-34B on two A100 with tensor parallelism, Sarathi-Serve (arXiv:2403.02310), from the data of its repository:
# sequences and tokens of decode and prefill steps, and their milliseconds.

DECODE_MS = {1: 46.8, 2: 47.5, 4: 48.8, 8: 69.7, 16: 77.3, 32: 87.9, 64: 127.8, 128: 189.3}
PREFILL_MS = {512: 105.6, 1024: 214.0, 2048: 366.0, 4096: 758.0, 8192: 1863.0, 16384: 4407.0}
MIXED_MS, WHOLE_MS = 217.6, 217.2  # 1021 prompt tokens beside 3 decodes; 1024 prompt tokens
#: (prompt, chunk): time of the chunked prompt over that of the whole one.
CHUNKED = {(4095, 512): 1.19, (4095, 1024): 1.20, (4095, 2048): 1.02, (2047, 512): 1.15, (2047, 1024): 1.17}


@cache
def yi_34b(pieces: int) -> LinearStep:
    """The linear model of the published decode and prefill steps."""
    points = [(0, 0, size, 0) for size in DECODE_MS] + [(tokens, 0, 0, 0) for tokens in PREFILL_MS]
    return fit(points, [1e-3 * ms for ms in (*DECODE_MS.values(), *PREFILL_MS.values())], pieces)


def test_v18_the_linear_model_of_the_published_steps() -> None:
    """Two pieces predict prefill within 10 % and decode within the scatter about its line, 51.6 + 1.108 ms."""
    step = yi_34b(2)
    for tokens, ms in PREFILL_MS.items():
        assert 1e3 * predicted(step, (tokens, 0, 0, 0)) == pytest.approx(ms, rel=0.10)
    for size, ms in DECODE_MS.items():
        assert 1e3 * predicted(step, (0, 0, size, 0)) == pytest.approx(51.6 + 1.108 * size, rel=0.10)
        assert 1e3 * predicted(step, (0, 0, size, 0)) == pytest.approx(ms, rel=0.18)


def test_v18_mixed_step_and_decodes_beside_a_prompt() -> None:
    """1021P+3D, not fitted, within 12 % of 217.6 ms; the decodes beside the prompt cost below 1 %, as measured."""
    step = yi_34b(2)
    mixed = 1e3 * step.step_s(3, 0, [Span(1021, 0, 0, 1)])
    whole = 1e3 * step.step_s(0, 0, [Span(1024, 0, 0, 1)])
    assert mixed == pytest.approx(MIXED_MS, rel=0.12)
    assert mixed / whole == pytest.approx(MIXED_MS / WHOLE_MS, abs=0.01)


def test_v18_chunks_cost_what_steps_cost() -> None:
    """Chunked over whole prompts, none of them fitted, within 11 points; a single base for all steps overrates them."""
    for (prompt, chunk), published in CHUNKED.items():
        spans = [Span(min(chunk, prompt - at), at, 0, 1) for at in range(0, prompt, chunk)]
        ratios = {n: sum(yi_34b(n).step_s(0, 0, [s]) for s in spans) / yi_34b(n).alone_s(prompt) for n in (1, 2)}
        assert ratios[2] == pytest.approx(published, abs=0.11)
        assert ratios[1] > ratios[2]


# V24: layered prefill on a dense model is worse than chunks, on a mixture of experts better. Qwen3-8B and Qwen3-30B-A3B
# on one H100 under the profile vllm; prompts of 500 to 8000 tokens at 1.5 per second beside 12 decodes; chunks of 512
# tokens, and one group of layers for every 512 tokens of a cohort.


@cache
def clock(model: str) -> TableClock:
    """The step model on one device."""
    return clock_of(open_catalogue(model, "h100-sxm", 8, "vllm"), Pool(1), 9000)[0]


def long_prompts() -> Window:
    """The traffic described above."""
    rng = np.random.default_rng(0)
    n = 150
    arrivals = np.cumsum(rng.exponential(1 / 1.5, n)).tolist()
    prompts, outputs = rng.integers(500, 8000, n).tolist(), rng.integers(50, 250, n).tolist()
    return window_of(arrivals, prompts, outputs, [Running(3000, 200)] * 12)


def schedules(model: str, linear: bool) -> tuple[Schedule, Schedule]:
    """Chunked and layered, on the step model or on its linear one."""
    on = linearise(clock(model), Ranges(decodes=(4, 32)), 2).step if linear else clock(model)
    return follow(long_prompts(), sarathi_serve(512), on), follow(long_prompts(), layered(), on)


@pytest.mark.parametrize("linear", [True, False])
def test_v24_layers_are_worse_than_chunks_on_a_dense_model(linear: bool) -> None:
    """Longer to the first token and between tokens: weights are hidden behind the arithmetic of a chunk already."""
    chunked, layers = schedules("qwen3-8b", linear)
    assert layers.mean_ttft_s > 1.05 * chunked.mean_ttft_s
    assert layers.tbt_s(0.99) > 1.05 * chunked.tbt_s(0.99)


@pytest.mark.parametrize("linear", [True, False])
def test_v24_layers_are_better_than_chunks_on_experts(linear: bool) -> None:
    """At least a quarter less to the first token, 70 % at most as published, and shorter gaps too."""
    chunked, layers = schedules("qwen3-30b-a3b", linear)
    assert 0.30 * chunked.mean_ttft_s < layers.mean_ttft_s < 0.75 * chunked.mean_ttft_s
    assert layers.tbt_s(0.99) < 0.95 * chunked.tbt_s(0.99)


def test_v24_turns_on_the_reload() -> None:
    """The same model with and without a reload of experts: nothing else decides which side wins."""
    for reload_s, better in ((0.02, True), (0.0, False)):
        step = LinearStep((Piece(0.012, 1e-6, 2e-5, reload_s), Piece(0.0, 8e-6, 8e-6)), 1e-10, 1e-9, 1e-3, 1e-3, 48)
        chunked, layers = (follow(long_prompts(), policy, step) for policy in (sarathi_serve(512), layered()))
        assert (layers.mean_ttft_s < chunked.mean_ttft_s) == better
