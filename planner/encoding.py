"""What does the vision encoder of a plan take: time, memory and links, in a pool of its own or beside the model?"""

from __future__ import annotations

from collections.abc import Mapping as ByName
from dataclasses import dataclass, replace

from hwmodels.encoder import Encoder, encode_times_s, encode_work, load_encoder, most_tiles
from hwmodels.engine import Engine
from hwmodels.errors import MappingError, OutOfMemoryError
from hwmodels.hardware import Cluster, Device
from hwmodels.interconnect import Interconnect
from hwmodels.mapping import Precision
from hwmodels.memory import Sizes
from hwmodels.shape import ModelShape
from hwmodels.step_model import CostModel
from hwmodels.tiles import Cut
from planner.placing import placed
from planner.plan import Plan, Pool
from simulator.encode import EncodeSpec
from simulator.encodehere import OwnEncoder

#: What an encoder is taken to run in: formats of 16 bit, whatever the language model is kept in.
FORMATS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True, slots=True)
class Vision:
    """A vision encoder that gets tiles of `patches` patches."""

    encoder: Encoder
    patches: int

    def beside(self, sizes: Sizes, pool: Pool, device: Device) -> Sizes:
        """The sizes of a replica whose first stage has the encoder and a full batch on every device."""
        precision = precision_on(device)
        first, *others = sizes.stages
        more = self.encoder.weights_bytes(precision)
        more += pool.batch_tiles * self.encoder.tile_bytes(self.patches, precision)
        return replace(sizes, stages=((first[0] + more, first[1]), *others))

    def own(self, pool: Pool, device: Device, cost: CostModel, engine: Engine, *, with_work: bool) -> OwnEncoder:
        """The encoder of a replica that encodes for itself, whole on each of its tensor-parallel ranks.

        cost   prices of one device alone
        """
        precision = precision_on(device)
        times = encode_times_s(self.encoder, self.patches, cost, engine, pool.batch_tiles, precision)
        return OwnEncoder(times, pool.batch_tiles, pool.tp, self._works(pool, precision) if with_work else None)

    def workers(
        self,
        plan: Plan,
        pool: Pool,
        clusters: ByName[str, Cluster],
        cost: CostModel,
        engine: Engine,
        *,
        with_work: bool,
    ) -> EncodeSpec:
        """The plan's encode pool; each worker pushes as fast as the slowest way from one to a replica that prefills.

        cost   prices of one of its devices

        Raises OutOfMemoryError where a batch does not fit beside the encoder.
        """
        device = clusters[plan.hardware_of(pool)].device
        precision = precision_on(device)
        most = most_tiles(self.encoder, self.patches, device, engine, precision)
        if most < pool.batch_tiles:
            room = f"expected batch_tiles of at most {most}" if most > 0 else "expected a larger device"
            raise OutOfMemoryError(
                f"{self.encoder.name} with {pool.batch_tiles} tiles of {self.patches} patches on {device.name}: {room}"
            )
        rate, latency_s = _link(plan, clusters)
        return EncodeSpec(
            times_s=encode_times_s(self.encoder, self.patches, cost, engine, pool.batch_tiles, precision),
            workers=pool.replicas,
            batch_tiles=pool.batch_tiles,
            shards=pool.spread or pool.replicas,
            tile_bytes=self.encoder.token_bytes(self.patches, precision),
            bytes_per_s=rate,
            latency_s=latency_s,
            device=device,
            arithmetic_dtype=precision.activations,
            works=self._works(pool, precision) if with_work else None,
        )

    def _works(self, pool: Pool, precision: Precision) -> list[tuple[float, float]]:
        return [encode_work(self.encoder, tiles, self.patches, precision) for tiles in range(pool.batch_tiles + 1)]


def vision_of(plan: Plan, image: Cut | None = None) -> Vision | None:
    """The plan's encoder, for images that are cut like this; None for a plan without one.

    image   None for a small one of a single tile

    Raises ProfileError for an unknown encoder.
    """
    if plan.encoder is None:
        return None
    encoder = load_encoder(plan.encoder)
    side = encoder.tiling.tile_px
    return Vision(encoder, (image or encoder.cut(side, side)).patches)


def precision_on(device: Device) -> Precision:
    """What an encoder runs in there; raises MappingError for a device that multiplies in none of FORMATS."""
    for name in FORMATS:
        if name in device.peak_flops_per_s:
            return Precision(name, name, name)
    raise MappingError(f"encoder on {device.name}: expected a device that multiplies in one of {', '.join(FORMATS)}")


def encoder_note(plan: Plan, model: ModelShape) -> str | None:
    """What is odd about the encoder of this model; None if nothing is."""
    if plan.encoder is None:
        return None
    encoder = load_encoder(plan.encoder)
    if encoder.llm_hidden == model.hidden:
        return None
    return (
        f"encoder {encoder.name} makes tokens of width {encoder.llm_hidden} for {encoder.repository}; {model.name} is "
        f"{model.hidden} wide and could not take them as they are"
    )


def without_encode(plan: Plan) -> Plan:
    """The plan as far as the language model goes; its replicas are placed as if nobody else were there."""
    return plan if plan.encode_pool is None else replace(plan, pools=plan.serving)


def _link(plan: Plan, clusters: ByName[str, Cluster]) -> tuple[float, float]:
    """Bytes/s and latency in seconds of the slowest way from an encode worker to a replica that prefills.

    Workers get the devices that the replicas leave.
    """
    names = list(clusters)
    network = Interconnect([clusters[name] for name in names])
    encode = tuple(pool for pool in plan.pools if pool.role == "encode")
    pools = [pool for pool in (*plan.serving, *encode) for _ in range(pool.replicas)]
    places = placed(replace(plan, pools=(*plan.serving, *encode)), clusters)
    firsts = [network.firsts[names.index(name)] + devices[0] for name, devices in places]
    sources = [first for pool, first in zip(pools, firsts, strict=True) if pool.role == "encode"]
    targets = [first for pool, first in zip(pools, firsts, strict=True) if pool.role not in ("encode", "decode")]
    pairs = [(source, target) for source in sources for target in targets]
    rate = min(network.bytes_per_s[link] for pair in pairs for link in network.way(*pair))
    return float(rate), max(network.latency_s(*pair) for pair in pairs)
