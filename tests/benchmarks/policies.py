"""How fast is the engine under every policy and order: `python tests/benchmarks/policies.py [--json]`.

Llama-3.1-70B, TP 4 on H100, prompts of 1,024 and answers of 256 tokens in the mean, 4 requests a second, best of two.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np

from planner.catalogue import open_catalogue
from planner.plan import Pool
from simulator.deployment import Deployment
from simulator.simulate import run
from simulator.workload import Requests

REQUESTS, RATE_PER_S = 30_000, 4.0
WHOLE = {"token_budget": 16384}
POOLS: dict[str, dict[str, Any]] = {
    "chunked": {},
    "chunked, chunk 1024": {"chunk_tokens": 1024},
    "orca": {"policy": "orca", **WHOLE},
    "prefill-first": {"policy": "prefill-first", **WHOLE},
    "layered": {"policy": "layered", **WHOLE},
    "chunked, shortest first": {"order": "shortest", "ageing_tokens_per_s": 100.0},
    "chunked, deadlines": {"order": "deadline", "deadlines_s": (2.0,)},
    "chunked, priorities": {"order": "priority"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    catalogue = open_catalogue("llama-3.1-70b", "h100-sxm", 4, "vllm")
    rng = np.random.default_rng(0)
    prompts, outputs = rng.geometric(1 / 1024, REQUESTS).clip(1, 8000), rng.geometric(1 / 256, REQUESTS).clip(1, 4000)
    arrivals = np.cumsum(rng.exponential(1 / RATE_PER_S, REQUESTS))
    classes = rng.integers(0, 2, REQUESTS).astype(np.int16)
    requests = Requests(arrivals, prompts, outputs, classes, ("urgent", "patient"))
    found = {}
    for name, fields in POOLS.items():
        spec = catalogue.replica(replace(Pool(1, tp=4, max_seqs=256, token_budget=8192), **fields))
        times = []
        for _ in range(2):
            started = time.process_time()
            log = run(Deployment([spec]), requests)
            times.append(time.process_time() - started)
        found[name] = {"requests_per_cpu_s": REQUESTS / min(times), "events_per_request": log.events / REQUESTS}
    if asked.json:
        print(json.dumps(found))
        return
    for name, row in found.items():
        print(f"{name:28}{row['requests_per_cpu_s']:10,.0f} requests/CPU s{row['events_per_request']:8.2f} events each")


if __name__ == "__main__":
    main()
