"""Search that proves what it prunes: plans are simulated until no bound beats the best plan found or time is over."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import inf, isfinite
from typing import TypeVar

from planner.catalogue import Catalogue, kind_of, open_catalogue
from planner.crossover import Crossover
from planner.errors import NoFeasiblePlanError
from planner.estimate import estimate_rate_per_s
from planner.mix import Kind, best_mix
from planner.plan import Plan, Pool
from planner.question import Question
from planner.shortlist import Candidate, Shortlist, shortlist
from planner.trial import Extremes, Trial, attempt, capacity
from planner.workers import Workers, available_cpus
from simulator.limits import Limit

T = TypeVar("T")
#: Called with what is going on and the share of the time that has passed, in [0, 1].
Progress = Callable[[str, float], None]

UNITS = {
    "goodput-per-gpu": "requests/s per GPU within the limits",
    "fewest-gpus": "GPUs",
    "cost": "USD per million output tokens",
    "energy": "J per output token",
    "latency": "s mean end-to-end",
}
#: How many times the time asked for a search goes on while no plan has kept the limits.
PATIENCE = 3.0
#: Share of its time that the first plan's rate may take once the time is over.
FIRST = 0.5
#: Plans simulated at a time: their scores to beat are those before the round, so results do not depend on `jobs`.
ROUND, SURVEY_ROUND = 8, 4
#: Ways of cutting whose best plan is measured in full before variants are looked at.
SURVEYED = 4
#: The first look at a way of cutting: requests, and relative width of the bisection.
ROUGH_REQUESTS, ROUGH_TOLERANCE = 2000, 0.1
#: Ways of cutting that are guessed to reach less than this share of the most promising one are not surveyed.
INTERESTING = 0.5


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size`, the last one shorter."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


@dataclass(frozen=True, slots=True)
class Ranked:
    """A simulated plan that keeps the limits.

    value       the objective in its own unit; score the same with higher better; bound what no simulation can exceed
    trial       the simulation at the demanded rate, or at the capacity where no rate was demanded
    capacity_per_s   highest simulated rate within the limits, None where the objective does not ask for it
    tie         whether it cannot be told from the best within the tolerance
    """

    plan: Plan
    value: float
    score: float
    bound: float
    trial: Trial
    capacity_per_s: float | None = None
    tie: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """A simulated operating point: throughput of the devices against speed for the user."""

    plan: Plan
    rate_per_s: float
    tokens_per_s_per_gpu: float
    tokens_per_s_per_user: float


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no other one beats in both throughput and speed."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.tokens_per_s_per_gpu, -p.tokens_per_s_per_user)):
        if not kept or point.tokens_per_s_per_user > kept[-1].tokens_per_s_per_user:
            kept.append(point)
    return tuple(kept)


@dataclass(frozen=True, slots=True)
class Family:
    """One way of serving: aggregated, disaggregated or shared.

    best          its best plan within the limits, None if there is none; problem says why
    predicted_per_s, gap   rate of the best plan by the integer program that sized it and the program's relative gap;
                  None where plans were searched one by one
    held_by       rows of the program that hold the rate down, heaviest first
    strained_by   the limit that the best plan comes nearest to in its trial
    rate_per_s    highest rate offered at which the best plan kept the limits when simulated (the demanded rate for
                  objectives that ask for no other)
    wall_s        of looking for it
    """

    name: str
    best: Ranked | None
    problem: str = ""
    predicted_per_s: float | None = None
    gap: float | None = None
    held_by: tuple[str, ...] = ()
    strained_by: Limit | None = None
    rate_per_s: float | None = None
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The answer.

    ranked        simulated plans within the limits, best first
    considered    plans looked at, illegal ones included; pruned: how many each law or bound took out
    simulated     plans simulated, in `trials` simulations
    untried       plans whose bound leaves room above the best, but that there was no time for
    gap           by how much, as a fraction of the best, any of these can still be better
    points        operating points seen on the way that no other one beats in both throughput and speed
    families      ways of serving that were compared, the best first; empty where only aggregated plans were asked for
    crossover     the best two ways of serving over request rates, None where there are none
    """

    question: Question
    ranked: tuple[Ranked, ...]
    considered: int
    pruned: dict[str, int]
    simulated: int
    trials: int
    untried: int
    gap: float
    points: tuple[Point, ...]
    evidence: dict[str, float]
    wall_s: float
    families: tuple[Family, ...] = ()
    crossover: Crossover | None = None

    @property
    def best(self) -> Ranked:
        """The plan to run."""
        return self.ranked[0]

    @property
    def unit(self) -> str:
        """Of every value."""
        return UNITS[self.question.objective]


