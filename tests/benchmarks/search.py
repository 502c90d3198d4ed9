"""How fast questions are answered: `python tests/benchmarks/search.py [--json] [--question NAME]`.

Every question is asked in a process of its own; wall_s and cpu_s are of that process, interpreter start-up and imports
included. screen_plans_per_s is the numpy pass that bounds plans (busy time and latency floors) over many mappings of
Llama-3.1-70B and DeepSeek-V3, with coefficients derived beforehand; screen_first_plans_per_s includes deriving them,
and screen_compiled_plans_per_s compiling the step models as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

QUESTIONS: dict[str, dict[str, Any]] = {
    "llama-3.1-70b on 16 x h100-sxm": {
        "model": "llama-3.1-70b",
        "hardware": "h100-sxm",
        "gpus": 16,
        "rate_per_s": 8.0,
        "requests": 10_000,
    },
    "deepseek-v3 on 32 x h200-sxm": {
        "model": "deepseek-v3",
        "hardware": "h200-sxm",
        "gpus": 32,
        "rate_per_s": 8.0,
        "requests": 10_000,
        "formats": ("fp8_block", "fp8", "bf16"),
    },
    "deepseek-v3 on 32 x h100-sxm": {
        "model": "deepseek-v3",
        "hardware": "h100-sxm",
        "gpus": 32,
        "rate_per_s": 8.0,
        "requests": 10_000,
        "formats": ("fp8_block", "fp8", "bf16"),
    },
}
WORKLOAD = "azure-conversation-2023"
LIMITS = (("ttft", "p99", 2.0), ("tpot", "p99", 0.05))


def ask(name: str) -> dict[str, Any]:
    """Answer one question, in this process."""
    from hwmodels.mapping import Precision
    from planner import Question, search
    from planner.space import Choices
    from simulator.limits import Limit
    from simulator.workload import load_profile, synthesize

    case = QUESTIONS[name]
    result = search(
        Question(
            case["model"],
            case["hardware"],
            case["gpus"],
            synthesize(load_profile(WORKLOAD), case["requests"], case["rate_per_s"]),
            rate_per_s=case["rate_per_s"],
            limits=tuple(Limit(*limit) for limit in LIMITS),
            objective="goodput-per-gpu",
            choices=Choices(precisions=(Precision(*case.get("formats", ())),)),
        )
    )
    pool = result.best.plan.pools[0]
    cut = {"replicas": pool.replicas, "tp": pool.tp, "pp": pool.pp, "attention_dp": pool.attention_dp, "ep": pool.ep}
    return {
        "plans": result.considered,
        "simulated": result.simulated,
        "trials": result.trials,
        "untried": result.untried,
        "gap": round(result.gap, 4),
        "best": " ".join(f"{key}={value}" for key, value in cut.items() if value > 1),
        "value": round(result.best.value, 4),
        "unit": result.unit,
        "ties": sum(ranked.tie for ranked in result.ranked),
        "pruned": result.pruned,
    }


def timed(name: str) -> dict[str, Any]:
    """Answer one question in a new process."""
    before, start = os.times(), time.perf_counter()
    child = subprocess.run([sys.executable, __file__, "--ask", name], check=True, capture_output=True, text=True)
    wall_s, after = time.perf_counter() - start, os.times()
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return {"name": name, "wall_s": round(wall_s, 2), "cpu_s": round(cpu_s, 2), **json.loads(child.stdout)}


def screening() -> dict[str, float]:
    """Plans bounded per second, over mappings with and without attention groups, pipeline stages and experts."""
    import numpy as np

    from hwmodels.mapping import Precision
    from planner.bounds import Screen
    from planner.catalogue import law_broken, open_catalogue
    from planner.space import mappings, placement_broken
    from simulator.limits import Limit
    from simulator.workload import load_profile, synthesize

    requests = synthesize(load_profile(WORKLOAD), 10_000)
    limits = tuple(Limit(*limit) for limit in LIMITS)
    grid = np.array(list(product(range(1, 1025, 8), range(64, 8193, 64), (50_000.0, 500_000.0))))
    seqs, budgets, kv_tokens = grid[:, 0], grid[:, 1].astype(np.int64), grid[:, 2]
    screen = Screen(requests, limits)

    models = []
    start = time.perf_counter()
    for model, hardware, gpus, precision, most in (
        ("llama-3.1-70b", "h100-sxm", 16, Precision(), 8),
        ("deepseek-v3", "h200-sxm", 32, Precision("fp8_block", "fp8", "bf16"), 8),
    ):
        catalogue = open_catalogue(model, hardware, gpus, "vllm")
        legal = [
            mapping
            for mapping in mappings(catalogue.model, catalogue.cluster)
            if not law_broken(catalogue.model, mapping) and not placement_broken(mapping, catalogue.cluster)
        ]
        for mapping in legal[:: max(1, len(legal) // most)][:most]:
            models.append((catalogue.step_model(mapping, precision), mapping.attention_dp))
    compile_s = time.perf_counter() - start

    def bound_all() -> float:
        start = time.perf_counter()
        for model, groups in models:
            screen.work_s(model, groups, seqs, budgets, kv_tokens)
            screen.latency_s(model, groups, budgets)
        return time.perf_counter() - start

    first_s, again_s = bound_all(), min(bound_all() for _ in range(3))
    plans = len(models) * len(grid)
    return {
        "screened_plans": plans,
        "screened_mappings": len(models),
        "screen_plans_per_s": round(plans / again_s),
        "screen_first_plans_per_s": round(plans / first_s),
        "screen_compiled_plans_per_s": round(plans / (first_s + compile_s)),
        "compile_ms_per_mapping": round(compile_s / len(models) * 1e3, 1),
        "coefficients_ms_per_mapping": round((first_s - again_s) / len(models) * 1e3, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="speed of the plan search")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--question", choices=QUESTIONS, help="only this one")
    parser.add_argument("--ask", choices=QUESTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask is not None:
        print(json.dumps(ask(options.ask)))
        return
    names = [options.question] if options.question else list(QUESTIONS)
    result: dict[str, Any] = {"questions": [timed(name) for name in names], **screening()}
    if options.json:
        print(json.dumps(result))
        return
    for question in result.pop("questions"):
        print(question.pop("name"))
        for key, value in question.items():
            print(f"    {key:26} {value}")
    for key, value in result.items():
        print(f"{key:30} {value}")


if __name__ == "__main__":
    main()
