"""What does a method that keeps, reads or reuses less of the KV cache hold, read and compute?

Everything is counted in tokens' worth of one cached token, so that bytes follow by ModelShape.kv_bytes_per_token and
the format of the cache: a method modifies bytes held and attention reads, whatever the model and the format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from hwmodels.errors import ProfileError
from hwmodels.mapping import DTYPE_BYTES
from hwmodels.operators import Array, AttentionCore, Operator, attended_pairs
from hwmodels.shape import ModelShape, kv_elements_per_token
from hwmodels.step_model import CostModel

#: Tokens a streaming head attends to: attention sinks and the most recent ones (DuoAttention, arXiv:2410.10819).
SINK_TOKENS, RECENT_TOKENS = 64, 256
#: Share of heads that need the whole context, by what DuoAttention's repository evaluates: Llama-2-7B and Llama-3-8B.
RETRIEVAL_MHA, RETRIEVAL_GQA = 0.25, 0.5
#: FLOPs an accelerator does in the time it moves a byte, Kinetics' E (arXiv:2506.05333: 562.5 for NVIDIA's B200).
EFLOPS_PER_BYTE = 562.5


@dataclass(frozen=True, slots=True)
class KVMethod:
    """How much of a context each KV head keeps and each decode step reads; the defaults are full attention.

    retrieval_heads     share of KV heads that keep the context; the others stream
    sink_tokens, recent_tokens   what a streaming head keeps and reads
    held_tokens         most tokens a retrieval head keeps (eviction)
    read_tokens         most of them a decode step attends to (selection)
    read_share          share of them a decode step attends to
    label_share         bytes per token of an index that every selection scans, over those of the token's KV
    page_tokens, page_share   the same of an index by page: its tokens, and bytes per page over those of one token's KV
    selection_steps     decode steps that use one selection
    query_conditioned   whether what is kept depends on the question asked, and is of no use for another
    prefill_share       share of the attention pairs of retrieval heads that prefill computes (sparse encoding)

    Raises ProfileError for shares outside [0, 1] and counts below 0.
    """

    retrieval_heads: float = 1.0
    sink_tokens: int = 0
    recent_tokens: int = 0
    held_tokens: float = inf
    read_tokens: float = inf
    read_share: float = 1.0
    label_share: float = 0.0
    page_tokens: int = 0
    page_share: float = 0.0
    selection_steps: int = 1
    query_conditioned: bool = False
    prefill_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("retrieval_heads", "read_share", "label_share", "prefill_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ProfileError(f"{name}={getattr(self, name)}: expected a share between 0 and 1")
        for name in ("sink_tokens", "recent_tokens", "held_tokens", "read_tokens", "page_tokens", "page_share"):
            if not getattr(self, name) >= 0:
                raise ProfileError(f"{name}={getattr(self, name)}: expected at least 0")
        if self.selection_steps < 1:
            raise ProfileError(f"selection_steps={self.selection_steps}: expected at least 1")

    @property
    def window_tokens(self) -> int:
        """What a streaming head keeps."""
        return self.sink_tokens + self.recent_tokens

    def held(self, tokens: ArrayLike) -> Array:
        """Tokens' worth of KV and index kept of a context, mean over the KV heads."""
        s = np.asarray(tokens, dtype=float)
        kept = np.minimum(s, self.held_tokens)
        return self._mean(kept + self._index(kept), np.minimum(s, self.window_tokens))

    def read(self, tokens: ArrayLike) -> Array:
        """Tokens' worth of KV and index a decode step reads, mean over the KV heads and the steps of a selection.

        LServe (arXiv:2502.14866): (1-sigma) min(s, budget) + sigma (sink+recent) + index/selection_steps.
        """
        kept = np.minimum(np.asarray(tokens, dtype=float), self.held_tokens)
        return self.attended(tokens) + self.retrieval_heads * self._index(kept) / self.selection_steps

    def attended(self, tokens: ArrayLike) -> Array:
        """Tokens a decode step attends to, mean over the KV heads: what it reads but for the index."""
        s = np.asarray(tokens, dtype=float)
        chosen = np.minimum(np.minimum(s, self.held_tokens) * self.read_share, self.read_tokens)
        return self._mean(chosen, np.minimum(s, self.window_tokens))

    def seen(self, before: ArrayLike) -> Array:
        """Tokens' worth of KV that a prompt chunk reads of `before` cached tokens: evictions come after the prefill."""
        s = np.asarray(before, dtype=float)
        return self._mean(s, np.minimum(s, self.window_tokens))

    def pairs(self, new: ArrayLike, before: ArrayLike = 0) -> Array:
        """Query-key pairs of a causal prefill of `new` tokens after `before`, mean over the heads.

        DuoAttention: rho s^2/2 + (1-rho) s (sink+recent), here exact where a window is not yet full.
        """
        n, first = np.asarray(new, dtype=float), np.asarray(before, dtype=float)
        full = self.prefill_share * attended_pairs(n, first, None)
        return self._mean(full, attended_pairs(n, first, self.window_tokens))

    def _index(self, kept: Array) -> Array:
        pages = np.ceil(kept / self.page_tokens) if self.page_tokens else np.zeros_like(kept)
        return np.asarray(kept * self.label_share + pages * self.page_share, dtype=float)

    def _mean(self, retrieval: Array, streaming: Array) -> Array:
        return np.asarray(self.retrieval_heads * retrieval + (1 - self.retrieval_heads) * streaming, dtype=float)


