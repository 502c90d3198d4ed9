"""How fast steps with experts that do not fit are simulated: `python tests/benchmarks/offload.py [--json] [--steps N]`.

One sequence on one device; popularity a power law of exponent 0.5, the noise of routing correlated by 0.5 between
tokens; drawing it is included. CPU seconds of one process, the best of three rounds; `step` is the mean simulated step,
equal in every run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

from hwmodels.expertoffload import Host, compile_expert_costs  # noqa: E402
from hwmodels.hardware import load_cluster, load_device  # noqa: E402
from hwmodels.huggingface import load_model  # noqa: E402
from simulator.expertcache import HOBBIT_THRESHOLDS  # noqa: E402
from simulator.expertrouting import SampledRouting, power_law  # noqa: E402
from simulator.offloadedsteps import simulate_offload  # noqa: E402
from simulator.offloadplan import HOBBIT_PREFETCH, OffloadPlan, Prefetch  # noqa: E402
from simulator.timelines import Operation, critical_path, list_schedule, on  # noqa: E402

LADDER = ("fp16", "int4")
IMPACT = Prefetch((1, 2, 3), (0.96, 0.9, 0.9), impact=True)
PLANS = {
    "load on demand, LRU": OffloadPlan(0.25),
    "HOBBIT": OffloadPlan(0.25, LADDER, HOBBIT_THRESHOLDS, eviction="weighted", prefetch=HOBBIT_PREFETCH),
    "split": OffloadPlan(0.25, misses="cpu", cpu_threads=16, popular=True),
    "HybriMoE": OffloadPlan(0.25, misses="hybrid", cpu_threads=16, eviction="score", prefetch=IMPACT, popular=True),
}
MODELS = {
    "mixtral-8x7b": "rtx-4090",
    "deepseek-v2-lite": "rtx-4090",
    "qwen3-30b-a3b": "rtx-4090",
    "deepseek-v3": "h100-sxm",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One plan for one model."""

    model: str
    plan: str
    step_s: float
    hit_rate: float
    steps_per_cpu_s: float


def measure(model: str, name: str, steps: int) -> Row:
    """The best of three equal runs."""
    plan, best_s = PLANS[name], float("inf")
    host = Host(load_device("xeon-8592"), plan.cpu_threads)
    costs = compile_expert_costs(load_model(model), load_cluster(MODELS[model], 1), host, plan.ladder)
    for _ in range(3):
        shares, noise, guesses = np.random.default_rng(0).spawn(3)
        popularity = power_law(costs.layers, costs.experts, 0.5, shares)
        routing = SampledRouting(popularity, costs.top_k, noise, persistence=0.5)
        start_s = time.process_time()
        result = simulate_offload(costs, plan, routing, guesses, steps=steps, warmup=0)
        best_s = min(best_s, time.process_time() - start_s)
    return Row(model, name, result.step_s, result.hit_rate, steps / best_s)


def schedule_rate(count: int = 2000) -> float:
    """Operations per CPU second of the general executor: layers of loads and experts on three resources."""
    operations = [Operation("start", on({"gpu": 1.0}))]
    for index in range(1, count // 2):
        behind = (f"run {max(1, index - 4)}",) if index > 4 else ("start",)
        operations.append(Operation(f"load {index}", on({"link": 0.4}), behind))
        operations.append(Operation(f"run {index}", on({"gpu": 0.5, "cpu": 0.9}), (f"load {index}",)))
    best_s = float("inf")
    for _ in range(3):
        start_s = time.process_time()
        list_schedule(operations, {"gpu": 1, "cpu": 1, "link": 1}, critical_path)
        best_s = min(best_s, time.process_time() - start_s)
    return len(operations) / best_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="speed of steps with experts that do not fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    options = parser.parse_args()
    rows = [measure(model, name, options.steps) for model in MODELS for name in PLANS]
    rate = schedule_rate()
    if options.json:
        fields = Row.__dataclass_fields__
        print(json.dumps({"rows": [{f: getattr(r, f) for f in fields} for r in rows], "operations_per_cpu_s": rate}))
        return
    print(f"{'model':18} {'plan':20} {'step':>10} {'hits':>6} {'steps per CPU second':>21}")
    for row in rows:
        print(
            f"{row.model:18} {row.plan:20} {row.step_s * 1e3:7.1f} ms {row.hit_rate:6.2f} {row.steps_per_cpu_s:21,.0f}"
        )
    print(f"list scheduling: {rate:,.0f} operations per CPU second")


if __name__ == "__main__":
    main()
