"""What does a program of prefill scheduling know? Prompts, decodes, steps and limits of a short horizon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

from planner.errors import NoFeasiblePlanError, PlanError
from planner.prefillcosts import Clock, LinearStep

Axis = Literal["tokens", "layers"]


@dataclass(frozen=True, slots=True)
class Pending:
    """A prompt that is not complete.

    tokens     left to compute (axis layers: all of it); before: computed already
    layers     passed already by the whole prompt, on the layer axis
    weight     of its TTFT; release_s: from the start of the horizon until it is there, 0 for those that wait
    outputs    tokens it decodes, the first included
    """

    tokens: int
    before: int = 0
    layers: int = 0
    weight: float = 1.0
    release_s: float = 0.0
    outputs: int = 1

    def __post_init__(self) -> None:
        """Raise PlanError for numbers out of range."""
        if self.tokens < 1 or self.before < 0 or self.layers < 0 or self.outputs < 1:
            raise PlanError(f"{self}: expected tokens and outputs of at least 1, before and layers of at least 0")
        if not (self.weight >= 0 and 0 <= self.release_s < inf):
            raise PlanError(f"{self}: expected weight and release of at least 0")


@dataclass(frozen=True, slots=True)
class Horizon:
    """What the program is about.

    prompts        that wait or will come
    steps          of the horizon; running: (tokens attended to in the first step, tokens still to come) of each decode
    tbt_s          longest step; budget_tokens: prompt tokens of a step; kv_tokens: KV free at the start
    grain          tokens or layers in which work is cut: whole multiples of it; None for any fraction
    finish         whether every prompt has to be complete by the end

    Raises PlanError for a horizon of no steps, a grain that does not divide, and, with the floor, a TBT limit below a
    decode step.
    """

    step: LinearStep
    prompts: tuple[Pending, ...]
    steps: int
    running: tuple[tuple[int, int], ...] = ()
    axis: Axis = "tokens"
    tbt_s: float = inf
    budget_tokens: float = inf
    kv_tokens: float = inf
    grain: int | None = None
    finish: bool = True

    def __post_init__(self) -> None:
        """Raise what the class says."""
        if self.steps < 1:
            raise PlanError(f"horizon of {self.steps} steps: expected at least 1")
        if self.budget_tokens < 1:
            raise PlanError(f"budget of {self.budget_tokens} tokens: expected at least 1")
        require_tbt(self.step, self.running, self.tbt_s)
        for prompt in self.prompts:
            if self.axis == "layers" and prompt.layers >= self.step.layers:
                raise PlanError(f"{prompt.layers} layers passed: expected fewer than the {self.step.layers} there are")
            left = prompt.tokens if self.axis == "tokens" else self.step.layers - prompt.layers
            if self.grain is not None and (self.grain < 1 or left % self.grain):
                raise PlanError(
                    f"{left} {self.axis} left in pieces of {self.grain}: expected a number that divides them, such as "
                    f"{next(g for g in range(min(max(self.grain, 1), left), 0, -1) if left % g == 0)}"
                )

    def limit_s(self, k: int) -> float:
        """Longest step k: the TBT limit, or what the decodes alone take once their contexts have outgrown it."""
        return max(self.tbt_s, self.step.step_s(*self.decodes(k), ()))

    def decodes(self, k: int) -> tuple[int, int]:
        """Sequences running at the start that still decode in step k, and the tokens they attend to then."""
        alive = [context + k for context, left in self.running if left > k]
        return len(alive), sum(alive)


def require_tbt(clock: Clock, running: Sequence[tuple[int, int]], tbt_s: float) -> None:
    """Raise NoFeasiblePlanError, with the floor, where the decodes alone, or one if none run, exceed the limit."""
    contexts = [context for context, left in running if left > 0] or [1]
    floor = clock.step_s(len(contexts), sum(contexts), ())
    if not tbt_s >= floor:
        raise NoFeasiblePlanError(
            f"TBT limit {tbt_s * 1e3:.4g} ms: a step of {len(contexts)} decodes alone takes {floor * 1e3:.4g} ms, "
            "which is the floor; expected at least that, or fewer sequences"
        )
