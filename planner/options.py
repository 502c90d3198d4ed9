"""What can be bought, for what traffic, with what budget? The data of the pool-sizing program (planner/pools.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Literal

from planner.errors import PlanError

Role = Literal["aggregated", "prefill", "decode", "mixed", "encode"]
Phase = Literal["encode", "prefill", "decode", "whole"]

#: What replicas of each role may do; `whole` is a request from its prompt to its last token on one replica.
PHASES: Mapping[Role, tuple[Phase, ...]] = {
    "aggregated": ("whole",),
    "prefill": ("prefill",),
    "decode": ("decode",),
    "mixed": ("whole", "prefill", "decode"),
    "encode": ("encode",),
}


@dataclass(frozen=True, slots=True)
class Service:
    """What one replica does for one class of requests if it does nothing else; 0 for what it cannot do.

    encode_per_s, prefill_per_s, decode_per_s, whole_per_s   requests per second within the limits, by phase
    prefill_token_s, decode_token_s, whole_token_s           KV tokens x seconds that a request holds meanwhile
    kv_bytes   of a request, moved when it is prefilled on one replica and decoded on another
    """

    encode_per_s: float = 0.0
    prefill_per_s: float = 0.0
    decode_per_s: float = 0.0
    whole_per_s: float = 0.0
    prefill_token_s: float = 0.0
    decode_token_s: float = 0.0
    whole_token_s: float = 0.0
    kv_bytes: float = 0.0

    def __post_init__(self) -> None:
        """Raise PlanError for a figure that is negative or not finite."""
        for name in self.__slots__:
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise PlanError(f"{name}={value}: expected a finite number of at least 0")

    def per_s(self, phase: Phase) -> float:
        """Requests per second in the phase."""
        rate: float = getattr(self, f"{phase}_per_s")
        return rate

    def held_token_s(self, phase: Phase) -> float:
        """Token-seconds of KV in the phase; encoders hold none."""
        return 0.0 if phase == "encode" else float(getattr(self, f"{phase}_token_s"))


@dataclass(frozen=True, slots=True)
class Option:
    """A kind of replica in a role.

    key                what it is called; distinct among options
    services           one for each class of requests
    kv_tokens          that its KV memory holds, all schedulers together
    link_bytes_per_s   of its network cards, in each direction, for KV that leaves it or comes in
    kv_format          KV moves only between replicas of the same format
    price_usd_per_h    of the replica; None where its devices have no price
    power_w            of the replica
    """

    key: str
    role: Role
    hardware: str
    gpus: int
    services: tuple[Service, ...]
    kv_tokens: float = inf
    link_bytes_per_s: float = inf
    kv_format: str = ""
    price_usd_per_h: float | None = None
    power_w: float = 0.0

    def __post_init__(self) -> None:
        """Raise PlanError for figures that cannot be."""
        if self.role not in PHASES:
            raise PlanError(f"role {self.role!r}: expected one of {', '.join(PHASES)}")
        if self.gpus < 1:
            raise PlanError(f"option {self.key}: gpus={self.gpus}; expected at least 1")
        for name in ("kv_tokens", "link_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise PlanError(f"option {self.key}: {name}={getattr(self, name)}; expected a number above 0")
        for name, value in (("price_usd_per_h", self.price_usd_per_h or 0.0), ("power_w", self.power_w)):
            if not (isfinite(value) and value >= 0):
                raise PlanError(f"option {self.key}: {name}={value}; expected a finite number of at least 0")


def phases_of(option: Option, index: int) -> tuple[Phase, ...]:
    """What the replica does for class `index`: what its role allows and its service can."""
    return tuple(phase for phase in PHASES[option.role] if option.services[index].per_s(phase) > 0)


@dataclass(frozen=True, slots=True)
class Class:
    """A class of requests: its share of the rate, and whether its requests are encoded before they are prefilled."""

    name: str = "default"
    share: float = 1.0
    encodes: bool = False


@dataclass(frozen=True, slots=True)
class Demand:
    """The traffic: classes whose shares add up to 1; rate_per_s of all together, None where it is to be found."""

    classes: tuple[Class, ...] = (Class(),)
    rate_per_s: float | None = None

    def __post_init__(self) -> None:
        """Raise PlanError for shares that are not, or a rate that cannot be."""
        if not self.classes or any(not kind.share > 0 for kind in self.classes):
            raise PlanError("classes: expected at least one, each with a share above 0")
        total = sum(kind.share for kind in self.classes)
        if abs(total - 1) > 1e-6:
            raise PlanError(f"shares of the classes add up to {total:g}: expected 1")
        if self.rate_per_s is not None and not (isfinite(self.rate_per_s) and self.rate_per_s > 0):
            raise PlanError(f"rate {self.rate_per_s}: expected a finite number of requests per second above 0")


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent.

    gpus                 devices by type, types left out: none; None for as many as it takes
    usd_per_h, power_w   of all replicas
    link_bytes_per_s     of KV between types (or within one), by (from, to); pairs left out: no limit; 0: no way
    fabric_bytes_per_s   of all KV that moves
    """

    gpus: Mapping[str, int] | None = None
    usd_per_h: float = inf
    power_w: float = inf
    link_bytes_per_s: Mapping[tuple[str, str], float] = field(default_factory=dict)
    fabric_bytes_per_s: float = inf

    def __post_init__(self) -> None:
        """Raise PlanError for negative amounts."""
        amounts = [self.usd_per_h, self.power_w, self.fabric_bytes_per_s, *self.link_bytes_per_s.values()]
        amounts += self.gpus.values() if self.gpus is not None else ()
        for amount in amounts:
            if not amount >= 0:
                raise PlanError(f"budget of {amount}: expected at least 0")

    def link(self, source: str, target: str) -> float:
        """Bytes per second from one type to another."""
        return self.link_bytes_per_s.get((source, target), inf)

    def __str__(self) -> str:
        parts = [f"{count} {hardware}" for hardware, count in (self.gpus or {}).items()]
        parts += [f"{self.usd_per_h:g} USD/h"] if self.usd_per_h < inf else []
        parts += [f"{self.power_w / 1e3:g} kW"] if self.power_w < inf else []
        return ", ".join(parts) or "any budget"
