"""What does a rank compute? Its share of a decoder-only transformer with random weights, in torch.

Attention heads and feed-forward widths are cut over the tensor-parallel ranks, routed experts over ep x expert_tp,
embedding and head over the vocabulary, layers over pipeline stages. Laps are called as hwmodels.operators calls the
operators they stand for, so that what is measured between them prices these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hwmodels.errors import MappingError
from hwmodels.mapping import Mapping
from hwmodels.operators import kv_heads_per_rank
from hwmodels.shape import Attention, FeedForward, Layer, ModelShape
from hwmodels.step_model import stage_layers
from planner.catalogue import law_broken
from planner.errors import PlanError
from planner.execute.batch import Batch
from planner.execute.laps import Laps
from planner.execute.paged import Inputs
from planner.profiling.machine import TORCH_DTYPES, open_torch

torch: Any = open_torch()
Tensor = Any
#: Adds up a tensor over the tensor-parallel ranks, in place.
Reduce = Callable[[Tensor], None]
#: All tensor-parallel ranks' columns side by side.
Gather = Callable[[Tensor], Tensor]

EPSILON, ROPE_BASE = 1e-6, 10000.0
#: Smallest pages of memory, and how much of it one call of `stay_warm` touches: a millisecond's worth.
PAGE_BYTES, WARM_BYTES = 4096, 32 << 20


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of a replica a rank holds.

    stage, shard     its pipeline stage, and its number among the tensor-parallel ranks
    reduce, gather   joins it with these; never called where there is one
    """

    mapping: Mapping
    stage: int
    shard: int
    reduce: Reduce
    gather: Gather

    @property
    def first(self) -> bool:
        """Whether it embeds tokens."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether it samples tokens."""
        return self.stage == self.mapping.pp - 1


def refused(model: ModelShape, mapping: Mapping) -> str | None:
    """The operator of the model or the degree that this engine does not have, in a few words; None if it has all."""
    if mapping.attention_dp > 1:
        return "attention-DP"
    if mapping.cp > 1:
        return "context parallelism"
    if any(layer.attention.latent is not None for layer in model.layers):
        return "latent attention (MLA)"
    if any(layer.attention.sinks for layer in model.layers):
        return "attention sinks"
    if any(layer.attention.head_dim != layer.attention.value_dim for layer in model.layers):
        return "values of another width than keys"
    if len({layer.attention.head_dim for layer in model.layers}) > 1 or model.layers[0].attention.head_dim % 2:
        return "heads of several widths or of an odd one"
    if model.vocab % mapping.tp:
        return f"a vocabulary of {model.vocab} to be cut over {mapping.tp} ranks"
    return None


class Weights:
    """Random weights, the same whoever asks: normal, scaled to keep the size of what passes through."""

    def __init__(self, dtype: str, device: str, seed: int) -> None:
        self.dtype = getattr(torch, TORCH_DTYPES[dtype])
        self.device = device
        self._seed = seed
        self._generator = torch.Generator(device=device)

    def normal(self, name: int, rows: int, columns: int, scale: float | None = None) -> Tensor:
        """Weights (rows, columns), by default of variance 1/columns."""
        self._generator.manual_seed(self._seed * 1_000_003 + name)
        made = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        return made.normal_(0.0, columns**-0.5 if scale is None else scale, generator=self._generator)

    def bias(self, name: int, width: int) -> Tensor:
        """Biases, small beside what they are added to."""
        return self.normal(name, 1, width, 0.1)[0]

    def ones(self, width: int) -> Tensor:
        """Scales of a norm."""
        return torch.ones(width, dtype=self.dtype, device=self.device)


