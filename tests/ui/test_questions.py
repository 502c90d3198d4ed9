"""Formats that are planned in: as typed, else as the checkpoint is stored where every device multiplies in that."""

import pytest

from hwmodels.mapping import Precision
from ui.questions import choices

REST = dict.fromkeys(("weights", "activations", "kv", "experts", "policy", "token_budget", "max_seqs"))
BLOCK = Precision("fp8_block", "fp8", "bf16")


@pytest.mark.parametrize(
    ("model", "hardware", "typed", "expected"),
    [
        ("deepseek-v3", "h200-sxm", {}, BLOCK),
        ("deepseek-v3", "h200-sxm", {"kv": "fp8"}, Precision("fp8_block", "fp8", "fp8")),
        ("deepseek-v3", "b200-sxm", {"experts": "fp4"}, Precision("fp8_block", "fp8", "bf16", "fp4")),
        ("deepseek-v3", "h200-sxm", {"weights": "fp8", "activations": "fp8"}, Precision("fp8", "fp8", "bf16")),
        ("deepseek-v3", "h200-sxm", {"weights": "bf16"}, Precision()),
        ("deepseek-v3", "h200-sxm", {"activations": "bf16"}, Precision()),
        ("deepseek-v3", "a100-80-sxm", {}, Precision()),
        ("llama-3.1-70b", "h200-sxm", {}, Precision()),
        (None, "h200-sxm", {}, Precision()),
    ],
)
def test_what_is_not_typed_is_as_stored(model, hardware, typed, expected):
    assert choices(hardware, 8, **{**REST, **typed}, model=model).precisions == (expected,)


def test_a_device_without_the_arithmetic_keeps_all_at_16_bit():
    assert choices("h200-sxm", 8, **REST, model="deepseek-v3", also=("b200-sxm",)).precisions == (BLOCK,)
    assert choices("h200-sxm", 8, **REST, model="deepseek-v3", also=("a100-80-sxm",)).precisions == (Precision(),)
