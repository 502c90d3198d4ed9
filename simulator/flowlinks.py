"""Which links does a flow cross, and which of them need looking at when rates are worked out?"""

from __future__ import annotations

from math import inf

from hwmodels.errors import ShardwiseError


class FlowError(ShardwiseError):
    """A flow or a link that cannot be as given, or a time that goes back."""

    exit_code = 4


#: Relative rounding that is not taken for a difference; erring on either side costs time, or a rate by this much.
ROUNDING = 1e-12


class Link:
    """A link and the flows on it.

    room      bytes/s that no flow takes; `least` is the most below 0 that rounding may bring it
    flows     streams of each flow that cross it
    necks     flows that it holds up
    paths     the paths over it, and firsts: links that fill no later on all of these, None before the first path

    Of the sharing under way: `members` are its flows that get a new rate, `left` and `streams` what they may take and
    have not been given yet, `level` the bytes/s of each stream it holds up, `after` the room there will be; `mark`,
    `touched` and `short` say in which round, or sharing, this was set.
    """

    __slots__ = (
        "after",
        "capacity",
        "count",
        "firsts",
        "flows",
        "index",
        "least",
        "left",
        "level",
        "mark",
        "members",
        "necks",
        "paths",
        "room",
        "short",
        "streams",
        "touched",
    )

    def __init__(self, index: int, capacity: float) -> None:
        self.index = index
        self.capacity = self.room = capacity
        self.least = -ROUNDING * capacity
        self.flows: dict[Flow, float] = {}
        self.necks = 0
        self.paths: list[Path] = []
        self.firsts: set[Link] | None = None
        self.members: list[Flow] = []
        self.left = self.streams = self.level = self.after = 0.0
        self.mark = self.touched = self.short = self.count = 0


class Path:
    """Links crossed together.

    watched   links that can be short, with the streams of a flow that cross each
    fractions of a flow's bytes over each link
    peak      bytes/s of each stream when there are no other flows
    carried   bytes of the flows that have left it
    """

    __slots__ = ("carried", "fractions", "peak", "streams", "watched", "weight")

    def __init__(self, fractions: dict[Link, float], weight: float) -> None:
        self.fractions = fractions
        self.weight = weight
        self.streams = {link: fraction * weight for link, fraction in fractions.items()}
        self.watched: list[tuple[Link, float]] = []
        self.peak = min((link.capacity / streams for link, streams in self.streams.items()), default=inf)
        self.carried = 0.0


class Flow:
    """A flow on its way; all bytes here are per stream.

    left, since    bytes to go at `since_s`; level: bytes/s since then; end_s: when none are left
    due_s          time of its entry in the heap, never after end_s
    neck           the link that gives it no more, None where it moves at its peak
    chosen         number of the sharing it takes part in; fair: the rate found there, -1 before
    """

    __slots__ = (
        "due",
        "end",
        "fair",
        "left",
        "level",
        "nbytes",
        "neck",
        "next",
        "number",
        "path",
        "peak",
        "priority",
        "since",
        "start",
        "watched",
    )

    def __init__(self, number: int, path: Path, nbytes: float, peak: float, priority: int, start: float) -> None:
        self.number = number
        self.path = path
        self.watched = path.watched
        self.nbytes = nbytes
        self.left = nbytes / path.weight
        self.peak = peak
        self.priority = priority
        self.start = self.since = start
        self.level = 0.0
        self.end = self.due = inf
        self.neck: Link | None = None
        self.next: Link | None = None
        self.fair = 0.0


def fractions_of(links: list[Link], indices: tuple[int, ...], shares: tuple[float, ...] | None) -> dict[Link, float]:
    """Fraction of a flow's bytes over each link it crosses; raises FlowError for what cannot be one."""
    if shares is not None and len(shares) != len(indices):
        raise FlowError(f"{len(shares)} shares of {len(indices)} links: expected one for each")
    fractions: dict[Link, float] = {}
    for index, share in zip(indices, (1.0,) * len(indices) if shares is None else shares, strict=True):
        if not 0 <= index < len(links):
            raise FlowError(f"link {index}: expected one of 0 to {len(links) - 1}")
        if not 0.0 <= share < inf:
            raise FlowError(f"share {share} of link {index}: expected a fraction of the bytes of at least 0")
        if share:
            fractions[links[index]] = fractions.get(links[index], 0.0) + share
    return fractions


def add_path(path: Path) -> list[Link]:
    """Make a path known to its links; returns those that must be watched from now on, on all their paths.

    A link need not be while another fills no later on every path over it; of two that fill together, the first counts.
    """
    woken: list[Link] = []
    for link, streams in path.streams.items():
        link.paths.append(path)
        known = link.firsts
        if known is None or known:
            link.firsts = {
                other
                for other in path.streams.keys() & (path.streams if known is None else known)
                if (path.streams[other] * link.capacity, link.index) > (streams * other.capacity, other.index)
            }
        if not link.firsts:
            if known:
                woken.append(link)
            else:
                path.watched.append((link, streams))
    return woken
