"""What of a replica's experts is on its devices, what in host memory, and does either have the room?

Every device has its even part of its node's cores, memory and disks, as if all devices at hand held a replica. Host
memory keeps a copy of every expert in every format, so that what a device drops is not written back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hwmodels.errors import OutOfMemoryError
from hwmodels.expertoffload import Host, expert_bytes, expert_layers
from hwmodels.hardware import Cluster, Device, device_names, load_device
from hwmodels.mapping import Mapping, Precision
from hwmodels.memory import GIB, Sizes
from hwmodels.shape import ModelShape
from hwmodels.step_model import stage_layers
from hwmodels.yamlfiles import is_path, unknown_name
from planner.errors import PlanError
from planner.plan import Pool

#: The processor of a node where a pool names none.
HOST = "xeon-8592"
#: Experts a device has room for beside those it keeps: one that is computed while the next arrives.
BUFFERS = 2


@dataclass(frozen=True, slots=True)
class Away:
    """How the experts of a replica are served that its devices do not hold; see planner.plan.Pool for the fields."""

    cache: float
    ladder: tuple[str, ...] | None = None
    threads: int = 0
    host: str = HOST
    ssd_bytes_per_s: float | None = None


def away_of(pool: Pool, ssd_gb_per_s: float | None = None) -> Away | None:
    """What the pool says of it; None where its devices hold all experts and nobody else computes any.

    ssd_gb_per_s   of the disks of a node, Plan.ssd_gb_per_s
    """
    if pool.expert_cache is None or (pool.expert_cache == 1 and not pool.cpu_threads and not pool.expert_ladder):
        return None
    ssd = None if ssd_gb_per_s is None else 1e9 * ssd_gb_per_s
    return Away(pool.expert_cache, pool.expert_ladder, pool.cpu_threads, pool.host or HOST, ssd)


def formats(precision: Precision, away: Away) -> tuple[str, ...]:
    """Weight formats of the experts, the best first."""
    return away.ladder or (precision.of_experts.weights,)


def devices_of_a_node(cluster: Cluster) -> int:
    """Devices at hand that a node's host is divided among."""
    return min(cluster.gpus, cluster.gpus_per_node)


def away_broken(
    model: ModelShape, cluster: Cluster, mapping: Mapping, precision: Precision, away: Away
) -> tuple[str, str] | None:
    """The law that the replica breaks, in a few words, and what is expected; None if it can be served like this."""
    if not model.is_moe:
        return "expert_cache needs experts", f"{model.name} has none; expected expert_cache None"
    if mapping.ep > 1 or mapping.token_groups > 1:
        return (
            "experts stay with the tensor-parallel ranks where a part of them is away",
            f"ep={mapping.ep} attention_dp={mapping.attention_dp} cp={mapping.cp} with expert_cache; expected all 1 "
            "(experts that are spread over ranks are all on devices)",
        )
    node = devices_of_a_node(cluster)
    if mapping.tp > node:
        return (
            "ranks that share an expert share a host",
            f"tp={mapping.tp} with expert_cache; expected at most the {node} devices of a node",
        )
    if away.ladder is not None and away.ladder[0] != precision.of_experts.weights:
        return (
            "the ladder starts with the experts' format",
            f"expert_ladder starts with {away.ladder[0]}; expected {precision.of_experts.weights}, the experts' format",
        )
    cores = processor(away).compute_units
    if away.threads * node > cores:
        return (
            "the host has the cores",
            f"cpu_threads is {away.threads} for each of {node} devices of a node; expected at most {cores // node}, "
            f"{away.host} has {cores} cores",
        )
    return None


def processor(away: Away) -> Device:
    """The node's; raises PlanError for a device that is none, ProfileError for an unknown one."""
    known = device_names()
    if away.host not in known and not is_path(away.host):
        raise unknown_name("processor", away.host, (name for name in known if load_device(name).kind == "cpu"))
    device = load_device(away.host)
    if device.kind != "cpu":
        raise PlanError(f"host is {away.host!r}, expected the profile of a processor such as {HOST}, not a device")
    return device


def host_of(cluster: Cluster, mapping: Mapping, away: Away) -> Host:
    """What the ranks that share an expert have of their node; memory and disks for each of them.

    A pipeline's stages hold different layers, so that a rank's part of the memory is for one stage: pp times as much
    for all layers.
    """
    device, node = processor(away), devices_of_a_node(cluster)
    ssd = None if away.ssd_bytes_per_s is None else away.ssd_bytes_per_s / node
    part = replace(device, memory_bytes_per_s=device.memory_bytes_per_s * mapping.tp / node)
    return Host(
        part,
        away.threads * mapping.tp,
        memory_bytes=device.memory_bytes * mapping.pp / node,
        ssd_bytes_per_s=ssd,
    )


def require_host(model: ModelShape, cluster: Cluster, mapping: Mapping, precision: Precision, away: Away) -> None:
    """Raise OutOfMemoryError where the experts fit neither the host's memory nor, with disks, these."""
    layers = expert_layers(model)
    each = sum(expert_bytes(model, name) for name in formats(precision, away))
    needed = len(layers) * layers[0].feed_forward.experts * each * devices_of_a_node(cluster) / mapping.gpus
    device = processor(away)
    if away.ssd_bytes_per_s is None and needed > device.memory_bytes:
        raise OutOfMemoryError(
            f"host memory of {away.host}: {needed / GIB:.0f} GiB of experts for the {devices_of_a_node(cluster)} "
            f"device(s) of a node, and it has {device.memory_bytes / GIB:.0f}; expected a host with more, one format, "
            "fewer devices at hand, or disks (ssd_gb_per_s)"
        )


def resident(sizes: Sizes, model: ModelShape, mapping: Mapping, precision: Precision, away: Away) -> Sizes:
    """The sizes of a replica of which a part of the experts is away: the cache in the best format, and buffers."""
    each = expert_bytes(model, formats(precision, away)[0]) / mapping.tp
    stages = []
    for (weights, per_token), layers in zip(sizes.stages, stage_layers(model, mapping), strict=True):
        all_of_them = each * sum(layer.feed_forward.experts or 0 for layer in layers)
        left = (1 - away.cache) * all_of_them
        stages.append((weights - left + min(left, BUFFERS * each), per_token))
    return replace(sizes, stages=tuple(stages))
