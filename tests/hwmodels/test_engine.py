"""Engine profiles: the shipped ones are plausible, wrong ones are told off in one line."""

from __future__ import annotations

import pytest

from hwmodels.engine import engine_names, load_engine
from hwmodels.errors import ProfileError


def test_the_promised_engines_are_shipped():
    assert {"sglang", "tensorrt-llm", "vllm"} <= set(engine_names())


@pytest.mark.parametrize("name", engine_names())
def test_every_engine_is_plausible_and_sourced(name):
    engine = load_engine(name)
    assert engine.name == name
    assert len(engine.source) > 20
    assert 0 <= engine.step_overhead_s < 0.01
    assert 0 <= engine.sequence_overhead_s < 1e-4
    assert 0.5 < engine.memory_fraction <= 1
    assert 0 <= engine.reserve_bytes < 20e9


VALID = """name: mine
source: made up for this test
kernels: {default: vllm}
step_overhead_s: 0.001
sequence_overhead_s: 0
prompt_overhead_s: 0.004
unfused: 0.5
request_overhead_s: 0.002
memory_fraction: 0.8
reserve_bytes: 1e9
"""


def test_an_engine_is_read_from_a_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(VALID)
    engine = load_engine(str(path))
    assert (engine.memory_fraction, engine.reserve_bytes) == (0.8, 1e9)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("memory_fraction: 0.8", "memory_fraction: 1.5", "memory_fraction = 1.5"),
        ("memory_fraction: 0.8", "memory_fraction: 0", "memory_fraction = 0"),
        ("step_overhead_s: 0.001", "step_overhead_s: -1", "step_overhead_s = -1"),
        ("step_overhead_s: 0.001", "step_overhead_s: .nan", "step_overhead_s = nan"),
        ("reserve_bytes: 1e9", "reserve: 1e9", "reserve"),
        ("source: made up for this test\n", "", "source is missing"),
    ],
)
def test_a_wrong_engine_is_told_off_in_one_line(tmp_path, old, new, said):
    path = tmp_path / "mine.yaml"
    path.write_text(VALID.replace(old, new))
    with pytest.raises(ProfileError) as error:
        load_engine(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_engine_is_answered_with_near_names():
    with pytest.raises(ProfileError, match=r"unknown engine 'vlm'; nearest: vllm"):
        load_engine("vlm")
