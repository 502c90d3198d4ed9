"""Which stage should give a device to which, now that queues are as they are?

The rule is that of EPD (arXiv:2501.05460; constants from vbdi/epdserve, resource_allocation.py): queues are looked at
every second and a move is decided every five. Whoever calls it carries the move out: the device finishes what it has
(offload), swaps weights where the stages' differ (migrate), and takes new work (onload).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from simulator.errors import PoolError

#: Between two looks at the queues, and between two decisions.
MONITOR_S, DECIDE_S = 1.0, 5.0
#: Queues that reach this share of the longest one count as equally long.
NEAR = 0.5


def switch(queues: Mapping[str, float], engines: Mapping[str, int]) -> tuple[str, str] | None:
    """(stage that gives an engine, stage that gets it), None where nothing should move.

    queues    work that waits at each stage, in the same unit
    engines   engines of each stage

    The stage with the longest queue gets one, unless every queue is at least half as long. Giving is the stage with the
    most engines to spare beyond its last one among those with a shorter queue. The first of equals, in both. Raises
    PoolError where queues and engines are not of the same stages.

    >>> switch({"encode": 12, "prefill": 0, "decode": 1}, {"encode": 1, "prefill": 2, "decode": 5})
    ('decode', 'encode')
    >>> switch({"encode": 12, "prefill": 6, "decode": 9}, {"encode": 1, "prefill": 2, "decode": 5}) is None
    True
    """
    if not queues or queues.keys() != engines.keys():
        raise PoolError(f"queues of {', '.join(queues)}, engines of {', '.join(engines)}: expected the same stages")
    longest = max(queues.values())
    if all(queue >= NEAR * longest for queue in queues.values()):
        return None
    to = next(stage for stage, queue in queues.items() if queue == longest)
    spare = {stage: engines[stage] - 1 for stage, queue in queues.items() if stage != to and queue < longest}
    most = max(spare.values())
    if most < 1:
        return None
    return next(stage for stage, left in spare.items() if left == most), to


@dataclass(frozen=True, slots=True)
class SwitchCost:
    """How long a device is out of service when it changes stages, in seconds, beside finishing what it has.

    same_weights_s   between stages that keep the same weights, such as prefill and decode
    swap_s           between stages with different ones, such as encode and prefill
    alike            stages that keep the same weights

    EPD reports about 0.7 s; loading weights over a host link of B bytes/s takes weights / B.
    """

    same_weights_s: float = 0.0
    swap_s: float = 0.7
    alike: frozenset[str] = frozenset({"prefill", "decode"})

    def seconds(self, source: str, target: str) -> float:
        """Of a move from one stage to another."""
        return self.same_weights_s if {source, target} <= self.alike else self.swap_s


@dataclass(slots=True)
class RoleSwitch:
    """The rule over time, with hysteresis: `look` every MONITOR_S, `decide` returns a move at most every DECIDE_S.

    patience   looks in a row, the last one included, at which the rule must ask for the same move (1: as EPD does)
    rest_s     after a move, how long the opposite move is refused (0: as EPD does)

    Raises PoolError for a patience below 1.
    """

    patience: int = 1
    rest_s: float = 0.0
    _asked: tuple[str, str] | None = field(default=None, init=False)
    _times: int = field(default=0, init=False)
    _decided_s: float = field(default=-inf, init=False)
    _moved_s: dict[tuple[str, str], float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Raise PoolError for a patience below 1."""
        if self.patience < 1 or self.rest_s < 0:
            raise PoolError(f"patience = {self.patience}, rest_s = {self.rest_s}: expected at least 1, at least 0")

    def look(self, queues: Mapping[str, float], engines: Mapping[str, int]) -> None:
        """Note what the rule would do with the queues of this moment."""
        asked = switch(queues, engines)
        self._times = self._times + 1 if asked == self._asked else 1
        self._asked = asked

    def decide(self, now_s: float) -> tuple[str, str] | None:
        """The move to carry out now, (from, to); None where there is none, or it is not yet time."""
        asked = self._asked
        if now_s - self._decided_s < DECIDE_S:
            return None
        self._decided_s = now_s
        if asked is None or self._times < self.patience:
            return None
        if now_s - self._moved_s.get(asked[::-1], -inf) < self.rest_s:
            return None
        self._moved_s[asked] = now_s
        self._asked, self._times = None, 0
        return asked