def cut(weight: Tensor, parts: int, part: int, axis: int) -> Tensor:
    """One of `parts` pieces along an axis, in memory of its own; the last ones are shorter if it does not divide."""
    if parts == 1:
        return weight
    total = weight.shape[axis]
    width = -(-total // parts)
    start = min(part * width, total)
    return weight.narrow(axis, start, min(width, total - start)).clone()


class AttentionBlock:
    """Grouped-query attention over a paged cache of keys and values.

    cache   (2, blocks, block tokens, KV heads, head width): keys and values of this layer on this rank
    """

    def __init__(self, shape: Attention, hidden: int, share: Share, weights: Weights, name: int) -> None:
        tp, shard = share.mapping.tp, share.shard
        self.shape = shape
        self.heads = shape.heads // tp
        self.kv_heads = kv_heads_per_rank(shape, tp)
        kv_parts = min(tp, shape.kv_heads)
        kv_part = shard * kv_parts // tp
        dim, value_dim = shape.head_dim, shape.value_dim
        query = weights.normal(name, shape.heads * dim, hidden)
        key = weights.normal(name + 1, shape.kv_heads * dim, hidden)
        value = weights.normal(name + 2, shape.kv_heads * value_dim, hidden)
        out = weights.normal(name + 3, hidden, shape.heads * value_dim)
        self.norm = weights.ones(hidden)
        self.qkv = torch.cat(
            [cut(query, tp, shard, 0), cut(key, kv_parts, kv_part, 0), cut(value, kv_parts, kv_part, 0)]
        )
        self.qkv_bias: Tensor = None
        if shape.qkv_bias:
            self.qkv_bias = torch.cat(
                [
                    cut(weights.bias(name + 40, shape.heads * dim), tp, shard, 0),
                    cut(weights.bias(name + 41, shape.kv_heads * dim), kv_parts, kv_part, 0),
                    cut(weights.bias(name + 42, shape.kv_heads * value_dim), kv_parts, kv_part, 0),
                ]
            )
        self.out = cut(out, tp, shard, 1)
        # What is added up over the ranks has its bias on one of them.
        self.out_bias = weights.bias(name + 43, hidden) if shape.out_bias and shard == 0 else None
        self.q_norm: Tensor = weights.ones(dim) if shape.qk_norm else None
        self.k_norm: Tensor = weights.ones(dim) if shape.qk_norm else None
        self.cache: Tensor = None

    @property
    def matrices(self) -> list[Tensor]:
        """What takes memory."""
        return [self.qkv, self.out, self.cache]

    def forward(self, x: Tensor, inputs: Inputs, share: Share, laps: Laps) -> Tensor:
        """What the block adds to the residual stream."""
        normed = rms_norm(x, self.norm)
        laps.lap("attention norm")
        qkv = linear(normed, self.qkv, self.qkv_bias)
        laps.lap("qkv projection")
        dim, split = self.shape.head_dim, (self.heads + self.kv_heads) * self.shape.head_dim
        rotated = qkv[:, :split].view(-1, self.heads + self.kv_heads, dim)
        value = qkv[:, split:].reshape(-1, self.kv_heads, self.shape.value_dim)
        if self.q_norm is not None:
            query, key = rotated.split([self.heads, self.kv_heads], dim=1)
            rotated = torch.cat([rms_norm(query, self.q_norm), rms_norm(key, self.k_norm)], dim=1)
        rotated = rotate(rotated, inputs.cos, inputs.sin)
        query, key = rotated.split([self.heads, self.kv_heads], dim=1)
        flat = self.cache.flatten(1, 2)
        flat[0].index_copy_(0, inputs.slots, key)
        flat[1].index_copy_(0, inputs.slots, value)
        laps.lap("rotary embedding")
        result = torch.empty(len(x), self.heads * self.shape.value_dim, dtype=x.dtype, device=x.device)
        window = self.shape.window_tokens
        count = inputs.decodes
        if count:
            attend = inputs.padded_decode if inputs.padded else inputs.looped_decode
            attend(query[:count], self.cache, window, result[:count])
            laps.lap("decode attention")
        if inputs.chunks:
            inputs.prefill(query, self.cache, window, result)
            laps.lap("prefill attention")
        added = linear(result, self.out, self.out_bias)
        laps.lap("output projection")
        if share.mapping.tp > 1:
            share.reduce(added)
            laps.lap("attention all-reduce")
        return added


class DenseBlock:
    """A feed-forward block, gated (SwiGLU) or with one matrix up (GELU)."""

    def __init__(self, shape: FeedForward, hidden: int, share: Share, weights: Weights, name: int) -> None:
        self.norm = weights.ones(hidden)
        tp, shard = share.mapping.tp, share.shard
        self.two = TwoMatrices(shape, shape.intermediate, hidden, tp, shard, weights, name)

    @property
    def matrices(self) -> list[Tensor]:
        """What takes memory."""
        return [self.two.up, self.two.down]

    def forward(self, x: Tensor, share: Share, laps: Laps) -> Tensor:
        """What the block adds to the residual stream."""
        normed = rms_norm(x, self.norm)
        laps.lap("feed-forward norm")
        raised = self.two.raised(normed)
        laps.lap("up projection")
        raised = self.two.activated(raised)
        laps.lap("activation")
        added = self.two.lowered(raised)
        laps.lap("down projection")
        if share.mapping.tp > 1:
            share.reduce(added)
            laps.lap("feed-forward all-reduce")
        return added


class ExpertBlock:
    """A mixture of experts: every token goes to its top_k, weighted by the softmax over these."""

    def __init__(self, shape: FeedForward, hidden: int, share: Share, weights: Weights, name: int) -> None:
        mapping, shard = share.mapping, share.shard
        self.norm = weights.ones(hidden)
        self.shape = shape
        self.router = weights.normal(name, shape.experts, hidden)
        self.router_bias = weights.bias(name + 1, shape.experts) if shape.router_bias else None
        here = shape.experts // mapping.ep
        self.first = shard // mapping.expert_tp * here
        part = shard % mapping.expert_tp
        self.experts = [
            TwoMatrices(shape, shape.intermediate, hidden, mapping.expert_tp, part, weights, name + 100 + 6 * expert)
            for expert in range(self.first, self.first + here)
        ]
        self.shared: TwoMatrices | None = None
        if shape.shared_intermediate:
            self.shared = TwoMatrices(shape, shape.shared_intermediate, hidden, mapping.tp, shard, weights, name + 10)
        self.gate = weights.normal(name + 20, 1, hidden) if shape.shared_gate else None

    @property
    def matrices(self) -> list[Tensor]:
        """What takes memory."""
        parts = self.experts if self.shared is None else [*self.experts, self.shared]
        return [self.router, *(matrix for part in parts for matrix in (part.up, part.down))]

    def forward(self, x: Tensor, share: Share, laps: Laps) -> Tensor:
        """What the block adds to the residual stream."""
        normed = rms_norm(x, self.norm)
        laps.lap("feed-forward norm")
        logits = linear(normed, self.router, self.router_bias)
        laps.lap("router")
        best, chosen = logits.float().topk(self.shape.top_k, dim=-1)
        scales = best.softmax(dim=-1).to(x.dtype)
        laps.lap("top-k")
        added = torch.zeros_like(x)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        scales = scales.flatten()[order, None]
        rows = order // self.shape.top_k
        # The one place where the host waits for the device: it has to know how many rows every expert gets.
        counts = torch.bincount(flat, minlength=self.shape.experts).tolist()
        start = sum(counts[: self.first])
        for expert, count in zip(self.experts, counts[self.first :], strict=False):
            if count:
                mine = slice(start, start + count)
                raised = expert.activated(expert.raised(normed[rows[mine]]))
                added.index_add_(0, rows[mine], expert.lowered(raised) * scales[mine])
            start += count
        laps.lap("routed experts")
        if self.shared is not None:
            raised = self.shared.raised(normed)
            laps.lap("shared expert up projection")
            raised = self.shared.activated(raised)
            laps.lap("shared expert activation")
            lowered = self.shared.lowered(raised)
            added += lowered if self.gate is None else lowered * torch.sigmoid(linear(normed, self.gate, None))
            laps.lap("shared expert down projection")
        if share.mapping.tp > 1:
            share.reduce(added)
            laps.lap("expert all-reduce")
        return added


class TwoMatrices:
    """One part of a feed-forward block: up (gate and up together), an activation, and down.

    width   of the whole block, of which the part has 1/parts
    """

    def __init__(
        self, shape: FeedForward, width: int, hidden: int, parts: int, part: int, weights: Weights, name: int
    ) -> None:
        self.gated = shape.gated
        ups = range(2 if shape.gated else 1)
        self.up = torch.cat([cut(weights.normal(name + i, width, hidden), parts, part, 0) for i in ups])
        self.down = cut(weights.normal(name + 2, hidden, width), parts, part, 1)
        self.up_bias: Tensor = None
        self.down_bias: Tensor = None
        if shape.bias:
            self.up_bias = torch.cat([cut(weights.bias(name + 3 + i, width), parts, part, 0) for i in ups])
            self.down_bias = weights.bias(name + 5, hidden) if part == 0 else None

    def raised(self, x: Tensor) -> Tensor:
        """The product up."""
        return linear(x, self.up, self.up_bias)

    def activated(self, raised: Tensor) -> Tensor:
        """SwiGLU of gate and up side by side, or GELU."""
        if not self.gated:
            return torch.nn.functional.gelu(raised)
        gate, up = raised.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def lowered(self, raised: Tensor) -> Tensor:
        """The product down."""
        return linear(raised, self.down, self.down_bias)


class Transformer:
    """One rank's layers with their caches.

    padded   whether decoding sequences attend together, padded to the longest (devices), or one by one (hosts)
    """

    def __init__(
        self, model: ModelShape, share: Share, *, dtype: str, device: str, kv_blocks: int, block_tokens: int, seed: int
    ) -> None:
        """Make the weights; raises MappingError for an operator that is not implemented and for illegal degrees."""
        mapping = share.mapping
        reason = refused(model, mapping)
        if reason is not None:
            raise MappingError(
                f"{model.name}: has {reason}, which this engine does not execute; choose another model or other degrees"
            )
        law = law_broken(model, mapping)
        if law is not None:
            told = f"tp={mapping.tp} pp={mapping.pp} ep={mapping.ep} expert_tp={mapping.expert_tp}"
            raise MappingError(f"{told}: breaks the law that {law} of {model.name}; choose other degrees")
        self.model, self.share, self.device = model, share, device
        self.padded = device != "cpu"
        weights = Weights(dtype, device, seed)
        self.dtype = weights.dtype
        tp, shard, hidden = mapping.tp, share.shard, model.hidden
        stages = stage_layers(model, mapping)
        begin, layers = sum(map(len, stages[: share.stage])), stages[share.stage]
        self.layers = [self._layer(layer, weights, 10_000 * number) for number, layer in enumerate(layers, begin + 1)]
        for attention, _ in self.layers:
            shape = (2, kv_blocks, block_tokens, attention.kv_heads, attention.shape.head_dim)
            attention.cache = torch.zeros(shape, dtype=self.dtype, device=device)
        #: Windows of the stage's layers, each once.
        self.windows = tuple(dict.fromkeys(layer.attention.window_tokens for layer in layers))
        tied = model.tied_embeddings
        self.embedding: Tensor = None
        self.norm: Tensor = None
        self.head: Tensor = None
        if share.first or (share.last and tied):
            self.embedding = cut(weights.normal(1, model.vocab, hidden, 1.0), tp, shard, 0)
        if share.last:
            # An embedding has rows of another size than a head, which the norm before the head makes up for.
            self.norm = weights.ones(hidden) * (hidden**-0.5 if tied else 1.0)
            self.head = self.embedding if tied else cut(weights.normal(2, model.vocab, hidden), tp, shard, 0)
        self._rope(min(model.max_context_tokens, kv_blocks * block_tokens))
        kept = [tensor for pair in self.layers for block in pair for tensor in block.matrices]
        kept += [tensor for tensor in (self.embedding, self.head) if tensor is not None]
        each = PAGE_BYTES // self.dtype.itemsize
        self._pages = [
            piece[::each] for tensor in kept for piece in tensor.flatten().split(WARM_BYTES // PAGE_BYTES * each)
        ]
        self._warm = 0

    def _layer(self, layer: Layer, weights: Weights, name: int) -> tuple[AttentionBlock, DenseBlock | ExpertBlock]:
        hidden, block = self.model.hidden, ExpertBlock if layer.feed_forward.experts else DenseBlock
        attention = AttentionBlock(layer.attention, hidden, self.share, weights, name)
        return attention, block(layer.feed_forward, hidden, self.share, weights, name + 5)

    def _rope(self, tokens: int) -> None:
        """Angles of the rotary embedding (RoFormer, arXiv:2104.09864, equation 15) for every position.

        Made in fp32 and kept in the model's format, in which queries and keys are turned.
        """
        dim = self.model.layers[0].attention.head_dim
        at = torch.arange(tokens, dtype=torch.float32, device=self.device)
        angles = at[:, None] * ROPE_BASE ** (-torch.arange(0, dim, 2, device=self.device) / dim)
        self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def stay_warm(self) -> None:
        """Touch every page of some of the weights, the next ones each time; nothing on a device.

        A processor forgets where memory is that is not used for a while, most of all a virtual one: behind a pause of a
        second, products with one row took four times as long. Under load there are no such pauses, so none here either.
        """
        if self.device == "cpu":
            self._warm = (self._warm + 1) % len(self._pages)
            self._pages[self._warm].sum()

    def inputs(self, batch: Batch) -> Inputs:
        """The step as tensors of this device; raises PlanError for tokens beyond the model's context or the cache."""
        longest = max(span.end for span in (*batch.decodes, *batch.chunks))
        if longest > len(self.cos):
            raise PlanError(
                f"a sequence of {longest} tokens: expected at most {len(self.cos)}, the context of {self.model.name} "
                "and all its KV blocks; lower max_context_tokens"
            )
        return Inputs(batch, self)

    def forward(self, inputs: Inputs, hidden: Tensor, laps: Laps) -> Tensor:
        """Run this stage.

        hidden   (rows, width) from the stage before; None at the first

        Returns the same for the next stage, or at the last the id sampled behind every span.
        """
        if not self.share.last:
            return self._stage(inputs, hidden, laps)
        best = self.logits(inputs, hidden, laps).argmax(dim=-1)
        laps.lap("sampling")
        return best

    def logits(self, inputs: Inputs, hidden: Tensor, laps: Laps) -> Tensor:
        """Run the last stage up to (spans, vocabulary) logits behind every span."""
        x = self._stage(inputs, hidden, laps)
        normed = rms_norm(x[inputs.sampled], self.norm)
        laps.lap("final norm")
        logits = linear(normed, self.head, None)
        laps.lap("language-model head")
        if self.share.mapping.tp > 1:
            logits = self.share.gather(logits)
            laps.lap("logits all-gather")
        return logits

    def _stage(self, inputs: Inputs, hidden: Tensor, laps: Laps) -> Tensor:
        laps.start()
        x = self._embed(inputs.tokens, laps) if self.share.first else hidden
        for attention, block in self.layers:
            x = x + attention.forward(x, inputs, self.share, laps)
            x = x + block.forward(x, self.share, laps)
        return x

    def _embed(self, tokens: Tensor, laps: Laps) -> Tensor:
        tp, shard = self.share.mapping.tp, self.share.shard
        if tp == 1:
            x = torch.nn.functional.embedding(tokens, self.embedding)
            laps.lap("embedding")
            return x
        rows = len(self.embedding)
        mine = tokens - shard * rows
        outside = (mine < 0) | (mine >= rows)
        x = torch.nn.functional.embedding(mine.masked_fill(outside, 0), self.embedding)
        x.masked_fill_(outside[:, None], 0.0)
        laps.lap("embedding")
        self.share.reduce(x)
        laps.lap("embedding all-reduce")
        return x


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root-mean-square norm over the last axis."""
    return torch.nn.functional.rms_norm(x, scale.shape, scale, EPSILON)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Products with the rows of `weight`."""
    return torch.nn.functional.linear(x, weight, bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (i, i + width/2) of the last axis by its angle."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
