"""Which published ways of scheduling prefill are compared, as schedulers of one replica?

orca            whole prompts beside all decodes (Orca, OSDI 2022)
prefill-first   whole prompts before any decode (vLLM V0)
sarathi         chunks of fixed size beside the decodes (arXiv:2308.16369); several prompts may share a chunk
sarathi-serve   all decodes, then prompts up to a token budget (arXiv:2403.02310)
layered         a cohort of whole prompts, one group of layers a step (arXiv:2510.08055)
shortest        as sarathi-serve, the shortest prompt first, less so the longer the others wait
deadline        as sarathi-serve, the earliest arrival + TTFT aimed at first
receding        by a linear program before every step, chunks (planner.recedingscheduler)
receding-layers the same, groups of layers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from planner.catalogue import Catalogue
from planner.plan import Pool
from planner.prefillpolicies import require_groups
from simulator.deployment import ReplicaSpec

Family = Literal[
    "orca", "prefill-first", "sarathi", "sarathi-serve", "layered", "shortest", "deadline", "receding",
    "receding-layers",
]  # fmt: skip
FAMILIES: tuple[Family, ...] = get_args(Family)
#: Those of the program.
PROGRAMS: tuple[Family, ...] = ("receding", "receding-layers")


@dataclass(frozen=True, slots=True)
class Ways:
    """What is tried of each family.

    budgets       tokens of a step, of sarathi-serve, shortest and deadline, ascending; chunks: prompt tokens of a step
    groups        of layers, each dividing them, beside layered prefill's rule of one for every 512 tokens
    ageing_tokens_per_s, deadlines_s   see simulator.orders.ranking
    """

    budgets: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    chunks: tuple[int, ...] = (256, 512, 1024)
    groups: tuple[int, ...] = ()
    ageing_tokens_per_s: float = 100.0
    deadlines_s: tuple[float, ...] = (1.0, 4.0)


@dataclass(frozen=True, slots=True)
class Contender:
    """One way: its family, what it is set to, and the fields of a pool and of a scheduler that say so."""

    family: Family
    setting: str = ""
    pool: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.family} {self.setting}".strip()

    def replica(self, catalogue: Catalogue, pool: Pool) -> ReplicaSpec:
        """A replica of the pool that schedules so. Raises what Catalogue.replica raises."""
        spec = catalogue.replica(replace(pool, **self.pool))
        return replace(spec, scheduler=replace(spec.scheduler, **self.scheduler)) if self.scheduler else spec


def contenders(ways: Ways, layers: int, longest_tokens: int, *, one_stage: bool = True) -> tuple[Contender, ...]:
    """All ways but the program, in the families' order.

    layers           of the model; longest_tokens: longest prompt + output, of which whole prompts need a budget
    one_stage        whether there is one pipeline stage and attention group, without which there are no layer groups

    Raises PlanError for groups of layers that do not divide them.
    """
    for count in ways.groups:
        require_groups(layers, count)
    whole = max(ways.budgets[-1], longest_tokens + 1)
    found = [
        Contender("orca", "", {"policy": "orca", "token_budget": whole}),
        Contender("prefill-first", "", {"policy": "prefill-first", "token_budget": whole}),
        *(Contender("sarathi", str(c), {"token_budget": ways.budgets[-1], "chunk_tokens": c}) for c in ways.chunks),
        *_budgets("sarathi-serve", ways.budgets, {}),
    ]
    if one_stage:
        ours = {"policy": "layered", "token_budget": whole}
        found.append(Contender("layered", "by rule", ours))
        for count in ways.groups:
            found.append(Contender("layered", f"in {count}", ours, {"group_tokens": 1, "max_groups": count}))
    found += _budgets("shortest", ways.budgets,
                      {"order": "shortest", "ageing_tokens_per_s": ways.ageing_tokens_per_s})  # fmt: skip
    found += _budgets("deadline", ways.budgets, {"order": "deadline", "deadlines_s": ways.deadlines_s})
    return tuple(found)


def _budgets(family: Family, budgets: Sequence[int], fields: dict[str, Any]) -> list[Contender]:
    return [Contender(family, str(tokens), {"token_budget": tokens, **fields}) for tokens in budgets]
