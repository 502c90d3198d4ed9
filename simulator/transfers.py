"""Over which links, and in how many bytes and messages, does a request's KV move between two replicas or to a store?

A replica's KV is cut by layers over its pipeline stages, by heads over its tensor-parallel ranks, and over its
context-parallel ones by tokens, page by page in turn, or with Ulysses by heads. A move pairs every receiving rank with
ranks that hold what it needs; all pairs move together and are one flow of `simulator.flows`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, lcm

from hwmodels.errors import MappingError, ShardwiseError
from hwmodels.interconnect import Interconnect, Way
from hwmodels.mapping import DTYPE_BYTES, Mapping
from hwmodels.operators import kv_heads_per_rank
from hwmodels.shape import Attention, Layer, ModelShape
from hwmodels.step_model import stage_layers


class TransferError(ShardwiseError):
    """Two places that cannot exchange KV."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class TransferEngine:
    """What the software that moves KV adds to the links.

    setup_s      of each transfer
    layer_s      of each layer of the busiest sender
    message_s    of each message of the busiest sender, one contiguous piece of one rank's cache
    efficiency   fraction a single transfer reaches of what the narrowest of its links carries, in (0, 1]
    """

    name: str
    source: str
    setup_s: float = 0.0
    layer_s: float = 0.0
    message_s: float = 0.0
    efficiency: float = 1.0


@dataclass(frozen=True, slots=True)
class KvSide:
    """Where a request's KV lies, or is to lie: one attention-data-parallel group of one replica.

    devices        of the whole replica in rank order (see Mapping), as numbers of the Interconnect
    group          which of the mapping's attention_dp groups
    kv             number format of the cache; block_tokens: tokens of one of its blocks
    """

    devices: tuple[int, ...]
    mapping: Mapping
    kv: str = "bf16"
    block_tokens: int = 16
    group: int = 0

    def __post_init__(self) -> None:
        if len(self.devices) != self.mapping.gpus or len(set(self.devices)) != len(self.devices):
            raise TransferError(
                f"{len(self.devices)} devices of a replica of {self.mapping.gpus}: expected a different one for each"
            )
        if not 0 <= self.group < self.mapping.attention_dp:
            raise TransferError(f"group {self.group}: expected one of {self.mapping.attention_dp}")

    def parts(self, stage: int) -> list[list[int]]:
        """Devices of a pipeline stage by the tokens they keep, each list in the order of the heads.

        Every list keeps as many tokens as the others: cp lists of tp devices, or, with Ulysses, one list of all.

        >>> KvSide((0, 1, 2, 3), Mapping(tp=2, cp=2)).parts(0)
        [[0, 1], [2, 3]]
        >>> KvSide((0, 1, 2, 3), Mapping(tp=2, cp=2, cp_kind="ulysses")).parts(0)
        [[0, 2, 1, 3]]
        """
        tp, cp = self.mapping.tp, self.mapping.cp
        first = (stage * self.mapping.attention_dp + self.group) * cp * tp
        found = [list(self.devices[start : start + tp]) for start in range(first, first + cp * tp, tp)]
        if cp == 1 or self.mapping.cp_kind != "ulysses":
            return found
        return [[part[rank] for rank in range(tp) for part in found]]


