"""Does a placement with a lower objective make simulated steps shorter, and by as much as the objective says?

The same requests are served under every placement, all of them there from the start, so that every placement takes the
same steps in the same order and only their seconds differ. The replica is the one the objective is about: attention on
every GPU for its own tokens, experts over all GPUs.

The objective charges every choice on the busiest rank the arithmetic's rate of large steps. Simulated steps pay the
whole kernel (hwmodels.routedcost): weights of every touched expert, which set the time of small steps, tokens that by
chance fall on a rank, and the exchange of tokens between ranks.
"""

from __future__ import annotations

from collections.abc import Mapping as Named
from dataclasses import dataclass, replace
from itertools import pairwise
from math import nan

import numpy as np
from scipy.stats import spearmanr

from hwmodels.busiest import TOKENS, busiest_rank
from hwmodels.mapping import Precision
from hwmodels.operators import Experts
from hwmodels.roofline import AnalyticCost
from hwmodels.routedcost import RoutedCost
from hwmodels.routing import RoutingStats
from hwmodels.step_model import StepModel, compile_step_model, linear_operators, shared_operators
from hwmodels.topology import topology
from planner.catalogue import Catalogue, mapping_of, precision_of
from planner.placement import Bools, Indices, Placement, Problem
from planner.plan import Pool
from simulator.deployment import Deployment
from simulator.result import Result, latencies
from simulator.simulate import simulate
from simulator.workload import Requests

#: Prompts and answers of a request, in tokens, drawn evenly from these ranges, by kind of traffic.
LENGTHS = {"prefill-heavy": ((1024, 3072), (1, 8)), "decode-heavy": ((16, 48), (64, 192))}
#: Requests of prefill-heavy traffic for every GPU; decode-heavy traffic has as many as a step has tokens.
PROMPTS = 8
#: Tokens of steps on each GPU for which savings are told.
PER_GPU = (4, 16, 64, 256, 1024, 2048)


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """Traffic under one placement.

    objective_s    of the placement problem, per step of its tokens
    predicted_s    seconds of the whole run that its load term says are saved, against the first placement
    saved_s        seconds of the whole run that are saved in the simulation
    mean_ttft_s, mean_tpot_s   over the requests
    """

    placement: str
    objective_s: float
    predicted_s: float
    saved_s: float
    makespan_s: float
    mean_step_s: float
    mean_ttft_s: float
    mean_tpot_s: float


@dataclass(frozen=True, slots=True)
class TrafficCheck:
    """The same traffic under every placement.

    tokens, steps      computed in the whole run, and the steps of the mean scheduler
    rank_correlation   Spearman's, of the objective and the makespan; NaN where all are alike in one of them
    """

    traffic: str
    requests: int
    tokens: int
    steps: float
    rank_correlation: float
    runs: tuple[SimulatedRun, ...]


@dataclass(frozen=True, slots=True)
class Saving:
    """What a step of `tokens` tokens on all GPUs saves by a placement, in seconds.

    predicted_s   by the load term, in proportion to tokens
    experts_s     by the price of the routed experts' kernels
    step_s        by the price of all that depends on where experts sit: these kernels and the exchange of tokens
    """

    tokens: int
    predicted_s: float
    experts_s: float
    step_s: float


