"""Whether laps stand for exactly the operators that the step model prices, so that what is measured prices these."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hwmodels import operators as ops
from hwmodels.mapping import Mapping, Precision
from hwmodels.shape import Attention, FeedForward, Layer, ModelShape
from hwmodels.step_model import decode_operators, linear_operators, prefill_operators, stage_layers

torch: Any = pytest.importorskip("torch")

from planner.execute.batch import Batch, Span  # noqa: E402
from planner.execute.laps import HostLaps  # noqa: E402
from planner.execute.transformer import Share, Transformer  # noqa: E402

GQA, DENSE = Attention(4, 2, 8, 8), FeedForward(32)
WINDOW = replace(GQA, window_tokens=4, qkv_bias=True, qk_norm=True)
MOE = FeedForward(16, experts=4, top_k=2)
MODELS = {
    "dense": [(GQA, DENSE)] * 3,
    "windows, not gated": [(WINDOW, FeedForward(32, gated=False)), (GQA, FeedForward(32, gated=False))],
    "moe": [(GQA, DENSE), (GQA, MOE), (GQA, MOE)],
    "shared experts": [(GQA, replace(MOE, shared_intermediate=24, shared_gate=True))] * 2,
}


class Names:
    """Counts laps and reads no clock."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def start(self) -> None:
        self.found.clear()

    def lap(self, name: str) -> None:
        self.found[name] += 1

    def totals(self) -> dict[str, float]:
        return {}


def mappings(moe: bool) -> list[Mapping]:
    sharded = [Mapping(tp=2, ep=2), Mapping(tp=2, expert_tp=2)] if moe else [Mapping(tp=2), Mapping(tp=4)]
    return [Mapping(), Mapping(pp=2), *sharded, replace(sharded[0], pp=2)]


CASES = [(name, mapping) for name in MODELS for mapping in mappings(any(ff.experts for _, ff in MODELS[name]))]


@pytest.mark.parametrize(("name", "mapping"), CASES)
@pytest.mark.parametrize("kind", ["decode", "prefill", "mixed"])
def test_laps_are_the_operators_of_the_step(name: str, mapping: Mapping, kind: str) -> None:
    model = ModelShape("tiny", 32, 64, tuple(Layer(a, ff, 64) for a, ff in MODELS[name]), False, 64, 32)
    decodes = [Span([1], 6, [0, 1]), Span([2], 3, [2])] if kind != "prefill" else []
    chunks = [Span([3, 4, 5], 0, [3]), Span([6, 7], 4, [4, 5])] if kind != "decode" else []
    batch = Batch(decodes, chunks, 4)
    precision, rows = Precision("fp32", "fp32", "fp32"), float(len(batch.tokens))

    def number(value: float) -> ops.Array:
        return np.array([value])

    for stage, layers in enumerate(stage_layers(model, mapping)):
        share = Share(mapping, stage, 0, lambda x: None, lambda x: torch.cat([x] * mapping.tp, dim=-1))
        made = Transformer(model, share, dtype="fp32", device="cpu", kv_blocks=6, block_tokens=4, seed=0)
        operators = linear_operators(model, layers, number(rows), mapping, precision, first=share.first)
        context = float(batch.context)
        operators += decode_operators(layers, number(len(decodes)), number(context), mapping, precision)
        for new, before in batch.items:
            operators += prefill_operators(layers, number(new), number(before), mapping, precision)
        if share.last:
            operators += ops.language_model_head(model, number(len(batch.sampled)), mapping.tp)
        launches: Counter[str] = Counter()
        for op in operators:
            if op.bytes > 0:
                # All chunks of a step share a lap.
                launches[op.name] += op.count / (len(chunks) if op.name == "prefill attention" else 1)
        laps = Names()
        with torch.inference_mode():
            hidden = None if share.first else torch.ones(len(batch.tokens), 32)
            made.forward(made.inputs(batch), hidden, laps)
        assert laps.found == launches


def test_totals_add_up_to_the_time_between_start_and_last_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([9.0, 1.0, 1.5, 3.0, 3.25, 10.0, 10.125])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    laps = HostLaps()
    laps.start()  # at 9, a pass nobody asks about
    laps.start()
    for name in ("norm", "product", "norm"):
        laps.lap(name)
    assert laps.totals() == {"norm": 0.75, "product": 1.5}
    laps.start()
    laps.lap("norm")
    assert laps.totals() == {"norm": 0.125}
