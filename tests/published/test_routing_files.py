"""Recorded expert counts (../shared/reference/moe_routing): shapes, skew, and the busiest rank they lead to.

SGLANG    five dumps of DeepSeek-V3/R1 attached to sgl-project/sglang issue 6017: counts of 61 layers x 256 experts
FIDDLER   three of Mixtral-8x7B from efeslab/fiddler (arXiv:2402.07033), 32 layers x 8 experts
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hwmodels.busiest import busiest_rank
from hwmodels.huggingface import load_model
from hwmodels.routing import RoutingError, RoutingStats, rank_shares
from hwmodels.routingfiles import read_routing
from simulator.choicedraws import Chooser, draw_counts, split_counts
from simulator.routingdraws import fit_skew, lognormal, matched_skew, power_law

FOLDER = Path(__file__).resolve().parents[3] / "shared/reference/moe_routing"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/reference/moe_routing")

SGLANG = ("decode_in1000out1000", "decode_in2000out100", "prefill_in1024", "prefill_in1800out100", "prefill_in4096")
FIDDLER = ("college_computer_science", "college_medicine", "high_school_biology")


def sglang(name: str) -> RoutingStats:
    return read_routing(FOLDER / f"{name}.json.gz", load_model("deepseek-v3"))


def fiddler(name: str) -> RoutingStats:
    return read_routing(FOLDER / f"mixtral_8x7b_original__expert_popularity_{name}.json", load_model("mixtral-8x7b"))


def made(stats: RoutingStats, shape: Callable[[int, float], np.ndarray]) -> np.ndarray:
    """[L, E] shares of `shape` with each layer's coefficient of variation, largest first."""
    return np.stack([shape(stats.experts, skew) for skew in matched_skew(stats, shape)])


def blocks(experts: int, ranks: int) -> np.ndarray:
    return rank_shares(np.ones(experts), [[e * ranks // experts] for e in range(experts)], ranks)


@pytest.mark.parametrize("name", SGLANG)
def test_deepseek_dumps_are_counts_of_its_58_mixture_layers(name: str) -> None:
    stats = sglang(name)
    stats.check(load_model("deepseek-r1"))
    assert stats.loads.shape == (58, 256) and stats.layers == tuple(range(3, 61))
    # Every layer sees the same tokens, but for 0.02 % in one dump.
    assert np.ptp(stats.loads.sum(axis=1)) / stats.loads.sum(axis=1).mean() < 2e-4
    with pytest.raises(RoutingError, match="layers: expected rows for its 32 mixture layers of mixtral-8x7b"):
        read_routing(FOLDER / f"{name}.json.gz", load_model("mixtral-8x7b"))


@pytest.mark.parametrize("name", FIDDLER)
def test_mixtral_counts_are_two_choices_of_every_token(name: str) -> None:
    stats = fiddler(name)
    stats.check(load_model("mixtral-8x7b"))
    assert np.ptp(stats.loads.sum(axis=1)) == 0 and stats.loads.sum(axis=1)[0] % 2 == 0


@pytest.mark.parametrize("name", SGLANG + FIDDLER)
def test_a_lognormal_describes_the_skew_better_than_a_power_law(name: str) -> None:
    """Means over layers: DeepSeek's exponents are 0.59-0.80 (r2 0.86-0.90), sigmas 0.59-0.82 (r2 0.97-0.99)."""
    fit = fit_skew(sglang(name) if name in SGLANG else fiddler(name))
    low, high = (0.55, 0.85) if name in SGLANG else (0.15, 0.35)
    assert low < fit.exponent.mean() < high and low < fit.sigma.mean() < high
    assert fit.sigma_r2.mean() > fit.exponent_r2.mean() + 0.05
    assert (fit.sigma_r2 > fit.exponent_r2).mean() > 0.8


@pytest.mark.parametrize("name", SGLANG)
def test_a_made_up_skew_has_the_imbalance_of_the_recorded(name: str) -> None:
    """Busiest of 32 ranks over their mean, experts shuffled: the matched lognormal is within 3 %, a power law above."""
    stats, rng = sglang(name), np.random.default_rng(0)

    def imbalance(shares: np.ndarray) -> float:
        drawn = [rng.permutation(row).reshape(32, 8).sum(axis=1).max() * 32 for row in shares for _ in range(50)]
        return float(np.mean(drawn))

    real = imbalance(stats.shares)
    assert imbalance(made(stats, lognormal)) == pytest.approx(real, rel=0.03)
    assert 1.05 < imbalance(made(stats, power_law)) / real < 1.15


def test_contiguous_experts_overload_one_of_32_ranks() -> None:
    """Busiest over mean of 8 neighbouring experts a rank, mean over layers, at any number of tokens large enough."""
    wanted = (2.88, 2.63, 2.29, 2.55, 3.04)
    for name, ratio in zip(SGLANG, wanted, strict=True):
        stats = sglang(name)
        table = busiest_rank(stats, blocks(256, 32), (2**16, 2**20))
        assert (table.rows / table.mean)[:, 1].mean() == pytest.approx(ratio, abs=0.01)
        assert (stats.shares @ blocks(256, 32).T).max(axis=1).mean() * 32 == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("name", ["decode_in2000out100", "prefill_in4096"])
@pytest.mark.parametrize("tokens", [16, 512, 32768])
def test_expected_maximum_of_deepseek_against_sampling(name: str, tokens: int) -> None:
    """Within 2 % of 3,000 sampled steps in the first, a middle and the last layer."""
    stats, rng = sglang(name), np.random.default_rng(tokens)
    tables = {ep: busiest_rank(stats, blocks(256, ep), (tokens, 2 * tokens)) for ep in (8, 32, 64)}
    for row in (0, 28, 57):
        counts = draw_counts(rng, Chooser.of(stats.inclusion[row]), tokens, 3000)
        for ep, table in tables.items():
            busiest = split_counts(rng, counts, blocks(256, ep)).max(axis=1)
            assert table.rows[row, 0] == pytest.approx(busiest.mean(), rel=0.02)


@pytest.mark.parametrize("tokens", [16, 512, 32768])
def test_expected_maximum_of_mixtral_against_sampling(tokens: int) -> None:
    stats, rng = fiddler("college_medicine"), np.random.default_rng(tokens)
    for ep in (2, 4, 8):
        table = busiest_rank(stats, blocks(8, ep), (tokens, 2 * tokens))
        for row in range(0, 32, 8):
            counts = draw_counts(rng, Chooser.of(stats.inclusion[row]), tokens, 10_000)
            busiest = split_counts(rng, counts, blocks(8, ep)).max(axis=1)
            assert table.rows[row, 0] == pytest.approx(busiest.mean(), rel=0.02)
