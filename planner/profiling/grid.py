"""Which points tell most about a machine, in what order, when there are only so many minutes?

Every family is a product of axes: the shapes of real models per rank, and ladders of sizes. Along a ladder the ends
come first, then the middle, then the quarters; shapes come by how many models have them. The order of points is by the
sum of these depths, as in a sparse grid: wherever the time ends, what was measured covers the whole range evenly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import TypeVar

import numpy as np

from hwmodels.errors import MeasurementError
from hwmodels.huggingface import load_model
from hwmodels.kernels.table import family_named
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import (
    AttentionCore,
    Experts,
    Gemm,
    Operator,
    attention_linear,
    decode_attention,
    dense_feed_forward,
    expert_feed_forward,
    language_model_head,
)
from hwmodels.shape import ModelShape
from planner.profiling.machine import Machine
from planner.profiling.points import Point, work

#: Whose shapes are measured: one of every size and make that is served today.
MODELS = (
    *("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "llama-3.2-1b", "llama-2-7b", "llama-2-13b", "mistral-7b"),
    *("qwen2.5-7b", "qwen2.5-32b", "qwen2.5-72b", "qwen3-8b", "qwen3-30b-a3b", "qwen3-235b-a22b", "mixtral-8x7b"),
    *("deepseek-v3", "gpt-oss-20b", "gpt-oss-120b", "phi-2"),
)
TENSOR_PARALLEL = (1, 2, 4, 8)
#: Products of no model in particular, so that others have neighbours: the corners first.
PLAIN = ((512, 512), (8192, 8192), (512, 8192), (8192, 512), (2048, 2048), (16384, 16384), (2048, 16384), (16384, 2048))

ROWS = tuple(sorted({2**i for i in range(15)} | {3 * 2**i for i in range(3, 13)}))
TOKENS = tuple(2**i for i in range(15))
NEW = tuple(2**i for i in range(4, 16))
BEFORE = (0, 1024, 4096, 16384, 65536)
PROMPTS = (1, 2, 4, 8, 16)
SEQUENCES = tuple(2**i for i in range(10))
CONTEXTS = tuple(2**i for i in range(6, 18))
NORM_BYTES = tuple(2**i for i in range(14, 31))
COPY_BYTES = tuple(2**i for i in range(12, 31))
MESSAGE_BYTES = tuple(2**i for i in range(10, 30))
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
#: Tokens of one step, and tokens in all caches of one, beyond which nothing is measured.
MAX_STEP, MAX_CACHED = 32768, 1 << 22

#: Share of the time each family gets; they take turns by it.
SHARES = {
    "gemm": 0.4,
    "attention_prefill": 0.16,
    "attention_decode": 0.2,
    "moe": 0.1,
    "batched_gemm": 0.04,
    "elementwise": 0.03,
    "copy": 0.03,
    "collective": 0.1,
}

#: A point, and how deep in the order of its family it lies.
Ranked = tuple[float, Point]
T = TypeVar("T")


def points_for(minutes: float, machine: Machine, families: Sequence[str] | None = None) -> list[Point]:
    """Points of `families` (all by default), each family's most informative first, without those that would take too
    much of the time.

    The order is the same for every budget, so a longer run refines a shorter one.
    Raises MeasurementError for a family that is not measured.
    """
    points: list[Point] = []
    for name in chosen_families(families):
        ranked = [(depth, guess_s(point, machine), point) for depth, point in GRIDS[name](machine)]
        ranked.sort(key=lambda entry: entry[:2])
        longest = limit_s(minutes, SHARES[name])
        points += dict.fromkeys(point for _, guess, point in ranked if cost_s(guess, machine) < longest)
    return points


def chosen_families(families: Sequence[str] | None) -> tuple[str, ...]:
    """The families to be measured; raises MeasurementError for unknown ones and those that cannot be."""
    if families is None:
        return tuple(SHARES)
    for name in families:
        if family_named(name).name not in SHARES:
            raise MeasurementError(f"family {name} is not measured here; expected some of {', '.join(SHARES)}")
    return tuple(dict.fromkeys(families))


def limit_s(minutes: float, share: float = 1.0) -> float:
    """Longest time that measuring one point may take, in seconds.

    Half a percent of all time, and a fortieth of what is the share of its family; from 0.25 to 10 s.
    """
    return min(max(minutes * 60 * min(1 / 200, share / 40), 0.25), 10.0)


def guess_s(point: Point, machine: Machine) -> float:
    """A first guess of one launch, before anything was measured, in seconds: a roofline of a common device."""
    threads = machine.threads or 1
    flops_per_s, bytes_per_s = (2e14, 2e12) if machine.kind == "cuda" else (threads * 1e11, 1e10)
    amount = work(point)
    return 2e-6 + amount.flops / flops_per_s + amount.moved_bytes / bytes_per_s


def cost_s(launch_s: float, machine: Machine) -> float:
    """Time that measuring a launch of `launch_s` takes in all, in seconds."""
    return (0.03 if machine.kind == "cuda" else 0.01) + max(8 * launch_s, 0.04)


def depths(count: int) -> list[int]:
    """How often a ladder of `count` steps is halved before each step has its turn.

    >>> depths(5)
    [0, 2, 1, 2, 0]
    """
    found = [0] * count
    spans = [(0, count - 1, 1)]
    while spans:
        low, high, depth = spans.pop()
        if high - low > 1:
            middle = (low + high) // 2
            found[middle] = depth
            spans += [(low, middle, depth + 1), (middle, high, depth + 1)]
    return found


def shapes(
    models: Iterable[ModelShape], degrees: Iterable[int] = TENSOR_PARALLEL
) -> dict[str, Counter[tuple[int, ...]]]:
    """What one rank of these models runs, by family, and how many (model, degree) pairs run it.

    gemm (n, k), batched_gemm (groups, n, k), attention (heads, kv_heads, head_dim) without windows and latents,
    moe (hidden, intermediate, experts, top_k, tp, ep, gated)
    """
    found: dict[str, Counter[tuple[int, ...]]] = {
        name: Counter() for name in ("gemm", "batched_gemm", "attention", "moe")
    }
    for model, degree in product(models, degrees):
        for family, shape in {entry for op in _operators(model, degree) for entry in _shape(op)}:
            found[family][shape] += 1
    return found


def _operators(model: ModelShape, degree: int) -> Iterator[Operator]:
    """One of every operator with weights or a cache that a rank of `degree` runs; nothing where it cannot be cut so."""
    one, p = np.ones(1), Precision()
    if any(layer.attention.heads % degree for layer in model.layers):
        return
    for layer in dict.fromkeys(model.layers):
        yield from attention_linear(model, layer.attention, one, Mapping(tp=degree), p, 1)
        yield from decode_attention(layer.attention, one, one, degree, p, 1)
        block = layer.feed_forward
        if not block.experts:
            yield from dense_feed_forward(model, block, one, degree, p, 1)
            continue
        for ep in {1, degree} if block.experts % degree == 0 else {1}:
            mapping = Mapping(tp=degree, ep=ep, expert_tp=degree // ep)
            yield from expert_feed_forward(model, block, one, one, mapping, p, 1)
    yield from language_model_head(model, one, degree)


def _shape(op: Operator) -> Iterator[tuple[str, tuple[int, ...]]]:
    if isinstance(op, Gemm):
        yield ("gemm", (op.n, op.k)) if op.groups == 1 else ("batched_gemm", (op.groups, op.n, op.k))
    elif isinstance(op, Experts):
        yield "moe", (op.hidden, op.intermediate, op.experts, op.top_k, op.tp, op.ep, int(op.gated))
    elif isinstance(op, AttentionCore) and not op.shared and op.qk_dim == op.value_dim and op.window_tokens is None:
        yield "attention", (op.heads, op.kv_heads, op.qk_dim)


def _common(family: str) -> list[tuple[float, tuple[int, ...]]]:
    """Shapes of MODELS with their depth: the most common one 0, the next two 1, the next four 2."""
    counts = shapes(map(load_model, MODELS))[family]
    alike = {count: sorted(shape for shape in counts if counts[shape] == count) for count in counts.values()}
    # Equally common ones in the order of a ladder, or one model's would come after the other's.
    ranked = [
        shape
        for count in sorted(alike, reverse=True)
        for _, shape in sorted(_ladder(alike[count]), key=lambda entry: entry[0])
    ]
    return [(float(np.log2(1 + rank)), shape) for rank, shape in enumerate(ranked)]


def _ladder(values: Sequence[T]) -> list[tuple[int, T]]:
    return list(zip(depths(len(values)), values, strict=True))


def _gemm(machine: Machine) -> Iterator[Ranked]:
    plain = [(float(i // 4), shape) for i, shape in enumerate(PLAIN)]
    later = dict.fromkeys(machine.dtypes, 2) | {"int8": 1, "fp8": 0, machine.sixteen: 0}
    for (depth, (n, k)), (step, m), dtype in product([*plain, *_common("gemm")], _ladder(ROWS), machine.dtypes):
        yield depth + step + later[dtype], Point.of("gemm", dtype, m=m, n=n, k=k)


def _batched_gemm(machine: Machine) -> Iterator[Ranked]:
    for (depth, (groups, n, k)), (step, m) in product(_common("batched_gemm"), _ladder(ROWS)):
        yield depth + step, Point.of("batched_gemm", machine.sixteen, groups=groups, m=m, n=n, k=k)


def _moe(machine: Machine) -> Iterator[Ranked]:
    names = ("hidden", "intermediate", "experts", "top_k", "tp", "ep", "gated")
    for (depth, shape), (step, tokens) in product(_common("moe"), _ladder(TOKENS)):
        sizes = dict(zip(names, shape, strict=True))
        yield depth + step, Point.of("moe", machine.sixteen, tokens=tokens, distribution="balanced", **sizes)


def _prefill(machine: Machine) -> Iterator[Ranked]:
    dtype = machine.sixteen
    for (depth, (heads, kv_heads, head_dim)), (step, new), (more, batch), (far, before) in product(
        _common("attention"), _ladder(NEW), _ladder(PROMPTS), enumerate(BEFORE)
    ):
        if batch * new <= MAX_STEP and (batch == 1 or not before):
            yield depth + step + more + far, Point.of(
                "attention_prefill", dtype, batch=batch, new=new, before=before, heads=heads, kv_heads=kv_heads,
                head_dim=head_dim, window=0, kv_dtype=dtype,
            )  # fmt: skip


def _decode(machine: Machine) -> Iterator[Ranked]:
    dtype = machine.sixteen
    for (depth, (heads, kv_heads, head_dim)), (step, context), (more, batch) in product(
        _common("attention"), _ladder(CONTEXTS), _ladder(SEQUENCES)
    ):
        if batch * context <= MAX_CACHED:
            yield depth + step + more, Point.of(
                "attention_decode", dtype, batch=batch, context=context, heads=heads, kv_heads=kv_heads,
                head_dim=head_dim, window=0, kv_dtype=dtype,
            )  # fmt: skip


def _elementwise(machine: Machine) -> Iterator[Ranked]:
    for step, nbytes in _ladder(NORM_BYTES):
        yield step, Point.of("elementwise", machine.sixteen, bytes=nbytes)


def _copy(machine: Machine) -> Iterator[Ranked]:
    kinds = ("d2d",) if machine.kind == "cpu" else ("h2d", "d2h", "d2d")
    for kind, (step, nbytes) in product(kinds, _ladder(COPY_BYTES)):
        yield step, Point.of("copy", machine.sixteen, kind=kind, bytes=nbytes)


def _collective(machine: Machine) -> Iterator[Ranked]:
    for gpus, (later, kind), (step, nbytes) in product(
        group_sizes(machine), enumerate(COLLECTIVES), _ladder(MESSAGE_BYTES)
    ):
        dtype = machine.sixteen if machine.kind == "cuda" else "fp32"
        yield step + later / 2, Point.of("collective", dtype, kind=kind, gpus=gpus, nodes=1, bytes=nbytes)


def group_sizes(machine: Machine) -> tuple[int, ...]:
    """Ranks of the groups that are measured: powers of two of the visible devices; two processes on a CPU."""
    return (2,) if machine.kind == "cpu" else tuple(2**i for i in range(1, 4) if 2**i <= machine.count)


GRIDS: dict[str, Callable[[Machine], Iterator[Ranked]]] = {
    "gemm": _gemm,
    "batched_gemm": _batched_gemm,
    "moe": _moe,
    "attention_prefill": _prefill,
    "attention_decode": _decode,
    "elementwise": _elementwise,
    "copy": _copy,
    "collective": _collective,
}
