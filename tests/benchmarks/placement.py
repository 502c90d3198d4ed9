"""How good are placements at DeepSeek-V3 size, and how sure is that: `python tests/benchmarks/placement.py [--json]`.

58 layers x 256 experts on 32 GPUs (4 nodes of 8), expert counts of ../shared/reference/moe_routing, with 32 spare slots
per layer and without. Three tables:

load         busiest GPU / mean, averaged over layers, of contiguous, random, greedy, EPLB and this project's placement
objective    both terms with assumed transitions: bound, gaps, wall, CPU and peak memory, each in its own process
robustness   placement made from one recording (row) judged on the others (column), and one made against the worst

Costs: 88 MFLOP per expert choice (three matrices of 7168 x 2048) at 600 TFLOP/s, 7168 bytes of hidden state in FP8,
450 GB/s NVLink and 50 GB/s network per GPU and direction, 32 x 128 tokens x 8 choices per step.
Transitions: `none` independent; `ranks` half of the choices go from popular to popular experts (with_transitions);
`topics` half of them stay in one of 16 topics, of equal shares and with experts drawn at random.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

from hwmodels.huggingface import load_model  # noqa: E402
from hwmodels.routing import RoutingStats  # noqa: E402
from hwmodels.routingfiles import read_routing  # noqa: E402
from planner.placement import Problem, objective_of, rank_shares, solve, split_of  # noqa: E402
from planner.placementminimax import minimax  # noqa: E402
from simulator.routingdraws import with_transitions  # noqa: E402

FOLDER = ROOT.parent / "shared" / "reference" / "moe_routing"
GPUS, NODE = 32, 8
BASELINES = ("contiguous", "random", "greedy", "eplb")


def recordings() -> dict[str, RoutingStats]:
    """Every DeepSeek recording."""
    model = load_model("deepseek-v3")
    return {path.name.removesuffix(".json.gz"): read_routing(path, model) for path in sorted(FOLDER.glob("*.json.gz"))}


def problem_of(loads: np.ndarray[Any, Any], transitions: Any, replicas: int) -> Problem:
    """The problem of the costs above."""
    node = np.arange(GPUS) // NODE
    return Problem(
        loads, transitions, GPUS, -(-(loads.shape[1] + replicas) // GPUS), replicas,
        seconds_per_token=88e6 / 600e12, seconds_per_byte=np.where(node[:, None] == node, 1 / 450e9, 1 / 50e9),
        bytes_per_token=7168, tokens=GPUS * 128 * 8, nodes=node.tolist(),
    )  # fmt: skip


def transitions_of(stats: RoutingStats, kind: str) -> Any:
    """Assumed transitions, see the module."""
    if kind == "none":
        return with_transitions(stats, 0.0).transitions
    if kind == "ranks":
        return with_transitions(stats, 0.5).transitions
    rng, topics = np.random.default_rng(0), 16
    shares = stats.shares
    topic = np.empty(shares.shape, dtype=int)
    sums = np.zeros((len(shares), topics))
    for layer, row in enumerate(shares):
        for expert in rng.permutation(len(row)).tolist():
            topic[layer, expert] = sums[layer].argmin()
            sums[layer, topic[layer, expert]] += row[expert]
    out = []
    for k, there in enumerate(shares[1:]):
        inside = np.where(topic[k][:, None] == topic[k + 1], there / sums[k + 1, topic[k + 1]], 0.0)
        out.append(0.5 * inside + 0.5 * there)
    return np.array(out)


def busiest(problem: Problem, holds: Any) -> float:
    """Busiest GPU / mean, averaged over layers."""
    return float(rank_shares(problem, split_of(problem, holds)).max(axis=1).mean() * GPUS)


def load_table(stats: dict[str, RoutingStats]) -> list[dict[str, Any]]:
    """Baselines and ours by load alone."""
    rows = []
    for name, one in stats.items():
        for replicas in (0, GPUS):
            problem = problem_of(one.loads, None, replicas)
            row: dict[str, Any] = {"recording": name, "replicas": replicas}
            for solver in BASELINES:
                row[solver] = busiest(problem, solve(problem, solver=solver).holds)
            start = time.perf_counter()
            found = solve(problem, solver="large")
            row |= {"large": busiest(problem, found.holds), "wall_s": time.perf_counter() - start}
            row["bound"] = found.load_bound / problem.compute_s * GPUS / problem.layers
            rows.append(row)
    return rows


def objective_row(one: RoutingStats, kind: str, replicas: int, seconds: float, into: Any) -> None:
    """One case in a process of its own, for its memory."""
    problem = problem_of(one.loads, transitions_of(one, kind), replicas)
    base = {solver: objective_of(problem, solve(problem, solver=solver).holds) for solver in BASELINES}
    cpu = time.process_time()
    found = solve(problem, solver="large", seconds=seconds)
    into.put(
        {
            "transitions": kind,
            "replicas": replicas,
            "objective_us": found.objective * 1e6,
            "load_us": found.load_term * 1e6,
            "traffic_us": found.traffic_term * 1e6,
            "bound_us": found.bound * 1e6,
            "load_gap": found.load_gap,
            "gap": found.gap,
            "wall_s": found.wall_s,
            "cpu_s": time.process_time() - cpu,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            **{f"{solver}_us": cost.objective * 1e6 for solver, cost in base.items()},
        }
    )


def objective_table(one: RoutingStats, seconds: float) -> list[dict[str, Any]]:
    """Every kind of transitions, with and without replicas."""
    rows = []
    context = multiprocessing.get_context("spawn")
    for kind in ("none", "ranks", "topics"):
        for replicas in (0, GPUS):
            queue = context.Queue()
            case = context.Process(target=objective_row, args=(one, kind, replicas, seconds, queue))
            case.start()
            rows.append(queue.get())
            case.join()
    return rows


def robustness(stats: dict[str, RoutingStats]) -> list[dict[str, Any]]:
    """With 32 replicas: placements by one recording, by the mean of all, and against the worst, on every recording."""
    problems = {name: problem_of(one.loads, None, GPUS) for name, one in stats.items()}
    mean = problem_of(np.mean([one.shares for one in stats.values()], axis=0), None, GPUS)
    made = {name: solve(problem, solver="large").holds for name, problem in problems.items()}
    made["mean of all"] = solve(mean, solver="large").holds
    made["minimax"], _, _ = minimax(list(problems.values()))
    made["eplb, mean of all"] = solve(mean, solver="eplb").holds
    rows = []
    for name, holds in made.items():
        row: dict[str, Any] = {"made from": name}
        row |= {judged: busiest(problem, holds) for judged, problem in problems.items()}
        row["worst"] = max(row[judged] for judged in problems)
        rows.append(row)
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A plain table."""
    print(f"\n{title}")
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    names = list(rows[0])
    widths = [max(len(line[k]) for line in [names, *cells]) for k in range(len(names))]
    for line in [names, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of each solve")
    parser.add_argument("--recording", default="prefill_in1024", help="whose loads the table of objectives takes")
    parser.add_argument("--only", choices=("load", "objective", "robustness"))
    options = parser.parse_args()
    stats = recordings()
    if not stats:
        sys.exit(f"no recordings in {FOLDER}")
    tables = {
        "load": lambda: load_table(stats),
        "objective": lambda: objective_table(stats[options.recording], options.seconds),
        "robustness": lambda: robustness(stats),
    }
    done = {}
    for name, table in tables.items():
        if options.only in (None, name):
            done[name] = table()
            if not options.json:
                show(name, done[name])
    if options.json:
        json.dump(done, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
