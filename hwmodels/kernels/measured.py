"""The measured cost model: operators priced by real kernels where some were timed, by the roofline elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hwmodels.contextattention import ContextTimes, context_sources
from hwmodels.hardware import Cluster
from hwmodels.kernels.estimate import Estimate
from hwmodels.kernels.library import Kernels
from hwmodels.mapping import Mapping
from hwmodels.operators import (
    Array,
    AttentionCore,
    Communication,
    ContextAttention,
    ExpertExchange,
    Experts,
    Gemm,
    Operator,
    attended_pairs,
)
from hwmodels.roofline import AnalyticCost, attention_format, product_format

#: Popularity of experts: the measured distribution nearest to what serving shows (see hwmodels.kernels.expert_routing).
ROUTING = "recorded"
#: Share by which an exchange may differ from the one that was timed and still count as measured.
EVEN = 0.02


class MeasuredCost:
    """Prices operators from measured kernels; one per (cluster, mapping, engine).

    Norms, activations and embeddings were not timed apart, nor collectives that span nodes: the roofline prices these.
    """

    def __init__(self, cluster: Cluster, mapping: Mapping, kernels: Kernels) -> None:
        self.kernels = kernels
        self.analytic = AnalyticCost(cluster, mapping)
        self.per_node = per_node = cluster.gpus_per_node
        self.within = {
            name: len({rank // per_node for rank in ranks}) == 1 for name, ranks in self.analytic.groups.items()
        }

    def time_s(self, op: Operator) -> Array:
        """Seconds all launches of `op` take, one value per batch size it stands for."""
        if isinstance(op, ContextAttention):
            return op.count * self.context(op).total_s
        found = self.estimate(op)
        if found is None:
            return self.analytic.time_s(op)
        return op.count * np.where(op.bytes > 0, found.seconds, 0.0)

    def sources(self, op: Operator) -> dict[str, float]:
        """The same seconds, summed, by what they rest on."""
        if isinstance(op, ContextAttention):
            return context_sources(self.analytic.cluster, self.analytic.context_groups, op, _Blocks(self))
        found = self.estimate(op)
        if found is None:
            return self.analytic.sources(op)
        seconds = op.count * np.where(op.bytes > 0, found.seconds, 0.0)
        measured = float(np.sum(seconds * found.measured))
        return {"measured": measured, "extended": float(np.sum(seconds)) - measured}

    def context(self, op: ContextAttention) -> ContextTimes:
        """One launch of attention over several ranks."""
        return self.analytic.context(op, _Blocks(self))

    def estimate(self, op: Operator) -> Estimate | None:
        """One launch of `op`, from the tables; None where its kind was not measured. Sizes of 0 count as 1."""
        if isinstance(op, Gemm):
            return self._gemm(op)
        if isinstance(op, Experts):
            return self._experts(op)
        if isinstance(op, AttentionCore):
            return self._prefill(op) if op.phase == "prefill" else self._decode(op)
        if isinstance(op, Communication):
            return self._communication(op)
        return self._exchange(op) if isinstance(op, ExpertExchange) else None

    def _gemm(self, op: Gemm) -> Estimate | None:
        dtype, m = product_format(op.precision), np.maximum(op.m, 1.0)
        if dtype is None:
            return None
        if op.groups > 1:
            table = self.kernels.batched_gemm
            return None if table is None else table.time_s(dtype, op.groups, m, op.n, op.k)
        return None if self.kernels.gemm is None else self.kernels.gemm.time_s(dtype, m, op.n, op.k)

    def _experts(self, op: Experts) -> Estimate | None:
        dtype = product_format(op.precision)
        if dtype is None or self.kernels.moe is None:
            return None
        return self.kernels.moe.time_s(
            dtype, np.maximum(op.tokens, 1.0), op.hidden, op.intermediate, op.experts, op.top_k, op.tp, op.ep,
            gated=op.gated, distribution=ROUTING,
        )  # fmt: skip

    def _prefill(self, op: AttentionCore) -> Estimate | None:
        k, new, one = self.kernels, np.maximum(op.queries, 1.0), np.ones(1)
        if op.qk_dim != op.value_dim:
            return None if k.mla_prefill is None else k.mla_prefill.time_s(op.heads, op.precision.kv, one, new, op.read)
        if k.attention_prefill is None:
            return None
        return k.attention_prefill.time_s(
            op.heads, op.kv_heads, op.qk_dim, op.window_tokens or 0, attention_format(op.precision), op.precision.kv,
            one, new, op.read,
        )  # fmt: skip

    def _decode(self, op: AttentionCore) -> Estimate | None:
        k, batch = self.kernels, np.maximum(op.queries, 1.0)
        context = np.maximum(op.read / batch, 1.0)
        if op.shared:
            return None if k.mla_decode is None else k.mla_decode.time_s(op.heads, op.precision.kv, batch, context)
        if k.attention_decode is None:
            return None
        return k.attention_decode.time_s(
            op.heads, op.kv_heads, op.qk_dim, op.window_tokens or 0, attention_format(op.precision), op.precision.kv,
            batch, context,
        )  # fmt: skip

    def _exchange(self, op: ExpertExchange) -> Estimate | None:
        """Tables have even routing and dispatch in fp8: others by what the roofline tells of the two.

        Beyond the groups and sizes that were timed the links decide, which other groups' timings do not know of.
        """
        ranks = self.analytic.groups["ep"]
        if self.kernels.expert_exchange is None or len(ranks) == 1:
            return None
        nodes = len({rank // self.per_node for rank in ranks})
        tokens = np.maximum(op.tokens, 1.0)
        table = self.kernels.expert_exchange
        found = table.time_s(op.phase, len(ranks), nodes, tokens, op.hidden, op.experts, op.top_k)
        if found is None or not found.measured.any():
            return None
        timed = replace(op, tokens=tokens, formats=("fp8", "bf16"), max_nodes=None, shares=None)
        asked = self.analytic.time_s(replace(op, tokens=tokens, count=1))
        ratio = asked / self.analytic.time_s(replace(timed, count=1))
        seconds = np.where(found.measured > 0, found.seconds * ratio, asked)
        return Estimate(seconds, found.measured * (np.abs(ratio - 1) < EVEN))

    def _communication(self, op: Communication) -> Estimate | None:
        ranks = self.analytic.groups[op.group]
        if self.kernels.collective is None or len(ranks) == 1 or not self.within[op.group]:
            return None
        return self.kernels.collective.time_s(op.kind, len(ranks), np.maximum(op.bytes, 1.0))


class _Blocks:
    """Prices blocks of attention between ranks.

    Measured kernels attend causally: blocks with more or fewer unmasked pairs than that are scaled by what the analytic
    model tells of the two.
    """

    def __init__(self, measured: MeasuredCost) -> None:
        self.measured = measured

    def time_s(self, op: Operator) -> Array:
        """Seconds of all launches of the operator."""
        measured: Array = self.measured.time_s(op)
        if not isinstance(op, AttentionCore) or op.phase != "prefill" or self.measured.estimate(op) is None:
            return measured
        causal = replace(op, pairs=attended_pairs(op.queries, op.read, op.window_tokens))
        was, now = self.measured.analytic.time_s(causal), self.measured.analytic.time_s(op)
        return measured * np.divide(now, was, out=np.ones_like(measured), where=was > 0)

    def sources(self, op: Operator) -> dict[str, float]:
        """The same seconds by what they rest on."""
        found, seconds = self.measured.sources(op), float(np.sum(self.time_s(op)))
        total = sum(found.values())
        return {source: value / total * seconds for source, value in found.items()} if total else found
