"""Which kinds of replica can be left out, because copies of another do all they do for no more?

Let kind b be replaced by m copies of kind a, m the most that b's devices, dollars and watts pay for. In every row of
the pool-sizing program (planner/pools.py) a request/s then takes u_a / m of what b's replica had, where u is
1 / capacity, held_token_s / kv_tokens or kv_bytes / link_bytes_per_s; with u_a / m <= u_b in all rows, any solution
with b's stays one with a's, at no higher cost. Kinds are compared within a role, a device type and a KV format only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planner.options import PHASES, Option, phases_of

Array = NDArray[np.float64]


def undominated(options: Sequence[Option]) -> list[Option]:
    """The options that no other one replaces, in their order; of equals the first, without those that serve nobody."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, option in enumerate(options):
        moving = option.kv_format if option.role in ("prefill", "decode", "mixed") else ""
        if any(phases_of(option, c) for c in range(len(option.services))):
            groups[option.role, option.hardware, moving].append(index)
    kept: list[int] = []
    for members in groups.values():
        use = np.array([_use(options[index]) for index in members])
        price = np.array(
            [(options[i].gpus, options[i].price_usd_per_h or 0.0, options[i].power_w) for i in members], dtype=float
        )
        replaces = np.array([_replaces(use[a], price[a], use, price) for a in range(len(members))])
        position = np.arange(len(members))
        first = position[:, None] < position[None, :]
        better = replaces & (~replaces.T | first)
        np.fill_diagonal(better, False)
        kept += [members[b] for b in position[~better.any(axis=0)]]
    return [options[index] for index in sorted(kept)]


def _use(option: Option) -> list[float]:
    """Replicas that one request/s takes, by row, phase and class; inf for what the kind does not do."""
    found = []
    for c, service in enumerate(option.services):
        does = phases_of(option, c)
        for phase in PHASES[option.role]:
            served = phase in does
            found.append(1 / service.per_s(phase) if served else np.inf)
            found.append(service.held_token_s(phase) / option.kv_tokens if served else np.inf)
            found.append(service.kv_bytes / option.link_bytes_per_s if served else np.inf)
    return found


def _replaces(use: Array, price: Array, others: Array, prices: Array) -> NDArray[np.bool_]:
    """Which others copies of a kind replace, bought for no more."""
    with np.errstate(divide="ignore", invalid="ignore"):
        copies = np.floor(np.where(price > 0, prices / price, np.inf).min(axis=1) + 1e-9)
    enough = copies >= 1
    each = use[None, :] / np.maximum(copies, 1)[:, None]
    covered: NDArray[np.bool_] = enough & np.all((each <= others * (1 + 1e-12)) | np.isinf(others), axis=1)
    return covered
