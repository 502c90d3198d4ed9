"""Devices and the clusters they are built into: profile files in human units, dataclasses in SI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hwmodels.efficiency import ESTIMATES, Calibration
from hwmodels.efficiency import Efficiency as Efficiency
from hwmodels.efficiencyfile import CalibrationFile, EfficiencyFile, Fraction, Positive, Text
from hwmodels.errors import ProfileError
from hwmodels.yamlfiles import PROFILES, is_path, named, read_mapping, unknown_name, validated

DEVICES = PROFILES / "hardware"
CLUSTERS = PROFILES / "clusters"

#: Largest cluster that is built; the graph of this many devices still takes seconds.
MAX_GPUS = 16384

Dtype = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4", "fp4"]
Kind = Literal["gpu", "tpu", "npu", "cpu"]


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator as an engine sees it.

    peak_flops_per_s   dense peak of each number format it multiplies in
    memory_bytes       what the driver reports, before any engine has started
    compute_units      units that work on output tiles side by side (SMs, CUs, matrix engines, cores)
    kernel_launch_s    time between two dependent kernels in a captured graph
    price_usd_per_h    rent of one device; None where there is no market
    default_cluster    cluster profile the device is usually built into
    calibration        by operator family, what the coefficients of `efficiency.kernels` were fitted to
    """

    name: str
    vendor: str
    kind: Kind
    peak_flops_per_s: Mapping[str, float] = field(hash=False)
    memory_bytes: float
    memory_bytes_per_s: float
    compute_units: int
    kernel_launch_s: float
    tdp_w: float
    idle_w: float
    price_usd_per_h: float | None
    default_cluster: str
    source: str
    efficiency: Efficiency = ESTIMATES
    calibration: Mapping[str, Calibration] = field(default_factory=dict, hash=False)

    def calibrated(self, family: str) -> bool:
        """Whether coefficients of the operator family (a name of hwmodels.efficiency.CALIBRATED) were fitted."""
        return bool(getattr(self.efficiency.kernels, family, None))

    def of_engine(self, engine: str | Mapping[str, str]) -> Device:
        """The device with the coefficients of an engine's own kernels where it has some; as Efficiency.of_engine."""
        efficiency = self.efficiency.of_engine(engine)
        return self if efficiency is self.efficiency else replace(self, efficiency=efficiency)


