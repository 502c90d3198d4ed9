"""How are experts served that do not fit: what is cached, what is loaded ahead, and what a miss leads to?"""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.expertoffload import ExpertCosts
from simulator.errors import OffloadError
from simulator.expertcache import EVICTIONS
from simulator.expertsharing import SHARINGS


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Loads for layers to come, on what is predicted when a layer's experts are known.

    The link serves loads as they are asked for: what is needed now waits for what was asked for ahead of time.

    leads    layers ahead that are looked at, nearest first
    hits     part of the predicted experts that is right, by lead; experts that are not needed stand for the others
    walk     stop at the first layer of which something must be loaded (HOBBIT), else load what all of them need
    impact   instead, load what saves most time of its layer's schedule while the link would idle (HybriMoE)
    """

    leads: tuple[int, ...] = ()
    hits: tuple[float, ...] = ()
    walk: bool = False
    impact: bool = False

    def __post_init__(self) -> None:
        """Raise OffloadError for leads and hits that cannot be."""
        if len(self.leads) != len(self.hits) or min(self.leads, default=1) < 1:
            raise OffloadError(f"leads {self.leads}, hits {self.hits}: expected a hit rate for each lead of 1 or more")
        if not all(0 <= hit <= 1 for hit in self.hits):
            raise OffloadError(f"hits {self.hits}: expected shares in [0, 1]")


#: HOBBIT's stacked gates: 96 % right for the next layer, about 90 % two and three ahead (of the heaviest expert).
HOBBIT_PREFETCH = Prefetch((1, 2, 3), (0.96, 0.9, 0.9), walk=True)


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """How experts that do not fit are served.

    cache_share   experts' bytes, at the best level, that the accelerator holds; in [0, 1]
    ladder        weight formats from the best
    thresholds    of importance, one for each format, see simulator.expertcache.levels
    low_share     of the cache's bytes for the formats below the best, in equal parts
    eviction      a name of simulator.expertcache.EVICTIONS
    per_layer     whether every layer has its own part of the cache
    misses        'load': onto the GPU, 'cpu': computed there, 'hybrid': as HybriMoE decides
    cpu_threads   that compute experts
    popular       the cache starts with the most popular experts, else with the first of every layer
    """

    cache_share: float
    ladder: tuple[str, ...] = ("fp16",)
    thresholds: tuple[float, ...] = (1.0,)
    low_share: float = 0.2
    eviction: str = "lru"
    per_layer: bool = True
    misses: str = "load"
    cpu_threads: int = 0
    prefetch: Prefetch = Prefetch()
    popular: bool = False

    def __post_init__(self) -> None:
        """Raise OffloadError for shares, names and numbers that cannot be."""
        for name in ("cache_share", "low_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise OffloadError(f"{name} = {getattr(self, name)}: expected a share in [0, 1]")
        for name, known in (("eviction", EVICTIONS), ("misses", SHARINGS)):
            if getattr(self, name) not in known:
                raise OffloadError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if len(self.ladder) != len(self.thresholds):
            raise OffloadError(f"{len(self.thresholds)} thresholds: expected one for each of {', '.join(self.ladder)}")
        if self.misses != "load" and self.cpu_threads < 1:
            raise OffloadError(f"cpu_threads = {self.cpu_threads}: misses = {self.misses!r} needs at least 1")


def cache_rooms(costs: ExpertCosts, plan: OffloadPlan) -> list[int]:
    """Experts the accelerator holds at each level."""
    nbytes = plan.cache_share * costs.layers * costs.experts * costs.expert_bytes[0]
    lower = len(costs.expert_bytes) - 1
    shares = [1 - plan.low_share if lower else 1.0] + [plan.low_share / max(1, lower)] * lower
    return [int(share * nbytes / each + 1e-9) for share, each in zip(shares, costs.expert_bytes, strict=True)]
