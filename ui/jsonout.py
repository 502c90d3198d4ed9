"""What --json prints: one object on standard output, in a layout that only grows.

Every object has `version` (1). Times are seconds, sizes bytes, rates per second; a number that does not exist is null.
Within a version keys are added, never renamed or removed.

shardwise plan
    question     model, hardware, gpus, also {hardware: gpus}, serving, transfer, budget_usd_per_h, budget_w, engine,
                 router, pool_router, traffic, requests, rate_per_s (null: none demanded), limits, prefix_caching,
                 schedules {chunk_tokens, group_tokens, orders, ageing_tokens_per_s, deadlines_s, overlaps: what was
                 varied}, experts_placed (by recorded routing), objective, seed, seconds, tolerance
    best         the first of `ranked`, and `metrics` and `totals` of it simulated with all its steps at `rate_per_s`,
                 as in `shardwise simulate`; `caching` too where prefixes are kept
    ranked       list of {plan, words, gpus_used, idle_gpus, value, unit, bound, tie, capacity_per_s, rate_per_s,
                 settled (false: the time ended before a rate that breaks a limit was found near), goodput_per_s,
                 output_tokens_per_s, limits, mean_tpot_s, mean_e2e_s, j_per_output_token}; `plan` is the
                 content of a plan file; `bound` is a score no simulation of the plan can exceed (higher is better);
                 `j_per_output_token` is known of the first, and of all with objective energy; of plans whose experts
                 are placed the first names its expert_map where --save writes it; `limits` maps each limit to the
                 value reached
    considered, pruned {law: plans}, simulated, trials, untried, gap
                 gap: the share by which any plan not tried can still be better; 0 means proved within the tolerance.
                 Where ways of serving are compared, it is about plans that serve whole requests alone: pools and
                 shared devices are simulated, not bounded
    pareto       list of {plan, words, rate_per_s, tokens_per_s_per_gpu, tokens_per_s_per_user}
    evidence     {source of prices: share of a step's time}
    wall_s       of the search
    serving      ways of serving compared, best first: list of {name, plan, value, rate_per_s, predicted_per_s (by the
                 program that sized the pools), gap (of that program), held_by (its tight rows), strained_by (the limit
                 nearest to broken when simulated), problem (why there is no plan), wall_s}
    crossover    null, or the first two ways over request rates: {first, second: lists of {rate_per_s, worst (a limit's
                 statistic over its limit), limit, values_s, mean_e2e_s}, crossings: list of {rate_per_s, second_ahead
                 (whether the second is the less strained above it)}}

shardwise simulate
    plan, words
    metrics      duration_s, overall, classes {name: as overall}, goodput_requests_per_s_per_gpu,
                 output_tokens_per_s_per_gpu, mfu, mbu, kv_use_mean, kv_use_max, queue_mean, queue_max,
                 j_per_output_token, usd_per_million_output_tokens;
                 overall: requests, finished, rejected, preemptions, ttft_s, tpot_s, itl_s and e2e_s as {count, mean,
                 p50, p90, p95, p99}, slo_attainment, goodput_requests_per_s, output_tokens_per_s, total_tokens_per_s
    totals       gpus, replicas, makespan_s, model_flops, hbm_bytes, energy_j, price_usd_per_h, peak_flops_per_s,
                 memory_bytes_per_s, lanes and kv_blocks (by replica), seed, events, requeued (requests that started
                 anew because their replica failed), lost_kv_blocks (with these replicas), role_switches, roles (of
                 each replica when the run began)
    limits       {limit: whether the measured requests keep it together}, empty without limits
    replications {metric: {mean, half_width, runs}} of a 95 % interval; null for a single run
    evidence     {source of prices: share of a step's device time}
    encode       null without images; workers (0: replicas encode for themselves), requests and tiles (that were
                 encoded), use (share of the time these devices encoded), wait_mean_s (to the first batch's start) and
                 mean_s (until all its tokens are with prefill) of a request with images; null without workers
    caching      null where no prefix is kept or nothing is known of prompts that begin alike; prompt_tokens (of the
                 requests looked up), found_tokens (in device memory), loaded_tokens (from the tiers below), hit_rate
                 (share of prompt tokens found or loaded), loads, load_mean_s, stored_bytes, loaded_bytes, links: list
                 of {name, bytes_per_s, carried_bytes} of those to the tiers that were used
    handed_over  null where no KV went to another replica; transfers, nbytes, waiting_for_room_s {mean, max} (from the
                 end of a prompt until blocks are set aside at the target), exposed_s {mean, max} (from the later of
                 these two until all of it is there), busiest_link {name, bytes_per_s, use (share of what it could
                 carry in the run)}
    notes        what is odd about the plan
    wall_s       of the simulation

shardwise explain
    plan, words, pools: list of {pool, memory, steps}
    memory       device_bytes, weights_bytes, activations_bytes, engine_bytes, kv_bytes, kv_bytes_per_token, kv_blocks,
                 kv_tokens (of one scheduler)
    steps        list of {title, tokens, time_s, step_model_s, binding, bounds {resource: seconds}, mfu, mbu,
                 operators: list of {name, kind, count, time_s, share, flops, bytes, bound, algorithm, link, source,
                 hidden_s (of transfers between context-parallel ranks)}};
                 flops and bytes are sums over all launches on one device; what overlap takes off the others is an
                 operator of kind overlap with a time below 0. With policy layered the step of the first group of layers
                 follows that of the prompt in all of them

    With --routing, or a map of experts in the plan, `plan`, `simulate` and `explain` add
    routing      source of the recorded routing; absent for uniform routing
    experts      list of {pool, how (placed: by the routing, map: the plan's, order), expert_map, ranks,
                 redundant_experts, in_order, busiest_over_mean, even_for}: choices of the busiest expert rank over
                 the mean of all ranks, averaged over layers, with experts in order and as the plan has them; even_for:
                 fewer ranks that an uneven map of the plan suits, or null

shardwise models      models: list of {name, parameters, active_parameters, layers, hidden, attention, experts,
                      kv_bytes_per_token, max_context_tokens, published_parameters, source}; KV in 16 bit
shardwise hardware    devices: list of {name, vendor, kind, peak_flops_per_s {format: rate}, memory_bytes,
                      memory_bytes_per_s, tdp_w, idle_w, price_usd_per_h, default_cluster, calibration {family: what its
                      coefficients were fitted to, and the error on the rest}, source};
                      clusters: list of {name, device, gpus_per_node, intra, inter}, links as {name, kind,
                      bytes_per_s, latency_s} or null
shardwise export      engine, engine_version, files {name: text}, notes

shardwise profile     new {family: rows measured in this run}, groups, about (the content of about.yaml)
shardwise calibrate   see ui.calibrating
shardwise validate serving
    rows, mapped, unmapped {reason: rows}, files, cost, evidence, wall_s
    ttft, tpot, throughput, e2e   {mape, median_ape, bias, spearman, n}
    groups       {label: {value: {metric: as above}}}
    regret       {mean, p90, n, best_chosen, at_random, latency}; noise, copies; see ui.validationreport.report_object
shardwise validate kernels    asked, measured {family: rows}, software, groups: list of {family, cost, dtype,
                      experiment, whole {n, median, p90, bias}, classes, unpriced}, left_out {reason: rows}, wall_s
shardwise validate plan       plan, source, engine, kernels, pools: list of {steps: operators with their analytic,
                      calibrated and measured prices and the nearest measured kernels}
shardwise validate run        status, targets, profile, runs, apart, ranking; see ui.runreport.report_object
shardwise validate engine     engine (the fitted profile), points {half: rows}, errors {half: {metric: [before, after]}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from ui.words import in_words

if TYPE_CHECKING:
    import pandas as pd

    from hwmodels.hardware import Cluster, Device, Fabric
    from hwmodels.huggingface import ModelProfile
    from hwmodels.shape import ModelShape
    from planner import Plan, SearchResult
    from planner.crossover import Crossover
    from planner.explain import Explanation
    from planner.search import Family, Ranked
    from simulator.limits import Limit
    from simulator.metrics import Metrics
    from simulator.result import RunTotals

VERSION = 1


def dumps(content: Mapping[str, Any]) -> str:
    """The object as text; numbers that are not finite become null."""
    return json.dumps({"version": VERSION, **_finite(content)}, indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def plan_object(
    result: SearchResult, traffic: str, metrics: Metrics, totals: RunTotals, saved: Plan | None = None
) -> dict[str, Any]:
    """The answer of a search; `metrics` and `totals` are those of its best plan.

    saved   the best plan as its plan file has it, with names of the maps beside it; None where none is written
    """
    question = result.question
    ranked = [_ranked(result, entry) for entry in result.ranked]
    if saved is not None:
        ranked[0]["plan"] = asdict(saved)
    if ranked[0]["j_per_output_token"] is None:
        ranked[0]["j_per_output_token"] = metrics.j_per_output_token
    return {
        "question": {
            "model": question.model,
            "hardware": question.hardware,
            "gpus": question.gpus,
            "also": dict(question.also),
            "serving": question.serving,
            "transfer": question.transfer,
            "budget_usd_per_h": question.budget_usd_per_h,
            "budget_w": question.budget_w,
            "engine": question.engine,
            "router": question.router,
            "pool_router": question.pool_router,
            "traffic": traffic,
            "requests": len(question.requests),
            "rate_per_s": question.rate_per_s,
            "limits": [str(limit) for limit in question.limits],
            "prefix_caching": question.choices.prefix_caching,
            "schedules": asdict(question.choices.schedules),
            "experts_placed": question.routing is not None and question.experts_placed,
            "objective": question.objective,
            "seed": question.seed,
            "seconds": question.seconds,
            "tolerance": question.tolerance,
        },
        "best": {**ranked[0], "metrics": asdict(metrics), "totals": asdict(totals)},
        "ranked": ranked,
        "considered": result.considered,
        "pruned": dict(result.pruned),
        "simulated": result.simulated,
        "trials": result.trials,
        "untried": result.untried,
        "gap": result.gap,
        "pareto": [
            {
                "plan": asdict(point.plan),
                "words": in_words(point.plan),
                "rate_per_s": point.rate_per_s,
                "tokens_per_s_per_gpu": point.tokens_per_s_per_gpu,
                "tokens_per_s_per_user": point.tokens_per_s_per_user,
            }
            for point in result.points
        ],
        "evidence": dict(result.evidence),
        "wall_s": result.wall_s,
        "serving": [_family(family, result.best.plan, saved) for family in result.families],
        "crossover": _crossover(result.crossover),
    }


def _family(family: Family, first: Plan, saved: Plan | None) -> dict[str, Any]:
    best = family.best
    plan = None if best is None else best.plan if saved is None or best.plan != first else saved
    return {
        "name": family.name,
        "plan": None if plan is None else asdict(plan),
        "value": None if best is None else best.value,
        "rate_per_s": family.rate_per_s,
        "predicted_per_s": family.predicted_per_s,
        "gap": family.gap,
        "held_by": list(family.held_by),
        "strained_by": None if family.strained_by is None else str(family.strained_by),
        "problem": family.problem or None,
        "wall_s": family.wall_s,
    }


def _crossover(found: Crossover | None) -> dict[str, Any] | None:
    if found is None:
        return None
    lines = {
        which: [
            {
                "rate_per_s": strain.rate_per_s,
                "worst": strain.worst,
                "limit": str(strain.limit),
                "values_s": list(strain.values_s),
                "mean_e2e_s": strain.mean_e2e_s,
            }
            for strain in strains
        ]
        for which, strains in (("first", found.first), ("second", found.second))
    }
    return {**lines, "crossings": [{"rate_per_s": rate, "second_ahead": ahead} for rate, ahead in found.crossings]}


def _ranked(result: SearchResult, entry: Ranked) -> dict[str, Any]:
    plan, trial = entry.plan, entry.trial
    return {
        "plan": asdict(plan),
        "words": in_words(plan),
        "gpus_used": plan.gpus_used,
        "idle_gpus": plan.idle,
        "value": entry.value,
        "unit": result.unit,
        "bound": entry.bound,
        "tie": entry.tie,
        "capacity_per_s": entry.capacity_per_s,
        "rate_per_s": trial.rate_per_s,
        "settled": trial.settled,
        "goodput_per_s": trial.goodput_per_s,
        "output_tokens_per_s": trial.output_tokens_per_s,
        "limits": dict(zip(map(str, result.question.limits), trial.values_s, strict=True)),
        "mean_tpot_s": trial.mean_tpot_s,
        "mean_e2e_s": trial.mean_e2e_s,
        "j_per_output_token": trial.joules_per_token,
    }


def simulation_object(
    plan: Plan,
    metrics: Metrics,
    totals: RunTotals,
    kept: Mapping[Limit, bool],
    replications: pd.DataFrame | None,
    evidence: Mapping[str, float],
    wall_s: float,
) -> dict[str, Any]:
    """One simulated plan."""
    return {
        "plan": asdict(plan),
        "words": in_words(plan),
        "metrics": asdict(metrics),
        "totals": asdict(totals),
        "limits": {str(limit): value for limit, value in kept.items()},
        "replications": None if replications is None else _replications(replications),
        "evidence": dict(evidence),
        "wall_s": wall_s,
    }


def _replications(table: pd.DataFrame) -> dict[str, Any]:
    rows = zip(table.index, table["mean"].tolist(), table["half_width"].tolist(), table["runs"].tolist(), strict=True)
    return {str(name): {"mean": mean, "half_width": half, "runs": runs} for name, mean, half, runs in rows}


def explanation_object(plan: Plan, pools: list[Explanation]) -> dict[str, Any]:
    """Where the steps of a plan spend their time."""
    return {
        "plan": asdict(plan),
        "words": in_words(plan),
        "pools": [
            {
                "pool": asdict(found.pool),
                "memory": asdict(found.memory),
                "steps": [
                    {
                        "title": step.title,
                        "tokens": step.tokens,
                        "time_s": step.time_s,
                        "step_model_s": step.step_model_s,
                        "binding": step.binding,
                        "bounds": step.bounds,
                        "mfu": step.mfu,
                        "mbu": step.mbu,
                        "operators": [{**asdict(row), "share": row.time_s / step.time_s} for row in step.rows],
                    }
                    for step in found.steps
                ],
            }
            for found in pools
        ],
    }


def models_object(
    profiles: Sequence[ModelProfile], shapes: Sequence[ModelShape], attention: Mapping[str, str]
) -> dict[str, Any]:
    """The shipped models."""
    return {
        "models": [
            {
                "name": profile.name,
                "parameters": shape.parameters,
                "active_parameters": shape.active_parameters,
                "layers": len(shape.layers),
                "hidden": shape.hidden,
                "attention": attention[shape.name],
                "experts": max(layer.feed_forward.experts for layer in shape.layers),
                "kv_bytes_per_token": shape.kv_bytes_per_token("bf16"),
                "max_context_tokens": shape.max_context_tokens,
                "published_parameters": profile.published_parameters,
                "source": profile.source,
            }
            for profile, shape in zip(profiles, shapes, strict=True)
        ]
    }


def hardware_object(devices: Sequence[Device], clusters: Sequence[Cluster]) -> dict[str, Any]:
    """The shipped devices and clusters."""

    def link(fabric: Fabric | None) -> dict[str, Any] | None:
        if fabric is None:
            return None
        rate, latency = fabric.bytes_per_s, fabric.latency_s
        return {"name": fabric.name, "kind": fabric.kind, "bytes_per_s": rate, "latency_s": latency}

    return {
        "devices": [
            {
                "name": device.name,
                "vendor": device.vendor,
                "kind": device.kind,
                "peak_flops_per_s": dict(device.peak_flops_per_s),
                "memory_bytes": device.memory_bytes,
                "memory_bytes_per_s": device.memory_bytes_per_s,
                "tdp_w": device.tdp_w,
                "idle_w": device.idle_w,
                "price_usd_per_h": device.price_usd_per_h,
                "default_cluster": device.default_cluster,
                "calibration": {family: asdict(found) for family, found in device.calibration.items()},
                "source": device.source,
            }
            for device in devices
        ],
        "clusters": [
            {
                "name": cluster.name,
                "device": cluster.device.name,
                "gpus_per_node": cluster.gpus_per_node,
                "intra": link(cluster.intra),
                "inter": link(cluster.inter),
            }
            for cluster in clusters
        ],
    }
