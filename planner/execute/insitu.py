"""Which passes are worth measuring, and in what order?"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from hwmodels.errors import MeasurementError
from hwmodels.insitu import Sample, rows_of
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Array
from hwmodels.shape import ModelShape
from planner.execute.records import Composition, Pass

#: Executes composed steps on all ranks; the passes of all of them.
Run = Callable[[list[Composition]], list[Pass]]
#: Times each point is measured, at least where the minutes allow, and at most.
LEAST, MOST = 3, 7
#: Like decode passes behind every pass with prompt tokens. A step finds the less of the weights in the cache the longer
#: the one before took: where passes came in random order, decode steps took a fifth longer than in service, where
#: they come in runs.
RUN = 5
#: Steps along the list of decodes from one prompt chunk that they are mixed with to the next.
STRIDE = 7
#: Passes that are run first and dropped, and the share by which neighbouring sizes differ at least.
WARM_UP, APART = 4, 1.15


def sizes(limit: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 ... and the limit itself; none just below it.

    >>> sizes(50)
    [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 50]
    """
    found = sorted({int(factor * 2**power) for power in range(1, 32) for factor in (0.5, 1, 1.5)})
    return [size for size in found if size * APART <= limit] + [limit]


def level(size: int, limit: int) -> int:
    """How soon a size is worth measuring: 0 for the ends and powers of 4, 1 for powers of 2, 2 for the others."""
    if size == limit or (size & (size - 1) == 0 and size.bit_length() % 2 == 1):
        return 0
    return 1 if size & (size - 1) == 0 else 2


