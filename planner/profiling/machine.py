"""Which machine is measured: its name, formats, cache and memory, as torch and the operating system report them."""

from __future__ import annotations

import ctypes
import os
import re
import time
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from hwmodels.errors import MeasurementError

#: torch's name of every format that is measured or written.
TORCH_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp8": "float8_e4m3fn",
    "int8": "int8",
    "int32": "int32",
}
#: Operands are cycled through this many times the last-level cache, so that every launch finds them in memory.
BEYOND_CACHE = 2.0


def open_torch() -> Any:
    """The module torch; raises MeasurementError with a way out where it is not installed."""
    try:
        return import_module("torch")
    except ImportError:
        raise MeasurementError(
            "measuring kernels needs torch, which is not installed; pip install 'shardwise[profile]'"
        ) from None


@dataclass(frozen=True)
class Machine:
    """One device that kernels run on.

    kind          'cuda' or 'cpu'
    reported      the device's name as the driver or the operating system says it
    name          what the column `device` of its tables holds
    dtypes        formats it multiplies in
    capability    compute capability (CUDA), (0, 0) for CPUs
    cycle_bytes   least memory that the operands of successive launches are spread over
    threads       that torch computes with, on a CPU
    """

    torch: Any = field(repr=False)
    kind: str
    reported: str
    name: str
    dtypes: tuple[str, ...]
    capability: tuple[int, int]
    memory_bytes: int
    cache_bytes: int
    cycle_bytes: int
    count: int = 1
    threads: int | None = None

    @property
    def software(self) -> str:
        """What runs the kernels."""
        return f"torch {self.torch.__version__}"

    @property
    def sixteen(self) -> str:
        """The format of attention and activations: 16 bit where the machine multiplies in one."""
        return next((dtype for dtype in ("bf16", "fp16") if dtype in self.dtypes), "fp32")

    def free_bytes(self) -> int:
        """Memory that could be taken now."""
        if self.kind == "cuda":
            free, _ = self.torch.cuda.mem_get_info()
            held = self.torch.cuda.memory_reserved() - self.torch.cuda.memory_allocated()
            return int(free + held)
        found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
        return int(found[1]) * 1024 if found else self.memory_bytes // 2

    @cached_property
    def arena(self) -> Arena:
        """Random operands of this machine."""
        return Arena(self)


