"""Which label picks the Kubernetes nodes that carry a device?

GPU feature discovery (NVIDIA/k8s-device-plugin, docs/gpu-feature-discovery/README.md) labels nodes with
nvidia.com/gpu.product, the device name of the driver with dashes for spaces. Devices without a known name, and two
kinds of nodes with the same device, are told apart by a label the operator puts on.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from hwmodels.errors import ProfileError
from hwmodels.hardware import load_cluster
from planner.plan import Plan

PRODUCT, OWN = "nvidia.com/gpu.product", "shardwise/device"

#: Driver's names of shipped devices, as manifests in public repositories spell the label.
_PRODUCTS = {
    "a10": "NVIDIA-A10",
    "a100-40-sxm": "NVIDIA-A100-SXM4-40GB",
    "a100-80-pcie": "NVIDIA-A100-80GB-PCIe",
    "a100-80-sxm": "NVIDIA-A100-SXM4-80GB",
    "b200-sxm": "NVIDIA-B200",
    "b300-sxm": "NVIDIA-B300-SXM6-AC",
    "gb200": "NVIDIA-GB200",
    "gb300": "NVIDIA-GB300",
    "h100-pcie": "NVIDIA-H100-PCIe",
    "h100-sxm": "NVIDIA-H100-80GB-HBM3",
    "h20": "NVIDIA-H20",
    "h200-sxm": "NVIDIA-H200",
    "l4": "NVIDIA-L4",
    "l40s": "NVIDIA-L40S",
    "rtx-4090": "NVIDIA-GeForce-RTX-4090",
    "rtx-a6000": "NVIDIA-RTX-A6000",
    "rtx-pro-6000": "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition",
}


def node_selectors(plan: Plan, notes: list[str]) -> dict[str, dict[str, str]]:
    """A nodeSelector for each hardware that pools are on, empty where they all are on the same."""
    used = sorted({plan.hardware_of(pool) for pool in plan.pools})
    if len(used) == 1:
        return {used[0]: {}}
    products = {name: _PRODUCTS.get(_device(name)) for name in used}
    count = Counter(products.values())
    selectors, own = {}, []
    for name, label in products.items():
        if label is not None and count[label] == 1:
            selectors[name] = {PRODUCT: label}
        else:
            selectors[name] = {OWN: _label(name)}
            own.append(f"{OWN}={_label(name)} on the nodes of {name}")
    if own:
        notes.append(f"Put labels on the nodes that carry the devices: {'; '.join(own)}.")
    if any(PRODUCT in selector for selector in selectors.values()):
        notes.append(f"Pods pick nodes by {PRODUCT}: compare with kubectl get nodes -L {PRODUCT}.")
    return selectors


def _device(hardware: str) -> str:
    try:
        return load_cluster(hardware, 1).device.name
    except ProfileError:
        return hardware


def _label(hardware: str) -> str:
    """A label value: at most 63 of letters, digits, dots, dashes, ending in a letter or digit."""
    name = Path(hardware).stem if "/" in hardware else hardware
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name)[:63].strip(".-") or "device"