FULL = KVMethod()


def duo_attention(retrieval_heads: float) -> KVMethod:
    """DuoAttention: streaming heads keep sinks and recent tokens, retrieval heads everything."""
    return KVMethod(retrieval_heads, SINK_TOKENS, RECENT_TOKENS)


def lserve(read_tokens: int = 4096, *, page_tokens: int = 16, selection_steps: int = 4) -> KVMethod:
    """LServe: half of the heads stream; of the others a step reads a constant budget of pages.

    Pages are scored by the largest and smallest key in each, as many bytes as one token's key and value. The formula is
    the paper's (arXiv:2502.14866); the budget, page and reuse are meant to be its defaults but were not checked.
    """
    return KVMethod(
        0.5,
        SINK_TOKENS,
        RECENT_TOKENS,
        read_tokens=read_tokens,
        page_tokens=page_tokens,
        page_share=1.0,
        selection_steps=selection_steps,
    )


def double_sparsity(share: float = 1 / 16, *, label_bits: float = 4, kv_bits: float = 16) -> KVMethod:
    """Double Sparsity (arXiv:2408.07092): score tokens by a share of the key's channels, attend to a share of them.

    The labels are `label_bits` wide; keys are half of the KV.
    """
    return KVMethod(read_share=share, label_share=share / 2 * label_bits / kv_bits)


def snapkv(held_tokens: int) -> KVMethod:
    """SnapKV (arXiv:2404.14469): after a full prefill only the tokens that matter to the question are kept."""
    return KVMethod(held_tokens=held_tokens, query_conditioned=True)


def cache_bytes(shape: ModelShape, kv_dtype: str, method: KVMethod, tokens: float) -> float:
    """Bytes of the cache of one sequence, all ranks together; layers with a sliding window keep that much at most."""
    total = 0.0
    for layer, count in Counter(shape.layers).items():
        window = layer.attention.window_tokens
        kept = float(method.held(tokens)) if window is None else min(tokens, window)
        total += count * kept * kv_elements_per_token(layer.attention) * DTYPE_BYTES[kv_dtype]
    return total


def modified(op: Operator, method: KVMethod) -> Operator:
    """The operator under a method: attention over the whole context reads and computes what the method leaves of it.

    Layers with a sliding window are left as they are.
    """
    if not isinstance(op, AttentionCore) or op.window_tokens is not None:
        return op
    if op.phase == "prefill":
        return replace(op, pairs=method.pairs(op.queries, op.read), read=method.seen(op.read))
    mean = op.read / np.maximum(op.queries, 1.0)
    return replace(op, pairs=op.queries * method.attended(mean), read=op.queries * method.read(mean))


class ModifiedCost:
    """Prices a model under a method: a cost model for compile_step_model that wraps another.

    Kernels of the method are taken to be as efficient as the dense ones. Prefill prices interpolated from measured
    tables go by tokens and not by pairs, so only analytic and calibrated ones see what sparse encoding saves.
    """

    def __init__(self, cost: CostModel, method: KVMethod) -> None:
        self.cost = cost
        self.method = method

    def time_s(self, op: Operator) -> Array:
        """Seconds of all launches of the operator under the method."""
        return self.cost.time_s(modified(op, self.method))

    def sources(self, op: Operator) -> dict[str, float]:
        """The same seconds, summed, by what they rest on."""
        return self.cost.sources(modified(op, self.method))


#: Whether questions follow each other in a session or come from different sessions on one context (SCBench).
Reuse = Literal["multi-turn", "multi-request"]


@dataclass(frozen=True, slots=True)
class Turn:
    """A question of `query_tokens` tokens and an answer of `answer_tokens`."""

    query_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class TurnCost:
    """What one turn takes, in tokens' worth of KV where not said otherwise.

    prefill_tokens   tokens computed before the answer
    reused_tokens    tokens of the prompt whose KV was kept
    prefill_pairs    query-key pairs, mean over the heads
    stored           held when the turn ends
    retrieved        read by all decode steps of the answer
    loaded           brought in from a lower tier before the turn
    """

    prefill_tokens: int
    reused_tokens: int
    prefill_pairs: float
    stored: float
    retrieved: float
    loaded: float


