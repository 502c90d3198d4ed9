"""Which attention kernels can run a point: torch's own, and flash-attn's and flashinfer's where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from planner.profiling.machine import Machine
from planner.profiling.points import Point
from planner.profiling.timing import Launch

#: Tokens of a page of flashinfer's KV cache.
PAGE = 16
#: Modules of the kernels outside torch, by the distribution that brings them.
MODULES = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface", "flashinfer-python": "flashinfer"}


@lru_cache(maxsize=8)
def installed(distribution: str) -> tuple[Any, str] | None:
    """(module, version) of a kernel library, or None where it is not there or does not load here."""
    try:
        module = import_module(MODULES[distribution])
    except (ImportError, OSError, RuntimeError):
        return None
    try:
        return module, version(distribution)
    except PackageNotFoundError:
        return module, str(getattr(module, "__version__", "unknown"))


def attention(point: Point, machine: Machine) -> dict[str, Callable[[], Launch]]:
    """Kernels that run the point: causal attention of prompts behind cached tokens, or of one token per sequence."""
    makers: dict[str, Callable[[], Launch]] = {}
    if not point.sizes["window"]:
        if machine.kind == "cpu":
            makers["torch_sdpa"] = partial(_sdpa, point, machine, None)
        else:
            makers["torch_sdpa_flash"] = partial(_sdpa, point, machine, "FLASH_ATTENTION")
            if point.family == "attention_decode" or not point.sizes["before"]:
                # cuDNN's causal mask begins at the first cached token, so chunks behind others cannot run on it.
                makers["torch_sdpa_cudnn"] = partial(_sdpa, point, machine, "CUDNN_ATTENTION")
    if machine.kind == "cuda":
        for distribution in ("flash-attn", "flash-attn-3"):
            if found := installed(distribution):
                makers[f"{MODULES[distribution]}_{found[1]}"] = partial(_flash_attn, point, machine, found[0])
        if found := installed("flashinfer-python"):
            makers[f"flashinfer_{found[1]}"] = partial(_flashinfer, point, machine, found[0])
    return makers


def _lengths(point: Point) -> tuple[int, int]:
    """Query tokens and attended tokens of a sequence."""
    s = point.sizes
    return (1, s["context"]) if point.family == "attention_decode" else (s["new"], s["before"] + s["new"])


def _operands(point: Point, machine: Machine) -> tuple[Any, Any, Any]:
    """Queries, keys and values as (batch, tokens, heads, width): as projections leave them and caches keep them."""
    s, take = point.sizes, machine.arena.take
    new, total = _lengths(point)
    q = take(point.dtype, s["batch"], new, s["heads"], s["head_dim"])
    k = take(point.dtype, s["batch"], total, s["kv_heads"], s["head_dim"])
    v = take(point.dtype, s["batch"], total, s["kv_heads"], s["head_dim"])
    return q, k, v


def _sdpa(point: Point, machine: Machine, backend: str | None) -> Launch:
    """scaled_dot_product_attention by one of torch's backends; None: the one torch chooses."""
    torch = machine.torch
    q, k, v = (operand.transpose(1, 2) for operand in _operands(point, machine))
    new, total = _lengths(point)
    options: dict[str, Any] = {"enable_gqa": point.sizes["heads"] != point.sizes["kv_heads"]}
    if new > 1 and new == total:
        options["is_causal"] = True
    elif new > 1 and machine.kind == "cuda":
        options["attn_mask"] = import_module("torch.nn.attention.bias").causal_lower_right(new, total)
    elif new > 1:
        options["attn_mask"] = torch.ones(new, total, dtype=torch.bool).tril(total - new)
    run = torch.nn.functional.scaled_dot_product_attention
    if backend is None:
        return lambda: run(q, k, v, **options)
    chosen = import_module("torch.nn.attention")

    def launch() -> object:
        with chosen.sdpa_kernel([getattr(chosen.SDPBackend, backend)]):
            return run(q, k, v, **options)

    return launch


def _flash_attn(point: Point, machine: Machine, module: Any) -> Launch:
    """Prompts by flash_attn_func, whose causal mask ends at the last token; decode against a cache of equal lengths."""
    q, k, v = _operands(point, machine)
    window = point.sizes["window"]
    options: dict[str, Any] = {"causal": True, "window_size": (window - 1, 0) if window else (-1, -1)}
    if point.family == "attention_prefill":
        return lambda: module.flash_attn_func(q, k, v, **options)
    torch = machine.torch
    lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    return lambda: module.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **options)


@lru_cache(maxsize=1)
def _workspace(torch: Any) -> Any:
    return torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")


def _flashinfer(point: Point, machine: Machine, module: Any) -> Launch:
    """Prompts from ragged tensors; decode from a paged cache, whose pages lie in order."""
    torch, s = machine.torch, point.sizes
    new, total = _lengths(point)
    heads, kv_heads, width, batch = s["heads"], s["kv_heads"], s["head_dim"], s["batch"]
    q, k, v = _operands(point, machine)
    workspace = _workspace(torch)

    def starts(step: int) -> Any:
        return torch.arange(0, (batch + 1) * step, step, dtype=torch.int32, device=q.device)

    options: dict[str, Any] = {"window_left": s["window"] - 1 if s["window"] else -1, "q_data_type": q.dtype}
    if point.family == "attention_prefill":
        prefill = module.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        prefill.plan(starts(new), starts(total), heads, kv_heads, width, causal=True, **options)
        rows = q.view(-1, heads, width), k.view(-1, kv_heads, width), v.view(-1, kv_heads, width)
        return lambda: prefill.run(*rows)
    pages = -(-total // PAGE)
    cache = machine.arena.take(point.dtype, batch * pages, 2, PAGE, kv_heads, width)
    last = torch.full((batch,), total - (pages - 1) * PAGE, dtype=torch.int32, device=q.device)
    numbers = torch.arange(batch * pages, dtype=torch.int32, device=q.device)
    decode = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=heads > kv_heads)
    decode.plan(starts(pages), numbers, last, heads, kv_heads, width, PAGE, kv_data_type=k.dtype, **options)
    queries = q.view(batch, heads, width)
    return lambda: decode.run(queries, cache)
