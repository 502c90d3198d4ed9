"""What does a step of prompt chunks, layer groups and decodes cost, as a formula that a linear program can hold?

The iteration model of prefill scheduling, with Q layers and a step in which layer q sees n_q prompt tokens:

    T = host + prompt [any prompt] + 1/Q sum over q of max over pieces i of
            (base_i + token_i n_q + decode_i D + reload_i [n_q > 0])
        + attention sum over items of (share of the layers) n (before + n/2)  +  context K

D sequences decode and attend to K tokens in all; an item computes n tokens behind `before` others; layers that nothing
passes, where no sequence decodes, cost nothing. One piece is the model a + b n + c D + d n ctx + e z of the literature;
two tell a step that waits for weights from one that waits for arithmetic, whose larger time counts. Weights and experts
are read once per traversal of a layer, whatever the tokens.

Attention is charged by the *position* of a token, before + n/2 on average over a chunk, so that every way of cutting a
prompt costs attention L^2/2 in all: causal attention does the same arithmetic however it is cut. What chunks pay more
is in `host`, `prompt`, `base` and `reload`, once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import NamedTuple, Protocol

from planner.errors import PlanError


class Span(NamedTuple):
    """Tokens of a prompt that a step takes through layers first <= q < end, behind `before` others of the prompt."""

    tokens: int
    before: int
    first: int
    end: int


class Clock(Protocol):
    """Prices steps; `layers` counts those that spans run through."""

    @property
    def layers(self) -> int:
        """Layers that spans are counted in."""
        ...

    def step_s(self, decodes: int, context: int, spans: Sequence[Span]) -> float:
        """Seconds of a step; `context`: tokens that the `decodes` sequences attend to, their new ones included."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Seconds of all layers where they are bound by one resource: of a step, by prompt token, by decode, by
    traversal."""

    base_s: float
    token_s: float = 0.0
    decode_s: float = 0.0
    reload_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LinearStep:
    """The formula of the module.

    pieces        at least one
    attention_s   per prompt token and position; context_s: per attended token of decodes
    host_s        per step; prompt_s: per step with prompts

    Raises PlanError for numbers below zero, and where a step would take no time.
    """

    pieces: tuple[Piece, ...]
    attention_s: float = 0.0
    context_s: float = 0.0
    host_s: float = 0.0
    prompt_s: float = 0.0
    layers: int = 1

    def __post_init__(self) -> None:
        rest = (self.attention_s, self.context_s, self.host_s, self.prompt_s)
        numbers = [x for p in self.pieces for x in (p.base_s, p.token_s, p.decode_s, p.reload_s)] + list(rest)
        if not self.pieces or min(numbers) < 0 or not all(map(isfinite, numbers)):
            raise PlanError(f"step model {self.pieces}, {rest}: expected pieces with finite numbers of at least 0")
        if self.layers < 1:
            raise PlanError(f"layers={self.layers}: expected at least 1")
        if self.host_s + max(p.base_s for p in self.pieces) + max(p.token_s for p in self.pieces) <= 0:
            raise PlanError("step model without base and token times: expected steps that take time")

    def blocks_s(self, tokens: float, decodes: float) -> float:
        """Seconds of all layers but for attention, when every layer sees so many prompt tokens."""
        seen = 1.0 if tokens > 0 else 0.0
        return max(p.base_s + p.token_s * tokens + p.decode_s * decodes + p.reload_s * seen for p in self.pieces)

    def step_s(self, decodes: int, context: int, spans: Sequence[Span]) -> float:
        """Seconds of a step."""
        total = self.host_s + self.context_s * context
        if not spans:
            return total + self.blocks_s(0.0, decodes)
        whole = 0
        for span in spans:
            share = (span.end - span.first) / self.layers
            total += self.attention_s * share * span.tokens * (span.before + span.tokens / 2)
            whole += span.tokens if span.end - span.first == self.layers else -1_000_000_000
        total += self.prompt_s
        if whole >= 0:
            return total + self.blocks_s(whole, decodes)
        for first, end, tokens in ranges(spans, self.layers):
            if tokens or decodes:
                total += (end - first) / self.layers * self.blocks_s(tokens, decodes)
        return total

    def alone_s(self, tokens: float, before: float = 0.0) -> float:
        """Least seconds in which a prompt's last `tokens` can be computed, however they are cut: alone in one step.

        Cut in steps, each piece's base is paid more often, and the sum of maxima is no less than the maximum of sums.
        """
        return (
            self.host_s + self.prompt_s + self.blocks_s(tokens, 0.0) + self.attention_s * tokens * (before + tokens / 2)
        )


def ranges(spans: Sequence[Span], layers: int) -> list[tuple[int, int, int]]:
    """(first layer, end, prompt tokens in each of them) of the runs of layers that see the same tokens.

    >>> ranges([Span(100, 0, 0, 2), Span(50, 0, 1, 4)], 4)
    [(0, 1, 100), (1, 2, 150), (2, 4, 50)]
    """
    cuts = sorted({0, layers, *(s.first for s in spans), *(s.end for s in spans)})
    return [
        (first, end, sum(s.tokens for s in spans if s.first <= first and end <= s.end)) for first, end in pairwise(cuts)
    ]
