"""Which of a layer's experts does which side compute, and in which order?

Policies know when GPU, CPU and the link between their memories are next free, but do not move these clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Work:
    """One expert's tokens in a layer.

    expert, tokens, level   its number, routed tokens, level of precision it is computed in
    gpu_s, cpu_s            to compute it; cpu_s is infinite where the CPU computes none
    load_s                  over the link; 0 where the GPU's memory has it or will
    ready_s                 when the GPU's memory has it, if load_s is 0
    host_s                  when the host's memory has it
    """

    expert: int
    tokens: int
    level: int
    gpu_s: float
    cpu_s: float
    load_s: float
    ready_s: float
    host_s: float


#: When GPU, CPU and link are next free, none before the layer's experts are known.
Clocks = tuple[float, float, float]
#: Where and in which order a layer's experts are computed: (work, whether on the CPU).
Sharing = Callable[[Sequence[Work], Clocks], list[tuple[Work, bool]]]


def load_all(works: Sequence[Work], clocks: Clocks) -> list[tuple[Work, bool]]:
    """Everything on the GPU: first what is there or under way, then what must be loaded, most tokens first."""
    return [(work, False) for work in sorted(works, key=lambda work: (work.load_s > 0, work.ready_s, -work.tokens))]


def cached_on_gpu(works: Sequence[Work], clocks: Clocks) -> list[tuple[Work, bool]]:
    """A fixed split: the GPU computes what its memory has, the CPU the rest."""
    return [(work, work.load_s > 0) for work in sorted(works, key=lambda work: (work.ready_s, -work.tokens))]


def hybrid(works: Sequence[Work], clocks: Clocks) -> list[tuple[Work, bool]]:
    """HybriMoE's list scheduling (arXiv:2504.05897), as its public code does it.

    In the order cached then not, most tokens first, the GPU may take the head, behind a load over the link if it is not
    there, and the CPU the tail: the one that ends first is done, until nothing is left.
    """
    gpu_s, cpu_s, link_s = clocks
    queue = sorted(works, key=lambda work: (work.load_s > 0, -work.tokens))
    head, tail = 0, len(queue) - 1
    order: list[tuple[Work, bool]] = []
    while head <= tail:
        first, last = queue[head], queue[tail]
        arrived_s = max(link_s, first.host_s) + first.load_s if first.load_s > 0 else first.ready_s
        by_gpu_s = max(gpu_s, arrived_s) + first.gpu_s
        by_cpu_s = max(cpu_s, last.host_s) + last.cpu_s
        if by_gpu_s <= by_cpu_s:
            gpu_s, head = by_gpu_s, head + 1
            if first.load_s > 0:
                link_s = arrived_s
            order.append((first, False))
        else:
            cpu_s, tail = by_cpu_s, tail - 1
            order.append((last, True))
    return order


SHARINGS: dict[str, Sharing] = {"load": load_all, "cpu": cached_on_gpu, "hybrid": hybrid}


def ends_s(order: Sequence[tuple[Work, bool]], clocks: Clocks) -> Clocks:
    """When GPU, CPU and link are done with a layer in this order; the layer is when GPU and CPU are."""
    gpu_s, cpu_s, link_s = clocks
    for work, on_cpu in order:
        if on_cpu:
            cpu_s = max(cpu_s, work.host_s) + work.cpu_s
            continue
        arrived_s = work.ready_s
        if work.load_s > 0:
            link_s = arrived_s = max(link_s, work.host_s) + work.load_s
        gpu_s = max(gpu_s, arrived_s) + work.gpu_s
    return gpu_s, cpu_s, link_s
