"""In which order does a queue wait? By a rank that never changes, so that no clock is needed to keep it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from simulator.errors import SchedulerError

Order = Literal["fcfs", "shortest", "deadline", "priority"]
ORDERS: tuple[Order, ...] = get_args(Order)
#: (class, rank) of a request, lowest first, by its prompt tokens, its SLO class and the time it came, in seconds.
Rank = tuple[int, float]
Ranking = Callable[[int, int, float], Rank]


def ranking(order: str, ageing_tokens_per_s: float = 0.0, targets_s: Sequence[float] = ()) -> Ranking | None:
    """How requests are ranked; None where the queue is first come, first served.

    shortest   the shortest prompt first; one that has waited for t seconds counts as ageing_tokens_per_s * t tokens
               shorter (Nexus, arXiv:2507.06608v2, Algorithm 2). All that wait age alike, so that ranks stay.
    deadline   the earliest arrival + target of its SLO class first; the last target stands for all further classes
    priority   the class of the lowest number first, within a class by arrival

    Raises SchedulerError for another order, an ageing below 0, and deadlines without targets.
    """
    if order not in ORDERS:
        raise SchedulerError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
    if not 0 <= ageing_tokens_per_s < float("inf"):
        raise SchedulerError(f"ageing_tokens_per_s={ageing_tokens_per_s}: expected a finite number of at least 0")
    if order == "fcfs":
        return None
    if order == "shortest":
        return lambda prompt, slo_class, at_s: (0, prompt + ageing_tokens_per_s * at_s)
    if order == "priority":
        return lambda prompt, slo_class, at_s: (slo_class, at_s)
    if not targets_s or not all(0 < target < float("inf") for target in targets_s):
        raise SchedulerError(f"order=deadline with targets_s={tuple(targets_s)}: expected seconds above 0, one or one "
                             "for each SLO class")  # fmt: skip
    last = len(targets_s) - 1
    return lambda prompt, slo_class, at_s: (0, at_s + targets_s[min(slo_class, last)])
