"""How exact and how fast is the expected busiest rank: `python tests/benchmarks/routing.py [--json] [--steps N]`.

Against N sampled steps (10,000): tokens of the busiest rank and experts touched on the rank that has most, DeepSeek-V3
(EP 8 to 64) and Mixtral-8x7B (EP 2 to 8), experts in their order, 16 to 32768 tokens, for --layers layers each (3) of
recorded counts where ../shared/reference/moe_routing is there, of made-up ones of the same skew elsewhere, and of
uniform routing. Then CPU seconds of a plan's table (all layers, all token counts), and for uniform routing the
difference to the estimate of hwmodels.operators.

And in seconds: the routed experts of DeepSeek-V3 on 32 H200 (EP32, all 58 layers, every token's choices drawn, each
layer as slow as its slowest rank) against the same kernels in the step model, which takes the expected busiest rank of
the mean layer, and against the table priced layer by layer; for experts in their order and with 32 copies more (EPLB).
N steps of every size in SECONDS_TOKENS, up to two CPU minutes each per 10,000; --no-seconds leaves them out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

from hwmodels.busiest import busiest_rank  # noqa: E402
from hwmodels.engine import load_engine  # noqa: E402
from hwmodels.hardware import load_cluster  # noqa: E402
from hwmodels.huggingface import load_model  # noqa: E402
from hwmodels.mapping import Mapping, Precision  # noqa: E402
from hwmodels.operators import (  # noqa: E402
    Experts,
    busiest_rank_experts,
    busiest_rank_rows,
    expected_active_experts,
)
from hwmodels.roofline import AnalyticCost  # noqa: E402
from hwmodels.routedcost import RoutedCost  # noqa: E402
from hwmodels.routing import RoutingStats, rank_shares, uniform  # noqa: E402
from hwmodels.routingfiles import read_routing  # noqa: E402
from hwmodels.step_model import shared_operators  # noqa: E402
from planner.placement import Problem, solve  # noqa: E402
from simulator.choicedraws import Chooser, draw_counts  # noqa: E402
from simulator.routingdraws import synthesize  # noqa: E402
from simulator.sampledsteps import sampled_experts_s  # noqa: E402

FOLDER = ROOT.parent / "shared/reference/moe_routing"
TOKENS = (16, 64, 256, 1024, 4096, 32768)
SECONDS_TOKENS = (256, 1024, 4096, 32768)
CASES = (
    ("deepseek-v3", "decode_in2000out100.json.gz", 0.7, (8, 16, 32, 64)),
    ("mixtral-8x7b", "mixtral_8x7b_original__expert_popularity_college_medicine.json", 0.2, (2, 4, 8)),
)


def recorded(name: str, file: str, skew: float) -> RoutingStats:
    """The counts of the file, or made-up ones."""
    if (FOLDER / file).is_file():
        return read_routing(FOLDER / file, load_model(name))
    even = uniform(load_model(name))
    made = synthesize(np.random.default_rng(0), len(even.layers), even.experts, even.top_k, skew, 1, 0.0)
    return replace(even, loads=made.loads, source=made.source)


def blocks(experts: int, ranks: int) -> np.ndarray:
    return rank_shares(np.ones(experts), [[e * ranks // experts] for e in range(experts)], ranks)


def errors(stats: RoutingStats, rows: list[int], ranks: tuple[int, ...], steps: int) -> list[dict[str, float]]:
    """Worst relative differences over the layers `rows`, for each token count and number of ranks."""
    rng, out = np.random.default_rng(0), []
    some = replace(stats, layers=tuple(stats.layers[i] for i in rows), loads=stats.loads[rows], transitions=None)
    for tokens in TOKENS:
        counts = [draw_counts(rng, Chooser.of(inclusion), tokens, steps) for inclusion in some.inclusion]
        for ep in ranks:
            shares = blocks(stats.experts, ep)
            table = busiest_rank(some, shares, (tokens, 2 * tokens))
            busiest = np.array([(c @ shares.T).max(axis=1) for c in counts])
            touched = np.array([((c > 0) @ shares.T).max(axis=1).mean() for c in counts])
            worst = np.abs(table.rows[:, 0] / busiest.mean(axis=1) - 1).argmax()
            out.append({
                "tokens": tokens, "ep": ep, "sampled": float(busiest[worst].mean()),
                "rows_error": float(table.rows[worst, 0] / busiest[worst].mean() - 1),
                "standard_error": float(busiest[worst].std() / busiest[worst].mean() / steps**0.5),
                "p99_error": float(table.quantiles[worst, 0, -2] / np.quantile(busiest[worst], 0.99) - 1),
                "touched_error": float(max(table.touched[:, 0] / touched - 1, key=abs)),
            })  # fmt: skip
    return out


def today(name: str, ranks: tuple[int, ...]) -> list[dict[str, float]]:
    """The step model's estimate for uniform routing over the table's."""
    even, out = uniform(load_model(name)), []
    even = replace(even, layers=even.layers[:1], loads=even.loads[:1])
    at = np.asarray(TOKENS, dtype=np.float64)
    for ep in ranks:
        table, here = busiest_rank(even, blocks(even.experts, ep), TOKENS), even.experts / ep
        rows = busiest_rank_rows(at * even.top_k / ep, ep)
        touched = expected_active_experts(here, rows, even.experts, even.top_k, at)
        touched = np.minimum(busiest_rank_experts(touched, here, ep), rows)
        for column, tokens in enumerate(TOKENS):
            out.append({
                "ep": ep, "tokens": tokens, "rows": float(rows[column] / table.rows[0, column] - 1),
                "touched": float(touched[column] / table.touched[0, column] - 1),
            })  # fmt: skip
    return out


def table_s(stats: RoutingStats, ep: int) -> float:
    """CPU seconds of a whole table, least of three."""
    shares, times = blocks(stats.experts, ep), []
    for _ in range(3):
        start = time.process_time()
        busiest_rank(stats, shares)
        times.append(time.process_time() - start)
    return min(times)


def seconds(
    stats: RoutingStats,
    steps: int,
    placements: tuple[str, ...] = ("contiguous", "eplb"),
    sizes: tuple[int, ...] = SECONDS_TOKENS,
) -> list[dict[str, float | str]]:
    """The step model's routed experts over drawn ones, for each placement and token count."""
    model, gpus, copies = load_model("deepseek-v3"), 32, 32
    cluster = load_cluster("h200-sxm", gpus)
    cluster = replace(cluster, device=cluster.device.of_engine(load_engine("vllm").kernels))
    mapping, rng = Mapping(attention_dp=gpus, ep=gpus), np.random.default_rng(0)
    problem = Problem(stats.loads, None, gpus, (stats.experts + copies) // gpus, copies)
    cost, out = AnalyticCost(cluster, mapping), []
    for name in placements:
        shares = solve(problem, solver=name).split.transpose(0, 2, 1)
        table = busiest_rank(stats, shares)
        for tokens in sizes:
            batch = np.array([float(tokens)])
            found = shared_operators(model, model.layers, batch, mapping, Precision("fp8_block", "fp8"))
            (op,) = (one for one in found if isinstance(one, Experts))
            rows, touched = table.at(tokens)
            each = replace(op, rows=rows, active=np.minimum(touched, rows), count=1)
            start = time.process_time()
            drawn = sampled_experts_s(rng, stats, shares, cost, op, tokens, steps)
            out.append({
                "placement": name, "tokens": tokens, "sampled_s": float(drawn.mean()),
                "standard_error": float(drawn.std() / drawn.mean() / steps**0.5),
                "error": float(RoutedCost(cost, table).time_s(op)[0] / drawn.mean() - 1),
                "layer_by_layer_error": float(cost.time_s(each).sum() / drawn.mean() - 1),
                "cpu_s": time.process_time() - start,
            })  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--no-seconds", action="store_true")
    arguments = parser.parse_args()
    report: dict[str, dict] = {}
    for name, file, skew, ranks in CASES:
        stats = recorded(name, file, skew)
        rows = np.linspace(0, len(stats.layers) - 1, arguments.layers).astype(int).tolist()
        report[name] = {
            "source": stats.source,
            "errors": errors(stats, rows, ranks, arguments.steps),
            "uniform_errors": errors(uniform(load_model(name)), rows[:1], ranks, arguments.steps),
            "table_cpu_s": {ep: table_s(stats, ep) for ep in ranks},
            "step_model_over_table": today(name, ranks),
        }
    if not arguments.no_seconds:
        report["deepseek-v3"]["seconds"] = seconds(recorded(*CASES[0][:3]), arguments.steps)
    if arguments.json:
        print(json.dumps(report))
        return
    for name, part in report.items():
        print(f"{name}, {part['source']}")
        for kind in ("errors", "uniform_errors"):
            for line in part[kind]:
                print(
                    f"  {kind[:-7] or 'recorded':9} EP{line['ep']:<3}{line['tokens']:6} tokens: {line['sampled']:8.1f} "
                    f"sampled, rows {line['rows_error']:+.2%} (se {line['standard_error']:.2%}), "
                    f"p99 {line['p99_error']:+.1%}, touched {line['touched_error']:+.2%}"
                )
            print(f"  worst: rows {max(abs(x['rows_error']) for x in part[kind]):.2%}")
        for ep, cpu_s in part["table_cpu_s"].items():
            print(f"  table of EP{ep}: {cpu_s:.3f} CPU s")
        for line in part["step_model_over_table"]:
            print(f"  step model, EP{line['ep']:<3}{line['tokens']:6} tokens: rows {line['rows']:+.1%}, "
                  f"touched {line['touched']:+.1%}")  # fmt: skip
        for line in part.get("seconds", ()):
            print(f"  seconds, {line['placement']:10}{line['tokens']:6} tokens: {line['sampled_s'] * 1e3:.2f} ms "
                  f"sampled (se {line['standard_error']:.3%}), step model {line['error']:+.2%}, layer by layer "
                  f"{line['layer_by_layer_error']:+.2%}; {line['cpu_s']:.0f} CPU s")  # fmt: skip


if __name__ == "__main__":
    main()
