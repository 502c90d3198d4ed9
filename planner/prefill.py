"""How should prefill work be cut and ordered, and how far is a policy from the best that is possible?

Three uses of the linear iteration model (planner.prefillcosts), the program (planner.prefillprogram) and the bound
(planner.prefillbound):

- `best_possible`: a mean TTFT that no schedule of a stretch of traffic goes below at a TBT limit, and each policy's
gap; - `choose_cut`: which budget, chunk or number of layer groups serves each load best, as a table;
- `next_step`: what the next step should compute, by the program over a short horizon with a time limit.

None of them looks at a clock; the solver's time limit is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

from planner.catalogue import Catalogue, mapping_of
from planner.errors import PlanError
from planner.plan import Pool
from planner.prefillbound import Bound, ttft_bound
from planner.prefillcosts import Clock, LinearStep
from planner.prefillhorizon import require_tbt
from planner.prefilllinear import TableClock, minorant
from planner.prefillpolicies import layered, prefill_first, require_groups, sarathi, sarathi_serve, shortest_first
from planner.prefillsteps import Policy, Schedule, Window, follow, window_of
from simulator.workload import Requests

Kind = Literal["budget", "chunk", "shortest", "layers", "whole"]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a schedule stands to the best possible.

    ttft_s, tbt_s, max_tbt_s   weighted mean TTFT; quantile asked for, and longest, of the gaps between tokens
    keeps      whether its longest gap is within the limit, but for rounding
    bound      on the mean TTFT of schedules with the limit, or with its own longest gap where that is longer; that
               decode in every step or may not, and in which some sequence always decodes or not, as in this one
    """

    name: str
    ttft_s: float
    tbt_s: float
    max_tbt_s: float
    keeps: bool
    bound: Bound

    @property
    def gap(self) -> float:
        """Part of its mean TTFT that a better schedule might save, at most."""
        return max(0.0, 1.0 - self.bound.ttft_s / self.ttft_s) if self.ttft_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class BestPossible:
    """The bound at the limits, and every schedule's standing."""

    bound: Bound
    tbt_s: float
    standings: tuple[Standing, ...]


def best_possible(
    window: Window,
    step: LinearStep,
    schedules: Sequence[Schedule],
    tbt_s: float = inf,
    max_tokens: float = 8192,
    quantile: float = 0.99,
) -> BestPossible:
    """How far each schedule of the window is from the best mean TTFT at the TBT limit.

    step         below the clock of the schedules everywhere: the clock itself, or a `minorant` of it
    max_tokens   prompt tokens that a layer may see in a step; schedules that show it more are compared to a bound of
                 theirs

    Raises NoFeasiblePlanError, with the floor, for a limit below a decode step.
    """
    standings = []
    for s in schedules:
        own = max(tbt_s, s.max_tbt_s) if len(s.gap_s) else inf
        kind = {"pauses": not s.together, "always": s.decoding}
        bound = ttft_bound(step, window, own, max(max_tokens, s.largest_tokens), **kind)
        standings.append(
            Standing(s.name, s.mean_ttft_s, s.tbt_s(quantile), s.max_tbt_s, s.max_tbt_s <= tbt_s * (1 + 1e-9), bound)
        )  # fmt: skip
    return BestPossible(ttft_bound(step, window, tbt_s, max_tokens), tbt_s, tuple(standings))


@dataclass(frozen=True, slots=True)
class Cut:
    """A way of cutting prompts.

    budget: tokens of a step, decodes first (Sarathi-Serve); chunk: one chunk a step (SARATHI); shortest: as budget, the
    least left first; layers: groups of layers, 0 for the rule of layered prefill; whole: prompts of up to so many
    tokens alone in a step (vLLM V0)
    """

    kind: Kind
    size: int

    def __str__(self) -> str:
        return "layers by rule" if self.kind == "layers" and not self.size else f"{self.kind} {self.size}"

    def policy(self, layers: int, budget: float = inf) -> Policy:
        """The policy; raises PlanError for chunks above a step's budget and groups that do not divide the layers."""
        if self.kind != "layers" and self.size > budget:
            raise PlanError(f"{self.kind} of {self.size} tokens: expected at most the {budget:.0f} tokens of a step")
        if self.kind == "budget":
            return sarathi_serve(self.size)
        if self.kind == "chunk":
            return sarathi(self.size)
        if self.kind == "shortest":
            return shortest_first(self.size)
        if self.kind == "whole":
            return prefill_first(self.size)
        if self.size:
            require_groups(layers, self.size)
        return layered(self.size or None, min(budget, 8192))


