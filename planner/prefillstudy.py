"""Which way of scheduling prefill serves a traffic best, at which load, and how far is it from the best possible?

Every contender (planner.prefillcontenders) serves the same requests in the simulator, on one replica, at every load.
Beside them stands a mean TTFT that no schedule of these requests goes below (planner.prefillbound), whatever it cuts
and in which order, on the same step times. Without sequences that run from the start, the TBT limit does not enter that
bound: it holds for every limit. planner.prefillwindow has one that it enters, of a window that starts amid a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from planner.catalogue import Catalogue
from planner.errors import NoFeasiblePlanError, PlanError
from planner.plan import Pool
from planner.prefill import BestPossible
from planner.prefillbound import ttft_bound
from planner.prefillcontenders import PROGRAMS, Family, Ways, contenders
from planner.prefillcosts import LinearStep
from planner.prefilllinear import Ranges, TableClock, linearise, minorant
from planner.prefillsteps import window_of
from planner.prefillwindow import from_within
from planner.recedingreplicas import RecedingSpec, receding_spec
from planner.recedingscheduler import Ledger, Receding
from simulator.deployment import Deployment, ReplicaSpec
from simulator.distribution import Distribution, achieved_weighted
from simulator.itl import itl
from simulator.limits import Limit
from simulator.simulate import simulate
from simulator.workload import Requests

#: Parts of what Sarathi-Serve serves at most within the limit that are tried as loads where none are given.
PARTS = (0.4, 0.6, 0.8, 0.95)
#: TBT limits that the program is also given at the frontier's load, over the limit asked for.
LIMITS = (0.5, 0.75, 1.25, 1.5, 2.0)
#: Prompt tokens of a step that the program may fill at most.
MOST_TOKENS = 8192
#: Families whose steps are bounded, in which the statistic of the gaps tells of all of them.
STALL_FREE: tuple[Family, ...] = ("sarathi", "sarathi-serve", "shortest", "deadline")

Waiting = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class Decisions:
    """How often the program decided, fell back, and had no room to decide on; seconds charged: median and most."""

    solved: int
    fell_back: int
    full: int
    median_s: float
    most_s: float
    reasons: dict[str, int]

    @classmethod
    def of(cls, ledger: Ledger) -> Decisions:
        """What a ledger says."""
        taken = np.array(ledger.seconds or [0.0])
        median, most = float(np.median(taken)), float(taken.max())
        return cls(ledger.solved, ledger.fell_back, ledger.full, median, most, dict(ledger.reasons))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one contender at one load.

    ttft_mean_s, ttft_p99_s            of all requests
    tbt_s, tbt_p99_s, tbt_max_s        of the gaps between tokens: the limit's statistic, 99th percentile, longest
    keeps      whether the statistic is within the limit and no request was refused; refused: their number
    gap        part of the mean TTFT that a better schedule might save at most; None where there is no bound
    """

    family: Family
    name: str
    load_per_s: float
    ttft_mean_s: float
    ttft_p99_s: float
    tbt_s: float
    tbt_p99_s: float
    tbt_max_s: float
    keeps: bool
    refused: int
    preemptions: int
    gap: float | None
    decisions: Decisions | None = None


@dataclass(frozen=True, slots=True)
class Most:
    """What a contender serves at most: prompts per second when all requests wait, the limit's statistic of the gaps
    between tokens then, and whether that keeps the limit and nothing was refused."""

    name: str
    rate_per_s: float
    tbt_s: float
    keeps: bool


@dataclass(frozen=True, slots=True)
class Load:
    """All contenders at one load.

    bound_s, proof   no schedule of these requests has a shorter mean TTFT, whatever its TBT; None where not known
    """

    load_per_s: float
    outcomes: tuple[Outcome, ...]
    bound_s: float | None
    proof: str

    def best(self, families: Sequence[str] | None = None, *, program: bool = True) -> Outcome | None:
        """The contender with the least mean TTFT among those that keep the limit."""
        fitting = [
            o
            for o in self.outcomes
            if o.keeps and (families is None or o.family in families) and (program or o.family not in PROGRAMS)
        ]
        return min(fitting, key=lambda o: o.ttft_mean_s, default=None)


@dataclass(frozen=True, slots=True)
class Study:
    """The whole comparison.

    most       what each contender serves at most
    frontier   index of the load at which the program was also given other limits (`wider`): the highest at which
               somebody keeps the limit
    equal      the program at that load, with the TBT of the best of STALL_FREE within the limit; None where none is
    window     best possible from within a run at that load; None where there is no bound
    """

    limit: Limit
    loads: tuple[Load, ...]
    most: tuple[Most, ...]
    frontier: int
    wider: tuple[Outcome, ...]
    equal: Outcome | None
    window: BestPossible | None
    floor_s: float

    def capacity_per_s(self, name: str) -> float | None:
        """Prompts per second that a contender serves at most within the limit; None where it breaks it then."""
        return next((most.rate_per_s for most in self.most if most.name == name and most.keeps), None)


