"""How much of Mooncake's conversation trace need not be computed, and how fast is that found out?

    python tests/benchmarks/prefixes.py [TRACE] [--replicas 4 8] [--repeat 3] [--tiers]

Llama-3.1-70B, bf16, every replica on 8 H100 (TP 8, 8,192-token chunks), with its KV pool and one without limit. For
each router and eviction policy: block hit rate, TTFT, and simulated requests per CPU second (median of repetitions).

With --tiers, under the router prefix-aware and LRU: device memory alone, host memory below it, and disks below that,
which one node of 8 devices reads and writes at SSD_GB_PER_S; also the mean time of a load and the TB that left the
devices and came back.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from planner.catalogue import open_catalogue  # noqa: E402
from planner.plan import Plan, Pool  # noqa: E402
from simulator.blockhashes import infinite_cache_hit_rate  # noqa: E402
from simulator.deployment import Deployment  # noqa: E402
from simulator.routers import ROUTERS  # noqa: E402
from simulator.simulate import run  # noqa: E402
from simulator.traces import read_trace  # noqa: E402
from simulator.workload import Requests  # noqa: E402

TRACE = ROOT.parent / "shared/reference/traces/mooncake_conversation_trace.jsonl.gz"
UNLIMITED = 10**8
#: Assumed: four PCIe 5 drives of about 6.5 GB/s each way.
SSD_GB_PER_S = 26.0
#: GB of KV of one replica in host memory and on disks.
TIERS = ((None, None), (250.0, None), (1000.0, None), (4000.0, None), (None, 8000.0), (1000.0, 8000.0))
CASES = (
    ("round-robin", "off"),
    ("round-robin", "lru"),
    ("least-tokens", "off"),
    ("least-tokens", "lru"),
    ("prefix-aware", "lru"),
    ("prefix-aware", "lfu"),
    ("prefix-aware", "fifo"),
    ("prefix-aware", "length-aware"),
)


def deployment(replicas: int, host: float | None = None, ssd: float | None = None, *, kept: bool = False) -> Deployment:
    """What is simulated.

    host, ssd   GB of a replica's KV there
    kept        whether prefixes are kept and looked for by the router
    """
    pool = Pool(replicas=replicas, tp=8, policy="chunked", max_seqs=256, token_budget=8192, max_context_tokens=131072)
    plan = Plan("llama-3.1-70b", "h100-sxm", pool.gpus, (pool,))
    if kept:
        pool = replace(pool, prefix_caching="lru", host_kv_gb=host, ssd_kv_gb=ssd)
        plan = replace(plan, pools=(pool,), router="prefix-aware", ssd_gb_per_s=SSD_GB_PER_S)
    return open_catalogue(plan.model, plan.hardware, plan.gpus, plan.engine).deployment(plan)


def line(target: Deployment, requests: Requests, repeat: int) -> str:
    """The figures of one deployment."""
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        log = run(target, requests)
        seconds.append(time.process_time() - start)
    hashes = requests.block_hashes
    assert hashes is not None
    found = sum(log.cached_tokens.values()) / hashes.block_tokens / len(hashes.ids)
    ttft_s = np.array(log.first_token_s) - log.arrival_s
    p50, p90, p99 = np.nanpercentile(ttft_s, [50, 90, 99])
    return (
        f"{found:6.1%}  {np.nanmean(ttft_s):6.3f} {p50:6.3f} {p90:6.3f} {p99:6.3f}  "
        f"{len(requests) / statistics.median(seconds):9,.0f}"
    )


def show_tiers(requests: Requests, counts: list[int], repeat: int) -> None:
    """The figures of every set of tiers."""
    print("replicas  host GB   SSD GB    hits  TTFT s    p50    p90    p99  requests/CPU s  load ms  TB down  TB up")
    for count in counts:
        for host, ssd in TIERS:
            target = deployment(count, host, ssd, kept=True)
            told = line(target, requests, repeat)
            log = run(target, requests)
            load_ms = 1e3 * float(np.mean(log.loads_s)) if log.loads_s else float("nan")
            moved = f"{load_ms:7.1f}  {log.stored_bytes / 1e12:7.2f}  {log.loaded_bytes / 1e12:5.2f}"
            print(f"{count:8}  {host or 0:7,.0f}  {ssd or 0:7,.0f}  {told:49}  {moved}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="prefix caching on a trace with block hashes")
    parser.add_argument("trace", nargs="?", default=str(TRACE))
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tiers", action="store_true", help="memories below the devices' instead")
    options = parser.parse_args()
    requests = read_trace(options.trace)
    assert requests.block_hashes is not None, "the trace has no block hashes"
    print(f"{len(requests):,} requests, {infinite_cache_hit_rate(requests.block_hashes):.1%} of blocks seen before")
    if options.tiers:
        show_tiers(requests, options.replicas, options.repeat)
        return
    print("replicas      pool  router        eviction         hits  TTFT s    p50    p90    p99  requests/CPU s")
    for count in options.replicas:
        plain = deployment(count)
        own = plain.replicas[0].kv_blocks
        for blocks in (own, UNLIMITED):
            for router, eviction in CASES if blocks == own else (("round-robin", "lru"), ("prefix-aware", "lru")):
                specs = [
                    replace(spec, kv_blocks=blocks, scheduler=replace(spec.scheduler, prefix_caching=eviction))
                    for spec in plain.replicas
                ]
                target = replace(plain, replicas=specs, router=ROUTERS[router])
                pool = f"{blocks:9,}" if blocks == own else "unlimited"
                print(f"{count:8}  {pool}  {router:12}  {eviction:12}  {line(target, requests, options.repeat)}")


if __name__ == "__main__":
    main()
