"""How long does one kernel take on a calibrated device? Equations of a few coefficients with a physical meaning each.

Every form is a start plus arithmetic and memory traffic that overlap almost perfectly (`overlapped`): where both take
equally long, a quarter of one is left. The coefficients come from hwmodels.calibration, fitted to measured kernels.
"""

from __future__ import annotations

import numpy as np

from hwmodels.efficiency import DecodeCoefficients, ExpertCoefficients, GemmCoefficients, PrefillCoefficients
from hwmodels.hardware import Device
from hwmodels.operators import Array

Numbers = Array | float

#: Output tiles (rows, columns) that GEMM libraries choose from, and the splits of the inner dimension that fill the
#: device when there are few tiles (CUTLASS's and cuBLAS's usual sizes; more of either did not lower held-out errors).
TILES = ((256, 128), (128, 256), (128, 128), (64, 128), (128, 64), (64, 64))
SPLITS = (1, 2, 4, 8)
_HEIGHT, _WIDTH = np.array(TILES, dtype=float).T
_AREA = _HEIGHT * _WIDTH
#: Rows of queries that a compute unit takes at a time in prefill, and rows the multiply units take at least in decode.
QUERY_ROWS, DECODE_ROWS = 128, 16
#: Width of queries and values from which their handling outweighs the rest of setting up a head in decode (measured:
#: setting up takes in proportion to 1.25, 1.5, 1.75 and 2 for heads of 64, 128, 192 and 256 on H100).
HEAD_WIDTH = 512
#: Tokens of a context that decode kernels do not split further.
CHUNK_TOKENS = 128