def study(
    catalogue: Catalogue,
    pool: Pool,
    requests: Requests,
    limit: Limit,
    loads_per_s: Sequence[float] = (),
    ways: Ways | None = None,
    *,
    horizon: int = 8,
    decision_s: float | None = None,
    kinds: Sequence[Family] = PROGRAMS,
    wider_limits: Sequence[float] = LIMITS,
    waiting: Waiting = lambda stage, part: None,
) -> Study:
    """Compare all contenders on one replica of the pool.

    limit         on itl, the time between tokens (TBT)
    loads_per_s   requests per second of the replica, ascending; PARTS of what it serves where there are none
    horizon, decision_s   see planner.recedingscheduler.Receding
    kinds         of PROGRAMS that take part
    wider_limits  TBT limits that the program is also given, over the limit; those below 1 where layered prefill keeps
                  them, and for layers
    waiting       told what is going on, and which part of the whole is done

    Raises PlanError for a horizon of no steps, groups of layers that do not divide them, and pools that share devices,
    do one role or keep experts elsewhere; NoFeasiblePlanError, with the floor, for a limit below a decode step; what
    Catalogue.replica raises, such as SchedulerError for chunks above a step's budget.
    """
    ways = ways or Ways()
    if horizon < 1:
        raise PlanError(f"horizon of {horizon} steps: expected at least 1")
    if pool.sharing is not None or pool.role != "aggregated":
        raise PlanError(f"pool with role {pool.role}, sharing {pool.sharing}: expected replicas for whole requests")
    if pool.expert_cache is not None:
        raise PlanError(f"pool with expert_cache={pool.expert_cache}: expected one whose experts are on its devices")
    requests = _classed(replace(requests, block_hashes=None), len(ways.deadlines_s))
    longest = requests.max_context_tokens
    most = max(ways.budgets[-1], longest + 1, MOST_TOKENS)
    pool = replace(pool, replicas=1, policy="chunked", token_budget=MOST_TOKENS, max_context_tokens=longest,
                   chunk_tokens=None, order="fcfs", prefix_caching="off")  # fmt: skip
    catalogue.reserve(most + pool.max_seqs, 2 * pool.max_seqs)
    plain = pool.pp == pool.attention_dp == 1
    layers = len(catalogue.model.layers)
    some = contenders(ways, layers, longest, one_stage=plain)
    specs = [(one, one.replica(catalogue, pool)) for one in some]
    base = catalogue.replica(pool)
    clock = TableClock(base.model, layers, pool.attention_dp)
    floor_s = clock.step_s(1, 1, ())
    if not limit.seconds >= floor_s:
        raise NoFeasiblePlanError(
            f"TBT limit {limit.seconds * 1e3:.4g} ms: a step of 1 decode alone takes {floor_s * 1e3:.4g} ms, which is "
            "the floor; expected at least that"
        )
    whole = most + pool.max_seqs
    run = _Runs(catalogue.engine.request_overhead_s, limit, minorant(base.model, layers) if plain else None, whole)
    programs: dict[Family, tuple[ReplicaSpec, Receding]] = {}
    if plain:
        linear = linearise(clock, Ranges(decodes=(4, max(4, min(64, pool.max_seqs - 1)))))
        rule = Receding(linear.step, limit.seconds, horizon, decision_s=decision_s)
        wide = replace(base, scheduler=replace(base.scheduler, token_budget=whole))
        programs = {"receding": (base, rule), "receding-layers": (wide, replace(rule, axis="layers"))}
    every: list[tuple[Family, str, ReplicaSpec]] = [(one.family, one.name, spec) for one, spec in specs]
    every += [(family, family, receding_spec(*program)) for family, program in programs.items() if family in kinds]
    most_of = []
    for _, name, spec in every:
        waiting(f"all at once: {name}", None)
        most_of.append(_most(name, spec, requests, limit))
    loads_per_s = loads_per_s or _loads(most_of)
    loads: list[Load] = []
    for index, load in enumerate(sorted(loads_per_s)):
        traffic = requests.scaled_to_rate(load)
        bound, proof = run.bound(traffic)
        outcomes = []
        for at, (family, name, spec) in enumerate(every):
            waiting(f"{load:g} requests/s: {name}", (index + at / len(every)) / len(loads_per_s))
            outcomes.append(run.outcome(family, name, load, spec, traffic, bound))
        loads.append(Load(load, tuple(outcomes), bound, proof))
    kept = [index for index, load in enumerate(loads) if load.best() is not None]
    at = kept[-1] if kept else 0
    chosen, traffic = loads[at], requests.scaled_to_rate(loads[at].load_per_s)
    leader, rival = chosen.best(program=False), chosen.best(STALL_FREE)
    wider: list[Outcome] = []
    equal: list[Outcome] = []
    for family, (spec, rule) in ((family, programs[family]) for family in kinds if family in programs):
        given = {
            f"{family} at {x:g} x": x * limit.seconds
            for x in wider_limits
            if x > 1 or _reached(family, chosen, x * limit.seconds)
        }
        given |= {} if rival is None else {f"{family} at equal TBT": rival.tbt_s}
        for name, tbt_s in given.items():
            waiting(name, None)
            own = receding_spec(spec, replace(rule, tbt_s=tbt_s))
            found = run.outcome(family, name, chosen.load_per_s, own, traffic, chosen.bound_s)
            (equal if name.endswith("TBT") else wider).append(found)
    window = None
    if run.below is not None:
        waiting("window", None)
        spec = next((spec for _, name, spec in every if leader is not None and name == leader.name), base)
        with suppress(NoFeasiblePlanError):  # sequences that decode then take longer than the limit
            window = from_within(spec, run.below, clock, programs["receding"][1], traffic, limit, ways, whole)
    best = min(equal, key=lambda o: o.ttft_mean_s, default=None)
    return Study(limit, tuple(loads), tuple(most_of), at, tuple(wider), best, window, floor_s)