@dataclass(frozen=True, slots=True)
class Route:
    """How KV moves, as a flow: `flows.start(at_s + route.delay_s(tokens), route.links, route.nbytes(tokens), ...)`.

    links, shares              links and the fraction of the bytes over each
    weight                     pairs of devices that send at the same time
    latency_s                  from the start until bytes move, whatever their number
    bytes_per_token            on the wire; more than the model's where a head goes to several ranks
    bottleneck_bytes_per_s     of the whole move when alone, inf where nothing leaves a device
    limit_bytes_per_s          the most the software moves of it
    layers                     of the model, all stages
    messages_per_block         of the busiest sender, for one block of `block_tokens` tokens; message_s: cost of each
    """

    links: Way
    shares: tuple[float, ...]
    weight: float
    latency_s: float
    bytes_per_token: float
    bottleneck_bytes_per_s: float
    limit_bytes_per_s: float
    layers: int
    block_tokens: int
    messages_per_block: float
    message_s: float

    def nbytes(self, tokens: int) -> float:
        """Bytes of `tokens` tokens."""
        return tokens * self.bytes_per_token

    def messages(self, tokens: int) -> float:
        """Messages of the busiest sender; a block that is not full is one like the others."""
        return ceil(tokens / self.block_tokens) * self.messages_per_block

    def delay_s(self, tokens: int) -> float:
        """From the start until the bytes of `tokens` tokens move."""
        return self.latency_s + self.message_s * self.messages(tokens)

    def alone_s(self, tokens: int) -> float:
        """From the start until all is there when nothing else is on the links."""
        return self.delay_s(tokens) + self.nbytes(tokens) / min(self.bottleneck_bytes_per_s, self.limit_bytes_per_s)


#: Software that costs nothing: what the links alone allow.
IDEAL = TransferEngine("ideal", "no cost at all")
#: Fitted to nine transfers each of Mooncake's published tables, by planner.validation.kvtransfer.fit_line, with the
#: links of the profile hgx-h20 (25 GB/s per device, of which 0.9): the delay per layer, and the rate over theirs. The
#: tables cannot tell a cost per message from a lower rate, as both grow with the tokens; it is in the efficiency.
MOONCAKE_VLLM = TransferEngine(
    "vLLM 0.11.2 with MooncakeConnector",
    "Mooncake docs/source/performance/vllm/vllm-v1-pd-performance.md: Qwen3-8B, TP 8 to TP 8, 8 x 200 Gb/s RoCE",
    layer_s=10.5e-6,
    efficiency=0.812,
)
MOONCAKE_SGLANG = TransferEngine(
    "SGLang with Mooncake transfer engine",
    "Mooncake docs/source/performance/sglang/sglang-benchmark-results-v1.md: Qwen3-235B-A22B, 4 x 400 Gb/s RoCE",
    layer_s=19.5e-6,
    efficiency=0.950,
)


@dataclass(frozen=True, slots=True)
class Push:
    """A prompt's (or a chunk's) KV sent layer by layer while it is computed, as two flows one after the other.

    earliest_s      after the beginning of the computation: the first layer's KV is there
    early_bytes     of all layers but the last, at most limit_bytes_per_s, the rate at which they are computed
    tail_bytes      of the last layer, when the computation has ended and the early bytes have arrived
    """

    earliest_s: float
    early_bytes: float
    limit_bytes_per_s: float
    tail_bytes: float

    def end_s(self, compute_s: float, bytes_per_s: float) -> float:
        """When the last byte arrives after the beginning, at a fixed rate of the links and without latency."""
        early_s = self.earliest_s + self.early_bytes / min(bytes_per_s, self.limit_bytes_per_s)
        return max(compute_s, early_s) + self.tail_bytes / bytes_per_s


def layer_wise(nbytes: float, layers: int, compute_s: float) -> Push:
    """How `nbytes` of KV of `layers` equal layers, computed in `compute_s`, may be sent while they are computed.

    >>> layer_wise(80.0, 80, 4.0)
    Push(earliest_s=0.05, early_bytes=79.0, limit_bytes_per_s=20.0, tail_bytes=1.0)
    """
    limit = nbytes / compute_s if compute_s else inf
    return Push(compute_s / layers, nbytes - nbytes / layers, limit or inf, nbytes / layers)


class Routes:
    """The routes between the sides of one model, each worked out once.

    Arguments as of kv_route; `between` raises TransferError for a pair that cannot exchange KV.
    """

    def __init__(
        self,
        network: Interconnect,
        model: ModelShape,
        sides: Sequence[KvSide],
        engine: TransferEngine = IDEAL,
        *,
        convert: bool = False,
    ) -> None:
        self.network, self.model, self.sides, self.engine = network, model, tuple(sides), engine
        self._convert = convert
        self._routes: dict[tuple[int, int], Route] = {}

    def between(self, source: int, target: int) -> Route:
        """From one of the sides to another, by their places among them."""
        route = self._routes.get((source, target))
        if route is None:
            route = self._routes[source, target] = kv_route(
                self.network,
                self.model,
                self.sides[source],
                self.sides[target],
                self.engine,
                convert=self._convert,
            )
        return route


