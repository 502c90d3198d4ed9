"""How long does a step take on a share of the compute units, while another phase draws on the same memory?

A share of a device is a smaller device: fewer compute units, arithmetic in proportion, and the memory bandwidth that so
few units can draw. Whatever prices operators then prices them on the slice; that more units than an operator has output
tiles are no use, and that decode hardly needs any, follows from the operators' own forms and is no parameter. Memory
answers all units the more slowly the more they draw together, which limits few units, many, and two phases alike
(`bandwidth_share`, `crowding`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hwmodels.efficiency import Efficiency
from hwmodels.engine import Engine
from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster, Device
from hwmodels.mapping import Mapping, Precision
from hwmodels.operators import Array, Communication, ExpertExchange, Operator
from hwmodels.roofline import AnalyticCost
from hwmodels.shape import ModelShape
from hwmodels.step_model import CostModel, Item, StepModel, compile_step_model, packed, tabulate_stages
from hwmodels.work import bytes_of

#: Bytes per second that one compute unit of a GPU can draw by itself (bytes under way over latency). Fitted (least
#: squares of the logarithm, within 17 % of every point) to a copy of 256 MB on an H100 SXM5 by 1, 8, 32 and 64 of its
#: 132 units: 66.7, 362.8, 1183 and 1722 of the 1992 GB/s of all, from a public CUDA micro-benchmark study of it.
#: Others measured less (16 GB/s per unit of an A100 for reads with one plain load per thread, which need all units) and
#: more (decode products on an H100 PCIe gain only 10 % beyond about 40 of 114 units, zejia-lin/BulletServe issue 1).
UNIT_BYTES_PER_S = 62.7e9
#: Most of the reached bandwidth over what all units could draw by themselves: a device is built to use its memory.
MOST = 0.75

NO_ENGINE = Engine("no engine", "adds nothing to the kernels", {"default": "vllm"}, 0, 0, 0, 1, 0, 1, 0)


def half_share(device: Device) -> float:
    """Share of the compute units at which the device draws (1 + half) / 2 of its bandwidth; see bandwidth_share.

    With q the bandwidth that kernels reach over what all units could draw if nobody waited, q / (1 - q).
    """
    reached = device.efficiency.memory_mbu * device.memory_bytes_per_s
    q = min(MOST, reached / (device.compute_units * UNIT_BYTES_PER_S))
    return q / (1 - q)


def bandwidth_share(share: float, half: float) -> float:
    """Share of the device's bandwidth that a share of its compute units can draw: share (1 + half) / (share + half).

    Little's law: every unit keeps so many bytes under way, and the latency is in proportion to 1 / (1 - traffic /
    ceiling) with a ceiling of (1 + half) times what all units draw.

    >>> bandwidth_share(1.0, half=0.3)
    1.0
    >>> bandwidth_share(0.25, half=0.25)
    0.625
    """
    return share * (1 + half) / (share + half)


def slice_of(device: Device, share: float, *, half: float | None = None, memory: float = 1.0) -> Device:
    """The device as a share of its compute units sees it, rounded to whole units.

    half     see bandwidth_share; None for half_share(device)
    memory   part of the bandwidth it could draw that it is given

    Raises MappingError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise MappingError(f"share {share:g} of {device.name}: expected a part of its compute units above 0, at most 1")
    units = max(1, round(share * device.compute_units))
    part = units / device.compute_units
    if half is None:
        half = half_share(device)
    kernels = device.efficiency.kernels
    slower = {
        family: {
            formats: replace(c, softmax_per_s=c.softmax_per_s * part) for formats, c in getattr(kernels, family).items()
        }
        for family in ("attention_prefill", "mla_prefill")
    }
    efficiency: Efficiency = replace(device.efficiency, kernels=replace(kernels, **slower))
    return replace(
        device,
        peak_flops_per_s={dtype: rate * part for dtype, rate in device.peak_flops_per_s.items()},
        compute_units=units,
        memory_bytes_per_s=device.memory_bytes_per_s * bandwidth_share(part, half) * memory,
        efficiency=efficiency,
    )


class SharedCost:
    """Prices operators as `inner` does, times what the analytic model says that the share costs them.

    Collectives keep their price: what they wait for are links.
    """

    def __init__(
        self,
        inner: CostModel,
        cluster: Cluster,
        mapping: Mapping,
        share: float,
        *,
        half: float | None = None,
        memory: float = 1.0,
    ) -> None:
        part = slice_of(cluster.device, share, half=half, memory=memory)
        self.inner = inner
        self.whole = AnalyticCost(cluster, mapping)
        self.part = AnalyticCost(replace(cluster, device=part), mapping)

    def time_s(self, op: Operator) -> Array:
        """Seconds of all launches of the operator on the share."""
        if isinstance(op, (Communication, ExpertExchange)):
            return self.inner.time_s(op)
        if isinstance(self.inner, AnalyticCost):
            return self.part.time_s(op)
        whole, part = self.whole.time_s(op), self.part.time_s(op)
        slowed: Array = self.inner.time_s(op) * np.divide(part, whole, out=np.ones_like(whole), where=whole > 0)
        return slowed

    def sources(self, op: Operator) -> dict[str, float]:
        """What the price rests on, as for the whole device: how it scales with the share is analytic throughout."""
        return self.inner.sources(op)


