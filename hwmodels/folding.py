"""Which ranks share attention, which share experts, and what do the two mappings cost where they differ?

MoE Parallel Folding (arXiv:2504.14960): attention is cut TP x CP x DP x PP and the experts ETP x EP x EDP x PP over the
same ranks, with TP CP DP = ETP EP EDP = N / PP. Coupled mappings, the usual ones before, keep ETP = TP and take the
expert-parallel ranks out of the data-parallel ones, so that they lie TP CP ranks apart; folded ones put the ranks that
share experts next to each other, inside a node where they fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hwmodels import operators as ops
from hwmodels.collectives import compile_collective
from hwmodels.dispatch import Mode, Phases, Routed, exchange_s, pair_bytes
from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster
from hwmodels.mapping import Mapping, Precision
from hwmodels.roofline import AnalyticCost
from hwmodels.shape import Layer, ModelShape, feed_forward_parameters

WIDE = Precision("bf16", "bf16", "bf16")
#: Bytes a parameter takes while training in mixed precision: weight in 16 bit and gradient in 32, kept by every rank
#: that computes with it; master weight and two moments in 32 bit, spread over the data-parallel ranks (ZeRO,
#: arXiv:1910.02054, section 3.1, with gradients accumulated in 32 bit as Megatron does).
HELD_BYTES, SPREAD_BYTES = 6.0, 12.0
#: Bytes of a gradient and of a weight on the wire between data-parallel ranks.
GRADIENT_BYTES, WEIGHT_BYTES = 4.0, 2.0
#: Share of a device's memory that training may fill; the rest is CUDA, NCCL and what is lost between allocations.
USABLE = 0.9


@dataclass(frozen=True, slots=True)
class Fold:
    """Two mappings over the same ranks, numbered innermost first: tp, cp, dp, pp.

    folded   whether expert ranks are numbered etp, ep, edp, pp; else tp, cp, ep, edp, pp
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    etp: int = 1
    ep: int = 1
    edp: int = 1
    folded: bool = True

    def __post_init__(self) -> None:
        """Raise MappingError where the two mappings do not cover the same ranks."""
        degrees = (self.tp, self.cp, self.dp, self.pp, self.etp, self.ep, self.edp)
        if min(degrees) < 1:
            raise MappingError(f"degrees {degrees} of {self}: expected each at least 1")
        if self.tp * self.cp * self.dp != self.etp * self.ep * self.edp:
            raise MappingError(
                f"tp {self.tp} x cp {self.cp} x dp {self.dp} against etp {self.etp} x ep {self.ep} x edp {self.edp}: "
                "expected equal products, the ranks of a pipeline stage"
            )
        if not self.folded and (self.etp != self.tp or self.dp % self.ep):
            raise MappingError(
                f"coupled mapping with tp {self.tp}, etp {self.etp}, dp {self.dp}, ep {self.ep}: expected etp = tp and "
                "ep to divide dp; fold it"
            )

    @property
    def gpus(self) -> int:
        """Devices in use."""
        return self.tp * self.cp * self.dp * self.pp

    def groups(self, name: str) -> NDArray[np.int64]:
        """Rank groups of a degree, one per row: 'tp', 'cp', 'dp', 'pp', 'etp', 'ep', 'edp', or 'dp-cp' for both.

        Raises MappingError for another name.
        """
        stage = np.arange(self.gpus).reshape(self.pp, -1)
        attention = stage.reshape(self.pp, self.dp, self.cp, self.tp)
        if self.folded:
            experts = stage.reshape(self.pp, self.edp, self.ep, self.etp)
        else:
            # dp splits into (dp / ep) x ep; what is left of dp, and cp, holds copies of the experts.
            inner = stage.reshape(self.pp, self.dp // self.ep, self.ep, self.cp, self.tp)
            experts = inner.transpose(0, 1, 3, 2, 4).reshape(self.pp, self.edp, self.ep, self.etp)
        axes = {"pp": (attention, 0), "dp": (attention, 1), "cp": (attention, 2), "tp": (attention, 3),
                "edp": (experts, 1), "ep": (experts, 2), "etp": (experts, 3)}  # fmt: skip
        if name == "dp-cp":
            return attention.transpose(0, 3, 1, 2).reshape(-1, self.dp * self.cp)
        if name not in axes:
            raise MappingError(f"rank group {name!r}: expected one of {', '.join(axes)}, dp-cp")
        grid, axis = axes[name]
        return np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])


