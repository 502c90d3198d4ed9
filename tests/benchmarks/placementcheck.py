"""Do lower objectives make simulated steps shorter: `python tests/benchmarks/placementcheck.py [--json]`.

DeepSeek-V3 on 32 H200 (fp8_block experts, EP32, attention on every GPU) and Mixtral-8x7B on 8 and on 4 H100 (bf16),
routed as recorded in ../shared/reference/moe_routing, or, where that is not there, as made up with the same skew; with
copies and without. Placements: contiguous, random (three draws), greedy, EPLB and, with groups that stay on a node,
EPLB-8, and this project's `large`. The same requests under each (planner.placementcheck): mean step, TTFT, TPOT and
seconds of the run beside the objective, seconds saved against contiguous beside those that the load term predicts, the
rank correlation, and what steps of several sizes save.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

from hwmodels.mapping import Precision  # noqa: E402
from hwmodels.routing import RoutingStats, uniform  # noqa: E402
from hwmodels.routingfiles import read_routing  # noqa: E402
from hwmodels.shape import ModelShape  # noqa: E402
from planner.catalogue import open_catalogue  # noqa: E402
from planner.placement import solve  # noqa: E402
from planner.placementcheck import checked_by_simulation, savings  # noqa: E402
from planner.placementcosts import problem_of  # noqa: E402
from simulator.routingdraws import synthesize  # noqa: E402

FOLDER = ROOT.parent / "shared/reference/moe_routing"
DEEPSEEK, MIXTRAL = (
    ("decode_in2000out100.json.gz", 0.8),
    ("mixtral_8x7b_original__expert_popularity_college_medicine.json", 0.2),
)
#: Model, device, GPUs, formats, recording and skew, copies.
CASES = (
    ("deepseek-v3", "h200-sxm", 32, Precision("fp8_block", "fp8"), DEEPSEEK, 0),
    ("deepseek-v3", "h200-sxm", 32, Precision("fp8_block", "fp8"), DEEPSEEK, 32),
    ("mixtral-8x7b", "h100-sxm", 8, Precision(), MIXTRAL, 8),
    ("mixtral-8x7b", "h100-sxm", 4, Precision(), MIXTRAL, 0),
    ("mixtral-8x7b", "h100-sxm", 4, Precision(), MIXTRAL, 4),
)


def routing_of(model: ModelShape, file: str, skew: float) -> RoutingStats:
    """The counts of the file, or made-up ones."""
    if (FOLDER / file).is_file():
        return read_routing(FOLDER / file, model)
    even = uniform(model)
    made = synthesize(np.random.default_rng(0), len(even.layers), even.experts, even.top_k, skew, 1, 0.0)
    return replace(even, loads=made.loads, source=made.source)


def checked(
    name: str, hardware: str, gpus: int, formats: Precision, recording: tuple[str, float], copies: int, seconds: float
) -> dict[str, Any]:
    """One case."""
    catalogue = open_catalogue(name, hardware, gpus, "vllm")
    stats = routing_of(catalogue.model, *recording)
    slots = (stats.experts + copies) // gpus
    problem = problem_of(stats, catalogue.model, catalogue.cluster, formats, slots, copies, 128 * gpus)
    placements = {"contiguous": solve(problem, solver="contiguous")}
    placements |= {f"random {seed}": solve(problem, solver="random", seed=seed) for seed in range(3)}
    placements |= {solver: solve(problem, solver=solver) for solver in ("greedy", "eplb")}
    if stats.experts % 8 == 0 and gpus > 8:
        placements["eplb-8"] = solve(problem, solver="eplb", groups=8)
    placements["large"] = solve(problem, solver="large", seconds=seconds)
    start = time.process_time()
    checks = checked_by_simulation(catalogue, stats, problem, placements, formats)
    saved = savings(catalogue, stats, problem, placements["contiguous"], placements["large"], formats)
    return {
        "case": f"{name} on {gpus} {hardware}, {slots} slots, {copies} copies, {stats.source}",
        "traffic": [asdict(check) for check in checks],
        "savings": [asdict(saving) for saving in saved],
        "cpu_s": time.process_time() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the solver `large`")
    arguments = parser.parse_args()
    report = [checked(*case, arguments.seconds) for case in CASES]
    if arguments.json:
        print(json.dumps(report))
        return
    for case in report:
        print(f"{case['case']}; {case['cpu_s']:.1f} CPU s")
        for check in case["traffic"]:
            print(f"  {check['traffic']}: {check['requests']:,} requests, {check['tokens']:,} tokens, "
                  f"{check['steps']:.0f} steps; rank correlation {check['rank_correlation']:.3f}")  # fmt: skip
            for run in check["runs"]:
                part = f"{run['saved_s'] / run['predicted_s']:.0%} of" if run["predicted_s"] else "of"
                print(f"    {run['placement']:10} objective {run['objective_s'] * 1e3:6.2f} ms: step "
                      f"{run['mean_step_s'] * 1e3:7.2f} ms, TTFT {run['mean_ttft_s']:.3f} s, TPOT "
                      f"{run['mean_tpot_s'] * 1e3:6.2f} ms, run {run['makespan_s']:.3f} s, saved "
                      f"{run['saved_s']:+.3f} s, {part} {run['predicted_s']:+.3f} s")  # fmt: skip
        for one in case["savings"]:
            part = f"{one['experts_s'] / one['predicted_s']:.0%}" if one["predicted_s"] else "-"
            print(f"  large, {one['tokens']:6} tokens a step: predicted {one['predicted_s'] * 1e3:8.3f} ms, "
                  f"kernels {one['experts_s'] * 1e3:8.3f} ms ({part}), with exchange "
                  f"{one['step_s'] * 1e3:8.3f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