def crowding(
    first: tuple[float, float, float], second: tuple[float, float, float], ceiling_bytes_per_s: float
) -> tuple[float, float]:
    """How much longer each step's bytes take when two steps run at once, as parts of their time alone; in [0, 1].

    first, second         (seconds of the step alone on its share, seconds more at half the bandwidth, bytes) of both
    ceiling_bytes_per_s   traffic at which memory would never answer, see bandwidth_share

    A step whose bytes take 1 + u times as long lasts alone + memory u: linear between the bandwidth it could draw and
    half of it. The latency is that of the traffic of both, 1 + u = (1 - own alone / ceiling) / (1 - both / ceiling),
    and both draw as much less as they last longer: Newton's method on the latency finds where the two agree.

    >>> [round(u, 9) for u in crowding((1.0, 1.0, 6.0), (1.0, 1.0, 6.0), 20.0)]  # (1 - 6/20) / (1 - 2 (6/1.3)/20)
    [0.3, 0.3]
    """
    alone1, memory1, bytes1 = first
    alone2, memory2, bytes2 = second
    drawn1, drawn2 = bytes1 / alone1, bytes2 / alone2
    left1, left2 = 1 - drawn1 / ceiling_bytes_per_s, 1 - drawn2 / ceiling_bytes_per_s
    if left1 <= 0 or left2 <= 0:
        return 1.0, 1.0
    fixed1, rise1, fixed2, rise2 = alone1 - memory1, memory1 * left1, alone2 - memory2, memory2 * left2
    least = left1 if left1 < left2 else left2
    most = 2 / least
    latency = 1 / max(1 - 0.95 * (drawn1 + drawn2) / ceiling_bytes_per_s, 0.5 * least)
    for _ in range(20):
        # What both draw at this latency, less what it tells of the traffic: falling and convex, so that all steps but
        # the first approach the root from below, and the error is about the square of the last step.
        took1, took2 = fixed1 + rise1 * latency, fixed2 + rise2 * latency
        draw1, draw2 = bytes1 / took1, bytes2 / took2
        excess = draw1 + draw2 - ceiling_bytes_per_s * (1 - 1 / latency)
        slope = ceiling_bytes_per_s / (latency * latency) + draw1 * rise1 / took1 + draw2 * rise2 / took2
        step = excess / slope
        latency += step
        if -1e-6 * latency < step < 1e-6 * latency:
            break
        if latency >= most:
            latency = most
            break
    slower1, slower2 = left1 * latency - 1, left2 * latency - 1
    return (
        0.0 if slower1 < 0 else 1.0 if slower1 > 1 else slower1,
        0.0 if slower2 < 0 else 1.0 if slower2 > 1 else slower2,
    )


@dataclass(slots=True)
class SharedSteps:
    """Step models of a replica with one stage and one attention group at any share, compiled when first asked for.

    compiled              the step model at (share, part of the bandwidth)
    traffic               a step model whose 'seconds' are the bytes a rank moves in the step
    units                 compute units of the device: shares are rounded to whole ones
    ceiling_bytes_per_s   see crowding
    """

    compiled: Callable[[float, float], StepModel]
    traffic: StepModel
    units: int
    ceiling_bytes_per_s: float
    _models: dict[int, tuple[StepModel, StepModel]] = field(default_factory=dict)

    def at(self, share: float) -> tuple[StepModel, StepModel]:
        """The step models at a share: with all the bandwidth it can draw, and with half of that."""
        units = max(1, round(share * self.units))
        models = self._models.get(units)
        if models is None:
            part = units / self.units
            models = self._models[units] = self.compiled(part, 1.0), self.compiled(part, 0.5)
        return models

    def prefill(self, share: float, items: Sequence[Item]) -> tuple[float, float, float]:
        """Of a step of prompt chunks: seconds alone on the share, seconds more at half the bandwidth, bytes."""
        full, half = self.at(share)
        alone_s = full.step_s(0, 0, items)
        return alone_s, half.step_s(0, 0, items) - alone_s, self.traffic.step_s(0, 0, items)

    def decode(self, share: float, sequences: int, context: int) -> tuple[float, float, float]:
        """The same of a decode step of `sequences` that attend to `context` tokens in all."""
        full, half = self.at(share)
        alone_s = full.step_s(sequences, context, ())
        return alone_s, half.step_s(sequences, context, ()) - alone_s, self.traffic.step_s(sequences, context, ())


def compile_shared_steps(
    model: ModelShape,
    mapping: Mapping,
    precision: Precision,
    engine: Engine,
    cost: CostModel,
    cluster: Cluster,
    *,
    max_tokens: int,
    max_seqs: int,
    half: float | None = None,
) -> SharedSteps:
    """The step models of a replica whose phases run at once, for steps of up to `max_tokens` and `max_seqs`.

    half   see bandwidth_share; None for that of the device

    Raises MappingError for pipelines and attention groups, whose steps do not run at once.
    """
    if mapping.pp > 1 or mapping.attention_dp > 1 or mapping.cp > 1:
        raise MappingError(
            f"pp={mapping.pp} attention_dp={mapping.attention_dp} cp={mapping.cp}: expected 1 each where prefill and "
            "decode share a device; cut the replica by tp"
        )

    def compiled(share: float, memory: float) -> StepModel:
        shared = SharedCost(cost, cluster, mapping, share, half=half, memory=memory)
        return compile_step_model(model, mapping, precision, engine, shared, max_tokens=max_tokens, max_seqs=max_seqs)

    moved = tabulate_stages(model, mapping, precision, bytes_of, max_tokens=max_tokens, max_seqs=max_seqs)
    traffic = StepModel(moved, packed(np.zeros(max_tokens + 1)), NO_ENGINE, max_tokens, max_seqs)
    device = cluster.device
    reached = device.efficiency.memory_mbu * device.memory_bytes_per_s
    ceiling = reached * (1 + (half_share(device) if half is None else half))
    return SharedSteps(compiled, traffic, device.compute_units, ceiling)
