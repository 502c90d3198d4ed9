"""How much of an answer is evidence: the share of a step's device time by what its prices rest on."""

from __future__ import annotations

import numpy as np

from hwmodels import operators as ops
from hwmodels.engine import Engine
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Operator
from hwmodels.shape import ModelShape
from hwmodels.step_model import (
    CostModel,
    decode_operators,
    kept,
    linear_operators,
    prefill_operators,
    rank_tokens,
    shared_operators,
)

#: The reference step: so many sequences that attend to so many tokens each, and a prompt chunk of so many.
SEQUENCES, CONTEXT_TOKENS, CHUNK_TOKENS = 64, 1024, 512


def reference_operators(model: ModelShape, mapping: Mapping, precision: Precision) -> list[Operator]:
    """Operators of a step that decodes 64 sequences of 1,024 tokens and prefills 512, in every attention group."""
    one = np.ones(1)
    tokens = (SEQUENCES + CHUNK_TOKENS) * one
    context = min(CONTEXT_TOKENS, model.max_context_tokens)
    found = linear_operators(model, model.layers, tokens, mapping, precision, first=True)
    found += shared_operators(model, model.layers, tokens * mapping.attention_dp, mapping, precision)
    found += decode_operators(model.layers, SEQUENCES * one, SEQUENCES * context * one, mapping, precision)
    found += prefill_operators(model.layers, CHUNK_TOKENS * one, 0 * one, mapping, precision)
    found += ops.language_model_head(model, rank_tokens((SEQUENCES + 1) * one, mapping.cp), mapping.tp)
    return found


def evidence(
    model: ModelShape, mapping: Mapping, precision: Precision, engine: Engine, cost: CostModel
) -> dict[str, float]:
    """Shares of the reference step's device time by source of its prices, the largest first; they add up to 1.

    What the engine hides in other kernels does not count.

    measured     interpolated between measured kernels
    extended     beyond the measured table: the analytic curve from the nearest measured kernel
    calibrated   the analytic model with coefficients fitted to measured kernels of this device
    analytic     the analytic model with estimated coefficients
    """
    seconds: dict[str, float] = {}
    for op in reference_operators(model, mapping, precision):
        share = float(np.mean(kept(op, cost, engine)))
        for source, value in cost.sources(op).items():
            seconds[source] = seconds.get(source, 0.0) + value * share
    total = sum(seconds.values())
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    return {source: value / total for source, value in ranked if value > 0}
