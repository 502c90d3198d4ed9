"""How the KV of a prompt goes from the replica that computed it to the one that decodes: a description, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

#: A request's KV is sent when its prompt has been computed, or layer by layer while it is being computed.
Mode = Literal["serialized", "layer-wise"]


class Way(Protocol):
    """The links that one request's KV takes at once: `shares[i]` of the bytes cross `links[i]`, in `weight` streams.

    latency_s            before the first byte arrives
    bytes_per_token      that cross the links, more than the cache holds where a head goes to several ranks
    limit_bytes_per_s    most that the software moves of it
    """

    @property
    def links(self) -> Sequence[int]: ...
    @property
    def shares(self) -> Sequence[float]: ...
    @property
    def weight(self) -> float: ...
    @property
    def latency_s(self) -> float: ...
    @property
    def bytes_per_token(self) -> float: ...
    @property
    def limit_bytes_per_s(self) -> float: ...


@dataclass(frozen=True, slots=True, eq=False)
class Handover:
    """The network between replicas, and what crosses it.

    bytes_per_s, names   capacity of every link, and how it is called
    route                from the source replica and its lane, the target replica and its lane to the way between them
    layers               of the model: a prompt's last layer cannot be sent before its last step ends
    mode                 see Mode
    overlap_tokens       shorter prompts are sent in one piece, whatever the mode
    first_token          which side gives the user the first token: the one that computed it, at once, or the one that
                         decodes, when the KV has come (vLLM, SGLang and Dynamo answer from the decode side)
    """

    bytes_per_s: Sequence[float]
    names: Sequence[str]
    route: Callable[[int, int, int, int], Way]
    layers: int
    mode: Mode = "layer-wise"
    overlap_tokens: int = 512
    first_token: Literal["prefill", "decode"] = "decode"


@dataclass(slots=True)
class Transfer:
    """One request's KV on its way.

    source, source_lane   where its prompt is computed
    target, lane          where it will decode; lane is None while no blocks are set aside
    covered_tokens        of the prompt that have been sent or wait to be sent
    backlog_tokens        whose KV waits to be sent
    flying                flows under way
    done                  whether the prompt has been computed
    ready_s, reserved_s   when it had been, and when blocks were set aside
    sent_bytes            given to the network so far
    """

    source: int
    target: int
    source_lane: int = 0
    lane: int | None = None
    covered_tokens: int = 0
    backlog_tokens: float = 0.0
    flying: int = 0
    done: bool = False
    ready_s: float = 0.0
    reserved_s: float = 0.0
    sent_bytes: float = 0.0