def session(
    method: KVMethod, context_tokens: int, turns: Sequence[Turn], mode: Reuse, *, offloaded: bool = False
) -> list[TurnCost]:
    """Costs of questions about one context, SCBench's four stages: generation, compression, retrieval and loading.

    mode        multi-turn: a turn's prompt also holds the questions and answers before it; multi-request: each question
                meets the context alone
    offloaded   whether what is kept between turns lies in a lower tier and is loaded before the next

    Reusable KV is computed once; KV chosen for one question is of no use for the next, whose prompt is computed whole
    (SCBench, arXiv:2412.10319).
    """
    costs = []
    history, cached = context_tokens, 0
    for turn in turns:
        prompt = history + turn.query_tokens
        reused = cached
        end = prompt + turn.answer_tokens
        steps = np.arange(prompt, end)
        costs.append(
            TurnCost(
                prefill_tokens=prompt - reused,
                reused_tokens=reused,
                prefill_pairs=float(method.pairs(prompt - reused, reused)),
                stored=float(method.held(end)),
                retrieved=float(method.read(steps).sum()),
                loaded=float(method.held(reused)) if offloaded else 0.0,
            )
        )
        history = end if mode == "multi-turn" else context_tokens
        cached = 0 if method.query_conditioned else history
    return costs


def independent_pairs(contexts: Sequence[int], *, shared_prefix: int = 0, cached: Sequence[bool] = ()) -> float:
    """Query-key pairs of APE's prefill: contexts that see the prefix and themselves, but not each other.

    Sum of L_i^2/2 where one prompt takes (sum of L_i)^2/2 (APE, arXiv:2502.05431); those cached take none, nor does
    the prefix if any is.
    """
    known = list(cached) or [False] * len(contexts)
    if len(known) != len(contexts):
        raise ProfileError(f"{len(known)} flags for {len(contexts)} contexts: expected one each")
    prefix = 0.0 if any(known) else float(FULL.pairs(shared_prefix))
    fresh = (tokens for tokens, hit in zip(contexts, known, strict=True) if not hit)
    return prefix + float(sum(float(FULL.pairs(tokens, shared_prefix)) for tokens in fresh))


@dataclass(frozen=True, slots=True)
class EquivalentFlops:
    """Cost of generating answers, Kinetics' eFLOPs: arithmetic, and bytes as the FLOPs done while they move."""

    compute: float
    memory: float

    @property
    def total(self) -> float:
        """Both, as if they did not overlap."""
        return self.compute + self.memory


@dataclass(frozen=True, slots=True)
class BlockTopK:
    """Sparse decode: each step attends to the `blocks` best blocks of `block_tokens` and `local_tokens` recent tokens.

    Every block is scored by one vector.
    """

    blocks: int
    block_tokens: int
    local_tokens: int = 0

    @property
    def budget_tokens(self) -> int:
        """Most tokens a step attends to."""
        return self.local_tokens + self.blocks * self.block_tokens


def kinetics(
    parameters: float,
    shape: ModelShape,
    prompt_tokens: int,
    generated_tokens: int,
    trials: int = 1,
    sparse: BlockTopK | None = None,
    *,
    eflops_per_byte: float = EFLOPS_PER_BYTE,
) -> EquivalentFlops:
    """eFLOPs of `trials` answers of `generated_tokens` tokens to one prompt (Kinetics, its repository's cost model).

    Dense: C = N [2 P g + 2 (2c+g) g Hq D], M = E 2 (2c+gN) g Hkv D, with D = head_dim x layers, the prompt's KV read
    once for all trials, two bytes a number, weights left out as read for a large batch.
    Block top-k: k = B g - max(0, B-c)^2/2 tokens read in all by one trial (for g >= B-c), the integral of min(B, c+i),
    where the repository's tables have a plus; C = N [2 P g + 4 k Hq D + S Hq D], M = E [4 k Hkv D N + S' Hkv D], with
    S = ((2c+g)//b) g and S' = ((2c+gN)//b) g for the scores of blocks of b tokens.
    """
    attentions = [layer.attention for layer in shape.layers]
    if any(a.latent is not None or a.window_tokens is not None or a.head_dim != a.value_dim for a in attentions):
        raise ProfileError(f"{shape.name}: eFLOPs are defined for full attention with equal keys and values only")
    query = sum(a.heads * a.head_dim for a in attentions)
    cached = sum(a.kv_heads * a.head_dim for a in attentions)
    c, g, n = prompt_tokens, generated_tokens, trials
    linear = 2 * parameters * g
    if sparse is None:
        compute = n * (linear + 2 * (2 * c + g) * g * query)
        return EquivalentFlops(compute, eflops_per_byte * 2 * (2 * c + g * n) * g * cached)
    ramp = min(max(0, sparse.budget_tokens - c), g)  # steps until the context is longer than the budget
    read = sparse.budget_tokens * (g - ramp) + c * ramp + ramp**2 / 2
    scores, all_scores = ((2 * c + g * count) // sparse.block_tokens * g for count in (1, n))
    compute = n * (linear + 4 * read * query + scores * query)
    return EquivalentFlops(compute, eflops_per_byte * (4 * read * cached * n + all_scores * cached))
