"""Which measured routing stands for what serving shows, held against recorded counts where they are at hand."""

from pathlib import Path

import numpy as np
import pytest

from hwmodels.busiest import busiest_rank
from hwmodels.errors import MeasurementError
from hwmodels.huggingface import load_model
from hwmodels.kernels.expert_routing import RECORDED, exponent_of, load
from hwmodels.kernels.measured import ROUTING
from hwmodels.routingfiles import read_routing

COUNTS = Path(__file__).resolve().parents[4] / "shared" / "reference" / "moe_routing"
MEASURED = ("balanced", "power_law_1.01", "power_law_1.2")


def test_recorded_is_one_of_the_measured():
    assert set(RECORDED.values()) <= set(MEASURED)
    for experts, word in RECORDED.items():
        assert exponent_of(ROUTING, experts) == exponent_of(word)


def test_recorded_without_a_number_of_experts_is_refused():
    with pytest.raises(MeasurementError, match="recorded"):
        exponent_of("recorded")


@pytest.mark.parametrize(("experts", "ep"), [(8, 4), (128, 8), (384, 32)])
def test_load_takes_the_word_and_its_exponent_alike(experts, ep):
    tokens = np.array([1.0, 64.0, 4096.0])
    word, number = (load(tokens, experts, 2, ep, how) for how in ("recorded", exponent_of("recorded", experts)))
    assert np.array_equal(word.rows, number.rows)
    assert np.array_equal(word.touched, number.touched)


@pytest.mark.parametrize("name", ["deepseek-v3", "mixtral-8x7b"])
def test_no_other_measured_routing_is_nearer_to_the_counts(name):
    """* Busiest rank over the mean on contiguous ranks, 64 to 131,072 tokens."""
    files = sorted(p for p in COUNTS.glob("*.json*") if p.name.startswith("mixtral") == (name == "mixtral-8x7b"))
    if not files:
        pytest.skip(f"no recorded counts in {COUNTS}")
    model = load_model(name)
    recordings = [read_routing(path, model) for path in files]
    experts = recordings[0].loads.shape[1]
    top_k = max(layer.feed_forward.top_k for layer in model.layers)
    counts = (64, 1024, 16384, 131072)
    tokens = np.array(counts, dtype=float)
    error = dict.fromkeys(MEASURED, 0.0)
    for ep in (4, 8) if experts == 8 else (4, 8, 32, 128):
        ranks = (np.arange(experts) // (experts // ep) == np.arange(ep)[:, None]).astype(float)
        seen = []
        for stats in recordings:
            busiest = busiest_rank(stats, ranks, counts).average
            seen.append((busiest.rows / busiest.mean)[0])
        for word in MEASURED:
            law = load(tokens, experts, top_k, ep, word).rows / (tokens * top_k / ep)
            error[word] += float(np.abs(np.log(law / np.mean(seen, axis=0))).mean())
    assert min(error, key=error.__getitem__) == RECORDED[experts], error
