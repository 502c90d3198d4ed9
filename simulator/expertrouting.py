"""Which experts does a step choose, one step after another?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from simulator.errors import OffloadError
from simulator.expertcache import Array, Indices, levels

#: Exponent of the power law that popularity follows where no counts are given. The layers of Mixtral 8x7B have 0.1 to
#: 0.4 over three tasks of MMLU, by least squares of shares against ranks (counts published with Fiddler).
SKEW = 0.3
#: Correlation of the noise between following tokens where nothing else is given: two tokens then share an expert of
#: Mixtral with 62 %, by chance with 46 %; published are 46 to 67 %, by layer (arXiv:2401.04088, table 5, from memory).
PERSISTENCE = 0.25
#: Noise of one draw of routing is made for at most so many numbers at once.
BLOCK = 2_000_000


@dataclass(frozen=True, slots=True)
class Draw:
    """The routing of one step: chosen experts and their gate weights [layers, tokens, top_k], mean scores of all."""

    chosen: Indices
    weights: Array
    scores: Array


def power_law(layers: int, experts: int, skew: float, rng: np.random.Generator) -> Array:
    """Popularity of every layer's experts [layers, experts]: rank ** -skew, ranks at random; 0 is uniform."""
    shares = np.arange(1, experts + 1, dtype=float) ** -skew
    return np.stack([rng.permutation(shares / shares.sum()) for _ in range(layers)])


def popularity_of(loads: Array, top_k: int) -> Array:
    """Popularity for SampledRouting under which experts get about these loads [layers, experts].

    loads   choices counted for each expert, or shares; only ratios within a layer count

    The chosen are the first `top_k` to arrive of exponential clocks whose rates are the popularity; an expert that is
    in with probability q by a fixed time has the rate -ln(1 - q). Exact for many experts; for 8 of which 2 are chosen
    shares of 4 to 21 % come out within a tenth. No expert is in with more than 99.9 %.
    """
    inclusion = top_k * loads / loads.sum(axis=1, keepdims=True)
    rates = -np.log1p(-np.clip(inclusion, 1e-9, 0.999))
    popularity: Array = rates / rates.sum(axis=1, keepdims=True)
    return popularity


class SampledRouting:
    """Chosen experts of step after step.

    popularity    of every layer's experts [layers, experts], above 0; an expert is chosen first with its share of it,
                  the next among the others likewise (Plackett-Luce, by Gumbel noise on the logarithms)
    tokens        of a step; tokens of following steps at the same position belong to the same sequence
    persistence   correlation of the noise between following tokens of a sequence, in [0, 1)
    sharpness     of the softmax over chosen logits that gives the gate weights
    """

    def __init__(
        self,
        popularity: Array,
        top_k: int,
        rng: np.random.Generator,
        *,
        tokens: int = 1,
        persistence: float = 0.0,
        sharpness: float = 1.0,
    ) -> None:
        if not (popularity > 0).all() or not 0 <= persistence < 1:
            raise OffloadError(f"persistence = {persistence}: expected popularity above 0, persistence in [0, 1)")
        self.popularity, self.top_k, self.tokens = popularity, top_k, tokens
        self.persistence, self.sharpness = persistence, sharpness
        self._rng = rng
        self._logits = np.log(popularity)
        self._state: Array | None = None

    def step(self) -> Draw:
        """The routing of the next step."""
        layers, experts = self.popularity.shape
        rows = max(1, BLOCK // (self.tokens * experts))
        parts = [self._some(slice(start, start + rows)) for start in range(0, layers, rows)]
        return Draw(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _some(self, layers: slice) -> tuple[Indices, Array, Array]:
        logits = self._logits[layers, None, :] + self._noise(layers)
        chosen = np.argpartition(logits, -self.top_k, axis=-1)[..., -self.top_k :]
        best = np.take_along_axis(logits, chosen, axis=-1)
        top = best.max(axis=-1, keepdims=True)
        weights = np.exp(self.sharpness * (best - top))
        scores = np.exp(self.sharpness * (logits - top))
        scores /= scores.sum(axis=-1, keepdims=True)
        return chosen, weights / weights.sum(axis=-1, keepdims=True), scores.mean(axis=1)

    def _noise(self, layers: slice) -> Array:
        shape = (len(self._logits[layers]), self.tokens, self.popularity.shape[1])
        if not self.persistence:
            return self._rng.gumbel(size=shape)
        if self._state is None:
            self._state = self._rng.standard_normal((len(self._logits), *shape[1:]))
        state = self._state[layers]
        state *= self.persistence
        state += np.sqrt(1 - self.persistence**2) * self._rng.standard_normal(shape)
        noise: Array = -np.log(-np.log(np.clip(ndtr(state), 1e-300, 1 - 1e-16)))
        return noise


Active = list[tuple[int, int, int]]  # (expert, tokens, level) of a layer


def active_experts(draw: Draw, thresholds: Sequence[float]) -> tuple[list[Active], Indices]:
    """Experts a step computes by layer, and its routed tokens by level, those left out last.

    An expert with tokens of several levels is computed for all of them at the best of these.
    """
    experts, count = draw.scores.shape[1], len(thresholds)
    found = levels(draw.weights, thresholds)
    shares = np.bincount(found.ravel(), minlength=count + 1)
    if draw.chosen.shape[1] == 1:
        pairs = zip(draw.chosen[:, 0].tolist(), found[:, 0].tolist(), strict=True)
        return [[(e, 1, at) for e, at in zip(*pair, strict=True) if at < count] for pair in pairs], shares
    actives = []
    for chosen, at in zip(draw.chosen, found, strict=True):
        tokens = np.bincount(chosen[at < count], minlength=experts)
        best = np.full(experts, count)
        np.minimum.at(best, chosen.ravel(), at.ravel())
        names = np.flatnonzero(tokens)
        actives.append(list(zip(names.tolist(), tokens[names].tolist(), best[names].tolist(), strict=True)))
    return actives, shares
