"""How long is a step on average, once the cache of experts has settled?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hwmodels.expertoffload import ExpertCosts, Host, compile_expert_costs
from hwmodels.hardware import Cluster, Device
from hwmodels.mapping import Precision
from hwmodels.shape import ModelShape
from simulator.errors import OffloadError
from simulator.expertcache import Array
from simulator.expertoffload import Offload
from simulator.expertrouting import (
    PERSISTENCE,
    SKEW,
    Draw,
    SampledRouting,
    active_experts,
    popularity_of,
    power_law,
)
from simulator.offloadplan import OffloadPlan


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


class Routing(Protocol):
    """What experts are chosen, step after step; popularity of every layer's experts [layers, experts]."""

    popularity: Array

    def step(self) -> Draw:
        """The routing of the next step."""
        ...


def simulate_offload(
    costs: ExpertCosts,
    plan: OffloadPlan,
    routing: Routing,
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
    skew: float = SKEW,
    persistence: float = PERSISTENCE,
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