def overlapped(a: Numbers, b: Numbers) -> Array:
    """Time of two activities that overlap: the cubic norm, 1.26 times the longer where they are equal."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    total: Array = np.cbrt(a * a * a + b * b * b)
    return total


def tiles_time_s(
    c: GemmCoefficients, m: Numbers, n: Numbers, k: Numbers, products: Numbers, device: Device,
    peak_flops_per_s: float, input_bytes: float, weight_bytes: float,
) -> Array:  # fmt: skip
    """Time of `products` GEMMs m x n x k limited by the multiply units, by the best tile and split.

    Tiles run in waves over the compute units. A wave lasts k / split steps, each as long as the slower of multiplying
    and bringing in a column and a row of the operands, and then wave_s; a split costs split_s once.
    """
    m, n, k, products = (np.asarray(x, dtype=float) for x in (m, n, k, products))
    units, rate = device.compute_units, peak_flops_per_s * c.mfu / device.compute_units
    ahead = (-1, *(1,) * max(m.ndim, n.ndim, k.ndim, products.ndim))
    step_s = np.maximum(2 / rate * _AREA, (_HEIGHT * input_bytes + _WIDTH * weight_bytes) / c.feed_bytes_per_s)
    tiles = np.ceil(m / _HEIGHT.reshape(ahead)) * (np.ceil(n / _WIDTH.reshape(ahead)) * products)
    best: Array | None = None
    for split in SPLITS:
        time_s = np.ceil(tiles * (split / units))
        time_s *= (step_s / split).reshape(ahead) * k + c.wave_s
        fastest: Array = time_s.min(axis=0) + (c.split_s if split > 1 else 0.0)
        best = fastest if best is None else np.minimum(best, fastest)
    assert best is not None
    return best


def gemm_time_s(
    c: GemmCoefficients, m: Numbers, n: Numbers, k: Numbers, products: Numbers, device: Device,
    peak_flops_per_s: float, input_bytes: float, weight_bytes: float, output_bytes: float = 2.0,
) -> Array:  # fmt: skip
    """start + overlapped(tiles, weights, inputs and outputs once at mbu) + narrowing the inputs from 16 bit.

    input_bytes, weight_bytes, output_bytes   of one number
    """
    m, n, k = (np.asarray(x, dtype=float) for x in (m, n, k))
    moved = products * (n * k * weight_bytes + m * (k * input_bytes + n * output_bytes))
    memory_s = moved / (c.mbu * device.memory_bytes_per_s)
    tiles_s = tiles_time_s(c, m, n, k, products, device, peak_flops_per_s, input_bytes, weight_bytes)
    total: Array = c.start_s + overlapped(tiles_s, memory_s)
    if input_bytes < 2:
        total = total + products * m * k * (2 + input_bytes) / (c.cast_mbu * device.memory_bytes_per_s)
    return total


def prefill_time_s(
    c: PrefillCoefficients, batch: Numbers, new: Numbers, before: Numbers, pairs: Numbers, heads: Numbers,
    kv_heads: Numbers, qk_dim: Numbers, value_dim: Numbers, device: Device, peak_flops_per_s: Numbers,
    kv_bytes: Numbers,
) -> Array:  # fmt: skip
    """start + blocks + overlapped(products and softmax, queries, keys, values and results once).

    batch, new, before   prompts, new tokens of each, and cached ones that are read (within the window)
    pairs                query-key pairs of one prompt and head

    Blocks of QUERY_ROWS queries of one head run side by side; the time of all products is that of equal shares of the
    compute units and of the longest block, added as the legs of a right angle.
    """
    new, width = np.asarray(new, dtype=float), np.asarray(qk_dim, dtype=float) + value_dim
    peak = peak_flops_per_s * c.mfu
    done = batch * heads * (pairs + new * c.masked_tokens)
    longest = QUERY_ROWS * (before + new) * device.compute_units
    products_s = 2 * np.hypot(done, longest) * width / peak + done / c.softmax_per_s
    blocks_s = batch * heads * np.ceil(new / QUERY_ROWS) / device.compute_units * c.block_s
    moved = batch * width * (2 * new * heads + (before + new) * kv_heads * kv_bytes)
    total: Array = c.start_s + blocks_s + overlapped(products_s, moved / (c.mbu * device.memory_bytes_per_s))
    return total


def decode_time_s(
    c: DecodeCoefficients, batch: Numbers, context: Numbers, heads: Numbers, kv_heads: Numbers, qk_dim: Numbers,
    value_dim: Numbers, cached_dim: Numbers, device: Device, peak_flops_per_s: Numbers,
    kv_bytes: Numbers,
) -> Array:  # fmt: skip
    """start + heads + merging + overlapped(cache once, products padded to whole tiles of rows).

    context      tokens each of the `batch` sequences attends to (within the window)
    cached_dim   numbers kept per token and KV head
    """
    batch, context = np.asarray(batch, dtype=float), np.asarray(context, dtype=float)
    width = np.asarray(qk_dim, dtype=float) + value_dim
    rows = kv_heads * DECODE_ROWS * np.ceil(np.asarray(heads) / kv_heads / DECODE_ROWS)
    moved = batch * (context * kv_heads * cached_dim * kv_bytes + 2 * heads * width)
    memory_s = moved / (c.mbu * device.memory_bytes_per_s)
    products_s = 2 * batch * context * rows * width / (c.mfu * peak_flops_per_s)
    merge_s = np.log2(1 + context / CHUNK_TOKENS) * c.chain_s
    heads_s = batch * kv_heads / device.compute_units * c.head_s * (1 + width / HEAD_WIDTH)
    total: Array = c.start_s + heads_s + merge_s + overlapped(memory_s, products_s)
    return total


def experts_time_s(
    c: ExpertCoefficients, rows: Numbers, active: Numbers, here: Numbers, hidden: Numbers, width: Numbers,
    matrices: Numbers, device: Device, peak_flops_per_s: float, weight_bytes: float,
) -> Array:  # fmt: skip
    """start + listing the experts + overlapped(products, touched weights once) + rows between the kernels.

    rows, active   routed rows and touched experts of the rank, which keeps `here` experts
    width          of an expert on this rank; matrices   of an expert: 3 where it is gated, else 2
    """
    rows, active = np.asarray(rows, dtype=float), np.asarray(active, dtype=float)
    weights = matrices * np.asarray(hidden, dtype=float) * width
    bandwidth = device.memory_bytes_per_s
    products_s = 2 * (rows + c.padding_rows * active) * weights / (c.mfu * peak_flops_per_s)
    memory_s = active * weights * weight_bytes / (c.mbu * bandwidth)
    between_s = rows * 2 * (2 * np.asarray(hidden, dtype=float) + matrices * width) / (c.activation_mbu * bandwidth)
    total: Array = c.start_s + here * c.route_s + overlapped(products_s, memory_s) + between_s
    return total