def legal_folds(model: ModelShape, gpus: int, *, folded: bool = True, max_cp: int = 1) -> Iterator[Fold]:
    """Every pair of mappings of `gpus` ranks that the model allows.

    tp divides heads (and KV heads or the other way round), pp leaves every stage as many layers, ep divides the experts
    and etp their width.
    """
    expert_layers = [layer for layer in model.layers if layer.feed_forward.experts]
    if not expert_layers:
        raise MappingError(f"{model.name} has no experts: expected a mixture of experts to fold")
    attention, ff = expert_layers[0].attention, expert_layers[0].feed_forward
    for pp in _divisors(len(model.layers)):
        if gpus % pp:
            continue
        ranks = gpus // pp
        for tp in _divisors(ranks):
            kv = attention.latent is not None or not (attention.kv_heads % tp and tp % attention.kv_heads)
            if attention.heads % tp or not kv:
                continue
            for cp in (c for c in _divisors(ranks // tp) if c <= max_cp):
                dp = ranks // tp // cp
                for ep in (e for e in _divisors(ranks) if ff.experts % e == 0):
                    for etp in _divisors(ranks // ep) if folded else (tp,):
                        if ff.intermediate % etp or ranks % (ep * etp) or (not folded and dp % ep):
                            continue
                        yield Fold(tp, cp, dp, pp, etp, ep, ranks // ep // etp, folded)


def all_to_all_bytes(tokens: float, hidden: int, top_k: int, width: float, ep: int) -> float:
    """Bytes a rank sends per layer to dispatch its tokens and combine results, routing even.

    2 top_k tokens h bytes (EP - 1) / EP (MoE Parallel Folding).
    """
    return 2 * top_k * tokens * hidden * width * (ep - 1) / ep


def expert_tp_elements(tokens: float, hidden: int, etp: int) -> float:
    """Numbers a rank receives in the all-gather of ranks that share experts, or sends in the reduce-scatter.

    tokens h (ETP - 1), for `tokens` routed rows of each rank (MoE Parallel Folding).
    """
    return tokens * hidden * (etp - 1)


@dataclass(frozen=True, slots=True)
class LayerTraffic:
    """Bytes one rank sends in the exchange of one layer, dispatch and combine, mean over its group.

    inside, between   to ranks of its node, and of others
    """

    inside_bytes: float
    between_bytes: float


def layer_traffic(cluster: Cluster, fold: Fold, tokens: float, routed: Routed) -> LayerTraffic:
    """Where the exchange of one layer goes when each rank has `tokens` tokens: a copy per chosen expert."""
    members = fold.groups("ep")[0]
    node = members // cluster.gpus_per_node
    sent = pair_bytes(cluster, members.tolist(), tokens, routed)
    back = sent.T * (routed.widths[1] / routed.widths[0])
    same = node[:, None] == node[None, :]
    total, ranks = sent + back, len(members)
    return LayerTraffic(float(total[same].sum() / ranks), float(total[~same].sum() / ranks))


def layer_exchange_s(
    cluster: Cluster, fold: Fold, tokens: float, routed: Routed, mode: Mode = "best"
) -> tuple[Phases, float]:
    """Seconds of the exchange of one layer over the first EP group, and of the ETP gather and scatter around it.

    tokens   of each rank
    """
    phases = exchange_s(cluster, fold.groups("ep")[0].tolist(), tokens, routed, mode)
    gathered = tokens * routed.top_k * fold.etp * routed.hidden
    around = _collective_s(cluster, "all-gather", fold.groups("etp")[0], gathered * 2.0)
    return phases, around + _collective_s(cluster, "reduce-scatter", fold.groups("etp")[0], gathered * 2.0)


@dataclass(frozen=True, slots=True)
class Training:
    """One training step.

    parts          seconds that the busiest stage spends on each kind of work, 'bubble' included
    memory_bytes   of the fullest device
    recompute      whether activations were computed again in the backward pass to fit
    """

    fold: Fold
    step_s: float
    mfu: float
    memory_bytes: float
    recompute: bool
    parts: dict[str, float]


def train(
    model: ModelShape, cluster: Cluster, fold: Fold, *, sequence: int, batch: int, sharded: bool = False,
    interleave: int = 1,
) -> Training | None:  # fmt: skip
    """A step of `batch` sequences in bf16, micro-batches of one sequence; None where it does not fit.

    sharded      weights are gathered for every layer and micro-batch and dropped again (FSDP, ZeRO stage 3)
    interleave   layer groups of every pipeline stage (Narayanan et al. 2021, arXiv:2104.04473, section 2.2)

    The forward pass is priced by the operators of a prompt of the model, experts evenly loaded, the backward pass as
    twice that. Sequence-parallel collectives and exchanges are exposed; context-parallel gathers hide behind attention,
    weights of shards behind the layer beside them, gradients and new weights behind one micro-batch. Rough by
    design: no kernel of a training framework was measured, and no straggler, optimiser step or data loader counts.

    Raises MappingError for a batch that the data-parallel ranks cannot divide or more devices than the cluster has.
    """
    if batch % fold.dp or sequence % (fold.cp * fold.tp):
        raise MappingError(
            f"batch {batch} over dp {fold.dp}, sequence {sequence} over cp {fold.cp} x tp {fold.tp}: expected multiples"
        )
    if fold.gpus > cluster.gpus:
        raise MappingError(f"{fold.gpus} ranks on {cluster.gpus} devices of {cluster.name}: expected no more")
    micro = batch // fold.dp
    for recompute in (False, True):
        memory = training_memory(model, fold, sequence, recompute=recompute, sharded=sharded, interleave=interleave)
        if memory <= USABLE * cluster.device.memory_bytes:
            break
    else:
        return None
    layers = len(model.layers) / fold.pp
    here = _Layer(model, cluster, fold, sequence)
    passes = 4 if recompute else 3
    parts = {
        "arithmetic": micro * (layers * passes * here.compute_s + 3 * here.head_s),
        "tensor parallel": micro * layers * 2 * here.tensor_s,
        "expert exchange": micro * layers * 2 * here.exchange_s,
        "expert tensor parallel": micro * layers * 2 * here.expert_tensor_s,
        "context parallel": micro * layers * 2 * max(0.0, here.context_s - here.attention_s),
    }
    one = sum(parts.values()) / micro
    if sharded:
        gather_s, scatter_s = here.shards_s()
        forward_s = here.compute_s + here.exchange_s + here.expert_tensor_s + here.tensor_s
        backward_s = (passes - 1) * here.compute_s + here.exchange_s + here.expert_tensor_s + here.tensor_s
        late = max(0.0, gather_s - forward_s) + max(0.0, gather_s + scatter_s - backward_s)
        parts["weights and gradients"] = micro * layers * late
    else:
        parts["weights and gradients"] = max(0.0, here.gradients_s() - one)
        sends = 2 * interleave * micro * (fold.pp > 1)
        parts["stage transfer"] = sends * here.transfer_s()
    parts["bubble"] = (fold.pp - 1) / interleave * one
    step_s = sum(parts.values())
    peak = cluster.device.peak_flops_per_s["bf16"]
    return Training(
        fold, step_s, training_flops(model, sequence, batch) / (step_s * fold.gpus * peak), memory, recompute, parts
    )


def training_flops(model: ModelShape, sequence: int, batch: int) -> float:
    """FLOPs of a step as MFU counts them: forward and twice that backward, nothing computed again, causal attention."""
    embedding = model.vocab * model.hidden
    linear = 2.0 * (model.active_parameters - embedding) * sequence
    pairs = sequence * (sequence + 1) / 2
    attention = sum(
        2.0 * pairs * layer.attention.heads * (layer.attention.head_dim + layer.attention.value_dim)
        for layer in model.layers
    )
    return 3 * batch * (linear + attention)


def training_memory(
    model: ModelShape, fold: Fold, sequence: int, *, recompute: bool, sharded: bool, interleave: int = 1
) -> float:
    """Bytes on a device of the first stage: weights, gradients, optimiser and activations of sequences in flight.

    Activations of a token in a layer: 15 h bytes for attention and norms (Korthikanti et al. 2022, arXiv:2205.05198,
    section 4.1, without what flash attention never stores), 2 h + 6 w for each expert of width w; if computed again,
    only the layer's input of 2 h stays.
    """
    tokens = sequence / fold.cp / fold.tp
    dense, experts = _parameters(model, fold)
    layers = len(model.layers)
    ff = next(layer.feed_forward for layer in model.layers if layer.feed_forward.experts)
    ways = ff.top_k * (2 * model.hidden * fold.etp + 6 * ff.intermediate) + 6 * ff.shared_intermediate
    each = 15 * model.hidden + ways
    kept = 2 * model.hidden if recompute else each
    in_flight = layers * (1 + (fold.pp - 1) / (fold.pp * interleave) if interleave > 1 else 1)
    activations = tokens * (in_flight * kept + (each if recompute else 0))
    logits = sequence / fold.cp / fold.tp * model.vocab * 4.0 if fold.pp == 1 else 0.0
    if sharded:
        whole = (dense + experts) / layers * 2 * WEIGHT_BYTES
        states = (HELD_BYTES + SPREAD_BYTES) * (dense / (fold.dp * fold.cp) + experts / fold.edp)
        return states + 2 * whole + activations + logits
    spread = dense / (fold.dp * fold.cp) + experts / fold.edp
    return HELD_BYTES * (dense + experts) + SPREAD_BYTES * spread + activations + logits


def _parameters(model: ModelShape, fold: Fold) -> tuple[float, float]:
    """Parameters a rank computes with: those cut as attention, and those of routed experts."""
    routed = sum(
        feed_forward_parameters(replace(layer.feed_forward, shared_intermediate=0), model.hidden)
        - layer.feed_forward.experts * model.hidden
        for layer in model.layers
        if layer.feed_forward.experts
    )
    return (model.parameters - routed) / fold.tp / fold.pp, routed / fold.etp / fold.ep / fold.pp


class _Layer:
    """Forward seconds of one mean layer and micro-batch on one rank."""

    def __init__(self, model: ModelShape, cluster: Cluster, fold: Fold, sequence: int) -> None:
        self.model, self.cluster, self.fold = model, cluster, fold
        self.tokens = sequence / fold.cp / fold.tp  # what a rank keeps between collectives
        hidden = model.hidden
        priced = [
            _layer_s(model, layer, cluster, sequence, fold.tp, fold.cp, fold.etp, fold.ep)
            for layer in dict.fromkeys(model.layers)
        ]
        weights = [model.layers.count(layer) / len(model.layers) for layer in dict.fromkeys(model.layers)]
        self.compute_s = sum(w * (attention + rest) for w, (attention, rest) in zip(weights, priced, strict=True))
        self.attention_s = sum(w * attention for w, (attention, _) in zip(weights, priced, strict=True))
        self.head_s = _head_s(model, cluster, sequence / fold.cp, fold.tp)
        whole = sequence / fold.cp * hidden * 2.0
        tp = fold.groups("tp")[0]
        self.tensor_s = _collective_s(cluster, "all-gather", tp, whole) + _collective_s(
            cluster, "reduce-scatter", tp, whole
        )
        blocks = [layer.feed_forward for layer in model.layers if layer.feed_forward.experts]
        share, top_k = len(blocks) / len(model.layers), blocks[0].top_k
        routed_bytes = self.tokens * top_k * hidden * 2.0
        # Megatron's dispatcher sends every copy by itself, in 16 bit.
        self.exchange_s = share * 2 * _collective_s(cluster, "all-to-all", fold.groups("ep")[0], routed_bytes)
        etp = fold.groups("etp")[0]
        gathered = routed_bytes * fold.etp
        self.expert_tensor_s = share * (
            _collective_s(cluster, "all-gather", etp, gathered)
            + _collective_s(cluster, "reduce-scatter", etp, gathered)
        )
        kv = model.kv_elements_per_token() / len(model.layers)
        self.context_s = _collective_s(cluster, "all-gather", fold.groups("cp")[0], sequence * kv * 2.0 / fold.tp)

    def shards_s(self) -> tuple[float, float]:
        """Gathering one layer's weights, and summing its gradients over the ranks that keep them."""
        dense, experts = (count / len(self.model.layers) for count in _parameters(self.model, self.fold))
        times = []
        for kind, width in (("all-gather", WEIGHT_BYTES), ("reduce-scatter", WEIGHT_BYTES)):
            times.append(
                _collective_s(self.cluster, kind, self.fold.groups("dp-cp")[0], dense * width)
                + _collective_s(self.cluster, kind, self.fold.groups("edp")[0], experts * width)
            )
        return times[0], times[1]

    def gradients_s(self) -> float:
        """Summing gradients and spreading the new weights, once a step."""
        found = 0.0
        for count, group in zip(_parameters(self.model, self.fold), ("dp-cp", "edp"), strict=True):
            ranks = self.fold.groups(group)[0]
            found += _collective_s(self.cluster, "reduce-scatter", ranks, count * GRADIENT_BYTES)
            found += _collective_s(self.cluster, "all-gather", ranks, count * WEIGHT_BYTES)
        return found

    def transfer_s(self) -> float:
        """One micro-batch's activations to the next stage."""
        return _collective_s(
            self.cluster, "point-to-point", self.fold.groups("pp")[0][:2], self.tokens * self.model.hidden * 2.0
        )


@lru_cache(maxsize=4096)
def _layer_s(
    model: ModelShape, layer: Layer, cluster: Cluster, sequence: int, tp: int, cp: int, etp: int, ep: int
) -> tuple[float, float]:
    """Forward seconds of attention itself, and of everything else that is arithmetic, of one sequence."""
    cost = AnalyticCost(cluster, Mapping())
    cut, tokens = Mapping(tp=tp), np.array([sequence / cp])
    core = ops.prefill_attention(layer.attention, np.array([float(sequence)]), np.zeros(1), tp, WIDE, 1)
    rest = ops.attention_linear(model, layer.attention, tokens, cut, WIDE, 1)
    ff = layer.feed_forward
    if ff.experts:
        mine = tokens / tp
        rows = mine * ff.top_k * etp
        for op in ops.expert_feed_forward(model, ff, mine, mine * ep, Mapping(ep=ep, expert_tp=etp), WIDE, 1):
            if isinstance(op, ops.Experts):
                rest += replace(op, rows=rows, active=np.minimum(ff.experts / ep, rows)).parts
            else:
                rest.append(op)
    else:
        rest += ops.dense_feed_forward(model, ff, tokens, tp, WIDE, 1)
    spent = sum(float(cost.time_s(op)[0]) for op in rest if not isinstance(op, ops.Communication))
    return sum(float(cost.time_s(op)[0]) for op in core) / cp, spent


@lru_cache(maxsize=256)
def _head_s(model: ModelShape, cluster: Cluster, tokens: float, tp: int) -> float:
    """Forward seconds of norm, vocabulary projection and softmax of all tokens."""
    cost = AnalyticCost(cluster, Mapping())
    found = ops.language_model_head(model, np.array([tokens]), tp)
    return sum(float(cost.time_s(op)[0]) for op in found if not isinstance(op, ops.Communication))


def _collective_s(cluster: Cluster, kind: str, ranks: Sequence[int] | NDArray[np.int64], nbytes: float) -> float:
    if len(ranks) < 2:
        return 0.0
    return float(compile_collective(cluster, kind, tuple(int(rank) for rank in ranks)).time_s(nbytes))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