def kv_route(
    network: Interconnect,
    model: ModelShape,
    source: KvSide,
    target: KvSide,
    engine: TransferEngine = IDEAL,
    *,
    convert: bool = False,
) -> Route:
    """The route of a request's KV from one replica to another.

    convert   blocks are cut or joined and numbers rewritten on the way where the caches differ: the narrower format
              crosses the links, in pieces of the smaller block

    Raises TransferError where the caches differ and are not converted, or the devices are not joined.
    """
    if not convert and source.kv != target.kv:
        raise TransferError(
            f"KV in {source.kv} to a cache in {target.kv}: expected one format; give both pools the same, or convert"
        )
    if not convert and source.block_tokens != target.block_tokens:
        raise TransferError(
            f"KV blocks of {source.block_tokens} tokens to a cache of {target.block_tokens}: expected one size; give "
            "both pools the same, or convert"
        )
    element = min(DTYPE_BYTES[source.kv], DTYPE_BYTES[target.kv])
    block = min(source.block_tokens, target.block_tokens)
    pieces: defaultdict[tuple[int, int], float] = defaultdict(float)
    messages: defaultdict[int, float] = defaultdict(int)
    layers: Counter[int] = Counter()
    for attention, sender, receiver, count in _layers_in_common(model, source.mapping, target.mapping):
        have, need = source.parts(sender), target.parts(receiver)
        turns = lcm(len(have), len(need))  # pages whose number leaves the same rest lie on the same parts of both sides
        senders = set()
        for turn in range(turns):
            pairs = _exchange(
                network, attention, have[turn % len(have)], need[turn % len(need)], target.group + turn // len(need)
            )
            for (a, b), heads in pairs.items():
                pieces[a, b] += count * heads * element * _width(attention) / turns
                # Keys and values lie apart, a latent in one piece; heads that a pair exchanges of a block lie together.
                each = count * (1 if attention.latent is not None else 2)
                messages[a] += each if turns == 1 else each / turns
            senders |= {a for a, _ in pairs}
        for device in senders:
            layers[device] += count
    return _route(
        network,
        dict(pieces),
        engine,
        layers=len(model.layers),
        busiest=max(layers.values()),
        block=block,
        messages=max(messages.values()),
    )


