"""How long does a step take when experts must be loaded, or computed beside the accelerator?

Step after step, layer after layer: the layer's own work on the GPU, then its chosen experts on three timelines (GPU,
CPU and the link between their memories; an SSD behind them as a fourth), then loads ahead of time for layers to come.
What each side does is decided by policies that know the clocks but do not move them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from hwmodels.errors import ShardwiseError
from hwmodels.expertoffload import ExpertCosts, Host, compile_expert_costs
from hwmodels.hardware import Cluster, Device
from hwmodels.mapping import Precision
from hwmodels.shape import ModelShape
from simulator.expertcache import EVICTIONS, Array, ExpertCache, Indices, levels
from simulator.timelines import Timelines

#: Noise of one draw of routing is made for at most so many numbers at once.
BLOCK = 2_000_000


class OffloadError(ShardwiseError):
    """A plan for experts that do not fit which cannot be carried out."""

    exit_code = 4


@dataclass(slots=True)
class Work:
    """One expert's tokens in a layer.

    expert, tokens, level   its number, routed tokens, level of precision it is computed in
    gpu_s, cpu_s            to compute it; cpu_s is infinite where the CPU computes none
    load_s                  over the link; 0 where the GPU's memory has it or will
    ready_s                 when the GPU's memory has it, if load_s is 0
    host_s                  when the host's memory has it
    """

    expert: int
    tokens: int
    level: int
    gpu_s: float
    cpu_s: float
    load_s: float
    ready_s: float
    host_s: float


#: When GPU, CPU and link are next free, none before the layer's experts are known.
Clocks = tuple[float, float, float]
#: Where and in which order a layer's experts are computed: (work, whether on the CPU).
Sharing = Callable[[Sequence[Work], Clocks], list[tuple[Work, bool]]]


def load_all(works: Sequence[Work], clocks: Clocks) -> list[tuple[Work, bool]]:
    """Everything on the GPU: first what is there or under way, then what must be loaded, most tokens first."""
    return [(work, False) for work in sorted(works, key=lambda work: (work.load_s > 0, work.ready_s, -work.tokens))]


def cached_on_gpu(works: Sequence[Work], clocks: Clocks) -> list[tuple[Work, bool]]:
    """A fixed split: the GPU computes what its memory has, the CPU the rest."""
    return [(work, work.load_s > 0) for work in sorted(works, key=lambda work: (work.ready_s, -work.tokens))]


def hybrid(works: Sequence[Work], clocks: Clocks) -> list[tuple[Work, bool]]:
    """HybriMoE's list scheduling (arXiv:2504.05897), as its public code does it.

    In the order cached then not, most tokens first, the GPU may take the head, behind a load over the link if it is not
    there, and the CPU the tail: the one that ends first is done, until nothing is left.
    """
    gpu_s, cpu_s, link_s = clocks
    queue = sorted(works, key=lambda work: (work.load_s > 0, -work.tokens))
    head, tail = 0, len(queue) - 1
    order: list[tuple[Work, bool]] = []
    while head <= tail:
        first, last = queue[head], queue[tail]
        arrived_s = max(link_s, first.host_s) + first.load_s if first.load_s > 0 else first.ready_s
        by_gpu_s = max(gpu_s, arrived_s) + first.gpu_s
        by_cpu_s = max(cpu_s, last.host_s) + last.cpu_s
        if by_gpu_s <= by_cpu_s:
            gpu_s, head = by_gpu_s, head + 1
            if first.load_s > 0:
                link_s = arrived_s
            order.append((first, False))
        else:
            cpu_s, tail = by_cpu_s, tail - 1
            order.append((last, True))
    return order


SHARINGS: dict[str, Sharing] = {"load": load_all, "cpu": cached_on_gpu, "hybrid": hybrid}


def ends_s(order: Sequence[tuple[Work, bool]], clocks: Clocks) -> Clocks:
    """When GPU, CPU and link are done with a layer in this order; the layer is when GPU and CPU are."""
    gpu_s, cpu_s, link_s = clocks
    for work, on_cpu in order:
        if on_cpu:
            cpu_s = max(cpu_s, work.host_s) + work.cpu_s
            continue
        arrived_s = work.ready_s
        if work.load_s > 0:
            link_s = arrived_s = max(link_s, work.host_s) + work.load_s
        gpu_s = max(gpu_s, arrived_s) + work.gpu_s
    return gpu_s, cpu_s, link_s


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Loads for layers to come, on what is predicted when a layer's experts are known.

    The link serves loads as they are asked for: what is needed now waits for what was asked for ahead of time.

    leads    layers ahead that are looked at, nearest first
    hits     part of the predicted experts that is right, by lead; experts that are not needed stand for the others
    walk     stop at the first layer of which something must be loaded (HOBBIT), else load what all of them need
    impact   instead, load what saves most time of its layer's schedule while the link would idle (HybriMoE)
    """

    leads: tuple[int, ...] = ()
    hits: tuple[float, ...] = ()
    walk: bool = False
    impact: bool = False

    def __post_init__(self) -> None:
        """Raise OffloadError for leads and hits that cannot be."""
        if len(self.leads) != len(self.hits) or min(self.leads, default=1) < 1:
            raise OffloadError(f"leads {self.leads}, hits {self.hits}: expected a hit rate for each lead of 1 or more")
        if not all(0 <= hit <= 1 for hit in self.hits):
            raise OffloadError(f"hits {self.hits}: expected shares in [0, 1]")