def _reached(family: Family, load: Load, tbt_s: float) -> bool:
    """Whether the program may keep a limit below the one asked for: on the layer axis, where layered prefill does."""
    return family == "receding-layers" and any(o.family == "layered" and o.tbt_s <= tbt_s for o in load.outcomes)


@dataclass(frozen=True, slots=True)
class _Runs:
    """What all runs have in common."""

    frontend_s: float
    limit: Limit
    below: LinearStep | None
    most_tokens: int

    def bound(self, requests: Requests) -> tuple[float | None, str]:
        """Mean TTFT that no schedule of the requests goes below, and what proves it."""
        if self.below is None:
            return None, "not known for pipelines and attention groups"
        window = window_of(
            requests.arrival_s.tolist(), requests.prompt_tokens.tolist(), requests.output_tokens.tolist()
        )
        found = ttft_bound(self.below, window, inf, self.most_tokens)
        return found.ttft_s + self.frontend_s, found.proof

    def outcome(
        self, family: Family, name: str, load: float, spec: ReplicaSpec, requests: Requests, bound: float | None
    ) -> Outcome:
        """Simulate one contender."""
        result = simulate(Deployment([spec], frontend_s=self.frontend_s), requests)
        gaps, counts = itl(result)
        ttft = Distribution.of(result.requests["ttft_s"].to_numpy())
        tbt = achieved_weighted(gaps, counts, self.limit.statistic)
        refused = int(result.requests["rejected"].sum())
        ledger = spec.ledgers[-1] if isinstance(spec, RecedingSpec) else None
        return Outcome(
            family,
            name,
            load,
            ttft.mean,
            ttft.p99,
            tbt,
            Distribution.of(gaps, counts).p99,
            float(gaps.max()) if len(gaps) else 0.0,
            not refused and not tbt > self.limit.seconds,
            refused,
            int(result.requests["preemptions"].sum()),
            None if bound is None or refused else max(0.0, 1.0 - bound / ttft.mean),
            None if ledger is None else Decisions.of(ledger),
        )


def _classed(requests: Requests, classes: int) -> Requests:
    """The requests in classes of equal size by their prompts, short ones first, where they have none of their own."""
    if len(requests.class_names) > 1 or classes < 2:
        return requests
    edges = np.quantile(requests.prompt_tokens, np.arange(1, classes) / classes)
    own = np.searchsorted(edges, requests.prompt_tokens, side="left").astype(np.int16)
    return replace(requests, slo_class=own, class_names=tuple(f"prompts {i + 1}" for i in range(classes)))


def _most(name: str, spec: ReplicaSpec, requests: Requests, limit: Limit) -> Most:
    """What a replica serves when all requests wait from the start."""
    result = simulate(Deployment([spec]), replace(requests, arrival_s=np.zeros(len(requests))))
    tbt = achieved_weighted(*itl(result), limit.statistic)
    frame = result.requests
    served = frame[~frame["rejected"]]
    rate = len(served) / float(served["first_token_s"].max()) if len(served) else 0.0
    return Most(name, rate, tbt, len(served) == len(frame) and not tbt > limit.seconds)


def _loads(most: Sequence[Most]) -> tuple[float, ...]:
    """PARTS, of two figures, of what Sarathi-Serve serves at most with any of its budgets that keeps the limit then; of
    its first budget where none does."""
    found = [one for one in most if one.name.startswith("sarathi-serve")]
    highest = max([one.rate_per_s for one in found if one.keeps] or [found[0].rate_per_s])
    return tuple(sorted({float(f"{part * highest:.2g}") for part in PARTS}))