def depths(limit: int) -> list[int]:
    """A handful of tokens before: the limit and quarters of it down to 32."""
    found = [limit]
    while found[-1] // 4 >= 32:
        found.append(found[-1] // 4)
    return found[::-1]


def spread(mean: int, count: int, limit: int) -> tuple[int, ...]:
    """Contexts around a mean, as sequences of a running engine have them: evenly from half of it to half more.

    None is beyond the limit. Equal ones would be padded to no length, and reuse each other's memory.

    >>> spread(100, 3, 1000)
    (50, 100, 150)
    """
    reach = min(mean // 2, limit - mean)
    half = [round(reach * (1 - 2 * i / max(count - 1, 1))) for i in range(count // 2)]
    return tuple([mean - d for d in half] + [mean] * (count % 2) + [mean + d for d in reversed(half)])


#: A pass and how soon it is worth measuring, see `level`.
Point = tuple[int, Composition]


def grid(
    model: ModelShape, *, token_budget: int, max_seqs: int, max_context: int, kv_tokens: int | None = None
) -> list[list[Composition]]:
    """Passes that measure every operator of a step at the sizes it can have, the most telling first, level by level.

    token_budget, max_seqs   rows and sequences of the largest step
    max_context              longest sequence; the model's own limit if that is less
    kv_tokens                tokens of all sequences that the cache holds, the last block of each not counted; None if
                             that is no limit
    """
    reach = min(max_context, model.max_context_tokens)
    held = max_seqs * reach if kv_tokens is None else kv_tokens
    decodes = _decodes(min(max_seqs, token_budget), reach, held)
    longest = min(token_budget, reach, held)
    prefills = _prefills(longest, min(reach, held))
    found = [*decodes, *prefills]
    for number, (rank, prefill) in enumerate(prefills):
        beside = [
            decode.contexts
            for _, decode in decodes
            if decode.tokens + prefill.tokens <= token_budget
            and len(decode.contexts) < max_seqs
            and _held(decode) + _held(prefill) <= held
        ]
        if beside:
            found.append((rank, Composition(beside[STRIDE * number % len(beside)], prefill.items)))
    found += _longer(longest, token_budget, max_seqs, held)
    return [[step for at, step in found if at == rank] for rank in range(3)]


def _decodes(most: int, reach: int, held: int) -> list[Point]:
    """Decode-only passes: sequences x mean context.

    Sizes that are neither powers of two nor ends come with one context: what more adds follows from those around.
    """
    contexts = sorted({1, *depths(max(1, reach * 3 // 4))})
    found = []
    for n in sizes(most):
        rank = level(n, most)
        for context in contexts if rank < 2 else [contexts[len(contexts) // 2]]:
            if n * context <= held:
                inner = context not in (contexts[0], contexts[-1])
                found.append((max(rank, int(inner)), Composition(spread(context, n, reach))))
    return found


def _prefills(longest: int, reach: int) -> list[Point]:
    """Prefill-only passes of one chunk: new x before, fewer as with decodes."""
    deepest = reach - min(longest, reach // 2)
    found = []
    for new in sizes(longest):
        rank = level(new, longest)
        for before in [0, *depths(deepest)] if rank < 2 and deepest else [0]:
            if new + before <= reach:
                inner = before not in (0, deepest)
                found.append((max(rank, int(inner)), Composition((), ((new, before),))))
    return found


def _longer(longest: int, token_budget: int, max_seqs: int, held: int) -> list[Point]:
    """Prefill-only passes of more rows than one sequence can have: several chunks, as equal as they go."""
    found = []
    for rows in sizes(min(token_budget, held)):
        count = -(-rows // longest)
        if 1 < count <= max_seqs:
            ends = [rows * (number + 1) // count for number in range(count)]
            items = tuple((end - start, 0) for start, end in pairwise([0, *ends]))
            found.append((level(rows, token_budget), Composition((), items)))
    return found


def held_out(
    rng: np.random.Generator,
    count: int,
    *,
    token_budget: int,
    max_seqs: int,
    max_context: int,
    kv_tokens: int | None = None,
) -> list[Composition]:
    """Random steps off the grid: decodes of different contexts, up to three chunks, or both; a third of each kind."""
    found: list[Composition] = []
    while len(found) < count:
        kind = len(found) % 3
        contexts: tuple[int, ...] = ()
        if kind != 1:
            most = max(1, min(max_seqs, token_budget) - (3 if kind == 2 else 0))
            decoding = int(rng.integers(1, most, endpoint=True))
            deepest = max_context if kv_tokens is None else max(1, min(max_context, kv_tokens // decoding))
            contexts = tuple(rng.integers(1, deepest, size=decoding, endpoint=True).tolist())
        items: list[tuple[int, int]] = []
        left = token_budget - len(contexts)
        for _ in range(min(int(rng.integers(1, 4)), max_seqs - len(contexts)) if kind else 0):
            if left > 0:
                new = int(rng.integers(1, min(left, max_context), endpoint=True))
                items.append((new, int(rng.integers(0, max_context - new, endpoint=True)) * int(rng.integers(0, 2))))
                left -= new
        step = Composition(contexts, tuple(items))
        if step.tokens and (kv_tokens is None or _held(step) <= kv_tokens):
            found.append(step)
    return found


def _held(step: Composition) -> int:
    """Tokens in the cache after a step."""
    return sum(step.contexts) + sum(new + before for new, before in step.items)


def _features(steps: Sequence[Composition]) -> Array:
    """What a step's time is roughly linear in: 1, its rows, and the pairs of tokens that meet in attention."""
    pairs = [sum(s.contexts) + sum(new * (before + (new + 1) / 2) for new, before in s.items) for s in steps]
    return np.column_stack([np.ones(len(steps)), [s.tokens for s in steps], pairs])


def affordable(
    levels: Sequence[Sequence[Composition]], seconds: dict[Composition, float], budget_s: float
) -> list[Composition]:
    """Points beyond the first level, level by level and the quickest first, as many as LEAST rounds over all allow.

    seconds    what passes of the first level took, to estimate the others by
    budget_s   for all rounds that are still to be made
    """
    known = list(seconds)
    took = np.array([seconds[step] for step in known])
    rate, _ = nnls(_features(known) / took[:, None], np.ones(len(known)))
    riding = RUN * float(np.mean([seconds[step] for step in known if not step.items] or [0.0]))
    cost = np.array([time_s + riding if step.items else 0.0 for step, time_s in zip(known, took, strict=True)])
    left = budget_s - (LEAST - 1) * cost.sum()
    found: list[Composition] = []
    for points in levels[1:]:
        estimate = _features(points) @ rate if points else np.zeros(0)
        for index in np.argsort(estimate, kind="stable"):
            if points[index].items:
                left -= LEAST * (estimate[index] + riding)
            if left < 0:
                return found
            found.append(points[index])
    return found


def rounds(points: Sequence[Composition], rng: np.random.Generator) -> list[list[Composition]]:
    """All points in random order, as steps come in service: behind every prompt chunk a run of like decode steps.

    Decode-only points come as often as there is room for them, but at least in one run.
    """
    prompts = [point for point in points if point.items]
    decodes = [point for point in points if not point.items]
    prompts = [prompts[index] for index in rng.permutation(len(prompts))]
    if not decodes:
        return [[point] for point in prompts]
    often = max(len(prompts), len(decodes))
    order = [decodes[index] for _ in range(-(-often // len(decodes))) for index in rng.permutation(len(decodes))]
    return [prompts[i : i + 1] + [order[i]] * RUN for i in range(often)]


def profile(
    run: Run,
    levels: Sequence[Sequence[Composition]],
    *,
    minutes: float,
    rng: np.random.Generator,
    progress: Callable[[float], None] = lambda share: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Pass]:
    """Measure the first level once whatever it takes, then as many points as can be repeated until the time is over.

    levels     as `grid` returns them
    minutes    for all of it, warm-up included
    progress   called with the share of the time that is over, at most 1

    Every round is in an order of its own, so that a machine that drifts does so for all sizes alike. There are MOST
    rounds at most. Raises MeasurementError if there is nothing to measure.
    """
    coarse = list(levels[0]) if levels else []
    if not coarse:
        raise MeasurementError("passes to measure: 0, expected at least 1; raise the token budget or the sequences")
    begin, budget_s = clock(), 60.0 * minutes
    passes: list[Pass] = []

    def over() -> bool:
        progress(min(1.0, (clock() - begin) / budget_s) if budget_s > 0 else 1.0)
        return clock() - begin >= budget_s

    def measure(points: list[Composition], whole: bool) -> dict[Composition, float]:
        """One round, until the time is over unless `whole`; seconds of a pass with what goes on around it."""
        took: dict[Composition, list[float]] = defaultdict(list)
        for steps in rounds(points, rng):
            if over() and not whole:
                break
            started = clock()
            made = run(steps)
            passes.extend(made)
            inside = [max((p.total_s for p in made if p.composition == step), default=0.0) for step in steps]
            outside = max(clock() - started - sum(inside), 0.0) / len(steps)
            for step, time_s in zip(steps, inside, strict=True):
                took[step].append(time_s + outside)
        return {step: float(np.mean(several)) for step, several in took.items()}

    run(sorted(coarse, key=lambda step: step.tokens)[:WARM_UP])
    seconds = measure(coarse, whole=True)
    rest = affordable(levels, {s: max(t, 1e-9) for s, t in seconds.items()}, budget_s - (clock() - begin))
    measure(rest, whole=False)
    for _ in range(MOST - 1):
        if over():
            break
        measure([*coarse, *rest], whole=False)
    over()
    return passes


def typical(passes: Sequence[Pass]) -> dict[tuple[Composition, int], Sample]:
    """One sample for every (composition, stage), of the passes of all shards, replicas and repeats.

    Its laps are medians by operator, all scaled alike so that they add up to the median of the passes' sums:
    disturbances hit one operator at a time, so that the medians alone add up to less than a usual pass takes.
    """
    alike: dict[tuple[Composition, int], list[Pass]] = defaultdict(list)
    for one in passes:
        alike[one.composition, one.stage].append(one)
    found = {}
    for (step, stage), several in alike.items():
        table = pd.DataFrame([dict(one.laps) for one in several])
        medians = table.median()
        scale = table.sum(axis=1).median() / medians.sum()
        laps = {str(name): float(value) * scale for name, value in medians.items()}
        found[step, stage] = Sample(len(step.contexts), sum(step.contexts), step.items, laps)
    return found


def cost_rows(passes: Sequence[Pass], model: ModelShape, mapping: Mapping, precision: Precision) -> pd.DataFrame:
    """Operators as they were measured, columns hwmodels.insitu.ROW_COLUMNS and stage; what InSituCost is made of."""
    samples = typical(passes)
    frames = []
    for stage in range(mapping.pp):
        here = [sample for (_, number), sample in samples.items() if number == stage]
        if not here:
            raise MeasurementError(
                f"stage {stage}: no pass was measured, expected some of each of {mapping.pp} stages; measure again"
            )
        frames.append(rows_of(model, mapping, precision, stage, here).assign(stage=stage))
    return pd.concat(frames, ignore_index=True)