def search(question: Question, progress: Progress | None = None) -> SearchResult:
    """The best plan for the question, with what is known about the rest.

    Raises ProfileError for unknown names and NoFeasiblePlanError when no plan fits or none keeps the limits.
    """
    return Search(question, progress or (lambda _what, _share: None)).result()


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A plan to simulate.

    beat    look at it only at the rate that would give this score
    rough   with fewer requests and a wider tolerance
    first   nothing else is there to answer with: it may take FIRST of the search's time, whatever is left
    """

    candidate: Candidate
    beat: float | None
    rough: bool = False
    first: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The plan as ranked, None if it breaks a limit or does not reach the score to beat, and the trials made."""

    found: Ranked | None
    trials: list[Trial]


class Search:
    """One search; `result` runs it.

    catalogue   of the question's model and devices, if it is open already
    """

    def __init__(self, question: Question, progress: Progress, catalogue: Catalogue | None = None) -> None:
        self.started = time.perf_counter()
        self.question = question
        self.progress = progress
        progress("enumerating and screening plans", 0.0)
        self.catalogue: Catalogue = catalogue or open_catalogue(
            question.model,
            question.hardware,
            question.gpus,
            question.engine,
            question.cost,
            routing=question.routing,
            placed=question.experts_placed,
        )
        self.list: Shortlist = shortlist(question, self.catalogue)
        self.ranked: list[Ranked] = []
        self.tried: set[Candidate] = set()
        self.mixtures = 0
        self.trials: list[tuple[Plan, Trial]] = []
        self.runs: dict[object, list[tuple[Pool, int, Extremes]]] = defaultdict(list)
        self.same = 0
        self.estimates: dict[object, float] = {}
        self.kinds: dict[object, float] = {}
        self.closest: dict[Limit, float] = dict.fromkeys(question.limits, inf)

    @property
    def best_score(self) -> float:
        """Of the best plan found; -inf before any."""
        return max((ranked.score for ranked in self.ranked), default=-inf)

    def late(self, share: float = 1.0) -> bool:
        """Whether that share of the time is over."""
        passed = (time.perf_counter() - self.started) / self.question.seconds
        self.progress(f"simulating plans ({len(self.tried)} of {len(self.list.candidates)})", min(passed, 1.0))
        return passed >= share

    def beats(self, bound: float) -> bool:
        """Whether a bound leaves room above the best plan found, beyond the tolerance."""
        best = self.best_score
        return best == -inf or bound > best + self.question.tolerance * abs(best)

    def result(self) -> SearchResult:
        """Search until no bound beats the best, or the time is over."""
        question, candidates = self.question, self.list.candidates
        with Workers(self._perform, question.jobs or available_cpus()) as workers:
            kinds = self._survey(workers)
            self._measure_kinds(workers, kinds[:SURVEYED])
            order = sorted(candidates, key=self._kind_score, reverse=True)
            while tasks := self._round(order):
                if self.late(0.9 if self.ranked else PATIENCE):
                    break
                self._take(workers, tasks)
            self._round_off(workers, kinds[SURVEYED:])
            self._mix(workers)
            ranked = self._ranking(workers)
        if not ranked:
            raise self._nothing_kept()
        left = [c.bound for c in candidates if c not in self.tried and self.beats(c.bound)]
        best = self.best_score
        pruned = dict(self.list.pruned)
        beaten = sum(1 for c in candidates if c not in self.tried and not self.beats(c.bound))
        if beaten:
            pruned["its bound beats the best plan found"] = beaten
        if self.same:
            pruned["its run differs from that of another plan"] = self.same
        self.progress("done", 1.0)
        return SearchResult(
            question=question,
            ranked=tuple(ranked),
            considered=self.list.considered,
            pruned=pruned,
            simulated=len(self.tried) - self.same + self.mixtures,
            trials=len(self.trials),
            untried=len(left),
            gap=(max(left) - best) / abs(best) if left and best else 0.0,
            points=self._front(),
            evidence=self._evidence(),
            wall_s=time.perf_counter() - self.started,
        )

    def _survey(self, workers: Workers[Task | Plan, Outcome]) -> list[Candidate]:
        """The most promising plan of every way to cut the model, best first, after a look at few requests."""
        capacity_asked = self.question.objective == "goodput-per-gpu"
        first: dict[object, Candidate] = {}
        for candidate in self.list.candidates:
            first.setdefault((candidate.kind, 0 if capacity_asked else candidate.plan.gpus_used), candidate)
        order = sorted(first.values(), key=self._promise, reverse=True)
        if not capacity_asked:
            return order
        worth = INTERESTING * self._promise(order[0])
        for some in batched((c for c in order if self._promise(c) >= worth), ROUND):
            if self.kinds and self.late(0.25):
                break
            tasks = [Task(candidate, None, rough=True) for candidate in some]
            for task, outcome in zip(tasks, workers.map(tasks), strict=True):
                self.kinds[task.candidate.kind] = outcome.found.score if outcome.found else 0.0
        return sorted((c for c in order if c.kind in self.kinds), key=lambda c: -self.kinds[c.kind])

    def _measure_kinds(self, workers: Workers[Task | Plan, Outcome], kinds: list[Candidate]) -> None:
        """Simulate the best kinds in full, all at once, or one after the other when time is short."""
        for some in batched(kinds, 1 if self.late(0.4) else SURVEYED):
            if self.ranked and self.late(0.9):
                break
            self._take(workers, [Task(candidate, None, first=not self.ranked) for candidate in some])

    def _round_off(self, workers: Workers[Task | Plan, Outcome], kinds: list[Candidate]) -> None:
        """With time left, find out what the other ways to cut the model reach, for a ranking worth the name."""
        if self.question.objective == "goodput-per-gpu":
            for some in batched(kinds, SURVEY_ROUND):
                if self.late(0.9 if self.ranked else PATIENCE):
                    break
                self._take(workers, [Task(candidate, None) for candidate in some])

    def _round(self, order: list[Candidate]) -> list[Task]:
        """The next plans worth a simulation, at the rate that would make them best; no two that may run alike."""
        beat = self.best_score if self.ranked else None
        tasks: list[Task] = []
        seen = set()
        for candidate in order:
            if candidate in self.tried or not self.beats(candidate.bound):
                continue
            pool = candidate.plan.pools[0]
            key = (self._alike(candidate), pool.token_budget)
            if key in seen:
                continue
            if self._known(candidate):
                self.tried.add(candidate)
                self.same += 1
                continue
            seen.add(key)
            tasks.append(Task(candidate, beat))
            if len(tasks) == ROUND:
                break
        return tasks

    def _known(self, candidate: Candidate) -> bool:
        """Whether the plan's run would be that of a plan simulated before."""
        pool = candidate.plan.pools[0]
        return any(
            extremes.same_run(other, blocks, pool, candidate.kv_blocks)
            for other, blocks, extremes in self.runs[self._alike(candidate)]
        )

    def _take(self, workers: Workers[Task | Plan, Outcome], tasks: list[Task]) -> None:
        """Simulate plans and keep those within the limits."""
        for task, outcome in zip(tasks, workers.map(tasks), strict=True):
            candidate, found = task.candidate, outcome.found
            self.tried.add(candidate)
            self._note(candidate.plan, outcome.trials)
            self._remember(candidate, outcome.trials)
            if found is not None:
                self.ranked.append(found)
                self.kinds[candidate.kind] = max(found.score, self.kinds.get(candidate.kind, -inf))

    def _kind_score(self, candidate: Candidate) -> float:
        """What plans that are cut alike have reached, else what is guessed: variants of good plans come first."""
        if candidate.kind in self.kinds:
            return self.kinds[candidate.kind]
        return min(self._promise(candidate), self.best_score)

    def _promise(self, candidate: Candidate) -> float:
        """What the plan is guessed to score: its bound where the objective is not a rate."""
        if self.question.objective != "goodput-per-gpu":
            return candidate.bound
        pool = candidate.plan.pools[0]
        return self.estimate(candidate) * pool.replicas / self.question.gpus

    def estimate(self, candidate: Candidate) -> float:
        """The rate one replica of the plan is guessed to keep."""
        if candidate.kind not in self.estimates:
            model = self.catalogue.step_model(*candidate.kind)
            self.estimates[candidate.kind] = estimate_rate_per_s(
                model, candidate.kind[0], self.question.requests, self.question.limits
            )
        return self.estimates[candidate.kind]

    def _alike(self, candidate: Candidate) -> object:
        """What plans must have in common for one to be a run of the other."""
        pool = candidate.plan.pools[0]
        return candidate.kind, pool.policy, pool.replicas

    def _perform(self, work: Task | Plan) -> Outcome:
        """What a worker is asked: to evaluate a plan, or to simulate one at the demanded rate."""
        if isinstance(work, Task):
            return self.evaluate(work)
        question = self.question
        deployment = self.catalogue.deployment(work)
        trial = attempt(deployment, question.requests, question.demanded_per_s, question.limits, question.seed)
        return Outcome(None, [trial])

    def evaluate(self, task: Task) -> Outcome:
        """Simulate a plan; changes nothing, so that any process may do it."""
        question, plan = self.question, task.candidate.plan
        now_s = time.perf_counter()
        deployment = self.catalogue.deployment(plan, with_work=question.objective == "energy")
        if question.objective == "goodput-per-gpu":
            best, trials = capacity(
                deployment,
                question.requests.head(ROUGH_REQUESTS) if task.rough else question.requests,
                question.limits,
                question.seed,
                at_most_per_s=task.candidate.rate_bound_per_s * 1.02,
                guess_per_s=self._guess(task),
                beat=task.beat is not None,
                tolerance=max(question.tolerance, ROUGH_TOLERANCE) if task.rough else question.tolerance,
                until_s=max(self.started + question.seconds, now_s + (FIRST * question.seconds if task.first else 0.0)),
            )
            if best is None or (question.rate_per_s is not None and best.rate_per_s < question.rate_per_s):
                return Outcome(None, trials)
            value = best.goodput_per_s / question.gpus
            return Outcome(Ranked(plan, value, value, task.candidate.bound, best, best.goodput_per_s), trials)
        trial = attempt(
            deployment,
            question.requests,
            question.demanded_per_s,
            question.limits,
            question.seed,
            energy=question.objective == "energy",
        )
        if not trial.meets:
            return Outcome(None, [trial])
        value = self._value(plan, trial)
        return Outcome(Ranked(plan, value, -value, task.candidate.bound, trial), [trial])

    def _guess(self, task: Task) -> float:
        """A rate to start from, no less than is demanded: the rate to beat, or what the plan is guessed to keep."""
        question = self.question
        if task.beat is not None:
            rate = task.beat * question.gpus * (1 + question.tolerance)
        elif task.candidate.kind in self.kinds:
            rate = self.kinds[task.candidate.kind] * question.gpus
        else:
            rate = self.estimate(task.candidate) * task.candidate.plan.pools[0].replicas
        return max(rate, question.rate_per_s or 0.0, 1e-6 * task.candidate.rate_bound_per_s)

    def _remember(self, candidate: Candidate, trials: list[Trial]) -> None:
        """Keep how far the runs of the plan went, so that plans with the same runs need none."""
        every = [trial.extremes for trial in trials]
        together = Extremes(
            frozenset().union(*(e.limited for e in every)),
            max(e.peak_seqs for e in every),
            max(e.peak_blocks for e in every),
        )
        self.runs[self._alike(candidate)].append((candidate.plan.pools[0], candidate.kv_blocks, together))

    def _value(self, plan: Plan, trial: Trial) -> float:
        """The objective of a plan simulated at the demanded rate, in its own unit."""
        objective = self.question.objective
        if objective == "fewest-gpus":
            return float(plan.gpus_used)
        if objective == "cost":
            price = self.catalogue.cluster.device.price_usd_per_h or 0.0
            return price * plan.gpus_used / 3600 / trial.output_tokens_per_s * 1e6
        return trial.mean_e2e_s if objective == "latency" else trial.joules_per_token or inf

    def _note(self, plan: Plan, trials: list[Trial]) -> None:
        """Remember operating points and how near the limits were."""
        self.trials += [(plan, trial) for trial in trials]
        for trial in trials:
            for limit, value in zip(self.question.limits, trial.values_s, strict=True):
                if isfinite(value):
                    self.closest[limit] = min(self.closest[limit], value)

    def _mix(self, workers: Workers[Task | Plan, Outcome]) -> None:
        """Fill the cluster with replicas of different plans where that serves more, and simulate the mixture."""
        question = self.question
        if question.objective == "goodput-per-gpu" and self.ranked:
            self._survey_idle(workers, max(self.ranked, key=lambda r: r.score).plan)
        measured = [r for r in self.ranked if r.capacity_per_s is not None and len(r.plan.pools) == 1]
        if question.objective != "goodput-per-gpu" or len(measured) < 2:
            return
        by_size: dict[int, Ranked] = {}
        for ranked in sorted(measured, key=lambda r: -r.score):
            by_size.setdefault(ranked.plan.pools[0].gpus_per_replica, ranked)
        best = max(measured, key=lambda r: r.score)
        alone = best.capacity_per_s or 0.0
        kinds = [
            Kind(str(size), size, (r.capacity_per_s or 0.0) / r.plan.pools[0].replicas) for size, r in by_size.items()
        ]
        mix = best_mix(kinds, self.catalogue.cluster.gpus, goal="capacity")
        used = [(count, r, kind) for count, r, kind in zip(mix.counts, by_size.values(), kinds, strict=True) if count]
        if len(used) < 2 or mix.capacity_per_s <= alone * (1 + question.tolerance) or not self._packs(used):
            return
        pools = tuple(
            replace(r.plan.pools[0], replicas=count, share=round(kind.capacity_per_s, 6)) for count, r, kind in used
        )
        plan = replace(best.plan, pools=pools)
        deployment = self.catalogue.deployment(plan)
        trial, trials = capacity(
            deployment,
            question.requests,
            question.limits,
            question.seed,
            at_most_per_s=mix.capacity_per_s * 1.2,
            guess_per_s=mix.capacity_per_s,
            tolerance=question.tolerance,
        )
        self.mixtures += 1
        self._note(plan, trials)
        if trial is not None:
            value = trial.goodput_per_s / question.gpus
            bound = sum(count * r.bound / r.plan.pools[0].replicas for count, r, _ in used)
            self.ranked.append(Ranked(plan, value, value, bound, trial, trial.goodput_per_s))

    def _survey_idle(self, workers: Workers[Task | Plan, Outcome], plan: Plan) -> None:
        """Simulate the kinds of replica that would fit on the devices a plan leaves idle."""
        idle = plan.gpus - plan.gpus_used
        ranked = {kind_of(r.plan.pools[0]) for r in self.ranked}
        for candidate in sorted(self.list.candidates, key=self._promise, reverse=True):
            small = candidate.plan.pools[0].gpus_per_replica <= idle
            if small and candidate.kind not in ranked and not self.late(1.2):
                ranked.add(candidate.kind)
                self._take(workers, [Task(candidate, None)])

    def _packs(self, used: list[tuple[int, Ranked, Kind]]) -> bool:
        """Whether replicas of these sizes fit into the nodes, largest first."""
        cluster = self.catalogue.cluster
        node = cluster.gpus_per_node
        room = [node] * (cluster.gpus // node) + ([cluster.gpus % node] if cluster.gpus % node else [])
        for count, _, kind in sorted(used, key=lambda entry: -entry[2].gpus):
            for _ in range(count):
                if kind.gpus > node:
                    whole = [i for i, free in enumerate(room) if free == node][: kind.gpus // node]
                    if len(whole) * node < kind.gpus:
                        return False
                    for i in whole:
                        room[i] = 0
                    continue
                place = next((i for i, free in enumerate(room) if free >= kind.gpus), None)
                if place is None:
                    return False
                room[place] -= kind.gpus
        return True

    def _ranking(self, workers: Workers[Task | Plan, Outcome]) -> list[Ranked]:
        """The best plans, each simulated at the demanded rate, with ties marked."""
        question = self.question
        order = sorted(self.ranked, key=lambda r: (-r.score, r.plan.gpus_used, r.trial.mean_e2e_s))[: question.keep]
        if question.objective == "goodput-per-gpu" and question.rate_per_s is not None:
            outcomes = workers.map([ranked.plan for ranked in order])
            order = [replace(r, trial=outcome.trials[0]) for r, outcome in zip(order, outcomes, strict=True)]
        within = order[0].score - question.tolerance * abs(order[0].score) if order else 0.0
        return [replace(ranked, tie=place > 0 and ranked.score >= within) for place, ranked in enumerate(order)]

    def _front(self) -> tuple[Point, ...]:
        """Operating points within the limits that no other beats in both throughput per device and speed per user."""
        points = [
            Point(plan, t.rate_per_s, t.output_tokens_per_s / plan.gpus_used, 1 / t.mean_tpot_s)
            for plan, t in self.trials
            if t.meets and t.mean_tpot_s > 0
        ]
        return front(points)

    def _evidence(self) -> dict[str, float]:
        """What the best plan's prices rest on."""
        best = max(self.ranked, key=lambda r: r.score)
        return self.catalogue.plan_evidence(best.plan)

    def _nothing_kept(self) -> NoFeasiblePlanError:
        """Say which limit was broken by all plans simulated, and how near the best came."""
        question = self.question
        worst = max(question.limits, key=lambda limit: self.closest[limit] / limit.seconds, default=None)
        tried = f"none of the {len(self.tried)} plans simulated on {question.gpus} x {question.hardware}"
        if worst is not None and self.closest[worst] > worst.seconds:
            return NoFeasiblePlanError(
                f"{worst}: {tried} keeps it; the best reached {self.closest[worst]:.4g} s; relax the limit, lower the "
                "rate or add devices"
            )
        return NoFeasiblePlanError(
            f"rate {question.demanded_per_s:g}/s: {tried} keeps all limits together at it; lower the rate, relax a "
            "limit or add devices"
        )
