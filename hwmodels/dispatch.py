"""How long do expert-parallel ranks take to send tokens to their experts and the results back?

An exchange is traffic on the cluster graph: how many copies of a token each rank sends to each other, over which links,
and what the kernel that moves them adds. The graph says which link is slowest; a kernel has a handful of constants,
fitted to published tables (tests/published/test_deepep.py fits them again and predicts the rows left out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, gammaln

from hwmodels.errors import MappingError
from hwmodels.hardware import Cluster
from hwmodels.mapping import DTYPE_BYTES
from hwmodels.routing import rank_shares
from hwmodels.topology import Topology, topology

Array = NDArray[np.float64]
Mode = Literal["best", "low-latency", "normal", "nvlink"]

#: Bytes beside each element in 8 bit: one fp32 scale per 128 (DeepSeek-V3, arXiv:2412.19437, section 3.3.2).
SCALE_BYTES = 4 / 128
#: Ranks up to which all pairs are followed over the graph.
MAX_RANKS = 1024


@dataclass(frozen=True, slots=True)
class Kernel:
    """A dispatch and combine kernel; pairs are (dispatch, combine).

    per_rank     one copy of a token for each rank that holds chosen experts; otherwise one for each chosen expert
    forwards     one copy per node over the rail, which the device there passes on inside its node
    start_s      with nothing to move, inside one node; level_s more for each doubling of the nodes
    floor_s      no exchange is faster: starting that small transfers hide behind
    inside       rate reached on links inside nodes, over what the cluster's profile says they reach; between nodes
                 kernels reach the profile's rate
    """

    name: str
    per_rank: bool
    forwards: bool
    start_s: tuple[float, float]
    level_s: float
    floor_s: tuple[float, float]
    inside: tuple[float, float]
    source: str


LOW_LATENCY = Kernel(
    "low-latency", per_rank=False, forwards=False,
    start_s=(11.4e-6, 11.4e-6), level_s=4.8e-6, floor_s=(0.0, 0.0), inside=(0.754, 0.627),
    source="DeepEP's low-latency kernels: its README's table (H800, 16 and 256 ranks) and timings of SGLang's on H200 "
    "(8 and 64 ranks; aiconfigurator-core 0.12.0)",
)  # fmt: skip
NORMAL = Kernel(
    "normal", per_rank=True, forwards=True,
    start_s=(25.9e-6, 49.2e-6), level_s=35e-6, floor_s=(0.0, 0.0), inside=(0.872, 0.872),
    source="DeepEP's normal kernels: its README's table (H800, 8 and 64 ranks) and timings of up to 32 tokens of "
    "SGLang's with 20 SMs on H200 (8 and 16 ranks; aiconfigurator-core 0.12.0)",
)  # fmt: skip
NVLINK = Kernel(
    "nvlink", per_rank=False, forwards=False,
    start_s=(12.6e-6, 12.6e-6), level_s=0.0, floor_s=(18.3e-6, 32.4e-6), inside=(0.942, 0.942),
    source="TensorRT-LLM's all-to-all on GB200 NVL72, published table, 8 ranks",
)  # fmt: skip
KERNELS = {kernel.name: kernel for kernel in (LOW_LATENCY, NORMAL, NVLINK)}
#: Devices of a node beyond which it is one of NVLink alone, whose engines bring the kernel 'nvlink'.
BOARD = 8


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """What is exchanged.

    hidden, top_k, experts   of the expert block
    dispatch, combine        number formats on the wire; 8-bit ones bring their scales
    max_nodes                nodes a token may go to, with all its experts there (DeepSeek-V3: 4); None for any
    shares                   of the choices of each source rank's tokens, those that fall on each destination rank
                             (one row per source, each adding up to 1), or one row for all sources; None for even ones
    """

    hidden: int
    top_k: int
    experts: int
    dispatch: str = "fp8"
    combine: str = "bf16"
    max_nodes: int | None = None
    shares: Array | None = None

    def __post_init__(self) -> None:
        """Raise MappingError for numbers that no expert block has."""
        if not 1 <= self.top_k <= self.experts or self.hidden < 1:
            raise MappingError(
                f"top_k {self.top_k} of {self.experts} experts, hidden {self.hidden}: expected 1 <= top_k <= experts "
                "and a positive width"
            )
        if self.max_nodes is not None and self.max_nodes < 1:
            raise MappingError(f"max_nodes = {self.max_nodes}: expected at least 1, or None for any")
        for dtype in (self.dispatch, self.combine):
            if dtype not in DTYPE_BYTES:
                raise MappingError(f"number format {dtype!r}: expected one of {', '.join(DTYPE_BYTES)}")

    @property
    def widths(self) -> tuple[float, float]:
        """Bytes of one copy of a token: dispatched, combined."""
        sizes = [DTYPE_BYTES[dtype] + (SCALE_BYTES if DTYPE_BYTES[dtype] == 1 else 0.0)
                 for dtype in (self.dispatch, self.combine)]  # fmt: skip
        return self.hidden * sizes[0], self.hidden * sizes[1]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Dispatch and combine over a fixed group, by one kernel; pairs are (dispatch, combine).

    start_s, floor_s      without tokens, and at least
    inside_s, between_s   for each token of a rank: of the slowest link inside nodes, and of that between them, which
                          work at the same time
    links                 the link that is slowest in each phase
    """

    kernel: str
    start_s: tuple[float, float]
    floor_s: tuple[float, float]
    inside_s: tuple[float, float]
    between_s: tuple[float, float]
    links: tuple[str, str]

    def dispatch_s(self, tokens: ArrayLike) -> Array:
        """Seconds until every rank has its rows when each had `tokens` tokens; 0 for none."""
        return self._time_s(0, tokens)

    def combine_s(self, tokens: ArrayLike) -> Array:
        """Seconds until every rank has its tokens' results back."""
        return self._time_s(1, tokens)

    def _time_s(self, phase: int, tokens: ArrayLike) -> Array:
        n: Array = np.asarray(tokens, dtype=np.float64)
        if not self.start_s[phase]:
            return np.zeros_like(n)
        slowest = max(self.inside_s[phase], self.between_s[phase])
        taken = np.maximum(self.floor_s[phase], self.start_s[phase] + n * slowest)
        return np.where(n > 0, taken, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Phases:
    """Seconds of one exchange by phase, the kernel that is fastest at each size, and its slowest link in each phase."""

    dispatch_s: Array
    combine_s: Array
    kernel: NDArray[np.str_]
    links: tuple[NDArray[np.str_], NDArray[np.str_]]

    def link(self, phase: str) -> NDArray[np.str_]:
        """The slowest link of 'dispatch' or 'combine' at each size."""
        return self.links[phase == "combine"]

    @property
    def total_s(self) -> Array:
        """Both phases."""
        return self.dispatch_s + self.combine_s


def exchange_s(
    cluster: Cluster,
    ranks: Sequence[int],
    tokens: ArrayLike,
    routed: Routed,
    mode: Mode = "best",
    layers: Array | None = None,
) -> Phases:
    """Dispatch and combine of `tokens` tokens on each of `ranks`; nothing where one rank holds all experts.

    mode     a kernel, or the faster of those that engines choose from on the cluster
    layers   [layers, ranks] shares of the choices on each rank in several layers, whose mean time is taken; None: those
             of `routed`

    Raises MappingError for an unknown mode, ranks the cluster does not have or cannot join, and impossible shares.
    """
    if mode != "best" and mode not in KERNELS:
        raise MappingError(f"exchange mode {mode!r}: expected one of best, {', '.join(KERNELS)}")
    kernels = kernels_of(cluster) if mode == "best" else (KERNELS[mode],)
    blocks = [routed] if layers is None else [replace(routed, shares=shares) for shares in layers]
    found = [[compile_exchange(cluster, tuple(ranks), block, kernel) for block in blocks] for kernel in kernels]
    dispatch = np.stack([np.mean([exchange.dispatch_s(tokens) for exchange in each], axis=0) for each in found])
    combine = np.stack([np.mean([exchange.combine_s(tokens) for exchange in each], axis=0) for each in found])
    best = (dispatch + combine).argmin(axis=0)[None]
    return Phases(
        np.take_along_axis(dispatch, best, 0)[0],
        np.take_along_axis(combine, best, 0)[0],
        np.array([kernel.name for kernel in kernels])[best[0]],
        (
            np.array([each[0].links[0] for each in found])[best[0]],
            np.array([each[0].links[1] for each in found])[best[0]],
        ),
    )


def kernels_of(cluster: Cluster) -> tuple[Kernel, ...]:
    """Those an engine chooses from: DeepEP's for few tokens and for many, or that of racks joined by NVLink."""
    return (NVLINK,) if cluster.gpus_per_node > BOARD else (LOW_LATENCY, NORMAL)


def compile_exchange(cluster: Cluster, ranks: tuple[int, ...], routed: Routed, kernel: Kernel) -> Exchange:
    """The exchange by one kernel. Raises as exchange_s."""
    shares = None if routed.shares is None else np.ascontiguousarray(routed.shares, dtype=np.float64)
    key = (routed.hidden, routed.top_k, routed.experts, routed.dispatch, routed.combine, routed.max_nodes)
    return _compiled(cluster, ranks, key, None if shares is None else (shares.shape, shares.tobytes()), kernel)


@lru_cache(maxsize=4096)
def _compiled(
    cluster: Cluster,
    ranks: tuple[int, ...],
    key: tuple[int, int, int, str, str, int | None],
    shares: tuple[tuple[int, ...], bytes] | None,
    kernel: Kernel,
) -> Exchange:
    drawn = None if shares is None else np.frombuffer(shares[1]).reshape(shares[0])
    return _compile(cluster, ranks, Routed(*key, shares=drawn), kernel)


def _compile(cluster: Cluster, ranks: tuple[int, ...], routed: Routed, kernel: Kernel) -> Exchange:
    copies = copies_per_token(cluster, ranks, routed)
    if len(ranks) == 1:
        return Exchange(kernel.name, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), ("none", "none"))
    links = topology(cluster)
    members = np.array(ranks, dtype=np.int64)
    levels = float(np.log2(len(np.unique(links.node[members]))))
    flows = _forwarded(links, members, copies) if kernel.forwards else _direct(members, copies, kernel.per_rank)
    outside = _outside(cluster)
    inside, between, names = [], [], []
    for phase, width in enumerate(routed.widths):
        loads: Array = np.zeros(len(links.bytes_per_s))
        for src, dst, amount in flows:
            ends = (src, dst) if phase == 0 else (dst, src)  # results come back on the way the tokens went
            loads += links.loads(*ends, amount * width)
        near, far = (links.bottleneck(np.where(outside == out, loads, 0.0)) for out in (False, True))
        inside.append(near.seconds / kernel.inside[phase])
        between.append(far.seconds)
        names.append(near.link if inside[phase] > between[phase] else far.link)
    return Exchange(
        kernel.name,
        (kernel.start_s[0] + levels * kernel.level_s, kernel.start_s[1] + levels * kernel.level_s),
        kernel.floor_s,
        (inside[0], inside[1]),
        (between[0], between[1]),
        (names[0], names[1]),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Expected copies of one token of each source rank (rows); a rank's own share is included.

    picks   chosen experts on each rank: rows add up to top_k
    ranks   probability that the rank holds any chosen expert
    nodes   probability that the node does; columns are the nodes of the group, in order
    node_of position of each rank's node among them
    """

    picks: Array
    ranks: Array
    nodes: Array
    node_of: NDArray[np.int64]


def copies_per_token(cluster: Cluster, ranks: Sequence[int], routed: Routed) -> Copies:
    """How many copies of a token each rank and node gets.

    Even routing draws top_k different experts, exactly (hypergeometric). With shares, choices count as independent:
    a rank of share p gets a copy with probability 1 - (1 - p)^top_k. Node-limited routing draws its nodes first and the
    experts among theirs; with shares, its copies are those without the limit, reduced as for even routing.

    Raises MappingError for ranks the cluster does not have and shares of another shape.
    """
    members = np.asarray(ranks, dtype=np.int64)
    if (
        not len(members)
        or len(np.unique(members)) != len(members)
        or members.min() < 0
        or members.max() >= cluster.gpus
    ):
        raise MappingError(
            f"{len(members)} ranks: expected different devices from 0 to {cluster.gpus - 1} of {cluster.name}"
        )
    if len(members) > MAX_RANKS:
        raise MappingError(f"exchange between {len(members)} ranks: expected at most {MAX_RANKS}; use a smaller group")
    n, k = len(members), routed.top_k
    _, node_of = np.unique(members // cluster.gpus_per_node, return_inverse=True)
    sizes = np.bincount(node_of)
    count = len(sizes)
    limit = min(routed.max_nodes or count, count)
    reachable = limit / count
    of_rank = _touched(routed.experts, routed.experts / n, k)
    ratio_rank = reachable * _touched(routed.experts * reachable, routed.experts / n, k) / of_rank
    if routed.shares is None:
        even = routed.experts * sizes / n
        nodes = np.array([reachable * _touched(routed.experts * reachable, float(e), k) for e in even])
        return Copies(
            np.full((n, n), k / n),
            np.full((n, n), of_rank * ratio_rank),
            np.broadcast_to(np.minimum(nodes, 1.0), (n, count)).copy(),
            node_of,
        )
    shares = _checked(routed.shares, n)
    by_node = np.stack([shares[:, node_of == node].sum(axis=1) for node in range(count)], axis=1)
    ratio_node = _touched_nodes(routed.experts, limit, count, k) / _touched_nodes(routed.experts, count, count, k)
    return Copies(
        k * shares,
        -np.expm1(k * np.log1p(-np.minimum(shares, 1 - 1e-12))) * ratio_rank,
        -np.expm1(k * np.log1p(-np.minimum(by_node, 1 - 1e-12))) * ratio_node,
        node_of,
    )


def _checked(shares: Array, n: int) -> Array:
    """Shares as a square matrix. Raises MappingError where they are none."""
    found = np.asarray(shares, dtype=float)
    shaped = found.shape in ((n,), (1, n), (n, n))
    if not shaped or not (found >= 0).all() or not np.allclose(found.sum(axis=-1), 1.0, atol=1e-6):
        raise MappingError(
            f"shares of shape {found.shape}: expected a row of {n}, or {n} of them, of values >= 0 that add up to 1"
        )
    square: Array = np.broadcast_to(found, (n, n))
    return square


def _touched(experts: float, here: float, top_k: int) -> float:
    """Probability that `top_k` different experts out of `experts` include any of the `here` on one place.

    >>> round(_touched(256, 32, 8), 3)  # 1 - (224 choose 8) / (256 choose 8)
    0.662
    """
    others = experts - here
    if others < top_k:
        return 1.0
    none = gammaln(others + 1) - gammaln(others - top_k + 1) - gammaln(experts + 1) + gammaln(experts - top_k + 1)
    return float(-np.expm1(none))


def _touched_nodes(experts: int, limit: int, count: int, top_k: int) -> float:
    """Expected nodes with a chosen expert when `limit` of `count` equal ones are allowed."""
    return limit * _touched(experts * limit / count, experts / count, top_k)


Flow = tuple[NDArray[np.int64], NDArray[np.int64], Array]


def _direct(members: NDArray[np.int64], copies: Copies, per_rank: bool) -> list[Flow]:
    """Every copy straight from its rank to where it is needed."""
    i, j = np.nonzero(~np.eye(len(members), dtype=bool))
    amount = copies.ranks if per_rank else copies.picks
    return [(members[i], members[j], amount[i, j])]


def _forwarded(links: Topology, members: NDArray[np.int64], copies: Copies) -> list[Flow]:
    """One copy per node to the device there at the sender's position, and from it to the ranks of that node.

    Where the group does not hold that position, the next of its ranks on the node takes its place.
    """
    node_of = copies.node_of
    by_node = [np.flatnonzero(node_of == node) for node in range(int(node_of.max()) + 1)]
    place: NDArray[np.int64] = np.zeros(len(members), dtype=np.int64)
    for ranks in by_node:
        place[ranks] = np.arange(len(ranks))
    between: list[Flow] = []
    passed: Array = np.zeros((len(members), len(members)))
    for node, ranks in enumerate(by_node):
        away = np.flatnonzero(node_of != node)
        forwarder = ranks[place[away] % len(ranks)]
        between.append((members[away], members[forwarder], copies.nodes[away, node]))
        np.add.at(passed, np.ix_(forwarder, ranks), copies.ranks[np.ix_(away, ranks)])
        passed[np.ix_(ranks, ranks)] += copies.ranks[np.ix_(ranks, ranks)]
    i, j = np.nonzero((passed > 0) & ~np.eye(len(members), dtype=bool))
    return [flow for flow in between if len(flow[0])] + [(members[i], members[j], passed[i, j])]


@lru_cache(maxsize=64)
def _outside(cluster: Cluster) -> NDArray[np.bool_]:
    """Which edges of the cluster's graph are between nodes."""
    links = topology(cluster)
    found: NDArray[np.bool_] = np.zeros(len(links.bytes_per_s), dtype=bool)
    for a, b, data in links.graph.edges(data=True):
        found[data["index"]] = any(end.startswith(("nic", "leaf", "spine")) for end in (a, b))
    return found


def pair_bytes(
    cluster: Cluster, ranks: Sequence[int], tokens: float, routed: Routed, *, per_rank: bool = False
) -> Array:
    """Bytes each rank (row) sends to each other (column) to dispatch `tokens` tokens of every rank.

    per_rank   one copy for a rank with several of a token's experts; otherwise one per expert. The diagonal, what a
               rank keeps, is 0.
    """
    copies = copies_per_token(cluster, ranks, routed)
    sent = tokens * routed.widths[0] * (copies.ranks if per_rank else copies.picks)
    np.fill_diagonal(sent, 0.0)
    return sent


def rail_copies(cluster: Cluster, ranks: Sequence[int], routed: Routed) -> float:
    """Copies of a token that leave its node when each node gets one, mean over the ranks."""
    copies = copies_per_token(cluster, ranks, routed)
    own = copies.nodes[np.arange(len(copies.nodes)), copies.node_of]
    return float((copies.nodes.sum(axis=1) - own).mean())


def shares_of(loads: ArrayLike, placement: Sequence[Sequence[int]], ranks: int) -> Array:
    """Share of a layer's choices on each of `ranks` ranks.

    loads       of each expert, in any unit
    placement   ranks that hold each expert; replicas take equal parts of its tokens

    Raises RoutingError for experts that nobody holds and ranks that are not there, MappingError for loads that are
    none.
    """
    weights: Array = np.asarray(loads, dtype=float)
    if weights.ndim != 1 or not (weights >= 0).all() or not weights.sum() > 0:
        raise MappingError(f"loads of shape {weights.shape}: expected one value >= 0 for each expert, not all 0")
    share: Array = rank_shares(weights, placement, ranks) @ weights / weights.sum()
    return share


def dropped_tokens(tokens: ArrayLike, shares: ArrayLike, top_k: int, capacity_factor: float | None) -> Array:
    """Expected choices that find their expert full, of `tokens` tokens together; None: dropless.

    shares   of the choices on each expert, adding up to 1; even routing: 1 / experts each

    An expert takes ceil(capacity_factor * tokens * top_k / experts) rows (GShard, arXiv:2006.16668, section 2.2). Its
    rows are binomial in (tokens, top_k * share), so the expected excess over c is
    n p P(Bin(n - 1, p) >= c) - c P(Bin(n, p) >= c + 1).

    >>> float(dropped_tokens(2.0, [0.5, 0.5], 1, 1.0))  # both on one expert half of the time: one row too many
    0.5
    """
    n: Array = np.asarray(tokens, dtype=float)
    if capacity_factor is None:
        return np.zeros_like(n)
    if capacity_factor <= 0:
        raise MappingError(f"capacity_factor = {capacity_factor}: expected more than 0, or None for dropless")
    p = np.minimum(top_k * np.asarray(shares, dtype=float), 1.0)
    count = n[..., None]
    full = np.ceil(capacity_factor * count * top_k / len(p) - 1e-9)
    lost = count * p * _at_least(count - 1, p, full) - full * _at_least(count, p, full + 1)
    total: Array = np.maximum(lost, 0.0).sum(axis=-1)
    return total


def _at_least(n: Array, p: Array, k: Array) -> Array:
    """P(Bin(n, p) >= k) by the regularised incomplete beta function."""
    inside = (k >= 1) & (k <= n)
    tail = betainc(np.where(inside, k, 1.0), np.where(inside, n - k + 1, 1.0), p)
    found: Array = np.where(inside, tail, np.where(k < 1, 1.0, 0.0))
    return found


def exposed_s(
    dispatch_s: ArrayLike, combine_s: ArrayLike, *, shared_s: ArrayLike = 0.0, other_s: ArrayLike | None = None
) -> Array:
    """Seconds of an exchange that no arithmetic hides.

    shared_s   of the shared experts, which run while tokens are dispatched
    other_s    of a second micro-batch's arithmetic, which runs during both phases of the first and the other way round
               (DeepSeek-V3, arXiv:2412.19437, section 3.4); None where there is one batch. It hides the shared
               experts' time no more, being arithmetic itself.
    """
    dispatch, combine = np.asarray(dispatch_s, dtype=float), np.asarray(combine_s, dtype=float)
    if other_s is not None:
        both: Array = np.maximum(dispatch + combine - np.asarray(other_s, dtype=float), 0.0)
        return both
    first: Array = np.maximum(dispatch - np.asarray(shared_s, dtype=float), 0.0)
    total: Array = first + combine
    return total
