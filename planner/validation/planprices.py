"""What do measured kernels say about every operator of a plan's steps: prices, and the kernels nearest to it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pandas as pd

from hwmodels import operators as ops
from hwmodels.efficiency import Efficiency
from hwmodels.evidence import CONTEXT_TOKENS
from hwmodels.kernels.estimate import Estimate
from hwmodels.mapping import Mapping as Cut
from hwmodels.operators import Communication, Operator
from hwmodels.roofline import AnalyticCost, rank_groups
from hwmodels.shape import Layer
from hwmodels.step_model import (
    decode_operators,
    linear_operators,
    prefill_operators,
    rank_tokens,
    shared_operators,
    stage_layers,
)
from planner.catalogue import Catalogue, mapping_of, precision_of
from planner.errors import PlanError
from planner.plan import Pool
from planner.validation.nearest import Index, Near, wanted


class Measured(Protocol):
    """What hwmodels.kernels.measured.MeasuredCost answers."""

    def estimate(self, op: Operator) -> Estimate | None:
        """One launch; None where its kind was not measured."""
        ...


@dataclass(frozen=True, slots=True)
class Price:
    """One operator of a step on one device.

    shape          as a kernel table writes it; empty for operators no table has
    count          launches
    analytic_s     one launch by the roofline with the default efficiencies
    calibrated_s   one launch by the roofline with those of the device's profile
    measured_s     one launch by interpolation of measured kernels; None where its kind was not measured
    inside         share of measured_s that lies between measured points, not beyond them
    share          of the step's time, all launches, by the measured price or else the calibrated one
    nearest        measured kernels, the nearest first
    """

    name: str
    family: str
    dtype: str
    shape: Mapping[str, float | str]
    count: int
    analytic_s: float
    calibrated_s: float
    measured_s: float | None
    inside: float
    share: float
    nearest: tuple[Near, ...]

    @property
    def best_s(self) -> float:
        """One launch by the best evidence there is."""
        return self.calibrated_s if self.measured_s is None else self.measured_s


@dataclass(frozen=True, slots=True)
class PricedStep:
    """A step of one scheduler through all pipeline stages, without the engine's own work.

    seconds   by cost model; 'measured' takes the calibrated price where there is no other
    measured, extended   shares of the measured seconds between measured points, and beyond them
    """

    title: str
    rows: tuple[Price, ...]
    seconds: Mapping[str, float]
    measured: float
    extended: float


def plan_prices(
    catalogue: Catalogue,
    pool: Pool,
    measured: Measured,
    tables: Mapping[str, pd.DataFrame],
    *,
    context: int = CONTEXT_TOKENS,
    nearest: int = 2,
) -> tuple[PricedStep, ...]:
    """A decode step of half of max_seqs sequences and a prompt chunk of the token budget, operator by operator.

    measured   prices from the kernels
    tables     the kernels' tables by family, of the catalogue's device
    context    tokens every sequence attends to; sequences are left away where the KV cache is too small for them
    nearest    measured kernels to tell for each operator

    Raises PlanError for a context the plan cannot hold, and what Catalogue.require_fit raises.
    """
    mapping, precision = mapping_of(pool), precision_of(pool)
    catalogue.check(mapping, precision)
    kv_tokens = catalogue.require_fit(pool).kv_blocks * pool.block_tokens
    longest = min(pool.max_context_tokens, catalogue.model.max_context_tokens, kv_tokens)
    if not 1 <= context <= longest:
        raise PlanError(f"context {context}: expected 1 to {longest} tokens, which the plan can hold")
    sequences = max(1, min(pool.max_seqs // 2, pool.token_budget, kv_tokens // context))
    chunk = min(pool.token_budget, longest)

    def decode(layers: Sequence[Layer]) -> list[Operator]:
        return decode_operators(layers, _one(sequences), _one(sequences * context), mapping, precision)

    def prefill(layers: Sequence[Layer]) -> list[Operator]:
        return prefill_operators(layers, _one(chunk), _one(0), mapping, precision)

    index = Index(tables)
    steps = []
    for title, tokens, sampled, attention in (
        (f"decode step of {sequences} sequences at context {context}", sequences, sequences, decode),
        (f"prefill step of {chunk} tokens", chunk, 1, prefill),
    ):
        found = _merged(_operators(catalogue, pool, tokens, sampled, attention))
        steps.append(_priced(title, found, catalogue, mapping, measured, index, nearest))
    return tuple(steps)


def _one(value: float) -> np.ndarray:
    return np.array([float(value)])


def _operators(
    catalogue: Catalogue, pool: Pool, tokens: int, sampled: int, attention: Callable[[Sequence[Layer]], list[Operator]]
) -> list[Operator]:
    """Operators of all pipeline stages; every attention group holds as many tokens."""
    model, mapping, precision = catalogue.model, mapping_of(pool), precision_of(pool)
    found: list[Operator] = []
    for stage, layers in enumerate(stage_layers(model, mapping)):
        found += linear_operators(model, layers, _one(tokens), mapping, precision, first=stage == 0)
        found += shared_operators(model, layers, _one(tokens * mapping.attention_dp), mapping, precision)
        found += attention(layers)
        if stage == mapping.pp - 1:
            found += ops.language_model_head(model, rank_tokens(_one(sampled), mapping.cp), mapping.tp)
        else:
            sent = _one(tokens / mapping.cp * model.hidden * ops.wire_bytes(precision))
            found.append(Communication("stage transfer", "point-to-point", "pp", sent))
    return found


def _merged(found: Sequence[Operator]) -> list[Operator]:
    """Operators of the same name and shape in several stages as one with all their launches."""
    known: dict[tuple[str, float, float], Operator] = {}
    for op in found:
        key = (op.name, float(np.sum(op.flops)), float(np.sum(op.bytes)))
        known[key] = replace(known[key], count=known[key].count + op.count) if key in known else op
    return list(known.values())


def _priced(
    title: str,
    found: Sequence[Operator],
    catalogue: Catalogue,
    mapping: Cut,
    measured: Measured,
    index: Index,
    nearest: int,
) -> PricedStep:
    cluster = catalogue.cluster
    calibrated = AnalyticCost(cluster, mapping)
    plain = AnalyticCost(replace(cluster, device=replace(cluster.device, efficiency=Efficiency())), mapping)
    ranks = {name: (len(group), len({r // cluster.gpus_per_node for r in group}))
             for name, group in rank_groups(mapping).items()}  # fmt: skip
    rows = []
    for op in found:
        calibrated_s = float(np.sum(calibrated.time_s(op))) / op.count
        estimate = measured.estimate(op)
        measured_s = None if estimate is None else float(np.sum(estimate.seconds))
        if not (calibrated_s if measured_s is None else measured_s) > 0:
            continue
        asked = wanted(op, ranks)
        rows.append(
            Price(
                op.name,
                "" if asked is None else asked.family,
                "" if asked is None else asked.dtype,
                {} if asked is None else asked.shape,
                op.count,
                float(np.sum(plain.time_s(op))) / op.count,
                calibrated_s,
                measured_s,
                0.0 if estimate is None else float(np.mean(estimate.measured)),
                0.0,
                () if asked is None else index.nearest(asked, nearest),
            )
        )
    total = {
        "analytic": sum(row.count * row.analytic_s for row in rows),
        "calibrated": sum(row.count * row.calibrated_s for row in rows),
        "measured": sum(row.count * row.best_s for row in rows),
    }
    shared = [replace(row, share=row.count * row.best_s / total["measured"]) for row in rows]
    return PricedStep(
        title,
        tuple(sorted(shared, key=lambda row: -row.share)),
        total,
        sum(row.share * row.inside for row in shared if row.measured_s is not None),
        sum(row.share * (1 - row.inside) for row in shared if row.measured_s is not None),
    )
