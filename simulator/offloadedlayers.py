"""How long do a layer's experts take in steps of any number of tokens, when the device holds a part of them?

Without loads ahead of time layers do not meet: each waits for all of its experts. So a few of them stand for all, and
their time does not depend on what comes in between. Steps of a number of tokens follow each other until the cache has
settled; the same draws priced with everything there say what is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hwmodels.expertoffload import ExpertCosts
from hwmodels.offloadedcost import OffloadedLayers
from simulator.errors import OffloadError
from simulator.expertcache import Array, Indices
from simulator.expertrouting import PERSISTENCE, Draw, SampledRouting
from simulator.offloadedsteps import Offloaded, simulate_offload
from simulator.offloadplan import OffloadPlan

#: Steps of so many tokens are simulated; a layer in between lies on the line between its neighbours.
TOKENS = (
    1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 65536, 262144,
)  # fmt: skip
#: Tokens that are drawn at most; each then stands for several alike. Every expert of the models here has some of them.
SAMPLED = 512
#: Steps of more tokens are taken for prompts, whose tokens do not follow those of the step before.
DECODING = 256
#: Experts computed, and numbers drawn, for one number of tokens: what bounds the time this takes.
WORKS, NUMBERS = 6_000, 400_000
#: Experts at least, in as many layers as that takes, so that rounding the cache to whole experts does not matter.
EXPERTS = 100
#: Steps measured, fewest and most.
FEWEST, MOST = 10, 100
#: Steps before them touch so many times as many experts as the cache holds.
SETTLED = 2


@dataclass(frozen=True, slots=True)
class Sides:
    """What experts cost on either side, whatever the number of tokens.

    costs       with empty tables of times: bytes, the link, the host
    gpu_s       of one expert at each level, by its tokens; scaled so that all of a step's take `resident_s` of it
    cpu_s       the same on the CPU; None without
    resident_s  of a layer's experts that are all on the device, by the tokens of the step
    """

    costs: ExpertCosts
    gpu_s: Callable[[int, Array], Array]
    cpu_s: Callable[[int, Array], Array] | None
    resident_s: Callable[[Array], Array]


def offloaded_layers(
    sides: Sides,
    plan: OffloadPlan,
    popularity: Array,
    *,
    tokens: Sequence[int] = TOKENS,
    persistence: float = PERSISTENCE,
    seed: int = 0,
) -> OffloadedLayers:
    """A layer's experts under a plan, by the tokens of a step.

    popularity    of every layer's experts [layers, experts], see simulator.expertrouting.SampledRouting
    persistence   of decoding sequences, see there
    seed          of the draws, which are the same for every plan of the same number of tokens

    Raises OffloadError for a plan that loads ahead of time: then layers are not on their own.
    """
    if plan.prefetch.leads:
        raise OffloadError(f"prefetch of {plan.prefetch.leads} layers ahead: expected a plan that loads on demand")
    found = [_layer(sides, plan, popularity, count, persistence, seed) for count in tokens]
    resident_s = sides.resident_s(np.array(tokens, dtype=float))
    each = [1 / layers for _, layers in found]
    results = [result for result, _ in found]
    return OffloadedLayers(
        tokens=np.array(tokens, dtype=float),
        resident_s=resident_s,
        layer_s=np.array([one.step_s * part for one, part in zip(results, each, strict=True)]),
        hit_rate=np.array([one.hit_rate for one in results]),
        busy_s={
            name: np.array([one.busy[name] * one.step_s * part for one, part in zip(results, each, strict=True)])
            for name in results[0].busy
        },
        loaded_bytes=np.array([one.loaded_bytes * part for one, part in zip(results, each, strict=True)]),
        level_share=np.array([one.level_share for one in results]),
    )


def _layer(
    sides: Sides, plan: OffloadPlan, popularity: Array, tokens: int, persistence: float, seed: int
) -> tuple[Offloaded, int]:
    """Steps of one number of tokens, and how many layers they have."""
    drawn = min(tokens, SAMPLED)
    layers, warmup, steps = _size(popularity, sides.costs.top_k, drawn, plan.cache_share)
    some = popularity[np.linspace(0, len(popularity) - 1, layers).round().astype(int)]
    rng, luck = np.random.default_rng((seed, tokens)).spawn(2)
    routing = SampledRouting(
        some, sides.costs.top_k, rng, tokens=drawn, persistence=persistence if tokens <= DECODING else 0.0
    )
    draws = [routing.step() for _ in range(warmup + steps)]
    of_expert: Array = np.linspace(0.0, float(tokens), drawn + 1)
    alone_s = [sides.gpu_s(level, of_expert) for level in range(len(plan.ladder))]
    all_s = np.mean([alone_s[0][_counts(draw)].sum() / layers for draw in draws[warmup:]])
    scale = float(sides.resident_s(np.array([float(tokens)]))[0] / all_s)
    cpu_s = sides.cpu_s
    part = layers / sides.costs.layers
    costs = replace(
        sides.costs,
        layers=layers,
        gpu_s=tuple(tuple((scale * row).tolist()) for row in alone_s),
        cpu_s=() if cpu_s is None else tuple(tuple(cpu_s(at, of_expert).tolist()) for at in range(len(alone_s))),
        dense_s=(0.0,) * layers,
        once_s=0.0,
        host_bytes=sides.costs.host_bytes * part,
    )
    return simulate_offload(costs, plan, Replayed(some, draws), luck, steps=steps, warmup=warmup), layers


def _size(popularity: Array, top_k: int, tokens: int, cache_share: float) -> tuple[int, int, int]:
    """Layers, steps to settle, and measured steps: as many as the bounds on works and numbers allow, layers first."""
    layers, experts = popularity.shape
    touched = experts * (1 - (1 - top_k / experts) ** tokens)
    warmup = int(np.ceil(SETTLED * cache_share * experts / touched))
    most = min(WORKS / touched, NUMBERS / (tokens * experts))  # layers x steps
    shortest = warmup + max(FEWEST, warmup)
    layers = int(np.clip(most // shortest, min(layers, np.ceil(EXPERTS / experts)), layers))
    return layers, warmup, int(np.clip(most // layers - warmup, FEWEST, MOST))


def _counts(draw: Draw) -> Indices:
    """Tokens of every expert of every layer [layers, experts]."""
    layers, experts = draw.scores.shape
    places = draw.chosen.reshape(layers, -1) + experts * np.arange(layers)[:, None]
    return np.bincount(places.ravel(), minlength=layers * experts).reshape(layers, experts).astype(np.int64)


class Replayed:
    """Routing that was drawn before."""

    def __init__(self, popularity: Array, draws: Sequence[Draw]) -> None:
        self.popularity = popularity
        self._draws: Iterator[Draw] = iter(draws)

    def step(self) -> Draw:
        """The routing of the next step."""
        return next(self._draws)
