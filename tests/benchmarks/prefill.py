"""How long do programs of prefill scheduling take, how near do policies come? `python tests/benchmarks/prefill.py`.

Linear program of n prompts x n steps (proxy objective, z relaxed, and with binary z) on both axes: seconds to build and
to solve. Decisions of a receding horizon: milliseconds each. Policies on a dense model and a mixture of experts on
one H100: mean TTFT, p99 gap, and the gap to the bound at their own longest gap.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from planner.catalogue import open_catalogue  # noqa: E402
from planner.plan import Pool  # noqa: E402
from planner.prefill import best_possible, clock_of  # noqa: E402
from planner.prefillcosts import LinearStep, Piece  # noqa: E402
from planner.prefillhorizon import Axis, Horizon, Pending  # noqa: E402
from planner.prefilllinear import Ranges, linearise, minorant  # noqa: E402
from planner.prefillnext import Receding, next_step  # noqa: E402
from planner.prefillpolicies import layered, orca, prefill_first, sarathi, sarathi_serve, shortest_first  # noqa: E402
from planner.prefillprogram import Program  # noqa: E402
from planner.prefillsteps import Running, follow, window_of  # noqa: E402

EXPERTS = LinearStep((Piece(0.02, 1e-6, 2e-5, 0.004), Piece(0.0, 4e-5, 4e-5)), 1e-9, 1e-9, 0.001, 0.001, 32)
AXES: tuple[Axis, ...] = ("tokens", "layers")
RUNNING = tuple((1000, 500) for _ in range(30))


def programs(sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Programs of n prompts of 100 to 4000 tokens over n steps beside 30 decodes."""
    for n in sizes:
        prompts = tuple(Pending(int(x)) for x in np.random.default_rng(0).integers(100, 4000, n))
        for axis in AXES:
            horizon = Horizon(EXPERTS, prompts, n, RUNNING, axis, 0.2, 4096, finish=False)
            for relaxed in (True, False):
                begun = time.perf_counter()
                program = Program(horizon, "proxy", 0.05, relaxed=relaxed)
                built = time.perf_counter()
                found = program.solve(10.0, 1e-3)
                ended = time.perf_counter()
                yield {
                    "prompts": n,
                    "axis": axis,
                    "program": "LP" if relaxed else "MILP",
                    "build_s": built - begun,
                    "solve_s": ended - built,
                    "gap": None if found is None else found.gap,
                }


def decisions(steps: int, count: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of next_step for 12 prompts, with the last decision to start from."""
    rng = np.random.default_rng(1)
    for axis, relaxed in product(AXES, (True, False)):
        taken, fell, last = [], 0, None
        options: dict[str, Any] = {"tbt_s": 0.08, "axis": axis, "steps": steps, "seconds": 0.2, "relaxed": relaxed}
        for _ in range(count):
            waiting = {i: Pending(int(n)) for i, n in enumerate(rng.integers(100, 6000, 12))}
            begun = time.perf_counter()
            last = next_step(waiting, RUNNING, EXPERTS, last=last, **options)
            taken.append(1e3 * (time.perf_counter() - begun))
            fell += last.source == "fallback"
        yield {
            "axis": axis,
            "program": "LP" if relaxed else "MILP",
            "horizon": steps,
            "median_ms": float(np.median(taken)),
            "worst_ms": max(taken),
            "fell_back": fell,
        }


def policies(model: str, rate_per_s: float, tbt_s: float, n: int) -> Iterator[dict[str, Any]]:
    """Prompts of 500 to 8000 tokens, 50 to 250 outputs."""
    clock, _ = clock_of(open_catalogue(model, "h100-sxm", 8, "vllm"), Pool(1), 9000)
    linear = linearise(clock, Ranges(decodes=(4, 32)))
    yield {"model": model, "linear model": str(linear)}
    rng = np.random.default_rng(0)
    at = np.cumsum(rng.exponential(1 / rate_per_s, n)).tolist()
    prompts, outputs = rng.integers(500, 8000, n).tolist(), rng.integers(50, 250, n).tolist()
    window = window_of(at, prompts, outputs, [Running(3000, 200)] * 12)
    tried = {f"budget {c}": sarathi_serve(c) for c in (512, 1024, 2048)} | {"sarathi 512": sarathi(512)}
    tried |= {f"shortest {c}": shortest_first(c) for c in (512, 1024, 2048)}
    tried |= {"layered": layered(), "orca": orca(), "prefill first": prefill_first()}
    for axis, relaxed in product(AXES, (True, False)):
        name = f"receding {'LP' if relaxed else 'MILP'}, {axis}"
        tried[name] = Receding(linear.step, tbt_s, axis=axis, relaxed=relaxed)
    schedules = [follow(window, policy, clock, name) for name, policy in tried.items()]
    best = best_possible(window, minorant(clock.model, clock.layers), schedules, tbt_s)
    yield {"model": model, "bound_s": best.bound.ttft_s, "at_tbt_s": tbt_s}
    for s in best.standings:
        yield {
            "model": model,
            "policy": s.name,
            "ttft_s": s.ttft_s,
            "p99_tbt_s": s.tbt_s,
            "keeps": s.keeps,
            "gap": s.gap,
        }


def main() -> None:
    """Print a line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--decisions", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=100, help="of the traffic that policies are compared on")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()

    def rows() -> Iterator[dict[str, Any]]:
        yield from programs(asked.sizes)
        if asked.decisions:
            yield from decisions(8, asked.decisions)
        if asked.prompts:
            for model in ("qwen3-8b", "qwen3-30b-a3b"):
                yield from policies(model, 1.5, 0.05, asked.prompts)

    for row in rows():
        if asked.json:
            print(json.dumps(row), flush=True)
        else:
            print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
