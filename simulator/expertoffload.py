"""How long does a step take when experts must be loaded, or computed beside the accelerator?

Step after step, layer after layer: the layer's own work on the GPU, then its chosen experts on three timelines (GPU,
CPU and the link between their memories; an SSD behind them as a fourth), then loads ahead of time for layers to come.
What each side does is decided by policies that know the clocks but do not move them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hwmodels.expertoffload import ExpertCosts
from simulator.errors import OffloadError
from simulator.expertcache import EVICTIONS, Array, ExpertCache
from simulator.expertrouting import Active
from simulator.expertsharing import SHARINGS, Clocks, Work, ends_s
from simulator.offloadplan import OffloadPlan, cache_rooms
from simulator.timelines import Timelines


class Offload:
    """Steps of a model under a plan, one after another; `lines` are the clocks of gpu, cpu, link and ssd."""

    def __init__(self, costs: ExpertCosts, plan: OffloadPlan, popularity: Array, rng: np.random.Generator) -> None:
        if len(plan.ladder) != len(costs.expert_bytes):
            raise OffloadError(f"costs of {len(costs.expert_bytes)} levels: expected those of {', '.join(plan.ladder)}")
        if plan.misses != "load" and not costs.cpu_s:
            raise OffloadError(f"misses = {plan.misses!r}: expected costs of experts on the CPU")
        self.costs, self.plan = costs, plan
        self.lines = Timelines({"gpu": 1, "cpu": 1, "link": 1, "ssd": 1})
        self.now_s = 0.0
        self.hits = self.uses = 0
        self.loaded_bytes = 0.0
        layers, experts = costs.layers, costs.experts
        self.cache = ExpertCache(
            layers, experts, cache_rooms(costs, plan),
            eviction=EVICTIONS[plan.eviction], per_layer=plan.per_layer, top=2 * costs.top_k,
        )  # fmt: skip
        by_popularity = np.argsort(-popularity.ravel(), kind="stable")
        evenly = np.arange(layers * experts).reshape(layers, experts).T.ravel()
        order = (by_popularity if plan.popular else evenly).tolist()
        self.cache.fill(order)
        self._host: ExpertCache | None = None
        if costs.ssd_bytes_per_s is not None:
            room = int(min(costs.host_bytes, costs.total_bytes) // sum(costs.expert_bytes))
            self._host = ExpertCache(layers, experts, [room] * len(plan.ladder))
            self._host.fill(order)
        self._sharing = SHARINGS[plan.misses]
        self._landing_s: dict[tuple[int, int], float] = {}
        self._expected: dict[int, set[int]] = {}  # experts to be kept until their layer runs
        self._guesses: dict[int, list[tuple[float, int]]] = {}
        self._uniform = _uniform(rng)

    def step(self, actives: Sequence[Active], scores: Array | None = None) -> float:
        """Run a step whose layers choose these experts; its seconds."""
        lines, costs, began_s = self.lines, self.costs, self.now_s
        end_s = lines.run(("gpu",), began_s, costs.once_s)
        for layer, active in enumerate(actives):
            known_s = lines.run(("gpu",), end_s, costs.dense_s[layer])
            end_s = max(known_s, self._experts(layer, active, known_s))
            if scores is not None and self.plan.eviction == "score":
                self.cache.observe(layer, scores[layer])
            if self.plan.prefetch.leads:
                self._ahead(layer, actives, known_s, end_s)
        self._guesses.clear()
        self.cache.tokens += 1
        self.now_s = end_s
        return end_s - began_s

    def _experts(self, layer: int, active: Active, known_s: float) -> float:
        """Compute a layer's experts; when the last one is done."""
        lines, cache = self.lines, self.cache
        self._expected.pop(layer, None)
        if not active:
            return known_s
        works = [self._work(layer, *one, known_s) for one in active]
        self.uses += len(works)
        self.hits += sum(work.load_s == 0 for work in works)
        experts = np.array([work.expert for work in works])
        cache.use(experts, np.array([one[2] for one in active]))
        keep = [*experts.tolist(), *(e for ahead in self._expected.values() for e in ahead)]
        done_s = known_s
        for work, on_cpu in self._sharing(works, self._clocks(known_s)):
            if on_cpu:
                end_s = lines.run(("cpu",), max(known_s, work.host_s), work.cpu_s)
            else:
                ready_s = work.ready_s
                if work.load_s > 0:
                    ready_s = self._load(work.expert, work.level, work.host_s, known_s)
                    if cache.admit(work.expert, work.level, layer, keep):
                        self._landing_s[work.expert, work.level] = ready_s
                end_s = lines.run(("gpu",), max(known_s, ready_s), work.gpu_s)
            done_s = max(done_s, end_s)
        return done_s

    def _clocks(self, known_s: float) -> Clocks:
        gpu_s, cpu_s, link_s = (self.lines.start_s((name,), known_s) for name in ("gpu", "cpu", "link"))
        return gpu_s, cpu_s, link_s

    def _work(self, layer: int, expert: int, tokens: int, wanted: int, known_s: float, read: bool = True) -> Work:
        """An expert's tokens with where it is; `read`: start reading it from the SSD if it is only there."""
        costs = self.costs
        number = layer * costs.experts + expert
        level = self.cache.level_of(number, wanted)
        at = wanted if level is None else level
        cpu_s = costs.cpu_s[at][tokens] if costs.cpu_s else float("inf")
        gpu_s = costs.gpu_s[at][tokens]
        if level is not None:
            ready_s = self._landing_s.get((number, at), 0.0)
            host_s = known_s if self._host is None or self._host.holds(number, at) else float("inf")
            return Work(number, tokens, at, gpu_s, cpu_s, 0.0, ready_s, host_s)
        host_s = self._in_host(layer, number, at, known_s) if read else known_s
        return Work(number, tokens, at, gpu_s, cpu_s, costs.load_s(at), 0.0, host_s)

    def _in_host(self, layer: int, expert: int, level: int, known_s: float) -> float:
        """When the host's memory has an expert, which it is read into if need be."""
        host, speed = self._host, self.costs.ssd_bytes_per_s
        if host is None or speed is None:
            return known_s
        host.records.used[expert] = host.tokens = host.tokens + 1
        if host.holds(expert, level):
            return max(known_s, self._landing_s.get((expert, -1 - level), 0.0))
        read_s = self.lines.run(("ssd",), known_s, self.costs.expert_bytes[level] / speed)
        if host.admit(expert, level, layer):
            self._landing_s[expert, -1 - level] = read_s
        return read_s

    def _load(self, expert: int, level: int, host_s: float, known_s: float) -> float:
        """Send an expert over the link; when it has landed."""
        self.loaded_bytes += self.costs.expert_bytes[level]
        return self.lines.run(("link",), max(known_s, host_s), self.costs.load_s(level))

    def _predicted(self, target: int, active: Active, hit: float) -> Active:
        """The experts of a layer as they are predicted: each right with the probability `hit`.

        What is right at some distance stays right nearer by, and what is guessed instead is the same at every distance.
        """
        if hit >= 1:
            return active
        guesses = self._guesses.get(target)
        if guesses is None:
            guesses = self._guesses[target] = self._instead(active)
        pairs = zip(active, guesses, strict=True)
        return [one if luck < hit else (other, *one[1:]) for one, (luck, other) in pairs]

    def _instead(self, active: Active) -> list[tuple[float, int]]:
        """For each expert of a layer how hard it is to predict, in [0, 1), and an unused expert (itself if none is)."""
        used = {one[0] for one in active}
        guesses = []
        for expert, _, _ in active:
            luck, other = next(self._uniform), int(next(self._uniform) * self.costs.experts)
            if len(used) == self.costs.experts:
                other = expert
            else:
                while other in used:
                    other = (other + 1) % self.costs.experts
            used.add(other)
            guesses.append((luck, other))
        return guesses

    def _ahead(self, layer: int, actives: Sequence[Active], known_s: float, end_s: float) -> None:
        """Load experts for layers to come."""
        prefetch = self.plan.prefetch
        targets = [
            (target, self._predicted(target, actives[target], hit))
            for lead, hit in zip(prefetch.leads, prefetch.hits, strict=True)
            if (target := layer + lead) < len(actives) and actives[target]
        ]
        if prefetch.impact:
            self._most_saved(layer, targets, known_s, end_s)
            return
        for target, guessed in targets:
            works = [self._work(target, *one, known_s, read=False) for one in guessed]
            missing = [work for work in works if work.load_s > 0]
            self._expected.setdefault(target, set()).update(work.expert for work in works if work.load_s == 0)
            for work in missing:
                self._fetch(work, layer, target, known_s)
            if missing and prefetch.walk:
                break

    def _fetch(self, work: Work, layer: int, target: int, known_s: float) -> bool:
        """Load an expert ahead of time if it can be held until its layer runs."""
        expected = self._expected.setdefault(target, set())
        keep = [e for ahead in self._expected.values() for e in ahead]
        if not self.cache.admit(work.expert, work.level, layer, keep):
            return False
        expected.add(work.expert)
        host_s = self._in_host(target, work.expert, work.level, known_s)
        self._landing_s[work.expert, work.level] = self._load(work.expert, work.level, host_s, known_s)
        return True

    def _most_saved(self, layer: int, targets: Sequence[tuple[int, Active]], known_s: float, end_s: float) -> None:
        """Load what shortens its layer's schedule most, as long as a load would start before this layer ends.

        Layers to come are taken to last as long as this one; what lands later is worth as much less.
        """
        plans: list[tuple[int, list[Work], float]] = []
        for target, guessed in targets:
            works = [self._work(target, *one, 0.0, read=False) for one in guessed]
            self._expected.setdefault(target, set()).update(work.expert for work in works if work.load_s == 0)
            starts_s = end_s + (target - layer - 1) * (end_s - known_s)
            for work in works:
                work.ready_s = max(0.0, work.ready_s - starts_s)
            plans.append((target, works, starts_s))
        found: dict[int, tuple[float, Work]] = {}
        while plans and (link_s := self.lines.start_s(("link",), known_s)) < end_s:
            for target, works, starts_s in plans:
                if target not in found:
                    found[target] = self._saving(works, link_s - starts_s)
            target, works, starts_s = max(plans, key=lambda plan: found[plan[0]][0])
            saved_s, work = found.pop(target)
            if saved_s <= 1e-12 or not self._fetch(work, layer, target, known_s):
                break
            work.load_s, work.ready_s = 0.0, max(0.0, self._landing_s[work.expert, work.level] - starts_s)

    def _saving(self, works: Sequence[Work], link_s: float) -> tuple[float, Work]:
        """The expert whose load over the link, free at `link_s` after the layer's start, saves most of it; how much.

        Experts with as many tokens at the same level save the same.
        """
        clocks = (0.0, 0.0, 0.0)
        before_s = max(ends_s(self._sharing(works, clocks), clocks)[:2])
        best, best_s, tried = works[0], 0.0, set()
        for work in works:
            if work.load_s > 0 and (work.tokens, work.level) not in tried:
                tried.add((work.tokens, work.level))
                load_s, work.load_s = work.load_s, 0.0
                work.ready_s = max(0.0, link_s + load_s)
                saved_s = before_s - max(ends_s(self._sharing(works, clocks), clocks)[:2])
                work.load_s, work.ready_s = load_s, 0.0
                if saved_s > best_s:
                    best, best_s = work, saved_s
        return best_s, best


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(1024).tolist()
