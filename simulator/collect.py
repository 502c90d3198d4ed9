"""From the log of a run to its result: frames, and what the devices computed, moved and drew."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hwmodels.energy import power_w
from hwmodels.work import Steps
from simulator.deployment import Deployment
from simulator.encoding import Encoding
from simulator.log import Log
from simulator.result import (
    STEP_COLUMNS,
    Result,
    RunTotals,
    link_frame,
    request_frame,
    span_frame,
    step_frame,
    transfer_frame,
)
from simulator.reuse import CacheUse
from simulator.workload import Requests, Workload


def collect(deployment: Deployment, workload: Workload | Requests, log: Log, seed: int) -> Result:
    """The log as frames, with the totals of the run."""
    requests = workload if isinstance(workload, Requests) else workload.served
    count = len(requests)
    rejected = np.zeros(count, dtype=bool)
    rejected[log.rejected] = True
    preemptions = np.zeros(count, dtype=int)
    preemptions[list(log.preemptions)] = list(log.preemptions.values())
    cached_tokens = np.zeros(count, dtype=int)
    cached_tokens[list(log.cached_tokens)] = list(log.cached_tokens.values())
    finish_s = np.array(log.finish_s)
    frame = request_frame(
        arrival_s=log.arrival_s,
        first_schedule_s=log.first_schedule_s,
        first_token_s=log.first_token_s,
        finish_s=finish_s,
        prompt_tokens=requests.prompt_tokens,
        output_tokens=requests.output_tokens,
        rejected=rejected,
        replica=log.replica,
        lane=log.lane,
        preemptions=preemptions,
        cached_tokens=cached_tokens,
        class_codes=requests.slo_class,
        class_names=requests.class_names,
    )
    served = finish_s[~rejected]
    makespan_s = float(served.max() - np.min(log.arrival_s)) if len(served) else 0.0
    table = None if log.segments is None else np.frombuffer(log.segments, dtype=float).reshape(-1, len(STEP_COLUMNS))
    flops, moved, energy_j = _consumption(deployment, table, makespan_s, log.encoding)
    encode = deployment.encode
    if log.encoding is not None:
        more_flops, more_bytes, more_j = log.encoding.consumption(deployment)
        flops, moved, energy_j = flops + more_flops, moved + more_bytes, energy_j + more_j
    devices = [(spec.device, spec.mapping.gpus) for spec in deployment.replicas]
    peak_flops_per_s = sum(
        spec.mapping.gpus * spec.device.peak_flops_per_s[spec.arithmetic_dtype] for spec in deployment.replicas
    )
    if encode is not None and encode.device is not None:
        devices.append((encode.device, encode.workers))
        peak_flops_per_s += encode.workers * encode.device.peak_flops_per_s[encode.arithmetic_dtype]
        energy_j += encode.workers * encode.device.idle_w * makespan_s
    prices = [device.price_usd_per_h for device, _ in devices]
    price = None
    if all(value is not None for value in prices):
        price = sum(gpus * (device.price_usd_per_h or 0.0) for device, gpus in devices)
    totals = RunTotals(
        gpus=deployment.gpus,
        replicas=len(deployment.replicas),
        makespan_s=makespan_s,
        model_flops=flops,
        hbm_bytes=moved,
        energy_j=energy_j,
        price_usd_per_h=price,
        peak_flops_per_s=peak_flops_per_s,
        memory_bytes_per_s=sum(device.memory_bytes_per_s * gpus for device, gpus in devices),
        lanes=tuple(spec.lanes for spec in deployment.replicas),
        kv_blocks=tuple(spec.kv_blocks for spec in deployment.replicas),
        seed=seed,
        events=log.events,
        requeued=len(log.requeued),
        lost_kv_blocks=log.lost_kv_blocks,
        role_switches=log.role_switches,
        roles=tuple(spec.role for spec in deployment.replicas),
    )
    steps = None if table is None else step_frame(table)
    spans = None if table is None else span_frame(log.last_spans(requests.output_tokens))
    handover = deployment.handover
    links = link_frame(handover.names, handover.bytes_per_s, log.carried_bytes) if handover else link_frame([], [], [])
    caching = None
    if log.looked_up is not None:
        loaded, tiers = sum(log.loaded_tokens.values()), deployment.tiers
        caching = CacheUse(
            prompt_tokens=int(requests.prompt_tokens[sorted(log.looked_up)].sum()),
            found_tokens=sum(log.cached_tokens.values()) - loaded,
            loaded_tokens=loaded,
            loads=len(log.loads_s),
            load_mean_s=float(np.mean(log.loads_s)) if log.loads_s else float("nan"),
            stored_bytes=log.stored_bytes,
            loaded_bytes=log.loaded_bytes,
            links=tuple(zip(tiers.names, tiers.bytes_per_s, log.tier_bytes.tolist(), strict=True)) if tiers else (),
        )
    use = log.encoding.use(makespan_s) if log.encoding is not None else None
    return Result(frame, steps, spans, totals, transfer_frame(log.transfers), links, use, caching)


def _consumption(
    deployment: Deployment, table: NDArray[np.float64] | None, makespan_s: float, encoding: Encoding | None
) -> tuple[float, float, float]:
    """FLOPs, bytes and joules of the run; NaN where the steps were not recorded."""
    nan = float("nan")
    if table is None or any(spec.work is None for spec in deployment.replicas):
        return nan, nan, nan
    columns = {name: table[:, position] for position, name in enumerate(STEP_COLUMNS)}
    flops = moved = joules = 0.0
    for index, spec in enumerate(deployment.replicas):
        mine = columns["replica"] == index
        device, mapping, work = spec.device, spec.mapping, spec.work
        assert work is not None
        names = ("decode_sequences", "decode_context_tokens", "prefill_tokens", "prefill_pairs", "prefill_sequences")
        steps = Steps(columns["steps"][mine], *(columns[name][mine] for name in names))
        step_flops, step_bytes = work.of(steps)
        # A lane keeps its tensor- and context-parallel ranks busy, in a pipeline those of one stage after the other.
        ranks = mapping.tp * mapping.cp
        busy_s = (columns["end_s"] - columns["start_s"])[mine]
        if encoding is not None:
            busy_s -= encoding.before_s(index, columns["prefill_sequences"][mine] > 0)
        on_s = np.maximum(busy_s, 1e-12) * ranks
        compute = step_flops / (on_s * device.peak_flops_per_s[spec.arithmetic_dtype])
        memory = step_bytes / (on_s * device.memory_bytes_per_s)
        power = power_w(device, np.minimum(compute, 1.0), np.minimum(memory, 1.0)) - device.idle_w
        flops += float(step_flops.sum())
        moved += float(step_bytes.sum())
        joules += float((power * busy_s).sum()) * ranks + device.idle_w * mapping.gpus * makespan_s
    return flops, moved, joules