@dataclass(frozen=True, slots=True)
class Fabric:
    """Links that join devices inside a node, or nodes.

    name                 what people call the link
    kind                 inside: 'switch' (every device to a crossbar), 'mesh' (a link per pair), 'pcie' (host bridges),
                         'torus' (2-D grid of neighbours); between: 'rails' (a leaf switch per device position),
                         'ethernet' (a leaf switch per node)
    bytes_per_s          per device and direction, over all its links; between nodes: of its network card
    latency_s            one step of a collective: signal, wait, and the way
    efficiency           fraction of bytes_per_s that large messages reach
    in_switch_reduction  the switch adds and multicasts (NVLink SHARP)
    reduction_efficiency fraction of bytes_per_s reached when it does
    bridge_bytes_per_s   'pcie' only: between the two host bridges, per direction
    oversubscription     between nodes: leaf ports down over ports up, >= 1
    """

    name: str
    kind: Literal["switch", "mesh", "pcie", "torus", "rails", "ethernet"]
    bytes_per_s: float
    latency_s: float
    efficiency: float
    in_switch_reduction: bool = False
    reduction_efficiency: float = 0.69
    bridge_bytes_per_s: float | None = None
    oversubscription: float = 1.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """`gpus` devices in nodes of `gpus_per_node` (the last may be partial); device r is in node r // gpus_per_node.

    intra              links inside a node; None for nodes of one device
    inter              links between nodes; None where nodes cannot be joined
    host_bytes_per_s   between a device and its host's memory, per direction
    """

    name: str
    device: Device
    gpus: int
    gpus_per_node: int
    intra: Fabric | None
    inter: Fabric | None
    host_bytes_per_s: float

    @property
    def nodes(self) -> int:
        """Nodes in use."""
        return -(-self.gpus // self.gpus_per_node)


Count = Annotated[int, Field(gt=0, le=MAX_GPUS, strict=True)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _DeviceFile(_File):
    """Schema of profiles/hardware; units are in the keys, TFLOP/s (or TOP/s) are dense."""

    name: Text
    vendor: Text
    kind: Kind
    source: Text
    cluster: Text
    peak_tflops: dict[Dtype, Positive] = Field(min_length=1)
    memory_gib: Positive
    memory_gb_per_s: Positive
    compute_units: Count
    kernel_launch_us: Positive
    tdp_w: Positive
    idle_w: Positive
    price_usd_per_h: Positive | None = None
    efficiency: EfficiencyFile = EfficiencyFile()
    calibration: dict[Text, CalibrationFile] = {}

    @model_validator(mode="after")
    def _idle_below_tdp(self) -> Self:
        if self.idle_w > self.tdp_w:
            raise ValueError(f"idle_w {self.idle_w} is above tdp_w {self.tdp_w}")
        return self

    def device(self) -> Device:
        """In SI."""
        return Device(
            name=self.name,
            vendor=self.vendor,
            kind=self.kind,
            peak_flops_per_s={dtype: tflops * 1e12 for dtype, tflops in self.peak_tflops.items()},
            memory_bytes=self.memory_gib * 2**30,
            memory_bytes_per_s=self.memory_gb_per_s * 1e9,
            compute_units=self.compute_units,
            kernel_launch_s=self.kernel_launch_us * 1e-6,
            tdp_w=self.tdp_w,
            idle_w=self.idle_w,
            price_usd_per_h=self.price_usd_per_h,
            default_cluster=self.cluster,
            source=self.source,
            efficiency=self.efficiency.efficiency(),
            calibration={family: file.calibration() for family, file in self.calibration.items()},
        )


class _IntraFile(_File):
    name: Text
    kind: Literal["switch", "mesh", "pcie", "torus"]
    gb_per_s: Positive
    latency_us: Positive
    efficiency: Fraction
    in_switch_reduction: bool = False
    reduction_efficiency: Fraction = 0.69
    bridge_gb_per_s: Positive | None = None

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if (self.bridge_gb_per_s is None) == (self.kind == "pcie"):
            raise ValueError("bridge_gb_per_s belongs to kind 'pcie', and only there")
        if self.in_switch_reduction and self.kind != "switch":
            raise ValueError("in_switch_reduction needs kind 'switch'")
        return self

    def fabric(self) -> Fabric:
        """In SI."""
        return Fabric(
            name=self.name,
            kind=self.kind,
            bytes_per_s=self.gb_per_s * 1e9,
            latency_s=self.latency_us * 1e-6,
            efficiency=self.efficiency,
            in_switch_reduction=self.in_switch_reduction,
            reduction_efficiency=self.reduction_efficiency,
            bridge_bytes_per_s=None if self.bridge_gb_per_s is None else self.bridge_gb_per_s * 1e9,
        )


class _InterFile(_File):
    name: Text
    kind: Literal["rails", "ethernet"]
    gb_per_s: Positive
    latency_us: Positive
    efficiency: Fraction
    oversubscription: Annotated[float, Field(ge=1, allow_inf_nan=False, strict=True)] = 1.0

    def fabric(self) -> Fabric:
        """In SI."""
        return Fabric(
            name=self.name,
            kind=self.kind,
            bytes_per_s=self.gb_per_s * 1e9,
            latency_s=self.latency_us * 1e-6,
            efficiency=self.efficiency,
            oversubscription=self.oversubscription,
        )


class _ClusterFile(_File):
    """Schema of profiles/clusters; GB/s are per device and direction."""

    name: Text
    source: Text
    device: Text
    gpus_per_node: Count
    host_gb_per_s: Positive
    intra: _IntraFile | None = None
    inter: _InterFile | None = None

    @model_validator(mode="after")
    def _joined(self) -> Self:
        if self.intra is None and self.gpus_per_node > 1:
            raise ValueError(f"intra is missing: {self.gpus_per_node} devices of a node must be joined")
        if self.intra is not None and self.intra.kind == "torus" and self.inter is not None:
            raise ValueError("a torus is one node: leave inter out and set gpus_per_node to its chips")
        return self

    def cluster(self, device: Device, gpus: int) -> Cluster:
        """Of `gpus` devices, in SI."""
        return Cluster(
            name=self.name,
            device=device,
            gpus=gpus,
            gpus_per_node=self.gpus_per_node,
            intra=None if self.intra is None else self.intra.fabric(),
            inter=None if self.inter is None else self.inter.fabric(),
            host_bytes_per_s=self.host_gb_per_s * 1e9,
        )


def device_names() -> list[str]:
    """Names of the shipped devices."""
    return sorted(path.stem for path in DEVICES.glob("*.yaml"))


def cluster_names() -> list[str]:
    """Names of the shipped clusters."""
    return sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


@lru_cache(maxsize=256)
def _shipped_device(name: str) -> Device:
    path = named("device", name, DEVICES)
    return validated(_DeviceFile, read_mapping(path), path).device()


@lru_cache(maxsize=256)
def _shipped_cluster(name: str) -> _ClusterFile:
    path = named("cluster", name, CLUSTERS)
    return validated(_ClusterFile, read_mapping(path), path)


def load_device(name: str) -> Device:
    """The shipped device called `name`, or that of the YAML file at the path `name`.

    Raises ProfileError for an unknown name (the nearest ones are offered) or an invalid file.
    """
    if is_path(name):
        return validated(_DeviceFile, read_mapping(Path(name)), Path(name)).device()
    return _shipped_device(name)


def load_cluster(hardware: str, gpus: int) -> Cluster:
    """`gpus` devices as `hardware` joins them.

    hardware   a device name (its default cluster is taken), a cluster name, or the path of a device or cluster file

    Raises ProfileError for an unknown name, an invalid file, or a number of devices the cluster cannot have.
    """
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise ProfileError(f"gpus = {gpus!r}: expected a whole number of at least 1")
    if gpus > MAX_GPUS:
        raise ProfileError(f"gpus = {gpus}: expected at most {MAX_GPUS}; plan a part of the cluster")
    file, device = _cluster_file(hardware)
    if file.inter is None and gpus > file.gpus_per_node:
        raise ProfileError(
            f"gpus = {gpus}: {file.name} joins at most {file.gpus_per_node}; "
            "take fewer, or a cluster with links between nodes"
        )
    return file.cluster(device, gpus)


def _cluster_file(hardware: str) -> tuple[_ClusterFile, Device]:
    """The cluster profile that `hardware` means, and the device in it."""
    if is_path(hardware):
        data = read_mapping(Path(hardware))
        if "device" in data:
            file = validated(_ClusterFile, data, Path(hardware))
            return file, load_device(file.device)
        device = load_device(hardware)
        return _shipped_cluster(device.default_cluster), device
    if hardware in cluster_names():
        file = _shipped_cluster(hardware)
        return file, load_device(file.device)
    if hardware not in device_names():
        raise unknown_name("hardware", hardware, {*device_names(), *cluster_names()})
    device = load_device(hardware)
    return _shipped_cluster(device.default_cluster), device
