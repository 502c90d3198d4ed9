"""What a folder of measurements says of itself: device, software, clocks, what was left out and why."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from hwmodels.errors import MeasurementError, ProfileError
from hwmodels.yamlfiles import read_mapping
from planner.profiling import timing
from planner.profiling.attention import MODULES, installed
from planner.profiling.machine import Machine

FILE = "about.yaml"
#: What may not differ between the runs that fill one folder.
FIXED = ("device", "kind", "reported_name", "memory_bytes", "compute_capability", "threads", "software", "libraries")
#: What nvidia-smi is asked, by our names of the answers.
CLOCKS = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


@dataclass(slots=True)
class About:
    """The machine, and the state of the measurements.

    facts      in the order they are written
    minutes    of all runs; `points` are the rows of each table, `skipped` counts the reasons of the last run
    """

    facts: dict[str, Any]
    minutes: float = 0.0
    points: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Any]:
        """What changes while points are measured."""
        minutes = round(self.minutes, 2)
        return {"minutes": minutes, "rows": self.points, "left_out": self.left_out, "skipped": self.skipped}

    def text(self) -> str:
        """The YAML of the file."""
        return yaml.safe_dump({**self.facts, **self.state}, sort_keys=False, allow_unicode=True, width=120)

    def write(self, folder: Path) -> None:
        """Write the file, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{FILE}.partial"
        unfinished.write_text(self.text(), encoding="utf-8")
        unfinished.replace(folder / FILE)


def about(machine: Machine) -> About:
    """What can be said before anything is measured."""
    torch, libraries = machine.torch, {}
    facts: dict[str, Any] = {
        "source": "measured on this device by 'shardwise profile': random operands, cycled through more memory than "
        "the last-level cache holds; median of repeated samples",
        "device": machine.name,
        "reported_name": machine.reported,
        "kind": machine.kind,
        "devices": machine.count,
        "memory_bytes": machine.memory_bytes,
        "cache_bytes": machine.cache_bytes,
        "cycled_bytes": machine.cycle_bytes,
        "software": machine.software,
        "date": datetime.now(UTC).date().isoformat(),
        "samples": f"{timing.LEAST} to {timing.MOST}, until they add up to {timing.ENOUGH_S} s",
        "formats": list(machine.dtypes),
    }
    if machine.kind == "cuda":
        for name in MODULES:
            if found := installed(name):
                libraries[name] = found[1]
        facts |= {
            "compute_capability": ".".join(map(str, machine.capability)),
            "multiprocessors": int(torch.cuda.get_device_properties(0).multi_processor_count),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
            "libraries": libraries,
        }
    else:
        facts |= {"threads": machine.threads, "instructions": torch.backends.cpu.get_cpu_capability()}
    facts["clocks"] = clocks(machine)
    return About(facts)


def clocks(machine: Machine) -> dict[str, Any]:
    """Clocks, power limit and driver as nvidia-smi reports them now, or the cores' clock; {} where nobody says."""
    if machine.kind == "cpu":
        try:
            found = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        except OSError:
            return {}
        return {"core_mhz": round(max(map(float, found)))} if found else {}
    # The first visible device need not be the first of the machine.
    unique = getattr(machine.torch.cuda.get_device_properties(0), "uuid", None)
    which = "0" if unique is None else f"GPU-{unique}"
    command = [
        "nvidia-smi",
        f"--id={which}",
        f"--query-gpu={','.join(CLOCKS.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return {name: value.strip() for name, value in zip(CLOCKS, answer.split(","), strict=False)}


def resumed(folder: Path, machine: Machine) -> About:
    """What the folder says, if this machine and software filled it; new, if nobody did.

    Raises MeasurementError for a folder of another device or other software, and for tables without their about.yaml.
    """
    now = about(machine)
    path = folder / FILE
    if not path.exists():
        tables = sorted(folder.glob("*.parquet"))
        if tables:
            raise MeasurementError(
                f"{folder}: holds {tables[0].name} but no {FILE}, so whose it is cannot be told; choose another folder"
            )
        return now
    try:
        before = read_mapping(path)
    except ProfileError as error:
        raise MeasurementError(f"{error}; choose another folder") from None
    for key in FIXED:
        if before.get(key) != now.facts.get(key):
            raise MeasurementError(
                f"{folder}: was measured with {key} = {before.get(key)!r}, this is {now.facts.get(key)!r}; "
                "choose another folder"
            )
    now.minutes = float(before.get("minutes", 0.0))
    now.left_out = _texts(before.get("left_out"))
    return now


def _texts(found: Any) -> dict[str, str]:
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, Mapping) else {}
