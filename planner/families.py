"""Which way of serving wins: whole requests on every replica, separate pools for prompts and answers, or shares?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from math import floor, inf

from planner.catalogue import Catalogue, open_catalogue
from planner.crossover import Crossover, crossover
from planner.errors import NoFeasiblePlanError
from planner.options import Option
from planner.plan import Plan, Pool
from planner.question import Question
from planner.search import Family, Point, Progress, Ranked, Search, SearchResult, front, search
from planner.sharedplans import shared_plans
from planner.sizing import Offer, Sizings, aggregated_option, degrees, offer, sized
from planner.space import enumerate_pools
from planner.trial import Trial, attempt
from simulator.limits import Limit

#: Share of the time of a search that each way of serving gets when all are asked for, beside the aggregated one.
BESIDE = 2.5


def answer(question: Question, progress: Progress | None = None) -> SearchResult:
    """The best plan for the question, over the ways of serving that it allows.

    Raises ProfileError for unknown names and NoFeasiblePlanError where nothing keeps the limits or the budget.
    """
    tell = progress or (lambda _what, _share: None)
    if question.serving == "aggregated" and not question.also:
        return search(affordable(question), tell)
    return _Comparison(question, tell).result()


def affordable(question: Question) -> Question:
    """The question with as many devices of its one kind as the budget allows."""
    if question.budget_usd_per_h is None and question.budget_w is None:
        return question
    device = open_catalogue(question.model, question.hardware, 1, question.engine).cluster.device
    gpus = question.gpus
    if question.budget_usd_per_h is not None:
        if device.price_usd_per_h is None:
            raise NoFeasiblePlanError(
                f"budget of {question.budget_usd_per_h:g} USD/h: {device.name} has no price; give its profile a "
                "price_usd_per_h"
            )
        gpus = min(gpus, floor(question.budget_usd_per_h / device.price_usd_per_h + 1e-9))
    if question.budget_w is not None:
        gpus = min(gpus, floor(question.budget_w / device.tdp_w + 1e-9))
    if gpus < 1:
        raise NoFeasiblePlanError(f"budget of {_budget_words(question)}: {_least_words(question)}; raise it")
    return replace(question, gpus=gpus)


def _least_words(question: Question) -> str:
    """What the smallest replica that fits takes."""
    catalogue = open_catalogue(question.model, question.hardware, question.gpus, question.engine)
    longest = int((question.requests.prompt_tokens + question.requests.output_tokens).max())
    pools = enumerate_pools(catalogue, question.choices, longest).pools
    device = catalogue.cluster.device
    gpus = min((pool.gpus_per_replica for pool, _ in pools), default=1)
    price = "" if device.price_usd_per_h is None else f"{gpus * device.price_usd_per_h:g} USD/h and "
    return f"the smallest replica that fits, {gpus} x {device.name}, takes {price}{gpus * device.tdp_w / 1000:g} kW"


def _budget_words(question: Question) -> str:
    parts = []
    if question.budget_usd_per_h is not None:
        parts.append(f"{question.budget_usd_per_h:g} USD/h")
    if question.budget_w is not None:
        parts.append(f"{question.budget_w / 1000:g} kW")
    return " and ".join(parts)


class _Comparison:
    """One question over several ways of serving; `result` runs it."""

    def __init__(self, question: Question, progress: Progress) -> None:
        self.question = question
        self.progress = progress
        self.started = time.perf_counter()
        self.catalogue: Catalogue = open_catalogue(
            question.model,
            question.hardware,
            question.gpus,
            question.engine,
            question.cost,
            question.also,
            question.routing,
            placed=question.experts_placed,
        )
        self.total = sum(question.devices.values())
        self.searches: dict[str, SearchResult] = {}
        self.families: list[Family] = []
        self.ranked: list[Ranked] = []
        self.points: list[Point] = []
        self.trials = self.simulated = self.considered = self.left_out = 0
        self.problems: list[str] = []
        self.seen: list[Trial] = []

    def result(self) -> SearchResult:
        """Every way of serving that is asked for, in one ranking."""
        serving = self.question.serving
        aggregated = Offer({})
        if serving in ("aggregated", "any"):
            aggregated = self._aggregated()
        chunked = "chunked" in self.question.choices.policies  # as all replicas of the other ways are
        if serving in ("shared", "any") and chunked:
            self._shared()
        if serving in ("disaggregated", "any") and chunked and self.total > 1:
            self._disaggregated(aggregated)
        return self._together()

    # One way of serving each

    def _aggregated(self) -> Offer:
        """Plans of whole requests, searched for each kind of device; the replicas that were measured, as options."""
        question = self.question
        options: dict[str, tuple[Pool, Option]] = {}
        best: Ranked | None = None
        started = time.perf_counter()
        problem = ""
        for name, gpus in question.devices.items():
            alone = replace(question, hardware=name, gpus=gpus, also={}, serving="aggregated")
            if question.also and question.objective == "goodput-per-gpu":
                alone = replace(alone, rate_per_s=None)  # each kind of device need not serve it all
            try:
                found = self._search(name, affordable(alone))
            except NoFeasiblePlanError as error:
                problem = problem or str(error)
                continue
            self.searches[name] = found
            self.points += found.points
            catalogue = self.catalogue if name == question.hardware else self.catalogue.others[name]
            for ranked in found.ranked:
                mine = self._at_home(ranked, name, gpus)
                if not question.also:
                    self.ranked.append(mine)
                best = max((b for b in (best, mine) if b is not None), key=lambda r: r.score)
                if ranked.capacity_per_s is not None and len(ranked.plan.pools) == 1:
                    pool = replace(ranked.plan.pools[0], hardware=None if name == question.hardware else name)
                    key = f"aggregated {name} {degrees(pool)}, {pool.max_seqs} sequences and {pool.token_budget} tokens"
                    key += "" if pool.policy == "chunked" else f", {pool.policy}"
                    each = _kept_rate(question, ranked) / pool.replicas
                    options[key] = pool, aggregated_option(key, pool, name, catalogue, each)
        if question.also and options:
            self._size("aggregated", Offer(options))
        else:
            strained = _nearest(best, question.limits) if best is not None else None
            wall_s = time.perf_counter() - started
            rate = None if best is None else _kept_rate(question, best)
            self.families.append(
                Family("aggregated", best, problem, strained_by=strained, rate_per_s=rate, wall_s=wall_s)
            )
            if problem:
                self.problems.append(problem)
        return Offer(options)

    def _search(self, name: str, question: Question) -> SearchResult:
        """The aggregated plans on one kind of device; what is compiled for it serves the other ways as well."""
        catalogue = self.catalogue if name == self.question.hardware else self.catalogue.others[name]
        same = catalogue.cluster.gpus == question.gpus
        return Search(question, self.progress, catalogue if same else None).result()

    def _at_home(self, ranked: Ranked, hardware: str, gpus: int) -> Ranked:
        """A plan for one kind of device as one for all devices at hand."""
        question = self.question
        pools = tuple(
            replace(pool, hardware=None if hardware == question.hardware else hardware) for pool in ranked.plan.pools
        )
        plan = replace(
            ranked.plan, hardware=question.hardware, gpus=question.gpus, also=question.also, pools=pools
        )  # fmt: skip
        if question.objective != "goodput-per-gpu":
            return replace(ranked, plan=plan)
        part = self.searches[hardware].question.gpus / self.total
        return replace(
            ranked, plan=plan, value=ranked.value * part, score=ranked.score * part, bound=ranked.bound * part
        )  # fmt: skip

    def _shared(self) -> None:
        """Replicas whose phases share each device, on every kind of device by itself."""
        question = self.question
        started = time.perf_counter()
        found: list[Ranked] = []
        problem = "no replica without pipeline stages and attention groups fits"
        for name, gpus in question.devices.items():
            self.progress(f"sharing {name} between prefill and decode", 0.3)
            catalogue = self.catalogue if name == question.hardware else self.catalogue.others[name]
            alone = affordable(replace(question, hardware=name, gpus=gpus, also={}))
            until_s = time.perf_counter() + BESIDE * question.seconds
            measured = shared_plans(alone, catalogue, until_s)
            self.considered += len(measured)
            self.simulated += len(measured)
            for plan, trial, trials in measured:
                self.trials += len(trials)
                self.seen += trials
                if trial is None:
                    problem = "none kept the limits when simulated"
                    continue
                pools = tuple(replace(p, hardware=None if name == question.hardware else name) for p in plan.pools)
                home = replace(plan, hardware=question.hardware, gpus=question.gpus, also=question.also, pools=pools)
                speed = trial.output_tokens_per_s / home.gpus_used, 1 / trial.mean_tpot_s
                self.points.append(Point(home, trial.rate_per_s, *speed))
                if question.objective == "goodput-per-gpu":
                    value = trial.goodput_per_s / self.total
                    found.append(Ranked(home, value, value, inf, trial, trial.goodput_per_s))
                else:
                    value = self._value(home, trial)
                    found.append(Ranked(home, value, -value, 0.0, trial))
        found.sort(key=lambda ranked: -ranked.score)
        self.ranked += found
        best = found[0] if found else None
        strained = _nearest(best, question.limits) if best is not None else None
        wall_s = time.perf_counter() - started
        rate = best.trial.rate_per_s if best is not None else None
        told = "" if found else problem
        self.families.append(Family("shared", best, told, strained_by=strained, rate_per_s=rate, wall_s=wall_s))
        if not found:
            self.problems += [] if self.seen else [f"shared: {problem}; relax a limit or add devices"]

    def _disaggregated(self, aggregated: Offer) -> None:
        """Pools of prefill and decode replicas, with whole-request replicas beside them where those are known."""
        question, catalogue = self.question, self.catalogue
        self.progress("sizing prefill and decode pools", 0.0)
        every = offer(question, catalogue, None)
        for name, other in catalogue.others.items():
            every |= offer(question, other, name)
        self.considered += every.considered
        self.left_out += every.considered - len(every.options)
        self._size("disaggregated", every | aggregated)

    def _size(self, name: str, offered: Offer) -> None:
        question = self.question
        started = time.perf_counter()
        try:
            found = sized(question, self.catalogue, offered, until_s=time.perf_counter() + BESIDE * question.seconds)
        except NoFeasiblePlanError as error:
            self.families.append(Family(name, None, str(error), wall_s=time.perf_counter() - started))
            self.problems.append(str(error))
            return
        self.trials += sum(len(one.trials) for one in found.sized)
        self.seen += [trial for one in found.sized for trial in one.trials]
        self.simulated += len(found.sized)
        ranked = self._ranked(name, found)
        self.ranked += ranked
        self.families.append(self._family(name, found, ranked, time.perf_counter() - started))

    def _ranked(self, name: str, found: Sizings) -> list[Ranked]:
        """The sized plans that kept the limits, those that serve as the family's name says."""
        question = self.question
        ranked = []
        for one in found.sized:
            for trial in one.trials:
                if trial.meets and trial.mean_tpot_s > 0:
                    per_gpu = trial.output_tokens_per_s / one.plan.gpus_used
                    self.points.append(Point(one.plan, trial.rate_per_s, per_gpu, 1 / trial.mean_tpot_s))
            if one.trial is None or one.rough or one.plan.disaggregated != (name == "disaggregated"):
                continue
            trial, asked = one.trial, None
            if question.objective == "goodput-per-gpu":
                value = trial.goodput_per_s / self.total
                if question.rate_per_s is not None:
                    deployment = self.catalogue.deployment(one.plan)
                    asked = attempt(
                        deployment, question.requests, question.rate_per_s, question.limits, question.seed
                    )  # fmt: skip
                ranked.append(Ranked(one.plan, value, value, inf, asked or trial, trial.goodput_per_s))
                continue
            value = self._value(one.plan, trial)
            ranked.append(Ranked(one.plan, value, -value, 0.0, trial))
        return ranked

    def _value(self, plan: Plan, trial: Trial) -> float:
        """The objective of a plan simulated at the demanded rate."""
        if self.question.objective == "fewest-gpus":
            return float(plan.gpus_used)
        if self.question.objective == "latency":
            return trial.mean_e2e_s
        if self.question.objective == "energy":
            return trial.joules_per_token or inf
        devices = [(self.catalogue.of(pool).cluster.device, pool.gpus) for pool in plan.pools]
        per_h = sum((device.price_usd_per_h or 0.0) * gpus for device, gpus in devices)
        return per_h / 3600 / trial.output_tokens_per_s * 1e6

    def _family(self, name: str, found: Sizings, ranked: list[Ranked], wall_s: float) -> Family:
        question = self.question
        if not ranked:
            point = found.sized[0].point if found.sized else found.program.best
            problem = f"none of {len(found.sized)} sizings kept the limits when simulated"
            return Family(
                name, None, problem, point.rate_per_s, found.program.best.gap,
                tuple(row.name for row in point.tight), wall_s=wall_s,
            )  # fmt: skip
        best = max(ranked, key=lambda r: r.score)
        one = next(one for one in found.sized if one.plan == best.plan)
        return Family(
            name,
            best,
            "",
            one.point.rate_per_s,
            found.program.best.gap,
            tuple(row.name for row in one.point.tight),
            _nearest(best, question.limits),
            one.trial.rate_per_s if one.trial is not None else None,
            wall_s,
        )

    # All of them

    def _together(self) -> SearchResult:
        """The ranking over all ways of serving, and where the best two change places."""
        question = self.question
        if not self.ranked:
            raise NoFeasiblePlanError(self.problems[0] if self.problems else self._nothing_kept())
        order = sorted(self.ranked, key=lambda r: (-r.score, r.plan.gpus_used, r.trial.mean_e2e_s))[: question.keep]
        best = order[0]
        within = best.score - question.tolerance * abs(best.score)
        ranked = tuple(replace(r, tie=place > 0 and r.score >= within) for place, r in enumerate(order))
        self.families.sort(key=lambda family: -family.best.score if family.best is not None else inf)
        alone = list(self.searches.values())
        left_out = {"among the quickest of its role and size in a typical step": self.left_out} if self.left_out else {}
        return SearchResult(
            question=question,
            ranked=ranked,
            considered=self.considered + sum(found.considered for found in alone),
            pruned=_summed([*(found.pruned for found in alone), left_out]),
            simulated=self.simulated + sum(found.simulated for found in alone),
            trials=self.trials + sum(found.trials for found in alone),
            untried=sum(found.untried for found in alone),
            gap=self._gap(best),
            points=front(self.points),
            evidence=self.catalogue.plan_evidence(best.plan),
            wall_s=time.perf_counter() - self.started,
            families=tuple(self.families),
            crossover=self._crossover(),
        )

    def _nothing_kept(self) -> str:
        """What the best plan simulated could do, where none keeps the limits at the demanded rate."""
        question = self.question
        met = [trial.rate_per_s for trial in self.seen if trial.meets]
        if question.rate_per_s is None or not met:
            return f"none of the {self.simulated} plans simulated keeps the limits; relax one or add devices"
        return (
            f"rate {question.rate_per_s:g}/s: the best of the {self.simulated} plans simulated keeps the limits up to "
            f"{max(met):.3g}/s; lower the rate, relax a limit or add devices"
        )

    def _gap(self, best: Ranked) -> float:
        """By how much an aggregated plan that was not tried can still beat the best plan of all."""
        if not self.searches:
            return inf  # pools and shares are simulated, not bounded
        gaps = []
        for found in self.searches.values():
            part = found.question.gpus / self.total if self.question.objective == "goodput-per-gpu" else 1.0
            highest = (found.best.score + found.gap * abs(found.best.score)) * part
            gaps.append((highest - best.score) / abs(best.score) if found.untried else 0.0)
        return max([0.0, *gaps])

    def _crossover(self) -> Crossover | None:
        """The best two ways of serving over rates up to the higher one's capacity."""
        kept = [family.best for family in self.families if family.best is not None]
        if len(kept) < 2 or not self.question.limits:
            return None
        self.progress("comparing ways of serving over rates", 0.95)
        most = max(family.rate_per_s or 0.0 for family in self.families)
        first, second = (self.catalogue.deployment(ranked.plan) for ranked in kept[:2])
        question = self.question
        return crossover(first, second, question.requests, question.limits, most, question.seed)


def _kept_rate(question: Question, best: Ranked) -> float:
    """The highest rate simulated within the limits; of a plan whose trial is at the demanded rate, its goodput."""
    if question.rate_per_s is not None and best.capacity_per_s is not None:
        return best.capacity_per_s
    return best.trial.rate_per_s


def _nearest(ranked: Ranked, limits: Sequence[Limit]) -> Limit | None:
    """The limit that the plan's trial comes nearest to."""
    over = {limit: value / limit.seconds for limit, value in zip(limits, ranked.trial.values_s, strict=True)}
    return max(over, key=lambda limit: over[limit], default=None)


def _summed(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for some in counts:
        for law, count in some.items():
            total[law] = total.get(law, 0) + count
    return total
