"""What do sequences cost on groups of ranks when they are prompts, prefilled by a model on a cluster?

The same form as FlexSP's constants for training, planner.sequencegroups.GroupCost, fitted to the prices of operators:
quadratic and linear terms to whole layers at lengths that double, rates to Ulysses' exchanges over the first ranks of
the cluster.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy.optimize import nnls

from hwmodels import operators as ops
from hwmodels.contextkinds import widths
from hwmodels.contextlinks import context_groups
from hwmodels.contextparallel import context_cost, priced_attention
from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from hwmodels.shape import ModelShape
from planner.sequencegroups import GroupCost, sizes_of

#: Lengths, in tokens, that are priced for the fit, and the one at which exchanges are.
LENGTHS, EXCHANGED = 2.0 ** np.arange(10, 18), 32768.0


def layers_s(model: ModelShape, cluster: Cluster, precision: Precision, lengths: np.ndarray) -> np.ndarray:
    """Seconds of all layers of prompts of `lengths` tokens on one device, from the prices of operators.

    Raises MappingError for a mixture of experts, whose experts other sequences share.
    """
    if model.is_moe:
        raise MappingError(f"{model.name}: expected a dense model; the experts of a mixture see the whole batch")
    cost, zero = AnalyticCost(cluster, Mapping()), np.zeros(len(lengths))
    total = np.zeros(len(lengths))
    for layer, count in Counter(model.layers).items():
        found = [
            *ops.attention_linear(model, layer.attention, lengths, Mapping(), precision, count),
            *ops.prefill_attention(layer.attention, lengths, zero, 1, precision, count),
            *ops.dense_feed_forward(model, layer.feed_forward, lengths, 1, precision, count),
        ]
        total = total + sum((cost.time_s(op) for op in found), zero)
    return total


def prefill_cost(
    model: ModelShape, cluster: Cluster, ranks: int, precision: Precision, *, tokens_per_rank: float
) -> GroupCost:
    """The cost of a dense model's prompts on groups of up to `ranks` of the cluster's devices.

    tokens_per_rank   that the memory left beside the weights holds (hwmodels.contextmemory)

    Groups end where Ulysses does, at the query heads. Raises MappingError for mixtures of experts and ranks that the
    cluster does not have.
    """
    seconds = layers_s(model, cluster, precision, LENGTHS)
    # Relative errors count alike at all lengths, and no term is negative.
    rows = np.stack([LENGTHS**2, LENGTHS, np.ones_like(LENGTHS)], axis=1) / seconds[:, None]
    scale = rows.max(axis=0)
    quadratic, linear, start = nnls(rows / scale, np.ones(len(seconds)))[0] / scale
    price = AnalyticCost(cluster, Mapping()).time_s
    counts = Counter(layer.attention for layer in model.layers)
    each = {attention: widths(attention, 1, 1, precision) for attention in counts}
    sent = sum(n * (each[a].query + each[a].kv_copied + each[a].gathered + each[a].out) for a, n in counts.items())
    rates = []
    for size in sizes_of(ranks)[1:]:
        try:
            exchanged_s = sum(
                n
                * float(
                    context_cost(
                        cluster, context_groups(size), "ulysses", a, 1, precision, EXCHANGED, 0.0,
                        priced_attention(price, a, 1, precision),
                    ).communication_s
                )
                for a, n in counts.items()
            )  # fmt: skip
        except MappingError:
            if size > cluster.gpus:
                raise
            break
        rates.append((size, sent * EXCHANGED / size / exchanged_s))
    ring = sum(n * each[a].kv for a, n in counts.items())
    return GroupCost(float(quadratic), float(linear), float(start), sent, tuple(rates), tokens_per_rank, ring)
