"""Which torch operations run a point, each on random operands of its own."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

from planner.profiling.attention import attention
from planner.profiling.machine import TORCH_DTYPES, Machine
from planner.profiling.points import Point
from planner.profiling.timing import Launch

#: Prepares one launch on the next operands.
Maker = Callable[[], Launch]
#: Families that are never measured, and why.
NEVER = {
    "mla_prefill": "torch has no kernel for it that engines would use",
    "mla_decode": "torch has no kernel for it that engines would use",
    "expert_exchange": "needs the kernels of an engine or of DeepEP",
    "quantize": "engines fuse it into the kernel before",
}
#: Width of the rows that the norm works on.
NORM_WIDTH = 4096


class Unsupported(Exception):
    """Why a point cannot be run here."""


def makers(point: Point, machine: Machine) -> dict[str, Maker]:
    """By the name of the kernel, what prepares a launch of it; raises Unsupported with the reason if there is none."""
    if point.dtype not in machine.dtypes:
        raise Unsupported(f"no arithmetic in {point.dtype}")
    return BUILDERS[point.family](point, machine)


def _gemm(point: Point, machine: Machine) -> dict[str, Maker]:
    """Activations times transposed weights, as linear layers store them, into a buffer that is there already."""
    torch, s, dtype = machine.torch, point.sizes, point.dtype
    m, n, k = s["m"], s["n"], s["k"]
    if dtype == "int8" and machine.kind == "cuda" and (m <= 16 or n % 8 or k % 8):
        raise Unsupported("torch._int_mm needs more than 16 rows and multiples of 8")
    if dtype == "fp8" and (n % 16 or k % 16):
        raise Unsupported("torch._scaled_mm needs multiples of 16")

    def make() -> Launch:
        a, w = machine.arena.take(dtype, m, k), machine.arena.take(dtype, n, k).t()
        if dtype == "fp8":
            one = torch.ones((), device=machine.kind)
            return lambda: torch._scaled_mm(a, w, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        out = machine.arena.room("int32" if dtype == "int8" else dtype, m, n)
        if dtype == "int8":
            return lambda: torch._int_mm(a, w, out=out)
        return lambda: torch.mm(a, w, out=out)

    return {{"int8": "torch_int_mm", "fp8": "torch_scaled_mm"}.get(dtype, "torch_mm"): make}


def _batched_gemm(point: Point, machine: Machine) -> dict[str, Maker]:
    torch, s = machine.torch, point.sizes
    if point.dtype in ("int8", "fp8"):
        raise Unsupported("torch.bmm takes no 8-bit formats")

    def make() -> Launch:
        a = machine.arena.take(point.dtype, s["groups"], s["m"], s["k"])
        w = machine.arena.take(point.dtype, s["groups"], s["n"], s["k"]).transpose(1, 2)
        return lambda: torch.bmm(a, w)

    return {"torch_bmm": make}


def _moe(point: Point, machine: Machine) -> dict[str, Maker]:
    """One rank's experts: gather the routed rows, up, activation, down, weighted sum of what each token gets back."""
    torch, s, dtype = machine.torch, point.sizes, point.dtype
    if dtype in ("int8", "fp8"):
        raise Unsupported("torch has no 8-bit expert kernel that runs everywhere")
    if point.words["distribution"] != "balanced":
        raise Unsupported("tokens are routed evenly at random: distribution 'balanced'")
    here, width = s["experts"] // s["ep"], -(-s["intermediate"] // s["tp"])
    # Elsewhere than on these devices torch's grouped product asks the host for the group sizes.
    grouped = hasattr(torch, "_grouped_mm") and machine.capability[0] in (9, 10) and dtype == "bf16"

    def make() -> Launch:
        take = machine.arena.take
        tokens = take(dtype, s["tokens"], s["hidden"])
        up = take(dtype, here, width * (1 + s["gated"]), s["hidden"])
        down = take(dtype, here, s["hidden"], width)
        chosen = machine.arena.ids(s["tokens"], s["experts"], s["top_k"]).flatten()
        expert, order = chosen.sort(stable=True)
        order = order[: int((expert < here).sum())]
        if not len(order):
            raise Unsupported("none of so few tokens is routed to this rank")
        counts = torch.bincount(chosen[order], minlength=here)
        ends, sizes = counts.cumsum(0).to(torch.int32), counts.tolist()
        token = order // s["top_k"]
        share = take(dtype, len(order), 1)
        back = order.argsort() if s["ep"] == 1 else None

        def product(rows: Any, weights: Any) -> Any:
            if grouped:
                return torch._grouped_mm(rows, weights.transpose(1, 2), offs=ends)
            parts = zip(rows.split(sizes), weights, strict=True)
            return torch.cat([part @ weight.t() for part, weight in parts if len(part)])

        def launch() -> object:
            inner = product(tokens.index_select(0, token), up)
            if s["gated"]:
                gate, value = inner.chunk(2, dim=1)
                inner = torch.nn.functional.silu(gate) * value
            else:
                inner = torch.nn.functional.gelu(inner)
            rows = product(inner, down) * share
            if back is not None:
                return rows.index_select(0, back).view(s["tokens"], s["top_k"], s["hidden"]).sum(1)
            return torch.zeros_like(tokens).index_add_(0, token, rows)

        return launch

    return {"torch_grouped_mm" if grouped else "torch_expert_loop": make}


def _elementwise(point: Point, machine: Machine) -> dict[str, Maker]:
    """RMSNorm of rows as long as the hidden states of a model: every number read and written once."""
    torch = machine.torch
    size = getattr(torch, TORCH_DTYPES[point.dtype]).itemsize
    numbers, rest = divmod(point.sizes["bytes"], 2 * size)
    width = gcd(numbers, NORM_WIDTH)
    if rest or width < 64:
        raise Unsupported("bytes of a norm are a multiple of 64 numbers read and written")

    def make() -> Launch:
        weight = machine.arena.take(point.dtype, width)
        rows = machine.arena.take(point.dtype, numbers // width, width)
        return lambda: torch.nn.functional.rms_norm(rows, (width,), weight)

    return {"torch_rms_norm": make}


def _copy(point: Point, machine: Machine) -> dict[str, Maker]:
    """One contiguous copy; host memory is pinned."""
    torch, kind = machine.torch, point.words["kind"]
    size = getattr(torch, TORCH_DTYPES[point.dtype]).itemsize
    count, rest = divmod(point.sizes["bytes"], size)
    if rest:
        raise Unsupported(f"bytes of a copy are a multiple of {size}")
    if kind not in ("h2d", "d2h", "d2d"):
        raise Unsupported(f"kind {kind!r} of a copy: expected h2d, d2h or d2d")
    if kind != "d2d" and machine.kind == "cpu":
        raise Unsupported("a CPU has no host to copy from or to")

    def make() -> Launch:
        source, target = machine.arena.take(point.dtype, count), machine.arena.room(point.dtype, count)
        if kind == "d2d":
            return lambda: target.copy_(source)
        host = torch.ones(count, dtype=source.dtype, pin_memory=True)
        return lambda: target.copy_(host, non_blocking=True) if kind == "h2d" else host.copy_(source, non_blocking=True)

    return {"torch_copy": make}


BUILDERS: dict[str, Callable[[Point, Machine], dict[str, Maker]]] = {
    "gemm": _gemm,
    "batched_gemm": _batched_gemm,
    "moe": _moe,
    "attention_prefill": attention,
    "attention_decode": attention,
    "elementwise": _elementwise,
    "copy": _copy,
}