#: What is tried where nothing else is asked for.
CUTS = (
    *(Cut("budget", tokens) for tokens in (256, 512, 1024, 2048, 4096)),
    *(Cut("shortest", tokens) for tokens in (512, 1024, 2048)),
    *(Cut("chunk", tokens) for tokens in (256, 512, 1024)),
    Cut("layers", 0),
    Cut("whole", 8192),
)


@dataclass(frozen=True, slots=True)
class Row:
    """The best cut at a load.

    load_per_s     requests per second; cut: None where no cut keeps the limit
    ttft_s, tbt_s  of it: mean TTFT and the quantile of the gaps; of the cut with the shortest gaps where none keeps it
    bound_s        no schedule with gaps no longer than the limit has a shorter mean TTFT; None where not asked for
    tried          (cut, mean TTFT, quantile of the gaps), in the order asked for
    """

    load_per_s: float
    cut: Cut | None
    ttft_s: float
    tbt_s: float
    bound_s: float | None
    tried: tuple[tuple[Cut, float, float], ...]


def choose_cut_of(
    clock: Clock,
    windows: Mapping[float, Window],
    tbt_s: float,
    cuts: Sequence[Cut] = CUTS,
    quantile: float = 0.99,
    below: LinearStep | None = None,
    max_tokens: float = 8192,
) -> tuple[Row, ...]:
    """The cut with the least mean TTFT whose quantile of the gaps is within the limit, for each load.

    windows   traffic of each load; below: a step model nowhere above the clock, for the bound

    Raises PlanError for no loads or cuts, NoFeasiblePlanError, with the floor, for a limit below a decode step.
    """
    if not windows or not cuts:
        raise PlanError(f"{len(windows)} loads and {len(cuts)} cuts: expected at least one of each")
    require_tbt(clock, (), tbt_s)
    rows = []
    for load, window in windows.items():
        tried = []
        for cut in cuts:
            s = follow(window, cut.policy(clock.layers, max_tokens), clock, str(cut))
            tried.append((cut, s.mean_ttft_s, s.tbt_s(quantile)))
        fitting = [row for row in tried if row[2] <= tbt_s]
        best = min(fitting, key=lambda row: row[1]) if fitting else min(tried, key=lambda row: row[2])
        bound = None if below is None else ttft_bound(below, window, tbt_s, max_tokens).ttft_s
        rows.append(Row(load, best[0] if fitting else None, best[1], best[2], bound, tuple(tried)))
    return tuple(rows)


def choose_cut(
    catalogue: Catalogue,
    pool: Pool,
    requests: Requests,
    loads_per_s: Sequence[float],
    tbt_s: float,
    cuts: Sequence[Cut] = CUTS,
    quantile: float = 0.99,
    max_tokens: int = 8192,
) -> tuple[Row, ...]:
    """The same for one replica of a pool, on the look-ups of its step model.

    With a bound where there is one stage and one attention group.

    requests   whose lengths and pattern of arrivals are kept at every load

    Raises what Catalogue.replica raises.
    """
    clock, kv_tokens = clock_of(catalogue, pool, max(max_tokens, int(requests.prompt_tokens.max())) + pool.max_seqs)
    windows = {}
    for load in loads_per_s:
        scaled = requests.scaled_to_rate(load)
        columns = [column.tolist() for column in (scaled.arrival_s, scaled.prompt_tokens, scaled.output_tokens)]
        windows[load] = window_of(*columns, kv_tokens=kv_tokens, max_seqs=pool.max_seqs)
    plain = len(clock.model.stages) == 1 and clock.groups == 1
    below = minorant(clock.model, clock.layers) if plain else None
    return choose_cut_of(clock, windows, tbt_s, cuts, quantile, below, max_tokens)


def clock_of(catalogue: Catalogue, pool: Pool, max_tokens: int) -> tuple[TableClock, float]:
    """The step model of a replica as a clock, for steps of up to `max_tokens` tokens, and the KV tokens it holds."""
    catalogue.reserve(max_tokens, 2 * pool.max_seqs)
    spec = catalogue.replica(pool)
    mapping = mapping_of(pool)
    layers = len(catalogue.model.layers)
    return TableClock(spec.model, layers, mapping.attention_dp), float(spec.kv_blocks * pool.block_tokens * spec.lanes)