def replica_of(problem: Problem, experts: int, formats: Precision, tokens: int) -> Pool:
    """The replica that the problem is about, for decode steps of `tokens` tokens on all its GPUs."""
    return Pool(
        1,
        attention_dp=problem.gpus,
        ep=problem.gpus,
        redundant_experts=max(0, int(problem.slots_of.sum()) - experts),
        weights=formats.weights,
        activations=formats.activations,
        max_seqs=max(1, -(-tokens // problem.gpus)),
    )


def prices_of(
    catalogue: Catalogue, pool: Pool, stats: RoutingStats, placement: Placement, tokens: tuple[int, ...] = TOKENS
) -> RoutedCost:
    """Prices of the operators of a replica whose experts sit like that, from a table over these numbers of tokens."""
    mapping = mapping_of(pool)
    block = catalogue.model.layers[stats.layers[0]].feed_forward
    whole = block.groups == 1 or on_one_node(placement.holds, block.groups, topology(catalogue.cluster).node)
    table = busiest_rank(stats, placement.split.transpose(0, 2, 1), tokens)
    return RoutedCost(AnalyticCost(catalogue.cluster, mapping), table, whole_groups=whole)


def on_one_node(holds: Bools, groups: int, nodes: Indices) -> bool:
    """Whether every group of experts side by side has all its copies on one node, in every layer."""
    layers, experts, _ = holds.shape
    if experts % groups:
        return False
    lies = np.stack([holds[..., np.asarray(nodes) == node].any(axis=2) for node in np.unique(nodes)], axis=2)
    return bool((lies.reshape(layers, groups, experts // groups, -1).any(axis=2).sum(axis=2) == 1).all())


def checked_by_simulation(
    catalogue: Catalogue,
    stats: RoutingStats,
    problem: Problem,
    placements: Named[str, Placement],
    formats: Precision,
    seed: int = 0,
) -> list[TrafficCheck]:
    """Prefill-heavy and decode-heavy traffic under every placement; savings are those against the first.

    catalogue   of the model on the problem's GPUs; its own routing is not looked at

    Raises MappingError where the model cannot be cut like that, OutOfMemoryError where the replica does not fit.
    """
    tokens = round(problem.tokens / stats.top_k)
    pool = replica_of(problem, stats.experts, formats, tokens)
    spec = catalogue.replica(pool)
    models = {name: _model(catalogue, pool, prices_of(catalogue, pool, stats, p)) for name, p in placements.items()}
    checks = []
    for traffic in LENGTHS:
        requests = requests_of(traffic, problem.gpus, tokens, seed)
        results = {}
        for name, model in models.items():
            deployment = Deployment([replace(spec, model=model)], frontend_s=catalogue.engine.request_overhead_s)
            results[name] = simulate(deployment, requests, seed)
        checks.append(_check(traffic, len(requests), tokens, placements, results))
    return checks


def savings(
    catalogue: Catalogue,
    stats: RoutingStats,
    problem: Problem,
    before: Placement,
    after: Placement,
    formats: Precision,
) -> list[Saving]:
    """What steps of PER_GPU tokens on every GPU save, and what the load term says."""
    tokens = np.array(PER_GPU) * problem.gpus
    pool = replica_of(problem, stats.experts, formats, int(tokens[0]))
    kernels = _kernels(catalogue, pool, tokens)
    spent, steps = [], []
    for placement in (before, after):
        cost = prices_of(catalogue, pool, stats, placement)
        spent.append(sum((cost.time_s(op) for op in kernels), np.zeros(len(tokens))))
        steps.append(np.asarray(_model(catalogue, pool, cost).stages[0].shared)[tokens])
    per_token = (before.load_term - after.load_term) * stats.top_k / problem.tokens
    columns = tokens.tolist(), (spent[0] - spent[1]).tolist(), (steps[0] - steps[1]).tolist()
    return [Saving(n, per_token * n, experts, step) for n, experts, step in zip(*columns, strict=True)]


def experts_s(
    catalogue: Catalogue, stats: RoutingStats, problem: Problem, placement: Placement, formats: Precision, tokens: int
) -> float:
    """Seconds of the routed experts' kernels in a step of `tokens` tokens: all of the price, weights read included."""
    pool = replica_of(problem, stats.experts, formats, tokens)
    kernels = _kernels(catalogue, pool, np.array([tokens]))
    cost = prices_of(catalogue, pool, stats, placement, (tokens, 2 * tokens))
    return float(sum(cost.time_s(op).item() for op in kernels))


def requests_of(traffic: str, gpus: int, tokens: int, seed: int) -> Requests:
    """Requests of one of LENGTHS that are all there at once, enough to fill the steps of all GPUs."""
    prompts, outputs = LENGTHS[traffic]
    count = PROMPTS * gpus if traffic == "prefill-heavy" else max(gpus, tokens)
    rng = np.random.default_rng(seed)
    asked, answered = (rng.integers(low, high, count, endpoint=True) for low, high in (prompts, outputs))
    return Requests(np.zeros(count), asked, answered)


def _kernels(catalogue: Catalogue, pool: Pool, tokens: Indices) -> list[Experts]:
    """The routed experts of all layers in steps of so many tokens on all GPUs, as one GPU runs them."""
    mapping, precision, batch = mapping_of(pool), precision_of(pool), tokens.astype(np.float64)
    if mapping.attention_dp > 1:
        found = shared_operators(catalogue.model, catalogue.model.layers, batch, mapping, precision)
    else:
        found = linear_operators(catalogue.model, catalogue.model.layers, batch, mapping, precision, first=False)
    return [op for op in found if isinstance(op, Experts)]


def _model(catalogue: Catalogue, pool: Pool, cost: RoutedCost) -> StepModel:
    return compile_step_model(
        catalogue.model,
        mapping_of(pool),
        precision_of(pool),
        catalogue.engine,
        cost,
        max_tokens=pool.token_budget,
        max_seqs=pool.max_seqs,
    )


def _check(
    traffic: str, requests: int, tokens: int, placements: Named[str, Placement], results: Named[str, Result]
) -> TrafficCheck:
    """The runs side by side; raises AssertionError if they did not take the same steps."""
    done = [_work(result) for result in results.values()]
    assert all(one == other for one, other in pairwise(done)), "placements changed what steps were taken"
    computed, steps, _ = done[0]
    first = next(iter(results))
    runs = []
    for name, result in results.items():
        frame, placement = result.requests, placements[name]
        ttft, tpot, _e2e = latencies(*(frame[c] for c in ("arrival_s", "first_token_s", "finish_s", "output_tokens")))
        gained = (placements[first].load_term - placement.load_term) / tokens
        runs.append(
            SimulatedRun(
                name,
                placement.objective,
                gained * computed,
                results[first].totals.makespan_s - result.totals.makespan_s,
                result.totals.makespan_s,
                _busy_s(result) / steps,
                float(ttft.mean()),
                float(np.nanmean(tpot)),
            )
        )
    lanes = next(iter(results.values())).totals.lanes[0]
    return TrafficCheck(traffic, requests, computed, steps / lanes, _correlation(runs), tuple(runs))


def _work(result: Result) -> tuple[int, int, int]:
    """(tokens computed, steps of all schedulers, requests served)."""
    log = result.steps
    assert log is not None
    tokens = (log["decode_sequences"] * log["steps"] + log["prefill_tokens"]).sum()
    return int(tokens), int(log["steps"].sum()), int(result.requests["finish_s"].notna().sum())


def _busy_s(result: Result) -> float:
    log = result.steps
    assert log is not None
    return float((log["end_s"] - log["start_s"]).sum())


def _correlation(runs: list[SimulatedRun]) -> float:
    """Spearman's of objectives and makespans that differ by more than rounding; NaN where none do."""
    columns = [[float(f"{getattr(run, name):.9e}") for run in runs] for name in ("objective_s", "makespan_s")]
    if any(len(set(column)) < 2 for column in columns):
        return nan
    return round(float(spearmanr(*columns).statistic), 12)