class Arena:
    """Random numbers in every format, handed out slice by slice, so that successive operands share no cache lines.

    After `cycle_bytes` (what is written: a quarter; or what one operand needs) slices begin again. Memory is filled as
    far as it is handed out, with one stretch of random numbers repeated: caches know addresses and not contents.
    """

    BLOCK = 1 << 22
    ALIGN = 1024

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.generator = machine.torch.Generator(device=machine.kind).manual_seed(20260101)
        self.held: dict[str, Any] = {}
        self.filled: dict[str, int] = {}
        self.at: dict[str, int] = {}
        self.filling_s = 0.0

    def take(self, dtype: str, *shape: int) -> Any:
        """A contiguous tensor of random numbers: normal, or even over all of an integer format."""
        return self._slice(dtype, dtype, shape)

    def room(self, dtype: str, *shape: int) -> Any:
        """A contiguous tensor to write to, of memory that was touched before."""
        return self._slice(f"{dtype} to write", dtype, shape)

    def ids(self, rows: int, among: int, chosen: int) -> Any:
        """For each row `chosen` different numbers below `among`, evenly at random."""
        return self.machine.torch.rand(rows, among, device=self.machine.kind, generator=self.generator).topk(chosen)[1]

    def rewind(self) -> None:
        """Begin again with the first slice."""
        self.at.clear()

    def clear(self) -> None:
        """Give the memory back."""
        self.held.clear()
        if self.machine.kind == "cuda":
            self.machine.torch.cuda.empty_cache()

    def _slice(self, purpose: str, dtype: str, shape: tuple[int, ...]) -> Any:
        count = prod(shape)
        needed = -(-count // self.ALIGN) * self.ALIGN
        if purpose not in self.held or self.held[purpose].numel() < needed:
            torch_dtype = getattr(self.machine.torch, TORCH_DTYPES[dtype])
            cycle = self.machine.cycle_bytes * (1.0 if purpose == dtype else 0.25) / torch_dtype.itemsize
            blocks = -(-max(needed, int(cycle)) // self.BLOCK)
            self.held.pop(purpose, None)
            self.held[purpose] = self.machine.torch.empty(
                blocks * self.BLOCK, dtype=torch_dtype, device=self.machine.kind
            )
            self.filled[purpose] = self.at[purpose] = 0
        held = self.held[purpose]
        start = self.at.get(purpose, 0)
        if start + needed > held.numel():
            start = 0
        self.at[purpose] = start + needed
        began = time.perf_counter()
        while self.filled[purpose] < start + needed:
            filled = self.filled[purpose]
            held[filled : filled + self.BLOCK].copy_(self._numbers(dtype) if filled == 0 else held[: self.BLOCK])
            self.filled[purpose] = filled + self.BLOCK
        self.filling_s += time.perf_counter() - began
        return held[start : start + count].view(shape)

    def _numbers(self, dtype: str) -> Any:
        """One block of random numbers."""
        torch, kind = self.machine.torch, self.machine.kind
        if dtype.startswith("int"):
            return torch.randint(-128, 128, (self.BLOCK,), device=kind, generator=self.generator)
        return torch.randn(self.BLOCK, device=kind, generator=self.generator)


def open_machine(kind: str, name: str | None = None, threads: int | None = None) -> Machine:
    """The machine behind --device `kind`.

    name      instead of one made from what the device reports
    threads   that torch computes with on a CPU, from here on in this process; None: as many as it chooses itself

    Raises MeasurementError without torch, for an unknown kind, and where torch sees no CUDA device.
    """
    if kind not in ("cuda", "cpu"):
        raise MeasurementError(f"device {kind!r}: expected cuda or cpu")
    torch = open_torch()
    if kind == "cuda" and not torch.cuda.is_available():
        built = "finds no NVIDIA GPU" if torch.version.cuda else "was built without CUDA"
        raise MeasurementError(
            f"device cuda: torch {torch.__version__} {built}; take --device cpu, or install the driver and torch for it"
        )
    return _gpu(torch, name) if kind == "cuda" else _cpu(torch, name, threads)


def _gpu(torch: Any, name: str | None) -> Machine:
    properties = torch.cuda.get_device_properties(0)
    capability = (int(properties.major), int(properties.minor))
    lowest = {"bf16": (8, 0), "fp16": (7, 0), "fp8": (8, 9), "int8": (7, 5), "fp32": (0, 0)}
    cache = int(getattr(properties, "L2_cache_size", 0)) or 64 << 20
    return Machine(
        torch=torch,
        kind="cuda",
        reported=str(properties.name),
        name=name or slug(str(properties.name)),
        dtypes=tuple(dtype for dtype, least in lowest.items() if capability >= least),
        capability=capability,
        memory_bytes=int(properties.total_memory),
        cache_bytes=cache,
        cycle_bytes=int(BEYOND_CACHE * cache),
        count=int(torch.cuda.device_count()),
    )


def _cpu(torch: Any, name: str | None, threads: int | None) -> Machine:
    if threads is not None:
        torch.set_num_threads(threads)
    threads = int(torch.get_num_threads())
    _keep_freed_memory()
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    reported = found[1].strip() if found else "cpu"
    wide = [dtype for dtype in ("bf16", "fp16") if _has_products(torch, dtype)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes = [_size(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    cache = max(sizes, default=32 << 20)
    return Machine(
        torch=torch,
        kind="cpu",
        reported=reported,
        name=name or f"{slug(reported)}-{threads}c",
        dtypes=(*wide, "fp32", "int8"),
        capability=(0, 0),
        memory_bytes=memory,
        cache_bytes=cache,
        cycle_bytes=int(min(BEYOND_CACHE * cache, memory / 16)),
        threads=threads,
    )


def _has_products(torch: Any, dtype: str) -> bool:
    """Whether oneDNN has products in a 16-bit format for this CPU; without them torch widens the operands."""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", None)
    return supported is not None and bool(supported())


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed, as the allocators that engines preload do.

    Otherwise large outputs are mapped anew in every launch, and what is timed is page faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    most_mapped, trim_above = -4, -1
    mallopt(most_mapped, 0)
    mallopt(trim_above, 2**31 - 1)


def slug(reported: str) -> str:
    """A name for tables and folders.

    >>> slug("NVIDIA H200"), slug("Intel(R) Xeon(R) Processor"), slug("AMD EPYC 9654 96-Core Processor")
    ('h200', 'xeon', 'epyc-9654')
    """
    text = re.sub(r"\((r|tm)\)|@.*|\b(nvidia|intel|amd|cpu|processor|\d+-core)\b", " ", reported.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "device"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _size(text: str) -> int:
    """Bytes of sizes as the kernel writes them: '512K'."""
    found = re.match(r"(\d+)([KMG]?)", text.strip())
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else 0
