"""How long the sizing of pools takes and how far it closes: `python tests/benchmarks/pools.py [--most-kinds N]`.

Llama-3.1-70B under the Azure conversation traffic (TTFT p99 2 s, TPOT p99 100 ms) on three device types. Every legal
way of cutting a replica on one node, with several policies, token budgets, batch limits and KV formats, is an option in
each of four roles, its capacities from the step model. KV moves over network cards of 50 GB/s per device; between H100s
and A100s go 25 GB/s per device of the cluster.

For 32 and 64 devices and each goal: wall seconds to the first point and to five, the gap of the first, its value.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from hwmodels.mapping import Precision  # noqa: E402
from planner.capacities import capacities, option  # noqa: E402
from planner.catalogue import mapping_of, open_catalogue, precision_of  # noqa: E402
from planner.options import Budget, Demand, Option, Role  # noqa: E402
from planner.pools import by_key, size_pools  # noqa: E402
from planner.space import Choices, enumerate_pools  # noqa: E402
from simulator.limits import Limit  # noqa: E402
from simulator.workload import load_profile, synthesize  # noqa: E402

MODEL = "llama-3.1-70b"
LIMITS = (Limit("ttft", "p99", 2.0), Limit("tpot", "p99", 0.1))
#: Devices of each type in a cluster of 32 and of 64.
CLUSTERS = {32: {"h100-sxm": 16, "a100-80-sxm": 8, "l40s": 8}, 64: {"h100-sxm": 32, "a100-80-sxm": 16, "l40s": 16}}
ROLES: tuple[Role, ...] = ("aggregated", "prefill", "decode", "mixed")
CARD_BYTES_PER_S = 50e9
#: Requests that queues of prompts are followed for: enough for capacities of the right size.
FOLLOW = 400


def kinds_of(hardware: str) -> tuple[list[Option], float]:
    """Options on one device type, and the seconds their capacities took once the step models were compiled."""
    catalogue = open_catalogue(MODEL, hardware, 8, "vllm")
    requests = synthesize(load_profile("azure-conversation-2023"), 2000, rate_per_s=1.0)
    formats = (Precision(), Precision(kv="fp8")) if hardware != "a100-80-sxm" else (Precision(),)
    choices = Choices(formats, ("chunked", "prefill-first"), (1024, 2048, 4096, 8192), (32, 64, 128, 256, 512))
    pools = [pool for pool, _ in enumerate_pools(catalogue, choices, requests.max_context_tokens).pools]
    specs = [catalogue.replica(pool) for pool in pools]
    begun = time.perf_counter()
    found = capacities(specs, requests, LIMITS, follow=FOLLOW)
    taken = time.perf_counter() - begun
    options = []
    for pool, spec, capacity in zip(pools, specs, found, strict=True):
        kv, cut = precision_of(pool).kv, mapping_of(pool)
        name = f"{hardware} tp{cut.tp} pp{cut.pp} {pool.policy} {pool.token_budget} {pool.max_seqs} {kv}"
        for role in ROLES:
            options.append(
                option(
                    f"{role} {name}",
                    role,
                    hardware,
                    spec,
                    [capacity],
                    kv_bytes_per_token=catalogue.model.kv_bytes_per_token(kv),
                    kv_format=kv,
                    link_bytes_per_s=CARD_BYTES_PER_S * cut.gpus,
                )
            )
    return options, taken


def measured(options: list[Option], gpus: int, seconds: float, most_kinds: int | None) -> Iterator[dict[str, Any]]:
    """Each goal on a cluster; costs are asked for at 60 % of its highest rate."""
    devices = CLUSTERS[gpus]
    pairs = [("h100-sxm", "a100-80-sxm"), ("a100-80-sxm", "h100-sxm")]
    links = dict.fromkeys(pairs, CARD_BYTES_PER_S * gpus / 2)
    highest = 0.0
    for goal in ("rate", "cost", "gpus", "power"):
        budget = Budget(devices, link_bytes_per_s=links)
        demand = Demand() if goal == "rate" else Demand(rate_per_s=0.6 * highest)
        row: dict[str, Any] = {"gpus": gpus, "goal": goal}
        for keep in (5, 1):
            begun = time.perf_counter()
            sizing = size_pools(options, demand, budget, goal, keep=keep, seconds=seconds, most_kinds=most_kinds)
            row[f"seconds_{keep}"] = time.perf_counter() - begun
            row.setdefault("points", [point.value for point in sizing.points])
        best = sizing.best
        highest = best.value if goal == "rate" else highest
        row |= {
            "options": sizing.options,
            "kept": sizing.kept,
            "gap": best.gap,
            "value": best.value,
            "counts": dict(by_key(best)),
            "tight": [row.name for row in best.tight],
        }
        yield row


def main() -> None:
    """Print the table, or a line of JSON for each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--most-kinds", type=int, help="different kinds of replica in a point at most")
    parser.add_argument("--gpus", type=int, choices=CLUSTERS, action="append", help="cluster; both if left out")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    options: list[Option] = []
    capacity_s = 0.0
    for hardware in CLUSTERS[32]:
        some, seconds = kinds_of(hardware)
        options += some
        capacity_s += seconds
    print(f"{len(options)} options of {len(options) // len(ROLES)} kinds; capacities in {capacity_s:.1f} s", flush=True)
    for gpus in asked.gpus or CLUSTERS:
        for row in measured(options, gpus, asked.seconds, asked.most_kinds):
            if asked.json:
                print(json.dumps(row), flush=True)
                continue
            print(
                f"{gpus} devices {row['goal']:>5}: {row['value']:.4g}, gap {row['gap']:.3%}, kept {row['kept']}, "
                f"{row['seconds_1']:.2f} s; {len(row['points'])} points in {row['seconds_5']:.2f} s\n   ",
                ", ".join(f"{count} x {key}" for key, count in row["counts"].items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