def store_route(
    network: Interconnect,
    model: ModelShape,
    side: KvSide,
    store: str,
    *,
    load: bool,
    engine: TransferEngine = IDEAL,
) -> Route:
    """The route of a request's KV between a replica and a store: 'host' memory, 'ssd' or 'remote'.

    load   from the store; else to it. What several ranks have is stored once and loaded by each of them.

    Raises TransferError for an unknown store or one the network does not have.
    """
    ways = {
        "host": (network.to_host, network.from_host),
        "ssd": (network.to_ssd, network.from_ssd),
        "remote": (network.to_remote, network.from_remote),
    }
    if store not in ways:
        raise TransferError(f"store {store!r}: expected one of {', '.join(ways)}")
    element = DTYPE_BYTES[side.kv]
    pieces: defaultdict[int, float] = defaultdict(float)
    messages: defaultdict[int, float] = defaultdict(int)
    layers: Counter[int] = Counter()
    for stage, own in enumerate(stage_layers(model, side.mapping)):
        parts = side.parts(stage)
        for layer, count in Counter(own).items():
            attention, ranks = layer.attention, len(parts[0])
            units = 1 if attention.latent is not None else kv_heads_per_rank(attention, ranks)
            kept = ranks if load else (1 if attention.latent is not None else attention.kv_heads // units)
            for device in (part[place * ranks // kept] for part in parts for place in range(kept)):
                pieces[device] += count * units * element * _width(attention) / len(parts)
                each = count * (1 if attention.latent is not None else 2)
                messages[device] += each if len(parts) == 1 else each / len(parts)
                layers[device] += count
    try:
        found = {(device, -1): ways[store][load](device) for device in pieces}
    except MappingError as error:
        raise TransferError(str(error)) from error
    return _route(
        network,
        {(device, -1): nbytes for device, nbytes in pieces.items()},
        engine,
        layers=len(model.layers),
        busiest=max(layers.values()),
        block=side.block_tokens,
        messages=max(messages.values()),
        ways=found,
    )


def _layers_in_common(model: ModelShape, source: Mapping, target: Mapping) -> list[tuple[Attention, int, int, int]]:
    """(attention, stage that has it, stage that needs it, how many layers) over all layers of the model."""

    def stages(mapping: Mapping) -> list[int]:
        cut: list[tuple[Layer, ...]] = stage_layers(model, mapping)
        return [stage for stage, own in enumerate(cut) for _ in own]

    counts = Counter(zip((layer.attention for layer in model.layers), stages(source), stages(target), strict=True))
    return [(*key, count) for key, count in counts.items()]


def _width(attention: Attention) -> int:
    """Numbers one token leaves in one head's cache, or in the latent of all."""
    if attention.latent is not None:
        return attention.latent.kv_rank + attention.latent.rope_dim
    return attention.head_dim + attention.value_dim


def _exchange(
    network: Interconnect, attention: Attention, have: list[int], need: list[int], turn: int
) -> Counter[tuple[int, int]]:
    """KV heads that each device of a stage sends to each of another; a latent counts as one head that all have.

    Of several that keep a head, the one that has sent least so far does; then the one on the receiver's rail; then
    they take turns, beginning with number `turn`.
    """
    heads = 1 if attention.latent is not None else attention.kv_heads
    sent: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    for head in range(heads):
        keepers, receivers = (_keepers(head, heads, devices) for devices in (have, need))
        for place, receiver in enumerate(receivers):
            first = (place * len(keepers) // len(receivers) + turn) % len(keepers)
            rail = network.local(receiver)
            in_turn = keepers[first:] + keepers[:first]
            sender = min(in_turn, key=lambda device: (sent[device], network.local(device) != rail))
            sent[sender] += 1
            pairs[sender, receiver] += 1
    return pairs


def _keepers(head: int, heads: int, devices: list[int]) -> list[int]:
    """Devices of a stage that keep a KV head: one, or as many copies as there are devices for each head."""
    first = head * len(devices) // heads
    return devices[first : max(first + 1, (head + 1) * len(devices) // heads)]


def _route(
    network: Interconnect,
    pieces: dict[tuple[int, int], float],
    engine: TransferEngine,
    *,
    layers: int,
    busiest: int,
    block: int,
    messages: float,
    ways: dict[tuple[int, int], Way] | None = None,
) -> Route:
    """One flow of all pieces: (sender, receiver) and bytes per token of each."""
    total = sum(pieces.values())
    loads: defaultdict[int, float] = defaultdict(float)
    streams, latency = 0, 0.0
    for (a, b), nbytes in pieces.items():
        if ways is not None:
            way = ways[a, b]
        else:
            try:
                way = network.way(a, b)
            except MappingError as error:
                raise TransferError(str(error)) from error
            latency = max(latency, network.latency_s(a, b))
        streams += bool(way)
        for link in way:
            loads[link] += nbytes / total
    bottleneck = min((float(network.bytes_per_s[link]) / share for link, share in loads.items()), default=inf)
    return Route(
        links=tuple(loads),
        shares=tuple(loads.values()),
        weight=float(max(streams, 1)),
        latency_s=latency + (engine.setup_s + engine.layer_s * busiest if streams else 0.0),
        bytes_per_token=total,
        bottleneck_bytes_per_s=bottleneck,
        limit_bytes_per_s=engine.efficiency * bottleneck,
        layers=layers,
        block_tokens=block,
        messages_per_block=float(messages),
        message_s=engine.message_s,
    )
