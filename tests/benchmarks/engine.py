"""How fast the event engine is: `python tests/benchmarks/engine.py [--json] [--requests N] [--skip-million]`.

Llama-3.1-70B on 4 H100 (TP 4, chunked prefill) under Poisson arrivals at 70 % of the rate it can serve; prompts and
outputs lognormal with means of 1024 and 256 tokens. All times are CPU seconds of one process, medians of three rounds;
ratios are medians of those within a round, so that a machine whose speed drifts changes them little.

requests_per_cpu_s            simulate() with record=False, frame of requests included
requests_per_cpu_s_recorded   the same with the step log
ratio_to_oracle               CPU time per request of the step-by-step oracle, on a prefix of the same requests, over
                              that of the engine on all of them; ratio_on_prefix has both on the prefix
peak_mb, flatness             in a process of its own: memory after a run of a million requests, and its CPU time per
                              request over that of 10,000
step_lookup_us                StepModel.step_s for decode-only steps and for steps that also prefill two prompts
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

from planner.catalogue import open_catalogue  # noqa: E402
from planner.plan import Plan, Pool  # noqa: E402
from simulator.deployment import Deployment  # noqa: E402
from simulator.simulate import run, simulate  # noqa: E402
from simulator.workload import Independent, Lognormal, Poisson, Requests, draw_requests  # noqa: E402

LOAD = 0.7
POOL = Pool(replicas=1, tp=4, policy="chunked", max_seqs=256, token_budget=2048, max_context_tokens=32768)
LENGTHS = Independent(
    prompt_tokens=Lognormal(mean=1024, sigma=0.8, max=16384), output_tokens=Lognormal(mean=256, sigma=0.8, max=8192)
)


def deployment() -> Deployment:
    """What is simulated."""
    plan = Plan("llama-3.1-70b", "h100-sxm", POOL.gpus, (POOL,))
    return open_catalogue(plan.model, plan.hardware, plan.gpus, plan.engine).deployment(plan)


def requests(count: int, rate_per_s: float) -> Requests:
    """The traffic; more requests extend fewer."""
    return draw_requests(np.random.default_rng(0), count, rate_per_s, Poisson(), LENGTHS)


def saturation_per_s(target: Deployment) -> float:
    """Requests per second that leave when far more arrive."""
    crowd = requests(20_000, 1e4)
    log = run(target, crowd)
    return len(crowd) / float(np.max(log.finish_s))


def cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of the call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def load_oracle() -> Any:
    """tests/simulator/oracle.py as a module."""
    spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests" / "simulator" / "oracle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["oracle"] = module
    spec.loader.exec_module(module)
    return module


def oracle_of(target: Deployment) -> Callable[[Requests], Any]:
    """The step-by-step oracle of the deployment's replica."""
    oracle = load_oracle()
    spec = target.replicas[0]
    config = oracle.OracleConfig(
        POOL.policy, POOL.max_seqs, POOL.token_budget, POOL.block_tokens, POOL.max_context_tokens, spec.kv_blocks
    )

    def serve(some: Requests) -> Any:
        columns = (column.tolist() for column in (some.arrival_s, some.prompt_tokens, some.output_tokens))
        return oracle.run_oracle(config, spec.model.step_s, *columns)

    return serve


def lookup_us(target: Deployment) -> dict[str, float]:
    """Mean microseconds of one step-time look-up, an empty loop's time taken off."""
    step_s = target.replicas[0].model.step_s
    count = 200_000
    rng = np.random.default_rng(0)
    decodes = rng.integers(1, 200, count).tolist()
    contexts = [n * 1000 for n in decodes]
    prompts = [[(int(new), int(before)), (1 + int(new) // 2, 0)] for new, before in rng.integers(1, 900, (count, 2))]

    def timed(items: list[list[tuple[int, int]]]) -> float:
        start = time.process_time()
        for n, context, chunks in zip(decodes, contexts, items, strict=True):
            step_s(n, context, chunks)
        called = time.process_time()
        for _ in zip(decodes, contexts, items, strict=True):
            pass
        return ((called - start) - (time.process_time() - called)) / count * 1e6

    nothing: list[list[tuple[int, int]]] = [[]] * count
    return {
        "decode": round(statistics.median(timed(nothing) for _ in range(3)), 3),
        "mixed": round(statistics.median(timed(prompts) for _ in range(3)), 3),
    }


def million(rate_per_s: float) -> dict[str, float]:
    """The long run against a short one; called in a process of its own."""
    target = deployment()
    few, many = requests(10_000, rate_per_s), requests(1_000_000, rate_per_s)

    def shorts() -> list[float]:
        return [cpu_s(lambda: simulate(target, few, record=False)) / len(few) for _ in range(10)]

    before = shorts()
    long = cpu_s(lambda: simulate(target, many, record=False)) / len(many)
    short = statistics.median(before + shorts())
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {
        "peak_mb": round(peak_kb * 1024 / 1e6, 1),
        "flatness": round(long / short, 3),
        "million_requests_per_cpu_s": round(1 / long),
    }


def measure(count: int, *, with_million: bool) -> dict[str, Any]:
    """Everything the benchmark reports."""
    target = deployment()
    most_per_s = saturation_per_s(target)
    rate_per_s = LOAD * most_per_s
    some = requests(count, rate_per_s)
    prefix = some.head(min(count, 4_000))
    serve = oracle_of(target)
    rounds = [
        (
            cpu_s(lambda: serve(prefix)) / len(prefix),
            cpu_s(lambda: simulate(target, some, record=False)) / count,
            cpu_s(lambda: simulate(target, prefix, record=False)) / len(prefix),
            cpu_s(lambda: simulate(target, some, record=True)) / count,
        )
        for _ in range(3)
    ]
    by_step, bare, _, recorded = (statistics.median(column) for column in zip(*rounds, strict=True))
    near = replace(target, frontend_s=0.0)  # the oracle knows no way to the scheduler
    difference = np.abs(serve(prefix)["finish_s"] / np.array(run(near, prefix).finish_s) - 1)
    log = run(target, some)
    result: dict[str, Any] = {
        "requests_per_cpu_s": round(1 / bare),
        "requests_per_cpu_s_recorded": round(1 / recorded),
        "ratio_to_oracle": round(statistics.median(oracle / engine for oracle, engine, _, _ in rounds), 2),
        "ratio_on_prefix": round(statistics.median(oracle / engine for oracle, _, engine, _ in rounds), 2),
        "oracle_requests": len(prefix),
        "oracle_requests_per_cpu_s": round(1 / by_step),
        "oracle_difference": float(difference.max()),
        "requests": count,
        "events_per_request": round(log.events / count, 3),
        "step_lookup_us": lookup_us(target),
        "saturation_per_s": round(most_per_s, 4),
        "rate_per_s": round(rate_per_s, 4),
    }
    if with_million:
        child = [sys.executable, __file__, "--million-at", repr(rate_per_s)]
        result |= json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="speed of the event engine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--requests", type=int, default=100_000, metavar="N")
    parser.add_argument("--skip-million", action="store_true", help="leave out peak_mb and flatness")
    parser.add_argument("--million-at", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.million_at is not None:
        print(json.dumps(million(options.million_at)))
        return
    result = measure(options.requests, with_million=not options.skip_million)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:30} {value}")


if __name__ == "__main__":
    main()
