"""How fast flows start and end: `python tests/benchmarks/flows.py [--json] [--flows N]`.

Poisson starts of exponentially distributed sizes on 64 GPUs in eight nodes, joined by rails (hgx-h100) or by leaf
switches below a spine oversubscribed two to one (hgx-h100-ethernet); all times are CPU seconds of one process, the best
of three rounds, all calls of start and advance included and the first use of each path left out.

random   from a random GPU to a random other one
kv       of a 70B model from a random replica of TP 4 to a random other one: four pairs of GPUs as one flow

load     bytes/s over the capacity of the busiest link; `mean` is the mean over all links of that kind
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

from hwmodels.hardware import load_cluster  # noqa: E402
from hwmodels.huggingface import load_model  # noqa: E402
from hwmodels.interconnect import Interconnect  # noqa: E402
from hwmodels.mapping import Mapping  # noqa: E402
from simulator.flows import Flows  # noqa: E402
from simulator.transfers import KvSide, Routes  # noqa: E402

GPUS = 64
LOADS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
Crossing = tuple[tuple[int, ...], tuple[float, ...] | None, float]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Flows in order of their start: where, when, how many bytes; load_s: seconds of work of every link."""

    crossings: list[Crossing]
    starts_s: list[float]
    nbytes: list[float]
    loads: np.ndarray


def draw(network: Interconnect, kind: str, load: float, count: int) -> Traffic:
    """Random traffic that loads the busiest link to `load`."""
    rng = np.random.default_rng(0)
    ends = GPUS if kind == "random" else GPUS // 4
    source = rng.integers(ends, size=count)
    target = (source + rng.integers(1, ends, size=count)) % ends
    pairs = list(zip(source.tolist(), target.tolist(), strict=True))
    if kind == "random":
        known: dict[tuple[int, int], Crossing] = {(a, b): (network.way(a, b), None, 1.0) for a, b in set(pairs)}
    else:
        sides = [KvSide(tuple(range(4 * i, 4 * i + 4)), Mapping(tp=4)) for i in range(ends)]
        routes = Routes(network, load_model("llama-3.1-70b"), sides)
        found = {pair: routes.between(*pair) for pair in set(pairs)}
        known = {pair: (route.links, route.shares, route.weight) for pair, route in found.items()}
    nbytes = rng.exponential(1e9, size=count).tolist()
    work_s = np.zeros(len(network.bytes_per_s))
    for pair, size in zip(pairs, nbytes, strict=True):
        links, shares, _ = known[pair]
        work_s[list(links)] += size * np.array(shares or 1.0) / network.bytes_per_s[list(links)]
    span_s = float(work_s.max()) / load
    starts_s = (np.sort(rng.random(count)) * span_s).tolist()
    return Traffic([known[pair] for pair in pairs], starts_s, nbytes, work_s / span_s)


def serve(network: Interconnect, traffic: Traffic) -> tuple[float, float]:
    """Completions per CPU second, and the mean number of flows on their way at a start."""
    flows = Flows(network.bytes_per_s)
    for links, shares, weight in dict.fromkeys(traffic.crossings):
        flows.start(0.0, links, 0.0, shares=shares, weight=weight)
    flows.advance(0.0)
    ended = under_way = 0
    begin = time.process_time()
    for (links, shares, weight), at, nbytes in zip(traffic.crossings, traffic.starts_s, traffic.nbytes, strict=True):
        ended += len(flows.advance(at))
        flows.start(at, links, nbytes, shares=shares, weight=weight)
        under_way += len(flows)
    ended += len(flows.advance(float("inf")))
    return ended / (time.process_time() - begin), under_way / ended


def measure(count: int) -> list[dict[str, float | str]]:
    """A row for each fabric, kind of traffic and load."""
    rows: list[dict[str, float | str]] = []
    for hardware in ("hgx-h100", "hgx-h100-ethernet"):
        network = Interconnect([load_cluster(hardware, GPUS)])
        uplinks = [index for index, name in enumerate(network.names) if "uplink" in name]
        cards = [index for index, name in enumerate(network.names) if "nic" in name and "leaf" in name]
        for kind in ("random", "kv"):
            for load in LOADS:
                traffic = draw(network, kind, load, count)
                rounds = [serve(network, traffic) for _ in range(3)]
                rows.append(
                    {
                        "fabric": hardware,
                        "traffic": kind,
                        "load": load,
                        "mean_of_cards": round(float(traffic.loads[cards].mean()), 3),
                        "mean_of_uplinks": round(float(traffic.loads[uplinks].mean()), 3),
                        "flows_under_way": round(rounds[0][1], 1),
                        "completions_per_cpu_s": round(max(per_s for per_s, _ in rounds)),
                    }
                )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="speed of flows on shared links")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--flows", type=int, default=20_000, metavar="N")
    options = parser.parse_args()
    rows = measure(options.flows)
    if options.json:
        print(json.dumps(rows))
        return
    print("fabric             traffic  load  cards  uplinks  under way  completions per CPU second")
    for row in rows:
        print(
            f"{row['fabric']:18} {row['traffic']:7} {row['load']:5} {row['mean_of_cards']:6} {row['mean_of_uplinks']:8}"
            f" {row['flows_under_way']:10} {row['completions_per_cpu_s']:10,}"
        )


if __name__ == "__main__":
    main()
