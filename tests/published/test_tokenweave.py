"""TokenWeave (arXiv:2505.11329): all-reduces, from which size two halves pay, and what they save on eight H100.

Run as a script for the table. Its measurements are those listed for its repository; no coefficient was fitted to them.
"""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels.collectives import compile_collective
from hwmodels.engine import load_engine
from hwmodels.hardware import load_cluster
from hwmodels.huggingface import load_model
from hwmodels.mapping import Mapping, Precision
from hwmodels.overlap import overlapped_s
from hwmodels.roofline import AnalyticCost
from hwmodels.step_model import kept

CLUSTER = load_cluster("hgx-h100", 8)
#: Microseconds of an all-reduce of n tokens of width 8,192 in bf16 by multimem instructions, by n.
ALL_REDUCE_US = {64: 16.5, 256: 28, 1024: 75, 2048: 136, 4096: 257, 8192: 501, 16384: 986, 32768: 1957}
TOKENS = np.array([256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0])


def ratios(name: str, *, forced: bool = False) -> np.ndarray:
    """Seconds of a step's layers in two halves over those without overlap, by TOKENS; attention itself left out."""
    model, engine = load_model(name), load_engine("vllm")
    mapping = Mapping(tp=8, expert_tp=8) if model.is_moe else Mapping(tp=8)
    cost = AnalyticCost(CLUSTER, mapping)
    two, none = (
        overlapped_s(
            model, model.layers, TOKENS, mapping, Precision(), lambda op: cost.time_s(op) * kept(op, cost, engine),
            units=CLUSTER.device.compute_units, overlap=overlap, forced=forced,
        )
        for overlap in ("two-way", "none")
    )  # fmt: skip
    found: np.ndarray = two / none
    return found


def test_all_reduces_take_what_was_measured() -> None:
    """V11: eight sizes from 1 MB to 512 MB."""
    sizes = np.array([tokens * 8192 * 2.0 for tokens in ALL_REDUCE_US])
    predicted = compile_collective(CLUSTER, "all-reduce", tuple(range(8))).time_s(sizes) * 1e6
    assert predicted == pytest.approx(list(ALL_REDUCE_US.values()), rel=0.1)


def test_a_dense_model_gains_up_to_a_quarter_from_a_thousand_tokens_on() -> None:
    """Published: latency -29 % at most, used from about 1,024 tokens on."""
    found, forced = ratios("llama-3.3-70b"), ratios("llama-3.3-70b", forced=True)
    assert 0.7 < found.min() < 0.8
    fused_alone = found[0]
    assert (forced[:2] > fused_alone).all() and (forced[2:] < fused_alone).all()


def test_a_mixture_loses_below_four_thousand_tokens() -> None:
    """V13: on Mixtral 1,024 tokens in two halves took 69.1 ms instead of 42.9; used from about 4,096 on."""
    found, forced = ratios("mixtral-8x7b"), ratios("mixtral-8x7b", forced=True)
    assert forced[2] > 1.1
    assert (forced[:4] > found[:4] + 0.02).all() and (forced[5:] <= found[5:] + 1e-9).all()


def main() -> None:
    print("step time in two halves over that without overlap, tp 8 on hgx-h100 (attention over the cache left out)")
    print("tokens".ljust(28) + "".join(f"{tokens:8,.0f}" for tokens in TOKENS))
    for name in ("llama-3.3-70b", "qwen2.5-72b", "mixtral-8x22b", "mixtral-8x7b"):
        for forced in (False, True):
            label = f"{name}{', always cut' if forced else ''}"
            print(label.ljust(28) + "".join(f"{ratio:8.3f}" for ratio in ratios(name, forced=forced)))


if __name__ == "__main__":
    main()
