"""How fast replicas with two phases at once are simulated: `python tests/benchmarks/shares.py [--json] [--requests N]`.

Llama-3-8B on one A100 under Poisson arrivals of 8 requests/s (lognormal lengths, means 300 and 200 tokens), host work
as in the profile sglang. CPU seconds of one process, medians of three rounds, record=False; step models are compiled
before. For every policy: simulated requests per CPU second, and scheduling events per request.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

from hwmodels.shares import compile_shared_steps  # noqa: E402
from planner.catalogue import mapping_of, open_catalogue, precision_of  # noqa: E402
from planner.plan import Pool  # noqa: E402
from simulator.deployment import Deployment, ReplicaSpec  # noqa: E402
from simulator.shared import SharedSpec  # noqa: E402
from simulator.shares import Nexus, SemiPD, Shares, Static  # noqa: E402
from simulator.simulate import run  # noqa: E402
from simulator.workload import Independent, Lognormal, Poisson, draw_requests  # noqa: E402

POOL = Pool(1, max_seqs=256, token_budget=8192)
RATE_PER_S = 8.0
LENGTHS = Independent(Lognormal(mean=300, sigma=1.2, max=8000), Lognormal(mean=200, sigma=0.8, max=2000))


def specs() -> dict[str, ReplicaSpec]:
    """What is compared."""
    catalogue = open_catalogue("llama-3-8b", "a100-80-sxm", 1, "sglang")
    one, mapping = catalogue.replica(POOL), mapping_of(POOL)
    steps = compile_shared_steps(
        catalogue.model, mapping, precision_of(POOL), catalogue.engine, catalogue.prices(mapping), catalogue.cluster,
        max_tokens=POOL.token_budget, max_seqs=POOL.max_seqs,
    )  # fmt: skip
    policies = {
        "static 50/50": (Static(Shares(0.5, 0.5)), None),
        "static 80/100": (Static(Shares(0.8, 1.0)), None),
        "semi-pd": (SemiPD(1.0, 0.025), None),
        "nexus": (Nexus(), 15.0),
    }
    shared = {
        name: SharedSpec(
            model=one.model, mapping=mapping, scheduler=one.scheduler, kv_blocks=one.kv_blocks, device=one.device,
            steps=steps, policy=policy, ageing=ageing,
        )
        for name, (policy, ageing) in policies.items()
    }  # fmt: skip
    return {"chunked, not shared": one, **shared}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="speed of replicas with two phases at once")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--requests", type=int, default=50_000, metavar="N")
    options = parser.parse_args()
    some = draw_requests(np.random.default_rng(0), options.requests, RATE_PER_S, Poisson(), LENGTHS)
    result = {}
    for name, spec in specs().items():
        deployment = Deployment([spec])
        run(deployment, some.head(1000))
        rates = []
        for _ in range(3):
            start = time.process_time()
            log = run(deployment, some)
            rates.append(len(some) / (time.process_time() - start))
        result[name] = {
            "requests_per_cpu_s": round(statistics.median(rates)),
            "events_per_request": round(log.events / len(some), 3),
        }
    if options.json:
        print(json.dumps(result))
        return
    for name, row in result.items():
        print(f"{name:22} {row['requests_per_cpu_s']:>9} requests per CPU s {row['events_per_request']:>7} events each")


if __name__ == "__main__":
    main()
