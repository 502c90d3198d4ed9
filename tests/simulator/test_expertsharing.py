"""Which side computes an expert: clocks against the general executor, HybriMoE's rule against every split."""

from __future__ import annotations

from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.expertsharing import SHARINGS, Work, ends_s, hybrid
from simulator.timelines import Graph, Operation, Place, list_schedule, on


@st.composite
def works(draw: st.DrawFn, most: int = 5) -> list[Work]:
    """Experts of a layer, each more expensive with more tokens, some of them there."""
    found = []
    for expert in range(draw(st.integers(1, most))):
        tokens, there = draw(st.integers(1, 9)), draw(st.booleans())
        found.append(Work(expert, tokens, 0, 0.5 + 0.01 * tokens, 0.8 + 0.2 * tokens, 0.0 if there else 1.3, 0.0, 0.0))
    return found


def in_sequence(graph: Graph, place: Place) -> tuple[float, ...]:
    """As given, whether or not something else could start before."""
    return (place.position,)


@settings(max_examples=100, deadline=None)
@given(works(), st.sampled_from(sorted(SHARINGS)), st.tuples(*[st.floats(0, 3)] * 3))
def test_clocks_against_the_general_executor(layer: list[Work], name: str, clocks: tuple[float, float, float]) -> None:
    """The same loads and experts as operations of a graph end when the layer's clocks say."""
    order = SHARINGS[name](layer, clocks)
    assert sorted(work.expert for work, _ in order) == sorted(work.expert for work in layer)
    operations = []
    for work, on_cpu in order:
        after: tuple[str, ...] = ()
        if not on_cpu and work.load_s:
            operations.append(Operation(f"load {work.expert}", on({"link": work.load_s})))
            after = (f"load {work.expert}",)
        seconds = {"cpu": work.cpu_s} if on_cpu else {"gpu": work.gpu_s}
        operations.append(Operation(f"run {work.expert}", on(seconds), after))
    names = ("gpu", "cpu", "link")
    schedule = list_schedule(
        operations, dict.fromkeys(names, 1), in_sequence, free_s=dict(zip(names, clocks, strict=True))
    )
    ran = [end for name, end in schedule.end_s.items() if name.startswith("run")]
    gpu_s, cpu_s, _ = ends_s(order, clocks)
    used = [end for end, where in ((gpu_s, False), (cpu_s, True)) if any(on_cpu is where for _, on_cpu in order)]
    assert max(ran) == pytest.approx(max(used))


def best_s(layer: list[Work]) -> float:
    """The shortest layer over all orders and all splits."""
    start = (0.0, 0.0, 0.0)
    return min(
        max(ends_s(list(zip(order, sides, strict=True)), start)[:2])
        for order in permutations(layer)
        for sides in product((False, True), repeat=len(layer))
    )


@settings(max_examples=40, deadline=None)
@given(works(4))
def test_hybrimoes_rule_is_near_the_best_split(layer: list[Work]) -> None:
    """Never below the best of all orders and splits, and at most twice as long (1.22 in 3000 random layers)."""
    took_s = max(ends_s(hybrid(layer, (0.0, 0.0, 0.0)), (0.0, 0.0, 0.0))[:2])
    least_s = best_s(layer)
    assert least_s - 1e-9 <= took_s <= 2 * least_s