#: HOBBIT's stacked gates: 96 % right for the next layer, about 90 % two and three ahead (of the heaviest expert).
HOBBIT_PREFETCH = Prefetch((1, 2, 3), (0.96, 0.9, 0.9), walk=True)


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """How experts that do not fit are served.

    cache_share   experts' bytes, at the best level, that the accelerator holds; in [0, 1]
    ladder        weight formats from the best
    thresholds    of importance, one for each format, see simulator.expertcache.levels
    low_share     of the cache's bytes for the formats below the best, in equal parts
    eviction      a name of simulator.expertcache.EVICTIONS
    per_layer     whether every layer has its own part of the cache
    misses        'load': onto the GPU, 'cpu': computed there, 'hybrid': as HybriMoE decides
    cpu_threads   that compute experts
    popular       the cache starts with the most popular experts, else with the first of every layer
    """

    cache_share: float
    ladder: tuple[str, ...] = ("fp16",)
    thresholds: tuple[float, ...] = (1.0,)
    low_share: float = 0.2
    eviction: str = "lru"
    per_layer: bool = True
    misses: str = "load"
    cpu_threads: int = 0
    prefetch: Prefetch = Prefetch()
    popular: bool = False

    def __post_init__(self) -> None:
        """Raise OffloadError for shares, names and numbers that cannot be."""
        for name in ("cache_share", "low_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise OffloadError(f"{name} = {getattr(self, name)}: expected a share in [0, 1]")
        for name, known in (("eviction", EVICTIONS), ("misses", SHARINGS)):
            if getattr(self, name) not in known:
                raise OffloadError(f"{name} = {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if len(self.ladder) != len(self.thresholds):
            raise OffloadError(f"{len(self.thresholds)} thresholds: expected one for each of {', '.join(self.ladder)}")
        if self.misses != "load" and self.cpu_threads < 1:
            raise OffloadError(f"cpu_threads = {self.cpu_threads}: misses = {self.misses!r} needs at least 1")


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


@dataclass(frozen=True, slots=True)
class Offloaded:
    """Steps with experts that do not fit, in a steady state.

    step_s, error_s    mean, and its standard error from means of ten stretches
    hit_rate           of the experts of a step, those the accelerator has or is getting when they are known
    level_share        of routed tokens at each level, and last those left out
    loaded_bytes       per step, onto the accelerator, ahead of time or not
    busy               part of the time that gpu, cpu, link and ssd are used
    steps_s            of every step counted
    """

    step_s: float
    error_s: float
    hit_rate: float
    level_share: tuple[float, ...]
    loaded_bytes: float
    busy: dict[str, float]
    steps_s: Array


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


def cache_rooms(costs: ExpertCosts, plan: OffloadPlan) -> list[int]:
    """Experts the accelerator holds at each level."""
    nbytes = plan.cache_share * costs.layers * costs.experts * costs.expert_bytes[0]
    lower = len(costs.expert_bytes) - 1
    shares = [1 - plan.low_share if lower else 1.0] + [plan.low_share / max(1, lower)] * lower
    return [int(share * nbytes / each + 1e-9) for share, each in zip(shares, costs.expert_bytes, strict=True)]


def simulate_offload(
    costs: ExpertCosts,
    plan: OffloadPlan,
    routing: SampledRouting,
    rng: np.random.Generator,
    *,
    steps: int = 200,
    warmup: int = 50,
) -> Offloaded:
    """Mean step under a plan after `warmup` steps, over `steps` of them, at least ten.

    rng   draws which predictions are wrong; the routing has its own
    """
    if steps < 10 or warmup < 0:
        raise OffloadError(f"steps = {steps}, warmup = {warmup}: expected at least 10, and at least 0")
    offload = Offload(costs, plan, routing.popularity, rng)
    seconds = np.empty(steps)
    shares = np.zeros(len(plan.ladder) + 1)
    start = (0.0, 0, 0, 0.0)
    busy = dict(offload.lines.busy_s)
    for step in range(-warmup, steps):
        if step == 0:
            start = offload.now_s, offload.hits, offload.uses, offload.loaded_bytes
            busy = dict(offload.lines.busy_s)
        draw = routing.step()
        actives, found = active_experts(draw, plan.thresholds)
        took_s = offload.step(actives, draw.scores)
        if step >= 0:
            seconds[step] = took_s
            shares += found
    spent_s = offload.now_s - start[0]
    stretches = np.array([part.mean() for part in np.array_split(seconds, 10)])
    return Offloaded(
        step_s=float(seconds.mean()),
        error_s=float(stretches.std(ddof=1) / np.sqrt(10)),
        hit_rate=(offload.hits - start[1]) / max(1, offload.uses - start[2]),
        level_share=tuple((shares / shares.sum()).tolist()),
        loaded_bytes=(offload.loaded_bytes - start[3]) / steps,
        busy={name: (offload.lines.busy_s[name] - before) / spent_s for name, before in busy.items()},
        steps_s=seconds,
    )


def offloaded_token_s(
    model: ModelShape,
    cluster: Cluster,
    cpu: Device,
    plan: OffloadPlan,
    *,
    tokens: int = 1,
    context_tokens: int = 1024,
    prefill: bool = False,
    precision: Precision | None = None,
    loads: Array | None = None,
    skew: float = 0.5,
    persistence: float = 0.5,
    sharpness: float = 1.0,
    host_bytes: float = float("inf"),
    ssd_bytes_per_s: float | None = None,
    seed: int = 0,
    steps: int = 200,
    warmup: int = 50,
) -> Offloaded:
    """Steps of a model on one device of a cluster with part of its experts: a token of each sequence, or a prompt.

    tokens, context_tokens, prefill, precision   see hwmodels.expertoffload.compile_expert_costs
    loads          choices counted for every layer's experts [layers, experts]; without, a power law of `skew`
    persistence    see SampledRouting; of decoding sequences only
    host_bytes, ssd_bytes_per_s   the host's memory for experts, and the SSD they are read from if they exceed it

    Raises OffloadError, MappingError, OutOfMemoryError and ProfileError for what cannot be.
    """
    host = Host(cpu, plan.cpu_threads, memory_bytes=host_bytes, ssd_bytes_per_s=ssd_bytes_per_s)
    costs = compile_expert_costs(
        model, cluster, host, plan.ladder,
        tokens=tokens, context_tokens=context_tokens, prefill=prefill, precision=precision,
    )  # fmt: skip
    shares_rng, routing_rng, guesses_rng = np.random.default_rng(seed).spawn(3)
    if loads is not None and loads.shape != (costs.layers, costs.experts):
        raise OffloadError(f"loads of shape {loads.shape}: expected {costs.layers} layers of {costs.experts} experts")
    drawn = power_law(costs.layers, costs.experts, skew, shares_rng)
    routing = SampledRouting(
        drawn if loads is None else popularity_of(loads, costs.top_k), costs.top_k, routing_rng,
        tokens=tokens, persistence=0.0 if prefill else persistence, sharpness=sharpness,
    )  # fmt: skip
    return simulate_offload(costs, plan, routing, guesses_rng, steps=steps, warmup=warmup)
